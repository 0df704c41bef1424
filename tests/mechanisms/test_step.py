"""StepController in a plain loop: the total loss, who sees what, and that nothing stays behind."""

# ruff: noqa: PT012, SIM117 -- the contexts under test are entered one after the other
from __future__ import annotations

import copy
import functools
import gc
import inspect
import itertools
import pickle
import random
import weakref
from contextlib import ExitStack, contextmanager, suppress

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lightning_compress.export.copying import independent_copy
from lightning_compress.mechanisms.capture import CaptureError, only_call
from lightning_compress.mechanisms.isolation import RandomState
from lightning_compress.mechanisms.passes import Term, View
from lightning_compress.mechanisms.step import StepController, find_controller, step_controller

X = torch.tensor([[1.0, 2.0]])


class Net(nn.Module):
    """One weight vector; the loss of its step is the sum of the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(2, 1, bias=False)
        nn.init.ones_(self.model.weight)
        self.returns = lambda loss: loss

    def training_step(self, batch, batch_idx=0):
        return self.returns(self.model(batch).sum())

    def validation_step(self, batch, batch_idx=0):
        return self.model(batch).sum() * 10


class Lit(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(2, 1)

    def training_step(self, batch):
        return self.model(batch).sum()


def scaled(module: nn.Module, factor: float):
    @contextmanager
    def enter():
        vars(module)["weight"] = module._parameters["weight"] * factor
        try:
            yield
        finally:
            del vars(module)["weight"]

    return enter


def constant(name: str, value: float, view: str | None = "") -> Term:
    return Term(name, lambda passes: torch.tensor(value), view)


def bare(module: nn.Module) -> bool:
    return not {key for key in vars(module) if "step" in key or "lightning_compress" in key} and all(
        not part._forward_hooks and not part._forward_pre_hooks for part in module.modules()
    )


def test_the_step_alone_is_unchanged():
    net = Net()
    with step_controller(net) as controller:
        assert net.training_step(X).item() == 3
        assert controller.steps == 1
    assert bare(net)


def test_total_of_one_view():
    net = Net()
    with (
        step_controller(net) as c,
        c.term(constant("a", 0.5)),
        c.term(constant("b", 0.25, None)),
        c.task_weight("a", 2),
    ):
        assert net.training_step(X).item() == 2 * 3 + 0.5 + 0.25


def test_total_of_two_views_with_terms_in_each_and_between():
    net = Net()
    seen = {}

    def between(passes):
        seen.update({name: entry.task_loss.item() for name, entry in passes.items()})
        return passes["half"].task_loss - passes["triple"].task_loss

    with step_controller(net) as c, ExitStack() as stack:
        for context in (
            c.view(View("triple", scaled(net.model, 3.0), deployed=False)),
            c.view(View("half", scaled(net.model, 0.5))),
            c.term(constant("deployed", 100.0)),
            c.term(constant("dense", 1000.0, "triple")),
            c.term(Term("between", between, None)),
            c.task_weight("deployed", 0.1),
        ):
            stack.enter_context(context)
        total = net.training_step(X)
        total.backward()
    assert seen == {"half": 1.5, "triple": 9.0}
    assert total.item() == pytest.approx(0.1 * 1.5 + 100 + 0.1 * 9 + 1000 + (1.5 - 9))
    factor = 0.1 * 0.5 + 0.1 * 3 + 0.5 - 3
    assert torch.allclose(net.model.weight.grad, factor * X)
    assert bare(net)
    assert "weight" not in vars(net.model)


def test_a_view_that_learns_apart_gives_its_value_and_no_gradient_to_the_total():
    net = Net()
    learned = []

    def learn(loss):
        loss.backward()
        learned.append((loss.item(), net.model.weight.grad.clone()))
        net.model.weight.grad = None
        return loss.detach() + 7

    with (
        step_controller(net) as c,
        c.view(View("triple", scaled(net.model, 3.0), deployed=False, learn=learn)),
        c.term(constant("dense", 1000.0, "triple")),
        c.task_weight("triple", 0.1),
    ):
        total = net.training_step(X)
        total.backward()
    [(value, gradient)] = learned
    assert value == pytest.approx(0.1 * 9 + 1000)
    assert torch.allclose(gradient, 0.3 * X)
    assert total.item() == pytest.approx(0.1 * 3 + value + 7)
    assert torch.allclose(net.model.weight.grad, 0.1 * X)


def test_a_term_of_a_view_sees_only_that_pass():
    net = Net()
    names = {}

    def keep(key):
        return lambda passes: names.__setitem__(key, sorted(passes))

    with step_controller(net) as c, ExitStack() as stack:
        stack.enter_context(c.view(View("half", scaled(net.model, 0.5))))
        stack.enter_context(c.view(View("dense", deployed=False)))
        for key, view in (("deployed", ""), ("dense", "dense"), ("between", None)):
            stack.enter_context(c.term(Term(key, keep(key), view)))
        net.training_step(X)
    assert names == {"deployed": ["half"], "dense": ["dense"], "between": ["dense", "half"]}


def test_beside_views_that_are_not_deployed_the_step_runs_as_it_is():
    net = Net()
    with step_controller(net) as c, c.view(View("triple", scaled(net.model, 3.0), deployed=False)):
        with c.term(constant("kd", 0.5)):
            assert net.training_step(X).item() == 3 + 0.5 + 9


def test_the_output_is_that_of_the_deployed_view():
    net = Net()
    net.returns = lambda loss: {"loss": loss, "seen": loss.item()}
    with step_controller(net) as c:
        with c.view(View("aaa", scaled(net.model, 3.0), deployed=False)), c.view(View("half", scaled(net.model, 0.5))):
            output = net.training_step(X)
    assert output["seen"] == 1.5
    assert output["loss"].item() == 10.5


@pytest.mark.sample
def test_the_sum_does_not_depend_on_the_order_of_registration():
    net = Net()
    totals = set()
    terms = [constant("a", 1e8), constant("b", 1.1), constant("c", -1e8), constant("d", 0.3, None)]
    views = [View("x", scaled(net.model, 1 / 3)), View("y", scaled(net.model, 1e7), deployed=False)]
    for order in itertools.permutations(terms + views):
        with step_controller(net) as c, ExitStack() as stack:
            for entry in order:
                stack.enter_context(c.view(entry) if isinstance(entry, View) else c.term(entry))
            totals.add(net.training_step(X).item())
    assert len(totals) == 1


def test_each_view_draws_the_random_numbers_of_the_deployed_one_which_is_first():
    net = Net()
    net.returns = lambda loss: loss * torch.rand(())
    torch.manual_seed(0)
    first = torch.rand(())
    with step_controller(net) as c:
        with c.view(View("dense", deployed=False)), c.view(View("masked", scaled(net.model, 2.0))):
            torch.manual_seed(0)
            assert net.training_step(X).item() == pytest.approx((6 * first + 3 * first).item())


def test_two_who_weigh_the_task_loss_are_refused():
    net = Net()
    with step_controller(net) as c, c.task_weight("kd", 0.1), c.task_weight("at", 1.0):
        with pytest.raises(ValueError, match=r"'kd' sets task_weight=0.1 and 'ft' sets task_weight=0.5"):
            with c.task_weight("ft", 0.5):
                pass
    with step_controller(net) as c:
        with c.task_weight("kd", 0.1):
            pass
        with c.task_weight("ft", 0.5):  # the first claim is over
            assert net.training_step(X).item() == 1.5


def test_two_terms_or_two_views_of_one_name_are_refused():
    with step_controller(Net()) as c:
        with c.term(constant("kd", 1.0)), pytest.raises(ValueError, match="two callbacks are named 'kd'"):
            with c.term(constant("kd", 2.0)):
                pass
        with c.view(View("half")), pytest.raises(ValueError, match=r"present the same weights: .*'half' and 'other'"):
            with c.view(View("other")):
                pass
        with c.view(View("half")), pytest.raises(ValueError, match="present the same weights"):
            with c.view(View("half", deployed=False)):
                pass


def test_a_skipped_batch_skips_everything():
    net = Net()
    net.returns = lambda loss: None
    asked = []
    with step_controller(net) as c, c.term(Term("a", lambda passes: asked.append(1))):
        capture = c.capture(None)
        assert net.training_step(X) is None
        assert (asked, c.steps, capture.names) == ([], 0, None)


def test_a_term_may_have_nothing_to_add():
    net = Net()
    with step_controller(net) as c, c.term(Term("a", lambda passes: None)):
        assert net.training_step(X).item() == 3


def test_a_dict_keeps_its_other_keys():
    net = Net()
    mine = {}
    net.returns = lambda loss: mine.setdefault("out", {"loss": loss, "extra": [1, 2]})
    with step_controller(net) as c, c.term(constant("a", 1.0)):
        output = net.training_step(X)
    assert output["extra"] == [1, 2]
    assert output["loss"].item() == 4
    assert mine["out"]["loss"].item() == 3  # the user's own dict is not written into


def test_a_step_without_a_tensor_loss_is_refused():
    net = Net()
    with step_controller(net):
        net.returns = lambda loss: {"metric": loss}
        with pytest.raises(TypeError, match=r"a dict with a tensor under 'loss', or None, got dict\['metric'\]"):
            net.training_step(X)
        net.returns = lambda loss: 3.0
        with pytest.raises(TypeError, match="got float"):
            net.training_step(X)


@pytest.mark.parametrize("where", ["step", "term", "view"])
def test_an_exception_leaves_nothing(where):
    net = Net()

    def fail(*_):
        raise OSError("gone")

    if where == "step":
        net.returns = fail
    with pytest.raises(OSError, match="gone"), step_controller(net) as c, ExitStack() as stack:
        c.capture("model")
        c.capture(None)
        stack.enter_context(c.view(View("half", scaled(net.model, 0.5))))
        if where == "view":
            stack.enter_context(c.view(View("broken", fail, deployed=False)))
        stack.enter_context(c.term(Term("a", fail if where == "term" else lambda passes: None)))
        net.training_step(X)
    assert bare(net)
    assert "weight" not in vars(net.model)
    net.returns = None
    assert len(pickle.dumps(net)) > 0


def test_after_an_exception_the_next_step_starts_afresh():
    net = Net()
    calls = []
    with step_controller(net) as c:
        capture = c.capture("model")
        with c.term(Term("a", lambda passes: calls.append(passes["plain"].call(capture)))):
            net.returns = lambda loss: 1 / 0
            with pytest.raises(ZeroDivisionError):
                net.training_step(X)
            net.returns = lambda loss: loss
            net.training_step(X * 2)
    assert [call.args[0].tolist() for call in calls] == [[[2.0, 4.0]]]


@pytest.mark.parametrize("first_closed", [0, 1])
def test_the_last_user_removes_the_wrapper(first_closed):
    net = Net()
    users = [step_controller(net), step_controller(net)]
    controllers = [user.__enter__() for user in users]
    assert controllers[0] is controllers[1] is find_controller(net)
    users[first_closed].__exit__(None, None, None)
    assert find_controller(net) is controllers[0]
    assert net.training_step(X).item() == 3
    assert controllers[0].steps == 1
    users[1 - first_closed].__exit__(None, None, None)
    assert find_controller(net) is None
    assert bare(net)


def test_an_instance_level_step_comes_back():
    net = Net()
    mine = lambda batch, batch_idx=0: torch.tensor(7.0)  # noqa: E731
    net.training_step = mine
    with step_controller(net) as c, c.term(constant("a", 1.0)):
        assert net.training_step(X).item() == 8
    assert net.training_step is mine


@pytest.mark.parametrize("wraps", [True, False])
def test_a_wrapper_of_somebody_else_on_top_of_ours(wraps):
    net = Net()
    with step_controller(net) as c, c.term(constant("a", 1.0)):
        inner = net.training_step

        def theirs(*args):
            return inner(*args) * 2

        net.training_step = functools.wraps(inner)(theirs) if wraps else theirs
        assert find_controller(net) is c
        with step_controller(net) as again:
            assert again is c
        assert net.training_step(X).item() == 8
    assert net.training_step(X).item() == 6  # theirs stays, ours adds nothing any more
    net.training_step = inner  # and now they put back what they had seen
    assert net.training_step(X).item() == 3
    with step_controller(net) as c, c.term(constant("a", 1.0)):
        assert net.training_step(X).item() == 4
        assert c.steps == 1
    assert bare(net)


def test_a_wrapper_of_somebody_else_that_is_removed_before_we_close():
    net = Net()
    with step_controller(net) as c, c.term(constant("a", 1.0)):
        inner = net.training_step
        net.training_step = lambda *args: inner(*args) * 2
        assert net.training_step(X).item() == 8
        net.training_step = inner
        assert net.training_step(X).item() == 4
    assert bare(net)


def test_a_deep_copy_is_not_driven_by_the_controller_of_the_original():
    net = Net()
    with step_controller(net):
        duplicate = copy.deepcopy(net)
        assert find_controller(duplicate) is None
        assert isinstance(find_controller(net), StepController)


def test_lightning_reads_the_signature_and_the_overrides_as_before():
    lit = Lit()
    with step_controller(lit):
        assert not is_param_in_hook_signature(lit.training_step, "batch_idx", explicit=True)
        assert is_param_in_hook_signature(lit.training_step, "batch", explicit=True)
        assert is_overridden("training_step", lit)
        assert not is_overridden("validation_step", lit)
        assert list(inspect.signature(lit.training_step).parameters) == ["batch"]
    assert "training_step" not in vars(lit)
    assert "validation_step" not in vars(lit)


def test_a_module_without_a_step_is_refused():
    with pytest.raises(TypeError, match="Linear has no training_step"), step_controller(nn.Linear(1, 1)):
        pass


def test_observers_see_validation_and_nothing_else():
    net = Net()
    seen = []
    with step_controller(net) as c:
        capture = c.capture("model")
        with c.observer(lambda entry: seen.append((entry.batch, entry.call(capture).output.item(), entry.task_loss))):
            assert net.validation_step(X).item() == 30
            net.training_step(X)
        net.validation_step(X)
    assert seen == [(X, 3.0, None)]


def test_validation_first_does_not_decide_which_network_is_the_student():
    net = Net()
    net.other = nn.Linear(2, 2)
    net.validation_step = lambda batch: net.other(batch).sum()
    with step_controller(net) as c, c.observer(lambda entry: None):
        capture = c.capture(None)
        net.validation_step(X)
        assert capture.names is None
        net.training_step(X)
        assert capture.network == "model"


def test_two_calls_a_step_are_an_error_for_who_needs_one():
    net = Net()
    net.training_step = lambda batch: net.model(batch).sum() + net.model(batch * 2).sum()
    with step_controller(net) as c:
        capture = c.capture(None)
        with c.term(Term("kd", lambda passes: passes["plain"].call(capture))):
            with pytest.raises(CaptureError, match=r"calls the student 'model' 2 times; .*student="):
                net.training_step(X)
    assert net.training_step(X).item() == 9


class Counting(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 1)
        self.forwards = 0

    def forward(self, x):
        self.forwards += 1
        return super().forward(x)


def test_a_shared_teacher_runs_once_a_step():
    net, teacher = Net(), Counting()
    with step_controller(net) as c, ExitStack() as stack:
        outputs = []
        for index, student in enumerate((None, "model", ["model"])):
            capture, run = c.capture(student), c.teacher(teacher)

            def term(passes, capture=capture, run=run):
                outputs.append(run(passes["plain"].call(capture)))

            stack.enter_context(c.term(Term(f"user{index}", term)))
        for step in range(1, 4):
            net.training_step(X)
            assert teacher.forwards == step
            assert len({id(output) for output in outputs[-3:]}) == 1
        assert all(not shared._seen for shared in c._teachers.values())
    assert teacher.weight.requires_grad


def test_a_teacher_runs_on_the_input_of_each_view_that_asks():
    net, teacher = Net(), Counting()
    with step_controller(net) as c, ExitStack() as stack:
        capture, run = c.capture("model"), c.teacher(teacher)
        stack.enter_context(c.view(View("half", scaled(net.model, 0.5))))
        stack.enter_context(c.view(View("dense", deployed=False)))
        difference = Term(
            "kd", lambda passes: (p := passes["half"]).call(capture).output.sum() * 0 + run(p.call(capture)).sum()
        )
        stack.enter_context(c.term(difference))
        net.training_step(X)
    assert teacher.forwards == 1


def test_the_name_one_callback_gives_serves_those_who_gave_none():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.Linear(2, 2), nn.Linear(2, 1)

        def training_step(self, batch):
            return self.head(self.encoder(batch)).sum()

    net = Chain()
    with step_controller(net) as c:
        unknown, named = c.capture(None), c.capture("encoder")
        net.training_step(X)
        assert unknown.names == ("encoder",)
    with step_controller(net) as c:
        unknown, chain = c.capture(None), c.capture(["encoder", "head"])
        net.training_step(X)
        assert unknown.names == ("encoder", "head")
    with step_controller(net) as c:
        c.capture(None)
        c.capture("encoder")
        c.capture("head")
        with pytest.raises(CaptureError, match="calls 2 modules"):
            net.training_step(X)
    assert named.network == "encoder"
    assert chain.names == ("encoder", "head")
    assert bare(net)


@pytest.mark.parametrize("argument", ["teacher", "teacher_transform"])
def test_a_teacher_that_shares_parameters_is_refused(argument):
    net = Net()
    other = nn.Sequential(net.model)
    pair = (other, None) if argument == "teacher" else (nn.Linear(2, 1), other)
    with (
        step_controller(net) as c,
        pytest.raises(ValueError, match=f"{argument} Sequential shares parameters with Net"),
    ):
        c.teacher(*pair)
    assert net.model.weight.requires_grad
    assert bare(net)


class Manual(Net):
    automatic_optimization = False

    def __init__(self, losses: int = 1, *, learns: bool = False) -> None:
        super().__init__()
        self.losses, self.learns = losses, learns
        self.totals = []

    def training_step(self, batch, batch_idx=0):
        for factor in range(1, self.losses + 1):
            loss = self.model(batch * factor).sum()
            self.totals.append(find_controller(self).compressed_loss(loss).item())
        if self.learns:
            torch.optim.SGD(self.parameters(), lr=0.0).step()


def test_manual_optimisation_asks_for_its_total():
    net = Manual(losses=2)
    with step_controller(net) as c:
        capture = c.capture(None)
        kd = Term("kd", lambda passes: passes["plain"].call(capture).output.sum() * 100)
        with c.term(kd), c.task_weight("kd", 0.5):
            net.training_step(X)
            assert c.steps == 1
    assert net.totals == [0.5 * 3 + 300, 0.5 * 6 + 600]


def test_manual_optimisation_that_never_asks_is_refused():
    net = Manual(losses=0, learns=True)
    with step_controller(net) as c:
        net.training_step(X)
        with c.term(constant("kd", 1.0)), pytest.raises(RuntimeError, match=r"never called self.compressed_loss.*'kd'"):
            net.training_step(X)
        with pytest.raises(RuntimeError, match="compressed_loss is for training_step"):
            c.compressed_loss(torch.ones(()))


def test_a_copy_for_export_is_free_of_all_of_it():
    net = Net()
    with step_controller(net) as c, c.term(constant("a", 1.0)):
        c.capture("model")
        duplicate = independent_copy(net)
        assert bare(duplicate)
        assert duplicate.training_step(X).item() == 3
        assert net.training_step(X).item() == 4


def test_a_decorated_step_is_read_as_lightning_reads_it():
    def inner(self, batch):
        return self.model(batch).sum()

    class Decorated(Lit):
        @functools.wraps(inner)
        def training_step(self, *args, **kwargs):
            return inner(self, *args, **kwargs)

    lit = Decorated()
    alone = is_param_in_hook_signature(lit.training_step, "batch_idx", min_args=2)
    with step_controller(lit):
        assert lit.training_step.__wrapped__ is inner  # Lightning takes off one layer only
        assert is_param_in_hook_signature(lit.training_step, "batch_idx", min_args=2) == alone


def test_the_teacher_runs_before_the_student_once_that_is_known():
    order = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 1)
            self.net.register_forward_hook(lambda *_: order.append("student"))

        def training_step(self, x):
            return self.net(x).sum()

    module, teacher = Net(), nn.Linear(2, 1)
    teacher.register_forward_hook(lambda *_: order.append("teacher"))
    outputs = []
    with step_controller(module) as controller:
        capture = controller.capture(None)
        ask = controller.teacher(teacher, student=capture)

        def compute(passes):
            [seen] = passes.values()
            outputs.append((ask(seen.call(capture)), ask(seen.call(capture))))
            return outputs[-1][0].sum()

        with controller.term(Term("kd", compute)):
            for x in (torch.ones(3, 2), torch.zeros(3, 2)):
                module.training_step(x)
    assert order == ["student", "teacher", "teacher", "student"]
    assert all(first is second for first, second in outputs)
    assert torch.equal(outputs[1][0], teacher(torch.zeros(3, 2)))


# Layers


class Deep(nn.Module):
    """Three layers, of which the middle one runs as often as it is told."""

    def __init__(self, often: int = 1) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
        self.often = often

    def training_step(self, batch, batch_idx=0):
        x = self.net[0](batch)
        for _ in range(self.often):
            x = self.net[1](x)
        return self.net[2](x).sum()

    validation_step = training_step


def shown(entry, name):
    """The one call of a layer in a pass."""
    return only_call(entry.layers.get(name, ()), f"the layer '{name}'", argument="pairs")


def test_a_layer_is_shown_to_who_asked_for_it():
    net, seen = Deep(), []

    def look(passes):
        [entry] = passes.values()
        seen.append(shown(entry, "net.1"))
        return seen[-1].output.sum() * 10

    with step_controller(net) as c, c.term(Term("at", look)), c.observer(lambda entry: look({"": entry})):
        for _ in range(2):
            c.layer("net.1", argument="pairs")  # two callbacks
        total = net.training_step(X)
        assert sum(len(part._forward_hooks) for part in net.modules()) == 1
        with torch.no_grad():
            net.validation_step(X * 2)
    expected = net.net[1](net.net[0](X))
    assert torch.equal(seen[0].output, expected)
    assert torch.equal(seen[0].args[0], net.net[0](X))
    assert torch.allclose(total, net.net[2](expected).sum() + 10 * expected.sum())
    total.backward()
    gradient = net.net[2].weight.sum(dim=0) + 10  # d total / d output of the middle layer
    assert torch.allclose(net.net[1].bias.grad, gradient)
    assert torch.equal(seen[1].output, net.net[1](net.net[0](X * 2)))
    assert bare(net)


@pytest.mark.parametrize("name", ["", "net"])
def test_the_network_itself_is_a_layer_too(name):
    class Itself(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 1)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch):
            return self.forward(batch).sum()

    net, seen = Itself(), []
    with step_controller(net) as c:
        c.layer(name, argument="pairs")
        with c.term(Term("at", lambda passes: seen.append(shown(passes["plain"], name).output))):
            net.training_step(X)
    assert torch.equal(seen[0], net.net(X))
    assert "forward" not in vars(net)
    assert bare(net)


def test_a_layer_that_ran_twice_is_an_error_and_one_that_did_not_is_none():
    net, seen = Deep(often=0), []
    with step_controller(net) as c:
        c.layer("net.1", argument="pairs")
        with c.term(Term("at", lambda passes: seen.append(shown(passes["plain"], "net.1")))):
            net.training_step(X)
            net.often = 2
            message = r"pairs: the layer 'net\.1' ran 2 times in one step, .* choose a layer that runs once"
            with pytest.raises(CaptureError, match=message):
                net.training_step(X)
            net.often = 1
            net.training_step(X)
    assert seen[0] is None
    assert seen[1].output.shape == (1, 2)
    assert len(seen) == 2


def test_a_layer_that_does_not_exist_is_refused():
    net = Deep()
    with step_controller(net) as c:
        with pytest.raises(ValueError, match=r"pairs names 'net\.7', not a module of Deep; did you mean 'net"):
            c.layer("net.7", argument="pairs")
        assert net.training_step(X).shape == ()
    assert bare(net)


@pytest.mark.sample
@pytest.mark.parametrize("returns", [lambda loss: None, lambda loss: 1 / 0], ids=["skipped", "broken"])
def test_nothing_of_a_skipped_or_broken_step_is_kept(returns):
    net, outputs = Net(), []
    net.returns = returns
    net.model.register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    with step_controller(net) as c:
        c.layer("model", argument="pairs")
        with suppress(ZeroDivisionError):
            net.training_step(X)
        net.model(X)  # outside of a step
        gc.collect()
        assert [output() for output in outputs] == [None, None]


def test_a_layer_of_a_skipped_or_broken_step_is_not_taken_for_that_of_the_next():
    net, seen = Net(), []
    with step_controller(net) as c:
        c.layer("model", argument="pairs")
        with c.term(Term("at", lambda passes: seen.append(shown(passes["plain"], "model").args[0]))):
            net.returns = lambda loss: None
            net.training_step(X)
            net.returns = lambda loss: 1 / 0
            with pytest.raises(ZeroDivisionError):
                net.training_step(X)
            net.returns = lambda loss: loss
            net.training_step(X * 3)
    assert [x.tolist() for x in seen] == [[[3.0, 6.0]]]


@pytest.mark.sample
@pytest.mark.usefixtures("fresh_compiler")
def test_a_layer_of_a_compiled_network_that_ran_before_is_shown():
    net, seen = Net(), []
    net.model = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), backend="eager")
    net.training_step(X)
    with step_controller(net) as c:
        c.layer("model.0", argument="pairs")
        with c.term(Term("at", lambda passes: seen.append(shown(passes["plain"], "model.0").output))):
            for _ in range(2):
                net.training_step(X)
    assert [torch.allclose(output.tanh(), net.model(X)) for output in seen] == [True, True]


def test_each_loss_of_a_manual_step_sees_the_layers_since_the_last():
    net, seen = Manual(losses=2), []
    with step_controller(net) as c:
        c.layer("model", argument="pairs")
        with c.term(Term("at", lambda passes: seen.append(shown(passes["plain"], "model")))):
            net.training_step(X)
    assert [call.args[0].tolist() for call in seen] == [[[1.0, 2.0]], [[2.0, 4.0]]]
    assert net.totals == [3, 6]


def test_watched_layers_of_a_shared_teacher_belong_to_its_one_forward():
    net, seen = Net(), []
    net.model = nn.Sequential(nn.Linear(2, 1))
    teacher = nn.Sequential(Counting(), nn.Tanh())
    with step_controller(net) as c, ExitStack() as stack:
        capture = c.capture("model")
        shared = c.teacher(teacher, student=capture)
        shared.teacher.watch("0", stack, argument="pairs")

        def look(passes):
            call = passes["plain"].call(capture)
            seen.append((shared.layer(call, "0", argument="pairs"), shared(call)))
            assert shared.layer(call, "1", argument="pairs") is None  # nobody watches it
            assert shared.layer(call, "0", argument="pairs") is seen[-1][0]

        for name in ("at", "ft"):
            stack.enter_context(c.term(Term(name, look)))
        net.training_step(X)
        assert teacher[0].forwards == 1
        net.training_step(X * 2)
        assert teacher[0].forwards == 2
    assert [torch.equal(layer.tanh(), output) for layer, output in seen] == [True] * 4
    assert seen[0][0] is seen[1][0]
    assert not torch.equal(seen[1][0], seen[2][0])


def test_a_layer_of_the_teacher_that_ran_twice_is_an_error():
    net, often = Net(), nn.Linear(2, 2)
    with step_controller(net) as c, ExitStack() as stack:
        capture = c.capture("model")
        shared = c.teacher(nn.Sequential(often, often))
        shared.teacher.watch("0", stack, argument="pairs")
        look = Term("at", lambda passes: shared.layer(passes["plain"].call(capture), "0", argument="pairs"))
        with c.term(look), pytest.raises(CaptureError, match=r"pairs: the teacher's layer '0' ran 2 times in one step"):
            net.training_step(X)


def test_layers_can_be_seen_in_a_run_that_is_no_training_step():
    net = Deep(often=2)
    with step_controller(net) as c:
        for name in ("net.0", "net.1"):
            c.layer(name, argument="pairs")
        calls = c.layers_of(lambda: net.net[1](net.net[1](X)))
        assert {name: len(found) for name, found in calls.items()} == {"net.0": 0, "net.1": 2}
        assert torch.equal(calls["net.1"][1].output, net.net[1](net.net[1](X)))
        assert c.steps == 0
        with pytest.raises(OSError, match="gone"):
            c.layers_of(fail_with_gone)
        assert not any(capture._recording for capture in c._layers.values())


def fail_with_gone():
    raise OSError("gone")


# The step once more


class Random(nn.Module):
    """Draws random numbers of every kind, and remembers."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.head = nn.Sequential(nn.BatchNorm1d(1, affine=False))
        self.history, self.steps = [], 0
        self.own = torch.Generator().manual_seed(0)
        self.as_dict = False

    def training_step(self, batch, batch_idx=0):
        self.steps += 1
        self.history.append(self.steps)
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        loss = (self.head(self.model(batch)) * torch.tensor([[1.0], [2.0], [3.0]])).sum() * noise
        return {"loss": loss, "steps": self.steps} if self.as_dict else loss


