"""Threads that take turns: one runs until it waits for what has not happened yet, then any of those that can go on does.

A writer thus runs as far ahead as it may, and so does a reader; a wait that nobody ends is known at once; a failure comes again,
for chance has a seed; and no two threads fight for the interpreter's lock.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence

_line: list[tuple[threading.Lock, Callable[[], bool]]] = []
"""Who waits, by the lock that starts them, and for what; a thread that waits for others stands before them."""
_chance = random.Random()


class Deadlock(RuntimeError):
    """Everybody waits."""


def wait_until(happened: Callable[[], bool], name: str) -> None:
    """Let others run until `happened()`."""
    if happened():
        return
    _step_back(happened)
    if not happened():
        raise Deadlock(f"deadlock at {name}")


def give_way() -> None:
    """Let another run first: for a thread that asks the same again and again."""
    _step_back(lambda: True)


def _step_back(happened: Callable[[], bool]) -> None:
    turn = _in_line(happened)
    _start_another()
    turn.acquire()


def _in_line(happened: Callable[[], bool]) -> threading.Lock:
    turn = threading.Lock()
    turn.acquire()
    _line.append((turn, happened))
    return turn


def _start_another() -> None:
    """Where nobody can go on, the last in line learns of it."""
    able = [i for i, (_, happened) in enumerate(_line) if happened()]
    turn, _ = _line.pop(_chance.choice(able) if able else -1)
    turn.release()


class Meeting:
    """Where `count` threads wait for one another, again and again."""

    def __init__(self, count: int) -> None:
        self._count, self._arrived = count, 0

    def meet(self) -> None:
        self._arrived += 1
        complete = -(-self._arrived // self._count) * self._count
        wait_until(lambda: self._arrived >= complete, "a meeting")


def run_together(jobs: Sequence[Callable[[], None]]) -> None:
    """Every job in a thread of its own; when all have ended, the first error of any of them is raised."""
    errors: list[BaseException] = []
    ended = 0

    def one(job: Callable[[], None], turn: threading.Lock) -> None:
        nonlocal ended
        turn.acquire()
        try:
            job()
        except BaseException as error:
            errors.append(error)
        ended += 1
        _start_another()

    if not _line:
        _chance.seed(0)
    begun = _in_line(lambda: ended == len(jobs))
    for job in jobs:
        threading.Thread(target=one, args=(job, _in_line(lambda: True))).start()
    _start_another()
    begun.acquire()
    if errors:
        raise errors[0]
