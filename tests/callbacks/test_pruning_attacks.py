"""PruningCallback where somebody else does something unusual: what cannot be exact is an error or a warning."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from contract.modules import Classifier, MixinClassifier, difference, loader, made, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_compress import PruningCallback
from lightning_compress.mechanisms.checkpoints import dense_of

AT_ONCE = {"schedule": "one_shot", "end": 0.0}


def zeros(tensors):
    return sum(int((value == 0).sum()) for value in tensors if value.ndim > 1)


# Freezing within a step


class Adversarial(MixinClassifier):
    """The second layer judges the first, and is frozen meanwhile, without toggle_optimizer."""

    def configure_optimizers(self):
        return [torch.optim.SGD(self.model[index].parameters(), lr=0.1) for index in (0, 3)]

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.model[3].requires_grad_(False)
        self.manual_backward(self.compressed_loss(self.task_loss(batch)))
        first.step()
        first.zero_grad()
        self.model[3].requires_grad_(True)
        self.manual_backward(self.compressed_loss(self.task_loss(batch)))
        second.step()
        second.zero_grad()


class FrozenForAMoment(Classifier):
    def task_loss(self, batch):
        self.model[3].requires_grad_(False)
        loss = super().task_loss(batch)
        self.model[3].requires_grad_(True)
        return loss


@pytest.mark.parametrize("settings", [AT_ONCE, {}])
@pytest.mark.parametrize("kind", [Adversarial, FrozenForAMoment])
def test_freezing_within_a_step_is_an_error(kind, settings):
    with pytest.raises(
        RuntimeError, match=r"'model.3.weight' was frozen or freed within the step.*exclude=\['model.3'\]"
    ):
        trainer(PruningCallback(0.5, **settings)).fit(made(kind), loader())
    pruning = PruningCallback(0.5, exclude=["model.3"], **settings)
    trainer(pruning).fit(made(kind), loader())
    assert pruning.reached == 0.5


# Other ways to a weight


class EvaluatesOthers(Classifier):
    """Validates with parameters of its own choice."""

    def validation_step(self, batch, batch_idx):
        others = {name: torch.zeros_like(value) for name, value in self.model.named_parameters()}
        self.log("val_loss", F.cross_entropy(functional_call(self.model, others, (batch[0],)), batch[1]))


def test_functional_calls_in_validation_are_an_error():
    with pytest.raises(RuntimeError, match=r"gets other parameters, as torch.func.functional_call gives"):
        trainer(PruningCallback(0.5), num_sanity_val_steps=1).fit(
            made(EvaluatesOthers), loader(), loader(EvaluatesOthers)
        )


class HiddenTie(Classifier):
    """Uses a weight through its layer, and once more through a reference."""

    def build(self):
        super().build()
        self.held = [self.model[3].weight]

    def task_loss(self, batch):
        return super().task_loss(batch) + self.held[0].square().sum()


class Penalised(Classifier):
    def task_loss(self, batch):
        return super().task_loss(batch) + 0.01 * sum(value.abs().sum() for value in self.parameters())


@pytest.mark.parametrize("settings", [AT_ONCE, {}])
@pytest.mark.parametrize(
    ("kind", "names"), [(HiddenTie, "'model.3.weight'"), (Penalised, "'model.0.weight', 'model.3.weight'")]
)
def test_a_part_of_a_gradient_that_comes_past_the_layer_is_said(kind, names, settings):
    with pytest.warns(UserWarning, match=f"{names} get a part of their gradient past the layer: a penalty over"):
        trainer(PruningCallback(0.5, **settings)).fit(made(kind), loader())


class PenalisedThroughLayers(Classifier):
    def task_loss(self, batch):
        return super().task_loss(batch) + 0.01 * (self.model[0].weight.abs().sum() + self.model[3].weight.abs().sum())


class Clamps(Classifier):
    """Writes to a weight through its layer, before its step uses it."""

    def task_loss(self, batch):
        with torch.no_grad():
            self.model[3].weight.clamp_(-0.1, 0.1)
        return super().task_loss(batch)


def test_penalties_and_writes_through_a_layer_are_what_they_were():
    trainer(PruningCallback(0.5, **AT_ONCE)).fit(made(PenalisedThroughLayers), loader())
    module = made(Clamps)
    trainer(PruningCallback(0.5, start=0.9, end=1.0)).fit(module, loader())  # dense until the last step
    assert zeros(module.parameters()) == 66
    with pytest.raises(RuntimeError, match=r"'model.3.weight' was written to within a step"):
        trainer(PruningCallback(0.5, **AT_ONCE)).fit(made(Clamps), loader())


class WritesLater(Classifier):
    """Writes behind autograd's back, in the first step of the second epoch."""

    def task_loss(self, batch):
        loss = super().task_loss(batch)
        if self.current_epoch == 1:
            self.model[3].weight.data.clamp_(-0.01, 0.01)
        return loss


