"""The Hopper forward's kernel, run by Python (tests/gluon_in_python.py) against the oracle."""

from __future__ import annotations

import pytest
import torch
from gluon_in_python import in_python
from torch import Tensor

from tessera import reference
from tessera.backends.hopper.launch import ForwardLaunch, counters
from tessera.backends.hopper.plan import forward_config
from tessera.cases import CASES, Case
from tessera.operands import Request, bind
from tessera.verify import compare

NAMES = (
    "full", "off the tile, causal", "more queries, causal", "gqa", "scale below 0, causal", "window", "padding", "padding left",
    "d72", "d192 v128", "documents", "varlen", "varlen, empty sequences",
)  # fmt: skip
LONG = {"batch": 2, "seqlen_q": 200, "seqlen_k": 330, "heads_q": 2, "heads_kv": 1}
MODIFIED = (
    *(case for case in CASES.values() if case.dropout_p or case.bias or case.alibi or case.sinks or case.softcap),
    *(Case(f"d{d}, everything", head_dim=d, causal=True, alibi="batch", bias=(1, 2, 200, 330), dropout_p=0.3, **LONG)
      for d in (64, 96, 128, 256)),
    *(Case(f"bias {shape}", bias=shape, causal=True, **LONG)
      for shape in ((2, 2, 200, 330), (2, 1, 200, 330), (1, 1, 1, 330), (2, 1, 200, 1), (1, 2, 1, 1))),
    Case("padding left, everything", alibi="head", bias=(2, 2, 200, 330), dropout_p=0.3, key_start=(37, 130), **LONG),
    Case("scale of 0", softmax_scale=0.0, causal=True),
)  # fmt: skip


def run(request: Request, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    problem, operands = bind(request)
    counter = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(counters, "_of_stream", {(None, 0): counter.data_ptr()})
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    with torch.no_grad(), in_python():
        result = ForwardLaunch(problem, forward_config(problem), 3)(operands)
    assert counter.item() == 0
    return result


@pytest.mark.parametrize("case", [*(CASES[name] for name in NAMES), *MODIFIED], ids=lambda case: case.name)
def test_cases(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    request = case.request("cpu", torch.bfloat16)
    refs, eagers = (reference.attention(*bind(request), dtype) for dtype in (torch.float64, torch.bfloat16))
    for name, result, ref, eager in zip(("out", "lse"), run(request, monkeypatch), refs, eagers, strict=True):
        compared = compare(name, result, ref, eager)
        assert compared.ok, str(compared)
