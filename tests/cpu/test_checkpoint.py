"""Activation checkpointing: attention's forward runs once a call with the policy, and the gradients are the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from operator_calls import Calls
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tessera import attention
from tessera.integrations.checkpoint import SAVED, contexts, policy

LAYERS, HEADS, DIM = 3, 4, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "dropout, softcap": {"dropout_p": 0.3, "seed": 5, "softcap": 4.0},
    "lse too": {"window": (5, 0), "return_lse": True},
}


def block(weight: Tensor, options: dict[str, Any], x: Tensor) -> Tensor:
    """One layer; `x` (batch, seqlen, heads x dim)."""
    q, k, v = (x @ weight).unflatten(-1, (3, HEADS, DIM)).unbind(2)
    result = attention(q, k, v, **options)
    out, lse = result if isinstance(result, tuple) else (result, None)
    if lse is not None:
        out = out * lse.mT[..., None].sigmoid()
    return x + out.flatten(2).tanh()


def stack(run: Callable[..., Tensor], weights: list[Tensor], options: dict[str, Any], x: Tensor) -> Tensor:
    for weight in weights:
        x = run(partial(block, weight, options), x)
    return x.square().mean()


def inputs() -> tuple[list[Tensor], Tensor]:
    weights = [torch.randn(HEADS * DIM, 3 * HEADS * DIM).mul(0.1).requires_grad_() for _ in range(LAYERS)]
    return weights, torch.randn(2, 20, HEADS * DIM, requires_grad=True)


KEPT = partial(checkpoint, use_reentrant=False, context_fn=contexts)
LISTED = partial(
    checkpoint, use_reentrant=False,
    context_fn=partial(create_selective_checkpoint_contexts, [*SAVED, torch.ops.aten.mm.default]),
)  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_the_forward_runs_once_a_layer(options: dict[str, Any]) -> None:
    weights, x = inputs()
    expected = torch.autograd.grad(stack(lambda function, x: function(x), weights, options, x), [*weights, x])
    for run, forwards in ((partial(checkpoint, use_reentrant=False), 2 * LAYERS), (KEPT, LAYERS), (LISTED, LAYERS)):
        with Calls() as calls:
            gradients = torch.autograd.grad(stack(run, weights, options, x), [*weights, x])
        assert (calls.forward, calls.backward) == (forwards, LAYERS)
        for gradient, right in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, right, rtol=0, atol=0)


def test_only_attention_is_kept() -> None:
    """Between forward and backward a block keeps its input and what the one operator returned; nothing of q, k and v."""
    weights, x = inputs()
    saved: set[int] = set()
    kept: list[Any] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.add(tensor.data_ptr())
        return tensor

    def watched(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        decision = policy(context, operator, *arguments, **options)
        kept.extend([operator] if decision is CheckpointPolicy.MUST_SAVE else [])
        return decision

    run = partial(checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, watched))
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        run(partial(block, weights[0], {"causal": True}), x)
    assert kept == list(SAVED)
    assert saved == {x.data_ptr()}


@pytest.mark.parametrize("context_fn", [contexts, partial(create_selective_checkpoint_contexts, policy)], ids=["ours", "torch's"])
def test_compiled(context_fn: Any) -> None:
    """The compiled backward holds no forward operator either."""
    weights, x = inputs()
    run = partial(checkpoint, use_reentrant=False, context_fn=context_fn)
    graphs: list[tuple[int, int]] = []

    def compiler(module: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        targets = [node.target for node in module.graph.nodes]
        graphs.append(tuple(targets.count(getattr(torch.ops.tessera, name).default) for name in ("forward", "backward")))
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)
    fast = torch.compile(lambda x: stack(run, weights, {"causal": True}, x), fullgraph=True, backend=backend)
    gradients = torch.autograd.grad(fast(x), [*weights, x])
    assert graphs == [(LAYERS, 0), (0, LAYERS)]
    expected = torch.autograd.grad(stack(lambda function, x: function(x), weights, {"causal": True}, x), [*weights, x])
    for gradient, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, right)
