"""Attention over a KV cache on the GPU, against the oracle: every named case on every backend that can run it there."""

from __future__ import annotations

import pytest
import torch

from tessera.device import Device
from tessera.serving import dispatch, verify
from tessera.serving.cases import CACHE_CASES
from tessera.serving.operands import describe

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

GPU = Device.of(torch.device("cuda", 0))


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
