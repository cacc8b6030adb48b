"""Every forward kernel that plans choose for the named problems and the paper's grid: what the compile gate compiles."""

from __future__ import annotations

import itertools
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
SIZES = ((32, 512), (4, 4096), (1, 16384))
"""(batch, seqlen) of the paper's grid, 16384 tokens and a hidden size of 2048: plans may change with the length."""


def variants() -> tuple[jit.Variant, ...]:
    """The variants, each once, by names such as "forward bf16 d128 128x128 right softcap"."""
    found: dict[str, jit.Variant] = {}
    for problem in _problems():
        if BACKEND.why_not(problem, Device.named("h200")):
            continue
        config = forward_config(problem)
        spec = kernel_spec(config, problem.dtype)
        dims = "/".join("+".join(map(str, parts)) for parts in dict.fromkeys((config.dims, config.dims_v)))
        words = (
            "forward",
            ELEMENTS[problem.dtype],
            f"d{dims}",
            f"{config.rows}x{config.keys}",
            *(feature.value for feature in config.features),
        )
        found.setdefault(spec.text, jit.Variant(" ".join(words), spec))
    return tuple(found.values())


def _problems() -> Iterator[Problem]:
    """In bfloat16 all the named problems; float16, the same instructions but for their type, full and causal."""
    for dtype in ELEMENTS:
        for dim, (batch, seqlen) in itertools.product(HEAD_DIMS, SIZES):
            q = torch.empty(batch, seqlen, 2048 // dim, dim, dtype=dtype, device="meta")
            yield describe(Request(q, q, q))
            yield describe(Request(q, q, q, right=0))
    for case in CASES.values():
        yield describe(case.request("cpu", torch.bfloat16))
