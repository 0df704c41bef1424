"""Structured pruning against loops written by hand, on networks built small and sliced by hand, bit for bit."""

from __future__ import annotations

import copy
import logging

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import StructuredPruningCallback

STEPS, BATCH, BEFORE = 8, 8, 4  # filters go before the fifth step


class Net(nn.Module):
    def __init__(self, first=16, second=24, classes=3):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, first, 3, padding=1), nn.BatchNorm2d(first)
        self.conv2, self.bn2 = nn.Conv2d(first, second, 3), nn.BatchNorm2d(second)
        self.fc = nn.Linear(second * 4, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.bn2(self.conv2(x))).flatten(1))


def made(**sizes):
    torch.manual_seed(3)
    net = Net(**sizes)
    with torch.no_grad():
        for norm in (net.bn1, net.bn2):
            norm.weight.uniform_(0.5, 1.5)
    return net


def data():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(STEPS * BATCH, 2, 4, 4, generator=generator), torch.randint(
        0, 3, (STEPS * BATCH,), generator=generator
    )


OPTIMIZERS = {
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda net: torch.optim.Adam(net.parameters(), lr=0.01, amsgrad=True),
    "adamw": lambda net: torch.optim.AdamW(
        [{"params": [*net.conv1.parameters(), *net.conv2.parameters()]},
         {"params": [*net.bn1.parameters(), *net.bn2.parameters(), *net.fc.parameters()], "weight_decay": 0.0}],
        lr=0.01, weight_decay=0.1,
    ),
    "rmsprop": lambda net: torch.optim.RMSprop(net.parameters(), lr=0.001, centered=True, momentum=0.5),
    "adagrad": lambda net: torch.optim.Adagrad(net.parameters(), lr=0.01),
}  # fmt: skip


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS + 1, cycle_momentum=True)


class Lit(L.LightningModule):
    def __init__(self, optimizer, scheduler=None):
        super().__init__()
        self.net, self.make_optimizer, self.make_scheduler = made(), optimizer, scheduler

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.net)
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }

    def train_dataloader(self):
        return DataLoader(TensorDataset(*data()), batch_size=BATCH)


def fitted(module, *callbacks, epochs=1, **settings):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", **quiet, **settings)
    trainer.fit(module)
    return trainer


def kept(weight, count):
    """The filters of the largest Euclidean norms, in their order."""
    return weight.flatten(1).norm(dim=1).sort(stable=True).indices[-count:].sort().values


