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

SHORT = 1024
"""Keys of a sequence up to which its parts are cut by its own length alone: no sequence can be so much longer than others."""
LONG = 64 * 1024
"""Keys from which on a program alone on its SM frees its slots early (_frees_early)."""
ON_THEIR_WAY = 64 * 1024
"""Bytes that an SM should have asked for where programs go through memory side by side: with more they lose step."""
SHARED_OF_SM = 228 * 1024
"""Bytes of shared memory of one SM; each block takes 1 KB beside its own."""
RESERVED = 1024 + 256
REGISTERS = 64 * 1024
MOST_STAGES = 6
"""Named barriers bound the ring: two a stage, and Triton takes three of the sixteen."""
AHEAD, AHEAD_OF_MANY, MANY = 2, 3, 32
"""Tiles that a program brings into L2 while the kernel before ends: more by stream-K, whose first loads come later, and where it
has `MANY` tiles. Too many come late, and the first loads wait behind them (H200, 2026-11-22, microseconds): 1 x 8k with
0, 1, 2, 4 tiles 11.8, 11.3, 11.2, 11.5; 4 x 8k with 2, 3, 4, 5 33.2, 33.0, 33.2, 33.4; 1 x 32k with 2, 3, 4 32.5, 32.2, 32.6;
FP8 1 x 32k with 2, 3, 4 18.9, 18.8, 19.0; 64 sequences of 100 to 32k keys with 0, 2 346.6, 344.3;
16 x 8k with 0, 2, 3, 4, 8 120.6, 119.9, 119.8, 120.2, 121.1; 1 x 128k with 0, 2, 3, 4, 6 120.3, 119.8, 119.4, 119.2, 119.7."""
PARTED, AHEAD_OF_PARTED = range(96, 257), 6
"""Where each program has one item of so many tiles, the next kernel's may begin with PARTING of them left, and bring more into
L2: they stand where programs ended sooner than the last. H200, 2026-11-22, against 3 tiles and nothing left: 16 x 8k with 8 left
and 3, 4, 5, 6, 8 tiles 1.008, 1.010, 1.012, 1.012, 1.014, with 4, 6, 12 left and 5, 5, 6 tiles 1.011, 1.013, 1.013; with 8 left
and 6 tiles 4 x 32k and 1 x 128k 1.007, 16 x 8k in pages of 64 1.007. Longer shares: 16 x 32k, 4 x 128k, 16 x 128k level, 16 x 32k
in pages of 64 0.996; of 32 tiles: 4 x 8k with 4, 5 tiles 1.002, 0.997, 1 x 32k with 5 tiles 0.989."""
IDLE = 0.05
"""Of a grid's programs that may be without work so that the others read memory in order: it is busy without them."""
SHORT_SHARE = 64
"""Tiles of a program up to which it does even where programs begin as others end."""
INVARIANT_KEYS = 1024
"""Keys of one part under batch_invariant, whatever the batch and the length."""
MOST_SPLITS = 128
SETTLING = 1.3
"""Microseconds that the sum of an item's parts takes: a ticket, and what others wrote from L2."""
MEMORY, MEMORY_OF_SM = 4.4e6, 0.09e6
"""Bytes a microsecond of the whole memory, and of one SM's way to it."""


