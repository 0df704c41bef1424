"""What does not work under FSDP2, and must say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.utils import clip_grad_norm_

from lightning_compress import (
    AttentionTransferCallback,
    DPFCallback,
    PSGDCallback,
    PTQCallback,
    QATCallback,
    StructuredPruningCallback,
    _compat,
)
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


class Extending(Callback):
    """Lets the first weight be gathered in a way of its own, as quantised tensors are."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        shard: Any = _compat.shard(pl_module.model.first.weight)
        shard.fsdp_pre_all_gather = lambda mesh: ((shard,), None)
        shard.fsdp_post_all_gather = lambda outputs, metadata, dtype, out=None: None


def callback(place: Place, name: str) -> Found:
    place.fit(made(Imaging), CALLBACKS[name]())
    return {}


def validated(place: Place) -> Found:
    """Outside of a fit, where quantised networks are shown too."""
    trainer = place.trainer(PTQCallback())
    trainer.validate(made(Imaging), place.loader(), verbose=False)
    return {}


def gathered(place: Place, how: str) -> Found:
    """By a masking callback, which presents what is gathered; "fewer" is of four ranks."""
    if how == "extended":
        place.fit(made(), Extending(), DPFCallback(0.5))
    else:
        place.fit(made(reshard=2), DPFCallback(0.5))
    return {}


def one_step(place: Place, size: Any) -> Found:
    """Grids of PSGD have one step a weight, of which each process would see a part only."""
    path = place.folder / "scaled.ckpt"
    place.fit(made(), PSGDCallback(4)).save_checkpoint(path)
    place.fit(made(), QATCallback(weight_bits=4, activation_bits=None, step_size=size, grids_from=path))
    return {}


class Clipping(Classifier):
    """Does something with gradients before they are those of the weights."""

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        super().backward(loss, *args, **kwargs)
        clip_grad_norm_(self.parameters(), 0.05)


def backward(place: Place, name: str) -> Found:
    """Before the first step, also where rounding begins later; what presents nothing has no such limit."""
    place.fit(made(Clipping), *callbacks_of("DistillationCallback"))
    late = QATCallback(weight_bits=4, activation_bits=None, start=0.5)
    module = made(Clipping)
    module.on_train_batch_start = _no_step
    place.fit(module, DPFCallback(0.5) if name == "dpf" else late)
    return {}


def _no_step(batch: Any, batch_idx: int) -> None:
    raise RuntimeError("a step has begun")


def layout(place: Place, kind: str) -> Found:
    place.fit(made({"columns": Columns, "hybrid": Hybrid}[kind]), *callbacks_of("DistillationCallback"))
    return {}


def tensor_parallel(place: Place) -> Found:
    """What Lightning's strategy does if it is told nothing."""
    strategy = ModelParallelStrategy(process_group_backend="gloo")
    place.fit(made(Tensors), *callbacks_of("DistillationCallback"), strategy=strategy)
    return {}
