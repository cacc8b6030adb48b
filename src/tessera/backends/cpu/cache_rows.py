"""The rows of a KV cache, contiguous or paged, FP8 or wider: where they stand, writing new ones, gathering a sequence's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.backends.cpu.rotary import rotate
from tessera.problem import Layout
from tessera.serving.operands import CacheOperands
from tessera.serving.problem import CacheProblem, Descale, Granularity, Values


@dataclass(frozen=True)
class Span:
    """One sequence of a call: its number in the batch, where its rows of q stand, and how far its cache reaches.

    `entry`: the row of a contiguous cache, or of the page table. `cached` rows stand in the cache before the call, `new` come
    with it, packed or not at `new_rows`; the first `leftpad` hold nothing.
    """

    number: int
    entry: int
    rows: slice
    cached: int
    new_rows: slice
    leftpad: int
    packed: bool

    @property
    def seqlen(self) -> int:
        return self.cached + self.new_rows.stop - self.new_rows.start

    def of(self, tensor: Tensor) -> Tensor:
        """This sequence's rows of q or out, (rows, heads, dim), a view."""
        return tensor[self.rows] if self.packed else tensor[self.number]

    def of_new(self, tensor: Tensor) -> Tensor:
        """Its rows of the new k or v, (rows, heads, dim), a view."""
        return tensor[self.new_rows] if self.packed else tensor[self.number]

    def of_lse(self, lse: Tensor) -> Tensor:
        """Its columns of lse, (heads, rows), a view."""
        return lse[:, self.rows] if self.packed else lse[self.number]


def spans(problem: CacheProblem, operands: CacheOperands) -> list[Span]:
    """The sequences of a call. Reads the lengths on the host."""
    batch, packed = problem.shape.batch, problem.layout is Layout.VARLEN
    lengths = operands.cache_seqlens.tolist()
    entries = range(batch) if operands.cache_batch_idx is None else operands.cache_batch_idx.tolist()
    leftpads = [0] * batch if operands.cache_leftpad is None else operands.cache_leftpad.tolist()
    starts = [] if operands.cu_seqlens_q is None else operands.cu_seqlens_q.tolist()
    appended = 0 if problem.append is None else problem.append.seqlen
    found = []
    for b in range(batch):
        rows = slice(starts[b], starts[b + 1]) if packed else slice(0, problem.shape.seqlen_q)
        new = slice(0, appended) if not packed or not appended else rows
        found.append(Span(b, entries[b], rows, lengths[b], new, leftpads[b], packed))
    return found


@dataclass(frozen=True, eq=False)
class CacheRows:
    """The cache of one call."""

    problem: CacheProblem
    operands: CacheOperands

    def append(self, span: Span) -> None:
        """Write a sequence's new rows behind its cached ones: keys rotated, both in the cache's dtype."""
        append, operands = self.problem.append, self.operands
        if append is None or operands.k is None:
            raise ValueError("this problem appends nothing")
        k = span.of_new(operands.k)
        if append.rotary is not None:
            k = rotate(k, span.cached, operands, append.rotary)
        positions = range(span.cached, span.seqlen)
        self._write(operands.k_cache, k, self._scales(span, positions, self.problem.cache.k_descale, operands.k_descale), span)
        if operands.v is not None and operands.v_cache is not None:
            scales = self._scales(span, positions, self.problem.cache.v_descale, operands.v_descale)
            self._write(operands.v_cache, span.of_new(operands.v), scales, span)

    def gather(self, span: Span, begin: int) -> tuple[Tensor, Tensor]:
        """Keys and values from `begin` on to the sequence's end, (keys, heads_kv, dim), float32."""
        cache, operands = self.problem.cache, self.operands
        positions = range(begin, span.seqlen)
        k = self._read(operands.k_cache, span, positions)
        k = _scaled(k, self._scales(span, positions, cache.k_descale, operands.k_descale))
        if cache.values is Values.IN_KEYS or operands.v_cache is None:
            return k, k[..., : self.problem.shape.head_dim_v]
        v = self._read(operands.v_cache, span, positions)
        return k, _scaled(v, self._scales(span, positions, cache.v_descale, operands.v_descale))

    def _places(self, span: Span, positions: range) -> tuple[Tensor, Tensor]:
        """(page or entry, row in it) of each position, int64."""
        at = torch.arange(positions.start, positions.stop, device=self.operands.q.device)
        pages, table = self.problem.cache.pages, self.operands.page_table
        if pages is None or table is None:
            return torch.full_like(at, span.entry), at
        return table[span.entry].long()[at // pages.size], at % pages.size

    def _read(self, cache: Tensor, span: Span, positions: range) -> Tensor:
        if self.problem.cache.pages is None:
            return cache[span.entry, positions.start : positions.stop].float()
        return _bytes(cache)[self._places(span, positions)].view(cache.dtype).float()

    def _write(self, cache: Tensor, rows: Tensor, scales: Tensor | None, span: Span) -> None:
        stored = rows
        if rows.dtype != cache.dtype:
            limit = torch.finfo(cache.dtype).max
            unscaled = rows.float() if scales is None else rows.float() / scales
            stored = unscaled.clamp(-limit, limit).to(cache.dtype)
        _bytes(cache)[self._places(span, range(span.cached, span.seqlen))] = _bytes(stored)

    def _scales(self, span: Span, positions: range, form: Descale | None, descale: Tensor | None) -> Tensor | None:
        """The scale of each position and head, (positions | 1, heads_kv, 1); None for scales of 1."""
        if form is None or descale is None:
            return None
        if form.granularity is Granularity.HEAD:
            return descale[None, :, None]
        if form.granularity is Granularity.SEQUENCE:
            return descale[span.number][None, :, None]
        places, rows = self._places(span, positions)
        return descale[places, rows // form.rows].unsqueeze(-1)


def _scaled(rows: Tensor, scales: Tensor | None) -> Tensor:
    return rows if scales is None else rows * scales


def _bytes(x: Tensor) -> Tensor:
    """FP8 as bytes: torch moves those by index, and FP8 not everywhere."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x
