"""What is trained for which claim: protocols, arms and controls, and the name under which a run is kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VERSION = 2  # raised when a change of code or data changes what a run gives: all runs are then made again
FULL = 32  # bits of a weight that is not rounded
LEARNING_RATES = (0.03, 0.1, 0.3)
LATER_RATES = (0.01, 0.03, 0.1)
CHOICE_SEED = 0  # the seed with which an arm's learning rate is chosen


@dataclass(frozen=True)
class Teacher:
    """A trained teacher, the same for all runs: the widest whose forward about doubles the student's step."""

    width: int = 24
    epochs: int = 20
    rate: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Start:
    """A student that is trained already, by SGD: one for each seed, from which all arms go on."""

    epochs: int = 6
    rate: float = 0.1


@dataclass(frozen=True)
class Protocol:
    """How long is trained, on how many labels (`None`: all), how wide and how sparse a network, to be read how.

    With `bits`, what is measured is the network with its weights rounded to so many; 32 leaves them as they are. With
    `activation_bits` too, it is the network that is quantised, and its file.
    """

    name: str
    epochs: int
    labels: int | None = None
    width: int = 8
    sparsity: float | None = None
    bits: int | None = None
    activation_bits: int | None = None
    start: Start | None = None

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that are tried; who goes on from a trained student takes smaller steps."""
        return LEARNING_RATES if self.start is None else LATER_RATES

    @property
    def title(self) -> str:
        steps = f"the steps of {self.epochs} epochs" if self.labels else f"{self.epochs} epochs"
        if self.sparsity is not None:
            return f"{self.sparsity:.0%} sparsity, {steps}"
        if self.bits is not None:
            begun = "" if self.start is None else f"{self.start.epochs} epochs of SGD, then "
            if self.activation_bits is not None:
                return f"Weights of {self.bits} bits, activations of {self.activation_bits}: {begun}{steps}"
            return f"{'Full precision' if self.bits == FULL else f'{self.bits} bits'}: {begun}{steps}"
        return f"{f'{self.labels} labels' if self.labels else 'All 18,000 labels'}, {steps}"


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
    distilled: bool = False  # beside the technique
    control_of: str | None = None  # the arm that is compared with it, as they differ in one thing; None: the chosen one
    steps: float | None = None  # its learning rate is so many times that of the student alone, and not chosen
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
        del whole["arm"]["steps"], whole["arm"]["control_of"]
        whole["protocol"]["epochs"] = self.epochs
        for part, name, usual in (
            ("protocol", "width", 8),
            ("protocol", "sparsity", None),
            ("protocol", "bits", None),
            ("protocol", "activation_bits", None),
            ("protocol", "start", None),
            ("arm", "distilled", False),
        ):
            if whole[part][name] == usual:  # what is as it always was is not said
                del whole[part][name]
        return whole

    def training(self) -> dict[str, Any]:
        """What decides the weights: to the student alone it is all one for how many bits it will be rounded."""
        whole = self.configuration()
        del whole["arm"]["name"]
        if self.arm.technique == "plain":
            whole["protocol"].pop("bits", None)
            whole["protocol"].pop("activation_bits", None)
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
class Option:
    """One way of quantising a trained network; `arguments` go to `PTQCallback`."""

    name: str
    title: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibrated:
    """The network of a run, quantised after its training, to be looked at once."""

    run: Run
    weight_bits: int
    activation_bits: int
    option: Option

    def configuration(self) -> dict[str, Any]:
        """All that decides the result."""
        bits = {"weight_bits": self.weight_bits, "activation_bits": self.activation_bits}
        return {"network": self.run.training(), **bits, **self.option.arguments}

    @property
    def key(self) -> str:
        """Name of the result's file."""
        bits = f"{self.weight_bits}-{self.activation_bits}"
        return f"ptq-{bits}-{self.option.name}-seed{self.run.seed}-{digest(self.configuration())}"


@dataclass(frozen=True)
class Column:
    """A quantity of the runs that a table shows beside the accuracy, times a factor; the fewer digits the better."""

    title: str
    quantity: str
    factor: float = 100.0
    digits: int = 2


