"""Finding the student network in a step, and recording it once it is known."""

from __future__ import annotations

import pytest
import torch
import torchmetrics
from torch import nn

from lightning_compress.mechanisms.capture import CaptureError
from lightning_compress.mechanisms.student import Detector, StudentCapture
from lightning_compress.mechanisms.wrapping import shadowed

X = torch.ones(4, 2)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))


class Lit(nn.Module):
    """What a LightningModule looks like from here."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in {"model": mlp(), **parts}.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.model(x)


class Itself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.second(self.first(x))


class Parallel(nn.Module):
    """As nn.DataParallel: no parameters of its own, and a call that hands on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


def detected(root: nn.Module, step) -> dict[str, int]:
    with Detector(root) as detector:
        detector.start()
        step(root)
        return {name: len(calls) for name, calls in detector.stop().items()}


def student(root: nn.Module, step, *, name=None, required=True) -> tuple[StudentCapture, list]:
    with StudentCapture(root, name) as capture:
        capture.required = required
        capture.start(detect=True)
        step(root)
        return capture, capture.stop()


def hooks_of(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


@pytest.mark.parametrize(
    ("root", "step", "network"),
    [
        (Lit(), lambda root: root(X), "model"),
        (Lit(), lambda root: root.model(X), "model"),
        (Lit(), lambda root: root.forward(X), "model"),
        (Itself(), lambda root: root(X), ""),
        (Itself(), lambda root: root.forward(X), ""),
        (Lit(model=Parallel(mlp())), lambda root: root(X), "model"),
        (Lit(model=Parallel(mlp())), lambda root: root.model(X), "model"),
        (Lit(criterion=nn.CrossEntropyLoss(weight=torch.ones(2))), lambda root: root.criterion(root(X), X), "model"),
    ],
)
def test_the_network_is_found(root, step, network):
    capture, calls = student(root, step)
    assert capture.network == network
    assert len(calls) == 1
    assert torch.equal(calls[0].args[0], X)
    assert calls[0].output.shape == (4, 2)
    assert hooks_of(root) == 0
    assert "forward" not in vars(root)


def test_after_the_first_step_only_the_network_has_hooks():
    root = Lit()
    with StudentCapture(root) as capture:
        assert hooks_of(root) > 2
        for _ in range(3):
            capture.start(detect=True)
            output = root(X)
            [call] = capture.stop()
            assert call.output is output
            assert hooks_of(root) == hooks_of(root.model) == 2


def test_a_forward_that_changes_the_output_of_its_child_is_the_network():
    class Scaled(Lit):
        def forward(self, x):
            return self.model(x) * 2

    root = Scaled()
    capture, [call] = student(root, lambda root: root(X))
    assert capture.network == ""
    assert torch.equal(call.output, root.model(X) * 2)


def test_children_in_a_row_are_listed_and_the_chain_is_suggested():
    root = nn.ModuleDict({"encoder": nn.Linear(2, 3), "body": nn.Linear(3, 3), "head": nn.Linear(3, 2)})

    def step(root):
        root["head"](root["body"](root["encoder"](X)))

    with pytest.raises(CaptureError, match=r"calls 3 modules .*'encoder', 'body', 'head'.*student=\[\"encoder\", "):
        student(root, step)
    capture, calls = student(root, step, required=False)
    assert calls == []
    assert capture.network is None
    assert '["encoder", "head"]' in capture.problem
    capture, [call] = student(root, step, name=["encoder", "head"])
    assert call.args[0] is X
    assert torch.equal(call.output, root["head"](root["body"](root["encoder"](X))))
    assert capture.names == ("encoder", "head")
    assert capture.network is None


def test_a_head_called_after_the_module_itself_is_a_second_candidate():
    root = Lit(head=nn.Linear(2, 5))
    with pytest.raises(CaptureError, match=r"calls 2 modules with parameters: 'model', 'head'"):
        student(root, lambda root: root.head(root(X)))
    itself = Itself()
    itself.head = nn.Linear(2, 5)
    with pytest.raises(CaptureError, match=r"the LightningModule itself \(''\), 'head'"):
        student(itself, lambda root: root.head(root(X)))


def test_a_chain_called_in_part_is_refused():
    root = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    with pytest.raises(CaptureError, match="'encoder' 2 times and 'head' 1 times"):
        student(root, lambda root: root["head"](root["encoder"](root["encoder"](X))), name=["encoder", "head"])


def test_frozen_networks_and_metrics_are_no_candidates():
    class Learned(torchmetrics.Metric):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 2)
            self.add_state("total", torch.zeros(()))

        def update(self, x):
            self.total += self.net(x).sum()

        def compute(self):
            return self.total

    perceptual = mlp().requires_grad_(False)
    root = Lit(perceptual=perceptual, metric=Learned(), accuracy=torchmetrics.classification.BinaryAccuracy())

    def step(root):
        output = root(X)
        root.perceptual(output)
        root.metric(X)
        root.accuracy(output[:, 0], X[:, 0].long())

    assert detected(root, step) == {"model": 1}


