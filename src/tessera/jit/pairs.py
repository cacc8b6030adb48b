"""Halves that always go together: one register of 32 bits for two of 16.

P goes from one turn of a forward's loop to the next as 16-bit numbers, two and two of them made by one conversion and taken by
one product. LLVM carries them apart, and puts them together again in front of the products:

    mov.b32 {%rs3, %rs4}, %r961;  ...  mov.b32 %r794, {%rs3, %rs4};

ptxas may keep them beside the registers that the products want, and copies them there in each turn: up to 30 instructions
between S and P V in the forward's windows. Two halves that are nowhere apart are one register here, in kernels that ask for it
(KernelSpec.joins_halves; elsewhere it was measured not to pay: benchmarks/LOG.md, tenth session). PTX without such ones comes
back as it is.

Where a turn makes its P while the product of the last one's is still at work, ptxas then writes to that product's registers and
lets all products wait for each other, and says so: there the halves stay apart.
"""

from __future__ import annotations

import re
from collections import Counter

_PARTED = re.compile(r"^\tmov\.b32 \t\{(%rs\d+), (%rs\d+)\}, (%r\d+);", re.MULTILINE)
_JOINED = re.compile(r"^\tmov\.b32 \t(%r\d+), \{(%rs\d+), (%rs\d+)\};", re.MULTILINE)
_HALF = re.compile(r"%rs\d+\b")
_DECLARATION = re.compile(r"^\t\.reg \.b32 [^\n]*\n", re.MULTILINE)
_SERIALISED = "(C7513)"
"""ptxas: an instruction makes a product's operand between its beginning and its end."""


def are_in_the_way(messages: str) -> bool:
    """Whether ptxas says of PTX with joined halves that its products wait for each other."""
    return _SERIALISED in messages


def joined(ptx: str) -> str:
    """The PTX with a register for each two halves that are made together and taken together wherever they are."""
    made = [(low, high) for low, high, _ in _PARTED.findall(ptx)]
    taken = [(low, high) for _, low, high in _JOINED.findall(ptx)]
    seen, together = Counter(_HALF.findall(ptx)), Counter(half for pair in (*made, *taken) for half in pair)
    pairs = dict.fromkeys((*made, *taken))
    partners = Counter(half for pair in pairs for half in pair)
    whole = [pair for pair in pairs if all(partners[half] == 1 and seen[half] == together[half] for half in pair)]
    if not whole:
        return ptx
    names = {pair: f"%tessera_pair{number}" for number, pair in enumerate(whole)}

    def parted(found: re.Match[str]) -> str:
        name = names.get((found[1], found[2]))
        return found[0] if name is None else f"\tmov.b32 \t{name}, {found[3]};"

    def put_together(found: re.Match[str]) -> str:
        name = names.get((found[2], found[3]))
        return found[0] if name is None else f"\tmov.b32 \t{found[1]}, {name};"

    ptx = _JOINED.sub(put_together, _PARTED.sub(parted, ptx))
    declared = f"\t.reg .b32 \t%tessera_pair<{len(whole)}>;\n"
    return _DECLARATION.sub(lambda found: found[0] + declared, ptx, count=1)
