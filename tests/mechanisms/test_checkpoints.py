"""Checkpoints: compressed weights where all look for them, dense ones beside, and hooks that leave nothing behind."""

from __future__ import annotations

import copy

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from lightning_compress.mechanisms.checkpoints import (
    SECTION,
    compress_,
    dense_of,
    keep_dense_,
    loading_dense,
    saving_compressed,
)


class Module(L.LightningModule):
    """Two tied layers and one more; the user's own hooks write and read an entry."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.third = nn.Linear(2, 1, bias=False)
        self.read = None

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = [value.tolist() for value in checkpoint["state_dict"].values()]

    def on_load_checkpoint(self, checkpoint):
        self.read = {name: value.clone() for name, value in checkpoint["state_dict"].items()}


def checkpoint_of(module, **entries):
    return {"state_dict": module.state_dict(), "callbacks": {}, **entries}


def halved(*names):
    """Compresses entries of these names only, and notes what it was asked."""

    def compress(name, value):
        compress.asked.append(name)
        return value / 2 if name in names else None

    compress.asked = []
    return compress


# --- what is written ---


def test_compressed_weights_take_the_place_of_dense_ones_beside_them():
    module = Module()
    before, checkpoint = copy.deepcopy(module.state_dict()), checkpoint_of(module)
    given = checkpoint["state_dict"]
    compress_(checkpoint, "pruning", halved("first.weight", "second.weight"))
    assert list(checkpoint["state_dict"]) == list(before)
    for name, value in checkpoint["state_dict"].items():
        factor = 0.5 if name in ("first.weight", "second.weight") else 1.0
        assert torch.equal(value, before[name] * factor)
    assert list(dense_of(checkpoint, "pruning")) == ["first.weight", "second.weight"]
    assert all(torch.equal(value, before[name]) for name, value in dense_of(checkpoint, "pruning").items())
    for name, value in module.state_dict().items():  # the module's own, and the dict that others may hold
        assert torch.equal(value, before[name])
        assert given[name].data_ptr() == value.data_ptr()


def test_tied_weights_share_their_memory_in_the_file(tmp_path):
    checkpoint, compress = checkpoint_of(Module()), halved("first.weight", "second.weight")
    compress_(checkpoint, "pruning", compress)
    torch.save(checkpoint, tmp_path / "file")
    read = torch.load(tmp_path / "file", weights_only=True)
    for weights in (read["state_dict"], dense_of(read, "pruning")):
        assert weights["first.weight"].data_ptr() == weights["second.weight"].data_ptr()
    assert read["state_dict"]["first.weight"].data_ptr() != dense_of(read, "pruning")["first.weight"].data_ptr()
    assert compress.asked == ["first.weight", "first.bias", "third.weight"]  # tied ones once


def test_parts_of_one_tensor_are_not_taken_for_one_another():
    whole = torch.arange(6.0)
    checkpoint = {"state_dict": {"all": whole, "head": whole[:3], "tail": whole[3:], "odd": whole[::2]}}
    compress_(checkpoint, "pruning", lambda name, value: value * 2)
    found = {name: value.tolist() for name, value in checkpoint["state_dict"].items()}
    assert found == {"all": [0, 2, 4, 6, 8, 10], "head": [0, 2, 4], "tail": [6, 8, 10], "odd": [0, 4, 8]}


def test_names_are_plain_and_keys_are_as_in_the_file():
    checkpoint, compress = checkpoint_of(torch.compile(Module())), halved("first.weight", "second.weight")
    compress_(checkpoint, "pruning", compress)
    assert compress.asked[0] == "first.weight"
    assert list(dense_of(checkpoint, "pruning")) == ["_orig_mod.first.weight", "_orig_mod.second.weight"]


def test_entries_that_are_no_tensors_stay():
    checkpoint, extra = {"state_dict": {"a": torch.ones(1), "_extra_state": {"b": 1}}, "callbacks": {}}, {"b": 1}
    compress_(checkpoint, "pruning", halved("a", "_extra_state"))
    assert checkpoint["state_dict"] == {"a": torch.tensor([0.5]), "_extra_state": extra}


def test_a_file_with_weights_only_has_no_dense_ones():
    checkpoint = {"state_dict": {"a": torch.ones(1)}}
    compress_(checkpoint, "pruning", halved("a"))
    assert checkpoint == {"state_dict": {"a": torch.tensor([0.5])}}
    keep_dense_(checkpoint, "pruning", {"a": torch.ones(1)})
    assert list(checkpoint) == ["state_dict"]
    assert dense_of(checkpoint, "pruning") == {}


def test_each_owner_has_its_own_dense_weights():
    checkpoint = {"state_dict": {}, "callbacks": {}}
    keep_dense_(checkpoint, "first", {"a": torch.ones(1)})
    keep_dense_(checkpoint, "second", {"b": torch.zeros(1)})
    assert (dense_of(checkpoint, "first"), dense_of(checkpoint, "second")) == (
        {"a": torch.ones(1)},
        {"b": torch.zeros(1)},
    )
    dense_of(checkpoint, "first").clear()
    assert list(dense_of(checkpoint, "first")) == ["a"]  # what is given back is a dict of its own
    assert dense_of(checkpoint, "third") == {}


# --- the hooks of the module ---


def test_saving_keeps_what_the_user_writes():
    """The user's hook comes first, and finds the checkpoint as it would be without ours."""
    module = Module()
    expected = checkpoint_of(module)
    module.on_save_checkpoint(expected)
    checkpoint = checkpoint_of(module)
    with saving_compressed(module, "pruning", lambda _: halved("third.weight")):
        module.on_save_checkpoint(checkpoint)
    assert checkpoint["mine"] == expected["mine"]
    assert torch.equal(checkpoint["state_dict"]["third.weight"], module.third.weight / 2)
    assert list(dense_of(checkpoint, "pruning")) == ["third.weight"]


