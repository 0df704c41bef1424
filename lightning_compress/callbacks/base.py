"""The life cycle that all callbacks share: open mechanisms when a fit starts, close them whatever happens.

A technique overrides :meth:`CompressionCallback.attach` and enters context managers there. The base closes them at the
end of the fit and on any exception, then runs the end of fit as one sequence over all callbacks of this package, in an
order that does not depend on their order in the Trainer's list.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from lightning_compress import _compat
from lightning_compress.callbacks.arguments import shown
from lightning_compress.callbacks.ending import WHOLE_STAGES, run_end_of_fit
from lightning_compress.callbacks.intents import Intent, intents
from lightning_compress.callbacks.ranks import SHARDING_STRATEGY, averaging, is_of_kind, shards, together
from lightning_compress.callbacks.returned import FOUND, Returned, ReturnsResults
from lightning_compress.export.sample import defines
from lightning_compress.mechanisms.capture import CaptureError
from lightning_compress.mechanisms.grids import Grids
from lightning_compress.mechanisms.lessons import Lesson
from lightning_compress.mechanisms.optimizers import foreign
from lightning_compress.mechanisms.owned import (
    OwnedParameters,
    StepError,
    cannot_follow,
    holders,
    refuse_lbfgs,
    separate_networks,
)
from lightning_compress.mechanisms.scores import forget_bests, wait_anew
from lightning_compress.mechanisms.selection import find_module, listing
from lightning_compress.mechanisms.sharding import class_name, refuse_layout, sharded_units, shards_in_place
from lightning_compress.mechanisms.shrinking import Shrinkage
from lightning_compress.mechanisms.states import damage
from lightning_compress.mechanisms.step import StepController, step_controller
from lightning_compress.mechanisms.student import StudentCapture
from lightning_compress.report.table import Picture
from lightning_compress.tracking import Tracker, goals, recipe_of, run_settings

log = logging.getLogger("lightning_compress")

SCHEMA = 1
LOGGING_METHODS = ("log", "log_dict")
"""What Lightning gives a callback: methods of the module, which a copy would bring along."""
UNSUPPORTED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "XLAStrategy", "XLAFSDPStrategy")


def _callback_bases() -> tuple[type, ...]:
    """The Callback classes of both packages, so that a Trainer and a YAML file of either accept ours."""
    with _compat.lightning_logger_kept():
        first = import_module("lightning.pytorch").Callback
        if find_spec("pytorch_lightning") is None:
            return (first,)
        try:
            return (first, import_module("pytorch_lightning").Callback)
        except Exception:  # a broken second installation must not break this package
            log.debug("pytorch_lightning is installed but cannot be imported", exc_info=True)
            return (first,)


if TYPE_CHECKING:
    from lightning.pytorch import Callback

    TrainerCallback = Callback
else:
    TrainerCallback = type(
        "TrainerCallback", _callback_bases(), {"__doc__": "Callback of lightning.pytorch and of pytorch_lightning."}
    )


@dataclass(frozen=True)
class CapturedSample:
    """What the network received in the last training step.

    Attributes:
        network: Dotted name of the network inside the LightningModule; "" for the LightningModule itself.
        args: Positional arguments, detached.
        kwargs: Keyword arguments, detached.
    """

    network: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class CompressionCallback(ReturnsResults, TrainerCallback):
    """Base of all callbacks of this package.

    When it acts: between ``on_fit_start`` and the end of the fit; nothing of it is on the module before or after.

    Args:
        name: Keys the state in checkpoints and the logged quantities (``compress/<name>/...``); two callbacks in one
            Trainer need different names. None: the technique's default name.

    Raises:
        ValueError: If ``name`` is empty or holds a slash.
    """

    default_name: ClassVar[str] = "compression"
    changes_step: ClassVar[bool] = False
    expected_effects: ClassVar[tuple[str, ...]] = ()
    embed_pictures = False
    """Whether it shows the pictures of the others."""
    holds: ClassVar[Mapping[str, Any]] = MappingProxyType({"schema": int, "arguments": dict})
    """What its state holds beside that of its bases; see :func:`lightning_compress.mechanisms.states.damage`."""
    places: ClassVar[tuple[str, ...]] = ()
    """Arguments that only say where files go: a resumed fit may have others."""
    quantises: ClassVar[bool] = False
    """Whether its result is a network on grids."""
    planning = False
    """Whether the fit ends with its first batch, to say what it would do: what takes long, and shows nothing then, is
    left out."""
    without_fit: ClassVar[str | None] = None
    """What does not happen where there is only a validation or a test, and what does it there."""
    without_helpers: ClassVar[str] = ""
    """How to do without helpers that it trains beside the module: the end of a sentence."""
    failure = Returned[str | None](None)
    """What is wrong with the result of the last fit: ``lightning-compress run`` then ends with 1."""

    def __init__(self, *, name: str | None = None) -> None:
        super().__init__()
        if name is not None and (not isinstance(name, str) or not name or "/" in name):
            raise ValueError(f"name must be a non-empty string without '/', got {shown(name)}")
        self.name = self.default_name if name is None else str(name)
        self.effects: Counter[str] = Counter()
        self.student_capture: StudentCapture | None = None
        self.captured_sample: CapturedSample | None = None
        self._before_fit: dict[str, Any] | None = None  # its attributes then
        self._stack: ExitStack | None = None
        self._controller: StepController | None = None
        self._trainer: Any = None  # of a fit
        self._runs_in: Any = None  # the Trainer, from set-up to the end of a fit or an evaluation
        self._owned: list[OwnedParameters] = []
        self._lesson: Lesson | None = None
        self._owned_step: int | None = None  # number of the step in which these moved last
        self._verified = False
        self._warned: set[str] = set()
        self._versions: list[int] = []  # of the user's parameters, at the start
        self._fitted: weakref.ref[nn.Module] | None = None  # the module of the last fit
        self._tracker: Tracker | None = None  # of the Trainer of the fit

    # For techniques

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what cannot work, before anything is touched; called in ``setup`` of a fit."""

    def check_parts(self, pl_module: Any) -> None:
        """Refuse names of parts that the module does not have; called as soon as it has them all.

        That is in ``setup`` of a fit, and for a module that makes parts in ``configure_model``, at the fit's start.
        """

    def problem_with_shards(self) -> str | None:
        """What keeps it from working where FSDP2 shards the parameters, and the way out; None where nothing does."""
        return "it reads whole parameters; use one device or DDP"

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """Enter the mechanisms of the technique; each is closed at the end of the fit."""

    def verify(self, trainer: Any, pl_module: Any) -> None:
        """Complain about what the first whole step has shown; called once, after it."""

    def learners(self, pl_module: nn.Module) -> list[torch.Tensor]:
        """The parameters that it teaches: those of the student; while it is unknown, all."""
        names = None if self.student_capture is None else self.student_capture.names
        parts = [pl_module] if names is None else [find_module(pl_module, name, argument="student") for name in names]
        return [own for part in parts for own in part.parameters()]

    def learners_name(self) -> str:
        """What :meth:`learners` are called in a message."""
        names = None if self.student_capture is None else self.student_capture.names
        return "any network that it teaches" if names is None else f"'{'/'.join(names)}'"

    def follow_lessons(self, stack: ExitStack, trainer: Any, pl_module: nn.Module) -> Lesson | None:
        """Follow the gradients of its term, where a step may clear them.

        Returns:
            What to give the term; None with automatic optimisation, and where FSDP2 moves gradients.
        """
        if optimises_automatically(pl_module) or sharded_units(pl_module):
            return None
        self._lesson = Lesson(functools.partial(self.learners, pl_module), lambda: trainer.optimizers)
        stack.callback(setattr, self, "_lesson", None)
        stack.callback(self._lesson.close)
        return self._lesson

    @property
    def needs_whole(self) -> bool:
        """Whether it exports or measures the network at the end of the fit."""
        return any(getattr(type(self), stage) is not getattr(CompressionCallback, stage) for stage in WHOLE_STAGES)

    @property
    def teacher_network(self) -> nn.Module | None:
        """The teacher, for the report; None for techniques without one."""
        return None

    @property
    def weight_bits_given(self) -> int | None:
        """Bits of the weights that it will have scales for, for an integer file; None for techniques without."""
        return None

    @property
    def trained_steps(self) -> Mapping[str, tuple[torch.Tensor, int]]:
        """Name of each weight that it trains for a grid, to the grid's step and bits; empty for other techniques."""
        return MappingProxyType({})

    @property
    def shrinks_until(self) -> float | None:
        """The fraction of the training before which it has taken the last channels away; None if it takes none."""
        return None

    def intent(self, trainer: Any, pl_module: Any) -> Intent:
        """What it is going to do in the fit that has begun."""
        return Intent(type(self).__name__)

    def foresee(self, trainer: Any, pl_module: Any) -> None:
        """Where the fit ends with its first backward pass: leave the module as it will be, as far as that is known."""

    @property
    def foreseen_share(self) -> float:
        """The share of the parameters there are now that there will be at the end."""
        return 1.0

    def trial_scales(self, trainer: Any, pl_module: Any) -> Grids | None:
        """Scales that an integer file can be tried with after the first step; None for techniques without."""
        return None

    def remarks(self) -> list[str]:
        """Sentences that the report shows below its tables."""
        return []

    def pictures(self) -> list[Picture]:
        """What the report shows of it beside the numbers; asked for on rank 0 at the end of fit."""
        return []

    def follow_shrinkage(self, shrinkage: Shrinkage, pl_module: Any) -> None:
        """The module's parameters, the same objects as before, hold less from here on."""

    def extra_state(self) -> dict[str, Any]:
        """Tensors and primitives to save beside the arguments."""
        return {}

    def flaw(self, state: Mapping[str, Any]) -> str | None:
        """What is wrong with a state that holds what it should; None where it can be used."""
        return None

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`extra_state` gave."""

    def bake(self, trainer: Any, pl_module: Any) -> None:
        """End of fit, first stage: leave the compressed weights in the module."""

    def estimate_statistics(self, trainer: Any, pl_module: Any) -> None:
        """End of fit: statistics of batch norm with the compressed weights."""

    def calibrate(self, trainer: Any, pl_module: Any) -> None:
        """End of fit: ranges of activations."""

    def export(self, trainer: Any, pl_module: Any) -> None:
        """End of fit: write the file."""

    def evaluate(self, trainer: Any, pl_module: Any) -> None:
        """End of fit: the file through the module's own validation."""

    def report(self, trainer: Any, pl_module: Any) -> None:
        """End of fit, last stage: the table."""

    def log_quantity(self, quantity: str, value: Any, *, batch_size: int, validation: bool = False) -> None:
        """Log ``compress/<name>/<quantity>``; for validation ``compress/<name>/val_<quantity>``, averaged."""
        module: Any = self._require_controller().module
        if getattr(module.trainer, "barebones", False):
            return
        key = f"compress/{self.name}/{'val_' if validation else ''}{quantity}"
        many = validation and module.trainer.world_size > 1
        module.log(key, value, batch_size=batch_size, on_step=not validation, on_epoch=validation, sync_dist=many)

    def tracker(self, trainer: Any) -> Tracker:
        """What writes to the loggers; one for all callbacks of a fit, which tells of a failure once."""
        if self._tracker is None or self._tracker.trainer is not trainer:
            shared = (own._tracker for own in callbacks_of(trainer) if own._tracker is not None)
            self._tracker = next((own for own in shared if own.trainer is trainer), None) or Tracker(trainer)
        return self._tracker

    # Life cycle

    @property
    def state_key(self) -> str:
        """Class and name, never the arguments: a resume with other arguments must find the state to compare."""
        return f"{type(self).__qualname__}[{self.name}]"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work before anything happens."""
        if self._is_elsewhere(trainer):
            for name in LOGGING_METHODS:  # Lightning has given it those of the other module by now
                setattr(self, name, getattr(self._runs_in.lightning_module, name))
            raise RuntimeError(
                f"{type(self).__name__} '{self.name}' is at work in another Trainer's {self._runs_in.state.fn.value} "
                "that has not ended; give this Trainer a callback of its own, or none"
            )
        self._runs_in = trainer
        self.enter(trainer, pl_module, stage)
        if stage != "fit":
            if self.quantises:  # it shows another network there
                self._check_strategy(trainer.strategy)
            if self.without_fit is not None and stage != "predict" and getattr(self, "result", None) is None:
                warnings.warn(f"{type(self).__name__} '{self.name}' acts in a fit: {self.without_fit}", stacklevel=2)
            return
        if any(other is not self and other.name == self.name for other in callbacks_of(trainer)):
            raise ValueError(
                f"two callbacks are named '{self.name}'; give one another name=, for example '{self.name}2'"
            )
        self._check_strategy(trainer.strategy)
        if self.changes_step:
            self._check_optimisation(trainer, pl_module)
        self.check(trainer, pl_module)
        if not built_later(pl_module):
            self.check_parts(pl_module)
        self._before_fit = None
        self._before_fit = {key: value for key, value in self._snapshot().items() if not key.startswith(FOUND)}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the mechanisms."""
        if shards(trainer):
            refuse_layout(pl_module, type(self).__name__)
        self._close()
        if not self.has_fitted(pl_module):
            self.captured_sample = None
        self._trainer, self.failure = trainer, None
        self.effects.clear()
        self._verified = False
        self._warned.clear()
        self._versions = _versions(pl_module)
        self._stack = ExitStack()
        self._controller = self._stack.enter_context(step_controller(pl_module))
        self._controller.attached[self.name] = type(self).__name__
        if built_later(pl_module):
            self.check_parts(pl_module)
        self.attach(self._controller, self._stack, trainer, pl_module)
        self._fitted = weakref.ref(pl_module)
        ours = callbacks_of(trainer)
        if ours and ours[-1] is self:
            self._introduce(ours, trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the first whole step, complain about what had no effect; a loss that is asked for may come later."""
        if self._controller is None:
            return
        self._tell_of_lost_lessons(pl_module, over=False)
        if self._verified:
            return
        automatic = optimises_automatically(pl_module)
        if automatic and self._controller.steps == 0 and outputs:  # a skipped batch has none
            raise RuntimeError(
                f"{type(self).__name__} '{self.name}' had no effect: somebody replaced "
                f"{class_name(pl_module)}.training_step after the start of the fit"
            )
        if self._everywhere(trainer, self._controller.steps > 0 and (automatic or not self._missing())):
            self.check_first_step(trainer, pl_module)

    def check_first_step(self, trainer: Any, pl_module: Any) -> None:
        """Complain about what the first whole step has shown; on all ranks.

        Raises:
            RuntimeError: If something had no effect.
        """
        with _compat.patient_group(trainer.world_size) as tell:
            together(tell, self._check_effects, trainer, pl_module)
        self._verified = True
        if callbacks_of(trainer)[-1] is self:
            self.tracker(trainer).settings(lambda: {"plan": _plan(trainer, pl_module)})

    def own(self, parameters: OwnedParameters) -> OwnedParameters:
        """Train helpers beside the module: their gradients are cleared, and their steps taken, with the user's.

        Args:
            parameters: Added to those of this callback until the end of the fit.

        Returns:
            The same.
        """
        self._owned.append(parameters)
        return parameters

    def owned_lr(self, optimizer: torch.optim.Optimizer) -> float | None:
        """Learning rate of the helpers in the coming step; None: their own optimizers'."""
        return None

    def leads(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the helpers take their step with an optimizer's: of several, with those that train the student."""
        if len(trainer.optimizers) < 2:
            return True
        capture = self.student_capture
        names = () if capture is None or capture.names is None else capture.names
        leaders = holders(trainer.optimizers, self.learners(pl_module) if names else [])
        return not leaders or any(own is optimizer for own in leaders)

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Clear the helpers' gradients with the user's."""
        for parameters in self._owned:
            parameters.zero_grad()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Take the helpers' step with the user's: through the same scaler, with gradients averaged over processes."""
        if not self._owned or not self.leads(trainer, pl_module, optimizer):
            return
        who = f"{type(self).__name__} '{self.name}'"
        refuse_lbfgs(trainer.optimizers, who)
        if self._owned_step == trainer.global_step:
            raise ValueError(cannot_follow(who, optimizer, "which repeats the step before it moves"))
        self._owned_step = trainer.global_step
        reduce = averaging(trainer)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        for parameters in self._owned:
            try:
                parameters.step(scaler=scaler, reduce=reduce, lr=self.owned_lr(optimizer))
            except StepError as error:
                raise ValueError(f"{who} trains helpers of its own, and {error}{self.without_helpers}") from error
            parameters.zero_grad()  # of several optimizers, only the one that follows the backward pass counts

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """After an epoch, complain about what had no effect so far, and about helpers that were never trained.

        What it teaches may not have been trained yet, as where one of two networks learns in every tenth batch only:
        then nobody is to blame.

        Raises:
            RuntimeError: If no loss was what this callback adds to, or none was asked for while optimizers stepped
                outside of the step, or no optimizer has stepped through Lightning so far.
        """
        if self._controller is not None:
            self._tell_of_lost_lessons(pl_module, over=True)
            manual = self.changes_step and not optimises_automatically(pl_module)
            if manual and not self._everywhere(trainer, not self._never_asked(pl_module)):
                with _compat.patient_group(trainer.world_size) as tell:
                    together(tell, self._check_asked, trainer, pl_module)
            ready = self._controller.steps > 0 and not self._waits(pl_module)
            if not self._verified and self._everywhere(trainer, ready):
                self.check_first_step(trainer, pl_module)
        idle = any(parameters.idle for parameters in self._owned)
        if idle and self.has_moved(pl_module):  # whoever trains nothing in an epoch has his reasons
            raise RuntimeError(
                f"{type(self).__name__} '{self.name}' trains helpers of its own with the user's optimizers, and in a "
                f"whole epoch none of these stepped through Lightning: {_through_lightning(pl_module)}"
            )

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell loggers of the best values so far."""
        if self._controller is not None and not trainer.sanity_checking and callbacks_of(trainer)[-1] is self:
            self.tracker(trainer).validated(trainer.callback_metrics)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the mechanisms; the last of our callbacks runs the end of fit for all of them."""
        self._tell_of_no_lesson()
        self._close()
        ours = callbacks_of(trainer)
        if ours and ours[-1] is self:
            run_end_of_fit(ours, trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close the mechanisms, if ``on_fit_end`` was never reached."""
        if not self._is_elsewhere(trainer):
            self.leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the mechanisms: no other hook follows an exception."""
        if not self._is_elsewhere(trainer):
            self.interrupted(trainer, pl_module)

    def enter(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Prepare for a run; no other one goes on, and what else would be refused is looked at afterwards."""

    def interrupted(self, trainer: Any, pl_module: Any) -> None:
        """Do what is left to do where a run has ended in an exception; here, leave it."""
        self.leave()

    def leave(self) -> None:
        """Let go of the module, and of all that was needed for one run only, however that ended."""
        self._close()
        self._tracker = self._runs_in = None

    def state_dict(self) -> dict[str, Any]:
        """Schema version, arguments, and the technique's own state: tensors and primitives only."""
        return {"schema": SCHEMA, "arguments": self._arguments(), **self.extra_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state back; arguments that differ are named in a warning, but for those that say where files go.

        Raises:
            ValueError: If a newer version of this package wrote it, or it is damaged.
        """
        self._refuse_damaged(state_dict)
        saved, now = state_dict["arguments"], self._arguments()
        changed = [
            f"{key} was {saved[key]!r} and is {now[key]!r}"
            for key in now
            if key in saved and saved[key] != now[key] and key not in self.places
        ]
        if changed:
            warnings.warn(
                f"{type(self).__name__} '{self.name}' resumes with other arguments than in the checkpoint: "
                f"{'; '.join(changed)}",
                stacklevel=2,
            )
        self.load_extra_state(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is at work in no fit, has found nothing in one that goes on, and has fitted no module."""
        state = self._snapshot() if self._stack is None or self._before_fit is None else self._before_fit
        return {**state, "_before_fit": None, "_fitted": None, "_tracker": None, "_runs_in": None}

    def _refuse_damaged(self, state: Any) -> None:
        """Look at a state before any of it is used.

        Raises:
            ValueError: If a newer version of this package wrote it, or it is damaged.
        """
        schema = state.get("schema") if isinstance(state, Mapping) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise ValueError(
                f"the checkpoint's state of '{self.name}' has schema {schema}, newer than {SCHEMA}, the newest that "
                "this version of lightning_compress reads; upgrade the package"
            )
        problem = damage(state, _holds(type(self)))
        if problem is None and schema != SCHEMA:
            problem = f"'schema' must be {SCHEMA}, got {shown(schema)}"
        problem = problem or self.flaw(state)
        if problem is not None:
            self._refuse_state(problem)

    # Private

    def _is_elsewhere(self, trainer: Any) -> bool:
        """Whether it is at work in another Trainer."""
        other = self._runs_in
        return other is not None and other is not trainer and _compat.is_running(other)

    def _taught_moved(self, pl_module: Any) -> bool:
        """Whether a parameter that it teaches was written to since the fit began."""
        versions = _versions(pl_module)  # from here on FSDP2's shards are in place
        own = {id(parameter) for parameter in self.learners(pl_module)}
        moved = zip(list(pl_module.parameters()), self._versions, versions, strict=False)
        return any(before != now and id(parameter) in own for parameter, before, now in moved)

    def _waits(self, pl_module: Any) -> bool:
        """Whether it adds to losses that are asked for, had none so far, and what it teaches was not trained either."""
        if optimises_automatically(pl_module) or not self.expected_effects or self._missing() is None:
            return False
        return not self._taught_moved(pl_module)

    def _tell_of_lost_lessons(self, pl_module: Any, *, over: bool) -> None:
        """Warn where a step clears the gradients that its term gives, or they reach nobody; it may have its reasons.

        Args:
            pl_module: The module.
            over: Whether an epoch is over.
        """
        lesson = self._lesson
        problem = None if lesson is None else lesson.problem(over=over)
        if lesson is None or problem is None or not (lesson.passed_over or self._taught_moved(pl_module)):
            return  # its turn may not have come
        who = self.learners_name()
        self._warn_once(
            f"it seems to teach nothing: the gradients that losses with its term give to {who} {problem}. Ask for the "
            f"loss after which the optimizer of {who} steps, with callbacks=['{self.name}'] if the term is not there "
            "by itself, and give manual_backward what comes back; the loss of another network has callbacks=[]",
            kind="lesson",
        )
        lesson.close()
        self._lesson = None  # there is nothing else to be said

    def _tell_of_no_lesson(self) -> None:
        """At the end of a fit with manual optimisation, warn where what it teaches was never trained."""
        controller = self._controller
        if controller is None or controller.steps == 0 or optimises_automatically(controller.module):
            return
        missing = self._missing()
        if missing is not None:
            self._warn_once(f"no optimizer has trained what it teaches in this fit: {missing}")
        elif self._lesson is not None and not self._lesson.taken:
            self._warn_once("no optimizer was seen to take a gradient of its term in this fit", kind="lesson")

    def _refuse_state(self, problem: str) -> None:
        raise ValueError(
            f"the checkpoint's state of '{self.name}' ({type(self).__name__}) is damaged: {problem}; take another "
            "checkpoint, or begin a new training"
        )

    def has_moved(self, pl_module: Any) -> bool:
        """Whether a parameter was written to since the fit began."""
        return self._versions != _versions(pl_module)

    @contextmanager
    def _unseen(self, trainer: Any, pl_module: Any) -> Iterator[None]:
        """Write to parameters within, and take it back: nobody takes that for a training."""
        before = _versions(pl_module)
        yield
        writes = [now - then for now, then in zip(_versions(pl_module), before, strict=True)]
        for own in callbacks_of(trainer):
            own._versions = [version + more for version, more in zip(own._versions, writes, strict=False)]

    def has_fitted(self, pl_module: Any) -> bool:
        """Whether the last fit, or the one that goes on, is of this module."""
        return self._fitted is not None and self._fitted() is pl_module

    def _introduce(self, ours: list[CompressionCallback], trainer: Any) -> None:
        """Tell the loggers what is coming."""
        arguments = {own.name: {"class": type(own).__name__, **own._arguments()} for own in ours}
        self.tracker(trainer).define(goals(trainer.callbacks))
        self.tracker(trainer).settings(lambda: run_settings(arguments, recipe_of(ours)))

    def _check_strategy(self, strategy: Any) -> None:
        who, kind = type(self).__name__, type(strategy).__name__
        if is_of_kind(strategy, *UNSUPPORTED_STRATEGIES):
            more = "" if self.problem_with_shards() else f", or FSDP2 with {SHARDING_STRATEGY}"
            raise ValueError(f"{who} does not support {kind}; use one device or DDP{more}")
        if not is_of_kind(strategy, SHARDING_STRATEGY):
            return
        problem = self.problem_with_shards()
        if problem is not None:
            raise ValueError(f"{who} '{self.name}' does not work with {kind} (FSDP2): {problem}")
        tensor_parallel = strategy.device_mesh["tensor_parallel"].size()
        if tensor_parallel > 1:
            raise ValueError(
                f"{who} does not support tensor parallelism, and {kind} has tensor_parallel_size={tensor_parallel} "
                "('auto' takes all devices of a node): give it data_parallel_size=<number of processes> and "
                "tensor_parallel_size=1"
            )

    @staticmethod
    def _everywhere(trainer: Any, decision: bool) -> bool:
        """Whether all processes say so: what they do together must begin in the same batch on all."""
        return bool(trainer.strategy.reduce_boolean_decision(decision, all=True))

    def _check_effects(self, trainer: Any, pl_module: Any) -> None:
        if (missing := self._missing()) is not None:
            raise missing
        self.verify(trainer, pl_module)

    def _never_asked(self, pl_module: Any) -> bool:
        """Whether this process has trained, by hand, and no step of it has asked for a loss."""
        return self._require_controller().steps == 0 and self.has_moved(pl_module)

    def _check_asked(self, trainer: Any, pl_module: Any) -> None:
        if self._never_asked(pl_module):
            raise RuntimeError(
                f"{type(self).__name__} '{self.name}' had no effect: in a whole epoch "
                f"{class_name(pl_module)}.training_step never called self.compressed_loss(task_loss), and the "
                "parameters have moved"
            )

    def _missing(self) -> RuntimeError | None:
        """What there should have been in the first step, or, where each loss is asked for, so far."""
        automatic = self._controller is None or optimises_automatically(self._controller.module)
        period = "in the first step" if automatic else "so far"
        for effect in self.expected_effects:
            if self.effects[effect] == 0:
                message = f"{type(self).__name__} '{self.name}': {effect} had no effect {period}"
                if not automatic:
                    message += (
                        f": no loss that self.compressed_loss was asked for was computed from {self.learners_name()},"
                        f" or its callbacks= left '{self.name}' out; ask for that which is, and name all callbacks "
                        f"whose terms belong to it, '{self.name}' too, or leave callbacks= out"
                    )
                return RuntimeError(message)
        capture = self.student_capture
        if capture is not None and capture.required and capture.last_call is None:
            who = "module with parameters" if capture.names is None else "/".join(capture.names)
            called = f"called no {who}" if who else "never called the module itself"
            steps = "the first training step" if automatic else "all training steps so far"
            return CaptureError(
                f"{type(self).__name__} '{self.name}' needs the network's input, and {steps} {called}"
                f"{self._instead_of_input()}"
            )
        return None

    def _instead_of_input(self) -> str:
        """What can be given where the step does not call the network: the end of a sentence."""
        return ""

    def _check_optimisation(self, trainer: Any, pl_module: Any) -> None:
        if not optimises_automatically(pl_module) and not getattr(pl_module, "_lightning_compress_mixin", False):
            raise ValueError(
                f"{type(self).__name__} changes the step, and {class_name(pl_module)} optimises manually: let it "
                "inherit lightning_compress.CompressionMixin and call self.compressed_loss(task_loss) in its step"
            )
        self._tell_of_tuners(trainer)

    def _tell_of_tuners(self, trainer: Any) -> None:
        """They try steps before any callback is at work."""
        for callback in trainer.callbacks:
            if type(callback).__name__ in ("LearningRateFinder", "BatchSizeFinder"):
                warnings.warn(
                    f"{type(callback).__name__} sets all callbacks aside: what it finds belongs to the step without "
                    f"{type(self).__name__}",
                    stacklevel=3,
                )

    def _refuse_shrinking(self, trainer: Any, why: str, *, fine: Callable[[float], bool] = lambda until: False) -> None:
        """Refuse channels that go, unless that is fine until the fraction of the training at which the last do."""
        for other in trainer.callbacks:
            until = other.shrinks_until if isinstance(other, CompressionCallback) else None
            if until is not None and not fine(until):
                raise ValueError(f"'{other.name}' takes channels away until {until:g} of the training, and {why}")

    def _forget_scores(self, trainer: Any, earlier: str, now: str) -> None:
        """Let what chooses by the best so far begin anew, and say so."""
        self.tracker(trainer).forget(trainer.callback_metrics)
        if forget_bests(trainer):
            self._warn_once(
                f"the best checkpoints so far are of {earlier}, so they are not compared with what follows; their "
                "files stay"
            )
        self._wait_anew(trainer, now)

    def _wait_anew(self, trainer: Any, now: str) -> None:
        """Compare no score that is waited for with those of another network, and say so."""
        for kind in wait_anew(trainer):
            log.info("%s: %s begins to wait anew, with %s", self.name, kind, now)

    def _refuse_manual_shards(self, trainer: Any, pl_module: Any) -> None:
        """Refuse manual optimisation of sharded weights: their gradients do not all come at one time."""
        if shards(trainer) and not optimises_automatically(pl_module):
            raise ValueError(
                f"with {type(trainer.strategy).__name__} {type(self).__name__} works where Lightning optimises, and "
                f"{class_name(pl_module)} optimises manually; use one device or DDP"
            )

    def _refuse_separate(self, trainer: Any, weights: Mapping[str, torch.Tensor]) -> None:
        """Refuse weights that nobody named, of networks that optimizers train apart."""
        networks = separate_networks(trainer.optimizers, weights)
        if len(networks) > 1:
            every = [part for network in networks for part in network]
            raise ValueError(
                f"layers is not given, and '{self.name}' would change the weights of {len(networks)} networks that "
                f"different optimizers train, {' and '.join(listing(network) for network in networks)}: name those to "
                f"be changed, layers={networks[0]} for one of them, layers={every} for all"
            )

    def _refuse_foreign(self, trainer: Any, what: str, instead: str = "") -> None:
        """Refuse optimizers that are none of torch's."""
        if others := foreign(trainer.optimizers):
            raise ValueError(
                f"{type(self).__name__} '{self.name}' {what}, and {listing(others)} is no torch.optim.Optimizer: let "
                f"it inherit that{instead}"
            )

    def _refuse_passing_by(self) -> None:
        """Complain about a step of an optimizer that Lightning was not told of."""
        raise RuntimeError(
            f"{type(self).__name__} '{self.name}' had no effect on a step that an optimizer took without Lightning's "
            f"hooks: {_through_lightning(self._require_controller().module)}"
        )

    def _warn_once(self, message: str, kind: str | None = None) -> None:
        """Warn, once in a fit; of messages of one kind the first only."""
        if (kind or message) not in self._warned:
            self._warned.add(kind or message)
            warnings.warn(f"{type(self).__name__} '{self.name}': {message}", stacklevel=3)

    def _require_controller(self) -> StepController:
        if self._controller is None:
            raise RuntimeError(f"{type(self).__name__} is only active during a fit")
        return self._controller

    def _snapshot(self) -> dict[str, Any]:
        """Its attributes as they are, without what it has opened."""
        state = {key: ExitStack() if isinstance(value, ExitStack) else value for key, value in vars(self).items()}
        return {key: value for key, value in state.items() if key not in LOGGING_METHODS}

    def _close(self) -> None:
        stack, self._stack, self._controller, self._trainer = self._stack, None, None, None
        self._owned, self._owned_step = [], None
        if stack is None:
            return
        self.captured_sample = self.last_sample()
        self.student_capture = self._before_fit = None
        stack.close()

    def last_sample(self) -> CapturedSample | None:
        """What the network received last: in the fit that goes on, else in the last one."""
        capture = self.student_capture
        if capture is None or capture.network is None or capture.last_call is None:
            return self.captured_sample
        return CapturedSample(capture.network, capture.last_call.args, capture.last_call.kwargs)

    def _arguments(self) -> dict[str, Any]:
        names = [name for name in inspect.signature(type(self).__init__).parameters if name not in ("self", "name")]
        return {name: _primitive(getattr(self, name)) for name in names if hasattr(self, name)}


def _holds(cls: type) -> dict[str, Any]:
    """What the state of a callback holds, with that of its bases."""
    return {key: kind for base in reversed(cls.__mro__) for key, kind in vars(base).get("holds", {}).items()}


def _through_lightning(module: nn.Module) -> str:
    return (
        f"let {class_name(module)} step what self.optimizers() returns, or what its optimizer_step is given, not the "
        "torch optimizer inside"
    )


def _plan(trainer: Any, pl_module: Any) -> dict[str, Any]:
    return {name: intent.to_dict() for name, intent in intents(trainer, pl_module).items()}


def optimises_automatically(pl_module: Any) -> bool:
    """Whether Lightning runs the backward pass and the optimizers, and not the module's own step."""
    return bool(getattr(pl_module, "automatic_optimization", True))


def _versions(module: nn.Module) -> list[int]:
    """How often each parameter was written to."""
    shards_in_place(module)
    return [parameter._version for parameter in module.parameters()]


def built_later(pl_module: Any) -> bool:
    """Whether a module makes parts of it in ``configure_model``, after set-up."""
    return defines(pl_module, "configure_model")


def callbacks_of(trainer: Any) -> list[CompressionCallback]:
    """The callbacks of this package in a Trainer, in its order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, CompressionCallback)]


def announce(text: str) -> None:
    """Write to the terminal, whatever characters it has, if it is still there.

    Args:
        text: One line or several.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with suppress(AttributeError, OSError, ValueError):  # there is none, it has gone, or it is closed
        sys.stdout.write("\n" + text.encode(encoding, "replace").decode(encoding))


def _primitive(value: Any) -> Any:
    """A value that a checkpoint can hold without pickling: itself, or its name or type in words."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):  # subclasses, such as NumPy's, cannot be read back
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, (list, tuple)):
        return [_primitive(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): _primitive(entry) for key, entry in value.items()}
    if inspect.isfunction(value) or inspect.ismethod(value):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, functools.partial):
        return [_primitive(own) for own in (value.func, value.args, value.keywords)]
    return str(value) if isinstance(value, (torch.dtype, torch.device)) else type(value).__name__
