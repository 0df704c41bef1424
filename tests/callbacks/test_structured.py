"""Structured pruning: what goes, what stays, what is refused, on networks of many kinds."""

from __future__ import annotations

import copy
import re
import sys
import time

import lightning.pytorch as L
import pytest
import torch
from structured_networks import Lit, Net, fitted
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress import StructuredPruningCallback
from lightning_compress.mechanisms.channel_graph import StructureError


def structured(ratio=0.5, **arguments):
    return StructuredPruningCallback(ratio, **arguments)


def shrunk(net, *, x=None, ratio=0.5, **arguments):
    """A module around a network, trained for one epoch with filters taken away at its start, and the callback."""
    callback, module = structured(ratio, **arguments), Lit(net=net)
    fitted(module, callback)
    return module, callback


def equals_the_zeroed(net, smaller, callback, x):
    """The largest difference to the network with zeros in the place of what went, of the largest output."""
    zeroed = copy.deepcopy(net).eval()
    for name, value in [*zeroed.named_parameters(), *zeroed.named_buffers()]:
        value.data = callback.shrinkage.zeroed(f"net.{name}", value.data)
    with torch.no_grad():
        expected, own = zeroed(x), smaller.eval()(x)
    return float((expected - own).abs().max() / expected.abs().max())


class Frozen(Lit):
    """Nothing learns, so the network after the fit is the one right after the filters went."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_train_batch_start(self, batch, batch_idx):
        self.eval()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.train()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 16, 3, padding=1)
        self.a, self.norm, self.b = nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.Conv2d(24, 16, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.norm(self.a(x)))))
        return self.head(x.mean(dim=(2, 3)))


class UNet(nn.Module):
    """With a transposed convolution, a concatenation, and a convolution as its head."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.norm, self.merge, self.head = nn.BatchNorm2d(16), nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 3, 1)

    def maps(self, x):
        first = F.relu(self.down1(x))
        second = F.relu(self.down2(first))
        merged = F.relu(self.merge(torch.cat([first, F.relu(self.norm(self.up(second)))], dim=1)))
        return self.head(merged)

    def forward(self, x):
        return self.maps(x)


class Segments(Frozen):
    def logits(self, x):
        return self.net(x).mean(dim=(2, 3))


class Grouped(nn.Module):
    def __init__(self, groups=4):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1, groups=groups)
        self.norm, self.fc = nn.BatchNorm2d(32), nn.Linear(32, 3)

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.b(F.relu(self.a(x))))).mean(dim=(2, 3)))


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(2, 32, 1), nn.BatchNorm2d(32)
        self.depth, self.norm2 = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32)
        self.squeeze, self.excite = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 32, 1)
        self.project, self.fc = nn.Conv2d(32, 16, 1), nn.Linear(16, 3)

    def forward(self, x):
        x = F.hardswish(self.norm2(self.depth(F.hardswish(self.norm1(self.expand(x))))))
        x = x * F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean(dim=(2, 3), keepdim=True)))))
        return self.fc(self.project(x).mean(dim=(2, 3)))


class Gated(nn.Module):
    """The two halves of one convolution are multiplied."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(2, 32, 3, padding=1), nn.Conv2d(16, 24, 3), nn.Linear(24, 3)

    def forward(self, x):
        first, second = self.a(x).chunk(2, dim=1)
        return self.fc(F.relu(self.b(first * torch.sigmoid(second))).mean(dim=(2, 3)))


class Reused(nn.Module):
    """One layer is called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.twice, self.fc = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.fc(F.relu(self.twice(F.relu(self.twice(x)))).mean(dim=(2, 3)))


