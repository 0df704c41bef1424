"""Each project with one shipped recipe; between them they run all of these."""

from __future__ import annotations

import pytest

from lightning_compress.recipe.shipped import shipped

from .checks import check
from .programs import PROGRAMS

HERE = [name for name, program in PROGRAMS.items() if not program.needs]


def test_each_recipe_is_run():
    assert {program.recipes[0] for program in PROGRAMS.values()} == {*shipped()}


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_an_untouched_project(name, tmp_path):
    check(PROGRAMS[name], tmp_path)
