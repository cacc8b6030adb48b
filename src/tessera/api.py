"""The public functions: what the user says, turned into a Request and passed on.

    attention            (batch, seqlen, heads, head_dim)
    attention_varlen     (total, heads, head_dim), sequences cut by cu_seqlens
    plan                 what would run, and why, from shapes alone
    warmup               kernels compiled ahead of time

Those over a KV cache stand in serving/api.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch
from torch import Tensor

from tessera import dispatch, operators
from tessera.device import Device
from tessera.errors import bad_type, bad_value
from tessera.mask import Mask
from tessera.operands import TENSORS, Request, are_absent, bind
from tessera.options import (
    DENSE_OPTIONS,
    PACKED_OPTIONS,
    DenseOptions,
    PackedOptions,
    Window,
    check_backend,
    check_options,
    check_tensor,
    mask_of,
    right_of,
    show_options,
)
from tessera.plan import Plan
from tessera.problem import Problem
from tessera.serving import dispatch as serving_dispatch
from tessera.serving.plan import CachePlan
from tessera.serving.problem import CacheProblem

if TYPE_CHECKING:
    from tessera.jit import KernelSpec


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[DenseOptions]
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[DenseOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Unpack[DenseOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, softmax(scale q k^T) v, without the (seqlen_q, seqlen_k) matrix in memory.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), float16 or bfloat16, which a GPU has kernels for, float32 or float64.
        k: (batch, seqlen_k, heads_kv, head_dim); heads_kv divides heads_q (GQA, MQA).
        v: (batch, seqlen_k, heads_kv, head_dim_v). Strides are free but for a last one of 1; head dims up to 256, on a GPU
            multiples of 8.
        causal: row i attends to keys j <= i + seqlen_k - seqlen_q (aligned to the bottom right).
        window: (left, right), keys at most so far before and after the diagonal; None or -1 for no limit.
        softmax_scale: multiplies q.k; None for head_dim ** -0.5.
        softcap: c > 0 turns a score x into c tanh(x / c), after the scale and before bias and mask.
        alibi_slopes: float32 (heads_q,) or (batch, heads_q), adds -slope |i + seqlen_k - seqlen_q - j|. Not differentiable.
        bias: added to the scores; broadcastable to (batch, heads_q, seqlen_q, seqlen_k), q's dtype or float32. Differentiable.
        sinks: (heads_q,), one logit a head in the softmax's denominator (its value is 0). Differentiable.
        dropout_p: in [0, 1), rounded to n/256 (an error where n is 0 or 256); what is kept of P is scaled by 1 / (1 - n/256).
        seed: of the dropout, 0 <= seed < 2**63; needed with dropout_p > 0. See tessera.dropout_mask.
        mask: a tessera.Mask, intersected with `causal` and `window`.
        return_lse: also return lse, natural log of the softmax's denominator (sinks included); differentiable.
        deterministic: two runs agree bit for bit, gradients too.
        backend: one of tessera.backend_names(), or None for the first that can.

    Returns:
        out (batch, seqlen_q, heads_q, head_dim_v) in q's dtype, contiguous; with return_lse also lse (batch, heads_q, seqlen_q),
        float32 (float64 for float64). A row with nothing to attend to has out 0, lse -inf (or its sink's logit) and gradient 0.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, its value, the reason and what works.
        tessera.Unsupported: no backend can run this here, with each backend's reasons.

    Source: FlashAttention (arXiv 2205.14135), FlashAttention-2 (2307.08691), FlashAttention-3 (2407.08608).
    """
    words = (*options.items(),)  # as they were said: to put all defaults in would take longer than to look a call up
    recalled = operators.recall(words, q, k, v)
    if recalled is not None:
        return recalled
    check_options(options, DENSE_OPTIONS)
    return _attention(q, k, v, words, **options)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: tuple[object, ...],
    /,
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
    """`attention`, the whole way; `words` are its options in the caller's own order."""
    plain = not return_lse and alibi_slopes is bias is sinks is mask is seed is None and not dropout_p
    request = Request(
        q, k, v, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks, right=right_of(causal), softmax_scale=softmax_scale,
        softcap=softcap, dropout_p=dropout_p, deterministic=deterministic, backend=backend, seed=seed,
    )  # fmt: skip
    out, lse = operators.forward(_complete(request, window, mask), words if plain else None)
    return (out, lse) if return_lse else out


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[PackedOptions],
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[PackedOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    return_lse: bool,
    **options: Unpack[PackedOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *longest: object,
    **options: Any,
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
    if longest:
        why = "flash_attn has max_seqlen_q and max_seqlen_k there, and no longest length is asked for here"
        raise bad_type("attention_varlen", f"{5 + len(longest)} arguments by position", why, "give five, and options by name")
    offsets = (cu_seqlens_q,) if cu_seqlens_q is cu_seqlens_k else (cu_seqlens_q, cu_seqlens_k)
    words = (*options.items(), len(offsets))
    recalled = operators.recall(words, q, k, v, *offsets)
    if recalled is not None:
        return recalled
    check_options(options, PACKED_OPTIONS)
    return _attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, words, **options)


def _attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    words: tuple[object, ...],
    /,
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
    """`attention_varlen`, the whole way; `words` are its options in the caller's own order, and its offsets' number."""
    plain = not return_lse and seqused_q is seqused_k is alibi_slopes is sinks is seed is None and not dropout_p
    for name, value in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(value, Tensor):
            raise bad_type(name, type(value).__name__, "packed sequences are cut by offsets", "give an int32 tensor")
    request = Request(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes=alibi_slopes, sinks=sinks,
        right=right_of(causal), softmax_scale=softmax_scale, softcap=softcap, dropout_p=dropout_p,
        deterministic=deterministic, backend=backend, seed=seed,
    )  # fmt: skip
    out, lse = operators.forward(_complete(request, window, None), words if plain else None)
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
    packed = not are_absent([options.get(name) for name in _OFFSETS])
    check_options(options, _ALL_OPTIONS if packed else DENSE_OPTIONS)  # a packed bias or mask is refused in words further on
    if v is None:
        v = k
    tensors = [shape_as_tensor(x, dtype, name) for name, x in (("q", q), ("k", k), ("v", v))]
    if device is None:
        device = q.device if isinstance(q, Tensor) and q.device.type != "meta" else "cpu"
    described = device if isinstance(device, Device) else Device.named(str(device))
    for name, stand_in in _TENSOR_OPTIONS.items():
        if isinstance(options.get(name), tuple):
            options[name] = shape_as_tensor(options[name], stand_in or dtype, name)
    trainable = [x for x in (*tensors, *options.values()) if isinstance(x, Tensor) and x.requires_grad]
    causal, window, mask = (options.pop(name, None) for name in ("causal", "window", "mask"))
    q, k, v = (x.detach().to("meta") for x in tensors)
    request = _complete(Request(q, k, v, right=right_of(causal), **options), window, mask, described.kind)
    wants_gradients = requires_grad or (bool(trainable) and torch.is_grad_enabled())
    problem, _ = bind(request._replace(requires_grad=wants_gradients), described.kind)
    return dispatch.select(problem, described, request.backend)


Planned = Problem | Plan | CacheProblem | CachePlan


def warmup(problems: Planned | Iterable[Planned], *, device: str | torch.device | Device = "h200") -> int:
    """Compile ahead of time, into the disk cache, what these problems need at any length, and steps over a cache with any number
    of sequences; returns how many kernels that took.

    Without it the first call of a kind compiles what it launches; what its backward and other lengths need is compiled beside the
    program, on a thread, and a process waits at its end for the kernel in work.

    Args:
        problems: plans, as `plan` (with requires_grad the backward's kernels too) and `plan_kvcache` give them, or problems
            for `device`; several, or one.
        device: for problems; "h100" or "h200" need not be here: no GPU is touched.

    Raises: tessera.Unsupported where no backend can run a problem; what a failing compile raises.
    """
    from tessera import jit  # what compiles is not needed to import tessera

    if isinstance(problems, Planned) or not isinstance(problems, Iterable):
        problems = (problems,)
    described = device if isinstance(device, Device) else Device.named(str(device))
    return jit.warmup(dict.fromkeys(spec for problem in problems for spec in _kernels(problem, described)))


def _kernels(problem: Planned, device: Device) -> tuple[KernelSpec, ...]:
    if not isinstance(problem, Planned):
        raise bad_type("problems", type(problem).__name__, "kernels follow from a plan", "give what plan or plan_kvcache returns")
    if isinstance(problem, (CacheProblem, CachePlan)):
        of_cache = serving_dispatch.select(problem, device) if isinstance(problem, CacheProblem) else problem
        return serving_dispatch.load(of_cache.backend).kernels(of_cache)
    planned = dispatch.select(problem, device) if isinstance(problem, Problem) else problem
    return dispatch.load(planned.backend).kernels(planned)


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


_OFFSETS = ("cu_seqlens_q", "cu_seqlens_k")
_ALL_OPTIONS = DENSE_OPTIONS | PACKED_OPTIONS | {*_OFFSETS}


def shape_as_tensor(x: Tensor | tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
    """A tensor as it is; a shape as a tensor without memory."""
    if not isinstance(dtype, torch.dtype):
        raise bad_type("dtype", repr(dtype), "shapes become tensors of a dtype", "give a torch.dtype, as torch.bfloat16")
    if isinstance(x, Tensor):
        return x
    try:
        return torch.empty(x, dtype=dtype, device="meta")
    except (RuntimeError, TypeError):  # below 0, past 2^63 bytes, no integers
        raise bad_value(name, repr(x), "no tensor has it", "give sizes from 0 on, or a tensor") from None


show_options(attention, _attention)
show_options(attention_varlen, _attention_varlen)


def _complete(request: Request, window: Window | None, mask: Mask | None, device_kind: str | None = None) -> Request:
    """The Request with its arguments' types checked, masks intersected, autocast applied and gradients noted.

    `device_kind` is the type of the device to run on where that is not q's own: a plan's tensors are on meta.
    """
    check_tensor("q", request.q)
    check_tensor("k", request.k)
    check_tensor("v", request.v)
    if not are_absent(request[3:TENSORS]):
        for name, value in zip(Request._fields[3:TENSORS], request[3:TENSORS], strict=True):
            if value is not None:
                check_tensor(name, value)
    check_backend(request.backend)
    if torch._C._is_any_autocast_enabled():
        request = _autocast(request, device_kind or request.q.device.type)
    if mask is not None or window is not None:
        whole = mask_of(request.right == 0, window, mask)
        request = request._replace(
            left=whole.left, right=whole.right, key_start=whole.key_start, key_end=whole.key_end, query_end=whole.query_end,
            document_begin=whole.document_begin, document_end=whole.document_end,
        )  # fmt: skip
    return _with_gradients(request) if torch.is_grad_enabled() else request


def _with_gradients(request: Request) -> Request:
    bias, sinks = (x is not None and x.requires_grad for x in (request.bias, request.sinks))
    if not (bias or sinks or request.q.requires_grad or request.k.requires_grad or request.v.requires_grad):
        return request
    return request._replace(requires_grad=True, bias_requires_grad=bias, sinks_requires_grad=sinks)


def _autocast(request: Request, kind: str) -> Request:
    """Under torch.autocast for that type of device, q, k and v run in the autocast dtype, as in torch's own attention."""
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return request
    dtype = torch.get_autocast_dtype(kind)
    tensors = (request.q, request.k, request.v)
    q, k, v = (x.to(dtype) if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x for x in tensors)
    return request._replace(q=q, k=k, v=v)
