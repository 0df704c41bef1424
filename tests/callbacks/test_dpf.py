"""DPFCallback: what it refuses, dead filters, other ways to train, what it logs, and batch-norm statistics."""

from __future__ import annotations

import copy
import itertools
import warnings

import lightning.pytorch as L
import pytest
import torch
from contract.features import ConvNormClassifier, feature_loader
from contract.modules import Classifier, MixinClassifier, NormClassifier, difference, loader, made, scaled, trainer
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric

from lightning_compress import CompressionReport, DPFCallback, PruningCallback

AT_ONCE = {"schedule": "one_shot", "end": 0.0, "update_interval": 1}
DEAD = "ignore:.*masked completely"


# Arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be a number in \[0, 1\), got 1.0"),
        ({"sparsity": 90}, r"sparsity must be a number in \[0, 1\), got 90; did you mean 0.9\?"),
        ({"start": -0.1}, r"start must be a number in \[0, 1\], got -0.1"),
        ({"start": 0.8}, r"start must be at most end, got start=0.8 and end=0.75"),
        ({"end": 1.5}, r"end must be a number in \[0, 1\], got 1.5"),
        ({"update_interval": 0}, r"update_interval must be a whole number of at least 1, got 0"),
        ({"update_interval": 1.5}, r"update_interval must be a whole number of at least 1, got 1.5"),
        ({"schedule": "qubic"}, r"schedule must be one of .*got 'qubic'; did you mean 'cubic'\?"),
        ({"schedule": "iterative"}, r"schedule must be one of .*got 'iterative'"),
        ({"freeze_at": 1.5}, r"freeze_at must be a number in \[0, 1\], got 1.5"),
        ({"freeze_at": 0.5}, r"freeze_at must be at least end, .* got freeze_at=0.5 and end=0.75"),
        (
            {"schedule": "one_shot", "start": 0.9, "freeze_at": 0.8},
            r"freeze_at must be at least start, .* got freeze_at=0.8 and start=0.9",
        ),
        ({"dead_filters": "keeep"}, r"dead_filters must be one of .*got 'keeep'; did you mean 'keep'\?"),
        ({"dead_filters": "zero"}, r"dead_filters must be one of .*got 'zero'; did you mean 'zero_grad'\?"),
        ({"dead_filters": None}, r"dead_filters must be one of .*got None"),
        ({"guard_checkpoints": 1}, "guard_checkpoints must be True or False, got 1"),
        ({"reestimate_batchnorm": "no"}, "reestimate_batchnorm must be True or False, got 'no'"),
        ({"reestimated_validation": "yes"}, "reestimated_validation must be True or False, got 'yes'"),
        ({"name": "a/b"}, "name must be a non-empty string without '/', got 'a/b'"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        DPFCallback(**{"sparsity": 0.5, **settings})


# Dead filters


class Weak(NormClassifier):
    """Two of the four filters of its convolution are weak; the last layer is not."""

    def build(self):
        super().build()
        with torch.no_grad():
            self.model[0].weight[:2].mul_(1e-3)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


FILTERS = {"layers": ["model.0"], **AT_ONCE}  # a sparsity of 0.5 masks two filters of four


@pytest.mark.parametrize(
    ("dead_filters", "said"),
    [
        ("zero_grad", "no gradient reaches what is dead until an update brings a weight of it back"),
        ("keep", r"multiplies the gradient there by up to 1 / sqrt\(eps\), and dead_filters='zero_grad' would"),
    ],
)
def test_dead_filters_are_counted_and_said_once(dead_filters, said):
    class Still(Weak):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module, callback = made(Still), DPFCallback(0.5, dead_filters=dead_filters, **FILTERS)
    report = CompressionReport(latency=False, path="unused")
    fitting = trainer(callback, report, fast_dev_run=3)
    with pytest.warns(UserWarning, match=f"2 filters are masked completely, in 'model.0.weight'; .*{said}") as caught:
        fitting.fit(module, loader(Weak), loader(Weak))
    assert len([warning for warning in caught if "masked completely" in str(warning.message)]) == 1
    assert callback.dead_filters_by_weight == {"model.0.weight": 2}
    assert float(fitting.callback_metrics["compress/dpf/dead_filters"]) == 2
    assert "dpf: 2 filters are masked completely, in 'model.0.weight'." in report.result.notes


@pytest.mark.filterwarnings(DEAD)
def test_what_dead_filters_learn():
    """Nothing by default; by the literal rule batch norm of variance 0 gives them a very large gradient."""
    moved = {}
    for dead_filters in ("zero_grad", "keep"):
        module, callback = made(Weak), DPFCallback(0.5, dead_filters=dead_filters, freeze_at=0.0, **FILTERS)
        trainer(callback, limit_train_batches=1).fit(module, loader(Weak))
        moved[dead_filters] = (callback._dense["model.0.weight"] - made(Weak).model[0].weight.detach()).flatten(1)
    assert not moved["zero_grad"][:2].any()
    assert torch.equal(moved["zero_grad"][2:], moved["keep"][2:])
    assert moved["keep"][:2].norm() > 30 * moved["keep"][2:].norm()


class Perceptron(Classifier):
    """Linear layers, the first with weak rows."""

    def build(self):
        width = 6 if self.norm else 5
        norm = [nn.BatchNorm1d(5)] if self.norm is not None else []
        self.model = nn.Sequential(nn.Linear(8, 5), *norm, nn.ReLU(), nn.Linear(5, 3))
        self.side = nn.BatchNorm1d(width)
        with torch.no_grad():
            self.model[0].weight[:2].mul_(1e-3)


class WithNorm(Perceptron):
    norm = True


class WithoutNorm(Perceptron):
    norm = None

    def build(self):
        super().build()
        self.side = nn.BatchNorm1d(6)  # of another width


@pytest.mark.filterwarnings(DEAD)
@pytest.mark.parametrize(("kind", "dead"), [(WithNorm, 2), (WithoutNorm, 0)])
def test_rows_of_linear_layers_count_where_batch_norm_has_their_width(kind, dead):
    module, callback = made(kind), DPFCallback(16 / 40, layers=["model.0"], freeze_at=0.0, **AT_ONCE)
    trainer(callback, limit_train_batches=1).fit(module, loader(kind))
    assert not module.model[0].weight[:2].any()
    assert sum(callback.dead_filters_by_weight.values()) == dead
    moved = callback._dense["model.0.weight"] - made(kind).model[0].weight.detach()
    assert moved[:2].any() == (dead == 0)


class Transposed(NormClassifier):
    """A transposed convolution in groups: output channels are its dimension 1, those of each group apart."""

    def build(self):
        self.model = nn.Sequential(
            nn.Unflatten(1, (8, 1, 1)),
            nn.ConvTranspose2d(8, 4, 2, groups=2, bias=False),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.Linear(16, 3),
        )
        with torch.no_grad():
            self.model[1].weight[:4, 1].mul_(1e-3)  # channel 1, of the first group


@pytest.mark.filterwarnings(DEAD)
def test_filters_of_a_transposed_convolution_in_groups():
    module, callback = made(Transposed), DPFCallback(0.25, layers=["model.1"], freeze_at=0.0, **AT_ONCE)
    trainer(callback, limit_train_batches=1).fit(module, loader(Transposed))
    moved = callback._dense["model.1.weight"] != made(Transposed).model[1].weight.detach()
    assert [bool(moved[group * 4 : group * 4 + 4, channel].any()) for group in (0, 1) for channel in (0, 1)] == [
        True,
        False,
        True,
        True,
    ]


@pytest.mark.filterwarnings(DEAD)
def test_a_dead_filter_can_come_back():
    """Weight decay shrinks the others below it, and an update brings it back."""

    class Decays(Weak):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 3:
                with torch.no_grad():
                    self.model[0].weight[2:].mul_(1e-6)

    counts = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            counts.append((trainer.global_step, callback.masks["model.0.weight"].flatten(1).any(1).tolist()))

    callback = DPFCallback(0.5, layers=["model.0"], schedule="one_shot", end=0.0, update_interval=2)
    trainer(callback, Look()).fit(made(Decays), loader(Decays))
    assert counts[4] == (5, [False, False, True, True])
    assert counts[5] == (6, [True, True, False, False])


# Other ways to train


def test_manual_optimisation_with_the_mixin():
    """The same weights as the automatic loop gives without a scheduler."""

    class Plain(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)

    class Manual(MixinClassifier):
        configure_optimizers = Plain.configure_optimizers

    callbacks = [DPFCallback(0.6, update_interval=2) for _ in range(2)]
    modules = [made(Plain), made(Manual)]
    runs = [trainer(callback) for callback in callbacks]
    for run, module in zip(runs, modules, strict=True):
        run.fit(module, loader(), loader())
    assert difference(*modules) == 0
    assert difference(*(callback._dense for callback in callbacks)) == 0
    for quantity in ("sparsity", "churn", "dead_filters", "norm/model.3.weight"):
        first, second = (float(run.callback_metrics[f"compress/dpf/{quantity}"]) for run in runs)
        assert first == second, quantity


def test_manual_optimisation_without_the_mixin_is_refused():
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ValueError, match=r"Manual optimises manually: let it inherit .*CompressionMixin"):
        trainer(DPFCallback(0.5)).fit(made(Manual), loader())


