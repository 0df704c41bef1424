"""Copies of the user's module, on which his step and his networks run without a trace elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import _compat
from lightning_compress.export.copying import independent_copy, widen_
from lightning_compress.export.tracing import users_place
from lightning_compress.mechanisms.capture import NetworkCall
from lightning_compress.mechanisms.dependencies import StructureError
from lightning_compress.mechanisms.isolation import evaluating
from lightning_compress.mechanisms.replay import traceless
from lightning_compress.mechanisms.selection import find_module, listing
from lightning_compress.mechanisms.shrinking import Shrinkage, shrink_, tensors_of
from lightning_compress.mechanisms.student import Detector
from lightning_compress.mechanisms.tree import detached, named_tensors, rebuild
from lightning_compress.report.measure import first_line, macs_by_layer, single_sample


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
        names: Dotted names of the networks that the step calls, after :meth:`look`.
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
            network: Which of the called ones counts; None: all.
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
        self.names = tuple(calls)
        if len(calls) == 1:
            [[call, *_]] = calls.values()
            args, kwargs = rebuild((call.args, dict(call.kwargs)), detached)
            self._call = NetworkCall(args, kwargs, None)
        if gradients:
            loss: Any = output.get("loss") if isinstance(output, Mapping) else output
            scaler = getattr(self._trainer.precision_plugin, "scaler", None)
            (loss if scaler is None else loss * scaler.get_scale()).backward()

    def run(self, copied: nn.Module, *, plainly: bool = False) -> tuple[Any, list[Any]]:
        """Run the network in a copy; the whole step, where it calls several.

        Args:
            copied: From :meth:`copy`.
            plainly: In float32 on the CPU, where the copy must be, for one sample if it can be cut to one.

        Returns:
            What everything that is computed leads to: the output, or the loss; and the outputs of the networks.
        """
        if self._call is None:
            outputs: list[Any] = []
            with ExitStack() as stack:
                for name in self.names:
                    part = find_module(copied, name, argument="network")
                    stack.callback(part.register_forward_hook(lambda _, args, output: outputs.append(output)).remove)
                return self._step(copied, plainly=plainly), outputs
        args, kwargs = self._call.args, dict(self._call.kwargs)
        network = find_module(copied, self.names[0], argument="network")
        if plainly:
            args, kwargs = rebuild(self._one_sample((args, kwargs)), _plain)
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
                    return macs_by_layer(copied, lambda: self.run(copied))
            return macs_by_layer(copied, lambda: self.run(copied))

    def problem(self, shrinkage: Shrinkage) -> str | None:
        """Whether a smaller copy runs, in evaluation and in training, and returns what has the same shapes.

        Args:
            shrinkage: What stays.

        Returns:
            What is wrong; None if nothing is.
        """
        for training in (False, True):
            shapes = []
            for smaller in (False, True):
                with self.copy() as copied:
                    try:
                        if smaller:
                            shrink_(copied, shrinkage)
                        shapes.append([tuple(own.shape) for own in self._last_outputs(copied, training)])
                    except Exception as error:  # whatever a network raises whose shapes are other ones
                        if not smaller:
                            raise
                        what = f"{type(error).__name__}: {first_line(error)}{users_place(error)}"
                        return f"the smaller network does not run: {what}"
            if shapes[0] != shapes[1]:
                return f"the smaller network returns shapes {shapes[1]} instead of {shapes[0]}"
        return None

    def difference(self, shrinkage: Shrinkage) -> float | None:
        """How far a smaller copy is from one with zeros in the place of what goes: in evaluation, on the CPU.

        Args:
            shrinkage: What stays.

        Returns:
            The largest difference of what both return, of the largest number; None if the network does not run there.
        """
        values = []
        for smaller in (False, True):
            with self.copy() as copied:
                widen_(copied).cpu()
                _fill_zeros_(copied)
                if smaller:
                    shrink_(copied, shrinkage)
                else:
                    for name, own in tensors_of(copied).items():
                        own.data = shrinkage.zeroed(name, own.data)
                try:
                    with evaluating(copied):
                        found = self.run(copied, plainly=True)
                except Exception:  # operations that the CPU has not; on the device this network ran
                    if smaller:
                        raise
                    return None
                values.append([own.detach().double() for _, own in named_tensors(found)])
        pairs = [(own, other) for own, other in zip(*values, strict=True) if own.shape == other.shape and own.numel()]
        largest = max((float(own.abs().max()) for own, _ in pairs), default=0.0)
        return max((float((own - other).abs().max()) for own, other in pairs), default=0.0) / (largest or 1.0)

    # Private

    def _step(self, copied: Any, *, plainly: bool = False) -> Any:
        batch = _copied(self._batch)
        if plainly:
            batch = rebuild(batch, _plain)
            return copied.training_step(*_compat.step_arguments(self._trainer, copied, batch, self._batch_idx))
        with self._trainer.precision_plugin.train_step_context():
            return copied.training_step(*_compat.step_arguments(self._trainer, copied, batch, self._batch_idx))

    def _last_outputs(self, copied: nn.Module, training: bool) -> list[Tensor]:
        """Of the last network: what those before it return may have other shapes."""
        with torch.no_grad():
            if training:
                return [own for _, own in named_tensors(self.run(copied)[1][-1])]
            with evaluating(copied):
                return [own for _, own in named_tensors(self.run(copied)[1][-1])]

    @staticmethod
    def _one_sample(inputs: Any) -> Any:
        try:
            return single_sample(inputs)
        except ValueError:  # no batch dimension, or none that is known
            return inputs


def _copied(batch: Any) -> Any:
    """A batch that a step may write into, and take things out of."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # tensors with a graph, say
        return rebuild(batch, lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf)


def _plain(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    half = leaf.dtype in (torch.float16, torch.bfloat16)
    return leaf.detach().to("cpu", torch.float32 if half else leaf.dtype)


def _fill_zeros_(module: nn.Module) -> None:
    """Put numbers in the place of parameters that are zero, behind which no difference would be seen."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.ndim and parameter.numel() and not parameter.any():
                generator = torch.Generator().manual_seed(parameter.numel())
                numbers = torch.rand(parameter.shape, generator=generator)
                parameter.copy_(numbers / max(1, parameter[0].numel()) ** 0.5)
