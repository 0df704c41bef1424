"""Measure what the techniques gain, and write tables, pictures, the results of all, and those of the method cards.

    python -m tests.experiments [kd at ft masks psgd qat structured pipeline library] [--out FOLDER] [--jobs 2]
        [--seeds 8] [--pages]

Runs that are in the folder already are not made again, so the command can be stopped and started at any time.
"""

from __future__ import annotations

import argparse
import sys
import time
from difflib import get_close_matches
from pathlib import Path

import torch

from . import cards, results
from .claims import Claimed
from .experiment import Experiment
from .library import Library
from .pipeline import Pipeline
from .plan import CLAIMS
from .schedule import make_all
from .store import Store
from .structured import Structured
from .tables import splice
from .training import quiet

DOCS = Path("docs")
EXPERIMENTS: dict[str, Experiment] = {
    **{name: Claimed(claim) for name, claim in CLAIMS.items()},
    "structured": Structured(),
    "pipeline": Pipeline(),
    "library": Library(),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("experiments"), help="folder that keeps the runs")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side, one thread each")
    parser.add_argument("--seeds", type=int, default=8, help="seeds an arm")
    parser.add_argument("--list", action="store_true", help="say which runs there are and which are missing; make none")
    parser.add_argument("--tables-only", action="store_true", help="write the tables from the runs that are there")
    parser.add_argument("--pages", action="store_true", help=f"put the tables into the pages under {DOCS} too")
    options = parser.parse_intermixed_args()
    for name in options.names:
        if name not in EXPERIMENTS:
            parser.error(f"names must be of {', '.join(EXPERIMENTS)}, got {name}{nearest(name)}")
    chosen = {name: EXPERIMENTS[name] for name in options.names or EXPERIMENTS}
    store, begin, failures = Store(options.out), time.perf_counter(), 0
    quiet()
    torch.set_num_threads(1)
    if options.list:
        for name, experiment in chosen.items():
            list_runs(name, experiment, store, options.seeds)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    folders = [options.out, *([DOCS / "experiments"] if options.pages else [])]
    for experiment in chosen.values():
        if not options.tables_only:
            failures += make_all(experiment, store, seeds=options.seeds, jobs=options.jobs, say=say)
        text = experiment.tables(store, options.seeds)
        if experiment.picture is not None and draw(experiment, store, options.seeds, folders):
            text = f"![{experiment.caption}]({experiment.picture})\n\n{text}"
        say(f"\n{text}")
        write(experiment.page, text, folders)
    text = results.tables(EXPERIMENTS, store, options.seeds)
    write(results.PAGE, text, [options.out, *([DOCS] if options.pages else [])])
    if options.pages:
        for name, card in cards.CARDS.items():
            if card.experiment in chosen:
                splice(DOCS / f"techniques/{name}.md", f"{card.table(store, options.seeds)}\n")
    say(f"\n{text}\nTook {(time.perf_counter() - begin) / 60:.1f} minutes with {options.jobs} processes.")
    return 1 if failures else 0


def nearest(name: str) -> str:
    """The experiment that is spelled most alike, or whose page is."""
    called = {**{Path(one.page).stem: own for own, one in EXPERIMENTS.items()}, **{own: own for own in EXPERIMENTS}}
    close = get_close_matches(name, called, n=1)
    return f"; did you mean {called[close[0]]}?" if close else ""


def list_runs(name: str, experiment: Experiment, store: Store, seeds: int) -> None:
    jobs = experiment.jobs(store, seeds)
    there = sum(job.there(store.folder) for job in jobs)
    say(f"{name}: {there} there, {len(jobs) - there} missing of those that can be named by now")
    for job in jobs:
        say(f"  {'there  ' if job.there(store.folder) else 'missing'} {job.path.stem}")


def draw(experiment: Experiment, store: Store, seeds: int, folders: list[Path]) -> bool:
    """Draw the picture into all folders; where there is nothing to be seen, that of other runs goes."""
    paths = [folder / str(experiment.picture) for folder in folders]
    drawn = [experiment.draw(store, seeds, path) for path in paths]
    if not all(drawn):
        for path in paths:
            path.unlink(missing_ok=True)
    return all(drawn)


def write(page: str, text: str, folders: list[Path]) -> None:
    """A page of its own in the folder of the runs; between the markers in those of the docs."""
    out, *docs = folders
    (out / page).write_text(text)
    for folder in docs:
        splice(folder / page, text)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
