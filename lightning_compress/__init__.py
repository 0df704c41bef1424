"""Compress an untouched PyTorch Lightning project: attach a technique as a callback, get a smaller, measured model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lightning_compress import export, functional, modules
    from lightning_compress.callbacks.attention import AttentionTransferCallback
    from lightning_compress.callbacks.base import CompressionCallback
    from lightning_compress.callbacks.dcil import DCILCallback
    from lightning_compress.callbacks.distillation import DistillationCallback
    from lightning_compress.callbacks.dpf import DPFCallback
    from lightning_compress.callbacks.export import ExportCallback
    from lightning_compress.callbacks.factors import FactorTransferCallback
    from lightning_compress.callbacks.pruning import PruningCallback
    from lightning_compress.callbacks.psgd import PSGDCallback
    from lightning_compress.callbacks.ptq import PTQCallback
    from lightning_compress.callbacks.qat import QATCallback
    from lightning_compress.callbacks.report import CompressionReport
    from lightning_compress.callbacks.structured import StructuredPruningCallback
    from lightning_compress.mechanisms.loading import teacher_from_checkpoint
    from lightning_compress.mixins import CompressionMixin

# Where each public name lives. Resolved on first use (PEP 562), so that importing the package imports nothing heavy.
_HOMES = {
    "AttentionTransferCallback": "lightning_compress.callbacks.attention",
    "CompressionCallback": "lightning_compress.callbacks.base",
    "CompressionMixin": "lightning_compress.mixins",
    "CompressionReport": "lightning_compress.callbacks.report",
    "DCILCallback": "lightning_compress.callbacks.dcil",
    "DPFCallback": "lightning_compress.callbacks.dpf",
    "DistillationCallback": "lightning_compress.callbacks.distillation",
    "ExportCallback": "lightning_compress.callbacks.export",
    "FactorTransferCallback": "lightning_compress.callbacks.factors",
    "PSGDCallback": "lightning_compress.callbacks.psgd",
    "PTQCallback": "lightning_compress.callbacks.ptq",
    "QATCallback": "lightning_compress.callbacks.qat",
    "PruningCallback": "lightning_compress.callbacks.pruning",
    "StructuredPruningCallback": "lightning_compress.callbacks.structured",
    "teacher_from_checkpoint": "lightning_compress.mechanisms.loading",
    "export": "",
    "functional": "",
    "modules": "",
}

__all__ = [
    "AttentionTransferCallback",
    "CompressionCallback",
    "CompressionMixin",
    "CompressionReport",
    "DCILCallback",
    "DPFCallback",
    "DistillationCallback",
    "ExportCallback",
    "FactorTransferCallback",
    "PSGDCallback",
    "PTQCallback",
    "PruningCallback",
    "QATCallback",
    "StructuredPruningCallback",
    "__version__",
    "export",
    "functional",
    "modules",
    "teacher_from_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lightning_compress' has no attribute '{name}'")
    home = _HOMES[name]
    value = getattr(import_module(home), name) if home else import_module(f"lightning_compress.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
