"""The tables of the method cards, of the same runs as those of the experiments: a row an arm, a column a protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import plan, structured
from .plan import Arm, Column, Option, Protocol
from .store import Store, series
from .structured import Structured
from .tables import NOT_YET, Measured, difference, less, mean_of, measured, option_cell

SPOKEN_OF = {
    (protocol.name, arm.name) for claim in plan.CLAIMS.values() for protocol, arms in claim.parts for arm in arms
}
NEW_STATISTICS = next(column for column in plan.GRIDS if column.title == "one, max, new statistics")
SWING, SWING_REESTIMATED = plan.STEADINESS[:2]
ERROR = next(column for column in plan.FEW_BITS if column.quantity == "weight_error")

Cell = Callable[[Any], str]  # of what a column is about


@dataclass(frozen=True)
class Found:
    """What the folder knows."""

    store: Store
    seeds: int

    def row(self, protocol: Protocol, arm: Arm) -> Measured | None:
        return measured(protocol, arm, self.store, self.seeds)

    def accuracy(self, arm: Arm, over: Arm | None = None) -> Cell:
        """Test accuracy in percent, and what it is over another arm; empty where a protocol has no such arm."""

        def cell(protocol: Protocol) -> str:
            if (protocol.name, arm.name) not in SPOKEN_OF:
                return ""
            row, other = self.row(protocol, arm), over and self.row(protocol, over)
            if row is None or (over and other is None):
                return NOT_YET
            return f"{100 * row.mean('test_accuracy'):.2f}" + (f", {difference(row, other)}" if other else "")

        return cell

    def gain(self, one: Arm, other: Arm) -> Cell:
        """Test accuracy of one arm over that of another, in points."""
        return self.compared(one, other, difference)

    def mean(self, arm: Arm, column: Column) -> Cell:
        def cell(protocol: Protocol) -> str:
            row = self.row(protocol, arm)
            return NOT_YET if row is None else mean_of(row, column)

        return cell

    def less(self, one: Arm, other: Arm, column: Column) -> Cell:
        """A quantity of one arm less that of another."""
        return self.compared(one, other, lambda *rows: less(*rows, column))

    def compared(self, one: Arm, other: Arm, say: Callable[[Measured, Measured], str]) -> Cell:
        def cell(protocol: Protocol) -> str:
            rows = self.row(protocol, one), self.row(protocol, other)
            return NOT_YET if rows[0] is None or rows[1] is None else say(rows[0], rows[1])

        return cell

    def calibrated(self, option: Option, over: Option | None = None) -> Cell:
        """Test accuracy of the networks of PSGD's first arm, quantised with an option, and what it is over another."""
        runs = series(plan.UNROUNDED, plan.SGD).runs(self.store, self.seeds)
        return lambda bits: option_cell(self.store, runs, bits, option, over)

    def smaller(self, arm: structured.Arm, over: structured.Arm) -> Cell:
        """Test accuracy after a share of the multiply-accumulates has gone, and what it is over another arm."""
        rows = Structured().rows(self.store, self.seeds)

        def cell(ratio: float) -> str:
            if rows is None:
                return NOT_YET
            row, other = rows[arm, ratio], rows[over, 0.0 if over is structured.WHOLE else ratio]
            return f"{100 * row.mean('test_accuracy'):.2f}, {difference(row, other)}"

        return cell

    def shaped(self, multiple: int) -> Cell:
        """How fast the shape is whose numbers of channels are multiples."""

        def cell(ratio: float) -> str:
            kept = self.store.read(structured.SHAPES)
            own = kept and kept["shapes"][f"{ratio:g}-{multiple}"]
            return NOT_YET if kept is None else "cannot be met" if own is None else f"{own['faster']:.2f}"

        return cell


@dataclass(frozen=True)
class Card:
    """The experiment that it is of; what the columns are about, by their titles, and the rows by theirs."""

    experiment: str
    columns: Mapping[str, Any]
    rows: Callable[[Found], Mapping[str, Cell]]

    def table(self, store: Store, seeds: int) -> str:
        lines = [f"| | {' | '.join(self.columns)} |", f"|{'---|' * (1 + len(self.columns))}"]
        for title, cell in self.rows(Found(store, seeds)).items():
            lines.append(f"| {title} | {' | '.join(map(cell, self.columns.values()))} |")
        return "\n".join([*lines, "", f"{seeds} seeds."])


