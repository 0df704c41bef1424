"""Of the several losses of a step with manual optimisation: which terms belong to which, and to which calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_compress.mechanisms.capture import CaptureError, NetworkCall, computed_from
from lightning_compress.mechanisms.passes import Pass, Term
from lightning_compress.mechanisms.selection import did_you_mean, listing
from lightning_compress.mechanisms.sharding import sharded_units
from lightning_compress.mechanisms.student import StudentCapture

Key = TypeVar("Key")


def loss_of(task_loss: Tensor | Callable[[], Tensor]) -> Tensor:
    """A loss that was given, or the one that a function which was given computes.

    Args:
        task_loss: Either.

    Returns:
        The loss.

    Raises:
        TypeError: If it is neither, or the function returns something else.
        ValueError: If the loss is not one number.

    Example:
        >>> import torch
        >>> loss_of(lambda: torch.tensor(2.0))
        tensor(2.)
    """
    given: Any = task_loss
    if not isinstance(given, Tensor) and not callable(given):
        raise TypeError(f"task_loss must be a tensor, or a function that computes one, got {type(given).__name__}")
    loss = given if isinstance(given, Tensor) else given()
    if not isinstance(loss, Tensor):
        raise TypeError(f"task_loss must be a function that returns a tensor, not {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"task_loss must be one number, got shape {tuple(loss.shape)}; give its mean, or its sum")
    return loss


def names_of(callbacks: Iterable[str] | None) -> list[str] | None:
    """The names of callbacks that were given, in a list that can be read more than once.

    Args:
        callbacks: Any iterable of names; None for none given.

    Returns:
        Them.

    Raises:
        TypeError: If it is one name, or no names at all.

    Example:
        >>> names_of(name for name in ("kd", "at"))
        ['kd', 'at']
    """
    if callbacks is None:
        return None
    if isinstance(callbacks, str):
        raise TypeError(f"callbacks must be a list of names, got {callbacks!r}; give [{callbacks!r}]")
    given: Any = list(callbacks) if isinstance(callbacks, Iterable) else callbacks
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"callbacks must be a list of names, got {given!r}")
    return given


@contextmanager
def only_computing(module: nn.Module) -> Iterator[None]:
    """Refuse that a function that is to compute a loss learns from it: it may be run twice.

    Args:
        module: Whose gradients have to stay as they are.

    Raises:
        RuntimeError: If an optimizer steps meanwhile, or a gradient is added to or cleared.

    Example:
        >>> with only_computing(nn.Linear(1, 1)):
        ...     loss = 2.0
    """

    def refuse(*_: Any) -> None:
        raise RuntimeError(
            "task_loss is a function that runs a backward pass, clears gradients or lets an optimizer step, and it may "
            "be run twice: let it compute and return the loss; zero_grad, manual_backward and step stay outside of it"
        )

    def gradients() -> list[tuple[int, int] | None]:
        every = [] if sharded_units(module) else [own.grad for own in module.parameters()]  # FSDP2 moves them
        return [None if gradient is None else (id(gradient), gradient._version) for gradient in every]

    before = gradients()
    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
    if gradients() != before:
        refuse()


def refuse_outside(found: Sequence[NetworkCall], earlier: Mapping[StudentCapture, Sequence[NetworkCall]]) -> None:
    """Refuse a function that is run twice, and uses what a student returned before it was run.

    Args:
        found: The calls that its loss was computed from.
        earlier: Those before it was run.

    Raises:
        RuntimeError: If there is such a call.

    Example:
        >>> refuse_outside([], {})
    """
    for student, calls in earlier.items():
        if any(call in found for call in calls):
            raise RuntimeError(
                f"task_loss is a function that uses what '{'/'.join(student.names or ('',))}' returned before it was "
                "called, and it is run twice, the second time with other weights: let it call the network itself"
            )


def check_named(
    callbacks: Sequence[str] | None, terms: Collection[str], attached: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Refuse names of callbacks that add nothing to a loss.

    Args:
        callbacks: The names; None is fine.
        terms: Names of those that do.
        attached: Name of each callback to that of its class.

    Raises:
        ValueError: If there is no term of a name.

    Example:
        >>> check_named(["kd"], ["kd"])
    """
    for name in callbacks or ():
        if name in terms:
            continue
        of_class = [own for own, kind in attached.items() if kind == name]
        if name in attached or (of_class and not set(of_class) & set(terms)):
            raise ValueError(
                f"callbacks names '{name}', which acts without being asked and adds nothing to a loss: leave it out"
            )
        if of_class:
            raise ValueError(f"callbacks holds names, and '{name}' is a class: that of {listing(of_class)}")
        raise ValueError(
            f"callbacks names '{name}', and no callback of that name adds to a loss; there are "
            f"{sorted(terms) or 'none'}{did_you_mean(name, terms)}"
        )


