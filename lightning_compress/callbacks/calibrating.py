"""What the techniques that quantise share: finding the grids of a network by replaying the user's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_compress import _compat
from lightning_compress.callbacks.arguments import (
    check_edge_bits,
    check_layer_bits,
    check_layers,
    check_name,
    check_whole,
    edge_bits_of,
)
from lightning_compress.callbacks.base import CompressionCallback, log
from lightning_compress.callbacks.intents import Aim, Intent, layers_of, left_out
from lightning_compress.callbacks.ranks import shards, together
from lightning_compress.export.sample import defines
from lightning_compress.export.scales import given_steps, grids_of_steps, inside
from lightning_compress.functional.quantizers import check_bits
from lightning_compress.mechanisms.batchnorm import batch_norms, reestimate_batchnorm_, statistics_kept
from lightning_compress.mechanisms.calibration import Calibration, Settings, statistics_of
from lightning_compress.mechanisms.controller import StepController
from lightning_compress.mechanisms.grids import Grids, WeightGrid
from lightning_compress.mechanisms.isolation import evaluating, on_device
from lightning_compress.mechanisms.quantization import QuantizationError, Quantizers, quantizing
from lightning_compress.mechanisms.replay import replay, traceless
from lightning_compress.mechanisms.rounding import Presented
from lightning_compress.mechanisms.selection import find_module, joined, listing, plain_name, select_modules
from lightning_compress.mechanisms.sharding import class_name
from lightning_compress.mechanisms.signs import sign
from lightning_compress.mechanisms.step import step_controller
from lightning_compress.mechanisms.weights import named_weights

HAVE_KERNELS = (_ConvNd, nn.Linear, nn.MultiheadAttention)
"""Layers that run in integers."""
SKIPPED = 8
"""So many batches of the training data a validation step may do without the network."""


class CalibratingCallback(CompressionCallback):
    """Base of the techniques that find the grids of a network.

    Args:
        weight_bits: Bits of a weight, 2 to 8.
        activation_bits: Bits of an activation, 2 to 8. None: weights only.
        edge_bits: Bits of the first and the last weight, and of the network's input. "auto": 8 where ``weight_bits``
            is below 4, else as the others; None: as the others.
        layer_bits: Bits of the weights of some layers, by selector; None: as the others.
        max_samples: Samples of the training data to look at, at least 1.
        network: Dotted name of the network inside the LightningModule; None: the one that the step calls.
        layers: Selectors of layers. None: all that have integer kernels.
        exclude: Selectors of layers that stay in float.
        name: As in the base class.

    Attributes:
        samples_seen: Samples of the training data that this process has found the ranges of the activations with: whole
            batches, up to ``max_samples`` or all there are. 0 before that, and where the scales are a checkpoint's.
    """

    def __init__(
        self,
        *,
        weight_bits: int,
        activation_bits: int | None,
        edge_bits: int | Literal["auto"] | None,
        layer_bits: Mapping[str, int] | None,
        max_samples: int,
        network: str | None,
        layers: Sequence[str] | None,
        exclude: Sequence[str] | None,
        name: str | None,
    ) -> None:
        super().__init__(name=name)
        check_layers(layers, exclude)
        self.weight_bits = check_bits(weight_bits, "weight_bits")
        self.activation_bits = (
            None if activation_bits is None else check_bits(activation_bits, "activation_bits, if not None,")
        )
        self.edge_bits, self.layer_bits = check_edge_bits(edge_bits), check_layer_bits(layer_bits)
        self.max_samples = check_whole("max_samples", max_samples, at_least=1)
        self.network = check_name("network", network)
        self.layers, self.exclude = layers, exclude
        self._method = "validation_step"  # what is replayed
        self.samples_seen = 0
        self._nothing: list[str] = []  # activations that were 0 throughout
        self._trial: Grids | None = None  # of the first step

    @property
    def samples(self) -> int:
        """Samples to look at; one batch is enough where only what can be done is looked at."""
        return 1 if self.planning else self.max_samples

    # For techniques

    def settings(self) -> Settings:
        """How to calibrate."""
        raise NotImplementedError

    def reestimates(self, network: nn.Module) -> bool:
        """Whether the statistics of batch norm are estimated anew with quantised weights."""
        return False

    def given(self, trainer: Any, name: str, network: nn.Module) -> Mapping[str, WeightGrid]:
        """Grids of weights of the network of this name that are known already."""
        return MappingProxyType({})

    def presented(self) -> Presented | None:
        """What says where a tensor comes from that stands for a weight; None where nothing does."""
        return None

    def intent(self, trainer: Any, pl_module: Any) -> Intent:
        """Which layers it quantises, to how many bits; until the first step, those that could be."""
        aims: dict[str, Aim] = {"weight_bits": self.weight_bits, "activation_bits": self.activation_bits}
        edges = edge_bits_of(self.edge_bits, self.weight_bits)
        aims |= {} if edges is None else {"edge_bits": edges}
        aims |= {f"bits of {selector}": bits for selector, bits in (self.layer_bits or {}).items()}
        grids, kind = self._trial, type(self).__name__
        selected, weights = selection(pl_module, self.layers, self.exclude), named_weights(pl_module)
        if grids is None:
            takes = [name for name, layer in pl_module.named_modules() if isinstance(layer, HAVE_KERNELS)]
            chosen = [plain_name(f"{name}.weight") for name in takes]
            note = "the first batch shows which of these layers can be quantised"
            return Intent(kind, layers_of(filter(selected, chosen)), aims=aims, notes=(note,))
        quantised = [joined(grids.network, name) for name in grids.weights]
        others = [joined(grids.network, name) for name in grids.left_in_float]
        floats = [name for name, full in zip(grids.left_in_float, others, strict=True) if full not in weights]
        left = left_out(pl_module, [name for name in others if name in weights and not selected(name)], self.exclude)
        unfit = layers_of(name for name in others if name in weights and selected(name))
        return Intent(
            kind,
            layers_of(quantised),
            {**left, **dict.fromkeys(unfit, "has no integer kernel")},
            sum(weights[name].numel() for name in quantised if name in weights),  # some are made anew in each step
            aims,
            notes=(f"operations that stay in float: {', '.join(floats)}",) if floats else (),
        )

    # Life cycle

    @property
    def fewest_bits(self) -> int:
        """Of a weight that comes neither first nor last."""
        return min([self.weight_bits, *(self.layer_bits or {}).values()])

    @property
    def weight_bits_given(self) -> int | None:
        """The fewest of a weight."""
        return self.fewest_bits

    def check_parts(self, pl_module: Any) -> None:
        """Refuse selectors that match nothing, and a network that is none."""
        if self.network is not None:
            find_module(pl_module, self.network, argument="network")
        selection(pl_module, self.layers, self.exclude)
        bits_of_layers(pl_module, self.layer_bits)

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """Learn which network the step calls."""
        self._trial, self.samples_seen = None, 0
        self.student_capture = controller.capture(self.network, required=True, argument="network")

    def verify(self, trainer: Any, pl_module: Any) -> None:
        """After the first step, look at the network: what cannot be quantised is not trained for."""
        name = self._network_name(trainer, pl_module)
        self._choose_step(trainer, pl_module)
        self._check_calls(trainer, pl_module, name)
        self.reestimates(find_module(pl_module, name, argument="network"))
        self._trial = self.trial_scales(trainer, pl_module)
        self._tell_idle(self._trial, name, pl_module)

    def trial_scales(self, trainer: Any, pl_module: Any) -> Grids:
        """The grids of what the first step gave the network."""
        name, seen = self._network_name(trainer, pl_module), self.last_sample()
        if seen is None:
            raise RuntimeError(f"{type(self).__name__} '{self.name}': the first step called no network")
        network = find_module(pl_module, name, argument="network")
        calibration = self._calibration(trainer, pl_module, name, network)
        with traceless(pl_module, parameters=False), evaluating(pl_module):
            for find in (calibration.discover, calibration.observe):
                find(lambda: (network(*seen.args, **seen.kwargs) for _ in range(1)))
        return calibration.grids

    # Private

    def _saved_arguments(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Those that a state was saved with; older checkpoints do not have ``layer_bits``."""
        return {"layer_bits": None, **state["arguments"]}

    def _choose_step(self, trainer: Any, pl_module: Any) -> None:
        """The validation step, if there is one and it takes batches of the training data; else the training step."""
        self._method = "training_step"
        if not defines(pl_module, "validation_step") or _compat.takes_iterator(trainer, pl_module):
            return
        self._method = "validation_step"
        try:
            self._count_calls(trainer, pl_module, pl_module, batches=1)
        except QuantizationError as error:
            log.info("%s: the training step is replayed, because %s", self.name, error)
            self._method = "training_step"

    def _check_calls(self, trainer: Any, pl_module: Any, name: str) -> None:
        """Refuse a step that does not reach what the training step has called."""
        if self._count_calls(trainer, pl_module, find_module(pl_module, name, argument="network"), batches=SKIPPED):
            return
        if self._method == "training_step":
            raise ValueError(
                f"{type(self).__name__} '{self.name}' has nothing to calibrate with: the training data give no batch "
                "when they are read once more; let them begin anew each time they are iterated over"
            )
        raise ValueError(
            f"{class_name(pl_module)}.training_step calls '{name or 'self'}', and validation_step does not, "
            "so the quantised network could not be validated; it probably calls a part of it, or layers inside: "
            "name the part that both call with network="
        )

    def _count_calls(self, trainer: Any, pl_module: Any, network: nn.Module, *, batches: int) -> int:
        """How often the step calls a network on the first batches, until it does."""

        def try_some(steps: Callable[[], Iterator[None]]) -> None:
            for _ in islice(steps(), batches):
                if calls.count > 0:
                    break

        # only calls are counted, and nothing is compiled for that
        with torch.compiler.set_stance("force_eager"), quantizing(network, Quantizers()) as calls:
            self._on_batches(trainer, pl_module, try_some)
        return calls.count

    def _network_name(self, trainer: Any, pl_module: Any) -> str:
        names = self.student_capture.names if self.student_capture is not None else None
        seen = self.last_sample() if self.has_fitted(pl_module) or self._controller is not None else None
        if names is not None and len(names) > 1:
            raise ValueError(
                f"the student is the chain '{names[0]}' to '{names[1]}', and one network is quantised: name it with "
                "network="
            )
        if self.network is not None:
            return self.network
        if seen is not None:
            return plain_name(seen.network)
        training = self._controller is not None  # the network is the one that trains
        with step_controller(pl_module) as controller, self._replayed(controller, trainer, training=training) as again:
            found: tuple[str, ...] = again.students(argument="network")
        return found[0]

    def _calibrated(self, trainer: Any, pl_module: Any, name: str, *, in_training: bool = False) -> Grids:
        """Calibrate on rank 0's batches; all ranks get its grids.

        Args:
            trainer: The Trainer, with training data.
            pl_module: The module.
            name: Dotted name of the network.
            in_training: Whether what the training step calls, in training mode, gets grids too.

        Returns:
            The grids.
        """
        at_work = on_device(pl_module, trainer.strategy.root_device)  # after a fit Lightning has moved it to the CPU
        with nullcontext() if shards(trainer) else at_work:
            network = find_module(pl_module, name, argument="network")
            calibration = self._calibration(trainer, pl_module, name, network)

            def find(trainer: Any, pl_module: Any) -> None:
                self._on_batches(trainer, pl_module, calibration.discover)
                if self.reestimates(network):
                    self._reestimate(trainer, pl_module, name, calibration)
                self._on_batches(trainer, pl_module, calibration.observe)
                if in_training:
                    self._on_batches(trainer, pl_module, calibration.extend, training=True)

            with _compat.patient_group(trainer.world_size) as tell:  # nobody waits for what a failing rank would send
                together(tell, find, trainer, pl_module)
            self._nothing, self.samples_seen = calibration.nothing, calibration.samples
        return Grids.from_state(trainer.strategy.broadcast(calibration.grids.state()))

    def _reestimate(self, trainer: Any, pl_module: Any, name: str, calibration: Calibration) -> None:
        """Find the statistics of batch norm with rounded weights; the module keeps its own."""
        network = find_module(pl_module, name, argument="network")
        with (
            torch.compiler.set_stance("force_eager"),
            statistics_kept(pl_module),
            _training_flags(trainer, pl_module),
            step_controller(pl_module) as controller,
            controller.weights.presented(),
            quantizing(network, calibration.weights_only()),
        ):
            try:
                estimated = reestimate_batchnorm_(trainer, pl_module, shared=False)  # rank 0's grids count in the end
            except Exception as error:  # whatever the user's step raises
                if trainer.optimizers or pl_module.automatic_optimization:
                    raise
                raise QuantizationError(
                    f"{type(self).__name__} '{self.name}' estimates the statistics of batch norm anew, and the "
                    f"training step of {class_name(pl_module)} failed: {type(error).__name__}: {error}; it optimises "
                    "by itself, and there are no optimizers outside of a fit: put the callback into the fit, or give "
                    "reestimate_batchnorm=False"
                ) from error
            done = {plain_name(entry) for entry in estimated}
            names = [own for own in batch_norms(network) if joined(name, plain_name(own)) in done]
            found = statistics_of(names, network)
        calibration.grids.statistics = {plain_name(own): value for own, value in found.items()}

    def _calibration(self, trainer: Any, pl_module: Any, name: str, network: nn.Module) -> Calibration:
        selected = selection(pl_module, self.layers, self.exclude)
        bits = bits_of_layers(pl_module, self.layer_bits)
        calibration = Calibration(
            network,
            self.settings(),
            selected=lambda weight: selected(joined(name, weight)),
            own_bits=lambda weight: bits.get(joined(name, weight).rpartition(".")[0]),
            given=self.given(trainer, name, network),
            presented=self.presented(),
        )
        if overruled := calibration.overruled:
            self._warn_once(f"layer_bits gives {listing(overruled)} other bits than they were trained for")
        calibration.grids.network = name
        return calibration

    def _tell_idle(self, grids: Grids, name: str, pl_module: Any) -> None:
        """Complain about selectors none of whose layers is quantised."""
        quantised = {joined(name, weight).rpartition(".")[0] for weight in grids.weights}
        for argument, selectors in (("layers", self.layers or []), ("layer_bits", self.layer_bits or {})):
            for selector in selectors:
                chosen = select_modules(pl_module, [selector], None, types=(nn.Module,), argument=argument)
                if not quantised.isdisjoint(chosen):
                    continue
                kinds = sorted({class_name(module) for module in chosen.values()})
                raise ValueError(
                    f"{argument} has '{selector}', and nothing of it ({', '.join(kinds[:3])}) runs as a convolution or "
                    "a linear layer of real numbers that is selected, for which ONNX Runtime has integer kernels"
                )

    def _trained_for(self, trainer: Any, name: str) -> dict[str, WeightGrid]:
        """The grids that PSGD has trained the weights of a network for."""
        found: dict[str, WeightGrid] = {}
        for callback in trainer.callbacks:
            if not (steps := given_steps(callback)):
                continue
            if callback.bits != self.weight_bits:
                self._warn_once(
                    f"'{callback.name}' trains for {callback.bits} bits, and weight_bits={self.weight_bits}: on "
                    f"another grid a part of what it gains is lost; give weight_bits={callback.bits}"
                )
                continue
            found |= grids_of_steps(inside(name, steps))
        return found

    def _on_batches(
        self,
        trainer: Any,
        pl_module: Any,
        work: Callable[[Callable[[], Iterator[None]]], None],
        *,
        training: bool = False,
    ) -> None:
        with ExitStack() as stack:
            controller = stack.enter_context(step_controller(pl_module))
            again = stack.enter_context(self._replayed(controller, trainer, training=training))
            step = stack.enter_context(sign(trainer, f"{self.name}: looking at training batches", total=None))
            if not training:
                stack.enter_context(evaluating(pl_module))
            stack.enter_context(controller.weights.presented())

            def steps() -> Iterator[None]:
                for arguments in again.batches(trainer.current_epoch):
                    try:
                        again.run(arguments)
                    except QuantizationError:
                        raise
                    except Exception as error:  # whatever the user's step raises
                        raise QuantizationError(
                            f"{type(self).__name__} '{self.name}' calibrates with batches of the training data, and "
                            f"{class_name(pl_module)}'s step failed on one: {type(error).__name__}: {error}"
                        ) from error
                    step()
                    yield

            work(steps)

    def _replayed(self, controller: StepController, trainer: Any, *, training: bool = False) -> Any:
        plugin, method = trainer.precision_plugin, "training_step" if training else self._method
        context = plugin.val_step_context if method == "validation_step" else plugin.train_step_context
        return replay(controller, trainer, context, method=method)


