"""Quantisation-aware training: the network learns while it computes on the grids that its file will have.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018,
arXiv:1712.05877. Learned steps: Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress import _compat
from lightning_compress.callbacks.arguments import (
    absolute_path,
    check_choice,
    check_fraction,
    check_number,
    check_positive,
    edge_bits_of,
    is_auto,
    shown,
    tell_without_effect,
)
from lightning_compress.callbacks.base import CompressionCallback, log
from lightning_compress.callbacks.calibrating import bits_of_layers, selection
from lightning_compress.callbacks.intents import Intent
from lightning_compress.callbacks.masked import MaskedWeightsCallback
from lightning_compress.callbacks.quantised import QuantisedCallback
from lightning_compress.callbacks.ranks import averaging, together
from lightning_compress.callbacks.returned import Returned
from lightning_compress.export.scales import given_steps, grids_of_ranges, inside, trained_ranges
from lightning_compress.export.weights import read_checkpoint
from lightning_compress.mechanisms.batchnorm import FrozenNorms, batch_norms
from lightning_compress.mechanisms.calibration import Settings, fingerprints
from lightning_compress.mechanisms.controller import StepController
from lightning_compress.mechanisms.divergence import WATCHED, LossWatch
from lightning_compress.mechanisms.gathering import refuse_own_backward
from lightning_compress.mechanisms.grids import Grids, WeightGrid
from lightning_compress.mechanisms.moving_grids import (
    FollowingGrids,
    LearnedGrids,
    MovingGrids,
    as_they_are,
)
from lightning_compress.mechanisms.owned import OwnedParameters
from lightning_compress.mechanisms.progress import Progress
from lightning_compress.mechanisms.quantization import GuardedCalls, quantizing
from lightning_compress.mechanisms.rounded_weights import RoundedWeight
from lightning_compress.mechanisms.rounding import Presented, Rounding
from lightning_compress.mechanisms.saved_grids import flaw_of_movement, unfit
from lightning_compress.mechanisms.selection import find_module, joined, listing, plain_name
from lightning_compress.mechanisms.sharding import sharded_units
from lightning_compress.mechanisms.states import GRIDS, Each, Sometimes
from lightning_compress.mechanisms.weights import select_weights

StepSize = Literal["mse", "observed", "learned"]
SMALL_RATE = 0.25
"""Of the largest learning rate: one at which a network does without the statistics of its batches."""
MUCH_CLIPPED = 0.05
"""A share of weights beyond their grids, more than at the start, that is worth a warning."""
MUCH_GROWN, SMALL_LOSS = 2.0, 0.02
"""What is worth one: a loss of so many times what it was when batch norm was frozen, and what a smaller counts as."""
_LATER = "later, once the learning rate has fallen, or never: freeze_batchnorm_at=1"
KEPT = ("moving", "factors", "top_lr", "watch", "froze", "waits", "clipped", "run")
"""What goes into the state beside the grids, once the network is quantised."""
GRID_ARGUMENTS = ("weight_bits", "activation_bits", "edge_bits", "layer_bits", "network", "layers", "exclude")
"""By which the grids of a checkpoint are those of another network, when they differ."""
ADAM_EPS = 1e-12
"""Gradients of steps, divided by the root of how many elements share one, are smaller than what Adam usually adds."""


@dataclass
class _Fit:
    """What a fit has come to."""

    watch: LossWatch = field(default_factory=LossWatch)
    progress: Progress | None = None
    moving: MovingGrids | None = None
    """Once the network is quantised."""
    factors: OwnedParameters | None = None
    """Of learned steps."""
    calls: GuardedCalls | None = None
    """Of the quantised network."""
    norms: FrozenNorms | None = None
    """Its batch norm."""
    froze: bool = False
    """Whether some of that was frozen, in an earlier part of the fit perhaps."""
    lr: float = 0.0
    """The user's learning rate now."""
    highest_lr: float = 0.0
    """The largest so far."""
    waits: bool = False
    """Whether that keeps batch norm from being frozen."""
    clipped: float = 0.0
    """The share of weights that lay beyond the grids when these were found."""
    modules: frozenset[int] = frozenset()
    """Identities of the modules of the network when it was quantised."""
    checked: bool = False
    """Whether the first quantised step was looked at."""
    in_step: bool = False
    """Whether a training step runs."""
    run: set[str] = field(default_factory=set)
    """Names of the weights that one has rounded."""
    whole: bool = False
    """Whether an epoch was quantised from its first batch on."""
    steps_of_grids: int = 0
    """Optimizer steps when grids moved last."""
    steps_before_grids: int = 0
    """Training steps before the network was quantised."""
    top_lr: dict[int, float] = field(default_factory=dict)
    """Of each optimizer, the user's largest learning rate since the start."""

    def thaw(self) -> None:
        """Let batch norm train again that did."""
        if self.norms is not None:
            self.norms.thaw()