class Checkpointed(Classifier):
    """Runs its layers again in the backward pass, with dropout."""

    reentrant = None

    def build(self):
        super().build()
        self.model.insert(2, nn.Dropout(0.3))

    def task_loss(self, batch):
        x, y = batch
        if self.reentrant is None:
            return F.cross_entropy(self.model(x), y)
        hidden = checkpoint(self.model[:3], x.requires_grad_(), use_reentrant=self.reentrant)
        return F.cross_entropy(checkpoint(self.model[3:], hidden, use_reentrant=self.reentrant), y)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_exact(reentrant):
    class Again(Checkpointed):
        pass

    Again.reentrant = reentrant
    modules, callbacks = [made(Checkpointed), made(Again)], [DPFCallback(0.6, update_interval=2) for _ in range(2)]
    for module, callback in zip(modules, callbacks, strict=True):
        torch.manual_seed(3)
        trainer(callback).fit(module, loader())
    assert difference(*modules) == 0
    assert difference(*(callback._dense for callback in callbacks)) == 0
    assert torch.equal(callbacks[0].masks["model.4.weight"], callbacks[1].masks["model.4.weight"])


def test_beside_pruning_on_other_layers():
    modules = []
    for reverse in (False, True):
        both = [DPFCallback(0.5, layers=["model.0"], update_interval=1), PruningCallback(0.75, layers=["model.3"])]
        module, fitting = made(Classifier), trainer(*(both[::-1] if reverse else both))
        fitting.fit(module, loader(), loader())
        modules.append(module)
        assert (module.model[0].weight == 0).sum() == 18
        assert (module.model[3].weight == 0).sum() == 72
        assert float(fitting.callback_metrics["compress/dpf/sparsity"]) == 0.5
        assert not (both[0]._dense["model.0.weight"] == 0).any()
    assert difference(*modules) == 0