def selection(
    pl_module: nn.Module, layers: Sequence[str] | None, exclude: Sequence[str] | None
) -> Callable[[str], bool]:
    """Whether a weight, by its name in the module, is to be quantised.

    Args:
        pl_module: The module.
        layers: Selectors of layers; None: all.
        exclude: Selectors of those that are not.

    Returns:
        What tells it.

    Raises:
        ValueError: If a selector matches nothing.
    """
    if layers is None and exclude is None:
        return lambda name: True
    chosen = select_modules(pl_module, layers, exclude, types=(nn.Module,))
    inside = {plain_name(name) for name in chosen if chosen[name] is not pl_module or layers is None}
    return lambda name: name.rpartition(".")[0] in inside


def bits_of_layers(pl_module: nn.Module, layer_bits: Mapping[str, int] | None) -> dict[str, int]:
    """The bits of each layer that has its own.

    Args:
        pl_module: The module.
        layer_bits: Selector to bits; of several that match a layer the last counts.

    Returns:
        Name of the layer in the module to its bits.

    Raises:
        ValueError: If a selector matches nothing.

    Example:
        >>> bits_of_layers(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)), {"type:Linear": 4, "2": 8})
        {'0': 4, '2': 8}
    """
    found: dict[str, int] = {}
    for selector, bits in (layer_bits or {}).items():
        matched = select_modules(pl_module, [selector], None, types=(nn.Module,), argument="layer_bits")
        found |= dict.fromkeys(matched, bits)
    return found


@contextmanager
def _training_flags(trainer: Any, pl_module: Any) -> Iterator[None]:
    """Let the module train as it did before an evaluation; where nothing of it did, all of it."""
    if any(module.training for module in pl_module.modules()):
        yield
        return
    before = {module: module.training for module in pl_module.modules()}
    flags = _compat.training_flags(trainer)
    for name, module in pl_module.named_modules():
        module.training = flags.get(name, True) or not any(flags.values())
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
