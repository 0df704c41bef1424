"""Private and version-bound uses of other packages; each has a canary in tests/test_compat.py.

Traced on lightning 2.6, torch 2.13 and 2.14, wandb 0.24 to 0.31 and jsonargparse 4.46 to 4.53. When a canary falls
after an upgrade, this is the file to mend.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import itertools
import logging
import netrc
import os
import re
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from traceback import walk_tb
from types import CodeType, FrameType, SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
import torch.utils.checkpoint
from torch import nn
from torch._guards import CompileId
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

FUNCTION_OWNERS = (torch._C._VariableFunctions, torch._C._nn, torch._C.TensorBase)
"""Where torch's built-in functions are, by all the names they have, besides its public modules."""


def attached_trainer(module: nn.Module) -> Any:
    """The Trainer that a LightningModule is attached to, or None; ``module.trainer`` itself raises without one."""
    return getattr(module, "_trainer", None)


def validation_source(trainer: Any) -> Any:
    """What the user gave the Trainer to validate on: loaders, a datamodule, the LightningModule, or None.

    These are the objects as they were given, before a distributed sampler was put in.
    """
    sources = (trainer.fit_loop.epoch_loop.val_loop._data_source, trainer.validate_loop._data_source)
    return next((source.instance for source in sources if source.instance is not None), None)


def validation_loaders(trainer: Any) -> list[Any]:
    """The loaders that a Trainer has validated with; none where it has not."""
    loop = trainer.validate_loop if trainer.state.fn == "validate" else trainer.fit_loop.epoch_loop.val_loop
    return [] if loop._combined_loader is None else list(loop._combined_loader.flattened)


def validates_nothing(trainer: Any) -> bool:
    """Whether the data to validate on in a fit are set up, and are none: no loader, or none that has a batch."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    return loop._combined_loader is not None and not any(loop.max_batches)


def forget_workers_(loader: Any) -> None:
    """Let a copy of a loader start workers of its own, where the other one keeps its workers."""
    if "_iterator" in getattr(loader, "__dict__", {}):
        loader._iterator = None


def settle_(module: Any) -> None:
    """A whole copy of a sharded LightningModule is not to be configured, nor to be put on a mesh, any more."""
    vars(module).update(configure_model=do_nothing, _device_mesh=None)


def validates_in_inference_mode(trainer: Any) -> bool:
    """Whether a Trainer validates under ``torch.inference_mode`` rather than ``torch.no_grad``."""
    return bool(trainer.validate_loop.inference_mode)


def leave_signals(trainer: Any) -> None:
    """Let a Trainer that only looks at something take over no signals: what ends the process ends it."""
    trainer._signal_connector.register_signal_handlers = do_nothing  # no lambda: the Trainer may be pickled


def attach(trainer: Any, module: Any, datamodule: Any) -> None:
    """Let a Trainer, a module and a datamodule, if there is one, know each other, as they do in a fit."""
    trainer.datamodule = datamodule
    for owner in (module, datamodule):
        if owner is not None:
            owner.trainer = trainer


def copy_progress(trainer: Any, fresh: Any) -> None:
    """Give a fresh Trainer the epoch and the step of another, without tying the two together."""
    source, target = trainer.fit_loop, fresh.fit_loop
    target.epoch_progress = copy.deepcopy(source.epoch_progress)
    automatic, manual = source.epoch_loop.automatic_optimization, source.epoch_loop.manual_optimization
    target.epoch_loop.automatic_optimization.optim_progress = copy.deepcopy(automatic.optim_progress)
    target.epoch_loop.manual_optimization.optim_step_progress = copy.deepcopy(manual.optim_step_progress)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile(module)``; any other module is given back as it is."""
    inside: nn.Module = getattr(module, COMPILED_CHILD) if isinstance(module, torch._dynamo.OptimizedModule) else module
    return inside


def compiled_state(module: nn.Module) -> Any:
    """What Lightning remembers of a LightningModule that was passed through ``torch.compile``, or None."""
    return vars(module).get("_compiler_ctx")


def drop_compilation_(module: nn.Module) -> nn.Module:
    """Undo every kind of compilation in a module, in place, and give the module back.

    Covers ``torch.compile(child)``, ``child.compile()``, and a LightningModule whose forward and steps Lightning
    replaced by compiled ones. Those are bound to the module that was compiled, so a copy must lose them.
    """
    module = uncompiled(module)
    for parent in list(module.modules()):
        if getattr(parent, "_compiled_call_impl", None) is not None:
            parent._compiled_call_impl = None
        for name, child in list(parent._modules.items()):
            if child is not None and uncompiled(child) is not child:
                parent._modules[name] = uncompiled(child)
        if compiled_state(parent) is not None:
            for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
                vars(parent).pop(name, None)
            vars(parent)["_compiler_ctx"] = None
    return module


def forget_metric_names_(module: nn.Module) -> None:
    """Drop Lightning's table from ``id(metric)`` to attribute name, which is wrong in a copy of the module."""
    if "_metric_attributes" in vars(module):
        vars(module)["_metric_attributes"] = None


