"""Attention over a KV cache on the CPU, against the oracle: every named case, dtype and backend."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from tessera.serving import verify
from tessera.serving.cases import CACHE_CASES, CacheCase
from tessera.serving.grid import AXES, covering, kvcache_grid
from tessera.serving.operands import DTYPES


@pytest.mark.parametrize(("backend", "dtype"), [*(("cpu", dtype) for dtype in DTYPES), ("torch", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", CACHE_CASES)
def test_case(name: str, backend: str, dtype: torch.dtype) -> None:
    comparisons = verify.run(CACHE_CASES[name].request(dtype=dtype)._replace(backend=backend))
    failed = [str(c) for c in comparisons if not c.ok]
    assert not failed, "; ".join(failed)


@pytest.mark.parametrize("case", kvcache_grid(), ids=lambda case: case.name)
def test_grid(case: CacheCase) -> None:
    """FlashAttention-3's own grid, every pair of its values."""
    failed = [str(c) for c in verify.run(case.request(dtype=torch.bfloat16)) if not c.ok]
    assert not failed, "; ".join(failed)


def test_the_grid_holds_every_pair() -> None:
    chosen = covering(AXES, seed=0)
    for a, b in combinations(AXES, 2):
        met = {(str(choice[a]), str(choice[b])) for choice in chosen}
        assert len(met) == len(AXES[a]) * len(AXES[b]), (a, b)
    assert len(chosen) < 100
