"""Serving on Hopper as a whole (append, decode, chunk, latent, and the choice between them), its kernels run by Python.

FlashAttention-3's grid on shorter caches, the random server, and batch invariance: what tests/gpu/test_serving.py does on a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gluon_in_python import PlainWorkspace, in_python
from serving_simulation import Server, Setting
from torch import Tensor

from tessera.backends.hopper import decode_launch
from tessera.backends.hopper.serving import SERVING_BACKEND
from tessera.device import Device
from tessera.serving import operators, verify
from tessera.serving.cases import CacheCase
from tessera.serving.grid import kvcache_grid
from tessera.serving.operands import CacheRequest, describe, gather
from tessera.serving.plan import CachePlan

FEW = replace(Device.named("h200"), multiprocessors=3)
MOST_KEYS = 300


@pytest.fixture(autouse=True)
def _on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call over a cache goes to the Hopper backend's kernels, run by Python."""

    def run(request: CacheRequest) -> tuple[Tensor, Tensor]:
        problem = describe(request)
        choices = SERVING_BACKEND.plan(problem, FEW)
        plan = CachePlan(problem, FEW, "hopper", choices.forward, choices.workspace_bytes)
        with in_python():
            return SERVING_BACKEND.prepare(plan).run(gather(request))

    monkeypatch.setattr(decode_launch, "workspace", PlainWorkspace())
    monkeypatch.setattr(operators, "forward", run)


def _short(case: CacheCase) -> CacheCase:
    cached = tuple(min(n, MOST_KEYS + n % 50) for n in case.cached)
    leftpad = None if case.leftpad is None else tuple(map(min, case.leftpad, cached))
    return replace(case, cached=cached, leftpad=leftpad)


@pytest.mark.parametrize("case", kvcache_grid(), ids=lambda case: case.name)
def test_grid(case: CacheCase) -> None:
    request = _short(case).request(dtype=torch.bfloat16)
    assert not SERVING_BACKEND.why_not(describe(request), FEW)
    failed = [str(c) for c in verify.run(request) if not c.ok]
    assert not failed, "; ".join(failed)


SIZES = {"dtype": torch.bfloat16, "head_dim": 64, "heads_q": 8}
SERVERS = {
    "pages of 16": Setting(page_size=16, capacity=96, pages=40, **SIZES),
    "pages of 1, window": Setting(page_size=1, capacity=32, pages=120, window=9, **SIZES),
    "contiguous, splits": Setting(page_size=64, capacity=64, pages=9, options={"num_splits": 3}, **SIZES),
}


@pytest.mark.parametrize("setting", SERVERS.values(), ids=SERVERS)
def test_server(setting: Setting) -> None:
    counts = Server(setting, seed=setting.pages).run(40)
    assert counts["comparisons"] > 40, counts


@pytest.mark.parametrize("rows", [(1, 1, 1, 1), (7, 1, 30, 2)], ids=["a query each", "packed"])
def test_batch_invariant(rows: tuple[int, ...]) -> None:
    """A sequence's bits are the same alone and in its batch, packed with others of any length or not."""
    packed = len(set(rows)) > 1
    case = CacheCase("", (1400, 37, 1100, 0), 1, 0, rows if packed else None, heads_q=8, page_size=16, batch_invariant=True)
    request = case.request(dtype=torch.bfloat16)
    out, lse = operators.forward(request)
    start = 0
    for b, count in enumerate(rows):
        of_rows = slice(start, start + count) if packed else slice(b, b + 1)
        start += count
        own = {name: getattr(request, name)[b : b + 1] for name in ("cache_seqlens", "page_table")} | {"q": request.q[of_rows]}
        if packed:
            own["cu_seqlens_q"] = torch.tensor([0, count], dtype=torch.int32)
        own_out, own_lse = operators.forward(request._replace(**own))
        assert torch.equal(own_out, out[of_rows])
        assert torch.equal(own_lse, lse[:, of_rows] if packed else lse[of_rows])
