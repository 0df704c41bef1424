"""Quantisers against formulas in NumPy, ONNX Runtime, ONNX's reference, torch's own, and hand-worked numbers."""

from __future__ import annotations

import functools
import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from lightning_compress.functional import (
    fake_quantize,
    integer_limits,
    learned_step_quantize,
    mse_grid,
    nearest_grid_point,
    quantization_grid,
    quantize,
    range_grid,
)
from lightning_compress.functional._steps import largest_magnitude
from lightning_compress.functional.quantizers import along, check_bits

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
HALVES = DTYPES[2:]
SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 0, 3), (2, 3, 2, 2)]
LAYOUTS = ["contiguous", "reversed", "strided", "channels_last"]
PAIRS = list(zip(DTYPES, LAYOUTS, strict=True))
BITS = range(2, 9)
TINY = float(np.finfo(np.float32).tiny)
EDGES = [0.0, -0.0, 0.25, -0.25, 0.75, 1.25, 127.5, -128.5, 254.5, 255.5, 3e38, -3e38, TINY, -TINY / 2, 1e-45]


def sample(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def float32s(lowest, highest):
    """Numbers that float32 has."""
    return st.floats(float(np.float32(lowest)), float(np.float32(highest)), width=32)


def laid_out(tensor, layout):
    """The same values in another order of memory."""
    if layout == "reversed":
        order = list(reversed(range(tensor.ndim)))
        return tensor.permute(order).contiguous().permute(order)
    if layout == "strided":
        return torch.stack([tensor, -tensor - 1], dim=-1)[..., 0]
    if layout == "channels_last" and tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def wide(tensor):
    """In the type that it is rounded in, for NumPy."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).numpy()


def tensor_of(values):
    """Of an array, or of a scalar, which NumPy makes of arrays without dimensions."""
    return torch.from_numpy(np.asarray(values))


def beside(values, x, axis):
    """One value, or one for each entry of an axis, as an array that broadcasts against ``x``."""
    values = np.asarray(values)
    return values if values.ndim == 0 else values.reshape([-1 if dim == axis % x.ndim else 1 for dim in range(x.ndim)])


def unclamped(x, scale, zero_point, axis):
    """``round(x / scale) + zero_point``, the division in the type of ``x``, the sum in float64."""
    with np.errstate(over="ignore"):
        ratio = wide(x) / beside(scale, x, axis).astype(wide(x).dtype)
    return np.rint(ratio).astype(np.float64) + beside(zero_point, x, axis)


def values_of(integers, x, scale, zero_point, axis):
    """``(integers - zero_point) * scale`` in the type of ``x``."""
    relative = (integers - beside(zero_point, x, axis)).astype(wide(x).dtype)
    return tensor_of(relative * beside(scale, x, axis).astype(wide(x).dtype)).to(x.dtype)


def gradient_of(function, *tensors, upstream=None):
    """The output, and the gradients of tensors."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    output.backward(torch.ones_like(output) if upstream is None else upstream)
    return output.detach(), *[leaf.grad for leaf in leaves]


def equal(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found, expected), (found, expected)


@st.composite
def tensors(draw, dtypes=DTYPES, shapes=SHAPES):
    """Ties, limits, huge and tiny values and what else there is, in every type and layout."""
    dtype, shape = draw(st.sampled_from(dtypes)), draw(st.sampled_from(shapes))
    pool = st.one_of(st.sampled_from(EDGES), float32s(-300, 300), float32s(-1e38, 1e38))
    values = draw(st.lists(pool, min_size=math.prod(shape), max_size=math.prod(shape)))
    largest = torch.finfo(dtype).max
    tensor = torch.tensor(values, dtype=torch.float64).clamp(-largest, largest).to(dtype).reshape(shape)
    return laid_out(tensor, draw(st.sampled_from(LAYOUTS)))


scales = st.one_of(st.sampled_from([1.0, 0.5, 0.1, 1 / 3, 1e-30, 1e30]), float32s(TINY, 1e35))


@st.composite
def quantisations(draw, x=None, limits=None):
    """Arguments of ``quantize`` and ``fake_quantize``: numbers, tensors, or one for each entry of an axis."""
    x = draw(tensors()) if x is None else x
    lowest, highest = limits or draw(st.sampled_from([(0, 3), (0, 255), (-128, 127), (-127, 127), (-2, 1), (-7, 7)]))
    axis = draw(st.one_of(st.none(), st.integers(-x.ndim, x.ndim - 1))) if x.ndim else None
    zero_points = st.integers(lowest, highest)
    if axis is None:
        scale, zero_point = draw(scales), draw(zero_points)
        tensor = draw(st.booleans())
        return x, torch.tensor(scale) if tensor else scale, zero_point, lowest, highest, None
    size = x.shape[axis]
    scale = torch.tensor(draw(st.lists(scales, min_size=size, max_size=size)))
    if draw(st.booleans()):
        return x, scale, draw(zero_points), lowest, highest, axis
    zero_point = torch.tensor(draw(st.lists(zero_points, min_size=size, max_size=size)), dtype=torch.int32)
    return x, scale, zero_point, lowest, highest, axis


# --- limits of integers ---


def test_integer_limits():
    assert [integer_limits(bits) for bits in BITS] == [(-n, n) for n in (1, 3, 7, 15, 31, 63, 127)]
    assert [integer_limits(bits, signed=False) for bits in BITS] == [(0, n) for n in (3, 7, 15, 31, 63, 127, 255)]
    assert [check_bits(bits) for bits in BITS] == list(BITS)


def test_along():
    values, x = torch.arange(3.0), torch.zeros(2, 3, 4)
    assert [along(values, x, axis).shape for axis in (1, -2)] == [(1, 3, 1)] * 2
    assert along(values, x, 1).data_ptr() == values.data_ptr()
    assert along(torch.tensor(2.0), x, 1).shape == ()
    assert along(values, x, None) is values


# --- symmetric grids ---


def test_grid_hand_worked():
    weight = torch.tensor([0.70, 0.33, -0.12, 0.05, -0.70])
    step = quantization_grid(weight, bits=4)
    assert step.item() == pytest.approx(0.1, rel=1e-6)
    point = nearest_grid_point(weight, step, bits=4)
    assert (weight - point).abs().tolist() == pytest.approx([0, 0.03, 0.02, 0.05, 0], abs=1e-7)
    assert point[:3].tolist() == pytest.approx([0.7, 0.3, -0.1], abs=1e-7)
    by_row = torch.tensor([[1.0, -3.0], [0.0, 0.5]])
    assert quantization_grid(by_row, 3, axis=0).tolist() == pytest.approx([1.0, 0.5 / 3])
    assert quantization_grid(by_row, 3, axis=1).tolist() == pytest.approx([1 / 3, 1.0])


def test_nearest_point_ties_to_even_and_clips():
    weight = torch.tensor([0.5, 1.5, -0.5, -1.5, 2.5, 3.5, -3.5, -9.0, 3e38])
    assert nearest_grid_point(weight, torch.tensor(1.0), 3).tolist() == [0, 2, 0, -2, 2, 3, -3, -3, 3]


@settings(max_examples=60, deadline=None)
@given(weight=tensors(shapes=[(), (1,), (7,), (3, 5), (2, 3, 2, 2)]), bits=st.sampled_from(BITS))
def test_grid_and_nearest_point_equal_the_formula(weight, bits):
    _, highest = integer_limits(bits)
    step = quantization_grid(weight, bits)
    expected = np.abs(wide(weight)).max() / wide(weight).dtype.type(highest)
    expected = expected if expected >= np.finfo(wide(weight).dtype).tiny else wide(weight).dtype.type(1)
    equal(step, tensor_of(expected))
    integers = np.clip(np.rint(wide(weight) / expected), -highest, highest)
    equal(nearest_grid_point(weight, step, bits), tensor_of(integers * expected).to(weight.dtype))


@pytest.mark.parametrize("function", [quantization_grid, mse_grid])
@pytest.mark.parametrize(("dtype", "layout"), PAIRS)
def test_grids_per_channel_are_those_of_the_slices(function, layout, dtype):
    weight = laid_out(sample(2, 3, 4, 2, dtype=dtype), layout)
    for axis in (0, 2, -1, -3):
        steps = function(weight, 4, axis=axis)
        slices = weight.unbind(axis)
        equal(steps, torch.stack([function(part, 4) for part in slices]))
        points = [nearest_grid_point(part, step, 4) for part, step in zip(slices, steps, strict=True)]
        equal(nearest_grid_point(weight, steps, 4, axis=axis), torch.stack(points, dim=axis))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_a_second_rounding_changes_nothing(dtype, bits):
    for seed in range(3):
        weight = sample(10, 30, seed=seed, dtype=dtype)
        for function, axis in ((quantization_grid, None), (quantization_grid, 0), (mse_grid, 1)):
            step = function(weight, bits, axis=axis)
            once = nearest_grid_point(weight, step, bits, axis=axis)
            equal(nearest_grid_point(once, step, bits, axis=axis), once)
            if function is quantization_grid and dtype not in HALVES:  # nor is the grid of what was rounded another
                equal(quantization_grid(once, bits, axis=axis), step)


@pytest.mark.parametrize("function", [quantization_grid, mse_grid])
def test_grids_of_edge_tensors(function):
    edges = torch.tensor([[0.0, -0.0], [5.0, 5.0], [3e38, -3e38], [1e-45, -TINY / 2], [-2.0, 1.0], [TINY, 7 * TINY]])
    expected = [1.0, 5 / 7, 3e38 / 7, 1.0, 2 / 7, TINY]
    found = function(edges, 4, axis=0)
    assert found[:4].tolist() + found[5:].tolist() == pytest.approx(expected[:4] + expected[5:], rel=1e-6)
    assert nearest_grid_point(edges, found, 4, axis=0).isfinite().all()
    assert nearest_grid_point(edges, found, 4, axis=0)[:4].tolist() == [
        [0.0, 0.0],
        pytest.approx([5.0, 5.0]),
        pytest.approx([3e38, -3e38]),
        [0.0, 0.0],
    ]
    assert function(torch.tensor(-0.7), 4).item() == pytest.approx(0.1)
    wider = function(torch.tensor([1e-42, 1.4e-41], dtype=torch.float64), 4)  # normal numbers of float64
    assert wider.dtype == torch.float64
    assert wider.item() == pytest.approx(2e-42, rel=0.5)


def test_rows_of_which_there_are_none_have_no_magnitude():
    assert largest_magnitude(torch.zeros(0, 15), 0).shape == (0,)
    assert largest_magnitude(torch.tensor([3.0, -4.0]), 0).tolist() == [3.0, 4.0]


# --- the grid of least squares ---


def brute_force(weight, bits):
    """The 100 steps, as float32 or float64 has them, and in float64 the squared error of each."""
    largest, (lowest, highest) = wide(quantization_grid(weight, bits)), integer_limits(bits)
    steps = [largest * largest.dtype.type(tried / 100) for tried in range(1, 101)]
    errors = []
    for step in steps:
        points = np.clip(np.rint(wide(weight) / step), lowest, highest).astype(np.float64) * step
        errors.append(((points - wide(weight)) ** 2).sum())
    return steps, np.array(errors)


def test_mse_grid_hand_worked():
    weight = torch.tensor([1.0, *[0.33] * 40])
    # step s below 0.66: (1 - s)^2 + 40 (0.33 - s)^2, least at s = 14.2 / 41 = 0.346
    assert mse_grid(weight, bits=2).item() == pytest.approx(0.35)
    assert mse_grid(torch.stack([weight, weight * 2]), bits=2, axis=0).tolist() == pytest.approx([0.35, 0.70])
    equal(mse_grid(torch.tensor([1.0, *[0.01] * 20_000]), bits=2), torch.tensor(0.01))  # the smallest of the fractions


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    size=st.sampled_from([1, 2, 5, 300]),
    power=st.sampled_from([1, 3, 5]),  # of a normal variable: heavier and heavier tails
    unit=st.sampled_from([1.0, 1e-3, 50.0]),
)
def test_mse_grid_equals_brute_force(bits, dtype, seed, size, power, unit):
    weight = (sample(size, seed=seed, dtype=torch.float64) ** power * unit).clamp(-6e4, 6e4).to(dtype)
    steps, errors = brute_force(weight, bits)
    found = wide(mse_grid(weight, bits))
    error = errors[steps.index(found)]  # one of the 100
    assert error <= errors.min() * (1 + 1e-5)  # the library sums in float32
    assert error <= errors[-1] * (1 + 1e-5)


