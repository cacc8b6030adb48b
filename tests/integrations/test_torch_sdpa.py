"""torch's scaled_dot_product_attention by its signature: the same calls, the same results."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import tessera
from tessera.integrations.torch_sdpa import scaled_dot_product_attention


def heads(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_arguments_stand_in_torchs_order() -> None:
    torchs = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    assert tuple(inspect.signature(scaled_dot_product_attention).parameters) == torchs


KEEP = torch.rand(2, 1, 33, 50) > 0.3
KEEP[..., 0] = True  # torch: NaN for a row that sees nothing
CALLS: dict[str, tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]] = {
    "plain": ((heads(2, 4, 33, 16), heads(2, 4, 50, 16), heads(2, 4, 50, 16)), {}),
    "causal, square": ((heads(2, 4, 40, 16), heads(2, 4, 40, 16), heads(2, 4, 40, 16)), {"is_causal": True}),
    "causal, fewer queries": ((heads(2, 4, 33, 16), heads(2, 4, 50, 16), heads(2, 4, 50, 16)), {"is_causal": True}),
    "causal, more queries": ((heads(2, 4, 50, 16), heads(2, 4, 33, 16), heads(2, 4, 33, 16)), {"is_causal": True}),
    "gqa, scale": ((heads(2, 6, 33, 16), heads(2, 2, 50, 16), heads(2, 2, 50, 16)), {"enable_gqa": True, "scale": 0.3}),
    "wider values": ((heads(2, 4, 33, 16), heads(2, 4, 50, 16), heads(2, 4, 50, 24)), {}),
    "bool mask": ((heads(2, 4, 33, 16), heads(2, 4, 50, 16), heads(2, 4, 50, 16)), {"attn_mask": KEEP}),
    "mask of keys": ((heads(2, 4, 33, 16), heads(2, 4, 50, 16), heads(2, 4, 50, 16)), {"attn_mask": KEEP[:, :, :1]}),
    "float mask": ((heads(2, 4, 33, 16), heads(2, 4, 50, 16), heads(2, 4, 50, 16)), {"attn_mask": heads(4, 33, 50)}),
    "one head": ((heads(3, 33, 16), heads(3, 50, 16), heads(3, 50, 16)), {"is_causal": True}),
    "rows alone": ((heads(33, 16), heads(50, 16), heads(50, 16)), {"attn_mask": heads(33, 50)}),
    "five dimensions": ((heads(2, 3, 4, 33, 16), heads(2, 3, 4, 50, 16), heads(2, 3, 4, 50, 16)), {"is_causal": True}),
    "five, masked": (
        (heads(2, 3, 4, 33, 16), heads(2, 3, 4, 50, 16), heads(2, 3, 4, 50, 16)), {"attn_mask": heads(2, 1, 1, 33, 50)},
    ),
    "five, masked by four": (
        (heads(2, 3, 4, 33, 16), heads(2, 3, 4, 50, 16), heads(2, 3, 4, 50, 16)), {"attn_mask": heads(3, 1, 33, 50)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls_mean_what_they_mean_in_torch(name: str) -> None:
    inputs, options = CALLS[name]
    leaves = [[x.clone().requires_grad_() for x in inputs] for _ in range(2)]
    ours = scaled_dot_product_attention(*leaves[0], **options)
    torchs = functional.scaled_dot_product_attention(*leaves[1], **options)
    torch.testing.assert_close(ours, torchs)
    upstream = torch.randn_like(torchs)
    for found, wanted in zip(*(torch.autograd.grad(out, x, upstream) for out, x in zip((ours, torchs), leaves, strict=True)),
                             strict=True):  # fmt: skip
        torch.testing.assert_close(found, wanted)


def test_a_masks_gradient() -> None:
    (q, k, v), _ = CALLS["plain"]
    masks = [heads(2, 4, 33, 50).requires_grad_() for _ in range(2)]
    masks[1] = masks[0].detach().clone().requires_grad_()
    scaled_dot_product_attention(q, k, v, masks[0]).sin().sum().backward()
    functional.scaled_dot_product_attention(q, k, v, masks[1]).sin().sum().backward()
    torch.testing.assert_close(masks[0].grad, masks[1].grad)


def test_a_row_without_keys_is_zero() -> None:
    (q, k, v), _ = CALLS["plain"]
    keep = torch.ones(33, 50, dtype=torch.bool)
    keep[7] = False
    out = scaled_dot_product_attention(q, k, v, keep)
    assert (out[:, :, 7] == 0).all()
    assert out.isfinite().all()


def test_masks_by_intervals() -> None:
    (q, k, v), _ = CALLS["causal, square"]
    padding = tessera.Mask.padding(torch.tensor([40, 25]))
    keep = (torch.arange(40) < torch.tensor([40, 25])[:, None])[:, None, None] & torch.ones(40, 40).tril().bool()
    ours = scaled_dot_product_attention(q, k, v, padding, is_causal=True)
    torch.testing.assert_close(ours, functional.scaled_dot_product_attention(q, k, v, keep))


def test_dropout_follows_torchs_generator() -> None:
    (q, k, v), _ = CALLS["plain"]
    torch.manual_seed(3)
    first = scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    second = scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    torch.manual_seed(3)
    assert torch.equal(first, scaled_dot_product_attention(q, k, v, dropout_p=0.25))
    assert not torch.equal(first, second)


def test_a_projections_heads_are_read_as_they_lie() -> None:
    """The result of (batch, seqlen, heads, dim) tensors seen head by head lies token by token: the next reshape is free."""
    q, k, v = (torch.randn(2, 40, 4, 16).transpose(1, 2) for _ in range(3))
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert out.transpose(1, 2).is_contiguous()


REFUSED = {
    "is_causal": lambda q: scaled_dot_product_attention(q, q, q, torch.ones(8, 8), is_causal=True),
    "query": lambda q: scaled_dot_product_attention(q[0, 0, 0], q, q),
    "key": lambda q: scaled_dot_product_attention(q, None, q),
    "mask": lambda q: scaled_dot_product_attention(q, q, q, "causal"),
}


@pytest.mark.parametrize("argument", REFUSED)
def test_what_is_not_served_is_refused_by_name(argument: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}=.*: .*; \w+"):
        REFUSED[argument](torch.randn(1, 2, 8, 16))
