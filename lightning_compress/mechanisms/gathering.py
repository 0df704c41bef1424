"""Gathering: views of weights that FSDP2 has split over processes by their rows.

Each process works on its rows of a weight, and nothing is gathered for that. A view is presented where FSDP2 reads a
shard to gather it, so that layers receive the presented weight, also where they run again in the backward pass. Its
chain rule is applied to the rows of the gradient that come back, before the backward pass returns.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_compress import _compat
from lightning_compress.functional._selection import Parts
from lightning_compress.mechanisms.selection import excluding, listing
from lightning_compress.mechanisms.sharding import Ranks, class_name, own_part, sharded_units
from lightning_compress.mechanisms.standins import standing_in

if TYPE_CHECKING:
    from lightning_compress.mechanisms.views import WeightView


def rows_of(value: Tensor, weight: Tensor) -> Tensor:
    """The rows of a tensor that belong to those that this process holds of a weight.

    Args:
        value: Of the weight's shape, whole or sharded alike.
        weight: The weight.

    Returns:
        On the weight's device.

    Example:
        >>> rows_of(torch.ones(2), nn.Parameter(torch.zeros(2)))
        tensor([1., 1.])
    """
    if isinstance(weight, DTensor) and not isinstance(value, DTensor):
        value = value[rows_held(weight)]
    return own_part(value).to(weight.device)


def rows_held(weight: Tensor) -> slice:
    """Which rows this process holds of a weight.

    Args:
        weight: Sharded or whole.

    Returns:
        All of them where it is whole.

    Example:
        >>> rows_held(torch.zeros(3, 2))
        slice(0, 3, None)
    """
    mesh = weight.device_mesh if isinstance(weight, DTensor) else None
    each, rank = (len(weight), 0) if mesh is None else (-(-len(weight) // mesh.size()), mesh.get_local_rank())
    return slice(min(rank * each, len(weight)), min((rank + 1) * each, len(weight)))


def sharded_as(rows: Tensor, weight: Tensor) -> Tensor:
    """The rows of all processes as one tensor, sharded as a weight is; the same rows where that is not sharded.

    Args:
        rows: What this process has, for its rows of the weight.
        weight: The weight.

    Returns:
        Of the weight's shape.

    Example:
        >>> sharded_as(torch.ones(2), nn.Parameter(torch.zeros(2)))
        tensor([1., 1.])
    """
    if not isinstance(weight, DTensor):
        return rows
    return DTensor.from_local(
        rows.to(weight.device),
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


def gathered(value: Any) -> Any:
    """What a checkpoint can hold of tensors that are sharded: whole, in main memory, on the first rank; None on others.

    Args:
        value: A tensor, or dicts and lists of such; all processes must call this alike.

    Returns:
        The same, with all tensors whole.

    Example:
        >>> gathered({"mask": torch.ones(1), "begun": True})
        {'mask': tensor([1.]), 'begun': True}
    """
    if isinstance(value, DTensor):
        whole = value.full_tensor()
        return whole.cpu() if value.device_mesh.get_local_rank() == 0 else None
    if isinstance(value, Mapping):
        return {key: gathered(own) for key, own in value.items()}
    return [gathered(own) for own in value] if isinstance(value, list) else value


def freed_or_frozen(name: str, owner: str) -> RuntimeError:
    """The error for a weight whose requires_grad was changed within a step.

    Args:
        name: Of the weight.
        owner: Name of who presents it.

    Returns:
        To be raised.

    Example:
        >>> freed_or_frozen("fc.weight", "dpf").args[0].partition(";")[0]
        "requires_grad of the weight 'fc.weight' was changed within a step, after 'dpf' had presented it"
    """
    return RuntimeError(
        f"requires_grad of the weight '{name}' was changed within a step, after '{owner}' had presented it; change it "
        f"between steps, or leave the layer out with {excluding(name)}"
    )


def parts_of(weights: Iterable[Tensor]) -> Parts | None:
    """How processes that hold shards of weights work together.

    Args:
        weights: Those weights, all split over the same processes.

    Returns:
        None for weights that are whole.

    Example:
        >>> parts_of([torch.ones(1)]) is None
        True
    """
    ranks = Ranks(list(weights))
    return None if ranks.mesh is None else Parts(ranks.mesh.get_local_rank(), ranks.mesh.size(), ranks.total)


def refuse_own_backward(module: nn.Module, owner: str) -> None:
    """Refuse a module that does something of its own where gradients have not been through the views yet.

    Args:
        module: The LightningModule.
        owner: Name of who presents its weights.

    Raises:
        ValueError: If its class overrides Lightning's backward().

    Example:
        >>> refuse_own_backward(nn.Linear(1, 1), "dpf")
    """
    if _compat.has_own_backward(module):
        raise ValueError(
            f"{class_name(module)} overrides backward(), and '{owner}' presents weights that FSDP2 has split: the "
            "gradients within backward() are not those of the weights yet, so what is done with them there would "
            "silently be something else than in one process: leave backward() alone, and clip or change gradients in "
            "configure_gradient_clipping(), or use one device or DDP"
        )


class Gathered:
    """One sharded weight with a view, presented whenever FSDP2 gathers it.

    Args:
        owner: Name of who presents it, for messages.
        name: Name of the weight.
        weight: The parameter, sharded.
        view: How it is presented.
    """

    def __init__(self, owner: str, name: str, weight: nn.Parameter, view: WeightView) -> None:
        self.owner, self.name, self.weight, self.view = owner, name, weight, view
        self.shown = False
        self.gathers = 0
        """How often it was gathered."""
        self.apart = False
        """Whether a backward pass runs from which the parameter itself does not learn."""
        self.passed = False
        """Whether a gradient has come past the view, as that of a penalty over parameters() does."""
        self.learnt = False
        """Whether a backward pass was settled."""
        self._hook: Any = None  # while shown, if it learns
        self._settled = 0  # gathers at the last settlement
        self._earlier: Tensor | None = None  # the gradient before the backward pass that runs
        self._owed: Tensor | None = None  # rows of a gradient that is not to go through the view any more
        self._shard: Tensor | None = None

    @contextmanager
    def installed(self, known: Any) -> Iterator[None]:
        """Present it, while :attr:`shown`, for as long as the context lasts; FSDP2 knows this of it."""
        with _compat.gathered_as(known, self._present) as self._shard:
            yield

    def show(self) -> None:
        """Present it from here on; a weight that was frozen before may learn by now."""
        self.drop()
        self.shown = True
        if self.weight.requires_grad:  # FSDP2's own gradients come without autograd, so past it
            self._hook = self.weight.register_hook(self._pass)  # type: ignore[no-untyped-call]

    def drop(self) -> None:
        """Present it no more."""
        self.shown = False
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def check(self, present: Container[int]) -> None:
        """Complain if its shard, or the parameter, is no more among those present, so that the view would be lost."""
        if _compat.shard(self.weight) is self._shard and id(self.weight) in present:
            return
        raise RuntimeError(
            f"the weight '{self.name}', which '{self.owner}' presents, was replaced by another since the fit began, as "
            "load_state_dict(assign=True) and Module.to() do: do so before the fit, or leave it out with "
            f"{excluding(self.name)}"
        )

    def seen(self, shard: Tensor) -> Tensor:
        """What a forward pass would see now of a shard."""
        return shard if not self.shown or self.view.plain else self.view.value(shard)

    def owe(self, gradient: Tensor) -> None:
        """Add rows to the gradient that is settled next."""
        self._owed = gradient if self._owed is None else self._owed + gradient

    def begin(self) -> None:
        """Put aside what earlier backward passes have accumulated, which has come through the view.

        Raises:
            RuntimeError: If the weight was frozen or freed since it is presented; a penalty would go through the view.
        """
        if self.weight.requires_grad != (self._hook is not None):
            raise freed_or_frozen(self.name, self.owner)
        self._earlier, self.weight.grad = self.weight.grad, None

    def settle(self) -> None:
        """Apply the chain rule of the view to the gradient that has come back from all processes since it began.

        Raises:
            RuntimeError: If the weight was not gathered, so that a gradient other than zero is not that of the view.
        """
        earlier, gradient = (None if own is None else own_part(own) for own in (self._earlier, self.weight.grad))
        through = None if gradient is None else self._through(gradient)
        found = [rows for rows in (earlier, through, self._owed) if rows is not None]
        self._earlier = self._owed = None
        for rows in found[1:]:
            found[0].add_(rows)
        self.weight.grad = sharded_as(found[0], self.weight) if found else None
        self.learnt = True

    def _through(self, rows: Tensor) -> Tensor:
        if self.gathers != self._settled:
            self._settled = self.gathers
            return rows if self.view.plain else self.view.gradient(rows)
        if rows.any():  # else only a penalty read the weight, and its gradient is kept apart
            raise RuntimeError(
                f"the weight '{self.name}' has a gradient, and was never gathered through the view of '{self.owner}': "
                "somebody has replaced its shard since the fit began"
            )
        return rows

    def _pass(self, gradient: Tensor) -> Tensor | None:
        """Keep a gradient of the parameter itself apart, for the view's chain rule is not for it."""
        self.passed = True
        if not self.apart:
            self.owe(rows_of(gradient, self.weight))
        return torch.zeros_like(gradient)

    def _present(self, shard: Tensor) -> Tensor:
        self.gathers += 1
        return self.seen(shard)


