"""The file of a recipe: its YAML, and its keys; classes and their arguments are looked at in ``classes``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import yaml

import lightning_compress
from lightning_compress.functional import _checks
from lightning_compress.functional._checks import did_you_mean

VERSION = 1
KEYS = ("version", "callbacks", "export", "apply_to")
ENTRY_KEYS = ("class_path", "init_args")
APPLY_TO_KEYS = ("module", "fit")
MOST_VALUES, MOST_LEVELS = 100_000, 60
"""Of what aliases unfold to, too: an alias within what it names never ends."""


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the key and the value."""


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Put a place, such as the recipe's path, before the message of a :class:`RecipeError`.

    Args:
        place: The file, or a setting.

    Raises:
        RecipeError: The same with the place.

    Example:
        >>> with naming("recipe.yaml"):
        ...     raise RecipeError("version must be 1, got 7")
        Traceback (most recent call last):
        lightning_compress.recipe.file.RecipeError: recipe.yaml: version must be 1, got 7
    """
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{place}: {error}") from error.__cause__


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: ``1e-3`` is a number, and a key that appears twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key.value, str):  # a list or a mapping as a key: the base class refuses it
                continue
            if key.value in seen:
                problem = f"the key {shown(key.value)} appears twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def checked_file(path: Any) -> str:
    """Refuse what cannot be the path of a recipe.

    Args:
        path: What was given.

    Returns:
        The path as text.

    Raises:
        RecipeError: If it is none.

    Example:
        >>> checked_file(3)
        Traceback (most recent call last):
        lightning_compress.recipe.file.RecipeError: path must be a string or a path, got 3
    """
    try:
        return _checks.check_path("path", path)
    except (TypeError, ValueError) as error:
        raise RecipeError(str(error)) from error


def read_text(file: str) -> str:
    """Read a file.

    Args:
        file: Its path.

    Returns:
        Its text.

    Raises:
        RecipeError: If it cannot be read or is no text.

    Example:
        >>> read_text("none.yaml")
        Traceback (most recent call last):
        lightning_compress.recipe.file.RecipeError: the recipe cannot be read: No such file or directory
    """
    try:
        with open(file, encoding="utf-8") as stream:
            return stream.read()
    except OSError as error:
        raise RecipeError(f"the recipe cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"not YAML: {error}") from error


def parse(text: str) -> Any:
    """Read YAML.

    Args:
        text: A document.

    Returns:
        What it holds.

    Raises:
        RecipeError: If it is not YAML, or too large.

    Example:
        >>> parse("1e-3")
        0.001
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise RecipeError(yaml_problem(error)) from error
    except (RecursionError, MemoryError) as error:
        raise RecipeError("the recipe is too large or nested too deeply to be read") from error
    except Exception as error:  # PyYAML lets through what its constructors raise for numbers, dates and tags
        raise RecipeError(f"not YAML: {' '.join(str(error).split())}") from error
    check_size(value, "the recipe")
    return value


def yaml_problem(error: yaml.MarkedYAMLError) -> str:
    """What is wrong with a text that is not YAML, and where.

    Args:
        error: What PyYAML says of it.

    Returns:
        Line and column, from 1 on, and the problem.

    Example:
        >>> try:
        ...     yaml.safe_load("a: [")
        ... except yaml.MarkedYAMLError as error:
        ...     yaml_problem(error)[:17]
        'line 1, column 5:'
    """
    mark = error.problem_mark or error.context_mark
    place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return f"{place}not YAML: {error.problem}"


def check_size(value: Any, what: str) -> None:
    """Refuse what would take too long, or too much of the stack, to look at; aliases count as what they unfold to.

    Args:
        value: What YAML gave.
        what: Where it is from, for the message.

    Raises:
        RecipeError: If it is too large or nested too deeply.

    Example:
        >>> loop = []
        >>> loop.append(loop)
        >>> check_size(loop, "the recipe")
        Traceback (most recent call last):
        lightning_compress.recipe.file.RecipeError: the recipe is too large or nested too deeply: its aliases unfold...
    """
    count, left = 0, [(value, 0)]
    while left:
        node, depth = left.pop()
        count += 1
        if count > MOST_VALUES or depth > MOST_LEVELS:
            raise RecipeError(
                f"{what} is too large or nested too deeply: its aliases unfold to too many values, or without end"
            )
        if isinstance(node, Mapping):
            left.extend((inner, depth + 1) for inner in node.values())
        elif isinstance(node, (list, tuple, set)):
            left.extend((inner, depth + 1) for inner in node)


