"""Replay: run the user's step for what it calls, without learning from it and without a trace.

Only the user's step knows how to make the network's input from a batch. So whoever needs inputs before training, or
after it, runs the step: without a backward pass, with logging muted, and with parameters, buffers, metrics, attributes
and random states put back afterwards. A run that needed a replay then equals one that did not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_compress import _compat
from lightning_compress.mechanisms.capture import Capture, CaptureError, NetworkCall
from lightning_compress.mechanisms.isolation import MUTED, attributes_kept, device_of, module_kept, random_state_kept
from lightning_compress.mechanisms.loaders import data_kept, independent_loaders
from lightning_compress.mechanisms.selection import find_module
from lightning_compress.mechanisms.sharding import class_name, sharded_units
from lightning_compress.mechanisms.stages import LayerOutput, record_outputs
from lightning_compress.mechanisms.student import StudentCapture
from lightning_compress.mechanisms.wrapping import shadowed

if TYPE_CHECKING:
    from lightning_compress.mechanisms.controller import StepController

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
BATCH_STARTS = {"training_step": "on_train_batch_start", "validation_step": "on_validation_batch_start"}
TRIES = 32  # batches that may be skipped by the step before the first that is not


class _Reached(BaseException):
    """Ends a step where it has shown what was asked for; no user's ``except Exception`` catches it."""


@contextmanager
def traceless(module: nn.Module, *, parameters: bool = True) -> Iterator[None]:
    """Undo at the end whatever a step does to its module, to random states, and to what is logged.

    Args:
        module: The LightningModule.
        parameters: Whether the step may write into parameters; they are copied then.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> with traceless(layer):
        ...     _ = layer(torch.rand(4, 2))
        >>> layer.running_mean
        tensor([0., 0.])
    """
    with ExitStack() as stack:
        stack.enter_context(random_state_kept(device_of(module)))
        stack.enter_context(module_kept(module, parameters=parameters))
        stack.enter_context(_compat.silenced_loggers(module))
        for scheduler in stack.enter_context(_compat.rates_kept(module)):
            stack.enter_context(attributes_kept(scheduler, whole=True, data=("optimizer",)))
        for method in MUTED:
            if callable(getattr(module, method, None)):
                stack.enter_context(shadowed(module, method, lambda _: lambda *args, **kwargs: None))
        yield


