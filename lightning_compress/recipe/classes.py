"""The classes that a recipe names, and their arguments: found, checked without a teacher, and built."""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback
from torch import nn

import lightning_compress
from lightning_compress import _compat
from lightning_compress.callbacks.base import CompressionCallback, TrainerCallback
from lightning_compress.callbacks.teaching import TeacherCallback
from lightning_compress.mechanisms.loading import check_source, import_path
from lightning_compress.mechanisms.parsing import ours, refusal
from lightning_compress.mechanisms.selection import did_you_mean
from lightning_compress.recipe.file import RecipeError, check_keys, shown


class _StandIn(nn.Module):
    """In the place of a network that is not built where a recipe is checked."""


def own_callbacks() -> dict[str, type[CompressionCallback]]:
    """The callbacks of this package, which recipes may name without a dotted path.

    Returns:
        Classes by their names.

    Example:
        >>> own_callbacks()["DCILCallback"].default_name
        'dcil'
    """
    public = {name: getattr(lightning_compress, name) for name in lightning_compress.__all__}
    return {
        name: value
        for name, value in public.items()
        if _is_a(value, (CompressionCallback,)) and value is not CompressionCallback
    }


def callback_class(class_path: str, where: str) -> type[Callback]:
    """The class of a short name of this package, or of a dotted path.

    Args:
        class_path: As a recipe says it.
        where: The entry, for messages.

    Returns:
        The class.

    Raises:
        RecipeError: If there is no such class, or it is no callback.

    Example:
        >>> callback_class("ExportCallback", "callbacks[0]").__name__
        'ExportCallback'
    """
    if "." not in class_path:
        known = own_callbacks()
        if class_path in known:
            cls: type[Callback] = known[class_path]
            return cls
        raise RecipeError(
            f"{where}: class_path {shown(class_path)} is no callback of lightning_compress, which has "
            f"{', '.join(known)}{did_you_mean(class_path, known)}; a class of another package needs its dotted path"
        )
    try:
        found = import_path(class_path, argument="class_path")
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error
    if not _is_a(found, TrainerCallback.__bases__):
        raise RecipeError(f"{where}: class_path '{class_path}' is not a Callback class")
    return found  # type: ignore[no-any-return]


def found_class(class_path: str) -> type[Callback] | None:
    """The class that :func:`callback_class` has found; nothing is imported.

    Args:
        class_path: Of a checked recipe.

    Returns:
        None for a class of a module that is not imported, such as the script that is about to run.

    Example:
        >>> found_class("lightning_compress.ExportCallback").__name__, found_class("train.ExportCallback")
        ('ExportCallback', None)
    """
    module, _, name = class_path.rpartition(".")
    return getattr(sys.modules.get(module), name, None) if module else own_callbacks().get(name)


def check_arguments(cls: type[Callback], init_args: Mapping[str, Any], where: str) -> None:
    """Check the arguments of a callback; nothing large is built, and nothing of another package runs.

    A callback of this package is made and thrown away, with a stand-in for each network that the recipe names, so
    its constructor says what is wrong with a value.

    Args:
        cls: The callback.
        init_args: Its arguments, as YAML gave them.
        where: The entry, for messages.

    Raises:
        RecipeError: If a key, a type or a value is refused.

    Example:
        >>> check_arguments(own_callbacks()["StructuredPruningCallback"], {"ratio": 50}, "callbacks[0]")
        Traceback (most recent call last):
        lightning_compress.recipe.file.RecipeError: callbacks[0] (StructuredPruningCallback): ratio must be ...
    """
    place = f"{where} ({cls.__name__})"
    parser, parsed = _parsed(cls, init_args, place)
    if cls not in own_callbacks().values():
        return
    try:
        networks = _stand_ins(cls, init_args)
        with warnings.catch_warnings():  # they come when the callback is made for its fit
            warnings.simplefilter("ignore")
            _made(cls, {**init_args, **networks}, parser, parsed)
    except Exception as error:  # as in `built`
        raise RecipeError(f"{place}: {' '.join(str(error).split())}") from error


def built(class_path: str, init_args: Mapping[str, Any], where: str) -> Callback:
    """Make a callback.

    Args:
        class_path: As a recipe says it.
        init_args: Its arguments, as YAML gave them.
        where: The entry, for messages.

    Returns:
        The callback.

    Raises:
        RecipeError: If it cannot be built.

    Example:
        >>> built("DCILCallback", {"sparsity": 0.9}, "callbacks[0]").sparsity
        0.9
    """
    cls = callback_class(class_path, where)
    place = f"{where} ({cls.__name__})"
    parser, parsed = _parsed(cls, init_args, place)
    try:
        return _made(cls, init_args, parser, parsed)
    except Exception as error:  # a constructor may raise anything; the user needs to know which one it was
        problem, cause = _explained(error, place)
        raise RecipeError(problem) from cause


def _explained(error: Exception, place: str) -> tuple[str, BaseException | None]:
    """What is wrong, said once, and the cause if its trace says more.

    That is the reason that our own functions have told, not the calls that led to it.
    """
    if not ours(error):
        return f"{place} could not be built: {type(error).__name__}: {error}", error
    while isinstance(cause := error.__cause__, (ValueError, OSError)) and ours(cause):
        argument = re.match(r"(\w+) could not be built: ", str(error))
        place += f".{argument[1]}" if argument else ""
        error = cause
    says_no_more = cause is None or ours(cause) or isinstance(cause, ModuleNotFoundError)
    return f"{place}: {error}", None if says_no_more else cause


def _parsed(cls: type[Callback], init_args: Mapping[str, Any], where: str) -> tuple[ArgumentParser, Namespace]:
    """The arguments that have a type, checked and converted, and the parser that can build what they name."""
    parameters = inspect.signature(cls).parameters
    untyped = {name for name, entry in parameters.items() if entry.annotation in (Any, "Any", inspect.Parameter.empty)}
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    typed = parser.add_class_arguments(cls, skip=untyped)
    named = {name for name in untyped if _is_named(parameters[name])}
    if not any(entry.kind is inspect.Parameter.VAR_KEYWORD for entry in parameters.values()):
        check_keys(init_args, [name for name in parameters if name in {*typed, *named}], where)
    for name, entry in parameters.items():
        if name not in init_args and _is_named(entry) and entry.default is inspect.Parameter.empty:
            raise RecipeError(f"{where}: the required key '{name}' is missing")
    try:
        return parser, parser.parse_object({key: value for key, value in init_args.items() if key in typed})
    except Exception as error:  # ArgumentError, and whatever a class raises that a value names
        raise RecipeError(f"{where}: {refusal(error, init_args)}") from error


def _made(cls: type[Callback], arguments: Mapping[str, Any], parser: ArgumentParser, parsed: Namespace) -> Callback:
    typed = _compat.instantiated(parser, parsed)
    return cls(**{key: typed.get(key, value) for key, value in arguments.items()})


def _stand_ins(cls: type[Callback], init_args: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Something in the place of each network that the arguments describe, once the description was looked at."""
    found: dict[str, nn.Module] = {}
    if not issubclass(cls, TeacherCallback):
        return found
    for name in cls.networks_in_arguments:
        source = init_args.get(name)
        if isinstance(source, Mapping) or (isinstance(source, str) and "." in source):
            check_source(source, argument=name)
            found[name] = _StandIn()
    return found


def _is_a(value: Any, bases: tuple[type, ...]) -> bool:
    return isinstance(value, type) and issubclass(value, bases)


def _is_named(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
