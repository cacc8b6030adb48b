"""Attention over a KV cache on the GPU, against the oracle: every named case on every backend that can run it there, and the
random server of tests/serving_simulation.py (TESSERA_SERVER_STEPS steps in all, 10,000 by default)."""

from __future__ import annotations

import os

import pytest
import torch
from serving_simulation import Server, Setting
from torch import Tensor

import tessera
from tessera.device import Device
from tessera.serving import dispatch, operators, verify
from tessera.serving.cases import CACHE_CASES, CacheCase
from tessera.serving.grid import kvcache_grid
from tessera.serving.operands import CacheRequest, describe
from tessera.verify import compare

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

GPU = Device.of(torch.device("cuda", 0))
SIZES = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 64, "heads_q": 8}
SERVERS = {
    "pages of 16": Setting(page_size=16, capacity=96, pages=40, **SIZES),
    "pages of 1, window": Setting(page_size=1, capacity=32, pages=120, window=9, **SIZES),
    "pages of 64, splits": Setting(page_size=64, capacity=192, pages=20, options={"num_splits": 3}, **SIZES),
    "contiguous": Setting(page_size=64, capacity=64, pages=9, **SIZES),
    "batch-invariant": Setting(page_size=16, capacity=96, pages=40, options={"batch_invariant": True}, **SIZES),
}
STEPS = int(os.environ.get("TESSERA_SERVER_STEPS", "10000")) // len(SERVERS)


REFUSED = {("fp8, latent", "hopper")}
"""What a Hopper GPU has no kernel for; all else it must take."""
IS_HOPPER = GPU.capability == (9, 0)
IN_HALF = ("one query", "64 queries", "latent", "pages of 16", "append to pages", "rotary, halves", "fp8, scales of blocks")
"""Cases that run in float16 too: the kernels know of the dtype in their products and in what they read and write."""
RUNS = [
    *((name, backend, torch.bfloat16) for name in CACHE_CASES for backend in dispatch.BACKENDS if backend != "cpu"),
    *((name, "hopper", torch.float16) for name in IN_HALF),
]


@pytest.mark.parametrize(("name", "backend", "dtype"), RUNS, ids=str)
def test_case(name: str, backend: str, dtype: torch.dtype) -> None:
    request = CACHE_CASES[name].request("cuda", dtype)._replace(backend=backend)
    reasons = dispatch.load(backend).why_not(describe(request), GPU)
    assert not reasons or (name, backend) in REFUSED or not IS_HOPPER, reasons
    if reasons:
        pytest.skip("; ".join(map(str, reasons)))
    failed = [str(c) for c in verify.run(request) if not c.ok]
    assert not failed, "; ".join(failed)


@pytest.mark.parametrize("case", kvcache_grid(), ids=lambda case: case.name)
def test_grid(case: CacheCase) -> None:
    """FlashAttention-3's own grid, every pair of its values, on the backend that dispatch picks."""
    failed = [str(c) for c in verify.run(case.request("cuda", torch.bfloat16)) if not c.ok]
    assert not failed, "; ".join(failed)


@pytest.mark.parametrize("setting", SERVERS.values(), ids=SERVERS)
def test_server(setting: Setting) -> None:
    counts = Server(setting, seed=setting.pages).run(STEPS)
    assert counts["comparisons"] > STEPS, counts
    print(dict(counts))


GRAPHED = {
    "pages": CacheCase("", cached=(3, 15, 40), page_size=16, capacity=128, new=1, rotary_dim=64, heads_q=8),
    "contiguous": CacheCase("", cached=(3, 15, 40), capacity=128, new=1, heads_q=8, window=(30, 0), sinks=True),
    "drafts": CacheCase("", cached=(3, 15, 40), page_size=16, capacity=160, new=4, seqlen_q=4, heads_q=8, num_splits=3),
    "latent": CacheCase("", cached=(3, 15), page_size=64, capacity=128, latent=True, head_dim=576, head_dim_v=512, heads_q=16,
                        heads_kv=1, new=1),
}  # fmt: skip


@pytest.mark.parametrize("case", GRAPHED.values(), ids=GRAPHED)
def test_a_captured_graph_serves_while_sequences_grow(case: CacheCase) -> None:
    """One capture; then each replay appends behind what the one before left, from page to page, against the oracle."""
    request = _graphable(case)
    backend = dispatch.select(describe(request), GPU).backend
    assert backend != "torch" or not IS_HOPPER
    if backend == "torch":
        pytest.skip("no backend that can be captured takes this")
    before = [x.clone() for x in (request.k_cache, request.v_cache) if x is not None]
    operators.forward(request)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = operators.forward(request)
    for cache, kept in zip((x for x in (request.k_cache, request.v_cache) if x is not None), before, strict=True):
        cache.copy_(kept)
    for _ in range(25):
        for x in (request.q, request.k, request.v):
            if x is not None:
                x.normal_()
        graph.replay()
        after = verify.on_host(request)
        refs, eagers = (verify.attention(after, dtype) for dtype in (torch.float64, request.q.dtype))
        for row in zip(("out", "lse"), (out.cpu(), lse.cpu()), refs, eagers, strict=True):
            assert compare(*row).ok, (request.cache_seqlens.tolist(), str(compare(*row)))
        request.cache_seqlens.add_(case.new)


