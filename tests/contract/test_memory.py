"""What a callback needs of memory, and that it needs no more after a thousand steps."""

from __future__ import annotations

import gc
import io
from collections.abc import Mapping

import lightning.pytorch as L
import pytest
import torch
from benchmarks.memory import ARMS, NETWORKS, measured
from cases import CASES
from records import record
from torch import nn

from lightning_compress.tracking.history import LayerHistory

from .modules import Classifier, fit

WARM, FIRST, LAST = 500, 600, 1600
SELDOM = (LAST - FIRST) // 10
"""What grows, grows with the steps; less than once in ten are phases of a technique."""

# Peak of a step over the plain step, on the ResNet and on the network of tokens, rounded up; None where it is refused.
PEAKS = {
    "DistillationCallback": (1.05, 1.35),
    "AttentionTransferCallback": (1.1, 1.35),
    "FactorTransferCallback": (1.2, None),
    "PSGDCallback": (1.05, 1.05),
    "PTQCallback": (1.05, 1.05),
    "QATCallback": (1.95, 1.75),
    "PruningCallback": (1.1, 1.95),
    "DPFCallback": (1.1, 1.95),
    "DCILCallback": (1.95, None),
    "StructuredPruningCallback": (0.7, None),
    "ExportCallback": (1.05, 1.05),
    "CompressionReport": (1.05, 1.35),
}
CELLS = [
    pytest.param(name, title, most, id=f"{name}-{title}")
    for name, peaks in PEAKS.items()
    for title, most in zip(NETWORKS, peaks, strict=True)
    if most is not None
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*paraphraser random")
@pytest.mark.parametrize(("name", "title", "most"), CELLS)
def test_the_peak_of_a_step(name, title, most, tmp_path, monkeypatch):
    """The count of allocations is exact, so a ratio that is beyond is a copy too many."""
    monkeypatch.chdir(tmp_path)
    ratio, by_hand = measured(name, NETWORKS[title])
    assert ratio <= most
    record("memory", name, title, "works", f"{ratio:.2f} times the plain step; {by_hand:.2f} times the same by hand")


def test_every_callback_is_measured():
    assert set(PEAKS) == set(ARMS) == {case.name for case in CASES}


class Sizes(L.Callback):
    """All that could grow, at two steps; and once before, since the first look itself leaves something."""

    def __init__(self, watched):
        self.watched, self.seen = watched, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in (WARM, FIRST, LAST) and trainer.global_step not in self.seen:
            self.seen[trainer.global_step] = sizes(trainer, pl_module, self.watched)


def sizes(trainer, pl_module, watched):
    gc.collect()
    objects = gc.get_objects()
    tensors = [value for value in objects if type(value) in (torch.Tensor, nn.Parameter)]
    tensors = [value for value in tensors if value.layout is torch.strided]  # other tests may have left sparse ones
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}
    saved = io.BytesIO()
    torch.save(trainer._checkpoint_connector.dump_checkpoint(), saved)
    return {
        "objects": len(objects),
        "tensors": len(tensors),
        "numbers in tensors": sum(storages.values()) // 4,
        "hooks": sum(hooks(module) for module in pl_module.modules()),
        "entries": entries([vars(callback) for callback in watched] + [vars(pl_module)], set()),
        "numbers in a checkpoint": len(saved.getvalue()) // 8,
    }


def hooks(module):
    return sum(len(value) for key, value in vars(module).items() if "hooks" in key and isinstance(value, Mapping))


def entries(values, seen):
    """Entries of all containers that can be reached from our objects; a list of numbers is no object for ``gc``."""
    count = 0
    for value in values:
        if id(value) in seen or isinstance(value, (str, bytes, torch.Tensor, L.Trainer)):
            continue
        seen.add(id(value))
        if isinstance(value, LayerHistory):
            assert len(value) <= value.most
        elif isinstance(value, Mapping):
            count += len(value) + entries(list(value.values()), seen)
        elif isinstance(value, (list, tuple, set)):
            count += len(value) + entries(list(value), seen)
        elif type(value).__module__.startswith("lightning_compress"):
            count += entries([getattr(value, "__dict__", {})], seen)
    return count


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_nothing_grows_over_a_thousand_steps(case, tmp_path):
    callback = case.build(tmp_path, Classifier)
    watch = Sizes([callback])
    fit(Classifier, callback, watch, max_epochs=-1, max_steps=LAST + 1, check_val_every_n_epoch=25)
    first, last = watch.seen[FIRST], watch.seen[LAST]
    growth = {key: last[key] - first[key] for key in first}
    assert growth["hooks"] == 0
    assert all(entry <= SELDOM for entry in growth.values()), growth
    record("memory", case.name, "a thousand steps", "works", "nothing grows")
