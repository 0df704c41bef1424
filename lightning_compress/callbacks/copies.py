"""Copies of the user's module, on which his step and his networks run without a trace elsewhere."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_compress import _compat
from lightning_compress.export.copying import independent_copy, widen_
from lightning_compress.export.errors import first_line
from lightning_compress.export.tracing import users_place
from lightning_compress.mechanisms.capture import NetworkCall
from lightning_compress.mechanisms.channel_graph import StructureError
from lightning_compress.mechanisms.isolation import evaluating, full_float32
from lightning_compress.mechanisms.optimizers import loss_scale
from lightning_compress.mechanisms.replay import prepare_step, traceless
from lightning_compress.mechanisms.selection import find_module, lies_within, listing
from lightning_compress.mechanisms.shrinking import Shrinkage, shrink_, tensors_of
from lightning_compress.mechanisms.student import Detector
from lightning_compress.mechanisms.tree import detached, named_tensors, rebuild
from lightning_compress.report.measure import macs_by_layer, single_sample

TOLERANCE = 1e-5
"""By how much the smaller network may differ from the one with zeros, of the largest output."""
FEW = 4  # samples that the smaller network is compared on
LARGE = 1e4  # times the median, and the same in both: what stands for infinity


class SkippedBatchError(Exception):
    """The step has called no network with this batch."""


class Copies:
    """Copies of a module, and what its step calls.

    Args:
        trainer: The Trainer.
        module: The LightningModule, which is not touched.
        batch: A training batch, as the step receives it; each step gets a copy.
        batch_idx: Its number.

    Attributes:
        names: Dotted names of the networks that the step calls, after :meth:`look`; without those that are frozen, as
            a teacher is, if others are not.
    """

    def __init__(self, trainer: Any, module: nn.Module, batch: Any, batch_idx: int) -> None:
        self._trainer, self._module = trainer, module
        self._batch, self._batch_idx = batch, batch_idx
        self._call: NetworkCall | None = None  # where it is one
        self.names: tuple[str, ...] = ()

    @contextmanager
    def copy(self) -> Iterator[nn.Module]:
        """A copy that may run the user's step."""
        copied = independent_copy(self._module)
        _compat.attach_trainer_(copied, self._trainer)
        with traceless(copied, parameters=False), ExitStack() as stack:
            stack.callback(_compat.attach_trainer_, copied, None)
            yield copied

    def look(self, copied: nn.Module, network: str | None, *, gradients: bool) -> None:
        """Run the step, for what it calls.

        Args:
            copied: From :meth:`copy`.
            network: Which of the called ones counts, be it frozen; None: all.
            gradients: Whether to leave the gradients of the loss on all parameters, the frozen ones too.

        Raises:
            SkippedBatchError: If it calls none.
            StructureError: If it does not call this one.
        """
        for parameter in copied.parameters() if gradients else ():
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.enable_grad(), Detector(copied) as detector:
            detector.start()
            output = self._step(copied)
            calls = detector.stop()
        if output is None or not calls:
            raise SkippedBatchError
        if network is not None:
            find_module(copied, network, argument="network")
            if network not in calls:
                raise StructureError(f"network='{network}' is none of what the step calls: {listing(list(calls))}")
            calls = {network: calls[network]}
        trained = [name for name in calls if self._is_trained(name)]
        self.names = tuple(trained or calls)
        if len(self.names) == 1 and len(calls[self.names[0]]) == 1:
            [call] = calls[self.names[0]]
            args, kwargs = rebuild((call.args, dict(call.kwargs)), detached)
            self._call = NetworkCall(args, kwargs, None)
        if gradients:
            loss: Any = output.get("loss") if isinstance(output, Mapping) else output
            (loss * loss_scale(self._trainer)).backward()

    def has(self, name: str) -> bool:
        """Whether a module is a part of the networks that are made smaller.

        Args:
            name: Its dotted name.

        Returns:
            False for what is beside them.
        """
        return lies_within(name, self.names)

    def run(self, copied: nn.Module, *, plainly: bool = False) -> tuple[Any, list[Any]]:
        """Run the network in a copy; the whole step, where it calls several, or one more than once.

        Args:
            copied: From :meth:`copy`.
            plainly: On the CPU, where the copy must be, in its type, for a few samples if it can be cut to them.

        Returns:
            What everything that is computed leads to: the output, or the loss; and the outputs of the last network, all
            of which must keep their shapes.
        """
        if self._call is None:
            outputs: list[Any] = []
            last = find_module(copied, self.names[-1], argument="network")
            hook = last.register_forward_hook(lambda _, args, output: outputs.append(output))
            try:
                return self._step(copied, plainly=plainly), outputs
            finally:
                hook.remove()
        args, kwargs = self._call.args, dict(self._call.kwargs)
        network = find_module(copied, self.names[0], argument="network")
        if plainly:
            args, kwargs = rebuild(_few_samples((args, kwargs)), _plain(copied))
            output = network(*args, **kwargs)
        else:
            with self._trainer.precision_plugin.train_step_context():
                output = network(*args, **kwargs)
        return output, [output]

    def macs(self, copied: nn.Module) -> dict[str, int]:
        """Multiply-accumulates of each layer, for one sample; for the batch where it cannot be cut."""
        call = self._call
        with evaluating(copied):
            if call is not None:
                network = find_module(copied, self.names[0], argument="network")
                try:
                    args, kwargs = single_sample((call.args, dict(call.kwargs)))
                    with self._trainer.precision_plugin.train_step_context():
                        return macs_by_layer(copied, lambda: network(*args, **kwargs))
                except Exception:  # some networks run at one size only
                    pass
            with _NoGradients():
                return macs_by_layer(copied, lambda: self.run(copied), within=self.names)

    def problem(self, shrinkage: Shrinkage) -> str | None:
        """Whether a smaller copy runs, in evaluation and in training, and returns what has the same shapes.

        Args:
            shrinkage: What stays.

        Returns:
            What is wrong; None if nothing is.
        """
        for training in (False, True):
            with self.copy() as copied:
                what = "the network does not run"
                try:
                    before = self._last_shapes(copied, training)  # what the module keeps of it is of the larger network
                    shrink_(copied, shrinkage)
                    what = "the smaller network does not run"
                    after = self._last_shapes(copied, training)
                    if before != after:
                        return f"the smaller network returns shapes {after} instead of {before}"
                    what = "the training step does not run with the smaller network"
                    if training:
                        with torch.enable_grad():
                            self._step(copied)
                except Exception as error:  # whatever is raised where shapes are other ones
                    return f"{what}: {type(error).__name__}: {first_line(error)}{users_place(error)}"
        return None

    def difference(self, shrinkage: Shrinkage) -> float | None:
        """How far a smaller copy is from one with zeros in the place of what goes, on the CPU.

        Norms over channels, for which zeros count, do no more than scale and shift meanwhile, and dropout does nothing.

        Args:
            shrinkage: What stays.

        Returns:
            The largest difference of what both return, of the largest number; None if the network does not run there,
            or draws random numbers that other sizes change.
        """
        found = []
        for training in (False, True):
            for dtype in (torch.float64, torch.float32):  # what the user makes himself may be of the latter
                try:
                    whole = self._values(None, dtype, training)
                except Exception:  # operations that the CPU has not; on the device this network ran
                    continue
                if training and dtype == torch.float32:
                    break  # statistics of few samples in few digits
                zeroed, smaller = (self._values(shrinkage, dtype, training, cut=cut) for cut in (False, True))
                distance = _distance(zeroed, smaller)
                if distance <= TOLERANCE or not _distance(whole, self._values(None, dtype, training, seed=1)):
                    found.append(distance)  # else it draws random numbers, others for other sizes
                break
        return max(found, default=None)

    # Private

    def _is_trained(self, name: str) -> bool:
        network = find_module(self._module, name, argument="network")
        return any(leaf.requires_grad for leaf in network.parameters())

    def _as_needed(self) -> AbstractContextManager[Any]:
        """Gradients for a step, which may differentiate something itself; for a network alone, as it is."""
        return torch.enable_grad() if self._call is None else nullcontext()

    def _step(self, copied: Any, *, plainly: bool = False) -> Any:
        batch = _copied(self._batch)
        if plainly:
            batch = rebuild(batch, _plain(copied))
        arguments = _compat.step_arguments(self._trainer, copied, batch, self._batch_idx)
        prepare_step(copied, arguments)
        with nullcontext() if plainly else self._trainer.precision_plugin.train_step_context():
            return copied.training_step(*arguments)

    def _last_shapes(self, copied: nn.Module, training: bool) -> list[tuple[int, ...]]:
        """Of the outputs of the last network: what those before it return may have other shapes."""
        with torch.no_grad() if training else evaluating(copied), self._as_needed():
            return [tuple(leaf.shape) for _, leaf in named_tensors(self.run(copied)[1])]

    def _values(
        self, shrinkage: Shrinkage | None, dtype: torch.dtype, training: bool, *, cut: bool = False, seed: int = 0
    ) -> list[Tensor]:
        """What a copy returns: whole, with zeros, or smaller."""
        with self.copy() as copied:
            torch.manual_seed(seed)
            widen_(copied).cpu().to(dtype)
            _fill_zeros_(copied)
            if shrinkage is not None and cut:
                shrink_(copied, shrinkage)
            elif shrinkage is not None:
                for name, leaf in tensors_of(copied).items():
                    leaf.data = shrinkage.zeroed(name, leaf.data)
            with torch.no_grad() if training else evaluating(copied), self._as_needed(), _Plainly(), full_float32():
                returned = self.run(copied, plainly=True)
        leaves = [leaf.detach() for _, leaf in named_tensors(returned)]
        return [leaf.to(torch.float64) for leaf in leaves if leaf.is_floating_point()]


