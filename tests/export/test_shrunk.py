"""Smaller networks out of a checkpoint: what is refused, and that nothing is unpickled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.export import load_shrunk
from lightning_compress.mechanisms.checkpoints import keep_structure_
from lightning_compress.mechanisms.shrinking import structure_of


def network(width):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, 2))


def saved(folder, width=4, whole=8, **more):
    own = network(width)
    checkpoint = {"state_dict": own.state_dict(), **more}
    keep_structure_(checkpoint, "structured", own, structure_of(network(whole)))
    torch.save(checkpoint, folder / "a.ckpt")
    return own, folder / "a.ckpt"


def test_sizes_and_weights(tmp_path):
    own, path = saved(tmp_path)
    module = network(8)
    ids = [id(parameter) for parameter in module.parameters()]
    assert load_shrunk(module, path) is module
    assert [id(parameter) for parameter in module.parameters()] == ids
    assert repr(module) == repr(own)
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in module.state_dict().items())


def test_a_module_that_is_as_small_already(tmp_path):
    own, path = saved(tmp_path)
    assert repr(load_shrunk(network(4), path)) == repr(own)


def test_another_class_is_refused(tmp_path):
    _, path = saved(tmp_path)
    with pytest.raises(ValueError, match=r"was not saved from a Linear: only one of the two has '0.bias'"):
        load_shrunk(nn.Linear(2, 2), path)
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module"):
        load_shrunk(nn.Linear, path)


def test_any_width_of_the_class_will_do(tmp_path):
    own, path = saved(tmp_path)
    assert repr(load_shrunk(network(16), path)) == repr(load_shrunk(network(2), path)) == repr(own)


def test_plain_weights_tell_their_sizes(tmp_path):
    own = network(4)
    torch.save(own.state_dict(), tmp_path / "w.pt")
    assert repr(load_shrunk(network(8), tmp_path / "w.pt")) == repr(own)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_what_tensors_do_not_tell_is_refused(norm, tmp_path):
    def normed(width):
        return nn.Sequential(nn.Linear(3, width), norm(width, elementwise_affine=False), nn.Linear(width, 2))

    torch.save(normed(4).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="the sizes of '1', which has no weights, are not told by the tensors"):
        load_shrunk(normed(8), tmp_path / "w.pt")
    assert repr(load_shrunk(normed(4), tmp_path / "w.pt")) == repr(normed(4))


def test_compiled_or_not_makes_no_difference(tmp_path):
    own, path = saved(tmp_path)
    torch.save({"state_dict": torch.compile(own).state_dict()}, tmp_path / "w.ckpt")
    assert repr(load_shrunk(network(8), tmp_path / "w.ckpt")) == repr(own)
    module = load_shrunk(torch.compile(network(8)), path)
    assert torch.equal(module.state_dict()["_orig_mod.0.weight"], own[0].weight)


def test_no_file_and_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_shrunk(network(8), tmp_path / "none.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="holds a list, not a Lightning checkpoint"):
        load_shrunk(network(8), tmp_path / "list.ckpt")


class Foreign:
    """Something that only unpickling could bring back."""


def test_nothing_is_unpickled(tmp_path):
    _, path = saved(tmp_path, foreign=Foreign())
    with pytest.raises(ValueError, match="holds objects other than tensors, which are not unpickled"):
        load_shrunk(network(8), path)