def test_a_pass_can_be_run_again_with_the_same_random_numbers_and_without_a_trace():
    net, x = Random(), torch.rand(3, 2)
    losses = []

    def look(passes):
        seen = passes["plain"]
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        buffers = copy.deepcopy(dict(net.named_buffers()))
        losses.append([seen.task_loss, seen.again(), seen.again()])
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002
        assert all(torch.equal(value, buffers[name]) for name, value in net.named_buffers())
        assert net.history == list(range(1, len(losses) + 1))
        return losses[-1][1] * 2

    with step_controller(net) as c, c.repeated_passes("at"), c.term(Term("at", look)):
        for as_dict in (False, True, False):
            net.as_dict = as_dict
            output = net.training_step(x)
            total = output["loss"] if as_dict else output
            assert total.item() == pytest.approx(3 * losses[-1][0].item())
    assert net.steps == 3
    for first, second, third in losses:
        assert first.item() == second.item() == third.item()
        assert second.requires_grad
    assert len({first.item() for first, *_ in losses}) == 3


def test_gradients_go_through_both_runs():
    """Also through batch norm, whose statistics are written into by the second run and put back before the backward."""
    net, alone, x = Random(), Random(), torch.rand(3, 2)
    alone.load_state_dict(net.state_dict())
    state = RandomState()
    with step_controller(net) as c, c.repeated_passes("at"), c.term(Term("at", lambda p: p["plain"].again() * 2)):
        net.training_step(x).backward()
    state.restore()
    alone.training_step(x).backward()
    for ours, theirs in zip(net.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(ours.grad, 3 * theirs.grad, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), alone.buffers(), strict=True))


