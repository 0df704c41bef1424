"""DPFCallback and DCILCallback over several fits, interruptions, averages, files and processes."""

from __future__ import annotations

import copy
import pickle
import warnings

import lightning.pytorch as L
import pytest
import torch
from contract.modules import (
    BATCH,
    STEPS,
    NormClassifier,
    difference,
    interrupted,
    loader,
    made,
    own_layers,
    trainer,
)
from contract.traces import is_portable, traces
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint, WeightAveraging
from torch.utils._pytree import tree_leaves

from lightning_compress import DCILCallback, DPFCallback
from lightning_compress.mechanisms.checkpoints import SECTION, dense_of

pytestmark = pytest.mark.filterwarnings("ignore:.*masked completely")
KINDS = ["dpf", "own", "own_norm", "shared"]


def built(kind, **settings):
    """Masks change after each step, also after the end of the schedule."""
    arguments = {"update_interval": 1, "end": 0.5, **settings}
    if kind == "dpf":
        return DPFCallback(0.4, **arguments)
    return DCILCallback(0.4, dense_path=kind, kl_start=0.3, **arguments)


def each_kind_with(*fast):
    """Parametrise a test over the kinds, of which some are among the fast tests."""
    return pytest.mark.parametrize(
        "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in fast)) for kind in KINDS]
    )


each_kind, own_first = each_kind_with("dpf", "own"), each_kind_with("own")


def zeros(module):
    return sum(int((value == 0).sum()) for value in module.parameters() if value.ndim > 1)


def assert_same_trees(first, second):
    for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def state_of(callback):
    """All that a checkpoint has of it, apart from its arguments."""
    return callback.extra_state()


# Resuming


def saved_fit(kind, folder, *, epochs=2, settings=None, **resume):
    module, callback = made(NormClassifier), built(kind, **(settings or {}))
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    fitting = trainer(callback, saver, max_epochs=epochs, enable_checkpointing=True)
    data = loader(NormClassifier, stateful=True)
    fitting.fit(module, data, loader(NormClassifier), **resume)
    fitting.save_checkpoint(folder / "end.ckpt")
    return module, callback, fitting


@pytest.mark.sample
@each_kind
def test_a_resume_within_an_epoch_is_exact(kind, tmp_path):
    """While masks change: weights, dense ones behind them, the dense path's own layers, and their optimizer."""
    _, whole, _ = saved_fit(kind, tmp_path / "whole")
    middle = tmp_path / "whole" / "step=3.ckpt"
    _, resumed, fitting = saved_fit(kind, tmp_path / "resumed", ckpt_path=middle, weights_only=True)
    assert fitting.global_step == 2 * STEPS
    first, second = (torch.load(tmp_path / name / "end.ckpt", weights_only=True) for name in ("whole", "resumed"))
    for part in ("state_dict", SECTION, "optimizer_states", "lr_schedulers", "global_step"):
        assert_same_trees(first[part], second[part])
    assert_same_trees(first["callbacks"][whole.state_key], second["callbacks"][resumed.state_key])
    early, late = (
        torch.load(path, weights_only=True)["callbacks"][whole.state_key]
        for path in (middle, middle.with_name("step=12.ckpt"))
    )
    assert not all(torch.equal(mask, late["masks"][name]) for name, mask in early["masks"].items())
    assert ("own" in first["callbacks"][whole.state_key]) == (kind in ("own", "own_norm"))
    if kind in ("own", "own_norm"):
        own = first["callbacks"][whole.state_key]["own"]["layers"]
        assert own["steps"] == 2 * STEPS
        assert all(entry["momentum_buffer"].any() for entry in own["optimizer"]["state"].values())


@pytest.mark.sample
def test_a_resume_with_another_dense_path_begins_with_new_copies(tmp_path):
    saved_fit("own", tmp_path / "first", epochs=1)
    with pytest.warns(UserWarning, match="dense_path was 'own' and is 'own_norm'"):
        _, callback, _ = saved_fit("own_norm", tmp_path / "second", ckpt_path=tmp_path / "first" / "step=6.ckpt")
    own = callback.extra_state()["own"]
    assert own["names"] == ["model.1"]
    assert own["layers"]["steps"] == 2 * STEPS - 6


def test_a_resume_of_other_layers_of_the_dense_path_is_refused(tmp_path):
    saved_fit("own", tmp_path / "first", epochs=1)
    with (
        pytest.warns(UserWarning, match="classifier was None and is 'model.1'"),
        pytest.raises(
            ValueError, match=r"layers of the dense path, 'model.1', 'model.4', other than those of now, 'mo"
        ),
    ):
        saved_fit(
            "own", tmp_path / "second", settings={"classifier": "model.1"}, ckpt_path=tmp_path / "first" / "step=6.ckpt"
        )


# Several fits


