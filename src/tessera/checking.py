"""Whether tensors' contents are checked: on the CPU always; on a device under `tessera.debug()` alone, for reading them waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_debugging: ContextVar[bool] = ContextVar("tessera_debugging", default=False)


@contextmanager
def debug() -> Iterator[None]:
    """Check the contents of offsets, lengths and page tables on devices too, before anything runs.

        with tessera.debug():
            out = tessera.attention_with_kvcache(...)

    Each call then waits for the device and copies those tensors to the host: for finding errors, not for serving, and not
    while a CUDA graph is being captured. Without it a kernel keeps to its tensors whatever they say, but says nothing.
    """
    token = _debugging.set(True)
    try:
        yield
    finally:
        _debugging.reset(token)


def reads_contents(tensor: Tensor) -> bool:
    """Whether this tensor's contents are to be checked now."""
    kind = tensor.device.type
    return kind != "meta" and (kind == "cpu" or _debugging.get())
