"""``lightning-compress run``: the parent's checks, exit codes and messages, and whole runs of untouched scripts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import onnxruntime
import pytest
from scripts import of_paths, script

from lightning_compress.cli import main
from lightning_compress.commands.run import outcome
from lightning_compress.export.evaluate import RUN_VARIABLE
from lightning_compress.mechanisms.drafts import draft_of

KD = """
version: 1
callbacks:
- class_path: DistillationCallback
  init_args: {teacher: {class_path: train.Net, init_args: {hidden: 32}}}
- {class_path: CompressionReport, init_args: {latency: false}}
"""
EXPORT = "version: 1\nexport: {path: out/model.onnx}\n"
FIT = "trainer().fit(Lit(), loader(), loader())"

# A child that needs no import of torch: it does what the attachment would do.
TELLS = """
import json, os, sys
order = json.loads(os.environ["LIGHTNING_COMPRESS_RUN"])
def tell(event, **fields):
    with open(order["events"], "a") as file:
        file.write(json.dumps({"event": event, **fields}) + chr(10))
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project as the working directory, and how to run a script of it with a recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(RUN_VARIABLE, raising=False)

    def run(recipe, text, *arguments, name="train.py", mode="run"):
        Path("recipe.yaml").write_text(recipe)
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
        return main([mode, "recipe.yaml", "--", sys.executable, name, *arguments])

    return run


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


# What the exit code and the line say


def fit_event(module="train.Lit", attached=True):
    return {"event": "fit", "module": module, "matches": attached, "attached": attached, "script": 1}


def done_event(failure=None, **changes):
    export = {"path": "/a/net.onnx", "bytes": 1500, "metric": "acc", "in_file": 0.5, "in_module": 0.75, "kept": True}
    return {"event": "done", "exports": [{**export, "failure": failure, **changes}], "reports": ["/a/logs"]}


FACTORY = {"event": "factory"}
FAILED = {"event": "failed", "message": "OSError: the disk\n  is full"}
WRITTEN = "wrote /a/net.onnx (1.50 kB; acc 0.5 in the file, 0.75 in the module), report in /a/logs"
OUTCOMES = {
    "well": ([FACTORY, fit_event(), done_event()], 0, 0, WRITTEN),
    "several processes": (
        [FACTORY, fit_event("A", False), {**fit_event("A", False), "script": 2}],
        0,
        1,
        "the command ended well, but no fit took the recipe: the fits were, in order: A; see apply_to in the recipe",
    ),
    "several fits": ([FACTORY, fit_event("A", False), FACTORY, fit_event(), done_event()], 0, 0, WRITTEN),
    "without a metric": (
        [FACTORY, fit_event(), done_event(metric=None, in_file=None, in_module=None)],
        0,
        0,
        "wrote /a/net.onnx (1.50 kB), report in /a/logs",
    ),
    "nothing kept": (
        [FACTORY, fit_event(), {**done_event(kept=False), "reports": []}],
        0,
        0,
        "checked /a/net.onnx, and did not keep it (fast_dev_run)",
    ),
    "nothing to write": (
        [FACTORY, fit_event(), {"event": "done", "exports": [], "reports": []}],
        0,
        0,
        "the recipe was attached to the fit; it writes no file",
    ),
    "no trainer": (
        [],
        0,
        2,
        "the command ended well, but no Trainer in it asked for the recipe: either it made no Trainer at all, or it "
        "ran in another Python, where lightning-compress is not installed",
    ),
    "no fit": (
        [FACTORY],
        0,
        1,
        "the command ended well, but no fit took the recipe: its Trainer never fitted",
    ),
    "other fits": (
        [FACTORY, fit_event("A", False), fit_event("B", False)],
        0,
        1,
        "the command ended well, but no fit took the recipe: the fits were, in order: A, B; see apply_to in the recipe",
    ),
    "a fit without an end": (
        [FACTORY, fit_event()],
        0,
        1,
        "the command ended well, but the fit with the recipe never came to its end",
    ),
    "a tolerance": (
        [FACTORY, fit_event(), done_event("acc is 0.25 away")],
        0,
        1,
        "/a/net.onnx: acc is 0.25 away",
    ),
    "an exception that the script caught": (
        [FACTORY, fit_event(), FAILED],
        0,
        1,
        "the fit failed: OSError: the disk is full",
    ),
    "an exception": (
        [FACTORY, fit_event(), FAILED],
        7,
        7,
        "the command ended with exit code 7; the fit failed: OSError: the disk is full",
    ),
    "a crash after the fit": (
        [FACTORY, fit_event(), done_event()],
        137,
        137,
        f"the command ended with exit code 137 (SIGKILL); before that, {WRITTEN}",
    ),
    "a crash before a trainer": ([], 3, 3, "the command ended with exit code 3"),
}


