"""Calibration: from a network and some of its inputs to the grids that it is quantised by."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import _compat
from lightning_compress.functional._dtypes import as_wide_as_can_be
from lightning_compress.functional.quantizers import MOST_BITS, mse_grid, quantization_grid, range_grid
from lightning_compress.mechanisms.batchnorm import batch_norms
from lightning_compress.mechanisms.grids import COMPUTED, ActivationGrid, Grids, WeightGrid, WeightSite
from lightning_compress.mechanisms.observers import Observer, make_observer
from lightning_compress.mechanisms.quantization import KEY, QuantizationError, module_of, quantizing
from lightning_compress.mechanisms.rounding import (
    Presented,
    Rounding,
    channel_dimension,
    multiplied,
    norm_arguments,
    spread,
)
from lightning_compress.mechanisms.selection import plain_name
from lightning_compress.mechanisms.sharding import Ranks, class_name, is_shard, own_part, shards_in_place

LOOKS = 8
"""Batches on which the layers of a network are looked for: it may not take every path with each."""
Steps = Callable[[], Iterator[object]]
"""Runs the network on one batch after another, each time it is asked for the next."""
OwnBits = Callable[[str], int | None]
SWEEPS = 3  # over all pairs of layers that are equalised


@dataclass(frozen=True)
class Settings:
    """How a network is to be calibrated.

    Attributes:
        weight_bits: 2 to 8.
        activation_bits: 2 to 8; None: weights only.
        observer: One of :data:`~lightning_compress.mechanisms.observers.OBSERVERS`.
        weight_range: "max", or "mse" for the clipped range of least squared error; "auto": "max" with 8 bits, "mse"
            below, for weights that come first and last as for the others.
        max_samples: Samples to look at, at least as many where there are so many.
        equalize: Whether the channels between two layers are scaled such that both weights have the same ranges.
        correct_bias: Whether the mean error of each output channel is taken back.
        edge_bits: Bits of the weights that come first and last, and of the network's input; None: as the others.
    """

    weight_bits: int = 8
    activation_bits: int | None = 8
    observer: str = "minmax"
    weight_range: str = "max"
    max_samples: int = 512
    equalize: bool = False
    correct_bias: bool = False
    edge_bits: int | None = None


class Observing(Rounding):
    """Rounds weights and watches activations.

    Args:
        network: The network.
        grids: Where everything found goes.
        settings: How to find it.
        selected: Whether a weight of this name is to be quantised.
        given: Grids of weights that are known already.
        presented: As in :class:`~lightning_compress.mechanisms.rounding.WeightNames`.
        own_bits: As in :class:`Calibration`.
    """

    def __init__(
        self,
        network: nn.Module,
        grids: Grids,
        settings: Settings,
        selected: Callable[[str], bool],
        given: Mapping[str, WeightGrid],
        presented: Presented | None = None,
        own_bits: OwnBits = lambda name: None,
    ) -> None:
        super().__init__(network, grids, presented)
        self.evaluating = False
        self.settings, self.selected, self.given, self.own_bits = settings, selected, given, own_bits
        self.observers: dict[str, Observer] = {}
        self.found: dict[str, Tensor] = {}
        """What each layer was given as its weight."""
        self.consumers: dict[str, set[str]] = {}
        self.reached: dict[str, set[str]] = {}
        self.fused: dict[str, set[str]] = {}
        """Which operations would take an activation without a quantiser between."""
        self.foldable = {plain_name(name) for name in batch_norms(network)}
        self.folded: dict[str, dict[str, Any]] = {}
        """What the batch norm behind a layer was given."""
        self.floats: set[str] = set()
        self.met: set[str] = set()
        """Keys of the activations that would have quantisers."""
        self.only: set[str] | None = None
        """Those to look at; None: all."""
        self.edges: set[str] = set()
        """Weights that have other bits, because they come first or last."""
        self.discovering = True

    def activation(self, key: str, x: Tensor) -> Tensor:
        """The tensor as it is, once it was looked at."""
        self.met.add(key)
        if not self.discovering and (self.only is None or key in self.only):
            if key not in self.observers:
                self.observers[key] = make_observer(self.settings.observer, self.activation_bits(key))
            try:
                self.observers[key].observe(x.detach())
            except ValueError as error:
                raise QuantizationError(f"the activation '{key}' cannot be calibrated: {error}") from error
        # not itself, so that it is looked at once, whoever consumes it; nor a view, which would hold what holds it
        return x.view_as(x) if torch.is_grad_enabled() else x.detach()

    def layer(
        self,
        site: str,
        function: Callable[..., Any],
        take: Callable[[], Tensor],
        weight: Tensor,
        bias: Tensor | None,
        *rest: Any,
        **options: Any,
    ) -> Tensor | None:
        """As the base; note what the layer was given."""

        def taken() -> Tensor:
            x = take()
            source, bias_name = getattr(x, KEY, None), self.names.name_of(bias)
            if bias is not None and bias_name is None:
                bias_name = COMPUTED
            self.grids.sites[site] = replace(self.grids.sites[site], bias=bias_name, source=source)
            return x

        return super().layer(site, function, taken, weight, bias, *rest, **options)

    def activation_bits(self, key: str) -> int:
        """Bits of an activation: the network's input is an edge too."""
        edge = self.settings.edge_bits if key.startswith("in:") else None
        return edge or self.settings.activation_bits or MOST_BITS

    def norm(
        self, module: str, layer: str, function: Callable[..., Any], x: Tensor, *rest: Any, **options: Any
    ) -> Tensor | None:
        """As the base; at first, note which batch norm follows which layer."""
        given = norm_arguments(*rest, **options)
        if x.ndim != 2 and ":linear:" in layer:  # its channels come last, those of batch norm do not
            return None
        if self.discovering and module in self.foldable and given.get("running_var") is not None:
            self.grids.folds.setdefault(layer, module)
            self.folded[layer] = given  # computed with later: here it would count as an operation of the network
        return super().norm(module, layer, function, x, *rest, **options)

    def place(self, site: str, weight: Tensor) -> WeightSite | None:
        """As the base; note it."""
        place = self.names.find(weight, module_of(site))
        if place is None or not self.selected(place.name) or weight.ndim < 2 or not weight.is_floating_point():
            return None
        if site not in self.grids.sites and not self.names.is_whole(place, weight):
            return None
        self.grids.sites[site] = place
        self.found[site] = self.names.sharded.get(place.name, weight).detach()  # what is gathered is freed again
        return place

    def grid(self, site: str, place: WeightSite, weight: Tensor) -> WeightGrid | None:
        """The grid of a weight, found when it is first met after the discovery."""
        if self.discovering:
            return WeightGrid(torch.ones(()), self.settings.weight_bits)
        if place.name not in self.grids.weights:
            whole = weight if is_shard(weight) else self.names.whole(place, weight)
            given = None if site in self.grids.factors else self.given.get(place.name)
            self.grids.weights[place.name] = given or self._grid_of(site, place.name, whole)
        return self.grids.weights[place.name].rows(place.start, place.stop)

    def rounded(self, site: str, grid: WeightGrid, weight: Tensor) -> Tensor:
        """The weight on its grid; at first, as it is."""
        return weight if self.discovering else super().rounded(site, grid, weight)

    def left(self, site: str) -> None:
        """An operation stays in float."""
        if self.discovering:
            self.floats.add(site)

    def consumed(self, layer: str | None, channels: str | None, site: str) -> None:
        """Note who takes what a layer has made."""
        if layer is not None:
            self.consumers.setdefault(layer, set()).add(site)
        if channels is not None:
            self.reached.setdefault(channels, set()).add(site)

    def shared(self, key: str, site: str) -> bool:
        """As the base; at first, note who takes it."""
        if self.discovering:
            self.fused.setdefault(key, set()).add(site)
        return super().shared(key, site)

    def _grid_of(self, site: str, name: str, weight: Tensor) -> WeightGrid:
        own, edge = self.own_bits(name), self.settings.edge_bits if name in self.edges else None
        bits = own or edge or self.settings.weight_bits
        clips = (own or self.settings.weight_bits) < MOST_BITS
        least = self.settings.weight_range == "mse" or (self.settings.weight_range == "auto" and clips)
        find = mse_grid if least else quantization_grid
        shard = is_shard(weight)
        if shard and bool(Ranks([weight]).total((~own_part(weight).isfinite()).sum())):  # on all processes at once
            raise QuantizationError(f"the weight '{name}' cannot be quantised: it is NaN or infinite")
        rows = multiplied(self.grids, site, own_part(weight))
        try:  # a process may have no rows of a weight
            step = find(rows, bits, axis=0).float() if len(rows) or not shard else rows.new_ones(0).float()
        except ValueError as error:
            raise QuantizationError(f"the weight '{name}' cannot be quantised: {error}") from error
        return WeightGrid((Ranks([weight]).rows(step, weight) if shard else step).cpu(), bits)


