"""Recipes: what is read, what is refused and in which words, and what is built from where."""

from __future__ import annotations

import gc
import os
import re
import sys

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from lightning_compress import CompressionReport, DistillationCallback, ExportCallback
from lightning_compress.recipe import Recipe, RecipeError, build_callbacks, check_outputs, export_paths, load_recipe

KD = "- class_path: DistillationCallback\n  init_args: {teacher: {class_path: torch.nn.Identity}"


@pytest.fixture
def write(tmp_path):
    def written(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return written


def test_a_whole_recipe(write):
    path = write(f"""
version: 1
callbacks:
{KD}, temperature: 2e0}}
export: {{path: out/model.onnx, precision: fp32, metric: val_acc, tolerance: 1e-2}}
apply_to: {{module: mypkg.LitNet, fit: 2}}
""")
    assert load_recipe(path) == Recipe(
        version=1,
        callbacks=(
            {
                "class_path": "DistillationCallback",
                "init_args": {"teacher": {"class_path": "torch.nn.Identity"}, "temperature": 2.0},
            },
        ),
        export={"path": "out/model.onnx", "precision": "fp32", "metric": "val_acc", "tolerance": 0.01},
        apply_to={"module": "mypkg.LitNet", "fit": 2},
        path=str(path),
    )


UNUSABLE = {
    "nothing in it": ("", "a recipe is a mapping with the keys version, callbacks, export, apply_to, got nothing"),
    "a list": ("- 1", "got [1]"),
    "no version": ("export: {path: a.onnx}", "version must be 1, got nothing"),
    "a word for a version": ("version: one\nexport: {path: a.onnx}", "version must be 1, got 'one'"),
    "true for a version": ("version: true\nexport: {path: a.onnx}", "version must be 1, got True"),
    "a newer version": ("version: 2\nexport: {path: a.onnx}", "version 2 is newer than 1, the newest that"),
    "an unknown key": (
        "version: 1\ncallback: [3]",
        "recipe: unknown key 'callback' with the value [3]; accepted are version, callbacks, export, apply_to; "
        "did you mean 'callbacks'?",
    ),
    "nothing to do": ("version: 1\ncallbacks: []", "the recipe asks for nothing: it needs callbacks, export, or both"),
    "callbacks as a mapping": ("version: 1\ncallbacks: {a: 1}", "callbacks must be a list of class_path and init_args"),
    "a callback as a word": (
        "version: 1\ncallbacks: [DistillationCallback]",
        "callbacks[0] must be a mapping with a class_path and init_args, got 'DistillationCallback'",
    ),
    "an unknown key of a callback": (
        "version: 1\ncallbacks: [{class_path: CompressionReport, init_arg: {}}]",
        "callbacks[0]: unknown key 'init_arg' with the value {}; accepted are class_path, init_args; "
        "did you mean 'init_args'?",
    ),
    "arguments as a list": (
        "version: 1\ncallbacks: [{class_path: CompressionReport, init_args: [1]}]",
        "callbacks[0].init_args must be a mapping from names to values, got [1]",
    ),
    "an unknown class": (
        "version: 1\ncallbacks: [{class_path: DistilationCallback}]",
        "callbacks[0]: class_path 'DistilationCallback' is no callback of lightning_compress, which has "
        "AttentionTransferCallback, CompressionReport, DCILCallback, DPFCallback, DistillationCallback, "
        "ExportCallback, FactorTransferCallback",
    ),
    "the base class": (
        "version: 1\ncallbacks: [{class_path: CompressionCallback}]",
        "class_path 'CompressionCallback' is no callback of lightning_compress",
    ),
    "an unknown package": (
        "version: 1\ncallbacks: [{class_path: no_such.Thing}]",
        "callbacks[0]: class_path names 'no_such.Thing', but 'no_such' cannot be imported",
    ),
    "an unknown class of a package": (
        "version: 1\ncallbacks: [{class_path: lightning.pytorch.callbacks.EarlyStoping}]",
        "has no class or function 'EarlyStoping'; did you mean 'EarlyStopping'?",
    ),
    "no callback": (
        "version: 1\ncallbacks: [{class_path: torch.nn.Linear}]",
        "callbacks[0]: class_path 'torch.nn.Linear' is not a Callback class",
    ),
    "an unknown argument": (
        f"version: 1\ncallbacks:\n{KD}, temprature: 3}}",
        "callbacks[0] (DistillationCallback): unknown key 'temprature' with the value 3; accepted are teacher, student",
    ),
    "an unknown argument of another package": (
        "version: 1\ncallbacks: [{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitr: v}}]",
        "callbacks[0] (EarlyStopping): unknown key 'monitr' with the value 'v'",
    ),
    "a missing argument": (
        "version: 1\ncallbacks: [{class_path: DistillationCallback}]",
        "callbacks[0] (DistillationCallback): the required key 'teacher' is missing",
    ),
    "a value of another type": (
        f"version: 1\ncallbacks:\n{KD}, temperature: hot}}",
        "callbacks[0] (DistillationCallback): temperature must be a number, got 'hot'",
    ),
    "a value that is not offered": (
        f"version: 1\ncallbacks:\n{KD}, loss_kind: softmx}}",
        "'softmx'; did you mean 'softmax'?",
    ),
    "an export without a path": (
        "version: 1\nexport: {}",
        "export (ExportCallback): the required key 'path' is missing",
    ),
    "an export as a word": (
        "version: 1\nexport: a.onnx",
        "export must be a mapping from names to values, got 'a.onnx'",
    ),
    "an unknown key of export": (
        "version: 1\nexport: {path: a.onnx, tolerence: 1}",
        "export (ExportCallback): unknown key 'tolerence' with the value 1; accepted are path, precision, metric",
    ),
    "an empty apply_to": (
        "version: 1\nexport: {path: a.onnx}\napply_to: {}",
        "apply_to says nothing: it needs module (a class), fit (a number from 1 on), or both",
    ),
    "an unknown key of apply_to": (
        "version: 1\nexport: {path: a.onnx}\napply_to: {modul: A}",
        "apply_to: unknown key 'modul' with the value 'A'; accepted are module, fit; did you mean 'module'?",
    ),
    "fit 0": (
        "version: 1\nexport: {path: a.onnx}\napply_to: {fit: 0}",
        "apply_to.fit must be a whole number from 1 on",
    ),
    "a list of modules": (
        "version: 1\nexport: {path: a.onnx}\napply_to: {module: [A]}",
        "apply_to.module must be the path or the name of a class, got ['A']",
    ),
    "a key twice": (
        "version: 1\nexport: {path: a.onnx}\nexport: {path: b.onnx}",
        "line 3, column 1: not YAML: the key 'export' appears twice",
    ),
    "a bracket left open": ("version: 1\nexport: {path: [a.onnx}", "line 2, column 23: not YAML: "),
}
NEAREST = {
    "an unknown class": "did you mean 'DistillationCallback'?",
    "an unknown argument": "did you mean 'temperature'?",
    "an unknown argument of another package": "did you mean 'monitor'?",
    "an unknown key of export": "did you mean 'tolerance'?",
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_cannot_be_used_is_refused_by_name(write, case):
    text, message = UNUSABLE[case]
    path = write(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert NEAREST.get(case, "") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", [3, None, b"recipe.yaml", "", "a\0b"])
def test_what_is_no_path(path):
    with pytest.raises(RecipeError, match=rf"path must (not )?be .*, got {re.escape(repr(path))}"):
        load_recipe(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"none.yaml: the recipe cannot be read: No such file or directory"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="the recipe cannot be read: Is a directory"):
        load_recipe(tmp_path)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"version: \xff")
    with pytest.raises(RecipeError, match="not YAML: 'utf-8' codec can't decode"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 1000, "the recipe is too large or nested too deeply to be read"),
        (f"version: {'9' * 5000}", "not YAML: Exceeds the limit"),
        (f"version: -0x{'f' * 5000}", "version must be 1, got a very large int"),
        ("? [a]\n: b", "not YAML: found unhashable key"),
        (f"? {'k' * 5000}\n: 1", "unknown key 'kkkkkkkkkk"),
    ],
)
def test_what_is_too_large_is_refused_in_few_words(write, text, message):
    path = write(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert message in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 300


@pytest.mark.parametrize(
    "value",
    [
        "[&a0 x, " + ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)) + "]",
        "&a [*a]",
        "&a {b: *a}",
    ],
)
def test_a_value_that_unfolds_without_end_is_refused(write, value):
    with pytest.raises(RecipeError, match="its aliases unfold to too many values, or without end"):
        load_recipe(write(f"version: 1\nexport: {{path: a.onnx, sample: {value}}}"))


