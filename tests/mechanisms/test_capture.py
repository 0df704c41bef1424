"""Capture in a plain loop: what it records, when it does not, and that it leaves nothing."""

# ruff: noqa: PT012 -- the network is to fail inside of the context
from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_compress import _compat
from lightning_compress.mechanisms.capture import (
    Capture,
    CaptureError,
    NetworkCall,
    computed_from,
    differentiable,
    only_call,
)
from lightning_compress.mechanisms.student import StudentCapture


class Keyword(nn.Linear):
    def forward(self, *, features, scale=1.0):
        return {"logits": super().forward(features) * scale}


def hooks_of(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def test_only_calls_between_start_and_stop_are_recorded():
    network, x = nn.Linear(2, 3), torch.ones(4, 2)
    with Capture(network) as capture:
        network(x)
        capture.start()
        output = network(x)
        [call] = capture.stop()
        network(x)
        assert capture.stop() == []
    assert call.args[0] is x
    assert call.kwargs == {}
    assert call.output is output
    assert output.requires_grad


def test_start_forgets_what_was_recorded_before():
    network = nn.Linear(2, 3)
    with Capture(network) as capture:
        capture.start()
        network(torch.zeros(1, 2))
        capture.start()
        network(torch.ones(1, 2))
        [call] = capture.stop()
    assert call.args[0].sum() == 2


def test_keyword_arguments_are_recorded():
    network, x = Keyword(2, 3), torch.ones(4, 2)
    with Capture(network) as capture:
        capture.start()
        network(features=x, scale=2.0)
        [call] = capture.stop()
    assert call.args == ()
    assert call.kwargs["features"] is x
    assert call.kwargs["scale"] == 2.0
    assert torch.equal(call.output["logits"], network(features=x, scale=2.0)["logits"])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_recomputation_of_activation_checkpointing_is_not_recorded(use_reentrant):
    network = nn.Linear(2, 3)
    runs = []
    network.register_forward_pre_hook(lambda *_: runs.append(1))
    with Capture(network) as capture:
        capture.start()
        x = torch.ones(4, 2, requires_grad=True)
        output = checkpoint(network, x, use_reentrant=use_reentrant)
        calls = capture.stop()
        output.sum().backward()
        assert capture.stop() == []
    assert len(calls) == 1
    assert len(runs) == 2
    assert torch.equal(network.weight.grad, torch.full((3, 2), 4.0))


@pytest.mark.parametrize("direct", [False, True])
def test_an_input_overwritten_by_the_network_is_given_back_as_it_was(direct):
    network = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2))
    with Capture(network, direct=direct) as capture:
        for step in range(3):
            x = torch.tensor([[-1.0, float(step)]])
            capture.start()
            network(x)
            [call] = capture.stop()
            assert torch.equal(call.args[0], torch.tensor([[-1.0, float(step)]]))
            assert x[0, 0] == 0


def test_an_input_overwritten_by_the_step_after_the_call_is_given_back_as_it_was():
    network = nn.Linear(2, 2)
    with Capture(network) as capture:
        for _ in range(2):
            x = torch.ones(1, 2)
            capture.start()
            with torch.no_grad():
                network(x)
            x.zero_()
            [call] = capture.stop()
            assert call.args[0].sum() == 2


def test_an_output_overwritten_by_the_step_is_given_back_as_it_was_with_its_gradient():
    network = nn.Linear(2, 1)
    nn.init.ones_(network.weight)
    nn.init.zeros_(network.bias)
    with Capture(network) as capture:
        for _ in range(2):
            network.zero_grad()
            capture.start()
            output = network(torch.ones(1, 2))
            output.mul_(10)
            [call] = capture.stop()
            assert call.output.item() == 2
            assert output.item() == 20
            call.output.sum().backward()
            assert network.weight.grad.tolist() == [[1.0, 1.0]]


