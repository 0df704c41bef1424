"""What does not work under FSDP2 is refused on all ranks, before the first step, with the way out."""

from __future__ import annotations

import re

import pytest
from records import record

from .place import in_ranks

REFUSED = {
    "refused:callback:StructuredPruningCallback": (
        "StructuredPruningCallback",
        "fully_shard",
        "channels can only go from whole parameters: .* shard the module that load_shrunk gives",
    ),
    "refused:callback:PTQCallback": (
        "PTQCallback",
        "fully_shard",
        r"it calibrates with whole parameters: .* validate\(module, ckpt_path=...\)",
    ),
    "refused:validated": ("PTQCallback", "validation outside of a fit", "it calibrates with whole parameters"),
    "refused:callback:AttentionTransferCallback": (
        "AttentionTransferCallback",
        "map_kind='gradient'",
        "map_kind='gradient' differentiates twice; choose another map_kind",
    ),
    "refused:layout:columns": (
        "DistillationCallback",
        "shard_placement_fn",
        r"'model.first.weight' lies as .*Shard\(dim=1\).*: call fully_shard",
    ),
    "refused:layout:hybrid": (
        "DistillationCallback",
        "hybrid sharding",
        "'model.first.weight' lies as .*Replicate.*: call fully_shard",
    ),
    "refused:tensor_parallel": (
        "DistillationCallback",
        "tensor parallelism",
        "tensor_parallel_size=2 .*: give it data_parallel_size=",
    ),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_ranks(tmp_path_factory.mktemp("refused"), *REFUSED)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_callback_and_the_way_out(ranks, name):
    row, column, message = REFUSED[name]
    for rank in ranks[name]:
        assert re.match(f"ValueError: {row}.*{message}", rank["error"])
    record("sharded", row, column, "refused", ranks[name][0]["error"].partition(": ")[2])
