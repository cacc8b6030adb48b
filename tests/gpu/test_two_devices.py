"""Calls on a second GPU while the first is current: kernels, workspaces, streams and graphs go by their tensors' device."""

from __future__ import annotations

import threading

import pytest
import torch

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


@pytest.mark.parametrize("deterministic", [False, True], ids=["any order", "fixed order"])
@pytest.mark.parametrize("name", ["causal", "gqa", "sinks, window", "documents", "varlen", "dropout, causal, gqa"])
def test_attention(name: str, deterministic: bool) -> None:
    for device in DEVICES:
        request = CASES[name].request(device, torch.bfloat16, requires_grad=True)
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


def test_both_at_once_from_threads() -> None:
    """Each thread serves one device, and never says which is current."""
    case = Case("many", seqlen_q=700, seqlen_k=700, heads_q=8, heads_kv=2, causal=True)
    failed: list[str] = []

    def serve(device: str) -> None:
        for seed in range(5):
            request = case.request(device, torch.bfloat16, seed, requires_grad=True)._replace(backend="hopper")
            failed.extend(f"{device}: {c}" for c in verify.run(request) if not c.ok)

    threads = [threading.Thread(target=serve, args=(device,)) for device in DEVICES[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


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
