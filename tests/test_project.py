"""The commands of LightningCLI, and what they say of a bad configuration: the key, the value, and the nearest key."""

from __future__ import annotations

import inspect
import os
import re
import signal
import subprocess
import sys
import textwrap
from importlib import import_module

import pytest
import torch
from projects import NAMESPACES, TRAINER, Project, callback

import lightning_compress
from lightning_compress import CompressionCallback, PruningCallback
from lightning_compress.cli import main as command
from lightning_compress.commands.project import _accelerator_here, load_project, load_trained, main

PUBLIC = sorted(
    name
    for name in lightning_compress.__all__
    if inspect.isclass(cls := getattr(lightning_compress, name)) and issubclass(cls, CompressionCallback)
    if cls is not CompressionCallback
)
LONGEST = "DCILCallback"
BOTH = pytest.mark.parametrize(
    "project", [NAMESPACES[0], pytest.param(NAMESPACES[1], marks=pytest.mark.slow)], indirect=True
)


COMPILED = """
import torch
from {P} import LitNet

class Own(LitNet):
    def __init__(self, width: int = 8):
        super().__init__(width)
        self.model = torch.compile(self.model)
"""


@pytest.fixture
def project(request, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path, getattr(request, "param", NAMESPACES[0]))


def said(project, capsys, content, *arguments):
    """What ``fit`` says with a second config; it must be short, and no traceback."""
    code = main("fit", ["--config", project.base, "--config", project.yaml("case.yaml", content), *arguments])
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith("lightning-compress fit: ")]
    assert code == 2
    assert len(lines) == 1
    assert "Traceback" not in text
    return (
        lines[0].removeprefix("lightning-compress fit: ").replace(f"{project.folder}/", "").replace(project.name, "P")
    )


def one(name, **init_args):
    return {"trainer": {"callbacks": [callback(name, **init_args)]}}


