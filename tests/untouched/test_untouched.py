"""Each project with a shipped recipe or two; between them they run all of these."""

from __future__ import annotations

import pytest

from lightning_compress.commands.recipes import shipped

from .checks import check
from .programs import PROGRAMS

TESTED = [(name, recipe) for name, own in PROGRAMS.items() for recipe in own.recipes[: own.tested]]
HERE = [(name, recipe) for name, recipe in TESTED if not PROGRAMS[name].needs]


def test_each_recipe_is_run():
    assert {recipe for _, recipe in TESTED} == {*shipped()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), HERE)
def test_an_untouched_project(name, recipe, tmp_path):
    check(PROGRAMS[name], recipe, tmp_path)
