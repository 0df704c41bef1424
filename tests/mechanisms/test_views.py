"""WeightViews in plain loops: training on presented weights equals a loop by hand, and nothing stays behind."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from contract.modules import MixinClassifier, difference, loader, made, trainer
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lightning_compress import CompressionCallback
from lightning_compress.mechanisms.masking import DenseWeight, MaskedWeight
from lightning_compress.mechanisms.standins import standing_in, unlearning
from lightning_compress.mechanisms.views import WeightViews
from lightning_compress.mechanisms.weights import named_weights

STEPS = 4


def name_of(views, tensor):
    source = views.source_of(tensor)
    return None if source is None else source.name


class Tied(nn.Module):
    """An embedding and a head that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.body(self.embedding(tokens))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(4, 3, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2), nn.BatchNorm1d(2)
    )


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def images():
    return torch.randn(5, 1, 4, 4)


def rows():
    return torch.randn(5, 4)


def sequences():
    return torch.randn(2, 3, 4)


def tokens():
    return torch.randint(6, (2, 3))


NETWORKS = {
    "linear": (linear, rows),
    "convolutions with batch norm": (convolutions, images),
    "tied": (Tied, tokens),
    "attention": (Attention, sequences),
}


def masks_of(net: nn.Module) -> dict[str, torch.Tensor]:
    """A random mask for each weight of two dimensions or more, a tied one once."""
    return {name: torch.rand(weight.shape) < 0.5 for name, weight in net.named_parameters() if weight.ndim >= 2}


def masked_views(masks: dict[str, torch.Tensor]) -> dict[str, MaskedWeight]:
    return {name: MaskedWeight(mask) for name, mask in masks.items()}


