"""One row for each public callback: how to build it, on which modules, and what it refuses.

The contract in ``tests/contract`` runs every row. A new technique adds a row here and nothing there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
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
        refuses: What it does not support ("manual", "mixin", "compiled", "compiled module", "accumulation",
            "scaler", "ranks", "resume"), each with a pattern of the error that says so.
        pretrains: Whether it learns from the batches before the training, so that their size matters.
        keeps_dense: Whether a second fit goes on from weights that the module does not hold, but the callback does.
        quantises: Whether validation outside of a fit shows a quantised network, which needs training data.
        shrinks: Whether the network gets smaller, so that its weights load into its class with ``load_shrunk`` only.
        heavy: Whether the end of fit takes a second or more: then few of the fast tests try it.
    """

    name: str
    build: Callable[[Path, type[Classifier]], CompressionCallback]
    modules: tuple[type[Classifier], ...] = AUTOMATIC
    changes_loss: bool = False
    refuses: Mapping[str, str] = field(default_factory=dict)
    pretrains: bool = False
    keeps_dense: bool = False
    quantises: bool = False
    shrinks: bool = False
    heavy: bool = False

    def expects(self, capability: str) -> AbstractContextManager[Any]:
        """The context in which a capability is used: nothing special, or an error that must come."""
        if capability not in self.refuses:
            return nullcontext()
        return pytest.raises(Exception, match=self.refuses[capability])


def _distillation(folder: Path, kind: type[Classifier]) -> CompressionCallback:
    return DistillationCallback(teacher_for(kind), temperature=2.0, task_weight=0.5, kd_weight=0.5)


def _attention(folder: Path, kind: type[Classifier]) -> CompressionCallback:
    return AttentionTransferCallback(teacher_for(kind), strength=0.02)


def _factors(folder: Path, kind: type[Classifier]) -> CompressionCallback:
    return FactorTransferCallback(teacher_for(kind), weight=3.0, pretrain_epochs=2)


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
    Case("DistillationCallback", _distillation, changes_loss=True, refuses={"manual": "CompressionMixin"}),
    Case("AttentionTransferCallback", _attention, changes_loss=True, refuses={"manual": "CompressionMixin"}),
    Case("FactorTransferCallback", _factors, changes_loss=True, pretrains=True, refuses={"manual": "CompressionMixin"}),
    Case("PSGDCallback", _psgd, changes_loss=True),
    Case("PTQCallback", _ptq, quantises=True),
    Case("QATCallback", _qat, changes_loss=True, quantises=True, refuses={"manual": "CompressionMixin"}),
    Case("PruningCallback", _pruning, changes_loss=True, keeps_dense=True, refuses={"manual": "CompressionMixin"}),
    Case("DPFCallback", _dpf, changes_loss=True, keeps_dense=True, refuses={"manual": "CompressionMixin"}),
    Case(
        "DCILCallback",
        _dcil,
        changes_loss=True,
        keeps_dense=True,
        refuses={"manual": "CompressionMixin", "mixin": "runs the step twice"},
    ),
    Case(
        "StructuredPruningCallback",
        _structured,
        changes_loss=True,
        shrinks=True,
        refuses={
            "manual": "optimises manually",
            "mixin": "optimises manually",
            "ranks": "use strategy='ddp'",
            "compiled module": "compiled as a whole",
        },
    ),
    Case("ExportCallback", _export, heavy=True),
    Case("CompressionReport", _report),
)


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
