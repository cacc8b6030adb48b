"""Calls that were made before: what changed between them is seen, of the thread, the tensors and packed sequences' offsets."""

from __future__ import annotations

import inspect
import itertools
import warnings
from typing import Any

import pytest
import torch
from small_inputs import leaf
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tessera
from tessera import attention, calls
from tessera.options import DenseOptions, PackedOptions


class Watching(TorchDispatchMode):
    """Notes the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Unguarded(Watching):
    """One that torch.compile's guards pass over, as that of selective checkpoints."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class WatchingFunctions(TorchFunctionMode):
    """Notes that it is asked."""

    seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_recalled_call_sees_the_threads_state(is_packed: bool) -> None:
    """Modes of both kinds, autocast, inference, duals: entered between two calls that are otherwise alike."""
    q, k, v = (torch.randn(*(() if is_packed else (1,)), 9, 2, 8) for _ in range(3))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    offsets = (cu, cu) if is_packed else ()

    def call() -> Tensor:
        out = tessera.attention_varlen(q, k, v, *offsets) if is_packed else attention(q, k, v)
        assert isinstance(out, Tensor)
        return out

    def agrees(found: Tensor) -> None:
        """And leaves the next plain call as it was."""
        assert torch.equal(found, expected)
        assert torch.equal(call(), expected)

    expected = [call() for _ in range(3)][-1]
    for mode in (Watching, Unguarded):
        with mode() as watching:
            found = call()
        assert "tessera.forward.default" in watching.seen
        agrees(found)
    with WatchingFunctions() as functions:
        found = call()
    assert functions.seen
    agrees(found)
    with torch.inference_mode():
        inside = [call() for _ in range(3)]
        assert all(x.is_inference() for x in inside)
    agrees(inside[-1].clone())
    assert not call().is_inference()
    with torch.autocast("cpu", torch.bfloat16):
        assert [call().dtype for _ in range(3)] == [torch.bfloat16] * 3
    q, k, v = (x.bfloat16() for x in (q, k, v))
    expected = call()
    with torch.autocast("cpu", torch.float16):
        assert [call().dtype for _ in range(3)] == [torch.float16] * 3
    with torch.autocast("cpu", torch.bfloat16):
        agrees([call() for _ in range(3)][-1])
    with forward_ad.dual_level():
        q = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="tangent"):
            call()


def test_what_autocast_made_of_a_call_is_not_recalled() -> None:
    """A first call under autocast has its inputs cast: tensors of that dtype are no such call under another autocast."""
    q, k, v = (torch.randn(1, 10, 2, 8) for _ in range(3))
    with torch.autocast("cpu", torch.float16):
        assert attention(q, k, v, softcap=2.5).dtype == torch.float16
    low = [x.half() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(*low, softcap=2.5).dtype == torch.bfloat16


def test_the_options_of_a_call_are_shown_and_others_refused() -> None:
    for call, options in ((attention, DenseOptions), (tessera.attention_varlen, PackedOptions)):
        shown = inspect.signature(call).parameters
        assert {name for name, one in shown.items() if one.kind is one.KEYWORD_ONLY} == {*options.__annotations__, "return_lse"}
    q = torch.randn(1, 5, 2, 8)
    for _ in range(2):
        with pytest.raises(TypeError, match="casual=True: there is no such option"):
            attention(q, q, q, casual=True)  # type: ignore[call-overload]


def test_repeated_packed_calls_are_recalled_with_their_own_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(12, 2, 8) for _ in range(3))
    offsets = [torch.tensor(ends, dtype=torch.int32) for ends in ([0, 5, 12], [0, 5, 12], [0, 1, 10], [0, 5, 12, 12])]
    pairs = list(itertools.product(offsets, repeat=2))[:11]
    pairs = [(a, b) for a, b in pairs if len(a) == len(b)]
    expected = [tessera.attention_varlen(q, k, v, a, b, causal=True, return_lse=True)[0] for a, b in pairs]
    for _ in range(2):
        for (a, b), out in zip(pairs, expected, strict=True):
            assert torch.equal(tessera.attention_varlen(q, k, v, a, b, causal=True), out)
    wrong = torch.tensor([0, 7, 5], dtype=torch.int32)
    for bad in ((wrong, offsets[0]), (wrong, wrong), (offsets[0], wrong)):
        with pytest.raises(ValueError, match="cu_seqlens_"):
            tessera.attention_varlen(q, k, v, *bad, causal=True)
    with pytest.raises(TypeError, match="cu_seqlens_k"):
        tessera.attention_varlen(q, k, v, offsets[0], [0, 5, 12], causal=True)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="int32"):
        tessera.attention_varlen(q, k, v, *(offsets[0].long(),) * 2, causal=True)
    monkeypatch.setattr(calls, "prepare", None)
    for (a, b), out in zip(pairs, expected, strict=True):
        assert torch.equal(tessera.attention_varlen(q, k, v, a, b, causal=True), out)


