"""Decoding over long caches on the GPU, against float64 there: turns, crews and stretches of stream-K, parts in two steps, FP8;
that graphs of different streams, replayed side by side, keep out of each other's tickets; and that a step which begins while the
one before it ends reads nothing too soon."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tessera.backends.hopper.decode_config import DecodeFeature
from tessera.backends.hopper.decode_plan import decode_plan
from tessera.device import Device
from tessera.serving.operands import FP8, CacheRequest, describe
from tessera.serving.operators import forward
from tessera.verify import compare

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

CAPACITY, HEADS_Q, HEADS_KV, DIM = 8192, 16, 4, 128
LENGTHS = {
    "one": (8192,),
    "equal": (6000, 6000, 6000, 6000),
    "ragged": (8192, 1, 100, 4097, 0, 8000, 129, 2048),
    "many, short": tuple(1 + (37 * i) % 300 for i in range(150)),
    "many, equal": (200,) * 150,
}
POISON = float("nan")


def a_request(lengths: tuple[int, ...], page: int = 0, seqlen_q: int = 1, seed: int = 0) -> CacheRequest:
    """Rows past the sequences' ends, and pages that no sequence has, hold NaN."""
    generator = torch.Generator("cuda").manual_seed(seed)
    batch = len(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16)

    q, seqlens = normal(batch, seqlen_q, HEADS_Q, DIM), torch.tensor(lengths, dtype=torch.int32, device="cuda")
    k, v = normal(batch, CAPACITY, HEADS_KV, DIM), normal(batch, CAPACITY, HEADS_KV, DIM)
    past = torch.arange(CAPACITY, device="cuda") >= seqlens[:, None]
    k[past], v[past] = POISON, POISON
    if not page:
        return CacheRequest(q, k, v, seqlens, right=0)
    count = batch * CAPACITY // page
    places = torch.randperm(count + 5, generator=generator, device="cuda")[:count]
    pools = [torch.full((count + 5, page, HEADS_KV, DIM), POISON, dtype=q.dtype, device="cuda") for _ in range(2)]
    for pool, rows in zip(pools, (k, v), strict=True):
        pool[places] = rows.view(count, page, HEADS_KV, DIM)
    table = places.int().view(batch, -1)
    unused = torch.arange(CAPACITY // page, device="cuda") * page >= seqlens[:, None]
    return CacheRequest(q, *pools, seqlens, page_table=table.masked_fill(unused, 1 << 30), right=0)


def attended(request: CacheRequest, keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, lse) of q over each sequence's own rows of keys and values, (batch, capacity, heads_kv, dim), causal."""
    q = request.q.to(dtype)
    outs, lses = torch.zeros_like(q), torch.full((len(q), HEADS_Q, q.shape[1]), float("-inf"), dtype=dtype, device="cuda")
    for b, length in enumerate(request.cache_seqlens.tolist()):
        k, v = (x[b, :length].to(dtype).repeat_interleave(HEADS_Q // HEADS_KV, dim=1) for x in (keys, values))
        scores = torch.einsum("ihd,jhd->hij", q[b], k) * DIM**-0.5
        rows, columns = torch.arange(q.shape[1], device="cuda"), torch.arange(length, device="cuda")
        scores = scores.masked_fill(columns[None] > rows[:, None] + length - q.shape[1], float("-inf"))
        lses[b] = scores.logsumexp(-1)
        weights = (scores - lses[b][..., None]).exp().nan_to_num(0.0)
        outs[b] = torch.einsum("hij,jhd->ihd", weights, v)
    return outs, lses


def check(results: tuple[Tensor, Tensor], request: CacheRequest, keys: Tensor, values: Tensor) -> None:
    refs, eagers = (attended(request, keys, values, dtype) for dtype in (torch.float64, torch.bfloat16))
    for name, result, ref, eager in zip(("out", "lse"), results, refs, eagers, strict=True):
        compared = compare(name, result, ref, eager)
        assert compared.ok, str(compared)


@pytest.mark.parametrize("options", [{}, {"num_splits": 61}, {"batch_invariant": True}], ids=str)
@pytest.mark.parametrize(("page", "seqlen_q"), [(0, 1), (0, 3), (64, 1), (16, 2), (8, 1)])
@pytest.mark.parametrize("name", LENGTHS)
def test_long(name: str, page: int, seqlen_q: int, options: dict[str, object]) -> None:
    clean = a_request(LENGTHS[name], 0, seqlen_q)
    request = a_request(LENGTHS[name], page, seqlen_q)._replace(backend="hopper", **options)
    first = forward(request)
    check(first, request._replace(q=clean.q), clean.k_cache, clean.v_cache)
    again = forward(request)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "two runs differ"


@pytest.mark.parametrize("scales", ["none", "head", "block"])
@pytest.mark.parametrize("name", ["equal", "ragged"])
def test_fp8(name: str, scales: str) -> None:
    request = a_request(LENGTHS[name], 64)
    shape = {"none": None, "head": (HEADS_KV,), "block": (len(request.k_cache), 4, HEADS_KV)}[scales]
    caches, whole = [], []
    for number, cache in enumerate((request.k_cache, request.v_cache)):
        generator = torch.Generator("cuda").manual_seed(number)
        scale = torch.ones(1, device="cuda") if shape is None else torch.rand(shape, generator=generator, device="cuda") + 0.5
        of_rows = scale.repeat_interleave(16, dim=1) if scales == "block" else scale
        stored = (cache.float() / of_rows[..., None]).to(FP8)
        caches.append((stored, None if shape is None else scale))
        table = request.page_table.long().clamp(max=len(cache) - 1)
        whole.append((stored.double() * of_rows[..., None])[table].flatten(1, 2))
    (k_cache, k_descale), (v_cache, v_descale) = caches
    asked = request._replace(k_cache=k_cache, v_cache=v_cache, k_descale=k_descale, v_descale=v_descale, backend="hopper")
    assert describe(asked).cache.is_quantised
    check(forward(asked), asked, *whole)


def test_graphs_side_by_side() -> None:
    """Two graphs on two streams, each of many launches whose parts meet at tickets, replayed at once and again and again."""
    requests = [a_request(LENGTHS[name], seed=len(name))._replace(backend="hopper") for name in ("ragged", "equal")]
    expected = [forward(request) for request in requests]
    streams, graphs, results = [torch.cuda.Stream() for _ in requests], [], []
    for request, stream in zip(requests, streams, strict=True):
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            results.append([forward(request) for _ in range(20)])
        graphs.append(graph)
    for _ in range(5):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for found, right in zip(results, expected, strict=True):
        assert all(torch.equal(a, b) for each in found for a, b in zip(each, right, strict=True))


@pytest.mark.parametrize("page", [0, 64])
def test_steps_that_follow_one_another(page: int) -> None:
    """A step's queries are what the step before gave, and some write rows that the next one reads. The next kernel may begin, and
    bring keys into L2, with tiles of this one left; the bits are those of steps that wait for one another on the host."""

    def steps(pause: Callable[[], None]) -> list[Tensor]:
        request = a_request((8000,) * 32, page)._replace(backend="hopper")
        assert DecodeFeature.PARTING in decode_plan(describe(request), Device.named("h200")).config.features
        outs = []
        for step in range(12):
            outs.append(forward(request)[0])
            pause()
            if step % 3 == 2:
                request.k_cache[:, step] = outs[-1][0, 0, :HEADS_KV]
                request.v_cache[:, step] = outs[-1][1, 0, :HEADS_KV]
                pause()
            request = request._replace(q=16 * outs[-1])
        return outs

    apart = steps(torch.cuda.synchronize)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(steps(lambda: None), apart, strict=True))


@pytest.mark.parametrize("batch", [1, 32])
def test_lengths_that_the_step_before_writes(batch: int) -> None:
    """A step's lengths are bits of the log-sum-exps of the step before: positive ones exceed the capacity, others are negative.
    Their place held other ones before, and what a program has worked out by those does not count."""
    generator = torch.Generator("cuda").manual_seed(batch)
    request = a_request((CAPACITY,) * batch)._replace(backend="hopper")
    request.k_cache[:] = 0.5
    signs = torch.rand(40, *request.q.shape[:3], 1, generator=generator, device="cuda") < 0.6
    signs[::4] = True  # all sequences are as long as each other, as they were expected to be or not
    queries = torch.where(signs, 1.0, -4.0).to(request.q.dtype).expand(-1, *request.q.shape).contiguous()

    def steps(pause: Callable[[], None]) -> list[Tensor]:
        outs = []
        for q in queries:
            lse = forward(request._replace(q=q))[1]
            pause()
            outs.append(forward(request._replace(cache_seqlens=lse.view(torch.int32).flatten()[:batch]))[0])
            pause()
        return outs

    apart = steps(torch.cuda.synchronize)
    seen = signs[:, :, 0, :, 0].flatten(1)[:, :batch, None, None]  # whether a sequence has all keys, which are alike, or none
    means = request.v_cache.double().mean(1).repeat_interleave(HEADS_Q // HEADS_KV, dim=1)
    torch.testing.assert_close(torch.stack(apart)[:, :, 0].double(), seen * means, atol=1e-3, rtol=0)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(steps(lambda: None), apart, strict=True))
