"""What Triton can't say, said in PTX: a pass over its output, before ptxas.

A kernel marks a stretch of its code (`compat.tma_load_as`, `compat.arrive_at`): a comment before it and one behind it, which
Triton carries to its PTX as inline assembly. Here each mark's instructions get what it asks for:

    evict_first, evict_last     TMA loads, a policy for L2
    multicast MASK              TMA loads, to the same place in each block of the cluster whose bit is set in the mask; the bytes
                                complete each one's own mbarrier
    arrive at RANK              an mbarrier's arrival, at the same mbarrier of another block of the cluster

Sources: PTX ISA 8.7, cp.async.bulk.tensor, mbarrier.arrive, mapa, createpolicy.
"""

from __future__ import annotations

import re
from collections.abc import Callable

BEGIN, END = "// tessera:", "// tessera end"
"""What a mark's comments begin with; words for the pass follow the first."""

POLICIES = {"evict_first": 0x12F0000000000000, "evict_last": 0x14F0000000000000}
"""What createpolicy.fractional gives for all of the bytes: ptxas folds it to these."""

_STRETCH = re.compile(rf"{BEGIN} (?P<words>[^\n]*)\n(?P<code>.*?)(?:{END}|(?={BEGIN})|\Z)", re.DOTALL)
_LABEL = re.compile(r"^\$L__BB\w+:", re.MULTILINE)
_LOAD = re.compile(
    r"(?P<when>@!?%p\d+\s+)?cp\.async\.bulk\.tensor\.(?P<rank>\dd)\.shared::(?P<space>cta|cluster)\.global"
    r"\.mbarrier::complete_tx::bytes (?P<operands>\[[^;{]*\{[^}]*\}\], \[%r\d+\]);"
)
_ARRIVAL = re.compile(
    r"(?P<when>@!?%p\d+\s+)?mbarrier\.arrive\.shared(?:::cta)?\.b64 _, \[(?P<bar>%r\d+)\](?P<count>, \d+)?;"
)  # fmt: skip


class MarkError(RuntimeError):
    """A kernel's mark does not stand around what it is for."""


def rewritten(ptx: str) -> str:
    """The PTX with every mark's wish granted; text without marks comes back as it is. Raises MarkError."""
    if ptx.count(BEGIN) != ptx.count(END):
        raise MarkError(f"{ptx.count(BEGIN)} marks begin and {ptx.count(END)} end; each needs both (compat.tma_load_as)")
    return _STRETCH.sub(_granted, ptx)


def _granted(stretch: re.Match[str]) -> str:
    words, code = stretch["words"].strip(), stretch["code"]
    if not stretch[0].endswith(END) or _LABEL.search(code):
        raise MarkError(f"the mark '{words}' ends in another basic block than it begins, or another mark begins inside it")
    pattern, change = _wish(words)
    code, count = pattern.subn(change, code)
    if not count:
        raise MarkError(f"the mark '{words}' stands around no instruction that it could change, but around\n{code}")
    return code


def _wish(words: str) -> tuple[re.Pattern[str], Callable[[re.Match[str]], str]]:
    """Which instructions a mark changes, and into what."""
    if words in POLICIES:
        return _LOAD, lambda load: _load(load, "", "", POLICIES[words])
    kind, _, number = words.rpartition(" ")
    if kind == "multicast" and number.isdigit():
        return _LOAD, lambda load: _load(load, ".multicast::cluster", f", {number}", None)
    if kind == "arrive at" and number.isdigit():
        return _ARRIVAL, lambda arrival: _remote(arrival, number)
    known = ", ".join((*POLICIES, "multicast MASK", "arrive at RANK"))
    raise MarkError(f"no such mark: '{words}'; there are {known}")


def _load(load: re.Match[str], cast: str, mask: str, policy: int | None) -> str:
    space = "cluster" if cast else load["space"]
    hint, last = ("", "") if policy is None else (".L2::cache_hint", f", {policy:#x}")
    return (
        f"{load['when'] or ''}cp.async.bulk.tensor.{load['rank']}.shared::{space}.global.mbarrier::complete_tx::bytes"
        f"{cast}{hint} {load['operands']}{mask}{last};"
    )


def _remote(arrival: re.Match[str], rank: str) -> str:
    return (
        f"{{ .reg .b32 there; mapa.shared::cluster.u32 there, {arrival['bar']}, {rank}; {arrival['when'] or ''}"
        f"mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]{arrival['count'] or ''}; }}"
    )
