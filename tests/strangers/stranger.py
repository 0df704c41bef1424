"""What a row of the table says of somebody else's LightningModule, and how it is trained for a few steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import nn

STEPS = 4

NO_MAPS = r"pairs?='auto' finds no layers of student and teacher to compare\. .* Name them"
"""Nothing that attention, or factors, could be made of: a network without feature maps."""
NO_FILTERS = r"no filters can go: .*is what the network returns"
SEVERAL_NETWORKS = r"the step calls \d modules with parameters: .*; choose the network with"
DONE_TWICE = r"the step of \w+ changes '\w.*', and it runs twice .* so that would be done twice\. .*DPFCallback"
NUMBER = r"cannot be exported because of a number that Python takes from a tensor"
BRANCH = r"cannot be exported because of a data-dependent branch at .*a file holds one branch only"

MANUAL = {
    **dict.fromkeys(
        (
            "DistillationCallback",
            "AttentionTransferCallback",
            "FactorTransferCallback",
            "QATCallback",
            "PruningCallback",
            "DPFCallback",
            "DCILCallback",
        ),
        r"changes the step, and \w+ optimises manually: let it inherit lightning_compress\.CompressionMixin",
    ),
    "StructuredPruningCallback": r"replays training steps, and \w+ optimises manually",
}


@dataclass(frozen=True)
class Stranger:
    """One module.

    Attributes:
        package: Name on PyPI of what it comes from.
        module: Name of its class.
        kind: What it is, in a word or two.
        make: Makes it, untrained.
        data: Makes its training data, which serves as its validation data too.
        student: Dotted name of the network that its step calls first of all; "" for the module itself.
        teacher: Makes the teacher of that network; None: another one of the same class, with other weights.
        arguments: Name of a callback to arguments that differ from those that all strangers get.
        refuses: Name of a callback to the pattern of the error with which it must be refused.
        trainer: Arguments of the Trainer that the module asks for.
        lightning: The package whose Trainer it belongs to.
        validates: Whether it has a validation of its own.
    """

    package: str
    module: str
    kind: str
    make: Callable[[], Any]
    data: Callable[[], Any]
    student: str = ""
    teacher: Callable[[], nn.Module] | None = None
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    lightning: str = "lightning.pytorch"
    validates: bool = True

    def __str__(self) -> str:
        return f"{self.package}: {self.module} ({self.kind})"

    def made(self) -> Any:
        """The module, the same each time."""
        torch.manual_seed(1)
        return self.make()

    def taught_by(self) -> nn.Module:
        """The teacher, the same each time."""
        torch.manual_seed(3)
        return (self.teacher or (lambda: self.make().get_submodule(self.student)))()


def arguments(*, regression: bool = False, linear: bool = False, **others: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of callbacks by their names.

    Args:
        regression: Whether the network's outputs are no classes.
        linear: Whether it has linear layers only, so that DCIL is told which.
        others: More arguments of single callbacks.
    """
    chosen: dict[str, dict[str, Any]] = {"DistillationCallback": {}, "DCILCallback": {}}
    if regression:
        chosen["DistillationCallback"] |= {"loss_kind": "mse"}
        chosen["DCILCallback"] |= {"kl_start": 1.0}
    if linear:
        chosen["DCILCallback"] |= {"layers": ["type:Linear"], "dense_path": "shared"}
    for name, more in others.items():
        chosen[name] = {**chosen.get(name, {}), **more}
    return chosen


def refused(pattern: str, *names: str) -> dict[str, str]:
    """One pattern for several callbacks."""
    return dict.fromkeys(names, pattern)


def fit(stranger: Stranger, module: Any, *callbacks: Any) -> Any:
    """Train a module for a few steps from fixed random numbers.

    Returns:
        Its Trainer.
    """
    settings = {
        "accelerator": "cpu",
        "max_steps": STEPS,
        "limit_val_batches": 1 if stranger.validates else 0,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **stranger.trainer,
    }
    trainer = import_module(stranger.lightning).Trainer(**settings, callbacks=list(callbacks))
    torch.manual_seed(2)
    batches = {"train_dataloaders": stranger.data()}
    if stranger.validates:
        batches["val_dataloaders"] = stranger.data()
    torch.manual_seed(2)
    trainer.fit(module, **batches)
    return trainer


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    """Between the parameters of two modules of one class."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((ours - theirs).detach().abs().max()) for ours, theirs in pairs if ours.numel())
