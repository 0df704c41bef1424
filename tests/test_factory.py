"""The attachment in the child: off by default, one fit, the right place in the list, and what it tells the parent."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from pages import ROOT
from scripts import definitions, script

import lightning_compress
from lightning_compress import CompressionReport, DistillationCallback
from lightning_compress._factory import callbacks
from lightning_compress.commands.attachment import (
    KEPT_OFFLINE,
    Events,
    Order,
    RecipeAttachment,
    attachments,
    class_names,
)
from lightning_compress.export.evaluate import RUN_VARIABLE
from lightning_compress.recipe import RecipeError

KD = """
version: 1
callbacks:
- {class_path: DistillationCallback, init_args: {teacher: {class_path: torch.nn.Linear, init_args: {in_features: 8, out_features: 3}}}}
- {class_path: CompressionReport, init_args: {latency: false}}
"""  # noqa: E501


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def project(request):
    return definitions(request.param)


@pytest.fixture
def lightning_project():
    return definitions("lightning.pytorch")


@pytest.fixture
def order(tmp_path, monkeypatch):
    """What `run` would set in the child's environment, with a recipe that distils."""
    found = Order("my.yaml", str(tmp_path), str(tmp_path / "events.jsonl"))
    monkeypatch.setenv(RUN_VARIABLE, found.to_json())
    monkeypatch.setenv("WANDB_MODE", "disabled")  # left as it is
    monkeypatch.chdir(tmp_path)
    found.held.write_text(KD)
    return found


def names(trainer):
    return [type(callback).__name__ for callback in trainer.callbacks]


def fit(trainer, module, project, **arguments):
    trainer.fit(module, project.loader(), project.loader(), **arguments)


def events(order, kind):
    return [event for event in Events(order.events).read() if event["event"] == kind]


def ours(trainer):
    return [callback for callback in trainer.callbacks if type(callback).__module__.startswith("lightning_compress")]


# Off


def test_without_the_variable_there_is_nothing(monkeypatch, project):
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    assert callbacks() == []
    assert ours(project.trainer()) == []


BROKEN = {
    "__init__.py": "raise ImportError('broken on purpose')",
    "commands/attachment.py": "import torch.a_part_that_is_not_there",
}


@pytest.fixture(params=BROKEN)
def broken_package(request, tmp_path):
    """This package as it is installed, in front of all others on the path, but broken beyond its entry point."""
    path = tmp_path / "path"
    metadata = path / f"lightning_compress-{lightning_compress.__version__}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Name: lightning-compress\nVersion: {lightning_compress.__version__}\n")
    project = (ROOT / "pyproject.toml").read_text()
    groups = re.findall(r'^\[project\.entry-points\."(.+)"\]\n(\w+) = "(.+)"$', project, flags=re.MULTILINE)
    assert len(groups) == 2
    (metadata / "entry_points.txt").write_text("".join(f"[{group}]\n{name} = {at}\n" for group, name, at in groups))
    (path / "_lightning_compress_factory.py").write_text((ROOT / "lightning_compress" / "_factory.py").read_text())
    (path / "lightning_compress" / "commands").mkdir(parents=True)
    for folder in ("", "commands"):
        (path / "lightning_compress" / folder / "__init__.py").touch()
    (path / "lightning_compress" / request.param).write_text(BROKEN[request.param])
    return path


@pytest.mark.slow
def test_a_broken_package_hurts_no_other_training(broken_package, tmp_path):
    body = textwrap.dedent("""
        import os, sys
        fresh = trainer()
        fresh.fit(Lit(), loader())
        print(fresh.global_step, [name for name in sorted(sys.modules) if "lightning_compress" in name])
        os.environ["LIGHTNING_COMPRESS_RUN"] = "{}"
        try:
            trainer()
        except ImportError as error:
            print(error)
    """)
    (tmp_path / "train.py").write_text(script(body))
    environment = {**os.environ, "PYTHONPATH": str(broken_package)}
    environment.pop(RUN_VARIABLE, None)
    child = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    steps, error = child.stdout.splitlines()[-2:]
    assert steps == "4 ['_lightning_compress_factory']"
    assert error in ("broken on purpose", "No module named 'torch.a_part_that_is_not_there'")