def test_two_owners_of_one_weight():
    with pytest.raises(ValueError, match=r"'pruning' and 'dpf' both present the weight 'model.0.weight'"):
        trainer(PruningCallback(0.5), DPFCallback(0.5)).fit(made(Classifier), loader())


# What is logged


@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 1e-3}, {"accumulate_grad_batches": 2}])
def test_logs(settings):
    """Sparsity, churn of the last update, and norms of the last gradient, before it is clipped."""
    callback, seen = DPFCallback(0.6, update_interval=1), {"masks": {}}

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen["before"], seen["masks"] = seen["masks"], callback.masks
            seen["gradients"] = {name: pl_module.get_parameter(name).grad.clone() for name in callback.masks}

    fitting, module = trainer(callback, Look(), **settings), made(Classifier)
    fitting.fit(module, loader())
    metrics = {key: float(value) for key, value in fitting.callback_metrics.items()}
    masks, gradients = seen["masks"], seen["gradients"]
    kept = torch.cat([gradients[name][mask] for name, mask in masks.items()]).norm()
    pruned = torch.cat([gradients[name][~mask] for name, mask in masks.items()]).norm()
    assert metrics["compress/dpf/gradient_norm_kept"] == pytest.approx(float(kept), rel=1e-5)
    assert metrics["compress/dpf/gradient_norm_pruned"] == pytest.approx(float(pruned), rel=1e-5)
    assert 0.01 < float(pruned) != float(kept)
    changed = sum(int((mask ^ callback.masks[name]).sum()) for name, mask in seen["before"].items())
    assert metrics["compress/dpf/churn"] == pytest.approx(changed / 132)
    assert metrics["compress/dpf/dead_filters"] == 0
    assert metrics["compress/dpf/sparsity"] == pytest.approx(79 / 132)
    for name, mask in callback.masks.items():
        weight = module.get_parameter(name)
        assert metrics[f"compress/dpf/sparsity/{name}"] == pytest.approx(float((~mask).float().mean()))
        assert metrics[f"compress/dpf/norm/{name}"] == pytest.approx(float(weight.norm()))


