"""PSGDCallback: arguments, what it selects and refuses, what it logs, draws and keeps; and nothing stays behind."""

from __future__ import annotations

import copy
import logging
import math
import re
from contextlib import nullcontext
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from contract.modules import (
    BATCH,
    STEPS,
    Classifier,
    MixinClassifier,
    NormClassifier,
    difference,
    loader,
    made,
    rows_logged,
    teacher_for,
    trainer,
)
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import DCILCallback, DistillationCallback, PruningCallback, PSGDCallback
from lightning_compress.functional import nearest_grid_point, quantization_grid
from lightning_compress.functional.gradients import grid_positions
from lightning_compress.report.positions import position_histogram

KINDS = ("weight", "bias")


class Mlp(L.LightningModule):
    """Four layers, of which the one that is called last is registered first; optimizers as they are given."""

    def __init__(self, make=torch.optim.SGD, **settings):
        super().__init__()
        torch.manual_seed(3)
        self.head = nn.Linear(6, 3)
        self.first, self.second, self.third = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.make, self.settings = make, settings or {"lr": 0.05}

    def forward(self, x):
        for layer in (self.first, self.second, self.third):
            x = F.relu(layer(x))
        return self.head(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.log("val_acc", (logits.argmax(dim=1) == batch[1]).float().mean(), batch_size=len(batch[1]))
        self.log("loss", F.cross_entropy(logits, batch[1]), batch_size=len(batch[1]))

    def configure_optimizers(self):
        return self.make(self.parameters(), **self.settings)


def fitted(module, *callbacks, **settings):
    fitting = trainer(*callbacks, **settings)
    fitting.fit(module, loader(), loader())
    return fitting


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "bits must be a whole number from 2 to 8, got 1"),
        ({"bits": 9}, "bits must be a whole number from 2 to 8, got 9"),
        ({"bits": 4.0}, "bits must be a whole number from 2 to 8, got 4.0"),
        ({"edge_bits": 16}, "edge_bits, if neither 'auto' nor None, must be a whole number from 2 to 8, got 16"),
        ({"edge_bits": "all"}, "edge_bits, if neither 'auto' nor None, must be a whole number from 2 to 8, got 'all'"),
        ({"gradient_scale": 0}, "gradient_scale must be 'auto' or a positive number, got 0"),
        ({"gradient_scale": -150.0}, "gradient_scale must be 'auto' or a positive number, got -150.0"),
        ({"gradient_scale": "high"}, "gradient_scale must be 'auto' or a positive number, got 'high'"),
        ({"gradient_scale": 150, "mean_factor": 6.0}, "mean_factor=6.0 has no effect: gradient_scale=150 is fixed"),
        ({"mean_factor": 0}, "mean_factor must be a positive number, got 0"),
        (
            {"granularity": "chanel"},
            "granularity must be one of tensor, channel, got 'chanel'; did you mean 'channel'?",
        ),
        ({"target": "gird"}, "target must be one of grid, zero, got 'gird'; did you mean 'grid'?"),
        ({"target": "zero"}, "target='zero' needs a positive eps, such as eps=1e-3"),
        ({"eps": -0.1}, "eps must be a number of at least 0, got -0.1"),
        ({"eps": math.inf}, "eps must be a number of at least 0, got inf"),
        ({"apply_to": "weights"}, "apply_to must be one of auto, gradient, update, got 'weights'"),
        ({"quantized_validation": "no"}, "quantized_validation must be True or False, got 'no'"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PSGDCallback(**arguments)


def refused(message, module, callback=None, error=ValueError, **settings):
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(error, match=message):
        fitted(module, callback or PSGDCallback(), **settings)
    assert difference(module, before) == 0
    assert "on_before_optimizer_step" not in vars(module)


def test_a_weight_that_is_not_a_number_is_refused():
    module = Mlp()
    module.second.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"'second.weight' hold NaN or infinity.*exclude="):
        fitted(module, PSGDCallback())


def test_a_constant_weight_is_refused_unless_eps_moves_it():
    module = Mlp()
    module.second.weight.data.fill_(0.1)
    module.second.weight.data[0] *= -1
    refused(r"all elements of 'second.weight' lie on the grid of 4 bits.*positive eps=.*exclude=", module)
    fitted(module, PSGDCallback(eps=1e-3))
    assert len(module.second.weight.unique()) > 2


