"""LightningCLI projects from the shell: ``fit``, ``validate``, ``test`` and ``predict``, and projects built to look at.

The project's own package decides whether LightningCLI is that of ``lightning.pytorch`` or of ``pytorch_lightning``.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import NoneType
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, DefaultHelpFormatter

import lightning_compress
from lightning_compress import _compat
from lightning_compress.callbacks.base import callbacks_of
from lightning_compress.callbacks.export import ExportCallback
from lightning_compress.callbacks.ptq import PTQCallback
from lightning_compress.callbacks.qat import QATCallback
from lightning_compress.commands.config_errors import (
    ConfigError,
    explanation,
    mappings,
    of_configuration,
    refused,
    users_own,
)
from lightning_compress.commands.exits import DONE, FAILED, USAGE, UsageError, checking, ended, one_line
from lightning_compress.export.copying import make_plain_
from lightning_compress.export.errors import EvaluationError, ExportError
from lightning_compress.export.evaluate import hooks_done, interruptible
from lightning_compress.export.onnx import checked_path, load_checkpoint_
from lightning_compress.export.sample import defines
from lightning_compress.export.weights import read_checkpoint
from lightning_compress.mechanisms.capture import CaptureError
from lightning_compress.mechanisms.loading import differing, import_path
from lightning_compress.mechanisms.quantization import QuantizationError
from lightning_compress.recipe.classes import callback_class
from lightning_compress.recipe.file import RecipeError, check_size, shown, yaml_problem

CLASS_OPTIONS = {"model": "--class", "data": "--data-class"}
"""Classes for a config that names none, as those are that a project's own ``LightningCLI(Net, Data)`` has saved."""
EPILOG = (
    "--class pkg.Net and --data-class pkg.Data name the classes of a config without class_path. "
    "Exit codes: 0 done, 1 a check failed, 2 bad usage or configuration."
)
HELP_POSITION = 4  # from the left; keys are long
PLAIN = {
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "plugins": "null",
    "logger": "false",
    "enable_checkpointing": "false",
    "fast_dev_run": "false",
    "overfit_batches": "0.0",
}
"""Of a Trainer that trains nothing: it needs neither the devices of the training nor its callbacks with their teachers.
"""
QUANTISING = (PTQCallback, QATCallback)
DOUBLE = (64, "64", "64-true")
"""Precisions that decide what the data have to be."""


@dataclass(frozen=True)
class Project:
    """A LightningCLI project, built and not run.

    Attributes:
        module: The LightningModule.
        datamodule: The LightningDataModule; None where the config has none.
        trainer: The Trainer, with the callbacks of the config.
        quantising: The callbacks of the config that quantise, where the Trainer no longer has any.
        remarks: What a reader of its figures should know.
    """

    module: Any
    datamodule: Any
    trainer: Any
    quantising: tuple[PTQCallback | QATCallback, ...] = ()
    remarks: tuple[str, ...] = ()

    def set_up(self) -> None:
        """Set the data up as a fit of the project does, in its order; Trainers that come later find them so.

        A fit validates with what ``setup("fit")`` has made. A datamodule, or a module with loaders of its own, may know
        no other stage, and may not bear to be set up twice.

        Raises:
            ProjectError: If the project's code fails.
        """
        owners = [owner for owner in (self.datamodule, self.module) if owner is not None]
        _compat.attach(self.trainer, self.module, self.datamodule)
        with code_of(self.module):
            for owner in owners:
                owner.prepare_data()
            for owner in owners:
                owner.setup("fit")
        for owner in owners:
            hooks_done(owner)

    def tear_down(self) -> None:
        """Let the project put away what :meth:`set_up` has made.

        Raises:
            ProjectError: If the project's code fails.
        """
        with code_of(self.module):
            for owner in (self.module, self.datamodule):
                if owner is not None:
                    type(owner).teardown(owner, "fit")


class ProjectError(RuntimeError):
    """The project's own code failed, in a step or with the data."""


