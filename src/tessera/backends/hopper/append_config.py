"""AppendConfig: everything that the append kernel is compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

PAIRS_OF_THREAD = 8
"""Pairs of columns of a row that a thread has: 16 bytes of each of two 16-bit halves."""
WARPS = 4


class AppendFeature(Enum):
    """What the kernel may be asked beyond a copy into a contiguous 16-bit cache; each is compiled in or absent."""

    INTERLEAVED = "interleaved"
    HALVES = "halves"
    """The rotary embedding's two styles."""
    PACKED = "packed"
    PAGED = "paged"
    BATCH_INDEX = "batch_index"
    E4M3 = "e4m3"
    K_SCALES = "k_scales"
    V_SCALES = "v_scales"


@dataclass(frozen=True)
class AppendConfig:
    """One variant. `columns`: a power of two that holds a head's columns; `heads`: how many a thread does, the same columns of
    each, whose angles it reads once; `step`: columns that may move at once, PAIRS_OF_THREAD or a smaller power of two, since all
    rows, their halves and the tables begin at whole steps in memory."""

    columns: int
    heads: int
    step: int = PAIRS_OF_THREAD
    features: tuple[AppendFeature, ...] = ()

    @property
    def lanes(self) -> int:
        """Threads of a warp that share a row's pairs of columns."""
        return min(32, self.columns // 2 // PAIRS_OF_THREAD)

    @property
    def tokens(self) -> int:
        """Tokens of one program."""
        return WARPS * 32 // self.lanes

    def __str__(self) -> str:
        step = "" if self.step == PAIRS_OF_THREAD else f", {self.step} at once"
        text = f"{self.columns} columns of {self.heads} heads{step}"
        return text + "".join(f", {feature.value}" for feature in self.features)
