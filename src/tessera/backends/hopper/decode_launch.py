"""From a decode plan and its operands to a launch: the kernel's description, its arguments, its workspace.

Nothing here asks questions of the data or waits for the device, so a launch can be captured into a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tessera import jit
from tessera.backends.hopper.append_launch import scale_strides
from tessera.backends.hopper.arguments import address, reach, score_scales
from tessera.backends.hopper.decode_config import DecodeConfig, Storage
from tessera.backends.hopper.decode_plan import DecodePlan
from tessera.backends.hopper.decode_workspace import workspace
from tessera.backends.hopper.launch import ELEMENTS
from tessera.backends.hopper.room import room
from tessera.operands import are_absent
from tessera.problem import Layout
from tessera.serving.operands import CacheOperands
from tessera.serving.problem import CacheProblem

KERNEL = "tessera.backends.hopper.decode:decode"
_PLACES = ("seqlens", "cu_q", "leftpad", "batch_index", "page_table")
_SIZES = (
    "batch", "heads_kv", "group", "seqlen_q", "added", "capacity", "row_blocks", "slot_rows", "slots", "left", "right",
    "table_stride", "page_shift", "tickets_per_item", "entries", "splits", "least", "crew", "rounds", "depth", "ahead",
    "line_ahead", "team", "teams", "head_groups", "line_depth",
)  # fmt: skip
_SCALES = tuple(f"{name}_scale_{step}" for name in ("k", "v") for step in ("sequence", "entry", "block", "rows"))


def kernel_spec(config: DecodeConfig, dtype: torch.dtype) -> jit.KernelSpec:
    """The kernel for a configuration: a function of it and of the queries' dtype, and of nothing else."""
    element = ELEMENTS[dtype]
    stored = "i16" if config.storage is Storage.E4M3 else element
    arguments: dict[str, jit.Tiles | jit.Pointer | jit.Scalar] = {}
    constants: dict[str, object] = {"CONFIG": config}
    for name, dims in (("k", config.dims), ("v", config.dims_v)):
        arguments[f"{name}_map"] = jit.Tiles(stored, (1, 1, config.box, dims[0]))
        if dims[-1] != dims[0]:
            arguments[f"{name}_tail"] = jit.Tiles(stored, (1, 1, config.box, dims[-1]))
        else:
            constants[f"{name}_tail"] = None
    arguments["q_ptr"] = arguments["out_ptr"] = jit.Pointer(element)
    for name in ("lse_ptr", "partial_out", "partial_lse", "sinks"):
        arguments[name] = jit.Pointer("fp32", align=16 if name == "partial_out" else 4)
    arguments["tickets"] = jit.Pointer("i32", align=4)
    for name in _PLACES:
        arguments[name] = jit.Pointer("i32", align=4)
    for name in _SIZES:
        arguments[name] = jit.Scalar("i32")
    arguments["q_batch"] = jit.Scalar("i64", align=8)
    for name in ("q_row", "q_head", "head_dim", "head_dim_v"):
        arguments[name] = jit.Scalar("i32", align=8)
    arguments["scale"] = arguments["inner"] = jit.Scalar("fp32")
    arguments["k_scales"] = arguments["v_scales"] = jit.Pointer("fp32", align=4)
    for name in _SCALES:
        arguments[name] = jit.Scalar("i32")
    return jit.KernelSpec(
        KERNEL, tuple(arguments.items()), tuple(constants.items()), config.warps, maxnreg=config.registers, early=True
    )


_NO_FACTORS = (None, None, None)


class Bound(NamedTuple):
    """What a runner's one set of shapes and strides decides: the launch on `device` (the scales' strides are in it), what makes
    out and lse, the tensor maps' places (each with the index of its tensor, 0 for k_cache, 1 for v_cache), and the other numbers,
    for q as it lies (None where its rows can't be read) and for a dense copy of it."""

    launch: jit.Launch
    device: int
    make_out: Callable[[], Tensor]
    make_lse: Callable[[], Tensor]
    places: tuple[tuple[jit.Place, int], ...]
    numbers: tuple[int | float, ...] | None
    copy_numbers: tuple[int | float, ...]


