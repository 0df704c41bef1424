"""A fit as a project sets it up, all that it leaves behind, and what every fit must leave as it was."""

from __future__ import annotations

import functools
import math
import pickle
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from cases import CASES, EFFECTS, Row, callbacks_of, factors
from lightning.pytorch.loggers import CSVLogger
from torch.utils._pytree import keystr, tree_flatten_with_path

from lightning_compress import FactorTransferCallback
from lightning_compress.callbacks.returned import Returned
from lightning_compress.export import load_shrunk
from lightning_compress.mechanisms.checkpoints import SECTION

from .modules import BATCH, Classifier, difference, loader, made
from .traces import is_portable, traces

EPOCHS, EXAMPLES = 2, 4 * BATCH
ROUNDING = 1e-6
"""What sums in another order make."""


def as_it_is(module: Classifier) -> Any:
    return module


def batches(kind: type[Classifier], **settings: Any) -> Any:
    return loader(kind, **{"rows": EXAMPLES, **settings})


def two_batches(kind: type[Classifier]) -> Any:
    return batches(kind, rows=2 * BATCH)


def no_plugin() -> None:
    return None


@dataclass(frozen=True, eq=False)  # one and the same setup is a key of the fits without us
class Setup:
    """How a project trains.

    Attributes:
        settings: Arguments of the Trainer beside those of an ordinary one, or instead of them.
        batches: From the kind of module to a loader, a list of batches or a data module.
        validation: From the kind of module to a loader; None for no validation.
        prepare: What is done to the module before; it gives what the Trainer gets.
        others: Other people's callbacks, made anew for each fit; they follow ours in the list.
        plugin: Makes a plugin of the Trainer; a new one for each fit.
        by_module: Whether the module hands out our callbacks, in ``configure_callbacks``.
        kind: Kind of module, instead of that of the cell.
        paraphrased: Whether factor transfer gets its paraphraser from a file, which a fit in one process has written.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    batches: Callable[[type[Classifier]], Any] = batches
    validation: Callable[[type[Classifier]], Any] | None = two_batches
    prepare: Callable[[Classifier], Any] = as_it_is
    others: Callable[[], list[L.Callback]] = list
    plugin: Callable[[], Any] = no_plugin
    by_module: bool = False
    kind: type[Classifier] | None = None
    paraphrased: bool = False

    def but(self, **changes: Any) -> Setup:
        """The same, with some attributes changed, and with further settings of the Trainer."""
        settings = {**self.settings, **changes.pop("settings", {})}
        return replace(self, settings=settings, **changes)


PLAIN = Setup()


@dataclass(frozen=True)
class Fit:
    """A fit that is over."""

    module: Classifier
    trainer: L.Trainer
    ours: list[Any]
    folder: Path


def fitted(row: Row | None, kind: type[Classifier], folder: Path, setup: Setup, ckpt_path: Path | None = None) -> Fit:
    """Train a fresh module with the callbacks of a row, or with none of ours."""
    torch.default_generator.manual_seed(0)
    kind = setup.kind or kind
    module, ours, others = made(kind), callbacks_of(row, folder, kind), setup.others()
    if setup.paraphrased:
        ours = [
            factors(folder, kind, paraphraser=_paraphraser(kind)) if isinstance(own, FactorTransferCallback) else own
            for own in ours
        ]
    given = [] if setup.by_module else ours
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": EPOCHS,
        "default_root_dir": folder,
        "logger": CSVLogger(folder / "logs"),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "plugins": setup.plugin(),
    }
    trainer = L.Trainer(callbacks=[*given, *others], **{**defaults, **setup.settings})
    if setup.by_module:
        module.configure_callbacks = lambda: ours
    data = setup.batches(kind)
    validation = None if setup.validation is None or isinstance(data, L.LightningDataModule) else setup.validation(kind)
    try:
        trainer.fit(
            setup.prepare(module), data, validation, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None
        )
    except Exception:
        assert_untouched(module)
        raise
    finally:
        vars(module).pop("configure_callbacks", None)
    return Fit(module, trainer, ours, folder)


def assert_untouched(module: Classifier) -> None:
    """What is refused leaves the module as it was."""
    assert difference(module, made(type(module))) == 0
    if module._compiler_ctx is None:  # else Lightning has put compiled steps there
        assert_nothing_of_ours(module)


def assert_nothing_of_ours(module: Classifier) -> None:
    assert {"training_step", "validation_step", "forward", "on_save_checkpoint"}.isdisjoint(vars(module))
    assert [part for part in module.modules() if part._forward_hooks or part._forward_pre_hooks] == []
    assert is_portable(module)


@functools.cache
def without(kind: type[Classifier], setup: Setup) -> Fit:
    """The same fit without any callback of ours; only looked at."""
    return fitted(None, kind, Path(_scratch().name) / f"{kind.__name__}-{id(setup)}", setup)


@functools.cache
def _paraphraser(kind: type[Classifier]) -> Path:
    folder = Path(_scratch().name)
    row = next(case for case in CASES if case.build is factors)
    [callback] = fitted(row, kind, folder / f"{kind.__name__}-paraphraser", PLAIN).ours
    callback.save_paraphraser(folder / f"{kind.__name__}.pt")
    return folder / f"{kind.__name__}.pt"


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def saved(fit: Fit) -> Path:
    path = fit.folder / "left.ckpt"
    fit.trainer.save_checkpoint(path)
    return path


def left(fit: Fit) -> dict[str, Any]:
    """Weights, weights beside them, and the state of our callbacks: what a checkpoint has of all that."""
    checkpoint = torch.load(saved(fit), weights_only=True)
    states = {own.state_key: _comparable(checkpoint["callbacks"][own.state_key]) for own in fit.ours}
    return {"weights": checkpoint["state_dict"], "beside": checkpoint.get(SECTION), "states": states}


NOT_COMPARED = {
    "arguments",  # such as folders
    "fingerprints",  # of weights that are compared themselves
    "watch",  # losses of single batches
    "run",  # layers that were seen to run, which is not known of compiled ones
    "initial_lr",  # what schedulers note down for themselves
    "swa_lr",
}


def _comparable(state: Any) -> Any:
    if isinstance(state, list):
        return [_comparable(entry) for entry in state]
    if not isinstance(state, dict):
        return state
    return {key: _comparable(value) for key, value in state.items() if key not in NOT_COMPARED}


def gaps(first: Any, second: Any) -> dict[str, float]:
    """Where two trees differ, and by how much; infinite where something else than the value of a number differs."""
    ours, theirs = ({keystr(path): leaf for path, leaf in tree_flatten_with_path(tree)[0]} for tree in (first, second))
    found = {key: _apart(ours[key], theirs[key]) for key in ours if key in theirs}
    return {key: gap for key, gap in found.items() if gap} | dict.fromkeys(ours.keys() ^ theirs.keys(), math.inf)


def _apart(first: Any, second: Any) -> float:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.shape != second.shape or first.dtype != second.dtype:
            return math.inf
        if not first.is_floating_point():
            return 0.0 if torch.equal(first, second) else math.inf
        same = (first == second) | (first.isnan() & second.isnan())
        gaps = (first.double() - second.double()).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf)
        return float(gaps.max()) if gaps.numel() else 0.0
    if type(first) is float and type(second) is float:
        return _apart(torch.tensor(first, dtype=torch.double), torch.tensor(second, dtype=torch.double))
    return 0.0 if first == second and type(first) is type(second) else math.inf


def assert_the_contract(fit: Fit, row: Row, plain: Fit) -> None:
    """What holds in every fit: there was an effect, the keys are the user's, and nothing of ours is left.

    Args:
        fit: With the callbacks of the row.
        row: The row.
        plain: The same fit without any.
    """
    for own in fit.ours if fit.trainer.is_global_zero else ():  # of several processes one makes files and tables
        assert EFFECTS[type(own).__name__](own, fit.module), f"{type(own).__name__} had no effect"
    effect = difference(fit.module, plain.module)
    # far more than any cell may be off, so that no fit without the callback would pass for one with it
    assert effect > 10 * ROUNDING if row.changes_loss else effect == 0
    assert_nothing_else(fit, row, plain)


def assert_nothing_else(fit: Fit, row: Row, plain: Fit) -> None:
    """The contract, but for the effect."""
    assert list(fit.module.state_dict()) == list(made(type(fit.module)).state_dict())
    seen, expected = traces(fit.module), traces(plain.module)
    assert seen.keys() == expected.keys()
    other = {key: (entry, expected[key]) for key, entry in seen.items() if entry != expected[key]}
    assert not other, str(other)
    assert _can_be_copied(fit.module) == _can_be_copied(plain.module)
    assert_it_loads(fit, row)


def _can_be_copied(module: Classifier) -> bool:
    try:
        return is_portable(module)
    except (pickle.PicklingError, TypeError, AttributeError):  # the user's own module may be so
        return False


def assert_it_loads(fit: Fit, row: Row) -> None:
    """A checkpoint loads strictly into the plain module, and holds the weights of this one."""
    path, module = saved(fit), made(type(fit.module))
    if row.shrinks:
        load_shrunk(module, path)
    else:
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
    assert difference(module, fit.module) == 0


def came_home(callback: Any) -> dict[str, tuple[str, int]]:
    """Of what kind each result of a callback is, and how many entries it has."""
    names = {
        name for kind in type(callback).__mro__ for name, value in vars(kind).items() if isinstance(value, Returned)
    }
    values = {name: getattr(callback, name) for name in sorted(names)}
    return {
        name: (type(value).__name__, len(value) if hasattr(value, "__len__") else 0) for name, value in values.items()
    }


def results(callback: Any) -> Any:
    """What a callback has found, as numbers."""
    found = {"errors": getattr(callback, "reconstruction_errors", None), **callback.extra_state()}
    return _comparable({key: found[key] for key in ("errors", "masks", "quantization", "bits") if key in found})
