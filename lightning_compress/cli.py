"""The command ``lightning-compress``; heavy modules are imported by the subcommand that needs them."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import TypeAlias

from lightning_compress import __version__
from lightning_compress.commands.exits import DONE, INTERRUPTED, USAGE, ended

CHILD_COMMANDS = ("run", "plan")
"""These start a command of the user's, which comes behind ``--``."""
LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")
"""These hand all their arguments to LightningCLI."""
COMMANDS = ("demo", *CHILD_COMMANDS, *LIGHTNING_COMMANDS, "export", "report", "recipes", "sensitivity", "sweep")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        0: done. 1: a check failed. 2: bad usage. 130: interrupted. What a command of the user's ended with, if not 0.

    Example:
        >>> main(["--version"])
        lightning-compress ...
        0
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever calls
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _code(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # who reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:  # also while heavy modules are imported
        return ended(arguments[0], INTERRUPTED, "interrupted")


def _code(arguments: list[str]) -> int:
    """Run the command, and give its exit code."""
    if arguments and arguments[0] in LIGHTNING_COMMANDS:
        return _called("lightning_compress.commands.project", "main", arguments[0], arguments[1:])
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    own, command = arguments[:cut], arguments[cut + 1 :]
    parser = _parser()
    if not own:
        parser.print_help(sys.stderr)
        return USAGE
    try:
        _check_name(parser, own)
        _check_order(parser, own, command)
        options, unknown = parser.parse_known_args(own)
        _check_unknown(parser, options, own, command, unknown)
        if command and options.command not in (*CHILD_COMMANDS, "sweep"):
            parser.error(f"'{options.command}' takes no command behind --")
    except SystemExit as stop:  # argparse has written what it had to say
        return stop.code if isinstance(stop.code, int) else 0
    return _DISPATCH[options.command](options, command)


def _called(module: str, function: str, *arguments: object, **options: object) -> int:
    return int(getattr(import_module(module), function)(*arguments, **options))


_DISPATCH: dict[str, Callable[[argparse.Namespace, Sequence[str]], int]] = {
    "demo": lambda options, _: _called(
        "lightning_compress.demo", "run_demo", data=options.data, out=options.out, structured=options.structured
    ),
    "run": lambda options, command: _called(
        "lightning_compress.commands.run", "run", options.recipe, command, settings=options.set
    ),
    "plan": lambda options, command: _called(
        "lightning_compress.commands.plan", "plan", options.recipe, command, settings=options.set
    ),
    "export": lambda options, _: _called("lightning_compress.commands.export", "export", options),
    "report": lambda options, _: _called("lightning_compress.commands.report", "report", options),
    "recipes": lambda options, _: _called("lightning_compress.commands.recipes", "show", options.name),
    "sensitivity": lambda options, _: _called("lightning_compress.commands.sensitivity", "sensitivity", options),
    "sweep": lambda options, command: _called("lightning_compress.commands.sweep", "sweep", options, command),
}


def _check_name(parser: argparse.ArgumentParser, own: Sequence[str]) -> None:
    if own[0].startswith("-") or own[0] in COMMANDS:
        return
    close = get_close_matches(own[0], COMMANDS, n=1)
    nearest = f"; did you mean '{close[0]}'?" if close else ""
    parser.error(f"unknown command '{own[0]}'; accepted are {', '.join(COMMANDS)}{nearest}")


def _check_order(parser: argparse.ArgumentParser, own: Sequence[str], command: Sequence[str]) -> None:
    """Refuse options before the recipe: those with several values would take it for one of them."""
    if own[0] not in (*CHILD_COMMANDS, "sweep") or own[1:2] not in (["--set"], ["--vary"]):
        return
    recipe = next((word for word in own[2:] if word.endswith((".yaml", ".yml"))), "RECIPE.yaml")
    options = [word for word in own[1:] if word != recipe]
    corrected = shlex.join([parser.prog, own[0], recipe, *options, "--", *(command or ["COMMAND"])])
    parser.error(f"RECIPE.yaml comes first, before {own[1]}, as in: {corrected}")


def _check_unknown(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    own: Sequence[str],
    command: Sequence[str],
    unknown: Sequence[str],
) -> None:
    """Refuse what no option took; the usual reason is a command without the ``--`` before it."""
    if not unknown:
        return
    if options.command in (*CHILD_COMMANDS, "sweep") and not command:
        cut = own.index(options.recipe) + 1
        if list(own[cut:]) == list(unknown) and not unknown[0].startswith("-"):
            corrected = shlex.join([parser.prog, *own[:cut], "--", *unknown])
            parser.error(f"the command to run, '{shlex.join(unknown)}', comes behind --, as in: {corrected}")
    parser.error(f"unrecognized arguments: {' '.join(unknown)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-compress",
        description="Compress an untouched PyTorch Lightning project.",
        epilog="exit codes: 0 done, 1 a check failed (tolerance, parity), 2 bad usage, 130 interrupted",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_run(commands)
    _add_plan(commands)
    for name, what in zip(LIGHTNING_COMMANDS, ("train", "validate", "test", "predict with"), strict=True):
        commands.add_parser(name, help=f"{what} a LightningCLI project, with our callbacks by their short names")
    _add_export(commands)
    _add_report(commands)
    _add_recipes(commands)
    _add_sensitivity(commands)
    _add_sweep(commands)
    return parser


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _add_demo(commands: Commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="distil, prune, quantise, export and measure a small network on real data",
        description="Train a teacher, a small student alone, distilled, and distilled, pruned and quantised, on real "
        "data without a download; export them, check the files, print the before/after table.",
        allow_abbrev=False,
    )
    demo.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits", help="default: %(default)s")
    demo.add_argument("--out", default="compress-demo", help="directory for all files; default: %(default)s")
    demo.add_argument("--structured", action="store_true", help="make the teacher smaller too, filter by filter")


def _add_run(commands: Commands) -> None:
    run = commands.add_parser(
        "run",
        help="attach a recipe to the fit of an untouched script",
        usage="%(prog)s [-h] RECIPE.yaml [--set KEY=VALUE ...] -- COMMAND ...",
        description="Run a training command with the recipe's callbacks attached to its fit, then export, check and "
        "report. The command's exit code is passed on if it is not 0.",
        allow_abbrev=False,
    )
    _add_recipe(run)


def _add_plan(commands: Commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="say what a recipe would do to an untouched script; trains nothing",
        usage="%(prog)s [-h] RECIPE.yaml [--set KEY=VALUE ...] -- COMMAND ...",
        description="Start a training command up to its first batch, and say which layers each callback takes, what "
        "the file and a step will cost, and what looks wrong. Trains nothing, and writes nothing.",
        allow_abbrev=False,
    )
    _add_recipe(plan)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="callbacks, export and apply_to")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change the recipe: DCILCallback.sparsity=0.8, callbacks[0].init_args.sparsity=0.8, export.path=a.onnx",
    )


