"""Every decode kernel that plans choose for the named cases and for what the benchmark times: what the compile gate compiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tessera import jit
from tessera.backends.hopper.decode_launch import kernel_spec
from tessera.backends.hopper.decode_plan import decode_plan, why_not
from tessera.backends.hopper.launch import ELEMENTS
from tessera.device import Device
from tessera.serving.cases import CACHE_CASES, CacheCase
from tessera.serving.operands import describe
from tessera.serving.problem import CacheProblem

_TIMED = (
    CacheCase("long", cached=(300_000,), heads_q=32, heads_kv=8, head_dim=128),
    *(CacheCase(f"d{dim}", cached=(5, 7), heads_q=32, heads_kv=8, head_dim=dim) for dim in (64, 128, 192, 256)),
)
"""Shapes of the benchmark: their tensors are on meta."""


def variants() -> tuple[jit.Variant, ...]:
    """The variants, each once, by names such as "decode bf16 d64+64 128 keys stream_k paged"."""
    found: dict[str, jit.Variant] = {}
    for problem in _problems():
        if why_not(problem):
            continue
        config = decode_plan(problem, Device.named("h200")).config
        spec = kernel_spec(config, problem.dtype)
        dims = "/".join("+".join(map(str, parts)) for parts in dict.fromkeys((config.dims, config.dims_v)))
        features = (feature.value for feature in config.features)
        words = ("decode", ELEMENTS[problem.dtype], f"d{dims}", f"{config.keys} keys", f"boxes of {config.box}", *features)
        found.setdefault(spec.text, jit.Variant(" ".join(words), spec, wgmma=False))
    return tuple(found.values())


def _problems() -> Iterator[CacheProblem]:
    for case in _TIMED:
        yield describe(case.request("meta", torch.bfloat16))
    for case in CACHE_CASES.values():
        request = case.request("cpu", torch.bfloat16)
        yield describe(request)
        if request.num_splits is None and request.schedule is None:
            yield describe(request._replace(schedule="split"))
    yield describe(CACHE_CASES["one query"].request("cpu", torch.float16))