class GatheredWeights:
    """All sharded weights of a module that are presented otherwise than they are stored, whoever owns them.

    Args:
        module: The root.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.weights: dict[str, Gathered] = {}
        self.shown = False
        self._units: list[FSDPModule] = []  # as long as the weights are those that were owned, so are these

    @contextmanager
    def owned(self, owner: str, weights: Mapping[str, nn.Parameter], views: Mapping[str, WeightView]) -> Iterator[None]:
        """Present these weights through these views, while they are shown, for as long as the context lasts.

        Raises:
            ValueError: If a weight cannot be presented when it is gathered; it is named. As well if the module's class
                overrides backward().
        """
        refuse_own_backward(self.module, owner)
        self._units = sharded_units(self.module)
        self._reshard()
        known = {id(own.sharded_param): own for own in _compat.fsdp_parameters(self.module)}
        for name in views:
            found = known.get(id(weights[name]))
            why = "is whole in each process" if found is None else _compat.why_not_gathered_as(found)
            if why is not None:
                raise ValueError(
                    f"the weight '{name}' {why}, and others are sharded: what '{owner}' presents in its place would "
                    "not reach all of its layers; shard it with fully_shard alone, or leave it out with "
                    f"{excluding(name)}"
                )
        added = {name: Gathered(owner, name, weights[name], view) for name, view in views.items()}
        with ExitStack() as stack:
            for name, weight in added.items():
                stack.enter_context(weight.installed(known[id(weight.weight)]))
                self.weights[name] = weight
                stack.callback(self.weights.pop, name)
            try:
                yield
            finally:
                self.drop()

    def show(self) -> None:
        """Present all weights from here on, as they are now."""
        if not self.weights:
            return
        self._reshard()
        present = {id(parameter) for parameter in self.module.parameters()}
        for weight in self.weights.values():
            weight.check(present)
            weight.show()
        self.shown = True

    def drop(self) -> None:
        """Let the layers read the weights again."""
        if not self.weights:
            return
        for weight in self.weights.values():
            weight.drop()
        self.shown = False
        self._reshard()

    @contextmanager
    def seen_as(self, views: Mapping[str, WeightView]) -> Iterator[None]:
        """Present some of the weights through other views within the context."""
        usual = {name: self.weights[name].view for name in views}
        self._swap(views)
        try:
            yield
        finally:
            self._swap(usual)

    def learn_apart(
        self, loss: Tensor, views: Mapping[str, WeightView], stand_ins: Mapping[int, Tensor] = MappingProxyType({})
    ) -> None:
        """Run a backward pass of its own through what was computed under other views, before the step's own.

        FSDP2 keeps one memory for a gathered weight, so what two passes have saved of it cannot both be there. The
        weights get what their other views give them; no other parameter of the module learns from it.

        Args:
            loss: What was computed within :meth:`seen_as`.
            views: The other views.
            stand_ins: What it was computed with besides, as in :func:`standing_in`: layers may run once more here.
        """
        self._check_exchange()
        self._reshard()
        parameters = list(self.module.parameters())
        earlier = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        for weight in self.weights.values():
            weight.apart = True
        with standing_in(self.module, stand_ins), self.seen_as(views):
            loss.backward()  # type: ignore[no-untyped-call]
        for weight in self.weights.values():
            weight.apart = False
        for name, view in views.items():
            if (gradient := self.weights[name].weight.grad) is not None:
                self.weights[name].owe(view.gradient(own_part(gradient)))
        for parameter, gradient in zip(parameters, earlier, strict=True):
            parameter.grad = gradient

    def _reshard(self) -> None:
        """As :func:`shards_in_place`, without a search for the units in each step."""
        for unit in self._units:
            unit.reshard()

    def _swap(self, views: Mapping[str, WeightView]) -> None:
        for name, view in views.items():
            self.weights[name].view = view
        self._reshard()

    def rows_seen(self, weight: Tensor) -> Tensor:
        """What forward passes see now of the rows that this process holds of a weight, before a policy casts it."""
        own = next((entry for entry in self.weights.values() if entry.weight is weight), None)
        return own_part(weight) if own is None else own.seen(own_part(weight))

    def learning(self, backward: Callable[..., None]) -> Callable[..., None]:
        """A backward pass after which all gradients have come through the views, so that nobody sees others.

        Args:
            backward: Runs the backward pass, as LightningModule.backward does.

        Returns:
            What runs it in its place.
        """

        def settled(*args: Any, **kwargs: Any) -> None:
            weights = [*self.weights.values()] if self.shown else []
            for weight in weights:
                weight.begin()
            backward(*args, **kwargs)
            if weights:
                self._check_exchange()
            for weight in weights:
                weight.settle()

        return settled

    def check_learnt(self, owner: str) -> None:
        """Complain, after the first step of an owner, if its backward pass was not one of :meth:`learning`."""
        lost = [weight.name for weight in self.weights.values() if weight.owner == owner and not weight.learnt]
        if lost:
            raise RuntimeError(
                f"the backward pass of the first step of '{owner}' did not call the module's backward(), as "
                f"Lightning's do, so the gradients of {listing(sorted(lost))} are not those of the weights that the "
                "optimizer steps"
            )

    def passed(self, owner: str) -> list[str]:
        """The weights of an owner that got a part of their gradient past their views."""
        return [weight.name for weight in self.weights.values() if weight.owner == owner and weight.passed]

    def unused(self, owner: str) -> list[str]:
        """The weights of an owner that the last step did not use: they have no gradient, and could have one."""
        self._check_exchange()
        own = [weight for weight in self.weights.values() if weight.owner == owner]
        return [weight.name for weight in own if weight.weight.requires_grad and weight.weight.grad is None]

    def _check_exchange(self) -> None:
        """Complain if gradients stay where they are: what is done with them is for those of all processes."""
        if self.weights and not _compat.exchanges_gradients(self._units):
            owners = sorted({weight.owner for weight in self.weights.values()})
            raise RuntimeError(
                f"set_requires_gradient_sync(False) keeps gradients in each process, and {listing(owners)} works with "
                "those that come back from all: leave it out, and accumulate with Trainer(accumulate_grad_batches=...)"
            )
