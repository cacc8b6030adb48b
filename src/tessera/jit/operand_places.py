"""Where products find their operands: 64-bit numbers, each by one addition.

wgmma takes an operand in shared memory by a descriptor of 64 bits: below the place of its rows, above how they lie. A product
over a tile takes some ten of them, which differ in the place alone. Triton 3.6 to 3.8 widens the first one's place and adds a
constant for each of the others, in front of the instruction that takes it. 3.9 adds in 32 bits, widens each sum and ors the upper
half to it, all in front of the first product:

    add.s32 %r5, %r4, 1030;  cvt.u64.u32 %rd7, %r5;  or.b64 %rd8, %rd7, 4611686293305294848;

ptxas makes two instructions of that, and keeps the results: the loop of head dim 128's causal backward takes 544 instructions and
spills around it where 3.6's takes 471. Said as 3.6 says it, 3.9's takes 472 (benchmarks/LOG.md). PTX without such lines comes
back as it is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_WORD = 1 << 32
_ASSIGNMENT = re.compile(
    r"^\t(?P<guard>@\S+\s+)?(?P<opcode>\w[\w.]*)\s+(?P<register>%r\d+), (?P<operands>[^;\n]*);", re.MULTILINE
)
_WIDENED = re.compile(r"^\tcvt\.u64\.u32 \t(%rd\d+), (%r\d+);", re.MULTILINE)
_PLACE = re.compile(r"^\tor\.b64 \t(?P<result>%rd\d+), (?P<wide>%rd\d+), (?P<upper>\d+);\n", re.MULTILINE)
_PRODUCT = re.compile(r"\t// begin inline asm\n(?:\t\.loc[^\n]*\n)?\twgmma\.mma_async[^\n]*\n")
_BLOCK = re.compile(r"^(?=\$L__BB|// %bb)", re.MULTILINE)
_WIDE_REGISTER = re.compile(r"%rd\d+")
_DECLARATION = re.compile(r"^\t\.reg \.b64 [^\n]*\n", re.MULTILINE)
_FIELD = re.compile(r"%r\d+, \d+, (?P<bits>\d+)")


@dataclass(frozen=True)
class _Field:
    """A register that bfe.u32 has set, and nothing else: `bits` bits wide."""

    register: str
    bits: int


def added(ptx: str) -> str:
    """The PTX with each such place as a 64-bit sum, in front of the product that takes it if that is in the same basic block."""
    if not _PLACE.search(ptx):
        return ptx
    places = _Places(ptx)
    ptx = "".join(places.of_block(block) for block in _BLOCK.split(ptx))
    return places.with_first_ones(ptx)


class _Places:
    """The rewriting of one kernel: what its registers are made of, and the fields that sums begin with so far."""

    def __init__(self, ptx: str) -> None:
        self._made: dict[str, list[re.Match[str]]] = {}
        for found in _ASSIGNMENT.finditer(ptx):
            self._made.setdefault(found["register"], []).append(found)
        widened = _WIDENED.findall(ptx)
        written = Counter(wide for wide, _ in widened)
        self._widened = {wide: low for wide, low in widened if written[wide] == 1}
        self._uses = Counter(_WIDE_REGISTER.findall(ptx))
        self._first: dict[str, str] = {}  # fields, and the 64-bit registers that hold them

    def of_block(self, block: str) -> str:
        taken = {register for product in _PRODUCT.findall(block) for register in _WIDE_REGISTER.findall(product)}
        waiting: dict[str, str] = {}

        def widened(place: re.Match[str]) -> str:
            sum_of = self._sum(place)
            if sum_of is None:
                return place[0]
            result = place["result"]
            if self._uses[result] > 2 or result not in taken:  # made and taken: twice
                return sum_of
            waiting[result] = sum_of
            return ""

        block = _PLACE.sub(widened, block)
        return _PRODUCT.sub(lambda found: "".join(_sums_of(found[0], waiting)) + found[0], block) if waiting else block

    def with_first_ones(self, ptx: str) -> str:
        """The PTX where each field is widened behind its making."""
        if not self._first:
            return ptx

        def and_wide(found: re.Match[str]) -> str:
            wide = self._first.get(found["register"])
            return found[0] if wide is None else f"{found[0]}\n\tcvt.u64.u32 \t{wide}, {found['register']};"

        declared = f"\t.reg .b64 \t%tessera_place<{len(self._first)}>;\n"
        return _DECLARATION.sub(lambda found: found[0] + declared, _ASSIGNMENT.sub(and_wide, ptx), count=1)

    def _sum(self, place: re.Match[str]) -> str | None:
        """The addition that gives a place, if 32 bits and 64 give the same."""
        upper, found = int(place["upper"]), self._field_and_rest(self._widened.get(place["wide"], ""))
        if upper % _WORD or found is None:
            return None
        field, rest = found
        wide = self._first.setdefault(field.register, f"%tessera_place{len(self._first)}")
        return f"\tadd.s64 \t{place['result']}, {wide}, {upper + rest};\n"

    def _field_and_rest(self, register: str) -> tuple[_Field, int] | None:
        """What a register is the sum of, without a carry out of its 32 bits."""
        field = self._field(register)
        if field is not None:
            return field, 0
        made = self._made.get(register, [])
        if len(made) != 1 or made[0]["guard"]:
            return None
        before, _, number = made[0]["operands"].partition(", ")
        field = self._field(before)
        if field is None or not number.isdigit():
            return None
        size, rest = 1 << field.bits, int(number)
        fits = {"add.s32": rest + size <= _WORD, "or.b32": rest % size == 0 and rest < _WORD}
        return (field, rest) if fits.get(made[0]["opcode"], False) else None

    def _field(self, register: str) -> _Field | None:
        made = self._made.get(register, [])
        if len(made) != 1 or made[0]["guard"] or made[0]["opcode"] != "bfe.u32":
            return None
        found = _FIELD.fullmatch(made[0]["operands"])
        return _Field(register, int(found["bits"])) if found else None


def _sums_of(product: str, waiting: dict[str, str]) -> Iterator[str]:
    return (waiting[register] for register in dict.fromkeys(_WIDE_REGISTER.findall(product)) if register in waiting)
