"""How each callback is attached to somebody else's module, and how it shows that it did something there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning_compress

from .stranger import STEPS, Stranger

SPARSITY = 0.5


@dataclass(frozen=True)
class Technique:
    """One callback.

    Attributes:
        arguments: What every module gets.
        taught: Whether it has a teacher.
        shown: Given the callback, the trained module, its twin without the callback, and the Trainer, asserts the
            effect and says it in a few words.
        changes: Whether the trained weights differ from those of the twin.
    """

    arguments: Mapping[str, Any]
    shown: Callable[[Any, Any, Any, Any], str]
    taught: bool = False
    changes: bool = True
    writes: str | None = None


def _a_term(callback: Any, module: Any, plain: Any, trainer: Any) -> str:
    assert callback.effects[callback.effect] == STEPS
    assert float(trainer.callback_metrics[f"compress/{callback.name}/loss"]) > 0
    return f"{callback.effect} in {STEPS} of {STEPS} steps"


def _sparse(callback: Any, module: Any, plain: Any, trainer: Any) -> str:
    weights = module.state_dict()
    zeros = sum(int((weights[name] == 0).sum()) for name in callback.masks)
    total = sum(weights[name].numel() for name in callback.masks)
    assert zeros / total >= callback.sparsity - 2 * len(callback.masks) / total
    theirs = plain.state_dict()
    assert zeros > sum(int((theirs[name] == 0).sum()) for name in callback.masks)
    return f"{zeros / total:.0%} of {total} weights are 0"


def _scaled(callback: Any, module: Any, plain: Any, trainer: Any) -> str:
    assert callback.effects[callback.effect] == STEPS
    assert callback.lambda_s > 0
    assert callback.grids
    return f"{len(callback.grids)} weights drawn to a grid"


def _quantised(callback: Any, module: Any, plain: Any, trainer: Any) -> str:
    grids = callback.quantization
    assert grids.weights
    assert grids.activations
    return f"{len(grids.weights)} weights and {len(grids.activations)} activations on grids"


def _smaller(callback: Any, module: Any, plain: Any, trainer: Any) -> str:
    before, after = (sum(parameter.numel() for parameter in one.parameters()) for one in (plain, module))
    assert after < before
    return f"{before} parameters became {after}"


def _exported(callback: Any, module: Any, plain: Any, trainer: Any) -> str:
    result = callback.result
    assert result.path.stat().st_size == result.bytes > 0
    assert result.max_logit_difference < 1e-3
    return f"a file of {result.bytes} bytes, {result.max_logit_difference:.0e} from the module"


def _reported(callback: Any, module: Any, plain: Any, trainer: Any) -> str:
    names = [row.name for row in callback.result.rows]
    assert names == ["before", "after"]
    return f"rows {', '.join(names)}; {len(callback.result.layers)} layers"


TECHNIQUES = {
    "DistillationCallback": Technique({}, _a_term, taught=True),
    "AttentionTransferCallback": Technique({}, _a_term, taught=True),
    "FactorTransferCallback": Technique({"pretrain_epochs": 1, "weight": 1.0}, _a_term, taught=True),
    "PSGDCallback": Technique({"bits": 4}, _scaled),
    "PTQCallback": Technique({}, _quantised, changes=False),
    "QATCallback": Technique({}, _quantised),
    "PruningCallback": Technique({"sparsity": SPARSITY}, _sparse),
    "DPFCallback": Technique({"sparsity": SPARSITY, "update_interval": 1}, _sparse),
    "DCILCallback": Technique({"sparsity": SPARSITY, "update_interval": 1}, _sparse),
    "StructuredPruningCallback": Technique({"ratio": 0.5, "min_channels": 1}, _smaller),
    "ExportCallback": Technique({}, _exported, changes=False, writes="model.onnx"),
    "CompressionReport": Technique({"latency": False}, _reported, changes=False, writes="report"),
}


def attached(technique: str, stranger: Stranger, folder: Path) -> Any:
    """The callback, for this module."""
    row = TECHNIQUES[technique]
    arguments = {**row.arguments, **stranger.arguments.get(technique, {})}
    if row.writes is not None:
        arguments["path"] = folder / row.writes
    if row.taught:
        arguments.setdefault("teacher", stranger.taught_by())
    return getattr(lightning_compress, technique)(**arguments)
