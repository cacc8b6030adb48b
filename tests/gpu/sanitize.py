"""compute-sanitizer over small cases of every forward variant: python tests/gpu/sanitize.py [memcheck racecheck ...]

Prints each tool's verdict and ends with 1 if one of them found something. Not a pytest: a run takes a minute or two.
"""

from __future__ import annotations

import subprocess
import sys

TOOLS = ("memcheck", "racecheck")
EXPLAINED = {
    "gl.warp_specialize([": "Triton's own words to its partitions, between two `barrier.sync` of the block",
    "num_warps": "",
    ".store(place + number)": "the tile's number: written and read between the waits and arrives of an mbarrier pair",
    ".load(gl.BlockedLayout([1], [32], [4], [0]))": "the same",
}
"""Source lines that racecheck names, which knows neither of these ways to order accesses; any other line is a finding."""
NAMES = (
    "causal", "off the tile", "more queries, causal", "gqa", "d8", "d72", "d96", "d128", "d192", "d256", "d192 v128", "window",
    "padding", "padding left", "documents", "softcap", "sinks, window", "varlen", "varlen, used", "varlen, empty sequences",
)  # fmt: skip


def run_cases() -> None:
    """In the child: each case once, then one with more tiles than multiprocessors."""
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


def main() -> int:
    if sys.argv[1:] == ["--child"]:
        run_cases()
        return 0
    failed = False
    for tool in sys.argv[1:] or TOOLS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--child"]
        done = subprocess.run(command, capture_output=True, text=True)
        failed |= done.returncode != 0
        print(f"{tool}: {'clean' if done.returncode == 0 else 'FAILED'}\n" + "\n".join(done.stdout.splitlines()[-4:]))
        if done.returncode:
            print(done.stdout[-3000:], done.stderr[-1000:])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
