"""The teacher: a frozen network that is in nobody's parameters, checkpoints or data-parallel wrappers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.mechanisms.capture import NetworkCall
from lightning_compress.mechanisms.selection import did_you_mean, find_module


class Teacher:
    """A network that is only ever run, on what the student received.

    Args:
        module: The network; never a child of the module being trained.
        transform: Called with the student's arguments; returns what the teacher receives: a tensor (its only
            argument), a tuple (positional arguments) or a dict (keyword arguments). None: the same arguments.

    Example:
        >>> teacher = Teacher(nn.Linear(2, 1))
        >>> with teacher.prepared():
        ...     output = teacher(NetworkCall((torch.ones(3, 2),), {}, None))
        >>> output.requires_grad
        False
    """

    def __init__(self, module: nn.Module, transform: nn.Module | None = None) -> None:
        self.module = module
        self.transform = transform
        self.forwards = 0

    @contextmanager
    def prepared(
        self, device: torch.device | str | None = None, convert: Callable[[nn.Module], nn.Module] | None = None
    ) -> Iterator[Teacher]:
        """Freeze the network in evaluation mode on a device, and put everything back afterwards.

        Args:
            device: Where to run; None leaves it where it is.
            convert: What the Trainer's precision does to a module (a cast to bfloat16, say).

        Yields:
            The teacher itself.
        """
        modules = [module for module in (self.module, self.transform) if module is not None]
        with _restored(modules):
            for module in modules:
                if convert is not None:
                    convert(module)
                if device is not None:
                    module.to(device)
                module.eval().requires_grad_(False)
            yield self

    def __call__(self, call: NetworkCall) -> Any:
        """Run the teacher on the arguments of a call of the student.

        Args:
            call: The student's call; its output is not looked at.

        Returns:
            Whatever the network returns, without a graph.

        Raises:
            RuntimeError: If the network does not take these arguments.
        """
        self.forwards += 1
        if self.module.training:  # somebody called train() on it since
            self.module.eval()
        args, kwargs = call.args, call.kwargs
        try:
            with torch.no_grad():
                if self.transform is not None:
                    args, kwargs = _as_arguments(self.transform(*args, **kwargs))
                return self.module(*args, **kwargs)
        except Exception as error:  # whatever the user's network raises, said in the student's terms
            shapes = [tuple(leaf.shape) for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
            raise RuntimeError(
                f"the teacher {type(self.module).__name__} failed on what the student received (tensors of shapes "
                f"{shapes}): {type(error).__name__}: {error}. It may want another input (see teacher_transform), or "
                "the student may be another module than the one meant (see student)"
            ) from error


def build_module(source: Any, *, argument: str) -> nn.Module:
    """Make a module of what Python or YAML gave: a module, or a class or function by its path.

    Args:
        source: An ``nn.Module``; or ``{"class_path": "package.Name", "init_args": {...}, "dict_kwargs": {...}}``,
            where the path names a class or a function that returns a module; or the path alone.
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
    if isinstance(source, type) and issubclass(source, nn.Module):
        raise TypeError(
            f"{argument} must be a module, got the class {source.__name__}; call it: {source.__name__}(...)"
        )
    spec = {"class_path": source} if isinstance(source, str) else source
    if not isinstance(spec, Mapping) or not isinstance(spec.get("class_path"), str):
        raise TypeError(
            f"{argument} must be a torch.nn.Module, or a class_path with init_args, got {type(source).__name__}: "
            f"{source!r}"
        )
    for key in spec:
        if key not in ("class_path", "init_args", "dict_kwargs"):
            raise ValueError(
                f"{argument} has the key '{key}'; accepted are class_path, init_args and dict_kwargs"
                f"{did_you_mean(str(key), ['class_path', 'init_args', 'dict_kwargs'])}"
            )
    make = import_path(spec["class_path"], argument=argument)
    arguments = {**(spec.get("init_args") or {}), **(spec.get("dict_kwargs") or {})}
    try:
        module = make(**arguments)
    except Exception as error:  # a constructor may raise anything; the user needs to know which one it was
        raise ValueError(
            f"{argument} could not be built: {spec['class_path']}(**{arguments!r}) raised "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise TypeError(f"{argument}: {spec['class_path']} returned {type(module).__name__}, not a torch.nn.Module")
    return module


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
    except ImportError as error:
        raise ValueError(f"{argument} names '{path}', but '{home}' cannot be imported: {error}") from error
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
        The module, in evaluation mode, on the CPU, with all weights loaded strictly.

    Raises:
        ValueError: If the file cannot be read without unpickling, or class, arguments and weights do not fit.
        FileNotFoundError: If there is no such file.

    Example:
        >>> teacher = teacher_from_checkpoint("my.LitNet", "teacher.ckpt", submodule="model")  # doctest: +SKIP
    """
    make = import_path(class_path, argument="class_path") if isinstance(class_path, str) else class_path
    checkpoint = _read_checkpoint(ckpt_path, weights_only)
    weights = checkpoint.get("state_dict", checkpoint)
    is_lightning = any(base.__name__ == "LightningModule" for base in make.__mro__) if isinstance(make, type) else False
    hyperparameters = _accepted(make, checkpoint.get("hyper_parameters", {})) if is_lightning else {}
    module = build_module(
        {"class_path": f"{make.__module__}.{make.__qualname__}", "init_args": {**hyperparameters, **(init_args or {})}}
        if isinstance(class_path, str)
        else _construct(make, {**hyperparameters, **(init_args or {})}),
        argument="class_path",
    )
    inside = bool(submodule) and not is_lightning and not any(name == submodule for name, _ in module.named_modules())
    if inside:  # the class is the network itself; the file is of the LightningModule around it
        prefix = f"{submodule}."
        weights = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {os.fspath(ckpt_path)} do not fit {type(module).__name__}: {error}"
        ) from error
    network = find_module(module, "" if inside else submodule, argument="submodule")
    return network.eval()


def _construct(make: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return make(**arguments)
    except TypeError as error:
        raise ValueError(
            f"class_path could not be built: {getattr(make, '__name__', make)}(**{dict(arguments)!r}): {error}; "
            "what the checkpoint does not hold goes into init_args"
        ) from error


def _accepted(make: type, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """The saved hyperparameters that the constructor takes."""
    import inspect

    parameters = inspect.signature(make.__init__).parameters  # type: ignore[misc]
    takes_any = any(entry.kind is inspect.Parameter.VAR_KEYWORD for entry in parameters.values())
    return {str(key): value for key, value in hyperparameters.items() if takes_any or key in parameters}


def _read_checkpoint(path: str | os.PathLike[str], weights_only: bool) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"ckpt_path: there is no file {os.fspath(path)}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:  # torch.load raises many kinds: unpickling, truncated archives, bad magic numbers
        raise ValueError(
            f"ckpt_path: {os.fspath(path)} cannot be read as plain weights: {error}"
            + ("; if you trust the file, weights_only=False unpickles it" if weights_only else "")
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"ckpt_path: {os.fspath(path)} holds a {type(checkpoint).__name__}, not a checkpoint")
    return dict(checkpoint)


def _as_arguments(value: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(value, Mapping):
        return (), value
    return (tuple(value), {}) if isinstance(value, tuple) else ((value,), {})


@contextmanager
def _restored(modules: list[nn.Module]) -> Iterator[None]:
    """Put back training flags, ``requires_grad``, and the very tensors, so device and dtype too."""
    parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
    flags = [(part, part.training) for part in parts]
    parameters = list(
        {id(p): (p, p.data, p.requires_grad) for part in parts for p in part.parameters(recurse=False)}.values()
    )
    buffers = [(part, name, value) for part in parts for name, value in part._buffers.items()]
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training
        for parameter, data, requires_grad in parameters:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
        for part, name, value in buffers:
            part._buffers[name] = value
