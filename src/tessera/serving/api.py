"""The public functions of serving: what the user says, turned into a CacheRequest and passed on.

    attention_with_kvcache    queries against cached keys and values, appended to in the same call
    plan_kvcache              what would run, and why, from shapes alone

A prefix that sequences share is cascade.py's.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from tessera.api import shape_as_tensor
from tessera.device import Device
from tessera.errors import bad_value
from tessera.options import Window, check_backend, check_options, check_tensor, mask_of, right_of
from tessera.serving import dispatch, operators
from tessera.serving.operands import TENSORS, CacheRequest, describe
from tessera.serving.plan import CachePlan


class CacheOptions(TypedDict, total=False):
    """The options of `attention_with_kvcache`, described there."""

    k: Tensor | None
    v: Tensor | None
    page_table: Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    cu_seqlens_q: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_interleaved: bool
    head_dim_v: int | None
    causal: bool
    window: Window | None
    softmax_scale: float | None
    softcap: float
    sinks: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None
    num_splits: int | None
    schedule: str | None
    batch_invariant: bool
    backend: str | None


CACHE_OPTIONS = frozenset(CacheOptions.__annotations__)


@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    return_lse: Literal[False] = False,
    **options: Unpack[CacheOptions],
) -> Tensor: ...
@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    return_lse: Literal[True],
    **options: Unpack[CacheOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    return_lse: bool,
    **options: Unpack[CacheOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...


def attention_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor | None = None, *, cache_seqlens: Tensor, k: Tensor | None = None,
    v: Tensor | None = None, page_table: Tensor | None = None, cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None, cu_seqlens_q: Tensor | None = None, rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None, rotary_interleaved: bool = True, head_dim_v: int | None = None, causal: bool = False,
    window: Window | None = None, softmax_scale: float | None = None, softcap: float = 0.0, sinks: Tensor | None = None,
    k_descale: Tensor | None = None, v_descale: Tensor | None = None, num_splits: int | None = None,
    schedule: str | None = None, batch_invariant: bool = False, return_lse: bool = False, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of new queries to cached keys and values, after appending new ones to the cache in place.

    The host reads nothing from a device: the call can be captured in a CUDA graph and replayed while sequences grow.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), or packed (total_q, heads_q, head_dim) with cu_seqlens_q; float16, bfloat16
            or float32. No gradients.
        k_cache: (batch, seqlen_cache, heads_kv, head_dim), or with page_table a pool (pages, page_size, heads_kv, head_dim), in
            q's dtype or float8_e4m3fn. heads_kv divides heads_q. Any strides with a last one of 1.
        v_cache: as k_cache with head_dim_v columns. None: the values are the first head_dim_v columns of k_cache (MLA in
            its absorbed form: head_dim up to 576, head_dim_v up to 512).
        cache_seqlens: int32 (batch,) on q's device: how many rows each sequence has in the cache before this call. Rows past
            them (and past the appended ones) may hold anything, NaN too.
        k, v: new rows (batch, seqlen_new, heads_kv, dim), packed like q if that is, written behind the cached ones before
            anything is read, in q's dtype or both as an FP8 cache keeps them. The caller advances cache_seqlens.
        page_table: int32 (batch, max_pages): page n of a sequence holds its rows from n * page_size on. Entries past a
            sequence's end may be anything.
        cache_batch_idx: int32 (batch,): each sequence's entry of a contiguous cache; None for its own number.
        cache_leftpad: int32 (batch,): so many rows at the front hold nothing; they count as positions.
        cu_seqlens_q: int32 (batch + 1,), rising from 0: sequence b has the packed rows cu_seqlens_q[b] to [b + 1].
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), q's dtype or float32: q and the new k turn on their first
            rotary_dim columns, row i of either at position cache_seqlens + i. Needs k.
        rotary_interleaved: pairs are columns (0, 1), (2, 3), ... (GPT-J); False: column i and i + rotary_dim / 2 (Llama).
        causal: row i attends to keys j <= i + seqlen_k - seqlen_q, seqlen_k counting the appended rows.
        window: (left, right), keys at most so far before and after that diagonal; None or -1 for no limit.
        softmax_scale, softcap, sinks: as in `attention`.
        k_descale, v_descale: float32 factors of FP8 values: (heads_kv,), (batch, heads_kv), or one a block of rows, (pages or
            entries, blocks, heads_kv). None for 1. New rows in q's dtype are divided by them, saturated and rounded.
        num_splits: in how many parts each sequence's keys are read, None (or 0) for the planner's choice, as is `schedule`,
            "split" or "stream_k". The answer is the same to rounding.
        batch_invariant: a sequence's result has the same bits whatever the batch around it.
        backend: one of tessera.backend_names(), or None for the first that can.

    Returns: out, q's shape with head_dim_v columns, in q's dtype; with return_lse also lse, float32, (batch, heads_q, seqlen_q)
        or (heads_q, total_q). Rows with nothing to attend to have out 0 and lse -inf (or their sink's logit).

    Raises: as `attention`. Contents (lengths, pages, offsets) are checked on the CPU always, on a device under `tessera.debug()`;
        otherwise kernels keep within their tensors, and what they return for wrong ones is undefined.

    Source: Flash-Decoding; PagedAttention (arXiv 2309.06180); Lean Attention (2405.10480). The interface follows
    flash_attn_with_kvcache, but that each row of q turns by its own position without a causal mask too.
    """
    left, right = _band(causal, window)
    request = CacheRequest(
        q, k_cache, v_cache, cache_seqlens, k, v, page_table, cache_batch_idx, cache_leftpad, cu_seqlens_q, rotary_cos,
        rotary_sin, sinks, k_descale, v_descale, head_dim_v, left, right, softmax_scale, softcap, rotary_interleaved,
        num_splits, schedule, batch_invariant, backend,
    )  # fmt: skip
    out, lse = operators.recall(request) or operators.forward(_checked(request))
    return (out, lse) if return_lse else out


