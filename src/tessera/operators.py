"""The torch operators tessera::forward and tessera::backward: fake implementations, autograd, and refusals in words.

Their schemas are generated from operands.Request, so an option is declared once. Eager calls, torch.compile and autograd all
come through here; the walk Request -> Problem, Operands -> Plan -> backend stands in calls.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack

from tessera import calls
from tessera.checking import reads_contents
from tessera.dispatch import InputGradients, Runner, Shortcut, Upstream
from tessera.errors import bad_value
from tessera.operands import TENSORS, Operands, Request, check_contents, check_scalars, with_offsets

SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "int | None": "SymInt?",
    "float | None": "float?",
    "float": "float",
    "bool": "bool",
    "str | None": "str?",
}
_NAMES = Request._fields
_ARGUMENTS = ", ".join(f"{SCHEMA_TYPES[Request.__annotations__[name].__forward_arg__]} {name}" for name in _NAMES)

_library = torch.library.Library("tessera", "DEF")
_library.define(f"forward({_ARGUMENTS}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def forward(request: Request, words: tuple[object, ...] | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse): through the operator where anything watches (a trace, a mode, a transform), else straight to the backend.

    `words`: the caller's own for all of a request but its tensors, to be recalled by (see `recall`).
    """
    if torch.compiler.is_compiling():
        return torch.ops.tessera.forward(*request)
    if is_unwatched(request.q, request.k, request.v):
        if request.requires_grad:
            results = _Attention.apply(request[TENSORS:], *request[:TENSORS])
        else:
            results = _forward(*request)
        if words is not None and not _autocasts():
            _remember(request, words)
        return results
    refuse_forward_mode("attention", {name: getattr(request, name) for name in ("q", "k", "v", "bias", "sinks")})
    check_scalars(request)
    if torch._C._are_functorch_transforms_active():
        return _TransformedAttention.apply(request[TENSORS:], *request[:TENSORS])
    return torch.ops.tessera.forward(*request)


_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transforms, _autocasts = torch._C._are_functorch_transforms_active, torch._C._is_any_autocast_enabled
_keeps_gradients, _is_wrapped = torch.is_grad_enabled, torch._C._functorch.is_functorch_wrapped_tensor
_is_traced, _latest = torch.compiler.is_dynamo_compiling, calls.latest
_recorded: Any = torch._C._get_tracing_state
"""What torch.jit.trace records into, if it does: it would see none of a kernel's launches."""
_is_batched: Any = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda _: False)
"""Whether autograd gave a tensor of many gradients: those of `is_grads_batched`, or of a vectorized jacobian."""


def recall(words: tuple[object, ...], *tensors: Tensor) -> Tensor | None:
    """out, where such a call has been made before and nothing but out is wanted of it now. `tensors`: q, k and v, or these and
    packed sequences' offsets, once where they are one tensor, which the words tell."""
    if _is_traced() or _modes() or (_function_modes() and _functions_are_watched()) or forward_ad._current_level >= 0:
        return None
    try:
        latest = _latest[_keeps_gradients()].get(words)
        if latest is None:
            return None
        fits = latest[0](*tensors)
    except TypeError:  # no hash, no tensor
        return None
    if fits:
        return latest[1](*tensors)
    if _autocasts() or not is_unwatched(*tensors[:3]) or {*map(type, tensors)} != {Tensor} or any(map(_is_wrapped, tensors)):
        return None
    found = calls.recall(words, _keeps_gradients(), tensors)
    return None if found is None else found(*tensors)


def _remember(request: Request, words: tuple[object, ...]) -> None:
    """For `recall`: a call that has been made, of q, k and v alone, or with offsets."""
    prepared, operands = calls.prepare(request)
    tensors = _distinct(request)
    shortcut = prepared.runner.shortcut(operands[3:])
    if request.requires_grad:
        strides = (request.q.stride(), request.k.stride(), request.v.stride())
        shortcut = partial(_apply_plainly, _Made(prepared.runner, operands[3:], request[5:], strides))
    if shortcut is None:
        return
    if len(tensors) > 3:
        shortcut = partial(_checked, shortcut)
    calls.remember(words, _keeps_gradients(), tensors, shortcut)


def _distinct(request: Request) -> tuple[Tensor, ...]:
    """The tensors of a request of q, k, v and offsets alone, as `recall` takes them."""
    q, k, v, cu_q, cu_k = request[:5]
    return tuple(x for x in (q, k, v, cu_q, None if cu_k is cu_q else cu_k) if x is not None)


def _checked(shortcut: Shortcut, q: Tensor, k: Tensor, v: Tensor, *offsets: Tensor) -> Tensor:
    """A short way of packed sequences, whose offsets are read where that is wanted."""
    if reads_contents(q):
        check_contents(Request(q, k, v, offsets[0], offsets[-1]))
    return shortcut(q, k, v, *offsets)


