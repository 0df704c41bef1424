"""Pictures of attention: their size, and the colours at the centres of what they show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from lightning_compress.report.attention import MapPair, attention_picture

NAMES = ("stage1", "layer1")
RAMP = torch.arange(6.0).reshape(2, 3)


def pair(student, teacher):
    return MapPair(*NAMES, student, teacher)


def runs(mask):
    """Start and end of each run of True, if it is too long for a title."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    return [(start, end) for start, end in edges.reshape(-1, 2) if end - start > 30]


def drawn(images, *pairs):
    """The cells of the picture, row by row; where they are is seen in one of the same shapes in which all is dark."""
    dark = [pair(torch.zeros_like(one.student_maps), torch.zeros_like(one.teacher_maps)) for one in pairs]
    dark_picture = attention_picture(None if images is None else torch.zeros_like(images), dark)
    picture = attention_picture(images, pairs)
    assert picture.shape == dark_picture.shape
    painted = (dark_picture < 250).any(axis=2)
    columns = [
        [picture[top:bottom, left:right] for top, bottom in runs(painted[:, left:right].any(axis=1))]
        for left, right in runs(painted.any(axis=0))
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def at_the_centres(cell, height, width):
    """The colour in the middle of each position of a map."""
    rows = ((np.arange(height) + 0.5) / height * cell.shape[0]).astype(int)
    columns = ((np.arange(width) + 0.5) / width * cell.shape[1]).astype(int)
    return cell[rows][:, columns].astype(int)


def viridis(values):
    """The colours of a map whose smallest value is dark and whose largest is bright."""
    values = np.asarray(values, dtype=float)
    return (colormaps["viridis"]((values - values.min()) / np.ptp(values))[..., :3] * 255).round().astype(int)


@pytest.mark.sample
@pytest.mark.parametrize(
    ("images", "pairs", "samples", "columns"),
    [(False, 1, 1, 2), (True, 2, 2, 5), (False, 2, 2, 4)],
)
def test_there_is_a_row_a_sample_and_two_columns_a_pair(images, pairs, samples, columns):
    maps = torch.rand(samples, 4, 4)
    images = torch.rand(samples, 3, 8, 8) if images else None
    assert [len(row) for row in drawn(images, *[pair(maps, maps)] * pairs)] == [columns] * samples
    picture = attention_picture(images, [pair(maps, maps)] * pairs)
    assert picture.dtype == np.uint8
    assert picture.shape == pytest.approx((110 * (1.15 * samples + 0.62), 110 * 1.15 * columns, 3), abs=1)


def test_the_teacher_stands_left_of_the_student_and_the_input_before_both():
    student = torch.tensor([[[0.0, 1.0], [2.0, 3.0]], [[3.0, 2.0], [1.0, 0.0]]])
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])
    images = torch.zeros(2, 1, 2, 2)
    images[0, 0, 1, 0] = 5.0
    images[1, 0, 0, 1] = 5.0
    grid = drawn(images, pair(student, teacher))
    for row, cell in enumerate(grid):
        white = (images[row, 0, :, :, None] / 5 * 255).expand(2, 2, 3).tolist()
        assert at_the_centres(cell[0], 2, 2).tolist() == white
        assert np.abs(at_the_centres(cell[1], 2, 2) - viridis(teacher[row])).max() <= 1
        assert np.abs(at_the_centres(cell[2], 2, 2) - viridis(student[row])).max() <= 1


def test_pairs_stand_in_their_order():
    maps = [torch.tensor([values]).reshape(1, 2, 2) for values in ([3.0, 0, 1, 2], [0.0, 3, 1, 2], [1.0, 2, 0, 3])]
    grid = drawn(None, pair(maps[1], maps[0]), pair(maps[0], maps[2]))
    for cell, shown in zip(grid[0], (maps[0], maps[1], maps[2], maps[0]), strict=True):
        assert np.abs(at_the_centres(cell, 2, 2) - viridis(shown[0])).max() <= 1


