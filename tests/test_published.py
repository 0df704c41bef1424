"""The tables in the documentation are what its records of runs say, character by character."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from experiments import cards, results
from experiments.__main__ import EXPERIMENTS, RECORDS, SEEDS, shown
from experiments.published import published
from experiments.schedule import needed
from experiments.store import Store
from experiments.tables import BEGIN, END, NOT_YET
from pages import ROOT

DOCS = ROOT / "docs"
PUBLISHED = sorted(path.stem for path in (DOCS / RECORDS).glob("*.json"))
BEGUN: set[str] = set()  # of these, runs are missing: what takes hours may be made in several goes, on several machines
each = pytest.mark.parametrize("name", PUBLISHED)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("runs"), published(DOCS / RECORDS))


def between_markers(page: Path) -> str:
    return page.read_text(encoding="utf-8").partition(f"{BEGIN}\n\n")[2].partition(f"\n{END}")[0]


@each
@pytest.mark.sample
def test_a_page_shows_its_records(name, store, tmp_path):
    text = shown(EXPERIMENTS[name], store, SEEDS, [tmp_path])
    assert between_markers(DOCS / "experiments" / EXPERIMENTS[name].page) == text


@each
def test_a_table_says_whether_runs_are_missing(name, store):
    assert (NOT_YET in EXPERIMENTS[name].tables(store, SEEDS).lower()) == (name in BEGUN)
    assert bool(list(needed(EXPERIMENTS[name], store, SEEDS))) == (name in BEGUN)


@pytest.mark.parametrize("name", [name for name, card in cards.CARDS.items() if card.experiment in PUBLISHED])
def test_a_card_shows_its_records(name, store):
    assert between_markers(DOCS / "techniques" / f"{name}.md") == f"{cards.CARDS[name].table(store, SEEDS)}\n"


def test_no_record_is_of_runs_that_nobody_looks_at(store):
    jobs = [job for name in PUBLISHED for job in EXPERIMENTS[name].jobs(store, SEEDS)]
    assert sorted(store.published.keys() - {job.record.as_posix() for job in jobs}) == []


def test_the_records_can_be_read_where_the_tables_are():
    page = (DOCS / "experiments/index.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\(runs/(\w+)\.json\)", page) == [name for name in EXPERIMENTS if name in PUBLISHED]


def test_the_results_show_all_records(store):
    assert between_markers(DOCS / results.PAGE) == results.tables(EXPERIMENTS, store, SEEDS)
