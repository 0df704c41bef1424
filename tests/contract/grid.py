"""Which rows run on which modules in the fast tests, where what is tested hardly depends on the module."""

from __future__ import annotations

import pytest
from cases import CASES, Case

from .modules import Classifier


def is_sample(case: Case, kind: type[Classifier]) -> bool:
    """Whether this is the first row, on any of its modules, or another one on the first of its modules."""
    return case is CASES[0] or kind is case.modules[0]


def each_case_and_some_modules(*, heavy_is_slow: bool = True) -> pytest.MarkDecorator:
    """Parametrise a test over the rows and their modules; what is no sample is slow, and heavy rows if wanted."""
    rows = [
        pytest.param(
            case,
            kind,
            id=f"{case.name}-{kind.__name__}",
            marks=[pytest.mark.slow] * ((case.heavy and heavy_is_slow) or not is_sample(case, kind)),
        )
        for case in CASES
        for kind in case.modules
    ]
    return pytest.mark.parametrize(("case", "kind"), rows)
