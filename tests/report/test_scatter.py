from __future__ import annotations

import re

import pytest

from lightning_compress.report import Report, Row, pareto
from lightning_compress.report.scatter import NARROW, Axis, point_label, scatter_legend, scatter_svg


def table(**rows):
    return pareto({run: Report(tuple(own)) for run, own in rows.items()})


def row(name, size, metric):
    return Row(name, bytes=size, metrics={"acc": metric})


def test_axes_put_values_in_proportion():
    assert Axis(0, 10, 100, 200).pixel(2.5) == 125
    assert Axis(1, 100, 0, 200, log=True).pixel(10) == pytest.approx(100)
    assert Axis(0, 10, 0, 300).ticks(60) == [0, 2, 4, 6, 8, 10]
    assert Axis(1, 100, 0, 700, log=True).ticks(60) == [1, 2, 5, 10, 20, 50, 100]
    assert Axis(1, 100, 0, 200, log=True).ticks(60) == [1, 10, 100]


def test_front_is_filled_and_named_and_the_rest_is_muted():
    drawn = scatter_svg(table(a=[row("m", 100, 0.9)], b=[row("m", 200, 0.8)], c=[row("m", 300, 0.95)]))
    assert drawn.count("fill: var(--accent)") == 2
    assert drawn.count("fill: var(--base)") == 1
    names = re.findall(r">([abc])</text>", drawn)
    assert sorted(names) == ["a", "b", "c"]
    assert 'aria-label="Size against acc. Front: a 100 B, 0.9, c 300 B, 0.95"' in drawn


@pytest.mark.parametrize("beaten", [3, 4])
def test_a_narrow_plot_names_what_is_beaten_where_it_is_little(beaten):
    each = table(a=[row("m", 1, 0.9)], **{f"b{index}": [row("m", 3 * index + 5, 0.1)] for index in range(beaten)})
    names = re.findall(r">(a|b\d)</text>", scatter_svg(each, NARROW))
    assert len(names) == (4 if beaten == 3 else 1)


@pytest.mark.sample
def test_of_many_points_forty_have_names():
    few = table(**{f"r{index}": [row("m", 100 + index, 1 - index / 100)] for index in range(40)})
    assert "names" not in scatter_legend(few)
    many = table(**{f"r{index}": [row("m", 1000 + 37 * index % 997, index % 17)] for index in range(200)})
    assert "At most 40 of the 200 have their names here, the front first." in scatter_legend(many)
    names = re.findall(r">(r\d+)</text>", scatter_svg(many))
    assert 0 < len(names) <= 40
    assert {point.run for point in many.front} <= set(names)


def test_names_are_as_short_as_they_can_be():
    one = table(kd=[row("after", 2, 0.5), row("m.onnx", 1, 0.4)])
    assert [point_label(one, point) for point in one.points] == ["m.onnx", "after"]
    each = table(kd=[row("before", 9, 0.1), row("after", 2, 0.5)], qat=[row("before", 8, 0.1), row("after", 1, 0.4)])
    labels = [point_label(each, point) for point in (*each.points, *each.away)]
    assert labels == ["qat", "kd", "kd: before", "qat: before"]
    many = table(kd=[row("teacher", 9, 0.9), row("after", 2, 0.5), row("m.onnx", 1, 0.4)], qat=[row("after", 1, 0.4)])
    assert [point_label(many, point) for point in many.points][-2:] == ["kd: after", "teacher"]


def test_a_network_before_its_training_does_not_squeeze_the_others():
    far = table(a=[row("before", 9, 0.1), row("teacher", 20, 0.97), row("m", 2, 0.9), row("n", 1, 0.89)])
    assert scatter_legend(far).endswith("Far worse than all else, and left out: 'before'.")
    assert ">before</text>" not in scatter_svg(far)
    assert ">teacher</text>" in scatter_svg(far)
    trained = table(a=[row("before", 9, 0.9), row("m", 2, 0.3), row("n", 1, 0.29)])
    assert ">before</text>" in scatter_svg(trained)
    near = table(a=[row("before", 9, 0.88), row("m", 2, 0.9), row("n", 1, 0.89)])
    assert ">before</text>" in scatter_svg(near)


def test_one_point_and_none_are_drawn():
    assert scatter_svg(table(a=[row("m", 1, 0.9)])).count("var(--accent)") == 2  # the point and its line
    assert "var(--accent)" not in scatter_svg(table(a=[row("m", 1, float("nan"))]))
