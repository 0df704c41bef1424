from __future__ import annotations

import base64
import dataclasses
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest

from lightning_compress.report import Picture, Report, Row, to_html
from lightning_compress.report.figure import panels
from lightning_compress.report.pictures import MOST, kept, report_picture

from .samples import full_report, nasty_report

VOID = {"meta", "br", "wbr"}


class Document(HTMLParser):
    """Collects tags, attributes and text, and fails on tags that do not match."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page():
    return to_html(full_report())


def test_nothing_comes_from_elsewhere(page):
    document = Document(page)
    assert document.open == []
    names = {name for name, _ in document.attributes}
    assert names.isdisjoint({"src", "href", "xlink:href", "srcset", "action", "data", "poster"})
    assert set(document.tags).isdisjoint({"script", "link", "img", "iframe", "object", "use", "image"})
    assert re.findall(r"https?://|url\(|@import|//\w", page) == []
    assert "default-src 'none'" in page


def test_the_page_shows_the_numbers(page):
    text = " ".join(" ".join(Document(page).text).split())
    for part in ("before", "int8.onnx", "4.0x smaller", "no difference shown, IQR 0.20", "model.conv", "softmax"):
        assert part in text
    assert "'int8.onnx', measured against 'before'." in text
    tiles = re.findall(r'<div class="tile card"><span>(.*?)</span><strong>(.*?)</strong>', page)
    assert tiles[:2] == [("Size", "1.10 kB"), ("Deflated", "300 B")]
    assert "The teacher was not measured." in text
    assert page.count("<svg") == 3 + 4 + 3  # at a glance, two plots for desk and phone, zeros and bits and filters
    assert page.count("The teacher was not measured.") == 1


def test_plots_show_which_models_are_worth_having(page):
    titles = re.findall(r"<figcaption>([^<]+)<", page)
    assert titles[3:5] == ["Size against val_acc", "Latency against val_acc"]
    assert page.count('<svg class="wide"') == page.count('<svg class="narrow"') == 2
    two = dataclasses.replace(full_report(), rows=full_report().rows[2:], files=())
    assert "against val_acc" not in to_html(two)
    unknown = [dataclasses.replace(row, metrics={"quality": 1.0}) for row in full_report().rows]
    assert "against quality" not in to_html(Report(tuple(unknown)))


def test_pictures_are_within_the_page():
    drawn = report_picture("at: <maps>", "Bright.", np.full((4, 6, 3), 128, dtype=np.uint8))
    page = to_html(dataclasses.replace(full_report(), pictures=(drawn,)))
    assert "img-src data:" in page
    [source] = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="at: &lt;maps&gt;">', page)
    assert base64.b64decode(source) == drawn.png


def test_large_pictures_are_made_smaller_and_many_are_told_of():
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    assert 10_000 < len(report_picture("noise", "", noise).png) <= MOST
    some = [Picture(f"{index}", "", b"") for index in range(14)]
    pictures, notes = kept(some)
    assert pictures == tuple(some[:12])
    assert notes == ["2 of 14 pictures were left out, so that the report stays small."]


def test_the_page_says_how_to_do_it_again(page):
    text = " ".join(Document(page).text)
    assert "pip install . torch==2.14.1" in text
    assert "version: 1\ncallbacks:\n- class_path: PruningCallback" in text
    assert "To do it again" not in to_html(Report(rows=()))


def test_the_page_fits_a_phone_and_the_dark(page):
    assert 'content="width=device-width, initial-scale=1"' in page
    assert "prefers-color-scheme: dark" in page
    # every table lies in a box that scrolls by itself and can be reached by keyboard
    assert page.count('<div class="scroll') == page.count("<table") == 3
    assert page.count('tabindex="0" role="region"') == 3
    assert re.findall(r"(?<!max-)(?<!min-)width: \d+px", page) == []


@pytest.mark.sample
def test_the_headline_time_is_compared_within_one_runtime():
    report = full_report()
    assert "4.0x slower than fp32.onnx" in to_html(report)
    alone = dataclasses.replace(report, files=report.files[1:])
    assert re.search(r"before, in torch: [\d.]+ ms<", to_html(alone))
    assert "slower" not in to_html(alone).partition("Latency")[2].partition("</div>")[0]
    same = dataclasses.replace(report, rows=(*report.rows[:3], dataclasses.replace(report.rows[2], name="int8.onnx")))
    assert "no difference to fp32.onnx shown" in to_html(same)
    modules = to_html(dataclasses.replace(report, files=()))
    assert "<span>no difference shown</span>" in modules


def test_names_cannot_break_out():
    nasty = nasty_report()
    document = Document(to_html(nasty))
    assert document.open == []
    assert "script" not in document.tags
    names = [nasty.rows[0].name, " ".join(nasty.rows[0].name.split())]
    assert sum(text in names for text in document.text) >= 5


def test_an_empty_report_is_a_page():
    document = Document(to_html(Report(rows=())))
    assert "Nothing was measured." in document.text
    assert "svg" not in document.tags


def test_panels_show_what_was_measured():
    size, latency, accuracy = panels(full_report())
    assert [panel.title for panel in (size, latency, accuracy)] == ["Size", "Latency", "val_acc"]
    assert "int8.onnx 1.10 kB (deflated 300 B)" in size.svg
    assert latency.legend == "Median of interleaved calls, batch 1; whisker: interquartile range."
    assert accuracy.svg.count("var(--accent)") == 3
    assert accuracy.svg.count("var(--base)") == 1
    assert "#0102" not in size.svg + latency.svg + accuracy.svg


@pytest.mark.parametrize(
    ("before", "after", "off"), [(0.1, 0.92, True), (0.85, 0.92, False), (0.99, 0.92, False), (0.1, 0.901, False)]
)
def test_a_network_before_its_training_does_not_squeeze_the_dots_of_the_others(before, after, off):
    values = {"before": before, "after": after, "m.onnx": 0.9}
    [panel] = panels(Report(rows=tuple(Row(name, metrics={"val_acc": own}) for name, own in values.items())))
    assert ("but for 'before', which is far off" in panel.legend) == off
    assert ("fill: none; stroke: var(--base)" in panel.svg) == off


def test_bars_are_in_proportion():
    svg = panels(Report(rows=(Row("a", bytes=1000), Row("b", bytes=250))))[0].svg
    ends = [
        float(re.search(r"L ([\d.]+)", path)[1])
        for path, style in re.findall(r'<path d="([^"]*)" style="fill: ([^";]*)', svg)
        if "accent" in style or "base" in style
    ]
    assert ends[0] == pytest.approx(4 * ends[1])


def test_names_are_cut_where_there_is_no_room():
    long = "a_student_of_a_large_residual_network.int8.onnx"
    rows = (Row("student distilled", bytes=1170000, bytes_compressed=1080000), Row(long, bytes=1, bytes_compressed=1))
    texts = re.findall(r">([^<>]+)</text>", panels(Report(rows=rows))[0].svg)
    assert texts[:2] == ["student distilled", "1.17 MB (deflated 1.08 MB)"]
    assert texts[2].startswith("a_student")
    assert texts[2].endswith(".onnx")
    assert "..." in texts[2]


def test_at_most_four_metrics_are_drawn():
    metrics = {f"metric_{index}": float(index) for index in range(6)}
    assert [panel.title for panel in panels(Report(rows=(Row("a", metrics=metrics),)))] == list(metrics)[:4]


def test_missing_and_infinite_values_have_a_label_and_no_mark():
    nasty = nasty_report()
    metric = panels(nasty)[1]
    assert "var(--accent)" not in metric.svg
    assert ">inf<" in metric.svg
    assert ">nan<" in metric.svg


def test_drawing_leaves_matplotlib_alone(monkeypatch, recwarn):
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "path")
    monkeypatch.setitem(matplotlib.rcParams, "figure.dpi", 300)
    backend = (
        matplotlib.rcParams._get_backend_or_none() if hasattr(matplotlib.rcParams, "_get_backend_or_none") else None
    )
    before = dict(matplotlib.rcParams.copy())
    svg = panels(nasty_report())[0].svg
    assert "\u65e5\u672c" in svg
    assert 'viewBox="0 0 340 92"' in svg
    assert dict(matplotlib.rcParams.copy()) == before
    assert not [warning for warning in recwarn if "lyph" in str(warning.message)]
    if backend is not None:
        assert matplotlib.rcParams["backend"] == backend
