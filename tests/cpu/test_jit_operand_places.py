"""Products' operands by one 64-bit addition each: the same places, in front of the products, or nothing is touched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tessera.jit import operand_places, toolchain

UPPER = 0x4000004000000000


def kernel(first: str = "bfe.u32 \t%r4, %r3, 4, 15;", second: str = "add.s32 \t%r5, %r4, 1030;", upper: int = UPPER) -> str:
    """Two places in front of two products, as Triton 3.9 writes them."""
    return f"""
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
// %bb.0:
	{first}
	cvt.u64.u32 	%rd1, %r4;
	.loc	4 51 1, function_name $L__info_string0, inlined_at 4 131 1 // blocks.py:51:1
	or.b64 	%rd2, %rd1, {upper};
	{second}
	cvt.u64.u32 	%rd3, %r5;
	or.b64 	%rd4, %rd3, {upper};
	// begin inline asm
	wgmma.mma_async.sync.aligned.m64n8k16 {{%f1}}, %rd2, 1;
	// end inline asm
	// begin inline asm
	.loc	4 51 1, function_name $L__info_string0, inlined_at 4 131 1 // blocks.py:51:1
	wgmma.mma_async.sync.aligned.m64n8k16 {{%f1}}, %rd4, 1;
	// end inline asm
"""


def places(ptx: str, place: int) -> list[int]:
    """What the products of a kernel are given, where %r3 is `place`."""
    values, taken = {"%r3": place}, []
    for line in ptx.splitlines():
        words = re.findall(r"[%\w.]+", line)
        if line.startswith("\twgmma"):
            taken += [values[word] for word in words if word.startswith("%rd")]
        elif line.startswith("\t") and words and words[0] in ("bfe.u32", "add.s32", "or.b32", "cvt.u64.u32", "or.b64", "add.s64"):
            opcode, target, *rest = words
            numbers = [values[word] if word.startswith("%") else int(word) for word in rest]
            if opcode == "bfe.u32":
                values[target] = numbers[0] >> numbers[1] & (1 << numbers[2]) - 1
            elif opcode == "cvt.u64.u32":
                values[target] = numbers[0]
            else:
                result = numbers[0] | numbers[1] if opcode.startswith("or") else numbers[0] + numbers[1]
                values[target] = result % (1 << (64 if target.startswith("%rd") else 32))
    return taken


@pytest.mark.parametrize("second", ["add.s32 \t%r5, %r4, 1030;", "or.b32 \t%r5, %r4, 67108864;"])
def test_each_place_is_one_addition_in_front_of_its_product(second):
    before = kernel(second=second)
    after = operand_places.added(before)
    for place in (0, 16, 0x1C160, 0x38000):
        assert places(after, place) == places(before, place)
    assert "or.b64" not in after
    assert after.count("add.s64") == after.count("// begin inline asm") == 2
    assert all(re.search(r"\tadd\.s64[^\n]*\n$", text) for text in after.split("\t// begin inline asm")[:-1])
    assert after.index("%tessera_place<1>") < after.index("%tessera_place0") < after.index("add.s64")


def test_a_place_that_another_block_takes_stays_where_it_is():
    before = kernel()
    begin = before.index("\t// begin inline asm")
    loop = before[:begin] + "$L__BB0_7:\n" + before[begin:]
    after = operand_places.added(loop)
    assert places(after, 0x1C160) == places(loop, 0x1C160)
    assert after.rindex("add.s64") < after.index("$L__BB0_7:")


@pytest.mark.parametrize(
    ("change", "sums"),
    [
        ({"second": "add.s32 \t%r5, %r4, 4294967290;"}, 1),  # a carry out of 32 bits
        ({"second": "or.b32 \t%r5, %r4, 1030;"}, 1),  # an or that is no sum
        ({"second": "mul.lo.s32 \t%r5, %r4, 2;"}, 1),
        ({"second": "add.s32 \t%r5, %r4, 2;\n\tadd.s32 \t%r5, %r4, 4;"}, 1),  # two writers
        ({"second": "@%p1 add.s32 \t%r5, %r4, 2;"}, 1),
        ({"first": "mov.b32 \t%r4, %r3;"}, 0),  # of 32 bits
        ({"upper": UPPER + 65536}, 0),  # Triton 3.6
    ],
    ids=["carry", "or", "product", "written twice", "guarded", "no field", "lower half"],
)
def test_what_is_no_such_sum_stays(change, sums):
    before = kernel(**change)
    after = operand_places.added(before)
    assert after.count("add.s64") == sums
    assert after.count("or.b64") == 2 - sums
    assert sums or after == before


def test_other_text_comes_back_as_it_is():
    text = "\tadd.s32 \t%r1, %r2, 3;\n"
    assert operand_places.added(text) is text


def test_the_pass_is_part_of_the_key():
    assert Path(operand_places.__file__) in toolchain.source_files("tessera.backends.hopper.forward")
