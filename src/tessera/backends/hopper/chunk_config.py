"""ChunkConfig and LatentConfig: what the kernels over a KV cache for many rows are compiled for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum

from tessera.backends.hopper.config import ROWS, STAGES, Feature, Overlap, Pairing, refuse_deep_rings

COLUMNS = 64
"""Columns of one TMA box of the caches and of the queries: 128 bytes, the widest swizzle."""


class CacheFeature(Enum):
    """What a kernel over a cache may be asked beyond config.Feature; each is compiled in or absent."""

    PAGES = "pages"
    BATCH_INDEX = "batch_index"
    LEFTPAD = "leftpad"
    APPEND = "append"
    """The cache holds rows past cache_seqlens that this call has appended."""


class Reading(Enum):
    """How rows of the cache come to shared memory."""

    BOXES = "boxes"
    """TMA boxes: contiguous caches, and pages of so many rows that their boxes are few."""
    ROWS = "rows"
    """Row by row, by cp.async from four warps: smaller pages, and left padding in pages."""


class Result(Enum):
    """What a kernel leaves."""

    WHOLE = "out and lse"
    PART = "a part of the keys, for combine.py"
    JOINED = "out and lse, two programs a half of the keys each"
    """The two are a cluster (pieces/joining.py)."""


class Turns(Enum):
    """How latent.py's `left` goes over tiles."""

    SINGLE = "tile by tile"
    """The softmax of a tile waits for its scores, and the tensor cores for the softmax."""
    PAIRS = "two tiles at a time"
    """One tile's softmax runs under the other's products; both tiles must have come before either is given back."""


Features = tuple[Feature | CacheFeature, ...]