@pytest.mark.sample
def test_biases_on_the_grid_are_left_to_the_optimizer():
    module, alone = Mlp(), Mlp()
    psgd = PSGDCallback()
    for own in (module, alone):
        own.second.bias.data.zero_()
    with pytest.warns(UserWarning, match=r"'second.bias' lie on the grid, as zeros do.*learn without scaling"):
        fitted(module, psgd)
    assert "second.bias" not in psgd.grids
    assert "first.bias" in psgd.grids
    assert float(module.second.bias.abs().max()) > 0
    eps = PSGDCallback(eps=1e-3)
    fitted(alone, eps)
    assert "second.bias" in eps.grids


def test_layers_that_match_nothing_and_computed_weights_are_refused():
    refused(
        "layers has 'secnd', which matches no module; did you mean 'second'?", Mlp(), PSGDCallback(layers=["secnd"])
    )
    module = Mlp()
    nn.utils.parametrizations.weight_norm(module.second)
    refused(r"'second' computes its weight from other parameters \(a parametrization\)", module)


class OwnStep(torch.optim.SGD):
    """Its step is that of SGD, which may have been used before, and then calls hooks too."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.sample
@pytest.mark.parametrize("make", [PSGDCallback, lambda: PruningCallback(0.5, score="taylor", update_interval=2)])
def test_an_optimizer_whose_step_calls_that_of_its_base(make):
    modules = [Mlp(kind, lr=0.1) for kind in (torch.optim.SGD, OwnStep)]
    for module in modules:
        fitted(module, make())
    assert difference(*modules) == 0


@pytest.mark.sample
def test_metrics_of_one_short_name_keep_their_own():
    class Both(Mlp):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("acc", 2.0, batch_size=len(batch[1]))

    fitting = fitted(Both(), PSGDCallback())
    ours = {name for name in fitting.callback_metrics if name.startswith("compress/psgd/val_") and name.endswith("acc")}
    assert ours == {"compress/psgd/val_acc", "compress/psgd/val_val_acc"}
    assert fitting.callback_metrics["compress/psgd/val_acc"] == 2.0


def test_lbfgs_is_refused():
    refused("cannot work with LBFGS", Mlp(torch.optim.LBFGS, lr=0.1))


@pytest.mark.sample
def test_frozen_weights_are_left_out(caplog):
    caplog.set_level(logging.INFO, "lightning_compress")
    module, psgd = Mlp(), PSGDCallback()
    module.first.requires_grad_(False)
    fitted(module, psgd)
    assert sorted(psgd.grids) == sorted(f"{own}.{kind}" for own in ("head", "second", "third") for kind in KINDS)
    assert "psgd leaves out what is frozen: 'first.weight', 'first.bias'" in caplog.text
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="selects only frozen weights"):
        trainer(PSGDCallback()).fit(module, loader())


def test_weights_that_are_freed_later_are_named():
    class Unfreezing(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.first.requires_grad_(trainer.current_epoch > 0)

    module = Mlp()
    module.first.requires_grad_(False)
    with pytest.warns(UserWarning, match="'first.weight', 'first.bias' were frozen when the fit began"):
        fitted(module, Unfreezing(), PSGDCallback(), max_epochs=2)


def test_weights_that_are_replaced_are_refused():
    class Replacing(Mlp):
        def on_train_start(self):
            self.second = nn.Linear(6, 6)

    with pytest.raises(RuntimeError, match=r"'second.weight', 'second.bias' are not the weights any more"):
        fitted(Replacing(), PSGDCallback())


def test_weights_in_no_optimizer():
    class Part(Mlp):
        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), lr=0.05)

    psgd = PSGDCallback()
    with pytest.warns(UserWarning, match=r"no optimizer has 'first.weight', .* and 1 more, so they are left out"):
        fitted(Part(), psgd)
    assert sorted(psgd.grids) == ["head.bias", "head.weight"]
    refused("no optimizer has any of the selected weights", Part(), PSGDCallback(layers=["second"]))


def test_weights_without_a_gradient():
    class Short(Mlp):
        def forward(self, x):
            return self.head(F.relu(self.first(x)))

    with pytest.warns(UserWarning, match=r"no gradient came to 'second.weight', .*'third.bias' in the first step"):
        fitted(Short(), PSGDCallback())
    with pytest.raises(RuntimeError, match=r"no gradient came to any of the selected weights, 'third.weight'"):
        fitted(Short(), PSGDCallback(layers=["third"]))


class PassingBy(Mlp):
    """Steps the torch optimizer itself, of which Lightning learns nothing."""

    def __init__(self, make=torch.optim.SGD, **settings):
        super().__init__(make, **settings)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers().optimizer
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize(("make", "settings"), [(torch.optim.SGD, {"lr": 0.1}), (torch.optim.Adam, {"lr": 0.1})])
def test_steps_past_lightning_are_refused(make, settings):
    """The first of them, not at the end of the epoch."""
    module, message = (
        PassingBy(make, **settings),
        r"an optimizer took without Lightning's hooks: let PassingBy step what",
    )
    with pytest.raises(RuntimeError, match=message):
        fitted(module, psgd := PSGDCallback())
    assert module.trainer.fit_loop.epoch_loop.batch_progress.current.ready == 1
    assert psgd.effects["the scaled step"] == 0


def test_an_optimizer_that_nobody_knows_of_is_refused_after_an_epoch():
    class Hidden(PassingBy):
        def training_step(self, batch, batch_idx):
            if not hasattr(self, "mine"):
                self.mine = [torch.optim.SGD(self.parameters(), lr=0.1)]
            self.zero_grad()
            self.manual_backward(Mlp.training_step(self, batch, batch_idx))
            self.mine[0].step()

    with pytest.raises(RuntimeError, match="had no effect on a step that an optimizer took without Lightning's hooks"):
        fitted(Hidden(), PSGDCallback())


@pytest.mark.sample
def test_two_of_them_share_no_weight():
    first, second = PSGDCallback(layers=["first", "second"]), PSGDCallback(3, layers=["second"], name="few")
    module = Mlp()
    with pytest.raises(ValueError, match=r"'psgd' and 'few' both scale 'second.weight', 'second.bias'"):
        fitted(module, first, second)
    second.exclude, second.layers = ["second"], ["second", "third"]
    fitted(module, first, second)
    assert sorted(first.grids) == ["first.bias", "first.weight", "second.bias", "second.weight"]
    assert {bits for _, bits in second.grids.values()} == {3}


def test_a_learning_rate_finder_is_told_of():
    with pytest.warns(UserWarning, match="LearningRateFinder sets all callbacks aside"):
        PSGDCallback().check(SimpleNamespace(callbacks=[LearningRateFinder()]), None)


# --- optimizers ---


class Signed(torch.optim.Optimizer):
    """Moves by the signs of the gradients, and shows it by nothing; or, by its state."""

    def __init__(self, params, lr, shows=False):
        super().__init__(params, {"lr": lr})
        self.shows = shows

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"exp_avg_sq" if self.shows else "last": parameter.grad.square()}
                parameter.data -= group["lr"] * parameter.grad.sign()
        return loss


@pytest.mark.sample
def test_an_unknown_optimizer_gets_scaled_gradients_and_a_warning():
    with pytest.warns(UserWarning, match=r"Signed is not known here.*apply_to='update', else apply_to='gradient'"):
        fitted(Mlp(Signed, lr=0.01), PSGDCallback())
    fitted(Mlp(Signed, lr=0.01), PSGDCallback(apply_to="gradient"))  # which says that it is right


def test_an_unknown_optimizer_that_divides_is_found_by_its_state(caplog):
    caplog.set_level(logging.INFO, "lightning_compress")
    module, psgd = Mlp(Signed, lr=0.01, shows=True), PSGDCallback(quantized_validation=False)
    fitted(module, psgd)
    assert caplog.text.count("Signed divides by a running size of the gradients") == 1
    assert psgd.effects["the scaled step"] == STEPS
    # each element has moved by another distance, as signs alone cannot make it
    assert len((module.second.weight - Mlp().second.weight).abs().flatten().unique()) > 20


def test_adam_is_told_of_once(caplog):
    caplog.set_level(logging.INFO, "lightning_compress")
    fitted(Mlp(torch.optim.AdamW, lr=0.01), PSGDCallback())
    assert caplog.text.count("AdamW divides by a running size of the gradients") == 1


# --- bits ---


def test_few_bits_leave_first_and_last_layer_at_eight(caplog):
    """In the order in which the network calls them, not that in which it registers them."""
    caplog.set_level(logging.INFO, "lightning_compress")
    psgd, hooks = PSGDCallback(3), []

    class Counting(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            hooks.append(len(pl_module.first._forward_pre_hooks))

    fitted(Mlp(), psgd, Counting())
    assert hooks == [1] + [0] * (STEPS - 1)
    bits = {name: own for name, (_, own) in psgd.grids.items()}
    assert {name.split(".")[0]: own for name, own in bits.items()} == {"first": 8, "head": 8, "second": 3, "third": 3}
    assert "8 bits to the first and the last layer that the network calls: 'first', 'head'" in caplog.text


@pytest.mark.sample
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_layers_count_in_the_order_of_registration(caplog):
    caplog.set_level(logging.INFO, "lightning_compress")
    module, psgd = Mlp(), PSGDCallback(3)
    module.second.compile(backend="eager")
    fitted(module, psgd)
    assert "8 bits to the first and the last layer in the order of registration: 'head', 'third'" in caplog.text
    assert psgd.grids["third.weight"][1] == 8


@pytest.mark.parametrize(
    ("bits", "edge_bits", "expected"),
    [(4, "auto", {4}), (3, None, {3}), (4, 6, {4, 6}), (2, 2, {2}), (2, "auto", {2, 8})],
)
def test_edge_bits(bits, edge_bits, expected):
    psgd = PSGDCallback(bits, edge_bits=edge_bits)
    fitted(Mlp(), psgd)
    assert {own for _, own in psgd.grids.values()} == expected


def test_bits_that_no_layer_has_are_told_of():
    with pytest.warns(
        UserWarning, match=r"bits=3 has no effect: all of the selected layers are first or last, and have 8"
    ):
        fitted(Mlp(), PSGDCallback(3, layers=["first"]))


def test_the_grids_are_those_of_the_weights_now():
    module, psgd = Mlp(), PSGDCallback(granularity="channel")
    fitted(module, psgd)
    for name, (step, bits) in psgd.grids.items():
        weight = module.get_parameter(name)
        assert bits == 4
        assert torch.equal(step, quantization_grid(weight, 4, axis=0 if weight.ndim > 1 else None))
    assert psgd.grids["first.weight"][0].shape == (6,)
    module.first.weight.data *= 2
    assert torch.equal(psgd.grids["first.weight"][0], quantization_grid(module.first.weight, 4, axis=0))


def test_nothing_is_known_before_a_fit():
    psgd = PSGDCallback()
    assert (psgd.grids, psgd.remarks(), psgd.lambda_s, psgd.picture) == ({}, [], None, None)


def test_towards_zero_there_are_no_grids():
    psgd = PSGDCallback(target="zero", eps=0.01)
    fitting = fitted(Mlp(), psgd)
    assert psgd.grids == {}
    assert [key for key in fitting.callback_metrics if key.startswith("compress")] == [
        "compress/psgd/scale",
        "compress/psgd/lambda",
    ]
    assert len(psgd.remarks()) == 1
    assert psgd.picture is not None


# --- what is logged ---


def test_what_is_logged_is_what_the_weights_say():
    module, psgd = Mlp(), PSGDCallback()
    start = {name: value.detach().clone() for name, value in module.named_parameters()}
    metrics = fitted(module, psgd).callback_metrics
    quantised = {name: nearest_grid_point(value, quantization_grid(value, 4), 4) for name, value in start.items()}
    distances = torch.cat([(start[name] - quantised[name]).abs().flatten() for name in start])
    values = torch.cat([value.flatten() for value in start.values()])
    assert float(metrics["compress/psgd/scale"]) == pytest.approx(3.0, rel=1e-5)  # of the first step
    assert float(metrics["compress/psgd/lambda"]) == pytest.approx(3.0 / float(distances.mean()), rel=1e-5)
    assert float(metrics["compress/psgd/quantization_error"]) == pytest.approx(
        float(distances.norm() / values.norm()), rel=1e-5
    )
    zeros = sum(int((value == 0).sum()) for value in quantised.values())
    assert float(metrics["compress/psgd/sparsity"]) == pytest.approx(zeros / len(values), rel=1e-5)
    assert psgd.lambda_s == pytest.approx(float(metrics["compress/psgd/lambda"]), rel=1e-6)


@pytest.mark.sample
def test_each_step_is_logged_where_the_trainer_logs_each(tmp_path):
    logger = CSVLogger(tmp_path)
    fitted(Mlp(), PSGDCallback(quantized_validation=False), logger=logger, log_every_n_steps=2)
    logger.save()
    rows = [row for row in rows_logged(logger) if row["compress/psgd/scale"]]
    assert [row["step"] for row in rows] == ["1", "3", "5", "7"]
    assert len({row["compress/psgd/scale"] for row in rows}) == 4
    assert (tmp_path / "lightning_logs/version_0/compress/psgd/positions.png").stat().st_size > 5000


def test_barebones_logs_and_validates_nothing():
    module, psgd = Mlp(), PSGDCallback()
    fitting = L.Trainer(barebones=True, max_steps=3, accelerator="cpu", callbacks=[psgd])
    fitting.fit(module, loader(), loader())
    assert psgd.lambda_s is not None
    assert not [key for key in fitting.callback_metrics if key.startswith("compress")]


def by_validating(module, bits=4, change=lambda value: value):
    """The metrics of a module whose weights are rounded by hand."""
    for layer in (part for part in module.modules() if isinstance(part, nn.Linear)):
        for parameter in layer.parameters():
            value = change(parameter.detach())
            parameter.data = nearest_grid_point(value, quantization_grid(value, bits), bits)
    [metrics] = trainer().validate(module, loader(), verbose=False)
    return metrics


@pytest.mark.sample
def test_validation_shows_the_metrics_with_quantised_weights():
    module = Mlp()
    metrics = fitted(module, PSGDCallback()).callback_metrics
    before = {name: value.clone() for name, value in module.state_dict().items()}
    rounded = by_validating(module)
    assert metrics["compress/psgd/val_acc"] == rounded["val_acc"]
    assert metrics["compress/psgd/val_loss"] == rounded["loss"]
    assert difference(module, before) > 0
    assert metrics["loss"] != metrics["compress/psgd/val_loss"]


@pytest.mark.sample
def test_validation_can_be_switched_off_and_is_left_out_of_the_sanity_check():
    psgd = PSGDCallback(quantized_validation=False)
    metrics = fitted(Mlp(), psgd).callback_metrics
    assert not [key for key in metrics if key.startswith("compress/psgd/val")]

    class Watching(L.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            seen.append([key for key in trainer.callback_metrics if key.startswith("compress")])

    seen = []
    metrics = fitted(Mlp(), PSGDCallback(), Watching(), num_sanity_val_steps=2).callback_metrics
    assert seen == [[]]
    assert "compress/psgd/val_loss" in metrics


@pytest.mark.sample
def test_validation_within_an_epoch_and_its_monitors():
    """Each validation has its own, in time for whoever monitors it."""
    seen = []

    class Watching(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(float(trainer.callback_metrics["compress/psgd/val_loss"]))

    fitted(Mlp(), Watching(), PSGDCallback(), val_check_interval=4, num_sanity_val_steps=0)
    assert len(seen) == len(set(seen)) == 2


@pytest.mark.sample
@pytest.mark.parametrize("first", [True, False])
def test_an_average_is_validated_as_an_average(first):
    module, psgd, average = Mlp(), PSGDCallback(), EMAWeightAveraging(decay=0.5)
    metrics = fitted(module, *([average, psgd] if first else [psgd, average])).callback_metrics
    assert (
        float(metrics["compress/psgd/val_loss"]) == by_validating(module)["loss"]
    )  # the average is left in the module


@pytest.mark.sample
@pytest.mark.parametrize("first", [True, False])
def test_masked_weights_are_validated_masked(first):
    module, psgd, pruning = Mlp(), PSGDCallback(), PruningCallback(0.5, end=0.5)
    metrics = fitted(module, *([pruning, psgd] if first else [psgd, pruning])).callback_metrics
    assert pruning.reached == 0.5
    assert float(metrics["compress/psgd/val_loss"]) == by_validating(module)["loss"]


@pytest.mark.parametrize("first", [True, False])
def test_weights_whose_mask_comes_later_are_validated_whole(first):
    class Keeping(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            kept.append(
                (copy.deepcopy(pl_module.state_dict()), float(trainer.callback_metrics["compress/psgd/val_loss"]))
            )

    kept, psgd, pruning = [], PSGDCallback(), PruningCallback(0.5, start=0.75, end=0.875)
    fitted(
        Mlp(), *([pruning, psgd] if first else [psgd, pruning]), Keeping(), val_check_interval=4, num_sanity_val_steps=0
    )
    assert pruning.reached == 0.5
    state, shown = kept[0]
    module = Mlp()
    module.load_state_dict(state)
    assert shown == by_validating(module)["loss"]


@pytest.mark.sample
def test_a_validation_that_cannot_run_on_a_copy_is_a_warning():
    class Fussy(Mlp):
        def validation_step(self, batch, batch_idx):
            if self.trainer.callbacks == []:
                raise RuntimeError("not on this device")
            super().validation_step(batch, batch_idx)

    module = Fussy()
    with pytest.warns(UserWarning, match=r"quantised weights cannot be validated.*not on this device") as caught:
        metrics = fitted(module, PSGDCallback(), max_epochs=2).callback_metrics
    assert len([entry for entry in caught if "not on this device" in str(entry.message)]) == 1
    assert "loss" in metrics
    assert "compress/psgd/val_loss" not in metrics


def test_a_scale_that_grows_with_the_weights_is_told_of():
    class Growing(Mlp):
        def on_train_batch_start(self, batch, batch_idx):
            with torch.no_grad():
                for weight in self.parameters():
                    weight.mul_(2)

    with pytest.warns(UserWarning, match=r"the mean factor has grown from 3 to \d+.* since the first step") as caught:
        fitted(Growing(lr=1e-6), PSGDCallback(), log_every_n_steps=1)
    assert len([entry for entry in caught if "has grown" in str(entry.message)]) == 1


def test_a_training_that_diverges_is_told_of_and_goes_on():
    class Diverging(Mlp):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 4:
                self.first.weight.data.fill_(torch.nan)

    module = Diverging()
    with pytest.warns(UserWarning, match="NaN or infinity"):
        fitting = fitted(module, PSGDCallback(), log_every_n_steps=1)
    assert fitting.global_step == STEPS


# --- the picture ---


def test_the_picture_goes_to_a_logger_that_takes_images(tmp_path):
    logger, psgd = TensorBoardLogger(tmp_path), PSGDCallback()
    images = []
    logger.experiment.add_image = lambda *args, **kwargs: images.append((args, kwargs))
    fitted(Mlp(), psgd, logger=logger)
    [(arguments, _)] = images
    assert arguments[0] == "compress/psgd/positions"
    assert np.array_equal(arguments[1], psgd.picture)
    assert not list(tmp_path.rglob("*.png"))


def test_without_a_logger_no_file_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    psgd = PSGDCallback()
    fitted(Mlp(), psgd)
    assert list(tmp_path.iterdir()) == []
    assert psgd.picture.shape[2] == 3
    assert psgd.picture.std() > 5


class Regression(L.LightningModule):
    """A linear layer for noisy targets, with a learning rate that ends at 0."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 64)

    def training_step(self, batch, batch_idx):
        return 32 * (self.layer(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 160)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.sample
def test_weights_gather_on_the_grid():
    """What it is for, and what its picture shows."""
    inputs, noise = torch.randn(640, 64), torch.randn(640, 64)
    data = DataLoader(TensorDataset(inputs, inputs @ torch.randn(64, 64) * 0.1 + noise), batch_size=32)
    near = []
    psgd = PSGDCallback(mean_factor=1.0)
    for callbacks in ([], [psgd]):
        module = Regression()
        trainer(*callbacks, max_epochs=8).fit(module, data)
        near.append(float((grid_positions(module.layer.weight, 4).abs() < 0.1).float().mean()))
    assert near[0] == pytest.approx(0.2, abs=0.02)  # evenly spread
    assert near[1] > 0.4
    start, end = psgd._start["layer.weight"], position_histogram(grid_positions(module.layer.weight, 4))
    assert float(end[14:17].sum()) > 2 * float(start[14:17].sum())


# --- state and life cycle ---


def test_the_state_holds_primitives_and_tensors():
    psgd = PSGDCallback(3)
    fitting = fitted(Mlp(), psgd)
    state = psgd.state_dict()
    assert state["lambda"] == psgd.lambda_s
    assert state["bits"] == {name: bits for name, (_, bits) in psgd.grids.items()}
    assert {name: tuple(value.shape) for name, value in state["start"].items()} == {
        f"{layer}.weight": (31,) for layer in ("head", "first", "second", "third")
    }
    assert state["arguments"]["bits"] == 3
    assert fitting.global_step == STEPS


def resumed(tmp_path, **arguments):
    module = Mlp()
    fitted(module, first := PSGDCallback()).save_checkpoint(tmp_path / "a.ckpt")
    second = PSGDCallback(**arguments)
    fitting = trainer(second, max_epochs=2)
    fitting.fit(Mlp(), loader(), loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    return first, second


@pytest.mark.sample
def test_a_resume_keeps_the_scale(tmp_path):
    first, second = resumed(tmp_path)
    assert second.lambda_s == first.lambda_s
    assert second.effects["the scaled step"] == STEPS


@pytest.mark.sample
def test_a_resume_with_other_arguments_begins_with_them(tmp_path):
    with pytest.warns(UserWarning, match="resumes with other arguments than in the checkpoint: bits was 4 and is 8"):
        first, second = resumed(tmp_path, bits=8)
    assert second.lambda_s > 3 * first.lambda_s
    assert {bits for _, bits in second.grids.values()} == {8}


@pytest.mark.sample
def test_a_resume_keeps_left_out_biases_out(tmp_path):
    """They are no zeros any more, and would be taken in."""
    module, psgd, again = Mlp(), PSGDCallback(), PSGDCallback()
    module.second.bias.data.zero_()
    with pytest.warns(UserWarning, match="lie on the grid"):
        fitting = fitted(module, psgd)
    fitting.save_checkpoint(tmp_path / "a.ckpt")
    trainer(again, max_epochs=2).fit(Mlp(), loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert "second.bias" not in again.grids
    assert len(again.grids) == 7


@pytest.mark.sample
def test_a_second_fit_of_the_same_trainer_goes_on_with_the_scale():
    module, psgd = Mlp(), PSGDCallback()
    fitting = fitted(module, psgd)
    scale, picture = psgd.lambda_s, psgd.picture
    fitting.fit_loop.max_epochs = 2
    fitting.fit(module, loader(), loader())
    assert psgd.lambda_s == scale
    assert not np.array_equal(psgd.picture, picture)
    fitted(module, psgd)  # another Trainer: another training
    assert psgd.lambda_s != scale


def test_after_testing_a_file_the_grids_are_those_of_its_weights(tmp_path):
    module, psgd = Mlp(), PSGDCallback(3)
    fitting = fitted(module, psgd)
    fitting.save_checkpoint(tmp_path / "a.ckpt")
    steps = {name: step.clone() for name, (step, _) in psgd.grids.items()}
    module.first.weight.data *= 3
    fitting.validate(module, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert all(torch.equal(step, steps[name]) for name, (step, _) in psgd.grids.items())

    fresh, other = PSGDCallback(3), Mlp()
    trainer(fresh).validate(other, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert {name: bits for name, (_, bits) in fresh.grids.items()} == {n: b for n, (_, b) in psgd.grids.items()}
    assert all(torch.equal(step, steps[name]) for name, (step, _) in fresh.grids.items())


@pytest.mark.filterwarnings("ignore:.*all of the selected layers are first or last")
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_no_hook_stays(fails, bits):
    module = made(NormClassifier)
    module.fails_at = 3 if fails else None
    fitting = trainer(PSGDCallback(bits))
    if fails:
        with pytest.raises(RuntimeError, match="the step is broken"):
            fitting.fit(module, loader(), loader())
    else:
        fitting.fit(module, loader(), loader())
    [optimizer] = fitting.optimizers
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 0
    assert not [part for part in module.modules() if part._forward_pre_hooks]
    assert "on_before_optimizer_step" not in vars(module)


def test_a_skipped_batch_skips_everything():
    class Skipping(Mlp):
        def training_step(self, batch, batch_idx):
            return None if batch_idx < 3 else super().training_step(batch, batch_idx)

    psgd = PSGDCallback()
    fitted(Skipping(), psgd)
    assert psgd.effects["the scaled step"] == STEPS - 3


def test_no_training_step_is_told_of():
    with pytest.warns(UserWarning, match="no training step was run, so no gradient was scaled"):
        fitted(Mlp(), PSGDCallback(), max_epochs=0)


@pytest.mark.sample
def test_with_distillation_in_both_orders():
    modules = []
    for order in (1, -1):
        callbacks = [PSGDCallback(), DistillationCallback(teacher_for(Classifier))][::order]
        modules.append(made(Classifier))
        trainer(*callbacks).fit(modules[-1], loader(), loader())
    assert difference(*modules) == 0
    plain = made(Classifier)
    trainer(DistillationCallback(teacher_for(Classifier))).fit(plain, loader(), loader())
    assert difference(modules[0], plain) > 1e-3


class Attends(Mlp):
    """With a projection that is no linear layer's."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)
        for bias in (self.attention.in_proj_bias, self.attention.out_proj.bias):  # zeros would rest
            nn.init.normal_(bias)

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.head(self.attention(x, x, x)[0])


@pytest.mark.sample
def test_what_is_left_is_told(caplog):
    psgd = PSGDCallback(exclude=["second", "third"])
    with caplog.at_level(logging.INFO, logger="lightning_compress"):
        fitted(Attends(), psgd)
    left = "'second.weight', 'third.weight', 'attention.in_proj_weight'"
    assert f"psgd leaves as they are: {left}; layers= takes them in" in caplog.text
    assert f"psgd: left as they are: {left}." in psgd.remarks()
    assert "attention.in_proj_weight" not in psgd.grids
    fitted(Attends(), psgd := PSGDCallback(layers=["attention"]))
    assert "attention.in_proj_weight" in psgd.grids


def test_remarks():
    psgd = PSGDCallback(2, edge_bits=None)
    fitted(Mlp(), psgd)
    factors, weights = psgd.remarks()
    assert re.fullmatch(
        rf"psgd: lambda = {psgd.lambda_s:.6g}; mean factor 3 at the first step, [\d.]+ at the end\.", factors
    )
    found = re.fullmatch(
        r"psgd: rounded to 2 bits, (\d+) of 159 weights \(([\d.]+)%\) are 0, and the relative error is 0\.\d{4}\.",
        weights,
    )
    assert int(found[1]) / 159 == pytest.approx(float(found[2]) / 100, abs=1e-4)


def test_a_tied_weight_is_scaled_once():
    class Tied(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def training_step(self, batch, batch_idx):
            return self.b(F.relu(self.a(batch[0]))).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    psgd, module = PSGDCallback(), Tied()
    data = DataLoader(TensorDataset(torch.randn(BATCH, 8)), batch_size=BATCH)
    trainer(psgd).fit(module, data)
    assert sorted(psgd.grids) == ["a.bias", "a.weight", "b.bias"]


class Foreign:
    """An optimizer that is none of torch's; Lightning takes it."""

    def __init__(self, parameters, lr=0.05):
        self.param_groups, self.defaults, self.state = [{"params": list(parameters), "lr": lr}], {}, {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def zero_grad(self, set_to_none=True):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    def step(self, closure=None):
        loss = None if closure is None else closure()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    parameter -= self.param_groups[0]["lr"] * parameter.grad
        return loss


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (PSGDCallback(), "'psgd' follows the steps of optimizers, and 'Foreign' is no torch.optim.Optimizer"),
        (DCILCallback(0.5, layers=["type:Linear"], dense_path="own_norm"), "or choose dense_path='shared'"),
        (DCILCallback(0.5, layers=["type:Linear"], dense_path="shared"), None),
        (PruningCallback(0.5), None),
        (PruningCallback(0.5, schedule="iterative", end=0.5, rewind="weights"), "rewinds optimizers"),
    ],
)
def test_optimizers_of_other_makers(callback, message):
    module = Mlp(Foreign)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        fitted(module, callback)


@pytest.mark.sample
def test_its_own_validation_is_no_training_where_an_epoch_takes_no_step():
    class Rests(MixinClassifier):
        """Adds up gradients for an epoch before it steps."""

        rests = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(self.compressed_loss(self.task_loss(batch)))
            if not (self.rests and self.current_epoch == 0):
                optimizer.step()
                optimizer.zero_grad()

    callback, module = PSGDCallback(), made(Rests)
    trainer(callback).fit(module, loader(), loader())
    module.rests = True
    trainer(callback, max_epochs=2).fit(module, loader(), loader())
