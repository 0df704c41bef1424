"""A limit of time for work that may take for ever, in any thread."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class _Late(BaseException):
    """Ends the work; no user's ``except Exception`` catches it."""


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """End the work within when it has taken too long.

    The work ends between two lines of Python: one long call of C code is waited for.

    Args:
        seconds: How long it may take.
        message: What the error says.

    Raises:
        TimeoutError: If it has taken longer.

    Example:
        >>> with time_limit(0.05, "too long"):
        ...     while True:
        ...         time.sleep(0.01)
        Traceback (most recent call last):
        TimeoutError: too long
    """
    thread, lock = threading.get_ident(), threading.Lock()
    over = late = arrived = False

    def end() -> None:
        nonlocal late
        with lock:
            if not over:
                late = True
                _raise_in(thread, _Late)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        except _Late:
            arrived = True
            raise
        finally:
            timer.cancel()
            with lock:
                over = True
            for _ in range(100 if late and not arrived else 0):  # it is on its way, unless a bare except has met it
                time.sleep(0.001)
    except _Late:
        raise TimeoutError(message) from None
    if late:
        raise TimeoutError(message)


def _raise_in(thread: int, error: type[BaseException]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))
