"""From losses and costs to a recipe: which level each layer gets, what that is predicted to give, and the file."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_compress.commands.sensitivity.budgets import DEFAULTS, QUANTITIES, Budget, shown_amount
from lightning_compress.commands.sensitivity.changes import Change
from lightning_compress.commands.sensitivity.choose import BudgetError, Option, choose, choose_filters, options_of
from lightning_compress.commands.sensitivity.costs import Costs
from lightning_compress.commands.sensitivity.findings import Findings, loss_format
from lightning_compress.mechanisms.selection import plain_name
from lightning_compress.report import units

WIDTH = 110
RESUMED = 0.5
"""Fraction of a training of twice the epochs at which the checkpoint ends."""
SUM = (
    "that is the sum of what each layer loses when it alone is changed. Losses of several layers do not simply add up, "
    "so it is an approximation, and so is the size: the report of the run has both measured."
)


@dataclass(frozen=True)
class Suggestion:
    """A recipe.

    Attributes:
        method: Of which method.
        budget: For what.
        limit: The same in bytes, or multiply-accumulates.
        cost: What is predicted; None: the callback sees to it.
        loss: By how much the metric is predicted to be worse.
        said: The same in words.
        levels: Of each layer; None: it stays as it is.
        callbacks: The recipe's.
        export: The recipe's.
        notes: Sentences above it.
    """

    method: str
    budget: Budget
    limit: float
    cost: int | None
    loss: float
    said: str
    levels: Mapping[str, float | None]
    callbacks: Sequence[Mapping[str, object]]
    export: Mapping[str, object]
    notes: Sequence[str]

    def summary(self) -> dict[str, object]:
        """The same as primitives, for JSON."""
        numbers = {"limit": self.limit, "predicted": self.cost, "predicted_loss": self.loss}
        return {"method": self.method, "budget": str(self.budget), **numbers, "levels": dict(self.levels)}

    def recipe(self, notes: Sequence[str] = ()) -> str:
        """The text of the recipe, with what was predicted as comments.

        Args:
            notes: Sentences that come first.
        """
        lines = [
            line
            for note in (*notes, *self.notes)
            for line in textwrap.wrap(
                note, WIDTH, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False
            )
        ]
        content = {"version": 1, "callbacks": list(self.callbacks), "export": dict(self.export)}
        return "\n".join([*lines, yaml.safe_dump(content, sort_keys=False, width=WIDTH)])


def budget_of(method: str, given: Budget | None) -> Budget:
    """The budget for a method: the user's, if it is one of what the method saves.

    Example:
        >>> budget_of("bits", None), budget_of("filters", Budget("macs", 0.3, True)).amount
        (Budget(quantity='bytes', amount=0.25, is_share=True), 0.3)
    """
    [quantity] = [name for name, methods in QUANTITIES.items() if method in methods]
    return given if given is not None and given.quantity == quantity else DEFAULTS[quantity]


def suggest(
    method: str, findings: Findings, costs: Costs, module: nn.Module, given: Budget | None = None
) -> Suggestion | None:
    """The recipe of one method.

    Args:
        method: A method that was measured.
        findings: The losses.
        costs: The costs.
        module: The LightningModule.
        given: The user's budget; None, or of another quantity: a default.

    Returns:
        What is suggested; None where the budget is kept as it is.
    """
    budget = budget_of(method, given)
    limit, unmet = budget.limit(costs.whole), ""
    if method == "filters":
        return _with_filters(findings, costs, budget, limit)
    try:
        chosen = _chosen(method, findings, costs, limit)
    except BudgetError as error:  # the default, or layers that are not measured yet
        limit = error.smallest + costs.fixed
        unmet = _unmet(budget, costs)
        chosen = _chosen(method, findings, costs, limit)
    if all(option.level is None for option in chosen.values()):
        return None
    cost, loss = costs.fixed + sum(own.cost for own in chosen.values()), sum(own.loss for own in chosen.values())
    levels = {name: option.level for name, option in chosen.items()}
    callbacks, export, more = _bits(levels, module) if method == "bits" else _sparsities(levels)
    said = f"{_shown(budget, cost)} of {_shown(budget, costs.whole)} ({costs.what})"
    notes = [_header(findings, budget, f"{unmet}predicted are {said}", loss), *more]
    said = f"{budget}: {unmet}{said}, {findings.metric.name} worse by {loss_format(findings)(loss)}, as predicted"
    export = {**export, "metric": findings.metric.name}
    return Suggestion(method, budget, limit, cost, loss, said, levels, callbacks, export, notes)


def _chosen(method: str, findings: Findings, costs: Costs, limit: float) -> dict[str, Option]:
    options = {}
    for name, sizes in costs.levels.items():
        known = {
            level: (sizes[level], loss, findings.found[Change(method, name, level)].moved)
            for level, loss in findings.losses(method, name).items()
        }
        options[name] = options_of(costs.plain[name], known)
    return choose(options, limit - costs.fixed)


def _header(findings: Findings, budget: Budget, predicted: str, loss: float) -> str:
    name, show = findings.metric.name, loss_format(findings)
    return (
        f"Budget {budget}: {predicted}. {name} is {units.metric(findings.plain[name])} as it is, and predicted to be "
        f"worse by {show(loss)}; {SUM}"
    )


def _unmet(budget: Budget, costs: Costs) -> str:
    """What is said before the numbers of a choice that is larger than the budget."""
    return f"{_shown(budget, budget.limit(costs.whole))} is out of reach by what was measured; the smallest: "


def _shown(budget: Budget, amount: float) -> str:
    return shown_amount(budget.quantity, amount)


def _bits(
    levels: Mapping[str, float | None], module: nn.Module
) -> tuple[list[dict[str, object]], dict[str, object], list[str]]:
    bits = {name: int(level) for name, level in levels.items() if level is not None}
    [(usual, _)] = Counter(bits.values()).most_common(1)
    arguments: dict[str, object] = {"weight_bits": usual, "activation_bits": None, "edge_bits": None}
    if others := {name: own for name, own in bits.items() if own != usual}:
        arguments["layer_bits"] = others
    taken = {
        plain_name(name)
        for name, part in module.named_modules()
        if isinstance(part, (_ConvNd, nn.Linear, nn.MultiheadAttention)) and not isinstance(part, _ConvTransposeNd)
    }
    left = sorted(taken - bits.keys())
    if any(name.startswith(f"{own}.") for own in left for name in bits):  # excluded with what lies below
        arguments["layers"] = list(bits)
    elif left:
        arguments["exclude"] = left
    precision = "int4" if min(bits.values()) <= 4 else "int8"
    note = (
        "Weights only, as it was measured: activations stay float. QATCallback in the place of PTQCallback takes the "
        "same layer_bits, and trains on these grids."
    )
    return [_callback("PTQCallback", arguments)], {"path": "model.onnx", "precision": precision}, [note]


def _sparsities(
    levels: Mapping[str, float | None],
) -> tuple[list[dict[str, object]], dict[str, object], list[str]]:
    callbacks = []
    for sparsity in sorted({level for level in levels.values() if level is not None}):
        names = [name for name, level in levels.items() if level == sparsity]
        name = f"pruning_{100 * sparsity:g}".replace(".", "_")
        when = {"start": RESUMED, "end": 0.875}
        arguments = {"sparsity": sparsity, **when, "scope": "layer", "layers": names, "name": name}
        callbacks.append(_callback("PruningCallback", arguments))
    note = (
        "Zeros make the deflated file smaller, as in a zip archive, not the file itself. What was measured is without "
        f"training; a fit takes most of the loss back. start={RESUMED} is where the checkpoint ends when the epochs "
        "are doubled; for a training from the start give 0."
    )
    return callbacks, {"path": "model.onnx", "precision": "fp32"}, [note]


def _with_filters(findings: Findings, costs: Costs, budget: Budget, limit: float) -> Suggestion | None:
    if limit >= costs.whole:
        return None
    losses = {name: findings.losses("filters", name) for name in costs.levels}
    known = {
        name: own for name, own in losses.items() if any(map(math.isfinite, own.values())) and costs.plain[name] > 0
    }
    unmet = ""
    try:
        choice = choose_filters({name: costs.plain[name] for name in known}, known, costs.whole, limit)
    except BudgetError as error:
        limit = math.ceil(error.smallest)
        if limit >= costs.whole:
            return None
        unmet = _unmet(budget, costs)
        choice = choose_filters({name: costs.plain[name] for name in known}, known, costs.whole, limit)
    levels = {name: choice.share if name in known and name not in choice.left else None for name in costs.levels}
    left = [name for name, level in levels.items() if level is None]
    ratio = round(1 - limit / costs.whole, 4)
    arguments: dict[str, object] = {"ratio": ratio, "budget": "macs", **({"exclude": left} if left else {})}
    said = f"{_shown(budget, limit)} of {_shown(budget, costs.whole)} MACs"
    notes = [
        _header(findings, budget, f"{unmet}{said} are left", choice.loss),
        f"Predicted with {units.share(choice.share)} of the filters of each layer gone but those in exclude, as if a "
        "layer saved only what its own filters cost; the callback counts what is left of the whole network, and needs "
        "fewer. What was measured is without training; a fit takes most of the loss back.",
    ]
    show = loss_format(findings)(choice.loss)
    whole = f"{len(left)} layer{'' if len(left) == 1 else 's'} left whole"
    said = f"{budget}: {unmet}{said}, {whole}, {findings.metric.name} worse by {show}, as predicted"
    export: dict[str, object] = {"path": "model.onnx", "precision": "fp32", "metric": findings.metric.name}
    callbacks = [_callback("StructuredPruningCallback", arguments)]
    return Suggestion("filters", budget, limit, None, choice.loss, said, levels, callbacks, export, notes)


def _callback(name: str, arguments: Mapping[str, object]) -> dict[str, object]:
    return {"class_path": name, "init_args": dict(arguments)}
