"""Gluon kernels as plain Python: what they compute, and how their warps wait for one another, checked without a GPU.

`in_python()` puts a stand-in for tessera.jit.compat in place: tiles are torch tensors, each warp partition is a thread, mbarriers
and named barriers count as the hardware's do (a wait that nobody ends is an error), shared memory starts as NaN, and TMA
goes by its descriptor's shape and strides, out of bounds as zeros. Products and TMA stores are as late as they may be: they
read shared memory when they are waited for. What it does not show: layouts, registers, fences.
"""

# ruff: noqa: ARG004, ARG005 (a stand-in takes every argument that the real thing takes)
from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import math
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from gluon_clusters import Cluster, Place, Words
from gluon_tensors import associative_scan, div_rn, mma_v2, unpack_e4m3
from gluon_turns import give_way, run_together, wait_until
from torch import Tensor

from tessera import jit

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "i32": torch.int32, "i16": torch.int16,
          "fp8e4nv": torch.float8_e4m3fn}  # fmt: skip
REACH = 1 << 30
"""Bytes after an address that a kernel may touch, as far as this file knows."""

_here = threading.local()
"""Of this thread: program id, grid, cluster and rank in it, named barriers, threads of its partition, products and stores under
way."""


class Integer(int):
    """A scalar of a kernel: an int with `to`."""

    def to(self, dtype: object) -> Integer:
        return self

    @property
    def value(self) -> int:
        """As of a constexpr."""
        return int(self)


def _closed(name: str) -> Callable[[Integer, object], Any]:
    plain = getattr(int, name)

    def operation(self: Integer, other: object) -> Any:
        return Integer(plain(self, other)) if isinstance(other, int) else NotImplemented

    return operation


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift"):
    for _form in (f"__{_name}__", f"__r{_name}__"):
        setattr(Integer, _form, _closed(_form))


def _constexpr(value: Any) -> Any:
    return Integer(value) if type(value) is int else value


class Layout:
    """Any layout: they decide nothing here."""

    def __init__(self, *arguments: object) -> None: ...

    @staticmethod
    def get_default_for(block: object, dtype: object) -> Layout:
        return Layout()


class BarrierLayout(Layout):
    pass


# ------------------------------------------------------------------------------------------------------------ barriers


class Mbarrier:
    """A phase ends when every arrival has come and every expected byte has landed."""

    def __init__(self) -> None:
        self._phase = self._bytes = self.behind = 0

    def init(self, count: int) -> None:
        self._count = self._pending = count

    def arrive(self, expected: int = 0) -> None:
        self._note(1, expected)

    def land(self, count: int) -> None:
        self._note(0, -count)

    def _note(self, arrivals: int, change: int) -> None:
        self._pending -= arrivals
        self._bytes += change
        assert self._pending >= 0, "an mbarrier got more arrivals than it was made for"
        if self._pending == 0 and self._bytes == 0:
            self._phase ^= 1
            self._pending = self._count

    def wait(self, parity: int) -> None:
        wait_until(lambda: self._phase != parity, "an mbarrier")


class Mbarriers:
    """One of them, or several under `index`."""

    def __init__(self, count: int) -> None:
        self.barriers = [Mbarrier() for _ in range(count)]

    def index(self, i: int) -> Mbarrier:
        return self.barriers[i]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.barriers[0], name)

    def reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Layout) -> Words:
        return Words(self)


class NamedBarrier:
    """bar.sync and bar.arrive of one number."""

    def __init__(self) -> None:
        self._arrived = self._generation = 0

    def meet(self, total: int, waits: bool) -> None:
        generation = self._generation
        self._arrived += _here.threads
        assert self._arrived <= total, f"{self._arrived} threads at a barrier of {total}"
        if self._arrived == total:
            self._arrived = 0
            self._generation += 1
        elif waits:
            wait_until(lambda: self._generation != generation, "a named barrier")


# -------------------------------------------------------------------------------------------------------------- memory


