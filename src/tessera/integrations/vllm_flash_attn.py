"""The attention that vLLM calls, by its signature: what `vllm.vllm_flash_attn` exports, on this package's attention.

    from tessera.integrations.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

One function serves a batch of prompts, chunks of prompts and single tokens, over pages (`block_table` with `seqused_k`) or over
packed keys (`cu_seqlens_k`). Under a CUDA graph it may be replayed while sequences grow. What says how and not what (the longest
lengths, fa_version, scheduler_metadata) is taken and not needed; what would change the result and is not served is an error in
words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tessera import attention_varlen, attention_with_kvcache
from tessera.errors import bad_value
from tessera.integrations.flash_attn_interface import QUERIES_APART, Result, get_scheduler_metadata, limits, refuse

__all__ = ["flash_attn_varlen_func", "get_scheduler_metadata"]


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, max_seqlen_q: int | None, cu_seqlens_q: Tensor, max_seqlen_k: int | None = None,
    cu_seqlens_k: Tensor | None = None, seqused_k: Tensor | None = None, q_v: Tensor | None = None, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False, window_size: Sequence[int | None] | None = None,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
    block_table: Tensor | None = None, return_softmax_lse: bool = False, out: Tensor | None = None,
    scheduler_metadata: Tensor | None = None, q_descale: Tensor | None = None, k_descale: Tensor | None = None,
    v_descale: Tensor | None = None, num_splits: int = 0, output_scale: Tensor | None = None, fa_version: int = 3,
    s_aux: Tensor | None = None, cp_world_size: int = 1, cp_rank: int = 0, cp_tot_seqused_k: Tensor | None = None,
    **others: object,
) -> Result:  # fmt: skip
    """Attention of packed queries to the keys of each one's sequence.

    Args:
        q: (total_q, heads_q, head_dim); cu_seqlens_q: int32 (batch + 1,), where each sequence's rows begin.
        k, v: pools of pages (pages, page_size, heads_kv, head_dim) with block_table (batch, pages of a sequence) and seqused_k,
            how many rows each sequence has in its pages, the newest among them; or packed (total_k, heads_kv, head_dim) with
            cu_seqlens_k, where ALiBi and gradients are served too.
        causal: aligned to a sequence's last key. window_size: (left, right), -1 for no limit.
        s_aux: (heads_q,), the logits of attention sinks. out: where the result is put as well.
        k_descale, v_descale: (batch, heads_kv), of an FP8 cache; of any other one they are not looked at.

    Returns: out, with return_softmax_lse (out, lse), lse float32 (heads_q, total_q).
    """
    refuse(
        dict.fromkeys(others, _UNKNOWN) | _NOT_SERVED, q_v=q_v, output_scale=output_scale, cp_tot_seqused_k=cp_tot_seqused_k,
        dropout_p=dropout_p or None, cp_world_size=None if cp_world_size == 1 else cp_world_size, **others,
    )  # fmt: skip
    options: dict[str, Any] = {
        "causal": causal, "window": None if window_size is None else limits((window_size[0], window_size[1])),
        "softmax_scale": softmax_scale, "softcap": softcap, "sinks": s_aux, "return_lse": True,
    }  # fmt: skip
    if block_table is not None:
        refuse(_NOT_SERVED, alibi_slopes=alibi_slopes, cu_seqlens_k=cu_seqlens_k)
        if seqused_k is None:
            raise bad_value("seqused_k", None, "pages say nothing of lengths", "say how many rows each sequence has in its pages")
        scales = {"k_descale": k_descale, "v_descale": v_descale} if k.element_size() == 1 else {}
        options |= {"cu_seqlens_q": cu_seqlens_q, "page_table": block_table, "num_splits": num_splits, **scales}
        found, lse = attention_with_kvcache(q, k, v, cache_seqlens=seqused_k, **options)
    elif cu_seqlens_k is None:
        raise bad_value("cu_seqlens_k", None, "keys are packed where there is no block_table", "give cu_seqlens_k or block_table")
    else:
        options |= {"seqused_k": seqused_k, "alibi_slopes": alibi_slopes, "deterministic": deterministic}
        found, lse = attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    if out is not None:
        found = out.copy_(found)
    return (found, lse) if return_softmax_lse else found


_UNKNOWN = ("there is no such option here", "use tessera.attention_with_kvcache or tessera.attention_varlen")
_NOT_SERVED = {
    "q_v": QUERIES_APART,
    "dropout_p": ("serving drops nothing", "use tessera.attention_varlen, which takes a seed"),
    "alibi_slopes": ("a step over pages has no ALiBi", "gather the keys and give cu_seqlens_k"),
    "cu_seqlens_k": ("pages have their lengths from seqused_k", "leave it out, or leave block_table out"),
    "output_scale": ("results are in q's dtype", "quantise out after the call"),
    "cp_world_size": ("a call has all keys of its sequences", "give each rank's keys, and join with tessera.merge"),
    "cp_tot_seqused_k": ("a call has all keys of its sequences", "give each rank's keys, and join with tessera.merge"),
}
"""What is not served, why, and what works."""
