"""One text for several partitions of warps, in PTX, where Gluon writes each its own.

Consumers that differ in their number alone would be the same instructions two or three times over: ptxas works two or three times
as long, and what every one of them runs once a tile pushes the others' loops out of the instruction cache. So a kernel gives the
text to its first worker partition, between two marks (`compat.begin_shared_text`, which is also the warpgroup's number, and
`compat.end_shared_text`), and lets the default partition, or more workers, be `compat.share_text`. What the pass makes of that:

    share_text    jumps to the text, and works out anew what follows from its thread's number when it is back
    the text      begins with the warpgroup's number. What Triton has worked out of a thread's number as the kernel begins, and
                  of arguments before the workers wait for work, is worked out anew, as if all were the owner's threads; in one
                  place, so that ptxas knows it for what it is, and reads arguments where they are used. Its warps meet by the
                  hardware's barrier 2 + number (2 is what Triton gives the first worker partition, and the next ones are free:
                  the others share the text or are one warp)
    its end       sends each warpgroup back to where it shared

All of these partitions have 128 threads, and as many registers as the owner or more: the default one has what the others leave,
and with less its warps would run code for registers that they do not have. The text may use no register that another way into it
does not set, but for addresses of shared memory. The pass looks for both, and raises MarkError.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tessera.jit.ptx import MarkError

BEGIN, SHARE, END = "// tessera shared text begins", "// tessera shares the text", "// tessera shared text ends"
NUMBER = "%tessera_number"
"""The register with the warpgroup's number."""

_TEXT, _LEAVES, _BARRIER = "$L__tessera_text", "%tessera_leaves", "%tessera_barrier"
_LINES = r"(?:\s*\.loc[^\n]*)*\s*"  # Triton 3.8 on: each line of an asm has its .loc
_REST = rf"\n{_LINES}mov\.u32 %r\d+, (?:0|{NUMBER});{_LINES}// end inline asm\n"
_THREAD = re.compile(r"\n\tmov\.u32 \t(?P<thread>%r\d+), %tid\.x;\n(?P<derived>(?:\t(?!@)[^\n]*\n)*)(?=\t@)")
_LABEL = re.compile(r"^(\$L__BB\w+):[^\n]*\n", re.MULTILINE)
_JUMP = re.compile(r"^\t(?P<when>@!?%p\d+ )?bra(?:\.uni)? \t(?P<to>\$L__BB\w+);", re.MULTILINE)
_TABLE = re.compile(r"\.branchtargets\s+([^;]*);")
_STRAIGHT = re.compile(r"(?:\t(?!setmaxnreg|bar|bra|@)[^\n]*\n| +//[^\n]*\n)*")
_STARTED = re.compile(r"\tsetmaxnreg\.\w+\.sync\.aligned\.u32 \t(?P<registers>\d+);\n\tbarrier\.sync \t1;\n")
_MEETING = re.compile(r"bar\.sync \t\d+, 128;")
_REGISTER = re.compile(r"%(?:p|r|rs|rd|f|fd|b|h)\d+\b")
_ADDRESS = re.compile(r"^\tmov\.[bu]\d+ \t(%\w+), global_smem;\n", re.MULTILINE)
_NUMBERED = (
    f"{_TEXT}:\n\tmov.u32 \t{NUMBER}, %tid.x;\n\tshr.u32 \t{NUMBER}, {NUMBER}, 7;\n"
    f"\tshfl.sync.idx.b32 \t{NUMBER}, {NUMBER}, 0, 31, -1;\n"
)


