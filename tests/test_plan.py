"""``lightning-compress plan``: what it says, what it leaves alone, and how a fit ends with its first backward pass."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripts import script
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from lightning_compress.cli import main
from lightning_compress.commands import plan
from lightning_compress.commands.attachment import Events, Order
from lightning_compress.commands.foresight import PlanAttachment
from lightning_compress.export.evaluate import RUN_VARIABLE

FACTORY = {"event": "factory"}
FIT = {"event": "fit", "module": "A", "matches": True, "attached": True, "script": 1}
FAILED = {"event": "failed", "message": "ValueError: layers has 'nix'"}


def said(**changes):
    """What the child tells of one callback, as changed."""
    intent = {"technique": "DPFCallback", "takes": [], "left": {}, "aims": {}, "student": [], "pairs": [], "notes": []}
    return {**intent, "share_of_parameters": None, "share_of_macs": None, **changes}


def planned(**changes):
    found = {"module": "Lit", "parameters": 1234, "macs": None, "callbacks": {}, "files": [], "warnings": []}
    step = {"passes": 1, "teachers": 0, "times": 1.0}
    return {"event": "planned", **found, "step": step, "losses": {"task": 1.0, "terms": {}}, **changes}


# What the exit code and the text say


@pytest.mark.parametrize(
    ("events", "child", "code", "message"),
    [
        ([FACTORY, FIT, FAILED], 1, 1, "the command ended with exit code 1; the fit failed: ValueError: layers has"),
        ([FACTORY, FIT, FAILED], 79, 1, "the fit failed: ValueError: layers has 'nix'"),
        ([FACTORY, FIT, FAILED], 0, 1, "the fit failed: ValueError: layers has 'nix'"),
        ([FACTORY, FIT], 7, 7, "the command ended with exit code 7"),
        ([FACTORY, FIT], 139, 139, "the command ended with exit code 139 (SIGSEGV)"),
        ([FACTORY], 0, 1, "the command ended well, but no fit took the recipe: its Trainer never fitted"),
        ([], 0, 2, "the command ended well, but no Trainer in it asked for the recipe: either it made no Trainer"),
        ([], 3, 3, "the command ended with exit code 3"),
        ([FACTORY, FIT, planned()], 0, 0, "what the recipe would do to Lit (1.23 k parameters)"),
        ([FACTORY, FIT, planned()], 79, 0, "what the recipe would do to Lit (1.23 k parameters)"),
    ],
)
def test_what_events_come_to(events, child, code, message):
    own, text = plan.outcome(events, child)
    assert own == code
    assert text.startswith(message)


def test_the_text_of_a_plan(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pruned = said(
        takes=["a", "b", "c", "d", "e"],
        left={"head": "excluded", "table": "not selected", "f": "excluded"},
        aims={"sparsity": 0.9, "schedule": "cubic"},
        share_of_parameters=0.05,
        share_of_macs=0.99,
    )
    distilled = said(
        technique="AttentionTransferCallback", student=["net"], pairs=[["one", "two"]], notes=["the teacher is a Net"]
    )
    alone = said(technique="PSGDCallback", takes=[""])
    exported = {"path": str(tmp_path / "a.onnx"), "precision": "int8", "bytes": 12_340, "compressed": 2_000}
    unknown = {"path": "b.onnx", "precision": "fp32", "bytes": None, "compressed": None}
    found = planned(
        macs=2_500_000,
        callbacks={"dpf": pruned, "at": distilled, "psgd": alone},
        files=[exported, unknown],
        step={"passes": 2, "teachers": 1, "times": 2.335},
        losses={"task": 0.25, "terms": {"at": 12.5}},
        warnings=["beware"],
    )
    assert plan.lines_of(found) == [
        "what the recipe would do to Lit (1.23 k parameters, 2.50 M multiply-accumulates a sample)",
        "",
        "dpf (DPFCallback)",
        "  takes     5 layers, 'a', 'b', 'c', 'd' and 1 more (5% of the parameters, 99% of the multiply-accumulates)",
        "  leaves    2 layers, 'head', 'f': excluded",
        "  leaves    'table': not selected",
        "  aims      sparsity 0.9, schedule cubic",
        "",
        "at (AttentionTransferCallback)",
        "  student   'net'",
        "  pairs     'one' from 'two'",
        "  note      the teacher is a Net",
        "",
        "psgd (PSGDCallback)",
        "  takes     the module itself",
        "",
        "files",
        "  a.onnx  int8, about 12.3 kB, 2.00 kB compressed",
        "  b.onnx  fp32, of unknown size",
        "",
        "each step",
        "  the step runs twice, with 1 forward of a teacher: about 2.33 times the multiply-accumulates of a plain one",
        "",
        "losses of the first batch, with their weights",
        "  task  0.25",
        "  at    12.5",
        "",
        "warnings",
        "  beware",
        "",
        "nothing was trained, and nothing written",
    ]


@pytest.mark.parametrize(
    ("passes", "teachers", "times", "text"),
    [
        (1, 0, 1.0, "the step runs once, as it is"),
        (1, 2, 1.5, "the step runs once, with 2 forwards of a teacher: about 1.5 times the multiply-accumulates of"),
        (2, 0, None, "the step runs twice, as it is"),
        (3, 1, None, "the step runs 3 times, with 1 forward of a teacher"),
    ],
)
def test_the_cost_of_a_step(passes, teachers, times, text):
    lines = plan.lines_of(planned(step={"passes": passes, "teachers": teachers, "times": times}))
    assert any(line.strip().startswith(text) for line in lines)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project as the working directory, and how to plan a script of it with a recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(RUN_VARIABLE, raising=False)

    def run(recipe, text, *command):
        Path("recipe.yaml").write_text(recipe)
        Path("train.py").write_text(text)
        return main(["plan", "recipe.yaml", "--", *(command or [sys.executable]), "train.py"])

    return run


def files():
    return sorted(str(path) for path in Path().rglob("*") if "__pycache__" not in path.parts)


def test_nothing_is_started_with_a_bad_recipe_or_without_a_command(project, capsys):
    assert project("version: 1\nexport: {path: a.pt}", "open('mark', 'w')") == 2
    assert main(["plan", "recipe.yaml"]) == 2
    err = capsys.readouterr().err
    assert "lightning-compress plan: path must end in '.onnx', got 'a.pt'" in err
    assert "as in: lightning-compress plan recipe.yaml -- python train.py" in err
    assert not Path("mark").exists()


def test_the_child_is_told_the_mode_and_the_settings(project, capfd):
    shows = "import json, os; order = json.loads(os.environ['LIGHTNING_COMPRESS_RUN'])\n"
    assert project("version: 1\nexport: {path: a.onnx}", f"{shows}print(order['mode'])\nraise SystemExit(5)") == 5
    assert capfd.readouterr().out == "plan\n"


TELLS = """
import json, os, pathlib, signal, subprocess, sys, time
order = json.loads(os.environ["LIGHTNING_COMPRESS_RUN"])
with open(order["events"], "a") as file:
    file.write({event!r})
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path("pids").write_text(f"{{os.getpid()}} {{child.pid}}")
{before}
time.sleep(60)
"""


@pytest.mark.parametrize("before", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"])
@pytest.mark.parametrize(("event", "code"), [(planned(), 0), (FAILED, 1)])
@pytest.mark.sample
def test_a_command_that_goes_on_after_the_plan_is_ended(project, monkeypatch, event, code, before):
    monkeypatch.setattr("lightning_compress.commands.run.GRACE", 0.5)
    text = TELLS.format(event=json.dumps(event) + "\n", before=before)
    assert project("version: 1\nexport: {path: a.onnx}", text) == code
    pids = [int(pid) for pid in Path("pids").read_text().split()]
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    status = Path(f"/proc/{pids[1]}/status")  # nobody may be there to wait for it, so it may stay as a zombie
    for _ in range(500):
        if not status.exists() or "zombie" in status.read_text():
            break
        time.sleep(0.01)
    else:
        pytest.fail("what the command has started goes on")


# Whole plans

RECIPE = """
version: 1
callbacks:
- class_path: DistillationCallback
  init_args: {teacher: {class_path: __main__.Net, init_args: {hidden: 64}}}
