"""Scratch memory of decoding: partial results, and tickets that are 0 between launches.

Launches of one stream follow one another, so they share their memory. A captured launch may be replayed beside anything, so it
has its own: the partial results come from the graph's memory, the tickets from a stock that was zeroed before.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

STOCK = 1 << 16
"""Tickets that are zeroed at a time."""


class Workspace:
    """The scratch memory of all devices and streams. Safe for many threads: a stream's own is replaced, never changed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._partial: dict[tuple[int, int], Tensor] = {}
        self._tickets: dict[tuple[int, int], Tensor] = {}
        self._stock: dict[int, list[Tensor]] = {}
        self._taken: dict[int, int] = {}

    def partial(self, device: int, stream: int, count: int) -> Tensor:
        """At least `count` float32. Kept for the next launch of the stream; under capture a new tensor of the graph's."""
        if torch._C._cuda_isCurrentStreamCapturing():
            return torch.empty(count, dtype=torch.float32, device=torch.device("cuda", device))
        found = self._partial.get((device, stream))
        if found is None or found.numel() < count:
            found = torch.empty(count, dtype=torch.float32, device=torch.device("cuda", device))
            self._partial[device, stream] = found
        return found

    def tickets(self, device: int, stream: int, count: int) -> Tensor:
        """At least `count` int32 that are 0, and that a launch leaves 0."""
        if torch._C._cuda_isCurrentStreamCapturing():
            return self._take(device, count)
        found = self._tickets.get((device, stream))
        if found is None or found.numel() < count:
            found = _zeros(device, max(count, 4096))
            self._tickets[device, stream] = found
            self._restock(device)
        return found

    def _take(self, device: int, count: int) -> Tensor:
        """Tickets for a captured launch: never given back (4 bytes each)."""
        with self._lock:
            stock, taken = self._stock.get(device, []), self._taken.get(device, 0)
            if stock and taken + count <= STOCK:
                self._taken[device] = taken + count
                return stock[-1][taken : taken + count]
        # none left, and none can be zeroed aside of a capture: this launch's are zeroed by the graph, each time
        return torch.zeros(count, dtype=torch.int32, device=torch.device("cuda", device))

    def _restock(self, device: int) -> None:
        """See to it that a capture that comes next finds a stock."""
        with self._lock:
            if device not in self._stock or self._taken.get(device, 0) > STOCK // 2:
                self._stock.setdefault(device, []).append(_zeros(device, STOCK))
                self._taken[device] = 0


def _zeros(device: int, count: int) -> Tensor:
    """Zeroed on a stream of its own: any stream may use them at once, and to wait for it is to wait for nobody's work."""
    aside = torch.cuda.Stream(device)
    with torch.cuda.stream(aside):
        zeros = torch.zeros(count, dtype=torch.int32, device=torch.device("cuda", device))
    aside.synchronize()
    return zeros


workspace = Workspace()
