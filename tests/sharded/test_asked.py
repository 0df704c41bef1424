"""Where one rank does not ask for a loss of manual optimisation, all ranks fail, and none waits for ever."""

from __future__ import annotations

import itertools
import re

import pytest
from records import record

from .place import in_ranks

MESSAGES = {
    "for nobody": "'kd': the distillation loss had no effect .*: no loss that self.compressed_loss was asked for",
    "never": r"Never.training_step never called self.compressed_loss\(task_loss\)",
    "by themselves": "'kd' had no effect: in a whole epoch ByThemselves.training_step never called",
}
COLUMNS = {
    "for nobody": "one process asks for a loss without terms",
    "never": "one process never asks for a loss",
    "by themselves": "one process never asks, and steps without an optimizer",
}
CELLS = list(itertools.product(MESSAGES, ["fsdp2", "ddp"]))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    scenarios = [f"asked:fitted:{kind}:{strategy}" for kind, strategy in CELLS]
    return in_ranks(tmp_path_factory.mktemp("asked"), *scenarios, "asked:validated")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "strategy"), CELLS)
def test_all_ranks_fail_where_one_does_not_ask(ranks, kind, strategy):
    first, second = (rank["error"] for rank in ranks[f"asked:fitted:{kind}:{strategy}"])
    assert re.search(MESSAGES[kind], second)
    assert "hangs" not in first
    if kind != "never":  # in which the second fails within its step, so that the first finds it gone
        assert re.match(f"RuntimeError: rank 1 failed: .*{MESSAGES[kind]}", first)
    column = f"manual optimisation, {COLUMNS[kind]}, {strategy.upper()}"
    record("sharded", "DistillationCallback", column, "refused", second.partition(": ")[2])


@pytest.mark.slow
def test_it_is_seen_where_a_validation_left_parameters_gathered(ranks):
    first, second = (rank["error"] for rank in ranks["asked:validated"])
    assert re.search(MESSAGES["for nobody"], first)
    assert re.search(MESSAGES["for nobody"], second)
