"""From a plan, its operands and the gradients that arrive to the backward's three launches.

Nothing here asks questions of the data or waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tessera import jit
from tessera.backends.hopper import modifiers
from tessera.backends.hopper.arguments import reach, score_scales, score_unit
from tessera.backends.hopper.backward_config import PART_LINE, Adding, BackwardConfig, Division, PartLayout
from tessera.backends.hopper.backward_plan import APART, sees_few_keys
from tessera.backends.hopper.backward_rows_config import RowsConfig
from tessera.backends.hopper.backward_sizes import (
    Remainder,
    bias_sums_shape,
    key_blocks,
    key_tiles,
    spared_multiprocessors,
    strands,
    work_lines,
    work_words,
)
from tessera.backends.hopper.bias_gradient import KeptScores
from tessera.backends.hopper.config import Feature
from tessera.backends.hopper.launch import ELEMENTS, L2_BYTES, WITHOUT_POINTERS, Copied, Rows
from tessera.backends.hopper.room import dense_strides, room, zeros
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
_NO_LENGTHS: tuple[int, ...] = (0,) * len(_LENGTHS)
_NO_DOCUMENTS = (0, 0)
_AS_THEY_ARE = (False,) * 4


def main_spec(config: BackwardConfig, dtype: torch.dtype) -> jit.KernelSpec:
    """The main kernel for a configuration: a function of it and of the dtype, and of nothing else."""
    element = ELEMENTS[dtype]
    arguments: dict[str, jit.Tiles | jit.Pointer | jit.Scalar] = {}
    for name, rows, dim in (
        ("q", config.rows, config.dim), ("k", _PIECE, config.dim), ("v", _PIECE, config.dim_v), ("do", config.rows, config.dim_v),
    ):  # fmt: skip
        arguments[f"{name}_map"] = jit.Tiles(element, (1, 1, 1, rows, dim))
    if config.subtracts_by_products:
        arguments["stats_map"] = jit.Tiles("bf16", (8, config.rows))
    else:
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
    arguments["shares_ptr"] = jit.Pointer("fp32")
    for name in (
        "batch", "heads_kv", "group", "seqlen_q", "seqlen_k", "left", "right", "document_stride", "blocks", "section", "line",
        "q_pitch", "k_pitch", "v_pitch", "do_pitch", "dq_pitch", "tiles", "whole", "share",
    ):  # fmt: skip
        arguments[name] = jit.Scalar("i32")
    for name in ("scale", "inner", "factor"):
        arguments[name] = jit.Scalar("fp32")
    arguments["strands"] = jit.Scalar("i32")
    constants: dict[str, object] = {"CONFIG": config}
    modifiers.describe(config.features, element, arguments, constants)
    modifiers.describe_staged(config.stages_bias, element, _PIECE, arguments, constants)
    modifiers.describe_gradient(config.features, element, arguments, constants)
    kernel = "tessera.backends.hopper.backward:attention_backward"
    return jit.KernelSpec(kernel, tuple(arguments.items()), tuple(constants.items()), early=True)


def prepare_spec(config: RowsConfig, dtype: torch.dtype) -> jit.KernelSpec:
    """The kernel before the main one."""
    element, of_rows = ELEMENTS[dtype], "bf16" if config.subtracts_by_products else "fp32"
    arguments: dict[str, jit.Tiles | jit.Pointer | jit.Scalar] = {
        "out_ptr": jit.Pointer(element), "do_ptr": jit.Pointer(element),
        "lse_ptr": jit.Pointer("fp32", align=4), "dlse_ptr": jit.Pointer("fp32", align=4),
        "sinks_ptr": jit.Pointer("fp32", align=4), "stats_ptr": jit.Pointer(of_rows), "sum_ptr": jit.Pointer("fp32"),
        "marks_ptr": jit.Pointer("i32"), "dsinks_ptr": jit.Pointer("fp32", align=4),
    }  # fmt: skip
    arguments |= {name: jit.Pointer("i32", align=4) for name in _LENGTHS}
    arguments |= {name: jit.Scalar("i32") for name in ("batch", "heads", "seqlen_q", "seqlen_k", "line", "strands")}
    arguments |= {name: jit.Scalar("i32", align=8) for name in ("dim", "dim_v")}
    arguments |= {"do_pitch": jit.Scalar("i32"), "with_dlse": jit.Scalar("i32")}
    arguments |= {name: jit.Scalar("i64", align=8) for name in ("do_row", "do_head")}
    arguments |= {name: jit.Scalar("fp32") for name in ("unit", "share")}
    config = replace(config, counts_tiles=False, keys=0)  # all one to it
    return jit.KernelSpec.of("tessera.backends.hopper.backward_rows:prepare_rows", arguments, {"CONFIG": config})


def finish_spec(config: RowsConfig, dtype: torch.dtype) -> jit.KernelSpec:
    """The kernel after it."""
    arguments: dict[str, jit.Tiles | jit.Pointer | jit.Scalar] = {
        "sum_ptr": jit.Pointer("fp32"), "marks_ptr": jit.Pointer("i32"), "dq_ptr": jit.Pointer(ELEMENTS[dtype]),
    }  # fmt: skip
    arguments |= {name: jit.Pointer("i32", align=4) for name in _LENGTHS}
    arguments |= {name: jit.Scalar("i32") for name in ("batch", "heads", "seqlen_q", "seqlen_k", "line", "strands")}
    arguments |= {"dim": jit.Scalar("i32", align=8), "factor": jit.Scalar("fp32")}
    arguments |= {name: jit.Scalar("i32") for name in ("group", "together", "warps")}
    kernel = "tessera.backends.hopper.backward_rows:finish_queries"
    return jit.KernelSpec(kernel, tuple(arguments.items()), (("CONFIG", config),), early=True)


class Bound(NamedTuple):
    """What a runner's one set of shapes and strides decides: what makes dq, dk, dv and the workspace, the places of the main
    kernel's tensor maps (without that of dS, which is by itself), all its numbers, and the launches (the first without a gradient
    of lse, and with one; `add` makes a bias's gradient of dS)."""

    device: torch.device
    make: tuple[Callable[[], Tensor], ...]
    places: tuple[jit.Place, ...]
    numbers: tuple[int | float, ...]
    prepare: tuple[jit.Launch, ...]
    main: jit.Launch
    finish: jit.Launch | None
    staged: modifiers.Staging | None
    kept: jit.Place | None
    add: jit.Launch | None


