"""PruningCallback over several fits, interruptions and evaluations: what goes on, what begins anew, what is left."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import warnings
import weakref
from contextlib import nullcontext

import lightning.pytorch as L
import pytest
import torch
from contract.modules import Classifier, MixinClassifier, NormClassifier, difference, loader, made, rows_logged, trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lightning_compress import DPFCallback, PruningCallback
from lightning_compress.functional import magnitude_mask
from lightning_compress.mechanisms.checkpoints import dense_of

ONE_SHOT = {"schedule": "one_shot", "start": 0.25, "end": 0.25}


def zeros(module):
    return sum(int((value == 0).sum()) for value in module.parameters() if value.ndim > 1)


def same(first, second):
    return all(torch.equal(mask, second[name]) for name, mask in first.items())


class Interrupt(L.Callback):
    """Fails once, after so many steps."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            self.step = None
            raise OSError("interrupted")


# Several fits


@pytest.mark.parametrize("between", ["nothing", "test"])
def test_a_new_training_with_the_same_callback_begins_anew(between, tmp_path):
    fresh, expected = made(Classifier), PruningCallback(0.5, **ONE_SHOT)
    trainer(expected).fit(fresh, loader(), loader())
    pruning, first = PruningCallback(0.5, **ONE_SHOT), made(Classifier)
    with torch.no_grad():
        for value in first.parameters():
            value.mul_(torch.rand_like(value))
    fitting = trainer(pruning)
    fitting.fit(first, loader(), loader())
    if between == "test":
        fitting.save_checkpoint(tmp_path / "first.ckpt")
        fitting.test(first, loader(), ckpt_path=tmp_path / "first.ckpt", verbose=False)
        fitting.test(first, loader(), verbose=False)
    second = made(Classifier)
    trainer(pruning).fit(second, loader(), loader())
    assert difference(second, fresh) == 0
    assert same(pruning.masks, expected.masks)


def test_the_same_trainer_goes_on_from_the_file_that_it_tested(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    pruning, module = PruningCallback(0.8), made(Classifier)
    fitting = trainer(pruning, saver, max_epochs=2, enable_checkpointing=True)
    fitting.fit(module, loader(), loader())
    fitting.test(module, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    file = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    tested = zeros(module)
    assert 0 < tested < 106

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.masks = pruning.masks
            self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}

    look = Look()
    fitting.callbacks.append(look)
    fitting.fit_loop.max_epochs = 4
    fitting.fit(module, loader(), loader())
    assert sum(int((~mask).sum()) for mask in look.masks.values()) >= tested
    assert all(not mask[~file_mask].any() for mask, file_mask in zip(look.masks.values(), masks_of(file), strict=True))
    for name, value in dense_of(file, "pruning").items():
        assert torch.equal(look.weights[name], value)
    assert zeros(module) == 106


def masks_of(checkpoint):
    return next(state["masks"] for state in checkpoint["callbacks"].values() if "masks" in state).values()


@pytest.mark.parametrize("score", ["magnitude", "taylor"])
@pytest.mark.parametrize("step", [3, 7])
def test_an_interrupted_fit_goes_on_with_its_masks(score, step, caplog):
    pruning, module = PruningCallback(0.8, score=score), made(Classifier)
    fitting = trainer(pruning, Interrupt(step))
    with pytest.raises(OSError, match="interrupted"), caplog.at_level(logging.WARNING, "lightning_compress"):
        fitting.fit(module, loader())
    assert "the module holds the dense weights, to go on from" in caplog.text
    assert zeros(module) == 0
    pruned = {name: ~mask for name, mask in pruning.masks.items()}
    assert sum(int(mask.sum()) for mask in pruned.values()) > 0
    fitting.fit(module, loader())
    assert all(not mask[pruned[name]].any() for name, mask in pruning.masks.items())
    assert zeros(module) == 106 == round(pruning.reached * 132)


class FailsAtStart(Classifier):
    fails = False

    def on_train_epoch_start(self):
        if self.fails:
            raise OSError("no data")


def test_a_fit_that_fails_before_its_first_step_leaves_the_module_sparse(tmp_path):
    pruning, module = PruningCallback(0.8), made(FailsAtStart)
    fitting = trainer(pruning)
    fitting.fit(module, loader(), loader())
    before = copy.deepcopy(module)
    fitting.save_checkpoint(tmp_path / "before.ckpt")
    module.fails, fitting.fit_loop.max_epochs = True, 2
    with pytest.raises(OSError, match="no data"):
        fitting.fit(module, loader(), loader())
    assert difference(module, before) == 0
    assert zeros(module) == 106
    fitting.save_checkpoint(tmp_path / "after.ckpt")
    files = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("before", "after")]
    for name, value in dense_of(files[0], "pruning").items():
        assert torch.equal(dense_of(files[1], "pruning")[name], value)
    module.fails = False
    fitting.fit(module, loader(), loader())
    assert zeros(module) == 106


