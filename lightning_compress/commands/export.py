"""``lightning-compress export``: from a checkpoint to an ONNX file that was checked against it."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from lightning_compress.callbacks.base import TrainerCallback
from lightning_compress.callbacks.ptq import PTQCallback
from lightning_compress.callbacks.qat import QATCallback
from lightning_compress.commands.exits import DONE, FAILED, USAGE, UsageError, checking, ended
from lightning_compress.commands.project import (
    Project,
    ProjectError,
    code_of,
    current_folder_importable,
    load_trained,
)
from lightning_compress.export.copying import independent_copy
from lightning_compress.export.errors import EvaluationError, ExportError
from lightning_compress.export.evaluate import (
    LIGHTNING_LOGGERS,
    evaluate,
    evaluate_forward,
    evaluate_quantized,
    interruptible,
    silent_trainer,
)
from lightning_compress.export.onnx import ExportResult, checked_path, to_onnx
from lightning_compress.export.runtime import require_onnx
from lightning_compress.export.sample import Sample, defines, read_sample
from lightning_compress.export.scales import Scales
from lightning_compress.export.weights import read_checkpoint
from lightning_compress.mechanisms.capture import CaptureError
from lightning_compress.mechanisms.drafts import draft_of
from lightning_compress.mechanisms.isolation import module_kept, quiet
from lightning_compress.mechanisms.loading import teacher_from_checkpoint
from lightning_compress.mechanisms.metrics import logged_as
from lightning_compress.mechanisms.quantization import QuantizationError
from lightning_compress.mechanisms.selection import did_you_mean, listing, plain_name
from lightning_compress.mechanisms.signs import sign
from lightning_compress.mechanisms.student import StudentCapture
from lightning_compress.recipe.file import check_size, shown
from lightning_compress.report.cells import shown_path
from lightning_compress.report.directions import direction
from lightning_compress.report.units import metric as shown_metric
from lightning_compress.report.units import size

BITS: dict[str, dict[str, Any]] = {"int8": {}, "int4": {"weight_bits": 4, "activation_bits": None}}
MOST_NUMBERS = 2**30  # of an input: 4 GB
SEED = 0  # of the random input that --shape asks for
FULL_PRECISION = "full precision"


class CheckError(RuntimeError):
    """The file is not what the checkpoint is."""


@dataclass(frozen=True)
class Loaded:
    """A module with the weights of a checkpoint.

    Attributes:
        module: The LightningModule, or another module.
        project: What the config makes; None without one.
    """

    module: nn.Module
    project: Project | None = None

    @property
    def datamodule(self) -> Any:
        """The datamodule, where there is one."""
        return None if self.project is None else self.project.datamodule

    @property
    def data(self) -> Any:
        """What has the loaders: a datamodule, or the module itself; None without a config."""
        return None if self.project is None else self.module if self.datamodule is None else self.datamodule

    @property
    def trainer(self) -> Any:
        """That of the config, which says how much is validated; None without one."""
        return None if self.project is None else self.project.trainer

    @property
    def quantising(self) -> tuple[PTQCallback | QATCallback, ...]:
        """The callbacks of the config that quantise."""
        return () if self.project is None else self.project.quantising

    def run(self, entry: str, module: Any, callback: Any, **more: Any) -> Any:
        """Run the steps of the module, or of a copy, with one callback: "validate", or "fit"; give the Trainer.

        Not in inference mode: which network a step calls is told from what its forward returns, and there a tensor that
        is handed on looks like another.
        """
        vars(module)["configure_callbacks"] = list
        trainer = silent_trainer(module, self.trainer, callbacks=[callback], inference_mode=False, **more)
        with code_of(module):
            getattr(trainer, entry)(module, datamodule=self.datamodule)
        return trainer


def export(options: argparse.Namespace) -> int:
    """Write a checkpoint as an ONNX file.

    Args:
        options: As the command line has them.

    Returns:
        0: the file is written, and passed its checks. 1: it failed one, and was not kept. 2: bad usage.

    Example:
        >>> from lightning_compress.cli import main
        >>> main(["export", "missing.ckpt", "--class", "pkg.Net"])
        2
    """
    try:
        with ExitStack() as stack:
            line = _exported(options, stack)
    except (ExportError, EvaluationError, CheckError, ProjectError) as error:
        return ended("export", FAILED, _as_option(error))
    except (UsageError, OSError) as error:
        return ended("export", USAGE, _as_option(error))
    return ended("export", DONE, line)


def _as_option(error: Exception) -> str:
    """An error, with the argument of ``to_onnx`` as the shell has it."""
    return re.sub(r"\bnetwork='([^']+)'", r"--network \1", str(error))


def _exported(options: argparse.Namespace, stack: ExitStack) -> str:
    """Check what can be checked without the module, then load, write and measure."""
    with checking(ValueError, ImportError):
        target = checked_path(options.out or _name(options))
        _check(options)
        require_onnx()
    scales = Scales() if options.precision == "fp32" else Scales.of_checkpoint(_read(options))
    calibrates = options.precision != "fp32" and scales.empty
    with _working(f"Loading {os.path.basename(options.checkpoint)}"):
        loaded, network, sample = _loaded_with_input(options, stack, calibrates=calibrates)
    here = _calibrate(loaded, network, options) if calibrates else _left_out(loaded, scales)
    target.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(target) as draft:
        with _working(f"Exporting {target.name}"), checking(ValueError, TypeError, CaptureError):
            result = to_onnx(
                loaded.module,
                draft,
                sample,
                options.precision,
                None if options.precision == "fp32" or calibrates else options.checkpoint,
                network=network,
            )
        metrics = _measured(loaded, result, options, calibrated=calibrates)
    of = "checkpoint" if result.quantization is None else "quantised network"
    difference = f"{here}largest difference to the {of} {result.max_logit_difference:.2g}"
    return (
        f"wrote {shown_path(target)} ({result.precision}, {size(result.bytes)}; {difference}{metrics}){_said(loaded)}"
    )


def _name(options: argparse.Namespace) -> str:
    """That of the checkpoint; files of another precision take no other one's place."""
    precision = "" if options.precision == "fp32" else f"-{options.precision}"
    return f"{Path(options.checkpoint).stem}{precision}.onnx"


