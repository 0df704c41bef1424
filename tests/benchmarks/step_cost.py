"""What a training step with a callback costs: over the plain step, or with a teacher over that plus its forward.

    python -m tests.benchmarks.step_cost [kd at ft pruning dpf dcil psgd qat] [--profile]
    python -m tests.benchmarks.step_cost --out costs --page docs/experiments/step-costs.md

The second line puts the tables of all techniques into a page; those that are in the folder already, of as many rounds,
are taken from there.

Every arm is a whole ``Trainer.fit`` with its own module, in a thread of its own, and the threads take turns: one step
of each arm a round, in random order, never two at once. So an arm's time is that of Lightning's real loop, from the
start of one batch to the start of the next, hooks and logging included, and a machine that slows down slows all arms
alike. Time is the CPU time of the process, on one thread. Shown is the median over the rounds of the ratio within a
round, with its 95% interval.

The teacher has the student's own architecture, which is the hardest case: a larger teacher makes both sides longer
and the ratio smaller.

The arms by hand say where time goes. What matters most is when the teacher runs: before the student, its temporary
memory is free again when the student asks for its own; after it, both are needed at once, and the C library gives
memory back to the system and takes it again in every step. In attention transfer, the arm by hand is what maps of whole
features cost; in factor transfer, what translator and paraphraser themselves cost. Attention by gradients runs the
teacher forward and backward, and the student backward twice. Pruning by hand multiplies weights by a fixed mask in
each step; the callback is measured with fixed masks, and while its masks change, which they do for three quarters of a
training unless other fractions are given. DCIL by hand is the step twice, the second time with ``(1 - M) * g``, and
nothing else. PSGD by hand is the plain formula. QAT by hand is the weights alone, rounded by torch's own operation.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import cProfile
import ctypes
import pstats
import random
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_compress import (
    AttentionTransferCallback,
    DCILCallback,
    DistillationCallback,
    DPFCallback,
    FactorTransferCallback,
    PruningCallback,
    PSGDCallback,
    QATCallback,
)
from lightning_compress.demo import SmallResNet
from lightning_compress.functional import (
    cubic_schedule,
    distillation_loss,
    factor_transfer_loss,
    magnitude_mask,
    position_scale,
)
from lightning_compress.modules import Paraphraser, Translator
from lightning_compress.report.latency import median_interval
from tests.experiments.tables import BEGIN, splice

WARMUP = 10
TARGETS = {
    "kd": "1.03 for the callback over the reference",
    "at": "1.05 for the callback over the reference",
    "ft": "1.15 for the callback over the arm by hand",
    "pruning": "1.03 for the callback over the reference",
    "dpf": "1.05 for the callback over the reference",
    "psgd": "1.03 for the callback with a grid for each tensor over the reference",
    "qat": "1.3 with steps that stay or follow, 1.6 with learned ones",
    "dcil": "2.05 with a shared dense path, 2.2 with an own one",
}


class Plain(L.LightningModule):
    """A classifier whose step is the network's forward and the cross-entropy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class WithTeacherForward(Plain):
    """The same, and the teacher's forward, whose result is thrown away: the denominator of the ratio."""

    def __init__(self, network: nn.Module, teacher: nn.Module) -> None:
        super().__init__(network)
        self.outside = [teacher.eval().requires_grad_(False)]  # a list, so that it is no submodule

    def teacher_logits(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.outside[0](images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.teacher_logits(batch[0])
        return super().training_step(batch, batch_idx)


class ByHand(WithTeacherForward):
    """Distillation written into the step, nothing else logged: what the loss itself costs."""

    def __init__(self, network: nn.Module, teacher: nn.Module, *, teacher_first: bool) -> None:
        super().__init__(network, teacher)
        self.teacher_first = teacher_first

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        if self.teacher_first:
            target = self.teacher_logits(images)
        logits = self.network(images)
        if not self.teacher_first:
            target = self.teacher_logits(images)
        loss = F.cross_entropy(logits, labels)
        self.log("train_loss", loss)
        return 0.1 * loss + 0.9 * distillation_loss(logits, target, 4.0)


class WithFeatures(WithTeacherForward):
    """One that keeps what layers return in either network."""

    def __init__(self, network: nn.Module, teacher: nn.Module, layers: Sequence[str]) -> None:
        super().__init__(network, teacher)
        self.student_features: dict[str, Tensor] = {}
        self.teacher_features: dict[str, Tensor] = {}
        for root, kept in ((network, self.student_features), (teacher, self.teacher_features)):
            for name in layers:
                root.get_submodule(name).register_forward_hook(
                    lambda part, args, output, kept=kept, name=name: kept.update({name: output})
                )


class MapsByHand(WithFeatures):
    """Attention transfer written into the step: what the maps and their difference cost."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.teacher_logits(batch[0])
        loss: Tensor = Plain.training_step(self, batch, batch_idx)
        for name, feature in self.student_features.items():
            maps = [F.normalize(own.square().mean(1).flatten(1)) for own in (feature, self.teacher_features[name])]
            loss = loss + 1000 * (maps[0] - maps[1]).square().mean()
        return loss


class FactorsByHand(WithFeatures):
    """Factor transfer written into the step: what the loss, the translator and the paraphraser cost."""

    def __init__(self, network: nn.Module, teacher: nn.Module, layer: str) -> None:
        super().__init__(network, teacher, [layer])
        self.helpers: list[nn.Module] = []
        self.optimizer: torch.optim.Optimizer | None = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        self.teacher_logits(images)
        loss = F.cross_entropy(self.network(images), labels)
        self.log("train_loss", loss)
        [student], [teacher] = self.student_features.values(), self.teacher_features.values()
        if not self.helpers:
            paraphraser = Paraphraser(teacher.shape[1]).eval().requires_grad_(False)
            self.helpers = [paraphraser, Translator(student.shape[1], paraphraser.factor_channels)]
            self.optimizer = torch.optim.SGD(self.helpers[1].parameters(), 0.01, 0.9, weight_decay=5e-4)
        with torch.no_grad():
            factor = self.helpers[0].factor(teacher)
        return loss + 10 * factor_transfer_loss(self.helpers[1](student), factor)

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.optimizer is not None:
            self.optimizer.step()


class PrunedByHand(Plain):
    """Pruning written into the step: what multiplying by a mask costs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        weights = {name: weight for name, weight in network.named_parameters() if weight.ndim > 1}
        masks = magnitude_mask(list(weights.values()), 0.9)
        self.masks = {name: mask.float() for name, mask in zip(weights, masks, strict=True)}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        masked = {name: self.network.get_parameter(name) * mask for name, mask in self.masks.items()}
        loss = F.cross_entropy(torch.func.functional_call(self.network, masked, (images,)), labels)
        self.log("train_loss", loss)
        return loss


class ScaledByHand(Plain):
    """PSGD written into a hook as the formula is."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for weight in self.network.parameters():
            if weight.ndim > 1 and weight.grad is not None:
                weight.grad *= 50.0 * position_scale(weight, 4)


class RoundedByHand(Plain):
    """Rounded weights written into the step, with torch's operation, and no activation."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        rounded = {}
        for name, weight in self.network.named_parameters():
            if weight.ndim > 1:
                steps = weight.detach().abs().flatten(1).amax(dim=1) / 127
                zeros = torch.zeros(len(weight), dtype=torch.int32)
                rounded[name] = torch.fake_quantize_per_channel_affine(weight, steps, zeros, 0, -127, 127)
        loss = F.cross_entropy(torch.func.functional_call(self.network, rounded, (images,)), labels)
        self.log("train_loss", loss)
        return loss


class TwoNetworksByHand(PrunedByHand):
    """DCIL written into the step, its dense path shared: two passes, of which each weight learns from one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.other = [copy.deepcopy(network)]  # for its batch-norm statistics, which nobody reads

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = super().training_step(batch, batch_idx)
        dense = {name: own.detach() for name, own in self.network.named_parameters()}
        for name, mask in self.masks.items():
            dense[name] = self.network.get_parameter(name).view_as(mask)
            dense[name].register_hook(lambda gradient, mask=mask: torch.addcmul(gradient, gradient, mask, value=-1))
        return loss + F.cross_entropy(torch.func.functional_call(self.other[0], dense, (images,)), labels)


class Turns(Callback):
    """Let a fit run one step at a time, and measure each."""

    def __init__(self) -> None:
        self.go, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.milliseconds: list[float] = []
        self._begin: float | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, index: int) -> None:
        if self._begin is not None:
            self.milliseconds.append(1e3 * (time.process_time() - self._begin))
        self.paused.release()
        self.go.acquire()
        self._begin = time.process_time()


@dataclass
class Arm:
    """One fit in a thread of its own."""

    name: str
    module: L.LightningModule
    callbacks: Sequence[Callback] = ()

    def start(self, batch: tuple[Tensor, Tensor], steps: int) -> None:
        self.turns, self.error = Turns(), None
        self.thread = threading.Thread(target=self._fit, args=(batch, steps), daemon=True)
        self.thread.start()
        self._wait()

    def step(self) -> None:
        self.turns.go.release()
        self._wait()

    def finish(self) -> None:
        self.turns.go.release()
        self.thread.join()
        self._check()

    def _wait(self) -> None:
        self.turns.paused.acquire()
        self._check()

    def _check(self) -> None:
        if self.error is not None:
            raise RuntimeError(f"the arm '{self.name}' failed") from self.error

    def _fit(self, batch: tuple[Tensor, Tensor], steps: int) -> None:
        torch.set_num_threads(1)  # a setting of each thread
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[self.turns, *self.callbacks],
        )
        try:
            trainer.fit(self.module, DataLoader([batch] * steps, batch_size=None))
        except Exception as error:  # raised again in the thread that waits
            self.error = error
        finally:
            self.turns.paused.release()


def arms_of(technique: str, pair: Callable[[], tuple[nn.Module, nn.Module]], layers: Sequence[str]) -> list[Arm]:
    """The arms of one technique; the first is the reference.

    Args:
        technique: "kd", "at", "ft", "pruning", "dpf", "dcil", "psgd" or "qat".
        pair: Makes a student and a teacher, from the same weights each time.
        layers: Names of the layers that end the stages of both.
    """

    def with_callback(name: str, make: Callable[[nn.Module], Callback]) -> Arm:
        student, teacher = pair()
        return Arm(name, Plain(student), [make(teacher)])

    if technique == "pruning":
        settings: dict[str, dict[str, Any]] = {
            "masks fixed": {"schedule": "one_shot"},
            "new masks each 16 steps": {"end": 1.0, "update_interval": 16, "schedule": _slowly},
            "new masks each step": {"end": 1.0, "schedule": _slowly},
        }
        return [
            Arm("plain step", Plain(pair()[0])),
            Arm("by hand, masks fixed", PrunedByHand(pair()[0])),
            *(Arm(name, Plain(pair()[0]), [PruningCallback(0.9, **own)]) for name, own in settings.items()),
        ]

    if technique == "psgd":
        ways = {"": {}, ", a grid for each channel": {"granularity": "channel"}, ", updates": {"apply_to": "update"}}
        return [
            Arm("plain step", Plain(pair()[0])),
            Arm("by hand", ScaledByHand(pair()[0])),
            *(Arm(f"PSGDCallback{name}", Plain(pair()[0]), [PSGDCallback(**own)]) for name, own in ways.items()),
        ]

    if technique == "qat":
        rest = {"freeze_batchnorm_at": 1.0, "max_samples": 64}
        late = {"freeze_observers_at": 1.0}
        return [
            Arm("plain step", Plain(pair()[0])),
            Arm("by hand, weights alone", RoundedByHand(pair()[0])),
            *(
                Arm(f"QATCallback, {kind}", Plain(pair()[0]), [QATCallback(step_size=kind, **rest, **more)])  # type: ignore[arg-type]
                for kind, more in (("mse", {}), ("observed", late), ("learned", {}))
            ),
        ]

    if technique in ("dpf", "dcil"):
        changing = {"end": 1.0, "schedule": _slowly}
        paths = (
            {"dense_path": "shared", "kl_start": 1.0},
            {"dense_path": "shared", "kl_start": 0.0},
            {"kl_start": 0.0},
        )
        settings = (
            {"DPFCallback": DPFCallback(0.9, **changing)}
            if technique == "dpf"
            else {
                f"DCILCallback, {name}": DCILCallback(0.9, **changing, **own)
                for name, own in zip(("shared, no KL", "shared", "own"), paths, strict=True)
            }
        )
        by_hand = PrunedByHand if technique == "dpf" else TwoNetworksByHand
        return [
            Arm("plain step", Plain(pair()[0])),
            Arm("by hand, masks fixed", by_hand(pair()[0])),
            *(Arm(name, Plain(pair()[0]), [own]) for name, own in settings.items()),
        ]

    reference = Arm("plain step + teacher forward", WithTeacherForward(*pair()))
    if technique == "kd":
        return [
            reference,
            Arm("by hand, teacher before student", ByHand(*pair(), teacher_first=True)),
            Arm("by hand, teacher after student", ByHand(*pair(), teacher_first=False)),
            with_callback("DistillationCallback", DistillationCallback),
        ]
    if technique == "at":
        pairs = {layer: layer for layer in layers}
        return [
            reference,
            Arm("by hand", MapsByHand(*pair(), layers)),
            with_callback("AttentionTransferCallback", lambda teacher: AttentionTransferCallback(teacher, pairs=pairs)),
            with_callback(
                "the same, map_kind='gradient'",
                lambda teacher: AttentionTransferCallback(teacher, map_kind="gradient", weight=1.0),
            ),
        ]
    factors: dict[str, Any] = {"pair": (layers[-1], layers[-1]), "pretrain_epochs": 0, "weight": 10.0}
    return [
        reference,
        Arm("by hand", FactorsByHand(*pair(), layers[-1])),
        with_callback("FactorTransferCallback", lambda teacher: FactorTransferCallback(teacher, **factors)),
    ]


def _slowly(progress: float, start: float, end: float) -> float:
    """The second tenth of a gradual schedule: of a training, say, that is ten times as long as the measurement."""
    return cubic_schedule(0.1 + 0.1 * progress, start, end)


def measure(arms: list[Arm], batch: tuple[Tensor, Tensor], rounds: int) -> list[Arm]:
    """Run all arms in turns."""
    for arm in arms:
        arm.start(batch, WARMUP + rounds + 1)
    order = random.Random(0)
    for _ in range(WARMUP + rounds):
        for arm in order.sample(arms, len(arms)):  # no arm always runs on the cache that the same other one left
            arm.step()
    for arm in arms:
        arm.finish()
    return arms


def costs(arms: list[Arm]) -> dict[str, str]:
    """By arm, once all are measured: the median time of the first, and the ratios of the others to it."""
    times = {arm.name: arm.turns.milliseconds[WARMUP:] for arm in arms}
    (reference, first), *others = times.items()
    found = {reference: f"{statistics.median(first):.1f} ms"}
    for name, own in others:
        ratios = [mine / one for mine, one in zip(own, first, strict=True)]
        low, high = median_interval(ratios) or (float("nan"), float("nan"))
        found[name] = f"{statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}]"
    return found


def section(technique: str, rounds: int) -> str:
    """A table of all cases of a technique, below its heading."""
    begin, cases = time.process_time(), {}
    for name, (make, shape, layers) in cases_of(technique).items():
        batch = torch.randn(shape), torch.randint(0, 10, (shape[0],))
        cases[name] = costs(measure(arms_in(technique, make, layers), batch, rounds))
        print(f"{technique}, {name}: {cases[name]}", file=sys.stderr, flush=True)
    (first, *_) = cases.values()
    rows = [f"| {' | '.join([arm, *(own[arm] for own in cases.values())])} |" for arm in first]
    lines = [f"### `{technique}`", "", f"| | {' | '.join(cases)} |", f"|{'---|' * (1 + len(cases))}", *rows, ""]
    spent = (time.process_time() - begin) / 60
    return "\n".join([*lines, f"Target: {TARGETS[technique]}. {rounds} rounds, {spent:.0f} minutes.", ""])


def kept(technique: str, rounds: int, folder: Path | None) -> str:
    """The same from the folder, where one is given and has it; else it is measured, and kept there."""
    file = None if folder is None else folder / f"{technique}-{rounds}.md"
    if file is not None and file.exists():
        return file.read_text()
    text = section(technique, rounds)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return text


def _one_memory_arena() -> None:
    """Let all threads share the memory arena of the main one, where a user's training runs; glibc only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


Case: TypeAlias = tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]
STAGES = ("stages.0", "stages.1", "stages.2")
CASES: dict[str, Case] = {
    "small ResNet, width 16, batch 64 at 28x28": (lambda: SmallResNet(16), (64, 1, 28, 28), STAGES),
    "resnet18, batch 16 at 64x64": (_resnet18, (16, 3, 64, 64), ("layer1", "layer2", "layer3", "layer4")),
}
MORE_BATCHES: dict[str, Case] = {
    f"small ResNet, width 16, batch {batch} at 28x28": (lambda: SmallResNet(16), (batch, 1, 28, 28), STAGES)
    for batch in (8, 128)
}


def cases_of(technique: str) -> dict[str, Case]:
    """Networks and batches by their names."""
    return {**CASES, **MORE_BATCHES} if technique in ("dpf", "dcil") else CASES


def arms_in(technique: str, make: Callable[[], nn.Module], layers: Sequence[str]) -> list[Arm]:
    """The arms of a technique, all with the same weights."""
    torch.manual_seed(0)
    network, teacher = make(), make()
    return arms_of(technique, lambda: (copy.deepcopy(network), copy.deepcopy(teacher)), layers)


def profile(arm: Arm, batch: tuple[Tensor, Tensor], steps: int) -> str:
    """Where the time of a step goes in this package, by function, in milliseconds a step, callees included."""
    profiler = cProfile.Profile()
    arm.callbacks = [*arm.callbacks, Profiled(profiler)]
    arm.turns, arm.error = Turns(), None
    arm.turns.go = threading.Semaphore(steps + 2)  # never waits
    profiler_thread = threading.Thread(target=arm._fit, args=(batch, steps))
    profiler_thread.start()
    profiler_thread.join()
    entries = [
        (1e3 * cumulative / steps, calls / steps, f"{Path(file).stem}:{line} {name}")
        for (file, line, name), (_, calls, _, cumulative, _) in pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
        if "lightning_compress" in file and "demo" not in file
    ]
    lines = [f"{arm.name}, profiled over {steps} steps: ms a step, calls a step, function"]
    return "\n".join([*lines, *(f"  {ms:8.3f} {calls:8.1f}  {name}" for ms, calls, name in sorted(entries)[::-1][:25])])


class Profiled(Callback):
    """Profile the thread of a fit."""

    def __init__(self, profiler: cProfile.Profile) -> None:
        self.profiler = profiler

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.profiler.enable()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.profiler.disable()


def main() -> None:
    """Measure every case, and show a table a technique."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("techniques", nargs="*", metavar="technique", help=f"of {', '.join(TARGETS)}; all if none")
    parser.add_argument("--rounds", type=int, default=300, help="measured rounds a case, at least 200 to be quoted")
    parser.add_argument("--profile", action="store_true", help="say where time goes in the last arm, instead")
    parser.add_argument("--out", type=Path, help="folder of the finished tables")
    parser.add_argument("--page", type=Path, help="put all tables between the marks of this page")
    arguments = parser.parse_args()
    unknown = set(arguments.techniques) - set(TARGETS)
    if unknown:
        parser.error(f"technique must be one of {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    _one_memory_arena()
    warnings.filterwarnings("ignore", message=".*paraphraser random.*")
    techniques = arguments.techniques or list(TARGETS)
    if arguments.page and arguments.techniques:
        parser.error("--page takes the tables of all techniques; leave the names out")
    if arguments.page and not (arguments.page.is_file() and BEGIN in arguments.page.read_text()):
        parser.error(f"{arguments.page} has no line {BEGIN}, below which the tables are put")
    if arguments.profile:
        for technique in techniques:
            for name, (make, shape, layers) in cases_of(technique).items():
                batch = torch.randn(shape), torch.randint(0, 10, (shape[0],))
                found = profile(arms_in(technique, make, layers)[-1], batch, arguments.rounds)
                print(f"{technique}, {name}\n{found}\n", flush=True)
        return
    text = "\n".join(kept(technique, arguments.rounds, arguments.out) for technique in techniques)
    if arguments.page:
        splice(arguments.page, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
