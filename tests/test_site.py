"""The documentation as it is read: every page built, and opened in a browser, on a desk and on a phone."""

from __future__ import annotations

import subprocess
import sys

import pytest
from browser import browser, chromium
from pages import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")]

FORMULAS = "cdn.jsdelivr.net/npm/mathjax"  # the only thing that pages ask for elsewhere
SOURCES = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs/notebooks").glob("*.ipynb")]
PAGES = sorted(page.relative_to(ROOT / "docs").with_suffix("").as_posix() for page in SOURCES)
MISSING_PICTURES = "[...document.images].filter((own) => !own.complete || !own.naturalWidth).map((own) => own.src)"
WITHOUT_WORDS = "[...document.querySelectorAll('article img')].filter((own) => !own.alt).map((own) => own.src)"
BROKEN_LINKS = """
(() => [...document.querySelectorAll("a[href^='#']")].map((own) => own.getAttribute("href").slice(1))
  .filter((name) => name && !document.getElementById(decodeURIComponent(name))))()
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", ROOT / "docs", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def opened():
    with browser() as started:
        yield started


@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_fits_its_window_and_misses_nothing(opened, site, width):
    wrong = {}
    for page in PAGES:
        seen = opened.see(site / f"{page}.html", width=width)
        found = {
            "sticks out": seen.overflow,
            "complains": [own for own in seen.complaints if FORMULAS not in own],
            "asks elsewhere for": [own for own in seen.requests if FORMULAS not in own],
            "pictures that are not there": opened.value(MISSING_PICTURES),
            "pictures without words": opened.value(WITHOUT_WORDS),
            "links to nowhere": opened.value(BROKEN_LINKS),
        }
        if bad := {what: values for what, values in found.items() if values}:
            wrong[page] = bad
    assert wrong == {}
    assert len(PAGES) > 40
