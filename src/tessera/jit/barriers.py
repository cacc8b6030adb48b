"""Barriers in shared memory that a kernel makes and nobody uses: a fault that shows in no run by itself.

Triton's allocator sees that such a barrier is dead and gives its bytes to other data. PTX forbids that (parallel synchronization
instructions, mbarrier: without `mbarrier.inval` its memory may serve for nothing else), and the hardware means it: when two
processes share a GPU, a switch from one to the other in the middle of a kernel overwrites those bytes (H200, 2026-11-21: dQ had
NaN in eight elements of one in a hundred runs, and never while one process had the GPU).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_ALLOCATED = re.compile(r"(%[\w]+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<[\dx]*xi64,")
_INDEXED = re.compile(r"(%[\w]+) = ttg\.memdesc_index (%[\w]+)\[")
_INITIALISED = re.compile(r"ttng\.init_barrier (%[\w]+),")
_NAME = re.compile(r"%[\w]+")
_PARTITION = re.compile(r"( *)partition\d+\(")


def unused(ttgir: str) -> tuple[str, ...]:
    """The names, in Triton's GPU dialect, of allocations whose barriers are initialised and have no other use.

    What a warp partition captures counts as used: it lives as long as the partitions run."""
    owners: dict[str, str] = {}
    initialised: set[str] = set()
    used: set[str] = set()
    for line in _outside_partitions(ttgir):
        if found := _ALLOCATED.search(line):
            owners[found[1]] = found[1]
        elif (found := _INDEXED.search(line)) and found[2] in owners:
            owners[found[1]] = owners[found[2]]
        elif found := _INITIALISED.search(line):
            initialised |= {owners[name] for name in found.groups() if name in owners}
        else:
            used |= {owners[name] for name in _NAME.findall(line) if name in owners}
    return tuple(name for name in dict.fromkeys(owners.values()) if name in initialised - used)


def _outside_partitions(ttgir: str) -> Iterator[str]:
    """Partitions number their names anew, and reach what lies outside by their captures alone."""
    end = None
    for line in ttgir.splitlines():
        begins = _PARTITION.match(line)
        if begins:
            end = begins[1] + "}"
        if end is None:
            yield line
        elif line.startswith(end):
            end = None
