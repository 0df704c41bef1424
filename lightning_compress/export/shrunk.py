"""Structurally pruned networks out of a checkpoint."""

from __future__ import annotations

import os
from typing import TypeVar

from torch import nn

from lightning_compress.export.weights import read_checkpoint
from lightning_compress.functional._checks import shown
from lightning_compress.mechanisms.checkpoints import resize_
from lightning_compress.mechanisms.selection import plain_name

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def load_shrunk(module: ModuleT, checkpoint_path: str | os.PathLike[str]) -> ModuleT:
    """Load a network that ``StructuredPruningCallback`` has made smaller into its class.

    Neither a Trainer nor Torch-Pruning is needed, and nothing of the file is unpickled but tensors and plain Python.

    Args:
        module: Of the class that was trained, built as for the training; it is changed in place.
        checkpoint_path: A file written by ``ModelCheckpoint`` or ``trainer.save_checkpoint``, with weights only too; or
            a saved ``state_dict``.

    Returns:
        The module, with the sizes and the weights of the checkpoint, loaded strictly.

    Raises:
        TypeError: If ``module`` is no module.
        FileNotFoundError: If there is no such file.
        ValueError: If it is no Lightning checkpoint, or was saved from another class.

    Example:
        >>> import os, tempfile, torch
        >>> from lightning_compress.mechanisms.checkpoints import keep_structure_
        >>> from lightning_compress.mechanisms.shrinking import structure_of
        >>> smaller = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "last.ckpt")
        ...     checkpoint = {"state_dict": smaller.state_dict()}
        ...     module = nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 1))
        ...     keep_structure_(checkpoint, "structured", smaller, structure_of(module))
        ...     torch.save(checkpoint, path)
        ...     load_shrunk(module, path)
        Sequential(
          (0): Linear(in_features=2, out_features=3, bias=True)
          (1): Linear(in_features=3, out_features=1, bias=True)
        )
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, built as for the training, got {shown(module)}")
    checkpoint = read_checkpoint(checkpoint_path, or_weights=True)
    state = checkpoint["state_dict"]
    names, saved = ({plain_name(name) for name in own} for own in (module.state_dict(), state))
    if names != saved:
        different = sorted(names.symmetric_difference(saved))[:5]
        raise ValueError(
            f"checkpoint_path '{os.fspath(checkpoint_path)}' was not saved from a {type(module).__name__}: only one of "
            f"the two has {', '.join(map(repr, different))}"
        )
    resize_(module, checkpoint)
    here = {plain_name(name): name for name in module.state_dict()}  # one of the two may be compiled
    module.load_state_dict({here[plain_name(name)]: value for name, value in state.items()}, strict=True)
    return module
