"""Files that the first schemas wrote are read by the package as it is now; those of newer ones are refused by name."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import schema_files
import torch
from cases import CASES, each_case
from contract.modules import BATCH, STEPS, Classifier, loader, made, teacher_for, trainer

from lightning_compress import FactorTransferCallback
from lightning_compress.commands.exits import UsageError
from lightning_compress.commands.sensitivity.journal import NAME, Journal
from lightning_compress.recipe import RecipeError, build_callbacks, load_recipe

FOLDERS = sorted((Path(__file__).parent / "data").glob("schema_*"))
SMALL = 200_000  # bytes of a folder


def state_in(path: Path, key: str) -> dict:
    return torch.load(path, weights_only=True)["callbacks"][key]


def test_there_are_files_and_they_are_small():
    assert [folder.name for folder in FOLDERS] == ["schema_1"]
    for folder in FOLDERS:
        assert sum(path.stat().st_size for path in folder.iterdir()) < SMALL


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@each_case()
def test_a_fit_goes_on_from_an_old_checkpoint(case, folder, tmp_path):
    callback, module = case.build(tmp_path, Classifier), made(Classifier)
    path = folder / f"{case.name}.ckpt"
    saved = state_in(path, callback.state_key)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*resumes with other arguments")
        fitting = trainer(callback)
        fitting.fit(module, loader(), loader(rows=BATCH), ckpt_path=path, weights_only=True)
    assert fitting.global_step == STEPS
    now = callback.state_dict()
    assert set(saved) <= set(now)  # nothing that was kept then has been forgotten since
    assert {key: now["arguments"][key] for key in saved["arguments"] if key not in callback.places} == {
        key: value for key, value in saved["arguments"].items() if key not in callback.places
    }


@each_case()
def test_a_newer_state_is_refused_by_name(case, tmp_path):
    callback = case.build(tmp_path, Classifier)
    with pytest.raises(ValueError, match=f"state of '{callback.name}' has schema 2, newer than 1.*upgrade"):
        callback.load_state_dict({**callback.state_dict(), "schema": 2})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@each_case()
def test_a_damaged_state_is_refused_by_name_before_it_is_used(case, folder, tmp_path):
    callback = case.build(tmp_path, Classifier)
    saved = state_in(folder / f"{case.name}.ckpt", callback.state_key)
    callback._refuse_damaged(saved)
    owner = rf"state of '{callback.name}' \({type(callback).__name__}\) is damaged: "
    for damaged in (None, [1], {}, {**saved, "schema": -1}, {**saved, "schema": "1"}):
        with pytest.raises(ValueError, match=owner):
            callback.load_state_dict(damaged)
    for key in saved:  # each is declared
        with pytest.raises(ValueError, match=f"{owner}'{key}' must be .*, got <object"):
            callback.load_state_dict({**saved, key: object()})
    cut = dict.fromkeys(callback.state_dict(), None)
    for key in set(saved) & set(cut) - {"pairs", "student", "highest_lr"}:  # without which older ones are read
        with pytest.raises(ValueError, match=f"{owner}'{key}' is missing"):
            callback.load_state_dict({name: value for name, value in saved.items() if name != key})


@pytest.mark.parametrize("name", ["PSGDCallback", "PruningCallback"])
def test_a_damaged_entry_of_a_state_is_named(name, tmp_path):
    callback = next(case for case in CASES if case.name == name).build(tmp_path, Classifier)
    saved = state_in(FOLDERS[0] / f"{name}.ckpt", callback.state_key)
    part = "bits" if name == "PSGDCallback" else "masks"
    first = next(iter(saved[part]))
    with pytest.raises(ValueError, match=f"damaged: '{part}.{first}' must be a (whole number|tensor), got 'zz'"):
        callback.load_state_dict({**saved, part: {**saved[part], first: "zz"}})
    if part == "bits":
        left = {key: bits for key, bits in saved["bits"].items() if key != first}
        with pytest.raises(ValueError, match=f"damaged: 'bits.{first}' is missing"):
            callback.load_state_dict({**saved, "bits": left})


@pytest.mark.slow
@pytest.mark.parametrize("part", ["state", "section"])
def test_a_fit_does_not_go_on_from_a_damaged_file(part, tmp_path):
    callback = next(case for case in CASES if case.name == "PruningCallback").build(tmp_path, Classifier)
    contents = torch.load(FOLDERS[0] / "PruningCallback.ckpt", weights_only=True)
    if part == "state":
        contents["callbacks"][callback.state_key] = None  # Lightning passes over it
    else:
        contents["lightning_compress"] = {"pruning": {"dense": None}}
    torch.save(contents, tmp_path / "damaged.ckpt")
    with pytest.raises(
        ValueError, match=r"damaged: (it|'lightning_compress.pruning.dense') must be a mapping, got None"
    ):
        trainer(callback).fit(made(Classifier), loader(), loader(rows=BATCH), ckpt_path=tmp_path / "damaged.ckpt")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_old_paraphraser(folder, tmp_path):
    path = folder / "paraphraser.pt"
    callback = FactorTransferCallback(teacher_for(Classifier), weight=3.0, paraphraser=path)
    module = made(Classifier)
    trainer(callback, max_steps=1).fit(module, loader())
    callback.save_paraphraser(tmp_path / "again.pt")
    first, again = (torch.load(own, weights_only=True)["weights"] for own in (path, tmp_path / "again.pt"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)

    torch.save({**torch.load(path, weights_only=True), "schema": 2}, tmp_path / "newer.pt")
    with pytest.raises(ValueError, match=r"paraphraser: '.*newer.pt' has schema 2, newer than 1.*upgrade"):
        FactorTransferCallback(teacher_for(Classifier), paraphraser=tmp_path / "newer.pt")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_old_journal(folder, tmp_path):
    shutil.copy(folder / NAME, tmp_path)
    journal = Journal(tmp_path, schema_files.HEADER)
    assert journal.plain == schema_files.PLAIN
    [(change, found)] = journal.found.items()
    assert (change, found.metrics, found.moved) == (schema_files.CHANGE, schema_files.CHANGED, schema_files.MOVED)

    header, *rest = (tmp_path / NAME).read_text().splitlines()
    (tmp_path / NAME).write_text("\n".join([json.dumps({**json.loads(header), "schema": 2}), *rest]) + "\n")
    with pytest.raises(UsageError, match="schema 2, newer than 1"):
        Journal(tmp_path, schema_files.HEADER)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_old_recipe(folder, tmp_path):
    recipe = load_recipe(folder / "recipe.yaml")
    pruning, qat, stopping, export = build_callbacks(recipe, tmp_path, add_report=False)
    assert (pruning.sparsity, pruning.pattern, pruning.layers) == (0.5, "2:4", ["type:Linear"])
    assert (qat.weight_bits, qat.layer_bits, stopping.monitor) == (4, {"model.0": 8}, "val_loss")
    assert (Path(export.path).name, export.precision) == ("net.onnx", "int8")
    assert recipe.apply_to == {"module": "Classifier", "fit": 2}

    newer = tmp_path / "newer.yaml"
    newer.write_text((folder / "recipe.yaml").read_text().replace("version: 1", "version: 2"))
    with pytest.raises(RecipeError, match=r"version 2 is newer than 1, .* reads; upgrade"):
        load_recipe(newer)
