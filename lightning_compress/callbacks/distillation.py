"""Knowledge distillation: the student learns from the teacher's soft targets.

Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531. The loss is
``task_weight * task_loss + kd_weight * T^2 * KL(softmax(z_T / T) || softmax(z_S / T))``; later forms are the other
values of ``loss_kind``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_compress import functional as F
from lightning_compress.callbacks.arguments import (
    check_at_least_zero,
    check_choice,
    check_dimension,
    check_locator,
    check_positive,
    shown,
    tell_without_effect,
)
from lightning_compress.callbacks.base import log
from lightning_compress.callbacks.intents import Intent
from lightning_compress.callbacks.teaching import TeacherCallback
from lightning_compress.mechanisms.capture import NetworkCall
from lightning_compress.mechanisms.outputs import Locator, class_dimension, find_labels, find_logits
from lightning_compress.mechanisms.passes import Pass
from lightning_compress.mechanisms.step import StepController

LossKind = Literal["auto", "softmax", "bernoulli", "mse", "hard", "dkd", "dist"]
PER_ELEMENT = ("bernoulli", "mse")
WITHOUT_TEMPERATURE = ("mse", "hard")


class DistillationCallback(TeacherCallback):
    """Distil a teacher into the network that is being trained.

    When it acts: in every training step, where it adds its term to the loss; in validation it only measures. The
    user's logged loss stays the task loss; logged are ``compress/<name>/loss`` (unweighted) and ``agreement`` (the
    share of predictions in which student and teacher agree), with ``val_`` before them in validation.

    What it leaves alone: the module's parameters, keys, optimizer and steps. The teacher is in no checkpoint.

    Args:
        teacher: A module; in YAML a ``class_path`` with ``init_args``: a class, or a function such as
            ``lightning_compress.teacher_from_checkpoint``.
        student: Dotted name of the network, or two: the ends of a chain. None: found in the first step.
        output: Key, attribute or index of the logits in what networks return. None: ``logits``, ``out``, or the only
            tensor.
        teacher_transform: Module applied to the inputs before the teacher.
        temperature: Temperature, positive.
        task_weight: Weight of the task loss.
        kd_weight: Weight of the distillation loss; both are at least 0.
        loss_kind: "softmax", "bernoulli" (a logit per label), "mse", "hard" (the teacher's argmax), "dkd"
            (arXiv:2203.08679), "dist" (arXiv:2205.10536); "auto": "softmax" where the shape allows.
        class_dim: Dimension of the classes. None: the last of (N, L, K), else 1.
        ignore_index: Label whose positions carry no term. None: all do.
        labels: Key, attribute or index of the labels in the batch, for ``ignore_index`` and "dkd". None: found by
            shape.
        name: As in the base class; default "kd".

    Raises:
        TypeError, ValueError: If an argument is outside of what is said above, or the teacher cannot be built.

    Example:
        >>> from torch import nn
        >>> callback = DistillationCallback(nn.Linear(4, 2), temperature=2.0)
        >>> callback.state_key
        'DistillationCallback[kd]'
    """

    default_name = "kd"
    effect = "the distillation loss"

    def __init__(
        self,
        teacher: Any,
        *,
        student: str | list[str] | None = None,
        output: Locator = None,
        teacher_transform: Any = None,
        temperature: float = 4.0,
        task_weight: float = 0.1,
        kd_weight: float = 0.9,
        loss_kind: LossKind = "auto",
        class_dim: int | None = None,
        ignore_index: int | None = None,
        labels: Locator = None,
        name: str | None = None,
    ) -> None:
        super().__init__(teacher, student=student, teacher_transform=teacher_transform, name=name)
        check_choice("loss_kind", loss_kind, get_args(LossKind))
        check_locator("output", output)
        check_locator("labels", labels)
        if labels is not None and ignore_index is None and loss_kind != "dkd":
            raise ValueError(f"labels={labels!r} has no effect: only ignore_index and loss_kind='dkd' look at labels")
        if class_dim is not None and loss_kind in PER_ELEMENT:
            raise ValueError(
                f"class_dim is for losses over classes only; got {shown(class_dim)} with loss_kind={loss_kind!r}"
            )
        self.output = output
        self.temperature = check_positive("temperature", temperature)
        if loss_kind in WITHOUT_TEMPERATURE:
            tell_without_effect(self, DistillationCallback, f"loss_kind='{loss_kind}'", temperature=self.temperature)
        self.task_weight = check_at_least_zero("task_weight", task_weight)
        self.kd_weight = check_at_least_zero("kd_weight", kd_weight)
        if task_weight == 0 and kd_weight == 0:
            raise ValueError("task_weight and kd_weight are both 0, so nothing would be learned; one must be positive")
        if kd_weight == 0:
            warnings.warn("kd_weight is 0: the teacher is measured but not learned from", stacklevel=2)
        self.loss_kind = loss_kind
        self.class_dim = check_dimension("class_dim", class_dim)
        self.ignore_index = check_dimension("ignore_index", ignore_index)
        self.labels = labels
        self._kind: str | None = None

    def intent(self, trainer: Any, pl_module: Any) -> Intent:
        """As the base; and the weights of the losses."""
        aims = {"temperature": self.temperature, "task_weight": self.task_weight, "kd_weight": self.kd_weight}
        return replace(super().intent(trainer, pl_module), aims={**aims, "loss_kind": self._kind or self.loss_kind})

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """Capture the student, prepare the teacher, add the term."""
        self._kind = None
        super().attach(controller, stack, trainer, pl_module)
        stack.enter_context(controller.task_weight(self.name, self.task_weight))

    def term(self, passes: Mapping[str, Pass]) -> Tensor | None:
        """What it adds to the loss of a training step, weighted."""
        [seen] = passes.values()
        call = self.student_call(seen)
        if call is None:
            return None
        student, teacher = self._logits(call)
        first = self.effects[self.effect] == 0
        if first:
            self._check_first(student, teacher)
        mask, labels = self._targets(seen.batch, student)
        loss = self._loss(student, teacher, mask, labels)
        self._log(loss, student, teacher, mask, validation=False)
        self.effects[self.effect] += 1
        return loss * self.kd_weight

    def measure(self, seen: Pass, call: NetworkCall) -> None:
        """Log what a validation step shows."""
        student, teacher = self._logits(call)
        mask, labels = self._targets(seen.batch, student)
        self._log(self._loss(student, teacher, mask, labels), student, teacher, mask, validation=True)

    def quantities(self) -> tuple[str, ...]:
        """What it logs in validation, once the first step is done."""
        if self._kind is None:  # settled in the first step
            return ()
        return ("loss",) if self._kind == "mse" else ("loss", "agreement")

    def _logits(self, call: NetworkCall) -> tuple[Tensor, Tensor]:
        student = find_logits(call.output, self.output, owner="student")
        teacher = find_logits(self._shared_teacher()(call), self.output, owner="teacher")
        if student.shape != teacher.shape:
            raise ValueError(
                f"the teacher's logits have shape {tuple(teacher.shape)} and those of the student "
                f"'{self._student_name()}' {tuple(student.shape)}; they must be equal: another number of classes, "
                "another resolution (teacher_transform), another part of the output (output), or another student?"
            )
        return student, teacher

    def _targets(self, batch: Any, student: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The mask of positions that carry a term, and the labels, each only where it is needed."""
        if self.ignore_index is None and self._kind != "dkd":
            return None, None
        dimension = self._dimension(student)
        shape = [size for index, size in enumerate(student.shape) if index != dimension]
        why = "loss_kind='dkd'" if self.ignore_index is None else f"ignore_index={self.ignore_index}"
        labels = find_labels(batch, self.labels, shape=shape, why=why)
        return None if self.ignore_index is None else labels != self.ignore_index, labels

    def _dimension(self, logits: Tensor) -> int | None:
        """Dimension of the classes; None where each logit stands alone."""
        return None if self._kind in PER_ELEMENT else class_dimension(logits, self.class_dim)

    def _loss(self, student: Tensor, teacher: Tensor, mask: Tensor | None, labels: Tensor | None) -> Tensor:
        if self._kind == "bernoulli":
            return F.bernoulli_distillation_loss(student, teacher, self.temperature, mask=mask)
        if self._kind == "mse":
            return F.regression_distillation_loss(student, teacher, mask=mask)
        dimension = self._dimension(student)
        if dimension is None:
            raise RuntimeError(f"loss kind {self._kind} has no class dimension")
        if self._kind == "hard":
            return F.hard_distillation_loss(student, teacher, class_dim=dimension, mask=mask)
        if self._kind == "dist":
            return F.dist_loss(student, teacher, self.temperature, class_dim=dimension, mask=mask)
        if self._kind == "dkd" and labels is not None:
            return F.decoupled_distillation_loss(
                student, teacher, labels, self.temperature, class_dim=dimension, mask=mask
            )
        return F.distillation_loss(student, teacher, self.temperature, class_dim=dimension, mask=mask)

    def _check_first(self, student: Tensor, teacher: Tensor) -> None:
        """Settle the kind of loss, and refuse numbers that would spoil the student."""
        for owner, logits in (("student", student), ("teacher", teacher)):
            if not bool(logits.isfinite().all()):
                raise ValueError(f"the {owner}'s logits hold NaN or infinity in the first step")
        if not student.requires_grad:
            raise ValueError(
                "the student's logits carry no gradient, so nothing could be learned from the teacher: is the student "
                "frozen, run under no_grad, or inside of activation checkpointing with use_reentrant=True?"
            )
        self._kind = "softmax" if self.loss_kind == "auto" else self.loss_kind
        log.info(
            "%s: student '%s' (%s for the LightningModule itself), loss_kind %s, classes in dimension %s of %s",
            self.name,
            self._student_name(),
            "''",
            self._kind,
            self._dimension(student),
            tuple(student.shape),
        )

    def _log(self, loss: Tensor, student: Tensor, teacher: Tensor, mask: Tensor | None, *, validation: bool) -> None:
        positions = student.shape[0] if student.ndim else 1
        if validation:  # the weight of this batch in the mean over all: its positions, a row of pixels or tokens each
            dimension = self._dimension(student)
            of_one = student.numel() if dimension is None else student.numel() // student.shape[dimension]
            positions = of_one if mask is None else int(mask.sum())
            if positions == 0 and not self._many_ranks():
                return
        self.log_quantity("loss", loss.detach(), batch_size=positions, validation=validation)
        if self._kind != "mse":
            agreement = F.teacher_agreement(student.detach(), teacher, class_dim=self._dimension(student), mask=mask)
            self.log_quantity("agreement", agreement, batch_size=positions, validation=validation)
