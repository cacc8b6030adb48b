"""Every differentiable option against finite differences in float64, and what no gradient may pass through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_inputs import DIFFERENTIABLE, OFFSETS_K, OFFSETS_Q, gradcheck, grads, leaf, small
from torch import Tensor

from tessera import Mask, attention, attention_varlen


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name: str, backend: str) -> None:
    """Of out and lse in q, k and v; empty rows' lse is a constant and left out."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention(q, k, v, return_lse=True, backend=backend, **DIFFERENTIABLE[name])
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert gradcheck(function, small())


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_gradcheck_of_out_alone(backend: str) -> None:
    """Without a gradient for lse the backward of torch's kernel serves."""
    assert gradcheck(lambda *x: attention(*x, causal=True, backend=backend), small())


def test_gradcheck_of_lse_alone() -> None:
    assert gradcheck(lambda q, k, v: attention(q, k, v, return_lse=True)[1], small()[:2] + (small()[2].detach(),))


@pytest.mark.parametrize("shapes", [{"dim_v": 3}, {"dim": 3}, {"heads_kv": 1}, {"heads_kv": 4}, {"seqlen_q": 9}, {"seqlen_q": 1}])
def test_gradcheck_of_shapes(shapes: dict[str, int]) -> None:
    assert gradcheck(lambda *x: attention(*x, causal=True, softcap=3.0), small(**shapes))


@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (1, 4, 5, 7), (2, 1, 1, 7), (1, 1, 5, 1), (4, 1, 1), (5, 7), (7,), (1,), ()])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradcheck_bias(shape: tuple[int, ...], softcap: float) -> None:
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
        return attention(q, k, v, bias=bias, softcap=softcap, return_lse=True)

    assert gradcheck(function, (*small(), bias))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 2.0}, {"dropout_p": 0.3, "seed": 1}], ids=str)
@pytest.mark.parametrize("seqlen_q", [5, 9])
def test_gradcheck_sinks(options: dict[str, Any], seqlen_q: int) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Any:
        return attention(q, k, v, sinks=sinks, return_lse=True, **options)

    assert gradcheck(function, (*small(seqlen_q=seqlen_q), leaf(4)))


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"softcap": 2.0, "window": (2, 0)}, {"dropout_p": 0.3, "seed": 1}], ids=str
)
def test_gradcheck_varlen(options: dict[str, Any]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Any:
        return attention_varlen(q, k, v, OFFSETS_Q, OFFSETS_K, sinks=sinks, return_lse=True, **options)[0]

    assert gradcheck(function, (leaf(9, 4, 4), leaf(12, 2, 4), leaf(12, 2, 4), leaf(4)))


def test_only_the_inputs_that_ask_get_gradients() -> None:
    q, k, v = small()
    k = k.detach()
    bias, sinks = leaf(5, 7), leaf(4).detach()
    out = attention(q, k, v, bias=bias, sinks=sinks)
    out.sum().backward()
    assert all(x.grad is not None for x in (q, v, bias))
    assert k.grad is None
    assert sinks.grad is None


def test_empty_rows_have_no_gradient_whatever_arrives() -> None:
    """The gradient that reaches an empty row's lse is often NaN (of exp(-inf - -inf)): it must go no further."""
    q, k, v = small(seqlen_q=9)
    for options in ({}, {"softcap": 3.0}):
        out, lse = attention(q, k, v, causal=True, return_lse=True, **options)
        empty = lse == float("-inf")
        assert empty.any()
        dlse = torch.ones_like(lse).masked_fill(empty, float("nan"))
        dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), dlse))
        assert (dq[:, :2] == 0).all()
        assert all(x.isfinite().all() for x in (dq, dk, dv))


def test_nan_in_padding_reaches_nothing() -> None:
    """Keys that no row may see can hold anything, as the tail of a static cache does."""
    q, k, v = small(dtype=torch.float32, requires_grad=False)
    clean = [x.clone().requires_grad_() for x in (q, k, v)]
    dirty = [x.clone() for x in (q, k, v)]
    dirty[1][:, 5:], dirty[2][:, 5:] = float("nan"), float("nan")
    dirty = [x.requires_grad_() for x in dirty]
    mask = Mask.padding(torch.tensor([5, 4]))
    dirty[1].data[1, 4], dirty[2].data[1, 4] = float("nan"), float("nan")
    for options in ({}, {"softcap": 3.0}, {"causal": True}):
        wanted, got = (grads(lambda *x, o=options: attention(*x, mask=mask, **o), *inputs) for inputs in (clean, dirty))
        for a, b in zip(wanted, got, strict=True):
            torch.testing.assert_close(a, b)


def test_sink_of_minus_infinity_is_no_sink() -> None:
    q, k, v = small(seqlen_q=9)
    sinks = torch.full((4,), float("-inf"), dtype=torch.float64, requires_grad=True)
    out, lse = attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    plain, plain_lse = attention(q, k, v, causal=True, return_lse=True)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(lse, plain_lse)
    for grad in torch.autograd.grad(out.sum(), (q, k, v, sinks)):
        assert grad.isfinite().all()