class Scaled(nn.Module):
    """A bare parameter scales channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 24, 3), nn.Linear(24, 3)
        self.scale = nn.Parameter(torch.rand(16, 1, 1))

    def forward(self, x):
        return self.fc(F.relu(self.b(F.relu(self.a(x) * self.scale))).mean(dim=(2, 3)))


class GroupNormed(nn.Module):
    def __init__(self, groups=4):
        super().__init__()
        self.a, self.norm = nn.Conv2d(2, 32, 3, padding=1), nn.GroupNorm(groups, 32)
        self.b, self.fc = nn.Conv2d(32, 24, 3), nn.Linear(24, 3)

    def forward(self, x):
        return self.fc(F.relu(self.b(F.relu(self.norm(self.a(x))))).mean(dim=(2, 3)))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM, **settings):
        super().__init__()
        self.a, self.rnn, self.fc = nn.Conv2d(2, 16, 3, padding=1), kind(16, 24, batch_first=True, **settings), None
        self.fc = nn.Linear(24 * (2 if settings.get("bidirectional") else 1), 3)

    def forward(self, x):
        return self.fc(self.rnn(F.relu(self.a(x)).flatten(2).transpose(1, 2))[0].mean(dim=1))


EXACT = {
    "plain": Net,
    "residual": Residual,
    "u-net": UNet,
    "grouped": Grouped,
    "depthwise": Depthwise,
    "gated": Gated,
    "reused": Reused,
    "scaled": Scaled,
    "recurrent": Recurrent,
    "narrow flatten": lambda: Net(12, 10),
}


@pytest.mark.parametrize(
    "score", ["l2", *(pytest.param(own, marks=pytest.mark.slow) for own in ("l1", "taylor", "random"))]
)
@pytest.mark.parametrize("kind", EXACT)
def test_the_smaller_network_equals_the_one_with_zeros(kind, score):
    torch.manual_seed(1)
    net = EXACT[kind]()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.5, 0.5), part.running_var.uniform_(0.5, 2), part.bias.data.uniform_(-0.5, 0.5)
    module = (Segments if kind == "u-net" else Frozen)(net=copy.deepcopy(net))
    net.load_state_dict(module.net.state_dict())
    callback = structured(score=score, min_channels=4)
    fitted(module, callback)
    x = torch.randn(4, 2, 4, 4)
    assert equals_the_zeroed(net, module.net, callback, x) < 1e-5
    assert callback.plan.difference < 1e-5
    assert sum(own.numel() for own in module.parameters()) < 0.8 * sum(own.numel() for own in net.parameters())


# Where channels are few, or most of the network is left alone, some shares cannot be met.
UNMET = {
    ("grouped", 0.5, "params"): "0.4660 is the nearest",
    ("grouped", 0.5, "macs"): "0.4748 is the nearest",
    ("reused", 0.3, "macs"): "0.3308 is the nearest",
    ("reused", 0.7, "macs"): "0.6690 is the nearest",
    ("recurrent", 0.5, "macs"): "0.4138 is the most",
    ("recurrent", 0.7, "macs"): "0.4138 is the most",
    ("recurrent", 0.5, "params"): "0.3911 is the most",
    ("recurrent", 0.7, "params"): "0.3911 is the most",
}


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("ratio", [0.5, *(pytest.param(own, marks=pytest.mark.slow) for own in (0.3, 0.7))])
@pytest.mark.parametrize("kind", EXACT)
def test_budgets_are_met(kind, ratio, budget):
    """Parameters and multiply-accumulates, counted anew by torch, within two points."""
    torch.manual_seed(1)
    before, x = EXACT[kind]() if kind != "narrow flatten" else Net(60, 50), torch.randn(1, 2, 4, 4)
    module = (Segments if kind == "u-net" else Lit)(net=copy.deepcopy(before))
    callback = structured(ratio, budget=budget, min_channels=1)
    if (kind, ratio, budget) in UNMET:
        with pytest.raises(StructureError, match=UNMET[kind, ratio, budget]):
            fitted(module, callback)
        return
    fitted(module, callback)
    counts = [count(own, x) for own in (before, module.net)]
    share = 1 - counts[1][budget] / counts[0][budget]
    assert share == pytest.approx(ratio, abs=0.02)
    assert callback.reached == pytest.approx(share, abs=1e-6)
    assert (counts[0]["params"], counts[1]["params"]) == callback.plan.parameters
    assert (counts[0]["macs"], counts[1]["macs"]) == callback.plan.macs


def count(net, x):
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        net.eval()(x)
    return {"params": sum(own.numel() for own in net.parameters()), "macs": counter.get_total_flops() // 2}


@pytest.mark.sample
def test_the_plan_of_another_module_is_forgotten():
    plans = []

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            plans.append(callback.plan)

    _, callback = shrunk(Net())
    fitted(Lit(net=Net(24, 16)), callback, Look())
    assert plans == [None]
    assert callback.plan.filters["net.conv1"][0] == 24


@pytest.mark.parametrize(("ratio", "expected"), [(0.25, (12, 18)), (0.3, (11, 17)), (0.5, (8, 12)), (0.6, (8, 8))])
def test_each_layer_loses_the_share_of_its_filters(ratio, expected):
    module, callback = shrunk(Net(), ratio=ratio)
    assert (module.net.conv1.out_channels, module.net.conv2.out_channels) == expected
    assert callback.plan.filters == {"net.conv1": (16, expected[0]), "net.conv2": (24, expected[1])}


@pytest.mark.sample
@pytest.mark.parametrize(
    ("ratio", "arguments"), [(0.4, {"budget": "params", "round_to": 16}), (0.8, {"budget": "macs", "round_to": 16})]
)
def test_what_a_refusal_names_can_be_had(ratio, arguments):
    with pytest.raises(StructureError, match="ask for ratio=") as caught:
        shrunk(Net(32, 16), ratio=ratio, **arguments)
    words = re.search(
        r"(0\.\d+) is the (?:nearest|most).*; ask for ratio=(0\.\d+), or give round_to=(\d+)", str(caught.value)
    )
    assert words is not None, str(caught.value)
    _, other = shrunk(Net(32, 16), ratio=float(words[2]), **arguments)
    assert other.reached == pytest.approx(float(words[1]), abs=1e-4)
    _, finer = shrunk(Net(32, 16), ratio=ratio, **{**arguments, "round_to": int(words[3])})
    assert finer.reached == pytest.approx(ratio, abs=0.02)


def test_numbers_of_channels_are_rounded_for_the_runtime():
    module, _ = shrunk(Net(40, 60), ratio=0.45, round_to=8)
    assert (module.net.conv1.out_channels, module.net.conv2.out_channels) == (24, 32)


def test_small_layers_are_left_alone_and_listed():
    module, callback = shrunk(Net(8, 24))
    assert module.net.conv1.out_channels == 8
    assert callback.plan.left["net.conv1"] == "has no more than min_channels=8"
    assert module.net.conv2.out_channels == 12
    assert any("'net.conv1'" in remark for remark in callback.remarks())


def test_a_transposed_convolution_that_lost_inputs_alone_lost_no_filters():
    module, callback = Segments(net=UNet()), structured(0.5, layers=["net.down2"])
    fitted(module, callback)
    assert (module.net.up.in_channels, module.net.up.out_channels) == (16, 16)
    callback.plan = None  # as after a resume
    assert callback.intent(None, module).takes == ("net.down2",)


@pytest.mark.sample
def test_layers_that_an_earlier_round_made_narrower_are_not_said_to_stay():
    module, callback = Lit(net=Net(12, 24)), structured(0.5, schedule="iterative", rounds=3, start=0.2, end=0.6)
    fitted(module, callback, steps=8)
    assert module.net.conv1.out_channels == 8
    assert "net.conv1" in callback.plan.left  # of the last round
    assert callback.remarks()[1] == "structured: layers that stay as they are: 'net.fc'."


@pytest.mark.sample
def test_scores_choose():
    """Filters of known sizes, by each score."""
    net = Net()
    with torch.no_grad():
        net.conv1.weight.copy_(torch.linspace(1, 2, 16)[:, None, None, None].expand_as(net.conv1.weight))
        net.bn1.weight.copy_(torch.linspace(2, 1, 16))
    for score, expected in (("l1", range(8, 16)), ("l2", range(8, 16)), ("bn_scale", range(8))):
        module = Frozen(net=copy.deepcopy(net))
        module.net.bn1.weight.data.copy_(net.bn1.weight)
        callback = structured(score=score)
        fitted(module, callback)
        assert callback.shrinkage.kept["net.conv1.weight"][0] == list(expected)


def test_taylor_scores_are_of_the_batch_at_hand():
    net = Net()
    module = Frozen(net=copy.deepcopy(net))
    net.load_state_dict(module.net.state_dict())
    callback = structured(score="taylor")
    fitted(module, callback)
    x, y = next(iter(module.train_dataloader()))
    F.cross_entropy(net.eval()(x), y).backward()  # as the module's own hook has it in a step
    scores = (net.conv1.weight * net.conv1.weight.grad).flatten(1).sum(1).abs()
    expected = scores.argsort(stable=True)[8:].sort().values.tolist()
    assert callback.shrinkage.kept["net.conv1.weight"][0] == expected


@pytest.mark.slow
def test_random_scores_follow_the_seed():
    kept = [shrunk(Net(), score="random", seed=seed)[1].shrinkage.kept["net.conv1.weight"] for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]


class Still(Frozen):
    """Nothing but its statistics moves."""

    def on_train_batch_start(self, batch, batch_idx):
        pass


@pytest.mark.sample
def test_statistics_may_be_estimated_anew_at_the_end():
    kept, anew = (Still() for _ in range(2))
    fitted(kept, structured())
    fitted(anew, structured(reestimate_batchnorm=True))
    x = torch.cat([batch for batch, _ in anew.train_dataloader()])
    expected = anew.net.conv1(x).mean(dim=(0, 2, 3))
    assert torch.allclose(anew.net.bn1.running_mean, expected, atol=1e-5)
    assert not torch.allclose(kept.net.bn1.running_mean, expected, atol=1e-3)
    with pytest.raises(ValueError, match="reestimate_batchnorm has no effect: no layer keeps"):
        fitted(Lit(norm=False), structured(reestimate_batchnorm=True))


def test_the_plan_is_printed(capsys):
    shrunk(Net())
    printed = capsys.readouterr().out
    assert "structured has taken away 50.0% of the filters" in printed
    assert re.search(r"net.conv1 +16 -> 8 +304 -> 152 +4,608 -> 2,304\n", printed)
    assert re.search(r"net.fc +3 +291 -> 147 +288 -> 144\n", printed)
    assert "parameters 4,155 -> 1,215 (70.8% less)" in printed
    assert "MACs 18,720 -> 5,904 (68.5% less)" in printed
    assert "keep their filters: 'net.fc': is what the network returns" in printed


def test_before_its_turn_it_says_what_will_go(capsys):
    fitted(Lit(), structured(start=0.5))
    printed = capsys.readouterr().out
    assert printed.index("structured will take away 50.0%") < printed.index("structured has taken away 50.0%")


def test_the_head_that_is_a_convolution_keeps_its_classes():
    module = Segments(net=UNet())
    _ = fitted(module, structured(min_channels=1))
    assert module.net.head.out_channels == 3
    assert module.net.head.in_channels == 8


def test_frozen_layers_shrink_and_stay_frozen():
    module = Lit()
    module.net.conv1.requires_grad_(False)
    fitted(module, structured())
    assert module.net.conv1.out_channels == 8
    assert not module.net.conv1.weight.requires_grad


def test_group_norm_loses_as_much_of_each_group():
    module, callback = shrunk(GroupNormed())
    assert module.net.norm.num_channels == 16
    kept = callback.shrinkage.kept["net.a.weight"][0]
    assert [index % 8 for index in kept[:4]] == [index % 8 for index in kept[4:8]] == [index % 8 for index in kept[12:]]
    assert callback.plan.unchecked == ()  # but for the statistics of a group, which are others without the channels
    assert callback.plan.difference < 1e-5


class Layered(nn.Module):
    """A norm over channels, one as a module and one as a function."""

    def __init__(self, functional):
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(32, 24), nn.LayerNorm(24), nn.Linear(24, 16), nn.Linear(16, 3)
        self.functional = functional

    def forward(self, x):
        x = self.a(x.flatten(1))
        x = F.normalize(x, dim=1) if self.functional else self.norm(x)
        return self.c(F.relu(self.b(F.relu(x))))


@pytest.mark.parametrize("functional", [True, False])
def test_where_channels_are_counted_nothing_is_compared(functional, capsys):
    module, callback = shrunk(Layered(functional))
    assert module.net.a.out_features == 12
    assert callback.plan.unchecked == (("net.a",) if functional else ())
    assert callback.plan.difference < 1e-5
    said = "not compared with zeros, as something over channels sees them: 'net.a'" in capsys.readouterr().out
    assert said is functional


class Attention(nn.Module):
    """Convolutions before, and a network of two layers behind attention."""

    def __init__(self, functional=False):
        super().__init__()
        self.first, self.tokens = nn.Conv2d(2, 24, 3, padding=1), nn.Conv2d(24, 16, 1)
        self.attention = None if functional else nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down, self.fc = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.tokens(F.relu(self.first(x))).flatten(2).transpose(1, 2)
        if self.attention is None:
            heads = x.unflatten(2, (4, 4)).transpose(1, 2)
            x = x + F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        else:
            x = x + self.attention(x, x, x)[0]
        x = x + self.down(F.relu(self.up(x)))
        return self.fc(x.mean(dim=1))


@pytest.mark.parametrize("functional", [True, False])
def test_what_reaches_attention_is_left_alone(functional):
    net = Attention(functional)
    module = Frozen(net=copy.deepcopy(net))
    callback = structured()
    fitted(module, callback)
    assert (module.net.first.out_channels, module.net.up.out_features) == (12, 16)
    assert (module.net.tokens.out_channels, module.net.down.out_features) == (16, 16)
    assert callback.plan.left["net.tokens"] == "reaches attention"
    assert equals_the_zeroed(net, module.net, callback, torch.randn(4, 2, 4, 4)) < 1e-5


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
        self.embed, self.body, self.fc = nn.Linear(2, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.body(self.embed(x.flatten(2).transpose(1, 2))).mean(dim=1))


@pytest.mark.sample
def test_a_network_that_is_mostly_attention_is_refused_and_prunes_the_rest_if_it_is_excluded():
    before = snapshot(module := Lit(net=Transformer()))
    with pytest.raises(StructureError, match=r"3 of 5 .* reach attention.*exclude=\['type:MultiheadAttention'\]"):
        fitted(module, structured())
    assert snapshot(module) == before
    fitted(module, structured(exclude=["type:MultiheadAttention"]))
    assert [layer.linear1.out_features for layer in module.net.body.layers] == [16, 16]
    assert module.net.embed.out_features == 16


# What is refused


def snapshot(module):
    """Everything that a refusal must leave as it was."""
    return (
        [
            (name, id(own), tuple(own.shape), own.detach().double().sum().item())
            for name, own in module.named_parameters()
        ],
        [(name, tuple(own.shape), own.double().sum().item()) for name, own in module.named_buffers()],
        [(name, part.training, len(part._forward_hooks), repr(part)) for name, part in module.named_modules()],
        sorted(key for key in vars(module) if not key.startswith("_")),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0}, r"ratio must be a number in \(0, 1\), got 0"),
        ({"ratio": 1.0}, r"ratio must be a number in \(0, 1\), got 1.0"),
        ({"ratio": 30}, "did you mean 0.3"),
        ({"schedule": "oneshot"}, "did you mean 'one_shot'"),
        ({"score": "l3"}, "score must be one of l1, l2, taylor, bn_scale, random, got 'l3'"),
        ({"budget": "flops"}, "budget must be one of filters, params, macs, got 'flops'"),
        ({"min_channels": 0}, "min_channels must be a whole number of at least 1"),
        ({"round_to": 0}, "round_to must be a whole number of at least 1"),
        ({"rounds": 1}, "rounds must be a whole number of at least 2"),
        ({"start": 1.0}, r"start must be a number in \[0, 1\), got 1.0"),
        ({"schedule": "iterative", "start": 0.8}, "start must be at most end, got start=0.8 and end=0.5"),
        ({"time_limit": 0}, "time_limit must be a positive number of seconds, got 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        StructuredPruningCallback(**{"ratio": 0.5, **arguments})


class Shuffled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 16, 1, groups=2), nn.Linear(16, 3)

    def forward(self, x):
        x = self.a(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(F.relu(self.b(x)).mean(dim=(2, 3)))


class Fixed(nn.Module):
    """The forward knows a number of channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 24, 3), nn.Linear(24, 3)

    def forward(self, x):
        x = F.relu(self.a(x)).reshape(len(x), 16, 4, 4)
        return self.fc(F.relu(self.b(x)).mean(dim=(2, 3)))


