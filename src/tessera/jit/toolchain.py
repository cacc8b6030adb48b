"""What a binary depends on beside its spec: the kernels' sources, Triton and its ptxas; read without importing Triton.

A cache hit must cost milliseconds, and importing Triton and its Gluon alone costs hundreds. So versions are read from
files, and a kernel's sources are the files of its package, hashed as they lie on disk.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
from functools import cache
from pathlib import Path

from tessera.jit.spec import KernelSpec, constant_types

_VERSION = re.compile(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)

CODEGEN_VARIABLES = (
    "DISABLE_LLVM_OPT",
    "LLVM_PASS_PLUGIN_PATH",
    "TRITON_DISABLE_LINE_INFO",
    "TRITON_FORCE_DISABLE_FP_FUSION",
    "TRITON_LIBDEVICE_PATH",
    "TRITON_MOCK_PTX_VERSION",
    "TRITON_OVERRIDE_ARCH",
    "TRITON_PLUGIN_PATHS",
)
"""Environment variables by which a user changes the code that Triton 3.6 to 3.9 makes."""

PTXAS = {"ptxas": "TRITON_PTXAS_PATH", "ptxas-blackwell": "TRITON_PTXAS_BLACKWELL_PATH"}
"""The assemblers in Triton's wheel and the variables that replace them. Hopper's is the first, if it is there (compat.py)."""

_ON_THE_WAY = ("barriers", "compat", "compiler", "haste", "operand_places", "pairs", "ptx", "shared_text")
"""Modules beside this one that a kernel passes as it is compiled, and whose words stand in its binary."""


class NoTritonError(RuntimeError):
    """Triton is not installed, so nothing can be compiled here."""

    def __init__(self) -> None:
        super().__init__(
            "tessera.jit: Triton is not installed; its Hopper kernels need it. PyTorch's CUDA wheels bring it; "
            "beside a CPU-only torch, `pip install triton` is enough to compile ahead of time"
        )


@cache
def triton_home() -> Path:
    """The folder of the Triton that `import triton` would import. Raises NoTritonError."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        raise NoTritonError
    return Path(found.origin).parent


@cache
def triton_version() -> str:
    """Triton's version, for example "3.6.0", read from its source. Raises NoTritonError."""
    match = _VERSION.search((triton_home() / "__init__.py").read_text())
    if match is None:
        raise RuntimeError(f"tessera.jit: no __version__ in {triton_home() / '__init__.py'}")
    return match.group(1)


def tool_path(name: str) -> Path:
    """One of the binary tools that Triton ships (nvdisasm, cuobjdump)."""
    return triton_home() / "backends" / "nvidia" / "bin" / name


@cache
def toolchain_key() -> str:
    """Everything about compilers that a binary depends on, as text. Raises NoTritonError.

    A ptxas stands in it by its size: a process to ask its version would cost more than the rest of a cache hit. One that
    the user chose stands in it by path and time of change as well.
    """
    lines = [f"triton {triton_version()}"]
    for tool, variable in PTXAS.items():
        chosen = os.environ.get(variable)
        path = Path(chosen) if chosen else tool_path(tool)
        if path.exists():
            stamp = path.stat()
            lines.append(f"{path} {stamp.st_size} {stamp.st_mtime_ns}" if chosen else f"{tool} {stamp.st_size}")
    return "\n".join([*lines, *(f"{name}={os.environ[name]}" for name in CODEGEN_VARIABLES if name in os.environ)])


def source_files(module: str) -> tuple[Path, ...]:
    """The files that the kernels of `module` may be made of: its package's (subpackages too), and those of tessera.jit on the way
    from a function to a binary.

    A module outside any package is its own file alone. Found without importing the module (its parent packages are).
    Raises ModuleNotFoundError.
    """
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"no module named {module!r}", name=module)
    ours = [Path(__file__).with_name(f"{name}.py") for name in _ON_THE_WAY]
    origin = Path(found.origin)
    package = [origin] if "." not in module else sorted(origin.parent.rglob("*.py"))
    return (*package, *ours)


@cache
def source_key(module: str) -> str:
    """The hash of `source_files(module)`, computed once a process: imported code does not change under a process either."""
    return hash_sources(module)


def hash_sources(module: str) -> str:
    """The hash of `source_files(module)` as they are on disk now."""
    digest = hashlib.sha256()
    for path in source_files(module):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


@cache
def _type_source_key(kind: type) -> str:
    path = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def binary_key(spec: KernelSpec) -> str:
    """The name of a spec's binary: the hash of the spec, its sources, and the compilers."""
    kinds = sorted(constant_types(tuple(value for _, value in spec.constants)), key=lambda kind: kind.__qualname__)
    parts = [spec.text, source_key(spec.module), toolchain_key(), *(_type_source_key(kind) for kind in kinds)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