def test_pruned_weights_come_back():
    """What static pruning never does: between two updates some masked weights grow beyond kept ones."""
    callback, seen = DPFCallback(0.6, **AT_ONCE), []

    class Look(L.Callback):
        def on_train_batch_end(self, *args):
            seen.append(callback.masks)

    module = made(Classifier)
    trainer(callback, Look()).fit(module, loader())
    back = [
        int((after[name] & ~mask).sum()) for before, after in itertools.pairwise(seen) for name, mask in before.items()
    ]
    assert sum(back) > 0
    assert not (callback._dense["model.3.weight"] == 0).any()
    assert sum(int((layer.weight == 0).sum()) for layer in (module.model[0], module.model[3])) == 79


# Batch-norm statistics


class Dropped(NormClassifier):
    """With dropout, so that random numbers that somebody else draws are seen; and a metric."""

    def build(self):
        super().build()
        self.model.insert(3, nn.Dropout(0.3))
        self.mean = MeanMetric()

    def validation_step(self, batch, batch_idx):
        self.mean.update(self.task_loss(batch), weight=len(batch[0]))
        self.log("val_loss", self.mean)


@pytest.mark.sample
def test_a_second_validation_has_other_statistics():
    seen = []

    class ByHand(L.Callback):
        """Validates a copy with masked weights whose statistics are the mean over all batches."""

        def on_train_epoch_end(self, trainer, pl_module):
            other = copy.deepcopy(pl_module.model)
            with torch.no_grad(), torch.random.fork_rng():  # a loader draws a seed
                for name, mask in callback.masks.items():
                    other.get_parameter(name.removeprefix("model.")).mul_(mask)
                maps = [other[0](x) for x, _ in loader(Dropped)]
                other[1].running_mean.copy_(torch.stack([x.mean((0, 2, 3)) for x in maps]).mean(0))
                other[1].running_var.copy_(torch.stack([x.var((0, 2, 3)) for x in maps]).mean(0))
                other.eval()
                seen.append(float(F.cross_entropy(*self.outputs(other))))

        @staticmethod
        def outputs(network):
            x, y = (torch.cat(part) for part in zip(*loader(Dropped), strict=True))
            return network(x), y

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    logged, runs = [], []
    for reestimated in (True, False):
        callback = DPFCallback(0.6, update_interval=2, reestimated_validation=reestimated)
        module = made(Dropped)
        fitting = trainer(callback, *([ByHand(), Look()] if reestimated else []), max_epochs=2)
        torch.manual_seed(3)
        fitting.fit(module, loader(Dropped), loader(Dropped))
        runs.append((module, callback._dense, torch.get_rng_state(), fitting))
    (module, dense, state, fitting), (plain, plain_dense, plain_state, without) = runs
    assert difference(module, plain) == 0
    assert difference(dense, plain_dense) == 0
    assert torch.equal(state, plain_state)
    metrics = fitting.callback_metrics
    assert float(metrics["compress/dpf/reestimated/val_loss"]) == pytest.approx(seen[-1], abs=1e-5)
    assert float(metrics["val_loss"]) == float(without.callback_metrics["val_loss"])
    assert abs(float(metrics["val_loss"]) - seen[-1]) > 1e-3
    assert "compress/dpf/reestimated/val_loss" not in without.callback_metrics
    assert len(seen) == 2


