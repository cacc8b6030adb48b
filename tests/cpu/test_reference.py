"""The oracle itself: against torch's math SDPA where the two overlap, and against independent formulas where they don't."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tessera import dropout_mask, reference
from tessera.cases import Case
from tessera.mask import Mask
from tessera.operands import Request, bind, gather
from tessera.verify import in_float64, trainable

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def qkv(seqlen_q: int = 13, seqlen_k: int = 17, heads: int = 4, heads_kv: int = 4, dim: int = 8, dim_v: int = 8) -> tuple:
    return draw(2, seqlen_q, heads, dim), draw(2, seqlen_k, heads_kv, dim), draw(2, seqlen_k, heads_kv, dim_v)


def oracle(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return reference.attention(*bind(Request(q, k, v, **options)))


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        qkv_by_head = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*qkv_by_head, **options).transpose(1, 2)


def scores(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """(batch, heads, Sq, Sk), each key/value head repeated for its group."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)


def weighted(p: Tensor, v: Tensor) -> Tensor:
    v = v.repeat_interleave(p.shape[1] // v.shape[2], dim=2)
    return torch.einsum("bhij,bjhd->bihd", p, v)


def assert_same_function(result: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Values and gradients agree, in float64."""
    torch.testing.assert_close(result, expected, **EXACT)
    dout = torch.randn_like(expected)
    for got, want in zip(torch.autograd.grad(result, inputs, dout), torch.autograd.grad(expected, inputs, dout), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


FLOAT_MASK = torch.where(torch.rand(13, 17, generator=torch.Generator().manual_seed(3)) < 0.3, -math.inf, 0.5).double()


@pytest.mark.parametrize(
    ("shapes", "ours", "theirs"),
    [
        ({}, {}, {}),
        ({"dim_v": 5}, {}, {}),
        ({"seqlen_k": 13}, {"right": 0}, {"is_causal": True}),
        ({}, {"softmax_scale": 0.7}, {"scale": 0.7}),
        ({}, {"bias": FLOAT_MASK}, {"attn_mask": FLOAT_MASK}),
        ({"heads_kv": 2}, {}, {"enable_gqa": True}),
        ({"heads_kv": 1, "seqlen_k": 13}, {"right": 0}, {"enable_gqa": True, "is_causal": True}),
    ],
    ids=["full", "head_dim_v", "causal", "scale", "float mask", "gqa", "mqa, causal"],
)
def test_against_math_sdpa(shapes: dict[str, int], ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    inputs = qkv(**shapes)
    out, _ = oracle(*inputs, **ours)
    assert_same_function(out, sdpa(*inputs, **theirs), inputs)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 17), (17, 5), (9, 9)])
def test_causal_is_aligned_to_the_bottom_right(seqlen_q: int, seqlen_k: int) -> None:
    inputs = qkv(seqlen_q, seqlen_k)
    out, lse = oracle(*inputs, right=0)
    keep = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).tril(seqlen_k - seqlen_q)
    empty = ~keep.any(dim=-1)
    assert empty.sum() == max(0, seqlen_q - seqlen_k)
    torch.testing.assert_close(out[:, ~empty], sdpa(*inputs, attn_mask=keep)[:, ~empty], **EXACT)
    assert (out[:, empty] == 0).all()
    assert (lse[:, :, empty] == -math.inf).all()
    assert lse[:, :, ~empty].isfinite().all()


def test_lse_is_the_log_of_the_denominator() -> None:
    q, k, v = qkv()
    _, lse = oracle(q, k, v)
    torch.testing.assert_close(lse, scores(q, k).exp().sum(dim=-1).log(), **EXACT)


def test_softcap() -> None:
    inputs = q, k, v = qkv()
    out, _ = oracle(q, k, v, softcap=0.8)
    x = scores(q, k)
    capped = 0.8 * (1 - 2 / (torch.exp(2 * x / 0.8) + 1))  # tanh, written out
    assert_same_function(out, weighted(torch.softmax(capped, dim=-1), v), inputs)


def test_sinks_are_one_more_key_of_value_zero() -> None:
    q, k, v = qkv()
    sinks = draw(4)
    inputs = (q, k, v, sinks)
    out, lse = oracle(q, k, v, sinks=sinks)
    columns = torch.cat([scores(q, k), sinks[None, :, None, None].expand(2, 4, 13, 1)], dim=-1)
    zero_value = torch.cat([v, v.new_zeros(2, 1, 4, 8)], dim=1)
    assert_same_function(out, weighted(torch.softmax(columns, dim=-1), zero_value), inputs)
    torch.testing.assert_close(lse, columns.logsumexp(dim=-1), **EXACT)


@pytest.mark.parametrize("shape", [(4,), (2, 4)])
def test_alibi(shape: tuple[int, ...]) -> None:
    inputs = q, k, v = qkv(7, 11)
    slopes = torch.rand(*shape)
    out, _ = oracle(q, k, v, alibi_slopes=slopes)
    x = scores(q, k)
    shifted = x.clone()
    for i in range(7):
        for j in range(11):
            shifted[:, :, i, j] = x[:, :, i, j] - slopes.double() * abs(i + 4 - j)
    assert_same_function(out, weighted(torch.softmax(shifted, dim=-1), v), inputs)


def test_alibi_of_a_causal_row_is_the_linear_bias() -> None:
    """Under a causal mask ALiBi differs from slope * j by a constant of the row, which softmax does not see."""
    inputs = q, k, v = qkv(9, 9)
    slopes = torch.rand(4)
    out, _ = oracle(q, k, v, alibi_slopes=slopes, right=0)
    linear = slopes.double()[None, :, None, None] * torch.arange(9)
    expected, _ = oracle(q, k, v, bias=linear, right=0)
    assert_same_function(out, expected, inputs)


def test_dropout_drops_normalised_probabilities() -> None:
    inputs = q, k, v = qkv()
    out, lse = oracle(q, k, v, dropout_p=0.25, seed=11)
    z = dropout_mask(11, 2, 4, 13, 17, 0.25)
    assert 0 < (~z).double().mean() < 1
    p = torch.softmax(scores(q, k), dim=-1)
    assert_same_function(out, weighted(torch.where(z, p / 0.75, 0.0), v), inputs)
    torch.testing.assert_close(lse, oracle(q, k, v)[1], **EXACT)  # the denominator is that of all keys


@pytest.mark.parametrize("bias_shape", [(1, 1, 1, 1), (2, 4, 13, 17), (1, 4, 1, 17), (2, 1, 13, 1), (13, 17), (17,), ()])
def test_bias_broadcasts_and_is_differentiable(bias_shape: tuple[int, ...]) -> None:
    q, k, v = qkv()
    bias = draw(*bias_shape)
    out, _ = oracle(q, k, v, bias=bias, bias_requires_grad=True)
    # a bias alike for all keys of a row shifts out by nothing and its gradient is 0 but for rounding
    assert_same_function(out, weighted(torch.softmax(scores(q, k) + bias, dim=-1), v), (q, k, v, bias))


def test_softcap_comes_before_bias_and_alibi() -> None:
    q, k, v = qkv()
    bias, slopes = draw(2, 4, 13, 17), torch.rand(4)
    out, _ = oracle(q, k, v, bias=bias, alibi_slopes=slopes, softcap=2.0)
    i, j = torch.meshgrid(torch.arange(13), torch.arange(17), indexing="ij")
    x = 2 * torch.tanh(scores(q, k) / 2) + bias - slopes.double()[None, :, None, None] * (i + 4 - j).abs()
    assert_same_function(out, weighted(torch.softmax(x, dim=-1), v), (q, k, v, bias))


def test_varlen_is_each_sequence_by_itself() -> None:
    case = Case("varlen", lengths_q=(5, 0, 9), lengths_k=(7, 3, 4), heads_kv=2, head_dim=8, causal=True, softcap=3.0, sinks=True)
    request = case.request(dtype=torch.float64)
    out, lse = reference.attention(*bind(request))
    q0, k0 = 0, 0
    for rows, keys in zip((5, 0, 9), (7, 3, 4), strict=True):
        own = request._replace(
            q=request.q[None, q0 : q0 + rows], k=request.k[None, k0 : k0 + keys], v=request.v[None, k0 : k0 + keys],
            cu_seqlens_q=None, cu_seqlens_k=None,
        )  # fmt: skip
        own_out, own_lse = reference.attention(*bind(own))
        torch.testing.assert_close(out[q0 : q0 + rows], own_out[0], **EXACT)
        torch.testing.assert_close(lse[:, q0 : q0 + rows], own_lse[0], **EXACT)
        q0, k0 = q0 + rows, k0 + keys


def test_varlen_tokens_of_no_sequence_are_empty() -> None:
    case = Case("used", lengths_q=(6, 4), lengths_k=(6, 4), head_dim=8)
    request = case.request(dtype=torch.float64)._replace(seqused_q=torch.tensor([2, 4], dtype=torch.int32))
    out, lse = reference.attention(*bind(request))
    assert (out[2:6] == 0).all()
    assert (lse[:, 2:6] == -math.inf).all()
    assert lse[:, 6:].isfinite().all()


def test_masked_values_may_be_nan() -> None:
    q, k, v = (x.detach() for x in qkv())
    expected, _ = oracle(q, k[:, :11], v[:, :11])
    k[:, 11:], v[:, 11:] = math.nan, math.nan
    ends = torch.tensor([11, 11], dtype=torch.int32)
    out, _ = oracle(q, k, v, key_end=ends)
    torch.testing.assert_close(out, expected, **EXACT)
    keep = Mask.padding(ends).allowed(2, 13, 17)
    assert keep.sum() == 2 * 13 * 11


def test_low_precision_run_is_in_that_dtype() -> None:
    """The tolerance rule's eager run: worse than float64 by what bfloat16 costs, and no more."""
    q, k, v = (x.detach().bfloat16() for x in qkv())
    problem, operands = bind(Request(q, k, v))
    low, _ = reference.attention(problem, operands, torch.bfloat16)
    high, _ = reference.attention(problem, operands)
    assert low.dtype == torch.bfloat16
    assert high.dtype == torch.float64
    error = (low.double() - high).abs().max()
    assert 0 < error < 0.1


def test_the_rules_reference_keeps_its_gradients_in_float64() -> None:
    """Gradients of 16-bit inputs by autograd are rounded to 16 bits, and where sequences add up, once a sequence."""
    lengths = (3, 5, 2)
    case = Case("sinks", lengths_q=lengths, lengths_k=lengths, head_dim=16, sinks=True)
    request = case.request(dtype=torch.float16, requires_grad=True)
    request = request._replace(k=request.q)
    exact = in_float64(request)
    assert exact.k is exact.q
    problem, _ = bind(request)
    out, _ = reference.attention(problem, gather(exact))
    _, inputs = trainable(exact)
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    assert all(g.dtype == torch.float64 and (g != g.half().double()).any() for g in gradients)