def test_a_pass_is_run_again_under_its_own_view():
    net, seen = Net(), {}

    def look(passes):
        seen.update({name: entry.again().item() for name, entry in passes.items()})

    with step_controller(net) as c, c.repeated_passes("at"), ExitStack() as stack:
        stack.enter_context(c.view(View("half", scaled(net.model, 0.5))))
        stack.enter_context(c.view(View("dense", scaled(net.model, 3.0), deployed=False)))
        stack.enter_context(c.term(Term("a", look)))
        stack.enter_context(c.term(Term("b", look, "dense")))
        net.training_step(X)
    assert seen == {"half": 1.5, "dense": 9.0}


def test_captures_do_not_record_what_runs_again():
    net, calls = Net(), []
    with step_controller(net) as c, c.repeated_passes("at"):
        capture = c.capture("model")
        c.layer("model", argument="pairs")

        def look(passes):
            passes["plain"].again()
            calls.append((passes["plain"].call(capture), shown(passes["plain"], "model")))

        with c.term(Term("at", look)):
            for _ in range(2):
                net.training_step(X)
    assert [[entry.args[0] is X for entry in pair] for pair in calls] == [[True, True]] * 2


def test_nothing_is_kept_for_another_run_where_nobody_asked():
    net, seen = Net(), []
    with step_controller(net) as c, c.term(Term("a", lambda passes: seen.append(passes["plain"].again))):
        net.training_step(X)
        with c.repeated_passes("a"), c.repeated_passes("b"):
            pass
        net.training_step(X)
        with c.repeated_passes("a"):
            with c.repeated_passes("b"):
                pass
            net.training_step(X)
    assert [again is None for again in seen] == [True, True, False]


