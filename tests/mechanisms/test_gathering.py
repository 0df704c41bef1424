"""Views of sharded weights, in one process that has all the rows; tests/sharded has several."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_compress import _compat
from lightning_compress.mechanisms.gathering import gathered, parts_of, rows_of, sharded_as
from lightning_compress.mechanisms.masking import DenseWeight, FeedbackWeight, MaskedWeight, Masks
from lightning_compress.mechanisms.sharding import is_shard, own_part
from lightning_compress.mechanisms.standins import standing_in
from lightning_compress.mechanisms.views import WeightViews

pytestmark = pytest.mark.sample  # a process group, and FSDP2

MASK = torch.tensor([[True, False, True], [False, True, False]])
X = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 4.0]])


@pytest.fixture(scope="module")
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def network(mesh):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layer = nn.Linear(3, 2)
    return fully_shard(layer, mesh=mesh)


def learn(views, loss):
    views.sharded.learning(loss.backward)()


def test_a_layer_is_given_the_view_and_the_weight_its_gradient(mesh):
    layer = network(mesh)
    dense = layer.weight.full_tensor().detach().clone()
    views = WeightViews(layer)
    plain = layer(X).detach()
    with views.owned("example", {"weight": MaskedWeight(MASK)}):
        assert torch.equal(layer(X), plain)  # nothing is shown yet
        for _ in range(2):
            with views.presented():
                assert views.active
                learn(views, layer(X).square().sum())
        gradient = layer.weight.grad.full_tensor().clone()
        assert not views.active
        with views.presented():
            masked = layer(X)
        assert torch.equal(masked, nn.functional.linear(X, dense * MASK, layer.bias.full_tensor()))
    reference = (dense * MASK).requires_grad_()
    nn.functional.linear(X, reference, layer.bias.full_tensor().detach()).square().sum().backward()
    assert torch.allclose(gradient, 2 * MASK * reference.grad, atol=1e-6)
    assert torch.equal(layer(X), plain)
    layer.reshard()
    assert torch.equal(layer.weight.full_tensor(), dense)
    assert vars(_compat.shard(layer.weight)) == {}


def test_a_gradient_that_did_not_come_through_the_view_is_an_error(mesh):
    layer = network(mesh)
    views = WeightViews(layer)
    with views.owned("example", {"weight": FeedbackWeight(MASK)}):
        views.show()
        arrives = partial(setattr, layer.weight, "grad", sharded_as(torch.ones(2, 3), layer.weight))
        with pytest.raises(
            RuntimeError, match="'weight' has a gradient, and was never gathered through the view of 'exa"
        ):
            views.sharded.learning(arrives)()


def test_a_first_step_whose_backward_pass_went_past_the_views_is_an_error(mesh):
    layer = network(mesh)
    views = WeightViews(layer)
    with views.owned("example", {"weight": MaskedWeight(MASK)}), views.watched("example") as usage:
        with views.presented():
            layer(X).square().sum().backward()
        with pytest.raises(RuntimeError, match=r"did not call the module's backward\(\), .* gradients of 'weight'"):
            usage()


def test_a_backward_pass_of_another_before_counts_for_none_who_begins_later(mesh):
    layer = network(mesh)
    views = WeightViews(layer)
    bias = MaskedWeight(torch.tensor([True, False]))
    with views.owned("early", {"bias": bias}):
        with views.presented():
            learn(views, layer(X).square().sum())
        with views.owned("late", {"weight": MaskedWeight(MASK)}):
            with views.presented():
                layer(X).square().sum().backward()
            views.sharded.check_learnt("early")
            with pytest.raises(RuntimeError, match=r"first step of 'late' did not call .* gradients of 'weight' are"):
                views.sharded.check_learnt("late")
            with views.presented():
                learn(views, layer(X).square().sum())
            views.sharded.check_learnt("late")


def test_a_penalty_on_the_parameter_itself_does_not_go_through_the_view(mesh):
    layer = network(mesh)
    views = WeightViews(layer)
    with (
        views.owned("example", {"weight": MaskedWeight(MASK)}),
        views.watched("example") as usage,
    ):
        with views.presented():
            penalty = layer.weight.full_tensor().sum() + layer.weight.to_local().sum()
            learn(views, layer(X).sum() + penalty)
        assert torch.equal(layer.weight.grad.full_tensor(), MASK * X.sum(dim=0) + 2)
        assert usage() == ([], ["weight"])
        layer.weight.grad = None
        layer.weight.full_tensor().sum().backward()  # nothing is presented now
        assert layer.weight.grad.full_tensor().tolist() == [[1.0] * 3] * 2
        layer.weight.grad.zero_()
        views.show()
        learn(views, layer.weight.full_tensor().sum())  # in a step that does not use the weight
        assert layer.weight.grad.full_tensor().tolist() == [[1.0] * 3] * 2
    assert not layer.weight._backward_hooks


def test_a_weight_that_learns_from_a_later_step_on_gets_a_penalty_whole(mesh):
    layer = network(mesh)
    layer.weight.requires_grad_(False)
    views = WeightViews(layer)
    with views.owned("example", {"weight": MaskedWeight(MASK)}):
        for _ in range(2):
            with views.presented():
                penalty = layer.weight.full_tensor().sum()
                learn(views, layer(X).sum() + penalty)
            layer.weight.requires_grad_(True)
        assert torch.equal(layer.weight.grad.full_tensor(), MASK * X.sum(dim=0) + 1)


@pytest.mark.parametrize("learns", [True, False])
def test_a_weight_that_is_frozen_or_freed_within_a_step_is_an_error(mesh, learns):
    layer = network(mesh)
    layer.weight.requires_grad_(learns)
    views = WeightViews(layer)
    with views.owned("example", {"weight": MaskedWeight(MASK)}):
        views.show()
        layer.weight.requires_grad_(not learns)
        with pytest.raises(RuntimeError, match="requires_grad of the weight 'weight' was changed within a step"):
            learn(views, layer(X).sum())


def test_a_gradient_of_zero_is_left_by_a_step_that_did_not_use_the_weight(mesh):
    layer = network(mesh)
    views = WeightViews(layer)
    with views.owned("example", {"weight": FeedbackWeight(MASK)}):
        with views.presented():
            learn(views, layer(X).square().sum())
        layer.zero_grad(set_to_none=False)
        views.show()
        learn(views, layer.bias.full_tensor().sum())
        assert layer.weight.grad.full_tensor().tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("replace", ["assign", "data"])
def test_a_replaced_weight_is_an_error(mesh, replace):
    layer = network(mesh)
    views = WeightViews(layer)
    with views.owned("example", {"weight": MaskedWeight(MASK)}):
        if replace == "assign":
            layer.load_state_dict(layer.state_dict(), assign=True)
        else:
            layer.double()
        with pytest.raises(RuntimeError, match="'weight', which 'example' presents, was replaced by another since"):
            views.show()


def test_two_owners_of_one_weight_are_an_error(mesh):
    layer = network(mesh)
    views = WeightViews(layer)
    with (
        views.owned("first", {"weight": MaskedWeight(MASK)}),
        pytest.raises(ValueError, match="'first' and 'second' both present the weight 'weight'"),
        views.owned("second", {"weight": MaskedWeight(MASK)}),
    ):
        pass


def test_a_pass_with_a_backward_pass_of_its_own(mesh):
    layer = network(mesh)
    views, masked = WeightViews(layer), MaskedWeight(MASK)
    others = {"weight": DenseWeight(masked)}
    dense = layer.weight.full_tensor().detach().clone()
    bias = layer.bias.full_tensor().detach()
    with views.owned("example", {"weight": masked}), views.owned_for_another_pass("example", others) as another:
        views.show()
        first = layer(X).square().sum()
        with another():
            second = layer(X).pow(4).sum()
        views.sharded.learn_apart(second, others)
        assert layer.weight.grad is None  # it waits
        learn(views, first)
        views.drop()
    kept, lost = (dense * MASK).requires_grad_(), dense.clone().requires_grad_()
    nn.functional.linear(X, kept, bias).square().sum().backward()
    nn.functional.linear(X, lost, bias).pow(4).sum().backward()
    assert torch.allclose(layer.weight.grad.full_tensor(), torch.where(MASK, kept.grad, lost.grad), rtol=1e-5)
    assert torch.allclose(layer.bias.grad.full_tensor(), 2 * nn.functional.linear(X, kept, bias).sum(dim=0), rtol=1e-5)


def test_a_stand_in_is_read_before_what_is_gathered(mesh):
    layer = network(mesh)
    layer(X)
    own = nn.Parameter(torch.zeros(2, 3))
    layer.reshard()
    with standing_in(layer, {id(layer.weight): own}):
        assert torch.equal(layer(X), layer.bias.expand(2, 2))
    assert "weight" not in vars(layer)
    layer.reshard()
    assert is_shard(layer.weight)


def test_tensors_are_split_and_joined(mesh):
    weight = network(mesh).weight
    rows = own_part(weight)
    assert torch.equal(rows_of(MASK, weight), MASK)
    mask = sharded_as(MASK, weight)
    assert is_shard(mask)
    assert mask.shape == MASK.shape
    assert torch.equal(rows_of(mask, weight), MASK)
    found = gathered({"masks": {"weight": mask}, "list": [mask, 1], "begun": True})
    assert torch.equal(found["masks"]["weight"], MASK)
    assert (found["list"][1], found["begun"]) == (1, True)
    parts = parts_of([weight])
    assert (parts.rank, parts.ranks, parts.totals([3, 4])) == (0, 1, [3, 4])
    assert parts_of([rows]) is None


def test_masks_of_shards_are_saved_as_shards_and_loaded_whole(mesh):
    weights = {"weight": network(mesh).weight}
    masks = Masks(weights)
    masks.replace([MASK])
    assert (masks.zeros, masks.total, masks.sparsity) == (3, 6, 0.5)
    assert torch.equal(masks.state()["weight"].full_tensor(), MASK)
    again = Masks(weights)
    again.load({"weight": MASK})
    assert torch.equal(again.views["weight"].mask, MASK)
    value = masks.masked("weight", weights["weight"].detach())
    assert torch.equal(value.full_tensor(), weights["weight"].full_tensor() * MASK)


def test_what_cannot_be_presented_is_named(mesh, monkeypatch):
    layer = nn.Sequential(network(mesh), nn.Linear(2, 1))
    views = WeightViews(layer)
    with (
        pytest.raises(ValueError, match=r"'1\.weight' is whole in each process, .* what 'some' presents .*=\['1'\]"),
        views.owned("some", {"1.weight": MaskedWeight(MASK)}),
    ):
        pass
    monkeypatch.setattr(_compat, "why_not_gathered_as", lambda known: "is elsewhere")
    with (
        pytest.raises(ValueError, match=r"the weight '0\.weight' is elsewhere, and others are sharded"),
        views.owned("some", {"0.weight": MaskedWeight(MASK)}),
    ):
        pass
    assert views.owners == []


def test_two_who_present_the_same_weight_are_named(mesh):
    layer = network(mesh)
    views = WeightViews(layer)
    with (
        views.owned("one", {"weight": MaskedWeight(MASK)}),
        pytest.raises(ValueError, match="'one' and 'another' both present the weight 'weight'"),
        views.owned("another", {"weight": MaskedWeight(MASK)}),
    ):
        pass


def test_why_a_parameter_cannot_be_gathered_as_another():
    here, fewer = SimpleNamespace(mesh="all"), SimpleNamespace(mesh="some")
    own = SimpleNamespace(fsdp_pre_all_gather=None)
    usual = {"_sharded_local_tensor": None, "offload_to_cpu": False, "post_forward_mesh_info": None, "mesh_info": here}
    why = lambda **other: _compat.why_not_gathered_as(SimpleNamespace(**{**usual, **other}))  # noqa: E731
    assert (why(), why(post_forward_mesh_info=here)) == (None, None)
    assert "in a way of its own" in why(_sharded_local_tensor=own)
    assert "offload_policy=" in why(offload_to_cpu=True)
    assert "reshard_after_forward= a number" in why(post_forward_mesh_info=fewer)
