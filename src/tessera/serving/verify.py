"""A call over a KV cache against the oracle, by the tolerance rule of tessera.verify: out, lse, and the cache that it leaves.

The oracle stays the dense one: here the new rows are written to a copy of the cache, one by one, then each sequence's rows are
gathered into packed tensors for reference.attention. What should not be written must keep its bits, NaN or not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tessera import reference
from tessera.mask import Mask
from tessera.operands import Lengths, Operands
from tessera.problem import Layout, Problem, Shape
from tessera.serving import operators
from tessera.serving.operands import CacheRequest, describe
from tessera.verify import Comparison, compare


def run(request: CacheRequest) -> list[Comparison]:
    """Run a request and compare out, lse and the caches, which it may have written, with the oracle's (on the CPU)."""
    before = on_host(request)
    results = [result.cpu() for result in operators.forward(request)]
    after = on_host(request)
    refs, eagers = (attention(after, dtype) for dtype in (torch.float64, request.q.dtype))
    comparisons = [compare(*row) for row in zip(("out", "lse"), results, refs, eagers, strict=True)]
    return comparisons + [c for name in ("k", "v") for c in _compare_cache(name, before, after)]


def on_host(request: CacheRequest) -> CacheRequest:
    """A copy, on the CPU: the oracle reads row by row."""
    return CacheRequest._make(x.detach().cpu().clone() if isinstance(x, Tensor) else x for x in request)


def attention(request: CacheRequest, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, lse) of a request whose new rows are in the cache already, by the oracle in `dtype`."""
    problem = describe(request)
    shape = problem.shape
    keys, values, queries = [], [], []
    for b, (rows, first, cached, new) in enumerate(_sequences(request)):
        at = range(first, cached + new)
        keys.append(_read(request, "k", b, at, dtype))
        values.append(keys[-1][..., : shape.head_dim_v] if request.v_cache is None else _read(request, "v", b, at, dtype))
        q = (request.q if request.cu_seqlens_q is not None else request.q[b])[rows].to(dtype)
        queries.append(_rotated(q, cached, request))
    starts = request.cu_seqlens_q
    if starts is None:
        starts = torch.arange(0, (shape.batch + 1) * shape.seqlen_q, max(1, shape.seqlen_q), dtype=torch.int32)[: shape.batch + 1]
    k, v = torch.cat(keys), torch.cat(values)
    ends = torch.tensor([0, *(len(x) for x in keys)]).cumsum(0).int()
    q = torch.cat(queries)
    if request.cu_seqlens_q is not None:  # rows of no sequence
        q = torch.cat((q, q.new_zeros(len(request.q) - len(q), *q.shape[1:])))
    packed = Problem(
        Shape(shape.batch, len(q), len(k), shape.heads_q, shape.heads_kv, shape.head_dim, shape.head_dim_v),
        problem.dtype, problem.score, Layout.VARLEN, problem.mask,
    )  # fmt: skip
    lengths = Lengths(starts, ends)
    out, lse = reference.attention(packed, Operands(q, k, v, lengths, Mask(), None, None, request.sinks, 0), dtype)
    if request.cu_seqlens_q is None:
        return out.unflatten(0, request.q.shape[:2]), lse.unflatten(1, request.q.shape[:2]).transpose(0, 1)
    return out, lse


def _sequences(request: CacheRequest) -> Iterator[tuple[slice, int, int, int]]:
    """For each sequence: its rows of q, its first valid row, how many were cached, how many are new."""
    packed = request.cu_seqlens_q
    starts = None if packed is None else packed.tolist()
    leftpad = [0] * request.cache_seqlens.numel() if request.cache_leftpad is None else request.cache_leftpad.tolist()
    for b, cached in enumerate(request.cache_seqlens.tolist()):
        rows = slice(0, request.q.shape[1]) if starts is None else slice(starts[b], starts[b + 1])
        new = 0 if request.k is None else request.k.shape[1] if starts is None else rows.stop - rows.start
        yield rows, leftpad[b], cached, new


def _place(request: CacheRequest, b: int, position: int) -> tuple[int, int]:
    """(page or entry, row) of one position of one sequence."""
    if request.page_table is not None:
        size = request.k_cache.shape[1]
        return int(request.page_table[b, position // size]), position % size
    return b if request.cache_batch_idx is None else int(request.cache_batch_idx[b]), position


def _scale(descale: Tensor | None, cache: Tensor, b: int, page: int, row: int | slice) -> Tensor | float:
    """The scales of one row, (heads_kv, 1), or of some rows of one page, (rows, heads_kv, 1)."""
    if descale is None:
        return 1.0
    if descale.dim() == 3:
        of_rows = descale[page].repeat_interleave(cache.shape[1] // descale.shape[1], dim=0)
        return of_rows[row, :, None]
    return (descale if descale.dim() == 1 else descale[b])[:, None]


def _read(request: CacheRequest, which: str, b: int, positions: range, dtype: torch.dtype) -> Tensor:
    """(positions, heads_kv, dim), scaled: page by page."""
    cache, descale = getattr(request, f"{which}_cache"), getattr(request, f"{which}_descale")
    size, parts, at = cache.shape[1], [cache.new_zeros(0, *cache.shape[2:], dtype=dtype)], positions.start
    while at < positions.stop:
        page, row = _place(request, b, at)
        rows = slice(row, min(size, row + positions.stop - at))
        parts.append((cache[page, rows].to(dtype) * _scale(descale, cache, b, page, rows)).to(dtype))
        at += rows.stop - rows.start
    return torch.cat(parts)


def _rotated(rows: Tensor, first: int, request: CacheRequest) -> Tensor:
    """(rows, heads, dim), row i turned by position first + i, in the rows' dtype."""
    if request.rotary_cos is None or request.rotary_sin is None:
        return rows
    turned = rows.clone()
    half = request.rotary_cos.shape[1]
    for column in range(half):
        a, b = (2 * column, 2 * column + 1) if request.rotary_interleaved else (column, column + half)
        cos, sin = (t[first : first + len(rows), column, None].to(rows.dtype) for t in (request.rotary_cos, request.rotary_sin))
        turned[..., a] = rows[..., a] * cos - rows[..., b] * sin
        turned[..., b] = rows[..., b] * cos + rows[..., a] * sin
    return turned


