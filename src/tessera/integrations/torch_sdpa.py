"""torch's scaled_dot_product_attention, by its signature, on this package's attention: change the import and keep the calls.

    from tessera.integrations.torch_sdpa import scaled_dot_product_attention

A call means what it means there (heads before rows, a causal mask aligned to the first key), but that a row with nothing to
attend to is 0 and never NaN. docs/replacing.md has the same calls in this package's own terms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tessera.api import attention
from tessera.dropout import drawn_seed
from tessera.errors import bad_type, bad_value
from tessera.mask import Mask


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | Mask | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`tessera.attention` as torch.nn.functional.scaled_dot_product_attention.

    Args:
        query: (..., heads_q, seqlen_q, head_dim), 2 dimensions at least; key, value: (..., heads_kv, seqlen_k, head_dim or
            head_dim_v). Strides are free: nothing is copied where the last one is 1.
        attn_mask: broadcastable to (..., heads_q, seqlen_q, seqlen_k), bool (True: attend) or floating (added to the scores,
            differentiable): either is read element by element. A tessera.Mask is intervals of keys, and skips tiles.
        dropout_p: dropped with a seed that is drawn from torch's default generator.
        is_causal: row i attends to keys j <= i. Not together with a tensor attn_mask.
        scale: None for head_dim ** -0.5.
        enable_gqa: taken and not needed: heads_kv divides heads_q.

    Returns: (..., heads_q, seqlen_q, head_dim_v), rows of one token beside each other in memory.

    Raises: as `tessera.attention`.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dim() < 2:
            shown = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise bad_type(name, shown, "rows and columns are the last two dimensions", "give (..., heads, seqlen, head_dim)")
    if is_causal and isinstance(attn_mask, Tensor):
        raise bad_value("is_causal", True, "attn_mask is a tensor", "let attn_mask say it all, or give a tessera.Mask")
    q, k, v = (_token_major(x) for x in (query, key, value))
    options: dict[str, Any] = {"softmax_scale": scale}
    if dropout_p != 0.0:
        options |= {"dropout_p": dropout_p, "seed": drawn_seed()}
    if isinstance(attn_mask, Tensor):
        options["bias"] = _added(attn_mask, query)
    elif attn_mask is not None:
        options["mask"] = attn_mask
    if is_causal:
        later = q.shape[1] - k.shape[1]
        if later < 0 and attn_mask is None:
            k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]  # no row reaches the others
        elif later < 0:
            raise bad_value("is_causal", True, "a tessera.Mask counts keys from the last one", "use tessera.attention")
        options["window"] = (None, max(0, later))
    out = attention(q, k, v, **options).transpose(1, 2)
    return out.reshape(*query.shape[:-1], out.shape[-1])


def _token_major(x: Tensor) -> Tensor:
    """(..., heads, seqlen, dim) -> (batch, seqlen, heads, dim), a view where its strides and a last one of 1 allow it."""
    while x.dim() < 4:
        x = x[None]
    x = x.flatten(0, -4).transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _added(attn_mask: Tensor, query: Tensor) -> Tensor:
    """The mask as a bias of at most four dimensions."""
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    leading = query.shape[:-3]
    if len(leading) < 2 or attn_mask.dim() < 4:
        return attn_mask
    return attn_mask.expand(*leading, *attn_mask.shape[-3:]).flatten(0, -4)
