"""Which configuration for many query rows over a KV cache, and in how many parts their keys are cut."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from tessera.backends.hopper.chunk_config import (
    CacheFeature,
    ChunkConfig,
    Features,
    LatentConfig,
    Packing,
    Parts,
    Reading,
    Result,
    Turns,
)
from tessera.backends.hopper.config import ROWS, STAGES, Feature, Overlap, Pairing
from tessera.backends.hopper.launch import ELEMENTS
from tessera.backends.hopper.plan import SHARED_LIMIT
from tessera.errors import Reason
from tessera.problem import Layout, Reproducibility
from tessera.serving.problem import CacheProblem, Values

LATENT_PARTS = (256, 256, 64)
"""MLA's absorbed form: the latent's two halves, each the values of one warpgroup, and the columns that carry positions."""
KEYS_A_PART = 4096
"""batch_invariant: a part has about this many keys of the longest sequence that the cache can hold, whatever else is asked."""
MAX_PARTS = 64


@dataclass(frozen=True)
class ChunkPlan:
    """The kernel's configuration, and the number of parts (1: it writes out itself)."""

    config: ChunkConfig | LatentConfig
    splits: int

    @cached_property
    def stored(self) -> int:
        """Parts of each row that go through memory: two programs that join give each other half of one."""
        return {Result.WHOLE: 0, Result.JOINED: 1, Result.PART: self.splits}[self.config.result]

    def workspace_bytes(self, problem: CacheProblem) -> int:
        """The parts and their log-sum-exps, float32."""
        return 4 * self.stored * math.prod(problem.out_shape[:-1]) * (problem.shape.head_dim_v + 1)

    def __str__(self) -> str:
        return f"{self.config}" + (f", {self.splits} splits and a combine" if self.config.result is Result.PART else "")


def why_not(problem: CacheProblem) -> tuple[Reason, ...]:
    """The reasons why neither chunk.py nor latent.py can run a problem; empty where one can. New rows must have been appended."""
    shape, cache, reasons = problem.shape, problem.cache, []
    if problem.dtype not in ELEMENTS:
        reasons.append(Reason("q.dtype", str(problem.dtype), "the tensor cores take 16-bit operands here", "use bfloat16"))
    if cache.is_quantised:
        reasons.append(Reason("k_cache.dtype", str(cache.dtype), "many rows are multiplied in 16 bits here", "store bfloat16"))
    for name, dim in (("head_dim", shape.head_dim), ("head_dim_v", shape.head_dim_v)):
        if dim % 8:
            reasons.append(Reason(name, str(dim), "TMA moves multiples of 16 bytes", "pad q and the cache"))
    if problem.score.scale <= 0 and not problem.score.softcap:
        why = "the row maximum is taken before the scale is applied"
        reasons.append(Reason("softmax_scale", str(problem.score.scale), why, "scale q by it and pass 1.0"))
    if is_latent(problem) and shape.head_dim_v > sum(LATENT_PARTS[:2]):
        reasons.append(Reason("head_dim_v", str(shape.head_dim_v), "two warpgroups hold 256 columns of out each", "at most 512"))
    return tuple(reasons)


def is_latent(problem: CacheProblem) -> bool:
    """Whether it is MLA's absorbed form: rows too wide for chunk.py, which are keys and values at once."""
    return problem.cache.values is Values.IN_KEYS and problem.shape.head_dim > 256


def chunk_plan(problem: CacheProblem, multiprocessors: int) -> ChunkPlan:
    """The configuration and the splits for a problem on a GPU with that many multiprocessors."""
    config = config_for(problem, Result.WHOLE)
    splits = splits_for(problem, config, multiprocessors)
    if splits > 1:
        config = config_for(problem, Result.JOINED if joins(problem, splits) else Result.PART)
    return ChunkPlan(config, splits)


def joins(problem: CacheProblem, splits: int) -> bool:
    """Whether the programs put their sums together themselves: two do, where no sink, which combine.py adds, is a third."""
    return splits == 2 and problem.score.sinks is None and not is_latent(problem)


def features_of(problem: CacheProblem, result: Result) -> Features:
    """What must be compiled in, always in the same order. The sinks of parts are combine.py's."""
    wanted: dict[Feature | CacheFeature, bool] = {
        Feature.VARLEN: problem.layout is Layout.VARLEN,
        Feature.LEFT: problem.mask.left is not None,
        Feature.RIGHT: problem.mask.right is not None,
        Feature.SOFTCAP: problem.score.softcap > 0,
        Feature.SINKS: problem.score.sinks is not None and result is Result.WHOLE,
        CacheFeature.PAGES: problem.cache.pages is not None,
        CacheFeature.BATCH_INDEX: "cache_batch_idx" in problem.lengths,
        CacheFeature.LEFTPAD: "cache_leftpad" in problem.lengths,
        CacheFeature.APPEND: problem.append is not None,
    }
    return tuple(feature for feature, needed in wanted.items() if needed)


