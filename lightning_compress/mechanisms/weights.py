"""Weights: which parameters a technique can take, under which names, and at which places a module reads each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from lightning_compress.functional.masks import Filters
from lightning_compress.mechanisms.selection import is_metric, plain_name, select_modules

PLAIN_LAYERS = (_ConvNd, nn.Linear, nn.Bilinear)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


class Site(NamedTuple):
    """Where a module reads a parameter: an attribute of one of the modules below it."""

    module: nn.Module
    attribute: str


class SelectedWeights(NamedTuple):
    """What a selection took, and what it left.

    Attributes:
        weights: Name to parameter, in the order of ``named_modules``; a tied weight once, under its first name.
        left: Names of the other weights that could have been named, those of norms aside.
        idle: Selectors of ``exclude`` that leave out nothing that was selected.
    """

    weights: dict[str, nn.Parameter]
    left: list[str]
    idle: list[str]


def sites_of(root: nn.Module) -> dict[int, list[Site]]:
    """Every place at which modules below ``root`` read their parameters.

    Args:
        root: A module.

    Returns:
        From the ``id`` of a parameter to its sites: several for a tied weight.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> sites_of(nn.Sequential(layer))[id(layer.weight)]
        [Site(module=Linear(in_features=2, out_features=2, bias=False), attribute='weight')]
    """
    sites: dict[int, list[Site]] = {}
    for module in root.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                sites.setdefault(id(parameter), []).append(Site(module, attribute))
    return sites


def filters_of(sites: Sequence[Site]) -> Filters | None:
    """Where the filters of a weight are.

    Args:
        sites: Those of the weight.

    Returns:
        None for what is neither the weight of a convolution nor that of a linear layer.

    Example:
        >>> filters_of([Site(nn.Conv2d(3, 8, 3), "weight")])
        Filters(groups=0)
    """
    module = sites[0].module
    if isinstance(module, _ConvTransposeNd):
        return Filters(groups=module.groups)
    return Filters() if isinstance(module, (_ConvNd, nn.Linear)) else None


def named_weights(root: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, as when nothing is compiled; a tied one under each of its names.

    Args:
        root: A module.

    Returns:
        Name to parameter.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> list(named_weights(nn.Sequential(layer, layer)))
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    return {plain_name(name): parameter for name, parameter in root.named_parameters(remove_duplicate=False)}


@contextmanager
def weights_replaced(weights: Mapping[str, nn.Parameter], value: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Let parameters hold other values for a while.

    Args:
        weights: Name to parameter.
        value: From the name and the value of each to what it holds meanwhile, of the same shape.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> before = layer.weight.item()
        >>> with weights_replaced({"weight": layer.weight}, lambda name, weight: torch.zeros_like(weight)):
        ...     print(layer.weight.item())
        0.0
        >>> layer.weight.item() == before
        True
    """
    before: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                before[name] = weight.detach().clone()
                weight.copy_(value(name, before[name]))
        yield
    finally:
        with torch.no_grad():
            for name, own in before.items():
                weights[name].copy_(own)


def select_weights(
    root: nn.Module,
    layers: Sequence[str] | None,
    exclude: Sequence[str] | None,
    *,
    default: tuple[type[nn.Module], ...] = PLAIN_LAYERS,
) -> SelectedWeights:
    """Select the weights of layers, by the names of the layers.

    Args:
        root: Where the names start.
        layers: As in :func:`select_modules`; None for all of the default types but those that only a metric has, which
            measures with them. Layers that are named may be others
            too: attention, recurrent layers, embeddings, and the user's own with parameters of two dimensions or more
            that are called weights.
        exclude: What to take away again; None for nothing.
        default: Which layers are taken if none are named: convolutions and linear layers.

    Returns:
        The weights taken and those left.

    Raises:
        ValueError: As :func:`select_modules`; if a layer's weight is computed from other parameters, as weight norm
            does, has no shape yet, is not floating point, or belongs to an excluded layer too.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        >>> select_weights(net, None, ["0"])
        SelectedWeights(weights={'2.weight': Parameter containing: ...}, left=['0.weight'], idle=[])
    """
    candidates = {module: _weights_of(module) for module in root.modules()}
    if layers is None:
        types = default
    else:
        types = (*PLAIN_LAYERS, *dict.fromkeys(type(module) for module, names in candidates.items() if names))
    chosen = select_modules(root, layers, exclude, types=types)
    if layers is None:
        outside = _outside_metrics(root)
        chosen = {name: module for name, module in chosen.items() if module in outside} or chosen
    weights: dict[str, nn.Parameter] = {}
    for name, module in chosen.items():
        _refuse(name, module)
        for attribute in candidates[module]:
            parameter = module._parameters[attribute]
            if isinstance(parameter, nn.Parameter) and all(parameter is not other for other in weights.values()):
                full = f"{name}.{attribute}" if name else attribute
                _refuse_parameter(full, parameter)
                weights[full] = parameter
    if not weights:
        raise ValueError(f"layers {layers} selects {', '.join(map(repr, chosen))}, which own no weights")
    idle: list[str] = []
    if exclude is not None:
        _refuse_shared(root, weights, exclude)
        idle = _idle(root, select_modules(root, layers, None, types=types), exclude)
    seen, left = {id(parameter) for parameter in weights.values()}, []
    for name, module in root.named_modules():
        for attribute in candidates[module]:
            parameter = module._parameters[attribute]
            if id(parameter) not in seen:
                seen.add(id(parameter))
                left.append(plain_name(f"{name}.{attribute}" if name else attribute))
    return SelectedWeights(weights, left, idle)


