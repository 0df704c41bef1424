"""FactorTransferCallback against loops written by hand: network, translator and paraphraser are equal to theirs.

Bit for bit, unless a test says otherwise. Run as a script it is the two processes of the last tests.
"""

from __future__ import annotations

import copy
import functools
import os
import random
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from contract.features import ConvClassifier, ConvMixin, ConvNormClassifier, Images, conv_teacher, feature_loader
from contract.modules import BATCH, CLASSES, STEPS, difference, made, scaled, trainer
from contract.ranks import EverySecond
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import (
    AttentionTransferCallback,
    CompressionMixin,
    DistillationCallback,
    FactorTransferCallback,
)
from lightning_compress import functional as C
from lightning_compress.mechanisms.isolation import RandomState
from lightning_compress.modules import Paraphraser, Translator

pytestmark = pytest.mark.sample  # paraphrasers are trained

WEIGHT, EPOCHS = 10.0, 2
CLIP = 0.1
SCALE = 1024.0  # at which nothing overflows in float16
CHANNELS, TEACHER_CHANNELS, FACTOR = 6, 10, 5  # of stage2 in student and teacher, and half of the latter


def teacher() -> nn.Module:
    """Its last feature lies about 0.7, which a paraphraser learns in a few steps."""
    network = conv_teacher()
    nn.init.ones_(network.stage2[4].bias)
    return network


def transfer(**settings) -> FactorTransferCallback:
    epochs = {} if "paraphraser" in settings else {"pretrain_epochs": EPOCHS}
    arguments = {"pair": ("stage2", "stage2"), "weight": WEIGHT, **epochs, **settings}
    return FactorTransferCallback(arguments.pop("teacher", None) or teacher(), **arguments)


def fitted(callback, kind=ConvClassifier, *others, **settings):
    """A fit with the callback; validation and its sanity check are on."""
    module = made(kind)
    trainer(*others, callback, **settings).fit(module, feature_loader(), feature_loader(batch_size=32))
    return module


def helpers(callback: FactorTransferCallback) -> tuple[dict, dict]:
    """Weights of paraphraser and translator, from the state that goes into a checkpoint."""
    state = callback.state_dict()
    return state["paraphraser"], state["translator"]["module"]


def stages(network: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs = {}
    for name, child in network.named_children():
        outputs[name] = x = child(x)
    return outputs


def drawn(make, dtype: torch.dtype, offset: int = 0) -> nn.Module:
    """A helper from the user's seed, which leaves the random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + offset)
        return make().to(dtype)


def casting(autocast):
    return torch.autocast("cpu", dtype=autocast, enabled=autocast is not None)


@functools.cache
def pretrained(autocast, dtype: torch.dtype, seed: int) -> Paraphraser:
    """The paraphraser's training in a plain loop."""
    helpers_dtype, taught = torch.promote_types(dtype, torch.float32), teacher().to(dtype).eval()
    paraphraser = drawn(lambda: Paraphraser(TEACHER_CHANNELS), helpers_dtype, offset=1)
    optimizer = SGD(paraphraser.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(EPOCHS):
        for x, _ in feature_loader():
            with torch.no_grad(), casting(autocast):
                feature = stages(taught, x.to(dtype))["stage2"].to(helpers_dtype)
            optimizer.zero_grad()
            (paraphraser(feature) - feature).abs().mean().backward()
            optimizer.step()
    return paraphraser


class ByHand:
    """A plain loop that trains network and translator, after another that trained the paraphraser."""

    def __init__(self, kind=ConvClassifier, *, autocast=None, dtype=torch.float32, others=()):
        self.module = made(kind).to(dtype)
        self.teacher = teacher().to(dtype).eval()
        self.autocast, self.dtype, self.others = autocast, dtype, others
        self.helpers_dtype = torch.promote_types(dtype, torch.float32)
        self.paraphraser = pretrained(autocast, dtype, torch.initial_seed())
        self.translator = drawn(lambda: Translator(CHANNELS, FACTOR), self.helpers_dtype)
        self.helper = SGD(self.translator.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.scheduler = None
        self.norms, self.distances = [], []

    def batches(self):
        return ((x.to(self.dtype), y) for x, y in feature_loader())

    def loss(self, x, y):
        with casting(self.autocast):
            student = stages(self.module.model, x)
            with torch.no_grad():
                taught = stages(self.teacher, x)
                factor = self.paraphraser.encoder(taught["stage2"].to(self.helpers_dtype))
            translated = self.translator.encoder(student["stage2"].to(self.helpers_dtype))
            distance = C.factor_transfer_loss(translated, factor)
            terms = {"ft": distance * WEIGHT}
            task = F.cross_entropy(student["head"], y)
            for name, weight_of_task, term in self.others:
                terms[name] = term(student, taught)
                task = task * weight_of_task
            self.distances.append(distance.item())
            for _, term in sorted(terms.items()):
                task = task + term
            return task

    def run(self, *, epochs=1, windows=1, scaler=None, clip=None, skip=(), before_epoch=lambda hand, epoch: None):
        self.configure()
        self.module.train()
        scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
        for epoch in range(epochs):
            before_epoch(self, epoch)
            for index, (x, y) in enumerate(self.batches()):
                if index in skip:
                    continue
                scaler.scale(self.loss(x, y) / windows).backward()
                if (index + 1) % windows == 0:
                    self.step(scaler, clip)
        return self

    def configure(self):
        settings = self.module.configure_optimizers()
        if isinstance(settings, dict):
            self.optimizer, self.scheduler = settings["optimizer"], settings["lr_scheduler"]["scheduler"]
        else:
            self.optimizer = settings

    def step(self, scaler, clip):
        self.helper.param_groups[0]["lr"] = self.optimizer.param_groups[0]["lr"]
        scaler.step(self.helper)
        scaler.unscale_(self.optimizer)
        self.norms.append(norm(self.module))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), clip)
        scaler.step(self.optimizer)
        scaler.update()
        for optimizer in (self.helper, self.optimizer):
            optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()


def norm(module: nn.Module) -> float:
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]).item()


