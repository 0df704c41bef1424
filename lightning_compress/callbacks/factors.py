"""Factor transfer: the student imitates factors of the teacher's feature that a paraphraser has learned.

Kim, Park & Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018,
arXiv:1802.04977. The networks, their pre-training and the loss are those of the authors' code.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_compress import _compat
from lightning_compress import functional as F
from lightning_compress.callbacks.arguments import (
    absolute_path,
    check_positive,
    check_whole,
    is_auto,
    shown,
    tell_without_effect,
)
from lightning_compress.callbacks.features import FeatureCallback, Pair
from lightning_compress.callbacks.intents import Intent
from lightning_compress.callbacks.ranks import averaging
from lightning_compress.callbacks.returned import Returned
from lightning_compress.callbacks.teaching import samples_of
from lightning_compress.mechanisms.capture import CaptureError, NetworkCall
from lightning_compress.mechanisms.drafts import write_whole
from lightning_compress.mechanisms.isolation import drawn_from
from lightning_compress.mechanisms.owned import OwnedParameters, refuse_lbfgs
from lightning_compress.mechanisms.paraphrasing import authors_optimizer, paraphraser_from, train_paraphraser
from lightning_compress.mechanisms.passes import Pass
from lightning_compress.mechanisms.reading import read_saved
from lightning_compress.mechanisms.replay import Replay
from lightning_compress.mechanisms.saved_optimizers import flaw_of_owned
from lightning_compress.mechanisms.signs import sign
from lightning_compress.mechanisms.stages import Stage
from lightning_compress.mechanisms.states import Each, Sometimes, damage
from lightning_compress.mechanisms.step import StepController
from lightning_compress.modules import Paraphraser, Translator

POOR = 0.9  # relative reconstruction error from which a paraphraser has learned next to nothing

PARAPHRASER_SCHEMA = 1


class FactorTransferCallback(FeatureCallback):
    """Let the student's last feature, translated, imitate factors of the teacher's.

    When it acts: when the training starts, where it trains the paraphraser on what the teacher returns for the training
    data (unless it is in the checkpoint or in a file), and in every training step, where it adds its term to the loss
    and trains the translator beside the network. In validation it only measures. Logged are ``compress/<name>/loss``
    (unweighted), ``val_loss``, and the paraphraser's ``reconstruction`` error relative to the feature.

    What it leaves alone: the module's parameters, keys, optimizer and steps. Paraphraser and translator are in this
    callback's state, and nowhere else.

    Args:
        teacher: A module; in YAML a ``class_path``; or the name of a callback that has it ("kd").
        pair: Layer inside the student and layer inside the teacher. "auto": the ends of their last stages.
        factor_ratio: Channels of the factor as a share of the teacher's, positive.
        weight: Weight of the loss, positive; its strength depends on the size of the factor.
        pretrain_epochs: Epochs of the paraphraser's training; 0 leaves it random.
        paraphraser: File that :meth:`save_paraphraser` wrote; it is not trained then.
        translator_lr: Learning rate of the translator. None: that of the user's first parameter group in each step.
        student: Dotted name of the network, or two: the ends of a chain. None: found in the first step.
        teacher_transform: Module applied to the inputs before the teacher.
        name: As in the base class; default "ft".

    Attributes:
        reconstruction_errors: One for each epoch of the pre-training; 1 is what zeros would reach.

    Raises:
        TypeError, ValueError: If an argument is outside of what is said above, or cannot be built or read.

    Example:
        >>> from torch import nn
        >>> callback = FactorTransferCallback(nn.Conv2d(1, 4, 3), pair=("layer3", "layer4"))
        >>> callback.state_key
        'FactorTransferCallback[ft]'
    """

    default_name = "ft"
    holds: ClassVar[Mapping[str, Any]] = {
        "layer": Sometimes(str),
        "paraphraser": Sometimes(Each(Tensor), beside="layer"),
        "reconstruction_errors": Sometimes([float], beside="layer"),
        "translator": Sometimes(dict, beside="layer"),
    }
    reconstruction_errors = Returned[Sequence[float]](())
    _paraphraser = Returned[Paraphraser | None](None)
    effect = "the factor loss"
    pairs_argument = "pair"

    def __init__(
        self,
        teacher: Any,
        *,
        pair: Sequence[str] | Literal["auto"] = "auto",
        factor_ratio: float = 0.5,
        weight: float = 500.0,
        pretrain_epochs: int = 6,
        paraphraser: str | os.PathLike[str] | None = None,
        translator_lr: float | None = None,
        student: str | list[str] | None = None,
        teacher_transform: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(teacher, student=student, teacher_transform=teacher_transform, name=name)
        self.pair = _checked_pair(pair)
        self.factor_ratio = check_positive("factor_ratio", factor_ratio)
        self.weight = check_positive("weight", weight)
        self.pretrain_epochs = check_whole("pretrain_epochs", pretrain_epochs, at_least=0)
        self.paraphraser = absolute_path("paraphraser", paraphraser)
        if self.paraphraser is not None and self.pretrain_epochs:
            because = f"paraphraser={shown(self.paraphraser)}, which is trained already"
            tell_without_effect(self, FactorTransferCallback, because, pretrain_epochs=self.pretrain_epochs)
        self.translator_lr = None if translator_lr is None else check_positive("translator_lr", translator_lr)
        self.reconstruction_errors = []
        self._from_file = None if self.paraphraser is None else _read(self.paraphraser, self.factor_ratio)
        self._loaded: dict[str, Any] = {}
        self._translator: OwnedParameters | None = None

    @property
    def given_pairs(self) -> tuple[Pair, ...] | None:
        """The pair that the user gave."""
        return None if self.pair == "auto" else (Pair(*self.pair),)

    def intent(self, trainer: Any, pl_module: Any) -> Intent:
        """As the base; and the strength of the term."""
        intent = super().intent(trainer, pl_module)
        epochs = self.pretrain_epochs if self._from_file is None else 0
        before = f"a paraphraser is trained for {epochs} epochs before the first step"
        notes = (*intent.notes, before) if epochs else intent.notes
        return replace(intent, aims={"weight": self.weight, "factor_ratio": self.factor_ratio}, notes=notes)

    def choose(self, proposals: Sequence[tuple[Stage, Stage]]) -> Sequence[tuple[Stage, Stage]]:
        """The last that is an image, for convolutions."""
        return [pair for pair in proposals if all(len(stage.shape) == 4 for stage in pair)][-1:]

    @property
    def factor_networks(self) -> tuple[Paraphraser, Translator]:
        """Paraphraser and translator, which make the factors of the teacher's and of the student's feature.

        Raises:
            RuntimeError: If no training step has been taken.
        """
        translator = None if self._translator is None else self._translator.module
        if self._paraphraser is None or not isinstance(translator, Translator):
            raise RuntimeError("there are no trained networks yet: they are made when a training starts")
        return self._paraphraser, translator

    def save_paraphraser(self, path: str | os.PathLike[str]) -> None:
        """Write the trained paraphraser to a file, for the argument ``paraphraser`` of other runs.

        Args:
            path: The file; it is written whole or not at all.

        Raises:
            OSError: If it cannot be written.
            RuntimeError: If there is none yet.
        """
        if self._paraphraser is None:
            raise RuntimeError("there is no trained paraphraser yet: it is made when a training starts")
        weights = {key: value.cpu() for key, value in self._paraphraser.state_dict().items()}
        contents = io.BytesIO()
        torch.save({"schema": PARAPHRASER_SCHEMA, "factor_ratio": self.factor_ratio, "weights": weights}, contents)
        write_whole(Path(path), contents.getvalue())

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuse layers that the teacher does not have, and channels that go meanwhile; forget another training."""
        goes_on, proposed = trainer.global_step > 0 and self.has_fitted(pl_module), (self._proposed, self._found)
        super().check(trainer, pl_module)
        self._refuse_shrinking(
            trainer,
            f"the translator of '{self.name}' is made for those of the first step: let them go before it, with start=0 "
            "and schedule='one_shot'",
            fine=lambda until: until == 0,
        )
        if goes_on:
            self._proposed, self._found = proposed
        self._loaded = _networks_of(self.extra_state()) if goes_on else {}
        self._paraphraser, self._translator = None, None
        self.reconstruction_errors = list(self._loaded.get("reconstruction_errors", ()))

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """Capture the student, prepare the teacher, add the term, own the translator."""
        super().attach(controller, stack, trainer, pl_module)
        # The user's seed, so that runs of several seeds differ here too; of the first process, so that ranks agree.
        self._seed = int(trainer.strategy.broadcast(torch.initial_seed()))
        self._translator = self.own(OwnedParameters(Translator, authors_optimizer, seed=self._seed))
        self._translator.load_state_dict(self._loaded.get("translator", {}))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse optimizers that the translator cannot follow."""
        refuse_lbfgs(trainer.optimizers, f"{type(self).__name__} '{self.name}' trains a translator, which")

    def settle(self, trainer: Any, pl_module: Any) -> None:
        """Settle the pair, and get the paraphraser: from the checkpoint, from a file, or by training it."""
        super().settle(trainer, pl_module)
        [pair] = self.settled
        if self._loaded.get("paraphraser"):
            if self._loaded.get("layer", pair.teacher) != pair.teacher:
                raise ValueError(
                    f"the paraphraser was trained on the teacher's layer '{self._loaded['layer']}', and pair names "
                    f"'{pair.teacher}'; go on with the same pair, or begin anew, without this callback's state"
                )
            self._paraphraser = paraphraser_from(
                self._loaded["paraphraser"], self.factor_ratio, argument="the checkpoint"
            )
        elif self._from_file is not None:
            self._paraphraser = paraphraser_from(self._from_file, self.factor_ratio, argument="paraphraser")
        else:
            self._pretrain(trainer, pl_module)

    def owned_lr(self, optimizer: torch.optim.Optimizer) -> float | None:
        """The translator's learning rate in the coming step."""
        return float(optimizer.param_groups[0]["lr"]) if self.translator_lr is None else self.translator_lr

    def extra_state(self) -> dict[str, Any]:
        """The pair, the paraphraser, the translator and its optimizer."""
        if self._paraphraser is None or self._translator is None:
            return {**super().extra_state(), **self._loaded}
        return {
            **super().extra_state(),
            "layer": self._loaded.get("layer", self.settled[0].teacher),
            "paraphraser": self._paraphraser.state_dict(),
            "reconstruction_errors": list(self.reconstruction_errors),
            "translator": self._translator.state_dict(),
        }

    def flaw(self, state: Mapping[str, Any]) -> str | None:
        """As the base; with the translator."""
        return super().flaw(state) or flaw_of_owned(state.get("translator", {}), "translator", authors_optimizer)

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take them back: a resumed run does not train the paraphraser again."""
        super().load_extra_state(state)
        self._loaded = _networks_of(state)
        self.reconstruction_errors = list(self._loaded.get("reconstruction_errors", ()))
        if self._translator is not None:  # FSDP2 restores a fit that has begun, or a file is tested after one
            self._translator.load_state_dict(self._loaded.get("translator", {}))
        if self._paraphraser is not None:
            saved = self._loaded.get("paraphraser")
            self._paraphraser = paraphraser_from(saved, self.factor_ratio, argument="the checkpoint") if saved else None

    def term(self, passes: Mapping[str, Pass]) -> Tensor | None:
        """What it adds to the loss of a training step, weighted."""
        [seen] = passes.values()
        call = self.student_call(seen)
        if call is None:
            return None
        first = self.effects[self.effect] == 0
        loss = self._loss(seen, call, first=first)
        if first and seen.task_loss is not None:
            [pair] = self.settled
            self._tell_strength({f"'{pair.student}' and '{pair.teacher}'": loss * self.weight}, seen.task_loss)
        self.log_quantity("loss", loss.detach(), batch_size=samples_of(call))
        self.effects[self.effect] += 1
        return loss * self.weight

    def measure(self, seen: Pass, call: NetworkCall) -> None:
        """Log what a validation step shows."""
        self.log_quantity("loss", self._loss(seen, call), batch_size=samples_of(call), validation=True)

    def quantities(self) -> tuple[str, ...]:
        """What it logs in validation, once the first step is done."""
        return ("loss",) if self.effects[self.effect] else ()

    def _loss(self, seen: Pass, call: NetworkCall, *, first: bool = False) -> Tensor:
        [(pair, student, teacher)] = self.features(seen, call)
        paraphraser, translator = self._paraphraser, self._translator
        if paraphraser is None or translator is None:
            raise RuntimeError(f"{type(self).__name__} is only active during a fit")
        if first:
            self.check_features(pair, student, teacher)
            self._check_channels(pair, student, teacher)
            paraphraser.to(teacher.device, _helpers_dtype(teacher))
        dtype = _helpers_dtype(student)
        translate = translator.get(student.shape[1], paraphraser.factor_channels, device=student.device, dtype=dtype)
        with torch.no_grad():
            factor = paraphraser.factor(teacher.to(_helpers_dtype(teacher)))
        return F.factor_transfer_loss(translate(student.to(dtype)), factor)

    def _check_channels(self, pair: Pair, student: Tensor, teacher: Tensor) -> None:
        self._check_image("student", pair.student, student)
        self._check_image("teacher", pair.teacher, teacher)
        channels = next(self._paraphraser.parameters()).shape[1] if self._paraphraser is not None else 0
        if teacher.shape[1] != channels:
            raise ValueError(
                f"paraphraser: it was trained on features of {channels} channels, and the layer '{pair.teacher}' of "
                f"the teacher returns {teacher.shape[1]}; it belongs to another layer or teacher"
            )

    def _check_image(self, owner: str, layer: str, feature: Tensor) -> None:
        if feature.ndim != 4:
            raise ValueError(
                f"pair: the layer '{layer}' of the {owner} returns shape {tuple(feature.shape)}, and the convolutions "
                "of factor transfer need (N, C, H, W)"
            )

    # The paraphraser's training

    def _pretrain(self, trainer: Any, pl_module: Any) -> None:
        """Train the paraphraser on what the teacher returns for the training data, in the main run's absence."""
        [pair] = self.settled
        epochs = 0 if self.planning else self.pretrain_epochs
        with (
            self.replayed(trainer) as again,
            sign(trainer, "Pre-training the paraphraser", self._steps(trainer, epochs)) as step,
        ):
            first = next(iter(self._teacher_features(again, pair, trainer, 0)), None)
            if not trainer.strategy.reduce_boolean_decision(first is not None, all=True) or first is None:
                raise CaptureError(
                    "the training step, run on the training data up to its first backward pass, never calls the "
                    f"student '{self._student_name()}', so there is nothing to train a paraphraser on; name the "
                    "network that it calls with student=, or give paraphraser= a file"
                )
            self._check_image("teacher", pair.teacher, first)
            if pl_module.automatic_optimization:
                self._rehearse(again, pair)
            with drawn_from(self._seed + 1):  # not the translator's numbers: they would begin as one network
                paraphraser = Paraphraser(first.shape[1], self.factor_ratio).to(first.device, first.dtype)

            def features(epoch: int) -> Iterable[Tensor]:
                for feature in _in_step(self._teacher_features(again, pair, trainer, epoch), trainer):
                    step()
                    yield feature

            reduce = averaging(trainer)
            self.reconstruction_errors = train_paraphraser(paraphraser, features, epochs=epochs, reduce=reduce)
        self._paraphraser = paraphraser
        if not self.planning:
            self._tell_errors(trainer)

    def _steps(self, trainer: Any, epochs: int) -> int | None:
        """Batches of the pre-training, if that is known."""
        batches = _compat.batches_an_epoch(trainer)
        return None if batches == float("inf") else epochs * int(batches)

    def _rehearse(self, again: Replay, pair: Pair) -> None:
        """Refuse a layer of the student that the first step would refuse, before the paraphraser is trained for it."""
        controller = self._require_controller()
        _, arguments = again.first_received(self._students())
        layers = controller.layers_of(lambda: again.outputs(self._students(), arguments))
        self._check_image("student", pair.student, self._students_tensor(layers, pair))

    def _tell_errors(self, trainer: Any) -> None:
        """Log the errors of the pre-training, after it: meanwhile the loggers are silent."""
        for epoch, error in enumerate(self.reconstruction_errors):
            self.tracker(trainer).numbers({f"compress/{self.name}/reconstruction": error}, step=epoch)
        if not self.reconstruction_errors:
            self._warn_once("pretrain_epochs=0 leaves the paraphraser random, so its factors say little of the teacher")
        elif self.reconstruction_errors[-1] > POOR:
            self._warn_once(
                f"the paraphraser's error is still {self.reconstruction_errors[-1]:.2f} of the teacher's feature, so "
                "it has learned next to nothing; more pretrain_epochs, or another layer, may help"
            )

    def _teacher_features(self, again: Replay, pair: Pair, trainer: Any, epoch: int) -> Iterator[Tensor]:
        """What the teacher's layer returns for each training batch."""
        teacher = self._shared_teacher()
        for arguments in again.batches(epoch):
            _compat.stop_if_terminated(trainer)
            call = again.received(self._students(), arguments)
            if call is None:
                continue
            with trainer.precision_plugin.train_step_context():
                feature = self._tensor(
                    pair.teacher, teacher.layer(call, pair.teacher, argument=self.pairs_argument), "teacher"
                )
            teacher.forget()
            yield feature.to(_helpers_dtype(feature))


