"""What callbacks with a teacher share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from lightning_compress.callbacks.arguments import check_names
from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.intents import Intent
from lightning_compress.mechanisms.capture import CaptureError, NetworkCall
from lightning_compress.mechanisms.controller import StepController
from lightning_compress.mechanisms.loading import build_module
from lightning_compress.mechanisms.passes import Pass, Term
from lightning_compress.mechanisms.selection import did_you_mean
from lightning_compress.mechanisms.teacher import SharedTeacher


class TeacherCallback(CompressionCallback):
    """Base of the callbacks that add a term which a teacher gives.

    Args:
        teacher: As in the callback that inherits; or the name of another callback in the Trainer, whose teacher, and
            transform, this one shares, and so its forward too.
        student: Dotted name of the student, or the ends of a chain. None: found.
        teacher_transform: Module applied to the student's inputs before the teacher.
        name: As in the base class.

    Raises:
        TypeError, ValueError: If one of them cannot be built.
    """

    changes_step = True
    effect = "the term"
    """What the term is called in messages, and where it is counted."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The term is an effect that must be there."""
        super().__init_subclass__(**kwargs)
        cls.expected_effects = (cls.effect,)

    networks_in_arguments = ("teacher", "teacher_transform")
    """Arguments that may describe a network to be built."""

    teacher_goes_first = True
    """Whether the teacher runs just before the student: not where its output for the step alone is of no use."""

    def __init__(
        self,
        teacher: Any,
        *,
        student: str | list[str] | None = None,
        teacher_transform: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self._teacher_of = teacher if isinstance(teacher, str) and teacher and "." not in teacher else None
        if self._teacher_of is not None and teacher_transform is not None:
            raise ValueError(
                f"teacher_transform has no effect with teacher='{teacher}': it is that of the callback which is named"
            )
        self.teacher = None if self._teacher_of is not None else build_module(teacher, argument="teacher")
        self.teacher_transform = (
            None if teacher_transform is None else build_module(teacher_transform, argument="teacher_transform")
        )
        self.student = check_names("student", student)
        self._run_teacher: SharedTeacher | None = None

    @property
    def teacher_network(self) -> nn.Module | None:
        """The teacher."""
        return self.teacher

    def intent(self, trainer: Any, pl_module: Any) -> Intent:
        """Who learns from whom; the student is known after the first step."""
        names = None if self.student_capture is None else self.student_capture.names
        who, other = type(self.own_teacher()).__name__, self._teacher_of
        notes = f"the teacher is a {who}" if other is None else f"the teacher, a {who}, runs for '{other}' already"
        return Intent(type(self).__name__, student=names or (), teachers=int(other is None), notes=(notes,))

    def enter(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Find the teacher, if another callback has it."""
        if stage == "fit" and self._teacher_of is not None:
            other = self._owner(trainer)
            self.teacher, self.teacher_transform = other.teacher, other.teacher_transform

    def _owner(self, trainer: Any) -> TeacherCallback:
        """The callback whose teacher this one shares."""
        others = {other.name: other for other in trainer.callbacks if isinstance(other, TeacherCallback)}
        owners = {name: other for name, other in others.items() if other._teacher_of is None}
        if self._teacher_of not in owners:
            raise ValueError(
                f"teacher='{self._teacher_of}' is neither a module, nor the path of a class, nor the name of a "
                f"callback in this Trainer that has a teacher of its own; there are {sorted(owners) or 'none'}"
                f"{did_you_mean(str(self._teacher_of), owners)}"
            )
        return owners[self._teacher_of]

    def own_teacher(self) -> nn.Module:
        """The teacher, once it is known.

        Raises:
            RuntimeError: If it is that of another callback, and no fit has begun.
        """
        if self.teacher is None:
            raise RuntimeError(f"{type(self).__name__} shares the teacher of '{self._teacher_of}', known in a fit")
        return self.teacher

    def problem_with_shards(self) -> str | None:
        """None: each rank has all of the teacher, and what layers return is whole."""
        return None

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """Capture the student, prepare the teacher, add the term."""
        self.student_capture = controller.capture(self.student)
        self._run_teacher = controller.teacher(
            self.own_teacher(),
            self.teacher_transform,
            student=self.student_capture if self.teacher_goes_first else None,
            device=pl_module.device,
            convert=trainer.precision_plugin.convert_module,
        )
        stack.callback(setattr, self, "_run_teacher", None)
        lesson = self.follow_lessons(stack, trainer, pl_module)
        stack.enter_context(controller.term(Term(self.name, self.term, student=self.student_capture, lesson=lesson)))
        stack.enter_context(controller.observer(self._observe))

    @abstractmethod
    def term(self, passes: Mapping[str, Pass]) -> Tensor | None:
        """The weighted term of a training step."""

    @abstractmethod
    def measure(self, seen: Pass, call: NetworkCall) -> None:
        """Log what a validation step shows."""

    @abstractmethod
    def quantities(self) -> tuple[str, ...]:
        """Names of what :meth:`measure` logs; empty while nothing can be measured yet."""

    def _observe(self, seen: Pass) -> None:
        """Measure a validation step; what is only measured is no reason to stop a training."""
        if not self.quantities() or self.student_capture is None:  # the sanity check comes before the first step
            return
        calls = seen.calls.get(self.student_capture, ())
        if len(calls) != 1:
            self._warn_once(f"validation calls the student {len(calls)} times a step, not once, so it is not measured")
            self._log_nothing()
            return
        try:
            self.measure(seen, calls[0])
        except Exception as error:  # outputs in evaluation may be of another form than in training
            self._warn_once(f"validation is not measured: {error}")
            self._log_nothing()

    def _log_nothing(self) -> None:
        """Take part in what the other ranks log, with a weight of 0."""
        if self._many_ranks():
            for quantity in self.quantities():
                self.log_quantity(quantity, 0.0, batch_size=0, validation=True)

    def _many_ranks(self) -> bool:
        """Whether a value that is left out would be missed: all ranks log, or none, as logging is collective."""
        module: Any = self._require_controller().module
        return int(module.trainer.world_size) > 1

    def student_call(self, seen: Pass) -> NetworkCall | None:
        """The student's call in a training step; a step without one is an error if there has been none so far."""
        call = None if self.student_capture is None else seen.call(self.student_capture)
        if call is None:
            message = f"the training step returned a loss without calling the student '{self._student_name()}', so "
            message += f"{self.effect} has no effect"
            if self.effects[self.effect] == 0:
                raise CaptureError(f"{message}; name the network that it calls with student=")
            self._warn_once(message)
        return call

    def _shared_teacher(self) -> SharedTeacher:
        if self._run_teacher is None:
            raise RuntimeError(f"{type(self).__name__} is only active during a fit")
        return self._run_teacher

    def _students(self) -> tuple[str, ...]:
        """Dotted name of the student, or those of the ends of a chain."""
        return (None if self.student_capture is None else self.student_capture.names) or ("",)

    def _student_name(self) -> str:
        return "/".join(self._students())


def samples_of(call: NetworkCall) -> int:
    """The number of samples in a call: the length of the first tensor that has one."""
    first = next((tensor for tensor in call.tensors if tensor.ndim), None)
    return 1 if first is None else len(first)
