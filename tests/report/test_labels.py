from __future__ import annotations

import random
from itertools import combinations

from lightning_compress.report.labels import Box, Label, leader, place

AREA = Box(0, 0, 700, 400)


def crowded(seed):
    draw = random.Random(seed)
    points = [(draw.uniform(200, 400), draw.uniform(100, 250)) for _ in range(24)]
    return points, [Label(*point, draw.uniform(40, 150), 15) for point in points]


def test_no_label_covers_another_a_point_or_the_edge():
    for seed in range(2):
        points, labels = crowded(seed)
        boxes = place(labels, AREA, points, radius=6)
        found = [box for box in boxes if box is not None]
        assert len(found) >= 18
        assert all(box.inside(AREA) for box in found)
        assert not any(one.overlaps(other) for one, other in combinations(found, 2))
        assert not any(box.overlaps(Box(x - 6, y - 6, x + 6, y + 6)) for box in found for x, y in points)


def test_the_nearest_place_is_taken_and_a_far_one_gets_a_line():
    point = (100.0, 100.0)
    [box] = place([Label(*point, 50, 16)], AREA, [point], radius=5)
    assert box == Box(109, 92, 159, 108)
    assert leader(point, box) is None
    assert leader(point, Box(150, 92, 200, 108)) == (150, 100)


def test_lines_are_crossed_only_where_there_is_no_other_place():
    point, wall = (100.0, 100.0), Box(105, 0, 108, 400)
    [beside] = place([Label(*point, 50, 16)], AREA, [point], [wall], radius=2)
    assert not beside.overlaps(wall)
    [across] = place([Label(*point, 50, 16)], AREA, [point], [AREA], radius=2)
    assert across == Box(109, 92, 159, 108)


def test_without_room_there_is_no_label():
    assert place([Label(10, 10, 500, 15)], Box(0, 0, 100, 100), [(10, 10)], radius=2) == [None]
    far = place([Label(10, 10, 30, 15, reach=5)], AREA, [(10, 10)], radius=2)
    assert far == [None]