def _in_step(features: Iterator[Tensor], trainer: Any) -> Iterator[Tensor]:
    """As long as every process has one: each averages its gradients with those of the others."""
    for feature in features:
        if trainer.world_size > 1 and not trainer.strategy.reduce_boolean_decision(True, all=True):
            return
        yield feature
    if trainer.world_size > 1:
        trainer.strategy.reduce_boolean_decision(False, all=True)


def _networks_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a state holds of the two networks."""
    return {key: state[key] for key in ("layer", "paraphraser", "reconstruction_errors", "translator") if key in state}


def _helpers_dtype(feature: Tensor) -> torch.dtype:
    """Helpers are trained in float32 or better, whatever the features come in."""
    return torch.promote_types(feature.dtype, torch.float32)


def _read(path: str, factor_ratio: float) -> dict[str, Tensor]:
    """The weights in a file; whether they are those of a paraphraser is checked here, before any training."""
    if not Path(path).is_file():
        raise ValueError(
            f"paraphraser names '{path}', which is no file; FactorTransferCallback.save_paraphraser writes one"
        )
    saved = read_saved(path, "paraphraser", trusted="save its state_dict() instead")
    argument = f"paraphraser: '{path}'"
    own = isinstance(saved, dict) and "weights" in saved  # otherwise the weights of a Paraphraser that the user trained
    if own and (wrong := damage(saved, {"schema": int, "factor_ratio": float, "weights": Each(Tensor)})):
        raise ValueError(f"{argument} is damaged: {wrong}")
    if own and saved["schema"] > PARAPHRASER_SCHEMA:
        raise ValueError(
            f"{argument} has schema {saved['schema']}, newer than {PARAPHRASER_SCHEMA}, the newest that this version "
            "of lightning_compress reads; upgrade the package"
        )
    if own and saved["factor_ratio"] != factor_ratio:
        raise ValueError(
            f"{argument} has factor_ratio={saved['factor_ratio']}, and factor_ratio={factor_ratio} was given"
        )
    state: dict[str, Tensor] = saved["weights"] if own else saved
    paraphraser_from(state, factor_ratio, argument=argument)
    return state


def _checked_pair(pair: Any) -> Any:
    if is_auto(pair):
        return pair
    names = list(pair) if isinstance(pair, (list, tuple)) else []
    if len(names) != 2 or not all(isinstance(name, str) for name in names):
        raise ValueError(
            "pair must be 'auto', or the name of a layer inside the student and of one inside the teacher, such as "
            f"('layer3', 'layer4'); got {shown(pair)}"
        )
    return names