def test_loading_builds_no_teacher(write, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("built")

    monkeypatch.setattr(torch.nn.Identity, "__init__", never)
    path = write(f"version: 1\ncallbacks:\n{KD}}}")
    assert len(load_recipe(path).callbacks) == 1


def test_a_teacher_need_not_exist_where_the_recipe_is_checked(write):
    path = write("version: 1\ncallbacks:\n- {class_path: DistillationCallback, init_args: {teacher: my.own.Net}}")
    assert load_recipe(path).entries == [("callbacks[0]", "DistillationCallback", {"teacher": "my.own.Net"})]


def test_classes_of_the_script_are_left_to_the_script(write):
    path = write("version: 1\ncallbacks: [{class_path: train.Mine}]")
    assert load_recipe(path, unseen=["train"]).callbacks == ({"class_path": "train.Mine"},)
    with pytest.raises(RecipeError, match="'train' cannot be imported"):
        load_recipe(path)


def test_building(write):
    path = write(f"""
version: 1
callbacks:
{KD}, temperature: 2}}
- {{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {{monitor: val_loss, patience: 7}}}}
- {{class_path: lightning_compress.ExportCallback, init_args: {{path: first.onnx, name: first, sample: in.npy}}}}
export: {{path: deep/model.onnx}}
""")
    recipe = load_recipe(path)
    here = os.getcwd()
    callbacks = build_callbacks(recipe, path.parent)
    assert os.getcwd() == here
    assert [type(callback) for callback in callbacks] == [
        DistillationCallback, EarlyStopping, ExportCallback, ExportCallback, CompressionReport,
    ]  # fmt: skip
    kd, stopping, first, export, report = callbacks
    assert isinstance(kd.teacher, torch.nn.Identity)
    assert (kd.temperature, stopping.patience) == (2.0, 7)
    assert (first.path, export.path) == (str(path.parent / "first.onnx"), str(path.parent / "deep" / "model.onnx"))
    assert (first.sample, export.sample) == (str(path.parent / "in.npy"), None)
    assert report.recipe["export"] == {"path": "deep/model.onnx"}
    assert export_paths(recipe) == ["first.onnx", "deep/model.onnx"]


def test_a_class_of_another_package_may_have_the_same_name(tmp_path, write, monkeypatch):
    classes = "".join(f"class {name}(Callback):\n    pass\n" for name in ("ExportCallback", "CompressionReport"))
    (tmp_path / "their_own.py").write_text(f"from lightning.pytorch import Callback\n{classes}")
    monkeypatch.syspath_prepend(tmp_path)
    path = write("""
version: 1
callbacks:
- class_path: their_own.ExportCallback
- {class_path: train.ExportCallback, init_args: {path: theirs.onnx}}
- {class_path: lightning_compress.callbacks.export.ExportCallback, init_args: {path: first.onnx}}
- {class_path: their_own.CompressionReport}
export: {path: second.onnx, metric: val_acc}
""")
    recipe = load_recipe(path, unseen=["train"])
    check_outputs(recipe)
    assert export_paths(recipe) == ["first.onnx", "second.onnx"]
    assert "train" not in sys.modules
    del sys.modules["their_own"]
    gc.collect()  # for LightningCLI would find two classes of one name in the tests after this one


def test_a_report_of_the_recipe_is_the_only_one(write):
    path = write("version: 1\ncallbacks: [{class_path: CompressionReport, init_args: {path: here, latency: false}}]")
    (report,) = build_callbacks(load_recipe(path), path.parent)
    assert (report.latency, report.path) == (False, str(path.parent / "here"))
    export = Recipe(1, export={"path": "a.onnx"})
    assert [type(callback) for callback in build_callbacks(export, ".", add_report=False)] == [ExportCallback]


def test_relative_paths_of_a_teacher_start_where_the_command_was_called(write, monkeypatch):
    recipe = write("""
version: 1
callbacks:
- class_path: DistillationCallback
  init_args:
    teacher:
      class_path: lightning_compress.teacher_from_checkpoint
      init_args: {class_path: torch.nn.Linear, ckpt_path: teacher.ckpt, init_args: {in_features: 2, out_features: 3}}
""")
    layer = torch.nn.Linear(2, 3)
    torch.save(layer.state_dict(), recipe.parent / "teacher.ckpt")
    (recipe.parent / "elsewhere").mkdir()
    monkeypatch.chdir(recipe.parent / "elsewhere")
    kd, _ = build_callbacks(load_recipe(recipe), recipe.parent)
    assert torch.equal(kd.teacher.weight, layer.weight)


TEACHER = "teacher: {class_path: my.Net}"
REFUSED = {
    "ratio: 50": ("StructuredPruningCallback", "ratio must be a number in (0, 1), got 50.0; did you mean 0.5?"),
    "sparsity: 1.5": ("DCILCallback", "sparsity must be a number in [0, 1), got 1.5; did you mean 0.015?"),
    "weight_bits: 9": ("PTQCallback", "weight_bits must be a whole number from 2 to 8, got 9"),
    "bits: 1": ("PSGDCallback", "bits must be a whole number from 2 to 8, got 1"),
    "start: 2": ("QATCallback", "start must be a number in [0, 1], got 2.0; did you mean 0.02?"),
    "sparsity: 0.5, start: 0.9": ("DPFCallback", "start must be at most end, got start=0.9 and end=0.75"),
    "path: a.onnx, tolerance: 0.1": ("ExportCallback", "tolerance=0.1 says how far a metric may move"),
    "path: a.onnx, precision: int9": ("ExportCallback", "precision must be one of fp32, int8, int4, got "),
    "path: recipe.yaml": ("CompressionReport", "path must be a directory, and 'recipe.yaml' is a file"),
    f"{TEACHER}, temperature: -1": ("DistillationCallback", "temperature must be a positive number, got -1.0"),
    f"{TEACHER}, mode: coed, weight: 1": ("AttentionTransferCallback", "coed"),
    "teacher: kd, pretrain_epochs: -1": ("FactorTransferCallback", "pretrain_epochs must be a whole number"),
    "teacher: 3": ("DistillationCallback", "teacher must be a torch.nn.Module, or a class_path with init_args, got "),
    "teacher: {class_path: my.Net, init_arg: {}}": (
        "DistillationCallback", "teacher has the key 'init_arg'; accepted are class_path, init_args and dict_kwargs; d",
    ),
    "teacher: {class_path: my.Net, init_args: [1]}": (
        "DistillationCallback", "teacher: init_args must be a mapping from names to values, got [1]",
    ),
    "teacher: {class_path: lightning_compress.teacher_from_checkpoint, init_args: {ckpt: a, class_path: my.Net}}": (
        "DistillationCallback", "init_args has 'ckpt', which lightning_compress.teacher_from_checkpoint does not take",
    ),
    "teacher: {class_path: lightning_compress.teacher_from_checkpoint, init_args: {class_path: my.Net}}": (
        "DistillationCallback", "teacher: lightning_compress.teacher_from_checkpoint is missing a required argument: '",
    ),
}  # fmt: skip


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_a_constructor_refuses_is_found_without_a_teacher(write, monkeypatch, arguments):
    cls, message = REFUSED[arguments]
    path = write(f"version: 1\ncallbacks: [{{class_path: {cls}, init_args: {{{arguments}}}}}]")
    monkeypatch.chdir(path.parent)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"{path}: callbacks[0] ({cls}): ")
    assert message in str(error.value)


