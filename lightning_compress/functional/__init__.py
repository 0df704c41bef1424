"""Pure functions, tensors in and tensors out: the mathematics of every technique, usable in any training loop."""

from __future__ import annotations

from lightning_compress.functional.attention import (
    attention_map,
    attention_transfer_loss,
    attention_transfer_weight,
    gradient_transfer_loss,
)
from lightning_compress.functional.factors import factor_transfer_loss, reconstruction_loss
from lightning_compress.functional.masks import (
    churn,
    erk_sparsities,
    fewest_kept,
    l2_score,
    layer_zeros,
    magnitude_mask,
    magnitude_score,
    n_m_mask,
    n_m_masks,
    random_score,
    smallest_masks,
    sparsity_of,
    taylor_score,
)
from lightning_compress.functional.schedules import (
    Schedule,
    constant_schedule,
    cosine_schedule,
    cubic_schedule,
    iterative_schedule,
    linear_schedule,
)
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
    "Schedule",
    "attention_map",
    "attention_transfer_loss",
    "attention_transfer_weight",
    "bernoulli_distillation_loss",
    "churn",
    "class_dimension",
    "constant_schedule",
    "cosine_schedule",
    "cubic_schedule",
    "decoupled_distillation_loss",
    "dist_loss",
    "distillation_loss",
    "erk_sparsities",
    "factor_transfer_loss",
    "fewest_kept",
    "gradient_transfer_loss",
    "hard_distillation_loss",
    "iterative_schedule",
    "l2_score",
    "layer_zeros",
    "linear_schedule",
    "magnitude_mask",
    "magnitude_score",
    "n_m_mask",
    "n_m_masks",
    "random_score",
    "reconstruction_loss",
    "regression_distillation_loss",
    "smallest_masks",
    "sparsity_of",
    "taylor_score",
    "teacher_agreement",
]
