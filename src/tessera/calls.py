"""The short way of a call: what was checked and planned once is remembered by what can be seen of its arguments.

A call's key is each tensor's shape, strides, dtype and device and every option; two calls with one key have the same Problem
and the same Plan. So a repeated call costs a look-up instead of the checks, and nothing about it is decided twice.

`latest` and `recall` are shorter still, for calls of q, k and v alone, or with packed sequences' offsets: not even a Request is
built, which is a third of such a call's time on the host (benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from tessera import dispatch
from tessera.device import Device
from tessera.operands import (
    TENSORS,
    Operands,
    Request,
    are_absent,
    check_contents,
    check_scalars,
    describe,
    gather,
)
from tessera.plan import Plan

_CAPACITY = 4096
_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A plan and what runs it."""

    plan: Plan
    runner: dispatch.Runner


Recalled = tuple[Callable[..., bool], dispatch.Shortcut]
"""Whether tensors are such that a short way is theirs, and that way. They are of the same types, shapes, strides, dtypes and
devices, gradients are wanted of the same, and the thread's state is the same as far as it shows in dispatch keys: torch.func's
transforms, autocast, inference. Modes are to be asked for: those of torch functions do not show, and of dispatch not all; nor
does it show whether gradients are recorded at all (torch.no_grad)."""

TensorGuards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)
_known: dict[tuple[object, ...], Prepared] = {}
_plain: dict[tuple[object, ...], Recalled] = {}
latest: tuple[dict[tuple[object, ...], Recalled], ...] = ({}, {})
"""Where gradients are not recorded, and where they are: by the caller's words alone what was recalled last, which is what the
layers of one model find, without a key made of their tensors."""


def prepare(request: Request) -> tuple[Prepared, Operands]:
    """The prepared plan of a request, checked, and its operands. Raises as `attention` does."""
    q, k, v = request.q, request.k, request.v
    others = request[3:TENSORS]
    key = (
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(),
        q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, q.requires_grad, k.requires_grad, v.requires_grad,
        None if are_absent(others) else tuple([None if x is None else _seen(x) for x in others]),
        request[TENSORS:-1], request.seed is None,
    )  # fmt: skip
    try:
        prepared = _known.get(key)
    except TypeError:  # something among the options cannot be hashed: say which
        describe(request)
        raise
    if prepared is None:
        problem = describe(request)
        plan = dispatch.select(problem, Device.of(request.q.device), request.backend)
        if request.backend is None:
            dispatch.warn_if_slow(plan.backend, plan.device, plan.refusals)
        prepared = Prepared(plan, dispatch.load(plan.backend).prepare(plan))
        keep(_known, key, prepared)
    elif request.seed is not None:
        check_scalars(request)  # the key holds no seed
    check_contents(request)
    return prepared, gather(request)


def keep(known: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Remember a value; a full table is emptied first."""
    if len(known) >= _CAPACITY:
        known.clear()
    known[key] = value


def _seen(tensor: object) -> tuple[object, ...] | None:
    if not isinstance(tensor, Tensor):
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def recall(words: tuple[object, ...], gradients: bool, tensors: tuple[Tensor, ...]) -> dispatch.Shortcut | None:
    """What `remember` was told of such tensors and words, where nothing watches; it is the latest of the words then."""
    try:
        found = _plain.get(_plain_key(words, gradients, tensors))
    except (TypeError, AttributeError, RuntimeError):  # no hash, no tensor, no strides: `prepare` says so in words
        return None
    if found is None:
        return None
    fits, shortcut = found
    if fits is not _nothing_fits and not fits(*tensors):  # as under inference_mode
        found = _like(tensors), shortcut
    keep(latest[gradients], words, found)
    return shortcut


def remember(words: tuple[object, ...], gradients: bool, tensors: tuple[Tensor, ...], shortcut: dispatch.Shortcut) -> None:
    """For `recall`: a request of these tensors alone, whether gradients are recorded, and the caller's own words, which fix all
    else of it. Nothing watches, autocast neither."""
    made = _like(tensors), shortcut
    keep(_plain, _plain_key(words, gradients, tensors), made)
    keep(latest[gradients], words, made)


def _like(tensors: tuple[Tensor, ...]) -> Callable[..., bool]:
    """Whether tensors are like these, asked in one call: by torch.compile's guards, which look at the thread's modes too. They
    are no public name; where they are gone, or where two of the tensors are one, nothing is like these, and the key decides."""
    try:
        check: Callable[..., bool] = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        return check if check(*tensors) else _nothing_fits
    except (TypeError, ValueError, RuntimeError):
        return _nothing_fits


def _nothing_fits(*_: Tensor) -> bool:
    return False


def _plain_key(words: tuple[object, ...], gradients: bool, tensors: tuple[Tensor, ...]) -> tuple[object, ...]:
    """Strides as True where they follow from the shape, which is quicker to see; those of dimensions of size 1 mean nothing."""
    q, k, v, *offsets = tensors
    return (
        q.shape, q.is_contiguous() or q.stride(), k.shape, k.is_contiguous() or k.stride(),
        v.shape, v.is_contiguous() or v.stride(), q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
        words, gradients, gradients and (q.requires_grad or k.requires_grad or v.requires_grad),
        *[(x.shape, x.stride(), x.dtype, x.device) for x in offsets],
    )  # fmt: skip
