"""Export of a trained network to one self-contained ONNX file that was checked against it."""

from __future__ import annotations

import functools
import inspect
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_compress import __version__, _compat
from lightning_compress.export.copying import independent_copy, widen_
from lightning_compress.export.errors import ExportError
from lightning_compress.export.integer import IntegerExport
from lightning_compress.export.parity import MAX_DIFFERENCE, batch_sizes, check_parity, references, run_once
from lightning_compress.export.runtime import OnnxNetwork, require_onnx
from lightning_compress.export.sample import Call, Sample, as_sample, bind, captured, defines, on_cpu
from lightning_compress.export.scales import Scales, for_precision
from lightning_compress.export.tracing import convert
from lightning_compress.export.weights import read_checkpoint
from lightning_compress.functional._checks import (
    check_choice,
    check_flag,
    check_name,
    check_path,
    check_positive,
    check_whole,
    shown,
)
from lightning_compress.mechanisms.checkpoints import resize_, structures_in
from lightning_compress.mechanisms.drafts import SPARE, draft_of
from lightning_compress.mechanisms.grids import Grids
from lightning_compress.mechanisms.isolation import full_float32, random_state_kept
from lightning_compress.mechanisms.selection import find_module, listing, plain_name
from lightning_compress.mechanisms.tree import children, named_tensors, unique_names

PRECISIONS = ("fp32", "int8", "int4")
DEFAULT_OPSET = 20
INT4_OPSET = 21  # the first with integers of 4 bits
_NAMED = 3  # networks that an error proposes
LOWEST_OPSET = 18  # below, the exporter's version converter fails and leaves 18 without a word


@dataclass(frozen=True)
class ExportResult:
    """What was written, and how well it agrees with the network.

    Attributes:
        path: The file.
        bytes: Its size.
        precision: ``"fp32"``, ``"int8"`` or ``"int4"``.
        max_logit_difference: Largest absolute difference between an output of the file and of the network, quantised
            as the file is.
        left_in_float: What a lower precision left in float: dotted names of weights, then operations and how often
            each occurs; empty for ``"fp32"``.
        opset: ONNX operator set.
        checked_batch_sizes: Batch sizes at which file and network were compared, the sample's first.
        input_names: Names of the inputs, in order.
        output_names: Names of the outputs, in order.
        network: Dotted name of the network inside the module given to :func:`to_onnx`; "" for that module itself.
        quantization: What a file of lower precision is quantised by; None for ``"fp32"``.
        tensors: The inputs that it was checked with, of the sample's batch size.
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
    quantization: Grids | None = field(default=None, repr=False, compare=False)
    tensors: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)


def to_onnx(
    module: nn.Module,
    path: str | os.PathLike[str],
    sample: Any = None,
    precision: str = "fp32",
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    network: str | None = None,
    dynamic_batch: bool = True,
    max_difference: float | None = None,
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
            argument; ``Sample(args, kwargs)`` says both; a path is that of a .pt or .npy file of one of these. None:
            the input that one of our callbacks recorded in the last training step, else
            ``module.example_input_array``.
        precision: ``"fp32"``; ``"int8"``: weights, and activations where they have scales, as integers, for integer
            kernels; ``"int4"``: weights of up to 4 bits take half a byte each and are widened when they are used,
            which makes a file small, not fast. The scales are those of the PTQ, QAT or PSGD callback of the module's
            Trainer, or of ``checkpoint``; nothing is calibrated here.
        checkpoint: A Lightning checkpoint whose weights, and scales, are exported instead of the current ones.
        network: Dotted name of the part of ``module`` to export; "" is the module itself. None: the network that a
            callback recorded, else the module itself.
        dynamic_batch: Whether the file takes any batch size. Dimension 0 of each input tensor that is as long as that
            of the first is the batch.
        max_difference: Largest accepted absolute difference of an element between file and network, in units of its
            own size, of 1, or of ten times what a quarter of the output stays below, whichever is largest. None: 1e-3;
            or, where ONNX Runtime multiplies integers, and so rounds elsewhere, twice what quantisation has changed,
            but from 2% to 50% of the output's size, and to 90% where activations have fewer than 8 bits.
        opset: ONNX operator set, at least 18. None: 20, or 21 for ``"int4"``, which needs it.

    Returns:
        Where the file is and how it was checked.

    Raises:
        ExportError: If the network cannot be exported, file and network disagree at one of three batch sizes, a scale
            in the file is not the given one, or a layer that should run in integers does not.
        ImportError: If the packages of the ``onnx`` extra are not installed.
        TypeError: If ``sample`` does not fit the forward.
        ValueError: If an argument is out of range or names nothing, or a lower precision finds no scales.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = to_onnx(torch.nn.Linear(3, 2), f"{folder}/linear.onnx", sample=torch.zeros(4, 3))
        >>> result.input_names, result.output_names, result.checked_batch_sizes
        (('input',), ('output',), (4, 1, 5))
    """
    return write_onnx(
        module,
        path,
        sample,
        precision,
        checkpoint,
        scales=None,
        network=network,
        dynamic_batch=dynamic_batch,
        max_difference=max_difference,
        opset=opset,
    )