def test_a_second_validation_only_where_there_is_a_first():
    values = []

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            values.append(float(trainer.callback_metrics.get("compress/dpf/reestimated/val_loss", float("nan"))))

    callback = DPFCallback(0.6, update_interval=2, reestimated_validation=True)
    fitting = trainer(callback, Look(), max_epochs=4, check_val_every_n_epoch=2, num_sanity_val_steps=1)
    fitting.fit(made(NormClassifier), loader(NormClassifier), loader(NormClassifier))
    assert [value == value for value in values] == [False, True, True, True]  # callbacks see the value of before
    assert values[1] == values[2] != values[3]


@pytest.mark.parametrize(
    ("kind", "validates", "message"),
    [
        (NormClassifier, False, "reestimated_validation has no effect: there is nothing to validate on"),
        (Classifier, True, "reestimated_validation has no effect: no layer keeps batch-norm statistics"),
    ],
)
def test_a_second_validation_without_effect_is_refused(kind, validates, message):
    fitting = trainer(DPFCallback(0.5, reestimated_validation=True))
    with pytest.raises(ValueError, match=message):
        fitting.fit(made(kind), loader(kind), loader(kind) if validates else None)
    with pytest.raises(ValueError, match="nothing to validate on"):
        trainer(DPFCallback(0.5, reestimated_validation=True), limit_val_batches=0).fit(
            made(NormClassifier), loader(NormClassifier), loader(NormClassifier)
        )


def test_batch_norm_is_estimated_again_at_the_end():
    modules = []
    for reestimate in (False, True):
        module = made(NormClassifier)
        callback = DPFCallback(0.6, update_interval=2, reestimate_batchnorm=reestimate)
        trainer(callback).fit(module, loader(NormClassifier))
        modules.append(module)
    plain, module = modules
    for (name, one), (_, other) in zip(plain.named_parameters(), module.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    maps = [module.model[0](x) for x, _ in loader(NormClassifier)]
    mean = torch.stack([x.mean((0, 2, 3)) for x in maps]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in maps]).mean(0)
    assert torch.allclose(module.model[1].running_mean, mean, atol=1e-6)
    assert torch.allclose(module.model[1].running_var, variance, atol=1e-6)
    assert not torch.allclose(plain.model[1].running_mean, mean, atol=1e-4)
    with pytest.raises(ValueError, match="reestimate_batchnorm has no effect: no layer keeps batch-norm statistics"):
        trainer(DPFCallback(0.6, reestimate_batchnorm=True)).fit(made(Classifier), loader())


# What the step does


@pytest.mark.sample
def test_validation_sees_the_pruned_weights_and_training_goes_on_with_the_dense_ones():
    values = []

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            weights = {name: pl_module.get_parameter(name) * mask for name, mask in callback.masks.items()}
            network = {name.removeprefix("model."): value for name, value in weights.items()}
            x, y = (torch.cat(part) for part in zip(*feature_loader(), strict=True))
            pl_module.eval()
            with torch.no_grad():
                values.append(float(F.cross_entropy(functional_call(pl_module.model, network, (x,)), y)))
            pl_module.train()
            assert all(pl_module.get_parameter(name).all() for name in weights)

    callback = DPFCallback(0.6, update_interval=3)
    fitting = trainer(callback, Look(), max_epochs=2)
    fitting.fit(made(ConvNormClassifier), feature_loader(), feature_loader())
    assert float(fitting.callback_metrics["val_loss"]) == pytest.approx(values[-1], abs=1e-6)


@pytest.mark.sample
def test_norms_of_gradients_that_a_fused_optimizer_is_going_to_unscale():
    def norms(fused):
        plugin, module = scaled(2.0**10), made(Classifier)
        module.optimise = lambda own: torch.optim.SGD(own.parameters(), lr=0.1, fused=fused)
        fitting = trainer(DPFCallback(0.6, update_interval=1), plugins=[plugin])
        fitting.fit(module, loader())
        return {key: float(value) for key, value in fitting.callback_metrics.items() if "gradient_norm" in key}

    assert norms(True) == pytest.approx(norms(False), rel=1e-2)


