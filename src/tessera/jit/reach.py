"""Checks, on a compile, that a kernel is made of nothing but the files its cache key hashes.

The key of a binary is made without importing the kernel (see `toolchain`): from the files of the kernel's package and
`compat`. That is right only if the kernel reaches no code elsewhere, so what it does reach is walked here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from tessera.jit import compat
from tessera.jit.spec import KernelSpec
from tessera.jit.toolchain import source_files, triton_home


class OutOfReachError(TypeError):
    """A kernel uses code that its cache key does not cover."""


def check(spec: KernelSpec, kernel: Any) -> tuple[Any, ...]:
    """The jitted functions that `kernel` uses. Raises OutOfReachError when it uses, however indirectly, code that its key does
    not cover.

    Covered are the kernel's package, compat and Triton. Jitted code from anywhere else is refused; so are plain functions
    and classes of the kernel's own project, while those of libraries count as fixed.
    """
    if not compat.is_jitted(kernel):
        raise TypeError(f"{spec.kernel} is a {type(kernel).__name__}, not a function decorated with gluon.jit")
    allowed = {path.resolve() for path in source_files(spec.module)}
    triton, project = triton_home().resolve(), spec.module.split(".")[0]
    waiting, seen, jitted = [kernel], set(), []
    while waiting:
        value = waiting.pop()
        function = value.fn if compat.is_jitted(value) else value
        if function in seen:
            continue
        seen.add(function)
        if function is not value:
            jitted.append(value)
        path = _file_of(function)
        if path in allowed:
            if isinstance(function, FunctionType):
                waiting += _used_by(function.__code__, function.__globals__)
        elif triton not in path.parents and (function is not value or function.__module__.split(".")[0] == project):
            raise OutOfReachError(
                f"{spec.kernel} uses {function.__module__}.{function.__qualname__}, which lies outside the kernel's package; "
                "a change there would go unnoticed by cached binaries. Move it into the package, or pass it as a constant"
            )
    return tuple(jitted)


def _file_of(value: Any) -> Path:
    try:
        return _resolved(inspect.getsourcefile(value) or "")
    except TypeError:  # built in
        return Path("/")


@cache
def _resolved(name: str) -> Path:
    return Path(name).resolve()


def _used_by(code: CodeType, scope: dict[str, Any]) -> Iterator[Any]:
    """Functions and classes among the globals of some code: by name, as attributes of modules, as methods of those classes."""
    names = set(_names(code))
    for name in names:
        value = scope.get(name)
        candidates = [value]
        if isinstance(value, ModuleType):
            candidates = [getattr(value, attribute, None) for attribute in names]
        for candidate in candidates:
            if isinstance(candidate, type):
                yield candidate
                yield from (member for member in vars(candidate).values() if compat.is_jitted(member))
            elif isinstance(candidate, FunctionType) or compat.is_jitted(candidate):
                yield candidate


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
