"""Descriptions of kernels: equal only when a compiler sees no difference, and packed as Triton's ABI lays them out."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from enum import Enum

import pytest

from tessera import jit
from tessera.jit.spec import canonical, parameter_layout, tile_format


def spec(**changes) -> jit.KernelSpec:
    parts = {
        "kernel": "package.module:function",
        "arguments": (("x", jit.Pointer("fp32")), ("n", jit.Scalar("i32"))),
        "constants": (("A", 1), ("B", "b")),
    }
    return jit.KernelSpec(**(parts | changes))


class Colour(Enum):
    RED = 1
    ALSO = 2


@dataclass(frozen=True)
class Config:
    colour: Colour
    sizes: tuple[int, ...]


@dataclass
class Mutable:
    value: int = 1


@pytest.mark.parametrize(
    "other",
    [
        spec(constants=(("A", True), ("B", "b"))),
        spec(constants=(("A", 1.0), ("B", "b"))),
        spec(constants=(("A", "1"), ("B", "b"))),
        spec(constants=(("A", None), ("B", "b"))),
        spec(constants=(("A", Colour.RED), ("B", "b"))),
        spec(constants=(("A", (1,)), ("B", "b"))),
        spec(arguments=(("n", jit.Scalar("i32")), ("x", jit.Pointer("fp32")))),
        spec(arguments=(("x", jit.Pointer("fp32", align=4)), ("n", jit.Scalar("i32")))),
        spec(arguments=(("x", jit.Pointer("fp32")), ("n", jit.Scalar("u32")))),
        spec(num_warps=8),
        spec(maxnreg=128),
        spec(fp_fusion=False),
    ],
    ids=lambda one: one.text[-60:],
)
def test_what_a_compiler_tells_apart_is_unequal(other):
    assert other != spec()
    assert len({other, spec()}) == 2


def test_order_of_constants_is_no_difference():
    turned = spec(constants=(("B", "b"), ("A", 1)))
    assert turned == spec()
    assert hash(turned) == hash(spec())
    assert jit.KernelSpec.of("package.module:function", dict(spec().arguments), {"B": "b", "A": 1}) == spec()


def test_records_and_enums_are_constants_by_value():
    one, same, other = (Config(Colour.RED, (1, 2)), Config(Colour.RED, (1, 2)), Config(Colour.ALSO, (1, 2)))
    assert canonical(one) == canonical(same) != canonical(other)


@pytest.mark.parametrize("value", [[1], {"a": 1}, Mutable(), len, struct.Struct("i")], ids=lambda value: type(value).__name__)
def test_what_has_no_stable_text_is_refused(value):
    with pytest.raises(TypeError, match="cannot be a kernel's constant"):
        spec(constants=(("A", value),))


def test_mistakes_are_said_in_words():
    with pytest.raises(ValueError, match=r"package\.module:function"):
        spec(kernel="module.function")
    with pytest.raises(ValueError, match="named twice"):
        spec(constants=(("x", 1),))
    with pytest.raises(ValueError, match=r"float32.*no such element type.*fp32"):
        jit.Pointer("float32")
    with pytest.raises(ValueError, match="powers of two"):
        jit.Tiles("bf16", (64, 80))
    with pytest.raises(ValueError, match="1 to 5 dimensions"):
        jit.Tiles("bf16", (1, 1, 1, 1, 64, 64))
    with pytest.raises(ValueError, match="not a scalar type"):
        jit.Scalar("bf16")


class Rank3(ctypes.Structure):
    """A tensor descriptor of rank 3 as C lays it out."""

    _fields_ = (("map", ctypes.c_char * 128), ("sizes", ctypes.c_int32 * 3), ("strides", ctypes.c_int64 * 3))


def test_a_descriptor_is_laid_out_as_c_would():
    assert struct.calcsize(tile_format(3)) == ctypes.sizeof(Rank3) == Rank3.strides.offset + 24
    assert [struct.calcsize(tile_format(rank)) for rank in range(1, 6)] == [144, 152, 168, 176, 192]


def test_arguments_are_packed_at_their_natural_places():
    arguments = (
        ("n", jit.Scalar("i32")),
        ("tiles", jit.Tiles("bf16", (1, 64, 64))),
        ("m", jit.Scalar("i32")),
        ("x", jit.Pointer("fp32")),
        ("scale", jit.Scalar("fp32")),
    )
    layout, parameters = parameter_layout(spec(arguments=arguments))
    tiles = [(64, 128), (192, 4), (196, 4), (200, 4), (208, 8), (216, 8), (224, 8)]
    assert list(parameters) == [(0, 4), *tiles, (232, 4), (240, 8), (248, 4)]
    packed = struct.pack(layout, 7, bytes(range(168)), 8, 9, 0.5)
    assert packed[:4] == (7).to_bytes(4, "little")
    assert packed[64:232] == bytes(range(168))
    assert struct.unpack("=iiQf", packed[232:236] + packed[236:240] + packed[240:252]) == (8, 0, 9, 0.5)
