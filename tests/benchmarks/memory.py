"""Peak memory of a training step with a callback, as a ratio to the plain step and to the same written by hand.

    python -m tests.benchmarks.memory

On the CPU every allocation of the tensor library is counted, temporary ones inside of operations too, from before the
network is made: weights, gradients, momentum, a teacher and copies are all in it. On a GPU it is what PyTorch's
allocator says. The peak is that of the steps after the first three, in which networks are found and grids are made.

The teacher has the student's own architecture. The small ResNet is a network whose activations need most of the memory,
the network of tokens one whose weights do: there all that a callback keeps for each weight shows.
"""

from __future__ import annotations

import argparse
import copy
import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from lightning_compress import (
    AttentionTransferCallback,
    CompressionReport,
    DCILCallback,
    DistillationCallback,
    DPFCallback,
    ExportCallback,
    FactorTransferCallback,
    PruningCallback,
    PSGDCallback,
    PTQCallback,
    QATCallback,
    StructuredPruningCallback,
)
from lightning_compress.demo import SmallResNet

from .step_cost import (
    FactorsByHand,
    Plain,
    PrunedByHand,
    RoundedByHand,
    ScaledByHand,
    TwoNetworksByHand,
    WithTeacherForward,
)

STEPS, BEFORE = 6, 3
MARK = 54_321
"""Bytes of an allocation that nobody else makes: from it on steps count."""


class Block(nn.Module):
    """What a transformer does with each token."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class TokenNetwork(nn.Module):
    """Tokens (N, L, C) to logits (N, 10)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(width, hidden), Block(width, hidden))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(dim=1))


@dataclass(frozen=True)
class Network:
    """A network, and what is trained on.

    Attributes:
        make: Makes it.
        shape: Of a batch.
        layer: A layer near its end, whose output techniques of features take.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layer: str


NETWORKS = {
    "a small ResNet": Network(lambda: SmallResNet(16), (64, 1, 28, 28), "stages"),
    "a network of tokens": Network(lambda: TokenNetwork(256, 1024), (8, 8, 256), "blocks"),
}


@dataclass(frozen=True)
class Arm:
    """A callback, and what is to be compared with.

    Attributes:
        callback: Made of a teacher and the name of a layer.
        by_hand: The same technique written into the step, of a student, a teacher and the name of a layer.
    """

    callback: Callable[[nn.Module, str], Callback]
    by_hand: Callable[[nn.Module, nn.Module, str], L.LightningModule] = lambda student, teacher, layer: Plain(student)


def _with_teacher(student: nn.Module, teacher: nn.Module, layer: str) -> L.LightningModule:
    return WithTeacherForward(student, teacher)


ARMS = {
    "DistillationCallback": Arm(lambda teacher, layer: DistillationCallback(teacher), _with_teacher),
    "AttentionTransferCallback": Arm(
        lambda teacher, layer: AttentionTransferCallback(teacher, pairs={layer: layer}, strength=0.02), _with_teacher
    ),
    "FactorTransferCallback": Arm(
        lambda teacher, layer: FactorTransferCallback(teacher, pair=(layer, layer), pretrain_epochs=0, weight=1.0),
        lambda student, teacher, layer: FactorsByHand(student, teacher, layer),
    ),
    "PSGDCallback": Arm(lambda teacher, layer: PSGDCallback(), lambda student, teacher, layer: ScaledByHand(student)),
    "PTQCallback": Arm(lambda teacher, layer: PTQCallback()),
    "QATCallback": Arm(
        lambda teacher, layer: QATCallback(max_samples=64, freeze_batchnorm_at=1.0),
        lambda student, teacher, layer: RoundedByHand(student),
    ),
    "PruningCallback": Arm(
        lambda teacher, layer: PruningCallback(0.9, update_interval=1),
        lambda student, teacher, layer: PrunedByHand(student),
    ),
    "DPFCallback": Arm(
        lambda teacher, layer: DPFCallback(0.9, update_interval=1),
        lambda student, teacher, layer: PrunedByHand(student),
    ),
    "DCILCallback": Arm(
        lambda teacher, layer: DCILCallback(0.9, update_interval=1, kl_start=0.0),
        lambda student, teacher, layer: TwoNetworksByHand(student),
    ),
    "StructuredPruningCallback": Arm(lambda teacher, layer: StructuredPruningCallback(0.5, schedule="one_shot")),
    "ExportCallback": Arm(lambda teacher, layer: ExportCallback("memory.onnx")),
    "CompressionReport": Arm(lambda teacher, layer: CompressionReport(path="memory", latency=False)),
}


class Mark(Callback):
    """Say in the record of allocations where the steps begin that count, and end the fit before its own end."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, index: int) -> None:
        if index == BEFORE:
            gc.collect()  # what the search for networks and a trial export have left in circles
            torch.empty(MARK, dtype=torch.uint8)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if trainer.global_step == STEPS:
            raise Enough


class Enough(Exception):
    """All steps were measured; what the end of a fit needs is no step."""


def peak(network: Network, module: Callable[[], L.LightningModule], callbacks: Callable[[], list[Callback]]) -> int:
    """Bytes that were in use at most in the steps that count.

    Args:
        network: What the batches are for.
        module: Makes the LightningModule.
        callbacks: Makes the callbacks.
    """
    torch.manual_seed(0)
    batch = torch.randn(network.shape), torch.randint(0, 10, network.shape[:1])
    if torch.cuda.is_available():
        _fit(module(), callbacks(), batch)
        return torch.cuda.max_memory_allocated()
    gc.collect()  # so that nothing of an earlier fit is freed meanwhile
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            _fit(module(), callbacks(), batch)
    finally:
        gc.enable()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    used, most, counts = 0, 0, False
    for event in events:
        used += event.nbytes()
        counts = counts or event.nbytes() == MARK
        most = max(most, used) if counts else 0
    return most


def _fit(module: L.LightningModule, callbacks: list[Callback], batch: tuple[Tensor, Tensor]) -> None:
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, Mark()],
    )
    try:
        trainer.fit(module, DataLoader([batch] * (STEPS + 4), batch_size=None))
    except Enough:
        return


def measured(name: str, network: Network) -> tuple[float, float]:
    """Peaks of a callback over the plain step, and over the same technique by hand.

    Args:
        name: Of :data:`ARMS`.
        network: One of :data:`NETWORKS`.
    """
    torch.manual_seed(0)
    student, teacher = network.make(), network.make()
    arm = ARMS[name]

    def pair() -> tuple[nn.Module, nn.Module]:
        return copy.deepcopy(student), copy.deepcopy(teacher)

    plain = peak(network, lambda: Plain(pair()[0]), list)
    ours = peak(network, lambda: Plain(pair()[0]), lambda: [arm.callback(pair()[1], network.layer)])
    by_hand = peak(network, lambda: arm.by_hand(*pair(), network.layer), list)
    return ours / plain, ours / by_hand


def main() -> None:
    """Measure every callback on every network, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    warnings.filterwarnings("ignore")
    for title, network in NETWORKS.items():
        print(f"{title}, batches of shape {network.shape}: over the plain step, over the same by hand")
        for name in ARMS:
            ratio, by_hand = measured(name, network)
            print(f"  {name:28} {ratio:6.2f} {by_hand:6.2f}", flush=True)


if __name__ == "__main__":
    main()