def test_no_warning_without_a_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=r"(lightning|torch)\.")
        trainer(DPFCallback(0.4, update_interval=1)).fit(made(Classifier), loader(), loader())


def test_double_precision():
    module, callback = made(NormClassifier), DPFCallback(0.5, update_interval=1)
    fitting = trainer(callback, precision="64-true")
    fitting.fit(module, loader(NormClassifier))
    assert module.model[0].weight.dtype == torch.float64
    assert fitting.callback_metrics["compress/dpf/gradient_norm_kept"] > 0


@pytest.mark.filterwarnings(DEAD)
def test_a_dead_filter_of_a_transposed_convolution_in_groups_counts_once():
    callback = DPFCallback(0.25, layers=["model.1"], freeze_at=0.0, **AT_ONCE)
    trainer(callback, limit_train_batches=1).fit(made(Transposed), loader(Transposed))
    assert callback.dead_filters_by_weight == {"model.1.weight": 1}


def test_gradients_are_measured_in_the_step_before_an_update_with_manual_optimisation_too():
    seen = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            for name in ("gradient_norm_kept", "churn"):
                value = trainer.callback_metrics.get(f"compress/dpf/{name}")
                if value is not None and value.item() not in seen.setdefault(name, {}).values():
                    seen[name][batch_idx + 1] = value.item()

    callback = DPFCallback(0.5, update_interval=2, schedule="linear", end=1.0)
    trainer(callback, Look()).fit(made(MixinClassifier), loader(MixinClassifier))
    assert list(seen["gradient_norm_kept"]) == [4, 6, 8]  # in the first there was no mask yet
    assert list(seen["churn"]) == [2, 4, 6, 8]


def test_a_step_that_draws_its_batches_itself():
    class Draws(Classifier):
        def training_step(self, dataloader_iter):
            batch, *_ = next(dataloader_iter)
            return self.task_loss(batch)

    module = made(Draws)
    trainer(DPFCallback(0.5, update_interval=1)).fit(module, loader(Draws))
    assert int((module.model[0].weight == 0).sum() + (module.model[3].weight == 0).sum()) == 66


@pytest.mark.filterwarnings(DEAD)
def test_frozen_masks_thaw_where_they_are_to_change_again(tmp_path):
    """In a training that is made longer, and with another freeze_at."""
    first = trainer(DPFCallback(0.5, update_interval=1, end=0.5, freeze_at=0.5))
    first.fit(made(Classifier), loader())
    first.save_checkpoint(tmp_path / "end.ckpt")
    frozen = first.callbacks[0].masks
    for freeze_at, thaws in ((0.5, False), (None, True)):
        callback = DPFCallback(0.5, update_interval=1, end=0.5, freeze_at=freeze_at)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer(callback, max_epochs=2).fit(made(Classifier), loader(), ckpt_path=tmp_path / "end.ckpt")
        assert any(not torch.equal(mask, callback.masks[name]) for name, mask in frozen.items()) == thaws


@pytest.mark.sample
def test_what_a_step_does_to_the_parameters_stays():
    """As where a momentum network follows: it is a matter of the dense weights, whatever their layers show."""

    def shrink(module):
        for parameter in module.parameters():
            parameter.data = 0.97 * parameter.data

    class Within(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            shrink(self)
            return loss

    class After(Classifier):
        def on_after_backward(self):
            shrink(self)

    found = []
    for kind in (Within, After):
        module, callback = made(kind), DPFCallback(0.5, update_interval=1, end=0.4)
        trainer(callback, max_epochs=2).fit(module, loader())
        found.append([*module.state_dict().values(), *callback.masks.values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_weight_whose_data_is_replaced_within_the_step_is_an_error():
    class MaxNorm(nn.Linear):
        def forward(self, x):
            self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.3)
            return super().forward(x)

    class Limited(Classifier):
        def build(self):
            super().build()
            self.model[3] = MaxNorm(self.model[3].in_features, 3)

    for start in (0.0, 0.5):
        with pytest.raises(RuntimeError, match=r"'model.3.weight' was replaced within a step"):
            trainer(DPFCallback(0.5, start=start, **{**AT_ONCE, "end": start})).fit(made(Limited), loader())
