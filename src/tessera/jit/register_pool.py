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
    """None for a kernel whose warps ask for nothing, or not in this way."""
    asks = _Asks(code)
    first = asks.following((0, -1))
    waiting = [place for place in first if asks.comes_again(place)]  # workers wait for work in a loop
    others = [place for place in first if place not in waiting]
    groups = (threads - default_threads) // WARPGROUP_THREADS
    if len(waiting) != 1 or len(others) != 1 or not groups:
        return None
    around = first[others[0]] * default_threads + first[waiting[0]] * (threads - default_threads)
    at_work = max(asks.following(others[0]).values(), default=first[others[0]]) * default_threads
    # Warps of one warpgroup ask alike, so partitions of single warps come after those of whole warpgroups, or are the same.
    partitions = sorted(asks.following(waiting[0]).values(), reverse=True)
    at_work += WARPGROUP_THREADS * sum(partitions[:groups])
    return Pool(-(-registers // _UNIT) * _UNIT * threads, max(around, at_work))


class _Asks:
    """The places of a kernel where warps change their number of registers."""

    def __init__(self, code: Code) -> None:
        self._blocks = code.blocks

    def following(self, place: _Place) -> dict[_Place, int]:
        """The next such places behind this one, on any path, each with its number."""
        found: dict[_Place, int] = {}
        seen: set[int] = set()
        waiting = [(place[0], place[1] + 1)]
        while waiting:
            block, at = waiting.pop(0)
            for index, one in enumerate(self._blocks[block].instructions[at:], at):
                if one.opcode == "USETMAXREG":
                    if (block, index) != place:  # a warp that waits for its registers asks again and again
                        number = _NUMBER.search(one.text)
                        found[block, index] = int(number[1], 16) if number else 0
                    break
            else:
                fresh = [successor for successor in self._blocks[block].successors if successor not in seen]
                seen.update(fresh)
                waiting += [(successor, 0) for successor in fresh]
        return found

    def comes_again(self, place: _Place) -> bool:
        """Whether a warp comes to this place again after it has been at others."""
        seen: set[_Place] = set()
        waiting = [*self.following(place)]
        while waiting:
            at = waiting.pop()
            if at == place:
                return True
            if at not in seen:
                seen.add(at)
                waiting += self.following(at)
        return False
