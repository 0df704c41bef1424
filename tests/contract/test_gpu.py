"""Every row on a GPU, in each precision: it trains, measures, and leaves the module where it was."""

from __future__ import annotations

import pytest
import torch
from cases import each_case

from .modules import NormClassifier, difference, loader, made, trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (GPU)"),
]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@each_case()
def test_a_fit_on_a_gpu(case, precision, tmp_path):
    plain, module = made(NormClassifier), made(NormClassifier)
    states = []
    for each, callbacks in ((plain, []), (module, [case.build(tmp_path, NormClassifier)])):
        torch.cuda.manual_seed_all(0)
        trainer(*callbacks, accelerator="gpu", precision=precision).fit(
            each, loader(NormClassifier), loader(NormClassifier)
        )
        states.append(torch.cuda.get_rng_state())
        assert "training_step" not in vars(each)
    assert torch.equal(*states)
    assert (difference(plain.cpu(), module.cpu()) > 1e-4) == case.changes_loss
