"""Dropout, ALiBi and biases on Hopper, forward and backward: every gradient by the tolerance rule, dropout's mask bit for bit.

(tests/gpu/test_hopper_forward.py has the forward's own: every form of a bias, masks of packed sequences, long rows.)
"""

from __future__ import annotations

import pytest
import torch

from tessera import attention, dropout_mask, verify
from tessera.backends.hopper import bias_planes
from tessera.cases import CASES, Case
from tessera.operands import Request

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

WIDE = {"batch": 2, "seqlen_q": 700, "seqlen_k": 900, "heads_q": 4, "heads_kv": 2}
PLANE = (2, 4, 700, 900)
LENGTHS = (100, 1, 700, 33, 512, 0, 257)
DIMS = (64, 128, 256)
MODIFIED = tuple(case for case in CASES.values() if case.dropout_p or case.bias or case.alibi or (case.softmax_scale or 1) < 0)
MORE = (
    *(Case(f"d{d} dropout", head_dim=d, dropout_p=0.2, **WIDE) for d in (64, 128, 192, 256)),
    *(Case(f"d{d} all three", head_dim=d, bias=(1, *PLANE[1:]), alibi="head", dropout_p=0.2, causal=True, **WIDE) for d in DIMS),
    *(Case(f"d{d} bias {shape}, causal", head_dim=d, bias=shape, causal=True, **WIDE)
      for d in DIMS for shape in (PLANE, (1, 1, 700, 900))),
    *(Case(f"d{d} bias, window", head_dim=d, bias=(1, *PLANE[1:]), window=(200, 30), **WIDE) for d in (64, 128)),
    *(Case(f"d{d} bias, padding left", head_dim=d, bias=PLANE, key_start=(130, 37), causal=d == 64, **WIDE) for d in (64, 128)),
    Case("bias, odd keys", bias=(2, 4, 700, 901), **{**WIDE, "seqlen_k": 901}),
    Case("bias, padding", bias=PLANE, key_end=(900, 333), query_end=(700, 111), **WIDE),
    Case("bias, documents", bias=(1, 1, 700, 700), seqlen_q=700, seqlen_k=700, documents=(100, 350, 250)),
    Case("d128 bias", head_dim=128, bias=PLANE, **WIDE),
    *(Case(f"bias {shape}", bias=shape, **WIDE) for shape in ((1, 1, 1, 900), (2, 4, 1, 900), (1, 4, 700, 1), (1, 4, 1, 1))),
    *(Case(f"d{d} bias, softcap", head_dim=d, bias=(1, 1, 700, 900), softcap=20.0, **WIDE) for d in DIMS),
    Case("d256 bias of keys, alibi", head_dim=256, bias=(2, 1, 1, 900), alibi="batch", **WIDE),
    Case("bias of rows, sinks", bias=(1, 4, 700, 1), sinks=True, softcap=20.0, causal=True, **WIDE),
    Case("padding left, all three", key_start=(130, 37), bias=PLANE, alibi="head", dropout_p=0.2, causal=True, **WIDE),
    Case("packed", batch=len(LENGTHS), lengths_q=LENGTHS, lengths_k=LENGTHS, alibi="batch", dropout_p=0.2, head_dim=128,
         heads_q=4, heads_kv=2, causal=True),
)  # fmt: skip
"""Few, and broad: every kernel takes seconds to compile."""


