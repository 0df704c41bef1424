"""PruningCallback against training loops written by hand: weights are equal, bit for bit, and so are the masks."""

from __future__ import annotations

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from contract.modules import BATCH, STEPS, scaled, trainer
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock

from lightning_compress import PruningCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*held at their floor")
WORDS, WIDTH, LENGTH = 12, 8, 5


class Convolutions(nn.Module):
    """A residual block between a stem and a head, with batch norm."""

    def __init__(self):
        super().__init__()
        stem = nn.Conv2d(1, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, WORDS)
        self.net = nn.Sequential(*stem, BasicBlock(WIDTH, WIDTH), *head)

    def forward(self, tokens):
        return self.net(F.one_hot(tokens, WORDS).float()[:, None])  # (N, 1, LENGTH, WORDS)


class Tied(nn.Module):
    """Attention between an embedding and a head that share one weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))


class Recurrent(nn.Module):
    """A recurrent network."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


LAYERS = {Convolutions: None, Tied: ["embedding", "attention", "head"], Recurrent: ["embedding", "lstm", "head"]}


class Lit(L.LightningModule):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(5)
        self.model = make()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def sequences(batches=STEPS):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(WORDS, (BATCH * batches, LENGTH), generator=generator)
    return DataLoader(TensorDataset(tokens, tokens[:, 0]), batch_size=BATCH)


