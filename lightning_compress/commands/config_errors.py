"""What is wrong with the configuration of a LightningCLI project, in a few lines: key, value, what is accepted.

The chain of exceptions that jsonargparse raises says where, its end says what; the nearest name and the value in the
file are added here.
"""

from __future__ import annotations

import inspect
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import lightning_compress
from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.commands.exits import UsageError
from lightning_compress.mechanisms.loading import import_path
from lightning_compress.mechanisms.parsing import (
    EXPECTED,
    KEY,
    UNKNOWN,
    chain,
    frames,
    missing,
    raised_in,
    told,
    wrong_value,
)
from lightning_compress.mechanisms.selection import did_you_mean

CLASS = re.compile(r"Problem with given class_path '([^']+)':\s*(.*)")
UNKNOWN_KEY = re.compile(r"Option '([^']+)' is not accepted|Subcommand '\w+' does not accept option '([^']+)'")
NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
ENTRY_KEYS = ("class_path", "init_args", "dict_kwargs")
PACKAGES = ("jsonargparse", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_compress")
"""Those that build a project."""
MOST_LISTED = 25  # names that a message writes out


class ConfigError(UsageError):
    """A configuration that cannot be used; the message names the key, the value, and the nearest key."""


@dataclass(frozen=True)
class Place:
    """Where in a configuration something is wrong.

    Attributes:
        key: Dotted key in the file.
        class_path: The class whose arguments are meant; "" where there is none.
        argument: Its argument; "" where that is open.
        within: The argument of another class that the class is for; "" where the key is all.
    """

    key: str = ""
    class_path: str = ""
    argument: str = ""
    within: str = ""

    def __str__(self) -> str:
        name = self.class_path.rpartition(".")[2]
        return f"{self.key} ({name})" if self.key and name else self.key or name


def explanation(error: BaseException, configs: dict[str, Any], keys: Collection[str]) -> str:
    """Say what is wrong with a configuration.

    Args:
        error: What jsonargparse, or a constructor that it called, has raised.
        configs: Name of each file to its contents.
        keys: Dotted keys that are accepted.

    Returns:
        One line, or a few.

    Example:
        >>> explanation(ValueError("Option 'trainer.max_epoch' is not accepted"), {}, ["trainer.max_epochs"])
        "unknown key 'trainer.max_epoch'; accepted are trainer.max_epochs; did you mean 'trainer.max_epochs'?"
    """
    links = list(chain(error))
    place, said = _place(links), told(links[-1])
    if match := UNKNOWN_KEY.match(said):
        return _unknown_key(place, match[1] or match[2], configs, keys)
    if left_out := missing(said):
        return _missing(place, left_out)
    missed = place.class_path and not place.argument and isinstance(links[-1], (ImportError, AttributeError))
    if missed and (problem := _unknown_class(place.class_path, place.within or place.key)):
        return problem
    if (match := NO_CLASS.match(said)) and not place.argument:
        return _unknown_class(match[1], place.key)
    if EXPECTED.match(said):
        return _wrong_value(place, links, configs)
    where = str(place) or _callback_in(links[-1], "__init__")
    return ": ".join(part for part in (where, place.argument, said) if part)


def of_configuration(error: BaseException) -> bool:
    """Whether an exception is about the configuration, rather than raised by code of the user's.

    Args:
        error: Raised while the project was built.

    Returns:
        True for what a parser says, this package, or Lightning itself.

    Example:
        >>> of_configuration(ZeroDivisionError())
        False
    """
    *earlier, last = chain(error)
    if any(type(link).__name__ == "ArgumentError" for link in (*earlier, last)):
        return True
    return raised_in(last).partition(".")[0] in PACKAGES


def refused(error: BaseException) -> str:
    """What a callback of this package has refused before anything was trained.

    Args:
        error: Raised while LightningCLI ran.

    Returns:
        One line; empty for all else.

    Example:
        >>> refused(ValueError("of the training"))
        ''
    """
    where = _callback_in(error, "setup", "on_fit_start") if of_configuration(error) else ""
    return f"{where}: {error}" if where else ""


def users_own(error: BaseException) -> BaseException:
    """The first exception of a chain that code of the user's has raised, without what a parser was at meanwhile.

    Example:
        >>> users_own(ValueError("a"))
        ValueError('a')
    """
    found = next(link for link in chain(error) if raised_in(link).partition(".")[0] not in PACKAGES)
    if found.__context__ is not None and raised_in(found.__context__).partition(".")[0] in PACKAGES:
        found.__suppress_context__ = True
    return found


def mappings(content: Any) -> Iterator[Mapping[str, Any]]:
    """All mappings in a document.

    Args:
        content: What a file holds.

    Yields:
        The mappings, the outermost first.

    Example:
        >>> list(mappings([{"a": {"b": 1}}]))
        [{'a': {'b': 1}}, {'b': 1}]
    """
    if isinstance(content, Mapping):
        yield content
    for value in content.values() if isinstance(content, Mapping) else content if isinstance(content, list) else ():
        yield from mappings(value)


def _place(links: Sequence[BaseException]) -> Place:
    """The first key, and then, level by level, the class and the argument that are meant."""
    place = Place()
    for text in map(str, links):
        if match := CLASS.match(text):
            place = Place(place.key, match[1], within=place.argument or place.within)
        elif (match := KEY.match(text)) and not place.class_path:
            place = Place(match[1])
        elif match:
            place = Place(place.key, place.class_path, match[1], place.within)
    return place


def _callback_in(error: BaseException, *methods: str) -> str:
    """The callback of this package in one of whose methods an error was raised."""
    for frame in frames(error):
        owner = frame.f_locals.get("self")
        if frame.f_code.co_name in methods and isinstance(owner, CompressionCallback):
            return f"trainer.callbacks ({type(owner).__name__})"
    return ""


def _unknown_key(place: Place, key: str, configs: dict[str, Any], keys: Collection[str]) -> str:
    if key in ENTRY_KEYS and (beside := _beside_a_class(configs)):
        return f"{place.key}: unknown key '{beside}' beside class_path; arguments of a class stand under init_args"
    if place.class_path:
        key, dot, _ = key.partition(".")
        candidates: Collection[str] = list(inspect.signature(import_path(place.class_path, argument="")).parameters)
        candidates = [*candidates, *(ENTRY_KEYS if dot else ())]
    else:
        tops = {known.partition(".")[0] for known in keys}
        key = key if key.partition(".")[0] in tops else key.partition(".")[0]
        candidates = sorted(keys if "." in key else tops)
    file, given = _given(configs, place.class_path, key)
    value = "" if given is UNKNOWN else f" with the value {reprlib.repr(given)}"
    accepted = f"; accepted are {', '.join(candidates)}" if 0 < len(candidates) <= MOST_LISTED else ""
    where = ": ".join(part for part in (file, str(place)) if part)
    nearest = did_you_mean(key, candidates)
    return f"{where}: unknown key '{key}'{value}{accepted}{nearest}".removeprefix(": ")


def _missing(place: Place, names: str) -> str:
    if not place.class_path and names.endswith("model"):
        return "no model is named: give it in the config, as model: {class_path: pkg.Net}, or as --model pkg.Net"
    return f"{place}: the required key '{names}' is missing".removeprefix(": ")


def _unknown_class(class_path: str, key: str) -> str:
    """Why there is no such class; empty if there is."""
    if "." in class_path:
        try:
            import_path(class_path, argument=key)
        except ValueError as error:
            return str(error)
        return ""
    callbacks = {name for name in lightning_compress.__all__ if name.endswith(("Callback", "Report"))}
    known = callbacks | set(import_module("lightning.pytorch.callbacks").__all__) if "callbacks" in key else ()
    return (
        f"{key} names '{class_path}', which is not known; a class of your own needs its dotted path, such as "
        f"pkg.{class_path}{did_you_mean(class_path, known)}"
    )


def _wrong_value(place: Place, links: Sequence[BaseException], configs: dict[str, Any]) -> str:
    name = place.argument or place.key
    file, value = _given(configs, place.class_path, name)
    where = "".join(f"{part}: " for part in (file, "" if name == place.key else str(place)) if part)
    return f"{where}{name} {wrong_value(links, value)}"


def _given(configs: dict[str, Any], class_path: str, key: str) -> tuple[str, Any]:
    """The file that gives a key, and the value; empty and UNKNOWN for what came another way."""
    for file, content in reversed(configs.items()):  # a later one wins
        for mapping in mappings(content):
            named = mapping.get("class_path") in _names(class_path)
            own = mapping if not class_path else mapping.get("init_args") if named else None
            found = _below(own, key)
            if found is not None:
                return file, found
    return "", UNKNOWN


def _beside_a_class(configs: dict[str, Any]) -> str:
    """A key that stands beside a class, where only its arguments may."""
    entries = (own for content in configs.values() for own in mappings(content) if "class_path" in own)
    return next((str(key) for entry in entries for key in entry if key not in ENTRY_KEYS), "")


def _names(class_path: str) -> tuple[str, str, None]:
    return class_path, class_path.rpartition(".")[2], None  # a later file may leave the class out


def _below(mapping: Any, key: str) -> Any:
    for part in key.split("."):
        mapping = mapping.get(part) if isinstance(mapping, Mapping) else None
    return mapping