@dataclass(frozen=True)
class BackwardLaunch:
    """One problem's launches: everything that does not depend on the tensors, worked out once."""

    problem: Problem
    config: BackwardConfig
    multiprocessors: int
    bound: dict[Copied, Bound] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def own_specs(self) -> tuple[jit.KernelSpec, ...]:
        """In the order in which they run, but for a bias's gradient."""
        config, dtype = self.config, self.problem.dtype
        rows = RowsConfig.of(config)
        last = () if config.adding is Adding.ROUNDED else (finish_spec(rows, dtype),)
        return prepare_spec(rows, dtype), main_spec(config, dtype), *last

    @cached_property
    def specs(self) -> tuple[jit.KernelSpec, ...]:
        """All of them."""
        adding = None if self.kept_scores is None else self.kept_scores.spec
        return self.own_specs if adding is None else (*self.own_specs, adding)

    @cached_property
    def kept_scores(self) -> KeptScores | None:
        """dS in memory, if it is kept."""
        return KeptScores(self.problem, self.config) if Feature.KEPT_DS in self.config.features else None

    @cached_property
    def line(self) -> int:
        return work_lines(self.problem)

    @cached_property
    def sums_shape(self) -> tuple[int, ...]:
        """dQ in float32 in the workspace, as the main kernel's TMA sees it."""
        shape = self.problem.shape
        if self.config.part_layout is PartLayout.ROWS:
            return (self.strands * shape.heads_q * self.line, shape.head_dim)
        return (self.strands * shape.heads_q * self.line // _PIECE, shape.head_dim // 4, PART_LINE)

    @cached_property
    def work_words(self) -> tuple[int, int, int, int]:
        """The parts of the workspace in words of four bytes: sums, lse and D of each row, shares of a divided tile, marks."""
        return work_words(self.problem, self.config, self.remainder)

    @cached_property
    def strands(self) -> int:
        """Sums of dQ in the workspace."""
        return strands(self.problem, self.config)

    @cached_property
    def stats_shape(self) -> tuple[int, int]:
        """lse and D of each row in the workspace, as the main kernel's TMA sees them."""
        lines = 8 if self.config.subtracts_by_products else 2
        return lines * self.problem.shape.heads_q, self.line

    @cached_property
    def blocks(self) -> int:
        return key_blocks(self.problem, self.config)

    @cached_property
    def tiles(self) -> int:
        return key_tiles(self.problem, self.config)

    @cached_property
    def programs(self) -> int:
        """How many run: one a multiprocessor, where they take tile after tile, else one a tile."""
        if not self.config.takes_tile_after_tile:
            return self.tiles
        spared = spared_multiprocessors(self.problem, self.tiles, self.multiprocessors) if self.config.counts_tiles else 0
        return min(self.tiles, self.multiprocessors - spared)

    @cached_property
    def remainder(self) -> Remainder:
        return Remainder.of(self.problem, self.config, self.multiprocessors)

    @cached_property
    def section(self) -> int:
        """Query rows whose Q, dO and float32 dQ, for all heads of a group, fit in L2's share, or without groups in a part of it;
        but so many that there is a tile for every multiprocessor, else the last section's longest begin late (GQA 32/8, causal
        8k: 1.06, H200, 2026-11-21; half as many where the last two sections are one). Whole heads, where sections take turns:
        nearly as many tiles will do, far fewer would mix two of them. Or a head at a time. Or APART heads, in an order under a
        narrow window: a tile waits for the one before it, which then began that many tiles ago."""
        shape = self.problem.shape
        if self.config.writers == 2 and self.config.dim < 256 and sees_few_keys(self.problem):
            return min(APART * shape.seqlen_q, _FAR)
        narrow = 1 if shape.group > 1 else self.config.sections_in_share
        row = (2 + 4 * self.strands) * shape.head_dim + 2 * shape.head_dim_v
        fitting = L2_BYTES // (shape.group * row * narrow)
        rows = self.multiprocessors * self.config.keys // min(narrow, 2)
        if self.config.sections_take_turns:
            rows = max(rows, shape.seqlen_q * -(-95 * rows // (100 * max(shape.seqlen_q, 1))))
        return 1 if self.config.takes_heads_apart and shape.group > 1 else max(fitting, rows)

    @cached_property
    def counted(self) -> tuple[int, int, int]:
        """For finish_queries: heads of a group, heads that are done at about the same time, warps that count those of a sequence,
        or, packed, a tile: in an order the writers, else all of the consumer that has dQ, or the producer."""
        shape, warps = self.problem.shape, 4 if self.config.division is Division.PRODUCTS else 1
        warps = self.config.writers or warps
        if self.problem.layout is Layout.VARLEN:
            return shape.group, shape.heads_q, warps
        heads = min(max(self.section // max(shape.seqlen_q, 1), 1), shape.heads_kv)
        sections = -(-shape.heads_kv // heads)
        return shape.group, shape.group * -(-shape.heads_kv // sections), warps * self.blocks

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

    @cached_property
    def row_blocks(self) -> int:
        """Programs a head before the main kernel."""
        return -(-self.line // (_ELEMENTS_A_PROGRAM // self.config.dim_v))

    @cached_property
    def has_pointers(self) -> bool:
        """Whether there are lengths, padding or documents (or modifiers)."""
        return not WITHOUT_POINTERS.issuperset(self.config.features)

    @cached_property
    def is_modified(self) -> bool:
        return modifiers.are_in(self.config.features)

    def __call__(self, operands: Operands, upstream: Upstream) -> InputGradients:
        q, k, v, dout = operands.q, operands.k, operands.v, upstream.dout.contiguous()
        kept = Kept(operands if self.has_pointers else None)
        addresses: tuple[int, ...] = (q.data_ptr(), k.data_ptr(), v.data_ptr(), dout.data_ptr())
        bound = self.bound.get(_AS_THEY_ARE)
        if bound is None or (addresses[0] | addresses[1] | addresses[2] | addresses[3]) % 16:
            inputs = (q, k, v, dout)
            rows = tuple(map(Rows.of, inputs))
            copied = tuple(row.tensor is not tensor for row, tensor in zip(rows, inputs, strict=True))
            bound = self.bound.get(copied) or self.bound.setdefault(copied, self._bind(operands, rows))
            addresses = tuple(row.address for row in rows)
            kept.tensors += [row.tensor for row in rows]
        dq, dk, dv, workspace = [make() for make in bound.make]
        dbias = self._bias_sums(operands)  # or what is kept for it
        sums, stats, shares, _ = self.work_words
        begin = workspace.data_ptr()
        behind = begin + 4 * (sums + stats)
        work = Work(jit.current_stream(bound.device.index), begin + 4 * sums, begin, behind + 4 * shares)
        dsinks = self._prepare(bound, work, addresses[3], (operands.sinks, upstream), kept)
        tensors = (*addresses, work.stats, dk.data_ptr(), dv.data_ptr(), work.sums, dq.data_ptr())
        maps = [place[address] for place, address in zip(bound.places, tensors, strict=True)]
        modified = self._modified(bound, operands, dbias, kept) if self.is_modified else ()
        shares_place = behind if shares else 0
        bound.main(work.stream, (*maps, work.marks, *kept.lengths, *kept.documents, shares_place, *modified))
        if bound.finish is not None:
            bound.finish(work.stream, (work.sums, work.marks, tensors[-1], *kept.lengths))
        if self.kept_scores is not None and dbias is not None:
            dbias = self.kept_scores.finish(bound.add, work.stream, dbias, kept.lengths[-2:], kept.documents)
        elif operands.bias is not None and dbias is not None:
            dbias = dbias.sum_to_size(operands.bias.shape).to(operands.bias.dtype)
        return InputGradients(dq, dk, dv, dbias, dsinks)

    def _bias_sums(self, operands: Operands) -> Tensor | None:
        """Zeros for the bias's gradient to be added to, if that is wanted; or room for dS."""
        if self.kept_scores is not None:
            return self.kept_scores.room(operands)
        if Feature.BIAS_GRADIENT not in self.config.features:
            return None
        return torch.zeros(bias_sums_shape(self.problem), dtype=torch.float32, device=operands.q.device)

    def _modified(self, bound: Bound, operands: Operands, dbias: Tensor | None, kept: Kept) -> tuple[int | float | bytes, ...]:
        """The main kernel's arguments behind the documents' bounds, where modifiers' tensors come after the numbers."""
        own = modifiers.values(self.problem.score, operands, kept.tensors, bound.staged)
        if dbias is None:
            return (*bound.numbers, *own)
        if bound.kept is not None:
            return (*bound.numbers, *own, bound.kept[dbias.data_ptr()])
        return (*bound.numbers, *own, *modifiers.places(dbias))

    def _prepare(self, bound: Bound, work: Work, dout: int, given: tuple[Tensor | None, Upstream], kept: Kept) -> Tensor | None:
        """What the main kernel needs into the workspace; returns the sinks' gradient, if it is wanted."""
        sinks, upstream = given
        out, lse = kept.keep(upstream.out), kept.keep(upstream.lse)
        dlse = 0 if upstream.dlse is None else kept.keep(upstream.dlse.float())
        launch = bound.prepare[upstream.dlse is not None]
        if sinks is None:
            launch(work.stream, (out, dout, lse, dlse, 0, *work[1:], 0, *kept.lengths))
            return None
        partial = torch.empty((self.problem.shape.heads_q, self.row_blocks), dtype=torch.float32, device=bound.device)
        launch(work.stream, (out, dout, lse, dlse, kept.keep(sinks.float()), *work[1:], partial.data_ptr(), *kept.lengths))
        described = self.problem.score.sinks
        wanted = described is not None and described.gradients is Gradients.INPUTS
        return partial.sum(dim=1).to(sinks.dtype) if wanted else None

    def _bind(self, operands: Operands, rows: tuple[Rows, ...]) -> Bound:
        """The kernels and their arguments for these strides of q, k, v and dout."""
        shape, device, (q, k, v) = self.problem.shape, operands.q.device, operands[:3]
        prepare, main, *finish = (jit.load(spec, device.index) for spec in self.own_specs)
        dq, dk, dv = (Rows.of(torch.empty(x.shape, dtype=x.dtype, device="meta")) for x in (q, k, v))
        stats = self.stats_shape
        maps = [(row.shape, row.strides) for row in (*rows, dk, dv, dq)]
        maps[4:4], maps[7:7] = [(stats, dense_strides(stats))], [(self.sums_shape, dense_strides(self.sums_shape))]
        keeping = self.kept_scores
        places = tuple(encode.bind(*form) for encode, form in zip(main.tiles, maps, strict=False))
        begin, rest = operands.mask.document_begin, self.remainder
        document_stride = shape.seqlen_q if begin is not None and begin.shape[0] > 1 else 0
        numbers = (
            *self.integers, document_stride, self.blocks, self.section, self.line, *(row.pitch for row in rows), dq.pitch,
            rest.numbers, rest.whole, rest.share, *self.scales, self.strands,
        )  # fmt: skip
        sizes, dout = (shape.batch, shape.heads_q, shape.seqlen_q, shape.seqlen_k, self.line, self.strands), rows[3]
        score = self.problem.score
        unit = 1 / score.scale if self.config.subtracts_by_products else score_unit(score)
        shares = (unit, 1 / keep_scale(score.dropout_p))
        dims, steps = (shape.head_dim, shape.head_dim_v, dout.pitch), (dout.strides[3], dout.strides[2])
        programs = self.line // _PIECE * shape.heads_q * -(-shape.head_dim // _PIECE)
        make_keys = zeros if self.has_unwritten_keys else room
        return Bound(
            device,
            (
                room(q.shape, q.dtype, device),
                make_keys(k.shape, k.dtype, device),
                make_keys(v.shape, v.dtype, device),
                room((sum(self.work_words),), torch.int32, device),
            ),
            places,
            numbers,
            tuple(
                prepare.prepare((self.row_blocks * shape.heads_q, 1, 1), (*sizes, *dims, with_dlse, *steps, *shares))
                for with_dlse in (0, 1)
            ),
            main.prepare((self.programs, 1, 1), () if self.is_modified else numbers),
            finish[0].prepare((programs, 1, 1), (*sizes, shape.head_dim, self.scales[2], *self.counted)) if finish else None,
            main.tiles[9] if self.config.stages_bias else None,
            None if keeping is None else main.tiles[-1].bind(*keeping.map_form),
            None if keeping is None else keeping.bind(device.index, document_stride),
        )


class Work(NamedTuple):
    """The stream of a call, and its workspace's addresses."""

    stream: int
    stats: int
    sums: int
    marks: int


class Kept:
    """The small tensors of a call as addresses, 0 for what there is not; copies live until the launches are in the stream."""

    def __init__(self, operands: Operands | None) -> None:
        self.tensors: list[Tensor | None] = []
        self.lengths, self.documents = _NO_LENGTHS, _NO_DOCUMENTS
        if operands is not None:
            lengths, mask = operands.lengths, operands.mask
            self.lengths = tuple(map(self.keep, (*lengths, mask.key_start, mask.key_end, mask.query_end)))  # as _LENGTHS
            self.documents = (self.keep(mask.document_begin), self.keep(mask.document_end))

    def keep(self, tensor: Tensor | None) -> int:
        """The address of a contiguous tensor with these contents."""
        if tensor is None:
            return 0
        tensor = tensor.contiguous()
        self.tensors.append(tensor)
        return tensor.data_ptr()
