"""Comparing a file with the network: what an error is measured against, and what the message blames."""

from __future__ import annotations

import pytest
import torch

from lightning_compress.export.errors import EvaluationError, ExportError
from lightning_compress.export.parity import Reference, check_parity


class FakeFile:
    """A file that gives fixed outputs."""

    output_names = ("logits",)

    def __init__(self, *outputs):
        self.outputs = list(outputs)

    def run(self, tensors):
        return [self.outputs.pop(0)]


def reference(output, rows=2):
    return Reference((torch.zeros(rows, 1),), output, traced=rows == 2)


def test_a_masked_logit_excuses_nothing():
    wanted = torch.tensor([[1.0, -1e9], [2.0, -1e9]])
    found = torch.tensor([[1.5, -1e9], [2.0, -1e9]])
    with pytest.raises(ExportError, match=r"differs by 0\.5 from the network's"):
        check_parity(FakeFile(found), [reference(wanted)], 1e-3)


def test_large_outputs_may_differ_in_proportion():
    wanted = 1000 * torch.arange(1.0, 9.0).reshape(2, 4)
    assert check_parity(FakeFile(wanted + 1.0), [reference(wanted)], 1e-3) == pytest.approx(1.0)
    with pytest.raises(ExportError, match="differs by 50"):
        check_parity(FakeFile(wanted + 50.0), [reference(wanted)], 1e-3)


def test_integers_must_be_equal():
    wanted = torch.tensor([100000, 5])
    assert check_parity(FakeFile(wanted.clone()), [reference(wanted)], 1e-3) == 0
    with pytest.raises(ExportError, match="differs by 1 "):
        check_parity(FakeFile(wanted + torch.tensor([1, 0])), [reference(wanted)], 1e-3)


def test_nan_and_infinity_are_equal_to_themselves_only():
    wanted = torch.tensor([float("nan"), float("inf"), 1.0])
    assert check_parity(FakeFile(wanted.clone()), [reference(wanted)], 1e-3) == 0
    with pytest.raises(ExportError, match="differs by nan"):
        check_parity(FakeFile(torch.tensor([0.0, float("inf"), 1.0])), [reference(wanted)], 1e-3)


class Unrunnable:
    output_names = ("output",)

    def __init__(self, said="no"):
        self.said = said

    def run(self, tensors):
        raise EvaluationError(f"{self.said} implementation for Conv")


def test_a_file_that_does_not_run_at_the_size_that_was_traced_is_no_branch():
    with pytest.raises(ExportError, match=r"ONNX Runtime does not run the file \(no implementation for Conv\)"):
        check_parity(Unrunnable(), [reference(torch.zeros(2, 1))], 1e-3)
    with pytest.raises(ExportError, match=r"does not run the file; an operation of it has no kernel there.*float\(\)"):
        check_parity(Unrunnable("NOT_IMPLEMENTED : no"), [reference(torch.zeros(2, 1))], 1e-3)


def test_the_message_blames_chance_at_the_size_that_was_traced_and_a_branch_at_others():
    one, off = torch.zeros(2, 1), torch.ones(2, 1)
    with pytest.raises(ExportError, match="random numbers in evaluation"):
        check_parity(FakeFile(off), [reference(one)], 1e-3)
    with pytest.raises(ExportError, match=r"at batch size 5 .* probably branches on the batch size"):
        check_parity(FakeFile(one, torch.ones(5, 1)), [reference(one), reference(torch.zeros(5, 1), rows=5)], 1e-3)
    with pytest.raises(ExportError, match=r"gives shapes \[\(5, 6\)\] and the file \[\(5, 3\)\]: .*branches"):
        check_parity(FakeFile(one, torch.ones(5, 3)), [reference(one), reference(torch.zeros(5, 6), rows=5)], 1e-3)
