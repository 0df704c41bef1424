"""LightningModules from packages that pip installs, unmodified, distilled for a few steps.

Run with ``pip install -r tests/strangers/requirements.txt && pytest tests/strangers``; the other tests leave this
folder out. Each row trains the same module twice from the same seed, with the callback and without it, and looks at
what the callback did: its loss was logged, the weights differ, and nothing of it is left on the module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightly.utils.benchmarking.linear_classifier import FinetuneClassifier, LinearClassifier
from lightning.pytorch.demos import LightningTransformer
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel, ManualOptimBoringModel, RandomDataset
from lightning.pytorch.demos.lstm import LightningLSTM, SimpleLSTM
from pytorch_forecasting import DecoderMLP, RecurrentNetwork, TimeSeriesDataSet
from pytorch_forecasting.metrics import QuantileLoss
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch_uncertainty.routines import ClassificationRoutine, SegmentationRoutine

from lightning_compress import DistillationCallback

VOCABULARY, CLASSES, STEPS = 50, 4, 3


@pytest.fixture(autouse=True)
def text_at_hand(tmp_path, monkeypatch):
    """Two of the demos download a text before they train, unless it is there."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "wikitext-2.txt").write_text("a b c\n" * 100)
    monkeypatch.chdir(tmp_path)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def images(classes: int = CLASSES, *, dense: bool = False) -> DataLoader:
    x = torch.randn(12, 3, 8, 8)
    y = torch.randint(classes, (12, 8, 8) if dense else (12,))
    return DataLoader(TensorDataset(x, y), batch_size=4)


def tokens() -> DataLoader:
    return DataLoader(TensorDataset(*torch.randint(VOCABULARY, (2, 12, 6))), batch_size=4)


def backbone(width: int = 6) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def classifier(width: int = 6) -> nn.Sequential:
    return nn.Sequential(*backbone(width), nn.Linear(width, CLASSES))


def series() -> TimeSeriesDataSet:
    frame = pd.DataFrame({"group": np.repeat(["a", "b"], 30), "time": np.tile(np.arange(30), 2)})
    frame["value"] = np.sin(frame["time"]) + (frame["group"] == "a")
    return TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="value",
        group_ids=["group"],
        max_encoder_length=6,
        max_prediction_length=2,
        time_varying_known_reals=["time"],
        time_varying_unknown_reals=["value"],
    )


def forecaster(kind: type, **settings: Any) -> Any:
    return kind.from_dataset(series(), learning_rate=0.01, log_interval=-1, **settings)


def forecasts() -> DataLoader:
    return series().to_dataloader(train=True, batch_size=8, num_workers=0)


@dataclass(frozen=True)
class Stranger:
    """One row: the module, its teacher, its data, the callback's arguments, and the student that is then found."""

    make: Callable[[], Any]
    teacher: Callable[[], nn.Module]
    data: Callable[[], DataLoader]
    student: str
    arguments: dict[str, Any] = field(default_factory=dict)
    package: str = "lightning.pytorch"


