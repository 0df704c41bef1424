"""Does the file compute what the network computes, at more than one batch size?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.export.errors import EvaluationError, ExportError
from lightning_compress.export.isolation import evaluating
from lightning_compress.export.runtime import OnnxNetwork
from lightning_compress.export.sample import Call
from lightning_compress.export.tree import named_tensors

OTHER_BATCH_SIZES = (1, 5, 3)
BRANCH_HINT = "the forward probably branches on the batch size, and the file holds the branch of the sample only"
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
    """

    tensors: tuple[Tensor, ...]
    output: Any


def references(network: nn.Module, call: Call, dynamic: bool) -> list[Reference]:
    """Run the network on the sample and, for a dynamic batch, at two other batch sizes.

    Raises:
        ExportError: If the network fails at one of them.
    """
    batches = [resized(call.tensors, size) for size in batch_sizes(call.tensors, dynamic)]
    return [Reference(tensors, _output(network, call, tensors)) for tensors in batches]


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


def check_parity(file: OnnxNetwork, expected: Sequence[Reference], max_difference: float) -> float:
    """Compare a file with the network's own outputs.

    Args:
        file: The file.
        expected: What the network gives, at one or more batch sizes.
        max_difference: Largest accepted absolute difference, in units of ``max(1, largest |output|)``.

    Returns:
        The largest absolute difference seen.

    Raises:
        ExportError: If shapes or values differ.
    """
    largest = 0.0
    for reference in expected:
        size = batch_size(reference.tensors) or 0
        try:
            found = file.run(reference.tensors)
        except EvaluationError as error:
            raise ExportError(f"the file fails at batch size {size}: {BRANCH_HINT}; {FIXED_HINT} ({error})") from error
        wanted = [tensor for _, tensor in named_tensors(reference.output)]
        largest = max(largest, _difference(wanted, found, file.output_names, size, max_difference))
    return largest


def _difference(
    expected: list[Tensor], found: list[Tensor], names: Sequence[str], size: int, max_difference: float
) -> float:
    """Largest absolute difference at one batch size; raises where it is too large."""
    shapes = [tuple(tensor.shape) for tensor in expected], [tuple(tensor.shape) for tensor in found]
    if shapes[0] != shapes[1]:
        raise ExportError(
            f"at batch size {size} the network gives shapes {shapes[0]} and the file {shapes[1]}: "
            f"{BRANCH_HINT}; {FIXED_HINT}"
        )
    largest = 0.0
    for name, wanted, got in zip(names, expected, found, strict=True):
        reference, value = wanted.double(), got.double()
        same = (reference == value) | (reference.isnan() & value.isnan())  # infinities of one sign are equal
        difference = torch.where(same, 0.0, (reference - value).abs()).max().item() if reference.numel() else 0.0
        finite = reference[reference.isfinite()].abs()
        scale = max(1.0, finite.max().item()) if finite.numel() else 1.0
        if not difference <= max_difference * scale:  # a NaN fails too
            raise ExportError(
                f"at batch size {size} output '{name}' of the file differs by {difference:.3g} from the network's, "
                f"more than max_difference={max_difference:g} times {scale:.3g}: {BRANCH_HINT}; {FIXED_HINT}"
            )
        largest = max(largest, difference)
    return largest
