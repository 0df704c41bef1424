"""Projects that do what others do not: the callbacks that look at data first leave them as they would have been."""

from __future__ import annotations

import itertools
from collections import UserDict

import pytest
import torch
from contract.features import BATCH, STAGES, STEPS, ConvClassifier, ConvNormClassifier, conv_teacher, feature_loader
from contract.modules import CLASSES, difference, made, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from lightning_compress import (
    AttentionTransferCallback,
    CompressionReport,
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
from lightning_compress.export.evaluate import evaluate_forward


def attention(**settings):
    return AttentionTransferCallback(conv_teacher(), **{"strength": 0.02, **settings})


def factors(**settings):
    return FactorTransferCallback(
        conv_teacher(), **{"pair": ("stage2", "stage2"), "weight": 3.0, "pretrain_epochs": 2, **settings}
    )


def gradients():
    return attention(map_kind="gradient", weight=1.0, strength=1.0, student="model")


def fit(module, *callbacks, data=None, **settings):
    run = trainer(*callbacks, **settings)
    run.fit(module, feature_loader() if data is None else data, feature_loader())
    return module


LOOKING = pytest.mark.parametrize("make", [attention, factors, gradients], ids=["at", "ft", "gradient"])


class Meter:
    def __init__(self):
        self.count, self.inner = 0, {"seen": [0]}

    def add(self):
        self.count += 1
        self.inner["seen"][0] += 1


class Counting(ConvClassifier):
    """What it counts lies in places that are no module's children."""

    def __init__(self):
        super().__init__()
        self.meter, self.hidden = Meter(), {"mean": MeanMetric()}
        self.pair, self.odd = (torch.zeros(1), [0]), UserDict(n=0)
        self.cycle = {}
        self.cycle["me"] = self.cycle

    def training_step(self, batch, batch_idx):
        self.meter.add()
        self.hidden["mean"].update(1.0)
        self.pair[0].add_(1)
        self.pair[1][0] += 1
        return super().training_step(batch, batch_idx)

    def counted(self):
        weight = int(self.hidden["mean"].weight)
        return self.meter.count, self.meter.inner["seen"][0], weight, int(self.pair[0]), self.pair[1][0]


@LOOKING
def test_what_a_step_counts_is_counted_once_a_step(make):
    assert fit(made(Counting), make()).counted() == (STEPS,) * 5


@LOOKING
def test_a_step_may_move_learning_rates_and_schedulers(make):
    class Moving(ConvClassifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.lr_schedulers().step()
            for group in self.optimizers().param_groups:
                group["momentum"] *= 0.9
            self.rates.append((self.lr_schedulers().last_epoch, round(group["momentum"], 6), group["lr"]))
            return loss

        def on_train_start(self):
            self.rates = []

    assert fit(made(Moving), make()).rates == fit(made(Moving)).rates


@LOOKING
def test_state_may_be_made_in_the_modules_own_hooks(make):
    class Late(ConvClassifier):
        def on_train_epoch_start(self):
            self.losses = []

        def training_step(self, batch, batch_idx):
            self.losses.append(super().training_step(batch, batch_idx))
            return self.losses[-1]

    assert len(fit(made(Late), make()).losses) == STEPS


@LOOKING
def test_a_step_may_differentiate(make):
    class Penalised(ConvClassifier):
        def task_loss(self, batch):
            x = batch[0].clone().requires_grad_()
            logits = self(x)
            if not torch.is_grad_enabled():
                return F.cross_entropy(logits, batch[1])
            [slope] = torch.autograd.grad(logits.sum(), [x], create_graph=True)
            return F.cross_entropy(logits, batch[1]) + slope.square().mean()

    assert fit(made(Penalised), make()).global_step == STEPS


def test_a_bare_except_ends_no_search():
    class Guarded(ConvClassifier):
        def training_step(self, batch, batch_idx):
            try:
                return super().training_step(batch, batch_idx)
            except:  # noqa: E722 - what people write against an out-of-memory error
                return None

    assert fit(made(Guarded), factors()).global_step == STEPS


@pytest.mark.sample
@pytest.mark.parametrize(
    "make",
    [pytest.param(attention, marks=pytest.mark.slow), factors, lambda: DistillationCallback(conv_teacher())],
    ids=["at", "ft", "kd"],
)
def test_a_validation_step_may_call_the_training_step_and_the_other_way_round(make):
    class Shared(ConvClassifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx))

        def training_step(self, batch, batch_idx):
            return self.task_loss(batch)

    class Mirrored(ConvClassifier):
        def validation_step(self, batch, batch_idx):
            return self.task_loss(batch)

        def training_step(self, batch, batch_idx):
            return self.validation_step(batch, batch_idx)

    module = fit(made(Shared), make())
    logged = float(module.trainer.callback_metrics["val_loss"])
    with torch.no_grad():
        expected = torch.stack([module.eval().task_loss(batch) for batch in feature_loader()]).mean()
    assert logged == pytest.approx(float(expected), rel=1e-5)
    mirrored, plain = fit(made(Mirrored), make()), fit(made(Mirrored))
    assert difference(mirrored, plain) > 0


class Endless(IterableDataset):
    def __init__(self):
        self.read = 0

    def __iter__(self):
        for index in itertools.count():
            self.read += 1
            yield torch.randn(1, 6, 6), index % CLASSES


def test_of_a_stream_without_end_the_pretraining_takes_as_much_as_the_training():
    plain, data = Endless(), Endless()
    for source, callbacks in ((plain, []), (data, [factors()])):
        loader = DataLoader(source, batch_size=BATCH)
        assert fit(made(ConvClassifier), *callbacks, data=loader, max_epochs=-1, max_steps=3).global_step == 3
    assert data.read == plain.read  # what the pre-training read was put back


def test_a_stream_that_can_be_read_once_is_refused():
    class Once(IterableDataset):
        def __init__(self):
            self.source = iter([(torch.randn(1, 6, 6), 0)] * 32)

        def __iter__(self):
            return self.source

    with pytest.raises(ValueError, match="the training data is a Once, which can be read only once"):
        fit(made(ConvClassifier), attention(), data=DataLoader(Once(), batch_size=BATCH))


def test_lazy_modules_are_refused_before_they_are_touched():
    class Lazy(ConvClassifier):
        def build(self):
            self.model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"Lazy has lazy modules.*call the network once"):
        fit(made(Lazy), attention(), num_sanity_val_steps=0)


