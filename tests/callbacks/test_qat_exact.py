"""QATCallback against training loops written by hand, with every formula written out.

Grids that stay or follow are computed as the library does, one operation after the other, so weights are equal bit for
bit. Gradients of learned steps are sums, here by autograd and there in another order, so these are equal to 1e-6, as
long as no number lies so near to a boundary that it is rounded to another integer.
"""

from __future__ import annotations

import functools
import math

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from contract.modules import BATCH, STEPS, scaled, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import PTQCallback, QATCallback

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
OWN = {SGD: {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}, ADAMW: {"lr": 0.01, "weight_decay": 0.3}}
BITS = 4
WEIGHT, ACTIVATION = 2 ** (BITS - 1) - 1, 2**BITS - 1  # the largest integers
SUMS = 1e-6


class Straight(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu, self.last = nn.ReLU(), nn.Linear(4 * 16, 3)

    def forward(self, x):
        return self.last(self.relu(self.norm(self.conv(x))).flatten(1))

    def quantised(self, x, weight, activation):
        x = activation("in:conv:conv2d:0", x)
        x = F.relu(self.norm(F.conv2d(x, weight("conv.weight"), padding=1)))
        return F.linear(activation("relu:relu:0", x).flatten(1), weight("last.weight"), self.last.bias)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm, self.relu, self.last = nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4 * 16, 3)

    def forward(self, x):
        x = self.relu(self.stem(x))
        return self.last(self.relu(x + self.norm(self.body(x))).flatten(1))

    def quantised(self, x, weight, activation):
        x = activation("in:stem:conv2d:0", x)
        x = activation("relu:relu:0", F.relu(F.conv2d(x, weight("stem.weight"), self.stem.bias, padding=1)))
        y = activation("norm:batch_norm:0", self.norm(F.conv2d(x, weight("body.weight"), padding=1)))
        x = activation("relu#1:relu:0", F.relu(x + y))
        return F.linear(x.flatten(1), weight("last.weight"), self.last.bias)


pytestmark = [
    pytest.mark.sample,  # fits on grids, and the same by hand
    pytest.mark.filterwarnings("ignore:.*beyond the ends of their grids"),  # which fit what did not train
]
KINDS = pytest.mark.parametrize("kind", [Straight, Residual])


def network(kind):
    torch.manual_seed(5)
    return kind()


class Lit(L.LightningModule):
    def __init__(self, kind, make=SGD):
        super().__init__()
        self.model, self.make = network(kind), make

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.model(batch[0]), batch[1]))

    def train_dataloader(self):
        return images()

    def configure_optimizers(self):
        return self.make(self.parameters(), **OWN[self.make])


def images(size=1.0):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(BATCH * STEPS, 1, 4, 4, generator=generator)
    return DataLoader(TensorDataset(size * inputs, inputs.flatten(1)[:, :3].argmax(dim=1)), batch_size=BATCH)


# The three kinds of grids


def straight_through(x, step, lowest, highest):
    """The nearest points of a grid; the gradient is 1 where the nearest integer is one of the grid's, else 0."""
    integers = torch.round(x.float() / step)
    passed = x * ((integers >= lowest) & (integers <= highest))
    return (torch.clamp(integers, lowest, highest) * step).to(x.dtype).detach() + (passed - passed.detach())


def along_rows(step, weight):
    return step.reshape(-1, *[1] * (weight.ndim - 1))


class Fixed:
    """Where the grids begin, they stay."""

    def __init__(self, net, grids):
        self.net = net
        self.steps = {name: grid.step for name, grid in grids.weights.items()}
        self.activations = {key: (grid.scale, grid.zero_point) for key, grid in grids.activations.items()}

    def weight(self, name):
        weight = self.net.get_parameter(name)
        return straight_through(weight, along_rows(self.step_of(name), weight), -WEIGHT, WEIGHT)

    def activation(self, key, x):
        scale, zero_point = self.activations[key]
        return straight_through(x, torch.tensor(scale), -zero_point, ACTIVATION - zero_point)

    def step_of(self, name):
        return self.steps[name]

    def before_step(self, scaler, lr):
        pass

    def after_step(self):
        pass

    def freeze(self):
        pass

    def found(self):
        return {name: self.step_of(name) for name in self.steps}, self.activations


