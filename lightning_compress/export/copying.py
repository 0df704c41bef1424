"""A copy of a module that shares nothing with it that training or validation could change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_compress import _compat
from lightning_compress.export.errors import ExportError
from lightning_compress.mechanisms.gathering import sharded_as
from lightning_compress.mechanisms.sharding import is_shard, own_part, shards_in_place
from lightning_compress.mechanisms.wrapping import HOOK_FLAGS, HOOK_TABLES, is_own, own_hooks, unwrapped

ModuleT = TypeVar("ModuleT", bound=nn.Module)

SHARED_LIGHTNING_CLASSES = ("Trainer", "LightningDataModule", "CombinedLoader", "Callback", "Logger")


def independent_copy(module: ModuleT) -> ModuleT:
    """Copy a module so that running, training or exporting the copy leaves the original alone.

    Differences from ``copy.deepcopy``: attributes that are non-leaf tensors are detached instead of being refused;
    datasets, loaders, datamodules and trainers are shared, not copied (those that hold parts of the module: a shallow
    copy, which holds their copies); hooks and step wrappers that this package put on the original are absent; nothing
    in the copy is compiled, because compiled code stays bound to the original.

    Args:
        module: Any module. A LightningModule may be attached to a Trainer; its copy is not.

    Returns:
        The copy, on the same device and with the same training flags. A compiled child is replaced by what was
        compiled, so its keys lose ``_orig_mod.``.

    Raises:
        ExportError: If an attribute cannot be copied; the message names it.

    Example:
        >>> import torch
        >>> network = torch.nn.Linear(2, 1)
        >>> network.last_output = network(torch.ones(1, 2))  # copy.deepcopy would refuse this
        >>> independent_copy(network).last_output.requires_grad
        False
    """
    return _copied(cast(ModuleT, _compat.uncompiled(module)), {})


def whole_copy(module: ModuleT, *, wanted: bool = True, rows: Callable[[Tensor], Tensor] = own_part) -> ModuleT | None:
    """Copy a module of which FSDP2 shards the parameters, as if it had never been sharded: for all ranks to call.

    Args:
        module: The module; it is as it was afterwards, with its shards in place.
        wanted: Whether this rank is to have the copy; the others only give their shards.
        rows: From a parameter to what counts as the rows that this rank has of it.

    Returns:
        A copy on the CPU with whole parameters, of the user's classes, whose ``configure_model`` has done its work;
        None where it is not wanted.

    Raises:
        ExportError: As :func:`independent_copy`, where it is wanted.
    """
    shards_in_place(module)
    whole: dict[int, Any] = {}
    for parameter in module.parameters():  # one at a time: a device has room for one
        if is_shard(parameter):
            shards: Any = sharded_as(rows(parameter), parameter)
            gathered = shards.full_tensor()
            if wanted:
                kept = gathered.to("cpu", copy=True)  # of one rank it is the shard itself
                whole[id(parameter)] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
    if not wanted:
        return None
    source = cast(ModuleT, _compat.uncompiled(module))
    with _compat.without_sharding(source):
        duplicate = _copied(source, whole).cpu()
    _compat.settle_(duplicate)
    return duplicate


def _copied(source: ModuleT, given: Mapping[int, Any]) -> ModuleT:
    """A copy of a module, in which what is given stands for the objects of these identities."""
    memo = {**_prepared_memo(source), **given}
    copies = dict(memo)
    try:
        duplicate = copy.deepcopy(source, copies)
    except Exception as error:  # whatever an attribute's own __deepcopy__ or __reduce__ raises
        name = _attribute_that_fails(source, memo)
        where = f"its attribute '{name}'" if name else "one of its attributes"
        raise ExportError(
            f"{type(source).__name__} cannot be copied because of {where}: {type(error).__name__}: {error}"
        ) from error
    _refer_to_copies_(memo.values(), source, copies)
    _rebind_functions_(duplicate, copies)
    return make_plain_(duplicate)


def make_plain_(module: ModuleT) -> ModuleT:
    """Take off a module, in place, the hooks and wrappers of this package and of Lightning, and any compilation."""
    for part in module.modules():
        _strip_hooks(part)
        _strip_wrappers(part)
        _compat.forget_metric_names_(part)
    return cast(ModuleT, _compat.drop_compilation_(module))


def widen_(module: ModuleT) -> ModuleT:
    """Turn a module that holds half-precision tensors into float32, in place; leave any other as it is."""
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in [*module.parameters(), *module.buffers()]):
        module.float()
    return module


def _prepared_memo(module: nn.Module) -> dict[int, Any]:
    """What ``copy.deepcopy`` must not copy in its own way, looking through dicts, lists, tuples and modules."""
    memo: dict[int, Any] = {}
    parts = set(module.modules())
    seen: set[int] = set()
    waiting: list[Any] = [module]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
        elif _is_shared(value):
            memo[id(value)] = copy.copy(value) if _held_of(parts, value) else value
        elif is_own(value) or _compat.is_of_profiler(value):  # until it is taken off
            memo[id(value)] = value
        elif isinstance(value, nn.Module):
            waiting.append(vars(value))
            memo.update({id(state): state for state in [_compat.compiled_state(value)] if state is not None})
        elif isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)
    return memo


def _is_shared(value: Any) -> bool:
    """Whether a copy should refer to the very same object: data, a mesh of ranks, and Lightning's own machinery."""
    if isinstance(value, nn.Module):  # a callback that is a part of the module too, say
        return False
    if isinstance(value, (Dataset, DataLoader, Sampler)) or type(value).__name__ == "DeviceMesh":
        return True
    return any(
        base.__name__ in SHARED_LIGHTNING_CLASSES and base.__module__.startswith(("lightning.", "pytorch_lightning."))
        for base in type(value).__mro__
    )


