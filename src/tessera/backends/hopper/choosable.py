"""Forms of the forward and the backward that plans choose over a grid of problems and the gate does not list:

    python -m tessera.jit.gate --choosable --every 40 --share 7

The gate's lists (variants.py, backward_variants.py) hold what is kept fast. ptxas may get any form wrong (jit/descriptors.py),
and twice it did so in one that no list had; so all of these are judged, too many for each commit, a share at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from tessera import jit
from tessera.backends.hopper import BACKEND
from tessera.backends.hopper.backward_variants import variants as backward_variants
from tessera.backends.hopper.variants import variants as forward_variants
from tessera.cases import Case
from tessera.device import Device
from tessera.dispatch import select
from tessera.errors import Unsupported
from tessera.operands import describe

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
MAIN = ("attention_forward", "attention_backward")
"""The kernels of products, on wgmma by warps that trade registers. Those around them have no descriptors."""


def variants() -> tuple[jit.Variant, ...]:
    """Each form that the gate does not list once, forwards first, by the name of the first problem that may have it."""
    listed = {variant.spec for variant in (*forward_variants(), *backward_variants())}
    found: dict[jit.KernelSpec, jit.Variant] = {}
    for words, specs in (*_kernels(forward=True), *_kernels(forward=False)):
        for number, spec in enumerate(spec for spec in specs if spec.function in MAIN and spec not in listed):
            found.setdefault(spec, jit.Variant(f"{spec.function} {words}{f' {number}' if number else ''}", spec))
    return tuple(found.values())


def _kernels(forward: bool) -> Iterator[tuple[str, tuple[jit.KernelSpec, ...]]]:
    """A problem in words, and the kernels of its family; the backward in any order, and in a fixed one."""
    device = Device.named("h200")
    for dtype in (torch.bfloat16, torch.float16):
        for dim, dim_v in DIMS:
            for kind in KINDS:
                case = replace(kind, seqlen_q=ROWS, seqlen_k=ROWS, head_dim=dim, head_dim_v=dim_v)
                request = case.request("meta", dtype, requires_grad=not forward)
                words = f"{str(dtype).removeprefix('torch.')} d{dim}/{dim_v} {kind.name}"
                for bitwise in (False,) if forward else (False, True):
                    try:
                        plan = select(describe(request._replace(deterministic=bitwise), "cuda"), device, BACKEND.name)
                    except Unsupported:
                        continue
                    yield f"{words}, in order" if bitwise else words, BACKEND.kernels(plan)