UNBUILT = {
    "torch.nn.Lineer": ": teacher names 'torch.nn.Lineer', but 'torch.nn' has no class or function 'Lineer'; did you m",
    "{class_path: lightning_compress.teacher_from_checkpoint, init_args: {class_path: torch.nn.ReLU, ckpt_path: a}}": (
        ".teacher: ckpt_path: there is no file a"
    ),
    "{class_path: lightning_compress.teacher_from_checkpoint, init_args: {class_path: my_project.A, ckpt_path: a}}": (
        ".teacher: class_path names 'my_project.A', but 'my_project' cannot be imported: ModuleNotFoundError: No module"
    ),
    "{class_path: torch.nn.Linear, init_args: {in_features: 2}}": (
        ": teacher could not be built: torch.nn.Linear(**{'in_features': 2}) raised TypeError: "
    ),
}


@pytest.mark.parametrize("teacher", UNBUILT)
def test_a_teacher_that_cannot_be_built_names_the_entry(write, teacher):
    path = write(f"version: 1\ncallbacks:\n- {{class_path: DistillationCallback, init_args: {{teacher: {teacher}}}}}")
    with pytest.raises(RecipeError) as error:
        build_callbacks(load_recipe(path), ".")
    assert str(error.value).startswith(f"{path}: callbacks[0] (DistillationCallback){UNBUILT[teacher]}")
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__


