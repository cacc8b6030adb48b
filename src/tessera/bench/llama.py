"""A Llama to generate with: the model as a function of tokens, attention over its cache given from outside.

Random weights: what is shown is that pages, rotary positions and batches of different lengths come out right, and what they cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessera import attention_with_kvcache, plan_kvcache

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v) -> out: q (..., heads_q, head_dim), the new rows k and v (..., heads_kv, head_dim), not yet rotated."""

_ROTARY_BASE = 500_000.0
_GAIN = 1.5


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama; `width` is the MLP's, `positions` the longest sequence."""

    layers: int
    hidden: int
    heads_q: int
    heads_kv: int
    head_dim: int
    width: int
    vocabulary: int
    positions: int

    def cache_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Keys and values of so many tokens, all layers."""
        return 2 * self.layers * tokens * self.heads_kv * self.head_dim * dtype.itemsize


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x (..., hidden)."""

    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.shape = shape
        columns = (shape.heads_q + 2 * shape.heads_kv) * shape.head_dim
        self.before_attention = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.qkv = nn.Linear(shape.hidden, columns, bias=False)
        self.project = nn.Linear(shape.heads_q * shape.head_dim, shape.hidden, bias=False)
        self.before_mlp = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.gate = nn.Linear(shape.hidden, shape.width, bias=False)
        self.up = nn.Linear(shape.hidden, shape.width, bias=False)
        self.down = nn.Linear(shape.width, shape.hidden, bias=False)

    def forward(self, x: Tensor, index: int, attend: Attend) -> Tensor:
        shape = self.shape
        heads = self.qkv(self.before_attention(x)).unflatten(-1, (-1, shape.head_dim))
        q, k, v = heads.split((shape.heads_q, shape.heads_kv, shape.heads_kv), dim=-2)
        x = x + self.project(attend(index, q, k, v).flatten(-2))
        rows = self.before_mlp(x)
        return x + self.down(functional.silu(self.gate(rows)) * self.up(rows))


class Llama(nn.Module):
    """The model, its weights drawn on `device` from `seed`; with it the cosines and sines of its rotary positions."""

    def __init__(self, shape: LlamaShape, dtype: torch.dtype, device: str, seed: int = 0):
        super().__init__()
        self.shape, self.dtype, self.device = shape, dtype, torch.device(device)
        with torch.device("meta"):
            self.tokens = nn.Embedding(shape.vocabulary, shape.hidden, dtype=dtype)
            self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers)).to(dtype)
            self.last_norm = nn.RMSNorm(shape.hidden, eps=1e-5, dtype=dtype)
        self.to_empty(device=device)
        generator = torch.Generator(device).manual_seed(seed)
        for name, weight in self.named_parameters():
            weight.requires_grad_(False)
            if weight.dim() == 1:
                nn.init.ones_(weight)
                continue
            # Scores are far from uniform, so that a wrong key shows; many layers add up to about as much as one.
            shrunk = (2 * shape.layers) ** -0.5 if name.endswith(("project.weight", "down.weight")) else 1.0
            nn.init.normal_(weight, std=_GAIN * shrunk * weight.shape[1] ** -0.5, generator=generator)
        turns = torch.arange(shape.positions, device=device, dtype=torch.float64)[:, None] * (
            _ROTARY_BASE ** -(torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float64) / shape.head_dim)
        )
        self.cos, self.sin = turns.cos().float(), turns.sin().float()  # (positions, head_dim / 2)

    def forward(self, tokens: Tensor, attend: Attend) -> Tensor:
        """What the layers make of int64 tokens (...): (..., hidden)."""
        x = self.tokens(tokens)
        for index, layer in enumerate(self.layers):
            x = layer(x, index, attend)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Float32 logits (..., vocabulary) of the last layer's results."""
        return functional.linear(self.last_norm(x), self.tokens.weight).float()

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rows (..., heads, head_dim) turned by their `positions` (...), in float32; x's dtype."""
        cos, sin = (table[positions][..., None, :] for table in (self.cos, self.sin))
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Cache(NamedTuple):
    """Pools (layers, pages, page_size, heads_kv, head_dim) of keys and of values."""

    keys: Tensor
    values: Tensor

    @staticmethod
    def empty(model: Llama, pages: int, page_size: int) -> Cache:
        """Pools that hold nothing yet: NaN, so that a row read before it is written shows."""
        shape = (model.shape.layers, pages, page_size, model.shape.heads_kv, model.shape.head_dim)
        keys, values = (torch.full(shape, float("nan"), dtype=model.dtype, device=model.device) for _ in range(2))
        return Cache(keys, values)


