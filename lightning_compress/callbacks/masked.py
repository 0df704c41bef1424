"""What the techniques that mask weights share: which weights, who sees them masked, and what is saved of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress import _compat
from lightning_compress.callbacks.arguments import check_layers
from lightning_compress.callbacks.base import log, optimises_automatically
from lightning_compress.callbacks.intents import Intent, layers_of, left_out
from lightning_compress.callbacks.returned import Returned
from lightning_compress.callbacks.saving import SavingCallback
from lightning_compress.mechanisms.checkpoints import (
    Compress,
    compress_,
    dense_of,
    keep_dense_,
    loading_dense,
    saving_compressed,
)
from lightning_compress.mechanisms.controller import StepController
from lightning_compress.mechanisms.gathering import gathered, rows_of, sharded_as
from lightning_compress.mechanisms.masking import MaskedWeight, Masks
from lightning_compress.mechanisms.selection import listing, plain_name
from lightning_compress.mechanisms.sharding import is_shard, own_part, shards_in_place
from lightning_compress.mechanisms.shrinking import Shrinkage
from lightning_compress.mechanisms.states import Each
from lightning_compress.mechanisms.views import Usage
from lightning_compress.mechanisms.weights import PLAIN_LAYERS, named_weights, select_weights

ABSENT = object()
"""In the place of an attribute that was not there."""


class MaskedWeightsCallback(SavingCallback):
    """Base of the techniques that present masked weights, whenever their masks may change.

    Steps and validations see ``M * W``; the optimizer, and whatever acts between steps, the dense weights. Checkpoints
    hold the masked weights, with the dense ones beside. So does the module after the fit, and this callback keeps the
    dense ones, from which a later fit goes on if the module is as the last one left it.

    Args:
        layers: Selectors of the layers whose weights are masked; None for ``default_layers``.
        exclude: Selectors of layers that are left dense.
        name: As in the base class.
    """

    changes_step = True
    holds: ClassVar[Mapping[str, Any]] = {"masks": Each(Tensor)}
    default_layers: ClassVar[tuple[type[nn.Module], ...]] = PLAIN_LAYERS
    """What is selected where ``layers`` is None."""

    _masks = Returned[Masks | None](None)
    _names = Returned[Mapping[str, str]](MappingProxyType({}))
    """Every name of a selected weight to its first."""
    _dense = Returned[dict[str, Tensor] | None](None)
    """What lies behind the compressed weights in the module, after a fit."""
    _tested = Returned[dict[str, Any] | None](None)
    """State of a checkpoint that was tested, until the next fit."""

    def __init__(self, *, layers: Sequence[str] | None, exclude: Sequence[str] | None, name: str | None) -> None:
        super().__init__(name=name)
        check_layers(layers, exclude)
        self.layers, self.exclude = layers, exclude
        self._left: list[str] = []  # weights that stay dense
        self._loaded: dict[str, Any] | None = None  # state of a checkpoint that is resumed, until the fit starts
        self._undo: dict[str, Any] | None = None  # what this was before a fit that has not trained anything yet
        self._undo_bakes = False  # whether the module was compressed then
        self._forgotten: dict[str, Any] = {}  # what this was before a checkpoint, until its weights are loaded
        self._usage: Callable[[], Usage] | None = None

    # For techniques

    def problem_with_shards(self) -> str | None:
        """Nothing: masks are chosen, and act, where the shards are."""
        return None

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuse manual optimisation of sharded weights, in which gradients do not come at one time."""
        super().check(trainer, pl_module)
        self._refuse_manual_shards(trainer, pl_module)

    def learners(self, pl_module: nn.Module) -> list[Tensor]:
        """The weights that are masked."""
        return list(self._require_masks().weights.values())

    def learners_name(self) -> str:
        """As they are called in a message."""
        return "the weights that it masks"

    def suited(self, weights: dict[str, nn.Parameter], pl_module: nn.Module) -> dict[str, nn.Parameter]:
        """Those of the selected weights that can be masked; an error if there are none."""
        return weights

    def view(self, name: str) -> MaskedWeight:
        """How the weight of this name is presented."""
        return MaskedWeight()

    # What users read

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name of a weight to its mask, True where it is kept; empty before the first update."""
        return {} if self._masks is None else self._masks.state()

    @property
    def reached(self) -> float:
        """The share of the selected weights that is masked now."""
        return 0.0 if self._masks is None else self._masks.sparsity

    def intent(self, trainer: Any, pl_module: Any) -> Intent:
        """Which weights it masks."""
        masks = self._require_masks()
        left = left_out(pl_module, self._left, self.exclude)
        return Intent(type(self).__name__, layers_of(masks.weights), left, masks.total)

    # Life cycle

    def enter(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """No checkpoint is resumed yet."""
        self._loaded, self._forgotten = None, {}

    def _loading_files(self, trainer: Any, pl_module: Any, stage: str) -> AbstractContextManager[None]:
        """Load the dense weights to go on with a fit."""
        return loading_dense(pl_module, self.name, self._receive, resumes=stage == "fit")

    def _saving_files(self, pl_module: Any) -> AbstractContextManager[None]:
        """Save compressed weights."""
        return saving_compressed(pl_module, self.name, self._compressing)

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """Select the weights, and present them masked from here on."""
        selected = select_weights(pl_module, self.layers, self.exclude, default=self.default_layers)
        if selected.idle:
            self._warn_once(f"exclude={selected.idle} leaves out nothing that was selected")
        if self.layers is None:
            self._refuse_separate(trainer, selected.weights)
            self._tell_of_frozen(selected.weights)
        weights = self.suited(selected.weights, pl_module)
        last = self.state_dict()
        earlier, self._masks = self._masks, Masks(weights, self.view)
        first = {id(weight): name for name, weight in weights.items()}
        every = named_weights(pl_module).items()
        self._names = {name: first[id(weight)] for name, weight in every if id(weight) in first}
        self._left = [*(name for name in selected.weights if name not in weights), *selected.left]
        goes_on = self._restore_dense(earlier, last) and trainer.global_step > 0
        state = self._loaded or (last if goes_on else None)
        self._loaded = self._tested = None
        self._forgotten = {}
        self.go_on(state)
        self._announce()
        stack.enter_context(controller.weights.owned(self.name, self._masks.views))
        self._usage = stack.enter_context(controller.weights.watched(self.name))
        stack.callback(setattr, self, "_usage", None)

    def _tell_of_frozen(self, weights: Mapping[str, Tensor]) -> None:
        """A part that is frozen may be one that only measures, and nobody has named it."""
        learns: dict[str, bool] = {}
        for name, weight in weights.items():
            part = name.partition(".")[0]
            learns[part] = learns.get(part, False) or weight.requires_grad
        frozen = [part for part, own in learns.items() if not own]
        if 0 < len(frozen) < len(learns):
            self._warn_once(
                f"the weights of {listing(frozen, None)} are masked, and frozen as the fit begins: where they only "
                f"measure, as those of the network in a loss, leave them out with exclude={frozen}; where they are to "
                f"be sparse, layers={[*learns]} says so"
            )

    def go_on(self, state: dict[str, Any] | None) -> None:
        """Begin with the state of an earlier fit; None: anew."""
        if state is not None and state["masks"]:
            self._require_masks().load(state["masks"])

    def forget(self) -> None:
        """The module holds other weights than those of the last fit."""
        self._masks = self._dense = self._tested = self._undo = None

    def follow_shrinkage(self, shrinkage: Shrinkage, pl_module: Any) -> None:
        """Masks of the weights that are left."""
        self._undo = None  # what this was before belongs to the larger network
        self._require_masks().follow(shrinkage)

    def verify(self, trainer: Any, pl_module: Any) -> None:
        """Complain about weights that the first step did not use, or not only through their layers."""
        if self._usage is None:
            return
        unused, partly = self._usage()
        if partly:
            self._warn_once(
                f"{listing(partly)} get a part of their gradient past the layer: a penalty over parameters(), or "
                "whatever holds on to a parameter itself, sees the dense weights"
            )
        if len(unused) == len(self._require_masks().weights):
            raise RuntimeError(
                f"{type(self).__name__} '{self.name}' had no effect: the first training step used none of the weights "
                f"that it masks, {listing(unused)}, or under no_grad only; choose others with layers="
            )
        if unused:
            self._warn_once(
                f"the first training step did not use {listing(unused)}; copies of a network, and what belongs to "
                "another task, are left out with exclude="
            )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Look closely at the first step of each epoch."""
        self._require_controller().weights.compare_next()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """From here on the dense weights are others than those that the fit began with."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self._undo = None

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """From here on everybody sees the dense weights."""
        if optimises_automatically(pl_module):
            self._drop()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """As the base; a step that was skipped had no backward pass."""
        self._drop()
        self._undo = None  # an optimizer of the user's own may have stepped
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """A file is loaded by now; of a file of weights alone Lightning tells nobody."""
        self._forgotten = {}

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """A file is loaded by now."""
        self._forgotten = {}

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """A file is loaded by now."""
        self._forgotten = {}

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Validation in a fit sees the masked weights; outside of one, a file is loaded by now."""
        self._forgotten = {}
        if self._controller is not None:
            self._controller.weights.show()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """From the first batch on those of the average, where an average is validated."""
        if self._controller is not None and batch_idx == dataloader_idx == 0:
            self._controller.weights.refresh()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """After it everybody sees the dense weights."""
        super().on_validation_end(trainer, pl_module)
        self._drop(evaluation=True)

    def bake(self, trainer: Any, pl_module: Any) -> None:
        """Leave the compressed weights in the module; the dense ones are kept here."""
        shards_in_place(pl_module)
        if replaced := self._replaced(pl_module):
            raise RuntimeError(
                f"{listing(replaced)} are not the weights any more that '{self.name}' masks: they were replaced after "
                "the last training step, so they cannot be compressed"
            )
        self._compress_module()
        self._compress_averages(trainer, pl_module)
        self._files.close()

    def interrupted(self, trainer: Any, pl_module: Any) -> None:
        """As the base; a fit that has trained nothing, and a file that was not loaded, leave what was before them."""
        self._put_back()
        super().interrupted(trainer, pl_module)
        if self._masks is not None and self._masks.parts is not None:
            self._undo = None  # the others may not come: no process goes back alone
        if self._undo is not None and self._undo_bakes:
            self._compress_module()
            self._files.close()
        elif self._undo is not None:
            self._go_back()
        elif self._masks is not None and self._masks.zeros > 0 and self._dense is None:
            log.warning(
                "%s: the fit was interrupted, and the module holds the dense weights, to go on from; its checkpoints "
                "hold the masked ones",
                self.name,
            )

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep masks whole; outside of a fit, where the module's own hook is as it was, also what a later fit needs."""
        states = checkpoint.get("callbacks", {})
        if self.state_key in states:
            states[self.state_key] = gathered(states[self.state_key])
        if self._saving or self._masks is None or not self._masks.state():
            return
        if self._dense is None:  # a fit ended in an exception, and its module holds the dense weights
            if not self._replaced(pl_module):
                compress_(checkpoint, self.name, self._compressing(checkpoint))
            return
        state, dense = checkpoint["state_dict"], self._dense
        if self._masks.parts is None:
            names = {key: name for key, value in state.items() if (name := self._name_of(key, value)) is not None}
            same = all(
                torch.equal(self._masks.masked(name, dense[name]).to(state[key].dtype), state[key].cpu())
                for key, name in names.items()
            )
        else:  # only some ranks have a state
            names, same = dict(self._names), self._holds(self._masks, dense)
        if same:
            keep_dense_(checkpoint, self.name, {key: dense[name] for key, name in names.items()})
        else:
            self._warn_once("the weights have changed since the fit, so they are saved without dense ones")

    def state_dict(self) -> dict[str, Any]:
        """That of the file that was tested last, whose weights the module has; else as the base."""
        return super().state_dict() if self._tested is None else self._tested

    def extra_state(self) -> dict[str, Any]:
        """The masks."""
        return {"masks": self.masks}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Keep them until the fit starts, when the weights are known."""
        if self._saving:  # else a file is tested, and what a fit needs of it was kept when it was read
            self._loaded = state
            if self._controller is not None and self._controller.weights.sharded.weights:
                self.go_on_late()

    def go_on_late(self) -> None:
        """Begin with the loaded state, as a strategy with shards loads it when the fit has started."""
        self.go_on(self._loaded)
        self._loaded = None

    # Private

    def _compress_module(self) -> None:
        self._go_back()
        masks = self._require_masks()
        self._dense = {}
        for name, weight in masks.weights.items():
            own = own_part(weight)
            self._dense[name] = sharded_as(own.clone() if masks.parts else own.cpu().clone(), weight)
            own.copy_(masks.masked(name, own))
        masks.retire()

    def _compress_averages(self, trainer: Any, pl_module: nn.Module) -> None:
        """An average of the weights is what its callback puts into a checkpoint after the fit too."""
        masks = self._require_masks()
        for average in _compat.averages_of(trainer, pl_module):
            copies = named_weights(average)
            with torch.no_grad():
                for name in masks.weights:
                    copies[name].copy_(masks.masked(name, copies[name]))

    def _go_back(self) -> None:
        """To what this was before the fit, if nothing was trained."""
        if self._undo is not None:
            self.go_on(self._undo)
            self._undo = None

    def _put_back(self) -> None:
        """Take back what was forgotten for a file that was not loaded; whether the weights fit, the next fit sees."""
        for key, value in self._forgotten.items():
            if value is ABSENT:
                vars(self).pop(key, None)
            else:
                vars(self)[key] = value
        self._forgotten = {}

    def _replaced(self, pl_module: nn.Module) -> list[str]:
        """The weights that are not the module's, or not any more."""
        present = named_weights(pl_module)
        return [name for name, weight in self._require_masks().weights.items() if present.get(name) is not weight]

    def _drop(self, *, evaluation: bool = False) -> None:
        weights = None if self._controller is None else self._controller.weights
        if weights is not None and weights.active:
            weights.drop(evaluation=evaluation)

    def _name_of(self, key: str, value: Any) -> str | None:
        """Which weight an entry of a ``state_dict`` is, also where the module renames its entries."""
        name = self._names.get(plain_name(key))
        if name is None and isinstance(value, Tensor) and self._require_masks().parts is None:
            place = value.data_ptr(), value.shape
            weights = self._require_masks().weights.items() if place[0] != 0 else ()
            name = next((own for own, weight in weights if (weight.data_ptr(), weight.shape) == place), None)
        return name

    def _compressing(self, checkpoint: dict[str, Any]) -> Compress:
        """What is saved of the entries of the module's ``state_dict``."""
        masks, whole = self._masks, None
        if masks is None or not masks.state():
            return lambda key, value: None
        if masks.parts is not None and not any(is_shard(value) for value in checkpoint["state_dict"].values()):
            whole = gathered(masks.state())  # as the weights are, on rank 0

        def compress(key: str, value: Tensor) -> Tensor | None:
            name = self._name_of(key, value)
            if name is None:
                return None
            return masks.masked(name, value) if whole is None else value.masked_fill(~whole[name], 0.0)

        return compress

    def _receive(self, checkpoint: dict[str, Any]) -> None:
        """Keep the dense weights of a checkpoint that is loaded to be tested, for a fit that goes on from it."""
        if self._controller is not None:  # a fit looks for a learning rate, and comes back to where it was
            return
        self.recall()  # what children have found is of before
        before = dict(vars(self))
        try:
            self._read(checkpoint)
        finally:
            now = vars(self)
            changed = [key for key in {**before, **now} if before.get(key, ABSENT) is not now.get(key, ABSENT)]
            self._forgotten = {key: before.get(key, ABSENT) for key in changed}

    def _read(self, checkpoint: dict[str, Any]) -> None:
        """Hold the masks and the dense weights of a checkpoint, and nothing of those that were here."""
        self.forget()
        states = checkpoint.get("callbacks", {})
        if self.state_key in states:  # as it is in the file: Lightning passes over an empty one
            self._refuse_damaged(states[self.state_key])
        state = states.get(self.state_key, {})
        masks = state.get("masks", {})
        if self._saving or not masks:
            return
        dense = {plain_name(key): value for key, value in dense_of(checkpoint, self.name).items()}
        if any(name not in dense for name in masks):
            log.warning("%s: no fit can go on from this file once it is tested, as its entries are renamed", self.name)
            return
        self._tested = state
        self._dense = {name: dense[name] for name in masks}
        self._masks = Masks({name: nn.Parameter(value, requires_grad=False) for name, value in self._dense.items()})
        self._masks.load(masks)
        first = {value.data_ptr(): name for name, value in self._dense.items()}
        self._names = {name: first[value.data_ptr()] for name, value in dense.items() if value.data_ptr() in first}

    def _restore_dense(self, earlier: Masks | None, last: dict[str, Any]) -> bool:
        """Go on from the dense weights of the last fit, if the module still is as it left it."""
        dense, self._dense = self._dense, None
        weights = self._require_masks().weights
        if earlier is None or earlier.weights.keys() != weights.keys():
            return False
        known = all(earlier.weights[name] is weight for name, weight in weights.items())
        same = known if dense is None else self._holds(earlier, dense)  # None: it was interrupted
        if known and not same:
            log.info(
                "%s: the weights have changed since the last fit, so this one begins with them as they are", self.name
            )
        if same:
            self._undo, self._undo_bakes = last, dense is not None
            for name, value in (dense or {}).items():
                own_part(weights[name]).copy_(rows_of(value, weights[name]))
        return same

    def _holds(self, earlier: Masks, dense: Mapping[str, Tensor]) -> bool:
        """Whether the weights, of all processes, are dense ones with zeros where earlier masks say."""
        now, masks = self._require_masks(), earlier.state()
        others = 0
        for name, weight in now.weights.items():
            left = rows_of(dense[name], weight).masked_fill(~rows_of(masks[name], weight), 0.0)
            own = own_part(weight)  # which may have been cast since
            others += not torch.equal(left.to(own.dtype), own)
        return (others if now.parts is None else now.parts.totals([others])[0]) == 0

    def _announce(self) -> None:
        masks = self._require_masks()
        log.info("%s masks %s (%s weights)", self.name, listing(list(masks.weights), most=None), f"{masks.total:,}")
        if self._left:
            log.info("%s leaves dense: %s", self.name, listing(self._left, most=None))

    def _require_masks(self) -> Masks:
        if self._masks is None:
            raise RuntimeError(f"{type(self).__name__} has no masks before a fit")
        return self._masks
