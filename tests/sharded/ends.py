"""The end of the fit under FSDP2: reports and files are made on rank 0, of whole parameters."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lightning_compress import CompressionReport, DistillationCallback, ExportCallback
from sharded.circumstances import MODULE, NOTHING, Imaging, Uncopied, teacher
from sharded.place import Classifier, Found, Place, left, made
from sharded.scaled import Whole, psgd


def reported(place: Place, circumstance: str = "") -> Found:
    report = CompressionReport(path=place.folder / "report", latency=False)
    trainer, module = _fit(place, circumstance, DistillationCallback(teacher(4)), report)
    found = left(trainer, module, kinds=sorted({type(part).__name__ for part in module.modules()}))
    return {**found, "rows": _rows(report)}


def exported(place: Place, circumstance: str = "") -> Found:
    export = ExportCallback(place.folder / "model.onnx", metric="val_loss", tolerance=1e-4)
    report = CompressionReport(path=place.folder / "report", latency=False)
    trainer, module = _fit(place, circumstance, export, report)
    return {**left(trainer, module, failure=export.failure), "rows": _rows(report), **_file(export)}


def rounded(place: Place) -> Found:
    """Scales of gradients that are scaled, in a file of 4 bits."""
    export = ExportCallback(place.folder / "model.onnx", precision="int4", metric="val_loss", fp32_comparison=False)
    trainer, module = _fit(place, "", psgd(), export, kind=Classifier)
    return {**left(trainer, module, failure=export.failure), **_file(export)}


def ended(place: Place) -> Found:
    """A fit that is resumed at its end runs no step, so the file's sample is replayed."""
    first, _ = _fit(place, "")
    path = place.folder / "ended.ckpt"
    first.save_checkpoint(path)
    module, export = made(Imaging), ExportCallback(place.folder / "model.onnx")
    report = CompressionReport(path=place.folder / "report", latency=False)
    trainer = place.trainer(export, report)
    trainer.fit(module, datamodule=Whole(place), ckpt_path=path)
    return {**left(trainer, module, failure=export.failure), "rows": _rows(report), **_file(export)}


def failing(place: Place) -> Found:
    """A module that cannot be copied."""
    module = made(Imaging)
    module.lock = Uncopied()
    place.fit(module, CompressionReport(path=place.folder / "report", latency=False))
    return {}


def absent(place: Place) -> Found:
    """A rank that another callback ends before the end of the fit, and that lives on."""

    class Ending(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            raise KeyError("mine")

    strategy = ModelParallelStrategy(place.ranks, 1, process_group_backend="gloo", timeout=timedelta(seconds=5))
    try:
        place.fit(made(), psgd(), *([Ending()] if place.rank == 1 else []), strategy=strategy)
    except KeyError:
        time.sleep(8.0)
        raise
    return {}


def full_disk(place: Place) -> Found:
    class FullDisk(ExportCallback):
        def export(self, trainer: Any, pl_module: Any) -> None:
            if trainer.is_global_zero:
                raise OSError("no room")

    place.fit(made(Imaging), FullDisk(place.folder / "model.onnx"))
    return {}


def _fit(place: Place, circumstance: str, *callbacks: Any, kind: type[Classifier] = Imaging) -> tuple[Any, nn.Module]:
    module = made(kind, **MODULE.get(circumstance, NOTHING))
    trainer = place.trainer(*callbacks)
    trainer.fit(module, datamodule=Whole(place))
    return trainer, module


def _rows(report: CompressionReport) -> dict[str, Any]:
    rows = () if report.result is None else report.result.rows
    return {
        row.name: {
            "parameters": row.parameters,
            "nonzeros": row.nonzeros,
            "macs": row.macs,
            "bytes": row.bytes,
            "metrics": dict(row.metrics),
        }
        for row in rows
    }


def _file(export: ExportCallback) -> dict[str, Any]:
    if export.result is None:
        return {}
    return {"bytes": export.result.bytes, "in_module": export.module_metrics, "in_file": export.file_metrics}
