"""Recipes: a YAML file that says which callbacks to attach, what to export, and which fit is meant.

A recipe is checked without building a network: a teacher may be large, and the process that checks is not the one that
trains.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Callback

from lightning_compress.callbacks.export import ExportCallback
from lightning_compress.callbacks.report import CompressionReport
from lightning_compress.export.onnx import checked_folder, checked_path
from lightning_compress.recipe.classes import built, callback_class, check_arguments, found_class
from lightning_compress.recipe.file import RecipeError, check_content, checked_file, naming, parse, read_text
from lightning_compress.recipe.settings import changed

__all__ = ["Recipe", "RecipeError", "arguments_of", "build_callbacks", "check_outputs", "export_paths", "load_recipe"]


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


def load_recipe(
    path: str | os.PathLike[str],
    *,
    settings: Sequence[str] = (),
    unseen: Collection[str] = (),
    cwd: str | os.PathLike[str] = ".",
    text: str | None = None,
) -> Recipe:
    r"""Read a recipe and check its keys, classes and arguments; no network is built.

    Args:
        path: The YAML file.
        settings: ``KEY=VALUE`` each, which change the recipe before it is checked: ``dcil.sparsity=0.8``,
            ``callbacks[0].init_args.sparsity=0.8``, ``export.path=model.onnx``.
        unseen: Modules that must not be imported here, such as the script that is about to run; what a recipe names
            of them is left for the process that builds.
        cwd: Where relative paths in the recipe start.
        text: What the file held when it was read; None: it is read now.

    Returns:
        The recipe.

    Raises:
        RecipeError: If the file cannot be read or says something that cannot work.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        ...     _ = file.write("version: 1\nexport: {path: model.onnx}\n")
        ...     file.flush()
        ...     load_recipe(file.name, settings=["export.path=small.onnx"]).export
        {'path': 'small.onnx'}
    """
    file = checked_file(path)
    with naming(file):
        content = parse(read_text(file) if text is None else text)
        check_content(content)
        if settings:
            content = changed(content, settings)
            check_content(content)
        recipe = Recipe(
            version=content["version"],
            callbacks=tuple(content.get("callbacks") or ()),
            export=content.get("export"),
            apply_to=content.get("apply_to"),
            path=file,
        )
        with _working_directory(cwd):
            for where, class_path, init_args in recipe.entries:
                if class_path.rpartition(".")[0] not in unseen:
                    check_arguments(callback_class(class_path, where), init_args, where)
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
    with _working_directory(cwd), naming(recipe.path):
        callbacks = [built(class_path, init_args, where) for where, class_path, init_args in recipe.entries]
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
    return [init_args["path"] for init_args in arguments_of(recipe, ExportCallback)]


def check_outputs(recipe: Recipe) -> None:
    """Check that what a recipe writes can be written where it says so; nothing is created.

    Args:
        recipe: A checked recipe.

    Raises:
        ValueError: If a file or a folder cannot be written, or a file would be written twice.

    Example:
        >>> check_outputs(Recipe(1, export={"path": "model.onnx"}))
    """
    seen: set[str] = set()
    try:
        for path in export_paths(recipe):
            checked_path(path)
            if os.path.realpath(path) in seen:
                raise ValueError(f"two exports of the recipe write '{path}'; give each a path of its own")
            seen.add(os.path.realpath(path))
        for init_args in arguments_of(recipe, CompressionReport):
            if init_args.get("path") is not None:
                checked_folder(init_args["path"])
    except TypeError as error:  # a number or a date: jsonargparse takes it for text
        raise RecipeError(f"{recipe.path}: {error}") from error


def arguments_of(recipe: Recipe, cls: type[Callback]) -> list[Mapping[str, Any]]:
    """The arguments of each callback of a class.

    Args:
        recipe: A checked recipe.
        cls: A class of this package; another one of the same name is not meant.

    Returns:
        Arguments, in the recipe's order.

    Example:
        >>> arguments_of(Recipe(1, export={"path": "model.onnx"}), ExportCallback)
        [{'path': 'model.onnx'}]
    """
    return [init_args for _, path, init_args in recipe.entries if found_class(path) is cls]


@contextmanager
def _working_directory(path: str | os.PathLike[str]) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)