class Sums(nn.Module):
    """Channels of another position are added up: zeros are not what is gone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 24, 3), nn.Linear(24, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.fc(F.relu(self.b(x + x.roll(1, dims=1))).mean(dim=(2, 3)))


def test_behind_zeros_it_is_compared_too():
    net = Sums()
    torch.nn.init.zeros_(net.fc.weight)
    with pytest.raises(StructureError, match="computes something else"):
        shrunk(net)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.fc = nn.Linear(32, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.c.weight = self.b.weight

    def forward(self, x):
        return self.fc(F.relu(self.c(F.relu(self.b(F.relu(self.a(x.flatten(1))))))))


class TiedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        tokens = (x.flatten(1).abs() * 7).long() % 20
        return self.head(F.relu(self.body(self.embedding(tokens)))).mean(dim=1)[:, :3]


def normed(old):
    net = Net()
    if old:
        torch.nn.utils.weight_norm(net.conv2)
    else:
        torch.nn.utils.parametrizations.weight_norm(net.conv2)
    return net


@pytest.mark.parametrize(
    ("net", "arguments", "message"),
    [
        (Shuffled, {}, r"computes something else .*differs by .*exclude=\['net.a'\]"),
        (Fixed, {}, r"does not run: RuntimeError: shape .*test_structured.py:\d+: `.*reshape.*exclude=\['net.a'\]"),
        (Sums, {}, r"computes something else .*differs by .*exclude=\['net.a'\]"),
        (Tied, {}, r"'net.b', 'net.c' share one weight.*exclude="),
        (TiedEmbedding, {}, r"share one weight.*exclude="),
        (lambda: normed(old=True), {}, r"'net.conv2' computes its weight.*weight_norm.*exclude=\['net.conv2'\]"),
        (lambda: normed(old=False), {}, r"'net.conv2' computes its weight.*parametrization.*exclude=\['net.conv2'\]"),
        (Net, {"exclude": ["net"]}, "selects nothing"),
        (Net, {"exclude": ["net.conv3"]}, "did you mean 'net.conv"),
        (Net, {"layers": ["net.fc"]}, "no filters can go: 'net.fc': is what the network returns"),
        (Net, {"layers": ["net.bn1"]}, "without any"),
        (Net, {"min_channels": 24}, "no filters can go: .*has no more than min_channels=24"),
        (
            Net,
            {"ratio": 0.8, "min_channels": 14},
            "ratio=0.8 of the filters cannot go: .*=14 .* is the most; ask for ratio=0.3, or lower min_channels",
        ),
        (Net, {"ratio": 0.99, "budget": "macs"}, r"of the MACs cannot go"),
        (
            lambda: Net(32, 16),
            {"ratio": 0.4, "budget": "params", "round_to": 16},
            r"of the parameters cannot be met within 2%: 0\.\d+ is the nearest with round_to=16; ask for ratio=0\.\d+, "
            "or give round_to=4",
        ),
        (Net, {"ratio": 0.01}, "takes none of the channels away"),
        (Net, {"network": "nett"}, "network names 'nett'.*did you mean 'net'"),
        (Net, {"time_limit": 1e-4}, "stopped after time_limit=0.0001 s"),
        (Residual, {"layers": ["net.stem"]}, "can only go together with 'net.b', which is not selected"),
        (lambda: Recurrent(nn.GRU), {"min_channels": 20, "layers": ["net.a"]}, "no filters can go"),
    ],
)  # fmt: skip
def test_refusals_leave_the_module_as_it_was(net, arguments, message):
    module = Lit(net=net())
    before = snapshot(module)
    with pytest.raises((ValueError, TimeoutError), match=message):
        fitted(module, structured(**{"ratio": 0.5, **arguments}))
    assert snapshot(module) == before


@pytest.mark.parametrize("old", [True, False])
def test_a_weight_that_is_computed_may_be_left_out(old):
    module = Lit(net=normed(old))
    with pytest.raises(StructureError, match=r"'net.conv1': reaches 'net.conv2', whose weight is computed"):
        fitted(module, structured(exclude=["net.conv2"]))


def test_tied_layers_may_be_left_out():
    class Wider(Tied):
        def __init__(self):
            super().__init__()
            self.z, self.a = nn.Linear(32, 24), nn.Linear(24, 16)

        def forward(self, x):
            return super().forward(F.relu(self.z(x.flatten(1))))

    module, _ = shrunk(Wider(), exclude=["net.b", "net.c"])
    assert module.net.z.out_features == 12
    assert module.net.a.out_features == 16


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
def test_other_recurrent_layers_keep_their_sizes(kind):
    class Deeper(Recurrent):
        def __init__(self):
            super().__init__(kind)
            self.z, self.a = nn.Conv2d(2, 24, 3, padding=1), nn.Conv2d(24, 16, 1)

        def forward(self, x):
            return super().forward(F.relu(self.z(x)))

    module, _ = shrunk(Deeper())
    assert (module.net.z.out_channels, module.net.a.out_channels, module.net.rnn.hidden_size) == (12, 16, 24)


class Manual(Lit):
    automatic_optimization = False


def test_manual_optimisation_is_refused():
    with pytest.raises(ValueError, match=r"replays training steps, and Manual optimises manually"):
        fitted(Manual(), structured())


def test_lbfgs_is_refused():
    class Bfgs(Lit):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    module = Bfgs()
    before = snapshot(module)
    with pytest.raises(ValueError, match="state of LBFGS, which is of all parameters at once"):
        fitted(module, structured())
    assert snapshot(module) == before


class Odd(torch.optim.SGD):
    """Keeps for each parameter what cannot be told to belong to its entries."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for own in group["params"]:
                self.state[own]["factor"] = torch.zeros(own.numel() + 5)
        return loss


