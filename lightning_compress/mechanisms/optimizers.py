"""Optimizers: whether a scaled gradient scales their step, and what happens around a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_compress import _compat

Way = Literal["gradient", "update"]

PROPORTIONAL = ("SGD", "ASGD")
"""Their step is proportional to the gradients."""

ADAPTIVE = (
    "Adam",
    "AdamW",
    "NAdam",
    "RAdam",
    "Adamax",
    "Adagrad",
    "Adadelta",
    "Adafactor",
    "RMSprop",
    "Rprop",
    "SparseAdam",
    "Muon",
)
"""They divide by a running size of the gradients, or use no more than their signs or directions."""

DECOUPLED = ("AdamW", "Adafactor", "Muon")

SIZES = (
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_avg_sq_row",
    "exp_inf",
    "square_avg",
    "sq_avg",
    "acc_delta",
    "exp_avg_sqs",
)
"""Entries of a state that are running sizes of gradients."""


def way_of(optimizer: torch.optim.Optimizer) -> Way | None:
    """Where a scale must act so that the step of an optimizer is scaled.

    Args:
        optimizer: Any.

    Returns:
        "gradient", or "update" where a scale of the gradient would cancel out; None if it cannot be told.

    Example:
        >>> weights = [torch.ones(1)]
        >>> way_of(torch.optim.SGD(weights, lr=0.1)), way_of(torch.optim.AdamW(weights))
        ('gradient', 'update')
    """
    if _is_one_of(optimizer, ADAPTIVE):
        return "update"
    if _is_one_of(optimizer, PROPORTIONAL):
        return "gradient"
    entries = {key for state in optimizer.state.values() if isinstance(state, Mapping) for key in state}
    divides = not entries.isdisjoint(SIZES) or any("betas" in group for group in optimizer.param_groups)
    return "update" if divides else None


def weight_kept(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float | Tensor:
    """What the decoupled weight decay of one step leaves of a weight.

    Args:
        optimizer: Any; unknown ones have no decoupled weight decay.
        group: One of its groups.

    Returns:
        ``1 - lr * weight_decay``, or 1.

    Example:
        >>> optimizer = torch.optim.AdamW([torch.ones(1)], lr=0.1, weight_decay=0.5)
        >>> weight_kept(optimizer, optimizer.param_groups[0])
        0.95
    """
    if group.get("decoupled_weight_decay", _is_one_of(optimizer, DECOUPLED)) and group.get("weight_decay"):
        kept: float | Tensor = 1 - group["lr"] * group["weight_decay"]
        return kept
    return 1.0


@contextmanager
def around_steps(
    optimizer: torch.optim.Optimizer,
    before: Callable[[torch.optim.Optimizer], None],
    after: Callable[[torch.optim.Optimizer], None],
) -> Iterator[None]:
    """Call functions before and after each step that an optimizer takes; a step that a scaler skips is none.

    The step of a base class that the optimizer's own step calls is a part of that, but in compiled code.

    Args:
        optimizer: Any.
        before: Called with it before the step, and before the closure that the step may run.
        after: Called with it after the step.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> weight.grad = torch.ones(1)
        >>> with around_steps(optimizer, lambda _: print(weight.item()), lambda _: print(weight.item())):
        ...     optimizer.step()
        1.0
        0.5
    """
    outermost: FrameType | None = None  # torch's call around the step; one that raised is on no stack any more

    def first(stepping: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal outermost
        call = _compat.call_of_step_hook()
        if outermost is None or not _lies_within(call, outermost):
            outermost = call
            before(stepping)

    def last(stepping: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal outermost
        if _compat.call_of_step_hook() is outermost:
            outermost = None
            after(stepping)

    with ExitStack() as stack:
        stack.callback(optimizer.register_step_pre_hook(first).remove)
        stack.callback(optimizer.register_step_post_hook(last).remove)
        yield


def _lies_within(call: FrameType | None, outer: FrameType) -> bool:
    while call is not None and call is not outer:
        call = call.f_back
    return call is not None


def found_infinite(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer that unscales gradients itself has just skipped its step because they are not finite.

    Args:
        optimizer: Any, within what follows its step.

    Returns:
        False for all other optimizers.

    Example:
        >>> found_infinite(torch.optim.SGD([torch.ones(1)], lr=0.1))
        False
    """
    found = getattr(optimizer, "found_inf", None)  # which the scaler puts there for the length of the step
    return isinstance(found, Tensor) and bool(found)


def loss_scale(trainer: Any, optimizer: torch.optim.Optimizer | None = None) -> float:
    """What gradients are multiplied by, so that they do not vanish in 16 bits.

    Args:
        trainer: The Trainer.
        optimizer: Whose step begins, by when most gradients are divided by it again; None: in the backward pass.

    Returns:
        1 where nothing scales them.

    Example:
        >>> import lightning.pytorch as L
        >>> loss_scale(L.Trainer(logger=False, accelerator="cpu"))
        1.0
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not (optimizer is None or _compat.unscales_itself(optimizer)):
        return 1.0
    return float(scaler.get_scale())


def repeats_steps(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it calls the step several times before it moves the parameters once, all of them together, as LBFGS does.

    Args:
        optimizer: Any.

    Returns:
        False for all other optimizers.

    Example:
        >>> repeats_steps(torch.optim.LBFGS([torch.ones(1)])), repeats_steps(torch.optim.SGD([torch.ones(1)], lr=0.1))
        (True, False)
    """
    return _is_one_of(optimizer, ("LBFGS",))


def foreign(optimizers: Sequence[object]) -> list[str]:
    """Optimizers that are none of torch's, which Lightning takes too: nobody can follow their steps.

    Args:
        optimizers: Any.

    Returns:
        Their classes.

    Example:
        >>> foreign([torch.optim.SGD([torch.ones(1)], lr=0.1), object()])
        ['object']
    """
    return [type(own).__name__ for own in optimizers if not isinstance(own, torch.optim.Optimizer)]


def _is_one_of(optimizer: torch.optim.Optimizer, names: tuple[str, ...]) -> bool:
    """By name, so that the same algorithm from another package counts too."""
    return any(base.__name__ in names for base in type(optimizer).__mro__)
