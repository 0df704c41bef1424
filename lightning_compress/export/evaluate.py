"""The metrics of a module's own validation with something else in its network's place: an exported file, a teacher.

The validation runs in a Trainer of its own, on a copy of the module, so the user's module, Trainer and data are as
they were, even in the middle of a hook and on one rank of several.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_compress import _compat
from lightning_compress.export.copying import independent_copy, make_plain_, widen_
from lightning_compress.export.errors import EvaluationError, ExportError
from lightning_compress.export.runtime import OnnxNetwork
from lightning_compress.export.sample import Call, Sample, bind, defines
from lightning_compress.functional._checks import check_name, check_path, shown
from lightning_compress.mechanisms.grids import Grids
from lightning_compress.mechanisms.isolation import (
    attributes_kept,
    evaluating,
    full_float32,
    module_kept,
    quiet,
    random_state_kept,
)
from lightning_compress.mechanisms.loaders import data_kept
from lightning_compress.mechanisms.metrics import logged_as
from lightning_compress.mechanisms.quantization import quantizing
from lightning_compress.mechanisms.rounding import Rounding
from lightning_compress.mechanisms.selection import find_module, plain_name
from lightning_compress.mechanisms.signs import is_shown, sign
from lightning_compress.mechanisms.tree import leaves, named_tensors, with_tensors
from lightning_compress.mechanisms.wrapping import OWN_MARK, copied_plainly

RUN_VARIABLE = "LIGHTNING_COMPRESS_RUN"
"""Of the environment: tells every Trainer to attach a recipe, but not the one that is made here.

