"""One training: a student under Lightning's Trainer and our callbacks, measured once, after its last epoch."""

from __future__ import annotations

import logging
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import (
    AttentionTransferCallback,
    DCILCallback,
    DistillationCallback,
    DPFCallback,
    FactorTransferCallback,
    PruningCallback,
)
from lightning_compress.demo import SmallResNet

from .data import NO_LABEL, Batches, Images, fashion_mnist
from .plan import HINTON, VERSION, Arm, Run, Teacher, digest
from .store import write_with_record
from .watch import Watch, predictions, share

STUDENT_WIDTH = 8
PRETRAIN_EPOCHS = 17  # as many steps as the authors' six epochs of CIFAR; after six of ours it still gives back zeros


def small_network(width: int) -> SmallResNet:
    """The network of all claims, with its channels last: there a processor's steps take a fifth less."""
    return SmallResNet(width).to(memory_format=torch.channels_last)


class Classifier(L.LightningModule):
    """A residual network, SGD, and a rate that falls along a cosine; images labelled -1 carry no loss."""

    def __init__(self, width: int, rate: float, label_smoothing: float = 0.0):
        super().__init__()
        self.network = small_network(width)
        self.rate, self.label_smoothing = rate, label_smoothing
        self.seen = 0  # a checksum of all batches: arms that are compared must have seen the same

    def on_train_batch_start(self, batch: Images, batch_idx: int) -> None:  # not in the step, which may run twice
        images, labels = batch
        self.seen = zlib.crc32(images.numpy(), zlib.crc32(labels.numpy(), self.seen))

    def training_step(self, batch: Images, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.network(images)
        return F.cross_entropy(logits, labels, ignore_index=NO_LABEL, label_smoothing=self.label_smoothing)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9, weight_decay=5e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ShuffledTeacher(nn.Module):
    """A teacher that gives each image the logits of another image of the batch."""

    def __init__(self, teacher: nn.Module, seed: int):
        super().__init__()
        self.teacher = teacher
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, images: Tensor) -> Tensor:
        return self.teacher(images)[torch.randperm(len(images), generator=self.generator)]


def train(run: Run, folder: Path) -> dict[str, Any]:
    """Make a run; the teacher, and the paraphraser if one is needed, are in the folder already."""
    data, begin, cpu = fashion_mnist(), time.perf_counter(), time.process_time()
    callbacks = make_callbacks(run, folder)
    watch = [Watch(data, callbacks)] if run.protocol.sparsity is not None else []
    torch.manual_seed(run.seed)
    module = Classifier(run.protocol.width, run.rate, run.arm.label_smoothing)
    batches = Batches(data.train, seed=run.seed, labels=run.protocol.labels)
    trainer = fit(module, batches, run.epochs, [*callbacks, *watch])
    held_out, test = predictions(module.network, data.held_out), predictions(module.network, data.test)
    taught = teacher_file(run.teacher, folder)["test_predictions"]
    return {
        **{key: value for part in watch for key, value in part.found(module.network).items()},
        "held_out_accuracy": share(held_out, data.held_out[1]),
        "test_accuracy": share(test, data.test[1]),
        "test_agreement": share(test, taught),
        "batches": f"{module.seen:08x}",
        "steps": trainer.global_step,
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu,
        "configuration": run.configuration(),
    }


def fit(module: L.LightningModule, batches: Batches, epochs: int, callbacks: list[Callback], **more: Any) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )
    trainer.fit(module, batches.loader())
    return trainer


def make_callbacks(run: Run, folder: Path) -> list[Callback]:
    """The technique's callback."""
    arm = run.arm
    if arm.technique == "plain":
        return []
    if run.protocol.sparsity is not None:
        return mask_callbacks(run, folder)
    teacher: nn.Module = make_teacher(run.teacher, arm, folder)
    if arm.technique == "kd":
        if arm.teacher == "shuffled":
            teacher = ShuffledTeacher(teacher, run.seed)
        return [DistillationCallback(teacher, **arm.arguments)]
    if arm.technique == "at":
        return [AttentionTransferCallback(teacher, **arm.arguments)]
    if arm.technique == "ft":
        trained = {} if needs_no_paraphraser(arm) else {"paraphraser": str(folder / paraphraser_path(run))}
        return [FactorTransferCallback(teacher, **arm.arguments, **trained)]
    raise ValueError(f"technique must be one of plain, kd, at, ft, got {arm.technique!r}")


def mask_callbacks(run: Run, folder: Path) -> list[Callback]:
    """All of them mask the convolutions, so that equal sparsity is the same number of weights."""
    kinds = {"pruning": PruningCallback, "dpf": DPFCallback, "dcil": DCILCallback}
    masking = kinds[run.arm.technique](run.protocol.sparsity, layers=["type:Conv2d"], **run.arm.arguments)
    taught = [DistillationCallback(make_teacher(run.teacher, run.arm, folder), **HINTON)] if run.arm.distilled else []
    return [masking, *taught]


def make_teacher(teacher: Teacher, arm: Arm, folder: Path) -> SmallResNet:
    if arm.teacher == "random":
        torch.manual_seed(1000 + teacher.seed)
        return small_network(teacher.width)
    network = small_network(teacher.width)
    network.load_state_dict(teacher_file(teacher, folder)["weights"])
    return network


def teacher_path(teacher: Teacher) -> Path:
    """In the folder."""
    return Path(f"teacher-width{teacher.width}-{digest({**vars(teacher), 'version': VERSION})}.pt")


def teacher_file(teacher: Teacher, folder: Path) -> dict[str, Any]:
    return torch.load(folder / teacher_path(teacher), weights_only=True)


def train_teacher(teacher: Teacher, folder: Path) -> str:
    """Train the teacher, and keep its weights and what it says of the test images."""
    data, begin, path = fashion_mnist(), time.process_time(), teacher_path(teacher)
    torch.manual_seed(teacher.seed)
    module = Classifier(teacher.width, teacher.rate)
    fit(module, Batches(data.train, seed=teacher.seed), teacher.epochs, [])
    test = predictions(module.network, data.test)
    kept, accuracy = {"weights": module.network.state_dict(), "test_predictions": test}, share(test, data.test[1])
    write_with_record(folder, path, lambda part: torch.save(kept, part), begin, test_accuracy=accuracy)
    return f"test accuracy {accuracy:.4f}"


def needs_no_paraphraser(arm: Arm) -> bool:
    return arm.technique != "ft" or arm.arguments.get("pretrain_epochs") == 0


def paraphraser_path(run: Run) -> Path:
    """In the folder."""
    return Path(f"paraphraser-{run.arm.teacher}-{digest({**vars(run.teacher), 'version': VERSION})}.pt")


def train_paraphraser(run: Run, folder: Path) -> str:
    """Let the callback pre-train the paraphraser of the run's teacher, as it does before a fit, and keep it."""
    begin = time.process_time()
    torch.manual_seed(run.teacher.seed)
    callback = FactorTransferCallback(make_teacher(run.teacher, run.arm, folder), pretrain_epochs=PRETRAIN_EPOCHS)
    batches = Batches(fashion_mnist().train, seed=run.teacher.seed)
    fit(Classifier(STUDENT_WIDTH, run.rate), batches, 1, [callback], max_steps=1)
    write_with_record(folder, paraphraser_path(run), callback.save_paraphraser, begin)
    return "trained"


def quiet() -> None:
    """Lightning's notes on devices, workers and tips are for other programs."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