@contextmanager
def hidden_process_group() -> Iterator[None]:
    """Let this process look like a single one: ``torch.distributed.is_initialized()`` is False meanwhile.

    For work that one rank does alone: torchmetrics, Lightning's ``prepare_data`` and user code would otherwise start
    collectives that the other ranks never join.
    """
    if not torch.distributed.is_available():
        yield
        return
    group, torch.distributed.GroupMember.WORLD = torch.distributed.GroupMember.WORLD, None
    try:
        yield
    finally:
        torch.distributed.GroupMember.WORLD = group


COMPILED_CHILD = "_orig_mod"
"""Name of the child under which the module that torch.compile returns keeps the module it was given."""


def is_compiled(module: nn.Module) -> bool:
    """Whether a module runs compiled code: wrapped by ``torch.compile``, or compiled in place."""
    return isinstance(module, torch._dynamo.OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None


def holds_compiled_code(root: nn.Module) -> bool:
    """Whether anything below a module, or the module itself, is compiled."""
    return any(is_compiled(module) or compiled_state(module) is not None for module in root.modules())


def reset_compiled_code() -> None:
    """Forget all compiled code, if there is any: a hook, or an attribute, that is added later would have no effect."""
    if torch._dynamo.convert_frame.input_codes.seen:
        torch._dynamo.reset()


def entry_points(module: nn.Module) -> list[str]:
    """The attributes through which a module runs: its forward and, compiled in place, the compiled call."""
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return ["forward", "_compiled_call_impl"] if in_place else ["forward"]


@contextmanager
def attention_in_python() -> Iterator[None]:
    """Let ``multi_head_attention_forward`` run within a torch function mode, which sees each operation in it.

    It would else hand itself to the mode again, for ever.
    """
    if torch.compiler.is_dynamo_compiling():
        yield
        return
    functional: Any = torch.nn.functional
    original, functional.has_torch_function = functional.has_torch_function, lambda *_: False
    try:
        yield
    finally:
        functional.has_torch_function = original


@contextmanager
def values_unseen() -> Iterator[None]:
    """Without what torch looks at values for that changes no result: a trace cannot follow it.

    ``nn.Transformer`` asks whether a mask happens to be the causal one, to be faster, and a distribution whether its
    parameters are valid.
    """
    transformer: Any = torch.nn.modules.transformer
    distribution: Any = torch.distributions.Distribution
    detect, validate = transformer._detect_is_causal_mask, distribution._validate_args
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = detect
        distribution.set_default_validate_args(validate)


class Traced(NamedTuple):
    """Code that torch.compile traced, and which of its versions; no code where torch hides it."""

    code: CodeType | None
    version: str


def watch_compilations(started: Callable[[Any], None]) -> bool:
    """Call a function whenever torch.compile begins to trace, until it is reset; whether that was not so already."""
    handler = torch._dynamo.callback.callback_handler
    if started in handler.start_callbacks:
        return False
    handler.register_start_callback(started)
    return True


def unwatch_compilations(started: Callable[[Any], None]) -> None:
    """End what :func:`watch_compilations` began."""
    with suppress(ValueError):  # torch.compile was reset
        torch._dynamo.callback.callback_handler.remove_start_callback(started)


def being_traced(event: Any) -> Traced:
    """What torch.compile is about to trace, from within a function that it calls then."""
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("compile_id"), CompileId):
        frame = frame.f_back
    return Traced(None if frame is None else frame.f_locals.get("code"), str(event.compile_id))


def reads_parameters(traced: Traced, attributes: Collection[str]) -> bool:
    """Whether traced code reads parameters with one of these names from the modules themselves."""
    if traced.code is None:
        return True
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(traced.code)
    guards = "".join(str(entry.guard_manager) for entry in entries if str(entry.compile_id) == traced.version)
    return any(f"_parameters['{attribute}']" in guards for attribute in attributes)


def is_unshared(tensor: torch.Tensor) -> bool:
    """Whether no other tensor lies on the memory of this one: no view, and nothing that autograd has saved."""
    return bool(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) <= 2)  # the tensor, and this very handle


def refresh_flat_weights(module: nn.Module) -> None:
    """Let a recurrent layer, which keeps a list of its weights, read the attributes anew; nothing for other layers."""
    if isinstance(module, nn.RNNBase):
        weights = [getattr(module, name, None) for name in module._flat_weights_names]
        module._flat_weights = weights  # without flatten_parameters, which would move the weights in memory
        module._flat_weight_refs = [None if weight is None else weakref.ref(weight) for weight in weights]


def shard(tensor: torch.Tensor) -> torch.Tensor:
    """The very tensor that this process holds of one that is split over processes; any other tensor is given back."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """What all processes together hold of a tensor, which all ask for; any other tensor is given back."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def users_class(module: nn.Module) -> type:
    """The class of a module before FSDP2 put one of its own in its place."""
    return next(base for base in type(module).__mro__ if not base.__module__.startswith(SHARDING))