ERRORS = {
    "a wrong key": (
        one("DCILCallback", sparsity=0.5, updat_interval=3),
        r"case.yaml: trainer.callbacks \(DCILCallback\): unknown key 'updat_interval' with the value 3; accepted are "
        r"sparsity, .*name; did you mean 'update_interval'\?",
    ),
    "an unknown short name": (
        one("DCLCallback"),
        r"trainer.callbacks names 'DCLCallback', which is not known; .*; did you mean 'DCILCallback'\?",
    ),
    "an unknown class": (
        one("lightning_compress.DCLCallback"),
        r"trainer.callbacks names 'lightning_compress.DCLCallback', but .*; did you mean 'DCILCallback'\?",
    ),
    "no callback": (
        one("torch.nn.Linear"),
        r"trainer.callbacks: .*torch.nn.Linear does not correspond to a subclass.*",
    ),
    "a number for a callback": ({"trainer": {"callbacks": [3]}}, r"trainer.callbacks: Not a valid .*: 3"),
    "a value out of range": (
        one("StructuredPruningCallback", ratio=50),
        r"trainer.callbacks \(StructuredPruningCallback\): ratio must be .*, got 50.0; did you mean 0.5\?",
    ),
    "bits out of range": (
        one("PTQCallback", weight_bits=9),
        r"trainer.callbacks \(PTQCallback\): weight_bits must be a whole number from 2 to 8, got 9",
    ),
    "an unknown word": (
        one("DCILCallback", sparsity=0.5, schedule="cubik"),
        r"case.yaml: trainer.callbacks \(DCILCallback\): schedule must be one_shot, cubic, linear, cosine or the "
        r"dotted path of a function, got 'cubik'; did you mean 'cubic'\?",
    ),
    "a word for a number": (
        one("DCILCallback", sparsity="half"),
        r"case.yaml: trainer.callbacks \(DCILCallback\): sparsity must be a number, got 'half'",
    ),
    "a word for a list": (
        one("PTQCallback", layers="conv1"),
        r"case.yaml: trainer.callbacks \(PTQCallback\): layers must be a list or null, got 'conv1'",
    ),
    "a required key": (
        one("DistillationCallback"),
        r"trainer.callbacks \(DistillationCallback\): the required key 'teacher' is missing",
    ),
    "one callback without a list": (
        {"trainer": {"callbacks": "DCILCallback"}},
        r"trainer.callbacks \(DCILCallback\): the required key 'sparsity' is missing",
    ),
    "init_args misspelt": (
        {"trainer": {"callbacks": [{"class_path": "PTQCallback", "init_arg": {"weight_bits": 8}}]}},
        r"trainer.callbacks \(Callback\): unknown key 'init_arg'; .*; did you mean 'init_args'\?",
    ),
    "a teacher's class": (
        one("DistillationCallback", teacher="torch.nn.Linaer"),
        r"trainer.callbacks \(DistillationCallback\): teacher names 'torch.nn.Linaer', .*; did you mean 'Linear'\?",
    ),
    "a teacher's argument": (
        one("DistillationCallback", teacher=callback("torch.nn.Flatten", strat_dim=1)),
        r"trainer.callbacks \(DistillationCallback\): teacher.init_args has 'strat_dim', .* mean 'start_dim'\?",
    ),
    "an argument beside its class": (
        {"trainer": {"callbacks": [{"class_path": "DCILCallback", "sparsity": 0.5}]}},
        r"trainer.callbacks: unknown key 'sparsity' beside class_path; arguments of a class stand under init_args",
    ),
    "a function that is not there": (
        one("DCILCallback", sparsity=0.5, schedule="os.pathx"),
        r"trainer.callbacks \(DCILCallback\): schedule: module 'os' has no attribute 'pathx'",
    ),
    "a letter for a number": (
        {"trainer": {"max_epochs": "a"}},
        r"case.yaml: trainer.max_epochs must be a whole number or null, got 'a'",
    ),
    "a number in a list of texts": (
        one("PTQCallback", layers=[3]),
        r"case.yaml: trainer.callbacks \(PTQCallback\): layers must be a list of texts or null, got \[3\]",
    ),
    "no mapping for the Trainer": (
        {"trainer": 5},
        r"case.yaml: trainer is a mapping of the Trainer's arguments, or a file that holds one, got 5",
    ),
    "a file that is not there": (
        {"trainer": "parts/trainer.yaml"},
        r"case.yaml: trainer is a mapping .*, or a file that holds one, got 'parts/trainer.yaml'",
    ),
    "no mapping of arguments": (
        {"model": {"class_path": "P.LitNet", "init_args": [1]}},
        r"case.yaml: init_args of 'P.LitNet' is a mapping of arguments, got \[1\]",
    ),
    "the first key": (
        {"trianer": {"max_epochs": 2}},
        r"case.yaml: unknown key 'trianer' with the value {'max_epochs': 2}; accepted are .*; did you mean 'trainer'\?",
    ),
    "a key of the Trainer": (
        {"trainer": {"max_epoch": 2}},
        r"case.yaml: unknown key 'trainer.max_epoch' with the value 2; did you mean 'trainer.max_epochs'\?",
    ),
    "a value of the Trainer": (
        {"trainer": {"max_epochs": "two"}},
        r"case.yaml: trainer.max_epochs must be a whole number or null, got 'two'",
    ),
    "a key of the model": (
        {"model": {"init_args": {"widht": 2}}},
        r"case.yaml: model \(LitNet\): unknown key 'widht' with the value 2; accepted are width, fail; "
        r"did you mean 'width'\?",
    ),
    "the data's package": (
        {"data": "pytroch_nowhere.Data"},
        r"data names 'pytroch_nowhere.Data', but 'pytroch_nowhere' cannot be imported: .*",
    ),
    "a path that cannot be written": (
        one("ExportCallback", path="model.pt"),
        r"trainer.callbacks \(ExportCallback\): path must end in '.onnx', got 'model.pt'",
    ),
    "layers that are not there": (
        one("PruningCallback", sparsity=0.5, layers=["modle"]),
        r"trainer.callbacks \(PruningCallback\): layers has 'modle', .*; did you mean 'model'\?",
    ),
}


SLOW = (
    "an argument beside its class",
    "a function that is not there",
    "a letter for a number",
    "a number in a list of texts",
    "no mapping of arguments",
    "a path that cannot be written",
    "layers that are not there",
    "no callback",
    "bits out of range",
    "a number for a callback",
    "a word for a list",
    "a key of the Trainer",
    "the data's package",
    "one callback without a list",
)


@pytest.mark.parametrize("what", [pytest.param(what, marks=[pytest.mark.slow] * (what in SLOW)) for what in ERRORS])
def test_an_error_names_key_value_and_nearest_key(what, project, capsys):
    content, pattern = ERRORS[what]
    text = said(project, capsys, content)
    assert re.fullmatch(pattern, text), text


