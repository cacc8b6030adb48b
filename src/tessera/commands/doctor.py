"""`tessera doctor`: what is installed here, and which backends work on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import typer

from tessera import dispatch, jit, verify
from tessera.bench import machine
from tessera.cases import Case
from tessera.commands import screen
from tessera.device import Device
from tessera.operands import bind

_PROBE = Case("probe", batch=1, seqlen_q=256, seqlen_k=256, heads_q=4, heads_kv=2, head_dim=64, causal=True)
"""What every backend is asked: causal, grouped queries, d 64; bfloat16 on a GPU, float32 on a CPU."""


@dataclass(frozen=True)
class Finding:
    """One backend on one device: why it can't run there, or how the probe's result compared with the oracle's."""

    backend: str
    device: str
    works: bool
    detail: str


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Say what is installed here, and which backends work, and why the others do not.

    Each backend that can run here computes a small problem, which is compared with the float64 oracle. The exit code is 0
    when at least one backend gave the right answer.

    Example:  tessera doctor --json | jq .backends
    """
    here = machine.describe()
    findings = examine()
    cache = jit.cache_info()
    ok = any(finding.works for finding in findings)
    if as_json:
        backends = [asdict(finding) for finding in findings]
        screen.print_json({"ok": ok, "machine": asdict(here), "cache": asdict(cache), "backends": backends})
    else:
        _show(here, findings, str(cache))
    raise typer.Exit(0 if ok else 1)


def examine() -> list[Finding]:
    """Every backend on every device of this machine: the CPU first, then the GPUs."""
    names = ["cpu"] + ([f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [])
    return [_probe(backend, name) for name in names for backend in dispatch.BACKENDS]


def _probe(backend: str, device: str) -> Finding:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        problem, _ = bind(_PROBE.request(device, dtype))
        reasons = dispatch.load(backend).why_not(problem, Device.of(torch.device(device)))
        if reasons:
            return Finding(backend, device, False, "; ".join(str(reason) for reason in reasons))
        plan = dispatch.select(problem, Device.of(torch.device(device)), backend)
        comparisons = verify.run(_PROBE.request(device, dtype)._replace(backend=backend))
    except Exception as failure:  # whatever a broken installation raises is what this command is there to show
        return Finding(backend, device, False, f"{type(failure).__name__}: {failure}")
    worst = max(comparisons, key=lambda c: c.error / c.allowed)
    right = all(comparison.ok for comparison in comparisons)
    verdict = f"{plan.forward.kernel}, error {worst.error:.1e} of {worst.allowed:.1e} allowed"
    return Finding(backend, device, right, verdict if right else f"WRONG: {verdict}")


def _show(here: machine.Machine, findings: list[Finding], cache: str) -> None:
    console = screen.console()
    facts = screen.table("", "")
    facts.show_header = False
    for label, value in _facts(here, cache):
        facts.add_row(f"[key]{label}[/]", screen.escape(value))
    console.print(facts)
    backends = screen.table("backend", "device", "", "")
    for finding in findings:
        mark = "[good]works[/]" if finding.works else "[dim]no[/]"
        if finding.detail.startswith("WRONG"):
            mark = "[bad]wrong[/]"
        backends.add_row(f"[bold]{finding.backend}[/]", finding.device, mark, screen.escape(finding.detail))
    console.print(backends)
    if any(finding.works for finding in findings):
        console.print("[good]All is well:[/] attention runs here, and a probe agrees with the float64 oracle.\n")
    else:
        console.print("[bad]No backend works here:[/] the reasons stand above.\n")


def _facts(here: machine.Machine, cache: str) -> list[tuple[str, str]]:
    """What a bug report needs, as (label, value) in the order of print."""
    cpu, versions = here.cpu, dict(here.versions)
    own = ("tessera", "python", "torch", "triton", "cuda", "cudnn", "driver")
    rows = [(name, versions.pop(name, "not installed" if name in ("triton", "cuda") else "")) for name in own]
    rows = [(name, value) for name, value in rows if value]
    rows.append(("others", ", ".join(f"{name} {version}" for name, version in versions.items()) or "none"))
    rows.append(("system", here.system))
    kernels = f"{cpu.isa} kernels, {cpu.blas}"
    rows.append(("CPU", f"{cpu.name}; {cpu.cores} cores, {cpu.threads} threads; {kernels}; {screen.size(cpu.memory_bytes)}"))
    for gpu in here.gpus:
        size = screen.size(gpu.memory_bytes)
        rows.append((f"GPU {gpu.index}", f"{gpu.name}; compute capability {gpu.capability}; {gpu.multiprocessors} SMs; {size}"))
    if not here.gpus:
        rows.append(("GPU", "none that torch can use"))
    rows.append(("kernel cache", cache))
    return rows
