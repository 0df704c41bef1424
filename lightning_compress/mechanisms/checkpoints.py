"""Checkpoints of masked weights: what is saved is compressed, with the dense weights beside it.

The hooks of the LightningModule itself are wrapped, not those of a callback: Lightning calls them for files with
weights only too, and after every callback that puts other weights there, such as averages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.mechanisms.gathering import gathered, rows_of
from lightning_compress.mechanisms.selection import plain_name
from lightning_compress.mechanisms.sharding import own_part
from lightning_compress.mechanisms.shrinking import Structure, restructure_, structure_of, structure_told_by
from lightning_compress.mechanisms.states import Each, Sometimes, damage
from lightning_compress.mechanisms.weights import named_weights
from lightning_compress.mechanisms.wrapping import copied_plainly, shadowed

SECTION = "lightning_compress"
"""Key of a checkpoint under which each callback keeps the dense weights by its name."""

_KEPT = Each(
    {
        "dense": Sometimes(Each(Tensor)),
        "structure": Sometimes(Each(Mapping)),
        "whole": Sometimes(Each(Mapping), beside="structure"),
    }
)

Compress = Callable[[str, Tensor], Tensor | None]
Compressing = Callable[[dict[str, Any]], Compress]


def compress_(checkpoint: dict[str, Any], owner: str, compress: Compress) -> None:
    """Replace dense weights of a checkpoint by compressed ones, in place, and keep the dense ones under our section.

    Args:
        checkpoint: As Lightning saves it. Its tensors are left alone: they are the module's own.
        owner: Name of the callback.
        compress: From the plain name of an entry of the ``state_dict`` and its value to the compressed value; None for
            entries that stay.

    Example:
        >>> import torch
        >>> checkpoint = {"state_dict": {"weight": torch.ones(2)}, "callbacks": {}}
        >>> compress_(checkpoint, "pruning", lambda name, value: value * torch.tensor([1.0, 0.0]))
        >>> checkpoint["state_dict"], checkpoint["lightning_compress"]
        ({'weight': tensor([1., 0.])}, {'pruning': {'dense': {'weight': tensor([1., 1.])}}})
    """
    dense: dict[str, Tensor] = {}
    done: dict[tuple[Any, ...], Tensor] = {}  # so that tied weights share their memory in the file too
    state: dict[str, Any] = {}
    for key, value in checkpoint["state_dict"].items():
        state[key] = value
        if isinstance(value, Tensor):
            place = (own_part(value).data_ptr(), value.shape, value.stride())
            known = place in done and place[0] != 0  # 0: a shard without rows
            compressed = done[place] if known else compress(plain_name(key), value)
            if compressed is not None:
                state[key] = done[place] = compressed
                dense[key] = value
    checkpoint["state_dict"] = state
    keep_dense_(checkpoint, owner, dense)


def keep_dense_(checkpoint: dict[str, Any], owner: str, dense: Mapping[str, Tensor]) -> None:
    """Put dense weights into a checkpoint, in place; not into one with weights only, which none can resume from.

    Args:
        checkpoint: As Lightning saves it.
        owner: Name of the callback.
        dense: From keys of the ``state_dict`` to dense weights; those that are sharded are kept whole, on rank 0.

    Example:
        >>> checkpoint = {"state_dict": {}, "callbacks": {}}
        >>> keep_dense_(checkpoint, "pruning", {})
        >>> checkpoint["lightning_compress"]
        {'pruning': {'dense': {}}}
    """
    if "callbacks" in checkpoint:
        checkpoint.setdefault(SECTION, {})[owner] = {"dense": gathered(dense)}


def dense_of(checkpoint: Mapping[str, Any], owner: str) -> dict[str, Tensor]:
    """The dense weights that a callback kept in a checkpoint.

    Args:
        checkpoint: As Lightning loads it.
        owner: Name of the callback.

    Returns:
        From keys of the ``state_dict`` to dense weights; empty where there are none.

    Raises:
        ValueError: If our section is damaged.

    Example:
        >>> dense_of({"state_dict": {}}, "pruning")
        {}
    """
    return dict(_section(checkpoint).get(owner, {}).get("dense", {}))


def _section(checkpoint: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """What callbacks have kept, by their names."""
    section: Mapping[str, Mapping[str, Any]] = checkpoint.get(SECTION, {})
    problem = damage(section, _KEPT, SECTION)
    if problem is not None:
        raise ValueError(f"the checkpoint is damaged: {problem}; take another one, or begin a new training")
    return section


@contextmanager
def saving_compressed(module: nn.Module, owner: str, compressing: Compressing) -> Iterator[None]:
    """Let a LightningModule save compressed weights, with the dense ones beside.

    Args:
        module: The LightningModule.
        owner: Name of the callback.
        compressing: From each checkpoint that is saved, on all ranks, to ``compress`` as in :func:`compress_`.

    Example:
        >>> import lightning.pytorch as L
        >>> module, checkpoint = L.LightningModule(), {"state_dict": {}, "callbacks": {}}
        >>> with saving_compressed(module, "pruning", lambda checkpoint: lambda name, value: None):
        ...     module.on_save_checkpoint(checkpoint)
        >>> "lightning_compress" in checkpoint
        True
    """

    def saving(original: Callable[..., Any]) -> Callable[..., Any]:
        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            original(checkpoint)
            compress_(checkpoint, owner, compressing(checkpoint))

        return on_save_checkpoint

    with shadowed(module, "on_save_checkpoint", saving):
        yield


@contextmanager
def loading_dense(
    module: nn.Module, owner: str, loaded: Callable[[dict[str, Any]], None], *, resumes: bool
) -> Iterator[None]:
    """Let a LightningModule load the dense weights of a checkpoint, to go on with the training.

    Args:
        module: The LightningModule.
        owner: Name of the callback.
        loaded: Called with each checkpoint that is loaded, as it is in the file.
        resumes: Whether to put the dense weights in the place of the compressed ones: for a fit; a model that is
            tested must stay compressed.

    Example:
        >>> import lightning.pytorch as L
        >>> module, checkpoint = L.LightningModule(), {"state_dict": {}, "callbacks": {}}
        >>> with loading_dense(module, "pruning", print, resumes=True):
        ...     module.on_load_checkpoint(checkpoint)
        {'state_dict': {}, 'callbacks': {}}
    """

    def loading(original: Callable[..., Any]) -> Callable[..., Any]:
        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            loaded(checkpoint)
            if resumes and "state_dict" in checkpoint:
                state = checkpoint["state_dict"]
                state.update({key: value for key, value in dense_of(checkpoint, owner).items() if key in state})
            elif resumes:  # a strategy with shards has loaded it already
                _load_dense_(module, dense_of(checkpoint, owner))
            original(checkpoint)

        return on_load_checkpoint

    with shadowed(module, "on_load_checkpoint", loading):
        yield


def _load_dense_(module: nn.Module, dense: Mapping[str, Tensor]) -> None:
    """Copy dense weights into a module's shards, in place."""
    weights = named_weights(module)
    with torch.no_grad():
        for key, value in dense.items():
            weight = weights[plain_name(key)]
            own_part(weight).copy_(rows_of(value, weight))


