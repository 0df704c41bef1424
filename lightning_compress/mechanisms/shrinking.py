"""Shrinking: take channels out of a network that is being trained, in place, with all that hangs on its parameters.

A plan says which indices of each tensor stay, and which attributes of modules change with them. Parameters remain the
objects that they are, so optimizers, schedulers and whoever else holds them go on with them. The same plan serves
copies of the network, such as averages. What a checkpoint of a smaller network needs beside its tensors are a few whole
numbers of its modules, from which :func:`restructure_` makes the shapes of the user's class what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_compress import _compat
from lightning_compress.mechanisms.selection import listing, plain_name

Structure = dict[str, dict[str, Any]]
"""Name of a module to its attributes that go with shapes: whole numbers, and lists of them."""

SIZES = (
    *("in_channels", "out_channels", "groups", "num_features", "num_channels", "num_groups", "num_parameters"),
    *("in_features", "out_features", "in1_features", "in2_features", "normalized_shape"),
    *("embedding_dim", "num_embeddings", "input_size", "hidden_size", "proj_size"),
    *("embed_dim", "kdim", "vdim", "num_heads", "head_dim"),
)
"""Attributes of torch's layers that say how large their tensors are."""

LAYERS_OF_TORCH = (
    *(_ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.MultiheadAttention),
    *(_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU),
)
"""What has these attributes, of torch's own and derived from it; a user's attribute of such a name is his own."""

Kept = dict[int, list[int]]
"""Dimension of a tensor to the indices that stay, ascending; a dimension that is not there stays whole."""


@dataclass(frozen=True)
class Shrinkage:
    """What stays of each tensor of a module.

    Attributes:
        kept: Name of a parameter or buffer, as when nothing is compiled, to what stays of it.
        attributes: What modules say of their sizes afterwards.
        shapes: Name of each tensor in ``kept`` to its shape before.
    """

    kept: dict[str, Kept] = field(default_factory=dict)
    attributes: Structure = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)

    def take(self, name: str, value: Tensor) -> Tensor:
        """What stays of a tensor.

        Args:
            name: Of the parameter or buffer.
            value: It, or one of its shape; a dimension of length 1 where it has more stays, as of factored moments.

        Returns:
            A new tensor; the same one where nothing goes.

        Raises:
            ValueError: If it has another shape.

        Example:
            >>> Shrinkage({"w": {0: [0, 2]}}, shapes={"w": [3, 1]}).take("w", torch.tensor([[1.0], [2.0], [3.0]]))
            tensor([[1.],
                    [3.]])
        """
        if name not in self.kept:
            return value
        expected = self.shapes[name]
        fits = value.ndim == len(expected) and all(
            own in (1, wanted) for own, wanted in zip(value.shape, expected, strict=True)
        )
        if not fits:
            raise ValueError(f"'{name}' has shape {tuple(expected)}, and what goes with it {tuple(value.shape)}")
        for dim, indices in self.kept[name].items():
            if value.shape[dim] != 1 or expected[dim] == 1:
                value = value.index_select(dim, torch.tensor(indices, device=value.device))
        return value

    def zeroed(self, name: str, value: Tensor) -> Tensor:
        """A tensor of the shape before, with zeros where entries go.

        Args:
            name: Of the parameter or buffer.
            value: Of its shape before.

        Returns:
            A new tensor.

        Example:
            >>> Shrinkage({"w": {0: [1]}}, shapes={"w": [2]}).zeroed("w", torch.tensor([3.0, 4.0]))
            tensor([0., 4.])
        """
        result = value.clone()
        for dim, indices in self.kept.get(name, {}).items():
            goes = torch.ones(value.shape[dim], dtype=torch.bool, device=value.device)
            goes[torch.tensor(indices, device=value.device)] = False
            result.index_fill_(dim, goes.nonzero().flatten(), 0)
        return result

    def after(self, earlier: Shrinkage) -> Shrinkage:
        """This and an earlier one, as one of the network that there was at first.

        Args:
            earlier: What was taken away before.

        Returns:
            The two together.

        Example:
            >>> first = Shrinkage({"w": {0: [1, 2, 3]}}, shapes={"w": [4]})
            >>> Shrinkage({"w": {0: [0, 2]}}, shapes={"w": [3]}).after(first).kept
            {'w': {0: [1, 3]}}
        """
        kept: dict[str, Kept] = {name: dict(dims) for name, dims in earlier.kept.items()}
        for name, dims in self.kept.items():
            own = kept.setdefault(name, {})
            for dim, indices in dims.items():
                own[dim] = [own[dim][index] for index in indices] if dim in own else list(indices)
        attributes = {name: dict(values) for name, values in earlier.attributes.items()}
        for name, values in self.attributes.items():
            attributes.setdefault(name, {}).update(values)
        return Shrinkage(kept, attributes, {**self.shapes, **earlier.shapes})

    def state(self) -> dict[str, Any]:
        """Whole numbers, strings, lists and dicts, for a checkpoint."""
        return {"kept": self.kept, "attributes": self.attributes, "shapes": self.shapes}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Shrinkage:
        """From what :meth:`state` gave."""
        return cls(dict(state["kept"]), dict(state["attributes"]), dict(state["shapes"]))