def test_a_state_that_cannot_be_cut_is_refused_before_anything_is_touched():
    class OddLit(Lit):
        def configure_optimizers(self):
            return Odd(self.parameters(), lr=0.1)

    module = OddLit()
    with pytest.raises(ValueError, match="what Odd keeps as 'factor' cannot be made smaller"):
        fitted(module, structured(start=0.5))
    assert [tuple(own.shape) for own in module.parameters()] == [tuple(own.shape) for own in OddLit().parameters()]


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_processes_that_are_started_are_refused(start_method):
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    trainer = L.Trainer(strategy=f"ddp_{start_method}", devices=2, accelerator="cpu", **settings)
    with pytest.raises(ValueError, match=r"cannot bring a smaller network back from processes .*use strategy='ddp'"):
        structured().setup(trainer, Lit(), "fit")


def test_a_module_that_is_compiled_as_a_whole_is_refused():
    with pytest.raises(ValueError, match="which is compiled as a whole"):
        fitted(torch.compile(Lit(), backend="eager"), structured())


def test_two_of_them_are_refused():
    with pytest.raises(ValueError, match="'structured' and 'b' would both take filters away"):
        fitted(Lit(), structured(), structured(name="b"))


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r'pip install "torch-pruning<2'):
        fitted(Lit(), structured())


