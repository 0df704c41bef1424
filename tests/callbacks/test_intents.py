"""What callbacks say that they will do is what they then do."""

from __future__ import annotations

import json
from collections import Counter

import lightning.pytorch as L
import pytest
import torch
import yaml
from contract.modules import Batches
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_compress import (
    AttentionTransferCallback,
    CompressionReport,
    DCILCallback,
    DistillationCallback,
    DPFCallback,
    ExportCallback,
    FactorTransferCallback,
    PruningCallback,
    PSGDCallback,
    PTQCallback,
    QATCallback,
    StructuredPruningCallback,
)
from lightning_compress.callbacks.intents import Intent, intents, layers_of, left_out
from lightning_compress.mechanisms.step import find_controller

BATCHES = 4
RAN: Counter[str] = Counter()
"""What ran; beside the modules, as a second pass must change nothing in them."""


class Net(nn.Module):
    """Two convolutions of 16 filters, a table that nobody asks for, and a head."""

    def __init__(self, name: str = "student", filters: int = 16) -> None:
        super().__init__()
        self.name = name
        self.one = nn.Conv2d(1, filters, 3, padding=1)
        self.two = nn.Conv2d(filters, filters, 3, padding=1)
        self.head = nn.Linear(filters * 8, 3)

    def forward(self, x):
        RAN[self.name] += 1
        x = F.relu(self.two(F.relu(self.one(x.reshape(-1, 1, 2, 4)))))
        return self.head(x.flatten(1))


class Lit(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.table = nn.Embedding(8, 2)

    def training_step(self, batch, batch_idx):
        RAN["steps"] += 1
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Asks(L.Callback):
    """Asks what is intended when the training starts, and after the first step, and counts what a step runs."""

    def on_train_start(self, trainer, pl_module):
        self.at_first = intents(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:
            self.intents = intents(trainer, pl_module)
        elif batch_idx == 2:  # nothing but the step itself ran since the batch before
            self.ran, self.last = RAN - self.before, find_controller(pl_module).last
        self.before = Counter(RAN)


def fitted(*callbacks, lit=None):
    """The module, what the first callback intended, and what was counted."""
    torch.manual_seed(0)
    module, asks = Lit() if lit is None else lit, Asks()
    L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, asks],
    ).fit(module, DataLoader(Batches(8 * BATCHES), 8))
    intent = asks.intents[callbacks[0].name]
    assert json.loads(json.dumps(intent.to_dict())) == intent.to_dict()
    return module, intent, asks


def weight_of(module, layer):
    return module.get_submodule(layer).weight


def check_passes(intent, asks):
    assert asks.ran["steps"] == asks.ran["student"] == 1 + intent.passes == asks.last.passes


def check_sparse(module, intent, weights):
    """Zeros are where they were promised, as many as promised, and nowhere else."""
    zeros = {layer: int((weight_of(module, layer) == 0).sum()) for layer in intent.takes}
    total = sum(weight_of(module, layer).numel() for layer in intent.takes)
    assert intent.elements == total == weights
    assert sum(zeros.values()) == int(intent.aims["sparsity"] * total + 0.5)
    assert all((weight_of(module, layer) == 0).sum() == 0 for layer in intent.left)


CONVOLUTIONS, HEAD = 16 * 9 + 16 * 16 * 9, 128 * 3


@pytest.mark.parametrize(
    ("callback", "takes", "left", "weights"),
    [
        (PruningCallback(0.5), ("net.one", "net.two", "net.head"), {"table": "not selected"}, CONVOLUTIONS + HEAD),
        (
            DPFCallback(0.75, update_interval=1, exclude=["net.head"]),
            ("net.one", "net.two"),
            {"net.head": "excluded", "table": "not selected"},
            CONVOLUTIONS,
        ),
        (
            DCILCallback(0.5, update_interval=1),
            ("net.one", "net.two"),
            {"net.head": "not selected", "table": "not selected"},
            CONVOLUTIONS,
        ),
        (
            PruningCallback(pattern="2:4", exclude=["net.head"]),
            ("net.two",),
            {"net.head": "excluded", "table": "not selected", "net.one": "pattern 2:4 does not fit"},
            16 * 16 * 9,
        ),
    ],
    ids=["pruning", "dpf", "dcil", "pattern"],
)
def test_masks(callback, takes, left, weights, recwarn):
    module, intent, asks = fitted(callback)
    assert (intent.technique, intent.takes, intent.left) == (type(callback).__name__, takes, left)
    assert asks.at_first[callback.name].takes == takes
    check_sparse(module, intent, weights)
    check_passes(intent, asks)


