"""The list of mutations is about the code there is; what they show is tried by ``python tests/mutations.py``."""

from __future__ import annotations

import subprocess
import sys

import pytest
from mutations import MUTATIONS, ROOT


def test_each_edit_applies_in_one_place():
    texts = {mutation.file: (ROOT / mutation.file).read_text(encoding="utf-8") for mutation in MUTATIONS}
    stale = {mutation.what: texts[mutation.file].count(mutation.old) for mutation in MUTATIONS}
    assert {what: count for what, count in stale.items() if count != 1} == {}


def test_each_names_a_test_that_there_is():
    for mutation in MUTATIONS:
        path, _, name = mutation.test.partition("::")
        function = name.partition("[")[0].rpartition("::")[2]
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not name or f"def {function}(" in text or f"class {function}(" in text, mutation.what


@pytest.mark.sample
def test_each_names_a_case_that_pytest_collects():
    cases = sorted({mutation.test for mutation in MUTATIONS if "[" in mutation.test})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-m", "slow or not slow", *cases]
    collection = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert collection.returncode == 0, collection.stderr
