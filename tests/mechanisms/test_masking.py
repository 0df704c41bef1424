"""Masked weights against multiplication in NumPy; the masks of a network: what they count, save and refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.functional.masks import Filters
from lightning_compress.mechanisms.masking import DenseWeight, FeedbackWeight, MaskedWeight, Masks

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_of(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5


def product(mask, tensor):
    """The mask times a tensor, in NumPy; its float64 holds each bfloat16, and so does the result."""
    return torch.from_numpy(np.where(mask.numpy(), tensor.double().numpy(), 0.0)).to(tensor.dtype)


# --- one weight ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 3, 3), (7,), (), (0, 4)])
def test_value_and_gradient_are_products_with_the_mask(dtype, shape):
    mask, weight, gradient = mask_of(*shape), drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, seed=2)
    view = MaskedWeight(mask)
    assert not view.plain
    for found, expected in (
        (view.value(weight), product(mask, weight)),
        (view.gradient(gradient), product(mask, gradient)),
    ):
        assert found.dtype == dtype
        assert torch.equal(found, expected)


def test_one_view_serves_weights_and_gradients_of_different_types():
    """As under autocast, or where a module is cast after the fit began."""
    view, mask = MaskedWeight(mask_of(4, 3)), mask_of(4, 3)
    for dtype in (*DTYPES, torch.float32):
        for masked, tensor in ((view.value, drawn(4, 3, dtype=dtype)), (view.gradient, drawn(4, 3).double())):
            assert masked(tensor).dtype == tensor.dtype
            assert torch.equal(masked(tensor), product(mask, tensor))


def test_another_mask_counts_from_the_next_value_on():
    weight, view = drawn(4, 3), MaskedWeight(torch.ones(4, 3, dtype=torch.bool))
    assert torch.equal(view.value(weight), weight)
    view.mask = mask_of(4, 3)
    assert torch.equal(view.value(weight), product(mask_of(4, 3), weight))
    assert torch.equal(view.gradient(weight), product(mask_of(4, 3), weight))
    view.mask = ~mask_of(4, 3)
    assert torch.equal(view.value(weight), product(~mask_of(4, 3), weight))


def test_masks_that_are_not_contiguous():
    mask = mask_of(3, 4).t()
    assert torch.equal(MaskedWeight(mask).value(drawn(4, 3)), product(mask, drawn(4, 3)))


def test_the_result_is_written_where_it_is_asked_for():
    weight, out = drawn(4, 3), torch.full((4, 3), math.nan)
    assert MaskedWeight(mask_of(4, 3)).value(weight, out) is out
    assert torch.equal(out, product(mask_of(4, 3), weight))
    assert torch.equal(weight, drawn(4, 3))


@pytest.mark.parametrize("had_one", [False, True])
def test_without_a_mask_the_weight_is_plain_and_has_no_masked_value(had_one):
    view = MaskedWeight(mask_of(2, 2) if had_one else None)
    view.mask = None
    assert view.plain
    for masked in (view.value, view.gradient):
        with pytest.raises(RuntimeError, match="there is no mask yet"):
            masked(drawn(2, 2))


def test_retired_memory_is_made_again_when_it_is_needed():
    view = MaskedWeight(mask_of(4, 3))

    def numbers():
        return [value for value in vars(view).values() if isinstance(value, torch.Tensor) and value.is_floating_point()]

    view.value(drawn(4, 3))
    assert [value.shape for value in numbers()] == [(4, 3)]
    view.retire()
    assert numbers() == []
    assert torch.equal(view.mask, mask_of(4, 3))
    assert torch.equal(view.value(drawn(4, 3)), product(mask_of(4, 3), drawn(4, 3)))


def test_what_was_made_in_inference_mode_can_be_trained_with():
    view, weight = MaskedWeight(mask_of(4, 3)), drawn(4, 3).requires_grad_()
    with torch.inference_mode():
        view.value(weight)
    view.value(weight).sum().backward()
    assert torch.equal(weight.grad, mask_of(4, 3).float())


# --- all weights ---


def some_masks():
    """Three weights of 200, 6 and 1 entries."""
    return Masks({name: nn.Parameter(drawn(*shape)) for name, shape in {"a": (20, 10), "b": (2, 3), "c": (1,)}.items()})


def keeping(*counts):
    """Masks of the three weights that keep so many entries of each, the first ones."""
    sizes = {"a": (20, 10), "b": (2, 3), "c": (1,)}.values()
    return [(torch.arange(math.prod(size)) < count).reshape(size) for size, count in zip(sizes, counts, strict=True)]


def test_at_first_all_is_kept():
    masks = some_masks()
    assert (masks.total, masks.counts, masks.zeros, masks.sparsity) == (207, [0, 0, 0], 0, 0.0)
    assert [mask.tolist() for mask in masks.current()] == [mask.tolist() for mask in keeping(200, 6, 1)]
    assert masks.state() == {}
    value = drawn(2, 3)
    assert masks.masked("b", value) is value


def test_replacing_counts_zeros_and_returns_the_share_that_changed():
    masks = some_masks()
    assert masks.replace(keeping(150, 2, 1)) == 54 / 207
    assert (masks.counts, masks.zeros, masks.sparsity) == ([50, 4, 0], 54, 54 / 207)
    assert masks.replace([~keeping(100, 6, 1)[0], *keeping(0, 3, 1)[1:]]) == (150 + 1) / 207
    assert (masks.counts, masks.sparsity) == ([100, 3, 0], 103 / 207)
    assert masks.replace(masks.current()) == 0.0
    assert [int(mask.sum()) for mask in masks.current()] == [100, 3, 1]
    assert masks.views["b"].mask is masks.current()[1]


def test_each_tensor_keeps_one_percent_or_one_entry():
    masks = some_masks()
    assert masks.limits == [198, 5, 0]
    for counts, expected in (((3, 1, 1), ["b"]), ((2, 2, 1), ["a"]), ((2, 1, 1), ["a", "b"]), ((200, 6, 1), [])):
        masks.replace(keeping(*counts))
        assert masks.at_floor() == expected  # never c, which has nothing to lose


def test_as_many_masks_as_weights():
    masks = some_masks()
    with pytest.raises(ValueError, match="before and after must have the same shapes"):
        masks.replace(keeping(10, 2, 1)[:2])
    assert masks.counts == [0, 0, 0]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_masked_is_zero_whatever_it_was(wrong):
    """A product would make NaN of it."""
    masks = some_masks()
    masks.replace(keeping(200, 4, 1))
    value = torch.tensor([[1.0, 2.0, 3.0], [4.0, wrong, wrong]])
    assert masks.masked("b", value).tolist() == [[1, 2, 3], [4, 0, 0]]
    assert value.isfinite().sum() == 4  # a new tensor
    assert masks.masked("b", value.bfloat16()).dtype == torch.bfloat16
    assert masks.masked("b", torch.full((2, 3), math.nan)).isnan().sum() == 4  # what is kept stays as it is


def test_retiring_frees_every_view():
    class Counted(MaskedWeight):
        retired = 0

        def retire(self):
            self.retired += 1

    masks = Masks({"a": nn.Parameter(drawn(2)), "b": nn.Parameter(drawn(2))}, Counted)
    masks.retire()
    assert [view.retired for view in masks.views.values()] == [1, 1]


def test_no_weights_are_no_sparsity():
    assert (Masks({}).sparsity, Masks({}).total) == (0.0, 0)


# --- what is saved ---


def test_state_is_taken_back_in_any_order(tmp_path):
    first, second = some_masks(), some_masks()
    first.replace(keeping(150, 2, 1))
    torch.save(first.state(), tmp_path / "masks")
    state = torch.load(tmp_path / "masks", weights_only=True)
    second.load(dict(reversed(state.items())))
    assert second.counts == [50, 4, 0]
    assert all(torch.equal(mask, own) for mask, own in zip(second.current(), keeping(150, 2, 1), strict=True))
    assert torch.equal(second.views["a"].value(drawn(20, 10)), product(keeping(150, 2, 1)[0], drawn(20, 10)))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: state.pop("b"), "'b' has none"),
        (lambda state: state.update(d=mask_of(2)), "'d' is not selected any more"),
        (lambda state: state.update(b=mask_of(3, 2)), "'b' has shape (3, 2) there and (2, 3) here"),
        (
            lambda state: (state.pop("a"), state.update(b=mask_of(6), d=mask_of(2))),
            "'a' has none; 'd' is not selected any more; 'b' has shape (6,) there and (2, 3) here",
        ),
        (lambda state: state.clear(), "'a' has none; 'b' has none; 'c' has none"),
        (
            lambda state: (state.clear(), state.update({name: mask_of(1) for name in "defg"})),
            "'a' has none; 'b' has none; 'c' has none; 'd' is not selected any more; 'e' is not selected any more",
        ),
    ],
)
def test_masks_of_other_weights_are_refused_and_named_at_most_five(change, problem):
    masks = some_masks()
    masks.replace(keeping(150, 2, 1))
    state = masks.state()
    change(state)
    with pytest.raises(ValueError) as caught:
        masks.load(state)
    advice = "Select the same with layers= and exclude=, or begin a new training"
    assert str(caught.value) == f"the masks of the checkpoint are of other weights: {problem}. {advice}"
    assert masks.counts == [50, 4, 0]


# --- weights that learn though they are masked ---

SHAPES = [(3, 5), (2, 3, 3, 3), (7,), ()]


def living(gradient, mask, groups):
    """The gradient without that of filters that are masked completely, filter by filter, in NumPy."""
    gradient, mask = gradient.double().numpy().copy(), mask.numpy()
    if groups == 0:
        for filter_ in range(len(mask)):
            if not mask[filter_].any():
                gradient[filter_] = 0.0
        return torch.from_numpy(gradient)
    inputs = len(mask) // groups
    for group in range(groups):
        rows = slice(group * inputs, (group + 1) * inputs)
        for column in range(mask.shape[1]):
            if not mask[rows, column].any():
                gradient[rows, column] = 0.0
    return torch.from_numpy(gradient)


def with_dead_filters():
    """A mask of (4, 3, 2, 2) of which the second filter is dead, and in groups of inputs some others."""
    mask = torch.zeros(4, 3, 2, 2, dtype=torch.bool)
    mask[0, 0, 1, 1] = mask[2, 2, 0, 1] = mask[3, 2] = True
    return mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_feedback_is_the_masked_weight_with_the_whole_gradient(dtype, shape):
    mask, weight, gradient = mask_of(*shape), drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, seed=2)
    view = FeedbackWeight(mask)
    assert (view.plain, view.copies) == (False, True)
    assert torch.equal(view.value(weight), product(mask, weight))
    assert torch.equal(view.gradient(gradient), gradient)
    assert torch.equal(view.lost(gradient), product(~mask, gradient))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [0, 1, 2, 4])
def test_dead_filters_get_no_gradient(dtype, groups):
    mask, gradient = with_dead_filters(), drawn(4, 3, 2, 2, dtype=dtype)
    view = FeedbackWeight(mask, Filters(groups))
    found = view.gradient(gradient)
    assert found.dtype == dtype
    assert torch.equal(found, living(gradient, mask, groups).to(dtype))
    assert 0 < (found == 0).sum() < found.numel()
    assert torch.equal(view.value(gradient), product(mask, gradient))


def test_a_filter_learns_again_when_a_weight_of_it_returns():
    gradient, mask = drawn(4, 3, 2, 2), with_dead_filters()
    view = FeedbackWeight(filters=Filters())
    for changed in (mask, ~mask, mask):
        view.mask = changed
        assert torch.equal(view.gradient(gradient).double(), living(gradient, changed, 0))
    returned = mask.clone()
    returned[1, 0, 0, 0] = True
    view.mask = returned
    assert view.gradient(gradient) is gradient
    view.mask = torch.zeros_like(mask)
    assert view.gradient(gradient).eq(0).all()


@pytest.mark.parametrize("filters", [None, Filters(), Filters(2)])
def test_feedback_without_a_mask_is_plain(filters):
    gradient, view = drawn(4, 3), FeedbackWeight(with_dead_filters(), filters)
    view.mask = None
    assert (view.plain, view.copies) == (True, False)
    assert torch.equal(view.gradient(gradient), gradient)
    with pytest.raises(RuntimeError, match="there is no mask yet"):
        view.value(gradient)


def test_retired_feedback_keeps_its_mask_and_its_dead_filters():
    mask, gradient = with_dead_filters(), drawn(4, 3, 2, 2)
    view = FeedbackWeight(mask, Filters())
    view.value(gradient)
    view.retire()
    assert not [value for value in vars(view).values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    assert torch.equal(view.mask, mask)
    assert torch.equal(view.value(gradient), product(mask, gradient))
    assert torch.equal(view.gradient(gradient).double(), living(gradient, mask, 0))


# --- the dense side ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [MaskedWeight, FeedbackWeight])
def test_the_dense_weight_learns_what_the_mask_takes(kind, dtype, shape):
    mask, gradient = mask_of(*shape), drawn(*shape, dtype=dtype)
    masked = kind(mask)
    found = DenseWeight(masked).gradient(gradient)
    assert found.dtype == dtype
    assert torch.equal(found, product(~mask, gradient))
    assert torch.equal(MaskedWeight(mask).gradient(gradient) + found, gradient)  # not one bit of it is lost


@pytest.mark.parametrize("out", [None, torch.full((4, 3), math.nan)])
def test_the_dense_value_is_the_weight_itself(out):
    weight, view = drawn(4, 3), DenseWeight(MaskedWeight(mask_of(4, 3)))
    assert (view.plain, view.copies) == (False, False)
    assert view.value(weight, out).data_ptr() == weight.data_ptr()
    assert torch.equal(view.value(weight, out), drawn(4, 3))
    assert out is None or out.isnan().all()


def test_before_there_is_a_mask_the_dense_side_learns_nothing():
    masked, gradient = MaskedWeight(), drawn(4, 3)
    view = DenseWeight(masked)
    assert view.gradient(gradient).eq(0).all()
    assert (view.plain, view.copies) == (False, False)
    for mask in (mask_of(4, 3), ~mask_of(4, 3)):  # it follows the other view
        masked.mask = mask
        assert torch.equal(view.gradient(gradient), product(~mask, gradient))
    masked.mask = None
    assert view.gradient(gradient).eq(0).all()


def test_what_is_lost_may_be_of_another_type_than_the_weight():
    view, mask = MaskedWeight(mask_of(4, 3)), mask_of(4, 3)
    for dtype in (*DTYPES, torch.float32):
        view.value(drawn(4, 3))
        gradient = drawn(4, 3, dtype=dtype)
        assert view.lost(gradient).dtype == dtype
        assert torch.equal(view.lost(gradient), product(~mask, gradient))
    with pytest.raises(RuntimeError, match="there is no mask yet"):
        MaskedWeight().lost(drawn(4, 3))


def test_a_view_of_its_own_for_each_weight():
    asked = []

    def make(name):
        asked.append(name)
        return MaskedWeight() if name == "a" else FeedbackWeight(filters=Filters())

    masks = Masks({name: nn.Parameter(drawn(2, 3)) for name in "ab"}, make)
    assert asked == ["a", "b"]
    assert [type(view) for view in masks.views.values()] == [MaskedWeight, FeedbackWeight]
    mask = torch.tensor([[True, False, True], [False, False, False]])
    masks.replace([mask, mask])
    gradients = {name: view.gradient(torch.ones(2, 3)).tolist() for name, view in masks.views.items()}
    assert gradients == {"a": [[1, 0, 1], [0, 0, 0]], "b": [[1, 1, 1], [0, 0, 0]]}
    assert torch.equal(masks.masked("b", torch.ones(2, 3)), mask.float())
