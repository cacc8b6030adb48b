"""The public functions: what the user says, turned into a Request and passed on.

    attention            (batch, seqlen, heads, head_dim)
    attention_varlen     (total, heads, head_dim), sequences cut by cu_seqlens
    plan                 what would run, and why, from shapes alone
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from tessera import dispatch, operators
from tessera.device import Device
from tessera.errors import bad_type, bad_value
from tessera.mask import Mask, check_window_side
from tessera.operands import Request, bind, check_scalars
from tessera.plan import Plan

Window = tuple[int | None, int | None]


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Any) -> Tensor: ...
@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Any) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    mask: Mask | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, softmax(scale q k^T) v, without the (seqlen_q, seqlen_k) matrix in memory.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), float16, bfloat16 or float32 (float64 too on the CPU).
        k: (batch, seqlen_k, heads_kv, head_dim); heads_kv divides heads_q (GQA, MQA).
        v: (batch, seqlen_k, heads_kv, head_dim_v). Strides are free but for a last one of 1; head dims up to 256.
        causal: row i attends to keys j <= i + seqlen_k - seqlen_q (aligned to the bottom right).
        window: (left, right), keys at most so far before and after the diagonal; None or -1 for no limit.
        softmax_scale: multiplies q.k; None for head_dim ** -0.5.
        softcap: c > 0 turns a score x into c tanh(x / c), after the scale and before bias and mask.
        alibi_slopes: float32 (heads_q,) or (batch, heads_q), adds -slope |i + seqlen_k - seqlen_q - j|. Not differentiable.
        bias: added to the scores; broadcastable to (batch, heads_q, seqlen_q, seqlen_k), q's dtype or float32. Differentiable.
        sinks: (heads_q,), one logit a head in the softmax's denominator (its value is 0). Differentiable.
        dropout_p: probability in [0, 1) with which a normalised probability is dropped, the others scaled by 1 / (1 - p).
        seed: of the dropout, 0 <= seed < 2**63; needed with dropout_p > 0. See tessera.dropout_mask.
        mask: a tessera.Mask, intersected with `causal` and `window`.
        return_lse: also return lse, natural log of the softmax's denominator (sinks included); differentiable.
        deterministic: two runs agree bit for bit, gradients too.
        backend: one of tessera.backends(), or None for the first that can.

    Returns:
        out (batch, seqlen_q, heads_q, head_dim_v) in q's dtype, contiguous; with return_lse also lse (batch, heads_q, seqlen_q),
        float32 (float64 for float64). A row with nothing to attend to has out 0, lse -inf (its sink's logit,
        if there are sinks) and gradient 0.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, its value, the reason and what works.
        tessera.Unsupported: no backend can run this here, with each backend's reasons.

    Source: FlashAttention (arXiv 2205.14135), FlashAttention-2 (2307.08691), FlashAttention-3 (2407.08608).
    """
    request = _request(
        q, k, v,
        causal=causal, window=window, mask=mask, softmax_scale=softmax_scale, softcap=softcap, alibi_slopes=alibi_slopes,
        bias=bias, sinks=sinks, dropout_p=dropout_p, seed=seed, deterministic=deterministic, backend=backend,
    )  # fmt: skip
    out, lse = operators.forward(request)
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over sequences of different lengths packed one after the other; each attends to itself alone.

    No maximum length is asked for: nothing is padded, and the lengths are read where the kernel runs.

    Args:
        q: (total_q, heads_q, head_dim); k: (total_k, heads_kv, head_dim); v: (total_k, heads_kv, head_dim_v).
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,) on q's device, rising from 0: sequence b is the tokens
            cu_seqlens[b] to cu_seqlens[b + 1].
        seqused_q, seqused_k: int32 (batch,), how many of a sequence's tokens count; None for all. The causal diagonal
            goes by these lengths.
        others: as in `attention`. The dropout's batch index is the sequence's number, rows and columns count
            from its start.

    Returns:
        out (total_q, heads_q, head_dim_v); with return_lse also lse (heads_q, total_q). Tokens outside of every sequence, or
        past seqused_q, have out 0 and lse -inf.

    Raises: as `attention`.
    """
    for name, value in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(value, Tensor):
            raise bad_type(name, type(value).__name__, "packed sequences are cut by offsets", "give an int32 tensor")
    request = _request(
        q, k, v,
        causal=causal, window=window, mask=None, softmax_scale=softmax_scale, softcap=softcap, alibi_slopes=alibi_slopes,
        sinks=sinks, dropout_p=dropout_p, seed=seed, deterministic=deterministic, backend=backend,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q, seqused_k=seqused_k,
    )  # fmt: skip
    out, lse = operators.forward(request)
    return (out, lse) if return_lse else out


def plan(
    q: Tensor | tuple[int, ...],
    k: Tensor | tuple[int, ...],
    v: Tensor | tuple[int, ...] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | Device | None = None,
    requires_grad: bool = False,
    **options: Any,
) -> Plan:
    """What `attention` (or, with cu_seqlens_q and cu_seqlens_k, `attention_varlen`) would run, and why. Runs nothing.

    Args:
        q, k, v: tensors, or shapes; v defaults to k's shape.
        dtype: for shapes.
        device: a torch device, or "h100" or "h200" for a GPU that need not be here; None for q's own, or the CPU.
        requires_grad: plan the backward too.
        options: as `attention` takes them; a tensor option may be given as its shape.

    Raises: what the call itself would raise.
    """
    options.pop("return_lse", None)  # every backend returns both
    if v is None:
        v = k
    tensors = [_shape_as_tensor(x, dtype) for x in (q, k, v)]
    if device is None:
        device = q.device if isinstance(q, Tensor) and q.device.type != "meta" else "cpu"
    described = device if isinstance(device, Device) else Device.named(str(device))
    for name, stand_in in _TENSOR_OPTIONS.items():
        if isinstance(options.get(name), tuple):
            options[name] = torch.empty(options[name], dtype=stand_in or dtype, device="meta")
    trainable = [x for x in (*tensors, *options.values()) if isinstance(x, Tensor) and x.requires_grad]
    request = _request(*(x.detach().to("meta") for x in tensors), **options)
    wants_gradients = requires_grad or bool(trainable)
    problem, _ = bind(replace(request, requires_grad=wants_gradients), described.kind)
    return dispatch.select(problem, described, request.backend)


# The dtype of an option that `plan` is given by its shape; None: the dtype of q.
_TENSOR_OPTIONS: dict[str, torch.dtype | None] = {
    "alibi_slopes": torch.float32,
    "bias": None,
    "sinks": None,
    "cu_seqlens_q": torch.int32,
    "cu_seqlens_k": torch.int32,
    "seqused_q": torch.int32,
    "seqused_k": torch.int32,
}


def _shape_as_tensor(x: Tensor | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return x if isinstance(x, Tensor) else torch.empty(x, dtype=dtype, device="meta")


def _request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window | None = None,
    mask: Mask | None = None,
    **options: Any,
) -> Request:
    """The flat Request: masks intersected, autocast applied, gradients noted."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, value)
    for name in _TENSOR_OPTIONS:
        if options.get(name) is not None:
            _check_tensor(name, options[name])
    backend = options.get("backend")
    if backend is not None and not isinstance(backend, str):
        raise bad_type("backend", repr(backend), "backends go by name", "use one of tessera.backends(), or None")
    q, k, v = _autocast(q, k, v)
    whole = _mask(causal, window, mask)
    request = Request(
        q, k, v,
        key_start=whole.key_start, key_end=whole.key_end, query_end=whole.query_end,
        document_begin=whole.document_begin, document_end=whole.document_end,
        left=whole.left, right=whole.right,
        **options,
    )  # fmt: skip
    check_scalars(request)
    tensors = (q, k, v, request.bias, request.sinks)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
    return replace(request, requires_grad=any(wanted), bias_requires_grad=wanted[3], sinks_requires_grad=wanted[4])


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise bad_type(name, type(value).__name__, "attention runs on tensors", "give a torch.Tensor")
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else value.layout
        why = "attention runs on strided tensors"
        raise bad_type(name, kind, why, "make it dense, or give a nested tensor's values() to attention_varlen")


def _mask(causal: bool, window: Window | None, mask: Mask | None) -> Mask:
    whole = Mask() if mask is None else mask
    if not isinstance(whole, Mask):
        raise bad_type("mask", type(mask).__name__, "masks are algebra, not tensors", "use tessera.Mask, or `bias` for any other")
    if causal:
        whole = whole & Mask.causal()
    if window is not None:
        if not isinstance(window, tuple) or len(window) != 2:
            raise bad_value("window", window, "a window has two sides", "give (left, right), None for no limit")
        left, right = (check_window_side(f"window[{side}]", value) for side, value in enumerate(window))
        whole = whole & Mask(left=left, right=right)
    return whole


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under torch.autocast, float32 inputs run in the autocast dtype, as torch's own attention does."""
    kind = q.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    q, k, v = (x.to(dtype) if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x for x in (q, k, v))
    return q, k, v
