"""From a plan, its operands and the gradients that arrive to the backward's three launches.

Nothing here asks questions of the data or waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tessera import jit
from tessera.backends.hopper import modifiers
from tessera.backends.hopper.arguments import reach, score_scales, score_unit
from tessera.backends.hopper.backward_plan import (
    PART_LINE,
    Adding,
    BackwardConfig,
    PartLayout,
    RowsConfig,
    bias_sums_shape,
    work_lines,
)
from tessera.backends.hopper.config import Feature
from tessera.backends.hopper.launch import ELEMENTS, L2_BYTES, Rows
from tessera.dispatch import InputGradients, Upstream
from tessera.dropout import keep_scale
from tessera.operands import Operands
from tessera.problem import Gradients, Layout, Problem

_FAR = 1 << 29
"""As pieces/row_ranges.FAR: rows are found from keys by sums of these."""
_PIECE = 64
"""Rows of K, V, dK and dV that TMA moves at a time: a consumer's keys."""
_ELEMENTS_A_PROGRAM = 4096
"""Of backward_rows.py: see there."""
_LENGTHS = ("cu_q", "cu_k", "used_q", "used_k", "key_start", "key_end", "query_end")


def main_spec(config: BackwardConfig, dtype: torch.dtype) -> jit.KernelSpec:
    """The main kernel for a configuration: a function of it and of the dtype, and of nothing else."""
    element = ELEMENTS[dtype]
    arguments: dict[str, jit.Tiles | jit.Pointer | jit.Scalar] = {}
    for name, rows, dim in (
        ("q", config.rows, config.dim), ("k", _PIECE, config.dim), ("v", _PIECE, config.dim_v), ("do", config.rows, config.dim_v),
    ):  # fmt: skip
        arguments[f"{name}_map"] = jit.Tiles(element, (1, 1, 1, rows, dim))
    arguments["stats_map"] = jit.Tiles("fp32", (1, config.rows))
    arguments["dk_map"] = jit.Tiles(element, (1, 1, 1, _PIECE, config.dim))
    arguments["dv_map"] = jit.Tiles(element, (1, 1, 1, _PIECE, config.dim_v))
    if config.part_layout is PartLayout.ROWS:
        arguments["dq_map"] = jit.Tiles("fp32", (_PIECE, config.part_columns))
    else:
        arguments["dq_map"] = jit.Tiles("fp32", (1, config.part_columns // 4, PART_LINE), jit.Arrangement.ROWS)
    arguments["out_map"] = jit.Tiles(element, (1, 1, 1, _PIECE, config.part_columns))
    for name in ("marks_ptr", *_LENGTHS, "document_begin", "document_end"):
        arguments[name] = jit.Pointer("i32", align=4)
    for name in (
        "batch", "heads_kv", "group", "seqlen_q", "seqlen_k", "left", "right", "document_stride", "blocks", "section", "line",
        "q_pitch", "k_pitch", "v_pitch", "do_pitch", "dq_pitch", "tiles",
    ):  # fmt: skip
        arguments[name] = jit.Scalar("i32")
    for name in ("scale", "inner", "factor"):
        arguments[name] = jit.Scalar("fp32")
    constants: dict[str, object] = {"CONFIG": config}
    modifiers.describe(config.features, element, arguments, constants)
    modifiers.describe_gradient(config.features, arguments, constants)
    kernel = "tessera.backends.hopper.backward:attention_backward"
    return jit.KernelSpec(kernel, tuple(arguments.items()), tuple(constants.items()), early=True)


def prepare_spec(config: RowsConfig, dtype: torch.dtype) -> jit.KernelSpec:
    """The kernel before the main one."""
    element = ELEMENTS[dtype]
    arguments: dict[str, jit.Tiles | jit.Pointer | jit.Scalar] = {
        "out_ptr": jit.Pointer(element), "do_ptr": jit.Pointer(element),
        "lse_ptr": jit.Pointer("fp32", align=4), "dlse_ptr": jit.Pointer("fp32", align=4),
        "sinks_ptr": jit.Pointer("fp32", align=4), "stats_ptr": jit.Pointer("fp32"), "sum_ptr": jit.Pointer("fp32"),
        "marks_ptr": jit.Pointer("i32"), "dsinks_ptr": jit.Pointer("fp32", align=4),
    }  # fmt: skip
    arguments |= {name: jit.Pointer("i32", align=4) for name in _LENGTHS}
    arguments |= {name: jit.Scalar("i32") for name in ("batch", "heads", "seqlen_q", "seqlen_k", "line")}
    arguments |= {name: jit.Scalar("i32", align=8) for name in ("dim", "dim_v")}
    arguments |= {"do_pitch": jit.Scalar("i32"), "with_dlse": jit.Scalar("i32")}
    arguments |= {name: jit.Scalar("i64", align=8) for name in ("do_row", "do_head")}
    arguments |= {name: jit.Scalar("fp32") for name in ("unit", "share")}
    return jit.KernelSpec.of("tessera.backends.hopper.backward_rows:prepare_rows", arguments, {"CONFIG": config})


def finish_spec(config: RowsConfig, dtype: torch.dtype) -> jit.KernelSpec:
    """The kernel after it."""
    arguments: dict[str, jit.Tiles | jit.Pointer | jit.Scalar] = {
        "sum_ptr": jit.Pointer("fp32"), "marks_ptr": jit.Pointer("i32"), "dq_ptr": jit.Pointer(ELEMENTS[dtype]),
    }  # fmt: skip
    arguments |= {name: jit.Pointer("i32", align=4) for name in _LENGTHS}
    arguments |= {name: jit.Scalar("i32") for name in ("batch", "heads", "seqlen_q", "seqlen_k", "line")}
    arguments |= {"dim": jit.Scalar("i32", align=8), "factor": jit.Scalar("fp32")}
    kernel = "tessera.backends.hopper.backward_rows:finish_queries"
    return jit.KernelSpec(kernel, tuple(arguments.items()), (("CONFIG", config),), early=True)


@dataclass(frozen=True)
class BackwardLaunch:
    """One problem's launches: everything that does not depend on the tensors, worked out once."""

    problem: Problem
    config: BackwardConfig
    multiprocessors: int

    @cached_property
    def specs(self) -> tuple[jit.KernelSpec, ...]:
        """In the order in which they run."""
        config, dtype = self.config, self.problem.dtype
        rows = RowsConfig.of(config)
        last = () if config.adding is Adding.ROUNDED else (finish_spec(rows, dtype),)
        return prepare_spec(rows, dtype), main_spec(config, dtype), *last

    @cached_property
    def line(self) -> int:
        return work_lines(self.problem)

    @cached_property
    def sums_shape(self) -> tuple[int, ...]:
        """dQ in float32 in the workspace, as the main kernel's TMA sees it."""
        shape = self.problem.shape
        if self.config.part_layout is PartLayout.ROWS:
            return (shape.heads_q * self.line, shape.head_dim)
        return (shape.heads_q * self.line // _PIECE, shape.head_dim // 4, PART_LINE)

    @cached_property
    def blocks(self) -> int:
        """Key tiles of one dense sequence, or an upper bound over all packed ones (and what lies after the last)."""
        shape = self.problem.shape
        if self.problem.layout is Layout.VARLEN:
            return shape.seqlen_k // self.config.keys + shape.batch + 1
        return -(-shape.seqlen_k // self.config.keys)

    @cached_property
    def tiles(self) -> int:
        shape = self.problem.shape
        copies = 1 if self.problem.layout is Layout.VARLEN else shape.batch
        return self.blocks * shape.heads_kv * copies

    @cached_property
    def programs(self) -> int:
        """How many run: one a multiprocessor, where they take tile after tile, else one a tile."""
        return min(self.tiles, self.multiprocessors) if self.config.takes_tile_after_tile else self.tiles

    @cached_property
    def section(self) -> int:
        """Query rows whose Q, dO and float32 dQ, for all heads of a group, fit in L2's share; but so many that there is a tile
        for every multiprocessor, else the last section's longest begin late (GQA 32/8, causal 8k: 1.06, H200, 2026-11-21). Whole
        heads, where sections take turns: nearly as many tiles will do, far fewer would mix two of them."""
        shape = self.problem.shape
        fitting = L2_BYTES // (shape.group * (6 * shape.head_dim + 2 * shape.head_dim_v))
        rows = self.multiprocessors * self.config.keys
        if self.config.sections_take_turns:
            rows = max(rows, shape.seqlen_q * -(-95 * rows // (100 * max(shape.seqlen_q, 1))))
        return max(fitting, rows)

    @cached_property
    def integers(self) -> tuple[int, ...]:
        """The main kernel's integers in its order, up to the stride of the documents' bounds."""
        shape, mask = self.problem.shape, self.problem.mask
        return (shape.batch, shape.heads_kv, shape.group, shape.seqlen_q, shape.seqlen_k, *reach(mask, _FAR))

    @cached_property
    def scales(self) -> tuple[float, float, float]:
        """See pieces/gradients.Score."""
        score = self.problem.score
        return *score_scales(score), score.scale * keep_scale(score.dropout_p)

    @cached_property
    def has_unwritten_keys(self) -> bool:
        """Whether there are rows of dk and dv that belong to no tile: the keys before key_start."""
        return Feature.KEY_START in self.config.features

    def __call__(self, operands: Operands, upstream: Upstream) -> InputGradients:
        q, k, v = operands.q, operands.k, operands.v
        device, heads = q.device, self.problem.shape.heads_q
        make = torch.zeros if self.has_unwritten_keys else torch.empty
        dq = torch.empty(q.shape, dtype=q.dtype, device=device)
        dk = make(k.shape, dtype=k.dtype, device=device)
        dv = make(v.shape, dtype=v.dtype, device=device)
        stats = torch.empty((2 * heads, self.line), dtype=torch.float32, device=device)
        sums = torch.empty(self.sums_shape, dtype=torch.float32, device=device)
        marks = torch.empty(1 + heads * self.line // _PIECE, dtype=torch.int32, device=device)
        kept = Kept(operands)
        dout = Rows.of(upstream.dout if _is_plain(upstream.dout) else upstream.dout.contiguous())
        dsinks = self._prepare(operands, upstream, dout, (stats, sums, marks), kept)
        dbias = self._bias_sums(operands)
        self._differentiate(operands, dout, (stats, sums, marks), (dq, dk, dv, dbias), kept)
        if self.config.adding is not Adding.ROUNDED:
            self._finish(sums, marks, dq, kept)
        if operands.bias is not None and dbias is not None:
            dbias = dbias.sum_to_size(operands.bias.shape).to(operands.bias.dtype)
        return InputGradients(dq, dk, dv, dbias, dsinks)

    def _bias_sums(self, operands: Operands) -> Tensor | None:
        """Zeros for the bias's gradient to be added to, if that is wanted."""
        if Feature.BIAS_GRADIENT not in self.config.features:
            return None
        return torch.zeros(bias_sums_shape(self.problem), dtype=torch.float32, device=operands.q.device)

    def _prepare(
        self, operands: Operands, upstream: Upstream, dout: Rows, work: tuple[Tensor, Tensor, Tensor], kept: Kept
    ) -> Tensor | None:
        """What the main kernel needs into the workspace; returns the sinks' gradient, if it is wanted."""
        stats, sums, marks = work
        shape, sinks = self.problem.shape, operands.sinks
        blocks = -(-self.line // (_ELEMENTS_A_PROGRAM // self.config.dim_v))
        partial = None if sinks is None else torch.empty((shape.heads_q, blocks), dtype=torch.float32, device=stats.device)
        out, lse = kept.keep(upstream.out.contiguous()), kept.keep(upstream.lse.contiguous())
        dlse = 0 if upstream.dlse is None else kept.keep(upstream.dlse.float().contiguous())
        index = stats.device.index
        kernel = jit.load(self.specs[0], index)
        kernel(
            jit.current_stream(index), blocks * shape.heads_q, 1, 1,
            out, dout.address, lse, dlse, 0 if sinks is None else kept.keep(sinks.float().contiguous()),
            stats.data_ptr(), sums.data_ptr(), marks.data_ptr(), 0 if partial is None else partial.data_ptr(), *kept.lengths,
            shape.batch, shape.heads_q, shape.seqlen_q, shape.seqlen_k, self.line, shape.head_dim, shape.head_dim_v,
            dout.pitch, int(dlse != 0), dout.strides[3], dout.strides[2],
            score_unit(self.problem.score), 1 / keep_scale(self.problem.score.dropout_p),
        )  # fmt: skip
        wanted = self.problem.score.sinks is not None and self.problem.score.sinks.gradients is Gradients.INPUTS
        return partial.sum(dim=1).to(sinks.dtype) if wanted and partial is not None and sinks is not None else None

    def _differentiate(
        self, operands: Operands, dout: Rows, work: tuple[Tensor, Tensor, Tensor],
        gradients: tuple[Tensor, Tensor, Tensor, Tensor | None], kept: Kept,
    ) -> None:  # fmt: skip
        stats, sums, marks = work
        shape, index = self.problem.shape, sums.device.index
        kernel = jit.load(self.specs[1], index)
        inputs = [Rows.of(tensor) for tensor in (operands.q, operands.k, operands.v)]
        tensors = [*inputs, dout]
        maps = [kernel.tiles[i](rows.address, rows.shape, rows.strides) for i, rows in enumerate(tensors)]
        maps.append(kernel.tiles[4](stats.data_ptr(), stats.shape, stats.stride()))
        dq, dk, dv, dbias = gradients
        outputs = [Rows.of(tensor) for tensor in (dk, dv)]
        maps += [kernel.tiles[5 + i](rows.address, rows.shape, rows.strides) for i, rows in enumerate(outputs)]
        maps.append(kernel.tiles[7](sums.data_ptr(), sums.shape, sums.stride()))
        rounded = Rows.of(dq)
        maps.append(kernel.tiles[8](rounded.address, rounded.shape, rounded.strides))
        kernel(
            jit.current_stream(index), self.programs, 1, 1, *maps, marks.data_ptr(), *kept.lengths, *kept.documents,
            *self.integers, shape.seqlen_q if kept.documents_vary else 0, self.blocks, self.section, self.line,
            *(rows.pitch for rows in tensors), rounded.pitch, self.tiles, *self.scales,
            *modifiers.values(self.problem.score, operands, kept.tensors), *([] if dbias is None else modifiers.places(dbias)),
        )  # fmt: skip

    def _finish(self, sums: Tensor, marks: Tensor, dq: Tensor, kept: Kept) -> None:
        shape, index = self.problem.shape, sums.device.index
        kernel = jit.load(self.specs[2], index)
        programs = self.line // _PIECE * shape.heads_q * -(-shape.head_dim // _PIECE)
        kernel(
            jit.current_stream(index), programs, 1, 1, sums.data_ptr(), marks.data_ptr(), dq.data_ptr(), *kept.lengths,
            shape.batch, shape.heads_q, shape.seqlen_q, shape.seqlen_k, self.line, shape.head_dim, self.scales[2],
        )  # fmt: skip


class Kept:
    """The small tensors of a call as addresses, 0 for what there is not; copies live until the launches are in the stream."""

    def __init__(self, operands: Operands) -> None:
        self.tensors: list[Tensor | None] = []
        lengths, mask = operands.lengths, operands.mask
        self.lengths = [
            self.keep(tensor) for tensor in (*lengths, mask.key_start, mask.key_end, mask.query_end)
        ]  # in the order of _LENGTHS
        self.documents = [self.keep(mask.document_begin), self.keep(mask.document_end)]
        self.documents_vary = mask.document_begin is not None and mask.document_begin.shape[0] > 1

    def keep(self, tensor: Tensor | None) -> int:
        """The address of a contiguous tensor with these contents."""
        if tensor is None:
            return 0
        tensor = tensor.contiguous()
        self.tensors.append(tensor)
        return tensor.data_ptr()


def _is_plain(tensor: Tensor) -> bool:
    """Whether the last dimension is dense and no element stands for several (as in the gradient of a sum)."""
    return tensor.stride(-1) == 1 and 0 not in tensor.stride()
