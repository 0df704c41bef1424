"""What does not work under FSDP2, and must say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_compress import AttentionTransferCallback, PTQCallback, StructuredPruningCallback
from sharded.circumstances import Imaging, teacher
from sharded.place import Classifier, Found, Place, made
from sharded.teachers import callbacks_of

CALLBACKS: dict[str, Callable[[], Any]] = {
    "StructuredPruningCallback": lambda: StructuredPruningCallback(0.5, min_channels=1),
    "PTQCallback": PTQCallback,
    "AttentionTransferCallback": lambda: AttentionTransferCallback(
        teacher(), map_kind="gradient", mode="paper", weight=0.5
    ),
}


class Columns(Classifier):
    """Parameters are split along their second dimension."""

    def configure_model(self) -> None:
        fully_shard(self.model.first, mesh=self.device_mesh["data_parallel"], shard_placement_fn=_second_dimension)


def _second_dimension(parameter: Any) -> Shard | None:
    return Shard(1) if parameter.ndim > 1 else None


class Hybrid(Classifier):
    """Each rank has all of each parameter, as where groups of ranks share them."""

    def configure_model(self) -> None:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        fully_shard(self.model, mesh=mesh)


class Tensors(Classifier):
    """A tensor-parallel plan."""

    def configure_model(self) -> None:
        parallelize_module(self.model, self.device_mesh["tensor_parallel"], {"first": ColwiseParallel()})


def callback(place: Place, name: str) -> Found:
    place.fit(made(Imaging), CALLBACKS[name]())
    return {}


def validated(place: Place) -> Found:
    """Outside of a fit, where quantised networks are shown too."""
    trainer = place.trainer(PTQCallback())
    trainer.validate(made(Imaging), place.loader(), verbose=False)
    return {}


def layout(place: Place, kind: str) -> Found:
    place.fit(made({"columns": Columns, "hybrid": Hybrid}[kind]), *callbacks_of("DistillationCallback"))
    return {}


def tensor_parallel(place: Place) -> Found:
    """What Lightning's strategy does if it is told nothing."""
    strategy = ModelParallelStrategy(process_group_backend="gloo")
    place.fit(made(Tensors), *callbacks_of("DistillationCallback"), strategy=strategy)
    return {}
