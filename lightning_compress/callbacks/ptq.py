"""Post-training quantisation: find the grids of a trained network, and let everybody see what they make of it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, Literal

import torch
from torch import nn

from lightning_compress import _compat
from lightning_compress.callbacks.arguments import check_choice, check_edge_bits, check_flag, check_whole, edge_bits_of
from lightning_compress.callbacks.base import CompressionCallback, log
from lightning_compress.callbacks.returned import Returned
from lightning_compress.export.evaluate import evaluate_quantized, has_validation
from lightning_compress.export.sample import defines
from lightning_compress.export.scales import given_steps
from lightning_compress.functional.quantizers import MOST_BITS, check_bits
from lightning_compress.mechanisms.batchnorm import batch_norms, reestimate_batchnorm_, statistics_kept
from lightning_compress.mechanisms.calibration import Calibration, Settings, fingerprints, statistics_of
from lightning_compress.mechanisms.controller import StepController
from lightning_compress.mechanisms.grids import Grids, WeightGrid
from lightning_compress.mechanisms.isolation import device_of, evaluating, random_state_kept
from lightning_compress.mechanisms.loaders import data_kept
from lightning_compress.mechanisms.observers import OBSERVERS
from lightning_compress.mechanisms.quantization import GuardedCalls, QuantizationError, Quantizers, quantizing
from lightning_compress.mechanisms.replay import replay, traceless
from lightning_compress.mechanisms.rounding import Rounding
from lightning_compress.mechanisms.selection import find_module, listing, plain_name, select_modules
from lightning_compress.mechanisms.step import step_controller
from lightning_compress.mechanisms.tree import leaves

FEW_BITS = 4
"""At this many bits of a weight and below, new batch-norm statistics are worth their time."""

SKIPPED = 8
"""So many batches of the training data a validation step may do without the network."""


class PTQCallback(CompressionCallback):
    """Quantise the trained network to integers, without training it.

    When it acts: after the fit, once every other callback has finished with the weights, or before a validation, a
    test or a prediction where nothing was calibrated for the weights. It replays the validation step on training
    batches, and keeps the scales. From then on ``trainer.validate``, ``test`` and ``predict`` show the quantised
    network, and ``ExportCallback(precision="int8")`` writes it into a file with these scales. What it leaves alone:
    the training, and the module: weights and checkpoints stay in full precision, the scales are in this callback's
    state.

    Args:
        weight_bits: Bits of a weight, 2 to 8; a symmetric grid for each output channel.
        activation_bits: Bits of an activation, 2 to 8; an affine grid that contains 0. None: weights only.
        observer: How the range of an activation is found: "minmax", "moving_average", "percentile", or the range of
            least squared error ("mse") or least entropy ("entropy") from a histogram.
        weight_range: "max", the largest magnitude; "mse", clipped where the squared error is least; "auto": the grids
            that a ``PSGDCallback`` of the same bits has trained for, else "max" with 8 bits and "mse" below.
        reestimate_batchnorm: Whether the statistics of batch norm are estimated anew with quantised weights. "auto":
            with 4 bits or fewer. The module keeps its own.
        max_samples: Samples of the training data to look at, at least 1.
        edge_bits: Bits of the first and the last weight, and of the network's input. "auto": 8 where ``weight_bits``
            is below 4, else as the others; None: as the others.
        cross_layer_equalization: Whether the channels between two layers are scaled such that the weights on both
            sides have the same ranges.
        bias_correction: Whether the shift of each output channel that rounding its weight causes is taken back.
        network: Dotted name of the network inside the LightningModule; None: the one that the step calls.
        layers: Selectors of layers, as for ``PruningCallback``. None: all convolutions and linear layers, and the
            projections of attention.
        exclude: Selectors of layers that stay in float.
        name: As in the base class; default "ptq".

    Attributes:
        quantization: The grids, once calibrated.
        metrics: The metrics of the quantised network in the module's own validation, after a fit.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> PTQCallback(weight_bits=4, activation_bits=None).state_key
        'PTQCallback[ptq]'
    """

    default_name = "ptq"
    quantization = Returned[Grids | None](None)
    metrics = Returned[Mapping[str, float]]({})

    def __init__(
        self,
        *,
        weight_bits: int = 8,
        activation_bits: int | None = 8,
        observer: str = "minmax",
        weight_range: str = "auto",
        reestimate_batchnorm: bool | Literal["auto"] = "auto",
        max_samples: int = 512,
        edge_bits: int | Literal["auto"] | None = "auto",
        cross_layer_equalization: bool = False,
        bias_correction: bool = False,
        network: str | None = None,
        layers: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        check_bits(weight_bits, "weight_bits")
        if activation_bits is not None:
            check_bits(activation_bits, "activation_bits")
        check_edge_bits(edge_bits)
        check_choice("observer", observer, OBSERVERS)
        check_choice("weight_range", weight_range, ("auto", "max", "mse"))
        if reestimate_batchnorm != "auto":
            check_flag("reestimate_batchnorm", reestimate_batchnorm)
        check_whole("max_samples", max_samples, at_least=1)
        check_flag("cross_layer_equalization", cross_layer_equalization)
        check_flag("bias_correction", bias_correction)
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        self.observer, self.weight_range, self.max_samples = observer, weight_range, max_samples
        self.reestimate_batchnorm, self.edge_bits = reestimate_batchnorm, edge_bits
        self.cross_layer_equalization, self.bias_correction = cross_layer_equalization, bias_correction
        self.network, self.layers, self.exclude = network, layers, exclude
        self._evaluation = ExitStack()
        self._calls: GuardedCalls | None = None
        self._method = "validation_step"  # what is replayed
        self._loaders: Any = None  # those that the last fit was given
        self._fitted: int | None = None  # whose fit that was

    @property
    def weight_bits_given(self) -> int | None:
        """Those of the weights."""
        return self.weight_bits

    # Within a fit

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuse selectors that match nothing, and a network that is none."""
        if self.network is not None:
            find_module(pl_module, self.network, argument="network")
        self._selected(pl_module)

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """Learn which network the step calls."""
        self.quantization, self.metrics = None, {}
        self._loaders, self._fitted = _compat.given_loaders(trainer), id(pl_module)
        self.student_capture = controller.capture(self.network, required=True, argument="network")

    def verify(self, trainer: Any, pl_module: Any) -> None:
        """After the first step, look at a copy of the network: what cannot be quantised is not trained for."""
        name = self._network_name(trainer, pl_module)
        self._choose_step(trainer, pl_module, called=name)
        self._reestimates(find_module(pl_module, name, argument="network"))
        self._tell_idle(self.trial_scales(trainer, pl_module), name, pl_module)

    def trial_scales(self, trainer: Any, pl_module: Any) -> Grids:
        """The grids of what the first step gave the network."""
        name, seen = self._network_name(trainer, pl_module), self._last_sample()
        if seen is None:
            raise RuntimeError(f"{type(self).__name__} '{self.name}': the first step called no network")
        network = find_module(pl_module, name, argument="network")
        calibration = self._calibration(trainer, pl_module, name, network)
        with traceless(pl_module, parameters=False), evaluating(pl_module):
            for find in (calibration.discover, calibration.observe):
                find(lambda: (network(*seen.args, **seen.kwargs) for _ in range(1)))
        return calibration.grids

    def calibrate(self, trainer: Any, pl_module: Any) -> None:
        """Find the grids of the trained network."""
        if not _compat.has_training_data(trainer):
            self._warn_once("there is no training data, and no training step was run, so nothing was calibrated")
            return
        if not self._verified:  # resumed where nothing was left to be done
            self._choose_step(trainer, pl_module)
        self.quantization = self._calibrated(trainer, pl_module, self._network_name(trainer, pl_module))
        log.info("%s: %s", self.name, self._summary(self.quantization))

    def evaluate(self, trainer: Any, pl_module: Any) -> None:
        """Measure the quantised network in the module's own validation, on rank 0."""
        if not trainer.is_global_zero or self.quantization is None or not has_validation(pl_module, trainer):
            return
        try:
            self.metrics = evaluate_quantized(pl_module, trainer, self.quantization)
        except Exception as error:  # the user's validation may need what only the fit has
            warnings.warn(
                f"the validation of the quantised network failed: {type(error).__name__}: {error}", stacklevel=2
            )
            return
        for logger in trainer.loggers:
            numbers = {f"compress/{self.name}/val_{metric}": value for metric, value in self.metrics.items()}
            logger.log_metrics(numbers, step=trainer.global_step)

    def remarks(self) -> list[str]:
        """What is quantised, and what is not."""
        return [] if self.quantization is None else [f"{self.name}: {self._summary(self.quantization)}."]

    # Validation, test and prediction outside of a fit

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """As the base."""
        self._evaluation.close()
        super().setup(trainer, pl_module, stage)
        for other in trainer.callbacks:
            if isinstance(other, PTQCallback) and other is not self and {self.network, other.network} & {None}:
                raise ValueError(
                    f"'{self.name}' and '{other.name}' quantise one network; keep one of them, or give each another "
                    "part of the module with network="
                )
            if isinstance(other, PTQCallback) and other is not self and other.network == self.network:
                raise ValueError(f"'{self.name}' and '{other.name}' both quantise '{self.network}'; keep one of them")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Show the quantised network."""
        self._show(trainer, pl_module)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Show the quantised network."""
        self._show(trainer, pl_module)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Show the quantised network."""
        self._show(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Show the plain network again."""
        self._hide(pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Show the plain network again."""
        self._hide(pl_module)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Show the plain network again."""
        self._hide(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave nothing on the module."""
        super().teardown(trainer, pl_module, stage)
        self._evaluation.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave nothing on the module."""
        super().on_exception(trainer, pl_module, exception)
        self._evaluation.close()

    def extra_state(self) -> dict[str, Any]:
        """The scales."""
        return {"quantization": None if self.quantization is None else self.quantization.state()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take the scales of a checkpoint; one that was written during a fit has none, nor one of other arguments."""
        found = None if state["quantization"] is None else Grids.from_state(state["quantization"])
        self.quantization = found if state.get("arguments") == self._arguments() else None

    # Private

    def _show(self, trainer: Any, pl_module: Any) -> None:
        if self._controller is not None:  # a fit: its validation is that of the network that trains
            return
        grids = self.quantization
        if grids is not None:
            network = _part(pl_module, grids.network)
            if network is None or fingerprints(network) != grids.fingerprints:
                log.info("%s: the weights have changed since they were calibrated, so that is done anew", self.name)
                grids = None
        if grids is None:
            grids = self.quantization = self._before_evaluation(trainer, pl_module)
        network = find_module(pl_module, grids.network, argument="network")
        self._calls = self._evaluation.enter_context(quantizing(network, Rounding(network, grids)))

    def _hide(self, pl_module: Any) -> None:
        calls, self._calls = self._calls, None
        self._evaluation.close()
        if calls is not None and calls.count == 0:
            raise QuantizationError(
                f"{type(self).__name__} '{self.name}' had no effect: {type(pl_module).__name__} never called "
                f"'{(self.quantization or Grids()).network or 'self'}', so what was measured is the plain network; "
                "name the part that it calls with network="
            )

    def _before_evaluation(self, trainer: Any, pl_module: Any) -> Grids:
        owner = pl_module if trainer.datamodule is None else trainer.datamodule
        makes = defines(owner, "train_dataloader")
        given = self._loaders if self._fitted == id(pl_module) or not makes else None
        if trainer.limit_train_batches == 0 or (given is None and not makes):
            raise ValueError(
                f"{type(self).__name__} '{self.name}' has nothing to calibrate with: give a datamodule, let "
                f"{type(pl_module).__name__} have a train_dataloader, fit first, or load a checkpoint that holds scales"
            )
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(random_state_kept(device_of(pl_module)))
            stack.enter_context(data_kept([] if trainer.datamodule is None else [trainer.datamodule]))
            loaders = _compat.made_loaders(trainer) if given is None else given
            stack.enter_context(data_kept([loader for _, loader in leaves(loaders)]))
            stack.enter_context(_compat.training_data(trainer, loaders))
            self._choose_step(trainer, pl_module)
            return self._calibrated(trainer, pl_module, self._network_name(trainer, pl_module))

    def _choose_step(self, trainer: Any, pl_module: Any, called: str | None = None) -> None:
        """The validation step, if there is one and it takes batches of the training data; else the training step.

        Raises:
            ValueError: If the validation step does not call what the training step has called.
        """
        self._method = "training_step"
        if not defines(pl_module, "validation_step") or _compat.takes_iterator(trainer, pl_module):
            return

        def try_some(steps: Callable[[], Iterator[None]]) -> None:
            for _ in islice(steps(), 1 if called is None else SKIPPED):
                if calls.count > 0:
                    break

        self._method = "validation_step"
        network = pl_module if called is None else find_module(pl_module, called, argument="network")
        try:
            with quantizing(network, Quantizers()) as calls:
                self._on_batches(trainer, pl_module, try_some)
        except QuantizationError as error:
            log.info("%s: the training step is replayed, because %s", self.name, error)
            self._method = "training_step"
            return
        if called is not None and calls.count == 0:
            raise ValueError(
                f"{type(pl_module).__name__}.training_step calls '{called or 'self'}', and validation_step does not, "
                "so the quantised network could not be validated; it probably calls a part of it, or layers inside: "
                "name the part that both call with network="
            )

    def _network_name(self, trainer: Any, pl_module: Any) -> str:
        names = self.student_capture.names if self.student_capture is not None else None
        seen = self._last_sample() if self._fitted == id(pl_module) else None
        if names is not None and len(names) > 1:
            raise ValueError(
                f"the student is the chain '{names[0]}' to '{names[1]}', and one network is quantised: name it with "
                "network="
            )
        if self.network is not None:
            return self.network
        if seen is not None:
            return plain_name(seen.network)
        with step_controller(pl_module) as controller, self._replayed(controller, trainer) as again:
            found: tuple[str, ...] = again.students(argument="network")
        return found[0]

    def _calibrated(self, trainer: Any, pl_module: Any, name: str) -> Grids:
        """Calibrate on rank 0's batches; all ranks get its grids."""
        device = next(pl_module.parameters()).device
        pl_module.to(trainer.strategy.root_device)  # at the end of a fit Lightning has moved the module to the CPU
        try:
            network = find_module(pl_module, name, argument="network")
            calibration = self._calibration(trainer, pl_module, name, network)
            self._on_batches(trainer, pl_module, calibration.discover)
            if self._reestimates(network):
                with (
                    torch.compiler.set_stance("force_eager"),
                    statistics_kept(pl_module),
                    _training_flags(trainer, pl_module),
                    quantizing(network, calibration.weights_only()),
                ):
                    done = {plain_name(entry) for entry in reestimate_batchnorm_(trainer, pl_module)}
                    names = [own for own in batch_norms(network) if _joined(name, plain_name(own)) in done]
                    found = statistics_of(names, network)
                calibration.grids.statistics = {plain_name(own): value for own, value in found.items()}
            self._on_batches(trainer, pl_module, calibration.observe)
        finally:
            pl_module.to(device)
        return Grids.from_state(trainer.strategy.broadcast(calibration.grids.state()))

    def _calibration(self, trainer: Any, pl_module: Any, name: str, network: nn.Module) -> Calibration:
        given = self._given(trainer, name)
        auto = "max" if self.weight_bits == MOST_BITS else "mse"
        selected = self._selected(pl_module)
        settings = Settings(
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            observer=self.observer,
            weight_range=auto if self.weight_range == "auto" else self.weight_range,
            max_samples=self.max_samples,
            equalize=self.cross_layer_equalization,
            correct_bias=self.bias_correction,
            edge_bits=edge_bits_of(self.edge_bits, self.weight_bits),
        )
        calibration = Calibration(
            network, settings, selected=lambda weight: selected(_joined(name, weight)), given=given
        )
        calibration.grids.network = name
        return calibration

    def _selected(self, pl_module: Any) -> Callable[[str], bool]:
        """Whether a weight, by its name in the module, is to be quantised."""
        if self.layers is None and self.exclude is None:
            return lambda name: True
        chosen = select_modules(pl_module, self.layers, self.exclude, types=(nn.Module,))
        inside = {name for name in chosen if chosen[name] is not pl_module or self.layers is None}
        return lambda name: name.rpartition(".")[0] in inside

    def _tell_idle(self, grids: Grids, name: str, pl_module: Any) -> None:
        """Complain about selectors none of whose layers is quantised."""
        quantised = {_joined(name, weight).rpartition(".")[0] for weight in grids.weights}
        for selector in self.layers or []:
            chosen = select_modules(pl_module, [selector], None, types=(nn.Module,))
            if quantised.isdisjoint(chosen):
                kinds = sorted({type(module).__name__ for module in chosen.values()})
                raise ValueError(
                    f"layers has '{selector}', and nothing of it ({', '.join(kinds[:3])}) runs as a convolution or a "
                    "linear layer, for which ONNX Runtime has integer kernels"
                )

    def _given(self, trainer: Any, name: str) -> dict[str, WeightGrid]:
        """The grids that PSGD has trained for."""
        prefix = f"{name}." if name else ""
        found = {}
        for callback in trainer.callbacks:
            steps = given_steps(callback)
            if self.weight_range != "auto" or not steps:
                continue
            if callback.bits != self.weight_bits:
                self._warn_once(
                    f"'{callback.name}' trains for {callback.bits} bits, and weight_bits={self.weight_bits}: on "
                    f"another grid a part of what it gains is lost; give weight_bits={callback.bits}"
                )
                continue
            for key, (step, bits) in steps.items():
                found[key.removeprefix(prefix)] = WeightGrid(step.float().cpu(), bits)
        return found

    def _reestimates(self, network: nn.Module) -> bool:
        wanted = self.weight_bits <= FEW_BITS if self.reestimate_batchnorm == "auto" else self.reestimate_batchnorm
        if self.reestimate_batchnorm is True and not batch_norms(network):
            raise ValueError("reestimate_batchnorm has no effect: no layer of the network keeps batch-norm statistics")
        return bool(wanted) and bool(batch_norms(network))

    def _on_batches(self, trainer: Any, pl_module: Any, work: Callable[[Callable[[], Iterator[None]]], None]) -> None:
        with ExitStack() as stack:
            controller = stack.enter_context(step_controller(pl_module))
            again = stack.enter_context(self._replayed(controller, trainer))
            stack.enter_context(evaluating(pl_module))

            def steps() -> Iterator[None]:
                for arguments in again.batches(trainer.current_epoch):
                    try:
                        again.run(arguments)
                    except QuantizationError:
                        raise
                    except Exception as error:  # whatever the user's step raises
                        raise QuantizationError(
                            f"{type(self).__name__} '{self.name}' calibrates with batches of the training data, and "
                            f"{type(pl_module).__name__}'s step failed on one: {type(error).__name__}: {error}"
                        ) from error
                    yield

            work(steps)

    def _replayed(self, controller: StepController, trainer: Any) -> Any:
        plugin = trainer.precision_plugin
        context = plugin.val_step_context if self._method == "validation_step" else plugin.train_step_context
        return replay(controller, trainer, context, method=self._method)

    def _summary(self, grids: Grids) -> str:
        weights = _counted("weight", [grid.bits for grid in grids.weights.values()])
        activations = _counted("activation", [grid.bits for grid in grids.activations.values()])
        left = f"; left in float: {listing(grids.left_in_float)}" if grids.left_in_float else ""
        return f"{weights} and {activations} are quantised{left}"


def _counted(what: str, bits: Sequence[int]) -> str:
    """Such as "20 weights (18 of 4 bits, 2 of 8)"."""
    kinds = [f"{count} of {own}" for own, count in sorted(Counter(bits).items())]
    if not kinds:
        return f"no {what}s"
    number = f"{len(bits)} {what}{'' if len(bits) == 1 else 's'}"
    return f"{number} of {bits[0]} bits" if len(kinds) == 1 else f"{number} ({', '.join(kinds)} bits)"


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


def _part(pl_module: nn.Module, name: str) -> nn.Module | None:
    """A part of a module; None where it has none of that name, as another module was calibrated."""
    return next((part for own, part in pl_module.named_modules() if plain_name(own) == name), None)


def _joined(name: str, inner: str) -> str:
    return ".".join(part for part in (plain_name(name), inner) if part)
