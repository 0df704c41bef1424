"""DPFCallback and DCILCallback against loops by hand after their papers, with a backward pass for each network."""

from __future__ import annotations

import copy
from itertools import product

import lightning.pytorch as L
import pytest
import torch
from contract.modules import BATCH, STEPS, own_layers, scaled, trainer
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import DCILCallback, DistillationCallback, DPFCallback, PruningCallback
from lightning_compress.functional import cubic_schedule, distillation_loss, magnitude_mask
from lightning_compress.mechanisms.masking import DenseWeight

pytestmark = pytest.mark.filterwarnings("ignore:.*(masked completely|held at their floor)")
CLASSES = 3


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=STEPS)


class Network(nn.Module):
    """Convolutions, batch norm with and without momentum, group norm, dropout and a classifier."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, momentum=None)
        self.norm, self.drop, self.fc = nn.GroupNorm(2, 8), nn.Dropout(0.2), nn.Linear(8, CLASSES)
        self.conv2.weight.data[:2] *= 0.1  # filters that are soon masked completely

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.drop(F.relu(self.norm(self.bn2(self.conv2(x)))))
        return self.fc(x.mean(dim=(2, 3)))


class Lit(L.LightningModule):
    """An ordinary module, with a metric of the training."""

    def __init__(self, optimizer=sgd, scheduler=halving):
        super().__init__()
        torch.manual_seed(5)
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.model = Network()
        self.train_accuracy = MulticlassAccuracy(CLASSES)

    def training_step(self, batch, batch_idx):
        logits = self.model(batch[0])
        self.train_accuracy(logits.detach(), batch[1])
        self.log("accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return F.cross_entropy(logits, batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        scheduler = self.make_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def images():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH * STEPS, 1, 6, 6, generator=generator)
    return DataLoader(TensorDataset(x, x.mean(dim=(1, 2, 3)).argsort().argsort() % CLASSES), batch_size=BATCH)


class ByHand:
    """Both techniques: a pruned network, and for DCIL a dense one that shares the weights that are masked."""

    def __init__(self, *, dense_path=None, kl_start=1.0, sparsity=0.8, interval=2, end=0.75, temperature=2.0):
        torch.manual_seed(5)
        self.network = Network()
        self.dense = copy.deepcopy(self.network)
        kinds = {"own": ("bn", "norm", "fc"), "own_norm": ("bn", "norm")}.get(dense_path, ())
        self.own = {name: own for name, own in self.dense.named_parameters() if name.startswith(kinds or "-")}
        layers = ("conv1", "conv2") if dense_path else ("conv1", "conv2", "fc")
        self.weights = {f"{layer}.weight": self.network.get_submodule(layer).weight for layer in layers}
        self.masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
        self.dense_path, self.kl_start, self.temperature = dense_path, kl_start, temperature
        self.sparsity, self.interval, self.end = sparsity, interval, end
        self.task_loss = lambda logits, batch: F.cross_entropy(logits, batch[1])
        self.pruned_loss = lambda logits, batch: 0.0  # what only the pruned network learns from

    def update(self, step, steps):
        if (step % self.interval or step == steps) and not (step - 1) / steps < self.end <= step / steps:
            return  # after the last step no other follows
        sparsity = cubic_schedule(min(step / steps / self.end, 1.0), 0.0, self.sparsity)
        masks = magnitude_mask([weight.detach() for weight in self.weights.values()], sparsity)
        self.masks = dict(zip(self.weights, masks, strict=True))

    def passes(self, batch, share):
        """Gradients of the pruned and of the dense network, each from its own backward pass."""
        start = torch.get_rng_state()
        pruned = {name: (self.masks[name] * weight).detach().requires_grad_() for name, weight in self.weights.items()}
        logits = functional_call(self.network, pruned, (batch[0],))
        after = torch.get_rng_state()
        loss = self.task_loss(logits, batch) + self.pruned_loss(logits, batch)
        if self.dense_path is None:
            return pruned, None, loss, None
        torch.set_rng_state(start)
        dense = {name: weight.detach().clone().requires_grad_() for name, weight in self.weights.items()}
        shared = {
            name: own.detach()
            for name, own in self.network.named_parameters()
            if name not in self.own and name not in dense
        }
        others = functional_call(self.dense, {**dense, **shared}, (batch[0],))
        torch.set_rng_state(after)
        dense_loss = self.task_loss(others, batch)
        if share >= self.kl_start:
            loss, dense_loss = loss + self.kl(logits, others), dense_loss + self.kl(others, logits)
        return pruned, dense, loss, dense_loss

    def kl(self, learning, target):
        learning, target = ((logits / self.temperature).float() for logits in (learning, target.detach()))
        return self.temperature**2 * F.kl_div(
            learning.log_softmax(dim=1), target.log_softmax(dim=1), log_target=True, reduction="batchmean"
        )

    def learn(self, batch, share, *, windows=1, autocast=None, scaler=None):
        """Add to the gradients; what the loss was."""
        scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            pruned, dense, loss, dense_loss = self.passes(batch, share)
        scaler.scale(loss / windows).backward()
        if dense_loss is not None:
            scaler.scale(dense_loss / windows).backward()
        for name, weight in self.weights.items():
            gradient = pruned[name].grad
            if dense is None:
                mask = self.masks[name].flatten(1).any(dim=1) if name != "fc.weight" else torch.ones(CLASSES)
                gradient = gradient * mask.view(-1, *[1] * (gradient.ndim - 1))
            else:
                gradient = self.masks[name] * gradient + ~self.masks[name] * dense[name].grad
            weight.grad = gradient if weight.grad is None else weight.grad + gradient
        return loss if dense_loss is None else loss + dense_loss

    def run(self, batches, *, optimizer=sgd, scheduler=halving, windows=1, autocast=None, scaler=None, clip=None):
        optimizers = [optimizer(own) for own in (list(self.network.parameters()), list(self.own.values())) if own]
        schedulers = [scheduler(own) for own in optimizers]
        scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
        steps = len(batches) // windows
        self.update(0, steps)
        for index, batch in enumerate(batches):
            self.learn(batch, (index // windows) / steps, windows=windows, autocast=autocast, scaler=scaler)
            if (index + 1) % windows == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(self.network.parameters(), clip)
                for own, rates in zip(optimizers, schedulers, strict=True):
                    scaler.step(own)
                    own.zero_grad()
                    rates.step()
                scaler.update()
                self.update((index + 1) // windows, steps)
        return self


def fitted(callback, *others, optimizer=sgd, scheduler=halving, **settings):
    """What a fit leaves: the module, its dense weights, and the Trainer."""
    module = Lit(optimizer, scheduler)
    fitting = trainer(callback, *others, **settings)
    torch.manual_seed(2)
    fitting.fit(module, images())
    return module, callback._dense, fitting


def assert_equal(by_hand, module, dense, tolerance=0.0):
    for name, value in by_hand.network.state_dict().items():
        ours = dense.get(f"model.{name}", module.state_dict()[f"model.{name}"])
        assert float((ours.double() - value.double()).abs().max()) <= tolerance, name
    for name, mask in by_hand.masks.items():
        assert torch.equal(module.get_parameter(f"model.{name}"), mask * by_hand.network.get_parameter(name)), name


def run_by_hand(by_hand, **settings):
    torch.manual_seed(2)
    return by_hand.run(list(images()), **settings)


@pytest.mark.parametrize("windows", [1, 2])
def test_dpf(windows):
    by_hand = run_by_hand(ByHand(sparsity=0.87), windows=windows)
    module, dense, _ = fitted(DPFCallback(0.87, update_interval=2), accumulate_grad_batches=windows)
    assert_equal(by_hand, module, dense)
    assert any(not bool(mask.flatten(1).any(dim=1).all()) for mask in by_hand.masks.values())  # some filters are dead


FAST = {("own", 0.3, 1), ("own", 1.0, 2), ("own_norm", 0.3, 2), ("shared", 0.3, 1), ("shared", 1.0, 2)}  # each value


@pytest.mark.parametrize(
    ("dense_path", "kl_start", "windows"),
    [
        pytest.param(*row, marks=[pytest.mark.slow] * (row not in FAST))
        for row in product(("own", "own_norm", "shared"), (0.3, 1.0), (1, 2))
    ],
)
def test_dcil(dense_path, kl_start, windows):
    by_hand = run_by_hand(ByHand(dense_path=dense_path, kl_start=kl_start), windows=windows)
    callback = DCILCallback(0.8, update_interval=2, dense_path=dense_path, kl_start=kl_start)
    module, dense, _ = fitted(callback, accumulate_grad_batches=windows)
    assert_equal(by_hand, module, dense, tolerance=0.0 if kl_start == 1 else 1e-6)
    own = {} if dense_path == "shared" else own_layers(callback._own_state)
    for name, value in by_hand.dense.state_dict().items() if own else ():
        if f"model.{name}" in own:
            difference = own[f"model.{name}"].double() - value.double()
            assert float(difference.abs().max()) <= (0.0 if kl_start == 1 else 1e-6), name
    assert sum(name.endswith("num_batches_tracked") for name in own) == (0 if dense_path == "shared" else 2)


# Other optimizers, schedulers and precisions


@pytest.mark.parametrize(
    ("by_hand", "settings"),
    [
        pytest.param({"optimizer": adamw}, {"optimizer": adamw}, id="AdamW"),
        pytest.param({"scheduler": one_cycle}, {"scheduler": one_cycle}, id="OneCycleLR"),
        pytest.param({"autocast": torch.bfloat16}, {"precision": "bf16-mixed"}, id="bf16-mixed"),
        pytest.param({"autocast": torch.float16, "scaler": True}, {"scaler": True}, id="16-mixed"),
        pytest.param({"clip": 0.05}, {"gradient_clip_val": 0.05}, id="clipping"),
    ],
)
@pytest.mark.parametrize(
    "dense_path",
    ["own", *(pytest.param(path, marks=pytest.mark.slow) for path in (None, "own_norm", "shared"))],
)
def test_as_the_user_trains(dense_path, by_hand, settings):
    """The dense path's own layers follow: their gradients are not clipped, for they are not the user's."""
    by_hand, settings = dict(by_hand), dict(settings)
    if by_hand.pop("scaler", False):
        by_hand["scaler"], settings["plugins"] = torch.amp.GradScaler("cpu"), [scaled()]
        settings.pop("scaler")
    expected = run_by_hand(ByHand(dense_path=dense_path), **by_hand)
    if dense_path is None:
        callback = DPFCallback(0.8, update_interval=2)
    else:
        callback = DCILCallback(0.8, update_interval=2, dense_path=dense_path, kl_start=1.0)
    module, dense, _ = fitted(callback, **settings)
    assert_equal(expected, module, dense)
    if dense_path in ("own", "own_norm"):
        own = own_layers(callback._own_state)
        for name, value in expected.own.items():
            assert torch.equal(own[f"model.{name}"], value), name


def lbfgs_by_hand(by_hand, batches):
    optimizer = lbfgs(by_hand.network.parameters())
    scheduler = halving(optimizer)
    by_hand.update(0, len(batches))
    for index, batch in enumerate(batches):

        def closure(batch=batch):
            optimizer.zero_grad()
            return by_hand.learn(batch, 0.0)

        optimizer.step(closure)
        scheduler.step()
        by_hand.update(index + 1, len(batches))
    return by_hand


@pytest.mark.parametrize("dense_path", [None, pytest.param("shared", marks=pytest.mark.slow)])
def test_lbfgs(dense_path):
    """Which repeats each step, as often as it likes."""
    if dense_path is None:
        callback = DPFCallback(0.8, update_interval=2)
    else:
        callback = DCILCallback(0.8, update_interval=2, dense_path=dense_path, kl_start=1.0)
    module, dense, _ = fitted(callback, optimizer=lbfgs)
    by_hand = ByHand(dense_path=dense_path)
    torch.manual_seed(2)
    assert_equal(lbfgs_by_hand(by_hand, list(images())), module, dense)


@pytest.mark.parametrize("dense_path", ["own", "own_norm"])
def test_lbfgs_is_refused_where_the_dense_path_trains_layers_of_its_own(dense_path):
    with pytest.raises(ValueError, match="has an optimizer of its own and cannot follow LBFGS"):
        fitted(DCILCallback(0.8, update_interval=2, dense_path=dense_path), optimizer=lbfgs)


# With a teacher


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "dense_path", ["own", *(pytest.param(path, marks=pytest.mark.slow) for path in (None, "shared"))]
)
def test_with_distillation(dense_path, first):
    """The task weight acts on both networks, the distillation on the pruned one, and the teacher runs once a batch."""
    torch.manual_seed(9)
    teacher, seen = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)), []
    teacher.register_forward_hook(lambda part, args, out: seen.append(len(out)))
    if dense_path is None:
        callback = DPFCallback(0.8, update_interval=2)
    else:
        callback = DCILCallback(0.8, update_interval=2, dense_path=dense_path, kl_start=1.0)
    distillation = DistillationCallback(teacher, temperature=3.0, task_weight=0.4, kd_weight=0.6)
    others = [distillation] if first else []
    module = Lit()
    fitting = trainer(*others, callback, *([] if first else [distillation]))
    torch.manual_seed(2)
    fitting.fit(module, images())
    assert seen == [BATCH] * STEPS

    by_hand = ByHand(dense_path=dense_path)
    by_hand.task_loss = lambda logits, batch: 0.4 * F.cross_entropy(logits, batch[1])
    by_hand.pruned_loss = lambda logits, batch: 0.6 * distillation_loss(logits, teacher(batch[0]).detach(), 3.0)
    assert_equal(run_by_hand(by_hand), module, callback._dense)


# What DCIL has in common with DPF


def test_dcil_is_dpf_where_the_dense_path_is_pruned_too(monkeypatch):
    def pruned(self, weight, out=None):
        return self._masked.value(weight, out) if self.copies else weight

    monkeypatch.setattr(DenseWeight, "value", pruned)
    monkeypatch.setattr(DenseWeight, "copies", property(lambda self: self._masked.mask is not None))
    settings = {"update_interval": 2, "layers": ["model.conv1", "model.conv2"]}
    dcil, dcil_dense, _ = fitted(DCILCallback(0.8, dense_path="shared", kl_start=1.0, **settings))
    dpf, dpf_dense, _ = fitted(DPFCallback(0.8, dead_filters="keep", **settings))
    for name, value in dpf.state_dict().items():
        assert torch.equal(dcil.state_dict()[name], value), name
    for name, value in dpf_dense.items():
        assert torch.equal(dcil_dense[name], value), name


class Product(L.LightningModule):
    """y = w.x, with the loss y^2 / 2 and the learning rate 0.1."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1, bias=False)
        self.layer.weight.data = torch.tensor([[2.0, 0.5, -1.0, 0.1]])

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().sum() / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def worked(callback, steps):
    module, batches = Product(), torch.tensor([[1.0, 2.0, 1.0, -1.0]]).expand(steps, 4)
    trainer(callback).fit(module, DataLoader(TensorDataset(batches)))
    return module.layer.weight[0].tolist(), callback._dense["layer.weight"][0].tolist()


