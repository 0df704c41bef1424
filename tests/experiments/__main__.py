"""Measure what the techniques gain, and write tables, pictures, the results of all, and those of the method cards.

    python -m tests.experiments [kd at ft masks psgd qat structured pipeline library] [--out FOLDER] [--jobs 2]
        [--seeds 8] [--pages] [--afresh]

Runs that are in the folder already are not made again, so the command can be stopped and started at any time; neither
are those whose records come with the documentation, unless all are asked for afresh.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import torch

from . import cards, results
from .claims import Claimed
from .experiment import Experiment
from .library import Library
from .pipeline import Pipeline
from .plan import CLAIMS
from .published import publish, published
from .schedule import make_all
from .store import Store
from .structured import Structured
from .tables import splice
from .training import quiet

DOCS = Path(__file__).parents[2] / "docs"
RECORDS = Path("experiments/runs")  # in DOCS
SEEDS = 8  # of what is published
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
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds an arm")
    parser.add_argument("--list", action="store_true", help="say which runs there are and which are missing; make none")
    parser.add_argument("--tables-only", action="store_true", help="write the tables from the runs that are there")
    parser.add_argument("--pages", action="store_true", help="put the tables into the pages under docs too")
    parser.add_argument("--afresh", action="store_true", help="make the runs too whose records come with the pages")
    options = parser.parse_intermixed_args()
    for name in options.names:
        if name not in EXPERIMENTS:
            parser.error(f"names must be of {', '.join(EXPERIMENTS)}, got {name}{nearest(name)}")
    if options.pages and options.seeds != SEEDS:
        parser.error(f"--pages is for tables of {SEEDS} seeds, got --seeds {options.seeds}")
    if options.pages and options.afresh and options.names:
        parser.error("--pages writes the results of all experiments: with --afresh, name none")
    chosen = {name: EXPERIMENTS[name] for name in options.names or EXPERIMENTS}
    store = Store(options.out, {} if options.afresh else published(DOCS / RECORDS))
    begin, failures = time.perf_counter(), 0
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
        text = shown(experiment, store, options.seeds, folders)
        say(f"\n{text}")
        write(experiment.page, text, folders)
    text = results.tables(EXPERIMENTS, store, options.seeds)
    write(results.PAGE, text, [options.out, *([DOCS] if options.pages else [])])
    if options.pages:
        for name, card in cards.CARDS.items():
            if card.experiment in chosen:
                splice(DOCS / f"techniques/{name}.md", f"{card.table(store, options.seeds)}\n")
        publish(EXPERIMENTS, store, options.seeds, DOCS / RECORDS)
    say(f"\n{text}\nTook {(time.perf_counter() - begin) / 60:.1f} minutes with {options.jobs} processes.")
    return 1 if failures else 0


def nearest(name: str) -> str:
    """The experiment that is spelled most alike, or whose page is."""
    called = {**{Path(one.page).stem: own for own, one in EXPERIMENTS.items()}, **{own: own for own in EXPERIMENTS}}
    close = get_close_matches(name, called, n=1)
    return f"; did you mean {called[close[0]]}?" if close else ""


def list_runs(name: str, experiment: Experiment, store: Store, seeds: int) -> None:
    jobs = [job for job in experiment.jobs(store, seeds) if job.is_result]
    there = sum(job.there(store) for job in jobs)
    say(f"{name}: {there} there, {len(jobs) - there} missing of those that can be named by now")
    for job in jobs:
        say(f"  {'there  ' if job.there(store) else 'missing'} {job.path.stem}")


def shown(experiment: Experiment, store: Store, seeds: int, folders: Sequence[Path]) -> str:
    """The tables below their picture, drawn into all folders; where nothing is to be seen, that of other runs goes."""
    text = experiment.tables(store, seeds)
    if experiment.picture is None:
        return text
    paths = [folder / experiment.picture for folder in folders]
    drawn = [experiment.draw(store, seeds, path) for path in paths]
    if all(drawn):
        return f"![{experiment.caption}]({experiment.picture})\n\n{text}"
    for path in paths:
        path.unlink(missing_ok=True)
    return text


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
