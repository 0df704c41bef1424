"""What a recipe will come to, as far as the first step of its fit shows: layers, sizes of files, cost of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from lightning_compress.callbacks.base import CompressionCallback, callbacks_of
from lightning_compress.callbacks.export import ExportCallback
from lightning_compress.callbacks.intents import Intent
from lightning_compress.callbacks.structured import StructuredPruningCallback
from lightning_compress.export.errors import first_line
from lightning_compress.mechanisms.capture import NetworkCall
from lightning_compress.mechanisms.controller import StepRecord
from lightning_compress.mechanisms.isolation import evaluating
from lightning_compress.mechanisms.selection import find_module, plain_name
from lightning_compress.mechanisms.sharding import class_name
from lightning_compress.mechanisms.teacher import Teacher
from lightning_compress.report.measure import count_parameters, macs_by_layer, single_sample

BYTES = {"fp32": 4.0, "int8": 1.0, "int4": 0.5}
"""Of a weight in a file."""
FAR = 100.0
"""A term that is so many times larger, or smaller, than the task loss is worth a warning."""


def forecast(trainer: Any, pl_module: Any, step: StepRecord, warned: Sequence[str]) -> dict[str, Any]:
    """What the callbacks of this package will do in a fit, and what that costs.

    Args:
        trainer: The Trainer, after its first training step.
        pl_module: The module that is trained; as the callbacks foresee it, where they do.
        step: What the first step computed.
        warned: What was warned of so far.

    Returns:
        Numbers, words, lists and dicts: ``module``, ``parameters``, ``macs`` (of one sample; None where they cannot be
        counted), ``callbacks``, ``files``, ``step``, ``losses``, ``warnings``. Where filters went before the first
        step, sizes are those before; shares of callbacks that work on what is left are shares of that.
    """
    ours = callbacks_of(trainer)
    layers, problems = _macs(trainer, pl_module, ours)
    macs = sum(layers.values()) or None
    parameters = count_parameters(pl_module)
    went = next((own.went for own in ours if isinstance(own, StructuredPruningCallback) and own.went is not None), None)
    whole = parameters if went is None else parameters + went.parameters[0] - went.parameters[1]
    before = layers if went is None else layers | {name: own.macs[0] for name, own in went.layers.items()}
    callbacks = {}
    for callback in ours:
        intent, takes_away = callback.intent(trainer, pl_module), isinstance(callback, StructuredPruningCallback)
        total = whole if takes_away else parameters
        callbacks[callback.name] = intent.to_dict() | {
            "share_of_parameters": intent.elements / total if total else None,
            "share_of_macs": _share(before if takes_away else layers, intent) if macs else None,
        }
    losses = {name: float(term) for name, term in step.terms.items()}
    task = None if step.task_loss is None else float(step.task_loss)
    return {
        "module": class_name(pl_module),
        "parameters": whole,
        "macs": sum(before.values()) if macs else None,
        "callbacks": callbacks,
        "files": [_file(callback, ours, parameters) for callback in ours if isinstance(callback, ExportCallback)],
        "step": _step(trainer, ours, step, macs),
        "losses": {"task": task, "terms": losses},
        "warnings": [*warned, *problems, *_strengths(task, losses, warned)],
    }


def _macs(trainer: Any, pl_module: nn.Module, ours: Sequence[CompressionCallback]) -> tuple[dict[str, int], list[str]]:
    """Name of each layer to its multiply-accumulates for one sample, and why there are none."""
    seen = next((own for callback in ours if (own := callback.last_sample()) is not None), None)
    if seen is None:
        return {}, ["the network was not found in the first step, so multiply-accumulates are not counted"]
    network = find_module(pl_module, seen.network, argument="network")
    try:
        args, kwargs = single_sample((seen.args, dict(seen.kwargs)))
        return _counted(trainer, pl_module, lambda: network(*args, **kwargs)), []
    except Exception as error:  # some networks take no single sample
        return {}, [f"multiply-accumulates are not counted: {type(error).__name__}: {first_line(error)}"]


def _counted(trainer: Any, root: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    with ExitStack() as stack:
        stack.enter_context(evaluating(root))
        stack.enter_context(trainer.precision_plugin.train_step_context())
        return {plain_name(name): macs for name, macs in macs_by_layer(root, run).items()}


def _share(layers: Mapping[str, int], intent: Intent) -> float:
    """That of the layers which a callback takes, and of what lies in them."""
    taken = [
        macs for name, macs in layers.items() if any(name == own or name.startswith(f"{own}.") for own in intent.takes)
    ]
    return sum(taken) / sum(layers.values())


def _file(callback: ExportCallback, ours: Sequence[CompressionCallback], parameters: int) -> dict[str, Any]:
    """The size of what was tried in the first step, less the weights that are still to be taken away; a graph stays."""
    share, tried = math.prod(other.foreseen_share for other in ours), callback.trial_bytes
    gone = (1 - share) * parameters * BYTES[callback.precision]
    return {
        "path": callback.path,
        "precision": callback.precision,
        "bytes": None if tried is None else round(max(tried - gone, tried * share)),
        "compressed": None if callback.trial_compressed is None else round(callback.trial_compressed * share),
    }


def _step(trainer: Any, ours: Sequence[CompressionCallback], step: StepRecord, macs: int | None) -> dict[str, Any]:
    """Passes of a step, and its cost: forward counts once, backward twice, and a teacher has no backward."""
    teachers = sum(count for _, count in step.teachers)
    counts = [_teacher_macs(trainer, ours, teacher) for teacher, _ in step.teachers]
    times = None
    if macs is not None and None not in counts:
        own = sum((each or 0) * count for each, (_, count) in zip(counts, step.teachers, strict=True))
        times = step.passes + own / (3 * macs)
    return {"passes": step.passes, "teachers": teachers, "times": times if macs else None}


def _teacher_macs(trainer: Any, ours: Sequence[CompressionCallback], teacher: Teacher) -> int | None:
    """Multiply-accumulates of a teacher for one sample; None where they cannot be counted."""
    captures = [own.student_capture for own in ours if own.teacher_network is teacher.module]
    call = next((own.last_call for own in captures if own is not None and own.last_call is not None), None)
    if call is None:
        return None
    try:
        args, kwargs = single_sample((call.args, dict(call.kwargs)))
        run = lambda: teacher(NetworkCall(args, kwargs, None))  # noqa: E731
        return sum(_counted(trainer, teacher.module, run).values())
    except Exception:  # whatever the teacher raises with one sample
        return None


def _strengths(task: float | None, terms: Mapping[str, float], warned: Sequence[str]) -> list[str]:
    """Terms beside which the task loss is nothing, or the other way round."""
    found = []
    for name, term in terms.items():
        if task is None or any(f"'{name}': in the first batch the term" in told for told in warned):
            continue
        if abs(term) > FAR * abs(task):
            found.append(
                f"the term of '{name}' is {term:.3g} in the first batch, beside a weighted task loss of {task:.3g}, so "
                "the network will learn little else; give it a smaller weight"
            )
        elif abs(term) < abs(task) / FAR:
            found.append(
                f"the term of '{name}' is {term:.3g} in the first batch, beside a weighted task loss of {task:.3g}, so "
                "it will hardly be felt; give it a larger weight"
            )
    return found