STATIC = {"schedule": "one_shot", "layers": ["layer"]}
ONCE = {**STATIC, "update_interval": 1000}
DCIL_ALONE = {"dense_path": "shared", "kl_start": 1.0, **ONCE}


@pytest.mark.parametrize(
    ("build", "steps", "dense"),
    [
        (lambda: DPFCallback(0.5, **ONCE), 1, [1.9, 0.3, -1.1, 0.2]),
        (lambda: DPFCallback(0.5, **ONCE), 2, [1.82, 0.14, -1.18, 0.28]),
        (lambda: DCILCallback(0.5, **DCIL_ALONE), 1, [1.9, 0.12, -1.1, 0.29]),
        (lambda: DCILCallback(0.5, **DCIL_ALONE), 2, [1.82, -0.03, -1.18, 0.365]),
        (lambda: PruningCallback(0.5, **STATIC), 1, [1.9, 0.5, -1.1, 0.1]),
        (lambda: PruningCallback(0.5, **STATIC), 2, [1.82, 0.5, -1.18, 0.1]),
    ],
    ids=["DPF-1", "DPF-2", "DCIL-1", "DCIL-2", "static-1", "static-2"],
)
def test_steps_worked_by_hand(build, steps, dense):
    """The mask is (1, 0, 1, 0)."""
    weight, behind = worked(build(), steps)
    assert behind == pytest.approx(dense, abs=1e-6)
    assert weight == pytest.approx([dense[0], 0.0, dense[2], 0.0], abs=1e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda: DPFCallback(0.0, **ONCE),
        lambda: DCILCallback(0.0, **DCIL_ALONE),
        lambda: PruningCallback(0.0, **STATIC),
    ],
    ids=["DPF", "DCIL", "static"],
)
def test_without_sparsity_all_are_plain_descent(build):
    plain = Product()
    batches = torch.tensor([[1.0, 2.0, 1.0, -1.0]]).expand(2, 4)
    trainer().fit(plain, DataLoader(TensorDataset(batches)))
    with pytest.warns(UserWarning, match=r"sparsity=0.0 masks none of the 4 selected weights"):
        weight, dense = worked(build(), 2)
    assert weight == dense == plain.layer.weight[0].tolist()


