"""Selection: from names, patterns and types to modules, with an error and the nearest match where nothing fits."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_compress._compat import COMPILED_CHILD
from lightning_compress.functional._checks import check_name, shown
from lightning_compress.functional._checks import did_you_mean as did_you_mean
from lightning_compress.mechanisms.sharding import class_name


def listing(names: Sequence[str], most: int | None = 5) -> str:
    """Names in quotation marks, the first few of many.

    Args:
        names: Any.
        most: How many to write out; None for all.

    Returns:
        One line.

    Example:
        >>> listing(["a", "b", "c"], most=2)
        "'a', 'b' and 1 more"
    """
    shown = names if most is None else names[:most]
    more = f" and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
    return ", ".join(f"'{name}'" for name in shown) + more


def plain_name(name: str) -> str:
    """Drop what torch.compile adds to the dotted name of a module.

    Args:
        name: Dotted name as ``named_modules`` gives it.

    Returns:
        The name that the module has when nothing is compiled.

    Example:
        >>> plain_name("net._orig_mod.0.conv1")
        'net.0.conv1'
    """
    return ".".join(part for part in name.split(".") if part != COMPILED_CHILD)


def joined(name: str, inner: str) -> str:
    """The dotted name of a part of a part.

    Args:
        name: Dotted name of the outer part; "" for the whole.
        inner: Dotted name within it; "" for itself.

    Returns:
        The plain name.

    Example:
        >>> joined("net", "0.conv1"), joined("", "0"), joined("net", "")
        ('net.0.conv1', '0', 'net')
    """
    return ".".join(part for part in (plain_name(name), inner) if part)


def lies_within(name: str, parts: Iterable[str]) -> bool:
    """Whether a module is one of some parts, or lies in one.

    Args:
        name: Its dotted name.
        parts: Dotted names; "" is the whole.

    Returns:
        False for what is beside them.

    Example:
        >>> lies_within("model.0", ["model"]), lies_within("model2", ["model"]), lies_within("model2", [""])
        (True, False, True)
    """
    return any(not part or f"{name}.".startswith(f"{part}.") for part in parts)


def excluding(name: str) -> str:
    """How to leave out the layer of a weight; the root itself can only be left out by naming others.

    Args:
        name: Of the weight.

    Returns:
        An argument, for a message.

    Example:
        >>> excluding("model.fc.weight"), excluding("weight")
        ("exclude=['model.fc']", 'layers=')
    """
    layer = name.rpartition(".")[0]
    return f"exclude={[layer]}" if layer else "layers="


def find_module(root: nn.Module, name: str, *, argument: str) -> nn.Module:
    """Find one module by its dotted name.

    A compiled module answers to its name with and without ``_orig_mod``; without, it is the compiled wrapper.

    Args:
        root: Where the name starts.
        name: Dotted name; empty for ``root`` itself.
        argument: The user's argument that holds the name, for the error message.

    Returns:
        The module.

    Raises:
        ValueError: If there is no such module.

    Example:
        >>> find_module(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "1", argument="student")
        ReLU()
    """
    check_name(argument, name)
    modules: dict[str, nn.Module] = dict(root.named_modules(remove_duplicate=False))
    if name in modules:
        return modules[name]
    for own_name, module in modules.items():
        if plain_name(own_name) == plain_name(name):
            return module
    nearest = _nearest(name, root, {plain_name(own_name): None for own_name in modules})
    raise ValueError(f"{argument} names '{name}', not a module of {class_name(root)}{nearest}")


def is_metric(module: nn.Module) -> bool:
    """Whether a module is a metric of torchmetrics, whose states are attributes.

    Args:
        module: Any module.

    Returns:
        True also for collections of metrics.

    Example:
        >>> is_metric(nn.Linear(1, 1))
        False
    """
    return any(base.__module__.startswith("torchmetrics.") for base in type(module).__mro__)


def select_modules(
    root: nn.Module,
    layers: Sequence[str] | None,
    exclude: Sequence[str] | None,
    *,
    types: tuple[type[nn.Module], ...],
    argument: str = "layers",
) -> dict[str, nn.Module]:
    r"""Select modules of some types by name, pattern or class.

    A selector is a dotted name, an ``fnmatch`` pattern such as ``"*.conv1"`` (``*`` crosses dots), a regular
    expression ``"re:layer[12]\..*"`` that must match the whole name, or ``"type:Conv2d"``, which holds for
    subclasses too. Whatever it matches stands for itself and for all that lies below.

    Args:
        root: Where the names start.
        layers: What to select; None for every module of ``types``.
        exclude: What to take away again; None for nothing.
        types: Classes that can be selected; others are passed over.
        argument: The user's name of ``layers``, for error messages.

    Returns:
        Name to module in the order of ``named_modules``, a shared module once under its first name; names as they are
        when nothing is compiled.

    Raises:
        ValueError: If a selector matches nothing or (in ``layers``) nothing of ``types``, if a regular expression is
            malformed, or if nothing is left.
        TypeError: If ``layers`` or ``exclude`` is not a list of strings.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> select_modules(net, None, ["2"], types=(nn.Linear,))
        {'0': Linear(in_features=2, out_features=8, bias=True)}
    """
    named = list(root.named_modules(remove_duplicate=False))
    everything = {id(module) for _, module in named}
    chosen = {id(module) for _, module in named if isinstance(module, types)}
    accepted = _listing(kind.__name__ for kind in types)
    if not chosen:
        more = f"; name layers of another kind with {argument}=" if layers is None else ""
        raise ValueError(f"{argument} selects nothing: {class_name(root)} has no {accepted}{more}")
    if layers is not None:
        wanted: set[int] = set()
        for selector in check_selectors(layers, argument):
            matched = _matches(named, selector, argument, chosen)
            below = chosen & {id(part) for module in matched for part in module.modules()}
            if not below:
                found = _listing(class_name(module) for module in matched)
                raise ValueError(f"{argument} names '{selector}', of type {found} and without any {accepted} in it")
            wanted |= below
        chosen = wanted
    for selector in check_selectors([] if exclude is None else exclude, "exclude", empty=True):
        chosen -= {id(part) for module in _matches(named, selector, "exclude", everything) for part in module.modules()}
    if not chosen:
        given = "all layers" if layers is None else f"{argument}={layers}"
        raise ValueError(f"{given} without exclude={exclude} selects nothing: no {accepted} is left")
    selected: dict[str, nn.Module] = {}
    for name, module in root.named_modules():
        if id(module) in chosen:
            selected.setdefault(plain_name(name), module)  # a compiled wrapper and its inside share a plain name
    return selected


def _matches(
    named: list[tuple[str, nn.Module]], selector: str, argument: str, useful: Collection[int]
) -> list[nn.Module]:
    """The modules that one selector matches, without those below; at least one.

    What is suggested in its place is, or contains, one of the useful modules, which are told by `id`.
    """
    if selector.startswith("type:"):
        kind = selector.removeprefix("type:")
        found = [module for _, module in named if kind in _class_names(module)]
        names = [(f"type:{class_name(module)}", module) for _, module in named]
    else:
        matcher = _name_matcher(selector, {plain_name(name) for name, _ in named}, argument)
        found = [module for name, module in named if matcher(name) or matcher(plain_name(name))]
        names = [(plain_name(name), module) for name, module in named]
        if not found:
            _refuse_parameters(named, matcher, selector, argument)
    if not found:
        candidates = [name for name, own in names if any(id(part) in useful for part in own.modules())]
        nearest = _nearest(selector.removeprefix("re:"), named[0][1], candidates)
        raise ValueError(f"{argument} has '{selector}', which matches no module{nearest}")
    return found


def _refuse_parameters(
    named: list[tuple[str, nn.Module]], matcher: Callable[[str], bool], selector: str, argument: str
) -> None:
    """Say that layers are named, where a selector matches parameters, such as biases, and no module."""
    for module, layer in named:
        for name, _ in layer.named_parameters(recurse=False):
            if matcher(full := joined(module, name)):
                raise ValueError(
                    f"{argument} has '{selector}', which matches no module but a parameter, '{full}': layers are named,"
                    f" as '{plain_name(module)}'"
                )


def _nearest(name: str, root: nn.Module, candidates: Iterable[str]) -> str:
    """The candidate that is spelled most alike; where there is none, the names of the parts."""
    parts = [plain_name(part) for part, _ in root.named_children()]
    return did_you_mean(name, candidates) or (f"; its parts are {listing(parts)}" if parts else "")


def _name_matcher(selector: str, names: set[str], argument: str) -> Callable[[str], bool]:
    """Whether a dotted name is what a selector (not of types) asks for."""
    if selector.startswith("re:"):
        expression = _compiled(selector, argument)
        # the root's empty name is left out: an expression that may be empty would select everything
        return lambda name: name != "" and expression.fullmatch(name) is not None
    plain = plain_name(selector)
    if plain in names or not any(sign in selector for sign in "*?["):
        return lambda name: name == plain
    return lambda name: fnmatchcase(name, selector)


def _class_names(module: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__}


def check_selectors(selectors: Any, argument: str, *, empty: bool = False) -> Sequence[str]:
    """Check what can be checked of selectors before there is a module.

    Args:
        selectors: A list of strings, as for :func:`select_modules`.
        argument: The user's argument, for error messages.
        empty: Whether there may be none.

    Returns:
        The same.

    Raises:
        TypeError: If it is no list of strings.
        ValueError: If it is empty, or a regular expression is malformed.

    Example:
        >>> check_selectors(["re:layer[12]"], "layers")
        ['re:layer[12]']
    """
    if isinstance(selectors, str):
        raise TypeError(f"{argument} must be a list of names, got the string '{selectors}'; write ['{selectors}']")
    if not isinstance(selectors, Sequence) or isinstance(selectors, (bytes, bytearray)):
        raise TypeError(f"{argument} must be a list of names, got {shown(selectors)}")
    for selector in selectors:
        if not isinstance(selector, str):
            raise TypeError(
                f"{argument} must hold strings (names, patterns, 're:...', 'type:...'), got {shown(selector)}"
            )
        if selector.startswith("re:"):
            _compiled(selector, argument)
    if not empty and not selectors:
        raise ValueError(f"{argument} must name at least one layer, got {shown(selectors)}")
    return selectors


def _compiled(selector: str, argument: str) -> re.Pattern[str]:
    try:
        return re.compile(selector.removeprefix("re:"))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{argument} has '{selector}', a malformed regular expression: {error}") from error


def _listing(names: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(name.removeprefix("_") for name in names))
