"""The grids of a quantised network as plain data: what calibration finds, a checkpoint keeps and a file is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from torch import Tensor

from lightning_compress.functional.quantizers import integer_limits

COMPUTED = "<computed>"
"""In the place of the name of a bias that is no parameter."""


@dataclass(frozen=True)
class WeightGrid:
    """The symmetric grid of a weight.

    Attributes:
        step: Of 0 dimensions, or of shape ``(rows,)``: one grid for each entry of dimension 0.
        bits: 2 to 8.
    """

    step: Tensor
    bits: int

    @property
    def axis(self) -> int | None:
        """The dimension that has a grid for each of its entries."""
        return 0 if self.step.ndim else None

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        return integer_limits(self.bits)

    def rows(self, start: int, stop: int) -> WeightGrid:
        """The grid of a part of the rows."""
        return WeightGrid(self.step[start:stop], self.bits) if self.step.ndim else self


@dataclass(frozen=True)
class ActivationGrid:
    """The affine grid of an activation.

    Attributes:
        scale: A number that float32 represents.
        zero_point: The integer that stands for 0.
        bits: 2 to 8.
    """

    scale: float
    zero_point: int
    bits: int

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        return integer_limits(self.bits, signed=False)


@dataclass(frozen=True)
class WeightSite:
    """A place where a network uses a weight, or some of its rows.

    Attributes:
        name: Dotted name of the weight inside the network.
        start: Its first row used here.
        stop: The row after its last.
        bias: Dotted name of the bias that goes with it, or :data:`COMPUTED`; None without one.
        source: Key of the activation that it is multiplied with.
    """

    name: str
    start: int
    stop: int
    bias: str | None = None
    source: str | None = None


@dataclass
class Grids:
    """Everything that a calibrated network is quantised by.

    Attributes:
        network: Dotted name of the network inside the LightningModule; "" for the module itself.
        weights: Name inside the network to grid.
        activations: Key to grid; keys name the operation that made a tensor.
        sites: Where each weight is used, by the key of the operation.
        folds: Key of a layer to the name of the batch norm that alone consumes its output.
        biases: What is added to the output channels of a layer, by the key of the operation.
        statistics: Mean and variance of a batch norm, by its name, in the place of its own.
        divisors: What the output channels of a layer are divided by, after its batch norm, by the key of the operation.
        factors: What the input channels of the next layer's weight are multiplied by in return, likewise.
        fingerprints: Checksums of all parameters and floating buffers of the network when it was calibrated.
        left_in_float: What has no integer kernel, or was not to be quantised.
        integer_activations: Whether activations are quantised, or weights only.
        training_only: Keys of the layers that the network runs in training alone, such as auxiliary heads.
        shared: Keys of the activations that a ReLU or the like takes on their grid, because others take them too.
        following: Whether weights have the grids of their largest magnitudes, whatever these are by then.
    """

    network: str = ""
    weights: dict[str, WeightGrid] = field(default_factory=dict)
    activations: dict[str, ActivationGrid] = field(default_factory=dict)
    sites: dict[str, WeightSite] = field(default_factory=dict)
    folds: dict[str, str] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    divisors: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)
    fingerprints: dict[str, int] = field(default_factory=dict)
    left_in_float: tuple[str, ...] = ()
    integer_activations: bool = True
    training_only: tuple[str, ...] = ()
    shared: frozenset[str] = frozenset()
    following: bool = False

    def in_evaluation(self) -> Grids:
        """The same without the layers that the network runs in training alone."""
        sites = {key: site for key, site in self.sites.items() if key not in self.training_only}
        dropped = {self.sites[key].name for key in self.training_only} - {site.name for site in sites.values()}
        weights = {name: grid for name, grid in self.weights.items() if name not in dropped}
        return replace(self, sites=sites, weights=weights, training_only=())

    def state(self) -> dict[str, Any]:
        """The same as tensors and primitives."""
        return {
            "network": self.network,
            "weights": {name: {"step": grid.step.cpu(), "bits": grid.bits} for name, grid in self.weights.items()},
            "activations": {key: [grid.scale, grid.zero_point, grid.bits] for key, grid in self.activations.items()},
            "sites": {key: list(astuple(site)) for key, site in self.sites.items()},
            "folds": dict(self.folds),
            "biases": {key: value.cpu() for key, value in self.biases.items()},
            "statistics": {name: [mean.cpu(), variance.cpu()] for name, (mean, variance) in self.statistics.items()},
            "divisors": {key: value.cpu() for key, value in self.divisors.items()},
            "factors": {key: value.cpu() for key, value in self.factors.items()},
            "fingerprints": dict(self.fingerprints),
            "left_in_float": list(self.left_in_float),
            "integer_activations": self.integer_activations,
            "training_only": list(self.training_only),
            "shared": sorted(self.shared),
            "following": self.following,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Grids:
        """What :meth:`state` gave."""
        return cls(
            network=state["network"],
            weights={name: WeightGrid(entry["step"], entry["bits"]) for name, entry in state["weights"].items()},
            activations={key: ActivationGrid(*entry) for key, entry in state["activations"].items()},
            sites={key: WeightSite(*entry) for key, entry in state["sites"].items()},
            folds=dict(state["folds"]),
            biases=dict(state["biases"]),
            statistics={name: (mean, variance) for name, (mean, variance) in state["statistics"].items()},
            divisors=dict(state["divisors"]),
            factors=dict(state["factors"]),
            fingerprints=dict(state["fingerprints"]),
            left_in_float=tuple(state["left_in_float"]),
            integer_activations=state["integer_activations"],
            training_only=tuple(state.get("training_only", ())),
            shared=frozenset(state.get("shared", ())),
            following=state.get("following", False),
        )
