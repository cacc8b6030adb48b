"""DecodeConfig: everything that the decode kernel is compiled for, as one frozen record that prints."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

ROWS = 16
"""Query rows of a work item: the M of mma.sync."""
COLUMNS = 64
"""Columns of one part of a head dim: 128 bytes, the widest swizzle of TMA."""

PARTING = 8
"""Tiles that a program has yet to ask for when it lets the next kernel begin, under DecodeFeature.PARTING."""

PARTS_TOGETHER = 16
"""Parts of an item that one program adds up in one of two steps; up to twice as many in one step, where that is all of them."""


class DecodeFeature(Enum):
    """What a kernel may be asked beyond a contiguous cache and a plain softmax; each is compiled in or absent."""

    STREAM_K = "stream_k"
    EARLY = "early"
    """A tile's slots are free as soon as it has been read, not when all of it has been multiplied with: more is on its way."""
    PARTING = "parting"
    """The next kernel may begin with the last tiles of programs' items left to ask for, not when all have been."""
    PAGED = "paged"
    PACKED = "packed"
    BATCH_INDEX = "batch_index"
    LEFTPAD = "leftpad"
    LEFT = "left"
    RIGHT = "right"
    SOFTCAP = "softcap"
    SINKS = "sinks"
    K_SCALES = "k_scales"
    V_SCALES = "v_scales"
    BLOCK_SCALES = "block_scales"
    """Scales differ from block to block of rows, not only from head to head or sequence to sequence."""


class Storage(Enum):
    """What the cache holds."""

    HALF = "16-bit"
    """The queries' own type."""
    E4M3 = "e4m3"
    """FP8, moved as pairs of columns in one 16-bit word."""


@dataclass(frozen=True)
class DecodeConfig:
    """One variant of the decode kernel. `rows`: 4 or 8 where an item never has more, else 16; `dims`, `dims_v`: the head dims in
    16-bit words, as parts of COLUMNS and a narrower last one; `box`: rows of one TMA copy, fewer than `keys` where a page is
    smaller than a tile; `registers`: a thread's at launch."""

    rows: int
    keys: int
    warps: int
    stages: int
    dims: tuple[int, ...]
    dims_v: tuple[int, ...]
    box: int
    registers: int
    storage: Storage
    features: tuple[DecodeFeature, ...] = ()

    def shared_bytes(self) -> int:
        """Shared memory of the ring and of the exchange of O, m and l between warps, in bytes (barriers not counted)."""
        return 2 * self.stages * self.keys * (sum(self.dims) + sum(self.dims_v)) + 4 * self.warps * ROWS * (COLUMNS + 2)

    def __str__(self) -> str:
        dim = "+".join(map(str, self.dims))
        dim += "" if self.dims == self.dims_v else "/" + "+".join(map(str, self.dims_v))
        text = f"{self.rows}x{self.keys} d{dim}, {self.stages} stages, {self.storage.value}"
        text += f", boxes of {self.box} rows" if self.box < self.keys else ""
        return text + "".join(f", {feature.value}" for feature in self.features)
