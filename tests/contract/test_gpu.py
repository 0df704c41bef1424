"""Every row on a GPU, in each precision: it trains, measures, and leaves the module where it was."""

from __future__ import annotations

import pytest
import torch
from cases import each_case
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compress import QATCallback

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


@pytest.mark.parametrize("step_size", ["mse", "observed", "learned"])
def test_quantised_training_on_a_gpu_is_resumed(step_size, tmp_path):
    """Grids, factors and their optimizer go where the network is; what is shown on a CPU is the same network."""
    whole, resumed, states = made(NormClassifier), made(NormClassifier), []
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=4)
    for module, callbacks, checkpoint in ((whole, [saver], None), (resumed, [], tmp_path / "step=4.ckpt")):
        qat = QATCallback(weight_bits=4, step_size=step_size)
        settings = {"max_epochs": 2, "enable_checkpointing": bool(callbacks), "accelerator": "gpu"}
        run = trainer(qat, *callbacks, **settings)
        run.fit(
            module, loader(rows=32), loader(rows=32), ckpt_path=checkpoint, weights_only=True if checkpoint else None
        )
        states.append(qat.quantization)
        [shown] = trainer(qat).validate(module, loader(rows=32), verbose=False)
        assert shown["val_loss"] == pytest.approx(qat.metrics["val_loss"], abs=1e-3)
    assert difference(whole.cpu(), resumed.cpu()) <= 1e-5
    for name, grid in states[0].weights.items():
        torch.testing.assert_close(grid.step, states[1].weights[name].step, rtol=1e-4, atol=0)