@pytest.mark.slow
def test_the_weights_of_a_teacher_do_not_fit(project, capsys):
    torch.save(torch.nn.Linear(2, 3).state_dict(), "weights.pt")
    built = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 1}}
    teacher = callback("lightning_compress.teacher_from_checkpoint", ckpt_path="weights.pt", **built)
    text = said(project, capsys, one("DistillationCallback", teacher=teacher))
    assert re.fullmatch(
        r"trainer.callbacks \(DistillationCallback\): teacher could not be built: .* the weights in weights.pt do "
        r"not fit Linear: .* size mismatch for weight: .*torch.Size\(\[1\]\)",
        text,
    ), text


def test_a_yaml_error_has_its_line_and_column(project, capsys):
    path = project.write("broken.yaml", "trainer: {callbacks: [\n  a: b: c\n")
    assert main("fit", ["--config", path]) == 2
    assert re.search(r"broken\.yaml: line 2, column 7: not YAML: ", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("- 1\n", "a config is a mapping"),
        ("trainer:\n  max_epochs: 1\n", "no model is named"),
        ("model: {width: 3}\n", "model names no class, .* --class pkg.Net"),
    ],
)
def test_a_config_that_cannot_be_used(text, message, project, capsys):
    path = str(project.folder / "c.yaml") if text is None else project.write("c.yaml", text)
    assert main("validate", ["--config", path]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_option_without_its_value(project, capsys):
    assert main("fit", ["--config", project.base, "--class"]) == 2
    assert "--class needs the dotted path of a class" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ("width=-2", RuntimeError, "negative dimension"),
        pytest.param("fail=true", ZeroDivisionError, "of the user's own", marks=pytest.mark.slow),
    ],
)
def test_what_the_user_s_own_code_raises_is_raised(argument, error, message, project):
    with pytest.raises(error, match=message):
        main("fit", ["--config", project.base, f"--model.init_args.{argument}"])


@pytest.mark.slow
def test_what_the_user_s_own_code_makes_of_an_exception_is_raised(project):
    """With what it comes from, as where an optional package is missing."""
    source = """
    from {P} import LitNet

    class Needs(LitNet):
        def __init__(self, kind: str = "a"):
            try:
                int(kind)
            except ValueError as error:
                raise ImportError("install a kind, such as 3") from error
    """
    project.write("needs.py", textwrap.dedent(source).format(P=project.name))
    path = project.yaml("case.yaml", {"model": {"class_path": "needs.Needs"}})
    with pytest.raises(ImportError, match="install a kind, such as 3") as error:
        main("fit", ["--config", project.base, "--config", path])
    assert "invalid literal" in str(error.value.__cause__)
    project.write("needs.py", textwrap.dedent(source).format(P=project.name).replace(" from error", ""))
    del sys.modules["needs"]
    with pytest.raises(ImportError) as error:
        main("fit", ["--config", project.base, "--config", path])
    assert "invalid literal" in str(error.value.__context__)
    assert not error.value.__suppress_context__


@pytest.mark.slow
def test_what_the_user_s_own_teacher_raises_is_raised(project):
    teacher = callback(f"{project.name}.LitNet", width=-2)
    path = project.yaml("case.yaml", one("DistillationCallback", teacher=teacher))
    with pytest.raises(RuntimeError, match="negative dimension"):
        main("fit", ["--config", project.base, "--config", path])


@BOTH
def test_a_config_that_lies_where_it_would_be_saved_is_left_alone(project):
    config = project.config()
    config["trainer"]["default_root_dir"] = str(project.folder)
    path = project.yaml("config.yaml", config)
    before = (project.folder / "config.yaml").read_text()
    with pytest.warns(UserWarning, match=r"config\.yaml' exists already and is left alone, so what this fit"):
        assert main("fit", ["--config", path]) == 0
    assert (project.folder / "config.yaml").read_text() == before
    assert main("fit", ["--config", path, "--trainer.default_root_dir=elsewhere"]) == 0
    assert "seed_everything: 1" in (project.folder / "elsewhere" / "config.yaml").read_text()


