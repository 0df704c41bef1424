"""The child's side of ``lightning-compress plan``: the fit that the recipe means, up to its first backward pass.

What the script does before that fit, it does as always. The fit itself begins with loggers that write nothing, and when
the first batch has gone through the network and back, what is known by then is told, and the process ends: nothing of
the script's runs any more.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from lightning_compress import _compat
from lightning_compress.callbacks.base import callbacks_of
from lightning_compress.callbacks.ranks import together
from lightning_compress.commands.attachment import (
    Events,
    Order,
    RecipeAttachment,
    described,
    process_rank,
    script_under_its_name,
)
from lightning_compress.commands.forecast import forecast
from lightning_compress.mechanisms.controller import StepController
from lightning_compress.mechanisms.step import find_controller
from lightning_compress.recipe import Recipe, RecipeError

PLANNED = 79
"""What a planned process exits with: 0 would let a shell go on behind ``&&``, and the parent of spawned ones wait."""
PAST_US = "the fit began without Trainer.fit of Lightning: something in the script keeps or replaces that method"


class _Enough(BaseException):
    """Out of a step that does its own backward passes; no ``except Exception`` of the user's stops it."""


def foreseeing_fits() -> None:
    """Let each fit of this process tell its :class:`PlanAttachment` before Lightning begins."""

    def wrap(fit: Callable[..., Any]) -> Callable[..., Any]:
        def foreseen(trainer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            attachment = next((own for own in trainer.callbacks if isinstance(own, PlanAttachment)), None)
            if attachment is None or _compat.is_tuner_fit(trainer):
                return fit(trainer, model, *args, **kwargs)
            with attachment.telling():
                attachment.begin(trainer, model)
                return fit(trainer, model, *args, **kwargs)

        return foreseen

    _compat.wrap_fits(wrap)


class PlanAttachment(RecipeAttachment):
    """Attach a recipe to the fit that it means, up to the first backward pass, and tell what it would do.

    When it acts: before the fit, which it quietens; after the first backward pass, where it ends the process. What it
    leaves alone: all that the script does before.

    Args:
        order: What the parent asked for.
    """

    def __init__(self, order: Order) -> None:
        super().__init__(order)
        self._begun = self._meant = self._enough = False
        self._heard: list[str] = []  # what this package has warned of

    def begin(self, trainer: Any, model: Any) -> None:
        """Decide whether the recipe means the fit that is about to begin, and quieten it.

        Args:
            trainer: Whose fit begins.
            model: As the script gave it.

        Raises:
            RecipeError: If the recipe cannot be read here, or another process has a fit with it.
        """
        self._begun = self._meant = True  # whatever is raised from here on is told
        with script_under_its_name():
            recipe = self._recipe()
        self._meant, problem = self._decided(recipe, type(_compat.uncompiled(model)))
        if problem:
            self._meant = True
            raise RecipeError(problem)
        if self._meant:
            _compat.quieten_(trainer, str(Path(self.order.events).parent / "quiet"))
            if _compat.runs_in_children(trainer):
                _compat.before_children_fail(trainer, partial(_end_if_planned, self._events))

    @contextmanager
    def telling(self) -> Iterator[None]:
        """After an error, tell the parent, if no hook has told it, and end: the script may catch it, and go on."""
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if not self._meant:
                raise
            if process_rank() == 0 and not any(event["event"] == "failed" for event in self._events.read()):
                self._events.append("failed", message=described(error))
            _end_process(_shown(error))
        finally:
            self._begun = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """As the base; hear what our callbacks warn of, and let them know that this is no training."""
        if stage == "fit" and not _compat.is_tuner_fit(trainer) and not self._repeats_another(trainer):
            if not self._begun:  # whether it is meant is not known, and nothing may train
                self._tell(trainer, "failed", message=f"{PAST_US}, so nothing was planned")
                _end(trainer)
            if self._meant:
                _hear(self._heard)
        super().setup(trainer, pl_module, stage)
        for callback in callbacks_of(trainer):
            callback.planning = self._active

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Let a step with backward passes of its own end after the first of them."""
        if self._active and not getattr(pl_module, "automatic_optimization", True):
            _step_ends(pl_module)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """What was to be seen has been seen."""
        if not self._active:
            return
        if getattr(pl_module, "automatic_optimization", True):
            self._finish(trainer, pl_module)
        for callback in callbacks_of(trainer):  # out of the step first, whatever it has open
            if callback.student_capture is not None:
                callback.student_capture.drain()
        self._enough = True
        raise _Enough

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The same, where the step has ended early, or its backward pass went past Lightning; not if it was skipped."""
        if self._active and (self._enough or _controller(pl_module).steps > 0):
            self._finish(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The training is over, and there was nothing to see."""
        if self._active:
            self._tell(trainer, "failed", message="the fit came to its end without a batch that has a loss")
            _end(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """The same where no training began; nothing is exported or reported."""
        self.on_train_end(trainer, pl_module)

    def _is_meant(self, recipe: Recipe, trainer: Any, pl_module: Any) -> bool:
        """As it was decided before the fit, by each process for itself."""
        return self._meant

    def _finish(self, trainer: Any, pl_module: Any) -> None:
        """Tell what the recipe would do, and end the process."""
        controller = _controller(pl_module)
        if controller.weights.active:
            controller.weights.drop()
        for callback in callbacks_of(trainer):
            callback.foresee(trainer, pl_module)
        for callback in callbacks_of(trainer):
            callback.check_first_step(trainer, pl_module)

        def tell(trainer: Any, pl_module: Any) -> None:
            if trainer.is_global_zero:
                self._events.append("planned", **forecast(trainer, pl_module, controller.last, self._heard))

        with _compat.patient_group(trainer.world_size) as said:
            together(said, tell, trainer, pl_module)
        _end(trainer)


def _controller(pl_module: Any) -> StepController:
    controller = find_controller(pl_module)
    if controller is None:
        raise RuntimeError("the recipe's callbacks are not at work, so nothing can be said of them")
    return controller


def _hear(heard: list[str]) -> None:
    """Note what this package warns of, whatever filters the script has; for the rest of the process."""
    original = warnings.warn

    def warn(message: Any, category: Any = None, stacklevel: int = 1, *args: Any, **options: Any) -> None:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("lightning_compress."):
            heard.append(str(message))
        original(message, category, stacklevel + 1, *args, **options)

    warnings.warn = warn


def _step_ends(pl_module: Any) -> None:
    """Let a training step end where :class:`_Enough` is raised; for the rest of the process."""
    original = pl_module.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        with suppress(_Enough):
            return original(*args, **kwargs)

    training_step.__wrapped__ = getattr(original, "__wrapped__", original)  # type: ignore[attr-defined]
    vars(pl_module)["training_step"] = training_step


def _end_if_planned(events: Events) -> None:
    """In the process that has started others, one of which has ended: that was all."""
    if any(event["event"] == "planned" for event in events.read()):
        _end_process(_ended_code())


def _end(trainer: Any) -> None:
    """End this process of the fit."""
    if trainer.is_global_zero:
        sys.stdout.write("\n")  # below a progress bar
    if _compat.runs_in_children(trainer):
        _end_process(PLANNED)
    _end_process(_ended_code() if trainer.is_global_zero else 0)  # a launcher need not see others fail


def _ended_code() -> int:
    """Torchrun would take its ranks for failed, and say so at length."""
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else PLANNED


def _shown(error: BaseException) -> int:
    """Show an exception as Python does if nobody catches it; the exit code."""
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        sys.stderr.write(f"{error.code}\n")
    else:
        sys.excepthook(type(error), error, error.__traceback__)
        traceback.clear_frames(error.__traceback__)  # they hold queues, whose semaphores would be missed by Python
    return 1


def _end_process(code: int) -> None:
    """End at once, without hooks, ``finally`` and ``atexit`` of the script's, and leave no process of it behind."""
    for worker in multiprocessing.active_children():  # of loaders
        worker.terminate()
        worker.join(timeout=5)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    logging.shutdown()
    os._exit(code)
