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


@pytest.mark.slow
def test_a_backward_of_the_module_s_own_is_refused(tmp_path):
    rows = {"dpf": "DPFCallback", "qat": "QATCallback"}
    found = in_ranks(tmp_path, *[f"refused:backward:{name}" for name in rows])
    for name, row in rows.items():
        message = (
            rf"ValueError: Clipping overrides backward\(\), and '{name}' presents .*configure_gradient_clipping\(\)"
        )
        for rank in found[f"refused:backward:{name}"]:
            assert re.match(message, rank["error"])
        record("sharded", row, "backward() of the module's own", "refused", rank["error"].partition(": ")[2])


OF_WEIGHTS = {
    "refused:gathered:extended": (
        "DPFCallback",
        "a parameter with an all-gather of its own",
        "the weight 'model.first.weight' is gathered in a way of its own, as quantised tensors are, .* 'dpf' presents",
    ),
    "refused:gathered:fewer": (
        "DPFCallback",
        "reshard_after_forward= a number",
        "the weight 'model.first.weight' is kept on fewer processes after the forward pass .* 'dpf' presents",
    ),
    "refused:one_step:observed": (
        "QATCallback",
        "step_size='observed', one step a weight",
        "'qat' cannot round 'model.*weight' in each process: .* which step_size='observed' would move",
    ),
    "refused:one_step:learned": (
        "QATCallback",
        "step_size='learned', one step a weight",
        "'qat' cannot round 'model.*weight' in each process: .* which step_size='learned' would move",
    ),
}
SAMPLE, FEWER = list(OF_WEIGHTS)[:2]  # fewer than all, and more than one, take four


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return in_ranks(tmp_path_factory.mktemp("sample"), SAMPLE)


@pytest.fixture(scope="module")
def of_weights(tmp_path_factory):
    further = [name for name in OF_WEIGHTS if name not in (SAMPLE, FEWER)]
    folder = tmp_path_factory.mktemp("of_weights")
    return {**in_ranks(folder, *further), **in_ranks(folder, FEWER, ranks=4)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.sample if name == SAMPLE else ()) for name in OF_WEIGHTS]
)
def test_a_refusal_names_the_weight_and_the_way_out(request, name):
    row, column, message = OF_WEIGHTS[name]
    for rank in request.getfixturevalue("sample" if name == SAMPLE else "of_weights")[name]:
        assert re.match(f"ValueError: {message}.*exclude=", rank["error"])
    record("sharded", row, column, "refused", rank["error"].partition(": ")[2])
