"""What training on few bits gives back of what calibration loses, through `QATCallback` and files as users have it."""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import PTQCallback, QATCallback
from lightning_compress.export.onnx import write_onnx
from lightning_compress.export.scales import Scales
from lightning_compress.mechanisms.calibration import fingerprints
from lightning_compress.mechanisms.grids import Grids
from lightning_compress.mechanisms.quantization import quantizing
from lightning_compress.mechanisms.rounding import Rounding

from .calibrated import SAMPLES, counted
from .data import Batches, Images, fashion_mnist
from .files import LOOK, classes
from .plan import VARIANTS, Option, Run
from .rounded import LATER_BATCHES, network_of, network_path, start_of
from .rounded import trained as trained_plainly
from .store import write_with_record
from .training import Classifier, fit, small_network
from .watch import predictions, share

EDGE_BITS = 8  # first and last weight, and the image, in all arms


def measure(run: Run, folder: Path) -> dict[str, Any]:
    """Make a run: train on the bits, or train without and calibrate, and look at the quantised network and its file."""
    data, begin, cpu = fashion_mnist(), time.perf_counter(), time.process_time()
    option, moved, batches, training, shared = "", 0.0, "", 0.0, {}
    if run.arm.technique == "qat":
        kept = trained(run, folder)
        training, cpu = kept["cpu_seconds"], time.process_time()  # it may have been made before
        network, grids = small_network(run.protocol.width), Grids.from_state(kept["grids"])
        batches, moved = kept["batches"], kept["moved"]
        network.load_state_dict(kept["weights"])
    else:
        source = start_of(run) if run.arm.technique == "start" else run
        kept, network, cpu = trained_plainly(source, folder), network_of(source, folder), time.process_time()
        if source is run:  # other protocols may have the same network
            batches, training = kept["batches"], kept["cpu_seconds"]
            shared = {"network": network_path(run).name, "network_seconds": training}
        found = {own.name: calibrated(network, run, own) for own in VARIANTS}
        option = max(found, key=lambda name: quantised_share(network, found[name], data.held_out))
        grids = found[option]
    network.eval()
    test = quantised(network, grids, data.test[0])
    file = through_file(network, grids, data.test[0])
    accuracy, full = share(test, data.test[1]), share(predictions(network, data.test), data.test[1])
    return {
        **shared,
        "held_out_accuracy": quantised_share(network, grids, data.held_out),
        "test_accuracy": accuracy,
        "test_accuracy_full": full,
        "lost": full - accuracy,
        "file_gap": share(file, data.test[1]) - accuracy,
        "file_agreement": share(file, test),
        "moved": moved,
        "option": option,
        "batches": batches,
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": training + time.process_time() - cpu,
        "configuration": run.configuration(),
    }


def trained(run: Run, folder: Path) -> dict[str, Any]:
    """Weights and grids of a training on the bits, made where the folder does not have them yet."""
    path = network_path(run)
    if not (folder / path).is_file():
        bits = {"weight_bits": run.protocol.bits, "activation_bits": run.protocol.activation_bits}
        qat = QATCallback(**bits, edge_bits=EDGE_BITS, max_samples=SAMPLES, **run.arm.arguments)
        torch.manual_seed(run.seed)
        begin = time.process_time()
        module = Classifier(run.protocol.width, run.rate)
        module.network = network_of(start_of(run), folder)
        fit(module, Batches(fashion_mnist().train, seed=LATER_BATCHES + run.seed), run.epochs, [qat])
        start = qat.state_dict()["start_grids"]["weights"]
        changes = [
            (grid.step / start[name]["step"] - 1).abs().reshape(-1) for name, grid in qat.quantization.weights.items()
        ]
        kept = {
            "weights": module.network.state_dict(),
            "grids": qat.quantization.state(),
            "batches": f"{module.seen:08x}",
            "moved": float(torch.cat(changes).mean()),
            "cpu_seconds": time.process_time() - begin,
        }
        write_with_record(folder, path, lambda part: torch.save(kept, part), begin)
    return torch.load(folder / path, weights_only=True)


def calibrated(network: nn.Module, run: Run, option: Option) -> Grids:
    """What one way of calibration finds for a network that is trained."""
    bits = {"weight_bits": run.protocol.bits, "activation_bits": run.protocol.activation_bits}
    ptq = PTQCallback(**bits, edge_bits=EDGE_BITS, max_samples=SAMPLES, **option.arguments)
    data = fashion_mnist()
    torch.manual_seed(run.seed)
    # it is looked at elsewhere
    counted(ptq, copy.deepcopy(network), Batches(data.train, seed=run.seed), data.held_out, limit_test_batches=1)
    return ptq.quantization


def quantised(network: nn.Module, grids: Grids, images: Tensor) -> Tensor:
    """The classes that a quantised network gives."""
    with torch.no_grad(), quantizing(network, Rounding(network, grids)):
        return torch.cat([network(part).argmax(dim=1) for part in images.split(LOOK)])


def quantised_share(network: nn.Module, grids: Grids, images: Images) -> float:
    network.eval()
    return share(quantised(network, grids, images[0]), images[1])


def through_file(network: nn.Module, grids: Grids, images: Tensor) -> Tensor:
    """The classes that the integer file gives in ONNX Runtime."""
    grids = replace(grids, network="", fingerprints=fingerprints(network))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        write_onnx(
            network, path, images[:4], "int8", scales=Scales([grids]), network="", dynamic_batch=True, opset=None
        )
        return classes(path, images)
