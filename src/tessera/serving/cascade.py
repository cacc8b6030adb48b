"""Cascade: attention for sequences that share their first pages, which are read once for the whole batch instead of once each.

All rows of the batch are one sequence's rows to the shared prefix, since each of them sees all of it; then each sequence attends
to what is its own, and the two are merged by lse (Hydragen, arXiv 2402.05099; the merge is partial.py's).
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from tessera.checking import reads_contents
from tessera.errors import bad_type, bad_value
from tessera.options import check_options, check_tensor
from tessera.partial import merge
from tessera.serving.api import CACHE_OPTIONS, attention_with_kvcache

_REFUSED = {
    "window": "a window's left side cuts the prefix differently for each sequence",
    "cache_leftpad": "a shared page has no padding",
    "cache_batch_idx": "sequences share pages, not entries",
    "rotary_cos": "the rows must be turned before both parts",
    "rotary_sin": "the rows must be turned before both parts",
}


@overload
def attention_cascade(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None = None,
    *,
    shared_pages: int,
    cache_seqlens: Tensor,
    page_table: Tensor,
    return_lse: Literal[False] = False,
    **options: Any,
) -> Tensor: ...
@overload
def attention_cascade(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None = None,
    *,
    shared_pages: int,
    cache_seqlens: Tensor,
    page_table: Tensor,
    return_lse: Literal[True],
    **options: Any,
) -> tuple[Tensor, Tensor]: ...


def attention_cascade(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None = None,
    *,
    shared_pages: int,
    cache_seqlens: Tensor,
    page_table: Tensor,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention_with_kvcache` for sequences whose first `shared_pages` pages are the same: these are read once for all of them.

    Args:
        q, k_cache, v_cache, cache_seqlens, page_table, options: as there. page_table and cache_seqlens describe whole sequences;
            the first `shared_pages` columns of page_table are the same in all rows, those pages are full, and every row of q
            stands behind them. Not with a window, left padding, rotary embedding, batch_invariant, or scales per sequence.
        shared_pages: how many pages are shared, a Python int: the prefix is shared_pages * page_size rows.
        return_lse: also return lse.

    Returns: as `attention_with_kvcache`, the same to rounding.

    Raises: as `attention_with_kvcache`. What is said of the shared pages is checked on the CPU and under `tessera.debug()`.
    """
    for name, why in _REFUSED.items():
        if options.get(name) is not None:
            raise bad_value(name, options[name] if name == "window" else "a tensor", why, "use attention_with_kvcache")
    if options.get("batch_invariant"):
        why = "which sequences share a prefix is the batch's affair"
        raise bad_value("batch_invariant", True, why, "use attention_with_kvcache")
    check_options(options, CACHE_OPTIONS - {"page_table"})
    for name, given in (("q", q), ("k_cache", k_cache), ("cache_seqlens", cache_seqlens)):
        check_tensor(name, given)
    for name in ("k", "v", "cu_seqlens_q", "k_descale", "v_descale"):
        if options.get(name) is not None:
            check_tensor(name, options[name])
    if k_cache.dim() != 4:
        raise bad_value("k_cache", f"shape {tuple(k_cache.shape)}", "pages are shared", "give (pages, page_size, heads_kv, dim)")
    _check_shared(shared_pages, q, k_cache, page_table, cache_seqlens, options)
    if shared_pages == 0:
        return attention_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=cache_seqlens, page_table=page_table, return_lse=return_lse, **options
        )
    prefix = shared_pages * k_cache.shape[1]
    first_own = min(shared_pages, page_table.shape[1] - 1)  # a table has a column, though nobody may have rows in it
    own = attention_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=cache_seqlens - prefix, page_table=page_table[:, first_own:].contiguous(),
        return_lse=True, **options,
    )  # fmt: skip
    shared = _over_prefix(q, k_cache, v_cache, page_table[:1, :shared_pages].contiguous(), options)
    out, lse = merge(*shared, *own)
    return (out, lse) if return_lse else out


def _over_prefix(
    q: Tensor, k_cache: Tensor, v_cache: Tensor | None, pages: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Every row of the batch over the shared pages, as rows of one sequence; the sinks are in the other part."""
    kept = {name: value for name, value in options.items() if name not in ("k", "v", "sinks", "causal", "cu_seqlens_q")}
    length = torch.full((1,), pages.shape[1] * k_cache.shape[1], dtype=torch.int32, device=q.device)
    starts = options.get("cu_seqlens_q")
    rows = q[None].flatten(1, -3) if starts is None else q
    if starts is not None:
        kept["cu_seqlens_q"] = torch.stack((starts[0], starts[-1]))
    out, lse = attention_with_kvcache(rows, k_cache, v_cache, cache_seqlens=length, page_table=pages, return_lse=True, **kept)
    if starts is not None:
        return out, lse
    return out[0].unflatten(0, q.shape[:2]), lse[0].unflatten(1, q.shape[:2]).transpose(0, 1)


def _check_shared(
    shared_pages: int, q: Tensor, k_cache: Tensor, page_table: Tensor, cache_seqlens: Tensor, options: dict[str, Any]
) -> None:
    if isinstance(shared_pages, bool) or not isinstance(shared_pages, int):
        raise bad_type("shared_pages", type(shared_pages).__name__, "it counts pages", "give an int")
    if not isinstance(page_table, Tensor) or page_table.dim() != 2:
        kind = tuple(page_table.shape) if isinstance(page_table, Tensor) else type(page_table).__name__
        raise bad_value("page_table", kind, "shared pages are named in a table", "give int32 (batch, max_pages)")
    if not 0 <= shared_pages <= page_table.shape[1]:
        why = f"page_table has {page_table.shape[1]} columns"
        raise bad_value("shared_pages", shared_pages, why, f"use 0 to {page_table.shape[1]}")
    for name in ("k_descale", "v_descale"):
        if options.get(name) is not None and options[name].dim() == 2:
            why = "a shared page has one scale for all sequences"
            raise bad_value(name, f"shape {tuple(options[name].shape)}", why, "give (heads_kv,) or (pages, blocks, heads_kv)")
    if not shared_pages or not reads_contents(q) or not page_table.numel():
        return
    differing = (page_table[:, :shared_pages] != page_table[:1, :shared_pages]).any(dim=1)
    if differing.any():
        why = f"the first {shared_pages} pages of sequence {int(differing.nonzero()[0])} are not those of sequence 0"
        raise bad_value("shared_pages", shared_pages, why, "count the leading columns that agree in all rows")
    starts, k = options.get("cu_seqlens_q"), options.get("k")
    asked = q.shape[1] if starts is None else starts.diff()
    new = 0 if k is None else k.shape[1] if starts is None else asked
    before = cache_seqlens + new - asked
    prefix = shared_pages * k_cache.shape[1]
    if (cache_seqlens < prefix).any() or (options.get("causal") and (before < prefix).any()):
        b = int(torch.minimum(cache_seqlens, before).argmin())
        why = f"sequence {b} has rows of q, or its end, inside of the {prefix} shared rows"
        raise bad_value("cache_seqlens", int(cache_seqlens[b]), why, "share fewer pages")
