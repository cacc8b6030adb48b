"""torch's FlopCounterMode over attention, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import tessera
import tessera.integrations.flop_counter


def counted(call: object, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        out = call(*inputs)  # type: ignore[operator]
        if out.requires_grad:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("trained", [False, True])
def test_full_attention_counts_as_torchs(trained: bool) -> None:
    q, k, v = (torch.randn(2, n, 4, 16, requires_grad=trained) for n in (33, 50, 50))
    shapes = [(2, 4, n, 16) for n in (33, 50, 50)]
    forward, backward = sdpa_flop_count(*shapes), sdpa_backward_flop_count(shapes[0], *shapes)
    assert counted(tessera.attention, q, k, v) == forward + (backward if trained else 0)


def test_what_a_mask_leaves_out_is_not_counted() -> None:
    q = torch.randn(1, 64, 2, 16)
    assert counted(lambda x: tessera.attention(x, x, x, causal=True), q) == 4 * 2 * 16 * 64 * 65 / 2
    cu = torch.tensor([0, 32, 64], dtype=torch.int32)
    assert counted(lambda x: tessera.attention_varlen(x, x, x, cu, cu, causal=True), q[0]) == 2 * 4 * 2 * 16 * 32 * 33 / 2
