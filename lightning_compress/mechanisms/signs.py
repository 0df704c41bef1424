"""A sign of life while something takes its time: a bar beside Lightning's own, where these are wanted."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE = 0.5
"""Seconds of counted work without a bar: what is done by then needs none."""


@contextmanager
def sign(trainer: Any, what: str, total: int | None = 0) -> Iterator[Callable[[], object]]:
    """Show what is being done, until it is done; nothing is left on the terminal.

    It is shown on a terminal or in a notebook; of a Trainer on rank 0, where it has a progress bar that is enabled: as
    a bar of tqdm, or, where the Trainer has a ``RichProgressBar``, as one of rich.

    Args:
        trainer: The user's Trainer; True: of a command, which has none; None or False: nothing is shown.
        what: In a few words.
        total: Number of steps; None where that is not known; 0 for work that has no steps, which is shown at once.

    Yields:
        To be called after each step.

    Example:
        >>> with sign(None, "Calibrating", total=2) as step:
        ...     for _ in range(2):
        ...         _ = step()
    """
    if not is_shown(trainer):
        yield lambda: None
        return
    bar = None if trainer is True else trainer.progress_bar_callback
    shown = _rich if any(base.__name__ == "RichProgressBar" for base in type(bar).__mro__) else _tqdm
    with shown(bar, what, total) as step:
        yield step


def is_shown(trainer: Any) -> bool:
    """Whether signs are wanted here.

    Args:
        trainer: A Trainer; True or False: shown or not; None: not.

    Returns:
        False on other ranks of a Trainer than 0, without an enabled bar in it, and wherever output goes to a file.

    Example:
        >>> import lightning.pytorch as L
        >>> is_shown(L.Trainer(enable_progress_bar=False, logger=False, enable_checkpointing=False, accelerator="cpu"))
        False
    """
    if trainer is None or isinstance(trainer, bool):
        wanted = bool(trainer)
    else:
        bar = trainer.progress_bar_callback
        wanted = bar is not None and bool(getattr(bar, "is_enabled", True)) and bool(trainer.is_global_zero)
    return wanted and (on_terminal() or "ipykernel" in sys.modules)


def on_terminal() -> bool:
    """Whether output goes to a terminal.

    Returns:
        False where nobody can tell: there is no output, it is closed, or a class of the user's own that only writes.

    Example:
        >>> isinstance(on_terminal(), bool)
        True
    """
    try:
        return bool(sys.stdout.isatty())
    except (AttributeError, OSError, ValueError):
        return False


@contextmanager
def _tqdm(bar: Any, what: str, total: int | None) -> Iterator[Callable[[], object]]:
    from tqdm import tqdm

    layout: dict[str, Any] = {"bar_format": "{desc} ..."} if total == 0 else {"delay": PATIENCE}
    with tqdm(desc=what, total=total or None, leave=False, file=sys.stdout, dynamic_ncols=True, **layout) as shown:
        yield shown.update


@contextmanager
def _rich(bar: Any, what: str, total: int | None) -> Iterator[Callable[[], object]]:
    """A task of the display that is live, if there is one, for two cannot be; else of a display of our own."""
    from rich.console import Console
    from rich.errors import LiveError
    from rich.progress import Progress

    live = bar.progress if bar.progress is not None and bar.progress.live.is_started else None
    progress = live or Progress(console=Console(file=sys.stdout), transient=True)  # whatever is redirected later
    if live is None:
        try:
            progress.start()
        except LiveError:  # within another sign, which is shown
            yield lambda: None
            return
    began, unknown = time.monotonic(), None if live is None else math.inf
    task = progress.add_task(what, total=total or unknown, visible=total == 0)

    def step() -> None:
        progress.update(task, advance=1, visible=time.monotonic() - began > PATIENCE)
        if live is not None:  # it is drawn anew when Lightning says so
            bar.refresh()

    try:
        yield step
    finally:
        progress.remove_task(task)
        progress.refresh()
        if live is None:
            progress.stop()
