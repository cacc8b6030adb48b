"""torch.compile with fullgraph=True, and torch.export: results and gradients are the eager ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from small_inputs import DIFFERENTIABLE, OFFSETS_K, OFFSETS_Q, Function, grads, small
from torch import Tensor

from tessera import Mask, attention, attention_varlen


def compiled(function: Function, backend: str = "aot_eager", dynamic: bool | None = None) -> Function:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)


def assert_compiles(function: Function, *inputs: Tensor, backend: str = "aot_eager") -> None:
    """The compiled function's results and gradients are the eager ones."""
    fast = compiled(function, backend)
    torch.testing.assert_close(fast(*inputs), function(*inputs))
    torch.testing.assert_close(grads(fast, *inputs), grads(function, *inputs))


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "deterministic"])
def test_compile(name: str) -> None:
    options = DIFFERENTIABLE.get(name, {"deterministic": True})
    assert_compiles(lambda q, k, v: attention(q, k, v, return_lse=True, **options), *small(torch.float32))


def test_compile_bias_and_sinks() -> None:
    bias, sinks = torch.randn(4, 1, 7, requires_grad=True), torch.randn(4, requires_grad=True)

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> Any:
        return attention(2 * q, k, v, bias=bias.tanh(), sinks=sinks + 1, causal=True) * 3

    assert_compiles(function, *small(torch.float32), bias, sinks)


def test_compile_varlen() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attention_varlen(q, k, v, OFFSETS_Q, OFFSETS_K, causal=True, return_lse=True)

    assert_compiles(function, *(torch.randn(n, 4, 8, requires_grad=True) for n in (9, 12, 12)))


def test_compile_mask_made_inside() -> None:
    """Masks are algebra on tensors: they trace too."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        ids = (torch.arange(7) // 3)[None]
        return attention(q, k, v, mask=Mask.documents(ids) & Mask.window(4, 0) & Mask.padding(torch.tensor([7, 5])))

    assert_compiles(function, *small(torch.float32, seqlen_q=7))


def test_compile_half_and_autocast() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return attention(q, k, v, causal=True)

    fast = compiled(function)
    inputs = small(torch.float32)
    assert fast(*inputs).dtype == torch.bfloat16
    torch.testing.assert_close(fast(*inputs), function(*inputs))


def test_compile_dynamic_shapes_compiles_once() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attention(q, k, v, causal=True, softcap=4.0, return_lse=True)

    fast = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for seqlen_q, seqlen_k in ((5, 7), (6, 9), (30, 70), (17, 4)):
        inputs = small(torch.float32, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        torch.testing.assert_close(fast(*inputs), function(*inputs))
        torch.testing.assert_close(grads(fast, *inputs), grads(function, *inputs))
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1, frames  # all of it in the first call


def test_compile_dynamic_window_scale_and_seed() -> None:
    """Numbers among the options may be symbols as well."""

    def function(q: Tensor, k: Tensor, v: Tensor, left: int, scale: float, seed: int) -> Tensor:
        return attention(q, k, v, window=(left, 0), softmax_scale=scale, dropout_p=0.5, seed=seed)

    fast = compiled(function, dynamic=True)
    inputs = small(torch.float32, requires_grad=False)
    for left, scale, seed in ((3, 0.5, 10), (2, 0.25, 11), (5, 1.5, 12)):
        torch.testing.assert_close(fast(*inputs, left, scale, seed), function(*inputs, left, scale, seed))


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    """Needs a C++ compiler, as inductor does on CPUs."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, causal=True).relu()

    assert_compiles(function, *small(torch.float32), backend="inductor")


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, causal=True)

    inputs = small(torch.float32, requires_grad=False)
    program = torch.export.export(Model(), inputs)
    torch.testing.assert_close(program.module()(*inputs), attention(*inputs, causal=True))
