"""What the techniques that mask weights by a schedule share: when masks change, who sees them, what is saved.

A technique says which masks it wants at a sparsity; see :meth:`MaskCallback.new_masks`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import _compat
from lightning_compress.callbacks.arguments import check_choice, check_flag, check_fraction, check_whole, takes
from lightning_compress.callbacks.base import CompressionCallback, log
from lightning_compress.callbacks.returned import Returned
from lightning_compress.functional import schedules
from lightning_compress.functional.schedules import Schedule
from lightning_compress.mechanisms.checkpoints import (
    compress_,
    dense_of,
    keep_dense_,
    loading_dense,
    saving_compressed,
)
from lightning_compress.mechanisms.controller import StepController
from lightning_compress.mechanisms.masking import Masks
from lightning_compress.mechanisms.progress import Progress
from lightning_compress.mechanisms.selection import plain_name
from lightning_compress.mechanisms.views import Usage
from lightning_compress.mechanisms.weights import named_weights, select_weights
from lightning_compress.mechanisms.wrapping import shadowed

SCHEDULES: dict[str, Schedule] = {
    "one_shot": schedules.constant_schedule,
    "linear": schedules.linear_schedule,
    "cubic": schedules.cubic_schedule,
    "cosine": schedules.cosine_schedule,
}


class MaskCallback(CompressionCallback):
    """Base of the techniques that mask weights.

    Args:
        sparsity: The final share of zeros among the selected weights, in [0, 1).
        schedule: "one_shot", "linear", "cubic", "cosine", or a function ``(progress, start, end)``.
        start: Fraction of the training at which masking begins, in [0, 1].
        end: Fraction at which the sparsity is reached, from ``start`` to 1.
        update_interval: Optimizer steps between two updates of the masks.
        layers: Selectors of the layers whose weights are masked; None for all convolutions and linear layers.
        exclude: Selectors of layers that are left dense.
        guard_checkpoints: Whether a checkpoint that ``ModelCheckpoint`` monitors is kept only from the final sparsity
            on, so that "best" is as sparse as its name says.
        name: As in the base class.

    Raises:
        ValueError: If an argument is out of its range.
    """

    changes_step = True

    _masks = Returned[Masks | None](None)
    _names = Returned[Mapping[str, str]](MappingProxyType({}))
    """Every name of a selected weight to its first."""
    _dense = Returned[dict[str, Tensor] | None](None)
    """What lies behind the compressed weights in the module, after a fit."""
    _begun = Returned(False)
    _finished = Returned(False)

    def __init__(
        self,
        sparsity: float,
        *,
        schedule: str | Schedule,
        start: float,
        end: float,
        update_interval: int,
        layers: Sequence[str] | None,
        exclude: Sequence[str] | None,
        guard_checkpoints: bool,
        name: str | None,
    ) -> None:
        super().__init__(name=name)
        check_fraction("sparsity", sparsity, below_one=True)
        check_fraction("start", start)
        check_fraction("end", end)
        if start > end:
            raise ValueError(f"start must be at most end, got start={start} and end={end}")
        check_whole("update_interval", update_interval, at_least=1)
        check_flag("guard_checkpoints", guard_checkpoints)
        if not callable(schedule):
            check_choice("schedule", schedule, tuple(self.schedules()))
        elif not takes(schedule, 3):
            raise ValueError(f"schedule must be a function of (progress, start, end), got {schedule!r}")
        self.sparsity, self.schedule, self.start, self.end = sparsity, schedule, start, end
        self.update_interval, self.layers, self.exclude = update_interval, layers, exclude
        self.guard_checkpoints = guard_checkpoints
        self._progress: Progress | None = None
        self._left: list[str] = []  # weights that stay dense
        self._loaded: dict[str, Any] | None = None  # state of a checkpoint that is resumed, until the fit starts
        self._tested: dict[str, Any] | None = None  # state of one that was tested, until the next fit
        self._undo: dict[str, Any] | None = None  # the last state, where dense weights were put back and not trained
        self._files = ExitStack()
        self._saving = False  # whether the module's own hook compresses what is saved
        self._steps: int | None = None  # optimizer steps at the last update; None before training
        self._logged: float | None = None
        self._churn: float | None = None  # of an update that has not been logged
        self._usage: Callable[[], Usage] | None = None

    # For techniques

    def schedules(self) -> dict[str, Schedule]:
        """The schedules by name."""
        return SCHEDULES

    @abstractmethod
    def new_masks(self, sparsity: float) -> list[Tensor] | None:
        """The masks of a sparsity, never below the one there is; None if they stay as they are."""

    @abstractmethod
    def zeros_at(self, sparsity: float) -> int:
        """How many weights are masked at a sparsity."""

    def suited(self, weights: dict[str, nn.Parameter], pl_module: nn.Module) -> dict[str, nn.Parameter]:
        """Those of the selected weights that can be masked; an error if there are none."""
        return weights

    def updated(self, changed: float, *, more: bool) -> None:
        """Called after an update of the masks, with the share of entries that changed, and whether training goes on."""

    # What users read

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name of a weight to its mask, True where it is kept; empty before the first update."""
        return {} if self._masks is None else self._masks.state()

    @property
    def reached(self) -> float:
        """The share of the selected weights that is masked now."""
        return 0.0 if self._masks is None else self._masks.sparsity

    def remarks(self) -> list[str]:
        """What was masked."""
        if self._masks is None:
            return []
        layers = len(self._masks.weights)
        return [
            f"{self.name}: {self._masks.zeros:,} of {self._masks.total:,} weights in {layers} "
            f"tensor{'' if layers == 1 else 's'} are masked ({self.reached:.2%}, asked {self.sparsity:.2%})."
        ]

    # Life cycle

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let the module load the dense weights to go on with a fit, and in a fit save compressed ones."""
        self._files.close()
        super().setup(trainer, pl_module, stage)
        self._files.enter_context(loading_dense(pl_module, self.name, self._receive, resumes=stage == "fit"))
        if stage == "fit":
            self._files.enter_context(saving_compressed(pl_module, self.name, self._compressed))
            self._files.callback(setattr, self, "_saving", False)
            self._saving = True

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """Select the weights, and present them masked from here on."""
        selected = select_weights(pl_module, self.layers, self.exclude)
        if selected.idle:
            self._warn_once(f"exclude={selected.idle} leaves out nothing that was selected")
        weights = self.suited(selected.weights, pl_module)
        last = self.state_dict()
        earlier, self._masks = self._masks, Masks(weights)
        first = {id(weight): name for name, weight in weights.items()}
        every = named_weights(pl_module).items()
        self._names = {name: first[id(weight)] for name, weight in every if id(weight) in first}
        self._left = [*(name for name in selected.weights if name not in weights), *selected.left]
        goes_on = self._restore_dense(earlier, last) and trainer.global_step > 0
        state = self._loaded or (last if goes_on else None)
        self._loaded = self._tested = None
        self._begun = self._finished = False
        self._steps, self._churn, self._logged = None, None, None
        stack.callback(self._forget)
        self.go_on(state)
        self._check_target()
        self._announce()
        stack.enter_context(controller.weights.owned(self.name, self._masks.views))
        self._usage = stack.enter_context(controller.weights.watched(self.name))
        guarded = [callback for callback in trainer.callbacks if self._guards(callback)]
        forgotten = [] if self._has_target() else [_compat.forget_best(callback) for callback in guarded]
        if any(forgotten):
            self._warn_once(
                "the best checkpoints so far have not the final sparsity, so they are not compared with what follows; "
                "their files stay"
            )
        for callback in guarded:
            stack.enter_context(shadowed(callback, "check_monitor_top_k", partial(self._guarded, callback)))

    def go_on(self, state: dict[str, Any] | None) -> None:
        """Begin with the state of an earlier fit; None: anew."""
        if state is not None:
            if state["masks"]:
                self._require_masks().load(state["masks"])
            self._begun = bool(state["begun"])
            # another target than then is still to be reached
            self._finished = bool(state["finished"]) and state["arguments"].get("sparsity") == self.sparsity

    def verify(self, trainer: Any, pl_module: Any) -> None:
        """Complain about weights that the first step did not use."""
        if self._usage is None:
            return
        unused, partly = self._usage()
        if partly:
            self._warn_once(
                f"{listing(partly)} get a part of their gradient past the layer: a penalty over parameters(), or "
                "whatever holds on to a parameter itself, sees the dense weights"
            )
        if len(unused) == len(self._require_masks().weights):
            raise RuntimeError(
                f"{type(self).__name__} '{self.name}' had no effect: the first training step used none of the weights "
                f"that it masks, {listing(unused)}; choose others with layers="
            )
        if unused:
            self._warn_once(
                f"the first training step did not use {listing(unused)}; copies of a network, and what belongs to "
                "another task, are left out with exclude="
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find out how long the training is; mask at once if the schedule begins here."""
        self._progress = Progress(trainer, pl_module)
        self._steps = self._progress.steps
        if not self._begun:
            self._update()
        guarded = any(self._guards(callback) for callback in trainer.callbacks)
        if guarded and not self._has_target() and not any(_compat.keeps_last(own) for own in trainer.callbacks):
            self._warn_once(
                "no checkpoint is kept before the final sparsity, so that the best one has it; to be able to resume "
                "before, add ModelCheckpoint(save_last=True), or give guard_checkpoints=False"
            )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Look closely at the first step of each epoch."""
        self._require_controller().weights.compare_next()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """From here on the dense weights are others than those that the fit began with."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self._undo = None

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """From here on everybody sees the dense weights."""
        if getattr(pl_module, "automatic_optimization", True):
            self._drop()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an optimizer step, update the masks if it is time; log the sparsity."""
        self._drop()  # a step that was skipped had no backward pass
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._progress is None:
            return
        steps = self._progress.steps
        if steps != self._steps:
            self._steps = steps
            self._update()
        if self._logged != self.reached or batch_idx == 0:  # what was logged stands until the end of the epoch
            self._logged = self.reached
            self.log_quantity("sparsity", self._logged, batch_size=1)
        if self._churn is not None:
            self.log_quantity("churn", self._churn, batch_size=1)
            self._churn = None

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Validation in a fit sees the masked weights."""
        if self._controller is not None:
            self._controller.weights.show()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """From the first batch on those of the average, where an average is validated."""
        if self._controller is not None and batch_idx == dataloader_idx == 0:
            self._controller.weights.refresh()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """After it everybody sees the dense weights."""
        self._drop(evaluation=True)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log sparsity and norm of each weight, measured from the masked tensors."""
        super().on_train_epoch_end(trainer, pl_module)
        masks = self._require_masks()
        if getattr(trainer, "barebones", False):
            return
        many = trainer.world_size > 1  # the same on all ranks; Lightning wants to be told
        with torch.no_grad():
            for name, weight in masks.weights.items():
                masked = masks.masked(name, weight.detach())
                zeros = ((masked == 0).sum() / masked.numel()).float()
                pl_module.log(f"compress/{self.name}/sparsity/{name}", zeros, sync_dist=many)
                norm = torch.linalg.vector_norm(masked.float())
                pl_module.log(f"compress/{self.name}/norm/{name}", norm, sync_dist=many)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Reach the final sparsity if the training was shorter than foreseen; say so if it was stopped."""
        if self._progress is None or self._has_target():
            return
        before, fraction = self.reached, self._progress.fraction
        if trainer.should_stop:
            guards = any(self._guards(callback) for callback in trainer.callbacks)
            kept = ", and no monitored checkpoint was kept" if guards else ""
            self.failure = (
                f"training stopped at {fraction:.0%} of its length, before end={self.end}: the sparsity is "
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
        """Leave the compressed weights in the module; the dense ones are kept here."""
        masks = self._require_masks()
        if self._steps is None:
            self._warn_once("no training step was run, so the masks are as they were")
        present = named_weights(pl_module)
        if replaced := [name for name, weight in masks.weights.items() if present.get(name) is not weight]:
            raise RuntimeError(
                f"{listing(replaced)} are not the weights any more that '{self.name}' masks: they were replaced after "
                "the last training step, so they cannot be compressed"
            )
        self._compress_module()
        self._files.close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave nothing on the module."""
        super().teardown(trainer, pl_module, stage)
        self._files.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave nothing on the module, once the checkpoints of the exception are written."""
        super().on_exception(trainer, pl_module, exception)
        if self._undo is not None:
            self._compress_module()
            self._files.close()
        elif self._masks is not None and self._masks.zeros > 0 and self._dense is None:
            log.warning(
                "%s: the fit was interrupted, and the module holds the dense weights, to go on from; its checkpoints "
                "hold the masked ones",
                self.name,
            )
        stack = ExitStack()

        def closing(original: Callable[..., Any]) -> Callable[..., Any]:
            def on_exception(*args: Any) -> None:
                self._files.close()
                stack.close()
                original(*args)

            return on_exception

        # Checkpoint callbacks come after this hook, and the strategy's own hook after theirs.
        stack.enter_context(shadowed(trainer.strategy, "on_exception", closing))

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Outside of a fit, where the module's own hook is as it was: keep what a later fit needs."""
        if self._saving or self._masks is None or not self._masks.state():
            return
        if self._dense is None:  # a fit ended in an exception, and the module holds the dense weights
            compress_(checkpoint, self.name, self._compressed)
            return
        state = checkpoint["state_dict"]
        dense = {key: self._dense[name] for key, value in state.items() if (name := self._name_of(key, value))}
        masked = {
            key: self._require_masks().masked(self._name_of(key, state[key]) or "", own) for key, own in dense.items()
        }
        if all(torch.equal(own, state[key].cpu()) for key, own in masked.items()):
            keep_dense_(checkpoint, self.name, dense)
        else:
            self._warn_once("the weights have changed since the fit, so they are saved without dense ones")

    def state_dict(self) -> dict[str, Any]:
        """That of the file that was tested last, whose weights the module has; else as the base."""
        return super().state_dict() if self._tested is None else self._tested

    def extra_state(self) -> dict[str, Any]:
        """The masks."""
        return {"masks": self.masks, "begun": self._begun, "finished": self._finished}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Keep them until the fit starts, when the weights are known."""
        if self._saving:  # else a file is tested, and what a fit needs of it was kept when it was read
            self._loaded = state

    # Private

    def _update(self) -> None:
        """Bring the masks to where the schedule is, if it is time."""
        progress = self._require_progress()
        fraction = progress.fraction
        if fraction < self.start or self._finished:
            return
        if fraction >= self.end:
            self._finish()
        elif not self._begun or progress.steps % self.update_interval == 0:
            self._take(self.new_masks(self._scheduled(fraction)))
        self._begun = True

    def _finish(self, *, more: bool = True) -> None:
        """Reach the final sparsity exactly, whatever the schedule said; the masks stay from here on."""
        self._take(self.new_masks(self.sparsity), more=more)
        self._finished = self._has_target()  # else nothing is known of the weights yet, and the next step tries again

    def _has_target(self) -> bool:
        """Whether the final sparsity is reached, be it before ``end``."""
        return self._require_masks().zeros >= self.zeros_at(self.sparsity)

    def _scheduled(self, fraction: float) -> float:
        """The sparsity at a fraction of the training between start and end."""
        schedule = self.schedule if callable(self.schedule) else self.schedules()[self.schedule]
        value = float(schedule((fraction - self.start) / (self.end - self.start), 0.0, self.sparsity))
        if not 0.0 <= value <= self.sparsity + 1e-9:  # NaN included
            raise ValueError(
                f"schedule must give a sparsity in [0, {self.sparsity}], and gave {value} at {fraction:.1%} of training"
            )
        return min(value, self.sparsity)

    def _take(self, masks: Sequence[Tensor] | None, *, more: bool = True) -> None:
        if masks is not None:
            self._churn = self._require_masks().replace(masks)
            self.updated(self._churn, more=more)

    def _compress_module(self) -> None:
        masks, undo = self._require_masks(), self._undo
        if undo is not None:  # nothing was trained
            masks.load(undo["masks"])
            self._begun, self._finished, self._undo = undo["begun"], undo["finished"], None
        self._dense = {name: weight.detach().cpu().clone() for name, weight in masks.weights.items()}
        with torch.no_grad():
            for name, weight in masks.weights.items():
                weight.copy_(masks.masked(name, weight))
        masks.retire()

    def _drop(self, *, evaluation: bool = False) -> None:
        weights = None if self._controller is None else self._controller.weights
        if weights is not None and weights.active:
            weights.drop(evaluation=evaluation)

    def _forget(self) -> None:
        """What is only of use within a fit."""
        self._progress = self._usage = None

    def _guards(self, callback: Any) -> bool:
        return self.guard_checkpoints and _compat.keeps_best(callback)

    def _guarded(self, callback: Any, original: Callable[..., bool]) -> Callable[..., bool]:
        """Keep no monitored checkpoint before the final sparsity, but for the last, to resume from."""

        def check_monitor_top_k(trainer: Any, *args: Any, **kwargs: Any) -> bool:
            if self._has_target():
                return original(trainer, *args, **kwargs)
            _compat.let_last_be_saved(callback, trainer)
            return False

        return check_monitor_top_k

    def _name_of(self, key: str, value: Any) -> str | None:
        """Which weight an entry of a ``state_dict`` is, also where the module renames its entries."""
        name = self._names.get(plain_name(key))
        if name is None and isinstance(value, Tensor):
            weights = self._require_masks().weights.items()
            same = (own for own, weight in weights if weight.data_ptr() == value.data_ptr() != 0)
            name = next((own for own in same if self._require_masks().weights[own].shape == value.shape), None)
        return name

    def _compressed(self, key: str, value: Tensor) -> Tensor | None:
        """What is saved of an entry of the module's ``state_dict``."""
        name = self._name_of(key, value) if self.masks else None
        return None if name is None else self._require_masks().masked(name, value)

    def _receive(self, checkpoint: dict[str, Any]) -> None:
        """Keep the dense weights of a checkpoint that is loaded to be tested, for a fit that goes on from it."""
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        masks = state.get("masks", {})
        dense = {plain_name(key): value for key, value in dense_of(checkpoint, self.name).items()}
        if self._saving:
            return
        if not masks or any(name not in dense for name in masks):
            if self._dense is None:  # after an interruption: the module holds other weights now
                self._masks = None
            return
        self._tested = state
        self._dense = {name: dense[name] for name in masks}
        self._masks = Masks({name: nn.Parameter(value, requires_grad=False) for name, value in self._dense.items()})
        self._masks.load(masks)
        first = {value.data_ptr(): name for name, value in self._dense.items()}
        self._names = {name: first[value.data_ptr()] for name, value in dense.items() if value.data_ptr() in first}

    def _restore_dense(self, earlier: Masks | None, last: dict[str, Any]) -> bool:
        """Go on from the dense weights of the last fit, if the module still is as it left it."""
        dense, self._dense = self._dense, None
        weights = self._require_masks().weights
        if earlier is None or earlier.weights.keys() != weights.keys():
            return False
        if dense is None:  # it was interrupted
            return all(earlier.weights[name] is weight for name, weight in weights.items())
        compressed = {name: earlier.masked(name, dense[name].to(weight.device)) for name, weight in weights.items()}
        if any(not torch.equal(compressed[name], weight.detach()) for name, weight in weights.items()):
            return False
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(dense[name])
        self._undo = last
        return True

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

    def _announce(self) -> None:
        masks = self._require_masks()
        log.info("%s masks %s (%s weights)", self.name, listing(list(masks.weights), most=None), f"{masks.total:,}")
        if self._left:
            log.info("%s leaves dense: %s", self.name, listing(self._left, most=None))

    def _require_masks(self) -> Masks:
        if self._masks is None:
            raise RuntimeError(f"{type(self).__name__} has no masks before a fit")
        return self._masks

    def _require_progress(self) -> Progress:
        if self._progress is None:
            raise RuntimeError(f"{type(self).__name__} is only active during a fit")
        return self._progress


def listing(names: Sequence[str], most: int | None = 5) -> str:
    """Names in quotation marks, the first few of many."""
    shown = names if most is None else names[:most]
    more = f" and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
    return ", ".join(f"'{name}'" for name in shown) + more
