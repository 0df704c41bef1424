"""Post-training quantisation: find the grids of a trained network, and let everybody see what they make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import nn

from lightning_compress import _compat
from lightning_compress.callbacks.arguments import (
    check_choice,
    check_flag,
    edge_bits_of,
    is_auto,
    tell_without_effect,
)
from lightning_compress.callbacks.base import log
from lightning_compress.callbacks.quantised import QuantisedCallback
from lightning_compress.export.sample import defines
from lightning_compress.mechanisms.batchnorm import batch_norms
from lightning_compress.mechanisms.calibration import Settings
from lightning_compress.mechanisms.controller import StepController
from lightning_compress.mechanisms.grids import Grids, WeightGrid
from lightning_compress.mechanisms.isolation import device_of, random_state_kept
from lightning_compress.mechanisms.loaders import data_kept
from lightning_compress.mechanisms.observers import OBSERVERS
from lightning_compress.mechanisms.tree import leaves

REESTIMATED = 4
"""At this many bits of a weight and below, new batch-norm statistics are worth their time."""


class PTQCallback(QuantisedCallback):
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
        layer_bits: Selector of layers to the bits of their weights, where these differ; the last that matches counts.
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
        samples_seen: Samples of the training data that this process has found the ranges of the activations with.
        metrics: The metrics of the quantised network in the module's own validation, after a fit.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> PTQCallback(weight_bits=4, activation_bits=None).state_key
        'PTQCallback[ptq]'
    """

    default_name = "ptq"

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
        layer_bits: Mapping[str, int] | None = None,
        cross_layer_equalization: bool = False,
        bias_correction: bool = False,
        network: str | None = None,
        layers: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            edge_bits=edge_bits,
            layer_bits=layer_bits,
            max_samples=max_samples,
            network=network,
            layers=layers,
            exclude=exclude,
            name=name,
        )
        check_choice("observer", observer, OBSERVERS)
        if activation_bits is None:
            tell_without_effect(self, PTQCallback, "activation_bits=None", observer=observer)
        check_choice("weight_range", weight_range, ("auto", "max", "mse"))
        if not is_auto(reestimate_batchnorm):
            check_flag("reestimate_batchnorm", reestimate_batchnorm)
        check_flag("cross_layer_equalization", cross_layer_equalization)
        check_flag("bias_correction", bias_correction)
        self.observer, self.weight_range, self.reestimate_batchnorm = observer, weight_range, reestimate_batchnorm
        self.cross_layer_equalization, self.bias_correction = cross_layer_equalization, bias_correction
        self._loaders: Any = None  # those that the last fit was given

    # What the base asks

    def settings(self) -> Settings:
        """How to calibrate."""
        return Settings(
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            observer=self.observer,
            weight_range=self.weight_range,
            max_samples=self.samples,
            equalize=self.cross_layer_equalization,
            correct_bias=self.bias_correction,
            edge_bits=edge_bits_of(self.edge_bits, self.weight_bits),
        )

    def reestimates(self, network: nn.Module) -> bool:
        """As asked for; "auto" with few bits."""
        wanted = self.fewest_bits <= REESTIMATED if self.reestimate_batchnorm == "auto" else self.reestimate_batchnorm
        if self.reestimate_batchnorm is True and not batch_norms(network):
            raise ValueError("reestimate_batchnorm has no effect: no layer of the network keeps batch-norm statistics")
        return bool(wanted) and bool(batch_norms(network))

    def given(self, trainer: Any, name: str, network: nn.Module) -> Mapping[str, WeightGrid]:
        """The grids that PSGD has trained for."""
        return self._trained_for(trainer, name) if self.weight_range == "auto" else {}

    def shown(self, trainer: Any, pl_module: Any) -> Grids:
        """Those that were found; anew where there are none, or the weights have changed since."""
        grids = self.quantization
        if grids is not None and not self._belongs_to(grids, pl_module):
            log.info("%s: the weights have changed since they were calibrated, so that is done anew", self.name)
            grids = None
        if grids is None:
            grids = self.quantization = self._before_evaluation(trainer, pl_module)
        return grids

    # Life cycle

    def problem_with_shards(self) -> str | None:
        """It calibrates the network as the user's module has it."""
        return (
            "it calibrates with whole parameters: train without it, and then, on one device, let a Trainer that has it "
            "run validate(module, ckpt_path=...), which calibrates the checkpoint"
        )

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """As the base; forget what was found before."""
        super().attach(controller, stack, trainer, pl_module)
        self.quantization, self.metrics = None, {}
        self._loaders = _compat.given_loaders(trainer)

    def calibrate(self, trainer: Any, pl_module: Any) -> None:
        """Find the grids of the trained network."""
        if not _compat.has_training_data(trainer):
            self._warn_once("there is no training data, and no training step was run, so nothing was calibrated")
            return
        if not self._verified:  # resumed where nothing was left to be done
            self._choose_step(trainer, pl_module)
        self.quantization = self._calibrated(trainer, pl_module, self._network_name(trainer, pl_module))
        log.info("%s: %s", self.name, self._summary(self.quantization))

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take the scales of a checkpoint; one that was written during a fit has none, nor one of other arguments."""
        found = None if state["quantization"] is None else Grids.from_state(state["quantization"])
        self.quantization = found if self._saved_arguments(state) == self._arguments() else None
        self.samples_seen = 0

    # Private

    def _before_evaluation(self, trainer: Any, pl_module: Any) -> Grids:
        owner = pl_module if trainer.datamodule is None else trainer.datamodule
        makes = defines(owner, "train_dataloader")
        given = self._loaders if self.has_fitted(pl_module) or not makes else None
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
