"""What a GPU does by torch's operations where the kernels don't take a call: float32 and float64, or another GPU."""

from __future__ import annotations

import warnings

import pytest
import torch

import tessera
from tessera import verify
from tessera.cases import CASES, Case

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

IN_FLOAT64 = ("causal", "everything", "varlen, used", "documents, window, padding", "sinks, window")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *(pytest.param(case, torch.float32, id=case.name) for case in CASES.values()),
        *(pytest.param(CASES[name], torch.float64, id=f"{name} float64") for name in IN_FLOAT64),
        *(pytest.param(CASES[name], torch.bfloat16, id=f"{name} bf16") for name in IN_FLOAT64),
    ],
)
def test_cases(case: Case, dtype: torch.dtype) -> None:
    """Results and gradients, by the tolerance rule."""
    request = case.request("cuda", dtype, requires_grad=True)._replace(backend="torch")
    failed = [str(compared) for compared in verify.run(request) if not compared.ok]
    assert not failed, "; ".join(failed)


def test_who_did_not_ask_for_them_is_told_once() -> None:
    q, k, v = (torch.randn(1, 37, 2, 24, device="cuda") for _ in range(3))
    with pytest.warns(RuntimeWarning, match="torch operations do this on .*float32"):
        out = tessera.attention(q, k, v, causal=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = tessera.attention(q, k, v, causal=True)
        asked = tessera.attention(q, k, v, causal=True, backend="torch")
    assert tessera.plan(q, k, v, causal=True).backend == "torch"
    assert torch.equal(out, again)
    assert torch.equal(out, asked)
    torch.testing.assert_close(out.cpu(), tessera.attention(q.cpu(), k.cpu(), v.cpu(), causal=True), atol=1e-3, rtol=1e-3)


def test_they_are_no_kernels_for_a_packed_batch_either() -> None:
    """Offsets are read on the host, wherever they lie."""
    q = torch.randn(50, 2, 24, device="cuda", requires_grad=True)
    cu = torch.tensor([0, 13, 13, 50], dtype=torch.int32, device="cuda")
    for _ in range(3):
        out = tessera.attention_varlen(q, q, q, cu, cu, causal=True, backend="torch")
    assert isinstance(out, torch.Tensor)
    (dq,) = torch.autograd.grad(out.square().sum(), q)
    on_host = q.detach().cpu().requires_grad_()
    right = tessera.attention_varlen(on_host, on_host, on_host, cu.cpu(), cu.cpu(), causal=True)
    assert isinstance(right, torch.Tensor)
    (expected,) = torch.autograd.grad(right.square().sum(), on_host)
    torch.testing.assert_close(out.cpu(), right, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(dq.cpu(), expected, atol=5e-3, rtol=1e-2)
