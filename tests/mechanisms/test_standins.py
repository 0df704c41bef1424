"""Stand-ins: other parameters and buffers for a pass; and copies that an optimizer like the user's trains."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress.mechanisms.standins import (
    follow_,
    optimizer_like,
    paired,
    scratch,
    standing_in,
    twins,
    unlearning,
)


class Tied(nn.Module):
    """An embedding and a head that share their weight, and a layer under two names."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.again = self.body
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.body(self.embedding(tokens))))


def normed():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def rows():
    return torch.randn(5, 3)


def tensors_of(net):
    return [*net.parameters(), *net.buffers()]


def others_for(net):
    """Another network of the same kind, and its parameters and buffers as stand-ins."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.add_(torch.randn_like(tensor))
        for tensor in other.buffers():
            tensor.add_(2)
    return other, {id(own): theirs for own, theirs in zip(tensors_of(net), tensors_of(other), strict=True)}


def tables(net):
    """Which object lies at which place."""
    return [
        (name, key, id(tensor))
        for name, part in net.named_modules()
        for table in (part._parameters, part._buffers)
        for key, tensor in table.items()
    ]


# Who reads what


@pytest.mark.parametrize("training", [True, False])
def test_a_network_with_the_tensors_of_another_is_that_network(training):
    net = normed().train(training)
    other, tensors = others_for(net)
    reference, before, x = copy.deepcopy(other), copy.deepcopy(net.state_dict()), rows()
    places = tables(net)
    with standing_in(net, tensors):
        output = net(x)
        output.square().sum().backward()
    assert tables(net) == places
    expected = reference(x)
    expected.square().sum().backward()
    assert torch.equal(output, expected)
    for ours, theirs in zip(tensors_of(other), tensors_of(reference), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    assert all(weight.grad is None for weight in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert other[1].num_batches_tracked.item() == 2 + training


def test_what_has_no_stand_in_is_read_as_it_is():
    layer, x = nn.Linear(3, 2), rows()
    bias = nn.Parameter(torch.tensor([1.0, 2.0]))
    with standing_in(layer, {id(layer.bias): bias, 0: nn.Parameter(torch.ones(1))}):
        output = layer(x)
        output.sum().backward()
    assert torch.equal(output, F.linear(x, layer.weight, bias))
    assert bias.grad.tolist() == [5, 5]
    assert layer.bias.grad is None
    assert torch.allclose(layer.weight.grad, x.sum(dim=0).expand(2, 3))


def test_a_tied_parameter_is_stood_in_for_at_every_place():
    net, tokens = Tied(), torch.tensor([[0, 1, 5]])
    other = nn.Parameter(torch.randn(6, 4))
    body = nn.Parameter(torch.randn(4, 4))
    with standing_in(net, {id(net.head.weight): other, id(net.body.weight): body}):
        assert net.head.weight is net.embedding.weight is other
        assert net.again.weight is net.body.weight is body
        output = net(tokens)
    assert torch.equal(output, F.linear(torch.tanh(F.linear(other[tokens], body, net.body.bias)), other))
    assert net.head.weight is net.embedding.weight
    assert net.head.weight is not other


def test_keys_and_names_are_unchanged_meanwhile():
    net = nn.ModuleDict({"norm": normed(), "tied": Tied(), "bare": nn.BatchNorm1d(2, affine=False)})
    keys, names = list(net.state_dict()), [name for name, _ in net.named_parameters()]
    other, tensors = others_for(net)
    with standing_in(net, tensors):
        state = net.state_dict()
        assert list(state) == keys
        assert [name for name, _ in net.named_parameters()] == names
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())
    assert list(net.state_dict()) == keys


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_read_the_stand_ins_and_then_their_own(kind):
    net, x = nn.Sequential(kind(3, 4, num_layers=2, batch_first=True)), torch.randn(2, 5, 3)
    own = [getattr(net[0], name) for name in net[0]._flat_weights_names]
    other, tensors = others_for(net)
    before = net(x)[0]
    with standing_in(net, tensors):
        assert all(a is b for a, b in zip(net[0]._flat_weights, other[0]._flat_weights, strict=True))
        assert torch.equal(net(x)[0], other(x)[0])
    assert torch.equal(net(x)[0], before)
    assert not torch.equal(other(x)[0], before)
    assert all(a is b for a, b in zip(net[0]._flat_weights, own, strict=True))
    assert all(a() is b for a, b in zip(net[0]._flat_weight_refs, own, strict=True))


@pytest.mark.parametrize("kind", [normed, Tied, lambda: nn.LSTM(3, 2)])
def test_an_error_within_puts_everything_back(kind):
    net = kind()
    _, tensors = others_for(net)
    places = tables(net)
    with pytest.raises(OSError, match="broken"), standing_in(net, tensors):
        raise OSError("broken" if tables(net) != places else "nothing stands in")
    assert tables(net) == places
    if isinstance(net, nn.LSTM):
        assert all(id(weight) not in map(id, tensors.values()) for weight in net._flat_weights)


def test_stand_ins_of_stand_ins():
    layer = nn.Linear(1, 1, bias=False)
    own, first, second = layer.weight, nn.Parameter(torch.ones(1, 1)), nn.Parameter(torch.ones(1, 1) * 2)
    with standing_in(layer, {id(own): first}):
        with standing_in(layer, {id(first): second, id(own): own}):
            assert layer.weight is second
        assert layer.weight is first
        with standing_in(layer, {id(own): second}):  # which is not there
            assert layer.weight is first
    assert layer.weight is own


def frozen_others(net):
    """Stand-ins of the same values that learn nothing, and other statistics, as a second pass has them."""
    other, tensors = others_for(net)
    return other, {**tensors, **unlearning(net[0].parameters()), **scratch(net[1].buffers())}


def story(compiled, training, order, make):
    """What a network gives plain and with stand-ins, and all tensors and gradients at the end."""
    torch.manual_seed(3)
    net = normed().train(training)
    other, tensors = make(net)
    holder = nn.ModuleDict({"model": torch.compile(net, backend="aot_eager") if compiled else net})
    found = []
    for stands_in in order:
        with standing_in(holder, tensors) if stands_in else nullcontext():
            output = holder["model"](rows())
        output.square().sum().backward()
        found.append(output.detach())
    every = [*net.parameters(), *other.parameters()]
    gradients = [torch.zeros(1) if weight.grad is None else weight.grad for weight in every]
    return [*found, *gradients, *net.buffers(), *other.buffers(), *tensors.values()]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("order", [(False, True, False, True, False), (True, False, True)])
@pytest.mark.parametrize(
    ("make", "training"),
    [(others_for, True), (frozen_others, False)]
    + [pytest.param(*row, marks=pytest.mark.slow) for row in ((others_for, False), (frozen_others, True))],
)
@pytest.mark.sample
def test_compiled_code_reads_what_is_there(training, make, order):
    ours, theirs = (story(compiled, training, order, make) for compiled in (True, False))
    for found, expected in zip(ours, theirs, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert (ours[0] - ours[1]).abs().max() > 0.1


@pytest.mark.usefixtures("fresh_compiler")
def test_one_and_the_same_code_serves_both():
    counter = torch._dynamo.testing.CompileCounter()
    net = normed()
    _, tensors = others_for(net)
    run = torch.compile(net, backend=counter)
    run(rows())
    for _ in range(3):
        with standing_in(net, tensors):
            run(rows())
        run(rows())
    assert counter.frame_count == 1


# What stands in


def test_what_is_unlearning_has_the_values_and_no_gradient():
    net, x = normed(), rows().requires_grad_()
    reference, y = copy.deepcopy(net), x.detach().clone().requires_grad_()
    tensors = unlearning(net.parameters())
    assert list(tensors) == [id(own) for own in net.parameters()]
    for own, other in zip(net.parameters(), tensors.values(), strict=True):
        assert isinstance(other, nn.Parameter)
        assert (other.requires_grad, other.data_ptr()) == (False, own.data_ptr())
    with standing_in(net, tensors):
        output = net(x)
    output.square().sum().backward()
    assert all(weight.grad is None and weight.requires_grad for weight in net.parameters())
    reference(y).square().sum().backward()
    assert torch.equal(output, reference(y))
    assert torch.equal(x.grad, y.grad)  # it still comes through to what lies before


def test_what_is_unlearning_sees_later_changes():
    weight = nn.Parameter(torch.ones(2))
    [other] = unlearning([weight]).values()
    with torch.no_grad():
        weight.mul_(3)
    assert other.tolist() == [3, 3]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_scratch_is_written_to_in_place_of_the_statistics(momentum):
    norm = nn.BatchNorm1d(2, momentum=momentum)
    norm(torch.randn(8, 2))
    reference, before, x = copy.deepcopy(norm), copy.deepcopy(norm.state_dict()), torch.randn(8, 2) + 3
    buffers = scratch(norm.buffers())
    for _ in range(2):
        with standing_in(norm, buffers):
            output = norm(x)
            assert norm.num_batches_tracked.item() == reference.num_batches_tracked.item() + 1
        assert torch.equal(output, reference(x))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    for copied, expected in zip(buffers.values(), reference.buffers(), strict=True):
        assert torch.equal(copied, expected)
    assert norm.num_batches_tracked.item() == 1


# Copies


class Scale(nn.Module):
    """Parameters and buffers of all kinds, and a child of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_parameter("bias", None)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("hidden", torch.randn(1), persistent=False)
        self.register_buffer("nothing", None)
        self.child = nn.Linear(2, 2)


