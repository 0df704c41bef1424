"""Pruning: the weights that matter least become zero, by a schedule, while the network learns to do without them.

Magnitude pruning of Han et al., "Learning both weights and connections for efficient neural networks", NeurIPS 2015,
arXiv:1506.02626; the gradual schedule of Zhu & Gupta, "To prune, or not to prune", ICLR 2018 workshop,
arXiv:1710.01878; rewinding of Renda et al., "Comparing rewinding and fine-tuning in neural network pruning", ICLR 2020,
arXiv:2003.02389.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_compress.callbacks.arguments import (
    check_choice,
    check_flag,
    check_fraction,
    check_whole,
    shown,
    tell_without_effect,
)
from lightning_compress.callbacks.intents import Intent, layers_of
from lightning_compress.callbacks.masks import SCHEDULES, MaskCallback
from lightning_compress.functional.masks import (
    erk_sparsities,
    layer_zeros,
    n_m_masks,
    random_score,
    smallest_masks,
)
from lightning_compress.functional.schedules import Schedule, iterative_schedule
from lightning_compress.mechanisms.controller import StepController
from lightning_compress.mechanisms.gathering import rows_of
from lightning_compress.mechanisms.importance import TaylorScores
from lightning_compress.mechanisms.optimizers import around_steps, loss_scale
from lightning_compress.mechanisms.owned import holders, parameters_of
from lightning_compress.mechanisms.rewinding import TrainingStart
from lightning_compress.mechanisms.selection import did_you_mean, listing
from lightning_compress.mechanisms.sharding import sharded_units
from lightning_compress.mechanisms.shrinking import Shrinkage
from lightning_compress.mechanisms.states import Each, Sometimes
from lightning_compress.mechanisms.weights import sites_of

SCORES = ("magnitude", "random", "taylor")
SCOPES = ("global", "layer", "erk")
REWINDS = ("weights", "lr")


class PruningCallback(MaskCallback):
    """Prune weights during training; the network that is validated, saved and left behind has exactly this sparsity.

    When it acts: the forward pass of each step reads masked weights, ``M * W``, and their gradient is masked too; after
    optimizer steps the masks are updated by the schedule. Validation, checkpoints and the module after the fit hold the
    masked weights. What it leaves alone: names in the ``state_dict``, the optimizer, and the dense weights, which are
    kept beside in checkpoints so that a training can go on. Zeros that are spread out make a compressed file smaller;
    they make the network no faster.

    Args:
        sparsity: Final share of zeros among the selected weights, in [0, 1); met exactly. None with a ``pattern``.
        schedule: "one_shot": all at ``start``, then fine-tuning. "iterative": ``rounds`` that each take the same share
            of what remains. The others: gradually. Or a function ``(progress, start, end)`` to a sparsity.
        start: Fraction of optimizer steps at which pruning begins, in [0, 1].
        end: Fraction of its end; then the masks stay.
        update_interval: Optimizer steps between two updates, at least 1.
        rounds: Of "iterative", at least 1.
        regrow: Whether pruned weights may come back, with "magnitude".
        score: What goes first: the smallest "magnitude"; the smallest ``|w * g|`` since the last update, "taylor"; or
            any.
        scope: Whether all weights are compared, or a layer's; "erk": large layers get more zeros.
        pattern: "unstructured", or "n:m" such as "2:4": n kept of each m consecutive input channels, with the sparsity
            ``1 - n/m``. Layers that do not divide by m are skipped and listed.
        rewind: After each pruning go back to the first "weights", with their learning rates, or to the first "lr"
            alone; with "one_shot" and "iterative".
        reestimate_batchnorm: Estimate batch norm anew at the end, on 16 training batches.
        seed: Of the random score.
        guard_checkpoints: Whether a monitored checkpoint may be the best from the final sparsity on only.
        layers: Selectors: dotted names, with what lies below; patterns ``"*.conv1"``; ``"re:..."``; ``"type:Conv2d"``.
            None: all convolutions and linear layers.
        exclude: What is left dense.
        name: As in the base class; default "pruning".

    Raises:
        ValueError: If an argument is out of its range, or two contradict each other.

    Example:
        >>> import lightning.pytorch as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> module, pruning = BoringModel(), PruningCallback(0.5)
        >>> L.Trainer(max_steps=4, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[pruning],
        ...           enable_model_summary=False, enable_checkpointing=False).fit(module)
        >>> (module.layer.weight == 0).sum().item(), module.layer.weight.numel()
        (32, 64)
    """

    default_name = "pruning"
    holds: ClassVar[Mapping[str, Any]] = {
        "importance": Sometimes({"sums": Each(Tensor), "steps": Each(int), "taken": list}),
        "start": Sometimes({"rates": list, "schedulers": list}),
    }

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        schedule: Literal["one_shot", "iterative", "cubic", "linear", "cosine"] | Schedule = "cubic",
        start: float = 0.0,
        end: float = 0.75,
        update_interval: int = 1,
        rounds: int = 5,
        regrow: bool = False,
        score: Literal["magnitude", "random", "taylor"] = "magnitude",
        scope: Literal["global", "layer", "erk"] = "global",
        pattern: str | int = "unstructured",
        rewind: Literal["weights", "lr"] | None = None,
        reestimate_batchnorm: bool = False,
        seed: int = 0,
        guard_checkpoints: bool = True,
        layers: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        check_choice("score", score, SCORES)
        check_choice("scope", scope, SCOPES)
        self.regrow = check_flag("regrow", regrow)
        self.rounds = check_whole("rounds", rounds, at_least=1)
        self.seed = check_whole("seed", seed, at_least=0)
        self._n_m = _parsed(pattern)
        self.pattern = "unstructured" if self._n_m is None else f"{self._n_m[0]}:{self._n_m[1]}"
        super().__init__(
            _sparsity(sparsity, self.pattern, self._n_m),
            schedule=schedule,
            start=start,
            end=end,
            update_interval=update_interval,
            layers=layers,
            exclude=exclude,
            guard_checkpoints=guard_checkpoints,
            reestimate_batchnorm=reestimate_batchnorm,
            name=name,
        )
        self.score, self.scope, self.rewind = score, scope, rewind
        self._check_together()
        self._skipped: list[str] = []  # weights that the n:m pattern does not fit
        self._input_dims: dict[str, int | None] = {}
        self._importance: TaylorScores | None = None
        self._announced: set[int] = set()  # optimizers whose next step was foretold, with its gradients
        self._start: TrainingStart | None = None
        self._saved_start: dict[str, Any] | None = None  # of the state that the fit began with

    # What the base asks

    def check(self, trainer: Any, pl_module: Any) -> None:
        """As the base; refuse channels that go meanwhile where they are counted, or would come back."""
        super().check(trainer, pl_module)
        if self._n_m is not None:
            why = f"pattern='{self.pattern}' of '{self.name}' counts input channels: use one of the two"
            self._refuse_shrinking(trainer, why)
        if self.rewind is not None:
            why = f"rewind='{self.rewind}' of '{self.name}' would go back to all of them: give rewind=None"
            self._refuse_shrinking(trainer, why)

    def follow_shrinkage(self, shrinkage: Shrinkage, pl_module: Any) -> None:
        """As the base; with the scores since the last update."""
        super().follow_shrinkage(shrinkage, pl_module)
        if self._importance is not None:
            self._importance.follow(shrinkage)

    def schedules(self) -> dict[str, Schedule]:
        """Those of the base, and rounds."""
        return {**SCHEDULES, "iterative": functools.partial(iterative_schedule, rounds=self.rounds)}

    def masks_stay(self, fraction: float) -> bool:
        """From the end of the schedule on."""
        return self._finished

    @property
    def moves_until_end(self) -> bool:
        """As far as pruned weights may come back."""
        return self.regrow

    @property
    def floored(self) -> bool:
        """With a pattern each group keeps its own."""
        return self._n_m is None

    def suited(self, weights: dict[str, nn.Parameter], pl_module: nn.Module) -> dict[str, nn.Parameter]:
        """All weights; with an n:m pattern those whose input channels divide into groups."""
        sites = sites_of(pl_module)
        self._input_dims = {name: _input_dim(sites[id(weight)]) for name, weight in weights.items()}
        if self._n_m is None:
            return weights
        m = self._n_m[1]
        if sharded_units(pl_module) and (split := [name for name, dim in self._input_dims.items() if dim == 0]):
            raise ValueError(
                f"pattern='{self.pattern}' groups the input channels of {listing(split)}, transposed convolutions, "
                "across the rows that FSDP2 splits over processes; leave them out with exclude="
            )
        fitting = {
            name: weight
            for name, weight in weights.items()
            if (dim := self._input_dims[name]) is not None and weight.shape[dim] % m == 0
        }
        self._skipped = [name for name in weights if name not in fitting]
        if not fitting:
            raise ValueError(
                f"pattern='{self.pattern}' fits none of the selected weights, {listing(self._skipped)}: their input "
                f"channels are no multiples of {m}"
            )
        if self._skipped:
            self._warn_once(f"pattern='{self.pattern}' does not fit {listing(self._skipped)}, which stay dense")
        return fitting

    def zeros_at(self, sparsity: float) -> int:
        """Rounded over all weights; over each with ``scope="layer"``; in whole groups with a pattern."""
        if self._n_m is not None:
            return self._groups(sparsity) * (self._n_m[1] - self._n_m[0])
        if self.scope == "layer":
            return sum(layer_zeros(self._sizes(), [sparsity] * len(self._sizes())))
        return super().zeros_at(sparsity)

    def new_masks(self, sparsity: float) -> list[Tensor] | None:
        """The smallest scores are pruned; what is pruned stays so, unless it may grow again."""
        masks = self._require_masks()
        zeros = max(self.zeros_at(sparsity), masks.zeros)
        if zeros == 0 or (zeros == masks.zeros and not self.regrow):
            return None
        scores = self._scores()
        if scores is None:
            return None
        kept = None if self.regrow else masks.current()
        if self._n_m is not None:
            n, m = self._n_m
            oriented = [self._oriented(name, score) for name, score in zip(masks.weights, scores, strict=True)]
            old = None if kept is None else [self._oriented(*pair) for pair in zip(masks.weights, kept, strict=True)]
            new = n_m_masks(oriented, n, m, zeros // (m - n), kept=old, parts=masks.parts)
            return [self._oriented(name, mask) for name, mask in zip(masks.weights, new, strict=True)]
        if self.scope == "global":
            return smallest_masks(scores, zeros, kept=kept, limits=masks.limits, parts=masks.parts)
        counts = self._counts(sparsity, zeros)
        return [
            smallest_masks([score], count, kept=None if kept is None else [kept[index]], parts=masks.parts)[0]
            for index, (score, count) in enumerate(zip(scores, counts, strict=True))
        ]

    def updated(self, changed: float, *, more: bool) -> None:
        """As the base; rewind, if there is training left."""
        super().updated(changed, more=more)
        if self._start is not None and changed > 0 and more:
            self._start.restore(self._trainer, self._require_controller().module)

    def intent(self, trainer: Any, pl_module: Any) -> Intent:
        """As the base; and the pattern."""
        intent = super().intent(trainer, pl_module)
        if self._n_m is None:
            return intent
        unfit = dict.fromkeys(layers_of(self._skipped), f"pattern {self.pattern} does not fit")
        return replace(intent, left={**intent.left, **unfit}, aims={**intent.aims, "pattern": self.pattern})

    def remarks(self) -> list[str]:
        """As the base; and what was skipped."""
        remarks = super().remarks()
        if self._masks is not None and self._skipped:
            remarks.append(f"{self.name}: pattern {self.pattern} does not fit {listing(self._skipped, None)}.")
        return remarks

    # Life cycle

    def forget(self) -> None:
        """With the scores and the start of training."""
        super().forget()
        self._importance = self._start = self._saved_start = None

    def go_on(self, state: dict[str, Any] | None) -> None:
        """With the scores and the start of training that were saved."""
        if state is not None and state["masks"]:
            for name, matters in (("pattern", self._n_m is not None), ("rewind", self.rewind is not None)):
                was, wanted = state["arguments"].get(name), getattr(self, name)
                if matters and was != wanted:
                    raise ValueError(
                        f"{name}={wanted!r} cannot go on from a checkpoint made with {was!r}: begin a new training"
                    )
        super().go_on(state)
        state = state or {}
        self._importance = self._start = None
        if self.score == "taylor":
            self._importance = TaylorScores(self._require_masks().weights)
            if "importance" in state:
                self._importance.load(state["importance"])
        self._saved_start = state.get("start")

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """As the base; look for steps from which Taylor scores would learn nothing."""
        super().attach(controller, stack, trainer, pl_module)
        if self.rewind == "weights":
            self._refuse_foreign(trainer, "rewinds optimizers, with rewind='weights'")
        self._announced.clear()
        every = [own for own in trainer.optimizers if isinstance(own, torch.optim.Optimizer)]  # Lightning takes others
        for optimizer in every if self.score == "taylor" else ():
            stack.enter_context(around_steps(optimizer, lambda own: None, self._check_announced))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep what is to be rewound to, then as the base."""
        if self.rewind is not None:
            if self.rewind == "lr" and not trainer.lr_scheduler_configs:
                raise ValueError("rewind='lr' has no effect: there is no learning-rate scheduler")
            self._start = TrainingStart(trainer, pl_module, weights=self.rewind == "weights")
            self._start.state, self._saved_start = self._saved_start or self._start.state, None
        super().on_train_start(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Add up Taylor scores, from gradients that are not clipped yet."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self._announced.add(id(optimizer))
        if self._importance is not None and not self._finished:
            self._importance.add(parameters_of(optimizer), scale=loss_scale(trainer, optimizer))

    def extra_state(self) -> dict[str, Any]:
        """The masks; Taylor scores since the last update; the start of training if it is rewound to."""
        state = super().extra_state()
        if self._importance is not None:
            state["importance"] = self._importance.state()
        start = self._saved_start if self._start is None else self._start.state
        if start is not None:
            state["start"] = start
        return state

    # Private

    def _check_announced(self, optimizer: torch.optim.Optimizer) -> None:
        """Complain about a step of masked weights whose gradients were not seen."""
        announced = id(optimizer) in self._announced
        self._announced.discard(id(optimizer))
        if announced or self._finished or self._progress is None:  # a state that is restored may be made by a step
            return
        if self not in self._trainer.callbacks:  # LearningRateFinder sets all aside
            return
        if holders([optimizer], [own for own in self._require_masks().weights.values() if own.grad is not None]):
            self._refuse_passing_by()

    def _check_together(self) -> None:
        """Refuse arguments that contradict each other, or would have no effect."""
        if self.regrow and self.score != "magnitude":
            raise ValueError(
                f"regrow=True needs score='magnitude', got '{self.score}': a pruned weight has no other score"
            )
        if self._n_m is not None and self.scope != "global":
            raise ValueError(
                f"scope='{self.scope}' has no effect with pattern='{self.pattern}', which prunes each layer alike"
            )
        if self.score != "random":
            tell_without_effect(self, PruningCallback, f"score='{self.score}'", seed=self.seed)
        if self.schedule != "iterative":
            tell_without_effect(self, PruningCallback, f"schedule={shown(self.schedule)}", rounds=self.rounds)
        if self.schedule == "one_shot" and not self.regrow:
            because = "schedule='one_shot', as nothing changes after start"
            tell_without_effect(self, PruningCallback, because, update_interval=self.update_interval)
        if self.score == "taylor" and self.schedule == "one_shot" and self.start == 0:
            raise ValueError(
                "score='taylor' needs gradients, and schedule='one_shot' with start=0 prunes before the first step"
            )
        if self.rewind is None:
            return
        check_choice("rewind", self.rewind, REWINDS)
        if self.schedule not in ("one_shot", "iterative"):
            raise ValueError(f"rewind needs schedule='one_shot' or 'iterative', got {self.schedule!r}")
        argument, at = self.reached_at
        if at == 1:
            raise ValueError(
                f"rewind needs {argument} below 1: after the last rewinding there would be no training left"
            )
        if self.schedule == "one_shot" and self.start == 0:
            raise ValueError(
                "rewind has no effect with schedule='one_shot' and start=0: pruning is at the start itself"
            )

    def _sizes(self) -> list[int]:
        return [weight.numel() for weight in self._require_masks().weights.values()]

    def _groups(self, sparsity: float) -> int:
        """How many groups are n:m at a sparsity."""
        n, m = self._n_m or (1, 1)
        return layer_zeros([self._require_masks().total // m], [min(sparsity / (1 - n / m), 1.0)])[0]

    def _counts(self, sparsity: float, zeros: int) -> list[int]:
        """How many weights each tensor loses, never fewer than it has lost."""
        masks, sizes = self._require_masks(), self._sizes()
        if zeros == masks.zeros:  # a schedule that falls
            return masks.counts
        if self.scope == "erk":
            shares = erk_sparsities([weight.shape for weight in masks.weights.values()], zeros / masks.total)
            counts = layer_zeros(sizes, shares, total=zeros, limits=masks.limits)
        else:
            counts = layer_zeros(sizes, [sparsity] * len(sizes), limits=masks.limits)
        return counts if self.regrow else _at_least(counts, masks.counts)

    def _scores(self) -> list[Tensor] | None:
        """What is compared, larger for what is kept; None if nothing is known yet."""
        masks = self._require_masks()
        if self.score == "random":
            generator = torch.Generator().manual_seed(self.seed)  # the same draws in each process
            return [rows_of(random_score(weight, generator), weight) for weight in masks.weights.values()]
        if self._importance is not None:
            return self._importance.take()
        return masks.values()

    def _oriented(self, name: str, tensor: Tensor) -> Tensor:
        """With the input channels in dimension 1, where a transposed convolution has them in dimension 0."""
        return tensor.transpose(0, 1) if self._input_dims[name] == 0 else tensor


def _parsed(pattern: Any) -> tuple[int, int] | None:
    """The two numbers of "n:m"; None for "unstructured"."""
    if isinstance(pattern, int) and not isinstance(pattern, bool) and 60 < pattern < 60**2:
        pattern = f"{pattern // 60}:{pattern % 60}"  # YAML 1.1 reads numbers with a colon in base 60
    text = pattern if isinstance(pattern, str) else ""
    if text == "unstructured":
        return None
    match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", text)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(
            f"pattern must be 'unstructured' or 'n:m' with 0 < n < m, such as '2:4', got {shown(pattern)}"
            f"{did_you_mean(text, ['unstructured'])}"
        )
    return int(match[1]), int(match[2])


def _sparsity(sparsity: float | None, pattern: str, n_m: tuple[int, int] | None) -> float:
    """The sparsity that was asked for, or that the pattern has."""
    if n_m is None:
        if sparsity is None:
            raise ValueError("sparsity must be a number in [0, 1) with pattern='unstructured', got None")
        return sparsity
    own = 1 - n_m[0] / n_m[1]
    if sparsity is None:
        return own
    check_fraction("sparsity", sparsity)
    if abs(sparsity - own) > 1e-9:
        raise ValueError(f"pattern='{pattern}' has the sparsity {own}; sparsity must be that or None, got {sparsity}")
    return own


def _input_dim(sites: Sequence[Any]) -> int | None:
    """The dimension of a weight that counts input channels; None where there is none."""
    module = sites[0].module
    if isinstance(module, nn.Embedding):
        return None
    return 0 if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)) else 1


def _at_least(counts: Sequence[int], floors: Sequence[int]) -> list[int]:
    """The same total, with no count below its floor: what some get more, others that have more get less."""
    raised = [max(count, floor) for count, floor in zip(counts, floors, strict=True)]
    excess = sum(raised) - sum(counts)
    for index, floor in enumerate(floors):
        taken = min(excess, raised[index] - floor)
        raised[index] -= taken
        excess -= taken
    return raised
