"""Make every run that is missing, in a few processes side by side."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from pathlib import Path

from .experiment import Experiment, Job
from .store import Store


def make_all(experiment: Experiment, store: Store, *, seeds: int, jobs: int, say: Callable[[str], None]) -> int:
    """Make what an experiment lacks, batch by batch; gives the number of failures.

    Each batch has processes of its own: one that is killed takes what is left of its batch with it, and no other.
    A batch of which nothing could be made is the last one: what follows it would fail likewise.
    """
    failures = 0
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # read when a process loads torch
    spawn = multiprocessing.get_context("spawn")
    for left in needed(experiment, store, seeds):
        with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=start_worker) as pool:
            failed = make_batch(left, store.folder, pool, say)
        failures += failed
        if failed == len(left):
            break
    return failures


def needed(experiment: Experiment, store: Store, seeds: int) -> Iterator[list[Job]]:
    """What is missing, batch by batch; files wait until a later result is missing, and are left out if none is."""
    waiting: list[list[Job]] = []
    for batch in experiment.batches(store, seeds):
        if left := missing(batch, store):
            waiting.append(left)
        if any(job.is_result for job in left):
            for own in waiting:
                if still := missing(own, store):  # what one leaves may be what another makes
                    yield still
            waiting = []


def missing(jobs: Sequence[Job], store: Store) -> list[Job]:
    return [job for job in jobs if not job.there(store)]


def make_batch(jobs: Sequence[Job], folder: Path, pool: Executor, say: Callable[[str], None]) -> int:
    futures = {submitted(pool, job, folder): job.path.stem for job in jobs}
    failures = 0
    for done, future in enumerate(as_completed(futures), start=1):
        error = future.exception()
        failures += error is not None
        said = f"failed: {type(error).__name__}: {error}" if error is not None else future.result()
        say(f"[{done}/{len(futures)}] {futures[future]}: {said}")
    return failures


def submitted(pool: Executor, job: Job, folder: Path) -> Future[str]:
    """The job's future; it has failed already where a process was killed while others were still being submitted."""
    try:
        return pool.submit(job.make, *job.arguments, folder)
    except BrokenExecutor as error:
        failed: Future[str] = Future()
        failed.set_exception(error)
        return failed


def start_worker() -> None:
    import torch

    from .training import quiet

    os.nice(max(0, 10 - os.nice(0)))  # 10, unless whoever called was more modest
    torch.set_num_threads(1)
    quiet()
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  what callbacks say of their layers, the same in every run
