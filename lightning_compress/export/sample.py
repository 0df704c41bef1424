"""What to export and on which input: the sample, where it comes from, and how it is bound to the forward."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress import _compat
from lightning_compress.mechanisms.reading import read_saved
from lightning_compress.mechanisms.selection import plain_name
from lightning_compress.mechanisms.tree import is_constant, leaves, rebuild, unique_names

NO_TENSORS = (torch.dtype, torch.device, torch.layout, torch.memory_format, Enum)
OUR_BASES = ("torch.", "lightning.", "pytorch_lightning.")


@dataclass(frozen=True)
class Sample:
    """One call of a network: positional and keyword arguments, as its forward takes them.

    Attributes:
        args: Positional arguments; tensors, or nested containers of them.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """A call in canonical form, so that export and evaluation agree on the order of the inputs.

    Attributes:
        arguments: The call as ``inspect`` bound it, defaults filled in.
        names: A name for each tensor among the arguments, in order.
        tensors: Those tensors.
        constants: ``repr`` of each plain value among the arguments, by name.
    """

    arguments: inspect.BoundArguments
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    constants: dict[str, str]

    def sample(self, tensors: tuple[Tensor, ...]) -> Sample:
        """The same call with other tensors."""
        remaining = iter(tensors)

        def other(leaf: Any) -> Any:
            return next(remaining) if isinstance(leaf, Tensor) else leaf

        arguments = inspect.BoundArguments(
            self.arguments.signature,
            {name: rebuild(value, other) for name, value in self.arguments.arguments.items()},
        )
        return Sample(arguments.args, arguments.kwargs)


BASES = ("Module", "LightningModule", "DataHooks", "ModelHooks")
"""Classes of torch and Lightning whose methods are empty."""


def defines(module: nn.Module, method: str) -> bool:
    """Whether a method is the user's, rather than the empty one of torch or Lightning."""
    function = inspect.unwrap(getattr(module, method))
    if function is None:  # how Lightning lets a subclass have none
        return False
    home = getattr(function, "__module__", None) or ""
    base_class = getattr(function, "__qualname__", "").split(".")[0] in BASES
    return not (base_class and home.startswith(OUR_BASES)) and function.__name__ != "_forward_unimplemented"


def read_sample(path: str | os.PathLike[str]) -> Any:
    """Read the input of a network from a file.

    Args:
        path: What ``torch.save`` has written as ``.pt``, or NumPy as ``.npy``.

    Returns:
        What is in it; an array as a tensor.

    Raises:
        ValueError: If it cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(torch.zeros(2, 3), f"{folder}/input.pt")
        ...     read_sample(f"{folder}/input.pt").shape
        torch.Size([2, 3])
    """
    file = Path(path)
    if file.suffix not in (".pt", ".npy"):
        raise ValueError(f"sample must be a .pt or a .npy file, got '{file}'")
    if not file.is_file():
        raise ValueError(f"sample: there is no file '{file}'")
    if file.suffix == ".pt":
        return read_saved(file, "sample", trusted="load it yourself, and give what is in it")
    try:
        return torch.from_numpy(np.load(file))
    except Exception as error:  # it raises many kinds
        raise ValueError(f"sample: '{file}' cannot be read: {' '.join(str(error).split())[:200]}") from error


def as_sample(sample: Any, signature: inspect.Signature) -> Sample:
    """Read the ``sample`` argument: a tensor, a tuple, a dict, a :class:`Sample`, or the path of a file with one.

    Raises:
        TypeError: If it is anything else.
        ValueError: If it is empty, or a file that cannot be read.
    """
    if isinstance(sample, (str, os.PathLike)):
        sample = read_sample(sample)
    check_sample_type(sample)
    if isinstance(sample, Sample):
        result = sample
    elif isinstance(sample, Tensor):
        result = Sample((sample,))
    elif isinstance(sample, tuple):
        result = Sample(sample)
    else:
        named = _are_keywords(sample, signature)
        result = Sample(kwargs={str(key): value for key, value in sample.items()}) if named else Sample((sample,))
    if not any(isinstance(leaf, Tensor) for _, leaf in leaves([list(result.args), dict(result.kwargs)])):
        raise ValueError(f"sample holds no tensor: {sample!r}")
    return result


