"""Pure functions, tensors in and tensors out: the mathematics of every technique, usable in any training loop."""

from __future__ import annotations

from lightning_compress.functional.soft_targets import (
    bernoulli_distillation_loss,
    class_dimension,
    decoupled_distillation_loss,
    dist_loss,
    distillation_loss,
    hard_distillation_loss,
    regression_distillation_loss,
    teacher_agreement,
)

__all__ = [
    "bernoulli_distillation_loss",
    "class_dimension",
    "decoupled_distillation_loss",
    "dist_loss",
    "distillation_loss",
    "hard_distillation_loss",
    "regression_distillation_loss",
    "teacher_agreement",
]
