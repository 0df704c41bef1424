"""From losses and costs to a recipe: which level each layer gets, what that is predicted to give, and the file."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import yaml
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_compress.callbacks.rehearsal import POINTS
from lightning_compress.commands.sensitivity.budgets import DEFAULTS, QUANTITIES, Budget, shown_amount
from lightning_compress.commands.sensitivity.changes import Change
from lightning_compress.commands.sensitivity.choose import (
    BudgetError,
    Option,
    choose,
    choose_filters,
    interpolated,
    loss_curve,
    options_of,
)
from lightning_compress.commands.sensitivity.costs import Costs
from lightning_compress.commands.sensitivity.coupling import Coupling, Shares, choose_groups
from lightning_compress.commands.sensitivity.findings import Findings, loss_format
from lightning_compress.mechanisms.selection import plain_name
from lightning_compress.report import units

WIDTH = 110
_GOES_ON = """\
# It goes on with the training. A learning rate that was made for its number of steps, as by OneCycleLR, cannot go on:
#   train anew from these weights, with start: 0."""
RESUMED = 0.5
"""Fraction of a training of twice the epochs at which the checkpoint ends."""
SUM = (
    "that is the sum of what each layer loses when it alone is changed. Losses of several layers do not simply add up, "
    "so it is an approximation, and so is the size: the report of the run has both measured."
)


UNUSABLE = (
    "So much at once may leave nothing of what the network has learned; a budget that leaves more is safer, and a fit "
    "may take some of it back: the report of the run has it measured."
)
MILDER = (0.375, 0.5, 0.625, 0.75, 0.875)
"""Shares that are tried where a default budget would lose all."""
TOGETHER = "layers whose channels can only go together are chosen or left together."
UNCOUPLED = (
    "as if each layer could lose filters by itself, and saved only what these cost. Which layers can only lose them "
    "together is not known, so the run may refuse the recipe, and says then what to ask for."
)


