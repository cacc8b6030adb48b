"""The threads that stand for warps (tests/gluon_turns.py)."""

from __future__ import annotations

import threading
from functools import partial

import pytest
from gluon_in_python import Mbarrier
from gluon_turns import Deadlock, give_way, run_together, wait_until


def test_one_runs_at_a_time_and_all_end() -> None:
    met, inside = [], threading.Semaphore(1)

    def job(name: int) -> None:
        for turn in range(5):
            assert inside.acquire(blocking=False)
            met.append((name, turn))
            inside.release()
            give_way()

    run_together([partial(job, name) for name in range(4)])
    assert sorted(met) == [(name, turn) for name in range(4) for turn in range(5)]
    assert met != sorted(met)


def test_a_wait_that_nobody_ends_is_an_error_at_once() -> None:
    ended = []

    def program() -> None:
        run_together([lambda: wait_until(lambda: False, "a barrier"), lambda: wait_until(lambda: False, "a barrier")])

    with pytest.raises(Deadlock, match="deadlock at a barrier"):
        run_together([program, lambda: ended.append("other")])
    assert ended == ["other"]


def test_the_first_error_comes_out_and_those_who_wait_for_its_thread_end() -> None:
    def fails() -> None:
        raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        run_together([fails, lambda: wait_until(lambda: False, "what the other would have done")])


def test_mbarriers_count_phases() -> None:
    bar, read = Mbarrier(), [False] * 3
    bar.init(2)

    def reader() -> None:
        for lap in range(3):
            bar.wait(lap & 1)
            read[lap] = True

    def writer() -> None:
        for lap in range(3):
            bar.arrive()
            wait_until(lambda lap=lap: read[lap], "the reader")

    run_together([reader, writer, writer])
    assert all(read)


def test_an_arrival_too_many_is_an_error() -> None:
    bar = Mbarrier()
    bar.init(1)
    bar.arrive(expected=8)
    with pytest.raises(AssertionError, match="more arrivals"):
        bar.arrive()