def write_onnx(
    module: nn.Module,
    path: str | os.PathLike[str],
    sample: Any,
    precision: str,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    scales: Scales | None,
    network: str | None,
    dynamic_batch: bool,
    max_difference: float | None = None,
    opset: int | None = None,
) -> ExportResult:
    """As :func:`to_onnx`, with scales that were found elsewhere; a file of provisional ones may be further off."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {shown(module)}")
    target = checked_path(path)
    opset = _checked_options(precision, opset, max_difference)
    check_name("network", network)
    check_flag("dynamic_batch", dynamic_batch)
    require_onnx()
    with random_state_kept(), full_float32():
        module = _compat.uncompiled(module)
        contents = None if checkpoint is None else read_checkpoint(checkpoint, argument="checkpoint")
        if scales is None and precision != "fp32":
            scales = Scales.of(module, contents, precision)
        network = scales.network if network is None and scales is not None else network
        name, part, given = _network_and_sample(module, network, sample, contents, checkpoint)
        call = _bound_call(part, given)
        expected = references(part, call, dynamic_batch)
        output_names = _output_names(part, call, expected[0].output)
        metadata = _metadata(name, precision, call)
        grids = None
        check: Callable[[OnnxNetwork], float]
        options: Any = {"dynamic_batch": dynamic_batch, "opset": opset, "metadata": metadata}
        if scales is None:
            graph = convert(part, call, output_names, **options)
            allowed = MAX_DIFFERENCE if max_difference is None else max_difference
            check = functools.partial(check_parity, expected=expected, max_difference=allowed)
        else:
            grids = for_precision(scales.for_network(name, part, lambda: run_once(part, call)), precision)
            integer = IntegerExport(part, call, grids, expected, precision=precision, max_difference=max_difference)
            graph = integer.convert(output_names, **options)
            check = integer.check_trial if scales.provisional else integer.check
        difference = _write_checked(graph, target, check)
    return ExportResult(
        path=target,
        bytes=len(graph),
        precision=precision,
        max_logit_difference=difference,
        left_in_float=() if grids is None else grids.left_in_float,
        opset=opset,
        checked_batch_sizes=batch_sizes(call.tensors, dynamic_batch),
        input_names=call.names,
        output_names=tuple(output_names),
        network=name,
        quantization=grids,
        tensors=call.tensors,
    )


def checked_path(path: str | os.PathLike[str]) -> Path:
    """Check that a file can be written at a path; nothing is created yet.

    Args:
        path: The target; its folder need not exist.

    Returns:
        The target.

    Raises:
        TypeError: If it is neither a string nor a path.
        ValueError: If it does not end in ".onnx" or cannot be written.

    Example:
        >>> checked_path("model.onnx").name
        'model.onnx'
    """
    target = Path(check_path("path", path))
    if target.suffix != ".onnx":
        raise ValueError(f"path must end in '.onnx', got '{target}'")
    _check_lengths(target, spare=SPARE)
    if target.is_dir():
        raise ValueError(f"path '{target}' is a directory; a file name ending in '.onnx' is accepted")
    _check_writable(target, target.absolute().parents)
    if target.exists() and not target.stat().st_mode & stat.S_IWUSR:
        raise ValueError(f"path '{target}' is a read-only file; remove it or choose another name")
    if target.is_symlink():
        target = target.resolve()
        _check_lengths(target, spare=SPARE)
    return target


def checked_folder(path: str | os.PathLike[str]) -> Path:
    """Check that files can be written into a folder; nothing is created yet.

    Args:
        path: The folder; it need not exist.

    Returns:
        The folder.

    Raises:
        TypeError: If it is neither a string nor a path.
        ValueError: If it cannot be made, or not be written into.

    Example:
        >>> checked_folder("reports/first").name
        'first'
    """
    target = Path(check_path("path", path))
    _check_lengths(target)
    _check_writable(target, (target.absolute(), *target.absolute().parents))
    return target


def _check_lengths(target: Path, spare: int = 0) -> None:
    """Refuse a path with a part that is longer than its file system takes, less what is to spare for the last."""
    folder = next(parent for parent in target.absolute().parents if os.path.exists(parent))
    try:
        most = os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # as on Windows
        most = 255
    *folders, name = target.absolute().relative_to(folder).parts
    for part, accepted in [*((part, most) for part in folders), (name, most - spare)]:
        if (length := len(os.fsencode(part))) > accepted:
            raise ValueError(f"path '{target}' has a name of {length} bytes; at most {accepted} are accepted")


def _check_writable(target: Path, folders: Iterable[Path]) -> None:
    """Check the first of the folders that exists."""
    existing = next(folder for folder in folders if folder.exists())
    if not existing.is_dir():
        raise ValueError(f"path '{target}' cannot be made because '{existing}' is not a directory")
    if not _takes_files(existing):
        raise ValueError(f"path '{target}' cannot be written because '{existing}' is not writable")


def _takes_files(folder: Path) -> bool:
    """Whether files can be made there, whatever its mode says."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


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
    return check_choice("precision", precision, PRECISIONS)


