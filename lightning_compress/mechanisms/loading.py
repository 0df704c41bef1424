"""A network by its path, as YAML names it, and from the checkpoint it was saved in."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import NoneType
from typing import Any, cast

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch import nn

from lightning_compress import _compat
from lightning_compress.functional._checks import check_flag, check_path, shown
from lightning_compress.mechanisms.checkpoints import resize_, structures_in
from lightning_compress.mechanisms.parsing import ours
from lightning_compress.mechanisms.reading import read_saved
from lightning_compress.mechanisms.selection import did_you_mean, find_module, plain_name
from lightning_compress.mechanisms.shrinking import restructure_, structure_told_by

MOST_LINES, LONGEST = 4, 150  # of what a class raises, and characters of such a line, in our own messages


def build_module(source: Any, *, argument: str) -> nn.Module:
    """Make a module of what Python or YAML gave: a module, or a class or function by its path.

    Args:
        source: An ``nn.Module``; or ``{"class_path": "package.Name", "init_args": {...}, "dict_kwargs": {...}}``,
            where the path names a class or a function that returns a module; or the path alone. What LightningCLI has
            read but could not build comes as a ``Namespace`` of the same, and is built here to learn why.
        argument: The user's argument, for error messages.

    Returns:
        The module.

    Raises:
        TypeError: If ``source`` is none of these, or does not make a module.
        ValueError: If the path does not exist or the call fails; the message says what failed and the nearest name.

    Example:
        >>> build_module({"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 1}},
        ...              argument="teacher")
        Linear(in_features=2, out_features=1, bias=True)
    """
    if isinstance(source, nn.Module):
        return source
    spec = _checked_spec(source, argument=argument)
    make = import_path(spec["class_path"], argument=argument)
    _refuse_unknown(make, _arguments(spec), spec["class_path"], where=f"{argument}.init_args")
    return _built(make, _arguments(spec), path=spec["class_path"], argument=argument)


def check_source(source: Any, *, argument: str) -> None:
    """Check what YAML gave for a module without building it, and without importing another package.

    Args:
        source: As :func:`build_module` takes it.
        argument: The user's argument, for error messages.

    Raises:
        TypeError: If ``source`` is none of these.
        ValueError: If it has unknown keys, or a function of this package does not take its arguments.

    Example:
        >>> check_source({"class_path": "my_project.Net", "init_arg": {}}, argument="teacher")
        Traceback (most recent call last):
        ValueError: teacher has the key 'init_arg'; accepted are ...; did you mean 'init_args'?
    """
    spec = _checked_spec(source, argument=argument)
    path = spec["class_path"]
    if not path.startswith(f"{__package__.partition('.')[0]}."):
        return
    make = import_path(path, argument=argument)
    _refuse_unknown(make, _arguments(spec), path)
    try:
        inspect.signature(make).bind(**_arguments(spec))
    except TypeError as error:
        raise ValueError(f"{argument}: {path} is {error}") from error


def _checked_spec(source: Any, *, argument: str) -> Mapping[str, Any]:
    """The class path and the arguments that YAML gave."""
    if isinstance(source, type) and issubclass(source, nn.Module):
        raise TypeError(
            f"{argument} must be a module, got the class {source.__name__}; call it: {source.__name__}(...)"
        )
    given = source.as_dict() if isinstance(source, Namespace) else source
    spec: Any = {"class_path": given} if isinstance(given, str) else given
    if not isinstance(spec, Mapping) or not isinstance(spec.get("class_path"), str):
        raise TypeError(
            f"{argument} must be a torch.nn.Module, or a class_path with init_args, got {type(given).__name__}: "
            f"{given!r}"
        )
    for key in spec:
        if key not in ("class_path", "init_args", "dict_kwargs"):
            raise ValueError(
                f"{argument} has the key '{key}'; accepted are class_path, init_args and dict_kwargs"
                f"{did_you_mean(str(key), ['class_path', 'init_args', 'dict_kwargs'])}"
            )
    for key in ("init_args", "dict_kwargs"):
        if not isinstance(spec.get(key) or {}, Mapping):
            raise TypeError(f"{argument}: {key} must be a mapping from names to values, got {spec[key]!r}")
    return cast("Mapping[str, Any]", spec)


def _arguments(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {**(spec.get("init_args") or {}), **(spec.get("dict_kwargs") or {})}


def import_path(path: str, *, argument: str) -> Any:
    """Import a class or function by its dotted path.

    Args:
        path: ``package.module.Name``.
        argument: The user's argument, for error messages.

    Returns:
        The object.

    Raises:
        ValueError: If the path does not lead to anything callable.

    Example:
        >>> import_path("torch.nn.ReLU", argument="teacher")
        <class 'torch.nn.modules.activation.ReLU'>
    """
    home, _, name = path.rpartition(".")
    if not home:
        raise ValueError(f"{argument} names '{path}', which is not a dotted path such as 'package.module.{path}'")
    try:
        owner = import_module(home)
    except Exception as error:  # the module's own code runs, and may raise anything
        raise ValueError(
            f"{argument} names '{path}', but '{home}' cannot be imported: {type(error).__name__}: {error}"
            f"{_nearest_module(home)}"
        ) from error
    if not callable(getattr(owner, name, None)):
        raise ValueError(
            f"{argument} names '{path}', but '{home}' has no class or function '{name}'{did_you_mean(name, dir(owner))}"
        )
    return getattr(owner, name)


def teacher_from_checkpoint(
    class_path: str | type[nn.Module],
    ckpt_path: str | os.PathLike[str],
    *,
    init_args: dict[str, Any] | None = None,
    submodule: str = "",
    weights_only: bool = True,
) -> nn.Module:
    """Build a teacher from a Lightning checkpoint, or from a file of plain weights.

    Args:
        class_path: The class, or its dotted path. For a LightningModule the hyperparameters saved in the checkpoint
            are its arguments.
        ckpt_path: A checkpoint that Lightning wrote, or a saved ``state_dict``.
        init_args: Arguments of the class; they win over those in the checkpoint.
        submodule: Dotted name of the network inside the class that shall teach; "" is all of it. A plain network
            class can be loaded from the checkpoint of the LightningModule around it in this way too: its weights are
            then those below this name.
        weights_only: Refuse files that need unpickling, which can run any code. Turn off only for files you trust.

    Returns:
        The module, in evaluation mode, on the CPU, with all weights loaded strictly; those of a LightningModule's
        checkpoint as its ``strict_loading`` says.

    Raises:
        ValueError: If the file cannot be read without unpickling, or class, arguments and weights do not fit.
        TypeError: If an argument is of another type than it should be.
        FileNotFoundError: If there is no such file.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(nn.Linear(2, 1).state_dict(), f"{folder}/weights.pt")
        ...     teacher_from_checkpoint(
        ...         "torch.nn.Linear", f"{folder}/weights.pt", init_args={"in_features": 2, "out_features": 1}
        ...     )
        Linear(in_features=2, out_features=1, bias=True)
    """
    _check_source(class_path, init_args)
    if not isinstance(submodule, str):
        raise TypeError(f"submodule must be the dotted name of a module, or '', got {shown(submodule)}")
    check_path("ckpt_path", ckpt_path)
    check_flag("weights_only", weights_only)
    make: Any = import_path(class_path, argument="class_path") if isinstance(class_path, str) else class_path
    path = class_path if isinstance(class_path, str) else f"{make.__module__}.{make.__qualname__}"
    checkpoint = _read_checkpoint(ckpt_path, weights_only)
    arguments = init_args or {}
    _refuse_unknown(make, arguments, path)
    smaller = structures_in(checkpoint) is not None  # than what its class makes
    if _is_lightning_module(make) and "pytorch-lightning_version" in checkpoint:
        compiled = any(plain_name(name) != name for name in checkpoint.get("state_dict", ()))
        kind = _adapting(make) if smaller or compiled else make
        module = _built(
            lambda **given: kind.load_from_checkpoint(
                ckpt_path, map_location="cpu", weights_only=weights_only, **given
            ),
            arguments,
            path=path,
            argument="class_path",
            hint=_hint(ckpt_path, arguments, checkpoint),
        )
        module.__class__ = make
        _refuse_others(module, checkpoint["state_dict"], ckpt_path)
        return find_module(module, submodule, argument="submodule").eval()
    module = _built(make, arguments, path=path, argument="class_path")
    weights = {plain_name(name): value for name, value in checkpoint.get("state_dict", checkpoint).items()}
    if submodule and all(name != submodule for name, _ in module.named_modules()):
        weights, submodule = _below(weights, submodule, ckpt_path), ""  # of the LightningModule around the network
    if smaller:
        restructure_(module, structure_told_by(module, weights), weights)
    try:
        module.load_state_dict(_as_named_in(module, weights), strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {os.fspath(ckpt_path)} do not fit {type(module).__name__}: {_beginning(error)}"
        ) from error
    return find_module(module, submodule, argument="submodule").eval()


def _refuse_others(module: nn.Module, weights: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Refuse weights of which a module has none, where it loads what there is (``strict_loading = False``)."""
    if weights and {plain_name(name) for name in weights}.isdisjoint(map(plain_name, module.state_dict())):
        raise ValueError(
            f"the weights in {os.fspath(path)} do not fit {type(module).__name__}: it has none of their names"
        )


def _check_source(class_path: Any, init_args: Any) -> None:
    if not isinstance(class_path, (str, type)) and not inspect.isroutine(class_path):
        raise TypeError(f"class_path must be a class, or the dotted path of one, got {shown(class_path)}")
    if isinstance(init_args, Mapping) and all(isinstance(name, str) for name in init_args):
        return
    if init_args is not None:
        raise TypeError(f"init_args must be a dict from names of arguments to values, or None, got {shown(init_args)}")


def _adapting(make: Any) -> Any:
    """The same class, but that an instance takes sizes and names of a checkpoint that is loaded into it."""

    def on_load_checkpoint(self: nn.Module, checkpoint: dict[str, Any]) -> None:
        if structures_in(checkpoint) is not None:
            resize_(self, checkpoint)
        make.on_load_checkpoint(self, checkpoint)
        checkpoint["state_dict"] = _as_named_in(self, checkpoint["state_dict"])

    return type(make.__name__, (make,), {"on_load_checkpoint": on_load_checkpoint, "__module__": make.__module__})


def _as_named_in(module: nn.Module, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights under the names of a module, where one of the two is compiled."""
    here = {plain_name(name): name for name in module.state_dict()}
    return {here.get(plain_name(name), name): value for name, value in weights.items()}


def _as_annotated(make: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Build what is a mapping or a list in YAML, such as a network inside, as the annotations of its argument say."""
    nested = {name: value for name, value in arguments.items() if isinstance(value, (Mapping, list))}
    if not nested:
        return dict(arguments)
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    add: Any = parser.add_class_arguments if isinstance(make, type) else parser.add_function_arguments
    try:
        accepted = add(make, fail_untyped=False)
        known = {name: value for name, value in nested.items() if name in accepted}
        parsed = parser.parse_object(known, defaults=False)
    except (ArgumentError, ValueError) as error:
        if any(isinstance(value, Mapping) and "class_path" in value for value in nested.values()):
            raise _first_cause(error) from None
        return dict(arguments)  # the class may know better than its annotations
    built = _compat.instantiated(parser, parsed)
    return {**arguments, **{name: built[name] for name in known}}


def _first_cause(error: BaseException) -> BaseException:
    """What a chain of exceptions began with."""
    return error if error.__cause__ is None else _first_cause(error.__cause__)


def _built(
    make: Callable[..., Any], arguments: Mapping[str, Any], *, path: str, argument: str, hint: str = ""
) -> nn.Module:
    try:
        module = make(**_as_annotated(make, arguments))
    except Exception as error:  # a constructor may raise anything; the user needs to know which one it was
        raise ValueError(
            f"{argument} could not be built: {path}(**{dict(arguments)!r}) raised {type(error).__name__}: "
            f"{_beginning(error)}{hint}"
        ) from error
    if not isinstance(module, nn.Module):
        raise TypeError(f"{argument}: {path} returned {type(module).__name__}, not a torch.nn.Module")
    return module


def _hint(path: str | os.PathLike[str], arguments: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> str:
    """What to do about arguments that do not fit a checkpoint of Lightning."""
    hint = f". What {os.fspath(path)} does not hold goes into init_args"
    if others := differing(checkpoint.get("hyper_parameters"), arguments):
        were = ", ".join(f"{name}={shown(was)}" for name, (was, _) in others.items())
        hint += f"; it was saved with {were}, which they overrule"
    return hint


def differing(saved: Any, own: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Numbers and words, and lists of them, that are others than those saved under the same names.

    Args:
        saved: Hyperparameters of a checkpoint; anything but a mapping has none.
        own: Arguments, or hyperparameters.

    Returns:
        By name, dotted within mappings, what was saved, and what there is now.

    Example:
        >>> differing({"lr": 0.1, "net": {"width": 16, "strides": [1]}}, {"net": {"width": 8, "strides": (1,)}})
        {'net.width': (16, 8)}
    """
    found: dict[str, tuple[Any, Any]] = {}
    for name in [name for name in own if isinstance(saved, Mapping) and name in saved]:
        was, now = saved[name], own[name]
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found |= {f"{name}.{inner}": pair for inner, pair in differing(was, now).items()}
        elif _is_plain(was) and _is_plain(now) and _as_lists(was) != _as_lists(now):
            found[name] = was, now
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(entry) for entry in value)
    return isinstance(value, (str, int, float, bool, NoneType))


def _as_lists(value: Any) -> Any:
    return [_as_lists(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _beginning(error: BaseException) -> str:
    """What was raised, but not all of a long text: torch lists every weight that does not fit."""
    if ours(error):  # short enough
        return str(error)
    lines = str(error).strip().rstrip(".").splitlines()
    shortened = [line if len(line) <= LONGEST else f"{line[:LONGEST]} ..." for line in lines[:MOST_LINES]]
    return "\n".join([*shortened, *[f"and {len(lines) - MOST_LINES} lines more"] * (len(lines) > MOST_LINES)])


def _refuse_unknown(
    make: Callable[..., Any], arguments: Mapping[str, Any], path: str, *, where: str = "init_args"
) -> None:
    """Refuse arguments that a class does not take: Lightning would drop them without a word."""
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):  # some classes written in C have no signature
        return
    if any(entry.kind is inspect.Parameter.VAR_KEYWORD for entry in parameters.values()):
        return
    for name in arguments:
        if name not in parameters:
            raise ValueError(f"{where} has '{name}', which {path} does not take{did_you_mean(name, parameters)}")


def _is_lightning_module(make: Any) -> bool:
    return isinstance(make, type) and any(base.__name__ == "LightningModule" for base in make.__mro__)


def _below(weights: Mapping[str, Any], submodule: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The weights of a network from those of the module around it."""
    prefix = f"{submodule}."
    below = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
    if not below:
        parts = {key.rpartition(".")[0] for key in weights}
        raise ValueError(
            f"submodule names '{submodule}', and {os.fspath(path)} holds no weights below it"
            f"{did_you_mean(submodule, {'.'.join(part.split('.')[:depth]) for part in parts for depth in (1, 2, 3)})}"
        )
    return below


def _nearest_module(path: str) -> str:
    """The module spelled most alike, next to the first part of a path that does not exist."""
    parts = path.split(".")
    for depth in range(len(parts)):
        home = ".".join(parts[:depth])
        try:
            places = import_module(home).__path__ if home else None
        except Exception:  # the caller has said already what could not be imported
            return ""
        names = [f"{home}.{entry.name}".lstrip(".") for entry in iter_modules(places)]
        if ".".join(parts[: depth + 1]) not in names:
            return did_you_mean(".".join(parts[: depth + 1]), names)
    return ""


def _read_checkpoint(path: str | os.PathLike[str], weights_only: bool) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"ckpt_path: there is no file {os.fspath(path)}")
    checkpoint = read_saved(path, "ckpt_path", trusted="weights_only=False unpickles it" if weights_only else None)
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"ckpt_path: {os.fspath(path)} holds a {type(checkpoint).__name__}, not a checkpoint")
    return dict(checkpoint)
