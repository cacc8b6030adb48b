"""Right before fast, of a step over a cache: what `decoding` compares everybody's first result with before it times anything.

The plain formula in float64 over the first and the last sequence's rows, found through the page table; of the one the first
key/value head, of the other the last. The rule is tessera.verify's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tessera.verify import tolerance

if TYPE_CHECKING:
    from tessera.bench.decoding import Caches

_MOST_HEADS = 16
"""Query heads of a key/value head that are looked at: latent caches have 128."""


@dataclass(frozen=True, eq=False)
class Part:
    """What one sequence's query heads `heads` ought to be, (seqlen_q, heads, head_dim_v), and the largest error allowed. `shape`:
    the whole result's."""

    sequence: int
    heads: slice
    right: Tensor
    allowed: float
    shape: tuple[int, ...]

    def fault(self, out: Tensor) -> str | None:
        """What is wrong of out (batch, seqlen_q, heads_q, head_dim_v), or None."""
        if out.shape != self.shape:
            return f"out has shape {tuple(out.shape)}, not {self.shape}"
        error = (out[self.sequence, :, self.heads].double() - self.right).abs().max().item()
        if error <= self.allowed:  # NaN is not
            return None
        return f"wrong by {error:.1e} in sequence {self.sequence}, {self.allowed:.1e} is allowed"


def parts(caches: Caches) -> list[Part]:
    """The right results of a step over buffer 0, before anybody has run."""
    return list(_parts(caches))


def _parts(caches: Caches) -> Iterator[Part]:
    cell, q = caches.cell, caches.q
    group = cell.heads_q // cell.heads_kv
    for b, head in {0: 0, len(cell.lengths) - 1: cell.heads_kv - 1}.items():
        heads = slice(head * group, head * group + min(group, _MOST_HEADS))
        right, eager = (_attend(caches, b, head, q[b, :, heads], dtype) for dtype in (torch.float64, q.dtype))
        yield Part(b, heads, right, tolerance(right, eager, q.dtype), (*q.shape[:-1], cell.head_dim_v or cell.head_dim))


def _attend(caches: Caches, b: int, head: int, q: Tensor, dtype: torch.dtype) -> Tensor:
    """softmax(scale q k^T) v of q (seqlen_q, heads, head_dim), causal from the end, all arithmetic in `dtype`."""
    cell = caches.cell
    k_cache, v_cache, table = caches.buffers[0]
    cached = cell.lengths[b] - cell.appended
    k = _rows(k_cache, table, b, cached)[:, head].to(dtype)
    v = k[:, : cell.head_dim_v] if v_cache is None else _rows(v_cache, table, b, cached)[:, head].to(dtype)
    q = q.to(dtype)
    if caches.new is not None:
        new_k, new_v, angles = caches.new
        angles = angles[cached:].to(dtype)
        q = _turned(q, angles[: len(q), None])
        k = torch.cat((k, _turned(new_k[b, :, head].to(dtype), angles[: cell.appended])))
        v = torch.cat((v, new_v[b, :, head].to(dtype)))
    scores = cell.head_dim**-0.5 * torch.einsum("shd,kd->shk", q, k)
    last = torch.arange(len(k) - len(q), len(k), device=q.device)[:, None, None]
    scores = scores.masked_fill(torch.arange(len(k), device=q.device) > last, float("-inf"))
    return torch.einsum("shk,kd->shd", scores.softmax(dim=-1), v)


def _rows(cache: Tensor, table: Tensor | None, b: int, length: int) -> Tensor:
    """A sequence's rows, (length, heads_kv, dim)."""
    if table is None:
        return cache[b, :length]
    return cache[table[b, : -(-length // cache.shape[1])].long()].flatten(0, 1)[:length]


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding by halves whose cosines and sines are both `angles`, as the step has it."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angles - b * angles, b * angles + a * angles), dim=-1)