def merged(ptx: str) -> str:
    """The PTX with one text for the partitions that share it; other text comes back as it is. Raises MarkError."""
    begins, sharing, ends = ([*re.finditer(mark + _REST, ptx)] for mark in (BEGIN, SHARE, END))
    if not begins and not sharing and not ends:
        return ptx
    if len(begins) != 1 or len(ends) != 1 or not sharing:
        counts = f"{len(begins)} begin, {len(ends)} end, {len(sharing)} partitions share one"
        raise MarkError(f"a kernel has one shared text, one end of it, and partitions that share it; here {counts}")
    entry, table = _THREAD.search(ptx), _TABLE.search(ptx)
    if entry is None or table is None:
        raise MarkError("no thread's number where the kernel begins, or no table of partitions (there is one of four or more)")
    partitions = ["", *re.findall(r"\$L__BB\w+", table[1])]
    owner = _partition(ptx, begins[0].start(), partitions)
    start = _STARTED.search(ptx, ptx.rfind(f"\n{partitions[owner]}:", 0, begins[0].start()), begins[0].start())
    if not owner or start is None:
        raise MarkError("the shared text begins elsewhere than in a worker partition")
    common = _worked_out_by_workers(ptx, entry.end(), [*_LABEL.finditer(ptx, 0, ptx.index("brx.idx"))][-1][1])
    text = [*_blocks(ptx, start.end(), ends[0].start())]
    common += _addresses(ptx, text, ptx[: entry.end()] + common)

    thread = f"\tmov.u32 \t{entry['thread']}, %tid.x;\n"
    own = entry["thread"]
    owners = f"\tand.b32 \t{own}, {own}, 127;\n\tadd.s32 \t{own}, {own}, {128 * owner};\n"
    edits = [(start.end(), start.end(), _NUMBERED + thread + owners + entry["derived"] + common)]
    for begin, end in text:
        for meeting in _MEETING.finditer(ptx, begin, end):
            edits.append((*meeting.span(), f"add.s32 \t{_BARRIER}, {NUMBER}, 2;\n\tbar.sync \t{_BARRIER}, 128;"))
    leaving = ""
    for share in sharing:
        number = _partition(ptx, share.start(), partitions)
        begin = ptx.rfind(f"\n{partitions[number]}:", 0, share.start()) if number else 0
        _enough_registers(start, [*_STARTED.finditer(ptx, begin, share.start())][-1:], number)
        back = f"$L__tessera_back_{number}"
        edits.append((share.end(), share.end(), f"\tbra.uni \t{_TEXT};\n{back}:\n{thread}{entry['derived']}"))
        leaving += f"\tsetp.eq.u32 \t{_LEAVES}, {NUMBER}, {number};\n\t@{_LEAVES} bra.uni \t{back};\n"
    edits.append((ends[0].end(), ends[0].end(), leaving))
    for begin, end, new in sorted(edits, reverse=True):
        ptx = ptx[:begin] + new + ptx[end:]
    return ptx.replace("\n\t.reg ", f"\n\t.reg .pred \t{_LEAVES};\n\t.reg .b32 \t{NUMBER}, {_BARRIER};\n\t.reg ", 1)


def _enough_registers(owners: re.Match[str], others: list[re.Match[str]], number: int) -> None:
    """Raises MarkError where the partition of this number begins with fewer registers than the text's owner."""
    found = int(others[0]["registers"]) if others else 0
    if found < int(owners["registers"]):
        raise MarkError(
            f"warpgroup {number} has {found} registers for a text of {owners['registers']}: the default partition has what the "
            "others leave of the launch's"
        )


def _partition(ptx: str, at: int, partitions: list[str]) -> int:
    """The number of the partition that begins with the block at `at`, 0 for the default one, which no table names."""
    labels = _LABEL.findall(ptx, 0, at)
    return partitions.index(labels[-1]) if labels and labels[-1] in partitions else 0


def _worked_out_by_workers(ptx: str, at: int, loop: str) -> str:
    """What workers work out before they first wait for work: the block between the kernel's first branch, at `at`, and `loop`."""
    for jump in _JUMP.finditer(ptx, at):
        if jump["to"] == loop:
            return ""
        block = _STRAIGHT.match(ptx, ptx.index("\n", ptx.index(f"\n{jump['to']}:") + 1) + 1)
        if block and ptx.startswith((f"\tbra.uni \t{loop};", f"{loop}:"), block.end()):
            return block[0]
        if not jump["when"]:
            break
    raise MarkError("the workers' loop does not follow the kernel's first branch")


def _blocks(ptx: str, at: int, last: int) -> Iterator[tuple[int, int]]:
    """The basic blocks that can be reached from `at` without passing `last`, as begin and end."""
    labels = [*_LABEL.finditer(ptx)]
    follows = dict(zip([label[1] for label in labels], [*labels[1:], None], strict=True))
    begins = {label[1]: label.end() for label in labels}
    after = next((label for label in labels if label.start() > at), None)
    waiting, seen = [(at, after)], set()
    while waiting:
        begin, after = waiting.pop()
        end = after.start() if after else len(ptx)
        if begin <= last < end:
            yield begin, last
            continue
        yield begin, end
        jumps = [*_JUMP.finditer(ptx, begin, end)]
        targets = [jump["to"] for jump in jumps]
        if after and not (jumps and not jumps[-1]["when"]):
            targets.append(after[1])
        for target in targets:
            if target not in seen:
                seen.add(target)
                waiting.append((begins[target], follows[target]))


def _addresses(ptx: str, text: list[tuple[int, int]], known: str) -> str:
    """What the text uses of the others and `known`, what every way into it sets, does not name: addresses of shared memory, named
    anew (Triton 3.9 names them where workers wait for work). Raises MarkError for any other register."""
    inside: set[str] = set()
    outside: set[str] = set()
    at = 0
    for begin, end in sorted(text):
        inside.update(_REGISTER.findall(ptx, begin, end))
        outside.update(_REGISTER.findall(ptx, at, begin))
        at = end
    outside.update(_REGISTER.findall(ptx, at))
    addresses = {address[1]: address[0] for address in _ADDRESS.finditer(ptx)}
    unset = sorted(inside & outside - set(_REGISTER.findall(known)))
    if others := [register for register in unset if register not in addresses]:
        raise MarkError(f"the shared text uses {', '.join(others[:5])}, which other partitions set")
    return "".join(addresses[register] for register in unset)
