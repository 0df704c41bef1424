"""The command ``lightning-compress sensitivity``."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from lightning_compress import _compat
from lightning_compress.commands.exits import DONE, FAILED, INTERRUPTED, USAGE, UsageError, checking, ended
from lightning_compress.commands.project import ProjectError, load_trained
from lightning_compress.commands.sensitivity.budgets import QUANTITIES, Budget, parsed_budget
from lightning_compress.commands.sensitivity.changes import Change, applied, parsed_levels, planned
from lightning_compress.commands.sensitivity.costs import Costs, costs_of
from lightning_compress.commands.sensitivity.coupling import Coupling, find_coupling
from lightning_compress.commands.sensitivity.findings import Findings, title_of, to_console, to_json, to_markdown
from lightning_compress.commands.sensitivity.journal import NAME, Journal, files_hash
from lightning_compress.commands.sensitivity.layers import Layer, find_layers
from lightning_compress.commands.sensitivity.metrics import choose_metric
from lightning_compress.commands.sensitivity.plot import draw
from lightning_compress.commands.sensitivity.suggest import Suggestion, suggest
from lightning_compress.export.errors import EvaluationError
from lightning_compress.export.evaluate import RepeatedValidation, repeatedly
from lightning_compress.export.weights import read_checkpoint
from lightning_compress.mechanisms.channel_graph import StructureError
from lightning_compress.mechanisms.drafts import draft_of, write_whole
from lightning_compress.mechanisms.selection import listing
from lightning_compress.mechanisms.signs import sign
from lightning_compress.mechanisms.weights import select_weights
from lightning_compress.report.cells import shown_path
from lightning_compress.report.render import terminal_width
from lightning_compress.tracking.exported import file_digest

METHODS = ("bits", "sparsity")
"""What is measured if nothing else is asked for."""


@dataclass(frozen=True)
class _Request:
    """What was asked for, checked as far as that goes without the project."""

    options: argparse.Namespace
    levels: Mapping[str, Sequence[float]]
    budget: Budget | None
    folder: Path

    @classmethod
    def of(cls, options: argparse.Namespace) -> _Request:
        methods = list(dict.fromkeys(options.method or METHODS))
        levels = parsed_levels(methods, options.levels)
        budget = None if options.budget is None else parsed_budget(options.budget)
        if budget is not None and not set(QUANTITIES[budget.quantity]) & set(methods):
            able = " or ".join(QUANTITIES[budget.quantity])
            raise UsageError(f"--budget {options.budget} needs --method {able}; measured are {', '.join(methods)}")
        if options.minutes is not None and not options.minutes > 0:
            raise UsageError(f"--minutes must be above 0, got {options.minutes:g}")
        if options.limit_batches is not None and options.limit_batches < 1:
            raise UsageError(f"--limit-batches must be at least 1, got {options.limit_batches}")
        for path in (options.checkpoint, *options.config):
            if not os.path.isfile(path):
                raise UsageError(f"'{path}' is not there")
        if not options.config:
            raise UsageError("--config is missing: the YAML of the project, as LightningCLI takes it")
        return cls(options, levels, budget, Path(options.out))

    def header(self) -> dict[str, Any]:
        """What measurements depend on."""
        options = self.options
        return {
            "checkpoint": file_digest(options.checkpoint),
            "config": files_hash(options.config),
            "class": options.module_class,
            "data-class": options.data_class,
            "limit-batches": options.limit_batches,
        }


def sensitivity(options: argparse.Namespace) -> int:
    """Measure each layer alone, and suggest a recipe.

    Args:
        options: As ``lightning-compress sensitivity`` parses them.

    Returns:
        0: done, or the time was up. 2: bad usage. 130: interrupted.

    Example:
        >>> from lightning_compress.cli import main
        >>> main(["sensitivity", "last.ckpt"])
        2
    """
    try:
        request = _Request.of(options)
        with ExitStack() as stack:
            module, journal, validation = _opened(request, stack)
            findings, costs = _measured(request, module, journal, validation)
            with checking(OSError):
                _write(request, findings, costs, module)
    except UsageError as error:
        return ended("sensitivity", USAGE, str(error))
    except ProjectError as error:
        return ended("sensitivity", FAILED, str(error))
    except KeyboardInterrupt:
        kept = shown_path(Path(options.out) / NAME)
        return ended(
            "sensitivity", INTERRUPTED, f"interrupted; what was measured is in {kept}, and the same command goes on"
        )
    return DONE


def _opened(request: _Request, stack: ExitStack) -> tuple[nn.Module, Journal, RepeatedValidation]:
    """The module with the weights of the checkpoint, what was measured before, and its validation."""
    options = request.options
    classes = {"model": options.module_class, "data": options.data_class}
    project = load_trained(options.config, options.checkpoint, **classes, set_up=True)
    stack.callback(project.tear_down)
    for remark in project.remarks:
        sys.stderr.write(f"lightning-compress sensitivity: {remark}\n")
    module: nn.Module = project.module
    with checking(ValueError):
        weights = select_weights(module, options.layers, options.exclude).weights  # selectors that match nothing first
    broken = [name for name, weight in weights.items() if not bool(weight.isfinite().all())]
    if broken:
        raise UsageError(
            f"the weights in '{options.checkpoint}' are not finite, so there is nothing to measure: NaN or infinity in "
            f"{len(broken)} of {len(weights)}, {listing(broken)}"
        )
    validation = repeatedly(
        module,
        project.datamodule,
        trainer=project.trainer,
        batches=options.limit_batches,
        accelerator=project.trainer.strategy.root_device.type,
    )
    with checking(EvaluationError):
        repeated = stack.enter_context(validation)
    try:
        journal = Journal(request.folder, request.header(), restart=options.restart)
    except OSError as error:
        raise UsageError(f"--out '{request.folder}' cannot be written: {error.strerror}") from error
    return module, journal, repeated


def _measured(
    request: _Request, module: nn.Module, journal: Journal, validation: RepeatedValidation
) -> tuple[Findings, dict[str, Costs]]:
    """All measurements that there was time for, and what the choices cost."""
    options = request.options
    with checking(EvaluationError):
        if journal.plain is None:
            with sign(True, "validating the network as it is"):
                unchanged = validation.run()
                with checking(OSError):
                    journal.add(None, unchanged)
        layers = find_layers(validation.module, lambda: validation.run(batches=1), options.layers, options.exclude)
    plain = journal.plain or {}
    metric = choose_metric(plain, options.metric, options.mode)
    _check_methods(request, layers)
    with sign(True, "what each choice costs"):  # networks of many weights take long to deflate
        coupling = _coupling(validation, layers) if "filters" in request.levels else None
        costs = {
            method: costs_of(method, module, layers, levels, coupling) for method, levels in request.levels.items()
        }
    for method, own in costs.items():
        if request.budget is not None and method in QUANTITIES[request.budget.quantity]:
            own.check(request.budget)
    changes = planned(layers, request.levels)
    missing = [change for change in changes if change not in journal.found]
    _say(f"judged by {metric.said}; {len(changes)} changes, {len(changes) - len(missing)} measured before")
    _measure(missing, {layer.name: layer for layer in layers}, journal, validation, options.minutes)
    found = {change: journal.found[change] for change in changes if change in journal.found}
    return Findings(layers, request.levels, metric, plain, found, len(changes)), costs


def _coupling(validation: RepeatedValidation, layers: Sequence[Layer]) -> Coupling | None:
    try:
        return find_coupling(validation.module, lambda: validation.run(batches=1), layers)
    except (ImportError, StructureError) as error:
        _say(f"which layers can only lose filters together is not known, so the recipe may be refused: {error}")
        return None


def _measure(
    changes: Sequence[Change],
    layers: Mapping[str, Layer],
    journal: Journal,
    validation: RepeatedValidation,
    minutes: float | None,
) -> None:
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    with tqdm(changes, desc="sensitivity", unit="change", disable=None, leave=False) as bar:
        for change in bar:
            if time.monotonic() >= end:
                break
            bar.set_postfix_str(f"{change.layer}, {title_of(change.method, change.level)}")
            with applied(validation.module, layers[change.layer], change.method, change.level) as moved:
                metrics = validation.run()
            with checking(OSError):
                journal.add(change, metrics, moved)


def _check_methods(request: _Request, layers: Sequence[Layer]) -> None:
    for method in request.levels:
        if not any(method in layer.methods for layer in layers):
            kinds = sorted({layer.type for layer in layers})
            raise UsageError(f"--method {method} fits none of the selected layers ({', '.join(kinds)})")


def _write(request: _Request, findings: Findings, costs: Mapping[str, Costs], module: nn.Module) -> None:
    """Tables, picture and recipes, and what there is to say about them."""
    folder = request.folder
    _say("\n" + to_console(findings, width=terminal_width()))
    suggestions: list[Suggestion] = []
    for method, own in costs.items():
        suggested = suggest(method, findings, own, module, request.budget)
        if suggested is None:
            _say(f"{method}: nothing is suggested, as the budget is kept as it is, or nothing was measured yet")
        else:
            suggestions.append(suggested)
    notes = _notes(request, findings)
    for place, found in enumerate(suggestions):
        of_method = folder / f"recipe-{found.method}.yaml"  # which a later run of another method leaves alone
        for path in (of_method, folder / "recipe.yaml") if place == 0 else (of_method,):
            write_whole(path, found.recipe(notes, _how_to_run(request, path, found.method)))
        _say(f"{shown_path(path)}: {found.said}")
    write_whole(folder / "sensitivity.md", to_markdown(findings, [*notes, *(own.said for own in suggestions)]))
    write_whole(folder / "sensitivity.json", to_json(findings, [own.summary() for own in suggestions]))
    with draft_of(folder / "sensitivity.png") as draft:
        draw(findings, draft)
    _say(f"all numbers: {shown_path(folder / 'sensitivity.md')}, .json and .png")
    if len(findings.found) < findings.total:
        _say(f"the time was up after {len(findings.found)} of {findings.total} changes; the same command goes on")


def _notes(request: _Request, findings: Findings) -> list[str]:
    options = request.options
    limit = options.limit_batches
    batches = "the whole validation" if limit is None else f"{limit} batch{'es' if limit > 1 else ''} of the validation"
    notes = [
        f"From {shlex.join(['lightning-compress', 'sensitivity', options.checkpoint])}, over {batches}: "
        f"{len(findings.found)} of {findings.total} changes measured."
    ]
    if len(findings.found) < findings.total:
        notes[0] += " What was not measured stays as it is."
    return notes


def _how_to_run(request: _Request, path: Path, method: str) -> str:
    """Bits need no training, so the fit is resumed at its end; the others go on for as many epochs as there were."""
    options = request.options
    named = [*(("--config", config) for config in options.config), ("--class", options.module_class)]
    parts = [part for name, value in (*named, ("--data-class", options.data_class)) if value for part in (name, value)]
    fit = ["lightning-compress", "fit", *parts, "--ckpt_path", options.checkpoint]
    epochs = _compat.epochs_in(read_checkpoint(options.checkpoint, or_weights=True))
    if epochs is not None:
        fit += ["--trainer.max_epochs", str(max(epochs, 1) * (1 if method == "bits" else 2))]
    return shlex.join(["lightning-compress", "run", shown_path(path), "--", *fit])


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
