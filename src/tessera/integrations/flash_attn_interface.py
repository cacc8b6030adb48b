"""FlashAttention-3's Python functions, by its signatures, on this package's attention: change the import and keep the calls.

    from tessera.integrations.flash_attn_interface import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

They run wherever `tessera.attention` runs, on a CPU too. What says how and not what (max_seqlen_q, num_splits of a dense call,
pack_gqa, sm_margin, scheduler_metadata) is taken and not needed; what would change the result and is not served is an error in
words. docs/replacing.md has the same calls in this package's own terms, which can more: bias, ALiBi, sinks, dropout, masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tessera import attention, attention_varlen, attention_with_kvcache
from tessera.errors import bad_value

Window = tuple[int | None, int | None]
Result = Tensor | tuple[Tensor, Tensor]


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False, qv: Tensor | None = None,
    q_descale: Tensor | None = None, k_descale: Tensor | None = None, v_descale: Tensor | None = None,
    window_size: Window = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
    pack_gqa: bool | None = None, deterministic: bool = False, sm_margin: int = 0, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """`tessera.attention` as FlashAttention-3's flash_attn_func: q, k, v (batch, seqlen, heads, head_dim).

    Returns: out, with return_attn_probs (out, lse), lse float32 (batch, heads, seqlen_q).
    """
    scales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    refuse(_NOT_SERVED, qv=qv, **scales, attention_chunk=attention_chunk or None)
    options: dict[str, Any] = {
        "causal": causal, "window": limits(window_size), "softmax_scale": softmax_scale, "softcap": softcap,
        "deterministic": deterministic, "return_lse": return_attn_probs,
    }  # fmt: skip
    return attention(q, k, v, **options)


def flash_attn_qkvpacked_func(
    qkv: Tensor, softmax_scale: float | None = None, causal: bool = False, q_descale: Tensor | None = None,
    k_descale: Tensor | None = None, v_descale: Tensor | None = None, window_size: Window = (-1, -1), attention_chunk: int = 0,
    softcap: float = 0.0, deterministic: bool = False, num_heads_q: int | None = None, sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """The same of one tensor: (batch, seqlen, 3, heads, head_dim), or with num_heads_q (batch, seqlen, all heads, head_dim),
    first those of q, then as many of k as of v. Slices are read as they lie."""
    if num_heads_q is None:
        q, k, v = qkv.unbind(dim=-3)
    else:
        heads_kv = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = qkv.split([num_heads_q, heads_kv, heads_kv], dim=-2)
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap,
        deterministic=deterministic, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, seqused_q: Tensor | None = None, seqused_k: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, qv: Tensor | None = None, q_descale: Tensor | None = None,
    k_descale: Tensor | None = None, v_descale: Tensor | None = None, window_size: Window = (-1, -1), attention_chunk: int = 0,
    softcap: float = 0.0, num_splits: int = 1, pack_gqa: bool | None = None, deterministic: bool = False, sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """`tessera.attention_varlen` as FlashAttention-3's flash_attn_varlen_func: q, k, v (total, heads, head_dim).

    Returns: out, with return_attn_probs (out, lse), lse float32 (heads, total_q).
    """
    scales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    refuse(_NOT_SERVED, qv=qv, **scales, attention_chunk=attention_chunk or None)
    options: dict[str, Any] = {
        "seqused_q": seqused_q, "seqused_k": seqused_k, "causal": causal, "window": limits(window_size),
        "softmax_scale": softmax_scale, "softcap": softcap, "deterministic": deterministic, "return_lse": return_attn_probs,
    }  # fmt: skip
    return attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None, qv: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None, page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k_new: Tensor | None = None, max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None, q_descale: Tensor | None = None, k_descale: Tensor | None = None,
    v_descale: Tensor | None = None, softmax_scale: float | None = None, causal: bool = False, window_size: Window = (-1, -1),
    attention_chunk: int = 0, softcap: float = 0.0, rotary_interleaved: bool = True, scheduler_metadata: Tensor | None = None,
    num_splits: int = 0, pack_gqa: bool | None = None, sm_margin: int = 0, return_softmax_lse: bool = False,
) -> Result:  # fmt: skip
    """`tessera.attention_with_kvcache` as FlashAttention-3's flash_attn_with_kvcache; k and v are appended to the cache in place.

    cache_seqlens: a tensor, one number for all sequences, or None for whole caches (without new keys).
    Returns: out, with return_softmax_lse (out, lse).
    """
    refuse(_NOT_SERVED, qv=qv, q_descale=q_descale, rotary_seqlens=rotary_seqlens, attention_chunk=attention_chunk or None)
    if cu_seqlens_k_new is not None and cu_seqlens_k_new is not cu_seqlens_q:
        why = "new keys are packed as the queries are"
        raise bad_value("cu_seqlens_k_new", "another tensor than cu_seqlens_q", why, "give cu_seqlens_q itself, or None")
    window = limits(window_size)
    if rotary_cos is not None and not causal and window is None and (cu_seqlens_q is not None or q.shape[1] > 1):
        why = "FlashAttention turns all queries of such a call by one position, and each turns by its own here"
        raise bad_value("causal", causal, why, "use causal=True or a window, or turn q before the call")
    options: dict[str, Any] = {
        "k": k, "v": v, "cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad, "page_table": page_table,
        "cu_seqlens_q": cu_seqlens_q, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin,
        "rotary_interleaved": rotary_interleaved, "k_descale": k_descale, "v_descale": v_descale, "causal": causal,
        "window": window, "softmax_scale": softmax_scale, "softcap": softcap, "num_splits": num_splits or None,
        "return_lse": return_softmax_lse,
    }  # fmt: skip
    lengths = _lengths(q, k_cache, (k, page_table, cu_seqlens_q), cache_seqlens)
    return attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, **options)


def get_scheduler_metadata(*arguments: object, **options: object) -> None:
    """What a server makes for the scheduler_metadata of its steps. Nothing is needed here: kernels divide the lengths among
    themselves, on the device."""


def limits(sides: Window) -> Window | None:
    """None where neither side is limited."""
    left, right = sides
    return None if (left, right) == (-1, -1) else (left, right)


def _lengths(
    q: Tensor, k_cache: Tensor, others: tuple[Tensor | None, Tensor | None, Tensor | None], given: int | Tensor | None
) -> Tensor:
    """cache_seqlens as a tensor; `others` are k, page_table and cu_seqlens_q."""
    if isinstance(given, Tensor):
        return given
    k, page_table, cu_seqlens_q = others
    if given is None:
        if k is not None:
            why = "new keys are written behind the cached ones"
            raise bad_value("cache_seqlens", None, why, "say how many rows each sequence has cached")
        given = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    return torch.full((batch,), given, dtype=torch.int32, device=q.device)


QUERIES_APART = (
    "MLA's queries are one tensor here, of 576 columns", "use tessera.attention_with_kvcache, as docs/serving.md shows",
)  # fmt: skip
_NOT_SERVED = {
    "qv": QUERIES_APART,
    "q_descale": ("queries are not in FP8 here", "give q in bfloat16; k_descale and v_descale of an FP8 cache are served"),
    "k_descale": ("FP8 keys lie in caches alone", "use bfloat16, or flash_attn_with_kvcache"),
    "v_descale": ("FP8 values lie in caches alone", "use bfloat16, or flash_attn_with_kvcache"),
    "rotary_seqlens": ("queries and new keys turn by the positions that cache_seqlens gives", "turn q and k before the call"),
    "attention_chunk": ("chunks of the diagonal are no option here", "use window_size, or tessera.Mask.documents"),
}
"""What is not served, why, and what works."""


def refuse(not_served: Mapping[str, tuple[str, str]], /, **given: object) -> None:
    """An error for the first option that is given; `not_served` says of each why, and what works."""
    for name, value in given.items():
        if value is not None:
            shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
            raise bad_value(name, shown, *not_served[name])