class Replay:
    """A module's training step, to be run for what it calls; made by :func:`replay`.

    Args:
        controller: That of the module.
        method: Name of the step.
        step: Runs the original step; takes what Lightning passes to it, and whether with gradients.
        batches: The training batches as the step receives them, from the start each time it is called; takes the number
            of the epoch, for samplers that shuffle by it.
    """

    def __init__(
        self,
        controller: StepController,
        step: Callable[..., Any],
        batches: Callable[..., Iterator[tuple[Any, ...]]],
        method: str = "training_step",
    ) -> None:
        self._module = controller.module
        self._method = method
        self._step = step
        self.batches = batches
        self._hooked: tuple[str, ...] = ()
        self._differentiates = False  # whether the step asks for gradients itself
        self._breaks_off = not sharded_units(self._module)  # in a forward pass FSDP2 is in the midst of things

    def students(self, argument: str = "student") -> tuple[str, ...]:
        """Find the student: the network that the first step calls.

        Args:
            argument: What the user can name it with, for the error message.

        Returns:
            Its dotted name, empty for the module itself.

        Raises:
            CaptureError: If there is none, or more than one.
        """
        with StudentCapture(self._module, argument=argument) as capture:
            capture.required, skipped = True, 0
            for arguments in self._first_batches():
                capture.start(detect=True)
                if self._step(*arguments, gradients=True) is not None or not self._none_skips:
                    capture.stop()
                    break
                capture.abort()  # a skipped batch: whatever it called is no evidence
                skipped += 1
            if capture.names is None:
                step = f"the {self._method.replace('_', ' ')} of {class_name(self._module)}"
                more = f": it returned None for each of {skipped} batches; name the network with {argument}="
                raise CaptureError(f"{step} calls no network{more if skipped else ''}")
            return capture.names

    def received(
        self, student: tuple[str, ...], arguments: tuple[Any, ...], argument: str = "student"
    ) -> NetworkCall | None:
        """What the student is given in a step, which goes no further than that.

        Args:
            student: One dotted name, or those of the ends of a chain.
            arguments: The step's, as :attr:`batches` gives them.
            argument: What the user names it with, for the error message.

        Returns:
            The first call, without output; None if the step does not call the student.
        """
        network = find_module(self._module, student[0], argument=argument)

        def stop(key: object, args: tuple[Any, ...], kwargs: Any) -> None:
            reached.append(NetworkCall(args, kwargs, None))
            if self._breaks_off:
                raise _Reached

        reached: list[NetworkCall] = []
        if student != self._hooked:  # compiled code knows only the hooks that it was compiled with
            self._hooked = student
            _compat.reset_compiled_code()
        with Capture(network, direct=network is self._module) as capture:
            capture.on_input = stop
            capture.start()
            with suppress(_Reached):
                self._step(*arguments, gradients=False)
            if reached:  # also where a bare except of the user's caught what was to end the step
                return reached[0]
            calls = capture.stop()  # compiled code does not tell while it runs
        return NetworkCall(calls[0].args, calls[0].kwargs, None) if calls else None

    def first_received(
        self, student: tuple[str, ...], argument: str = "student"
    ) -> tuple[NetworkCall, tuple[Any, ...]]:
        """The first call of the student, and the step's arguments that led to it.

        Args:
            student: As in :meth:`received`.
            argument: Likewise.

        Raises:
            CaptureError: If the step does not call it.
        """
        for arguments in self._first_batches():
            call = self.received(student, arguments, argument)
            if call is not None:
                return call, arguments
        manual = not getattr(self._module, "automatic_optimization", True)
        when = " before its first backward pass, where a step that is only looked at ends" if manual else ""
        more = ", or name its layers" if argument == "student" else ""
        raise CaptureError(
            f"the training step of {class_name(self._module)} does not call the {argument} '{'/'.join(student)}'"
            f"{when}; choose another with {argument}={more}"
        )

    def outputs(self, student: tuple[str, ...], arguments: tuple[Any, ...]) -> list[LayerOutput]:
        """What the layers of the student return in a step, which goes no further than the student's return.

        Args:
            student: As in :meth:`received`; the layers of a chain are those of the whole module.
            arguments: The step's.

        Returns:
            One entry for each layer that returned one tensor once, in the order in which they returned.
        """
        root = find_module(self._module, student[0], argument="student") if len(student) == 1 else self._module
        last = find_module(self._module, student[-1], argument="student")

        def stop() -> None:
            if self._breaks_off:
                raise _Reached

        with record_outputs(root) as outputs, Capture(last, direct=last is self._module) as capture:
            capture.on_output = stop
            capture.start()
            with suppress(_Reached):
                self._step(*arguments, gradients=True)
        return outputs()

    def run(self, arguments: tuple[Any, ...]) -> None:
        """Run a whole step.

        Args:
            arguments: The step's, as :attr:`batches` gives them.
        """
        if not self._differentiates:
            try:
                self._step(*arguments, gradients=False)
            except RuntimeError as error:  # with gradients a step whose loss is kept would hold all of them
                if self._method != "training_step" or "require grad" not in str(error):
                    raise
                self._differentiates = True
            else:
                return
        self._step(*arguments, gradients=True)

    @property
    def _none_skips(self) -> bool:
        """Whether a step that returns None has skipped its batch."""
        return self._method == "training_step" and bool(getattr(self._module, "automatic_optimization", True))

    def _first_batches(self) -> Iterator[tuple[Any, ...]]:
        for index, arguments in enumerate(self.batches()):
            if index == TRIES:
                return
            yield arguments


