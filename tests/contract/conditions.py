"""The circumstances of the reliability matrix: how a project trains, and what a fit is compared with there.

Each condition trains with the callbacks of a row, asserts the contract, and gives the differences between what was left
and what its reference left.
"""

from __future__ import annotations

import atexit
import functools
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Row
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from records import Outcome
from rows import ROWS
from torch.utils.data import DataLoader

from .bystanders import (
    AverageByHand,
    Clock,
    CountingEpochs,
    Endless,
    Evaluations,
    HalfOfTheLast,
    Leaving,
    Sized,
    StopAfter,
    Watching,
    calibrating_as_rank_zero,
    clip_norm,
    clip_value,
    rank_file,
)
from .launched import TOGETHER
from .modules import (
    AUTOMATIC,
    BATCH,
    Classifier,
    ManualClassifier,
    NetworkItself,
    TwoOptimizers,
    by_lbfgs,
    made,
    scaled,
    with_momentum,
)
from .quasi_newton import LOOPS
from .setups import (
    EPOCHS,
    EXAMPLES,
    PLAIN,
    ROUNDING,
    Fit,
    Setup,
    assert_nothing_else,
    assert_nothing_of_ours,
    assert_the_contract,
    batches,
    came_home,
    fitted,
    gaps,
    left,
    results,
    without,
)

WITHOUT_NORM = tuple(kind for kind in AUTOMATIC if not kind.norm)
WITH_CHILD = tuple(kind for kind in AUTOMATIC if kind is not NetworkItself)
STEPS = EPOCHS * EXAMPLES // BATCH
MIDST = STEPS + 2  # in an epoch
UNEVEN = 2 * BATCH + BATCH // 2
"""Rows of two batches and a short one."""
DAY = "01:00:00:00"
SECONDS = 900
IN_64_BITS = 1e-12
"""What sums in another order make there."""

Run = Callable[[Row, "type[Classifier]", Path], "dict[str, float]"]


@dataclass(frozen=True)
class Condition:
    """One of the circumstances.

    Attributes:
        key: In the names of tests, and in what ``cases.py`` expects.
        title: For readers of the page.
        reference: What the fit has to equal.
        run: From a row, a kind of module and a folder to the difference from the reference.
        kinds: Kinds of module it is tried on.
        within: The largest difference: 0, or what sums in another order make.
        outcome: What a cell that passes is called.
        loops: Names of rows that are compared with a loop by hand too: exact, in 64 bits.
        alone: Names of the only rows that it is tried on; empty for all.
        heavy: Whether a fit takes seconds: then a cell in three is in the sample.
        sampled: Whether any cell is in the sample.
    """

    key: str
    title: str
    reference: str
    run: Run
    kinds: tuple[type[Classifier], ...] = AUTOMATIC
    within: float = 0.0
    outcome: Outcome = "exact"
    heavy: bool = False
    sampled: bool = True
    alone: Collection[str] = ()
    loops: Collection[str] = ()

    def has(self, row: Row) -> bool:
        """Whether there is such a cell."""
        return not self.alone or row.name in self.alone

    def passed(self, row: Row) -> tuple[Outcome, float]:
        """What a cell is called once it has passed, and within what."""
        return ("exact", IN_64_BITS) if row.name in self.loops else (self.outcome, self.within)


# What a fit is compared with


def against(setup: Setup, reference: Setup, *, acts: bool = False) -> Run:
    """A fit, and another set up as ``reference``; ``acts``: the setup makes a difference without our callbacks too."""

    def run(row: Row, kind: type[Classifier], folder: Path) -> dict[str, float]:
        first, plain = fitted(row, kind, folder / "first", setup), without(kind, setup)
        assert_the_contract(first, row, plain)
        if acts:
            assert gaps(plain.module.state_dict(), without(kind, PLAIN).module.state_dict())
        return gaps(left(first), left(fitted(row, kind, folder / "second", reference)))

    return run