@pytest.mark.parametrize("case", OUTCOMES)
def test_what_events_come_to(case):
    events, child, code, message = OUTCOMES[case]
    assert outcome(events, child) == (code, message)


def test_paths_are_shown_as_seen_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = done_event(path=str(tmp_path / "out" / "net.onnx"), metric=None, in_file=None, in_module=None)
    assert outcome([FACTORY, done], 0)[1].startswith(f"wrote {os.path.join('out', 'net.onnx')} (1.50 kB)")


# Nothing is started


def started(project, recipe=EXPORT):
    """Run a script that leaves a mark, and say whether it did."""
    code = project(recipe, "open('mark', 'w').close()")
    return code, Path("mark").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("version: 3\nexport: {path: a.onnx}", "recipe.yaml: version 3 is newer than 1"),
        ("version: 1\ncallbacks: [{class_path: Distilation}]", "class_path 'Distilation' is no callback"),
        ("version: 1\nexport: {path: a.onnx, sampel: 1}", "unknown key 'sampel' with the value 1"),
        ("version: 1\nexport: {path: a.pt}", "path must end in '.onnx', got 'a.pt'"),
        ("version: 1\nexport: {path: train.py/a.onnx}", "is not a directory"),
        ("version: 1\nexport: {path: 5}", "recipe.yaml: path must be a string or a path, got 5"),
        ("version: 1\nexport: {path: 2020-01-01}", "path must be a string or a path, got datetime.date(2020, 1, 1)"),
        (
            'version: 1\nexport: {path: "a\\0.onnx"}',
            r"or hold a NUL character, got 'a\x00.onnx'",
        ),
        (
            "version: 1\ncallbacks: [{class_path: CompressionReport, init_args: {path: true}}]",
            "recipe.yaml: path must be a string or a path, got True",
        ),
        (
            "version: 1\nexport: {path: ./a.onnx}\n"
            "callbacks: [{class_path: ExportCallback, init_args: {path: a.onnx, name: b}}]",
            "two exports of the recipe write './a.onnx'; give each a path of its own",
        ),
        ("version: [", "line 1, column 11: not YAML"),
    ],
)
def test_a_bad_recipe(project, capsys, recipe, message):
    assert started(project, recipe) == (2, False)
    assert message in of_paths(capsys.readouterr().err)


