"""Problem: what is asked, and nothing of how. Frozen, hashable, no tensors in it, no device either."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch

from tessera.mask import MaskSpec

MAX_HEAD_DIM = 256
BACKWARD_WORK = 2.5
"""Products in the backward over those in the forward: five against two, S computed again (FlashAttention-2, section 4.1)."""


class Layout(Enum):
    """How sequences lie in the tensors."""

    DENSE = "dense"
    """(batch, seqlen, heads, head_dim)"""
    VARLEN = "varlen"
    """(total, heads, head_dim): the sequences of a batch one after the other, cut by cu_seqlens"""


class Gradients(Enum):
    """Which gradients will be asked for: what must be saved, and which backends can serve."""

    NONE = "none"
    INPUTS = "inputs"


@dataclass(frozen=True)
class Shape:
    """The sizes of a problem. In the varlen layout `batch` counts sequences and the seqlens are totals over them."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int

    @property
    def group(self) -> int:
        """Query heads that share one key/value head (1: MHA, heads_q: MQA)."""
        return self.heads_q // self.heads_kv

    def __str__(self) -> str:
        heads = str(self.heads_q) if self.group == 1 else f"{self.heads_q}/{self.heads_kv}"
        dim = str(self.head_dim) if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        seqlen = str(self.seqlen_q) if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q}x{self.seqlen_k}"
        return f"b{self.batch} s{seqlen} h{heads} d{dim}"


@dataclass(frozen=True)
class Bias:
    """An additive bias: its own (broadcastable) 4-D shape, its dtype, and whether its gradient is wanted."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    gradients: Gradients = Gradients.NONE


@dataclass(frozen=True)
class Sinks:
    """One learnable logit a head, a key without a value: it takes part in the softmax's denominator alone."""

    gradients: Gradients = Gradients.NONE


class Alibi(Enum):
    """ALiBi's slopes: one a head, or one a batch entry and head. Adds -slope * |i + seqlen_k - seqlen_q - j|."""

    PER_HEAD = "per head"
    PER_BATCH_AND_HEAD = "per batch and head"


@dataclass(frozen=True)
class Score:
    """What happens to a score between the product q.k and the softmax, in this order: scale, softcap, ALiBi and bias."""

    scale: float
    softcap: float = 0.0
    alibi: Alibi | None = None
    bias: Bias | None = None
    sinks: Sinks | None = None
    dropout_p: float = 0.0

    def __str__(self) -> str:
        parts = [f"scale {self.scale:.4g}"]
        parts += [f"softcap {self.softcap:g}"] if self.softcap else []
        parts += ["alibi"] if self.alibi else []
        parts += [f"bias {self.bias.shape}"] if self.bias else []
        parts += ["sinks"] if self.sinks else []
        parts += [f"dropout {self.dropout_p:g}"] if self.dropout_p else []
        return ", ".join(parts)


class Reproducibility(Enum):
    """Which runs must agree bit for bit."""

    ANY_ORDER = "any order of sums"
    BITWISE = "bitwise"
    """two runs of one problem"""
    BATCH_INVARIANT = "batch-invariant"
    """a sequence's result, whatever the batch around it (serving from a cache)"""


@dataclass(frozen=True)
class Problem:
    """One attention problem, complete but for the tensors' contents.

    `lengths` names the tensors that give the sequences' own lengths ("cu_seqlens_q", "seqused_k", ...): unlike a mask
    they redefine a sequence, hence its causal diagonal.
    """

    shape: Shape
    dtype: torch.dtype
    score: Score
    layout: Layout = Layout.DENSE
    mask: MaskSpec = field(default_factory=MaskSpec)
    lengths: tuple[str, ...] = ()
    gradients: Gradients = Gradients.NONE
    reproducibility: Reproducibility = Reproducibility.ANY_ORDER

    @property
    def lse_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def lse_shape(self) -> tuple[int, ...]:
        s = self.shape
        if self.layout is Layout.VARLEN:
            return (s.heads_q, s.seqlen_q)
        return (s.batch, s.heads_q, s.seqlen_q)

    @property
    def out_shape(self) -> tuple[int, ...]:
        s = self.shape
        if self.layout is Layout.VARLEN:
            return (s.seqlen_q, s.heads_q, s.head_dim_v)
        return (s.batch, s.seqlen_q, s.heads_q, s.head_dim_v)

    def scores(self) -> int:
        """The number of scores that the mask's diagonal band leaves, over all heads: exact for dense problems, but that padding
        and documents, known to the tensors alone, are not taken off; packed sequences count as if all had the mean length."""
        s = self.shape
        if self.layout is Layout.VARLEN:
            n = max(1, s.batch)
            per_sequence = _band_area(s.seqlen_q // n, s.seqlen_k // n, self.mask)
        else:
            per_sequence = _band_area(s.seqlen_q, s.seqlen_k, self.mask)
        return per_sequence * s.batch * s.heads_q

    def flops(self) -> int:
        """Floating-point operations of the forward's two products (2 a multiply-add); the backward needs BACKWARD_WORK times as
        many at head_dim == head_dim_v."""
        return 2 * self.scores() * (self.shape.head_dim + self.shape.head_dim_v)

    def io_bytes(self) -> int:
        """The fewest bytes the forward can move: each input read once, out and lse written once."""
        s, size = self.shape, self.dtype.itemsize
        copies = 1 if self.layout is Layout.VARLEN else s.batch
        q_and_out = s.seqlen_q * s.heads_q * (s.head_dim + s.head_dim_v)
        k_and_v = s.seqlen_k * s.heads_kv * (s.head_dim + s.head_dim_v)
        lse = s.seqlen_q * s.heads_q * self.lse_dtype.itemsize
        return copies * ((q_and_out + k_and_v) * size + lse)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"{self.layout.value} {self.shape} {dtype}, {self.mask}, {self.score}"
        if self.gradients is Gradients.INPUTS:
            text += ", with gradients"
        if self.reproducibility is Reproducibility.BITWISE:
            text += ", deterministic"
        return text


def _band_area(seqlen_q: int, seqlen_k: int, mask: MaskSpec) -> int:
    """The number of (i, j) with i + offset - left <= j <= i + offset + right inside seqlen_q x seqlen_k."""
    offset = seqlen_k - seqlen_q

    def below(limit: int) -> int:
        # sum over rows of clip(i + limit, 0, seqlen_k): an arithmetic series between two clips
        first = min(max(-limit, 0), seqlen_q)
        last = min(max(seqlen_k - limit, first), seqlen_q)
        rising = last - first
        return rising * (first + limit) + rising * (rising - 1) // 2 + (seqlen_q - last) * seqlen_k

    upper = seqlen_q * seqlen_k if mask.right is None else below(offset + mask.right + 1)
    lower = 0 if mask.left is None else below(offset - mask.left)
    return max(0, upper - lower)
