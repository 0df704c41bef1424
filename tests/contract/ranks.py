"""Two processes on the CPU: run as a script, which forks, so that the imports are paid for once.

``python ranks.py FOLDER SCENARIO...``; each rank leaves ``FOLDER/SCENARIO/rank<n>.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as L
import torch
from cases import CASES
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler

from contract.gans import ON_THE_GENERATOR, Functions, Gan, alike_on_ranks
from contract.modules import BATCH, Batches, Classifier, NetworkItself, made, teacher_for, trainer
from lightning_compress import CompressionReport, DCILCallback, DistillationCallback, ExportCallback


class EverySecond(Sampler):
    """The rank's half of each batch of the single process."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def __iter__(self):
        return iter(range(self.rank, BATCH * 8, self.ranks))

    def __len__(self) -> int:
        return BATCH * 8 // self.ranks


class Spare(Classifier):
    """With a second head that no step of the user's uses; ``find_unused_parameters`` is needed without distillation."""

    def build(self) -> None:
        super().build()
        self.model = TwoHeads(self.model)

    def forward(self, x):
        return self.model(x)["task"]


class TwoHeads(nn.Module):
    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body, self.distilled = body, nn.Linear(body[-1].in_features, body[-1].out_features)

    def forward(self, x):
        features = self.body[:-1](x)
        return {"task": self.body[-1](features), "logits": self.distilled(features)}


class HalfIgnored(Classifier):
    """All labels of the second rank are to be ignored."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return (x, torch.full_like(y, -100)) if self.global_rank == 1 else batch

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1], ignore_index=-100, reduction="sum") / BATCH


class FullDisk(ExportCallback):
    """Fails on the first rank, at the end."""

    def export(self, trainer, pl_module):
        if trainer.is_global_zero:
            raise OSError("no room")


class SingleTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = teacher_for(Classifier)

    def forward(self, x):
        return {"logits": self.network(x)}


class Sharded(L.LightningDataModule):
    """Our own sampler, made when the ranks are known."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.kind = kind

    def _loader(self) -> DataLoader:
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        data = Batches(as_dict=self.kind.as_dict)
        return DataLoader(data, batch_size=BATCH // ranks, sampler=EverySecond(rank, ranks))

    train_dataloader = val_dataloader = _loader


class Recording(L.Callback):
    """Each rank's weights, metrics and what our callback saw."""

    def __init__(self, path: Path, watched: Any) -> None:
        self.path, self.watched, self.shapes = path, watched, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        sample = self.watched.student_capture.last_call if self.watched.student_capture is not None else None
        if sample is not None:
            self.shapes.append([tuple(value.shape) for value in (*sample.args, *sample.kwargs.values())])

    def teardown(self, trainer, pl_module, stage):
        self.path.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                "state_dict": pl_module.state_dict(),
                "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
                "effects": dict(self.watched.effects),
                "shapes": self.shapes,
                "attributes": sorted(vars(pl_module)),
            },
            self.path / f"rank{trainer.global_rank}.pt",
        )


def scenario(name: str, folder: Path) -> tuple[type[Classifier], list[Any], dict[str, Any]]:
    """Kind of module, callbacks and settings of a scenario."""
    kinds = {"NetworkItself": NetworkItself, "Spare": Spare}
    case, _, variant = name.partition("-")
    kind = kinds.get(variant, Classifier)
    if variant == "Spare":
        return kind, [DistillationCallback(SingleTeacher(), student="model")], {}
    if variant == "HalfIgnored":
        return HalfIgnored, [DistillationCallback(teacher_for(Classifier), ignore_index=-100)], {}
    if case == "FullDisk":
        callbacks = [FullDisk(folder / "m.onnx"), CompressionReport(latency=False)]
        return kind, callbacks, {"logger": CSVLogger(folder / "logs")}
    if case == "Gan":
        return Gan, alike_on_ranks(), {"precision": "64-true"}
    if case == "Functions":
        return Functions, [DCILCallback(0.4, update_interval=1, dense_path="shared", **ON_THE_GENERATOR)], {}
    row = next(row for row in CASES if row.name == case)
    settings: dict[str, Any] = {}
    if variant == "logged":
        settings = {"logger": CSVLogger(folder / "logs")}
    return kind, [row.build(folder, kind)], settings


def run(name: str, folder: Path, *, ranks: int = 2, start_method: str = "fork") -> Classifier:
    """One scenario, in so many processes."""
    kind, callbacks, settings = scenario(name, folder)
    module = made(kind)
    unused = name.startswith(("Gan", "Functions")) or "Spare" in name
    strategy = DDPStrategy(start_method=start_method, process_group_backend="gloo", find_unused_parameters=unused)
    fitting = trainer(
        *callbacks,
        Recording(folder, callbacks[0]),
        devices=ranks,
        use_distributed_sampler=False,
        strategy=strategy if ranks > 1 else "auto",
        **settings,
    )
    fitting.fit(module, Sharded(kind))
    return module


if __name__ == "__main__":
    torch.set_num_threads(1)
    method = os.environ.get("START_METHOD", "fork")
    for wanted in sys.argv[2:]:
        run(wanted, Path(sys.argv[1]) / wanted, start_method=method)
