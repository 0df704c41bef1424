"""Which metric is taken, and in which direction."""

from __future__ import annotations

import math

import pytest

from lightning_compress.commands.sensitivity.metrics import Metric, choose_metric


@pytest.mark.parametrize(
    ("metrics", "name", "mode"),
    [
        (["val_loss", "val_acc"], "val_acc", "max"),
        (["val_loss"], "val_loss", "min"),
        (["loss", "valid/MulticlassAccuracy"], "valid/MulticlassAccuracy", "max"),
        (["val_mse/dataloader_idx_0", "val_mse/dataloader_idx_1"], "val_mse/dataloader_idx_0", "min"),
        (["lower", "val_F1"], "val_F1", "max"),
        (["val_error_rate"], "val_error_rate", "min"),
    ],
)
def test_by_name(metrics, name, mode):
    chosen = choose_metric(dict.fromkeys(metrics, 0.5))
    assert (chosen.name, chosen.mode) == (name, mode)
    assert ("higher" if mode == "max" else "lower") in chosen.said


def test_as_asked():
    chosen = choose_metric({"val_acc": 0.5, "thing": 1.0}, "thing", "min")
    assert (chosen.name, chosen.mode, chosen.said) == ("thing", "min", "'thing', lower is better")
    assert choose_metric({"val_acc_epoch": 0.5, "loss": 1.0}, "val_acc").name == "val_acc_epoch"


@pytest.mark.parametrize(
    ("metrics", "name", "message"),
    [
        ({}, None, "the validation logs no metric"),
        (
            {"val_acc": 1.0},
            "val_ac",
            "--metric 'val_ac' is not among the metrics of the validation, 'val_acc'; did you",
        ),
        ({"thing": 1.0}, None, "whether 'thing' is better when it is higher cannot be told by its name: give --mode"),
        ({"val_acc": math.nan}, None, "'val_acc' of the checkpoint is nan, before anything was changed"),
    ],
)
def test_what_cannot_be_judged_by(metrics, name, message):
    with pytest.raises(ValueError) as raised:
        choose_metric(metrics, name)
    assert message in str(raised.value)


def test_a_loss_that_is_no_number_is_infinite():
    assert Metric("val_loss", "min").loss(1.0, math.nan) == math.inf
    assert Metric("val_acc", "max").loss(0.5, 0.75) == -0.25