def _compare_cache(which: str, before: CacheRequest, after: CacheRequest) -> list[Comparison]:
    """The written rows, by the rule where they were rotated and bit by bit where not; and all other bits as they were."""
    cache, new = getattr(after, f"{which}_cache"), getattr(after, which)
    if cache is None:
        return []
    expected, found = getattr(before, f"{which}_cache"), cache.clone()
    written, exact, eager = [], [], []
    for b, (rows, _, cached, appended) in enumerate(_sequences(after)):
        if not appended:
            continue
        own = new[rows] if after.cu_seqlens_q is not None else new[b]
        turns = which == "k" and after.rotary_cos is not None
        in_float64 = _rotated(own.double(), cached, after) if turns else own.double()
        in_dtype = _rotated(own, cached, after) if turns else own
        for i in range(appended):
            place = _place(after, b, cached + i)
            scale = _scale(getattr(after, f"{which}_descale"), cache, b, *place)
            if turns:
                written.append((cache[place].float() * scale).to(own.dtype))
                exact.append(in_float64[i])
                eager.append((_stored(in_dtype[i], scale, cache.dtype).float() * scale).to(own.dtype))
                expected[place] = found[place]
            else:
                expected[place] = _stored(own[i], scale, cache.dtype)
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[cache.dtype.itemsize]
    differing = (found.contiguous().view(width) != expected.contiguous().view(width)).sum().item()
    found_all = [Comparison(f"{which}_cache, elements that differ", differing, 0.0)]
    if written:
        found_all.append(compare(f"{which}_cache, rotated rows", torch.stack(written), torch.stack(exact), torch.stack(eager)))
    return found_all


def _stored(row: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """A new row as the cache holds it."""
    if dtype == row.dtype:
        return row
    limit = torch.finfo(dtype).max
    return (row.float() / scale).clamp(-limit, limit).to(dtype)