@pytest.mark.parametrize("resumes", [True, False])
def test_loading_gives_dense_weights_to_who_goes_on(resumes):
    module, files = Module(), []
    checkpoint = checkpoint_of(module)
    compress_(checkpoint, "pruning", halved("first.weight", "second.weight"))
    checkpoint[SECTION]["pruning"]["dense"]["gone"] = torch.ones(1)  # of a layer that the module has no more
    compressed = dict(checkpoint["state_dict"])

    def loaded(seen):
        files.append(dict(seen["state_dict"]))

    with loading_dense(module, "pruning", loaded, resumes=resumes):
        module.on_load_checkpoint(checkpoint)
    assert files == [compressed]  # as it is in the file
    assert list(module.read) == list(compressed)
    expected = module.state_dict() if resumes else compressed
    assert all(torch.equal(value, expected[name]) for name, value in module.read.items())  # the user's hook sees them
    assert all(torch.equal(value, expected[name]) for name, value in checkpoint["state_dict"].items())


def test_a_checkpoint_of_a_plain_training_is_loaded_as_it_is():
    module, files = Module(), []
    checkpoint = checkpoint_of(module)
    with loading_dense(module, "pruning", files.append, resumes=True):
        module.on_load_checkpoint(checkpoint)
    assert files == [checkpoint]
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in module.read.items())


def contexts(module, owner, compress):
    return saving_compressed(module, owner, lambda _: compress), loading_dense(
        module, owner, lambda _: None, resumes=True
    )


def test_two_owners_share_a_checkpoint():
    module = Module()
    before, checkpoint = copy.deepcopy(module.state_dict()), checkpoint_of(module)
    save_one, load_one = contexts(module, "one", halved("first.weight", "second.weight"))
    save_two, load_two = contexts(module, "two", halved("third.weight"))
    with save_one, save_two:
        module.on_save_checkpoint(checkpoint)
    found = {name: value.clone() for name, value in checkpoint["state_dict"].items()}
    assert [torch.equal(found[name], before[name] / 2) for name in found] == [True, False, True, True]
    assert {owner: list(dense_of(checkpoint, owner)) for owner in ("one", "two")} == {
        "one": ["first.weight", "second.weight"],
        "two": ["third.weight"],
    }
    with load_two:  # each puts its own back
        module.on_load_checkpoint({**checkpoint, "state_dict": dict(found)})
    assert torch.equal(module.read["third.weight"], before["third.weight"])
    assert torch.equal(module.read["first.weight"], found["first.weight"])
    with load_one, contexts(module, "two", halved())[1]:
        module.on_load_checkpoint(checkpoint)
    assert all(torch.equal(value, before[name]) for name, value in module.read.items())


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("hook", ["on_save_checkpoint", "on_load_checkpoint"])
def test_nothing_stays_on_the_module(hook, fails):
    def broken(*args):
        raise OSError("the disk is gone")

    module, compress = Module(), broken if fails else halved()
    attributes = set(vars(module))
    context = {
        "on_save_checkpoint": saving_compressed(module, "pruning", lambda _: compress),
        "on_load_checkpoint": loading_dense(module, "pruning", compress if fails else lambda _: None, resumes=True),
    }[hook]
    caught = None
    try:
        with context:
            assert set(vars(module)) == attributes | {hook}
            getattr(module, hook)(checkpoint_of(module))
    except OSError as error:
        caught = str(error)
    assert caught == ("the disk is gone" if fails else None)
    assert set(vars(module)) == attributes
    assert getattr(module, hook).__func__ is getattr(Module, hook)


def test_nothing_stays_on_the_module_in_whatever_order_owners_leave():
    module = Module()
    attributes, seen = set(vars(module)), []
    module.on_save_checkpoint = seen.append
    own = module.on_save_checkpoint
    first, second, third = (
        saving_compressed(module, name, lambda _: halved()) for name in ("first", "second", "third")
    )
    for context in (first, second, third):
        context.__enter__()
    for context in (second, first, third):
        assert module.on_save_checkpoint is not own
        context.__exit__(None, None, None)
    assert module.on_save_checkpoint is own
    del module.on_save_checkpoint
    assert set(vars(module)) == attributes


def test_a_hook_that_the_user_put_on_the_instance_comes_back():
    module, seen = Module(), []
    module.on_save_checkpoint = seen.append
    own, checkpoint = module.on_save_checkpoint, checkpoint_of(module)
    with saving_compressed(module, "pruning", lambda _: halved()):
        module.on_save_checkpoint(checkpoint)
    assert seen == [checkpoint]
    assert vars(module)["on_save_checkpoint"] is own


def test_a_trainer_saves_and_loads_through_the_hooks(tmp_path):
    """Files with weights only too; and what is loaded to be tested stays compressed."""
    module, trainer = Module(), L.Trainer(accelerator="cpu", logger=False, barebones=True)
    trainer.strategy.connect(module)
    with saving_compressed(module, "pruning", lambda _: halved("third.weight")):
        trainer.save_checkpoint(tmp_path / "whole")
        trainer.save_checkpoint(tmp_path / "weights", weights_only=True)
    for name, dense in (("whole", {"third.weight": module.third.weight}), ("weights", {})):
        read = torch.load(tmp_path / name, weights_only=True)
        assert torch.equal(read["state_dict"]["third.weight"], module.third.weight / 2)
        assert dense_of(read, "pruning").keys() == dense.keys()
        assert all(torch.equal(value, dense[key]) for key, value in dense_of(read, "pruning").items())
    assert torch.equal(Module.load_from_checkpoint(tmp_path / "whole").third.weight, module.third.weight / 2)