def against_what_it_found(setup: Setup, found: Callable[[Fit], Any], by_hand: Callable[[Any], Setup]) -> Run:
    """A fit whose tuner finds a value, and another that is given it by hand."""

    def run(row: Row, kind: type[Classifier], folder: Path) -> dict[str, float]:
        first, plain = fitted(row, kind, folder / "first", setup), without(kind, setup)
        assert found(first) == found(plain)
        assert_the_contract(first, row, plain)
        return gaps(left(first), left(fitted(row, kind, folder / "second", by_hand(found(plain)))))

    return run


def against_itself_resumed(dtype: torch.dtype, setup: Setup) -> Run:
    """A fit whose forward passes really have that precision, and one that goes on from the middle of it."""

    def run(row: Row, kind: type[Classifier], folder: Path) -> dict[str, float]:
        seen, saver = Watching(), ModelCheckpoint(folder, filename="{step}", save_top_k=-1)
        first = fitted(row, kind, folder / "first", setup.but(others=lambda: [seen, saver]))
        assert seen.types.count(dtype) >= STEPS
        scaler = getattr(first.trainer.precision_plugin, "scaler", None)
        assert (scaler is not None) == (dtype == torch.float16)
        assert scaler is None or scaler._growth_tracker.item() == STEPS  # through it went all, and none was skipped
        assert_the_contract(first, row, without(kind, setup))
        middle = folder / f"step={STEPS // 2}.ckpt"
        return gaps(left(first), left(fitted(row, kind, folder / "second", setup, ckpt_path=middle)))

    return run


def against_one_process(row: Row, kind: type[Classifier], folder: Path) -> dict[str, float]:
    """Two scripts, of which each has half of each batch."""
    ranks = [torch.load(rank_file(launched(row in CASES) / row.name, rank), weights_only=True) for rank in (0, 1)]
    for rank in ranks:
        if "error" in rank:
            raise RuntimeError(rank["error"])
        assert rank["ranks"] == 2
    assert gaps(ranks[0]["weights"], ranks[1]["weights"]) == {}
    with calibrating_as_rank_zero():
        return gaps(ranks[0]["left"], left(fitted(row, kind, folder, TOGETHER)))


@functools.cache
def launched(single: bool) -> Path:
    """What two scripts leave that train with each row: all those of one callback, or all others.

    They run in one pair of processes, as imports take seconds, and for all workers of a test run; an error of one row
    is raised in its own test.
    """
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", secrets.token_hex(8))
    folder = Path(tempfile.gettempdir()) / f"launched-{run}-{'single' if single else 'together'}"
    try:
        folder.mkdir()
    except FileExistsError:  # another worker is at it
        for _ in range(SECONDS):
            if not (folder / "done").exists():
                time.sleep(1)
        return folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    condition = next(condition for condition in CONDITIONS if condition.run is against_one_process)
    wanted = [f"{row.name}:{kind_of(row, condition).__name__}" for row in ROWS if (row in CASES) == single]
    try:
        subprocess.run(
            [sys.executable, str(Path(__file__).with_name("launched.py")), str(folder), *wanted],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            timeout=SECONDS,  # a hang is an error
            check=True,
        )
    finally:
        (folder / "done").touch()
    return folder


def against_one_process_and_complete(row: Row, kind: type[Classifier], folder: Path) -> dict[str, float]:
    """Spawned processes, after which the parent has all that they found."""
    first = fitted(row, kind, folder, SPAWNED.but(others=lambda: [Leaving(folder)]))
    ranks = [torch.load(rank_file(folder, rank), weights_only=True) for rank in (0, 1)]
    assert gaps(ranks[0]["weights"], ranks[1]["weights"]) == {}
    assert gaps(ranks[0]["weights"], first.module.state_dict()) == {}
    assert_nothing_of_ours(first.module)
    assert_nothing_else(first, row, without(kind, SPAWNED))
    with calibrating_as_rank_zero():
        alone = fitted(row, kind, folder / "alone", TOGETHER)
    assert_the_contract(alone, row, without(kind, TOGETHER))
    apart = gaps(first.module.state_dict(), alone.module.state_dict())
    for own, other in zip(first.ours, alone.ours, strict=True):
        assert ranks[0]["effects"][type(own).__name__] == sum(other.effects.values())
        assert came_home(own) == came_home(other)
        apart |= gaps(results(own), results(other))
    return apart


