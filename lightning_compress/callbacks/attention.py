"""Attention transfer: the student learns to look where the teacher looks.

Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv:1612.03928. The default follows the
authors' code: the mean squared difference of unit-length maps; ``mode="paper"`` is the equation. Attention by
gradients, ``map_kind="gradient"``, is in the paper only.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from matplotlib.image import imsave
from torch import Tensor, nn

from lightning_compress import _compat
from lightning_compress import functional as F
from lightning_compress.callbacks.arguments import (
    check_choice,
    check_positive,
    check_whole,
    default_of,
    is_auto,
    shown,
)
from lightning_compress.callbacks.base import callbacks_of
from lightning_compress.callbacks.features import FeatureCallback, Pair
from lightning_compress.callbacks.intents import Intent
from lightning_compress.callbacks.teaching import samples_of
from lightning_compress.functional import attention
from lightning_compress.mechanisms.capture import NetworkCall
from lightning_compress.mechanisms.input_gradients import (
    check_comparable,
    check_differentiable_twice,
    input_gradient,
    loss_of_teacher,
)
from lightning_compress.mechanisms.optimizers import loss_scale
from lightning_compress.mechanisms.passes import Pass
from lightning_compress.mechanisms.selection import find_module
from lightning_compress.mechanisms.stages import Stage
from lightning_compress.mechanisms.step import StepController
from lightning_compress.report.attention import MapPair, attention_picture
from lightning_compress.report.pictures import report_picture
from lightning_compress.report.table import Picture

PICTURED = 4  # samples in a picture

MapKind = Literal[attention.MapKind, "gradient"]
Mode = Literal["code", "paper"]


class AttentionTransferCallback(FeatureCallback):
    """Let layers of the student attend to the same positions as layers of a teacher.

    When it acts: when the training starts, where it proposes the pairs on one batch if none were given, and in every
    training step, where it adds its term to the loss. In validation it only measures. Logged are
    ``compress/<name>/loss``, the weighted term, and ``val_loss``. The first batch shows each pair's term beside the
    task loss.

    What it leaves alone: the module's parameters, keys, optimizer and steps. The teacher is in no checkpoint.

    Args:
        teacher: A module; in YAML a ``class_path``; or the name of a callback that has it ("kd").
        pairs: Layer inside the student to layer inside the teacher, shallow to deep. "auto": ends of stages.
        map_kind: Of a layer's channels, or "gradient": of the task loss by the input, which takes no pairs.
        power: Exponent of "power" and "max", positive.
        weight: The authors' convention (1000). "auto": their strength at any resolution, for mode "code".
        strength: Factor of the weight "auto", positive.
        mode: "code": mean squared difference; "paper": half the norm of the difference.
        drop_tokens: Leading tokens to leave out of ``(N, L, D)`` features: 1 for a class token.
        pictures_every_n_epochs: Draw both maps of the first validation samples, for loggers, else as PNG files.
        student: Dotted name of the network, or two: the ends of a chain. None: found in the first step.
        teacher_transform: Module applied to the inputs before the teacher.
        name: As in the base class; default "at".

    Raises:
        TypeError, ValueError: If an argument is outside of what is said above, or the teacher cannot be built.

    Example:
        >>> from torch import nn
        >>> callback = AttentionTransferCallback(nn.Conv2d(1, 4, 3), pairs={"features.3": "layer4"})
        >>> callback.state_key
        'AttentionTransferCallback[at]'
    """

    default_name = "at"
    effect = "the attention loss"

    def __init__(
        self,
        teacher: Any,
        *,
        pairs: dict[str, str] | Literal["auto"] = "auto",
        map_kind: MapKind = "power",
        power: float = 2.0,
        weight: float | Literal["auto"] = "auto",
        strength: float = 1.0,
        mode: Mode = "code",
        drop_tokens: int = 0,
        pictures_every_n_epochs: int | None = None,
        student: str | list[str] | None = None,
        teacher_transform: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(teacher, student=student, teacher_transform=teacher_transform, name=name)
        check_choice("map_kind", map_kind, get_args(MapKind))
        check_choice("mode", mode, get_args(Mode))
        self.pairs = _checked_pairs(pairs)
        self.weight, self.strength = _checked_weight(weight, strength, mode, map_kind)
        self.power = check_positive("power", power)
        if power != default_of(AttentionTransferCallback, "power") and map_kind not in ("power", "max"):
            raise ValueError(f"power={power} has no effect with map_kind='{map_kind}': only 'power' and 'max' use it")
        self.drop_tokens = check_whole("drop_tokens", drop_tokens, at_least=0)
        if pictures_every_n_epochs is not None:
            pictures_every_n_epochs = check_whole("pictures_every_n_epochs", pictures_every_n_epochs, at_least=1)
        if map_kind == "gradient" and (not is_auto(pairs) or drop_tokens or pictures_every_n_epochs):
            raise ValueError(
                "pairs, drop_tokens and pictures_every_n_epochs have no effect with map_kind='gradient', which "
                "compares no layers"
            )
        self.map_kind = map_kind
        self.mode = mode
        self.pictures_every_n_epochs = pictures_every_n_epochs
        self.teacher_goes_first = map_kind != "gradient"
        self._pictured: int | None = None  # the last epoch that has its picture
        self._mapped: int | None = None  # the step of the validation whose maps are kept
        self._last_maps: tuple[Tensor | None, list[MapPair]] | None = None
        self._directory: Path | None = None

    @property
    def given_pairs(self) -> tuple[Pair, ...] | None:
        """The pairs that the user gave; attention by gradients has none."""
        if self.map_kind == "gradient":
            return ()
        return None if self.pairs == "auto" else tuple(Pair(*names) for names in self.pairs.items())

    def intent(self, trainer: Any, pl_module: Any) -> Intent:
        """As the base; and the strength of the term."""
        intent = super().intent(trainer, pl_module)
        aims = {"weight": self.weight, "map_kind": self.map_kind, "mode": self.mode}
        again = ("the loss is differentiated twice",) if self.map_kind == "gradient" else ()
        return replace(intent, aims=aims, notes=(*intent.notes, *again))

    def choose(self, proposals: Sequence[tuple[Stage, Stage]]) -> Sequence[tuple[Stage, Stage]]:
        """All of them."""
        return proposals

    def problem_with_shards(self) -> str | None:
        """FSDP2 hooks into the backward pass; its gradients have no graph of their own."""
        if self.map_kind == "gradient":
            return "map_kind='gradient' differentiates twice; choose another map_kind, or use one device or DDP"
        return super().problem_with_shards()

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuse layers that the teacher does not have, and steps that cannot be run with another network."""
        super().check(trainer, pl_module)
        if self.map_kind != "gradient":
            return
        compiled = _compat.compiled_state(pl_module) is not None
        if compiled or any(_compat.is_compiled(part) for part in pl_module.modules()):
            raise ValueError("map_kind='gradient' differentiates twice, which compiled code does not allow")

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """Capture the student, prepare the teacher, add the term."""
        super().attach(controller, stack, trainer, pl_module)
        if self.map_kind == "gradient":
            stack.enter_context(controller.repeated_passes(self.name))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """See to it that pictures have samples and a place."""
        self._pictured = self._mapped = self._last_maps = None
        if self.pictures_every_n_epochs is None:
            return
        if not trainer.enable_validation:
            raise ValueError(
                f"pictures_every_n_epochs={self.pictures_every_n_epochs} needs validation samples, and this fit has no "
                "validation"
            )
        # On every rank: reading the log directory is a broadcast.
        self._directory = Path(trainer.log_dir or trainer.default_root_dir) / f"attention-{self.name}"

    def settle(self, trainer: Any, pl_module: Any) -> None:
        """Find the student and the pairs; attention by gradients wants the student's inputs instead."""
        super().settle(trainer, pl_module)
        if self.map_kind == "gradient" and self.student_capture is not None:
            self.student_capture.differentiable_inputs()

    def term(self, passes: Mapping[str, Pass]) -> Tensor | None:
        """What it adds to the loss of a training step, weighted."""
        [seen] = passes.values()
        call = self.student_call(seen)
        if call is None:
            return None
        first = self.effects[self.effect] == 0
        terms = (
            self._gradient_term(seen, call, first) if self.map_kind == "gradient" else self._terms(seen, call, first)
        )
        total = functools.reduce(torch.add, terms.values())
        if first and seen.task_loss is not None:
            self._tell_strength(terms, seen.task_loss)
        self.log_quantity("loss", total.detach(), batch_size=samples_of(call))
        self.effects[self.effect] += 1
        return total

    def measure(self, seen: Pass, call: NetworkCall) -> None:
        """Log what a validation step shows."""
        terms = self._terms(seen, call, first=False)
        total = functools.reduce(torch.add, terms.values())
        self.log_quantity("loss", total, batch_size=samples_of(call), validation=True)
        every, epoch, step = self.pictures_every_n_epochs, self._trainer.current_epoch, self._trainer.global_step
        wanted = every is not None or any(own.embed_pictures for own in callbacks_of(self._trainer))
        if not wanted or step == self._mapped or not self._trainer.is_global_zero:
            return
        self._mapped, self._last_maps = step, self._maps_of(seen, call)
        if every is not None and (self._pictured is None or epoch - self._pictured >= every):
            self._pictured = epoch
            if not self._trainer.fast_dev_run:
                self._picture(epoch, *self._last_maps)

    def pictures(self) -> list[Picture]:
        """The maps of the first samples of the last validation."""
        if self._last_maps is None:
            return []
        legend = "Samples of the last validation; bright is where a network looks."
        drawn = attention_picture(*self._last_maps)
        return [report_picture(f"{self.name}: where teacher and student look", legend, drawn)]

    def _maps_of(self, seen: Pass, call: NetworkCall) -> tuple[Tensor | None, list[MapPair]]:
        """The first samples, if they are images, and their maps, on the CPU."""
        pairs = []
        for pair, student, teacher in self.features(seen, call):
            maps = [self._maps(self._without_tokens(pair, feature[:PICTURED])) for feature in (student, teacher)]
            pairs.append(MapPair(pair.student, pair.teacher, *(own.detach().cpu() for own in maps)))
        images = next((tensor for tensor in call.tensors if tensor.ndim == 4), None)
        return None if images is None else images[:PICTURED].detach().cpu().clone(), pairs

    def _picture(self, epoch: int, images: Tensor | None, pairs: Sequence[MapPair]) -> None:
        """Draw the maps, and give the picture to whoever takes it."""
        picture = attention_picture(images, pairs)
        tracker = self.tracker(self._trainer)
        tracker.picture(f"compress/{self.name}/attention", picture)
        if not tracker.takes_pictures and self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            imsave(self._directory / f"epoch={epoch}.png", picture)

    def _maps(self, feature: Tensor) -> Tensor:
        """Maps (N, H, W), or (N, L) of tokens."""
        maps = F.attention_map(feature, self.power, self._kind())
        return maps if feature.ndim == 3 else maps.reshape(len(feature), *feature.shape[2:])

    def quantities(self) -> tuple[str, ...]:
        """What it logs in validation, once the first step is done."""
        measured = self.map_kind != "gradient" and self.effects[self.effect] > 0
        return ("loss",) if measured else ()

    def _terms(self, seen: Pass, call: NetworkCall, first: bool) -> dict[str, Tensor]:
        """The weighted term of each pair."""
        terms = {}
        tokens = False
        for depth, (pair, student, teacher) in enumerate(reversed(list(self.features(seen, call)))):
            if first:
                self.check_features(pair, student, teacher)
                self._check_layout(pair, student, teacher)
            tokens |= 3 in (student.ndim, teacher.ndim)
            student, teacher = self._without_tokens(pair, student), self._without_tokens(pair, teacher)
            try:
                loss = F.attention_transfer_loss(student, teacher, self.power, self._kind(), self.mode)
            except ValueError as error:
                raise ValueError(f"pairs: '{pair.student}' and '{pair.teacher}' cannot be compared: {error}") from error
            if first and min(_positions(student), _positions(teacher)) == 1:
                raise ValueError(
                    f"pairs: the maps of '{pair.student}' and '{pair.teacher}' are of one position, of shapes "
                    f"{tuple(student.shape)} and {tuple(teacher.shape)}, and so always equal; choose earlier layers"
                )
            terms[f"'{pair.student}' and '{pair.teacher}'"] = loss * self._weight(student, teacher, depth)
        if first and self.drop_tokens and not tokens:
            raise ValueError(f"drop_tokens={self.drop_tokens} has no effect: no layer returns tokens (N, L, D)")
        return dict(reversed(terms.items()))

    def _check_layout(self, pair: Pair, student: Tensor, teacher: Tensor) -> None:
        """Refuse what 1-D convolutions make: it would be taken for tokens, and its channels for positions."""
        root = self._require_controller().module
        ours = find_module(root, self._full_name(pair), argument="pairs")
        theirs = find_module(self.own_teacher(), pair.teacher, argument="pairs")
        for layer, module, feature in ((pair.student, ours, student), (pair.teacher, theirs, teacher)):
            made_by = [part for part in module.modules() if isinstance(part, (nn.Conv1d, nn.BatchNorm1d))]
            channels = {part.out_channels if isinstance(part, nn.Conv1d) else part.num_features for part in made_by}
            if feature.ndim == 3 and feature.shape[1] in channels:
                raise ValueError(
                    f"pairs: the layer '{layer}' returns shape {tuple(feature.shape)}, (N, C, L) of a 1-D convolution; "
                    "attention is for images (N, C, H, W) and for tokens (N, L, D)"
                )

    def _weight(self, student: Tensor, teacher: Tensor, depth: int) -> float:
        if self.weight == "auto":
            positions = min(_positions(student), _positions(teacher))
            return self.strength * F.attention_transfer_weight(positions, depth)
        return self.weight / 2 if self.mode == "paper" else self.weight

    def _kind(self) -> attention.MapKind:
        if self.map_kind == "gradient":
            raise RuntimeError("attention by gradients has no maps")
        return self.map_kind

    def _without_tokens(self, pair: Pair, feature: Tensor) -> Tensor:
        if not self.drop_tokens or feature.ndim != 3:
            return feature
        if feature.shape[1] <= self.drop_tokens:
            raise ValueError(
                f"drop_tokens={self.drop_tokens} leaves nothing of the {feature.shape[1]} tokens of "
                f"'{pair.student}' and '{pair.teacher}'"
            )
        return feature[:, self.drop_tokens :]

    def _gradient_term(self, seen: Pass, call: NetworkCall, first: bool) -> dict[str, Tensor]:
        if seen.task_loss is None or self.weight == "auto":
            raise RuntimeError("attention by gradients needs a task loss and a number as its weight")
        if seen.again is None:
            raise RuntimeError(
                f"map_kind='gradient' of '{self.name}' runs the step once more, with the teacher: give compressed_loss "
                "a function that computes the loss, lambda: ..."
            )
        module = self._require_controller().module
        scale = loss_scale(self._trainer)
        student = input_gradient(seen.task_loss, call, "student", create_graph=True, scale=scale)
        network = find_module(module, self._student_name(), argument="student")
        loss, given = loss_of_teacher(seen, network, self._shared_teacher().teacher)
        if first:
            check_comparable(call, given, loss)
        teacher = input_gradient(loss, given, "teacher", create_graph=False, scale=scale)
        term = F.gradient_transfer_loss(student, teacher) * (self.weight / 2)
        if first:
            check_differentiable_twice(term, module)
        return {"the input gradients": term}