@BOTH
def test_ctrl_c_is_told_and_has_its_code(project, capsys, monkeypatch):
    step = import_module(project.name).LitNet.training_step

    def interrupted(self, batch, batch_idx):
        signal.raise_signal(signal.SIGINT)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(import_module(project.name).LitNet, "training_step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    assert command(["fit", "--config", project.base]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "lightning-compress fit: interrupted"
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(("given", "code"), [(3, 3), (None, 0), ("the user's last words", None)])
def test_an_exit_of_the_user_s_own_code_is_passed_on(project, monkeypatch, given, code):
    monkeypatch.setattr(import_module(project.name).LitNet, "training_step", lambda *_: sys.exit(given))
    if code is not None:
        assert main("fit", ["--config", project.base]) == code
    else:
        with pytest.raises(SystemExit, match=given):
            main("fit", ["--config", project.base])


@BOTH
@pytest.mark.parametrize(("sparsity", "code"), [(0.5, 1), pytest.param(0.25, 0, marks=pytest.mark.slow)])
def test_fit_with_a_short_name_and_a_failure(project, sparsity, code, capsys, monkeypatch):
    """The callback is that of the config, in a Trainer of the model's package; what it says of its result is told."""
    seen = []

    def bake(self, trainer, pl_module):
        seen.append(type(trainer).__module__.partition(".trainer")[0])
        self.failure = "not good enough" if self.sparsity == 0.5 else None

    monkeypatch.setattr(PruningCallback, "bake", bake)
    config = project.yaml("prune.yaml", project.config([callback("PruningCallback", sparsity=sparsity)]))
    assert main("fit", ["--config", config]) == code
    assert seen == [import_module(project.name).L.__name__]
    assert ("lightning-compress fit: pruning: not good enough" in capsys.readouterr().err) == (code == 1)


@BOTH
def test_a_project_is_built_and_not_run(project):
    config = project.yaml("prune.yaml", project.config([callback("PruningCallback", sparsity=0.5)], width=4))
    built = load_project([config], arguments=["--trainer.max_epochs=7"])
    assert type(built.module).__name__ == "LitNet"
    assert built.module.model[1].out_features == 4
    assert type(built.datamodule).__name__ == "Data"
    assert built.trainer.max_epochs == 7
    assert built.trainer.global_step == 0
    assert [own.sparsity for own in built.trainer.callbacks if isinstance(own, PruningCallback)] == [0.5]
    assert type(built.trainer).__module__.startswith(import_module(project.name).L.__name__)
    assert not (project.folder / "out").exists()


@BOTH
@pytest.mark.parametrize("own", ["plain", "cli"])
def test_a_checkpoint_whose_hyperparameters_name_no_class(project, own, monkeypatch):
    """Of a plain Trainer, or of the project's own ``LightningCLI(Net, Data)``: the config says what is built."""
    code, settings = import_module(project.name), {**TRAINER, "limit_train_batches": 1, "limit_val_batches": 1}
    if own == "plain":
        trainer = code.L.Trainer(**settings)
        trainer.fit(code.LitNet(width=12), code.Data())
    else:
        cli = import_module(f"{code.L.__name__}.cli").LightningCLI
        arguments = ["--model.width=12", *(f"--trainer.{key}={str(value).lower()}" for key, value in settings.items())]
        trainer = cli(code.LitNet, code.Data, save_config_callback=None, args=["fit", *arguments]).trainer
    trainer.save_checkpoint("last.ckpt")
    hyperparameters = torch.load("last.ckpt", weights_only=True)["hyper_parameters"]
    assert hyperparameters["width"] == 12
    assert "_class_path" not in hyperparameters
    built = []
    monkeypatch.setattr(code.LitNet, "setup", lambda self, stage: built.append(dict(self.hparams)))
    path = project.yaml("wide.yaml", project.config(width=12, fail=True))
    for subcommand in ("validate", "test", "predict", "fit"):
        root = f"--trainer.default_root_dir={subcommand}"
        assert main(subcommand, ["--config", path, "--ckpt_path", "last.ckpt", root]) == 0  # the fit was at its end
    assert [(own["width"], own["fail"]) for own in built] == 4 * [(12, True)]


def test_hyperparameters_with_a_class_count(project, monkeypatch):
    code = import_module(project.name)
    path = project.yaml("wide.yaml", project.config(width=12))
    module = load_project([path]).module
    trainer = code.L.Trainer(**TRAINER)
    trainer.strategy.connect(module)
    trainer.save_checkpoint("last.ckpt")
    found = []
    monkeypatch.setattr(code.LitNet, "on_validation_start", lambda self: found.append(self.hparams), raising=False)
    assert main("validate", ["--config", project.base, "--ckpt_path", "last.ckpt"]) == 0
    assert [dict(own)["width"] for own in found] == [12]


def test_a_config_without_classes_needs_them(project):
    old = project.yaml("old.yaml", {"model": {"width": 4}, "data": {"batch_size": 8}})
    with pytest.raises(
        ValueError, match=r"old\.yaml: model and data name no class.* --class pkg\.Net --data-class pkg\.Data$"
    ):
        load_project([old])
    with pytest.raises(ValueError, match=r"data names no class.*give it as --data-class pkg\.Data"):
        load_project([old], model=f"{project.name}.LitNet")
    with pytest.raises(ValueError, match=r"--class names '.*\.LitNt'.*did you mean 'LitNet'"):
        load_project([old], model=f"{project.name}.LitNt", data=f"{project.name}.Data")
    built = load_project([old], model=f"{project.name}.LitNet", data=f"{project.name}.Data")
    assert (built.module.model[1].out_features, built.datamodule.batch_size) == (4, 8)


def test_a_class_that_the_config_leaves_out(project):
    plain = project.yaml("plain.yaml", {"trainer": {"logger": False}})
    built = load_project([plain], model=f"{project.name}.LitNet")
    assert type(built.module).__name__ == "LitNet"
    assert built.datamodule is None


def test_a_trained_project_needs_no_devices_and_no_callbacks_of_its_training(project, monkeypatch):
    code = import_module(project.name)
    torch.save(code.LitNet().state_dict(), "last.ckpt")
    teacher = callback("lightning_compress.teacher_from_checkpoint", class_path="torch.nn.Identity", ckpt_path="no")
    config = project.config([callback("DistillationCallback", teacher=teacher)])
    config["trainer"].update(accelerator="gpu", devices=8, strategy="ddp", precision="16-mixed", limit_val_batches=3)
    path, accelerators = project.yaml("gpu.yaml", config), code.L.accelerators
    monkeypatch.setattr(accelerators.CUDAAccelerator, "is_available", staticmethod(lambda: False))
    built = load_trained([path], "last.ckpt")
    assert not [own for own in built.trainer.callbacks if isinstance(own, CompressionCallback)]
    assert (built.trainer.strategy.root_device.type, built.trainer.precision) == ("cpu", "32-true")
    assert (built.trainer.limit_val_batches, built.trainer.num_devices, built.trainer.loggers) == (3, 1, [])
    double = project.yaml("double.yaml", {"trainer": {"precision": 64, "accelerator": "none_such"}})
    assert load_trained([path, double], "last.ckpt").trainer.precision == "64-true"


@BOTH
def test_groups_of_options_have_files_of_their_own(project, capsys):
    """Paths in a file start from its folder, as jsonargparse reads them."""
    whole = project.config([callback("PTQCallback", weight_bits=6)], width=4)
    for folder in ("configs", "configs/parts"):
        (project.folder / folder).mkdir()
    for key in ("model", "data"):
        project.yaml(f"configs/parts/{key}.yaml", whole[key])
    project.yaml("configs/parts/callbacks.yaml", whole["trainer"].pop("callbacks"))
    trainer = project.yaml("configs/parts/trainer.yaml", {**whole["trainer"], "callbacks": "callbacks.yaml"})
    parts = {key: f"parts/{key}.yaml" for key in ("trainer", "model", "data")}
    path = project.yaml("configs/whole.yaml", parts)
    built = load_project([path])
    assert built.module.model[1].out_features == 4
    assert type(built.trainer).__module__.startswith(import_module(project.name).L.__name__)
    torch.save(built.module.state_dict(), "last.ckpt")
    assert [own.weight_bits for own in load_trained([path], "last.ckpt").quantising] == [6]
    project.yaml("configs/parts/one.yaml", callback("PTQCallback", weight_bits=5))
    for given in ("one.yaml", ["one.yaml"]):
        project.yaml("configs/parts/trainer.yaml", {**whole["trainer"], "callbacks": given})
        assert [own.weight_bits for own in load_trained([path], "last.ckpt").quantising] == [5]
    arguments = [f"--{key}=configs/parts/{key}.yaml" for key in parts]
    assert type(load_project([], arguments=arguments).trainer) is type(built.trainer)
    project.yaml("configs/parts/trainer.yaml", {"max_epoch": 2})
    assert main("fit", ["--config", path]) == 2
    told = "whole.yaml: unknown key 'trainer.max_epoch' with the value 2; did you mean 'trainer.max_epochs'?"
    assert told in capsys.readouterr().err
    project.write("configs/parts/trainer.yaml", "max_epochs: [")
    assert main("fit", ["--config", path]) == 2
    assert f"{trainer}: line 1, column 14: not YAML" in capsys.readouterr().err


def test_the_accelerator_of_the_config_is_used_where_it_is(monkeypatch):
    from lightning.pytorch.accelerators import CUDAAccelerator

    for here in (True, False):
        monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda here=here: here))
        found = [_accelerator_here(name) for name in ("gpu", "cuda", "cpu", "auto", "none_such", {"class_path": "A"})]
        assert found == [*(["gpu", "cuda"] if here else ["cpu", "cpu"]), "cpu", "auto", "cpu", "cpu"]


