"""What the techniques that mask weights by a schedule share: when masks change, what is logged, which files are best.

A technique says which masks it wants at a sparsity (:meth:`MaskCallback.new_masks`; by default those of the smallest
magnitudes of all weights), and from when on they stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_compress import _compat
from lightning_compress.callbacks.arguments import (
    check_choice,
    check_flag,
    check_fraction,
    check_whole,
    shown,
    takes,
    tell_without_effect,
)
from lightning_compress.callbacks.intents import Intent
from lightning_compress.callbacks.masked import MaskedWeightsCallback
from lightning_compress.callbacks.returned import Returned
from lightning_compress.functional import schedules
from lightning_compress.functional.masks import layer_zeros, smallest_masks
from lightning_compress.functional.schedules import Schedule
from lightning_compress.mechanisms.batchnorm import batch_norms, reestimate_all_
from lightning_compress.mechanisms.checkpoints import Compress
from lightning_compress.mechanisms.controller import StepController
from lightning_compress.mechanisms.progress import Progress
from lightning_compress.mechanisms.selection import listing
from lightning_compress.mechanisms.shrinking import Shrinkage
from lightning_compress.mechanisms.states import Sometimes
from lightning_compress.mechanisms.wrapping import copied_plainly, shadowed
from lightning_compress.report.table import Picture
from lightning_compress.tracking import LayerHistory
from lightning_compress.tracking.tracker import is_one_metric

SCHEDULES: dict[str, Schedule] = {
    "one_shot": schedules.constant_schedule,
    "linear": schedules.linear_schedule,
    "cubic": schedules.cubic_schedule,
    "cosine": schedules.cosine_schedule,
}


class MaskCallback(MaskedWeightsCallback):
    """Base of the techniques that mask weights by a schedule.

    Techniques repeat the defaults that there are here.

    Args:
        sparsity: The final share of zeros among the selected weights, in [0, 1).
        schedule: "one_shot", "linear", "cubic", "cosine", or a function ``(progress, start, end)``.
        start: Fraction of the training at which masking begins, in [0, 1].
        end: Fraction at which the sparsity is reached, from ``start`` to 1; without effect for "one_shot".
        update_interval: Optimizer steps between two updates of the masks.
        layers: Selectors of the layers whose weights are masked; None for ``default_layers``.
        exclude: Selectors of layers that are left dense.
        guard_checkpoints: Whether a checkpoint that ``ModelCheckpoint`` monitors may be the best only from the final
            sparsity on, so that "best" is as sparse as its name says; ``save_top_k=-1`` keeps earlier ones too.
        reestimate_batchnorm: Whether to estimate batch-norm statistics anew at the end, on 16 training batches.
        name: As in the base class.

    Raises:
        ValueError: If an argument is out of its range.
    """

    holds: ClassVar[Mapping[str, Any]] = {"begun": bool, "finished": bool, "early": Sometimes([str])}

    _begun = Returned(False)
    _finished = Returned(False)
    """Whether the final sparsity was reached where it was due."""

    def __init__(
        self,
        sparsity: float,
        *,
        schedule: str | Schedule = "cubic",
        start: float,
        end: float = 0.75,
        update_interval: int,
        layers: Sequence[str] | None,
        exclude: Sequence[str] | None,
        guard_checkpoints: bool,
        reestimate_batchnorm: bool,
        name: str | None,
    ) -> None:
        super().__init__(layers=layers, exclude=exclude, name=name)
        self.sparsity = check_fraction("sparsity", sparsity, below_one=True)
        self.start, self.end = check_fraction("start", start), check_fraction("end", end)
        self.update_interval = check_whole("update_interval", update_interval, at_least=1)
        self.guard_checkpoints = check_flag("guard_checkpoints", guard_checkpoints)
        self.reestimate_batchnorm = check_flag("reestimate_batchnorm", reestimate_batchnorm)
        if not callable(schedule):
            check_choice("schedule", schedule, tuple(self.schedules()))
        elif not takes(schedule, 3):
            raise ValueError(f"schedule must be a function of (progress, start, end), got {shown(schedule)}")
        else:
            for progress in (0.0, 1.0):
                _value_of(schedule, progress, self.sparsity, f"at progress {progress:g}")
        self.schedule = schedule
        self._check_times()
        self._progress: Progress | None = None
        self._steps: int | None = None  # optimizer steps at the last update; None before training
        self._logged: float | None = None
        self._to_log: dict[str, float | Tensor] = {}  # of an update, at the end of the batch
        self._at_target = False  # whether what is measured is of the final sparsity
        self._denser: dict[str, Any] = {}  # metrics that were known when the final sparsity was reached
        self._early: list[Any] = []  # callbacks that hold checkpoints of before
        self._were_early: list[str] = []  # their keys, in the checkpoint that is resumed
        self._history = LayerHistory([])  # of this fit

    # For techniques

    def problem_with_shards(self) -> str | None:
        """As the base; statistics of batch norm are estimated with whole weights."""
        if self.reestimate_batchnorm:
            return "reestimate_batchnorm=True needs whole weights; leave it out"
        return super().problem_with_shards()

    def schedules(self) -> dict[str, Schedule]:
        """The schedules by name."""
        return SCHEDULES

    def masks_stay(self, fraction: float) -> bool:
        """Whether the masks change no more at a fraction of the training, but for reaching the final sparsity."""
        return False

    @property
    def moves_until_end(self) -> bool:
        """Whether the masks change until the end of the schedule, and no longer, though the sparsity does not."""
        return False

    @property
    def at_once(self) -> bool:
        """Whether the final sparsity is reached at ``start``, so that ``end`` says nothing."""
        return self.schedule == "one_shot" and not self.moves_until_end

    @property
    def reached_at(self) -> tuple[str, float]:
        """The argument that says where the final sparsity is reached, and its value."""
        return ("start", self.start) if self.at_once else ("end", self.end)

    @property
    def floored(self) -> bool:
        """Whether each layer keeps at least 1% of its weights, and one."""
        return True

    def zeros_at(self, sparsity: float) -> int:
        """How many weights are masked at a sparsity."""
        return layer_zeros([self._require_masks().total], [sparsity])[0]

    def new_masks(self, sparsity: float) -> list[Tensor] | None:
        """The masks of a sparsity, never below the one there is; None if they stay as they are."""
        masks = self._require_masks()
        zeros = max(self.zeros_at(sparsity), masks.zeros)
        return smallest_masks(masks.values(), zeros, limits=masks.limits, parts=masks.parts) if zeros else None

    def updated(self, changed: float, *, more: bool) -> None:
        """Called after an update of the masks, with the share of entries that changed, and whether training goes on."""
        if self.floored and self._has_target() and (held := self._require_masks().at_floor()):
            self._warn_once(
                f"held at their floor of 1% of their weights, or one: {listing(held)}; the rest was taken elsewhere"
            )

    # What users read

    def intent(self, trainer: Any, pl_module: Any) -> Intent:
        """As the base; and how sparse they will be, and when."""
        schedule = getattr(self.schedule, "__name__", str(self.schedule))
        aims = {"sparsity": self.sparsity, "schedule": schedule, "start": self.start}
        aims |= {} if self.at_once else {"end": self.end}
        return replace(super().intent(trainer, pl_module), aims=aims)

    def foresee(self, trainer: Any, pl_module: Any) -> None:
        """Leave the weights as sparse as they will be; where no scores are known yet, as they are."""
        if (masks := self.new_masks(self.sparsity)) is not None:
            self._require_masks().replace(masks)
        with torch.no_grad():
            for name, weight in self._require_masks().weights.items():
                weight.copy_(self._require_masks().masked(name, weight))

    def remarks(self) -> list[str]:
        """What was masked, and which layers the floor held."""
        if self._masks is None:
            return []
        layers = len(self._masks.weights)
        remarks = [
            f"{self.name}: {self._masks.zeros:,} of {self._masks.total:,} weights in {layers} "
            f"tensor{'' if layers == 1 else 's'} are masked ({self.reached:.2%}, asked {self.sparsity:.2%})."
        ]
        if self.floored and (held := self._masks.at_floor()):
            remarks.append(
                f"{self.name}: held at their floor of 1% of their weights, or one, so that no layer is cut off: "
                f"{listing(held, None)}. What they would have lost beyond it was taken elsewhere."
            )
        return remarks

    # Life cycle

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """As the base; refuse what cannot be, and keep checkpoints that are not sparse yet from being best."""
        if self.reestimate_batchnorm and not batch_norms(pl_module):
            raise ValueError("reestimate_batchnorm has no effect: no layer keeps batch-norm statistics")
        self._steps, self._logged = None, None
        self._to_log = {}
        stack.callback(setattr, self, "_progress", None)
        super().attach(controller, stack, trainer, pl_module)
        self._history = LayerHistory(list(self._require_masks().weights))
        self._check_target()
        self._forget_best(trainer)
        self._denser, self._early = {}, [own for own in self._guarded(trainer) if own.state_key in self._were_early]
        stack.callback(self._forget_early)
        for callback in self._guarded(trainer):
            stack.enter_context(copied_plainly(callback))
            stack.enter_context(shadowed(callback, "check_monitor_top_k", partial(self._guarding, callback)))

    def forget(self) -> None:
        """With the place in the schedule."""
        super().forget()
        self._begun = self._finished = False

    def follow_shrinkage(self, shrinkage: Shrinkage, pl_module: Any) -> None:
        """As the base; the final sparsity is met anew where it was met before."""
        super().follow_shrinkage(shrinkage, pl_module)
        masks = self._require_masks()
        if masks.zeros > self.zeros_at(self.sparsity):  # what has gone was denser than what stays
            last = masks.current()
            masks.replace([torch.ones_like(mask) for mask in last])
            masks.replace(self.new_masks(self.sparsity) or last)
        self._finished = self._finished and self._has_target()
        self._at_target = self._has_target()

    def go_on(self, state: dict[str, Any] | None) -> None:
        """With the place in the schedule."""
        super().go_on(state)
        self._begun, self._finished, self._were_early = False, False, []
        if state is not None:
            self._begun, self._were_early = bool(state["begun"]), list(state.get("early", ()))
            # another target than then is still to be reached
            self._finished = bool(state["finished"]) and state["arguments"].get("sparsity") == self.sparsity

    def go_on_late(self) -> None:
        """As the base; refuse a final sparsity below the one that was reached."""
        super().go_on_late()
        self._check_target()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find out how long the training is; mask at once if the schedule begins here."""
        self._progress = Progress(trainer, pl_module)
        self._steps = self._progress.steps_over
        self._at_target = self._has_target()
        self._forget_best(trainer)  # a strategy with shards has loaded them since the start of the fit
        if not self._begun:
            self._update()
        loses = self._guarded(trainer) and not any(map(_compat.keeps_last, trainer.callbacks))
        if loses and not self._has_target():
            self._warn_once(
                "no checkpoint is kept before the final sparsity, so that the best one has it; to be able to resume "
                "before, add ModelCheckpoint(save_last=True), or give guard_checkpoints=False"
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an optimizer step, update the masks if it is time; log the sparsity."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._progress is None:
            return
        self._follow_step()
        if self._logged != self.reached or batch_idx == 0:  # what was logged stands until the end of the epoch
            self._logged = self.reached
            self.log_quantity("sparsity", self._logged, batch_size=1)
        for quantity, value in self._to_log.items():
            self.log_quantity(quantity, value, batch_size=1)
        self._to_log = {}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log sparsity and norm of each weight, measured from the masked tensors."""
        super().on_train_epoch_end(trainer, pl_module)
        masks = self._require_masks()
        if getattr(trainer, "barebones", False):
            return
        progress = self._require_progress()
        self._history.show(self.tracker(trainer), self.name, progress.steps, progress.fraction)
        many = trainer.world_size > 1  # the same on all ranks; Lightning wants to be told
        for (name, weight), own in zip(masks.weights.items(), masks.values(), strict=True):
            masked = masks.masked(name, own)
            zeros, norm = (masked == 0).sum(), torch.linalg.vector_norm(masked.float())
            if masks.parts is not None:
                zeros, square = masks.parts.total(torch.stack([zeros, norm.square()])).unbind()
                norm = square.sqrt()
            share = (zeros / weight.numel()).float()
            pl_module.log(f"compress/{self.name}/sparsity/{name}", share, sync_dist=many, batch_size=1)
            pl_module.log(f"compress/{self.name}/norm/{name}", norm, sync_dist=many, batch_size=1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Reach the final sparsity if the training was shorter than foreseen; say so if it was stopped."""
        if self._progress is None:
            return
        if not self._has_target():
            self._end_early(trainer, self._progress)
        self._history.show(self.tracker(trainer), self.name, self._progress.steps)

    def pictures(self) -> list[Picture]:
        """Sparsity of each layer over the fit, and how much its mask changed."""
        return self._history.pictures(self.name)

    def _end_early(self, trainer: Any, progress: Progress) -> None:
        before, fraction, (argument, at) = self.reached, progress.fraction, self.reached_at
        if trainer.should_stop:
            kept = ", and no monitored checkpoint was kept as the best" if self._guarded(trainer) else ""
            self.failure = (
                f"training stopped at {fraction:.0%} of its length, before {argument}={at}: the sparsity is "
                f"{before:.4f}, not {self.sparsity}{kept}"
            )
            self._warn_once(self.failure)
            return
        self._finish(more=False)
        self._warn_once(
            f"the training ended at {fraction:.0%} of the length that Lightning had foreseen, so the sparsity went "
            f"from {before:.4f} to {self.reached:.4f} at its end, of {self.sparsity}, with no training after it"
        )

    def bake(self, trainer: Any, pl_module: Any) -> None:
        """As the base; say so where nothing was trained."""
        if self._steps is None:
            self._warn_once("no training step was run, so the masks are as they were")
        super().bake(trainer, pl_module)

    def estimate_statistics(self, trainer: Any, pl_module: Any) -> None:
        """Batch-norm statistics of the masked network."""
        if self.reestimate_batchnorm:
            reestimate_all_(trainer, pl_module, self._warn_once)

    def extra_state(self) -> dict[str, Any]:
        """The masks, and the place in the schedule, as they are when the last step is over; ask on all ranks.

        Where somebody saves before it is our turn after a step, masks that are due are made now.
        """
        self._follow_step()
        early = [own.state_key for own in self._early]
        return {**super().extra_state(), "begun": self._begun, "finished": self._finished, "early": early}

    # Private

    def _check_times(self) -> None:
        """Refuse an end before the start; warn of one that nothing waits for."""
        if self.at_once:
            if self.end != self.start:
                because = f"schedule='one_shot', which prunes all at start={self.start}"
                tell_without_effect(self, MaskCallback, because, end=self.end)
        elif self.start > self.end:
            raise ValueError(f"start must be at most end, got start={self.start} and end={self.end}")
        elif self.start == self.end and self.schedule != "one_shot":
            because = f"start={self.start} and end={self.end}, all at once"
            tell_without_effect(self, MaskCallback, because, schedule=self.schedule)

    def _follow_step(self) -> None:
        """Update the masks after an optimizer step, once."""
        if self._progress is None or self._progress.steps_over == self._steps:
            return
        self._steps = self._progress.steps_over
        self._drop()  # with manual optimisation the step's views are there until our turn
        self._update()

    def _compressing(self, checkpoint: dict[str, Any]) -> Compress:
        """As the base; a file of weights alone asks for no state before."""
        self._follow_step()
        return super()._compressing(checkpoint)

    def _update(self) -> None:
        """Bring the masks to where the schedule is, if it is time."""
        progress = self._require_progress()
        fraction = progress.fraction
        if fraction < self.start:
            return
        due = not self._begun or (progress.steps % self.update_interval == 0 and fraction < 1)  # for another step
        if fraction >= self.reached_at[1] and not self._finished:
            self._finish()
        elif due and not self.masks_stay(fraction):
            self._take(self.new_masks(self.sparsity if self._finished else self._scheduled(fraction)))
        self._begun = True

    def _finish(self, *, more: bool = True) -> None:
        """Reach the final sparsity exactly, whatever the schedule said."""
        self._take(self.new_masks(self.sparsity), more=more)
        self._finished = self._has_target()  # else nothing is known of the weights yet, and the next step tries again

    def _has_target(self) -> bool:
        """Whether the final sparsity is reached, be it before ``end``."""
        return self._require_masks().zeros >= self.zeros_at(self.sparsity)

    def _scheduled(self, fraction: float) -> float:
        """The sparsity at a fraction of the training between start and end."""
        schedule = self.schedule if callable(self.schedule) else self.schedules()[self.schedule]
        where = f"at {fraction:.1%} of training"
        return _value_of(schedule, (fraction - self.start) / (self.end - self.start), self.sparsity, where)

    def _take(self, masks: Sequence[Tensor] | None, *, more: bool = True) -> None:
        if masks is not None:
            own = self._require_masks()
            changed = own.replace(masks)
            step = self._require_progress().steps
            self._history.add(step, own.shares(own.counts), own.shares(own.changed))
            self._to_log["churn"] = changed
            if not self._at_target and self._has_target():
                self._at_target = True
                self._denser = dict(self._trainer.callback_metrics)
                self.tracker(self._trainer).forget(self._denser)
                if more:
                    self._wait_anew(self._trainer, "the final sparsity")
            self.updated(changed, more=more)

    def _guarded(self, trainer: Any) -> list[Any]:
        """The callbacks whose best checkpoint shall have the final sparsity."""
        return [own for own in trainer.callbacks if self.guard_checkpoints and _compat.keeps_best(own)]

    def _forget_best(self, trainer: Any) -> None:
        """Compare nothing with what was best before the final sparsity."""
        forgotten = [] if self._has_target() else [_compat.forget_best(callback) for callback in self._guarded(trainer)]
        if any(forgotten):
            self._warn_once(
                "the best checkpoints so far have not the final sparsity, so they are not compared with what follows; "
                "their files stay"
            )

    def _forget_early(self) -> None:
        """Where no checkpoint came after the final sparsity, none is the best."""
        if self._early:
            self._warn_once("no checkpoint was saved at the final sparsity, so none is the best; those before stay")
        for callback in self._early:
            _compat.forget_best(callback)
        self._early = []

    def _guarding(self, callback: Any, original: Callable[..., bool]) -> Callable[..., bool]:
        """Let no checkpoint before the final sparsity be the best; to resume from, the last is kept, or all are."""

        def check_monitor_top_k(trainer: Any, *args: Any, **kwargs: Any) -> bool:
            measured = trainer.callback_metrics.get(callback.monitor)
            if self._has_target() and not is_one_metric(measured, self._denser.get(callback.monitor)):
                if callback in self._early:
                    _compat.forget_best(callback)
                    self._early.remove(callback)
            elif _compat.keeps_all(callback):
                if callback not in self._early:
                    self._early.append(callback)
            else:
                _compat.let_last_be_saved(callback, trainer)
                return False
            return original(trainer, *args, **kwargs)

        return check_monitor_top_k

    def _check_target(self) -> None:
        """Refuse a final sparsity that cannot be, or that lies below what was reached."""
        masks, zeros = self._require_masks(), self.zeros_at(self.sparsity)
        if zeros == 0:
            message = f"sparsity={self.sparsity} masks none of the {masks.total:,} selected weights"
            if self.sparsity > 0:
                raise ValueError(message)
            self._warn_once(message)
        if zeros > sum(masks.limits):
            raise ValueError(
                f"sparsity={self.sparsity} asks for {zeros:,} zeros among {masks.total:,} weights, and as each tensor "
                f"keeps at least 1% of its weights and one, {sum(masks.limits):,} are the most: "
                f"{sum(masks.limits) / masks.total:.6f}"
            )
        if masks.zeros > zeros:
            raise ValueError(
                f"sparsity={self.sparsity} is below the {masks.sparsity:.6f} that was reached before: a sparsity can "
                "rise, not fall; ask for as much or more, or begin a new training"
            )

    def _require_progress(self) -> Progress:
        if self._progress is None:
            raise RuntimeError(f"{type(self).__name__} is only active during a fit")
        return self._progress


def _value_of(schedule: Schedule, progress: float, sparsity: float, where: str) -> float:
    """The sparsity that a schedule gives; an error that names it where that is none."""
    try:
        value = schedule(progress, 0.0, sparsity)
    except Exception as error:  # the user's function, or something else that can be called
        raise ValueError(f"schedule {shown(schedule)} failed {where}: {type(error).__name__}: {error}") from error
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # as tensors of many entries raise
        number = math.nan
    if not 0.0 <= number <= sparsity + 1e-9:  # NaN included
        raise ValueError(
            f"schedule {shown(schedule)} must give a sparsity in [0, {sparsity}], gave {shown(value)} {where}"
        )
    return min(number, sparsity)
