"""Many rows over a KV cache on Hopper (chunk.py, latent.py): larger than the named cases, wrong page tables, graphs, splits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tessera.backends.hopper.chunk_launch import ChunkLaunch
from tessera.backends.hopper.chunk_plan import chunk_plan, why_not
from tessera.serving import verify
from tessera.serving.cases import CACHE_CASES, CacheCase
from tessera.serving.operands import CacheRequest, describe, gather
from tessera.verify import compare

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

MULTIPROCESSORS = torch.cuda.get_device_properties(0).multi_processor_count
GQA = {"heads_q": 32, "heads_kv": 8, "head_dim": 128}
LATENT = {"latent": True, "head_dim": 576, "head_dim_v": 512, "heads_kv": 1}
LARGE = (
    CacheCase("chunk", cached=(1000, 4095, 130), seqlen_q=64, **GQA),
    CacheCase("chunk in splits", cached=(1000, 4095, 130), seqlen_q=64, num_splits=7, **GQA),
    CacheCase("chunk in splits of pages", cached=(1000, 2095, 130), seqlen_q=64, num_splits=4, page_size=16, **GQA),
    CacheCase("chunk in halves", cached=(1000, 4095, 130, 1), seqlen_q=64, num_splits=2, **GQA),
    CacheCase("chunk in halves of pages, window", cached=(1000, 2095, 130), seqlen_q=64, num_splits=2, page_size=16,
              window=(300, 0), **GQA),
    CacheCase("chunk in halves, row by row", cached=(1000, 95), seqlen_q=100, heads_q=8, head_dim=96, num_splits=2, page_size=1),
    CacheCase("packed, halves, d256", lengths_q=(64, 1, 0, 200, 17), cached=(900, 1500, 33, 300, 4), heads_q=8, head_dim=256,
              num_splits=2),
    CacheCase("pages of 8", cached=(500, 1095), seqlen_q=40, heads_q=8, page_size=8),
    CacheCase("pages of 24", cached=(500, 1095), seqlen_q=40, heads_q=8, head_dim=128, page_size=24),
    CacheCase("d256 in splits", cached=(500, 1095), seqlen_q=40, heads_q=8, head_dim=256, page_size=64, num_splits=3),
    CacheCase("prompt of 700", cached=(300, 0), seqlen_q=700, heads_q=8, head_dim=128),
    CacheCase("group of 128", cached=(300, 1000), seqlen_q=3, heads_q=128, heads_kv=1, head_dim=128),
    CacheCase("group of 71", cached=(300, 1000), seqlen_q=3, heads_q=71, heads_kv=1),
    CacheCase("packed", lengths_q=(64, 1, 0, 200, 17), cached=(900, 1500, 33, 300, 4), sinks=True, **GQA),
    CacheCase("packed, pages, splits", lengths_q=(64, 1, 0, 200, 17), cached=(900, 1500, 33, 300, 4), sinks=True, page_size=64,
              num_splits=3, **GQA),
    CacheCase("window in splits", cached=(2000, 700), seqlen_q=64, window=(500, 0), num_splits=3, **GQA),
    CacheCase("latent, 128 heads", cached=(1030, 400), heads_q=128, **LATENT),
    CacheCase("latent, splits, 2 queries", cached=(1030, 400), heads_q=128, seqlen_q=2, num_splits=3, **LATENT),
    CacheCase("latent, pages, splits", cached=(1030, 400, 3), heads_q=128, page_size=64, num_splits=5, sinks=True, **LATENT),
    CacheCase("chunk by two programs", cached=(4170, 4096, 70), seqlen_q=64, num_splits=1, **GQA),
    CacheCase("chunk by two programs, pages, window", cached=(4170, 900), seqlen_q=50, num_splits=1, page_size=64,
              window=(500, 0), **GQA),
    CacheCase("latent by two programs", cached=(4170, 4096, 70), heads_q=128, num_splits=1, **LATENT),
    CacheCase("latent, pairs of tiles", cached=(4170, 4096, 70), heads_q=128, num_splits=1, page_size=64, **LATENT),
    CacheCase("latent, pairs of tiles, 2 queries, window, pages", cached=(5000, 1000), heads_q=64, seqlen_q=2, num_splits=1,
              window=(900, 0), page_size=64, **LATENT),
    CacheCase("latent, pairs of tiles, packed", lengths_q=(5, 0, 9), cached=(4200, 70, 9), heads_q=128, page_size=128,
              num_splits=1, sinks=True, softcap=20.0, **LATENT),
    CacheCase("latent, pages of 16, 5 queries", cached=(330, 400, 3), heads_q=16, page_size=16, seqlen_q=5, **LATENT),
)  # fmt: skip


def launch(request: CacheRequest) -> ChunkLaunch:
    problem = describe(request)
    return ChunkLaunch(problem, chunk_plan(problem, MULTIPROCESSORS))


def check(request: CacheRequest, results: tuple[Tensor, Tensor]) -> None:
    """On the GPU: in float64 128 heads over some thousand rows take a CPU seconds."""
    refs, eagers = (verify.attention(request, dtype) for dtype in (torch.float64, request.q.dtype))
    for compared in map(compare, ("out", "lse"), results, refs, eagers):
        assert compared.ok, str(compared)


def is_served(case: CacheCase) -> bool:
    return not (case.new or why_not(describe(case.request("cpu", torch.bfloat16))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*filter(is_served, CACHE_CASES.values()), *LARGE], ids=lambda case: case.name)
def test_cases(case: CacheCase, dtype: torch.dtype) -> None:
    request = case.request("cuda", dtype)
    chunk = launch(request)
    results = chunk.run(gather(request))
    check(request, results)
    for first, second in zip(results, chunk.run(gather(request)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("dims", [GQA, {"heads_q": 128, **LATENT}], ids=["gqa", "latent"])
def test_a_captured_graph_serves_sequences_as_they_grow(dims: dict[str, int], splits: int) -> None:
    case = CacheCase("growing", cached=(900, 700), seqlen_q=20, page_size=64, num_splits=splits, **dims)
    request = case.request("cuda", torch.bfloat16)
    full = request.cache_seqlens.clone()
    chunk, operands = launch(request), gather(request)
    chunk.run(operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = chunk.run(operands)
    for left in (0, 1, 63, 64, 500, 700):
        request.cache_seqlens.copy_(full - left)
        graph.replay()
        check(request, results)


def test_pages_out_of_range_are_not_read() -> None:
    request = CacheCase("wrong", cached=(500, 300), seqlen_q=64, page_size=16, **GQA).request("cuda", torch.bfloat16)
    table = request.page_table.clone()
    table[0] = torch.where(torch.arange(table.shape[1], device="cuda") % 2 == 0, -5, 1 << 30).int()
    out, _ = launch(request).run(gather(request._replace(page_table=table)))
    torch.cuda.synchronize()
    assert torch.equal(out[1], launch(request).run(gather(request))[0][1])


def test_splits_agree() -> None:
    request = CacheCase("chunk", cached=(4000, 130), seqlen_q=64, **GQA).request("cuda", torch.float16)
    whole, whole_lse = launch(request._replace(num_splits=1)).run(gather(request))
    for splits in (2, 3, 8, 64):
        out, lse = launch(request._replace(num_splits=splits)).run(gather(request))
        torch.testing.assert_close(out, whole, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=1e-5)
