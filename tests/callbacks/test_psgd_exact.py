"""PSGDCallback against training loops written by hand: weights are equal, bit for bit."""

from __future__ import annotations

import copy

import lightning.pytorch as L
import pytest
import torch
from contract.modules import BATCH, STEPS, scaled, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import PruningCallback, PSGDCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*held at their floor")
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 3),
    )


SELECTED = ("0.weight", "3.weight", "6.weight", "6.bias")  # neither the bias of a convolution nor a norm


class Lit(L.LightningModule):
    def __init__(self, make=torch.optim.SGD, **settings):
        super().__init__()
        torch.manual_seed(5)
        self.model = network()
        self.make, self.settings = make, settings or SGD

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.make(self.parameters(), **self.settings)


def images():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(BATCH * STEPS, 1, 4, 4, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs.flatten(1)[:, :3].argmax(dim=1)), batch_size=BATCH)


def distance(weight, bits, eps=0.0, axis=None, target="grid"):
    """|w - wbar| + eps, or |w| + eps, as the paper has them."""
    weight = weight.detach().clone()
    if target == "zero":
        return weight.abs() + eps
    limit = 2 ** (bits - 1) - 1
    rows = weight.flatten(1).abs().amax(dim=1) if axis == 0 and weight.ndim > 1 else weight.abs().max()
    step = (rows / limit).reshape(-1, *[1] * (weight.ndim - 1)) if rows.ndim else rows / limit
    return (weight - step * torch.clamp(torch.round(weight / step), -limit, limit)).abs() + eps


def chosen(model):
    return {name: parameter for name, parameter in model.named_parameters() if name in SELECTED}


def lambda_for(model, mean_factor=3.0, **settings):
    distances = [distance(weight, **settings).double().flatten() for weight in chosen(model).values()]
    return mean_factor / float(torch.cat(distances).mean())


def by_hand(
    make=torch.optim.SGD,
    *,
    lambda_s=None,
    windows=1,
    clip=None,
    autocast=None,
    scaler=None,
    update=False,
    before_step=None,
    steps=STEPS,
    grid=None,
    **settings,
):
    """A plain loop that scales gradients, or updates, with the formula of the paper."""
    torch.manual_seed(5)
    model, grid = network(), {"bits": 4, **(grid or {})}
    optimizer = make(model.parameters(), **(settings or SGD))
    scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
    for index, (x, y) in enumerate(images()):
        if index == steps:
            break
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss / windows).backward()
        if (index + 1) % windows:
            continue
        scaler.unscale_(optimizer)
        finite = all(bool(weight.grad.isfinite().all()) for weight in model.parameters())
        lambda_s = lambda_for(model, **grid) if lambda_s is None else lambda_s
        factors = {name: lambda_s * distance(weight, **grid) for name, weight in chosen(model).items()}
        old = {name: weight.detach().clone() for name, weight in chosen(model).items()}
        if not update:
            for name, weight in chosen(model).items():
                weight.grad *= factors[name]
        if clip is not None:
            clip(model.parameters())
        if scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if update and finite:
            decay = optimizer.param_groups[0]
            kept = 1 - decay["lr"] * decay["weight_decay"] if decay.get("decoupled_weight_decay") else 1
            for name, weight in chosen(model).items():
                base = old[name] * kept
                weight.data = base + factors[name] * (weight.data - base)
        optimizer.zero_grad()
    return model


def trained(make=torch.optim.SGD, *, callback=None, optimizer=None, others=(), **settings):
    module = Lit(make, **(optimizer or {}))
    psgd = PSGDCallback(**{"quantized_validation": False, **(callback or {})})
    trainer(psgd, *others, **settings).fit(module, images())
    return module.model, psgd


def assert_same(ours, theirs):
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, expected[name]), name
    start = network()
    assert not torch.equal(next(iter(ours.parameters())), next(iter(start.parameters())))


@pytest.mark.parametrize(
    "grid",
    [
        {},
        {"bits": 2, "eps": 0.01},
        {"axis": 0},
        {"target": "zero", "eps": 0.01},
    ],
    ids=["4 bits", "2 bits, eps", "per channel", "towards zero"],
)
def test_the_plain_loop(grid):
    own = {key: value for key, value in grid.items() if key != "axis"}
    own |= {} if "target" in grid else {"edge_bits": None}
    model, psgd = trained(callback={**own, **({"granularity": "channel"} if "axis" in grid else {})})
    torch.manual_seed(5)
    start = lambda_for(network(), **{"bits": 4, **grid})
    assert psgd.lambda_s == pytest.approx(start, rel=1e-6)
    assert_same(model, by_hand(lambda_s=psgd.lambda_s, grid=grid))