@contextmanager
def code_of(module: Any) -> Iterator[None]:
    """Where the project's own code runs, which may raise anything: tell that from bad usage, and from our own faults.

    Args:
        module: The LightningModule, by whose class the project is called.

    Raises:
        ProjectError: In the place of any exception but those that speak of what a network is called.

    Example:
        >>> with code_of([]):
        ...     {}["key"]
        Traceback (most recent call last):
        lightning_compress.commands.project.ProjectError: the steps or the data of list failed: KeyError: 'key'
    """
    try:
        yield
    except (CaptureError, EvaluationError, QuantizationError, ProjectError):
        raise
    except Exception as error:
        raise ProjectError(
            f"the steps or the data of {type(module).__name__} failed: {type(error).__name__}: {one_line(error)}"
        ) from error


@dataclass(frozen=True)
class Arguments:
    """What LightningCLI is to be called with.

    Attributes:
        passed: For LightningCLI itself.
        configs: Name of each file to its contents.
        model_class: For a config whose ``model`` names no class.
        data_class: For one whose ``data`` names none.
    """

    passed: tuple[str, ...]
    configs: dict[str, Any] = field(default_factory=dict)
    model_class: type | None = None
    data_class: type | None = None


def main(subcommand: str, arguments: Sequence[str]) -> int:
    """Run a subcommand of LightningCLI, the callbacks of this package known by their short names.

    Args:
        subcommand: "fit", "validate", "test" or "predict".
        arguments: As for LightningCLI; also ``--class`` and ``--data-class``.

    Returns:
        0: done. 1: a callback of this package says that its result failed a check. 2: bad usage or configuration.
        What the training gives to ``sys.exit``, if it ends so.

    Raises:
        Exception: What the training itself raises.
        KeyboardInterrupt: On Ctrl-C, of which Lightning makes an exit.

    Example:
        >>> main("fit", ["--config", "missing.yaml"])
        2
    """
    try:
        trainer = _called(_read(arguments), subcommand, run=True).trainer
    except ConfigError as error:
        return ended(subcommand, USAGE, str(error))
    except SystemExit as stop:  # of --help and --print_config, or of the user's code
        if not isinstance(stop.code, (int, NoneType)):  # a message, which Python shows
            raise
        return stop.code or DONE
    except (TypeError, ValueError) as error:
        if not refused(error):
            raise
        return ended(subcommand, USAGE, refused(error))
    failures = [f"{callback.name}: {callback.failure}" for callback in callbacks_of(trainer) if callback.failure]
    if failures and trainer.is_global_zero:
        ended(subcommand, FAILED, "; ".join(failures))
    return FAILED if failures else DONE


def load_project(
    configs: Sequence[str], *, model: str | None = None, data: str | None = None, arguments: Sequence[str] = ()
) -> Project:
    """Build the module, the datamodule and the Trainer of a LightningCLI config; nothing is run.

    Random states are seeded as the config says.

    Args:
        configs: YAML files, the later ones on top.
        model: Dotted path of the LightningModule's class, for a config that does not name it.
        data: Dotted path of the LightningDataModule's class, likewise.
        arguments: Further arguments of LightningCLI, such as ``--trainer.logger=false``.

    Returns:
        The project.

    Raises:
        ValueError: If the configuration cannot be used; the message names the key and the value.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        ...     _ = file.write("model: lightning.pytorch.demos.boring_classes.BoringModel")
        ...     file.flush()
        ...     type(load_project([file.name]).module).__name__
        'BoringModel'
    """
    named = [*_option("--class", model), *_option("--data-class", data)]
    try:
        cli = _called(_read([*(part for path in configs for part in ("--config", path)), *named, *arguments]), "fit")
    except SystemExit as stop:
        raise ConfigError(f"the arguments {list(arguments)} end the program") from stop
    return Project(cli.model, cli.datamodule, cli.trainer)