def test_a_wholly_frozen_network_is_found_if_there_is_no_other():
    root = Lit()
    root.requires_grad_(False)
    assert detected(root, lambda root: root.model(X)) == {"model": 1}


def test_two_calls_are_both_given_back():
    capture, calls = student(Lit(), lambda root: (root.model(X), root.model(X * 2)))
    assert capture.network == "model"
    assert [call.args[0][0, 0].item() for call in calls] == [1.0, 2.0]


def test_a_shared_module_is_found_under_its_first_name_and_answers_to_both():
    shared = mlp()
    root = Lit(model=shared, alias=shared)
    assert detected(root, lambda root: root.alias(X)) == {"model": 1}
    capture, calls = student(root, lambda root: root.model(X), name="alias")
    assert capture.network == "alias"
    assert len(calls) == 1


def test_nested_calls_count_for_the_outermost_module_only():
    root = Lit(outer=Parallel(Parallel(mlp())))
    assert detected(root, lambda root: root.outer(X)) == {"outer": 1}


def test_an_exception_caught_by_the_step_does_not_hide_the_network():
    root = Lit(other=nn.Linear(7, 7))

    def step(root):
        with pytest.raises(RuntimeError):
            root.other(X)
        root.model(X)

    assert detected(root, step) == {"model": 1}


def test_a_wrong_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"student names 'modle', not a module of Lit; did you mean 'model'\?"):
        StudentCapture(Lit(), "modle")
    for wrong in (5, ["a", "b", "c"], [], [1, 2]):
        with pytest.raises(ValueError, match="student must be one dotted name, or two"):
            StudentCapture(Lit(), wrong)


def test_nothing_is_looked_for_outside_of_training():
    root = Lit()
    with StudentCapture(root) as capture:
        capture.start(detect=False)
        root.model(X)
        root.model[0](X)
        assert capture.stop() == []
        assert capture.names is None
        capture.start(detect=True)
        root(X)
        assert len(capture.stop()) == 1
        assert capture.network == "model"


def test_an_aborted_step_decides_nothing():
    root = Lit()
    with StudentCapture(root) as capture:
        capture.start(detect=True)
        root.model[0](X)
        capture.abort()
        assert capture.stop() == []
        assert capture.names is None


def test_drain_gives_the_calls_since_the_last_one():
    root = Lit()
    with StudentCapture(root) as capture:
        capture.start(detect=True)
        root(X)
        assert len(capture.drain()) == 1
        root(X)
        root(X)
        assert len(capture.drain()) == 2
        assert capture.stop() == []


def test_the_last_call_keeps_the_arguments_without_a_graph():
    root = Lit()
    features = torch.ones(4, 2, requires_grad=True) * 2
    capture, _ = student(root, lambda root: root.model(features))
    assert torch.equal(capture.last_call.args[0], features)
    assert capture.last_call.args[0].grad_fn is None
    assert capture.last_call.output is None


@pytest.mark.sample
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_child_is_found_under_its_plain_name():
    root = Lit()
    expected = root(X)
    root.model = torch.compile(root.model, backend="eager")
    root(X)
    with StudentCapture(root) as capture:
        for _ in range(2):
            capture.start(detect=True)
            root(X)
            [call] = capture.stop()
            assert torch.equal(call.output, expected)
        assert capture.network == "model"


def test_shadowed_puts_an_instance_attribute_back_and_keeps_the_signature():
    root = Lit()
    mine = lambda x, extra=None: X  # noqa: E731
    root.forward = mine
    with shadowed(root, "forward", lambda original: lambda *args: original(*args) + 1) as wrapper:
        assert root.forward(X)[0, 0] == 2
        assert wrapper.__wrapped__ is mine
        assert wrapper.__name__ == "forward"
    assert vars(root)["forward"] is mine


def test_a_wrapper_put_on_top_survives_ours_and_ours_does_not_come_back():
    root = Lit()
    with shadowed(root, "forward", lambda original: lambda *args: original(*args) * 0 + 5):
        seen = root.forward
        root.forward = lambda *args: seen(*args) + 1
        assert root.forward(X)[0, 0] == 6
    assert torch.equal(root.forward(X), root.model(X) + 1)
    root.forward = seen  # they put back what they had seen: our closed wrapper
    assert torch.equal(root.forward(X), root.model(X))
    with shadowed(root, "forward", lambda original: lambda *args: original(*args) * 0 + 7):
        assert root.forward(X)[0, 0] == 7
    assert "forward" not in vars(root)
