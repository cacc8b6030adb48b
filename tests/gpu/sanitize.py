"""compute-sanitizer over small cases of every forward variant: python tests/gpu/sanitize.py [memcheck racecheck ...]

Prints each tool's verdict and ends with 1 if one of them found something. Not a pytest: a run takes half a minute.
"""

from __future__ import annotations

import linecache
import re
import subprocess
import sys

TOOLS = ("memcheck", "racecheck")
NAMES = (
    "causal", "off the tile", "more queries, causal", "gqa", "d8", "d72", "d96", "d128", "d192", "d256", "d192 v128", "window",
    "padding", "padding left", "documents", "softcap", "sinks, window", "varlen", "varlen, used", "varlen, empty sequences",
)  # fmt: skip
EXPLAINED = (
    # Triton's own words to its partitions, written and read between two `barrier.sync` of the whole block
    "def attention_forward(",
    "if config.consumers == 2:",
    # the next tile's number, written and read between the arrives and the waits of an mbarrier pair
    "shared.tile.index(shared.tile_ring.slot(turn))",
)
"""Source lines (their beginnings) between which racecheck sees hazards because it models neither way to order accesses."""

_PLACE = re.compile(r"(Write|Read) access at \w+\+0x[0-9a-f]+ in (\S+\.py):(\d+)")


def run_cases() -> None:
    """In the child: each case once, then one with more tiles than multiprocessors, and one for three consumers."""
    import torch

    from tessera import operators
    from tessera.cases import CASES, Case

    many = Case("many tiles", head_dim=128, batch=4, seqlen_q=300, seqlen_k=300, heads_q=24, heads_kv=8, causal=True)
    long = Case("three consumers", head_dim=128, batch=1, seqlen_q=200, seqlen_k=2000, heads_q=1, heads_kv=1)
    for case in (*(CASES[name] for name in NAMES), many, long):
        with torch.no_grad():
            operators.forward(case.request("cuda", torch.bfloat16)._replace(backend="hopper"))
        torch.cuda.synchronize()
        print(case.name, flush=True)


def unexplained(report: str) -> list[str]:
    """The source lines of racecheck's report that EXPLAINED does not cover."""
    from tessera.backends import hopper

    folder = hopper.__path__[0]
    lines = {(name, int(number)) for _, name, number in _PLACE.findall(report)}
    found = []
    for name, number in sorted(lines):
        text = linecache.getline(f"{folder}/{name.rsplit('/', 1)[-1]}", number).strip()
        if not any(known in text for known in EXPLAINED):
            found.append(f"{name}:{number}: {text}")
    return found


def main() -> int:
    if sys.argv[1:] == ["--child"]:
        run_cases()
        return 0
    failed = False
    for tool in sys.argv[1:] or TOOLS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--child"]
        done = subprocess.run(command, capture_output=True, text=True)
        report = done.stdout + done.stderr
        ran = "three consumers" in done.stdout
        hazards = unexplained(report) if tool == "racecheck" and ran else []
        clean = ran and (done.returncode == 0 or (tool == "racecheck" and _PLACE.search(report) is not None and not hazards))
        failed |= not clean
        reports = f", {report.count('hazards]')} reports at lines explained above" if tool == "racecheck" else ""
        print(f"{tool}: {'clean' if clean else 'FAILED'}{reports}", *hazards, sep="\n  ")
        if not clean:
            print(report[-2000:])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
