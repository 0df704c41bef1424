"""Budgets: arithmetic by hand, and against networks that are really cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress.mechanisms.budgets import ChannelGroup, Costs, Sizes, fewest_channels, kept_channels
from lightning_compress.mechanisms.dependencies import Dependencies
from lightning_compress.report.measure import macs_by_layer


def group(name="a", channels=16, blocks=1, originally=None):
    return ChannelGroup(name, (name,), channels, blocks, {}, (), originally or channels)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(0.1, [14, 9]), (0.25, [12, 7]), (0.3, [11, 7]), (0.5, [8, 5]), (0.55, [7, 4]), (0.95, [1, 1])],
)
def test_each_group_loses_the_share_half_a_channel_included(ratio, expected):
    """Of 10 channels a quarter is 2.5: three go."""
    kept = kept_channels([group(), group("b", 10)], sum, ratio, 26, at_least=1, uniform=True)
    assert kept == expected


def test_where_minima_are_in_the_way_the_others_give_more():
    groups = [group(channels=16), group("b", 100)]
    assert kept_channels(groups, sum, 0.5, 116, at_least=12, uniform=True) == [12, 46]


def test_the_share_is_of_what_there_was_originally():
    later = [group(channels=12, originally=16)]
    assert kept_channels(later, sum, 0.5, 16, at_least=1) == [8]
    assert kept_channels(later, sum, 0.1, 16, at_least=1) == [12]  # what is gone is gone
    assert kept_channels([*later, group("b")], sum, 0.5, 32, at_least=1) == [8, 8]


def test_blocks_and_multiples_go_together():
    assert kept_channels([group(channels=48, blocks=4)], sum, 0.3, 48, at_least=1) == [32]
    assert kept_channels([group(channels=48, blocks=4)], sum, 0.3, 48, at_least=1, multiple_of=6) == [36]
    assert fewest_channels([group(channels=48, blocks=4)], at_least=9, multiple_of=6) == [12]


def test_many_groups_that_step_at_once_go_over_one_after_the_other():
    groups = [group(str(index), 8) for index in range(10)]
    kept = kept_channels(groups, sum, 0.3, 80, at_least=1)
    assert sum(kept) == 56  # all at once it would be 60 or 50
    assert sorted(set(kept)) == [5, 6]


def test_costs_are_those_of_a_network_that_is_cut():
    torch.manual_seed(0)

    def net(a=12, b=20):
        return nn.Sequential(
            nn.Conv2d(3, a, 3), nn.BatchNorm2d(a), nn.ReLU(), nn.Conv2d(a, b, 3, stride=2), nn.ReLU(),
            nn.ConvTranspose2d(b, a, 2), nn.Flatten(), nn.Linear(a * 9, 4),
        )  # fmt: skip

    x, whole = torch.zeros(1, 3, 8, 8), net()
    found = Dependencies(net(), lambda own: own(x), selected=["0", "3", "5", "7"])
    sizes = {name: tuple(own.shape) for name, own in whole.named_parameters()}
    macs = macs_by_layer(whole.eval(), lambda: whole(x))
    costs = Costs(Sizes(sizes, {f"{name}.weight": float(count) for name, count in macs.items()}), found.groups)
    kept = {"0": 7, "3": 11, "5": 7}
    smaller = net(7, 11)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        smaller.eval()(x)
    order = [kept[own.name] for own in found.groups]
    assert costs.of("params", order) == sum(own.numel() for own in smaller.parameters())
    assert costs.of("macs", order) == counter.get_total_flops() / 2
    assert costs.of("filters", order) == 7 + 11 + 7