def test_twins_have_the_tensors_of_each_layer_itself():
    layer = Scale()
    copies = twins([layer])
    assert [name for name, _ in copies.named_parameters()] == ["0.weight", "0.frozen"]
    assert [name for name, _ in copies.named_buffers()] == ["0.count", "0.hidden"]
    twin = copies[0]
    for name in ("weight", "frozen", "count", "hidden"):
        assert torch.equal(getattr(twin, name), getattr(layer, name))
        assert getattr(twin, name).data_ptr() != getattr(layer, name).data_ptr()
    assert (twin.weight.requires_grad, twin.frozen.requires_grad) == (True, False)
    assert (twin.count.dtype, twin.count.item()) == (torch.int64, 3)
    assert paired([layer], copies) == {
        id(getattr(layer, name)): getattr(twin, name) for name in ("weight", "frozen", "count", "hidden")
    }


def test_twins_of_the_root_and_of_layers_below_it():
    norm = nn.Sequential(nn.BatchNorm1d(2))
    norm.weight = nn.Parameter(torch.ones(1))
    copies = twins([norm, norm[0]])
    assert [name for name, _ in copies.named_parameters()] == ["0.weight", "1.weight", "1.bias"]
    assert len(paired([norm, norm[0]], copies)) == 6


def test_a_tied_parameter_has_one_twin():
    first, second = nn.LayerNorm(3), nn.LayerNorm(3)
    second.weight = first.weight
    copies = twins([first, second])
    pairs = paired([first, second], copies)
    assert len(pairs) == 3
    net, x = nn.Sequential(first, nn.Tanh(), second), rows()
    reference = copy.deepcopy(net)
    with standing_in(net, pairs):
        assert first.weight is second.weight is copies[0].weight
        net(x).square().sum().backward()
    reference(x).square().sum().backward()
    assert torch.equal(copies[0].weight.grad, reference[0].weight.grad)
    assert first.weight.grad is None