def keeps(weights, zeros, kept, floors=True):
    """The masks: a stable sort of all magnitudes in NumPy, those that were pruned first, none beyond its floor."""
    sizes = [weight.numel() for weight in weights]
    magnitudes = np.concatenate([weight.detach().numpy().ravel() for weight in weights])
    magnitudes = np.abs(magnitudes).astype(np.float64)
    magnitudes[~np.concatenate([mask.numpy().ravel() for mask in kept])] = -1
    room = [size - max(1, -(-size // 100)) if floors else size for size in sizes]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    pruned = np.zeros(len(magnitudes), dtype=bool)
    for index in np.argsort(magnitudes, kind="stable"):
        if zeros and room[owner[index]]:
            pruned[index], zeros, room[owner[index]] = True, zeros - 1, room[owner[index]] - 1
    parts = np.split(~pruned, np.cumsum(sizes)[:-1])
    return [torch.from_numpy(part).reshape(weight.shape) for part, weight in zip(parts, weights, strict=True)]


class ByHand:
    """A plain loop in which the network is called with masked weights."""

    def __init__(self, module, layers, *, sparsity=0.8, start=0.0, end=0.75, interval=1, steps=STEPS):
        self.module = module
        names = [
            name
            for name, parameter in module.named_parameters()
            if parameter.ndim > 1 and (layers is None or any(layer in name for layer in layers))
        ]
        self.weights = {name: dict(module.named_parameters())[name] for name in names}
        self.masks = [torch.ones_like(weight, dtype=torch.bool) for weight in self.weights.values()]
        self.sparsity, self.start, self.end, self.interval, self.steps = sparsity, start, end, interval, steps
        self.total = sum(weight.numel() for weight in self.weights.values())
        self.zeros = []

    def update(self, step):
        progress = step / self.steps
        if progress < self.start or (progress < self.end and step % self.interval and step / self.steps != self.start):
            return
        share = 1.0 if progress >= self.end else (progress - self.start) / (self.end - self.start)
        now = self.sparsity if share == 1.0 else self.sparsity + (0.0 - self.sparsity) * (1 - share) ** 3
        zeros = int(np.floor(now * self.total + 0.5))
        self.masks = keeps(list(self.weights.values()), zeros, self.masks)
        self.zeros.append(zeros)

    def masked(self):
        return {name: weight * mask for (name, weight), mask in zip(self.weights.items(), self.masks, strict=True)}

    def loss(self, batch):
        return F.cross_entropy(functional_call(self.module, self.masked(), (batch[0],)), batch[1])

    def run(self, batches, optimizer, *, windows=1, autocast=None, scaler=None):
        scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
        self.module.train()
        self.update(0)
        for index, batch in enumerate(batches):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = self.loss(batch)
            scaler.scale(loss / windows).backward()
            if (index + 1) % windows == 0:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                self.update((index + 1) // windows)
        return self

    def final(self):
        state = {name: value.clone() for name, value in self.module.state_dict().items()}
        weights = self.masked()
        own = {id(weight): name for name, weight in self.weights.items()}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if id(parameter) in own:
                state[name] = weights[own[id(parameter)]].detach()
        return state


def optimizer_for(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def by_hand(make, **settings):
    torch.manual_seed(5)
    network = make()
    run = {key: settings.pop(key) for key in ("windows", "autocast", "scaler") if key in settings}
    hand = ByHand(network, LAYERS[make], steps=STEPS // run.get("windows", 1), **settings)
    return hand.run(sequences(), optimizer_for(network), **run)


def selectors(make):
    return None if LAYERS[make] is None else [f"model.{name}" for name in LAYERS[make]]


def pruned(make, *, sparsity=0.8, validate=True, before=None, **settings):
    own = {key: settings.pop(key) for key in ("start", "end", "update_interval") if key in settings}
    pruning = PruningCallback(sparsity, layers=selectors(make), **own)
    module = Lit(make)
    if before is not None:
        before(module)
    trainer(pruning, **settings).fit(module, sequences(), sequences(2) if validate else None)
    return module, pruning


def assert_same(module, pruning, hand):
    expected = hand.final()
    ours = {key.replace("_orig_mod.", ""): value for key, value in module.model.state_dict().items()}
    assert list(ours) == list(expected)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    for mask, own in zip(hand.masks, pruning.masks.values(), strict=True):
        assert torch.equal(mask, own)
    assert pruning.reached == hand.zeros[-1] / hand.total


@pytest.mark.parametrize("make", list(LAYERS), ids=lambda make: make.__name__)
@pytest.mark.parametrize(("start", "end", "interval"), [(0.0, 0.75, 1), (0.25, 0.75, 2), (0.0, 1.0, 3), (0.5, 0.5, 1)])
def test_a_gradual_pruning(make, start, end, interval):
    hand = by_hand(make, start=start, end=end, interval=interval)
    module, pruning = pruned(make, start=start, end=end, update_interval=interval)
    assert_same(module, pruning, hand)


@pytest.mark.parametrize("make", list(LAYERS), ids=lambda make: make.__name__)
def test_accumulation(make):
    module, pruning = pruned(make, accumulate_grad_batches=2)
    assert_same(module, pruning, by_hand(make, windows=2))


@pytest.mark.parametrize("make", list(LAYERS), ids=lambda make: make.__name__)
def test_bf16(make):
    module, pruning = pruned(make, precision="bf16-mixed")
    assert_same(module, pruning, by_hand(make, autocast=torch.bfloat16))


def compile_child(module):
    module.model = torch.compile(module.model, backend="eager")


def compile_and_validate(module):
    compile_child(module)
    trainer().validate(module, sequences(), verbose=False)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("before", "start"),
    [
        (compile_and_validate, 0.375),
        pytest.param(compile_child, 0.0, marks=pytest.mark.slow),
        pytest.param(compile_and_validate, 0.0, marks=pytest.mark.slow),
        pytest.param(compile_child, 0.375, marks=pytest.mark.slow),
    ],
)
@pytest.mark.sample
def test_compiled(before, start):
    """With the sanity check, dense steps first, validation within the epoch, and validation before the fit."""
    module, pruning = pruned(Convolutions, before=before, start=start, val_check_interval=3, num_sanity_val_steps=2)
    assert_same(module, pruning, by_hand(Convolutions, start=start))


def test_a_hand_worked_step():
    """One weight vector: y = w.x, L = y^2 / 2, one step with lr 0.1."""

    class Product(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1, bias=False)
            self.layer.weight.data = torch.tensor([[2.0, 0.5, -1.0, 0.1]])

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).square().sum() / 2

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, pruning = Product(), PruningCallback(0.5, schedule="one_shot")
    fitting = trainer(pruning)
    fitting.fit(module, DataLoader(TensorDataset(torch.tensor([[1.0, 2.0, 1.0, -1.0]]))))
    assert module.layer.weight[0].tolist() == pytest.approx([1.9, 0.0, -1.1, 0.0])
    checkpoint = {"state_dict": module.state_dict(), "callbacks": {}}
    pruning.on_save_checkpoint(fitting, module, checkpoint)
    dense = checkpoint["lightning_compress"]["pruning"]["dense"]["layer.weight"]
    assert dense[0].tolist() == pytest.approx([1.9, 0.5, -1.1, 0.1])


def test_a_real_scaler():
    """16-mixed: gradients are masked while they are scaled, and a step that is skipped counts."""
    ours, theirs = (torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-12) for _ in range(2))
    plugin = scaled()
    plugin.scaler = ours
    module, pruning = pruned(Convolutions, plugins=[plugin])
    assert_same(module, pruning, by_hand(Convolutions, autocast=torch.float16, scaler=theirs))
    assert ours.get_scale() == theirs.get_scale() < 2.0**40


def test_validation_sees_what_is_saved(tmp_path):
    """The logged loss is that of the file in a module that has never heard of this package."""
    module, pruning = Lit(Recurrent), PruningCallback(0.8, layers=selectors(Recurrent))
    fitting = trainer(pruning, max_epochs=2)
    fitting.fit(module, sequences(), sequences())
    logged = float(fitting.callback_metrics["val_loss"])
    fitting.save_checkpoint(tmp_path / "end.ckpt")
    plain = Lit(Recurrent)
    plain.load_state_dict(torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"], strict=True)
    [metrics] = trainer().validate(plain, sequences(), verbose=False)
    assert metrics["val_loss"] == logged