@own_first
def test_a_second_fit_goes_on_from_the_dense_weights(kind):
    """As a fit without the first one's end would: only the optimizer begins anew."""
    seen = {}

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            seen["weights"] = {name: value.clone() for name, value in pl_module.named_parameters()}
            seen["masks"] = callback.masks

    callback, module = built(kind), made(NormClassifier)
    fitting = trainer(callback, Look())
    fitting.fit(module, loader(NormClassifier))
    dense, masks, own = dict(callback._dense), callback.masks, copy.deepcopy(state_of(callback).get("own"))
    fitting.fit_loop.max_epochs = 2
    fitting.fit(module, loader(NormClassifier))
    for name, value in dense.items():
        assert torch.equal(seen["weights"][name], value)
        assert torch.equal(seen["masks"][name], masks[name])
    assert zeros(module) == sum(int((~mask).sum()) for mask in callback.masks.values())
    if own is not None:
        now = state_of(callback)["own"]
        assert now["layers"]["steps"] == 2 * STEPS == 2 * own["layers"]["steps"]
        assert now["names"] == own["names"]


@own_first
def test_a_new_training_with_the_same_callback_begins_anew(kind):
    expected, fresh = built(kind), made(NormClassifier)
    trainer(expected).fit(fresh, loader(NormClassifier))
    callback, other = built(kind), made(NormClassifier, seed=5)
    trainer(callback).fit(other, loader(NormClassifier))
    second = made(NormClassifier)
    trainer(callback).fit(second, loader(NormClassifier))
    assert difference(second, fresh) == 0
    assert_same_trees(state_of(callback), state_of(expected))


class Worsening(NormClassifier):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.tensor(float(self.current_epoch)), batch_size=BATCH)


@own_first
def test_a_fit_after_a_test_goes_on_from_the_file_that_was_tested(kind, tmp_path):
    seen = {}

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.update({name: value.clone() for name, value in pl_module.named_parameters()})

    saver = ModelCheckpoint(tmp_path, monitor="val_loss", filename="{epoch}", save_last=True)
    callback, module = built(kind, end=0.25), made(Worsening)
    fitting = trainer(callback, saver, Look(), enable_checkpointing=True, max_epochs=3)
    fitting.fit(module, loader(Worsening), loader(Worsening))
    last = copy.deepcopy(module)
    fitting.test(module, loader(Worsening), ckpt_path="best", verbose=False)
    assert difference(module, last) > 0
    pruned = zeros(module)
    assert pruned == 53 if kind == "dpf" else pruned == 14
    best = torch.load(saver.best_model_path, weights_only=True)
    state = best["callbacks"][callback.state_key]
    fitting.save_checkpoint(tmp_path / "again.ckpt")
    again = torch.load(tmp_path / "again.ckpt", weights_only=True)
    assert_same_trees(again["callbacks"][callback.state_key], state)
    assert difference(dense_of(best, callback.name), dense_of(again, callback.name)) == 0
    fitting.fit_loop.max_epochs = 4
    fitting.fit(module, loader(Worsening), loader(Worsening))
    for name, value in dense_of(best, callback.name).items():
        assert torch.equal(seen[name], value)
        assert torch.count_nonzero(value) == value.numel()
    assert zeros(module) == pruned
    if "own" in state:
        assert state_of(callback)["own"]["layers"]["steps"] == state["own"]["layers"]["steps"] + STEPS


# Interruptions


@pytest.fixture
def untouched():
    """What a fit without us, interrupted in the same step, leaves on the module."""
    module = made(NormClassifier)
    module.fails_at = 4
    with pytest.raises(RuntimeError, match="the step is broken"):
        trainer().fit(module, loader(NormClassifier))
    return traces(module)


class SecondPass(NormClassifier):
    """Fails the second time that a batch is seen, in the dense pass."""

    def __init__(self):
        super().__init__()
        self.weak = True

    def training_step(self, batch, batch_idx):
        if self.weak and batch_idx == 4 and not vars(self.model[0]).get("weight", torch.ones(1)).detach().eq(0).any():
            raise RuntimeError("the step is broken")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("how", ["error", "interrupt", "dense pass"])
@each_kind
def test_an_interruption_within_a_step_leaves_nothing(kind, how, untouched, tmp_path):
    if how == "dense pass" and kind == "dpf":
        kind = "shared"
    module = made(SecondPass if how == "dense pass" else NormClassifier)
    callback, saver = built(kind), OnExceptionCheckpoint(tmp_path, "broken")
    buffers = {name: id(value) for name, value in module.named_buffers()}
    parameters = {name: id(value) for name, value in module.named_parameters()}
    if how != "dense pass":
        module.fails_at = 4
    if how == "interrupt":
        module.failure = interrupted
        with pytest.raises(SystemExit):
            trainer(callback, saver, enable_checkpointing=True).fit(module, loader(NormClassifier))
    else:
        with pytest.raises(RuntimeError, match="the step is broken"):
            trainer(callback, saver, enable_checkpointing=True).fit(module, loader(NormClassifier))
    if how == "error":
        assert traces(module) == untouched
    assert {name: id(value) for name, value in module.named_buffers()} == buffers
    assert {name: id(value) for name, value in module.named_parameters()} == parameters
    assert all(parameter.requires_grad for parameter in module.parameters())
    for part in module.modules():
        assert not {"weight", "bias", "running_mean", "training_step", "log", "on_save_checkpoint"} & set(vars(part))
    assert is_portable(module)
    # The checkpoint of the exception holds the pruned weights, and is there to go on from.
    file = torch.load(tmp_path / "broken.ckpt", weights_only=True)
    state = file["callbacks"][callback.state_key]
    pruned = sum(int((value == 0).sum()) for name, value in file["state_dict"].items() if value.ndim > 1)
    assert pruned == sum(int((~mask).sum()) for mask in state["masks"].values()) > 0
    assert zeros(module) == 0
    if "own" in state:
        assert state["own"]["layers"]["steps"] == 4
    module.fails_at, module.weak = None, False
    fitting = trainer(callback)
    fitting.fit(module, loader(NormClassifier))
    assert fitting.global_step == STEPS
    assert zeros(module) == sum(int((~mask).sum()) for mask in callback.masks.values())