class Calibration:
    """Finds the grids of a network, step by step; nothing of the network is changed.

    Args:
        network: The network; it is run in evaluation mode.
        settings: How to calibrate.
        selected: Whether the weight of this dotted name is to be quantised.
        given: Grids of weights that are known.
        presented: As in :class:`~lightning_compress.mechanisms.rounding.WeightNames`.
        own_bits: Bits of the weight of this dotted name, whatever the others have; None: as the others.

    Attributes:
        grids: What was found.
        overruled: Weights whose given grids have other bits than their own, and are not taken.
        nothing: Keys of activations that were 0 throughout, whose grids say nothing.
        samples: Samples that the ranges of the activations were found with.
    """

    def __init__(
        self,
        network: nn.Module,
        settings: Settings,
        *,
        selected: Callable[[str], bool] = lambda name: True,
        given: Mapping[str, WeightGrid] = MappingProxyType({}),
        presented: Presented | None = None,
        own_bits: OwnBits = lambda name: None,
    ) -> None:
        _refuse_scripted(network)
        self.overruled = [name for name, grid in given.items() if own_bits(name) not in (None, grid.bits)]
        given = {name: grid for name, grid in given.items() if name not in self.overruled}
        self._network, self._settings, self._presented = network, settings, presented
        self.grids = Grids(integer_activations=settings.activation_bits is not None)
        self._watch = Observing(network, self.grids, settings, selected, given, presented, own_bits)
        self.nothing: list[str] = []
        self.samples = 0
        self._first: list[str] = []  # the layers of the first batch, in their order

    def discover(self, steps: Steps) -> None:
        """Find out on a few batches what the network is made of, and the grids of its weights.

        Args:
            steps: Runs the network.

        Raises:
            QuantizationError: If no weight is quantised, or one is NaN or infinite.
        """
        grids, watch = self.grids, self._watch
        self._look(steps)
        grids.shared = frozenset(key for key, sites in watch.fused.items() if len(sites) > 1 or key in watch.met)
        if not grids.sites:
            raise QuantizationError(
                "no weight would be quantised: the network runs no convolution and no linear layer of real numbers "
                "that is selected"
            )
        if self._settings.equalize:
            _equalize(grids, watch)
        sites = [grids.sites[site] for site in self._first]  # those of later batches lie anywhere
        ends = {sites[0].name, sites[-1].name}
        watch.edges = ends if self._settings.edge_bits is not None else set()
        self._find_weights()
        grids.fingerprints = fingerprints(self._network)

    def _look(self, steps: Steps, *, required: bool = True) -> None:
        """See a few batches run, and what they run through."""
        grids, watch = self.grids, self._watch

        def noted() -> Iterator[object]:
            for done in steps():
                self._first = self._first or list(grids.sites)
                yield done

        watch.discovering = True
        self._run(watch, noted, samples=self._settings.max_samples, batches=LOOKS, required=required)
        watch.discovering = False
        direct = watch.consumers
        grids.folds = {layer: norm for layer, norm in grids.folds.items() if _only_norm(direct.get(layer, set()), norm)}

    def _find_weights(self) -> None:
        """Find the grids of the weights that were seen, and list what is left."""
        grids, watch = self.grids, self._watch
        for site, weight in watch.found.items():
            watch.grid(site, grids.sites[site], weight)
        weights = [name for name, value in self._network.named_parameters() if value.ndim > 1]
        counts = Counter(site.rsplit(":", 2)[-2] for site in watch.floats)
        floats = [f"{name} ({count})" for name, count in sorted(counts.items())]
        left = [name for name in map(plain_name, weights) if watch.names.stands_for(name) not in grids.weights]
        grids.left_in_float = (*left, *floats)

    def weights_only(self) -> Rounding:
        """Quantisers of the weights alone, to estimate statistics of the network with."""
        rounding = Rounding(self._network, self.grids, self._presented)
        rounding.active = False
        return rounding

    def extend(self, steps: Steps) -> None:
        """Add what another way through the network has more, such as the heads that it has in training only.

        Args:
            steps: Runs the network that way.
        """
        watch, known = self._watch, set(self.grids.sites)
        floats = watch.floats.copy()
        self._look(steps, required=False)  # manual optimisation is not replayed beyond its first backward pass
        watch.floats = floats
        new = watch.met - set(self.grids.activations)
        self.grids.training_only = tuple(site for site in self.grids.sites if site not in known)
        if self.grids.training_only:
            self._find_weights()
        if self._settings.activation_bits is not None and new:
            watch.only = new
            self.observe(steps)

    def observe(self, steps: Steps) -> None:
        """Find the grids of the activations.

        Args:
            steps: Runs the network on one batch after another.

        Raises:
            QuantizationError: If an activation is NaN or infinite.
        """
        bits, samples = self._settings.activation_bits, self._settings.max_samples
        if bits is not None:
            seen = self._run(self._watch, steps, samples=samples)
            self.samples = self.samples or seen  # not those of another way through the network
            self.grids.activations = {
                key: ActivationGrid(*range_grid(*observer.range(), own), own)
                for key, observer in self._watch.observers.items()
                for own in [self._watch.activation_bits(key)]
            }
            self.nothing = [key for key, own in self._watch.observers.items() if own.range() == (0.0, 0.0)]
        grids = self.grids  # a weight may be met on a later batch only
        grids.left_in_float = tuple(name for name in grids.left_in_float if name not in grids.weights)
        if self._settings.correct_bias:
            correction = _Correction(self._network, self.grids, self._presented)
            self._run(correction, steps, samples=samples)
            self.grids.biases = correction.means()

    def _run(
        self, watch: Rounding, steps: Steps, samples: int, *, batches: int | None = None, required: bool = True
    ) -> int:
        """Let something watch the steps; the number of samples that it has seen."""
        # what is watched is Python's: nothing is compiled for it, nor taken from code that was compiled
        with torch.compiler.set_stance("force_eager"), quantizing(self._network, watch) as calls, torch.no_grad():
            for _ in islice(steps(), batches):
                if calls.samples >= samples:
                    break
        if calls.count == 0 and required:
            raise QuantizationError("no batch reached the network, so there is nothing to calibrate with")
        return calls.samples


