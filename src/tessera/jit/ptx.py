"""What Triton can't say, said in PTX: a pass over its output, before ptxas.

A kernel marks a stretch of its code (`compat.tma_load_as`, `compat.init_for_cluster`): a comment before it and one behind it,
which Triton carries to its PTX as inline assembly. Here each mark's instructions get what it asks for:

    evict_first, evict_last     TMA loads, a policy for L2
    multicast MASK              TMA loads, to the same place in each block of the cluster whose bit is set in the mask; the bytes
                                complete each one's own mbarrier
    only L2                     TMA loads: into L2 and no further; no mbarrier hears of it
    address                     an mbarrier's initialisation; the number behind the stretch becomes the mbarrier's address

Where a kernel's default warps meet those of the cluster's other blocks (`compat.meet_cluster`), all other warps arrive as the
kernel begins: the hardware's barrier of a cluster waits for every thread, and Triton's worker warps, some of which never get
any work, can't be told to.

What Triton writes for debuggers goes, but for the places in the source (`.loc`), which profilers show: its labels cut basic
blocks in two, so that ptxas would make other code of a kernel with places than of one without (tessera.jit.haste).

Sources: PTX ISA 8.7, cp.async.bulk.tensor, cp.async.bulk.prefetch.tensor, mbarrier, barrier.cluster, createpolicy.
"""

from __future__ import annotations

import re

BEGIN, END = "// tessera:", "// tessera end"
"""What a mark's comments begin with; words for the pass follow the first."""

MEETING = "// tessera meets its cluster"
"""The comment of that meeting."""

POLICIES = {"evict_first": 0x12F0000000000000, "evict_last": 0x14F0000000000000}
"""What createpolicy.fractional gives for all of the bytes: ptxas folds it to these."""

_FOR_DEBUGGERS = re.compile(
    r"^\$L__(?:tmp|func_begin|func_end)\d+:[^\n]*\n|^\s*\.section\s+\.debug_(?!str).*?\}\n", re.MULTILINE | re.DOTALL
)
"""Not the strings, which places name from Triton 3.8 on."""
_NUMBER = r"(?P<number>\s*(?:\.loc[^\n]*\s*)?mov\.u32 (?P<result>%r\d+), 0;)"  # 3.8 on: each line of an asm has its .loc
_STRETCH = re.compile(rf"{BEGIN} (?P<words>[^\n]*)\n(?P<code>.*?)(?:{END}{_NUMBER}|(?={BEGIN})|\Z)", re.DOTALL)
_LABEL = re.compile(r"^\$L__BB\w+:", re.MULTILINE)
_LOAD = re.compile(
    r"(?P<when>@!?%p\d+\s+)?cp\.async\.bulk\.tensor\.(?P<rank>\dd)\.shared::(?P<space>cta|cluster)\.global"
    r"\.mbarrier::complete_tx::bytes (?P<operands>\[[^;{]*\], (?P<box>\[[^;{]*\{[^}]*\}\]), \[%r\d+\]);"
)
_START = re.compile(r"mbarrier\.init\.shared::cta\.b64 \[(?P<bar>%r\d+|global_smem)(?P<offset>\+\d+)?\], \d+;")
_FIRST_BLOCK = "// %bb.0:\n"
_ARRIVAL_OF_OTHERS = (
    "\t{{ .reg .pred other; .reg .u32 thread; mov.u32 thread, %tid.x; setp.ge.u32 other, thread, {threads}; "
    "@other barrier.cluster.arrive.release; }}\n"
)


class MarkError(RuntimeError):
    """A kernel's mark does not stand around what it is for."""


def rewritten(ptx: str, threads: int) -> str:
    """The PTX with every mark's wish granted, and without debuggers' labels; other text comes back as it is. `threads`: of the
    default warps, the first ones. Raises MarkError."""
    if ptx.count(BEGIN) != ptx.count(END):
        raise MarkError(f"{ptx.count(BEGIN)} marks begin and {ptx.count(END)} end; each needs both (compat.tma_load_as)")
    return _with_meeting(_STRETCH.sub(_granted, _FOR_DEBUGGERS.sub("", ptx)), threads)


def _with_meeting(ptx: str, threads: int) -> str:
    """The PTX with the other warps' arrival, where a cluster meets."""
    count = ptx.count(MEETING)
    if not count:
        return ptx
    if count > 1 or ptx.count(_FIRST_BLOCK) != 1:
        functions = ptx.count(_FIRST_BLOCK)
        raise MarkError(f"{count} meetings of the cluster in {functions} functions; a kernel meets it once (compat.meet_cluster)")
    return ptx.replace(_FIRST_BLOCK, _FIRST_BLOCK + _ARRIVAL_OF_OTHERS.format(threads=threads))


def _granted(stretch: re.Match[str]) -> str:
    words, code = stretch["words"].strip(), stretch["code"]
    if END not in stretch[0] or _LABEL.search(code):
        raise MarkError(f"the mark '{words}' ends in another basic block than it begins, or another mark begins inside it")
    kind, _, mask = words.rpartition(" ")
    number = stretch["number"]
    if words in POLICIES:
        changed, count = _LOAD.subn(lambda load: _load(load, "", "", POLICIES[words]), code)
    elif kind == "multicast" and mask.isdigit():
        changed, count = _LOAD.subn(lambda load: _load(load, ".multicast::cluster", f", {mask}", None), code)
    elif words == "only L2":
        changed, count = _LOAD.subn(_prefetch, code)
    elif words == "address":
        found = _START.findall(code)
        changed, count = code, len(found) == 1
        number = f"\n\tadd.u32 {stretch['result']}, {found[0][0]}, {found[0][1] or 0};" if found else ""
    else:
        known = ", ".join((*POLICIES, "multicast MASK", "only L2", "address"))
        raise MarkError(f"no such mark: '{words}'; there are {known}")
    if not count:
        raise MarkError(f"the mark '{words}' stands around no instruction that it could change, but around\n{code}")
    return changed + number


def _prefetch(load: re.Match[str]) -> str:
    return f"{load['when'] or ''}cp.async.bulk.prefetch.tensor.{load['rank']}.L2.global.tile {load['box']};"


def _load(load: re.Match[str], cast: str, mask: str, policy: int | None) -> str:
    space = "cluster" if cast else load["space"]
    hint, last = ("", "") if policy is None else (".L2::cache_hint", f", {policy:#x}")
    return (
        f"{load['when'] or ''}cp.async.bulk.tensor.{load['rank']}.shared::{space}.global.mbarrier::complete_tx::bytes"
        f"{cast}{hint} {load['operands']}{mask}{last};"
    )
