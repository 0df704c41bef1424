from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.export import EvaluationError, to_onnx
from lightning_compress.export.runtime import OnnxNetwork


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    class Two(nn.Module):
        def forward(self, x, index):
            return x * 2, index + 1

    file = tmp_path_factory.mktemp("runtime") / "two.onnx"
    to_onnx(Two(), file, (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64)))
    return file


def test_runs_counts_and_pickles(path):
    network = OnnxNetwork(path, threads=1)
    assert network._session is None
    assert network.calls == 0
    x = torch.arange(6.0).reshape(3, 2).T  # (2, 3), not contiguous
    doubled, following = network.run([x.double().requires_grad_(), torch.zeros(2, 3, dtype=torch.int32)])
    assert torch.equal(doubled, x * 2)
    assert doubled.dtype == torch.float32
    assert torch.equal(following, torch.ones(2, 3, dtype=torch.int64))
    assert network.calls == 1
    assert network.session.get_session_options().intra_op_num_threads == 1
    again = pickle.loads(pickle.dumps(network))
    assert again._session is None
    assert torch.equal(again.run([x.bfloat16(), torch.zeros(2, 3, dtype=torch.int64)])[0], x * 2)
    assert (again.input_names, again.output_names) == (("x", "index"), ("output_0", "output_1"))
    assert again.metadata["lightning_compress.precision"] == "fp32"


def test_outputs_own_their_memory(path):
    network, index = OnnxNetwork(path), torch.zeros(1, 3, dtype=torch.int64)
    first = network.run([torch.ones(1, 3), index])[0]
    network.run([torch.full((1, 3), 9.0), index])
    first.add_(1)
    assert np.array_equal(first.numpy(), [[3, 3, 3]])


def test_bad_calls(path):
    network, index = OnnxNetwork(path), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(EvaluationError, match=r"takes 2 tensors, \['x', 'index'\], but got 1"):
        network.run([torch.ones(2, 3)])
    with pytest.raises(
        EvaluationError, match=r"input 'index' of '.*two\.onnx' is torch\.int64, but got torch\.float32"
    ):
        network.run([torch.ones(2, 3), torch.ones(2, 3)])
    with pytest.raises(
        EvaluationError, match=r"does not take inputs of shape \{'x': \(2, 4\).*it declares .*\('batch', 3\)"
    ):
        network.run([torch.ones(2, 4), index])
    assert network.calls == 0


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path '.*none\.onnx' is not a file"):
        OnnxNetwork(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(EvaluationError, match=r"ONNX Runtime cannot open '.*text\.onnx'"):
        OnnxNetwork(tmp_path / "text.onnx").run([torch.ones(1)])
    with pytest.raises(ValueError, match="threads must be at least 1 or None, got 0"):
        OnnxNetwork(tmp_path / "text.onnx", threads=0)


FORKED = """
    import gc, multiprocessing, sys, time

    from lightning_compress.export.runtime import OnnxNetwork
    import torch

    def work(network):
        gc.collect()
        if network is not None:
            x = torch.ones(2, 3)
            assert torch.equal(network.run([x, x.long()])[0], 2 * x)

    gc.disable()
    network = OnnxNetwork(sys.argv[1], threads=3)
    network.run([torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64)])
    time.sleep(1)  # until its threads wait
    if sys.argv[2] == "forgotten":
        network.itself, network = network, None
    fork = multiprocessing.get_context("fork")

    def again(network):  # a worker's own
        child = fork.Process(target=work, args=(network,))
        child.start()
        child.join()
        work(network)
        sys.exit(child.exitcode)

    process = fork.Process(target=again, args=(network,))
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.mark.sample
@pytest.mark.parametrize("network", ["forgotten", "used"])
def test_a_forked_process_does_not_wait_for_threads_that_it_does_not_have(path, network):
    """As a worker of a data loader, whose garbage collector comes upon a session of its parent's."""
    command = [sys.executable, "-c", textwrap.dedent(FORKED), str(path), network]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        assert process.wait(timeout=90) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