def calibrate(
    network: nn.Module,
    steps: Steps,
    settings: Settings,
    *,
    selected: Callable[[str], bool] = lambda name: True,
    given: Mapping[str, WeightGrid] = MappingProxyType({}),
) -> Grids:
    """Find the grids of a network that is in evaluation mode.

    Args:
        network: The network.
        steps: Runs it on the data to calibrate with, from the start each time it is called.
        settings: How.
        selected: Whether the weight of this dotted name is to be quantised.
        given: Grids of weights that are known.

    Returns:
        The grids.

    Raises:
        QuantizationError: As the methods of :class:`Calibration`.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> grids = calibrate(network, lambda: (network(torch.ones(1, 2)) for _ in range(3)), Settings())
        >>> list(grids.weights), list(grids.activations)
        (['0.weight', '2.weight'], ['in:0:linear:0', '1:relu:0'])
    """
    calibration = Calibration(network, settings, selected=selected, given=given)
    calibration.discover(steps)
    calibration.observe(steps)
    return calibration.grids


def fingerprints(network: nn.Module) -> dict[str, int]:
    """A number for each parameter and each floating buffer, by which a change of it is seen.

    Args:
        network: The network.

    Returns:
        Name to checksum; half precision counts as the float32 that it equals, a complex number as two.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> before = fingerprints(layer)
        >>> layer.weight.data[0, 1] += 1
        >>> fingerprints(layer) == before
        False
    """
    shards_in_place(network)
    found = {}
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        value = _compat.whole(value.detach())
        if value.is_floating_point() or value.is_complex():
            value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
            wide = value.to("cpu", torch.promote_types(value.dtype, torch.float32))
            found[plain_name(name)] = zlib.crc32(wide.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found


class _Correction(Rounding):
    """Finds by how much rounding its weight shifts the mean of each output channel of a layer."""

    def __init__(self, network: nn.Module, grids: Grids, presented: Presented | None = None) -> None:
        super().__init__(network, grids, presented)
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def layer(
        self,
        site: str,
        function: Callable[..., Any],
        take: Callable[[], Tensor],
        weight: Tensor,
        bias: Tensor | None,
        *rest: Any,
        **options: Any,
    ) -> Tensor | None:
        """As the base; compare with the weight as it is. A batch norm with new statistics has seen to it already."""
        place = self.place(site, weight)
        grid = None if place is None else self.grid(site, place, weight)
        if grid is not None and self.grids.folds.get(site) not in self.grids.statistics:
            lost = multiplied(self.grids, site, weight) - self.rounded(site, grid, weight)
            shift = function(take(), lost, None, *rest, **options)
            channels = shift.movedim(channel_dimension(function), 0).flatten(start_dim=1)
            total, count = self._sums.get(site, (0.0, 0))
            self._sums[site] = total + as_wide_as_can_be(channels).sum(dim=1), count + channels.shape[1]
        return super().layer(site, function, take, weight, bias, *rest, **options)

    def means(self) -> dict[str, Tensor]:
        """The mean shift of each output channel, by the key of the layer."""
        return {site: (total / count).float().cpu() for site, (total, count) in self._sums.items()}


def _only_norm(consumers: set[str], norm: str) -> bool:
    return len(consumers) == 1 and module_of(next(iter(consumers))) == norm


def _refuse_scripted(network: nn.Module) -> None:
    scripted = [name for name, module in network.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        raise QuantizationError(
            f"'{scripted[0] or class_name(network)}' is scripted (torch.jit), and what runs in it cannot be seen, "
            "so it cannot be quantised; use it unscripted"
        )


def _equalize(grids: Grids, watch: Observing) -> None:
    """Scale the channels between two layers so that the weights on both sides have the same ranges.

    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, arXiv:1906.04721.
    """
    uses = Counter(place.name for place in grids.sites.values())
    pairs = []
    for layer, place in grids.sites.items():
        takers = [site for site in watch.reached.get(layer, ()) if site.split(":")[-2] not in ("batch_norm", "relu")]
        alone = len(watch.consumers.get(layer, ())) == 1 and len(takers) == 1
        norms = [module_of(site) for site in watch.reached.get(layer, ()) if site.split(":")[-2] == "batch_norm"]
        folded = norms == ([grids.folds[layer]] if layer in grids.folds else [])
        if alone and folded and takers[0] in grids.sites:
            after = takers[0]
            # the channels that a linear layer makes and takes come last, those of a convolution do not
            alike = (":linear:" in layer) == (":linear:" in after)
            if alike and uses[place.name] == uses[grids.sites[after].name] == 1:
                pairs.append((layer, after))
    for layer, after in pairs * SWEEPS:
        _equalize_pair(grids, watch, layer, after)


def _equalize_pair(grids: Grids, watch: Observing, layer: str, after: str) -> None:
    first, second = watch.found[layer], watch.found[after]
    one = torch.ones(len(first), device=first.device)
    divisors, factors = grids.divisors.get(layer, one), grids.factors.get(after, one)
    rows = multiplied(grids, layer, first).flatten(start_dim=1).abs().amax(dim=1)
    if layer in watch.folded:
        given = watch.folded[layer]
        rows = rows * torch.rsqrt(given["running_var"] + given.get("eps", 1e-5))
        rows = rows if given.get("weight") is None else rows * given["weight"].detach().abs()
    rows = rows / divisors
    columns = _columns(second * spread(factors, second), len(first))
    scale = torch.sqrt(rows / columns)
    scale = torch.where((rows > 0) & (columns > 0) & scale.isfinite(), scale, one)
    grids.divisors[layer], grids.factors[after] = divisors * scale, factors * scale


def _columns(weight: Tensor, channels: int) -> Tensor:
    """The largest magnitude that each input channel is multiplied by."""
    groups = channels // weight.shape[1]
    rows = weight.abs().flatten(start_dim=2).amax(dim=2) if weight.ndim > 2 else weight.abs()
    return rows.reshape(groups, -1, weight.shape[1]).amax(dim=1).flatten()


def statistics_of(names: Sequence[str], network: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Copies of the running statistics of some batch norms.

    Args:
        names: Their dotted names.
        network: The network that they are in.

    Returns:
        Mean and variance by name, on the CPU.

    Example:
        >>> statistics_of(["0"], nn.Sequential(nn.BatchNorm1d(1)))
        {'0': (tensor([0.]), tensor([1.]))}
    """
    layers = {name: network.get_submodule(name) for name in names}
    return {
        name: (layer.running_mean.detach().cpu().clone(), layer.running_var.detach().cpu().clone())  # type: ignore[operator]
        for name, layer in layers.items()
    }