def test_mse_grid_of_a_layer_equals_brute_force():
    weight = sample(30, 12, 3, 3)
    for bits in BITS:
        found = mse_grid(weight, bits, axis=1)
        for column, step in zip(weight.unbind(1), wide(found), strict=True):
            steps, errors = brute_force(column, bits)
            assert errors[steps.index(step)] <= errors.min() * (1 + 1e-5)
        assert (found <= quantization_grid(weight, bits, axis=1)).all()
    assert (found / quantization_grid(weight, 8, axis=1)).mean() > (
        mse_grid(weight, 3, axis=1) / quantization_grid(weight, 3, axis=1)
    ).mean()  # the fewer bits, the more is clipped


def test_of_equally_good_grids_the_largest():
    on_the_grid = torch.arange(-7.0, 8.0) * 0.125
    equal(mse_grid(on_the_grid, 4), torch.tensor(0.125))
    equal(mse_grid(torch.zeros(2, 3), 4, axis=0), torch.ones(2))


# --- affine grids ---


@settings(max_examples=120, deadline=None)
@given(
    limits=st.tuples(*[st.one_of(st.floats(-1e30, 1e30), st.floats(-10, 10))] * 2).map(sorted),
    bits=st.sampled_from(BITS),
)
def test_range_grid_equals_the_formula(limits, bits):
    low, high = min(limits[0], 0.0), max(limits[1], 0.0)
    scale, zero_point = range_grid(*limits, bits)
    highest = 2**bits - 1
    expected = float(np.float32((high - low) / highest))
    expected = expected if expected >= TINY else 1.0
    assert scale == expected
    assert isinstance(zero_point, int)
    assert zero_point == min(max(round(-low / expected), 0), highest)
    if expected != 1.0:  # both ends within half a step
        assert -zero_point * scale == pytest.approx(low, abs=0.501 * scale)
        assert (highest - zero_point) * scale == pytest.approx(high, abs=0.501 * scale)
    assert fake_quantize(torch.zeros(1), scale, zero_point, 0, highest).item() == 0.0


