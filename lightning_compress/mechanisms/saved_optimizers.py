"""Whether the helpers that a checkpoint holds, and their optimizer, can be used: looked at before any of it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.functional._checks import shown
from lightning_compress.mechanisms.states import Each, damage

OWNED: Mapping[str, Any] = {
    "module": Each(Tensor),
    "optimizer": ({"state": dict, "param_groups": [{"params": list}]}, None),
    "steps": int,
}
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def flaw_of_owned(state: Mapping[str, Any], place: str, make: Make | None = None) -> str | None:
    """What is wrong with what ``OwnedParameters.state_dict`` gave.

    Args:
        state: Of the helpers; empty before their first use.
        place: Where it is in the state of a callback.
        make: Makes their optimizer anew, where all that the module holds are parameters; None where it is not known,
            and only numbers are looked at.

    Returns:
        A sentence; None where it can be used.

    Example:
        >>> flaw_of_owned({"module": {"w": torch.tensor([math.nan])}, "optimizer": None, "steps": 1}, "translator")
        "'translator.module.w' must be finite, got tensor([nan])"
        >>> flaw_of_owned({}, "translator")
    """
    return next(_flaws(state, place, make), None) if state else None


def _flaws(state: Mapping[str, Any], place: str, make: Make | None) -> Iterator[str]:
    if problem := damage(state, OWNED, place):
        yield problem
        return
    if state["steps"] < 0:
        yield f"'{place}.steps' must be at least 0, got {state['steps']}"
    for name, value in state["module"].items():
        if not _is_sound(value):
            yield f"'{place}.module.{name}' must be finite, got {shown(value)}"
    if state["optimizer"] is None:
        return
    saved, place = state["optimizer"], f"{place}.optimizer"
    if make is not None:
        fresh = _stepped(make, state["module"].values())
        yield from _flaws_of_groups(saved["param_groups"], fresh["param_groups"], f"{place}.param_groups")
        yield from _flaws_of_kind(saved["state"], fresh["state"], f"{place}.state")
    for index, entries in saved["state"].items():
        for key, value in entries.items() if isinstance(entries, Mapping) else ():
            least = 0 if key == "step" or str(key).endswith("_sq") else -math.inf  # their roots are taken
            if isinstance(value, (Tensor, int, float)) and not _is_sound(value, least, infinite=make is None):
                wanted = "finite" if least else "finite and at least 0"
                yield f"'{place}.state.{index}.{key}' must be {wanted}, got {shown(value)}"


def _flaws_of_groups(groups: list[Any], fresh: list[Any], place: str) -> Iterator[str]:
    """Other settings than those that the optimizer is made with; its numbers may be others."""
    if len(groups) != len(fresh):
        yield f"'{place}' must have {len(fresh)} entries, got {len(groups)}"
        return
    for index, (group, own) in enumerate(zip(groups, fresh, strict=True)):
        for key, value in own.items():
            found, name = group.get(key), f"{place}.{index}.{key}"
            if key not in group:
                if value is not None and value is not False:  # torch adds settings, and knows that they were not there
                    yield f"'{name}' is missing"
            elif isinstance(value, float) or key == "lr":
                if not isinstance(found, (Tensor, int, float)) or not _is_sound(found, 0):
                    yield f"'{name}' must be finite and at least 0, got {shown(found)}"
            elif type(found) is not type(value) or found != value:
                yield f"'{name}' must be {shown(value)}, got {shown(found)}"


def _flaws_of_kind(state: Mapping[Any, Any], fresh: Mapping[Any, Any], place: str) -> Iterator[str]:
    """What no optimizer of this kind keeps; a parameter that had no gradient has nothing."""
    for index, entries in state.items():
        if index not in fresh:
            yield f"'{place}' must be of {sorted(fresh)}, got {shown(index)}"
        elif not isinstance(entries, Mapping) or entries.keys() != fresh[index].keys():
            yield f"'{place}.{index}' must hold {sorted(fresh[index])}, got {shown(entries)}"
        else:
            for key, value in fresh[index].items():
                number = isinstance(entries[key], (int, float)) and value.ndim == 0
                if not number and getattr(entries[key], "shape", None) != value.shape:
                    yield f"'{place}.{index}.{key}' must be of shape {tuple(value.shape)}, got {shown(entries[key])}"


def _stepped(make: Make, values: Iterable[Tensor]) -> dict[str, Any]:
    """The state of an optimizer that has taken a step, of parameters of these shapes."""
    parameters = [nn.Parameter(torch.zeros(value.shape)) for value in values]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = make(parameters)
    optimizer.step()
    return optimizer.state_dict()


def _is_sound(value: Tensor | float, least: float = -math.inf, *, infinite: bool = False) -> bool:
    """Whether no number is NaN, infinite, or too small; of an unknown optimizer they may be infinite."""
    numbers = torch.as_tensor(value)
    numbers = torch.view_as_real(numbers) if numbers.is_complex() else numbers.double()  # types of 8 bits have no order
    return bool((numbers >= least).all()) and (infinite or bool(numbers.isfinite().all()))