def check_content(content: Any) -> None:
    """Check the keys of a recipe, and the kinds of their values.

    Args:
        content: What the file holds.

    Raises:
        RecipeError: If it is not a recipe.

    Example:
        >>> check_content({"version": 1, "export": {"path": "model.onnx"}})
    """
    if not isinstance(content, dict):
        raise RecipeError(f"a recipe is a mapping with the keys {', '.join(KEYS)}, got {shown(content)}")
    if "trainer" in content:
        raise RecipeError(
            "recipe: this is the config of a LightningCLI, with 'trainer'; a recipe has the entries of its "
            "trainer.callbacks under 'callbacks', and the ExportCallback's arguments under 'export'"
        )
    check_keys(content, KEYS, "recipe")
    _check_version(content.get("version"))
    callbacks, export = content.get("callbacks"), content.get("export")
    if callbacks is not None and not isinstance(callbacks, list):
        raise RecipeError(f"callbacks must be a list of class_path and init_args, got {shown(callbacks)}")
    for index, entry in enumerate(callbacks or []):
        _check_entry(entry, f"callbacks[{index}]")
    if export is not None:
        _check_mapping(export, "export")
    if not callbacks and export is None:
        raise RecipeError("the recipe asks for nothing: it needs callbacks, export, or both")
    if content.get("apply_to") is not None:
        _check_apply_to(content["apply_to"])


def _check_version(version: Any) -> None:
    if isinstance(version, int) and version > VERSION:
        raise RecipeError(
            f"version {shown(version)} is newer than {VERSION}, the newest that lightning_compress "
            f"{lightning_compress.__version__} reads; upgrade the package"
        )
    if isinstance(version, bool) or version != VERSION:
        raise RecipeError(f"version must be {VERSION}, got {shown(version)}")


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("class_path"), str):
        raise RecipeError(f"{where} must be a mapping with a class_path and init_args, got {shown(entry)}")
    check_keys(entry, ENTRY_KEYS, where)
    if entry.get("init_args") is not None:
        _check_mapping(entry["init_args"], f"{where}.init_args")


def _check_apply_to(apply_to: Any) -> None:
    _check_mapping(apply_to, "apply_to")
    check_keys(apply_to, APPLY_TO_KEYS, "apply_to")
    module, fit = apply_to.get("module"), apply_to.get("fit")
    if module is None and fit is None:
        raise RecipeError("apply_to says nothing: it needs module (a class), fit (a number from 1 on), or both")
    if module is not None and not isinstance(module, str):
        raise RecipeError(f"apply_to.module must be the path or the name of a class, got {shown(module)}")
    if fit is not None and (isinstance(fit, bool) or not isinstance(fit, int) or fit < 1):
        raise RecipeError(f"apply_to.fit must be a whole number from 1 on, got {shown(fit)}")


def _check_mapping(value: Any, where: str) -> None:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise RecipeError(f"{where} must be a mapping from names to values, got {shown(value)}")


def check_keys(mapping: Mapping[Any, Any], accepted: Collection[str], where: str) -> None:
    """Refuse keys that mean nothing.

    Args:
        mapping: What was given.
        accepted: The keys that mean something.
        where: The place, for the message.

    Raises:
        RecipeError: With the nearest key.

    Example:
        >>> check_keys({"modul": "Net"}, ["module", "fit"], "apply_to")
        Traceback (most recent call last):
        lightning_compress.recipe.file.RecipeError: apply_to: unknown key 'modul' with the value 'Net'; accepted are \
module, fit; did you mean 'module'?
    """
    for key, value in mapping.items():
        if key not in accepted:
            name = shown(key).strip("'")
            raise RecipeError(
                f"{where}: unknown key '{name}' with the value {shown(value)}; accepted are {', '.join(accepted)}"
                f"{did_you_mean(name, accepted)}"
            )


def shown(value: Any) -> str:
    """At most 80 characters of a value, which may be as large as a file can make it.

    Args:
        value: What YAML gave.

    Returns:
        One line.

    Example:
        >>> shown(None), shown([1, 2])
        ('nothing', '[1, 2]')
    """
    return "nothing" if value is None else _checks.shown(value)
