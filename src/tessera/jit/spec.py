"""What to compile, as data: a `KernelSpec` holds everything that a binary depends on, and nothing else.

No Triton and no GPU here. A kernel is named, not imported, so that a process whose binaries lie in the disk cache
never pays for Triton's import. Nothing is specialised on a value: a promise such as "16-byte aligned" stands in the
spec, so no sequence length, batch size or stride can cause a compile.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import TypeAlias

from tessera.errors import bad_value

ELEMENT_BYTES = {
    "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4, "i64": 8, "u64": 8,
    "fp8e4nv": 1, "fp8e5": 1, "fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8,
}  # fmt: skip
"""Bytes of one element of each of Triton's types that kernels here use."""

TENSOR_MAP_BYTES = 128
"""Size of CUDA's CUtensorMap, which a kernel receives by value (as a grid constant, aligned to 64 bytes)."""

_SCALAR_CODES = {"i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}
_KERNEL_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_MAX_TILE_RANK = 5  # of TMA


def _known_element(argument: str, element: str) -> None:
    if element not in ELEMENT_BYTES:
        raise bad_value(argument, repr(element), "no such element type", f"use one of {', '.join(ELEMENT_BYTES)}")


@dataclass(frozen=True)
class Dtype:
    """An element type as a constexpr: the kernel sees Gluon's dtype of this name (`Dtype("bf16")` is `gl.bfloat16`)."""

    name: str

    def __post_init__(self) -> None:
        _known_element("Dtype", self.name)


@dataclass(frozen=True)
class Pointer:
    """A device address. `align` (bytes) is a promise about every address passed; 1 promises nothing."""

    element: str
    align: int = 16

    def __post_init__(self) -> None:
        _known_element("Pointer", self.element)


@dataclass(frozen=True)
class Scalar:
    """A run-time number. `align`: a promise that every value passed is divisible by it (integers only)."""

    element: str
    align: int = 1

    def __post_init__(self) -> None:
        if self.element not in _SCALAR_CODES:
            raise bad_value("Scalar", repr(self.element), "not a scalar type", f"use one of {', '.join(_SCALAR_CODES)}")


class Arrangement(Enum):
    """How a block lies in shared memory."""

    SWIZZLED = "swizzled"
    """As products read it: Gluon's default for the block, the widest swizzle that fits."""
    ROWS = "rows"
    """Row after row, as in a plain array."""

    def __repr__(self) -> str:
        return str(self)  # as code, like the rest of a spec


@dataclass(frozen=True)
class Tiles:
    """A tensor that TMA reads or writes in blocks: the kernel receives a tensor descriptor.

    `block` is the block of one copy, outermost dimension first, powers of two.
    """

    element: str
    block: tuple[int, ...]
    arrangement: Arrangement = Arrangement.SWIZZLED

    def __post_init__(self) -> None:
        _known_element("Tiles", self.element)
        if not 1 <= len(self.block) <= _MAX_TILE_RANK or any(n < 1 or n & (n - 1) for n in self.block):
            raise bad_value("Tiles", self.block, "a block has 1 to 5 dimensions, powers of two", "split or pad it")


Argument: TypeAlias = Pointer | Scalar | Tiles


@dataclass(frozen=True, eq=False)
class KernelSpec:
    """One kernel variant.

    `kernel` is "package.module:function". `arguments` are the run-time parameters in the kernel's own order,
    `constants` its constexpr parameters (None, bool, int, float, str, Dtype, enums, frozen dataclasses, tuples of these).
    `early`: a launch may begin while the kernel before it in the stream ends, because every warp of this one waits
    (compat.wait_for_previous) before it touches what that one writes, or anything at all where that one is early too and
    may not have waited (CUDA's programmatic dependent launch). Only what to bring into L2 may be read before.
    `num_warps` is the default partition's, as in Gluon; a warp-specialised kernel's total comes with the binary.
    `cluster`: programs, neighbours along the grid's x, that run at the same time on SMs near each other and reach each other's
    shared memory (compat.meet_cluster, place_in, tma_load_as); each is compiled like a program by itself.
    `joins_halves`: what a loop carries in 16 bits is joined in its PTX (tessera.jit.pairs), whatever the Triton: nothing of it
    is made while a product that takes it is at work.

    Two specs are equal when `text` is: 1, 1.0 and True are different constants to a compiler, though not to Python.
    """

    kernel: str
    arguments: tuple[tuple[str, Argument], ...]
    constants: tuple[tuple[str, object], ...] = ()
    num_warps: int = 4
    cluster: int = 1
    maxnreg: int | None = None
    fp_fusion: bool = True
    early: bool = False
    joins_halves: bool = False
    target: str = "sm_90a"
    text: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not _KERNEL_NAME.fullmatch(self.kernel):
            raise bad_value("kernel", repr(self.kernel), "not a kernel's name", 'write "package.module:function"')
        names = [name for name, _ in self.arguments + self.constants]
        for name in names:
            if names.count(name) > 1:
                raise bad_value("arguments", repr(name), "named twice", "name each parameter once")
        described = {
            "kernel": self.kernel,
            "arguments": [[name, canonical(argument)] for name, argument in self.arguments],
            "constants": sorted([name, canonical(value)] for name, value in self.constants),
            "options": [self.num_warps, self.cluster, self.maxnreg, self.fp_fusion, self.early, self.joins_halves, self.target],
        }
        object.__setattr__(self, "text", json.dumps(described, sort_keys=True))

    @classmethod
    def of(
        cls, kernel: str, arguments: Mapping[str, Argument], constants: Mapping[str, object], num_warps: int = 4
    ) -> KernelSpec:
        """A spec from dictionaries; `arguments` in the kernel's order."""
        return cls(kernel, tuple(arguments.items()), tuple(constants.items()), num_warps)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KernelSpec) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    @property
    def module(self) -> str:
        return self.kernel.split(":")[0]

    @property
    def function(self) -> str:
        return self.kernel.split(":")[1]

    @property
    def capability(self) -> int:
        """The target's compute capability as Triton writes it: 90 for sm_90a."""
        return int(re.sub(r"\D", "", self.target))

    @property
    def tiles(self) -> tuple[Tiles, ...]:
        return tuple(argument for _, argument in self.arguments if isinstance(argument, Tiles))


