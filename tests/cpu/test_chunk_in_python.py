"""Many rows over a KV cache on Hopper: the kernels, run by Python (tests/gluon_in_python.py), against the oracle."""

from __future__ import annotations

import pytest
import torch
from gluon_in_python import in_python
from torch import Tensor

from tessera.backends.cpu.serving import GatheringRunner
from tessera.backends.hopper.chunk_config import LatentConfig, Turns
from tessera.backends.hopper.chunk_launch import ChunkLaunch
from tessera.backends.hopper.chunk_plan import chunk_plan, why_not
from tessera.serving import verify
from tessera.serving.cases import CACHE_CASES, CacheCase
from tessera.serving.operands import CacheRequest, describe, gather
from tessera.verify import compare

MULTIPROCESSORS = 4
LATENT = {"latent": True, "head_dim": 576, "head_dim_v": 512, "heads_kv": 1}
MORE = (
    CacheCase("chunk in splits", cached=(300, 1095, 10), seqlen_q=64, heads_q=8, head_dim=128, num_splits=3),
    CacheCase("chunk in splits of pages", cached=(500, 95), seqlen_q=40, heads_q=8, head_dim=128, num_splits=4, page_size=16),
    CacheCase("chunk in halves", cached=(300, 1095, 10, 0), seqlen_q=64, heads_q=8, head_dim=128, num_splits=2),
    CacheCase("chunk in halves, pages, window", cached=(500, 95), seqlen_q=40, heads_q=8, head_dim=96, num_splits=2, page_size=16,
              window=(150, 0)),
    CacheCase("packed chunks in halves, d256", lengths_q=(64, 1, 0, 100), cached=(300, 200, 33, 100), heads_q=8, head_dim=256,
              num_splits=2),
    CacheCase("pages of 24", cached=(200, 95), seqlen_q=40, heads_q=8, page_size=24),
    CacheCase("group of 128", cached=(300,), seqlen_q=2, heads_q=128, heads_kv=1, head_dim=128),
    CacheCase("group of 71", cached=(300, 90), seqlen_q=2, heads_q=71, heads_kv=1),
    CacheCase("group of 200", cached=(90,), seqlen_q=1, heads_q=200, heads_kv=1),
    CacheCase("packed chunks", lengths_q=(64, 1, 0, 100), cached=(300, 200, 33, 100), heads_q=8, sinks=True),
    CacheCase("packed chunks, pages, splits", lengths_q=(64, 1, 0, 100), cached=(300, 200, 33, 100), heads_q=8, sinks=True,
              page_size=64, num_splits=3),
    CacheCase("window in splits", cached=(700, 300), seqlen_q=64, window=(200, 0), num_splits=3),
    CacheCase("latent, 128 heads", cached=(200, 70), heads_q=128, **LATENT),
    CacheCase("latent, splits, sinks", cached=(330, 70, 3), heads_q=128, num_splits=3, page_size=64, sinks=True, **LATENT),
    CacheCase("latent, packed, window", cached=(200, 70, 9), heads_q=16, lengths_q=(5, 0, 9), window=(100, 0), **LATENT),
    CacheCase("chunk by two programs", cached=(4170, 70), seqlen_q=64, heads_q=8, head_dim=128, num_splits=1),
    CacheCase("latent by two programs", cached=(4170, 70), heads_q=128, num_splits=1, **LATENT),
    CacheCase("latent, pairs of tiles", cached=(4170,), heads_q=128, num_splits=1, page_size=64, **LATENT),
    CacheCase("latent, pairs of tiles, 2 queries, window, pages", cached=(4170,), heads_q=64, seqlen_q=2, num_splits=1,
              window=(900, 0), page_size=64, **LATENT),
    CacheCase("latent, softcap", cached=(150,), heads_q=24, seqlen_q=5, softcap=20.0, **LATENT),
)  # fmt: skip


def is_served(case: CacheCase) -> bool:
    """Whether the kernels have what the case asks for; rotary embedding happens before them."""
    return not (case.rotary_dim or why_not(describe(case.request("cpu", torch.bfloat16))))


