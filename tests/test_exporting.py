"""From a checkpoint to a checked file, from the shell: what is written, what is refused, what is left alone."""

from __future__ import annotations

import re
import signal
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from disks import room_for
from projects import NAMESPACES, TRAINER, Project, callback

import lightning_compress
from lightning_compress import export as exports
from lightning_compress.cli import main
from lightning_compress.commands import export as export_command
from lightning_compress.commands.project import load_project
from lightning_compress.export.errors import ExportError
from lightning_compress.export.runtime import OnnxNetwork

VERSION = {"pytorch-lightning_version": "2.6.6"}


@pytest.fixture
def project(request, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path, getattr(request, "param", NAMESPACES[0]))


def trained(project, *callbacks, name="last.ckpt", **model):
    """A checkpoint of the project after a fit with some callbacks, and the module."""
    code, package = import_module(project.name), import_module(project.name).L
    torch.manual_seed(0)
    module = code.LitNet(**model)
    built = [getattr(lightning_compress, own["class_path"])(**own["init_args"]) for own in callbacks]
    trainer = package.Trainer(**TRAINER, callbacks=built)
    trainer.fit(module, code.Data())
    trainer.save_checkpoint(name)
    return module.eval()


def saved(project, name="last.ckpt", **model):
    """A checkpoint of the project without a fit."""
    torch.manual_seed(0)
    module = import_module(project.name).LitNet(**model).eval()
    torch.save(
        {
            "state_dict": module.state_dict(),
            "hyper_parameters": dict(module.hparams),
            **VERSION,
        },
        name,
    )
    return module