def test_writes_past_autograd_are_looked_for_in_each_epoch():
    with pytest.raises(RuntimeError, match=r"'model.3.weight' was written to within a step"):
        trainer(PruningCallback(0.5, **AT_ONCE), max_epochs=2).fit(made(WritesLater), loader())


class HooksOfItsOwn(Classifier):
    """Clips each gradient, by hooks from before the fit."""

    def build(self):
        super().build()
        for value in self.model.parameters():
            value.register_hook(lambda gradient: gradient.clamp(-0.001, 0.001))


class Balances(Classifier):
    """Asks for the gradients of a weight in its step, as GradNorm does."""

    def task_loss(self, batch):
        loss = super().task_loss(batch)
        (gradient,) = torch.autograd.grad(loss, self.model[3].weight, retain_graph=True)
        return loss * (1 + gradient.norm().detach())


class Jacobians(Classifier):
    def task_loss(self, batch):
        out = self.model(batch[0]).mean(0)
        weights = [self.model[0]._parameters["weight"], self.model[3]._parameters["weight"]]
        eye = torch.eye(len(out), device=out.device)
        torch.autograd.grad(out, weights, eye, is_grads_batched=True, retain_graph=True)
        return super().task_loss(batch)


@pytest.mark.parametrize("settings", [AT_ONCE, {}])
@pytest.mark.parametrize("kind", [HooksOfItsOwn, Balances, Jacobians])
def test_no_false_alarm(kind, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=r"(lightning|torch)\.")
        module = made(kind)
        trainer(PruningCallback(0.5, **settings)).fit(module, loader())
    assert zeros(module.parameters()) == 66


class Fill(L.Callback):
    """Gives the gradients of the first steps a value."""

    def __init__(self, value):
        self.value = value

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step < 3:
            for value in pl_module.parameters():
                value.grad.fill_(self.value)


def test_steps_that_a_scaler_skips_prune_nothing():
    seen, pruning, module = [], PruningCallback(0.5, score="taylor", schedule="linear", end=0.9), made(Classifier)

    class Look(L.Callback):
        def on_train_batch_end(self, *args):
            seen.append(pruning.reached)

    trainer(Fill(torch.inf), pruning, Fill(0.0), Look()).fit(module, loader())
    assert seen[:3] == [0, 0, 0]
    assert all(value > 0 for value in seen[3:])
    assert zeros(module.parameters()) == 66