- class_path: DPFCallback
  init_args: {sparsity: 0.5, layers: [model], exclude: [model.2]}
"""
EXPORT = "export: {path: out/model.onnx, metric: val_loss}\n"
SAVES = """
from {package}.loggers import CSVLogger, TensorBoardLogger
from {package}.callbacks import LearningRateFinder, ModelCheckpoint, OnExceptionCheckpoint
from {package}.profilers import SimpleProfiler
class Own({package}.Callback):
    def on_fit_start(self, trainer, module):
        open(trainer.log_dir + "/own.txt", "w")
    def on_exception(self, trainer, module, error):
        open("exception.txt", "w")
fresh = trainer(
    logger=[CSVLogger("csv"), TensorBoardLogger("board")], enable_checkpointing=True, default_root_dir="root",
    profiler=SimpleProfiler("profile", "times"),
    callbacks=[
        ModelCheckpoint("kept", save_on_exception=True), OnExceptionCheckpoint("."), LearningRateFinder(), Own(),
    ],
)
try:
    fresh.fit(Lit(), loader(), loader())
finally:
    open("after.txt", "w")
"""


def plan_of(capfd):
    """What was shown at the end."""
    out = capfd.readouterr().out
    return out[out.index("lightning-compress plan: ") :]


@pytest.mark.slow
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_nothing_is_written_and_nothing_of_the_script_runs_after_it(project, capfd, package):
    saves = SAVES.format(package=package).replace(f"({package}.Callback)", "(L.Callback)")
    assert project(RECIPE + EXPORT, script(saves, package=package)) == 0
    assert files() == ["recipe.yaml", "train.py"]
    text = plan_of(capfd)
    assert "takes     'model.0' (65.6% of the parameters, 72.7% of the multiply-accumulates)" in text
    assert "leaves    'model.2': excluded" in text
    assert re.search(r"out/model.onnx  fp32, about 1\.\d+ kB, \S+ k?B compressed\n", text)
    assert "the step runs once, with 1 forward of a teacher: about 2.33 times" in text  # 64 of 16: 1 + 4 / 3
    assert "LearningRateFinder sets all callbacks aside" in text


@pytest.mark.slow
def test_a_config_of_lightning_cli_is_not_saved(project, capfd):
    body = "from lightning.pytorch.cli import LightningCLI\nimport sys\n"
    body += "sys.argv[1:] = ['fit', '--trainer.accelerator=cpu', '--trainer.enable_progress_bar=false']\n"
    body += "Lit.train_dataloader = lambda self: loader()\nLightningCLI(Lit, auto_configure_optimizers=False)"
    assert project(RECIPE, script(body)) == 0
    assert files() == ["recipe.yaml", "train.py"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "ddp_fork"])
def test_all_processes_of_a_distributed_training_end(project, capfd, strategy):
    body = f"trainer(strategy='{strategy}', devices=2, logger=True).fit(Lit(), loader(), loader())\nopen('after', 'w')"
    assert project(RECIPE + EXPORT, script(body, guarded=True)) == 0
    assert files() == ["recipe.yaml", "train.py"]
    assert plan_of(capfd).count("dpf (DPFCallback)") == 1
    assert project(RECIPE.replace("[model]", "[nix]"), script(body, guarded=True)) == 1
    assert "the fit failed: ValueError: layers has 'nix', which" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_shell_does_not_go_on(project, capfd):
    Path("train.py").write_text(script("trainer().fit(Lit(), loader())"))
    Path("recipe.yaml").write_text(RECIPE)
    command = f"{sys.executable} train.py && touch deployed"
    assert main(["plan", "recipe.yaml", "--", "sh", "-c", command]) == 0
    assert files() == ["recipe.yaml", "train.py"]
    assert "takes     'model.0'" in plan_of(capfd)


@pytest.mark.slow
def test_torchrun(project, capfd):
    body = "trainer(strategy='ddp', devices=2).fit(Lit(), loader(), loader())\nopen('after', 'w')"
    command = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "2"]
    assert project(RECIPE + EXPORT, script(body, guarded=True), *command) == 0
    assert files() == ["recipe.yaml", "train.py"]
    assert plan_of(capfd).count("dpf (DPFCallback)") == 1


@pytest.mark.slow
def test_a_teacher_that_is_trained_first_is_trained(project, capfd):
    body = (
        "teacher = Other()\ntrainer(max_epochs=3).fit(teacher, loader())\n"
        "torch.save(teacher.state_dict(), 'teacher.pt')\n"
        "trainer(logger=True).fit(Lit(), loader())\nopen('after', 'w')"
    )
    assert project(f"{RECIPE}apply_to: {{fit: 2}}", script(body)) == 0
    assert files() == ["recipe.yaml", "teacher.pt", "train.py"]
    assert "what the recipe would do to Lit" in plan_of(capfd)
    assert project(f"{RECIPE}apply_to: {{fit: 3}}", script(body)) == 1
    assert "the fits were, in order: __main__.Other, __main__.Lit" in capfd.readouterr().err.splitlines()[-1]


SKIPS = """
step = Lit.training_step
Lit.training_step = lambda self, batch, index: step(self, batch, index) if index {} else None
"""
MANUAL = """
def training_step(self, batch, batch_idx):
    optimizer = self.optimizers()
    try:
        self.manual_backward(nn.functional.cross_entropy(self.model(batch[0]), batch[1]))
    except Exception:
        open('caught', 'w')
    open('stepped', 'w')
    optimizer.step()