def test_the_authors_scale_is_taken_as_it_is():
    model, psgd = trained(callback={"gradient_scale": 150})
    assert psgd.lambda_s == 150.0
    assert_same(model, by_hand(lambda_s=150.0))


@pytest.mark.sample
def test_nesterov():
    own = {"lr": 0.05, "momentum": 0.9, "nesterov": True}
    model, psgd = trained(optimizer=own)
    assert_same(model, by_hand(lambda_s=psgd.lambda_s, **own))


def test_accumulation():
    """Once a window, on the sum."""
    model, psgd = trained(accumulate_grad_batches=4)
    assert psgd.effects["the scaled step"] == STEPS // 4
    assert_same(model, by_hand(lambda_s=psgd.lambda_s, windows=4))


def test_bf16():
    model, psgd = trained(precision="bf16-mixed")
    assert_same(model, by_hand(lambda_s=psgd.lambda_s, autocast=torch.bfloat16))


def test_a_real_scaler():
    """16-mixed, where the first steps are skipped because their gradients overflow."""
    counted = []

    class Counting(torch.amp.GradScaler):
        def step(self, optimizer):
            counted.append(self.get_scale())
            return super().step(optimizer)

    plugin = scaled()
    plugin.scaler = Counting("cpu", init_scale=2.0**24)
    model, psgd = trained(plugins=[plugin])
    assert len(counted) == STEPS
    assert counted[0] > counted[-1]  # a step was skipped
    hand = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    assert_same(model, by_hand(lambda_s=psgd.lambda_s, autocast=torch.float16, scaler=hand))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_sees_the_scaled_gradients(algorithm):
    clips = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}
    model, psgd = trained(gradient_clip_val=0.05, gradient_clip_algorithm=algorithm)
    hand = by_hand(lambda_s=psgd.lambda_s, clip=lambda parameters: clips[algorithm](parameters, 0.05))
    assert_same(model, hand)


ADAPTIVE = [
    (torch.optim.Adam, {"lr": 0.01}),
    (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.3}),
    (torch.optim.NAdam, {"lr": 0.01, "weight_decay": 0.3, "decoupled_weight_decay": True}),
    (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9}),
    (torch.optim.Adagrad, {"lr": 0.05}),
]


@pytest.mark.parametrize(("make", "own"), ADAPTIVE, ids=lambda value: getattr(value, "__name__", ""))
def test_what_adaptive_optimizers_add_is_scaled(make, own):
    model, psgd = trained(make, optimizer=own)
    assert psgd.effects["the scaled step"] == STEPS
    assert_same(model, by_hand(make, lambda_s=psgd.lambda_s, update=True, **own))


@pytest.mark.parametrize("fused", [False, True])
def test_adam_with_a_real_scaler(fused):
    """A step that is skipped leaves the weights alone, decay included."""
    plugin, own = scaled(), {"lr": 0.01, "weight_decay": 0.3, "fused": fused}
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    model, psgd = trained(torch.optim.AdamW, optimizer=own, plugins=[plugin])
    assert 0 < psgd.effects["the scaled step"] < STEPS
    hand = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    expected = by_hand(
        torch.optim.AdamW, lambda_s=psgd.lambda_s, update=True, autocast=torch.float16, scaler=hand, **own
    )
    assert_same(model, expected)


@pytest.mark.parametrize(("make", "own", "way"), [(torch.optim.SGD, SGD, "update"), (*ADAPTIVE[0], "gradient")])
def test_a_way_that_is_asked_for(make, own, way):
    model, psgd = trained(make, optimizer=own, callback={"apply_to": way})
    assert_same(model, by_hand(make, lambda_s=psgd.lambda_s, update=way == "update", **own))