def test_a_training_too_short_for_the_last_round_is_refused():
    with pytest.raises(ValueError, match=r"end=0.9 leaves no step after the last round: the training has 8"):
        fitted(Lit(), structured(schedule="iterative", end=0.9))


def test_a_training_that_stops_before_says_so():
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 8

    callback = structured(start=0.75)
    with pytest.warns(UserWarning, match=r"ended at 50% of its length, before all rounds: 0.0000 of the filters"):
        fitted(Lit(), callback, Stop(), steps=16)
    assert "not 0.5" in callback.failure


def test_a_resume_that_asks_for_less_or_counts_otherwise_is_refused(tmp_path):
    trainer = fitted(Lit(), structured(), steps=8)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for other, message in ((structured(0.3), "filters do not come back"), (structured(budget="macs"), "budget='macs'")):
        with pytest.raises(ValueError, match=message), pytest.warns(UserWarning, match="other arguments"):
            fitted(Lit(), other, steps=16, ckpt_path=tmp_path / "a.ckpt")


def test_the_time_limit_leaves_the_module_alone():
    class Slow(Net):
        def forward(self, x):
            if self.slow:
                while True:
                    time.sleep(0.01)
            return super().forward(x)

    class SlowLit(Lit):
        def on_train_batch_start(self, batch, batch_idx):
            self.net.slow = True

    net = Slow()
    net.slow = True
    module = SlowLit(net=net)
    before, began = snapshot(module), time.monotonic()
    with pytest.raises(TimeoutError, match=r"stopped after time_limit=0\.5 s of looking at the structure of SlowLit"):
        fitted(module, structured(time_limit=0.5))
    assert time.monotonic() - began < 20
    assert snapshot(module) == before
