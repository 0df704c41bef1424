"""Modules whose parameters FSDP2 shards: which they are, the rank's own part of a tensor, and a copy without shards.

Supported is what ``fully_shard`` does by default: each parameter is a ``DTensor`` whose rows are shared by the ranks of
one mesh dimension. Between a forward and a backward pass modules may hold whole parameters, in the type of the mixed
precision policy; whoever looks at parameters asks for the shards first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_compress import _compat


def sharded_units(root: nn.Module) -> list[FSDPModule]:
    """The modules below a root, itself included, that ``fully_shard`` was called with.

    Args:
        root: A module.

    Returns:
        In the order of ``modules()``; empty where nothing is sharded.

    Example:
        >>> sharded_units(nn.Linear(1, 1))
        []
    """
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def class_name(module: nn.Module) -> str:
    """The class of a module as its author named it, for messages; ``fully_shard`` puts one of its own in its place.

    Args:
        module: Sharded or not.

    Returns:
        The name without its module.

    Example:
        >>> class_name(nn.Linear(1, 1))
        'Linear'
    """
    return _compat.users_class(module).__name__


def is_shard(tensor: Any) -> bool:
    """Whether a tensor is the handle of one that several ranks share.

    Args:
        tensor: Anything.

    Returns:
        True for a ``DTensor``.

    Example:
        >>> is_shard(torch.ones(1))
        False
    """
    return isinstance(tensor, DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: to be read, and written to, without autograd.

    Args:
        tensor: Sharded or not.

    Returns:
        The rank's rows, maybe none; the tensor itself, detached, where it is not sharded.

    Example:
        >>> own_part(torch.ones(2, requires_grad=True))
        tensor([1., 1.])
    """
    part = tensor.detach()
    return part.to_local() if isinstance(part, DTensor) else part


def shards_in_place(root: nn.Module) -> None:
    """Let a module hold its shards again, where it kept whole parameters after a forward pass.

    Args:
        root: A module; nothing happens where it is not sharded. The next forward pass gathers anew.

    Example:
        >>> shards_in_place(nn.Linear(1, 1))
    """
    for unit in sharded_units(root):
        unit.reshard()


def refuse_layout(root: nn.Module, who: str) -> None:
    """Refuse parameters that are shared in another way than rows over the ranks of one mesh dimension.

    Args:
        root: The module.
        who: Whose name the message bears.

    Raises:
        ValueError: If a parameter is replicated, as in hybrid sharding, or split by a tensor-parallel plan.

    Example:
        >>> refuse_layout(nn.Linear(1, 1), "PSGDCallback")  # nothing is sharded
    """
    shards_in_place(root)
    meshes: list[Any] = []
    for name, parameter in root.named_parameters():
        own: Any = parameter
        if not isinstance(own, DTensor):
            continue
        if [str(placement) for placement in own.placements] != ["S(0)"]:
            raise ValueError(
                f"{who} works with parameters whose rows are shared by the ranks of one mesh dimension, as fully_shard "
                f"leaves them, and '{name}' lies as {own.placements} on {own.device_mesh}: call "
                "fully_shard(module, mesh=self.device_mesh['data_parallel']) without shard_placement_fn, tensor "
                "parallelism or replication, or use one device or DDP"
            )
        meshes += [own.device_mesh] if own.device_mesh not in meshes else []
    if len(meshes) > 1:
        raise ValueError(f"{who} works with parameters on one mesh, and these lie on {len(meshes)}; shard all on one")


class Ranks:
    """The ranks that share tensors, to compute with what lies on all of them.

    Args:
        tensors: Those tensors; if none of them is sharded, everything is computed here.

    Example:
        >>> Ranks([torch.ones(2)]).largest(torch.tensor([3.0]))
        tensor([3.])
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.mesh = next((tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)), None)
        """What they lie on; None where all is here."""

    @property
    def several(self) -> bool:
        """Whether a rank holds a part only."""
        return self.mesh is not None

    def largest(self, values: Tensor) -> Tensor:
        """The largest of what each rank has, of the same shape."""
        return self._reduced(values, "MAX")

    def total(self, values: Tensor) -> Tensor:
        """The sum of what each rank has, of the same shape."""
        return self._reduced(values, "SUM")

    def rows(self, values: Tensor, tensor: Tensor) -> Tensor:
        """What the ranks have for their own rows of a tensor, of shape ``(rows,)``, for all of its rows."""
        if not isinstance(tensor, DTensor):
            return values
        shape, mesh = tensor.shape[:1], tensor.device_mesh
        return DTensor.from_local(values, mesh, tensor.placements, shape=shape, stride=(1,)).full_tensor()

    def _reduced(self, values: Tensor, operation: str) -> Tensor:
        if self.mesh is None:
            return values
        result = values.detach().to(self.mesh.device_type, copy=True)
        operator = getattr(torch.distributed.ReduceOp, operation)
        torch.distributed.all_reduce(result, operator, group=self.mesh.get_group())
        return result.to(values.device)
