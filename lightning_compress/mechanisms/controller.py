"""The controller of a module's steps: extra passes, extra losses, and one teacher forward a batch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_compress import _compat
from lightning_compress.mechanisms.capture import Capture, CaptureError, NetworkCall
from lightning_compress.mechanisms.further import FurtherPass
from lightning_compress.mechanisms.isolation import RandomState, device_of
from lightning_compress.mechanisms.losses import (
    StepCalls,
    belonging,
    check_named,
    loss_of,
    only_computing,
    refuse_outside,
)
from lightning_compress.mechanisms.passes import Pass, Term, View
from lightning_compress.mechanisms.replay import traceless
from lightning_compress.mechanisms.selection import find_module
from lightning_compress.mechanisms.sharding import class_name
from lightning_compress.mechanisms.student import StudentCapture
from lightning_compress.mechanisms.teacher import SharedTeacher, Teacher, own_copies, refuse_shared
from lightning_compress.mechanisms.views import WeightViews
from lightning_compress.mechanisms.wrapping import shadowed

Convert = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class StepRecord:
    """What a training step computed, counted and not inferred.

    Attributes:
        passes: How often the user's step ran: once, and once more for each further view.
        task_loss: The weighted task loss of the deployed view; None before there was one.
        terms: The weighted terms by name.
        teachers: Each teacher that ran, with the number of its forwards.
    """

    passes: int = 0
    task_loss: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    teachers: Sequence[tuple[Teacher, int]] = ()


@dataclass
class _Total:
    """A loss that is being put together."""

    passes: dict[str, Pass] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)  # of the task; the deployed view's first
    terms: dict[str, Tensor] = field(default_factory=dict)
    of_views: dict[str, list[Tensor]] = field(default_factory=dict)  # what is added under each view


class StepController:
    """Runs a module's ``training_step`` under each view, sums the losses, and shows calls to whoever asks.

    The total is ``sum over views of (task_weight * task_loss + terms of the view) + terms between views``. Open it
    with :func:`step_controller`; everything added through its methods lasts as long as their contexts.

    Args:
        module: The LightningModule; in a plain loop, any module with a ``training_step``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.weights = WeightViews(module)
        """What the deployed pass, and evaluation, see of the weights."""
        self.references = 0
        self.stack = ExitStack()
        self.steps = 0
        self.attached: dict[str, str] = {}
        """Name of each callback to that of its class, for messages."""
        self.last = StepRecord()
        """What the last training step computed; in a step with manual optimisation, what it has computed so far."""
        self.replaying = False
        """Whether steps run as they are, and their losses too: for those who run them for another reason."""
        self.deployed = True
        """Whether what runs is the network that will be shipped, and not a further pass under other weights."""
        self._repeated: set[str] = set()  # names of the terms that run a pass once more
        self._inside = False  # of a step
        self._validating = False
        self._asking = False  # for a loss
        self._captures: dict[Any, StudentCapture] = {}
        self._layers: dict[str, Capture] = {}
        self._teachers: dict[tuple[int, int], SharedTeacher] = {}
        self._views: list[View] = []
        self._terms: dict[str, Term] = {}
        self._task_weights: dict[str, float] = {}
        self._observers: list[Callable[[Pass], None]] = []
        self._running: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None
        self._calls = StepCalls()  # of a step with manual optimisation
        self._losses = 0  # that a step with manual optimisation has asked for
        self._learned = 0  # optimizer steps of such a step
        self._asked = False  # whether it, or one before, has asked for a loss since an optimizer stepped
        self._forwards: dict[Teacher, int] = {}  # of each teacher when the step began
        self._ahead: list[tuple[StudentCapture, SharedTeacher]] = []
        self._teachers_go_first = False

    # What callbacks add

    def capture(
        self, student: str | Sequence[str] | None, *, required: bool = True, argument: str = "student"
    ) -> StudentCapture:
        """Record the student's calls; one record serves all who name the same student.

        Args:
            student: As in :class:`StudentCapture`. None: the student that another callback named, else the one found.
            required: Raise in the first training step if the student cannot be told.
            argument: The user's argument that names it, for error messages; "" where there is none.

        Returns:
            The shared capture, closed with the controller.
        """
        key: Any = tuple(student) if isinstance(student, Sequence) and not isinstance(student, str) else student
        if key not in self._captures:
            capture = self.stack.enter_context(StudentCapture(self.module, student, argument=argument))
            capture.on_input = functools.partial(self._run_teachers_first, capture)
            self._captures[key] = capture
        self._captures[key].also(argument)
        self._captures[key].required |= required
        return self._captures[key]

    def resolve_student(self) -> None:
        """Where callbacks name one student, let it be also that of those who named none."""
        unknown = self._captures.get(None)
        if unknown is not None and unknown.names is None:
            named = {capture.names for key, capture in self._captures.items() if key is not None}
            if len(named) == 1 and (names := named.pop()) is not None:
                unknown.use(names)

    def layer(self, name: str, *, argument: str) -> None:
        """Record what a layer returns in each step, for :meth:`Pass.layer`; closed with the controller.

        Args:
            name: Dotted name inside the module.
            argument: The user's argument that holds the name, for error messages.

        Raises:
            ValueError: If there is no such layer.
        """
        layer = find_module(self.module, name, argument=argument)
        if name not in self._layers:
            self._layers[name] = self.stack.enter_context(Capture(layer, direct=layer is self.module))
            _compat.reset_compiled_code()

    def layers_of(self, run: Callable[[], Any]) -> dict[str, list[NetworkCall]]:
        """The calls of the recorded layers in a run of the step that is no training step.

        Args:
            run: Runs it.

        Returns:
            Dotted name to calls.
        """
        for layer in self._layers.values():
            layer.start()
        try:
            run()
        finally:
            calls = {name: layer.stop() for name, layer in self._layers.items()}
        return calls

    def teacher(
        self,
        module: nn.Module,
        transform: nn.Module | None = None,
        *,
        student: StudentCapture | None = None,
        device: torch.device | None = None,
        convert: Convert | None = None,
    ) -> SharedTeacher:
        """A teacher that runs once a batch, however many ask for its output.

        It runs just before the student where that is possible (not in compiled code, and not in the step in which the
        student is found): the activations of only one of the two then take memory at a time.

        Args:
            module: The network.
            transform: As in :class:`Teacher`.
            student: Whose inputs it gets.
            device: Where to run it.
            convert: What the precision does to modules.

        Returns:
            From a call of the student to the teacher's output.

        Raises:
            ValueError: If teacher and student share parameters or buffers: freezing one would freeze the other.
        """
        for argument, own in (("teacher", module), ("teacher_transform", transform)):
            if own is not None:
                self.stack.enter_context(own_copies(own, self.module))
                refuse_shared(own, self.module, argument=argument)
        key = (id(module), id(transform))
        if key not in self._teachers:
            teacher = Teacher(module, transform)
            self.stack.enter_context(teacher.prepared(device, convert))
            self._teachers[key] = SharedTeacher(teacher)
        shared = self._teachers[key]
        if student is not None:
            self._ahead.append((student, shared))
        return shared

    @contextmanager
    def view(self, view: View) -> Iterator[None]:
        """Run the step under this view too; while no view is the deployed one, it also runs as it is.

        Raises:
            ValueError: If there would be two views of one name, or two deployed ones.
        """
        for other in self._views:
            if other.name == view.name or (other.deployed and view.deployed):
                raise ValueError(f"two callbacks present the same weights: the views '{other.name}' and '{view.name}'")
        self._views.append(view)
        try:
            yield
        finally:
            self._views.remove(view)

    @contextmanager
    def term(self, term: Term) -> Iterator[None]:
        """Add a loss term.

        Raises:
            ValueError: If a term of this name exists.
        """
        if term.name in self._terms:
            raise ValueError(f"two callbacks are named '{term.name}'; give one another name=")
        self._terms[term.name] = term
        try:
            yield
        finally:
            del self._terms[term.name]

    @contextmanager
    def task_weight(self, owner: str, weight: float) -> Iterator[None]:
        """Weigh the task loss, or with manual optimisation each that has the owner's term; 1 is no claim.

        Raises:
            ValueError: If another owner set a weight other than 1; with manual optimisation once a loss has both.
        """
        if weight != 1.0:
            self._task_weights[owner] = weight
        try:
            if getattr(self.module, "automatic_optimization", True):
                self._task_weight(None)
            yield
        finally:
            self._task_weights.pop(owner, None)

    @contextmanager
    def repeated_passes(self, owner: str) -> Iterator[None]:
        """Make :attr:`Pass.again`, for the term of this name; this costs a copy of the random states each step."""
        self._repeated.add(owner)
        try:
            yield
        finally:
            self._repeated.discard(owner)

    @contextmanager
    def observer(self, observe: Callable[[Pass], None]) -> Iterator[None]:
        """Show every validation pass to a function, after the validation step has run."""
        self._observers.append(observe)
        try:
            yield
        finally:
            self._observers.remove(observe)

    # What a step does

    def run_training(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the training step in the user's stead and return its output with the total loss in it."""
        if self.replaying or self._inside:  # a validation step may call the training step, and the other way round
            return original(*args, **kwargs)
        self.resolve_student()
        self._inside = True
        self._forwards = {shared.teacher: shared.teacher.forwards for shared in self._teachers.values()}
        try:
            if not getattr(self.module, "automatic_optimization", True):
                return self._run_manual(original, args, kwargs)
            return self._run_views(original, args, kwargs)
        finally:
            self._inside = self._teachers_go_first = False
            self.deployed = True
            self._forget_teachers_outputs()

    def run_validation(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the validation step, then show what it called to the observers."""
        if self.replaying or self._inside:
            return original(*args, **kwargs)
        self._inside = self._validating = True
        try:
            if not self._observers:
                return original(*args, **kwargs)
            output, calls, layers = self._recorded(original, args, kwargs, detect=False)
            seen = Pass(View("plain"), _first(args, kwargs), None, calls, layers)
            for observe in self._observers:
                observe(seen)
            return output
        finally:
            self._inside = self._validating = False
            self._forget_teachers_outputs()

    def compressed_loss(
        self, task_loss: Tensor | Callable[[], Tensor], callbacks: Sequence[str] | None = None
    ) -> Tensor:
        """The total loss inside a step with manual optimisation.

        Args:
            task_loss: The loss, with its graph; or a function that computes it, which is run under each view.
            callbacks: Names of the terms that belong to it. None: those of whose student's calls it was computed.

        Returns:
            With them, and weighed if the owner of the weight is among them; in a validation step the loss itself.

        Raises:
            CaptureError: If it is not said which terms belong to it, or a student was not called.
            RuntimeError: If called outside of a training step with manual optimisation, or within itself, or a
                function is needed.
            ValueError: If there is no term of a name.
        """
        if self.replaying or self._validating:
            return loss_of(task_loss)
        if self._running is None:
            raise RuntimeError("compressed_loss is for training_step with automatic_optimization=False only")
        if self._asking:
            raise RuntimeError(
                "task_loss is a function that calls compressed_loss itself; give one that only computes the task loss"
            )
        check_named(callbacks, self._terms, self.attached)
        self._losses, self._asked, self._asking = self._losses + 1, True, True
        try:
            return self._total_of(task_loss, callbacks, self._running)
        finally:
            self._asking, self.deployed = False, True

    def _total_of(
        self, task_loss: Tensor | Callable[[], Tensor], callbacks: Sequence[str] | None, arguments: Any
    ) -> Tensor:
        compute = None if isinstance(task_loss, Tensor) else task_loss
        further = self._further(arguments) if self._views and compute is not None else None
        again = None if compute is None else self._again(compute, (), {})
        self._calls.add(*self._drained())
        earlier = self._calls.students.copy()
        with nullcontext() if compute is None else only_computing(self.module):
            loss = loss_of(task_loss)
        self._calls.add(*self._drained(), since_last=True)
        found, total = self._calls.sources(loss), _Total()
        seen = Pass(View("plain"), _first(*arguments), loss, {}, {}, again)
        seen = self._calls.of_its_own(seen, found)
        names = belonging(self._terms.values(), seen, found, callbacks)
        if compute is not None and (self._views_of(names) or not self._repeated.isdisjoint(names)):
            refuse_outside(found, earlier)
        for name in callbacks or ():
            if self._calls.used_up(self._terms[name], seen):
                raise CaptureError(
                    f"callbacks names '{name}', whose term was added to an earlier loss of this step: it is added once "
                    "for each call of its student; leave callbacks= out"
                )
        self._include(total, seen, names)
        for view in self._views_of(names):
            if compute is None or further is None:
                raise RuntimeError(
                    f"'{view.owner or view.name}' runs the step twice, the second time under other weights: give "
                    "compressed_loss a function that computes the loss, lambda: ..., or, for a loss that is none of "
                    "its business, callbacks= without it"
                )
            with further.traceless(view.name), view.enter():
                self.deployed = False
                self._drained()
                again_loss, calls = loss_of(compute), StepCalls()
                calls.add(*self._drained())
                shown = Pass(view, _first(*arguments), again_loss, {})
                self._include(total, calls.of_its_own(shown, calls.sources(again_loss)), names)
            self.deployed = True
        result = self._sum_up(total, names)
        terms = [self._terms[name] for name in names]
        for term in terms:
            if term.lesson is not None and not self._calls.used_up(term, seen):
                term.lesson.follow(result)
        self._calls.use(terms, seen, result)
        return result

    def _views_of(self, names: Collection[str]) -> list[View]:
        """The further views of a loss."""
        views = [view for view in self._views if not view.owner or view.owner in names]
        if any(view.deployed for view in views):
            raise RuntimeError("with manual optimisation the deployed view is what the step sees as it is")
        return sorted(views, key=lambda view: view.name)

    def _drained(self) -> tuple[dict[StudentCapture, list[NetworkCall]], dict[str, list[NetworkCall]]]:
        """The calls of students, and of recorded layers, since the last loss; the next counts from here."""
        calls = self._collected(StudentCapture.drain)
        layers = {name: capture.stop() for name, capture in self._layers.items()}
        for capture in self._layers.values():
            capture.start()
        return calls, layers

    def _run_views(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        views = sorted(self._views, key=lambda view: (not view.deployed, view.name))
        if not views or not views[0].deployed:
            views.insert(0, View("plain", self.weights.shown))
        total = _Total()
        further = self._further((args, kwargs)) if len(views) > 1 else None
        for view in views:
            with nullcontext() if further is None or view.deployed else further.traceless(view.name), view.enter():
                self._teachers_go_first = self.deployed = view.deployed
                again = self._again(original, args, kwargs)
                output, calls, layers = self._recorded(original, args, kwargs)
                if output is None:
                    return None
                self._include(total, Pass(view, _first(args, kwargs), _loss_of(output), calls, layers, again))
            if view.deployed:
                deployed_output = output
        output = _with_loss(deployed_output, self._sum_up(total))
        self.steps += 1
        return output

    def _include(self, total: _Total, seen: Pass, names: Collection[str] | None = None) -> None:
        """Add what a pass gives: its task loss, weighed, and the terms of its view; of these names, None for all."""
        total.passes[seen.view.name] = seen
        if seen.task_loss is None:
            raise RuntimeError("a training pass has a task loss")
        loss, terms = self._weighted(seen.task_loss, names), self._computed(seen.view, total.passes, names)
        total.losses.append(loss)
        total.terms |= terms
        total.of_views[seen.view.name] = [loss, *terms.values()]

    def _sum_up(self, total: _Total, names: Collection[str] | None = None) -> Tensor:
        """Add the terms between views, and note what was computed."""
        between = self._computed(None, total.passes, names)
        for name, seen in total.passes.items():
            if seen.view.learn is not None:
                total.of_views[name] = [seen.view.learn(_sum(total.of_views[name]))]
        self._note(len(total.losses), total.losses[0], total.terms | between)
        return _sum([*itertools.chain(*total.of_views.values()), *between.values()])

    def _further(self, arguments: Any) -> FurtherPass:
        """Of a step that will run again; now and then it looks closely at what a step may do past autograd."""
        return FurtherPass(self.module, arguments, closely=self.steps < 8 or self.steps % 64 == 0)

    def _run_manual(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._running, self._losses, self._learned, self.last = (args, kwargs), 0, 0, StepRecord(passes=1)
        self._calls = StepCalls()
        try:
            with self._following_optimizers():
                output, *_ = self._recorded(original, args, kwargs, none_skips=False)  # it need return nothing
        finally:
            self._running, self._calls = None, StepCalls()
        waiting = sorted(self._terms) + self.weights.owners
        if waiting and self._learned and not self._asked:
            raise RuntimeError(
                f"{class_name(self.module)}.training_step never called self.compressed_loss(task_loss), so "
                f"{waiting} would have no effect: give it every loss, also that of another network"
            )
        self._asked = self._asked and not self._learned
        self.steps += 1 if self._losses or self._learned else 0  # a skipped batch is no step
        return output

    @contextmanager
    def _following_optimizers(self) -> Iterator[None]:
        """Count optimizer steps; present the weights for the whole step, anew where they have changed."""

        def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            self._learned += 1
            self.weights.refresh()

        def refreshing(toggle: Callable[..., Any]) -> Callable[..., Any]:
            def toggled(*args: Any, **kwargs: Any) -> None:
                toggle(*args, **kwargs)
                self.weights.refresh()

            return toggled

        with ExitStack() as stack:
            stack.callback(register_optimizer_step_post_hook(stepped).remove)
            if self.weights.owners:
                stack.enter_context(self.weights.followed())
                for method in ("toggle_optimizer", "untoggle_optimizer"):
                    if hasattr(self.module, method):
                        stack.enter_context(shadowed(self.module, method, refreshing))
            yield

    def _recorded(
        self,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        detect: bool = True,
        none_skips: bool = True,
    ) -> tuple[Any, dict[StudentCapture, list[NetworkCall]], dict[str, list[NetworkCall]]]:
        try:
            for capture in self._captures.values():
                capture.start(detect=detect)
            for layer in self._layers.values():
                layer.start()
            output = original(*args, **kwargs)
            if output is not None or not (detect and none_skips):
                layers = {name: layer.stop() for name, layer in self._layers.items()}
                return output, self._collected(StudentCapture.stop), layers
        except BaseException:
            self._abort()
            raise
        self._abort()  # a skipped batch: whatever it called is no evidence
        return None, {}, {}

    def _again(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[], Tensor] | None:
        """What runs a pass that is about to run once more, with the random numbers that it will have drawn."""
        if not self._repeated:
            return None
        random = RandomState(device_of(self.module))

        def again() -> Tensor:
            with traceless(self.module, parameters=False):
                random.restore()
                return _loss_of(original(*args, **kwargs))

        return again

    def _collected(
        self, collect: Callable[[StudentCapture], list[NetworkCall]]
    ) -> dict[StudentCapture, list[NetworkCall]]:
        """The calls of each student; two captures of one student share them, and so the teacher's output."""
        calls = {capture: collect(capture) for capture in self._captures.values()}
        shared: dict[tuple[str, ...], list[NetworkCall]] = {}
        return {
            capture: own if capture.names is None else shared.setdefault(capture.names, own)
            for capture, own in calls.items()
        }

    def _run_teachers_first(
        self, capture: StudentCapture, key: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Before the student runs: its teachers, on what it is about to receive."""
        one_of_many = next(other for other in self._captures.values() if other.names == capture.names)
        if self._teachers_go_first and capture is one_of_many:
            for student, shared in self._ahead:
                if student.names == capture.names:
                    shared(NetworkCall(args, kwargs, None, key))

    def _abort(self) -> None:
        for capture in self._captures.values():
            capture.abort()
        for layer in self._layers.values():
            layer.start()
            layer.stop()

    def _computed(
        self, view: View | None, passes: Mapping[str, Pass], names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """The terms of one view, or with None those between views, in the order of their names."""
        values: dict[str, Tensor] = {}
        for name, term in sorted(self._terms.items()):
            if names is not None and name not in names:
                continue
            between = term.view is None and view is None
            if between or (view is not None and (term.view == view.name or (term.view == "" and view.deployed))):
                shown = passes if view is None else {view.name: passes[view.name]}
                if any(self._calls.used_up(term, seen) for seen in shown.values()):
                    continue
                value = term.compute({key: self._calls.left(term, seen) for key, seen in shown.items()})
                values |= {} if value is None else {name: value}
        return values

    def _note(self, passes: int, task_loss: Tensor, terms: Mapping[str, Tensor]) -> None:
        """Keep what the step has computed, without its graph."""
        ran = [(teacher, teacher.forwards - before) for teacher, before in self._forwards.items()]
        self.last = StepRecord(
            passes,
            task_loss.detach(),
            {name: term.detach() for name, term in terms.items()},
            [(teacher, count) for teacher, count in ran if count],
        )

    def _weighted(self, task_loss: Tensor, names: Collection[str] | None = None) -> Tensor:
        weight = self._task_weight(names)
        return task_loss if weight is None else task_loss * weight

    def _task_weight(self, names: Collection[str] | None) -> float | None:
        """What weighs a loss that has the terms of these names, or of all; None: nothing."""
        every = self._task_weights.items()
        found = {owner: weight for owner, weight in every if names is None or owner in names}
        if len(found) > 1:
            said = " and ".join(f"'{owner}' sets task_weight={weight}" for owner, weight in found.items())
            raise ValueError(f"{said}; only one callback can weigh the task loss: give the others task_weight=1")
        return next(iter(found.values()), None)

    def _forget_teachers_outputs(self) -> None:
        for shared in self._teachers.values():
            shared.forget()


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise TypeError(
            "training_step must return a tensor, a dict with a tensor under 'loss', or None, got "
            f"{type(output).__name__}{sorted(output) if isinstance(output, Mapping) else ''}"
        )
    return loss


def _with_loss(output: Any, loss: Tensor) -> Any:
    return {**output, "loss": loss} if isinstance(output, Mapping) else loss


def _sum(values: Sequence[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
