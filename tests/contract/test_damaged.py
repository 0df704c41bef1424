"""Files that were cut off or damaged: refused by name, with nothing changed, and an earlier file still serves."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from lightning.pytorch.callbacks import ModelCheckpoint
from records import record

from lightning_compress import FactorTransferCallback, PSGDCallback, QATCallback
from lightning_compress.commands.project import load_trained
from lightning_compress.export import load_shrunk, plain_state_dict, to_onnx
from lightning_compress.export.sample import read_sample
from lightning_compress.mechanisms.loading import teacher_from_checkpoint

from .modules import Classifier, difference, loader, made, teacher_for, trainer
from .traces import traces

DAMAGE = {
    "empty": lambda whole: b"",
    "one byte": lambda whole: whole[:1],
    "the head": lambda whole: whole[:4],
    "half": lambda whole: whole[: len(whole) // 2],
    "all but a byte": lambda whole: whole[:-1],
    "zeros": lambda whole: bytes(len(whole)),
    "half, then zeros": lambda whole: whole[: len(whole) // 2].ljust(len(whole), b"\0"),
    "zeros, then half": lambda whole: whole[len(whole) // 2 :].rjust(len(whole), b"\0"),
    "a hole": lambda whole: whole[: len(whole) // 3] + bytes(200) + whole[len(whole) // 3 + 200 :],
}
QUICK = ("empty", "half", "zeros")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a fit with PSGD, which every reader takes."""
    folder = tmp_path_factory.mktemp("checkpoint")
    saving = ModelCheckpoint(folder, filename="whole")
    trainer(PSGDCallback(4), saving, enable_checkpointing=True).fit(made(Classifier), loader(), loader(rows=16))
    return folder / "whole.ckpt"


def grids_from(path, module):
    trainer(QATCallback(weight_bits=4, grids_from=path)).fit(module, loader())


# Each with the argument that an error names.
READERS = {
    "plain_state_dict": ("checkpoint_path", lambda path, module: plain_state_dict(path)),
    "teacher_from_checkpoint": ("ckpt_path", lambda path, module: teacher_from_checkpoint(Classifier, path)),
    "load_shrunk": ("checkpoint_path", lambda path, module: load_shrunk(module, path)),
    "to_onnx": (
        "checkpoint",
        lambda path, module: to_onnx(module, path.parent / "m.onnx", torch.zeros(2, 8), "int8", path),
    ),
    "grids_from": ("grids_from", grids_from),
    "load_trained": ("checkpoint_path", lambda path, module: load_trained(["none.yaml"], str(path))),
    "paraphraser": (
        "paraphraser",
        lambda path, module: FactorTransferCallback(teacher_for(Classifier), paraphraser=path),
    ),
    "sample": ("sample", lambda path, module: read_sample(path.with_suffix(".pt"))),
}


@pytest.mark.parametrize(
    "damage", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in DAMAGE]
)
@pytest.mark.parametrize("reader", READERS)
def test_each_reader_names_a_damaged_file_and_changes_nothing(reader, damage, checkpoint, tmp_path):
    argument, read = READERS[reader]
    content = DAMAGE[damage](checkpoint.read_bytes())
    for name in ("cut.ckpt", "cut.pt"):
        (tmp_path / name).write_bytes(content)
    module = made(Classifier)
    with pytest.raises(ValueError, match=rf"^{argument} '.*/cut\.\w+' is damaged, or was not written to its end"):
        read(tmp_path / "cut.ckpt", module)
    assert difference(module, made(Classifier)) == 0
    assert {"training_step", "forward", "on_save_checkpoint", "on_load_checkpoint"}.isdisjoint(vars(module))
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["plain_state_dict", "teacher_from_checkpoint", "load_shrunk", "grids_from"])
def test_the_same_readers_take_the_whole_file(reader, checkpoint):
    module = made(Classifier)
    found = READERS[reader][1](checkpoint, module)
    if reader == "grids_from":
        assert difference(module, made(Classifier)) > 0
    else:
        assert difference(found, torch.load(checkpoint, weights_only=True)["state_dict"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_a_fit_that_cannot_resume_leaves_everything_as_it_is_and_an_earlier_checkpoint_serves(case, tmp_path):
    """Lightning reads the file, and what it says of it is torch's word."""
    whole, module = made(Classifier), made(Classifier)
    saving = ModelCheckpoint(tmp_path / "checkpoints", filename="{epoch}", save_top_k=-1)
    settings = {"max_epochs": 2, "enable_checkpointing": True}
    trainer(case.build(tmp_path, Classifier), saving, **settings).fit(whole, loader(), loader(rows=16))
    earlier, newest = (tmp_path / "checkpoints" / f"epoch={epoch}.ckpt" for epoch in (0, 1))
    content, plain = newest.read_bytes(), made(Classifier)
    callback = case.build(tmp_path / "again", Classifier)
    for damage in DAMAGE.values():
        newest.write_bytes(damage(content))
        errors = []
        for own, callbacks in ((plain, []), (module, [callback])):
            with pytest.raises(Exception) as raised:
                trainer(*callbacks, **settings).fit(own, loader(), loader(rows=16), ckpt_path=newest, weights_only=True)
            errors.append(str(raised.value))
        assert errors[0] == errors[1]
        assert (difference(module, made(Classifier)), traces(module)) == (0, traces(plain))
    torch.default_generator.manual_seed(0)
    trainer(callback, **settings).fit(module, loader(), loader(rows=16), ckpt_path=earlier, weights_only=True)
    assert difference(module, whole) == 0
    record("kills", case.name, "a damaged checkpoint", "repeatable", "refused by Lightning, and the one before serves")
