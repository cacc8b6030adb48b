"""Operations of Gluon on tensors that the stand-in (gluon_in_python.py) needs beyond torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def mma_v2(a: Tensor, b: Tensor, sums: Tensor) -> Tensor:
    """16-bit operands, products summed in float32."""
    assert a.dtype == b.dtype
    assert sums.dtype == torch.float32
    return sums + a.float() @ b.float()


def associative_scan(x: Tensor, axis: int, combine: Callable[[Any, Any], Any]) -> Tensor:
    assert combine(2, 3) == 5
    return x.cumsum(axis)


def unpack_e4m3(words: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The low and the high byte of 16-bit words, as numbers."""
    assert words.dtype == torch.int16
    pairs = words.contiguous().view(torch.float8_e4m3fn).unflatten(-1, (-1, 2)).to(dtype)
    return pairs[..., 0], pairs[..., 1]


def div_rn(a: Tensor, b: Tensor) -> Tensor:
    assert a.dtype == b.dtype == torch.float32
    return a / b
