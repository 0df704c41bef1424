"""What a callback could leave behind on a module, and what a teacher must look like afterwards."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from torch import nn


def traces(module: nn.Module) -> dict[str, Any]:
    """Attributes, hooks and flags of every submodule and tensor, and the hooks and modes of the process."""
    seen: dict[str, Any] = {
        "global hooks": [
            len(value)
            for key, value in vars(torch.nn.modules.module).items()
            if key.startswith("_global_") and "hooks" in key and isinstance(value, dict)
        ],
        "function modes": torch._C._len_torch_function_stack(),
        "grad mode": torch.is_grad_enabled(),
    }
    for name, part in module.named_modules():
        attributes = vars(part)
        hooks = {key: len(value) for key, value in attributes.items() if "hooks" in key and hasattr(value, "__len__")}
        seen[name] = (type(part).__qualname__, sorted(attributes), hooks, part.training)
    for name, parameter in module.named_parameters():
        hooks = [len(getattr(parameter, key) or ()) for key in ("_backward_hooks", "_post_accumulate_grad_hooks")]
        seen[f"{name} (tensor)"] = (type(parameter).__name__, parameter.requires_grad, hooks, sorted(vars(parameter)))
    return seen


def is_portable(module: nn.Module) -> bool:
    """Whether copies by pickle and deepcopy hold the same weights."""
    weights = module.state_dict()
    copies = pickle.loads(pickle.dumps(module)).state_dict(), copy.deepcopy(module).state_dict()
    return all(torch.equal(weights[key], made[key]) for made in copies for key in weights)


def condition(network: nn.Module) -> dict[str, Any]:
    """Everything that a frozen teacher must get back: flags, dtype, device, values, and the very tensors."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {
        "training": [part.training for part in network.modules()],
        "tensors": {
            name: (id(value), value.requires_grad, value.dtype, value.device, value.tolist(), value.grad is None)
            for name, value in tensors.items()
        },
        "hooks": traces(network),
    }
