"""Make every run that is missing, in a few processes side by side."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from .plan import SETTINGS, Arm, Calibrated, Claim, Protocol, Run
from .store import Store, candidates


def make_all(claims: Sequence[Claim], store: Store, *, seeds: int, jobs: int, say: Callable[[str], None]) -> int:
    """Teacher, paraphrasers, runs that choose learning rates, the other seeds; gives the number of failures."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # read when a process loads torch
    parts = unique_parts(claims)
    choosing = [run for part in parts for run in candidates(*part)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=start_worker) as pool:

        def make(job: Callable[[Any, Path], str], runs: Iterable[Run | Calibrated]) -> int:
            futures = {pool.submit(job, run, store.folder): run.key for run in runs}
            failures = 0
            for done, future in enumerate(as_completed(futures), start=1):
                error = future.exception()
                failures += error is not None
                said = f"failed: {type(error).__name__}: {error}" if error is not None else future.result()
                say(f"[{done}/{len(futures)}] {futures[future]}: {said}")
            return failures

        failures = make(prepare_teacher, [run for run in choosing if run.protocol.bits is None][:1])
        failures = failures or make(prepare_paraphraser, one_a_teacher(choosing))
        failures = failures or make(prepare_start, one_a_start(choosing, seeds))
        if failures:  # nothing that follows could be made
            return failures
        failures = make(make_run, missing(choosing, store))
        failures += make(make_run, missing(further_seeds(parts, store, seeds), store))
        return failures + make(make_calibrated, missing(calibrated(claims, store, seeds), store))


def make_in_turn(jobs: int, batches: Iterable[Callable[[], list[Any]]], say: Callable[[str], None]) -> int:
    """Call what each batch holds, (function, *arguments), in processes side by side; gives the number of failures.

    A batch is only asked what it holds once the one before it is done.
    """
    failures = 0
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=start_worker) as pool:
        for batch in batches:
            for future in [pool.submit(*call) for call in batch()]:
                error = future.exception()
                failures += error is not None
                say(f"failed: {type(error).__name__}: {error}" if error is not None else future.result())
    return failures


def unique_parts(claims: Sequence[Claim]) -> list[tuple[Protocol, Arm]]:
    """Every arm of every protocol once, however many claims share it."""
    parts = [(protocol, arm) for claim in claims for protocol, arms in claim.parts for arm in arms]
    return [part for index, part in enumerate(parts) if part not in parts[:index]]


def further_seeds(parts: Iterable[tuple[Protocol, Arm]], store: Store, seeds: int) -> list[Run]:
    """The runs at the learning rates that are chosen; an arm whose choice is not complete has none."""
    runs = []
    for protocol, arm in parts:
        rate = store.chosen_rate(protocol, arm)
        if rate is not None:
            chosen = {run.key for run in candidates(protocol, arm)}
            runs += [run for seed in range(seeds) if (run := Run(protocol, arm, rate, seed)).key not in chosen]
    return runs


def calibrated(claims: Iterable[Claim], store: Store, seeds: int) -> list[Calibrated]:
    """Each option at each setting, for the networks of the claim's first arm; none before its rate is chosen."""
    found = []
    for claim in claims:
        protocol, (arm, *_) = claim.parts[0]
        rate = store.chosen_rate(protocol, arm)
        if rate is not None:
            runs = [Run(protocol, arm, rate, seed) for seed in range(seeds)]
            found += [Calibrated(run, *bits, option) for bits in SETTINGS for option in claim.options for run in runs]
    return found


def missing(runs: Iterable[Any], store: Store) -> list[Any]:
    return [run for run in runs if store.read(run) is None]


def one_a_teacher(runs: Iterable[Run]) -> list[Run]:
    """For each teacher that a run with a trained paraphraser has, one such run."""
    from .training import needs_no_paraphraser

    return list({run.arm.teacher: run for run in runs if not needs_no_paraphraser(run.arm)}.values())


def one_a_start(runs: Iterable[Run], seeds: int) -> list[Run]:
    """For each trained student from which runs go on, one such run."""
    later = [dataclasses.replace(run, seed=seed) for run in runs for seed in range(seeds) if run.protocol.start]
    return list({(run.protocol.start, run.protocol.width, run.seed): run for run in later}.values())


def start_worker() -> None:
    import torch

    from .training import quiet

    os.nice(max(0, 10 - os.nice(0)))  # 10, unless whoever called was more modest
    torch.set_num_threads(1)
    quiet()
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  what callbacks say of their layers, the same in every run


def prepare_teacher(run: Run, folder: Path) -> str:
    from . import training

    if training.teacher_path(run.teacher, folder).is_file():
        return "the teacher is there"
    training.train_teacher(run.teacher, folder)
    return f"teacher trained, test accuracy {training.teacher_file(run.teacher, folder)['test_accuracy']:.4f}"


def prepare_paraphraser(run: Run, folder: Path) -> str:
    from . import training

    if training.paraphraser_path(run, folder).is_file():
        return "the paraphraser is there"
    training.train_paraphraser(run, folder)
    return "paraphraser trained"


def prepare_start(run: Run, folder: Path) -> str:
    from . import rounded

    return f"start trained, {rounded.trained(rounded.start_of(run), folder)['cpu_seconds']:.0f} s"


def make_run(run: Run, folder: Path) -> str:
    if run.protocol.bits is None:
        from .training import train as made
    elif run.protocol.activation_bits is not None:
        from .aware import measure as made
    else:
        from .rounded import measure as made

    result = made(run, folder)
    Store(folder).write(run, result)
    return f"held out {result['held_out_accuracy']:.4f}, {result['cpu_seconds']:.0f} s"


def make_calibrated(quantised: Calibrated, folder: Path) -> str:
    from .calibrated import measure

    result = measure(quantised, folder)
    Store(folder).write(quantised, result)
    return f"test {result['test_accuracy']:.4f}, {result['cpu_seconds']:.0f} s"