@pytest.mark.parametrize(
    ("limits", "bits", "expected"),
    [
        ((-1.0, 2.0), 2, (1.0, 1)),
        ((0.0, 0.0), 8, (1.0, 0)),
        ((-0.0, 0.0), 8, (1.0, 0)),
        ((3.0, 6.0), 2, (2.0, 0)),
        ((-6.0, -3.0), 2, (2.0, 3)),
        ((-6.0, 0.0), 2, (2.0, 3)),
        ((0.0, 255.0), 8, (1.0, 0)),
        ((-128, 127), 8, (1.0, 128)),
        ((-0.5, 2.5), 2, (1.0, 0)),  # half to even
        ((-1.5, 1.5), 2, (1.0, 2)),
        ((0.0, 1e-45), 8, (1.0, 0)),
        ((-3e38, 0.0), 8, (float(np.float32(3e38 / 255)), 255)),
        ((-3e38, 3e38), 8, (float(np.float32(6e38 / 255)), 128)),
    ],
)
def test_range_grid_hand_worked(limits, bits, expected):
    assert range_grid(*limits, bits) == expected


# --- rounding to a grid ---


def test_quantize_hand_worked():
    x = torch.tensor([-1.0, 0.25, 0.75, 9.0, -0.25, 3e38, -3e38, math.inf, -math.inf])
    assert quantize(x, 0.5, 1, 0, 3).tolist() == [0, 1, 3, 3, 1, 3, 0, 3, 0]
    assert fake_quantize(x, 0.5, 1, 0, 3).tolist() == [-0.5, 0, 1, 1, 0, 1, -0.5, 1, -0.5]
    by_column = torch.tensor([[1.0, 1.0, 1.0], [-2.0, -2.0, -2.0]])
    scale, zero_point = torch.tensor([1.0, 0.5, 4.0]), torch.tensor([0, 1, 2])
    assert quantize(by_column, scale, zero_point, 0, 3, axis=1).tolist() == [[1, 3, 2], [0, 0, 2]]  # 0.25, -0.5: to 0
    assert fake_quantize(by_column, scale, zero_point, 0, 3, axis=-1).tolist() == [[1, 1, 0], [0, -0.5, 0]]


