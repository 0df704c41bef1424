"""Each technique has a card: a page with a picture, a formula, three ways to use it, and figures that were measured."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from experiments.cards import CARDS, Found
from experiments.store import Store
from experiments.tables import BEGIN, END
from pages import ROOT, blocks, name_of

import lightning_compress
from lightning_compress.recipe import load_recipe

FOLDER = ROOT / "docs/techniques"
NO_TECHNIQUES = {"CompressionCallback", "ExportCallback"}
SECTIONS = (
    "Use",
    "Arguments that matter",
    "What it logs",
    "Cost",
    "Traps|When it does not help",
    "Results",
    "Differences from the papers?",
    "Attribution",
)
CHANGES = "What it changes, and what it leaves alone|What happens when"  # as the page tells it best, after "Use"
WORDS = {"none": None, "no": False, "yes": True}
FIGURE = r"[+-]?\d+\.\d+(?: \[.+?\])?"
SVG = "{http://www.w3.org/2000/svg}"


def callback_of(page: Path) -> str:
    """The class that a card is about: the first that it names."""
    found = re.search(r"`(\w+Callback)`", page.read_text(encoding="utf-8"))
    assert found, f"{name_of(page)} names no callback"
    return found[1]


PAGES = sorted(FOLDER.glob("*.md"))
each_card = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def section(page: Path, title: str) -> str:
    """What stands below a heading, up to the next of the same level."""
    parts = re.split(r"^## (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[title]


def test_each_technique_has_a_card():
    public = {name for name in lightning_compress.__all__ if name.endswith("Callback")}
    assert {callback_of(page) for page in PAGES} == public - NO_TECHNIQUES
    assert len(PAGES) == len(public - NO_TECHNIQUES)


@each_card
def test_sections_are_all_there_and_in_order(page):
    titles = re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    places = [[place for place, own in enumerate(titles) if re.fullmatch(title, own)] for title in SECTIONS]
    assert [title for title, found in zip(SECTIONS, places, strict=True) if len(found) != 1] == []
    assert places == sorted(places)
    assert any(re.fullmatch(CHANGES, title) for title in titles[1:])


@each_card
def test_idea_picture_and_formula_come_before_the_use(page):
    top = page.read_text(encoding="utf-8").split("\n## Use\n")[0]
    pictures = re.findall(r"^!\[(.+)\]\((.+)\)$", top, flags=re.MULTILINE)
    assert [file for _, file in pictures] == [f"pictures/{page.stem}.svg"]
    assert len(pictures[0][0]) > 60, "the alternative text says what is to be seen"
    assert "\n$$\n" in top


@each_card
def test_picture_is_plain_svg(page):
    file = FOLDER / "pictures" / f"{page.stem}.svg"
    root = ElementTree.parse(file).getroot()
    tags = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert tags <= {"svg", "title", "desc", "style", "defs", "marker", "rect", "path", "circle", "text"}
    assert root.findtext(f"{SVG}title")
    assert len(root.findtext(f"{SVG}desc") or "") > 60
    assert root.get("font-family") == "sans-serif"
    left, top, width, height = map(float, root.get("viewBox", "").split())
    assert (left, top) == (0, 0)
    for element in root.iter(f"{SVG}text"):
        assert 0 < float(element.get("x", "")) < width
        assert 14 < float(element.get("y", "")) < height
    assert file.stat().st_size < 10_000


def test_pictures_share_one_style_in_which_text_is_large_enough():
    styles = {ElementTree.parse(file).getroot().findtext(f"{SVG}style") for file in FOLDER.glob("pictures/*.svg")}
    assert len(styles) == 1
    assert min(map(int, re.findall(r"font-size: (\d+)px", styles.pop() or ""))) >= 14
    assert {file.stem for file in FOLDER.glob("pictures/*")} == {page.stem for page in PAGES}


@each_card
def test_it_is_used_in_python_in_yaml_and_from_the_shell(page, tmp_path):
    callback = callback_of(page)
    recipes = [block for block in blocks(page, "yaml") if "version: 1\n" in block]
    assert any(f"{callback}(" in block for block in blocks(page, "python"))
    assert any(f"lightning_compress.{callback}" in block for block in blocks(page, "yaml"))
    assert blocks(page, "console") == ["lightning-compress run recipe.yaml -- python train.py\n"]
    assert len(recipes) == 1
    (tmp_path / "recipe.yaml").write_text(recipes[0])
    recipe = load_recipe(tmp_path / "recipe.yaml", unseen=["my_project"])
    assert callback in [path for _, path, _ in recipe.entries]


@each_card
def test_arguments_and_their_defaults_are_the_constructors(page):
    parameters = inspect.signature(getattr(lightning_compress, callback_of(page))).parameters
    table = section(page, "Arguments that matter").split("\n\n")[1]
    rows = re.findall(r"^\| (`.+?) \|(.*?)\|", table, flags=re.MULTILINE)
    assert rows
    for cell, stated in rows:
        names = re.findall(r"`(\w+)`", cell)
        assert [name for name in names if name not in parameters] == []
        values = [literal(word) for word in stated.strip().split(", ")]
        if len(values) == 1:
            values *= len(names)
        assert len(values) == len(names), f"{cell} has defaults {stated}"
        wrong = [(name, value) for name, value in zip(names, values, strict=True) if value != parameters[name].default]
        assert [(name, value) for name, value in wrong if value is not PROSE] == []


@each_card
def test_results_are_those_of_the_experiments(page):
    measured = section(page, "Results").split("### Published elsewhere")[0]
    linked = re.findall(r"\]\((\.\./experiments/[\w-]+\.md)\)", measured)
    assert linked
    before, begin, rest = measured.partition(BEGIN)
    table, end, after = rest.partition(END)  # the experiments' command puts it there
    assert (begin, end) == (BEGIN, END)
    assert len(re.findall(FIGURE, table)) >= 6
    titles = re.findall(r"^\| ([^|]+) \|", table, flags=re.MULTILINE)
    assert titles == [*CARDS[page.stem].rows(Found(Store(Path()), 1))]
    known = "".join([table, *((page.parent / link).read_text(encoding="utf-8") for link in linked)])
    figures = re.findall(FIGURE, before + after)
    assert [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", known)] == []
    [seeds] = {*re.findall(r"(\d+) seeds", before + table + after)}
    assert all(f"{seeds} seeds" in (page.parent / link).read_text(encoding="utf-8") for link in linked)
    intervals = re.findall(r"\[([+-]\d+\.\d+), ([+-]\d+\.\d+)\](, not shown)?", measured)
    assert [entry for entry in intervals if (float(entry[0]) <= 0 <= float(entry[1])) != bool(entry[2])] == []


PROSE = object()
"""A default that is said in words."""


def literal(text: str) -> Any:
    """The value that a cell states; PROSE for words."""
    try:
        return ast.literal_eval(text.strip("`"))
    except (SyntaxError, ValueError):
        return WORDS.get(text, PROSE)