def test_one_dimensional_convolutions_are_not_taken_for_tokens():
    class Signals(ConvClassifier):
        def build(self):
            self.model = nn.Sequential(nn.Flatten(2), nn.Conv1d(1, 4, 3), nn.Conv1d(4, 4, 3), nn.Flatten(1))
            self.model.append(nn.Linear(4 * 32, CLASSES))

    teacher = made(Signals).model
    with pytest.raises(ValueError, match=r"the layer '2' returns shape \(8, 4, 32\), \(N, C, L\) of a 1-D convolution"):
        fit(made(Signals), AttentionTransferCallback(teacher, pairs={"2": "2"}))
    with pytest.raises(ValueError, match="finds no layers of student and teacher to compare"):
        fit(made(Signals), AttentionTransferCallback(teacher))


def test_maps_of_one_position_are_refused():
    with pytest.raises(ValueError, match=r"maps of 'head.0' and 'head.0' are of one position.*choose earlier layers"):
        fit(made(ConvClassifier), attention(pairs={"head.0": "head.0"}))


def test_tokens_to_drop_where_there_are_none_are_refused():
    with pytest.raises(ValueError, match="drop_tokens=1 has no effect: no layer returns tokens"):
        fit(made(ConvClassifier), attention(pairs=STAGES, drop_tokens=1))


def test_gradients_refuse_a_compiled_lightning_module(fresh_compiler):
    module = torch.compile(made(ConvClassifier), backend="eager")
    with pytest.raises(ValueError, match="differentiates twice, which compiled code does not allow"):
        trainer(gradients()).fit(module, feature_loader())


def test_a_paraphraser_that_cannot_learn_is_an_error():
    callback = factors()
    callback.teacher.stage2[-2].bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the paraphraser's error is (nan|inf) in epoch 0"):
        fit(made(ConvClassifier), callback)


