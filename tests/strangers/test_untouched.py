"""The untouched projects whose LightningModule comes from one of these packages."""

from __future__ import annotations

import pytest
from untouched.checks import check
from untouched.programs import PROGRAMS, STRANGERS


@pytest.mark.parametrize("name", [name for name, program in PROGRAMS.items() if program.needs == STRANGERS])
def test_an_untouched_project(name, tmp_path):
    check(PROGRAMS[name], PROGRAMS[name].recipes[0], tmp_path)