def split_columns(dim: int) -> tuple[int, ...]:
    """A head dim in parts that are powers of two and multiples of 64; columns past it read as zeros."""
    for parts in ((64,), (128,), (128, 64), (256,)):
        if sum(parts) >= dim:
            return parts
    raise ValueError(f"head_dim={dim}: at most 256")


def reading_of(problem: CacheProblem, keys: int) -> tuple[Reading, int]:
    """How the cache is read, and in how many rows at once: TMA's boxes lie in one page each, and begin where it does."""
    pages = problem.cache.pages
    if pages is None:
        return Reading.BOXES, keys
    box = min(keys, pages.size & -pages.size)
    if box < BOX_LEAST or "cache_leftpad" in problem.lengths:
        return Reading.ROWS, keys
    return Reading.BOXES, box


BOX_LEAST = 16
"""Rows of the smallest TMA box: the swizzle's period."""


def config_for(problem: CacheProblem, result: Result) -> ChunkConfig | LatentConfig:
    """The configuration that leaves this kind of result."""
    features, packing = features_of(problem, result), Packing.of(problem.shape.group)
    widths = (problem.shape.head_dim, problem.shape.head_dim_v)
    latent = is_latent(problem)
    dims, dims_v = (LATENT_PARTS, ()) if latent else map(split_columns, widths)
    widest = max(sum(dims), sum(dims_v))
    keys = 128 if widest <= 128 else 64
    reading, box = reading_of(problem, keys)
    consumer, producer = _registers(problem, reading)
    if latent:
        pairing = _pairing(problem, packing.blocks, reading, box, result)
        turns = Turns.SINGLE if pairing else _turns(problem, reading, result)
        if turns is Turns.PAIRS:
            consumer = RIGHT_OF_PAIRS
        return LatentConfig(
            keys=keys, stages=2, reading=reading, box=box, parts=Parts.of(dims), widths=widths, packing=packing, result=result,
            turns=turns, pairing=pairing, consumer_registers=consumer, producer_registers=producer, features=features,
            policy=_policy(problem, packing, reading, pairing),
        )  # fmt: skip
    tiles = -(-problem.shape.seqlen_q // (2 * packing.positions)) if packing.blocks == 1 else 0
    room = SHARED_LIMIT // 2 - sum(dims) * 2 * ROWS
    return ChunkConfig(
        consumers=2, keys=keys, stages=min(STAGES, room // (keys * (sum(dims) + sum(dims_v)))), reading=reading, box=box,
        parts=Parts.of(dims), parts_v=Parts.of(dims_v), widths=widths, packing=packing, result=result,
        overlap=_overlap(widest), pairing=_pairing(problem, tiles, reading, box, result),
        consumer_registers=consumer, producer_registers=producer, features=features,
    )  # fmt: skip


FEW_READERS = 4
"""Programs that read an item's keys at about the same time: their keys may leave L2 first, so that Q and out stay there."""


def _policy(problem: CacheProblem, packing: Packing, reading: Reading, pairing: Pairing | None) -> str | None:
    """L2's policy for keys. Ours over FlashAttention-3 without and with evict_first, two runs: MLA 66 x 8k in pages of 64 1.011
    and 1.022, 1.010 and 1.023, 16 x 8k 1.067 and 1.076, 1.065 and 1.074; 128 x 4k level, 16 heads 0.995 (H200, 2026-11-22)."""
    readers = -(-problem.shape.seqlen_q // packing.positions) * packing.blocks
    few = readers <= FEW_READERS and problem.layout is not Layout.VARLEN
    return "evict_first" if few and reading is Reading.BOXES and pairing is None else None


def _overlap(widest: int) -> Overlap:
    if widest <= 128:
        return Overlap.AT_ONCE
    return Overlap.WHOLE if widest <= 192 else Overlap.MAXIMA


def _registers(problem: CacheProblem, reading: Reading) -> tuple[int, int]:
    """A consumer's and the producer's: pages are looked up, rows copied one by one take many addresses."""
    if problem.cache.pages is None:
        return 240, 24
    if reading is Reading.ROWS:
        return (224, 56) if problem.shape.head_dim <= 64 else (216, 72)
    return 232, 40


def _pairing(problem: CacheProblem, tiles: int, reading: Reading, box: int, result: Result) -> Pairing | None:
    """Whether two programs read the same keys by TMA, and so from L2 once; `tiles` share a position or a head.

    (H200, 2026-11-21, with rest before each launch, and at the power limit: 64 queries over 16 x 16k 1.024 and 1.004; parts 1.01
    and 0.99, in pages of 16 0.98; MLA contiguous 1.02 and 0.964, so 1.017 and 1.003 of FlashAttention-3, where two tiles at a
    time have 0.996 and 1.04; MLA in pages 1.01 and 0.95, two queries 0.98 and 0.93; 1024 queries, many tiles, 0.99.)
    """
    long = result is Result.WHOLE and problem.shape.seqlen_k >= LONG
    if tiles != 2 or not long or reading is not Reading.BOXES or problem.layout is Layout.VARLEN:
        return None
    if is_latent(problem):
        return Pairing.HEADS if problem.cache.pages is None and problem.shape.seqlen_q == 1 else None
    return Pairing.ROWS if box >= 64 and problem.shape.head_dim == problem.shape.head_dim_v == 128 else None


RIGHT_OF_PAIRS = 200
"""Registers of `right` under Turns.PAIRS, where `left` needs all 255 that a thread can have."""
LONG = 4096
"""Keys from which on pairs of tiles, or of programs, pay."""


def _turns(problem: CacheProblem, reading: Reading, result: Result) -> Turns:
    """Pairs where tensor cores bound it: 128 rows and more share a latent row, and a program does many tiles, which TMA brings.
    (H200, 2026-11-21, over SINGLE: 128 x 4k 1.055, 66 x 8k 1.045; 16 heads 0.98, 16 blocks a program 0.94, row by row 0.86.)"""
    shape = problem.shape
    rows = shape.group * shape.seqlen_q // (max(1, shape.batch) if problem.layout is Layout.VARLEN else 1)
    pays = rows >= 2 * ROWS and shape.seqlen_k >= LONG and reading is Reading.BOXES and result is Result.WHOLE
    return Turns.PAIRS if pays else Turns.SINGLE


def programs_of(problem: CacheProblem, config: ChunkConfig | LatentConfig) -> tuple[int, int, int]:
    """The grid of one split: tiles of positions, key/value heads x tiles of heads, sequences; pairs of tiles count once."""
    shape = problem.shape
    heads = shape.heads_kv * config.head_tiles_together
    if problem.layout is Layout.VARLEN:  # each sequence's tiles rounded up, and what lies after the last one
        return shape.seqlen_q // config.positions + shape.batch + 1, heads, 1
    return -(-shape.seqlen_q // config.positions_together), heads, shape.batch


def splits_for(problem: CacheProblem, config: ChunkConfig | LatentConfig, multiprocessors: int) -> int:
    """In how many parts to cut the keys: what was asked for; else, as if every sequence were as long as the cache can hold, the
    fewest turns of the longest-working multiprocessor."""
    blocks = max(1, -(-problem.shape.seqlen_k // config.keys))
    if problem.splits is not None:
        return problem.splits
    if problem.reproducibility is Reproducibility.BATCH_INVARIANT:
        return min(MAX_PARTS, max(1, problem.shape.seqlen_k // KEYS_A_PART))
    x, y, z = programs_of(problem, config)
    if problem.layout is Layout.VARLEN:
        x = max(1, x - 1 - problem.shape.batch // 2)  # half of the sequences' last tiles, on average, are not there

    programs = x * y * z * config.tiles_together
    if programs >= _FULL_WAVES * multiprocessors:
        return 1

    def turns(splits: int) -> float:
        waves = -(-programs * splits // multiprocessors)
        each = -(-blocks // splits) + _FIXED_BLOCKS
        if splits == 1 or joins(problem, splits):
            return waves * (each + (splits - 1) * _JOIN_BLOCKS)
        return waves * (each + _COMBINE_BLOCKS) + splits * _PART_BLOCKS

    return min(range(1, min(blocks, MAX_PARTS) + 1), key=turns)


_FULL_WAVES = 4
"""Tiles a multiprocessor that are left whole: parts would level the last wave's end alone, for hundreds of megabytes, and cost
the chunks of a prompt that has not grown to the cache's length yet."""
_FIXED_BLOCKS = 2.5
"""What a program costs before its first block and after its last, in blocks."""
_JOIN_BLOCKS = 1.0
"""What two programs need to put their sums together, in blocks."""
_COMBINE_BLOCKS = 2.5
"""What a second launch costs, in blocks; and as much for each further part that a multiprocessor leaves, which L2 can't hold."""
_PART_BLOCKS = 0.06
"""What reading one more part of every row costs, in blocks."""
