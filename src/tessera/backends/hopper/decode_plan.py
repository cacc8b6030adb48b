"""How a problem over a KV cache is decoded: the kernel's configuration, the grid, and how the keys are shared out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tessera.backends.hopper.decode_config import COLUMNS, PARTS_TOGETHER, ROWS, DecodeConfig, DecodeFeature, Storage
from tessera.device import Device
from tessera.errors import Reason
from tessera.problem import MAX_HEAD_DIM, Layout, Reproducibility
from tessera.serving.problem import CacheProblem, Granularity, Schedule, Values

FEW_KEYS = 1024
"""Keys an SM up to which tiles of 64 are better than tiles of 128."""
SHORT = 1024
"""Keys of a sequence up to which two blocks an SM are better than one."""
SHARED_OF_SM = 228 * 1024
"""Bytes of shared memory of one SM; each block takes 1 KB beside its own."""
RESERVED = 1024 + 256
REGISTERS = 64 * 1024
MOST_STAGES = 6
"""Named barriers bound the ring: two a stage, and Triton takes three of the sixteen."""
INVARIANT_TILES = 8
"""Tiles of one part under batch_invariant, whatever the batch and the length."""
MOST_SPLITS = 128


@dataclass(frozen=True)
class DecodePlan:
    """One launch of the decode kernel: `programs` is its grid, `splits` and `least` are the split schedule's (parts of a
    sequence, fewest tiles of a part), `crew` stream-K's (programs that an item can have of its own, 0 for none), `row_blocks`
    blocks of query rows a key/value head (packed: at most), `slots` what the workspace has room for, each `slot_rows` rows;
    `items` how many items there can be."""

    config: DecodeConfig
    programs: tuple[int, int, int]
    splits: int
    least: int
    crew: int
    row_blocks: int
    slot_rows: int
    slots: int
    items: int
    tickets_per_item: int

    @property
    def slot_columns(self) -> int:
        words = sum(self.config.dims_v)
        return 2 * words if self.config.storage is Storage.E4M3 else words

    @property
    def tickets(self) -> int:
        return self.items * self.tickets_per_item

    def workspace_bytes(self) -> int:
        """The slots' partial results (float32) and log-sum-exps, and the tickets."""
        return 4 * (self.slots * self.slot_rows * (self.slot_columns + 1) + self.tickets)

    def __str__(self) -> str:
        grid = "x".join(map(str, self.programs))
        shares = "stream-k" if DecodeFeature.STREAM_K in self.config.features else f"at most {self.splits} splits"
        return f"{self.config}; {shares} over {grid} programs"


def why_not(problem: CacheProblem) -> tuple[Reason, ...]:
    """Why the decode kernel cannot run a problem; empty where it can."""
    shape, cache, reasons = problem.shape, problem.cache, []
    if problem.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(Reason("q.dtype", str(problem.dtype), "the tensor cores take 16-bit operands here", "use bfloat16"))
    if cache.values is Values.IN_KEYS:
        reasons.append(Reason("v_cache", "None", "this kernel reads K and V apart", "pass v_cache"))
    step = 16 // cache.dtype.itemsize
    for name, dim in (("head_dim", shape.head_dim), ("head_dim_v", shape.head_dim_v)):
        if dim % step:
            reasons.append(Reason(name, str(dim), f"TMA moves multiples of {step} columns of {cache.dtype}", "pad the cache"))
        if dim > MAX_HEAD_DIM:
            reasons.append(Reason(name, str(dim), f"the kernel holds at most {MAX_HEAD_DIM} columns", "use another backend"))
    if cache.pages is not None and (cache.pages.size & (cache.pages.size - 1) or cache.pages.size < 8):
        why = "a page is copied as whole swizzle patterns of 8 rows, and a tile's pages are counted by shifts"
        reasons.append(Reason("page_size", str(cache.pages.size), why, "use a power of two from 8 on"))
    return tuple(reasons)


