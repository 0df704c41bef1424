"""What rounding makes of a trained network: its accuracy on the fly, and with what a calibration would still mend."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_compress import PSGDCallback
from lightning_compress.demo import SmallResNet
from lightning_compress.functional.gradients import position_scale
from lightning_compress.functional.quantizers import mse_grid, nearest_grid_point, quantization_grid
from lightning_compress.mechanisms.warping import WarpedWeights

from .data import Batches, Images, fashion_mnist
from .plan import FULL, PLAIN, Protocol, Run, digest
from .store import write_with_record
from .training import Classifier, fit, small_network
from .watch import predictions, reestimated, share

LATER_BATCHES = 100  # added to the seed: who goes on sees other batches
EDGE_BITS, FEW_BITS = 8, 4  # of first and last layer where the others have fewer than the latter
GRANULARITIES, RANGES, STATISTICS = ("tensor", "channel"), ("max", "mse"), ("kept", "reestimated")


class PermutedWeights(WarpedWeights):
    """Weights whose gradients are scaled as much, but each by the factor of another weight of its layer."""

    generator: torch.Generator

    def scale_gradients(self, names: Any, scale: float) -> None:
        bits = self.bits or {}
        for name in names:
            weight = self.weights[name]
            factors = scale * position_scale(weight, bits[name], self.eps, axis=self.axes[name]).flatten()
            order = torch.randperm(len(factors), generator=self.generator)
            weight.grad.mul_(factors[order].reshape(weight.shape))


class PermutedPSGD(PSGDCallback):
    """The control of PSGD: as large steps, as uneven, and not where weights are."""

    def __init__(self, bits: int, *, seed: int, **arguments: Any):
        super().__init__(bits, **arguments)
        self.generator = torch.Generator().manual_seed(seed)

    def _warp(self, weights: Mapping[str, nn.Parameter], bits: Mapping[str, int]) -> WarpedWeights:
        warped = PermutedWeights(weights, bits, eps=self.eps)
        warped.generator = self.generator
        return warped


def scaling(run: Run) -> list[Callback]:
    """The callback that the run's arm trains with."""
    kind, bits, arguments = run.arm.technique, run.protocol.bits, run.arm.arguments
    if kind == "plain":
        return []
    if kind == "psgd":
        return [PSGDCallback(bits, **arguments)]
    if kind == "permuted":
        return [PermutedPSGD(bits, seed=run.seed, **arguments)]
    raise ValueError(f"technique must be one of plain, psgd, permuted, got {kind!r}")


def start_of(run: Run) -> Run:
    """The training that the run's arm goes on from, the same for all arms."""
    start = run.protocol.start
    protocol = Protocol("start", epochs=start.epochs, width=run.protocol.width, bits=FULL)
    return Run(protocol, PLAIN, start.rate, run.seed)


def network_path(run: Run) -> Path:
    """In the folder."""
    return Path("networks") / f"{digest(run.training())}.pt"


def trained(run: Run, folder: Path) -> dict[str, Any]:
    """The run's weights, trained where the folder does not have them yet."""
    path = network_path(run)
    if not (folder / path).is_file():
        begin, callbacks = time.process_time(), scaling(run)
        torch.manual_seed(run.seed)
        module = Classifier(run.protocol.width, run.rate, run.arm.label_smoothing)
        if run.protocol.start is not None:
            module.network = network_of(start_of(run), folder)
        drawn = run.seed if run.protocol.start is None else LATER_BATCHES + run.seed
        trainer = fit(module, Batches(fashion_mnist().train, seed=drawn), run.epochs, callbacks)
        kept = {
            "weights": module.network.state_dict(),
            "lambda": callbacks[0].lambda_s if callbacks else None,
            "batches": f"{module.seen:08x}",
            "steps": trainer.global_step,
            "cpu_seconds": time.process_time() - begin,
        }
        write_with_record(folder, path, lambda part: torch.save(kept, part), begin)
    return torch.load(folder / path, weights_only=True)


def network_of(run: Run, folder: Path) -> SmallResNet:
    network = small_network(run.protocol.width)
    network.load_state_dict(trained(run, folder)["weights"])
    return network


def measure(run: Run, folder: Path) -> dict[str, Any]:
    """Make a run of a protocol with bits: train, and look at the network as it is and rounded."""
    data, begin = fashion_mnist(), time.perf_counter()
    kept, network, cpu = trained(run, folder), network_of(run, folder), time.process_time()
    bits = run.protocol.bits
    plainly = rounded(network, bits)
    table = {
        f"test_{granularity}_{limits}_{statistics}": accuracy(
            looked_at(rounded(network, bits, granularity, limits), statistics, data.train), data.test
        )
        for granularity, limits, statistics in itertools.product(GRANULARITIES, RANGES, STATISTICS)
    }
    full, here = accuracy(network, data.test), table["test_tensor_max_kept"]
    distance = torch.cat(
        [(own - other).flatten() for own, other in zip(weights(network), weights(plainly), strict=True)]
    )
    flat = torch.cat([own.flatten() for own in weights(network)])
    zeros = torch.cat([own.flatten() == 0 for own in weights(plainly)])
    return {
        **table,
        "held_out_accuracy": accuracy(plainly, data.held_out),
        "test_accuracy": here,
        "test_accuracy_full": full,
        "lost": full - here,
        "weight_error": float(distance.norm() / flat.norm()),
        "sparsity": float(zeros.float().mean()),
        "lambda": kept["lambda"],
        "mean_factor": 1.0 if kept["lambda"] is None else kept["lambda"] * float(distance.abs().mean()),
        "network": network_path(run).name,
        "batches": kept["batches"],
        "steps": kept["steps"],
        "seconds": time.perf_counter() - begin,
        "network_seconds": kept["cpu_seconds"],
        "cpu_seconds": kept["cpu_seconds"] + time.process_time() - cpu,
        "configuration": run.configuration(),
    }


def layers(network: nn.Module) -> list[nn.Module]:
    return [part for part in network.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]


def weights(network: nn.Module) -> list[Tensor]:
    """The weights that are rounded; biases and batch norm are not."""
    return [layer.weight.detach() for layer in layers(network)]


def rounded(network: nn.Module, bits: int, granularity: str = "tensor", limits: str = "max") -> nn.Module:
    """A copy with its weights on their grids; first and last layer as `PSGDCallback` and `PTQCallback` have them."""
    network = copy.deepcopy(network)
    if bits == FULL or not all(own.isfinite().all() for own in weights(network)):  # the latter where training diverged
        return network
    axis, find = 0 if granularity == "channel" else None, mse_grid if limits == "mse" else quantization_grid
    edges = [layers(network)[0], layers(network)[-1]]
    for layer in layers(network):
        own = EDGE_BITS if bits < FEW_BITS and layer in edges else bits
        layer.weight.data = nearest_grid_point(
            layer.weight.data, find(layer.weight.data, own, axis=axis), own, axis=axis
        )
    return network


def looked_at(network: nn.Module, statistics: str, images: Images) -> nn.Module:
    return reestimated(network, images) if statistics == "reestimated" else network


def accuracy(network: nn.Module, images: Images) -> float:
    return share(predictions(network, images), images[1])
