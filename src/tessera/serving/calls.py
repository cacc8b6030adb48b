"""The short way of a call over a KV cache: as tessera.calls, what was checked and planned once is remembered.

A call's key is each tensor's shape, strides, dtype and device and every option; lengths and page tables are contents, so one
entry serves a batch while its sequences grow.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessera.calls import keep
from tessera.device import Device
from tessera.dispatch import warn_if_slow
from tessera.serving import dispatch
from tessera.serving.contents import check_contents
from tessera.serving.operands import TENSORS, CacheOperands, CacheRequest, describe, gather
from tessera.serving.plan import CachePlan


@dataclass(frozen=True, eq=False)
class Prepared:
    """A plan and what runs it."""

    plan: CachePlan
    runner: dispatch.CacheRunner


_known: dict[tuple[object, ...], Prepared] = {}


def recall(request: CacheRequest) -> tuple[Prepared, CacheOperands] | None:
    """What `prepare` would return, where such a call has been prepared before; else None, also of what is no call at all.

    A call that is recalled needs no check of its arguments' types: its key holds them.
    """
    operands = gather(request)
    try:
        prepared = _known.get(_key(request, operands))
    except (TypeError, AttributeError, RuntimeError):  # no hash, no tensor, no strides
        return None
    if prepared is None:
        return None
    check_contents(request)
    return prepared, operands


def prepare(request: CacheRequest) -> tuple[Prepared, CacheOperands]:
    """The prepared plan of a request, checked, and its operands. Raises as `attention_with_kvcache` does."""
    operands = gather(request)
    key = _key(request, operands)
    try:
        prepared = _known.get(key)
    except TypeError:  # something among the options cannot be hashed: say which
        describe(request)
        raise
    if prepared is None:
        problem = describe(request)
        plan = dispatch.select(problem, Device.of(request.q.device), request.backend)
        if request.backend is None:
            warn_if_slow(plan.backend, plan.device, plan.refusals)
        prepared = Prepared(plan, dispatch.load(plan.backend).prepare(plan))
        keep(_known, key, prepared)
    check_contents(request)
    return prepared, operands


def _key(request: CacheRequest, operands: CacheOperands) -> tuple[object, ...]:
    # Strides as True where they follow from the shape, as in tessera.calls.
    seen = [None if x is None else (type(x), x.shape, x.is_contiguous() or x.stride(), x.dtype, x.device) for x in operands]
    return (*seen, *request[TENSORS:])