def decode_plan(problem: CacheProblem, device: Device) -> DecodePlan:
    """The plan for a problem that `why_not` has nothing against."""
    shape = problem.shape
    words = 1 if problem.cache.is_quantised else 0
    dims, dims_v = _parts(shape.head_dim >> words), _parts(shape.head_dim_v >> words)
    rows = shape.seqlen_q * shape.group
    packed = problem.layout is Layout.VARLEN
    row_blocks = rows // ROWS + 1 if packed else -(-rows // ROWS)
    lines = rows // ROWS + shape.batch + 1 if packed else shape.batch * row_blocks
    items = lines * shape.heads_kv
    schedule = _schedule(problem)
    keys_of_sm = items * shape.seqlen_k / device.multiprocessors
    if problem.reproducibility is Reproducibility.BATCH_INVARIANT:
        keys_of_sm = math.inf  # a tile that another batch would not get is other parts, and other bits
    tile = _tile(sum(dims) + sum(dims_v), schedule, shape.seqlen_k, keys_of_sm)
    tiles = max(1, -(-shape.seqlen_k // tile.keys))
    resident = tile.blocks * device.multiprocessors
    splits, least = _splits(problem, tiles, items, resident)
    if schedule is Schedule.STREAM_K:
        programs = (min(resident, items * tiles), 1, 1)
        slots = 2 * programs[0]
        crew = 0 if packed else programs[0] // items
        crew *= 4 * crew * items >= 3 * programs[0]  # idle programs: memory is still busy
    else:
        programs = (splits, shape.heads_kv * row_blocks, shape.batch)
        slots, crew = items * splits if splits > 1 else 0, 0
    parts = programs[0]  # at most, of one item
    pages = problem.cache.pages
    config = DecodeConfig(
        keys=tile.keys, warps=tile.warps, stages=tile.stages, dims=dims, dims_v=dims_v,
        box=tile.keys if pages is None else min(tile.keys, pages.size), registers=tile.registers,
        storage=Storage.E4M3 if problem.cache.is_quantised else Storage.HALF,
        features=_features(problem, schedule),
    )  # fmt: skip
    tickets = 1 + -(-parts // PARTS_TOGETHER)
    return DecodePlan(config, programs, splits, least, crew, row_blocks, min(ROWS, max(1, rows)), slots, items, tickets)


def _parts(words: int) -> tuple[int, ...]:
    """A head dim as parts of 64 words and a last one that is 16, 32 or 64 wide; words past it read as zeros."""
    whole, rest = divmod(words, COLUMNS)
    tail = next((width for width in (16, 32, COLUMNS) if width >= rest), COLUMNS)
    return (COLUMNS,) * whole + ((tail,) if rest else ())


@dataclass(frozen=True)
class Tile:
    """Keys of a tile and warps that share them, stages of the ring, blocks an SM, and a thread's registers at launch."""

    keys: int
    warps: int
    stages: int
    blocks: int
    registers: int

    @staticmethod
    def of(words: int, keys: int, warps: int, blocks: int) -> Tile:
        """With as many stages as there is room for. `words`: 16-bit words of a key and its value."""
        exchange = 4 * warps * ROWS * COLUMNS
        stages = (SHARED_OF_SM // blocks - RESERVED - exchange) // (2 * keys * words)
        threads = 32 * (warps + 4)  # the producer's warp brings three idle ones
        return Tile(keys, warps, min(stages, MOST_STAGES), blocks, min(255, REGISTERS // (blocks * threads) // 8 * 8))


def _tile(words: int, schedule: Schedule, seqlen_k: int, keys_of_sm: float) -> Tile:
    """The tile for rows of so many words, in a cache of so many keys a sequence, and an SM at most.

    H200, 2026-11-21, bf16 d128, microseconds with 64 keys and 4 warps (two blocks an SM; one) and with 128 keys and 8 warps:
    split 1 x 8k 14.4, 12.2, 12.6; 4 x 8k 35.0, 34.8, 34.6; 16 x 8k 123.0, 120.4, 120.4; 1 x 128k of 2 heads 39.5, 38.2, 37.5;
    256 x 512 of 2 heads 35.5, 39.8, 39.1; stream-K, ragged 64 x 100..32k 350, 371, 358: where items are short, a second block
    works while the first goes from one to the next.
    """
    pair, lone, large = Tile.of(words, 64, 4, 2), Tile.of(words, 64, 4, 1), Tile.of(words, 128, 8, 1)
    shared = schedule is Schedule.STREAM_K and pair.stages >= 3
    if large.stages >= 3 and keys_of_sm > FEW_KEYS and (seqlen_k > SHORT or not shared):
        return large
    return pair if shared else lone


def _schedule(problem: CacheProblem) -> Schedule:
    """Stream-K where lengths may differ; one sequence, or parts that are asked for, are split."""
    if problem.reproducibility is Reproducibility.BATCH_INVARIANT or problem.splits is not None:
        return Schedule.SPLIT
    if problem.schedule is not None:
        return problem.schedule
    return Schedule.SPLIT if problem.shape.batch == 1 and problem.layout is Layout.DENSE else Schedule.STREAM_K


def _splits(problem: CacheProblem, tiles: int, items: int, programs: int) -> tuple[int, int]:
    """(parts of a sequence, fewest tiles of a part)."""
    if problem.reproducibility is Reproducibility.BATCH_INVARIANT:
        return -(-tiles // INVARIANT_TILES), INVARIANT_TILES
    if problem.splits is not None:
        return problem.splits, 1
    return max(1, min(tiles, programs // max(1, items), MOST_SPLITS)), 1


def _features(problem: CacheProblem, schedule: Schedule) -> tuple[DecodeFeature, ...]:
    """What must be compiled in, always in the same order."""
    mask, score = problem.mask, problem.score
    wanted = {
        DecodeFeature.STREAM_K: schedule is Schedule.STREAM_K,
        DecodeFeature.PAGED: problem.cache.pages is not None,
        DecodeFeature.PACKED: problem.layout is Layout.VARLEN,
        DecodeFeature.BATCH_INDEX: "cache_batch_idx" in problem.lengths,
        DecodeFeature.LEFTPAD: "cache_leftpad" in problem.lengths,
        DecodeFeature.LEFT: mask.left is not None,
        # one query row stands at the end: nothing lies to the right of its diagonal
        DecodeFeature.RIGHT: mask.right is not None and (problem.layout is Layout.VARLEN or problem.shape.seqlen_q > 1),
        DecodeFeature.SOFTCAP: score.softcap > 0,
        DecodeFeature.SINKS: score.sinks is not None,
        DecodeFeature.K_SCALES: problem.cache.k_descale is not None,
        DecodeFeature.V_SCALES: problem.cache.v_descale is not None,
        DecodeFeature.BLOCK_SCALES: any(
            descale is not None and descale.granularity is Granularity.BLOCK
            for descale in (problem.cache.k_descale, problem.cache.v_descale)
        ),
    }
    return tuple(feature for feature, needed in wanted.items() if needed)
