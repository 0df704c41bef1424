"""What is known of sharded modules; here in one process, which shares with nobody. Two are in tests/sharded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_compress.export.copying import whole_copy
from lightning_compress.mechanisms.selection import find_module, select_modules
from lightning_compress.mechanisms.sharding import (
    Ranks,
    class_name,
    is_shard,
    own_part,
    refuse_layout,
    sharded_units,
    shards_in_place,
)


class Network(nn.Module):
    def __init__(self, mesh):
        super().__init__()
        self.mesh = mesh
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)
        self.last.weight.requires_grad_(False)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


@pytest.fixture(scope="module")
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.fixture
def pair(mesh):
    """A network with shards, and one without; the former holds whole parameters, as after a validation."""
    from torch.distributed.fsdp import fully_shard

    plain = Network(None)
    sharded = Network(mesh)
    sharded.load_state_dict(plain.state_dict())
    for unit in (sharded.first, sharded):
        fully_shard(unit, mesh=mesh, reshard_after_forward=False)
    with torch.no_grad():
        sharded(torch.ones(1, 3))
    return sharded, plain


def test_messages_name_the_classes_of_the_user(pair):
    for network in pair:
        assert [class_name(part) for part in network.modules()] == ["Network", "Linear", "Linear"]
        with pytest.raises(ValueError, match="not a module of Network"):
            find_module(network, "last.norm", argument="layers")
        with pytest.raises(ValueError, match=r"'type:Linea'.* did you mean 'type:Linear'"):
            select_modules(network, ["type:Linea"], None, types=(nn.Linear,))
        with pytest.raises(ValueError, match="selects nothing: Network has no Conv2d"):
            select_modules(network, None, None, types=(nn.Conv2d,))


def test_a_module_that_holds_whole_parameters_gives_its_shards(pair):
    sharded, plain = pair
    assert not is_shard(sharded.first.weight)
    shards_in_place(sharded)
    assert is_shard(sharded.first.weight)
    part = own_part(sharded.first.weight)
    assert torch.equal(part, plain.first.weight)
    part.zero_()
    assert not sharded(torch.ones(1, 3)).isnan().any()
    shards_in_place(sharded)
    assert own_part(sharded.first.weight).count_nonzero() == 0


def test_a_whole_copy_is_as_if_nothing_had_been_sharded(pair):
    sharded, plain = pair
    kinds, attributes = [type(part) for part in sharded.modules()], [set(vars(part)) for part in sharded.modules()]
    copied = whole_copy(sharded)
    assert [type(part) for part in copied.modules()] == [Network, nn.Linear, nn.Linear]
    assert all(type(parameter) is nn.Parameter for parameter in copied.parameters())
    assert [own.requires_grad for own in copied.parameters()] == [own.requires_grad for own in plain.parameters()]
    x = torch.ones(2, 3)
    assert torch.equal(copied(x), plain(x))
    for part in copied.modules():
        marks = set(vars(part)) - set(vars(nn.Linear(1, 1)))
        assert not [name for name in marks if "fsdp" in name or "composable" in name]
        assert not any(table for name, table in vars(part).items() if name.endswith("_hooks"))
    copy.deepcopy(copied.first)
    assert [type(part) for part in sharded.modules()] == kinds
    assert [set(vars(part)) for part in sharded.modules()] == attributes
    with torch.no_grad():
        copied.first.weight.zero_()
    assert torch.equal(sharded(x), plain(x))  # one rank has all of it, and the copy still has memory of its own
    assert whole_copy(sharded, wanted=False) is None


def test_what_ranks_have_is_put_together(pair):
    sharded, _ = pair
    shards_in_place(sharded)
    ranks = Ranks([torch.ones(1), sharded.first.weight])
    values = torch.tensor([1.0, -2.0])
    assert ranks.several
    assert not Ranks([torch.ones(1)]).several
    for together in (ranks.largest(values), ranks.total(values)):
        assert torch.equal(together, values)
        assert together.data_ptr() != values.data_ptr()
    rows = torch.arange(5.0)
    assert torch.equal(ranks.rows(rows, sharded.first.weight), rows)
    assert ranks.rows(rows, torch.ones(5)) is rows


def test_plain_modules_are_passed_by(pair):
    sharded, plain = pair
    assert len(sharded_units(sharded)) == 2
    assert sharded_units(plain) == []
    refuse_layout(sharded, "Mine")
    refuse_layout(plain, "Mine")
    shards_in_place(plain)


def test_parameters_on_two_meshes_are_refused(mesh):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network = Network(mesh)
    fully_shard(network.first, mesh=mesh)
    fully_shard(network.last, mesh=init_device_mesh("cpu", (1,), mesh_dim_names=("other",)))
    with pytest.raises(ValueError, match="Mine works with parameters on one mesh, and these lie on 2"):
        refuse_layout(network, "Mine")
