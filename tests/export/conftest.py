from __future__ import annotations

import pytest
import torch


@pytest.fixture
def rounded_float32():
    """Products of float32 may be rounded, as Lightning advises; not every processor does so. Says what holds now."""
    backend = torch.backends.mkldnn
    torch.set_float32_matmul_precision("medium")
    backend.conv.fp32_precision = "bf16"
    yield lambda: {backend.matmul.fp32_precision, backend.conv.fp32_precision}
    left = torch.get_float32_matmul_precision(), backend.conv.fp32_precision
    torch.set_float32_matmul_precision("highest")
    backend.conv.fp32_precision = "none"
    assert left == ("medium", "bf16")