def momentum(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return output.float().square().mean() + output.float().sum() * 0.01


def masked_call(net, masks, *args):
    """The oracle's forward pass: masked weights are given to the network from outside."""
    weights = dict(net.named_parameters())
    return functional_call(net, {name: weights[name] * mask for name, mask in masks.items()}, args)


def by_hand(net, masks, batches, *, call=masked_call, every=1, context=nullcontext):
    optimizer, losses = momentum(net), []
    for index, batch in enumerate(batches):
        with context():
            loss = loss_of(call(net, masks, batch))
        loss.backward()
        losses.append(loss.item())
        if (index + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def by_views(net, masks, batches, *, every=1, context=nullcontext, run=None):
    optimizer, losses = momentum(net), []
    views = WeightViews(net)
    with views.owned("ours", masked_views(masks)):
        for index, batch in enumerate(batches):
            with context(), views.shown():
                loss = loss_of((run or net)(batch))
            loss.backward()
            views.drop()
            losses.append(loss.item())
            if (index + 1) % every == 0:
                optimizer.step()
                optimizer.zero_grad()
    return losses


def equal(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


def bare(net: nn.Module) -> bool:
    """Whether no module holds anything under the name of a parameter, and no hook."""
    return all(
        not vars(part).keys() & part._parameters.keys() and not part._forward_hooks and not part._forward_pre_hooks
        for part in net.modules()
    ) and not any(parameter._backward_hooks for parameter in net.parameters())


def one_layer(mask=((True, False),)):
    """A linear layer of ones, and its views."""
    layer = nn.Linear(2, 1, bias=False)
    nn.init.ones_(layer.weight)
    return layer, WeightViews(layer), MaskedWeight(None if mask is None else torch.tensor(mask))


# Training equals a loop by hand


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", list(NETWORKS))
def test_training_equals_a_loop_by_hand(kind, every):
    make, batch = NETWORKS[kind]
    net = make()
    reference, masks, batches = copy.deepcopy(net), masks_of(net), [batch() for _ in range(STEPS)]
    before = copy.deepcopy(net)
    expected = by_hand(reference, masks, batches, every=every)
    assert by_views(net, masks, batches, every=every) == expected
    assert equal(net, reference)
    assert not equal(net, before)
    assert bare(net)
    for name, mask in masks.items():  # what is masked has no gradient, so it stays
        assert torch.equal(dict(net.named_parameters())[name][~mask], dict(before.named_parameters())[name][~mask])


def test_batch_norm_counts_each_batch_once():
    net = convolutions()
    by_views(net, masks_of(net), [images() for _ in range(STEPS)])
    assert [net[1].num_batches_tracked.item(), net[5].num_batches_tracked.item()] == [STEPS, STEPS]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers(kind):
    """Here functional_call is no oracle, as these layers read a list of their own."""

    def call(net, masks, x):
        weights = {name: value * masks.get(f"rnn.{name}", 1) for name, value in net.rnn.named_parameters()}
        flat = [weights[name] for name in net.rnn._flat_weights_names]
        zeros = torch.zeros(2, len(x), 3)
        if kind is nn.LSTM:
            return torch.lstm(x, (zeros, zeros), flat, True, 2, 0.0, True, False, True)[0]
        return torch.gru(x, zeros, flat, True, 2, 0.0, True, False, True)[0]

    net = Recurrent(kind)
    reference, masks, batches = copy.deepcopy(net), masks_of(net), [sequences() for _ in range(STEPS)]
    assert len(masks) == 4
    parameters = [getattr(net.rnn, name) for name in net.rnn._flat_weights_names]
    assert by_views(net, masks, batches) == by_hand(reference, masks, batches, call=call)
    assert equal(net, reference)
    assert bare(net)
    assert all(a is b for a, b in zip(net.rnn._flat_weights, parameters, strict=True))
    assert all(a() is b for a, b in zip(net.rnn._flat_weight_refs, parameters, strict=True))
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert equal(copied, net)
        assert all(isinstance(weight, nn.Parameter) for weight in copied.rnn._flat_weights)
        with torch.no_grad():
            for weight in copied.parameters():
                weight.zero_()
        assert copied(batches[0]).abs().sum() == 0  # it reads its own weights


def test_bf16_autocast():
    def context():
        return torch.autocast("cpu", torch.bfloat16)

    net = linear()
    reference, masks, batches = copy.deepcopy(net), masks_of(net), [rows() for _ in range(STEPS)]
    expected = by_hand(reference, masks, batches, context=context)
    assert by_views(net, masks, batches, context=context) == expected
    assert equal(net, reference)
    assert expected != by_hand(linear(), masks, batches)


def test_float64():
    net = convolutions().double()
    reference, masks, batches = copy.deepcopy(net), masks_of(net), [images().double() for _ in range(STEPS)]
    assert by_views(net, masks, batches) == by_hand(reference, masks, batches)
    assert equal(net, reference)
    assert net[0].weight.dtype == torch.float64


def test_double_backward_goes_through_the_view():
    def penalty(output, x):
        (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        return slope.square().sum()

    net, x = linear(), rows().requires_grad_()
    reference, masks = copy.deepcopy(net), masks_of(net)
    penalty(masked_call(reference, masks, x), x).backward()
    views = WeightViews(net)
    with views.owned("ours", masked_views(masks)):
        with views.shown():
            loss = penalty(net(x), x)
        loss.backward()
        views.drop()
    for (name, ours), theirs in zip(net.named_parameters(), reference.parameters(), strict=True):
        if ours.grad is not None or theirs.grad is not None:
            assert torch.equal(ours.grad, theirs.grad), name
    assert net[0].weight.grad[masks["0.weight"]].abs().sum() > 0
    assert net[0].weight.grad[~masks["0.weight"]].abs().sum() == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_runs_again_on_the_same_weights(reentrant):
    net = convolutions()
    reference, masks = copy.deepcopy(net), masks_of(net)
    batches = [images().requires_grad_() for _ in range(STEPS)]

    def call(net, masks, x):
        return net[4:](checkpoint(net[:4], x, use_reentrant=reentrant))

    def masked(net, masks, x):  # each weight is multiplied where it is read, so the second run multiplies again
        def first(x):
            return F.relu(net[1](F.conv2d(x, net[0].weight * masks["0.weight"], net[0].bias, padding=1))).flatten(1)

        x = checkpoint(first, x, use_reentrant=reentrant)
        return net[5](F.linear(x, net[4].weight * masks["4.weight"], net[4].bias))

    expected = by_hand(reference, masks, batches, call=masked)
    assert by_views(net, masks, batches, run=lambda x: call(net, masks, x)) == expected
    assert equal(net, reference)


def test_masks_may_change_between_steps():
    net = linear()
    reference, batches = copy.deepcopy(net), [rows() for _ in range(STEPS)]
    series = [masks_of(net) for _ in range(STEPS)]
    ours, theirs = momentum(net), momentum(reference)
    views, masked = WeightViews(net), masked_views(series[0])
    with views.owned("ours", masked):
        for masks, batch in zip(series, batches, strict=True):
            for name, mask in masks.items():
                masked[name].mask = mask
            with views.presented():
                loss_of(net(batch)).backward()
            ours.step()
            ours.zero_grad()
            loss_of(masked_call(reference, masks, batch)).backward()
            theirs.step()
            theirs.zero_grad()
    assert equal(net, reference)


@pytest.mark.parametrize("make", [linear, Tied, lambda: Recurrent(nn.LSTM)])
def test_without_a_mask_the_network_is_dense(make):
    net = make()
    batch = {"Tied": tokens, "Recurrent": sequences}.get(type(net).__name__, rows)
    reference, batches = copy.deepcopy(net), [batch() for _ in range(STEPS)]
    expected = by_hand(reference, {}, batches, call=lambda net, _, x: net(x))
    assert by_views(net, dict.fromkeys(masks_of(net)), batches) == expected
    assert equal(net, reference)
    assert bare(net)


def test_a_mask_may_come_and_go():
    layer, views, view = one_layer(None)
    x, seen = torch.tensor([[1.0, 2.0]]), []
    with views.owned("ours", {"weight": view}):
        for mask in (None, torch.tensor([[False, True]]), None):
            view.mask = mask
            with views.presented():
                layer(x).backward()
            seen.append(layer.weight.grad.tolist())
            layer.weight.grad = None
    assert seen == [[[1, 2]], [[0, 2]], [[1, 2]]]


# Who sees what


def test_only_the_forward_pass_sees_the_view():
    net, x = linear(), rows()
    optimizer = momentum(net)
    dense = {key: value.clone() for key, value in net.state_dict().items()}
    parameters, masks = dict(net.named_parameters()), masks_of(net)
    views = WeightViews(net)
    with views.owned("ours", masked_views(masks)), views.presented():
        assert torch.equal(net[0].weight, dense["0.weight"] * masks["0.weight"])
        assert torch.equal(net(x), masked_call(copy_of(dense), masks, x))
        assert list(net.state_dict()) == list(dense)
        assert all(torch.equal(value, dense[key]) for key, value in net.state_dict().items())
        assert all(value is parameters[name] for name, value in net.named_parameters())
        assert all(a is b for a, b in zip(net.parameters(), optimizer.param_groups[0]["params"], strict=True))
    assert net[0].weight is parameters["0.weight"]


def copy_of(state):
    net = linear()
    net.load_state_dict(state)
    return net


def test_the_name_of_a_presented_tensor():
    net = Tied()
    masks = masks_of(net)
    views = WeightViews(net)
    with views.owned("ours", masked_views(masks)):
        assert name_of(views, net.body.weight) is None
        assert not views.active
        with views.presented():
            assert views.active
            assert name_of(views, net.body.weight) == "body.weight"
            assert name_of(views, net.head.weight) == name_of(views, net.embedding.weight) == "embedding.weight"
            assert name_of(views, net.body.bias) is None
            assert name_of(views, net.body._parameters["weight"]) is None
        assert views.owners == ["ours"]
    assert (views.owners, views.active) == ([], False)


def test_refreshing_presents_the_weights_as_they_are_now():
    layer, views, view = one_layer()
    with views.owned("ours", {"weight": view}):
        views.refresh()
        assert not views.active
        with views.presented():
            with torch.no_grad():
                layer._parameters["weight"].fill_(3.0)
            assert layer.weight.tolist() == [[1, 0]]
            views.refresh()
            assert layer.weight.tolist() == [[3, 0]]
    assert layer.weight.tolist() == [[3, 3]]


def test_each_weight_has_one_owner():
    net = Tied()
    views = WeightViews(net)
    with views.owned("first", {"embedding.weight": MaskedWeight()}):
        for name in ("embedding.weight", "head.weight"):
            with (
                pytest.raises(ValueError, match=rf"'first' and 'second' both present the weight '{name}'.*exclude="),
                views.owned("second", {name: MaskedWeight()}),
            ):
                pass
        with views.owned("second", {"body.weight": MaskedWeight()}):
            assert views.owners == ["first", "second"]
        assert views.owners == ["first"]
    with views.owned("second", {"head.weight": MaskedWeight()}):
        assert views.owners == ["second"]


def test_a_tied_weight_has_one_view():
    views = WeightViews(Tied())
    both = {"embedding.weight": MaskedWeight(), "head.weight": MaskedWeight()}
    with (
        pytest.raises(ValueError, match=r"'ours' and 'ours' both present the weight 'head.weight'"),
        views.owned("ours", both),
    ):
        pass
    assert views.owners == []


def test_a_weight_that_is_released_while_shown_is_dense_again():
    layer, views, view = one_layer()
    with views.owned("ours", {"weight": view}):
        views.show()
    assert bare(layer)
    assert layer.weight.tolist() == [[1, 1]]


def test_nothing_is_left_after_an_error_in_the_step():
    net = Recurrent(nn.LSTM)
    views = WeightViews(net)
    with views.owned("ours", masked_views(masks_of(net))):
        for context in (views.shown, views.presented):
            with pytest.raises(OSError, match="broken"), context():
                raise OSError("broken")
            assert bare(net)
            assert not views.active
            assert all(isinstance(weight, nn.Parameter) for weight in net.rnn._flat_weights)


# Several passes in a step


class Complement(MaskedWeight):
    """The dense weight, with the gradient of what the mask prunes."""

    def value(self, weight, out=None):
        return weight.clone() if out is None else out.copy_(weight)

    def gradient(self, gradient):
        return gradient - super().gradient(gradient)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", [*NETWORKS, "recurrent"])
def test_two_passes_and_one_backward(kind, every):
    """M * W with gradient M * g, and W with gradient (1 - M) * g: what each pass gave by hand, in sum."""
    make, batch = {**NETWORKS, "recurrent": (lambda: Recurrent(nn.GRU), sequences)}[kind]
    net = make()
    net.eval()  # as the statistics of norms are those of whoever runs the second pass
    reference, masks, batches = copy.deepcopy(net), masks_of(net), [batch() for _ in range(STEPS)]
    ours, theirs = momentum(net), momentum(reference)
    views = WeightViews(net)
    with (
        views.owned("ours", masked_views(masks)),
        views.owned_for_another_pass("ours", {name: Complement(mask) for name, mask in masks.items()}) as another,
    ):
        for index, x in enumerate(batches):
            with views.shown():
                loss = loss_of(net(x))
                with another():
                    loss = loss + 2 * loss_of(net(x))
                assert all(name_of(views, own) is not None for own in shown_in(net))
            loss.backward()
            views.drop()
            if (index + 1) % every == 0:
                ours.step()
                ours.zero_grad()
    assert bare(net)

    weights = dict(reference.named_parameters())
    for index, x in enumerate(batches):
        dense = {name: weight.detach().clone() for name, weight in weights.items()}
        gradients = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for factor, masked in ((1, True), (2, False)):
            with torch.no_grad():
                for name, mask in masks.items():
                    weights[name].copy_(dense[name] * mask if masked else dense[name])
            for name, own in zip(
                weights, torch.autograd.grad(factor * loss_of(reference(x)), list(weights.values())), strict=True
            ):
                share = masks.get(name, torch.ones_like(own, dtype=torch.bool))
                gradients[name] += own * (share if masked else ~share) if name in masks else own
        for name, weight in weights.items():
            weight.grad = gradients[name] if weight.grad is None else weight.grad + gradients[name]
        if (index + 1) % every == 0:
            theirs.step()
            theirs.zero_grad()
    assert difference(net, reference) < 1e-6


def shown_in(net):
    """What the modules hold in the place of parameters."""
    return [vars(part)[name] for part in net.modules() for name in part._parameters if name in vars(part)]


def test_an_error_in_the_second_pass_leaves_nothing():
    net = linear()
    views, masks = WeightViews(net), masks_of(net)
    with (
        views.owned("ours", masked_views(masks)),
        views.owned_for_another_pass("ours", masked_views(masks)) as another,
        pytest.raises(OSError, match="broken"),
        views.shown(),
        another(),
    ):
        raise OSError("broken")
    assert bare(net)


def test_a_change_in_the_second_pass_is_an_error():
    layer, views, view = one_layer()
    with (
        views.owned("ours", {"weight": view}),
        views.owned_for_another_pass("ours", {"weight": MaskedWeight(torch.tensor([[False, True]]))}) as another,
        pytest.raises(RuntimeError, match="'weight' was written to within a step"),
        views.shown(),
        another(),
    ):
        write(layer)
    assert bare(layer)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_passes_and_activation_checkpointing_are_an_error(reentrant):
    net, x = linear(), rows().requires_grad_()
    views, masks = WeightViews(net), masks_of(net)
    with (
        views.owned("ours", masked_views(masks)),
        views.owned_for_another_pass("ours", masked_views(masks)) as another,
    ):
        with views.shown():
            loss = loss_of(checkpoint(net, x, use_reentrant=reentrant))
            with another():
                loss = loss + loss_of(checkpoint(net, x, use_reentrant=reentrant))
        with pytest.raises(RuntimeError, match=r"activation checkpointing runs the layer '\d' again"):
            loss.backward()
        views.drop()
    assert bare(net)


def test_another_pass_needs_the_weight():
    views = WeightViews(linear())
    with (
        views.owned("ours", {"0.weight": MaskedWeight()}),
        pytest.raises(ValueError, match=r"the weight '2.weight' is not presented by 'ours'"),
        views.owned_for_another_pass("ours", {"2.weight": MaskedWeight()}),
    ):
        pass


# The memory of what is shown


def test_memory_is_used_again_unless_something_holds_it():
    net, x = linear(), rows()
    views = WeightViews(net)

    def shown():
        with views.shown():
            return net[2].weight.data_ptr(), loss_of(net(x))

    with views.owned("ours", masked_views(masks_of(net))):
        places = []
        for _ in range(3):
            place, loss = shown()
            loss.backward()
            views.drop()
            places.append(place)
        assert len(set(places)) == 1
        del loss
        with torch.no_grad():
            place, _ = shown()
            views.drop()
        assert place == places[0]
        kept = shown()
        views.drop()
        place, _ = shown()
        views.drop()
    assert kept[0] == places[0]
    assert place != places[0]


def test_a_graph_that_is_kept_over_two_steps_is_not_corrupted():
    net, batches = linear(), [rows(), rows()]
    reference, masks = copy.deepcopy(net), masks_of(net)
    ours, theirs = torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.SGD(reference.parameters(), lr=0.1)
    views = WeightViews(net)
    with views.owned("ours", masked_views(masks)):
        with views.presented():
            first = loss_of(net(batches[0]))
        first.backward(retain_graph=True)
        ours.step()
        with views.presented():
            second = loss_of(net(batches[1]))
        (first + second).backward()
        ours.step()
    frozen = {name: (weight.detach() * masks.get(name, 1)).clone() for name, weight in reference.named_parameters()}

    def gradients(weights, batch):
        weights = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        loss = loss_of(functional_call(reference, weights, (batch,)))
        return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))

    old = gradients(frozen, batches[0])
    for name, weight in reference.named_parameters():
        weight.grad = old[name] * masks.get(name, 1)
    theirs.step()
    now = {name: weight.detach() * masks.get(name, 1) for name, weight in reference.named_parameters()}
    new = gradients(now, batches[1])
    for name, weight in reference.named_parameters():
        weight.grad += (old[name] + new[name]) * masks.get(name, 1)
    theirs.step()
    assert difference(net, reference) < 1e-7


@pytest.mark.parametrize("mask", [True, False])
def test_shown_in_inference_mode_and_then_trained(mask):
    net, x = linear(), rows()
    reference = copy.deepcopy(net)
    masks = masks_of(net)
    views = WeightViews(net)
    with views.owned("ours", masked_views(masks if mask else dict.fromkeys(masks))):
        with torch.inference_mode(), views.presented():
            validated = net(x)
        with views.shown():
            loss = loss_of(net(x))
        loss.backward()
        views.drop()
    expected = masked_call(reference, masks if mask else {}, x)
    loss_of(expected).backward()
    assert torch.equal(validated.clone(), expected)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.parameters(), reference.parameters(), strict=True))