@pytest.mark.parametrize("shared", [False, True])
def test_repeated_packed_calls_with_gradients_are_recalled(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [leaf(12, 2, 8) for _ in range(3)]
    cu_q = torch.tensor([0, 5, 12], dtype=torch.int32)
    cu_k = cu_q if shared else torch.tensor([0, 7, 12], dtype=torch.int32)

    def gradients(**options: Any) -> tuple[Tensor, ...]:
        found = tessera.attention_varlen(*inputs, cu_q, cu_k, causal=True, **options)
        out = found[0] if isinstance(found, tuple) else found
        return torch.autograd.grad(out.square().sum(), inputs)

    for ends in ([0, 5, 12], [0, 1, 9]):
        cu_q.copy_(torch.tensor(ends))
        expected = gradients(return_lse=True)
        for _ in range(3):
            assert all(map(torch.equal, gradients(), expected))
    out = tessera.attention_varlen(*inputs, cu_q, cu_k, causal=True)
    with pytest.raises(NotImplementedError, match="reference"):
        torch.autograd.grad(out.sum(), inputs, create_graph=True)[0].sum().backward()
    monkeypatch.setattr(tessera.api, "Request", None)
    assert all(map(torch.equal, gradients(), expected))


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["torch's kernel", "tiles"])
def test_what_was_called_without_gradients_has_them_when_they_are_recorded(options: dict[str, Any], is_packed: bool) -> None:
    """Of the same tensors, which say that they want them either way: torch's guards don't see torch.no_grad."""
    inputs = [leaf(*(() if is_packed else (1,)), 9, 2, 8) for _ in range(3)]
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)

    def call() -> Tensor:
        out = tessera.attention_varlen(*inputs, cu, cu, **options) if is_packed else attention(*inputs, **options)
        assert isinstance(out, Tensor)
        return out

    for _ in range(3):
        with torch.no_grad():
            plain = call()
        assert not plain.requires_grad
        out = call()
        assert torch.equal(out, plain)
        assert type(out.grad_fn).__name__ in ("_AttentionBackward", "_PlainAttentionBackward")
    expected = torch.autograd.grad(attention_of(inputs, cu if is_packed else None, options).square().sum(), inputs)
    for gradient, right in zip(torch.autograd.grad(out.square().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(gradient, right)


def attention_of(inputs: list[Tensor], cu: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The whole way, as a call that wants lse takes it."""
    if cu is None:
        return attention(*inputs, return_lse=True, **options)[0]
    return tessera.attention_varlen(*inputs, cu, cu, return_lse=True, **options)[0]


@pytest.mark.parametrize("shared", [False, True])
def test_a_checkpoint_finds_as_many_tensors_as_it_left(shared: bool) -> None:
    """A block's first pass goes the whole way, and what is computed again the short one: both keep the same tensors."""
    inputs = [leaf(12, 2, 8) for _ in range(3)]
    cu_q = torch.tensor([0, 5, 12], dtype=torch.int32)
    cu_k = cu_q if shared else cu_q.clone()

    def block(*tensors: Tensor) -> Tensor:
        return tessera.attention_varlen(*(x * 1 for x in tensors), cu_q, cu_k, causal=True, softcap=7.5)

    expected = torch.autograd.grad(block(*inputs).square().sum(), inputs)
    for table in (calls._plain, *calls.latest):
        table.clear()
    for _ in range(2):
        out = checkpoint(block, *inputs, use_reentrant=False)
        assert isinstance(out, Tensor)
        assert all(map(torch.equal, torch.autograd.grad(out.square().sum(), inputs), expected))


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["torch's kernel", "tiles"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_what_torch_jit_trace_records_is_the_operator(is_packed: bool, options: dict[str, Any]) -> None:
    """Not what a backend does for tensors of these sizes (on a GPU nothing that a trace sees: out would be a constant of it)."""

    def call(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        out = tessera.attention_varlen(q, k, v, cu, cu, **options) if is_packed else attention(q, k, v, causal=True, **options)
        assert isinstance(out, Tensor)
        return out

    def inputs(seqlen: int) -> tuple[Tensor, ...]:
        shape = (seqlen, 2, 8) if is_packed else (1, seqlen, 2, 8)
        return *(torch.randn(shape) for _ in range(3)), torch.tensor([0, 4, seqlen], dtype=torch.int32)

    example, others = inputs(9), inputs(300)
    for _ in range(3):
        call(*example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; tracers warn of shapes that are looked at
        traced = torch.jit.trace(call, example)
    assert "tessera::forward" in str(traced.graph)
    assert torch.equal(traced(*others), call(*others))


@pytest.mark.parametrize("returns", ["out", "lse"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["torch's kernel", "tiles"])
def test_many_gradients_at_once_are_those_of_each(options: dict[str, Any], returns: str) -> None:
    """autograd's is_grads_batched, which a vectorized jacobian uses: its tensors have no memory of their own."""
    inputs = [leaf(1, 9, 2, 8) for _ in range(3)]
    for _ in range(3):  # the last one recalled
        found = attention(*inputs, causal=True, return_lse=returns == "lse", **options)
        result = found[1] if isinstance(found, tuple) else found
        upstream = torch.randn(4, *result.shape)
        together = torch.autograd.grad(result, inputs, upstream, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(result, inputs, one, retain_graph=True) for one in upstream]
        for many, ones in zip(together, zip(*each, strict=True), strict=True):
            torch.testing.assert_close(many, torch.stack(ones))


SOME_LENGTHS = torch.tensor([3, 9], dtype=torch.int32)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"causal": True, "softcap": 3.0}, {"window": (3, 0)}, {"dropout_p": 0.3, "seed": 1},
        {"mask": tessera.Mask.padding(SOME_LENGTHS)}, {"mask": tessera.Mask.causal() & tessera.Mask.padding(SOME_LENGTHS)},
        {"mask": tessera.Mask.documents(torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]))}, {"sinks": torch.ones(2), "causal": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_default_device_is_for_new_tensors_alone(options: dict[str, Any]) -> None:
    """It is a mode of torch functions, and the only one that has nothing to see of a call, whose tensors have their devices."""
    inputs = [leaf(2, 9, 2, 8) for _ in range(3)]

    def results() -> tuple[Tensor, ...]:
        out = attention(*inputs, **options)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    expected = results()
    with torch.device("meta"), Watching() as watching:
        attention(*inputs, **options)
    assert "tessera.forward.default" in watching.seen
    with torch.device("meta"):
        for _ in range(2):
            assert all(map(torch.equal, results(), expected))


def test_under_a_default_device_calls_are_recalled(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(12, 2, 8) for _ in range(3))
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    with torch.device("meta"):
        packed = [tessera.attention_varlen(q, k, v, cu, cu, causal=True) for _ in range(2)]
        dense = [attention(q[None], k[None], v[None], causal=True) for _ in range(2)]
        monkeypatch.setattr(calls, "prepare", None)
        assert torch.equal(tessera.attention_varlen(q, k, v, cu, cu, causal=True), packed[0])
        assert torch.equal(attention(q[None], k[None], v[None], causal=True), dense[0])
