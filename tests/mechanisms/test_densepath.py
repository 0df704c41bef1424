"""The layers that a second pass has for itself: which they are, what is refused, and how they are saved and go on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_compress.mechanisms.densepath import OwnLayers, classifiers_named, last_layer, norms_of
from lightning_compress.mechanisms.stages import record_outputs
from lightning_compress.mechanisms.standins import standing_in


class Shifted(nn.BatchNorm2d):
    """A norm layer that derives from one of torch."""


class ScaleNorm(nn.Module):
    """A norm layer of one's own."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x):
        return x / x.norm() * self.weight


class ConvNorm(nn.Conv2d):
    """Called a norm, and masked like any convolution."""


class Zoo(nn.Module):
    """Norm layers of each kind, and some that have nothing of their own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.batch = nn.BatchNorm2d(4)
        self.bare = nn.BatchNorm2d(4, affine=False)
        self.empty = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
        self.parts = nn.Sequential(Shifted(4), nn.ReLU(), nn.Sequential(nn.GroupNorm(2, 4)))
        self.instance = nn.InstanceNorm2d(4, affine=True)
        self.nothing = nn.InstanceNorm2d(4)
        self.layer, self.flat = nn.LayerNorm(4), nn.LayerNorm(4, elementwise_affine=False)
        self.root = nn.RMSNorm(4)
        self.local = nn.LocalResponseNorm(2)
        self.head = nn.Linear(4, 2)


def masked(root, *names):
    return {id(root.get_parameter(name)) for name in names}


# Norm layers

KNOWN = ["batch", "bare", "parts.0", "parts.2.0", "instance", "layer", "root"]


def test_norm_layers_of_torch_that_have_something_of_their_own():
    zoo = Zoo()
    found = norms_of(zoo, None, masked(zoo, "conv.weight"))
    assert list(found) == KNOWN
    assert all(layer is zoo.get_submodule(name) for name, layer in found.items())
    assert norms_of(nn.Sequential(nn.Linear(2, 2)), None, set()) == {}


def test_a_norm_layer_under_two_names_or_compiled_is_one():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    net.append(net[0])
    assert list(norms_of(net, None, set())) == ["0"]
    net[0] = torch.compile(net[0])
    assert list(norms_of(nn.ModuleDict({"net": net}), None, set())) == ["net.0"]


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        (["batch"], ["batch"]),
        (["parts"], ["parts.0", "parts.2.0"]),
        (["type:Shifted", "layer"], ["parts.0", "layer"]),
        (["type:BatchNorm2d"], ["batch", "bare", "parts.0"]),
        (["re:parts.*"], ["parts.0", "parts.2.0"]),
        (["empty", "bare"], ["bare"]),
        (["head"], ["head"]),
    ],
)
def test_norm_layers_may_be_named(selectors, expected):
    assert list(norms_of(Zoo(), selectors, set())) == expected


def test_what_is_named_and_has_nothing_is_left_out():
    assert norms_of(Zoo(), ["empty"], set()) == {}


@pytest.mark.parametrize(
    ("selectors", "message"),
    [
        (["bacth"], "norms has 'bacth', which matches no module; did you mean 'batch'?"),
        (
            ["type:BatchNorm1d"],
            "norms has 'type:BatchNorm1d', which matches no module; did you mean 'type:BatchNorm2d'?",
        ),
        (["conv", "layer"], "norms takes 'conv', whose weights are masked"),
        ([""], "norms takes 'conv', 'head', whose weights are masked"),
    ],
)
def test_names_that_cannot_be(selectors, message):
    zoo = Zoo()
    with pytest.raises(ValueError) as caught:
        norms_of(zoo, selectors, masked(zoo, "conv.weight", "head.weight"))
    assert str(caught.value) == message


def test_norm_layers_of_an_unknown_kind_have_to_be_named_with_all_others():
    zoo = Zoo()
    zoo.parts.append(ScaleNorm(4))
    with pytest.raises(ValueError) as caught:
        norms_of(zoo, None, set())
    kinds = ["BatchNorm2d", "GroupNorm", "InstanceNorm2d", "LayerNorm", "RMSNorm", "ScaleNorm", "Shifted"]
    proposed = [f"type:{kind}" for kind in kinds]
    assert str(caught.value) == (
        "'parts.3' may be norm layers, of a kind that is not known: name all norm layers, "
        f"norms={proposed}, or choose dense_path='shared'"
    )
    assert list(norms_of(zoo, proposed, set())) == [*KNOWN[:4], "parts.3", *KNOWN[4:]]


def test_only_a_norm_without_masks_is_asked_about():
    net = nn.Sequential(ConvNorm(1, 2, 3), nn.BatchNorm2d(2))
    assert list(norms_of(net, None, masked(net, "0.weight"))) == ["1"]
    with pytest.raises(ValueError, match=r"norms=\['type:BatchNorm2d', 'type:ConvNorm'\]"):
        norms_of(net, None, set())
    net.append(type("NormFree", (nn.Module,), {})())  # it has nothing to copy
    assert list(norms_of(net, None, masked(net, "0.weight"))) == ["1"]


# The classifier, named


def classifier():
    """A backbone, a head of several layers, and one that has nothing."""
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(1, 2, 3),
            "head": nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2))),
            "own": ScaleNorm(2),
            "pool": nn.Flatten(),
        }
    )


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("head", ["head.0", "head.2.0"]),
        ("head.2", ["head.2.0"]),
        ("own", ["own"]),
        (["own", "head.0"], ["own", "head.0"]),
        (["head", "head.0"], ["head.0", "head.2.0"]),
        ([], []),
    ],
)
def test_a_classifier_is_all_that_learns_at_a_name_and_below(names, expected):
    net = classifier()
    found = classifiers_named(net, names, masked(net, "conv.weight"))
    assert list(found) == expected
    assert all(layer is net.get_submodule(name) for name, layer in found.items())


def test_a_network_that_is_its_own_classifier():
    layer = nn.Linear(2, 2)
    assert classifiers_named(layer, "", set()) == {"": layer}


def test_a_compiled_classifier_has_its_plain_name():
    net = classifier()
    head = net["head"]
    net["head"] = torch.compile(head)
    assert classifiers_named(net, "head", set()) == {"head.0": head[0], "head.2.0": head[2][0]}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("haed", "classifier names 'haed', not a module of ModuleDict; did you mean 'head'?"),
        (["own", "2.0"], "classifier names '2.0', not a module of ModuleDict; did you mean 'head.2.0'?"),
        ("pool", "classifier names 'pool', a Flatten without parameters"),
        ("head.1", "classifier names 'head.1', a ReLU without parameters"),
        (
            "head",
            "classifier names 'head', and the weights of 'head.0' are masked; leave them out with exclude=, or choose "
            "dense_path='own_norm'",
        ),
        (
            "",
            "classifier names '', and the weights of 'conv', 'head.0' are masked; leave them out with exclude=, or "
            "choose dense_path='own_norm'",
        ),
    ],
)
def test_what_can_be_no_classifier(names, message):
    net = classifier()
    with pytest.raises(ValueError) as caught:
        classifiers_named(net, names, masked(net, "conv.weight", "head.0.weight"))
    assert message in str(caught.value)


# The classifier, found


def network(*more):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3), *more)


def called(net):
    with record_outputs(net) as outputs:
        net(torch.randn(2, 1, 4, 4))
    return outputs()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ((), "4"),
        ((nn.Softmax(dim=1),), "4"),
        ((nn.LayerNorm(3), nn.Dropout(0.1)), "4"),  # a norm is no classifier
        ((nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)),), "5.1"),
        ((ScaleNorm(3),), "5"),
    ],
)
def test_the_layer_that_is_called_last_is_the_classifier(more, expected):
    net = network(*more)
    assert last_layer(net, called(net), masked(net, "0.weight")) == {expected: net.get_submodule(expected)}


def test_a_layer_that_is_frozen_is_not_the_classifier():
    net = network(nn.Linear(3, 3))
    net[5].requires_grad_(False)
    assert list(last_layer(net, called(net), set())) == ["4"]
    net[4].weight.requires_grad_(False)  # its bias still learns
    assert list(last_layer(net, called(net), set())) == ["4"]


def test_without_a_classifier_the_errors_say_what_to_do():
    net = network()
    with pytest.raises(ValueError) as caught:
        last_layer(net, called(net), masked(net, "0.weight", "4.weight"))
    assert str(caught.value) == (
        "dense_path='own' needs a classifier of its own, and the layer that is called last, '4', is masked: leave it "
        "dense with exclude=['4'], name another with classifier=, or choose dense_path='own_norm'"
    )
    for outputs in ([], called(nn.Sequential(nn.Flatten())), called(net.requires_grad_(False))):
        with pytest.raises(ValueError) as caught:
            last_layer(net, outputs, set())
        assert str(caught.value) == (
            "dense_path='own' needs a classifier of its own, and no layer that learns was called; choose "
            "dense_path='own_norm'"
        )


# Copies, and their optimizer


def adam(net, **settings):
    return torch.optim.AdamW(net.parameters(), lr=0.05, amsgrad=True, **settings)


def layers_of(net):
    return {name: net.get_submodule(name) for name in ("1", "4")}


def train(net, own, owned, optimizer, steps, seed):
    """Steps of the copies alone, with random inputs; what the network gives with them, in each step."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        with standing_in(net, own.stand_ins()):
            output = net(torch.randn(5, 1, 4, 4, generator=generator))
        output.square().sum().backward()
        own.follow(optimizer)
        owned.step()
        owned.zero_grad()
        found.append(output.detach())
    return found