def _positions(feature: Tensor) -> int:
    return feature.shape[1] if feature.ndim == 3 else feature.shape[2:].numel()


def _checked_pairs(pairs: Any) -> Any:
    if is_auto(pairs):
        return pairs
    if (
        not isinstance(pairs, Mapping)
        or not pairs
        or not all(isinstance(name, str) for pair in pairs.items() for name in pair)
    ):
        raise ValueError(
            "pairs must be 'auto', or a dict from a layer inside the student to a layer inside the teacher, such as "
            f"{{'layer3': 'layer4'}}; got {shown(pairs)}"
        )
    return dict(pairs)


def _checked_weight(weight: Any, strength: Any, mode: str, map_kind: str) -> tuple[float | Literal["auto"], float]:
    strength = check_positive("strength", strength)
    if is_auto(weight):
        if mode == "paper" or map_kind == "gradient":
            raise ValueError(
                f"weight='auto' is the strength of mode 'code' on maps; with mode='{mode}' and map_kind='{map_kind}' "
                "give a number"
            )
        return "auto", strength
    weight = check_positive("weight", weight, "'auto' or a positive number")
    if strength != default_of(AttentionTransferCallback, "strength"):
        raise ValueError(f"strength={strength} has no effect with weight={weight}: multiply the weight by it")
    return weight, strength