def _add_export(commands: Commands) -> None:
    export = commands.add_parser(
        "export",
        help="write a checkpoint as an ONNX file, checked against it",
        usage="%(prog)s [-h] CKPT (--class pkg.Module | --config C.yaml ...) [options]",
        description="Load a checkpoint, write its network as an ONNX file, and compare the file with it; with --config "
        "and --metric in the project's own validation too. What fails a check is not kept.",
        allow_abbrev=False,
    )
    export.add_argument("checkpoint", metavar="CKPT", help="as Lightning has written it")
    _add_project(export)
    export.add_argument(
        "--init-args", metavar="YAML", help="with --class: arguments that the checkpoint does not hold, {width: 16}"
    )
    export.add_argument("--network", metavar="NAME", help="dotted name of the network inside the module")
    export.add_argument(
        "--precision",
        choices=("fp32", "int8", "int4"),
        default="fp32",
        help="default: %(default)s; "
        "integers have the scales of the checkpoint, or, with --config, such as are found with the training data",
    )
    export.add_argument("--out", metavar="FILE.onnx", help="default: the checkpoint's name and the precision, here")
    sample = export.add_mutually_exclusive_group()
    sample.add_argument("--sample", metavar="FILE", help="the network's input, .pt or .npy")
    sample.add_argument("--shape", metavar="1,3,32,32", help="of a random input")
    export.add_argument("--metric", metavar="NAME", help="of the validation, measured in module and file")
    export.add_argument(
        "--tolerance",
        metavar="X",
        type=float,
        help="how far --metric may move in the file, or worsen by calibrating",
    )


