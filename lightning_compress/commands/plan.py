"""The parent's side of ``lightning-compress plan``: start the command up to its first batch, and show what it told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_compress.commands.exits import DONE, FAILED
from lightning_compress.commands.foresight import PLANNED
from lightning_compress.commands.run import Event, attached, ended_with, failures_of, nothing_done
from lightning_compress.mechanisms.selection import listing
from lightning_compress.report import units
from lightning_compress.report.cells import shown_path

LABEL = 10  # characters


def plan(recipe: str, command: Sequence[str], *, settings: Sequence[str] = ()) -> int:
    """Say what a recipe would do to the fit of a command; nothing is trained, and nothing written.

    Args:
        recipe: The YAML file.
        command: The program and its arguments.
        settings: ``KEY=VALUE`` each, which change the recipe.

    Returns:
        0: the plan was made and shown. 1: the recipe cannot work, or no fit took it. 2: nothing was started, or no
        Trainer of the command knows this package. Otherwise the command's own exit code.

    Example:
        >>> plan("missing.yaml", ["python", "train.py"])
        2
    """
    return attached("plan", recipe, command, settings, outcome, is_told)


def is_told(events: Sequence[Event]) -> bool:
    """Whether the child has told what it was started for; it ends after that.

    Args:
        events: As the child wrote them.

    Returns:
        Whether there is a plan, or the reason why there is none.

    Example:
        >>> is_told([{"event": "factory"}]), is_told([{"event": "failed", "message": "OSError: the disk is full"}])
        (False, True)
    """
    return any(event["event"] in ("planned", "failed") for event in events)


def outcome(events: Sequence[Event], code: int) -> tuple[int, str]:
    """What the events in the child and its exit code come to.

    Args:
        events: As the child wrote them.
        code: The child's exit code; it says nothing once there is a plan. A process that we ended has one of its own.

    Returns:
        The exit code of ``plan``, and the plan, or one line for people.

    Example:
        >>> outcome([], 3)
        (3, 'the command ended with exit code 3')
    """
    found = next((event for event in events if event["event"] == "planned"), None)
    if found is not None:
        return DONE, "\n".join(lines_of(found))
    failures = failures_of(events)
    if code not in (0, PLANNED):
        return code, "; ".join([ended_with(code), *failures])
    return (FAILED, "; ".join(failures)) if failures else nothing_done(events)


def lines_of(found: Mapping[str, Any]) -> list[str]:
    """A plan as people read it.

    Args:
        found: What :func:`lightning_compress.commands.forecast.forecast` gave.

    Returns:
        Lines.
    """
    macs = "" if found["macs"] is None else f", {units.count(found['macs'])} multiply-accumulates a sample"
    head = f"what the recipe would do to {found['module']} ({units.count(found['parameters'])} parameters{macs})"
    return [
        head,
        *(line for name, intent in found["callbacks"].items() for line in _callback(name, intent)),
        *_section("files", (_file(file) for file in found["files"])),
        *_section("each step", [_step(found["step"])]),
        *_section("losses of the first batch, with their weights", _losses(found["losses"])),
        *_section("warnings", found["warnings"]),
        "",
        "nothing was trained, and nothing written",
    ]


def _section(title: str, lines: Any) -> list[str]:
    found = [f"  {line}" for line in lines]
    return ["", title, *found] if found else []


def _callback(name: str, intent: Mapping[str, Any]) -> list[str]:
    return _section(f"{name} ({intent['technique']})", [f"{what:{LABEL}}{text}" for what, text in _said(intent)])


def _said(intent: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Label and text of each line about a callback."""
    if intent["takes"]:
        yield "takes", f"{_layers(intent['takes'])}{_shares(intent)}"
    reasons: dict[str, list[str]] = {}
    for layer, reason in intent["left"].items():
        reasons.setdefault(reason, []).append(layer)
    for reason, layers in reasons.items():
        yield "leaves", f"{_layers(layers)}: {reason}"
    if intent["student"]:
        yield "student", " to ".join(f"'{name}'" if name else "the module itself" for name in intent["student"])
    if intent["pairs"]:
        yield "pairs", ", ".join(f"'{student}' from '{teacher}'" for student, teacher in intent["pairs"])
    if intent["aims"]:
        yield "aims", ", ".join(f"{aim} {_value(value)}" for aim, value in intent["aims"].items())
    for note in intent["notes"]:
        yield "note", note


def _layers(names: Sequence[str]) -> str:
    if len(names) == 1:
        return listing(names) if names[0] else "the module itself"
    return f"{len(names)} layers, {listing(names, most=4)}"


def _shares(intent: Mapping[str, Any]) -> str:
    """How much of the module the layers are."""
    shares = [("parameters", intent["share_of_parameters"]), ("multiply-accumulates", intent["share_of_macs"])]
    said = [f"{units.share(share)} of the {what}" for what, share in shares if share]
    return f" ({', '.join(said)})" if said else ""


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _file(file: Mapping[str, Any]) -> str:
    size = "of unknown size" if file["bytes"] is None else f"about {units.size(file['bytes'])}"
    compressed = "" if file["compressed"] is None else f", {units.size(file['compressed'])} compressed"
    return f"{shown_path(file['path'])}  {file['precision']}, {size}{compressed}"


def _step(step: Mapping[str, Any]) -> str:
    passes, teachers = step["passes"], step["teachers"]
    runs = {1: "once", 2: "twice"}.get(passes, f"{passes} times")
    more = "" if not teachers else f", with {teachers} forward{'' if teachers == 1 else 's'} of a teacher"
    if step["times"] is None or (passes, teachers) == (1, 0):
        return f"the step runs {runs}{more or ', as it is'}"
    return f"the step runs {runs}{more}: about {step['times']:.3g} times the multiply-accumulates of a plain one"


def _losses(losses: Mapping[str, Any]) -> list[str]:
    """Nothing where there is the task loss alone."""
    if losses["task"] is None or not losses["terms"]:
        return []
    values = {"task": losses["task"], **losses["terms"]}
    width = max(map(len, values))
    return [f"{name:{width}}  {value:.4g}" for name, value in values.items()]
