"""Random calls over a KV cache, all options jointly, against the oracle; and what must not change a result."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera import attention_cascade, attention_with_kvcache
from tessera.serving import calls, operators, verify
from tessera.serving.cases import CACHE_CASES, CacheCase
from tessera.serving.operands import DTYPES, CacheRequest

EXAMPLES = int(os.environ.get("TESSERA_EXAMPLES", "2000")) // 4
SHARDS = 2


@st.composite
def cache_cases(draw: st.DrawFn) -> CacheCase:
    """Any case whose parts go together."""
    batch = draw(st.integers(1, 4))
    cached = tuple(draw(st.integers(0, 70) | st.sampled_from([0, 1, 16, 17, 32])) for _ in range(batch))
    group, heads_kv = draw(st.sampled_from([1, 2, 3, 5, 8])), draw(st.integers(1, 3))
    packed, appends = draw(st.booleans()), draw(st.booleans())
    lengths = tuple(draw(st.integers(0, 9)) for _ in range(batch)) if packed else None
    latent = draw(st.sampled_from([False, False, True]))
    paged = draw(st.booleans())
    head_dim = draw(st.sampled_from([4, 16, 20, 32]))
    return CacheCase(
        "random", cached, draw(st.integers(1, 9)), draw(st.integers(1, 9)) if appends else 0, lengths,
        heads_q=group * heads_kv, heads_kv=heads_kv, head_dim=head_dim,
        head_dim_v=draw(st.integers(1, head_dim if latent else 24)), latent=latent,
        page_size=draw(st.sampled_from([1, 2, 3, 8, 16, 64])) if paged else None,
        capacity=draw(st.sampled_from([0, 0, 128])), memory=draw(st.sampled_from(["apart", "beside", "head_major", "vllm"])),
        indexed=draw(st.booleans()), leftpad=tuple(draw(st.integers(0, n)) for n in cached) if draw(st.booleans()) else None,
        rotary_dim=draw(st.sampled_from([0, 2, 4])) if appends and not latent else 0, interleaved=draw(st.booleans()),
        causal=draw(st.booleans()), window=draw(st.none() | st.tuples(*[st.none() | st.integers(0, 40)] * 2)),
        softcap=draw(st.sampled_from([0.0, 0.0, 10.0])), sinks=draw(st.booleans()),
        scales=draw(st.sampled_from(["", "", "head", "sequence", "block", "none"])),
        num_splits=draw(st.none() | st.integers(1, 9)), schedule=draw(st.sampled_from([None, "split", "stream_k"])),
        batch_invariant=draw(st.booleans()),
    )  # fmt: skip


@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_cases(shard: int) -> None:
    @settings(max_examples=EXAMPLES // SHARDS)
    @given(cache_cases(), st.sampled_from(DTYPES), st.integers(0, 2**16).map(lambda n: SHARDS * n + shard))
    def agrees(case: CacheCase, dtype: torch.dtype, seed: int) -> None:
        failed = [str(c) for c in verify.run(case.request(dtype=dtype, seed=seed)) if not c.ok]
        assert not failed, "; ".join(failed)

    agrees()


def _alone(request: CacheRequest, b: int) -> CacheRequest:
    """The same call for one sequence of a dense batch over pages."""
    own = {name: getattr(request, name)[b : b + 1] for name in ("q", "cache_seqlens", "page_table")}
    return request._replace(**own)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariant(dtype: torch.dtype) -> None:
    """A sequence's bits are the same alone, in its batch, and in that batch upside down."""
    case = CacheCase("", cached=(700, 37, 1, 256, 0), page_size=16, heads_q=8, batch_invariant=True, sinks=True)
    request = case.request(dtype=dtype)
    out, lse = operators.forward(request)
    reverse = {name: getattr(request, name).flip(0) for name in ("q", "cache_seqlens", "page_table")}
    out_reversed, lse_reversed = operators.forward(request._replace(**reverse))
    assert torch.equal(out_reversed.flip(0), out)
    assert torch.equal(lse_reversed.flip(0), lse)
    for b in range(case.batch):
        out_alone, lse_alone = operators.forward(_alone(request, b))
        assert torch.equal(out_alone[0], out[b])
        assert torch.equal(lse_alone[0], lse[b])


def test_any_number_of_splits_gives_the_same() -> None:
    request = CacheCase("", cached=(300, 37, 0), seqlen_q=3, sinks=True).request()
    out, lse = operators.forward(request)
    for num_splits in (1, 2, 3, 7, 64, 256):
        split, split_lse = operators.forward(request._replace(num_splits=num_splits))
        torch.testing.assert_close(split, out)
        torch.testing.assert_close(split_lse, lse)


def test_growing_sequences_are_planned_once() -> None:
    request = CacheCase("", cached=(5, 9), new=1, capacity=64).request()
    operators.forward(request)
    known = len(calls._known)
    for _ in range(20):
        request.cache_seqlens.add_(1)
        operators.forward(request)
    assert len(calls._known) == known


def _with_shared_pages(case: CacheCase, shared: int, dtype: torch.dtype) -> CacheRequest:
    request = case.request(dtype=dtype)
    table = request.page_table
    assert table is not None
    table[:, :shared] = table[:1, :shared].clone()
    return request


CASCADES = {
    "decode": CacheCase("", cached=(100, 70, 80), page_size=16),
    "append, four queries": CacheCase("", cached=(100, 70, 64), page_size=16, new=4, seqlen_q=4, heads_q=8, sinks=True),
    "packed": CacheCase("", cached=(100, 70, 64), page_size=16, new=1, lengths_q=(3, 0, 8), softcap=20.0),
    "latent": CacheCase("", cached=(100, 70), page_size=16, latent=True, head_dim=96, head_dim_v=64, heads_kv=1),
    "fp8": CacheCase("", cached=(100, 70), page_size=16, scales="block", num_splits=2),
}


@pytest.mark.parametrize("shared", [0, 1, 4])
@pytest.mark.parametrize("name", CASCADES)
def test_cascade_is_attention_with_kvcache(name: str, shared: int) -> None:
    request = _with_shared_pages(CASCADES[name], shared, torch.float32)
    options = {key: value for key, value in request._asdict().items() if key not in ("left", "right", "schedule", "backend")}
    first = [options.pop(key) for key in ("q", "k_cache", "v_cache")]
    out, lse = attention_with_kvcache(*first, causal=True, return_lse=True, **options)
    cascaded, cascaded_lse = attention_cascade(*first, shared_pages=shared, causal=True, return_lse=True, **options)
    torch.testing.assert_close(cascaded, out)
    torch.testing.assert_close(cascaded_lse, lse)
    torch.testing.assert_close(attention_cascade(*first, shared_pages=shared, causal=True, **options), cascaded)


def test_cases_hold_every_part() -> None:
    """The named cases are a grid by hand: each field of a CacheCase is varied somewhere."""
    plain = CacheCase("")
    varied = {field for case in CACHE_CASES.values() for field in vars(case) if getattr(case, field) != getattr(plain, field)}
    assert varied == set(vars(plain))
