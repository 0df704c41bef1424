"""Dynamic collective intelligence learning: kept weights learn from the pruned network, pruned ones from the dense one.

Kim, Yoo, Song, Yoo & Kwak, "Dynamic Collective Intelligence Learning: Finding Efficient Sparse Model via Refined
Gradients for Pruned Weights", 2021, arXiv:2109.04660. With ``Wbar = M * W`` the step is
``W <- W - lr * (M * grad L(Wbar) + (1 - M) * grad L(W))``, and later each network also learns from the other's output.

Two departures from the authors' code. It prunes one weight more than asked, the one at the threshold. And it starts the
dense path's classifier from random numbers of its own; here it is a copy, so that a trained network can begin.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_compress import _compat
from lightning_compress import functional as F
from lightning_compress.callbacks.arguments import (
    check_choice,
    check_dimension,
    check_fraction,
    check_locator,
    check_names,
    check_positive,
    shown,
    tell_without_effect,
)
from lightning_compress.callbacks.base import log, optimises_automatically
from lightning_compress.callbacks.dynamic import DynamicMaskCallback
from lightning_compress.callbacks.intents import Intent
from lightning_compress.callbacks.masked import MaskedWeightsCallback
from lightning_compress.callbacks.returned import Returned
from lightning_compress.functional.schedules import Schedule
from lightning_compress.mechanisms.capture import CaptureError
from lightning_compress.mechanisms.controller import StepController
from lightning_compress.mechanisms.densepath import OwnLayers, classifiers_named, last_layer, norms_of
from lightning_compress.mechanisms.masking import DenseWeight
from lightning_compress.mechanisms.outputs import Locator, class_dimension, find_logits
from lightning_compress.mechanisms.owned import OwnedParameters, holders, parameters_of, refuse_lbfgs, separate_networks
from lightning_compress.mechanisms.passes import Pass, Term, View
from lightning_compress.mechanisms.saved_optimizers import flaw_of_owned
from lightning_compress.mechanisms.selection import check_selectors, listing
from lightning_compress.mechanisms.sharding import class_name, is_shard, shards_in_place
from lightning_compress.mechanisms.shrinking import Shrinkage
from lightning_compress.mechanisms.stages import LayerOutput, record_outputs
from lightning_compress.mechanisms.standins import leaves_of, leaves_of_both, scratch, standing_in, unlearning
from lightning_compress.mechanisms.states import Sometimes
from lightning_compress.mechanisms.weights import NORMS, named_weights

DENSE_PATHS = ("own", "own_norm", "shared")
DENSE = "dense"
LOOKS = 64
"""In how many steps it is looked for what both passes would teach, where a network may learn in few of them."""


class DCILCallback(DynamicMaskCallback):
    """Prune with the help of the dense network: both run in each step, and each weight learns from one of them.

    When it acts: each step runs twice, with ``M * W`` and with ``W``. Kept weights get the gradient of the first pass,
    pruned ones that of the second, in one backward pass; from ``kl_start`` on each pass also learns from the other's
    output. Every ``update_interval`` optimizer steps the masks are chosen anew: of all selected weights those of the
    smallest magnitude are pruned. Validation, checkpoints and the module after the fit hold the pruned network. What it
    leaves alone: names in the ``state_dict``, the optimizer, batch-norm statistics, metrics and logs, to which the
    second pass adds nothing. A step takes twice the time.

    Logged are ``compress/<name>/pruned_task_loss`` and ``dense_task_loss``, ``kl_pruned`` and ``kl_dense`` (what each
    learns from the other), ``sparsity``, and with each update ``churn``, ``dead_filters``, ``gradient_norm_kept`` and
    ``gradient_norm_pruned``.

    Args:
        sparsity: Final share of zeros among weights, in [0, 1).
        schedule: How it grows, exact at its end; or a function ``(progress, start, end)``.
        start: Fraction of optimizer steps at which pruning begins, in [0, 1].
        end: Fraction of its end; masks go on changing.
        update_interval: Optimizer steps between two updates, at least 1.
        dense_path: What the dense pass has for itself: "own": norm layers and classifier, copies that learn beside;
            "own_norm": norm layers; "shared": nothing. What is shared learns from the pruned pass alone.
        kl_start: Fraction from which the two learn from each other; 1: never.
        temperature: Of that, positive.
        classifier: Its dotted name, or several. None: what is called last.
        norms: Selectors of norm layers. None: those of torch.
        student: Its dotted name, or both ends of a chain.
        output: Key, attribute or index of logits. None: found.
        class_dim: Dimension of classes. None: last of (N, L, K), else 1.
        guard_checkpoints: Whether a monitored checkpoint may be the best from the final sparsity on only.
        reestimate_batchnorm: Estimate batch norm anew at the end, on 16 training batches.
        reestimated_validation: Validate once more, on the CPU, with batch norm estimated anew.
        layers: As for ``PruningCallback``. None: convolutions.
        exclude: What is left dense.
        name: As in the base class; default "dcil".

    Raises:
        ValueError: If an argument is out of its range, or two contradict each other.

    Example:
        >>> import lightning.pytorch as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> module = BoringModel()
        >>> dcil = DCILCallback(0.5, layers=["layer"], dense_path="shared", kl_start=1.0, update_interval=1)
        >>> L.Trainer(max_steps=4, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[dcil],
        ...           enable_model_summary=False, enable_checkpointing=False).fit(module)
        >>> (module.layer.weight == 0).sum().item(), module.layer.weight.numel()
        (32, 64)
    """

    default_name = "dcil"
    holds: ClassVar[Mapping[str, Any]] = {
        "own": Sometimes({"names": ([str], None), "classifier": [str], "layers": (dict, None)})
    }
    default_layers = (_ConvNd,)
    expected_effects = ("the dense pass",)

    _own_state = Returned[dict[str, Any] | None](None)
    """What the dense path had for itself after a fit."""

    without_helpers = "; dense_path='shared' has none"

    def __init__(
        self,
        sparsity: float,
        *,
        schedule: Literal["one_shot", "cubic", "linear", "cosine"] | Schedule = "cubic",
        start: float = 0.0,
        end: float = 0.75,
        update_interval: int = 16,
        dense_path: Literal["own", "own_norm", "shared"] = "own",
        kl_start: float = 0.25,
        temperature: float = 2.0,
        classifier: str | list[str] | None = None,
        norms: Sequence[str] | None = None,
        student: str | list[str] | None = None,
        output: Locator = None,
        class_dim: int | None = None,
        guard_checkpoints: bool = True,
        reestimate_batchnorm: bool = False,
        reestimated_validation: bool = False,
        layers: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            sparsity,
            schedule=schedule,
            start=start,
            end=end,
            update_interval=update_interval,
            layers=layers,
            exclude=exclude,
            guard_checkpoints=guard_checkpoints,
            reestimate_batchnorm=reestimate_batchnorm,
            reestimated_validation=reestimated_validation,
            name=name,
        )
        check_choice("dense_path", dense_path, DENSE_PATHS)
        check_names("student", student)
        check_names("classifier", classifier)
        check_locator("output", output)
        if norms is not None:
            check_selectors(norms, "norms")
        if classifier is not None and dense_path != "own":
            raise ValueError(f"classifier={classifier!r} has no effect with dense_path='{dense_path}', only with 'own'")
        if norms is not None and dense_path == "shared":
            raise ValueError(f"norms={norms!r} has no effect with dense_path='shared'")
        self.kl_start = check_fraction("kl_start", kl_start)
        self.temperature = check_positive("temperature", temperature)
        self.class_dim = check_dimension("class_dim", class_dim)
        if self.kl_start == 1:
            tell_without_effect(
                self,
                DCILCallback,
                "kl_start=1, with which the two passes never meet",
                temperature=self.temperature,
                student=student,
                output=output,
                class_dim=self.class_dim,
            )
        self.dense_path, self.classifier, self.norms = dense_path, classifier, norms
        self.student, self.output = student, output
        self._own: OwnLayers | None = None
        self._another: Callable[[], AbstractContextManager[None]] | None = None
        self._called: Callable[[], list[LayerOutput]] | None = None  # the layers, while the classifier is looked for
        self._recording = ExitStack()
        self._first_statistics: dict[int, Tensor] = {}
        self._stand_ins: dict[int, Tensor] = {}  # of a dense pass whose backward pass is to come
        self._dense_kl: Tensor | None = None  # what the dense pass learns from the other, in a backward pass of its own
        self._waiting: list[tuple[Tensor, Tensor | None]] = []  # gradients that this gave

    # Life cycle

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what two passes cannot be had with."""
        super().check(trainer, pl_module)
        if self.dense_path != "shared":
            self._refuse_shrinking(
                trainer,
                f"the dense path of '{self.name}' has layers of its own, copied in the first step: let them go before "
                "it, with start=0 and schedule='one_shot', or give dense_path='shared'",
                fine=lambda until: until == 0,
            )
        if _compat.takes_iterator(trainer, pl_module):
            raise ValueError(
                f"{type(self).__name__} runs the step twice on each batch, and that of {class_name(pl_module)} "
                "draws its batches itself, from dataloader_iter; let it take a batch"
            )
        for other in trainer.callbacks:
            if isinstance(other, MaskedWeightsCallback) and other is not self:
                raise ValueError(
                    f"'{self.name}' and '{other.name}' both mask weights, and the dense pass of {type(self).__name__} "
                    f"would not be dense where '{other.name}' masks; leave all weights to one of them"
                )

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """As the base; add the dense pass, and what the two learn from each other."""
        if self.dense_path != "shared":
            what = f"makes optimizers of the kind of yours for dense_path='{self.dense_path}'"
            self._refuse_foreign(trainer, what, ", or choose dense_path='shared'")
        if len(trainer.optimizers) > 1:
            self._refuse_defaults(trainer, pl_module)
        super().attach(controller, stack, trainer, pl_module)
        stack.callback(self._put_away)
        self._norms_and_classifier(pl_module)  # what is wrong with names is said before the first step
        masks = self._require_masks()
        others = {name: DenseWeight(view) for name, view in masks.views.items()}
        self._another = stack.enter_context(controller.weights.owned_for_another_pass(self.name, others))
        stack.callback(setattr, self, "_another", None)
        learn = partial(self._learn_apart, others) if masks.parts is not None else None
        stack.enter_context(self._recording)
        self.student_capture = controller.capture(self.student) if self.kl_start < 1 else None
        view = View(DENSE, self._dense_pass, deployed=False, owner=self.name, learn=learn)
        stack.enter_context(controller.view(view))
        lesson = self.follow_lessons(stack, trainer, pl_module)
        between = Term(self.name, self._between, view=None, student=self.student_capture, lesson=lesson)
        stack.enter_context(controller.term(between))

    def flaw(self, state: Mapping[str, Any]) -> str | None:
        """As the base; with the layers that the dense path had for itself."""
        return super().flaw(state) or flaw_of_owned((state.get("own") or {}).get("layers") or {}, "own.layers")

    def go_on(self, state: dict[str, Any] | None) -> None:
        """With what the dense path had for itself."""
        super().go_on(state)
        self._own = None
        if self.dense_path != "shared":
            saved = (state or {}).get("own")
            same = saved is not None and (state or {})["arguments"].get("dense_path") == self.dense_path
            self._own = OwnLayers(saved if same else None)

    def forget(self) -> None:
        """With what the dense path had for itself."""
        super().forget()
        self._own = self._own_state = None

    def follow_shrinkage(self, shrinkage: Shrinkage, pl_module: Any) -> None:
        """As the base; the statistics before the first step are smaller ones too."""
        super().follow_shrinkage(shrinkage, pl_module)
        if self._first_statistics:
            self._first_statistics = scratch(pl_module.buffers())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """In the first step, look for the layers that are the dense path's own."""
        if self._own is None or self._own.layers:
            return
        self._first_statistics = scratch(pl_module.buffers())  # before the pruned pass counts its batch
        if self._own.names is None and self.dense_path == "own" and self.classifier is None:
            self._recording.close()
            self._called = self._recording.enter_context(record_outputs(pl_module))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """As the base; give the dense path's own layers the gradients of a backward pass of its own."""
        super().on_after_backward(trainer, pl_module)
        for leaf, gradient in self._waiting:
            if gradient is not None:
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        self._waiting = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Let the dense path's own layers follow the settings of the user's optimizer, then as the base."""
        if self._own is not None and self.leads(trainer, pl_module, optimizer):
            self._own.follow(optimizer)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def extra_state(self) -> dict[str, Any]:
        """As the base; and what the dense path has for itself."""
        own = self._own_state if self._own is None else self._own.state()
        return {**super().extra_state(), **({} if own is None else {"own": own})}

    def intent(self, trainer: Any, pl_module: Any) -> Intent:
        """As the base; and the dense pass."""
        notes = [f"each step runs once more with the dense weights (dense_path='{self.dense_path}')"]
        if self._own is not None and self._own.layers:
            norms = [name for name in self._own.layers if name not in self._own.classifier]
            notes.append(f"the dense path has its own {self._of_its_own(self._own.classifier, norms)}")
        return replace(super().intent(trainer, pl_module), passes=1, notes=tuple(notes))

    def remarks(self) -> list[str]:
        """As the base; and what the dense path had for itself."""
        remarks = super().remarks()
        if self._own_state is not None:
            classifier = self._own_state["classifier"]
            norms = [name for name in self._own_state["names"] if name not in classifier]
            remarks.append(f"{self.name}: the dense path had its own {self._of_its_own(classifier, norms)}.")
        return remarks

    # Private

    def _refuse_defaults(self, trainer: Any, pl_module: nn.Module) -> None:
        """Refuse what cannot work with several optimizers, and say in one message what can."""
        networks = separate_networks(trainer.optimizers, named_weights(pl_module))
        norms = [own for part in pl_module.modules() if isinstance(part, NORMS) for own in part.parameters()]
        own_norms = self.dense_path != "shared" and self.norms is None and len(holders(trainer.optimizers, norms)) > 1
        named = [getattr(other, "student", None) for other in trainer.callbacks]
        several = len(networks) > 1
        changed: dict[str, Any] = {}
        if several and self.layers is None and self.exclude is None:
            changed["layers"] = [self.student] if isinstance(self.student, str) else networks[0]
        if own_norms or (self.dense_path == "own" and self.classifier is None):
            changed["dense_path"] = "shared"
        if several and self.kl_start < 1 and not any(named):
            changed["kl_start"] = 1.0
        if not changed:
            return
        usual = inspect.signature(type(self).__init__).parameters
        given = {key: value for key, value in self._arguments().items() if value != usual[key].default}
        if self.name != self.default_name:
            given["name"] = self.name
        idle = {"dense_path": ("norms", "classifier"), "kl_start": ("temperature", "student", "output", "class_dim")}
        dropped = {key for cause in changed for key in idle.get(cause, ())}  # without effect then
        call = {key: value for key, value in {**given, **changed}.items() if key not in dropped}
        functions = {"schedule": getattr(self.schedule, "__name__", None)}  # where it is none, its name is text
        written = ", ".join(f"{key}={functions.get(key) or shown(value)}" for key, value in call.items())
        unsaid = {
            "layers": f"what '{self.name}' prunes",
            "dense_path": "what its dense path has for itself (classifier= and norms= would say so)",
            "kl_start": "whose classes the two passes learn from (student= would, where there are some)",
        }
        pruned = listing(call["layers"]) if call.get("layers") else "what is selected"
        which = f" ({' and '.join(listing(network) for network in networks)})" if several else ""
        raise ValueError(
            f"{len(trainer.optimizers)} optimizers train parts of {class_name(pl_module)}{which}, so it is not said "
            f"{', or '.join(unsaid[cause] for cause in changed)}. To prune {pruned} give "
            f"{type(self).__name__}({written}), compressed_loss a function that computes its loss, and callbacks=[] "
            "for the losses of others"
        )

    def _norms_and_classifier(self, module: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        """The layers that are the dense path's own, as far as they can be told without a step."""
        if self._own is None:
            return {}, {}
        masked = {id(weight) for weight in self._require_masks().weights.values()}
        norms = norms_of(module, self.norms, masked)
        if self.dense_path == "own_norm" and not norms:
            raise ValueError(
                f"dense_path='own_norm' has no effect: {class_name(module)} has no norm layers; choose 'shared'"
            )
        names = self.classifier or self._own.classifier  # those of a checkpoint
        return norms, classifiers_named(module, names, masked) if names else {}

    @staticmethod
    def _of_its_own(classifier: Sequence[str], norms: Sequence[str]) -> str:
        parts = [("classifier", classifier), ("norm layers", norms)]
        return ", and ".join(f"{what} {listing(names)}" for what, names in parts if names)

    def _put_away(self) -> None:
        """At the end of a fit, keep what the dense path had for itself, for a fit that goes on."""
        self._own_state = None if self._own is None else self._own.state()
        self._own = self._called = self._dense_kl = None
        self._waiting = []
        self._first_statistics, self._stand_ins = {}, {}

    @contextmanager
    def _dense_pass(self) -> Iterator[None]:
        """Present the dense weights, and let nothing else learn or change but what is the path's own."""
        module = self._require_controller().module
        shards_in_place(module)
        own: Mapping[int, Tensor] = {}
        if self._own is not None:
            if not self._own.layers:
                self._find_own(module)
            own = self._own.stand_ins()
        # all parameters, also those that are masked, of which the module sees the views in front; not those that
        # FSDP2 shards, which learn in a backward pass of their own
        rest = [
            leaf for leaf in module.parameters() if leaf.requires_grad and id(leaf) not in own and not is_shard(leaf)
        ]
        buffers = [buffer for buffer in module.buffers() if id(buffer) not in own]
        if self._another is None:
            raise RuntimeError(f"{type(self).__name__} is only active during a fit")
        stand_ins = {**scratch(buffers), **unlearning(rest), **own}
        self._stand_ins = stand_ins if self._require_masks().parts is not None else {}
        with standing_in(module, stand_ins), self._another():
            yield
        self.effects["the dense pass"] += 1

    def _find_own(self, module: nn.Module) -> None:
        """Find the layers that are the dense path's own, and copy them."""
        if self._own is None:
            raise RuntimeError("the dense path shares all of its layers")
        norms, classifier = self._norms_and_classifier(module)
        if self.dense_path == "own":
            if not classifier and self._called is not None:
                masked = {id(weight) for weight in self._require_masks().weights.values()}
                classifier = last_layer(module, self._called(), masked)
            self._own.classifier = list(classifier)
        layers = {**norms, **classifier}
        self._recording.close()
        self._called = None
        order = {id(part): index for index, part in enumerate(module.modules())}
        chosen = dict(sorted(layers.items(), key=lambda entry: order[id(entry[1])]))
        refuse_lbfgs(self._trainer.optimizers, f"{type(self).__name__} '{self.name}'")
        owned: OwnedParameters = self._own.copy(chosen, self._leader(chosen), self._first_statistics)
        self._first_statistics = {}
        self.own(owned)
        others = [name for name in chosen if name not in self._own.classifier]
        log.info("%s: the dense path has its own %s", self.name, self._of_its_own(self._own.classifier, others))

    def leads(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it trains the layers of which the dense path has its own."""
        if len(trainer.optimizers) < 2 or self._own is None or not self._own.layers:
            return True
        return self._leader(self._own.layers) is optimizer

    def _leader(self, layers: Mapping[str, nn.Module]) -> torch.optim.Optimizer:
        """The optimizer that the dense path's own layers follow: the one that trains those which they are copies of."""
        every: list[torch.optim.Optimizer] = self._trainer.optimizers
        found = holders(every, [own for layer in layers.values() for own in layer.parameters(recurse=False)])
        if len(found) > 1:
            raise ValueError(
                f"{listing(list(layers))} are trained by {len(found)} optimizers, and what the dense path of "
                f"'{self.name}' has for itself follows one: name the layers of the network that is pruned with norms= "
                "and classifier=, or choose dense_path='shared'"
            )
        return (found or every)[0]

    def _between(self, passes: Mapping[str, Pass]) -> Tensor | None:
        """What the two passes learn from each other; log both task losses."""
        dense = passes[DENSE]
        [pruned] = [seen for seen in passes.values() if seen.view.deployed]
        manual = not optimises_automatically(self._require_controller().module)
        if self._require_controller().steps < (LOOKS if manual else 1):
            self._check_what_learns(pruned, dense)
        for name, seen in (("pruned", pruned), ("dense", dense)):
            if seen.task_loss is not None:
                self.log_quantity(f"{name}_task_loss", seen.task_loss.detach(), batch_size=1)
        begun = self._require_progress().fraction_before >= self.kl_start
        first_step = self._require_controller().steps == 0  # when what will be needed later is looked for
        if self.student_capture is None or not (begun or first_step):
            return None
        try:
            calls = [call for seen in (pruned, dense) if (call := seen.call(self.student_capture)) is not None]
        except CaptureError as error:
            raise CaptureError(
                f"{error}; or give kl_start=1, so that the passes do not learn from each other"
            ) from error
        if len(calls) != 2:
            raise ValueError(
                f"from kl_start={self.kl_start} on the two passes learn from each other's output, and the step called "
                f"no network '{'/'.join(self.student_capture.names or ('',))}'; name it with student=, or give "
                "kl_start=1"
            )
        first, second = (find_logits(call.output, self.output, owner="network") for call in calls)
        dimension = self._class_dimension(first)
        if not begun:
            return None
        losses = [
            F.distillation_loss(one, other, self.temperature, class_dim=dimension)
            for one, other in ((first, second), (second, first))
        ]
        for name, loss in zip(("kl_pruned", "kl_dense"), losses, strict=True):
            self.log_quantity(name, loss.detach(), batch_size=1)
        if self._require_masks().parts is None:
            return losses[0] + losses[1]
        self._dense_kl = losses[1]
        return losses[0]

    def _learn_apart(self, others: Mapping[str, DenseWeight], loss: Tensor) -> Tensor:
        """The backward pass of the dense pass, where weights are sharded; gives the value of its loss."""
        total, self._dense_kl = loss if self._dense_kl is None else loss + self._dense_kl, None
        owned = [] if self._own is None else [*self._own.stand_ins().values()]
        earlier = [leaf.grad for leaf in owned]
        for leaf in owned:
            leaf.grad = None
        weights = self._require_controller().weights.sharded
        with torch.autocast(total.device.type, enabled=False):
            weights.learn_apart(total / self._trainer.accumulate_grad_batches, others, self._stand_ins)
        self._stand_ins = {}
        self._waiting = [(leaf, leaf.grad) for leaf in owned]  # until Lightning has cleared gradients for this step
        for leaf, gradient in zip(owned, earlier, strict=True):
            leaf.grad = gradient
        return total.detach()

    def _check_what_learns(self, pruned: Pass, dense: Pass) -> None:
        """Complain in the first steps if the dense pass would teach what the pruned pass teaches already."""
        module = self._require_controller().module
        names = {id(weight): name for name, weight in module.named_parameters()}
        own = {} if self._own is None else self._own.stand_ins()
        expected = {id(leaf) for leaf in (*self._require_masks().weights.values(), *own.values())}
        trained = {id(own) for own in parameters_of(*self._trainer.optimizers)} - expected
        manual = not optimises_automatically(module)
        both = leaves_of_both(pruned.task_loss, dense.task_loss) if manual else []
        if outside := [names[id(leaf)] for leaf in both if id(leaf) in trained | expected and id(leaf) in names]:
            raise RuntimeError(
                f"what was computed from {listing(outside)} before the loss is used by both passes of '{self.name}', "
                "so the second one would see what the first one's weights gave: let the function that is given to "
                "compressed_loss compute all of it"
            )
        others = [leaf for leaf in leaves_of(dense.task_loss) if id(leaf) in trained]
        if others:
            said = [names.get(id(leaf), f"a tensor of shape {tuple(leaf.shape)}") for leaf in others]
            raise RuntimeError(
                f"{listing(said)} would learn from both passes of '{self.name}': the step reaches them otherwise than "
                f"through the layers of {class_name(module)}, in a list or a hidden module, say; let them be "
                "attributes or children of a module, and read them there"
            )

    def _class_dimension(self, logits: Tensor) -> int:
        try:
            return class_dimension(logits, self.class_dim)
        except ValueError as error:
            if self.class_dim is not None:
                raise
            raise ValueError(
                f"from kl_start={self.kl_start} on the two passes learn from each other's classes, and the network "
                f"gives {tuple(logits.shape)}; say where the classes are with class_dim=, or give kl_start=1"
            ) from error
