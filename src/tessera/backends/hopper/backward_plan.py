"""BackwardConfig: everything that the backward kernels are compiled for, and which one a problem gets."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum

from tessera.backends.hopper.config import ROWS, Feature
from tessera.backends.hopper.plan import MODIFIERS, features_of
from tessera.problem import Gradients, Layout, Problem, Reproducibility

PART_LINE = 256
"""Values in a line of the workspace, where parts of dQ lie as in registers: 64 rows of four columns (pieces/sums.py)."""
WORK_ROWS = 128
"""Every sequence's rows begin at a multiple of this in the workspace: a multiple of every kernel's row block."""


class Division(Enum):
    """How the consumer warpgroups share the work on a tile of keys."""

    KEYS = "keys"
    """Two consumers in step, 64 keys each: all products of their keys, half of dQ. For head dims up to 128 with modifiers."""
    AHEAD = "keys, P ahead"
    """The same, not in step: P a turn ahead, dQ a turn later; programs take tile after tile. For head dim 128."""
    TURNS = "keys, dQ in turn"
    """Three consumers, 64 keys each, not in step: they take turns at dQ. For head dim 64."""
    PRODUCTS = "products"
    """Three consumers on 64 keys: one has S and dV, one dP and dK, one dQ. For head dims up to 256."""


class PartLayout(Enum):
    """How a part of dQ lies in shared memory and in the workspace."""

    REGISTERS = "registers"
    """As wgmma leaves it, thread after thread: no conflict between shared memory's banks. Ours / FA3 went from 0.91 .. 0.94 to
    0.96 .. 0.99 at head dim 128, and from 0.85 .. 0.94 to 0.93 .. 0.98 at 64 (H200, 1k and 16k, 2026-11-21)."""
    ROWS = "rows"
    """As rows of dQ. At head dim 256 additions in L2 are the limit: so ours / FA3 was 1.01 at 16k, and 0.94 with the other."""


@dataclass(frozen=True)
class BackwardConfig:
    """One variant of the backward. `rows`: query rows of a block; `keys`: keys of a tile; `dim`, `dim_v`: padded head dims."""

    division: Division
    rows: int
    keys: int
    dim: int
    dim_v: int
    q_stages: int
    do_stages: int
    reproducibility: Reproducibility = Reproducibility.ANY_ORDER
    features: tuple[Feature, ...] = ()

    @property
    def consumers(self) -> int:
        """Warpgroups that compute."""
        return 3 if self.division is Division.PRODUCTS else self.keys // ROWS

    @property
    def readers(self) -> int:
        """Consumers that read each block of Q, and of dO: one that does nothing but dQ reads neither."""
        return 2 if self.division is Division.PRODUCTS else self.consumers

    @property
    def adders(self) -> int:
        """Consumers that compute parts of dQ."""
        return 1 if self.division is Division.PRODUCTS else self.consumers

    @property
    def part_buffers(self) -> int:
        """Buffers for parts of dQ, over all adders. In turns there is one each."""
        return self.adders if self.division is Division.TURNS else 2 * self.adders

    @property
    def part_columns(self) -> int:
        """Columns of the parts in which dQ is added up."""
        halves = self.dim // 2
        return {Division.KEYS: halves, Division.AHEAD: halves, Division.TURNS: self.dim, Division.PRODUCTS: 64}[self.division]

    @property
    def part_layout(self) -> PartLayout:
        return PartLayout.ROWS if self.division is Division.PRODUCTS else PartLayout.REGISTERS

    @property
    def keeps_v(self) -> bool:
        """Whether each consumer keeps its keys' V in registers (the others have no room): shared memory's bandwidth is the limit.
        Ours / FA3 at head dim 64 went from 0.931 to 0.974 (causal 16k) and from 0.958 to 0.992 (full 4k; H200, 2026-11-21)."""
        return self.division is Division.TURNS and self.dim_v == 64

    @property
    def parts(self) -> int:
        """Parts of a block of rows."""
        return self.dim // self.part_columns

    def __str__(self) -> str:
        dim = str(self.dim) if self.dim == self.dim_v else f"{self.dim}/{self.dim_v}"
        text = f"{self.rows}x{self.keys} d{dim}, divided by {self.division.value}, {self.q_stages}+{self.do_stages} stages"
        text += ", dQ summed in a fixed order" if self.reproducibility is Reproducibility.BITWISE else ""
        return text + "".join(f", {feature.value}" for feature in self.features)


@dataclass(frozen=True)
class RowsConfig:
    """What the small kernels of backward_rows.py are compiled for."""

    dim: int
    dim_v: int
    reproducibility: Reproducibility
    part_layout: PartLayout
    features: tuple[Feature, ...]

    @staticmethod
    def of(config: BackwardConfig) -> RowsConfig:
        """Of a configuration's features, those that say which rows there are, and the sinks."""
        wanted = {Feature.VARLEN, Feature.SEQUSED_Q, Feature.QUERY_END, Feature.SINKS}
        features = tuple(x for x in config.features if x in wanted)
        return RowsConfig(config.dim, config.dim_v, config.reproducibility, config.part_layout, features)