def _functions_are_watched() -> bool:
    """Whether a mode of torch functions is more than a default device, which is for new tensors alone."""
    default_devices = sys.modules.get("torch.utils._device")  # which torch itself imports when a device is set
    of_device = getattr(default_devices, "DeviceContext", None)
    return any(type(mode) is not of_device for mode in _get_current_function_mode_stack())


def is_unwatched(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether no trace, mode or subclass wants to see the call: the operator's own way costs 20 microseconds of host time more,
    with gradients several hundred (benchmarks/LOG.md)."""
    return (
        type(q) is type(k) is type(v) is Tensor
        and not q.is_meta
        and _recorded() is None
        and not _modes()
        and not (_function_modes() and _functions_are_watched())
        and not _transforms()
        and forward_ad._current_level < 0
    )


def refuse_forward_mode(call: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Custom operators drop the tangents of forward-mode differentiation without a word: refuse them here."""
    for name, value in tensors.items():
        if value is not None and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(_NO_FORWARD_MODE.format(name, call))


_NO_FORWARD_MODE = (
    "{} carries a tangent: forward-mode differentiation (torch.func.jvp, make_dual) of tessera.{} is not supported; use "
    "reverse mode, or torch's math SDPA"
)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    prepared, operands = calls.prepare(Request(*arguments))
    return prepared.runner.forward(operands)


def _backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    request = Request(*arguments)
    gradients = _gradients(request, Upstream(out, lse, dout.contiguous(), dlse))
    return (
        gradients.dq,
        gradients.dk,
        gradients.dv,
        _shaped_like(gradients.dbias, request.bias, request.q),
        _shaped_like(gradients.dsinks, request.sinks, request.q),
    )


def _gradients(request: Request, upstream: Upstream) -> InputGradients:
    prepared, operands = calls.prepare(request)
    return prepared.runner.backward(operands, upstream)


def _shaped_like(gradient: Tensor | None, argument: Tensor | None, q: Tensor) -> Tensor:
    """An optional gradient as the operator returns it: the argument's shape and dtype, or empty where not wanted."""
    if gradient is None or argument is None:
        return q.new_empty(0)
    return gradient.reshape(argument.shape).to(argument.dtype)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    request = Request(*arguments)
    q, v = request.q, request.v
    for name in _NAMES:
        value = getattr(request, name)
        if isinstance(value, Tensor) and value.device != q.device:
            raise bad_value(f"{name}.device", value.device, f"q is on {q.device}", f"use {name}.to(q.device)")
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return out, q.new_empty(rows, dtype=lse_dtype)


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    request = Request(*arguments)
    optional = []
    for argument, wanted in ((request.bias, request.bias_requires_grad), (request.sinks, request.sinks_requires_grad)):
        optional.append(argument.new_empty(argument.shape) if argument is not None and wanted else request.q.new_empty(0))
    dq, dk, dv = (x.new_empty(x.shape) for x in (request.q, request.k, request.v))
    dbias, dsinks = optional
    return dq, dk, dv, dbias, dsinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    request = Request(*inputs)
    ctx.set_materialize_grads(False)
    present = [tensor for tensor in request[:TENSORS] if tensor is not None]
    ctx.save_for_backward(*output, *present)
    ctx.is_present = [tensor is not None for tensor in request[:TENSORS]]
    ctx.options = request[TENSORS:]


def _differentiate(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, backward: Callable[..., Any] | None = None
) -> tuple[Tensor | None, ...]:
    """The arguments' gradients. `backward`: what computes them, None for the operator, or it itself where nobody watches."""
    if dout is None and dlse is None:
        return (None,) * len(_NAMES)
    out, lse, *present = ctx.saved_tensors
    saved = iter(present)
    tensors: list[Any] = [next(saved) if is_present else None for is_present in ctx.is_present]
    request = Request._make((*tensors, *ctx.options))
    dout = torch.zeros_like(out) if dout is None else dout
    if backward is None:
        backward = torch.ops.tessera.backward if _is_watched(dout, out, request.q, dlse) else _backward
    dq, dk, dv, dbias, dsinks = backward(dout, dlse, out, lse, *request)
    gradients: dict[str, Tensor] = {"q": dq, "k": dk, "v": dv}
    if request.bias_requires_grad:
        gradients["bias"] = dbias
    if request.sinks_requires_grad:
        gradients["sinks"] = dsinks
    return tuple(gradients.get(name) for name in _NAMES)


def _is_watched(dout: Tensor, out: Tensor, q: Tensor, dlse: Tensor | None = None) -> bool:
    """Whether the backward must go through its operator, which runs once for each of many gradients."""
    batched = _is_batched(dout) or (dlse is not None and _is_batched(dlse))
    return batched or torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_unwatched(dout, out, q)


class _Attention(torch.autograd.Function):
    """The operator's autograd for plain eager calls: the same functions without torch.library's wrappers around each call."""

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        arguments = (*tensors, *options)
        output = _forward(*arguments)
        _setup_context(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *_differentiate(ctx, dout, dlse)[:TENSORS])


class _Made(NamedTuple):
    """A call that has been made: what ran it, its operands' entries behind q, k and v, its request's behind all its tensors, and
    the strides of q, k and v."""

    runner: Runner
    operands: tuple[Any, ...]
    request: tuple[Any, ...]
    strides: tuple[tuple[int, ...], ...]


class _PlainAttention(torch.autograd.Function):
    """out of q, k and v alone, or with offsets, as made before: half of such a call's time on the host goes to the operator's
    other arguments.

    It keeps what `_Attention` keeps, in the same order: a checkpoint may compute again by one what it computed by the other.
    """

    @staticmethod
    def forward(ctx: Any, made: _Made, q: Tensor, k: Tensor, v: Tensor, *offsets: Tensor) -> Tensor:
        out, lse = made.runner.forward(Operands(q, k, v, *with_offsets(made.operands, offsets)))
        ctx.save_for_backward(out, lse, q, k, v, *(offsets and (offsets[0], offsets[-1])))
        ctx.made = made
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        made, (out, lse, *inputs) = ctx.made, ctx.saved_tensors
        q, k, v, *offsets = inputs
        nothing, cu = (None,) * (len(ctx.needs_input_grad) - 4), offsets or (None, None)
        if _is_watched(dout, out, q):
            return None, *torch.ops.tessera.backward(dout, None, out, lse, q, k, v, *cu, *made.request)[:3], *nothing
        upstream = Upstream(out, lse, dout.contiguous(), None)
        if (q.stride(), k.stride(), v.stride()) == made.strides:
            found = made.runner.backward(Operands(q, k, v, *with_offsets(made.operands, (*offsets,))), upstream)
        else:  # who packs saved tensors away need not bring them back with their strides
            found = _gradients(Request(q, k, v, *cu, *made.request), upstream)
        return None, found.dq, found.dk, found.dv, *nothing


_apply_plainly = super(torch.autograd.Function, _PlainAttention).apply
"""Without a look for torch.func's transforms and for tensors that outlived one: `recall` has seen that there are none."""


def _refuse_double_backward(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError(
        "tessera's backward is not differentiable: second derivatives (gradgradcheck, create_graph=True) need the scores "
        "in memory; use tessera.reference.attention or torch's math SDPA for them"
    )


def _refuse_vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
    raise NotImplementedError(
        "torch.vmap over tessera.attention is not supported: attention has batch and head dimensions of its own; "
        "fold the mapped dimension into the batch"
    )


def _refuse_jvp(ctx: Any, *tangents: Any) -> Any:
    raise NotImplementedError(_NO_FORWARD_MODE.format("an input", "attention"))


class _TransformedAttention(torch.autograd.Function):
    """The operator's autograd under torch.func.grad and vjp, which take no other form than this, its context made afterwards."""

    vmap, jvp = staticmethod(_refuse_vmap), staticmethod(_refuse_jvp)

    @staticmethod
    def forward(options: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return _forward(*tensors, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        options, *tensors = inputs
        _setup_context(ctx, (*tensors, *options), output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *_differentiate(ctx, dout, dlse, _transformed_backward)[:TENSORS])


class _TransformedBackward(torch.autograd.Function):
    """The backward under the same: a function of its own, so that a second derivative finds a refusal."""

    vmap, jvp, backward = staticmethod(_refuse_vmap), staticmethod(_refuse_jvp), staticmethod(_refuse_double_backward)

    @staticmethod
    def forward(options: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return _backward(*tensors, *options)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept: there is no derivative of it."""


def _transformed_backward(*arguments: Any) -> Any:
    """`_backward`'s arguments, whose last are a Request's: its tensors, then its options."""
    options = len(_NAMES) - TENSORS
    return _TransformedBackward.apply(arguments[-options:], *arguments[:-options])


for _name, _real, _fake in (("forward", _forward, _fake_forward), ("backward", _backward, _fake_backward)):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tessera::{_name}", _fake, lib=_library)
    torch.library.register_vmap(f"tessera::{_name}", _refuse_vmap, lib=_library)
torch.library.register_autograd("tessera::forward", _differentiate, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("tessera::backward", _refuse_double_backward, lib=_library)
