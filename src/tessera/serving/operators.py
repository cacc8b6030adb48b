"""The torch operators of attention over a KV cache, their schemas generated from CacheRequest.

    tessera::attention_with_kvcache     reads the cache
    tessera::attention_with_kvcache_    appends k and v first, and says so: it mutates k_cache and v_cache

Two, because a compiled graph must know of the writes, and must not fear any where there are none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tessera.operators import SCHEMA_TYPES, is_unwatched, refuse_forward_mode
from tessera.serving import calls
from tessera.serving.operands import CacheRequest, gather

_NAMES = CacheRequest._fields
_library = torch.library.Library("tessera", "FRAGMENT")


def recall(request: CacheRequest) -> tuple[Tensor, Tensor] | None:
    """(out, lse), where such a call has been made before, nothing watches, and no gradient is to be refused."""
    found = None if _is_watched(request) else calls.recall(request)
    if found is None or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in found[1])):
        return None
    return found[0].runner.run(found[1])


def _is_watched(request: CacheRequest) -> bool:
    v_cache = request.k_cache if request.v_cache is None else request.v_cache
    return torch.compiler.is_compiling() or not is_unwatched(request.q, request.k_cache, v_cache)


def forward(request: CacheRequest) -> tuple[Tensor, Tensor]:
    """(out, lse): through the operators where anything watches (tracing, a mode), else straight to the backend."""
    if _is_watched(request):
        if not torch.compiler.is_compiling():
            refuse_forward_mode("attention_with_kvcache", gather(request)._asdict())
        operator = torch.ops.tessera.attention_with_kvcache
        return (operator if request.k is None else torch.ops.tessera.attention_with_kvcache_)(*request)
    prepared, operands = calls.prepare(request)
    return prepared.runner.run(operands)


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    prepared, operands = calls.prepare(CacheRequest(*arguments))
    return prepared.runner.run(operands)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    request = CacheRequest(*arguments)
    q, v_cache = request.q, request.v_cache
    head_dim_v = v_cache.shape[-1] if v_cache is not None else request.head_dim_v or 0
    rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty((*q.shape[:-1], head_dim_v)), q.new_empty(rows, dtype=torch.float32)


def _refuse_vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
    raise NotImplementedError(
        "torch.vmap over tessera.attention_with_kvcache is not supported: it has a batch dimension of its own; "
        "fold the mapped dimension into the batch"
    )


def _define(name: str, written: tuple[str, ...]) -> None:
    arguments = []
    for argument in _NAMES:
        kind = SCHEMA_TYPES[CacheRequest.__annotations__[argument].__forward_arg__]
        if argument in written:
            kind = kind.replace("Tensor", f"Tensor({argument[0]}!)")
        arguments.append(f"{kind} {argument}")
    _library.define(f"{name}({', '.join(arguments)}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tessera::{name}", _fake, lib=_library)
    torch.library.register_vmap(f"tessera::{name}", _refuse_vmap, lib=_library)


_define("attention_with_kvcache", ())
_define("attention_with_kvcache_", ("k_cache", "v_cache"))
