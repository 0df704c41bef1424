"""A fit that is killed with SIGKILL and resumed from its newest checkpoint ends as the uninterrupted one, bit for bit.

Each point has a control arm without a callback of ours.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES
from records import record
from torch.utils._pytree import tree_leaves

from lightning_compress.export.runtime import OnnxNetwork
from lightning_compress.mechanisms.checkpoints import SECTION
from lightning_compress.report import from_json

from .kills import POINTS

COMBINATIONS = (
    "DistillationCallback + DPFCallback + QATCallback",
    "AttentionTransferCallback + PruningCallback",
    "StructuredPruningCallback + DistillationCallback",
    "QATCallback + ExportCallback + CompressionReport",
)
FILES = ("model.onnx", "compression_report.json", "compression_report.md", "compression_report.html")
QUICK = (("", "a save"), ("PruningCallback", "a save"), ("CompressionReport", "writing a file"))


class Fits:
    """The process that runs them, and the uninterrupted fit of each row."""

    def __init__(self, process, folder):
        self.process, self.folder, self.whole = process, folder, {}

    def fit(self, row, folder, point="", resume=None):
        folder.mkdir(exist_ok=True)
        request = {"row": row, "folder": str(folder), "point": point, "resume": resume and str(resume)}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def uninterrupted(self, row):
        if row not in self.whole:
            folder = self.folder / f"whole{len(self.whole)}"
            assert self.fit(row, folder) == 0, (folder / "log.txt").read_text()
            self.whole[row] = folder
        return self.whole[row]


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fits")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path_factory.mktemp("temporary"))}
    script = Path(__file__).with_name("kills.py")
    with subprocess.Popen([sys.executable, str(script)], env=environment, **pipes) as process:
        yield Fits(process, folder)
        process.stdin.close()


def state_of(folder):
    """What a resumed fit must end with: all but the paths, and the time of the exported file."""
    end = torch.load(folder / "end.ckpt", weights_only=True)
    ours = {key: value for key, value in end["callbacks"].items() if not key.startswith("ModelCheckpoint")}
    for own in ours.values():
        own["arguments"].pop("path", None)
    state = {key: end[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}
    return {**state, "ours": ours, SECTION: end.get(SECTION)}


def differences(first, second):
    """Whether two trees have the same leaves, bit for bit."""
    leaves, others = tree_leaves(first), tree_leaves(second)
    assert len(leaves) == len(others)
    pairs = zip(leaves, others, strict=True)
    return [(a, b) for a, b in pairs if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)]


def files_in(folder):
    """What a user would look at, and drafts."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [name for name in names if not name.endswith(".ckpt") and name != "log.txt"]


def assert_whole(folder, names):
    for name in names:
        path = folder / name
        if path.suffix == ".onnx":
            assert OnnxNetwork(path).run([torch.zeros(2, 8)])[0].shape == (2, 3)
        elif path.suffix == ".json":
            assert len(from_json(path.read_text()).rows) >= 2
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        else:
            assert path.read_text()


def writes(row):
    return any(name in row for name in ("ExportCallback", "CompressionReport"))


CELLS = [
    pytest.param(
        row,
        point,
        id=f"{row or 'control'}-{point}",
        marks=[pytest.mark.slow, *([pytest.mark.sample] if (row, point) in QUICK else [])],
    )
    for row in ("", *(case.name for case in CASES), *COMBINATIONS)
    for point in POINTS
    if point != "writing a file" or writes(row)
]


@pytest.mark.parametrize(("row", "point"), CELLS)
def test_killed_and_resumed(row, point, fits, tmp_path):
    whole, folder = fits.uninterrupted(row), tmp_path / "killed"
    assert fits.fit(row, folder, point) == -signal.SIGKILL, (folder / "log.txt").read_text()
    saved = {int(path.stem.partition("=")[2]): path for path in folder.glob("*.ckpt")}
    for path in saved.values():
        torch.load(path, weights_only=True)
    newest = max(saved, default=None)
    assert newest == POINTS[point]
    visible = [name for name in files_in(folder) if not name.startswith(".") and "/." not in name]
    assert_whole(folder, visible)
    assert not any(name.endswith((".onnx", ".html")) for name in visible)

    assert fits.fit(row, folder, resume=saved.get(newest)) == 0, (folder / "log.txt").read_text()
    assert differences(state_of(folder), state_of(whole)) == []
    assert files_in(folder) == files_in(whole)
    assert_whole(folder, files_in(folder))
    if row:
        record("kills", row, point, "repeatable", "" if newest else "from the start: there was no checkpoint yet")
