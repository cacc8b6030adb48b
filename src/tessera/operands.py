"""Operands: the tensors of one call, checked once against each other; the only place where they are checked.

`Request` is what the user said, flat, in the order of the torch operators' arguments. `bind` checks it and splits it into
the Problem (what is asked, no tensors) and the Operands (the tensors). Tensors on the meta device are welcome: that
is how `plan` answers from shapes alone. Contents are read on the CPU only: on a GPU that would wait for the device.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessera.checking import reads_contents
from tessera.dropout import check_probability, check_seed
from tessera.errors import bad_type, bad_value
from tessera.mask import Mask, check_window_side
from tessera.problem import (
    MAX_HEAD_DIM,
    Alibi,
    Bias,
    Gradients,
    Layout,
    Problem,
    Reproducibility,
    Score,
    Shape,
    Sinks,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Request(NamedTuple):
    """One call as the user put it, with the operator's flags for the Problem's enums.

    The requires_grad flags stand here, and are not read off the tensors, because a compiled graph calls the operators with
    tensors that no longer say so. The tensors come first and the seed last: see calls.py.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    key_start: Tensor | None = None
    key_end: Tensor | None = None
    query_end: Tensor | None = None
    document_begin: Tensor | None = None
    document_end: Tensor | None = None
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    left: int | None = None
    right: int | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    requires_grad: bool = False
    bias_requires_grad: bool = False
    sinks_requires_grad: bool = False
    deterministic: bool = False
    backend: str | None = None
    seed: int | None = None


TENSORS = 15
"""The first fields of a Request are tensors or None."""


def are_absent(tensors: Iterable[object]) -> bool:
    """Whether all of them are None. Asked one by one: a comparison with a tuple of Nones compares a tensor with None, which it
    answers by way of an exception, in more than ten microseconds."""
    return not [tensor for tensor in tensors if tensor is not None]


class Lengths(NamedTuple):
    """The sequences' own lengths: int32, cu_seqlens (batch + 1,), seqused (batch,)."""

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None