def backward_config(problem: Problem) -> BackwardConfig:
    """The configuration for a problem."""
    features = features_of(problem)
    bias = problem.score.bias
    if bias is not None and bias.gradients is Gradients.INPUTS:
        features = (*features, Feature.BIAS_GRADIENT)
    dim, dim_v = _padded(problem.shape.head_dim), _padded(problem.shape.head_dim_v)
    config = BackwardConfig(Division.KEYS, 64, 128, dim, dim_v, 2, 2, problem.reproducibility, features)
    if max(dim, dim_v) == 256:
        # One stage of dO leaves room to double the buffers of P, dS and dQ: 3 to 6% over two (H200, 4k and 16k, 2026-11-21).
        return replace(config, division=Division.PRODUCTS, keys=64, do_stages=1)
    kinds = (MODIFIERS - {Feature.SCALE_FIRST}) & set(features)
    if max(dim, dim_v) == 128 and (Feature.BIAS in kinds or len(kinds) > 1):
        # The places of a bias, or two modifiers, do not fit beside dK and dV in one consumer (the compile gate).
        return replace(config, division=Division.PRODUCTS, keys=64)
    if kinds:
        return config  # three consumers have no registers for them
    if max(dim, dim_v) == 64 and Feature.SOFTCAP not in features:
        # Over two consumers and 128 keys: 1.05 to 1.13 (H200, 1k and 16k, 2026-11-21). With a softcap's slope 160 registers spill
        # in the loop.
        return replace(config, division=Division.TURNS, keys=192, q_stages=3, do_stages=3)
    if max(dim, dim_v) == 128 and problem.reproducibility is Reproducibility.BITWISE:
        # A tile that waits for another's dQ then holds up one consumer and not both: 1.02 to 1.06 over in step (H200, 1k and 16k,
        # 2026-11-21). In any order in step is better: 0.99 to 1.04.
        return replace(config, division=Division.TURNS)
    if dim == dim_v == 128 and Feature.SOFTCAP not in features:
        # Over in step: 1.03 to 1.05, 1.03 more for tile after tile up to 2k (H200, 2026-11-21). A softcap's slope does not fit.
        return replace(config, division=Division.AHEAD)
    return config


def _padded(dim: int) -> int:
    """The head dim that a kernel is made for; columns past the tensor's own read as zeros."""
    return next(size for size in (64, 128, 256) if size >= dim)


def work_lines(problem: Problem) -> int:
    """Rows of the workspace a head: every sequence's, rounded up to WORK_ROWS."""
    shape = problem.shape
    if problem.layout is Layout.VARLEN:
        return WORK_ROWS * (shape.seqlen_q // WORK_ROWS + shape.batch + 1)
    return shape.batch * -(-shape.seqlen_q // WORK_ROWS) * WORK_ROWS


def workspace_bytes(problem: Problem) -> int:
    """dQ in float32, lse and D of each row, a mark for every 64 rows and a counter; the bias's gradient in float32."""
    rows, bias = problem.shape.heads_q * work_lines(problem), problem.score.bias
    sums = 0 if bias is None or bias.gradients is Gradients.NONE else math.prod(bias.shape)
    return 4 * (rows * (problem.shape.head_dim + 2) + rows // 64 + 1 + sums)
