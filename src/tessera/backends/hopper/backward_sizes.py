"""How many tiles the backward of a problem has, how its last ones are divided, and what its workspace holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tessera.backends.hopper.backward_plan import WORK_ROWS, Adding, BackwardConfig, backward_config, sees_few_keys
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


SPARED = 33
"""Of so many multiprocessors one is left to finish_queries below a diagonal."""
SHORT = 4096 * 128
"""Rows times head dim (at least 128) up to which that pays."""


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
    """How many the main kernel leaves to finish_queries from its beginning, where tiles are counted (pieces/counts.py). Tiles of
    equal length take as many rounds on fewer: 2048 of them 16 on 128 as on 132. Ours / FA3, full, before, beside all programs,
    and so: head dim 256 1k 0.998, 1.025 and 1.040; 64 1k 1.035, 1.056 and 1.074; 128 512 1.116, 1.132 and 1.143, a window of 1024
    1.044, 1.062 and 1.075. Below a diagonal one in 33 pays while sequences are short: head dim 64 512 1.187, 1.192 and 1.207, 1k
    1.134, 1.136 and 1.162, 4k 1.047, 1.051 and 1.056; 256 1k 1.024, 1.037 and 1.045, 2k 1.031, 1.052 and 1.052, but 4k 1.010,
    1.035 and 1.025; grouped 128 4k 1.121, 1.134 and 1.128. In a fixed order times faster than without counts, beside all programs
    and so: head dim 128 full 1k 1.020 and 1.052, 2k 1.026 and 1.038, a window of 1024 1.022 and 1.029, but of 256 1.002 and
    0.991, head dim 64 full 1k 1.013 and 0.991, 256 1k 1.024 and 1.010, 16k 1.010 and 0.994 (H200, 2026-11-22)."""
    shape, mask = problem.shape, problem.mask
    is_ordered = problem.reproducibility is Reproducibility.BITWISE
    spares_none = is_ordered and (not 64 < shape.head_dim <= 128 or sees_few_keys(problem))
    if mask.bounds or problem.layout is Layout.VARLEN or spares_none:
        return 0
    if mask.right is not None and mask.left is None:
        is_short = shape.group == 1 and shape.seqlen_q * max(shape.head_dim, 128) <= SHORT
        return multiprocessors // SPARED if is_short and not is_ordered else 0
    rounds = -(-tiles // multiprocessors)
    return multiprocessors - -(-tiles // rounds)


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
