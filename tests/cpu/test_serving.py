"""Attention over a KV cache on the CPU, against the oracle: every named case, dtype and backend."""

from __future__ import annotations

import pytest
import torch

from tessera.serving import verify
from tessera.serving.cases import CACHE_CASES
from tessera.serving.operands import DTYPES


@pytest.mark.parametrize(("backend", "dtype"), [*(("cpu", dtype) for dtype in DTYPES), ("torch", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", CACHE_CASES)
def test_case(name: str, backend: str, dtype: torch.dtype) -> None:
    comparisons = verify.run(CACHE_CASES[name].request(dtype=dtype)._replace(backend=backend))
    failed = [str(c) for c in comparisons if not c.ok]
    assert not failed, "; ".join(failed)
