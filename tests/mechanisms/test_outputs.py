"""Where the logits are in an output and the labels in a batch."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_compress.mechanisms.outputs import describe, find_labels, find_logits, locate

LOGITS, OTHER = torch.ones(2, 3), torch.zeros(2, 5)
LABELS = torch.tensor([0, 1])


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


Named = namedtuple("Named", ["logits", "hidden"])
Plain = namedtuple("Plain", ["scores", "count"])


@pytest.mark.parametrize(
    ("output", "locator"),
    [
        (LOGITS, None),
        (LOGITS, "anything"),
        ({"logits": LOGITS, "hidden": OTHER}, None),
        ({"out": LOGITS, "aux": OTHER}, None),
        ({"logits": LOGITS, "out": OTHER}, None),
        (Output(LOGITS, OTHER), None),
        (Named(LOGITS, OTHER), None),
        (Plain(LOGITS, 3), None),
        ((LOGITS, torch.tensor([1, 2])), None),
        ([{"deep": LOGITS}], None),
        ((OTHER, LOGITS), 1),
        ((OTHER, LOGITS), -1),
        ({"main": LOGITS, "aux": OTHER}, "main"),
        ({7: LOGITS, 8: OTHER}, 7),
        (Plain(LOGITS, OTHER), "scores"),
        (Output(OTHER, LOGITS), "hidden"),
    ],
)
def test_logits_are_found(output, locator):
    assert find_logits(output, locator, owner="student") is LOGITS


@pytest.mark.parametrize(
    ("output", "locator", "message"),
    [
        ((LOGITS, OTHER), None, "the teacher returns tuple of Tensor, Tensor with 2 floating tensors; say which"),
        ({"a": LABELS}, None, "dict with 'a' with 0 floating tensors"),
        (3, None, "returns int with 0 floating tensors"),
        ({"main": LOGITS}, "mian", "output='mian' is not in the teacher's output, .*did you mean 'main'"),
        ((LOGITS,), 3, "output=3 is not in the teacher's output, which is tuple of Tensor"),
        (Output(LOGITS, OTHER), "hiden", "did you mean 'hidden'"),
        ({"main": [LOGITS]}, "main", "output='main': that entry of the teacher's output is list of Tensor, not a tens"),
        ({"logits": 3, "out": LOGITS}, None, "is int, not a tensor"),
    ],
)
def test_what_cannot_be_told_is_refused(output, locator, message):
    with pytest.raises(ValueError, match=message):
        find_logits(output, locator, owner="teacher")


@pytest.mark.parametrize(
    ("batch", "locator"),
    [
        ((OTHER, LABELS), None),
        ({"x": OTHER, "y": LABELS, "index": torch.zeros(7, dtype=torch.long)}, None),
        ([OTHER, {"target": LABELS}], None),
        ((OTHER, LABELS, LABELS + 1), 1),
        ({"labels": LABELS, "ids": LABELS + 1}, "labels"),
    ],
)
def test_labels_are_found(batch, locator):
    assert find_labels(batch, locator, shape=(2,), why="it") is LABELS


def test_boolean_masks_are_no_labels():
    assert find_labels((torch.ones(2, dtype=torch.bool), LABELS), None, shape=(2,), why="it") is LABELS


@pytest.mark.parametrize(
    ("batch", "locator", "message"),
    [
        ((OTHER,), None, r"ignore_index=-100 needs the labels, .* holds 0 integer tensors of shape \(2,\)"),
        ((LABELS, LABELS), None, "holds 2 integer tensors of shape .*labels= a key"),
        ({"label": LABELS}, "lable", "labels='lable' is not in the batch, .*did you mean 'label'"),
        ({"label": OTHER}, "label", r"needs labels of shape \(2,\), got float32 tensor of shape \(2, 5\)"),
    ],
)
def test_labels_that_cannot_be_told_are_refused(batch, locator, message):
    with pytest.raises(ValueError, match=message):
        find_labels(batch, locator, shape=(2,), why="ignore_index=-100")


def test_an_index_does_not_cut_a_string():
    with pytest.raises(ValueError, match="output=0 is not in it, which is str"):
        locate("text", 0, argument="output", owner="it")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (LABELS, "int64 tensor of shape (2,)"),
        ({"a": 1, 2: 3}, "dict with 'a', 2"),
        ((), "tuple of nothing"),
        ([1, "a"], "list of int, str"),
        (None, "NoneType"),
    ],
)
def test_describe(value, words):
    assert describe(value) == words