def assert_equal(module: nn.Module, callback: FactorTransferCallback, hand: ByHand) -> None:
    paraphraser, translator = helpers(callback)
    assert difference(paraphraser, hand.paraphraser) == 0
    assert difference(translator, hand.translator) == 0
    assert difference(module, hand.module) == 0
    assert difference(module, made(type(module)).to(hand.dtype)) > 0.01
    start = drawn(lambda: Translator(CHANNELS, FACTOR), hand.helpers_dtype)
    assert difference(translator, start) > 0.001


# Schedules and settings


class Lambda(ConvClassifier):
    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = LambdaLR(optimizer, lambda step: 0.8**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class OneCycle(ConvClassifier):
    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = OneCycleLR(optimizer, 0.2, total_steps=STEPS + 1)  # it moves the user's momentum too
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class TwoGroups(ConvClassifier):
    """The head comes first, with a rate of its own."""

    def configure_optimizers(self):
        head = set(self.model.head.parameters())
        rest = [parameter for parameter in self.parameters() if parameter not in head]
        return torch.optim.Adam([{"params": list(head), "lr": 0.05}, {"params": rest, "lr": 0.01}])


@pytest.mark.parametrize(
    "kind",
    [ConvNormClassifier, OneCycle, TwoGroups]
    + [pytest.param(kind, marks=pytest.mark.slow) for kind in (ConvClassifier, Lambda)],
)
def test_the_translator_follows_the_users_learning_rate(kind):
    rates = []

    class Reading(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            rates.append(callback._translator.optimizer.param_groups[0]["lr"])

    callback = transfer()
    module, hand = fitted(callback, kind, Reading()), ByHand(kind).run()
    assert_equal(module, callback, hand)
    assert len(set(rates)) == {ConvClassifier: 3, ConvNormClassifier: 3, Lambda: 8, OneCycle: 8, TwoGroups: 1}[kind]
    assert callback._translator.steps == STEPS
    plain = made(kind)
    trainer().fit(plain, feature_loader(), feature_loader())
    assert difference(plain, module) > 1e-4


def test_a_learning_rate_of_its_own_is_kept():
    torch.manual_seed(4)  # both helpers start from the user's seed
    callback = transfer(translator_lr=0.03)
    module, hand = fitted(callback), ByHand()
    hand.configure()
    for x, y in hand.batches():
        hand.loss(x, y).backward()
        hand.helper.param_groups[0]["lr"] = 0.03
        for optimizer in (hand.helper, hand.optimizer):
            optimizer.step()
            optimizer.zero_grad()
        hand.scheduler.step()
    assert_equal(module, callback, hand)


@pytest.mark.parametrize("kind", [ConvNormClassifier, pytest.param(ConvClassifier, marks=pytest.mark.slow)])
def test_accumulation(kind):
    callback = transfer()
    module = fitted(callback, kind, accumulate_grad_batches=4)
    assert_equal(module, callback, ByHand(kind).run(windows=4))
    assert callback._translator.steps == STEPS // 4


@pytest.mark.parametrize("windows", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_bfloat16(windows):
    callback = transfer()
    module = fitted(callback, ConvNormClassifier, precision="bf16-mixed", accumulate_grad_batches=windows)
    hand = ByHand(ConvNormClassifier, autocast=torch.bfloat16).run(windows=windows)
    assert_equal(module, callback, hand)
    assert difference(hand.module, ByHand(ConvNormClassifier).run(windows=windows).module) > 0


class Norms(L.Callback):
    """The norm of the user's gradients, unscaled and before clipping; and after it."""

    def __init__(self) -> None:
        self.norms, self.clipped = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms.append(norm(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.clipped.append(norm(pl_module))


@pytest.mark.parametrize(("windows", "first"), [(4, False), pytest.param(1, True, marks=pytest.mark.slow)])
def test_float16_with_a_scaler_and_clipping(windows, first):
    scaler, plugin, callback, norms = torch.amp.GradScaler("cpu", init_scale=SCALE), scaled(), transfer(), Norms()
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    module = made(ConvClassifier)
    order = [callback, norms] if first else [norms, callback]
    fitting = trainer(*order, plugins=plugin, accumulate_grad_batches=windows, gradient_clip_val=CLIP)
    fitting.fit(module, feature_loader(), feature_loader())
    hand = ByHand(autocast=torch.float16).run(windows=windows, scaler=scaler, clip=CLIP)
    assert_equal(module, callback, hand)
    assert plugin.scaler._growth_tracker.item() == scaler._growth_tracker.item() == STEPS // windows
    assert plugin.scaler.get_scale() == SCALE
    assert norms.norms == hand.norms
    unscaled = ByHand().run(windows=windows, clip=CLIP)
    assert norms.norms == pytest.approx(unscaled.norms, rel=0.02)
    assert max(norms.norms) > CLIP
    assert max(norms.clipped[windows - 1 :: windows]) <= CLIP + 1e-6


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_what_overflows_is_skipped_as_by_hand():
    plugin, scaler = scaled(), torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-12)
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-12)
    callback = transfer()
    module = fitted(callback, plugins=plugin)
    assert_equal(module, callback, ByHand(autocast=torch.float16).run(scaler=scaler))
    assert plugin.scaler.get_scale() == scaler.get_scale() < 2.0**40


class Skipping(TwoGroups):
    """Three batches are skipped, once their loss is known."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in (0, 3, 7) else loss


def test_skipped_batches_train_the_paraphraser_and_nothing_else():
    callback = transfer()
    assert_equal(fitted(callback, Skipping), callback, ByHand(Skipping).run(skip=(0, 3, 7)))
    assert callback._translator.steps == STEPS - 3


# Precisions without autocast


class Doubles(Images):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x.double(), y


def test_a_module_in_double_precision():
    module, callback = made(ConvClassifier).double(), transfer(teacher=teacher().double())
    data = DataLoader(Doubles(), batch_size=BATCH)
    trainer(callback).fit(module, data, data)
    assert_equal(module, callback, ByHand(dtype=torch.float64).run())
    assert {value.dtype for part in helpers(callback) for value in part.values()} == {torch.float64}


class ByHandTrue(ByHand):
    """As the Trainer does with "64-true" and "bf16-true": steps make their tensors in that dtype."""

    def __init__(self, dtype):
        super().__init__(dtype=dtype)
        torch.set_default_dtype(dtype)
        try:
            self.translator = drawn(lambda: Translator(CHANNELS, FACTOR), self.helpers_dtype)
        finally:
            torch.set_default_dtype(torch.float32)
        self.helper = SGD(self.translator.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


@pytest.mark.parametrize(
    ("precision", "dtype", "of_helpers"),
    [("bf16-true", torch.bfloat16, torch.float32), ("64-true", torch.float64, torch.float64)],
)
def test_true_precisions_and_helpers_of_float32_or_better(precision, dtype, of_helpers):
    callback = transfer()
    module = fitted(callback, precision=precision)
    hand = ByHandTrue(dtype).run()
    paraphraser, translator = helpers(callback)
    assert difference(paraphraser, hand.paraphraser) == 0
    assert difference(translator, hand.translator) == 0
    assert difference(module, hand.module) == 0
    assert next(module.parameters()).dtype == dtype
    assert {value.dtype for part in helpers(callback) for value in part.values()} == {of_helpers}
    assert callback.teacher.head[2].weight.dtype == torch.float32  # it was only lent


# Manual optimisation


def test_the_mixin():
    callback = transfer()
    module, hand = fitted(callback, ConvMixin), ByHand(ConvMixin)
    hand.configure()
    hand.scheduler = None  # nobody steps it
    for x, y in hand.batches():
        hand.loss(x, y).backward()
        hand.step(torch.amp.GradScaler("cpu", enabled=False), None)
    assert_equal(module, callback, hand)


class TwoOptimizers(CompressionMixin, ConvClassifier):
    """A critic of the images steps first, then the network; as in a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def build(self) -> None:
        super().build()
        self.critic = nn.Linear(36, CLASSES)

    def critic_loss(self, batch):
        return F.cross_entropy(self.critic(batch[0].flatten(1)), batch[1])

    def training_step(self, batch, batch_idx):
        critic, network = self.optimizers()
        critic.zero_grad()
        self.manual_backward(self.critic_loss(batch))
        critic.step()
        network.zero_grad()
        self.manual_backward(self.compressed_loss(self.task_loss(batch)))
        network.step()

    def configure_optimizers(self):
        return SGD(self.critic.parameters(), lr=0.02), SGD(self.model.parameters(), lr=0.1, momentum=0.9)


class BothFirst(TwoOptimizers):
    """Both losses, then both steps: the translator's gradient is there already when the critic steps."""

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.critic_loss(batch))
        self.manual_backward(self.compressed_loss(self.task_loss(batch)))
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize(
    ("kind", "half"),
    [
        (TwoOptimizers, False),
        pytest.param(TwoOptimizers, True, marks=pytest.mark.slow),
        pytest.param(BothFirst, False, marks=pytest.mark.slow),
        (BothFirst, True),
    ],
)
def test_of_two_optimizers_the_one_that_trains_the_student_takes_the_translator_along(kind, half, tmp_path):
    pretrained = transfer()
    fitted(pretrained, **({"plugins": scaled()} if half else {}))
    pretrained.save_paraphraser(tmp_path / "paraphraser.pt")
    plugin, scaler = scaled(), torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=half)
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    callback = transfer(student="model", paraphraser=tmp_path / "paraphraser.pt")
    module = fitted(callback, kind, **({"plugins": plugin} if half else {}))
    hand = ByHand(kind, autocast=torch.float16 if half else None)
    critic, network = hand.module.configure_optimizers()
    for x, y in hand.batches():
        with casting(hand.autocast):
            loss = hand.module.critic_loss((x, y))
        for value, optimizers in ((loss, [critic]), (hand.loss(x, y), [hand.helper, network])):
            scaler.scale(value).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
    assert_equal(module, callback, hand)
    assert callback._translator.steps == STEPS


# Together with the other techniques

TASK, KD, AT = 0.4, 0.6, 5.0


def attention(student, taught):
    return sum(AT * C.attention_transfer_loss(student[name], taught[name]) for name in ("stage1", "stage2"))


def distillation(student, taught):
    return KD * C.distillation_loss(student["head"], taught["head"], 3.0)


# Each technique is first once and last once among the fast tests.
ORDERS = [
    pytest.param([(0, 1, 2), (1, 2, 0), (2, 0, 1)], id="rotations"),
    pytest.param([(0, 2, 1), (1, 0, 2), (2, 1, 0)], id="reflections", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("orders", ORDERS)
def test_three_techniques_in_every_order_equal_the_loop_and_share_one_teacher(orders):
    hand = ByHand(others=[("kd", TASK, distillation), ("at", 1.0, attention)]).run()
    alone = fitted(transfer())
    for order in orders:
        shared, forwards = teacher(), []
        shared.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        factors = transfer(teacher=shared)
        callbacks = [
            DistillationCallback(shared, temperature=3.0, task_weight=TASK, kd_weight=KD),
            AttentionTransferCallback(shared, pairs={"stage1": "stage1", "stage2": "stage2"}, weight=AT),
            factors,
        ]
        module = made(ConvClassifier)
        fitting = trainer(*(callbacks[index] for index in order))
        fitting.fit(module, feature_loader(), feature_loader())
        assert_equal(module, factors, hand)
        assert difference(module, alone) > 1e-4
        # One batch is looked at, the paraphraser sees all in each epoch; then one for each step and validation batch.
        assert len(forwards) == 1 + EPOCHS * STEPS + STEPS + STEPS
        assert fitting.callback_metrics["compress/ft/loss"].item() == hand.distances[-1]


# Other people's callbacks


class HeadFirst(ConvClassifier):
    def configure_optimizers(self):
        return SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


class Thaw(BaseFinetuning):
    """The stem is frozen in the first epoch; in the second it gets a group of its own."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.model.stem)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.stem, optimizer)


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_finetuning_that_adds_a_group_to_the_users_optimizer(first):
    callback, module = transfer(), made(HeadFirst)
    fitting = trainer(*([callback, Thaw()] if first else [Thaw(), callback]), max_epochs=2)
    fitting.fit(module, feature_loader(), feature_loader())
    hand = ByHand(HeadFirst)
    stem = list(hand.module.model.stem.parameters())

    def thaw(hand, epoch):
        for parameter in stem:
            parameter.requires_grad_(epoch == 1)
        if epoch == 1:
            hand.optimizer.add_param_group({"params": stem, "lr": 0.01})

    for parameter in stem:
        parameter.requires_grad_(False)
    hand.run(epochs=2, before_epoch=thaw)
    assert_equal(module, callback, hand)
    assert difference(module.model.stem, made(HeadFirst).model.stem) > 0
    groups = [{id(parameter) for parameter in group["params"]} for group in fitting.optimizers[0].param_groups]
    assert len(groups) == 2
    assert set.union(*groups) == {id(parameter) for parameter in module.parameters()}


# Resume


def counted(network: nn.Module) -> list[int]:
    """One entry for each forward of a network, to come."""
    forwards: list[int] = []
    network.register_forward_hook(lambda *_: forwards.append(1))
    return forwards


def saved_fit(folder, *callbacks, module=None, **settings):
    """Two epochs with a checkpoint after each, under conditions in which Lightning itself resumes exactly."""
    module = made(Lambda) if module is None else module
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fitting = trainer(*callbacks, keep, max_epochs=2, enable_checkpointing=True)
    fitting.fit(module, feature_loader(rows=32), feature_loader(rows=16), **settings)
    return module


def test_a_resumed_run_equals_the_whole_one_and_trains_no_paraphraser(tmp_path):
    control = [saved_fit(tmp_path / "plain"), made(Lambda, seed=7)]
    saved_fit(tmp_path / "again", module=control[1], ckpt_path=tmp_path / "plain" / "epoch=0.ckpt", weights_only=True)
    assert difference(*control) == 0

    whole, callback = made(Lambda), transfer()
    saved_fit(tmp_path, callback, module=whole)
    torch.manual_seed(99)  # another process need not have the seed
    module, resumed = made(Lambda, seed=7), transfer()
    forwards = counted(resumed.teacher)
    saved_fit(tmp_path / "b", resumed, module=module, ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert difference(module, whole) == 0
    assert difference(module, control[0]) > 1e-4
    ours, theirs = resumed.state_dict(), callback.state_dict()
    assert difference(ours["paraphraser"], theirs["paraphraser"]) == 0
    assert difference(ours["translator"]["module"], theirs["translator"]["module"]) == 0
    momentum, expected = (state["translator"]["optimizer"]["state"] for state in (ours, theirs))
    assert len(momentum) == 6
    assert all(torch.equal(momentum[k]["momentum_buffer"], expected[k]["momentum_buffer"]) for k in expected)
    assert ours["translator"]["steps"] == 8
    assert resumed.reconstruction_errors == callback.reconstruction_errors
    assert len(callback.reconstruction_errors) == EPOCHS
    assert len(forwards) == 4 + 2  # the steps of the second epoch, and its validation


@pytest.mark.sample
def test_what_is_saved_after_the_test_of_a_file_is_that_file_again(tmp_path):
    saved_fit(tmp_path, transfer())
    callback, module = transfer(), made(Lambda)
    fitting = trainer(callback, max_epochs=3)
    fitting.fit(module, feature_loader())
    before = copy.deepcopy(callback.state_dict())
    fitting.validate(module, feature_loader(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    fitting.save_checkpoint(tmp_path / "again.ckpt")
    file, again = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("epoch=0", "again"))
    assert difference(file["state_dict"], again["state_dict"]) == 0
    found, saved = (own["callbacks"][callback.state_key] for own in (again, file))
    assert difference(found["translator"]["module"], saved["translator"]["module"]) == 0
    assert difference(found["translator"]["module"], before["translator"]["module"]) > 0
    assert difference(found["paraphraser"], saved["paraphraser"]) == 0
    assert difference(callback.factor_networks[0].state_dict(), saved["paraphraser"]) == 0
    assert found["reconstruction_errors"] == saved["reconstruction_errors"]


def test_a_resume_without_the_callback_and_one_that_adds_it(tmp_path):
    plain, callback = saved_fit(tmp_path / "plain"), transfer()
    saved_fit(tmp_path / "with", callback)
    checkpoints = [tmp_path / folder / "epoch=0.ckpt" for folder in ("plain", "with")]
    without = saved_fit(tmp_path / "a", ckpt_path=checkpoints[1], weights_only=True)
    assert list(without.state_dict()) == list(plain.state_dict())
    assert difference(without, plain) > 0
    by_hand = made(Lambda)
    saved = torch.load(checkpoints[1], weights_only=True)
    by_hand.load_state_dict(saved["state_dict"], strict=True)
    optimizer, scheduler = by_hand.configure_optimizers().values()
    optimizer.load_state_dict(saved["optimizer_states"][0])
    scheduler["scheduler"].load_state_dict(saved["lr_schedulers"][0])
    for batch in feature_loader(rows=32):
        optimizer.zero_grad()
        by_hand.task_loss(batch).backward()
        optimizer.step()
        scheduler["scheduler"].step()
    assert difference(without, by_hand) == 0

    added = transfer()
    forwards = counted(added.teacher)
    module = saved_fit(tmp_path / "b", added, ckpt_path=checkpoints[0], weights_only=True)
    assert difference(helpers(added)[0], helpers(callback)[0]) == 0  # trained now, on the same features
    assert added._translator.steps == 4
    assert len(forwards) == 1 + EPOCHS * 4 + 4 + 2
    assert difference(module, plain) > 0


# Pre-training leaves no trace


class Noisy(Images):
    """Augmented with the global random states of all three libraries."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(1, 1, 1) + 0.1 * random.random() + 0.1 * np.random.rand(), y  # noqa: NPY002


class Dropping(ConvClassifier):
    """Batch norm, dropout inside and before the network, a metric, a list that grows, and a counter."""

    norm = True

    def __init__(self) -> None:
        super().__init__()
        self.model.stage1.append(nn.Dropout(0.3))
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.sizes, self.seen = [], 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen += 1
        self.sizes.append(len(x))
        logits = self.model(F.dropout(x, 0.1))
        self.accuracy(logits, y)
        self.log("train_accuracy", self.accuracy, on_step=True, on_epoch=True)
        return F.cross_entropy(logits, y)


def loaders(form: str):
    """A loader, and what the random numbers of its order come from."""
    if form == "the global state":
        return DataLoader(Noisy(), batch_size=BATCH, shuffle=True), None
    generator = torch.Generator().manual_seed(5)
    return DataLoader(Noisy(), batch_size=BATCH, shuffle=True, generator=generator), generator


def run_from_seed(callback, form):
    torch.manual_seed(12)
    np.random.seed(12)  # noqa: NPY002
    random.seed(12)
    module, (data, generator) = made(Dropping), loaders(form)
    fitting = trainer(callback, max_epochs=2)
    fitting.fit(module, data, feature_loader())
    random_states = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    return module, fitting.callback_metrics, random_states, None if generator is None else generator.get_state()


@pytest.mark.parametrize("form", ["its own generator", pytest.param("the global state", marks=pytest.mark.slow)])
def test_a_run_that_pretrained_equals_one_that_loaded_the_paraphraser(form, tmp_path):
    callback = transfer(pretrain_epochs=3)
    trained = run_from_seed(callback, form)
    callback.save_paraphraser(tmp_path / "paraphraser.pt")
    loaded = transfer(paraphraser=tmp_path / "paraphraser.pt")
    other = run_from_seed(loaded, form)
    assert [difference(ours, theirs) for ours, theirs in zip(helpers(callback), helpers(loaded), strict=True)] == [0, 0]
    assert difference(trained[0], other[0]) == 0
    assert loaded.reconstruction_errors == []
    assert len(callback.reconstruction_errors) == 3
    for module in (trained[0], other[0]):
        assert module.sizes == [BATCH] * STEPS * 2
        assert module.seen == 2 * STEPS
        assert module.model.stem[1].num_batches_tracked == 2 * STEPS
    assert {key: value.item() for key, value in trained[1].items()} == {k: v.item() for k, v in other[1].items()}
    assert {"train_accuracy_epoch", "compress/ft/loss", "compress/ft/val_loss"} <= set(trained[1])
    assert torch.equal(trained[2][0], other[2][0])
    assert trained[2][1:] == other[2][1:]
    if form == "its own generator":
        assert torch.equal(trained[3], other[3])


def test_the_order_of_a_shuffled_loader_is_that_of_a_run_without_the_callback():
    plain, callback = run_from_seed(L.Callback(), "the global state"), transfer()
    state = RandomState()
    ours = run_from_seed(callback, "the global state")
    assert difference(plain[0], ours[0]) > 1e-4
    state.restore()
    assert torch.equal(plain[2][0], ours[2][0])
    assert plain[2][1:] == ours[2][1:]


# Two processes


class Halves(L.LightningDataModule):
    """Each rank has its half of each batch, and a seed of its own."""

    def setup(self, stage):
        torch.manual_seed(100 + self.trainer.global_rank)

    def train_dataloader(self):
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        return DataLoader(Images(), batch_size=BATCH // ranks, sampler=EverySecond(rank, ranks))

    val_dataloader = train_dataloader


def run_ranks(folder: Path, ranks: int) -> None:
    """Leave what each rank has at the end."""
    callback = transfer()
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo") if ranks > 1 else "auto"

    class Keeping(L.Callback):
        def teardown(self, trainer, pl_module, stage):
            paraphraser, translator = helpers(callback)
            kept = {
                "module": pl_module.state_dict(),
                "paraphraser": paraphraser,
                "translator": translator,
                "errors": callback.reconstruction_errors,
                "val_loss": float(trainer.callback_metrics["compress/ft/val_loss"]),
            }
            torch.save(kept, folder / f"{trainer.global_rank}-of-{ranks}.pt")

    fitting = trainer(callback, Keeping(), devices=ranks, use_distributed_sampler=False, strategy=strategy)
    fitting.fit(made(Lambda), datamodule=Halves())


@pytest.mark.slow
def test_two_ranks_are_equal_and_equal_one_process_on_whole_batches(tmp_path):
    subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    run_ranks(tmp_path, 1)
    alone, first, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("0-of-1", "0-of-2", "1-of-2")
    )
    for part in ("module", "paraphraser", "translator"):
        assert difference(first[part], second[part]) == 0
        assert difference(first[part], alone[part]) <= 1e-6
    for key in ("errors", "val_loss"):
        assert first[key] == second[key]
        assert first[key] == pytest.approx(alone[key], abs=1e-6)
    assert len(first["errors"]) == EPOCHS
    assert difference(first["module"], made(Lambda)) > 0.01


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_ranks(Path(sys.argv[1]), 2)
