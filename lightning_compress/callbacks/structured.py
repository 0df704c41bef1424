"""Structured pruning: whole filters go while the network is trained, and it really gets smaller and faster.

Filters by their norm: Li et al., "Pruning filters for efficient ConvNets", ICLR 2017, arXiv:1608.08710. Which of them
can only go together: Fang et al., "DepGraph: Towards any structural pruning", CVPR 2023, arXiv:2301.12900.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from torch import nn

from lightning_compress import _compat
from lightning_compress.callbacks.arguments import (
    check_choice,
    check_flag,
    check_fraction,
    check_layers,
    check_name,
    check_positive,
    check_whole,
    tell_without_effect,
)
from lightning_compress.callbacks.base import announce, callbacks_of, log, optimises_automatically
from lightning_compress.callbacks.channel_plan import BUDGETS, Plan, Wanted
from lightning_compress.callbacks.copies import Copies, SkippedBatchError
from lightning_compress.callbacks.intents import Aim, Intent
from lightning_compress.callbacks.ranks import together
from lightning_compress.callbacks.rehearsal import Rehearsal
from lightning_compress.callbacks.saving import SavingCallback
from lightning_compress.functional.schedules import iterative_schedule
from lightning_compress.mechanisms.batchnorm import batch_norms, reestimate_all_
from lightning_compress.mechanisms.channel_graph import StructureError, require_torch_pruning
from lightning_compress.mechanisms.checkpoints import (
    SECTION,
    before_loading,
    keep_structure_,
    resize_,
    saving_structure,
)
from lightning_compress.mechanisms.controller import StepController
from lightning_compress.mechanisms.optimizers import repeats_steps
from lightning_compress.mechanisms.progress import Progress
from lightning_compress.mechanisms.selection import find_module, listing
from lightning_compress.mechanisms.shrinking import (
    Shrinkage,
    Structure,
    prepared_shrinkage,
    structure_of,
    structure_told_by,
)
from lightning_compress.mechanisms.signs import sign
from lightning_compress.mechanisms.states import Each
from lightning_compress.mechanisms.time_limit import within

SCORES = ("l1", "l2", "taylor", "bn_scale", "random")
SCHEDULES = ("one_shot", "iterative")


TRIES = 32  # batches that the step may skip one after the other


@dataclass(frozen=True)
class _State:
    """What has gone so far: whole numbers and names, for a checkpoint.

    Attributes:
        shrinkage: What stays of each tensor of the network that there was at first.
        parameters: Before the first round and after the last.
        macs: Likewise, for one sample of the first round's batch.
        structure: Sizes of the network that this belongs to.
        whole: Its sizes at first.
        reached: The share of the budget that is gone.
        asked: The share that was asked for so far.
        done: How many rounds there were.
    """

    shrinkage: Shrinkage = field(default_factory=Shrinkage)
    parameters: list[int] = field(default_factory=list)
    macs: list[int] = field(default_factory=list)
    structure: Structure = field(default_factory=dict)
    whole: Structure = field(default_factory=dict)
    reached: float = 0.0
    asked: float = 0.0
    done: int = 0


class StructuredPruningCallback(SavingCallback):
    """Take whole filters out of a network, with all that belongs to them, and train on with what is left.

    When it acts: with the first batch, all is tried on copies, and what will go is printed; before the batch at which a
    round is due, filters, their batch-norm entries and what reads them are taken out of the module, of the state of its
    optimizers, and of averages of its weights. Parameters remain the objects that they are. What it leaves alone: the
    shapes of what the network returns; layers that reach attention; names in the ``state_dict``. A smaller network is
    loaded into the user's class with :func:`lightning_compress.export.load_shrunk`.

    Filters that only go together, as those of layers that a residual connection adds up, have one score. Right after a
    round the network is bad; what it learns afterwards counts. So begin with a trained network, and train on.

    Args:
        ratio: The share that is removed, in (0, 1): 0.3 leaves 70%.
        schedule: "one_shot", all of it at ``start``; or "iterative", in ``rounds`` that each take the same share of
            what remains, the last at ``end``.
        start: Fraction of the training, in optimizer steps, at which pruning begins, in [0, 1).
        end: Fraction of the last round of "iterative", from ``start`` to below 1.
        rounds: Of "iterative", at least 2.
        score: What goes first: filters of the smallest "l1" or "l2" norm; "taylor", those without which the loss of
            one batch would change least, to first order; "bn_scale", those that batch norm scales down most; "random".
        budget: What the share is of: "filters" of the selected layers, each of which loses as much; "params" or "macs"
            of the whole network, met within 2 percentage points.
        min_channels: Layers with no more than these are left alone, and others keep at least as many.
        round_to: What numbers of channels are multiples of, for runtimes that are fast with multiples of 8, say.
        reestimate_batchnorm: Whether to estimate batch-norm statistics anew at the end, on 16 training batches.
        seed: Of "random".
        time_limit: Seconds that finding the structure and trying it may take.
        network: Dotted name of the network inside the LightningModule; None: what the step calls.
        layers: Selectors of layers: dotted names, patterns, ``"re:..."``, ``"type:Conv2d"``. None: all convolutions and
            linear layers.
        exclude: Selectors of layers that keep their filters.
        name: As in the base class; default "structured".

    Raises:
        ValueError: If an argument is out of its range.
        ImportError: At the start of the fit, if the extra ``structured`` is not installed.

    Example:
        >>> StructuredPruningCallback(0.5, budget="macs", schedule="iterative").state_key
        'StructuredPruningCallback[structured]'
    """

    default_name = "structured"
    holds: ClassVar[Mapping[str, Any]] = {
        "arguments": {"budget": str},
        "shrinkage": {"kept": dict, "attributes": dict, "shapes": dict},
        "parameters": [int],
        "macs": [int],
        "structure": Each(dict),
        "whole": Each(dict),
        "reached": float,
        "asked": float,
        "done": int,
    }

    def __init__(
        self,
        ratio: float,
        *,
        schedule: Literal["one_shot", "iterative"] = "one_shot",
        start: float = 0.0,
        end: float = 0.5,
        rounds: int = 3,
        score: Literal["l1", "l2", "taylor", "bn_scale", "random"] = "l2",
        budget: Literal["filters", "params", "macs"] = "filters",
        min_channels: int = 8,
        round_to: int = 1,
        reestimate_batchnorm: bool = False,
        seed: int = 0,
        time_limit: float = 60.0,
        network: str | None = None,
        layers: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.ratio = check_fraction("ratio", ratio, below_one=True, above_zero=True)
        check_choice("schedule", schedule, SCHEDULES)
        check_choice("score", score, SCORES)
        check_choice("budget", budget, tuple(BUDGETS))
        self.start = check_fraction("start", start, below_one=True)
        self.end = check_fraction("end", end, below_one=True)
        if schedule == "iterative" and start > end:
            raise ValueError(f"start must be at most end, got start={start} and end={end}")
        check_layers(layers, exclude)
        self.rounds = check_whole("rounds", rounds, at_least=2)
        if schedule == "one_shot":
            tell_without_effect(self, StructuredPruningCallback, "schedule='one_shot'", rounds=self.rounds)
            if self.end != self.start:
                tell_without_effect(self, StructuredPruningCallback, "schedule='one_shot'", end=self.end)
        self.min_channels = check_whole("min_channels", min_channels, at_least=1)
        self.round_to = check_whole("round_to", round_to, at_least=1)
        self.seed = check_whole("seed", seed, at_least=0)
        if score != "random":
            tell_without_effect(self, StructuredPruningCallback, f"score='{score}'", seed=self.seed)
        self.reestimate_batchnorm = check_flag("reestimate_batchnorm", reestimate_batchnorm)
        self.time_limit = check_positive("time_limit", time_limit, "a positive number of seconds")
        self.network = check_name("network", network)
        self.schedule, self.score, self.budget, self.layers, self.exclude = schedule, score, budget, layers, exclude
        self.plan: Plan | None = None
        """What the last round did, or what the first batch has shown that will be done."""
        self.went: Plan | None = None
        """What the last round of this fit did; None before the first."""
        self._progress: Progress | None = None
        self._begun = False  # whether the network was looked at in this fit
        self._loaded, self._budget = False, budget
        self._skipped = 0  # batches with which the step did nothing
        self._state = _State()

    # What users read

    @property
    def reached(self) -> float:
        """The share of the budget that is gone."""
        return self._state.reached

    @property
    def shrinkage(self) -> Shrinkage:
        """What stays of each tensor of the network that there was at first; empty before the first round."""
        return self._state.shrinkage

    @property
    def shrinks_until(self) -> float:
        """When the last round is due."""
        return self.end if self.schedule == "iterative" else self.start

    def intent(self, trainer: Any, pl_module: Any) -> Intent:
        """What goes of which layers, once the first batch has shown it."""
        aims: dict[str, Aim] = {"ratio": self.ratio, "budget": self.budget, "schedule": self.schedule}
        aims |= {"start": self.start} if self.schedule == "one_shot" else {"start": self.start, "end": self.end}
        kind, plan = type(self).__name__, self.plan
        if plan is None and self._state.done and self._reached_all:
            smaller = self._smaller()
            layers = [find_module(pl_module, name, argument="layers") for name in smaller]
            elements = sum(own.numel() for layer in layers for own in layer.parameters())
            return Intent(kind, tuple(smaller), elements=elements, aims=aims, notes=tuple(self.remarks()))
        if plan is None:
            return Intent(kind, aims=aims, notes=("the first batch shows what can go",))
        takes = tuple(plan.filters)
        parts = [find_module(pl_module, name, argument="layers") for name in takes]
        if plan is self.went:  # these layers are smaller by now
            elements = sum(plan.layers[name].parameters[0] for name in takes)
        else:
            elements = sum(own.numel() for part in parts for own in part.parameters())
        went = "went before the first step" if self._state.done else "will go"
        notes = (f"of the {BUDGETS[self.budget]} {plan.share:.1%} {went}: {', '.join(plan.totals())}",)
        return Intent(kind, takes, plan.left, elements, aims, notes=notes)

    @property
    def foreseen_share(self) -> float:
        """That of the plan, or, where rounds are still to come, what is asked for of what is left."""
        if self.plan is None or self._reached_all:
            return 1.0
        if self._state.done == 0:
            return self.plan.parameters[1] / self.plan.parameters[0]
        return (1 - self.ratio) / (1 - self._state.asked)

    def remarks(self) -> list[str]:
        """What went, and what stayed."""
        if self._state.done == 0:
            return [] if self.failure is None else [f"{self.name}: {self.failure}."]
        rounds = "" if self._state.done == 1 else f" in {self._state.done} rounds"
        remarks = [
            f"{self.name}: {self.reached:.1%} of the {BUDGETS[self.budget]} are gone{rounds} (asked {self.ratio:.1%}): "
            f"{_numbers('parameters', self._state.parameters)}, {_numbers('MACs', self._state.macs)}."
        ]
        smaller = self._smaller()  # an earlier round may have taken filters of a layer that the last one leaves
        left = [] if self.plan is None else [name for name in self.plan.left if name not in smaller]
        if left:
            remarks.append(f"{self.name}: layers that stay as they are: {listing(left, None)}.")
        return remarks

    # Life cycle

    def problem_with_shards(self) -> str | None:
        """Shards have the shapes that the module was sharded with."""
        return (
            "channels can only go from whole parameters: let them go in a short fit on one device or DDP first, and "
            "shard the module that load_shrunk gives"
        )

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what cannot be made smaller while it is trained."""
        require_torch_pruning()
        owner = f"{type(self).__name__} '{self.name}'"
        if _compat.takes_iterator(trainer, pl_module):
            raise ValueError(
                f"{owner} tries steps on the batch at hand, and that of {type(pl_module).__name__} draws its batches "
                "itself, from dataloader_iter; let it take a batch"
            )
        if not optimises_automatically(pl_module):
            raise ValueError(f"{owner} replays training steps, and {type(pl_module).__name__} optimises manually")
        if _compat.runs_in_children(trainer):
            launcher = type(trainer.strategy.launcher).__name__
            raise ValueError(
                f"{owner} cannot bring a smaller network back from processes that {launcher} starts: use strategy='ddp'"
            )
        if _compat.compiled_state(pl_module) is not None:
            raise ValueError(
                f"{owner} cannot look into {type(pl_module).__name__}, which is compiled as a whole: compile a network "
                "in it"
            )
        others = [own for own in trainer.callbacks if isinstance(own, StructuredPruningCallback) and own is not self]
        if others:
            raise ValueError(
                f"'{self.name}' and '{others[0].name}' would both take filters away: give one of them only"
            )

    def enter(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """No checkpoint is resumed yet."""
        self._loaded = False

    def _loading_files(self, trainer: Any, pl_module: Any, stage: str) -> AbstractContextManager[None]:
        """Load networks of other sizes."""
        return before_loading(pl_module, lambda checkpoint: self._resize(trainer, pl_module, checkpoint))

    def _saving_files(self, pl_module: Any) -> AbstractContextManager[None]:
        """Save the sizes of what is left, too."""
        return saving_structure(pl_module, self.name, lambda: self._state.whole)

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """Find out whether this goes on with a network that was made smaller before."""
        for optimizer in trainer.optimizers:
            if repeats_steps(optimizer):
                raise ValueError(
                    f"{type(self).__name__} '{self.name}' cannot take entries out of the state of "
                    f"{type(optimizer).__name__}, which is of all parameters at once; use another optimizer"
                )
        if self.reestimate_batchnorm and not batch_norms(pl_module):
            raise ValueError("reestimate_batchnorm has no effect: no layer keeps batch-norm statistics")
        structure = structure_of(pl_module)
        goes_on = (self._loaded or self.has_fitted(pl_module)) and self._state.structure == structure
        if goes_on:
            self._check_state()
        else:
            self._state, self.plan = _State(structure=structure, whole=structure), None
        self._begun, self._skipped, self.went = False, 0, None
        stack.callback(setattr, self, "_progress", None)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find out how long the training is."""
        self._progress = Progress(trainer, pl_module)
        last = self.shrinks_until
        if self._progress.step_at(last) >= self._progress.total:
            argument = "end" if self.schedule == "iterative" else "start"
            raise ValueError(
                f"{argument}={last} leaves no step after the last round: the training has {self._progress.total:.0f}"
            )
        due = (self.end - self.start) * self._progress.total
        if self.schedule == "iterative" and self.rounds > max(math.ceil(due), 1):
            self._warn_once(f"rounds={self.rounds} are more than the {max(due, 1):.0f} steps between start and end")
        if self._reached_all:
            log.info("%s: the network was made smaller before; it stays as it is. %s", self.name, self.remarks()[0])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Try all of it with the first batch; make the network smaller where a round is due."""
        if self._progress is None or self._reached_all or batch_idx % trainer.accumulate_grad_batches:
            return
        target = self._target(self._progress.fraction_before)
        due = target > self._state.asked
        if self._begun and not due:
            return
        plan = self._rehearsed(trainer, pl_module, batch, batch_idx, target if due else self.ratio)
        if plan is None:  # a batch that the step skips
            return
        self.plan = plan
        if due:
            self._shrink(trainer, pl_module, plan, target)
        if trainer.is_global_zero:
            title = f"{self.name} {'has taken' if due else 'will take'} away {plan.share:.1%} of the "
            title += BUDGETS[self.budget]
            again = f"{title}; this round: {', '.join(plan.totals())}"
            announce((again if self._begun else plan.text(title)) + "\n")
        self._begun = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so where the training was too short."""
        if self._progress is not None and not self._reached_all:
            self.failure = (
                f"training ended at {self._progress.fraction:.0%} of its length, before all rounds: {self.reached:.4f} "
                f"of the {BUDGETS[self.budget]} are gone, not {self.ratio}"
            )
            self._warn_once(self.failure)

    def bake(self, trainer: Any, pl_module: Any) -> None:
        """The module is as small as it should be; its files are saved as those of any module."""
        if not (self._begun or self._reached_all):
            self._warn_once("no training step was run, so no filter went")
        self._files.close()

    def estimate_statistics(self, trainer: Any, pl_module: Any) -> None:
        """Batch-norm statistics of the smaller network."""
        if self.reestimate_batchnorm:
            reestimate_all_(trainer, pl_module, self._warn_once)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Outside of a fit too, what is needed to load a smaller network."""
        if not self._saving:
            keep_structure_(checkpoint, self.name, pl_module, self._state.whole)

    def extra_state(self) -> dict[str, Any]:
        """What has gone so far: whole numbers, and names."""
        return {**vars(self._state), "shrinkage": self._state.shrinkage.state()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from there, if the module that is trained is the one of the checkpoint."""
        kept = {entry.name: state[entry.name] for entry in fields(_State)}
        self._state = _State(**{**kept, "shrinkage": Shrinkage.of(kept["shrinkage"])})
        self._loaded = True
        self._budget = state["arguments"]["budget"]

    # Private

    def _check_state(self) -> None:
        """Refuse to go on from what would have to be given back, or was counted otherwise."""
        if self._state.asked > self.ratio + 1e-9:
            raise ValueError(
                f"ratio={self.ratio} is below the {self._state.asked:.4f} that was taken away before: filters do not "
                "come back; ask for as much or more, or begin a new training"
            )
        if self._state.done and self._budget != self.budget:
            raise ValueError(f"budget='{self.budget}' cannot go on from a checkpoint made with '{self._budget}'")

    @property
    def _reached_all(self) -> bool:
        return self._state.asked >= self.ratio * (1 - 1e-9)  # relative: any ratio is still to be reached at first

    def _target(self, fraction: float) -> float:
        """The share that should be gone at a fraction of the training."""
        if fraction < self.start - 1e-9:
            return 0.0
        if self.schedule == "one_shot" or self.end == self.start:
            return self.ratio
        progress = min((fraction - self.start) / (self.end - self.start), 1.0)
        return iterative_schedule(max(progress, 0.0), 0.0, self.ratio, rounds=self.rounds)

    def _rehearsed(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, ratio: float) -> Plan | None:
        """The plan of rank 0, which has been tried, on all ranks; None if a rank's step skips its batch."""
        wanted = Wanted(
            ratio=ratio,
            budget=self.budget,
            score=self.score,
            min_channels=self.min_channels,
            round_to=self.round_to,
            seed=self.seed + self._state.done,
            last=ratio >= self.ratio - 1e-9,
            layers=self.layers,
            exclude=self.exclude,
            network=self.network,
            earlier=self._state.shrinkage,
        )
        found: list[Plan] = []

        def work(trainer: Any, pl_module: Any) -> None:
            message = (
                f"{type(self).__name__} '{self.name}' was stopped after time_limit={self.time_limit} s of looking at "
                f"the structure of {type(pl_module).__name__}: give it more, or name a part of the network with layers="
            )
            copies = Copies(trainer, pl_module, batch, batch_idx)
            try:
                with sign(trainer, f"{self.name}: trying smaller networks on copies"):
                    found.append(within(self.time_limit, Rehearsal(copies, pl_module, wanted).plan, message))
                self._skipped = 0
            except SkippedBatchError:
                self._skipped += 1
                if self._skipped == TRIES:
                    raise StructureError(
                        f"the training step of {type(pl_module).__name__} calls no network, in {TRIES} batches in a row"
                    ) from None

        with _compat.patient_group(trainer.world_size) as tell:
            together(tell, work, trainer, pl_module)
        if trainer.world_size > 1 and not trainer.strategy.reduce_boolean_decision(bool(found), all=True):
            return None
        plan: Plan | None = trainer.strategy.broadcast(found[0] if found else None)
        return plan

    def _shrink(self, trainer: Any, pl_module: Any, plan: Plan, target: float) -> None:
        """Take away what the plan says, of the module and of all that hangs on it."""
        shrinkage = plan.shrinkage
        averages = _compat.averages_of(trainer, pl_module)
        with _compat.unwrapped(trainer):
            shrinking = [prepared_shrinkage(pl_module, shrinkage, trainer.optimizers)]
            shrinking += [prepared_shrinkage(average, shrinkage) for average in averages]
            for shrink in shrinking:  # all of them have been looked at
                shrink()
            before = self._state
            self._state = _State(
                shrinkage=shrinkage.after(before.shrinkage),
                parameters=[(before.parameters or plan.parameters)[0], plan.parameters[1]],
                macs=[(before.macs or plan.macs)[0], plan.macs[1]],
                structure=structure_of(pl_module),
                whole=before.whole,
                reached=plan.share,
                asked=target,
                done=before.done + 1,
            )
            for callback in callbacks_of(trainer):
                callback.follow_shrinkage(shrinkage, pl_module)
            self._require_controller().weights.resized()
            _compat.reset_compiled_code()
        self.went = plan
        self._forget_scores(trainer, "a larger network", "the smaller network")
        numbers = {"share": plan.share, "parameters": plan.parameters[1], "macs": plan.macs[1]}
        # past self.log, which keeps what falls between two steps that are logged
        self.tracker(trainer).numbers({f"compress/{self.name}/{key}": float(value) for key, value in numbers.items()})

    def _resize(self, trainer: Any, pl_module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
        """Give the module, and averages of it, the sizes that a checkpoint has."""
        owners = [name for name, own in checkpoint.get(SECTION, {}).items() if "structure" in own]
        if self._saving and owners and self.name not in owners and checkpoint.get("callbacks"):
            raise ValueError(
                f"the checkpoint was saved with StructuredPruningCallback '{owners[0]}', whose rounds '{self.name}' "
                f"does not know of: give this one name='{owners[0]}'"
            )
        if not owners and not (self.has_fitted(pl_module) and self._knows(pl_module, checkpoint)):
            return  # of a network that this one never was: if it does not fit, Lightning says so
        for module in (pl_module, *_compat.averages_of(trainer, pl_module)):
            told = resize_(module, checkpoint)
            if told is not None and module is pl_module and self._saving and not self.has_fitted(pl_module):
                self._warn_once(f"the checkpoint's network takes the place of this one: {told}")

    def _smaller(self) -> list[str]:
        """The layers that filters have gone from; norms of theirs are not among them."""
        whole, now = self._state.whole, self._state.structure
        return [name for name, own in whole.items() if _filters(now.get(name, own)) < _filters(own)]

    def _knows(self, pl_module: nn.Module, checkpoint: Mapping[str, Any]) -> bool:
        """Whether each size in a checkpoint lies between those that this network has had."""
        had = (structure_of(pl_module), self._state.structure, self._state.whole)
        for name, told in structure_told_by(pl_module, checkpoint["state_dict"]).items():
            for what, size in told.items():
                known = [own[name][what] for own in had if what in own.get(name, ())]
                if not known or not min(known) <= size <= max(known):
                    return False
        return True


def _filters(sizes: Mapping[str, Any]) -> int:
    return int(sizes.get("out_channels", sizes.get("out_features", 0)))


def _numbers(what: str, numbers: Sequence[int]) -> str:
    return f"{what} {numbers[0]:,} -> {numbers[1]:,}"
