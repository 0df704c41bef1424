"""The picture of positions: shares in bins, panels and colours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lightning_compress.report.positions import BINS, END, START, LayerPositions, position_histogram, positions_picture

FLAT, PEAK = torch.full((BINS,), 1 / BINS), torch.eye(BINS)[BINS // 2]


def layers(count, **settings):
    return [LayerPositions(f"stage{index}.weight", settings.get("bits", 4), FLAT, PEAK) for index in range(count)]


def share_of(picture, colour):
    """How much of a picture has this very colour."""
    wanted = np.round(np.array(to_rgb(colour)) * 255)
    return float((np.abs(picture.astype(int) - wanted).max(axis=2) <= 1).mean())


def test_shares_of_bins():
    histogram = position_histogram(torch.tensor([-0.5, 0.0, 0.01, 0.5]))
    assert histogram.shape == (BINS,)
    assert {index: value for index, value in enumerate(histogram.tolist()) if value} == {0: 0.25, 15: 0.5, 30: 0.25}
    assert position_histogram(torch.rand(3, 4, 5).half() - 0.5).sum() == pytest.approx(1)


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 2, 1), (5, 5, 1), (6, 5, 2), (61, 5, 12)])
def test_there_are_panels_for_all_but_very_many(count, columns, rows):
    picture = positions_picture(layers(count))
    assert picture.dtype == np.uint8
    assert picture.shape == pytest.approx((110 * (1.5 * rows + 0.45), 110 * 2 * columns, 3), abs=1)


def test_both_colours_are_there():
    picture = positions_picture(layers(1))
    without_end, without_start = (
        positions_picture([LayerPositions("w", 4, FLAT * start, PEAK * end)]) for start, end in ((1, 0), (0, 1))
    )
    assert share_of(picture, END) > share_of(without_end, END)
    assert share_of(picture, START) > 0.005
    assert share_of(without_start, START) < 0.001


@pytest.mark.sample
def test_what_is_written(monkeypatch):
    texts = []

    class Recorded(Figure):
        def draw(self, *args):
            texts.extend(text.get_text() for text in self.axes[0].texts)
            super().draw(*args)

    monkeypatch.setattr("lightning_compress.report.positions.Figure", Recorded)
    positions_picture([LayerPositions("features.denseblock4.layer1.conv2.weight", 3, FLAT, PEAK)])
    *labels, title = texts[:4]
    assert labels == ["-½", "0", "½"]
    assert title.startswith("...")
    assert "features.denseblock4.layer1.conv2.weight\n3 bits".endswith(title[3:])
    assert len(title) == 26 + len("\n3 bits")
    assert texts[4:] == ["position in the cell of the grid", "start", "end"]
    texts.clear()
    positions_picture(layers(61, bits=None))
    assert texts[:5] == ["-1", "0", "1", "stage0.weight", "-1"]
    assert texts[240:] == ["weight / largest weight (60 of 61 weights)", "start", "end"]


def test_no_layer_is_refused():
    with pytest.raises(ValueError, match="layers must hold at least one layer"):
        positions_picture([])


def test_the_same_positions_give_the_same_picture_and_nothing_stays_open():
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    assert np.array_equal(*(positions_picture(layers(3)) for _ in range(2)))
    assert pyplot.get_fignums() == before
