"""The pages in a browser: nothing to complain of, nothing that sticks out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from browser import browser, chromium

from lightning_compress.report import Layer, Report, pareto, to_html
from lightning_compress.report.pareto_files import write_pareto
from lightning_compress.report.pictures import report_picture

from .samples import full_report, nasty_report

pytestmark = [pytest.mark.slow, pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")]


def deep_report() -> Report:
    """Many layers, a picture, a recipe, a long command."""
    layers = tuple(Layer(f"model.stage{i // 30}.{i}.conv", "Conv2d", i / 200, 8, 64, 100 * i) for i in range(150))
    pixels = np.zeros((560, 900, 3), dtype=np.uint8)
    return dataclasses.replace(
        full_report(),
        layers=layers,
        pictures=(report_picture("at: where teacher and student look", "Bright is where it looks.", pixels),),
        command="lightning-compress run recipe.yaml -- python train.py " + "--option value " * 30,
    )


REPORTS = {"full": full_report(), "nasty": nasty_report(), "empty": Report(rows=()), "deep": deep_report()}


@pytest.fixture(scope="module")
def opened():
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    written = {name: folder / f"{name}.html" for name in REPORTS}
    for name, report in REPORTS.items():
        written[name].write_text(to_html(report), encoding="utf-8")
    long = {"a_long_name_of_a_run_" * 6: full_report()} | {f"run{index}": full_report() for index in range(11)}
    written["pareto"] = write_pareto(pareto(long), dict.fromkeys(long, "report.json"), folder).html
    return written


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", [*REPORTS, "pareto"])
def test_no_complaints_and_nothing_that_sticks_out(opened, pages, name, width, dark):
    seen = opened.see(pages[name], width=width, dark=dark)
    assert seen.complaints == []
    assert seen.overflow == []
    assert seen.requests == []
    assert seen.height > 300


def test_the_browser_tells_of_what_is_wrong(opened, tmp_path):
    page = tmp_path / "bad.html"
    viewport = '<meta name="viewport" content="width=device-width">'
    script = '<script>console.error("no"); undefined_function()</script>'
    page.write_text(f'{viewport}<div style="width: 900px">wide</div>{script}')
    seen = opened.see(page, width=390)
    assert seen.overflow == ["the page", "DIV."]
    assert len(seen.complaints) == 2
