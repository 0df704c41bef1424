"""Mixed precision: bfloat16, and float16 with a scaler that is really used."""

from __future__ import annotations

import pytest
import torch
from cases import each_case

from .modules import BATCH, NormClassifier, difference, loader, made, scaled, trainer


def trained(callbacks, precision, seen):
    module = made(NormClassifier)
    module.model[0].register_forward_hook(lambda part, args, out: seen.append(out.dtype))
    plugins = scaled() if precision == "16-mixed" else None
    fitting = trainer(*callbacks, plugins=plugins, precision=None if plugins else precision)
    fitting.fit(module, loader(), loader(rows=2 * BATCH))
    return module, fitting


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16), ("bf16-true", torch.bfloat16)],
)
@each_case(heavy_is_slow=True)
def test_precision(case, precision, dtype, tmp_path):
    seen: list[torch.dtype] = []
    plain, _ = trained([], precision, [])
    with case.expects("scaler" if precision == "16-mixed" else precision):
        module, fitting = trained([case.build(tmp_path, NormClassifier)], precision, seen)
    assert seen[0] == dtype
    assert seen.count(dtype) >= 8  # the steps ran at that precision; copies that are exported do not
    assert (difference(module, plain) > 0) == case.changes_loss
    if precision == "16-mixed":
        scaler = fitting.precision_plugin.scaler
        assert scaler.is_enabled()
        assert scaler._growth_tracker.item() == 8  # eight steps, each through the scaler, none skipped
