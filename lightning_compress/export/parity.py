"""Does the file compute what the network computes, at more than one batch size?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.export.errors import EvaluationError, ExportError
from lightning_compress.export.runtime import OnnxNetwork
from lightning_compress.export.sample import Call
from lightning_compress.mechanisms.isolation import evaluating
from lightning_compress.mechanisms.tree import named_tensors

OTHER_BATCH_SIZES = (1, 5, 3)
MAX_DIFFERENCE = 1e-3
"""Between a file and its network, where nobody says otherwise and both compute in float."""
BRANCH_HINT = "the forward probably branches on the batch size, and the file holds one branch only"
RANDOM_HINT = "the forward may draw random numbers in evaluation, or keep a state between calls"
NO_KERNEL = "NOT_IMPLEMENTED"
"""What ONNX Runtime says then."""
KERNEL_HINT = (
    "; an operation of it has no kernel there, as some have none in double precision: train in another one, or export "
    "module.float()"
)
FIXED_HINT = "pass dynamic_batch=False if the network is only used at one batch size"


def batch_size(tensors: Sequence[Tensor]) -> int | None:
    """Length of dimension 0 of the first tensor that has one."""
    return next((tensor.shape[0] for tensor in tensors if tensor.ndim > 0), None)


def is_batched(tensor: Tensor, batch: int | None) -> bool:
    """Whether dimension 0 of a tensor is taken for the batch dimension."""
    return batch is not None and tensor.ndim > 0 and tensor.shape[0] == batch


def batch_sizes(tensors: Sequence[Tensor], dynamic: bool) -> tuple[int, ...]:
    """The batch sizes to check: the sample's and, for a dynamic batch, two others."""
    batch = batch_size(tensors)
    if batch is None:
        return (0,)
    others = [size for size in OTHER_BATCH_SIZES if size != batch]
    return (batch, *others[:2]) if dynamic else (batch,)


def traced_size(tensors: Sequence[Tensor], dynamic: bool) -> int:
    """The batch size that a file is traced at: with one row torch takes several layouts for the same, as channels_last.

    So where the batch stays open it is the first of :func:`batch_sizes` with more rows.
    """
    sizes = batch_sizes(tensors, dynamic)
    return next((size for size in sizes if size > 1), sizes[0])


def resized(tensors: Sequence[Tensor], size: int) -> tuple[Tensor, ...]:
    """The same rows, repeated or cut to another batch size."""
    batch = batch_size(tensors)
    if batch is None or size == batch:
        return tuple(tensors)
    rows = torch.arange(size, device="cpu") % batch
    return tuple(tensor[rows] if is_batched(tensor, batch) else tensor for tensor in tensors)


@dataclass(frozen=True)
class Reference:
    """What the torch network makes of one batch.

    Attributes:
        tensors: The input, one tensor for each input of the file.
        output: What the network returned, in evaluation mode.
        traced: Whether the file was traced at this batch size.
    """

    tensors: tuple[Tensor, ...]
    output: Any
    traced: bool = True


def references(network: nn.Module, call: Call, dynamic: bool) -> list[Reference]:
    """Run the network on the sample and, for a dynamic batch, at two other batch sizes.

    Raises:
        ExportError: If the network fails at one of them.
    """
    traced = traced_size(call.tensors, dynamic)
    batches = {size: resized(call.tensors, size) for size in batch_sizes(call.tensors, dynamic)}
    return [Reference(own, _output(network, call, own), size == traced) for size, own in batches.items()]


def _output(network: nn.Module, call: Call, tensors: tuple[Tensor, ...]) -> Any:
    sample = call.sample(tuple(tensor.clone() for tensor in tensors))  # a forward may write to its input
    try:
        with evaluating(network):
            return network(*sample.args, **sample.kwargs)
    except Exception as error:  # whatever the user's forward raises
        name, reason = type(network).__name__, f"{type(error).__name__}: {error}"
        size = batch_size(tensors)
        if size == batch_size(call.tensors):
            raise ExportError(f"{name} does not run on the sample: {reason}") from error
        raise ExportError(f"{name} itself fails at batch size {size} ({reason}); {FIXED_HINT}") from error