@contextmanager
def saving_structure(module: nn.Module, owner: str, whole: Callable[[], Structure]) -> Iterator[None]:
    """Let a LightningModule save beside its weights what its modules say of their sizes, with weights only too.

    Args:
        module: The LightningModule.
        owner: Name of the callback.
        whole: Gives the sizes that the modules had at first.

    Example:
        >>> import lightning.pytorch as L
        >>> module, checkpoint = L.LightningModule(), {"state_dict": {}}
        >>> module.layer = nn.Linear(2, 1)
        >>> with saving_structure(module, "structured", lambda: {"layer": {"in_features": 2, "out_features": 8}}):
        ...     module.on_save_checkpoint(checkpoint)
        >>> structures_in(checkpoint)
        ({'layer': {'in_features': 2, 'out_features': 1}}, {'layer': {'in_features': 2, 'out_features': 8}})
    """

    def saving(original: Callable[..., Any]) -> Callable[..., Any]:
        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            original(checkpoint)
            keep_structure_(checkpoint, owner, module, whole())

        return on_save_checkpoint

    with shadowed(module, "on_save_checkpoint", saving):
        yield


def keep_structure_(checkpoint: dict[str, Any], owner: str, module: nn.Module, whole: Structure) -> None:
    """Put into a checkpoint, in place, what modules say of their sizes.

    Args:
        checkpoint: As Lightning saves it.
        owner: Name of the callback.
        module: The LightningModule.
        whole: The sizes that its modules had at first.

    Example:
        >>> checkpoint = {}
        >>> keep_structure_(checkpoint, "structured", nn.Linear(2, 1), {})
        >>> checkpoint
        {'lightning_compress': {'structured': {'structure': {'': {'in_features': 2, 'out_features': 1}}, 'whole': {}}}}
    """
    checkpoint.setdefault(SECTION, {})[owner] = {"structure": structure_of(module), "whole": whole}


