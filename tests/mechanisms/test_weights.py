"""Weights: which ones a selection takes and leaves, under which names, where they are read, and what is refused."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import prune

from lightning_compress.functional.masks import Filters
from lightning_compress.mechanisms.weights import filters_of, named_weights, select_weights, sites_of


class Own(nn.Module):
    """A user's own layer: a matrix called weight, a vector called so too, and a matrix that is called otherwise."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2))
        self.weight_scale = nn.Parameter(torch.ones(3))
        self.table = nn.Parameter(torch.ones(3, 2))


class Zoo(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3)
        self.line = nn.Conv1d(2, 2, 3)
        self.volume = nn.Conv3d(1, 2, 3)
        self.up = nn.ConvTranspose2d(2, 1, 2)
        self.pair = nn.Bilinear(2, 3, 4)
        self.norms = nn.ModuleList([nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4)])
        self.words = nn.Embedding(5, 4)
        self.bags = nn.EmbeddingBag(5, 4)
        self.memory = nn.LSTM(3, 2, bidirectional=True)
        self.gates = nn.GRUCell(3, 2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.separate = nn.MultiheadAttention(4, 2, kdim=3, vdim=3)
        self.own = Own()
        self.last = nn.Linear(4, 2)


class Tied(nn.Module):
    """An embedding and an output layer with one weight, and one layer under two names."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.inner = nn.Linear(4, 4)
        self.again = self.inner
        self.out = nn.Linear(4, 5)
        self.out.weight = self.words.weight


def names(root, layers=None, exclude=None):
    return list(select_weights(root, layers, exclude).weights)


# --- where weights are read ---


def test_each_parameter_has_its_sites():
    net = Tied()
    sites = sites_of(net)
    assert len(sites) == 4  # of words, inner (two), and the bias of out
    assert sites[id(net.words.weight)] == [(net.words, "weight"), (net.out, "weight")]
    assert sites[id(net.inner.bias)] == [(net.inner, "bias")]  # one module, whatever its names
    assert [site.attribute for site in sites[id(net.out.bias)]] == ["bias"]


def test_sites_of_layers_that_name_their_weights_otherwise():
    zoo = Zoo()
    sites = sites_of(zoo)
    assert sites[id(zoo.attention.in_proj_weight)] == [(zoo.attention, "in_proj_weight")]
    assert sites[id(zoo.attention.out_proj.weight)] == [(zoo.attention.out_proj, "weight")]
    assert sites[id(zoo.memory.weight_hh_l0_reverse)] == [(zoo.memory, "weight_hh_l0_reverse")]
    assert len(sites) == len(list(zoo.parameters()))  # what is None, such as q_proj_weight, has none


# --- names ---


def test_a_tied_weight_has_each_of_its_names():
    net = Tied()
    found = named_weights(net)
    assert list(found) == [
        "words.weight",
        "inner.weight",
        "inner.bias",
        "again.weight",
        "again.bias",
        "out.weight",
        "out.bias",
    ]
    assert found["words.weight"] is found["out.weight"] is net.words.weight
    assert found["again.bias"] is net.inner.bias


def test_names_are_those_of_the_network_that_is_not_compiled():
    plain, net = named_weights(Tied()), Tied()
    net.inner = torch.compile(net.inner)
    net.out.compile()
    assert sorted(named_weights(net)) == sorted(plain)
    assert named_weights(net)["inner.weight"] is net.again.weight
    assert set(named_weights(torch.compile(Tied()))) == set(plain)
    assert names(net) == ["inner.weight", "out.weight"]


# --- what is taken, and what is left ---

PLAIN = ["first.weight", "line.weight", "volume.weight", "up.weight", "pair.weight"]
LSTM = [f"memory.weight_{kind}_l0{way}" for way in ("", "_reverse") for kind in ("ih", "hh")]
CELL = ["gates.weight_ih", "gates.weight_hh"]
ATTENTION = ["attention.in_proj_weight", "attention.out_proj.weight"]
SEPARATE = [f"separate.{kind}_proj_weight" for kind in "qkv"] + ["separate.out_proj.weight"]


def test_none_takes_convolutions_and_linear_layers_and_tells_the_rest():
    zoo = Zoo()
    selected = select_weights(zoo, None, None)
    # the output projection of an attention is a linear layer
    assert list(selected.weights) == [*PLAIN, "attention.out_proj.weight", "separate.out_proj.weight", "last.weight"]
    assert all(weight is zoo.get_parameter(name) for name, weight in selected.weights.items())
    rest = ["words.weight", "bags.weight", *LSTM, *CELL, ATTENTION[0], *SEPARATE[:3], "own.weight"]
    assert selected.left == rest


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["words"], ["words.weight"]),
        (["type:EmbeddingBag"], ["bags.weight"]),
        (["memory"], LSTM),
        (["gates"], CELL),
        (["attention"], ATTENTION),
        (["separate"], SEPARATE),
        (["own"], ["own.weight"]),
        (["type:Own", "last"], ["own.weight", "last.weight"]),
        (["re:(up|pair)"], ["up.weight", "pair.weight"]),
        (
            [""],
            [*PLAIN, "words.weight", "bags.weight", *LSTM, *CELL, *ATTENTION, *SEPARATE, "own.weight", "last.weight"],
        ),
    ],
)
def test_layers_that_are_named_may_be_of_any_kind(layers, expected):
    assert names(Zoo(), layers) == expected


def test_norms_are_never_taken():
    zoo = Zoo()
    zoo.norms.extend([nn.LayerNorm((2, 3)), nn.RMSNorm((2, 2))])  # whose weights have two dimensions
    assert not [name for name in names(zoo, [""]) if name.startswith("norms")]
    with pytest.raises(ValueError, match="layers names 'norms', of type ModuleList and without any"):
        names(zoo, ["norms"])


def test_what_excludes_a_place_of_a_tied_weight_is_not_idle():
    net = nn.Sequential(OrderedDict(embed=nn.Embedding(3, 2), body=nn.Linear(2, 2), head=nn.Linear(2, 3, bias=False)))
    net.head.weight = net.embed.weight
    assert select_weights(net, None, ["embed", "head"]).idle == []
    assert select_weights(net, None, ["embed", "head", "type:Embedding"]).idle == []
    assert select_weights(nn.Sequential(net, nn.ReLU()), None, ["1"]).idle == ["1"]


class Additive(nn.Module):
    """An attention of one's own."""

    def __init__(self):
        super().__init__()
        self.weight_q, self.weight_k, self.weight_v = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))