def _read(options: argparse.Namespace) -> Any:
    """The checkpoint; what is wrong with the file is told before all else."""
    with checking(ValueError, OSError):
        return read_checkpoint(options.checkpoint, or_weights=True)


def _said(loaded: Loaded) -> str:
    """What a reader of the figures should know of the project, behind them."""
    return "".join(f"; {remark}" for remark in loaded.project.remarks) if loaded.project is not None else ""


def _loaded_with_input(
    options: argparse.Namespace, stack: ExitStack, *, calibrates: bool
) -> tuple[Loaded, str | None, Any]:
    """The module, the name of its network, and the network's input; None: as the module says."""
    sample = _given_sample(options)
    with_data = sample is None or options.metric is not None or calibrates
    loaded = _loaded(options, set_up=with_data)
    if loaded.project is not None and with_data:
        stack.callback(loaded.project.tear_down)
    if options.metric is not None:
        _require_validation(loaded, options.metric)
    if sample is not None and loaded.project is not None:
        sample = loaded.trainer.precision_plugin.convert_input(sample)
    if sample is None and loaded.data is not None:
        with checking(ValueError, CaptureError):
            return loaded, *_received(loaded, options.network)
    if sample is None and getattr(loaded.module, "example_input_array", None) is None:
        name = type(loaded.module).__name__
        raise UsageError(
            f"the network's input is not known: give --sample, --shape or --config; {name} has no example_input_array"
        )
    return loaded, options.network, sample


@contextmanager
def _working(what: str) -> Iterator[None]:
    """A sign, which has to be there before all else is silent; Ctrl-C stays one whatever Lightning makes of it."""
    with sign(True, what), quiet([*LIGHTNING_LOGGERS, "lightning_fabric"]), interruptible():
        yield


def _check(options: argparse.Namespace) -> None:
    if not options.config and options.module_class is None:
        raise UsageError("the module is missing: give --class pkg.Module, or --config C.yaml of a LightningCLI project")
    if options.config and options.init_args is not None:
        raise UsageError("--init-args belongs to --class; with --config the arguments are those of the config")
    if options.metric is not None and not options.config:
        raise UsageError("--metric is measured in the project's validation, which needs --config")
    if options.tolerance is not None and options.metric is None:
        raise UsageError(f"--tolerance {options.tolerance:g} says how far a metric may move, but --metric is not given")
    if options.tolerance is not None and not 0 <= options.tolerance < math.inf:
        raise UsageError(f"--tolerance must be a number of at least 0, got {options.tolerance:g}")


