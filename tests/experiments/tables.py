"""Tables of what was measured: differences paired by seed, with the interval that says how far to believe them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .plan import FULL, GRIDS, SETTINGS, Arm, Calibrated, Claim, Column, Protocol, Run, Teacher
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
    return gain([one.results[seed] for seed in seeds], [other.results[seed] for seed in seeds])


def gain(ones: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> str:
    """The same for results, in the order of their seeds."""
    pairs = zip(ones, others, strict=True)
    mean, low, high = t_interval([100 * (one["test_accuracy"] - other["test_accuracy"]) for one, other in pairs])
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
    parts_rounded = [part for part in claim.parts if claim.options and part[0].bits not in (None, FULL)]
    rounded = [grid_table(claim, *part, store, seeds) for part in parts_rounded]
    options = [options_table(claim, store, seeds), whole_cost(claim, store, seeds)] if claim.options else []
    return "\n\n".join([*taught, *parts, *rounded, *options]) + "\n"


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
        f"itself at full precision: {difference(chosen, _with(chosen, 'test_accuracy_full'))}; less {alone.arm.title} "
        f"on the grid '{GRIDS[-1].title}': {difference(chosen, _with(alone, GRIDS[-1].quantity))}.",
    ]
    return "\n".join(lines)


def _with(row: Measured, quantity: str) -> Measured:
    """An arm with another quantity as its test accuracy."""
    results = {seed: {**result, "test_accuracy": result[quantity]} for seed, result in row.results.items()}
    return dataclasses.replace(row, results=results)


def options_table(claim: Claim, store: Store, seeds: int) -> str:
    """What each option of post-training quantisation gives over the first, at each setting of bits."""
    protocol, (arm, *_) = claim.parts[0]
    row = measured(protocol, arm, store, seeds)
    title = "### Post-training quantisation, bits of weights / of activations"
    if row is None:
        return f"{title}\n\n{arm.title} is {NOT_YET}."
    runs = [Run(protocol, arm, row.rate, seed) for seed in range(seeds)]
    lines = [
        title,
        "",
        f"| | {' | '.join(f'{weights}/{activations}' for weights, activations in SETTINGS)} |",
        f"|{'---|' * (1 + len(SETTINGS))}",
    ]
    for option in claim.options:
        cells = []
        for bits in SETTINGS:
            ones, others = (
                [store.read(Calibrated(run, *bits, own)) for run in runs] for own in (option, claim.options[0])
            )
            if None in ones or None in others:
                cells.append(NOT_YET)
                continue
            mean = f"{100 * statistics.mean(one['test_accuracy'] for one in ones):.2f}"
            cells.append(mean if option is claim.options[0] else f"{mean}, {gain(ones, others)}")
        lines.append(f"| {option.title} | {' | '.join(cells)} |")
    full = 100 * row.mean("test_accuracy")
    return "\n".join([*lines, "", f"The same networks at full precision: {full:.2f}. {seeds} seeds."])


def whole_cost(claim: Claim, store: Store, seeds: int) -> str:
    """Minutes of all runs of a claim whose networks are kept; one that several tables share is counted once."""
    from .rounded import network_path, start_of
    from .schedule import calibrated, further_seeds, one_a_start, unique_parts

    parts = unique_parts([claim])
    runs = [run for part in parts for run in candidates(*part)]
    paths = [network_path(start_of(run), store.folder) for run in one_a_start(runs, seeds)]
    starts = [torch.load(path, weights_only=True)["cpu_seconds"] for path in paths if path.is_file()]
    made = [result for run in [*runs, *further_seeds(parts, store, seeds)] if (result := store.read(run))]
    networks = {result["network"]: result["network_seconds"] for result in made}
    looks = sum(result["cpu_seconds"] - result["network_seconds"] for result in made)
    options = [result["cpu_seconds"] for one in calibrated([claim], store, seeds) if (result := store.read(one))]
    minutes = (sum(starts) + sum(networks.values()) + looks + sum(options)) / 60
    return f"All of it: {minutes:.0f} minutes of one thread, networks that tables share counted once."


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
