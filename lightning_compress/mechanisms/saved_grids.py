"""Whether grids that a checkpoint holds can be used: looked at before any of them is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_compress.functional._checks import shown
from lightning_compress.functional.quantizers import FEWEST_BITS, MOST_BITS
from lightning_compress.mechanisms.divergence import flaw_of_watch
from lightning_compress.mechanisms.grids import Grids
from lightning_compress.mechanisms.moving_grids import LearnedGrids
from lightning_compress.mechanisms.saved_optimizers import Make, flaw_of_owned
from lightning_compress.mechanisms.selection import joined, plain_name
from lightning_compress.mechanisms.states import GRIDS, damage
from lightning_compress.mechanisms.weights import named_weights


def flaw_of_grids(state: Mapping[str, Any], place: str) -> str | None:
    """What is wrong with numbers of grids whose types are right.

    Args:
        state: What ``Grids.state`` gave.
        place: Where it is in the state of a callback.

    Returns:
        A sentence; None where they can be used.

    Example:
        >>> grids = Grids().state()
        >>> flaw_of_grids({**grids, "activations": {"x": [0.0, 3, 8]}}, "quantization")
        "'quantization.activations.x' must be a positive scale, a zero point and bits, got [0.0, 3, 8]"
    """
    return next(_flaws(state, place), None)


def _flaws(state: Mapping[str, Any], place: str) -> Iterator[str]:
    for name, entry in state["weights"].items():
        step, bits = entry["step"], entry["bits"]
        if not FEWEST_BITS <= bits <= MOST_BITS:
            yield f"'{place}.weights.{name}.bits' must be from {FEWEST_BITS} to {MOST_BITS}, got {bits}"
        if not step.is_floating_point() or step.ndim > 1 or not bool(((step > 0) & step.isfinite()).all()):
            yield f"'{place}.weights.{name}.step' must be a positive number, or some in a row, got {shown(step)}"
    for key, entry in state["activations"].items():
        scale, zero_point, bits = entry
        fits = FEWEST_BITS <= bits <= MOST_BITS and 0 <= zero_point < 2**bits
        if not fits or not 0 < scale < math.inf:
            yield f"'{place}.activations.{key}' must be a positive scale, a zero point and bits, got {shown(entry)}"
    for key, (name, start, stop, *more) in state["sites"].items():
        if name not in state["weights"] or not 0 <= start < stop:
            yield f"'{place}.sites.{key}' must be rows of a weight that has a grid, got {shown([name, start, stop])}"
        source = more[1] if len(more) > 1 else None
        if state["integer_activations"] and source is not None and source not in state["activations"]:
            yield f"'{place}.activations' has no grid for '{source}', which '{key}' takes"
    if unused := sorted(set(state["weights"]) - {name for name, *_ in state["sites"].values()}):
        yield f"'{place}.sites' has no place for the weight '{unused[0]}'"
    if unknown := sorted(set(state["folds"]) - set(state["sites"])):
        yield f"'{place}.folds' names '{unknown[0]}', which is not among the sites"


def unfit(grids: Grids, module: nn.Module) -> str | None:
    """Why grids are not those of a network.

    Args:
        grids: The grids.
        module: What holds the network.

    Returns:
        A sentence; None where the network, each weight and each batch norm is there, with as many steps as rows.

    Example:
        >>> import torch
        >>> from lightning_compress.mechanisms.grids import WeightGrid
        >>> unfit(Grids(weights={"weight": WeightGrid(torch.ones(3), 4)}), nn.Linear(2, 5))
        "'weight' has 3 steps in the checkpoint, and 5 rows in the network"
    """
    named = list(module.named_modules(remove_duplicate=False))
    parts = {plain_name(own): part for own, part in reversed(named)}  # what is compiled rather than what it wraps
    network = parts.get(grids.network)
    if network is None:
        return f"the module has no network '{grids.network}'"
    weights = named_weights(network)
    rows = {name: len(weight) for name, weight in weights.items() if weight.ndim}
    for name, grid in grids.weights.items():
        if name not in weights and not _computes(network, name):
            return f"the network has no weight '{name}'"
        if grid.step.ndim and len(grid.step) != rows.get(name, len(grid.step)):
            return f"'{name}' has {len(grid.step)} steps in the checkpoint, and {rows[name]} rows in the network"
    for key, site in grids.sites.items():
        if site.stop > rows.get(site.name, site.stop):
            return f"'{key}' uses '{site.name}' up to row {site.stop}, and the network has {rows[site.name]} rows"
    norms = [*grids.folds.values(), *grids.statistics]
    if unknown := next((own for own in norms if joined(grids.network, own) not in parts), None):
        return f"the network has no batch norm '{unknown}'"
    return None


def _computes(network: nn.Module, name: str) -> bool:
    """Whether a layer makes this weight from other parameters, as weight norm does."""
    layer, _, attribute = name.rpartition(".")
    owner = next((module for own, module in network.named_modules() if plain_name(own) == layer), None)
    return owner is not None and (attribute in vars(owner) or hasattr(type(owner), attribute))


RANGES: Mapping[str, Any] = {"frozen": bool, "ranges": dict}
BEGUN: Mapping[str, Any] = {"begun": GRIDS}


def flaw_of_movement(state: Mapping[str, Any], step_size: str, make: Make) -> str | None:
    """What is wrong with what moving grids go on from.

    Args:
        state: Of the callback that trains with them, its types looked at; it has "moving" and what lies beside it.
        step_size: How they moved: "observed", "learned", or "mse", which stay.
        make: Makes the optimizer of learned steps.

    Returns:
        A sentence; None where it can be used.

    Example:
        >>> flaw_of_movement({"quantization": None, "moving": {}}, "mse", lambda own: None)
        "'quantization' is None beside 'moving'"
    """
    if state["quantization"] is None:
        return "'quantization' is None beside 'moving'"
    for part in ("weights", "activations", "sites", "folds") if state["start_grids"] is not None else ():
        now, start = (state[place][part].keys() for place in ("quantization", "start_grids"))
        if lone := sorted(now ^ start):
            return f"'quantization.{part}' and 'start_grids.{part}' must be of the same, and '{lone[0]}' is in one"
    if unknown := sorted(set(state["run"]) - set(state["quantization"]["weights"])):
        return f"'run' names '{unknown[0]}', which has no grid"
    if not 0 <= state["clipped"] <= 1:
        return f"'clipped' must be from 0 to 1, got {state['clipped']}"
    if problem := flaw_of_watch(state["watch"]):
        return problem
    if step_size == "observed":
        return damage(state["moving"], RANGES, "moving") or _flaw_of_ranges(state)
    if step_size == "learned":
        return damage(state["moving"], BEGUN, "moving") or _flaw_of_factors(state, make)
    return None


def _flaw_of_ranges(state: Mapping[str, Any]) -> str | None:
    ranges, keys = state["moving"]["ranges"], state["quantization"]["activations"].keys()
    if ranges.keys() != keys:
        return f"'moving.ranges' must be of {sorted(keys)}, got {sorted(map(str, ranges))}"
    for key, entry in ranges.items():
        problem = damage(entry, [float], f"moving.ranges.{key}")
        if problem or len(entry) != 2 or not -math.inf < entry[0] <= 0 <= entry[1] < math.inf:
            return problem or f"'moving.ranges.{key}' must be two numbers with 0 between them, got {shown(entry)}"
    return None


def _flaw_of_factors(state: Mapping[str, Any], make: Make) -> str | None:
    begun, now, factors = state["moving"]["begun"], state["quantization"], state["factors"]
    for part in ("weights", "activations"):
        if begun[part].keys() != now[part].keys():
            return f"'moving.begun.{part}' must be those of 'quantization', {sorted(now[part])}"
    if problem := flaw_of_grids(begun, "moving.begun"):
        return problem
    if problem := damage(factors, {"module": {"factors": Tensor}}, "factors"):
        return problem
    shape, found = (LearnedGrids.count(Grids.from_state(begun)),), factors["module"]["factors"]
    if found.shape != shape or not found.is_floating_point() or not bool(found.isfinite().all()):
        return f"'factors.module.factors' must be {shape[0]} finite numbers, got {shown(found)}"
    return flaw_of_owned(factors, "factors", make)
