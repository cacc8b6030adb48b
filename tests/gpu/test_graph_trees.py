"""torch.compile's own CUDA graphs (mode="reduce-overhead") over a process's first calls: what those keep is not the graphs'."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

BEGIN = """
import torch, tessera
def random(*shape): return torch.randn(shape, device="cuda", dtype=torch.bfloat16)
lengths = torch.tensor([300, 77], dtype=torch.int32, device="cuda")
caches = random(2, 512, 2, 64), random(2, 512, 2, 64)
weight = random(128, 384).requires_grad_()
"""
CALLS = {
    "attention": "def call(x): return tessera.attention(x, x, x, causal=True) * 2",
    "decoding": """
def call(x): return tessera.attention_with_kvcache(x[:, :1] * 1, *caches, cache_seqlens=lengths, causal=True) * 2""",
    "training": """
def call(x):
    q, k, v = (x.flatten(2)[..., :128] @ weight).unflatten(-1, (3, 2, 64)).unbind(2)
    return tessera.attention(q, k, v, causal=True).float().square().mean()""",
}
END = """
def result(call, x):
    out = call(x)
    return torch.autograd.grad(out, weight)[0] if out.requires_grad else out
fast = torch.compile(call, mode="reduce-overhead")
for _ in range(4):
    torch.compiler.cudagraph_mark_step_begin()
    x = random(2, 200, 4, 64)
    found, right = result(fast, x).clone(), result(call, x)
    assert (found - right).float().norm() <= 0.01 * right.float().norm()
"""


@pytest.mark.parametrize("name", CALLS)
def test_a_first_call(name: str) -> None:
    recorded = "" if name == "training" else "torch.set_grad_enabled(False)\n"
    program = BEGIN + recorded + CALLS[name] + END
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