def test_overwriting_that_begins_after_the_first_step_is_refused():
    network = nn.Linear(2, 2)
    with Capture(network) as capture:
        capture.start()
        network(torch.ones(1, 2))
        capture.stop()
        capture.start()
        network(torch.ones(1, 2)).mul_(2)
        with pytest.raises(CaptureError, match=r"its output was overwritten in place .* Linear"):
            capture.stop()
        capture.start()
        network(torch.ones(1, 2)).mul_(2)
        assert len(capture.stop()) == 1  # it is known now


def test_nothing_is_copied_for_a_network_that_does_not_overwrite():
    network, x = nn.Linear(2, 2), torch.ones(1, 2)
    with Capture(network) as capture:
        for _ in range(3):
            capture.start()
            output = network(x)
            [call] = capture.stop()
            assert call.args[0] is x
            assert call.output is output


def test_validation_in_inference_mode_does_not_decide_for_training():
    network = nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(2, 2))
    with Capture(network) as capture:
        network.eval()
        for mode in (torch.inference_mode, torch.no_grad):
            capture.start()
            with mode():
                network(torch.ones(1, 2))
            assert capture.stop()[0].args[0].sum() == 2
        network.train()  # only now does the dropout write into its input
        capture.start()
        network(torch.ones(64, 2))
        assert capture.stop()[0].args[0].sum() == 128


def test_hooks_of_the_user_are_seen():
    network, x = nn.Linear(2, 2), torch.ones(1, 2)
    network.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    network.register_forward_hook(lambda module, args, output: output * 0 + 7)
    with Capture(network) as capture:
        capture.start()
        output = network(x)
        [call] = capture.stop()
    assert call.args[0].tolist() == [[2.0, 2.0]]
    assert call.output is output
    assert output.tolist() == [[7.0, 7.0]]


def test_direct_records_forward_called_by_itself_too():
    network, x = nn.Linear(2, 2), torch.ones(1, 2)
    with Capture(network, direct=True) as capture:
        capture.start()
        network.forward(x)
        network(x)
        assert len(capture.stop()) == 2
    assert "forward" not in vars(network)


def test_only_calls_that_are_wanted_are_recorded():
    network, wanted = nn.Linear(2, 2), []
    with Capture(network, when=lambda: bool(wanted)) as capture:
        capture.start()
        network(torch.zeros(1, 2))
        wanted.append(1)
        network(torch.ones(1, 2))
        [call] = capture.stop()
    assert call.args[0].sum() == 2


@pytest.mark.parametrize("direct", [False, True])
def test_an_exception_in_the_network_leaves_nothing(direct):
    network = nn.Linear(2, 2)
    before = (hooks_of(network), dict(vars(network)))
    with pytest.raises(RuntimeError, match="mat1"), Capture(network, direct=direct) as capture:
        capture.start()
        network(torch.ones(1, 5))
    assert (hooks_of(network), dict(vars(network))) == before
    assert capture.stop() == []


def test_a_call_that_the_step_caught_failing_is_not_taken_for_the_next():
    network = nn.Linear(2, 2)
    with Capture(network) as capture:
        capture.start()
        with pytest.raises(RuntimeError):
            network(torch.ones(1, 5))
        network(torch.ones(1, 2))
        [call] = capture.stop()
        assert call.args[0].shape == (1, 2)
        capture.start()
        network(torch.zeros(3, 2))
        assert capture.stop()[0].args[0].shape == (3, 2)


def test_nothing_is_kept_after_stop():
    network = nn.Linear(2, 2)
    with Capture(network) as capture:
        for _ in range(2):
            x = torch.ones(1, 2)
            capture.start()
            output = network(x)
            with pytest.raises(RuntimeError):
                network(torch.ones(1, 5))
            capture.stop()
            kept = [weakref.ref(x), weakref.ref(output)]
            del x, output
            gc.collect()
            assert [reference() for reference in kept] == [None, None]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network_that_ran_before_is_recorded_after_a_reset(in_place):
    root = nn.Module()
    root.net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    x = torch.ones(1, 2)
    expected = root.net(x)
    if in_place:
        root.net.compile(backend="eager")
    else:
        root.net = torch.compile(root.net, backend="eager")
    root.net(x)
    with Capture(root.net) as capture:
        _compat.reset_compiled_code()
        for _ in range(2):
            root.net(x)
            capture.start()
            root.net(x)
            [call] = capture.stop()
            assert torch.equal(call.args[0], x)
            assert torch.equal(call.output, expected)
    assert hooks_of(root) == 0


