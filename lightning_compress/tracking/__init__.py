"""What goes to the user's loggers, and how each kind takes it: Weights & Biases, TensorBoard, CSV files, others.

Nothing here imports a logger or its service: what the user's Trainer has is used, and what it lacks is left out. Only
:mod:`~lightning_compress.tracking.pareto_run`, which belongs to no Trainer, begins a run of its own.
"""

from __future__ import annotations

from lightning_compress.tracking.exported import Exported, checkpoint_of
from lightning_compress.tracking.history import LayerHistory
from lightning_compress.tracking.settings import goals, recipe_of, run_settings
from lightning_compress.tracking.sinks import Sink, Table, sink_of
from lightning_compress.tracking.tracker import Tracker

__all__ = [
    "Exported",
    "LayerHistory",
    "Sink",
    "Table",
    "Tracker",
    "checkpoint_of",
    "goals",
    "recipe_of",
    "run_settings",
    "sink_of",
]
