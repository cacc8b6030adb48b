"""The torch operators: opcheck, refusals in words, and the rest of torch that a tensor function must live with."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import weakref
from typing import Any

import pytest
import torch
from small_inputs import gradcheck, grads, leaf, small
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tessera
from tessera import attention, calls, operators, plan
from tessera.cases import CASES, Case
from tessera.operands import Request, bind

NAMES = operators._NAMES

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


@pytest.mark.parametrize("options", [{"causal": True}, {"softcap": 3.0, "window": (2, 1)}], ids=["causal", "window, softcap"])
def test_functional_gradients(options: dict[str, Any]) -> None:
    """torch.func.grad and vjp give what autograd gives; what they would compose to is refused in words."""
    inputs = (*small(), leaf(5, 7), leaf(4))  # q, k, v, bias, sinks

    def loss(*inputs: Tensor) -> Tensor:
        q, k, v, bias, sinks = inputs
        out, lse = attention(q, k, v, bias=bias, sinks=sinks, return_lse=True, **options)
        return out.pow(2).sum() + lse.sin().sum()

    plain = tuple(x.detach() for x in inputs)
    wanted = torch.autograd.grad(loss(*inputs), inputs)
    for found, expected in zip(torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))(*plain), wanted, strict=True):
        torch.testing.assert_close(found, expected)
    found, pullback = torch.func.vjp(loss, *plain)
    assert found == loss(*plain)
    torch.testing.assert_close(pullback(torch.ones_like(found))[2], wanted[2])
    for composed, words in (
        (torch.func.hessian(loss), "carries a tangent"),
        (torch.func.grad(lambda *x: torch.func.grad(loss)(*x).sum()), "second derivatives"),
        (torch.func.jacrev(lambda *x: attention(*x[:3], **options)), "torch.vmap"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            composed(*plain)


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


def test_no_call_compares_a_tensor_with_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor answers that by way of an exception, which is more than ten microseconds of the call's host time."""
    compare = Tensor.__eq__

    def watched(self: Tensor, other: object) -> Any:
        assert other is not None
        return compare(self, other)

    monkeypatch.setattr(Tensor, "__eq__", watched)
    q, k, v = (torch.randn(12, 2, 8, requires_grad=True) for _ in range(3))
    offsets = torch.tensor([0, 5, 12], dtype=torch.int32)
    mask = tessera.Mask.documents(torch.tensor([[0] * 5 + [1] * 7]))
    tessera.attention_varlen(q, k, v, offsets, offsets, causal=True).sum().backward()
    attention(*(x[None] for x in (q, k, v)), bias=torch.zeros(12, 12), mask=mask, sinks=torch.zeros(2)).sum().backward()


def test_a_tensor_that_outlived_its_transform_is_no_recalled_one() -> None:
    """What torch.func wrapped stays a wrapper without storage when the transform is over: such calls take the whole way."""
    kept: list[Tensor] = []
    x = torch.randn(2, 11, 4, 8)

    def square(y: Tensor) -> Tensor:
        kept.append(y.clone())
        return (y * y).sum()

    torch.func.grad(square)(x)
    k, v = (torch.randn(2, 11, 4, 8, requires_grad=True) for _ in range(2))
    outs = [attention(q, k, v, causal=True) for q in (x, x, kept[0], kept[0])]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (k, v)))