def fsdp_parameters(module: nn.Module) -> list[Any]:
    """What FSDP2 knows of each parameter below a module that it has split over processes."""
    units = [own for own in module.modules() if isinstance(own, FSDPModule)]
    return [own for group in _fsdp_groups(units) for own in group.fsdp_params]


def exchanges_gradients(units: Sequence[FSDPModule]) -> bool:
    """Whether FSDP2 exchanges gradients after each backward pass; set_requires_gradient_sync(False) says not to."""
    return all(group.reduce_grads for group in _fsdp_groups(units))


def _fsdp_groups(units: Sequence[FSDPModule]) -> list[Any]:
    found: list[Any] = []
    for state in (own._get_fsdp_state() for own in units):  # which has one group before torch 2.14
        several = hasattr(state, "_fsdp_param_groups")
        found += state._fsdp_param_groups if several else filter(None, [state._fsdp_param_group])
    return found


def gathered_parameter(known: Any) -> torch.Tensor | None:
    """What a layer is given of a parameter that FSDP2 has gathered, always the same object; None before the first."""
    return getattr(known, "_unsharded_param", None)


def fsdp_names(module: nn.Module) -> dict[str, Any]:
    """Name of each parameter below a module that FSDP2 has split, also where it is gathered now, to what is known."""
    names = {id(part): name for name, part in module.named_modules()}
    found: dict[str, Any] = {}
    for known in fsdp_parameters(module):
        info = known._module_info
        if id(info.module) in names:
            found[f"{names[id(info.module)]}.{info.param_name}".removeprefix(".")] = known
    return found


def why_not_gathered_as(known: Any) -> str | None:
    """Why another tensor cannot be gathered in the place of a parameter, of which FSDP2 knows this; None if it can."""
    if hasattr(known._sharded_local_tensor, "fsdp_pre_all_gather"):
        return "is gathered in a way of its own, as quantised tensors are"
    if known.offload_to_cpu:
        return "is offloaded to the CPU between steps (offload_policy=)"
    smaller = known.post_forward_mesh_info
    if smaller is not None and smaller.mesh is not known.mesh_info.mesh:
        return "is kept on fewer processes after the forward pass (reshard_after_forward= a number)"
    return None


@contextmanager
def gathered_as(known: Any, present: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[torch.Tensor]:
    """Let FSDP2 gather something else in the place of a parameter, whenever it does, also again in backward.

    Args:
        known: What FSDP2 knows of the parameter, while it is sharded.
        present: From this process's shard to what is gathered, of the same shape.

    Yields:
        The shard on which this was installed.
    """
    shard = known._sharded_local_tensor

    def before(mesh: Any, size: Any, stride: Any, module: Any, policy: Any) -> Any:  # FSDP2 counts the arguments
        shown = present(shard.detach())
        shown = shown if policy.param_dtype is None else shown.to(policy.param_dtype)
        missing = -(-size[0] // mesh.size()) - len(shown)  # all processes give as many rows as the first
        return ((torch.cat([shown, shown.new_zeros(missing, *size[1:])]) if missing else shown),), None

    def after(gathered: Any, metadata: Any, dtype: Any, out: Any = None) -> Any:
        return None if out is not None else (gathered[0], (gathered[0],))

    shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = before, after
    known._init_extensions()  # by itself FSDP2 looks for them before its first forward pass only
    try:
        yield shard
    finally:
        del shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather


def is_tuner_fit(trainer: Any) -> bool:
    """Whether a ``Tuner`` started this fit to find a learning rate or a batch size; it stops before training."""
    return any(getattr(callback, "_early_exit", False) for callback in trainer.callbacks)


def batch_bounds(program: Any) -> tuple[int, int | None]:
    """Smallest and largest batch that a traced program was found to hold for; None for no upper bound.

    A branch on the batch size leaves a bound here: the program holds the branch that was traced only.
    """
    exported = program.exported_program
    inputs = set(exported.graph_signature.user_inputs)
    symbols = {
        symbol
        for node in exported.graph.nodes
        if node.op == "placeholder" and node.name in inputs
        for size in getattr(node.meta.get("val"), "shape", ())
        if isinstance(size, torch.SymInt)
        for symbol in size.node.expr.free_symbols
    }
    ranges = [exported.range_constraints[symbol] for symbol in symbols if symbol in exported.range_constraints]
    upper = [int(found.upper) for found in ranges if found.upper.is_finite and found.upper < 2**31]
    return max((int(found.lower) for found in ranges), default=0), min(upper, default=None)


_open_groups: list[Callable[[str | None], str | None]] = []  # of the process, as torch's default group is


@contextmanager
def patient_group(world_size: int) -> Iterator[Callable[[str | None], str | None]]:
    """A way to tell all processes what the first that has to say something says, that waits for days.

    Before that all meet in the default group, with its own time limit: one that fails on the way here never comes.
    """
    if world_size == 1 or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield lambda message: message
        return
    if _open_groups:  # within another: who fails on the way here has told it there
        yield _open_groups[-1]
        return
    torch.distributed.all_gather_object([None] * world_size, None)  # on the devices that the group is for
    group: Any = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))

    def tell(message: str | None) -> str | None:
        said: list[str | None] = [None] * world_size
        torch.distributed.all_gather_object(said, message, group=group)
        return next((f"rank {rank} failed: {own}" for rank, own in enumerate(said) if own is not None), None)

    _open_groups.append(tell)
    try:
        yield tell
    finally:
        _open_groups.pop()
        torch.distributed.destroy_process_group(group)