@pytest.mark.parametrize(
    "value", ["", "1", "[]", '{"recipe": "a"}', '{"recipe": "a", "cwd": "", "events": "", "b": 1}']
)
def test_a_variable_that_somebody_else_set_is_an_error(monkeypatch, value):
    monkeypatch.setenv(RUN_VARIABLE, value)
    with pytest.raises(RuntimeError, match=r"LIGHTNING_COMPRESS_RUN holds .* did not write; unset it"):
        callbacks()


# The place in the list


def test_the_callbacks_come_behind_the_attachment_and_before_checkpoints(order, project, tmp_path):
    package = import_module(project.L.__name__)
    checkpoint = package.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = project.trainer(enable_checkpointing=True, callbacks=[checkpoint, package.callbacks.LambdaCallback()])
    assert names(trainer) == ["LambdaCallback", "RecipeAttachment", "ModelCheckpoint"]
    fit(trainer, project.Lit(), project)
    assert names(trainer) == [
        "LambdaCallback", "RecipeAttachment", "DistillationCallback", "CompressionReport", "ModelCheckpoint",
    ]  # fmt: skip
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    assert saved["callbacks"]["DistillationCallback[kd]"]["arguments"]["temperature"] == 4.0
    assert saved["state_dict"].keys() == project.Lit().state_dict().keys()
    assert "compress/kd/val_loss" in trainer.callback_metrics
    assert [event["event"] for event in Events(order.events).read()] == ["factory", "fit", "done"]
    with warnings.catch_warnings():  # Lightning complains about callbacks that a checkpoint knows and the Trainer not
        warnings.filterwarnings("error", message=".*callbacks used to create the checkpoint.*")
        assert len(trainer.validate(project.Lit(), project.loader(), ckpt_path="best", verbose=False)) == 1


def test_settings_change_what_is_attached_and_what_the_report_says(order, lightning_project, monkeypatch):
    changed = replace(order, settings=["kd.temperature=2", "CompressionReport.name=table"])
    monkeypatch.setenv(RUN_VARIABLE, changed.to_json())
    trainer = lightning_project.trainer()
    fit(trainer, lightning_project.Lit(), lightning_project)
    kd, report = ours(trainer)[1:]
    assert (kd.temperature, report.name) == (2.0, "table")
    written = json.loads(report.files.json.read_text())["recipe"]["callbacks"]
    assert [entry["init_args"].get("temperature") for entry in written] == [2, None]


def test_it_equals_callbacks_given_in_python(order, lightning_project, monkeypatch):
    project = lightning_project
    torch.manual_seed(3)
    attached = project.Lit()
    fit(project.trainer(), attached, project)
    monkeypatch.delenv(RUN_VARIABLE)
    torch.manual_seed(3)
    given = project.Lit()
    teacher = torch.nn.Linear(8, 3)
    fit(project.trainer(callbacks=[DistillationCallback(teacher)]), given, project)
    differences = [
        float((a - b).detach().abs().max()) for a, b in zip(attached.parameters(), given.parameters(), strict=True)
    ]
    assert differences == [0.0] * 4


