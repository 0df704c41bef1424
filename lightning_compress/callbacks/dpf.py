"""Dynamic pruning with feedback: gradients of the pruned network move all weights, so pruned ones can come back.

Lin, Stich, Barba, Dmitriev & Jaggi, "Dynamic model pruning with feedback", ICLR 2020, arXiv:2006.07253. The step is
``w <- w - lr * g(M * w)``: the gradient is taken at the pruned weights and given to all of the dense ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_compress.callbacks.arguments import check_choice, check_fraction
from lightning_compress.callbacks.dynamic import DynamicMaskCallback, counted
from lightning_compress.functional.schedules import Schedule
from lightning_compress.mechanisms.masking import FeedbackWeight, MaskedWeight

DEAD_FILTERS = ("zero_grad", "keep")


class DPFCallback(DynamicMaskCallback):
    """Prune with feedback: a step sees the pruned weights, and its gradient moves all of the dense ones.

    When it acts: the forward pass of each step reads ``M * W``, and the gradient at that point goes to ``W`` as if the
    mask were not there, so that a pruned weight that is missed grows until an update of the masks brings it back. Every
    ``update_interval`` optimizer steps the masks are chosen anew: of all selected weights those of the smallest
    magnitude are pruned. Validation, checkpoints and the module after the fit hold the pruned weights. What it leaves
    alone: names in the ``state_dict``, the optimizer (weight decay and momentum act on the dense weights), and the
    dense weights, which are kept beside in checkpoints.

    Logged are ``compress/<name>/sparsity``, with each update ``churn`` (the share of the masks that changed),
    ``dead_filters``, ``gradient_norm_kept`` and ``gradient_norm_pruned``.

    Args:
        sparsity: Final share of zeros among the weights, in [0, 1).
        schedule: How it grows, exact at its end; or a function ``(progress, start, end)``.
        start: Fraction of optimizer steps at which pruning begins, in [0, 1].
        end: Fraction of its end, for all but "one_shot"; masks go on changing.
        update_interval: Optimizer steps between two updates, at least 1.
        freeze_at: Fraction from which the masks stay, from ``end``, or the ``start`` of "one_shot", to 1. None: they
            never do.
        dead_filters: What a filter learns while it is masked completely: nothing with "zero_grad", all that the rule
            says with "keep". A filter is an output channel of a convolution, or of a linear layer before batch norm.
        guard_checkpoints: Whether a monitored checkpoint may be the best from the final sparsity on only.
        reestimate_batchnorm: Estimate batch norm anew at the end, on 16 training batches.
        reestimated_validation: Validate once more, on the CPU, with batch norm estimated anew, as masks change faster
            than running statistics follow.
        layers: As for ``PruningCallback``. None: all convolutions and linear layers.
        exclude: What is left dense.
        name: As in the base class; default "dpf".

    Raises:
        ValueError: If an argument is out of its range, or two contradict each other.

    Example:
        >>> import lightning.pytorch as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> module, dpf = BoringModel(), DPFCallback(0.5, update_interval=1)
        >>> L.Trainer(max_steps=4, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[dpf],
        ...           enable_model_summary=False, enable_checkpointing=False).fit(module)
        >>> (module.layer.weight == 0).sum().item(), module.layer.weight.numel()
        (32, 64)
    """

    default_name = "dpf"

    def __init__(
        self,
        sparsity: float,
        *,
        schedule: Literal["one_shot", "cubic", "linear", "cosine"] | Schedule = "cubic",
        start: float = 0.0,
        end: float = 0.75,
        update_interval: int = 16,
        freeze_at: float | None = None,
        dead_filters: Literal["zero_grad", "keep"] = "zero_grad",
        guard_checkpoints: bool = True,
        reestimate_batchnorm: bool = False,
        reestimated_validation: bool = False,
        layers: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            sparsity,
            schedule=schedule,
            start=start,
            end=end,
            update_interval=update_interval,
            layers=layers,
            exclude=exclude,
            guard_checkpoints=guard_checkpoints,
            reestimate_batchnorm=reestimate_batchnorm,
            reestimated_validation=reestimated_validation,
            name=name,
        )
        check_choice("dead_filters", dead_filters, DEAD_FILTERS)
        if freeze_at is not None:
            freeze_at = check_fraction("freeze_at", freeze_at)
            argument, at = self.reached_at
            if freeze_at < at:
                raise ValueError(
                    f"freeze_at must be at least {argument}, where the sparsity is reached, got freeze_at={freeze_at} "
                    f"and {argument}={at}"
                )
        self.freeze_at, self.dead_filters = freeze_at, dead_filters

    def masks_stay(self, fraction: float) -> bool:
        """From ``freeze_at`` on."""
        return self.freeze_at is not None and fraction >= self.freeze_at

    def view(self, name: str) -> MaskedWeight:
        """``M * W`` with the whole gradient, but for dead filters."""
        return FeedbackWeight(filters=self._filters.get(name) if self.dead_filters == "zero_grad" else None)

    def updated(self, changed: float, *, more: bool) -> None:
        """As the base; say what filters learn that are masked completely, when there are some."""
        super().updated(changed, more=more)
        if dead := self._dead:
            what = (
                "no gradient reaches what is dead until an update brings a weight of it back"
                if self.dead_filters == "zero_grad"
                else "batch norm that follows multiplies the gradient there by up to 1 / sqrt(eps), and "
                "dead_filters='zero_grad' would take it away"
            )
            self._warn_once(f"{counted(dead)}; {what}", "dead filters")