def _copied(batch: Any) -> Any:
    """A batch that a step may write into, and take things out of."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # tensors with a graph, say
        return rebuild(batch, lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf)


def _plain(copied: nn.Module) -> Callable[[Any], Any]:
    """What brings a leaf to where a copy is, in its type."""
    dtype = next((leaf.dtype for leaf in copied.parameters() if leaf.is_floating_point()), torch.float32)

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().to("cpu", dtype if leaf.is_floating_point() else leaf.dtype)

    return plain


def _few_samples(inputs: Any) -> Any:
    try:
        return single_sample(inputs, samples=FEW)
    except ValueError:  # no batch dimension, or none that is known
        return inputs


class _NoGradients(TorchFunctionMode):
    """Gradients are zero: what they are does not count, and that they are computed neither."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.autograd.grad:
            inputs = args[1] if len(args) > 1 else (kwargs or {})["inputs"]
            return tuple(map(torch.zeros_like, (inputs,) if isinstance(inputs, Tensor) else inputs))
        return func(*args, **(kwargs or {}))


NORMS = (F.layer_norm, F.group_norm, F.rms_norm, torch.layer_norm, torch.group_norm, torch.rms_norm)
DROPOUTS = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout),
)
NOISE = (torch.rand_like, torch.randn_like)