def test_a_pass_with_twins_is_that_of_a_network_of_its_own():
    net = normed()
    reference, layers = copy.deepcopy(net), [net[1], net[3]]
    pairs = paired(layers, twins(layers))
    optimizers = [
        torch.optim.SGD([own for own in made if isinstance(own, nn.Parameter)], lr=0.1, momentum=0.9)
        for made in (pairs.values(), [*reference[1].parameters(), *reference[3].parameters()])
    ]
    before = copy.deepcopy(net.state_dict())
    for _ in range(3):
        x = rows()
        with standing_in(net, {**unlearning(net[0].parameters()), **pairs}):
            net(x).square().sum().backward()
        reference(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    found = {id(own): name for name, own in [*net.named_parameters(), *net.named_buffers()]}
    assert sorted(found[own] for own in pairs) == sorted(name for name in before if name[0] in "13")
    for own, copied in pairs.items():
        assert torch.equal(copied, reference.state_dict()[found[own]])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# An optimizer like the user's


class Restrained(torch.optim.Optimizer):
    """Steps of a length that is its own attribute, against the sign of a running mean."""

    def __init__(self, params, length, *, names):
        super().__init__(params, {"rate": 1.0, "decay": 0.5})
        self.length, self.names = length, names

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    mean.lerp_(parameter.grad, group["decay"])
                    parameter.sub_(mean.sign(), alpha=group["rate"] * self.length)


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.02),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.02, amsgrad=True, weight_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1, initial_accumulator_value=0.3, lr_decay=0.1),
    "own": lambda groups: Restrained(groups, 0.05, names=["any"]),
}
each_optimizer = pytest.mark.parametrize("kind", list(OPTIMIZERS))


