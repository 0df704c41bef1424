"""What the pictures of a page are drawn with: colours that follow its mode, text of known width, SVG that is its own.

Drawn with matplotlib's objects, without pyplot, so that no open figure and no chosen backend is touched.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from lightning_compress.report import units

FONT = 13  # pixels


class Colours(NamedTuple):
    """What each kind of mark is drawn in."""

    text: str
    muted: str
    accent: str
    base: str
    track: str


# Stand-ins that become CSS, so that the page's light and dark mode apply. The accent is the blue of Okabe and Ito.
PAGE = Colours("#010203", "#010204", "#010205", "#010206", "#010207")
LIGHT = Colours("#16202c", "#5a6675", "#0072b2", "#9aa5b1", "#edf0f4")
_CSS = Colours("currentColor", "var(--muted)", "var(--accent)", "var(--base)", "var(--track)")

PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False}
"""For texts: a name may hold a "$"."""


def canvas(width: float, height: float, background: str = "none") -> tuple[Figure, Axes]:
    """A figure on which one unit is one pixel of the page, and y grows downwards.

    Args:
        width: Pixels.
        height: Pixels.
        background: Its colour.

    Returns:
        The figure and its only axes.

    Example:
        >>> bool(canvas(340, 100)[1].yaxis_inverted())
        True
    """
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor=background)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


def fitting(name: str, room: float, size: float = FONT) -> str:
    """The name, or as much of its beginning and its end as the room in pixels holds.

    Example:
        >>> fitting("after", 300), len(fitting("after" * 30, 300)) < 60
        ('after', True)
    """
    text = units.shortened(name, max(5, int(room)))  # no character is narrower than a pixel
    while text_width(text, size) > room and len(text) > 5:
        text = units.shortened(name, len(text) - 1)
    return text


def text_width(text: str, size: float = FONT) -> float:
    """Pixels in matplotlib's font, which is wider than most pages' fonts.

    Example:
        >>> text_width("mm") > text_width("ii") > 0
        True
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that this font lacks
        return float(TextToPath().get_text_width_height_descent(text, FontProperties(size=size), False)[0])


def svg(figure: Figure, description: str) -> str:
    """The figure as one element of an HTML page: real text, CSS colours, no identifiers, no references.

    Args:
        figure: Drawn in the colours of :data:`PAGE`.
        description: For those who do not see it.

    Returns:
        The element.

    Example:
        >>> svg(canvas(10, 10)[0], "nothing")[:65]
        '<svg role="img" aria-label="nothing" viewBox="0 0 10 10"><g>...
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "path.sketch": None}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the page's font, not matplotlib's, has to have the characters of a name
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    body = re.search(r"<svg[^>]*>(.*)</svg>", buffer.getvalue(), re.DOTALL)
    if body is None:
        raise RuntimeError("matplotlib wrote no <svg> element")
    inner = re.sub(r"<!--.*?-->|<defs>.*?</defs>|<defs */>| (?:id|clip-path)=\"[^\"]*\"", "", body[1], flags=re.DOTALL)
    for colour, css in zip(PAGE, _CSS, strict=True):
        inner = inner.replace(colour, css)
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    label = html.escape(description)
    return f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}">{inner.strip()}</svg>'


def png(figure: Figure, scale: float = 2.0) -> bytes:
    """The figure as a PNG file.

    Args:
        figure: Drawn in the colours of :data:`LIGHT`.
        scale: Pixels of the picture for one of the page.

    Returns:
        The file's content.

    Example:
        >>> png(canvas(10, 10)[0])[1:4]
        b'PNG'
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that matplotlib's font lacks is drawn as a box
        FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=72 * scale, metadata={"Software": None})
    return buffer.getvalue()
