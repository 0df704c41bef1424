"""The one wrapper around a module's steps: extra passes, extra losses, and one teacher forward a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.mechanisms.capture import OWN_MARK, CaptureError, NetworkCall, StudentCapture, shadowed
from lightning_compress.mechanisms.teacher import Teacher

Convert = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True, eq=False)
class View:
    """One way to present the weights to a step.

    Attributes:
        name: Name, also of its losses.
        enter: Makes the context in which the step runs.
        deployed: Whether this is the network that will be shipped: its output is the step's, and distillation terms
            belong to it alone.
    """

    name: str
    enter: Callable[[], AbstractContextManager[Any]] = nullcontext
    deployed: bool = True


@dataclass(frozen=True, eq=False)
class Pass:
    """One run of the user's step under one view.

    Attributes:
        view: The view it ran under.
        batch: The step's first argument.
        task_loss: What the step returned as its loss; None in validation.
        calls: Calls of each captured student.
    """

    view: View
    batch: Any
    task_loss: Tensor | None
    calls: Mapping[StudentCapture, Sequence[NetworkCall]]

    def call(self, capture: StudentCapture) -> NetworkCall | None:
        """The one call of a student in this pass; None if there was none.

        Raises:
            CaptureError: If the step called the student more than once.
        """
        calls = self.calls.get(capture, ())
        if len(calls) > 1:
            name = "/".join(capture.names or ()) or "the LightningModule"
            raise CaptureError(
                f"the step calls the student '{name}' {len(calls)} times; a term needs one call a step: choose a "
                "module that is called once with student=, or pass both inputs in one call"
            )
        return calls[0] if calls else None


@dataclass(frozen=True, eq=False)
class Term:
    """A loss to add.

    Attributes:
        name: Unique; terms are summed in the order of their names, so that no list's order changes a bit of the sum.
        compute: From the passes it belongs to, by view name, to the weighted loss; None for nothing this time.
        view: Name of the view it belongs to; "" for the deployed one, None for a term between views.
    """

    name: str
    compute: Callable[[Mapping[str, Pass]], Tensor | None]
    view: str | None = ""


@dataclass(eq=False)
class _SharedTeacher:
    """A teacher that several callbacks use, with its outputs of the current step."""

    teacher: Teacher
    outputs: dict[NetworkCall, Any] = field(default_factory=dict)

    def __call__(self, call: NetworkCall) -> Any:
        if call not in self.outputs:
            self.outputs[call] = self.teacher(call)
        return self.outputs[call]


class StepController:
    """Runs a module's ``training_step`` under each view, sums the losses, and shows calls to whoever asks.

    The total is ``sum over views of (task_weight * task_loss + terms of the view) + terms between views``. Open it
    with :func:`step_controller`; everything added through its methods lasts as long as their contexts.

    Args:
        module: The LightningModule; in a plain loop, any module with a ``training_step``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.references = 0
        self.stack = ExitStack()
        self.steps = 0
        self._captures: dict[Any, StudentCapture] = {}
        self._teachers: dict[tuple[int, int], _SharedTeacher] = {}
        self._views: list[View] = []
        self._terms: dict[str, Term] = {}
        self._task_weights: dict[str, float] = {}
        self._observers: list[Callable[[Pass], None]] = []
        self._running: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None
        self._explicit_losses = 0

    # What callbacks add

    def capture(self, student: str | Sequence[str] | None, *, required: bool = True) -> StudentCapture:
        """Record the student's calls; one record serves all who name the same student.

        Args:
            student: As in :class:`StudentCapture`. None: the student that another callback named, else the one found.
            required: Raise in the first training step if the student cannot be told.

        Returns:
            The shared capture, closed with the controller.
        """
        key = student if student is None or isinstance(student, str) else tuple(student)
        if key not in self._captures:
            self._captures[key] = self.stack.enter_context(StudentCapture(self.module, student))
        self._captures[key].required |= required
        return self._captures[key]

    def teacher(
        self,
        module: nn.Module,
        transform: nn.Module | None = None,
        *,
        device: torch.device | None = None,
        convert: Convert | None = None,
    ) -> Callable[[NetworkCall], Any]:
        """A teacher that runs once a batch, however many ask for its output.

        Args:
            module: The network.
            transform: As in :class:`Teacher`.
            device: Where to run it.
            convert: What the precision does to modules.

        Returns:
            From a call of the student to the teacher's output.

        Raises:
            ValueError: If teacher and student share parameters: freezing one would freeze the other.
        """
        own = {id(parameter) for parameter in self.module.parameters()}
        if any(id(parameter) in own for parameter in module.parameters()):
            raise ValueError(
                f"teacher {type(module).__name__} shares parameters with {type(self.module).__name__}, the module "
                "being trained, and would freeze it; give a copy: copy.deepcopy(teacher)"
            )
        key = (id(module), id(transform))
        if key not in self._teachers:
            teacher = Teacher(module, transform)
            self.stack.enter_context(teacher.prepared(device, convert))
            self._teachers[key] = _SharedTeacher(teacher)
        return self._teachers[key]

    @contextmanager
    def view(self, view: View) -> Iterator[None]:
        """Run the step under this view too; with none added it runs once, as it is.

        Raises:
            ValueError: If there would be two views of one name, or two deployed ones.
        """
        for other in self._views:
            if other.name == view.name or (other.deployed and view.deployed):
                raise ValueError(f"two callbacks present the same weights: the views '{other.name}' and '{view.name}'")
        self._views.append(view)
        try:
            yield
        finally:
            self._views.remove(view)

    @contextmanager
    def term(self, term: Term) -> Iterator[None]:
        """Add a loss term.

        Raises:
            ValueError: If a term of this name exists.
        """
        if term.name in self._terms:
            raise ValueError(f"two callbacks are named '{term.name}'; give one another name=")
        self._terms[term.name] = term
        try:
            yield
        finally:
            del self._terms[term.name]

    @contextmanager
    def task_weight(self, owner: str, weight: float) -> Iterator[None]:
        """Weigh the task loss; 1 is no claim.

        Raises:
            ValueError: If another owner set a weight other than 1.
        """
        if weight != 1.0:
            for other, value in self._task_weights.items():
                raise ValueError(
                    f"'{other}' sets task_weight={value} and '{owner}' sets task_weight={weight}; only one callback "
                    "can weigh the task loss: give the others task_weight=1"
                )
            self._task_weights[owner] = weight
        try:
            yield
        finally:
            self._task_weights.pop(owner, None)

    @contextmanager
    def observer(self, observe: Callable[[Pass], None]) -> Iterator[None]:
        """Show every validation pass to a function, after the validation step has run."""
        self._observers.append(observe)
        try:
            yield
        finally:
            self._observers.remove(observe)

    # What a step does

    def run_training(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the training step in the user's stead and return its output with the total loss in it."""
        self._begin()
        if not getattr(self.module, "automatic_optimization", True):
            return self._run_manual(original, args, kwargs)
        views = self._views or [View("plain")]
        passes: dict[str, Pass] = {}
        totals: list[Tensor] = []
        deployed_output: Any = None
        for view in views:
            with view.enter():
                output, calls = self._recorded(original, args, kwargs)
                if output is None:
                    return None
                task_loss = _loss_of(output)
                passes[view.name] = Pass(view, _first(args, kwargs), task_loss, calls)
                totals.append(self._weighted(task_loss))
                totals += self._computed(view.name, view.deployed, passes)
            if view.deployed or deployed_output is None:
                deployed_output = output
        totals += self._computed(None, False, passes)
        self.steps += 1
        return _with_loss(deployed_output, _sum(totals))

    def run_validation(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the validation step, then show what it called to the observers."""
        self._forget()
        if not self._observers:
            return original(*args, **kwargs)
        output, calls = self._recorded(original, args, kwargs, detect=False)
        seen = Pass(View("plain"), _first(args, kwargs), None, calls)
        for observe in self._observers:
            observe(seen)
        self._forget()
        return output

    def compressed_loss(self, task_loss: Tensor) -> Tensor:
        """The total loss inside a step with manual optimisation, from the network calls since the last one.

        Raises:
            RuntimeError: If called outside of a training step with manual optimisation.
        """
        if self._running is None:
            raise RuntimeError("compressed_loss is for training_step with automatic_optimization=False only")
        self._explicit_losses += 1
        calls = {capture: capture.drain() for capture in self._captures.values()}
        passes = {"plain": Pass(View("plain"), _first(*self._running), task_loss, calls)}
        return _sum([self._weighted(task_loss), *self._computed("plain", True, passes)])

    def _run_manual(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._running, self._explicit_losses = (args, kwargs), 0
        try:
            output, _ = self._recorded(original, args, kwargs)
        finally:
            self._running = None
        if self._terms and self._explicit_losses == 0:
            raise RuntimeError(
                f"{type(self.module).__name__}.training_step never called self.compressed_loss(task_loss), so "
                f"{sorted(self._terms)} would have no effect"
            )
        self.steps += 1
        return output

    def _recorded(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, detect: bool = True
    ) -> tuple[Any, dict[StudentCapture, list[NetworkCall]]]:
        captures = list(self._captures.values())
        for capture in captures:
            capture.start(detect=detect)
        try:
            output = original(*args, **kwargs)
        except BaseException:
            for capture in captures:
                capture.abort()
            raise
        if output is None and detect:  # a skipped batch: whatever it called is no evidence
            for capture in captures:
                capture.abort()
            return None, {}
        return output, {capture: capture.stop() for capture in captures}

    def _computed(self, view: str | None, deployed: bool, passes: Mapping[str, Pass]) -> list[Tensor]:
        values = []
        for _, term in sorted(self._terms.items()):
            if term.view == view or (term.view == "" and deployed):
                value = term.compute(passes if view is None else {view: passes[view]})
                values += [] if value is None else [value]
        return values

    def _weighted(self, task_loss: Tensor) -> Tensor:
        for weight in self._task_weights.values():
            return task_loss * weight
        return task_loss

    def _begin(self) -> None:
        self._forget()
        unknown = self._captures.get(None)
        if unknown is not None and unknown.names is None:
            named = {capture.names for key, capture in self._captures.items() if key is not None}
            if len(named) == 1 and (names := named.pop()) is not None:
                unknown.use(names)

    def _forget(self) -> None:
        for shared in self._teachers.values():
            shared.outputs.clear()


def find_controller(module: nn.Module) -> StepController | None:
    """The controller installed on a module, if there is one.

    Args:
        module: The LightningModule.

    Returns:
        The controller or None.

    Example:
        >>> find_controller(nn.Linear(1, 1)) is None
        True
    """
    controller = getattr(vars(module).get("training_step"), f"{OWN_MARK}_controller", None)
    return controller if isinstance(controller, StepController) else None


@contextmanager
def step_controller(module: nn.Module) -> Iterator[StepController]:
    """The controller of a module: installed by the first who opens it, removed by the last who closes it.

    Args:
        module: The LightningModule; in a plain loop any module with a ``training_step``.

    Yields:
        The controller.

    Example:
        >>> class Net(nn.Linear):
        ...     def training_step(self, x):
        ...         return self(x).sum()
        >>> net = Net(2, 1)
        >>> with step_controller(net) as controller, controller.term(Term("one", lambda passes: torch.ones(()))):
        ...     difference = net.training_step(torch.zeros(1, 2)) - net.bias
        >>> difference.item(), "training_step" in vars(net)
        (1.0, False)
    """
    controller = find_controller(module)
    if controller is None:
        controller = StepController(module)
        _install(controller)
    controller.references += 1
    try:
        yield controller
    finally:
        controller.references -= 1
        if controller.references == 0:
            controller.stack.close()


def _install(controller: StepController) -> None:
    module, stack = controller.module, controller.stack

    def training(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: controller.run_training(original, args, kwargs)

    def validation(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: controller.run_validation(original, args, kwargs)

    wrapper = stack.enter_context(shadowed(module, "training_step", training))
    setattr(wrapper, f"{OWN_MARK}_controller", controller)
    # Lightning asks whether validation_step is overridden; the wrapper answers through __wrapped__, as the original.
    if hasattr(module, "validation_step"):
        stack.enter_context(shadowed(module, "validation_step", validation))


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise TypeError(
            "training_step must return a tensor, a dict with a tensor under 'loss', or None, got "
            f"{type(output).__name__}{sorted(output) if isinstance(output, Mapping) else ''}"
        )
    return loss


def _with_loss(output: Any, loss: Tensor) -> Any:
    return {**output, "loss": loss} if isinstance(output, Mapping) else loss


def _sum(values: Sequence[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