@dataclass(frozen=True)
class DecodePlan:
    """One launch of the decode kernel: `programs` is its grid, `splits` and `least` are the split schedule's (parts of a
    sequence, fewest tiles of a part), `rounds` and `crew` stream-K's where all items are equally long (items that every
    program has alone, programs that share each of the others), `depth` the stages of the ring that are used then or by split
    ones, `ahead` the tiles that a program brings into L2 while the kernel before ends; where items differ, `teams` of `team`
    programs each share the tiles, by `line_depth` stages and with `line_ahead` tiles early. `row_blocks`: blocks of query rows
    a key/value head (packed: at most), `slots`: what the workspace has room for, each `slot_rows` rows; `items`: how many there
    can be."""

    config: DecodeConfig
    programs: tuple[int, int, int]
    splits: int
    least: int
    crew: int
    rounds: int
    depth: int
    ahead: int
    line_ahead: int
    team: int
    teams: int
    line_depth: int
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
    # batch_invariant: a tile that another batch would not get is other bits
    invariant = problem.reproducibility is Reproducibility.BATCH_INVARIANT
    early = _frees_early(problem, schedule, items, device.multiprocessors)
    crowded = items > device.multiprocessors and not invariant and (problem.cache.is_quantised or not early)
    whole = schedule is Schedule.SPLIT and _is_best_whole(problem, sum(dims) + sum(dims_v), items, device.multiprocessors)
    tile = _tile(problem, sum(dims) + sum(dims_v), crowded, whole)
    resident = items if whole else tile.blocks * device.multiprocessors
    splits, least = _splits(problem, tile, items, resident)
    if schedule is Schedule.STREAM_K:
        line = max(1, min(resident, items * tile.needed(shape.seqlen_k)))  # one, where there is nothing to do
        rounds, crew = (0, 0) if packed else _turns(items, line)
        if rounds > 0 and crew <= 1:  # the hardware hands out items better than turns do: whoever is free has the next one
            programs, rounds, crew = (items, 1, 1), 1, 0
        elif early and rounds == 0 < crew:  # idle programs would stand where they make others uneven: LOG, the seventh session
            programs = (line := crew * items, 1, 1)
        else:
            programs = (line, 1, 1)
        slots, most_parts, team = 2 * line, line, _team(shape.heads_kv, line)
    else:
        programs, line = (splits, shape.heads_kv * row_blocks, shape.batch), 1
        slots, rounds, crew = items * splits if splits > 1 else 0, 0, 0
        most_parts, team = splits, 1
    share = items * tile.needed(shape.seqlen_k) / max(1, math.prod(programs))
    waves = items > device.multiprocessors
    parting = round(share) in PARTED and not waves
    pages = problem.cache.pages
    slot_rows = ROWS if packed and invariant else min(ROWS, max(1, rows))  # packed rows are the batch's
    # ptxas spills a little at 255, and nothing at 240: 4 x 8k 35.2, 34.6; at head dim 192 it spills in the loop at 240
    registers = min(tile.registers, 240 if len(dims) <= 2 else 248) if schedule is Schedule.STREAM_K else tile.registers
    config = DecodeConfig(
        rows=next(rows for rows in (4, 8, ROWS) if rows >= slot_rows),
        keys=tile.keys, warps=tile.warps, stages=tile.stages, dims=dims, dims_v=dims_v,
        box=tile.keys if pages is None else min(tile.keys, pages.size), registers=registers,
        storage=Storage.E4M3 if problem.cache.is_quantised else Storage.HALF,
        features=_features(problem, schedule, early, parting),
    )  # fmt: skip
    tickets = 1 + -(-most_parts // PARTS_TOGETHER)
    depth = _depth(problem, sum(dims) + sum(dims_v), tile)
    ahead = _ahead(problem, schedule, share, waves)
    return DecodePlan(
        config, programs, splits, least, crew, rounds, depth, AHEAD_OF_PARTED if parting else ahead, max(ahead, AHEAD), team,
        line // team, _line_depth(team, depth, tile), row_blocks, slot_rows, slots, items, tickets,
    )  # fmt: skip


def _turns(items: int, programs: int) -> tuple[int, int]:
    """Where all items are equally long: (turns in which every program has an item of its own, programs that share each of the
    rest). (0, 0) where more than a quarter of the programs would be idle in the last turn: up to there memory is busy."""
    rounds, rest = divmod(items, programs)
    crew = _in_one_step(programs // rest) if rest else 0
    return (rounds, crew) if 4 * crew * rest >= 3 * programs or not rest else (0, 0)


def _team(heads_kv: int, programs: int) -> int:
    """Heads that programs go through side by side where lengths differ: as many as leave few programs without work. 64 sequences
    of 100 to 32k keys by 8 heads and by one 345.6, 352.7 microseconds, of 1k to 32k 16 147.0, 154.0 (H200, 2026-11-22)."""
    divisors = (heads for heads in range(heads_kv, 0, -1) if heads_kv % heads == 0)
    return next(heads for heads in divisors if programs % heads <= programs * IDLE)


def _in_one_step(parts: int) -> int:
    """So many parts of an item, or a few less, where those are added in one step."""
    most = 2 * PARTS_TOGETHER
    return most if most < parts <= most * 9 // 8 else parts


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
        exchange = 4 * warps * ROWS * (COLUMNS + 2)
        stages = (SHARED_OF_SM // blocks - RESERVED - exchange) // (2 * keys * words)
        threads = 32 * (warps + 4)  # the producer's warp brings three idle ones
        return Tile(keys, warps, min(stages, MOST_STAGES), blocks, min(255, REGISTERS // (blocks * threads) // 8 * 8))

    def needed(self, keys: int) -> int:
        """Tiles that hold so many keys."""
        return max(1, -(-keys // self.keys))


def _is_best_whole(problem: CacheProblem, words: int, items: int, multiprocessors: int) -> bool:
    """Whether programs that have an item alone are quicker than parts of it on all SMs, and their sum."""
    asked = problem.splits is not None or problem.reproducibility is Reproducibility.BATCH_INVARIANT
    item = 2 * words * problem.shape.seqlen_k
    together, parts = items * item / MEMORY, max(1, multiprocessors // max(1, items))
    alone = max(together, item / MEMORY_OF_SM)
    return not asked and alone <= max(together, item / parts / MEMORY_OF_SM) + SETTLING


def _tile(problem: CacheProblem, words: int, crowded: bool, whole: bool) -> Tile:
    """The tile for keys and values of so many words. `crowded`: there are more items than SMs; `whole`: a program has one alone.

    H200, 2026-11-21, bf16 d128, microseconds. Where programs go through memory side by side (equal lengths) one block of 64 keys
    and 4 warps is best: 16 x 32k with 2, 3, 6 stages 474.6, 483.2, 485.8 (128 keys and 8 warps 487.3). Where items follow one
    another a second block works while the first goes from one to the next: ragged 64 x 100..32k one block 371.6, two 359.5;
    256 x 512 of 2 heads 38.9, 35.3. FP8 is computed on for longer: 16 x 32k with 64 keys 331, with 128 and 8 warps 248. Since its
    unpacking became shorter 4 warps are enough for 128 keys, and sooner merged: 1 x 32k 19.11 by 8, 18.92, 16 x 32k 244.2, 243.7.
    """
    short = problem.shape.seqlen_k <= SHORT
    tiny_pages = problem.cache.pages is not None and problem.cache.pages.size < 16  # many boxes a tile: fewer, larger tiles
    pair = Tile.of(words, 64, 4, 2)
    if crowded and pair.stages >= 3 and (short or not problem.cache.is_quantised):
        return pair
    light = problem.cache.is_quantised and not _has_scales_of_blocks(problem) and words <= 2 * COLUMNS
    large = Tile.of(words, 128, 4 if light else 8, 1)
    return large if problem.cache.is_quantised or tiny_pages or (whole and large.stages >= 3) else Tile.of(words, 64, 4, 1)


def _ahead(problem: CacheProblem, schedule: Schedule, share: float, waves: bool) -> int:
    """Tiles that a program with a share of so many brings into L2 early. `waves`: some programs begin as others end."""
    if waves and share > SHORT_SHARE:
        return 0
    many = schedule is Schedule.STREAM_K or share >= MANY or problem.cache.is_quantised
    return AHEAD_OF_MANY if many else AHEAD


def _depth(problem: CacheProblem, words: int, tile: Tile) -> int:
    """Stages of the ring that are used where programs go through memory side by side."""
    if problem.shape.seqlen_k <= SHORT:
        return tile.stages  # too few tiles to lose step
    pages = problem.cache.pages
    few = max(round(ON_THEIR_WAY / tile.blocks / (2 * tile.keys * words)), 2 // tile.blocks)
    if pages is not None and pages.size <= tile.keys:
        few += 1  # small copies need one more on their way
    return min(few, tile.stages)


def _line_depth(team: int, depth: int, tile: Tile) -> int:
    """The same along the line of all tiles, where a program ends one item and begins another. H200, 2026-11-22, microseconds: 16
    sequences of 1k to 32k keys by 6, 3, 2 stages 150.3, 149.4, 147.0; 64 of 100 to 32k, two blocks an SM, by 3, 2, 1 stages
    347.1, 345.6, 347.8. Programs that go alone keep no step: as many bytes as there is room for."""
    return min(max(depth, 2), tile.stages) if team > 1 else tile.stages


def _schedule(problem: CacheProblem) -> Schedule:
    """Stream-K where lengths may differ by much; one sequence, short ones, or parts that are asked for, are split."""
    if problem.reproducibility is Reproducibility.BATCH_INVARIANT or problem.splits is not None:
        return Schedule.SPLIT
    if problem.schedule is not None:
        return problem.schedule
    alone = problem.shape.batch == 1 and problem.layout is Layout.DENSE
    return Schedule.SPLIT if alone or problem.shape.seqlen_k <= SHORT else Schedule.STREAM_K


def _splits(problem: CacheProblem, tile: Tile, items: int, programs: int) -> tuple[int, int]:
    """(parts of a sequence, fewest tiles of a part)."""
    tiles = tile.needed(problem.shape.seqlen_k)
    if problem.reproducibility is Reproducibility.BATCH_INVARIANT:
        return -(-tiles * tile.keys // INVARIANT_KEYS), INVARIANT_KEYS // tile.keys
    if problem.splits is not None:
        return problem.splits, 1
    return max(1, min(tiles, _in_one_step(programs // max(1, items)), MOST_SPLITS)), 1


def _frees_early(problem: CacheProblem, schedule: Schedule, items: int, multiprocessors: int) -> bool:
    """Whether a tile's slots are free as soon as it has been read. Of long sequences that programs have to themselves: 16 x 128k
    1902 microseconds, 1880, 64 x 128k 7646, 7475. Shorter ones go out of step by it: 16 x 32k 473.5, 478.2, ragged 355, 361.
    And of FP8 caches, which are computed on for longest: 16 x 32k 246.0, 243.7, 1 x 32k 19.26, 19.13 (H200, 2026-11-22)."""
    if problem.cache.is_quantised:
        return True
    long = problem.shape.seqlen_k >= LONG and 2 * items > multiprocessors
    return long and schedule is Schedule.STREAM_K and problem.cache.pages is None


def _features(problem: CacheProblem, schedule: Schedule, early: bool, parting: bool) -> tuple[DecodeFeature, ...]:
    """What must be compiled in, always in the same order."""
    mask, score = problem.mask, problem.score
    wanted = {
        DecodeFeature.STREAM_K: schedule is Schedule.STREAM_K,
        DecodeFeature.EARLY: early,
        DecodeFeature.PARTING: parting,
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
        DecodeFeature.BLOCK_SCALES: _has_scales_of_blocks(problem),
    }
    return tuple(feature for feature, needed in wanted.items() if needed)


def _has_scales_of_blocks(problem: CacheProblem) -> bool:
    descales = (problem.cache.k_descale, problem.cache.v_descale)
    return any(descale is not None and descale.granularity is Granularity.BLOCK for descale in descales)
