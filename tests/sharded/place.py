"""Scenarios under FSDP2: each a function that is run by gloo ranks on the CPU, and by one process as their reference.

A scenario takes a :class:`Place` and returns what its rank has found. It is a function of a module of this folder,
named "MODULE:FUNCTION", or "MODULE:FUNCTION:WORD:..." where it takes words after the place. ``python place.py FOLDER
RANKS SCENARIO...`` runs several, and forks for each rank of each, so that the imports are paid for once. Tests use
:func:`in_ranks` and :func:`alone`.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as L
import torch
from contract.modules import trainer as silent_trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, _fully_shard, fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, TensorDataset

FEATURES, CLASSES = 8, 5
BATCH, STEPS = 8, 6  # of one process
PATIENCE = 120.0  # seconds for one scenario

Found = dict[str, Any]


class Network(nn.Module):
    """Its layers have 15, 15 and 5 rows, which two ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 15)
        self.second = nn.Linear(15, 15)
        self.last = nn.Linear(15, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Classifier(L.LightningModule):
    """Shards each layer of its network, and the network, where there is a mesh; in one process it is plain.

    Args:
        reshard: ``reshard_after_forward`` of every unit.
        policy: Of every unit.
        sharded: Whether to shard at all.
    """

    def __init__(
        self, *, reshard: bool | int | None = True, policy: MixedPrecisionPolicy | None = None, sharded: bool = True
    ) -> None:
        super().__init__()
        self.resharding, self.policy, self.sharded = reshard, policy, sharded  # a unit has a method "reshard"
        self.build()

    def build(self) -> None:
        self.model: nn.Module = Network()

    def units(self) -> Sequence[nn.Module]:
        """What is sharded, the innermost first."""
        return [*self.model.children(), self.model]

    def configure_model(self) -> None:
        if self.device_mesh is None or not self.sharded or isinstance(self.units()[-1], FSDPModule):
            return
        settings: Any = {} if self.policy is None else {"mp_policy": self.policy}
        for unit in self.units():
            fully_shard(unit, mesh=self.device_mesh["data_parallel"], reshard_after_forward=self.resharding, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def task_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]).float(), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.task_loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.task_loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


class EverySecond(Sampler[int]):
    """The rank's part of each batch of the single process."""

    def __init__(self, rank: int, ranks: int, rows: int) -> None:
        self.indices = range(rank, rows, ranks)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def rows(count: int = BATCH * STEPS) -> TensorDataset:
    """Rows of a random, learnable problem."""
    inputs = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(7))
    return TensorDataset(inputs, inputs[:, :CLASSES].argmax(dim=1))


@dataclass(frozen=True)
class Place:
    """Where a scenario runs: in one of several ranks, or alone.

    Attributes:
        folder: Shared by the ranks; exists.
        rank: From 0.
        ranks: 1 where it is alone.
    """

    folder: Path
    rank: int = 0
    ranks: int = 1

    def loader(self, count: int = BATCH * STEPS) -> DataLoader[Any]:
        """The rank's part of the batches, in the same order each time."""
        return DataLoader(
            rows(count), batch_size=BATCH // self.ranks, sampler=EverySecond(self.rank, self.ranks, count)
        )

    def trainer(self, *callbacks: Any, distributed_checkpoint: bool = False, **settings: Any) -> L.Trainer:
        """A silent Trainer for one epoch of :data:`STEPS` steps, sharded where there are several ranks."""
        strategy = ModelParallelStrategy(
            data_parallel_size=self.ranks,
            tensor_parallel_size=1,
            process_group_backend="gloo",
            save_distributed_checkpoint=distributed_checkpoint,
        )
        defaults: dict[str, Any] = {
            "devices": self.ranks,
            "strategy": strategy if self.ranks > 1 else "auto",
            "use_distributed_sampler": False,
            "default_root_dir": self.folder,
        }
        return silent_trainer(*callbacks, **{**defaults, **settings})

    def two_epochs(self, kind: str) -> dict[str, Any]:
        """Settings of a fit of as many steps, in two epochs, with checkpoints of a kind: "full" or "sharded"."""
        return {
            "distributed_checkpoint": kind == "sharded",
            "enable_checkpointing": True,
            "max_epochs": 2,
            "count": BATCH * STEPS // 2,
        }

    def fit(
        self,
        module: L.LightningModule,
        *callbacks: Any,
        ckpt_path: Any = None,
        count: int = BATCH * STEPS,
        **settings: Any,
    ) -> L.Trainer:
        """Train a module on the rank's part of the batches, and validate it on the same rows."""
        trainer = self.trainer(*callbacks, **settings)
        trainer.fit(module, self.loader(count), self.loader(2 * BATCH), ckpt_path=ckpt_path)
        return trainer