def is_running(trainer: Any) -> bool:
    """Whether a Trainer, of either package, is between the start and the end of a fit, a validation or the like."""
    return bool(trainer.state.status == "running")


def placement(module: nn.Module) -> dict[str, Any]:
    """What a LightningModule remembers of its own device and dtype; empty for any other module."""
    return {name: vars(module)[name] for name in ("_device", "_dtype") if name in vars(module)}


def runs_in_children(trainer: Any) -> bool:
    """Whether a Trainer runs its fits in processes that it spawns or forks, on copies of everything."""
    return any(base.__name__ == "_MultiProcessingLauncher" for base in type(trainer.strategy.launcher).__mro__)


def package_of(owner: Any) -> str:
    """The Lightning package that a Trainer or a LightningModule is of."""
    return package_of_class(type(owner))


def package_of_class(cls: type) -> str:
    """The Lightning package that a class of it, or derived from it, is of."""
    for base in cls.__mro__:
        if base.__module__.startswith(("pytorch_lightning.", "lightning.pytorch.")):
            return "pytorch_lightning" if base.__module__.startswith("pytorch_lightning.") else "lightning.pytorch"
    return "lightning.pytorch"


def has_own_backward(module: nn.Module) -> bool:
    """Whether the class of a LightningModule has a backward() in the place of Lightning's."""
    cls = type(module)
    theirs = [base for base in cls.__mro__ if base.__module__ == f"{package_of_class(cls)}.core.module"]
    return any(cls.backward is not base.backward for base in theirs if base.__name__ == "LightningModule")  # type: ignore[attr-defined]