@pytest.mark.parametrize(
    "recipe",
    [
        "version: 1\nexport: {path: locked/a.onnx}",
        "version: 1\ncallbacks: [{class_path: CompressionReport, init_args: {path: locked}}]",
        "version: 1\ncallbacks: [{class_path: lightning_compress.CompressionReport, init_args: {path: locked/a/b}}]",
    ],
)
def test_a_place_that_cannot_be_written(project, capsys, monkeypatch, recipe):
    Path("locked").mkdir()
    made = tempfile.TemporaryFile

    def refused(*, dir):  # noqa: A002 - root may write anywhere
        if Path(dir).name == "locked":
            raise PermissionError(13, "Permission denied")
        return made(dir=dir)

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    assert started(project, recipe) == (2, False)
    assert "is not writable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml", "--", sys.executable, "-c", "1"], "missing.yaml: the recipe cannot be read: No such file"),
        (
            ["distil", "--", sys.executable, "-c", "1"],
            "recipe of this package; write it into one, and say there what it",
        ),
        (
            ["folder/distil.yaml", "--", sys.executable, "-c", "1"],
            "'folder/distil.yaml' is no file here, but a recipe of this package",
        ),
        (["distill", "--", sys.executable, "-c", "1"], "'distill' is no file here; did you mean 'distil'?"),
        (["recipe.yaml"], "the command to run is missing; it comes behind --, as in: lightning-compress run"),
        (["recipe.yaml", "--"], "the command to run is missing"),
        (["recipe.yaml", "--", "pyhton", "a.py"], "'pyhton' is not a program that can be run here; did you mean 'pyt"),
        (
            ["recipe.yaml", "--", "train.py"],
            "'train.py' is not a program that can be run here; to run a script: python",
        ),
        (["recipe.yaml", "--", "./empty"], "'./empty' cannot be started: Exec format error"),
    ],
)
def test_a_bad_command(project, capsys, arguments, message):
    Path("recipe.yaml").write_text(EXPORT)
    Path("empty").touch(mode=0o700)
    assert main(["run", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_without_programs_none_is_suggested(project, capsys, monkeypatch):
    Path("recipe.yaml").write_text(EXPORT)
    monkeypatch.setenv("PATH", "")
    assert main(["run", "recipe.yaml", "--", "python", "train.py"]) == 2
    assert capsys.readouterr().err.endswith("'python' is not a program that can be run here\n")


@pytest.mark.parametrize("mode", ["run", "plan"])
def test_within_another_run(project, capsys, monkeypatch, mode):
    monkeypatch.setenv(RUN_VARIABLE, "{}")
    assert project(EXPORT, "open('mark', 'w').close()", mode=mode) == 2
    assert "it was started by a command of `lightning-compress run` or `plan`" in capsys.readouterr().err
    assert not Path("mark").exists()


def test_drafts_of_a_file_with_signs_of_a_pattern(project):
    Path("out").mkdir()
    draft = f"out/.m[0].onnx-{'0' * 16}"
    killed = f"import os\nos.mkdir('{draft}')\nopen('{draft}/lock', 'w')\nraise SystemExit(5)"
    assert project("version: 1\nexport: {path: 'out/m[0].onnx'}", killed) == 5
    assert list(Path("out").iterdir()) == []


def test_callbacks_are_looked_for_where_the_script_will_look(project, capsys):
    Path("source").mkdir()
    Path("source/own_parts.py").write_text("from lightning.pytorch import Callback\nclass Mine(Callback): pass\n")
    recipe = "version: 1\ncallbacks: [{class_path: own_parts.Mine}, {class_path: train.Mine}]"
    before = list(sys.path)
    assert project(recipe, "raise SystemExit(5)", name="source/train.py") == 5
    assert "train" not in sys.modules  # the script was not imported to look at its class
    assert sys.path == before
    del sys.modules["own_parts"]
    assert project(recipe, "raise SystemExit(5)", name="train.py") == 2
    assert "class_path names 'own_parts.Mine', but 'own_parts' cannot be imported" in capsys.readouterr().err


# The child


def test_a_module_that_changes_where_modules_are_looked_for(project, tmp_path, monkeypatch):
    body = "import sys\nfrom lightning.pytorch import Callback\nclass Mine(Callback): pass\nsys.path.insert(0, 'own')\n"
    (tmp_path / "prepending.py").write_text(body)
    before = list(sys.path)
    assert project("version: 1\ncallbacks: [{class_path: prepending.Mine}]", "raise SystemExit(3)") == 3
    assert sys.path == before


def test_the_child_has_the_streams_the_arguments_and_the_order(project, capfd, tmp_path):
    shows = "tell('factory')\nprint(sys.argv[1:], sorted(order), order['cwd'], file=sys.stderr)\nraise SystemExit(9)"
    assert project(EXPORT, f"{TELLS}\n{shows}", "--lr", "0.1") == 9
    captured = capfd.readouterr()
    assert captured.err.splitlines() == [
        f"['--lr', '0.1'] ['command', 'cwd', 'events', 'mode', 'recipe', 'settings'] {tmp_path}",
        "lightning-compress run: the command ended with exit code 9",
    ]
    assert RUN_VARIABLE not in os.environ
    assert files(tmp_path) == ["recipe.yaml", "train.py"]


def test_the_child_gets_the_recipe_as_it_was_checked(project, capfd):
    """The user may write the next recipe meanwhile; and a pipe can be read only once."""
    shows = (
        "open('recipe.yaml', 'w'); print(open(os.path.join(os.path.dirname(order['events']), 'recipe.yaml')).read())"
    )
    assert project(EXPORT, f"{TELLS}\n{shows}; print(order['recipe'])\nraise SystemExit(9)") == 9
    assert capfd.readouterr().out == f"{EXPORT}\nrecipe.yaml\n"
    os.remove("recipe.yaml")
    os.mkfifo("recipe.yaml")
    writer = threading.Thread(target=lambda: Path("recipe.yaml").write_text(EXPORT))
    writer.start()
    shows = shows.partition("; ")[2]
    Path("train.py").write_text(f"{TELLS}\n{shows}\nraise SystemExit(9)")
    assert main(["run", "recipe.yaml", "--", sys.executable, "train.py"]) == 9
    writer.join()
    assert capfd.readouterr().out == f"{EXPORT}\n"


def test_standard_input_reaches_the_child(project, tmp_path):
    (tmp_path / "typed").write_text("6\n")
    before = os.dup(0)
    try:
        with open(tmp_path / "typed") as typed:
            os.dup2(typed.fileno(), 0)
        assert project(EXPORT, "raise SystemExit(int(input()))") == 6
    finally:
        os.dup2(before, 0)
        os.close(before)


def test_success_is_one_line_on_standard_output(project, capfd):
    done = json.dumps({"exports": [], "reports": ["logs"]})
    assert project(EXPORT, f"{TELLS}\ntell('factory'); tell('done', **json.loads('{done}'))") == 0
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("lightning-compress run: report in logs\n", "")


SLEEPS = """
import pathlib, time
try:
    pathlib.Path("started").touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.3)
    pathlib.Path("cleaned").touch()
    raise SystemExit(4)
"""


@pytest.mark.parametrize("mode", ["run", "plan"])
@pytest.mark.parametrize(("number", "code", "cleaned"), [(signal.SIGINT, 4, True), (signal.SIGTERM, 143, False)])
def test_signals_reach_the_child_and_the_parent_waits(project, capfd, monkeypatch, number, code, cleaned, mode):
    monkeypatch.setattr("lightning_compress.commands.run._in_foreground", lambda: False)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    thread = threading.Thread(target=send_when_started, args=(number,))
    thread.start()
    assert project(EXPORT, SLEEPS, mode=mode) == code
    thread.join()
    assert Path("cleaned").exists() == cleaned
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    signalled = "" if cleaned else " (SIGTERM)"
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == f"lightning-compress {mode}: interrupted; the command ended with exit code {code}{signalled}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_child_is_started_ends_it_too(project, capfd, monkeypatch, number):
    monkeypatch.setattr("lightning_compress.commands.run._in_foreground", lambda: True)
    start = subprocess.Popen

    def popen(*arguments, **options):
        os.kill(os.getpid(), number)
        return start(*arguments, **options)

    monkeypatch.setattr("lightning_compress.commands.run.subprocess.Popen", popen)
    missed = []
    before = signal.signal(number, lambda *_: missed.append(number))
    try:
        assert project(EXPORT, SLEEPS.replace("60", "1")) == 128 + number
    finally:
        signal.signal(number, before)
    assert missed == []
    assert "interrupted; the command ended with exit code" in capfd.readouterr().err


REQUEUED = """
import pathlib, signal, time
signal.signal(signal.{0}, lambda *_: pathlib.Path("saved").touch())
pathlib.Path("started").touch()
while not pathlib.Path("saved").exists():
    time.sleep(0.01)
raise SystemExit(5)
"""


@pytest.mark.parametrize(("name", "said"), [("SIGUSR1", ""), ("SIGUSR2", ""), ("SIGHUP", "interrupted; ")])
def test_signals_of_schedulers_and_terminals_reach_the_child(project, capfd, name, said):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # else, where the tests run under nohup, it stays ignored
    try:
        thread = threading.Thread(target=send_when_started, args=(number,))
        thread.start()
        assert project(EXPORT, REQUEUED.format(name)) == 5
        thread.join()
    finally:
        signal.signal(number, before)
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == f"lightning-compress run: {said}the command ended with exit code 5"


def test_a_signal_that_is_ignored_stays_so(project):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        text = "import os, signal; os.kill(os.getppid(), signal.SIGHUP)\nraise SystemExit(5)"
        assert project(EXPORT, text) == 5
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def send_when_started(number):
    while not Path("started").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), number)


