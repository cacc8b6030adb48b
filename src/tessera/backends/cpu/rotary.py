"""Rotary position embedding (RoFormer, arXiv 2104.09864): pairs of columns turn by an angle that grows with the position."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.serving.operands import CacheOperands
from tessera.serving.problem import Rotary, RotaryStyle


def rotate(x: Tensor, first: int, operands: CacheOperands, rotary: Rotary) -> Tensor:
    """x (rows, heads, dim), row i at position first + i, its first `rotary.dim` columns turned; in float32, then x's dtype.

    A pair (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    cos, sin = operands.rotary_cos, operands.rotary_sin
    if cos is None or sin is None:
        raise ValueError("a rotary problem carries rotary_cos and rotary_sin")
    cos, sin = (table[first : first + len(x), None].float() for table in (cos, sin))  # (rows, 1, dim / 2)
    turned, rest = x[..., : rotary.dim].float(), x[..., rotary.dim :]
    if rotary.style is RotaryStyle.INTERLEAVED:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)
