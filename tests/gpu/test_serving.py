"""Attention over a KV cache on the GPU, against the oracle: every named case on every backend that can run it there, and the
random server of tests/serving_simulation.py (TESSERA_SERVER_STEPS steps in all, 10,000 by default)."""

from __future__ import annotations

import os

import pytest
import torch
from serving_simulation import Server, Setting

from tessera.device import Device
from tessera.serving import dispatch, verify
from tessera.serving.cases import CACHE_CASES, CacheCase
from tessera.serving.grid import kvcache_grid
from tessera.serving.operands import describe

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", [name for name in dispatch.BACKENDS if name != "cpu"])
@pytest.mark.parametrize("name", CACHE_CASES)
def test_case(name: str, backend: str, dtype: torch.dtype) -> None:
    request = CACHE_CASES[name].request("cuda", dtype)._replace(backend=backend)
    reasons = dispatch.load(backend).why_not(describe(request), GPU)
    if reasons:
        pytest.skip("; ".join(map(str, reasons)))
    failed = [str(c) for c in verify.run(request) if not c.ok]
    assert not failed, "; ".join(failed)


@pytest.mark.parametrize("case", kvcache_grid(), ids=lambda case: case.name)
def test_grid(case: CacheCase) -> None:
    """FlashAttention-3's own grid, every pair of its values, on the backend that dispatch picks."""
    failed = [str(c) for c in verify.run(case.request("cuda", torch.bfloat16)) if not c.ok]
    assert not failed, "; ".join(failed)


@pytest.mark.parametrize("name", SERVERS)
def test_server(name: str) -> None:
    counts = Server(SERVERS[name], seed=len(name)).run(STEPS)
    assert counts["comparisons"] > STEPS, counts
    print(f"{name}: {dict(counts)}")
