"""From a plan and its operands to a launch: the kernel's description, its arguments, and the tile counters.

Nothing here asks questions of the data or waits for the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessera import jit
from tessera.backends.hopper import modifiers
from tessera.backends.hopper.arguments import FAR, WRAP_STRIDE, reach, score_scales
from tessera.backends.hopper.config import ROWS, Feature, ForwardConfig, Overlap
from tessera.backends.hopper.plan import tall_blocks
from tessera.backends.hopper.room import cleared, room
from tessera.dispatch import Shortcut
from tessera.errors import Unsupported
from tessera.operands import Operands, with_offsets
from tessera.problem import Layout, Problem

ELEMENTS = {torch.float16: "fp16", torch.bfloat16: "bf16"}
L2_BYTES = 32 << 20
"""What of L2 heads that are worked on together may fill, as in FlashAttention-3."""
SECTION_BYTES = 16 << 20
"""K and V of the heads of one section of tiles (pieces/scheduler.py). Causal, 512 to 16k, geometric mean of ours / FA3 with 2, 4,
8, 12, 16, 32 MB: d128 1.00 1.01 1.02 1.02 1.03 1.00, d64 1.04 1.04 1.05 1.05 1.06 1.05, d256 1.01 1.02 1.04 1.03 1.05 1.03; 64 MB
is worse still (H200, 2026-11-21)."""


def kernel_spec(config: ForwardConfig, dtype: torch.dtype) -> jit.KernelSpec:
    """The kernel for a configuration: a function of it and of the dtype, and of nothing else."""
    element = ELEMENTS[dtype]
    arguments: dict[str, jit.Tiles | jit.Pointer | jit.Scalar] = {}
    constants: dict[str, object] = {"CONFIG": config}
    for name, rows, dims in (
        ("q", ROWS, config.dims), ("k", config.keys, config.dims), ("v", config.keys, config.dims_v), ("o", ROWS, config.staged),
    ):  # fmt: skip
        arguments[f"{name}_map"] = jit.Tiles(element, (1, 1, 1, rows, dims[0]))
        if len(dims) == 2:
            arguments[f"{name}_tail"] = jit.Tiles(element, (1, 1, 1, rows, dims[1]))
        else:
            constants[f"{name}_tail"] = None
    arguments["lse_ptr"] = jit.Pointer("fp32", align=4)
    arguments["counter"] = jit.Pointer("i32", align=4)
    arguments["sinks_ptr"] = jit.Pointer("fp32", align=4)
    for name in _POINTERS:
        arguments[name] = jit.Pointer("i32", align=4)
    for name in _INTEGERS:
        arguments[name] = jit.Scalar("i32")
    arguments["scale"] = arguments["inner"] = jit.Scalar("fp32")
    modifiers.describe(config.features, element, arguments, constants)
    modifiers.describe_staged(config.stages_bias, element, config.keys, arguments, constants)
    spec = jit.KernelSpec.of("tessera.backends.hopper.forward:attention_forward", arguments, constants)
    # where P dies before the next one is taken: windows 1.13 of halves, but under a plain diagonal 0.99 (H200, 2026-11-22); under
    # dropout they would come apart where P is masked
    drifts = config.overlap is Overlap.DRIFTING and config.features != (Feature.RIGHT,)
    joins = drifts or Feature.DROPOUT in config.features
    return replace(spec, cluster=config.cluster, joins_halves=joins)


_POINTERS = ("cu_q", "cu_k", "used_q", "used_k", "key_start", "key_end", "query_end", "document_begin", "document_end")
_NO_POINTERS = (0, *(0 for _ in _POINTERS))
"""Of sinks too."""
_NO_MORE_POINTERS = _NO_POINTERS[3:]
"""Where there are offsets alone."""
WITHOUT_POINTERS = frozenset({Feature.LEFT, Feature.RIGHT, Feature.SOFTCAP, Feature.SCALE_FIRST})
_WITH_OFFSETS_ALONE = WITHOUT_POINTERS | {Feature.VARLEN}
_INTEGERS = (
    "batch", "heads", "group", "seqlen_q", "seqlen_k", "left", "right", "document_stride", "tiles", "blocks", "tall", "section",
    "q_pitch", "k_pitch", "v_pitch", "o_pitch",
)  # fmt: skip


Copied = tuple[bool, ...]
"""Which of a call's tensors TMA reads from a copy: what follows from strides follows from this too."""
_AS_THEY_ARE = (False,) * 3


