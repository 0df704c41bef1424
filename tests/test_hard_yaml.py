"""YAML that is hard to read, as a recipe and as the config of a project: one line that says what is wrong, and 2."""

from __future__ import annotations

import re
from functools import partial

import pytest
from projects import Project
from test_exporting import saved

from lightning_compress.cli import main
from lightning_compress.recipe import RecipeError, load_recipe

LEVELS, DIGITS = 1000, 5000
LAUGHS = "\n".join([f"a0: &a0 [{'x, ' * 9}x]", *(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}*a{n - 1}]" for n in range(1, 10))])
NESTED, UNFOLDS = "nested too deeply", "aliases unfold to too many values, or without end"
# What follows the first key, and what is said of it.
HARD: dict[str, tuple[str | bytes, str]] = {
    "a deep list": ("[" * LEVELS + "]" * LEVELS, NESTED),
    "a deep mapping": ("{a: " * LEVELS + "1" + "}" * LEVELS, NESTED),
    "deep lines": ("\n" + "\n".join(f"{' ' * level}a:" for level in range(1, LEVELS)), NESTED),
    "levels that can be read": ("[" * 80 + "]" * 80, NESTED),
    "a billion laughs": (f"1\n{LAUGHS}\nmore: *a9", UNFOLDS),
    "itself": ("&a [*a]", UNFOLDS),
    "a huge number": ("1" + "0" * DIGITS, "not YAML: Exceeds the limit"),
    "another encoding": ("x # caf\xe9".encode("latin-1"), "not YAML: 'utf-8' codec can't decode byte 0xe9"),
    "two bytes a character": ("x".encode("utf-16"), "not YAML: 'utf-8' codec can't decode byte 0xff"),
    "a NUL": ("x\0", "not YAML: unacceptable character #x0000"),
    "a tab": ("\n\ta: 1", "line 2, column 1: not YAML: found character '\\\\t'"),
    "an unknown anchor": ("*a", "not YAML: found undefined alias"),
    "a call": ("!!python/object/apply:os.getcwd []", "not YAML: could not determine a constructor"),
    "two documents": ("1\n---\na: 1", "not YAML: but found another document"),
    "a list as a key": ("\n  ? [a]\n  : 1", "not YAML: found unhashable key"),
}
WHOLE = {"nothing": "", "blank lines": "\n\n", "a comment": "# nothing", "a list": "- a", "a word": "hello"}


def file_of(folder, key, rest):
    path = folder / "hard.yaml"
    path.write_bytes(f"{key}: ".encode() + (rest if isinstance(rest, bytes) else rest.encode()) + b"\n")
    return path


@pytest.mark.parametrize("case", [pytest.param(own, marks=[pytest.mark.slow] * ("deep" in own)) for own in HARD])
def test_a_recipe_that_is_hard_to_read(case, tmp_path):
    rest, said = HARD[case]
    path = file_of(tmp_path, "version: 1\ncallbacks", rest)
    said = said.replace("line 2", "line 3")
    with pytest.raises(RecipeError, match=rf"^{path}: .*{said}") as caught:
        load_recipe(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("case", WHOLE)
def test_a_recipe_that_is_no_mapping(case, tmp_path):
    (tmp_path / "hard.yaml").write_text(WHOLE[case])
    with pytest.raises(RecipeError, match=r"a recipe is a mapping with the keys version, callbacks, .*, got"):
        load_recipe(tmp_path / "hard.yaml")


@pytest.mark.parametrize("text", ["version: 1\r\ncallbacks: [{entry}]\r\n", "\ufeffversion: 1\ncallbacks: [{entry}]\n"])
def test_line_ends_and_marks_of_other_systems(text, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(
        text.replace("{entry}", "{class_path: PruningCallback, init_args: {sparsity: 0.5}}").encode()
    )
    [entry] = load_recipe(tmp_path / "recipe.yaml").callbacks
    assert entry["init_args"] == {"sparsity": 0.5}


def test_a_key_that_appears_twice(tmp_path):
    (tmp_path / "recipe.yaml").write_text("version: 1\nversion: 1\n")
    with pytest.raises(RecipeError, match="line 2, column 1: not YAML: the key 'version' appears twice"):
        load_recipe(tmp_path / "recipe.yaml")


def one_line(capsys, command, *arguments):
    """What a command that ends with 2 says."""
    assert main([command, *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    [line] = [line for line in err.splitlines() if line.startswith(f"lightning-compress {command}")]
    return line


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize("case", HARD)
def test_a_config_that_is_hard_to_read(case, command, tmp_path, capsys):
    rest, said = HARD[case]
    line = one_line(capsys, command, "--config", file_of(tmp_path, "model", rest))
    assert re.search(said, line), line


@pytest.mark.slow
@pytest.mark.parametrize("case", WHOLE)
def test_a_config_that_is_no_mapping(case, tmp_path, capsys):
    (tmp_path / "hard.yaml").write_text(WHOLE[case])
    line = one_line(capsys, "fit", "--config", tmp_path / "hard.yaml")
    assert "hard.yaml: a config is a mapping with keys such as model, data and trainer, got" in line


@pytest.fixture
def export(tmp_path, monkeypatch, capsys):
    """The line of the command for a checkpoint that could be exported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    project = Project(tmp_path, "lightning.pytorch")
    saved(project)
    return partial(one_line, capsys, "export", "last.ckpt", "--class", f"{project.name}.LitNet", "--out", "x.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", ["", ",", "1,,32", "abc", "0,32", "1.5,32", "1,1e9", "1,99999999999", "99999999,99999999", "1" * DIGITS]
)
def test_absurd_shapes(shape, export):
    line = export(f"--shape={shape}")
    assert re.search(r"--shape must be (whole numbers such as 1,3,32,32|that of one input), .*got '", line), line


@pytest.mark.slow
@pytest.mark.parametrize("given", ["[" * LEVELS, "&a {a: *a}", "{width: 1" + "0" * DIGITS + "}", "{a: [}"])
def test_arguments_on_the_shell_that_are_hard_to_read(given, export):
    assert "--init-args is not YAML: " in export("--init-args", given)