STRANGERS = {
    "lightning BoringModel": Stranger(
        BoringModel, lambda: nn.Linear(32, 2), lambda: DataLoader(RandomDataset(32, 12), 4), "layer"
    ),
    "lightning DemoModel": Stranger(
        DemoModel, lambda: nn.Linear(32, 10), lambda: DataLoader(RandomDataset(32, 12), 4), ""
    ),
    "lightning LightningTransformer": Stranger(
        lambda: LightningTransformer(VOCABULARY), lambda: LightningTransformer(VOCABULARY), tokens, "model"
    ),
    "lightning LightningLSTM (calls a child only)": Stranger(
        lambda: LightningLSTM(VOCABULARY),
        lambda: SimpleLSTM(VOCABULARY),
        tokens,
        "model",
        {"output": 0},
    ),
    "pytorch-forecasting DecoderMLP (dict batches)": Stranger(
        lambda: forecaster(DecoderMLP, hidden_size=8, loss=QuantileLoss([0.1, 0.5, 0.9])),
        lambda: forecaster(DecoderMLP, hidden_size=16, loss=QuantileLoss([0.1, 0.5, 0.9])),
        forecasts,
        "",
        {"output": "prediction", "loss_kind": "mse"},
    ),
    "pytorch-forecasting RecurrentNetwork (dict batches)": Stranger(
        lambda: forecaster(RecurrentNetwork, hidden_size=4),
        lambda: forecaster(RecurrentNetwork, hidden_size=8),
        forecasts,
        "",
        {"output": "prediction", "loss_kind": "mse"},
    ),
    "lightly FinetuneClassifier (pytorch_lightning)": Stranger(
        lambda: FinetuneClassifier(backbone(), 256, lr=0.1, feature_dim=6, num_classes=CLASSES, topk=(1,)),
        lambda: classifier(12),
        images,
        "",
        package="pytorch_lightning",
    ),
    "lightly LinearClassifier (pytorch_lightning)": Stranger(
        lambda: LinearClassifier(backbone(), 256, lr=0.1, feature_dim=6, num_classes=CLASSES, topk=(1,)),
        lambda: classifier(12),
        images,
        "",
        package="pytorch_lightning",
    ),
    "torch-uncertainty ClassificationRoutine": Stranger(
        lambda: ClassificationRoutine(classifier(), CLASSES, nn.CrossEntropyLoss(), optim_recipe=sgd),
        lambda: classifier(12),
        images,
        "model",
    ),
    "torch-uncertainty SegmentationRoutine": Stranger(
        lambda: SegmentationRoutine(
            nn.Conv2d(3, CLASSES, 3, padding=1), CLASSES, nn.CrossEntropyLoss(), optim_recipe=sgd
        ),
        lambda: nn.Conv2d(3, CLASSES, 5, padding=2),
        lambda: images(dense=True),
        "model",
    ),
}


def trained(stranger: Stranger, *callbacks: Any) -> tuple[Any, Any]:
    """The module after a few steps from fixed random numbers, and its Trainer."""
    torch.manual_seed(1)
    module, data = stranger.make(), stranger.data()
    trainer = import_module(stranger.package).Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    torch.manual_seed(2)
    trainer.fit(module, data)
    return module, trainer


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((ours - theirs).detach().abs().max()) for ours, theirs in pairs)


def traces(module: nn.Module) -> list[str]:
    hooks = [
        f"a hook on {name or 'the module'}"
        for name, part in module.named_modules()
        if len(part._forward_hooks) + len(part._forward_pre_hooks)
    ]
    return hooks + [key for key in vars(module) if "compress" in key or key in ("training_step", "validation_step")]


@pytest.mark.parametrize("name", STRANGERS)
def test_distillation_has_an_effect_on_a_stranger(name):
    stranger = STRANGERS[name]
    torch.manual_seed(3)
    teacher = stranger.teacher()
    callback = DistillationCallback(teacher, **stranger.arguments)
    module, trainer = trained(stranger, callback)
    plain, _ = trained(stranger)
    again, _ = trained(stranger)
    assert largest_difference(plain, again) == 0  # so what differs is the callback's doing
    assert largest_difference(module, plain) > 1e-6
    assert trainer.callback_metrics["compress/kd/loss"] > 0
    assert callback.effects["the distillation loss"] == STEPS
    assert callback.captured_sample.network == stranger.student
    assert list(module.state_dict()) == list(plain.state_dict())
    assert traces(module) == traces(plain)


def test_a_stranger_that_optimises_manually_is_refused_clearly():
    stranger = Stranger(
        ManualOptimBoringModel, lambda: nn.Linear(32, 2), lambda: DataLoader(RandomDataset(32, 12), 4), "layer"
    )
    with pytest.raises(ValueError, match=r"ManualOptimBoringModel optimises manually: .*CompressionMixin"):
        trained(stranger, DistillationCallback(stranger.teacher()))


def test_an_output_of_several_tensors_is_refused_clearly():
    with pytest.raises(
        ValueError, match=r"the student returns tuple of Tensor, tuple with 3 floating tensors; say which"
    ):
        trained(STRANGERS["lightning LightningLSTM (calls a child only)"], DistillationCallback(SimpleLSTM(VOCABULARY)))
