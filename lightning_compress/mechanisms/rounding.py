"""Quantisers that round: a network computes with the values that its integers stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_compress import _compat
from lightning_compress.functional.quantizers import along, fake_quantize
from lightning_compress.mechanisms.grids import COMPUTED, ActivationGrid, Grids, WeightGrid, WeightSite
from lightning_compress.mechanisms.kernels import FoldedNorm, kernel_of
from lightning_compress.mechanisms.operations import CONVOLUTIONS
from lightning_compress.mechanisms.quantization import BIAS, STEP, QuantizationError, Quantizers, module_of
from lightning_compress.mechanisms.selection import plain_name
from lightning_compress.mechanisms.views import Source

_NEVER = (
    "the layer '{site}' was never calibrated: calibration did not come this way; calibrate again, with data that takes "
    "every path"
)
GATE_STEP = 6.0 / 255.0
"""Step of the grid that ``clamp(x + 3, 0, 6)`` has within hardswish and hardsigmoid."""


Presented = Callable[[Tensor], Source | None]


class WeightNames:
    """Which parameter of a network an operation was given, or which of its rows.

    Args:
        network: The network.
        presented: Where a tensor comes from that stands for a weight at the moment, as a masked one does.
    """

    def __init__(self, network: nn.Module, presented: Presented | None = None) -> None:
        self.sharded: dict[str, nn.Parameter] = {}
        """Those of the parameters that FSDP2 has split over processes."""
        self._gathered: dict[str, Tensor] = {}  # what layers are given of them
        self._names: dict[int, str] = {}
        self._storages: dict[int, list[tuple[str, Tensor]]] = {}  # several parameters may lie in one
        self._computed: set[str] = set()  # modules whose weight is
        self._presented = presented
        self._network = network
        self.renew()
        for name, module in network.named_modules():
            made = "weight" not in module._parameters and isinstance(vars(module).get("weight"), Tensor)
            if is_parametrized(module, "weight") or made:
                self._computed.add(plain_name(name))

    def renew(self) -> None:
        """Look for the parameters again: they, or what they hold, may have been replaced."""
        self._names.clear()
        self._storages.clear()
        for name, known in _compat.fsdp_names(self._network).items():
            self.sharded[plain_name(name)] = known.sharded_param
            self._names[id(known.sharded_param)] = plain_name(name)
            if (gathered := _compat.gathered_parameter(known)) is not None:
                self._gathered[plain_name(name)] = gathered
                self._names[id(gathered)] = plain_name(name)
        for name, parameter in self._network.named_parameters():
            if plain_name(name) in self.sharded:
                continue
            self._names[id(parameter)] = plain_name(name)
            self._storages.setdefault(parameter.untyped_storage().data_ptr(), []).append((plain_name(name), parameter))

    def name_of(self, parameter: Tensor | None) -> str | None:
        """The dotted name of a parameter; None for what is none."""
        return None if parameter is None else self._names.get(id(parameter))

    def stands_for(self, name: str) -> str:
        """The weight that a parameter is, or that is computed from it, by weight norm or the like."""
        module, _, attribute = name.rpartition(".")
        module, _, inner = name.rpartition(".parametrizations.") if ".parametrizations." in name else (module, "", "")
        made = inner.startswith("weight.") or attribute in ("weight_g", "weight_v", "weight_orig")
        return f"{module}.weight" if made and module in self._computed else name

    def whole(self, place: WeightSite, weight: Tensor) -> Tensor:
        """The weight that what an operation was given is, or is a part of."""
        entry = self._whole_of(weight)
        return weight if entry is None or entry[0] != place.name else entry[1]

    def is_whole(self, place: WeightSite, weight: Tensor) -> bool:
        """Whether what an operation was given is the weight of this name, also where a module computes that.

        A layer may go on with a weight that it computes, by a mask, say; the name alone would not tell.
        """
        module = place.name.rpartition(".")[0]
        if module not in self._computed or not place.name.endswith("weight"):
            return True
        own: Tensor = self._network.get_submodule(module).weight  # type: ignore[assignment]
        return own is weight or (own.shape == weight.shape and torch.equal(own, weight))

    def find(self, weight: Tensor, module: str) -> WeightSite | None:
        """Name a weight.

        Args:
            weight: What an operation was given.
            module: Dotted name of the module that runs.

        Returns:
            Its name and rows; None for what is no parameter, nor computed from some by weight norm or the like.
        """
        if self.sharded and len(self._gathered) < len(self.sharded):
            self.renew()  # they are made when they are first needed
        name = self._names.get(id(weight))
        whole = None if name is not None else self._whole_of(weight)
        if whole is not None and whole[1] is weight:
            name = whole[0]
        if name is None and module in self._computed:
            name = f"{module}.weight" if module else "weight"
        if name is not None:
            return WeightSite(name, 0, len(weight))
        if whole is None or weight.shape[1:] != whole[1].shape[1:] or not weight.is_contiguous():
            return None
        row = max(1, whole[1][0].numel())
        start = int(weight.storage_offset() - whole[1].storage_offset()) // row
        return WeightSite(whole[0], start, start + len(weight))

    def _whole_of(self, weight: Tensor) -> tuple[str, Tensor] | None:
        """Name and whole of the weight, or of what stands for it, that a tensor shares its memory with."""
        source = None if self._presented is None else self._presented(weight)
        if source is None:
            pointer, place = weight.untyped_storage().data_ptr(), weight.storage_offset()
            for known, own in self._gathered.items():
                if own.untyped_storage().data_ptr() == pointer != 0:
                    return known, own
            there = [own for own in self._storages.get(pointer, []) if own[1].untyped_storage().data_ptr() == pointer]
            return next((own for own in there if 0 <= place - own[1].storage_offset() < max(1, own[1].numel())), None)
        name = self._names.get(id(source.weight))
        return None if name is None else (name, source.shown)


class Rounding(Quantizers):
    """Rounds weights and activations to the grids of a calibrated network.

    Args:
        network: The network.
        grids: Its grids.
        presented: As in :class:`WeightNames`.

    """

    def __init__(self, network: nn.Module, grids: Grids, presented: Presented | None = None) -> None:
        self.grids = grids
        self.active = grids.integer_activations
        self.evaluating = True
        """Whether biases are added as integer kernels do."""
        self.used: set[str] = set()
        """Names of the weights that were rounded; compiled code keeps no record."""
        self.names = WeightNames(network, presented)
        self._modules = {module_of(site) for site in grids.sites}
        self._copies: dict[tuple[str, torch.device], Tensor] = {}

    def activation(self, key: str, x: Tensor) -> Tensor:
        """The tensor on the grid of its key."""
        grid = self.grids.activations.get(key)
        if grid is None:
            raise QuantizationError(
                f"the activation '{key}' was never calibrated: calibration did not come this way, or the network has "
                "changed since; calibrate again, with data that takes every path (max_samples=), or leave out the "
                "layers behind it with exclude="
            )
        return fake_quantize(x, self._scale(key, grid, x.device), grid.zero_point, *grid.limits)

    def shared(self, key: str, site: str) -> bool:
        """Whether others were seen to take that output too."""
        return key in self.grids.shared

    def gate(self, key: str, x: Tensor) -> Tensor:
        """``hardsigmoid(x)`` in steps of 1/255."""
        return fake_quantize(x + 3.0, self._number("gate", GATE_STEP, x.device), 0, 0, 255) / 6.0

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
        """The layer with its weight on its grid."""
        place = self.place(site, weight)
        grid = None if place is None else self.grid(site, place, weight)
        if place is None or grid is None:
            return None
        if not torch.compiler.is_compiling():  # it would be compiled again for each state of the record
            self.used.add(place.name)
        rounded, own = self.rounded(site, grid, weight), bias
        if site in self.grids.biases:
            correction = self._copied(f"bias of {site}", self.grids.biases[site], weight.device).to(weight)
            bias = correction if bias is None else bias + correction
        x = take()
        result: Tensor = function(x, rounded, bias, *rest, **options)
        if site in self.grids.folds:  # whose kernel adds what the batch norm behind it does too
            setattr(result, STEP, grid.step)
            setattr(result, BIAS, own)
            return result
        result = self.divided(site, result, function)
        return self._as_added(site, result, function, grid.step, own) if _adds_integers(function, x) else result

    def norm(
        self, module: str, layer: str, function: Callable[..., Any], x: Tensor, *rest: Any, **options: Any
    ) -> Tensor | None:
        """Batch norm, with the statistics that were estimated for the rounded weights."""
        if self.grids.folds.get(layer) != module:
            return None
        arguments = norm_arguments(*rest, **options)
        if module in self.grids.statistics and not arguments.get("training"):
            own = arguments["running_mean"]
            found = zip(("mean", "variance"), self.grids.statistics[module], strict=True)
            mean, variance = (self._copied(f"{kind} of {module}", value, own.device).to(own) for kind, value in found)
            arguments.update(running_mean=mean, running_var=variance)
        result = self.divided(layer, torch.nn.functional.batch_norm(x, **arguments), function)
        step = getattr(x, STEP, None)
        if step is None or arguments.get("training"):
            return result
        weight, bias, eps = arguments.get("weight"), arguments.get("bias"), arguments.get("eps", 1e-5)
        norm = FoldedNorm(arguments["running_mean"], arguments["running_var"], weight, bias, eps)
        return self._as_added(layer, result, function, step, getattr(x, BIAS, None), norm)

    # For those that differ

    def place(self, site: str, weight: Tensor) -> WeightSite | None:
        """Which weight it is; in compiled code, where it is no parameter, that of the calibration."""
        if torch.compiler.is_compiling():
            place = self.grids.sites.get(site)
            if place is None and module_of(site) in self._modules:
                raise QuantizationError(_NEVER.format(site=site))
            return place
        place = self.names.find(weight, module_of(site))
        if place is None and site in self.grids.sites:
            self.names.renew()
            place = self.names.find(weight, module_of(site))
            owner = weight if weight._base is None else weight._base
            if place is None and isinstance(owner, nn.Parameter):  # what compiled code hands on is none
                raise QuantizationError(
                    f"the layer '{module_of(site)}' is given a parameter that the network does not have, in the place "
                    f"of '{self.grids.sites[site].name}', which was calibrated"
                )
        return place

    def grid(self, site: str, place: WeightSite, weight: Tensor) -> WeightGrid | None:
        """Its grid; None where it is not to be quantised."""
        grid = self.grids.weights.get(place.name)
        if grid is not None and site not in self.grids.sites:
            raise QuantizationError(_NEVER.format(site=site))
        if grid is None:
            return None
        step = self._copied(f"step of {place.name}", grid.step, weight.device)
        return WeightGrid(step, grid.bits).rows(place.start, place.stop)

    def scale_now(self, key: str) -> Tensor | float:
        """The scale of an activation's grid."""
        return self.grids.activations[key].scale

    def rounded(self, site: str, grid: WeightGrid, weight: Tensor) -> Tensor:
        """The weight on its grid."""
        wide = multiplied(self.grids, site, weight)
        rounded = fake_quantize(wide, grid.step, 0, *grid.limits, axis=grid.axis)
        return rounded.to(weight.dtype)

    def _as_added(
        self,
        site: str,
        result: Tensor,
        function: Callable[..., Any],
        step: Tensor,
        bias: Tensor | None,
        norm: FoldedNorm | None = None,
    ) -> Tensor:
        """A layer's output with what integer kernels add, which matters where a network is compared with its file."""
        place = self.grids.sites.get(site)
        if not self.evaluating or place is None or place.bias == COMPUTED:
            return result
        if (norm is None and bias is None and site not in self.grids.biases) or place.source is None:
            return result
        if place.source not in self.grids.activations:
            return result
        scale, rows = self.scale_now(place.source), place.stop - place.start
        more = kernel_of(self.grids, site, rows, norm, bias, step=step, scale=scale).rounding()
        return result if more is None else result + along(more.to(result), result, channel_dimension(function))

    def _scale(self, key: str, grid: ActivationGrid, device: torch.device) -> Tensor | float:
        """The scale of an activation."""
        return self._number(key, grid.scale, device)

    def _number(self, name: str, value: float, device: torch.device) -> Tensor | float:
        """A number, as a tensor where a GPU would else be sent it in each call."""
        if torch.compiler.is_compiling() or device.type == "cpu":
            return value
        return self._copied(name, torch.tensor(value), device)

    def _copied(self, name: str, value: Tensor, device: torch.device) -> Tensor:
        """A tensor on a device, copied there once; its name is no other's."""
        if torch.compiler.is_compiling() or value.device == device:
            return value.to(device)
        if (name, device) not in self._copies:
            self._copies[name, device] = value.to(device)
        return self._copies[name, device]

    def divided(self, site: str, x: Tensor, function: Callable[..., Any]) -> Tensor:
        """The output of a layer with its channels equalised."""
        divisors = self.grids.divisors.get(site)
        if divisors is None:
            return x
        return x / along(self._copied(f"divisors of {site}", divisors, x.device).to(x), x, channel_dimension(function))