def shrink_(module: nn.Module, shrinkage: Shrinkage, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
    """Take away, in place, what a plan does not keep, of a module and of what optimizers know of its parameters.

    Args:
        module: The network, or a copy of it; between two steps, when no graph of it will be differentiated any more.
        shrinkage: The plan.
        optimizers: Those that train it. Their entries for a parameter are sliced as it is.

    Raises:
        ValueError: As :func:`prepared_shrinkage`; nothing has been touched then.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> shrink_(layer, Shrinkage({"weight": {0: [0, 2]}, "bias": {0: [0, 2]}}, {"": {"out_features": 2}},
        ...                          {"weight": [3, 2], "bias": [3]}))
        >>> layer
        Linear(in_features=2, out_features=2, bias=True)
    """
    prepared_shrinkage(module, shrinkage, optimizers)()


def prepared_shrinkage(
    module: nn.Module, shrinkage: Shrinkage, optimizers: Sequence[torch.optim.Optimizer] = ()
) -> Callable[[], None]:
    """What :func:`shrink_` does, all of it looked at, and nothing touched yet.

    Args:
        module: Likewise.
        shrinkage: Likewise.
        optimizers: Likewise.

    Returns:
        What does it, which cannot fail.

    Raises:
        ValueError: If the module is not the one that was planned for, or an optimizer keeps for a parameter what cannot
            be sliced with it.

    Example:
        >>> layer = nn.Linear(2, 3, bias=False)
        >>> shrink = prepared_shrinkage(layer, Shrinkage({"weight": {0: [0]}}, {}, {"weight": [3, 2]}))
        >>> shrink()
        >>> layer.weight.shape
        torch.Size([1, 2])
    """
    tensors = tensors_of(module)
    if missing := [name for name in shrinkage.kept if name not in tensors]:
        raise ValueError(
            f"the plan is of another module than {type(module).__name__}: {listing(missing)} are not in it"
        )
    names = {id(tensors[name]): name for name in shrinkage.kept}
    with torch.no_grad():
        smaller = [(tensors[name], _taken(shrinkage, name, tensors[name].data)) for name in names.values()]
        gradients = [
            None if leaf.grad is None else _taken(shrinkage, names[id(leaf)], leaf.grad) for leaf, _ in smaller
        ]
        entries = [_smaller_entries(optimizer, names, shrinkage) for optimizer in optimizers]

    def shrink() -> None:
        with torch.no_grad():
            for (leaf, value), gradient in zip(smaller, gradients, strict=True):
                leaf.grad = None
                _set_data(leaf, value)
                leaf.grad = gradient
            for optimizer, changed in zip(optimizers, entries, strict=True):
                for parameter, values in changed:
                    optimizer.state[parameter].update(values)
        _set_attributes(module, shrinkage.attributes)

    return shrink


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, as when nothing is compiled; each under all of its names.

    Args:
        module: Any.

    Returns:
        Name to tensor.

    Example:
        >>> list(tensors_of(nn.Linear(1, 1)))
        ['weight', 'bias']
    """
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {plain_name(name): value for name, value in named}


def structure_of(module: nn.Module) -> Structure:
    """What modules say of the sizes of their tensors.

    Args:
        module: Any.

    Returns:
        Name of a module, as when nothing is compiled, to attributes; plain Python.

    Example:
        >>> structure_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
        {'0': {'in_features': 2, 'out_features': 3}}
    """
    found: Structure = {}
    for name, part in module.named_modules():
        values = {key: _plain(vars(part)[key]) for key in SIZES if _is_size(vars(part).get(key))}
        if values and isinstance(part, LAYERS_OF_TORCH):
            found[plain_name(name)] = values
    return found


def structure_told_by(module: nn.Module, state: Mapping[str, Tensor]) -> Structure:
    """What the layers of a module would say of their sizes if they had the tensors of another: as far as tensors tell.

    They do not tell that of a layer or RMS norm without weights.

    Args:
        module: Of the class that was saved.
        state: The saved ``state_dict``.

    Returns:
        As :func:`structure_of`.

    Raises:
        ValueError: If layers have other sizes, and one that must fit them has no tensors.

    Example:
        >>> structure_told_by(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(4, 4, 3, groups=4).state_dict())
        {'': {'in_channels': 4, 'out_channels': 4, 'groups': 4}}
    """
    shapes = {plain_name(name): list(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    found: Structure = {}
    for name, part in module.named_modules():
        own = {key: shapes.get(f"{plain_name(name)}.{key}" if name else key) for key in TELLING}
        values = _told_by(part, own)
        if values:
            found[plain_name(name)] = values
    norms = (nn.LayerNorm, nn.RMSNorm)
    silent = [name for name, part in module.named_modules() if isinstance(part, norms) and part.weight is None]
    now = structure_of(module)
    if silent and any(now.get(name, {}) != {**now.get(name, {}), **values} for name, values in found.items()):
        raise ValueError(
            f"the sizes of {listing(silent)}, which has no weights, are not told by the tensors of the checkpoint; "
            "save a whole one, not weights alone"
        )
    return found


TELLING = ("weight", "running_mean", "weight_ih_l0", "weight_hh_l0")


def _told_by(part: nn.Module, shapes: Mapping[str, list[int] | None]) -> dict[str, Any]:
    shape = shapes["weight"] or shapes["running_mean"]
    if isinstance(part, nn.RNNBase) and (ours := shapes["weight_ih_l0"]) and (own := shapes["weight_hh_l0"]):
        return {"input_size": ours[1], "hidden_size": own[1]}
    if shape is None:
        return {}
    if isinstance(part, _ConvNd):
        if part.groups == part.in_channels == part.out_channels:
            return {"in_channels": shape[0], "out_channels": shape[0], "groups": shape[0]}
        sizes = [shape[0], shape[1] * part.groups]
        return dict(zip(("in_channels", "out_channels"), sizes if part.transposed else sizes[::-1], strict=True))
    if isinstance(part, nn.Linear):
        return {"in_features": shape[1], "out_features": shape[0]}
    if isinstance(part, nn.Embedding):
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if isinstance(part, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": shape}
    names = {_NormBase: "num_features", nn.GroupNorm: "num_channels", nn.PReLU: "num_parameters"}
    return next(({attribute: shape[0]} for kind, attribute in names.items() if isinstance(part, kind)), {})


def restructure_(module: nn.Module, structure: Mapping[str, Mapping[str, Any]], state: Mapping[str, Tensor]) -> None:
    """Let a module have the sizes of a saved one, in place, so that its tensors can be loaded.

    Args:
        module: Of the class that was saved; its parameters stay the objects that they are, and what tensors of another
            size hold is lost.
        structure: From :func:`structure_of`.
        state: The saved ``state_dict``.

    Raises:
        ValueError: If a tensor has another number of dimensions than the saved one: that is another network.

    Example:
        >>> smaller, module = nn.Linear(2, 1), nn.Linear(2, 3)
        >>> restructure_(module, structure_of(smaller), smaller.state_dict())
        >>> module.load_state_dict(smaller.state_dict())
        <All keys matched successfully>
    """
    tensors = tensors_of(module)
    saved = {plain_name(name): value for name, value in state.items() if isinstance(value, Tensor)}
    others = {name: own for name, own in tensors.items() if name in saved and own.shape != saved[name].shape}
    for name, own in others.items():
        if own.ndim != saved[name].ndim:
            raise ValueError(
                f"'{name}' is of shape {tuple(own.shape)} in {type(module).__name__} and {tuple(saved[name].shape)} in "
                "the checkpoint: it was saved from another network, not from a smaller one of this class"
            )
    with torch.no_grad():
        for name, own in others.items():
            own.grad = None
            _set_data(own, own.data.new_zeros(saved[name].shape))
    _set_attributes(module, structure)


def _taken(shrinkage: Shrinkage, name: str, value: Tensor) -> Tensor:
    """What stays of a tensor, in the memory format that it has."""
    taken = shrinkage.take(name, value)
    for layout in (torch.channels_last, torch.channels_last_3d) if not value.is_contiguous() else ():
        if value.ndim == (4 if layout is torch.channels_last else 5) and value.is_contiguous(memory_format=layout):
            return taken.contiguous(memory_format=layout)
    return taken.contiguous()


def _set_data(leaf: Tensor, value: Tensor) -> None:
    """Give a tensor that stays the same object other contents.

    Autograd keeps with a parameter what it knows of its shape, for as long as any graph of it lives. Another type in
    between lets it forget.
    """
    if leaf.is_floating_point():
        leaf.data = value.to(torch.float32 if value.dtype == torch.float16 else torch.float16)
    leaf.data = value


def _smaller_entries(
    optimizer: torch.optim.Optimizer, named: Mapping[int, str], shrinkage: Shrinkage
) -> list[tuple[Tensor, dict[Any, Tensor]]]:
    """What an optimizer's entries will be, for each parameter that it has some for."""
    changed: list[tuple[Tensor, dict[Any, Tensor]]] = []
    for parameter, state in optimizer.state.items():
        name = named.get(id(parameter))
        if name is None:
            continue
        values: dict[Any, Tensor] = {}
        for key, value in state.items() if isinstance(state, Mapping) else [("state", [state])]:
            if isinstance(value, Tensor) and value.ndim > 0:
                try:
                    values[key] = _taken(shrinkage, name, value)
                except ValueError as error:
                    raise ValueError(f"{_keeps(optimizer, key)} cannot be made smaller with it: {error}") from error
            elif not isinstance(value, Tensor) and _holds_tensors(value):
                raise ValueError(f"{_keeps(optimizer, key)} of '{name}' is a {type(value).__name__} of tensors")
        changed.append((parameter, values))
    return changed


def _keeps(optimizer: torch.optim.Optimizer, key: object) -> str:
    return f"what {type(optimizer).__name__} keeps as '{key}'"


def _holds_tensors(value: Any) -> bool:
    entries: Iterator[Any] = iter(())
    if isinstance(value, Mapping):
        entries = iter(value.values())
    elif isinstance(value, (list, tuple)):
        entries = iter(value)
    return isinstance(value, Tensor) or any(_holds_tensors(entry) for entry in entries)


def _set_attributes(module: nn.Module, structure: Mapping[str, Mapping[str, Any]]) -> None:
    modules = {plain_name(name): part for name, part in module.named_modules(remove_duplicate=False)}
    for name, part in module.named_modules(remove_duplicate=False):  # a compiled wrapper and its inside share a name
        for key, value in structure.get(plain_name(name), {}).items():
            if key in vars(part):
                vars(part)[key] = tuple(value) if isinstance(value, list) else value
    for name in structure:
        if name in modules:
            _compat.refresh_flat_weights(modules[name])


def _is_size(value: Any) -> bool:
    whole = isinstance(value, Integral) and not isinstance(value, bool)  # those of NumPy too
    return whole or (isinstance(value, (tuple, list)) and bool(value) and all(_is_size(entry) for entry in value))


def _plain(value: Any) -> Any:
    return [int(entry) for entry in value] if isinstance(value, (tuple, list)) else int(value)
