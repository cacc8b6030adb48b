"""Forms of the kernels of products that plans choose over a grid of problems and the gate does not list:

    python -m tessera.jit.gate --choosable --every 40 --share 7

The gate's lists (variants.py and those beside it) hold what is kept fast. ptxas may get any form wrong (jit/descriptors.py),
and twice it did so in one that no list had; so all of these are judged, too many for each commit, a share at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import torch

from tessera import jit
from tessera.backends.hopper import BACKEND
from tessera.backends.hopper.backward_variants import variants as backward_variants
from tessera.backends.hopper.chunk_variants import variants as chunk_variants
from tessera.backends.hopper.decode_variants import variants as decode_variants
from tessera.backends.hopper.serving import kernels_of
from tessera.backends.hopper.variants import variants as forward_variants
from tessera.cases import Case
from tessera.device import Device
from tessera.dispatch import select
from tessera.errors import Unsupported
from tessera.operands import describe
from tessera.serving import dispatch as serving
from tessera.serving.cases import CacheCase
from tessera.serving.operands import describe as describe_cache

H200 = Device.named("h200")
DTYPES = (torch.bfloat16, torch.float16)
DIMS = (
    *((dim, dim) for dim in (16, 32, 48, 64, 80, 96, 128, 144, 160, 192, 256)),
    (192, 128), (96, 64), (64, 96), (128, 64), (64, 128), (40, 256), (128, 40),
)  # fmt: skip
"""Of queries and keys, and of values: each way in which the forward splits one, and pairs that models have."""
ROWS = 128
"""A family of plans holds the forms of every length (plan.forward_family), so one length is enough."""
_PACKED = {"lengths_q": (ROWS, ROWS), "lengths_k": (ROWS, ROWS)}
KINDS = (
    Case("full"),
    Case("causal", causal=True),
    Case("causal, grouped", causal=True, heads_kv=2),
    Case("window", window=(200, 0)),
    Case("window both ways", window=(200, 30)),
    Case("long window", window=(4096, 0)),
    Case("right padding", key_end=(100, 128), query_end=(128, 99)),
    Case("left padding", key_start=(3, 0), causal=True),
    Case("documents", documents=(50, 1, 77), causal=True),
    Case("packed", **_PACKED),  # type: ignore[arg-type]
    Case("packed, causal", causal=True, **_PACKED),  # type: ignore[arg-type]
    Case("packed, window", window=(200, 0), **_PACKED),  # type: ignore[arg-type]
    Case("softcap", softcap=20.0, causal=True),
    Case("sinks", sinks=True, causal=True),
    Case("negative scale", softmax_scale=-0.3, causal=True),
    Case("alibi", alibi="head", causal=True),
    Case("bias", bias=(1, 4, ROWS, ROWS), constant_bias=True),
    Case("bias, learnt", bias=(1, 4, ROWS, ROWS)),
    Case("bias of keys", bias=(2, 1, 1, ROWS)),
    Case("dropout", dropout_p=0.1),
    Case("dropout, causal", dropout_p=0.1, causal=True),
    Case("bias of keys, dropout", bias=(2, 1, 1, ROWS), dropout_p=0.1),
    Case("bias, alibi, dropout", bias=(1, 4, ROWS, ROWS), alibi="head", dropout_p=0.1, causal=True),
)
CACHE_DIMS = (*((dim, dim) for dim in (16, 32, 48, 64, 80, 96, 128, 160, 192, 256)), (192, 128), (64, 256))
_MANY = {"cached": (300, 37, 0), "seqlen_q": 64, "heads_q": 8}
CACHE_KINDS = (
    CacheCase("64 rows", **_MANY),  # type: ignore[arg-type]
    CacheCase("64 rows, full", causal=False, **_MANY),  # type: ignore[arg-type]
    *(CacheCase(f"64 rows, pages of {size}", page_size=size, **_MANY) for size in (1, 8, 16, 64)),  # type: ignore[arg-type]
    CacheCase("64 rows, window", window=(200, 0), **_MANY),  # type: ignore[arg-type]
    CacheCase("64 rows, softcap, sinks", softcap=20.0, sinks=True, **_MANY),  # type: ignore[arg-type]
    CacheCase("64 rows, left padding", leftpad=(3, 1, 0), **_MANY),  # type: ignore[arg-type]
    CacheCase("packed rows", lengths_q=(60, 1, 30), page_size=64, cached=(300, 37, 0), heads_q=8),
    CacheCase("one row"),
    CacheCase("one row, pages of 16", page_size=16),
    CacheCase("one row, window, sinks", window=(200, 0), sinks=True, page_size=64),
    CacheCase("one row, fp8", scales="head"),
    CacheCase("one row, stream-k", schedule="stream_k"),
    CacheCase("one row, fp8 by blocks, stream-k", scales="block", page_size=64, schedule="stream_k"),
)
LATENT_KINDS = tuple(
    CacheCase(f"latent, {heads} heads, {rows} rows, pages of {size}", latent=True, head_dim=576, head_dim_v=512, heads_kv=1,
              heads_q=heads, seqlen_q=rows, page_size=size, cached=(5000, 300))
    for heads in (16, 128) for rows in (1, 4) for size in (None, 1, 64)
)  # fmt: skip
MAIN = ("attention_forward", "attention_backward", "attention_chunk", "decode", "attention_latent")
"""The kernels of products, by warps that trade registers; all but decode on wgmma. Those around them have no descriptors."""


def variants() -> tuple[jit.Variant, ...]:
    """Each form once that the gate does not list, forwards first, by the name of the first problem that may have it."""
    lists = (forward_variants, backward_variants, chunk_variants, decode_variants)
    listed = {variant.spec for variants_of in lists for variant in variants_of()}
    found: dict[jit.KernelSpec, jit.Variant] = {}
    for words, specs in (*_kernels(forward=True), *_kernels(forward=False), *_cache_kernels()):
        for number, spec in enumerate(spec for spec in specs if spec.function in MAIN and spec not in listed):
            name = f"{spec.function} {words}{f' {number}' if number else ''}"
            found.setdefault(spec, jit.Variant(name, spec, wgmma=spec.function != "decode"))
    return tuple(found.values())


def _kernels(forward: bool) -> Iterator[tuple[str, tuple[jit.KernelSpec, ...]]]:
    """A problem in words, and the kernels of its family; the backward in any order, and in a fixed one."""
    for dtype, (dim, dim_v), kind in itertools.product(DTYPES, DIMS, KINDS):
        case = replace(kind, seqlen_q=ROWS, seqlen_k=ROWS, head_dim=dim, head_dim_v=dim_v)
        request = case.request("meta", dtype, requires_grad=not forward)
        words = f"{str(dtype).removeprefix('torch.')} d{dim}/{dim_v} {kind.name}"
        for bitwise in (False,) if forward else (False, True):
            with suppress(Unsupported):
                plan = select(describe(request._replace(deterministic=bitwise), "cuda"), H200, BACKEND.name)
                yield f"{words}, in order" if bitwise else words, BACKEND.kernels(plan)


def _cache_kernels() -> Iterator[tuple[str, tuple[jit.KernelSpec, ...]]]:
    """The same of a step over a cache, with any number of sequences."""
    kinds = itertools.product(CACHE_DIMS, CACHE_KINDS)
    cases = [*(replace(kind, head_dim=dim, head_dim_v=dim_v) for (dim, dim_v), kind in kinds), *LATENT_KINDS]
    for dtype, case in itertools.product(DTYPES, cases):
        words = f"{str(dtype).removeprefix('torch.')} d{case.head_dim}/{case.head_dim_v} {case.name}"
        with suppress(Unsupported):
            plan = serving.select(describe_cache(case.request("meta", dtype), "cuda"), H200, BACKEND.name)
            yield words, kernels_of(plan)