class Manual(Lit):
    """Two optimizers that take turns, of which one has two steps a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer, repeats in zip(self.optimizers(), (2, 1), strict=True):
            for _ in range(repeats):
                self.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

    def configure_optimizers(self):
        return two_optimizers(self.model)


def two_optimizers(model):
    """SGD for the convolutions, Adam for the head."""
    return [torch.optim.SGD(model[:5].parameters(), **SGD), torch.optim.Adam(model[6].parameters(), lr=0.01)]


def test_manual_optimisation_with_two_optimizers():
    module, psgd = Manual(), PSGDCallback(quantized_validation=False)
    trainer(psgd).fit(module, images())

    torch.manual_seed(5)
    model = network()
    lambda_s = lambda_for(model, bits=4)
    assert psgd.lambda_s == pytest.approx(lambda_s, rel=1e-6)
    first, second = two_optimizers(model)
    for x, y in images():
        for optimizer in (first, first, second):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            old = {name: weight.detach().clone() for name, weight in chosen(model).items()}
            factors = {name: psgd.lambda_s * distance(weight, 4) for name, weight in old.items()}
            if optimizer is first:
                for name in ("0.weight", "3.weight"):
                    chosen(model)[name].grad *= factors[name]
            optimizer.step()
            if optimizer is second:
                for name in ("6.weight", "6.bias"):
                    weight = chosen(model)[name]
                    weight.data = old[name] + factors[name] * (weight.data - old[name])
    assert psgd.effects["the scaled step"] == 3 * STEPS
    assert_same(module.model, model)


@pytest.mark.sample
@pytest.mark.parametrize(("make", "own"), [(torch.optim.SGD, SGD), ADAPTIVE[2]], ids=["SGD", "AdamW"])
def test_a_resumed_run_equals_the_whole(make, own, tmp_path):
    """The scale is that of the first step of the first run."""

    def run(path, steps, ckpt_path=None):
        module, psgd = Lit(make, **own), PSGDCallback()
        saving = ModelCheckpoint(path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
        fitting = trainer(psgd, saving, max_epochs=-1, max_steps=steps, enable_checkpointing=True)
        fitting.fit(module, images(), images(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return module.model, psgd

    whole, first = run(tmp_path / "whole", 2 * STEPS)
    resumed, second = run(tmp_path / "resumed", 2 * STEPS, tmp_path / "whole" / f"step={STEPS}.ckpt")
    assert second.lambda_s == first.lambda_s
    assert second.effects["the scaled step"] == STEPS
    assert all(torch.equal(second._start[name], value) for name, value in first._start.items())
    assert_same(resumed, whole)


@pytest.mark.sample
@pytest.mark.parametrize("score", ["magnitude", "taylor"])
def test_with_pruning_in_both_orders(score):
    """The factor is that of the dense weight, and pruning sees the gradient of the loss."""

    def run(*order):
        both = {
            "psgd": PSGDCallback(target="zero", eps=0.01),
            "pruning": PruningCallback(0.5, end=0.5, score=score, exclude=["model.6"]),
        }
        module = Lit()
        trainer(*(both[name] for name in order)).fit(module, images())
        return module.model, both

    first, both = run("psgd", "pruning")
    last, others = run("pruning", "psgd")
    assert_same(first, last)
    masks, theirs = both["pruning"].masks, others["pruning"].masks
    assert all(torch.equal(masks[name], theirs[name]) for name in masks)
    assert both["pruning"].reached == 0.5
    plain = Lit()
    trainer(PruningCallback(0.5, end=0.5, score=score, exclude=["model.6"])).fit(plain, images())
    assert not torch.equal(plain.model[6].weight, first[6].weight)


def test_a_step_with_masks_worked_by_hand():
    """y = w.x, L = y^2 / 2: the gradient of a pruned weight is 0, the factor of the others that of the dense ones."""

    class Product(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1, bias=False)
            self.layer.weight.data = torch.tensor([[2.0, 0.5, -1.0, 0.1]])

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).square().sum() / 2

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = DataLoader(TensorDataset(torch.tensor([[1.0, 2.0, 1.0, -1.0]])))
    for order in (1, -1):
        module = Product()
        psgd = PSGDCallback(target="zero", eps=0.5, gradient_scale=2.0)
        trainer(*[psgd, PruningCallback(0.5, schedule="one_shot", end=0.0)][::order]).fit(module, data)
        # y = 2 - 1 = 1, so the gradients are (1, 0, 1, 0) and the factors 2 * (2.5, 1, 1.5, 0.6)
        assert module.layer.weight[0].tolist() == pytest.approx([2.0 - 0.5, 0.0, -1.0 - 0.3, 0.0])


def test_what_others_see():
    """Callbacks see the gradients of the loss; the module's own hook, and clipping, those that the optimizer gets."""
    seen = {}

    class Watching(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.setdefault("callback", pl_module.model[0].weight.grad.clone())

    class Hooked(Lit):
        def on_before_optimizer_step(self, optimizer):
            seen.setdefault("module", self.model[0].weight.grad.clone())

    module, psgd = Hooked(), PSGDCallback()
    start = copy.deepcopy(module.model[0].weight)
    trainer(psgd, Watching(), limit_train_batches=1).fit(module, images())
    assert torch.equal(seen["module"], seen["callback"] * (psgd.lambda_s * distance(start, 4)))
