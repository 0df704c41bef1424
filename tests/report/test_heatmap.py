"""The picture of a quantity of each layer over time: where values lie, what rows are called, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import colormaps

from lightning_compress.report.heatmap import HeatMap, _labels, heat_map_picture

VALUES = np.array([[0.0, 1.0], [0.5, 0.25]])


def share_of(picture, value):
    """How much of a picture has the colour of this value."""
    wanted = np.round(np.array(colormaps["viridis"](value))[:3] * 255)
    return float((np.abs(picture.astype(int) - wanted).max(axis=2) <= 2).mean())


def test_columns_are_as_wide_as_their_steps():
    picture = heat_map_picture(HeatMap("sparsity", ["a", "b"], [0, 30, 40], VALUES))
    assert picture.dtype == np.uint8
    wide, narrow = share_of(picture, 0.5), share_of(picture, 0.25)  # of one row
    assert wide / narrow == pytest.approx(3, rel=0.1)
    assert share_of(picture, 0.0) / share_of(picture, 1.0) == pytest.approx(3, rel=0.15)


def test_the_strongest_colour_is_that_of_the_largest_value_where_none_is_given():
    picture = heat_map_picture(HeatMap("churn", ["a", "b"], [0, 30, 40], VALUES * 0.02, full=None))
    assert share_of(picture, 0.5) / share_of(picture, 0.25) == pytest.approx(3, rel=0.1)
    nothing = heat_map_picture(HeatMap("churn", ["a"], [0, 1], np.zeros((1, 1)), full=None))
    assert share_of(nothing, 0.0) > 0.1


@pytest.mark.parametrize(("rows", "inches"), [(1, 0.4), (10, 1.9), (200, 9.0)])
def test_rows_share_the_height(rows, inches):
    names = [f"layer{index}" for index in range(rows)]
    picture = heat_map_picture(HeatMap("sparsity", names, [0, 1], np.ones((rows, 1))))
    assert len(picture) == pytest.approx(110 * (inches + 0.92), abs=1)


def test_a_name_is_no_formula():
    assert heat_map_picture(HeatMap("a $\\b", ["$\\frac", "b"], [0, 30, 40], VALUES)).std() > 20


def test_names_are_shortened_only_where_they_are_too_long():
    short = ["net.0.weight", "net.3.weight"]
    assert _labels(short) == short
    begin, end = "backbone.encoder.layers.encoder_layer_", ".self_attention.weight"
    assert _labels([f"{begin}1{end}", f"{begin}2{end}"]) == ["encoder_layer_1", "encoder_layer_2"]
    assert _labels([f"{begin}1.a.weight", f"{begin}1.weight"]) == ["encoder_layer_1.a", "encoder_layer_1"]
    assert _labels(["x" * 60 + "end"]) == ["..." + "x" * 34 + "end"]


@pytest.mark.parametrize(
    ("names", "steps", "values"),
    [([], [0, 1], np.ones((0, 1))), (["a"], [0], np.ones((1, 0))), (["a"], [0, 1], VALUES)],
)
def test_what_does_not_fit_together_is_refused(names, steps, values):
    with pytest.raises(ValueError, match=r"values must be \(layers, columns\)"):
        heat_map_picture(HeatMap("sparsity", names, steps, values))
