"""The child's side of ``lightning-compress run``: attach a recipe to a fit of a script that knows nothing of it.

Every Trainer of the script gets one light callback. When a fit starts it decides whether the recipe means this fit,
and only then builds the recipe's callbacks. What happened is written to a file that the parent reads.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback
from torch.multiprocessing.spawn import ProcessRaisedException

from lightning_compress._compat import asks_wandb, is_tuner_fit, wandb_would_fail
from lightning_compress.callbacks.base import TrainerCallback, callbacks_of
from lightning_compress.callbacks.export import ExportCallback
from lightning_compress.callbacks.report import CompressionReport
from lightning_compress.export.evaluate import RUN_VARIABLE
from lightning_compress.mechanisms.metrics import logged_as
from lightning_compress.recipe import Recipe, RecipeError, build_callbacks, load_recipe
from lightning_compress.recipe.file import naming

KEPT_OFFLINE = "LIGHTNING_COMPRESS_OFFLINE"
"""Of the environment too: that it was not the user who keeps wandb offline, and that nobody has been told."""


@dataclass(frozen=True)
class Events:
    """What happened in the child, one JSON object a line, with empty lines between.

    Attributes:
        path: The file; made on the first event.
    """

    path: str

    def append(self, event: str, **fields: Any) -> None:
        """Add an event; the line is written in one piece, so that several processes may write.

        Args:
            event: "factory", "fit", "planned", "done" or "failed".
            **fields: What JSON can hold.

        Raises:
            OSError: If it cannot be written.
        """
        line = "\n" + json.dumps({"event": event, **fields}) + "\n"  # begun anew: the last one may have been cut off
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            whole = os.write(descriptor, line.encode()) == len(line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from error
        finally:
            os.close(descriptor)
        if not whole:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)

    def read(self) -> list[dict[str, Any]]:
        """All events so far, in their order; none where there is no file.

        A line that was not written to its end, as by a process that was killed, or on a full disk, is passed over.
        """
        found = []
        lines = Path(self.path).read_text(encoding="utf-8").splitlines() if os.path.exists(self.path) else []
        for line in lines:
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found


@dataclass(frozen=True)
class Order:
    """What the parent asks of every Trainer in the child; the value of the environment variable.

    Attributes:
        recipe: Path of the recipe, for messages and the report; what is attached is the :attr:`held` text.
        cwd: Where the command was called; relative paths in the recipe start there.
        events: Path of the file of events.
        settings: ``KEY=VALUE`` each, which change the recipe.
        mode: "run"; or "plan", which ends the fit, and the process, with the first batch.
        command: What was called, for the report.
    """

    recipe: str
    cwd: str
    events: str
    settings: Sequence[str] = ()
    mode: str = "run"
    command: str | None = None

    @property
    def held(self) -> Path:
        """The recipe's text as the parent checked it; the user may write the next recipe while this one trains."""
        return Path(self.events).with_name("recipe.yaml")

    def to_json(self) -> str:
        """The value of the environment variable."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, value: str) -> Order:
        """Read the value of the environment variable.

        Raises:
            RuntimeError: If the parent did not write it.
        """
        try:
            return cls(**json.loads(value))
        except (ValueError, TypeError) as error:
            raise RuntimeError(
                f"the environment variable {RUN_VARIABLE} holds {value!r}, which `lightning-compress run` did not "
                "write; unset it"
            ) from error


def attachments(value: str) -> list[Callback]:
    """The callbacks for a Trainer under construction.

    For a run, Weights & Biases is kept offline in this process if a run of it would fail, as nobody is logged in.

    Args:
        value: Of the environment variable that ``lightning-compress run`` sets.

    Returns:
        One :class:`RecipeAttachment`; for a plan, one that ends the process.

    Raises:
        RuntimeError: If ``value`` was not written by ``lightning-compress run``.

    Example:
        >>> import tempfile
        >>> from unittest.mock import patch
        >>> with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ):
        ...     order = Order("recipe.yaml", ".", os.path.join(folder, "events.jsonl"))
        ...     names = [type(callback).__name__ for callback in attachments(order.to_json())]
        ...     names, Events(order.events).read()
        (['RecipeAttachment'], [{'event': 'factory'}])
    """
    order = Order.from_json(value)
    if process_rank() == 0:
        Events(order.events).append("factory")
    if order.mode == "plan":
        from lightning_compress.commands.foresight import PlanAttachment, foreseeing_fits

        foreseeing_fits()
        return [PlanAttachment(order)]
    if wandb_would_fail():  # in the first look at a logger, before any hook
        os.environ.update(WANDB_MODE="offline", **{KEPT_OFFLINE: "1"})
    return [RecipeAttachment(order)]


def process_rank() -> int:
    """The rank of this process, also where no Trainer has been set up."""
    return int(getattr(rank_zero_only, "rank", 0))


class RecipeAttachment(TrainerCallback):
    """Attach a recipe to the fit that it means.

    When it acts: in ``setup`` of each fit. The recipe's callbacks are put right behind this one, so Lightning goes on
    to set them up too, and checkpoints come after them. They stay with the Trainer until its next fit, as callbacks
    given in Python do: a checkpoint saved or tested after the fit knows their state. What it leaves alone: Trainers
    that only validate, test or predict, and the fits that a ``Tuner`` starts.

    Args:
        order: What the parent asked for.
    """

    def __init__(self, order: Order) -> None:
        super().__init__()
        self.order = order
        self._events = Events(order.events)
        self._script = os.getpid()  # of the process that runs the script, also in a process that this one spawns
        self._inserted: list[Callback] = []
        self._active = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Decide whether the recipe means this fit, and attach it."""
        if stage != "fit" or is_tuner_fit(trainer) or self._repeats_another(trainer):
            return
        _tell_of_offline_runs(trainer)
        # in place: Lightning is iterating this list
        trainer.callbacks[:] = [callback for callback in trainer.callbacks if callback not in self._inserted]
        self._inserted = []
        self._active = True  # whatever is raised from here on is reported
        with script_under_its_name():
            recipe = self._recipe()
            with naming(recipe.path):
                self._active = self._is_meant(recipe, trainer, pl_module)
            if self._active:
                has_report = any(isinstance(callback, CompressionReport) for callback in trainer.callbacks)
                built = build_callbacks(recipe, self.order.cwd, add_report=not has_report)
                for callback in built:
                    if isinstance(callback, CompressionReport):
                        callback.command = self.order.command
                with naming(recipe.path):
                    self._insert(built, trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Tell the parent what was written; the end of the fit is over."""
        if stage == "fit" and self._active:
            self._active = False
            self._tell(trainer, "done", exports=_exports(trainer), reports=_reports(trainer), checks=_checks(trainer))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Tell the parent what went wrong."""
        if self._active:
            self._active = False
            self._tell(trainer, "failed", message=described(exception))

    def _recipe(self) -> Recipe:
        """What the parent asked for, wherever the script has gone since."""
        text = self.order.held.read_text(encoding="utf-8")
        return load_recipe(self.order.recipe, settings=self.order.settings, cwd=self.order.cwd, text=text)

    def _tell(self, trainer: Any, event: str, **fields: Any) -> None:
        """Tell the parent, if that can be done: what was trained is worth more, and so is the error of the training."""
        if not trainer.is_global_zero:
            return
        try:
            self._events.append(event, script=self._script, **fields)
        except OSError as error:
            warnings.warn(f"`lightning-compress run` was not told how the fit ended: {error}", stacklevel=2)

    def _repeats_another(self, trainer: Any) -> bool:
        """Whether the list that the user gave to several Trainers holds one of us already: Lightning extends it."""
        return next(callback for callback in trainer.callbacks if isinstance(callback, RecipeAttachment)) is not self

    def _is_meant(self, recipe: Recipe, trainer: Any, pl_module: Any) -> bool:
        """The decision of rank 0, which alone knows the earlier fits, on every rank."""
        decision: tuple[bool, str] = (False, "")
        if trainer.is_global_zero:
            decision = self._decided(recipe, type(pl_module))
        meant, problem = trainer.strategy.broadcast(decision)
        if problem:
            raise RecipeError(problem)
        return bool(meant)

    def _decided(self, recipe: Recipe, module_class: type) -> tuple[bool, str]:
        """Whether the recipe means this fit, and what is wrong with it.

        Each process that runs the script counts for itself: those of one training repeat what comes before it.
        """
        apply_to = recipe.apply_to or {}
        matches = apply_to.get("module") in (None, *class_names(module_class))
        fits = [event for event in self._events.read() if event["event"] == "fit" and event["script"] == self._script]
        earlier = sum(event["matches"] for event in fits)
        meant = matches and apply_to.get("fit", earlier + 1) == earlier + 1
        name = class_names(module_class)[0]
        rank = process_rank()
        self._events.append("fit", module=name, matches=matches, attached=meant, script=self._script, rank=rank)
        if meant and rank == 0 and self._is_taken():
            return False, (
                f"a fit of {name} begins, and a fit in another process of the command has the recipe already: both "
                "would write the same files; start the fits one by one, or say which one is meant with apply_to: "
                "{module: <class>}"
            )
        if meant and earlier and "fit" not in apply_to:
            return False, (
                f"the script fits {name} now, and the recipe was attached to an earlier fit already; say which one is "
                "meant with apply_to: {module: <class>}, or by its number with apply_to: {fit: 1}"
            )
        return meant, ""

    def _is_taken(self) -> bool:
        """Whether a fit in another process, that began earlier, runs with the recipe or came to its end with it.

        Other ranks of this training repeat what comes before it. Of a process that died, this may be the next attempt.
        """
        fits = [event for event in self._events.read() if event["event"] == "fit" and event["attached"]]
        before = itertools.takewhile(lambda fit: fit["script"] != self._script, fits)
        return any(self._has_fitted(fit["script"]) for fit in before if fit["rank"] == 0)

    def _has_fitted(self, script: int) -> bool:
        try:
            os.kill(script, 0)
        except ProcessLookupError:
            return any(event["event"] == "done" and event["script"] == script for event in self._events.read())
        except PermissionError:
            pass
        return True

    def _insert(self, built: list[Callback], trainer: Any, pl_module: Any) -> None:
        taken = {callback.state_key for callback in trainer.callbacks}
        for callback in built:
            if callback.state_key in taken:
                raise RecipeError(
                    f"there are two callbacks {callback.state_key}, in the script's Trainer or in the recipe; give the "
                    "recipe's another name in its init_args, or leave it out"
                )
            taken.add(callback.state_key)
            vars(callback).update(log=pl_module.log, log_dict=pl_module.log_dict)  # as the Trainer did for the others
        position = trainer.callbacks.index(self) + 1
        trainer.callbacks[position:position] = built
        self._inserted = built


def _tell_of_offline_runs(trainer: Any) -> None:
    """Warn once, if a run would be online had there been a key."""
    if not (trainer.is_global_zero and any(map(asks_wandb, trainer.loggers)) and os.environ.pop(KEPT_OFFLINE, None)):
        return
    warnings.warn(
        "nobody is logged in to Weights & Biases, and there is no terminal to ask for a key, so the run is kept "
        "offline: `wandb sync` sends it later. Log in with `wandb login`, or set WANDB_API_KEY",
        stacklevel=2,
    )


def described(error: BaseException) -> str:
    r"""What the parent is told of an exception.

    Args:
        error: One that a fit has ended with.

    Returns:
        Its type and its message; of one in a spawned process, those that its trace ends with.

    Example:
        >>> described(ValueError("first\nsecond")), described(KeyboardInterrupt())
        ('ValueError: first\nsecond', 'KeyboardInterrupt')
    """
    if isinstance(error, ProcessRaisedException):
        trace = str(error).rpartition("Traceback (most recent call last):\n")[2]
        return "\n".join(dropwhile(lambda line: line.startswith(" "), trace.splitlines())).strip()
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def class_names(module_class: type) -> tuple[str, ...]:
    """The names under which ``apply_to`` may ask for a class.

    Args:
        module_class: Of a LightningModule.

    Returns:
        Its dotted path, its name, and for a class of the script that runs the path under the script's own name.

    Example:
        >>> class_names(Recipe)
        ('lightning_compress.recipe.Recipe', 'Recipe')
    """
    name = module_class.__qualname__
    if module_class.__module__ != "__main__":
        return f"{module_class.__module__}.{name}", name
    return f"__main__.{name}", name, f"{_script_name()}.{name}"


@contextmanager
def script_under_its_name() -> Iterator[None]:
    """Let ``train.Net`` mean a class of the running script: importing ``train`` would run the script a second time.

    Example:
        >>> from types import ModuleType
        >>> from unittest.mock import patch
        >>> script = ModuleType("__main__")
        >>> script.__file__ = "train.py"
        >>> with patch.dict(sys.modules, {"__main__": script}), script_under_its_name():
        ...     import train
        ...
        ...     train is script
        True
    """
    name = _script_name()
    if not name or name in sys.modules:
        yield
        return
    sys.modules[name] = sys.modules["__main__"]
    try:
        yield
    finally:
        del sys.modules[name]


def _script_name() -> str:
    """How the script that runs would be imported; empty for what cannot be."""
    main = sys.modules["__main__"]
    if getattr(main, "__spec__", None) is not None:  # python -m package.train
        return str(main.__spec__.name)  # type: ignore[union-attr]
    return Path(getattr(main, "__file__", None) or "").stem


def _exports(trainer: Any) -> list[dict[str, Any]]:
    """What each export wrote, and what is wrong with it."""
    found = []
    for callback in trainer.callbacks:
        if isinstance(callback, ExportCallback):
            result, metric = callback.result, callback.metric
            name = None if metric is None else logged_as(metric, callback.file_metrics)
            found.append(
                {
                    "path": callback.path,
                    "bytes": None if result is None else result.bytes,
                    "kept": not trainer.fast_dev_run,
                    "metric": metric,
                    "in_file": None if name is None else callback.file_metrics[name],
                    "in_module": None if name is None else callback.module_metrics[name],
                    "failure": "no file was written" if result is None else callback.failure,
                }
            )
    return found


def _checks(trainer: Any) -> list[str]:
    """What went wrong with the other techniques."""
    others = [callback for callback in callbacks_of(trainer) if not isinstance(callback, ExportCallback)]
    return [f"{callback.name}: {callback.failure}" for callback in others if callback.failure]


def _reports(trainer: Any) -> list[str]:
    """The directories of the reports."""
    callbacks = [callback for callback in trainer.callbacks if isinstance(callback, CompressionReport)]
    return [str(callback.files.html.parent) for callback in callbacks if callback.files is not None]
