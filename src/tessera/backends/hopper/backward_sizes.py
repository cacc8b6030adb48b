"""How many tiles the backward of a problem has, how its last ones are divided, and what its workspace holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tessera.backends.hopper.backward_config import WORK_ROWS, Adding, BackwardConfig
from tessera.backends.hopper.backward_plan import backward_config, sees_few_keys
from tessera.backends.hopper.bias_gradient import KeptScores
from tessera.backends.hopper.config import ROWS, Feature
from tessera.problem import Gradients, Layout, Problem, Reproducibility

TURNS_ROWS = 2048
FULL_ROWS = 4096
"""Up to so many rows, below a diagonal and without a mask, a second sum of dQ costs as much as it wins: the kernel that rounds dQ
reads both. An order's cost at head dim 256 with one and with two: full 16k 1.14 and 1.06, 8k 1.09 and 1.06, 4k 1.054 and 1.049,
2k 1.03 and 1.05; causal 16k 1.18 and 1.08, 8k 1.10 and 1.02, 4k 1.08 and 1.01, 2k 1.06 and 1.09 (H200, 2026-11-22)."""
FEWER_BLOCKS = 4
"""Row blocks that the last round of tiles must lose for them to be divided by rows: a share's end costs about one."""


ROUNDING = 30
ROUNDING_256 = 16
"""Keys that the main kernel goes through, a row, in the time in which one multiprocessor rounds that row's dQ beside it."""