@pytest.mark.sample
@pytest.mark.parametrize(
    "settings",
    [{}, {"score": "taylor"}, {"schedule": "iterative", "rewind": "weights"}],
    ids=["plain", "taylor", "rewind"],
)
def test_after_a_fit_the_callback_holds_no_trainer_and_can_be_pickled(settings):
    pruning, module = PruningCallback(0.5, **settings), made(Classifier)
    fitting = trainer(pruning)
    fitting.fit(module, loader(), loader())
    assert same(pickle.loads(pickle.dumps(pruning)).masks, pruning.masks)
    assert same(copy.deepcopy(pruning).masks, pruning.masks)
    gone = weakref.ref(fitting), weakref.ref(module)
    del fitting, module, pruning.log, pruning.log_dict  # these Lightning puts on each callback
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


class Unready(Classifier):
    """May fail in its first step, before or after its backward pass."""

    fails = None

    def on_validation_start(self):
        if self.fails == "sanity":
            raise OSError("no data")

    def training_step(self, batch, batch_idx):
        if self.fails == "step":
            raise OSError("no data")
        return super().training_step(batch, batch_idx)

    def on_after_backward(self):
        if self.fails == "backward":
            raise OSError("no data")


@pytest.mark.parametrize("fails", ["sanity", "step", "backward", "no batches", "another"])
def test_a_new_training_that_never_begins_leaves_everything_as_it_was(fails, tmp_path):
    pruning, module = PruningCallback(0.8), made(Unready)
    first = trainer(pruning)
    first.fit(module, loader(), loader())
    first.save_checkpoint(tmp_path / "before.ckpt")
    before, masks = copy.deepcopy(module), pruning.masks
    if fails == "no batches":
        second = trainer(pruning, limit_train_batches=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            second.fit(module, loader())
    elif fails == "another":
        second = trainer(pruning, PruningCallback(0.5, name="other"))
        with pytest.raises(ValueError, match="both present the weight"):
            second.fit(module, loader(), loader())
    else:
        module.fails = fails
        second = trainer(pruning, num_sanity_val_steps=1)
        with pytest.raises(OSError, match="no data"):
            second.fit(module, loader(), loader())
    assert difference(module, before) == 0
    assert same(masks, pruning.masks)
    assert pruning.reached * 132 == 106
    first.save_checkpoint(tmp_path / "after.ckpt")
    files = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("before", "after")]
    for name, value in dense_of(files[0], "pruning").items():
        assert torch.equal(dense_of(files[1], "pruning")[name], value)


def test_an_interrupted_fit_goes_on_with_what_it_rewinds_to():
    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 6:
                self.weights = {name: value.clone() for name, value in pl_module.named_parameters()}

    pruning = PruningCallback(0.5, schedule="one_shot", start=0.75, end=0.75, rewind="weights")
    module, look = made(Classifier), Look()
    fitting = trainer(pruning, Interrupt(3), look)
    with pytest.raises(OSError, match="interrupted"):
        fitting.fit(module, loader())
    fitting.limit_train_batches = 1.0
    fitting.fit(module, loader())
    if hasattr(look, "weights"):
        for name, value in made(Classifier).named_parameters():
            assert torch.equal(look.weights[name], value)
    assert zeros(module) == 66