# How a project trains


def without_schedule(module: Classifier) -> Classifier:
    module.optimise = with_momentum
    return module


def with_lbfgs(module: Classifier) -> Classifier:
    module.optimise = by_lbfgs
    return module


def clipping_its_norm(module: Classifier) -> Classifier:
    module.configure_gradient_clipping = clip_norm
    return module


def clipping_its_values(module: Classifier) -> Classifier:
    module.configure_gradient_clipping = clip_value
    return module


def with_a_compiled_network(module: Classifier, backend: str = "eager") -> Classifier:
    torch._dynamo.reset()  # what is traced leaves marks on parameters, and what was traced before is not again
    module.model.compile(backend=backend)
    return module


def compiled(module: Classifier) -> Any:
    torch._dynamo.reset()
    return torch.compile(module, backend="eager")


def with_learning_rate(found: float) -> Setup:
    def prepare(module: Classifier) -> Classifier:
        module.lr = found
        return without_schedule(module)

    return PLAIN.but(prepare=prepare)


def listed(kind: type[Classifier], rows: int) -> DataLoader:
    """The batches, made before."""
    return DataLoader(list(batches(kind, rows=rows)), batch_size=None)


def one_and_a_short_one(kind: type[Classifier]) -> DataLoader:
    """Two whole batches in one, and a short one."""
    rows = [range(2 * BATCH), range(2 * BATCH, UNEVEN)]
    return batches(kind, rows=UNEVEN, batch_size=1, batch_sampler=rows)


def endless(kind: type[Classifier]) -> DataLoader:
    return DataLoader(Endless(EXAMPLES, as_dict=kind.as_dict), batch_size=BATCH)


def sized(batch_size: int) -> Setup:
    return PLAIN.but(batches=functools.partial(Sized, rows=EXAMPLES, batch_size=batch_size))


def stopping_after(epochs: int) -> list[EarlyStopping]:
    settings = {"mode": "max", "stopping_threshold": epochs - 0.5, "check_on_train_epoch_end": True}
    return [EarlyStopping("epochs", **settings)]


def of(rows: int, **settings: Any) -> Callable[[type[Classifier]], Any]:
    return functools.partial(batches, rows=rows, **settings)


STEPS_ONLY = {"max_epochs": None, "max_steps": STEPS}
ONE_BATCH = PLAIN.but(settings={"max_epochs": 1, "num_sanity_val_steps": 0}, batches=of(BATCH), validation=of(BATCH))
EMA = PLAIN.but(others=lambda: [EMAWeightAveraging(decay=0.5)])
SPAWNED = TOGETHER.but(settings={"devices": 2, "strategy": "ddp_spawn", "use_distributed_sampler": False})
CONSTANT = PLAIN.but(prepare=without_schedule)
SWA = CONSTANT.but(others=lambda: [StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)])
QUASI_NEWTON = PLAIN.but(prepare=with_lbfgs)
LR_FINDER = CONSTANT.but(
    others=lambda: [LearningRateFinder(min_lr=1e-3, max_lr=0.5, num_training_steps=20, early_stop_threshold=None)],
)
SIZE_FINDER = sized(2).but(others=lambda: [BatchSizeFinder(steps_per_trial=1, init_val=2, max_trials=2)])
FOR_LONG = PLAIN.but(settings={"max_epochs": 4})


