"""The technique of `docs/extend.md`, put into a copy of the package as it says: the whole contract holds for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, blocks

PAGE = ROOT / "docs/extend.md"
NAME = "SimilarityCallback"
ROW = f"""

def _similarity(folder: Path, kind: type[Classifier]) -> CompressionCallback:
    return lightning_compress.{NAME}(teacher_for(kind), weight=3.0)


CASES = (
    Case("{NAME}", _similarity, changes_loss=True),
"""


@pytest.mark.slow
def test_the_contract_holds_for_the_technique_of_the_page(tmp_path):
    for folder in ("lightning_compress", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    written = _add(tmp_path / "lightning_compress")
    cases = tmp_path / "tests/cases.py"
    _edit(cases, "\n\nCASES = (\n", ROW)
    _edit(cases, '"DistillationCallback": _counted,', f'"DistillationCallback": _counted,\n    "{NAME}": _counted,')
    _edit(cases, 'NEEDING_STEPS = (\n    "Dist', f'NEEDING_STEPS = (\n    "{NAME}",\n    "Dist')
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-m", "slow or not slow"]
    options += ["-k", f"{NAME} and not popen and not spawn and not accumulation"]  # as the page says
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/contract"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    [passed] = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > 80  # checkpoints, cleaning up, order, resume, the matrix, kills
    assert re.findall(r"^\d\. `([\w./]+)`", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE) == [
        *(file.relative_to(tmp_path / "lightning_compress").as_posix() for file in written),
        "docs/techniques/similarity.md",
    ]


def _add(package: Path) -> list[Path]:
    """Write the code files that the page lists; its fourth is a page."""
    function, callback, *_ = blocks(PAGE, "python")
    function = re.sub(r"\nprint\(.*", "", function)
    head = '"""From the page."""\n\nfrom lightning_compress.functional.similarity import similarity_loss\n'
    written = {"functional/similarity.py": function, "callbacks/similarity.py": head + callback}
    for name, text in written.items():
        assert not (package / name).exists()
        (package / name).write_text(text)
    names = package / "__init__.py"
    _edit(names, "_HOMES = {", f'_HOMES = {{\n    "{NAME}": "lightning_compress.callbacks.similarity",')
    _edit(names, "__all__ = [", f'__all__ = [\n    "{NAME}",')
    return [*(package / name for name in written), names]


def _edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, (file.name, old)
    file.write_text(text.replace(old, new))
