"""What every test starts from: one thread, one seed, and Ctrl-C as it was; and what all of them share to save time."""

from __future__ import annotations

import functools
import gc
import logging
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # so that `cases` and the helper packages import from anywhere


def pytest_collection_finish():
    """The garbage collector need not walk over torch, Lightning and thousands of tests again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Bit equality and stable times both need it; the messages of every Trainer would drown a failure."""
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def interrupt_handler():
    """Ctrl-C as in a terminal, also where pytest runs in the background; Lightning may leave it ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def fresh_compiler():
    """No compiled code of other tests, and none left for them."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def one_look_at_the_entry_points():
    """Every Trainer reads the metadata of all installed packages, which no test changes."""
    with pytest.MonkeyPatch.context() as patch:
        for package in ("lightning.fabric", "lightning_fabric"):
            registry = sys.modules.get(f"{package}.utilities.registry")
            if registry is not None:
                patch.setattr(registry, "entry_points", functools.cache(registry.entry_points))
        yield


@pytest.fixture(autouse=True, scope="session")
def one_operator_table():
    """Half of the time of a small export goes into torch's table of operators, which it only reads: made once here."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # without the extra `onnx`, or in a torch that keeps it elsewhere
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture
def fresh_operator_table(monkeypatch):
    """The exporter as it is outside of these tests."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    kept = ONNXRegistry.from_torchlib
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", staticmethod(getattr(kept, "__wrapped__", kept)))
