"""Export at the end of a fit: the file, checked against the module and through the module's own validation."""

from __future__ import annotations

import inspect
import os
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

from lightning_compress import _compat
from lightning_compress.callbacks.arguments import (
    absolute_path,
    check_at_least_zero,
    check_flag,
    check_name,
    check_path,
)
from lightning_compress.callbacks.base import CapturedSample, CompressionCallback, callbacks_of, log
from lightning_compress.callbacks.intents import Intent
from lightning_compress.callbacks.ranks import shards, whole
from lightning_compress.callbacks.returned import Returned
from lightning_compress.export.errors import ExportError, first_line
from lightning_compress.export.evaluate import Choices, evaluate, evaluate_forward, evaluate_quantized, has_validation
from lightning_compress.export.onnx import ExportResult, checked_path, checked_precision, write_onnx
from lightning_compress.export.runtime import require_onnx
from lightning_compress.export.sample import Sample, as_sample, check_sample_type
from lightning_compress.export.scales import HOW, Scales, given_steps
from lightning_compress.functional.quantizers import MOST_BITS
from lightning_compress.mechanisms.isolation import on_device
from lightning_compress.mechanisms.metrics import logged_as
from lightning_compress.mechanisms.replay import replay
from lightning_compress.mechanisms.selection import did_you_mean
from lightning_compress.mechanisms.sharding import class_name
from lightning_compress.mechanisms.signs import sign
from lightning_compress.mechanisms.step import StepController, step_controller
from lightning_compress.report import units
from lightning_compress.report.measure import compressed_bytes, count_nonzeros, count_parameters
from lightning_compress.report.precision import AgainstFp32, against_fp32
from lightning_compress.tracking import Exported, checkpoint_of, recipe_of

SPARSE = 0.9
"""A share of weights that are not zero, below which it matters how small a file is once it is compressed."""
FEW_AGREE = 0.95
"""A share of equal choices below which something is amiss, or the network undecided."""