def equal(ours, theirs):
    """Whether two states hold the same, tensor by tensor."""
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_copies_train_as_layers_of_a_network_of_its_own():
    net = network()
    before, reference = copy.deepcopy(net.state_dict()), copy.deepcopy(net)
    own, optimizer = OwnLayers(), adam(net)
    owned = own.copy(layers_of(net), optimizer)
    found = train(net, own, owned, optimizer, 4, seed=1)
    theirs, generator = adam(nn.ModuleList([reference[1], reference[4]])), torch.Generator().manual_seed(1)
    for output in found:
        expected = reference(torch.randn(5, 1, 4, 4, generator=generator))
        assert torch.equal(output, expected)
        expected.square().sum().backward()
        theirs.step()
        theirs.zero_grad()
    state = own.state()["layers"]["module"]
    whole = reference.state_dict()
    assert [value.tolist() for value in state.values()] == [whole[name].tolist() for name in whole if name[0] in "14"]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert (own.names, owned.steps) == (["1", "4"], 4)


def test_a_saved_state_goes_on_with_its_optimizer(tmp_path):
    net = network()
    own, optimizer = OwnLayers(), adam(net)
    owned = own.copy(layers_of(net), optimizer)
    train(net, own, owned, optimizer, 3, seed=1)
    torch.save(own.state(), tmp_path / "own")
    kept = own.state()
    expected = train(net, own, owned, optimizer, 3, seed=2)

    state = torch.load(tmp_path / "own", weights_only=True)
    assert equal(kept, state)  # what was trained afterwards has not changed it
    resumed = OwnLayers(state)
    assert resumed.names == ["1", "4"]
    assert resumed.state() == {"names": ["1", "4"], "classifier": [], "layers": state["layers"]}
    optimizer.state["of a checkpoint"] = {}  # the user's goes on too
    owned = resumed.copy(layers_of(net), optimizer)
    assert owned.steps == 3
    assert all(map(torch.equal, train(net, resumed, owned, optimizer, 3, seed=2), expected))
    assert equal(resumed.state(), own.state())
    assert not equal(resumed.state(), state)
    assert equal(kept, torch.load(tmp_path / "own", weights_only=True))  # nor has what goes on from it