def by_hand(net, optimizer, first, second):
    """A smaller network, and an optimizer for it, with what is left of the state of the other two."""
    keep1, keep2 = kept(net.conv1.weight.detach(), first), kept(net.conv2.weight.detach(), second)
    columns = torch.cat([torch.arange(4) + 4 * index for index in keep2.tolist()])
    cut = {
        "conv1.weight": lambda v: v[keep1], "conv1.bias": lambda v: v[keep1],
        **{f"bn1.{k}": (lambda v: v[keep1]) for k in ("weight", "bias", "running_mean", "running_var")},
        "conv2.weight": lambda v: v[keep2][:, keep1], "conv2.bias": lambda v: v[keep2],
        **{f"bn2.{k}": (lambda v: v[keep2]) for k in ("weight", "bias", "running_mean", "running_var")},
        "fc.weight": lambda v: v[:, columns],
    }  # fmt: skip
    small = Net(first, second)
    small.load_state_dict({name: cut.get(name, lambda v: v)(value) for name, value in net.state_dict().items()})
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    fresh = dict(small.named_parameters())
    groups = [
        {**group, "params": [fresh[names[id(parameter)]] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    other = type(optimizer)(groups)
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        other.state[fresh[name]] = {
            key: cut.get(name, lambda v: v)(value) if torch.is_tensor(value) and value.ndim else copy.deepcopy(value)
            for key, value in state.items()
        }
    return small, other


def loop(make_optimizer, make_scheduler=None, *, accumulate=1, clip=None, average=None, first=8, second=12):
    net = made()
    optimizer = make_optimizer(net)
    scheduler = None if make_scheduler is None else make_scheduler(optimizer)
    averaged = None if average is None else copy.deepcopy(net)
    inputs, targets = data()
    updates = 0
    for index in range(STEPS):
        if index == BEFORE:
            larger = net
            net, other = by_hand(net, optimizer, first, second)
            if averaged is not None:
                averaged = sliced_like(larger, averaged, first, second)
            if scheduler is not None:
                scheduler.optimizer = other
            optimizer = other
        rows = slice(index * BATCH, (index + 1) * BATCH)
        loss = F.cross_entropy(net(inputs[rows]), targets[rows]) / accumulate
        loss.backward()
        if (index + 1) % accumulate:
            continue
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([own for group in optimizer.param_groups for own in group["params"]], clip)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        if averaged is not None:
            if updates == 0:
                averaged.load_state_dict(net.state_dict())
            else:
                with torch.no_grad():
                    pairs = zip(averaged.state_dict().values(), net.state_dict().values(), strict=True)
                    for mean, now in pairs:
                        mean.copy_(average * mean + (1 - average) * now)
            updates += 1
    return net, optimizer, averaged


def sliced_like(larger, averaged, first, second):
    """The average, cut where the network is, by the network's own norms."""
    keep1, keep2 = kept(larger.conv1.weight.detach(), first), kept(larger.conv2.weight.detach(), second)
    columns = torch.cat([torch.arange(4) + 4 * index for index in keep2.tolist()])
    small, state = Net(first, second), averaged.state_dict()
    for name, value in state.items():
        if name.startswith(("conv1", "bn1")) and value.ndim:
            state[name] = value[keep1]
        elif name.startswith(("conv2", "bn2")) and value.ndim:
            state[name] = value[keep2][:, keep1] if name == "conv2.weight" else value[keep2]
        elif name == "fc.weight":
            state[name] = value[:, columns]
    small.load_state_dict(state)
    return small


def assert_equal(module, trainer, net, optimizer):
    ours, theirs = module.net.state_dict(), net.state_dict()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    mine = trainer.optimizers[0]
    for group, other in zip(mine.param_groups, optimizer.param_groups, strict=True):
        assert group["lr"] == other["lr"]
        for parameter, twin in zip(group["params"], other["params"], strict=True):
            assert mine.state[parameter].keys() == optimizer.state[twin].keys()
            for key, value in optimizer.state[twin].items():
                assert torch.equal(torch.as_tensor(mine.state[parameter][key]), torch.as_tensor(value)), key


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(name, variant, marks=[pytest.mark.slow] * (name not in ("sgd", "adamw") and variant != "plain"))
        for name in OPTIMIZERS
        for variant in ("plain", "one_cycle", "accumulated", "clipped")
        if (name, variant) != ("adagrad", "one_cycle")  # which has no momentum to cycle
    ],
)
def test_weights_and_optimizer_state_equal_a_loop_by_hand(name, variant):
    scheduler = one_cycle if variant == "one_cycle" else None
    settings = {"accumulated": {"accumulate_grad_batches": 2}, "clipped": {"gradient_clip_val": 0.1}}.get(variant, {})
    module = Lit(OPTIMIZERS[name], scheduler)
    before = [(id(own), own) for own in module.parameters()]
    trainer = fitted(module, StructuredPruningCallback(0.5, start=0.5), **settings)
    net, optimizer, _ = loop(
        OPTIMIZERS[name],
        scheduler,
        accumulate=2 if variant == "accumulated" else 1,
        clip=0.1 if variant == "clipped" else None,
    )
    assert_equal(module, trainer, net, optimizer)
    assert [id(own) for own in module.parameters()] == [key for key, _ in before]
    assert module.net.conv1.out_channels == 8
    assert module.net.conv2.in_channels == 8
    assert module.net.fc.in_features == 48


def test_an_average_is_cut_with_the_network():
    module = Lit(OPTIMIZERS["adam"])
    averaging = EMAWeightAveraging(decay=0.9)
    fitted(module, averaging, StructuredPruningCallback(0.5, start=0.5))
    _, _, averaged = loop(OPTIMIZERS["adam"], average=0.9)
    for name, value in averaged.state_dict().items():
        assert torch.allclose(module.net.state_dict()[name].float(), value.float(), atol=2e-7), name


def test_an_optimizer_that_was_made_before_the_trainer_goes_on():
    module = Lit(None)
    optimizer = OPTIMIZERS["sgd"](module.net)
    module.make_optimizer = lambda net: optimizer
    trainer = fitted(module, StructuredPruningCallback(0.5, start=0.5))
    net, other, _ = loop(OPTIMIZERS["sgd"])
    assert trainer.optimizers[0] is optimizer
    assert_equal(module, trainer, net, other)


def test_a_state_cut_elsewhere_would_be_seen(monkeypatch):
    """The negative control: the first entries instead of those of the filters that stay."""
    from lightning_compress.mechanisms import shrinking

    original = shrinking._smaller_entries

    def wrong(optimizer, named, shrinkage):
        first = {
            name: {dim: list(range(len(own))) for dim, own in dims.items()} for name, dims in shrinkage.kept.items()
        }
        return original(optimizer, named, shrinking.Shrinkage(first, {}, shrinkage.shapes))

    monkeypatch.setattr(shrinking, "_smaller_entries", wrong)
    module = Lit(OPTIMIZERS["adamw"])
    fitted(module, StructuredPruningCallback(0.5, start=0.5))
    net, _, _ = loop(OPTIMIZERS["adamw"])
    gaps = [(module.net.state_dict()[name] - value).abs().max().item() for name, value in net.state_dict().items()]
    assert max(gaps) > 1e-4
