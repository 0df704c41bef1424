"""Small LightningModules, loaders and Trainers on which the contract is tried; importable, so that they pickle."""

from __future__ import annotations

import csv
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_compress import CompressionMixin
from lightning_compress.mechanisms.checkpoints import resize_

FEATURES, CLASSES = 8, 3
IMAGE, CHANNELS = (1, 2, 4), 4  # of the rows of features, seen as images
BATCH, STEPS = 8, 8


class Batches(Dataset):
    """Rows of a random, learnable problem; optionally as dicts, optionally failing at one row."""

    def __init__(self, rows: int = BATCH * STEPS, *, as_dict: bool = False, fails_at: int | None = None) -> None:
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(rows, FEATURES, generator=generator)
        self.targets = self.inputs[:, :CLASSES].argmax(dim=1)
        self.as_dict = as_dict
        self.fails_at = fails_at

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        if index == self.fails_at:
            raise OSError("the disk is gone")
        x, y = self.inputs[index], self.targets[index]
        return {"features": x, "label": y} if self.as_dict else (x, y)


class StatefulLoader(DataLoader):
    """Goes on where it was: Lightning saves and restores the position of such a loader."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.position = self.start = 0

    def __iter__(self) -> Iterator[Any]:
        start, self.start, self.position = self.start, 0, self.start
        for index, batch in enumerate(super().__iter__()):
            if index >= start:
                self.position = index + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"]


class Convolution(nn.Conv2d):
    """Over rows of features, which it takes for images: its output is a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__(IMAGE[0], channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, *IMAGE))


def small_network(*, norm: bool = False) -> nn.Sequential:
    features = [Convolution(CHANNELS), *([nn.BatchNorm2d(CHANNELS)] if norm else []), nn.ReLU()]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(CHANNELS * FEATURES, CLASSES))


def broken() -> None:
    raise RuntimeError("the step is broken")


def interrupted() -> None:
    """As Ctrl-C does."""
    signal.raise_signal(signal.SIGINT)


def with_momentum(module: Classifier) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=module.lr, momentum=0.9)


def with_schedule(module: Classifier) -> dict[str, Any]:
    optimizer = with_momentum(module)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def by_lbfgs(module: Classifier) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(module.parameters(), lr=module.lr, max_iter=2)


class Classifier(L.LightningModule):
    """The network is a child, and the step calls the LightningModule."""

    as_dict = False
    norm = False
    lr = 0.1
    optimise: Callable[[Classifier], Any] = staticmethod(with_schedule)

    def __init__(self) -> None:
        super().__init__()
        self.build()
        self.fails_at: int | None = None
        self.failure: Callable[[], None] = broken
        self.fails_in_validation = False

    def build(self) -> None:
        self.model: nn.Module = small_network(norm=self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def task_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == self.fails_at:
            self.failure()
        loss = self.task_loss(batch)
        self.log("train_loss", loss, batch_size=BATCH)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.fails_in_validation and not self.trainer.sanity_checking:
            raise RuntimeError("validation is broken")
        self.log("val_loss", self.task_loss(batch), batch_size=BATCH)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.task_loss(batch), batch_size=BATCH)

    def configure_optimizers(self) -> Any:
        return self.optimise(self)


class NormClassifier(Classifier):
    """With batch norm, and a step that calls the child."""

    norm = True

    def task_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)


class Jumping(Classifier):
    """Its score is better while the network is dense and in full precision: then 9, 8, 7 and 6 are no plateau."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("score", [3.0, 2.0, 9.0, 8.0, 7.0, 6.0, 6.0][self.current_epoch])

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "score"}}


class NetworkItself(Classifier):
    """The LightningModule is the network."""

    def build(self) -> None:
        self.first = Convolution(CHANNELS)
        self.second = nn.Linear(CHANNELS * FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)).flatten(1))


class KeywordNetwork(nn.Module):
    """Keyword arguments in, a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_network()

    def forward(self, *, features: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(features)}


class DictClassifier(Classifier):
    """Dict batches, a network called by keyword, and a step that returns a dict."""

    as_dict = True

    def build(self) -> None:
        self.model = KeywordNetwork()

    def task_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.model(features=batch["features"])["logits"], batch["label"])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "seen": len(batch["label"])}


