"""Recipes: a YAML file that says which callbacks to attach, what to export, and which fit is meant.

A recipe is checked without building anything: a teacher may be large, and the process that checks is not the one that
trains.
"""

from __future__ import annotations

import inspect
import os
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch import Callback

import lightning_compress
from lightning_compress.callbacks.base import CompressionCallback, TrainerCallback
from lightning_compress.callbacks.export import ExportCallback
from lightning_compress.callbacks.report import CompressionReport
from lightning_compress.mechanisms.loading import import_path
from lightning_compress.mechanisms.selection import did_you_mean

VERSION = 1
KEYS = ("version", "callbacks", "export", "apply_to")
ENTRY_KEYS = ("class_path", "init_args")
APPLY_TO_KEYS = ("module", "fit")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the key and the value."""


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says.

    Attributes:
        version: Version of the format.
        callbacks: One ``{"class_path": ..., "init_args": {...}}`` a callback.
        export: Arguments of an :class:`ExportCallback`; None: nothing is exported beyond what ``callbacks`` says.
        apply_to: ``{"module": class path or name, "fit": number}``, each optional; None: the only fit.
        path: The file.
    """

    version: int
    callbacks: Sequence[Mapping[str, Any]] = ()
    export: Mapping[str, Any] | None = None
    apply_to: Mapping[str, Any] | None = None
    path: str = ""

    @property
    def entries(self) -> list[tuple[str, str, Mapping[str, Any]]]:
        """Where in the file, class path and arguments of each callback, ``export`` included."""
        found: list[tuple[str, str, Mapping[str, Any]]] = [
            (f"callbacks[{index}]", entry["class_path"], entry.get("init_args") or {})
            for index, entry in enumerate(self.callbacks)
        ]
        return found if self.export is None else [*found, ("export", ExportCallback.__name__, self.export)]


def load_recipe(path: str | os.PathLike[str], *, unseen: Collection[str] = ()) -> Recipe:
    r"""Read a recipe and check its keys, classes and arguments; nothing is built.

    Args:
        path: The YAML file.
        unseen: Modules that must not be imported here, such as the script that is about to run; what a recipe names
            of them is left for the process that builds.

    Returns:
        The recipe.

    Raises:
        RecipeError: If the file cannot be read or says something that cannot work.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        ...     _ = file.write("version: 1\nexport: {path: model.onnx}\n")
        ...     file.flush()
        ...     load_recipe(file.name).export
        {'path': 'model.onnx'}
    """
    file = os.fspath(path)
    with naming_file(file):
        content = _read(file)
        _check_content(content)
        recipe = Recipe(
            version=content["version"],
            callbacks=tuple(content.get("callbacks") or ()),
            export=content.get("export"),
            apply_to=content.get("apply_to"),
            path=file,
        )
        for where, class_path, init_args in recipe.entries:
            if class_path.rpartition(".")[0] not in unseen:
                _parsed(_callback_class(class_path, where), init_args, where)
    return recipe


def build_callbacks(recipe: Recipe, cwd: str | os.PathLike[str], *, add_report: bool = True) -> list[Callback]:
    """Make the callbacks of a recipe.

    Args:
        recipe: As :func:`load_recipe` gave it.
        cwd: Where relative paths start, whatever the working directory is now.
        add_report: Add a :class:`CompressionReport` if the recipe has none.

    Returns:
        The callbacks in the recipe's order, then the export, then the report.

    Raises:
        RecipeError: If a callback cannot be built.

    Example:
        >>> [type(callback).__name__ for callback in build_callbacks(Recipe(1, export={"path": "net.onnx"}), ".")]
        ['ExportCallback', 'CompressionReport']
    """
    with _working_directory(cwd), naming_file(recipe.path):
        callbacks = [_built(class_path, init_args, where) for where, class_path, init_args in recipe.entries]
        if add_report and not any(isinstance(callback, CompressionReport) for callback in callbacks):
            callbacks.append(CompressionReport())
    for callback in callbacks:
        if isinstance(callback, CompressionReport):
            callback.recipe = {key: value for key, value in asdict(recipe).items() if value}
    return callbacks


def export_paths(recipe: Recipe) -> list[str]:
    """The files that a recipe will write, as they are written in it.

    Args:
        recipe: A checked recipe.

    Returns:
        Paths, in the recipe's order.

    Example:
        >>> export_paths(Recipe(1, export={"path": "model.onnx"}))
        ['model.onnx']
    """
    exports = [entry for entry in recipe.entries if entry[1].rpartition(".")[2] == ExportCallback.__name__]
    return [init_args["path"] for _, _, init_args in exports]


@contextmanager
def naming_file(path: str) -> Iterator[None]:
    """Put the recipe's path before the message of a :class:`RecipeError`.

    Args:
        path: The file.

    Raises:
        RecipeError: The same with the path.

    Example:
        >>> with naming_file("recipe.yaml"):
        ...     raise RecipeError("version must be 1, got 7")
        Traceback (most recent call last):
        lightning_compress.recipe.RecipeError: recipe.yaml: version must be 1, got 7
    """
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error.__cause__


