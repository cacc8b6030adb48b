"""The torch operators: opcheck, gradients, torch.compile, and the rest of torch that a tensor function must live with."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tessera
from tessera import Mask, attention, attention_varlen, operators, plan
from tessera.cases import CASES, Case
from tessera.operands import Request, bind

NAMES = operators._NAMES
OFFSETS_Q = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
OFFSETS_K = torch.tensor([0, 4, 9, 11], dtype=torch.int32)

Function = Callable[..., Any]


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


# opcheck

TINY = {"seqlen_q": 6, "seqlen_k": 9, "heads_kv": 2, "head_dim": 8}
OPCHECKED = {
    "causal": Case("", causal=True, **TINY),
    "window, softcap": Case("", window=(3, 1), softcap=5.0, head_dim_v=16, **TINY),
    "bias, sinks": Case("", bias=(1, 4, 6, 1), sinks=True, **TINY),
    "alibi, dropout, padding": Case("", alibi="batch", dropout_p=0.3, key_end=(0, 7), query_end=(6, 3), **TINY),
    "documents": Case("", documents=(2, 4), **(TINY | {"seqlen_k": 6})),
    "varlen": Case("", lengths_q=(3, 0, 4), lengths_k=(4, 2, 5), used_k=(3, 2, 5), causal=True, heads_kv=2, head_dim=8),
}


def arguments(request: Request) -> tuple[Any, ...]:
    return tuple(getattr(request, name) for name in NAMES)


@pytest.mark.parametrize("name", OPCHECKED)
@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no grad"])
def test_opcheck_forward(name: str, requires_grad: bool) -> None:
    """Schema, autograd registration, fake tensors and AOT dispatch with static and dynamic shapes."""
    request = OPCHECKED[name].request(requires_grad=requires_grad)
    torch.library.opcheck(torch.ops.tessera.forward.default, arguments(request))


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck_backward(name: str) -> None:
    request = OPCHECKED[name].request(requires_grad=True)
    out, lse = (x.detach() for x in operators.forward(request))
    tensors = {n: t.detach() for n in NAMES if isinstance(t := getattr(request, n), Tensor)}
    dlse = torch.randn_like(lse)
    torch.library.opcheck(
        torch.ops.tessera.backward.default, (torch.randn_like(out), dlse, out, lse, *arguments(request._replace(**tensors)))
    )


# gradcheck


def gradcheck(function: Function, inputs: tuple[Tensor, ...]) -> bool:
    """Random projections of the Jacobian against differences, and no gradient for an undefined upstream."""
    return torch.autograd.gradcheck(function, inputs, fast_mode=True)


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


# torch.compile


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


# Refusals of torch's transforms, in words


def test_double_backward_is_refused() -> None:
    q, k, v = small()
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.gradgradcheck(lambda *x: attention(*x), (q, k, v))
    (dq,) = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        dq.sum().backward()


def test_vmap_is_refused() -> None:
    q, k, v = small(requires_grad=False)
    with pytest.raises(NotImplementedError, match="fold the mapped dimension into the batch"):
        torch.vmap(attention)(q[None], k[None], v[None])


def test_forward_mode_is_refused() -> None:
    """A custom operator drops tangents silently: a wrong derivative of 0, had it not been refused."""
    q, k, v = small(requires_grad=False)
    for name, function in {
        "q": lambda x: attention(x, k, v),
        "sinks": lambda x: attention(q, k, v, sinks=x.sum(dim=(0, 1, 3))),
    }.items():
        with pytest.raises(NotImplementedError, match=f"{name} carries a tangent"):
            torch.func.jvp(function, (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(v, v)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            attention(q, k, dual)


def test_functional_grad_is_refused() -> None:
    q, k, v = small(requires_grad=False)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.grad(lambda x: attention(x, k, v).sum())(q)


# Living in torch


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "bias": torch.ones(5, 7)}], ids=["aten", "tiled"])
def test_autocast(options: dict[str, Any]) -> None:
    q, k, v = small(torch.float32)
    expected = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **options)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attention(q, k, v, return_lse=True, **options)
        assert attention(q.bfloat16(), k, v).dtype == torch.bfloat16  # mixed inputs, as a norm in float32 leaves them
        (inside,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    (outside,) = torch.autograd.grad(out.sum(), q)
    assert outside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)  # autocast does not reach into the kernels
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert attention(q, k, v, **options).dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}])
def test_one_tensor_as_q_k_and_v(options: dict[str, Any]) -> None:
    x = leaf(2, 6, 4, 8)
    assert gradcheck(lambda x: attention(x, x, x, causal=True, **options), (x,))


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}])
def test_views_of_one_projection(options: dict[str, Any]) -> None:
    """q, k and v as slices of one (batch, seqlen, heads + 2 kv heads, dim) tensor, gradients summed into it."""

    def function(qkv: Tensor) -> Tensor:
        q, k, v = qkv.split((4, 2, 2), dim=2)
        return attention(q, k, v, causal=True, **options)

    assert gradcheck(function, (leaf(2, 6, 8, 4),))
    packed = leaf(2, 6, 3, 4, 8)
    (from_views,) = grads(lambda x: attention(*x.unbind(2), **options), packed)
    (from_copies,) = grads(lambda x: attention(*(y.clone() for y in x.unbind(2)), **options), packed)
    torch.testing.assert_close(from_views, from_copies)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"causal": True}])
def test_expanded_and_strided_upstream_gradients(options: dict[str, Any]) -> None:
    q, k, v = small()
    out, lse = attention(q, k, v, return_lse=True, **options)
    strided = torch.randn(out.shape[::-1], dtype=out.dtype).permute(3, 2, 1, 0)
    transposed = lse.detach().mT.contiguous().mT
    for dout in (torch.ones((), dtype=out.dtype).expand(out.shape), strided):
        for dlse in (torch.zeros_like(lse), torch.full((), 0.5, dtype=lse.dtype).expand(lse.shape), transposed):
            got = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse), retain_graph=True)
            want = torch.autograd.grad((out, lse), (q, k, v), (dout.contiguous(), dlse.contiguous()), retain_graph=True)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)


def test_expanded_inputs() -> None:
    """Heads or batch entries that share memory (stride 0)."""
    q, k, v = small(requires_grad=False)
    k1, v1 = k[:1].expand(2, -1, -1, -1), v[:, :, :1].expand(-1, -1, 2, -1)
    torch.testing.assert_close(attention(q, k1, v1), attention(q, k1.contiguous(), v1.contiguous()))
    bias = torch.randn(1, 1, 1, 7, dtype=q.dtype).expand(2, 4, 5, 7)
    torch.testing.assert_close(attention(q, k, v, bias=bias), attention(q, k, v, bias=bias.contiguous()))


def test_no_grad_and_inference_mode() -> None:
    q, k, v = small()
    expected = attention(q, k, v)
    assert expected.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = attention(q, k, v)
        assert not out.requires_grad
        torch.testing.assert_close(out, expected.detach())
    with torch.inference_mode():
        made_inside = small(requires_grad=False)
        assert attention(*made_inside, return_lse=True)[1].isfinite().all()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant: bool) -> None:
    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, causal=True, dropout_p=0.3, seed=5)

    again = small()
    once = [x.detach().clone().requires_grad_() for x in again]
    checkpoint(block, *again, use_reentrant=use_reentrant).square().sum().backward()
    block(*once).square().sum().backward()
    for a, b in zip(again, once, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_saved_tensors_are_inputs_and_results_alone() -> None:
    """No score, no probability and no copy is kept for the backward: q, k, v, out, lse and what the options gave."""
    q, k, v = small()
    bias, sinks = leaf(5, 7), leaf(4)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, lse = attention(q, k, v, bias=bias, sinks=sinks, softcap=2.0, dropout_p=0.1, seed=0, causal=True, return_lse=True)
    known = {x.data_ptr() for x in (q, k, v, out, lse, bias, sinks)}
    assert {x.data_ptr() for x in saved} <= known
    assert len(saved) == len(known)


def test_graph_is_freed() -> None:
    q, k, v = small()
    out = attention(q, k, v)
    gone = weakref.ref(out.grad_fn)
    del out
    gc.collect()
    assert gone() is None


def test_changed_in_place_is_noticed() -> None:
    q, k, v = small()
    out = attention(q * 1, doubled := k * 2, v)
    doubled.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_inputs_are_not_written() -> None:
    for case in (CASES["everything"], CASES["varlen, softcap, alibi, dropout"], CASES["causal"]):
        request = case.request(requires_grad=True)
        before = {n: t.clone() for n in NAMES if isinstance(t := getattr(request, n), Tensor)}
        out, _ = operators.forward(request)
        out.sum().backward()
        for name, value in before.items():
            assert torch.equal(getattr(request, name), value), name


def test_results_are_fresh_and_contiguous() -> None:
    for case in (Case("", strides="head_major"), Case("", strides="gapped", softcap=3.0), CASES["varlen"]):
        request = case.request()
        out, lse = operators.forward(request)
        assert out.is_contiguous()
        assert lse.is_contiguous()
        problem, _ = bind(request)
        assert out.shape == problem.out_shape
        assert lse.shape == problem.lse_shape


def test_plans_and_problems_copy_and_pickle() -> None:
    made = plan((2, 64, 8, 64), (2, 64, 2, 64), causal=True, softcap=3.0, sinks=(8,), requires_grad=True, backend="torch")
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert again == made
        assert hash(again.problem) == hash(made.problem)
        assert str(again) == str(made)


def test_unsupported_crosses_processes() -> None:
    with pytest.raises(tessera.Unsupported) as caught:
        plan((1, 8, 2, 16), (1, 8, 2, 16), device="h200", backend="cpu")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.refusals == caught.value.refusals


def test_meta_tensors_give_shapes() -> None:
    q, k, v = (x.detach().to("meta") for x in small(torch.bfloat16, dim_v=16))
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    assert (out.shape, out.dtype) == ((2, 5, 4, 16), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 5), torch.float32)


def test_plan_is_what_the_call_does() -> None:
    """The kernel a plan names is the one that runs: the two read the same Problem."""
    q, k, v = small(torch.float32)
    for options in ({}, {"causal": True}, {"softcap": 2.0}, {"return_lse": True}):
        made = plan(q, k, v, **options)
        assert made.forward.kernel == ("tiled" if "softcap" in options else "aten-flash")
        assert made.backward is not None
        assert plan(q.detach(), k.detach(), v.detach(), **options).backward is None
        with torch.no_grad():
            assert plan(q, k, v, **options).backward is None
    with torch.autocast("cpu", torch.bfloat16):
        assert plan(q, k, v).problem.dtype == torch.bfloat16


@pytest.mark.parametrize("lowest", [-1e30, torch.finfo(torch.float32).min])
def test_bias_of_huge_negative_numbers(lowest: float) -> None:
    """Masks as Hugging Face writes them: the lowest finite number masks beside others, and a row of nothing else is even."""
    q, k, v = small(torch.float32)
    bias = torch.zeros(5, 7)
    bias[1, 3:] = lowest
    bias[2] = lowest
    out, lse = attention(q, k, v, bias=bias, return_lse=True)
    torch.testing.assert_close(out[:, 1], attention(q, k[:, :3], v[:, :3])[:, 1])
    torch.testing.assert_close(out[:, 2], v.mean(dim=1).repeat_interleave(2, dim=1))
    assert lse.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))