def _outside_metrics(module: nn.Module) -> set[nn.Module]:
    """A module, and what is below it otherwise than through a metric."""
    found, waiting = set(), [module]
    while waiting:
        part = waiting.pop()
        if part not in found and not (is_metric(part) and part is not module):
            found.add(part)
            waiting += part.children()
    return found


def _idle(root: nn.Module, selected: dict[str, nn.Module], exclude: Sequence[str]) -> list[str]:
    """The selectors that match nothing of what is selected."""
    chosen = {id(own) for module in selected.values() for own in module.parameters(recurse=False)}
    idle = []
    for selector in exclude:
        left_out = select_modules(root, [selector], None, types=(nn.Module,)).values()
        if chosen.isdisjoint(id(own) for module in left_out for own in module.parameters(recurse=False)):
            idle.append(selector)
    return idle


def _weights_of(module: nn.Module) -> list[str]:
    """The attributes of a module that are weights."""
    if isinstance(module, NORMS):
        return []
    return [
        name
        for name, parameter in module._parameters.items()
        if parameter is not None and "weight" in name and (_is_lazy(parameter) or parameter.ndim >= 2)
    ]


def computed_parameters(module: nn.Module) -> dict[str, str]:
    """The attributes of a module that are computed from other parameters.

    Args:
        module: One layer; what is within it is not looked at.

    Returns:
        Name of the attribute to what computes it.

    Example:
        >>> computed_parameters(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
        {'weight': 'a parametrization'}
    """
    parametrizations: Any = getattr(module, "parametrizations", ()) if is_parametrized(module) else ()
    found = dict.fromkeys(parametrizations, "a parametrization")
    for name in module._parameters:
        base, _, kind = name.rpartition("_")
        if kind == "g" and f"{base}_v" in module._parameters:
            found[base] = "weight_norm"
        elif kind == "orig":
            found[base] = "spectral_norm or torch.nn.utils.prune"
    return found


def _is_lazy(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, UninitializedParameter)


def _refuse(name: str, module: nn.Module) -> None:
    """Refuse a layer with sparse gradients, and one whose weight is computed: what takes its place would be lost."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
        raise ValueError(
            f"the layer '{name}' has sparse=True, and sparse gradients cannot be masked; make it sparse=False before "
            f"the fit, or leave it out with exclude=['{name}']"
        )
    cause = next((cause for attribute, cause in computed_parameters(module).items() if "weight" in attribute), None)
    if cause is not None:
        raise ValueError(
            f"the layer '{name}' computes its weight from other parameters ({cause}), which would overwrite what is "
            f"put in its place; make it plain again before the fit, or leave it out with exclude=['{name}']"
        )


def _refuse_parameter(name: str, parameter: nn.Parameter) -> None:
    if _is_lazy(parameter):
        raise ValueError(
            f"the weight '{name}' has no shape yet: call the network once on an example before the fit, or leave it "
            "out with exclude="
        )
    if not parameter.is_floating_point():
        raise ValueError(f"the weight '{name}' is of {parameter.dtype}, not floating point; leave it out with exclude=")


def _refuse_shared(root: nn.Module, weights: dict[str, nn.Parameter], exclude: Sequence[str]) -> None:
    """Refuse a weight that an excluded layer has too."""
    every = (nn.Module,)
    remaining = {id(module) for module in select_modules(root, None, exclude, types=every).values()}
    names = {id(module): name for name, module in root.named_modules()}
    sites = sites_of(root)
    for name, parameter in weights.items():
        for site in sites[id(parameter)]:
            if id(site.module) not in remaining:
                other = plain_name(names[id(site.module)])
                raise ValueError(
                    f"the weight '{name}' belongs also to '{other}', which exclude= leaves out; exclude both or neither"
                )
