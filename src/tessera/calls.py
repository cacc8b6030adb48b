"""The short way of a call: what was checked and planned once is remembered by what can be seen of its arguments.

A call's key is each tensor's shape, strides, dtype and device and every option; two calls with one key have the same Problem
and the same Plan. So a repeated call costs a look-up instead of the checks, and nothing about it is decided twice.

`recall` is shorter still, for calls of q, k and v alone: not even a Request is built, which is a third of such a call's time on
the host (benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from tessera import dispatch
from tessera.device import Device
from tessera.operands import (
    NO_OTHERS,
    TENSORS,
    Operands,
    Request,
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


_known: dict[tuple[object, ...], Prepared] = {}
_plain: dict[tuple[Hashable, ...], dispatch.Shortcut] = {}


def prepare(request: Request) -> tuple[Prepared, Operands]:
    """The prepared plan of a request, checked, and its operands. Raises as `attention` does."""
    q, k, v = request.q, request.k, request.v
    others = request[3:TENSORS]
    key = (
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(),
        q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, q.requires_grad, k.requires_grad, v.requires_grad,
        None if others == NO_OTHERS else tuple(map(_seen, others)),
        request[TENSORS:-1], request.seed is None,
    )  # fmt: skip
    try:
        prepared = _known.get(key)
    except TypeError:  # something among the options cannot be hashed: say which
        check_scalars(request)
        raise
    if prepared is None:
        problem = describe(request)
        plan = dispatch.select(problem, Device.of(request.q.device), request.backend)
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


def recall(q: Tensor, k: Tensor, v: Tensor, words: tuple[Hashable, ...]) -> dispatch.Shortcut | None:
    """What `remember` was told of such tensors and words."""
    try:
        return _plain.get(_plain_key(q, k, v, words))
    except (TypeError, AttributeError, RuntimeError):  # no hash, no tensor, no strides: `prepare` says so in words
        return None


def remember(request: Request, words: tuple[Hashable, ...], shortcut: dispatch.Shortcut) -> None:
    """For `recall`: a dense request of q, k and v alone, and the caller's own words, which fix all else of it."""
    keep(_plain, _plain_key(request.q, request.k, request.v, words), shortcut)


def _plain_key(q: Tensor, k: Tensor, v: Tensor, words: tuple[Hashable, ...]) -> tuple[Hashable, ...]:
    """Strides as True where they follow from the shape, which is quicker to see; those of dimensions of size 1 mean nothing."""
    return (
        q.shape, q.is_contiguous() or q.stride(), k.shape, k.is_contiguous() or k.stride(),
        v.shape, v.is_contiguous() or v.stride(), q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, words,
    )  # fmt: skip