def _band(causal: bool, window: Window | None) -> tuple[int | None, int | None]:
    right = right_of(causal)
    if window is None:
        return None, right
    mask = mask_of(right == 0, window, None)
    return mask.left, mask.right


def _checked(request: CacheRequest) -> CacheRequest:
    """The request, whose tensors are tensors, none of them to be differentiated."""
    for name, value in zip(_TENSOR_NAMES, request[:TENSORS], strict=True):
        if value is None and name not in _REQUIRED:
            continue
        check_tensor(name, value)
    check_backend(request.backend)
    if torch.is_grad_enabled():
        for name in ("q", "k_cache", "v_cache", "k", "v", "sinks"):
            value = getattr(request, name)
            if value is not None and value.requires_grad:
                why = "attention over a cache has no backward"
                raise bad_value(f"{name}.requires_grad", True, why, "call it under torch.no_grad(), or use tessera.attention")
    return request


_TENSOR_NAMES = CacheRequest._fields[:TENSORS]
_REQUIRED = ("q", "k_cache", "cache_seqlens")


def plan_kvcache(
    q: Tensor | tuple[int, ...],
    k_cache: Tensor | tuple[int, ...],
    v_cache: Tensor | tuple[int, ...] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    device: str | torch.device | Device | None = None,
    **options: Any,
) -> CachePlan:
    """What `attention_with_kvcache` would run, and why. Runs nothing.

    Args:
        q, k_cache, v_cache: tensors, or shapes.
        dtype: for shapes; cache_dtype: for the caches' shapes, where it is another.
        device: a torch device, or "h100" or "h200" for a GPU that need not be here; None for q's own, or the CPU.
        options: as `attention_with_kvcache` takes them; a tensor option may be given as its shape. cache_seqlens may be left out.

    Raises: what the call itself would raise.
    """
    options.pop("return_lse", None)
    check_options(options, _OPTIONS)
    if device is None:
        device = q.device if isinstance(q, Tensor) and q.device.type != "meta" else "cpu"
    described = device if isinstance(device, Device) else Device.named(str(device))
    for name in _TENSOR_NAMES[3:]:
        if isinstance(options.get(name), tuple):
            options[name] = shape_as_tensor(options[name], _OPTION_DTYPES.get(name, dtype), name)
    q = shape_as_tensor(q, dtype, "q")
    caches = [
        None if x is None else shape_as_tensor(x, cache_dtype or dtype, name)
        for name, x in (("k_cache", k_cache), ("v_cache", v_cache))
    ]
    lengths = options.pop("cache_seqlens", None)
    if lengths is None:
        packed = options.get("cu_seqlens_q")
        batch = packed.numel() - 1 if isinstance(packed, Tensor) else q.shape[0] if q.dim() else 0
        lengths = torch.empty(max(0, batch), dtype=torch.int32, device="meta")
    check_tensor("cache_seqlens", lengths)
    left, right = _band(options.pop("causal", False), options.pop("window", None))
    tensors = {name: x.detach().to("meta") if isinstance(x, Tensor) else x for name, x in options.items()}
    on_meta = [None if x is None else x.detach().to("meta") for x in (q, *caches, lengths)]
    request = CacheRequest(*on_meta, left=left, right=right, **tensors)  # type: ignore[arg-type, misc]
    return dispatch.select(describe(_checked(request), described.kind), described, request.backend)


_OPTIONS = CACHE_OPTIONS | {"cache_seqlens"}
_INTEGERS = ("cache_seqlens", "page_table", "cache_batch_idx", "cache_leftpad", "cu_seqlens_q")
_OPTION_DTYPES = dict.fromkeys(_INTEGERS, torch.int32) | dict.fromkeys(("k_descale", "v_descale"), torch.float32)
