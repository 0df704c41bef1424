"""Pure functions, tensors in and tensors out: the mathematics of every technique, usable in any training loop."""

from __future__ import annotations

from lightning_compress.functional.attention import (
    attention_map,
    attention_transfer_loss,
    attention_transfer_weight,
    gradient_transfer_loss,
)
from lightning_compress.functional.factors import factor_transfer_loss, reconstruction_loss
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
    "attention_map",
    "attention_transfer_loss",
    "attention_transfer_weight",
    "bernoulli_distillation_loss",
    "class_dimension",
    "decoupled_distillation_loss",
    "dist_loss",
    "distillation_loss",
    "factor_transfer_loss",
    "gradient_transfer_loss",
    "hard_distillation_loss",
    "reconstruction_loss",
    "regression_distillation_loss",
    "teacher_agreement",
]