def test_one_state_may_be_gone_on_from_twice():
    net = network()
    own, optimizer = OwnLayers(), adam(net)
    train(net, own, own.copy(layers_of(net), optimizer), optimizer, 2, seed=1)
    state, runs = own.state(), []
    for _ in range(2):
        resumed = OwnLayers(state)
        runs.append(train(net, resumed, resumed.copy(layers_of(net), optimizer), optimizer, 2, seed=2))
    assert all(map(torch.equal, *runs))


def test_copies_begin_as_the_layers_are_when_they_are_copied():
    net = network()
    with torch.no_grad():
        net[4].bias.fill_(3.0)
    own = OwnLayers()
    assert (own.names, own.state(), own.layers, own.stand_ins()) == (None, None, {}, {})
    own.follow(adam(net))  # nothing yet
    own.copy(layers_of(net), adam(net))
    assert own.layers == layers_of(net)
    pairs = own.stand_ins()
    places = [*net[1].parameters(), *net[1].buffers(), *net[4].parameters()]
    assert list(pairs) == [id(tensor) for tensor in places]
    assert all(torch.equal(pairs[id(tensor)], tensor) for tensor in places)
    assert pairs[id(net[4].bias)].tolist() == [3, 3, 3]


def test_other_layers_than_those_that_were_saved_are_refused():
    net = network()
    own = OwnLayers()
    own.copy(layers_of(net), adam(net))
    for names in (["1"], ["4", "1"], ["1", "4", "0"]):
        resumed = OwnLayers(own.state())
        with pytest.raises(ValueError) as caught:
            resumed.copy({name: net.get_submodule(name) for name in names}, adam(net))
        assert str(caught.value) == (
            "the checkpoint has layers of the dense path, '1', '4', other than those of now, "
            f"{', '.join(repr(name) for name in names)}: begin a new training"
        )
    resumed.copy(layers_of(net), adam(net))
    assert equal(resumed.state(), own.state())


def test_layers_that_are_frozen_or_thawed_later_are_so_in_the_copies():
    net = network()
    net[4].bias.requires_grad_(False)
    own = OwnLayers()
    own.copy(layers_of(net), adam(net))
    assert not own.stand_ins()[id(net[4].bias)].requires_grad
    net[4].bias.requires_grad_(True)
    net[1].requires_grad_(False)
    pairs = own.stand_ins()
    assert [pairs[id(weight)].requires_grad for weight in (net[1].weight, net[4].weight, net[4].bias)] == [
        False,
        True,
        True,
    ]


def test_the_settings_of_the_user_are_followed():
    net = network()
    own, optimizer = OwnLayers(), torch.optim.SGD(net.parameters(), lr=1.0)
    owned = own.copy(layers_of(net), optimizer)
    bias, steps = own.stand_ins()[id(net[4].bias)], []
    for rate in (1.0, 0.25):
        optimizer.param_groups[0]["lr"] = rate
        start = bias.detach().clone()
        bias.grad = torch.ones(3)
        own.follow(optimizer)
        owned.step()
        steps.append((start - bias).mean().item())
    assert steps == pytest.approx([1.0, 0.25], abs=1e-6)
