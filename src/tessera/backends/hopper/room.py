"""Memory for what kernels write, by the shortest way to PyTorch's allocator."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

_empty_strided: Any = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
"""What torch.compile's code allocates by, on the current device: half of empty_like's time on the host. It asks no mode and no
transform, so it is for those alone who know that nobody watches. No public name: where it is gone torch.empty does the same."""
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """What makes contiguous tensors of this form, their contents as memory has them."""
    plainly = partial(torch.empty, shape, dtype=dtype, device=device)
    if device.type != "cuda" or _empty_strided is None or _current_device is None:
        return plainly
    here = partial(_empty_strided, tuple(shape), dense_strides(shape), dtype)
    if torch.cuda.device_count() == 1:
        return here
    index = device.index
    return lambda: here() if _current_device() == index else plainly()


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """What makes such tensors of zeros."""
    return partial(torch.zeros, shape, dtype=dtype, device=device)


def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor of these sizes."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
