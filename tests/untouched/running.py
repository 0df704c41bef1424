"""Run one of the projects: alone, and through a recipe; what is left is read from the report."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_compress.commands.recipes import shipped

from .programs import Program

PROJECTS = Path(__file__).with_name("projects")
ROOT = Path(__file__).parents[2]
ALONE = "alone"
"""A recipe that exports and does nothing else: the project as it is, measured like the others."""


@dataclass(frozen=True)
class Compressed:
    """What one run through a recipe came to.

    Attributes:
        command: As a user types it.
        code: Exit code.
        output: Both streams.
        changed: Files of the project that are not what they were.
        report: The JSON report; empty where there is none.
    """

    command: str
    code: int
    output: str
    changed: Sequence[str]
    report: Mapping[str, Any]

    def row(self, name: str) -> Mapping[str, Any]:
        """A row of the report by its name, or that of the exported file by ".onnx"."""
        return next(row for row in self.report["rows"] if row["name"].endswith(name))


def copied(program: Program, folder: Path) -> Path:
    """The project in a folder of its own, with a trained network where the user has one before."""
    place = folder / program.folder
    shutil.copytree(PROJECTS / program.folder, place)
    shutil.copytree(PROJECTS / "common", place, dirs_exist_ok=True)
    if program.before:
        done = _shell(program.before, place)
        if done.returncode:
            raise RuntimeError(f"{program.folder} does not train by itself:\n{done.stdout}")
    return place


def compressed(program: Program, recipe: str, place: Path) -> Compressed:
    """The project, run through a recipe as it is shipped, with what it asks for said by ``--set``."""
    alone = f"version: 1\nexport: {{path: {ALONE}.onnx}}\n"
    (place / f"{recipe}.yaml").write_text(alone if recipe == ALONE else shipped()[recipe])
    settings = " ".join(shlex.quote(setting) for setting in program.settings(recipe))
    command = f"lightning-compress run {recipe}.yaml --set {settings} -- {program.command}"
    shutil.rmtree(place / "compression_report", ignore_errors=True)
    before, reports = _digests(place), _reports(place)
    done = _shell(command, place)
    after = _digests(place)
    written = sorted(_reports(place) - reports)
    return Compressed(
        command=command,
        code=done.returncode,
        output=done.stdout,
        changed=[name for name, digest in before.items() if after.get(name) != digest],
        report=json.loads(written[0].read_text()) if len(written) == 1 else {},
    )


def _shell(command: str, place: Path) -> subprocess.CompletedProcess[str]:
    """A command line with the programs of this Python first, and this checkout; streams as one."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(["bash", "-c", command], cwd=place, env=environment, check=False, timeout=600, **streams)


def _digests(place: Path) -> dict[str, str]:
    sources = [path for path in place.rglob("*") if path.suffix in (".py", ".yaml") and "outputs" not in path.parts]
    return {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}


def _reports(place: Path) -> set[Path]:
    return set(place.rglob("compression_report.json"))