def test_what_the_users_own_class_raises_keeps_its_trace(tmp_path, write, monkeypatch):
    (tmp_path / "own.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Mine(Callback):\n"
        "    def __init__(self): raise ValueError('no')\n"
        "def network(): raise ValueError('none')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write("version: 1\ncallbacks: [{class_path: own.Mine}]")
    with pytest.raises(RecipeError, match=r"callbacks\[0\] \(Mine\) could not be built: ValueError: no$") as error:
        build_callbacks(load_recipe(path), ".")
    assert isinstance(error.value.__cause__, ValueError)
    path = write("version: 1\ncallbacks: [{class_path: DistillationCallback, init_args: {teacher: own.network}}]")
    with pytest.raises(
        RecipeError, match=r"teacher could not be built: own.network\(.*\) raised ValueError: n"
    ) as error:
        build_callbacks(load_recipe(path), ".")
    assert str(error.value.__cause__) == "none"
    sys.modules.pop("own")


def test_arguments_of_a_class_that_takes_any(tmp_path, write, monkeypatch):
    (tmp_path / "own.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Schedule:\n"
        "    def __init__(self, power: int): self.power = power\n"
        "class Mine(Callback):\n"
        "    def __init__(self, schedule: Schedule, untyped, **more):\n"
        "        self.seen = (schedule.power, untyped, more)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write("""
version: 1
callbacks:
- class_path: own.Mine
  init_args: {schedule: {class_path: own.Schedule, init_args: {power: 3}}, untyped: [1], other: 2}
""")
    (mine,) = build_callbacks(load_recipe(path), tmp_path, add_report=False)
    assert mine.seen == (3, [1], {"other": 2})
    sys.modules.pop("own")


def test_the_config_of_a_cli_is_no_recipe(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("trainer: {callbacks: [{class_path: lightning_compress.PruningCallback}]}")
    with pytest.raises(RecipeError, match=r"the config of a LightningCLI.*trainer\.callbacks under 'callbacks'"):
        load_recipe(file)
