"""BackwardConfig: everything that the backward kernels are compiled for, and which one a problem gets."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tessera.backends.hopper.config import Feature
from tessera.backends.hopper.plan import features_of
from tessera.problem import Layout, Problem

WORK_ROWS = 128
"""Every sequence's rows begin at a multiple of this in the workspace: a multiple of every kernel's row block."""


class Division(Enum):
    """How the consumer warpgroups share the work on a tile of keys."""

    KEYS = "keys"
    """Two consumers in step, 64 keys each: all products of their keys, half of dQ. For head dims up to 128."""
    TURNS = "keys, dQ in turn"
    """Three consumers, 64 keys each, not in step: they take turns at dQ. For head dim 64."""
    PRODUCTS = "products"
    """Three consumers on 64 keys: one has S and dV, one dP and dK, one dQ. For head dims up to 256."""


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
    features: tuple[Feature, ...] = ()

    def __str__(self) -> str:
        dim = str(self.dim) if self.dim == self.dim_v else f"{self.dim}/{self.dim_v}"
        text = f"{self.rows}x{self.keys} d{dim}, divided by {self.division.value}, {self.q_stages}+{self.do_stages} stages"
        return text + "".join(f", {feature.value}" for feature in self.features)


@dataclass(frozen=True)
class RowsConfig:
    """What the small kernels of backward_rows.py are compiled for."""

    dim: int
    dim_v: int
    features: tuple[Feature, ...]

    @staticmethod
    def of(config: BackwardConfig) -> RowsConfig:
        """Of a configuration's features, those that say which rows there are, and the sinks."""
        wanted = {Feature.VARLEN, Feature.SEQUSED_Q, Feature.QUERY_END, Feature.SINKS}
        return RowsConfig(config.dim, config.dim_v, tuple(x for x in config.features if x in wanted))


def backward_config(problem: Problem) -> BackwardConfig:
    """The configuration for a problem."""
    shape = problem.shape
    dim, dim_v = _padded(shape.head_dim), _padded(shape.head_dim_v)
    features = features_of(problem)
    if max(dim, dim_v) == 256:
        # One stage of dO leaves room to double the buffers of P, dS and dQ: 3 to 6% over two (H200, 4k and 16k, 2026-11-21).
        return BackwardConfig(Division.PRODUCTS, 64, 64, dim, dim_v, q_stages=2, do_stages=1, features=features)
    if max(dim, dim_v) == 64 and not {Feature.SOFTCAP, Feature.LEFT, Feature.DOCUMENTS} & set(features):
        # Over two consumers and 128 keys: 1.05 to 1.13 (H200, 1k and 16k, 2026-11-21). With a softcap's slope, or with masks at
        # both ends, 160 registers spill in the loop.
        return BackwardConfig(Division.TURNS, 64, 192, dim, dim_v, q_stages=3, do_stages=3, features=features)
    return BackwardConfig(Division.KEYS, 64, 128, dim, dim_v, q_stages=2, do_stages=2, features=features)


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
    """dQ in float32, and lse and D of each row."""
    return 4 * problem.shape.heads_q * work_lines(problem) * (problem.shape.head_dim + 2)
