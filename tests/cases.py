"""One row for each public callback: how to build it, on which modules, and what it refuses.

The contract in ``tests/contract`` runs every row. A new technique adds a row here and nothing there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from contract.modules import AUTOMATIC, Classifier, teacher_for

import lightning_compress
from lightning_compress import (
    AttentionTransferCallback,
    CompressionCallback,
    CompressionReport,
    DCILCallback,
    DistillationCallback,
    DPFCallback,
    ExportCallback,
    FactorTransferCallback,
    PruningCallback,
    PSGDCallback,
    PTQCallback,
    QATCallback,
    StructuredPruningCallback,
)


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: Name of the public class.
        build: From a folder and the kind of module to the callback, the same one each time.
        modules: Kinds of module it works on.
        changes_loss: Whether the trained weights differ from those without it.
        keeps_dense: Whether a second fit goes on from weights that the module does not hold, but the callback does.
        quantises: Whether validation outside of a fit shows a quantised network, which needs training data.
        shrinks: Whether the network gets smaller, so that its weights load into its class with ``load_shrunk`` only.
        heavy: Whether the end of fit takes a second or more: then few of the fast tests try it.
    """

    name: str
    build: Callable[[Path, type[Classifier]], CompressionCallback]
    modules: tuple[type[Classifier], ...] = AUTOMATIC
    changes_loss: bool = False
    keeps_dense: bool = False
    quantises: bool = False
    shrinks: bool = False
    heavy: bool = False


def _distillation(folder: Path, kind: type[Classifier]) -> CompressionCallback:
    return DistillationCallback(teacher_for(kind), temperature=2.0, task_weight=0.5, kd_weight=0.5)


def _attention(folder: Path, kind: type[Classifier]) -> CompressionCallback:
    return AttentionTransferCallback(teacher_for(kind), strength=0.02)


def factors(folder: Path, kind: type[Classifier], **settings: Any) -> CompressionCallback:
    epochs = {} if "paraphraser" in settings else {"pretrain_epochs": 2}
    return FactorTransferCallback(teacher_for(kind), weight=3.0, **epochs, **settings)


def _psgd(folder: Path, kind: type[Classifier]) -> CompressionCallback:
    return PSGDCallback(4, mean_factor=1.5)


def _pruning(folder: Path, kind: type[Classifier]) -> CompressionCallback:
    return PruningCallback(0.6, end=0.6, regrow=True)  # so that dense weights matter to the masks


def _dpf(folder: Path, kind: type[Classifier]) -> CompressionCallback:
    return DPFCallback(0.6, update_interval=1)


def _dcil(folder: Path, kind: type[Classifier]) -> CompressionCallback:
    return DCILCallback(0.4, update_interval=1)  # so that no filter is masked completely


def _ptq(folder: Path, kind: type[Classifier]) -> CompressionCallback:
    return PTQCallback(weight_bits=4)


def _qat(folder: Path, kind: type[Classifier]) -> CompressionCallback:
    return QATCallback(weight_bits=4, step_size="observed")  # so that grids move


def _structured(folder: Path, kind: type[Classifier]) -> CompressionCallback:
    return StructuredPruningCallback(0.5, schedule="iterative", rounds=2, min_channels=1)


def _export(folder: Path, kind: type[Classifier]) -> CompressionCallback:
    return ExportCallback(folder / "model.onnx", metric="val_loss", tolerance=1e-4)


def _report(folder: Path, kind: type[Classifier]) -> CompressionCallback:
    return CompressionReport(path=folder / "report", latency=False)


CASES = (
    Case("DistillationCallback", _distillation, changes_loss=True),
    Case("AttentionTransferCallback", _attention, changes_loss=True),
    Case("FactorTransferCallback", factors, changes_loss=True),
    Case("PSGDCallback", _psgd, changes_loss=True),
    Case("PTQCallback", _ptq, quantises=True),
    Case("QATCallback", _qat, changes_loss=True, quantises=True),
    Case("PruningCallback", _pruning, changes_loss=True, keeps_dense=True),
    Case("DPFCallback", _dpf, changes_loss=True, keeps_dense=True),
    Case("DCILCallback", _dcil, changes_loss=True, keeps_dense=True),
    Case("StructuredPruningCallback", _structured, changes_loss=True, shrinks=True),
    Case("ExportCallback", _export, heavy=True),
    Case("CompressionReport", _report),
)


NO_END = "the training is, and here it has no end in batches"
MASKING = ("PruningCallback", "DPFCallback", "DCILCallback")
NEEDING_STEPS = (
    "DistillationCallback",
    "AttentionTransferCallback",
    "FactorTransferCallback",
    "QATCallback",
    *MASKING,
)