def parameters(seed):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(2, 3, generator=generator)) for _ in range(4)]


def followed(kind, groups, changes):
    """Copies after six steps of a follower, and of an optimizer that was made for others of the same values.

    Args:
        kind: Of the optimizer.
        groups: Of the user's optimizer, with numbers of parameters.
        changes: Number of a step to what is done before it, to an optimizer and the parameters that it trains.
    """
    weights, copies, by_hand = parameters(0), parameters(1), parameters(1)
    user, own = (
        OPTIMIZERS[kind]([{**group, "params": [those[index] for index in group["params"]]} for group in groups])
        for those in (weights, by_hand)
    )
    follower = optimizer_like(user)
    generator = torch.Generator().manual_seed(9)
    for step in range(6):
        for optimizer, those in ((user, weights), (own, by_hand)):
            changes.get(step, lambda *_: None)(optimizer, those)
        for weight, copied, other in zip(weights, copies, by_hand, strict=True):
            weight.grad = torch.randn(2, 3, generator=generator)
            copied.grad = torch.randn(2, 3, generator=generator)
            other.grad = copied.grad.clone()
        follow_(follower, user, {id(weight): copied for weight, copied in zip(weights, copies, strict=True)})
        for optimizer in (user, follower, own):
            optimizer.step()
    state, expected = follower.state_dict(), own.state_dict()
    assert state["state"].keys() == expected["state"].keys()
    assert [group["params"] for group in state["param_groups"]] == [g["params"] for g in expected["param_groups"]]
    assert type(follower) is type(user)
    return copies, by_hand


def assert_equal(copies, by_hand, trained):
    for index, (copied, other, start) in enumerate(zip(copies, by_hand, parameters(1), strict=True)):
        assert torch.equal(copied, other)
        assert torch.equal(copied, start) == (index not in trained)


ONE_GROUP = [{"params": [0, 1, 2, 3]}]
RATES = {"own": "rate"}


@each_optimizer
def test_copies_are_trained_as_by_an_optimizer_of_their_own(kind):
    assert_equal(*followed(kind, ONE_GROUP, {}), {0, 1, 2, 3})


@each_optimizer
def test_settings_are_followed_as_they_change(kind):
    """As a scheduler changes the rate, and OneCycleLR the momentum with it."""

    def slower(optimizer, _):
        for group in optimizer.param_groups:
            group[RATES.get(kind, "lr")] *= 0.3
            for name in ("momentum", "decay", "alpha"):
                if name in group:
                    group[name] *= 0.9
            if "betas" in group:
                group["betas"] = (0.7, 0.99)

    changed = followed(kind, [{"params": [0, 1]}, {"params": [2, 3]}], {2: slower, 4: slower})
    assert_equal(*changed, {0, 1, 2, 3})
    assert not torch.equal(changed[0][0], followed(kind, ONE_GROUP, {})[0][0])


@each_optimizer
def test_each_group_has_its_own_settings(kind):
    rate = RATES.get(kind, "lr")
    found = followed(kind, [{"params": [0], rate: 0.001}, {"params": [2, 3, 1], rate: 0.5}], {})
    assert_equal(*found, {0, 1, 2, 3})


@each_optimizer
def test_a_group_that_is_added_later_is_followed(kind):
    """As BaseFinetuning does when it thaws layers."""

    def add(optimizer, those):
        optimizer.add_param_group({"params": [those[2]], RATES.get(kind, "lr"): 0.03})

    assert_equal(*followed(kind, [{"params": [0, 1]}], {3: add}), {0, 1, 2})


