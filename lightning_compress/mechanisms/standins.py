"""Stand-ins: for one pass, modules read other parameters and buffers than those that they have.

Unlike a view, which is an attribute in front of a parameter, a stand-in takes the parameter's place in the module's own
tables. Compiled code reads those, so one and the same code serves the module with and without stand-ins; but meanwhile
``parameters()`` and ``state_dict()`` give the stand-ins too, so it is for the time of a pass only.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils._pytree import tree_leaves

from lightning_compress import _compat
from lightning_compress.mechanisms.sharding import class_name


@contextmanager
def standing_in(root: nn.Module, tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Let all modules below a root read other parameters and buffers, wherever these are shared.

    Args:
        root: A module.
        tensors: From the ``id`` of a parameter or buffer to what is read in its place.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> other = nn.Parameter(layer.weight.detach() + 1)
        >>> with standing_in(layer, {id(layer.weight): other}):
        ...     layer.weight is other
        True
        >>> layer.weight is other
        False
    """
    types = {id(own.sharded_param): own.mp_policy.param_dtype for own in _compat.fsdp_parameters(root)}
    with ExitStack() as stack:
        for module in root.modules():
            stack.callback(_compat.refresh_flat_weights, module)
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, tensor in list(table.items()):
                    if tensor is not None and id(tensor) in tensors and id(tensor) in types:
                        stand_in = tensors[id(tensor)].to(types[id(tensor)] or tensor.dtype)
                        vars(module)[name] = stand_in  # in front of the table, into which FSDP2 writes what it gathers
                        stack.callback(_take_away, module, name, stand_in)
                    elif tensor is not None and id(tensor) in tensors:
                        table[name] = tensors[id(tensor)]
                        stack.callback(_put_back, table, name, tensor, table[name])
            _compat.refresh_flat_weights(module)
        yield


def unlearning(parameters: Iterable[nn.Parameter]) -> dict[int, Tensor]:
    """Stand-ins with the values of parameters, through which no gradient comes.

    Args:
        parameters: Those to be stood in for.

    Returns:
        For :func:`standing_in`; they share the memory of the parameters.

    Example:
        >>> weight = nn.Parameter(Tensor([1.0]))
        >>> [other] = unlearning([weight]).values()
        >>> other.requires_grad, other.data_ptr() == weight.data_ptr()
        (False, True)
    """
    return {id(own): nn.Parameter(own.detach(), requires_grad=False) for own in parameters}


def scratch(buffers: Iterable[Tensor]) -> dict[int, Tensor]:
    """Stand-ins for buffers, which may be written to: that is not seen afterwards.

    Args:
        buffers: Those to be stood in for.

    Returns:
        For :func:`standing_in`: copies.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with standing_in(norm, scratch(norm.buffers())):
        ...     _ = norm(Tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> norm.running_mean
        tensor([0., 0.])
    """
    return {id(own): own.detach().clone() for own in buffers}


def leaves_of(loss: Tensor | None) -> list[Tensor]:
    """The tensors that a backward pass would give gradients to.

    Args:
        loss: With its graph; None has none.

    Returns:
        Each once.

    Example:
        >>> weight = nn.Parameter(Tensor([1.0]))
        >>> leaves_of((weight * 2).sum())[0] is weight
        True
    """
    return [node.variable for node in _nodes(loss) if _is_leaf(node)]


def leaves_of_both(one: Tensor | None, other: Tensor | None) -> list[Tensor]:
    """The tensors that two losses would give gradients to through something that was computed once for both.

    Args:
        one: With its graph; None has none.
        other: Likewise.

    Returns:
        Each once.

    Example:
        >>> weight = nn.Parameter(Tensor([1.0]))
        >>> twice = weight * 2
        >>> len(leaves_of_both(twice + weight, twice * 3)), len(leaves_of_both(weight * 2, weight * 3))
        (1, 0)
    """
    nodes = _nodes(one)
    shared = [node for node in _nodes(other) if node in nodes and not _is_leaf(node)]
    leaves = [following.variable for node in shared for following, _ in node.next_functions if _is_leaf(following)]
    return list({id(leaf): leaf for leaf in leaves}.values())


def _is_leaf(node: Any) -> bool:
    return hasattr(node, "variable")