def prepare_step(module: Any, arguments: tuple[Any, ...], method: str = "training_step") -> bool:
    """Let the module's own hook prepare a step, as it does in a fit.

    Args:
        module: The LightningModule, or a copy of it.
        arguments: The step's.
        method: Name of the step.

    Returns:
        Whether the step is to be run.

    Example:
        >>> prepare_step(nn.Linear(2, 2), (torch.ones(1, 2), 0))  # it has no such hook
        True
    """
    hook = getattr(module, BATCH_STARTS[method], None)
    if not callable(hook) or not arguments or isinstance(arguments[0], Iterator):  # the step draws its batches
        return True
    return not (hook(arguments[0], _number_of(arguments)) == -1 and method == "training_step")


def _number_of(arguments: tuple[Any, ...]) -> int:
    """That of the batch, 0 where a step is not given it."""
    return arguments[1] if len(arguments) > 1 and isinstance(arguments[1], int) else 0


@contextmanager
def replay(
    controller: StepController,
    trainer: Any,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    *,
    method: str = "training_step",
) -> Iterator[Replay]:
    """Run the training step, or the validation step, on the training data, without learning and without a trace.

    Args:
        controller: That of the module.
        trainer: The Trainer, whose training data is set up: from ``on_train_start`` on.
        context: Around each step; the autocast of the Trainer's precision, say.
        method: Name of the step.

    Yields:
        The replay.

    Raises:
        ValueError: If the training data can be read only once.

    Example:
        >>> import lightning.pytorch as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_compress.mechanisms.step import step_controller
        >>> class Find(L.Callback):
        ...     def on_train_start(self, trainer, pl_module):
        ...         with step_controller(pl_module) as controller, replay(controller, trainer) as again:
        ...             self.student = again.students()
        >>> find = Find()
        >>> L.Trainer(fast_dev_run=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        ...           enable_model_summary=False, callbacks=[find]).fit(BoringModel())
        >>> find.student
        ('layer',)
    """
    module: Any = controller.module

    def fitting(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """A batch, its number, and 0 for each further argument without a default."""
        parameters = list(inspect.signature(getattr(module, method)).parameters.values())[1:]
        needed = [entry for entry in parameters if entry.default is entry.empty and entry.kind in POSITIONAL]
        return (arguments[0], _number_of(arguments), *[0] * len(needed))[: len(needed) + 1]

    def step(*arguments: Any, gradients: bool) -> Any:
        if not prepare_step(module, arguments, method):
            return None
        with context(), torch.set_grad_enabled(gradients), _no_learning(module):
            try:
                return getattr(module, method)(*(arguments if method == "training_step" else fitting(arguments)))
            except (_Backward, StopIteration):  # the latter from a step that takes its batches itself, at their end
                return None

    if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters()):
        raise ValueError(
            f"{class_name(module)} has lazy modules, which get their shapes in the first step, and the step would "
            "have to be run before: call the network once on an example before the fit"
        )
    with ExitStack() as stack:
        stack.enter_context(traceless(module))
        stack.enter_context(data_kept([trainer.datamodule]))
        loaders = stack.enter_context(independent_loaders(_compat.training_loaders(trainer)))
        stack.callback(setattr, controller, "replaying", controller.replaying)
        controller.replaying = True
        batches = partial(_compat.training_batches, trainer, loaders)
        yield Replay(controller, step, batches, method)


class _Backward(BaseException):
    """Ends a step with manual optimisation where it would begin to learn."""


@contextmanager
def _no_learning(module: Any) -> Iterator[None]:
    """Let a step with manual optimisation end at its first backward pass."""

    def backward(_: Any) -> Callable[..., Any]:
        def stop(*args: Any, **kwargs: Any) -> None:
            raise _Backward

        return stop

    if getattr(module, "automatic_optimization", True) or not hasattr(module, "manual_backward"):
        yield
        return
    original = Tensor.backward
    with shadowed(module, "manual_backward", backward):
        Tensor.backward = backward(original)  # type: ignore[method-assign]
        try:
            yield
        finally:
            Tensor.backward = original  # type: ignore[method-assign]