def test_a_repeated_call_is_recalled_and_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v alone, without gradients: what a call needs is looked up by shapes and options, and the Request is not built."""
    q, k, v = (torch.randn(2, 11, 4, 8) for _ in range(3))
    variations: list[dict[str, Any]] = [{}, {"causal": True}, {"window": (2, 1)}, {"softcap": 3.0}, {"softmax_scale": 0.2}]
    first = [attention(q, k, v, **options) for options in variations]
    wide = torch.randn(2, 11, 4, 16)[..., ::2].transpose(0, 1).contiguous().transpose(0, 1)
    elsewhere = attention(wide, k, v)
    with monkeypatch.context() as patched:
        patched.setattr(tessera.api, "Request", None)
        for options, expected in zip(variations, first, strict=True):
            assert torch.equal(attention(q, k, v, **options), expected)
        assert torch.equal(attention(wide, k, v), elsewhere)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(first, 2))


def test_the_latest_of_some_words_fits_like_tensors_alone() -> None:
    """Tensors of other shapes, strides, dtypes or wishes for gradients find what is theirs, in any order."""
    q, k, v = (torch.randn(2, 11, 4, 8) for _ in range(3))
    wide = torch.randn(2, 11, 4, 16)[..., ::2].transpose(0, 1).contiguous().transpose(0, 1)
    kinds = [(q, k, v), (q[:, :5], k, v), (q[:1], k[:1], v[:1]), (wide, k, v), (q.double(), k.double(), v.double()), (q, q, q)]
    kinds.append((q.clone().requires_grad_(), k, v))
    expected = [attention(*inputs) for inputs in kinds]
    for first, second in itertools.product(range(len(kinds)), repeat=2):
        for which in (first, first, second):
            out = attention(*kinds[which])
            assert torch.equal(out, expected[which])
            assert out.requires_grad == expected[which].requires_grad


def test_without_its_guards_a_call_is_recalled_by_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guards are no public name of PyTorch's."""
    q, k, v = (torch.randn(2, 13, 4, 8) for _ in range(3))
    with monkeypatch.context() as patched:
        patched.setattr(calls, "TensorGuards", None)
        expected = attention(q, k, v)
        patched.setattr(tessera.api, "Request", None)
        assert torch.equal(attention(q, k, v), expected)
        assert torch.equal(attention(q, k, v), expected)


def test_a_repeated_call_with_gradients_is_recalled_and_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = leaf(2, 4, 11, 8)
    inputs = [leaf(2, 11, 4, 8) for _ in range(3)]

    def gradients(**options: Any) -> list[Tensor]:
        return [
            *torch.autograd.grad(attention(*inputs, **options).square().sum(), inputs),
            *torch.autograd.grad(attention(wide.transpose(1, 2), *inputs[1:], **options).sum(), [wide, inputs[2]]),
        ]

    variations: list[dict[str, Any]] = [{}, {"causal": True}, {"deterministic": True, "softcap": 3.0}]
    first = [gradients(**options) for options in variations]
    with monkeypatch.context() as patched:
        patched.setattr(tessera.api, "Request", None)
        for options, expected in zip(variations, first, strict=True):
            assert all(map(torch.equal, gradients(**options), expected))
        with pytest.raises(NotImplementedError, match="reference"):
            torch.autograd.grad(attention(*inputs).sum(), inputs, create_graph=True)[0].sum().backward()
        out = attention(*inputs)
        assert attention(inputs[0], *(x.detach() for x in inputs[1:])).requires_grad
    with torch.no_grad():
        assert not attention(*inputs).requires_grad
        inputs[1].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_checkpoint_computes_a_first_call_again_by_a_recalled_one() -> None:
    """And saved tensors may come back with other strides than they were saved with."""
    q, k, v = (leaf(1, 4, 13, 8) for _ in range(3))

    def block(*heads_first: Tensor) -> Tensor:
        return attention(*(x.transpose(1, 2) for x in heads_first), causal=True)

    again = torch.autograd.grad(checkpoint(block, q, k, v, use_reentrant=False).square().sum(), (q, k, v))
    expected = torch.autograd.grad(block(q, k, v).square().sum(), (q, k, v))
    assert all(map(torch.equal, again, expected))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.contiguous()):
        packed = block(q, k, v).square().sum()
    for found, wanted in zip(torch.autograd.grad(packed, (q, k, v)), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_what_is_recalled_never_hides_who_watches() -> None:
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    expected = [attention(q, k, v) for _ in range(2)][1]
    out, lse = attention(q, k, v, return_lse=True)
    assert torch.equal(out, expected)
    assert lse.shape == (1, 2, 9)
    leaf_q = q.clone().requires_grad_()
    for _ in range(2):
        leaf_q.grad = None
        attention(leaf_q, k, v).sum().backward()
        assert leaf_q.grad is not None
    assert not attention(q, k, v).requires_grad
    with torch.no_grad():
        assert not attention(leaf_q, k, v).requires_grad
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert attention(q, k, v).dtype == torch.bfloat16
        with torch.inference_mode():
            assert attention(q, k, v).is_inference()
        assert not attention(q, k, v).is_inference()
        assert torch.equal(torch.func.grad(lambda x: attention(x, k, v).sum())(q), leaf_q.grad)
    assert torch.compile(attention, backend="eager", fullgraph=True)(q, k, v).equal(expected)
    with pytest.raises(ValueError, match="k"):
        attention(q, k[:, :, :, :4], v)
    with pytest.raises(TypeError, match="q"):
        attention(q.to_sparse(), k, v)
