"""Random problems, all options jointly: plan -> run -> oracle, gradients for a share of them.

`TESSERA_EXAMPLES` is how many (2000 by default; `make fuzz` asks for more). In CI the examples are the same each time.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessera import calls, dispatch, verify
from tessera.backends import cpu
from tessera.backends.cpu import portable
from tessera.backends.cpu.tiled import Tiles
from tessera.device import Device
from tessera.mask import Mask
from tessera.operands import DTYPES, Request, bind

EXAMPLES = int(os.environ.get("TESSERA_EXAMPLES", "2000"))
SHARDS = 4  # test functions, so that pytest-xdist's workers share the examples
CPU = Device.of(torch.device("cpu"))


LENGTHS = st.integers(0, 70) | st.sampled_from([0, 1, 2, 16, 17, 32, 33, 64, 65])
SIDES = st.none() | st.integers(0, 75)
# small tiles make the loops over tiles of problems this small: rows x keys, and scores at a time
TILES = st.sampled_from([Tiles(256, 512, 1 << 17), Tiles(16, 32, 1 << 11), Tiles(7, 13, 200)])
TRIED: Counter[str] = Counter()


def mostly_none(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | st.none() | values


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """N(0, 1) of that shape, laid in memory in one of the ways that inputs come: the last stride is 1."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    layout = draw(st.sampled_from(["contiguous", "head major", "gapped", "offset", "shared heads"]))
    if layout == "head major":
        swapped = (*shape[:-3], shape[-2], shape[-3], shape[-1])
        return torch.randn(swapped, generator=generator).to(dtype).transpose(-3, -2)
    if layout == "gapped":
        wide = torch.full((*shape[:-1], shape[-1] + 5), float("nan"), dtype=dtype)
        wide[..., 2:-3] = torch.randn(shape, generator=generator)
        return wide[..., 2:-3]
    if layout == "offset":  # an odd address: nothing is aligned
        flat = torch.randn(torch.Size(shape).numel() + 1, generator=generator).to(dtype)
        return flat[1:].view(shape)
    if layout == "shared heads":
        return torch.randn((*shape[:-2], 1, shape[-1]), generator=generator).to(dtype).expand(shape)
    return torch.randn(shape, generator=generator).to(dtype)


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def masks(draw: st.DrawFn, batch: int, seqlen_q: int, seqlen_k: int) -> Mask:
    def bound(limit: int) -> Tensor | None:
        return draw(mostly_none(st.lists(st.integers(-2, limit + 3), min_size=batch, max_size=batch).map(int32)))

    mask = Mask.window(draw(SIDES), draw(SIDES)) if draw(st.booleans()) else Mask.full()
    mask = mask & (Mask.causal() if draw(st.booleans()) else Mask.full())
    mask = mask & Mask.padding(bound(seqlen_k), key_start=bound(seqlen_k), query_end=bound(seqlen_q))
    if draw(st.integers(0, 3)) == 0:
        rows = draw(st.sampled_from([1, batch])) if batch else 1

        def ids(length: int) -> Tensor:
            generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
            return torch.randint(0, draw(st.integers(1, 9)), (rows, length), generator=generator).sort(dim=-1).values

        mask = mask & Mask.documents(ids(seqlen_q), ids(seqlen_k))
    return mask


def plain_masks(batch: int, seqlen_k: int) -> st.SearchStrategy[Mask]:
    """Full, causal or padded, one at a time."""
    ends = st.lists(st.integers(-1, seqlen_k + 2), min_size=batch, max_size=batch).map(int32)
    return st.just(Mask.full()) | st.just(Mask.causal()) | ends.map(Mask.padding) | ends.map(lambda x: Mask.padding(key_start=x))


@st.composite
def scores(draw: st.DrawFn, dtype: torch.dtype, batch: int, heads: int) -> dict[str, object]:
    """The options of the score that dense and packed sequences share."""
    options: dict[str, object] = {
        "softmax_scale": draw(mostly_none(st.sampled_from([0.0, 0.05, 0.3, -0.2, 1.0]))),
        "softcap": draw(st.sampled_from([0.0, 0.0, 0.5, 5.0, 30.0])),
        "deterministic": draw(st.booleans()),
    }
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    if draw(st.integers(0, 3)) == 0:
        shape = draw(st.sampled_from([(heads,), (batch, heads)]))
        options["alibi_slopes"] = torch.rand(shape, generator=generator)
    if draw(st.integers(0, 3)) == 0:
        kind = draw(st.sampled_from([dtype, torch.float32])) if dtype != torch.float64 else dtype
        options["sinks"] = torch.randn(heads, generator=generator).to(kind)
    if draw(st.integers(0, 3)) == 0:
        options["dropout_p"] = draw(st.sampled_from([0.004, 0.1, 0.5, 0.95]))
        options["seed"] = draw(st.integers(0, 2**63 - 1))
    return options


