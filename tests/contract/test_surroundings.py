"""What a process may have set, without anything to do with this package, is nothing that it fails of."""

from __future__ import annotations

import sys

import pytest
import torch
from cases import each_case
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.profilers import PyTorchProfiler

from lightning_compress import ExportCallback, PTQCallback, QATCallback

from .modules import Classifier, NormClassifier, difference, loader, made, trainer


class WritesOnly:
    """As in scripts that keep a log of what they print."""

    def write(self, text):
        pass

    def flush(self):
        pass


class Gone(WritesOnly):
    """The terminal was closed, and the training goes on."""

    def isatty(self):
        raise ValueError("I/O operation on closed file")

    def write(self, text):
        raise OSError(5, "Input/output error")


@pytest.mark.sample
@each_case()
@pytest.mark.parametrize("stdout", [WritesOnly, Gone, None])
def test_where_output_goes(stdout, case, tmp_path, monkeypatch):
    callback, module = case.build(tmp_path, Classifier), made(Classifier)
    others = [TQDMProgressBar()] if stdout is WritesOnly else []
    monkeypatch.setattr(sys, "stdout", stdout and stdout())
    trainer(callback, *others, enable_progress_bar=bool(others)).fit(module, loader(), loader(rows=16))


@pytest.mark.sample
@each_case()
@pytest.mark.filterwarnings("ignore:The profiler was not able:UserWarning")
def test_layers_that_a_profiler_names(case, tmp_path):
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="profile", emit_nvtx=False, schedule=None)
    found = []
    for settings in ({}, {"profiler": profiler}):
        module = made(Classifier)
        trainer(case.build(tmp_path, Classifier), **settings).fit(module, loader(), loader(rows=16))
        found.append(module.state_dict())
        hooks = [hook for part in module.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]
        assert not hooks
    assert difference(*found) == 0


@pytest.mark.sample
def test_parameters_that_are_replaced_where_a_module_is_moved():
    module, before = made(NormClassifier), made(NormClassifier)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        trainer(QATCallback()).fit(module, loader(), loader(rows=16))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    moved = zip(module.parameters(), before.parameters(), strict=True)
    assert all(not torch.equal(own, other) for own, other in moved)


@pytest.mark.sample
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_type_of_new_tensors(dtype, tmp_path):
    files = []
    for default in (torch.float32, dtype):
        module, data = made(NormClassifier), (loader(), loader(rows=16))
        torch.set_default_dtype(default)
        try:
            export = ExportCallback(tmp_path / "file.onnx", precision="int8")
            trainer(PTQCallback(), export).fit(module, *data)
        finally:
            torch.set_default_dtype(torch.float32)
        files.append(export.result.path.read_bytes())
    assert files[0] == files[1]


@pytest.mark.sample
def test_a_fit_within_autocast(tmp_path):
    export = ExportCallback(tmp_path / "file.onnx")
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        trainer(export).fit(made(Classifier), loader(), loader(rows=16))
    assert export.result.max_logit_difference < 1e-5