# The module


def _loaded(options: argparse.Namespace, *, set_up: bool) -> Loaded:
    """The module of the class, or of the config, with the weights of the checkpoint."""
    if options.config:
        classes = {"model": options.module_class, "data": options.data_class}
        project = load_trained(options.config, options.checkpoint, **classes, set_up=set_up)
        return Loaded(project.module.eval(), project)
    current_folder_importable()
    _read(options)
    arguments = _mapping(options.init_args)
    try:
        return Loaded(teacher_from_checkpoint(options.module_class, options.checkpoint, init_args=arguments))
    except (ValueError, TypeError) as error:
        said = " ".join(str(error).split())
        raise UsageError(said.replace("class_path", "--class").replace("init_args", "--init-args")) from error


def _mapping(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = yaml.safe_load(text)
        check_size(found, "the mapping")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"--init-args is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UsageError(f"--init-args must be a mapping such as '{{width: 16}}', got {shown(text)}")
    return found


# Its input


def _given_sample(options: argparse.Namespace) -> Any:
    """The input that a file or a shape gives; None for neither."""
    if options.shape is not None:
        return torch.randn(*_shape(options.shape), generator=torch.Generator().manual_seed(SEED), device="cpu")
    if options.sample is None:
        return None
    with checking(ValueError):
        return read_sample(options.sample)


def _shape(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"0*[1-9][0-9]{0,11}", part) for part in parts):
        raise UsageError(f"--shape must be whole numbers such as 1,3,32,32, got {shown(text)}")
    shape = [int(part) for part in parts]
    if math.prod(shape) > MOST_NUMBERS:
        raise UsageError(f"--shape must be that of one input, of at most {MOST_NUMBERS} numbers, got {shown(text)}")
    return shape


class _FirstInput(TrainerCallback):
    """Records what the network receives in a batch."""

    def __init__(self, capture: StudentCapture) -> None:
        super().__init__()
        self.capture, self.batches = capture, 0

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        self.batches += 1
        self.capture.start(detect=True)

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.capture.stop()

    on_train_batch_start = on_validation_batch_start
    on_train_batch_end = on_validation_batch_end


def _received(loaded: Loaded, network: str | None) -> tuple[str, Sample]:
    """The network that the step calls with the first batch of the validation, else the training, and its input."""
    duplicate: Any = independent_copy(loaded.module)
    with StudentCapture(duplicate, network, argument="--network") as capture:
        capture.required = True
        first = _FirstInput(capture)
        validates = defines(duplicate, "validation_step") and defines(loaded.data, "val_dataloader")
        loaded.run("validate" if validates else "fit", duplicate, first, fast_dev_run=1)
        call, name = capture.last_call, capture.network
    if first.batches == 0:
        raise UsageError(f"the data of {type(loaded.module).__name__} give no batch, so its input is not known")
    if call is None or name is None:
        raise UsageError(
            f"the steps of {type(loaded.module).__name__} call no single network; name it with --network, and give its "
            "input with --sample or --shape"
        )
    return plain_name(name), Sample(call.args, call.kwargs)


# The scales


def _calibrate(loaded: Loaded, network: str | None, options: argparse.Namespace) -> str:
    """Find scales with the project's training data, as the checkpoint has none, and say so.

    The module's Trainer has them then.
    """
    lacking = f"--precision {options.precision} needs scales, and the checkpoint holds none"
    if loaded.data is None:
        raise UsageError(
            f"{lacking}; give --config of the project, whose training data they are found with (for a script, a file "
            "of three lines: 'model: my_project.LitNet', 'data: my_project.Data', 'trainer: {accelerator: cpu}')"
        )
    module: Any = loaded.module
    for name, owner in (
        ("validation_step", module),
        ("val_dataloader", loaded.data),
        ("train_dataloader", loaded.data),
    ):
        if not defines(owner, name):
            raise UsageError(f"{lacking}; they cannot be found either, as {type(owner).__name__} has no {name}")
    ptq, how = _calibration(loaded, network, options.precision)
    with _working("Calibrating"), checking(CaptureError, QuantizationError):
        with module_kept(module, parameters=False):  # the validation may write into it
            trainer = loaded.run("validate", module, ptq, limit_val_batches=1)
        module.trainer = trainer
    samples = f"{ptq.samples_seen:,} samples of " if ptq.samples_seen else ""  # weights alone need none
    return f"calibrated with {samples}the training data{how}, "