class ExportCallback(CompressionCallback):
    """Write the trained network as an ONNX file, and check it.

    When it acts: after the fit, when every other callback has finished with the weights. The file is compared with the
    module at several batch sizes, and run through the module's own validation in the network's place. What it leaves
    alone: the module; all is done on copies.

    Args:
        path: Where to write; relative paths, here and of ``sample``, are taken from the working directory when the
            callback is made.
        precision: "fp32"; "int8" or "int4", with the scales of a ``PTQCallback``, a ``QATCallback`` or a
            ``PSGDCallback`` beside this one.
        metric: Name of a validation metric, as the module logs it, to be compared between module and file.
        tolerance: Largest accepted absolute difference of ``metric``; None: reported only. Beyond it a warning, and
            exit code 1 from ``lightning-compress run``.
        sample: Input of the network for tracing, as in :func:`lightning_compress.export.to_onnx`, or a .pt or .npy file
            of it; None: what the network received in the last training step.
        network: Dotted name of the network inside the LightningModule; None: the student that another callback
            names, else the one found in the first step.
        dynamic_batch: Whether the file takes any batch size; False for networks that run at one only.
        fp32_comparison: Whether an integer file is compared in bytes and time with one in fp32, for 5 seconds.
        name: As in the base class; default "export".

    Attributes:
        result: What was written, after a fit.
        module_metrics: Of the compressed module, quantised as the file is.
        file_metrics: Of the file, in the same validation.
        agreement: The share of the validation for which the file chooses the same class as the quantised module.
        against_fp32: A file of lower precision beside one of the same network in fp32.

    Raises:
        TypeError: If ``path`` is neither a string nor a path.
        ValueError: If ``precision``, ``tolerance`` or ``path`` is not accepted.
        ImportError: At the start of the fit, if the extra ``onnx`` is not installed.

    Example:
        >>> ExportCallback("model.onnx", metric="val_acc", tolerance=0.01).state_key
        'ExportCallback[export]'
    """

    default_name = "export"
    without_fit = "no file is written here; lightning_compress.export.to_onnx writes one at any time"
    places = ("path",)
    result = Returned[ExportResult | None](None)
    module_metrics = Returned[Mapping[str, float]](MappingProxyType({}))
    file_metrics = Returned[Mapping[str, float]](MappingProxyType({}))
    agreement = Returned[float | None](None)
    against_fp32 = Returned[AgainstFp32 | None](None)

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        precision: str = "fp32",
        metric: str | None = None,
        tolerance: float | None = None,
        sample: Any = None,
        network: str | None = None,
        dynamic_batch: bool = True,
        fp32_comparison: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        checked_precision(precision)
        self.tolerance = None if tolerance is None else check_at_least_zero("tolerance", tolerance)
        self.metric = check_name("metric", metric, what="the name of a metric", may_be_empty=False)
        if tolerance is not None and metric is None:
            raise ValueError(f"tolerance={tolerance} says how far a metric may move, but metric is not given")
        self.path = os.path.abspath(check_path("path", path))
        self.precision = precision
        if sample is not None:
            check_sample_type(sample)
        self.sample = absolute_path("sample", sample) if isinstance(sample, (str, os.PathLike)) else sample
        self.network = check_name("network", network)
        self.dynamic_batch = check_flag("dynamic_batch", dynamic_batch)
        self.fp32_comparison = check_flag("fp32_comparison", fp32_comparison)
        self.module_metrics, self.file_metrics = {}, {}
        self.trial_bytes: int | None = None
        """Of the file that was tried in the first step."""
        self.trial_compressed: int | None = None
        """The same after deflate, about, where the fit is only planned and the network will be sparse."""
        self._draft: tempfile.TemporaryDirectory[str] | None = None
        self._better: str | None = None

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuse before training what would fail after it."""
        require_onnx()
        checked_path(self.path)
        for other in trainer.callbacks:
            if other is not self and isinstance(other, ExportCallback) and other.path == self.path:
                raise ValueError(f"'{self.name}' and '{other.name}' both write '{self.path}'; give one another path")
        if self.precision != "fp32":
            bits = [own for callback in trainer.callbacks if (own := _weight_bits(callback)) is not None]
            if not bits:
                raise ValueError(f"precision '{self.precision}' needs scales, and no callback gives them; {HOW}")
            if self.precision == "int4" and min(bits) > 4:
                raise ValueError(
                    f"precision 'int4' needs weights of at most 4 bits, and the callbacks give {min(bits)}: give "
                    "PTQCallback or QATCallback weight_bits=4"
                )
        if self.precision == "int4":
            self._tell_of_activations(trainer)
        if self.precision == "fp32":
            self._tell_of_grids(trainer)
        if self.sample is not None:
            as_sample(self.sample, inspect.Signature())  # before the forward that it is for is known
        self._require_validation(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Where the first epoch is validated, it is known by now whether there are batches for it."""
        self._require_validation(trainer, pl_module)

    def problem_with_shards(self) -> str | None:
        """None: rank 0 exports a copy that is not sharded."""
        return None

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """Record what the network receives."""
        self.result, self.trial_bytes, self.trial_compressed = None, None, None
        self.module_metrics, self.file_metrics, self.agreement, self.against_fp32 = {}, {}, None, None
        self.student_capture = controller.capture(self.network, required=self.sample is None, argument="network")

    def verify(self, trainer: Any, pl_module: Any) -> None:
        """After the first step, export once into a temporary folder: what cannot be written is not trained for."""
        names = self.student_capture.names if self.student_capture is not None else None
        self._refuse_chain(names if self.network is None else None)
        scales = self._trial_scales(trainer) if trainer.is_global_zero or shards(trainer) else None
        module = whole(trainer, pl_module)
        if trainer.is_global_zero:
            with (
                tempfile.TemporaryDirectory() as folder,
                sign(trainer, f"Trying to export {os.path.basename(self.path)}"),
            ):
                path = os.path.join(folder, "trial.onnx")
                self.trial_bytes = self._written(module, path, self.precision, scales).bytes
                if self.planning and count_nonzeros(module) < SPARSE * count_parameters(module):
                    self.trial_compressed = compressed_bytes(path, level=6)

    def intent(self, trainer: Any, pl_module: Any) -> Intent:
        """What it will write."""
        aims = {"precision": self.precision, "metric": self.metric, "tolerance": self.tolerance}
        return Intent(type(self).__name__, aims={aim: value for aim, value in aims.items() if value is not None})

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """As soon as the metrics are known, complain about a name that is none of them.

        In the sanity check, before training, it is an error; later, when a training would be lost, a warning.
        """
        super().on_validation_end(trainer, pl_module)
        known = _compat.logged_names(trainer)
        if self.student_capture is None or self.metric is None or self.metric in known or not known:
            return
        message = (
            f"metric='{self.metric}' is not logged by {class_name(pl_module)}, which logs {sorted(known)}"
            f"{did_you_mean(self.metric, known)}"
        )
        if trainer.sanity_checking:
            raise ValueError(f"{message}; give num_sanity_val_steps=0 if it logs it, but not in the sanity check")
        self._warn_once(message)

    def export(self, trainer: Any, pl_module: Any) -> None:
        """Write and check the file, on rank 0; under ``fast_dev_run`` in a temporary folder."""
        if not trainer.is_global_zero:
            return
        path = self.path
        if self.sample is None and self.last_sample() is None and _compat.has_training_data(trainer):
            self.captured_sample = self._replayed_sample(trainer, pl_module)
        if trainer.fast_dev_run:
            self._draft = tempfile.TemporaryDirectory()
            path = os.path.join(self._draft.name, os.path.basename(self.path))
            log.info("%s: fast_dev_run, so the file is checked and not kept", self.name)
        try:
            with sign(trainer, f"Exporting {os.path.basename(path)}"):
                self.result = self._written(pl_module, path, self.precision)
        except Exception as error:
            self.failure = f"{os.path.basename(path)} was not written: {first_line(error)}"
            raise
        log.info("%s: wrote %s (%d bytes, %s)", self.name, self.result.path, self.result.bytes, self.precision)
        self._better = _better_checkpoint(trainer)
        if self.precision != "fp32" and self.fp32_comparison and not trainer.fast_dev_run:
            with sign(trainer, f"Comparing {os.path.basename(path)} with a file in fp32"):
                self._compare(pl_module, self.result)

    def _replayed_sample(self, trainer: Any, pl_module: Any) -> CapturedSample:
        """What a step gives the network, where a fit that was resumed at its end ran none."""
        with (
            on_device(pl_module, trainer.strategy.root_device),  # at the end of a fit Lightning has moved it to the CPU
            step_controller(pl_module) as controller,
            replay(controller, trainer, trainer.precision_plugin.train_step_context) as again,
        ):
            names = again.students(argument="network") if self.network is None else (self.network,)
            self._refuse_chain(names)
            call, _ = again.first_received(names, argument="network")
        return CapturedSample(names[0], call.args, call.kwargs)

    def _compare(self, pl_module: Any, result: ExportResult) -> None:
        """Beside a file in fp32; without it the training is none the worse."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                plain = self._written(pl_module, os.path.join(folder, "plain.onnx"), "fp32")
                self.against_fp32 = against_fp32(result, plain)
        except (OSError, ExportError) as error:
            warnings.warn(f"{result.path} was not compared with a file in fp32: {error}", stacklevel=2)
            return
        log.info("%s: %s", self.name, self.against_fp32)

    def leave(self) -> None:
        """As the base; drop what ``fast_dev_run`` wrote."""
        super().leave()
        if self._draft is not None:
            self._draft.cleanup()
            self._draft = None

    def evaluate(self, trainer: Any, pl_module: Any) -> None:
        """Run module and file through the module's own validation, on rank 0."""
        if not trainer.is_global_zero or self.result is None:
            return
        if not has_validation(pl_module, trainer):
            log.info("%s: %s has no validation, so the file has no metrics", self.name, class_name(pl_module))
            if self.metric is not None:
                self._fail(self._not_validated(pl_module))
            return
        try:
            if self.result.quantization is None:
                self.module_metrics = evaluate_forward(pl_module, trainer)
                self.file_metrics = evaluate(self.result.path, pl_module, trainer)
            else:
                module_choices, file_choices = Choices(), Choices()
                grids = self.result.quantization
                self.module_metrics = evaluate_quantized(pl_module, trainer, grids, seen=module_choices)
                self.file_metrics = evaluate(self.result.path, pl_module, trainer, seen=file_choices)
                self.agreement = module_choices.agreement(file_choices)
        except Exception as error:  # the user's validation may need what only the fit has; the training went well
            self._fail(f"the validation through {self.result.path} failed: {type(error).__name__}: {error}")
            return
        if self.metric is None:
            return
        name = logged_as(self.metric, self.file_metrics)
        if name is None:
            self._fail(
                f"metric='{self.metric}' is not among the validation metrics {sorted(self.file_metrics)}"
                f"{did_you_mean(self.metric, self.file_metrics)}"
            )
            return
        ours, theirs = self.module_metrics[name], self.file_metrics[name]
        log.info("%s: %s is %.6g in the module and %.6g in the file", self.name, self.metric, ours, theirs)
        if self.tolerance is not None and not abs(theirs - ours) <= self.tolerance:  # NaN fails too
            self._fail(
                f"{self.metric} is {theirs:.6g} in the file {self.result.path} and {ours:.6g} in the module: the "
                f"difference {abs(theirs - ours):.3g} is beyond the tolerance of {self.tolerance:g}"
            )

    def report(self, trainer: Any, pl_module: Any) -> None:
        """Give loggers the numbers of the file, and the file, with the checkpoint it came from."""
        if self.result is not None and not trainer.fast_dev_run:
            numbers = {**self.file_metrics, "bytes": float(self.result.bytes)}
            name = None if self.metric is None else logged_as(self.metric, self.file_metrics)
            if self.metric is not None and name is not None:  # a sweep looks for it as the user calls it
                numbers[self.metric] = self.file_metrics[name]
            self.tracker(trainer).numbers({f"compress/{self.name}/{key}": value for key, value in numbers.items()})
            self.tracker(trainer).exported(
                Exported(
                    self.result,
                    callback=self.name,
                    metrics=self.file_metrics,
                    recipe=recipe_of(trainer.callbacks),
                    checkpoint=checkpoint_of(trainer),
                    trained_steps=trainer.global_step,
                    module=pl_module,
                    failure=self.failure,
                )
            )

    def remarks(self) -> list[str]:
        """How the file agrees with the quantised module, and how it compares with one in fp32."""
        remarks = [] if self.result is not None or self.failure is None else [f"{self.name}: {self.failure}."]
        if self.agreement is not None:
            usual = " That is little: at 8 bits 99% and more are usual." if self.agreement < FEW_AGREE else ""
            remarks.append(
                f"{self.name}: for {self.agreement:.2%} of the validation data the file chooses the class that the "
                f"quantised module chooses.{usual}"
            )
        if self.against_fp32 is not None:
            remarks.append(f"{self.name}: {self.against_fp32}.")
        if self._better is not None and self.result is not None:
            remarks.append(f"{self.name}: the file has the weights of the end; {self._better}.")
        return remarks

    def _require_validation(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a metric that nothing measures."""
        if self.metric is not None and not has_validation(pl_module, trainer):
            raise ValueError(self._not_validated(pl_module))

    def _not_validated(self, pl_module: Any) -> str:
        return (
            f"metric='{self.metric}' is measured in validation, and {class_name(pl_module)} has none here: it needs a "
            "validation_step, validation data of at least one batch, and limit_val_batches above 0"
        )

    def _instead_of_input(self) -> str:
        """An input to export with."""
        if self.sample is not None:  # so somebody else needs it
            return ""
        example = getattr(self._require_controller().module, "example_input_array", None)
        known = "" if example is None else ", as within a fit example_input_array does not count"
        return f"; give sample={known}"

    def _tell_of_activations(self, trainer: Any) -> None:
        """A file that is small, but computes in float, leaves out grids that a network may need."""
        for callback in trainer.callbacks:
            bits = getattr(callback, "activation_bits", None)
            if isinstance(callback, CompressionCallback) and bits is not None and bits < MOST_BITS:
                self._warn_once(
                    f"precision 'int4' stores weights alone, so the file does not round activations to {bits} bits as "
                    f"'{callback.name}' does, and is another network than the validated one: give '{callback.name}' "
                    "activation_bits=None, or write precision='int8', whose activations may have fewer bits"
                )

    def _tell_of_grids(self, trainer: Any) -> None:
        """A file in full precision is not of the network that a callback quantises."""
        exports = [callback for callback in trainer.callbacks if isinstance(callback, ExportCallback)]
        quantising = [own for own in trainer.callbacks if getattr(own, "quantises", False)]
        if quantising and all(export.precision == "fp32" for export in exports):
            self._warn_once(
                f"precision 'fp32' leaves out the grids of '{quantising[0].name}', so the file is not of the network "
                "that it quantises and validates: give precision='int8' or 'int4', or another ExportCallback with it"
            )

    def _trial_scales(self, trainer: Any) -> Scales | None:
        """Those that can be had after the first step; None: what is found then is what counts."""
        if self.precision == "fp32":
            return None
        ours = callbacks_of(trainer)
        pl_module = trainer.lightning_module
        found = [own for callback in ours if (own := callback.trial_scales(trainer, pl_module)) is not None]
        steps = {name: step for callback in ours for name, step in given_steps(callback).items()}
        return Scales(found, steps, provisional=True) if found or steps else None

    def _written(self, pl_module: Any, path: str, precision: str, scales: Scales | None = None) -> ExportResult:
        """The network that the user named, else the one that was captured, on the user's sample, else on its input."""
        seen, network, sample = self.last_sample(), self.network, self.sample
        if seen is not None:
            network = seen.network if network is None else network
            sample = Sample(seen.args, seen.kwargs) if sample is None else sample
        options: Any = {"network": network, "dynamic_batch": self.dynamic_batch}
        return write_onnx(pl_module, path, sample, precision, scales=scales, **options)

    def _refuse_chain(self, names: tuple[str, ...] | None) -> None:
        if names is not None and len(names) > 1:
            raise ValueError(
                f"the student is the chain '{names[0]}' to '{names[1]}', and a file holds one network: name it with "
                "network= (the LightningModule itself is '', with sample= if its forward is never called)"
            )

    def _fail(self, message: str) -> None:
        self.failure = message
        warnings.warn(message, stacklevel=2)


def _weight_bits(callback: Any) -> int | None:
    """Bits of the weights that a callback of this package will have scales for; None for all others."""
    return callback.weight_bits_given if isinstance(callback, CompressionCallback) else None


def _better_checkpoint(trainer: Any) -> str | None:
    """Which checkpoint of the fit is better than its last one by the metric that it is kept for."""
    for callback in trainer.callbacks:
        measured = trainer.callback_metrics.get(callback.monitor) if _compat.keeps_best(callback) else None
        if measured is not None and callback.best_model_path and callback.best_model_score is not None:
            best, last = float(callback.best_model_score), float(measured)
            if best > last if callback.mode == "max" else best < last:
                name = os.path.basename(callback.best_model_path)
                return (
                    f"by {callback.monitor} {name} is better, {units.metric(best)} against {units.metric(last)}: "
                    "`lightning-compress export` writes a file of it"
                )
    return None