def channel_dimension(function: Callable[..., Any]) -> int:
    """The dimension of a layer's output that has its channels.

    Args:
        function: What computes the layer, of ``torch.nn.functional``.

    Returns:
        -1 for a product, 1 for a convolution.

    Example:
        >>> channel_dimension(torch.nn.functional.linear), channel_dimension(torch.nn.functional.conv2d)
        (-1, 1)
    """
    return -1 if getattr(function, "__name__", "") == "linear" else 1


def _adds_integers(function: Callable[..., Any], x: Tensor) -> bool:
    """Whether the kernel of a layer adds its bias as integers: a product of more than two dimensions does not."""
    return getattr(function, "__name__", "") in CONVOLUTIONS or x.ndim == 2


def norm_arguments(*rest: Any, **options: Any) -> dict[str, Any]:
    """The arguments of ``torch.nn.functional.batch_norm`` after its input, by name.

    Args:
        rest: Positional ones.
        options: Keyword arguments.

    Returns:
        All that were given.

    Example:
        >>> norm_arguments(None, None, training=True)
        {'running_mean': None, 'running_var': None, 'training': True}
    """
    names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    return {**dict(zip(names, rest, strict=False)), **options}


def multiplied(grids: Grids, site: str, weight: Tensor) -> Tensor:
    """A weight with its input channels equalised.

    Args:
        grids: The grids of the network.
        site: Key of the layer.
        weight: What it was given as its weight.

    Returns:
        The weight, multiplied by the factors of its input channels where there are some.

    Example:
        >>> multiplied(Grids(factors={"s": torch.tensor([2.0, 1.0])}), "s", torch.ones(1, 2))
        tensor([[2., 1.]])
    """
    factors = grids.factors.get(site)
    return weight if factors is None else weight * spread(factors, weight)


def spread(factors: Tensor, weight: Tensor) -> Tensor:
    """What a weight is multiplied by, so that its input channels are.

    Args:
        factors: Shape ``(input channels,)`` of all groups.
        weight: Shape ``(output channels, input channels of one group, ...)``.

    Returns:
        A tensor that broadcasts over ``weight``.

    Example:
        >>> spread(torch.tensor([1.0, 2.0]), torch.zeros(2, 1, 3)).flatten()
        tensor([1., 2.])
    """
    groups = max(1, len(factors) // weight.shape[1])
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows = factors.to(weight.device, wide).reshape(groups, -1).repeat_interleave(len(weight) // groups, dim=0)
    return rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))