class Bound(NamedTuple):
    """What a runner's one set of shapes and strides decides: what makes out and lse, the tensor maps of q, k, v and out, all the
    kernel's numbers, its launch on `device`, called with a stream, the maps, lse, a counter, and what `_more` gives; and what
    makes the map of a bias, where TMA reads that."""

    device: int
    make_out: Callable[[], Tensor]
    make_lse: Callable[[], Tensor]
    maps: tuple[jit.Maps, ...]
    numbers: tuple[int | float, ...]
    launch: jit.Launch
    staged: modifiers.Staging | None


@dataclass(frozen=True)
class ForwardLaunch:
    """One problem's launch: everything that does not depend on the tensors, worked out once."""

    problem: Problem
    config: ForwardConfig
    multiprocessors: int
    bound: dict[Copied, Bound] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def spec(self) -> jit.KernelSpec:
        return kernel_spec(self.config, self.problem.dtype)

    @cached_property
    def blocks(self) -> int:
        """Row blocks of one dense sequence, pairs of them where clusters take pairs, or an upper bound over all packed ones (and
        what lies after the last)."""
        shape = self.problem.shape
        if self.problem.layout is Layout.VARLEN:
            return shape.seqlen_q // self.config.rows + shape.batch + 1
        together = self.config.tiles_together
        rest = max(0, shape.seqlen_q - self.tall * self.config.rows * together)
        return self.tall + -(-rest // (self.config.low_rows * together))

    @cached_property
    def tall(self) -> int:
        """How many of a dense sequence's row blocks are of full height."""
        shape, rows = self.problem.shape, self.config.rows
        if not self.config.has_low_blocks:
            return -(-shape.seqlen_q // (rows * self.config.tiles_together))
        heads = shape.batch * shape.heads_q // self.config.heads_together
        return tall_blocks(self.config, shape.seqlen_q, heads, self.multiprocessors // self.config.cluster)

    @cached_property
    def tiles(self) -> int:
        shape = self.problem.shape
        copies = 1 if self.problem.layout is Layout.VARLEN else shape.batch
        return self.blocks * shape.heads_q // self.config.heads_together * copies

    @cached_property
    def programs(self) -> int:
        """Blocks of the grid: persistent, one an SM."""
        size = self.config.cluster
        return min(self.tiles, self.multiprocessors // size) * size

    @cached_property
    def has_pointers(self) -> bool:
        return not WITHOUT_POINTERS.issuperset(self.config.features)

    @cached_property
    def is_modified(self) -> bool:
        return modifiers.are_in(self.config.features)

    @cached_property
    def section(self) -> int:
        """Dense: query heads whose K and V share L2, a power of two of groups. Packed: keys of one head that fit in it."""
        shape = self.problem.shape
        keys = max(1, SECTION_BYTES // (2 * (shape.head_dim + shape.head_dim_v)))
        if self.problem.layout is Layout.VARLEN:
            return min(keys, FAR)
        heads = max(1, keys // max(1, shape.seqlen_k))
        return min(shape.batch * shape.heads_q, (1 << (heads.bit_length() - 1)) * shape.group)

    @cached_property
    def integers(self) -> tuple[int, ...]:
        """The kernel's integers in its order, but for the stride of the documents' bounds (see `_integers`) and the pitches."""
        shape, mask = self.problem.shape, self.problem.mask
        return (
            shape.batch, shape.heads_q, shape.group, shape.seqlen_q, shape.seqlen_k, *reach(mask), 0,
            self.tiles, self.blocks, self.tall, self.section,
        )  # fmt: skip

    def __call__(self, operands: Operands) -> tuple[Tensor, Tensor]:
        bound = self.bound.get(_AS_THEY_ARE)
        make = self._makers(operands.q.device)[1] if bound is None else bound.make_lse
        lse = make()
        return self._run(operands, lse.data_ptr()), lse

    def _makers(self, device: torch.device) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        """What makes out and lse."""
        problem = self.problem
        return room(problem.out_shape, problem.dtype, device), room(problem.lse_shape, torch.float32, device)

    def shortcut(self, others: tuple[Any, ...]) -> Shortcut | None:
        """For what needs no more than q, k and v, and packed sequences' offsets, and has been launched: nothing is worked out in
        a call but what depends on addresses and on the stream."""
        bound = self.bound.get(_AS_THEY_ARE)
        if bound is None or is_captured(jit.current_stream(bound.device)):
            return None
        if not _WITH_OFFSETS_ALONE.issuperset(self.config.features) or not are_dense(others[0]):
            return None
        device, make_out, _, maps, _, launch, _ = bound
        q_maps, k_maps, v_maps, out_maps = maps
        current_stream, counter, of_default_stream = jit.current_stream, counters.address, counters.address(device, 0)

        def output(q: Tensor, k: Tensor, v: Tensor, *offsets: Tensor) -> Tensor:
            out, stream = make_out(), current_stream(device)
            place = counter(device, stream) if stream else of_default_stream
            arguments: tuple[jit.Argument, ...]
            try:
                arguments = (
                    *q_maps[q.data_ptr()], *k_maps[k.data_ptr()], *v_maps[v.data_ptr()], *out_maps[out.data_ptr()], 0, place,
                )  # fmt: skip
            except Unsupported:  # an address that TMA can't reach: it reads a copy then
                return self._run(Operands(q, k, v, *with_offsets(others, offsets)), 0)
            if offsets:
                arguments += (0, offsets[0].data_ptr(), offsets[-1].data_ptr(), *_NO_MORE_POINTERS)
            launch(stream, arguments)
            return out

        return output

    def _run(self, operands: Operands, lse: int) -> Tensor:
        q, k, v = operands[:3]
        bound = self.bound.get(_AS_THEY_ARE)
        out = (self._makers(q.device)[0] if bound is None else bound.make_out)()
        addresses: tuple[int, ...] = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
        kept: list[Tensor | None] = []  # copies that must live until the kernel is in the stream
        if bound is None or (addresses[0] | addresses[1] | addresses[2]) % 16:
            rows = tuple(map(Rows.of, (q, k, v, out)))
            copied = tuple(row.tensor is not tensor for row, tensor in zip(rows, (q, k, v), strict=False))
            bound = self.bound.get(copied) or self.bound.setdefault(copied, self._bind(operands, rows))
            addresses = tuple(row.address for row in rows)
            kept += [row.tensor for row in rows]
        stream = jit.current_stream(bound.device)
        maps = [one for place, address in zip(bound.maps, addresses, strict=True) for one in place[address]]
        more = self._more(operands, bound, kept)
        bound.launch(stream, (*maps, lse, counters.address(bound.device, stream), *more))
        return out

    def _bind(self, operands: Operands, rows: tuple[Rows, ...]) -> Bound:
        """The kernel and its arguments for these strides of q, k, v and out."""
        kernel = jit.load(self.spec, operands.q.device.index)
        encoders = iter(kernel.tiles)
        maps = [
            jit.Maps(next(encoders).bind(row.shape, row.strides) for _ in dims)
            for row, dims in zip(rows, (self.config.dims, self.config.dims, self.config.dims_v, self.config.dims_v), strict=True)
        ]
        numbers = (*self._integers(operands), *(row.pitch for row in rows), *score_scales(self.problem.score))
        fixed = () if self.is_modified else numbers if self.has_pointers else (*_NO_POINTERS, *numbers)
        launch = kernel.prepare((self.programs, 1, 1), fixed)
        staged = kernel.tiles[-1] if self.config.stages_bias else None
        return Bound(kernel.device, *self._makers(operands.q.device), (*maps,), numbers, launch, staged)

    def _more(self, operands: Operands, bound: Bound, kept: list[Tensor | None]) -> tuple[int | float | bytes, ...]:
        """The arguments behind the counter, where they are not the same in every call."""
        if not self.is_modified:
            return self._pointers(operands, kept) if self.has_pointers else ()
        modified = modifiers.values(self.problem.score, operands, kept, bound.staged)
        return (*self._pointers(operands, kept), *bound.numbers, *modified)

    def _pointers(self, operands: Operands, kept: list[Tensor | None]) -> tuple[int, ...]:
        """Addresses of sinks, lengths, padding and documents; 0 for what there is not (the kernel has no code for it)."""
        if not self.has_pointers:
            return _NO_POINTERS
        sinks, lengths, mask = operands.sinks, operands.lengths, operands.mask
        if sinks is not None:
            sinks = sinks.float().contiguous()
        tensors = [
            lengths.cu_seqlens_q, lengths.cu_seqlens_k, lengths.seqused_q, lengths.seqused_k,
            mask.key_start, mask.key_end, mask.query_end, mask.document_begin, mask.document_end,
        ]  # fmt: skip
        tensors = [None if tensor is None else tensor.contiguous() for tensor in tensors]
        kept += [sinks, *tensors]
        return tuple(0 if tensor is None else tensor.data_ptr() for tensor in (sinks, *tensors))

    def _integers(self, operands: Operands) -> tuple[int, ...]:
        if Feature.DOCUMENTS not in self.config.features:
            return self.integers
        begin = operands.mask.document_begin
        stride = 0 if begin is None or begin.shape[0] == 1 else self.problem.shape.seqlen_q
        place = _INTEGERS.index("document_stride")
        return (*self.integers[:place], stride, *self.integers[place + 1 :])


class Rows(NamedTuple):
    """A tensor as pieces/kv_source.py describes it to TMA: (wrap, end, head, row, column); `pitch` is batch entries' distance
    in rows. `tensor` is what lies at the address: a copy, where TMA can't reach the original."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    pitch: int
    tensor: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Rows:
        if tensor.dim() == 4:
            batch, rows, heads, columns = tensor.shape
            batch_stride, row_stride, head_stride, _ = tensor.stride()
        else:
            batch, batch_stride, (rows, heads, columns) = 1, 0, tensor.shape
            row_stride, head_stride, _ = tensor.stride()
        batch_stride = batch_stride if batch > 1 else 0
        if rows == 1:
            row_stride = batch_stride or 8  # a lone row's stride means nothing, and may be odd
        if heads == 1:
            head_stride = 8
        misaligned = tensor.data_ptr() % 16 or (batch_stride | row_stride | head_stride) % 8
        if misaligned or row_stride == 0 or batch_stride % row_stride or batch_stride // row_stride * batch > FAR:
            return cls.of(tensor.clone(memory_format=torch.contiguous_format))
        shape = (FAR + 1, FAR, heads, FAR, columns)
        strides = (WRAP_STRIDE - row_stride, row_stride, head_stride, row_stride, 1)
        return cls(tensor.data_ptr(), shape, strides, batch_stride // row_stride, tensor)


def are_dense(tensors: Iterable[Tensor | None]) -> bool:
    """Whether none of them has to be copied before a kernel reads it as a vector."""
    return all(tensor is None or tensor.is_contiguous() for tensor in tensors)


def is_captured(stream: int) -> bool:
    """Whether a launch on this stream, the current one, goes into a graph. CUDA captures no launch on the default stream, 0, so
    that most calls need not ask."""
    return stream != 0 and torch._C._cuda_isCurrentStreamCapturing()


class Counters:
    """The int32 tile counters of pieces/scheduler.py, zero between launches: one a stream, and one a captured launch.

    Launches of one stream follow one another, so they share a counter. A captured launch may be replayed beside anything, so
    it has its own; replays of one graph do not overlap. Counters are never given back (4 bytes each).
    """

    SIZE = 1 << 14

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slabs: dict[int, list[Tensor]] = {}
        self._used: dict[int, int] = {}
        self._of_stream: dict[tuple[int, int], int] = {}
        self._captured: list[Tensor] = []

    def address(self, device: int, stream: int) -> int:
        """The address of the counter for a launch on this stream now."""
        if is_captured(stream):
            return self._take(device)
        found = self._of_stream.get((device, stream))
        if found is None:
            found = self._of_stream.setdefault((device, stream), self._take(device))
        return found

    def _take(self, device: int) -> int:
        with self._lock:
            slabs = self._slabs.setdefault(device, [])
            used = self._used.get(device, 0)
            if used == self.SIZE * len(slabs):
                if torch._C._cuda_isCurrentStreamCapturing():
                    return self._captured_counter(device)
                slabs.append(cleared(self.SIZE, device))
            self._used[device] = used + 1
            return slabs[-1].data_ptr() + 4 * (used % self.SIZE)

    def _captured_counter(self, device: int) -> int:
        """No slab may be made while a graph is captured (its zeroing would be too): the graph gets a counter that it zeroes."""
        own = torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", device))
        self._captured.append(own)
        return own.data_ptr()


counters = Counters()
