"""The command ``lightning-compress``; heavy modules are imported by the subcommand that needs them."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from lightning_compress import __version__

COMMANDS = ("demo", "run")
USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        0: done. 1: a check failed. 2: bad usage. 130: the demo was interrupted.

    Example:
        >>> main(["--version"])
        lightning-compress ...
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    own, command = arguments[:cut], arguments[cut + 1 :]
    parser = _parser()
    if not own:
        parser.print_help(sys.stderr)
        return USAGE
    try:
        _check_name(parser, own)
        options, unknown = parser.parse_known_args(own)
        _check_unknown(parser, options, own, command, unknown)
        if command and options.command != "run":
            parser.error(f"'{options.command}' takes no command behind --")
    except SystemExit as stop:  # argparse has written what it had to say
        return stop.code if isinstance(stop.code, int) else 0
    if options.command == "run":
        from lightning_compress.run import run

        return run(options.recipe, command)
    from lightning_compress.demo import run_demo

    return run_demo(data=options.data, out=options.out, structured=options.structured)


def _check_name(parser: argparse.ArgumentParser, own: Sequence[str]) -> None:
    if own[0].startswith("-") or own[0] in COMMANDS:
        return
    close = get_close_matches(own[0], COMMANDS, n=1)
    nearest = f"; did you mean '{close[0]}'?" if close else ""
    parser.error(f"unknown command '{own[0]}'; accepted are {', '.join(COMMANDS)}{nearest}")


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
    if options.command == "run" and not command:
        cut = own.index(options.recipe) + 1
        if list(own[cut:]) == list(unknown) and not unknown[0].startswith("-"):
            corrected = shlex.join([parser.prog, *own[:cut], "--", *unknown])
            parser.error(f"the command to run, '{shlex.join(unknown)}', comes behind --, as in: {corrected}")
    parser.error(f"unrecognized arguments: {' '.join(unknown)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-compress",
        description="Compress an untouched PyTorch Lightning project.",
        epilog="exit codes: 0 done, 1 a check failed (tolerance, parity), 2 bad usage",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
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
    run = commands.add_parser(
        "run",
        help="attach a recipe to the fit of an untouched script",
        usage="%(prog)s [-h] RECIPE.yaml -- COMMAND ...",
        description="Run a training command with the recipe's callbacks attached to its fit, then export, check and "
        "report. The command's exit code is passed on if it is not 0.",
        allow_abbrev=False,
    )
    run.add_argument("recipe", metavar="RECIPE.yaml", help="callbacks, export and apply_to")
    return parser