def _held_of(parts: Collection[nn.Module], owner: Any) -> dict[str, nn.Module]:
    """Those of some modules that are attributes of an object."""
    attributes = getattr(owner, "__dict__", {}).items()
    return {name: entry for name, entry in attributes if isinstance(entry, nn.Module) and entry in parts}


def _refer_to_copies_(shared: Iterable[Any], source: nn.Module, copies: Mapping[int, Any]) -> None:
    """Let what would be shared, and holds parts of the module, hold their copies: a task that runs the step, say."""
    parts = set(source.modules())
    for owner in shared:
        for name, part in _held_of(parts, owner).items():
            vars(owner)[name] = copies.get(id(part), part)


def _strip_hooks(part: nn.Module) -> None:
    hooks = [entry for table in HOOK_TABLES for entry in (vars(part).get(table) or {}).items()]
    for key in own_hooks(vars(part)).union(key for key, hook in hooks if _compat.is_of_profiler(hook)):
        for table in (*HOOK_TABLES, *HOOK_FLAGS):
            (vars(part).get(table) or {}).pop(key, None)


def _strip_wrappers(part: nn.Module) -> None:
    for name, wrapper in [(name, entry) for name, entry in vars(part).items() if is_own(entry)]:
        entry = unwrapped(wrapper)
        del part.__dict__[name]
        if entry is not None:
            part.__dict__[name] = _rebound(entry, part)


def _rebound(method: Any, owner: nn.Module) -> Any:
    """A method of the original as a method of its copy; a plain function stays as it is."""
    return method.__func__.__get__(owner) if isinstance(getattr(method, "__self__", None), type(owner)) else method


def _rebind_functions_(duplicate: nn.Module, copies: dict[int, Any]) -> None:
    """Let hooks and functions in a copy refer to the copy: deepcopy leaves functions, and what they close over."""
    for part in duplicate.modules():
        for table in (vars(part).get(name) or {} for name in HOOK_TABLES):
            table.update({key: _followed(hook, copies) for key, hook in table.items()})
        for name, value in list(vars(part).items()):
            if isinstance(value, FunctionType):
                vars(part)[name] = _followed(value, copies)


def _followed(value: Any, copies: dict[int, Any]) -> Any:
    """A function, or a method, with the copies of the objects that it refers to."""
    if isinstance(value, MethodType):
        owner = copies.get(id(value.__self__), value.__self__)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if not isinstance(value, FunctionType) or is_own(value):
        return copies.get(id(value), value)
    cells = [_contents(cell) for cell in value.__closure__ or ()]
    defaults = list(value.__defaults__ or ())
    new_cells, new_defaults = ([_followed(entry, copies) for entry in entries] for entries in (cells, defaults))
    if all(new is old for new, old in zip([*new_cells, *new_defaults], [*cells, *defaults], strict=True)):
        return value
    closure = tuple(
        cell if new is old else CellType(new)
        for cell, new, old in zip(value.__closure__ or (), new_cells, cells, strict=True)
    )
    function = FunctionType(value.__code__, value.__globals__, value.__name__, tuple(new_defaults) or None, closure)
    function.__kwdefaults__ = value.__kwdefaults__
    function.__dict__.update(value.__dict__)
    return function


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


def _attribute_that_fails(module: nn.Module, memo: dict[int, Any]) -> str | None:
    """Dotted name of the first attribute that cannot be copied on its own."""
    return next((name for name, value in _plain_attributes(module) if not _can_be_copied(value, memo)), None)


def _can_be_copied(value: Any, memo: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:  # whatever the object's own methods raise
        return False
    return True


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every attribute that is neither a child module nor the Trainer, hooks and buffers last."""
    for path, part in module.named_modules():
        internal = []
        for name, value in vars(part).items():
            if name in ("_modules", "_trainer"):
                continue
            entry = (f"{path}.{name}" if path else name, value)
            if name in vars(nn.Module()):
                internal.append(entry)
            else:
                yield entry
        yield from internal