def test_endings_of_weight_norm_alone_are_none():
    net = nn.Sequential(nn.Linear(2, 2), Additive(), nn.LayerNorm((2, 2)))
    assert list(select_weights(net, ["1"], None).weights) == ["1.weight_q", "1.weight_k", "1.weight_v"]
    assert select_weights(net, None, None).left == ["1.weight_q", "1.weight_k", "1.weight_v"]


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_refused(kind):
    net = nn.Sequential(kind(4, 2, sparse=True), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"the layer '0' has sparse=True.*exclude=\['0'\]"):
        select_weights(net, ["0"], None)
    assert list(select_weights(net, None, None).weights) == ["1.weight"]


def test_what_is_excluded_is_left():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 1))
    selected = select_weights(net, None, ["0", "3"])
    assert (list(selected.weights), selected.left) == (["2.weight"], ["0.weight", "3.weight"])


def test_a_module_that_is_its_own_layer():
    layer = nn.Linear(2, 2)
    assert select_weights(layer, None, None).weights == {"weight": layer.weight}


def test_a_tied_weight_is_taken_once_under_its_first_name():
    net = Tied()
    assert names(net, ["words", "again", "out"]) == ["words.weight", "inner.weight"]
    selected = select_weights(net, None, None)  # the embedding is not selected itself, its weight is
    assert list(selected.weights) == ["inner.weight", "out.weight"]
    assert selected.left == []
    assert select_weights(net, ["inner"], None).left == ["words.weight"]


# --- what is refused ---


def masked_by_torch(layer):
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


COMPUTED = [
    (nn.utils.parametrizations.weight_norm, "a parametrization"),
    (nn.utils.parametrizations.spectral_norm, "a parametrization"),
    (nn.utils.parametrizations.orthogonal, "a parametrization"),
    pytest.param(
        nn.utils.weight_norm,
        "weight_norm",
        marks=pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
    ),
    (nn.utils.spectral_norm, "spectral_norm or torch.nn.utils.prune"),
    (masked_by_torch, "spectral_norm or torch.nn.utils.prune"),
]


@pytest.mark.parametrize(("wrap", "cause"), COMPUTED)
@pytest.mark.parametrize("layers", [None, ["1"]])
def test_a_weight_that_is_computed_is_refused_and_can_be_left_out(wrap, cause, layers):
    net = nn.Sequential(nn.Linear(3, 3), wrap(nn.Linear(3, 3)))
    with pytest.raises(ValueError) as caught:
        names(net, layers)
    assert str(caught.value) == (
        f"the layer '1' computes its weight from other parameters ({cause}), which would overwrite what is put in its "
        "place; make it plain again before the fit, or leave it out with exclude=['1']"
    )
    assert names(net, None, ["1"]) == ["0.weight"]


def test_a_layer_that_was_made_plain_again_is_taken():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert names(nn.Sequential(layer, prune.remove(masked_by_torch(nn.Linear(3, 3)), "weight"))) == [
        "0.weight",
        "1.weight",
    ]


def test_a_weight_without_a_shape_is_refused_until_the_network_was_called():
    net = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(2), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError) as caught:
        names(net)
    assert str(caught.value) == (
        "the weight '1.weight' has no shape yet: call the network once on an example before the fit, or leave it out "
        "with exclude="
    )
    assert names(net, None, ["1"]) == ["0.weight"]
    net(torch.ones(2, 2))
    assert names(net) == ["0.weight", "1.weight"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.complex64, torch.bool])
