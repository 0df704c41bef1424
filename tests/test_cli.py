"""The command: subcommands, bad usage, and how little it imports before there is work."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lightning_compress
from lightning_compress.cli import COMMANDS, main
from lightning_compress.commands.exits import ended

OURS = ["lightning_compress", *(f"lightning_compress.{name}" for name in ("cli", "commands", "commands.exits"))]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-compress {lightning_compress.__version__}\n"


def test_the_installed_program():
    program = Path(sys.executable).with_name("lightning-compress")
    child = subprocess.run([program, "rnu"], capture_output=True, text=True, check=False)
    assert (child.returncode, child.stdout) == (2, "")
    assert child.stderr.endswith("did you mean 'run'?\n")


def test_help_names_each_command_and_the_exit_codes(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert [name for name in COMMANDS if re.search(rf"\n    {name}\s", out)] == list(COMMANDS)
    assert "0 done, 1 a check failed (tolerance, parity), 2 bad usage, 130 interrupted" in " ".join(out.split())
    assert len(out.splitlines()) < 60


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(capsys, name):
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: lightning-compress {name} [-h]")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: lightning-compress"),
        (["--versoin"], "lightning-compress: error: "),
        (
            ["rnu"],
            f"error: unknown command 'rnu'; accepted are {', '.join(COMMANDS)}; did you mean 'run'?",
        ),
        (
            ["zzz"],
            f"error: unknown command 'zzz'; accepted are {', '.join(COMMANDS)}\n",
        ),
        (["run"], "error: the following arguments are required: RECIPE.yaml"),
        (
            ["run", "a.yaml", "python", "train.py", "--epochs", "3"],
            "error: the command to run, 'python train.py --epochs 3', comes behind --, as in: "
            "lightning-compress run a.yaml -- python train.py --epochs 3\n",
        ),
        (
            ["run", "--set", "A=1", "B=2", "a.yaml", "--", "python", "train.py"],
            "error: RECIPE.yaml comes first, before --set, as in: "
            "lightning-compress run a.yaml --set A=1 B=2 -- python train.py\n",
        ),
        (
            ["sweep", "--vary", "A=1..2", "--", "make"],
            "error: RECIPE.yaml comes first, before --vary, as in: "
            "lightning-compress sweep RECIPE.yaml --vary A=1..2 -- make\n",
        ),
        (["plan", "--set", "A=1"], "lightning-compress plan RECIPE.yaml --set A=1 -- COMMAND\n"),
        (["run", "a.yaml", "--fast", "--", "python"], "error: unrecognized arguments: --fast"),
        (["run", "a.yaml", "--fast"], "error: unrecognized arguments: --fast"),
        (["demo", "--data", "mnist"], "invalid choice: 'mnist'"),
        (["demo", "--", "python"], "error: 'demo' takes no command behind --"),
    ],
)
def test_bad_usage(capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_the_demo_gets_its_options_and_gives_the_exit_code(monkeypatch):
    calls = []
    demo = ModuleType("lightning_compress.demo")
    demo.run_demo = lambda **options: calls.append(options) or 1
    monkeypatch.setitem(sys.modules, "lightning_compress.demo", demo)
    assert main(["demo"]) == 1
    assert main(["demo", "--data", "fashion-mnist", "--out", "there"]) == 1
    assert main(["demo", "--structured"]) == 1
    assert calls == [
        {"data": "digits", "out": "compress-demo", "structured": False},
        {"data": "fashion-mnist", "out": "there", "structured": False},
        {"data": "digits", "out": "compress-demo", "structured": True},
    ]


def test_the_process_arguments_are_the_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-compress", "rum"])
    assert main() == 2
    assert "did you mean 'run'?" in capsys.readouterr().err


def test_ctrl_c_in_any_command_is_told_and_has_its_code(monkeypatch, capsys):
    def show(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_compress.commands.recipes.show", show)
    assert main(["recipes"]) == 130
    assert capsys.readouterr().err == "lightning-compress recipes: interrupted\n"
    monkeypatch.setattr("lightning_compress.cli.import_module", show)  # while heavy modules are imported
    assert main(["fit", "--config", "c.yaml"]) == 130
    assert capsys.readouterr().err == "lightning-compress fit: interrupted\n"


def test_how_a_command_ends_is_said_where_it_belongs(capsys):
    assert ended("plan", 0, "two\nlines") == 0
    assert ended("export", 1, "two\n   lines") == 1
    assert capsys.readouterr() == ("lightning-compress plan: two\nlines\n", "lightning-compress export: two lines\n")


RECIPES = "lightning_compress.commands.recipes"


@pytest.mark.parametrize(
    ("arguments", "modules"), [(["--help"], OURS), (["recipes", "int8"], sorted([*OURS, RECIPES]))]
)
def test_what_only_prints_imports_nothing_heavy(arguments, modules):
    code = (
        f"import sys; from lightning_compress.cli import main; main({arguments})\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'lightning', 'yaml', 'onnx'}))\n"
        "print(sorted(name for name in sys.modules if name.startswith('lightning_compress')))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.splitlines()[-2:] == ["[]", str(modules)]


def test_a_pipe_that_is_closed_early_is_no_error():
    code = "from lightning_compress.cli import main; import sys; sys.exit(main(['recipes', 'dcil']))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert (child.stderr.read(), child.wait()) == (b"", 0)