@dataclass(frozen=True)
class DecodeLaunch:
    """One problem's launch: everything that does not depend on the tensors, worked out once."""

    problem: CacheProblem
    plan: DecodePlan
    bound: list[Bound] = field(default_factory=list, init=False, repr=False, compare=False)

    @cached_property
    def spec(self) -> jit.KernelSpec:
        return kernel_spec(self.plan.config, self.problem.dtype)

    def run(self, operands: CacheOperands) -> tuple[Tensor, Tensor]:
        """(out, lse) as CacheProblem.out_shape and lse_shape say, contiguous. Raises Unsupported where TMA can't reach the
        cache: rows, heads or pages whose strides are not multiples of 16 bytes."""
        q, caches = operands.q, (operands.k_cache, operands.k_cache if operands.v_cache is None else operands.v_cache)
        if not self.bound:
            self.bound.append(self._bind(caches, operands))
        bound = self.bound[0]
        out, lse = bound.make_out(), bound.make_lse()
        if self.problem.layout is Layout.VARLEN:  # rows of no sequence are nobody's work
            out.zero_()
            lse.fill_(float("-inf"))
        index = bound.device
        stream = jit.current_stream(index)
        outs, lses = self.parts
        partial, tickets = workspace.of(index, stream, outs + lses, self.plan.tickets)
        numbers = bound.numbers
        if numbers is None or q.data_ptr() % 16:  # it is small
            q, numbers = q.clone(memory_format=torch.contiguous_format), bound.copy_numbers
        addresses, part = (caches[0].data_ptr(), caches[1].data_ptr()), partial.data_ptr()
        given = (operands.sinks, operands.k_descale, operands.v_descale)
        small = _NO_FACTORS if are_absent(given) else tuple(None if x is None else x.float().contiguous() for x in given)
        arguments = (
            *[place[addresses[which]] for place, which in bound.places],
            q.data_ptr(), out.data_ptr(), lse.data_ptr(), part, part + 4 * outs, address(small[0]), tickets.data_ptr(),
            operands.cache_seqlens.data_ptr(), address(operands.cu_seqlens_q), address(operands.cache_leftpad),
            address(operands.cache_batch_idx), address(operands.page_table), *numbers, address(small[1]), address(small[2]),
        )  # fmt: skip
        bound.launch(stream, arguments)
        return out, lse

    @cached_property
    def lse_shape(self) -> tuple[int, ...]:
        return self.problem.lse_shape

    @cached_property
    def parts(self) -> tuple[int, int]:
        """Float32 numbers of all partial outs, and of their lse."""
        rows = self.plan.slots * self.plan.slot_rows
        return rows * self.plan.slot_columns, rows

    def _bind(self, caches: tuple[Tensor, Tensor], operands: CacheOperands) -> Bound:
        """The kernel and its arguments for these shapes and strides."""
        q = operands.q
        kernel = jit.load(self.spec, q.device.index)
        parts = (len(set(self.plan.config.dims)), len(set(self.plan.config.dims_v)))
        which = [index for index, count in enumerate(parts) for _ in range(count)]
        words = 2 if self.plan.config.storage is Storage.E4M3 else 1
        places = tuple(
            (encode.bind(*_as_words(caches[index], words)), index) for encode, index in zip(kernel.tiles, which, strict=True)
        )
        cache, heads = self.problem.cache, self.problem.shape.heads_kv
        strides = (scale_strides(descale, heads, operands.k_cache.shape[1]) for descale in (cache.k_descale, cache.v_descale))
        shape, sizes, own = self.problem.shape, self._sizes(operands), _query_strides(q)
        rest = (shape.head_dim, shape.head_dim_v, *score_scales(self.problem.score))
        copied = (*sizes, *_query_strides(torch.empty(q.shape, device="meta")), *rest)
        numbers = None if any(stride % 8 for stride in own) else (*sizes, *own, *rest)
        launch = kernel.prepare(self.plan.programs, tuple(step for steps in strides for step in steps))
        make = room(self.problem.out_shape, q.dtype, q.device), room(self.lse_shape, torch.float32, q.device)
        return Bound(launch, kernel.device, *make, places, numbers, copied)

    def _sizes(self, operands: CacheOperands) -> tuple[int, ...]:
        problem, plan = self.problem, self.plan
        shape, mask, pages, table = problem.shape, problem.mask, problem.cache.pages, operands.page_table
        added = 0 if problem.append is None else problem.append.seqlen
        return (
            shape.batch, shape.heads_kv, shape.group, shape.seqlen_q, added, shape.seqlen_k, plan.row_blocks, plan.slot_rows,
            plan.slots, *reach(mask), 0 if table is None or shape.batch == 1 else table.stride(0),
            0 if pages is None else pages.size.bit_length() - 1, plan.tickets_per_item, operands.k_cache.shape[0], plan.splits,
            plan.least, plan.crew, plan.rounds, plan.depth, plan.ahead, plan.line_ahead, plan.team, plan.teams,
            shape.heads_kv // plan.team, plan.line_depth,
        )  # fmt: skip


def _as_words(cache: Tensor, words: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A cache (entries, rows, heads, columns) as (entry, head, row, 16-bit word): sizes, strides; `words` elements in a word."""
    entries, rows, heads, columns = cache.shape
    entry_stride, row_stride, head_stride, _ = (stride // words if stride % words == 0 else 1 for stride in cache.stride())
    return (entries, heads, rows, columns // words), (entry_stride, head_stride, row_stride, 1)


def _query_strides(q: Tensor) -> tuple[int, int, int]:
    """(batch, row, head) strides; those of dimensions of size 1, which mean nothing, as 0."""
    strides = [stride if size > 1 else 0 for size, stride in zip(q.shape, q.stride(), strict=True)]
    batch, row, head = strides[:3] if q.dim() == 4 else (0, *strides[:2])
    return batch, row, head
