"""The programs of one cluster, as tests/gluon_in_python.py runs them: at once, and within reach of each other's shared memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from gluon_turns import Meeting, run_together


class Cluster:
    """What its programs share: a place to meet, and where each has allocated what. The same program runs in all of them, so the
    i-th allocation of one is the i-th of another."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._allocated: list[list[Any]] = [[] for _ in range(size)]
        self.meet = Meeting(size).meet

    def allocated(self, rank: int, memory: Any) -> Any:
        self._allocated[rank].append(memory)
        return memory

    def there(self, rank: int, memory: Any, further: int = 0) -> Any:
        """What program `rank` has in the place of this one's `memory`: a view of tiles, or a barrier, or one `further` on."""
        for i, owned in ((i, one) for allocated in self._allocated for i, one in enumerate(allocated)):
            other = self._allocated[rank][i]
            if hasattr(owned, "barriers"):
                if memory in owned.barriers:
                    return other.barriers[owned.barriers.index(memory) + further]
            elif hasattr(memory, "data") and memory.data.untyped_storage().data_ptr() == owned.data.untyped_storage().data_ptr():
                view = memory.data
                return type(memory)(torch.as_strided(other.data, view.shape, view.stride(), view.storage_offset()))
        raise AssertionError("not in shared memory")

    def run(self, program: Callable[[int], None]) -> None:
        """program(rank) of all ranks at once."""
        run_together([partial(program, rank) for rank in range(self.size)])


class Place:
    """The address of an mbarrier, in this program or (`of`) in another of the cluster; adding 8 gives the next one's."""

    def __init__(self, cluster: Cluster, bar: Any, rank: int | None = None, offset: int = 0) -> None:
        self._cluster, self._bar, self._rank, self._offset = cluster, bar, rank, offset

    def of(self, rank: int) -> Place:
        return Place(self._cluster, self._bar, rank, self._offset)

    def __add__(self, offset: int) -> Place:
        return Place(self._cluster, self._bar, self._rank, self._offset + offset)

    def bar(self) -> Any:
        assert self._rank is not None
        assert self._offset % 8 == 0
        return self._cluster.there(self._rank, self._bar, self._offset // 8)

    def send(self, number: int) -> None:
        self.bar().behind = int(number)
        self.bar().land(4)


class Words:
    """Mbarriers seen as int32: what was sent behind one of them (two words a place; see compat.send_in_cluster)."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def index(self, i: int) -> Any:
        number = self._owner.barriers[i // 2 - 1].behind
        return SimpleNamespace(load=lambda _: torch.tensor([number]))