class StepCalls:
    """The calls of a step, kept to its end: those of a loss may come before another loss is asked for.

    Example:
        >>> kept, call = StepCalls(), NetworkCall((), {}, 1)
        >>> kept.add({}, {"layer": [call]})
        >>> kept.add({}, {"layer": []})
        >>> kept.layers == {"layer": [call]}, kept.recent_layers
        (True, {'layer': []})
    """

    def __init__(self) -> None:
        self.students: dict[StudentCapture, list[NetworkCall]] = {}
        self.layers: dict[str, list[NetworkCall]] = {}
        self.recent_students: Mapping[StudentCapture, list[NetworkCall]] = {}
        """Since the last loss."""
        self.recent_layers: Mapping[str, list[NetworkCall]] = {}
        self._used: set[tuple[str, object]] = set()  # names of terms, and the calls that they were computed from
        self._totals: list[NetworkCall] = []
        self._asked: set[tuple[Any, int]] = set()  # nodes of the losses that had terms, and which of their outputs

    def add(
        self,
        students: Mapping[StudentCapture, list[NetworkCall]],
        layers: Mapping[str, list[NetworkCall]],
        *,
        since_last: bool = False,
    ) -> None:
        """Add the calls since the last loss; or those since the last addition, with those before it."""
        self.recent_students = _joined(self.recent_students if since_last else {}, students)
        self.recent_layers = _joined(self.recent_layers if since_last else {}, layers)
        self.students = _joined(self.students, students)
        self.layers = _joined(self.layers, layers)

    def sources(self, loss: Tensor) -> list[NetworkCall]:
        """The calls, of students and of layers, that the graph of a loss leads to.

        Raises:
            RuntimeError: If it had its terms before, or also leads to what was given back for another loss.
        """
        if (loss.grad_fn, loss.output_nr) in self._asked:
            raise RuntimeError(
                "task_loss is one that compressed_loss was asked for before in this step, and had its terms then: ask "
                "once, and use what came back for the log and for the backward pass"
            )
        calls = [call for own in (*self.students.values(), *self.layers.values()) for call in own]
        found = computed_from(loss, [*calls, *self._totals])
        if any(total in found for total in self._totals):
            raise RuntimeError(
                "task_loss was computed from a loss that compressed_loss has given back in this step, so that its "
                "terms and weights would count twice; ask for the task losses, and add what comes back"
            )
        return found

    def of_its_own(self, seen: Pass, found: Sequence[NetworkCall]) -> Pass:
        """A pass with the calls that its loss was computed from; where that is so of none, with those since the last.

        Args:
            seen: The pass.
            found: Its :meth:`sources`.

        Returns:
            Without calls that only other losses were computed from.
        """
        calls = _sifted(self.students, found, self.recent_students)
        return replace(seen, calls=calls, layers=_sifted(self.layers, found, self.recent_layers))

    def left(self, term: Term, seen: Pass) -> Pass:
        """A pass with the calls that a term was not computed from before."""
        calls = {key: self._left(term, own) for key, own in seen.calls.items()}
        return replace(seen, calls=calls, layers={key: self._left(term, own) for key, own in seen.layers.items()})

    def used_up(self, term: Term, seen: Pass) -> bool:
        """Whether a term was computed before from all calls of its student in a pass."""
        calls = () if term.student is None else seen.calls.get(term.student, ())
        return bool(calls) and not self._left(term, calls)

    def use(self, terms: Iterable[Term], seen: Pass, loss: Tensor) -> None:
        """Note that terms were computed from a pass, and the loss with them."""
        for term in terms:
            students = () if term.student is None else seen.calls.get(term.student, ())
            self._used |= {(term.name, call.key) for own in (students, *seen.layers.values()) for call in own}
        if loss is not seen.task_loss and loss.grad_fn is not None:
            if seen.task_loss is not None and seen.task_loss.grad_fn is not None:
                self._asked.add((seen.task_loss.grad_fn, seen.task_loss.output_nr))
            self._totals.append(NetworkCall((), {}, None, nodes=frozenset({loss.grad_fn})))

    def _left(self, term: Term, calls: Sequence[NetworkCall]) -> list[NetworkCall]:
        return [call.current() for call in calls if (term.name, call.key) not in self._used]


