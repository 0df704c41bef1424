"""The list of mutations is about the code there is; what they show is tried by ``python tests/mutations.py``."""

from __future__ import annotations

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