def test_what_a_network_does_to_the_containers_it_is_given_is_not_seen():
    @dataclasses.dataclass
    class Batch:
        x: torch.Tensor

    class Editing(nn.Linear):
        def forward(self, batch, record):
            batch["x"] = batch["x"] * 100
            batch.pop("y", None)
            record.x.mul_(100)
            return super().forward(batch["x"])

    network = Editing(2, 1)
    with Capture(network) as capture:
        for _ in range(3):
            capture.start()
            network({"x": torch.ones(3, 2), "y": torch.zeros(3)}, Batch(torch.ones(3, 2)))
            [call] = capture.stop()
            assert sorted(call.args[0]) == ["x", "y"]
            assert call.args[0]["x"].unique().tolist() == [1.0]
            assert call.args[1].x.unique().tolist() == [1.0]


@pytest.mark.parametrize("direct", [False, True])
def test_who_asked_is_told_when_the_network_has_returned(direct):
    diary = []

    class Net(nn.Linear):
        def forward(self, x):
            diary.append("forward")
            return super().forward(x)

    network = Net(2, 2)
    with Capture(network, direct=direct) as capture:
        capture.on_input = lambda *_: diary.append("input")
        capture.on_output = lambda: diary.append("output")
        network(torch.ones(1, 2))
        assert diary == ["forward"]
        capture.start()
        for _ in range(2):
            network(torch.ones(1, 2))
        assert len(capture.stop()) == 2
    assert diary == ["forward"] + ["input", "forward", "output"] * 2


def test_who_is_told_may_end_it_all():
    network = nn.Linear(2, 2)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Capture(network) as capture:
        capture.on_output = stop
        capture.start()
        network(torch.ones(1, 2))
    assert hooks_of(network) == 0


def test_the_only_call():
    calls = [NetworkCall((), {}, index) for index in range(3)]
    assert only_call([], "the layer 'a'", argument="pairs") is None
    assert only_call(calls[:1], "the layer 'a'", argument="pairs") is calls[0]
    message = r"pairs: the layer 'a' ran 3 times in one step, .*; choose a layer that runs once"
    with pytest.raises(CaptureError, match=message):
        only_call(calls, "the layer 'a'", argument="pairs")


# Inputs that a loss can be differentiated by


def test_only_floating_tensors_without_a_gradient_are_made_differentiable():
    plain, trained = torch.ones(2), torch.ones(2, requires_grad=True)
    carried = trained * 2
    made = differentiable(plain)
    assert made.requires_grad
    assert made.is_leaf
    assert made.data_ptr() == plain.data_ptr()
    assert not plain.requires_grad
    assert differentiable(torch.ones(2, dtype=torch.bfloat16)).requires_grad
    for leaf in (trained, carried, torch.ones(2, dtype=torch.long), torch.ones(2, dtype=torch.bool), 3, None, "a"):
        assert differentiable(leaf) is leaf


