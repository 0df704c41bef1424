"""Rewinding: after a pruning, train again from an earlier point, or with the learning rates of one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lightning_compress.mechanisms.gathering import rows_of, sharded_as
from lightning_compress.mechanisms.owned import parameters_of
from lightning_compress.mechanisms.sharding import own_part, shards_in_place

RATES = ("lr", "initial_lr", "momentum", "betas", "max_lr", "min_lr")


class TrainingStart:
    """The state of a training where it began, to go back to.

    Args:
        trainer: The Trainer; its optimizers and learning-rate schedulers are looked at.
        module: The LightningModule.
        weights: Whether to keep parameters, buffers and the state of the optimizers too, not only learning rates.
    """

    def __init__(self, trainer: Any, module: nn.Module, *, weights: bool) -> None:
        self.state: dict[str, Any] = {
            "rates": [_rates(optimizer) for optimizer in trainer.optimizers],
            "schedulers": [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        }
        """Tensors and primitives, for a checkpoint."""
        if weights:
            self.state["module"] = {name: value.detach().clone() for name, value in _tensors(module).items()}
            self.state["optimizers"] = [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers]

    def restore(self, trainer: Any, module: nn.Module) -> None:
        """Go back.

        Args:
            trainer: The Trainer.
            module: The LightningModule.

        Raises:
            RuntimeError: If the optimizers have other groups of parameters than at the start.
        """
        now = [len(optimizer.param_groups) for optimizer in trainer.optimizers]
        if now != [len(groups) for groups in self.state["rates"]]:
            raise RuntimeError(
                "there is no way back to the start of the training: the optimizers have other groups of parameters "
                "than then, as BackboneFinetuning adds some; use rewind=None"
            )
        tensors = _tensors(module)
        for name, value in self.state.get("module", {}).items():
            own_part(tensors[name]).copy_(rows_of(value, tensors[name]))
        for optimizer, state in zip(trainer.optimizers, self.state.get("optimizers", ()), strict=False):
            optimizer.load_state_dict(_sharded(copy.deepcopy(state), optimizer))
        for config, state in zip(trainer.lr_scheduler_configs, self.state["schedulers"], strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))
        for optimizer, groups in zip(trainer.optimizers, self.state["rates"], strict=True):
            for group, rates in zip(optimizer.param_groups, groups, strict=True):
                group.update(copy.deepcopy(rates))


def _rates(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: group[key] for key in RATES if key in group} for group in optimizer.param_groups]


def _sharded(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer, whose tensors a checkpoint may have whole, as its parameters are."""
    parameters = list(parameters_of(optimizer))
    for index, entries in state["state"].items():
        parameter = parameters[index]
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                entries[key] = sharded_as(rows_of(value, parameter), parameter)
    return state


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    shards_in_place(module)
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
