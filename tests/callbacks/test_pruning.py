"""PruningCallback: its options, what it refuses, what it logs and saves, and which checkpoint is the best."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from contextlib import nullcontext

import lightning.pytorch as L
import pytest
import torch
import yaml
from contract.modules import (
    BATCH,
    STEPS,
    Classifier,
    Jumping,
    MixinClassifier,
    NormClassifier,
    difference,
    loader,
    made,
    scaled,
    small_network,
    trainer,
)
from contract.traces import traces
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import CompressionReport, DCILCallback, DPFCallback, PruningCallback
from lightning_compress.functional import iterative_schedule, magnitude_mask, n_m_mask, smallest_masks
from lightning_compress.mechanisms.checkpoints import dense_of

TOTAL = 36 + 96  # weights of the small network
SHAPES = {"model.0.weight": (4, 1, 3, 3), "model.3.weight": (3, 32)}


def weights(module):
    return {name: value for name, value in module.named_parameters() if value.ndim > 1}


def zeros(module):
    return {name: int((value == 0).sum()) for name, value in weights(module).items()}


def fitted(pruning, kind=Classifier, *callbacks, validate=True, **settings):
    module = made(kind)
    fitting = trainer(pruning, *callbacks, **settings)
    fitting.fit(module, loader(kind), loader(kind, rows=2 * BATCH) if validate else None)
    return module, fitting


class Watch(L.Callback):
    """What the sparsity was after each step."""

    def __init__(self, pruning):
        self.pruning, self.seen, self.masks = pruning, [], []

    def on_train_batch_end(self, *args):
        self.seen.append(round(self.pruning.reached * TOTAL))
        self.masks.append(self.pruning.masks)


def path_of(pruning, kind=Classifier, **settings):
    watch = Watch(pruning)
    module, _ = fitted(pruning, kind, watch, **settings)
    return watch, module


# Schedules


def test_one_shot_prunes_at_start_and_then_only_trains():
    watch, module = path_of(PruningCallback(0.5, schedule="one_shot", start=0.5))
    assert watch.seen == [0, 0, 0, 66, 66, 66, 66, 66]
    assert sum(zeros(module).values()) == 66


@pytest.mark.parametrize("kind", [PruningCallback, DPFCallback, DCILCallback])
def test_one_shot_may_be_later_than_the_end_that_nobody_gave(kind):
    callback = kind(0.5, schedule="one_shot", start=0.8)
    assert (callback.start, callback.end, callback.reached_at) == (0.8, 0.75, ("start", 0.8))
    message = rf"{kind.__name__}: end=0.9 has no effect .*, which prunes all at start=0.8"
    with pytest.warns(UserWarning, match=message):
        kind(0.5, schedule="one_shot", start=0.8, end=0.9)


@pytest.mark.slow
def test_one_shot_after_the_usual_end_prunes_at_its_start():
    watch, _ = path_of(PruningCallback(0.5, schedule="one_shot", start=0.8))
    assert watch.seen == [0] * 6 + [66, 66]


@pytest.mark.slow
def test_one_shot_that_was_stopped_says_before_what():
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == STEPS // 2

    pruning = PruningCallback(0.5, schedule="one_shot", start=0.8)
    with pytest.warns(UserWarning, match=r"training stopped at 50% of its length, before start=0.8: the sparsity is 0"):
        fitted(pruning, Classifier, Stop())


def test_one_shot_at_the_start_is_there_in_the_first_step():
    watch, _ = path_of(PruningCallback(0.5, schedule="one_shot"))
    assert watch.seen == [66] * STEPS
    assert all(torch.equal(mask, watch.masks[-1][name]) for name, mask in watch.masks[0].items())


def test_rounds():
    watch, _ = path_of(PruningCallback(0.75, schedule="iterative", rounds=3, end=0.75))
    expected = [iterative_schedule(min(step / STEPS / 0.75, 1.0), 0.0, 0.75, rounds=3) for step in range(1, STEPS + 1)]
    assert watch.seen == [int(value * TOTAL + 0.5) for value in expected]
    assert len(set(watch.seen)) == 4


def fast(progress, start, end):
    return end * progress**0.1


def short(progress, start, end):
    return 0.9 * end * progress


@pytest.mark.parametrize("schedule", ["cubic", "linear", "cosine", fast, short])
def test_the_end_is_exact_whatever_the_schedule(schedule):
    watch, module = path_of(PruningCallback(0.71, schedule=schedule, update_interval=5))
    assert watch.seen[5] == watch.seen[-1] == int(0.71 * TOTAL + 0.5) == sum(zeros(module).values())
    assert watch.seen == sorted(watch.seen)


def test_what_is_pruned_stays_pruned():
    watch, _ = path_of(PruningCallback(0.8, end=1.0))
    for before, after in zip(watch.masks[1:], watch.masks[2:], strict=False):
        assert all(not (after[name] & ~mask).any() for name, mask in before.items())


def test_regrowth():
    """With a strong decay the dense values of pruned weights change places with those of kept ones."""

    class Noisy(Classifier):
        def on_before_optimizer_step(self, optimizer):
            generator = torch.Generator().manual_seed(self.trainer.global_step)
            for parameter in self.parameters():
                parameter.grad.add_(torch.randn(parameter.shape, generator=generator))

    kept, _ = path_of(PruningCallback(0.5, end=1.0), Noisy)
    grown, module = path_of(PruningCallback(0.5, end=1.0, regrow=True), Noisy)
    back = [
        int((after[name] & ~mask).sum())
        for before, after in zip(grown.masks[1:], grown.masks[2:], strict=False)
        for name, mask in before.items()
    ]
    assert sum(back) > 0
    assert grown.seen == kept.seen
    assert sum(zeros(module).values()) == 66


@pytest.mark.sample
def test_progress_of_a_resumed_longer_training_never_lets_the_sparsity_fall(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="end", save_top_k=1, every_n_epochs=1)
    fitted(PruningCallback(0.8, end=0.5), Classifier, saver, enable_checkpointing=True)
    pruning = PruningCallback(0.8, end=0.5)
    watch, module = Watch(pruning), made(Classifier)
    fitting = trainer(pruning, watch, max_epochs=4)
    fitting.fit(module, loader(), loader(), ckpt_path=tmp_path / "end.ckpt")
    assert watch.seen == [106] * 3 * STEPS
    assert sum(zeros(module).values()) == 106


# Scores, scopes, patterns


def test_global_magnitude_of_the_dense_weights():
    module = made(Classifier)
    expected = magnitude_mask(list(weights(module).values()), 0.5)
    pruning = PruningCallback(0.5, schedule="one_shot")
    trainer(pruning).fit(module, loader())
    assert all(torch.equal(mask, own) for mask, own in zip(expected, pruning.masks.values(), strict=True))


def test_each_layer_alike():
    module, _ = fitted(PruningCallback(0.75, scope="layer"))
    assert zeros(module) == {"model.0.weight": 27, "model.3.weight": 72}


def test_erdos_renyi():
    module, _ = fitted(PruningCallback(0.6, scope="erk"))
    found = zeros(module)
    assert sum(found.values()) == 79
    # (4 + 1 + 3 + 3) / 36 against (3 + 32) / 96 of what is kept
    assert found == {"model.0.weight": 23, "model.3.weight": 56}


@pytest.mark.sample
def test_random_is_the_same_each_time_and_another_with_another_seed():
    first, second, other = (PruningCallback(0.5, score="random", seed=seed) for seed in (0, 0, 1))
    state = torch.get_rng_state()
    for pruning in (first, second, other):
        fitted(pruning)
    assert all(torch.equal(mask, second.masks[name]) for name, mask in first.masks.items())
    assert any(not torch.equal(mask, other.masks[name]) for name, mask in first.masks.items())
    assert state.shape == torch.get_rng_state().shape


def test_taylor_prunes_what_the_loss_does_not_feel():
    """One input is always zero: weights on it have no gradient, however large they are."""

    class Blind(Classifier):
        def build(self):
            self.model = nn.Linear(8, 3)
            self.model.weight.data[:, 2] = 5.0

        def task_loss(self, batch):
            x, y = batch
            return F.cross_entropy(self.model(x * (torch.arange(8) != 2)), y)

    module, _ = fitted(PruningCallback(3 / 24, score="taylor", schedule="one_shot", start=0.5), Blind)
    assert (module.model.weight == 0).nonzero()[:, 1].tolist() == [2, 2, 2]


def test_taylor_scores_are_those_of_the_steps_since_the_last_update():
    pruning = PruningCallback(0.5, score="taylor", schedule="iterative", rounds=2, end=0.75)
    module, sums, first = made(Classifier), {}, []

    class Sum(L.Callback):
        """Adds up for itself, from the third step on anew."""

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 3:
                first.extend(pruning.masks.values())
                sums.clear()
            if trainer.global_step < 6:
                for name, value in weights(pl_module).items():
                    sums[name] = sums.get(name, 0) + (value.detach() * value.grad).abs()

    trainer(pruning, Sum()).fit(module, loader())
    assert sum(int((~mask).sum()) for mask in first) == round(TOTAL * (1 - 0.5**0.5))
    expected = smallest_masks([sums[name] for name in pruning.masks], TOTAL // 2, kept=first)
    assert all(torch.equal(mask, own) for mask, own in zip(expected, pruning.masks.values(), strict=True))


@pytest.mark.sample
def test_taylor_scores_of_gradients_that_a_fused_optimizer_is_going_to_unscale():
    """The scale doubles in each step, so that scores which have it would be those of the last one."""

    def scores(fused):
        plugin, pruning = scaled(), PruningCallback(0.5, score="taylor", schedule="one_shot", start=0.5, end=0.5)
        plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
        module, seen = made(Classifier), []

        class Look(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if batch_idx < STEPS // 2 - 1:
                    seen[:] = [pruning.state_dict()["importance"]]

        module.optimise = lambda own: torch.optim.SGD(own.parameters(), lr=0.1, fused=fused)
        trainer(Look(), pruning, plugins=[plugin]).fit(module, loader())
        return seen[0]

    torch.testing.assert_close(scores(True), scores(False), rtol=1e-2, atol=1e-4)


class Wide(Classifier):
    """Four and eight input channels, and one layer whose input channels are odd."""

    def build(self):
        self.model = nn.Sequential(
            nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 4, 1), nn.ConvTranspose2d(4, 3, 2), nn.Flatten(), nn.Linear(12, 3)
        )
        self.odd = nn.Linear(3, 3)

    def task_loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.odd(self.model(x)), y)


@pytest.mark.filterwarnings("ignore:.*does not fit 'odd.weight'")
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "1:2"])
def test_n_of_m(pattern):
    n, m = map(int, pattern.split(":"))
    pruning = PruningCallback(pattern=pattern)
    module, _ = fitted(pruning, Wide)
    assert pruning.reached == 1 - n / m
    assert list(pruning.masks) == ["model.1.weight", "model.2.weight", "model.4.weight"]
    assert not (module.odd.weight == 0).any()
    for name, weight in weights(module).items():
        if name in pruning.masks:
            channels = weight.transpose(0, 1) if name == "model.2.weight" else weight
            groups = (channels != 0).unflatten(1, (-1, m)).sum(2)
            assert (groups == n).all(), name


def test_n_of_m_without_quotation_marks_in_yaml():
    assert yaml.safe_load("pattern: 2:4") == {"pattern": 124}
    pruning = PruningCallback(pattern=124)
    assert (pruning.pattern, pruning.sparsity) == ("2:4", 0.5)


@pytest.mark.filterwarnings("ignore:.*does not fit 'odd.weight'")
def test_n_of_m_in_one_shot_is_the_function():
    module = made(Wide)
    expected = n_m_mask(module.model[1].weight, 2, 4)
    pruning = PruningCallback(pattern="2:4", schedule="one_shot")
    trainer(pruning).fit(module, loader())
    assert torch.equal(pruning.masks["model.1.weight"], expected)


@pytest.mark.sample
@pytest.mark.filterwarnings("ignore:.*does not fit 'odd.weight'")
def test_under_a_schedule_whole_groups_become_n_of_m():
    pruning = PruningCallback(pattern="2:4", schedule="linear", end=1.0)
    watch = Watch(pruning)
    fitted(pruning, Wide, watch)
    shares = []
    for masks in watch.masks[:-1]:
        groups = (masks["model.1.weight"]).unflatten(1, (-1, 4)).sum(2)
        assert set(groups.flatten().tolist()) <= {2, 4}
        shares.append(sum(int((~mask).sum()) for mask in masks.values()))
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1]


def test_layers_and_exclude():
    module, _ = fitted(PruningCallback(0.5, layers=["type:Linear"]))
    assert zeros(module) == {"model.0.weight": 0, "model.3.weight": 48}
    module, _ = fitted(PruningCallback(0.5, exclude=["model.3"]))
    assert zeros(module) == {"model.0.weight": 18, "model.3.weight": 0}


def test_what_is_taken_and_what_is_left_is_announced(caplog):
    with caplog.at_level(logging.INFO, logger="lightning_compress"):
        fitted(PruningCallback(0.5, exclude=["model.0"]))
    assert "pruning masks 'model.3.weight' (96 weights)" in caplog.text
    assert "pruning leaves dense: 'model.0.weight'" in caplog.text


@pytest.mark.sample
def test_no_layer_is_cut_off():
    class Small(Classifier):
        def build(self):
            super().build()
            with torch.no_grad():
                self.model[0].weight.mul_(1e-3)

    pruning, report = PruningCallback(0.9, schedule="one_shot"), CompressionReport(latency=False, path="unused")
    with pytest.warns(UserWarning, match=r"held at their floor of 1% of their weights, or one: 'model.0.weight'"):
        module, _ = fitted(pruning, Small, report, fast_dev_run=4)
    assert zeros(module) == {"model.0.weight": 35, "model.3.weight": 84}
    assert any("held at their floor" in note for note in report.result.notes)


# What users see


def test_logs(tmp_path):
    pruning = PruningCallback(0.5, end=0.5)
    module, fitting = fitted(pruning)
    metrics = {key: float(value) for key, value in fitting.callback_metrics.items()}
    assert metrics["compress/pruning/sparsity"] == 0.5
    for name, weight in weights(module).items():
        assert metrics[f"compress/pruning/sparsity/{name}"] == pytest.approx(int((weight == 0).sum()) / weight.numel())
        assert metrics[f"compress/pruning/norm/{name}"] == pytest.approx(float(weight.norm()))
    assert metrics["compress/pruning/churn"] == pytest.approx((66 - int(TOTAL * 0.5 * (1 - 0.25**3) + 0.5)) / TOTAL)


class Measured(NormClassifier):
    """Keeps metrics as attributes, of training and of validation."""

    def __init__(self):
        super().__init__()
        self.seen, self.right = MeanMetric(), MulticlassAccuracy(3, average="micro")

    def training_step(self, batch, batch_idx):
        self.seen.update(batch[0])
        self.log("seen", self.seen, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.right.update(self.model(batch[0]), batch[1])
        self.log("right", self.right)


def test_metrics_and_statistics_count_each_batch_once():
    module, fitting = fitted(PruningCallback(0.8), Measured, num_sanity_val_steps=2)
    assert module.model[1].num_batches_tracked == STEPS
    batches = list(loader(Measured))
    seen = torch.cat([x for x, _ in batches]).mean().item()
    assert float(fitting.callback_metrics["seen"]) == pytest.approx(seen, abs=1e-7)
    module.eval()
    with torch.no_grad():
        right = torch.cat([module.model(x).argmax(1) == y for x, y in batches])
    assert float(fitting.callback_metrics["right"]) == pytest.approx(right.float().mean().item())
    assert list(module.state_dict()) == list(made(Measured).state_dict())


def test_a_checkpoint_can_be_chosen_by_its_sparsity(tmp_path):
    saver = ModelCheckpoint(
        tmp_path, monitor="compress/pruning/sparsity", mode="max", filename="{epoch}", save_last=True
    )
    fitted(PruningCallback(0.5), Classifier, saver, enable_checkpointing=True, max_epochs=2)
    assert float(saver.best_model_score) == 0.5


class Shorten(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.fit_loop.max_epochs = 2


class Worsening(Classifier):
    """The loss grows with each epoch, so the first checkpoint is the best."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.tensor(float(self.current_epoch)), batch_size=BATCH)