@dataclass(frozen=True)
class Claim:
    """What is claimed, and the arms that show it or do not; they are compared with the first arm of their part."""

    name: str
    page: str
    method: str
    parts: tuple[tuple[Protocol, tuple[Arm, ...]], ...]
    columns: tuple[Column, ...] = (Column("agreement with the teacher", "test_agreement"),)
    teacher: bool = True
    picture: str | None = None
    caption: str = ""  # of the picture
    against: tuple[tuple[str, str], ...] = ()  # two arms and all columns of theirs, compared below the table
    shown: tuple[tuple[str, str], ...] = ()  # of which the results speak too, beside the chosen over the first
    options: tuple[Option, ...] = ()  # how the networks of the first arm of the first part are quantised afterwards


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
LIGHT_KD = Arm("kd-0.3", "KD, weight 0.3", "kd", {**HINTON, "task_weight": 0.7, "kd_weight": 0.3}, candidate=True)
SHUFFLED = Arm("kd-shuffled", "KD, the teacher's targets shuffled", "kd", HINTON, teacher="shuffled", control_of="kd")
STRENGTHS = {0.25: "1/4", 1.0: "1", 4.0: "4"}
AT = (
    *(Arm(f"at-{x:g}", f"AT, strength {said}", "at", {"strength": x}, candidate=True) for x, said in STRENGTHS.items()),
    Arm(
        "at-random-teacher",
        "AT, randomly initialised teacher",
        "at",
        {"strength": 1.0},
        teacher="random",
        control_of="at-1",
    ),
)
FT = (
    *(Arm(f"ft-{500 * x:g}", f"FT, weight {500 * x:g}", "ft", {"weight": 500 * x}, candidate=True) for x in STRENGTHS),
    Arm(
        "ft-random-teacher",
        "FT, randomly initialised teacher",
        "ft",
        {"weight": 500.0},
        teacher="random",
        control_of="ft-500",
    ),
    Arm(
        "ft-random-paraphraser",
        "FT, random paraphraser",
        "ft",
        {"weight": 500.0, "pretrain_epochs": 0},
        control_of="ft-500",
    ),
)
NINETY = Protocol("90%", epochs=6, width=16, sparsity=0.9)
NINETY_FIVE = Protocol("95%", epochs=6, width=16, sparsity=0.95)
MASKS_FINAL = 0.75  # after this part of the training, the callbacks' default `end`, all weights are gone that will go
STATIC = {"update_interval": 16}
GRADUAL = Arm("gradual", "gradual", "pruning", STATIC)
DPF = Arm("dpf", "DPF", "dpf")
DCIL = Arm("dcil", "DCIL", "dcil", {"dense_path": "own"}, candidate=True)
ONE_SHOT = Arm("one-shot", "one-shot, halfway", "pruning", {"schedule": "one_shot", "start": 0.5})
REGROWN = Arm("gradual-regrow", "gradual with regrowth", "pruning", {**STATIC, "regrow": True})
GRADUAL_KD = Arm("gradual-kd", "gradual, distilled", "pruning", STATIC, distilled=True)
GRADUAL_LONGER = Arm("gradual-longer", "gradual, twice the epochs", "pruning", STATIC, longer=2.0)
PRUNED = (
    GRADUAL,
    ONE_SHOT,
    REGROWN,
    GRADUAL_KD,
    GRADUAL_LONGER,
    DPF,
    Arm("dpf-frozen", "DPF, masks frozen at the end of the schedule", "dpf", {"freeze_at": MASKS_FINAL}),
    Arm("dcil-no-kl", "DCIL without KL", "dcil", {"dense_path": "own", "kl_start": 1.0}),
    DCIL,
)
STEADINESS = (
    Column("swing", "swing"),
    Column("swing, statistics re-estimated", "swing_reestimated"),
    Column("accuracy, statistics re-estimated", "test_accuracy_reestimated"),
    Column("dead filters", "dead_filters", 1.0, 1),
    Column("churn, per mille", "churn", 1000.0),
)
UNROUNDED, FOUR, THREE, TWO = (
    Protocol(name, epochs=2, bits=bits, start=Start())
    for name, bits in (("full-precision", FULL), ("4-bits", 4), ("3-bits", 3), ("2-bits", 2))
)
SGD = dataclasses.replace(PLAIN, title="SGD")
LARGE_STEPS = tuple(Arm(f"plain-x{x}", f"SGD, steps {x} times as large", steps=x) for x in (3, 6))
PSGD = tuple(
    Arm(f"psgd-{x}", f"PSGD, mean factor {x}", "psgd", {"mean_factor": float(x)}, candidate=True) for x in (1, 3, 6)
)
PERMUTED = {
    x: Arm(
        f"psgd-{x}-permuted",
        f"PSGD, mean factor {x}, permuted",
        "permuted",
        {"mean_factor": float(x)},
        control_of=f"psgd-{x}",
    )
    for x in (3, 6)
}
FEW_BITS = (
    Column("at full precision", "test_accuracy_full"),
    Column("lost by rounding", "lost"),
    Column("weight error, %", "weight_error", digits=1),
    Column("zeros, %", "sparsity", digits=1),
    Column("mean factor at the end", "mean_factor", 1.0),
)
GRIDS = tuple(
    Column(f"{'each' if own == 'channel' else 'one'}, {limits}{said}", f"test_{own}_{limits}_{statistics}")
    for own in ("tensor", "channel")
    for limits in ("max", "mse")
    for statistics, said in (("kept", ""), ("reestimated", ", new statistics"))
)
CALIBRATED = Arm("calibrated", "best PTQ of the network that all go on from", "start", longer=0.0, steps=1.0)
FINE_TUNED = Arm("plain", "full precision, then best PTQ")
AWARE = tuple(
    Arm(f"qat-{kind}", f"QAT, {said}", "qat", {"step_size": kind}, candidate=True)
    for kind, said in (("mse", "steps of least error stay"), ("observed", "grids follow"), ("learned", "learned steps"))
)
TRAINED_FOR = tuple(
    Protocol(f"qat-{weights}-{activations}", epochs=2, bits=weights, activation_bits=activations, start=Start())
    for weights, activations in ((4, 8), (3, 8), (4, 4), (3, 4))
)
IN_INTEGERS = (
    Column("its weights at full precision", "test_accuracy_full"),
    Column("lost by quantisation", "lost"),
    Column("file less quantised module", "file_gap"),
    Column("agreement of the file, %", "file_agreement"),
    Column("weights' steps moved by, %", "moved", digits=1),
)
SETTINGS = ((8, 8), (4, 8), (4, 4), (3, 4))  # bits of weights and of activations
USUAL = {"observer": "minmax", "weight_range": "max", "reestimate_batchnorm": False}
OPTIONS = (
    Option("plain", "largest weight, min-max", USUAL),
    *(
        Option(kind, f"observer {kind}", {**USUAL, "observer": kind})
        for kind in ("moving_average", "percentile", "mse", "entropy")
    ),
    Option("clipped", "weights clipped (mse)", {**USUAL, "weight_range": "mse"}),
    Option("reestimated", "batch norm re-estimated", {**USUAL, "reestimate_batchnorm": True}),
    Option(
        "clipped-reestimated",
        "weights clipped, batch norm re-estimated",
        {**USUAL, "weight_range": "mse", "reestimate_batchnorm": True},
    ),
    Option("bias", "bias correction", {**USUAL, "bias_correction": True}),
    Option("equalized", "cross-layer equalisation", {**USUAL, "cross_layer_equalization": True}),
    Option("default", "as PTQCallback chooses"),
)
VARIANTS = tuple(
    Option(f"{limits}-{observer}-{'new' if new else 'kept'}", "", {"weight_range": limits, "observer": observer} | more)
    for limits, observer, new in (
        *(("max", "minmax", False), ("mse", "minmax", False), ("max", "minmax", True), ("mse", "minmax", True)),
        *(("mse", "mse", True), ("max", "mse", True)),
    )
    for more in [{"reestimate_batchnorm": new}]
)
"""Ways of calibration of which the best on the held-out images is taken."""
CLAIMS = {
    "kd": Claim(
        "kd",
        "distillation.md",
        "KD",
        (
            (SHORT, (PLAIN, KD, LIGHT_KD, LONGER, SMOOTHED, SHUFFLED)),
            (LONG, (PLAIN, KD, LIGHT_KD, SMOOTHED)),
            (FEW, (PLAIN, KD, LIGHT_KD, LONGER)),
        ),
        shown=(("kd", "plain"),),
    ),
    "at": Claim(
        "at",
        "attention-transfer.md",
        "AT",
        ((SHORT, (PLAIN, *AT, LONGER)), (FEW, (PLAIN, *AT, LONGER))),
        shown=(("at-1", "plain"),),
    ),
    "ft": Claim(
        "ft",
        "factor-transfer.md",
        "FT",
        ((SHORT, (PLAIN, *FT, LONGER)), (FEW, (PLAIN, *FT, LONGER))),
        shown=(("ft-500", "plain"),),
    ),
    "masks": Claim(
        "masks",
        "pruning.md",
        "DCIL",
        ((NINETY, (*PRUNED, dataclasses.replace(PLAIN, title="not pruned"))), (NINETY_FIVE, PRUNED)),
        columns=STEADINESS,
        teacher=False,
        picture="pruning.png",
        caption="Accuracy on held-out images and churn over the training, for gradual pruning, DPF and DCIL",
        against=(("dcil", "dpf"), ("dpf-frozen", "dpf"), ("dcil", "dcil-no-kl")),
        shown=(("gradual", "one-shot"), ("dcil", "dpf")),
    ),
    "psgd": Claim(
        "psgd",
        "quantisation.md",
        "PSGD",
        (
            (UNROUNDED, (SGD, *LARGE_STEPS)),
            (FOUR, (SGD, *LARGE_STEPS, *PSGD, PERMUTED[3])),
            (THREE, (SGD, *LARGE_STEPS, *PSGD, PERMUTED[6])),
            (TWO, (SGD, *LARGE_STEPS, *PSGD, PERMUTED[6])),
        ),
        columns=FEW_BITS,
        teacher=False,
        picture="quantisation.png",
        caption="Test accuracy at 2, 3, 4 bits and at full precision for SGD, SGD with larger steps, "
        "PSGD and permuted PSGD",
        against=(("psgd-6", "plain"), ("psgd-3", "psgd-3-permuted"), ("psgd-6", "psgd-6-permuted")),
        options=OPTIONS,
    ),
    "qat": Claim(
        "qat",
        "training-on-few-bits.md",
        "QAT",
        tuple((protocol, (FINE_TUNED, CALIBRATED, *AWARE)) for protocol in TRAINED_FOR),
        columns=IN_INTEGERS,
        teacher=False,
        against=(("qat-mse", "plain"), ("qat-learned", "qat-mse"), ("qat-observed", "qat-mse")),
    ),
}
