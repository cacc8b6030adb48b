"""The small inputs that the tests of operators, gradients and torch.compile share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tessera import Mask

OFFSETS_Q = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
OFFSETS_K = torch.tensor([0, 4, 9, 11], dtype=torch.int32)

Function = Callable[..., Any]

DIFFERENTIABLE: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "scale": {"softmax_scale": 0.4},
    "negative scale": {"softmax_scale": -0.4},
    "softcap": {"softcap": 1.5},
    "softcap, causal": {"softcap": 1.5, "causal": True},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
    "dropout": {"dropout_p": 0.4, "seed": 7},
    "dropout, softcap, window": {"dropout_p": 0.2, "seed": 8, "softcap": 2.0, "window": (3, 0)},
    "padding": {"mask": Mask.padding(torch.tensor([3, 0]), query_end=torch.tensor([5, 4]))},
    "documents": {"mask": Mask.documents(torch.tensor([0, 0, 1, 3, 3]), torch.tensor([0, 0, 1, 2, 3, 3, 3]))},
}


def small(dtype: torch.dtype = torch.float64, requires_grad: bool = True, **shapes: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (2, 5, 4, 4), k and v (2, 7, 2, 4) unless said otherwise."""
    sizes = {"seqlen_q": 5, "seqlen_k": 7, "heads": 4, "heads_kv": 2, "dim": 4, "dim_v": 4} | shapes
    q = torch.randn(2, sizes["seqlen_q"], sizes["heads"], sizes["dim"], dtype=dtype)
    k = torch.randn(2, sizes["seqlen_k"], sizes["heads_kv"], sizes["dim"], dtype=dtype)
    v = torch.randn(2, sizes["seqlen_k"], sizes["heads_kv"], sizes["dim_v"], dtype=dtype)
    for x in (q, k, v):
        x.requires_grad_(requires_grad)
    return q, k, v


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def grads(function: Function, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a fixed random projection of everything `function` returns (rows with lse -inf left out)."""
    results = function(*inputs)
    generator = torch.Generator().manual_seed(5)
    total: Any = 0.0
    for x in results if isinstance(results, tuple) else (results,):
        weight = torch.randn(x.shape, generator=generator).to(x.dtype)
        total = total + torch.where(x.isfinite(), x, 0.0).mul(weight).sum()
    return torch.autograd.grad(total, inputs)


def gradcheck(function: Function, inputs: tuple[Tensor, ...]) -> bool:
    """Random projections of the Jacobian against differences, and no gradient for an undefined upstream."""
    return torch.autograd.gradcheck(function, inputs, fast_mode=True)