def belonging(
    terms: Iterable[Term], seen: Pass, found: Sequence[NetworkCall], callbacks: Sequence[str] | None
) -> Collection[str]:
    """Names of the terms that belong to a loss.

    Args:
        terms: All terms.
        seen: The pass that computed the loss, with the calls of its own.
        found: Its :meth:`StepCalls.sources`.
        callbacks: Names that were given. None: the terms whose students are among the sources.

    Returns:
        Their names; among them those of terms that are of no student.

    Raises:
        CaptureError: If a student of a given name was not called, or what it returned carries no gradient; or if no
            names are given, and the sources are several networks, each the student of somebody.

    Example:
        >>> import torch
        >>> from lightning_compress.mechanisms.passes import View
        >>> seen = Pass(View("plain"), None, torch.ones(()), {})
        >>> belonging([Term("one", lambda passes: None)], seen, [], None)
        {'one'}
    """
    if callbacks is not None:
        for term in terms:
            if term.name in callbacks and term.student is not None:
                _check_student(term, seen.calls.get(term.student, ()))
        return set(callbacks)
    of_student = {student for student, calls in seen.calls.items() if any(call in found for call in calls)}
    connected = [term for term in terms if term.student is None or term.student in of_student]
    for one, other in combinations(connected, 2):
        if not _related(one, other):
            raise CaptureError(
                f"the loss was computed from the students of '{one.name}' and of '{other.name}', so it is not said "
                f"which of their terms belong to it: compressed_loss(loss, callbacks=['{one.name}']), or so"
            )
    return {term.name for term in connected}


def _check_student(term: Term, calls: Sequence[NetworkCall]) -> None:
    """Refuse a name whose student was not called, or cannot learn from this loss."""
    who = "/".join((None if term.student is None else term.student.names) or ("?",))
    if not calls:
        raise CaptureError(
            f"callbacks names '{term.name}', and its student '{who}' was not called since the last compressed_loss of "
            "this step"
        )
    if not any(call.nodes for call in calls):
        raise CaptureError(
            f"callbacks names '{term.name}', and what its student '{who}' returned for this loss carries no gradient, "
            "so nothing could be learned: toggle_optimizer of another optimizer has frozen it, or it ran under "
            f"no_grad. Name '{term.name}' for the loss after which the optimizer of '{who}' steps"
        )


def _joined(
    earlier: Mapping[Key, list[NetworkCall]], recent: Mapping[Key, list[NetworkCall]]
) -> dict[Key, list[NetworkCall]]:
    return {key: [*earlier.get(key, ()), *recent.get(key, ())] for key in (*earlier, *recent)}


def _sifted(
    calls: Mapping[Key, Sequence[NetworkCall]],
    found: Sequence[NetworkCall],
    recent: Mapping[Key, Sequence[NetworkCall]],
) -> dict[Key, list[NetworkCall]]:
    return {key: [call for call in own if call in found] or list(recent.get(key, ())) for key, own in calls.items()}


def _related(one: Term, other: Term) -> bool:
    """Whether the students of two terms are one, or one is a part of the other."""
    if one.student is None or other.student is None:
        return True
    return any(
        first == second or first.startswith(f"{second}.") or second.startswith(f"{first}.") or "" in (first, second)
        for first in one.student.names or ()
        for second in other.student.names or ()
    )
