"""What a second pass has for itself: copies of norm layers and of the classifier, which learn beside the user's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_compress.mechanisms.isolation import LIBRARIES
from lightning_compress.mechanisms.owned import OwnedParameters
from lightning_compress.mechanisms.selection import find_module, listing, plain_name, select_modules
from lightning_compress.mechanisms.sharding import class_name
from lightning_compress.mechanisms.stages import LayerOutput
from lightning_compress.mechanisms.standins import follow_, optimizer_like, paired, twins
from lightning_compress.mechanisms.weights import NORMS


class OwnLayers:
    """Copies of layers, and their optimizer.

    Args:
        state: What :meth:`state` gave, to go on from; None: anew.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> import torch
        >>> own = OwnLayers()
        >>> _ = own.copy({"norm": norm}, torch.optim.SGD(norm.parameters(), lr=0.1))
        >>> own.names, len(own.stand_ins())
        (['norm'], 5)
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self.names: list[str] | None = None if state is None else list(state["names"])
        """Dotted names of the layers; None before they are known."""
        self.classifier: list[str] = [] if state is None else list(state["classifier"])
        """Those of the classifier among them."""
        self.layers: dict[str, nn.Module] = {}
        self._saved = None if state is None else state["layers"]
        self._owned: OwnedParameters | None = None
        self._copies: nn.ModuleList | None = None

    def copy(
        self,
        layers: Mapping[str, nn.Module],
        optimizer: Optimizer,
        buffers: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> OwnedParameters:
        """Copy layers as they are now, or as they were saved.

        Args:
            layers: Dotted name to layer.
            optimizer: The user's, whose settings theirs will have.
            buffers: From the ``id`` of a buffer to the value that it had before, to begin with that.

        Returns:
            The copies, to be trained.

        Raises:
            ValueError: If others were saved.
        """
        if self.names is not None and self.names != list(layers):
            raise ValueError(
                f"the checkpoint has layers of the dense path, {listing(self.names)}, other than those of now, "
                f"{listing(list(layers))}: begin a new training"
            )
        self.layers, self.names = dict(layers), list(layers)

        def build() -> nn.Module:
            self._copies = twins(layers.values())
            for own, copied in self._pairs().items():
                if own in buffers:
                    copied.copy_(buffers[own])
            return self._copies

        def make(_: Any) -> Optimizer:
            follower = optimizer_like(optimizer)
            follow_(follower, optimizer, self._pairs())
            return follower

        self._owned = OwnedParameters(build, make)
        saved = dict(self._saved or {})
        if saved and not optimizer.state:  # the user's begins anew too
            saved["optimizer"] = None
        self._owned.load_state_dict(saved)
        self._owned.get()
        return self._owned

    def stand_ins(self) -> dict[int, Tensor]:
        """From the ``id`` of a layer's parameter or buffer to its copy; frozen where the parameter is."""
        pairs = self._pairs()
        for layer in self.layers.values():
            for parameter in layer.parameters(recurse=False):
                pairs[id(parameter)].requires_grad_(parameter.requires_grad)
        return pairs

    def follow(self, optimizer: Optimizer) -> None:
        """Take over the settings that the user's optimizer has now."""
        if self._owned is not None and self._owned.optimizer is not None:
            follow_(self._owned.optimizer, optimizer, self._pairs())

    def state(self) -> dict[str, Any] | None:
        """Tensors and primitives, for a checkpoint; None while there is nothing."""
        if self._owned is None:
            return None if self._saved is None else {**self._known(), "layers": self._saved}
        copied = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self._owned.state_dict())
        return {**self._known(), "layers": copied}

    def _known(self) -> dict[str, Any]:
        return {"names": self.names, "classifier": self.classifier}

    def _pairs(self) -> dict[int, Tensor]:
        return {} if self._copies is None else paired(self.layers.values(), self._copies)


