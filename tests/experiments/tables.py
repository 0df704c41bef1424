"""Tables of what was measured: differences paired by seed, with the interval that says how far to believe them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plan import FULL, GRIDS, SETTINGS, Arm, Calibrated, Claim, Column, Option, Protocol, Run, Teacher
from .store import Series, Store, series
from .training import teacher_path

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NOT_YET = "not measured yet"


@dataclass(frozen=True)
class Measured:
    """An arm at its chosen learning rate: one result a seed, and what all of its runs took."""

    run: Any  # that of the first seed
    results: Mapping[int, Mapping[str, Any]]
    minutes: float
    tried: tuple[float, ...] = ()  # learning rates, of which its own was chosen

    @classmethod
    def of(cls, series: Series, store: Store, seeds: int) -> Measured | None:
        """What the folder knows of a series; None if a run is missing."""
        runs = series.runs(store, seeds)
        results = {run.seed: store.read(run) for run in runs}
        if not runs or None in results.values():
            return None
        made = {run.key: store.read(run) for run in [*series.own, *runs]}
        minutes = sum(result["cpu_seconds"] for result in made.values()) / 60
        return cls(runs[0], results, minutes, tuple(run.rate for run in series.own))

    @property
    def arm(self) -> Any:
        return self.run.arm

    @property
    def first(self) -> Mapping[str, Any]:
        return self.results[self.run.seed]

    def values(self, quantity: str) -> list[Any]:
        """A quantity in the order of the seeds."""
        return [self.results[seed][quantity] for seed in sorted(self.results)]

    def mean(self, quantity: str) -> float:
        return statistics.mean(self.values(quantity))

    def like(self, quantity: str) -> Measured:
        """The same with another quantity as the test accuracy."""
        results = {seed: {**result, "test_accuracy": result[quantity]} for seed, result in self.results.items()}
        return dataclasses.replace(self, results=results)

    def of_file(self, precision: str) -> Measured:
        """The results of one of the files of each run."""
        results = {seed: result | result["files"][precision] for seed, result in self.results.items()}
        return dataclasses.replace(self, results=results)


def t_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95% interval of differences that are paired by seed; one alone has no interval (nan)."""
    mean, count = statistics.mean(differences), len(differences)
    if count < 2:
        return mean, math.nan, math.nan
    from scipy.stats import t

    half = float(t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    return mean, mean - half, mean + half


def interval(differences: Sequence[float], digits: int = 2) -> str:
    """Mean and interval; "not shown" where it covers 0."""
    mean, low, high = t_interval(differences)
    said = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return said if low > 0 or high < 0 else f"{said}, not shown"


def difference(one: Measured, other: Measured) -> str:
    """Test accuracy of one over another, in points; where they train as long, they must have seen the same batches.

    Results that do not say which batches were seen are not looked at.
    """
    for seed in one.results.keys() & other.results.keys() if one.run.epochs == other.run.epochs else ():
        seen = [own.results[seed].get("batches") for own in (one, other)]
        if None not in seen and seen[0] != seen[1]:
            raise ValueError(f"{one.arm.name} and {other.arm.name} saw different batches with seed {seed}")
    return interval(differences(one, other))


def differences(one: Measured, other: Measured, quantity: str = "test_accuracy", factor: float = 100.0) -> list[float]:
    """Those of a quantity, by the seeds that both have."""
    seeds = sorted(one.results.keys() & other.results.keys())
    return [factor * (one.results[seed][quantity] - other.results[seed][quantity]) for seed in seeds]


def paired(one: Measured, other: Measured, column: Column) -> str:
    """A quantity of one less that of the other; "not shown" where the interval covers 0."""
    return f"{column.title} {less(one, other, column)}"


def less(one: Measured, other: Measured, column: Column) -> str:
    """The same without its title."""
    return interval(differences(one, other, column.quantity, column.factor), column.digits)


def mean_of(row: Measured, column: Column) -> str:
    """The mean of a quantity, as a table shows it."""
    return f"{column.factor * row.mean(column.quantity):.{column.digits}f}"


def measured(protocol: Protocol, arm: Arm, store: Store, seeds: int) -> Measured | None:
    """What the folder knows of an arm; None if a run is missing."""
    return Measured.of(series(protocol, arm), store, seeds)


def chosen_candidate(arms: Sequence[Arm], rows: Sequence[Measured | None]) -> Measured | None:
    """The strength that the held-out images prefer, the test images have no say; None before all are measured."""
    of_method = [row for arm, row in zip(arms, rows, strict=True) if arm.candidate]
    if None in of_method:
        return None
    return max(of_method, key=lambda row: row.mean("held_out_accuracy"), default=None)


def part_table(claim: Claim, protocol: Protocol, arms: Sequence[Arm], store: Store, seeds: int) -> str:
    """One protocol's table, its verdict, and what it cost."""
    rows = [measured(protocol, arm, store, seeds) for arm in arms]
    plain, chosen = rows[0], chosen_candidate(arms, rows)
    more = [column.title for column in claim.columns]
    titles = ["arm", "learning rate", "test accuracy", f"over {arms[0].title}", f"{claim.method} over this arm", *more]
    lines = [f"### {protocol.title}", "", f"| {' | '.join([*titles, 'minutes'])} |", f"|{'---|' * (len(titles) + 1)}"]
    for arm, row in zip(arms, rows, strict=True):
        if row is None:
            lines.append(f"| {arm.title} | {NOT_YET} |{' |' * (len(titles) - 1)}")
            continue
        cells = [
            f"**{arm.title}**" if row is chosen else arm.title,
            rate_of(row),
            f"{100 * row.mean('test_accuracy'):.2f}",
            "" if plain is None or row is plain else difference(row, plain),
            over_this(row, rows, chosen),
            *(mean_of(row, column) for column in claim.columns),
            f"{row.minutes:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if plain is not None and chosen is not None:
        lines += ["", f"{chosen.arm.title} over {arms[0].title}, in points: {difference(chosen, plain)}."]
    named = {row.arm.name: row for row in rows if row is not None}
    for one, other in claim.against:
        if one in named and other in named:
            points = f"test accuracy {difference(named[one], named[other])}"
            compared = [points, *(paired(named[one], named[other], column) for column in claim.columns)]
            lines += ["", f"{named[one].arm.title} less {named[other].arm.title}: {'; '.join(compared)}."]
    minutes = sum(row.minutes for row in rows if row is not None)
    lines += ["", f"{seeds} seeds; {minutes:.0f} minutes of one thread, the choice of learning rates included."]
    return "\n".join(lines)


def rate_of(row: Measured) -> str:
    """The learning rate, marked where it is an end of those that were tried; none where nothing was trained."""
    if row.run.epochs == 0:
        return ""
    ends = (min(row.tried), max(row.tried)) if row.tried else ()
    return f"{row.run.rate:g}{' (end)' if row.run.rate in ends else ''}"


def over_this(row: Measured, rows: Sequence[Measured | None], chosen: Measured | None) -> str:
    """What the chosen strength gains over an arm, or over a control the strength that it controls."""
    if row.arm.candidate or row is rows[0]:
        return ""
    if row.arm.control_of is None:
        return "" if chosen is None else difference(chosen, row)
    own = next((other for other in rows if other is not None and other.arm.name == row.arm.control_of), None)
    if own is None:
        return ""
    return difference(own, row) if own is chosen else f"{own.arm.title}: {difference(own, row)}"


def claim_tables(claim: Claim, store: Store, seeds: int) -> str:
    """All tables of a claim, as Markdown."""
    parts = [part_table(claim, *part, store, seeds) for part in claim.parts]
    taught = [teacher_line(Teacher(), store)] if claim.teacher else []
    parts_rounded = [part for part in claim.parts if claim.options and part[0].bits not in (None, FULL)]
    rounded = [grid_table(claim, *part, store, seeds) for part in parts_rounded]
    options = [options_table(claim, store, seeds)] if claim.options else []
    return "\n\n".join([*taught, *parts, *rounded, *options])


def grid_table(claim: Claim, protocol: Protocol, arms: Sequence[Arm], store: Store, seeds: int) -> str:
    """Test accuracies of the same networks on every grid, and how far a grid of the best kind brings the first arm."""
    lines = [
        f"### {protocol.bits} bits on every grid: one of a tensor or each channel's, largest weight or clipped",
        "",
        f"| arm | {' | '.join(column.title for column in GRIDS)} |",
        f"|{'---|' * (1 + len(GRIDS))}",
    ]
    rows = [measured(protocol, arm, store, seeds) for arm in arms]
    for row in rows:
        if row is not None:
            cells = [f"{100 * row.mean(column.quantity):.2f}" for column in GRIDS]
            lines.append(f"| {row.arm.title} | {' | '.join(cells)} |")
    alone, chosen = rows[0], chosen_candidate(arms, rows)
    first = measured(claim.parts[0][0], claim.parts[0][1][0], store, seeds)
    if alone is None or chosen is None or first is None:
        return "\n".join([*lines, "", f"Some arms are {NOT_YET}."])
    lines += [
        "",
        f"{chosen.arm.title} less {alone.arm.title}: {'; '.join(paired(chosen, alone, column) for column in GRIDS)}.",
        "",
        f"{chosen.arm.title}, on the fly, less {first.arm.title} at full precision: {difference(chosen, first)}; less "
        f"itself at full precision: {difference(chosen, chosen.like('test_accuracy_full'))}; less {alone.arm.title} "
        f"on the grid '{GRIDS[-1].title}': {difference(chosen, alone.like(GRIDS[-1].quantity))}.",
    ]
    return "\n".join(lines)


def options_table(claim: Claim, store: Store, seeds: int) -> str:
    """What each option of post-training quantisation gives over the first, at each setting of bits."""
    protocol, (arm, *_) = claim.parts[0]
    row = measured(protocol, arm, store, seeds)
    title = "### Post-training quantisation, bits of weights / of activations"
    if row is None:
        return f"{title}\n\n{arm.title} is {NOT_YET}."
    runs = series(protocol, arm).runs(store, seeds)
    lines = [
        title,
        "",
        f"| | {' | '.join(f'{weights}/{activations}' for weights, activations in SETTINGS)} |",
        f"|{'---|' * (1 + len(SETTINGS))}",
    ]
    usual = claim.options[0]
    for option in claim.options:
        over = None if option is usual else usual
        cells = [option_cell(store, runs, bits, option, over) for bits in SETTINGS]
        lines.append(f"| {option.title} | {' | '.join(cells)} |")
    full = 100 * row.mean("test_accuracy")
    return "\n".join([*lines, "", f"The same networks at full precision: {full:.2f}. {seeds} seeds."])


def option_cell(
    store: Store, runs: Sequence[Run], bits: tuple[int, int], option: Option, over: Option | None = None
) -> str:
    """Test accuracy of networks that are quantised with an option, and what it is over that with another."""
    found = [[store.read(Calibrated(run, *bits, own)) for run in runs] for own in (option, over or option)]
    if not runs or any(None in own for own in found):
        return NOT_YET
    accuracies = [[100 * result["test_accuracy"] for result in own if result] for own in found]
    gains = [one - other for one, other in zip(*accuracies, strict=True)]
    return f"{statistics.mean(accuracies[0]):.2f}" + ("" if over is None else f", {interval(gains)}")


def teacher_line(teacher: Teacher, store: Store) -> str:
    """What the teacher is, and how good."""
    what = f"Teacher: a residual network of width {teacher.width}, {teacher.epochs} epochs"
    if (kept := store.of_file(teacher_path(teacher))) is None:
        return f"{what}, {NOT_YET}."
    return f"{what}, test accuracy {100 * kept['test_accuracy']:.2f}, {kept['cpu_seconds'] / 60:.1f} minutes."


def splice(page: Path, text: str) -> None:
    """Put the tables between the page's markers."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} must hold the lines {BEGIN} and {END}, between which the tables are put")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
