"""Changes of a recipe from the command line: where a key leads, and what is said where it leads nowhere."""

from __future__ import annotations

from copy import deepcopy

import pytest

from lightning_compress.recipe import RecipeError, load_recipe
from lightning_compress.recipe.settings import changed

TEACHER = {"class_path": "lightning_compress.teacher_from_checkpoint", "init_args": {"ckpt_path": "a.ckpt"}}
RECIPE = {
    "version": 1,
    "callbacks": [
        {"class_path": "DistillationCallback", "init_args": {"teacher": TEACHER, "layers": ["a", "b"]}},
        {"class_path": "lightning_compress.PruningCallback", "init_args": {"sparsity": 0.5}},
        {"class_path": "PruningCallback", "init_args": {"sparsity": 0.5, "name": "second"}},
        {"class_path": "lightning.pytorch.callbacks.EarlyStopping"},
    ],
    "export": {"path": "a.onnx"},
}


def at(recipe, *way):
    for step in way:
        recipe = recipe[step]
    return recipe


@pytest.mark.parametrize(
    ("setting", "way", "value"),
    [
        ("DistillationCallback.temperature=2", ("callbacks", 0, "init_args", "temperature"), 2),
        ("kd.temperature=1e-3", ("callbacks", 0, "init_args", "temperature"), 0.001),
        ("kd.teacher.init_args.ckpt_path=b=c.ckpt", ("callbacks", 0, "init_args", "teacher", "init_args", "ckpt_path"),
         "b=c.ckpt"),
        ("kd.layers[1]=c", ("callbacks", 0, "init_args", "layers"), ["a", "c"]),
        ("kd.teacher=torch.nn.Identity", ("callbacks", 0, "init_args", "teacher"), "torch.nn.Identity"),
        ("second.sparsity=0.9", ("callbacks", 2, "init_args", "sparsity"), 0.9),
        ("pruning.sparsity=0.9", ("callbacks", 1, "init_args", "sparsity"), 0.9),
        ("callbacks[1].init_args.sparsity=0.9", ("callbacks", 1, "init_args", "sparsity"), 0.9),
        ("callbacks[1].class_path=DPFCallback", ("callbacks", 1, "class_path"), "DPFCallback"),
        ("EarlyStopping.monitor=val_loss", ("callbacks", 3, "init_args"), {"monitor": "val_loss"}),
        ("export.precision=int8", ("export",), {"path": "a.onnx", "precision": "int8"}),
        ("ExportCallback.path=b.onnx", ("export", "path"), "b.onnx"),
        ("apply_to.module=train.Net", ("apply_to",), {"module": "train.Net"}),
        ("export=", ("export",), None),
        ("kd.layers=[x, y]", ("callbacks", 0, "init_args", "layers"), ["x", "y"]),
    ],
)  # fmt: skip
def test_where_a_key_leads(setting, way, value):
    before = deepcopy(RECIPE)
    assert at(changed(RECIPE, [setting]), *way) == value
    assert before == RECIPE


def test_several_in_turn_and_nothing_else_changes():
    result = changed(RECIPE, ["kd.temperature=2", "kd.temperature=3", "export.path=b.onnx"])
    assert result["callbacks"][0]["init_args"] == {"teacher": TEACHER, "layers": ["a", "b"], "temperature": 3}
    assert result["callbacks"][1:] == RECIPE["callbacks"][1:]
    assert result["export"] == {"path": "b.onnx"}


def test_an_alias_elsewhere_keeps_its_value(tmp_path):
    text = "version: 1\ncallbacks:\n- {class_path: DPFCallback, init_args: &a {sparsity: 0.5}}\n"
    text += "- {class_path: DCILCallback, init_args: *a}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml", settings=["dcil.sparsity=0.8"])
    assert [arguments["sparsity"] for _, _, arguments in recipe.entries] == [0.5, 0.8]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("kd.temperature", "--set takes KEY=VALUE, such as DCILCallback.sparsity=0.8, got 'kd.temperature'"),
        ("=3", "--set takes KEY=VALUE"),
        ("kd..temperature=3", "--set takes KEY=VALUE"),
        ("kd.layers[-1]=3", "--set takes KEY=VALUE"),
        ("kd.temperature=[", "--set kd.temperature: line 1, column 2: not YAML"),
        ("kd=3", "--set kd: 'kd' is a callback; an argument of it comes behind a dot"),
        (
            "DistilationCallback.temperature=3",
            "neither a key nor a callback 'DistilationCallback'; there are version, ",
        ),
        ("DistilationCallback.temperature=3", "; did you mean 'DistillationCallback'?"),
        ("exprt.path=3", "; did you mean 'export'?"),
        ("PruningCallback.sparsity=0.1", "the recipe has 2 callbacks 'PruningCallback'; say which one by its name"),
        ("callbacks[4].init_args=3", "callbacks has 4 entries, counted from 0, and so none at 4"),
        ("callbacks.kd=3", "callbacks is [{'class_path'"),
        ("kd.layers.a=3", "callbacks[0].init_args.layers is ['a', 'b'], which has no keys, and so no 'a'"),
        ("export.path.to=3", "export.path is 'a.onnx', which has no keys, and so no 'to'"),
        ("export.path[0]=3", "export.path is no list, but 'a.onnx'"),
        ("version[0]=3", "version is no list, but 1"),
    ],
)
def test_what_leads_nowhere(setting, message):
    with pytest.raises(RecipeError) as error:
        changed(RECIPE, [setting])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("dcil.sparsty=0.8", "callbacks[0] (DCILCallback): unknown key 'sparsty' with the value 0.8; accepted are"),
        ("dcil.sparsity=1.5", "callbacks[0] (DCILCallback): sparsity must be a number in [0, 1), got 1.5"),
        ("version=2", "version 2 is newer than 1"),
        ("apply_to.fit=0", "apply_to.fit must be a whole number from 1 on, got 0"),
        ("callbacks[0]=3", "callbacks[0] must be a mapping with a class_path and init_args, got 3"),
        ("callbacks[0].class_path=DCILCalback", "did you mean 'DCILCallback'?"),
        ("export.pth=a.onnx", "export (ExportCallback): unknown key 'pth' with the value 'a.onnx'"),
    ],
)
def test_the_changed_recipe_is_checked_like_any_other(tmp_path, setting, message):
    path = tmp_path / "recipe.yaml"
    path.write_text("version: 1\ncallbacks: [{class_path: DCILCallback, init_args: {sparsity: 0.5}}]")
    with pytest.raises(RecipeError) as error:
        load_recipe(path, settings=[setting])
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
