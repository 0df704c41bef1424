"""Steps of optimizers that are scaled by the positions of the weights: by way of the gradients, or afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from lightning_compress.mechanisms.optimizers import Way, around_steps, found_infinite, way_of, weight_kept
from lightning_compress.mechanisms.owned import parameters_of
from lightning_compress.mechanisms.warping import WarpedWeights

Told = Callable[[torch.optim.Optimizer, "Way | None"], None]


class ScaledSteps:
    """Scales the gradients of warped weights before a step, or, for optimizers that would cancel that, the step itself.

    Decoupled weight decay is not scaled, and a step that a gradient scaler skips is none.

    Args:
        warped: The weights.
        way: "gradient" or "update" for all optimizers; None: what the kind of each asks for.
        told: Called once for each optimizer with what was found of it; None where it could not be told, and gradients
            are scaled.
        passed_by: Called when an optimizer steps and :meth:`prepare` was not called for it; it raises.

    Attributes:
        scale: What all factors share; to be set before the first step.
        taken: How many steps were scaled.
        unreached: The weights that had no gradient in the first step of their optimizer.
        optimizers: How many optimizers were prepared for a step so far.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([0.70, 0.33]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> steps = ScaledSteps(WarpedWeights({"weight": weight}, {"weight": 4}))
        >>> steps.scale = 10.0
        >>> weight.grad = torch.ones(2)
        >>> with steps.attached([optimizer]):
        ...     steps.prepare(optimizer)
        ...     optimizer.step()
        >>> weight.data
        tensor([0.7000, 0.3000])
    """

    def __init__(
        self,
        warped: WarpedWeights,
        *,
        way: Way | None = None,
        told: Told = lambda optimizer, way: None,
        passed_by: Callable[[], None] = lambda: None,
    ) -> None:
        self.warped, self.scale, self.taken = warped, 1.0, 0
        self.unreached: list[str] = []
        self.optimizers = 0
        self._way, self._told, self._passed_by = way, told, passed_by
        self._ways: dict[int, Way] = {}
        self._seen: set[int] = set()
        self._prepared: set[int] = set()  # and have not stepped since
        self._before: dict[str, Tensor] = {}  # weights before a step that is scaled itself

    @contextmanager
    def attached(self, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
        """Follow the steps of optimizers, as long as the context lasts."""
        with ExitStack() as stack:
            for optimizer in optimizers:
                stack.enter_context(around_steps(optimizer, self._begin, self._end))
            yield

    def has_work(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer has any gradient; a batch that was skipped has left none."""
        return any(parameter.grad is not None for parameter in parameters_of(optimizer))

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale the gradients of an optimizer that is about to step, if that is its way."""
        names = self._moving(optimizer)
        if id(optimizer) not in self._seen:
            self._seen.add(id(optimizer))
            self.optimizers += 1
            self.unreached += [name for name in self._held(optimizer) if name not in names]
        self._prepared.add(id(optimizer))
        if names and self.way(optimizer) == "gradient":
            self.warped.scale_gradients(names, self.scale)
            self.taken += 1

    def way(self, optimizer: torch.optim.Optimizer) -> Way:
        """What is scaled of an optimizer."""
        if self._way is not None:
            return self._way
        if id(optimizer) not in self._ways:
            way = way_of(optimizer)
            if way is None and not optimizer.state:  # it shows what it divides by once it has stepped
                return "gradient"
            self._told(optimizer, way)
            self._ways[id(optimizer)] = way or "gradient"
        return self._ways[id(optimizer)]

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        self._before = {}
        if self.way(optimizer) == "update":  # the closure that makes the gradients is still to come
            self._before = {name: self.warped.part(name).clone() for name in self._held(optimizer)}

    def _end(self, optimizer: torch.optim.Optimizer) -> None:
        before, self._before = self._before, {}
        names = self._moving(optimizer)
        if names and id(optimizer) not in self._prepared:
            self._passed_by()
        self._prepared.discard(id(optimizer))
        if not names or not before or found_infinite(optimizer):
            return
        held = self._held(optimizer)
        self.warped.scale_updates(names, [before[name] for name in names], self.scale, [held[name] for name in names])
        self.taken += 1

    def _held(self, optimizer: torch.optim.Optimizer) -> dict[str, float | Tensor]:
        """The weights that an optimizer has, and what its own decay leaves of each in a step."""
        names = {id(weight): name for name, weight in self.warped.weights.items()}
        return {
            names[id(parameter)]: weight_kept(optimizer, group)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in names
        }

    def _moving(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """The weights that an optimizer changes in a step."""
        return [name for name in self._held(optimizer) if self.warped.weights[name].grad is not None]
