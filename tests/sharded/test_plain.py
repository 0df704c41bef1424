"""What FSDP2 alone does to the weights: the tests with callbacks can be no more exact than this."""

from __future__ import annotations

import pytest

from .place import STEPS, alone, farthest, in_ranks, made

SCENARIOS = ("plain:validated", "plain:resharding", "plain:keeping")
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_ranks(tmp_path_factory.mktemp("plain"), *SCENARIOS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_equal_one_process_without_us(ranks, name, tmp_path):
    first, second = ranks[name]
    reference = alone(name, tmp_path)
    assert farthest(first["state_dict"], second["state_dict"]) == 0
    assert farthest(first["state_dict"], reference["state_dict"]) <= TOLERANCE
    assert farthest(first["state_dict"], made().state_dict()) > 0.01
    assert first["metrics"] == pytest.approx(reference["metrics"], abs=1e-6)


@pytest.mark.slow
def test_each_of_three_layers_is_gathered_once_in_a_step_or_twice(ranks):
    assert [rank["gathers"] for rank in ranks["plain:resharding"]] == [2 * 3 * STEPS] * 2
    assert [rank["gathers"] for rank in ranks["plain:keeping"]] == [3 * STEPS] * 2
