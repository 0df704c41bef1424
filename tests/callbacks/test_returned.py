"""What the callbacks found comes back from spawned and forked processes."""

from __future__ import annotations

import os

import pytest
import torch
from contract.modules import Classifier, loader, made, trainer

from lightning_compress import CompressionReport, ExportCallback, PruningCallback
from lightning_compress.callbacks.returned import Returned, ReturnsResults
from lightning_compress.mechanisms.checkpoints import dense_of


class Finds(ReturnsResults):
    count = Returned(0)
    other = Returned("nothing")


def test_results_travel_once():
    found = Finds()
    child = Finds()
    vars(child).update(vars(found))
    child.count = 3
    child.send_home()
    assert (found.count, found.other) == (3, "nothing")
    assert not os.path.exists(found._parcel)
    found.count = 4
    assert found.count == 4
    assert isinstance(Finds.count, Returned)


def test_a_parcel_that_nobody_looked_at_is_removed():
    found = Finds()
    found.count = 1
    found.send_home()
    path = found._parcel
    assert os.path.exists(path)
    del found
    assert not os.path.exists(path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_the_parent_has_the_compressed_module_and_all_results(strategy, tmp_path):
    module, pruning = made(Classifier), PruningCallback(0.8)
    export, report = ExportCallback(tmp_path / "model.onnx"), CompressionReport(path=tmp_path, latency=False)
    fitting = trainer(pruning, export, report, devices=2, strategy=strategy)
    fitting.fit(module, loader(), loader())
    zeros = {name: int((weight == 0).sum()) for name, weight in module.named_parameters() if weight.ndim > 1}
    assert sum(zeros.values()) == 106 == round(pruning.reached * 132)
    for name, mask in pruning.masks.items():
        assert torch.equal(module.get_parameter(name) != 0, mask)
    assert export.result.path == tmp_path / "model.onnx"
    assert [row.name for row in report.result.rows] == ["before", "after", "model.onnx"]
    fitting.save_checkpoint(tmp_path / "after.ckpt")
    dense = dense_of(torch.load(tmp_path / "after.ckpt", weights_only=True), "pruning")
    assert set(dense) == set(zeros)
    assert not any((value == 0).any() for value in dense.values())
    assert not any(os.path.exists(callback._parcel) for callback in (pruning, export, report))