@st.composite
def dense(draw: st.DrawFn) -> Request:
    dtype, batch, heads_kv, group = draw(st.sampled_from(DTYPES)), *(draw(st.integers(low, 3)) for low in (0, 1, 1))
    seqlen_q, seqlen_k = draw(LENGTHS), draw(LENGTHS)
    dim, dim_v = draw(DIMS)
    heads = heads_kv * group
    if draw(st.integers(0, 2)) == 0:  # what torch's own kernel serves
        mask, options, dim_v = draw(plain_masks(batch, seqlen_k)), {}, dim
    else:
        mask, options = draw(masks(batch, seqlen_q, seqlen_k)), draw(scores(dtype, batch, heads))
    if options and draw(st.integers(0, 3)) == 0:
        full = (batch, heads, seqlen_q, seqlen_k)
        shape = tuple(size if draw(st.booleans()) else 1 for size in full)[draw(st.integers(0, 3)) :]
        kind = torch.float64 if dtype == torch.float64 else draw(st.sampled_from([dtype, torch.float32]))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        options["bias"] = torch.randn(shape, generator=generator).to(kind)
    bounds = {name: getattr(mask, name) for name in mask.spec.bounds}
    return Request(
        draw(tensors((batch, seqlen_q, heads, dim), dtype)),
        draw(tensors((batch, seqlen_k, heads_kv, dim), dtype)),
        draw(tensors((batch, seqlen_k, heads_kv, dim_v), dtype)),
        left=mask.left, right=mask.right, **bounds, **options,
    )  # fmt: skip


DIMS = st.one_of(
    st.sampled_from([8, 16, 32, 64]).map(lambda d: (d, d)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)


@st.composite
def packed(draw: st.DrawFn) -> Request:
    dtype, heads_kv, group = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    pairs = draw(st.lists(st.tuples(LENGTHS, LENGTHS), max_size=4))
    dim, dim_v = draw(DIMS)
    lengths_q, lengths_k = [q for q, _ in pairs], [k for _, k in pairs]
    spare_q, spare_k = draw(st.integers(0, 3)), draw(st.integers(0, 3))  # tokens behind the last sequence

    def offsets(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    def used(lengths: list[int]) -> Tensor | None:
        return draw(mostly_none(st.tuples(*(st.integers(0, n) for n in lengths)).map(list).map(int32)))

    heads = heads_kv * group
    mask = Mask.causal() if draw(st.booleans()) else Mask.full()
    options: dict[str, object] = {}
    if draw(st.integers(0, 2)) == 0:  # what torch's own kernel serves
        dim_v = dim
    else:
        mask, options = mask & Mask.window(draw(SIDES), draw(SIDES)), draw(scores(dtype, len(pairs), heads))
    return Request(
        draw(tensors((sum(lengths_q) + spare_q, heads, dim), dtype)),
        draw(tensors((sum(lengths_k) + spare_k, heads_kv, dim), dtype)),
        draw(tensors((sum(lengths_k) + spare_k, heads_kv, dim_v), dtype)),
        cu_seqlens_q=offsets(lengths_q), cu_seqlens_k=offsets(lengths_k), seqused_q=used(lengths_q), seqused_k=used(lengths_k),
        left=mask.left, right=mask.right, **options,
    )  # fmt: skip


def with_gradients(request: Request) -> Request:
    for name in ("q", "k", "v", "bias", "sinks"):
        value = getattr(request, name)
        if value is not None:
            value.requires_grad_()
    return request._replace(
        requires_grad=True, bias_requires_grad=request.bias is not None, sinks_requires_grad=request.sinks is not None
    )


def check(request: Request, backend: str, tiles: Tiles, gradients: bool) -> None:
    request = request._replace(backend=backend)
    if gradients:
        request = with_gradients(request)
    problem, _ = bind(request)
    plan = dispatch.select(problem, CPU, backend)
    kind = str(problem.dtype).removeprefix("torch.")
    TRIED.update((f"{plan.backend}/{plan.forward.kernel}", problem.layout.value, kind, *(["gradients"] if gradients else [])))
    calls._known.clear()  # what was prepared holds its tiles
    with patch.object(cpu, "tiles_for", lambda _: tiles), patch.object(portable, "tiles_for", lambda _: tiles):
        comparisons = verify.run(request)
    failed = [str(comparison) for comparison in comparisons if not comparison.ok]
    assert not failed, f"{problem}: " + "; ".join(failed)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_problems(shard: int, record_property: Callable[[str, object], None]) -> None:
    # the shard enters the function's name, and with it the seed that a derandomised run draws from
    def problems(request: Request, backend: str, tiles: Tiles, gradients: bool) -> None:
        check(request, backend, tiles, gradients)

    problems.__name__ = f"problems_{shard}"
    drawn = given(dense() | packed(), st.sampled_from(["cpu", "cpu", "torch"]), TILES, st.booleans())(problems)
    TRIED.clear()
    settings(max_examples=-(-EXAMPLES // SHARDS))(drawn)()
    assert TRIED["dense"] + TRIED["varlen"] >= EXAMPLES // SHARDS
    record_property("random problems", dict(TRIED))  # the sum is printed at the end of the run: tests/conftest.py
