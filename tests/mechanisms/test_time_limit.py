"""A limit of time, in the main thread and in others."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import pytest

from lightning_compress.mechanisms.time_limit import within


def endless():
    while True:
        time.sleep(0.001)


def in_a_thread(work):
    found = []

    def run():
        try:
            work()
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    return found


def limited(work, seconds=0.1):
    return within(seconds, work, "too long")


def test_in_the_main_thread_and_in_another():
    with pytest.raises(TimeoutError, match="too long"):
        limited(endless)
    [error] = in_a_thread(lambda: limited(endless))
    assert isinstance(error, TimeoutError)


def test_what_is_in_time_is_left_alone():
    assert limited(lambda: 3) == 3
    time.sleep(0.2)  # nothing comes later
    assert threading.active_count() >= 1


def test_no_except_of_the_users_catches_it():
    def stubborn():
        while True:
            with suppress(Exception):
                endless()

    with pytest.raises(TimeoutError):
        limited(stubborn)


def test_a_bare_except_ends_in_the_error_too():
    def swallowing():
        try:
            endless()
        except BaseException:
            return

    with pytest.raises(TimeoutError):
        limited(swallowing)


def test_errors_of_the_work_are_its_own():
    with pytest.raises(KeyError, match="mine"):
        limited(lambda: {}["mine"])
    time.sleep(0.2)


def test_often_at_the_edge_nothing_escapes():
    done = 0
    for _ in range(200):
        with suppress(TimeoutError):
            limited(lambda: time.sleep(0.001), seconds=0.001)
        done += 1
    time.sleep(0.05)
    assert done == 200
