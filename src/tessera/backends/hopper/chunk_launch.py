"""From a plan of many rows over a KV cache to its launches: the kernels' descriptions, their arguments, the parts' workspace.

Nothing here asks questions of the data or waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tessera import jit
from tessera.backends.hopper.arguments import FAR, WRAP_STRIDE, address, reach, score_scales
from tessera.backends.hopper.chunk_config import COLUMNS, ChunkConfig, LatentConfig, Reading, Result
from tessera.backends.hopper.chunk_plan import ChunkPlan, programs_of
from tessera.backends.hopper.launch import ELEMENTS
from tessera.backends.hopper.room import room
from tessera.errors import Reason, Unsupported
from tessera.problem import Layout
from tessera.serving.operands import CacheOperands
from tessera.serving.problem import CacheProblem

_POINTERS = ("cu_q", "cache_seqlens", "cache_leftpad", "cache_batch_idx", "page_table")
_INTEGERS = (
    "batch", "heads", "group", "seqlen_q", "splits", "lines", "left_reach", "right_reach", "capacity", "appended",
    "table_stride", "pages_per_sequence", "page_count", "page_size",
)  # fmt: skip
COMBINE_COLUMNS, COMBINE_PARTS, COMBINE_LOADS = 128, 32, 32
"""Columns of a program of combine.py, parts that it reads at once at most, rows times parts that it reads at once at least."""


def _combine_shape(splits: int) -> tuple[int, int]:
    """Rows of a program of combine.py, four at least, a warp each; and parts that it reads at once."""
    parts = min(1 << (splits - 1).bit_length(), COMBINE_PARTS)
    return max(4, COMBINE_LOADS // parts), parts


def kernel_spec(config: ChunkConfig | LatentConfig, dtype: torch.dtype) -> jit.KernelSpec:
    """The kernel for a configuration: a function of it and of the dtype, and of nothing else."""
    element, packing = ELEMENTS[dtype], config.packing
    arguments: dict[str, jit.Tiles | jit.Pointer | jit.Scalar] = {}
    arguments["q_map"] = jit.Tiles(element, (1, packing.positions, packing.heads, COLUMNS))
    tensors = ("k", "v") if isinstance(config, ChunkConfig) else ("k",)
    constants: dict[str, object] = {"CONFIG": config}
    for name in tensors:
        if config.reading is Reading.BOXES:
            arguments[f"{name}_map"] = jit.Tiles(element, (1, 1, 1, config.box, COLUMNS))
        else:
            constants[f"{name}_map"] = None
    for name in tensors:
        arguments[f"{name}_ptr"] = jit.Pointer(element)
    arguments["out_ptr"] = jit.Pointer("fp32" if config.result is Result.PART else element)
    arguments["lse_ptr"] = jit.Pointer("fp32", align=4)
    if isinstance(config, ChunkConfig):
        arguments["given_out_ptr"], arguments["given_lse_ptr"] = jit.Pointer("fp32"), jit.Pointer("fp32", align=4)
    arguments["sinks_ptr"] = jit.Pointer("fp32", align=4)
    for name in _POINTERS:
        arguments[name] = jit.Pointer("i32", align=4)
    for name in _INTEGERS:
        arguments[name] = jit.Scalar("i32")
    for name in tensors:
        arguments |= {f"{name}_{step}": jit.Scalar("i64", align=8) for step in ("page", "row", "head")}
        arguments[f"{name}_pitch"] = jit.Scalar("i32")
    arguments["scale"] = arguments["inner"] = jit.Scalar("fp32")
    kernel = "chunk:attention_chunk" if isinstance(config, ChunkConfig) else "latent:attention_latent"
    name, described = f"tessera.backends.hopper.{kernel}", (tuple(arguments.items()), tuple(constants.items()))
    return jit.KernelSpec(name, *described, cluster=config.cluster, early=True)


def combine_spec(splits: int, dtype: torch.dtype, sinks: str) -> jit.KernelSpec:
    """combine.py's kernel for about that many parts; `sinks` as its SINKS."""
    rows, parts = _combine_shape(splits)
    arguments: dict[str, jit.Tiles | jit.Pointer | jit.Scalar] = {
        "parts": jit.Pointer("fp32"), "lses": jit.Pointer("fp32"), "sinks": jit.Pointer("fp32", align=4),
        "total_q": jit.Pointer("i32", align=4),
        "out": jit.Pointer(ELEMENTS[dtype]), "lse": jit.Pointer("fp32", align=4),
        **{name: jit.Scalar("i32") for name in ("lines", "splits", "heads", "seqlen_q", "width")},
    }  # fmt: skip
    constants = {"ROWS": rows, "AT_ONCE": parts, "SINKS": sinks}
    kernel = "tessera.backends.hopper.combine:combine"
    return jit.KernelSpec(kernel, tuple(arguments.items()), tuple(constants.items()), early=True)