def test_each_map_has_its_own_scale_and_its_own_size():
    small, large = RAMP[None] * 1e-6, torch.rand(1, 5, 5) * 1e6
    (cell,) = drawn(None, pair(small, large))
    assert np.abs(at_the_centres(cell[0], 5, 5) - viridis(large[0])).max() <= 1
    assert cell[1].shape[0] == pytest.approx(cell[1].shape[1] * 2 / 3, abs=2)
    assert np.abs(at_the_centres(cell[1], 2, 3) - viridis(RAMP)).max() <= 1


def test_a_map_of_one_value_is_dark():
    (cell,) = drawn(None, pair(torch.full((1, 3, 3), 7.0), torch.zeros(1, 3, 3)))
    dark = viridis([0.0, 1.0])[0].tolist()
    for shown in cell:
        assert at_the_centres(shown, 3, 3).reshape(-1, 3).tolist() == [dark] * 9


@pytest.mark.parametrize("extra", [0, 1])
def test_tokens_are_a_square_without_a_class_token(extra):
    tokens = torch.cat([torch.full((1, extra), 99.0), torch.tensor([[4.0, 0, 2, 1, 3, 5, 8, 7, 6]])], dim=1)
    (cell,) = drawn(None, pair(tokens, tokens))
    for shown in cell:
        assert np.abs(at_the_centres(shown, 3, 3) - viridis(tokens[0, extra:].reshape(3, 3))).max() <= 1


def test_tokens_that_are_no_square_are_a_strip():
    tokens = torch.tensor([[3.0, 0.0, 1.0]])
    (cell,) = drawn(None, pair(tokens, tokens))
    for shown in cell:
        assert shown.shape[1] == pytest.approx(3 * shown.shape[0], abs=3)
        assert np.abs(at_the_centres(shown, 1, 3) - viridis([[3.0, 0.0, 1.0]])).max() <= 1


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_of_three_channels_are_coloured_and_others_grey(channels):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(1, channels, 2, 2, generator=generator) * 4 - 1
    (cell,) = drawn(images, pair(torch.rand(1, 2, 2), torch.rand(1, 2, 2)))
    shown = images[0] if channels == 3 else images[0].mean(dim=0, keepdim=True).expand(3, 2, 2)
    expected = ((shown - shown.min()) / (shown.max() - shown.min())).permute(1, 2, 0) * 255
    assert np.abs(at_the_centres(cell[0], 2, 2) - expected.numpy()).max() <= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_type_and_graphs_are_drawn(dtype):
    maps = RAMP.reshape(1, 2, 3).to(dtype)
    expected = attention_picture(RAMP.reshape(1, 1, 2, 3), [pair(maps.float(), maps.float())])
    given = maps.requires_grad_()
    picture = attention_picture(RAMP.reshape(1, 1, 2, 3).to(dtype).requires_grad_(), [pair(given, given)])
    assert np.array_equal(picture, expected)


def test_the_same_maps_give_the_same_picture_and_nothing_stays_open():
    from matplotlib import pyplot

    maps = torch.rand(2, 4, 4)
    open_figures = pyplot.get_fignums()
    pictures = [attention_picture(maps[:, None], [pair(maps, maps)]) for _ in range(2)]
    assert np.array_equal(*pictures)
    assert pyplot.get_fignums() == open_figures
    assert pictures[0].std() > 10


def test_long_names_keep_their_ends(monkeypatch):
    titles = []

    class Recorded(Figure):
        def draw(self, *args):
            titles.extend(axes.get_title() for axes in self.axes if axes.get_title())
            super().draw(*args)

    monkeypatch.setattr("lightning_compress.report.attention.Figure", Recorded)
    maps = torch.rand(1, 2, 2)
    attention_picture(maps[:, None], [MapPair("features.denseblock4.norm", "layer4", maps, maps)])
    assert titles == ["input", "teacher\nlayer4", "student\n...seblock4.norm"]


def test_no_pair_is_refused():
    with pytest.raises(ValueError, match="pairs must hold at least one pair of maps"):
        attention_picture(torch.rand(1, 3, 4, 4), [])
