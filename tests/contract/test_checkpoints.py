"""Checkpoints: the user's keys, no teacher in them, readable by a process that has never heard of this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils._pytree import tree_leaves

from .grid import is_sample
from .modules import Classifier, difference, loader, made, trainer, twin

PLAIN_PROCESS = """
import sys
sys.modules["lightning_compress"] = None  # any import of it fails
import torch
from plain_network import small_network
for path, prediction in zip(sys.argv[1::2], sys.argv[2::2]):
    checkpoint = torch.load(path, weights_only=True)
    network = small_network()
    weights = {key.removeprefix("model."): value for key, value in checkpoint["state_dict"].items()}
    network.load_state_dict(weights, strict=True)
    inputs, expected = torch.load(prediction, weights_only=True)
    print(torch.equal(network.eval()(inputs), expected))
"""
PLAIN_NETWORK = """
from torch import nn
class Convolution(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.reshape(-1, 1, 2, 4))
def small_network():
    return nn.Sequential(Convolution(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
"""


def bytes_of(module: torch.nn.Module) -> list[bytes]:
    return [value.numpy().tobytes() for value in module.state_dict().values() if value.numel() > 1]


# Full checkpoints are tried with each row, and with the first one also weights alone and further modules.
KINDS_OF_CHECKPOINT = [
    pytest.param(
        case,
        kind,
        weights_only,
        id=f"{case.name}-{kind.__name__}-{'weights_only' if weights_only else 'full'}",
        marks=[pytest.mark.slow]
        * (case.heavy or not is_sample(case, kind) or (weights_only and (case, kind) != (CASES[0], case.modules[0]))),
    )
    for case in CASES
    for kind in case.modules
    for weights_only in (False, True)
]


@pytest.mark.parametrize(("case", "kind", "weights_only"), KINDS_OF_CHECKPOINT)
def test_checkpoints_are_plain_during_the_fit_and_after(case, kind, weights_only, tmp_path):
    module, callback = made(kind), case.build(tmp_path, kind)
    saver = ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1, save_weights_only=weights_only
    )
    fitting = trainer(callback, saver, enable_checkpointing=True)
    fitting.fit(module, loader(kind), loader(kind))
    fitting.save_checkpoint(tmp_path / "after.ckpt", weights_only=weights_only)

    keys = list(made(kind).state_dict())
    paths = [tmp_path / name for name in ("step=3.ckpt", "step=6.ckpt", "after.ckpt")]
    for path in paths:
        checkpoint = torch.load(path, weights_only=True)
        assert list(checkpoint["state_dict"]) == keys
        twin(kind, checkpoint)
        assert ("callbacks" in checkpoint) != weights_only
        if not weights_only:
            assert checkpoint["callbacks"][callback.state_key]["schema"] == 1
            assert all(type(leaf).__module__ in ("builtins", "torch") for leaf in tree_leaves(checkpoint))
    assert difference(module, torch.load(paths[-1], weights_only=True)["state_dict"]) == 0


@pytest.mark.parametrize("case", [case for case in CASES if case.changes_loss], ids=lambda case: case.name)
def test_the_teacher_is_in_no_checkpoint(case, tmp_path):
    module, callback = made(Classifier), case.build(tmp_path, Classifier)
    fitting = trainer(callback, ModelCheckpoint(tmp_path, filename="end"), enable_checkpointing=True)
    fitting.fit(module, loader(), loader())
    content = (tmp_path / "end.ckpt").read_bytes()
    assert all(values in content for values in bytes_of(module))
    teacher = callback.teacher_network
    assert teacher is None or not any(values in content for values in bytes_of(teacher))


@pytest.mark.slow
def test_a_process_without_this_package_loads_the_checkpoints(tmp_path):
    (tmp_path / "plain_network.py").write_text(PLAIN_NETWORK)
    arguments: list[Path] = []
    inputs = torch.randn(4, 8)
    cases = [case for case in CASES if not case.shrinks]
    for case in cases:
        module, fitting = made(Classifier), trainer(case.build(tmp_path, Classifier))
        fitting.fit(module, loader(), loader())
        for weights_only in (False, True):
            path = tmp_path / f"{case.name}-{weights_only}.ckpt"
            fitting.save_checkpoint(path, weights_only=weights_only)
            torch.save((inputs, module.eval()(inputs).detach()), path.with_suffix(".pt"))
            arguments += [path, path.with_suffix(".pt")]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_PROCESS, *map(str, arguments)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["True"] * 2 * len(cases), done.stderr