def test_translator_and_paraphraser_do_not_begin_as_one_network():
    """Also where student and teacher have as many channels."""
    teacher = made(ConvClassifier, 5).model
    callback = FactorTransferCallback(teacher, pair=("stage2", "stage2"), weight=3.0, pretrain_epochs=0)
    with pytest.warns(UserWarning, match="pretrain_epochs=0"):
        fit(made(ConvClassifier), callback, max_steps=1, limit_val_batches=0)
    ours = callback.state_dict()["translator"]["module"]["encoder.0.weight"]
    assert float((ours - callback.state_dict()["paraphraser"]["encoder.0.weight"]).abs().max()) > 0.05


@pytest.mark.sample
@pytest.mark.parametrize("callbacks", [list, lambda: [factors()]], ids=["control", "ft"])
def test_a_resumed_run_in_double_precision_equals_the_whole_one(callbacks, tmp_path):
    settings = {
        "precision": "64-true",
        "enable_checkpointing": True,
        "max_epochs": 2,
        "default_root_dir": tmp_path / "other",
    }
    whole = fit(made(ConvNormClassifier), *callbacks(), ModelCheckpoint(tmp_path, save_top_k=-1), **settings)
    [middle] = tmp_path.glob("*step=8.ckpt")
    resumed = made(ConvNormClassifier).double()  # as it is by then: loaded into float32 it would be rounded
    trainer(*callbacks(), **settings).fit(
        resumed, feature_loader(), feature_loader(), ckpt_path=middle, weights_only=True
    )
    assert difference(whole, resumed) == 0


@pytest.mark.sample
def test_a_resume_with_another_layer_is_refused(tmp_path):
    run = trainer(factors(), enable_checkpointing=True, max_epochs=1, default_root_dir=tmp_path)
    run.fit(made(ConvClassifier), feature_loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    other = factors(pair=("stage2", "stage1"))
    again = trainer(other, enable_checkpointing=True, max_epochs=2, default_root_dir=tmp_path)
    message = "paraphraser was trained on the teacher's layer 'stage2', and pair names 'stage1'"
    with pytest.warns(UserWarning, match="resumes with other arguments"), pytest.raises(ValueError, match=message):
        again.fit(made(ConvClassifier), feature_loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=True)


@pytest.mark.sample
def test_a_stopped_replay_does_not_stop_the_training():
    class Ending(ConvClassifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == STEPS - 1:
                self.trainer.should_stop = True
            return super().training_step(batch, batch_idx)

    assert fit(made(Ending), factors(), max_epochs=2, min_epochs=1).global_step == STEPS


# What a module prepares for its step


class Prepared(ConvClassifier):
    """Its own hook makes what its step needs, and skips nothing."""

    prepared = 0

    def on_train_batch_start(self, batch, batch_idx):
        self.scaled, self.prepared = batch[0] * (1 + batch_idx), self.prepared + 1

    def training_step(self, batch, batch_idx):
        return super().training_step((self.scaled, batch[1]), batch_idx)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        attention,
        factors,
        lambda: QATCallback(step_size="observed"),
        lambda: PTQCallback(max_samples=BATCH),
        lambda: StructuredPruningCallback(0.25, min_channels=2),
    ],
    ids=["at", "ft", "qat", "ptq", "structured"],
)
def test_what_its_own_hook_prepares_is_there_in_a_replay(make):
    if isinstance(make(), StructuredPruningCallback):
        pytest.importorskip("torch_pruning")
    assert fit(made(Prepared), make()).prepared == STEPS


class Shown(ConvClassifier):
    """Its validation looks at what the hook before it has left."""

    def on_validation_batch_start(self, batch, batch_idx, dataloader_idx=0):
        self.shown = batch[0]

    def validation_step(self, batch, batch_idx):
        return super().validation_step((self.shown, batch[1]), batch_idx)


@pytest.mark.slow
def test_a_calibration_sees_every_batch_that_a_hook_prepares():
    """And so it is that of a module which takes its batches as they are."""
    found = []
    for kind in (ConvClassifier, Shown):
        ptq = PTQCallback(max_samples=4 * BATCH)
        fit(made(kind), ptq)
        found.append({key: vars(grid) for key, grid in ptq.quantization.activations.items()})
    assert found[0] == found[1]


# Metrics


