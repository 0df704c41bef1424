"""What the techniques with dynamic masks share: pruned weights go on learning, and each update may bring them back."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_compress.callbacks.arguments import check_flag
from lightning_compress.callbacks.masks import MaskCallback
from lightning_compress.callbacks.returned import Returned
from lightning_compress.callbacks.validating import SecondValidation, loggable
from lightning_compress.export.evaluate import has_validation
from lightning_compress.functional.masks import Filters, count_dead_filters
from lightning_compress.mechanisms.batchnorm import batch_norms, reestimate_batchnorm_, statistics_kept
from lightning_compress.mechanisms.controller import StepController
from lightning_compress.mechanisms.masking import FeedbackWeight
from lightning_compress.mechanisms.optimizers import loss_scale
from lightning_compress.mechanisms.selection import listing
from lightning_compress.mechanisms.sharding import own_part, sharded_units
from lightning_compress.mechanisms.shrinking import Shrinkage
from lightning_compress.mechanisms.weights import filters_of, sites_of, weights_replaced


def counted(dead: Mapping[str, int]) -> str:
    """In words, how many filters are dead, and of which weights."""
    count = sum(dead.values())
    verb = " is" if count == 1 else "s are"
    return f"{count:,} filter{verb} masked completely, in {listing(list(dead))}"


class DynamicMaskCallback(MaskCallback):
    """Base of the techniques whose pruned weights go on learning.

    Beside what its base logs: ``dead_filters``, the number of filters that are masked completely, with each update;
    ``gradient_norm_kept`` and ``gradient_norm_pruned``, of the dense weights' gradient in the step before it; and, with
    ``reestimated_validation``, the metrics of a second validation under ``reestimated/``.

    Args:
        sparsity: As in the base class.
        reestimated_validation: Whether to validate once more at the end of each epoch in which there was a validation,
            with batch-norm statistics that are estimated anew for the masked network.
        settings: All others of the base class.
    """

    _filters = Returned[Mapping[str, Filters]](MappingProxyType({}))
    """Where the filters of each weight are that has some."""
    _dead = Returned[Mapping[str, int]](MappingProxyType({}))
    """Those that were masked completely at the last update; where weights are sharded, no process can tell alone."""

    def __init__(
        self,
        sparsity: float,
        *,
        reestimated_validation: bool,
        **settings: Any,
    ) -> None:
        super().__init__(sparsity, **settings)
        self.reestimated_validation = check_flag("reestimated_validation", reestimated_validation)
        self._second: SecondValidation | None = None
        self._validated = False

    @property
    def dead_filters_by_weight(self) -> dict[str, int]:
        """How many filters are masked completely now, of the weights where there are any."""
        sharded = self._masks is not None and self._masks.parts is not None
        return dict(self._dead) if sharded else self._count_dead()

    # What the base asks

    def problem_with_shards(self) -> str | None:
        """As the base; a second validation runs on one rank."""
        if self.reestimated_validation:
            return "reestimated_validation=True validates on one rank, with whole weights; leave it out"
        return super().problem_with_shards()

    def suited(self, weights: dict[str, nn.Parameter], pl_module: nn.Module) -> dict[str, nn.Parameter]:
        """All; and note where their filters are: those of linear layers count where batch norm may follow."""
        self._filters = _filters_in(pl_module, weights)
        split = [name for name, filters in self._filters.items() if filters.groups]
        if split and sharded_units(pl_module):
            raise ValueError(
                f"{listing(split)} are of transposed convolutions, whose filters lie across the rows that FSDP2 splits "
                f"over processes, so {type(self).__name__} cannot tell which are dead; leave them out with exclude="
            )
        return weights

    def follow_shrinkage(self, shrinkage: Shrinkage, pl_module: Any) -> None:
        """As the base, with filters in fewer groups."""
        masks = self._require_masks()
        self._filters = _filters_in(pl_module, masks.weights)
        for name, view in masks.views.items():
            if isinstance(view, FeedbackWeight) and view.filters is not None:
                view.filters = self._filters.get(name)
        super().follow_shrinkage(shrinkage, pl_module)

    def updated(self, changed: float, *, more: bool) -> None:
        """As the base; count the filters that are masked completely."""
        super().updated(changed, more=more)
        self._dead = self._count_dead()
        self._to_log["dead_filters"] = float(sum(self._dead.values()))

    def remarks(self) -> list[str]:
        """As the base; and how many filters are dead."""
        remarks = super().remarks()
        if dead := self.dead_filters_by_weight:
            remarks.append(f"{self.name}: {counted(dead)}.")
        return remarks

    # Life cycle

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """As the base; refuse a second validation where there is no first, or where it would show the same."""
        if self.reestimated_validation:
            if not has_validation(pl_module, trainer):
                raise ValueError("reestimated_validation has no effect: there is nothing to validate on")
            if not batch_norms(pl_module):
                raise ValueError("reestimated_validation has no effect: no layer keeps batch-norm statistics")
            what = "the network with statistics estimated anew"
            self._second = SecondValidation(what, "reestimated_validation=False", self._warn_once)
            stack.callback(setattr, self, "_second", None)
        self._validated = False
        super().attach(controller, stack, trainer, pl_module)

    def go_on(self, state: dict[str, Any] | None) -> None:
        """With the filters that are masked completely."""
        super().go_on(state)
        self._dead = self._count_dead()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Measure the gradient in the step before an update, before it is clipped."""
        if self._progress is not None and self._progress.steps_after_this % self.update_interval == 0:
            scale = loss_scale(trainer, optimizer)
            self._to_log.update({name: norm / scale for name, norm in self._gradient_norms().items()})
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """As the base."""
        super().on_validation_end(trainer, pl_module)
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """As the base; validate once more, with other batch-norm statistics."""
        super().on_train_epoch_end(trainer, pl_module)
        second, validated, self._validated = self._second, self._validated, False
        if second is None or not (second.possible and validated):
            return
        masks = self._require_masks()
        with weights_replaced(masks.weights, masks.masked), statistics_kept(pl_module):
            reestimate_batchnorm_(trainer, pl_module)
            second.begin(trainer, pl_module, lambda name, seen: seen)
        found = second.metrics(trainer, pl_module)
        many = trainer.world_size > 1
        for metric, value in found.items():
            pl_module.log(f"compress/{self.name}/reestimated/{loggable(metric)}", value, sync_dist=many, batch_size=1)

    # Private

    def _count_dead(self) -> dict[str, int]:
        masks = self.masks
        known = {name: where for name, where in self._filters.items() if name in masks}  # since the last fit began
        dead = {name: count_dead_filters(own_part(masks[name]), where) for name, where in known.items()}
        if self._masks is not None and self._masks.parts is not None:
            dead = dict(zip(dead, self._masks.parts.totals([*dead.values()]), strict=True))
        return {name: count for name, count in dead.items() if count}

    def _gradient_norms(self) -> dict[str, float | Tensor]:
        """The norms of the gradient over all kept and over all pruned weights."""
        masks = self._require_masks()
        kept, pruned = [], []
        for name, weight in masks.weights.items():
            if weight.grad is not None and masks.views[name].mask is not None:
                gradient = own_part(weight.grad)
                lost = masks.views[name].lost(gradient)
                wide = torch.promote_types(lost.dtype, torch.float32)
                pruned.append(torch.linalg.vector_norm(lost, dtype=wide))
                kept.append(torch.linalg.vector_norm(gradient - lost, dtype=wide))
        if not kept:
            return {}
        device = kept[0].device
        norms = [torch.linalg.vector_norm(torch.stack([own.to(device) for own in part])) for part in (kept, pruned)]
        if masks.parts is not None:
            norms = [*masks.parts.total(torch.stack(norms).square()).sqrt()]
        return {"gradient_norm_kept": norms[0], "gradient_norm_pruned": norms[1]}


def _filters_in(module: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, Filters]:
    """Where the filters of weights are: those of linear layers count where batch norm may follow."""
    sites = sites_of(module)
    widths = {part.num_features for part in module.modules() if isinstance(part, _NormBase)}
    found = {name: filters_of(sites[id(weight)]) for name, weight in weights.items()}
    return {
        name: filters
        for name, filters in found.items()
        if filters is not None and (weights[name].ndim > 2 or len(weights[name]) in widths)
    }