@settings(max_examples=60, deadline=None)
@given(arguments=quantisations())
def test_equals_the_formula(arguments):
    x, *grid, axis = arguments
    scale, zero_point, lowest, highest = grid
    before = x.clone()
    beyond = unclamped(x, scale, zero_point, axis)
    integers = np.clip(beyond, lowest, highest)
    found = quantize(x, *grid, axis=axis)
    equal(found, tensor_of(integers).int())
    expected = values_of(integers, x, scale, zero_point, axis)
    upstream = sample(*x.shape, dtype=x.dtype)
    output, gradient = gradient_of(lambda x: fake_quantize(x, *grid, axis=axis), x, upstream=upstream)
    equal(output, expected)
    equal(fake_quantize(x, *grid, axis=axis), expected)
    inside = tensor_of((beyond >= lowest) & (beyond <= highest))
    equal(gradient, torch.where(inside, upstream, torch.zeros_like(upstream)))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_next_to_ties_division_decides(dtype):
    """Half a step beyond a point, or nearly: multiplying by ``1 / scale`` rounds some of them the other way."""
    scale = sample(200, 1).abs() + 0.01
    x = ((torch.arange(-20, 20) + 0.5) * scale).to(dtype)
    points = np.rint(wide(x) / scale.numpy().astype(wide(x).dtype))
    multiplied = np.rint(wide(x) * (1 / scale.numpy().astype(wide(x).dtype)))
    assert (points != multiplied).any() or dtype in HALVES
    step = scale.flatten().to(torch.promote_types(dtype, torch.float32))
    expected = values_of(points, x, step.numpy(), 0, 0)
    assert torch.equal(quantize(x, scale.flatten(), 7, -128, 127, axis=0), tensor_of(points + 7).int())
    equal(fake_quantize(x, scale.flatten(), 7, -128, 127, axis=0), expected)
    equal(nearest_grid_point(x, step, 8, axis=0), expected)
    if dtype not in HALVES:
        rows = [learned_step_quantize(row, own, 8) for row, own in zip(x, step, strict=True)]
        equal(torch.stack(rows), expected)


@settings(max_examples=50, deadline=None)
@given(arguments=quantisations())
def test_numbers_and_tensors_are_the_same(arguments):
    x, scale, zero_point, lowest, highest, axis = arguments
    integers = quantize(x, scale, zero_point, lowest, highest, axis=axis)
    expected = fake_quantize(x, scale, zero_point, lowest, highest, axis=axis)
    if axis is None:
        forms = [(float(scale), torch.tensor(zero_point))]
        forms += [(torch.tensor(float(scale), dtype=torch.float64), torch.tensor(zero_point, dtype=torch.int16))]
    else:
        forms = [(scale.double(), zero_point), (scale, torch.as_tensor(zero_point).float())]
    for form in forms:
        equal(fake_quantize(x, *form, lowest, highest, axis=axis), expected)
        equal(quantize(x, *form, lowest, highest, axis=axis), integers)


@pytest.mark.parametrize(("dtype", "layout"), PAIRS)
def test_per_channel_is_per_tensor_of_each_slice(layout, dtype):
    x, upstream = laid_out(sample(3, 4, 5, 2, dtype=dtype), layout), sample(3, 4, 5, 2, seed=1, dtype=dtype)
    for axis in range(-4, 4):
        size = x.shape[axis]
        scale, zero_point = sample(size, seed=2).abs() + 0.1, torch.arange(size, dtype=torch.int32)
        own = zip(x.unbind(axis), upstream.unbind(axis), scale, zero_point, strict=True)
        parts = [
            gradient_of(lambda x, s=s, z=z: fake_quantize(x, s, z, 0, 7), part, upstream=above)
            for part, above, s, z in own
        ]
        found = gradient_of(
            lambda x, s=scale, z=zero_point, a=axis: fake_quantize(x, s, z, 0, 7, axis=a), x, upstream=upstream
        )
        for mine, slices in zip(found, zip(*parts, strict=True), strict=True):
            equal(mine, torch.stack(slices, dim=axis))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_quantising_twice_changes_nothing(data):
    x = data.draw(tensors())
    most = 7 if x.dtype == torch.bfloat16 else 8  # its 8 significant bits are too few to tell 255 points apart
    bits, signed = data.draw(st.integers(2, most)), data.draw(st.booleans())
    # half precision overflows and underflows where the grid is not of its size
    unit = 1.0 if x.dtype in HALVES else 1e-30
    scale = data.draw(float32s(unit, 100 / unit)) / 2**bits
    lowest, highest = integer_limits(bits, signed=signed)
    zero_point = 0 if signed else data.draw(st.integers(0, highest))
    once = fake_quantize(x, scale, zero_point, lowest, highest)
    equal(fake_quantize(once, scale, zero_point, lowest, highest), once)
    equal(quantize(once, scale, zero_point, lowest, highest), quantize(x, scale, zero_point, lowest, highest))


