"""Of the several losses of a step with manual optimisation: which terms belong to which, and to which calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, TypeVar

from torch import Tensor

from lightning_compress.mechanisms.capture import CaptureError, NetworkCall, computed_from
from lightning_compress.mechanisms.passes import Pass, Term
from lightning_compress.mechanisms.selection import did_you_mean

Key = TypeVar("Key")


def loss_of(task_loss: Tensor | Callable[[], Tensor]) -> Tensor:
    """A loss that was given, or the one that a function which was given computes.

    Args:
        task_loss: Either.

    Returns:
        The loss.

    Raises:
        TypeError: If it is neither, or the function returns something else.

    Example:
        >>> import torch
        >>> loss_of(lambda: torch.tensor(2.0))
        tensor(2.)
    """
    if isinstance(task_loss, Tensor):
        return task_loss
    given: Any = task_loss
    if not callable(given):
        raise TypeError(f"task_loss must be a tensor, or a function that computes one, got {type(given).__name__}")
    loss = given()
    if not isinstance(loss, Tensor):
        raise TypeError(f"task_loss must be a function that returns a tensor, not {type(loss).__name__}")
    return loss


def check_named(callbacks: Sequence[str] | None, terms: Mapping[str, Term]) -> None:
    """Refuse names of callbacks that add nothing to a loss.

    Args:
        callbacks: As they were given; None is fine.
        terms: The terms by name.

    Raises:
        TypeError: If it is one name and not several.
        ValueError: If there is no term of a name.

    Example:
        >>> check_named(["kd"], {"kd": Term("kd", lambda passes: None)})
    """
    if isinstance(callbacks, str):
        raise TypeError(f"callbacks must be a list of names, got {callbacks!r}; give [{callbacks!r}]")
    for name in callbacks or ():
        if name not in terms:
            raise ValueError(
                f"callbacks names '{name}', and no callback of that name adds to a loss; there are "
                f"{sorted(terms) or 'none'}{did_you_mean(str(name), list(terms))}"
            )


def sources(seen: Pass) -> list[NetworkCall]:
    """The calls, of students and of layers, that the loss of a pass was computed from.

    Args:
        seen: The pass, with all calls since the last loss.

    Returns:
        Those that the graph of the loss leads to.

    Example:
        >>> from lightning_compress.mechanisms.passes import View
        >>> sources(Pass(View("plain"), None, None, {}))
        []
    """
    calls = [call for own in (*seen.calls.values(), *seen.layers.values()) for call in own]
    return [] if seen.task_loss is None else computed_from(seen.task_loss, calls)


def of_its_own(seen: Pass, found: Sequence[NetworkCall]) -> Pass:
    """A pass with the calls that its loss was computed from; where that is so of none, with all there are.

    Args:
        seen: The pass, with all calls since the last loss.
        found: Its :func:`sources`.

    Returns:
        Without calls that only other losses were computed from.

    Example:
        >>> import torch
        >>> from lightning_compress.mechanisms.passes import View
        >>> mine, other = NetworkCall((), {}, 1), NetworkCall((), {}, 2)
        >>> seen = Pass(View("plain"), None, torch.ones(()), {}, {"layer": [mine, other]})
        >>> of_its_own(seen, [mine]).layers == {"layer": [mine]}, of_its_own(seen, []).layers == seen.layers
        (True, True)
    """
    return replace(seen, calls=_sifted(seen.calls, found), layers=_sifted(seen.layers, found))


def belonging(
    terms: Iterable[Term], seen: Pass, found: Sequence[NetworkCall], callbacks: Sequence[str] | None
) -> Collection[str]:
    """Names of the terms that belong to a loss.

    Args:
        terms: All terms.
        seen: The pass that computed the loss, with all calls since the last.
        found: Its :func:`sources`.
        callbacks: Names that were given. None: the terms whose students are among the sources.

    Returns:
        Their names; among them those of terms that are of no student.

    Raises:
        CaptureError: If a student of a given name was not called; or if no names are given, and the sources are
            several networks, each the student of somebody.

    Example:
        >>> import torch
        >>> from lightning_compress.mechanisms.passes import View
        >>> seen = Pass(View("plain"), None, torch.ones(()), {})
        >>> belonging([Term("one", lambda passes: None)], seen, [], None)
        {'one'}
    """
    if callbacks is not None:
        for term in terms:
            if term.name in callbacks and term.student is not None and not seen.calls.get(term.student):
                raise CaptureError(
                    f"callbacks names '{term.name}', and its student '{'/'.join(term.student.names or ('?',))}' was "
                    "not called since the last compressed_loss of this step"
                )
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


def _sifted(calls: Mapping[Key, Sequence[NetworkCall]], found: Sequence[NetworkCall]) -> dict[Key, list[NetworkCall]]:
    return {key: [call for call in own if call in found] or list(own) for key, own in calls.items()}


def _related(one: Term, other: Term) -> bool:
    """Whether the students of two terms are one, or one is a part of the other."""
    if one.student is None or other.student is None:
        return True
    return any(
        first == second or first.startswith(f"{second}.") or second.startswith(f"{first}.") or "" in (first, second)
        for first in one.student.names or ()
        for second in other.student.names or ()
    )
