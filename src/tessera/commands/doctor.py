"""`tessera doctor`: what is installed here, and which backends work on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Annotated

import torch
import typer

from tessera import dispatch, jit, verify
from tessera.bench import machine
from tessera.cases import Case
from tessera.commands import screen
from tessera.device import Device
from tessera.operands import bind
from tessera.serving import dispatch as serving
from tessera.serving.cases import CacheCase
from tessera.serving.operands import describe
from tessera.serving.verify import run as verify_step

_PROBE = Case("probe", batch=1, seqlen_q=256, seqlen_k=256, heads_q=4, heads_kv=2, head_dim=64, causal=True)
_CACHE_PROBE = CacheCase("probe", cached=(100, 37), new=1, page_size=16)
"""What every backend is asked: causal, grouped queries, d 64; a step over pages that appends. bfloat16 on a GPU, else float32."""


class State(Enum):
    """How a backend does on a device."""

    WORKS = "works"
    REFUSES = "no"
    """In words, as a backend for other devices should."""
    BROKEN = "broken"
    """It said that it could, and then failed or gave a wrong answer."""


@dataclass(frozen=True)
class Finding:
    """One backend on one device: why it can't run there, or how the probes' results compared with the oracle's."""

    backend: str
    device: str
    state: State
    detail: str

    def to_json(self) -> dict[str, object]:
        return {"backend": self.backend, "device": self.device, "works": self.state is State.WORKS, "state": self.state.value,
                "detail": self.detail}  # fmt: skip


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    clear: Annotated[bool, typer.Option("--clear-cache", help="Remove the compiled kernels on disk first.")] = False,
) -> None:
    """Say what is installed here, and which backends work, and why the others do not.

    Each backend that can run here computes two small problems, which are compared with the float64 oracle: attention, and a step
    over a KV cache. The exit code is 0 when at least one backend gave the right answers and none a wrong one.

    GPU kernels are compiled at their first use and kept on disk: in the folder that TESSERA_CACHE_DIR names (by default
    ~/.cache/tessera), or nowhere with TESSERA_CACHE=0. It may be shared by processes, and removed at any time.

    Example:  tessera doctor --json | jq .backends
    """
    removed = jit.clear_cache() if clear else None
    here = machine.describe()
    findings = examine()
    cache = jit.cache_info()
    states = {finding.state for finding in findings}
    ok = State.WORKS in states and State.BROKEN not in states
    if as_json:
        backends = [finding.to_json() for finding in findings]
        screen.print_json({"ok": ok, "machine": asdict(here), "cache": asdict(cache), "backends": backends})
    else:
        _show(here, findings, f"{cache}; " + ("empty it with --clear-cache" if removed is None else f"{removed} removed"))
    raise typer.Exit(0 if ok else 1)


def examine() -> list[Finding]:
    """Every backend on every device of this machine: the CPU first, then the GPUs."""
    names = ["cpu"] + ([f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [])
    return [_probe(backend, name) for name in names for backend in dispatch.BACKENDS]


def _probe(backend: str, device: str) -> Finding:
    dtype, described = torch.float32 if device == "cpu" else torch.bfloat16, Device.of(torch.device(device))
    try:
        problem, _ = bind(_PROBE.request(device, dtype))
        reasons = dispatch.load(backend).why_not(problem, described)
        if reasons:
            return Finding(backend, device, State.REFUSES, "; ".join(str(reason) for reason in reasons))
        plan = dispatch.select(problem, described, backend)
        compared = {plan.forward.kernel: verify.run(_PROBE.request(device, dtype)._replace(backend=backend))}
        step = _CACHE_PROBE.request(device, dtype)._replace(backend=backend)
        kernel = serving.select(describe(step), described, backend).choice.kernel
        compared[f"{kernel} over a cache"] = verify_step(step)
    except Exception as failure:  # whatever a broken installation raises is what this command is there to show
        return Finding(backend, device, State.BROKEN, f"{type(failure).__name__}: {failure}")
    detail = "; ".join(f"{kernel}, error {all_of[0].error:.1e} of {all_of[0].allowed:.1e} allowed"
                       for kernel, all_of in compared.items())  # fmt: skip
    wrong = [f"{kernel}: {one}" for kernel, all_of in compared.items() for one in all_of if not one.ok]
    return Finding(backend, device, *((State.BROKEN, f"WRONG: {'; '.join(wrong)}") if wrong else (State.WORKS, detail)))


def _show(here: machine.Machine, findings: list[Finding], cache: str) -> None:
    console = screen.console()
    facts = screen.table("", "")
    facts.show_header = False
    for label, value in _facts(here, cache):
        facts.add_row(f"[key]{label}[/]", screen.escape(value))
    console.print(facts)
    backends = screen.table("backend", "device", "", "")
    for finding in findings:
        mark = f"[{_STYLES[finding.state]}]{finding.state.value}[/]"
        backends.add_row(f"[bold]{finding.backend}[/]", finding.device, mark, screen.escape(finding.detail))
    console.print(backends)
    states = [finding.state for finding in findings]
    if State.BROKEN in states:
        console.print("[bad]Something is broken here:[/] a backend that should work does not; its words stand above.\n")
    elif State.WORKS in states:
        console.print("[good]All is well:[/] attention runs here, and probes agree with the float64 oracle.\n")
    else:
        console.print("[bad]No backend works here:[/] the reasons stand above.\n")


_STYLES = {State.WORKS: "good", State.REFUSES: "dim", State.BROKEN: "bad"}


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
