"""A limit of time for work that may take for ever, in any thread."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class _Late(BaseException):
    """Ends the work; no user's ``except Exception`` catches it."""


def within(seconds: float, work: Callable[[], T], message: str) -> T:
    """Do some work, and end it when it has taken too long.

    It ends between two lines of Python: one long call of C code is waited for.

    Args:
        seconds: How long it may take.
        work: Called once.
        message: What the error says.

    Returns:
        What the work returns.

    Raises:
        TimeoutError: If it has taken longer.

    Example:
        >>> within(10.0, lambda: "done", "too long")
        'done'
        >>> within(0.05, lambda: [time.sleep(0.01) for _ in range(1000)], "too long")
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
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Late))

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    try:
        try:
            timer.start()  # which may be over before it returns
            result = work()
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
    return result
