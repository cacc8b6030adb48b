"""Every forward kernel that plans choose for the named problems and the paper's head dims: what the compile gate compiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tessera import jit
from tessera.backends.hopper import BACKEND
from tessera.backends.hopper.launch import ELEMENTS, kernel_spec
from tessera.backends.hopper.plan import forward_config
from tessera.cases import CASES
from tessera.device import Device
from tessera.operands import Request, describe
from tessera.problem import Problem

HEAD_DIMS = (64, 96, 128, 192, 256)


def variants() -> tuple[jit.Variant, ...]:
    """The variants, each once, by names such as "forward bf16 d128 right softcap"."""
    found: dict[str, jit.Variant] = {}
    for problem in _problems():
        if BACKEND.why_not(problem, Device.named("h200")):
            continue
        config = forward_config(problem)
        spec = kernel_spec(config, problem.dtype)
        dims = "/".join("+".join(map(str, parts)) for parts in dict.fromkeys((config.dims, config.dims_v)))
        words = ("forward", ELEMENTS[problem.dtype], f"d{dims}", *(feature.value for feature in config.features))
        found.setdefault(spec.text, jit.Variant(" ".join(words), spec))
    return tuple(found.values())


def _problems() -> Iterator[Problem]:
    """In bfloat16 all the named problems; float16, the same instructions but for their type, full and causal."""
    for dtype in ELEMENTS:
        for dim in HEAD_DIMS:
            q = torch.empty(1, 1024, 2, dim, dtype=dtype, device="meta")
            yield describe(Request(q, q, q))
            yield describe(Request(q, q, q, right=0))
    for case in CASES.values():
        yield describe(case.request("cpu", torch.bfloat16))
