"""The command: what it measures, writes and says, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import math
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from disks import room_for
from torch import nn

from lightning_compress.commands.sensitivity import command
from lightning_compress.commands.sensitivity.changes import applied
from lightning_compress.commands.sensitivity.journal import NAME
from lightning_compress.recipe import load_recipe

from . import projects


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a project and its checkpoint; `run(...)` is the command there."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("model: stands for itself\n")
    projects.checkpoint("last.ckpt")
    made = []

    def load_project(configs, *, model=None, data=None, arguments=()):
        made.append(projects.project(run.module()))
        return made[-1]

    def run(*arguments, given=("last.ckpt", "--config", "config.yaml")):
        return command.sensitivity(projects.options(*given, *arguments))

    run.made, run.module = made, projects.Lit
    monkeypatch.setattr("lightning_compress.commands.project.load_project", load_project)
    return run


@pytest.fixture
def validations(monkeypatch):
    """How many whole validations were run."""
    counted = []
    original = command.RepeatedValidation.run

    def run(self, *, batches=None):
        counted.extend([1] * (batches is None))
        return original(self, batches=batches)

    monkeypatch.setattr(command.RepeatedValidation, "run", run)
    return counted


def entries():
    return [json.loads(line) for line in Path("sensitivity", NAME).read_text().splitlines()]


def entries_that_are_whole():
    return [line for line in Path("sensitivity", NAME).read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.sample
def test_each_number_is_that_of_a_validation_with_this_layer_changed(project, capsys, monkeypatch):
    monkeypatch.setattr(projects.Data, "setups", [])
    assert project("--method", "bits", "filters", "--levels", "bits=2", "filters=.5", "--metric", "val_loss") == 0
    out, found = capsys.readouterr().out, json.loads(Path("sensitivity/sensitivity.json").read_text())
    assert (found["metric"], found["mode"], found["measured"], found["planned"]) == ("val_loss", "min", 5, 5)
    assert [own["name"] for own in found["layers"]] == ["net.conv", "net.hidden", "net.head"]
    assert projects.Data.setups == ["fit"]  # once, whatever is measured
    [made] = project.made
    before = {name: value.clone() for name, value in projects.Lit().state_dict().items()}
    assert all(torch.equal(value, before[name]) for name, value in made.module.state_dict().items())
    for name, method, level in (("net.conv", "bits", 2), ("net.conv", "filters", 0.5), ("net.head", "bits", 2)):
        module = projects.Lit()
        [layer] = [own for own in found["layers"] if own["name"] == name]
        with applied(module, command.Layer(**{key: layer[key] for key in layer if key != "losses"}), method, level):
            [metrics] = projects.trainer().validate(module, projects.Data(), verbose=False)
        loss = layer["losses"][method][f"{level:g}"]
        assert loss == pytest.approx(metrics["val_loss"] - found["plain"]["val_loss"], abs=1e-6)
        assert abs(loss) > 1e-4
        assert f"{loss:.4f}" in out
    assert "judged by 'val_loss', lower is better; 5 changes, 0 measured before" in out
    markdown = Path("sensitivity/sensitivity.md").read_text()
    assert "| net.hidden | 768 | 768 |" in markdown
    assert Path("sensitivity/sensitivity.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.sample
def test_it_goes_on_where_it_was(project, validations, capsys):
    assert project("--method", "bits", "--levels", "bits=8,4") == 0
    assert len(validations) == 1 + 6
    first = Path("sensitivity/sensitivity.json").read_text()
    path = Path("sensitivity", NAME)
    path.write_bytes(path.read_bytes()[:-9])  # killed while it wrote
    assert project("--method", "bits", "--levels", "bits=8,4") == 0
    assert len(validations) == 1 + 6 + 1
    assert Path("sensitivity/sensitivity.json").read_text() == first
    assert "6 changes, 5 measured before" in capsys.readouterr().out
    assert project("--method", "bits", "sparsity", "--levels", "bits=8,3", "sparsity=.5", "--metric", "val_loss") == 0
    assert len(validations) == 1 + 6 + 1 + 3 + 3


@pytest.mark.slow
def test_a_full_disk_is_told_and_it_goes_on_with_room(project, validations, capsys):
    with room_for(700):
        assert project("--method", "bits", "--levels", "bits=8,4") == 2
    assert "sensitivity: [Errno 27] File too large: 'sensitivity/sensitivity.jsonl'" in capsys.readouterr().err
    measured = len(validations)
    assert 1 < measured < 1 + 6
    assert len(entries_that_are_whole()) == measured  # the header, and all but the last
    with room_for(3000):
        assert project("--method", "bits", "--levels", "bits=8,4") == 2
    told = capsys.readouterr().err
    assert "File too large: 'sensitivity/sensitivity." in told
    assert "jsonl" not in told
    assert len(validations) == 1 + 6 + 1
    assert not list(Path("sensitivity").glob(".*"))
    assert project("--method", "bits", "--levels", "bits=8,4") == 0
    assert len(validations) == 1 + 6 + 1


def test_what_takes_long_before_the_first_change_gives_a_sign(project, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    said = []

    @contextmanager
    def bar(_, what, total):
        said.append(what)
        yield lambda: None

    monkeypatch.setattr("lightning_compress.mechanisms.signs._tqdm", bar)
    assert project("--method", "sparsity", "--levels", "sparsity=.5") == 0
    assert said == ["validating the network as it is", "what each choice costs"]


@pytest.mark.sample
def test_another_checkpoint_or_config_is_refused(project, capsys):
    assert project("--method", "bits", "--levels", "bits=8") == 0
    torch.manual_seed(9)
    module = projects.Lit()
    nn.init.normal_(module.net.conv.weight)
    projects.checkpoint("last.ckpt", module)
    assert project("--method", "bits", "--levels", "bits=8") == 2
    assert "holds measurements of another checkpoint: give --restart" in capsys.readouterr().err
    assert project("--method", "bits", "--levels", "bits=8", "--restart") == 0
    assert project("--method", "bits", "--levels", "bits=8", "--limit-batches", "1") == 2
    assert "another limit-batches" in capsys.readouterr().err


def test_the_line_that_runs_a_recipe_is_whole_and_names_the_classes(project):
    given = ("--class", "a.long.package.of.Net", "--data-class", "a.long.package.of.Data", "--config", "config.yaml")
    assert project("--method", "bits", "--levels", "bits=8", *given) == 0
    [line] = [line for line in Path("sensitivity/recipe.yaml").read_text().splitlines() if "To run it" in line]
    configs = "--config config.yaml --config config.yaml"
    assert line == (
        "# To run it: lightning-compress run sensitivity/recipe.yaml -- lightning-compress fit "
        f"{configs} --class a.long.package.of.Net --data-class a.long.package.of.Data "
        "--ckpt_path last.ckpt --trainer.max_epochs 3"
    )


@pytest.mark.sample
def test_when_the_time_is_up(project, monkeypatch, capsys):
    now = iter(range(1000))
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: 60.0 * next(now)))
    assert project("--method", "bits", "--minutes", "3") == 0
    assert [(own["layer"], own["level"]) for own in entries()[2:]] == [("net.hidden", 4), ("net.conv", 4)]
    out = capsys.readouterr().out
    assert "the time was up after 2 of 12 changes; the same command goes on" in out
    recipe = Path("sensitivity/recipe.yaml").read_text()
    assert "2 of 12 changes measured. What was not measured stays as it is." in " ".join(recipe.split("\n#   "))
    assert load_recipe("sensitivity/recipe.yaml").callbacks[0]["init_args"]["exclude"] == ["net.head"]


@pytest.mark.sample
def test_ctrl_c(project, capsys):
    class Interrupted(projects.Lit):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if len(entries()) == 4:
                signal.raise_signal(signal.SIGINT)

    project.module = Interrupted
    handler = signal.getsignal(signal.SIGINT)
    assert project("--method", "bits") == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert "interrupted; what was measured is in sensitivity/sensitivity.jsonl, and the same" in capsys.readouterr().err
    assert len(entries()) == 4
    project.module = projects.Lit
    assert project("--method", "bits") == 0
    assert len(entries()) == 2 + 12


def test_a_failing_validation_is_no_bad_usage(project):
    def fail():
        raise ValueError("the user's")

    class Failing(projects.Lit):
        def validation_step(self, batch, batch_idx):
            fail()

    project.module = Failing
    with pytest.raises(ValueError, match="the user's"):
        project()


def test_a_fault_of_our_own_is_no_bad_usage(project, monkeypatch):
    monkeypatch.setattr(command, "costs_of", lambda *_: int("ours"))
    with pytest.raises(ValueError, match="ours"):
        project()


@pytest.mark.sample
def test_a_change_that_gives_no_number_is_never_suggested(project, capsys):
    class Fragile(projects.Lit):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("val_odd_loss", math.nan if (self.net.head.weight == 0).any() else 1.0)

    project.module = Fragile
    assert project("--method", "sparsity", "--metric", "val_odd_loss", "--budget", "bytes=50%") == 0
    assert capsys.readouterr().out.count("nan") == 3
    found = json.loads(Path("sensitivity/sensitivity.json").read_text())
    assert found["layers"][2]["losses"]["sparsity"] == {"0.5": None, "0.75": None, "0.9": None}
    [suggestion] = found["suggestions"]
    assert suggestion["levels"]["net.head"] is None
    assert suggestion["predicted"] <= suggestion["limit"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "macs=50%"], "--budget macs=50% needs --method filters; measured are bits, sparsity"),
        (["--budget", "25%"], "--budget 25%: must be bytes=25%"),
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--limit-batches", "0"], "--limit-batches must be at least 1, got 0"),
        (["--metric", "val_ac"], "--metric 'val_ac' is not among the metrics of the validation, 'val_loss', 'val_acc'"),
        (["--layers", "net.cnv"], "layers has 'net.cnv', which matches no module; did you mean 'net.conv'?"),
        (["--exclude", "nothing"], "exclude has 'nothing', which matches no module"),
        (["--out", "config.yaml"], "--out 'config.yaml' cannot be written: "),
        (["--method", "filters", "--layers", "net.head"], "--method filters fits none of the selected layers (Linear)"),
        (["--method", "bits", "--budget", "bytes=1%"], "and the smallest that these levels reach is "),
        (["--method", "filters", "--levels", "filters=.1", "--budget", "macs=50%"], "reach is 1.20 k, 95.9%"),
        (["--config", "missing.yaml"], "'missing.yaml' is not there"),
    ],
)
def test_bad_usage(project, validations, capsys, arguments, message):
    assert project(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lightning-compress sensitivity: ")
    assert message in captured.err
    assert captured.out == ""
    assert len(validations) <= 1


def test_weights_that_are_not_finite(project, validations, capsys):
    broken = projects.Lit()
    nn.init.constant_(broken.net.hidden.weight, math.nan)
    projects.checkpoint("last.ckpt", broken)
    assert project("--method", "bits") == 2
    message = "the weights in 'last.ckpt' are not finite, so there is nothing to measure: NaN or infinity in 1 of 3, "
    assert f"{message}'net.hidden.weight'\n" in capsys.readouterr().err
    assert validations == []
    assert not Path("sensitivity").exists()
    assert project("--method", "bits", "--levels", "bits=8", "--exclude", "net.hidden", "--metric", "val_loss") == 2
    assert "'val_loss' of the checkpoint is nan, before anything was changed" in capsys.readouterr().err


@pytest.mark.parametrize("given", [("lost.ckpt", "--config", "config.yaml"), ("lost.ckpt",)])
def test_a_file_that_is_not_there_is_told_before_anything_is_built(project, capsys, given):
    assert project(given=given) == 2
    assert "'lost.ckpt' is not there" in capsys.readouterr().err
    assert project.made == []
    Path("lost.ckpt").write_text("no checkpoint")
    assert project(given=("lost.ckpt", "--config", "config.yaml")) == 2
    assert "lost.ckpt" in capsys.readouterr().err
    assert project.made == []


def test_other_bad_input(project, capsys):
    assert project(given=["last.ckpt"]) == 2
    assert "--config is missing" in capsys.readouterr().err
    assert project(given=["lost.ckpt", "--config", "config.yaml"]) == 2
    assert "'lost.ckpt' is not there" in capsys.readouterr().err
    torch.save({"state_dict": nn.Linear(1, 1).state_dict()}, "last.ckpt")
    assert project() == 2
    assert "checkpoint 'last.ckpt' does not fit Lit: " in capsys.readouterr().err
    wide = projects.Lit()
    wide.net.head = nn.Linear(12, projects.CLASSES)
    projects.checkpoint("last.ckpt", wide)
    assert project() == 2
    assert "size mismatch for net.head.weight" in capsys.readouterr().err
    projects.checkpoint("last.ckpt")

    class Without(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = projects.Net()

    project.module = Without
    assert project() == 2
    assert "Without has no validation_step, so there are no metrics to compute" in capsys.readouterr().err
    assert not Path("sensitivity").exists()
