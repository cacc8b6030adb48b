"""Checks, on a compile, that a kernel is made of nothing but the files its cache key hashes.

The key of a binary is made without importing the kernel (see `toolchain`): from the files of the kernel's package and
`compat`. That is right only if the kernel reaches no code elsewhere, so what it does reach is walked here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from tessera.jit import compat
from tessera.jit.spec import KernelSpec
from tessera.jit.toolchain import source_files, triton_home


class OutOfReachError(TypeError):
    """A kernel uses code that its cache key does not cover."""


def check(spec: KernelSpec, kernel: Any) -> None:
    """Raises OutOfReachError when `kernel` uses, however indirectly, jitted code outside its package, compat and Triton."""
    if not compat.is_jitted(kernel):
        raise TypeError(f"{spec.kernel} is a {type(kernel).__name__}, not a function decorated with gluon.jit")
    allowed = {path.resolve() for path in source_files(spec.module)}
    triton = triton_home().resolve()
    waiting, seen = [kernel], set()
    while waiting:
        function = waiting.pop().fn
        if function in seen:
            continue
        seen.add(function)
        path = Path(inspect.getsourcefile(function) or "").resolve()
        if triton in path.parents:
            continue  # covered by Triton's version
        if path not in allowed:
            raise OutOfReachError(
                f"{spec.kernel} uses {function.__module__}.{function.__qualname__}, which lies outside the kernel's package; "
                "a change there would go unnoticed by cached binaries. Move it into the package, or pass it as a constant"
            )
        waiting += _used_by(function)


def _used_by(function: FunctionType) -> Iterator[Any]:
    """The jitted functions among a function's globals, also as attributes of modules and methods of classes."""
    names = set(_names(function.__code__))
    for name in names:
        value = function.__globals__.get(name)
        candidates: list[object] = [value]
        if isinstance(value, ModuleType):
            candidates += [getattr(value, attribute, None) for attribute in names]
        for candidate in candidates:
            if isinstance(candidate, type):
                yield from (member for member in vars(candidate).values() if compat.is_jitted(member))
            elif compat.is_jitted(candidate):
                yield candidate


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