REFUSED: dict[str, dict[str, str]] = {
    "manual": {
        **dict.fromkeys(NEEDING_STEPS, "optimises manually: let it inherit lightning_compress.CompressionMixin"),
        "StructuredPruningCallback": "replays training steps, and ManualClassifier optimises manually",
    },
    "two optimizers": {
        "DCILCallback": "optimizers train parts of TwoOptimizers, so it is not said what its dense path has for itself",
        "StructuredPruningCallback": "replays training steps, and TwoOptimizers optimises manually",
    },
    "LBFGS": {
        "FactorTransferCallback": "has an optimizer of its own and cannot follow LBFGS",
        "PSGDCallback": "cannot work with LBFGS, which builds its step from gradients that belong together",
        "DCILCallback": "has an optimizer of its own and cannot follow LBFGS",
        "StructuredPruningCallback": "cannot take entries out of the state of LBFGS",
    },
    "compiled module": {"StructuredPruningCallback": "cannot look into .*, which is compiled as a whole"},
    "fast_dev_run": {"^StructuredPruningCallback$": "end=0.5 leaves no step after the last round"},
    "no validation": {"ExportCallback": "metric='val_loss' is measured in validation, and .* has none here"},
    "unsized": dict.fromkeys((*MASKING, "QATCallback", "StructuredPruningCallback"), NO_END),
    "max_time alone": dict.fromkeys((*MASKING, "QATCallback", "StructuredPruningCallback"), NO_END),
    "spawn": {"StructuredPruningCallback": "cannot bring a smaller network back from processes that"},
}
"""Cells of the reliability matrix that must be refused, before anything of the module has changed: condition, class,
and what the error says. A class stands for all rows that it is a member of; with ``^`` and ``$``, for its own alone.
All other cells must equal their reference."""

WARNED: dict[str, dict[str, str]] = {
    "lr finder": dict.fromkeys((*NEEDING_STEPS, "PSGDCallback"), "LearningRateFinder sets all callbacks aside"),
    "batch-size finder": dict.fromkeys((*NEEDING_STEPS, "PSGDCallback"), "BatchSizeFinder sets all callbacks aside"),
    "fast_dev_run": {r"QATCallback \+ StructuredPruningCallback": "the training ended before start=0.25"},
    "max_time reached": {r"DPFCallback \+ StructuredPruningCallback": "training stopped at 62% of its length"},
}
"""Cells in which a callback has to warn; in all the others none may."""


def _rounded(callback: Any, module: torch.nn.Module) -> bool:
    return callback.quantization is not None and len(callback.quantization.weights) > 0


def _masked(callback: Any, module: torch.nn.Module) -> bool:
    weights = [dict(module.named_parameters())[name] for name in callback.masks]
    return any(bool((weight == 0).any()) for weight in weights)


def _counted(callback: Any, module: torch.nn.Module) -> bool:
    return sum(callback.effects.values()) > 0


def _found(callback: Any, module: torch.nn.Module) -> bool:
    return callback.result is not None


EFFECTS: dict[str, Callable[[Any, torch.nn.Module], bool]] = {
    "DistillationCallback": _counted,
    "AttentionTransferCallback": _counted,
    "FactorTransferCallback": _counted,
    "PSGDCallback": _counted,
    "PTQCallback": _rounded,
    "QATCallback": _rounded,
    "PruningCallback": _masked,
    "DPFCallback": _masked,
    "DCILCallback": lambda callback, module: _masked(callback, module) and _counted(callback, module),
    "StructuredPruningCallback": lambda callback, module: callback.plan.share > 0,
    "ExportCallback": _found,
    "CompressionReport": _found,
}
"""Whether a callback did anything in the fit that is over: from it and the trained module."""


class Row(Protocol):
    """What the reliability matrix needs to know of a row: one callback, or several that are attached together."""

    @property
    def name(self) -> str:
        """Class, or classes joined by " + "."""

    @property
    def build(self) -> Callable[[Path, type[Classifier]], Any]:
        """From a folder and the kind of module to the callback, or to a list of them."""

    @property
    def changes_loss(self) -> bool:
        """Whether the trained weights differ from those without it."""

    @property
    def shrinks(self) -> bool:
        """Whether the network gets smaller."""


def callbacks_of(row: Row | None, folder: Path, kind: type[Classifier]) -> list[CompressionCallback]:
    """The callbacks of a row, made anew; none for no row."""
    made = [] if row is None else row.build(folder, kind)
    return made if isinstance(made, list) else [made]


def public_callbacks() -> list[str]:
    """Every callback that the package offers, the base class aside."""
    values = {name: getattr(lightning_compress, name) for name in lightning_compress.__all__}
    return [
        name
        for name, value in values.items()
        if inspect.isclass(value) and issubclass(value, CompressionCallback) and value is not CompressionCallback
    ]


def each_case(*names: str, heavy_is_slow: bool = False) -> pytest.MarkDecorator:
    """Parametrise a test over the rows, all or those named; with heavy rows among the slow tests if wanted."""
    rows = [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.heavy and heavy_is_slow else [])
        for case in CASES
        if not names or case.name in names
    ]
    return pytest.mark.parametrize("case", rows)