class Appending(Enum):
    """How new rows are rotated and get into the cache."""

    INSIDE = "in the attention call"
    BEFORE = "by torch's operators before it"

    @staticmethod
    def suited(model: Llama, page_size: int) -> Appending:
        """INSIDE where a backend made for the device takes new rows (`torch`, which runs anywhere, waits for the device)."""
        shape = model.shape
        pool, new = (2, page_size, shape.heads_kv, shape.head_dim), (1, 1, shape.heads_kv, shape.head_dim)
        planned = plan_kvcache(
            (1, 1, shape.heads_q, shape.head_dim), pool, pool, k=new, v=new, page_table=(1, 2), rotary_cos=model.cos,
            rotary_sin=model.sin, rotary_interleaved=False, causal=True, dtype=model.dtype, device=model.device,
        )  # fmt: skip
        return Appending.BEFORE if planned.backend == "torch" else Appending.INSIDE


class Cached(NamedTuple):
    """Attention by Tessera over paged sequences, new rows rotated and appended.

    `lengths` int32 (batch,): rows before the call; `table` int32 (batch, max_pages); `offsets` int32 (batch + 1,) where the
    tokens are packed, None where they are (batch, seqlen).
    """

    model: Llama
    cache: Cache
    appending: Appending
    lengths: Tensor
    table: Tensor
    offsets: Tensor | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.appending is Appending.BEFORE:
            return self._attend_after(layer, q, k, v)
        return attention_with_kvcache(
            q, self.cache.keys[layer], self.cache.values[layer], k=k, v=v, cache_seqlens=self.lengths, page_table=self.table,
            cu_seqlens_q=self.offsets, rotary_cos=self.model.cos, rotary_sin=self.model.sin, rotary_interleaved=False,
            causal=True,
        )  # fmt: skip

    def _attend_after(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sequences, positions = self._places(q)
        page_size = self.cache.keys.shape[2]
        pages, slots = self.table[sequences, positions // page_size].long(), positions % page_size
        self.cache.keys[layer].index_put_((pages, slots), self.model.rotated(k, positions))
        self.cache.values[layer].index_put_((pages, slots), v)
        new = q.shape[1] if self.offsets is None else self.offsets.diff()
        return attention_with_kvcache(
            self.model.rotated(q, positions), self.cache.keys[layer], self.cache.values[layer], cache_seqlens=self.lengths + new,
            page_table=self.table, cu_seqlens_q=self.offsets, causal=True,
        )  # fmt: skip

    def _places(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The sequence and the position of every new token, int64 of the tokens' shape."""
        if self.offsets is None:
            new = torch.arange(q.shape[1], device=q.device)
            return torch.arange(q.shape[0], device=q.device)[:, None].expand(-1, q.shape[1]), self.lengths[:, None] + new
        tokens = torch.arange(q.shape[0], device=q.device)
        sequences = torch.searchsorted(self.offsets[1:].long(), tokens, right=True)
        return sequences, self.lengths[sequences] + tokens - self.offsets[sequences]


def eager_logits(model: Llama, tokens: Tensor) -> Tensor:
    """Float32 logits (seqlen, vocabulary) of one whole sequence of int64 tokens (seqlen,): no cache, every score in memory."""
    group, positions = model.shape.heads_q // model.shape.heads_kv, torch.arange(len(tokens), device=tokens.device)

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = model.rotated(q, positions), model.rotated(k, positions).repeat_interleave(group, dim=2)
        v = v.repeat_interleave(group, dim=2)
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5  # (1, heads_q, seqlen, seqlen)
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return (scores.masked_fill(later, float("-inf")).softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)

    return model.logits(model(tokens[None], attend))[0]
