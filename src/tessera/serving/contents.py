"""What the tensors of a call over a KV cache say, checked: lengths within the cache, pages within the pool, rows within tables.

On the CPU each call is checked; on a device only under `tessera.debug()`, because reading there waits. Kernels keep within their
tensors in any case: they clamp what they read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.checking import reads_contents
from tessera.errors import bad_value
from tessera.operands import check_offsets
from tessera.serving.operands import CacheRequest


def check_contents(request: CacheRequest) -> None:
    """Raises ValueError that names the argument, the first offending sequence, its value and the limit."""
    if not reads_contents(request.q):
        return
    lengths, new, asked = request.cache_seqlens, *_row_counts(request)
    totals = lengths.long() + new
    table = request.page_table
    rows = request.k_cache.shape[1]
    capacity = rows if table is None else rows * table.shape[1]
    _check_range("cache_seqlens", lengths, capacity, f"has {capacity} rows in the cache")
    _check_range("cache_seqlens + new rows", totals, capacity, f"has {capacity} rows in the cache")
    if request.cache_leftpad is not None:
        outside = (request.cache_leftpad < 0) | (request.cache_leftpad > lengths)
        if outside.any():
            b = int(outside.nonzero()[0])
            value, limit = int(request.cache_leftpad[b]), int(lengths[b])
            why = f"sequence {b} has {limit} cached rows"
            raise bad_value("cache_leftpad", value, why, "it counts unused rows at the front: 0 to cache_seqlens")
    if request.rotary_cos is not None:
        turned = lengths.long() + torch.maximum(new, asked)
        positions = request.rotary_cos.shape[0]
        _check_range("cache_seqlens + rows", turned, positions, f"has {positions} positions in the rotary tables")
    if request.cache_batch_idx is not None:
        _check_entries(request.cache_batch_idx, new, request)
    if table is not None:
        _check_pages(table, totals, request)


def _row_counts(request: CacheRequest) -> tuple[Tensor, Tensor]:
    """How many rows each sequence appends, and how many of q are its, (batch,) each."""
    starts = request.cu_seqlens_q
    if starts is not None:
        check_offsets("cu_seqlens_q", starts, request.q.shape[0])
    asked = torch.full_like(request.cache_seqlens, request.q.shape[1]) if starts is None else starts.diff()
    if request.k is None:
        return torch.zeros_like(request.cache_seqlens), asked
    return torch.full_like(request.cache_seqlens, request.k.shape[1]) if starts is None else asked, asked


def _check_range(name: str, values: Tensor, most: int, why: str) -> None:
    """Every sequence's value is 0 to `most`."""
    outside = (values < 0) | (values > most)
    if outside.any():
        b = int(outside.nonzero()[0])
        raise bad_value(name, int(values[b]), f"sequence {b} {why}", f"use 0 to {most}")


def _check_entries(entries: Tensor, new: Tensor, request: CacheRequest) -> None:
    count = request.k_cache.shape[0]
    _check_range("cache_batch_idx", entries, count - 1, f"names no entry of the cache, which has {count}")
    written = entries[new > 0]
    if written.unique().numel() != written.numel():
        why = "two sequences would write into one entry"
        raise bad_value("cache_batch_idx", entries.tolist()[:8], why, "append to each entry once a call")


def _check_pages(table: Tensor, totals: Tensor, request: CacheRequest) -> None:
    count, size = request.k_cache.shape[:2]
    used = torch.arange(table.shape[1], device=table.device) * size < totals[:, None]
    outside = used & ((table < 0) | (table >= count))
    if outside.any():
        b, n = (int(i) for i in outside.nonzero()[0])
        why = f"sequence {b} uses it as page {n}, and the pool has {count} pages"
        instead = f"use 0 to {count - 1}; entries past a sequence's end may be anything"
        raise bad_value("page_table", int(table[b, n]), why, instead)