@pytest.mark.parametrize(("lowest", "highest"), [(-3, 4), (-4, 3), (0, 7), (0, 6), (-127, 127), (-128, 127)])
@pytest.mark.parametrize("zero_point", [0, torch.tensor(0), 2, torch.tensor(-1)])
def test_gradient_at_ties_and_limits(lowest, highest, zero_point):
    """Half a step beyond a limit rounds to even: inside where the limit is even, outside where it is odd."""
    low, high = lowest - int(zero_point), highest - int(zero_point)
    first, last = np.float32(low - 0.5), np.float32(high + 0.5)
    x = torch.tensor(
        [
            *[low, high, low - 1, high + 1, 0.5, 1.5, -0.5],
            *[first, np.nextafter(first, np.float32(math.inf)), np.nextafter(first, np.float32(-math.inf))],
            *[last, np.nextafter(last, np.float32(-math.inf)), np.nextafter(last, np.float32(math.inf))],
        ]
    )
    within = [low <= 0 <= high, low <= 2 <= high, low <= 0 <= high]
    expected = [True, True, False, False, *within, low % 2 == 0, True, False, high % 2 == 0, True, False]
    for unit in (1.0, 0.25):
        for dtype in (torch.float32, torch.float64):
            _, gradient = gradient_of(
                lambda x, u=unit: fake_quantize(x, u, zero_point, lowest, highest), (x * unit).to(dtype)
            )
            assert gradient.tolist() == [float(entry) for entry in expected]


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_rounded_in_float32(dtype):
    x, scale = sample(2000, dtype=dtype) * 3, 0.0317
    upstream = sample(2000, seed=1, dtype=dtype)
    found = gradient_of(lambda x: fake_quantize(x, scale, 3, -100, 120), x, upstream=upstream)
    single = gradient_of(lambda x: fake_quantize(x, scale, 3, -100, 120), x.float(), upstream=upstream.float())
    equal(quantize(x, scale, 3, -100, 120), quantize(x.float(), scale, 3, -100, 120))
    for mine, other in zip(found, single, strict=True):
        equal(mine, other.to(dtype))


def test_scale_and_zero_point_get_no_gradient():
    scale, zero_point = torch.tensor(0.5, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    x = torch.tensor([0.7, 9.0], requires_grad=True)
    fake_quantize(x, scale, zero_point, 0, 3).sum().backward()
    assert (x.grad.tolist(), scale.grad, zero_point.grad) == ([1.0, 0.0], None, None)
    assert not quantize(x, scale, zero_point, 0, 3).requires_grad
    assert not quantization_grid(x, 4).requires_grad
    assert not mse_grid(x, 4).requires_grad


def test_a_gradient_of_a_gradient():
    x = torch.tensor([0.7, 9.0], requires_grad=True)
    (gradient,) = torch.autograd.grad((fake_quantize(x, 0.5, 1, 0, 3) ** 2).sum(), x, create_graph=True)
    assert gradient.tolist() == [1.0, 0.0]
    gradient.sum().backward()
    assert x.grad.tolist() == [2.0, 0.0]


def test_the_default_device_does_not_matter():
    x, step = sample(6, 8), torch.tensor(0.3)

    def results():
        return (
            quantize(x, 0.3, 1, 0, 7),
            fake_quantize(x, 0.3, 1, 0, 7),
            quantization_grid(x, 4, axis=0),
            mse_grid(x, 4),
            nearest_grid_point(x, step, 4),
            learned_step_quantize(x, step, 4),
            torch.tensor(range_grid(-1.0, 3.0, 4), device="cpu"),
        )

    expected = results()
    with torch.device("meta"):
        found = results()
    for mine, other in zip(found, expected, strict=True):
        equal(mine, other)


# --- learned steps ---


def lsq_oracle(x, step, lowest, highest):
    """Values, and the slopes of ``x`` and of the step."""
    with np.errstate(over="ignore", invalid="ignore"):  # infinity less infinity, where a limit takes its place
        ratio = x / step
        error = np.rint(ratio) - ratio
    below, above = ratio <= lowest, ratio >= highest
    values = np.select([below, above], [lowest, highest], np.rint(ratio)).astype(x.dtype) * step
    step_slopes = np.select([below, above], [lowest, highest], error)
    return values, np.select([below, above], [0.0, 0.0], 1.0), step_slopes


def test_lsq_hand_worked():
    x, step = torch.tensor([0.9, -0.4, 0.1, -2.0]), torch.tensor(0.5)
    slopes = []
    for upstream in torch.eye(4):
        output, gradient, slope = gradient_of(
            lambda x, s: learned_step_quantize(x, s, bits=3), x, step, upstream=upstream
        )
        assert output.tolist() == [1.0, -0.5, 0.0, -2.0]
        assert torch.equal(gradient, upstream * torch.tensor([1.0, 1.0, 1.0, 0.0]))
        slopes.append(slope.item())
    assert slopes == pytest.approx([0.2, -0.2, -0.2, -4], abs=1e-6)


def test_lsq_at_the_limits_is_outside():
    x, one = torch.tensor([-4.0, 3.0, -5.0, 9.0, 2.5, -3.5]), torch.tensor(1.0)
    output, gradient, slope = gradient_of(lambda x, s: learned_step_quantize(x, s, 3), x, one)
    assert output.tolist() == [-4, 3, -4, 3, 2, -4]
    assert gradient.tolist() == [0, 0, 0, 0, 1, 1]
    assert slope.item() == -4 + 3 - 4 + 3 - 0.5 - 0.5
    output, gradient, slope = gradient_of(
        lambda x, s: learned_step_quantize(x, s, 2, signed=False), torch.tensor([0.0, -1.0, 3.0, 4.0, 0.25]), one
    )
    assert (output.tolist(), gradient.tolist(), slope.item()) == ([0, 0, 3, 3, 0], [0, 0, 0, 0, 1], 5.75)


@settings(max_examples=60, deadline=None)
@given(
    x=tensors(dtypes=DTYPES[:2]),
    step=st.one_of(st.sampled_from([1.0, 0.5, 0.1]), float32s(1e-30, 1e5)),
    bits=st.sampled_from(BITS),
    signed=st.booleans(),
)
def test_lsq_equals_the_formula(x, step, bits, signed):
    step = torch.tensor(step, dtype=x.dtype)
    limits = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    values, slopes, step_slopes = lsq_oracle(x.numpy(), step.numpy(), *limits)
    upstream = sample(*x.shape, dtype=x.dtype)
    output, gradient, slope = gradient_of(
        lambda x, s: learned_step_quantize(x, s, bits, signed=signed), x, step, upstream=upstream
    )
    equal(output, tensor_of(values))
    equal(gradient, tensor_of(slopes).to(x.dtype) * upstream)
    products = step_slopes.astype(np.float64) * upstream.numpy()
    assert slope.dtype == step.dtype
    # it is the difference of two sums, of integers and of what they were before they were rounded
    terms = np.abs(values / step.numpy() * upstream.numpy()).sum() + np.abs(products).sum()
    assert slope.item() == pytest.approx(products.sum(), abs=1e-5 * np.abs(products).sum() + 1e-6 * terms + TINY)
    once = output.detach()
    equal(learned_step_quantize(once, step, bits, signed=signed), once)


@pytest.mark.parametrize(("bits", "signed"), [(2, True), (3, False), (4, True), (8, True)])
def test_lsq_is_the_derivative_with_the_rounding_error_held(bits, signed):
    """Finite differences of ``(clamp(x / s) + error) * s`` in float64, where ``error`` is that of rounding."""
    x, step = sample(200, dtype=torch.float64) * 2**bits * 0.2, torch.tensor(0.37, dtype=torch.float64)
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    upstream = sample(200, seed=1, dtype=torch.float64).numpy()
    values, s = x.numpy(), step.item()
    clamped = np.clip(values / s, lowest, highest)
    error = np.rint(clamped) - clamped

    def surrogate(x, s):
        return (np.clip(x / s, lowest, highest) + error) * s

    output, gradient, slope = gradient_of(
        lambda x, s: learned_step_quantize(x, s, bits, signed=signed), x, step, upstream=tensor_of(upstream)
    )
    np.testing.assert_allclose(output.numpy(), surrogate(values, s), atol=1e-12)
    assert min(np.abs(values / s - lowest).min(), np.abs(values / s - highest).min()) > 1e-5  # none crosses a limit
    delta = 1e-7
    by_x = (surrogate(values + delta, s) - surrogate(values - delta, s)) / (2 * delta) * upstream
    by_step = ((surrogate(values, s + delta) - surrogate(values, s - delta)) / (2 * delta) * upstream).sum()
    np.testing.assert_allclose(gradient.numpy(), by_x, atol=1e-6)
    assert slope.item() == pytest.approx(by_step, abs=1e-4)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5)])
