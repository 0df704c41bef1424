"""A claim of `plan` as an experiment: what is prepared and trained for it, its tables, and its picture."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import aware, bits, calibrated, curves, rounded, training
from .experiment import Experiment, Job, Line, minutes
from .plan import SETTINGS, Arm, Calibrated, Claim, Protocol, Run, Teacher
from .store import Store, series
from .tables import NOT_YET, chosen_candidate, claim_tables, difference, measured


class Claimed(Experiment):
    """Teacher, paraphrasers, starts; runs that choose learning rates; the other seeds; what is calibrated of them."""

    def __init__(self, claim: Claim) -> None:
        self.claim, self.page, self.picture, self.caption = claim, claim.page, claim.picture, claim.caption

    def batches(self, store: Store, seeds: int) -> Iterator[list[Job]]:
        yield from trainings(self.claim.parts, store, seeds)
        yield [network_job(run) for run in calibrated_of(self.claim, store, seeds)]
        yield [Job.of(calibrated.measure, one) for one in quantised(self.claim, store, seeds)]

    def tables(self, store: Store, seeds: int) -> str:
        whole = minutes(self.jobs(store, seeds), store)
        return (
            f"{claim_tables(self.claim, store, seeds)}\n\nAll of it: {whole:.0f} minutes of one thread, with what arms "
            "begin with; what tables share is counted once.\n"
        )

    def lines(self, store: Store, seeds: int) -> list[Line]:
        return [line for part in self.claim.parts for line in self.lines_of(*part, store, seeds)]

    def lines_of(self, protocol: Protocol, arms: tuple[Arm, ...], store: Store, seeds: int) -> list[Line]:
        """The chosen strength over the first arm and over those that train longer, and the other pairs of the claim."""
        rows = [measured(protocol, arm, store, seeds) for arm in arms]
        needed = itertools.chain.from_iterable(trainings([(protocol, arms)], store, seeds))
        cost = minutes(needed, store)
        named = {arm.name: (arm.title, row) for arm, row in zip(arms, rows, strict=True)}
        pairs = [(named[one], named[other]) for one, other in self.claim.shown]
        if any(arm.candidate for arm in arms):
            chosen = chosen_candidate(arms, rows)
            best = (self.claim.method if chosen is None else chosen.arm.title, chosen)
            others = [named[arm.name] for arm in arms if arm is arms[0] or arm.longer > 1]
            pairs += [(best, other) for other in others if (best, other) not in pairs]
        return [
            Line(
                f"{one} over {other}",
                protocol.title,
                NOT_YET if mine is None or its is None else difference(mine, its),
                cost,
            )
            for (one, mine), (other, its) in pairs
        ]

    def draw(self, store: Store, seeds: int, path: Path) -> bool:
        return (bits if self.claim.options else curves).draw(self.claim, store, seeds, path)


def trainings(parts: Iterable[tuple[Protocol, tuple[Arm, ...]]], store: Store, seeds: int) -> Iterator[list[Job]]:
    """All that is trained for parts of a claim, what their runs have in common first."""
    all_series = [series(protocol, arm) for protocol, arms in parts for arm in arms]
    choosing = [run for own in all_series for run in own.own]
    yield from preparations(choosing, seeds)
    yield [job_of(run) for run in choosing]
    yield [job_of(run) for own in all_series for run in own.runs(store, seeds)]


def preparations(runs: list[Run], seeds: int) -> Iterator[list[Job]]:
    if any(run.protocol.bits is None for run in runs):
        yield [Job(training.teacher_path(Teacher()), training.train_teacher, (Teacher(),))]
    pretrained = one_a_teacher(runs)
    yield [Job(training.paraphraser_path(run), training.train_paraphraser, (run,)) for run in pretrained]
    yield [network_job(rounded.start_of(run)) for run in one_a_start(runs, seeds)]


def one_a_teacher(runs: Iterable[Run]) -> list[Run]:
    """For each teacher that a run with a trained paraphraser has, one such run."""
    return list({run.arm.teacher: run for run in runs if not training.needs_no_paraphraser(run.arm)}.values())


def one_a_start(runs: Iterable[Run], seeds: int) -> list[Run]:
    """For each trained student from which runs go on, one such run."""
    later = [dataclasses.replace(run, seed=seed) for run in runs for seed in range(seeds) if run.protocol.start]
    return list({(run.protocol.start, run.protocol.width, run.seed): run for run in later}.values())


def quantised(claim: Claim, store: Store, seeds: int) -> list[Calibrated]:
    """Each option at each setting."""
    runs = calibrated_of(claim, store, seeds)
    return [Calibrated(run, *bits, option) for bits in SETTINGS for option in claim.options for run in runs]


def calibrated_of(claim: Claim, store: Store, seeds: int) -> list[Run]:
    """The runs whose networks are calibrated, those of the claim's first arm; none before its rate is chosen."""
    protocol, (arm, *_) = claim.parts[0]
    return series(protocol, arm).runs(store, seeds) if claim.options else []


def network_job(run: Run) -> Job:
    return Job(rounded.network_path(run), make_network, (run,))


def make_network(run: Run, folder: Path) -> str:
    rounded.trained(run, folder)
    return "trained"


def job_of(run: Run) -> Job:
    if run.protocol.bits is None:
        return Job.of(training.train, run)
    return Job.of(rounded.measure if run.protocol.activation_bits is None else aware.measure, run)