class Shared:
    """A shared-memory descriptor."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.shape, self.dtype = list(data.shape), data.dtype

    def index(self, i: int) -> Shared:
        assert 0 <= i < self.shape[0]
        return Shared(self.data[i])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(*shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.data.narrow(dim, start, length))

    def reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Layout) -> Shared | Boxes:
        if dtype != self.dtype:  # the same bytes for something else: nobody reads there what lay there before
            return Shared(self.data.view(dtype).view(*shape))
        if self.data.shape[-1] == shape[-1] and len(shape) <= self.data.dim():  # boxes seen as tiles, lines under others
            return Shared(self.data.view(*shape))
        return Boxes(self, shape)

    def load(self, layout: Layout) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert (value.shape, value.dtype) == (self.data.shape, self.dtype)
        self.data.copy_(value)


class Boxes:
    """Tiles (slots, rows, columns) with the 128-byte swizzle seen as the boxes (.., box rows, 64) that fill them in turn: the
    blocks of 64 columns one after the other, and each one's rows."""

    def __init__(self, tiles: Shared, shape: Sequence[int]) -> None:
        slots, rows, columns = tiles.shape
        self._box = list(shape[1:])
        width = shape[-1]
        height = math.prod(shape[1:-1])
        blocks = tiles.data.view(slots, rows // height, height, columns // width, width).permute(0, 3, 1, 2, 4)
        self._all = [box for slot in blocks for block in slot for box in block]
        assert len(self._all) == shape[0]
        self.shape = list(shape)

    def index(self, i: int) -> Shared:
        assert 0 <= i < len(self._all)
        return Shared(self._all[i].view(self._box))


def _at(address: int, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer((ctypes.c_uint8 * REACH).from_address(address), dtype=dtype)


class Pointer:
    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + other)

    def __getitem__(self, key: Any) -> Pointer:
        return Pointer(self.memory, self.offset[key])

    def to(self, dtype: object) -> Integer | Pointer:
        return self if isinstance(self.offset, Tensor) else Integer(self.memory.data_ptr())


def _load(pointer: Pointer, mask: Any = None, other: Any = None, cache_modifier: str = "") -> Any:
    if isinstance(pointer.offset, int):
        if mask is not None and not mask:
            return Integer(other)
        value = pointer.memory[pointer.offset].item()
        return Integer(value) if isinstance(value, int) else value
    offset, mask = torch.broadcast_tensors(pointer.offset, torch.as_tensor(True if mask is None else mask))
    kind = pointer.memory.dtype if pointer.memory.dtype.is_floating_point else torch.int64
    value = torch.full(offset.shape, 0 if other is None else other, dtype=kind)
    value[mask] = pointer.memory[offset[mask]].to(kind)
    return value


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    if isinstance(pointer.offset, int):
        pointer.memory[pointer.offset] = value
        return
    mask = torch.as_tensor(True if mask is None else mask).expand(pointer.offset.shape)
    pointer.memory[pointer.offset[mask]] = value.expand(pointer.offset.shape)[mask]


def _atomic_add(pointer: Pointer, value: Any, sem: str, scope: str = "gpu") -> Any:
    if isinstance(pointer.offset, Tensor):
        flat = value.expand(pointer.offset.shape).reshape(-1)
        return pointer.memory.index_put_((pointer.offset.reshape(-1),), flat, accumulate=True)
    before = int(pointer.memory[pointer.offset])
    pointer.memory[pointer.offset] += value
    return Integer(before)


class TensorMap:
    """A TMA descriptor. Coordinates times strides add up modulo 2^64 bytes, as the hardware's do; the innermost one is a multiple
    of 16 bytes, or the instruction is illegal."""

    def __init__(self, tiles: jit.Tiles, address: int, shape: Sequence[int], strides: Sequence[int]) -> None:
        self.dtype, self.layout = DTYPES[tiles.element], Layout()
        self.block_type = SimpleNamespace(shape=list(tiles.block))
        self.memory, self._sizes, self._strides = _at(address, self.dtype), tuple(shape), tuple(strides)

    def inside(self, where: Sequence[int], shared: Shared) -> tuple[Tensor, Tensor]:
        """What of the block at `where` is in bounds: in memory, and in shared memory."""
        bounds = list(zip(where, self.block_type.shape, self._sizes, self._strides, strict=True))
        first = sum(max(int(begin), 0) * stride for begin, _, _, stride in bounds)
        width, tile = self.dtype.itemsize, shared.data
        assert int(where[-1]) * width % 16 == 0, f"a box at {[int(x) for x in where]}: its last coordinate is not aligned"
        lengths = []
        for dim, (begin, length, size, _) in enumerate(bounds):
            low, high = min(max(-int(begin), 0), length), max(min(size - int(begin), length), 0)
            lengths.append(max(high - low, 0))
            tile = tile.narrow(dim, low, lengths[-1])
        wrapped = (first * width + (1 << 63)) % (1 << 64) - (1 << 63)
        if not tile.numel():
            return tile, tile
        return torch.as_strided(self.memory, lengths, self._strides, wrapped // width), tile


def _tma_load(tiles: TensorMap, where: Sequence[int], bar: Mbarrier, shared: Shared) -> None:
    assert (shared.shape, shared.dtype) == (tiles.block_type.shape, tiles.dtype)
    memory, tile = tiles.inside(where, shared)
    if tile.numel() < shared.data.numel():
        shared.data.zero_()
    tile.copy_(memory)
    bar.land(shared.data.numel() * tiles.dtype.itemsize)


def _tma_load_as(how: str, tiles: TensorMap, where: Sequence[int], bar: Mbarrier, shared: Shared) -> None:
    if how == "only L2":
        return
    kind, _, mask = how.partition(" ")
    ranks = [rank for rank in range(_here.cluster.size) if int(mask) >> rank & 1] if kind == "multicast" else [_here.rank]
    for rank in ranks:
        _tma_load(tiles, where, _here.cluster.there(rank, bar), _here.cluster.there(rank, shared))


def _init_for_cluster(bar: Mbarrier | Mbarriers, count: int) -> Place:
    bar.init(count)
    return Place(_here.cluster, bar)


def _tma_store(tiles: TensorMap, where: Sequence[int], shared: Shared) -> None:
    memory, tile = tiles.inside(where, shared)
    _here.stores.append(lambda: memory.copy_(tile))


def _tma_reduce_add(tiles: TensorMap, where: Sequence[int], shared: Shared) -> None:
    memory, tile = tiles.inside(where, shared)
    _here.stores.append(lambda: memory.add_(tile))


def _tma_store_wait(left: int) -> None:
    while len(_here.stores) > left:
        _here.stores.pop(0)()


def _copy_to_shared(shared: Shared, pointer: Pointer, mask: Tensor) -> None:
    assert pointer.offset.shape == shared.data.shape
    shared.store(_load(pointer, mask).to(shared.dtype))


def _arrive_after_copies(bar: Mbarrier, increment_count: bool) -> None:
    assert not increment_count
    for _ in range(_here.threads):
        bar.arrive()


def _allocate(dtype: torch.dtype, shape: list[int], layout: Layout) -> Shared | Mbarriers:
    if isinstance(layout, BarrierLayout):
        memory: Shared | Mbarriers = Mbarriers(shape[0])
    else:
        memory = Shared(torch.full(shape, float("nan") if dtype.is_floating_point else -1, dtype=dtype))
    return _here.cluster.allocated(_here.rank, memory)


# ---------------------------------------------------------------------------------------------------------- operations


def _either(plain: Callable[..., Any], tensors: Callable[..., Tensor]) -> Callable[[Any, Any], Any]:
    def operation(a: Any, b: Any) -> Any:
        if isinstance(a, int) and isinstance(b, int):
            return Integer(plain(a, b))
        return tensors(torch.as_tensor(a), torch.as_tensor(b))

    return operation


def _where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def _scalar(x: Tensor) -> Any:
    """What a kernel sees of a sum: a number, where nothing else is left."""
    return Integer(x) if x.dim() == 0 and not x.dtype.is_floating_point else x


def _kept(words: Tensor, halves: Tensor, threshold: Any) -> Tensor:
    """What of a tile dropout keeps, from each score's word."""
    draws = words >> 16 * halves + 7 & 0xFF
    return (draws >= (threshold >> 7 & 0xFF)) != bool(threshold >> 31)


def _drawn_in_rows(even: Tensor, odd: Tensor, *factors: Tensor | Any) -> Tensor:
    """What of (rows, keys) is kept: x of keys of even and of odd eights; y of them times the factor of a row; the factors of
    keys, and these for the row 8 further; the threshold."""
    y_even, y_odd, near, further, threshold = factors
    rows, keys = torch.arange(even.shape[0])[:, None], torch.arange(even.shape[1])
    of_keys = torch.where(rows // 8 % 2 == 0, near, further)
    words = torch.where(keys // 8 % 2 == 0, y_even, y_odd) * of_keys + torch.where(keys // 8 % 2 == 0, even, odd)
    return _kept(words & 0xFFFFFFFF, keys % 2, threshold)


def _drawn_in_keys(even: Tensor, odd: Tensor, *factors: Tensor | Any) -> Tensor:
    """What of (keys, rows) is kept: x of even and odd rows; y of them times the keys' factors; the factors of rows and of those 8
    further; the threshold."""
    *by_keys, of_rows, of_further, threshold = factors
    keys, rows = torch.arange(even.shape[0])[:, None], torch.arange(even.shape[1])
    of_rows = torch.where(rows // 8 % 2 == 0, of_rows, of_further)
    words = torch.where(rows % 2 == 0, *by_keys) * of_rows + torch.where(rows % 2 == 0, even, odd)
    return _kept(words & 0xFFFFFFFF, keys // 8 % 2, threshold)


def _assembly(text: str, constraints: str, arguments: list[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    """The few texts that kernels hold."""
    if barrier := re.search(r"bar\.(sync|arrive) (\$1|\d+), (\d+)", text):
        kind, number, total = barrier.groups()
        _here.named[int(arguments[0]) if number == "$1" else int(number)].meet(int(total), kind == "sync")
        return Integer(0)
    if text == "mov.u32 $0, 0;":
        return Integer(0)
    if text == "mov.u32 $0, $1;":
        return arguments[0]
    if text == "mov.u32 $0, %laneid;":  # shares._are_equally_long: one value a lane
        return torch.arange(32)
    if text.startswith("{ .reg .pred any, grows;"):  # softmax.vote_on_maxima
        tops, m, scale = arguments
        top = tops.amax(dim=1, keepdim=True) * scale
        new = torch.where(top - m > 8, top, m)
        return new, torch.where(new != m, torch.exp2(m - new), 1.0)
    if "vote.sync.any" in text:
        return Integer(bool(arguments[0].any()))
    if text.startswith("{ .reg .u32 own;"):  # cache_rows.find_pages: one value a lane
        number, rows = re.search(r"and.b32 own, own, (\d+); mad.lo.u32 \$0, own, (\d+)", text).groups()
        lanes, (first,) = torch.arange(int(number) + 1) * int(rows), arguments
        return first + (lanes[:, None] if isinstance(first, Tensor) and first.dim() else lanes)
    if text.startswith("mul.wide"):
        return arguments[0].long() * int(arguments[1])
    if text.startswith("ld.global"):
        return _load(arguments[0])
    if "prefetch." in text:  # of what comes next, to L2
        return Integer(0)
    if text.startswith("shfl.") and isinstance(arguments[-1], Tensor) and len(arguments) == 2:  # cache_rows.of_rows: by turns
        return arguments[0][0][arguments[1][:, 0]]
    if text.startswith("shfl.") and len(arguments) == 2:
        return Integer(arguments[0][arguments[1]])
    if text.startswith("{ .reg .pred kept, grows;"):  # softmax.overtake
        return _overtaken(*arguments, dtype[0])
    if text.startswith("{ .reg .pred whole, seen;"):  # masking.mask_scores_where_cut
        s, *bounds, first, masked = arguments if "DONE" in text else (*arguments, True)
        group = first // 8 + torch.arange(s.shape[1])[None, :, None]
        seen = group < bounds[0] if "not.b32" in text else group >= bounds[0]
        return torch.where(seen & (group >= bounds[-1]) if len(bounds) == 2 else seen, s, -torch.inf) if masked else s
    if text.startswith("{ .reg .b32 e, x;"):  # batched.halved
        power = torch.exp2((torch.frexp(arguments[0]).exponent - 1).clamp(min=-100).float())
        return 2.0**14 / power, power / 2.0**14
    if text.startswith("{ .reg .b16 low, high;"):  # batched._unpack
        return unpack_e4m3(arguments[0], dtype[0])
    if text.startswith("{ .reg .pred seen;"):  # masking.mask_scores
        s, seen = arguments
        return torch.where((seen >> torch.arange(s.shape[1])[None, :, None]) & 1 != 0, s, -torch.inf)
    if text.startswith("{ .reg .pred same;"):  # softmax.rescale
        return arguments[0] * arguments[1]
    if "and.b32 $0, $1, mask;" in text:  # dropout.dropped, with left padding
        return torch.where(arguments[1] >> 7 & 1 == 1, arguments[0], 0.0).to(dtype)
    if text.startswith("{ .reg .b32 w<4>, m<4>,"):  # dropout.dropped
        p, *mixed, threshold = arguments
        return torch.where(_drawn_in_rows(*mixed, threshold), p, 0.0).to(dtype)
    if text == "prmt.b32 $0, $1, $2, 0xCC88;":  # dropout.masks, with left padding
        return torch.where(arguments[0] >> 7 & 1 == 1, math.nan, 0.0).to(dtype)
    if text.startswith("{ .reg .b32 x, least, w<4>, m<4>;"):  # dropout.masks
        return torch.where(_drawn_in_keys(*arguments), math.nan, 0.0).to(dtype)
    if text.startswith("{ .reg .b32 x, least, w<4>; .reg .f32 d, p<8>;"):  # dropout.drawn_derivatives
        p, dp, d, *drawn = arguments
        kept = _drawn_in_keys(*drawn)
        return p * (torch.where(kept, dp, 0.0) - d), torch.where(kept, p, 0.0).to(dtype[1])
    if text == "and.b32 $0, $1, $2;":  # dropout.masked, gradients._issue_less
        return torch.where(arguments[1] != 0, arguments[0], 0.0)
    if text.startswith("{ .reg .b32 other;"):  # gradients._issue_less
        return torch.where(arguments[1] != 0, 1 - arguments[0], 0.0)
    if text.startswith("{ .reg .pred p, q; .reg .b32 zero;"):  # dropout.masked_derivatives
        p, masks, dp, d = arguments
        return p * (torch.where(masks != 0, dp, 0.0) - d)
    if text.startswith("{ .reg .b64 near, far,"):  # modifiers._plane_of_bias
        block, keys, row, left = arguments
        rows = torch.arange(keys.shape[1])
        places = block + keys + torch.clamp(rows, max=int(left) - 1) * (int(row) // block.memory.element_size())
        return torch.where(rows < int(left), _load(places).float(), 0.0)
    if text.startswith("lop3.b32 $0, $1, $2, 0x80008000, 0xF2;"):  # dropout.marked
        return torch.where(arguments[1] != 0, arguments[0], -arguments[0])
    if text.startswith("{ .reg .b32 pair;"):  # softmax.to_32_bit_behind
        return arguments[0].float()
    if text.startswith("shfl."):
        return Integer(arguments[0])
    if "atom.global.add" in text:  # scheduler.take
        drawn = _load(arguments[0])
        _store(arguments[0], drawn + 1)
        return drawn
    if text.startswith(("{ .reg .pred never;", "fence.")):  # softmax.finish_before, backward_bias._ask_before
        return Integer(0)
    if wait := re.fullmatch(r"cp.async.bulk.wait_group (\d); mov.u32 \$0, 0;", text):  # counts.tell
        _tma_store_wait(int(wait[1]))
        return Integer(0)
    if "red.release" in text:  # counts.count_tile: every warp
        _tma_store_wait(0)
        _store(arguments[0], _load(arguments[0]) + _here.threads // 32)
        return Integer(0)
    if "ld.acquire" in text:  # sums.read_mark, counts.await_tiles: again and again, until another has set it
        give_way()
        return _load(arguments[0])
    if "st.release" in text:  # sums.set_mark
        _tma_store_wait(0)
        _store(*arguments)
        return Integer(0)
    if text.startswith("max."):
        return torch.clamp(arguments[0], min=arguments[1])
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "ex2.": torch.exp2, "tanh.": torch.tanh, "lg2.": torch.log2, "{ .reg .b32 s, e, c;": lambda x: unpack_e4m3(x, dtype[0]),
        "cvt.rn.bf16x2": lambda x: x.to(torch.bfloat16), "cvt.rn.f16x2": lambda x: x.to(torch.float16),
        "shl.b32": lambda x: x.to(torch.float32),
    }  # fmt: skip
    return next(run for name, run in functions.items() if text.startswith(name))(arguments[0])


def _overtaken(p: Tensor, sums: Tensor, m: Tensor, s: Tensor, scale: Any, dtype: Any) -> Any:
    """P, and the sums, the reference and alpha as copies, from scores in groups; warp by warp, 16 rows each."""
    most, headroom = (2, 8) if dtype == torch.bfloat16 else (512, 0)
    anew = (~(sums < most)).reshape(4, -1).any(dim=1).repeat_interleave(16)[:, None, None]
    top = s.amax(dim=(1, 2), keepdim=True) * scale + headroom
    new = torch.where(anew & (top - m > 4), top, m)
    alpha = torch.where(new != m, torch.exp2(m - new), 1.0)
    again = torch.exp2(s * scale - new)
    copies = (torch.where(anew, again.sum(dim=1, keepdim=True), sums), new, alpha)
    return torch.where(anew, again.to(dtype), p), *(x.expand(s.shape) for x in copies)


class Product:
    """An asynchronous product: it runs when its warpgroup waits for it."""

    def __init__(self, a: Tensor | Shared, b: Shared, sums: Tensor | Product, use_acc: bool) -> None:
        self._a, self._b, self._sums, self._adds = a, b, sums, use_acc
        self.shape, self.type = sums.shape, SimpleNamespace(layout=Layout())
        self.value: Tensor | None = None

    def run(self) -> None:
        operand = self._a.data if isinstance(self._a, Shared) else self._a
        product = operand.float() @ self._b.data.float()
        assert product.shape == self.shape
        self.value = _finished(self._sums) + product if self._adds else product


def _finished(result: Tensor | Product) -> Tensor:
    """A product's value. Products of a warpgroup run in order: an accumulator's own is done before it is added to."""
    value = result.value if isinstance(result, Product) else result
    assert value is not None, "a product is used that has not been waited for"
    return value


def _issue(a: Tensor | Shared, b: Shared, sums: Tensor | Product, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    _here.products.append(Product(a, b, sums, use_acc))
    return _here.products[-1]


def _wait_for_products(left: int, deps: tuple[Product, ...]) -> Any:
    while len(_here.products) > left:
        _here.products.pop(0).run()
    values = tuple(map(_finished, deps))
    return values[0] if len(values) == 1 else values


def _share_text() -> None:
    """A partition that runs the first worker partition's text: see `_warp_specialize`."""


def _warp_specialize(partitions: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
    shared = dict(vars(_here))

    def run(number: int, count: int) -> None:
        function, arguments = partitions[1 if partitions[number][0] is _share_text else number]
        vars(_here).update(shared, threads=32 * count, number=number, products=[], stores=[])
        function(*arguments)
        assert not _here.products, "a warpgroup ends with products under way"
        assert not _here.stores, "a warpgroup ends with stores under way"

    counts = [_here.threads // 32, *warps]
    run_together([partial(run, number, count) for number, count in enumerate(counts)])


def _language() -> ModuleType:
    gl = ModuleType("gl")
    vars(gl).update(
        {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "int32", "int64")},
        uint32=torch.int64, uint64=torch.int64, tensor=object, tuple=object, shared_memory_descriptor=object,
        constexpr=_constexpr, static_range=range, abs=torch.abs, permute=lambda x, order: x.permute(order),
        split=lambda x: x.unbind(-1),
        **dict.fromkeys(("BlockedLayout", "DistributedLinearLayout", "NVMMADistributedLayout", "DotOperandLayout"), Layout),
        **dict.fromkeys(("SliceLayout", "NVMMASharedLayout", "SwizzledSharedLayout"), Layout),
        program_id=lambda axis: Integer(_here.program[axis]), num_programs=lambda axis: Integer(_here.grid[axis]),
        num_warps=lambda: _here.threads // 32,
        minimum=_either(min, torch.minimum), maximum=_either(max, torch.maximum), where=_where,
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        arange=lambda begin, end, layout: torch.arange(begin, end),
        join=lambda x, y: torch.stack((x, y), dim=-1),
        reshape=lambda x, shape: x.reshape(shape), expand_dims=lambda x, axis: x.unsqueeze(axis),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        sum=lambda x, axis: _scalar(x.sum(dim=axis)), max=lambda x, axis: _scalar(x.amax(dim=axis)),
        reduce=lambda x, axis, combine: functools.reduce(combine, x.unbind(axis)),
        load=_load, store=_store, allocate_shared_memory=_allocate, inline_asm_elementwise=_assembly,
        warp_specialize=_warp_specialize, atomic_add=_atomic_add, associative_scan=associative_scan, div_rn=div_rn,
        float8e4nv=torch.float8_e4m3fn,
    )  # fmt: skip
    return gl


def _aggregate(cls: type) -> type:
    """With an __init__ that takes the fields in their order, where there is none."""
    if "__init__" not in vars(cls):
        cls.__init__ = lambda self, *values: vars(self).update(zip(cls.__annotations__, values, strict=True))
    return cls


def _compat() -> ModuleType:
    compat = ModuleType("tessera.jit.compat")
    vars(compat).update(
        gl=_language(), gluon=SimpleNamespace(jit=lambda f: f, constexpr_function=lambda f: f), aggregate=_aggregate,
        mbarrier=SimpleNamespace(
            MBarrierLayout=BarrierLayout, init=lambda bar, count: bar.init(count), expect=lambda bar, count: bar.arrive(count),
            arrive=lambda bar: bar.arrive(), wait=lambda bar, parity: bar.wait(parity),
        ),
        tma_load=_tma_load, tma_load_as=_tma_load_as, tma_store=_tma_store,
        tma_reduce_add=_tma_reduce_add, tma_store_wait=_tma_store_wait,
        copy_to_shared=_copy_to_shared, arrive_after_copies=_arrive_after_copies,
        reinterpret=lambda memory, *form: memory.reinterpret(*form),
        MERGES_BY_SELECTS=True,
        SPILLS_SOONER=True,
        **dict.fromkeys(("barrier", "fence_async_shared", "let_next_begin", "wait_for_previous"), lambda: None),
        init_for_cluster=_init_for_cluster, place_in=lambda rank, address: address.of(rank), send_in_cluster=Place.send,
        arrive_in_cluster=lambda place: place.bar().arrive(), meet_cluster=lambda: _here.cluster.meet(),
        arrive_after_writes=lambda place: [place.bar().arrive() for _ in range(_here.threads // 32)],
        await_writes=lambda bar: bar.wait(0),
        share_text=_share_text, begin_shared_text=lambda: Integer(_here.number), end_shared_text=lambda: None,
        mma_v2=mma_v2, warpgroup_mma=_issue, warpgroup_mma_wait=_wait_for_products,
    )  # fmt: skip
    return compat


class Encoder:
    """What makes a kernel's tensor maps: at once, or bound to sizes and strides first."""

    def __init__(self, tiles: jit.Tiles) -> None:
        self._tiles = tiles

    def __call__(self, *place: Any) -> TensorMap:
        return TensorMap(self._tiles, *place)

    def bind(self, shape: Sequence[int], strides: Sequence[int]) -> Any:
        tiles = self._tiles

        class Place:
            def __getitem__(self, address: int) -> TensorMap:
                return TensorMap(tiles, address, shape, strides)

        return Place()


class Kernel:
    """What jit.load gives, for CPU tensors: program after program."""

    def __init__(self, spec: jit.KernelSpec) -> None:
        self._spec = spec
        self._function = getattr(importlib.import_module(spec.module), spec.function)
        self.tiles = [Encoder(tiles) for tiles in spec.tiles]
        self.device = None

    def __call__(self, stream: int, grid_x: int, grid_y: int, grid_z: int, *arguments: Any) -> None:
        named = zip(self._spec.arguments, arguments, strict=True)
        values = {name: self._received(kind, value) for (name, kind), value in named} | dict(self._spec.constants)
        size, grid = self._spec.cluster, (grid_x, grid_y, grid_z)
        assert grid_x % size == 0, "a grid of whole clusters"
        for z, y, x in itertools.product(range(grid_z), range(grid_y), range(0, grid_x, size)):
            cluster = Cluster(size)

            def program(rank: int, cluster: Cluster = cluster, place: tuple[int, int, int] = (x, y, z)) -> None:
                _here.grid, _here.threads, _here.named = grid, 32 * self._spec.num_warps, [NamedBarrier() for _ in range(16)]
                _here.cluster, _here.rank, _here.program = cluster, rank, (place[0] + rank, *place[1:])
                self._function(**values)

            cluster.run(program)

    def prepare(self, grid: tuple[int, int, int], last: tuple[Any, ...] = ()) -> Callable[..., None]:
        return lambda stream, first: self(stream, *grid, *first, *last)

    @staticmethod
    def _received(kind: object, value: Any) -> Any:
        if isinstance(kind, (jit.Pointer, jit.Scalar)) and kind.align > 1:
            assert value % kind.align == 0, f"{value} is promised to be a multiple of {kind.align}"
        if isinstance(kind, jit.Pointer):
            return Pointer(_at(value, DTYPES[kind.element]) if value else torch.empty(0, dtype=DTYPES[kind.element]))
        return Integer(value) if isinstance(value, int) else value


COMPAT = "tessera.jit.compat"
_kernel_code: dict[str, ModuleType] = {COMPAT: _compat()}
"""The modules of kernels as they are in here, kept from one time to the next."""


def _taken_out() -> dict[str, ModuleType]:
    """The modules of kernels, and compat, taken out of sys.modules."""
    names = [name for name, module in sys.modules.items()
             if name == COMPAT or (name.startswith("tessera.backends.") and hasattr(module, "gluon"))]  # fmt: skip
    return {name: sys.modules.pop(name) for name in names}


class PlainWorkspace:
    """decode_launch.workspace on the CPU: what a launch does not write is NaN, and it leaves the tickets 0."""

    def __init__(self) -> None:
        self.zeros: list[Tensor] = []

    def of(self, device: int, stream: int, count: int, tickets: int) -> tuple[Tensor, Tensor]:
        self.zeros.append(torch.zeros(tickets, dtype=torch.int32))
        return torch.full((count,), float("nan")), self.zeros[-1]


@contextmanager
def in_python() -> Iterator[None]:
    """While this lasts, launches of Hopper kernels on CPU tensors run here."""
    outside, real = _taken_out(), (jit.load, jit.current_stream)
    sys.modules.update(_kernel_code)
    of_tensors = torch.Tensor.type
    torch.Tensor.type = property(lambda self: SimpleNamespace(layout=Layout()))  # type: ignore[assignment, method-assign]
    jit.load, jit.current_stream = lambda spec, index: Kernel(spec), lambda index: 0  # type: ignore[assignment, return-value]
    try:
        yield
    finally:
        torch.Tensor.type = of_tensors  # type: ignore[method-assign]
        jit.load, jit.current_stream = real
        _kernel_code.update(_taken_out())
        sys.modules.update(outside)