def load_trained(
    configs: Sequence[str], checkpoint: str, *, model: str | None = None, data: str | None = None, set_up: bool = False
) -> Project:
    """Build a LightningCLI project with the weights of a checkpoint, to look at it; nothing is trained.

    The Trainer is a plain one on one device: the accelerator of the config where this machine has it, else the CPU.
    Of the callbacks those that quantise are made, and stand beside the Trainer.

    Args:
        configs: As in :func:`load_project`.
        checkpoint: A checkpoint of Lightning, or a saved ``state_dict``. Only one that records the structure of a
            pruned network changes sizes.
        model: As in :func:`load_project`.
        data: As in :func:`load_project`.
        set_up: Whether to set the data up; :meth:`Project.tear_down` is then the caller's to call.

    Returns:
        The project; nothing in its module is compiled.

    Raises:
        ProjectError: If the project's own code fails.
        UsageError: If the configuration or the checkpoint cannot be used, or one does not fit the other.

    Example:
        >>> import os, tempfile, torch
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config, checkpoint = os.path.join(folder, "c.yaml"), os.path.join(folder, "last.ckpt")
        ...     with open(config, "w") as file:
        ...         _ = file.write("model: lightning.pytorch.demos.boring_classes.BoringModel")
        ...     torch.save(BoringModel().state_dict(), checkpoint)
        ...     type(load_trained([config], checkpoint).module).__name__
        'BoringModel'
    """
    with checking(ValueError, OSError):
        contents = read_checkpoint(checkpoint, or_weights=True)
    current_folder_importable()
    arguments = _plain(configs)
    project = load_project(configs, model=model, data=data, arguments=arguments)
    differences, counts = _differences(project.module, contents), "config"
    if differences and model is None and _names_class_of(contents, project.module):
        counts = "checkpoint"
        project = load_project(configs, data=data, arguments=[*arguments, "--ckpt_path", checkpoint])
    with ExitStack() as undo:
        if set_up:
            project.set_up()
            undo.callback(project.tear_down)
        if defines(project.module, "configure_model"):
            with code_of(project.module):
                project.module.configure_model()
            vars(project.module)["configure_model"] = _compat.do_nothing
        try:
            module = load_checkpoint_(make_plain_(project.module), contents, checkpoint)
        except (ExportError, ValueError) as error:  # of another class, or of another width
            others = counts == "config" and differences
            reason = f"{'; '.join(differences)}, where it has to say the same: " if others else ""
            raise UsageError(f"{reason}{one_line(error)}") from error
        module = project.trainer.precision_plugin.convert_module(module)  # as a fit of the project begins
        undo.pop_all()  # the caller's from here on
    quantising = tuple(own for own in project.trainer.callbacks if isinstance(own, QUANTISING))
    for own in quantising:
        project.trainer.callbacks.remove(own)
    remarks = tuple(f"{own}: the {counts} counts" for own in differences)
    return replace(project, module=module, quantising=quantising, remarks=remarks)


def _hyperparameters(contents: Any) -> Mapping[str, Any]:
    found = contents.get("hyper_parameters")
    return found if isinstance(found, Mapping) else {}


def _names_class_of(contents: Any, module: Any) -> bool:
    """Whether a checkpoint's hyperparameters say that they are of a module's class, as those of LightningCLI do."""
    path = _hyperparameters(contents).get("_class_path")
    with suppress(ValueError):
        return isinstance(path, str) and import_path(path, argument="class_path") is type(module)
    return False


def _differences(module: Any, contents: Any) -> tuple[str, ...]:
    """Numbers and words among the hyperparameters that are others in the checkpoint."""
    others = differing(_hyperparameters(contents), getattr(module, "hparams", {}))
    return tuple(
        f"the checkpoint was saved with {name}={shown(was)}, and the config has {shown(now)}"
        for name, (was, now) in others.items()
        if not name.startswith("_")
    )


def _plain(configs: Sequence[str]) -> list[str]:
    """The arguments of LightningCLI for a Trainer that trains nothing."""
    own: dict[str, Any] = {}
    callbacks: list[Any] = []
    for path in configs:
        settings = _contents(path).get("trainer") or {}
        own.update(settings)
        callbacks = [*_entries(settings["callbacks"])] if "callbacks" in settings else callbacks
        callbacks += _entries(settings.get("callbacks+"))
    precision = "64-true" if own.get("precision") in DOUBLE else "null"
    accelerator = _accelerator_here(own.get("accelerator", "auto"))
    quantising = json.dumps([entry for entry in callbacks if _quantises(entry)], default=str)
    chosen = {**PLAIN, "accelerator": accelerator, "precision": precision, "callbacks": quantising}
    for name in ("limit_train_batches", "limit_val_batches"):
        if own.get(name) == 0:  # the training made nothing of these data; here they are looked at
            chosen[name] = "1.0"
    return [f"--trainer.{key}={value}" for key, value in chosen.items()]