class Observed(Fixed):
    """Weights by their largest magnitude, activations by moving averages with a momentum of 0.1."""

    def __init__(self, net, grids):
        super().__init__(net, grids)
        self.ranges = {
            key: (-zero_point * scale, (ACTIVATION - zero_point) * scale)
            for key, (scale, zero_point) in self.activations.items()
        }
        self.seen = {key: [] for key in self.ranges}
        self.frozen = None

    def step_of(self, name):
        if self.frozen is not None:
            return self.frozen[name]
        return self.net.get_parameter(name).detach().flatten(1).abs().amax(dim=1) / WEIGHT

    def activation(self, key, x):
        self.seen[key] += [float(x.detach().min()), float(x.detach().max())]
        return super().activation(key, x)

    def after_step(self):
        for key, seen in self.seen.items():
            if self.frozen is None and seen:
                low, high = self.ranges[key]
                low += 0.1 * (min(*seen, 0.0) - low)
                high += 0.1 * (max(*seen, 0.0) - high)
                scale = float(np.float32((high - low) / ACTIVATION))
                self.ranges[key] = low, high
                self.activations[key] = scale, int(np.clip(np.round(-low / scale), 0, ACTIVATION))
            seen.clear()

    def freeze(self):
        if self.frozen is None:
            self.frozen = {name: self.step_of(name) for name in self.steps}


class Learned(Fixed):
    """Each step is where it began times a factor, which Adam moves."""

    step_lr, eps = 1e-2, 1e-12

    def __init__(self, net, grids):
        super().__init__(net, grids)
        self.factors = {key: nn.Parameter(torch.ones(())) for key in self.activations}
        self.factors |= {name: nn.Parameter(torch.ones(len(step))) for name, step in self.steps.items()}
        self.optimizer = torch.optim.Adam(self.factors.values(), lr=self.step_lr, eps=self.eps)
        self.top = 0.0

    def lsq(self, x, step, lowest, highest, positive):
        """Rounding passes the gradient on, clipping does not; that of the step is scaled by 1 / sqrt(N * Qp)."""
        scale = 1 / math.sqrt(x.numel() / step.numel() * positive)
        step = step * scale + (step - step * scale).detach()
        ratio = F.hardtanh(x.float() / step, lowest, highest)  # clamp passes the gradient at its ends up to torch 2.13
        return ((ratio + (ratio.round() - ratio).detach()) * step).to(x.dtype)

    def weight(self, name):
        weight = self.net.get_parameter(name)
        step = along_rows(self.steps[name] * self.factors[name], weight)
        return self.lsq(weight, step, -WEIGHT, WEIGHT, WEIGHT)

    def activation(self, key, x):
        scale, zero_point = self.activations[key]
        return self.lsq(x, scale * self.factors[key], -zero_point, ACTIVATION - zero_point, ACTIVATION)

    def before_step(self, scaler, lr):
        self.top = max(self.top, lr)
        self.optimizer.param_groups[0]["lr"] = self.step_lr * lr / self.top
        if scaler.is_enabled():
            scaler.unscale_(self.optimizer)
            scaler.step(self.optimizer)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        for factor in self.factors.values():
            factor.data.clamp_(min=0.05)

    def found(self):
        steps = {name: step * self.factors[name].detach() for name, step in self.steps.items()}
        scales = {key: (scale * self.factors[key].item(), zero) for key, (scale, zero) in self.activations.items()}
        return steps, scales


BY_HAND = {"mse": Fixed, "observed": Observed, "learned": Learned}
STEP_SIZES = pytest.mark.parametrize("step_size", list(BY_HAND))


def scaling():
    """A scaler whose first steps are skipped, because gradients overflow."""
    plugin = scaled()
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    return {"plugins": [plugin]}


@functools.cache
def calibrated(kind, step_size, begin=0, make=SGD, windows=1, autocast=None):
    """The grids that PTQCallback finds with the same settings, after so many steps of plain training."""
    observer, weight_range = ("minmax", "max") if step_size == "observed" else ("mse", "mse")
    ptq = PTQCallback(
        weight_bits=BITS,
        activation_bits=BITS,
        observer=observer,
        weight_range=weight_range,
        reestimate_batchnorm=True,
    )
    precision = {None: {}, torch.bfloat16: {"precision": "bf16-mixed"}, torch.float16: scaling()}[autocast]
    fitting = trainer(ptq, max_epochs=-1, max_steps=begin, accumulate_grad_batches=windows, **precision)
    if begin:
        fitting.fit(Lit(kind, make), images())
    else:
        fitting.validate(Lit(kind, make), images(), verbose=False)
    return ptq.quantization


