"""Tables of what was measured: differences paired by seed, with the interval that says how far to believe them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plan import Arm, Claim, Column, Protocol, Run, Teacher
from .store import Store, candidates
from .training import teacher_file, teacher_path

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NOT_YET = "not measured yet"


@dataclass(frozen=True)
class Measured:
    """An arm at its chosen learning rate: one result a seed, and what all of its runs took."""

    arm: Arm
    rate: float
    results: Mapping[int, Mapping[str, Any]]
    minutes: float

    def mean(self, quantity: str) -> float:
        return statistics.mean(result[quantity] for result in self.results.values())


def t_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95% interval of differences that are paired by seed; one alone has no interval (nan)."""
    mean, count = statistics.mean(differences), len(differences)
    if count < 2:
        return mean, math.nan, math.nan
    from scipy.stats import t

    half = float(t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    return mean, mean - half, mean + half


def difference(one: Measured, other: Measured) -> str:
    """Test accuracy of one over another, in points; "not shown" where the interval covers 0."""
    seeds, as_long = sorted(one.results.keys() & other.results.keys()), one.arm.longer == other.arm.longer
    for seed in seeds:
        if as_long and one.results[seed]["batches"] != other.results[seed]["batches"]:
            raise ValueError(f"{one.arm.name} and {other.arm.name} saw different batches with seed {seed}")
    gains = [100 * (one.results[seed]["test_accuracy"] - other.results[seed]["test_accuracy"]) for seed in seeds]
    mean, low, high = t_interval(gains)
    shown = low > 0 or high < 0
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]{'' if shown else ', not shown'}"


def paired(one: Measured, other: Measured, column: Column) -> str:
    """A quantity of one less that of the other; "not shown" where the interval covers 0."""
    values = [
        column.factor * (one.results[seed][column.quantity] - other.results[seed][column.quantity])
        for seed in sorted(one.results.keys() & other.results.keys())
    ]
    mean, low, high = t_interval(values)
    digits = column.digits
    interval = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{column.title} {interval}{'' if low > 0 or high < 0 else ', not shown'}"


def measured(protocol: Protocol, arm: Arm, store: Store, seeds: int) -> Measured | None:
    """What the folder knows of an arm; None if a run is missing."""
    rate = store.chosen_rate(protocol, arm)
    if rate is None:
        return None
    results = {seed: store.read(Run(protocol, arm, rate, seed)) for seed in range(seeds)}
    if None in results.values():
        return None
    made = {run.key: store.read(run) for run in candidates(protocol, arm)}
    made |= {Run(protocol, arm, rate, seed).key: result for seed, result in results.items()}
    return Measured(arm, rate, results, sum(result["cpu_seconds"] for result in made.values()) / 60)


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
            f"{row.rate:g}",
            f"{100 * row.mean('test_accuracy'):.2f}",
            "" if plain is None or row is plain else difference(row, plain),
            "" if chosen is None or arm.candidate or row is plain else difference(chosen, row),
            *(f"{column.factor * row.mean(column.quantity):.{column.digits}f}" for column in claim.columns),
            f"{row.minutes:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if plain is not None and chosen is not None:
        lines += ["", f"{chosen.arm.title} over {arms[0].title}, in points: {difference(chosen, plain)}."]
    named = {row.arm.name: row for row in rows if row is not None}
    for one, other in claim.against:
        if one in named and other in named:
            compared = [paired(named[one], named[other], column) for column in claim.columns]
            lines += ["", f"{named[one].arm.title} less {named[other].arm.title}: {'; '.join(compared)}."]
    minutes = sum(row.minutes for row in rows if row is not None)
    lines += ["", f"{seeds} seeds; {minutes:.0f} minutes of one thread, the choice of learning rates included."]
    return "\n".join(lines)


def claim_tables(claim: Claim, store: Store, seeds: int) -> str:
    """All tables of a claim, as Markdown."""
    parts = [part_table(claim, *part, store, seeds) for part in claim.parts]
    taught = [teacher_line(Teacher(), store)] if claim.teacher else []
    return "\n\n".join([*taught, *parts]) + "\n"


def teacher_line(teacher: Teacher, store: Store) -> str:
    """What the teacher is, and how good."""
    what = f"Teacher: a residual network of width {teacher.width}, {teacher.epochs} epochs"
    if not teacher_path(teacher, store.folder).is_file():
        return f"{what}, {NOT_YET}."
    kept = teacher_file(teacher, store.folder)
    return f"{what}, test accuracy {100 * kept['test_accuracy']:.2f}, {kept['cpu_seconds'] / 60:.1f} minutes."


def splice(page: Path, text: str) -> None:
    """Put the tables between the page's markers."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} must hold the lines {BEGIN} and {END}, between which the tables are put")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
