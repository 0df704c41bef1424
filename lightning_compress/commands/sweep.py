"""A Weights & Biases sweep over the fields of a recipe: a file for ``wandb sweep``; wandb need not be installed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_compress.callbacks.export import ExportCallback
from lightning_compress.commands.exits import DONE, USAGE, UsageError, ended
from lightning_compress.commands.sweep_fields import chosen
from lightning_compress.mechanisms.drafts import write_whole
from lightning_compress.recipe import Recipe, RecipeError, arguments_of, load_recipe
from lightning_compress.report.directions import direction
from lightning_compress.report.units import significant

POINTS = 5
"""Values of a range where the method takes no ranges."""
PLACEHOLDER = ("python", "train.py")
"""Stands in the file where the user gives no command."""
_HEAD = """\
# Start it with `wandb sweep {file}`, and agents, in the folder of the recipe, with the line that this prints.
# The script has to log to Weights & Biases, as Trainer(logger=WandbLogger()) does.
"""


def sweep(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Write the configuration of a sweep.

    Args:
        options: ``recipe``, ``metric``, ``goal``, ``method``, ``out`` and ``vary`` of the command line.
        command: What each run trains with; none: a placeholder is written, and that is told.

    Returns:
        0: written. 2: bad usage.

    Example:
        >>> options = argparse.Namespace(recipe="r.yaml", metric=None, goal=None, method="bayes", out="s.yaml", vary=[])
        >>> sweep(options, [])
        2
    """
    try:
        if os.path.exists(options.out):
            raise UsageError(f"'{options.out}' exists already; remove it, or give another --out")
        recipe = load_recipe(options.recipe)
        metric = options.metric or exported_metric(recipe)
        parameters = chosen(recipe, options.vary)
        content = configuration(recipe.path, parameters, metric, options.goal, options.method, command or PLACEHOLDER)
        text = _HEAD.format(file=options.out) + yaml.safe_dump(content, sort_keys=False, width=110)
        write_whole(Path(options.out), text)
    except (UsageError, RecipeError, OSError) as error:
        return ended("sweep", USAGE, str(error))
    sys.stdout.write(_summary(content, options.out, given=bool(command)))
    return DONE


def configuration(
    recipe: str,
    parameters: Mapping[str, Mapping[str, Any]],
    metric: str | None,
    goal: str | None,
    method: str,
    command: Sequence[str],
) -> dict[str, Any]:
    """A sweep as ``wandb sweep`` reads it.

    Args:
        recipe: Path of the recipe.
        parameters: Key to what W&B knows of a parameter.
        metric: What is sought; None: nothing, which "bayes" does not allow.
        goal: "maximize" or "minimize"; None: by the name of the metric.
        method: "bayes", "random" or "grid".
        command: What each run trains with.

    Returns:
        Primitives.

    Raises:
        UsageError: If ``method`` needs a metric, and there is none, or its goal is not known.

    Example:
        >>> content = configuration("r.yaml", {"dcil.sparsity": {"min": 0.8, "max": 0.9}}, "val_loss", None, "grid", [])
        >>> content["metric"], content["parameters"]
        ({'name': 'val_loss', 'goal': 'minimize'}, {'dcil.sparsity': {'values': [0.8, 0.825, 0.85, 0.875, 0.9]}})
    """
    if metric is None and method == "bayes":
        raise UsageError(
            "method 'bayes' seeks the best value of a metric: give --metric, as it is logged, or say export.metric in "
            "the recipe; or choose --method random"
        )
    content: dict[str, Any] = {
        "program": next((word for word in command if word.endswith(".py")), "train"),
        "method": method,
    }
    if metric is not None:
        way = direction(metric)
        if goal is None and way is None:
            raise UsageError(f"the name '{metric}' does not say which way is better: give --goal maximize|minimize")
        content["metric"] = {"name": metric, "goal": goal or f"{way}imize"}
    points = _points if method == "grid" else dict
    content["parameters"] = {key: _spelled(points(entry)) for key, entry in parameters.items()}
    content["command"] = ["lightning-compress", "run", recipe, "--set", "${args_no_hyphens}", "--", *command]
    return content


def exported_metric(recipe: Recipe) -> str | None:
    """Under which name the metric of the file is logged that a recipe exports.

    Args:
        recipe: A checked recipe.

    Returns:
        None if there is no such metric, or not one alone.

    Example:
        >>> exported_metric(Recipe(1, export={"path": "out/model.onnx", "metric": "val_acc"}))
        'compress/export/val_acc'
    """
    exports = arguments_of(recipe, ExportCallback)
    if len(exports) != 1 or not exports[0].get("metric"):
        return None
    return f"compress/{exports[0].get('name') or ExportCallback.default_name}/{exports[0]['metric']}"


def _spelled(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter as W&B hands it on to a command: what has no value would come as Python spells it."""
    values = {"values": ["null" if own is None else own for own in entry["values"]]} if "values" in entry else {}
    return {**entry, **values}


def _points(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A range as values, for a grid."""
    if "values" in entry:
        return dict(entry)
    low, high = entry["min"], entry["max"]
    if isinstance(low, int) and isinstance(high, int):
        return {"values": sorted({round(low + (high - low) * part / (POINTS - 1)) for part in range(POINTS)})}
    shares = [part / (POINTS - 1) for part in range(POINTS)]
    if "distribution" in entry:
        return {"values": [float(significant(low * (high / low) ** share)) for share in shares]}
    return {"values": [round(low + (high - low) * share, 6) for share in shares]}


def _summary(content: Mapping[str, Any], out: str, *, given: bool) -> str:
    count = len(content["parameters"])
    lines = [f"wrote {out}: method {content['method']}, {count} parameter{'' if count == 1 else 's'}"]
    if "metric" in content:
        lines[0] += f", {content['metric']['goal']}s {content['metric']['name']}"
    width = max(map(len, content["parameters"]))
    for key, entry in content["parameters"].items():
        what = ", ".join(map(str, entry["values"])) if "values" in entry else f"{entry['min']} to {entry['max']}"
        lines.append(f"  {key.ljust(width)}  {what}")
    if not given:
        lines.append(f"no command was given behind --: replace {' '.join(PLACEHOLDER)} in {out} by what trains, first")
    return "\n".join([*lines, f"start it with: wandb sweep {out}"]) + "\n"
