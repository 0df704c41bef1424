"""The choice of a level for each layer, by hand and against all choices."""

from __future__ import annotations

import itertools
import random

import pytest

from lightning_compress.commands.sensitivity.choose import (
    UNITS,
    BudgetError,
    Option,
    choose,
    choose_filters,
    options_of,
)


def total(chosen, what):
    return sum(getattr(option, what) for option in chosen.values())


def test_by_hand():
    """10 and 20 bytes at 8 bits; one of the two must have 4, within 25, and the second loses less for more."""
    layers = {
        "a": [Option(8, 10, 0.0), Option(4, 5, 0.2)],
        "b": [Option(8, 20, 0.0), Option(4, 10, 0.1)],
    }
    assert {name: own.level for name, own in choose(layers, 30).items()} == {"a": 8, "b": 8}
    assert {name: own.level for name, own in choose(layers, 25).items()} == {"a": 8, "b": 4}
    assert {name: own.level for name, own in choose(layers, 20).items()} == {"a": 8, "b": 4}
    assert {name: own.level for name, own in choose(layers, 19).items()} == {"a": 4, "b": 4}
    with pytest.raises(BudgetError) as raised:
        choose(layers, 14)
    assert raised.value.smallest == 15


def test_of_equal_losses_the_one_that_moves_least_then_the_largest():
    layers = {
        "a": [Option(None, 8, 0.0), Option(4, 2, 0.0, moved=0.3)],
        "b": [Option(None, 8, 0.0), Option(4, 2, 0.0, moved=0.1)],
    }
    assert {name: own.level for name, own in choose(layers, 10).items()} == {"a": None, "b": 4}
    alike = {name: [Option(None, 8, 0.0), Option(8, 4, 0.0), Option(4, 2, 0.0)] for name in "ab"}
    assert total(choose(alike, 15), "cost") == 12


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_is_better(seed):
    generator = random.Random(seed)
    layers = {
        f"layer{index}": [
            Option(None, 12, 0.0),
            *(Option(level, generator.randint(1, 11), generator.random(), generator.random()) for level in range(3)),
        ]
        for index in range(5)
    }
    budget = generator.randint(5 * 11, 58)
    every = [dict(zip(layers, own, strict=True)) for own in itertools.product(*layers.values())]
    best = min(total(own, "weighed") for own in every if total(own, "cost") <= budget)
    chosen = choose(layers, budget)
    assert total(chosen, "cost") <= budget
    assert total(chosen, "weighed") == pytest.approx(best, abs=1e-12)


def test_large_budgets_are_kept_although_costs_are_rounded():
    generator = random.Random(1)
    layers = {
        str(index): [Option(bits, size * bits, 0.1 * generator.random() * (8 - bits)) for bits in (8, 4)]
        for index, size in enumerate(generator.randint(10**6, 10**7) for _ in range(60))
    }
    full = sum(own[0].cost for own in layers.values())
    chosen = choose(layers, 0.75 * full)
    assert 0.749 * full < total(chosen, "cost") <= 0.75 * full
    smallest = sum(own[1].cost for own in layers.values())
    assert smallest > UNITS
    assert total(choose(layers, smallest), "cost") == smallest


def test_losses_are_clipped_and_never_fall():
    levels = {8: (8, -0.2, 0.0), 4: (4, 0.3, 0.1), 3: (3, 0.1, 0.2), 2: (2, float("inf"), 0.3)}
    options = options_of(32, levels)
    assert [(own.level, own.cost, own.loss) for own in options] == [(None, 32, 0), (8, 8, 0), (4, 4, 0.3), (3, 3, 0.3)]


def test_filters_by_hand():
    """Half of 100 is to go. All lose half: 0.3. Without the sensitive layer the others lose 0.625: 2 * 0.0625."""
    macs = {"a": 20, "b": 40, "c": 40}
    losses = {"a": {0.5: 0.2, 0.75: 0.3}, "b": {0.5: 0.05, 0.75: 0.075}, "c": {0.5: 0.05, 0.75: 0.075}}
    choice = choose_filters(macs, losses, total=100, budget=50)
    assert (choice.left, choice.share) == (("a",), 0.625)
    assert choice.loss == pytest.approx(0.125)
    choice = choose_filters(macs, losses, total=100, budget=30)  # without "a" it would take 0.875 of the others
    assert (choice.left, choice.share) == ((), 0.7)
    with pytest.raises(BudgetError) as raised:
        choose_filters(macs, losses, total=110, budget=30)
    assert raised.value.smallest == 110 - 75
    no_number = {**losses, "c": {0.5: 0.05, 0.75: float("inf")}}
    with pytest.raises(BudgetError) as raised:
        choose_filters(macs, no_number, total=100, budget=30)
    assert raised.value.smallest == 50