@pytest.mark.sample
@pytest.mark.parametrize(
    ("guard", "save_top_k"),
    [(True, 1), (False, -1), *(pytest.param(*row, marks=pytest.mark.slow) for row in ((True, -1), (False, 1)))],
)
def test_the_best_checkpoint_has_the_final_sparsity(guard, save_top_k, tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", filename="{epoch}", save_top_k=save_top_k, save_last=True)
    pruning = PruningCallback(0.8, end=0.75, guard_checkpoints=guard)
    fitted(pruning, Worsening, saver, enable_checkpointing=True, max_epochs=4)
    state = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    found = sum(int((value == 0).sum()) for value in state.values() if value.ndim > 1)
    assert found == (106 if guard else 74)
    assert saver.best_model_path.endswith("epoch=2.ckpt" if guard else "epoch=0.ckpt")
    assert (tmp_path / "last.ckpt").is_file()
    assert (tmp_path / "epoch=0.ckpt").is_file() == (not guard or save_top_k == -1)  # to resume from
    assert "check_monitor_top_k" not in vars(saver)


def test_a_checkpoint_is_the_best_from_the_final_sparsity_on_not_from_the_end(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", filename="{epoch}", save_last=True)
    pruning = PruningCallback(0.8, schedule="one_shot", start=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="(lightning|torch)\\.")
        fitted(
            pruning, Worsening, saver, EarlyStopping("val_loss", patience=2), enable_checkpointing=True, max_epochs=8
        )
    assert saver.best_model_path.endswith("epoch=1.ckpt")
    assert pruning.reached * TOTAL == 106


class RaisesAtTheEnd(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


@pytest.mark.sample
@pytest.mark.parametrize("ends", ["stopping", "shorter", "interrupt"])
def test_where_no_checkpoint_has_the_final_sparsity_none_is_the_best(ends, tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", filename="{epoch}", save_top_k=-1)
    pruning, module = PruningCallback(0.8, end=0.75), made(Worsening)
    also = {"stopping": EarlyStopping("val_loss", patience=0), "shorter": Shorten(), "interrupt": RaisesAtTheEnd()}
    with (
        pytest.warns(UserWarning, match="no checkpoint was saved at the final sparsity, so none is the best"),
        pytest.raises(SystemExit) if ends == "interrupt" else nullcontext(),
    ):
        trainer(pruning, also[ends], saver, enable_checkpointing=True, max_epochs=4).fit(module, loader(), loader())
    assert saver.best_model_path == ""
    assert (tmp_path / "epoch=0.ckpt").is_file()


class Tells(Classifier):
    """Its metric says whether the network is sparse."""

    def validation_step(self, batch, batch_idx):
        self.log("known", 1.0 if (self.model[3].weight == 0).float().mean() > 0.7 else 0.1, batch_size=BATCH)


@pytest.mark.sample
@pytest.mark.filterwarnings("ignore:.*no checkpoint is kept before")
def test_what_was_measured_before_the_final_sparsity_makes_no_checkpoint_the_best(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="known", filename="{step}", every_n_train_steps=1)
    pruning = PruningCallback(0.8, schedule="one_shot", start=0.4)
    fitted(pruning, Tells, saver, enable_checkpointing=True, max_epochs=4)
    assert float(saver.best_model_score) == 1.0


@pytest.mark.sample
def test_early_checkpoints_are_not_the_best_of_a_resumed_fit(tmp_path):
    def run(folder, **settings):
        saver = ModelCheckpoint(tmp_path / "files", monitor="known", filename="{step}", save_top_k=-1)
        every = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fitting = trainer(
            PruningCallback(0.8, schedule="one_shot", start=0.6), saver, every, enable_checkpointing=True, max_epochs=2
        )
        fitting.fit(made(Tells), loader(), loader(), **settings)
        return saver

    assert float(run(tmp_path / "whole").best_model_score) == 1.0
    [file] = (tmp_path / "whole").glob(f"step={2 * STEPS - 1}.ckpt")
    resumed = run(tmp_path / "resumed", ckpt_path=file, weights_only=True)
    assert float(resumed.best_model_score) == 1.0


@pytest.mark.sample
@pytest.mark.parametrize(
    "make",
    [
        lambda: PruningCallback(0.5, schedule="one_shot", start=0.34),
        lambda: DPFCallback(0.5, end=0.45, update_interval=1),
        lambda: DCILCallback(0.5, end=0.49, update_interval=1),
    ],
)
def test_what_waits_for_a_better_score_waits_anew_at_the_final_sparsity(make, caplog):
    technique = make()
    with caplog.at_level(logging.INFO, logger="lightning_compress"):
        _, fitting = fitted(technique, Jumping, EarlyStopping("score", patience=1), max_epochs=6)
    assert technique.reached == 0.5
    assert (fitting.current_epoch, fitting.optimizers[0].param_groups[0]["lr"]) == (6, 0.1)
    assert {entry.message for entry in caplog.records if "anew" in entry.message} == {
        f"{technique.name}: {kind} begins to wait anew, with the final sparsity"
        for kind in ("EarlyStopping", "ReduceLROnPlateau")
    }


def test_stopping_before_the_target_is_said():
    stopping = EarlyStopping("val_loss", patience=0)
    pruning = PruningCallback(0.8)
    with pytest.warns(
        UserWarning, match=r"training stopped at 50% of its length, before end=0.75: the sparsity is 0\.\d"
    ):
        module, _ = fitted(pruning, Worsening, stopping, max_epochs=4)
    assert 0 < pruning.reached < 0.8
    assert sum(zeros(module).values()) == round(pruning.reached * TOTAL)


def test_a_training_that_is_shorter_than_foreseen_ends_at_the_target():
    pruning = PruningCallback(0.8)
    said = "ended at 50% of the length that Lightning had foreseen, so the sparsity went"
    with pytest.warns(UserWarning, match=said):
        module, _ = fitted(pruning, Classifier, Shorten(), max_epochs=4)
    assert sum(zeros(module).values()) == 106


def test_the_report_tells_what_was_pruned(tmp_path):
    report = CompressionReport(path=tmp_path, latency=False)
    fitted(PruningCallback(0.5), Classifier, report)
    after = next(row for row in report.result.rows if row.name == "after")
    before = next(row for row in report.result.rows if row.name == "before")
    assert before.nonzeros - after.nonzeros == 66
    assert after.bytes_compressed < before.bytes_compressed
    text = (tmp_path / "compression_report.md").read_text()
    assert "pruning: 66 of 132 weights in 2 tensors are masked (50.00%, asked 50.00%)." in text
    assert "not the network faster" in text


# Checkpoints and fits that follow


def test_everything_is_kept_through_fit_test_save_and_load(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", filename="{epoch}", save_last=True)
    module, fitting = fitted(PruningCallback(0.8, end=0.25), Worsening, saver, enable_checkpointing=True, max_epochs=4)
    last = {name: value.clone() for name, value in module.state_dict().items()}
    fitting.test(module, loader(), ckpt_path="best", verbose=False)
    assert difference(module, last) > 0
    assert sum(zeros(module).values()) == 106  # the dense weights did not come back with the best checkpoint
    fitting.save_checkpoint(tmp_path / "again.ckpt")
    best, again = (torch.load(path, weights_only=True) for path in (saver.best_model_path, tmp_path / "again.ckpt"))
    assert difference(best["state_dict"], again["state_dict"]) == 0
    assert difference(dense_of(best, "pruning"), dense_of(again, "pruning")) == 0
    assert not any((value == 0).any() for value in dense_of(again, "pruning").values())


def test_weights_changed_after_the_fit_are_saved_without_dense_ones(tmp_path):
    module, fitting = fitted(PruningCallback(0.5))
    with torch.no_grad():
        module.model[3].weight.add_(1)
    with pytest.warns(UserWarning, match="the weights have changed since the fit"):
        fitting.save_checkpoint(tmp_path / "changed.ckpt")
    assert dense_of(torch.load(tmp_path / "changed.ckpt", weights_only=True), "pruning") == {}


def test_the_same_trainer_goes_on_with_the_same_masks():
    pruning = PruningCallback(0.8, end=0.5)
    module, fitting = fitted(pruning)
    before = pruning.masks
    fitting.fit_loop.max_epochs = 2
    fitting.fit(module, loader(), loader())
    assert all(torch.equal(mask, pruning.masks[name]) for name, mask in before.items())
    assert sum(zeros(module).values()) == 106


@pytest.mark.parametrize(
    ("average", "ours_first"),
    [
        ("EMA", True),
        ("SWA", False),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in (("EMA", False), ("SWA", True))),
    ],
)
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
def test_averages_are_compressed(average, ours_first, tmp_path):
    if average == "EMA":
        other = EMAWeightAveraging(decay=0.5)
    else:
        other = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    weights_only = ModelCheckpoint(
        tmp_path, filename="w{epoch}", save_top_k=-1, save_weights_only=True, every_n_train_steps=STEPS
    )
    pruning, module = PruningCallback(0.8, end=0.5), made(NormClassifier)
    callbacks = [pruning, other] if ours_first else [other, pruning]
    fitting = trainer(*callbacks, saver, weights_only, enable_checkpointing=True, max_epochs=3)
    fitting.fit(module, loader(NormClassifier), loader(NormClassifier))
    assert sum(zeros(module).values()) == 106
    for path in sorted(tmp_path.glob("*epoch=[12].ckpt")):
        state = torch.load(path, weights_only=True)["state_dict"]
        assert sum(int((value == 0).sum()) for name, value in state.items() if value.ndim > 1) == 106
    if average == "EMA":  # what was validated is the average, and it is what was saved
        made_from = made(NormClassifier)
        made_from.load_state_dict(torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["state_dict"])
        [metrics] = trainer().validate(made_from, loader(NormClassifier), verbose=False)
        assert metrics["val_loss"] == float(fitting.callback_metrics["val_loss"])


class FailsAt(Classifier):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 5:
            raise RuntimeError("the step is broken")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("saver", ["OnExceptionCheckpoint", "save_on_exception", "none"])
def test_after_an_exception_nothing_stays_and_its_checkpoint_is_compressed(saver, tmp_path):
    savers = {
        "OnExceptionCheckpoint": [OnExceptionCheckpoint(tmp_path, "broken")],
        "save_on_exception": [ModelCheckpoint(tmp_path, filename="broken", save_on_exception=True, every_n_epochs=1)],
        "none": [],
    }[saver]
    module, pruning = made(FailsAt), PruningCallback(0.8)
    untouched = made(FailsAt)
    with pytest.raises(RuntimeError, match="the step is broken"):
        trainer().fit(untouched, loader())
    fitting = trainer(pruning, *savers, enable_checkpointing=bool(savers))
    with pytest.raises(RuntimeError, match="the step is broken"):
        fitting.fit(module, loader())
    assert traces(module) == traces(untouched)
    assert "on_exception" not in vars(fitting.strategy)
    fitting.save_checkpoint(tmp_path / "by hand.ckpt")
    for path in tmp_path.glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        found = sum(int((value == 0).sum()) for value in checkpoint["state_dict"].values() if value.ndim > 1)
        assert found == round(pruning.reached * TOTAL) > 0
        assert difference(dense_of(checkpoint, "pruning"), dict(weights(module))) == 0
    assert len(list(tmp_path.glob("*.ckpt"))) == 1 + len(savers)


# Options


def test_rewinding_the_weights():
    """After the one pruning, weights, momentum and learning rates are those of the start."""
    module = made(Classifier)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    pruning = PruningCallback(0.5, schedule="one_shot", start=0.5, rewind="weights")
    seen = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == STEPS // 2:
                seen["weights"] = {name: value.clone() for name, value in pl_module.state_dict().items()}
                seen["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
                seen["momentum"] = dict(trainer.optimizers[0].state)

    fitting = trainer(pruning, Look())
    fitting.fit(module, loader())
    assert difference(seen["weights"], start) == 0
    assert (seen["lr"], seen["momentum"]) == (0.1, {})
    assert sum(zeros(module).values()) == 66

    # the rest is a training of half the steps from the start, with these masks
    alone = made(Classifier)
    settings = alone.configure_optimizers()
    optimizer, scheduler = settings["optimizer"], settings["lr_scheduler"]["scheduler"]
    for index, batch in enumerate(loader()):
        if index >= STEPS // 2:
            masked = {name: weights(alone)[name] * mask for name, mask in pruning.masks.items()}
            loss = F.cross_entropy(
                torch.func.functional_call(
                    alone.model, {k.removeprefix("model."): v for k, v in masked.items()}, batch[0]
                ),
                batch[1],
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    for name, value in weights(alone).items():
        assert torch.equal(value * pruning.masks[name], weights(module)[name])


def test_rewinding_the_learning_rate_leaves_the_weights():
    rates = {}
    for rewind in (None, "lr"):

        class Look(L.Callback):
            def on_train_batch_end(self, trainer, *args, rewind=rewind):
                rates.setdefault(rewind, []).append(trainer.optimizers[0].param_groups[0]["lr"])

        fitted(PruningCallback(0.5, schedule="one_shot", start=0.5, rewind=rewind), Classifier, Look())
    assert rates[None] == [0.1, 0.1, 0.05, 0.05, 0.05, 0.025, 0.025, 0.025]
    assert rates["lr"] == [0.1, 0.1, 0.05, 0.1, 0.1, 0.1, 0.05, 0.05]


def test_batch_norm_is_estimated_again_at_the_end():
    plain, _ = fitted(PruningCallback(0.7), NormClassifier)
    module, _ = fitted(PruningCallback(0.7, reestimate_batchnorm=True), NormClassifier)
    for (name, one), (_, other) in zip(plain.named_parameters(), module.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    inputs = [module.model[0](x) for x, _ in loader(NormClassifier)]
    mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
    assert torch.allclose(module.model[1].running_mean, mean, atol=1e-6)
    assert torch.allclose(module.model[1].running_var, variance, atol=1e-6)
    assert not torch.allclose(plain.model[1].running_mean, mean, atol=1e-4)


@pytest.mark.sample
def test_an_average_gets_the_statistics_that_are_estimated_at_the_end(tmp_path):
    """Files after the fit are written from it."""
    pruning, average = PruningCallback(0.7, reestimate_batchnorm=True), EMAWeightAveraging(decay=0.9)
    module, fitting = fitted(pruning, NormClassifier, average)
    fitting.save_checkpoint(tmp_path / "last.ckpt")
    assert difference(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"], module) == 0


def test_manual_optimisation_with_the_mixin():
    """The same weights as the automatic loop gives without a scheduler."""

    class Plain(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    class Manual(MixinClassifier):
        configure_optimizers = Plain.configure_optimizers

    first, second = PruningCallback(0.8), PruningCallback(0.8)
    automatic, _ = fitted(first, Plain)
    manual, _ = fitted(second, Manual)
    assert difference(automatic, manual) == 0
    assert second.reached == first.reached == pytest.approx(106 / TOTAL)


def test_manual_optimisation_that_never_asks_for_the_loss_is_refused():
    class Forgetful(MixinClassifier):
        def total(self, task_loss):
            return task_loss

    with pytest.raises(RuntimeError, match=r"never called self.compressed_loss\(task_loss\), so \['pruning'\]"):
        fitted(PruningCallback(0.8), Forgetful)


def test_two_callbacks_on_different_layers():
    first = PruningCallback(0.5, layers=["model.0"], name="first")
    second = PruningCallback(0.75, layers=["model.3"], name="second", schedule="one_shot")
    module, fitting = fitted(first, Classifier, second)
    assert zeros(module) == {"model.0.weight": 18, "model.3.weight": 72}
    assert float(fitting.callback_metrics["compress/second/sparsity"]) == 0.75
    other, _ = fitted(
        PruningCallback(0.75, layers=["model.3"], name="second", schedule="one_shot"),
        Classifier,
        PruningCallback(0.5, layers=["model.0"], name="first"),
    )
    assert difference(module, other) == 0
    alone = made(Classifier)
    trainer().fit(alone, loader())
    assert traces(module) == traces(alone)
    assert difference(pickle.loads(pickle.dumps(module)), module) == 0


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be a number in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, r"sparsity must be a number in \[0, 1\), got -0.1"),
        ({"sparsity": float("nan")}, r"sparsity must be a number in \[0, 1\), got nan"),
        ({"sparsity": "0.5"}, r"sparsity must be a number in \[0, 1\), got '0.5'"),
        ({"sparsity": None}, r"sparsity must be a number in \[0, 1\) with pattern='unstructured', got None"),
        ({"sparsity": 0.7, "pattern": "2:4"}, r"pattern='2:4' has the sparsity 0.5; .* got 0.7"),
        ({"pattern": "4:2"}, r"pattern must be 'unstructured' or 'n:m' with 0 < n < m.*got '4:2'"),
        ({"pattern": "block"}, r"pattern must be .*got 'block'"),
        ({"start": 0.8}, r"start must be at most end, got start=0.8 and end=0.75"),
        ({"end": 1.5}, r"end must be a number in \[0, 1\], got 1.5"),
        ({"update_interval": 0}, r"update_interval must be a whole number of at least 1, got 0"),
        ({"schedule": "qubic"}, r"schedule must be one of .*got 'qubic'; did you mean 'cubic'\?"),
        ({"score": "taylr"}, r"score must be one of .*did you mean 'taylor'"),
        ({"scope": "globl"}, r"scope must be one of .*did you mean 'global'"),
        ({"scope": "layer", "pattern": "2:4", "sparsity": None}, "scope='layer' has no effect with pattern='2:4'"),
        ({"regrow": True, "score": "random"}, "regrow=True needs score='magnitude'"),
        ({"score": "taylor", "schedule": "one_shot"}, "score='taylor' needs gradients"),
        ({"rewind": "weights"}, "rewind needs schedule='one_shot' or 'iterative', got 'cubic'"),
        ({"rewind": "weights", "schedule": "one_shot"}, "rewind has no effect with schedule='one_shot' and start=0"),
        ({"rewind": "lr", "schedule": "one_shot", "start": 1.0}, "rewind needs start below 1"),
        ({"schedule": "one_shot", "regrow": True, "start": 0.8}, "start must be at most end, got start=0.8 and end="),
        ({"rewind": "wieghts", "schedule": "iterative"}, "rewind must be one of .*did you mean 'weights'"),
        ({"rounds": 0, "schedule": "iterative"}, "rounds must be a whole number of at least 1"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        PruningCallback(**{"sparsity": 0.5, **settings})


class Normed(Classifier):
    def build(self):
        self.model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)), nn.Linear(4, 3))


class Shared(Classifier):
    def build(self):
        self.model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
        self.model[1].weight = self.model[0].weight


class Writes(Classifier):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.model[3].weight.clamp_(-0.1, 0.1)
        return super().training_step(batch, batch_idx)


class WritesData(Classifier):
    def training_step(self, batch, batch_idx):
        self.model[3].weight.data.clamp_(-0.1, 0.1)
        return super().training_step(batch, batch_idx)


class HoldsOn(Classifier):
    """Uses the parameters it took at the start."""

    def build(self):
        super().build()
        self.taken = [self.model[3].weight]

    def task_loss(self, batch):
        x, y = batch
        return F.cross_entropy(F.linear(self.model[:3](x), self.taken[0], self.model[3].bias), y)


class Functional(Classifier):
    def task_loss(self, batch):
        parameters = {name: value * 1.0 for name, value in self.model.named_parameters()}
        return F.cross_entropy(torch.func.functional_call(self.model, parameters, batch[0]), batch[1])


class Unused(Classifier):
    def build(self):
        super().build()
        self.extra = nn.Linear(3, 3)


class Nested(Classifier):
    def build(self):
        self.model = nn.Sequential(nn.Linear(8, 3))
        self.unused = nn.Linear(8, 3)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            Normed,
            {},
            r"'model.0' computes its weight .* \(a parametrization\).*exclude=\['model.0'\]",
        ),
        (Shared, {"exclude": ["model.1"]}, "'model.0.weight' belongs also to 'model.1', which exclude= leaves out"),
        (Writes, {"schedule": "one_shot"}, "the weight 'model.3.weight' was written to within a step"),
        (WritesData, {"schedule": "one_shot"}, "the weight 'model.3.weight' was written to within a step"),
        (HoldsOn, {}, "'model.3.weight' gets a gradient past its view"),
        (Functional, {}, "gets other parameters, as torch.func.functional_call gives"),
        (
            Nested,
            {"layers": ["unused"]},
            "training step used none of the weights that it masks, 'unused.weight'",
        ),
        (Classifier, {"layers": ["modle"]}, "layers has 'modle', which matches no module; did you mean 'model'"),
        (Classifier, {"layers": ["model.1"]}, "layers names 'model.1', of type ReLU and without any"),
        (Classifier, {"sparsity": 0.995}, r"asks for 131 zeros among 132 weights.*130 are the most: 0.984848"),
        (Classifier, {"sparsity": 0.001}, "sparsity=0.001 masks none of the 132 selected weights"),
        (Classifier, {"pattern": "2:5", "sparsity": None}, "pattern='2:5' fits none of the selected weights"),
        (Classifier, {"reestimate_batchnorm": True}, "reestimate_batchnorm has no effect: no layer keeps"),
        (
            Classifier,
            {"schedule": lambda *_: float("nan")},
            "schedule .* must give a sparsity in .*, gave nan",
        ),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_modules_that_are_refused(kind, settings, message):
    module = made(kind)
    with pytest.raises((ValueError, RuntimeError), match=message):
        trainer(PruningCallback(**{"sparsity": 0.5, **settings})).fit(module, loader())
    for part in module.modules():
        assert not {"weight", "training_step", "on_save_checkpoint", "on_load_checkpoint"} & set(vars(part))


def test_a_layer_that_is_not_used_is_said():
    with pytest.warns(UserWarning, match="the first training step did not use 'extra.weight'"):
        fitted(PruningCallback(0.5), Unused)


class Judged(Classifier):
    """A metric and a loss have networks of their own, frozen and in evaluation mode."""

    def setup(self, stage):
        self.distance = Distance(small_network().eval().requires_grad_(False))
        self.judge = small_network().requires_grad_(False)
        self.judge.eval()

    def training_step(self, batch, batch_idx):
        self.distance.update(batch[0])
        return super().training_step(batch, batch_idx) + 0.01 * self.judge(batch[0]).mean()


class Distance(Metric):
    def __init__(self, inception):
        super().__init__()
        self.inception = inception
        self.add_state("total", torch.zeros(()), "sum")

    def update(self, x):
        self.total += self.inception(x).mean()

    def compute(self):
        return self.total


def test_networks_that_only_measure():
    """That of a metric is left alone; of another one nobody knows, so it is said."""
    told = r"'judge' are masked, and frozen .*exclude=\['judge'\]; .*layers=\['model', 'judge'\] says so"
    with pytest.warns(UserWarning, match=told) as caught:
        module, _ = fitted(PruningCallback(0.5), Judged)
    assert not [own for own in caught if "did not use" in str(own.message)]
    assert sum(zeros(module.distance).values()) == 0
    assert sum(zeros(module.model).values()) + sum(zeros(module.judge).values()) == TOTAL
    for settings in ({"exclude": ["judge"]}, {"layers": ["model", "judge"]}):
        module, _ = fitted(PruningCallback(0.5, **settings), Judged)
        assert (sum(zeros(module.judge).values()) == 0) == ("exclude" in settings)


class Shared(Classifier):
    """A metric measures with the network that is trained."""

    def setup(self, stage):
        self.distance = Distance(self.model)


@pytest.mark.parametrize("settings", [{}, {"exclude": ["model.3"]}, {"layers": ["model"], "exclude": ["model.3"]}])
def test_a_network_that_a_metric_measures_with_too_is_masked(settings):
    pruning = PruningCallback(0.5, **settings)
    module, _ = fitted(pruning, Shared)
    assert list(pruning.masks) == (list(SHAPES) if not settings else ["model.0.weight"])
    assert sum(zeros(module).values()) == (TOTAL // 2 if not settings else 18)


class Averaged(Classifier):
    """Keeps an average of its network by itself, made in the first step."""

    def setup(self, stage):
        self.average = copy.deepcopy(self.model)

    def training_step(self, batch, batch_idx):
        if self.global_step == 0:
            self.model_at_start = copy.deepcopy(self.model)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for average, weight in zip(self.average.parameters(), self.model.parameters(), strict=True):
                average.lerp_(weight, 0.5)


def test_an_average_that_the_module_keeps_itself():
    with pytest.warns(UserWarning, match=r"did not use 'average.0.weight', 'average.3.weight'; copies of a network"):
        module, _ = fitted(PruningCallback(0.5), Averaged)
    assert sum(zeros(module).values()) - sum(zeros(module.model_at_start).values()) == TOTAL
    alone, _ = fitted(PruningCallback(0.5, exclude=["average"]), Averaged)
    assert sum(zeros(alone.model).values()) == TOTAL // 2
    assert sum(zeros(alone.average).values()) == 0
    expected = made(Averaged).model  # what the copy in the step holds is the parameter, dense
    assert difference(alone.model_at_start, expected) == 0


class Replaces(Classifier):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.model[3] = nn.Linear(32, 3)


class ReplacesAtEnd(Classifier):
    def on_train_end(self):
        self.model[3].weight = nn.Parameter(torch.ones(3, 32))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Replaces, r"'model.3.weight', which 'pruning' presents, was replaced by another, or its layer was"),
        (ReplacesAtEnd, r"'model.3.weight' are not the weights any more that 'pruning' masks"),
    ],
)
def test_a_layer_that_is_replaced_in_the_fit_is_an_error(kind, message):
    with pytest.raises(RuntimeError, match=message):
        fitted(PruningCallback(0.5), kind, max_epochs=2)


def test_a_fit_without_a_step_is_said():
    module = made(Classifier)
    with pytest.warns(UserWarning, match="no training step was run, so the masks are as they were"):
        trainer(PruningCallback(0.5), max_epochs=0).fit(module, loader())
    assert difference(module, made(Classifier)) == 0


def test_sparsity_zero_is_said():
    with pytest.warns(UserWarning, match=r"sparsity=0.0 masks none of the 132 selected weights"):
        fitted(PruningCallback(0.0))


def test_two_owners_of_one_weight():
    with pytest.raises(ValueError, match=r"'pruning' and 'second' both present the weight 'model.0.weight'"):
        fitted(PruningCallback(0.5), Classifier, PruningCallback(0.5, name="second"))


def test_a_training_without_end():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from loader().dataset

    with pytest.raises(ValueError, match=r"give the Trainer max_steps, or max_epochs with a training set that has"):
        trainer(PruningCallback(0.5)).fit(made(Classifier), torch.utils.data.DataLoader(Endless(), batch_size=4))


def test_rewinding_learning_rates_without_a_scheduler():
    class Constant(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="rewind='lr' has no effect: there is no learning-rate scheduler"):
        fitted(PruningCallback(0.5, schedule="iterative", rewind="lr"), Constant)


@pytest.fixture
def checkpoint(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="end", every_n_epochs=1)
    fitted(PruningCallback(0.8, end=0.5), Classifier, saver, enable_checkpointing=True)
    return tmp_path / "end.ckpt"


def resume(checkpoint, pruning):
    module = made(Classifier)
    trainer(pruning, max_epochs=2).fit(module, loader(), ckpt_path=checkpoint)
    return module


def test_a_resume_with_other_layers_says_which(checkpoint):
    with (
        pytest.warns(UserWarning, match=r"layers was None and is \['model.3'\]"),
        pytest.raises(ValueError, match=r"masks .* of other weights: 'model.0.weight' is not selected"),
    ):
        resume(checkpoint, PruningCallback(0.8, end=0.5, layers=["model.3"]))


def test_a_resume_with_less_sparsity_is_refused(checkpoint):
    with (
        pytest.warns(UserWarning, match=r"sparsity was 0.8 and is 0.5"),
        pytest.raises(ValueError, match=r"sparsity=0.5 is below the 0.803030 that was reached before"),
    ):
        resume(checkpoint, PruningCallback(0.5, end=0.5))


def test_a_resume_with_more_sparsity_reaches_it(checkpoint):
    with pytest.warns(UserWarning, match=r"sparsity was 0.8 and is 0.9"):
        module = resume(checkpoint, PruningCallback(0.9, end=1.0))
    assert sum(zeros(module).values()) == 119


def test_a_newer_schema_is_refused(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    content["callbacks"]["PruningCallback[pruning]"]["schema"] = 99
    torch.save(content, checkpoint)
    with pytest.raises(ValueError, match="has schema 99, newer than 1"):
        resume(checkpoint, PruningCallback(0.8, end=0.5))


def test_sharded_strategies_are_refused():
    class FSDPStrategy(type(trainer().strategy)):
        pass

    module, fitting = made(Classifier), trainer(PruningCallback(0.5))
    fitting.strategy.__class__ = FSDPStrategy
    with pytest.raises(ValueError, match="PruningCallback does not support FSDPStrategy"):
        fitting.fit(module, loader())


def test_a_module_that_was_pruned_can_be_copied_and_pickled():
    module, _ = fitted(PruningCallback(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert difference(copy.deepcopy(module), module) == 0
        assert difference(pickle.loads(pickle.dumps(module.model)), module.model) == 0
