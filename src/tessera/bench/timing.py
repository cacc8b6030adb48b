"""Timing in turns. Two programs are compared by the ratio of their times within each round, never by two separate averages.

A GPU's clock moves by several percent with its temperature, and a shared CPU's by more. Timed in turns (ours, peer, ours, ...)
both meet the same weather; the median of the paired ratios is the figure, their quartiles its spread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from tessera.jit import settle

Call = Callable[[], object]

_MEGABYTE = 1 << 20


class Clock(Protocol):
    """Measures one call on one kind of device."""

    def seconds(self, call: Call, repeats: int) -> float:
        """The median time of `repeats` calls, each on its own."""
        ...


class CpuClock:
    """Wall time. Inputs are as warm in the caches as the call before left them, as in a layer of a model."""

    def seconds(self, call: Call, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


class CudaClock:
    """Time between two CUDA events around each call, with the L2 cache flushed before it.

    The stream sleeps first, so that every launch is queued before the first runs: the time of the host, which a real
    program hides behind the GPU's work, is not counted.
    """

    QUEUE_CYCLES = 2_000_000  # about 1 ms: longer than it takes to enqueue a few calls
    FLUSHED_BYTES = 256 * _MEGABYTE  # several times the L2 of any GPU (50 MB on an H100)

    def __init__(self, device: torch.device | str = "cuda"):
        self.device = torch.device(device)
        self._flushed = torch.empty(self.FLUSHED_BYTES, dtype=torch.int8, device=self.device)

    def seconds(self, call: Call, repeats: int) -> float:
        with torch.cuda.device(self.device):  # events are recorded on the current device's stream
            return self._seconds(call, repeats)

    def _seconds(self, call: Call, repeats: int) -> float:
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        torch.cuda._sleep(self.QUEUE_CYCLES)
        for start, end in zip(starts, ends, strict=True):
            self._flushed.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)) / 1e3


def clock_for(device: torch.device | str) -> Clock:
    """The clock of a device's kind."""
    return CudaClock(device) if torch.device(device).type == "cuda" else CpuClock()


@dataclass(frozen=True)
class Schedule:
    """How long to measure. `rounds` turns; in each, a call runs `unmeasured` times, then so often that it takes about `turn_s`,
    at least once and at most `most_repeats` times; then the device rests for `rest_s`. Rounds stop once `limit_s` is over, two
    are always made.

    A GPU at its power limit runs a call at the clock that the calls of the last tenth of a second have left it: either it rests
    between turns, or each turn begins with calls of its own that are not measured.
    """

    rounds: int = 7
    turn_s: float = 0.02
    most_repeats: int = 20
    rest_s: float = 0.0
    limit_s: float = 30.0
    unmeasured: int = 0

    @staticmethod
    def of(device: torch.device | str) -> Schedule:
        """Three launches a turn and 20 ms of rest on a GPU: a card that has cooled runs at its full clock."""
        if torch.device(device).type == "cuda":
            return Schedule(rounds=5, turn_s=1.0, most_repeats=3, rest_s=0.02)
        return Schedule()


def interleaved(calls: Mapping[str, Call], clock: Clock, schedule: Schedule) -> dict[str, tuple[float, ...]]:
    """Seconds of each call in each round, the calls taking turns; each call first runs twice to warm up, and what it has compiled
    beside the program, which takes the host's time from all calls, is waited for."""
    deadline = time.monotonic() + schedule.limit_s
    repeats = {}
    for name, call in calls.items():
        call()
        estimate = clock.seconds(call, 1)
        repeats[name] = max(1, min(schedule.most_repeats, int(schedule.turn_s / max(estimate, 1e-9))))
    settle()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(schedule.rounds):
        if round_number >= 2 and time.monotonic() > deadline:
            break
        for name in _order(list(calls), round_number):
            for _ in range(schedule.unmeasured):
                calls[name]()
            times[name].append(clock.seconds(calls[name], repeats[name]))
            time.sleep(schedule.rest_s)
    return {name: tuple(values) for name, values in times.items()}


def _order(names: list[str], round_number: int) -> list[str]:
    """Nobody is always first, and nobody always follows the same neighbour: every second round goes backwards."""
    first = round_number // 2 % len(names)
    turned = names[first:] + names[:first]
    return turned[::-1] if round_number % 2 else turned


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios and their quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def speedup(ours: tuple[float, ...], theirs: tuple[float, ...]) -> Ratio:
    """How many times faster we are, round by round: above 1 where ours took less time."""
    return quartiles([b / a for a, b in zip(ours, theirs, strict=True)])


def quartiles(values: list[float]) -> Ratio:
    """Median and quartiles; of fewer than two values, the value itself."""
    middle = statistics.median(values)
    if len(values) < 2:
        return Ratio(middle, middle, middle)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(middle, low, high)
