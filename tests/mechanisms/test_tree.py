from __future__ import annotations

import types

import torch
from export.networks import Pair, Prediction

from lightning_compress.mechanisms.tree import leaves, named_tensors, rebuild, unique_names, with_tensors


def test_leaves_are_named_by_the_way_to_them():
    value = {"a": 1, "b": Pair(2, [3, (4,)]), "c": Prediction(5, 6)}
    assert list(leaves(value, "x")) == [
        ("x_a", 1),
        ("x_b_first", 2),
        ("x_b_second_0", 3),
        ("x_b_second_1_0", 4),
        ("x_c_logits", 5),
        ("x_c_embedding", 6),
        ("x_c_note", "plain"),
    ]


def test_rebuild_keeps_types_and_the_original():
    value = {"a": [1, 2], "b": Pair(3, 4), "c": Prediction(5, 6, note=7), "d": types.MappingProxyType({"e": 8})}
    new = rebuild(value, lambda leaf: leaf * 10)
    assert new == {"a": [10, 20], "b": Pair(30, 40), "c": Prediction(50, 60, note=70), "d": {"e": 80}}
    assert type(new["b"]) is Pair
    assert value["a"] == [1, 2]
    assert value["c"] == Prediction(5, 6, note=7)


def test_rebuild_of_a_model_output():
    from transformers.modeling_outputs import SequenceClassifierOutput

    output = SequenceClassifierOutput(logits=torch.zeros(2, 3), hidden_states=(torch.zeros(1), torch.zeros(2)))
    new = with_tensors(output, [torch.ones(2, 3), torch.ones(1), torch.ones(2)])
    assert type(new) is SequenceClassifierOutput
    assert new.logits.sum() == new["logits"].sum() == 6
    assert new.hidden_states[1].sum() == 2
    assert output.logits.sum() == 0
    assert [name for name, _ in named_tensors(output)] == ["logits", "hidden_states_0", "hidden_states_1"]


def test_with_tensors_drops_what_may_belong_to_another_call():
    new = with_tensors((torch.zeros(1), 3, None, "text", object()), [torch.ones(1)])
    assert new[0].item() == 1
    assert new[1:] == (3, None, "text", None)


def test_unique_names():
    assert unique_names(["out put", "x", "x", "", "out_put"], taken=["x"]) == [
        "out_put",
        "x_1",
        "x_2",
        "value",
        "out_put_1",
    ]
