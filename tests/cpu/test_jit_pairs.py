"""Halves that always go together become one register, and no others do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tessera.jit import pairs, toolchain


def kernel(inside: str = "", behind: str = "") -> str:
    """Two numbers carried through a loop as halves, as LLVM carries them."""
    return f"""
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<9>;
	mov.b32 	{{%rs1, %rs2}}, %r1;
	mov.b32 	{{%rs3, %rs4}}, %r2;
$L__BB0_1:
	mov.b32 	%r3, {{%rs1, %rs2}};
	mov.b32 	%r4, {{%rs3, %rs4}};
{inside}	add.s32 	%r5, %r3, 1;
	xor.b32 	%r6, %r4, 77;
	mov.b32 	{{%rs1, %rs2}}, %r5;
	mov.b32 	{{%rs3, %rs4}}, %r6;
	bra.uni 	$L__BB0_1;
{behind}"""


def carried(ptx: str, turns: int = 3) -> list[tuple[int, int]]:
    """What a kernel has in %r3 and %r4 in each turn."""
    values = {"%r1": 0x12345678, "%r2": 0xFEDCBA98}
    lines, found, place = ptx.splitlines(), [], 0
    while len(found) < turns:
        words = re.findall(r"[%\w.$]+", lines[place])
        place += 1
        if not words or words[0] == ".reg" or words[0].startswith("$"):
            continue
        opcode, *registers = words
        if opcode == "mov.b32" and len(registers) == 3 and "{" in lines[place - 1].partition(",")[0]:
            low, high, whole = registers
            values[low], values[high] = values[whole] & 0xFFFF, values[whole] >> 16
        elif opcode == "mov.b32" and len(registers) == 3:
            whole, low, high = registers
            values[whole] = values[high] << 16 | values[low]
        elif opcode == "mov.b32":
            values[registers[0]] = values[registers[1]]
        elif opcode == "add.s32":
            values[registers[0]] = values[registers[1]] + int(registers[2])
        elif opcode == "xor.b32":
            values[registers[0]] = values[registers[1]] ^ int(registers[2])
            found.append((values["%r3"], values["%r4"]))
        elif opcode == "bra.uni":
            place = lines.index("$L__BB0_1:")
    return found


def test_two_halves_are_one_register() -> None:
    before = kernel()
    after = pairs.joined(before)
    assert carried(after) == carried(before)
    assert not re.search(r"%rs[1-9]\b", after)
    assert after.index("%tessera_pair<2>") < after.index("%tessera_pair0")


@pytest.mark.parametrize(
    "change",
    [
        {"inside": "\tadd.s16 \t%rs1, %rs1, 1;\n"},  # a half is used by itself
        {"behind": "\tst.shared.b16 \t[%r9], %rs2;\n"},
        {"behind": "\tmov.b32 \t%r7, {%rs2, %rs1};\n"},  # the other way round
        {"behind": "\tmov.b32 \t%r7, {%rs1, %rs1};\n"},
        {"inside": "\t@%p1 mov.b32 \t{%rs1, %rs2}, %r8;\n"},  # guarded
    ],
    ids=["alone", "stored", "turned", "twice", "guarded"],
)
def test_halves_that_are_apart_somewhere_stay(change: dict[str, str]) -> None:
    before = kernel(**change)
    after = pairs.joined(before)
    assert after.count("{%rs1, %rs2}") == before.count("{%rs1, %rs2}")
    assert "%rs3" not in after
    assert next(iter(change.values())) in after


def test_other_text_comes_back_as_it_is() -> None:
    text = "\tadd.s32 \t%r1, %r2, 3;\n"
    assert pairs.joined(text) is text


def test_what_ptxas_says_of_products_that_wait() -> None:
    said = "ptxas info    : (C7513) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma ..."
    assert pairs.are_in_the_way(said)
    assert not pairs.are_in_the_way("ptxas info    : Used 168 registers, used 16 barriers")


def test_the_pass_is_part_of_the_key() -> None:
    assert Path(pairs.__file__) in toolchain.source_files("tessera.backends.hopper.forward")