Lit.training_step = training_step
Lit.automatic_optimization = False
"""
PLAIN_FIT = "trainer().fit(Lit(), loader(), loader())\nopen('after', 'w')"


@pytest.mark.slow
def test_skipped_batches_are_passed_over(project, capfd):
    assert project(RECIPE, script(SKIPS.format("> 1") + PLAIN_FIT)) == 0
    assert "dpf (DPFCallback)" in plan_of(capfd)
    assert project(RECIPE + EXPORT, script(SKIPS.format("> 99") + PLAIN_FIT)) == 1
    assert "came to its end without a batch that has a loss" in capfd.readouterr().err.splitlines()[-1]
    assert project(RECIPE + EXPORT, script(PLAIN_FIT.replace("trainer()", "trainer(max_epochs=0)"))) == 1
    assert "came to its end without a batch that has a loss" in capfd.readouterr().err.splitlines()[-1]
    assert files() == ["recipe.yaml", "train.py"]


@pytest.mark.slow
def test_manual_optimisation_takes_no_step(project, capfd):
    recipe = "version: 1\ncallbacks: [{class_path: PSGDCallback}]\nexport: {path: a.onnx, precision: int8}\n"
    assert project(recipe, script(MANUAL + PLAIN_FIT)) == 0
    assert files() == ["recipe.yaml", "train.py"]
    text = plan_of(capfd)
    assert "takes     2 layers, 'model.0', 'model.2' (100% of the parameters" in text
    assert "note      the gradients that SGD gets are scaled" in text


LOGGED = """
import functools
fit = L.Trainer.fit
@functools.wraps(fit)
def logged(self, *args, **kwargs):
    print("logged")
    return fit(self, *args, **kwargs)