def test_dcil_says_what_the_dense_path_has_for_itself():
    callback = DCILCallback(0.5, update_interval=1)
    _, intent, asks = fitted(callback)
    assert intent.passes == 1
    assert intent.notes[1:] == ("the dense path has its own classifier 'net.head'",)
    assert len(asks.at_first["dcil"].notes) == 1  # nothing is known before the first step
    assert callback.remarks()[-1] == "dcil: the dense path had its own classifier 'net.head'."


def test_psgd():
    lit = Lit()
    lit.net.one.weight.requires_grad_(False)
    lit.net.one.bias.requires_grad_(False)
    callback = PSGDCallback(3, exclude=["net.head"])
    _, intent, asks = fitted(callback, lit=lit)
    assert intent.takes == layers_of(callback.grids) == ("net.two",)
    assert intent.left == {"net.head": "excluded", "table": "not selected", "net.one": "frozen"}
    assert intent.elements == 16 * 16 * 9
    assert intent.aims == {"bits": 3, "edge_bits": 8}
    assert intent.notes == ("the gradients that SGD gets are scaled",)
    check_passes(intent, asks)


@pytest.mark.parametrize(
    ("optimizer", "apply_to", "note"),
    [
        (
            torch.optim.Adam,
            "auto",
            "Adam is adaptive and would cancel a scale of its gradients: its updates are scaled",
        ),
        (torch.optim.Adam, "gradient", "Adam is adaptive and cancels the scale of its gradients: give apply_to='auto'"),
        (torch.optim.SGD, "update", "the updates of SGD are scaled"),
        (torch.optim.SGD, "auto", "the gradients that SGD gets are scaled"),
    ],
)
def test_what_psgd_scales(optimizer, apply_to, note):
    callback = PSGDCallback(apply_to=apply_to)
    assert callback._way_of(optimizer([torch.ones(1)], lr=0.1)).startswith(note)


@pytest.mark.parametrize(
    "callback", [PTQCallback(weight_bits=4), QATCallback(weight_bits=4), PTQCallback(exclude=["net.one"])]
)
def test_grids(callback):
    _, intent, asks = fitted(callback)
    left = {} if callback.exclude is None else {"net.one": "excluded"}
    taken = tuple(name for name in ("net.one", "net.two", "net.head") if name not in left)
    assert intent.takes == taken == tuple(f"net.{name}" for name in layers_of(callback.quantization.weights))
    assert intent.left == left
    assert intent.elements == CONVOLUTIONS + HEAD - (144 if left else 0)
    assert {grid.bits for grid in callback.quantization.weights.values()} == {intent.aims["weight_bits"]}
    assert asks.at_first[callback.name].takes == taken
    check_passes(intent, asks)


@pytest.mark.slow
@pytest.mark.parametrize("start", [0.0, 0.6])
def test_filters(start):
    callback = StructuredPruningCallback(0.5, start=start, min_channels=1)
    module, intent, asks = fitted(callback)
    filters = {name: len(weight_of(module, name)) for name in ("net.one", "net.two", "net.head")}
    assert filters == {"net.one": 8, "net.two": 8, "net.head": 3}
    assert set(intent.takes) == {name for name, count in filters.items() if count == 8}
    assert set(intent.left) == {"net.head"}
    assert intent.aims == {"ratio": 0.5, "budget": "filters", "schedule": "one_shot", "start": start}
    check_passes(intent, asks)
    assert callback.plan.parameters[1] == sum(own.numel() for own in module.net.parameters())
    assert callback.foreseen_share == 1.0  # by now


