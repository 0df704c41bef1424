"""Places for the names of points in a plot: none covers another, a point, or the edge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_RINGS = (9.0, 14.0, 22.0, 32.0, 44.0, 58.0, 74.0, 92.0, 112.0, 136.0)  # pixels from the point
_STEP = 4.0  # pixels between the places at which a line is looked at
NEAR = 16.0
"""Pixels from a point from which on a line leads to its name."""
_ANGLES = (0, 180, 270, 90, 315, 225, 45, 135, 337, 203, 23, 157)  # degrees; 90 is downwards


class Box(NamedTuple):
    """A rectangle in pixels; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two have more than an edge in common."""
        beside = self.right <= other.left or other.right <= self.left
        return not (beside or self.bottom <= other.top or other.bottom <= self.top)

    def inside(self, other: Box) -> bool:
        """Whether it sticks out of the other nowhere."""
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.top <= self.top
            and self.bottom <= other.bottom
        )


class Label(NamedTuple):
    """What is to be placed.

    Attributes:
        x: Of its point.
        y: Of its point.
        width: Of the text.
        height: Of the text.
        reach: How far from its point it may be.
    """

    x: float
    y: float
    width: float
    height: float
    reach: float = math.inf


def place(
    labels: Sequence[Label],
    area: Box,
    points: Sequence[tuple[float, float]],
    lines: Sequence[Box] = (),
    *,
    radius: float,
) -> list[Box | None]:
    """Find a place near its point for each label, the first ones first.

    Args:
        labels: The most important first.
        area: No label sticks out of it.
        points: All points in the plot; no label covers one.
        lines: What labels cover only if there is no other place.
        radius: Of a point.

    Returns:
        A place for each label, or ``None`` where there is no room.

    Example:
        >>> area, points = Box(0, 0, 100, 90), [(40.0, 40.0), (42.0, 40.0)]
        >>> boxes = place([Label(*point, 50.0, 12.0) for point in points], area, points, radius=5)
        >>> boxes[0].overlaps(boxes[1])
        False
    """
    marks = {(x, y): Box(x - radius, y - radius, x + radius, y + radius) for x, y in points}
    taken: list[Box] = []
    found: list[Box | None] = []
    for label in labels:
        others = [mark for point, mark in marks.items() if point != (label.x, label.y)]
        free = [box for box in _candidates(label) if box.inside(area) and not _any([box], [*marks.values(), *taken])]
        free = [box for box in free if not _any(_leader(label, box), [*others, *taken])]
        clear = (box for box in free if not _any([box], lines))
        choice = next(clear, free[0] if free else None)
        found.append(choice)
        taken += [] if choice is None else [choice, *_leader(label, choice)]
    return found


def leader(point: tuple[float, float], box: Box) -> tuple[float, float] | None:
    """Where the line from a point to its name ends.

    Args:
        point: In pixels.
        box: Of the name.

    Returns:
        The nearest place of the box; ``None`` where it is so near that no line is needed.

    Example:
        >>> leader((0.0, 0.0), Box(30, -5, 60, 10)), leader((0.0, 0.0), Box(9, -5, 60, 10))
        ((30, 0.0), None)
    """
    near = (min(max(point[0], box.left), box.right), min(max(point[1], box.top + 3), box.bottom - 3))
    return near if math.dist(point, near) > NEAR else None


def _leader(label: Label, box: Box) -> list[Box]:
    """The line from a point to its name, as small boxes, without its two ends."""
    end = leader((label.x, label.y), box)
    if end is None:
        return []
    count = int(math.dist((label.x, label.y), end) / _STEP)
    places = [
        (label.x + (end[0] - label.x) * i / count, label.y + (end[1] - label.y) * i / count) for i in range(2, count)
    ]
    return [Box(x - 1, y - 1, x + 1, y + 1) for x, y in places]


def _candidates(label: Label) -> Iterable[Box]:
    """Places around a point, from near to far; each touches the ring with the side that is turned to the point."""
    for ring in _RINGS:
        if ring > label.reach:
            return
        for angle in _ANGLES:
            across, down = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            left = label.x + ring * across - label.width * (1 - across) / 2
            top = label.y + ring * down - label.height * (1 - down) / 2
            yield Box(left, top, left + label.width, top + label.height)


def _any(boxes: Iterable[Box], others: Sequence[Box]) -> bool:
    return any(box.overlaps(other) for box in boxes for other in others)
