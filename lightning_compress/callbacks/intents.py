"""What each callback is going to do in a fit: plain data, for a plan, a logger, or whoever wants to know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from lightning_compress.mechanisms.selection import plain_name, select_modules

Aim = float | int | str | bool | None
"""What a callback aims at: a number, or a word."""


@dataclass(frozen=True)
class Intent:
    """What a callback is going to do.

    Attributes:
        technique: Name of its class.
        takes: Dotted names of the layers in the LightningModule that it acts on; "" for the module itself.
        left: Names of the layers that it could act on and does not, each with the reason.
        elements: How many numbers the weights hold that it acts on.
        aims: What it aims at, such as ``{"sparsity": 0.9}``.
        student: Dotted name of the student, or of the ends of a chain; empty for techniques without a teacher.
        pairs: Layers of the student, each with the teacher's layer that it learns from.
        passes: How often it lets the step run beside the one time that it runs anyway.
        teachers: How often it lets its teacher run in a step; 0 where another callback does.
        notes: Sentences.

    Example:
        >>> Intent("DPFCallback", takes=("conv",), aims={"sparsity": 0.9}).to_dict()["takes"]
        ['conv']
    """

    technique: str
    takes: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    elements: int = 0
    aims: Mapping[str, Aim] = field(default_factory=dict)
    student: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    passes: int = 0
    teachers: int = 0
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as dicts, lists and primitives, for JSON and the configuration of a run."""
        lists = {key: _lists(value) for key, value in asdict(self).items()}
        return {**lists, "left": dict(self.left), "aims": dict(self.aims)}


def intents(trainer: Any, pl_module: Any) -> dict[str, Intent]:
    """What the callbacks of this package are going to do in a fit.

    Args:
        trainer: The Trainer, from ``on_train_start`` on. What only the first batch shows, as which layers have integer
            kernels, is said from then on.
        pl_module: The module that is trained.

    Returns:
        Name of each callback to its intent, in the Trainer's order.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_compress import CompressionReport
        >>> trainer = Trainer(callbacks=[CompressionReport()], accelerator="cpu", logger=False,
        ...                   enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False)
        >>> list(intents(trainer, None))
        ['report']
    """
    from lightning_compress.callbacks.base import callbacks_of

    return {callback.name: callback.intent(trainer, pl_module) for callback in callbacks_of(trainer)}


def layers_of(weights: Iterable[str]) -> tuple[str, ...]:
    """The layers that some parameters belong to, each once.

    Args:
        weights: Dotted names of parameters.

    Returns:
        Dotted names of modules, in the order of the first parameter of each.

    Example:
        >>> layers_of(["net.0.weight", "net.0.bias", "scale"])
        ('net.0', '')
    """
    return tuple(dict.fromkeys(plain_name(name).rpartition(".")[0] for name in weights))


def left_out(root: nn.Module, weights: Iterable[str], exclude: Sequence[str] | None) -> dict[str, str]:
    """Why the layers of some parameters were not selected.

    Args:
        root: What the names are relative to.
        weights: Dotted names of parameters.
        exclude: The selectors that the user gave.

    Returns:
        Name of each layer to "excluded" or "not selected".

    Example:
        >>> left_out(nn.Sequential(nn.Linear(2, 2), nn.Embedding(2, 2)), ["0.weight", "1.weight"], ["0"])
        {'0': 'excluded', '1': 'not selected'}
    """
    excluded = select_modules(root, list(exclude), None, types=(nn.Module,)) if exclude else {}
    return {layer: "excluded" if layer in excluded else "not selected" for layer in layers_of(weights)}


def _lists(value: Any) -> Any:
    return [_lists(entry) for entry in value] if isinstance(value, (list, tuple)) else value
