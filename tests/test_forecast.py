"""What a recipe will come to: shares, sizes, the cost of a step, and terms that are too strong or too weak."""

from __future__ import annotations

import warnings

import lightning.pytorch as L
import pytest
import torch
from contract.modules import Batches, Classifier, NormClassifier
from torch import nn
from torch.utils.data import DataLoader

from lightning_compress import DCILCallback, DistillationCallback, DPFCallback, PTQCallback, StructuredPruningCallback
from lightning_compress.commands.forecast import forecast
from lightning_compress.commands.foresight import _hear
from lightning_compress.mechanisms.step import find_controller


class Forecasts(L.Callback):
    """What is foreseen after the first step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:
            before = pl_module.training
            self.found = forecast(trainer, pl_module, find_controller(pl_module).last, ["beware"])
            assert pl_module.training == before


def foreseen(*callbacks, module=None, steps=1):
    last = Forecasts()
    L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, last],
    ).fit(Classifier() if module is None else module, DataLoader(Batches(16), 8))
    return last.found


def test_shares_and_the_cost_of_a_teacher(recwarn):
    teacher = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 3))
    found = foreseen(DistillationCallback(teacher), DPFCallback(0.5, exclude=["type:Linear"]))
    convolution, head = 4 * 9 * 8, 32 * 3  # multiply-accumulates: 8 positions of 4 filters of 9 weights
    assert (found["module"], found["parameters"], found["macs"]) == ("Classifier", 40 + 99, convolution + head)
    assert found["callbacks"]["dpf"]["share_of_parameters"] == 36 / 139
    assert found["callbacks"]["dpf"]["share_of_macs"] == convolution / (convolution + head)
    assert found["callbacks"]["kd"]["share_of_macs"] == 0
    own = (8 * 30 + 30 * 3) / (3 * (convolution + head))
    assert found["step"] == {"passes": 1, "teachers": 1, "times": pytest.approx(1 + own)}
    assert found["warnings"] == ["beware"]
    assert list(found["losses"]["terms"]) == ["kd"]


def test_sizes_are_those_before_filters_went(recwarn):
    """Two of four filters go, and with them half of the convolution and of what the head reads."""
    now = {"min_channels": 1, "layers": ["type:Conv2d"]}
    found = []
    for start in (0.0, 0.5):
        kd = DistillationCallback(nn.Sequential(nn.Linear(8, 3)))  # sees the network
        found.append(foreseen(kd, StructuredPruningCallback(0.5, start=start, **now), DPFCallback(0.5), steps=2))
    went, later = found
    assert (went["parameters"], went["macs"]) == (later["parameters"], later["macs"]) == (139, 288 + 96)
    for own in (went["callbacks"]["structured"], later["callbacks"]["structured"]):
        assert own["share_of_parameters"] == 40 / 139
        assert own["share_of_macs"] == 288 / (288 + 96)
    assert went["callbacks"]["dpf"]["share_of_parameters"] == (18 + 48) / (20 + 51)
    assert went["callbacks"]["dpf"]["share_of_macs"] == 1
    assert "went before the first step" in went["callbacks"]["structured"]["notes"][0]


def test_a_second_pass_costs_as_much_as_the_first(recwarn):
    found = foreseen(DCILCallback(0.5, update_interval=1), module=NormClassifier())
    assert found["step"] == {"passes": 2, "teachers": 0, "times": 2.0}
    assert found["losses"]["terms"] == {}


def test_a_network_that_takes_no_single_sample_is_not_counted(recwarn):
    class Picky(nn.Sequential):
        def forward(self, x):
            if len(x) == 1:
                raise RuntimeError("one is not enough")
            return super().forward(x)

    module = Classifier()
    module.model = Picky(*module.model)
    found = foreseen(DPFCallback(0.5), DistillationCallback(Classifier()), module=module)
    assert found["macs"] is None
    assert found["step"]["times"] is None
    assert found["callbacks"]["dpf"]["share_of_macs"] is None
    assert found["warnings"][1] == "multiply-accumulates are not counted: RuntimeError: one is not enough"


@pytest.mark.parametrize(
    ("weight", "end"),
    [
        (1e7, "so the network will learn little else; give it a smaller weight"),
        (1e-7, "give it a larger weight"),
        (1, ""),
    ],
)
def test_terms_that_are_too_strong_or_too_weak(weight, end):
    torch.manual_seed(0)
    told = foreseen(DistillationCallback(Classifier(), kd_weight=weight))["warnings"][1:]
    assert len(told) == bool(end)
    assert all(each.startswith("the term of 'kd' is ") and each.endswith(end) for each in told)


def test_what_only_one_sample_shows_is_enough():
    callback = PTQCallback(max_samples=512)
    assert callback.settings().max_samples == 512
    callback.planning = True
    assert callback.settings().max_samples == 1


def test_warnings_of_this_package_are_heard_whatever_the_filters_are(monkeypatch):
    heard = []
    monkeypatch.setattr(warnings, "warn", warnings.warn)  # to be put back
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _hear(heard)
        warnings.warn("not of ours", stacklevel=1)
        PTQCallback()._warn_once("of ours")
    assert heard == ["PTQCallback 'ptq': of ours"]
    with pytest.warns(UserWarning, match="where it was") as caught:
        warnings.warn("where it was", stacklevel=1)
    assert caught[0].filename == __file__
