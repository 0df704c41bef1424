"""The documentation is true where a program can tell: names, links, Python, YAML, and the stored notebooks."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from pages import PAGES, ROOT, blocks, each, name_of, run_python

import lightning_compress
from lightning_compress.mechanisms.loading import import_path
from lightning_compress.recipe import load_recipe

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STAND_IN = "my_project"  # the package of the reader's own classes in examples
MACHINE = re.compile(r"/(?:root|home|Users|work|tmp|var|opt)/|\blocalhost\b|index-url|/site-packages/|[A-Z]:\\\\")

# What the Python of each page leaves, or prints; README's has tests of its own.
RUNS = {
    "docs/start.md": ("report/compression_report.html", "largest difference to the network: "),
    "docs/techniques/distillation.md": ("", "0.8811"),
    "docs/techniques/attention-transfer.md": ("", "at: the losses of the first batch"),
    "docs/techniques/factor-transfer.md": ("paraphraser.pt", "ft: the losses of the first batch"),
    "docs/techniques/pruning.md": ("pruned.ckpt", "243 of 304 weights are zero"),
    "docs/techniques/dpf.md": ("dpf.ckpt", "1018 of 1272 weights are zero"),
    "docs/techniques/structured-pruning.md": ("smaller.ckpt", "Conv2d(3, 16, kernel_size=(3, 3), stride=(1, 1))"),
    "docs/techniques/dcil.md": ("dcil.ckpt", "979 of the 1224 weights of convolutions are zero"),
    "docs/techniques/psgd.md": ("psgd.ckpt", "model.0.weight: a grid of 4 bits"),
    "docs/techniques/ptq.md": ("digits-int8.onnx", "same class for "),
    "docs/techniques/qat.md": ("digits-qat.onnx", "in the file: "),
    "docs/sharded.md": ("compression_report/compression_report.html", "Compression report"),
    "docs/migration/quantization-aware-training.md": ("model.onnx", "2 entries of observers are left out"),
    "docs/migration/sparseml.md": ("", "1894 of 2368 weights are zero"),
    "docs/migration/lightning-nc.md": ("model.onnx", "1024 of 2048 weights are zero"),
    "docs/migration/torchdistill.md": ("paraphraser.pt", "['compress/at/loss', 'compress/kd/loss']"),
    "docs/migration/fasterai.md": ("", "518 of 648 weights are zero"),
    "docs/migration/authors-scripts.md": ("paraphraser.pt", "0.900"),
    "docs/manual.md": ("", "weights of the generator are zero"),
    "docs/extend.md": ("", "['compress/sp/loss', 'compress/sp/val_loss']"),
    "docs/export.md": ("network.onnx", "compared at batch sizes (2, 1, 5)"),
    "docs/tracking.md": ("logs/compress/config.yaml", "churn_map.png config.yaml sparsity_map.png"),
    "docs/report.md": ("report/compression_report.html", "Compression report"),
}

# What the output of each notebook has.
SHOWS = {
    "01-compress-your-first-model": "Compression report",
    "02-where-does-the-network-look": "like the teacher",
    "03-gradients-that-know-the-grid": "within a tenth of a step of the grid",
    "04-masks-that-change-their-mind": "kept in the end had been pruned before",
    "05-from-teacher-to-int8-file": "Pareto table: Deflated against val_accuracy",
}


def test_every_public_name_is_on_the_api_page():
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\.\. (?:auto\w+|py:module):: (\S+)$|^\.\. py:data:: (\S+)$", page, flags=re.MULTILINE))
    names = {f"lightning_compress.{name}" for name in lightning_compress.__all__ if name != "__version__"}
    for part in ("export", "functional", "modules"):
        names |= {f"lightning_compress.{part}.{name}" for name in getattr(lightning_compress, part).__all__}
    bases = {"callbacks.teaching.TeacherCallback", "callbacks.features.FeatureCallback"}  # to derive from
    names |= {f"lightning_compress.{base}" for base in bases}
    assert {first or second for first, second in listed} - {"lightning_compress", "__version__"} == names


@each(PAGES)
def test_links_inside_the_repository_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        other = page.parent / file if file else page
        if not other.is_file() or (anchor and anchor not in _anchors(other)):
            broken.append(target)
    assert broken == []


SECONDS = (
    "docs/techniques/ptq.md",
    "docs/techniques/qat.md",
    "docs/manual.md",
    "docs/migration/quantization-aware-training.md",
    "docs/migration/sparseml.md",
    "docs/migration/lightning-nc.md",
)
"""Pages that train and export for so long that they are not among the fast tests."""


def test_every_page_with_python_is_run():
    assert {name_of(page) for page in PAGES if blocks(page, "python")} == {*RUNS, "README.md"}


@pytest.mark.parametrize(
    "page",
    [pytest.param(ROOT / name, id=name, marks=[pytest.mark.slow] if name in SECONDS else []) for name in RUNS],
)
@pytest.mark.sample
def test_python_runs(page, tmp_path, monkeypatch, capsys):
    run_python(page, monkeypatch, tmp_path)
    leaves, prints = RUNS[name_of(page)]
    assert (tmp_path / leaves).exists()
    assert prints in capsys.readouterr().out


@each([page for page in PAGES if blocks(page, "yaml")])
def test_yaml_names_classes_and_arguments_that_exist(page):
    wrong = []
    for block in blocks(page, "yaml"):
        entries = list(_class_paths(yaml.safe_load(block)))
        assert entries, f"a block of {name_of(page)} names no class"
        wrong += [problem for path, arguments in entries for problem in _problems(path, arguments)]
    assert wrong == []


def test_recipe_is_one(tmp_path):
    recipes = [block for page in PAGES for block in blocks(page, "yaml") if block.startswith("version:")]
    assert len(recipes) == 1
    (tmp_path / "recipe.yaml").write_text(recipes[0])
    recipe = load_recipe(tmp_path / "recipe.yaml", unseen=[STAND_IN])
    assert [path for _, path, _ in recipe.entries] == ["DistillationCallback", "ExportCallback"]


def test_messages_that_are_explained_are_those_of_the_program():
    nodes = [
        node
        for path in (ROOT / "lightning_compress").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ]
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]
    rows = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").split("\n| `")[1:]
    quoted = [said for row in rows for said in re.findall(r"`([^`]+)`", f"`{row.partition(' | ')[0]}")]
    assert len(quoted) > 10
    assert [said for said in quoted if not any(said in text for text in texts)] == []


@each([*PAGES, *NOTEBOOKS, *sorted((ROOT / ".ci").iterdir())])
def test_nothing_names_a_machine(page):
    assert MACHINE.findall(page.read_text(encoding="utf-8")) == []


@each(NOTEBOOKS)
def test_notebook_is_stored_as_it_ran(page):
    notebook = nbformat.read(page, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert [output.output_type for output in outputs if output.output_type == "error"] == []
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert any(SHOWS[page.stem] in output.get("text", "") for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert page.stat().st_size < 400_000


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _class_paths(value: Any) -> Any:
    """Every class path in a YAML document, with its arguments."""
    if isinstance(value, dict):
        if "class_path" in value:
            yield value["class_path"], value.get("init_args", {})
        for key, entry in value.items():
            if key != "class_path":
                yield from _class_paths(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _class_paths(entry)


def _problems(path: str, arguments: dict[str, Any]) -> list[str]:
    if path.startswith(f"{STAND_IN}."):
        return []
    target = import_path(path if "." in path else f"lightning_compress.{path}", argument="class_path")
    parameters = inspect.signature(target).parameters
    takes_any = any(entry.kind is inspect.Parameter.VAR_KEYWORD for entry in parameters.values())
    return [f"{path} has no {name}" for name in arguments if name not in parameters and not takes_any]
