"""Owned parameters: helpers that train beside the user's network, with an optimizer of their own.

Adding a parameter group to the user's optimizer instead breaks LambdaLR, OneCycleLR and BaseFinetuning, and a resume
without the callback.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.mechanisms.isolation import drawn_from
from lightning_compress.mechanisms.optimizers import repeats_steps


class StepError(RuntimeError):
    """An optimizer takes no step without a closure."""


class OwnedParameters:
    """Trainable modules that are built on first use, from the shapes that the first step shows.

    Args:
        build: Makes the modules, from whatever the first use passes.
        optimizer: Makes their optimizer.
        seed: Seed of ``build``, so that every process starts from the same values; the global random state is left
            alone.

    Example:
        >>> owned = OwnedParameters(lambda size: nn.Linear(size, 1), lambda p: torch.optim.SGD(p, lr=0.1))
        >>> layer = owned.get(3)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> owned.step()
        >>> owned.steps, owned.get(3) is layer
        (1, True)
    """

    def __init__(
        self,
        build: Callable[..., nn.Module],
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        *,
        seed: int = 0,
    ) -> None:
        self._build = build
        self._make_optimizer = optimizer
        self._seed = seed
        self._stashed: dict[str, Any] | None = None
        self.module: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.steps = 0

    def get(self, *arguments: Any, device: torch.device | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """The modules; built on the first call.

        Args:
            arguments: Passed to ``build``.
            device: Where they live.
            dtype: Their dtype.

        Returns:
            The same module each time.
        """
        if self.module is None:
            with drawn_from(self._seed):
                self.module = self._build(*arguments).to(device=device, dtype=dtype)
            self.optimizer = self._make_optimizer(self.module.parameters())
            if self._stashed is not None:
                self._restore(self._stashed)
        return self.module

    @property
    def idle(self) -> bool:
        """Whether there is something to train, and no step was taken yet."""
        trains = self.module is not None and any(own.requires_grad for own in self.module.parameters())
        return trains and self.steps == 0

    def zero_grad(self) -> None:
        """Forget the gradients; where the user's optimizer does."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def step(
        self, *, scaler: Any = None, reduce: Callable[[Tensor], Tensor] | None = None, lr: float | None = None
    ) -> None:
        """Take one step; where the user's optimizer does.

        Args:
            scaler: The gradient scaler of 16-bit mixed precision, which must see this optimizer too.
            reduce: Averages a gradient over processes.
            lr: Learning rate for this step; None keeps the optimizer's.

        Raises:
            StepError: If the optimizer needs a closure.
        """
        if self.optimizer is None:
            return
        parameters = list(parameters_of(self.optimizer))
        if all(parameter.grad is None for parameter in parameters):
            return
        for group in self.optimizer.param_groups if lr is not None else ():
            group["lr"] = lr
        if reduce is not None:
            _reduce_together(parameters, reduce)
        try:
            if scaler is None:
                self.optimizer.step()
            else:
                scaler.unscale_(self.optimizer)
                scaler.step(self.optimizer)
        except (AssertionError, TypeError) as error:  # as those of the user's classes raise that call their closure
            said = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise StepError(f"{type(self.optimizer).__name__} takes no step without a closure ({said})") from error
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer state and the number of steps; what was loaded and not yet used counts as such."""
        if self.module is None or self.optimizer is None:
            return self._stashed or {}
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load now, or when the modules are built: a checkpoint comes before the first step."""
        if not state:
            return
        self._stashed = state
        if self.module is not None:
            self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        if self.module is None or self.optimizer is None:
            raise RuntimeError("there is nothing to restore into yet")
        self.module.load_state_dict(state["module"])
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would go on in the very tensors
        self.steps = state["steps"]
        self._stashed = None


