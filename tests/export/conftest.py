from __future__ import annotations

import pytest
import torch


@pytest.fixture
def rounded_float32():
    """Products of float32 may be rounded, as Lightning advises; not every processor does so."""
    torch.set_float32_matmul_precision("medium")
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    yield
    left = torch.get_float32_matmul_precision(), torch.backends.mkldnn.conv.fp32_precision
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.conv.fp32_precision = "none"
    assert left == ("medium", "bf16")