def structures_in(checkpoint: Mapping[str, Any]) -> tuple[Structure, Structure] | None:
    """What a checkpoint says of the sizes of its modules, now and at first.

    Args:
        checkpoint: As Lightning loads it.

    Returns:
        Both as :func:`structure_of`; None where it says nothing.

    Raises:
        ValueError: If our section is damaged.

    Example:
        >>> structures_in({"state_dict": {}}) is None
        True
    """
    entries = [own for own in _section(checkpoint).values() if "structure" in own]
    return (entries[0]["structure"], entries[0]["whole"]) if entries else None


def resize_(module: nn.Module, checkpoint: Mapping[str, Any]) -> str | None:
    """Give a module, in place, the sizes that a checkpoint has.

    Args:
        module: Of the class that was saved.
        checkpoint: As it is in the file; what it does not say of sizes is told by its tensors.

    Returns:
        What is to be said where the module never had the sizes that the saved one had at first; else None.

    Raises:
        ValueError: If tensors do not tell, or are of another network.

    Example:
        >>> saved, module = nn.Linear(2, 1), nn.Linear(2, 8)
        >>> checkpoint = {"state_dict": saved.state_dict()}
        >>> keep_structure_(checkpoint, "structured", saved, structure_of(module))
        >>> resize_(module, checkpoint)
        >>> module
        Linear(in_features=2, out_features=1, bias=True)
    """
    told, state, now = structures_in(checkpoint), checkpoint["state_dict"], structure_of(module)
    structure, whole = told or (structure_told_by(module, state), now)
    restructure_(module, structure, state)
    if now in (structure, whole):
        return None
    name = next((name for name in {**now, **whole} if now.get(name) != whole.get(name)), "")
    return f"before any filters went, '{name}' had {whole.get(name)}, and it had {now.get(name)} here"


@contextmanager
def before_loading(module: nn.Module, prepare: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call a function with each checkpoint that a LightningModule is about to load.

    Args:
        module: The LightningModule.
        prepare: Called with the checkpoint as it is in the file, before the module's own hook and its weights.

    Example:
        >>> import lightning.pytorch as L
        >>> module = L.LightningModule()
        >>> with before_loading(module, print):
        ...     module.on_load_checkpoint({"state_dict": {}})
        {'state_dict': {}}
    """

    def loading(original: Callable[..., Any]) -> Callable[..., Any]:
        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            prepare(checkpoint)
            original(checkpoint)

        return on_load_checkpoint

    with shadowed(module, "on_load_checkpoint", loading):
        yield


def close_after_exception(trainer: Any, files: ExitStack) -> None:
    """Close what acts on a module's checkpoints once those of an exception are written.

    Checkpoint callbacks come after all others in ``on_exception``, and the strategy's own hook after them.

    Args:
        trainer: The Trainer, within ``on_exception`` of a callback.
        files: What to close.

    Example:
        >>> import lightning.pytorch as L
        >>> trainer, files = L.Trainer(accelerator="cpu", logger=False), ExitStack()
        >>> _ = files.callback(print, "closed")
        >>> close_after_exception(trainer, files)
        >>> trainer.strategy.on_exception(RuntimeError())
        closed
    """
    stack = ExitStack()

    def closing(original: Callable[..., Any]) -> Callable[..., Any]:
        def on_exception(*args: Any) -> None:
            files.close()
            stack.close()
            original(*args)

        return on_exception

    stack.enter_context(copied_plainly(trainer.strategy))
    stack.enter_context(shadowed(trainer.strategy, "on_exception", closing))
