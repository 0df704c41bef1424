from __future__ import annotations

import pytest

from lightning_compress.report.directions import direction, preferred


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "min") for name in ("val_loss", "val/CrossEntropyLoss", "test-mse", "WER", "word_error")),
        *((name, "max") for name in ("val/mIoU", "valid.f1")),
        ("errand", None),
        ("close", None),
        ("valloss", "min"),
        ("val/MeanSquaredError", "min"),
        ("val_ppl/dataloader_idx_0", "min"),
        ("RMSE", "min"),
        ("val_acc", "max"),
        ("MulticlassAccuracy", "max"),
        ("val_F1", "max"),
        ("AUROC", "max"),
        ("top5", "max"),
        ("accuracy_loss", None),
        ("metric", None),
        ("placebo", None),
    ],
)
def test_the_direction_is_told_from_the_words_of_the_name(name, way):
    assert direction(name) == way


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["metric", "val_loss", "val_acc", "val_f1"], "val_acc"),
        (["metric", "val_mse", "val_loss"], "val_mse"),
        (["quality", "metric"], "quality"),
    ],
)
def test_what_should_be_large_comes_first(names, chosen):
    assert preferred(names) == chosen
