"""Memory is linear in the sequence length: peak resident memory of forward and backward, in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = str(Path(__file__).parents[2] / "src")

# VmHWM is the process's own high-water mark; a small call first brings in code and thread pools.
MEASURE = """
import sys, json
sys.path.insert(0, sys.argv[1])
import torch, tessera
seqlen, options = int(sys.argv[2]), json.loads(sys.argv[3])
if "window" in options:
    options["window"] = tuple(options["window"])
torch.set_num_threads(1)

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

def run(seqlen):
    q, k, v = (torch.randn(1, seqlen, 8, 64, requires_grad=True) for _ in range(3))
    start = peak()
    tessera.attention(q, k, v, **options).sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()
    return peak() - start

run(64)
print(json.dumps({"kernel": tessera.plan((1, seqlen, 8, 64), (1, seqlen, 8, 64), dtype=torch.float32, **options).forward.kernel,
                  "extra": run(seqlen)}))
"""


def extra_bytes(seqlen: int, options: dict[str, object]) -> tuple[str, int]:
    """(kernel, peak over the inputs) of forward and backward at (1, seqlen, 8, 64) in float32."""
    command = [sys.executable, "-c", MEASURE, SOURCE, str(seqlen), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=400)
    measured = json.loads(done.stdout)
    return measured["kernel"], measured["extra"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "options"),
    [("aten-flash", {"causal": True}), ("tiled", {"window": [2047, 0], "softcap": 20.0})],
    ids=["aten", "tiled"],
)
def test_16k_tokens_under_600_mb(kernel: str, options: dict[str, object]) -> None:
    """Results and gradients are 4 x 33.5 MB of it; the scores alone would be 8.6 GB. Twice the tokens, twice the memory.

    The window saves time, not memory: the tiles are as large without it.
    """
    ran, at_16k = extra_bytes(16384, options)
    assert ran == kernel
    assert at_16k < 600e6, f"{at_16k / 1e6:.0f} MB"
    _, at_8k = extra_bytes(8192, options)
    assert at_16k < 2.5 * at_8k, f"{at_8k / 1e6:.0f} MB at 8k, {at_16k / 1e6:.0f} MB at 16k"