@dataclass(frozen=True)
class Packing:
    """How rows of 64 are made of queries: `heads` query heads of one key/value head, a power of two, times 64 / heads positions.

    Rows of one position follow one another, so bounds of the mask never fall from row to row. `blocks`: how often `heads` fits in
    the group, rounded up; more than one block only at 64 heads.
    """

    heads: int
    blocks: int

    @property
    def positions(self) -> int:
        return ROWS // self.heads

    @classmethod
    def of(cls, group: int) -> Packing:
        heads = min(ROWS, 1 << (group - 1).bit_length())
        return cls(heads, -(-group // heads))

    def __str__(self) -> str:
        return f"{self.positions} positions x {self.heads} heads" + (f", {self.blocks} blocks" if self.blocks > 1 else "")


@dataclass(frozen=True)
class Parts:
    """Some parts of a head dim: their sizes, powers of two and multiples of 64, and each one's first column."""

    dims: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def of(cls, dims: tuple[int, ...]) -> Parts:
        """All parts of a head dim, one after the other."""
        return cls(dims, tuple(sum(dims[:part]) for part in range(len(dims))))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, 16-bit elements."""
        return 2 * sum(self.dims)


class Together(ABC):
    """What follows from how programs pair to load keys once for both (pieces/cluster.py), for both kernels' configurations."""

    pairing: Pairing | None

    @property
    @abstractmethod
    def positions(self) -> int: ...

    @property
    @abstractmethod
    def head_tiles(self) -> int: ...

    @property
    def tiles_together(self) -> int:
        """Tiles that programs of a cluster do, one each, over the same keys."""
        return 1 if self.pairing is None else 2

    @property
    def positions_together(self) -> int:
        """Query positions of those tiles."""
        return self.positions * (2 if self.pairing is Pairing.ROWS else 1)

    @property
    def head_tiles_together(self) -> int:
        """Such groups of tiles that share a position and a key/value head."""
        return self.head_tiles // (2 if self.pairing is Pairing.HEADS else 1)


@dataclass(frozen=True)
class ChunkConfig(Together):
    """One variant of chunk.py. `box`: cache rows that are copied at once, `keys` where the cache is contiguous.
    `widths`: the columns that there are of the keys and of the values; the parts' others are zeros."""

    consumers: int
    keys: int
    stages: int
    reading: Reading
    box: int
    parts: Parts
    parts_v: Parts
    widths: tuple[int, int]
    packing: Packing
    result: Result
    overlap: Overlap
    consumer_registers: int
    producer_registers: int
    features: Features = ()
    pairing: Pairing | None = None

    policy = None

    def __post_init__(self) -> None:
        refuse_deep_rings(self.stages, STAGES)

    @property
    def rows(self) -> int:
        """Query rows of a tile."""
        return ROWS * self.consumers

    @property
    def positions(self) -> int:
        """Query positions of a tile."""
        return 1 if self.packing.blocks > 1 else self.packing.positions * self.consumers

    @property
    def cluster(self) -> int:
        """Programs that load their keys together, or share a tile's keys and put their sums together."""
        return 2 if self.result is Result.JOINED else self.tiles_together

    @property
    def width_v(self) -> int:
        """Columns of out."""
        return self.widths[1]

    @property
    def head_tiles(self) -> int:
        """Tiles that share a position and a key/value head."""
        return -(-self.packing.blocks // self.consumers)

    def shared_bytes(self) -> int:
        """Shared memory of the tiles, in bytes (16-bit elements; barriers not counted)."""
        keys = self.stages * self.keys * (self.parts.row_bytes + self.parts_v.row_bytes)
        return self.rows * self.parts.row_bytes + keys

    def __str__(self) -> str:
        return _described(self, f"{self.consumers} consumers, PV under {self.overlap.value}")


@dataclass(frozen=True)
class LatentConfig(Together):
    """One variant of latent.py. `parts`: the latent's two halves, which are the values too, then what positions turn.
    `consumer_registers`: of `right`; `left` has what the others leave. `policy`: for L2, of the keys, as tma_load_as has it."""

    keys: int
    stages: int
    reading: Reading
    box: int
    parts: Parts
    widths: tuple[int, int]
    packing: Packing
    result: Result
    turns: Turns
    consumer_registers: int
    producer_registers: int
    features: Features = ()
    pairing: Pairing | None = None
    policy: str | None = None

    rows = ROWS
    consumers = 1

    def __post_init__(self) -> None:
        refuse_deep_rings(self.stages, STAGES)

    @property
    def cluster(self) -> int:
        """Programs that load their keys together."""
        return self.tiles_together

    @property
    def outer(self) -> Parts:
        """The left half of the latent, and what positions turn."""
        return Parts((self.parts.dims[0], self.parts.dims[2]), (self.parts.columns[0], self.parts.columns[2]))

    @property
    def right(self) -> Parts:
        """The right half of the latent."""
        return Parts(self.parts.dims[1:2], self.parts.columns[1:2])

    @property
    def positions(self) -> int:
        """Query positions of a tile."""
        return self.packing.positions

    @property
    def width_v(self) -> int:
        """Columns of out."""
        return self.widths[1]

    @property
    def head_tiles(self) -> int:
        """Tiles that share a position."""
        return self.packing.blocks

    def shared_bytes(self) -> int:
        """Shared memory of the tiles, in bytes (16-bit elements; barriers and row factors not counted)."""
        return self.parts.row_bytes * (self.rows + self.stages * self.keys) + 2 * self.rows * self.keys

    def __str__(self) -> str:
        return _described(self, f"values in the keys, {self.turns.value}")


def _described(config: ChunkConfig | LatentConfig, work: str) -> str:
    dim = "+".join(map(str, config.parts.dims))
    boxes = "" if config.box == config.keys else f" in boxes of {config.box}"
    if config.reading is Reading.ROWS:
        boxes = " row by row"
    text = f"{config.rows}x{config.keys}{boxes} d{dim}, {work}, {config.stages} stages, {config.packing}, {config.result.value}"
    text += f", pairs of {config.pairing.value}" if config.pairing else ""
    return text + "".join(f", {feature.value}" for feature in config.features)
