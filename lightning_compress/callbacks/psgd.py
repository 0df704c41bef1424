"""Position-based scaled gradients: weights gather at the points of the grid that quantisation will use.

Kim, Yoo & Kwak, "Position-based Scaled Gradient for Model Quantization and Pruning", NeurIPS 2020, arXiv:2005.11035.
Each gradient becomes ``grad * lambda_s * (|w - wbar| + eps)``, before weight decay and momentum. The authors' code
follows the range of the weights by an exponential average; here the grid is that of the weights as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_compress import _compat
from lightning_compress.callbacks.arguments import (
    check_at_least_zero,
    check_choice,
    check_edge_bits,
    check_flag,
    check_layers,
    check_positive,
    default_of,
    edge_bits_of,
    is_auto,
    tell_without_effect,
)
from lightning_compress.callbacks.base import CompressionCallback, log
from lightning_compress.callbacks.intents import Intent, layers_of, left_out
from lightning_compress.callbacks.returned import Returned
from lightning_compress.callbacks.validating import SecondValidation, own_names
from lightning_compress.functional.quantizers import check_bits
from lightning_compress.mechanisms.controller import StepController
from lightning_compress.mechanisms.optimizers import Way, repeats_steps, way_of
from lightning_compress.mechanisms.order import call_order
from lightning_compress.mechanisms.owned import parameters_of
from lightning_compress.mechanisms.scaled_steps import ScaledSteps
from lightning_compress.mechanisms.selection import listing
from lightning_compress.mechanisms.sharding import shards_in_place
from lightning_compress.mechanisms.states import Each
from lightning_compress.mechanisms.warping import EDGES, Summary, WarpedWeights, edge_layers, warpable_weights
from lightning_compress.mechanisms.weights import named_weights
from lightning_compress.mechanisms.wrapping import shadowed
from lightning_compress.report.pictures import report_picture
from lightning_compress.report.positions import LayerPositions, position_histogram, positions_picture
from lightning_compress.report.table import Picture

Granularity = Literal["tensor", "channel"]
Target = Literal["grid", "zero"]
ApplyTo = Literal["auto", "gradient", "update"]

SETTLING = (
    "bits",
    "gradient_scale",
    "mean_factor",
    "granularity",
    "target",
    "eps",
    "edge_bits",
    "layers",
    "exclude",
)
"""Arguments on which what is found at the start depends: with others it is found anew."""
GROWN = 10.0  # times the mean distance at the first step: more is worth a warning
NOTHING: Mapping[str, Any] = MappingProxyType({})


class PSGDCallback(CompressionCallback):
    """Scale each gradient by the distance of its weight to the grid, so that weights gather on the grid.

    When it acts: before each optimizer step, on gradients that are reduced, accumulated and unscaled, but not clipped
    yet; weight decay and momentum come after it. Optimizers that divide by a running size of the gradients, as Adam
    does, would cancel the scale, so with them it scales what they add to the weights. What it leaves alone: forward
    passes, the loss, names and values in the ``state_dict``: the network is trained, validated and saved in full
    precision, and the same weights can be rounded to ``bits``.

    Logged are, at the Trainer's ``log_every_n_steps``, ``compress/<name>/scale`` (the mean factor over all elements),
    ``lambda``, ``quantization_error`` (``||w - wbar|| / ||w||``) and ``sparsity`` (of the quantised weights); and in
    each validation the module's own metrics with quantised weights, ``compress/<name>/val_<metric>``.

    Args:
        bits: Of the grid that the weights shall fit, 2 to 8.
        gradient_scale: "auto": one lambda for all tensors, with which the mean factor over all of their elements is
            ``mean_factor`` at the first step, and which stays; or a number: the authors' ``lambda_s``.
        granularity: A grid for each "tensor", or for each output "channel" (entry of dimension 0; biases have one).
        target: "grid", or "zero": the factor is then ``|w| + eps``, and weights gather at zero, to be pruned.
        eps: Added to each distance, at least 0; positive for "zero". With 0, a weight on the grid stays there.
        edge_bits: Of the first and the last layer. "auto": 8 where ``bits`` is below 4, else ``bits``. None: ``bits``.
        mean_factor: What "auto" aims at, positive: a larger step for the average weight.
        apply_to: Scale the "gradient" or the "update" of the optimizer; "auto": what its kind asks for.
        quantized_validation: Whether to validate once more, on the CPU, with quantised weights.
        layers: Selectors of layers, as for ``PruningCallback``. None: the weights of all convolutions and linear
            layers, and the biases of linear layers. Layers that are named may be others too, such as attention.
        exclude: Selectors of what is left out.
        name: As in the base class; default "psgd".

    Attributes:
        picture: After a fit on rank 0: where weights lay in the cells of their grids at its start and at its end, an
            image (height, width, 3).

    Raises:
        ValueError: If an argument is out of its range, or two contradict each other.

    Example:
        >>> import lightning.pytorch as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> module, psgd = BoringModel(), PSGDCallback(bits=4)
        >>> L.Trainer(max_steps=4, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[psgd],
        ...           enable_model_summary=False, enable_checkpointing=False).fit(module)
        >>> step, bits = psgd.grids["layer.weight"]
        >>> bool(step == module.layer.weight.abs().max() / 7), bits
        (True, 4)
    """

    default_name = "psgd"
    holds: ClassVar[Mapping[str, Any]] = {
        "lambda": (float, None),
        "first_mean": (float, None),
        "bits": Each(int),
        "start": Each(Tensor),
    }
    effect = "the scaled step"

    lambda_s = Returned[float | None](None)
    """The scale that all factors share; None before the first step."""
    picture = Returned[npt.NDArray[np.uint8] | None](None)
    _bits = Returned[Mapping[str, int]](NOTHING)
    """Name of each weight that is scaled to the bits of its grid, once they are settled."""
    _first_mean = Returned[float | None](None)
    """The mean distance at the first step."""
    _start = Returned[Mapping[str, Tensor]](NOTHING)
    """Histograms of positions when the training began."""
    _last_grids = Returned[Mapping[str, tuple[Tensor, int]]](NOTHING)

    def __init__(
        self,
        bits: int = 4,
        *,
        gradient_scale: float | Literal["auto"] = "auto",
        granularity: Granularity = "tensor",
        target: Target = "grid",
        eps: float = 0.0,
        edge_bits: int | Literal["auto"] | None = "auto",
        mean_factor: float = 3.0,
        apply_to: ApplyTo = "auto",
        quantized_validation: bool = True,
        layers: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.bits, self.edge_bits = check_bits(bits), check_edge_bits(edge_bits)
        self.gradient_scale: Any = "auto"
        if not is_auto(gradient_scale):
            self.gradient_scale = check_positive("gradient_scale", gradient_scale, "'auto' or a positive number")
        self.mean_factor = check_positive("mean_factor", mean_factor)
        if self.gradient_scale != "auto" and self.mean_factor != default_of(PSGDCallback, "mean_factor"):
            raise ValueError(f"mean_factor={mean_factor} has no effect: gradient_scale={gradient_scale} is fixed")
        check_choice("granularity", granularity, get_args(Granularity))
        check_choice("target", target, get_args(Target))
        check_choice("apply_to", apply_to, get_args(ApplyTo))
        check_layers(layers, exclude)
        self.eps = check_at_least_zero("eps", eps)
        if target == "zero" and eps == 0:
            raise ValueError(
                "target='zero' needs a positive eps, such as eps=1e-3: a weight that is 0 would stay so for ever with "
                "eps=0"
            )
        if target == "zero":
            tell_without_effect(
                self,
                PSGDCallback,
                "target='zero', which has no grid",
                bits=self.bits,
                edge_bits=self.edge_bits,
                granularity=granularity,
            )
        self.granularity, self.target, self.apply_to = granularity, target, apply_to
        self.quantized_validation = check_flag("quantized_validation", quantized_validation)
        self.layers, self.exclude = layers, exclude
        self._warped: WarpedWeights | None = None
        self._candidates: dict[str, nn.Parameter] = {}  # the weights that were selected
        self._loaded: dict[str, Any] | None = None  # state of a checkpoint that is resumed, until the fit starts
        self._tested: nn.Module | None = None  # the module, while it is not fitted
        self._settled = False  # whether bits and scale are known
        self._order: list[nn.Module] = []  # in which layers are called, as far as it was watched
        self._watching = ExitStack()
        self._frozen: list[str] = []
        self._unheld: list[str] = []  # weights that no optimizer has
        self._left: list[str] = []  # weights that were not selected
        self._steps: ScaledSteps | None = None  # during a fit
        self._told = 0  # how many optimizers had stepped when it was told what these did not reach
        self._to_log: dict[str, float] = {}
        self._second: SecondValidation | None = None
        self._end: tuple[float, Summary | None] | None = None  # mean distance, and what rounding does, after the fit

    # What users read

    @property
    def grids(self) -> dict[str, tuple[Tensor, int]]:
        """Name of each weight to the step of its grid, ``max|w| / (2^(bits-1) - 1)`` now, and its bits.

        The step is of 0 dimensions, or of shape ``(C,)`` with ``granularity="channel"``. With ``target="zero"`` there
        are none, and none before the first step. Where FSDP2 shards the weights, all ranks have to ask during the fit.
        """
        warped = self._warped
        if warped is None or not self._bits or (warped.ranks.several and self._last_grids):
            return dict(self._last_grids)
        return warped.grids()

    @property
    def trained_steps(self) -> dict[str, tuple[Tensor, int]]:
        """Those of the grids."""
        return self.grids

    @property
    def weight_bits_given(self) -> int | None:
        """Those of the grid; None where weights are drawn to zero."""
        return self.bits if self.target == "grid" else None

    def intent(self, trainer: Any, pl_module: Any) -> Intent:
        """Which weights it draws to which grid, and what it scales for that."""
        warped = self._require_warped()
        takes = layers_of(warped.weights)
        left = left_out(pl_module, self._left, self.exclude)
        left |= dict.fromkeys(layers_of(self._frozen), "frozen")
        left |= dict.fromkeys(layers_of(self._unheld), "no optimizer has it")
        aims = {"bits": self.bits, "edge_bits": self._edge_bits()} if self.target == "grid" else {"target": "zero"}
        return Intent(
            type(self).__name__,
            takes,
            {layer: reason for layer, reason in left.items() if layer not in takes},
            warped.total,
            {aim: value for aim, value in aims.items() if value is not None},
            notes=tuple(self._way_of(optimizer) for optimizer in trainer.optimizers),
        )

    def foresee(self, trainer: Any, pl_module: Any) -> None:
        """Settle what the first optimizer step would settle, and look at what it would reach."""
        self._settle(self._require_steps())
        self._tell_unreached([name for name, own in self._require_warped().weights.items() if own.grad is None])
        for optimizer in trainer.optimizers:
            self._require_steps().way(optimizer)

    def remarks(self) -> list[str]:
        """How strong the scale was, and what quantisation makes of the weights."""
        warped = self._warped
        if warped is None or self._end is None or self.lambda_s is None or self._first_mean is None:
            return []
        mean, summary = self._end
        factors = f"{self.lambda_s * self._first_mean:.3g} at the first step, {self.lambda_s * mean:.3g} at the end"
        remarks = [f"{self.name}: lambda = {self.lambda_s:.6g}; mean factor {factors}."]
        if self._left:
            remarks.append(f"{self.name}: left as they are: {listing(self._left)}.")
        if warped.bits is not None and summary is not None:
            remarks.append(
                f"{self.name}: rounded to {_listed_bits(warped.bits)}, {summary.zeros:,} of {summary.total:,} weights "
                f"({summary.zeros / summary.total:.2%}) are 0, and the relative error is {summary.error:.4f}."
            )
        return remarks

    def pictures(self) -> list[Picture]:
        """Where the weights lay between the points of their grids, at the start and at the end."""
        if self.picture is None:
            return []
        legend = "Histograms of each weight's elements: grey at the start of the training, blue at its end."
        return [report_picture(f"{self.name}: where the weights have gone", legend, self.picture)]

    # Life cycle

    def enter(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Know whose weights a checkpoint is about."""
        self._loaded, self._tested = None, None if stage == "fit" else pl_module
        self._bind()

    def leave(self) -> None:
        """As the base; forget whose weights a checkpoint is about."""
        super().leave()
        self._tested = None

    def problem_with_shards(self) -> str | None:
        """None: each rank scales the gradients of its own rows, by the grids of whole weights."""
        return None

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Say what tuners measure."""
        self._tell_of_tuners(trainer)

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """Select the weights, and get between gradients and optimizers."""
        super().attach(controller, stack, trainer, pl_module)
        self._refuse_foreign(trainer, "follows the steps of optimizers")
        self._candidates = self._selected(trainer, pl_module)
        if self.layers is None:
            self._refuse_separate(trainer, self._candidates)
        self._refuse_others(trainer, self._candidates)
        self._begin(trainer, pl_module)
        stack.callback(self._watching.close)
        stack.callback(setattr, self, "_steps", None)
        stack.enter_context(shadowed(pl_module, "on_before_optimizer_step", self._scaling))
        if self.quantized_validation and self.target == "grid" and not getattr(trainer, "barebones", False):
            self._second = SecondValidation("quantised weights", "quantized_validation=False", self._warn_once)
            stack.callback(setattr, self, "_second", None)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """From here on optimizers step; what was called in the sanity check is no order of the training step."""
        self._order.clear()
        if self._stack is not None:  # FSDP2 steps optimizers to restore their states, and does so within the fit
            self._stack.enter_context(self._require_steps().attached(trainer.optimizers))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse weights that were replaced; say so if some are trained by now that were frozen when the fit began."""
        shards_in_place(pl_module)
        present = named_weights(pl_module)
        if replaced := [name for name, own in self._require_warped().weights.items() if present.get(name) is not own]:
            raise RuntimeError(
                f"{listing(replaced)} are not the weights any more that '{self.name}' scales: they were replaced since "
                "the fit began; do so before it, or leave their layers out with exclude="
            )
        if freed := [name for name in self._frozen if name in present and present[name].requires_grad]:
            self._warn_once(
                f"{listing(freed)} were frozen when the fit began, so they were left out, and are trained now without "
                "scaling; begin another fit once they are not frozen"
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """As the base; complain about weights that the first step did not reach, and log."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        steps = self._require_steps()
        self.effects[self.effect] = steps.taken
        if steps.optimizers > self._told:
            self._told = steps.optimizers
            self._tell_unreached(steps.unreached)
        for quantity, value in self._to_log.items():
            self.log_quantity(quantity, value, batch_size=1)
        self._to_log = {}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """As the base; after an epoch in which weights moved, complain if no optimizer stepped."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.has_moved(pl_module) and not self._require_steps().optimizers:
            self._refuse_passing_by()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """At the first batch, when averages have put their weights in: copy what is validated, quantised."""
        if batch_idx or dataloader_idx or not self._validates(trainer):
            return
        warped = self._require_warped()
        shards_in_place(pl_module)
        names = {id(weight): name for name, weight in warped.weights.items()}
        own = {name: names.get(id(weight)) for name, weight in named_weights(pl_module).items()}

        def quantised(name: str, value: Tensor) -> Tensor:
            mine = own[name]
            return value if mine is None else warped.quantised(mine, value)

        if not math.isfinite(warped.mean()):
            self._warn_once("the weights hold NaN or infinity, so they are not validated as quantised ones")
        elif self._second is not None:
            views = self._require_controller().weights
            views.refresh()  # of masks, whose callback may come later in the list
            with self._unseen(trainer, pl_module):
                self._second.begin(trainer, pl_module, quantised, views.sharded.rows_seen)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Validate the quantised copy, and log its metrics under this callback's name."""
        if self._second is None or not self._validates(trainer):
            return
        with self._unseen(trainer, pl_module):
            found = own_names(self._second.metrics(trainer, pl_module))
        for metric, value in found.items():
            self.log_quantity(metric, value, batch_size=1, validation=True)

    def estimate_statistics(self, trainer: Any, pl_module: Any) -> None:
        """Draw where the weights have ended, now that all who change them have done so."""
        warped = self._warped
        if warped is None or not self._settled:
            self._warn_once("no training step was run, so no gradient was scaled")
            return
        mean = warped.mean()
        if not math.isfinite(mean):
            self._end = mean, None
            self._warn_once("the weights hold NaN or infinity")
            return
        self._end = mean, warped.summary()
        self._last_grids = {name: (step.cpu(), bits) for name, (step, bits) in warped.grids().items()}
        end = self._histograms() if self._start else {}
        if not trainer.is_global_zero or not end:
            return
        bits = dict.fromkeys(end) if warped.bits is None else warped.bits
        self.picture = positions_picture(
            [LayerPositions(name, bits[name], self._start[name], end[name]) for name in end if name in self._start]
        )
        self.tracker(trainer).picture(f"compress/{self.name}/positions", self.picture, newest=True)

    def extra_state(self) -> dict[str, Any]:
        """The scale, the bits of each weight, and where weights began."""
        return {
            "lambda": self.lambda_s,
            "first_mean": self._first_mean,
            "bits": dict(self._bits),
            "start": dict(self._start),
        }

    def flaw(self, state: Mapping[str, Any]) -> str | None:
        """As the base; each weight that has a histogram has bits."""
        lost = (f"'bits.{name}' is missing" for name in state["start"] if name not in state["bits"])
        return super().flaw(state) or next(lost, None)

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Keep it until the fit starts, when the weights are known; where it has started, go on from it."""
        if self._tested is not None:
            self._take(state)
            self._bind()
            return
        self._loaded = state
        if self._controller is not None:  # FSDP2 restores a fit that has begun
            self._begin(self._trainer, self._controller.module)

    # Private

    def _begin(self, trainer: Any, pl_module: nn.Module) -> None:
        """Go on from the state that was loaded, or with the last fit, or begin anew."""
        self._watching.close()
        weights = self._candidates
        bits = self._continued(trainer, weights)
        if bits is None:
            self.lambda_s, self._first_mean, self._bits, self._start = None, None, {}, {}
            bits = dict.fromkeys(weights, self.bits)
        goes_on = self.lambda_s is not None
        self.picture, self._last_grids, self._end = None, {}, None
        self._warped = self._warp({name: weights[name] for name in bits}, bits)
        if not goes_on:
            self._leave_out_resting()
        self._settled, self._order, self._to_log, self._told = goes_on, [], {}, 0
        if not goes_on and self._edge_bits() is not None and not _compat.holds_compiled_code(pl_module):
            layers = [module for module in pl_module.modules() if isinstance(module, EDGES)]
            self._order = self._watching.enter_context(call_order(layers))
        way = None if self.apply_to == "auto" else self.apply_to
        self._steps = ScaledSteps(self._warped, way=way, told=self._tell_way, passed_by=self._refuse_passing_by)
        self._steps.scale = self.lambda_s or 1.0

    def _scaling(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The module's hook: after those of all callbacks, which see the gradients of the loss, before clipping."""

        def on_before_optimizer_step(optimizer: torch.optim.Optimizer) -> Any:
            steps = self._require_steps()
            if steps.has_work(optimizer):
                self._settle(steps)
                if self._logs_now(steps):
                    self._measure(steps.scale)
                steps.prepare(optimizer)
            return original(optimizer)

        return on_before_optimizer_step

    def _way_of(self, optimizer: torch.optim.Optimizer) -> str:
        """In words, what is scaled of an optimizer."""
        kind, way = type(optimizer).__name__, way_of(optimizer)
        if way == "update" and self.apply_to == "gradient":
            return f"{kind} is adaptive and cancels the scale of its gradients: give apply_to='auto'"
        if way == "update":
            return f"{kind} is adaptive and would cancel a scale of its gradients: its updates are scaled instead"
        if self.apply_to == "update":
            return f"the updates of {kind} are scaled"
        return f"the gradients that {kind} gets are scaled"

    def _tell_way(self, optimizer: torch.optim.Optimizer, way: Way | None) -> None:
        kind = type(optimizer).__name__
        if way is None:
            self._warn_once(
                f"{kind} is not known here, so its gradients are scaled; if it divides by a running size of the "
                "gradients, as Adam does, that cancels the scale: then give apply_to='update', else "
                "apply_to='gradient' to say that it is right"
            )
        elif way == "update":
            log.info(
                "%s: %s divides by a running size of the gradients, which would cancel their scale, so what it adds to "
                "the weights is scaled instead",
                self.name,
                kind,
            )

    def _selected(self, trainer: Any, pl_module: nn.Module) -> dict[str, nn.Parameter]:
        """The weights that can be scaled, by name."""
        for optimizer in trainer.optimizers:
            if repeats_steps(optimizer):
                raise ValueError(
                    f"{type(self).__name__} '{self.name}' cannot work with LBFGS, which builds its step from gradients "
                    "that belong together; use another optimizer"
                )
        weights, self._left, idle = warpable_weights(pl_module, self.layers, self.exclude)
        if self._left:
            log.info("%s leaves as they are: %s; layers= takes them in", self.name, listing(self._left, most=None))
        if idle:
            self._warn_once(f"exclude={idle} leaves out nothing that was selected")
        self._frozen = [name for name, weight in weights.items() if not weight.requires_grad]
        if len(self._frozen) == len(weights):
            raise ValueError(f"layers={self.layers} selects only frozen weights, {listing(self._frozen)}")
        if self._frozen:
            log.info("%s leaves out what is frozen: %s", self.name, listing(self._frozen, most=None))
        held = {id(parameter) for parameter in parameters_of(*trainer.optimizers)}
        free = {name: weight for name, weight in weights.items() if weight.requires_grad}
        lost = self._unheld = [name for name, weight in free.items() if id(weight) not in held]
        if len(lost) == len(free):
            raise ValueError(
                f"no optimizer has any of the selected weights, {listing(lost)}: choose others with layers=, or let "
                "configure_optimizers return one that has them"
            )
        if lost:
            self._warn_once(f"no optimizer has {listing(lost)}, so they are left out; exclude= says so without warning")
        return {name: weight for name, weight in free.items() if id(weight) in held}

    def _refuse_others(self, trainer: Any, weights: Mapping[str, nn.Parameter]) -> None:
        """Refuse what another callback of this kind scales already."""
        mine = {id(weight): name for name, weight in weights.items()}
        for other in trainer.callbacks:
            if other is self or not isinstance(other, PSGDCallback) or other._controller is None:
                continue
            theirs = other._require_warped().weights.values()
            if both := [mine[id(weight)] for weight in theirs if id(weight) in mine]:
                raise ValueError(
                    f"'{other.name}' and '{self.name}' both scale {listing(both)}; leave them to one of the two with "
                    "layers= or exclude="
                )

    def _continued(self, trainer: Any, weights: Mapping[str, nn.Parameter]) -> dict[str, int] | None:
        """The bits of an earlier part of this training, whose scale is kept too; None if it begins here."""
        state, self._loaded = self._loaded, None
        if state is None:
            old = {} if self._warped is None else self._warped.weights
            same = bool(old) and all(weights.get(name) is weight for name, weight in old.items())
            state = self.state_dict() if same and trainer.global_step > 0 else None
        if state is None or state["lambda"] is None or not set(state["bits"]) <= set(weights):
            return None
        now = self._arguments()
        if any(state["arguments"].get(name, now[name]) != now[name] for name in SETTLING):
            return None
        self._take(state)
        return dict(state["bits"])

    def _take(self, state: dict[str, Any]) -> None:
        self.lambda_s, self._first_mean = state["lambda"], state["first_mean"]
        self._bits, self._start = state["bits"], state["start"]

    def _warp(self, weights: Mapping[str, nn.Parameter], bits: Mapping[str, int]) -> WarpedWeights:
        grid = self.target == "grid"
        return WarpedWeights(
            weights, bits if grid else None, by_channel=grid and self.granularity == "channel", eps=self.eps
        )

    def _bind(self) -> None:
        """Let the grids be those of a module that is only tested."""
        weights = {} if self._tested is None else named_weights(self._tested)
        if self._bits and set(self._bits) <= set(weights):
            self._warped = self._warp({name: weights[name] for name in self._bits}, self._bits)

    def _leave_out_resting(self) -> None:
        """Refuse weights of which every element is on the grid; biases of that kind are left to the optimizer."""
        warped = self._require_warped()
        resting = warped.resting()
        if fixed := [name for name in resting if warped.weights[name].ndim > 1]:
            raise ValueError(
                f"all elements of {listing(fixed)} lie on the grid of {self.bits} bits, as those of one magnitude do, "
                "so none of them would ever get a gradient: give a positive eps=, other values at the start, or leave "
                "the layers out with exclude="
            )
        if resting:
            self._warn_once(
                f"all elements of {listing(resting)} lie on the grid, as zeros do, and would never move; these biases "
                "are left out, and learn without scaling; a positive eps= takes them in"
            )
            rest = {name: weight for name, weight in warped.weights.items() if name not in resting}
            self._warped = self._warp(rest, dict.fromkeys(rest, self.bits))

    def _edge_bits(self) -> int | None:
        """Of first and last layer, where they are others than those of the rest."""
        bits = None if self.target == "zero" else edge_bits_of(self.edge_bits, self.bits)
        return None if bits == self.bits else bits

    def _settle(self, steps: ScaledSteps) -> None:
        """At the first step: find out which layers are first and last, and how strong the scale is."""
        if self._settled:
            return
        self._settled = True
        self._watching.close()
        warped = steps.warped
        if (edge_bits := self._edge_bits()) is not None:
            self._widen_edges(warped, edge_bits)
        mean = warped.mean()
        if not 0 < mean < math.inf:
            raise ValueError(f"the mean distance of the weights to where they should end is {mean}")
        steps.scale = self.mean_factor / mean if self.gradient_scale == "auto" else float(self.gradient_scale)
        self.lambda_s, self._first_mean = steps.scale, mean
        self._bits = dict(warped.bits or dict.fromkeys(warped.weights, self.bits))
        self._start = self._histograms()
        log.info(
            "%s scales %s (%s elements): lambda = %.6g, a mean factor of %.3g",
            self.name,
            listing(list(warped.weights), most=None),
            f"{warped.total:,}",
            steps.scale,
            steps.scale * mean,
        )

    def _widen_edges(self, warped: WarpedWeights, edge_bits: int) -> None:
        """Give the first and the last layer their own bits."""
        edges = edge_layers(self._require_controller().module, self._order)
        chosen = {id(parameter) for _, layer in edges for parameter in layer.parameters(recurse=False)}
        warped.bits = {name: edge_bits if id(own) in chosen else self.bits for name, own in warped.weights.items()}
        log.info(
            "%s gives %d bits to the first and the last layer %s: %s",
            self.name,
            edge_bits,
            "that the network calls" if self._order else "in the order of registration",
            listing([name for name, _ in edges]),
        )
        if self.bits not in warped.bits.values():
            self._warn_once(
                f"bits={self.bits} has no effect: all of the selected layers are first or last, and have {edge_bits} "
                "bits; edge_bits=None gives them the same"
            )

    def _tell_unreached(self, names: Sequence[str]) -> None:
        """Complain about weights without a gradient in the first step of their optimizer."""
        if len(names) == len(self._require_warped().weights):  # each of them is in an optimizer
            raise RuntimeError(
                f"{type(self).__name__} '{self.name}' had no effect: no gradient came to any of the selected weights, "
                f"{listing(names)}; choose others with layers="
            )
        if names:
            self._warn_once(
                f"no gradient came to {listing(names)} in the first step of their optimizer; what belongs to another "
                "task is left out with exclude="
            )

    def _logs_now(self, steps: ScaledSteps) -> bool:
        """Whether the Trainer logs what belongs to the coming step; and at the first."""
        every = self._trainer.log_every_n_steps
        if not every or getattr(self._trainer, "barebones", False):
            return False
        return steps.optimizers == 0 or (self._trainer.global_step + 1) % every == 0

    def _measure(self, scale: float) -> None:
        warped = self._require_warped()
        mean = warped.mean()
        self._to_log = {"scale": scale * mean, "lambda": scale}
        first = self._first_mean
        if first is not None and mean > GROWN * first:
            self._warn_once(
                f"the mean factor has grown from {scale * first:.3g} to {scale * mean:.3g} since the first step, as "
                "the weights have: steps are that much larger, and may diverge; begin with a trained network, or give "
                "a smaller learning rate, mean_factor= or gradient_scale=",
                "grown",
            )
        if warped.bits is not None and math.isfinite(mean):
            summary = warped.summary()
            self._to_log["quantization_error"] = summary.error
            self._to_log["sparsity"] = summary.zeros / summary.total

    def _histograms(self) -> dict[str, Tensor]:
        """Of the positions of each weight; biases are few numbers."""
        warped = self._require_warped()
        return {
            name: warped.ranks.total(position_histogram(warped.positions(name), weight.numel()))
            for name, weight in warped.weights.items()
            if weight.ndim > 1
        }

    def _validates(self, trainer: Any) -> bool:
        """Whether this validation is followed by one of the quantised network."""
        return self._second is not None and self._second.possible and self._settled and not trainer.sanity_checking

    def _require_steps(self) -> ScaledSteps:
        if self._steps is None:
            raise RuntimeError(f"{type(self).__name__} is only active during a fit")
        return self._steps

    def _require_warped(self) -> WarpedWeights:
        if self._warped is None:
            raise RuntimeError(f"{type(self).__name__} has no weights before a fit")
        return self._warped


def _listed_bits(bits: Mapping[str, int]) -> str:
    return " and ".join(f"{own}" for own in sorted(set(bits.values()))) + " bits"