def _entries(given: Any) -> list[Any]:
    """Those of a list, or the one that stands in its place."""
    return given if isinstance(given, list) else [] if given is None else [given]


def _quantises(entry: Any) -> bool:
    """Whether it makes a callback that quantises; what cannot be imported is not asked for."""
    path = entry.get("class_path") if isinstance(entry, Mapping) else entry
    with suppress(RecipeError):
        return isinstance(path, str) and issubclass(callback_class(path, "trainer.callbacks"), QUANTISING)
    return False


def _accelerator_here(wanted: Any) -> str:
    """What a config asks for, where this machine has it; else the CPU."""
    if wanted == "auto":
        return "auto"
    names = {"gpu": ("cuda", "mps")}.get(wanted, (wanted,)) if isinstance(wanted, str) else ()
    known = import_module("lightning.pytorch.accelerators").AcceleratorRegistry
    here = any(name in known and known[name]["accelerator"].is_available() for name in names)
    return str(wanted) if here else "cpu"


def _option(name: str, value: str | None) -> list[str]:
    return [] if value is None else [name, value]


def current_folder_importable() -> None:
    """Let the modules of the current folder be imported, as ``python train.py`` does; a console script does not."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())


# Before LightningCLI


def _read(arguments: Sequence[str]) -> Arguments:
    """Take out what LightningCLI does not know, and look at the rest."""
    current_folder_importable()
    passed, given = _without(arguments, [*CLASS_OPTIONS.values()])
    configs = {path: _contents(path) for path in _values(passed, ("--config", "-c"))}
    classes: dict[str, type | None] = dict.fromkeys(CLASS_OPTIONS)
    lacking: dict[str, str] = {}  # the config, by the key that names no class
    for key, option in CLASS_OPTIONS.items():
        bare = _without_class_path(key, configs)
        if bare and option in given:
            classes[key] = _imported(given[option], option)
        elif option in given:  # beside no arguments it is LightningCLI's own option
            passed.append(f"--{key}={given[option]}")
        elif bare and _class_in(configs, passed, key) is None:
            lacking[key] = bare
    if lacking:
        paths, name = dict.fromkeys(lacking.values()), "name" if len(lacking) > 1 else "names"
        given_as = [f"{CLASS_OPTIONS[key]} pkg.{'Net' if key == 'model' else 'Data'}" for key in lacking]
        raise ConfigError(
            f"{', '.join(paths)}: {' and '.join(lacking)} {name} no class, as in the configs that a project's own "
            f"LightningCLI(Net, Data) saves; give it as {' '.join(given_as)}"
        )
    return Arguments(tuple(passed), configs, classes["model"], classes["data"])


def _without_class_path(key: str, configs: Mapping[str, Any]) -> str | None:
    """The first config in which the model, or the data, has arguments of no class that is named there."""
    for path, content in configs.items():
        own = content.get(key)
        if isinstance(own, Mapping) and own and not {"class_path", "init_args"} & set(own):
            return path
    return None


def _contents(path: str) -> Any:
    """A config, and in it those groups of options that have a file of their own, as jsonargparse reads them."""
    content = _loaded(path)
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"{path}: a config is a mapping with keys such as model, data and trainer, got {shown(content)}"
        )
    groups = {key: _opened(content[key], path) for key in ("trainer", *CLASS_OPTIONS) if key in content}
    trainer, origin = groups.get("trainer", ({}, path))
    if not isinstance(trainer, Mapping):
        raise ConfigError(
            f"{path}: trainer is a mapping of the Trainer's arguments, or a file that holds one, got {shown(trainer)}"
        )
    callbacks = {key: _callbacks(trainer[key], origin) for key in ("callbacks", "callbacks+") if key in trainer}
    whole = {**content, **{key: value for key, (value, _) in groups.items()}}
    if "trainer" in whole:
        whole["trainer"] = {**trainer, **callbacks}
    for entry in mappings(whole):
        if "class_path" in entry and not isinstance(entry.get("init_args"), (Mapping, NoneType)):
            raise ConfigError(
                f"{path}: init_args of {shown(entry['class_path'])} is a mapping of arguments, "
                f"got {shown(entry['init_args'])}"
            )
    return whole


def _callbacks(value: Any, path: str) -> Any:
    """A list of them, or one; each of them, or the list, may have a file of its own."""
    opened, origin = _opened(value, path)
    return [_opened(entry, origin)[0] for entry in opened] if isinstance(opened, list) else opened


def _opened(value: Any, path: str) -> tuple[Any, str]:
    """A value and the file that it is from: where it is the path of one beside ``path``, what that holds."""
    beside = os.path.join(os.path.dirname(path), value) if isinstance(value, str) else ""
    return (_loaded(beside), beside) if os.path.isfile(beside) else (value, path)


def _loaded(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.safe_load(stream)
    except OSError as error:
        raise ConfigError(f"the config '{path}' cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path}: {yaml_problem(error)}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except (RecursionError, MemoryError) as error:
        raise ConfigError(f"{path}: the config is too large or nested too deeply to be read") from error
    try:
        check_size(content, "the config")
    except RecipeError as error:
        raise ConfigError(f"{path}: {error}") from error
    return content


def _values(arguments: Sequence[str], options: Sequence[str]) -> Iterator[str]:
    """What follows options, behind a space or an equals sign."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in options and (equals or index + 1 < len(arguments)):
            yield value if equals else arguments[index + 1]


