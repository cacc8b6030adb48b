"""A GPT to train with any attention: GPT-2's blocks without biases, weights in one dtype with float32 masters under AdamW.

What a training step costs counts here, so the model is the plain one of the field's measurements (Megatron-LM's and
FlashAttention's): learned positions, layer norms first, a GELU of four times the width, the output's weights those of the input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tessera.integrations.checkpoint import contexts

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention, differentiable: q, k, v and out (batch, seqlen, heads, head_dim)."""

_SPREAD = 0.02
_CLIPPED_NORM = 1.0


class Recompute(Enum):
    """What the backward computes again instead of keeping it."""

    NOTHING = "nothing"
    BLOCKS = "checkpointed"
    ALL_BUT_ATTENTION = "checkpointed, attention kept"


@dataclass(frozen=True)
class GptShape:
    """Sizes of a GPT; `seqlen` is the longest sequence that it has positions for."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    seqlen: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """Of the blocks and the vocabulary: what Megatron's formula counts (no norms, no positions)."""
        return 12 * self.layers * self.hidden**2 + self.vocabulary * self.hidden

    def flops(self, tokens: int, seqlen: int) -> int:
        """Model FLOPs of a training step by Megatron-LM's formula (arXiv 2104.04473, eq. 3, without recomputation).

        72 B s l h^2 (1 + s / 6h + V / 12lh), which is 6 parameters + 12 l h s for each token. Attention counts as if it
        were not causal: the field's convention, kept so that figures compare.
        """
        return tokens * (6 * self.parameters + 12 * self.layers * self.hidden * seqlen)

    def causal_flops(self, tokens: int, seqlen: int) -> int:
        """The same with the half of attention that a causal mask leaves: what is really computed."""
        return tokens * (6 * self.parameters + 6 * self.layers * self.hidden * seqlen)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x (batch, seqlen, hidden)."""

    def __init__(self, shape: GptShape):
        super().__init__()
        self.heads = shape.heads
        self.before_attention = nn.LayerNorm(shape.hidden, bias=False)
        self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden, bias=False)
        self.project = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.before_mlp = nn.LayerNorm(shape.hidden, bias=False)
        self.up = nn.Linear(shape.hidden, 4 * shape.hidden, bias=False)
        self.down = nn.Linear(4 * shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.project(attend(q, k, v).flatten(2))
        return x + self.down(functional.gelu(self.up(self.before_mlp(x)), approximate="tanh"))


class Gpt(nn.Module):
    """The model, its weights drawn in float32 on `device` from `seed`."""

    def __init__(self, shape: GptShape, device: str, seed: int):
        super().__init__()
        with torch.device("meta"):
            self.tokens = nn.Embedding(shape.vocabulary, shape.hidden)
            self.positions = nn.Embedding(shape.seqlen, shape.hidden)
            self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
            self.last_norm = nn.LayerNorm(shape.hidden, bias=False)
        self.to_empty(device=device)
        generator = torch.Generator(device).manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                nn.init.ones_(weight)
                continue
            # the sum of 2 l residuals keeps its size (GPT-2)
            shrunk = (2 * shape.layers) ** -0.5 if name.endswith(("project.weight", "down.weight")) else 1.0
            nn.init.normal_(weight, std=_SPREAD * shrunk, generator=generator)

    def forward(self, tokens: Tensor, attend: Attend, recompute: Recompute = Recompute.NOTHING) -> Tensor:
        """Logits (batch, seqlen, vocabulary) of int64 tokens (batch, seqlen)."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        run = _runner(recompute)
        for block in self.blocks:
            x = run(block, x, attend)
        return functional.linear(self.last_norm(x), self.tokens.weight)

    def loss(self, text: Tensor, attend: Attend, recompute: Recompute = Recompute.NOTHING) -> Tensor:
        """Mean cross entropy, in nats, of each token of `text` (batch, seqlen + 1) but the first, given those before it."""
        logits = self(text[:, :-1], attend, recompute)
        return functional.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())


def _runner(recompute: Recompute) -> Callable[..., Tensor]:
    if recompute is Recompute.NOTHING:
        return lambda block, x, attend: block(x, attend)
    again: dict[str, Any] = {} if recompute is Recompute.BLOCKS else {"context_fn": contexts}
    return partial(checkpoint, use_reentrant=False, **again)


class Trainer:
    """A model and its optimizer: weights in `dtype`, float32 masters of them, AdamW with clipped gradients."""

    def __init__(self, shape: GptShape, dtype: torch.dtype, device: str, seed: int = 0):
        self.dtype, self.device = dtype, torch.device(device)
        self.model = Gpt(shape, device, seed)
        self.masters = [weight.detach().clone() for weight in self.model.parameters()]
        self.model.to(dtype)
        self.weights: list[Tensor] = list(self.model.parameters())
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.masters, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)

    def step(self, text: Tensor, attend: Attend, rate: float, recompute: Recompute = Recompute.NOTHING) -> Tensor:
        """One step on `text` (batch, seqlen + 1) with this learning rate; the loss before it, still on the device."""
        loss = self.model.loss(text, attend, recompute)
        loss.backward()
        with torch.no_grad():
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None
            nn.utils.clip_grad_norm_(self.masters, _CLIPPED_NORM)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.optimizer.zero_grad()
            torch._foreach_copy_(self.weights, self.masters)
        return loss.detach()

    def gradients(self, text: Tensor, attend: Attend, recompute: Recompute = Recompute.NOTHING) -> tuple[Tensor, ...]:
        """Gradients of the first block's query, key and value weights, (hidden, hidden) each: all attention is in them."""
        weight = self.model.get_parameter("blocks.0.qkv.weight")
        (gradient,) = torch.autograd.grad(self.model.loss(text, attend, recompute), weight)
        return gradient.chunk(3)