def against_the_mean_by_hand(row: Row, kind: type[Classifier], folder: Path) -> dict[str, float]:
    """With batch norm, Lightning goes through the data once more for its statistics, and masks may follow the means."""
    first, plain = fitted(row, kind, folder / "first", SWA), without(kind, SWA)
    assert_the_contract(first, row, plain)
    assert gaps(plain.module.state_dict(), without(kind, CONSTANT).module.state_dict())
    by_hand = AverageByHand(None)
    if not kind.norm:
        return gaps(left(first), left(fitted(row, kind, folder / "second", CONSTANT.but(others=lambda: [by_hand]))))
    one_more = CONSTANT.but(settings={"max_epochs": EPOCHS + 1})  # so long Lightning makes it, for schedules too
    fitted(row, kind, folder / "second", one_more.but(others=lambda: [StopAfter(EPOCHS), by_hand]))
    weights, means = dict(first.module.named_parameters()), dict(by_hand.average.named_parameters())
    return gaps(weights, {name: means[name] * (weight != 0) for name, weight in weights.items()})


def against_lbfgs_by_hand(row: Row, kind: type[Classifier], folder: Path) -> dict[str, float]:
    """LBFGS evaluates the loss several times a step: its steps, from the gradients of all these evaluations.

    Where there is a loop by hand it tells the gradients too; elsewhere the fit is run again.
    """
    seen = Evaluations()
    first = fitted(row, kind, folder / "first", QUASI_NEWTON.but(others=lambda: [seen]))
    assert len(seen.losses) > STEPS
    assert_the_contract(first, row, without(kind, QUASI_NEWTON))
    start = [entry.detach() for entry in made(kind).parameters()]
    replayed = seen.replayed(start, lambda weights: torch.optim.LBFGS(weights, lr=0.1, max_iter=2), STEPS)
    ordinary = Evaluations()
    fitted(row, kind, folder / "second", PLAIN.but(others=lambda: [ordinary]))
    assert gaps(ordinary.gradients[0], seen.gradients[0]) == {}
    assert gaps(replayed, seen.weights) == {}
    if row.name in LOOPS:
        in_64_bits = fitted(row, kind, folder / "third", QUASI_NEWTON.but(settings={"precision": "64-true"}))
        return gaps(LOOPS[row.name](kind, list(batches(kind)), EPOCHS), in_64_bits.module.state_dict())
    return gaps(left(first), left(fitted(row, kind, folder / "third", QUASI_NEWTON)))


SAME = "the plain fit"


def as_plain(
    key: str, title: str, setup: Setup, kinds: tuple[type[Classifier], ...] = AUTOMATIC, *, heavy: bool = False
) -> Condition:
    """Circumstances that must not matter: the fit in them has to equal that without."""
    return Condition(key, title, SAME, against(setup, PLAIN), kinds, outcome="repeatable", heavy=heavy)


RESUMED = "the fit that goes on from the checkpoint of its middle; the forward pass has that type"

