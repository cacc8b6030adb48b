"""The CUDA driver through ctypes: what loading and launching need, errors in words, and what a fork leaves behind.

No C compiler and no Triton at run time. Constants and structures are those of cuda.h (CUDA 12).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from tessera.jit.stages import LOADING, stage

INVALID_VALUE, NOT_INITIALIZED, INVALID_CONTEXT, INVALID_HANDLE = 1, 3, 201, 400
MAX_SHARED_PER_BLOCK_OPTIN = 97  # CU_DEVICE_ATTRIBUTE_...
FUNC_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
FUNC_CACHE_PREFER_SHARED = 1
_CAPTURE_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

LOST_CONTEXT = frozenset({NOT_INITIALIZED, INVALID_CONTEXT, INVALID_HANDLE})
"""What the driver answers when another context, or none, is current: in a thread that never used CUDA, say."""

_process_that_used_cuda: int | None = None
_retained: list[int] = []  # devices whose primary context is held


class CudaError(RuntimeError):
    """A call of the driver failed; `status` is its CUresult."""

    def __init__(self, what: str, status: int):
        self.status = status
        super().__init__(f"tessera: {what}: {describe(status)}")


@cache
def library() -> Any:
    """libcuda, initialised. Raises RuntimeError in words where there is no driver or no GPU."""
    global _process_that_used_cuda
    refuse_after_fork()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"tessera: no CUDA driver here ({error}); compiling works without one") from None
    status = cuda.cuInit(0)
    if status:
        raise RuntimeError(f"tessera: the CUDA driver did not start (cuInit: error {status}); is there a GPU?")
    _process_that_used_cuda = os.getpid()
    return cuda


def describe(status: int) -> str:
    """A CUresult as the driver words it."""
    text = ctypes.c_char_p()
    name = ctypes.c_char_p()
    library().cuGetErrorName(status, ctypes.byref(name))
    library().cuGetErrorString(status, ctypes.byref(text))
    return f"{(name.value or b'unknown').decode()} ({(text.value or b'unknown').decode()})"


def check(what: str, status: int) -> None:
    """Raises CudaError unless `status` is success."""
    if status:
        raise CudaError(what, status)


def forked() -> bool:
    """Whether this process is a fork of one that had used CUDA here: its handles are the parent's, and useless."""
    return _process_that_used_cuda is not None and _process_that_used_cuda != os.getpid()


def refuse_after_fork(*_: object) -> int:
    """Raises RuntimeError in a forked child; otherwise returns success. Stands in for driver calls after a fork."""
    if forked():
        raise RuntimeError(
            "tessera: this process was forked after CUDA had been used, and CUDA does not survive a fork; "
            "start workers with the 'spawn' or 'forkserver' method"
        )
    return 0


@cache
def primary_context(device: int) -> int:
    """The handle of a device's primary context (the one PyTorch uses), retained for the life of the process."""
    cuda = library()
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    check(f"device {device}", cuda.cuDeviceGet(ctypes.byref(handle), device))
    check(f"primary context of device {device}", cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle))
    _retained.append(device)
    return context.value or 0


def retained_device() -> int:
    """A device that this process already uses. A context on any other would cost hundreds of megabytes there."""
    return _retained[0]


@contextmanager
def current(device: int) -> Iterator[None]:
    """Makes a device's primary context current for this thread, and puts back what was current before."""
    cuda = library()
    check("making a context current", cuda.cuCtxPushCurrent_v2(ctypes.c_void_p(primary_context(device))))
    try:
        yield
    finally:
        popped = ctypes.c_void_p()
        cuda.cuCtxPopCurrent_v2(ctypes.byref(popped))


@contextmanager
def outside_capture() -> Iterator[None]:
    """Lets this thread load code while a stream of it is being captured into a graph: nothing in here is captured."""
    cuda = library()
    mode = ctypes.c_int(_CAPTURE_RELAXED)
    check("stream capture mode", cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)))
    try:
        yield
    finally:
        cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def capture_id(stream: int) -> int:
    """A number for the capture that a stream takes part in, unique in the process; 0 where there is none."""
    cuda, status, found = library(), ctypes.c_int(), ctypes.c_ulonglong()
    asked = [ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(found)]
    if hasattr(cuda, "cuStreamGetCaptureInfo_v2"):
        answer = cuda.cuStreamGetCaptureInfo_v2(*asked, None, None, None)  # graph, dependencies and their number: not wanted
    else:
        answer = cuda.cuStreamGetCaptureInfo_v3(*asked, None, None, None, None)  # and data of the edges
    check("capture of a stream", answer)
    return found.value if status.value else 0


def max_shared(device: int) -> int:
    """Bytes of shared memory that one block may have on a device."""
    cuda = library()
    handle, value = ctypes.c_int(), ctypes.c_int()
    check(f"device {device}", cuda.cuDeviceGet(ctypes.byref(handle), device))
    check("shared memory limit", cuda.cuDeviceGetAttribute(ctypes.byref(value), MAX_SHARED_PER_BLOCK_OPTIN, handle))
    return value.value


def load_function(device: int, cubin: bytes, entry: str, shared: int) -> int:
    """Loads a cubin into a device's primary context and returns its kernel's handle. Never unloaded: handles stay valid.

    Works while a graph is being captured. Raises CudaError, or RuntimeError when the device has too little shared memory.
    """
    limit = max_shared(device)
    if shared > limit:
        raise RuntimeError(f"tessera: {entry} needs {shared} bytes of shared memory a block; device {device} has {limit}")
    cuda = library()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with stage(LOADING), current(device), outside_capture():
        check(f"loading {entry} on device {device}", cuda.cuModuleLoadData(ctypes.byref(module), cubin))
        check(f"finding {entry}", cuda.cuModuleGetFunction(ctypes.byref(function), module, entry.encode()))
        if shared > 48 * 1024:
            check(f"cache preference of {entry}", cuda.cuFuncSetCacheConfig(function, FUNC_CACHE_PREFER_SHARED))
        # Also for small kernels: it makes the driver load the code now, not inside somebody's first capture.
        check(f"shared memory of {entry}", cuda.cuFuncSetAttribute(function, FUNC_MAX_DYNAMIC_SHARED, shared))
    return function.value or 0