def test_lsq_of_half_precision(dtype, shape):
    x = ((sample(*shape) * 8).round() / 8).to(dtype)  # its multiples of the step are exact
    found = gradient_of(lambda x, s: learned_step_quantize(x, s, 4), x, torch.tensor(0.5))
    single = gradient_of(lambda x, s: learned_step_quantize(x, s, 4), x.float(), torch.tensor(0.5))
    assert [tensor.dtype for tensor in found] == [dtype, dtype, torch.float32]
    for mine, other in zip(found, single, strict=True):
        assert torch.equal(mine.float(), other)


def test_lsq_learns_the_step_of_a_grid():
    x = torch.arange(-4.0, 4.0).repeat(8) * 0.25
    step = torch.tensor(0.2, requires_grad=True)
    for _ in range(100):
        (gradient,) = torch.autograd.grad(((learned_step_quantize(x, step, 3) - x) ** 2).mean(), step)
        step.data -= 0.01 * gradient
    assert step.item() == pytest.approx(0.25, abs=1e-3)


# --- torch's own ---


def away_from_ties(x, scale):
    """torch multiplies by ``1 / scale`` where ONNX divides: within rounding errors of a tie it may go the other way."""
    ratio = x.double() / scale
    return (ratio - ratio.floor() - 0.5).abs() > 1e-4


@pytest.mark.parametrize(("lowest", "highest", "zero_point"), [(-127, 127, 0), (0, 255, 77), (-8, 7, -3), (0, 3, 1)])
def test_equals_torch_per_tensor(lowest, highest, zero_point):
    x, upstream = sample(20_000) * (highest - lowest) * 0.2, sample(20_000, seed=1)
    x[:4000] = (x[:4000] * 2).round() / 2  # half of them ties
    for scale in (1.0, 0.25, 0.1, 0.0317):
        found = gradient_of(
            lambda x, s=scale: fake_quantize(x, s, zero_point, lowest, highest), x * scale, upstream=upstream
        )
        theirs = gradient_of(
            lambda x, s=scale: torch.fake_quantize_per_tensor_affine(x, s, zero_point, lowest, highest),
            x * scale,
            upstream=upstream,
        )
        exact = scale in (1.0, 0.25)  # the reciprocal of a power of two is exact: ties are the same
        compared = torch.ones(20_000, dtype=torch.bool) if exact else away_from_ties(x * scale, scale)
        assert compared.sum() >= 15_900
        for mine, other in zip(found, theirs, strict=True):
            equal(mine[compared], other[compared])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_equals_torch_per_channel(axis):
    x, upstream = sample(30, 20, 25) * 3, sample(30, 20, 25, seed=1)
    size = x.shape[axis]
    zero_point = (torch.arange(size) % 16).int() - 8
    for scale in (2.0 ** -(torch.arange(size) % 5), sample(size, seed=2).abs() + 0.05):
        found = gradient_of(lambda x, s=scale: fake_quantize(x, s, zero_point, -8, 7, axis=axis), x, upstream=upstream)
        theirs = gradient_of(
            lambda x, s=scale: torch.fake_quantize_per_channel_affine(x, s, zero_point, axis, -8, 7),
            x,
            upstream=upstream,
        )
        compared = away_from_ties(x, along(scale, x, axis))
        assert compared.sum() >= 14_900
        for mine, other in zip(found, theirs, strict=True):
            equal(mine[compared], other[compared])


