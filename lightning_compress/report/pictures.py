"""Pictures of techniques as files small enough to be kept in a report."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from matplotlib.image import imsave

from lightning_compress.report.table import Picture

MOST = 400_000
"""Bytes of one picture; a larger one is made smaller."""
MOST_PICTURES = 12
"""Pictures of one report."""


def report_picture(title: str, legend: str, pixels: npt.NDArray[np.uint8]) -> Picture:
    """Make a picture for a report.

    Args:
        title: Above it.
        legend: What it shows, in one sentence.
        pixels: Shape (height, width, 3), 0 to 255.

    Returns:
        The picture; with every second row and column only, or fewer, where its file would be larger than 400 kB.

    Example:
        >>> drawn = report_picture("Attention", "Bright: where it looks.", np.zeros((4, 4, 3), dtype=np.uint8))
        >>> drawn.png[1:4]
        b'PNG'
    """
    content = _png(pixels)
    while len(content) > MOST and min(pixels.shape[:2]) > 1:
        pixels = pixels[::2, ::2]
        content = _png(pixels)
    return Picture(title, legend, content)


def kept(pictures: Iterable[Picture]) -> tuple[tuple[Picture, ...], list[str]]:
    """The pictures that a report keeps.

    Args:
        pictures: Of all techniques.

    Returns:
        The first 12, and a note on the others if there are any.

    Example:
        >>> kept([Picture("a", "", b"")])
        ((Picture(title='a', legend='', png=b''),), [])
    """
    every = list(pictures)
    left = len(every) - MOST_PICTURES
    notes = [f"{left} of {len(every)} pictures were left out, so that the report stays small."] if left > 0 else []
    return tuple(every[:MOST_PICTURES]), notes


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    imsave(buffer, np.ascontiguousarray(pixels), format="png")
    return buffer.getvalue()