L.Trainer.fit = logged
"""


@pytest.mark.slow
def test_a_fit_that_other_tools_have_wrapped(project, capfd):
    assert project(RECIPE, script(LOGGED + PLAIN_FIT)) == 0
    text = capfd.readouterr().out
    assert "logged\n" in text
    assert "takes     'model.0'" in text
    assert files() == ["recipe.yaml", "train.py"]


@pytest.mark.slow
def test_a_fit_that_goes_past_us_does_not_train(project, capfd):
    steps = "Lit.on_train_batch_start = lambda *_: open('trained', 'w')\n"
    body = f"{steps}fit = L.Trainer.fit\nown = trainer()\nL.Trainer.fit = fit\n"
    caught = "try: own.fit(Lit(), loader())\nexcept BaseException: pass\nopen('after', 'w')"
    assert project(RECIPE, script(body + caught)) == 1
    assert "the fit failed: the fit began without Trainer.fit of Lightning" in capfd.readouterr().err.splitlines()[-1]
    assert files() == ["recipe.yaml", "train.py"]


@pytest.mark.slow
def test_workers_of_loaders_end_too(project, capfd, tmp_path):
    body = (
        "import os\n"
        "def note(worker): open(f'worker{worker}', 'w').write(str(os.getpid()))\n"
        "data = loader().dataset\n"
        "trainer().fit(Lit(), DataLoader(data, 8, num_workers=2, worker_init_fn=note, persistent_workers=True))"
    )
    assert project(RECIPE, script(body, guarded=True)) == 0
    for worker in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int(Path(f"worker{worker}").read_text()), 0)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "code"), [("[model]", 0), ("[nix]", 1)])
def test_a_fit_in_a_worker_of_a_pool(project, capfd, monkeypatch, layers, code):
    """The pool waits for its worker without end."""
    monkeypatch.setattr("lightning_compress.commands.run.GRACE", 2.0)
    body = (
        "import multiprocessing\nwith multiprocessing.get_context('spawn').Pool(1) as pool:\n    pool.map(train, [1])"
    )
    train = "def train(_):\n    trainer().fit(Lit(), loader())\n\nif __name__"
    text = script(body, guarded=True).replace("if __name__", train)
    assert project(RECIPE.replace("[model]", layers), text) == code
    captured = capfd.readouterr()
    if code == 0:
        assert "takes     'model.0'" in captured.out
    else:
        assert "plan: the fit failed: ValueError: layers has 'nix'" in captured.err.splitlines()[-1]


@pytest.mark.slow
def test_strength_of_terms_and_adaptive_optimizers(project, capfd):
    strong = RECIPE.replace("{hidden: 64}}", "{hidden: 64}}, kd_weight: 1e5")
    strong += "- {class_path: PSGDCallback, init_args: {bits: 4}}\n"
    body = "Lit.configure_optimizers = lambda self: torch.optim.Adam(self.parameters())\n" + PLAIN_FIT
    assert project(strong, script(body)) == 0
    text = plan_of(capfd)
    assert re.search(r"the term of 'kd' is \S+ in the first batch, beside a weighted task loss of 0\.\d+, so", text)
    assert (
        "note      Adam is adaptive and would cancel a scale of its gradients: its updates are scaled instead" in text
    )
    assert project(strong.replace("1e5", "1e-9"), script(body)) == 0
    assert "so it will hardly be felt; give it a larger weight" in plan_of(capfd)


@pytest.mark.slow
def test_a_crash_of_the_script_is_its_own(project, capfd):
    assert project(RECIPE, script("trainer()\nraise SystemExit(7)")) == 7
    assert project(RECIPE, script("Lit.training_step = lambda *_: 1 / 0\n" + PLAIN_FIT)) == 1
    assert capfd.readouterr().err.splitlines()[-1].endswith("the fit failed: ZeroDivisionError: division by zero")
    assert files() == ["recipe.yaml", "train.py"]


@pytest.mark.slow
def test_a_script_does_not_go_on_after_an_error(project, capfd):
    body = "Lit.training_step = lambda *_: 1 / 0\ntry: trainer().fit(Lit(), loader())\nexcept Exception: pass\n"
    assert project(RECIPE, script(f"{body}open('after', 'w')")) == 1
    assert "ZeroDivisionError: division by zero\n" in capfd.readouterr().err
    assert files() == ["recipe.yaml", "train.py"]


@pytest.mark.slow
def test_what_takes_long_is_left_out(project, capfd):
    """No paraphraser is trained, and a whole calibration is not needed."""
    counts = "net = Net.forward\nsteps = [0]\n" + (
        "def forward(self, x):\n    steps[0] += 1\n    print('forward', steps[0], flush=True)\n"
        "    return net(self, x)\n"
        "Net.forward = forward\n"
    )
    recipe = "version: 1\ncallbacks: [{class_path: QATCallback, init_args: {weight_bits: 8}}]\n"
    assert project(recipe, script(counts + PLAIN_FIT)) == 0
    out = capfd.readouterr().out
    assert "qat (QATCallback)" in out
    assert max(int(line.split()[1]) for line in out.splitlines() if line.startswith("forward")) < 20


# The attachment in this process

QUIET = {"loggers": [], "callbacks": [], "strategy": SimpleNamespace(launcher=None)}
"""What is quietened of a Trainer."""


@pytest.fixture
def attachment(tmp_path):
    order = Order("recipe.yaml", str(tmp_path), f"{tmp_path}/events.jsonl", mode="plan")
    order.held.write_text(RECIPE)
    return PlanAttachment(order)


def test_relative_paths_of_the_recipe_start_where_the_command_was_called(attachment, tmp_path, monkeypatch):
    reports = "callbacks: [{class_path: CompressionReport, init_args: {path: table}}]"
    attachment.order.held.write_text(f"version: 1\n{reports}\napply_to: {{module: Other}}\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "table").touch()  # a folder where the command was called
    monkeypatch.chdir(tmp_path / "elsewhere")  # as Hydra does
    attachment.begin(None, nn.Linear(1, 1))
    (fit,) = Events(attachment.order.events).read()
    assert (fit["event"], fit["attached"]) == ("fit", False)


@pytest.fixture
def ends(monkeypatch):
    """The exit codes with which the process would have ended."""
    found = []
    monkeypatch.setattr("lightning_compress.commands.foresight._end_process", found.append)
    return found


IN_PROCESS = """

