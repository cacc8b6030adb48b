"""FlashAttention in tiles of torch operations: the forward of the paper's Algorithm 1 and FlashAttention-2's backward.

Memory is linear in the sequence length: beside inputs and outputs there are one chunk of heads in the compute dtype and a
few tiles. The arithmetic is float32 (float64 for float64), the sums run in a fixed order, so results are deterministic.
The symbols are the papers': S = Q K^T, P, m, l, O; dO, D, dP, dS (FlashAttention, 2205.14135; FlashAttention-2, 2307.08691).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.backends.cpu.scores import HeadChunk, ScoreTiles, bias_piece, chunk_of_bias
from tessera.backends.cpu.sequences import Sequence, four_dims, rows_in_sequences, sequences
from tessera.dispatch import InputGradients, Upstream
from tessera.mask import Coverage
from tessera.operands import Operands
from tessera.partial import merge_weights
from tessera.problem import Gradients, Layout, Problem


@dataclass(frozen=True)
class Tiles:
    """`rows` x `keys` scores a head, and at most `scores` scores at a time over the heads of a chunk."""

    rows: int
    keys: int
    scores: int

    def heads_at_once(self, group: int, seqlen_q: int, seqlen_k: int) -> int:
        """How many key/value heads fill a tile's budget."""
        one = max(1, group) * min(self.rows, max(1, seqlen_q)) * min(self.keys, max(1, seqlen_k))
        return max(1, self.scores // one)

    def __str__(self) -> str:
        return f"tile {self.rows}x{self.keys}, {self.scores // 1024} Ki scores at a time"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the arithmetic runs in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(problem: Problem, operands: Operands, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """(out, lse) of a problem."""
    out = torch.zeros(problem.out_shape, dtype=problem.dtype, device=operands.q.device)
    lse = torch.full(problem.lse_shape, float("-inf"), dtype=problem.lse_dtype, device=operands.q.device)
    out4, lse3 = four_dims(out), lse if lse.dim() == 3 else lse[None]
    for sequence in sequences(problem, operands):
        for chunk in _chunks(problem, sequence, tiles):
            heads = _Heads.load(problem, operands, sequence, chunk)
            o, chunk_lse = _attend(heads, tiles)  # (kv, group, Sq, Dv), (kv, group, Sq)
            entry = sequence.place_of(chunk.entry)
            out4[entry, sequence.rows, chunk.heads].copy_(o.flatten(0, 1).transpose(0, 1))
            lse3[entry, chunk.heads, sequence.rows].copy_(chunk_lse.flatten(0, 1))
    return with_sinks(problem, operands, out, lse)


def with_sinks(problem: Problem, operands: Operands, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention with its sinks, if it has any: each is a part with value 0 and lse = the sink's logit."""
    if operands.sinks is None:
        return out, lse
    logits = operands.sinks.to(lse.dtype)[:, None].expand_as(lse)
    if problem.layout is Layout.VARLEN:  # tokens of no sequence stay empty
        logits = logits.masked_fill(~rows_in_sequences(problem, operands), float("-inf"))
    weight, _, merged = merge_weights(lse, logits)  # (..., heads, seqlen)
    return out * weight.transpose(-1, -2).unsqueeze(-1).to(out.dtype), merged


@dataclass(frozen=True, eq=False)
class _Heads:
    """One chunk of heads of one sequence in the compute dtype. q (kv, group, Sq, D), k (kv, Sk, D), v (kv, Sk, Dv)."""

    q: Tensor
    k: Tensor
    v: Tensor
    scores: ScoreTiles

    @staticmethod
    def load(problem: Problem, operands: Operands, sequence: Sequence, chunk: HeadChunk) -> _Heads:
        scores = ScoreTiles(problem.score, operands, sequence.limits, chunk)
        entry = sequence.place_of(chunk.entry)
        kv = slice(chunk.kv.start, chunk.kv.stop)
        q = four_dims(operands.q)[entry, sequence.rows, chunk.heads]
        k = four_dims(operands.k)[entry, sequence.keys, kv]
        v = four_dims(operands.v)[entry, sequence.keys, kv]
        dtype = compute_dtype(problem.dtype)
        q = head_major(q, dtype).mul(scores.query_scale).unflatten(0, (-1, chunk.group))
        return _Heads(q, head_major(k, dtype), head_major(v, dtype), scores)


def head_major(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(seqlen, heads, dim) -> contiguous (heads, seqlen, dim) in `dtype`."""
    return x.transpose(0, 1).to(dtype, memory_format=torch.contiguous_format).contiguous()


def _chunks(problem: Problem, sequence: Sequence, tiles: Tiles) -> Iterator[HeadChunk]:
    shape, limits = problem.shape, sequence.limits
    if shape.group == 0:  # no query heads
        return
    step = tiles.heads_at_once(shape.group, limits.seqlen_q, limits.seqlen_k)
    for offset in range(sequence.entries.stop - sequence.entries.start):
        for h in range(0, shape.heads_kv, step):
            yield HeadChunk(sequence.first + offset, range(h, min(h + step, shape.heads_kv)), shape.group)


def _split(begin: int, end: int, size: int) -> Iterator[range]:
    for start in range(begin, end, size):
        yield range(start, min(start + size, end))


def _rows_of(x: Tensor, rows: range) -> Tensor:
    """(kv, group, Sq, D) -> (kv, group * rows, D)"""
    return x[:, :, rows.start : rows.stop].flatten(1, 2)


def _attend(heads: _Heads, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Algorithm 1 on one chunk of heads: O (kv, group, Sq, Dv) and lse (kv, group, Sq)."""
    kv, group, seqlen_q, _ = heads.q.shape
    limits = heads.scores.limits
    out = heads.v.new_zeros(kv, group, seqlen_q, heads.v.shape[-1])
    lse = heads.q.new_full((kv, group, seqlen_q), float("-inf"))
    for rows in _split(0, limits.rows, tiles.rows):
        q_i = _rows_of(heads.q, rows)  # (kv, group * rows, D)
        # The lowest finite number: below it there is only -inf, so a masked score gets exp(-inf) = 0 with no special case.
        m = q_i.new_full((kv, q_i.shape[1], 1), torch.finfo(q_i.dtype).min)
        l = q_i.new_zeros(kv, q_i.shape[1], 1)
        o = q_i.new_zeros(kv, q_i.shape[1], heads.v.shape[-1])
        seen = limits.keys_of(rows.start, rows.stop)
        for keys in _split(seen.begin, seen.end, tiles.keys):
            s = torch.bmm(q_i, heads.k[:, keys.start : keys.stop].transpose(1, 2))  # (kv, group * rows, keys)
            x = heads.scores.finish(s, rows, keys)
            m_new = torch.maximum(m, x.amax(dim=-1, keepdim=True))
            alpha = heads.scores.exponential_(m - m_new)
            p = heads.scores.exponential_(x.sub_(m_new))
            l = l.mul_(alpha).add_(p.sum(dim=-1, keepdim=True))
            keep = heads.scores.keep(rows, keys, p.dtype)
            o = o.mul_(alpha).baddbmm_(p if keep is None else p.mul_(keep), heads.v[:, keys.start : keys.stop])
            m = m_new
        # A row that saw nothing has l = 0: out stays 0, and lse = m + log 0 = -inf.
        out[:, :, rows.start : rows.stop] = o.div_(l.masked_fill(l == 0, 1.0)).unflatten(1, (group, -1))
        lse[:, :, rows.start : rows.stop] = l.log_().add_(m, alpha=1 / heads.scores.unit).squeeze(-1).unflatten(1, (group, -1))
    return out, lse


def backward(problem: Problem, operands: Operands, upstream: Upstream, tiles: Tiles) -> InputGradients:
    """The gradients of a problem, P recomputed from lse tile by tile; nothing of the forward but out and lse is needed."""
    gradients = _empty_gradients(problem, operands)
    # D_i = rowsum(dO * O) - dlse_i: (batch, heads, Sq); FlashAttention-2, section 3.1.2, and the chain rule for lse
    dtype = compute_dtype(problem.dtype)
    dout, out = four_dims(upstream.dout), four_dims(upstream.out)
    d = (dout.to(dtype) * out.to(dtype)).sum(dim=-1).transpose(1, 2)
    if upstream.dlse is not None:
        d = d - upstream.dlse.view(d.shape)
    lse = upstream.lse.view(d.shape)
    grads4 = tuple(four_dims(g) for g in (gradients.dq, gradients.dk, gradients.dv))
    for sequence in sequences(problem, operands):
        for chunk in _chunks(problem, sequence, tiles):
            heads = _Heads.load(problem, operands, sequence, chunk)
            entry = sequence.place_of(chunk.entry)
            rows = _Rows.load(dout[entry], lse[entry], d[entry], sequence, heads.scores)
            dbias = None if gradients.dbias is None else chunk_of_bias(gradients.dbias, chunk)
            dq, dk, dv = _differentiate(heads, rows, dbias, tiles)
            kv = slice(chunk.kv.start, chunk.kv.stop)
            for grad, tokens, where, value in zip(
                grads4,
                (sequence.rows, sequence.keys, sequence.keys),
                (chunk.heads, kv, kv),
                (dq.flatten(0, 1), dk, dv),
                strict=True,
            ):
                grad[entry, tokens, where].copy_(value.transpose(0, 1))
    if problem.score.sinks is not None and problem.score.sinks.gradients is Gradients.INPUTS and operands.sinks is not None:
        return InputGradients(gradients.dq, gradients.dk, gradients.dv, gradients.dbias, sinks_gradient(operands.sinks, lse, d))
    return gradients


def sinks_gradient(sinks: Tensor, lse: Tensor, d: Tensor) -> Tensor:
    """A sink is a key whose value is 0, so dP = 0 and dS = P (0 - D), summed over batch and rows. lse, d (batch, H, Sq)."""
    # an empty row whose sink is -inf has lse -inf; +inf makes its probability 0, as everywhere in the backward
    probability = (sinks.to(lse.dtype)[None, :, None] - lse.masked_fill(lse == float("-inf"), float("inf"))).exp()
    return -(probability * d).sum(dim=(0, 2)).to(sinks.dtype)


def _empty_gradients(problem: Problem, operands: Operands) -> InputGradients:
    dbias = None
    bias = problem.score.bias
    if bias is not None and bias.gradients is Gradients.INPUTS:
        dbias = torch.zeros(bias.shape, dtype=compute_dtype(problem.dtype), device=operands.q.device)
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (operands.q, operands.k, operands.v))
    return InputGradients(dq, dk, dv, dbias)


@dataclass(frozen=True, eq=False)
class _Rows:
    """What the backward knows of each row. dout (kv, group, Sq, Dv); lse (in the scores' units), d (kv, group, Sq, 1)."""

    dout: Tensor
    lse: Tensor
    d: Tensor

    @staticmethod
    def load(dout: Tensor, lse: Tensor, d: Tensor, sequence: Sequence, scores: ScoreTiles) -> _Rows:
        """From one batch entry's dout (seqlen, heads, Dv) and lse, d (heads, seqlen)."""
        chunk = scores.chunk
        by_head = (x[chunk.heads, sequence.rows].unflatten(0, (-1, chunk.group)).unsqueeze(-1) for x in (lse, d))
        own_lse, own_d = by_head
        # An empty row has lse -inf; +inf makes its P = exp(x - lse) zero.
        own_lse = own_lse.masked_fill(own_lse == float("-inf"), float("inf"))
        own = head_major(dout[sequence.rows, chunk.heads], d.dtype)
        return _Rows(own.unflatten(0, (-1, chunk.group)), own_lse * scores.unit, own_d)


def _differentiate(heads: _Heads, rows_of: _Rows, dbias: Tensor | None, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention-2's backward on one chunk: key tiles outside, row tiles inside; dq (kv, group, Sq, D), dk, dv."""
    limits, group = heads.scores.limits, heads.q.shape[1]
    dq, dk, dv = torch.zeros_like(heads.q), torch.zeros_like(heads.k), torch.zeros_like(heads.v)
    if limits.rows == 0:
        return dq, dk, dv
    # keys that no row sees are not touched: they may hold anything, and 0 * NaN is NaN
    seen = limits.keys_of(0, limits.rows)
    for keys in _split(seen.begin, seen.end, tiles.keys):
        k_j, v_j = heads.k[:, keys.start : keys.stop], heads.v[:, keys.start : keys.stop]
        dk_j, dv_j = dk[:, keys.start : keys.stop], dv[:, keys.start : keys.stop]
        for rows in _split(*limits.rows_of(keys.start, keys.stop), tiles.rows):
            if limits.coverage(rows, keys) is Coverage.EMPTY:
                continue
            q_i, do_i = _rows_of(heads.q, rows), _rows_of(rows_of.dout, rows)
            y = torch.bmm(q_i, k_j.transpose(1, 2))  # (kv, group * rows, keys)
            slope = heads.scores.softcap_slope(y)
            p = heads.scores.exponential_(heads.scores.finish(y, rows, keys).sub_(_rows_of(rows_of.lse, rows)))
            dp = torch.bmm(do_i, v_j.transpose(1, 2))
            keep = heads.scores.keep(rows, keys, p.dtype)
            dv_j.baddbmm_((p if keep is None else p * keep).transpose(1, 2), do_i)
            ds = (dp if keep is None else dp.mul_(keep)).sub_(_rows_of(rows_of.d, rows)).mul_(p)
            if dbias is not None:
                piece = bias_piece(dbias, group, rows, keys)
                piece.add_(ds.unflatten(1, (group, -1)).sum_to_size(piece.shape))
            if slope is not None:
                ds.mul_(slope)
            dq_i = torch.bmm(ds, k_j).unflatten(1, (group, -1))
            dq[:, :, rows.start : rows.stop].add_(dq_i)
            dk_j.baddbmm_(ds.transpose(1, 2), q_i)
    slope_of_all = heads.scores.constant_slope
    return dq.mul_(heads.scores.query_scale * slope_of_all), dk.mul_(slope_of_all), dv
