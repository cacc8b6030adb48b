"""Tensor maps for TMA (CUtensorMap), encoded by the driver on the host and remembered.

A place is a tensor's sizes and strides, bound once (`TileEncoder.bind`); a map is a place at an address. An address seen
before costs one dictionary look-up by an integer. A new one (what an allocator yields) costs a copy and
`cuTensorMapReplaceAddress`. Only a new place costs a full `cuTensorMapEncodeTiled`.

Limits: "Tensor Map Object Management" in the CUDA driver API's reference.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterable
from functools import cache
from typing import Any, TypeVar

from tessera.errors import Reason, Unsupported
from tessera.jit import driver
from tessera.jit.binary import Descriptor
from tessera.jit.spec import ELEMENT_BYTES, TENSOR_MAP_BYTES, tile_format

PLACES, ADDRESSES = 64, 1024
"""How many places an encoder remembers, and how many addresses a place (a quarter KB each); the oldest go first."""

_CUDA_TYPES = {
    "i8": 0, "u8": 0, "fp8e4nv": 0, "fp8e5": 0, "i16": 1, "u16": 1, "u32": 2, "i32": 3, "u64": 4, "i64": 5,
    "fp16": 6, "fp32": 7, "fp64": 8, "bf16": 9,
}  # fmt: skip
_L2_PROMOTION_128B = 2
_NO_INTERLEAVE, _ZERO_FILL = 0, 0
_MAP_ALIGN = 64
_MAX_SIZE = 2**31  # a descriptor's sizes also reach the kernel as int32
_MAX_STRIDE_BYTES = 2**40
_STRIDE_ALIGN = 16

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def why_not_tma(address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[Reason, ...]:
    """Why TMA cannot reach a tensor; empty when it can. Strides in elements; those of dimensions of size 1 are ignored."""
    if not 1 <= len(shape) <= 5:
        return (Reason("shape", str(shape), "TMA takes 1 to 5 dimensions", "reshape"),)
    reasons = []
    if address % _STRIDE_ALIGN:
        reasons.append(Reason("data_ptr", hex(address), "TMA needs 16-byte alignment", "copy the tensor, or slice elsewhere"))
    if any(not 0 < size < _MAX_SIZE for size in shape):
        reasons.append(Reason("shape", str(shape), "TMA needs sizes from 1 to 2^31 - 1", "skip what is empty, split"))
    if shape[-1] > 1 and strides[-1] != 1:
        reasons.append(Reason("stride", str(strides), "TMA needs a last stride of 1", "call .contiguous()"))
    outer = [stride * itemsize for size, stride in zip(shape[:-1], strides[:-1], strict=True) if size > 1]
    if any(stride % _STRIDE_ALIGN or not 0 <= stride < _MAX_STRIDE_BYTES for stride in outer):
        why = f"TMA needs outer strides that are multiples of {_STRIDE_ALIGN // itemsize} elements, below 2^40 bytes"
        reasons.append(Reason("stride", str(strides), why, "call .contiguous(), or pad the last dimension"))
    return tuple(reasons)


class TileEncoder:
    """Encodes tensor maps for one kind of descriptor, and remembers them. Safe for many threads."""

    __slots__ = ("_lock", "_places", "_scratch", "descriptor")

    def __init__(self, descriptor: Descriptor):
        self.descriptor = descriptor
        self._places: dict[tuple[tuple[int, ...], tuple[int, ...]], Place] = {}
        self._lock = threading.Lock()
        self._scratch: _AlignedMap | None = None

    def __call__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
        """The descriptor argument of a launch for this tensor: `bind(shape, strides)[address]`. Raises as those do."""
        place = self._places.get((shape, strides))
        return (place if place is not None else self.bind(shape, strides))[address]

    def bind(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> Place:
        """The maps of tensors with these sizes and strides (in elements; tuples, outermost first).

        Raises Unsupported with `why_not_tma`'s reasons (ask that first), TypeError for another rank than the block's.
        """
        with self._lock:
            place = self._places.get((shape, strides))
            if place is None:
                rank = len(self.descriptor.box)
                if len(shape) != rank or len(strides) != rank:
                    raise TypeError(f"a tensor map of rank {rank} from shape {tuple(shape)} and strides {tuple(strides)}")
                _refuse(why_not_tma(0, shape, strides, ELEMENT_BYTES[self.descriptor.element]))
                place = Place(self, tuple(shape), canonical_strides(shape, strides, ELEMENT_BYTES[self.descriptor.element]))
                _remember(self._places, (shape, strides), place, PLACES)
            return place


class Place(dict[int, bytes]):
    """Descriptor arguments by address: `place[tensor.data_ptr()]` is what a launch takes, encoded where it is missing.

    An argument is the map, and the sizes and strides that Triton's ABI wants after it. Raises Unsupported for an address
    that is not 16-byte aligned.
    """

    __slots__ = ("_encoder", "_shape", "_strides", "_template")

    def __init__(self, encoder: TileEncoder, shape: tuple[int, ...], strides: tuple[int, ...]):
        super().__init__()
        self._encoder, self._shape, self._strides = encoder, shape, strides
        self._template: bytes | None = None

    def __missing__(self, address: int) -> bytes:
        encoder = self._encoder
        if address % _STRIDE_ALIGN:
            _refuse(why_not_tma(address, self._shape, self._strides, ELEMENT_BYTES[encoder.descriptor.element]))
        with encoder._lock:
            if address in self:  # another thread was faster
                return self[address]
            if encoder._scratch is None:
                encoder._scratch = _AlignedMap()
            if self._template is None:
                found = encoder._scratch.encoded(encoder.descriptor, address, self._shape, self._strides)
                self._template = struct.pack(tile_format(len(self._shape)), found, *self._shape, *self._strides)
            argument = encoder._scratch.moved(self._template[:TENSOR_MAP_BYTES], address) + self._template[TENSOR_MAP_BYTES:]
            _remember(self, address, argument, ADDRESSES)
            return argument


class Maps(dict[int, tuple[bytes, ...]]):
    """The descriptor arguments of one tensor for all the tiles that a kernel reads it by: `maps[tensor.data_ptr()]`."""

    __slots__ = ("_places",)

    def __init__(self, places: Iterable[Place]):
        super().__init__()
        self._places = tuple(places)

    def __missing__(self, address: int) -> tuple[bytes, ...]:
        if len(self) >= ADDRESSES:
            self.clear()
        found = self[address] = tuple(place[address] for place in self._places)
        return found


class _AlignedMap:
    """64-byte aligned memory of one CUtensorMap, and the driver's calls on it. Used by one thread at a time."""

    __slots__ = ("_content", "_reference", "_replace")

    def __init__(self) -> None:
        memory = ctypes.create_string_buffer(TENSOR_MAP_BYTES + _MAP_ALIGN)
        offset = -ctypes.addressof(memory) % _MAP_ALIGN
        self._content = memoryview(memory).cast("B")[offset : offset + TENSOR_MAP_BYTES]
        self._reference = ctypes.byref(memory, offset)
        self._replace = driver.library().cuTensorMapReplaceAddress

    def moved(self, template: bytes, address: int) -> bytes:
        """A map like `template` at another address."""
        self._content[:] = template
        self._call("cuTensorMapReplaceAddress", self._replace, self._reference, ctypes.c_void_p(address))
        return bytes(self._content)

    def encoded(self, descriptor: Descriptor, address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
        """A new map. CUDA wants dimensions innermost first, and strides in bytes without the innermost."""
        rank, itemsize = len(shape), ELEMENT_BYTES[descriptor.element]
        self._call(
            f"cuTensorMapEncodeTiled of shape {tuple(shape)}, strides {strides}, {descriptor}",
            driver.library().cuTensorMapEncodeTiled,
            self._reference,
            _CUDA_TYPES[descriptor.element],
            rank,
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * rank)(*reversed(shape)),
            (ctypes.c_uint64 * rank)(*(stride * itemsize for stride in reversed(strides[:-1]))),
            (ctypes.c_uint32 * rank)(*reversed(descriptor.box)),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            _NO_INTERLEAVE,
            descriptor.swizzle,
            _L2_PROMOTION_128B,
            _ZERO_FILL,
        )
        return bytes(self._content)

    def _call(self, what: str, function: Any, *arguments: Any) -> None:
        status = function(*arguments)
        if status in driver.LOST_CONTEXT:
            with driver.current(driver.retained_device()):
                status = function(*arguments)
        driver.check(what, status)


@cache
def encoder(descriptor: Descriptor) -> TileEncoder:
    """The process-wide encoder of a kind of descriptor: kernels that read a tensor alike share its map."""
    return TileEncoder(descriptor)


def canonical_strides(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The strides, with those of dimensions of size 1 (which mean nothing, and may be odd) replaced by valid ones."""
    step = _STRIDE_ALIGN // itemsize
    result, packed = [1], shape[-1]
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        used = stride if size > 1 else packed + -packed % step
        result.append(used)
        packed = max(packed, used * size)
    return tuple(reversed(result))


def _refuse(reasons: tuple[Reason, ...]) -> None:
    if reasons:
        raise Unsupported("TMA cannot reach this tensor", {"tma": reasons})


def _remember(table: dict[_Key, _Value], key: _Key, value: _Value, capacity: int) -> None:
    """Adds to a table of at most `capacity` entries; called under the encoder's lock."""
    while len(table) >= capacity:
        del table[next(iter(table))]
    table[key] = value
