"""An exported file as loggers keep it: with where it came from, and what was measured on it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_compress import __version__
from lightning_compress.export.onnx import ExportResult

_PIECE = 1 << 20


@dataclass(frozen=True)
class Exported:
    """A file and its origin.

    Attributes:
        result: What was written.
        callback: Name of what exported it; keys what is logged.
        metrics: Of the file, in the module's own validation.
        recipe: That attached the callbacks, or None.
        checkpoint: The newest checkpoint of the fit, or the one that was exported; None: there is none.
        trained_steps: Optimizer steps that the weights have had. The file comes from a checkpoint that has had as many;
            another one is only the nearest. None: the checkpoint is what was exported.
        module: The exported module, for the digest of its weights; None: unknown.
        failure: Which check failed, or None.
    """

    result: ExportResult
    callback: str = "export"
    metrics: Mapping[str, float] = field(default_factory=dict)
    recipe: Mapping[str, Any] | None = None
    checkpoint: Path | None = None
    trained_steps: int | None = None
    module: nn.Module | None = None
    failure: str | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return self.result.path

    @property
    def name(self) -> str:
        """Of the artifact: the file's stem and its precision, so that runs write versions of one artifact."""
        return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', self.path.stem)}-{self.result.precision}"

    @property
    def source(self) -> Path | None:
        """The checkpoint that holds the exported weights, as far as the number of steps can tell."""
        exact = self.trained_steps is None or self._checkpoint_step == self.trained_steps
        return self.checkpoint if exact else None

    @cached_property
    def _checkpoint_step(self) -> int | None:
        """Optimizer steps of the checkpoint; None where it does not say."""
        if self.checkpoint is None:
            return None
        try:  # the tensors stay on the disk
            found = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=True).get("global_step")
        except Exception:  # it holds what only its owner can read
            return None
        return found if isinstance(found, int) else None

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """All that is known, as primitives."""
        found: dict[str, Any] = {
            "file": self.path.name,
            "precision": self.result.precision,
            "bytes": self.result.bytes,
            "sha256": file_digest(self.path),
            "max_logit_difference": float(self.result.max_logit_difference),
            "metrics": {name: float(value) for name, value in self.metrics.items()},
            "lightning_compress": __version__,
        }
        place = None if self.checkpoint is None else {"path": str(self.checkpoint), "step": self._checkpoint_step}
        known = {
            "checkpoint": place if self.source is not None else None,
            "nearest_checkpoint": place if self.source is None else None,
            "weights_sha256": None if self.module is None else weights_digest(self.module),
            "recipe": None if self.recipe is None else dict(self.recipe),
            "failure": self.failure,
        }
        return found | {name: value for name, value in known.items() if value is not None}


def file_digest(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Args:
        path: The file.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     file_digest(file.name)[:8]
        'e3b0c442'
    """
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def weights_digest(module: nn.Module) -> str:
    """The SHA-256 of all parameters and buffers, with their names, in hexadecimal.

    Args:
        module: Whose ``state_dict`` counts.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> weights_digest(layer) == weights_digest(layer), len(weights_digest(layer))
        (True, 64)
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {type(value).__name__}".encode())
        if isinstance(value, torch.Tensor):
            tensor = value.detach().cpu().contiguous()
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def checkpoint_of(trainer: Any) -> Path | None:
    """The newest checkpoint that a fit has written.

    Args:
        trainer: After its fit.

    Returns:
        A file that exists; None if there is none.

    Example:
        >>> from types import SimpleNamespace
        >>> checkpoint_of(SimpleNamespace(checkpoint_callbacks=[])) is None
        True
    """
    found: list[Path] = []
    for callback in trainer.checkpoint_callbacks:
        kept = getattr(callback, "best_k_models", {})
        paths = (getattr(callback, "last_model_path", ""), getattr(callback, "best_model_path", ""), *kept)
        found += [Path(path) for path in paths if path and os.path.isfile(path)]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