def _without(arguments: Sequence[str], options: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments without some options, and those."""
    passed, given, rest = [], {}, list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if name not in options:
            passed.append(argument)
        elif equals or rest:
            given[name] = value if equals else rest.pop(0)
        else:
            raise ConfigError(f"{name} needs the dotted path of a class")
    return passed, given


def _imported(path: str, argument: str) -> Any:
    try:
        return import_path(path, argument=argument)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _class_in(configs: dict[str, Any], passed: Sequence[str], key: str) -> str | None:
    """The class path of the model, or the data, wherever it is given; the last counts."""
    given = [_opened(value, "")[0] for value in _values(passed, (f"--{key}", f"--{key}.class_path"))]
    found = [*given, *(content.get(key) for content in reversed(list(configs.values())))]
    paths = (own.get("class_path") if isinstance(own, Mapping) else own for own in found)
    return next((path for path in paths if isinstance(path, str)), None)


# LightningCLI


def _called(arguments: Arguments, subcommand: str, *, run: bool = False) -> Any:
    """LightningCLI of the project's package, after its work."""
    for name in lightning_compress.__all__:  # jsonargparse knows the short names of what is imported
        getattr(lightning_compress, name)
    cli = _cli(_namespace(arguments), subcommand, arguments, run)
    options: Any = {"prog": "lightning-compress", "epilog": EPILOG}
    extra: Any = {"save_config_callback": cli.save_config if run else None}
    if arguments.data_class is not None:
        extra["datamodule_class"] = arguments.data_class
    try:
        return cli(
            arguments.model_class,
            args=[subcommand, *arguments.passed],
            parser_kwargs={**options, subcommand: {"epilog": EPILOG}},
            **extra,
        )
    except ArgumentError as error:  # of the hyperparameters in --ckpt_path
        raise ConfigError(explanation(error, arguments.configs, ())) from error


def _check_path(export: ExportCallback) -> None:
    """Refuse before a training what cannot be written after it."""
    try:
        checked_path(export.path)
    except ValueError as error:
        raise ConfigError(f"trainer.callbacks (ExportCallback): {error}") from error


def _namespace(arguments: Arguments) -> str:
    """The Lightning package that the model's class is of, or the data's."""
    classes: list[Any] = [arguments.model_class, arguments.data_class]
    for key in ("model", "data"):
        path = _class_in(arguments.configs, arguments.passed, key)
        with suppress(ValueError):  # LightningCLI will tell
            classes.append(import_path(path, argument=key) if path else None)
    for cls in classes:
        if isinstance(cls, type) and any(base.__name__.startswith("Lightning") for base in cls.__mro__):
            return _compat.package_of_class(cls)
    return "lightning.pytorch"


def _without_class(path: str) -> bool:
    """Whether a checkpoint has hyperparameters that do not say of which class they are."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        hyperparameters = contents.get("hyper_parameters", {})
    except Exception:  # "last", or what is no file, or cannot be read: Lightning will tell
        return False
    return "_class_path" not in hyperparameters


def _cli(namespace: str, subcommand: str, arguments: Arguments, run: bool) -> Any:
    """LightningCLI with one subcommand, short help, and errors that say what to change."""
    package: Any = import_module(f"{namespace}.cli")

    class Formatter(DefaultHelpFormatter):
        def __init__(self, prog: str) -> None:
            super().__init__(prog, max_help_position=HELP_POSITION)  # type: ignore[no-untyped-call]

    class Parser(package.LightningArgumentParser):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            usage = f"lightning-compress {subcommand} [-h] [--config CONFIG] [--KEY VALUE ...]"
            super().__init__(**{"usage": usage, "formatter_class": Formatter, "exit_on_error": False, **options})

    class SaveConfig(package.SaveConfigCallback):  # type: ignore[misc]
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            """Leave a file alone that is there; it may well be the config that was given."""
            path = os.path.join(trainer.log_dir, self.config_filename)
            there = trainer.strategy.broadcast(os.path.isfile(path))
            if self.already_saved or not there:
                super().setup(trainer, pl_module, stage)
            elif trainer.is_global_zero:
                warnings.warn(
                    f"'{path}' exists already and is left alone, so what this {subcommand} was called with is not "
                    "saved; a logger, or --trainer.default_root_dir, gives it a folder of its own",
                    stacklevel=2,
                )

    class ProjectCLI(package.LightningCLI):  # type: ignore[misc]
        save_config = SaveConfig

        def __init__(self, *args: Any, **options: Any) -> None:
            self.parsers: list[Any] = []
            super().__init__(*args, parser_class=Parser, **options)

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {subcommand: package.LightningCLI.subcommands()[subcommand]}

        def add_arguments_to_parser(self, parser: Any) -> None:
            self.parsers.append(parser)

        def parse_arguments(self, parser: Any, args: Any) -> None:
            try:
                self.config = parser.parse_args(args)
            except (ArgumentError, TypeError, ValueError, KeyError) as error:
                raise self.explained(error) from error

        def _parse_ckpt_path(self) -> None:
            """Take hyperparameters from a checkpoint, as Lightning does, only where they say of which class they are.

            Those that a plain Trainer, or a project's own ``LightningCLI(Net)``, has saved do not: the config counts.
            """
            path = self.config[subcommand].get("ckpt_path")
            if not (self.subclass_mode_model and path and _without_class(path)):
                super()._parse_ckpt_path()

        def instantiate_classes(self) -> None:
            failed = None
            try:
                super().instantiate_classes()
            except Exception as error:  # a constructor may raise anything
                if of_configuration(error):
                    raise self.explained(error) from error
                failed = users_own(error)
            if failed is not None:
                raise failed  # here, where what it comes from stays what it was
            for callback in self.trainer.callbacks if subcommand == "fit" else ():
                if isinstance(callback, ExportCallback):
                    _check_path(callback)

        def explained(self, error: Exception) -> ConfigError:
            keys: set[str] = set()
            for parser in self.parsers:
                keys.update(parser.get_defaults(skip_validation=True).keys())
            return ConfigError(explanation(error, arguments.configs, keys))

    def called(self: Any, **options: Any) -> None:
        if run:
            with interruptible():
                getattr(self.trainer, subcommand)(**options)

    setattr(ProjectCLI, subcommand, called)  # LightningCLI prefers a method of its own
    return ProjectCLI