def norms_of(root: nn.Module, selectors: Sequence[str] | None, masked: set[int]) -> dict[str, nn.Module]:
    """The norm layers that have parameters or buffers.

    Args:
        root: The module.
        selectors: As in :func:`select_modules`; None for those of torch, and what derives from them.
        masked: The ``id`` of each parameter that cannot be taken.

    Returns:
        Dotted name to layer.

    Raises:
        ValueError: If a selector matches nothing, or there are norm layers of another kind that nobody named.

    Example:
        >>> list(norms_of(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), None, set()))
        ['1']
    """
    if selectors is not None:
        chosen = select_modules(root, selectors, None, types=(nn.Module,), argument="norms")
        found = {name: module for name, module in chosen.items() if _has_own(module)}
        if taken := [name for name, module in found.items() if _holds(module, masked)]:
            raise ValueError(f"norms takes {listing(taken)}, whose weights are masked")
        return found
    named = {plain_name(name): module for name, module in root.named_modules() if _has_own(module)}
    found = {name: module for name, module in named.items() if isinstance(module, NORMS)}
    others = {
        name: module
        for name, module in named.items()
        if name not in found
        and re.search(r"norm(alization)?(\dd)?$", class_name(module), re.IGNORECASE)
        and type(module).__module__.partition(".")[0] not in LIBRARIES
        and _learns_or_counts(module)
        and not _holds(module, masked)
    }
    if others:
        kinds = sorted({f"type:{class_name(module)}" for module in (*found.values(), *others.values())})
        raise ValueError(
            f"{listing(list(others))} may be norm layers, of a kind that is not known: name all norm layers, "
            f"norms={kinds}, or choose dense_path='shared'"
        )
    return found


def classifiers_named(root: nn.Module, names: str | Sequence[str], masked: set[int]) -> dict[str, nn.Module]:
    """The layers with parameters at these names, and below.

    Args:
        root: The module.
        names: Dotted name, or several.
        masked: The ``id`` of each parameter that cannot be taken.

    Returns:
        Dotted name to layer.

    Raises:
        ValueError: If there is no such module, it has no parameters, or they are masked.

    Example:
        >>> list(classifiers_named(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2)), "1", set()))
        ['1']
    """
    found: dict[str, nn.Module] = {}
    for name in [names] if isinstance(names, str) else names:
        top = find_module(root, name, argument="classifier")
        own = {
            plain_name(f"{name}.{below}" if below and name else name or below): part
            for below, part in top.named_modules()
            if next(part.parameters(recurse=False), None) is not None
        }
        if not own:
            raise ValueError(f"classifier names '{name}', a {class_name(top)} without parameters")
        if taken := [part for part, module in own.items() if _holds(module, masked)]:
            raise ValueError(
                f"classifier names '{name}', and the weights of {listing(taken)} are masked; leave them out with "
                "exclude=, or choose dense_path='own_norm'"
            )
        found |= own
    return found


def last_layer(root: nn.Module, called: Sequence[LayerOutput], masked: set[int]) -> dict[str, nn.Module]:
    """The layer that is called last among those that learn: the classifier.

    Args:
        root: The module.
        called: What its layers returned in a step, in their order.
        masked: The ``id`` of each parameter that is masked.

    Returns:
        Its dotted name and itself.

    Raises:
        ValueError: If there is none, or its weights are masked.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
        >>> list(last_layer(net, [LayerOutput("0", (1, 2, 2, 2), weights=True), LayerOutput("2", (1, 2))], {0}))
        ['2']
    """
    modules = {plain_name(name): module for name, module in root.named_modules()}
    learning = [
        output.name
        for output in called
        if not isinstance(modules[output.name], NORMS)
        and any(own.requires_grad for own in modules[output.name].parameters(recurse=False))
        and all(next(child.parameters(), None) is None for child in modules[output.name].children())  # no whole network
    ]
    needs = "dense_path='own' needs a classifier of its own, and"
    if not learning:
        raise ValueError(f"{needs} no layer that learns was called; choose dense_path='own_norm'")
    if _holds(modules[learning[-1]], masked):
        raise ValueError(
            f"{needs} the layer that is called last, '{learning[-1]}', is masked: leave it dense with "
            f"exclude={[learning[-1]]}, name another with classifier=, or choose dense_path='own_norm'"
        )
    return {learning[-1]: modules[learning[-1]]}


def _has_own(module: nn.Module) -> bool:
    return any(tensor is not None for table in (module._parameters, module._buffers) for tensor in table.values())


def _learns_or_counts(module: nn.Module) -> bool:
    """Whether a module has a parameter that learns, or running statistics."""
    learns = any(own.requires_grad for own in module.parameters(recurse=False))
    return learns or any(name.startswith("running") for name, _ in module.named_buffers(recurse=False))


def _holds(module: nn.Module, parameters: set[int]) -> bool:
    return any(id(own) in parameters for own in module.parameters(recurse=False))
