"""Attention over a part of the keys, and the merge of two parts: split-KV, sinks, rings and cascades all use this one.

A partial result is (out, lse): `out` normalised by its own softmax, `lse` the natural log of its denominator. With weights
w = exp(lse - logaddexp(lse_a, lse_b)) the whole is w_a out_a + w_b out_b (Flash-Decoding; Ring Attention, eq. 4). The
merge is associative and commutative, and an empty part (out 0, lse -inf) is its neutral element.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.errors import bad_type, bad_value


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    out_a, out_b: (batch, seqlen, heads, head_dim_v) or (total, heads, head_dim_v); lse_a, lse_b: float32 (float64 for
    float64), (batch, heads, seqlen) or (heads, total), as `attention(..., return_lse=True)` gives them. Returns (out, lse) in
    the same layout; out in out_a's dtype, the sums in lse's. Differentiable in all four.

    Raises TypeError and ValueError where they are no such parts, or don't fit.
    """
    for name, part in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        if not isinstance(part, Tensor):
            raise bad_type(name, type(part).__name__, "a part is two tensors", "give what attention(return_lse=True) returns")
        if not part.is_floating_point():
            raise bad_type(name, part.dtype, "parts are rounded numbers", "give what attention(return_lse=True) returns")
        if part.device != out_a.device:
            raise bad_value(name, f"on {part.device}", f"out_a is on {out_a.device}", f"use {name}.to(out_a.device)")
    if out_a.dim() < 3 or lse_a.dim() != out_a.dim() - 1:
        why = f"out_a has {out_a.dim()} dimensions"
        raise bad_value("lse_a", f"shape {tuple(lse_a.shape)}", why, "give (..., seqlen, heads, dim) and (..., heads, seqlen)")
    for name, value, like in (("out_b", out_b, out_a), ("lse_b", lse_b, lse_a)):
        if value.shape != like.shape:
            raise bad_value(name, tuple(value.shape), f"the parts differ in shape, {tuple(like.shape)}", "merge equals")
    rows = out_a.shape[:-1]
    if lse_a.transpose(-1, -2).shape != rows:
        expected = (*rows[:-2], rows[-1], rows[-2])
        raise bad_value("lse_a", tuple(lse_a.shape), f"out_a has rows {tuple(rows)}", f"lse of shape {tuple(expected)}")
    weight_a, weight_b, lse = merge_weights(lse_a, lse_b)
    out = _over_rows(weight_a) * out_a + _over_rows(weight_b) * out_b
    return out.to(out_a.dtype), lse


def merge_weights(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weight of a, weight of b, merged lse); both weights are 0 where both parts are empty."""
    top = torch.maximum(lse_a, lse_b).detach()
    top = torch.where(top == float("-inf"), torch.zeros_like(top), top)
    a, b = (lse_a - top).exp(), (lse_b - top).exp()
    total = a + b
    empty = total == 0
    divisor = torch.where(empty, torch.ones_like(total), total)
    lse = torch.where(empty, torch.full_like(total, float("-inf")), divisor.log() + top)
    return a / divisor, b / divisor, lse


def _over_rows(weight: Tensor) -> Tensor:
    """(..., heads, seqlen) -> (..., seqlen, heads, 1)"""
    return weight.transpose(-1, -2).unsqueeze(-1)