class Bound(NamedTuple):
    """What a runner's one set of shapes and strides decides: the launches on `device` (all numbers are in them), what makes out,
    lse and the parts, the maps' places (`q_place` None where TMA can't reach q, `copy_place` for a copy of it, `places` of the
    caches)."""

    device: int
    launch: jit.Launch
    combine: jit.Launch | None
    make: tuple[Callable[[], Tensor], ...]
    q_place: jit.Place | None
    copy_place: jit.Place
    places: tuple[jit.Place, ...]


@dataclass(frozen=True)
class ChunkLaunch:
    """One problem's launches: everything that does not depend on the tensors, worked out once."""

    problem: CacheProblem
    plan: ChunkPlan
    bound: list[Bound] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def config(self) -> ChunkConfig | LatentConfig:
        return self.plan.config

    @cached_property
    def specs(self) -> tuple[jit.KernelSpec, ...]:
        """The kernels that a call launches, in order."""
        first = kernel_spec(self.config, self.problem.dtype)
        if self.config.result is not Result.PART:
            return (first,)
        sinks = "none" if self.problem.score.sinks is None else "rows"
        if sinks == "rows" and self.problem.layout is Layout.VARLEN:
            sinks = "packed rows"
        return first, combine_spec(self.plan.splits, self.problem.dtype, sinks)

    @cached_property
    def grid(self) -> tuple[int, int, int]:
        x, y, z = programs_of(self.problem, self.config)
        return x * self.config.cluster, y * max(1, self.plan.stored), z

    @cached_property
    def lines(self) -> int:
        """Rows of out, heads last."""
        shape = self.problem.shape
        return shape.heads_q * shape.seqlen_q * (1 if self.problem.layout is Layout.VARLEN else shape.batch)

    def run(self, operands: CacheOperands) -> tuple[Tensor, Tensor]:
        """(out, lse) as CacheProblem.out_shape and lse_shape say, contiguous. New rows are in the cache, and q is rotated. Raises
        Unsupported where TMA can't reach the cache: rows, heads or pages whose strides are not multiples of 16 bytes."""
        addresses = [tensor.data_ptr() for _, tensor in self._caches(operands)]
        if not self.bound or any(address % 16 for address in addresses):
            self.bound[:] = [self._bind(operands)]
        bound = self.bound[0]
        out, lse, *stored = [make() for make in bound.make]
        parts, lses = stored or (out, lse)
        q, place = operands.q, bound.q_place
        if place is None or q.data_ptr() % 16:  # TMA can't reach it, and it is small
            q, place = q.clone(memory_format=torch.contiguous_format), bound.copy_place
        sinks = None if operands.sinks is None else operands.sinks.float().contiguous()
        stream = jit.current_stream(bound.device)
        maps = [place[at] for place, at in zip(bound.places, addresses, strict=False)]
        results = self._results(out, lse, parts, lses)
        bound.launch(stream, (place[q.data_ptr()], *maps, *addresses, *results, address(sinks), *self._pointers(operands)))
        if bound.combine is not None:
            starts = operands.cu_seqlens_q
            total_q = 0 if starts is None else starts.data_ptr() + self.problem.shape.batch * starts.element_size()
            bound.combine(stream, (parts.data_ptr(), lses.data_ptr(), address(sinks), total_q, out.data_ptr(), lse.data_ptr()))
        return out, lse

    def _results(self, out: Tensor, lse: Tensor, parts: Tensor, lses: Tensor) -> tuple[int, ...]:
        """Where the first kernel writes: all, or its parts; and what it gives a neighbour."""
        whole, given = (out.data_ptr(), lse.data_ptr()), (parts.data_ptr(), lses.data_ptr())
        if isinstance(self.config, LatentConfig):
            return given
        return (given if self.config.result is Result.PART else whole) + given

    def _caches(self, operands: CacheOperands) -> tuple[tuple[str, Tensor], ...]:
        """The tensors that the kernel reads keys and values from, by name: latent.py takes both from one."""
        keys = ("k_cache", operands.k_cache)
        if isinstance(self.config, LatentConfig):
            return (keys,)
        return keys, ("v_cache", operands.k_cache if operands.v_cache is None else operands.v_cache)

    def _pointers(self, operands: CacheOperands) -> tuple[int, ...]:
        tensors = (
            operands.cu_seqlens_q, operands.cache_seqlens, operands.cache_leftpad, operands.cache_batch_idx, operands.page_table,
        )  # fmt: skip
        return tuple(map(address, tensors))

    def _bind(self, operands: CacheOperands) -> Bound:
        """The kernels and their arguments for these strides. Raises Unsupported where TMA can't reach a cache."""
        index = operands.q.device.index
        kernel, *combine = [jit.load(spec, index) for spec in self.specs]
        rows = [CacheRows.of(name, tensor, self.problem.shape.head_dim_v) for name, tensor in self._caches(operands)]
        places = [encode.bind(row.shape, row.strides) for encode, row in zip(kernel.tiles[1:], rows, strict=False)]
        q = operands.q if operands.q.dim() == 4 else operands.q[None]
        shape, (_, positions, heads, dim) = tuple(q.shape), q.shape
        can_reach = not jit.why_not_tma(0, shape, q.stride(), q.element_size())
        q_place = kernel.tiles[0].bind(shape, q.stride()) if can_reach else None
        copy_place = kernel.tiles[0].bind(shape, (positions * heads * dim, heads * dim, dim, 1))
        steps = [step for row in rows for step in row.steps]
        numbers = (*self._integers(operands), *steps, *score_scales(self.problem.score))
        launch, last = kernel.prepare(self.grid, numbers), self._prepared(combine[0]) if combine else None
        return Bound(index, launch, last, self._makers(operands.q.device), q_place, copy_place, tuple(places))

    def _prepared(self, combine: jit.Kernel) -> jit.Launch:
        """The launch that joins the parts."""
        shape = self.problem.shape
        grid = (-(-self.lines // _combine_shape(self.plan.splits)[0]), -(-shape.head_dim_v // COMBINE_COLUMNS), 1)
        return combine.prepare(grid, (self.lines, self.plan.splits, shape.heads_q, shape.seqlen_q, shape.head_dim_v))

    def _makers(self, device: torch.device) -> tuple[Callable[[], Tensor], ...]:
        """What makes out and lse, and, where parts are stored, those and theirs."""
        problem, stored = self.problem, self.plan.stored
        whole = room(problem.out_shape, problem.dtype, device), room(problem.lse_shape, torch.float32, device)
        if not stored:
            return whole
        parts = (stored, self.lines, problem.shape.head_dim_v)
        return *whole, room(parts, torch.float32, device), room(parts[:2], torch.float32, device)

    def _integers(self, operands: CacheOperands) -> tuple[int, ...]:
        problem, shape, table = self.problem, self.problem.shape, operands.page_table
        mask, pages = problem.mask, problem.cache.pages
        appended = 0 if problem.append is None else problem.append.seqlen
        stride = 0 if table is None or table.shape[0] == 1 else table.stride(0)
        paging = (stride, 0, problem.cache.entries, 1) if pages is None else (stride, pages.per_sequence, pages.count, pages.size)
        return (
            shape.batch, shape.heads_q, shape.group, shape.seqlen_q, self.plan.splits, self.lines, *reach(mask),
            shape.seqlen_k, appended, *paging,
        )  # fmt: skip


class CacheRows(NamedTuple):
    """A cache as pieces/kv_source.py describes rows to TMA; `pitch` is the distance of pages (or entries) in rows."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    entry_stride: int
    pitch: int

    @property
    def steps(self) -> tuple[int, int, int, int]:
        """From one page (or entry), row and head to the next, in elements; and the pitch."""
        return self.entry_stride, self.strides[3], self.strides[2], self.pitch

    @classmethod
    def of(cls, name: str, cache: Tensor, columns: int) -> CacheRows:
        """Raises Unsupported with the reason where TMA can't reach it: a cache is never copied."""
        entries, rows, heads, dim = cache.shape
        entry_stride, row_stride, head_stride, _ = cache.stride()
        entry_stride = entry_stride if entries > 1 else 0
        if rows == 1:
            row_stride = entry_stride or 8  # a lone row's stride means nothing, and may be odd
        if heads == 1:
            head_stride = 8
        if (entry_stride | row_stride | head_stride) % 8 or cache.data_ptr() % 16:
            why, instead = "TMA reads rows and heads that lie 16 bytes apart", "pad the last dimension to a multiple of 8"
        elif row_stride > 8 * FAR:
            why, instead = "rows lie 2^33 elements apart at most", "allocate the pool as one tensor"
        elif row_stride <= 0 or entry_stride % row_stride or entry_stride // row_stride * entries > FAR:
            why, instead = "pages must lie a whole number of rows apart, 2^30 rows in all", "allocate the pool as one tensor"
        else:
            width = columns if name == "v_cache" else dim
            shape = (FAR + 1, FAR, max(heads, 2), FAR, width)  # a size of 1 would be given a stride past TMA's limit
            strides = (WRAP_STRIDE - row_stride, row_stride, head_stride, row_stride, 1)
            return cls(shape, strides, entry_stride, entry_stride // row_stride)
        form = f"strides {tuple(cache.stride())}, address {cache.data_ptr():#x}"
        raise Unsupported("the kernel can't read this cache", {"hopper": (Reason(name, form, why, instead),)})