def check_sample_type(sample: Any) -> None:
    """Refuse what is no sample, whatever a file that it names holds.

    Raises:
        TypeError: If it is neither a tensor, a tuple, a dict, a :class:`Sample` nor a path.
    """
    if not isinstance(sample, (str, os.PathLike, Sample, Tensor, tuple, Mapping)):
        raise TypeError(
            "sample must be a tensor, a tuple of arguments, a dict, a Sample(args, kwargs) or a file of one, "
            f"got {type(sample).__name__}"
        )


def bind(signature: inspect.Signature, sample: Sample) -> Call:
    """Bind a sample to the signature of a forward.

    Raises:
        TypeError: If the forward does not take it.
    """
    arguments = signature.bind(*sample.args, **sample.kwargs)
    arguments.apply_defaults()
    found: list[tuple[str, Any]] = []
    for name, value in arguments.arguments.items():
        prefix = "" if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else name
        found.extend(leaves(value, prefix))
    tensors = [(name, leaf) for name, leaf in found if isinstance(leaf, Tensor)]
    for name, leaf in found:
        if not (isinstance(leaf, (Tensor, *NO_TENSORS)) or is_constant(leaf) or callable(leaf)):
            raise TypeError(
                f"argument '{name}' is of type {type(leaf).__name__}, whose tensors a file cannot take; name a network "
                "inside that takes tensors with network=, or wrap the object in a dict, a tuple or a dataclass"
            )
    constants = {name: repr(leaf) for name, leaf in found if is_constant(leaf) and leaf is not None}
    return Call(
        arguments, tuple(unique_names(name for name, _ in tensors)), tuple(tensor for _, tensor in tensors), constants
    )


def on_cpu(sample: Sample) -> Sample:
    """The sample with its own copies of the tensors on the CPU, half precision widened to float32."""

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        dtype = torch.float32 if leaf.dtype in (torch.float16, torch.bfloat16) else leaf.dtype
        return leaf.detach().to("cpu", dtype, copy=True)

    return Sample(tuple(rebuild(value, moved) for value in sample.args), rebuild(dict(sample.kwargs), moved))


def captured(module: nn.Module, network: str | None) -> tuple[str, Sample | None]:
    """Which network to export, and the input that a callback recorded for it in the last training step.

    Args:
        module: The LightningModule, or any other module.
        network: Dotted name that the user chose, or None.

    Returns:
        The dotted name, "" where nothing says otherwise, and the recorded input or None.

    Raises:
        ValueError: If callbacks recorded different networks and ``network`` does not choose between them.
    """
    trainer = _compat.attached_trainer(module)
    recorded = [getattr(callback, "captured_sample", None) for callback in getattr(trainer, "callbacks", None) or []]
    by_name = {plain_name(entry.network): entry for entry in recorded if entry is not None}
    if network is None and len(by_name) > 1:
        raise ValueError(
            f"callbacks recorded the input of several networks, {sorted(by_name)}; choose one with network="
        )
    name = next(iter(by_name), "") if network is None else plain_name(network)
    entry = by_name.get(name)
    return name, None if entry is None else Sample(tuple(entry.args), dict(entry.kwargs))


def _are_keywords(sample: Mapping[Any, Any], signature: inspect.Signature) -> bool:
    """Whether the keys of a dict are names of arguments, rather than the contents of a single argument."""
    kinds = inspect.Parameter
    parameters = signature.parameters.values()
    named = {entry.name for entry in parameters if entry.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
    if all(key in named for key in sample):
        return True
    takes_any = any(entry.kind is kinds.VAR_KEYWORD for entry in parameters)
    needs_one = any(
        entry.default is kinds.empty and entry.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        for entry in parameters
        if entry.name not in sample
    )
    return takes_any and not needs_one and all(isinstance(key, str) for key in sample)