``_factory`` knows it by heart, as it imports nothing of this package.
"""
LIGHTNING_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_utilities")

Forward = Callable[..., Any]


def evaluate(
    path: str | os.PathLike[str],
    module: nn.Module,
    trainer_or_dataloaders: Any = None,
    *,
    network: str | None = None,
    seen: Callable[[Any], None] | None = None,
) -> dict[str, float]:
    """Run the module's own validation with an exported file in the place of its network.

    Args:
        path: A file that :func:`~lightning_compress.export.to_onnx` wrote.
        module: The LightningModule that the file came from.
        trainer_or_dataloaders: What to validate on: a Trainer (its datamodule, else the loaders that were given to
            it), a datamodule, or dataloaders. None: the module's own ``val_dataloader``.
        network: Dotted name of the network inside ``module``; None: what the file says.
        seen: Shown each output of the file, in the structure of the network's own.

    Returns:
        The metrics that ``trainer.validate`` would have returned, under the same names.

    Raises:
        EvaluationError: If there is nothing to validate on, the file was never called, or it does not take the
            inputs that the validation gives the network.
        FileNotFoundError: If there is no such file.
        ImportError: If the packages of the ``onnx`` extra are not installed.
        TypeError: If ``module`` is not a LightningModule, or ``trainer_or_dataloaders`` gives no batches.
        ValueError: If ``network`` names nothing.
    """
    check_name("network", network)
    if seen is not None and not callable(seen):
        raise TypeError(f"seen must be a function of one output, or None, got {shown(seen)}")
    file = OnnxNetwork(check_path("path", path))
    name = file.metadata.get("lightning_compress.network", "") if network is None else network

    def from_file(root: nn.Module, part: nn.Module, stack: contextlib.ExitStack) -> Forward:
        return _FileForward(part, file)

    what = f"Validating {os.path.basename(path)}"
    return _validated(module, trainer_or_dataloaders, name, from_file, what, seen)


def evaluate_forward(
    module: nn.Module, trainer_or_dataloaders: Any = None, network: str = "", forward: Forward | None = None
) -> dict[str, float]:
    """Run a module's own validation, with another forward for its network if one is given.

    Args:
        module: A LightningModule.
        trainer_or_dataloaders: What to validate on, as in :func:`evaluate`.
        network: Dotted name of the network inside ``module``; "" for the module itself.
        forward: Called in the place of the network's forward, with the same arguments; None: the module as it is.

    Returns:
        The metrics that ``trainer.validate`` would have returned, under the same names.

    Raises:
        EvaluationError: If there is nothing to validate on, or ``forward`` was never called.
        TypeError: If ``module`` is not a LightningModule.
        ValueError: If ``network`` names nothing.
    """
    replacement = None if forward is None else lambda *_: forward
    return _validated(module, trainer_or_dataloaders, network, replacement, "Validating the network")


def evaluate_quantized(
    module: nn.Module, trainer_or_dataloaders: Any, *grids: Grids, seen: Callable[[Any], None] | None = None
) -> dict[str, float]:
    """Run a module's own validation with its network, or several parts of it, quantised.

    Args:
        module: A LightningModule.
        trainer_or_dataloaders: What to validate on, as in :func:`evaluate`.
        grids: What the network is quantised by; of each part.
        seen: Shown each output of the first.

    Returns:
        The metrics that ``trainer.validate`` would have returned, under the same names.

    Raises:
        EvaluationError: If there is nothing to validate on, or the network was never called.
    """
    first, *others = grids

    def quantised(root: nn.Module, part: nn.Module, stack: contextlib.ExitStack) -> Forward:
        for own in others:
            other = find_module(root, own.network, argument="network")
            stack.enter_context(quantizing(other, Rounding(other, own)))
        stack.enter_context(quantizing(part, Rounding(part, first)))
        return part.forward

    what = "Validating the quantised network"
    return _validated(module, trainer_or_dataloaders, first.network, quantised, what, seen)


def has_validation(module: nn.Module, trainer: Any) -> bool:
    """Whether a Trainer has something to validate a module on, and the module a step to do it with.

    Args:
        module: A LightningModule.
        trainer: The Trainer that fits it.

    Returns:
        False without ``validation_step``, without validation data, or with ``limit_val_batches=0``. That a loader has
        no batch is known once the fit has set it up.
    """
    try:
        _require_validation(module, trainer)
        _data(module, trainer)
    except EvaluationError:
        return False
    return not _compat.validates_nothing(trainer)


def samples_validated(trainer: Any) -> int | None:
    """How many samples a Trainer validates on.

    Args:
        trainer: A Trainer that has validated.

    Returns:
        Those within the limit of batches; None where the loader does not say, or there are several of them, or several
        processes.

    Example:
        >>> import lightning.pytorch as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, limit_val_batches=7)
        >>> _ = trainer.validate(BoringModel(), verbose=False)
        >>> samples_validated(trainer)
        7
    """
    batches = _batches(trainer)
    if batches is None or trainer.world_size > 1:
        return None
    try:
        [loader] = _compat.validation_loaders(trainer)
        return int(min(len(loader.sampler), batches * loader.batch_size))
    except Exception:  # somebody's own loader or sampler, or one that says by an error that it has no length
        return None


class Choices:
    """The class that a network chooses for each sample, or each position, over a whole validation."""

    def __init__(self) -> None:
        self._chosen: list[Tensor] = []

    def __call__(self, output: Any) -> None:
        """Take note of an output: of its first floating tensor of two dimensions or more.

        Classes are in dimension 1 of ``(N, K)`` and ``(N, K, H, W)``, and last in ``(N, L, K)``.
        """
        scores = [tensor for _, tensor in named_tensors(output) if tensor.is_floating_point() and tensor.ndim > 1]
        dimension = -1 if scores and scores[0].ndim == 3 else 1
        if scores and scores[0].shape[dimension] > 1:
            self._chosen.append(scores[0].detach().argmax(dim=dimension).flatten().to("cpu", torch.int32))

    def agreement(self, other: Choices) -> float | None:
        """The share of equal choices; None where there is nothing to compare.

        Args:
            other: Those of another network over the same validation.

        Returns:
            From 0 to 1.

        Example:
            >>> import torch
            >>> ours, theirs = Choices(), Choices()
            >>> ours(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
            >>> theirs(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
            >>> ours.agreement(theirs)
            0.5
        """
        pairs = list(zip(self._chosen, other._chosen, strict=False))
        if not pairs or len(self._chosen) != len(other._chosen) or any(a.shape != b.shape for a, b in pairs):
            return None
        total = sum(len(ours) for ours, _ in pairs)
        return sum(int((ours == theirs).sum()) for ours, theirs in pairs) / total if total else None


class _FileForward:
    """The forward of a network, computed by a file, in the structure that the network's own output has."""

    def __init__(self, network: nn.Module, file: OnnxNetwork) -> None:
        self._network = network
        self._original = network.forward
        self._signature = inspect.signature(network.forward)
        self._file = file
        constants = file.metadata.get("lightning_compress.constants")
        self._constants: dict[str, str] | None = None if constants is None else json.loads(constants)
        self._templates: dict[Any, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = bind(self._signature, Sample(args, kwargs))
        outputs = self._file.run(self._in_order(call))
        shapes = tuple(tensor.shape for tensor in call.tensors)
        if shapes not in self._templates:  # numbers in the output may depend on the shapes
            with evaluating(self._network):
                self._templates[shapes] = self._original(*args, **kwargs)
            expected = len(named_tensors(self._templates[shapes]))
            if expected != len(outputs):
                raise EvaluationError(
                    f"'{self._file.path}' gives {len(outputs)} tensors, {list(self._file.output_names)}, "
                    f"but the network gives {expected}"
                )
        return with_tensors(self._templates[shapes], outputs)

    def _in_order(self, call: Call) -> list[Tensor]:
        """The tensors of a call as the file takes them, if it was exported for such a call."""
        by_name = dict(zip(call.names, call.tensors, strict=True))
        if set(by_name) != set(self._file.input_names):
            raise EvaluationError(
                f"the validation calls the network with {sorted(by_name)}, but '{self._file.path}' was exported with "
                f"{sorted(self._file.input_names)}; export it with a sample= like the validation's call"
            )
        constants = call.constants if self._constants is None else self._constants
        for name in constants.keys() | call.constants.keys():
            exported, given = constants.get(name), call.constants.get(name)
            if exported != given:
                raise EvaluationError(
                    f"the validation calls the network with {name}={given}, but '{self._file.path}' was exported with "
                    f"{name}={exported}; export it with a sample= like the validation's call"
                )
        return [by_name[name] for name in self._file.input_names]


def _validated(
    module: nn.Module,
    source: Any,
    name: str,
    replacement: Callable[[nn.Module, nn.Module, contextlib.ExitStack], Forward] | None,
    what: str,
    seen: Callable[[Any], None] | None = None,
) -> dict[str, float]:
    """Validate a copy of ``module``, its network's forward replaced, and return the metrics."""
    module = _compat.uncompiled(module)
    lightning = _namespace(module)
    trainer = source if _is_trainer(source) else None
    _require_validation(module, trainer)
    find_module(module, name, argument="network")  # a wrong name is an error before anything is copied
    loaders, datamodule = _data(module, source)
    with contextlib.ExitStack() as stack:
        counted = is_shown(trainer)  # first of all: what follows is silent
        step = stack.enter_context(sign(trainer, what, _batches(trainer)))
        stack.enter_context(quiet(LIGHTNING_LOGGERS))
        duplicate = stack.enter_context(_prepared(module, datamodule))
        stack.enter_context(data_kept(_sources(module, loaders, datamodule)))  # each validation sees the same
        if _compat.attached_trainer(module) is not None:  # it was made whole, and may not bear that twice
            vars(duplicate)["configure_model"] = _compat.do_nothing
        if trainer is not None and _compat.is_running(trainer):  # data are set up, and may not be split a second time
            for owner in (duplicate, datamodule):
                if owner is not None:
                    hooks_done(owner)
        fresh = silent_trainer(module, trainer)
        fresh.callbacks += [_counting(lightning, step)] if counted else []
        part = find_module(duplicate, plain_name(name), argument="network")
        stack.enter_context(copied_plainly(part))  # its loaders may be given it, with all that knows it
        counter = None if replacement is None else _replace(part, replacement(duplicate, part, stack), seen)
        metrics = _metrics(fresh, duplicate, loaders, datamodule)
    if counter is not None and counter.calls == 0:
        raise EvaluationError(
            f"{type(module).__name__}.validation_step never called '{name or 'self'}', so the metrics would be those "
            "of the torch network; it probably calls layers inside it: name the part that it calls with network=, or "
            f"let it call {f'self.{name}' if name else 'self'}(...)"
        )
    return metrics


class RepeatedValidation:
    """A module's own validation, run again and again on a copy that may be changed between; made by :func:`repeatedly`.

    Attributes:
        module: The copy, in float32.
    """

    def __init__(self, module: Any, trainer: Any, loaders: Any, datamodule: Any) -> None:
        self.module = module
        self._trainer, self._loaders, self._datamodule = trainer, loaders, datamodule
        self._sources = _sources(module, loaders, datamodule)
        self._limit = trainer.limit_val_batches

    def run(self, *, batches: int | None = None) -> dict[str, float]:
        """Validate: each time the same data, random numbers and attributes of the module.

        Args:
            batches: How many batches of each loader; None: as the Trainer says.

        Returns:
            The metrics that ``trainer.validate`` returns, under the same names.

        Raises:
            EvaluationError: If no batch was run.
            KeyboardInterrupt: On Ctrl-C, of which Lightning makes an exit.
        """
        self._trainer.limit_val_batches = self._limit if batches is None else batches
        with (
            quiet(LIGHTNING_LOGGERS),
            random_state_kept(),
            data_kept(self._sources),
            module_kept(self.module, parameters=False),
            interruptible(),
        ):
            return _metrics(self._trainer, self.module, self._loaders, self._datamodule)


@contextlib.contextmanager
def repeatedly(
    module: nn.Module, data: Any = None, *, trainer: Any = None, batches: int | None = None, accelerator: str = "cpu"
) -> Iterator[RepeatedValidation]:
    """Prepare a module's own validation, once, to be run many times.

    Args:
        module: A LightningModule; it is copied, and left as it is.
        data: A datamodule, or dataloaders; None: the module's own ``val_dataloader``.
        trainer: A Trainer whose limit of batches and inference mode count.
        batches: So many batches of each loader; None: as the Trainer says.
        accelerator: Where to run, by Lightning's name.

    Yields:
        What runs it.

    Raises:
        EvaluationError: If there is nothing to validate on.
        TypeError: If ``module`` is not a LightningModule.
    """
    module = _compat.uncompiled(module)
    _namespace(module)  # what is no LightningModule is refused first
    _require_validation(module, trainer)
    loaders, datamodule = _data(module, data)
    with _prepared(module, datamodule) as duplicate:
        with quiet(LIGHTNING_LOGGERS):
            fresh = silent_trainer(module, trainer, accelerator=accelerator)
            fresh.limit_val_batches = fresh.limit_val_batches if batches is None else batches
            if datamodule is not None:
                datamodule.trainer = fresh
                datamodule.prepare_data()
                datamodule.setup("validate")
                hooks_done(datamodule)
        yield RepeatedValidation(duplicate, fresh, loaders, datamodule)


@contextlib.contextmanager
def _prepared(module: nn.Module, datamodule: Any) -> Iterator[nn.Module]:
    """A copy to validate, alone in the world; what is done to the datamodule meanwhile is undone."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_state_kept())
        stack.enter_context(full_float32())  # as the file computes
        stack.enter_context(_compat.hidden_process_group())
        duplicate = widen_(stack.enter_context(_working_copy(module)))
        if datamodule is not None:
            stack.enter_context(attributes_kept(datamodule))
        vars(duplicate)["configure_callbacks"] = list  # the user's callbacks act on the user's run only
        yield duplicate


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Undo what Lightning makes of Ctrl-C: an exit, and a signal that is ignored from then on.

    Raises:
        KeyboardInterrupt: Where Lightning's Trainer has made an exit of one.

    Example:
        >>> with interruptible():
        ...     pass
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _metrics(trainer: Any, module: nn.Module, loaders: Any, datamodule: Any) -> dict[str, float]:
    results = trainer.validate(module, dataloaders=loaders, datamodule=datamodule, verbose=False)
    if not results:
        raise EvaluationError("the validation ran no batch; are the validation data empty?")
    found = {key: float(value) for result in results for key, value in result.items()}
    unseen = {  # of metrics that are logged with logger=False
        key: float(value)
        for key, value in trainer.callback_metrics.items()
        if not key.partition("/dataloader_idx_")[0].endswith("_step") and logged_as(key, found) is None
    }
    return {**found, **unseen}


def _batches(trainer: Any) -> int | None:
    """Batches of a validation, if that is known."""
    count = 0 if trainer is None else sum(trainer.num_val_batches)
    return int(count) if 0 < count < math.inf else None


def _counting(lightning: Any, step: Callable[[], object]) -> Any:
    """A callback that tells of each batch that is done."""

    class Counting(lightning.Callback):  # type: ignore[misc]
        def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
            step()

    return Counting()


class _Counter:
    """How often a replaced forward was called."""

    calls = 0


def _replace(network: nn.Module, forward: Forward, seen: Callable[[Any], None] | None) -> _Counter:
    """Shadow the forward of a network; its parameters, and all else, stay in place."""
    counter = _Counter()

    @functools.wraps(network.forward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        counter.calls += 1
        output = forward(*args, **kwargs)
        if seen is not None:
            seen(output)
        return output

    setattr(counted, OWN_MARK, True)
    vars(network)["forward"] = counted
    return counter


@contextlib.contextmanager
def _working_copy(module: nn.Module) -> Iterator[nn.Module]:
    """A copy to validate, or the module itself, put back afterwards, where it cannot be copied."""
    try:
        duplicate = independent_copy(module)
    except ExportError:
        with module_kept(module):
            yield make_plain_(module)
    else:
        yield duplicate


def _namespace(module: nn.Module) -> Any:
    """The Lightning package that a LightningModule is of."""
    if all(base.__name__ != "LightningModule" for base in type(module).__mro__):
        raise TypeError(f"module must be a LightningModule, because its validation is run; got {type(module).__name__}")
    return import_module(_compat.package_of(module))


def _is_trainer(source: Any) -> bool:
    return hasattr(source, "validate") and hasattr(source, "fit_loop")


def _has_base(value: Any, name: str) -> bool:
    return any(base.__name__ == name for base in type(value).__mro__)


def _require_validation(module: nn.Module, trainer: Any) -> None:
    if not defines(module, "validation_step"):
        raise EvaluationError(f"{type(module).__name__} has no validation_step, so there are no metrics to compute")
    if trainer is not None and trainer.limit_val_batches == 0:
        raise EvaluationError("the Trainer has limit_val_batches=0, so there is nothing to validate on")


def _data(module: nn.Module, source: Any) -> tuple[Any, Any]:
    """Dataloaders and datamodule to validate on; both None where the module's own hook gives the loaders."""
    loaders, datamodule = source, None
    if _is_trainer(source):
        datamodule = source.datamodule
        loaders = None if datamodule is not None else _compat.validation_source(source)
    if _has_base(loaders, "LightningDataModule"):
        loaders, datamodule = None, loaders
    if _has_base(loaders, "LightningModule"):
        loaders = None
    if loaders is source and loaders is not None:
        _check_loaders(loaders)
    if loaders is None and not defines(module if datamodule is None else datamodule, "val_dataloader"):
        raise EvaluationError(
            f"nothing to validate on: {type(module).__name__} has no val_dataloader; "
            "pass a Trainer that was given validation data, a datamodule, or dataloaders"
        )
    for _, loader in leaves(loaders):
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            warnings.warn(
                f"a validation loader has a DistributedSampler for {sampler.num_replicas} ranks; the metrics are "
                "those of one rank's share of the data",
                stacklevel=4,
            )
    return loaders, datamodule


def _check_loaders(source: Any) -> None:
    """Refuse what holds something that gives no batches."""
    loaders = [leaf for _, leaf in leaves(source)]
    if not loaders or not all(map(_gives_batches, loaders)):
        raise TypeError(
            "trainer_or_dataloaders must be a Trainer, a datamodule, a dataloader, a collection of some, or None, got "
            f"{shown(source)}"
        )


def _gives_batches(value: Any) -> bool:
    """Whether it can be iterated over, and is no text and no array."""
    gives = isinstance(value, Iterable) or hasattr(type(value), "__getitem__")
    return gives and not isinstance(value, (str, bytes, bytearray)) and not hasattr(value, "ndim")


def _sources(module: Any, loaders: Any, datamodule: Any) -> list[Any]:
    """What the validation data may hang on, whose random generators are to be where they were."""
    held = [value for value in vars(module).values() if isinstance(value, (Dataset, DataLoader))]
    return [datamodule, *held, *(loader for _, loader in leaves(loaders))]


def silent_trainer(module: nn.Module, trainer: Any = None, *, accelerator: str = "cpu", **more: Any) -> Any:
    """A Trainer that looks at a module in this process, whatever launched the process, and says and keeps nothing.

    Args:
        module: A LightningModule; the Trainer is of its package.
        trainer: Another Trainer, whose limits of batches, inference mode and progress count.
        accelerator: Where to run, by Lightning's name.
        more: Other arguments of a Trainer.

    Returns:
        The Trainer. What ends the process, as SIGTERM does, ends it.

    Raises:
        TypeError: If ``module`` is not a LightningModule.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = silent_trainer(BoringModel(), limit_val_batches=1)
        >>> trainer.callbacks, trainer.logger.experiment.add_scalar("loss", 0.5)
        ([], None)
    """
    lightning = _namespace(module)
    settings: dict[str, Any] = {}
    if trainer is not None:
        settings |= {name: getattr(trainer, name) for name in ("limit_train_batches", "limit_val_batches")}
        settings["inference_mode"] = _compat.validates_in_inference_mode(trainer)
        if trainer.precision == "64-true":
            settings["precision"] = trainer.precision
    environments = import_module(f"{lightning.__name__}.plugins.environments")
    recipe = os.environ.pop(RUN_VARIABLE, None)
    try:
        with quiet(LIGHTNING_LOGGERS):
            fresh = lightning.Trainer(
                accelerator=accelerator,
                devices=1,
                num_nodes=1,
                plugins=[environments.LightningEnvironment()],
                logger=import_module(f"{lightning.__name__}.loggers.logger").DummyLogger(),  # for steps that use one
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                **{**settings, **more},
            )
    finally:
        if recipe is not None:
            os.environ[RUN_VARIABLE] = recipe
    _compat.leave_signals(fresh)
    if trainer is not None:
        _compat.copy_progress(trainer, fresh)
    return fresh


def hooks_done(owner: Any) -> None:
    """Let a module or a datamodule that was set up be set up and torn down no more.

    Args:
        owner: It; the hooks of its class stay as they are.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringDataModule
        >>> data = BoringDataModule()
        >>> hooks_done(data)
        >>> data.setup("fit")
    """
    vars(owner).update(dict.fromkeys(("prepare_data", "setup", "teardown"), _compat.do_nothing))