@dataclass(frozen=True)
class Suggestion:
    """A recipe.

    Attributes:
        method: Of which method.
        budget: For what.
        limit: The same in bytes, or multiply-accumulates.
        cost: What is predicted; None: the callback sees to it.
        loss: By how much the metric is predicted to be worse: the sum of the layers' losses.
        is_usable: Whether that can be: an accuracy has no more to lose than its value.
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
    is_usable: bool
    said: str
    levels: Mapping[str, float | None]
    callbacks: Sequence[Mapping[str, object]]
    export: Mapping[str, object]
    notes: Sequence[str]

    def summary(self) -> dict[str, object]:
        """The same as primitives, for JSON."""
        loss = self.loss if self.is_usable else None
        numbers = {"limit": self.limit, "predicted": self.cost, "predicted_loss": loss}
        return {"method": self.method, "budget": str(self.budget), **numbers, "levels": dict(self.levels)}

    def recipe(self, notes: Sequence[str] = (), command: str = "") -> str:
        """The text of the recipe, with what was predicted as comments.

        Args:
            notes: Sentences that come first.
            command: What runs it, on a line of its own, to be pasted.
        """
        lines = [
            line
            for note in (*notes, *self.notes)
            for line in textwrap.wrap(
                note, WIDTH, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False
            )
        ]
        if command:
            lines.append(f"# To run it: {command}")
            lines += [_GOES_ON] * (self.method != "bits")  # which trains nothing
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
    found = _suggested(method, findings, costs, module, budget)
    if found is None or budget is given or _is_usable(findings, found.loss):
        return found
    told = f"with the default, {budget}, the losses of the layers add up to more than {findings.metric.name} itself; "
    for share in (own for own in MILDER if own > budget.amount):
        milder = _suggested(method, findings, costs, module, Budget(budget.quantity, share, True), told)
        if milder is not None and _is_usable(findings, milder.loss):
            return milder
    return found


def _suggested(
    method: str, findings: Findings, costs: Costs, module: nn.Module, budget: Budget, told: str = ""
) -> Suggestion | None:
    """For one budget; ``told`` says why it is this one."""
    limit = budget.limit(costs.whole)
    if method == "filters":
        return _with_filters(findings, costs, budget, limit, told)
    try:
        chosen = _chosen(method, findings, costs, limit)
    except BudgetError as error:  # the default, or layers that are not measured yet
        limit = error.smallest + costs.fixed
        told += _unmet(budget, costs)
        chosen = _chosen(method, findings, costs, limit)
    if all(option.level is None for option in chosen.values()):
        return None
    cost, loss = costs.fixed + sum(own.cost for own in chosen.values()), sum(own.loss for own in chosen.values())
    levels = {name: option.level for name, option in chosen.items()}
    callbacks, export, more = _bits(levels, module) if method == "bits" else _sparsities(levels)
    said = f"{_shown(budget, cost)} of {_shown(budget, costs.whole)} ({costs.what})"
    notes = [_header(findings, budget, f"{told}predicted are {said}", loss), *more]
    said = f"{budget}: {told}{said}, {_worse(findings, loss)}"
    export = {**export, "metric": findings.metric.name}
    usable = _is_usable(findings, loss)
    return Suggestion(method, budget, limit, cost, loss, usable, said, levels, callbacks, export, notes)


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
    before = f"Budget {budget}: {predicted}. {name} is {units.metric(findings.plain[name])} as it is"
    if not _is_usable(findings, loss):
        return f"{before}. {_worse(findings, loss)}. {UNUSABLE}"
    return f"{before}, and predicted to be worse by {show(loss)}; {SUM}"


def _is_usable(findings: Findings, loss: float) -> bool:
    """Whether a sum of losses can be one loss: a share, such as an accuracy, has no more to lose than its value."""
    name = findings.metric.name
    plain, others = findings.plain[name], [own.metrics.get(name, math.nan) for own in findings.found.values()]
    is_share = findings.metric.mode == "max" and all(0 <= own <= 1 or math.isnan(own) for own in (plain, *others))
    return not is_share or loss < plain


def _worse(findings: Findings, loss: float) -> str:
    name = findings.metric.name
    if not _is_usable(findings, loss):
        return f"no usable prediction, as the losses of the layers add up to more than {name} itself"
    return f"{name} worse by {loss_format(findings)(loss)}, as predicted"


def _unmet(budget: Budget, costs: Costs) -> str:
    """What is said before the numbers of a choice that is larger than the budget."""
    amount = _shown(budget, budget.limit(costs.whole))
    amount = f"the default, {amount}," if budget == DEFAULTS[budget.quantity] else amount
    return f"{amount} is out of reach by what was measured; taken instead is the smallest: "


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
    return [_callback("PTQCallback", arguments)], {"path": "model-bits.onnx", "precision": precision}, [note]


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
    return callbacks, {"path": "model-sparsity.onnx", "precision": "fp32"}, [note]


def _with_filters(findings: Findings, costs: Costs, budget: Budget, limit: float, told: str = "") -> Suggestion | None:
    if limit >= costs.whole:
        return None
    losses = {name: findings.losses("filters", name) for name in costs.levels}
    known = {
        name: own for name, own in losses.items() if any(map(math.isfinite, own.values())) and costs.plain[name] > 0
    }
    coupled = costs.coupling is not None
    chosen = _coupled(costs.coupling, known, 1 - limit / costs.whole) if costs.coupling else _alone(costs, known, limit)
    if chosen is None:
        return None
    gone, shares, loss = chosen
    ratio = 1 - limit / costs.whole
    told += _unmet(budget, costs) if gone < ratio - POINTS else ""
    ratio = ratio if abs(gone - ratio) <= POINTS else gone
    cost = math.ceil(round((1 - gone) * costs.whole, 6))
    levels = {name: shares.get(name) for name in costs.levels}
    left = [name for name, level in levels.items() if level is None]
    exclude = left + [name for name in (costs.coupling.unmeasured if costs.coupling else ()) if name not in left]
    arguments = {"ratio": round(ratio, 4), "budget": "macs", **({"exclude": exclude} if exclude else {})}
    said = f"{_shown(budget, cost)} of {_shown(budget, costs.whole)} MACs"
    notes = [
        _header(findings, budget, f"{told}{said} are left", loss),
        f"Predicted with {units.share(max(shares.values()))} of the filters gone in each layer but those in exclude; "
        f"{TOGETHER if coupled else UNCOUPLED} Which filters go is the callback's choice, by their norm. What was "
        "measured is without training; a fit takes most of the loss back.",
    ]
    whole = f"{len(left)} layer{'' if len(left) == 1 else 's'} left whole"
    said = f"{budget}: {told}{said}, {whole}, {_worse(findings, loss)}"
    export: dict[str, object] = {"path": "model-filters.onnx", "precision": "fp32", "metric": findings.metric.name}
    callbacks = [_callback("StructuredPruningCallback", arguments)]
    usable = _is_usable(findings, loss)
    return Suggestion("filters", budget, limit, None, loss, usable, said, levels, callbacks, export, notes)


def _coupled(
    coupling: Coupling, known: Mapping[str, Mapping[float, float]], ratio: float
) -> tuple[float, Shares, float] | None:
    """The share of the work that goes, of the filters of each layer, and the loss; None: nothing can go."""
    points = {name: loss_curve(own) for name, own in known.items()}
    curves = {name: partial(interpolated, own) for name, own in points.items()}
    return choose_groups(coupling, curves, {name: own[0][-1] for name, own in points.items()}, ratio)


def _alone(
    costs: Costs, known: Mapping[str, Mapping[float, float]], limit: float
) -> tuple[float, Shares, float] | None:
    """The same as if each layer could lose filters by itself, and saved only what these cost."""
    plain = {name: costs.plain[name] for name in known}
    try:
        choice = choose_filters(plain, known, costs.whole, limit)
    except BudgetError as error:
        limit = math.ceil(error.smallest)
        if limit >= costs.whole:
            return None
        choice = choose_filters(plain, known, costs.whole, limit)
    shares = {name: choice.share for name in known if name not in choice.left}
    return 1 - limit / costs.whole, shares, choice.loss


def _callback(name: str, arguments: Mapping[str, object]) -> dict[str, object]:
    return {"class_path": name, "init_args": dict(arguments)}