def test_a_checkpoint_of_another_width_is_refused_and_a_compiled_part_takes_it(project):
    code = import_module(project.name)
    torch.save(code.LitNet(width=12).state_dict(), "wide.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint 'wide\.ckpt' does not fit LitNet: .*size mismatch"):
        load_trained([project.base], "wide.ckpt")
    module = code.LitNet()
    torch.save(module.state_dict(), "last.ckpt")
    project.write("compiled.py", COMPILED.format(P=project.name))
    for config in ([project.base], [project.base, project.yaml("c.yaml", {"model": {"class_path": "compiled.Own"}})]):
        found = load_trained(config, "last.ckpt").module.state_dict()
        assert all(torch.equal(found[name], value) for name, value in module.state_dict().items())


def help_of(name, capsys):
    assert main("fit", [f"--trainer.callbacks.help={name}"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    "name", [name if name == LONGEST else pytest.param(name, marks=pytest.mark.slow) for name in PUBLIC]
)
def test_the_help_of_every_callback_is_short_and_complete(name, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_of(name, capsys)
    assert len(text.splitlines()) < 60
    for argument in inspect.signature(getattr(lightning_compress, name)).parameters:
        assert f"--trainer.callbacks.{argument} " in text


@pytest.mark.slow
@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", PUBLIC)
def test_the_help_in_a_project_s_own_cli_is_short(name, namespace, capsys, monkeypatch):
    """In 120 columns. In 80, the usage alone has a line for each argument, and the option's name another."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    model = import_module(f"{namespace}.demos.boring_classes").BoringModel
    with pytest.raises(SystemExit) as stop:
        import_module(f"{namespace}.cli").LightningCLI(model, args=["fit", f"--trainer.callbacks.help={name}"])
    assert stop.value.code == 0
    assert 10 < len(capsys.readouterr().out.splitlines()) < 60


@pytest.mark.slow
@pytest.mark.parametrize("project", NAMESPACES, indirect=True)
def test_all_subcommands_from_the_shell(project):
    """In a process each, from the project's folder, which is not on Python's path there."""
    config = project.config([callback("PruningCallback", sparsity=0.5)])
    config["trainer"].update(enable_checkpointing=True)
    path = project.yaml("c.yaml", config)
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(lightning_compress.__file__))}

    def run(*arguments):
        command = [sys.executable, "-P", "-m", "lightning_compress.cli", *arguments]
        return subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, text=True, check=False)

    done = run("fit", "--config", path)
    assert done.returncode == 0, done.stderr
    [checkpoint] = (project.folder / "out").rglob("*.ckpt")
    saved = project.folder / "out" / "config.yaml"
    assert "lightning_compress.PruningCallback" in saved.read_text()
    for number, (subcommand, shown) in enumerate({"validate": "val_acc", "test": "val_acc", "predict": ""}.items()):
        root = f"--trainer.default_root_dir={project.folder / f'root{number}'}"
        done = run(subcommand, "--config", path, "--ckpt_path", str(checkpoint), root)
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout
    done = run("fit", "--config", path, "--trainer.callbacks.sparsity=5", "--trainer.default_root_dir=other")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "sparsity must be a number in [0, 1), got 5.0" in done.stderr