# What is done to a presented weight in vain


def write(layer):
    with torch.no_grad():
        layer.weight.copy_(torch.zeros(1, 2))


def write_data(layer):
    layer.weight.data.clamp_(max=0.5)


def assign(layer):
    layer.weight = nn.Parameter(torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("change", "what"), [(write, "was written to"), (write_data, "was written to"), (assign, "was replaced")]
)
def test_a_change_in_the_step_is_an_error(change, what):
    net = nn.Sequential(nn.ReLU(), one_layer()[0])
    views = WeightViews(net)
    with views.owned("ours", {"1.weight": MaskedWeight(torch.tensor([[True, False]]))}):
        views.show()
        change(net[1])
        with pytest.raises(RuntimeError, match=rf"'1.weight' {what} within a step.*'ours'.*exclude=\['1'\]"):
            views.drop()
        assert not views.active
    assert bare(net)


def test_values_are_compared_in_the_next_step_alone_that_is_no_evaluation():
    layer, views, view = one_layer()
    with views.owned("ours", {"weight": view}):
        for evaluation, lost in ((False, False), (True, False), (False, False)):
            with views.shown():
                if lost or evaluation:
                    write_data(layer)
            views.drop(evaluation=evaluation)
        with views.presented():
            write_data(layer)  # not looked at
        views.compare_next()
        with pytest.raises(RuntimeError, match="was written to"), views.presented():
            write_data(layer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_was_not_written_to(value):
    layer, views, view = one_layer()
    with torch.no_grad():
        layer._parameters["weight"].fill_(value)
    with views.owned("ours", {"weight": view}):
        views.show()
        views.drop()
        assert bare(layer)


def test_a_change_of_a_dense_weight_in_the_step_is_kept():
    layer, views, view = one_layer(None)
    with views.owned("ours", {"weight": view}):
        with views.shown():
            write_data(layer)
        views.drop()
        assert layer.weight.tolist() == [[0.5, 0.5]]
        with views.shown():
            write(layer)
        views.drop()
    assert layer.weight.tolist() == [[0, 0]]


def replace_parameter(net):
    net[1].weight = nn.Parameter(torch.zeros(1, 2))


def replace_layer(net):
    net[1] = nn.Linear(2, 1, bias=False)


def remove_layer(net):
    del net[1]


@pytest.mark.parametrize("change", [replace_parameter, replace_layer, remove_layer])
def test_a_replaced_weight_is_an_error_at_the_next_step(change):
    net = nn.Sequential(nn.ReLU(), one_layer()[0])
    views = WeightViews(net)
    with views.owned("ours", {"1.weight": MaskedWeight(torch.tensor([[True, False]]))}):
        change(net)
        with pytest.raises(RuntimeError, match=r"'1.weight', which 'ours' presents, was replaced.*exclude=\['1'\]"):
            views.show()
        assert not views.active
    assert bare(net)


@pytest.mark.parametrize("mask", [((True, False),), None])
def test_freezing_within_a_step_is_an_error(mask):
    layer, views, view = one_layer(mask)
    with views.owned("ours", {"weight": view}):
        views.show()
        layer.requires_grad_(False)
        with pytest.raises(RuntimeError, match="requires_grad of the weight 'weight' was changed within a step"):
            views.drop()
        assert bare(layer)
        with views.presented():  # between steps it may be
            assert layer(torch.ones(1, 2)).requires_grad is False


@pytest.mark.parametrize("mask", [((True, False),), None])
def test_a_copy_made_within_a_step_has_the_parameter(mask):
    layer, views, view = one_layer(mask)
    with views.owned("ours", {"weight": view}), views.presented():
        copied = copy.deepcopy(layer)
    assert isinstance(copied.weight, nn.Parameter)
    assert copied.weight.tolist() == [[1, 1]]
    with torch.no_grad():
        copied._parameters["weight"].fill_(2.0)
    assert (copied(torch.ones(1, 2)).item(), layer(torch.ones(1, 2)).item()) == (4, 2)


# The first step is watched


class Watched(nn.Module):
    """Several layers; what is done with them is chosen by each test."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        self.weights = [self.second.weight]  # as some networks keep them

    def forward(self, x):
        return self.second(self.first(x))


def watched(step, net=None, mask=True):
    """The unused weights of a step, with everything masked or everything dense."""
    net = Watched() if net is None else net
    views = WeightViews(net)
    masks = masks_of(net)
    with views.owned("ours", masked_views(masks if mask else dict.fromkeys(masks))), views.watched("ours") as unused:
        with views.shown():
            loss = step(net)
        if loss.requires_grad:
            loss.backward()
        views.drop()
        found = unused().unused
        assert bare(net)
    return found


both = pytest.mark.parametrize("mask", [True, False])
TWO = torch.ones(1, 2)


@both
def test_a_usual_step_uses_everything(mask):
    assert watched(lambda net: net(TWO).sum(), mask=mask) == []


@both
def test_a_layer_that_is_not_used_is_told(mask):
    assert watched(lambda net: net.first(TWO).sum(), mask=mask) == ["second.weight"]


@both
def test_a_reference_to_the_parameter_itself_is_an_error(mask):
    with pytest.raises(RuntimeError, match=r"'second.weight' gets a gradient past its view.*exclude=\['second'\]"):
        watched(lambda net: F.linear(net.first(TWO), net.weights[0]).sum(), mask=mask)


@both
def test_functional_calls_are_an_error(mask):
    def step(net):
        return functional_call(net, {"first.weight": torch.ones(2, 2, requires_grad=True)}, (TWO,)).sum()

    with pytest.raises(RuntimeError, match=r"'first.weight' gets other parameters, as torch.func.functional_call"):
        watched(step, mask=mask)


@both
def test_a_frozen_layer_is_used(mask):
    def step(net):
        with torch.no_grad():
            x = net.first(TWO)
        return net.second(x).sum()

    net = Watched()
    net.first.requires_grad_(False)
    assert watched(step, net, mask=mask) == []
    assert watched(step, Watched(), mask=mask) == []


@both
def test_the_projection_of_an_attention_is_used(mask):
    net = Attention()
    assert watched(lambda net: net(torch.ones(1, 2, 4)).sum(), net, mask=mask) == []
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    assert watched(lambda net: net(torch.ones(1, 2, 4)).sum(), net, mask=mask) == []


def test_a_step_that_calls_nothing_proves_nothing():
    assert watched(lambda net: torch.zeros(())) == []


def test_watching_ends_with_its_context():
    net = Watched()
    views = WeightViews(net)
    with views.owned("ours", masked_views(masks_of(net))), views.watched("ours"):
        assert not bare(net)
    assert bare(net)


# Compiled networks


class Holder(nn.Module):
    """A network as the child of another, compiled or not."""

    def __init__(self, backend: str | None, form: str = "child") -> None:
        super().__init__()
        net = convolutions()
        if backend is not None and form == "in place":
            net.compile(backend=backend)
        self.model = net if backend is None else torch.compile(net, backend=backend) if form == "child" else net

    def forward(self, x):
        return self.model(x)


def compiled_masks(net):
    return {name.replace("_orig_mod.", ""): mask for name, mask in masks_of(net).items()}


def story(backend, form="child"):
    """Dense, unpresented and masked passes in all orders; what they gave, and the weights at the end."""
    torch.manual_seed(5)
    net = Holder(backend, form)
    masks, outputs, optimizer = compiled_masks(net), [], momentum(net)
    batches = [images() for _ in range(9)]

    def plain(x):
        outputs.append(net(x))

    def step(x):
        with views.shown():
            output = net(x)
        loss_of(output).backward()
        views.drop()
        outputs.append(output)
        optimizer.step()
        optimizer.zero_grad()

    views = WeightViews(net)
    plain(batches[0])
    masked = {name: MaskedWeight() for name in masks}
    with views.owned("ours", masked):
        plain(batches[1])
        step(batches[2])  # the dense view
        step(batches[3])
        for name, mask in masks.items():
            masked[name].mask = mask
        step(batches[4])
        plain(batches[5])
        step(batches[6])
        step(batches[7])
    plain(batches[8])
    return [output.detach() for output in outputs], list(net.state_dict().values())


FORMS = [
    ("eager", "child"),
    pytest.param("eager", "in place", marks=pytest.mark.slow),
    pytest.param("aot_eager", "child", marks=pytest.mark.slow),
    pytest.param("inductor", "child", marks=pytest.mark.slow),
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("backend", "form"), FORMS)
@pytest.mark.sample
def test_compiled_code_sees_what_is_presented_in_any_order(backend, form):
    expected, got = story(None), story(backend, form)
    for theirs, ours in zip(expected, got, strict=True):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b) if backend == "eager" else torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("masked_first", [True, False])
def test_masked_steps_do_not_compile_again(masked_first):
    """A mask that changes, and weights that change, are no reason to trace the network once more."""
    counter = torch._dynamo.testing.CompileCounter()
    net = nn.Module()
    net.model = torch.compile(linear(), backend=counter)
    views, masked = WeightViews(net), {name: MaskedWeight() for name in compiled_masks(net)}
    with views.owned("ours", masked):
        for index in range(6):
            if masked_first or index >= 3:
                for name, mask in compiled_masks(net).items():
                    masked[name].mask = mask
            with views.presented():
                loss_of(net.model(rows())).backward()
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_a_pass_without_the_views_is_followed_by_one_compilation():
    counter = torch._dynamo.testing.CompileCounter()
    net = nn.Module()
    net.model = torch.compile(linear(), backend=counter)
    views, counts = WeightViews(net), []
    with views.owned("ours", masked_views(compiled_masks(net))):
        for presented in (True, True, False, True, True, True):
            with views.presented() if presented else nullcontext():
                loss_of(net.model(rows())).backward()
            counts.append(counter.frame_count)
    assert counts == [1, 1, 2, 3, 3, 3]


@pytest.mark.usefixtures("fresh_compiler")
def test_other_code_that_is_compiled_between_steps_costs_nothing():
    network, other = torch._dynamo.testing.CompileCounter(), torch._dynamo.testing.CompileCounter()
    net = nn.Module()
    net.model = torch.compile(linear(), backend=network)
    augment = torch.compile(lambda x: x + 1, backend=other)
    views = WeightViews(net)
    with views.owned("ours", masked_views(compiled_masks(net))):
        for _ in range(4):
            batch = augment(rows())
            with views.presented():
                loss_of(net.model(batch)).backward()
    assert (network.frame_count, other.frame_count) == (1, 1)


@pytest.mark.usefixtures("fresh_compiler")
def test_without_an_owner_nothing_is_watched_or_compiled_again():
    counter, net = torch._dynamo.testing.CompileCounter(), nn.Module()
    net.model = torch.compile(linear(), backend=counter)
    callbacks = torch._dynamo.callback.callback_handler.start_callbacks
    watching, views = list(callbacks), WeightViews(net)
    net.model(rows())
    for _ in range(2):
        with views.presented():
            net.model(rows())
    assert counter.frame_count == 1
    assert callbacks == watching


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)

    @torch.compile(backend="eager")
    def forward(self, x):
        return self.layer(x)


@pytest.mark.sample
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("between", [lambda: None, torch._dynamo.reset])
def test_a_compiled_method_is_no_compiled_module(between):
    net, x = Decorated(), torch.ones(1, 2)
    nn.init.ones_(net.layer.weight)
    views, seen = WeightViews(net), [net(x).item()]
    with views.owned("ours", {"layer.weight": MaskedWeight(torch.tensor([[True, False]]))}):
        for _ in range(2):
            between()
            seen.append(net(x).item())
            with views.presented():
                seen.append(net(x).item())
    seen.append(net(x).item())
    assert seen == [2, 2, 1, 2, 1, 2]


@pytest.mark.sample
@pytest.mark.usefixtures("fresh_compiler")
def test_watching_leaves_compiled_code_alone():
    net = Holder("eager")
    views = WeightViews(net)
    masks = compiled_masks(net)
    with views.owned("ours", masked_views(masks)), views.watched("ours") as unused:
        with views.shown():
            loss = loss_of(net(images()))
        loss.backward()
        views.drop()
        assert unused() == ([], [])
    assert not torch.nn.modules.module._global_forward_pre_hooks


# Masks and quantisation compose


class _Rounded(torch.autograd.Function):
    """Rounds to multiples of 1/8, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x * 8) / 8

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Quantised(TorchFunctionMode):
    """Fake-quantises the weights that are presented, wherever an operation meets one."""

    def __init__(self, views: WeightViews) -> None:
        super().__init__()
        self.views, self.seen = views, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.linear, F.conv2d):
            name = name_of(self.views, args[1])
            if name is not None:
                self.seen.append(name)
                args = (args[0], _Rounded.apply(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


def test_a_quantiser_finds_masked_weights_by_their_names():
    net, x = convolutions(), images()
    reference, masks = copy.deepcopy(net), masks_of(net)
    views = WeightViews(net)
    with views.owned("ours", masked_views(masks)):
        mode = Quantised(views)
        with views.shown(), mode:
            output = net(x)
        loss_of(output).backward()
        views.drop()
    assert mode.seen == ["0.weight", "4.weight"]

    weights = dict(reference.named_parameters())
    by_hand = {name: (weights[name] * mask * 8).round() / 8 for name, mask in masks.items()}
    leaves = {name: value.detach().requires_grad_() for name, value in by_hand.items()}
    expected = functional_call(reference, leaves, (x,))
    loss_of(expected).backward()
    assert torch.equal(output, expected)
    for name, weight in net.named_parameters():
        if name in masks:
            assert torch.equal(weight.grad, leaves[name].grad * masks[name])
            assert weight.grad[~masks[name]].abs().sum() == 0
            assert leaves[name].grad[~masks[name]].abs().sum() > 0
        else:
            assert torch.equal(weight.grad, weights[name].grad)


# Manual optimisation


class Masking(CompressionCallback):
    """Presents weights of the module through masks."""

    default_name = "masking"

    def __init__(self, masks) -> None:
        super().__init__()
        self.masks = masks

    def attach(self, controller, stack, trainer, pl_module):
        stack.enter_context(controller.weights.owned(self.name, masked_views(self.masks)))


class TwoOptimizers(MixinClassifier):
    """As adversarial training: the two parts in turn, and the second twice."""

    toggles = True

    def configure_optimizers(self):
        parts = self.model[0], self.model[3]
        return [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in parts]

    def training_step(self, batch, batch_idx):
        for index in (0, 1, 1):
            optimizer = self.optimizers()[index]
            if self.toggles:
                self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.compressed_loss(self.task_loss(batch)))
            optimizer.step()
            if self.toggles:
                self.untoggle_optimizer(optimizer)


class Untoggled(TwoOptimizers):
    toggles = False


class Unasked(TwoOptimizers):
    def compressed_loss(self, task_loss):
        return task_loss


def two_by_hand(kind, masks):
    module = made(kind)
    optimizers = module.configure_optimizers()
    for x, y in loader():
        for index in (0, 1, 1):
            optimizers[index].zero_grad()
            weights = dict(module.named_parameters())
            masked = {name: weights[name] * mask for name, mask in masks.items()}
            F.cross_entropy(functional_call(module, masked, (x,)), y).backward()
            optimizers[index].step()
    return module


@pytest.mark.parametrize("kind", [TwoOptimizers, Untoggled])
def test_manual_optimisation_sees_the_weights_that_its_optimizers_made(kind):
    module = made(kind)
    masks = masks_of(module)
    trainer(Masking(masks)).fit(module, loader())
    assert difference(module, two_by_hand(kind, masks)) == 0
    assert bare(module)
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert "toggle_optimizer" not in vars(module)


def test_manual_optimisation_has_to_ask_for_its_loss():
    module = made(Unasked)
    with pytest.raises(RuntimeError, match=r"never called self.compressed_loss.*\['masking'\]"):
        trainer(Masking(masks_of(module))).fit(module, loader())
    assert bare(module)


def test_names_are_those_of_the_module():
    net = Tied()
    assert list(named_weights(net)) == ["embedding.weight", "body.weight", "body.bias", "head.weight"]


# Kept weights learn from the masked network, masked ones from the dense


class LongMemory(nn.Module):
    """A recurrent layer, embeddings and a head that shares their weight."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.rnn = kind(4, 4, num_layers=2, batch_first=True)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.rnn(self.embedding(tokens))[0])


def normless():
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))


COMPOSITE = {
    "linear": (linear, rows),
    "convolutions": (normless, images),
    "tied": (Tied, tokens),
    "attention": (Attention, sequences),
    "lstm": (lambda: LongMemory(nn.LSTM), tokens),
    "gru": (lambda: LongMemory(nn.GRU), tokens),
}


def both_passes(net, masks, batches, *, every=1, context=nullcontext, optimizer=momentum):
    """Pass A with M * W, pass B with W from which nothing learns but what is masked; one backward pass for both."""
    views, masked, ours = WeightViews(net), masked_views(masks), optimizer(net)
    dense = {name: DenseWeight(view) for name, view in masked.items()}
    rest = [weight for name, weight in net.named_parameters() if name not in masks]
    with views.owned("ours", masked), views.owned_for_another_pass("ours", dense) as another:
        for index, batch in enumerate(batches):
            with views.shown():
                with context():
                    loss = loss_of(net(batch))
                with standing_in(net, unlearning(rest)), another(), context():
                    loss = loss + 2 * loss_of(net(batch))
            loss.backward()
            views.drop()
            if (index + 1) % every == 0:
                ours.step()
                ours.zero_grad()
    assert bare(net)


def two_backward_passes(net, masks, batches, *, every=1, context=nullcontext, optimizer=momentum):
    """The same with two networks, each with weights and a backward pass of its own."""
    theirs, weights = optimizer(net), dict(net.named_parameters())
    for index, batch in enumerate(batches):
        gradients = []
        for factor, shares in ((1, masks), (2, {})):
            network = copy.deepcopy(net)
            network.zero_grad()
            with torch.no_grad():
                for name, mask in shares.items():
                    network.get_parameter(name).mul_(mask)
            with context():
                loss = factor * loss_of(network(batch))
            loss.backward()
            gradients.append({name: weight.grad for name, weight in network.named_parameters()})
        pruned, dense = gradients
        for name, weight in weights.items():
            gradient = pruned[name]
            if name in masks:
                gradient = torch.where(masks[name], gradient, dense[name])  # M * grad at M * W + (1 - M) * grad at W
            weight.grad = gradient if weight.grad is None else weight.grad + gradient
        if (index + 1) % every == 0:
            theirs.step()
            theirs.zero_grad()


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", list(COMPOSITE))
def test_gradients_are_those_of_two_networks(kind, every):
    make, batch = COMPOSITE[kind]
    net = make()
    reference, masks, batches = copy.deepcopy(net), masks_of(net), [batch() for _ in range(STEPS)]
    before = copy.deepcopy(net)
    both_passes(net, masks, batches, every=every)
    two_backward_passes(reference, masks, batches, every=every)
    assert equal(net, reference)
    for name, mask in masks.items():
        moved = net.get_parameter(name) != before.get_parameter(name)
        assert moved[~mask].any(), name
        assert moved[mask].any(), name


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", list(COMPOSITE))
def test_gradients_are_those_of_two_networks_under_bf16_autocast(kind, cached):
    """Where a weight is read several times, torch sums in bf16 the gradients of a parameter that it has cast once."""

    def context():
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=cached)

    make, batch = COMPOSITE[kind]
    net = make()
    reference, masks, batches = copy.deepcopy(net), masks_of(net), [batch() for _ in range(STEPS)]
    both_passes(net, masks, batches, every=2, context=context)
    two_backward_passes(reference, masks, batches, every=2, context=context)
    assert difference(net, reference) <= (1e-4 if cached and kind == "gru" else 0)


@pytest.mark.parametrize("shares", [0.0, 1.0])
def test_with_all_and_with_nothing_masked_one_of_the_networks_teaches_alone(shares):
    net, batches = linear(), [rows() for _ in range(STEPS)]
    masks = {name: torch.full_like(mask, bool(shares)) for name, mask in masks_of(net).items()}
    reference, before = copy.deepcopy(net), copy.deepcopy(net)
    both_passes(net, masks, batches)
    optimizer = momentum(reference)
    for batch in batches:
        loss_of(masked_call(reference, masks, batch)).backward()
        if not shares:  # the masked network teaches the biases, and twice the dense one the weights
            dense = torch.autograd.grad(2 * loss_of(reference(batch)), [reference[0].weight, reference[2].weight])
            reference[0].weight.grad, reference[2].weight.grad = dense
        optimizer.step()
        optimizer.zero_grad()
    assert difference(net, reference) < 1e-7
    assert not equal(net, before)


def test_before_there_are_masks_the_dense_pass_teaches_nothing():
    net = linear()
    reference, batches = copy.deepcopy(net), [rows() for _ in range(STEPS)]
    both_passes(net, dict.fromkeys(masks_of(net)), batches)
    by_hand(reference, {}, batches)
    assert equal(net, reference)


def test_the_numbers_of_a_hand_worked_step():
    """y = w x, L = y^2 / 2, at w = (2, .5, -1, .1), x = (1, 2, 1, -1), the rate .1 and the mask (1, 0, 1, 0)."""
    net, x = nn.Linear(4, 1, bias=False), torch.tensor([[1.0, 2.0, 1.0, -1.0]])
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[2.0, 0.5, -1.0, 0.1]]))
    masked = MaskedWeight(torch.tensor([[True, False, True, False]]))
    views, seen = WeightViews(net), []
    with (
        views.owned("ours", {"weight": masked}),
        views.owned_for_another_pass("ours", {"weight": DenseWeight(masked)}) as another,
    ):
        for _ in range(2):
            with views.presented():
                loss = net(x).square().sum() / 2
                with another():
                    loss = loss + net(x).square().sum() / 2
            loss.backward()
            with torch.no_grad():
                net.weight -= 0.1 * net.weight.grad
            net.weight.grad = None
            seen.append(net.weight.flatten().tolist())
    assert seen[0] == pytest.approx([1.9, 0.12, -1.1, 0.29], abs=1e-6)
    assert seen[1] == pytest.approx([1.82, -0.03, -1.18, 0.365], abs=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("masked", ["0.weight", "2.weight"])
def test_checkpointing_a_layer_is_an_error_whether_or_not_it_is_masked(masked, reentrant):
    """The layer '0' is the one that runs again: its weight or its bias alone is what the passes see differently."""
    net, x = linear(), rows().requires_grad_()
    views, view = WeightViews(net), MaskedWeight(masks_of(net)[masked])

    def call():
        return loss_of(net[1:](checkpoint(net[0], x, use_reentrant=reentrant)))

    with (
        views.owned("ours", {masked: view}),
        views.owned_for_another_pass("ours", {masked: DenseWeight(view)}) as another,
    ):
        with views.shown():
            loss = call()
            with another():
                loss = loss + call()
        with pytest.raises(
            RuntimeError, match=r"activation checkpointing runs the layer '0' again .* two passes of 'ours'"
        ):
            loss.backward()
        views.drop()
    assert bare(net)
    loss_of(checkpoint(net, x, use_reentrant=reentrant)).backward()  # it is refused no longer
    assert net[0].weight.grad is not None


# Views that are the weight itself


class Asked(DenseWeight):
    """Notes the memory that it is offered."""

    def __init__(self, masked):
        super().__init__(masked)
        self.offered = []

    def value(self, weight, out=None):
        self.offered.append(out)
        return super().value(weight, out)


def test_a_view_that_does_not_copy_has_the_memory_of_the_weight_and_no_other():
    net = linear()
    views, masked = WeightViews(net), masked_views(masks_of(net))
    dense = {name: Asked(view) for name, view in masked.items()}
    parameters = dict(net.named_parameters())
    with views.owned("ours", masked), views.owned_for_another_pass("ours", dense) as another, views.presented():
        for _ in range(2):
            with another():
                for name, weight in ((name, net.get_submodule(name[0]).weight) for name in dense):
                    assert weight.data_ptr() == parameters[name].data_ptr()
                    assert weight is not parameters[name]
            assert net[0].weight.data_ptr() != parameters["0.weight"].data_ptr()
    assert [view.offered for view in dense.values()] == [[None, None]] * 2


@pytest.mark.parametrize("change", [write, write_data])
def test_what_is_written_to_a_view_that_does_not_copy_stays(change):
    layer, views, view = one_layer()
    with (
        views.owned("ours", {"weight": view}),
        views.owned_for_another_pass("ours", {"weight": DenseWeight(view)}) as another,
        views.presented(),
        another(),
    ):
        change(layer)
    assert layer.weight.tolist() == ([[0, 0]] if change is write else [[0.5, 0.5]])
    assert bare(layer)


def test_a_view_that_does_not_copy_may_not_be_replaced():
    layer, views, view = one_layer()
    with (
        views.owned("ours", {"weight": view}),
        views.owned_for_another_pass("ours", {"weight": DenseWeight(view)}) as another,
        pytest.raises(RuntimeError, match="'weight' was replaced within a step"),
        views.shown(),
        another(),
    ):
        assign(layer)
    assert bare(layer)


def test_in_each_pass_the_name_of_what_is_presented_is_known():
    net = Tied()
    views, masked = WeightViews(net), masked_views(masks_of(net))
    dense = {name: DenseWeight(view) for name, view in masked.items()}
    with views.owned("ours", masked), views.owned_for_another_pass("ours", dense) as another, views.presented():
        first = net.head.weight
        with another():
            second = net.head.weight
            assert second is net.embedding.weight
            assert second is not first
            assert [name_of(views, first), name_of(views, second)] == ["embedding.weight"] * 2
        assert net.head.weight is first
        assert name_of(views, second) is None
