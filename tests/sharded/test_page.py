"""The page on sharded training does what it says: two processes, a resumed fit, one file of it, two exports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import onnxruntime
import pytest
from pages import ROOT, blocks
from records import record

PAGE = ROOT / "docs/sharded.md"


@pytest.mark.slow
def test_the_commands_train_resume_and_export(tmp_path):
    script, [commands] = blocks(PAGE, "python")[0], blocks(PAGE, "console")
    (tmp_path / "train.py").write_text(script)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert "`max_epochs=4` reached" in done.stdout + done.stderr
    assert "Restored all states from the checkpoint at checkpoints/last.ckpt" in done.stdout + done.stderr
    assert "88 of 176 weights in 2 tensors are masked" in done.stdout
    inputs = numpy.random.default_rng(0).standard_normal((5, 8), dtype=numpy.float32)
    outputs = []
    for name in ("pruned.onnx", "again.onnx"):
        session = onnxruntime.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"])
        outputs += session.run(None, {session.get_inputs()[0].name: inputs})
    assert abs(outputs[0] - outputs[1]).max() == 0
    record("sharded", "DPFCallback + ExportCallback + CompressionReport", "the commands of the page on it", "works")