def _reduce_together(parameters: Sequence[Tensor], reduce: Callable[[Tensor], Tensor]) -> None:
    """Reduce the gradients of parameters, those of one type and device at once: each call waits for all processes."""
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault((parameter.grad.dtype, parameter.grad.device), []).append(parameter)
    for group in groups.values():
        gradients = [parameter.grad for parameter in group if parameter.grad is not None]
        reduced = reduce(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = torch.split(reduced, [gradient.numel() for gradient in gradients])
        for parameter, part in zip(group, parts, strict=True):
            parameter.grad = part.view_as(parameter)


def parameters_of(*optimizers: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The parameters that optimizers have, group by group.

    Args:
        optimizers: Any.

    Yields:
        Each parameter, as often as it stands there.

    Example:
        >>> optimizer = torch.optim.SGD([{"params": [torch.ones(1)]}, {"params": [torch.zeros(1)]}], lr=0.1)
        >>> [float(parameter) for parameter in parameters_of(optimizer)]
        [1.0, 0.0]
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


def holders(optimizers: Sequence[torch.optim.Optimizer], parameters: Iterable[Tensor]) -> list[torch.optim.Optimizer]:
    """The optimizers that train some of several parameters.

    Args:
        optimizers: Those there are.
        parameters: Of a network, say.

    Returns:
        Those that have at least one of them.

    Example:
        >>> first, second = torch.ones(1), torch.ones(1)
        >>> optimizers = [torch.optim.SGD([own], lr=0.1) for own in (first, second)]
        >>> holders(optimizers, [second]) == optimizers[1:]
        True
    """
    wanted = {id(own) for own in parameters}
    return [own for own in optimizers if any(id(parameter) in wanted for parameter in parameters_of(own))]


def separate_networks(optimizers: Sequence[torch.optim.Optimizer], weights: Mapping[str, Tensor]) -> list[list[str]]:
    """The parts of a module that optimizers train apart from one another, as those of a GAN.

    A network whose parts, a backbone and a head, say, have an optimizer each cannot be told from two networks.

    Args:
        optimizers: Those there are.
        weights: Dotted name to parameter; those that nobody trains are passed over.

    Returns:
        For each network the names of its parts, without dots; parts that have an optimizer in common belong together.

    Example:
        >>> first, second, third = torch.ones(1), torch.ones(1), torch.ones(1)
        >>> optimizers = [torch.optim.SGD([first, second], lr=0.1), torch.optim.SGD([third], lr=0.1)]
        >>> separate_networks(optimizers, {"a.0.weight": first, "b.0.weight": second, "c.0.weight": third})
        [['a', 'b'], ['c']]
    """
    networks: list[list[str]] = []
    for optimizer in optimizers:
        own = {id(parameter) for parameter in parameters_of(optimizer)}
        parts = [name.partition(".")[0] for name, weight in weights.items() if id(weight) in own]
        known = [network for network in networks if not set(network).isdisjoint(parts)]
        networks = [network for network in networks if network not in known]
        networks += [list(dict.fromkeys([*(part for network in known for part in network), *parts]))] if parts else []
    return networks


def refuse_lbfgs(optimizers: Sequence[torch.optim.Optimizer], what: str) -> None:
    """Refuse an optimizer that evaluates the step several times.

    Args:
        optimizers: The user's optimizers.
        what: What cannot work with it.

    Raises:
        ValueError: If one of them is LBFGS.

    Example:
        >>> refuse_lbfgs([torch.optim.SGD([torch.ones(1)], lr=0.1)], "the translator")
    """
    for optimizer in optimizers:
        if repeats_steps(optimizer):
            raise ValueError(cannot_follow(what, optimizer, "which repeats each step"))


def cannot_follow(what: str, optimizer: torch.optim.Optimizer, why: str) -> str:
    """The message where steps beside an optimizer's cannot be had.

    Args:
        what: What has parameters of its own.
        optimizer: The user's.
        why: What keeps it from following, as a relative clause.

    Returns:
        A sentence.

    Example:
        >>> cannot_follow("'ft'", torch.optim.LBFGS([torch.ones(1)]), "which repeats each step")
        "'ft' has an optimizer of its own and cannot follow LBFGS, which repeats each step"
    """
    return f"{what} has an optimizer of its own and cannot follow {type(optimizer).__name__}, {why}"
