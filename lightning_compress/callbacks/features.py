"""What callbacks share that compare layers of student and teacher."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from textwrap import indent
from typing import Any, ClassVar

from torch import Tensor

from lightning_compress.callbacks.base import announce
from lightning_compress.callbacks.intents import Intent
from lightning_compress.callbacks.teaching import TeacherCallback
from lightning_compress.mechanisms.capture import CaptureError, NetworkCall, only_call
from lightning_compress.mechanisms.outputs import describe
from lightning_compress.mechanisms.passes import Pass
from lightning_compress.mechanisms.replay import Replay, replay
from lightning_compress.mechanisms.selection import find_module
from lightning_compress.mechanisms.stages import Stage, match_stages, record_outputs, stages
from lightning_compress.mechanisms.states import Sometimes
from lightning_compress.mechanisms.step import StepController
from lightning_compress.report.render import aligned

DOMINATES = 3.0  # a term this many times as large as the task loss is what the network will learn


@dataclass(frozen=True)
class Pair:
    """A layer inside the student, and the layer inside the teacher that it learns from."""

    student: str
    teacher: str


class FeatureCallback(TeacherCallback):
    """Base of the callbacks that compare what layers of student and teacher return.

    Before the first step, the pairs of layers are settled: those that were given, those of the checkpoint, or those
    proposed from one batch, on which the step is replayed without a trace.
    """

    holds: ClassVar[Mapping[str, Any]] = {"pairs": Sometimes([[str]]), "student": Sometimes(([str], None))}

    pairs_argument = "pairs"
    """The user's argument that names the layers."""

    settled: tuple[Pair, ...] = ()
    """The pairs at work, from the shallowest to the deepest; empty before a training has started."""
    _proposed: tuple[Pair, ...] = ()  # earlier in this training, maybe in another process
    _found: tuple[str, ...] | None = None  # the student, likewise
    _layers: ExitStack  # of the fit: what records the teacher's layers
    _ready = False

    @property
    @abstractmethod
    def given_pairs(self) -> tuple[Pair, ...] | None:
        """The pairs that the user gave, none if the technique needs none; None to propose them."""

    @abstractmethod
    def choose(self, proposals: Sequence[tuple[Stage, Stage]]) -> Sequence[tuple[Stage, Stage]]:
        """Those of the proposed pairs that the technique uses."""

    def intent(self, trainer: Any, pl_module: Any) -> Intent:
        """As the base; and the pairs, once they are settled."""
        pairs = tuple((pair.student, pair.teacher) for pair in self.settled)
        return replace(super().intent(trainer, pl_module), pairs=pairs)

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuse layers that the teacher does not have; forget what was proposed for an earlier fit."""
        self._proposed, self._found = (), None
        for pair in self.given_pairs or ():
            find_module(self.own_teacher(), pair.teacher, argument=f"{self.pairs_argument} (teacher's side)")

    def check_parts(self, pl_module: Any) -> None:
        """Refuse layers that the student does not have."""
        if isinstance(self.student, str):
            network = find_module(pl_module, self.student, argument="student")
            for pair in self.given_pairs or ():
                find_module(network, pair.student, argument=f"{self.pairs_argument} (student's side)")

    def attach(self, controller: StepController, stack: ExitStack, trainer: Any, pl_module: Any) -> None:
        """Capture the student, prepare the teacher, add the term."""
        super().attach(controller, stack, trainer, pl_module)
        self._layers, self._ready = stack, False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Settle what is to be compared, before the first step."""
        if not self._ready and self.student_capture is not None:
            self.settle(trainer, pl_module)
            self._ready = True

    def settle(self, trainer: Any, pl_module: Any) -> None:
        """Find the student and the pairs, and record their layers from now on."""
        controller, capture = self._require_controller(), self.student_capture
        if capture is None:
            return
        controller.resolve_student()
        given = self.given_pairs
        names, pairs = capture.names or self._found, self._proposed if given is None else given
        propose = given is None and not pairs
        if propose or names is None:
            with self.replayed(trainer) as again:
                names = again.students() if names is None else names
                proposals = self._proposals(again, names, trainer) if propose else []
            if propose:
                proposed = tuple(Pair(one.layer, other.layer) for one, other in proposals)
                pairs = self._proposed = trainer.strategy.broadcast(proposed)  # images may differ from rank to rank
                if trainer.is_global_zero:
                    announce(f"{self.name}: {_table(proposals)}\n")
        if capture.names is None:
            capture.use(names)
        self._found, self.settled = names, pairs
        for pair in pairs:
            controller.layer(self._full_name(pair), argument=f"{self.pairs_argument} (student's side)")
            self._shared_teacher().teacher.watch(
                pair.teacher, self._layers, argument=f"{self.pairs_argument} (teacher's side)"
            )

    def replayed(self, trainer: Any) -> Any:
        """The user's step on the training data, without learning and without a trace."""
        return replay(self._require_controller(), trainer, trainer.precision_plugin.train_step_context)

    def extra_state(self) -> dict[str, Any]:
        """The student and the proposed pairs: a resumed run goes on with them, and need not look."""
        pairs = [[pair.student, pair.teacher] for pair in self._proposed]
        return {"pairs": pairs, "student": None if self._found is None else list(self._found)}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._found = None if state.get("student") is None else tuple(state["student"])
        self._proposed = tuple(Pair(*names) for names in state.get("pairs", ()))

    def _proposals(self, again: Replay, student: tuple[str, ...], trainer: Any) -> Sequence[tuple[Stage, Stage]]:
        call, arguments = again.first_received(student)
        ours = stages(again.outputs(student, arguments))
        with record_outputs(self.own_teacher()) as outputs, trainer.precision_plugin.train_step_context():
            self._shared_teacher().teacher(call)
        theirs = stages(outputs())
        proposals = self.choose(match_stages(ours, theirs))
        if not proposals:
            raise ValueError(
                f"{self.pairs_argument}='auto' finds no layers of student and teacher to compare. "
                f"{_offer('student', ours)} {_offer('teacher', theirs)} Name them: {self.pairs_argument}="
            )
        return proposals

    def _full_name(self, pair: Pair) -> str:
        """Dotted name of the student's layer inside the LightningModule."""
        names = self._students()
        network = names[0] if len(names) == 1 else ""  # layers of a chain: of the whole module
        return ".".join(part for part in (network, pair.student) if part)

    def features(self, seen: Pass, call: NetworkCall) -> Iterator[tuple[Pair, Tensor, Tensor]]:
        """What the layers of each pair returned."""
        for pair in self.settled:
            theirs = self._shared_teacher().layer(call, pair.teacher, argument=self.pairs_argument)
            yield pair, self._students_tensor(seen.layers, pair), self._tensor(pair.teacher, theirs, "teacher")

    def _students_tensor(self, layers: Mapping[str, Sequence[NetworkCall]], pair: Pair) -> Tensor:
        name = self._full_name(pair)
        own = only_call(layers.get(name, ()), f"the student's layer '{name}'", argument=self.pairs_argument)
        return self._tensor(pair.student, None if own is None else own.output, "student")

    def _tensor(self, layer: str, output: Any, owner: str) -> Tensor:
        if output is None:
            raise CaptureError(
                f"{self.pairs_argument}: the layer '{layer}' of the {owner} did not run in the step, or gave None"
            )
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{self.pairs_argument}: the layer '{layer}' of the {owner} returns {describe(output)}, not a tensor; "
                "choose a layer inside it"
            )
        return output

    def check_features(self, pair: Pair, student: Tensor, teacher: Tensor) -> None:
        """Refuse features, in the first step, from which nothing could be learned."""
        for owner, layer, feature in (("student", pair.student, student), ("teacher", pair.teacher, teacher)):
            if not feature.is_floating_point() or not bool(feature.isfinite().all()):
                raise ValueError(
                    f"{self.pairs_argument}: what the layer '{layer}' of the {owner} returns in the first step is no "
                    f"floating tensor or holds NaN or infinity: {describe(feature)}"
                )
        if not student.requires_grad:
            raise ValueError(
                f"{self.pairs_argument}: what the student's layer '{pair.student}' returns carries no gradient, so "
                "nothing could be learned from the teacher: is it frozen with all before it, run under no_grad, or "
                "inside of activation checkpointing with use_reentrant=True?"
            )

    def _tell_strength(self, terms: Mapping[str, Tensor], task_loss: Tensor) -> None:
        """Show each term of the first batch beside the task loss, and warn where one dominates."""
        task, values = float(task_loss.detach()), {what: float(term.detach()) for what, term in terms.items()}
        width = max(len(what) for what in (*values, "task loss"))
        lines = [f"  {what:{width}}  {value:.4g}" for what, value in {"task loss": task, **values}.items()]
        if self._trainer.is_global_zero:
            announce("\n".join([f"{self.name}: the losses of the first batch, with their weights", *lines, ""]))
        for what, value in values.items():
            if value > DOMINATES * abs(task):
                self._warn_once(
                    f"in the first batch the term of {what} is {value:.3g}, beside a task loss of {task:.3g}, so the "
                    "network will learn little else; a smaller weight is advised"
                )


def _offer(owner: str, found: Sequence[Stage]) -> str:
    stages_text = ", ".join(f"'{stage.layer}' {stage.shape}" for stage in found)
    return f"The {owner} offers {stages_text}." if found else f"The {owner} has no layer that returns a feature map."


def _table(proposals: Sequence[tuple[Stage, Stage]]) -> str:
    """The proposed pairs as text."""
    rows = [("student", "", "teacher", "")]
    rows += [(one.layer, _shape(one), other.layer, _shape(other)) for one, other in proposals]
    table = indent(aligned(rows), "  ")
    return f"proposed pairs, to be given as an argument if others are meant\n{table}"


def _shape(stage: Stage) -> str:
    return " x ".join(str(length) for length in stage.shape[1:])