def work_lines(problem: Problem) -> int:
    """Rows of the workspace a head: every sequence's, rounded up to WORK_ROWS."""
    shape = problem.shape
    if problem.layout is Layout.VARLEN:
        return WORK_ROWS * (shape.seqlen_q // WORK_ROWS + shape.batch + 1)
    return shape.batch * -(-shape.seqlen_q // WORK_ROWS) * WORK_ROWS


def key_blocks(problem: Problem, config: BackwardConfig) -> int:
    """Key tiles of one dense sequence, or an upper bound over all packed ones (and what lies after the last)."""
    shape = problem.shape
    if problem.layout is Layout.VARLEN:
        return shape.seqlen_k // config.keys + shape.batch + 1
    return -(-shape.seqlen_k // config.keys)


def key_tiles(problem: Problem, config: BackwardConfig) -> int:
    """Key tiles of all heads and sequences."""
    copies = 1 if problem.layout is Layout.VARLEN else problem.shape.batch
    return key_blocks(problem, config) * problem.shape.heads_kv * copies


def spared_multiprocessors(problem: Problem, tiles: int, multiprocessors: int) -> int:
    """How many the main kernel leaves to finish_queries from its beginning, where tiles are counted (pieces/counts.py): so many
    as round a row's dQ, which is the same for all, in the time in which the others go through the keys that see it, but none
    where that is less than one and a half. Tiles of equal length take as many rounds on fewer: 2048 of them 16 on 128 as on 132.

    Times of 4 spared over others (in brackets of none, where none were): causal 512 head dim 64 with 8, 12 and 16 1.017, 1.037
    and 1.024, 256 with 7 1.013; causal 1k 64 with 6, 8 and 12 1.017, 1.015 and 0.997, 128 1.003, 1.008 and 1.001; causal 4k 128
    with 2 1.010, 64 1.010, 256 (0.990); GQA 16/4 causal 1k 128 with 7 (1.008), 64 (1.018), 4k with 2 (1.002); 256 keys at 16k 64
    with 4, 8 and 12 (1.015, 1.027 and 1.015), 128 with 12 1.003; 1024 keys 64 with 2, 4 and 6 (1.014, 1.011 and 0.999), 128
    with 2 and 6 0.993; 4096 keys 64 with 1, 2 and 4 (0.992, 0.986 and 0.972); full 512 64 with 8 and 12 1.019 and 0.998, 128 with
    8 and 11 1.014 and 1.010, 256 0.998 and 0.995 (H200, 2026-11-22). In a fixed order, of equal rounds and beside all programs:
    head dim 128 full 1k 1.052 and 1.020, a window of 1024 1.029 and 1.022, but of 256 0.991 and 1.002, head dim 64 full 1k 0.991
    and 1.013, 256 1k 1.010 and 1.024."""
    shape, mask = problem.shape, problem.mask
    rows, is_diagonal = shape.batch * shape.heads_q * shape.seqlen_q, mask.right is not None and mask.left is None
    if mask.bounds or problem.layout is Layout.VARLEN or rows == 0:
        return 0
    wanted = 0
    if problem.reproducibility is Reproducibility.BITWISE:
        if not 64 < shape.head_dim <= 128 or sees_few_keys(problem) or is_diagonal:
            return 0
    else:
        keys = problem.scores() / rows + ROWS  # blocks at the edges are worked on whole
        share = multiprocessors * (ROUNDING if shape.head_dim <= 128 else ROUNDING_256) / keys
        wanted = round(share) if share >= 1.5 else 0
    if is_diagonal:
        return wanted
    full_rounds = -(-tiles // (multiprocessors - (wanted if mask.left is None else 0)))
    return max(wanted, multiprocessors - -(-tiles // full_rounds))


def strands(problem: Problem, config: BackwardConfig) -> int:
    """Sums of dQ in the workspace (pieces/chain.py). Below a diagonal two of a group's heads are more than L2 holds: 1.31 with
    two and 1.10 with one, GQA 8/2 at 4k, but without a mask 1.10 and 1.15 at 8k (H200, 2026-11-22)."""
    shape = problem.shape
    pays = shape.seqlen_q > FULL_ROWS
    if config.sections_take_turns:
        pays = shape.seqlen_q > TURNS_ROWS and shape.group == 1
    return 2 if config.may_have_two_sums and pays else 1


@dataclass(frozen=True)
class Remainder:
    """`numbers` that programs take, of which the first `whole` are tiles. The tiles after these are divided into shares of
    `share` row blocks, two numbers each (pieces/remainder.py). `values`: in float32, what shares leave for one another."""

    numbers: int
    whole: int
    share: int
    values: int

    @staticmethod
    def of(problem: Problem, config: BackwardConfig, multiprocessors: int) -> Remainder:
        tiles, height = key_tiles(problem, config), -(-problem.shape.seqlen_q // config.rows)
        rest = tiles % multiprocessors
        share = -(-rest * height // multiprocessors)
        marks = problem.shape.heads_q * work_lines(problem) // ROWS
        fits = tiles > multiprocessors and config.gradients_of_tile * multiprocessors <= marks
        if not config.divides_remainder or not fits or rest == 0 or height - share < FEWER_BLOCKS:
            return Remainder(tiles, tiles, 1, 0)
        shares = -(-rest * height // share)
        return Remainder(tiles - rest + 2 * shares, tiles - rest, share, shares * config.values_of_share)


def bias_sums_shape(problem: Problem) -> tuple[int, ...]:
    """Of the float32 sums of a bias's gradient, () without: the bias's own. In a fixed order every sequence and head has a plane
    of its own, whose elements one thread adds to; planes are added up at the end."""
    bias, shape = problem.score.bias, problem.shape
    if bias is None or bias.gradients is Gradients.NONE:
        return ()
    planes = (shape.batch, shape.heads_q) if problem.reproducibility is Reproducibility.BITWISE else bias.shape[:2]
    return (*planes, *bias.shape[2:])


def work_words(problem: Problem, config: BackwardConfig, remainder: Remainder) -> tuple[int, int, int, int]:
    """The parts of the workspace in words of four bytes: dQ in float32, lse and D of each row, what shares of the last tiles
    leave for one another, a mark for every 64 rows, in an order of each sum and of counts, and a counter."""
    rows, sums = problem.shape.heads_q * work_lines(problem), strands(problem, config)
    lines = sums + (config.adding is not Adding.ANY_ORDER)
    return sums * rows * problem.shape.head_dim, config.row_words * rows, remainder.values, 1 + lines * (rows // ROWS)


def workspace_bytes(problem: Problem, multiprocessors: int) -> int:
    """`work_words`, and the bias's gradient in float32, or dS where it is kept for that."""
    sums, config = bias_sums_shape(problem), backward_config(problem)
    words = work_words(problem, config, Remainder.of(problem, config, multiprocessors))
    if Feature.KEPT_DS in config.features:
        return 4 * sum(words) + KeptScores(problem, config).scratch
    return 4 * (sum(words) + (math.prod(sums) if sums else 0))
