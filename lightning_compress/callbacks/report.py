"""The before/after table at the end of a fit: printed, logged, and written as JSON, Markdown and HTML."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_compress.callbacks.arguments import absolute_path, check_flag
from lightning_compress.callbacks.base import CompressionCallback, announce, callbacks_of, log
from lightning_compress.callbacks.intents import Intent
from lightning_compress.callbacks.ranks import shards, whole
from lightning_compress.callbacks.returned import Returned
from lightning_compress.export.copying import independent_copy, widen_
from lightning_compress.export.errors import ExportError, first_line
from lightning_compress.export.evaluate import evaluate, evaluate_forward, has_validation, samples_validated
from lightning_compress.export.onnx import ExportResult, checked_folder
from lightning_compress.export.sample import Sample
from lightning_compress.mechanisms.capture import NetworkCall
from lightning_compress.mechanisms.grids import Grids
from lightning_compress.mechanisms.selection import find_module, joined, plain_name
from lightning_compress.mechanisms.sharding import class_name
from lightning_compress.mechanisms.signs import sign
from lightning_compress.mechanisms.step import StepController
from lightning_compress.mechanisms.student import StudentCapture
from lightning_compress.mechanisms.teacher import Teacher
from lightning_compress.report import units
from lightning_compress.report.cells import shown_path
from lightning_compress.report.compare import compare, file_names
from lightning_compress.report.pictures import kept
from lightning_compress.report.render import for_terminal, to_markdown
from lightning_compress.report.table import ExportedFile, Picture, Report, Row, with_quantised
from lightning_compress.report.write import FILE_STEM, ReportFiles, write_report
from lightning_compress.tracking import Table


class CompressionReport(CompressionCallback):
    """Measure the network before and after the fit, the teacher, and every exported file.

    When it acts: it copies the module when the fit starts ("before"), and measures when everything else is done: bytes,
    multiply-accumulates, time (on the CPU, one thread, all in turn), and the metrics of the module's own validation.
    The table is printed, everything in it compared with the first teacher, or, where there is none, with "before"; its
    numbers go to every logger as ``compress/<name>/<row>/<quantity>``, and ``compression_report.json``, ``.md`` and
    ``.html`` are written. What it leaves alone: the module; all is measured on copies. Under ``fast_dev_run`` nothing
    is written.

    Args:
        path: Directory of the three files, relative to the working directory when the callback is made. ``None``: the
            folder of the run that the first logger has or, as for Lightning's checkpoints, ``<name>/<version>`` of that
            logger under its ``save_dir``; without loggers ``compression_report`` under the Trainer's root directory.
        latency: Whether to measure times; this takes about 10 seconds, or more where one call takes seconds.
        embed_pictures: Whether the report holds the pictures of the other callbacks. Those of attention transfer show
            samples of the validation data.
        name: As in the base class; default "report". Another name is added to the names of the files.

    Attributes:
        result: The report, on rank 0 after a fit.
        files: Where it was written.
        recipe: What the report keeps as the recipe that attached the callbacks.
        command: What it keeps as the command that did.

    Raises:
        TypeError: If ``path`` is neither a string nor a path.
        ValueError: If ``path`` is a file or not on this machine.

    Example:
        >>> CompressionReport(latency=False).state_key
        'CompressionReport[report]'
    """

    default_name = "report"
    without_fit = "nothing is measured here; lightning_compress.report.compare measures networks and files at any time"
    places = ("path",)
    result = Returned[Report | None](None)
    files = Returned[ReportFiles | None](None)

    def __init__(
        self,
        *,
        path: str | os.PathLike[str] | None = None,
        latency: bool = True,
        embed_pictures: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.path = absolute_path("path", path)
        if path is not None and "://" in os.fspath(path):
            raise ValueError(f"path must be a local directory, got '{os.fspath(path)}'")
        if self.path is not None and os.path.isfile(self.path):
            raise ValueError(f"path must be a directory, and '{path}' is a file")
        self.latency = check_flag("latency", latency)
        self.embed_pictures = check_flag("embed_pictures", embed_pictures)
        self.recipe: dict[str, Any] | None = None
        self.command: str | None = None
        self._before: nn.Module | None = None
        self._capture: StudentCapture | None = None
        self._notes: list[str] = []

    def intent(self, trainer: Any, pl_module: Any) -> Intent:
        """What it will measure."""
        timed = "sizes, metrics and times" if self.latency else "sizes and metrics"
        return Intent(type(self).__name__, notes=(f"{timed} are measured after the fit",))

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuse before training a directory that cannot be written."""
        if self.path is not None:
            checked_folder(self.path)

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """Keep the module as it is now, and record what its network receives."""
        self.result, self.files, self._before, self._notes = None, None, None, []
        self.student_capture = self._capture = controller.capture(None, required=False, argument="")
        if trainer.is_global_zero and not shards(trainer):
            self._keep(pl_module)
        if trainer.ckpt_path is not None:
            self._notes.append(f"The fit was resumed from {trainer.ckpt_path}: before is the module as it was there.")

    def problem_with_shards(self) -> str | None:
        """None: rank 0 measures copies that are not sharded."""
        return None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep the module as it is now where it is sharded: a checkpoint is restored within the fit then."""
        if shards(trainer):
            before = whole(trainer, pl_module)
            self._before = before if trainer.is_global_zero else None

    def leave(self) -> None:
        """As the base; drop the copy, and what the network received."""
        super().leave()
        self._before = self._capture = None

    def report(self, trainer: Any, pl_module: Any) -> None:
        """Measure, print, log and write; on rank 0."""
        directory = self._directory(trainer)  # on every rank: reading the log directory is a broadcast
        if not trainer.is_global_zero:
            return
        self.result = self._measured(trainer, pl_module)
        self._before = self._capture = None
        announce(for_terminal(self.result))
        self._log(trainer, self.result)
        if trainer.fast_dev_run:
            log.info("%s: fast_dev_run, so no file is written", self.name)
            return
        try:
            self.files = write_report(self.result, directory, self._stem())
        except OSError as error:  # the training itself went well, and the table was printed and logged
            warnings.warn(f"the report could not be written to '{directory}': {error}", stacklevel=2)
        else:
            announce(f"The same as a page: {shown_path(self.files.html)}\n")

    def _keep(self, pl_module: Any) -> None:
        """Copy the module, for the row "before"; the report does without where that is impossible."""
        problem = None
        if any(isinstance(parameter, nn.UninitializedParameter) for parameter in pl_module.parameters()):
            problem = f"{class_name(pl_module)} has lazy parameters without a shape"
        else:
            try:
                self._before = independent_copy(pl_module).cpu()
            except ExportError as error:
                problem = str(error)
        if problem is not None:
            self._notes.append(f"before was not measured: {problem}.")
            warnings.warn(f"the report will have no row 'before': {problem}", stacklevel=3)

    def _directory(self, trainer: Any) -> str:
        log_directory = trainer.log_dir if trainer.loggers else None
        if self.path is not None:
            return self.path
        root = str(trainer.default_root_dir)
        if trainer.loggers and log_directory == trainer.loggers[0].save_dir:  # which other runs share
            log_directory = _of_the_run(trainer.loggers[0], log_directory or root)
        roots = [os.path.abspath(entry) for entry in (root, os.curdir)]
        if log_directory is None or os.path.abspath(log_directory) in roots:  # not to be littered with our files
            log_directory = os.path.join(root, FILE_STEM)
        return FILE_STEM if "://" in log_directory else str(log_directory)

    def _stem(self) -> str:
        return FILE_STEM if self.name == self.default_name else f"{FILE_STEM}_{self.name}"

    def _measured(self, trainer: Any, pl_module: Any) -> Report:
        network, sample = self._network_and_sample(trainer, pl_module)
        callbacks = callbacks_of(trainer)
        notes = [*self._notes, *(remark for callback in callbacks for remark in callback.remarks())]
        if sample is None and self._capture is not None and self._capture.problem is not None:
            notes.append(f"No network was found: {self._capture.problem}.")
        if network:
            notes.append(f"Parameters, bytes and times are those of '{network}' inside {class_name(pl_module)}.")
        if self._before is None and shards(trainer):
            notes.append("before was not measured: the fit ran no step.")
        befores = [] if self._before is None else [("before", self._before)]
        models = _teachers(trainer)  # first, so ratios are to it: "before" may be random weights
        models |= {name: find_module(module, network, argument="network") for name, module in befores}
        models["after"] = find_module(pl_module, network, argument="network")
        every = _exports(trainer)
        exports = _by_name(own for own in every if plain_name(own.result.network) == plain_name(network))
        notes += [_of_another_part(own) for own in every if own not in exports.values()]
        metrics = self._metrics(trainer, pl_module, network, models, exports, notes)
        with sign(trainer, f"Measuring sizes{' and times' if self.latency else ''}"):
            report = compare(
                models,
                [callback.result for callback in exports.values()],
                sample=sample,
                metrics=metrics,
                latency=self.latency,
                compressed="after",
                prefix=network,
                notes=notes,
                recipe=self.recipe,
                bits=_bits(callbacks),
            )
        files = [_beside_fp32(file, callback) for file, callback in zip(report.files, exports.values(), strict=True)]
        left_out: list[str] = []
        sources = callbacks if self.embed_pictures else []
        pictures, too_many = kept(drawn for callback in sources for drawn in _drawn(callback, left_out))
        report = replace(
            report,
            files=tuple(files),
            notes=(*report.notes, *left_out, *too_many),
            command=self.command,
            pictures=pictures,
        )
        for callback in reversed(callbacks):  # each row goes directly below "after"
            grids, measured = getattr(callback, "quantization", None), getattr(callback, "metrics", {})
            if isinstance(grids, Grids) and measured:
                row = Row(f"after ({callback.name})", metrics=dict(measured))
                written = [own.result for own in exports.values() if _same(own.result.quantization, grids)]
                paths = [str(result.path) for result in written]
                report = with_quantised(report, row, of="after", files=paths)
        return report

    def _network_and_sample(self, trainer: Any, pl_module: Any) -> tuple[str, Sample | None]:
        """The network that the other callbacks worked on, else the one found here, and what it received last."""
        others = callbacks_of(trainer)
        others.sort(key=lambda callback: (callback.teacher_network is None, callback is self))
        for callback in others:
            seen = callback.captured_sample
            if seen is not None:
                return seen.network, Sample(seen.args, seen.kwargs)
        example = getattr(pl_module, "example_input_array", None)
        if example is None:
            return "", None
        if isinstance(example, dict):
            return "", Sample((), example)
        return "", Sample(example if isinstance(example, tuple) else (example,))

    def _metrics(
        self,
        trainer: Any,
        pl_module: Any,
        network: str,
        models: dict[str, nn.Module],
        exports: Mapping[str, Any],
        notes: list[str],
    ) -> dict[str, dict[str, float]]:
        """The metrics of each row; what a callback measured already is taken from there."""
        if not has_validation(pl_module, trainer):
            notes.append(f"There are no metrics: {class_name(pl_module)} has no validation here.")
            return {}
        metrics: dict[str, dict[str, float]] = {}
        for name, callback in exports.items():
            if callback.module_metrics and callback.result.quantization is None:
                metrics["after"] = callback.module_metrics
            metrics[name] = callback.file_metrics or _attempt(
                name, notes, evaluate, callback.result.path, pl_module, trainer
            )
        for name, model in models.items():
            if name not in metrics:
                owner = self._before if name == "before" else pl_module
                stand_in = None if name in ("before", "after") else model
                metrics[name] = _attempt(name, notes, _validated, owner, trainer, network, stand_in)
        if any(metrics.values()) and (samples := samples_validated(trainer)):
            notes.append(f"The metrics are of {samples:,} {'sample' if samples == 1 else 'samples'} of the validation.")
        return metrics

    def _log(self, trainer: Any, report: Report) -> None:
        """Numbers and the table to every logger, each in its own way."""
        rows = {row.name.replace("/", "_"): dict(_quantities(row)) for row in report.rows}
        columns = list(dict.fromkeys(quantity for row in rows.values() for quantity in row))
        table = Table(
            columns=["model", *columns],
            rows=[[name, *(row.get(quantity) for quantity in columns)] for name, row in rows.items()],
            markdown=to_markdown(report),
        )
        key, tracker = f"compress/{self.name}", self.tracker(trainer)
        tracker.numbers(
            {f"{key}/{name}/{quantity}": value for name, row in rows.items() for quantity, value in row.items()}
        )
        tracker.table(key, table)
        tracker.save()


class _Pipeline(nn.Module):
    """A teacher together with the transform that makes its input from the student's."""

    def __init__(self, teacher: nn.Module, transform: nn.Module) -> None:
        super().__init__()
        self.teacher, self.transform = teacher, transform

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return Teacher(self.teacher, self.transform)(NetworkCall(args, kwargs, None))