def _add_project(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", metavar="C.yaml", action="append", default=[], help="of the LightningCLI project; more overrule it")
    add("--class", dest="module_class", metavar="pkg.Module", help="the LightningModule, where no config names it")
    add("--data-class", metavar="pkg.Data", help="the LightningDataModule, likewise")


def _add_report(commands: Commands) -> None:
    report = commands.add_parser(
        "report",
        help="show reports again; several make one Pareto table",
        description="Show the report that a run has left below a directory, or merge several into one Pareto table: "
        "which of the compressed models no other one beats in cost and metric at once. Of each folder the newest "
        "report is read.",
        allow_abbrev=False,
    )
    report.add_argument("directories", metavar="DIR", nargs="+", help="where runs have left their reports")
    report.add_argument("--metric", metavar="NAME", help="default: one that all reports have")
    report.add_argument("--mode", choices=("min", "max"), help="whether it should be small or large; default: its name")
    report.add_argument("--cost", choices=("bytes", "bytes_compressed", "latency", "macs"), help="default: bytes")
    report.add_argument(
        "--out", metavar="DIR", help="where to write .json, .md and .html; default: compression_pareto for several"
    )
    report.add_argument("--wandb", metavar="PROJECT", help="log the Pareto table to Weights & Biases as well")


def _add_recipes(commands: Commands) -> None:
    recipes = commands.add_parser("recipes", help="list the recipes that come with the package, or print one")
    recipes.add_argument("name", metavar="NAME", nargs="?")


def _add_sensitivity(commands: Commands) -> None:
    sensitivity = commands.add_parser(
        "sensitivity",
        help="prune or quantise each layer alone, and suggest a recipe",
        description="Change one layer of a checkpoint at a time, run the project's own validation, and tell how much "
        "worse it is: a table, a picture, and a recipe for a budget. A run that was stopped goes on.",
        allow_abbrev=False,
    )
    add = sensitivity.add_argument
    add("checkpoint", metavar="CKPT", help="what Lightning saved")
    _add_project(sensitivity)
    methods = ("bits", "sparsity", "filters")
    what = "bits, sparsity, filters; default: the first two"
    add("--method", metavar="METHOD", nargs="+", action="extend", choices=methods, help=what)
    add(
        "--levels",
        metavar="METHOD=A,B",
        nargs="+",
        action="extend",
        default=[],
        help="default: bits=8,4,3,2 sparsity=.5,.75,.9 filters=.25,.5,.75",
    )
    add("--metric", metavar="NAME", help="of the validation; default: the first such as an accuracy, else a loss")
    add("--mode", choices=("min", "max"), help="which is better; default: by the name of the metric")
    add(
        "--layers",
        metavar="LAYER",
        nargs="+",
        action="extend",
        help="selectors; default: all convolutions and linear layers",
    )
    add("--exclude", metavar="LAYER", nargs="+", action="extend", help="selectors of layers that are left alone")
    add(
        "--budget",
        metavar="WHAT",
        help="for the recipe: bytes=25%%, bytes=200kB or macs=50%%; default: bytes=25%%, macs=50%%",
    )
    add("--minutes", metavar="N", type=float, help="stop after so long; default: when all is measured")
    add("--limit-batches", metavar="N", type=int, help="batches of each validation; default: as the config says")
    add("--out", metavar="DIR", default="sensitivity", help="default: %(default)s")
    add("--restart", action="store_true", help="throw away what was measured before")


def _add_sweep(commands: Commands) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="write a Weights & Biases sweep over the fields of a recipe",
        usage="%(prog)s [-h] RECIPE.yaml [--vary KEY=min..max ...] [--metric NAME] [--method METHOD] [-- COMMAND ...]",
        description="Write the configuration of a sweep whose runs are `lightning-compress run` with other values in "
        "the recipe. Nothing is started. Without a COMMAND, python train.py stands in the file.",
        allow_abbrev=False,
    )
    sweep.add_argument("recipe", metavar="RECIPE.yaml", help="callbacks, export and apply_to")
    sweep.add_argument(
        "--vary",
        metavar="KEY",
        nargs="+",
        action="extend",
        default=[],
        help="what to vary: DCILCallback.sparsity=0.5..0.95, PTQCallback.observer=minmax,mse, or a key alone for its "
        "usual range; default: all that have one",
    )
    sweep.add_argument("--metric", help="default: that of the exported file, if the recipe says export.metric")
    sweep.add_argument("--goal", choices=("maximize", "minimize"), help="default: by the metric's name")
    sweep.add_argument("--method", choices=("bayes", "random", "grid"), default="bayes", help="default: %(default)s")
    sweep.add_argument("--out", metavar="FILE", default="sweep.yaml", help="default: %(default)s")


if __name__ == "__main__":
    sys.exit(main())