class ManualClassifier(Classifier):
    """Optimises manually, without our mixin."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def total(self, task_loss: Tensor) -> Tensor:
        return task_loss

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.total(super().training_step(batch, batch_idx)))
        optimizer.step()


class MixinClassifier(CompressionMixin, ManualClassifier):
    """Optimises manually, with our mixin."""

    def total(self, task_loss: Tensor) -> Tensor:
        return self.compressed_loss(task_loss)


def one_for_each_half(module: Classifier) -> list[torch.optim.Optimizer]:
    parts = list(module.model.children())
    return [
        torch.optim.SGD([entry for part in half for entry in part.parameters()], lr=module.lr, momentum=0.9)
        for half in (parts[:1], parts[1:])
    ]


class TwoOptimizers(MixinClassifier):
    """Optimises manually, with our mixin, and with two optimizers that share the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.optimise = one_for_each_half

    def training_step(self, batch: Any, batch_idx: int) -> None:
        both = self.optimizers()
        for optimizer in both:
            optimizer.zero_grad()
        self.manual_backward(self.compressed_loss(lambda: Classifier.training_step(self, batch, batch_idx)))
        for optimizer in both:
            optimizer.step()


AUTOMATIC: tuple[type[Classifier], ...] = (Classifier, NormClassifier, NetworkItself, DictClassifier)


def teacher_for(kind: type[Classifier], seed: int = 3) -> nn.Module:
    """A wider network for the same batches, with batch norm, from fixed random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        features = [Convolution(6), nn.BatchNorm2d(6), nn.Tanh()]
        wide = nn.Sequential(*features, nn.Flatten(), nn.Linear(6 * FEATURES, CLASSES))
        return KeywordTeacher(wide) if kind.as_dict else wide


class KeywordTeacher(nn.Module):
    """A teacher for the network that takes keywords."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *, features: Tensor) -> dict[str, Tensor]:
        return {"logits": self.network(features)}


def made(kind: type[Classifier], seed: int = 1) -> Classifier:
    """A module from fixed random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return kind()


def loader(kind: type[Classifier] = Classifier, **settings: Any) -> DataLoader:
    """The same batches in the same order each time."""
    data = {key: settings.pop(key) for key in ("rows", "fails_at") if key in settings}
    stateful = settings.pop("stateful", False)
    arguments = {"batch_size": BATCH, **settings}
    return (StatefulLoader if stateful else DataLoader)(Batches(**data, as_dict=kind.as_dict), **arguments)


def trainer(*callbacks: Any, **settings: Any) -> L.Trainer:
    """A silent Trainer on the CPU, for one epoch of :data:`STEPS` steps."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **settings})


def fit(kind: type[Classifier], *callbacks: Any, **settings: Any) -> Classifier:
    """Train a fresh module and give it back."""
    module = made(kind)
    trainer(*callbacks, **settings).fit(module, loader(kind), loader(kind, rows=2 * BATCH))
    return module


def scaled(begins: float = 2.0**16) -> MixedPrecision:
    """16-mixed with a real scaler; on the CPU the Trainer would silently take bf16 and none."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=begins))


def rows_logged(logger: CSVLogger) -> list[dict[str, str]]:
    """The rows of what a logger has written."""
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def twin(kind: type[Classifier], checkpoint: dict[str, Any]) -> Classifier:
    """A module with the weights of a checkpoint, loaded strictly; with its sizes, where it says that it has others."""
    module = made(kind)
    resize_(module, checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=True)
    return module


def own_layers(own: dict[str, Any]) -> dict[str, Tensor]:
    """What the dense path of DCIL has for itself, by the names that the user's module gives it."""
    keys = {key: key.split(".", 1) for key in own["layers"]["module"]}
    return {f"{own['names'][int(place)]}.{name}": own["layers"]["module"][key] for key, (place, name) in keys.items()}


def difference(first: Any, second: Any) -> float:
    """Largest absolute difference between the states of two modules, or between two state dicts."""
    ours, theirs = (entry.state_dict() if isinstance(entry, nn.Module) else entry for entry in (first, second))
    assert list(ours) == list(theirs)
    if any(ours[key].shape != theirs[key].shape for key in ours):
        return math.inf
    return max(float((ours[key].double() - theirs[key].double()).abs().max()) for key in ours)
