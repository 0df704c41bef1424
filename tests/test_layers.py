"""The layers of the package: each module imports downwards only, read from its source without running it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lightning_compress import _HOMES

PACKAGE = "lightning_compress"
FOLDER = Path(__file__).parents[1] / PACKAGE
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}

# Storeys from the ground up. A part may import what is below it, its neighbours on the same storey, and itself.
STOREYS = [
    {"_compat"},
    {"functional"},
    {"modules"},
    {"mechanisms"},
    {"export"},
    {"report"},
    {"tracking"},
    {"callbacks", "mixins"},
    {"recipe", "commands", "demo", "cli", "_factory"},
]
HEIGHT = {part: height for height, parts in enumerate(STOREYS) for part in parts}

# What callbacks share; the rest of them do not know one another.
BASES = (
    *(
        "arguments",
        "base",
        "calibrating",
        "channel_plan",
        "copies",
        "dynamic",
        "ending",
        "features",
        "intents",
        "masked",
        "masks",
    ),
    *("quantised", "ranks", "rehearsal", "returned", "saving", "teaching", "validating"),
)

# When Lightning may be imported: never, or only inside a function or for type checkers. Others: at any time.
NO_LIGHTNING = {"functional", "modules", "mechanisms"}
LAZY_LIGHTNING = {"_compat", "export"}


@dataclass(frozen=True)
class Import:
    """One imported module, and whether it is imported when the importing module is."""

    target: str
    line: int
    in_function: bool = False
    for_typing: bool = False

    @property
    def top(self) -> str:
        return self.target.split(".")[0]


class _Collector(ast.NodeVisitor):
    """Collect the imports of one module, with where they stand."""

    def __init__(self, module: str, is_package: bool) -> None:
        self.package = module if is_package else module.rpartition(".")[0]
        self.imports: list[Import] = []
        self.in_function = self.for_typing = False

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        source = node.module or ""
        if node.level:
            parents = self.package.split(".")[: len(self.package.split(".")) - node.level + 1]
            source = ".".join([*parents, *([source] if source else [])])
        for alias in node.names:
            # `from package import name` may import a module or, through the lazy table, a public name of one
            if source == PACKAGE:
                self._add(_HOMES.get(alias.name) or f"{PACKAGE}.{alias.name}", node)
            elif source.startswith(PACKAGE):
                self._add(f"{source}.{alias.name}", node)
            else:
                self._add(source, node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            self._add(str(node.args[0].value), node)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        before = self.for_typing
        self.for_typing = before or ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for child in node.body:
            self.visit(child)
        self.for_typing = before
        self.visit(node.test)
        for child in node.orelse:
            self.visit(child)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        before, self.in_function = self.in_function, True
        self.generic_visit(node)
        self.in_function = before

    visit_AsyncFunctionDef = visit_FunctionDef

    def _add(self, target: str, node: ast.AST) -> None:
        self.imports.append(Import(target, node.lineno, self.in_function, self.for_typing))


def imports_of(source: str, module: str, *, is_package: bool = False) -> list[Import]:
    collector = _Collector(module, is_package)
    collector.visit(ast.parse(source))
    return [found for found in collector.imports if found.target != "__future__"]


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What breaks the rules in one module, one sentence per import."""
    if module == PACKAGE:
        return []  # the public names: resolved lazily, and test_public_api checks that
    part = part_of(module)
    if part not in HEIGHT:
        return [f"{module}: '{part}' has no storey, add it to STOREYS"]
    found = []
    for imported in imports_of(source, module, is_package=is_package):
        reasons = [
            *_internal(module, part, imported),
            *_lightning(module, part, imported),
            *_special(module, part, imported),
        ]
        found += [f"{module}:{imported.line} imports {imported.target}: {reason}" for reason in reasons]
    return found


def part_of(module: str) -> str:
    return module.split(".")[1]


