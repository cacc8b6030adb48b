"""THE oracle: dense attention in float64, every feature, no cleverness. Everything else is tested against this file.

    x = scale q k^T;  x = c tanh(x / c);  x = x + bias - slope |i + seqlen_k - seqlen_q - j|;  masked x = -inf
    p = softmax(x)  (with a sink: its exponential joins the denominator);  out = (p * keep / (1 - p_drop)) v

Plain torch operations, so autograd gives the gradients. Nothing here is shared with the backends but the Problem, the
Mask's elementwise predicate and the dropout draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.dropout import dropout_mask, keep_scale
from tessera.mask import Mask
from tessera.operands import Operands
from tessera.problem import Layout, Problem


def attention(problem: Problem, operands: Operands, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(out, lse) of a problem, all arithmetic in `dtype`; shapes as Problem.out_shape and Problem.lse_shape.

    `dtype` other than float64 makes the eager low-precision run that the tolerance rule measures against.
    """
    if problem.layout is Layout.DENSE:
        return _dense(problem, operands, dtype)
    return _varlen(problem, operands, dtype)


def _dense(problem: Problem, operands: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = problem.shape
    keep = operands.mask.allowed(shape.batch, shape.seqlen_q, shape.seqlen_k).to(operands.q.device)
    drawn = None
    if problem.score.dropout_p:
        drawn = dropout_mask(
            operands.seed, shape.batch, shape.heads_q, shape.seqlen_q, shape.seqlen_k, problem.score.dropout_p, operands.q.device
        )
    slopes = operands.alibi_slopes
    if slopes is not None:
        slopes = slopes.expand(shape.batch, shape.heads_q)
    out, lse = _softmax_attention(problem, operands, (operands.q, operands.k, operands.v), keep, slopes, drawn, dtype)
    return out.transpose(1, 2), lse


def _varlen(problem: Problem, operands: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each sequence by itself, put back at its place; rows of no sequence stay empty."""
    q, k, v, lengths = operands.q, operands.k, operands.v, operands.lengths
    outs = torch.zeros(problem.out_shape, dtype=dtype, device=q.device)
    lses = torch.full(problem.lse_shape, float("-inf"), dtype=dtype, device=q.device)
    if lengths.cu_seqlens_q is None or lengths.cu_seqlens_k is None:
        raise ValueError("a varlen problem carries cu_seqlens_q and cu_seqlens_k")
    starts_q, starts_k = lengths.cu_seqlens_q.tolist(), lengths.cu_seqlens_k.tolist()
    score = problem.score
    for b in range(problem.shape.batch):
        used_q = starts_q[b + 1] - starts_q[b] if lengths.seqused_q is None else int(lengths.seqused_q[b])
        used_k = starts_k[b + 1] - starts_k[b] if lengths.seqused_k is None else int(lengths.seqused_k[b])
        rows = slice(starts_q[b], starts_q[b] + used_q)
        keys = slice(starts_k[b], starts_k[b] + used_k)
        keep = Mask(problem.mask.left, problem.mask.right).allowed(1, used_q, used_k).to(q.device)
        drawn = None
        if score.dropout_p:
            drawn = dropout_mask(operands.seed, b + 1, problem.shape.heads_q, used_q, used_k, score.dropout_p, q.device)[b:]
        slopes = operands.alibi_slopes
        if slopes is not None:
            slopes = slopes[b : b + 1] if slopes.dim() == 2 else slopes[None]
        qkv = (q[None, rows], k[None, keys], v[None, keys])
        out, lse = _softmax_attention(problem, operands, qkv, keep, slopes, drawn, dtype)
        outs = _put(outs, rows, out[0].transpose(0, 1))
        lses = _put(lses.transpose(0, 1), rows, lse[0].transpose(0, 1)).transpose(0, 1)
    return outs, lses


def _put(whole: Tensor, rows: slice, part: Tensor) -> Tensor:
    return torch.cat([whole[: rows.start], part, whole[rows.stop :]])


def _softmax_attention(
    problem: Problem,
    operands: Operands,
    qkv: tuple[Tensor, Tensor, Tensor],
    keep: Tensor,
    slopes: Tensor | None,
    drawn: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """out (batch, heads, seqlen_q, head_dim_v) and lse (batch, heads, seqlen_q); keep (batch, seqlen_q, seqlen_k)."""
    score = problem.score
    q, k, v = (t.to(dtype).transpose(1, 2) for t in qkv)  # (batch, heads, seqlen, head_dim)
    x = score.scale * _by_group(q, k.transpose(-1, -2))  # (batch, heads, seqlen_q, seqlen_k)
    if score.softcap:
        x = score.softcap * torch.tanh(x / score.softcap)
    if slopes is not None:
        i = torch.arange(q.shape[2], device=q.device)[:, None]
        j = torch.arange(k.shape[2], device=q.device)
        distance = (i + k.shape[2] - q.shape[2] - j).abs()
        x = x - slopes.to(dtype)[:, :, None, None] * distance
    if operands.bias is not None:
        x = x + operands.bias.to(dtype)
    x = x.masked_fill(~keep[:, None], float("-inf"))
    if operands.sinks is not None:
        x = torch.cat([x, operands.sinks.to(dtype)[None, :, None, None].expand(*x.shape[:-1], 1)], dim=-1)
    empty = (x == float("-inf")).all(dim=-1)  # also where seqlen_k is 0
    x = x.masked_fill(empty[..., None], 0.0)
    p = torch.softmax(x, dim=-1) if x.shape[-1] else x
    p = p.masked_fill(empty[..., None], 0.0)[..., : k.shape[2]]
    if drawn is not None:
        p = p * drawn * keep_scale(score.dropout_p)
    lse = torch.logsumexp(x, dim=-1).masked_fill(empty, float("-inf"))
    # a masked value row may hold NaN: 0 * NaN must not reach out
    seen = keep.any(dim=1)[:, None, :, None]
    return _by_group(p, v.masked_fill(~seen, 0.0)), lse


def _by_group(x: Tensor, shared: Tensor) -> Tensor:
    """x (batch, heads, rows, n) by the matrix (batch, heads_kv, n, m) that its head's group shares: (batch, heads, rows, m)."""
    batch, heads, rows, n = x.shape
    heads_kv, m = shared.shape[1], shared.shape[3]
    return (x.reshape(batch, heads_kv, heads // heads_kv * rows, n) @ shared).reshape(batch, heads, rows, m)
