"""Compiling beside the program: the kernels that no call needs yet, but one of another length may.

One thread takes them in turn, and ends when there are no more. It begins a moment later: whoever asks has a kernel to load and
to launch by some thirty calls of the driver, after each of which it would wait for Python's lock (5 milliseconds at most). The
process waits at its end for the one that is being compiled (a thread that dies inside LLVM may take the process with it), and
leaves the rest. Nothing here touches the GPU.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

from tessera.jit.compiler import is_ready, obtain
from tessera.jit.spec import KernelSpec

_HEAD_START_S = 0.1
_waiting: deque[KernelSpec] = deque()
_lock = threading.Lock()
_worker: threading.Thread | None = None


def compile_later(specs: Iterable[KernelSpec]) -> None:
    """Puts the binaries of all specs into memory and on disk, in this order, and returns at once.

    Who needs one of them meanwhile calls `obtain`, which waits for it or compiles it. What fails here fails there again, and
    says why.
    """
    global _worker
    wanted = [spec for spec in specs if not is_ready(spec)]
    if not wanted:
        return
    with _lock:
        _waiting.extend(wanted)
        if _worker is None:
            _worker = threading.Thread(target=_work, name="tessera-compile")
            _worker.start()


def settle() -> None:
    """Waits until nothing is compiled beside the program."""
    worker = _worker
    if worker is not None:
        worker.join()


def _work() -> None:
    time.sleep(_HEAD_START_S)
    while (spec := _next()) is not None:
        with suppress(Exception):
            obtain(spec)


def _next() -> KernelSpec | None:
    global _worker
    with _lock:
        if _waiting and threading.main_thread().is_alive():
            return _waiting.popleft()
        _worker = None
        return None


def _reset_in_child() -> None:
    """A fork has none of its parent's threads, and whatever lock they held is held for ever."""
    global _lock, _worker
    _lock, _worker = threading.Lock(), None
    _waiting.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_in_child)