def test_a_terminal_sends_ctrl_c_to_the_child_itself(project, monkeypatch):
    monkeypatch.setattr("lightning_compress.commands.run._in_foreground", lambda: True)

    # what the parent gets; the child gets its own, not sent here
    thread = threading.Thread(target=send_when_started, args=(signal.SIGINT,))
    thread.start()
    text = SLEEPS.replace("time.sleep(60)", "time.sleep(0.5); pathlib.Path('undisturbed').touch()")
    assert project(EXPORT, text) == 2
    thread.join()
    assert files(".") == ["recipe.yaml", "started", "train.py", "undisturbed"]


# Whole runs: test_factory.py has the same attachment in this process


@pytest.mark.slow
def test_an_untouched_script(project, capfd, tmp_path):
    """The teacher is a class of the script, which trains whenever it is imported and changes its directory."""
    text = script(f"import os; os.makedirs('job', exist_ok=True); os.chdir('job')\n{FIT}")
    assert project(f"{KD}export: {{path: out/model.onnx, metric: val_loss, tolerance: 1e-4}}", text) == 0
    assert Path("train.py").read_text() == text
    assert files(tmp_path) == [
        *(f"job/compression_report/compression_report.{suffix}" for suffix in ("html", "json", "md")),
        "out/model.onnx", "recipe.yaml", "train.py",
    ]  # fmt: skip
    line = capfd.readouterr().out.splitlines()[-1]
    assert line.startswith("lightning-compress run: wrote out/model.onnx (1.")
    assert line.endswith("in the module), report in job/compression_report")
    session = onnxruntime.InferenceSession("out/model.onnx")
    assert [entry.shape[1:] for entry in session.get_inputs()] == [[8]]
    report = json.loads(Path("job/compression_report/compression_report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["teacher", "before", "after", "model.onnx"]
    assert report["recipe"]["callbacks"][0]["class_path"] == "DistillationCallback"
    assert report["command"].startswith("lightning-compress run recipe.yaml -- ")
    assert report["command"].endswith(" train.py")


@pytest.mark.slow
def test_a_child_that_is_killed_while_it_writes_the_file(project, capfd, tmp_path):
    body = (
        "import os, signal\nimport lightning_compress.export.onnx as target\n"
        f"target.check_parity = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)\n{FIT}"
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.onnx").write_text("an older one")
    with draft_of(tmp_path / "out" / "model.onnx") as draft_of_another:
        draft_of_another.write_text("not of this run")
        assert project(EXPORT, script(body)) == 137
        assert len(list((tmp_path / "out").iterdir())) == 2  # the older file, and the draft of another
        assert (tmp_path / "out" / "model.onnx").read_text() == "an older one"
    assert (tmp_path / "out" / "model.onnx").read_text() == "not of this run"
    assert "the command ended with exit code 137" in capfd.readouterr().err


@pytest.mark.slow
def test_ctrl_c_in_a_training(project, capfd, monkeypatch, tmp_path):
    """Lightning ends the fit and the process with 1; nothing is exported or reported."""
    monkeypatch.setattr("lightning_compress.commands.run._in_foreground", lambda: False)
    body = (
        "import os, signal\n"
        "Lit.on_train_epoch_end = lambda module: os.kill(os.getppid(), signal.SIGINT) or __import__('time').sleep(30)\n"
        "trainer(max_epochs=99).fit(Lit(), loader())"
    )
    assert project(EXPORT, script(body)) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.endswith("run: interrupted; the command ended with exit code 1; the fit failed: KeyboardInterrupt")
    assert files(tmp_path) == ["recipe.yaml", "train.py"]


@pytest.mark.slow
def test_a_teacher_that_each_process_of_a_distributed_training_trains_first(project, capfd, tmp_path):
    """The second process repeats the fit of the teacher, which is the first there too."""
    body = f"{FIT}\nfresh = trainer(strategy='ddp', devices=2)\nfresh.fit(Other(), loader(), loader())"
    recipe = "version: 1\ncallbacks: [{class_path: CompressionReport, init_args: {latency: false, path: report}}]\n"
    assert project(f"{recipe}apply_to: {{fit: 2}}", script(body, guarded=True)) == 0
    out = capfd.readouterr().out
    assert len([line for line in out.splitlines() if line.startswith("Compression report")]) == 1
    assert out.splitlines()[-1].endswith("run: report in report")


@pytest.mark.slow
def test_a_fit_that_other_ranks_repeat_may_have_the_recipe(project, capfd):
    body = f"{FIT}\nfresh = trainer(strategy='ddp', devices=2)\nfresh.fit(Other(), loader(), loader())"
    recipe = "version: 1\ncallbacks: [{class_path: CompressionReport, init_args: {latency: false, path: report}}]\n"
    assert project(f"{recipe}apply_to: {{module: Lit}}", script(body, guarded=True)) == 0
    assert capfd.readouterr().out.splitlines()[-1].count("run: report in report") == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["run", "plan"])
def test_fits_of_several_processes_do_not_share_a_recipe(project, capfd, mode):
    Path("train.py").write_text(script(FIT))
    Path("recipe.yaml").write_text(EXPORT)
    both = f"{sys.executable} train.py; mv out/model.onnx first.onnx; {sys.executable} train.py"
    code = main([mode, "recipe.yaml", "--", "sh", "-c", both])
    last = capfd.readouterr()
    if mode == "plan":
        assert code == 0
        assert last.out.count("what the recipe would do to Lit") == 1
        return
    assert code == 1
    assert "a fit of __main__.Lit begins, and a fit in another process of" in last.err.splitlines()[-1]
    assert "first.onnx" in files(".")
    assert "out/model.onnx" not in files(".")


@pytest.mark.slow
def test_fits_in_a_pool_do_not_share_a_recipe(project, capfd):
    body = (
        "import multiprocessing\n"
        "with multiprocessing.get_context('spawn').Pool(2) as pool:\n    print(pool.map(train, [1, 2], chunksize=1))"
    )
    functions = "def train(number):\n    trainer(max_epochs=number * 20).fit(Lit(), loader())\n    return number\n"
    text = script(body, guarded=True)
    assert project(EXPORT, text.replace("if __name__", f"{functions}\nif __name__")) == 1
    assert "a fit in another process of the command has the recipe" in capfd.readouterr().err  # Python may say more


@pytest.mark.slow
def test_the_other_namespace(project, capfd):
    assert project(f"{KD}export: {{path: model.onnx, metric: val_loss}}", script(FIT, package="pytorch_lightning")) == 0
    assert "wrote model.onnx (1." in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_a_run_of_weights_and_biases_is_kept_offline_where_nobody_is_logged_in(
    project, capfd, monkeypatch, tmp_path, package
):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    body = (
        f"from {package}.loggers import WandbLogger\n"
        "trainer().fit(Other(), loader())\n"
        "for _ in range(2):\n"
        "    fresh = trainer(logger=WandbLogger(project='own', save_dir='runs'))\n"
        "    fresh.fit(Lit(), loader(), loader())\n"
    )
    once = f"{EXPORT}apply_to: {{module: Lit, fit: 1}}"
    assert project(once, script(body, package=package)) == 0
    assert capfd.readouterr().err.count("so the run is kept offline: `wandb sync` sends it later") == 1
    assert len(list(Path("runs/wandb").glob("offline-run-*"))) >= 1


@pytest.mark.slow
def test_a_tolerance_that_is_exceeded(project, capfd):
    assert project("version: 1\nexport: {path: a.onnx, metric: val_round, tolerance: 0}", script(FIT)) == 1
    assert "run: a.onnx: val_round is " in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_script_that_trains_twice(project, capfd):
    text = script(f"{FIT}\ntrainer().fit(Other(), loader(), loader())")
    assert project(KD, text) == 1
    assert "the script fits __main__.Other now" in capfd.readouterr().err.splitlines()[-1]
    assert project(f"{KD}apply_to: {{module: train.Other}}", text) == 0
    assert project(f"{KD}apply_to: {{fit: 3}}", text) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.endswith("the fits were, in order: __main__.Lit, __main__.Other; see apply_to in the recipe")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("", 2, "no Trainer in it asked for the recipe"),
        ("trainer()", 1, "its Trainer never fitted"),
        (f"{FIT}\nraise SystemExit(3)", 3, "ended with exit code 3; before that, wrote out/model.onnx"),
        ("raise RuntimeError('early')", 1, "the command ended with exit code 1"),
        (
            "Lit.training_step = lambda *args: 1 / 0\n" + FIT,
            1,
            "exit code 1; the fit failed: ZeroDivisionError: division by zero",
        ),
        ("Lit.automatic_optimization = False\n" + FIT, 1, "DistillationCallback changes the step, and Lit optimises m"),
    ],
)
def test_scripts_that_do_not_get_to_the_end(project, capfd, body, code, message):
    recipe = f"{KD}export: {{path: out/model.onnx}}" if "automatic" in body else EXPORT
    assert project(recipe, script(body)) == code
    assert message in capfd.readouterr().err.splitlines()[-1]
    assert Path("out/model.onnx").exists() == ("SystemExit" in body)