CONSTANT = (
    *(Case(f"d128 {name}", head_dim=128, bias=PLANE, constant_bias=True, **WIDE, **more)
      for name, more in (("plain", {}), ("window", {"window": (200, 30)}), ("padding", {"key_start": (130, 37), "causal": True}),
                         ("softcap", {"softcap": 20.0}), ("sinks", {"sinks": True, "causal": True}))),
    Case("d96/64", head_dim=96, head_dim_v=64, bias=(1, 4, 700, 900), constant_bias=True, causal=True, **WIDE),
    Case("d128 documents", head_dim=128, bias=(1, 1, 700, 700), constant_bias=True, seqlen_q=700, seqlen_k=700,
         documents=(100, 350, 250)),
    Case("d64", bias=(2, 1, 700, 900), constant_bias=True, **WIDE),
)  # fmt: skip
"""Without the bias's gradient, which is another kernel at head dim 128."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", MODIFIED, ids=lambda case: case.name)
def test_cases(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("case", MORE, ids=lambda case: case.name)
def test_more(case: Case) -> None:
    check(case, torch.bfloat16)


@pytest.mark.parametrize("case", CONSTANT, ids=lambda case: case.name)
def test_a_constant_bias(case: Case) -> None:
    check(case, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_constant_bias_in_float32(dtype: torch.dtype) -> None:
    request = CONSTANT[0].request("cuda", dtype, requires_grad=True)
    check_request(request._replace(bias=request.bias.float()))


@pytest.mark.parametrize("dim", DIMS)
def test_a_float32_bias_with_its_gradient(dim: int) -> None:
    """It is read where it lies, and its gradient made of dS in 16 bits."""
    request = Case("float32", head_dim=dim, bias=(1, *PLANE[1:]), causal=True, **WIDE).request(
        "cuda", torch.bfloat16, requires_grad=True
    )
    check_request(request._replace(bias=request.bias.detach().float().requires_grad_()))


def check(case: Case, dtype: torch.dtype) -> None:
    check_request(case.request("cuda", dtype, requires_grad=True))


def check_request(request: Request) -> None:
    request = request._replace(backend="hopper")
    failed = [str(compared) for compared in verify.run(request) if not compared.ok]
    assert not failed, "; ".join(failed)


@pytest.mark.parametrize("dim", DIMS)
def test_additions_to_a_biass_gradient(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, as where dS of all sequences and heads would take too much room."""
    monkeypatch.setattr(bias_planes, "KEPT_PLANES", 0)
    monkeypatch.setattr(bias_planes, "KEPT_BYTES", 0)
    check(Case("added", head_dim=dim, bias=(1, 1, 690, 910), **{**WIDE, "seqlen_q": 690, "seqlen_k": 910}), torch.bfloat16)


@pytest.mark.parametrize("shape", [PLANE, (1, 1, 700, 900), (2, 1, 1, 900)], ids=["own", "a plane for all", "of keys"])
@pytest.mark.parametrize("dim", DIMS)
def test_gradients_of_a_bias_repeat(dim: int, shape: tuple[int, ...]) -> None:
    """In a fixed order: sequences and heads that share a bias have planes of their own, which are added up at the end."""
    request = Case("fixed order", bias=shape, head_dim=dim, **WIDE).request("cuda", torch.bfloat16, requires_grad=True)
    fixed = request._replace(backend="hopper", deterministic=True)
    failed = [str(compared) for compared in verify.run(fixed) if not compared.ok]
    assert not failed, "; ".join(failed)
    inputs = (request.q, request.k, request.v, request.bias)
    q, k, v, bias = inputs
    out = attention(q, k, v, bias=bias, deterministic=True, backend="hopper")
    dout = torch.randn_like(out)
    first, *others = (torch.autograd.grad(out, inputs, dout, retain_graph=True) for _ in range(20))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dropout_p", [0.002, 0.5, 0.99])
def test_backward_draws_the_same_mask(dim: int, dropout_p: float) -> None:
    """With q = 0 every P is 1/Sk, and with the identity for dO, dV shows which are kept."""
    seqlen_k, heads = 300, 3
    q, k, v = (torch.zeros(2, n, heads, dim, dtype=torch.bfloat16, device="cuda") for n in (dim, seqlen_k, seqlen_k))
    v.requires_grad_()
    out = attention(q, k, v, dropout_p=dropout_p, seed=7 << 40, backend="hopper")
    dout = torch.eye(dim, dtype=torch.bfloat16, device="cuda")[None, :, None].expand(out.shape).contiguous()
    (dv,) = torch.autograd.grad(out, v, dout)
    drawn = dropout_mask(7 << 40, 2, heads, dim, seqlen_k, dropout_p, "cuda")
    assert torch.equal(dv != 0, drawn.permute(0, 3, 1, 2))
