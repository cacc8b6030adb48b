"""Machine code as the gate reads it: instructions, the control-flow graph, and the loops that hold tensor-core work.

The listing is nvdisasm's. Loops are natural loops (a jump back to a block that dominates it), not ranges of addresses:
ptxas moves slow paths, such as a barrier's retry, behind the end of a kernel, and such a detour is no loop around
everything between.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tessera.jit.toolchain import tool_path

WARPGROUP = ("HGMMA", "QGMMA")
TENSOR_CORE = (*WARPGROUP, "HMMA")
SPILLS = ("LDL", "STL")

_TWIN = 1.05
"""How much longer a twin may be. Seen: 421 and 429 instructions for twins, 475 for the shortest loop that masks as well."""

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*)([^;]*?);")
_TARGET = re.compile(r"\.L_x_\d+")


@dataclass(frozen=True)
class Instruction:
    """`opcode` without its suffixes, `targets` the labels it names, `conditional` whether it runs under a predicate."""

    opcode: str
    text: str
    targets: tuple[str, ...]
    conditional: bool


@dataclass(frozen=True)
class Block:
    """A straight run of instructions, and the blocks that may follow it."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """A natural loop: the instructions of its body, counted by opcode."""

    header: int
    blocks: frozenset[int]
    counts: Counter[str]

    @property
    def instructions(self) -> int:
        return sum(self.counts.values())

    @property
    def tensor_core(self) -> int:
        return sum(self.counts[opcode] for opcode in TENSOR_CORE)

    @property
    def spills(self) -> int:
        return sum(self.counts[opcode] for opcode in SPILLS)


@dataclass(frozen=True)
class Code:
    """A kernel's machine code."""

    blocks: tuple[Block, ...]
    counts: Counter[str]

    def tensor_core_loops(self) -> tuple[Loop, ...]:
        """The innermost loops with tensor-core instructions, the one with the most of them first (of equals, the shortest)."""
        loops = [loop for loop in _natural_loops(self.blocks) if loop.tensor_core]
        innermost = [loop for loop in loops if not any(other.blocks < loop.blocks for other in loops)]
        return tuple(sorted(innermost, key=lambda loop: (-loop.tensor_core, loop.instructions)))

    def main_loops(self) -> tuple[Loop, ...]:
        """Of the tensor-core loops those that run all the time: for each kind of work the shortest, and its twins.

        Warpgroups that do the same work have loops of the same length, give or take an instruction or two. The loop for a
        tile's edge does the same products and masks as well, a sixth longer at least, and runs for a block or two a tile.
        """
        loops = self.tensor_core_loops()
        shortest = {loop.tensor_core: loop.instructions for loop in reversed(loops)}
        return tuple(loop for loop in loops if loop.instructions <= _TWIN * shortest[loop.tensor_core])


def disassemble(cubin: bytes) -> str:
    """nvdisasm's listing of a cubin, with the tool that Triton ships. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory(prefix="tessera-") as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run(
            [str(tool_path("nvdisasm")), "-c", str(path)], capture_output=True, text=True, check=True
        ).stdout  # fmt: skip


def parse(listing: str) -> Code:
    """The code of a listing that holds one kernel."""
    starts: dict[str, int] = {}
    runs: list[list[Instruction]] = [[]]
    for line in listing.splitlines():
        label = _LABEL.match(line)
        if label:
            if runs[-1]:
                runs.append([])
            starts[label.group(1)] = len(runs) - 1
            continue
        found = _INSTRUCTION.match(line)
        if found:
            predicate, opcode, rest = found.groups()
            targets = tuple(_TARGET.findall(rest))
            runs[-1].append(Instruction(opcode, (opcode + rest).strip(), targets, predicate is not None))
            if targets or opcode in ("EXIT", "RET", "BSYNC", "BRA"):
                runs.append([])
    blocks = tuple(Block(tuple(run), _successors(index, run, starts, len(runs))) for index, run in enumerate(runs))
    return Code(blocks, Counter(one.opcode for run in runs for one in run))


def _successors(index: int, run: list[Instruction], starts: dict[str, int], count: int) -> tuple[int, ...]:
    """Where control may go after a run. BSYNC goes where its BSSY said, which the layout puts next."""
    following = (index + 1,) if index + 1 < count else ()
    if not run:
        return following
    last = run[-1]
    jumps = tuple(starts[target] for target in last.targets if target in starts)
    if last.opcode == "BSSY":  # names the point of reconvergence, does not jump
        return following
    ends = last.opcode in ("EXIT", "RET", "BRA", "BRX", "JMP") and not last.conditional
    return jumps if ends else tuple(dict.fromkeys(jumps + following))


def _natural_loops(blocks: tuple[Block, ...]) -> Iterator[Loop]:
    predecessors: list[list[int]] = [[] for _ in blocks]
    for index, block in enumerate(blocks):
        for successor in block.successors:
            predecessors[successor].append(index)
    dominators = _dominators(blocks, predecessors)
    bodies: dict[int, set[int]] = {}
    for index, block in enumerate(blocks):
        for header in block.successors:
            if header in dominators[index]:
                body = bodies.setdefault(header, {header})
                waiting = [index]
                while waiting:
                    member = waiting.pop()
                    if member not in body:
                        body.add(member)
                        waiting += predecessors[member]
    for header, body in bodies.items():
        counts = Counter(one.opcode for member in body for one in blocks[member].instructions)
        yield Loop(header, frozenset(body), counts)


def _dominators(blocks: tuple[Block, ...], predecessors: list[list[int]]) -> list[set[int]]:
    """For each block, the blocks on every path to it from the entry; empty for blocks that are never reached."""
    order, seen = [0], {0}
    for member in order:  # grows while it is walked: breadth first
        for successor in blocks[member].successors:
            if successor not in seen:
                seen.add(successor)
                order.append(successor)
    dominators: list[set[int]] = [set(order) if index in seen else set() for index in range(len(blocks))]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for member in order[1:]:
            incoming = [dominators[before] for before in predecessors[member] if before in seen]
            found = set.intersection(*incoming) | {member}
            if found != dominators[member]:
                dominators[member], changed = found, True
    return dominators
