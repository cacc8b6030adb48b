"""From a problem that appends to the launch of append.py.

Nothing here asks questions of the data or waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tessera import jit
from tessera.backends.hopper.append_config import (
    PAIRS_OF_THREAD,
    WARPS,
    AppendConfig,
    AppendFeature,
)
from tessera.backends.hopper.arguments import address
from tessera.backends.hopper.launch import ELEMENTS
from tessera.jit.spec import ELEMENT_BYTES
from tessera.problem import Layout
from tessera.serving.operands import CacheOperands
from tessera.serving.problem import CacheProblem, Descale, Granularity, RotaryStyle, Values

_TABLES = {**ELEMENTS, torch.float32: "fp32"}
_PLACES = ("seqlens", "cu_q", "batch_index", "page_table")
_SIZES = (
    "batch", "rows", "rows_q", "rows_new", "heads_q", "heads_kv", "head_dim", "head_dim_v", "capacity", "entries", "page_size",
    "table_stride", "turning", "positions", "blocks",
)  # fmt: skip
_STRIDES = (
    *(f"{name}_{step}" for name in ("q", "k", "v", "k_cache", "v_cache") for step in ("entry", "row", "head")),
    "cos_row", "sin_row",
)  # fmt: skip
_SCALES = tuple(f"{name}_scale_{step}" for name in ("k", "v") for step in ("sequence", "entry", "block", "rows"))


FEW_TOKENS = 512
"""Up to which a thread has one head: programs are short then, and how long one takes is what counts."""
HEADS = 2
"""Of a thread otherwise. 8192 tokens with rotary embedding by 1, 2, 4 heads: halves 51.0, 52.1, 53.0 microseconds, neighbours
54.8, 52.1, 59.5; without one in FP8 10.9, 6.7, 6.8 (H200, 2026-11-21)."""


def append_config(problem: CacheProblem, step: int = PAIRS_OF_THREAD) -> AppendConfig:
    """The configuration for a problem that appends; `step` as its tensors lie in memory."""
    shape, cache = problem.shape, problem.cache
    rotary = None if problem.append is None else problem.append.rotary
    rounds = problem.append is not None and problem.append.dtype != cache.dtype
    wanted = {
        AppendFeature.INTERLEAVED: rotary is not None and rotary.style is RotaryStyle.INTERLEAVED,
        AppendFeature.HALVES: rotary is not None and rotary.style is RotaryStyle.HALVES,
        AppendFeature.PACKED: problem.layout is Layout.VARLEN,
        AppendFeature.PAGED: cache.pages is not None,
        AppendFeature.BATCH_INDEX: "cache_batch_idx" in problem.lengths,
        AppendFeature.E4M3: rounds,
        AppendFeature.K_SCALES: rounds and cache.k_descale is not None,
        AppendFeature.V_SCALES: rounds and cache.v_descale is not None,
    }
    columns = max(32, 1 << (max(shape.head_dim, shape.head_dim_v) - 1).bit_length())
    heads = 1 if _tokens(problem) <= FEW_TOKENS else HEADS
    step = math.gcd(step, shape.head_dim // 2, shape.head_dim_v // 2, _turning(problem))
    return AppendConfig(columns, heads, step, tuple(feature for feature, needed in wanted.items() if needed))


def _tokens(problem: CacheProblem) -> int:
    """New tokens or query rows, whichever are more."""
    shape, new = problem.shape, 0 if problem.append is None else problem.append.seqlen
    return shape.seqlen_q if problem.layout is Layout.VARLEN else shape.batch * max(shape.seqlen_q, new)


def _turning(problem: CacheProblem) -> int:
    """Pairs of columns that turn."""
    return 0 if problem.append is None or problem.append.rotary is None else problem.append.rotary.dim // 2


def append_spec(problem: CacheProblem, step: int = PAIRS_OF_THREAD) -> jit.KernelSpec:
    """The kernel for a problem: a function of its configuration and of its dtypes, and of nothing else."""
    config = append_config(problem, step)
    step = config.step
    element, append = ELEMENTS[problem.dtype], problem.append
    stored = "fp8e4nv" if problem.cache.is_quantised else element
    new = element if append is None or append.dtype == problem.dtype else stored
    rotary = None if append is None else append.rotary
    tables = "fp32" if rotary is None else _TABLES[rotary.dtype]
    arguments: dict[str, jit.Tiles | jit.Pointer | jit.Scalar] = {}
    arguments["q_ptr"] = arguments["turned_ptr"] = _rows(element, step)
    arguments["k_ptr"] = arguments["v_ptr"] = _rows(new, step)
    arguments["k_cache"] = arguments["v_cache"] = _rows(stored, step)
    arguments["cos"] = arguments["sin"] = _rows(tables, step)
    arguments["k_scales"] = arguments["v_scales"] = jit.Pointer("fp32", align=4)
    for name in _PLACES:
        arguments[name] = jit.Pointer("i32", align=4)
    steps = {"head_dim": 2 * step, "head_dim_v": 2 * step, "turning": step}
    for name in _SIZES:
        arguments[name] = jit.Scalar("i32", align=steps.get(name, 1))
    for name in _STRIDES:
        arguments[name] = jit.Scalar("i64", align=step)
    for name in _SCALES:
        arguments[name] = jit.Scalar("i64")
    constants = (("CONFIG", config),)
    return jit.KernelSpec("tessera.backends.hopper.append:append", tuple(arguments.items()), constants, WARPS, early=True)


def _rows(element: str, step: int) -> jit.Pointer:
    return jit.Pointer(element, align=min(16, step * ELEMENT_BYTES[element]))


class Bound(NamedTuple):
    """What a runner's one set of shapes and strides decides: the kernel for tensors that begin at whole 16 bytes, the one for
    any, and the kernel's numbers."""

    at_steps: jit.KernelSpec
    anywhere: jit.KernelSpec
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class AppendLaunch:
    """One problem's append: everything that does not depend on the tensors, worked out once."""

    problem: CacheProblem
    bound: list[Bound] = field(default_factory=list, init=False, repr=False, compare=False)

    @cached_property
    def blocks(self) -> int:
        """Blocks of heads: of q where there is an embedding, of k, of v."""
        shape, heads = self.problem.shape, append_config(self.problem).heads
        kinds = 1 if self.problem.cache.values is Values.IN_KEYS else 2
        return (-(-shape.heads_q // heads) if _turning(self.problem) else 0) + kinds * -(-shape.heads_kv // heads)

    @cached_property
    def programs(self) -> int:
        """A block of heads of a block of tokens each."""
        return self.blocks * -(-_tokens(self.problem) // append_config(self.problem).tokens)

    def run(self, operands: CacheOperands) -> CacheOperands:
        """Write the new rows into the cache; the operands with the rotated q, if there is an embedding."""
        q, device = operands.q, operands.q.device
        turned = torch.empty(q.shape, dtype=q.dtype, device=device) if _turning(self.problem) else q
        if not self.bound:
            self.bound.append(self._bind(operands))
        at_steps, anywhere, numbers = self.bound[0]
        rows = (
            q, turned, operands.k, operands.v, operands.k_cache, operands.v_cache, operands.rotary_cos, operands.rotary_sin
        )  # fmt: skip
        scales = [None if x is None else x.contiguous() for x in (operands.k_descale, operands.v_descale)]
        places = (operands.cache_seqlens, operands.cu_seqlens_q, operands.cache_batch_idx, operands.page_table)
        addresses = list(map(address, rows))
        if self.programs:
            kernel = jit.load(anywhere if any(at % 16 for at in addresses) else at_steps, device.index)
            kernel(jit.current_stream(device.index), self.programs, 1, 1, *addresses, *map(address, (*scales, *places)), *numbers)
        return operands._replace(q=turned)

    def _bind(self, operands: CacheOperands) -> Bound:
        strides = _strides(operands)
        numbers = (*self._sizes(operands), *strides, *self._scale_strides())
        return Bound(append_spec(self.problem, math.gcd(PAIRS_OF_THREAD, *strides)), append_spec(self.problem, 1), numbers)

    def _sizes(self, operands: CacheOperands) -> tuple[int, ...]:
        problem, shape, pages, table = self.problem, self.problem.shape, self.problem.cache.pages, operands.page_table
        new = 0 if problem.append is None else problem.append.seqlen
        rotary = None if problem.append is None else problem.append.rotary
        return (
            shape.batch, max(shape.seqlen_q, new), shape.seqlen_q, new, shape.heads_q, shape.heads_kv, shape.head_dim,
            shape.head_dim_v, shape.seqlen_k, operands.k_cache.shape[0], 1 if pages is None else pages.size,
            0 if table is None or shape.batch == 1 else table.stride(0), _turning(problem),
            1 if rotary is None else rotary.positions, self.blocks,
        )  # fmt: skip

    def _scale_strides(self) -> tuple[int, ...]:
        cache, heads = self.problem.cache, self.problem.shape.heads_kv
        rows = self.problem.shape.seqlen_k if cache.pages is None else cache.pages.size
        return (*scale_strides(cache.k_descale, heads, rows), *scale_strides(cache.v_descale, heads, rows))


def scale_strides(descale: Descale | None, heads: int, rows: int) -> tuple[int, int, int, int]:
    """An FP8 cache's scales, (..., heads) and dense: strides from sequence to sequence, from entry to entry, from block to block;
    and a block's rows. `rows`: of an entry or a page."""
    if descale is None or descale.granularity is Granularity.HEAD:
        return 0, 0, 0, max(1, rows)
    if descale.granularity is Granularity.SEQUENCE:
        return heads, 0, 0, max(1, rows)
    return 0, rows // descale.rows * heads, heads, descale.rows


def _strides(operands: CacheOperands) -> tuple[int, ...]:
    """Strides (entry, row, head) of q, k, v and the caches, those of the tables' rows; 0 for what there is not."""
    found: list[int] = []
    for tensor in (operands.q, operands.k, operands.v, operands.k_cache, operands.v_cache):
        found += (0, 0, 0) if tensor is None else _own_strides(tensor)
    return (*found, *(0 if table is None else table.stride(0) for table in (operands.rotary_cos, operands.rotary_sin)))


def _own_strides(tensor: Tensor) -> tuple[int, ...]:
    """(entry, row, head); 0 for dimensions of size 1, whose strides mean nothing. A packed tensor's rows count from its start."""
    strides = [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return (*strides[:3],) if tensor.dim() == 4 else (0, *strides[:2])