class ClipsParameters(MixinClassifier):
    """As Wasserstein networks do: the parameters themselves, after the optimizer's step."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        for value in self.parameters():
            value.data.clamp_(-0.05, 0.05)


def test_writes_to_the_parameters_themselves_are_kept():
    module, pruning = made(ClipsParameters), PruningCallback(0.5, **AT_ONCE)
    trainer(pruning).fit(module, loader())
    assert max(float(value.abs().max()) for value in module.parameters()) < 0.0501
    assert zeros(module.parameters()) == 66


# Files


class Renames(Classifier):
    """Its checkpoints have other names than its parameters."""

    def on_save_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name.replace("model.", "network."): value for name, value in state.items()}

    def on_load_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name.replace("network.", "model."): value for name, value in state.items()}


def test_renamed_entries_are_masked_too(tmp_path):
    def fit(folder, **settings):
        module, pruning = made(Renames), PruningCallback(0.8, regrow=True)
        saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        fitting = trainer(pruning, saver, max_epochs=2, enable_checkpointing=True)
        fitting.fit(module, loader(), **settings)
        fitting.save_checkpoint(folder / "end.ckpt")
        return module

    whole = fit(tmp_path / "whole")
    resumed = fit(tmp_path / "resumed", ckpt_path=tmp_path / "whole" / "epoch=0.ckpt", weights_only=True)
    assert difference(resumed, whole) == 0
    file = torch.load(tmp_path / "whole" / "epoch=1.ckpt", weights_only=True)
    assert "network.0.weight" in file["state_dict"]
    assert zeros(file["state_dict"].values()) == 106
    assert zeros(dense_of(file, "pruning").values()) == 0
    assert zeros(torch.load(tmp_path / "whole" / "end.ckpt", weights_only=True)["state_dict"].values()) == 106


class SavesItself(Classifier):
    """Writes its network to a file in validation, as a whole."""

    def on_validation_epoch_end(self):
        buffer = io.BytesIO()
        torch.save(self.model, buffer)
        buffer.seek(0)
        self.saved = torch.load(buffer, weights_only=False)
        self.pickled = pickle.loads(pickle.dumps(self.model))


def test_a_network_that_is_pickled_in_validation_can_be_trained():
    module = made(SavesItself)
    trainer(PruningCallback(0.5, **AT_ONCE)).fit(module, loader(), loader())
    for network in (module.saved, module.pickled):
        assert all(isinstance(layer.weight, nn.Parameter) for layer in (network[0], network[3]))
        optimizer, before = torch.optim.SGD(network.parameters(), lr=0.1), copy.deepcopy(network)
        network(next(iter(loader()))[0]).sum().backward()
        optimizer.step()
        assert not torch.equal(network[0].weight, before[0].weight)
        assert list(network.state_dict()) == list(module.model.state_dict())


def test_numbers_of_numpy_can_be_saved(tmp_path):
    fitting = trainer(PruningCallback(np.float64(0.5)))
    fitting.fit(made(Classifier), loader())
    fitting.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
    assert next(own["arguments"]["sparsity"] for own in state.values() if "arguments" in own) == 0.5


class Worsening(Classifier):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.tensor(float(self.current_epoch)))


def saver(folder, **settings):
    return ModelCheckpoint(folder, monitor="val_loss", filename="{epoch}", **settings)


@pytest.mark.sample
@pytest.mark.parametrize("earlier", [0.3, None])
def test_the_best_of_a_sparser_training_is_not_a_denser_one_from_before(earlier, tmp_path):
    first = [] if earlier is None else [PruningCallback(earlier)]
    fitting = trainer(*first, saver(tmp_path, save_last=True), enable_checkpointing=True)
    fitting.fit(made(Worsening), loader(), loader(Worsening))
    pruning, last = PruningCallback(0.8), saver(tmp_path, save_last=True)
    with pytest.warns(UserWarning, match="the best checkpoints so far have not the final sparsity"):
        trainer(pruning, last, max_epochs=6, enable_checkpointing=True).fit(
            made(Worsening), loader(), loader(Worsening), ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )
    best = torch.load(last.best_model_path, weights_only=True)
    assert zeros(best["state_dict"].values()) == 106
    assert float(last.best_model_score) >= 4


@pytest.mark.sample
@pytest.mark.parametrize("save_last", [True, "link"])
def test_the_last_file_is_the_last(save_last, tmp_path):
    steps = []

    class Look(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch:
                steps.append(torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"])

    last = saver(tmp_path, save_last=save_last)
    fitting = trainer(PruningCallback(0.8), Look(), last, max_epochs=5, enable_checkpointing=True)
    fitting.fit(made(Worsening), loader(), loader(Worsening))
    assert steps == [8, 16, 24, 32]


def test_a_checkpoint_of_an_exception_is_written_before_the_target(tmp_path):
    last = ModelCheckpoint(
        tmp_path, monitor="train_loss", every_n_train_steps=1, save_on_exception=True, filename="{step}"
    )

    class Fails(L.Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 3:
                raise OSError("the machine is gone")

    fitting = trainer(PruningCallback(0.8), Fails(), last, enable_checkpointing=True)
    with pytest.raises(OSError, match="gone"), pytest.warns(UserWarning, match="no checkpoint is kept before"):
        fitting.fit(made(Logs), loader())
    assert [path.name for path in tmp_path.iterdir()] == ["step=3.ckpt"]


class Logs(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


def test_where_all_is_pruned_at_once_all_is_kept(tmp_path):
    last = saver(tmp_path)
    trainer(PruningCallback(0.8, **AT_ONCE), last, enable_checkpointing=True).fit(
        made(Worsening), loader(), loader(Worsening)
    )
    assert last.best_model_path.endswith("epoch=0.ckpt")


@pytest.mark.parametrize("save_last", [True, False])
def test_there_is_something_to_resume_from_before_the_target(save_last, tmp_path):
    class Fails(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise OSError("the machine is gone")

    last = saver(tmp_path, save_last=save_last)
    fitting = trainer(PruningCallback(0.8), Fails(), last, max_epochs=4, enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(OSError, match="gone"):
            fitting.fit(made(Worsening), loader(), loader(Worsening))
    said = any("no checkpoint is kept before the final sparsity" in str(warning.message) for warning in caught)
    assert (said, (tmp_path / "last.ckpt").exists(), last.best_model_path) == (not save_last, save_last, "")
    if save_last:
        assert 0 < zeros(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"].values()) < 106


def test_the_newest_checkpoint_is_not_the_best(tmp_path):
    newest = ModelCheckpoint(tmp_path, monitor="step", mode="max", filename="{step}")
    trainer(PruningCallback(0.8), newest, max_epochs=2, enable_checkpointing=True, limit_train_batches=2).fit(
        made(Worsening), loader(), loader(Worsening)
    )
    assert newest.best_model_path.endswith("step=4.ckpt")


# A resume with other arguments


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"pattern": "2:4"}, r"pattern='2:4' cannot go on from a checkpoint made with 'unstructured'"),
        ({"pattern": "1:2"}, {"pattern": "2:4"}, r"pattern='2:4' cannot go on from a checkpoint made with '1:2'"),
        (
            {"schedule": "iterative", "rewind": "lr"},
            {"schedule": "iterative", "rewind": "weights"},
            r"rewind='weights' cannot go on from a checkpoint made with 'lr'",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not fit 'model.0.weight'")
@pytest.mark.filterwarnings("ignore:.*resumes with other arguments")
def test_what_cannot_go_on(before, after, message, tmp_path):
    layers = ["model.3"]
    first = trainer(PruningCallback(0.5, layers=layers, **before))
    first.fit(made(Classifier), loader())
    first.save_checkpoint(tmp_path / "first.ckpt")
    with pytest.raises(ValueError, match=message):
        trainer(PruningCallback(0.5, layers=layers, **after), max_epochs=2).fit(
            made(Classifier), loader(), ckpt_path=tmp_path / "first.ckpt", weights_only=True
        )


@pytest.mark.parametrize("exclude", [["model.1"], ["type:ReLU"], ["model.1", "model.0"]])
def test_an_exclusion_of_nothing_is_said(exclude):
    with pytest.warns(UserWarning, match=rf"exclude=\['{exclude[0]}'\] leaves out nothing that was selected"):
        trainer(PruningCallback(0.5, exclude=exclude)).fit(made(Classifier), loader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 90}, r"sparsity must be a number in \[0, 1\), got 90; did you mean 0.9\?"),
        ({"regrow": "no"}, "regrow must be True or False, got 'no'"),
        ({"guard_checkpoints": "no"}, "guard_checkpoints must be True or False, got 'no'"),
        ({"reestimate_batchnorm": 1}, "reestimate_batchnorm must be True or False, got 1"),
        ({"schedule": lambda progress: progress}, r"schedule must be a function of \(progress, start, end\), got"),
        ({"sparsity": "0.5", "pattern": "2:4"}, r"sparsity must be a number in \[0, 1\], got '0.5'"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        PruningCallback(**{"sparsity": 0.5, **settings})