CONDITIONS = (
    Condition("plain", "one process", "the same fit again", against(PLAIN, PLAIN), outcome="repeatable"),
    Condition(
        "popen",
        "two processes, ddp",
        "one process with the whole batch; the ranks are identical",
        against_one_process,
        WITHOUT_NORM,
        ROUNDING,
        outcome="repeatable",
    ),
    Condition(
        "spawn",
        "two processes, ddp_spawn",
        "one process with the whole batch; the ranks and the parent are identical",
        against_one_process_and_complete,
        WITHOUT_NORM,
        ROUNDING,
        sampled=False,
        outcome="repeatable",
    ),
    Condition(
        "accumulation",
        "accumulate_grad_batches",
        "batches of twice the size",
        against(
            PLAIN.but(settings={"accumulate_grad_batches": 2}, paraphrased=True),
            PLAIN.but(batches=of(EXAMPLES, batch_size=2 * BATCH), paraphrased=True),
        ),
        WITHOUT_NORM,
        ROUNDING,
        outcome="repeatable",
    ),
    Condition(
        "clip norm",
        "gradients clipped by norm",
        "a module that clips them itself",
        against(PLAIN.but(settings={"gradient_clip_val": 0.2}), PLAIN.but(prepare=clipping_its_norm), acts=True),
    ),
    Condition(
        "clip value",
        "gradients clipped by value",
        "a module that clips them itself",
        against(
            PLAIN.but(settings={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
            PLAIN.but(prepare=clipping_its_values),
            acts=True,
        ),
    ),
    Condition(
        "bf16-mixed",
        "bf16-mixed",
        RESUMED,
        against_itself_resumed(torch.bfloat16, PLAIN.but(settings={"precision": "bf16-mixed"})),
        outcome="repeatable",
    ),
    Condition(
        "16-mixed",
        "16-mixed, with a scaler",
        RESUMED,
        against_itself_resumed(torch.float16, PLAIN.but(plugin=functools.partial(scaled, 2.0**12))),
        outcome="repeatable",
    ),
    Condition(
        "bf16-true",
        "bf16-true",
        RESUMED,
        against_itself_resumed(torch.bfloat16, PLAIN.but(settings={"precision": "bf16-true"})),
        outcome="repeatable",
    ),
    as_plain(
        "compiled network",
        "the network compiled, backend='eager'",
        PLAIN.but(prepare=with_a_compiled_network),
        WITH_CHILD,
        heavy=True,
    ),
    as_plain(
        "compiled module", "the LightningModule compiled, backend='eager'", PLAIN.but(prepare=compiled), heavy=True
    ),
    Condition(
        "EMA",
        "EMAWeightAveraging",
        "an average kept by hand",
        against(EMA, PLAIN.but(others=lambda: [AverageByHand(0.5)]), acts=True),
    ),
    Condition("SWA", "StochasticWeightAveraging", "a mean kept by hand", against_the_mean_by_hand, within=ROUNDING),
    Condition(
        "manual",
        "manual optimisation",
        "automatic optimisation",
        against(PLAIN.but(kind=ManualClassifier), CONSTANT),
        (Classifier,),
        outcome="repeatable",
    ),
    Condition(
        "two optimizers",
        "two optimizers, CompressionMixin",
        "one optimizer for all, automatic optimisation",
        against(PLAIN.but(kind=TwoOptimizers), CONSTANT),
        (Classifier,),
        outcome="repeatable",
    ),
    Condition(
        "LBFGS",
        "LBFGS",
        "a loop by hand, where the cell is exact; else LBFGS by hand from the same gradients, and the same fit again",
        against_lbfgs_by_hand,
        WITHOUT_NORM,
        outcome="repeatable",
        loops=LOOPS,
    ),
    Condition(
        "uneven",
        "an uneven last batch",
        "the batches as a list",
        against(PLAIN.but(batches=of(EXAMPLES - 4)), PLAIN.but(batches=functools.partial(listed, rows=EXAMPLES - 4))),
        outcome="repeatable",
    ),
    Condition(
        "limit_train_batches",
        "limit_train_batches",
        "so many batches",
        against(PLAIN.but(settings={"limit_train_batches": 3}), PLAIN.but(batches=of(3 * BATCH)), acts=True),
        outcome="repeatable",
    ),
    Condition(
        "overfit_batches",
        "overfit_batches",
        "so many batches",
        against(PLAIN.but(settings={"overfit_batches": 2}), PLAIN.but(batches=of(2 * BATCH)), acts=True),
        outcome="repeatable",
    ),
    Condition(
        "fast_dev_run",
        "fast_dev_run",
        "a fit of one batch",
        against(PLAIN.but(settings={"fast_dev_run": True}), ONE_BATCH, acts=True),
        outcome="repeatable",
    ),
    as_plain(
        "barebones",
        "barebones",
        PLAIN.but(settings={"barebones": True, "logger": False, "enable_checkpointing": False}),
    ),
    as_plain("logger=False", "logger=False", PLAIN.but(settings={"logger": False})),
    as_plain("no checkpoints", "enable_checkpointing=False", PLAIN.but(settings={"enable_checkpointing": False})),
    as_plain("no validation", "no validation", PLAIN.but(validation=None)),
    as_plain("max_steps", "max_steps alone", PLAIN.but(settings=STEPS_ONLY)),
    as_plain("unsized, max_steps", "data without a length, max_steps", PLAIN.but(batches=endless, settings=STEPS_ONLY)),
    as_plain("unsized", "data without a length, max_epochs", PLAIN.but(batches=endless)),
    as_plain("max_time", "max_time that is not reached, max_epochs", PLAIN.but(settings={"max_time": DAY})),
    as_plain(
        "max_time alone",
        "max_time alone",
        PLAIN.but(settings={"max_time": {"seconds": STEPS}, "max_epochs": None}, others=lambda: [Clock()]),
    ),
    Condition(
        "lr finder",
        "LearningRateFinder",
        "a fit with the rate that it found",
        against_what_it_found(LR_FINDER, lambda fit: fit.module.lr, with_learning_rate),
        outcome="repeatable",
    ),
    Condition(
        "batch-size finder",
        "BatchSizeFinder",
        "a fit with the size that it found",
        against_what_it_found(SIZE_FINDER, lambda fit: fit.trainer.datamodule.batch_size, sized),
        outcome="repeatable",
    ),
    as_plain("configure_callbacks", "configure_callbacks", PLAIN.but(by_module=True)),
    Condition(
        "EarlyStopping",
        "EarlyStopping",
        "a fit that is ended by hand after the same epoch",
        against(
            FOR_LONG.but(others=lambda: [CountingEpochs(), *stopping_after(3)]),
            FOR_LONG.but(others=lambda: [CountingEpochs(), StopAfter(3)]),
        ),
        outcome="repeatable",
    ),
    Condition(
        "max_time reached",
        "max_time that ends the fit, in the midst of an epoch",
        "a fit that is ended by hand after the same step",
        against(
            FOR_LONG.but(settings={"max_time": {"seconds": MIDST}}, others=lambda: [Clock()]),
            FOR_LONG.but(others=lambda: [StopAfter(steps=MIDST)]),
            acts=True,
        ),
        outcome="repeatable",
    ),
    Condition(
        "accumulation, uneven",
        "accumulate_grad_batches that leaves a short last batch alone",
        "batches of twice the size, and half of the last one's gradients",
        against(
            PLAIN.but(
                settings={"accumulate_grad_batches": 2, "limit_train_batches": 3},
                batches=of(UNEVEN),
                paraphrased=True,
            ),
            PLAIN.but(batches=one_and_a_short_one, others=lambda: [HalfOfTheLast()], paraphrased=True),
        ),
        WITHOUT_NORM,
        ROUNDING,
        outcome="repeatable",
    ),
    as_plain(
        "compiled network, aot_eager",
        "the network compiled, backend='aot_eager'",
        PLAIN.but(prepare=functools.partial(with_a_compiled_network, backend="aot_eager")),
        WITH_CHILD,
        heavy=True,
    ),
    Condition(
        "compiled network, inductor",
        "the network compiled, backend='inductor'",
        SAME,
        against(PLAIN.but(prepare=functools.partial(with_a_compiled_network, backend="inductor")), PLAIN),
        WITH_CHILD,
        1e-5,
        outcome="repeatable",
        heavy=True,
        alone=(
            "DistillationCallback",
            "AttentionTransferCallback",
            "PSGDCallback",
            "PruningCallback",
            "DCILCallback",
        ),
    ),
)


def kind_of(row: Row, condition: Condition) -> type[Classifier]:
    """The kind of module of a cell: they take turns, along rows and along columns."""
    turn = ROWS.index(row) + CONDITIONS.index(condition)
    return condition.kinds[turn % len(condition.kinds)]