class TwoLoaders(ConvNormClassifier):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_acc", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "key"),
    [
        (PSGDCallback, "compress/psgd/val_acc/loader_{}"),
        (
            lambda: DPFCallback(0.5, update_interval=2, reestimated_validation=True),
            "compress/dpf/reestimated/val_acc/loader_{}",
        ),
    ],
)
def test_metrics_of_several_loaders(make, key):
    run = trainer(make())
    run.fit(made(TwoLoaders), feature_loader(), [feature_loader(), feature_loader()])
    assert {key.format(0), key.format(1)} <= set(run.callback_metrics)


class Unlogged(ConvNormClassifier):
    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.model(batch[0]).argmax(1) == batch[1]).float().mean(), logger=False)


@pytest.mark.slow
def test_metrics_that_no_logger_gets(tmp_path):
    ptq = PTQCallback(max_samples=BATCH)
    export = ExportCallback(str(tmp_path / "m.onnx"), precision="int8", metric="val_acc", tolerance=1.0)
    fit(made(Unlogged), ptq, export)
    assert set(ptq.metrics) == set(export.file_metrics) == {"val_acc"}


class WithoutValidation(ConvNormClassifier):
    validation_step = None


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: PTQCallback(max_samples=BATCH), QATCallback, CompressionReport])
def test_a_class_that_takes_its_validation_away(make, tmp_path):
    run = trainer(make(), default_root_dir=str(tmp_path))
    run.fit(made(WithoutValidation), feature_loader())
    assert run.global_step == STEPS


@pytest.mark.slow
def test_no_step_and_no_filter_gone():
    pytest.importorskip("torch_pruning")
    with pytest.warns(UserWarning, match="'structured': no training step was run, so no filter went"):
        trainer(StructuredPruningCallback(0.25, min_channels=2), max_steps=0).fit(
            made(ConvClassifier), feature_loader()
        )


@pytest.mark.slow
def test_a_bias_may_be_computed():
    """Only weights are masked."""
    module = made(ConvClassifier)
    layer = next(part for part in module.modules() if isinstance(part, nn.Linear))
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    fit(module, PruningCallback(0.5, schedule="one_shot"))
    assert int((layer.weight == 0).sum()) > 0


class Later(ConvClassifier):
    """Makes its network when Lightning asks for it, after set-up."""

    def build(self):
        self.network_is_to_come = True

    def configure_model(self):
        if not hasattr(self, "model"):
            super().build()


@pytest.mark.sample
@pytest.mark.parametrize(
    "build",
    [
        lambda: PTQCallback(network="model", layer_bits={"model.head": 4}),
        lambda: QATCallback(network="model"),
        lambda: AttentionTransferCallback(conv_teacher(), weight=0.1, student="model", pairs=STAGES),
        lambda: FactorTransferCallback(conv_teacher(), weight=0.01, student="model", pair=("stage2", "stage2")),
    ],
)
def test_names_of_what_configure_model_makes_are_known(build):
    trainer(build()).fit(made(Later), feature_loader(), feature_loader())


class Anew(ConvClassifier):
    """Makes its network each time Lightning asks for it, which a fit does once."""

    def build(self):
        self.network_is_to_come = True

    def configure_model(self):
        super().build()


@pytest.mark.sample
def test_a_network_that_would_be_made_anew_is_the_one_that_was_trained(tmp_path):
    export = ExportCallback(tmp_path / "m.onnx", precision="int8", metric="val_loss", tolerance=0.05)
    report = CompressionReport(path=tmp_path, latency=False)
    fitting = trainer(PSGDCallback(8), PTQCallback(), export, report)
    module = made(Anew)
    fitting.fit(module, feature_loader(), feature_loader())
    assert export.failure is None
    metrics = {key: float(value) for key, value in fitting.callback_metrics.items()}
    rows = {row.name: row for row in report.result.rows}
    assert rows["after"].metrics["val_loss"] == pytest.approx(metrics["val_loss"], abs=1e-6)
    assert metrics["compress/psgd/val_loss"] == pytest.approx(metrics["val_loss"], rel=0.1)
    assert rows["before"].metrics["val_loss"] != rows["after"].metrics["val_loss"]
    for source in (fitting, feature_loader()):
        assert evaluate_forward(module, source)["val_loss"] == pytest.approx(metrics["val_loss"], abs=1e-6)