@contextmanager
def silenced_loggers(module: nn.Module) -> Iterator[None]:
    """Let a module's Trainer have loggers that write nothing, as Lightning does while it tunes."""
    trainer = attached_trainer(module)
    loggers = getattr(trainer, "loggers", None)
    if not loggers:
        yield
        return
    package = package_of(trainer)
    trainer.loggers = [_silent(package, type(logger).__name__, _says(logger)) for logger in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


@contextmanager
def rates_kept(module: nn.Module) -> Iterator[list[Any]]:
    """Put back what a step may do to the learning rates of its Trainer, and to its end; gives the schedulers."""
    trainer: Any = attached_trainer(module)
    if trainer is None:
        yield []
        return
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    before = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    should_stop = trainer.should_stop
    try:
        yield [config.scheduler for config in trainer.lr_scheduler_configs]
    finally:
        for group, values in zip(groups, before, strict=True):
            group.update(values)
        trainer.should_stop = should_stop


def stop_if_terminated(trainer: Any) -> None:
    """End as Lightning does between two steps where the process was asked to terminate."""
    if getattr(trainer, "received_sigterm", False):
        raise import_module(f"{package_of(trainer)}.utilities.exceptions").SIGTERMException


def quieten_(trainer: Any, folder: str) -> None:
    """Let the next fit of a Trainer write nothing, or to a folder of ours, and find no learning rate or batch size.

    For good, and before the fit begins: Lightning asks loggers for their experiments, which makes folders and runs,
    before it calls a hook. Loggers are not asked anything, as some begin a run to tell their version. Callbacks stay,
    as others look at them.
    """
    os.makedirs(folder, exist_ok=True)  # as loggers do
    package = package_of(trainer)
    said = {"name": "plan", "version": "", "save_dir": folder, "log_dir": folder, "root_dir": folder}
    trainer.loggers = [_silent(package, type(logger).__name__, said) for logger in trainer.loggers]
    trainer._default_root_dir = folder
    trainer.profiler = import_module(f"{package}.profilers").PassThroughProfiler()
    trainer.save_checkpoint = do_nothing  # callbacks that save on an exception call it too
    for callback in trainer.callbacks:
        for method in ("lr_find", "scale_batch_size"):
            if hasattr(callback, method):
                vars(callback)[method] = do_nothing


def do_nothing(*_: Any, **__: Any) -> None:
    """In the place of a method, or of a hook."""


def wrap_fits(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a function around ``Trainer.fit`` of each Lightning package that is imported, once, for the whole process."""
    for package in ("lightning.pytorch", "pytorch_lightning"):
        module: Any = sys.modules.get(f"{package}.trainer.trainer")
        if module is not None and not hasattr(module.Trainer.fit, "_lightning_compress"):  # others wrap it too
            module.Trainer.fit = functools.wraps(module.Trainer.fit)(wrap(module.Trainer.fit))
            module.Trainer.fit._lightning_compress = True


def instantiated(parser: Any, parsed: Any) -> Any:
    """What a parser of jsonargparse makes of what it has parsed: objects, where classes were named."""
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
    return make(parsed)


def types_tried(error: BaseException) -> list[BaseException]:
    """What jsonargparse has raised for each type of a union, where it fits none: the frame that raised has them all.

    Empty for all other exceptions. Their order differs between versions, and the cause is the first of them.
    """
    frame = next((frame for frame, _ in reversed([*walk_tb(error.__traceback__)])), None)
    if frame is None or not str(frame.f_globals.get("__name__", "")).startswith("jsonargparse"):
        return []
    lists = (value for value in frame.f_locals.values() if isinstance(value, list))
    return next((value for value in lists if value and all(isinstance(entry, Exception) for entry in value)), [])


def before_children_fail(trainer: Any, act: Callable[[], None]) -> None:
    """Call a function when a process that a Trainer has started for its fit fails, before any hook is told.

    Args:
        trainer: One that runs its fits in children.
        act: Can be pickled, with the Trainer.
    """
    launcher = trainer.strategy.launcher
    launcher.launch = functools.partial(_launched, type(launcher).launch, launcher, act)


def _launched(launch: Callable[..., Any], launcher: Any, act: Callable[[], None], *args: Any, **kwargs: Any) -> Any:
    try:
        return launch(launcher, *args, **kwargs)
    except BaseException:
        act()
        raise


def _says(logger: Any) -> dict[str, Any]:
    """What a logger says of itself, for steps that make paths of it."""
    said = {name: getattr(logger, name, None) for name in ("name", "version", "save_dir", "log_dir", "root_dir")}
    said["save_dir"] = said["log_dir"] or said["save_dir"]  # what the Trainer gives as its log_dir
    return said


def _silent(package: str, kind: str, said: dict[str, Any]) -> Any:
    """A logger that writes nothing, in the place of one of a kind, and says so much of itself; it can be pickled."""
    dummy = import_module(f"{package}.loggers.logger").DummyLogger
    again = {"__reduce__": lambda self: (_silent, (package, kind, said))}
    return type(f"Silent{kind}", (dummy,), {**said, **again})()


def training_loaders(trainer: Any) -> list[Any]:
    """The loaders of the training data, as the Trainer reads them."""
    return list(trainer.fit_loop._combined_loader.flattened)


def training_flags(trainer: Any) -> dict[str, bool]:
    """The training flag that each module had before an evaluation began, by its name; empty where that is not known."""
    loop = (
        trainer.predict_loop if trainer.predicting else trainer.test_loop if trainer.testing else trainer.validate_loop
    )
    return dict(loop._module_mode.mode)


def has_training_data(trainer: Any) -> bool:
    """Whether the training data are set up, and are not nothing."""
    return trainer.fit_loop._combined_loader is not None and trainer.num_training_batches > 0


def given_loaders(trainer: Any) -> Any:
    """The training loaders that a Trainer was given as such; None where a datamodule or the module has them."""
    instance = trainer.fit_loop._data_source.instance
    return None if hasattr(instance, "train_dataloader") else instance


def made_loaders(trainer: Any) -> Any:
    """The training loaders of a datamodule, or of the module.

    A datamodule is set up for a fit as a copy, so that what it validates with stays.
    """
    owner = trainer.lightning_module
    if trainer.datamodule is not None:
        owner = copy.copy(trainer.datamodule)
        owner.setup("fit")
    return owner.train_dataloader()


@contextmanager
def training_data(trainer: Any, loaders: Any) -> Iterator[None]:
    """Set training data up where a Trainer only validates, tests or predicts; afterwards it is as it was."""
    loop = trainer.fit_loop
    if loop._combined_loader is not None:
        yield
        return
    kept, source = dict(vars(loop)), loop._data_source
    trainer_kept = {name: getattr(trainer, name) for name in ("val_check_batch",) if hasattr(trainer, name)}
    instance = source.instance
    try:
        source.instance = loaders
        loop.setup_data()
        yield
    finally:
        source.instance = instance
        vars(loop).clear()
        vars(loop).update(kept)
        for name, value in trainer_kept.items():
            setattr(trainer, name, value)


def epochs_in(checkpoint: Mapping[str, Any]) -> int | None:
    """How many epochs a checkpoint of Lightning has begun; None for a file of weights.

    ``epoch`` is the last one's number where the file was written within the training, and one more after its end.
    """
    if checkpoint.get("epoch") is None:
        return None
    loops = checkpoint.get("loops") or {}
    if not loops:
        return int(checkpoint["epoch"]) + 1
    return int(loops["fit_loop"]["epoch_progress"]["current"]["ready"])


def batches_an_epoch(trainer: Any) -> float:
    """How many training batches there are: of a stream without end or length, those that the whole training takes."""
    batches = float(trainer.num_training_batches)
    if batches == float("inf") and trainer.max_steps > 0:
        return float(trainer.max_steps * trainer.accumulate_grad_batches)
    return batches


def logged_names(trainer: Any) -> set[str]:
    """What the metrics of a validation at its end are called; in the sanity check Lightning shows not all of them."""
    results = trainer._results
    found = [] if results is None else [own for own in results.values() if own.meta.on_epoch]
    return {*trainer.callback_metrics, *(name for own in found for name in results._forked_name(own, on_step=False))}


def unscales_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether gradients are still multiplied by the scale of the loss when an optimizer's step begins, as fused."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def keeps_best(callback: Any) -> bool:
    """Whether a callback is a ``ModelCheckpoint`` that chooses by a metric, not the newest."""
    chooses = hasattr(callback, "check_monitor_top_k") and callback.save_top_k != 0
    return chooses and callback.monitor not in (None, "step", "epoch", "global_step")


def keeps_last(callback: Any) -> bool:
    """Whether a callback is a ``ModelCheckpoint`` that writes files whatever a metric says."""
    if not hasattr(callback, "check_monitor_top_k"):
        return False
    return bool(callback.save_last or keeps_all(callback) or (callback.save_top_k != 0 and not keeps_best(callback)))


def keeps_all(callback: Any) -> bool:
    """Whether a ``ModelCheckpoint`` writes all files, and its metric only says which is best."""
    return bool(callback.save_top_k == -1)


def forget_best(callback: Any) -> bool:
    """Let a ``ModelCheckpoint`` choose the best anew; whether there was one."""
    if not callback.best_k_models and not callback.best_model_path:
        return False
    callback.best_k_models, callback.best_model_path, callback.best_model_score = {}, "", None
    callback.kth_best_model_path = ""
    callback.kth_value = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
    return True


def forget_best_score(callback: Any) -> bool:
    """Let an ``EarlyStopping`` begin to wait anew; whether it had seen a score."""
    if not any(base.__name__ == "EarlyStopping" for base in type(callback).__mro__):
        return False
    worst = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
    seen = not torch.equal(callback.best_score.cpu(), worst)
    callback.best_score, callback.wait_count = worst, 0
    return seen


def forget_plateaus(trainer: Any) -> bool:
    """Let each ``ReduceLROnPlateau`` begin to wait anew; whether one had seen a score."""
    kind = torch.optim.lr_scheduler.ReduceLROnPlateau
    plateaus = [own.scheduler for own in trainer.lr_scheduler_configs if isinstance(own.scheduler, kind)]
    seen = any(scheduler.best != scheduler.mode_worse for scheduler in plateaus)
    for scheduler in plateaus:
        scheduler.best, scheduler.num_bad_epochs, scheduler.cooldown_counter = scheduler.mode_worse, 0, 0
    return seen


def let_last_be_saved(callback: Any, trainer: Any) -> None:
    """Let a ``ModelCheckpoint`` write its last file, if it writes one, as it does where it has just kept another."""
    if callback.save_last:
        callback._last_global_step_saved = trainer.global_step
    if callback.save_last == "link":  # to what was kept, and nothing was
        callback._last_checkpoint_saved = ""


def hook_first(tensor: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> Any:
    """Register a hook on a gradient that runs before those that were there, which may change it; copies are without."""
    earlier = dict(tensor._backward_hooks or {})
    unserializable: Any = torch.utils.hooks.unserializable_hook
    handle = tensor.register_hook(unserializable(hook))  # type: ignore[no-untyped-call]
    for key in earlier:  # the hooks run in the order in which they were put into the dict
        tensor._backward_hooks[key] = tensor._backward_hooks.pop(key)  # type: ignore[index, union-attr]
    return handle


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for a batch of them, as in ``vmap`` and with ``is_grads_batched``."""
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor))


