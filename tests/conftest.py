"""What every test starts from: one thread, one seed, and Ctrl-C as it was."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # so that `cases` and the helper packages import from anywhere


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
