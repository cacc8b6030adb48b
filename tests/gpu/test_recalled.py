"""Calls that were made before and go the short way: equal bits to the whole way's, whatever has changed between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tessera
from tessera import calls

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

Call = Callable[[], Tensor]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def offsets(*ends: int) -> Tensor:
    return torch.tensor([0, *ends], dtype=torch.int32, device="cuda")


def dense(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    """With lse a call takes the whole way."""
    long = tessera.attention(q, k, v, return_lse=True, **options)[0]
    outs = [tessera.attention(q, k, v, **options) for _ in range(3)]
    assert all(torch.equal(long, out) for out in outs)
    return outs[-1]


def packed(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, **options: object) -> Tensor:
    long = tessera.attention_varlen(q, k, v, cu_q, cu_k, return_lse=True, **options)[0]
    outs = [tessera.attention_varlen(q, k, v, cu_q, cu_k, **options) for _ in range(3)]
    assert all(torch.equal(long, out) for out in outs)
    return outs[-1]


def some_calls() -> Iterator[Call]:
    q, k, v = random(2, 300, 4, 64), random(2, 300, 2, 64), random(2, 300, 2, 64)
    qkv = random(2, 300, 3, 4, 64)
    wide = random(2, 4, 300, 64).transpose(1, 2)
    shifted = random(2 * 300 * 4 * 64 + 3)[3:].view(2, 300, 4, 64)  # an address that TMA can't reach
    yield lambda: dense(q, k, v, causal=True)
    yield lambda: dense(q[:, :77], k, v, causal=True)
    yield lambda: dense(wide, k, v, causal=True)
    yield lambda: dense(shifted, k, v, causal=True)
    yield lambda: dense(*qkv.unbind(2), causal=True)
    yield lambda: dense(q.half(), k.half(), v.half(), causal=True)
    yield lambda: dense(random(1, 65, 2, 96), random(1, 65, 2, 96), random(1, 65, 2, 96), causal=True)
    rows = [random(500, heads, 64) for heads in (4, 2, 2)]
    two, three = offsets(200, 500), offsets(1, 1, 333)
    every_second = torch.stack((two, two + 7), 1)[:, 0]
    yield lambda: packed(*rows, two, two, causal=True)
    yield lambda: packed(*rows, three, three, causal=True)
    yield lambda: packed(*rows, offsets(300, 400), two, causal=True)
    yield lambda: packed(*rows, two.clone(), two, causal=True)
    yield lambda: packed(*rows, every_second, two, causal=True)
    moved = [random(500 * heads * 64 + 5)[5:].view(500, heads, 64) for heads in (4, 2, 2)]
    yield lambda: packed(*moved, two, two, causal=True)


def test_whatever_was_called_before() -> None:
    made = list(some_calls())
    with torch.no_grad():
        for first in made:
            for second in made:
                first()
                second()


def test_streams_graphs_and_modes() -> None:
    """Of the same words and tensors, so that nothing but the thread's state is other than before."""
    q, k, v = random(2, 300, 4, 64), random(2, 300, 2, 64), random(2, 300, 2, 64)
    rows, cu = [random(500, heads, 64) for heads in (4, 2, 2)], offsets(200, 500)
    both: list[Call] = [
        lambda: tessera.attention(q, k, v, causal=True),
        lambda: tessera.attention_varlen(*rows, cu, cu, causal=True),
    ]
    for call, input_ in zip(both, (q, rows[0]), strict=True):
        wanted = [call() for _ in range(3)][-1]
        assert wanted.dtype == torch.bfloat16
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            aside = call()
            torch.cuda.current_stream().synchronize()
        assert torch.equal(aside, wanted)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        with torch.inference_mode():
            inside = call()
        assert inside.is_inference()
        assert torch.equal(inside, wanted)
        again = call()
        assert not again.is_inference()
        with torch.autocast("cuda", torch.float16):
            assert call().dtype == torch.float16
            assert call().dtype == torch.float16
        assert call().dtype == torch.bfloat16
        input_.copy_(torch.randn_like(input_))
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, call())
        assert not torch.equal(captured, wanted)


@pytest.mark.parametrize("is_packed", [False, True])
def test_with_gradients(is_packed: bool) -> None:
    shape = (500,) if is_packed else (1, 500)
    inputs = [random(*shape, heads, 64).requires_grad_() for heads in (4, 2, 2)]
    cu = offsets(200, 500)

    def gradients(**options: object) -> list[Tensor]:
        if is_packed:
            out = tessera.attention_varlen(*inputs, cu, cu, causal=True, deterministic=True, **options)
        else:
            out = tessera.attention(*inputs, causal=True, deterministic=True, **options)
        out = out[0] if isinstance(out, tuple) else out
        return list(torch.autograd.grad(out.float().square().sum(), inputs))

    for ends in ((200, 500), (77, 450)):
        cu.copy_(offsets(*ends))
        with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
            gradients()
        long = gradients(return_lse=True)
        for _ in range(3):
            assert all(map(torch.equal, gradients(), long))
    with torch.no_grad():
        plain = tessera.attention_varlen(*inputs, cu, cu, causal=True) if is_packed else tessera.attention(*inputs, causal=True)
        assert not plain.requires_grad


def test_offsets_are_read_under_debug() -> None:
    rows, cu, wrong = [random(500, 2, 64) for _ in range(3)], offsets(200, 500), offsets(200, 100)
    with torch.no_grad():
        for _ in range(2):
            tessera.attention_varlen(*rows, cu, cu, causal=True)
        with tessera.debug(), pytest.raises(ValueError, match="cu_seqlens_q"):
            tessera.attention_varlen(*rows, wrong, cu, causal=True)


def test_most_calls_go_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, cu = [random(500, 2, 64) for _ in range(3)], offsets(200, 500)
    q, k, v = (random(1, 500, 2, 64) for _ in range(3))
    both: list[Call] = [
        lambda: tessera.attention(q, k, v, causal=True),
        lambda: tessera.attention_varlen(*rows, cu, cu, causal=True),
    ]
    with torch.no_grad():
        expected = [[call() for _ in range(2)][-1] for call in both]
        monkeypatch.setattr(calls, "recall", None)
        monkeypatch.setattr(calls, "prepare", None)
        assert all(torch.equal(call(), out) for call, out in zip(both, expected, strict=True))
        with torch.device("cuda"):  # a mode, but none that watches
            assert all(torch.equal(call(), out) for call, out in zip(both, expected, strict=True))


def test_checkpoints_traces_and_many_gradients() -> None:
    """Who looks at a call from outside finds the operator, or the same tensors kept, whichever way it goes."""
    inputs = [random(500, heads, 64).requires_grad_() for heads in (4, 2, 2)]
    cu = offsets(200, 500)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tessera.attention_varlen(q, k, v, cu, cu, causal=True, deterministic=True, softcap=9.5)

    expected = call(*inputs)
    upstream = torch.randn(2, *expected.shape, device="cuda", dtype=expected.dtype)
    for table in (calls._plain, *calls.latest):
        table.clear()
    for _ in range(3):
        out = checkpoint(lambda *x: call(*(one * 1 for one in x)), *inputs, use_reentrant=False)
        each = torch.autograd.grad(out, inputs, upstream[0])
        out = call(*inputs)
        together = torch.autograd.grad(out, inputs, upstream, is_grads_batched=True)
        assert torch.equal(out, expected)
        assert all(torch.equal(many[0], one) for many, one in zip(together, each, strict=True))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(call, inputs)
        others = [random(500, heads, 64) for heads in (4, 2, 2)]
        assert torch.equal(traced(*others), call(*others))
