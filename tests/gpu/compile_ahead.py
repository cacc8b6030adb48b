"""Compiling on all cores what tests are going to run: kernel by kernel it is most of their time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

from tessera import dispatch, jit
from tessera.backends.hopper.serving import kernels_of
from tessera.device import Device
from tessera.errors import Unsupported
from tessera.jit import cache
from tessera.jit.toolchain import binary_key
from tessera.operands import Request, describe
from tessera.serving import dispatch as serving
from tessera.serving.operands import CacheRequest
from tessera.serving.operands import describe as describe_cache

FEW = 20
"""Kernels that are not worth a pool of processes."""


def kernels(request: Request | CacheRequest, device: Device) -> Iterator[jit.KernelSpec]:
    """What a request (of tensors on meta) runs on Hopper; with gradients the forward's kernels are among them."""
    try:
        if isinstance(request, Request):
            yield from dispatch.load("hopper").kernels(dispatch.select(describe(request, "cuda"), device, "hopper"))
        else:
            yield from kernels_of(serving.select(describe_cache(request, "cuda"), device, "hopper"))
    except Unsupported:
        return


def compile_all(wanted: Iterable[jit.KernelSpec]) -> None:
    """Leaves those on disk that are not there, if they are enough to be worth it."""
    specs = [spec for spec in dict.fromkeys(wanted) if cache.read(binary_key(spec)) is None]
    if len(specs) > FEW:
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            print(f"compiled {sum(pool.map(_compile, specs))} of {len(specs)} kernels")


def _compile(spec: jit.KernelSpec) -> int:
    return jit.warmup([spec])