def _of_the_run(logger: Any, save_dir: str) -> str:
    """Where ``ModelCheckpoint`` has the folder of its checkpoints."""
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(save_dir, str(logger.name), version)


def _teachers(trainer: Any) -> dict[str, nn.Module]:
    """Each teacher once, under the name of its row."""
    found: dict[str, nn.Module] = {}
    seen: list[nn.Module] = []
    for callback in callbacks_of(trainer):
        teacher = callback.teacher_network
        if teacher is None or any(teacher is other for other in seen):
            continue
        seen.append(teacher)
        transform = getattr(callback, "teacher_transform", None)
        name = "teacher" if not found else f"teacher of {callback.name}"
        found[name] = teacher if transform is None else _Pipeline(teacher, transform)
    return found


def _drawn(callback: CompressionCallback, notes: list[str]) -> list[Picture]:
    """The pictures of a callback; a note where they cannot be drawn, for the numbers are not to be lost with them."""
    try:
        return callback.pictures()
    except Exception as error:
        notes.append(f"{callback.name}: its pictures were not drawn: {type(error).__name__}: {first_line(error)}.")
        return []


def _bits(callbacks: list[CompressionCallback]) -> dict[str, int]:
    """Bits of each layer that a callback has quantised, by its name in the module."""
    found = {}
    for callback in callbacks:
        grids = getattr(callback, "quantization", None)
        if isinstance(grids, Grids):
            for name, grid in grids.weights.items():
                found[joined(grids.network, name.rpartition(".")[0])] = grid.bits
    return found


