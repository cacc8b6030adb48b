"""Descriptors of wgmma's operands that a path leaves unset: products of whatever memory they happen to name.

ptxas (12.8, which Triton 3.6 brings) takes one value that two branches and the loop behind them compute for one, and may leave
its making in a single branch: the PTX is right, the kernel wrong where the other branch runs (head dim 96, half a block or all of
it, 2026-11-21: rows 57% off, no message from any tool). Descriptors lie in uniform registers, few and written by plain
instructions, so that machine code tells: along each path from the entry, what `gdesc` reads has been written.
"""

from __future__ import annotations

import re
from functools import reduce
from operator import and_

from tessera.jit.sass import WARPGROUP, Block, Code, Instruction

_ALL = (1 << 64) - 1
_WRITTEN = re.compile(r"(\S+)\s+UR(\d+)\b")
_READ = re.compile(r"gdesc\[UR(\d+)\]")
_A_IN_REGISTERS = re.compile(r"\S+\s+R\d+,\s*R\d+,\s*gdesc")


def unset(code: Code) -> tuple[str, ...]:
    """The products that read a uniform register which a path to them has not written."""
    before = _before_blocks(code.blocks)
    found = []
    for block, is_set in zip(code.blocks, before, strict=True):
        for one in block.instructions:
            if _read(one) & ~is_set:
                found.append(one.text)
            is_set |= _written(one)
    return tuple(found)


def _before_blocks(blocks: tuple[Block, ...]) -> list[int]:
    """For each block the uniform registers that every path from the entry to it has written, as bits."""
    written = [reduce(lambda bits, one: bits | _written(one), block.instructions, 0) for block in blocks]
    predecessors: list[list[int]] = [[] for _ in blocks]
    for index, block in enumerate(blocks):
        for successor in block.successors:
            predecessors[successor].append(index)
    before = [0, *(_ALL for _ in blocks[1:])]
    changed = True
    while changed:
        changed = False
        for index in range(1, len(blocks)):
            found = reduce(and_, (before[other] | written[other] for other in predecessors[index]), _ALL)
            changed |= found != before[index]
            before[index] = found
    return before


def _written(one: Instruction) -> int:
    """The uniform registers that an instruction writes: its first operand, and the next one where it is a pair."""
    found = _WRITTEN.match(one.text)
    if found is None:
        return 0
    return (3 if re.search(r"\.(64|WIDE)\b", found[1]) else 1) << int(found[2])


def _read(one: Instruction) -> int:
    """The uniform registers of a product's descriptors: a pair for A, a pair for B, of which A's is idle where A is in
    registers."""
    found = _READ.search(one.text) if one.opcode in WARPGROUP else None
    if found is None:
        return 0
    return (0b1100 if _A_IN_REGISTERS.match(one.text) else 0b1111) << int(found[1])