# When the masks change


class Updates(L.Callback):
    """After which optimizer steps there were new masks."""

    def __init__(self, watched):
        self.watched, self.steps, self.last = watched, [], {}

    def look(self, step):
        now = self.watched.masks
        if any(mask is not self.last.get(name) for name, mask in now.items()):
            self.steps.append(step)
        self.last = now

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 0:
            self.look(0)

    def on_train_batch_end(self, trainer, *args):
        self.look(trainer.global_step)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"update_interval": 2}, [2, 4, 6]),  # at step 0 the sparsity is 0
        ({"update_interval": 3}, [3, 6]),
        ({"update_interval": 3, "end": 0.625}, [3, 5, 6]),  # the end is exact
        ({"update_interval": 16, "end": 0.3}, [3]),  # reached after the third step, at 3/8
        ({"update_interval": 3, "start": 0.5, "end": 1.0}, [6, 8]),
        ({"update_interval": 3, "start": 0.5, "end": 0.5}, [4, 6]),
        ({"update_interval": 3, "schedule": "one_shot", "start": 0.25}, [2, 3, 6]),
        ({"update_interval": 16, "schedule": "one_shot"}, [0]),  # whatever the end
        ({"update_interval": 16, "schedule": "one_shot", "start": 0.8}, [7]),
        ({"update_interval": 16, "schedule": "one_shot", "end": 0.0}, [0]),
    ],
)
def test_the_steps_after_which_masks_change(settings, expected):
    callback = DPFCallback(0.8, **settings)
    updates = Updates(callback)
    fitted(callback, updates)
    assert updates.steps == expected


def test_those_of_dcil_change_at_the_same_time():
    callback = DCILCallback(0.8, dense_path="shared", kl_start=1.0, update_interval=3, end=0.625)
    updates = Updates(callback)
    fitted(callback, updates)
    assert updates.steps == [3, 5, 6]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"update_interval": 1, "end": 0.5, "freeze_at": 0.75}, [1, 2, 3, 4, 5]),
        ({"update_interval": 2, "end": 0.75, "freeze_at": 0.75}, [2, 4, 6]),
        ({"update_interval": 1, "end": 0.75, "freeze_at": 1.0}, [1, 2, 3, 4, 5, 6, 7]),
        ({"update_interval": 1, "end": 0.0, "freeze_at": 0.0, "schedule": "one_shot"}, [0]),
        ({"update_interval": 3, "end": 0.3, "freeze_at": 0.7}, [3]),  # 0.7 lies before the sixth step
    ],
)
def test_masks_that_stay(settings, expected):
    callback = DPFCallback(0.8, **settings)
    updates = Updates(callback)
    fitted(callback, updates)
    assert updates.steps == expected