class Operands(NamedTuple):
    """The tensors of a problem. q, k, v as the layout says; bias (B|1, H|1, Sq|1, Sk|1); sinks (heads_q,);
    alibi_slopes (heads_q,) or (batch, heads_q); `seed` of the dropout."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Lengths
    mask: Mask
    bias: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    seed: int


def with_offsets(others: tuple[Any, ...], offsets: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """What stands behind q, k and v among operands, with a call's own offsets of packed sequences, if it has them; one where
    those of queries and keys are the same tensor."""
    return (Lengths(offsets[0], offsets[-1]), *others[1:]) if offsets else others


def bind(request: Request, device_kind: str | None = None) -> tuple[Problem, Operands]:
    """Check a request; its Problem and its Operands. Raises ValueError or TypeError that names the argument."""
    problem = describe(request, device_kind)
    check_contents(request)
    return problem, gather(request)


def describe(request: Request, device_kind: str | None = None) -> Problem:
    """The Problem of a request, checked by all that can be seen without reading a tensor's contents.

    `device_kind` is the type of the device to run on where that is not q's own: a plan's tensors are on meta.
    """
    layout = Layout.DENSE if request.cu_seqlens_q is None else Layout.VARLEN
    shape = _check_qkv(request, layout, device_kind or request.q.device.type)
    _check_lengths(request, shape)
    mask = _mask_of(request)
    _check_mask(request.q, mask, shape, layout)
    bias = _check_bias(request, shape, layout)
    alibi = _check_alibi(request, shape)
    sinks = check_sinks(request.sinks, request.q, Gradients.INPUTS if request.sinks_requires_grad else Gradients.NONE)
    check_scalars(request)
    score = Score(
        scale=shape.head_dim**-0.5 if request.softmax_scale is None else float(request.softmax_scale),
        softcap=float(request.softcap),
        alibi=alibi,
        bias=bias,
        sinks=sinks,
        dropout_p=float(request.dropout_p),
    )
    return Problem(
        shape=shape,
        dtype=request.q.dtype,
        score=score,
        layout=layout,
        mask=mask.spec,
        lengths=tuple(name for name in _LENGTHS if getattr(request, name) is not None),
        gradients=Gradients.INPUTS if request.requires_grad else Gradients.NONE,
        reproducibility=Reproducibility.BITWISE if request.deterministic else Reproducibility.ANY_ORDER,
    )


def gather(request: Request) -> Operands:
    """The tensors of a request, as backends take them. Checks nothing."""
    return Operands(
        request.q,
        request.k,
        request.v,
        NO_LENGTHS if request.cu_seqlens_q is None else Lengths(*request[3:7]),
        _mask_of(request),
        None if request.bias is None else _four_dims(request.bias),
        request.alibi_slopes,
        request.sinks,
        request.seed or 0,
    )


def _mask_of(request: Request) -> Mask:
    if are_absent(request[7:12]):
        return _band(request.left, request.right)
    return Mask(
        request.left, request.right, request.key_start, request.key_end, request.query_end,
        request.document_begin, request.document_end,
    )  # fmt: skip


@lru_cache(maxsize=256, typed=True)  # 4.0 is refused, and is not to be found by who says 4
def _band(left: int | None, right: int | None) -> Mask:
    return Mask(left, right)


NO_LENGTHS = Lengths()
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")


def _check_qkv(request: Request, layout: Layout, device_kind: str) -> Shape:
    q, k, v = request.q, request.k, request.v
    form = "(batch, seqlen, heads, head_dim)" if layout is Layout.DENSE else "(total, heads, head_dim)"
    rank = 4 if layout is Layout.DENSE else 3
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != rank:
            raise bad_value(name, f"shape {tuple(tensor.shape)}", f"{tensor.dim()} dimensions", f"give {form}")
        if tensor.dtype not in DTYPES:
            raise bad_type(name, tensor.dtype, "not a dtype attention runs in", "use " + ", ".join(map(str, DTYPES)))
        if tensor.dtype != q.dtype:
            raise bad_type(name, tensor.dtype, f"q is {q.dtype}", f"use {name}.to(q.dtype)")
        if tensor.device != q.device:
            raise bad_value(f"{name}.device", tensor.device, f"q is on {q.device}", f"use {name}.to(q.device)")
        if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise bad_value(f"{name}.stride()", tensor.stride(), "the last dimension is strided", f"use {name}.contiguous()")
    shape = Shape(
        batch=q.shape[0] if request.cu_seqlens_q is None else request.cu_seqlens_q.numel() - 1,
        seqlen_q=q.shape[-3],
        seqlen_k=k.shape[-3],
        heads_q=q.shape[-2],
        heads_kv=k.shape[-2],
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
    )
    _check_agreement(q, k, v, layout)
    check_heads(shape, device_kind)
    return shape


def _check_agreement(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> None:
    if layout is Layout.DENSE and k.shape[0] != q.shape[0]:
        raise bad_value("k", f"batch {k.shape[0]}", f"q has batch {q.shape[0]}", "use the same batch, or expand k and v")
    if v.shape[:-1] != k.shape[:-1]:
        raise bad_value("v", f"shape {tuple(v.shape)}", f"k is {tuple(k.shape)}", "k and v may differ in head_dim alone")
    if k.shape[-1] != q.shape[-1]:
        raise bad_value("k", f"head_dim {k.shape[-1]}", f"q has head_dim {q.shape[-1]}", "q and k share one head_dim")


def check_heads(shape: Shape, device_kind: str, limits: tuple[int, int] = (MAX_HEAD_DIM, MAX_HEAD_DIM)) -> None:
    """The numbers of heads go into each other; head_dim and head_dim_v keep to `limits`."""
    if shape.heads_kv == 0 or shape.heads_q % shape.heads_kv:
        fits_as_heads = shape.seqlen_q < shape.heads_q and shape.seqlen_k > 0 and shape.seqlen_q % shape.seqlen_k == 0
        raise bad_value(
            "heads",
            f"{shape.heads_q} query, {shape.heads_kv} key/value",
            "each key/value head serves an equal number of query heads",
            f"use {_nearest_divisor(shape.heads_q, shape.heads_kv)} key/value heads"
            + (", or transpose(1, 2) what is (batch, heads, seqlen, head_dim)" if fits_as_heads else ""),
        )
    for name, dim, limit in zip(("head_dim", "head_dim_v"), (shape.head_dim, shape.head_dim_v), limits, strict=True):
        if not 1 <= dim <= limit:
            raise bad_value(name, dim, f"head dims are 1 to {limit}", f"use at most {limit}, split the heads")
        if device_kind == "cuda" and dim % 8:
            raise bad_value(name, dim, "rows must be 16-byte aligned on a GPU", f"pad it to {-(-dim // 8) * 8}")


def _nearest_divisor(heads: int, wanted: int) -> int:
    divisors = [n for n in range(1, max(heads, 1) + 1) if heads % n == 0]
    return min(divisors, key=lambda n: abs(n - wanted))


def _check_lengths(request: Request, shape: Shape) -> None:
    if (request.cu_seqlens_q is None) != (request.cu_seqlens_k is None):
        missing = "cu_seqlens_q" if request.cu_seqlens_q is None else "cu_seqlens_k"
        raise bad_value(missing, None, "q and k must both be packed or both be dense", "give both cu_seqlens")
    for name in _LENGTHS:
        value = getattr(request, name)
        if value is None:
            continue
        if value.dtype != torch.int32:
            raise bad_type(name, value.dtype, "offsets are read as int32 in the kernels", f"use {name}.to(torch.int32)")
        check_device(name, value, request.q)
        entries = shape.batch + 1 if name.startswith("cu_") else shape.batch
        if value.dim() != 1 or value.shape[0] != entries or shape.batch < 0:
            form = "(batch + 1,)" if name.startswith("cu_") else "(batch,)"
            why = f"there are {max(0, shape.batch)} sequences"
            raise bad_value(name, f"shape {tuple(value.shape)}", why, f"give {form}")


def check_contents(request: Request) -> None:
    """The lengths' contents, on the CPU and under `debug()`: reading them on a GPU waits for it."""
    if request.cu_seqlens_q is None or not reads_contents(request.q):
        return
    for side, tensor in (("q", request.q), ("k", request.k)):
        offsets = getattr(request, f"cu_seqlens_{side}")
        if offsets.device.type == "meta":
            continue
        check_offsets(f"cu_seqlens_{side}", offsets, tensor.shape[0])
        used = getattr(request, f"seqused_{side}")
        if used is not None and used.device.type != "meta":
            lengths = offsets.diff()
            if ((used < 0) | (used > lengths)).any():
                why = f"the sequences hold {lengths.tolist()[:8]} tokens"
                raise bad_value(f"seqused_{side}", used.tolist()[:8], why, "use at most each sequence's length")