@pytest.mark.sample
def test_what_is_saved_after_a_test_is_the_state_of_the_file_that_was_tested(tmp_path):
    pruning, module = PruningCallback(0.8, score="taylor"), made(Classifier)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fitting = trainer(pruning, saver, max_epochs=4, enable_checkpointing=True)
    fitting.fit(module, loader(), loader())
    fitting.test(module, loader(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    fitting.save_checkpoint(tmp_path / "again.ckpt")
    first, again = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("epoch=1", "again"))
    states = [file["callbacks"][pruning.state_key] for file in (first, again)]
    assert [state["finished"] for state in states] == [False, False]
    for a, b in zip(tree_leaves(states[0]), tree_leaves(states[1]), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    for name, value in dense_of(first, "pruning").items():
        assert torch.equal(dense_of(again, "pruning")[name], value)


class OwnOptimizer(MixinClassifier):
    """Steps the torch optimizer itself."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.compressed_loss(self.task_loss(batch)))
        optimizer.step()


@pytest.mark.sample
def test_a_second_fit_bakes_the_masks_that_it_trained_with():
    pruning, module, seen = PruningCallback(0.5, regrow=True), made(OwnOptimizer), {}

    class Look(L.Callback):
        def on_train_end(self, trainer, pl_module):
            seen.update(pruning.masks)

    trainer(pruning, Look()).fit(module, loader())
    first = dict(seen)
    trainer(pruning, Look(), max_epochs=2).fit(module, loader())
    assert not same(first, seen)
    assert same(pruning.masks, seen)
    for name, mask in seen.items():
        assert not module.get_parameter(name)[~mask].any()


class FailsEarlier(L.Callback):
    def on_fit_start(self, *args):
        raise OSError("earlier than ours")


def test_the_state_of_a_file_does_not_outlive_a_fit_that_fails_before_ours(tmp_path):
    first = trainer(PruningCallback(0.5, **ONE_SHOT))
    first.fit(made(Classifier), loader())
    first.save_checkpoint(tmp_path / "first.ckpt")
    pruning, fresh, expected = PruningCallback(0.5, **ONE_SHOT), made(Classifier), made(Classifier)
    with pytest.raises(OSError, match="earlier"):
        trainer(FailsEarlier(), pruning, max_epochs=2).fit(
            made(Classifier), loader(), ckpt_path=tmp_path / "first.ckpt"
        )
    trainer(pruning).fit(fresh, loader())
    trainer(PruningCallback(0.5, **ONE_SHOT)).fit(expected, loader())
    assert difference(fresh, expected) == 0


def plain_file(folder, epochs=1):
    fitting = trainer(max_epochs=epochs)
    fitting.fit(made(Classifier), loader())
    fitting.save_checkpoint(folder / "plain.ckpt")
    return folder / "plain.ckpt"


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_file_without_our_state_takes_the_masks_away(interrupted, tmp_path):
    pruning, module = PruningCallback(0.8), made(Classifier)
    fitting = trainer(pruning, *([Interrupt(5)] if interrupted else []), max_epochs=2)
    with pytest.raises(OSError, match="interrupted") if interrupted else nullcontext():
        fitting.fit(module, loader())
    path = plain_file(tmp_path)
    fitting.test(module, loader(), ckpt_path=path, verbose=False)
    fitting.save_checkpoint(tmp_path / "tested.ckpt")
    file = torch.load(tmp_path / "tested.ckpt", weights_only=True)
    state = file["callbacks"][pruning.state_key]
    assert (state["masks"], state["begun"], state["finished"]) == ({}, False, False)
    assert zeros_in(file) == 0


def zeros_in(checkpoint):
    return sum(int((value == 0).sum()) for value in checkpoint["state_dict"].values() if value.ndim > 1)


@pytest.mark.sample
def test_a_resume_from_a_plain_file_after_an_interruption_begins_anew(tmp_path):
    path = plain_file(tmp_path)
    pruning, module = PruningCallback(0.8), made(Classifier)
    fitting = trainer(pruning, Interrupt(7), max_epochs=2)
    with pytest.raises(OSError, match="interrupted"):
        fitting.fit(module, loader())
    fitting.fit(module, loader(), ckpt_path=path)
    expected, fresh = PruningCallback(0.8), made(Classifier)
    trainer(expected, max_epochs=2).fit(fresh, loader(), ckpt_path=path)
    assert difference(module, fresh) == 0
    assert same(pruning.masks, expected.masks)


def test_another_module_of_the_trainer_is_saved_as_it_is(tmp_path):
    pruning = PruningCallback(0.8)
    fitting = trainer(pruning, Interrupt(5))
    with pytest.raises(OSError, match="interrupted"):
        fitting.fit(made(Classifier), loader())
    fitting.test(made(Classifier), loader(), verbose=False)
    fitting.save_checkpoint(tmp_path / "other.ckpt")
    assert zeros_in(torch.load(tmp_path / "other.ckpt", weights_only=True)) == 0


@pytest.mark.parametrize("settings", [{"score": "taylor"}, {"schedule": "iterative", "rewind": "weights"}])
def test_a_training_that_never_begins_changes_no_part_of_the_state(settings, tmp_path):
    pruning, module = PruningCallback(0.8, **settings), made(Unready)
    first = trainer(pruning)
    first.fit(module, loader(), loader())
    first.save_checkpoint(tmp_path / "before.ckpt")
    module.fails = "step"
    with pytest.raises(OSError, match="no data"):
        trainer(pruning).fit(module, loader(), loader())
    first.save_checkpoint(tmp_path / "after.ckpt")
    states = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["callbacks"] for name in ("before", "after")]
    for a, b in zip(*(tree_leaves(state[pruning.state_key]) for state in states), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_an_interrupted_training_survives_another_that_never_begins():
    pruning, module = PruningCallback(0.8), made(Unready)
    first = trainer(pruning, Interrupt(5))
    with pytest.raises(OSError, match="interrupted"):
        first.fit(module, loader())
    masks = dict(pruning.masks)
    module.fails = "step"
    with pytest.raises(OSError, match="no data"):
        trainer(pruning).fit(module, loader())
    assert zeros(module) == 0
    assert same(masks, pruning.masks)
    module.fails = None
    first.fit(module, loader())
    assert all(not pruning.masks[name][~mask].any() for name, mask in masks.items())
    assert zeros(module) == 106


# Taylor scores


class Frozen(Classifier):
    def build(self):
        super().build()
        self.model[0].requires_grad_(False)


def test_weights_without_a_gradient_have_no_taylor_score():
    with pytest.raises(RuntimeError, match=r"these had none: 'model.0.weight'; leave them out with exclude="):
        trainer(PruningCallback(0.5, score="taylor")).fit(made(Frozen), loader())
    pruning = PruningCallback(0.5, score="taylor", exclude=["model.0"])
    trainer(pruning).fit(made(Frozen), loader())
    assert pruning.reached == 0.5


class RawManual(MixinClassifier):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.compressed_loss(self.task_loss(batch)))
        optimizer.step()


class RawAutomatic(Classifier):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.optimizer.step(optimizer_closure)


@pytest.mark.parametrize("kind", [RawManual, RawAutomatic])
def test_steps_past_lightning_have_no_taylor_scores(kind):
    module, pruning = made(kind), PruningCallback(0.5, score="taylor")
    message = f"'pruning' had no effect on a step .* without Lightning's hooks: let {kind.__name__} step what self.opt"
    with pytest.raises(RuntimeError, match=message):
        trainer(pruning).fit(module, loader())
    assert module.trainer.fit_loop.epoch_loop.batch_progress.current.ready == 1
    other = PruningCallback(0.5)  # by their size they can be pruned
    trainer(other).fit(made(kind), loader())
    assert other.reached == 0.5


class Again(LearningRateFinder):
    """Looks for the learning rate in the middle of the fit."""

    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        self.lr_find(trainer, pl_module)


@pytest.mark.slow
def test_steps_of_the_learning_rate_finder_need_no_taylor_scores():
    finder = Again(num_training_steps=5, early_stop_threshold=None)
    pruning, module = PruningCallback(0.5, score="taylor"), made(Classifier)
    trainer(pruning, finder).fit(module, loader())
    assert pruning.reached == 0.5
    assert finder.optimal_lr is not None


class InTurns(MixinClassifier):
    """Two optimizers, whose gradients both are there when either steps."""

    def configure_optimizers(self):
        return [torch.optim.SGD(self.model[index].parameters(), lr=0.1) for index in (0, 3)]

    def training_step(self, batch, batch_idx):
        self.zero_grad()
        self.manual_backward(self.compressed_loss(self.task_loss(batch)))
        for optimizer in self.optimizers():
            optimizer.step()


def test_a_gradient_counts_with_its_own_optimizer():
    sums = {}

    class Sum(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for name, value in pl_module.named_parameters():
                if any(value is own for group in optimizer.param_groups for own in group["params"]) and value.ndim > 1:
                    sums[name] = sums.get(name, 0) + (value.detach() * value.grad).abs()

    pruning = PruningCallback(0.5, score="taylor", schedule="one_shot", start=0.75, end=0.75)
    trainer(pruning, Sum(), limit_train_batches=6).fit(made(InTurns), loader())
    expected = magnitude_mask([sums[name] for name in pruning.masks], 0.5)
    late = sum(int((a ^ b).sum()) for a, b in zip(expected, pruning.masks.values(), strict=True))
    assert late <= 4  # of 132: the last steps, after the masks were made, are in the sums too


@pytest.mark.sample
@pytest.mark.parametrize(
    ("score", "interval"),
    [
        ("taylor", 1),
        ("magnitude", 4),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in (("taylor", 4), ("magnitude", 1))),
    ],
)
def test_a_resume_right_after_an_update_is_exact(score, interval, tmp_path):
    def fit(folder, **settings):
        pruning, module = PruningCallback(0.6, score=score, update_interval=interval), made(Classifier)
        saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        fitting = trainer(pruning, saver, max_epochs=3, enable_checkpointing=True)
        fitting.fit(module, loader(), **settings)
        return module, pruning

    whole, masks = fit(tmp_path / "whole")
    resumed, again = fit(tmp_path / "resumed", ckpt_path=tmp_path / "whole" / "epoch=0.ckpt", weights_only=True)
    assert difference(resumed, whole) == 0
    assert same(again.masks, masks.masks)


# Rewinding


def test_rewinding_needs_training_after_it():
    with pytest.raises(ValueError, match="rewind needs end below 1"):
        PruningCallback(0.5, schedule="iterative", end=1.0, rewind="weights")


def test_a_training_that_ends_early_is_not_rewound_at_its_end():
    class Shorten(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.fit_loop.max_epochs = 2
            self.weights = {name: value.clone() for name, value in pl_module.named_parameters()}

    shorten, module = Shorten(), made(Classifier)
    pruning = PruningCallback(0.5, schedule="one_shot", start=0.75, end=0.75, rewind="weights")
    with pytest.warns(UserWarning, match="the training ended at 50% of the length"):
        trainer(pruning, shorten, max_epochs=4).fit(module, loader())
    for name, value in module.named_parameters():
        mask = pruning.masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value, shorten.weights[name].masked_fill(~mask, 0))
    assert zeros(module) == 66


# Evaluation within a fit


class Looks(Classifier):
    """Counts zeros wherever a validation gives it a chance."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def count(self, where):
        self.seen[where] = sum(int((layer.weight == 0).sum()) for layer in (self.model[0], self.model[3]))

    def on_validation_start(self):
        self.count("start")

    def on_validation_epoch_start(self):
        self.count("epoch start")
        self.requires_grad_(False)

    def validation_step(self, batch, batch_idx):
        self.count("step")
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        self.count("epoch end")
        self.requires_grad_(True)

    def on_validation_end(self):
        self.count("end")


def test_all_of_a_validation_sees_the_masked_weights():
    module, pruning = Looks(), PruningCallback(0.5, **ONE_SHOT)
    trainer(pruning).fit(module, loader(Looks), loader(Looks))
    assert module.seen == {"start": 66, "epoch start": 66, "step": 66, "epoch end": 66, "end": 0}


def test_an_average_is_validated_with_manual_optimisation_too():
    pruning, module = PruningCallback(0.5), made(MixinClassifier)
    trainer(pruning, EMAWeightAveraging(), max_epochs=2).fit(module, loader(), loader())
    assert zeros(module) == 66


class WritesManually(MixinClassifier):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.model[3].weight.data.clamp_(-0.01, 0.01)


def test_writes_past_autograd_are_found_with_manual_optimisation_too():
    with pytest.raises(RuntimeError, match=r"'model.3.weight' was written to within a step"):
        trainer(PruningCallback(0.5, schedule="one_shot")).fit(made(WritesManually), loader())


# Statistics and counts


class Branches(NormClassifier):
    """A norm that only the first epoch reaches."""

    def build(self):
        super().build()
        self.side = nn.BatchNorm1d(3)

    def task_loss(self, batch):
        x, y = batch
        out = self.model(x)
        return F.cross_entropy(self.side(out) if self.trainer.global_step < 4 else out, y)


def test_statistics_that_no_batch_reaches_stay():
    kept = {}

    class Look(L.Callback):
        def on_train_end(self, trainer, pl_module):
            kept.update({name: value.clone() for name, value in pl_module.side.named_buffers()})

    module = made(Branches)
    with pytest.warns(UserWarning, match=r"leaves some statistics as they were: 'side' are in evaluation mode, or the"):
        trainer(PruningCallback(0.5, reestimate_batchnorm=True), Look()).fit(module, loader(Branches))
    assert kept["num_batches_tracked"] == 4
    for name, value in module.side.named_buffers():
        assert torch.equal(value, kept[name])


@pytest.mark.parametrize("sparsity", [0.37, 0.5, 0.715])
def test_each_layer_is_rounded_for_itself(sparsity):
    module = made(Classifier)
    expected = magnitude_mask([module.model[0].weight, module.model[3].weight], sparsity, scope="layer")
    pruning = PruningCallback(sparsity, scope="layer", schedule="one_shot")
    trainer(pruning).fit(module, loader())
    assert all(torch.equal(mask, own) for mask, own in zip(pruning.masks.values(), expected, strict=True))


class Falling(Classifier):
    """Its metric falls when it is pruned."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("known", (0.9, 0.4, 0.5)[self.current_epoch])


class Begins(L.Callback):
    """Counts the zeros that a fit begins with."""

    def on_train_start(self, trainer, pl_module):
        self.zeros = zeros(pl_module)


def save_cut(fitting, path, **others):
    """Save what does not fit into the module."""
    fitting.save_checkpoint(path)
    file = torch.load(path, weights_only=True)
    file["state_dict"] = {name: value[:1] for name, value in file["state_dict"].items()}
    torch.save({**file, **others}, path)


@pytest.mark.parametrize("run", ["test", "fit"])
def test_a_file_that_does_not_fit_leaves_the_dense_weights(run, tmp_path):
    pruning, begins = PruningCallback(0.5), Begins()
    module = made(Classifier)
    fitting = trainer(pruning)
    fitting.fit(module, loader(), loader())
    save_cut(fitting, tmp_path / "other.ckpt", lightning_compress={})
    masks = pruning.masks
    with pytest.raises(RuntimeError, match="size mismatch"):
        getattr(trainer(pruning), run)(module, loader(), ckpt_path=tmp_path / "other.ckpt")
    assert same(masks, pruning.masks)
    assert pruning.reached == pytest.approx(0.5, abs=0.01)
    trainer(pruning, begins).fit(module, loader(), loader())
    assert begins.zeros == 0


@pytest.mark.sample
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_file_that_was_loaded_counts_where_the_validation_of_it_fails(weights_only, tmp_path):
    first, second = PruningCallback(0.5), PruningCallback(0.5)
    fitting = trainer(first)
    fitting.fit(made(Classifier), loader(), loader())
    fitting.save_checkpoint(tmp_path / "file.ckpt", weights_only)
    module = made(Classifier)
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(value.flip(0))
    trainer(second).fit(module, loader(), loader())
    assert not same(first.masks, second.masks)
    for loaded in (module, made(Classifier)):
        loaded.fails_in_validation = True
        with pytest.raises(RuntimeError):
            trainer(second).validate(loaded, loader(), ckpt_path=tmp_path / "file.ckpt")
        masks = {} if weights_only else first.masks
        assert second.masks.keys() == masks.keys()
        assert same(masks, second.masks)


@pytest.mark.sample
def test_an_interrupted_fit_of_another_module_saves_its_own_masks(tmp_path):
    fitting = trainer(PruningCallback(0.5))
    fitting.fit(made(Classifier), loader(), loader())
    fitting.save_checkpoint(tmp_path / "resumed.ckpt")
    pruning, first, second = PruningCallback(0.5), made(Classifier), made(Classifier)
    with torch.no_grad():
        for value in first.parameters():
            value.copy_(value.flip(0))
    trainer(pruning).fit(first, loader(), loader())
    saver = ModelCheckpoint(tmp_path, filename="interrupted", save_on_exception=True, save_top_k=0)
    again = trainer(pruning, Interrupt(12), saver, max_epochs=2, enable_checkpointing=True)
    earlier = pruning.masks
    with pytest.raises(OSError, match="interrupted"):
        again.fit(second, loader(), loader(), ckpt_path=tmp_path / "resumed.ckpt")
    [file] = [own for own in tmp_path.glob("*.ckpt") if own.name != "resumed.ckpt"]
    state = torch.load(file, weights_only=True)
    assert not same(earlier, pruning.masks)
    for name, mask in pruning.masks.items():
        assert torch.equal(state["callbacks"][pruning.state_key]["masks"][name], mask)
        assert torch.equal(state["state_dict"][name] == 0, ~mask)


class FailsAtTheStart(L.Callback):
    def on_fit_start(self, trainer, pl_module):
        raise OSError("interrupted")


@pytest.mark.sample
def test_a_fit_that_fails_between_the_file_and_its_start_does_not_go_back_to_earlier_masks(tmp_path):
    fitting, pruning = trainer(PruningCallback(0.5)), PruningCallback(0.5)
    fitting.fit(made(Classifier), loader(), loader())
    fitting.save_checkpoint(tmp_path / "resumed.ckpt")
    module = made(Classifier)
    trainer(pruning).fit(module, loader(), loader())
    again = trainer(
        FailsAtTheStart(), pruning, OnExceptionCheckpoint(tmp_path), enable_checkpointing=True, max_epochs=2
    )
    with pytest.raises(OSError, match="interrupted"):
        again.fit(module, loader(), loader(), ckpt_path=tmp_path / "resumed.ckpt")
    assert pruning.reached == 0.0
    file = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert not file["callbacks"][pruning.state_key]["masks"]
    assert all(torch.equal(value, file["state_dict"][name]) for name, value in module.state_dict().items())


@pytest.mark.slow
def test_a_file_that_does_not_fit_leaves_what_children_found(tmp_path):
    pruning, module = PruningCallback(0.5), made(Classifier)
    trainer(pruning, strategy="ddp_fork", devices=1).fit(module, loader(), loader())
    small = nn.Linear(1, 1).state_dict()
    torch.save({"state_dict": small, "pytorch-lightning_version": L.__version__}, tmp_path / "other.ckpt")
    with pytest.raises(RuntimeError, match="Missing key"):
        trainer(pruning).test(module, loader(), ckpt_path=tmp_path / "other.ckpt")
    assert pruning.reached == pytest.approx(0.5, abs=0.01)


@pytest.mark.sample
def test_a_file_that_does_not_fit_leaves_a_fresh_callback_as_it_was(tmp_path):
    fitting = trainer(PruningCallback(0.5))
    fitting.fit(made(Classifier), loader(), loader())
    save_cut(fitting, tmp_path / "other.ckpt")
    fresh = PruningCallback(0.5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer(fresh).test(made(Classifier), loader(), ckpt_path=tmp_path / "other.ckpt")
    assert (fresh.reached, fresh.masks) == (0.0, {})
    assert not fresh.state_dict()["masks"]


@pytest.mark.sample
@pytest.mark.parametrize("guards", [True, False])
@pytest.mark.filterwarnings("ignore:.*no checkpoint is kept before", "ignore:.*the best checkpoints so far")
def test_the_best_so_far_is_that_of_the_final_sparsity(guards, tmp_path):
    logger, saver = CSVLogger(tmp_path), ModelCheckpoint(tmp_path, monitor="known", mode="max")
    settings = {"max_epochs": 3, "logger": logger, "enable_checkpointing": True, "num_sanity_val_steps": 0}
    pruning = PruningCallback(0.5, schedule="one_shot", start=0.5, end=0.5, guard_checkpoints=guards)
    trainer(pruning, saver, **settings).fit(made(Falling), loader(), loader())
    best = [float(row["compress/best/known"]) for row in rows_logged(logger) if row.get("compress/best/known")]
    assert best == pytest.approx([0.9, 0.4, 0.5])


class FallingInSteps(Classifier):
    """A metric of its training falls from the first step after its first epoch on."""

    def training_step(self, batch, batch_idx):
        self.log("known", 0.9 if self.current_epoch == 0 else 0.4)
        return super().training_step(batch, batch_idx)


@pytest.mark.sample
def test_what_the_last_step_before_the_final_sparsity_logged_is_not_the_best_of_it(tmp_path):
    logger, saver = CSVLogger(tmp_path), ModelCheckpoint(tmp_path, monitor="known", mode="max", save_top_k=-1)
    settings = {"max_epochs": 3, "logger": logger, "enable_checkpointing": True, "num_sanity_val_steps": 0}
    trainer(PruningCallback(0.5, schedule="one_shot", start=1 / 3), saver, **settings).fit(
        made(FallingInSteps), loader(), loader()
    )
    best = [float(row["compress/best/known"]) for row in rows_logged(logger) if row.get("compress/best/known")]
    assert best == pytest.approx([0.4, 0.4])


@pytest.mark.sample
def test_the_final_sparsity_counts_from_where_it_is_reached(tmp_path):
    logger, saver = CSVLogger(tmp_path), ModelCheckpoint(tmp_path, monitor="known", mode="max")
    settings = {"max_epochs": 3, "logger": logger, "enable_checkpointing": True, "num_sanity_val_steps": 0}
    pruning = PruningCallback(0.5, schedule=lambda progress, start, end: end, start=0.0, end=0.75, update_interval=4)
    trainer(pruning, saver, **settings).fit(made(Falling), loader(), loader())
    best = [float(row["compress/best/known"]) for row in rows_logged(logger) if row.get("compress/best/known")]
    assert best == pytest.approx([0.9] * 3)
    assert float(saver.best_model_score) == pytest.approx(0.9)


@pytest.mark.sample
def test_a_nested_trainer_is_told_that_the_callback_is_at_work():
    pruning = PruningCallback(0.5)

    class Nested(L.Callback):
        def on_train_epoch_end(self, outer, module):
            with pytest.raises(RuntimeError, match="is at work in another Trainer's fit"):
                trainer(pruning).validate(made(Classifier), loader(), verbose=False)

    trainer(pruning, Nested(), max_epochs=2).fit(made(Classifier), loader(), loader())
    assert pruning.reached == pytest.approx(0.5, abs=0.01)


@pytest.mark.sample
@pytest.mark.parametrize("then", ["bf16-true", "64-true"])
def test_a_fit_in_another_precision_goes_on_from_the_dense_weights(then):
    pruning, begins, module = PruningCallback(0.5), Begins(), made(Classifier)
    trainer(pruning).fit(module, loader(), loader())
    assert zeros(module) > 0
    trainer(pruning, begins, precision=then).fit(module, loader(), loader())
    assert begins.zeros == 0


@pytest.mark.sample
def test_other_weights_than_those_of_the_last_fit_are_told(caplog):
    pruning, module = PruningCallback(0.5), made(Classifier)
    trainer(pruning).fit(module, loader(), loader())
    with torch.no_grad():
        next(module.parameters()).add_(1)
    with caplog.at_level(logging.INFO, logger="lightning_compress"):
        trainer(pruning).fit(module, loader(), loader())
    assert "the weights have changed since the last fit" in caplog.text


class Perturbs(MixinClassifier):
    """Moves its weights between two passes of a step and takes them back, as SAM does; keeps what the second saw."""

    def __init__(self, back="copy"):
        super().__init__()
        self.back, self.seen = back, []

    def training_step(self, batch, batch_idx):
        optimizer, layer = self.optimizers(), self.model[3]
        self.manual_backward(self.compressed_loss(self.task_loss(batch)))
        kept = [value.detach().clone() for value in self.parameters()]
        with torch.no_grad():
            for value in self.parameters():
                value.add_(0.25)
        optimizer.zero_grad()
        self.manual_backward(self.compressed_loss(self.task_loss(batch)))
        self.seen.append((layer.weight.detach().clone(), layer._parameters["weight"].detach().clone()))
        with torch.no_grad():
            for value, own in zip(self.parameters(), kept, strict=True):
                if self.back == "copy":
                    value.copy_(own)
                else:
                    value.data = own
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("back", ["copy", "data"])
@pytest.mark.parametrize("build", [PruningCallback, DPFCallback])
def test_a_step_that_moves_its_weights_between_two_passes_sees_them_masked(build, back):
    module, callback = made(lambda: Perturbs(back)), build(0.5, start=0.0, end=0.25)
    trainer(callback, max_epochs=2).fit(module, loader())
    for shown, own in module.seen:
        left = shown != 0
        assert torch.equal(shown[left], own[left])
    assert not left.all()
    assert not nn.modules.module._global_forward_pre_hooks