def runs_again() -> bool:
    """Whether this is within a backward pass, as where activation checkpointing runs a forward pass again."""
    if torch.compiler.is_compiling():  # it cannot be traced, and compiled code does its own recomputation
        return False
    return bool(torch._C._current_graph_task_id() != -1)


def call_of_step_hook() -> FrameType | None:
    """Torch's call of an optimizer's step, asked for in a hook of it; None where that is compiled and has no frames."""
    return None if torch.compiler.is_compiling() else sys._getframe(2)


def copies_its_tensors(module: torch.nn.Module) -> bool:
    """Whether a module has a full backward hook, so that it takes and returns copies, whose gradients the hook sees.

    None are made where nothing within asks for a gradient, which is not looked at here.
    """
    before: list[Any] = module._get_backward_pre_hooks()  # type: ignore[no-untyped-call]
    after: list[Any] = module._get_backward_hooks()[0]  # type: ignore[no-untyped-call]
    return torch.is_grad_enabled() and bool(before or after)


def after_backward(function: Callable[[], None]) -> None:
    """Call a function when the backward pass is over within which this runs, with those that it runs itself."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def takes_iterator(trainer: Any, module: Any) -> bool:
    """Whether a module's training step draws its batches itself."""
    signature = import_module(f"{package_of(trainer)}.utilities.signature_utils").is_param_in_hook_signature
    return bool(signature(module.training_step, "dataloader_iter", explicit=True))


