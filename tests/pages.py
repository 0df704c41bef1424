"""Markdown pages as tests see them: their fenced blocks, and a run of the Python ones in an empty folder."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def name_of(page: Path) -> str:
    """The path of a page inside the repository."""
    return page.relative_to(ROOT).as_posix()


def each(paths: list[Path]) -> pytest.MarkDecorator:
    """Parametrise a test over pages."""
    return pytest.mark.parametrize("page", paths, ids=name_of)


def blocks(page: Path, language: str) -> list[str]:
    """The contents of the fenced blocks of one language; "" for blocks without one."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^```([^\n`]*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [content for tag, content in fences if tag.strip() == language]


def run_python(page: Path, monkeypatch: Any, folder: Path) -> dict[str, Any]:
    """Run the Python blocks of a page, one after the other in one namespace and in ``folder``."""
    module = ModuleType(f"page_{page.stem.replace('-', '_')}")  # a home for the classes that the page defines
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(folder)
    for index, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{name_of(page)}, Python block {index + 1}", "exec"), vars(module))
    return vars(module)
