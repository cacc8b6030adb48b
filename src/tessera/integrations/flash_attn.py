"""FlashAttention-2's Python functions, by its signatures, on this package's attention: change the import and keep the calls.

    from tessera.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

As flash_attn_interface.py, but for the order of the arguments, dropout (its seed comes from torch's default generator),
ALiBi, and `block_table` for `page_table`. With return_attn_probs the third result is None: there are no probabilities in memory.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tessera import attention, attention_varlen
from tessera.dropout import drawn_seed
from tessera.errors import bad_value
from tessera.integrations import flash_attn_interface, vllm_flash_attn
from tessera.integrations.flash_attn_interface import Window, limits

Result = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """`tessera.attention` as FlashAttention-2's flash_attn_func. Returns out, with return_attn_probs (out, lse, None)."""
    options: dict[str, Any] = {
        "causal": causal, "window": limits(window_size), "softmax_scale": softmax_scale, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "deterministic": deterministic, "return_lse": return_attn_probs, **_dropout(dropout_p),
    }  # fmt: skip
    return _results(attention(q, k, v, **options))


def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """The same of one tensor (batch, seqlen, 3, heads, head_dim), whose slices are read as they lie."""
    q, k, v = qkv.unbind(dim=2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """The same of queries and one tensor (batch, seqlen_k, 2, heads_kv, head_dim) of keys and values."""
    k, v = kv.unbind(dim=2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, block_table: Tensor | None = None,
) -> Result:  # fmt: skip
    """`tessera.attention_varlen` as FlashAttention-2's flash_attn_varlen_func; max_seqlen_q and max_seqlen_k are not needed. With
    block_table k and v are pages, each sequence's length follows from cu_seqlens_k, and there are no gradients."""
    if block_table is not None:
        found = vllm_flash_attn.flash_attn_varlen_func(
            q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, seqused_k=cu_seqlens_k.diff(), dropout_p=dropout_p,
            softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
            return_softmax_lse=return_attn_probs, block_table=block_table,
        )  # fmt: skip
        return _results(found)
    options: dict[str, Any] = {
        "causal": causal, "window": limits(window_size), "softmax_scale": softmax_scale, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "deterministic": deterministic, "return_lse": return_attn_probs, **_dropout(dropout_p),
    }  # fmt: skip
    return _results(attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options))


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """The same of one tensor (total, 3, heads, head_dim), whose slices are read as they lie."""
    q, k, v = qkv.unbind(dim=1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """The same of queries and one tensor (total_k, 2, heads_kv, head_dim) of keys and values."""
    k, v = kv.unbind(dim=1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: Window = (-1, -1), softcap: float = 0.0,
    rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None, num_splits: int = 0, return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """As FlashAttention-3's (flash_attn_interface.py), with `block_table` for its page_table."""
    if alibi_slopes is not None:
        why, instead = "a step over a cache has no ALiBi", "use flash_attn_func over the gathered keys"
        raise bad_value("alibi_slopes", f"shape {tuple(alibi_slopes.shape)}", why, instead)
    return flash_attn_interface.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, page_table=block_table, softmax_scale=softmax_scale,
        causal=causal, window_size=window_size, softcap=softcap, rotary_interleaved=rotary_interleaved, num_splits=num_splits,
        return_softmax_lse=return_softmax_lse,
    )  # fmt: skip


def _dropout(dropout_p: float) -> dict[str, Any]:
    return {"dropout_p": dropout_p, "seed": drawn_seed()} if dropout_p else {}


def _results(found: Tensor | tuple[Tensor, Tensor]) -> Result:
    """With lse, and None for the probabilities."""
    return found if isinstance(found, Tensor) else (*found, None)