# Averages


@pytest.mark.parametrize(
    "average",
    [
        pytest.param(lambda: EMAWeightAveraging(decay=0.5), id="EMA"),
        pytest.param(WeightAveraging, id="mean", marks=pytest.mark.slow),
    ],
)
@each_kind
def test_averages_before_and_after(kind, average, tmp_path):
    """The order does not matter; the final module, and each file, hold the average of the dense weights, pruned."""
    results = []
    for first in (True, False):
        folder = tmp_path / str(first)
        callback, other, module = built(kind), average(), made(NormClassifier)
        saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
        both = [callback, other] if first else [other, callback]
        fitting = trainer(*both, saver, enable_checkpointing=True, max_epochs=3)
        fitting.fit(module, loader(NormClassifier, rows=32), loader(NormClassifier, rows=16))
        results.append((module, callback))
        masked = sum(int((~mask).sum()) for mask in callback.masks.values())
        assert zeros(module) == masked > 0
        file = torch.load(folder / "epoch=2.ckpt", weights_only=True)
        assert sum(int((value == 0).sum()) for value in file["state_dict"].values() if value.ndim > 1) == masked
        plain = made(NormClassifier)
        plain.load_state_dict(file["state_dict"])
        [metrics] = trainer().validate(plain, loader(NormClassifier, rows=16), verbose=False)
        assert metrics["val_loss"] == float(fitting.callback_metrics["val_loss"])
        assert is_portable(module)
    assert difference(results[0][0], results[1][0]) == 0
    assert_same_trees(state_of(results[0][1]), state_of(results[1][1]))


# Copies


class Copies(NormClassifier):
    """Copies itself wherever a validation gives it a chance, and in its step."""

    def __init__(self):
        super().__init__()
        self.copies = {}

    def copy(self, where):
        copies, self.copies = self.copies, {}
        try:
            copies[where] = copy.deepcopy(self)
        finally:
            self.copies = copies

    def on_validation_start(self):
        self.copy("start")

    def on_validation_epoch_end(self):
        self.copy("epoch end")

    def on_validation_end(self):
        self.copy("end")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.copy("batch end")


@own_first
def test_the_module_can_be_copied_within_and_after_a_fit(kind):
    module, callback = made(Copies), built(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=r"(lightning|torch)\.")
        trainer(callback).fit(module, loader(Copies), loader(Copies))
    assert set(module.copies) == {"start", "epoch end", "end", "batch end"}
    for whole in module.copies.values():
        network = whole.model
        assert list(network.state_dict()) == list(module.model.state_dict())
        assert zeros(network) == 0  # a copy holds what is trained, the dense weights
        optimizer, before = torch.optim.SGD(network.parameters(), lr=0.1), network[0].weight.detach().clone()
        network(next(iter(loader(Copies)))[0]).square().sum().backward()
        optimizer.step()
        assert not torch.equal(network[0].weight, before)
    module.copies = {}
    assert is_portable(module)
    assert_same_trees(pickle.loads(pickle.dumps(callback)).extra_state(), state_of(callback))
    assert_same_trees(copy.deepcopy(callback).extra_state(), state_of(callback))


# Two processes


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
@each_kind
def test_the_parent_has_the_compressed_module_and_all_state(kind, strategy, tmp_path):
    module, callback = made(NormClassifier), built(kind)
    fitting = trainer(callback, devices=2, strategy=strategy)
    fitting.fit(module, loader(NormClassifier), loader(NormClassifier))
    assert zeros(module) == sum(int((~mask).sum()) for mask in callback.masks.values()) > 0
    for name, mask in callback.masks.items():
        assert torch.equal(module.get_parameter(name) != 0, mask)
        assert torch.equal(callback._dense[name] * mask, module.get_parameter(name))
        assert callback._dense[name].all()
    fitting.save_checkpoint(tmp_path / "after.ckpt")
    file = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert difference(dense_of(file, callback.name), callback._dense) == 0
    state = file["callbacks"][callback.state_key]
    assert ("own" in state) == (kind in ("own", "own_norm"))
    if "own" in state:
        assert state["own"]["layers"]["steps"] == STEPS // 2
        assert not torch.equal(own_layers(state["own"])["model.1.weight"], module.model[1].weight)
