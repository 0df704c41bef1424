"""Run all projects with all their recipes, and write the tables of a page.

    python -m tests.untouched --out untouched --page docs/untouched.md

It takes about ten minutes, and needs what ``tests/strangers/requirements.txt`` lists beside the test extra. Tables that
are in the folder already are taken from there.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_compress.report.units import size
from tests.experiments.tables import splice

from .programs import PROGRAMS, Program
from .running import ALONE, Compressed, compressed, copied

HEAD = """| | recipe | {metric}, in the file | file | deflated | non-zero | MACs |
|---|---|---|---|---|---|---|"""


def section(program: Program, folder: Path) -> str:
    """A heading, the table, and the command of the first recipe."""
    place = copied(program, folder)
    runs = {recipe: compressed(program, recipe, place) for recipe in (ALONE, *program.recipes)}
    for recipe, run in runs.items():
        print(f"{program.folder}, {recipe}: exit code {run.code}, changed: {list(run.changed)}", file=sys.stderr)
        if run.code or run.changed:
            raise RuntimeError(f"{run.command}\n{run.output[-3000:]}")
    rows = [line("as it is", "none", runs[ALONE], program.metric)]
    teacher = [row for run in runs.values() for row in run.report["rows"] if row["name"] == "teacher"]
    if teacher:
        rows.insert(0, teacher_line(teacher[0], program.metric))
    rows += [line("compressed", recipe, runs[recipe], program.metric) for recipe in program.recipes]
    title = program.title[0].upper() + program.title[1:]
    table = "\n".join([HEAD.format(metric=f"`{program.metric}`"), *rows])
    return f"### {title}\n\n{table}\n\n```console\n{wrapped(program, program.recipes[0])}\n```\n"


def line(what: str, recipe: str, run: Compressed, metric: str) -> str:
    """The file, and the network that it was made of."""
    file, network = run.row(".onnx"), run.row("after")
    cells = [f"{100 * file['metrics'][metric]:.1f}%", size(file["bytes"]), size(file["bytes_compressed"])]
    return "| " + " | ".join([what, recipe, *cells, f"{network['nonzeros']:,}", f"{network['macs']:,}"]) + " |"


def teacher_line(row: Mapping[str, Any], metric: str) -> str:
    """The teacher is a network, not a file."""
    cells = [f"{100 * row['metrics'][metric]:.1f}%, in torch", "", "", f"{row['nonzeros']:,}", f"{row['macs']:,}"]
    return "| " + " | ".join(["the teacher", "", *cells]) + " |"


def wrapped(program: Program, recipe: str) -> str:
    """The command line, a setting a line."""
    settings = [shlex.quote(setting) for setting in program.settings(recipe)]
    lines = [f"lightning-compress run {recipe}.yaml --set", *settings, f"-- {program.command}"]
    return " \\\n    ".join(lines)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished tables")
    parser.add_argument("--only", choices=PROGRAMS, nargs="+", default=list(PROGRAMS), help="some of the projects")
    parser.add_argument("--page", type=Path, help="put all tables between the marks of this page")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tables = {name: options.out / f"{name}.md" for name in options.only}
    for name, table in tables.items():
        if not table.exists():
            with tempfile.TemporaryDirectory() as folder:
                table.write_text(section(PROGRAMS[name], Path(folder)))
    text = "\n".join(table.read_text() for table in tables.values())
    if options.page:
        splice(options.page, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