class _Plainly(TorchFunctionMode):
    """Norms over channels do no more than scale and shift, dropout does nothing, and noise is the same everywhere."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func in NOISE:
            given = {**dict(zip(("input",), args, strict=True)), **kwargs}
            given.pop("generator", None)
            return torch.full_like(given.pop("input"), 0.5, **given)
        if func not in NORMS:
            return func(*args, **kwargs)
        takes_bias = func not in (F.rms_norm, torch.rms_norm)
        given = {**dict(zip(("input", "", "weight", "bias" if takes_bias else ""), args, strict=False)), **kwargs}
        x, weight, bias = given["input"], given.get("weight"), given.get("bias")
        if func in (F.group_norm, torch.group_norm):
            shape = (-1, *[1] * (x.ndim - 2))
            weight, bias = (None if leaf is None else leaf.reshape(shape) for leaf in (weight, bias))
        x = x if weight is None else x * weight
        return x if bias is None else x + bias


def _distance(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest difference of what has the same shapes, each of the largest number of its tensor.

    What both have alike does not count as large: numbers that stand for infinity would hide all others.
    """
    largest = 0.0
    for one, other in zip(expected, found, strict=True):
        if one.shape != other.shape:
            continue
        different = (one != other) & ~(one.isnan() & other.isnan())
        if not bool(different.any()):
            continue
        sizes = one.abs()
        usual = sizes[one.isfinite() & (sizes > 0)]
        counts = one.isfinite() & (different | (sizes <= LARGE * (usual.median() if usual.numel() else 1.0)))
        scale = float(sizes[counts].max()) if bool(counts.any()) else 0.0
        gap = float((one - other)[different].abs().max())
        largest = max(largest, gap / (scale or 1.0) if math.isfinite(gap) else math.inf)
    return largest


def _fill_zeros_(module: nn.Module) -> None:
    """Put numbers in the place of parameters that are zero, behind which no difference would be seen."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.ndim and parameter.numel() and not parameter.any():
                generator = torch.Generator().manual_seed(parameter.numel())
                numbers = torch.rand(parameter.shape, generator=generator, device="cpu")
                parameter.copy_(numbers / max(1, parameter[0].numel()) ** 0.5)