def _internal(module: str, part: str, imported: Import) -> Iterator[str]:
    if imported.top != PACKAGE or imported.target in (PACKAGE, f"{PACKAGE}.__version__"):
        return
    target_part = part_of(imported.target)
    if target_part not in HEIGHT:
        yield f"'{target_part}' has no storey"
    elif HEIGHT[target_part] > HEIGHT[part]:
        yield f"upwards, from {part} to {target_part}"
    elif part == target_part == "callbacks" and module != f"{PACKAGE}.callbacks":
        own_name, target_name = module.split(".")[2], [*imported.target.split("."), ""][2]
        if target_name not in (*BASES, own_name):
            yield "callbacks import no other callback than callbacks/base.py"


def _lightning(module: str, part: str, imported: Import) -> Iterator[str]:
    if imported.top not in LIGHTNING:
        return
    if part in NO_LIGHTNING:
        yield f"Lightning has no place in {part}"
    elif part == "export" and not (module == f"{PACKAGE}.export.evaluate" and imported.in_function):
        yield "in export, Lightning is for the functions of evaluate.py"
    elif part in LAZY_LIGHTNING and not (imported.in_function or imported.for_typing):
        yield f"in {part}, Lightning is imported inside functions or under TYPE_CHECKING"


def _special(module: str, part: str, imported: Import) -> Iterator[str]:
    ours_or_standard = imported.top == PACKAGE or imported.top in sys.stdlib_module_names
    if part == "functional" and imported.top != "torch" and not ours_or_standard:
        yield "functional imports torch only"
    if part == "functional" and imported.top == PACKAGE and part_of(imported.target) != "functional":
        yield "functional imports torch only"
    if part == "_factory" and not (imported.in_function or imported.for_typing or imported.target == "os"):
        yield "_factory.py is loaded by every Trainer on the machine and imports os only"


def package_modules() -> dict[str, Path]:
    found = {}
    for path in sorted(FOLDER.rglob("*.py")):
        parts = path.relative_to(FOLDER.parent).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


@pytest.mark.parametrize("module", package_modules())
def test_the_module_imports_downwards_only(module):
    path = package_modules()[module]
    assert violations(path.read_text(), module, is_package=path.name == "__init__.py") == []


def test_the_entry_point_imports_os_until_it_is_asked():
    found = imports_of((FOLDER / "_factory.py").read_text(), f"{PACKAGE}._factory")
    assert [imported.target for imported in found if not imported.in_function] == ["os"]


def test_the_storeys_that_exist_are_found():
    parts = {part_of(module) for module in package_modules() if module != PACKAGE}
    assert {"_compat", "functional", "mechanisms"} <= parts
    assert parts <= set(HEIGHT)


def test_the_diagram_shows_every_module():
    page = (FOLDER.parent / "docs/architecture.md").read_text(encoding="utf-8")
    diagram = page.split("```text")[1].split("```")[0]
    shown = set(re.findall(r"\w+", diagram))
    names = {module.split(".")[-1] for module in package_modules() if module.count(".") in (1, 2)}
    assert {name for name in names if not name.startswith("_")} - shown == set()


# --- the checker itself, on small sources ---