-- Process 0 terminated with the following error:
Traceback (most recent call last):
  File "a.py", line 1, in <module>
ValueError: one

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "a.py", line 3, in <module>
    fit()
TypeError: two, which has
  lines
"""


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (ValueError("one\n  two\n"), "ValueError: one\n  two\n", 1),
        (ZeroDivisionError(), "ZeroDivisionError", 1),
        (GeneratorExit("over"), "GeneratorExit: over", 1),
        (SystemExit(), "SystemExit", 0),
        (SystemExit(3), "SystemExit: 3", 3),
        (SystemExit("enough"), "SystemExit: enough", 1),
        (ProcessRaisedException(IN_PROCESS, 0, 1), "TypeError: two, which has\n  lines", 1),
    ],
)
def test_an_error_is_told_and_shown_and_the_process_ends(attachment, ends, capsys, error, message, code):
    with attachment.telling():
        attachment.begin(SimpleNamespace(**QUIET), nn.Linear(1, 1))
        raise error
    assert ends == [code]
    fit, failed = Events(attachment.order.events).read()
    assert (fit["event"], failed["event"], failed["message"]) == ("fit", "failed", message)
    assert (type(error).__name__ in capsys.readouterr().err) == (not isinstance(error, SystemExit))


def test_an_error_of_the_recipe_ends_the_process_too(attachment, ends):
    attachment.order.held.write_text("version: 1")
    with attachment.telling():
        attachment.begin(None, nn.Linear(1, 1))
    assert ends == [1]
    (failed,) = Events(attachment.order.events).read()
    assert failed["message"].startswith("RecipeError: ")
    assert "the recipe asks for nothing" in failed["message"]


@pytest.mark.parametrize(
    ("apply_to", "error"), [("{module: Other}", ValueError), ("{module: Linear}", KeyboardInterrupt)]
)
def test_other_errors_are_the_scripts(attachment, ends, apply_to, error):
    attachment.order.held.write_text(f"{RECIPE}apply_to: {apply_to}")
    attachment.begin(SimpleNamespace(**QUIET), nn.Linear(1, 1))
    with pytest.raises(error), attachment.telling():
        raise error
    assert ends == []
    assert [event["event"] for event in Events(attachment.order.events).read()] == ["fit"]


def test_the_attachment_can_be_sent_to_a_spawned_process(attachment):
    assert pickle.loads(pickle.dumps(attachment)).order == attachment.order
    assert json.loads(attachment.order.to_json())["mode"] == "plan"
