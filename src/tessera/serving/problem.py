"""CacheProblem: what is asked of attention over a KV cache, and nothing of how. Frozen, hashable, no tensors, no device.

How long each sequence is stands in device memory and is no part of it: a problem, hence a plan and a kernel, serves a server's
whole life while sequences grow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch

from tessera.mask import MaskSpec
from tessera.problem import Layout, Reproducibility, Score, Shape

MAX_LATENT_DIM = 576
"""The head_dim limit where the values are the keys' first columns (MLA's absorbed form: 512 latent + 64 rotary)."""


class Values(Enum):
    """Where the values of the cache are."""

    OWN = "in v_cache"
    IN_KEYS = "the first columns of k_cache"
    """MLA's absorbed form: key and value are one latent row, to be read once"""


@dataclass(frozen=True)
class Pages:
    """A paged cache: a pool of `count` pages of `size` rows; a sequence names up to `per_sequence` of them in page_table."""

    size: int
    per_sequence: int
    count: int

    def __str__(self) -> str:
        return f"{self.count} pages of {self.size}, {self.per_sequence} a sequence"


class Granularity(Enum):
    """What shares one scale of an FP8 cache."""

    HEAD = "per head"
    """(heads_kv,)"""
    SEQUENCE = "per sequence and head"
    """(batch, heads_kv), by the query's batch index, as FlashAttention-3 has it"""
    BLOCK = "per block of rows and head"
    """(pages or cache entries, blocks, heads_kv): the rows of a page (or entry) in equal blocks"""


@dataclass(frozen=True)
class Descale:
    """The scales that stored FP8 values are multiplied by. `rows`: how many rows share one under Granularity.BLOCK, else 0."""

    granularity: Granularity
    rows: int = 0

    def __str__(self) -> str:
        return f"per {self.rows} rows and head" if self.rows else self.granularity.value


@dataclass(frozen=True)
class Cache:
    """The cache's form. `entries`: how many sequences a contiguous cache holds, 0 for a paged one; `pages`: None if contiguous.

    `dtype` is the stored one: the queries', or float8_e4m3fn with `k_descale` and `v_descale` (None: scales of 1).
    """

    dtype: torch.dtype
    entries: int = 0
    pages: Pages | None = None
    values: Values = Values.OWN
    k_descale: Descale | None = None
    v_descale: Descale | None = None

    @property
    def is_quantised(self) -> bool:
        return self.dtype == torch.float8_e4m3fn

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"{dtype} cache, {self.pages or f'{self.entries} entries'}"
        if self.values is Values.IN_KEYS:
            text += ", values in the keys"
        return text + (f", k scaled {self.k_descale}" if self.k_descale else "")


class RotaryStyle(Enum):
    """Which two columns turn together."""

    INTERLEAVED = "interleaved"
    """(0, 1), (2, 3), ...: GPT-J's"""
    HALVES = "halves"
    """(0, dim / 2), (1, dim / 2 + 1), ...: GPT-NeoX's and Llama's"""


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of q and of the appended k on their first `dim` columns; the tables hold `positions` rows of `dtype`."""

    dim: int
    style: RotaryStyle
    positions: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"rotary {self.dim} {self.style.value}"


@dataclass(frozen=True)
class Append:
    """New rows for the cache, written in place before anything is read: `seqlen` a sequence, in packed form the total; of q's
    dtype, or as the cache keeps them."""

    seqlen: int
    dtype: torch.dtype
    rotary: Rotary | None = None

    def __str__(self) -> str:
        stored = f" in {str(self.dtype).removeprefix('torch.')}" if self.dtype.itemsize == 1 else ""
        return f"append {self.seqlen}{stored}" + (f" with {self.rotary}" if self.rotary else "")


class Schedule(Enum):
    """How the keys are shared out over a GPU's multiprocessors."""

    SPLIT = "split"
    """every sequence's keys in the same number of parts (Flash-Decoding)"""
    STREAM_K = "stream_k"
    """equal numbers of key tiles for each multiprocessor, across sequences (Lean Attention, arXiv 2405.10480)"""


@dataclass(frozen=True)
class CacheProblem:
    """One problem of attention over a KV cache, complete but for the tensors' contents.

    `shape`: seqlen_q is that of q (packed: the total), seqlen_k the most rows that one sequence's cache can hold. `dtype` is that
    of q, out and the appended rows. `lengths` names the optional tensors that say where sequences stand ("cu_seqlens_q",
    "cache_batch_idx", "cache_leftpad"); cache_seqlens is always there. `splits` and `schedule` are the user's wish, None for
    the planner's choice; the answer is the same to rounding.
    """

    shape: Shape
    dtype: torch.dtype
    score: Score
    cache: Cache
    layout: Layout = Layout.DENSE
    mask: MaskSpec = field(default_factory=MaskSpec)
    lengths: tuple[str, ...] = ()
    append: Append | None = None
    splits: int | None = None
    schedule: Schedule | None = None
    reproducibility: Reproducibility = Reproducibility.ANY_ORDER

    @property
    def lse_shape(self) -> tuple[int, ...]:
        s = self.shape
        return (s.heads_q, s.seqlen_q) if self.layout is Layout.VARLEN else (s.batch, s.heads_q, s.seqlen_q)

    @property
    def out_shape(self) -> tuple[int, ...]:
        s = self.shape
        rows = (s.seqlen_q,) if self.layout is Layout.VARLEN else (s.batch, s.seqlen_q)
        return (*rows, s.heads_q, s.head_dim_v)

    def bytes_per_key(self) -> int:
        """The bytes of one cached position over all key/value heads; values that are columns of the keys count once."""
        s = self.shape
        dims = s.head_dim + (0 if self.cache.values is Values.IN_KEYS else s.head_dim_v)
        return s.heads_kv * dims * self.cache.dtype.itemsize

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = [f"{self.layout.value} {self.shape} {dtype}", str(self.cache), str(self.mask), str(self.score)]
        parts += [str(self.append)] if self.append else []
        parts += [f"{self.splits} splits"] if self.splits else []
        parts += [self.schedule.value] if self.schedule else []
        parts += ["batch-invariant"] if self.reproducibility is Reproducibility.BATCH_INVARIANT else []
        return ", ".join(parts)