def _same(written: Grids | None, grids: Grids) -> bool:
    """Whether a file has the grids of a callback; without the activations it is another network."""
    return written is not None and written.network == grids.network and written.activations == grids.activations


def _beside_fp32(file: ExportedFile, callback: Any) -> ExportedFile:
    """A file with its comparison with one in fp32, where that was made."""
    found = getattr(callback, "against_fp32", None)
    if found is None:
        return file
    speed = {"speed_fp32": found.speed, "speed_fp32_low": found.speed_low, "speed_fp32_high": found.speed_high}
    return replace(file, bytes_fp32=found.bytes_fp32, **speed)


def _exports(trainer: Any) -> list[Any]:
    """The callbacks that exported a file."""
    return [own for own in trainer.callbacks if isinstance(getattr(own, "result", None), ExportResult)]


def _by_name(exports: Iterable[Any]) -> dict[str, Any]:
    """Each under the name of its file's row."""
    found = list(exports)
    return dict(zip(file_names([own.result for own in found]), found, strict=True))


def _of_another_part(callback: Any) -> str:
    """What is to be said of a file that holds another part of the module than the one that the rows are of."""
    result = callback.result
    part = f"'{result.network}'" if result.network else "the whole module"
    known = [result.precision, units.size(result.bytes)]
    known += [f"{metric} {units.metric(value)}" for metric, value in callback.file_metrics.items()]
    return f"'{result.path.name}' holds {part} ({', '.join(known)}), so it is not compared with the rows."


def _validated(module: Any, trainer: Any, network: str, stand_in: nn.Module | None) -> dict[str, float]:
    """The metrics of a module, with a copy of another network in its network's place if one is given."""
    if stand_in is None:
        return evaluate_forward(module, trainer)
    other = widen_(independent_copy(stand_in).cpu().eval())

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return other(*args, **kwargs)

    return evaluate_forward(module, trainer, network, forward)


def _attempt(name: str, notes: list[str], measure: Callable[..., dict[str, float]], *args: Any) -> dict[str, float]:
    try:
        return measure(*args)
    except Exception as error:  # the user's validation may raise anything, the more with another network's output
        notes.append(f"The metrics of {name} were not measured: {type(error).__name__}: {first_line(error)}.")
        return {}


def _quantities(row: Row) -> Iterator[tuple[str, float]]:
    for quantity in ("parameters", "nonzeros", "macs", "bytes", "bytes_compressed"):
        value = getattr(row, quantity)
        if value is not None:
            yield quantity, float(value)
    if row.latency_ms is not None:
        yield "latency_ms", row.latency_ms.median
    yield from row.metrics.items()
