"""What `import tessera` costs and touches, each in a fresh interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = str(Path(__file__).parents[2] / "src")
HEAVY = ("triton", "rich", "typer", "transformers", "matplotlib", "hypothesis", "pandas")


def python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    prologue = f"import sys; sys.path.insert(0, {SOURCE!r})\n"
    command = [sys.executable, *flags, "-c", prologue + code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


MEASURE = """
import torch, time
start = time.process_time()
import tessera
print(time.process_time() - start)
"""


def test_adds_less_than_100_ms_to_torch() -> None:
    """Processor time of the import after torch's: the median of five, and up to two more rounds on a busy machine."""
    medians = []
    for _ in range(3):
        medians.append(statistics.median(float(python(MEASURE).stdout) for _ in range(5)))
        if medians[-1] < 0.1:
            return
    pytest.fail(f"import tessera takes {min(medians) * 1000:.0f} ms over import torch")


def test_imports_nothing_heavy_beyond_torch() -> None:
    """Whatever torch itself brings in is torch's affair."""
    code = """
import torch
before = set(sys.modules)
import tessera
print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))
"""
    added = set(python(code).stdout.split())
    assert "tessera" in added
    assert not added & set(HEAVY), added
    assert added <= {"tessera"} | set(sys.stdlib_module_names), added


def test_importtime_is_clean() -> None:
    """The same by the interpreter's own account, torch included: nothing heavy is even tried."""
    report = python("import tessera", "-X", "importtime").stderr
    modules = {line.rsplit("|", 1)[-1].strip() for line in report.splitlines() if line.startswith("import time:")}
    assert "tessera.api" in modules
    heavy = {name for name in modules if name.split(".")[0] in set(HEAVY) - {"triton"} and not name.startswith("torch")}
    assert not heavy
    late = ("tessera.backends.", "tessera.jit", "tessera.bench", "tessera.commands", "tessera.integrations")
    assert not any(name.startswith(late) for name in modules)


def test_does_not_initialise_cuda() -> None:
    code = """
import torch
def refuse(*args, **kwargs): raise AssertionError("CUDA was touched")
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = torch.cuda.current_device = refuse
import tessera
assert not torch.cuda.is_initialized()
q = torch.randn(1, 8, 2, 16)
tessera.attention(q, q, q, causal=True)
tessera.attention(q, q, q, softcap=3.0)
print(tessera.plan((1, 8, 2, 16), (1, 8, 2, 16), device="h200").backend)
assert not torch.cuda.is_initialized()
assert "triton" not in sys.modules
"""
    assert python(code).stdout.strip() in ("hopper", "triton", "torch")


def test_works_where_triton_is_not_installed() -> None:
    code = """
sys.modules["triton"] = None
import torch, tessera, tessera.support
q = torch.randn(1, 8, 2, 16, requires_grad=True)
out, lse = tessera.attention(q, q, q, causal=True, return_lse=True)
(out.sum() + lse.sum()).backward()
print(tessera.plan(q, q, q).backend, tessera.plan((1, 8, 2, 16), (1, 8, 2, 16), device="h200").backend)
print(sum(1 for _ in tessera.support.matrix()))
"""
    assert python(code).stdout.startswith("cpu ")


def test_public_names() -> None:
    """Every public name is there, before and after the lazily imported backends have been."""
    code = """
import torch, tessera
def check():
    for name in tessera.__all__:
        assert hasattr(tessera, name), name
    assert tessera.backend_names()
    for function in (tessera.attention, tessera.attention_varlen, tessera.plan, tessera.merge, tessera.dropout_mask,
                 tessera.attention_with_kvcache, tessera.attention_cascade, tessera.plan_kvcache, tessera.debug):
        assert callable(function) and function.__doc__, function
check()
q = torch.randn(1, 8, 2, 16)
tessera.attention(q, q, q)
tessera.plan((1, 8, 2, 16), (1, 8, 2, 16), device="h200")
import tessera.plan, tessera.support, tessera.backends.cpu
check()
assert sorted(tessera.__all__) == tessera.__all__
"""
    python(code)