FORBIDDEN = {
    "functional.masks": [
        "import lightning.pytorch",
        "from pytorch_lightning import Trainer",
        "import numpy as np",
        "from lightning_compress import mechanisms",
        "from lightning_compress import _compat",
        "from lightning_compress.mechanisms.selection import find_module",
        "from ..mechanisms import selection",
        "from .. import mechanisms",
        "from lightning_compress import DistillationCallback",
        "def f():\n    import lightning",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lightning",
        "from importlib import import_module\nimport_module('lightning.pytorch')",
    ],
    "modules.translator": [
        "import lightning",
        "def f():\n    from lightning.pytorch import Trainer",
        "from lightning_compress.export import to_onnx",
    ],
    "mechanisms.step": [
        "import lightning",
        "class A:\n    import pytorch_lightning",
        "try:\n    import lightning\nexcept ImportError:\n    pass",
        "if True:\n    import lightning",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import lightning",
        "from typing import TYPE_CHECKING\nif not TYPE_CHECKING:\n    import lightning",
        "def f():\n    import lightning.pytorch",
        "import typing\nif typing.TYPE_CHECKING:\n    from lightning.pytorch import Trainer",
        "def f():\n    from lightning_compress.callbacks.base import CompressionCallback",
        "import lightning_compress.cli",
    ],
    "export.onnx": ["import lightning", "def f():\n    import lightning", "from lightning_compress import report"],
    "export.evaluate": ["import lightning", "from lightning_compress.callbacks import base"],
    "report.table": ["from lightning_compress.callbacks.report import CompressionReport"],
    "callbacks.distillation": [
        "from lightning_compress.callbacks.export import ExportCallback",
        "from lightning_compress.callbacks import export",
        "from . import export",
        "from .export import ExportCallback",
        "import lightning_compress.callbacks.export",
        "import lightning_compress.callbacks",
        "from lightning_compress import ExportCallback",
        "def f():\n    from lightning_compress.callbacks.export import ExportCallback",
        "from lightning_compress import recipe",
        "from lightning_compress.demo import main",
    ],
    "callbacks.base": ["from lightning_compress.callbacks.distillation import DistillationCallback"],
    "mixins": ["from lightning_compress.recipe import load"],
    "_compat": ["import lightning", "from lightning_compress.functional import distillation_loss"],
    "_factory": [
        "import json",
        "import sys",
        "import os.path",
        "from lightning_compress import recipe",
        "import torch",
    ],
    "helpers": ["import os"],
}
ALLOWED = {
    "functional.masks": [
        "from __future__ import annotations\nimport math\nimport torch.nn.functional as F\nfrom torch import Tensor",
        "from lightning_compress.functional.schedules import cubic_schedule",
        "from . import schedules",
    ],
    "modules.translator": ["from torch import nn\nfrom lightning_compress.functional import attention_map"],
    "mechanisms.step": [
        "from lightning_compress import _compat\nfrom lightning_compress import __version__",
        "from lightning_compress.mechanisms.selection import find_module",
        "from importlib import import_module\nimport_module(name)",
    ],
    "_compat": [
        "def f():\n    import lightning.pytorch",
        "import typing\nif typing.TYPE_CHECKING:\n    from lightning.pytorch import Trainer",
    ],
    "export.evaluate": ["def f():\n    import pytorch_lightning", "from lightning_compress.export.onnx import to_onnx"],
    "callbacks.distillation": [
        "import lightning.pytorch",
        "from lightning_compress.callbacks.base import CompressionCallback",
        "from .base import CompressionCallback",
        "from lightning_compress import CompressionCallback, functional",
        "from lightning_compress.mixins import CompressionMixin",
        "import lightning_compress",
    ],
    "_factory": ["from __future__ import annotations\nimport os\ndef f():\n    from lightning_compress import recipe"],
    "cli": ["from lightning_compress import demo, recipe\nfrom lightning_compress.callbacks import distillation"],
}


@pytest.mark.parametrize(
    ("module", "source"), [(module, source) for module in FORBIDDEN for source in FORBIDDEN[module]]
)
def test_a_violation_is_found(module, source):
    assert len(violations(source, f"{PACKAGE}.{module}")) >= 1


@pytest.mark.parametrize(("module", "source"), [(module, source) for module in ALLOWED for source in ALLOWED[module]])
def test_what_is_allowed_passes(module, source):
    assert violations(source, f"{PACKAGE}.{module}") == []


def test_a_violation_names_module_line_and_reason():
    source = "import torch\n\nfrom lightning_compress.callbacks.base import CompressionCallback\n"
    assert violations(source, f"{PACKAGE}.mechanisms.step") == [
        "lightning_compress.mechanisms.step:3 imports lightning_compress.callbacks.base.CompressionCallback: "
        "upwards, from mechanisms to callbacks"
    ]


def test_relative_imports_of_a_package_start_at_itself():
    source = "from .step import StepController\nfrom ..callbacks import base"
    targets = [found.target for found in imports_of(source, f"{PACKAGE}.mechanisms", is_package=True)]
    assert targets == ["lightning_compress.mechanisms.step.StepController", "lightning_compress.callbacks.base"]
    assert len(violations(source, f"{PACKAGE}.mechanisms", is_package=True)) == 1


def test_the_package_of_callbacks_may_gather_them():
    source = "from lightning_compress.callbacks.export import ExportCallback"
    assert violations(source, f"{PACKAGE}.callbacks", is_package=True) == []
