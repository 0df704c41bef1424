"""Plain weights out of a Lightning checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_compress.functional._checks import check_path
from lightning_compress.mechanisms.reading import read_saved


def plain_state_dict(checkpoint_path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights of a Lightning checkpoint, for a process that has neither this package nor Lightning.

    Args:
        checkpoint_path: A file written by Lightning's ``ModelCheckpoint`` or ``trainer.save_checkpoint``.

    Returns:
        Names and CPU tensors that load with ``strict=True`` into the plain module.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a Lightning checkpoint, or cannot be read without unpickling arbitrary objects.

    Example:
        >>> import os, tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "last.ckpt")
        ...     torch.save({"state_dict": torch.nn.Linear(2, 1).state_dict(), "epoch": 3}, path)
        ...     sorted(plain_state_dict(path))
        ['bias', 'weight']
    """
    weights: dict[str, Tensor] = read_checkpoint(checkpoint_path)["state_dict"]
    return weights


def read_checkpoint(
    checkpoint_path: str | os.PathLike[str], *, or_weights: bool = False, argument: str = "checkpoint_path"
) -> dict[str, Any]:
    """The whole contents of a Lightning checkpoint, tensors on the CPU; errors as above, under the argument's name.

    With ``or_weights``, plain weights are what a checkpoint with weights alone would be.
    """
    path = Path(check_path(argument, checkpoint_path))
    what = f"{argument} '{path}'"
    if os.path.isdir(path):  # unlike Path's own, also of names that are too long
        raise ValueError(
            f"{what} is a directory (a sharded checkpoint?); a single file is accepted, which "
            "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE` makes of it"
        )
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{what} does not exist")
    trusted = "load it with weights_only=False yourself, put its weights into the module, and leave the checkpoint out"
    checkpoint = read_saved(path, argument, trusted=trusted)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{what} holds a {type(checkpoint).__name__}, not a Lightning checkpoint")
    weights = checkpoint.get("state_dict")
    if isinstance(weights, dict) and all(isinstance(value, Tensor) for value in weights.values()):
        return checkpoint
    if checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
        if or_weights:
            return {"state_dict": checkpoint}
        raise ValueError(
            f"{what} already holds plain weights, not a Lightning checkpoint; "
            "load it with torch.load(..., weights_only=True)"
        )
    keys = sorted(str(key) for key in checkpoint)
    raise ValueError(f"{what} is not a Lightning checkpoint: no 'state_dict' of tensors in {keys}")
