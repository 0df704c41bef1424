"""What is trained for which claim: protocols, arms and controls, and the name under which a run is kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VERSION = 1  # raised when a change of code or data changes what a run gives: all runs are then made again
LEARNING_RATES = (0.03, 0.1, 0.3)
CHOICE_SEED = 0  # the seed with which an arm's learning rate is chosen


@dataclass(frozen=True)
class Teacher:
    """A trained teacher, the same for all runs: the widest whose forward about doubles the student's step."""

    width: int = 24
    epochs: int = 20
    rate: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Protocol:
    """How long is trained, and on how many labels; `labels=None`: all."""

    name: str
    epochs: int
    labels: int | None = None


@dataclass(frozen=True)
class Arm:
    """One way of training the student.

    `arguments` go to the technique's callback. A `candidate` is what the claim is about; the others are controls.
    """

    name: str
    title: str
    technique: str = "plain"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    label_smoothing: float = 0.0
    teacher: str = "trained"  # or "random", or "shuffled": its targets are exchanged within the batch
    longer: float = 1.0  # times as many epochs as the protocol says
    candidate: bool = False


@dataclass(frozen=True)
class Run:
    """One training of the student, to be looked at once."""

    protocol: Protocol
    arm: Arm
    rate: float
    seed: int
    teacher: Teacher = Teacher()

    def configuration(self) -> dict[str, Any]:
        """All that decides the run's result; how an arm is called in tables does not."""
        whole = {**dataclasses.asdict(self), "version": VERSION}
        del whole["protocol"]["name"], whole["arm"]["title"], whole["arm"]["candidate"], whole["arm"]["longer"]
        whole["protocol"]["epochs"] = self.epochs
        return whole

    @property
    def epochs(self) -> int:
        """How often the student sees the images."""
        return round(self.protocol.epochs * self.arm.longer)

    @property
    def key(self) -> str:
        """Name of the run's file."""
        return f"{self.protocol.name}-{self.arm.name}-lr{self.rate:g}-seed{self.seed}-{digest(self.configuration())}"


@dataclass(frozen=True)
class Claim:
    """What is claimed, and the arms that show it or do not; the first arm of each part is the student alone."""

    name: str
    page: str
    method: str
    parts: tuple[tuple[Protocol, tuple[Arm, ...]], ...]


def digest(configuration: Mapping[str, Any]) -> str:
    """A short name of a configuration."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:10]


SHORT = Protocol("short", epochs=6)
LONG = Protocol("long", epochs=16)
FEW = Protocol("200-labels", epochs=5, labels=200)

PLAIN = Arm("plain", "student alone")
LONGER = Arm("plain-longer", "student alone, as much time", longer=2.2)  # the measured cost of a step with KD
SMOOTHED = Arm("smoothing", "label smoothing 0.1", label_smoothing=0.1)
HINTON = {"temperature": 4.0, "task_weight": 0.1, "kd_weight": 0.9}
KD = Arm("kd", "KD", "kd", HINTON, candidate=True)
SHUFFLED = Arm("kd-shuffled", "KD, the teacher's targets shuffled", "kd", HINTON, teacher="shuffled")
STRENGTHS = {0.25: "1/4", 1.0: "1", 4.0: "4"}
AT = (
    *(Arm(f"at-{x:g}", f"AT, strength {said}", "at", {"strength": x}, candidate=True) for x, said in STRENGTHS.items()),
    Arm("at-random-teacher", "AT, randomly initialised teacher", "at", {"strength": 1.0}, teacher="random"),
)
FT = (
    *(Arm(f"ft-{500 * x:g}", f"FT, weight {500 * x:g}", "ft", {"weight": 500 * x}, candidate=True) for x in STRENGTHS),
    Arm("ft-random-teacher", "FT, randomly initialised teacher", "ft", {"weight": 500.0}, teacher="random"),
    Arm("ft-random-paraphraser", "FT, random paraphraser", "ft", {"weight": 500.0, "pretrain_epochs": 0}),
)
CLAIMS = {
    "kd": Claim(
        "kd",
        "distillation.md",
        "KD",
        ((SHORT, (PLAIN, KD, LONGER, SMOOTHED, SHUFFLED)), (LONG, (PLAIN, KD, SMOOTHED)), (FEW, (PLAIN, KD, LONGER))),
    ),
    "at": Claim("at", "attention-transfer.md", "AT", ((SHORT, (PLAIN, *AT, LONGER)), (FEW, (PLAIN, *AT, LONGER)))),
    "ft": Claim("ft", "factor-transfer.md", "FT", ((SHORT, (PLAIN, *FT, LONGER)), (FEW, (PLAIN, *FT, LONGER)))),
}
