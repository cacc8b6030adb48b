"""Hugging Face transformers: `register()`, then attn_implementation="tessera" in any model.

    from tessera.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="tessera")

Two functions are registered under the name: `attention` here, and `transformers_masks.key_bounds`, which gives every layer of a
forward its mask as intervals of keys in place of a dense tensor. See docs/transformers.md for what is supported and refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from tessera.api import attention as dense_attention
from tessera.api import attention_varlen
from tessera.dropout import drawn_seed
from tessera.errors import bad_value
from tessera.mask import Mask

NAME = "tessera"

OLDEST = (5, 5)
"""The first version whose mask functions are told q_length and q_offset."""


def library() -> ModuleType:
    """The transformers package. Raises ImportError, in words, where it is missing or too old."""
    wanted = ".".join(map(str, OLDEST))
    try:
        transformers = import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":  # installed, but one of its own dependencies is not: its error says which
            raise
        raise ImportError(f"transformers is not installed: pip install 'transformers>={wanted}'") from error
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
        raise ImportError(f"transformers {transformers.__version__} is too old: pip install -U 'transformers>={wanted}'")
    return transformers


def register() -> None:
    """Make attn_implementation="tessera" known to transformers; again is no harm."""
    transformers = library()
    masks = import_module("tessera.integrations.transformers_masks")
    transformers.AttentionInterface.register(NAME, attention)
    transformers.AttentionMaskInterface.register(NAME, masks.key_bounds)


def unregister() -> None:
    """Undo `register`. A model that still has attn_implementation="tessera" can't run until it is registered again."""
    transformers = library()
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        interface._global_mapping.pop(NAME, None)  # transformers has no public way to take a name back


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers' AttentionInterface calls it; the parameters' names are its own.

    Args:
        module: the attention layer; with a mask of None, `is_causal` is read off it where the call does not say.
        query: (batch, heads_q, seqlen_q, head_dim); key, value: (batch, heads_kv, seqlen_k, head_dim or head_dim_v).
        attention_mask: the intervals of `transformers_masks.key_bounds`; a dense mask that broadcasts to (batch, heads_q,
            seqlen_q, seqlen_k), bool (True: attend) or floating (added to the scores); or None, where a model makes none.
        dropout: dropped with a seed that is drawn from torch's default generator.
        sliding_window: its total size, the query's own key included. Only read with a mask of None: intervals hold it.
        s_aux: (heads_q,), attention sinks. position_bias: added to the scores, before the mask.
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1,), offsets of packed sequences in the tokens of the whole batch.

    Returns:
        (batch, seqlen_q, heads_q, head_dim_v), and None for the probabilities, which never exist in memory.
    """
    _refuse(others)
    options: dict[str, Any] = {"softmax_scale": scaling, "softcap": softcap or 0.0, "sinks": _sinks(s_aux, query)}
    if dropout > 0:
        options |= {"dropout_p": dropout, "seed": drawn_seed()}
    q, k, v = (_token_major(x) for x in (query, key, value))
    offsets = Offsets.of(cu_seq_lens_q, cu_seq_lens_k)
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask, bias = _own_mask(causal, sliding_window, k.shape[:2].numel() if offsets else max(q.shape[1], k.shape[1])), None
    else:
        mask, bias = _read_mask(attention_mask, query.dtype)
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    if offsets is not None:
        if bias is None and not mask.spec.bounds:
            return _packed(q, k, v, offsets, window=(mask.left, mask.right), **options), None
        mask = mask & _documents(offsets, q)
    return dense_attention(q, k, v, mask=mask, bias=bias, **options), None


# Arguments with which some models change what is computed, and the nearest thing that works.
_REFUSED = {
    "output_attentions": ("the probabilities never exist in memory", 'use attn_implementation="eager"'),
    "cache": ("continuous batching keeps its keys in pages", 'use model.generate, or attn_implementation="sdpa"'),
    "indices": ("sparse attention by lists of keys is not served", 'use attn_implementation="eager"'),
    "block_indices": ("sparse attention by lists of blocks is not served", 'use attn_implementation="eager"'),
    "sinks": ("sinks that differ from query to query are not served", 'use attn_implementation="eager"'),
}


def _refuse(others: dict[str, Any]) -> None:
    for name, (why, instead) in _REFUSED.items():
        value = others.get(name)
        if value is not None and value is not False:
            raise bad_value(name, value if isinstance(value, bool) else type(value).__name__, why, instead)


def _token_major(x: Tensor) -> Tensor:
    """(batch, heads, seqlen, dim) -> (batch, seqlen, heads, dim) with a last stride of 1; a view where it can be."""
    x = x.transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _sinks(s_aux: Tensor | None, query: Tensor) -> Tensor | None:
    return s_aux if s_aux is None or s_aux.dtype == query.dtype else s_aux.float()


def _own_mask(causal: bool, sliding_window: int | None, longest: int) -> Mask:
    """The mask of a layer that was given none, over sequences of at most `longest` tokens.

    A window that reaches over all of them is left out: plain causal attention has faster kernels.
    """
    mask = Mask.causal() if causal else Mask.full()
    if sliding_window is None or sliding_window >= longest:
        return mask
    return mask & Mask.window(sliding_window - 1, sliding_window - 1)


def _read_mask(attention_mask: Tensor, dtype: torch.dtype) -> tuple[Mask, Tensor | None]:
    """The Mask, and a bias where the mask is dense; transformers_masks says how intervals are written."""
    shape = tuple(attention_mask.shape)
    if attention_mask.dim() != 4:
        raise bad_value("attention_mask", f"shape {shape}", "a layer takes its mask in 4 dimensions", "let the model make it")
    if attention_mask.dtype == torch.int32:
        if shape[1:] == (1, 0, 0):
            return Mask.full(), None
        if shape[1:] == (1, 1, 0):
            return Mask.causal(), None
        if shape[1:3] != (1, 2):
            why = "it is not the intervals that were handed out: the model computes with its mask"
            raise bad_value("attention_mask", f"int32 of shape {shape}", why, 'use attn_implementation="eager"')
        begin, end = attention_mask[:, 0].unbind(1)  # (batch, rows) each
        if shape[3] == 1:
            return Mask(key_start=begin[:, 0].contiguous(), key_end=end[:, 0].contiguous()), None
        return Mask(document_begin=begin.contiguous(), document_end=end.contiguous()), None
    if attention_mask.dtype == torch.bool:
        return Mask(), torch.zeros_like(attention_mask, dtype=dtype).masked_fill(~attention_mask, float("-inf"))
    if not attention_mask.is_floating_point():
        why = "a mask of integers may mean anything"
        raise bad_value("attention_mask", attention_mask.dtype, why, "give bool (True: attend), or floats to add")
    return Mask(), attention_mask.to(dtype)


@dataclass(frozen=True, eq=False)
class Offsets:
    """Where packed sequences begin and end in the tokens of the whole batch: int32 (sequences + 1,)."""

    q: Tensor
    k: Tensor

    @staticmethod
    def of(cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None) -> Offsets | None:
        if cu_seq_lens_q is None or cu_seq_lens_k is None:
            return None
        return Offsets(cu_seq_lens_q.to(torch.int32), cu_seq_lens_k.to(torch.int32))


def _packed(q: Tensor, k: Tensor, v: Tensor, offsets: Offsets, **options: Any) -> Tensor:
    """Packed sequences without other bounds, (batch, seqlen, heads, dim), as the one row of tokens that they are."""
    q_row, k_row, v_row = (x.flatten(0, 1) for x in (q, k, v))
    out = cast(Tensor, attention_varlen(q_row, k_row, v_row, offsets.q, offsets.k, **options))
    return out.unflatten(0, q.shape[:2])


def _documents(offsets: Offsets, q: Tensor) -> Mask:
    """The packed sequences as a mask, for the one batch entry that they run through."""
    if q.shape[0] != 1:
        why = f"offsets run through the tokens of the whole batch, and the masks of its {q.shape[0]} entries differ"
        raise bad_value("cu_seq_lens_q", f"batch of {q.shape[0]}", why, "pack into a batch of 1, or leave out the offsets")
    rows = torch.arange(q.shape[1], device=q.device)
    document = torch.searchsorted(offsets.q[1:].contiguous(), rows, right=True)
    edges = torch.cat((offsets.k, offsets.k[-1:]))  # rows behind the last sequence are in one without keys
    return Mask(document_begin=edges[document][None], document_end=edges[document + 1][None])