def _nodes(loss: Tensor | None) -> dict[Any, None]:
    """What a loss was computed by, in the graph of autograd, in the order in which it is found."""
    seen: dict[Any, None] = {}
    waiting: list[Any] = [None if loss is None else loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen[node] = None
            waiting += [following for following, _ in node.next_functions]
    return seen


def twins(layers: Iterable[nn.Module]) -> nn.ModuleList:
    """Copies of the parameters and buffers of layers.

    Args:
        layers: Those whose own tensors are copied, without those of their children.

    Returns:
        For each a module that holds the copies under their names in the layer.

    Example:
        >>> list(twins([nn.BatchNorm1d(2)]).state_dict())[:2]
        ['0.weight', '0.bias']
    """
    return nn.ModuleList([_twin(layer) for layer in layers])


def paired(layers: Iterable[nn.Module], copies: nn.ModuleList) -> dict[int, Tensor]:
    """Which copy is whose.

    Args:
        layers: As for :func:`twins`.
        copies: What it gave.

    Returns:
        From the ``id`` of a layer's parameter or buffer to its copy, for :func:`standing_in`.

    Example:
        >>> layers = [nn.BatchNorm1d(2)]
        >>> len(paired(layers, twins(layers)))
        5
    """
    pairs: dict[int, Tensor] = {}
    for layer, twin in zip(layers, copies, strict=True):
        for table, other in ((layer._parameters, twin._parameters), (layer._buffers, twin._buffers)):
            for name, tensor in table.items():
                own: Any = other.get(name)
                if tensor is not None and own is not None:
                    pairs.setdefault(id(tensor), own)
    return pairs


def optimizer_like(optimizer: Optimizer) -> Optimizer:
    """An optimizer of the same class, without parameters yet; see :func:`follow_`.

    Args:
        optimizer: The user's.

    Returns:
        The other one, which shares no state with it.

    Raises:
        ValueError: If the optimizer holds another one, or tensors beside its groups.

    Example:
        >>> from torch.optim import SGD
        >>> optimizer_like(SGD([Tensor([1.0])], lr=0.1)).param_groups
        []
    """
    other = type(optimizer).__new__(type(optimizer))
    every = vars(SGD([torch.zeros(1)], lr=0.1))  # what an optimizer has whatever its class: hooks, say
    own = {key: copy.copy(value) for key, value in vars(optimizer).items() if key not in every and key != "step"}
    held = [
        key for key, value in own.items() if any(isinstance(leaf, (Optimizer, Tensor)) for leaf in tree_leaves(value))
    ]
    if held:
        raise ValueError(
            f"{type(optimizer).__name__} holds an optimizer, or tensors, in '{held[0]}', so it cannot be followed by "
            "one of its kind for the layers that the dense path has for itself; choose dense_path='shared'"
        )
    given = optimizer.__getstate__()
    state = {**own, **given, "defaults": dict(given["defaults"]), "state": defaultdict(dict), "param_groups": []}
    other.__setstate__(state)  # as an optimizer is made that was pickled
    return other


def follow_(follower: Optimizer, optimizer: Optimizer, copies: Mapping[int, Tensor]) -> None:
    """Let an optimizer train the copies of what another trains, with the same settings, in place.

    Args:
        follower: What :func:`optimizer_like` gave.
        optimizer: The user's, whose groups, learning rates and so on may have changed since.
        copies: From the ``id`` of a parameter to its copy; parameters without one are left out.

    Example:
        >>> from torch.optim import SGD
        >>> weight, other = nn.Parameter(Tensor([1.0])), nn.Parameter(Tensor([2.0]))
        >>> first = SGD([weight], lr=0.1)
        >>> second = optimizer_like(first)
        >>> follow_(second, first, {id(weight): other})
        >>> second.param_groups[0]["lr"], second.param_groups[0]["params"][0] is other
        (0.1, True)
    """
    follower.param_groups[:] = [
        {**group, "params": [copies[id(own)] for own in group["params"] if id(own) in copies]}
        for group in optimizer.param_groups
    ]


def _put_back(table: dict[str, Any], name: str, tensor: Tensor, stand_in: Tensor) -> None:
    """Put a tensor back; what was assigned in its place meanwhile is the new value of its stand-in."""
    now, table[name] = table.get(name), tensor
    if isinstance(now, Tensor) and now is not stand_in and now.shape == stand_in.shape:
        stand_in.data.copy_(now.detach())


def _take_away(module: nn.Module, name: str, stand_in: Tensor) -> None:
    if vars(module).pop(name, None) is not stand_in:
        raise RuntimeError(f"'{name}' of a {class_name(module)} was replaced while another tensor stood in for it")


def _twin(layer: nn.Module) -> nn.Module:
    twin = nn.Module()
    for name, own in layer._parameters.items():
        if own is not None:
            value = _compat.whole(own.detach()).clone()
            twin.register_parameter(name, nn.Parameter(value, requires_grad=own.requires_grad))
    for name, buffer in layer._buffers.items():
        if buffer is not None:
            twin.register_buffer(name, buffer.detach().clone())
    return twin
