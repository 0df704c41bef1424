"""Where things are in what networks return and in what loaders give, without knowing the format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_compress.functional import soft_targets
from lightning_compress.mechanisms.selection import did_you_mean
from lightning_compress.mechanisms.tree import named_tensors

Locator = str | int | None
LOGIT_KEYS = ("logits", "out")


def find_logits(output: Any, locator: Locator, *, owner: str) -> Tensor:
    """The logits in the output of a network.

    Args:
        output: What the network returned.
        locator: Key, attribute or index; None for a tensor, ``.logits``, ``["logits"]``, ``["out"]``, or the only
            floating tensor. A bare tensor is taken as it is in any case.
        owner: Whose output it is, for the error message ("student", "teacher").

    Returns:
        The tensor.

    Raises:
        ValueError: If there is nothing there, or nothing to tell which tensor is meant.

    Example:
        >>> find_logits({"out": torch.ones(1, 2), "aux": torch.zeros(1, 2)}, None, owner="student")
        tensor([[1., 1.]])
    """
    if isinstance(output, Tensor):
        return output
    if locator is not None:
        found = locate(output, locator, argument="output", owner=f"the {owner}'s output")
    else:
        found = next((value for key in LOGIT_KEYS if (value := _look_up(output, key)) is not None), None)
        if found is None:
            floating = [leaf for _, leaf in named_tensors(output) if leaf.is_floating_point()]
            if len(floating) != 1:
                raise ValueError(
                    f"output: the {owner} returns {describe(output)} with {len(floating)} floating tensors; say which "
                    "one holds the logits: output= a key, an attribute or an index"
                )
            found = floating[0]
    if not isinstance(found, Tensor):
        raise ValueError(f"output={locator!r}: that entry of the {owner}'s output is {describe(found)}, not a tensor")
    return found


def class_dimension(logits: Tensor, given: int | None) -> int:
    """The dimension of the classes.

    Args:
        logits: Of any shape.
        given: The dimension, from the front or from the back; None: found by the shape.

    Returns:
        The dimension, from the front.

    Raises:
        ValueError: If there is no such dimension, or none can be told.

    Example:
        >>> class_dimension(torch.zeros(2, 10, 8, 8), None), class_dimension(torch.zeros(2, 8, 8, 10), -1)
        (1, 3)
    """
    if given is None:
        return soft_targets.class_dimension(logits.shape)
    if not -logits.ndim <= given < logits.ndim:
        raise ValueError(f"class_dim={given} is no dimension of logits of shape {tuple(logits.shape)}")
    return given % logits.ndim


def find_labels(batch: Any, locator: Locator, *, shape: Sequence[int], why: str) -> Tensor:
    """The labels in a batch.

    Args:
        batch: What the step received.
        locator: Key, attribute or index; None for the only integer tensor of the right shape.
        shape: Shape of the labels: that of the logits without the classes.
        why: What needs them, for the error message.

    Returns:
        Integer tensor of that shape.

    Raises:
        ValueError: If they are not there, or cannot be told.

    Example:
        >>> find_labels((torch.ones(2, 3), torch.tensor([0, 1])), None, shape=(2,), why="loss_kind='dkd'")
        tensor([0, 1])
    """
    if locator is not None:
        found = locate(batch, locator, argument="labels", owner="the batch")
        if not isinstance(found, Tensor) or tuple(found.shape) != tuple(shape):
            raise ValueError(f"labels={locator!r}: {why} needs labels of shape {tuple(shape)}, got {describe(found)}")
        return found
    candidates = [leaf for _, leaf in named_tensors(batch) if tuple(leaf.shape) == tuple(shape) and _is_integer(leaf)]
    if len(candidates) != 1:
        raise ValueError(
            f"{why} needs the labels, and the batch, {describe(batch)}, holds {len(candidates)} integer tensors of "
            f"shape {tuple(shape)}; say where they are: labels= a key, an attribute or an index"
        )
    return candidates[0]


def locate(container: Any, locator: str | int, *, argument: str, owner: str) -> Any:
    """An entry of a container by key, attribute or index.

    Args:
        container: A mapping, a sequence or any object.
        locator: What to look up.
        argument: The user's argument, for the error message.
        owner: What the container is, for the error message.

    Returns:
        The entry.

    Raises:
        ValueError: If there is none; the message names what there is.

    Example:
        >>> locate({"a": 1}, "a", argument="output", owner="the student's output")
        1
    """
    found = _look_up(container, locator)
    if found is None:
        names = _names(container)
        raise ValueError(
            f"{argument}={locator!r} is not in {owner}, which is {describe(container)}"
            f"{did_you_mean(str(locator), names)}"
        )
    return found


def describe(value: Any) -> str:
    """A value in a few words, for error messages.

    Args:
        value: Anything.

    Returns:
        Its type, with a tensor's shape, a mapping's keys, or a sequence's types.

    Example:
        >>> describe({"a": torch.ones(2)})
        "dict with 'a'"
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with {', '.join(repr(key) for key in value)}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {', '.join(type(entry).__name__ for entry in value) or 'nothing'}"
    return type(value).__name__


def _look_up(container: Any, locator: str | int) -> Any:
    if isinstance(container, Mapping):
        return container.get(locator)
    if isinstance(locator, int):
        sequence = isinstance(container, Sequence) and not isinstance(container, str)
        return container[locator] if sequence and -len(container) <= locator < len(container) else None
    return None if isinstance(container, Tensor) else getattr(container, locator, None)


def _names(container: Any) -> list[str]:
    if isinstance(container, Mapping):
        return [str(key) for key in container]
    return [name for name in vars(container) if not name.startswith("_")] if hasattr(container, "__dict__") else []


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