def titled(*protocols: Protocol) -> dict[str, Protocol]:
    return {protocol.title: protocol for protocol in protocols}


def arms(found: Found, first: Arm, *others: Arm) -> dict[str, Cell]:
    """A row an arm, each over the first."""
    return {first.title: found.accuracy(first), **{arm.title: found.accuracy(arm, first) for arm in others}}


def masks(found: Found, own: Arm) -> dict[str, Cell]:
    """What masks that are drawn anew give, over masks that stay, and how steady they are."""
    gradual, longer = plan.GRADUAL, plan.GRADUAL_LONGER
    rows = {
        own.title: found.accuracy(own),
        gradual.title: found.accuracy(gradual),
        f"{own.title} over gradual": found.gain(own, gradual),
        f"{own.title} over {longer.title}": found.gain(own, longer),
    }
    if own is plan.DPF:
        return rows | {f"{column.title}, in points": found.mean(own, column) for column in (SWING, SWING_REESTIMATED)}
    return rows | {
        "DCIL over DPF": found.gain(own, plan.DPF),
        **{
            f"{column.title}, less that of DPF": found.less(own, plan.DPF, column)
            for column in (SWING, SWING_REESTIMATED)
        },
    }


def few_bits(found: Found) -> dict[str, Cell]:
    sgd, usual = plan.SGD, plan.PSGD[1]
    return {
        **arms(found, sgd, *plan.PSGD),
        f"{usual.title}, less itself at full precision": found.compared(
            usual, usual, lambda row, _: difference(row, row.like("test_accuracy_full"))
        ),
        f"{usual.title}: relative error of the rounded weights, less SGD's, in %": found.less(usual, sgd, ERROR),
        f"{usual.title} over SGD, both with new batch-norm statistics": found.less(usual, sgd, NEW_STATISTICS),
    }


def options(found: Found) -> dict[str, Cell]:
    usual, chosen = plan.OPTIONS[0], plan.OPTIONS[-1]
    return {usual.title: found.calibrated(usual), chosen.title: found.calibrated(chosen, usual)}


def shares(found: Found) -> dict[str, Cell]:
    pruned, random, scratch = structured.ARMS
    return {
        f"{pruned.title}, over the whole network": found.smaller(pruned, structured.WHOLE),
        random.title: found.smaller(random, structured.WHOLE),
        f"{pruned.title}, over the same shape from the start": found.smaller(pruned, scratch),
        **{f"times as fast, `round_to={multiple}`": found.shaped(multiple) for multiple in structured.MULTIPLES},
    }


SPARSE = {"90% sparsity": plan.NINETY, "95% sparsity": plan.NINETY_FIVE}
CARDS = {
    "distillation": Card(
        "kd",
        titled(plan.FEW, plan.SHORT, plan.LONG),
        lambda found: arms(found, plan.PLAIN, plan.KD, plan.LIGHT_KD, plan.LONGER),
    ),
    "attention-transfer": Card(
        "at", titled(plan.FEW, plan.SHORT), lambda found: arms(found, plan.PLAIN, *plan.AT, plan.LONGER)
    ),
    "factor-transfer": Card(
        "ft", titled(plan.FEW, plan.SHORT), lambda found: arms(found, plan.PLAIN, *plan.FT, plan.LONGER)
    ),
    "pruning": Card(
        "masks",
        SPARSE,
        lambda found: arms(found, plan.GRADUAL, plan.ONE_SHOT, plan.REGROWN, plan.GRADUAL_KD, plan.GRADUAL_LONGER),
    ),
    "dpf": Card("masks", SPARSE, lambda found: masks(found, plan.DPF)),
    "dcil": Card("masks", SPARSE, lambda found: masks(found, plan.DCIL)),
    "psgd": Card("psgd", {"4 bits": plan.FOUR, "3 bits": plan.THREE, "2 bits": plan.TWO}, few_bits),
    "ptq": Card(
        "psgd", {f"{weights}/{activations}": (weights, activations) for weights, activations in plan.SETTINGS}, options
    ),
    "qat": Card(
        "qat",
        {f"{own.bits}/{own.activation_bits}": own for own in plan.TRAINED_FOR},
        lambda found: arms(found, plan.FINE_TUNED, plan.CALIBRATED, *plan.AWARE),
    ),
    "structured-pruning": Card(
        "structured", {f"{ratio:.0%} of the MACs removed": ratio for ratio in structured.RATIOS}, shares
    ),
}
"""By the name of their page."""