def _checked_options(precision: str, opset: int | None, max_difference: float | None) -> int:
    lowest = INT4_OPSET if checked_precision(precision) == "int4" else LOWEST_OPSET
    if max_difference is not None:
        check_positive("max_difference", max_difference, "a positive number, or None")
    if opset is not None and check_whole("opset", opset, at_least=0) < lowest:
        raise ValueError(f"opset must be at least {lowest} for precision '{precision}', got {opset}")
    return max(DEFAULT_OPSET, lowest) if opset is None else opset


def _network_and_sample(
    module: nn.Module,
    network: str | None,
    sample: Any,
    contents: dict[str, Any] | None,
    checkpoint: str | os.PathLike[str] | None,
) -> tuple[str, nn.Module, Sample]:
    """Dotted name of the network, a copy of it that is ready for export, and its input on the CPU."""
    name, recorded = captured(module, network)
    part = _compat.uncompiled(find_module(module, name, argument="network"))
    _require_forward(part, name)
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
    if contents is None:
        duplicate = independent_copy(part)
    else:
        duplicate = find_module(
            load_checkpoint_(independent_copy(module), contents, checkpoint), name, argument="network"
        )
    return name, widen_(duplicate).to("cpu").eval(), on_cpu(given)


def _require_forward(part: nn.Module, name: str) -> None:
    if defines(part, "forward"):
        return
    inside = [f"{name}.{child}" if name else child for child, own in part.named_children() if defines(own, "forward")]
    given = f"'{name}' ({type(part).__name__})" if name else type(part).__name__
    instead = " or ".join(f"network='{child}'" for child in inside[:_NAMED])
    raise ValueError(
        f"{given} has no forward; pass the dotted name of a network inside it"
        + (f", such as {instead}" if inside else ", which none of its children is")
    )


def load_checkpoint_(module: nn.Module, checkpoint: dict[str, Any], path: str | os.PathLike[str] | None) -> nn.Module:
    """Load a checkpoint as Lightning does, the module's own hook first, into an uncompiled module.

    Where the module says ``strict_loading = False``, what the checkpoint leaves out stays as it was made.

    Args:
        module: Changed in place; it takes the sizes of a checkpoint of a structurally pruned network.
        checkpoint: Its contents.
        path: Where it was read, for the error message.

    Returns:
        The module.

    Raises:
        ExportError: If the weights do not fit.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> load_checkpoint_(layer, {"state_dict": nn.Linear(2, 1).state_dict()}, "last.ckpt") is layer
        True
    """
    if structures_in(checkpoint) is not None:  # of a network that was made smaller
        resize_(module, checkpoint)
    hook: Any = getattr(module, "on_load_checkpoint", None)
    if hook is not None:
        hook(checkpoint)
    weights = {plain_name(key): value for key, value in checkpoint["state_dict"].items()}
    strict = getattr(module, "strict_loading", True) or weights.keys().isdisjoint(module.state_dict())
    try:
        missing, unexpected = module.load_state_dict(weights, strict=bool(strict))
    except RuntimeError as error:
        hint = _belongs_below(module, weights)
        raise ExportError(f"checkpoint '{path}' does not fit {type(module).__name__}{hint}: {error}") from error
    saved = module.state_dict()  # without what the module leaves out itself
    if odd := [*(name for name in missing if name in saved), *unexpected]:
        warnings.warn(
            f"only one of the two has {listing(odd)}: checkpoint '{path}' and {type(module).__name__}, whose "
            "strict_loading is False; what the checkpoint does not hold is as it was made",
            stacklevel=2,
        )
    return module


def _belongs_below(module: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """A hint where a checkpoint has all weights of a module under the name of one of its parts."""
    own = set(module.state_dict())
    for name in weights:
        first = next((key for key in own if name.endswith(f".{key}")), None)
        prefix = name.removesuffix(first) if first is not None else ""
        if prefix and all(prefix + key in weights for key in own):
            part = prefix.removesuffix(".")
            return f", but its part '{part}' does: pass the LightningModule that it is of, and network='{part}'"
    return ""


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


def _write_checked(graph: bytes, target: Path, check: Callable[[OnnxNetwork], float]) -> float:
    """Write beside the target, compare, and only then take the target's place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(target) as draft:
        draft.write_bytes(graph)
        return check(OnnxNetwork(draft))
