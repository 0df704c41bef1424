"""Changes of a recipe from the command line: ``--set DCILCallback.sparsity=0.8``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_compress.callbacks.export import ExportCallback
from lightning_compress.mechanisms.selection import did_you_mean
from lightning_compress.recipe.classes import own_callbacks
from lightning_compress.recipe.file import KEYS, RecipeError, naming, parse, shown

Step = str | int
EXAMPLE = "DCILCallback.sparsity=0.8"
_KEY = re.compile(r"[^.\[\]]+(\[\d{1,6}\])*(\.[^.\[\]]+(\[\d{1,6}\])*)*")


def changed(content: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A recipe with changes.

    Args:
        content: A recipe whose keys were checked; it stays as it is.
        settings: ``KEY=VALUE`` each. A key is a path through the recipe, as ``callbacks[0].init_args.sparsity`` or
            ``export.path``, or begins with a callback, by class or name, and goes on with an argument of it, as
            ``dcil.sparsity``. A value is YAML.

    Returns:
        The changed recipe; what it holds is not checked.

    Raises:
        RecipeError: If a setting cannot be read, or leads nowhere.

    Example:
        >>> recipe = {"version": 1, "callbacks": [{"class_path": "DCILCallback", "init_args": {"sparsity": 0.9}}]}
        >>> changed(recipe, ["dcil.sparsity=0.8"])["callbacks"]
        [{'class_path': 'DCILCallback', 'init_args': {'sparsity': 0.8}}]
    """
    result = dict(content)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not _KEY.fullmatch(key):
            raise RecipeError(f"--set takes KEY=VALUE, such as {EXAMPLE}, got {shown(setting)}")
        with naming(f"--set {key}"):
            result = _replaced(result, _path(result, key), parse(text))
    return result


def _path(content: Mapping[str, Any], key: str) -> list[Step]:
    """The way to a value from the top of the recipe."""
    steps: list[Step] = [
        int(found[1:-1]) if found.startswith("[") else found for found in re.findall(r"\[\d+\]|[^.\[\]]+", key)
    ]
    if steps[0] in KEYS:
        return steps
    first = str(steps[0])
    entries = _entries(content)
    ways = [way for way, names in entries if first in names]
    if len(ways) > 1:
        raise RecipeError(
            f"the recipe has {len(ways)} callbacks '{first}'; say which one by its name, or by callbacks[0]"
        )
    if not ways:
        known = [name for _, names in entries for name in names]
        raise RecipeError(
            f"the recipe has neither a key nor a callback '{first}'; there are {', '.join([*KEYS, *known])}"
            f"{did_you_mean(first, [*KEYS, *known])}"
        )
    if len(steps) == 1:
        raise RecipeError(f"'{first}' is a callback; an argument of it comes behind a dot, as in {EXAMPLE}")
    return [*ways[0], *steps[1:]]


def _entries(content: Mapping[str, Any]) -> list[tuple[list[Step], list[str]]]:
    """The way to the arguments of each callback, and the names that it goes by."""
    found: list[tuple[list[Step], list[str]]] = []
    for index, entry in enumerate(content.get("callbacks") or []):
        name = (entry.get("init_args") or {}).get("name")
        found.append((["callbacks", index, "init_args"], _names(entry["class_path"], name)))
    if content.get("export") is not None:
        found.append((["export"], _names(ExportCallback.__name__, content["export"].get("name"))))
    return found


def _names(class_path: str, name: Any) -> list[str]:
    short = class_path.rpartition(".")[2]
    cls = own_callbacks().get(short)
    given = name if isinstance(name, str) else None if cls is None else cls.default_name
    return [short] if given is None else [short, given]


def _replaced(content: Any, steps: Sequence[Step], value: Any) -> Any:
    """A copy in which the value stands at the end of the way; what lies beside the way is shared."""
    nodes: list[Any] = [content]
    for depth, step in enumerate(steps):
        nodes[-1] = node = {} if nodes[-1] is None and isinstance(step, str) else nodes[-1]
        _check_step(node, step, steps[:depth])
        nodes.append(node[step] if isinstance(step, int) else node.get(step))
    for node, step in zip(reversed(nodes[:-1]), reversed(steps), strict=True):
        copy = list(node) if isinstance(step, int) else dict(node)
        copy[step] = value  # type: ignore[index]
        value = copy
    return value


def _check_step(node: Any, step: Step, way: Sequence[Step]) -> None:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in way).lstrip(".") or "the recipe"
    if isinstance(step, int):
        if not isinstance(node, list):
            raise RecipeError(f"{place} is no list, but {shown(node)}")
        if step >= len(node):
            raise RecipeError(f"{place} has {len(node)} entries, counted from 0, and so none at {step}")
    elif not isinstance(node, dict):
        raise RecipeError(f"{place} is {shown(node)}, which has no keys, and so no '{step}'")