def _calibration(loaded: Loaded, network: str | None, precision: str) -> tuple[PTQCallback, str]:
    """That of the config, where it is for this network and these bits, else the defaults; and which, in words."""
    fitting: list[PTQCallback] = []
    reasons: list[str] = []
    for own in loaded.quantising:
        _check_callback(own, loaded)
        if not isinstance(own, PTQCallback):
            reasons.append(f"'{own.name}' of the config trains its scales, and had none yet")
        elif own.network is not None and plain_name(own.network) != network:
            reasons.append(f"'{own.name}' of the config is for '{own.network}'")
        elif precision == "int4" and own.fewest_bits > BITS[precision]["weight_bits"]:
            reasons.append(f"'{own.name}' of the config gives weights of {own.fewest_bits} bits")
        else:
            fitting.append(own)
    if not fitting:
        because = f" by the defaults, as {' and '.join(reasons)}" if reasons else ""
        return PTQCallback(network=network, **BITS[precision]), because
    if len(fitting) > 1:
        raise UsageError(f"trainer.callbacks: {listing([own.name for own in fitting])} quantise one network; keep one")
    [ptq] = fitting
    ptq.network = network
    return ptq, f" as '{ptq.name}' of the config says"


def _left_out(loaded: Loaded, scales: Scales) -> str:
    """Which callback of the config would have calibrated, where the checkpoint has weights that know their grids."""
    names = [own.name for own in loaded.quantising]
    if not names or not scales.weights_only:
        return ""
    return f"weights alone on the grids that they were trained for, as {listing(names)} had no scales yet, "


def _check_callback(own: PTQCallback | QATCallback, loaded: Loaded) -> None:
    try:
        own.check(loaded.trainer, loaded.module)
        own.check_parts(loaded.module)
    except ValueError as error:
        raise UsageError(f"trainer.callbacks ({type(own).__name__} '{own.name}'): {error}") from error


# The metrics


def _require_validation(loaded: Loaded, metric: str) -> None:
    if not (defines(loaded.module, "validation_step") and defines(loaded.data, "val_dataloader")):
        raise UsageError(f"--metric {metric} is measured in validation, and {type(loaded.module).__name__} has none")


def _measured(loaded: Loaded, result: ExportResult, options: argparse.Namespace, *, calibrated: bool) -> str:
    """The metric in module and file, in words, and what it was before a calibration; beyond the tolerance an error."""
    if options.metric is None:
        return ""
    with _working("Validating the network"), code_of(loaded.module):
        if result.quantization is None:
            in_module = evaluate_forward(loaded.module, loaded.trainer)
        else:
            in_module = evaluate_quantized(loaded.module, loaded.trainer, result.quantization)
        before = evaluate_forward(loaded.module, loaded.trainer) if calibrated else {}
    name = logged_as(options.metric, in_module)
    if name is None:
        raise UsageError(
            f"--metric must be one of {', '.join(sorted(in_module))}, which {type(loaded.module).__name__} logs in "
            f"validation, got '{options.metric}'{did_you_mean(options.metric, in_module)}"
        )
    ours = in_module[name]
    references = {"the module" if result.quantization is None else "the quantised module": ours}
    references |= {FULL_PRECISION: before[name]} if calibrated else {}
    with _working("Validating the file"):
        theirs = evaluate(result.path, loaded.module, loaded.trainer)[name]
    for what, value in references.items():
        mode = direction(options.metric) if what == FULL_PRECISION else None  # than which a file may well be better
        worse = {"min": theirs - value, "max": value - theirs, None: abs(theirs - value)}[mode]
        if options.tolerance is not None and not worse <= options.tolerance:  # NaN fails too
            raise CheckError(
                f"{options.metric} is {theirs:.6g} in the file and {value:.6g} in {what}: the difference "
                f"{abs(theirs - value):.3g} is beyond the tolerance of {options.tolerance:g}; the file was not kept"
                f"{_said(loaded)}"
            )
    said = "".join(f", {shown_metric(value)} in {what}" for what, value in references.items())
    return f"; {options.metric} {shown_metric(theirs)} in the file{said}"