class QATCallback(QuantisedCallback):
    """Train the network on the grids of few bits, forward rounded, backward straight through.

    When it acts: from ``start`` on, each call of the network, in training and validation, computes with rounded weights
    and activations; where a layer is called from, and by whom, does not matter. At ``start`` it calibrates on training
    data, as :class:`PTQCallback` does. Validation in the fit, checkpoints' scales and the file of
    ``ExportCallback(precision="int8")`` are of one network. What it leaves alone: names and values in the
    ``state_dict``, which holds the weights in full precision; the optimizer; the loss outside of the network.

    Logged each epoch are ``compress/<name>/clipped``, the share of weights beyond the ends of their grids, and
    ``compress/<name>/step_change``, how far learned steps are from where they began, on average.

    Args:
        weight_bits: Bits of a weight, 2 to 8; a symmetric grid for each output channel.
        activation_bits: Bits of an activation, 2 to 8; an affine grid that contains 0. None: weights only.
        step_size: "mse": grids of the least squared error, which stay. "observed": they follow magnitudes, of
            activations a moving average, until ``freeze_observers_at``. "learned": LSQ, from "mse" on.
        start: Fraction of optimizer steps from which it is quantised, in [0, 1].
        freeze_batchnorm_at: Fraction from which batch norm keeps its running statistics; 1: never. "auto": halfway from
            ``start``, or later, once the learning rate is a quarter of its largest.
        freeze_observers_at: Fraction from which "observed" grids stay. "auto": 3/4 of the way from ``start``.
        step_lr: Learning rate of learned steps, relative to them; it falls with the user's.
        max_loss_growth: The training ends in an error when the loss of 20 batches is so many times what it was when
            quantisation, or frozen batch norm, began. None: never.
        grids_from: Checkpoint of a run with a ``PSGDCallback`` of the same bits, whose grids are taken. None: those of
            one beside this, else calibrated ones.
        max_samples: Training samples to calibrate with, at least 1.
        edge_bits: Of the first and last weight, and the input. "auto": 8 below 4 bits. None: as the others.
        layer_bits: Selectors of layers to other bits of their weights; the last that matches counts.
        network: Dotted name of the network. None: what the step calls.
        layers: As for ``PruningCallback``. None: convolutions, linear layers, attention.
        exclude: Selectors of layers that stay in float.
        name: As in the base class; default "qat".

    Attributes:
        quantization: The grids as they were at the end of the last fit.
        metrics: The metrics of the quantised network in the module's own validation, after a fit.

    Raises:
        ValueError: If an argument is out of its range, or two contradict each other.

    Example:
        >>> import lightning.pytorch as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> module, qat = BoringModel(), QATCallback(weight_bits=4)
        >>> L.Trainer(max_steps=4, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[qat],
        ...           enable_model_summary=False, enable_checkpointing=False).fit(module)
        >>> list(qat.quantization.weights), qat.quantization.weights["weight"].bits
        (['weight'], 4)
    """

    default_name = "qat"
    holds: ClassVar[Mapping[str, Any]] = {
        "arguments": {"step_size": str},
        "start_grids": (GRIDS, None),
        "highest_lr": Sometimes(float),
        "moving": Sometimes(dict),
        "factors": Sometimes(dict, beside="moving"),
        "top_lr": Sometimes(Each(float), beside="moving"),
        "watch": Sometimes(WATCHED, beside="moving"),
        "froze": Sometimes(bool, beside="moving"),
        "waits": Sometimes(bool, beside="moving"),
        "clipped": Sometimes(float, beside="moving"),
        "run": Sometimes([str], beside="moving"),
    }
    changes_step = True

    _start_grids = Returned[Grids | None](None)
    """Where the grids began."""
    _highest_lr = Returned[float](0.0)
    """The user's largest learning rate."""
    _kept = Returned[Mapping[str, Any]](MappingProxyType({}))
    """What a later part of the training needs beside the grids, once a fit has ended."""

    def __init__(
        self,
        *,
        weight_bits: int = 8,
        activation_bits: int | None = 8,
        step_size: StepSize = "mse",
        start: float = 0.0,
        freeze_batchnorm_at: float | Literal["auto"] = "auto",
        freeze_observers_at: float | Literal["auto"] = "auto",
        step_lr: float = 1e-2,
        max_loss_growth: float | None = 5.0,
        grids_from: str | os.PathLike[str] | None = None,
        max_samples: int = 512,
        edge_bits: int | Literal["auto"] | None = "auto",
        layer_bits: Mapping[str, int] | None = None,
        network: str | None = None,
        layers: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            edge_bits=edge_bits,
            layer_bits=layer_bits,
            max_samples=max_samples,
            network=network,
            layers=layers,
            exclude=exclude,
            name=name,
        )
        check_choice("step_size", step_size, get_args(StepSize))
        self.step_size, self.start = step_size, check_fraction("start", start)
        self.freeze_batchnorm_at = _checked_freeze("freeze_batchnorm_at", freeze_batchnorm_at, start)
        self.freeze_observers_at = _checked_freeze("freeze_observers_at", freeze_observers_at, start)
        self.step_lr = check_positive("step_lr", step_lr)
        because = f"step_size='{step_size}'"
        if step_size != "observed":
            tell_without_effect(self, QATCallback, because, freeze_observers_at=self.freeze_observers_at)
        if step_size != "learned":
            tell_without_effect(self, QATCallback, because, step_lr=self.step_lr)
        self.max_loss_growth = None
        if max_loss_growth is not None:
            self.max_loss_growth = check_number(
                "max_loss_growth", max_loss_growth, "a number above 1, or None", lambda number: number > 1
            )
        self.grids_from = absolute_path("grids_from", grids_from)
        self._stage: str | None = None
        self._loaded: dict[str, Any] | None = None  # state of a checkpoint that is resumed, until the fit starts
        self._fit = _Fit()
        self._begun = ExitStack()  # what the fit has opened since it began with its grids

    # What the base asks

    def settings(self) -> Settings:
        """The grids of least squared error."""
        return Settings(
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            observer="minmax" if self.step_size == "observed" else "mse",
            weight_range="max" if self.step_size == "observed" else "mse",
            max_samples=self.samples,
            edge_bits=edge_bits_of(self.edge_bits, self.weight_bits),
        )

    def problem_with_shards(self) -> str | None:
        """Activations: no process sees what the others' batches reach."""
        if self.activation_bits is not None:
            return f"activation_bits={self.activation_bits} quantises activations too; give activation_bits=None"
        return None

    def reestimates(self, network: nn.Module) -> bool:
        """Where there is batch norm: activations are to be seen as training with rounded weights will give them."""
        return bool(batch_norms(network)) and not sharded_units(network)

    def given(self, trainer: Any, name: str, network: nn.Module) -> Mapping[str, WeightGrid]:
        """The grids that PSGD has trained for."""
        if self.grids_from is None:
            self._warn_of_nothing_trained(trainer)
            return self._trained_for(trainer, name)
        ranges, weights = self._ranges_from(self.grids_from)
        found = grids_of_ranges(inside(name, ranges), inside(name, weights))
        if not found:
            raise ValueError(f"grids_from='{self.grids_from}' has no grids of PSGDCallback for weights of '{name}'")
        return found

    def presented(self) -> Presented | None:
        """In a fit, what masks weights knows."""
        return None if self._controller is None else self._controller.weights.source_of

    def intent(self, trainer: Any, pl_module: Any) -> Intent:
        """As the base; and how its grids move, from when on."""
        intent = super().intent(trainer, pl_module)
        return replace(intent, aims={**intent.aims, "step_size": self.step_size, "start": self.start})

    def trial_scales(self, trainer: Any, pl_module: Any) -> Grids:
        """Those that are trained, if they are by now."""
        if self._fit.moving is None:
            return super().trial_scales(trainer, pl_module)
        grids = self._fit.moving.current()
        if self.step_size == "mse":
            return grids
        activations = {  # that are alike now will not be, and where one kernel would do two would then be needed
            key: replace(grid, scale=torch.tensor(grid.scale * (1 + 1e-3 * place)).item())
            for place, (key, grid) in enumerate(grids.activations.items())
        }
        return replace(grids, activations=activations)

    def shown(self, trainer: Any, pl_module: Any) -> Grids | None:
        """Those of the last fit, or of the checkpoint that is tested; the plain network before any."""
        grids = self.quantization
        if grids is None:
            self._warn_once("nothing was trained on grids so far, so the plain network is shown")
            return None
        self._refuse_unfit(grids, pl_module)
        if grids.following:  # those of the checkpoint's weights, which may be an average
            grids = as_they_are(grids, find_module(pl_module, grids.network, argument="network"))
        elif grids.fingerprints and not self._belongs_to(grids, pl_module):
            self._warn_once(
                "the weights have changed since the fit, and are shown with the scales that were trained with others"
            )
        return grids

    def owned_lr(self, optimizer: torch.optim.Optimizer) -> float | None:
        """That of the steps, as much smaller than ``step_lr`` as the user's is smaller than it was."""
        index = next((place for place, own in enumerate(self._trainer.optimizers) if own is optimizer), 0)
        now = max(float(group["lr"]) for group in optimizer.param_groups)
        top = self._fit.top_lr[index] = max(self._fit.top_lr.get(index, 0.0), now)
        return self.step_lr * now / top if top > 0 else 0.0

    def remarks(self) -> list[str]:
        """As the base; and how far learned steps have come."""
        remarks, start, end = super().remarks(), self._start_grids, self.quantization
        if self._kept.get("waits"):
            remarks.append(
                f"{self.name}: batch norm was not frozen: the learning rate never fell to a quarter of its largest."
            )
        if self.step_size == "learned" and start is not None and end is not None:
            changes = _changes(start, end)
            remarks.append(
                f"{self.name}: learned steps are {changes.min():.3g} to {changes.max():.3g} times what they were, "
                f"{float((changes - 1).abs().mean()):.1%} off on average."
            )
        return remarks

    # Life cycle

    def check(self, trainer: Any, pl_module: Any) -> None:
        """As the base; refuse a checkpoint without grids, channels that go later; tell of arguments without effect."""
        super().check(trainer, pl_module)
        self._refuse_manual_shards(trainer, pl_module)
        self._refuse_shrinking(
            trainer,
            f"the grids of '{self.name}' are of the network as it is at start={self.start}: let it begin after, with a "
            "larger start=",
            fine=lambda until: until < self.start,
        )
        if self.grids_from is not None:
            self._ranges_from(self.grids_from)

    def enter(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """As the base; and know what a checkpoint is loaded for."""
        super().enter(trainer, pl_module, stage)
        self._stage, self._loaded = stage, None

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """Go on with grids that were trained before, if this is the same training."""
        goes_on = trainer.global_step > 0 and self.quantization is not None and self.has_fitted(pl_module)
        super().attach(controller, stack, trainer, pl_module)
        if sharded_units(pl_module):
            refuse_own_backward(pl_module, self.name)  # not only where rounding begins
            self._refuse_masked(trainer, pl_module)
        state = self._loaded or (self.state_dict() if goes_on else None)
        self._begin_with(state, stack, pl_module)

    def _refuse_masked(self, trainer: Any, pl_module: Any) -> None:
        """Refuse weights that are masked too: of sharded ones one view is presented."""
        own = selection(pl_module, self.layers, self.exclude)
        for other in trainer.callbacks:
            if isinstance(other, MaskedWeightsCallback):
                chosen = select_weights(pl_module, other.layers, other.exclude, default=other.default_layers).weights
                if both := [name for name in chosen if own(name)]:
                    raise ValueError(
                        f"'{other.name}' masks {listing(both)}, which '{self.name}' would round, and with "
                        f"{type(trainer.strategy).__name__} (FSDP2) only one of them can: leave weights to either with "
                        "layers= or exclude="
                    )

    def _begin_with(self, state: dict[str, Any] | None, stack: ExitStack, pl_module: Any) -> None:
        self._loaded = None
        self._begun.close()  # where a checkpoint is loaded within the fit, it had begun with the grids of the last one
        self._begun = stack.enter_context(ExitStack())
        self._fit = _Fit()
        self._begun.callback(self._fit.thaw)
        self.quantization, self.metrics, self._start_grids, self._kept, self._highest_lr = None, {}, None, {}, 0.0
        if state is not None:
            self._fit.highest_lr = state.get("highest_lr", 0.0)
        if state is not None and "moving" in state:  # not, if the training ended before it began
            self._refuse_other_grids(state, pl_module)
            for place in ("quantization", "start_grids"):
                if state[place] is not None:
                    self._refuse_unfit(Grids.from_state(state[place]), pl_module)
            self._go_on(state, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find out how long the training is."""
        progress = self._fit.progress = Progress(trainer, pl_module)
        self._refuse_shrinking(
            trainer,
            f"'{self.name}' begins in the same step, or before: give it a larger start=",
            fine=lambda until: progress.step_at(until) < progress.step_at(self.start),
        )
        self._fit.steps_of_grids = self._fit.progress.steps

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin to quantise when it is time, and freeze what is to be frozen."""
        fit = self._fit
        done = 0.0 if fit.progress is None else fit.progress.fraction_before
        if fit.moving is None and done >= self.start:
            with _compat.patient_group(trainer.world_size) as tell:
                together(tell, self._begin, trainer, pl_module)
        moving = fit.moving
        if moving is not None and not moving.frozen and done >= self._when(self.freeze_observers_at, 0.75):
            with self._seen_weights():
                moving.freeze()
            log.info("%s: the grids stay from here on", self.name)
        if self.freeze_batchnorm_at == "auto" and not fit.froze:
            fit.lr = max((float(group["lr"]) for own in trainer.optimizers for group in own.param_groups), default=0.0)
            fit.highest_lr = max(fit.highest_lr, fit.lr)
        if moving is not None:
            self._freeze_norms(trainer, done)
            moving.used.clear()
            fit.whole = fit.whole or batch_idx == 0
        fit.in_step = True

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """As the base, which lets steps learn; they stay positive."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if isinstance(self._fit.moving, LearnedGrids):
            self._fit.moving.clamp_()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """From here on everybody sees the weights in full precision."""
        self._drop()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """As the base; after the first quantised step, complain about what it did not reach."""
        fit, moving = self._fit, self._fit.moving
        fit.in_step = False
        self._drop()  # of a step that was skipped
        ran = self._require_controller().steps > fit.steps_before_grids  # a step that was skipped is no evidence
        if moving is not None:
            moving.used |= self._used_shards(moving)
            fit.run |= moving.used
            if not fit.checked and ran:
                self._check_first(moving)  # before anything else runs the network
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if moving is None:
            return
        self._follow_step(moving)
        parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1  # Lightning divides by it
        if fit.watch.see(outputs, averaging(trainer), device=pl_module.device, times=parts):
            self._check_loss(moving)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """As the base; log how the grids fit."""
        self._fit.in_step = False  # of a batch that a hook of the module has ended the epoch in
        super().on_train_epoch_end(trainer, pl_module)
        moving = self._fit.moving
        if moving is None:
            return
        self._check_modules(moving.network)
        if self._require_controller().steps > self._fit.steps_before_grids:
            self._check_idle(trainer, moving)
        clipped = self._clipped(moving)
        if clipped > self._fit.clipped + MUCH_CLIPPED and self.step_size != "observed":
            slow = "learn slowly" if moving.learns else "stay"
            self._warn_once(
                f"{clipped:.1%} of the weights lie beyond the ends of their grids, which were found at the start, when "
                f"{self._fit.clipped:.1%} did, and {slow}: begin with a trained network, later (start=), or with a "
                "smaller learning rate",
                "clipped",
            )
        if getattr(trainer, "barebones", False):
            return
        many = trainer.world_size > 1  # the same on all ranks; Lightning wants to be told
        for quantity, value in {"clipped": clipped, **moving.quantities()}.items():
            pl_module.log(f"compress/{self.name}/{quantity}", value, sync_dist=many, batch_size=1)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """As the base; in a fit, see that it shows what the file will be of."""
        super().on_validation_start(trainer, pl_module)
        if (moving := self._fit.moving) is not None:
            self._check_modules(moving.network)
            moving.evaluating = True
            if moving.parts is not None:
                self._require_controller().weights.show()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """As the base; training goes on with biases as they are."""
        super().on_validation_end(trainer, pl_module)
        if self._fit.moving is not None:
            self._fit.moving.evaluating = False
            self._drop()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """As the base, with the grids as they are at the end."""
        self._keep()
        super().on_fit_end(trainer, pl_module)

    def bake(self, trainer: Any, pl_module: Any) -> None:
        """Until the end, statistics of batch norm are those of the quantised network."""
        if self.quantization is not None:
            network = find_module(pl_module, self.quantization.network, argument="network")
            self._evaluation.enter_context(quantizing(network, Rounding(network, self.quantization)))

    def calibrate(self, trainer: Any, pl_module: Any) -> None:
        """Keep the grids for the weights as they are now."""
        self._evaluation.close()
        if not self._kept:
            if not _compat.has_training_data(trainer):
                self._warn_once("there is no training data, and no training step was run, so nothing is quantised")
                return
            self._warn_once(
                f"the training ended before start={self.start}, so the network was calibrated, as PTQCallback does, "
                "and not trained on its grids"
            )
            self._choose_step(trainer, pl_module)
            name = self._network_name(trainer, pl_module)
            self.quantization = self._start_grids = self._calibrated(trainer, pl_module, name)
        grids = self.quantization
        if grids is None:
            raise RuntimeError(f"'{self.name}' has lost its grids")
        network = find_module(pl_module, grids.network, argument="network")
        grids = as_they_are(grids, network)  # of the average, or the masked weights, where there are such
        self.quantization = replace(grids, fingerprints=fingerprints(network), following=False)
        log.info("%s: %s", self.name, self._summary(self.quantization))

    def extra_state(self) -> dict[str, Any]:
        """The grids as they are when the last step is over, and what it takes to go on; ask on all ranks.

        Where somebody saves before it is our turn after a step, its loss is not among those that are watched.
        """
        if self._fit.moving is not None:
            self._follow_step(self._fit.moving)
        grids = self.quantization if self._fit.moving is None else self._grids_now(self._fit.moving)
        start = self._start_grids
        return {
            "quantization": None if grids is None else grids.state(),
            "start_grids": None if start is None else start.state(),
            "highest_lr": max(self._fit.highest_lr, self._highest_lr),
            **(self._kept if self._fit.moving is None else self._to_keep(self._fit.moving)),
        }

    def flaw(self, state: Mapping[str, Any]) -> str | None:
        """As the base; with what moving grids go on from."""
        problem = super().flaw(state)
        if problem or "moving" not in state:
            return problem
        return flaw_of_movement(state, state["arguments"]["step_size"], self._adam)

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Keep it until the fit starts; the grids at once, where a checkpoint is tested."""
        if self._stage == "fit":
            self._loaded = state
            if self._stack is not None and sharded_units(self._require_controller().module):
                self._begin_with(state, self._stack, self._require_controller().module)  # loaded within the fit
            return
        grids, start = (state[name] for name in ("quantization", "start_grids"))
        self.quantization = None if grids is None else Grids.from_state(grids)
        self._start_grids = None if start is None else Grids.from_state(start)
        self._kept = {name: state[name] for name in KEPT if name in state}
        self._highest_lr = state.get("highest_lr", 0.0)
        self.samples_seen = 0

    # Private

    def _follow_step(self, moving: MovingGrids) -> None:
        """Let the grids take in what was seen, once an optimizer step: not before accumulated batches are over."""
        fit = self._fit
        steps = 0 if fit.progress is None else fit.progress.steps_over
        if steps == fit.steps_of_grids:
            return
        fit.steps_of_grids = steps
        strategy = self._trainer.strategy
        many = self._trainer.world_size > 1
        if lost := moving.finish_step(partial(strategy.reduce, reduce_op="max") if many else None):
            self._warn_once(
                f"the activation {listing(lost)} was NaN or infinite in a training batch, which is left out of the "
                "ranges that its grid follows",
                "lost",
            )

    def _when(self, fraction: float | Literal["auto"], usual: float) -> float:
        """A fraction of the training; "auto": so far on the way from the start to the end."""
        return self.start + usual * (1 - self.start) if fraction == "auto" else fraction

    def _freeze_norms(self, trainer: Any, done: float) -> None:
        """Freeze batch norm when it is time, also where somebody has called ``train()`` since."""
        fit, norms, at = self._fit, self._fit.norms, self._when(self.freeze_batchnorm_at, 0.5)
        if norms is None or at >= 1 or done < at:
            return
        high = False
        if self.freeze_batchnorm_at == "auto" and not fit.froze:  # rates that hang on a metric may differ over ranks
            high = not trainer.strategy.reduce_boolean_decision(fit.lr <= SMALL_RATE * fit.highest_lr)
        fit.waits = high and norms.trains
        if not fit.waits and norms.freeze() and not fit.froze:
            fit.froze = True
            fit.watch.begin_again()

    def _begin(self, trainer: Any, pl_module: Any) -> None:
        """Calibrate, and quantise from here on."""
        self._choose_step(trainer, pl_module)
        name = self._network_name(trainer, pl_module)
        if not self._verified:  # else it was checked after the first step
            self._check_calls(trainer, pl_module, name)
        grids = replace(self._calibrated(trainer, pl_module, name, in_training=True), statistics={}, fingerprints={})
        self._fit.steps_of_grids = 0 if self._fit.progress is None else self._fit.progress.steps_over
        self._fit.steps_before_grids = self._require_controller().steps
        self._fit.clipped = self._clipped(self._quantise(grids, pl_module, {}))
        self._tell_of_nothing(grids)
        self._forget_scores(trainer, "the network in full precision", "the quantised network")
        log.info("%s begins: %s", self.name, self._summary(grids))

    def _refuse_unfit(self, grids: Grids, pl_module: Any) -> None:
        """Refuse grids of another network, before any of them is used."""
        if problem := unfit(grids, pl_module):
            self._refuse_state(problem)

    def _go_on(self, state: dict[str, Any], pl_module: Any) -> None:
        """Quantise as an earlier part of this training did; where steps moved otherwise then, from where they are."""
        start, same = state["start_grids"], state["arguments"]["step_size"] == self.step_size
        kept = state["moving"] if same else {}
        begun = kept.get("begun") or state["quantization"]
        fit = self._fit
        fit.top_lr, fit.run = dict(state["top_lr"]), set(state["run"])
        fit.froze, fit.waits, fit.clipped = state["froze"], state["waits"], state["clipped"]
        fit.watch.load(state["watch"])
        grids = replace(Grids.from_state(begun), fingerprints={}, following=False)
        moving = self._quantise(grids, pl_module, state["factors"] if same else {})
        if same:
            moving.load(kept)
        self._start_grids = None if start is None else Grids.from_state(start)

    def _quantise(self, grids: Grids, pl_module: Any, factors: dict[str, Any]) -> MovingGrids:
        """Let the network compute on grids from here on."""
        if self._stack is None:
            raise RuntimeError(f"{type(self).__name__} is only active during a fit")
        controller, fit = self._require_controller(), self._fit
        network = find_module(pl_module, grids.network, argument="network")
        presented = controller.weights.source_of
        if self.step_size == "learned":
            fit.factors = self.own(OwnedParameters(_Factors, self._adam))
            self._begun.callback(self._owned.remove, fit.factors)
            fit.factors.load_state_dict(factors)
            module: Any = fit.factors.get(LearnedGrids.count(grids), device=next(network.parameters()).device)
            moving: MovingGrids = LearnedGrids(network, grids, presented, factors=module.factors)
        elif self.step_size == "observed":
            moving = FollowingGrids(network, grids, presented, watching=lambda: fit.in_step)
        else:
            moving = MovingGrids(network, grids, presented)
        self._start_grids, fit.moving, fit.norms = grids, moving, FrozenNorms(network)
        fit.modules = frozenset(map(id, network.modules()))
        if moving.parts is not None:
            self._begun.enter_context(controller.weights.owned(self.name, self._rounded_shards(moving)))
            return moving
        learning = quantizing(network, moving, when=lambda: controller.deployed and not controller.replaying)
        fit.calls = self._begun.enter_context(learning)
        return moving

    def _adam(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.step_lr, eps=ADAM_EPS)

    def _rounded_shards(self, moving: MovingGrids) -> dict[str, RoundedWeight]:
        """Views of the weights that are rounded, where FSDP2 has split them."""
        ranks = 1 if moving.parts is None else moving.parts.ranks
        for name, grid in moving.grids.weights.items():
            if name not in moving.names.sharded or (grid.axis is None and self.step_size != "mse"):
                raise ValueError(
                    f"'{self.name}' cannot round '{joined(moving.grids.network, name)}' in each process: it is not "
                    "split by FSDP2, or one step is given for all of its rows, which "
                    f"step_size='{self.step_size}' would move; leave it out with exclude="
                )
        return {
            joined(moving.grids.network, name): RoundedWeight(moving, name, moving.names.sharded[name], ranks)
            for name in moving.grids.weights
        }

    def _used_shards(self, moving: MovingGrids) -> set[str]:
        """Names of the sharded weights that the step used."""
        if moving.parts is None:
            return set()
        unused = self._require_controller().weights.sharded.unused(self.name)
        return {name for name in moving.grids.weights if joined(moving.grids.network, name) not in unused}

    def _drop(self) -> None:
        weights = self._require_controller().weights
        if weights.sharded.shown:
            weights.drop(evaluation=True)

    def _keep(self) -> None:
        """Take the grids, and what it takes to go on with them, from the fit."""
        if (moving := self._fit.moving) is not None:
            self.quantization, self._kept = self._grids_now(moving), self._to_keep(moving)
            self._fit.moving = None
        self._highest_lr = max(self._fit.highest_lr, self._highest_lr)

    def _close(self) -> None:
        try:
            self._keep()
        except Exception:  # what ends the fit is the news, and nothing is to be left on the module
            log.warning("%s: the grids as they are now could not be read", self.name, exc_info=True)
        finally:
            super()._close()
            self._fit = _Fit()

    def _to_keep(self, moving: MovingGrids) -> dict[str, Any]:
        fit = self._fit
        return {
            "moving": moving.state(),
            "factors": {} if fit.factors is None else copy.deepcopy(fit.factors.state_dict()),
            "top_lr": dict(fit.top_lr),
            "watch": fit.watch.state(),
            "froze": fit.froze,
            "waits": fit.waits,
            "clipped": fit.clipped,
            "run": sorted(fit.run | moving.used),
        }

    def _grids_now(self, moving: MovingGrids) -> Grids:
        with self._seen_weights():
            return moving.current()

    def _seen_weights(self) -> Any:
        """Within it the network reads the weights that a step would see."""
        weights = self._require_controller().weights
        return nullcontext() if weights.active or not weights.owners else weights.presented()

    def _tell_of_nothing(self, grids: Grids) -> None:
        """Grids that stay say nothing about what was 0 when they were found, such as a branch that begins so."""
        if self.step_size == "observed" or self._fit.moving is None:
            return
        with self._seen_weights():
            zero = self._fit.moving.zeros()
        if nothing := [*zero, *self._nothing]:
            self._warn_once(
                f"all of {listing(nothing)} was 0 when the grids were found, which then have steps of 1 and may round "
                "to 0 what is learned: begin later (start=), with a trained network, or give step_size='observed'"
            )

    def _ranges_from(self, path: str) -> tuple[dict[str, tuple[int, bool, int]], dict[str, Tensor]]:
        """What PSGD has trained the weights of a checkpoint for, and these weights, by their names in the module."""
        contents = read_checkpoint(path, argument="grids_from")
        ranges = trained_ranges(contents)
        asked = {given for _, _, given in ranges.values()}
        if not ranges:
            raise ValueError(f"grids_from='{path}' has no grids of PSGDCallback")
        if asked != {self.weight_bits}:
            raise ValueError(
                f"grids_from='{path}' is of a training for {', '.join(map(str, sorted(asked)))} bits, and "
                f"weight_bits={self.weight_bits}; give the same"
            )
        return ranges, {plain_name(key): value for key, value in contents["state_dict"].items()}

    def _warn_of_nothing_trained(self, trainer: Any) -> None:
        for other in trainer.callbacks:
            trains = isinstance(other, CompressionCallback) and other.weight_bits_given is not None
            if trains and not isinstance(other, QuantisedCallback) and not given_steps(other):
                self._warn_once(
                    f"'{other.name}' has trained nothing yet for a grid to be taken over; give start=, so that it "
                    "comes first"
                )

    def _refuse_other_grids(self, state: dict[str, Any], pl_module: Any) -> None:
        """Refuse arguments by which other weights would be rounded, or the same to other bits."""
        before = self._saved_arguments(state)
        now = {argument: getattr(self, argument) for argument in GRID_ARGUMENTS}
        edges = [edge_bits_of(own["edge_bits"], own["weight_bits"]) for own in (before, now)]
        changed = [own for own in ("weight_bits", "activation_bits") if before[own] != now[own]]
        changed += ["edge_bits"] if edges[0] != edges[1] and not changed else []
        if len({tuple(sorted(bits_of_layers(pl_module, own["layer_bits"]).items())) for own in (before, now)}) > 1:
            changed.append("layer_bits")
        if self.network is not None and self.network != state["quantization"]["network"]:
            changed.append("network")
        old, new = (selection(pl_module, own["layers"], own["exclude"]) for own in (before, now))
        if any(old(plain_name(name)) != new(plain_name(name)) for name, _ in pl_module.named_parameters()):
            changed += [own for own in ("layers", "exclude") if before[own] != now[own]]
        for argument in changed:
            raise ValueError(
                f"the checkpoint was trained with {argument}={before[argument]}, and {argument}={now[argument]} is "
                "given now; its weights have learned the other grids: resume with the same, or load the weights alone "
                "and begin another fit"
            )

    def _check_first(self, moving: MovingGrids) -> None:
        """After the first quantised step: did it run what was calibrated?"""
        self._fit.checked = True
        calls = self._fit.calls
        self._require_controller().weights.sharded.check_learnt(self.name)
        if not (self._used_shards(moving) if calls is None else calls.count):
            raise RuntimeError(
                f"{type(self).__name__} '{self.name}' had no effect: the training step never called "
                f"'{moving.grids.network or 'self'}'; name the part that it calls with network="
            )

    def _check_idle(self, trainer: Any, moving: MovingGrids) -> None:
        """After an epoch: complain about layers that no step has run, of any process."""
        unknown = moving.parts is None and (self._fit.calls is None or self._fit.calls.compiled)
        if unknown or _compat.holds_compiled_code(moving.network):
            return  # compiled code keeps no record
        names = list(moving.grids.weights)
        ran = torch.tensor([float(name in self._fit.run) for name in names], device=trainer.strategy.root_device)
        if trainer.world_size > 1:
            ran = trainer.strategy.reduce(ran, reduce_op="max")
        idle = [name for name, own in zip(names, ran.tolist(), strict=True) if not own]
        if not idle:
            return
        if moving.learns and self._fit.whole:
            raise RuntimeError(
                f"the steps of {listing(idle)} cannot learn: no training step so far runs these layers; leave them out "
                "with exclude="
            )
        self._warn_once(f"no training step so far runs {listing(idle)}, so these weights do not learn their grids")

    def _check_modules(self, network: nn.Module) -> None:
        """Refuse modules that came since the network was quantised, which would run in float."""
        new = [
            name
            for name, module in network.named_modules()
            if id(module) not in self._fit.modules and any(value.ndim > 1 for value in module.parameters(recurse=False))
        ]
        if new:
            raise RuntimeError(
                f"'{self.name}': {listing(new)} was put into the network after it was quantised, and would run in full "
                "precision: do it before, or give a later start="
            )

    def _check_loss(self, moving: MovingGrids) -> None:
        """Complain about a loss that has grown where this callback may be the reason."""
        learned, limit, froze = moving.learns, self.max_loss_growth, self._fit.froze
        if limit is not None and (learned or froze) and (grown := self._fit.watch.grown(limit)):
            since = "batch norm was frozen" if froze else "the steps began to learn"
            advice = ["give a smaller learning rate"]
            advice += ["or a smaller step_lr=, more bits, or step_size='mse', whose steps stay"] if learned else []
            advice += [f"or freeze batch norm {_LATER}"] if froze else []
            raise RuntimeError(
                f"'{self.name}': the loss went {grown} since {since}, more than max_loss_growth={limit}: "
                f"{', '.join(advice)}; max_loss_growth=None goes on"
            )
        if froze and (grown := self._fit.watch.grown(MUCH_GROWN, small=SMALL_LOSS)):
            self._warn_once(
                f"the loss went {grown} since batch norm was frozen (freeze_batchnorm_at={self.freeze_batchnorm_at}): "
                f"the learning rate is probably too large for a network without it; freeze it {_LATER}",
                "grown",
            )

    def _clipped(self, moving: MovingGrids) -> float:
        with self._seen_weights():
            return moving.clipped()


class _Factors(nn.Module):
    """What learned steps are multiplied by."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.ones(count))


def _checked_freeze(argument: str, value: Any, start: float) -> Any:
    """A fraction of the training, not before the start of rounding; or "auto"."""
    if is_auto(value):
        return value
    fraction = check_fraction(argument, value, or_auto=True)
    if fraction < start:
        raise ValueError(f"{argument} must be from start={start} to 1, or 'auto', got {shown(value)}")
    return fraction


def _changes(start: Grids, end: Grids) -> Tensor:
    """The ratio of each step to where it began."""
    scales = [end.activations[key].scale / grid.scale for key, grid in start.activations.items()]
    steps = [(end.weights[name].step / grid.step).reshape(-1) for name, grid in start.weights.items()]
    return torch.cat([torch.tensor(scales), *steps])
