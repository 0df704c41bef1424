"""Export of a trained network to one self-contained ONNX file that was checked against it."""

from __future__ import annotations

import inspect
import json
import os
import stat
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lightning_compress import __version__, _compat
from lightning_compress.export.copying import independent_copy, widen_
from lightning_compress.export.errors import ExportError
from lightning_compress.export.parity import Reference, batch_sizes, check_parity, references
from lightning_compress.export.runtime import OnnxNetwork, require_onnx
from lightning_compress.export.sample import Call, Sample, as_sample, bind, captured, defines, on_cpu
from lightning_compress.export.tracing import convert
from lightning_compress.export.weights import read_checkpoint
from lightning_compress.mechanisms.isolation import random_state_kept
from lightning_compress.mechanisms.selection import find_module, plain_name
from lightning_compress.mechanisms.tree import children, named_tensors, unique_names

PRECISIONS = ("fp32",)
LATER_PRECISIONS = ("int8", "int4")
DEFAULT_OPSET = 20
LOWEST_OPSET = 18  # below, the exporter's version converter fails and leaves 18 without a word


@dataclass(frozen=True)
class ExportResult:
    """What was written, and how well it agrees with the network.

    Attributes:
        path: The file.
        bytes: Its size.
        precision: ``"fp32"``.
        max_logit_difference: Largest absolute difference between an output of the file and of the network.
        left_in_float: Dotted names of layers that a lower precision left in float; empty for ``"fp32"``.
        opset: ONNX operator set.
        checked_batch_sizes: Batch sizes at which file and network were compared, the sample's first.
        input_names: Names of the inputs, in order.
        output_names: Names of the outputs, in order.
        network: Dotted name of the network inside the module given to :func:`to_onnx`; "" for that module itself.
    """

    path: Path
    bytes: int
    precision: str
    max_logit_difference: float
    left_in_float: tuple[str, ...]
    opset: int
    checked_batch_sizes: tuple[int, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    network: str


def to_onnx(
    module: nn.Module,
    path: str | os.PathLike[str],
    sample: Any = None,
    precision: str = "fp32",
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    network: str | None = None,
    dynamic_batch: bool = True,
    max_difference: float = 1e-3,
    opset: int | None = None,
) -> ExportResult:
    """Export a network to ONNX and compare the file with it in ONNX Runtime.

    The work is done on a copy in evaluation mode on the CPU: flags, hooks, device, weights, statistics and random
    states of ``module`` stay as they are. Half-precision weights are widened to float32. A file that fails its check
    is not kept, and an older file under the same path then stays.

    Args:
        module: A LightningModule, before or after a fit, or any other module.
        path: Where to write; must end in ``.onnx``. Missing directories are made.
        sample: One input of the network. A tensor is the only argument; a tuple holds the positional arguments; a
            dict holds the keyword arguments if the forward has arguments of those names, otherwise it is the only
            argument; ``Sample(args, kwargs)`` says both. None: the input that one of our callbacks recorded in the
            last training step, else ``module.example_input_array``.
        precision: ``"fp32"``.
        checkpoint: A Lightning checkpoint whose weights are exported instead of the current ones.
        network: Dotted name of the part of ``module`` to export; "" is the module itself. None: the network that a
            callback recorded, else the module itself.
        dynamic_batch: Whether the file takes any batch size. Dimension 0 of each input tensor that is as long as that
            of the first is the batch.
        max_difference: Largest accepted difference between file and network, absolute, in units of
            ``max(1, largest |output|)``.
        opset: ONNX operator set, at least 18. None: 20.

    Returns:
        Where the file is and how it was checked.

    Raises:
        ExportError: If the network cannot be exported, or file and network disagree at one of three batch sizes.
        ImportError: If the packages of the ``onnx`` extra are not installed.
        TypeError: If ``sample`` does not fit the forward.
        ValueError: If an argument is out of range or names nothing.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = to_onnx(torch.nn.Linear(3, 2), f"{folder}/linear.onnx", sample=torch.zeros(4, 3))
        >>> result.input_names, result.output_names, result.checked_batch_sizes
        (('input',), ('output',), (4, 1, 5))
    """
    target = checked_path(path)
    opset = _checked_options(precision, opset, max_difference)
    require_onnx()
    with random_state_kept():
        name, part, given = _network_and_sample(_compat.uncompiled(module), network, sample, checkpoint)
        call = _bound_call(part, given)
        expected = references(part, call, dynamic_batch)
        output_names = _output_names(part, call, expected[0].output)
        metadata = _metadata(name, precision, call)
        graph = convert(part, call, output_names, dynamic_batch=dynamic_batch, opset=opset, metadata=metadata)
        difference = _write_checked(graph, target, expected, max_difference)
    return ExportResult(
        path=target,
        bytes=len(graph),
        precision=precision,
        max_logit_difference=difference,
        left_in_float=(),
        opset=opset,
        checked_batch_sizes=batch_sizes(call.tensors, dynamic_batch),
        input_names=call.names,
        output_names=tuple(output_names),
        network=name,
    )


def checked_path(path: str | os.PathLike[str]) -> Path:
    """Check that a file can be written at a path; nothing is created yet.

    Args:
        path: The target; its folder need not exist.

    Returns:
        The target.

    Raises:
        ValueError: If it does not end in ".onnx" or cannot be written.

    Example:
        >>> checked_path("model.onnx").name
        'model.onnx'
    """
    target = Path(path)
    if target.suffix != ".onnx":
        raise ValueError(f"path must end in '.onnx', got '{target}'")
    if target.is_dir():
        raise ValueError(f"path '{target}' is a directory; a file name ending in '.onnx' is accepted")
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"path '{target}' cannot be made because '{existing}' is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"path '{target}' cannot be written because '{existing}' is not writable")
    if target.exists() and not target.stat().st_mode & stat.S_IWUSR:
        raise ValueError(f"path '{target}' is a read-only file; remove it or choose another name")
    return target.resolve() if target.is_symlink() else target


def checked_precision(precision: str) -> str:
    """Check a precision.

    Args:
        precision: What the user asked for.

    Returns:
        The same.

    Raises:
        ValueError: If this version cannot export it.

    Example:
        >>> checked_precision("fp32")
        'fp32'
    """
    if precision in LATER_PRECISIONS:
        raise ValueError(f"precision '{precision}' is not available yet in this version; accepted: {list(PRECISIONS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {list(PRECISIONS)}, got {precision!r}")
    return precision


def _checked_options(precision: str, opset: int | None, max_difference: float) -> int:
    checked_precision(precision)
    if not max_difference > 0:
        raise ValueError(f"max_difference must be positive, got {max_difference}")
    if opset is not None and opset < LOWEST_OPSET:
        raise ValueError(f"opset must be at least {LOWEST_OPSET}, got {opset}")
    return DEFAULT_OPSET if opset is None else opset


def _network_and_sample(
    module: nn.Module, network: str | None, sample: Any, checkpoint: str | os.PathLike[str] | None
) -> tuple[str, nn.Module, Sample]:
    """Dotted name of the network, a copy of it that is ready for export, and its input on the CPU."""
    name, recorded = captured(module, network)
    part = _compat.uncompiled(find_module(module, name, argument="network"))
    _require_forward(module, part, name)
    if sample is not None:
        given = as_sample(sample, inspect.signature(part.forward))
    elif recorded is not None:
        given = recorded
    else:
        example = getattr(part, "example_input_array", None)
        if example is None:
            raise ValueError(
                f"no input to export '{name or type(module).__name__}' with: pass sample=, set example_input_array, "
                "or export after a fit with one of this package's callbacks, which record it"
            )
        given = as_sample(example, inspect.signature(part.forward))
    if checkpoint is None:
        duplicate = independent_copy(part)
    else:
        duplicate = find_module(_load_(independent_copy(module), checkpoint), name, argument="network")
    return name, widen_(duplicate).to("cpu").eval(), on_cpu(given)


def _require_forward(module: nn.Module, part: nn.Module, name: str) -> None:
    if defines(part, "forward"):
        return
    named = [child for child, _ in part.named_children()]
    raise ValueError(
        f"'{name}' ({type(part).__name__}) has no forward; pass network= with the dotted name of the network inside "
        f"{type(module).__name__}, for instance one of {[f'{name}.{child}' if name else child for child in named]}"
    )


def _load_(module: nn.Module, checkpoint_path: str | os.PathLike[str]) -> nn.Module:
    """Load a checkpoint as Lightning does, the module's own hook first, into an uncompiled copy."""
    checkpoint = read_checkpoint(checkpoint_path)
    hook: Any = getattr(module, "on_load_checkpoint", None)
    if hook is not None:
        hook(checkpoint)
    weights = {plain_name(key): value for key, value in checkpoint["state_dict"].items()}
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ExportError(f"checkpoint '{checkpoint_path}' does not fit {type(module).__name__}: {error}") from error
    return module


def _bound_call(network: nn.Module, sample: Sample) -> Call:
    signature = inspect.signature(network.forward)
    try:
        return bind(signature, sample)
    except TypeError as error:
        raise TypeError(f"sample does not fit {type(network).__name__}.forward{signature}: {error}") from error


def _output_names(network: nn.Module, call: Call, output: Any) -> list[str]:
    """A name for each tensor in what the network gave on the sample."""
    inside = children(output)
    unnamed = inside is None or (isinstance(output, (list, tuple)) and not hasattr(output, "_fields"))
    tensors = named_tensors(output, "output" if unnamed else "")
    if not tensors:
        raise ExportError(f"{type(network).__name__} gives no tensor on the sample but a {type(output).__name__}")
    for key, tensor in tensors:
        if tensor.is_floating_point() and tensor.isnan().any():
            raise ExportError(f"output '{key}' of {type(network).__name__} is NaN on the sample")
    return unique_names((key for key, _ in tensors), taken=call.names)


def _metadata(name: str, precision: str, call: Call) -> dict[str, str]:
    return {
        "lightning_compress.network": name,
        "lightning_compress.precision": precision,
        "lightning_compress.version": __version__,
        "lightning_compress.constants": json.dumps(call.constants, sort_keys=True),
    }


def _write_checked(graph: bytes, target: Path, expected: Sequence[Reference], max_difference: float) -> float:
    """Write beside the target, compare, and only then take the target's place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.stem}-{uuid.uuid4().hex}.onnx")
    try:
        draft.write_bytes(graph)
        difference = check_parity(OnnxNetwork(draft), expected, max_difference)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    return difference