def test_what_will_be_left_where_filters_go_later(monkeypatch):
    callback = StructuredPruningCallback(0.5, schedule="iterative", rounds=2)
    assert callback.foreseen_share == 1.0
    assert callback.intent(None, None).notes == ("the first batch shows what can go",)
    monkeypatch.setattr(callback, "plan", type("Plan", (), {"parameters": (200, 150)})())
    assert callback.foreseen_share == 0.75
    monkeypatch.setattr(callback, "_state", type("State", (), {"done": 1, "asked": 0.25})())
    assert callback.foreseen_share == pytest.approx(2 / 3)


def teacher():
    torch.manual_seed(1)
    return Net("teacher")


@pytest.mark.parametrize(
    "make",
    [
        lambda teacher: DistillationCallback(teacher),
        lambda teacher: AttentionTransferCallback(teacher, pairs={"one": "one", "two": "two"}),
        lambda teacher: AttentionTransferCallback(teacher, map_kind="gradient", weight=1.0),
        lambda teacher: FactorTransferCallback(teacher, pair=("two", "two"), pretrain_epochs=1),
    ],
    ids=["kd", "at", "at by gradients", "ft"],
)
def test_teachers(make, recwarn):
    callback = make(teacher())
    _, intent, asks = fitted(callback)
    assert intent.student == ("net",)
    assert intent.teachers == asks.ran["teacher"] == sum(count for _, count in asks.last.teachers) == 1
    assert asks.ran["student"] == asks.last.passes == 1
    assert intent.pairs == tuple((pair.student, pair.teacher) for pair in getattr(callback, "settled", ()))
    assert list(asks.last.terms) == [callback.name]


def test_a_shared_teacher_runs_once():
    callbacks = [DistillationCallback(teacher()), AttentionTransferCallback("kd", pairs={"two": "two"})]
    _, _, asks = fitted(*callbacks)
    assert [intent.teachers for intent in asks.intents.values()] == [1, 0]
    assert asks.ran["teacher"] == 1
    assert sorted(asks.last.terms) == ["at", "kd"]
    assert asks.last.task_loss is not None


@pytest.mark.slow
def test_the_file(tmp_path):
    callback = ExportCallback(tmp_path / "net.onnx")
    _, intent, asks = fitted(callback)
    assert intent == Intent("ExportCallback", aims={"precision": "fp32"})
    assert callback.trial_bytes == callback.result.bytes
    assert callback.trial_compressed is None
    check_passes(intent, asks)


def test_the_report(tmp_path, capsys):
    callback = CompressionReport(path=tmp_path, latency=False)
    _, intent, asks = fitted(callback)
    assert intent == Intent("CompressionReport", notes=("sizes and metrics are measured after the fit",))
    check_passes(intent, asks)


def test_layers_and_reasons():
    root = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    assert layers_of(["a.weight", "a.bias", "b.weight"]) == ("a", "b")
    assert left_out(root, ["b.weight"], None) == {"b": "not selected"}
    assert left_out(root, ["b.weight", "a.weight"], ["type:Linear"]) == {"b": "excluded", "a": "excluded"}


@pytest.mark.parametrize("kind", [PTQCallback, QATCallback])
def test_a_weight_that_is_made_anew_in_each_step_is_taken_and_costs_no_training(kind, tmp_path):
    """With a logger, which is told of the plan."""
    lit = Lit()
    nn.utils.parametrizations.weight_norm(lit.net.two)
    callback, logger = kind(), CSVLogger(tmp_path, name="", version="")
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(lit, DataLoader(Batches(16), 8))
    plan = yaml.safe_load((tmp_path / "compress" / "config.yaml").read_text())["plan"][callback.name]
    assert plan["takes"] == ["net.one", "net.two", "net.head"]
    assert plan["elements"] == sum(layer.weight.numel() for layer in (lit.net.one, lit.net.head))
