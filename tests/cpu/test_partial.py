"""The merge of partial results: against the whole, its laws, its gradients, its refusals."""

from __future__ import annotations

import math
from functools import reduce
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tessera import attention, attention_varlen, merge

Part = tuple[Tensor, Tensor]


def qkv(seqlen_q: int, seqlen_k: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, seqlen_q, 4, 8, dtype=dtype), *torch.randn(2, 2, seqlen_k, 2, 8, dtype=dtype)


def part_of(q: Tensor, k: Tensor, v: Tensor, keys: slice) -> Part:
    return attention(q, k[:, keys], v[:, keys], return_lse=True)


@given(st.lists(st.integers(0, 30), max_size=4).map(sorted))
def test_parts_make_the_whole(cuts: list[int]) -> None:
    q, k, v = qkv(11, 30)
    ends = [0, *cuts, 30]
    parts = [part_of(q, k, v, slice(a, b)) for a, b in pairwise(ends)]  # some may be empty
    out, lse = reduce(lambda a, b: merge(*a, *b), parts)
    whole_out, whole_lse = attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, whole_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_parts(dtype: torch.dtype) -> None:
    q, k, v = qkv(11, 30, dtype)
    out, lse = merge(*part_of(q, k, v, slice(0, 13)), *part_of(q, k, v, slice(13, 30)))
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    whole, whole_lse = attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, whole, rtol=3 * torch.finfo(dtype).eps, atol=3 * torch.finfo(dtype).eps)
    # torch's kernel takes a 20-bit exponential for 16-bit inputs
    torch.testing.assert_close(lse, whole_lse, rtol=2e-5, atol=2e-5)


def test_varlen_parts() -> None:
    """Lay-outs (total, heads, dim) and (heads, total): a causal whole from a full part and a square causal one."""
    q, k, v = torch.randn(10, 4, 8), *torch.randn(2, 25, 4, 8)

    def packed(keys: slice, causal: bool) -> Part:
        offsets_q, offsets_k = (torch.tensor([0, n], dtype=torch.int32) for n in (10, len(range(*keys.indices(25)))))
        return attention_varlen(q, k[keys], v[keys], offsets_q, offsets_k, causal=causal, return_lse=True)

    out, lse = merge(*packed(slice(0, 15), False), *packed(slice(15, 25), True))
    whole_out, whole_lse = packed(slice(0, 25), True)
    torch.testing.assert_close(out, whole_out)
    torch.testing.assert_close(lse, whole_lse)


LOGITS = st.lists(st.floats(-50, 50) | st.just(-math.inf), min_size=6, max_size=6)


def part(logits: list[float]) -> Part:
    """A part with these lse: out (1, 3, 2, 4), 0 where the part is empty."""
    lse = torch.tensor(logits, dtype=torch.float64).view(1, 2, 3)
    out = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    return out.masked_fill((lse == -math.inf).transpose(1, 2)[..., None], 0.0), lse


def assert_same(a: Part, b: Part) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a[1], b[1], rtol=1e-12, atol=1e-12)


@given(LOGITS, LOGITS, LOGITS)
def test_laws(first: list[float], second: list[float], third: list[float]) -> None:
    a, b, c = part(first), part(second), part(third)
    assert_same(merge(*a, *b), merge(*b, *a))
    assert_same(merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c)))


@given(LOGITS)
def test_an_empty_part_is_neutral(logits: list[float]) -> None:
    a, empty = part(logits), part([-math.inf] * 6)
    assert_same(merge(*a, *empty), a)
    assert_same(merge(*empty, *a), a)
    assert_same(merge(*empty, *empty), empty)


def test_far_apart_logits_do_not_overflow() -> None:
    a, b = part([3e4, -3e4, 1e4, 0, 0, 700]), part([-3e4, 3e4, 1e4, 1e4, -1e4, 709])
    out, lse = merge(*a, *b)
    assert out.isfinite().all()
    torch.testing.assert_close(lse, torch.logaddexp(a[1], b[1]))


def test_gradients() -> None:
    out_a, lse_a = part([0.3, -1.0, 2.0, 0.1, 0.0, -0.4])
    out_b, lse_b = part([1.3, 1.0, -2.0, 0.4, 5.0, 0.4])
    inputs = [x.requires_grad_() for x in (out_a, lse_a, out_b, lse_b)]
    assert torch.autograd.gradcheck(merge, inputs)


def test_gradients_through_attention_equal_the_whole() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(9, 20))
    merged = merge(*part_of(q, k, v, slice(0, 7)), *part_of(q, k, v, slice(7, 20)))
    whole = attention(q, k, v, return_lse=True)
    weights = [torch.randn_like(x) for x in whole]
    grads = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(pair, weights, strict=True)), (q, k, v)) for pair in (merged, whole)
    ]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_gradients_of_empty_rows_are_zero() -> None:
    out_a, lse_a = part([0.3, -math.inf, 2.0, -math.inf, 0.0, 1.0])
    out_b, lse_b = part([-math.inf, -math.inf, 1.0, 2.0, 0, 0])
    inputs = [x.requires_grad_() for x in (out_a, lse_a, out_b, lse_b)]
    out, lse = merge(*inputs)
    grads = torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), inputs)
    for grad in grads:
        assert grad.isfinite().all()
    empty_in_a = (lse_a == -math.inf).transpose(1, 2)
    assert (grads[0][empty_in_a] == 0).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda a, b: (a[0], a[1], b[0][:, :2], b[1]), "out_b"),
        (lambda a, b: (a[0], a[1], b[0], b[1][:, :1]), "lse_b"),
        (lambda a, b: (a[0], a[1].transpose(1, 2), b[0], b[1].transpose(1, 2)), "lse_a"),
        (lambda a, b: (a[0], None, b[0], b[1]), "lse_a=NoneType"),
        (lambda a, b: (a[0], a[1], b[0].to("meta"), b[1]), "out_b=on meta"),
        (lambda a, b: (a[1], a[1], b[1], b[1]), "lse_a=shape"),
    ],
    ids=["out_b", "lse_b", "lse's layout", "no tensor", "another device", "dimensions"],
)
def test_misfits_are_refused(change, named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{named}"):
        merge(*change(part([0.0] * 6), part([0.0] * 6)))
