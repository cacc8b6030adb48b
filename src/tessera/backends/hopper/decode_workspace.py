"""Scratch memory of decoding: partial results, and tickets that are 0 between launches.

Launches of one stream follow one another, so they share their memory. A graph may be replayed beside anything, so it has its
own: partial results come from the graph's memory, tickets from a stock that was zeroed before, for all launches of the graph's
stream the same ones.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from tessera.backends.hopper.launch import is_captured
from tessera.backends.hopper.room import cleared, kept, room
from tessera.jit import driver

STOCK = 1 << 16
"""Tickets that are zeroed at a time."""


class Workspace:
    """The scratch memory of all devices and streams. Safe for many threads: a stream's own is replaced, never changed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._partial: dict[tuple[int, int], Tensor] = {}
        self._tickets: dict[tuple[int, int], Tensor] = {}
        self._stock: dict[int, Tensor] = {}
        self._taken: dict[int, int] = {}
        self._captured: dict[tuple[int, int, int], Tensor] = {}

    def of(self, device: int, stream: int, count: int, tickets: int) -> tuple[Tensor, Tensor]:
        """At least `count` float32, and at least `tickets` int32 that are 0 and that a launch leaves 0. Both are kept for the
        next launch of the stream; under capture the first is a new tensor of the graph's."""
        if is_captured(stream):
            partial = torch.empty(count, dtype=torch.float32, device=torch.device("cuda", device))
            return partial, self._of_capture((device, stream, driver.capture_id(stream)), tickets)
        if self._taken.get(device, STOCK) > STOCK // 2:
            with self._lock:  # a capture that comes next finds a stock
                self._stock[device], self._taken[device] = cleared(STOCK, device), 0
        place = (device, stream)
        found, zeros = self._partial.get(place), self._tickets.get(place)
        if found is None or found.numel() < count:
            found = self._partial[place] = kept(room((count,), torch.float32, torch.device("cuda", device)), device)
        if zeros is None or zeros.numel() < tickets:
            zeros = self._tickets[place] = cleared(max(tickets, 4096), device)
        return found, zeros

    def _of_capture(self, key: tuple[int, int, int], count: int) -> Tensor:
        """A captured stream's tickets. They are kept as long as the process: nobody says when a graph ends."""
        device = key[0]
        with self._lock:
            found = self._captured.get(key)
            if found is not None and found.numel() >= count:
                return found
            stock, taken = self._stock.get(device), self._taken.get(device, 0)
            if stock is not None and taken + count <= STOCK:
                self._taken[device] = taken + count
                found = self._captured[key] = stock[taken : taken + count]
                return found
        # none left, and none can be zeroed beside a capture: this launch's are zeroed by the graph, each time
        return torch.zeros(count, dtype=torch.int32, device=torch.device("cuda", device))


workspace = Workspace()
