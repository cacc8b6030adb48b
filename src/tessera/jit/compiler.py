"""From a `KernelSpec` to a `Binary`: memory, then disk, then Triton. Only the last imports Triton or the kernel.

Each step is safe for many threads (a key compiles once in a process) and many processes (see `cache`).
"""

from __future__ import annotations

import gc
import importlib
import os
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from tessera.jit import cache, operand_places, pairs, ptx, shared_text
from tessera.jit.binary import Binary
from tessera.jit.spec import KernelSpec, parameter_layout
from tessera.jit.stages import IMPORTS, stage
from tessera.jit.toolchain import binary_key, hash_sources, source_key, toolchain_key, triton_version

_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(b8|[usbf]\d+)\b[^,\n]*?(?:\[(\d+)\])?\s*(?=,|$)", re.MULTILINE)
_SCRATCH_POINTERS = (8, 8)  # bytes of the global and profile scratch pointers that end every kernel's parameters

_binaries: dict[KernelSpec, Binary] = {}
_locks: dict[KernelSpec, threading.Lock] = {}
_counter_lock = threading.Lock()
_compiled = 0


def obtain(spec: KernelSpec) -> Binary:
    """The spec's binary, from memory, from disk, or compiled now.

    Raises NoTritonError, TypeError for a spec that does not fit its kernel, Triton's errors, compat.AssemblerError.
    """
    found = _binaries.get(spec)
    if found is not None:
        return found
    with _locks.setdefault(spec, threading.Lock()):
        found = _binaries.get(spec)
        if found is None:
            found = _binaries[spec] = _from_disk_or_compile(spec)
        return found


def is_ready(spec: KernelSpec) -> bool:
    """Whether this process has the spec's binary in memory."""
    return spec in _binaries


def warmup(specs: Iterable[KernelSpec], threads: int | None = None) -> int:
    """Puts the binaries of all specs into memory and on disk, without a GPU; returns how many had to be compiled.

    `threads` at a time (by default one a core, eight at most): Triton and ptxas work outside Python's lock. Raises what
    the first failing compile raises, after the others have ended.
    """
    before = compiles()
    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        running = [pool.submit(obtain, spec) for spec in specs]  # not map: it drops what has not begun when one fails
    for one in running:
        one.result()
    return compiles() - before


def compiles() -> int:
    """Compilations since this process started; what memory or disk had does not count."""
    return _compiled


if hasattr(os, "register_at_fork"):  # a lock that another thread held at the fork is held for ever
    os.register_at_fork(after_in_child=_locks.clear)


def _from_disk_or_compile(spec: KernelSpec) -> Binary:
    key = binary_key(spec)
    found = cache.read(key)
    if found is not None:
        return found
    with cache.lock(key):
        found = cache.read(key)  # another process may have made it while this one waited
        if found is None:
            found = compile(spec)
            # A source edited since its hash was taken may have been imported after the edit: such a binary has no name.
            if hash_sources(spec.module) == source_key(spec.module):
                cache.write(key, found)
    return found


def compile(spec: KernelSpec) -> Binary:
    """Compiles, whatever the caches hold, and keeps the PTX. Raises as `obtain` does."""
    global _compiled
    with _no_collections():
        binary = _compile(spec)
    with _counter_lock:
        _compiled += 1
    return binary


def _compile(spec: KernelSpec) -> Binary:
    version = triton_version()  # raises NoTritonError, in words, before an ImportError from inside a kernel file
    with stage(IMPORTS):
        try:
            from tessera.jit import compat, haste, reach
        except ImportError as error:
            raise RuntimeError(f"tessera.jit works with Triton 3.6 to 3.9; this is {version}: {error}") from error
        function = _function(spec)
    haste.hasten(reach.check(spec, function))
    lowered = compat.lower(spec, function)
    text = shared_text.merged(ptx.rewritten(lowered.ptx, 32 * spec.num_warps))
    text = operand_places.added(text) if compat.ADDS_PLACES_IN_32_BITS else text
    whole = pairs.joined(text) if spec.joins_halves else text
    lowered = replace(lowered, ptx=whole)
    _check_parameters(spec, lowered.ptx)
    assembled = compat.assemble(spec, lowered)
    if whole is not text and pairs.are_in_the_way(assembled.messages):
        lowered = replace(lowered, ptx=text)
        assembled = compat.assemble(spec, lowered)
    return Binary(
        entry=lowered.entry,
        cubin=assembled.cubin,
        threads=32 * lowered.warps,
        shared=lowered.shared,
        scratch=lowered.scratch,
        descriptors=lowered.descriptors,
        messages=_complaints(lowered.unused_barriers) + assembled.messages,
        toolchain=toolchain_key(),
        ptx=lowered.ptx,
    )


@contextmanager
def _no_collections() -> Iterator[None]:
    """No garbage collection: Triton's modules and a kernel's syntax trees are a million objects that live on, so each collection
    would look through them, and through all of PyTorch's, in vain (a third of the imports' time, a sixth of the front end's)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _complaints(unused_barriers: Iterable[str]) -> str:
    why = "barriers that are made and never used; their memory is given away (TRITON_DISABLE_LINE_INFO=0 names them)"
    return "".join(f"warning: {name}: {why}\n" for name in unused_barriers)


def _function(spec: KernelSpec) -> Any:
    module = importlib.import_module(spec.module)
    try:
        return getattr(module, spec.function)
    except AttributeError:
        raise TypeError(f"{spec.kernel}: {spec.module} has no {spec.function}") from None


def _check_parameters(spec: KernelSpec, ptx: str) -> None:
    """Compares the parameters PTX declares with those a launch will pack, so that a change of ABI cannot corrupt memory."""
    declared = ptx[ptx.index(".visible .entry") :]
    declared = declared[declared.index("(") + 1 : declared.index("\n)")]
    sizes = tuple(int(count) if count else int(re.sub(r"\D", "", kind)) // 8 for kind, count in _PARAMETER.findall(declared))
    expected = tuple(size for _, size in parameter_layout(spec)[1]) + _SCRATCH_POINTERS
    if sizes != expected:
        raise RuntimeError(f"{spec.kernel}: Triton declares parameters of {sizes} bytes, a launch would pass {expected}")
