"""The recipes that come with the package: commented YAML, to be printed into a file and changed there."""

from __future__ import annotations

import sys
from importlib.resources import files

from lightning_compress.commands.exits import DONE, USAGE, ended

SUFFIX = ".yaml"


def shipped() -> dict[str, str]:
    """The recipes of the package.

    Returns:
        The text of each by its name, in alphabetical order.

    Example:
        >>> sorted(shipped())
        ['dcil', 'distil', 'distil-prune-int8', 'int8', 'prune', 'psgd-4bit', 'structured-distil-int8']
    """
    found = [file for file in files(__name__).iterdir() if file.name.endswith(SUFFIX)]
    texts = {file.name.removesuffix(SUFFIX): file.read_text(encoding="utf-8") for file in found}
    return dict(sorted(texts.items()))


def show(name: str | None = None) -> int:
    """Print a recipe, or the list of them.

    Args:
        name: Of a recipe; None: the list, with what each is for.

    Returns:
        0; 2 if there is no such recipe.

    Example:
        >>> show("distill")
        2
    """
    texts = shipped()
    if name is None:
        width = max(map(len, texts)) + 2
        lines = [f"{key:{width}}{text.splitlines()[0].lstrip('# ')}" for key, text in texts.items()]
        sys.stdout.write("\n".join([*lines, "", "lightning-compress recipes NAME > recipe.yaml", ""]))
        return DONE
    if name not in texts:
        from lightning_compress.mechanisms.selection import did_you_mean  # with torch, which takes seconds

        there = f"there is no recipe '{name}'; there are {', '.join(texts)}{did_you_mean(name, texts)}"
        return ended("recipes", USAGE, there)
    sys.stdout.write(texts[name])
    return DONE
