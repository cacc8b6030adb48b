"""From a problem that appends to the launch of append.py.

Nothing here asks questions of the data or waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from tessera import jit
from tessera.backends.hopper.append_config import HEADS, AppendConfig, AppendFeature
from tessera.backends.hopper.arguments import address
from tessera.backends.hopper.launch import ELEMENTS
from tessera.problem import Layout
from tessera.serving.operands import CacheOperands
from tessera.serving.problem import CacheProblem, Descale, Granularity, RotaryStyle, Values

_TABLES = {**ELEMENTS, torch.float32: "fp32"}
_PLACES = ("seqlens", "cu_q", "batch_index", "page_table")
_SIZES = (
    "batch", "rows", "rows_q", "rows_new", "heads_q", "heads_kv", "head_dim", "head_dim_v", "capacity", "entries", "page_size",
    "table_stride", "rotary_dim", "positions",
)  # fmt: skip
_STRIDES = (
    *(f"{name}_{step}" for name in ("q", "k", "v", "k_cache", "v_cache") for step in ("entry", "row", "head")),
    "cos_row", "sin_row",
)  # fmt: skip
_SCALES = tuple(f"{name}_scale_{step}" for name in ("k", "v") for step in ("sequence", "entry", "block", "rows"))


def append_config(problem: CacheProblem) -> AppendConfig:
    """The configuration for a problem that appends."""
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
    return AppendConfig(columns, tuple(feature for feature, needed in wanted.items() if needed))


def append_spec(problem: CacheProblem) -> jit.KernelSpec:
    """The kernel for a problem: a function of its configuration and of its dtypes, and of nothing else."""
    element, append = ELEMENTS[problem.dtype], problem.append
    stored = "fp8e4nv" if problem.cache.is_quantised else element
    new = element if append is None or append.dtype == problem.dtype else stored
    rotary = None if append is None else append.rotary
    tables = "fp32" if rotary is None else _TABLES[rotary.dtype]
    arguments: dict[str, jit.Tiles | jit.Pointer | jit.Scalar] = {}
    arguments["q_ptr"] = arguments["turned_ptr"] = jit.Pointer(element, align=2)
    arguments["k_ptr"] = arguments["v_ptr"] = jit.Pointer(new, align=1 if new == "fp8e4nv" else 2)
    arguments["k_cache"] = arguments["v_cache"] = jit.Pointer(stored, align=1)
    arguments["cos"] = arguments["sin"] = jit.Pointer(tables, align=2)
    arguments["k_scales"] = arguments["v_scales"] = jit.Pointer("fp32", align=4)
    for name in _PLACES:
        arguments[name] = jit.Pointer("i32", align=4)
    for name in _SIZES:
        arguments[name] = jit.Scalar("i32")
    for name in (*_STRIDES, *_SCALES):
        arguments[name] = jit.Scalar("i64")
    constants = (("CONFIG", append_config(problem)),)
    return jit.KernelSpec("tessera.backends.hopper.append:append", tuple(arguments.items()), constants, HEADS, early=True)


@dataclass(frozen=True)
class AppendLaunch:
    """One problem's append: everything that does not depend on the tensors, worked out once."""

    problem: CacheProblem
    numbers: list[tuple[int, ...]] = field(default_factory=list, init=False, repr=False, compare=False)

    @cached_property
    def spec(self) -> jit.KernelSpec:
        return append_spec(self.problem)

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Tokens, and blocks of heads: of q where there is an embedding, of k, of v."""
        problem, new = self.problem, self._new
        shape = problem.shape
        tokens = shape.seqlen_q if problem.layout is Layout.VARLEN else shape.batch * max(shape.seqlen_q, new)
        kinds = 1 if problem.cache.values is Values.IN_KEYS else 2
        return tokens, self._turns * -(-shape.heads_q // HEADS) + kinds * -(-shape.heads_kv // HEADS)

    @property
    def _new(self) -> int:
        return 0 if self.problem.append is None else self.problem.append.seqlen

    @property
    def _turns(self) -> bool:
        return self.problem.append is not None and self.problem.append.rotary is not None

    def run(self, operands: CacheOperands) -> CacheOperands:
        """Write the new rows into the cache; the operands with the rotated q, if there is an embedding."""
        q, device = operands.q, operands.q.device
        turned = torch.empty(q.shape, dtype=q.dtype, device=device) if self._turns else q
        if not self.numbers:
            self.numbers.append((*self._sizes(operands), *_strides(operands), *self._scale_strides()))
        scales = [None if x is None else x.contiguous() for x in (operands.k_descale, operands.v_descale)]
        pointers = (
            q, turned, operands.k, operands.v, operands.k_cache, operands.v_cache, operands.rotary_cos, operands.rotary_sin,
            *scales, operands.cache_seqlens, operands.cu_seqlens_q, operands.cache_batch_idx,
            operands.page_table,
        )  # fmt: skip
        if all(self.grid):
            kernel = jit.load(self.spec, device.index)
            kernel(jit.current_stream(device.index), *self.grid, 1, *map(address, pointers), *self.numbers[0])
        return operands._replace(q=turned)

    def _sizes(self, operands: CacheOperands) -> tuple[int, ...]:
        problem, shape, pages, table = self.problem, self.problem.shape, self.problem.cache.pages, operands.page_table
        rotary = None if problem.append is None else problem.append.rotary
        return (
            shape.batch, max(shape.seqlen_q, self._new), shape.seqlen_q, self._new, shape.heads_q, shape.heads_kv, shape.head_dim,
            shape.head_dim_v, shape.seqlen_k, operands.k_cache.shape[0], 1 if pages is None else pages.size,
            0 if table is None or shape.batch == 1 else table.stride(0), 0 if rotary is None else rotary.dim,
            1 if rotary is None else rotary.positions,
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


def _own_strides(tensor: Tensor) -> tuple[int, int, int]:
    """(entry, row, head); a packed tensor's rows are counted from its beginning."""
    return tensor.stride()[:3] if tensor.dim() == 4 else (0, *tensor.stride()[:2])  # type: ignore[return-value]