def exported(capsys, *arguments):
    """Exit code and the one line."""
    code = main(["export", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert "GPU available" not in out + err
    [line] = [line for line in (out if code == 0 else err).splitlines() if line.startswith("lightning-compress export")]
    return code, line


def outputs(path, images):
    [found] = OnnxNetwork(path).run([images])
    return found


def integers(path):
    """The weights of a file in int8, as they are stored."""
    stored = [own for own in onnx.load(path).graph.initializer if own.data_type == onnx.TensorProto.INT8]
    return [onnx.numpy_helper.to_array(own).astype(np.int32) for own in stored if len(own.dims) > 1]


BAD = {
    "no module": (["last.ckpt"], r"the module is missing: give --class pkg.Module, or --config C.yaml"),
    "no file": (["gone.ckpt", "--class", "{P}.LitNet"], r"checkpoint_path 'gone.ckpt' does not exist"),
    "a truncated file": (
        ["cut.ckpt", "--class", "{P}.LitNet"],
        r"'cut.ckpt' is damaged, or was not written to its end",
    ),
    "an unknown class": (["last.ckpt", "--class", "{P}.LitNte"], r"--class names .* did you mean 'LitNet'\?"),
    "another class": (["last.ckpt", "--class", "{P}.Other"], r"--class .*Missing key.*layer.weight"),
    "an unknown argument": (
        ["last.ckpt", "--class", "{P}.LitNet", "--init-args", "{{widht: 4}}"],
        r"--init-args has 'widht', which .*; did you mean 'width'\?",
    ),
    "arguments of another width": (
        ["last.ckpt", "--class", "{P}.LitNet", "--init-args", "{{width: 4}}"],
        r"--class .*size mismatch for model.1.weight",
    ),
    "arguments that are no mapping": (
        ["last.ckpt", "--class", "{P}.LitNet", "--init-args", "4"],
        r"--init-args must be a mapping such as '{width: 16}', got '4'",
    ),
    "arguments beside a config": (
        ["last.ckpt", "--config", "base.yaml", "--init-args", "{{}}"],
        r"--init-args belongs to --class",
    ),
    "no input": (["last.ckpt", "--class", "{P}.LitNet"], r"the network's input is not known: give --sample, --shape"),
    "a shape": (["last.ckpt", "--class", "{P}.LitNet", "--shape", "2,x"], r"--shape must be whole numbers .* '2,x'"),
    "a sample that is not there": (
        ["last.ckpt", "--class", "{P}.LitNet", "--sample", "x.pt"],
        r"sample: there is no file 'x.pt'",
    ),
    "a sample of another kind": (
        ["last.ckpt", "--class", "{P}.LitNet", "--sample", "x.png"],
        r"sample must be a .pt or a .npy file, got 'x.png'",
    ),
    "a path": (["last.ckpt", "--class", "{P}.LitNet", "--out", "a.pt"], r"path must end in '.onnx', got 'a.pt'"),
    "a folder that cannot be": (
        ["last.ckpt", "--class", "{P}.LitNet", "--out", "last.ckpt/a.onnx"],
        r"path 'last.ckpt/a.onnx' cannot be made because '.*last.ckpt' is not a directory",
    ),
    "a metric without a config": (
        ["last.ckpt", "--class", "{P}.LitNet", "--metric", "val_acc"],
        r"--metric is measured in the project's validation, which needs --config",
    ),
    "a tolerance without a metric": (
        ["last.ckpt", "--config", "base.yaml", "--tolerance", "0.1"],
        r"--tolerance 0.1 says how far a metric may move, but --metric is not given",
    ),
    "a tolerance": (
        ["last.ckpt", "--config", "base.yaml", "--metric", "val_acc", "--tolerance", "-1"],
        r"--tolerance must be a number of at least 0, got -1",
    ),
    "no scales": (
        ["last.ckpt", "--class", "{P}.LitNet", "--shape", "2,64", "--precision", "int8"],
        r"--precision int8 needs scales, and the checkpoint holds none; give --config of the project",
    ),
    "a config of another width": (
        ["last.ckpt", "--config", "wide.yaml"],
        r"checkpoint 'last.ckpt' does not fit LitNet: .*size mismatch",
    ),
    "an unknown network": (
        ["last.ckpt", "--config", "base.yaml", "--network", "modle"],
        r"--network names 'modle', .*did you mean 'model'\?",
    ),
}


SLOW = ("a config of another width", "an unknown network", "arguments of another width", "no scales")


@pytest.mark.parametrize("what", [pytest.param(what, marks=[pytest.mark.slow] * (what in SLOW)) for what in BAD])
def test_bad_usage_is_told_and_writes_nothing(what, project, capsys):
    saved(project)
    project.yaml("wide.yaml", project.config(width=16))
    (project.folder / "cut.ckpt").write_bytes((project.folder / "last.ckpt").read_bytes()[:1500])
    arguments, message = BAD[what]
    before = sorted(path.name for path in project.folder.iterdir())
    code, line = exported(capsys, *(argument.format(P=project.name) for argument in arguments))
    assert code == 2
    assert re.search(message, line), line
    assert {path.name for path in project.folder.iterdir()} - set(before) <= {"__pycache__"}


def test_a_fault_of_our_own_is_no_bad_usage(monkeypatch):
    monkeypatch.setattr("lightning_compress.commands.export.read_checkpoint", lambda *_, **__: {})
    monkeypatch.setattr("lightning_compress.commands.export._loaded", lambda *_, **__: int("ours"))
    with pytest.raises(ValueError, match="ours"):
        main(["export", "last.ckpt", "--class", "pkg.Net", "--shape", "1,2"])


@pytest.mark.slow
def test_a_class_and_a_shape(project, capsys):
    module = saved(project, width=4)
    code, line = exported(capsys, "last.ckpt", "--class", f"{project.name}.LitNet", "--shape", "2,64")
    assert code == 0
    assert re.search(r"wrote last\.onnx \(fp32, .* kB; largest difference to the checkpoint \d", line)
    images = torch.rand(5, 64)
    assert torch.allclose(outputs("last.onnx", images), module(images), atol=1e-5)


@pytest.mark.slow
def test_a_full_disk(project, capsys):
    saved(project)
    Path("last.onnx").write_text("an older one")
    with room_for(500):
        code, line = exported(capsys, "last.ckpt", "--class", f"{project.name}.LitNet", "--shape", "2,64")
    assert (code, Path("last.onnx").read_text()) == (2, "an older one")
    assert line.endswith("File too large: 'last.onnx'")
    assert not list(Path().glob(".last*"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pt", "npy", "example"])
def test_where_the_input_comes_from(kind, project, capsys):
    module = saved(project)
    if kind == "example":
        code = import_module(project.name)
        code.LitNet.example_input_array = torch.zeros(3, 64)
        given = []
    else:
        torch.save(torch.zeros(3, 64), "x.pt")
        np.save("x.npy", np.zeros((3, 64), dtype=np.float32))
        given = ["--sample", f"x.{kind}"]
    arguments = ["last.ckpt", "--class", f"{project.name}.LitNet", "--out", "new/net.onnx", *given]
    assert exported(capsys, *arguments)[0] == 0
    images = torch.rand(2, 64)
    assert torch.allclose(outputs("new/net.onnx", images), module(images), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("project", NAMESPACES, indirect=True)
def test_a_config_gives_the_network_its_input_and_the_metric(project, capsys):
    module = trained(project)
    arguments = ["last.ckpt", "--config", project.base, "--metric", "val_acc", "--tolerance", "0.001"]
    code, line = exported(capsys, *arguments)
    assert code == 0
    [told] = re.findall(r"val_acc (\S+) in the file, (\S+) in the module", line)
    expected = exports.evaluate("last.onnx", module, load_project([project.base]).datamodule)["val_acc"]
    assert float(told[0]) == pytest.approx(expected, abs=1e-4)
    assert told[0] == told[1]
    assert OnnxNetwork("last.onnx").metadata["lightning_compress.network"] == "model"  # what the validation calls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "quantised"),
    [("int8", {}), ("int4", {"weight_bits": 4, "activation_bits": None})],
)
def test_integers_with_the_scales_of_the_checkpoint(precision, quantised, project, capsys):
    trained(project, callback("PTQCallback", **quantised))
    fp32 = exported(capsys, "last.ckpt", "--config", project.base, "--out", "fp32.onnx")
    arguments = ["--config", project.base, "--precision", precision, "--metric", "val_acc", "--tolerance", "0.02"]
    code, line = exported(capsys, "last.ckpt", *arguments)
    assert (fp32[0], code) == (0, 0)
    assert f"({precision}, " in line
    files = [(project.folder / name).stat().st_size for name in (f"last-{precision}.onnx", "fp32.onnx")]
    assert files[0] < files[1]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("project", NAMESPACES, indirect=True)
def test_scales_that_the_checkpoint_lacks_are_found_with_the_training_data(precision, project, capsys):
    module = trained(project)
    data = load_project([project.base]).datamodule
    exported(capsys, "last.ckpt", "--config", project.base, "--out", "fp32.onnx")
    arguments = ["--config", project.base, "--precision", precision, "--metric", "val_acc", "--tolerance", "0.02"]
    code, line = exported(capsys, "last.ckpt", *arguments)
    assert code == 0
    samples = r"\d+ samples of " if precision == "int8" else ""  # weights alone need none
    told = re.search(
        rf"\({precision}, .*; calibrated with {samples}the training data, .*; val_acc (\S+) in the file, "
        r"\S+ in the quantised module, (\S+) in full precision",
        line,
    )
    assert told, line
    assert float(told[1]) == pytest.approx(
        exports.evaluate(f"last-{precision}.onnx", module, data)["val_acc"], abs=1e-4
    )
    assert float(told[2]) == pytest.approx(exports.evaluate("fp32.onnx", module, data)["val_acc"], abs=1e-4)
    assert Path(f"last-{precision}.onnx").stat().st_size < Path("fp32.onnx").stat().st_size
    assert not Path("out").exists()
    assert not Path("lightning_logs").exists()


PTQ = "lightning_compress.PTQCallback"
CALIBRATIONS = {
    "its bits and its samples": (
        [callback(PTQ, weight_bits=4, max_samples=32, name="mine")],
        "int8",
        "calibrated with 32 samples of the training data as 'mine' of the config says, ",
    ),
    "by its short name, alone": (
        callback("PTQCallback", max_samples=32),
        "int8",
        "calibrated with 32 samples of the training data as 'ptq' of the config says, ",
    ),
    "for another network": (
        [callback(PTQ, network="model.1", max_samples=32)],
        "int8",
        "samples of the training data by the defaults, as 'ptq' of the config is for 'model.1', ",
    ),
    "of too many bits": (
        [callback(PTQ)],
        "int4",
        "calibrated with the training data by the defaults, as 'ptq' of the config gives weights of 8 bits, ",
    ),
    "one that trains its scales": (
        [callback("lightning_compress.QATCallback", weight_bits=4)],
        "int8",
        "samples of the training data by the defaults, as 'qat' of the config trains its scales, and had none yet, ",
    ),
    "the one of two that fits": (
        [callback(PTQ, network="model.1"), callback(PTQ, network="model", max_samples=32, name="mine")],
        "int8",
        "calibrated with 32 samples of the training data as 'mine' of the config says, ",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CALIBRATIONS)
@pytest.mark.parametrize("project", NAMESPACES, indirect=True)
def test_the_config_says_how_to_calibrate(case, project, capsys):
    callbacks, precision, told = CALIBRATIONS[case]
    saved(project)
    config = project.config([callback("PruningCallback", sparsity=0.5)])
    config["trainer"]["callbacks+" if case == "its bits and its samples" else "callbacks"] = callbacks
    arguments = ["--config", project.yaml("own.yaml", config), "--precision", precision, "--metric", "val_acc"]
    code, line = exported(capsys, "last.ckpt", *arguments)
    assert code == 0, line
    assert told in line
    if precision == "int8":
        widest = max(np.abs(values).max() for values in integers("last-int8.onnx"))
        assert (widest <= 7) == (case == "its bits and its samples")


@pytest.mark.slow
def test_callbacks_of_several_configs_and_of_classes_of_one_s_own(project, capsys):
    saved(project)
    project.write("own_ptq.py", "from lightning_compress import PTQCallback as P\n\n\nclass Mine(P):\n    pass\n")
    base = project.yaml("base.yaml", project.config())
    added = [callback("own_ptq.Mine", max_samples=32, name="2024-01-01")]
    more = project.yaml("more.yaml", {"trainer": {"callbacks+": added}})
    last = project.yaml("last.yaml", {"trainer": {"callbacks+": [callback("PruningCallback", sparsity=0.5)]}})
    none = project.yaml("none.yaml", {"trainer": {"callbacks": []}})
    for configs, told in (
        ((base, more, last), "calibrated with 32 samples of the training data as '2024-01-01' of the config says, "),
        ((base, more, none), " samples of the training data, largest"),
    ):
        given = [part for path in configs for part in ("--config", path)]
        code, line = exported(capsys, "last.ckpt", *given, "--precision", "int8")
        assert code == 0, line
        assert told in line


@pytest.mark.slow
def test_weights_that_know_their_grids_leave_a_calibration_out(project, capsys):
    """Of a fit with PSGD whose PTQ had not come yet."""
    trained(project, callback("PSGDCallback", bits=4))
    config = project.yaml("own.yaml", project.config([callback("PSGDCallback", bits=4), callback(PTQ)]))
    code, line = exported(capsys, "last.ckpt", "--config", config, "--precision", "int8")
    assert code == 0, line
    assert "; weights alone on the grids that they were trained for, as 'ptq' had no scales yet, largest" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callbacks", "told"),
    [
        ([callback(PTQ, observer="minmxa")], "did you mean 'minmax'?"),
        (
            [callback(PTQ, layer_bits={"model.2x": 4})],
            r"trainer.callbacks (PTQCallback 'ptq'): layer_bits has 'model.2x'",
        ),
        ([callback(PTQ, network="modle")], "(PTQCallback 'ptq'): network names 'modle'"),
        ([callback(PTQ), callback(PTQ, name="two")], "trainer.callbacks: 'ptq', 'two' quantise one network; keep one"),
    ],
)
def test_a_calibration_of_the_config_that_cannot_be(callbacks, told, project, capsys):
    saved(project)
    config = project.yaml("own.yaml", project.config(callbacks))
    code, line = exported(capsys, "last.ckpt", "--config", config, "--precision", "int8")
    assert code == 2
    assert told in line
    assert not list(Path().glob("*.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "kept"), [("val_acc", (True, False)), ("val_loss", (False, True)), ("m", (False, False))]
)
def test_a_file_that_is_better_than_full_precision_is_kept(metric, kept, project, capsys, monkeypatch):
    """Where the metric's name says which way that is."""
    saved(project)
    monkeypatch.setattr(export_command, "evaluate_forward", lambda *_: {metric: 0.5})
    for better, expected in zip((0.6, 0.4), kept, strict=True):
        monkeypatch.setattr(export_command, "evaluate", lambda *_, better=better: {metric: better})
        monkeypatch.setattr(export_command, "evaluate_quantized", lambda *_, better=better: {metric: better})
        arguments = ["--config", project.base, "--precision", "int8", "--metric", metric, "--tolerance", "0.05"]
        code, line = exported(capsys, "last.ckpt", *arguments)
        assert (code == 0) == expected, line


@pytest.mark.slow
@pytest.mark.parametrize("owner", ["LitNet.validation_step", "Data.val_dataloader", "Data.train_dataloader"])
def test_what_is_needed_to_find_scales_is_named(owner, project, capsys, monkeypatch):
    saved(project)
    kind, name = owner.split(".")
    code = import_module(project.name)
    monkeypatch.setattr(code.Data, "val_dataloader", code.Data.val_dataloader)
    monkeypatch.delattr(getattr(code, kind), name)
    code, line = exported(capsys, "last.ckpt", "--config", project.base, "--precision", "int8", "--shape", "2,64")
    assert code == 2
    assert line.endswith(f"the checkpoint holds none; they cannot be found either, as {kind} has no {name}")
    assert not list(Path().glob("*.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["class", "config"])
def test_a_structurally_pruned_checkpoint(how, project, capsys):
    pytest.importorskip("torch_pruning")
    module = trained(project, callback("StructuredPruningCallback", ratio=0.5, min_channels=2))
    assert module.model[1].out_features == 4
    given = ["--config", project.base] if how == "config" else ["--class", f"{project.name}.LitNet", "--shape", "2,64"]
    assert exported(capsys, "last.ckpt", *given)[0] == 0
    images = torch.rand(3, 64)
    assert torch.allclose(outputs("last.onnx", images), module(images), atol=1e-5)


@pytest.mark.slow
def test_a_config_whose_devices_and_teachers_are_not_here(project, capsys):
    """Neither is needed to write a file."""
    module = saved(project)
    teacher = callback(
        "lightning_compress.teacher_from_checkpoint", class_path="torch.nn.Identity", ckpt_path="no.ckpt"
    )
    config = project.config([callback("DistillationCallback", teacher=teacher)])
    config["trainer"].update(accelerator="gpu", devices=8, strategy="ddp", precision="16-mixed")
    assert exported(capsys, "last.ckpt", "--config", project.yaml("gpu.yaml", config))[0] == 0
    images = torch.rand(3, 64)
    assert torch.allclose(outputs("last.onnx", images), module(images), atol=1e-5)


@pytest.mark.slow
def test_ctrl_c_in_the_project_s_validation(project, capsys, monkeypatch):
    saved(project)
    monkeypatch.setattr(
        import_module(project.name).LitNet, "validation_step", lambda *_: signal.raise_signal(signal.SIGINT)
    )
    handler = signal.getsignal(signal.SIGINT)
    assert exported(capsys, "last.ckpt", "--config", project.base) == (130, "lightning-compress export: interrupted")
    assert signal.getsignal(signal.SIGINT) is handler
    assert not list(project.folder.glob("*.onnx"))


@pytest.mark.slow
def test_what_takes_long_gives_a_sign(project, capsys, monkeypatch):
    saved(project)
    said = []

    @contextmanager
    def bar(_, what, total):
        said.append(what)
        yield lambda: None

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("lightning_compress.mechanisms.signs._tqdm", bar)
    assert exported(capsys, "last.ckpt", "--config", project.base, "--metric", "val_acc")[0] == 0
    assert said == ["Loading last.ckpt", "Exporting last.onnx", "Validating the network", "Validating the file"]


@pytest.mark.slow
def test_what_the_user_s_steps_raise_is_told_with_its_type(project, capsys, monkeypatch):
    saved(project)
    monkeypatch.setattr(import_module(project.name).LitNet, "validation_step", lambda self, batch, batch_idx: {}["key"])
    code, line = exported(capsys, "last.ckpt", "--config", project.base)
    assert code == 1
    assert "the steps or the data of LitNet failed: KeyError: 'key'" in line


@pytest.mark.slow
@pytest.mark.parametrize("what", ["tolerance", "parity", "metric"])
def test_a_file_that_fails_is_not_kept_and_the_old_one_stays(what, project, capsys, monkeypatch):
    saved(project)
    old = project.folder / "last.onnx"
    old.write_bytes(b"the old one")
    metric = ["--metric", "val_acc", "--tolerance", "0.001"]
    if what == "tolerance":
        monkeypatch.setattr("lightning_compress.commands.export.evaluate", lambda *_: {"val_acc": 2.0})
    elif what == "parity":

        def differ(*_, **__):
            raise ExportError("the file differs from the network")

        monkeypatch.setattr("lightning_compress.export.onnx.check_parity", differ)
    else:
        metric = ["--metric", "val_ac"]
    code, line = exported(capsys, "last.ckpt", "--config", project.base, *metric)
    messages = {
        "tolerance": (1, "beyond the tolerance of 0.001; the file was not kept"),
        "parity": (1, "differs from the network"),
        "metric": (2, "--metric must be one of val_acc, .*did you mean 'val_acc'"),
    }
    assert code == messages[what][0]
    assert re.search(messages[what][1], line), line
    assert old.read_bytes() == b"the old one"
    assert not list(project.folder.glob(".*.onnx"))


def test_a_module_without_a_forward_names_the_network_inside_as_the_shell_does(tmp_path, monkeypatch, capsys):
    """The project of the first page of the documentation."""
    page = Path(lightning_compress.__file__).parents[1] / "docs" / "start.md"
    code = page.read_text(encoding="utf-8").partition("```python\n")[2].partition("from sklearn")[0]
    (tmp_path / "first_page.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    module = import_module("first_page").LitNet(width=16).eval()
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": {"width": 16}, **VERSION}, "last.ckpt")
    arguments = ["last.ckpt", "--class", "first_page.LitNet", "--shape", "1,1,8,8"]
    code, line = exported(capsys, *arguments)
    assert code == 2
    assert line.endswith(
        ": LitNet has no forward; pass the dotted name of a network inside it, such as --network model"
    )
    code, line = exported(capsys, *arguments, "--network", "model")
    assert code == 0, line
    images = torch.randn(3, 1, 8, 8)
    assert np.allclose(outputs("last.onnx", images), module.model(images).detach(), atol=1e-5)