def check_offsets(name: str, offsets: Tensor, total: int) -> list[int]:
    """The offsets of packed sequences as numbers: they rise from 0 to at most `total`."""
    ends: list[int] = offsets.tolist()
    if ends[0] != 0 or ends[-1] > total or not all(a <= b for a, b in pairwise(ends)):
        why = f"offsets must rise from 0 to at most {name[-1]}'s total of {total}"
        raise bad_value(name, ends[:8], why, "use lengths.cumsum(0) with a leading 0")
    return ends


def check_device(name: str, value: Tensor, q: Tensor) -> None:
    """`value` lies where q does."""
    if value.device != q.device and q.device.type != "meta":
        raise bad_value(f"{name}.device", value.device, f"q is on {q.device}", f"use {name}.to(q.device)")


def _check_mask(q: Tensor, mask: Mask, shape: Shape, layout: Layout) -> None:
    for name in ("left", "right"):
        side = getattr(mask, name)
        if check_window_side(f"mask.{name}", side) != side:
            raise bad_value(f"mask.{name}", side, "it is a number of keys from 0 on", "use Mask.window, or None for no limit")
    if (mask.document_begin is None) != (mask.document_end is None):
        missing = "document_begin" if mask.document_begin is None else "document_end"
        raise bad_value(f"mask.{missing}", None, "documents have two ends", "use Mask.documents")
    for name in mask.spec.bounds:
        value = getattr(mask, name)
        if not isinstance(value, Tensor):
            raise bad_type(f"mask.{name}", type(value).__name__, "bounds are int32 vectors", "use Mask.padding or Mask.documents")
        if layout is Layout.VARLEN:
            why = "packed sequences carry their lengths themselves"
            raise bad_value(f"mask.{name}", f"shape {tuple(value.shape)}", why, "use cu_seqlens and seqused instead")
        check_device(f"mask.{name}", value, q)
        per_row = name.startswith("document_")
        if value.dim() != (2 if per_row else 1) or value.dtype != torch.int32:
            form = f"{value.dtype} of shape {tuple(value.shape)}"
            raise bad_value(f"mask.{name}", form, "bounds are int32 vectors", "use Mask.padding or Mask.documents")
        good = (value.shape[0] in (1, shape.batch) and value.shape[1] == shape.seqlen_q) if per_row else (
            value.shape[0] == shape.batch
        )  # fmt: skip
        if not good:
            wanted = f"(batch={shape.batch}, seqlen_q={shape.seqlen_q})" if per_row else f"(batch={shape.batch},)"
            raise bad_value(f"mask.{name}", f"shape {tuple(value.shape)}", "it does not fit q", f"give {wanted}")


