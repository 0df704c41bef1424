"""Schedules: how a quantity, such as the sparsity, goes from a start to an end while training progresses.

Pure functions of the progress in [0, 1], so a run that is resumed goes on where it stopped, without any state.

The cubic one is that of Zhu & Gupta, "To prune, or not to prune", ICLR 2018 workshop, arXiv:1710.01878; rounds that
each remove the same share of what remains are those of Han et al., "Learning both weights and connections",
NeurIPS 2015, arXiv:1506.02626.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lightning_compress.functional._checks import check_number, check_unit, check_whole, is_finite

Schedule = Callable[[float, float, float], float]
"""A function ``(progress, start, end)`` that returns the value at this progress."""


def constant_schedule(progress: float, start: float, end: float) -> float:
    """The end at once, for techniques in one shot.

    Args:
        progress: Share of the schedule that has passed, in [0, 1].
        start: Not used; here so that all schedules are called alike.
        end: Value at every progress.

    Returns:
        ``end``.

    Raises:
        ValueError: If ``progress`` is not in [0, 1].

    Example:
        >>> constant_schedule(0.0, 0.0, 0.9)
        0.9
    """
    check_unit("progress", progress)
    return float(check_number("end", end, "a finite number", is_finite))


def linear_schedule(progress: float, start: float, end: float) -> float:
    """Equal steps from start to end.

    Args:
        progress: Share of the schedule that has passed, in [0, 1].
        start: Value at progress 0.
        end: Value at progress 1.

    Returns:
        ``start + (end - start) * progress``.

    Raises:
        ValueError: If ``progress`` is not in [0, 1].

    Example:
        >>> linear_schedule(0.5, 0.0, 0.8)
        0.4
    """
    check_unit("progress", progress)
    return _between(start, end, 1.0 - progress)


def cubic_schedule(progress: float, start: float, end: float) -> float:
    """Fast at first, while there is much to take, and ever slower towards the end.

    Args:
        progress: Share of the schedule that has passed, in [0, 1].
        start: Value at progress 0.
        end: Value at progress 1.

    Returns:
        ``end + (start - end) * (1 - progress)^3``.

    Raises:
        ValueError: If ``progress`` is not in [0, 1].

    Example:
        >>> [round(cubic_schedule(progress, 0.0, 0.9), 4) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
        [0.0, 0.5203, 0.7875, 0.8859, 0.9]
    """
    check_unit("progress", progress)
    return _between(start, end, (1.0 - progress) ** 3)


def cosine_schedule(progress: float, start: float, end: float) -> float:
    """Slow at both ends: half a period of a cosine.

    Args:
        progress: Share of the schedule that has passed, in [0, 1].
        start: Value at progress 0.
        end: Value at progress 1.

    Returns:
        ``end + (start - end) * (1 + cos(pi * progress)) / 2``.

    Raises:
        ValueError: If ``progress`` is not in [0, 1].

    Example:
        >>> round(cosine_schedule(0.5, 0.0, 0.9), 6)
        0.45
    """
    check_unit("progress", progress)
    return _between(start, end, (1.0 + math.cos(math.pi * progress)) / 2.0)


def iterative_schedule(progress: float, start: float, end: float, rounds: int = 5) -> float:
    """Rounds that each take the same share of what remains; the value is a sparsity.

    Args:
        progress: Share of the schedule that has passed, in [0, 1]; round i is done from ``i / rounds`` on.
        start: Sparsity before the first round, in [0, 1].
        end: Sparsity after the last round, at progress 1; in [0, 1].
        rounds: Number of rounds, positive.

    Returns:
        The sparsity after i rounds, where what remains is ``(1 - start) * ((1 - end) / (1 - start))^(i / rounds)``.

    Raises:
        ValueError: If ``progress``, ``start`` or ``end`` is not in [0, 1], or ``rounds`` is not positive.

    Example:
        >>> [round(iterative_schedule(progress, 0.0, 0.75, rounds=2), 6) for progress in (0.0, 0.49, 0.5, 1.0)]
        [0.0, 0.0, 0.5, 0.75]
    """
    check_unit("progress", progress)
    check_unit("start", start)
    check_unit("end", end)
    check_whole("rounds", rounds, at_least=1)
    done = math.floor(progress * rounds + 1e-9)  # a progress that was itself divided may lack its last bit
    if done >= rounds:
        return float(end)
    if done == 0 or start == 1.0:
        return float(start)
    return 1.0 - (1.0 - start) * math.pow((1.0 - end) / (1.0 - start), done / rounds)


def _between(start: float, end: float, share: float) -> float:
    """What has ``share`` of the start in it; exactly the start at 1, the end at 0, and either where they are equal."""
    check_number("start", start, "a finite number", is_finite)
    check_number("end", end, "a finite number", is_finite)
    return float(start) if share == 1.0 else end + (start - end) * share
