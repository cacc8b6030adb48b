"""Training on Hopper: torch.compile, CUDA graphs, activation checkpointing, autocast, and a model that learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from operator_calls import Calls
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tessera import attention, attention_varlen
from tessera.bench.gpt import GptShape, Recompute, Trainer
from tessera.bench.learning import LearningOrder, Lesson, exact_attention
from tessera.integrations.checkpoint import contexts

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

BATCH, SEQLEN, HEADS, DIM, LAYERS = 2, 300, 4, 128, 3
OFFSETS = torch.tensor([0, 100, 100, 437, BATCH * SEQLEN], dtype=torch.int32, device="cuda")
OURS = partial(attention, causal=True, backend="hopper")
Block = Callable[[Tensor, Tensor], Tensor]


def inputs() -> tuple[Tensor, Tensor]:
    """x (batch, seqlen, heads x dim) and weights (heads x dim, 3 heads x dim) that make scores of about 1."""
    width = HEADS * DIM
    x = torch.randn(BATCH, SEQLEN, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(width, 3 * width, device="cuda").mul(width**-0.5).bfloat16().requires_grad_()
    return x, weight


def heads_of(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x @ weight).unflatten(-1, (3, HEADS, DIM)).unbind(2)
    return q, k, v


def dense(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return x + OURS(*heads_of(x, weight), **options).flatten(2).tanh()


def with_lse(x: Tensor, weight: Tensor) -> Tensor:
    out, lse = OURS(*heads_of(x, weight), return_lse=True)
    return x + (out * lse.mT[..., None].sigmoid().to(out.dtype)).flatten(2)


def packed(x: Tensor, weight: Tensor) -> Tensor:
    q, k, v = (y.flatten(0, 1) for y in heads_of(x, weight))
    return attention_varlen(q, k, v, OFFSETS, OFFSETS, causal=True, backend="hopper").view_as(x).tanh()


FORMS: dict[str, Block] = {
    "causal": dense,
    "window, softcap": partial(dense, window=(64, 0), softcap=5.0),
    "lse": with_lse,
    "packed": packed,
}


def gradients(block: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(block(*leaves).float().square().mean(), leaves)


def assert_near(found: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    """Apart by bfloat16's rounding at most: dQ is summed in the order in which tiles finish."""
    for a, b in zip(found, right, strict=True):
        assert b.float().norm() > 0
        assert (a - b).float().norm() <= 0.01 * b.float().norm()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", FORMS)
def test_compiled_whole(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    leaves = inputs()
    fast = torch.compile(FORMS[name], fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_near((fast(*leaves),), (FORMS[name](*leaves),))
    assert_near(gradients(fast, *leaves), gradients(FORMS[name], *leaves))


def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    leaves = inputs()
    fast = torch.compile(dense, fullgraph=True)
    assert_near((fast(*leaves),), (dense(*leaves),))
    assert_near(gradients(fast, *leaves), gradients(dense, *leaves))


@pytest.mark.parametrize("name", FORMS)
def test_a_graph_holds_forward_and_backward(name: str) -> None:
    leaves = inputs()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # the first run compiles, and gives autograd its stream
        gradients(FORMS[name], *leaves)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(FORMS[name], *leaves)
    for _ in range(3):
        with torch.no_grad():
            for leaf, fresh in zip(leaves, inputs(), strict=True):
                leaf.copy_(fresh)
            for gradient in captured:
                gradient.fill_(float("nan"))
        graph.replay()
        assert_near(captured, gradients(FORMS[name], *leaves))


def stack(run: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Tensor:
    for _ in range(LAYERS):
        x = run(dense, x, weight)
    return x


def test_a_checkpoint_keeps_attention() -> None:
    leaves = inputs()
    right = gradients(partial(stack, lambda block, *x: block(*x)), *leaves)
    held = {}
    for name, again, forwards in (("all", {}, 2 * LAYERS), ("kept", {"context_fn": contexts}, LAYERS)):
        run = partial(stack, partial(checkpoint, use_reentrant=False, **again))
        with Calls() as calls:
            assert_near(gradients(run, *leaves), right)
        assert (calls.forward, calls.backward) == (forwards, LAYERS)
        before = torch.cuda.memory_allocated()
        result = run(*leaves)
        held[name] = torch.cuda.memory_allocated() - before
        del result
    bytes_of_out_and_lse = BATCH * SEQLEN * HEADS * (2 * DIM + 4)
    assert held["kept"] - held["all"] <= LAYERS * bytes_of_out_and_lse * 1.1


@pytest.mark.parametrize("recompute", Recompute, ids=lambda r: r.name.lower())
def test_a_models_gradients_are_exact_attentions(recompute: Recompute) -> None:
    shape = GptShape(layers=2, hidden=256, heads=2, vocabulary=256, seqlen=500)
    trainer = Trainer(shape, torch.bfloat16, "cuda")
    text = torch.randint(256, (3, 501), device="cuda")
    for found, right in zip(trainer.gradients(text, OURS, recompute), trainer.gradients(text, exact_attention), strict=True):
        assert (found - right).float().norm() <= 0.03 * right.float().norm()


def test_autocast_gives_float32_gradients() -> None:
    q, k, v = (torch.randn(2, 200, 4, 64, device="cuda", requires_grad=True) for _ in range(3))
    with torch.autocast("cuda", torch.bfloat16):
        out = OURS(q, k, v)
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert all(gradient.dtype == torch.float32 for gradient in found)
    right = torch.autograd.grad(exact_attention(q, k, v).square().sum(), (q, k, v))
    assert_near(found, right)


def test_second_derivatives_are_refused_in_words() -> None:
    q, k, v = (torch.randn(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    (dq,) = torch.autograd.grad(OURS(q, k, v).float().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dq.float().sum().backward()


class Beginning(Lesson):
    """The first steps of a lesson of 300: the rate rises as slowly. (A lesson of 20 steps is at its full rate after two, and
    there any rounding grows a hundredfold: 7e-4 nats between bfloat16 and float32 become 0.05 to 0.11, by luck.)"""

    def rate_at(self, step: int) -> float:
        return Lesson(self.shape, self.dtype, self.batch, 300, self.rate).rate_at(step)


def test_a_model_learns_what_exact_attention_learns() -> None:
    course = LearningOrder("cuda", "hopper").course()
    lesson = course.lesson
    report = replace(course, lesson=Beginning(lesson.shape, lesson.dtype, lesson.batch, 30, lesson.rate)).run()
    assert report.kernel.startswith("hopper ")
    assert report.curves[0].losses[-1] < report.curves[0].losses[0] - 1.5
    assert report.ok, (report.distance, report.allowed)
