"""From q.k to the score that enters the softmax, on one tile: softcap, ALiBi, bias and mask; and the way back.

Scores are kept in log2 units, x log2(e), so that P = 2^(x - m): torch's exp2 takes 0.17 ns a score where exp takes 0.43 (float32,
two AVX-512 cores, 2026-11-21), and the factor is folded into Q. Only under a bias the units are natural: a bias of
finfo.min, as masks in the field have it, must not overflow. The softcap is c tanh(y / 2) = 2c (sigmoid(y) - 1/2): sigmoid
takes 0.25 ns where tanh takes 1.3, and errs by c 2^-23 at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.dropout import keep_scale, keep_tile
from tessera.mask import Coverage, RowLimits
from tessera.operands import Operands
from tessera.problem import Score

LOG2E = math.log2(math.e)


@dataclass(frozen=True, eq=False)
class HeadChunk:
    """The heads that are worked on together: key/value heads `kv` of batch entry `entry`, `group` query heads each."""

    entry: int
    kv: range
    group: int

    @property
    def heads(self) -> slice:
        return slice(self.kv.start * self.group, self.kv.stop * self.group)


@dataclass(frozen=True, eq=False)
class ScoreTiles:
    """The score arithmetic of one head chunk of one sequence.

    Tiles are (kv heads, group * rows, keys): the query heads of a group lie one after the other along the rows, so
    that one product serves the whole group (GQA packing).
    """

    score: Score
    operands: Operands
    limits: RowLimits
    chunk: HeadChunk

    @property
    def unit(self) -> float:
        """What a score of 1 is in the units that `finish` returns."""
        return LOG2E if self.score.bias is None else 1.0

    def exponential_(self, x: Tensor) -> Tensor:
        """e to the power of scores in these units, in place."""
        return x.exp2_() if self.score.bias is None else x.exp_()

    @property
    def query_scale(self) -> float:
        """What Q is multiplied by once, before any product: so that y = query_scale q.k is what `finish` starts from."""
        return 2 * self.score.scale / self.score.softcap if self.score.softcap else self.score.scale * self.unit

    @property
    def constant_slope(self) -> float:
        """dx/dy where it is the same for all scores; 1 with a softcap, whose slope `softcap_slope` gives."""
        return 1.0 if self.score.softcap else 1 / self.unit

    def softcap_slope(self, y: Tensor) -> Tensor | None:
        """dx/dy at y, before `finish`; None without a softcap. x = 2c (sigmoid(y) - 1/2)."""
        if not self.score.softcap:
            return None
        s = y.sigmoid()
        return torch.addcmul(s, s, s, value=-1).mul_(2 * self.score.softcap)

    def finish(self, y: Tensor, rows: range, keys: range) -> Tensor:
        """y = query_scale q.k -> the final scores x in this object's units, in place."""
        if self.score.softcap:
            y.sigmoid_().sub_(0.5).mul_(2 * self.score.softcap * self.unit)
        by_head = y.view(y.shape[0], self.chunk.group, len(rows), y.shape[-1])
        if self.score.alibi is not None:
            by_head.sub_(self._slopes(y.dtype) * self._distance(rows, keys), alpha=self.unit)
        if self.operands.bias is not None:
            by_head.add_(bias_piece(chunk_of_bias(self.operands.bias, self.chunk), self.chunk.group, rows, keys))
        if self.limits.coverage(rows, keys) is Coverage.PARTIAL:
            by_head.masked_fill_(~self.limits.allowed(rows, keys).to(y.device), float("-inf"))
        return y

    def keep(self, rows: range, keys: range, dtype: torch.dtype) -> Tensor | None:
        """Z, the dropout factor of each score, (kv heads, group * rows, keys): 0 or 1 / (1 - p); None without dropout."""
        if not self.score.dropout_p:
            return None
        heads = torch.arange(self.chunk.heads.start, self.chunk.heads.stop, device=self.operands.q.device)
        kept = keep_tile(self.operands.seed, self.chunk.entry, heads, rows, keys, self.score.dropout_p)
        return kept.view(len(self.chunk.kv), -1, len(keys)).to(dtype) * keep_scale(self.score.dropout_p)

    def _slopes(self, dtype: torch.dtype) -> Tensor:
        slopes = self.operands.alibi_slopes
        if slopes is None:
            raise ValueError("this problem has no ALiBi slopes")
        own = slopes if slopes.dim() == 1 else slopes[self.chunk.entry]
        return own[self.chunk.heads].to(dtype).view(len(self.chunk.kv), self.chunk.group, 1, 1)

    def _distance(self, rows: range, keys: range) -> Tensor:
        """|i + seqlen_k - seqlen_q - j|, (rows, keys)"""
        device = self.operands.q.device
        i = torch.arange(rows.start, rows.stop, device=device)[:, None] + (self.limits.seqlen_k - self.limits.seqlen_q)
        return (i - torch.arange(keys.start, keys.stop, device=device)).abs_()


def chunk_of_bias(bias: Tensor, chunk: HeadChunk) -> Tensor:
    """(B | 1, H | 1, Sq | 1, Sk | 1) -> (heads | 1, Sq | 1, Sk | 1), a view: also of a gradient with the bias's shape."""
    entry = bias[chunk.entry if bias.shape[0] > 1 else 0]
    return entry[chunk.heads] if entry.shape[0] > 1 else entry


def bias_piece(bias: Tensor, group: int, rows: range, keys: range) -> Tensor:
    """A tile of a chunk's bias as a view, broadcastable to (kv heads, group, rows, keys)."""
    if bias.shape[1] > 1:
        bias = bias[:, rows.start : rows.stop]
    if bias.shape[2] > 1:
        bias = bias[:, :, keys.start : keys.stop]
    return bias.unflatten(0, (-1, group)) if bias.shape[0] > 1 else bias[None]