def batches_seen(trainer: Any) -> int:
    """How many training batches a Trainer has begun, over all epochs."""
    return int(trainer.fit_loop.epoch_loop.total_batch_idx) + 1


def is_in_step(trainer: Any) -> bool:
    """Whether a Trainer has begun a training batch, and the step of it is not over."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(batches.processed < batches.ready)


def _samplers(loaders: list[Any]) -> list[Any]:
    """The samplers that shuffle by the number of the epoch, as that of distributed training does."""
    batched = [getattr(loader, "batch_sampler", None) for loader in loaders]
    found = [getattr(loader, "sampler", None) for loader in (*loaders, *batched)] + batched
    return [sampler for sampler in found if callable(getattr(sampler, "set_epoch", None))]


def training_batches(trainer: Any, loaders: list[Any], epoch: int = 0) -> Iterator[tuple[Any, ...]]:
    """One epoch of a Trainer's training batches, read from other loaders: what it would pass to ``training_step``."""
    for sampler in _samplers(loaders):
        sampler.set_epoch(epoch)
    combined = copy.copy(trainer.fit_loop._combined_loader)
    combined._iterator, combined.flattened = None, loaders
    module: Any = trainer.lightning_module
    signature = import_module(f"{package_of(trainer)}.utilities.signature_utils").is_param_in_hook_signature
    iterates = takes_iterator(trainer, module)
    indexed = signature(module.training_step, "batch_idx", min_args=2)
    try:
        limit = batches_an_epoch(trainer)
        entries = itertools.takewhile(lambda entry: entry[1] < limit, combined)
        for entry in entries:
            if iterates:
                yield (itertools.chain([entry], entries),)  # a step may take several
                continue
            batch, batch_idx, _ = entry
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            if batch is not None:
                yield (batch, batch_idx) if indexed else (batch,)
    finally:
        combined.reset()


@contextmanager
def lightning_logger_kept() -> Iterator[None]:
    """Import both Lightning packages without a change of the logger that their notes go to.

    Each of them, when it is imported, makes its own logger that of both; levels that the user set on the other one's
    would have no effect any more. Whoever had it keeps it; if nobody had, ``lightning`` gets it.
    """
    rank_zero: Any = import_module("lightning_utilities.core.rank_zero")
    owner = rank_zero.log
    try:
        yield
    finally:
        nobody = owner.name == rank_zero.__name__
        rank_zero.log = logging.getLogger("lightning.pytorch.utilities.rank_zero") if nobody else owner


