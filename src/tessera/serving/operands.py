"""The tensors of one call over a KV cache, checked once against each other; the only place where they are checked.

`CacheRequest` is what the user said, flat, in the order of the torch operators' arguments. `describe` makes the CacheProblem
of it from all that can be seen without reading a tensor's contents (those: contents.py); `gather` the CacheOperands.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tessera.errors import bad_type, bad_value
from tessera.mask import MaskSpec
from tessera.operands import check_device, check_flag, check_heads, check_scale, check_sinks
from tessera.problem import MAX_HEAD_DIM, Layout, Reproducibility, Score, Shape
from tessera.serving.problem import (
    MAX_LATENT_DIM,
    Append,
    Cache,
    CacheProblem,
    Descale,
    Granularity,
    Pages,
    Rotary,
    RotaryStyle,
    Schedule,
    Values,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FP8 = torch.float8_e4m3fn
MAX_SPLITS = 256


class CacheRequest(NamedTuple):
    """One call as the user put it. The tensors come first: see calls.py."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor | None
    cache_seqlens: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    page_table: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    sinks: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    head_dim_v: int | None = None
    left: int | None = None
    right: int | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    rotary_interleaved: bool = True
    num_splits: int | None = None
    schedule: str | None = None
    batch_invariant: bool = False
    backend: str | None = None


TENSORS = 15
"""The first fields of a CacheRequest are tensors or None."""