def run_once(network: nn.Module, call: Call) -> Any:
    """What a network gives on the sample, in evaluation mode.

    Raises:
        ExportError: If it fails.
    """
    return _output(network, call, call.tensors)


def check_parity(file: OnnxNetwork, expected: Sequence[Reference], max_difference: float = MAX_DIFFERENCE) -> float:
    """Compare a file with the network's own outputs.

    Args:
        file: The file.
        expected: What the network gives, at one or more batch sizes.
        max_difference: Largest accepted absolute difference of an element, in units of its own size, of 1, or of ten
            times what a quarter of the output stays below, whichever is largest; integers must be equal.

    Returns:
        The largest absolute difference seen.

    Raises:
        ExportError: If shapes or values differ.
    """
    largest = 0.0
    for reference in sorted(expected, key=lambda own: not own.traced):  # what fails there as well is no branch
        size = batch_size(reference.tensors) or 0
        try:
            found = file.run(reference.tensors)
        except EvaluationError as error:
            if not reference.traced:
                hint = f"the file fails at batch size {size}: {BRANCH_HINT}; {FIXED_HINT}"
            else:
                hint = f"ONNX Runtime does not run the file{KERNEL_HINT if NO_KERNEL in str(error) else ''}"
            raise ExportError(f"{hint} ({error})") from error
        wanted = [tensor for _, tensor in named_tensors(reference.output)]
        hint = RANDOM_HINT if reference.traced else f"{BRANCH_HINT}; {FIXED_HINT}"
        largest = max(largest, _difference(wanted, found, file.output_names, size, max_difference, hint))
    return largest


def _difference(
    expected: list[Tensor], found: list[Tensor], names: Sequence[str], size: int, max_difference: float, hint: str
) -> float:
    """Largest absolute difference at one batch size; raises where it is too large."""
    shapes = [tuple(tensor.shape) for tensor in expected], [tuple(tensor.shape) for tensor in found]
    if shapes[0] != shapes[1]:
        raise ExportError(f"at batch size {size} the network gives shapes {shapes[0]} and the file {shapes[1]}: {hint}")
    largest = 0.0
    for name, wanted, got in zip(names, expected, found, strict=True):
        if wanted.numel() == 0:
            continue
        reference, value = wanted.double(), got.double()
        same = (reference == value) | (reference.isnan() & value.isnan())  # infinities of one sign are equal
        difference = torch.where(same, 0.0, (reference - value).abs())
        scale = _scale(reference) if wanted.is_floating_point() else torch.zeros_like(reference)
        excess = difference - max_difference * scale
        worst = int(excess.argmax())  # a NaN counts as the largest
        if not excess.flatten()[worst] <= 0:
            raise ExportError(
                f"at batch size {size} output '{name}' of the file differs by {difference.flatten()[worst]:.3g} from "
                f"the network's, more than max_difference={max_difference:g} times {scale.flatten()[worst]:.3g}: {hint}"
            )
        largest = max(largest, difference.max().item())
    return largest


def _scale(reference: Tensor) -> Tensor:
    """What an error is measured against: 1, the element itself, or ten times what a quarter of all stay below.

    The largest of all would let a masked logit of -1e9 excuse any error elsewhere.
    """
    magnitude = torch.where(reference.isfinite(), reference.abs(), 0.0)
    return magnitude.clamp(min=max(1.0, usual_size(magnitude).item()))


def usual_size(magnitude: Tensor) -> Tensor:
    """Ten times what a quarter of all elements stay below: what is larger, such as a masked score, is no usual element.

    Args:
        magnitude: At least one element, none negative.

    Returns:
        A number, of 0 dimensions.
    """
    return 10.0 * magnitude.flatten().kthvalue(max(1, magnitude.numel() // 4)).values