def run(request: CacheRequest) -> tuple[Tensor, Tensor]:
    problem = describe(request)
    if problem.append is not None:
        GatheringRunner(problem).run(gather(request))  # it writes the new rows
    with torch.no_grad(), in_python():
        return ChunkLaunch(problem, chunk_plan(problem, MULTIPROCESSORS)).run(gather(request))


@pytest.mark.parametrize("case", [*filter(is_served, CACHE_CASES.values()), *MORE], ids=lambda case: case.name)
def test_cases(case: CacheCase) -> None:
    request = case.request("cpu", torch.bfloat16)
    results = run(request)
    refs, eagers = (verify.attention(request, dtype) for dtype in (torch.float64, torch.bfloat16))
    for compared in map(compare, ("out", "lse"), results, refs, eagers):
        assert compared.ok, str(compared)


def test_long_latent_caches_are_read_two_tiles_at_a_time() -> None:
    turns = {}
    for case in MORE:
        config = chunk_plan(describe(case.request("meta", torch.bfloat16)), MULTIPROCESSORS).config
        if isinstance(config, LatentConfig):
            turns[case.name] = config.turns
    assert {name for name, turn in turns.items() if turn is Turns.PAIRS} == {name for name in turns if "pairs" in name}


def test_long_caches_are_read_once_for_two_programs() -> None:
    configs = {case.name: chunk_plan(describe(case.request("meta", torch.bfloat16)), MULTIPROCESSORS).config for case in MORE}
    assert {name for name, config in configs.items() if config.pairing} == {name for name in configs if "two programs" in name}


@pytest.mark.parametrize("splits", [2, 5, 64])
def test_splits_agree(splits: int) -> None:
    request = CacheCase("chunk", cached=(900, 130), seqlen_q=40, heads_q=8, head_dim=128).request("cpu", torch.float16)
    out, lse = run(request._replace(num_splits=splits))
    whole, whole_lse = run(request._replace(num_splits=1))
    torch.testing.assert_close(out, whole, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("page_size", [None, 16])
def test_a_sequence_has_the_same_bits_in_any_batch(page_size: int | None) -> None:
    case = CacheCase("b", cached=(9000, 130, 40), seqlen_q=17, heads_q=2, heads_kv=1, page_size=page_size, batch_invariant=True)
    request = case.request("cpu", torch.bfloat16)
    out, lse = run(request)
    alone = request._replace(q=request.q[:1], cache_seqlens=request.cache_seqlens[:1])
    if page_size is None:
        alone = alone._replace(k_cache=request.k_cache[:1], v_cache=request.v_cache[:1])
    else:
        alone = alone._replace(page_table=request.page_table[:1])
    lone_out, lone_lse = run(alone)
    assert torch.equal(lone_out[0], out[0])
    assert torch.equal(lone_lse[0], lse[0])


@pytest.mark.parametrize("width", [72, 65], ids=["strides in 16 bytes", "strides in 2 bytes"])
def test_queries_that_tma_cannot_reach_are_copied(width: int) -> None:
    request = CacheCase("chunk", cached=(90, 30), seqlen_q=20).request("cpu", torch.bfloat16)
    q = request.q
    problem = describe(request)
    chunk = ChunkLaunch(problem, chunk_plan(problem, MULTIPROCESSORS))
    memory = torch.empty(*q.shape[:-1], width, dtype=q.dtype)
    with torch.no_grad(), in_python():
        expected = chunk.run(gather(request))[0]
        chunk.bound.clear()
        for first in (0, 1):  # an aligned address, then another
            view = memory[..., first : first + q.shape[-1]]
            view.copy_(q)
            assert torch.equal(chunk.run(gather(request)._replace(q=view))[0], expected)
            assert (chunk.bound[0].q_place is None) == (width == 65)


@pytest.mark.parametrize("splits", [1, 2])
def test_rows_of_no_sequence(splits: int) -> None:
    case = CacheCase("packed", lengths_q=(20, 3), cached=(90, 30), sinks=True, num_splits=splits)
    request = case.request("cpu", torch.bfloat16)
    q = torch.cat((request.q, torch.full_like(request.q, float("nan"))))
    out, lse = run(request._replace(q=q))
    rows = len(request.q)
    assert torch.equal(out[:rows], run(request)[0])
    assert (out[rows:] == 0).all()
    assert (lse[:, rows:] == float("-inf")).all()
