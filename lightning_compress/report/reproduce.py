"""What a reader of a report needs to do the same again: the recipe as a file, the packages, the command."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from lightning_compress.mechanisms.extras import PACKAGE
from lightning_compress.report.table import Report

_PACKAGE, _VERSION = re.compile(r"[A-Za-z0-9._-]+"), re.compile(r"[0-9][A-Za-z0-9.]*")


class _Dumper(yaml.SafeDumper):
    """YAML that the loader of recipes reads as it was meant, where ``1e3`` is a number."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = "'" if _is_number(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def recipe_yaml(report: Report) -> str | None:
    """The recipe as the text of a file that ``lightning-compress run`` takes.

    Args:
        report: Any.

    Returns:
        YAML; ``None`` for a report without a recipe.

    Example:
        >>> print(recipe_yaml(Report((), recipe={"version": 1, "export": {"path": "m.onnx"}, "path": "recipe.yaml"})))
        version: 1
        export:
          path: m.onnx
        <BLANKLINE>
    """
    if report.recipe is None:
        return None
    plain: dict[str, Any] = json.loads(json.dumps(report.recipe, default=str))
    plain.pop("path", None)  # where the file was; no part of it
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def install_line(report: Report) -> str | None:
    """The command that installs the versions that the report was made with.

    This package has no release yet, so the line is for its checkout.

    Args:
        report: Any.

    Returns:
        One line, with the versions of this package and of Python as a comment; ``None`` where no version is known.

    Example:
        >>> versions = {"lightning_compress": "0.1.0", "torch": "2.14.1+cpu", "python": "3.11.4"}
        >>> install_line(Report((), versions=versions))
        'pip install . torch==2.14.1  # in a checkout of lightning-compress 0.1.0, Python 3.11.4'
    """
    found = {
        name: public[0]  # an index has no "+cpu"
        for name, version in report.versions.items()
        if _PACKAGE.fullmatch(name) and (public := _VERSION.match(version))  # it is a line to be copied into a shell
    }
    python, own = found.pop("python", None), found.pop(PACKAGE.replace("-", "_"), None)
    packages = [*(["."] if own else []), *(f"{name}=={version}" for name, version in found.items())]
    if not packages:
        return None
    remarks = [f"in a checkout of {PACKAGE} {own}"] if own else []
    remarks += [f"Python {python}"] if python else []
    return f"pip install {' '.join(packages)}{'  # ' if remarks else ''}{', '.join(remarks)}"


def reproduction(report: Report) -> list[tuple[str, str]]:
    """All of it.

    Args:
        report: Any.

    Returns:
        Title and text of each part that is known.

    Example:
        >>> reproduction(Report((), versions={"torch": "2.14.1"}, command="lightning-compress run a.yaml -- make"))
        [('Install', 'pip install torch==2.14.1'), ('Command', 'lightning-compress run a.yaml -- make')]
    """
    path = (report.recipe or {}).get("path")
    recipe = f"Recipe, {path}" if path else "Recipe"
    parts = {"Install": install_line(report), recipe: recipe_yaml(report), "Command": report.command}
    return [(title, text) for title, text in parts.items() if text]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