def function_modes() -> list[Any]:
    """The torch function modes that are on, the innermost last."""
    return list(torch.overrides._get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def computed_anew(module: torch.nn.Module, attribute: str) -> torch.Tensor:
    """An attribute of a module as it is now; the older weight norm computes it in a hook before each call."""
    value: torch.Tensor = getattr(module, attribute)
    if attribute in module._parameters:
        return value
    with torch.no_grad():
        for hook in module._forward_pre_hooks.values():
            if getattr(hook, "name", None) == attribute and hasattr(hook, "compute_weight"):
                spectral = type(hook).__name__ == "SpectralNorm"
                value = hook.compute_weight(module, *([False] if spectral else []))
    return value


@contextmanager
def checkpointing_told(tell: Callable[[], None]) -> Iterator[None]:
    """Call a function whenever activation checkpointing begins, of either kind."""
    module: Any = torch.utils.checkpoint
    # the first serves both kinds since torch 2.14; before it there was one for each
    names = ("_checkpoint_impl", "_checkpoint_without_reentrant_generator", "CheckpointFunction")
    before = {name: getattr(module, name) for name in names if hasattr(module, name)}

    def telling(call: Callable[..., Any]) -> Callable[..., Any]:
        def told(*args: Any, **kwargs: Any) -> Any:
            tell()
            return call(*args, **kwargs)

        return told

    for name, own in before.items():
        put: Any = SimpleNamespace(apply=telling(own.apply)) if name == "CheckpointFunction" else telling(own)
        setattr(module, name, put)
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(module, name, own)


def attach_trainer_(module: Any, trainer: Any) -> None:
    """Let a copy of a LightningModule know a Trainer, or none."""
    module._trainer = trainer


def step_arguments(trainer: Any, module: Any, batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """What a Trainer passes to the training step with a batch that it has at hand."""
    signature = import_module(f"{package_of(trainer)}.utilities.signature_utils").is_param_in_hook_signature
    return (batch, batch_idx) if signature(module.training_step, "batch_idx", min_args=2) else (batch,)


@contextmanager
def unwrapped(trainer: Any) -> Iterator[None]:
    """Take the module out of DDP, and wrap it anew at the end: DDP remembers the shapes of its parameters."""
    strategy = trainer.strategy
    if not isinstance(strategy.model, torch.nn.parallel.DistributedDataParallel):
        yield
        return
    strategy.model = trainer.lightning_module
    gc.collect()  # the hooks of the old wrapper go with it
    try:
        yield
    finally:
        strategy.configure_ddp()


def averages_of(trainer: Any, module: torch.nn.Module) -> list[torch.nn.Module]:
    """Copies of a module that callbacks keep as averages of its weights."""
    found = []
    for callback in trainer.callbacks:
        average = getattr(callback, "_average_model", None)
        average = getattr(average, "module", average) if type(average) is not type(module) else average
        if isinstance(average, torch.nn.Module):
            found.append(average)
    return found


class WandbSettings(NamedTuple):
    """What a ``WandbLogger`` was told, and does not say in public."""

    prefix: str
    """Before every name."""
    step: str
    """The metric that counts steps."""
    checkpoints: str | None
    """The artifact that it makes of checkpoints itself; None: it makes none."""


def wandb_settings(logger: Any) -> WandbSettings:
    """How a ``WandbLogger`` names things."""
    prefix, synced = logger._prefix, logger._wandb_init.get("sync_tensorboard")
    checkpoints = (logger._checkpoint_name or f"model-{logger.version}") if logger._log_model else None
    return WandbSettings(
        f"{prefix}{logger.LOGGER_JOIN_CHAR}" if prefix else "",
        "global_step" if synced else "trainer/global_step",
        checkpoints,
    )


def wandb_input(run: Any, artifact: Any) -> None:
    """Let a run have an artifact as its input, also where wandb refuses because it is offline; sent, it is the same."""
    if run.offline:
        run._log_artifact(artifact, aliases=["latest"], is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact, aliases=["latest"])


WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""Where wandb logs in if it is not told another server; a key for one serves for both."""


def wandb_would_fail() -> bool:
    """Whether wandb would find no API key if it began a run now, and could not ask for one.

    Wandb itself is not asked: that takes a second, and fixes its settings. False where it is set up already, as the
    script may have logged in, and where its files of settings say something of it.
    """
    told = ("WANDB_MODE", "WANDB_DISABLED", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    if any(os.environ.get(name) for name in told) or (os.isatty(0) and os.isatty(2)):
        return False
    setup = sys.modules.get("wandb.sdk.wandb_setup")
    if getattr(setup, "_singleton", None) is not None:
        return False
    return not (_wandb_settings_say() or _wandb_key_in_netrc())


def _wandb_settings_say() -> bool:
    """Whether a file of settings, of the user or of this folder, says where, how or with which key."""
    folder = os.environ.get("WANDB_DIR") or "."
    config = os.environ.get("WANDB_CONFIG_DIR") or os.path.join("~", ".config", "wandb")
    for parent in (config, os.path.join(folder, "wandb"), os.path.join(folder, ".wandb")):
        with suppress(OSError, ValueError), open(os.path.expanduser(os.path.join(parent, "settings"))) as file:
            if re.search(r"^\s*(api_key|base_url|mode)\s*[=:]", file.read(), flags=re.MULTILINE):
                return True
    return False


def _wandb_key_in_netrc() -> bool:
    given, server = os.environ.get("NETRC"), urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc
    hosts = [server] if server and server not in WANDB_HOSTS else WANDB_HOSTS
    for file in [given] if given else ["~/.netrc", "~/_netrc"]:
        with suppress(OSError, ValueError, netrc.NetrcParseError):
            entries = netrc.netrc(os.path.expanduser(file))
            if any(entry and entry[2] for entry in map(entries.authenticators, hosts)):
                return True
    return False


def asks_wandb(logger: Any) -> bool:
    """Whether a logger is a ``WandbLogger`` that leaves it to wandb whether its run is online."""
    if not any(base.__name__ == "WandbLogger" for base in type(logger).__mro__):
        return False
    return not logger._offline and logger._wandb_init.get("mode") is None


def is_of_profiler(hook: Any) -> bool:
    """Whether a hook is one with which Lightning's ``PyTorchProfiler`` names layers: what it holds cannot be copied."""
    owner = getattr(hook.func, "__self__", None) if isinstance(hook, functools.partial) else None
    return type(owner).__name__ == "RegisterRecordFunction"


SHARDING = "torch.distributed.fsdp"
"""Where the classes and the hooks of FSDP2 come from."""


@contextmanager
def without_sharding(root: nn.Module) -> Iterator[None]:
    """Let modules be of the user's classes, without the hooks and marks of FSDP2, meanwhile; the shards stay.

    For a copy: FSDP2 refuses to be copied, and its hooks hold process groups.
    """
    kept = [(part, type(part), dict(vars(part))) for part in root.modules()]
    try:
        for part, _, attributes in kept:
            part.__class__ = users_class(part)
            for name, value in attributes.items():
                if name.endswith("_hooks") and isinstance(value, dict):
                    left = {key: hook for key, hook in value.items() if not _is_of_sharding(hook)}
                    vars(part)[name] = type(value)(left)
                elif name.startswith(("__composable_api_state_key", "_is_fsdp_", "_fsdp_")):
                    del vars(part)[name]
        yield
    finally:
        for part, kind, attributes in kept:
            part.__class__ = kind
            vars(part).clear()
            vars(part).update(attributes)


def _is_of_sharding(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(SHARDING)