class CacheOperands(NamedTuple):
    """The tensors of a CacheProblem, as backends take them.

    q (batch, seqlen_q, heads_q, head_dim), packed (total_q, heads_q, head_dim); k_cache (entries, seqlen_cache, heads_kv,
    head_dim), paged (pages, page_size, heads_kv, head_dim); v_cache alike with head_dim_v, None under Values.IN_KEYS.
    k, v: the rows to append, (batch, seqlen_new, heads_kv, dim) or packed like q. int32: cache_seqlens, cache_batch_idx,
    cache_leftpad (batch,), page_table (batch, max_pages), cu_seqlens_q (batch + 1,). rotary_cos, rotary_sin (positions,
    rotary_dim / 2). sinks (heads_q,). k_descale, v_descale float32, as their Granularity says.
    Strides are free but for a last one of 1; the strides of dimensions of size 1 say nothing.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor | None
    cache_seqlens: Tensor
    k: Tensor | None
    v: Tensor | None
    page_table: Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    cu_seqlens_q: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    sinks: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None


def gather(request: CacheRequest) -> CacheOperands:
    """The tensors of a request. Checks nothing."""
    return CacheOperands._make(request[:TENSORS])


def describe(request: CacheRequest, device_kind: str | None = None) -> CacheProblem:
    """The CacheProblem of a request. Raises ValueError or TypeError that names the argument.

    `device_kind` is the type of the device to run on where that is not q's own: a plan's tensors are on meta.
    """
    layout = Layout.DENSE if request.cu_seqlens_q is None else Layout.VARLEN
    _check_q(request.q, layout)
    shape, cache = _check_cache(request, layout)
    latent = cache.values is Values.IN_KEYS
    check_heads(shape, device_kind or request.q.device.type, (MAX_LATENT_DIM, MAX_LATENT_DIM) if latent else _HEAD_DIMS)
    _check_indices(request, shape.batch)
    append = _check_append(request, shape, layout, cache)
    sinks = check_sinks(request.sinks, request.q)
    check_scale(request.softmax_scale, request.softcap)
    for name in ("rotary_interleaved", "batch_invariant"):
        check_flag(name, getattr(request, name))
    return CacheProblem(
        shape=shape,
        dtype=request.q.dtype,
        score=Score(
            scale=shape.head_dim**-0.5 if request.softmax_scale is None else float(request.softmax_scale),
            softcap=float(request.softcap),
            sinks=sinks,
        ),
        cache=cache,
        layout=layout,
        mask=MaskSpec(request.left, request.right),
        lengths=tuple(name for name in _LENGTHS if getattr(request, name) is not None),
        append=append,
        splits=_check_splits(request.num_splits),
        schedule=_check_schedule(request.schedule),
        reproducibility=Reproducibility.BATCH_INVARIANT if request.batch_invariant else Reproducibility.ANY_ORDER,
    )


_HEAD_DIMS = (MAX_HEAD_DIM, MAX_HEAD_DIM)
_LENGTHS = ("cu_seqlens_q", "cache_batch_idx", "cache_leftpad")


def _check_q(q: Tensor, layout: Layout) -> None:
    form, rank = ("(batch, seqlen_q, heads_q, head_dim)", 4) if layout is Layout.DENSE else ("(total_q, heads_q, head_dim)", 3)
    if q.dim() != rank:
        why = "cu_seqlens_q packs its rows" if layout is Layout.VARLEN else f"{q.dim()} dimensions"
        raise bad_value("q", f"shape {tuple(q.shape)}", why, f"give {form}")
    if q.dtype not in DTYPES:
        raise bad_type("q", q.dtype, "not a dtype this runs in", "use " + ", ".join(map(str, DTYPES)))
    _check_rows("q", q, q)


def _check_rows(name: str, tensor: Tensor, q: Tensor) -> None:
    """It lies where q does, and its last dimension is dense."""
    check_device(name, tensor, q)
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise bad_value(f"{name}.stride()", tensor.stride(), "the last dimension is strided", f"use {name}.contiguous()")


def _check_cache(request: CacheRequest, layout: Layout) -> tuple[Shape, Cache]:
    q, k_cache, v_cache, table = request.q, request.k_cache, request.v_cache, request.page_table
    form = "(entries, seqlen_cache, heads_kv, dim)" if table is None else "(pages, page_size, heads_kv, dim)"
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor is None:
            continue
        if tensor.dim() != 4:
            raise bad_value(name, f"shape {tuple(tensor.shape)}", f"{tensor.dim()} dimensions", f"give {form}")
        if tensor.dtype not in (q.dtype, FP8) or tensor.dtype != k_cache.dtype:
            why = f"q is {q.dtype}, k_cache {k_cache.dtype}"
            raise bad_type(name, tensor.dtype, why, f"store the cache in q's dtype, or all of it in {FP8}")
        _check_rows(name, tensor, q)
    if k_cache.shape[-1] != q.shape[-1]:
        raise bad_value("k_cache", f"head_dim {k_cache.shape[-1]}", f"q has head_dim {q.shape[-1]}", "they share one head_dim")
    head_dim_v, values = _check_values(request)
    entries, rows = k_cache.shape[:2]
    batch = q.shape[0] if request.cu_seqlens_q is None else request.cu_seqlens_q.numel() - 1
    pages = None if table is None else _check_page_table(table, request, batch)
    if pages is None and request.cache_batch_idx is None and entries != batch:
        instead = f"use k_cache[:{batch}], or say in cache_batch_idx which entries"
        raise bad_value("k_cache", f"{entries} entries", f"there are {batch} sequences", instead)
    capacity = rows if pages is None else pages.size * pages.per_sequence
    shape = Shape(batch, q.shape[-3], capacity, q.shape[-2], k_cache.shape[-2], q.shape[-1], head_dim_v)
    k_descale = _check_descale("k_descale", request.k_descale, request, batch)
    v_descale = _check_descale("v_descale", request.v_descale, request, batch)
    return shape, Cache(k_cache.dtype, entries if pages is None else 0, pages, values, k_descale, v_descale)


def _check_values(request: CacheRequest) -> tuple[int, Values]:
    k_cache, v_cache, head_dim_v = request.k_cache, request.v_cache, request.head_dim_v
    if head_dim_v is not None and (isinstance(head_dim_v, bool) or not isinstance(head_dim_v, int)):
        raise bad_type("head_dim_v", repr(head_dim_v), "it counts columns", "give an int, or None")
    if v_cache is None:
        if head_dim_v is None or not 1 <= head_dim_v <= k_cache.shape[-1]:
            why = "without v_cache the values are the first head_dim_v columns of k_cache"
            raise bad_value("head_dim_v", head_dim_v, why, f"give 1 to {k_cache.shape[-1]} (MLA: 512), or a v_cache")
        for name in ("v", "v_descale"):
            if getattr(request, name) is not None:
                raise bad_value(name, "a tensor", "the values are columns of k_cache", f"leave {name} out, or give a v_cache")
        return head_dim_v, Values.IN_KEYS
    if v_cache.dim() != 4 or v_cache.shape[:-1] != k_cache.shape[:-1]:
        why = f"k_cache is {tuple(k_cache.shape)}"
        raise bad_value("v_cache", f"shape {tuple(v_cache.shape)}", why, "k_cache and v_cache may differ in head_dim alone")
    if head_dim_v not in (None, v_cache.shape[-1]):
        raise bad_value("head_dim_v", head_dim_v, f"v_cache has {v_cache.shape[-1]} columns", "leave it out, or v_cache")
    return v_cache.shape[-1], Values.OWN


def _check_page_table(table: Tensor, request: CacheRequest, batch: int) -> Pages:
    _check_int32("page_table", table, request.q)
    if table.dim() != 2 or table.shape[0] != batch or (table.shape[1] > 1 and table.stride(1) != 1):
        form = f"shape {tuple(table.shape)}, strides {table.stride()}"
        raise bad_value("page_table", form, f"there are {batch} sequences", f"give ({batch}, max_pages), rows dense")
    if request.cache_batch_idx is not None:
        why = "a page table names each sequence's pages itself"
        raise bad_value("cache_batch_idx", "a tensor", why, "use page_table[cache_batch_idx]")
    count, size = request.k_cache.shape[:2]
    if size < 1:
        raise bad_value("k_cache", f"page_size {size}", "a page holds at least one row", "give (pages, page_size, heads_kv, dim)")
    return Pages(size, table.shape[1], count)


def _check_descale(name: str, descale: Tensor | None, request: CacheRequest, batch: int) -> Descale | None:
    if descale is None:
        return None
    entries, rows, heads = request.k_cache.shape[:3]
    if request.k_cache.dtype != FP8:
        raise bad_value(name, "a tensor", f"the cache is {request.k_cache.dtype}", f"leave it out; {FP8} caches have scales")
    if descale.dtype != torch.float32:
        raise bad_type(name, descale.dtype, "scales are read as float32", f"use {name}.float()")
    check_device(name, descale, request.q)
    if descale.shape == (heads,):
        return Descale(Granularity.HEAD)
    if descale.shape == (batch, heads):
        return Descale(Granularity.SEQUENCE)
    blocks = descale.shape[1] if descale.dim() == 3 else 0
    if blocks and descale.shape == (entries, blocks, heads) and rows % blocks == 0:
        return Descale(Granularity.BLOCK, rows // blocks)
    wanted = f"({heads},), ({batch}, {heads}), or ({entries}, blocks, {heads}) with blocks dividing {rows}"
    raise bad_value(name, f"shape {tuple(descale.shape)}", "one scale a head, a sequence or a block of rows", f"give {wanted}")


def _check_int32(name: str, value: Tensor, q: Tensor) -> None:
    if value.dtype != torch.int32:
        raise bad_type(name, value.dtype, "positions are read as int32 in the kernels", f"use {name}.to(torch.int32)")
    check_device(name, value, q)


def _check_indices(request: CacheRequest, batch: int) -> None:
    sizes = {"cache_seqlens": batch, "cache_batch_idx": batch, "cache_leftpad": batch, "cu_seqlens_q": batch + 1}
    for name, size in sizes.items():
        value = getattr(request, name)
        if value is None:
            continue
        _check_int32(name, value, request.q)
        if batch < 0 or value.shape != (size,) or (size > 1 and value.stride(0) != 1):
            form = "(batch + 1,)" if name == "cu_seqlens_q" else "(batch,)"
            why = f"there are {max(batch, 0)} sequences"
            raise bad_value(name, f"shape {tuple(value.shape)}, strides {value.stride()}", why, f"give a dense {form}")


def _check_append(request: CacheRequest, shape: Shape, layout: Layout, cache: Cache) -> Append | None:
    k, v = request.k, request.v
    if k is None:
        for name in ("v", "rotary_cos", "rotary_sin"):
            if getattr(request, name) is not None:
                why = "it goes with new keys, and there are none"
                raise bad_value(name, "a tensor", why, f"give k (batch, seqlen_new, heads_kv, head_dim) too, or leave {name} out")
        return None
    if v is None and cache.values is Values.OWN:
        raise bad_value("v", None, "new keys come with their values", "give v too")
    q = request.q
    for name, new, stored, dim in (
        ("k", k, request.k_cache, shape.head_dim),
        ("v", v, request.v_cache, shape.head_dim_v),
    ):
        if new is None or stored is None:
            continue
        rows = (q.shape[0],) if layout is Layout.VARLEN else (shape.batch, k.shape[1] if k.dim() == 4 else -1)
        if new.shape != (*rows, shape.heads_kv, dim):
            asked = f"({shape.batch}, seqlen_new" if layout is Layout.DENSE else f"({q.shape[0]}"
            why = "new rows come packed as q's do" if layout is Layout.VARLEN else "new rows are a batch like q's"
            raise bad_value(name, f"shape {tuple(new.shape)}", why, f"give {asked}, {shape.heads_kv}, {dim})")
        if new.dtype not in (q.dtype, cache.dtype) or new.dtype != k.dtype:
            why = f"q is {q.dtype}, the cache {cache.dtype}, k {k.dtype}"
            raise bad_type(name, new.dtype, why, "give k and v in q's dtype, or both as the cache keeps them")
        _check_rows(name, new, q)
        if any(size > 1 and stride == 0 for size, stride in zip(stored.shape, stored.stride(), strict=True)):
            why = "its rows share memory, and new ones are written into it"
            raise bad_value(f"{name}_cache.stride()", stored.stride(), why, f"use {name}_cache.contiguous()")
    rotary = _check_rotary(request, shape, cache)
    if rotary is not None and k.dtype != q.dtype:
        raise bad_type("k", k.dtype, "it is rotated before it is rounded for the cache", f"give it in {q.dtype}, and v with it")
    return Append(k.shape[-3], k.dtype, rotary)


def _check_rotary(request: CacheRequest, shape: Shape, cache: Cache) -> Rotary | None:
    cos, sin = request.rotary_cos, request.rotary_sin
    if cos is None and sin is None:
        return None
    if cos is None or sin is None:
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise bad_value(missing, None, "a rotation has a cosine and a sine", "give both tables")
    if cache.values is Values.IN_KEYS:
        why = "it would turn the columns that are the values"
        raise bad_value("rotary_cos", "a tensor", why, "rotate q and k before the call")
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        if table.dtype not in (request.q.dtype, torch.float32) or table.dtype != cos.dtype:
            raise bad_type(name, table.dtype, f"q is {request.q.dtype}", "use q's dtype or float32 for both tables")
        if table.dim() != 2 or table.shape != cos.shape or not 2 <= 2 * table.shape[1] <= shape.head_dim:
            why = f"a table is (positions, rotary_dim / 2), rotary_dim at most head_dim {shape.head_dim}"
            raise bad_value(name, f"shape {tuple(table.shape)}", why, "give both tables in that shape")
        _check_rows(name, table, request.q)
    style = RotaryStyle.INTERLEAVED if request.rotary_interleaved else RotaryStyle.HALVES
    return Rotary(2 * cos.shape[1], style, cos.shape[0], cos.dtype)


def _check_splits(num_splits: int | None) -> int | None:
    if num_splits is None or num_splits == 0:  # 0 is flash-attn's word for the planner's choice
        return None
    if isinstance(num_splits, bool) or not isinstance(num_splits, int):
        raise bad_type("num_splits", type(num_splits).__name__, "it counts parts of the keys", "give an int, or None")
    if not 1 <= num_splits <= MAX_SPLITS:
        raise bad_value("num_splits", num_splits, f"keys come in 1 to {MAX_SPLITS} parts", "use None for the planner's choice")
    return num_splits


def _check_schedule(schedule: str | None) -> Schedule | None:
    if schedule is None:
        return None
    names = [member.value for member in Schedule]
    if schedule not in names:
        raise bad_value("schedule", repr(schedule), "there is no such schedule", f"use None or one of {', '.join(names)}")
    return Schedule(schedule)
