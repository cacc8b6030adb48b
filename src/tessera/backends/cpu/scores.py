"""From q.k to the score that enters the softmax, on one tile: softcap, ALiBi, bias and mask; and the way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.dropout import keep_scale, keep_tile
from tessera.mask import Coverage, RowLimits
from tessera.operands import Operands
from tessera.problem import Score


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
    def query_scale(self) -> float:
        """What Q is multiplied by once, before any product."""
        return self.score.scale / self.score.softcap if self.score.softcap else self.score.scale

    def finish(self, s: Tensor, rows: range, keys: range) -> Tensor:
        """query_scale * q.k -> the final scores x, in place."""
        if self.score.softcap:
            s.tanh_().mul_(self.score.softcap)
        by_head = self._by_head(s, rows)
        if self.score.alibi is not None:
            by_head.sub_(self._slopes(s.dtype) * self._distance(rows, keys))
        if self.operands.bias is not None:
            by_head.add_(self.bias_tile(rows, keys))
        if self.limits.coverage(rows, keys) is Coverage.PARTIAL:
            by_head.masked_fill_(~self.limits.allowed(rows, keys).to(s.device), float("-inf"))
        return s

    def capped_slope(self, x: Tensor, rows: range, keys: range) -> Tensor | None:
        """d(softcap)/d(query_scale * q.k) from the final scores x; None without a softcap, where it is 1."""
        if not self.score.softcap:
            return None
        t = x.clone()
        by_head = self._by_head(t, rows)
        if self.score.alibi is not None:
            by_head.add_(self._slopes(x.dtype) * self._distance(rows, keys))
        if self.operands.bias is not None:
            by_head.sub_(self.bias_tile(rows, keys))
        t.div_(self.score.softcap)
        slope = t.mul_(t).neg_().add_(1.0).mul_(self.score.softcap)
        return slope.masked_fill_(~torch.isfinite(slope), 0.0)  # where x is masked, P is 0 and so is the gradient

    def keep(self, rows: range, keys: range, dtype: torch.dtype) -> Tensor | None:
        """Z, the dropout factor of each score, (kv heads, group * rows, keys): 0 or 1 / (1 - p); None without dropout."""
        if not self.score.dropout_p:
            return None
        heads = torch.arange(self.chunk.heads.start, self.chunk.heads.stop, device=self.operands.q.device)
        kept = keep_tile(self.operands.seed, self.chunk.entry, heads, rows, keys, self.score.dropout_p)
        return kept.view(len(self.chunk.kv), -1, len(keys)).to(dtype) * keep_scale(self.score.dropout_p)

    def bias_tile(self, rows: range, keys: range) -> Tensor:
        """This tile's piece of the bias, broadcastable to (kv heads, group, rows, keys)."""
        return bias_piece(self.bias_of_chunk(), self.chunk.group, rows, keys)

    def bias_of_chunk(self) -> Tensor:
        """(heads | 1, Sq | 1, Sk | 1): the bias of this batch entry and these heads."""
        bias = self.operands.bias
        if bias is None:
            raise ValueError("this problem has no bias")
        return chunk_of_bias(bias, self.chunk)

    def _by_head(self, s: Tensor, rows: range) -> Tensor:
        return s.view(s.shape[0], self.chunk.group, len(rows), s.shape[-1])

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
