"""After training: a checked ONNX file, its metrics, and plain weights.

Importing this needs neither ONNX nor Lightning; what needs them imports them when it is called.
"""

from __future__ import annotations

from lightning_compress.export.errors import EvaluationError, ExportError
from lightning_compress.export.evaluate import evaluate
from lightning_compress.export.onnx import ExportResult, to_onnx
from lightning_compress.export.sample import Sample
from lightning_compress.export.shrunk import load_shrunk
from lightning_compress.export.weights import plain_state_dict

__all__ = [
    "EvaluationError",
    "ExportError",
    "ExportResult",
    "Sample",
    "evaluate",
    "load_shrunk",
    "plain_state_dict",
    "to_onnx",
]