def _graphable(case: CacheCase) -> CacheRequest:
    """The case with every page and position that it will grow into."""
    request = case.request("cuda", torch.bfloat16)
    if request.page_table is not None:
        used = torch.randperm(request.k_cache.shape[0], device="cuda")[: request.page_table.numel()]
        request = request._replace(page_table=used.int().view(request.page_table.shape))
        request.k_cache.nan_to_num_()  # the rows that were cached stand in other pages now: any finite ones will do
        if request.v_cache is not None:
            request.v_cache.nan_to_num_()
    if request.rotary_cos is not None:
        angles = torch.arange(case.capacity, device="cuda")[:, None] / 10000 ** torch.linspace(0, 1, 32, device="cuda")
        request = request._replace(rotary_cos=angles.cos().bfloat16(), rotary_sin=angles.sin().bfloat16())
    return request


LENGTHS = (9000, 37, 1, 4096, 0, 2500)
INVARIANT = {
    f"{page or 'no'} pages, {rows} rows": CacheCase("", LENGTHS, rows, heads_q=8, page_size=page, batch_invariant=True)
    for page in (None, 16, 64)
    for rows in (1, 64)
}


@pytest.mark.parametrize("case", INVARIANT.values(), ids=INVARIANT)
def test_batch_invariant(case: CacheCase) -> None:
    """A sequence's bits are the same alone, in its batch, and in a batch of many."""
    request = case.request("cuda", torch.bfloat16)
    backend = dispatch.select(describe(request), GPU).backend
    assert backend != "torch" or not IS_HOPPER
    if backend == "torch":
        pytest.skip("on a GPU torch's own products choose their kernels by shape")
    names = ("q", "cache_seqlens") + (("page_table",) if case.page_size else ("k_cache", "v_cache"))

    def of(entries: list[int]) -> tuple[Tensor, Tensor]:
        own = {name: getattr(request, name)[entries].contiguous() for name in names}
        return operators.forward(request._replace(**own))

    out, lse = of(list(range(6)))
    for entries in ([0], [1], [3], [5, 4, 3, 2, 1, 0], [3] * 40 + [0], [1] * 130 + [3]):
        own_out, own_lse = of(entries)
        assert torch.equal(own_out, out[entries]), entries
        assert torch.equal(own_lse, lse[entries]), entries


def test_cascade() -> None:
    request = CacheCase("", cached=(200, 150, 129), page_size=64, new=1, heads_q=8, sinks=True).request("cuda", torch.bfloat16)
    request.page_table[:, :2] = request.page_table[:1, :2].clone()
    options = {"k": request.k, "v": request.v, "cache_seqlens": request.cache_seqlens, "page_table": request.page_table}
    first = (request.q, request.k_cache, request.v_cache)
    results = tessera.attention_cascade(*first, shared_pages=2, causal=True, sinks=request.sinks, return_lse=True, **options)
    after = verify.on_host(request)
    refs, eagers = (verify.attention(after, dtype) for dtype in (torch.float64, torch.bfloat16))
    for row in zip(("out", "lse"), (x.cpu() for x in results), refs, eagers, strict=True):
        assert compare(*row).ok, str(compare(*row))


def test_debug_finds_a_page_outside_of_the_pool() -> None:
    """Under `debug` it is an error; without, nothing past the pool is read and the other sequences' answers stand."""
    request = CacheCase("", cached=(100, 37), page_size=16, heads_q=8).request("cuda", torch.bfloat16)
    right, _ = operators.forward(request)
    request.page_table[0, 2] = 1 << 20
    with tessera.debug(), pytest.raises(ValueError, match="page_table=1048576: sequence 0"):
        operators.forward(request)
    if dispatch.select(describe(request), GPU).backend == "torch":
        pytest.skip("torch operations check their indices themselves, by ending the process")
    wrong, _ = operators.forward(request)
    assert torch.equal(wrong[1], right[1])


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_compiled_by_inductor(paged: bool) -> None:
    case = CacheCase("", cached=(20, 5), new=2, seqlen_q=2, heads_q=8, page_size=16 if paged else None, capacity=64)

    def step(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        return tessera.attention_with_kvcache(
            2 * q, k_cache, v_cache, cache_seqlens=lengths, k=k + 1, v=v * 0.5, page_table=table, causal=True
        )

    requests = [case.request("cuda", torch.bfloat16) for _ in range(2)]
    outs = [function(r.q, r.k_cache, r.v_cache, r.cache_seqlens, r.k, r.v, r.page_table)
            for function, r in zip((step, torch.compile(step, fullgraph=True)), requests, strict=True)]  # fmt: skip
    torch.testing.assert_close(*outs)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(*(getattr(r, name) for r in requests), equal_nan=True, rtol=0, atol=0)
