"""The short way of a call over a KV cache: as tessera.calls, what was checked and planned once is remembered.

A call's key is each tensor's shape, strides, dtype and device and every option; lengths and page tables are contents, so one
entry serves a batch while its sequences grow.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tessera.calls import keep
from tessera.device import Device
from tessera.operands import check_scale
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


def prepare(request: CacheRequest) -> tuple[Prepared, CacheOperands]:
    """The prepared plan of a request, checked, and its operands. Raises as `attention_with_kvcache` does."""
    key = (*map(_seen, request[:TENSORS]), *request[TENSORS:])
    try:
        prepared = _known.get(key)
    except TypeError:  # something among the options cannot be hashed: say which
        check_scale(request.softmax_scale, request.softcap)
        raise
    if prepared is None:
        problem = describe(request)
        plan = dispatch.select(problem, Device.of(request.q.device), request.backend)
        prepared = Prepared(plan, dispatch.load(plan.backend).prepare(plan))
        keep(_known, key, prepared)
    check_contents(request)
    return prepared, gather(request)


def _seen(tensor: object) -> tuple[object, ...] | None:
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) if isinstance(tensor, Tensor) else None
