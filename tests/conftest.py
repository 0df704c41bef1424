"""What every test starts from: one thread, one seed, and Ctrl-C as it was; and what all of them share to save time."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import os
import signal
import sys
from pathlib import Path

import pytest  # and not torch: the process that hands out the tests would spend seconds on it before any other starts

sys.path.insert(0, str(Path(__file__).parent))  # so that `cases` and the helper packages import from anywhere


def pytest_sessionstart():
    """The garbage collector need not walk over torch, Lightning and thousands of tests again and again."""
    gc.disable()


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
    """What is in the sample is slow, or it would need no sample; a case that is marked slow itself is beyond it."""
    for item in items:
        if item.get_closest_marker("sample"):
            item.add_marker("slow")
            case = {mark.name for mark in getattr(getattr(item, "callspec", None), "marks", ())}
            own = {mark.name for mark in getattr(item.function, "pytestmark", ())}
            nearest = case & {"slow", "sample"} or own
            if "slow" in nearest and "sample" not in nearest:
                item.add_marker("beyond")


def pytest_collection_finish():
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Bit equality and stable times both need it; the messages of every Trainer would drown a failure."""
    import torch

    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def one_seed():
    """Also in processes that a test starts, which what seed_everything leaves in the environment would seed."""
    import torch

    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
    torch.default_generator.manual_seed(0)  # torch.manual_seed also formats three tracebacks for absent devices


@pytest.fixture(autouse=True)
def interrupt_handler():
    """Ctrl-C as in a terminal, also where pytest runs in the background; Lightning may leave it ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def fresh_compiler():
    """No compiled code of other tests, and none left for them."""
    import torch

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
def metrics_that_are_where_they_belong():
    """At each value that is logged, Lightning walks over all of a metric to move it to the device where it is."""
    import torch

    def move_if_elsewhere(move):
        def to(metric, *arguments, **settings):
            tensors = [value for value in vars(metric).values() if isinstance(value, torch.Tensor)]
            here = metric.is_tensor and not settings and all((value.device,) == arguments for value in tensors)
            return metric if here else move(metric, *arguments, **settings)

        return to

    with pytest.MonkeyPatch.context() as patch:
        for package in ("lightning.pytorch", "pytorch_lightning"):
            result = sys.modules.get(f"{package}.trainer.connectors.logger_connector.result")
            if result is not None:
                patch.setattr(result._ResultMetric, "to", move_if_elsewhere(result._ResultMetric.to))
        yield


def makers_of_operator_tables():
    """Owner, name and function of each; none without the extra `onnx`, or in a torch that keeps them elsewhere."""
    try:
        from torch.export import decomp_utils, exported_program
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        names = {
            ONNXRegistry: "from_torchlib",
            decomp_utils: "_collect_all_valid_cia_ops",
            exported_program: "_collect_all_valid_cia_ops",
        }
        return [(owner, name, inspect.unwrap(getattr(owner, name))) for owner, name in names.items()]
    except (ImportError, AttributeError):
        return []


@pytest.fixture(autouse=True, scope="session")
def one_operator_table():
    """Most of the time of a small export goes into tables of operators, which torch then only reads: made once here."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, make in makers_of_operator_tables():
            patch.setattr(owner, name, staticmethod(functools.cache(make)))
        yield


@pytest.fixture
def fresh_operator_table(monkeypatch):
    """The exporter as it is outside of these tests."""
    for owner, name, make in makers_of_operator_tables():
        monkeypatch.setattr(owner, name, staticmethod(make))