@pytest.mark.slow
def test_a_script_alone_is_what_it_was(project, capfd):
    """With the entry point installed and the variable unset: the same weights as a run that cannot find us."""
    body = f"{FIT.replace('Lit()', 'module')}\nprint(sum(p.double().abs().sum().item() for p in module.parameters()))"
    Path("train.py").write_text(script(f"module = Lit()\n{body}"))
    Path("alone.py").write_text(
        "import importlib.metadata as metadata\n"
        "original = metadata.entry_points\n"
        "ours = 'callbacks_factory'\n"
        "metadata.entry_points = lambda **by: [] if by.get('group', '').endswith(ours) else original(**by)\n"
        + Path("train.py").read_text()
    )
    sums = []
    for name in ("train.py", "alone.py"):
        child = subprocess.run([sys.executable, name], capture_output=True, text=True, check=True)
        sums.append(child.stdout.splitlines()[-1])
    assert sums[0] == sums[1]
    assert float(sums[0]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_two_ranks(project, capfd, strategy):
    body = (
        f"fresh = trainer(strategy='{strategy}', devices=2)\nmodule = Lit()\nfresh.fit(module, loader(), loader())\n"
        "print('sum', sum(p.double().abs().sum().item() for p in module.parameters()))"
    )
    recipe = f"{KD.replace('train.Net', '__main__.Net')}export: {{path: model.onnx, metric: val_loss}}"
    assert project(recipe, script(body, guarded=True)) == 0
    out = capfd.readouterr().out.splitlines()
    sums = {line for line in out if line.startswith("sum")}
    assert len(sums) == 1
    assert len([line for line in out if line.startswith("Compression report")]) == 1
    assert out[-1].startswith("lightning-compress run: wrote model.onnx (1.")