def test_a_weight_that_is_not_floating_point_is_refused(dtype):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = nn.Parameter(torch.ones(2, 2).to(dtype), requires_grad=False)
    with pytest.raises(ValueError) as caught:
        names(net)
    assert str(caught.value) == f"the weight '1.weight' is of {dtype}, not floating point; leave it out with exclude="
    assert names(net, None, ["1"]) == ["0.weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_each_floating_type_is_taken(dtype):
    assert names(nn.Linear(2, 2, dtype=dtype)) == ["weight"]


def test_a_selection_that_owns_no_weights_is_an_error():
    class Optional(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

    net = nn.ModuleDict({"bare": Optional(None), "full": Optional(nn.Parameter(torch.ones(2, 2)))})
    assert names(net, [""]) == ["full.weight"]
    with pytest.raises(ValueError) as caught:
        names(net, ["bare"])
    assert str(caught.value) == "layers ['bare'] selects 'bare', which own no weights"


@pytest.mark.parametrize(("taken", "excluded"), [("0", "1"), ("1", "0")])
@pytest.mark.parametrize("layers", [None, ["0", "1"]])
def test_a_weight_that_an_excluded_layer_has_too_is_refused(taken, excluded, layers):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError) as caught:
        names(net, layers, [excluded])
    assert str(caught.value) == (
        f"the weight '{taken}.weight' belongs also to '{excluded}', which exclude= leaves out; exclude both or neither"
    )
    assert names(net, None, ["0", "1"]) == ["2.weight"]


@pytest.mark.parametrize("exclude", [["words"], ["type:Embedding"]])
def test_a_weight_of_an_excluded_layer_of_another_kind_is_refused(exclude):
    with pytest.raises(ValueError, match=r"the weight 'out.weight' belongs also to 'words', which exclude= leaves out"):
        names(Tied(), None, exclude)


@pytest.mark.parametrize(
    ("layers", "exclude", "message"),
    [
        (["lst"], None, "layers has 'lst', which matches no module; did you mean 'last'?"),
        (["attention.out_porj"], None, "which matches no module; did you mean 'attention.out_proj'?"),
        (None, ["type:Embeding"], "exclude has 'type:Embeding', which matches no module; did you mean 'type:Embedding"),
        (["own.zzz*"], None, "layers has 'own.zzz*', which matches no module"),
    ],
)
def test_a_selector_that_matches_nothing_is_an_error_with_the_nearest_name(layers, exclude, message):
    with pytest.raises(ValueError) as caught:
        names(Zoo(), layers, exclude)
    assert message in str(caught.value)


# --- what is taken where nobody names layers ---


@pytest.mark.parametrize(
    ("default", "expected"),
    [
        ((_ConvNd,), ["first.weight", "line.weight", "volume.weight", "up.weight"]),
        ((nn.ConvTranspose2d,), ["up.weight"]),
        ((nn.Embedding, nn.GRUCell), ["words.weight", *CELL]),
    ],
)
def test_a_technique_may_take_other_layers_by_default(default, expected):
    zoo = Zoo()
    selected = select_weights(zoo, None, None, default=default)
    assert list(selected.weights) == expected
    every = list(select_weights(zoo, [""], None).weights)
    assert sorted([*selected.weights, *selected.left]) == sorted(every)
    for layers in (["words"], ["last", "type:Conv1d"]):  # what is named does not depend on it
        assert list(select_weights(zoo, layers, None, default=default).weights) == names(zoo, layers)


def test_what_is_not_taken_by_default_need_not_be_excluded():
    selected = select_weights(Zoo(), None, ["first", "last"], default=(_ConvNd,))
    assert list(selected.weights) == ["line.weight", "volume.weight", "up.weight"]
    assert selected.idle == ["last"]
    with pytest.raises(ValueError, match="layers selects nothing: Linear has no ConvNd"):
        select_weights(nn.Linear(2, 2), None, None, default=(_ConvNd,))


# --- where filters are ---


def test_filters_of_each_kind_of_weight():
    zoo = Zoo()
    sites = sites_of(zoo)
    found = {name: filters_of(sites[id(weight)]) for name, weight in zoo.named_parameters() if weight.ndim >= 2}
    plain = ["first.weight", "line.weight", "volume.weight", "attention.out_proj.weight", "separate.out_proj.weight"]
    assert {name: filters for name, filters in found.items() if filters is not None} == {
        **dict.fromkeys([*plain, "last.weight"], Filters(groups=0)),
        "up.weight": Filters(groups=1),
    }
    assert {"pair.weight", "words.weight", LSTM[0], CELL[0], ATTENTION[0], "own.weight", "own.table"} < set(found)


@pytest.mark.parametrize(
    ("kind", "groups"), [(nn.ConvTranspose1d, 1), (nn.ConvTranspose2d, 2), (nn.ConvTranspose3d, 4)]
)
def test_filters_of_transposed_convolutions_lie_in_groups(kind, groups):
    layer, plain = kind(4, 8, 3, groups=groups), nn.Conv2d(4, 8, 3, groups=groups)
    assert filters_of(sites_of(layer)[id(layer.weight)]) == Filters(groups)
    assert filters_of(sites_of(plain)[id(plain.weight)]) == Filters(0)
