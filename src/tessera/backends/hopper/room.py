"""Memory for what kernels write, by the shortest way to PyTorch's allocator."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


def kept(make: Callable[[], Tensor], device: int) -> Tensor:
    """A tensor that outlives the call, made by a thread of its own, on this one's stream: while graphs of torch.compile warm up,
    what the calling thread allocates is theirs, and they refuse to find it in use afterwards."""
    stream = torch.cuda.current_stream(device)

    def made() -> Tensor:
        with torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(made).result()


def cleared(count: int, device: int) -> Tensor:
    """int32 zeros that outlive the call. Zeroed on a stream of their own: any stream may use them at once, and to wait for that
    one is to wait for nobody's work."""

    def make() -> Tensor:
        aside = torch.cuda.Stream(device)
        with torch.cuda.stream(aside):
            found = torch.zeros(count, dtype=torch.int32, device=torch.device("cuda", device))
        aside.synchronize()
        return found

    return kept(make, device)


def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor of these sizes."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