@each_optimizer
def test_what_the_user_trains_in_no_group_stays(kind):
    assert_equal(*followed(kind, [{"params": [3]}, {"params": [1]}], {}), {1, 3})


def test_parameters_without_a_copy_are_left_out():
    first, second, copied = (nn.Parameter(torch.ones(1)) for _ in range(3))
    user = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 0.5}], lr=0.1)
    follower = optimizer_like(user)
    follow_(follower, user, {id(second): copied})
    assert [(len(group["params"]), group["lr"]) for group in follower.param_groups] == [(0, 0.1), (1, 0.5)]
    assert follower.param_groups[1]["params"][0] is copied
    copied.grad = torch.ones(1)
    follower.step()
    assert [weight.item() for weight in (first, second, copied)] == [1, 1, 0.5]


def test_the_follower_has_a_state_of_its_own():
    weight, copied = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    user = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones(1)
    user.step()
    follower = optimizer_like(user)
    assert (follower.param_groups, dict(follower.state)) == ([], {})
    follow_(follower, user, {id(weight): copied})
    copied.grad = torch.full((1,), 5.0)
    follower.step()
    assert follower.state[copied]["momentum_buffer"].item() == 5
    assert user.state[weight]["momentum_buffer"].item() == 1
    follower.param_groups[0]["lr"] = 7.0
    assert user.param_groups[0]["lr"] == 0.1


def test_the_follower_of_a_scheduled_optimizer_steps_by_itself():
    """A scheduler puts a step of its own on the user's optimizer, which counts."""
    weight, copied = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    user = torch.optim.SGD([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(user, 1, 0.5)
    follower = optimizer_like(user)
    for _ in range(2):
        weight.grad, copied.grad = torch.ones(1), torch.ones(1) * 2
        follow_(follower, user, {id(weight): copied})
        for optimizer in (user, follower):
            optimizer.step()
        scheduler.step()
    assert weight.item() == pytest.approx(1 - 0.1 - 0.05)
    assert copied.item() == pytest.approx(1 - 0.2 - 0.1)
    assert user._opt_called


def test_the_state_of_a_follower_is_taken_back():
    weights, copies, others = parameters(0), parameters(1), parameters(1)
    user = OPTIMIZERS["adamw"](weights)
    followers = []
    for those in (copies, others):
        followers.append(optimizer_like(user))
        follow_(followers[-1], user, {id(weight): own for weight, own in zip(weights, those, strict=True)})
    for step in range(4):
        if step == 2:
            followers[1].load_state_dict(copy.deepcopy(followers[0].state_dict()))
            for other, copied in zip(others, copies, strict=True):
                other.data.copy_(copied)
        for index, follower in enumerate(followers):
            for own in (copies, others)[index]:
                own.grad = torch.full_like(own, 1.0 + step + (index if step < 2 else 0))
            follower.step()
    assert all(torch.equal(copied, other) for copied, other in zip(copies, others, strict=True))


class Limited(torch.optim.SGD):
    """With attributes of every kind, which its step reads."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.limit, self._signs, self.rule = None, (1.0, -1.0), torch.sign

    def step(self, closure=None):
        for group in self.param_groups:
            for own in group["params"]:
                assert self.limit is None
                own.data.add_(self.rule(own.grad), alpha=-group["lr"] * self._signs[0])


def test_an_optimizer_with_attributes_of_its_own_is_followed():
    weight, other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = Limited([weight])
    follower = optimizer_like(optimizer)
    follow_(follower, optimizer, {id(weight): other})
    other.grad = torch.tensor([3.0, -2.0])
    follower.step()
    assert other.tolist() == pytest.approx([0.9, 1.1])
    assert weight.tolist() == [1.0, 1.0]
    assert follower.defaults == optimizer.defaults
    assert follower.defaults is not optimizer.defaults


def test_an_optimizer_that_holds_another_cannot_be_followed():
    optimizer = Limited([nn.Parameter(torch.ones(2))])
    optimizer.inner = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match=r"Limited holds an optimizer, or tensors, in 'inner'.*dense_path='shared'"):
        optimizer_like(optimizer)
