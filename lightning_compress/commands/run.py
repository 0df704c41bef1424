"""The parent's side of ``lightning-compress run``: check the recipe, start the command, say how it went.

The parent never sees a module: export, evaluation and report happen in the child, which leaves a file of events. What
``lightning-compress plan`` does alike is here too.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_compress.commands.attachment import Events, Order
from lightning_compress.commands.exits import DONE, FAILED, USAGE, ended
from lightning_compress.commands.recipes import SUFFIX, shipped
from lightning_compress.export.evaluate import RUN_VARIABLE
from lightning_compress.mechanisms.drafts import remove_abandoned, write_whole
from lightning_compress.mechanisms.selection import did_you_mean
from lightning_compress.recipe import Recipe, check_outputs, export_paths, load_recipe
from lightning_compress.recipe.file import naming, read_text
from lightning_compress.report.cells import shown_path
from lightning_compress.report.units import metric as shown_metric
from lightning_compress.report.units import size

PROGRAMS = ("python", "python3", "torchrun", "bash", "sh", "env")  # what a training is started with
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
GRACE = 10.0
"""Seconds that a command has to end in, when nothing more is expected of it."""
POLL = 0.2
Event = dict[str, Any]


def run(recipe: str, command: Sequence[str], *, settings: Sequence[str] = ()) -> int:
    """Run a command with a recipe attached to its fit.

    Args:
        recipe: The YAML file.
        command: The program and its arguments.
        settings: ``KEY=VALUE`` each, which change the recipe.

    Returns:
        0: done, and every check passed. 1: a check failed, or no fit took the recipe. 2: nothing was started, or no
        Trainer of the command knows this package. Otherwise the command's own exit code.

    Example:
        >>> run("missing.yaml", ["python", "train.py"])
        2
    """
    return attached("run", recipe, command, settings, outcome)


def attached(
    mode: str,
    recipe: str,
    command: Sequence[str],
    settings: Sequence[str],
    comes_to: Callable[[Sequence[Event], int], tuple[int, str]],
    is_over: Callable[[Sequence[Event]], bool] | None = None,
) -> int:
    """Start a command with a recipe attached to it, wait for its end, and say how it went.

    Args:
        mode: "run" or "plan".
        recipe: The YAML file.
        command: The program and its arguments.
        settings: ``KEY=VALUE`` each, which change the recipe.
        comes_to: From the events in the child and its exit code to ours, and what people are told.
        is_over: Whether nothing more is expected after the events so far: a command that goes on is ended; None: the
            command is waited for.

    Returns:
        The exit code.

    Example:
        >>> attached("plan", "missing.yaml", ["python", "train.py"], [], outcome)
        2
    """
    try:
        _check_command(command, mode)
        loaded, text = checked_recipe(recipe, command, settings)
    except ValueError as error:  # RecipeError is one
        return ended(mode, USAGE, str(error))
    with tempfile.TemporaryDirectory(prefix="lightning-compress-", ignore_cleanup_errors=True) as folder:
        events = Events(os.path.join(folder, "events.jsonl"))
        called = shlex.join(
            ["lightning-compress", mode, recipe, *(["--set", *settings] if settings else []), "--", *command]
        )
        order = Order(recipe, os.getcwd(), events.path, settings, mode, called)
        try:
            write_whole(order.held, text)
        except OSError as error:
            return ended(mode, USAGE, f"'{order.held}' cannot be written, and nothing was started: {error.strerror}")
        try:
            with _no_drafts(loaded):
                quiet = {"WANDB_MODE": "disabled"} if mode == "plan" else {}  # if the script itself begins a run
                environment = {**quiet, **os.environ, RUN_VARIABLE: order.to_json()}
                over = None if is_over is None else lambda: is_over(events.read())
                code, interrupted = _exit_code(command, environment, over)
        except OSError as error:
            return ended(mode, USAGE, f"'{command[0]}' cannot be started: {error.strerror}")
        code, message = comes_to(events.read(), code)
        return ended(mode, code, f"interrupted; {message}" if interrupted else message)


def outcome(events: Sequence[Event], code: int) -> tuple[int, str]:
    """What the events in the child and its exit code come to.

    Args:
        events: As the child wrote them.
        code: The child's exit code.

    Returns:
        The exit code of ``run``, and one line for people.

    Example:
        >>> outcome([], 3)
        (3, 'the command ended with exit code 3')
    """
    done, failures = [event for event in events if event["event"] == "done"], failures_of(events)
    exports = [export for event in done for export in event["exports"]]
    failures += [f"{shown_path(export['path'])}: {export['failure']}" for export in exports if export["failure"]]
    failures += [check for event in done for check in event.get("checks", [])]
    written = _written(exports, [report for event in done for report in event["reports"]])
    if code != 0:
        before = [f"before that, {written}"] if done else []
        return code, "; ".join([ended_with(code), *failures, *before])
    if failures:
        return FAILED, "; ".join(failures)
    return (DONE, written) if done else nothing_done(events)


def failures_of(events: Sequence[Event]) -> list[str]:
    """What went wrong in fits, a line each.

    Args:
        events: As the child wrote them.

    Returns:
        The messages.

    Example:
        >>> failures_of([{"event": "failed", "message": "OSError: the disk is full"}])
        ['the fit failed: OSError: the disk is full']
    """
    return [f"the fit failed: {' '.join(event['message'].split())}" for event in events if event["event"] == "failed"]


def nothing_done(events: Sequence[Event]) -> tuple[int, str]:
    """Why a command that ended well did not do what it was started for.

    Args:
        events: As the child wrote them.

    Returns:
        The exit code, and one line for people.

    Example:
        >>> nothing_done([{"event": "factory"}])
        (1, 'the command ended well, but no fit took the recipe: its Trainer never fitted')
    """
    if not any(event["event"] == "factory" for event in events):
        return USAGE, (
            "the command ended well, but no Trainer in it asked for the recipe: either it made no Trainer at all, or "
            "it ran in another Python, where lightning-compress is not installed"
        )
    fitted = [event for event in events if event["event"] == "fit"]
    fitted = [event for event in fitted if event["script"] == fitted[0]["script"]]  # others repeat it
    if any(event["attached"] for event in fitted):
        return FAILED, "the command ended well, but the fit with the recipe never came to its end"
    fits = ", ".join(event["module"] for event in fitted)
    seen = f"the fits were, in order: {fits}; see apply_to in the recipe" if fits else "its Trainer never fitted"
    return FAILED, f"the command ended well, but no fit took the recipe: {seen}"


def ended_with(code: int) -> str:
    """An exit code in words.

    Args:
        code: Of the command, not 0.

    Returns:
        With the name of the signal, if it was one.

    Example:
        >>> ended_with(3), ended_with(137)
        ('the command ended with exit code 3', 'the command ended with exit code 137 (SIGKILL)')
    """
    names = {128 + number: number.name for number in signal.Signals}
    return f"the command ended with exit code {code}" + (f" ({names[code]})" if code in names else "")


def _check_command(command: Sequence[str], mode: str) -> None:
    if not command:
        raise ValueError(
            f"the command to run is missing; it comes behind --, as in: lightning-compress {mode} recipe.yaml -- "
            "python train.py"
        )
    if RUN_VARIABLE in os.environ:
        raise ValueError(
            f"it was started by a command of `lightning-compress run` or `plan`, which has the environment variable "
            f"{RUN_VARIABLE}; only one of them can attach a recipe: start this one by itself, or unset the variable"
        )
    if shutil.which(command[0]) is None:
        is_script = command[0].endswith(".py")
        nearest = did_you_mean(command[0], filter(shutil.which, PROGRAMS))
        hint = f"; to run a script: python {command[0]}" if is_script else nearest
        raise ValueError(f"'{command[0]}' is not a program that can be run here{hint}")


def checked_recipe(recipe: str, command: Sequence[str], settings: Sequence[str] = ()) -> tuple[Recipe, str]:
    """The recipe, and the places of its files, checked with the modules that the command will find.

    Args:
        recipe: The YAML file.
        command: The program and its arguments; its script is not imported.
        settings: ``KEY=VALUE`` each, which change the recipe.

    Returns:
        The recipe, and the text of its file, which is read once: it may be a pipe.

    Raises:
        ValueError: If it cannot be used, or its files cannot be written.
    """
    if not os.path.exists(recipe):
        _refuse_name(recipe)
    with naming(recipe):
        text = read_text(recipe)
    scripts = [Path(argument) for argument in command if argument.endswith(".py") and os.path.isfile(argument)]
    roots = [str(script.parent.absolute()) for script in scripts] or [os.getcwd()]
    unseen = ["__main__", *(script.stem for script in scripts)]
    unseen += [after for option, after in pairwise(command) if option == "-m"]
    before = list(sys.path)
    sys.path[:0] = roots
    try:
        loaded = load_recipe(recipe, settings=settings, unseen=unseen, text=text)
    finally:
        sys.path[:] = before  # what is imported may have added to it
    check_outputs(loaded)
    return loaded, text


def _exit_code(
    command: Sequence[str], environment: dict[str, str], is_over: Callable[[], bool] | None
) -> tuple[int, bool]:
    """Run the command to its end, whatever signals come; a child that a signal ended has 128 and its number.

    Whether it was interrupted is said too. Once ``is_over``, a command that does not end is ended, with all that it
    has started, and has 0; for that it gets a group of its own.
    """
    child: subprocess.Popen[bytes] | None = None
    came: list[int] = []
    early: list[int] = []  # before there was a child to send them to

    def forward(number: int, frame: object) -> None:
        came.append(number)
        if child is None:
            early.append(number)
        elif number == signal.SIGINT and is_over is not None:  # the terminal does not reach that group
            _send_to_group(child, number)
        elif number != signal.SIGINT or not _in_foreground():
            child.send_signal(number)

    taken = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]  # as under nohup
    handlers = {number: signal.signal(number, forward) for number in taken}
    try:
        child = subprocess.Popen(command, env=environment, start_new_session=is_over is not None)
        for number in early:
            child.send_signal(number)
        code = child.wait() if is_over is None else _wait_or_end(child, is_over)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    interrupted = not {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}.isdisjoint(came)
    return code if code >= 0 else 128 - code, interrupted


def _wait_or_end(child: subprocess.Popen[bytes], is_over: Callable[[], bool]) -> int:
    """Wait for a child; a pool, for one, waits without end for a worker of it that has ended."""
    left = GRACE
    while left > 0:
        with suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=POLL)
        if is_over():
            left -= POLL
    _send_to_group(child, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        child.wait(timeout=GRACE)
    _send_to_group(child, signal.SIGKILL)
    child.wait()
    return 0


def _send_to_group(child: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _in_foreground() -> bool:
    """Whether this process group owns a terminal, whose Ctrl-C then goes to the child as well without our help."""
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


@contextmanager
def _no_drafts(recipe: Recipe) -> Iterator[None]:
    """Remove what a killed child left of a file it was writing."""
    try:
        yield
    finally:
        for path in export_paths(recipe):
            remove_abandoned(Path(path))


def _written(exports: Sequence[dict[str, Any]], reports: Sequence[str]) -> str:
    parts = []
    for export in exports:
        metric = ""
        if export["in_file"] is not None and export["in_module"] is not None:
            in_file, in_module = shown_metric(export["in_file"]), shown_metric(export["in_module"])
            metric = f"; {export['metric']} {in_file} in the file, {in_module} in the module"
        path = shown_path(export["path"])
        if export["bytes"] is not None:
            written = f"wrote {path} ({size(export['bytes'])}{metric})"
            parts.append(written if export["kept"] else f"checked {path}, and did not keep it (fast_dev_run)")
    parts += [f"report in {shown_path(report)}" for report in reports]
    return ", ".join(parts) or "the recipe was attached to the fit; it writes no file"


def _refuse_name(recipe: str) -> None:
    """Say what to do with the name of a recipe that ships, where there is no such file."""
    name = Path(recipe).name.removesuffix(SUFFIX)
    if name in shipped():
        raise ValueError(
            f"'{recipe}' is no file here, but a recipe of this package; write it into one, and say there what it asks "
            f"for: lightning-compress recipes {name} > {name}.yaml"
        )
    if near := did_you_mean(name, shipped()):
        raise ValueError(f"'{recipe}' is no file here{near} lightning-compress recipes NAME writes one of this package")