@dataclass(frozen=True)
class Variant:
    """A kernel that a plan can choose, for the compile gate; `wgmma` and `setmaxnreg` are what its machine code must have."""

    name: str
    spec: KernelSpec
    wgmma: bool = True
    setmaxnreg: bool = True


def canonical(value: object) -> object:
    """A constant or argument as JSON that tells any two different ones apart, in every process the same.

    Raises TypeError for what has no such form (arrays, functions, mutable objects).
    """
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, Enum):
        return {"enum": _qualified(type(value)), "member": value.name, "value": canonical(value.value)}
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, tuple):
        return [canonical(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type) and type(value).__dataclass_params__.frozen:  # type: ignore[attr-defined]
        content = {item.name: canonical(getattr(value, item.name)) for item in fields(value)}
        return {"record": _qualified(type(value)), "fields": content}
    raise TypeError(f"a {type(value).__name__} cannot be a kernel's constant: {value!r}; "
                    "use None, bool, int, float, str, Dtype, an enum, a frozen dataclass or a tuple of these")  # fmt: skip


def constant_types(value: object) -> frozenset[type]:
    """The user-defined types inside a constant: their code, too, decides what a kernel that calls it becomes."""
    if isinstance(value, Enum):
        return frozenset({type(value)})
    if isinstance(value, tuple):
        return frozenset().union(*(constant_types(item) for item in value))
    if is_dataclass(value) and not isinstance(value, type):
        return frozenset({type(value)}).union(*(constant_types(getattr(value, item.name)) for item in fields(value)))
    return frozenset()


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def tile_format(rank: int) -> str:
    """What a tensor descriptor of `rank` dimensions is among a kernel's parameters, as a `struct` format.

    The map, an int32 size and an int64 stride for each dimension: Triton's ABI, outermost dimension first.
    """
    return f"={TENSOR_MAP_BYTES}s{rank}i{'4x' if rank % 2 else ''}{rank}q"


def parameter_layout(spec: KernelSpec) -> tuple[str, tuple[tuple[int, int], ...]]:
    """How a launch packs the arguments: a `struct` format, and offset and size (bytes) of each parameter of the kernel.

    The format has one field for each argument, where a descriptor (map, sizes and strides) is one field of bytes but
    several parameters. Tensor maps lie on multiples of 64 bytes, numbers on multiples of their size.
    """
    layout, position = "=", 0
    parameters: list[tuple[int, int]] = []
    for _, argument in spec.arguments:
        if isinstance(argument, Tiles):
            rank = len(argument.block)
            size, align = struct.calcsize(tile_format(rank)), 64
            code, strides_offset = f"{size}s", size - 8 * rank
            inside = [(0, TENSOR_MAP_BYTES)]
            inside += [(TENSOR_MAP_BYTES + 4 * index, 4) for index in range(rank)]
            inside += [(strides_offset + 8 * index, 8) for index in range(rank)]
        else:
            code = "Q" if isinstance(argument, Pointer) else _SCALAR_CODES[argument.element]
            size = align = struct.calcsize("=" + code)
            inside = [(0, size)]
        padding = -position % align
        layout += (f"{padding}x" if padding else "") + code
        position += padding
        parameters += [(position + offset, size) for offset, size in inside]
        position += size
    return layout, tuple(parameters)