def by_hand(
    kind,
    step_size,
    *,
    begin=0,
    make=SGD,
    windows=1,
    clip=None,
    autocast=None,
    scaler=None,
    freeze_norm=math.inf,
    freeze_grids=math.inf,
    schedule=None,
):
    """A plain loop over the network's own formula with weights and activations rounded."""
    grids = calibrated(kind, step_size, begin, make, windows, autocast)
    net = network(kind)
    optimizer = make(net.parameters(), **OWN[make])
    scheduler = None if schedule is None else schedule(optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
    rounding, done = None, 0
    for index, (x, y) in enumerate(images()):
        if done >= begin and rounding is None:
            rounding = BY_HAND[step_size](net, grids)
        if done >= freeze_grids:
            rounding.freeze()
        if done >= freeze_norm:
            for layer in net.modules():
                layer.train(not isinstance(layer, nn.BatchNorm2d))
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            output = net(x) if rounding is None else net.quantised(x, rounding.weight, rounding.activation)
            loss = F.cross_entropy(output, y)
        scaler.scale(loss / windows).backward()
        if (index + 1) % windows:
            continue
        done += 1
        if rounding is not None:
            rounding.before_step(scaler, optimizer.param_groups[0]["lr"])
        scaler.unscale_(optimizer)
        if clip is not None:
            clip(net.parameters())
        if scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        if rounding is not None:
            rounding.after_step()
    return net, rounding


def trained(kind, step_size, *, make=SGD, callback=None, lit=Lit, validation=None, **settings):
    module = lit(kind, make)
    given = {"freeze_batchnorm_at": 1.0, "freeze_observers_at": 1.0, **(callback or {})}
    if step_size != "observed":
        del given["freeze_observers_at"]
    qat = QATCallback(weight_bits=BITS, activation_bits=BITS, step_size=step_size, **given)
    trainer(qat, **settings).fit(module, images(), validation)
    return module.model, qat


def assert_same(ours, theirs, tolerance=0.0):
    """Weights and statistics, and the grids of the end."""
    (model, qat), (net, rounding) = ours, theirs
    expected, start = net.state_dict(), network(type(net)).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            value, expected[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert float((expected["last.weight"] - start["last.weight"]).abs().max()) > 1e-3
    steps, activations = rounding.found()
    grids = qat.quantization
    assert set(grids.weights) == set(steps)
    assert set(grids.activations) == set(activations)
    for name, step in steps.items():
        torch.testing.assert_close(grids.weights[name].step, step, rtol=tolerance, atol=0)
    for key, (scale, zero_point) in activations.items():
        assert grids.activations[key].scale == pytest.approx(scale, rel=tolerance, abs=0)
        assert grids.activations[key].zero_point == zero_point


def tolerance_of(step_size):
    return SUMS if step_size == "learned" else 0.0


@KINDS
@STEP_SIZES
def test_the_plain_loop(kind, step_size):
    """It is validated in between, on other numbers, of which nothing is taken in."""
    hand = by_hand(kind, step_size)
    ours = trained(kind, step_size, validation=images(size=3.0), val_check_interval=2, limit_val_batches=1)
    assert_same(ours, hand, tolerance_of(step_size))


@KINDS
@STEP_SIZES
def test_it_begins_with_the_grids_of_ptq(kind, step_size):
    expected = calibrated(kind, step_size)
    _, qat = trained(kind, step_size)
    begun = qat.state_dict()["start_grids"]
    assert {name: entry["step"].tolist() for name, entry in begun["weights"].items()} == {
        name: grid.step.tolist() for name, grid in expected.weights.items()
    }
    assert begun["activations"] == expected.state()["activations"]
    assert begun["sites"] == expected.state()["sites"]
    assert begun["statistics"] == {}  # those of the network itself count
    moved = {name: grid.step.tolist() for name, grid in qat.quantization.weights.items()} != {
        name: entry["step"].tolist() for name, entry in begun["weights"].items()
    }
    assert moved == (step_size != "mse")


@KINDS
@STEP_SIZES
def test_accumulation(kind, step_size):
    """Averages take in what was reached in both batches of a step; steps learn from the sum."""
    hand = by_hand(kind, step_size, windows=2)
    assert_same(trained(kind, step_size, accumulate_grad_batches=2), hand, tolerance_of(step_size))


@STEP_SIZES
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping(step_size, algorithm):
    """Of the user's parameters; the steps that learn are none of them."""
    clips = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}
    hand = by_hand(Straight, step_size, clip=lambda parameters: clips[algorithm](parameters, 0.05))
    ours = trained(Straight, step_size, gradient_clip_val=0.05, gradient_clip_algorithm=algorithm)
    assert_same(ours, hand, tolerance_of(step_size))


@KINDS
@STEP_SIZES
def test_adamw(kind, step_size):
    """Of gradients near 0 it makes steps of any size, so that those of another order of summation differ by more."""
    hand = by_hand(kind, step_size, make=ADAMW)
    ours = trained(kind, step_size, make=ADAMW)
    assert_same(ours, hand, 10 * tolerance_of(step_size))


@KINDS
@STEP_SIZES
def test_bf16(kind, step_size):
    hand = by_hand(kind, step_size, autocast=torch.bfloat16)
    assert_same(trained(kind, step_size, precision="bf16-mixed"), hand, tolerance_of(step_size))


@STEP_SIZES
def test_a_real_scaler(step_size):
    """16-mixed; that of the steps that learn is the user's, too."""
    counted = []

    class Counting(torch.amp.GradScaler):
        def step(self, optimizer):
            counted.append(self.get_scale())
            return super().step(optimizer)

    plugins = scaling()["plugins"]
    plugins[0].scaler = Counting("cpu", init_scale=2.0**24)
    ours = trained(Straight, step_size, plugins=plugins)
    assert len(counted) == STEPS * (2 if step_size == "learned" else 1)
    assert counted[0] > counted[-1]  # a step was skipped
    hand = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    expected = by_hand(Straight, step_size, autocast=torch.float16, scaler=hand)
    assert_same(ours, expected, tolerance_of(step_size))


@KINDS
@STEP_SIZES
def test_from_the_middle(kind, step_size):
    """Before that the training is the plain one; the grids are those of the weights of then."""
    hand = by_hand(kind, step_size, begin=4)
    assert_same(trained(kind, step_size, callback={"start": 0.5}), hand, tolerance_of(step_size))


@STEP_SIZES
def test_from_the_middle_with_accumulation(step_size):
    hand = by_hand(Straight, step_size, begin=2, windows=2)
    ours = trained(Straight, step_size, callback={"start": 0.5}, accumulate_grad_batches=2)
    assert_same(ours, hand, tolerance_of(step_size))


@KINDS
@STEP_SIZES
@pytest.mark.parametrize("at", [0.5, 0.0])
def test_batch_norm_is_frozen(kind, step_size, at):
    """Then it uses its running statistics, which stay as they are."""
    hand = by_hand(kind, step_size, freeze_norm=8 * at)
    ours = trained(kind, step_size, callback={"freeze_batchnorm_at": at})
    assert_same(ours, hand, tolerance_of(step_size))
    assert int(ours[0].norm.num_batches_tracked) == 8 * at
    assert ours[0].norm.training


@KINDS
@pytest.mark.parametrize("at", [0.0, 0.5])
def test_grids_that_follow_are_frozen(kind, at):
    hand = by_hand(kind, "observed", freeze_grids=8 * at)
    assert_same(trained(kind, "observed", callback={"freeze_observers_at": at}), hand)


@KINDS
@STEP_SIZES
def test_everything_as_it_is_by_default(kind, step_size):
    """Grids that follow are frozen after three quarters, and batch norm not at all, as the learning rate stays."""
    hand = by_hand(kind, step_size, freeze_grids=6)
    defaults = {"freeze_batchnorm_at": "auto", "freeze_observers_at": "auto"}
    assert_same(trained(kind, step_size, callback=defaults), hand, tolerance_of(step_size))


class Scheduled(Lit):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm(optimizer), "interval": "step"}}


def warm(optimizer):
    """Up and down again."""
    shares = [0.2, 0.6, 1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.1]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shares[step])


def test_the_learning_rate_of_steps_falls_with_the_users():
    hand = by_hand(Straight, "learned", schedule=warm)
    assert_same(trained(Straight, "learned", lit=Scheduled), hand, SUMS)
    steady = by_hand(Straight, "learned")[1].found()[1]
    assert hand[1].found()[1]["relu:relu:0"][0] != pytest.approx(steady["relu:relu:0"][0], rel=1e-3)


def test_steps_that_learn_fast_stay_positive(monkeypatch):
    """Adam moves a factor by its learning rate in its first step, whatever the gradient: some would be below 0."""
    monkeypatch.setattr(Learned, "step_lr", 1.5)
    hand = by_hand(Straight, "learned")
    ours = trained(Straight, "learned", callback={"step_lr": 1.5, "max_loss_growth": None})
    assert_same(ours, hand, 1e-5)
    assert min(factor.min().item() for factor in hand[1].factors.values()) == pytest.approx(0.05)
