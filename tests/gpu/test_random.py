"""Random problems on the GPU: kinds of problems, each of which decides what is compiled in, at random lengths, heads and bounds.

`TESSERA_EXAMPLES` is how many a kind (8 by default). The lengths are where tiles, blocks and grids end, and anywhere else.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import test_backward as backward
import test_hopper_forward as forward
import torch

from tessera.cases import Case
from tessera.operands import Request

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

EXAMPLES = int(os.environ.get("TESSERA_EXAMPLES", "8"))
PACKED = {"lengths_q": (300, 1, 0, 133), "lengths_k": (200, 30, 55, 133)}
DIMS = (64, 96, 128, 192, 256)
KINDS = (
    *(Case(f"d{d}", head_dim=d) for d in DIMS),
    *(Case(f"d{d} causal", head_dim=d, causal=True) for d in DIMS),
    *(Case(f"d{d} window", head_dim=d, window=(200, 30)) for d in (64, 96, 128, 256)),
    *(Case(f"d{d} causal window", head_dim=d, window=(200, 0)) for d in (64, 128)),
    *(Case(f"d{d} packed", head_dim=d, causal=True, **PACKED) for d in (64, 128, 256)),
    *(Case(f"d{d} v{v} causal", head_dim=d, head_dim_v=v, causal=True) for d, v in ((192, 128), (96, 64), (72, 72), (40, 256))),
    *(Case(f"d{d} documents", head_dim=d, documents=(50, 1, 77), causal=True) for d in (64, 128)),
    *(Case(f"d{d} padding", head_dim=d, key_start=(3, 0), key_end=(100, 128), query_end=(128, 99)) for d in (64, 128)),
    *(Case(f"d{d} softcap, sinks", head_dim=d, softcap=20.0, sinks=True, causal=True) for d in (64, 128)),
    *(Case(f"d{d} dropout", head_dim=d, dropout_p=0.2, causal=d == 128) for d in (64, 128, 256)),
    *(Case(f"d{d} alibi", head_dim=d, alibi="head", causal=True) for d in (64, 128)),
    *(Case(f"d{d} bias", head_dim=d, bias=(1, 1, 128, 128), causal=d == 64) for d in (64, 128, 256)),
    *(Case(f"d{d} bias, padding", head_dim=d, bias=(1, 1, 128, 128), key_start=(3, 0), key_end=(100, 128)) for d in (64, 128)),
)
IN_FLOAT16 = ("d96", "d128 causal", "d256", "d64 window", "d64 bias")
IN_ORDER = (
    "d64", "d64 causal", "d96 causal", "d128", "d128 causal", "d256", "d256 causal", "d64 causal window", "d128 window",
    "d64 packed", "d128 packed", "d192 v128 causal", "d128 documents", "d64 padding", "d128 dropout",
)  # fmt: skip


def length(chance: random.Random, most: int) -> int:
    """1 to `most`: small, anywhere, or at the end of a block."""
    if chance.random() < 0.3:
        return chance.randint(1, min(most, 70))
    if chance.random() < 0.5:
        return chance.randint(1, most)
    return min(most, max(1, chance.randrange(0, most + 64, chance.choice((64, 80, 128, 192))) + chance.choice((-1, 0, 0, 1))))


def _pieces(chance: random.Random, total: int, count: int) -> tuple[int, ...]:
    """`count` lengths that make `total`, some of them 0."""
    ends = sorted(chance.randint(0, total) for _ in range(count - 1))
    return tuple(end - begin for begin, end in zip((0, *ends), (*ends, total), strict=True))


def varied(case: Case, chance: random.Random) -> Case:
    """The same kind of problem with other sizes and bounds."""
    heads_kv, batch = chance.randint(1, 3), chance.randint(1, 4)
    rows, keys = length(chance, 1500), length(chance, 1500)
    if case.documents or chance.random() < 0.4:
        keys = rows
    made = {
        "batch": batch,
        "heads_kv": heads_kv,
        "heads_q": heads_kv * chance.choice((1, 1, 2, 3, 8)),
        "seqlen_q": rows,
        "seqlen_k": keys,
    }
    if case.is_varlen:
        count = chance.randint(1, 6)
        made |= {"batch": count, "lengths_q": _pieces(chance, rows, count), "lengths_k": _pieces(chance, keys, count)}
    if case.window is not None:
        made["window"] = tuple(side and chance.choice((0, 1, side, length(chance, keys))) for side in case.window)
    if case.documents:
        made["documents"] = _pieces(chance, rows, chance.randint(1, 7))
    if case.bias is not None:
        made["bias"] = (chance.choice((1, batch)), chance.choice((1, made["heads_q"])), rows, keys)
    for name, limit in (("key_start", keys), ("key_end", keys), ("query_end", rows)):
        if getattr(case, name):
            made[name] = tuple(chance.randint(-1, limit + 1) for _ in range(batch))
    return replace(case, **made)


def examples(case: Case, dtype: torch.dtype) -> Iterator[Request]:
    """Problems of this kind, each shown, for where it fails."""
    chance = random.Random(case.name)
    for _ in range(EXAMPLES):
        one = varied(case, chance)
        print(one)
        yield one.request("cuda", dtype, seed=chance.randrange(1 << 30), requires_grad=True)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *(pytest.param(case, torch.bfloat16, id=case.name) for case in KINDS),
        *(pytest.param(case, torch.float16, id=f"{case.name} fp16") for case in KINDS if case.name in IN_FLOAT16),
    ],
)
def test_random_problems(case: Case, dtype: torch.dtype) -> None:
    """Results and gradients, by the tolerance rule."""
    for request in examples(case, dtype):
        with torch.no_grad():
            forward.check(request)
        backward.check(request, *backward.upstream_of(request))


@pytest.mark.parametrize("case", [case for case in KINDS if case.name in IN_ORDER], ids=lambda case: case.name)
def test_random_deterministic_problems(case: Case) -> None:
    """Gradients in a fixed order: by the same rule, and the same bits each time."""
    assert len(IN_ORDER) == len({kind.name for kind in KINDS} & {*IN_ORDER})
    for request in examples(case, torch.bfloat16):
        ordered = request._replace(deterministic=True)
        backward.check(ordered, *backward.upstream_of(ordered))
        assert not backward._differing(ordered, 5).any()
