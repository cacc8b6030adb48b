"""Whether the registers that warps ask for are there: a form that wants more than its launch reserves waits for ever.

A launch reserves as many registers for each thread; what warps give back (setmaxnreg.dec) others take (setmaxnreg.inc), and wait
for it. A specialised kernel of Triton's asks three times: its workers as they wait for work, its default warps around the work,
and all of them for the work itself, where its workers' partitions have what the kernel says, and its default warps the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tessera.jit.sass import Code

WARPGROUP_THREADS = 128
_UNIT = 8  # registers a thread are given by eights
_NUMBER = re.compile(r"0x([0-9a-f]+)")

_Place = tuple[int, int]  # a block, and an instruction of it


@dataclass(frozen=True)
class Pool:
    """Registers of a block of threads: what its launch reserves, and the most that its warps hold at a time."""

    reserved: int
    wanted: int


def pool(code: Code, registers: int, threads: int, default_threads: int) -> Pool | None:
    """None for a kernel whose warps ask for nothing, or wait for their work in another way than a table of partitions."""
    asks = _Asks(code)
    first = {place: asks.following(place) for place, _ in asks.following((0, -1))[0]}
    waiting = [place for place, (_, by_table) in first.items() if by_table]
    others = [place for place, (_, by_table) in first.items() if not by_table]
    groups = (threads - default_threads) // WARPGROUP_THREADS
    if len(waiting) != 1 or len(others) != 1 or not groups:
        return None
    around = asks.number(others[0]) * default_threads + asks.number(waiting[0]) * (threads - default_threads)
    at_work = max((number for _, number in first[others[0]][0]), default=asks.number(others[0])) * default_threads
    # Warps of one warpgroup ask alike, so partitions of single warps come after those of whole warpgroups, or are the same.
    partitions = sorted((number for _, number in first[waiting[0]][0]), reverse=True)
    at_work += WARPGROUP_THREADS * sum(partitions[:groups])
    return Pool(-(-registers // _UNIT) * _UNIT * threads, max(around, at_work))


class _Asks:
    """The places of a kernel where warps change their number of registers."""

    def __init__(self, code: Code) -> None:
        self._blocks = code.blocks

    def number(self, place: _Place) -> int:
        found = _NUMBER.search(self._blocks[place[0]].instructions[place[1]].text)
        return int(found[1], 16) if found else 0

    def following(self, place: _Place) -> tuple[list[tuple[_Place, int]], bool]:
        """The next such places behind this one, on any path, each with its number; and whether a table of jumps comes before."""
        found: dict[_Place, int] = {}
        by_table, seen = False, set()
        waiting = [(place[0], place[1] + 1)]
        while waiting:
            block, at = waiting.pop(0)
            for index, one in enumerate(self._blocks[block].instructions[at:], at):
                if one.opcode == "USETMAXREG":
                    if (block, index) != place:  # a warp that waits for its registers asks again and again
                        found[block, index] = self.number((block, index))
                    break
                by_table |= one.opcode == "BRX"
            else:
                fresh = [successor for successor in self._blocks[block].successors if successor not in seen]
                seen.update(fresh)
                waiting += [(successor, 0) for successor in fresh]
        return list(found.items()), by_table
