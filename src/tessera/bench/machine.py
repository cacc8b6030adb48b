"""What this machine is: the facts that stand in a benchmark's report and in `tessera doctor`, as plain data."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("triton", "transformers", "numpy", "typer", "rich", "matplotlib")
"""Optional packages whose versions a report names where they are installed."""


@dataclass(frozen=True)
class Cpu:
    """The processor as torch uses it. `isa`: the instruction set that torch's kernels chose; `memory_bytes`: all of it."""

    name: str
    cores: int
    threads: int
    isa: str
    blas: str
    memory_bytes: int


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch sees it."""

    index: int
    name: str
    capability: str
    multiprocessors: int
    memory_bytes: int


@dataclass(frozen=True)
class Machine:
    """A machine and its software. `versions`: of tessera, Python, torch, CUDA, the driver, PACKAGES; as far as they are there."""

    system: str
    cpu: Cpu
    gpus: tuple[Gpu, ...]
    versions: dict[str, str]


def describe() -> Machine:
    """This machine. Reads CUDA's properties where torch has CUDA."""
    return Machine(f"{platform.system()} {platform.machine()}", _cpu(), _gpus(), _versions())


def available_bytes(kind: str) -> int:
    """Memory that is free now on a device of this kind ("cuda": the current GPU; others: the host)."""
    if kind == "cuda" and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return _meminfo("MemAvailable")


def _cpu() -> Cpu:
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    name = found.group(1).strip() if found else platform.processor() or platform.machine()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    libraries = {"MKL": torch.backends.mkl, "oneDNN": torch.backends.mkldnn}
    blas = " + ".join(label for label, library in libraries.items() if library.is_available())
    isa = torch.backends.cpu.get_cpu_capability()
    return Cpu(name, usable, torch.get_num_threads(), isa, blas or "other", _meminfo("MemTotal"))


def _gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    gpus = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        gpus.append(Gpu(index, p.name, f"{p.major}.{p.minor}", p.multi_processor_count, p.total_memory))
    return tuple(gpus)


def _versions() -> dict[str, str]:
    from tessera import __version__

    found = {
        "tessera": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version() or "") if torch.cuda.is_available() else None,
        "driver": _driver_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {name: version for name, version in found.items() if version}


def _driver_version() -> str | None:
    found = re.search(r"^NVRM version:.*?\s(\d+\.[\d.]+)", _read("/proc/driver/nvidia/version"), re.MULTILINE)
    return found.group(1) if found else None


def _meminfo(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    if found:
        return int(found.group(1)) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # not Linux: all memory stands for the free


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
