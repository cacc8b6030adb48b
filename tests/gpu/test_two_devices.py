"""Calls on a second GPU while the first is current: kernels, workspaces, streams and graphs go by their tensors' device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tessera
from tessera import verify
from tessera.bench.replay import replayable
from tessera.cases import CASES, Case
from tessera.serving import operators as serving
from tessera.serving import verify as serving_verify
from tessera.serving.cases import CACHE_CASES, CacheCase

if torch.cuda.device_count() < 2 or any(torch.cuda.get_device_capability(i)[0] != 9 for i in range(2)):
    pytest.skip(f"needs two Hopper GPUs, {torch.cuda.device_count()} GPUs here", allow_module_level=True)

DEVICES = ("cuda:1", "cuda:0", "cuda:1")
"""The second first: what it is given must not be the first one's."""
ATTENTION = ("causal", "gqa", "sinks, window", "documents", "varlen", "dropout, causal, gqa")
MANY = Case("many", seqlen_q=700, seqlen_k=700, heads_q=8, heads_kv=2, causal=True)


@pytest.mark.parametrize("deterministic", [False, True], ids=["any order", "fixed order"])
@pytest.mark.parametrize("case", [CASES[name] for name in ATTENTION], ids=ATTENTION)
def test_attention(case: Case, deterministic: bool) -> None:
    for device in DEVICES:
        request = case.request(device, torch.bfloat16, requires_grad=True)
        failed = [str(c) for c in verify.run(request._replace(deterministic=deterministic, backend="hopper")) if not c.ok]
        assert not failed, (device, *failed)
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("name", ["one query", "three splits", "stream-k", "append to pages", "rotary, halves", "64 queries",
                                  "fp8, append", "latent, pages, 3 queries"])  # fmt: skip
def test_serving(name: str) -> None:
    for device in DEVICES:
        request = CACHE_CASES[name].request(device, torch.bfloat16)._replace(backend="hopper")
        failed = [str(c) for c in serving_verify.run(request) if not c.ok]
        assert not failed, (device, *failed)
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("current", [0, 1])
def test_recalled_calls(current: int, packed: bool) -> None:
    """Of the same words and sizes on either device in turns, whichever is current: the short way's bits are the whole way's."""
    with torch.cuda.device(current):
        for device in DEVICES * 3:
            q, k, v = (torch.randn(1, 300, 4, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
            cu = torch.tensor([0, 100, 300], dtype=torch.int32, device=device)

            def call(q=q, k=k, v=v, cu=cu, **options: object) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
                if packed:
                    return tessera.attention_varlen(q[0], k[0], v[0], cu, cu, causal=True, deterministic=True, **options)
                return tessera.attention(q, k, v, causal=True, deterministic=True, **options)

            long = call(return_lse=True)[0]
            expected = torch.autograd.grad(long.float().square().sum(), (q, k, v))
            for _ in range(3):
                out = call()
                assert out.device == torch.device(device)
                assert torch.equal(out, long)
                assert all(map(torch.equal, torch.autograd.grad(out.float().square().sum(), (q, k, v)), expected))
                with torch.no_grad():
                    assert torch.equal(call(), long)
            assert torch.cuda.current_device() == current


def test_both_at_once_from_threads() -> None:
    """Each thread serves one device, and never says which is current."""

    def serve(device: str) -> list[str]:
        requests = (MANY.request(device, torch.bfloat16, seed, requires_grad=True) for seed in range(5))
        return [f"{device}: {c}" for r in requests for c in verify.run(r._replace(backend="hopper")) if not c.ok]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(serve, DEVICES[:2])) == [[], []]


@pytest.mark.parametrize("splits", [None, 3])
def test_a_graph_of_each_device(splits: int | None) -> None:
    case = CacheCase("", cached=(700, 37, 0), page_size=16, heads_q=8, num_splits=splits)
    for device in DEVICES:
        request = case.request(device, torch.bfloat16)
        expected = serving.forward(request)
        kept: list[torch.Tensor] = []

        def step(request=request, kept=kept) -> None:
            kept[:] = serving.forward(request)

        replay = replayable(step, torch.device(device))
        for x in kept:
            x.zero_()
        replay()
        torch.cuda.synchronize(device)
        assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True)), device