# The file


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: ``1e-3`` is a number, and a key that appears twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key.value, str):  # a list or a mapping as a key: the base class refuses it
                continue
            if key.value in seen:
                problem = f"the key {_shown(key.value)} appears twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read(file: str) -> Any:
    try:
        with open(file, encoding="utf-8") as stream:
            return yaml.load(stream, Loader=_Loader)
    except OSError as error:
        raise RecipeError(f"the recipe cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise RecipeError(f"{place}not YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no text, a number that is none
        raise RecipeError(f"not YAML: {' '.join(str(error).split())}") from error
    except (RecursionError, MemoryError) as error:
        raise RecipeError("the recipe is too large or nested too deeply to be read") from error


def _check_content(content: Any) -> None:
    if not isinstance(content, dict):
        raise RecipeError(f"a recipe is a mapping with the keys {', '.join(KEYS)}, got {_shown(content)}")
    _check_keys(content, KEYS, "recipe")
    _check_version(content.get("version"))
    callbacks, export = content.get("callbacks"), content.get("export")
    if callbacks is not None and not isinstance(callbacks, list):
        raise RecipeError(f"callbacks must be a list of class_path and init_args, got {_shown(callbacks)}")
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
            f"version {version} is newer than {VERSION}, the newest that lightning_compress "
            f"{lightning_compress.__version__} reads; upgrade the package"
        )
    if isinstance(version, bool) or version != VERSION:
        raise RecipeError(f"version must be {VERSION}, got {_shown(version)}")


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("class_path"), str):
        raise RecipeError(f"{where} must be a mapping with a class_path and init_args, got {_shown(entry)}")
    _check_keys(entry, ENTRY_KEYS, where)
    if entry.get("init_args") is not None:
        _check_mapping(entry["init_args"], f"{where}.init_args")


def _check_apply_to(apply_to: Any) -> None:
    _check_mapping(apply_to, "apply_to")
    _check_keys(apply_to, APPLY_TO_KEYS, "apply_to")
    module, fit = apply_to.get("module"), apply_to.get("fit")
    if module is None and fit is None:
        raise RecipeError("apply_to says nothing: it needs module (a class), fit (a number from 1 on), or both")
    if module is not None and not isinstance(module, str):
        raise RecipeError(f"apply_to.module must be the path or the name of a class, got {_shown(module)}")
    if fit is not None and (isinstance(fit, bool) or not isinstance(fit, int) or fit < 1):
        raise RecipeError(f"apply_to.fit must be a whole number from 1 on, got {_shown(fit)}")


def _check_mapping(value: Any, where: str) -> None:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise RecipeError(f"{where} must be a mapping from names to values, got {_shown(value)}")


def _check_keys(mapping: Mapping[Any, Any], accepted: Collection[str], where: str) -> None:
    for key, value in mapping.items():
        if key not in accepted:
            name = _shown(key).strip("'")
            raise RecipeError(
                f"{where}: unknown key '{name}' with the value {_shown(value)}; accepted are {', '.join(accepted)}"
                f"{did_you_mean(name, accepted)}"
            )


def _shown(value: Any) -> str:
    """At most 80 characters of a value, which may be as large as a file can make it."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 3, 80, 80, 80
    try:
        text = "nothing" if value is None else short.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


# The classes


def _callback_class(class_path: str, where: str) -> type[Callback]:
    """The class of a short name of this package, or of a dotted path."""
    if "." not in class_path:
        public = {name: getattr(lightning_compress, name) for name in lightning_compress.__all__}
        known = {name: value for name, value in public.items() if _is_a(value, (CompressionCallback,))}
        known.pop(CompressionCallback.__name__)
        if class_path in known:
            cls: type[Callback] = known[class_path]
            return cls
        raise RecipeError(
            f"{where}: class_path '{class_path}' is no callback of lightning_compress, which has {', '.join(known)}"
            f"{did_you_mean(class_path, known)}; a class of another package needs its dotted path"
        )
    try:
        found = import_path(class_path, argument="class_path")
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error
    if not _is_a(found, TrainerCallback.__bases__):
        raise RecipeError(f"{where}: class_path '{class_path}' is not a Callback class")
    return found  # type: ignore[no-any-return]


def _is_a(value: Any, bases: tuple[type, ...]) -> bool:
    return isinstance(value, type) and issubclass(value, bases)


def _parsed(cls: type[Callback], init_args: Mapping[str, Any], where: str) -> tuple[ArgumentParser, Namespace]:
    """The arguments that have a type, checked and converted, and the parser that can build what they name."""
    where = f"{where} ({cls.__name__})"
    parameters = inspect.signature(cls).parameters
    untyped = {name for name, entry in parameters.items() if entry.annotation in (Any, "Any", inspect.Parameter.empty)}
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    typed = parser.add_class_arguments(cls, skip=untyped)
    named = {name for name in untyped if _is_named(parameters[name])}
    if not any(entry.kind is inspect.Parameter.VAR_KEYWORD for entry in parameters.values()):
        _check_keys(init_args, [name for name in parameters if name in {*typed, *named}], where)
    for name, entry in parameters.items():
        if name not in init_args and _is_named(entry) and entry.default is inspect.Parameter.empty:
            raise RecipeError(f"{where}: the required key '{name}' is missing")
    try:
        return parser, parser.parse_object({key: value for key, value in init_args.items() if key in typed})
    except ArgumentError as error:
        raise RecipeError(f"{where}: {' '.join(str(error).split())}") from error


def _is_named(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _built(class_path: str, init_args: Mapping[str, Any], where: str) -> Callback:
    cls = _callback_class(class_path, where)
    parser, parsed = _parsed(cls, init_args, where)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
    try:
        typed = instantiate(parsed)
        return cls(**{key: typed.get(key, value) for key, value in init_args.items()})
    except Exception as error:  # a constructor may raise anything; the user needs to know which one it was
        raise RecipeError(f"{where} ({cls.__name__}) could not be built: {type(error).__name__}: {error}") from error


@contextmanager
def _working_directory(path: str | os.PathLike[str]) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)