def test_a_callback_of_another_package_can_log(order, lightning_project, tmp_path, monkeypatch):
    (tmp_path / "own_callback.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Mine(Callback):\n"
        "    def on_train_batch_end(self, *args):\n"
        "        self.log('mine', 7.0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    order.held.write_text("version: 1\ncallbacks: [{class_path: own_callback.Mine}]")
    trainer = lightning_project.trainer(callbacks=[CompressionReport(latency=False)])
    fit(trainer, lightning_project.Lit(), lightning_project)
    assert float(trainer.callback_metrics["mine"]) == 7.0
    assert names(trainer).count("CompressionReport") == 1  # the script's own is enough


def test_a_name_that_the_script_has_taken(order, lightning_project):
    project = lightning_project
    trainer = project.trainer(callbacks=[DistillationCallback(torch.nn.Linear(8, 3))])
    with pytest.raises(RecipeError, match=r"my.yaml: there are two callbacks DistillationCallback\[kd\]"):
        fit(trainer, project.Lit(), project)
    assert "two callbacks DistillationCallback[kd]" in events(order, "failed")[0]["message"]


# Which fit


def test_a_second_fit_is_an_error_that_names_apply_to(order, project):
    fit(project.trainer(), project.Lit(), project)
    trainer = project.trainer()
    with pytest.raises(
        RecipeError, match=r"fits .*Other now, .* earlier fit already; .* apply_to: \{module: <class>\}"
    ):
        fit(trainer, project.Other(), project)
    assert names(trainer).count("DistillationCallback") == 0
    assert [len(events(order, kind)) for kind in ("factory", "fit", "done", "failed")] == [2, 2, 1, 1]


@pytest.mark.parametrize("name", ["Other", "untouched_lightning_pytorch.Other"])
def test_apply_to_a_class(order, lightning_project, name):
    project = lightning_project
    order.held.write_text(f"{KD}apply_to: {{module: {name}}}")
    first, second = project.trainer(), project.trainer()
    fit(first, project.Lit(), project)
    fit(second, project.Other(), project)
    assert [len(ours(trainer)) for trainer in (first, second)] == [1, 3]
    assert [event["attached"] for event in events(order, "fit")] == [False, True]
    with pytest.raises(RecipeError, match="apply_to"):
        fit(project.trainer(), project.Other(), project)


def test_apply_to_a_number_also_on_one_trainer(order, project):
    order.held.write_text(f"{KD}apply_to: {{fit: 2}}")
    trainer, seen = project.trainer(), []
    for epochs in (1, 2, 3):
        trainer.fit_loop.max_epochs = epochs
        fit(trainer, project.Lit(), project)
        seen.append(len(ours(trainer)))
    assert seen == [1, 3, 1]
    assert len(events(order, "done")) == 1


def test_a_number_counts_the_fits_of_the_class(order, lightning_project):
    project = lightning_project
    order.held.write_text(f"{KD}apply_to: {{module: Other, fit: 2}}")
    for module in (project.Other(), project.Lit(), project.Other(), project.Other()):
        fit(project.trainer(), module, project)
    assert [event["attached"] for event in events(order, "fit")] == [False, False, True, False]


def test_a_list_of_callbacks_that_serves_two_trainers(order, lightning_project):
    project = lightning_project
    order.held.write_text(f"{KD}apply_to: {{fit: 2}}")
    shared = [project.L.callbacks.LambdaCallback()]
    for _ in range(2):
        trainer = project.trainer(callbacks=shared)
        fit(trainer, project.Lit(), project)
    assert names(trainer).count("RecipeAttachment") == 2  # Lightning extended the user's list
    assert names(trainer).count("DistillationCallback") == 1
    assert [event["attached"] for event in events(order, "fit")] == [False, True]


def test_the_fits_of_a_tuner_are_not_counted(order, project):
    package = import_module(f"{project.L.__name__}.tuner")
    trainer = project.trainer(max_steps=4)
    module = project.Lit()
    module.learning_rate = 0.1
    package.Tuner(trainer).lr_find(module, project.loader(), num_training=3, update_attr=False)
    assert events(order, "fit") == []
    fit(trainer, module, project)
    assert [event["attached"] for event in events(order, "fit")] == [True]


def test_a_trainer_that_only_validates(order, project):
    trainer = project.trainer()
    trainer.validate(project.Lit(), project.loader(), verbose=False)
    assert [event["event"] for event in Events(order.events).read()] == ["factory"]
    assert len(ours(trainer)) == 1


def test_names_of_a_class_of_the_script(monkeypatch):
    cls = type("Net", (), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/somewhere/train.py", raising=False)
    assert class_names(cls) == ("__main__.Net", "Net", "train.Net")


# What the parent is told


@pytest.mark.parametrize("kind", ["WandbLogger", "Another"])
def test_who_is_not_logged_in_is_told_once_by_the_first_fit_with_such_a_logger(order, project, monkeypatch, kind):
    monkeypatch.setenv(KEPT_OFFLINE, "")  # to be put back
    failing = iter([True, False, False])  # it is offline then
    monkeypatch.setattr("lightning_compress.commands.attachment.wandb_would_fail", lambda: next(failing))
    package = project.L.__name__
    fields = {"_offline": False, "_wandb_init": {}}
    logger = type(kind, (import_module(f"{package}.loggers.logger").DummyLogger,), fields)()
    order.held.write_text(f"{KD}apply_to: {{module: Other}}")
    for loggers, told in ((False, 0), ([logger], int(kind == "WandbLogger")), ([logger], 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(project.trainer(logger=loggers), project.Lit(), project)
        assert sum("the run is kept offline" in str(warning.message) for warning in caught) == told
    assert os.environ["WANDB_MODE"] == "offline"


def test_an_event_that_was_not_written_to_its_end_is_passed_over(order):
    told = Events(order.events)
    assert told.read() == []
    told.append("factory")
    with open(order.events, "a") as file:
        file.write('{"event": "done", "exp')
    assert told.read() == [{"event": "factory"}]


def test_what_was_written(order, lightning_project, tmp_path):
    project = lightning_project
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "table").touch()  # a file here, and a folder where the command was called
    recipe = KD.replace("latency: false", "latency: false, path: table")
    order.held.write_text(f"{recipe}export: {{path: net.onnx, metric: val_loss, tolerance: 0.001}}")
    os.chdir(tmp_path / "elsewhere")  # as Hydra does
    fit(project.trainer(), project.Lit(), project)
    (done,) = events(order, "done")
    (export,) = done["exports"]
    assert (export["path"], export["metric"], export["failure"]) == (str(tmp_path / "net.onnx"), "val_loss", None)
    assert export["kept"]
    assert export["bytes"] == (tmp_path / "net.onnx").stat().st_size
    assert export["in_file"] == pytest.approx(export["in_module"], abs=1e-4)
    assert done["reports"] == [str(tmp_path / "table")]


def test_what_was_checked_and_not_kept(order, lightning_project, tmp_path):
    order.held.write_text("version: 1\nexport: {path: net.onnx}")
    fit(lightning_project.trainer(fast_dev_run=1), lightning_project.Lit(), lightning_project)
    (export,) = events(order, "done")[0]["exports"]
    assert (export["kept"], export["failure"]) == (False, None)
    assert not (tmp_path / "net.onnx").exists()


def test_a_tolerance_that_is_exceeded(order, lightning_project):
    project = lightning_project
    order.held.write_text(f"{KD}export: {{path: net.onnx, metric: val_round, tolerance: 0}}")
    with pytest.warns(UserWarning, match="beyond the tolerance of 0"):
        fit(project.trainer(), project.Lit(), project)
    (export,) = events(order, "done")[0]["exports"]
    assert "the difference 1 is beyond the tolerance of 0" in export["failure"]


@pytest.mark.parametrize("exception", [RuntimeError("the disk is full"), KeyboardInterrupt()])
def test_a_fit_that_fails(order, lightning_project, exception):
    project = lightning_project

    class Failing(project.Lit):
        def training_step(self, batch, batch_idx):
            raise exception

    with pytest.raises((RuntimeError, SystemExit)):
        fit(project.trainer(), Failing(), project)
    (failed,) = events(order, "failed")
    assert failed["message"] == {RuntimeError: "RuntimeError: the disk is full"}.get(
        type(exception), "KeyboardInterrupt"
    )
    assert events(order, "done") == []


def test_a_failing_fit_that_the_recipe_does_not_mean_is_not_ours(order, lightning_project):
    project = lightning_project
    order.held.write_text(f"{KD}apply_to: {{module: Other}}")

    class Failing(project.Lit):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        fit(project.trainer(), Failing(), project)
    assert [event["event"] for event in Events(order.events).read()] == ["factory", "fit"]


def test_a_teacher_that_cannot_be_built_stops_before_the_first_batch(order, lightning_project):
    project = lightning_project
    order.held.write_text(
        "version: 1\ncallbacks: [{class_path: DistillationCallback, init_args: {teacher: torch.nn.Lineer}}]"
    )
    module = project.Lit()
    before = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(RecipeError, match=r"my.yaml: callbacks\[0\] \(DistillationCallback\): teacher names"):
        fit(project.trainer(), module, project)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert "'Lineer'; did you mean 'Linear'?" in events(order, "failed")[0]["message"]


def test_events_are_whole_lines(tmp_path):
    path = tmp_path / "events.jsonl"
    assert Events(str(path)).read() == []
    Events(str(path)).append("fit", module="A", metric=float("nan"))
    Events(str(path)).append("done", text="line\nline")
    assert [event["event"] for event in Events(str(path)).read()] == ["fit", "done"]
    assert json.loads(path.read_text().splitlines()[-1]) == {"event": "done", "text": "line\nline"}


def test_other_ranks_say_nothing_when_a_trainer_is_made(order, monkeypatch):
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    (attachment,) = attachments(os.environ[RUN_VARIABLE])
    assert isinstance(attachment, RecipeAttachment)
    assert Events(order.events).read() == []


def told_by_another(order, script, *, rank=0, done=False):
    """Another process has begun a fit with the recipe, and may have come to its end."""
    events = Events(order.events)
    events.append("fit", module="Lit", matches=True, attached=True, script=script, rank=rank)
    if done:
        events.append("done", exports=[], reports=[], script=script)


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(("rank", "done", "apply_to"), [(1, True, "{fit: 1}"), (0, False, "{module: Lit}")])
def test_each_process_counts_the_fits_of_its_own(order, lightning_project, rank, done, apply_to):
    """Another rank has repeated a fit that comes before the one that is meant; or another attempt has died."""
    order.held.write_text(f"{KD}apply_to: {apply_to}")
    told_by_another(order, dead_process(), rank=rank, done=done)
    trainer = lightning_project.trainer()
    fit(trainer, lightning_project.Lit(), lightning_project)
    assert "DistillationCallback" in names(trainer)


@pytest.mark.parametrize("runs", [True, False])
def test_a_fit_in_another_process_has_the_recipe(order, lightning_project, runs):
    order.held.write_text(f"{KD}apply_to: {{fit: 1}}")
    told_by_another(order, os.getppid() if runs else dead_process(), done=not runs)
    trainer = lightning_project.trainer()
    with pytest.raises(RecipeError, match=r"a fit of .*Lit begins, and a fit in another process .* has the recipe"):
        fit(trainer, lightning_project.Lit(), lightning_project)
    assert "DistillationCallback" not in names(trainer)
    assert len(events(order, "failed")) == 1


def test_the_first_of_two_processes_has_the_recipe(order, lightning_project):
    """They may begin at the same time: what counts is whose line came first."""
    read = Events.read

    def late(self):
        if not read(self)[1:]:  # when ours is decided, before it is told
            return read(self)
        told_by_another(order, os.getppid())
        return read(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Events, "read", late)
        fit(lightning_project.trainer(), lightning_project.Lit(), lightning_project)
    assert len(events(order, "done")) == 1
