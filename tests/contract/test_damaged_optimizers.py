"""What a checkpoint holds of helpers and their optimizer, damaged: refused before any of it is used."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import CASES
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compress import QATCallback

from .modules import NormClassifier, difference, loader, made, trainer
from .traces import traces

BUILD = {
    "QATCallback": lambda folder, kind: QATCallback(weight_bits=4, step_size="learned"),
    **{case.name: case.build for case in CASES if case.name in ("FactorTransferCallback", "DCILCallback")},
}
PLACES = {
    "QATCallback": ("factors",),
    "FactorTransferCallback": ("translator",),
    "DCILCallback": ("own", "layers"),
}


@pytest.mark.sample
@pytest.mark.parametrize("name", PLACES)
def test_an_optimizer_of_helpers_that_is_damaged_is_refused_and_nothing_has_changed(name, tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="whole", save_top_k=-1)
    trainer(BUILD[name](tmp_path, NormClassifier), saving, enable_checkpointing=True).fit(
        made(NormClassifier), loader()
    )
    whole = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    [key] = [key for key in whole["callbacks"] if key.startswith(name)]
    broken = copy.deepcopy(whole)
    part = broken["callbacks"][key]
    for inner in PLACES[name]:
        part = part[inner]
    entries = part["optimizer"]["state"][0]
    entry = next(own for own, value in entries.items() if isinstance(value, torch.Tensor) and value.ndim)
    entries[entry].fill_(math.nan)
    torch.save(broken, tmp_path / "broken.ckpt")
    module, callback = made(NormClassifier), BUILD[name](tmp_path, NormClassifier)
    before, place = traces(module).keys(), ".".join(PLACES[name])
    with pytest.raises(ValueError, match=rf"is damaged: '{place}.optimizer.state.0.{entry}' must be finite"):
        trainer(callback, max_epochs=2).fit(module, loader(), ckpt_path=tmp_path / "broken.ckpt", weights_only=True)
    assert before == traces(module).keys()
    trainer(callback, max_epochs=2).fit(module, loader(), ckpt_path=tmp_path / "whole.ckpt", weights_only=True)
    assert difference(module, made(NormClassifier)) > 0