# --- ONNX ---

INTEGERS = {"UINT8": (0, 255), "INT8": (-128, 127), "UINT4": (0, 15), "INT4": (-8, 7)}
STEPS = 2.0**30
"""From 2**31 steps on, the reference, and ONNX Runtime up to 1.31, may give the other end of a grid."""


@functools.cache
def onnx_model(kind, axis):
    """The integers of ``QuantizeLinear``, and their values from ``DequantizeLinear``."""
    helper, types = onnx.helper, onnx.TensorProto
    own = [] if axis is None else [None]
    where = {} if axis is None else {"axis": axis}
    inputs = [("x", types.FLOAT, None), ("scale", types.FLOAT, own)]
    nodes = [
        helper.make_node("Cast", ["zero"], ["zero_point"], to=types.DataType.Value(kind)),
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["quantised"], **where),
        helper.make_node("DequantizeLinear", ["quantised", "scale", "zero_point"], ["values"], **where),
        helper.make_node("Cast", ["quantised"], ["integers"], to=types.INT32),
    ]
    graph = helper.make_graph(
        nodes,
        "quantisation",
        [helper.make_tensor_value_info(*arguments) for arguments in [*inputs, ("zero", types.INT32, own)]],
        [
            helper.make_tensor_value_info("integers", types.INT32, None),
            helper.make_tensor_value_info("values", types.FLOAT, None),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@functools.cache
def runtime(*arguments):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # runs the nodes as they are
    return onnxruntime.InferenceSession(onnx_model(*arguments).SerializeToString(), options)


@functools.cache
def reference(*arguments):
    return ReferenceEvaluator(onnx_model(*arguments))


def assert_like_onnx(engine, kind, x, scale, zero_point, axis):
    """Every bit, but that a negative zero here is a positive one there: of an integer there is but one."""
    scale, zero_point = torch.as_tensor(scale), torch.as_tensor(zero_point, dtype=torch.int32)
    wide = {"x": x.float(), "scale": scale.to(x.dtype).float()}  # ONNX Runtime up to 1.23 truncates what is half
    feed = {name: value.numpy() for name, value in {**wide, "zero": zero_point}.items()}
    integers, values = engine(kind, axis).run(None, feed)
    grid = (scale.to(x.dtype), zero_point, *INTEGERS[kind])
    np.testing.assert_array_equal(quantize(x, *grid, axis=axis).numpy(), integers)
    found = (fake_quantize(x, *grid, axis=axis) + 0.0).numpy()
    assert found.tobytes() == values.astype(found.dtype).tobytes()


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize(
    ("engine", "dtype"),
    [(runtime, torch.float32), (runtime, torch.float16), (reference, torch.float32)],
)
def test_equals_onnx(kind, engine, dtype):
    lowest, highest = INTEGERS[kind]
    x = sample(6, 70, 8, dtype=dtype) * (highest - lowest) * 0.2
    x[0, 0] = torch.tensor([0.0, -0.0, -1e-3, 6e-8, 0.5, 1.5, -0.5, -2.5])
    x[0, 1] = torch.tensor([5e4, -5e4, 1e-45, 3e4, -3e4, 1e4, -1e4, -1e-45])
    for axis in (None, 0, 1, 2, -1):
        for seed, size in enumerate([()] if axis is None else [(x.shape[axis],)] * 2):
            generator = torch.Generator().manual_seed(seed)
            zero_point = torch.randint(lowest, highest + 1, size, generator=generator)
            scale = 2.0 ** torch.randint(-3, 2, size, generator=generator)
            assert_like_onnx(engine, kind, x, scale, zero_point, axis)
            scale = (torch.rand(size, generator=generator) + 0.01).to(dtype)
            ties = (torch.arange(x.numel()).reshape(x.shape) % (highest - lowest) + lowest + 0.5) * along(
                scale, x, axis
            )
            for values in (x, ties.to(dtype)):
                assert_like_onnx(engine, kind, values, scale, zero_point, axis)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(INTEGERS)))
