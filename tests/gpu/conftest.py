"""Compiles what the collected cases will run before the first of them, one process a core: one by one it is most of the time.

With pytest-xdist, collect once before (`pytest tests/gpu --collect-only -q`): workers find the kernels on disk.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import pytest
import torch
from serving_simulation import Setting

from tessera import dispatch, jit
from tessera.cases import Case
from tessera.device import Device
from tessera.errors import Unsupported
from tessera.operands import describe
from tessera.serving import dispatch as serving
from tessera.serving.cases import CACHE_CASES, CacheCase
from tessera.serving.operands import describe as describe_cache

FEW = 20
"""Kernels that are not worth a pool of processes."""
DTYPES = (torch.bfloat16, torch.float16)


def pytest_collection_finish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput") or not torch.cuda.is_available():
        return
    specs = dict.fromkeys(spec for value, dtype in _parameters(session) for spec in _kernels(value, dtype))
    if len(specs) > FEW:
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            print(f"compiled {sum(pool.map(_compile, specs))} of {len(specs)} kernels")


def _compile(spec: jit.KernelSpec) -> int:
    return jit.warmup([spec])


def _parameters(session: pytest.Session) -> dict[tuple[Case | CacheCase, torch.dtype], None]:
    """The cases that the collected tests are parametrised by, by name, in itself or as the setting of a random server."""
    tests = (item for item in session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec"))
    found: dict[tuple[Case | CacheCase, torch.dtype], None] = {}
    for parameters in (test.callspec.params for test in tests):
        dtype = parameters.get("dtype", torch.bfloat16)
        for value in parameters.values():
            found |= dict.fromkeys(_of_parameter(value, dtype))
    return found


def _of_parameter(value: object, dtype: torch.dtype) -> Iterator[tuple[Case | CacheCase, torch.dtype]]:
    if isinstance(value, Case):
        yield from product((value,), DTYPES)
    elif isinstance(value, str) and value in CACHE_CASES:
        yield CACHE_CASES[value], dtype
    elif isinstance(value, CacheCase):
        yield value, dtype
    elif isinstance(value, Setting):
        yield from product(value.cases(), (dtype,))


def _kernels(value: Case | CacheCase, dtype: torch.dtype) -> Iterator[jit.KernelSpec]:
    """What the case runs, with gradients: the forward's kernels are among them."""
    device = Device.of(torch.device("cuda", 0))
    try:
        if isinstance(value, Case):
            request = value.request("meta", dtype, requires_grad=True)
            yield from dispatch.load("hopper").kernels(dispatch.select(describe(request, "cuda"), device, "hopper"))
        else:
            plan = serving.select(describe_cache(value.request("meta", dtype), "cuda"), device)
            yield from serving.load(plan.backend).kernels(plan)
    except Unsupported:
        return
