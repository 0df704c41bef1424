"""Several callbacks at once under FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from lightning_compress import (
    CompressionReport,
    DCILCallback,
    DistillationCallback,
    DPFCallback,
    ExportCallback,
    PruningCallback,
    PSGDCallback,
    QATCallback,
)
from sharded.circumstances import Imaging, teacher
from sharded.ends import _file, _rows
from sharded.place import Found, Place, left, made
from sharded.scaled import Whole

ALL_THE_TIME: dict[str, Any] = {"end": 1.0, "update_interval": 1}
MAKERS: dict[str, Callable[[Place], Any]] = {
    "kd": lambda place: DistillationCallback(teacher(), temperature=2.0, task_weight=0.5, kd_weight=0.5),
    "dpf": lambda place: DPFCallback(0.8, **ALL_THE_TIME),
    "pruning": lambda place: PruningCallback(0.8, **ALL_THE_TIME),
    "dcil": lambda place: DCILCallback(0.8, dense_path="shared", kl_start=0.3, **ALL_THE_TIME),
    "psgd": lambda place: PSGDCallback(4, mean_factor=1.5),
    "qat": lambda place: QATCallback(weight_bits=4, activation_bits=None, step_size="observed"),
    "int4": lambda place: ExportCallback(
        place.folder / "model.onnx", precision="int4", metric="val_loss", fp32_comparison=False
    ),
    "fp32": lambda place: ExportCallback(place.folder / "model.onnx", metric="val_loss"),
    "report": lambda place: CompressionReport(path=place.folder / "report", latency=False),
}


def fitted(place: Place, which: str, how: str = "") -> Found:
    """With parameters that are kept after the forward pass, if wanted, or under DDP."""
    callbacks = [MAKERS[name](place) for name in which.split("+")]
    module = made(Imaging, reshard=how != "keeping")
    other: dict[str, Any] = {"strategy": DDPStrategy(process_group_backend="gloo")} if how == "ddp" else {}
    trainer = place.trainer(*callbacks, **other)
    trainer.fit(module, datamodule=Whole(place))
    found = left(trainer, module)
    for callback in callbacks:
        if isinstance(callback, CompressionReport):
            found["rows"] = _rows(callback)
        if isinstance(callback, ExportCallback):
            found |= {**_file(callback), "failure": callback.failure}
    return found