class Product(nn.Module):
    """Each sample's scalar product with a weight, squared and scaled by an integer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))

    def forward(self, batch, *, times):
        return (batch["x"] @ self.weight).square() * times


@pytest.mark.parametrize("direct", [False, True])
def test_a_loss_can_be_differentiated_by_what_the_network_is_given(direct):
    network, x, times = Product(), torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor(3)
    with Capture(network, direct=direct) as capture:
        capture.differentiable = True
        for _ in range(3):
            capture.start()
            output = network({"x": x}, times=times)
            [call] = capture.stop()
            given = call.args[0]["x"]
            [gradient] = torch.autograd.grad(output.sum(), [given], create_graph=True)
            # d/dx of 3 (x w)^2 is 6 (x w) w, with x w = -3 and 3
            assert gradient.tolist() == [[-18.0, 36.0], [18.0, -36.0]]
            network.weight.grad = None
            gradient.sum().backward()
            # d/dw of the sum of 6 (x w) w is 6 (x sum(w) + (x w) 1), with sum(w) = -1, summed over both samples
            assert network.weight.grad.tolist() == [-24.0, -12.0]
            assert call.kwargs["times"] is times
            assert torch.equal(given, x)
            assert given is not x
    assert not x.requires_grad
    assert x.grad is None
    network({"x": x}, times=times)
    assert not x.requires_grad


def test_what_carries_a_gradient_already_is_given_as_it_is():
    network, weight = nn.Linear(2, 1), torch.ones(3, 2, requires_grad=True)
    x = weight * 2
    with Capture(network) as capture:
        capture.differentiable = True
        capture.start()
        network(x)
        [call] = capture.stop()
    assert call.args[0] is x


def test_without_gradients_nothing_is_exchanged():
    network, x = nn.Linear(2, 1), torch.ones(3, 2)
    with Capture(network) as capture:
        capture.differentiable = True
        for mode in (torch.no_grad, torch.inference_mode):
            capture.start()
            with mode():
                network(x)
            [call] = capture.stop()
            assert not call.args[0].requires_grad
        network(x)  # not recorded
        assert capture.stop() == []
    assert not x.requires_grad


def test_what_comes_before_the_network_sees_the_exchanged_input():
    seen = []
    network, x = nn.Linear(2, 1), torch.ones(3, 2)
    with Capture(network) as capture:
        capture.differentiable = True
        capture.on_input = lambda key, args, kwargs: seen.append((key, args[0]))
        capture.start()
        network(x)
        [call] = capture.stop()
    assert [(key is call.key, given is call.args[0]) for key, given in seen] == [(True, True)]
    assert seen[0][1].requires_grad


@pytest.mark.parametrize("student", ["first", ["first", "last"], None])
def test_a_student_is_given_differentiable_inputs_whenever_it_is_found(student):
    root = nn.ModuleDict({"first": nn.Linear(2, 2, bias=False), "last": nn.Linear(2, 1, bias=False)})
    x = torch.ones(1, 2)

    def step():
        capture.start(detect=True)
        output = root["first"](x)
        output = root["last"](output) if isinstance(student, list) else output
        [call] = capture.stop()
        return call.args[0], output

    with StudentCapture(root, student) as capture:
        if student is not None:
            assert not step()[0].requires_grad
        capture.differentiable_inputs()
        if student is None:
            assert not step()[0].requires_grad  # the step in which it is found
        given, output = step()
        [gradient] = torch.autograd.grad(output.sum(), [given])
    expected = root["first"].weight.sum(dim=0, keepdim=True)
    if isinstance(student, list):
        expected = root["last"].weight @ root["first"].weight
    assert torch.allclose(gradient, expected)


class Returns(nn.Module):
    """Its output in another form."""

    def __init__(self, form):
        super().__init__()
        self.layer, self.form = nn.Linear(2, 4), form

    def forward(self, x):
        return self.form(self.layer(x))


FORMS = {
    "tensor": (lambda y: y, lambda y: y.sum()),
    "dict": (lambda y: {"logits": y}, lambda y: y["logits"].sum()),
    "written into": (lambda y: y, lambda y: y.mul_(2).sum()),
    "a view that is written into": (lambda y: y.view(-1), lambda y: y.mul_(2).sum()),
    "a base that is written into": (lambda y: y[:, :2], lambda y: y._base.mul_(2).sum() + 0 * y.sum()),
    "through another network": (lambda y: y, lambda y: nn.Linear(4, 1)(y).sum()),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_a_loss_was_computed_from_is_known(form):
    returns, use = FORMS[form]
    network, x = Returns(returns), torch.ones(3, 2)
    with Capture(network) as capture:
        for _ in range(3):  # after the first, outputs are not copied any more
            capture.start()
            with torch.no_grad():
                network(x)
            other, own = network(x), network(x)
            loss = use(own)
            calls = capture.stop()
            assert computed_from(loss, calls) == calls[2:]
            assert computed_from(loss.detach(), calls) == []
            assert other is not own
