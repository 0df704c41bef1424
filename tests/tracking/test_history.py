"""What masks did over a training: bounded columns, the last sparsity and the mean churn of each, few pictures."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from lightning_compress.report.heatmap import heat_map_picture
from lightning_compress.report.pictures import report_picture
from lightning_compress.tracking import LayerHistory, history


def test_each_update_is_a_column_while_there_is_room():
    seen = LayerHistory(["a", "b"], most=4)
    for step in (10, 20, 30):
        seen.add(step, [step / 100, 0.5], [0.1, step / 1000])
    sparsity, churn = seen.maps("dpf", until=45)
    assert sparsity.steps == churn.steps == [10, 20, 30, 45]
    assert sparsity.values == pytest.approx(np.array([[0.1, 0.2, 0.3], [0.5, 0.5, 0.5]]))
    assert churn.values == pytest.approx(np.array([[0.1, 0.1, 0.1], [0.01, 0.02, 0.03]]))
    assert (sparsity.full, churn.full) == (1.0, None)


def test_of_many_updates_neighbours_share_columns():
    seen = LayerHistory(["a"], most=4)
    for step in range(100):
        seen.add(step, [step / 100], [step % 2])
        assert len(seen) <= 4
    sparsity, churn = seen.maps("dpf", until=100)
    assert sparsity.steps == [0, 32, 64, 96, 100]
    assert sparsity.values[0] == pytest.approx([0.31, 0.63, 0.95, 0.99])
    assert churn.values[0] == pytest.approx([0.5] * 4)


def test_two_updates_in_one_step_share_a_column():
    seen = LayerHistory(["a"])
    seen.add(3, [0.1], [0.1])
    seen.add(3, [0.4], [0.3])
    sparsity, churn = seen.maps("dpf", until=3)
    assert (sparsity.steps, sparsity.values.tolist()) == ([3, 4], [[pytest.approx(0.4)]])
    assert churn.values.tolist() == [[pytest.approx(0.2)]]


class Takes:
    """A tracker that keeps the keys of pictures."""

    takes_pictures = True

    def __init__(self):
        self.keys = []

    def picture(self, key, picture, *, newest):
        assert newest
        self.keys.append(key)


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(history, "heat_map_picture", lambda map_: map_)


@pytest.mark.usefixtures("undrawn")
def test_it_is_drawn_in_each_twentieth_and_at_the_end():
    seen, tracker = LayerHistory(["a"]), Takes()
    seen.show(tracker, "dpf", 0, 0.0)
    assert tracker.keys == []  # there was no update yet
    for epoch in range(1, 101):
        seen.add(epoch, [epoch / 100], [0.1])
        seen.show(tracker, "dpf", epoch, epoch / 100)
    assert tracker.keys == ["compress/dpf/sparsity_map", "compress/dpf/churn_map"] * 21
    seen.show(tracker, "dpf", 100)
    assert len(tracker.keys) == 42  # nothing new
    seen.show(tracker, "dpf", 103)
    assert len(tracker.keys) == 44


@pytest.mark.usefixtures("undrawn")
def test_it_is_not_drawn_for_nobody():
    seen, tracker = LayerHistory(["a"]), Takes()
    tracker.takes_pictures = False
    seen.add(1, [0.1], [0.1])
    seen.show(tracker, "dpf", 1)
    assert tracker.keys == []


def test_a_report_gets_it_up_to_the_end():
    seen, nobody = LayerHistory(["a"]), SimpleNamespace(takes_pictures=False)
    assert seen.pictures("dpf") == []
    seen.add(10, [0.5], [0.1])
    seen.show(nobody, "dpf", 40)
    sparsity, churn = seen.pictures("dpf")
    assert [sparsity.title, churn.title] == [map_.title for map_ in seen.maps("dpf", 40)]
    assert sparsity == report_picture(sparsity.title, sparsity.legend, heat_map_picture(seen.maps("dpf", 40)[0]))
