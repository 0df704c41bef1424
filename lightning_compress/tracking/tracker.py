"""The one place that writes to loggers: on rank 0, and never at the cost of the training."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_compress.export.errors import first_line
from lightning_compress.report.directions import Mode
from lightning_compress.tracking.exported import Exported
from lightning_compress.tracking.sinks import Picture, Sink, Table, sink_of

log = logging.getLogger("lightning_compress")


class Tracker:
    """Gives what is logged to every logger of a Trainer, each in its own way.

    On other ranks than 0, and under ``fast_dev_run``, it does nothing. What a logger raises is told once, as a warning,
    and the training goes on.

    Args:
        trainer: Whose loggers are meant.

    Example:
        >>> import tempfile, lightning as L
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     logger = CSVLogger(folder)
        ...     tracker = Tracker(L.Trainer(logger=logger, accelerator="cpu", enable_checkpointing=False))
        ...     tracker.numbers({"compress/dcil/sparsity": 0.9})
        ...     logger.experiment.metrics
        [{'compress/dcil/sparsity': 0.9, 'step': 0}]
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._settings: dict[str, Any] = {}
        self._goals: dict[str, Mode] = {}
        self._best: dict[str, float] = {}
        self._stale: dict[str, Any] = {}
        self._checkpoints: set[Path] = set()
        self._failed: set[int] = set()

    @property
    def sinks(self) -> list[Sink]:
        """What there is to write to, now."""
        if not self.trainer.is_global_zero:
            return []
        return [sink for logger in self.trainer.loggers if (sink := sink_of(logger)) is not None]

    @property
    def takes_pictures(self) -> bool:
        """Whether a picture would be seen: drawing takes time."""
        found: list[bool] = []
        self._each("pictures", lambda sink: found.append(sink.takes_pictures))
        return any(found)

    def define(self, goals: Mapping[str, Mode]) -> None:
        """Say what is going to be logged, and which metrics count.

        Args:
            goals: Name of a metric of the module's to "max" or "min".
        """
        self._goals, self._best, self._stale = dict(goals), {}, {}
        self._each("the definitions of metrics", lambda sink: sink.define())

    def forget(self, metrics: Mapping[str, Any]) -> None:
        """Compare nothing with the best values so far, nor with those that are known: they are of another network.

        Args:
            metrics: Those of now; one of the training stays among those of the next validation.
        """
        self._best, self._stale = {}, {name: metrics.get(name) for name in self._goals}

    def validated(self, metrics: Mapping[str, Any]) -> None:
        """Log the best value so far of each metric that counts, as ``compress/best/<metric>``.

        Args:
            metrics: Of a validation.
        """
        for name, way in self._goals.items():
            found = metrics.get(name)
            if found is None or is_one_metric(found, self._stale.get(name)):
                continue
            value = float(found)
            if not math.isnan(value):
                self._best[name] = (max if way == "max" else min)(value, self._best.get(name, value))
        if self._best:
            self.numbers({f"compress/best/{name}": value for name, value in self._best.items()})

    def settings(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """Add to what the run says of itself.

        Args:
            make: Gives primitives, as :func:`lightning_compress.tracking.run_settings` does; called if somebody takes
                them.
        """
        if not self.sinks:
            return
        try:
            self._settings.update(make())
        except Exception as error:  # a training is worth more than what is said of it
            warnings.warn(f"the configuration was not logged: {type(error).__name__}: {error}", stacklevel=3)
            return
        self._each("the configuration", lambda sink: sink.settings(self._settings))

    def numbers(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log several numbers.

        Args:
            values: Key to number.
            step: To which they belong; None: the optimizer steps so far.
        """
        at = self._step if step is None else step
        self._each(f"'{next(iter(values), 'compress')}'", lambda sink: sink.numbers(values, at))

    def picture(self, key: str, picture: Picture, *, newest: bool = False) -> None:
        """Log a picture.

        Args:
            key: Under which it is logged.
            picture: Shape (height, width, 3), 0 to 255.
            newest: Whether it holds all that earlier ones of this key do; of those that are files, one is kept then.
        """
        self._each(
            f"the picture '{key}'",
            lambda sink: sink.picture(key, picture, self._step, newest) if sink.takes_pictures else None,
        )

    def table(self, key: str, table: Table) -> None:
        """Log a table.

        Args:
            key: Under which it is logged.
            table: Its content.
        """
        self._each(f"the table '{key}'", lambda sink: sink.table(key, table, self._step))

    def exported(self, exported: Exported) -> None:
        """Log a file of the model, and the checkpoint that holds its weights, if there is one, each once.

        Args:
            exported: The file, and where it came from.
        """
        checkpoint = exported.source
        if checkpoint is not None and checkpoint not in self._checkpoints:
            self._checkpoints.add(checkpoint)
            self._each("the checkpoint", lambda sink: sink.checkpoint(checkpoint))
        self._each("the exported file", lambda sink: sink.exported(exported, self._step))

    def save(self) -> None:
        """Let loggers write what they have."""
        self._each("what it has", lambda sink: sink.save())

    @property
    def _step(self) -> int:
        return int(self.trainer.global_step)

    def _each(self, what: str, work: Callable[[Sink], None]) -> None:
        for sink in self.sinks:
            self._try(sink, what, work)

    def _try(self, sink: Sink, what: str, work: Callable[[Sink], None]) -> None:
        try:
            work(sink)
        except Exception as error:  # a service may fail in any way, and a training is worth more than its log
            self._tell(sink.logger, what, error)

    def _tell(self, logger: Any, what: str, error: Exception) -> None:
        if id(logger) in self._failed:
            log.debug("%s did not take %s", type(logger).__name__, what, exc_info=True)
            return
        self._failed.add(id(logger))
        warnings.warn(
            f"{type(logger).__name__} did not take {what}: {type(error).__name__}: {first_line(error)}. The training "
            "goes on, and what else this logger may not take is not told",
            stacklevel=5,
        )


def is_one_metric(found: Any, known: Any) -> bool:
    """Whether two entries of ``callback_metrics`` are one value: Lightning may make a new view of it each time.

    Args:
        found: That of now.
        known: That of earlier, kept since.

    Example:
        >>> import torch
        >>> value = torch.tensor(0.5)
        >>> is_one_metric(value.detach(), value), is_one_metric(value.clone(), value)
        (True, False)
    """
    if found is None:
        return False
    tensors = isinstance(found, Tensor) and isinstance(known, Tensor)
    return bool(found.data_ptr() == known.data_ptr()) if tensors else found is known