def made(kind: type[Classifier] = Classifier, seed: int = 1, **settings: Any) -> Classifier:
    """A module from fixed random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return kind(**settings)


def full(value: Any) -> Any:
    """Tensors without their shards, detached, in dicts and lists too; collective where they have any."""
    if isinstance(value, Mapping):
        return {key: full(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [full(entry) for entry in value]
    if not isinstance(value, Tensor):
        return value
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


def left(trainer: L.Trainer, module: nn.Module, **more: Any) -> Found:
    """What most scenarios return: full weights, metrics, and what is left on the module; collective."""
    return {
        "state_dict": full(module.state_dict()),
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "attributes": sorted(vars(module)),
        **more,
    }


def farthest(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """The largest difference between two states of the same names and shapes: ``d``."""
    assert list(first) == list(second)
    assert all(first[key].shape == second[key].shape for key in first)
    return max(float((first[key].double() - second[key].double()).abs().max()) for key in first)


@contextmanager
def gathers_counted() -> Iterator[list[int]]:
    """How many parameters each all-gather of FSDP2 has gathered, in order."""
    group: Any = _fully_shard._fsdp_param_group
    original, counted = group.foreach_all_gather, []

    def counting(parameters: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        counted.append(len(parameters))
        return original(parameters, *args, **kwargs)

    group.foreach_all_gather = counting
    try:
        yield counted
    finally:
        group.foreach_all_gather = original


def alone(scenario: str, folder: Path) -> Found:
    """A scenario in this process, on whole batches."""
    folder.mkdir(parents=True, exist_ok=True)
    found: Found = _function(scenario)(Place(folder))
    return found


def in_ranks(folder: Path, *scenarios: str, ranks: int = 2, seconds: float = 900.0) -> dict[str, list[Found]]:
    """Scenarios in several ranks; what is raised in a rank is under "error" of what it has found.

    Args:
        folder: For files; a scenario's are in a folder of its own.
        scenarios: "MODULE:FUNCTION" each, with more words if it takes them.
        ranks: How many.
        seconds: For all of them; a hang is an error.

    Returns:
        What the ranks have found, by scenario.
    """
    command = [sys.executable, str(Path(__file__)), str(folder), str(ranks), *scenarios]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=True)
    return {
        name: [torch.load(_left_by(folder, name, rank), weights_only=True) for rank in range(ranks)]
        for name in scenarios
    }


def _function(scenario: str) -> Any:
    module, name, *words = scenario.split(":")
    function = getattr(importlib.import_module(f"sharded.{module}"), name)
    return lambda place: function(place, *words)


def _folder(folder: Path, scenario: str) -> Path:
    return folder / scenario.replace(":", "-").replace(" ", "_")


def _left_by(folder: Path, scenario: str, rank: int) -> Path:
    return _folder(folder, scenario) / f"found{rank}.pt"


def _run_rank(scenario: str, folder: Path, rank: int, ranks: int, port: int) -> int:
    """The life of a forked process; its environment is that of torchrun."""
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    failed = False
    try:
        found = _function(scenario)(Place(_folder(folder, scenario), rank, ranks))
    except BaseException as error:
        failed = True
        found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    torch.save(found, _left_by(folder, scenario, rank))
    if not failed and torch.distributed.is_initialized():  # else the others may wait in it for this one
        torch.distributed.barrier()
    return 0


def _run(scenario: str, folder: Path, ranks: int) -> None:
    """Fork the ranks of a scenario, and end those that still wait when time is up."""
    _function(scenario)  # a wrong name, and the imports, before the fork
    _folder(folder, scenario).mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    waiting: dict[int, int] = {}
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            code = 1
            try:
                code = _run_rank(scenario, folder, rank, ranks, port)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        waiting[process] = rank
    until = time.monotonic() + PATIENCE
    while waiting and time.monotonic() < until:
        process, _ = os.waitpid(-1, os.WNOHANG)
        waiting.pop(process, None)
        if process == 0:
            time.sleep(0.005)
    for process, rank in waiting.items():
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        if not _left_by(folder, scenario, rank).exists():
            torch.save({"error": f"rank {rank} hangs"}, _left_by(folder, scenario, rank))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[3:]:
        _run(name, Path(sys.argv[1]), int(sys.argv[2]))