def test_equals_onnx_runtime_wherever(data, kind):
    x = data.draw(tensors(dtypes=[torch.float32], shapes=[(), (1,), (7,), (3, 5), (2, 3, 2, 2)]))
    _, scale, zero_point, _, _, axis = data.draw(quantisations(x, INTEGERS[kind]))
    size = () if axis is None else (x.shape[axis],)
    most = min(STEPS * float(torch.as_tensor(scale).min()), torch.finfo(torch.float32).max)
    assert_like_onnx(runtime, kind, x.clamp(-most, most), scale, torch.as_tensor(zero_point).expand(size), axis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", INTEGERS)
def test_what_is_far_outside_is_the_nearest_end(kind, dtype):
    lowest, highest = INTEGERS[kind]
    largest, middle = torch.finfo(dtype).max, (lowest + highest) // 2
    x = torch.tensor([largest, math.inf, -largest, -math.inf], dtype=dtype)
    for scale in (2.0**-20, 0.3, 2.0):
        found = quantize(x, torch.tensor(scale), torch.tensor(middle, dtype=torch.int32), lowest, highest)
        assert found.tolist() == [highest, highest, lowest, lowest]


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_on_their_grid_are_dequantised_by_onnx(bits):
    """What is exported: integers of the narrow range and one step for each output channel."""
    weight = sample(8, 4, 3, 3)
    for function in (quantization_grid, mse_grid):
        step = function(weight, bits, axis=0)
        integers, values = runtime(f"INT{bits}", 0).run(
            None,
            {
                "x": nearest_grid_point(weight, step, bits, axis=0).numpy(),
                "scale": step.numpy(),
                "zero": np.zeros(8, np.int32),
            },
        )
        np.testing.assert_array_equal(integers, quantize(weight, step, 0, *integer_limits(bits), axis=0).numpy())
        np.testing.assert_array_equal(values, nearest_grid_point(weight, step, bits, axis=0).numpy())


# --- compiled ---


@pytest.mark.sample
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_fake_quantize():
    x, upstream = sample(4, 6) * 3, sample(4, 6, seed=1)
    steps, zero_points = torch.tensor([0.1, 0.25, 0.3, 1.0]), torch.tensor([0, 1, 2, 3])
    for grid, axis in (((0.25, 1, 0, 15), None), ((steps, 0, -7, 7), 0), ((steps, zero_points, -7, 7), 0)):
        compiled = torch.compile(fake_quantize, fullgraph=True, backend="aot_eager")
        found = gradient_of(lambda x, f=compiled, g=grid, a=axis: f(x, *g, axis=a), x, upstream=upstream)
        expected = gradient_of(lambda x, g=grid, a=axis: fake_quantize(x, *g, axis=a), x, upstream=upstream)
        for mine, other in zip(found, expected, strict=True):
            equal(mine, other)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("signed", [True, False])
def test_compiled_learned_step(signed):
    x, step, upstream = sample(4, 6), torch.tensor(0.3), sample(4, 6, seed=1)
    compiled = torch.compile(learned_step_quantize, fullgraph=True, backend="aot_eager")
    found = gradient_of(lambda x, s: compiled(x, s, 3, signed=signed), x, step, upstream=upstream)
    expected = gradient_of(lambda x, s: learned_step_quantize(x, s, 3, signed=signed), x, step, upstream=upstream)
    for mine, other in zip(found, expected, strict=True):
        equal(mine, other)


# --- errors ---

ONES = torch.ones(2, 3)
PLACE = r"a weight is NaN or infinite"


@pytest.mark.parametrize(
    "call",
    [
        check_bits,
        integer_limits,
        lambda bits: integer_limits(bits, signed=False),
        lambda bits: quantization_grid(ONES, bits),
        lambda bits: mse_grid(ONES, bits),
        lambda bits: nearest_grid_point(ONES, torch.tensor(1.0), bits),
        lambda bits: range_grid(0.0, 1.0, bits),
        lambda bits: learned_step_quantize(ONES, torch.tensor(1.0), bits),
    ],
)
@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, True, "4", None])
def test_bits_that_no_grid_has(call, bits):
    with pytest.raises(ValueError, match=f"bits must be a whole number from 2 to 8, got {bits!r}"):
        call(bits)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"weight_bits must be a whole number from 2 to 8, got 9", lambda: check_bits(9, "weight_bits")),
        (PLACE, lambda: quantization_grid(torch.tensor([1.0, math.nan]), 4)),
        (PLACE, lambda: quantization_grid(torch.tensor([[1.0, 2.0], [-math.inf, 1.0]]), 4, axis=1)),
        (PLACE, lambda: quantization_grid(torch.tensor(math.inf, dtype=torch.float16), 4)),
        (PLACE, lambda: mse_grid(torch.tensor([math.nan, 1.0]), 4)),
        (PLACE, lambda: mse_grid(torch.tensor([[1.0], [math.inf]]), 4, axis=0)),
        (r"at least one weight, got shape \(0,\)", lambda: quantization_grid(torch.zeros(0), 4)),
        (r"at least one weight, got shape \(2, 0\)", lambda: mse_grid(torch.zeros(2, 0), 4, axis=0)),
        ("minimum must not be above maximum, got 2.0 and 1.0", lambda: range_grid(2.0, 1.0, 4)),
        ("minimum must be a finite number, got nan", lambda: range_grid(math.nan, 1.0, 4)),
        ("maximum must be a finite number, got nan", lambda: range_grid(0.0, math.nan, 4)),
        ("minimum must be a finite number, got -inf", lambda: range_grid(-math.inf, 1.0, 4)),
        ("maximum must be a finite number, got inf", lambda: range_grid(0.0, math.inf, 4)),
        (r"step must be positive, got 0.0", lambda: learned_step_quantize(ONES, torch.tensor(0.0), 4)),
        (r"step must be positive, got -0.5", lambda: learned_step_quantize(ONES, torch.tensor(-0.5), 4)),
        (r"step must be positive, got nan", lambda: learned_step_quantize(ONES, torch.tensor(math.nan), 4)),
    ],
)
def test_errors(message, call):
    with pytest.raises(ValueError, match=message):
        call()
