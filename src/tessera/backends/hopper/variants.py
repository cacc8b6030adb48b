"""Every forward kernel that plans choose for the named problems and the paper's grid: what the compile gate compiles."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

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
            *((f"pairs of {config.pairing.value}",) if config.pairing else ()),
        )
        found.setdefault(spec.text, jit.Variant(" ".join(words), spec))
    return tuple(found.values())


def _problems() -> Iterator[Problem]:
    """In bfloat16 all the named problems; float16, the same instructions but for their type, causal at one length, and full where
    that has another form."""
    grid = [(torch.bfloat16, *cell) for cell in itertools.product(HEAD_DIMS, SIZES)]
    for dtype, dim, (batch, seqlen) in (*grid, *((torch.float16, dim, SIZES[-1]) for dim in (64, 128, 256))):
        q = torch.empty(batch, seqlen, 2048 // dim, dim, dtype=dtype, device="meta")
        if dtype is torch.bfloat16 or dim < 256:
            yield describe(Request(q, q, q))
        yield describe(Request(q, q, q, right=0))
    long = torch.empty(1, 16384, 8, 192, dtype=torch.bfloat16, device="meta")
    wide, narrow, grouped = long, long[..., :128], long[:, :, :4, :128]
    yield describe(Request(narrow, grouped, grouped, right=0))
    yield describe(Request(wide, wide, narrow))
    yield from (describe(Request(wide, wide, v, dropout_p=0.1, seed=1)) for v in (wide, narrow))
    windows = (
        (64, 4096, torch.bfloat16), (64, 4096, torch.float16), (64, 1024, torch.float16), (128, 128, torch.bfloat16),
        (128, 1024, torch.bfloat16), (128, 1024, torch.float16),
    )  # fmt: skip
    for dim, left, dtype in windows:
        q = torch.empty(1, 16384, 2048 // dim, dim, dtype=dtype, device="meta")
        yield describe(Request(q, q, q, left=left, right=0))
    for dim in (64, 128, 256):
        yield from _modified(torch.empty(4, 4096, 2048 // dim, dim, dtype=torch.bfloat16, device="meta"))
    for case in CASES.values():
        yield describe(case.request("cpu", torch.bfloat16))


def _modified(q: Tensor) -> Iterator[Problem]:
    """ALiBi, biases and dropout, alone and together (not all three at head_dim 256: that spills)."""
    batch, seqlen, heads, dim = q.shape
    plane = torch.empty(1, heads, seqlen, seqlen, dtype=q.dtype, device="meta")
    of_keys = torch.empty(batch, 1, 1, seqlen, dtype=q.dtype, device="meta")
    slopes = torch.empty(heads, dtype=torch.float32, device="meta")
    full, causal = Request(q, q, q), Request(q, q, q, right=0)
    yield describe(full._replace(dropout_p=0.1, seed=1))
    yield describe(causal._replace(dropout_p=0.1, seed=1))
    yield describe(causal._replace(alibi_slopes=slopes))
    yield describe(full._replace(bias=plane))
    yield describe(causal._replace(bias=plane))
    yield describe(full._replace(bias=of_keys))
    yield describe(full._replace(bias=of_keys, dropout_p=0.1, seed=1))
    if dim < 256:
        yield describe(causal._replace(bias=plane, alibi_slopes=slopes, dropout_p=0.1, seed=1))
