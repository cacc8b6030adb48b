"""Uniform registers that a path leaves unset: products of whatever memory their descriptors happen to name.

ptxas (12.8, which Triton 3.6 brings) takes a value that two branches and the loop behind them compute for one, and may leave its
making in a single branch: the PTX is right, the kernel wrong where the other branch runs, and no tool says a word. Seen at head
dim 96, whose Q is in two parts: half a block or all of it (rows 57% off), and three consumers with two tiles of Q (an illegal
address; H200, 2026-11-22). Such values are in uniform registers mostly, few and written by plain instructions, so that machine
code tells: whether each path from the entry has set what an address or a descriptor is made of.
"""

from __future__ import annotations

import re
from functools import reduce
from operator import and_

from tessera.jit.sass import WARPGROUP, Block, Code, Instruction

_ALL = (1 << 64) - 1
_WRITTEN = re.compile(r"(\S+)\s+(?:UP\d, )?UR(\d+)\b")  # ULOP3.LUT UP0, UR35, ... makes a predicate as well
_PAIR = re.compile(r"\.(64|WIDE)\b")
_BRACKET = re.compile(r"\[[^\]]*\]")
_READ = re.compile(r"\bUR(\d+)\b")
_DESCRIPTORS = re.compile(r"gdesc\[UR(\d+)\]")
_A_IN_REGISTERS = re.compile(r"\S+\s+R\d+,\s*R\d+,\s*gdesc")


def unset(code: Code) -> tuple[str, ...]:
    """The instructions that read memory, or products' operands, where a uniform register says that a path to them has not set."""
    found = []
    for block, is_set in zip(code.blocks, _before_blocks(code.blocks), strict=True):
        for one in block.instructions:
            if _addresses(one) & ~is_set:
                found.append(one.text)
            is_set = _after(one, is_set)
    return tuple(found)


def _before_blocks(blocks: tuple[Block, ...]) -> list[int]:
    """For each block the uniform registers that every path from the entry to it has set, as bits."""
    predecessors: list[list[int]] = [[] for _ in blocks]
    for index, block in enumerate(blocks):
        for successor in block.successors:
            predecessors[successor].append(index)
    before = [0, *(_ALL for _ in blocks[1:])]
    after = [
        reduce(lambda bits, one: _after(one, bits), block.instructions, bits) for block, bits in zip(blocks, before, strict=True)
    ]
    changed = True
    while changed:
        changed = False
        for index in range(1, len(blocks)):
            found = reduce(and_, (after[other] for other in predecessors[index]), _ALL)
            if found != before[index]:
                before[index], changed = found, True
                after[index] = reduce(lambda bits, one: _after(one, bits), blocks[index].instructions, found)
    return before


def _after(one: Instruction, is_set: int) -> int:
    """What is set after an instruction: its first operand, and the next register where it is a pair; not so from what is not set
    itself (copies of nothing are harmless until an address is made of them)."""
    target = _WRITTEN.match(one.text)
    if target is None:
        return is_set
    written = (3 if _PAIR.search(target[1]) else 1) << int(target[2])
    sources = reduce(lambda bits, number: bits | 1 << int(number), _READ.findall(one.text, target.end()), 0)
    if not sources & ~is_set:
        return is_set | written
    return is_set if one.conditional else is_set & ~written


def _addresses(one: Instruction) -> int:
    """The uniform registers that say where an instruction finds its operands. Of a product all that its descriptors are: a pair
    for A, idle where A is in registers, and a pair for B."""
    found = _DESCRIPTORS.search(one.text) if one.opcode in WARPGROUP else None
    if found:
        return (0b1100 if _A_IN_REGISTERS.match(one.text) else 0b1111) << int(found[1])
    numbers = (number for bracket in _BRACKET.findall(one.text) for number in _READ.findall(bracket))
    return reduce(lambda bits, number: bits | 1 << int(number), numbers, 0)