def _check_bias(request: Request, shape: Shape, layout: Layout) -> Bias | None:
    bias = request.bias
    if bias is None:
        return None
    if bias.dtype == torch.bool:
        instead = 'use a tessera.Mask, or torch.zeros(...).masked_fill(~keep, float("-inf"))'
        raise bad_type("bias", bias.dtype, "a bias is added to the scores", instead)
    if bias.dtype not in (request.q.dtype, torch.float32):
        raise bad_type("bias", bias.dtype, f"q is {request.q.dtype}", "use q's dtype or float32")
    check_device("bias", bias, request.q)
    if bias.dim() > 4:
        raise bad_value("bias", f"shape {tuple(bias.shape)}", "it has more than 4 dimensions", "use (batch, heads, q, k)")
    batch, heads, rows, keys = _four_dims(bias).shape
    sizes = (batch, heads, rows, keys)
    if layout is Layout.VARLEN:
        raise bad_value("bias", f"shape {sizes}", "packed sequences have no common (q, k) plane", "use the dense layout")
    full = (shape.batch, shape.heads_q, shape.seqlen_q, shape.seqlen_k)
    if any(size not in (1, limit) for size, limit in zip(sizes, full, strict=True)):
        why = f"it does not broadcast to (batch, heads, seqlen_q, seqlen_k) = {full}"
        raise bad_value("bias", f"shape {tuple(bias.shape)}", why, "give each dimension its size or 1")
    wanted = Gradients.INPUTS if request.bias_requires_grad else Gradients.NONE
    return Bias(sizes, bias.dtype, wanted)


def _four_dims(bias: Tensor) -> Tensor:
    return bias[(None,) * (4 - bias.dim())]


def _check_alibi(request: Request, shape: Shape) -> Alibi | None:
    slopes = request.alibi_slopes
    if slopes is None:
        return None
    check_device("alibi_slopes", slopes, request.q)
    if slopes.dtype != torch.float32:
        raise bad_type("alibi_slopes", slopes.dtype, "slopes are read as float32", "use alibi_slopes.float()")
    if slopes.requires_grad:
        raise bad_value("alibi_slopes", "requires_grad=True", "slopes are constants here", "detach them, or use `bias`")
    if slopes.shape == (shape.heads_q,):
        return Alibi.PER_HEAD
    if slopes.shape == (shape.batch, shape.heads_q):
        return Alibi.PER_BATCH_AND_HEAD
    wanted = f"({shape.heads_q},) or ({shape.batch}, {shape.heads_q})"
    raise bad_value("alibi_slopes", f"shape {tuple(slopes.shape)}", "one slope for each query head", f"give {wanted}")


def check_sinks(sinks: Tensor | None, q: Tensor, gradients: Gradients = Gradients.NONE) -> Sinks | None:
    """Sinks are one logit a query head, in q's dtype or float32."""
    if sinks is None:
        return None
    check_device("sinks", sinks, q)
    if sinks.dtype not in (q.dtype, torch.float32):
        raise bad_type("sinks", sinks.dtype, f"q is {q.dtype}", "use q's dtype or float32")
    heads = q.shape[-2]
    if sinks.shape != (heads,):
        raise bad_value("sinks", f"shape {tuple(sinks.shape)}", "one logit for each query head", f"give ({heads},)")
    return Sinks(gradients)


def check_scalars(request: Request) -> None:
    """The request's numbers: finite scale, softcap >= 0, dropout_p in [0, 1) with a seed."""
    dropout_p, seed = request.dropout_p, request.seed
    check_scale(request.softmax_scale, request.softcap)
    check_flag("deterministic", request.deterministic)
    check_probability(dropout_p)
    if seed is not None:
        check_seed(seed)
    if dropout_p > 0 and seed is None:
        why = "dropout draws from an explicit seed"
        raise bad_value("seed", None, why, "give an int, for example int(torch.randint(2**62, ()))")


MOST = 1e38
"""What a scale may be at most, and a scale over a cap: kernels take both as float32, some times log2(e)."""


def check_scale(softmax_scale: float | None, softcap: float) -> None:
    """A finite scale and a softcap of at least 0."""
    if softmax_scale is not None:
        _check_number("softmax_scale", softmax_scale)
        if not abs(softmax_scale) <= MOST:
            instead = "use a finite scale, or None for d**-0.5"
            raise bad_value("softmax_scale", _shown(softmax_scale), "scores would not be finite", instead)
    _check_number("softcap", softcap)
    if not 0 <= softcap <= MOST:
        raise bad_value("softcap", _shown(softcap), "a cap is positive", "use softcap > 0, or 0 for none")
    scale = 1.0 if softmax_scale is None else abs(softmax_scale)
    if softcap and scale / softcap > MOST:
        raise bad_value("softcap", softcap, "scores over it would not be finite", "use a larger cap, or 0 for none")


def _shown(value: float) -> str:
    """A number; of a long int its size."""
    return f"an int of {value.bit_length()} bits" if isinstance(value, int) and value.bit_length() > 64 else str(value)


def check_flag(name: str, value: object) -> None:
    """A choice between two is no tensor, whose contents would have to be read, and no word, which would always be true."""
    if isinstance(value, (Tensor, str)) or not isinstance(value, Hashable):
        raise bad_type(name, repr(value), "it is one choice for the whole call", "give True or False")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise bad_type(name, type(value).__name__, "it is one number for the whole call", "give a Python float")