def test_an_error_in_the_second_run_leaves_nothing():
    net = Random()

    runs = []

    def fail(*_):
        runs.append(net.history.copy())
        if len(runs) == 2:
            raise OSError("gone")

    net.head.register_forward_pre_hook(fail)
    with step_controller(net) as c, c.repeated_passes("at"), c.term(Term("at", lambda p: p["plain"].again())):
        with pytest.raises(OSError, match="gone"):
            net.training_step(torch.rand(3, 2))
        assert (net.history, net.steps, runs) == ([1], 1, [[1], [1, 2]])
        net.training_step(torch.rand(3, 2))
    assert net.history == [1, 2]


# While somebody replays


def test_while_replaying_steps_and_losses_are_the_users_own():
    net = Net()
    asked = []
    with step_controller(net) as c, ExitStack() as stack:
        capture = c.capture("model")
        stack.enter_context(c.term(Term("kd", lambda passes: asked.append(passes) or torch.tensor(5.0))))
        stack.enter_context(c.task_weight("kd", 0.5))
        stack.enter_context(c.view(View("half", scaled(net.model, 0.5))))
        stack.enter_context(c.observer(asked.append))
        c.replaying = True
        assert net.training_step(X).item() == 3
        assert net.validation_step(X).item() == 30
        assert (asked, c.steps, capture.last_call) == ([], 0, None)
        c.replaying = False
        assert net.training_step(X).item() == 0.5 * 1.5 + 5
        assert net.validation_step(X).item() == 30
        assert (len(asked), c.steps) == (2, 1)


def test_while_replaying_a_manual_step_is_given_its_task_loss_back():
    net = Manual(losses=2)
    with step_controller(net) as c, c.term(constant("kd", 100.0)):
        c.replaying = True
        net.training_step(X)
        loss = torch.ones(())
        assert c.compressed_loss(loss) is loss  # in no step at all
        c.replaying = False
        net.training_step(X)
    assert net.totals == [3, 6, 103, 106]


def test_the_student_that_others_named_can_be_told_before_the_first_step():
    net = Deep()
    with step_controller(net) as c:
        unknown = c.capture(None)
        c.resolve_student()
        assert unknown.names is None
        c.capture("net.1")
        c.resolve_student()
        assert unknown.names == ("net.1",)
        c.resolve_student()  # and so it stays
        c.capture("net.2")
        c.resolve_student()
        assert unknown.names == ("net.1",)
    with step_controller(net) as c:
        unknown = c.capture(None)
        c.capture("net.1")
        c.capture("net.2")
        c.resolve_student()
        assert unknown.names is None
    with step_controller(net) as c:
        c.capture("net.1")
        c.resolve_student()  # nobody asks
    assert bare(net)
