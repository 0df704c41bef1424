"""Measure what the techniques gain, and write the tables.

    python -m tests.experiments [kd at ft masks psgd qat] [--out FOLDER] [--jobs 2] [--seeds 3]

Runs that are in the folder already are not made again, so the command can be stopped and started at any time.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from . import bits, curves
from .plan import CLAIMS
from .schedule import calibrated, further_seeds, make_all, unique_parts
from .store import Store, candidates
from .tables import claim_tables, splice

PAGES = Path("docs/experiments")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", help=f"of {', '.join(CLAIMS)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("experiments"), help="folder that keeps the runs")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side, one thread each")
    parser.add_argument("--seeds", type=int, default=3, help="seeds an arm")
    parser.add_argument("--list", action="store_true", help="say which runs there are and which are missing; make none")
    parser.add_argument("--tables-only", action="store_true", help="write the tables from the runs that are there")
    parser.add_argument("--pages", action="store_true", help=f"put the tables into the pages under {PAGES} too")
    options = parser.parse_args()
    if unknown := set(options.claims) - set(CLAIMS):
        parser.error(f"claims must be of {', '.join(CLAIMS)}, got {', '.join(sorted(unknown))}")
    claims = [CLAIMS[name] for name in options.claims or CLAIMS]
    store, begin = Store(options.out), time.perf_counter()
    if options.list:
        parts = unique_parts(claims)
        runs = [run for part in parts for run in candidates(*part)]
        later = [*further_seeds(parts, store, options.seeds), *calibrated(claims, store, options.seeds)]
        for run in [*runs, *later]:
            print("there  " if store.read(run) else "missing", run.key)
        return 0
    failures = 0
    if not options.tables_only:
        options.out.mkdir(parents=True, exist_ok=True)
        failures = make_all(claims, store, seeds=options.seeds, jobs=options.jobs, say=say)
    for claim in claims:
        text = claim_tables(claim, store, options.seeds)
        (options.out / claim.page).write_text(text)
        folders = [options.out, *([PAGES] if options.pages else [])]
        if options.pages:
            splice(PAGES / claim.page, text)
        if claim.picture is not None:
            for folder in folders:
                (bits if claim.options else curves).draw(claim, store, options.seeds, folder / claim.picture)
        say(f"\n{text}")
    say(f"Took {(time.perf_counter() - begin) / 60:.1f} minutes with {options.jobs} processes.")
    return 1 if failures else 0


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
