"""Peak memory of a call: how much the process grows over what it held when the call began.

On Linux the kernel's own high-water mark is set back before the call (/proc/self/clear_refs) and read after it; elsewhere
getrusage's mark, which cannot be set back, bounds it from below. On a GPU torch's allocator counts.

An allocator keeps memory that a call gives back, and what it kept hides the growth of the next call: measure in a
process that has done nothing large before. `tessera.bench.fresh` does that.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Measured(Generic[T]):
    """What a call returned, and the most bytes that the process held over what it held before, results included."""

    result: T
    peak_bytes: int


def peak_of(call: Callable[[], T]) -> Measured[T]:
    """Run `call` once and measure the host's memory."""
    before = _reset_mark()
    result = call()
    return Measured(result, max(0, _mark() - before))


def peak_of_cuda(call: Callable[[], T], device: torch.device | str = "cuda") -> Measured[T]:
    """Run `call` once and measure the GPU's memory as torch's allocator sees it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    return Measured(result, torch.cuda.max_memory_allocated(device) - before)


def _reset_mark() -> int:
    """Set the high-water mark back where that is possible; the memory held now, in bytes."""
    with suppress(OSError):  # not Linux, or not allowed: the mark stays, and the difference is a lower bound
        Path("/proc/self/clear_refs").write_text("5")
    held = _status("VmRSS")
    return _mark() if held is None else held


def _mark() -> int:
    mark = _status("VmHWM")
    if mark is not None:
        return mark
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found.group(1)) * 1024
