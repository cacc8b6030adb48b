"""Loaded kernels, and the shortest way from Python to `cuLaunchKernelEx`.

A launch writes the grid, the stream and all arguments into one prepared block of memory with one `struct` call, and
makes one foreign call, whose arguments (pointers into that block) were converted once. It checks nothing that the
driver checks, never synchronises, and allocates nothing, so it can be captured into a CUDA graph. Arguments follow
Triton's ABI, which `compiler` compares with the PTX at every compile.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import weakref
from typing import Any

import torch

from tessera.jit import driver
from tessera.jit.binary import Binary
from tessera.jit.compiler import obtain
from tessera.jit.spec import KernelSpec, Tiles, parameter_layout
from tessera.jit.tensormap import TileEncoder, encoder

_CONFIG_FORMAT = "=3I20sQ16s8x"
"""CUlaunchConfig: grid; block, shared bytes, padding (as 20 bytes); stream; attributes and their number (as 16 bytes);
and padding up to where the arguments begin."""
_ARGUMENTS_OFFSET = 64
_ALIGN = 64
_ATTRIBUTE_FORMAT = "=I4x3I52x"  # CUlaunchAttribute: id, a value of 64 bytes
_CLUSTER_DIMENSION, _CLUSTER_SCHEDULING, _SPREAD = 4, 5, 1
_EARLY, _YES = 6, 1  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

_NULL = ctypes.c_void_p.from_param(None)
_kernels: dict[tuple[KernelSpec, int], Kernel] = {}
_loaded: weakref.WeakSet[Kernel] = weakref.WeakSet()
_load_lock = threading.Lock()


class _Slot:
    """Memory of one launch in flight on the host: launch configuration, arguments, and the driver's pointers to them."""

    __slots__ = ("_kept", "config", "memory", "offset", "parameters")

    def __init__(self, size: int, offsets: tuple[int, ...]):
        self.memory = ctypes.create_string_buffer(_ARGUMENTS_OFFSET + size + _ALIGN)
        address = ctypes.addressof(self.memory)
        self.offset = -address % _ALIGN
        start = address + self.offset + _ARGUMENTS_OFFSET
        self._kept = (ctypes.c_void_p * len(offsets))(*(start + offset for offset in offsets))
        # byref() objects are made once here: ctypes passes them on without converting anything.
        self.config = ctypes.byref(self.memory, self.offset)
        self.parameters = ctypes.byref(self._kept)


class Kernel:
    """A kernel loaded on one device. Calling it enqueues a launch.

    `tiles[i]` encodes the tensor map of the i-th `Tiles` argument (see `TileEncoder`). Safe for many threads.
    """

    __slots__ = (
        "__weakref__", "_attributes", "_enqueue", "_function", "_kept", "_offsets", "_pack", "_shape", "_size", "_slots",
        "binary", "device", "spec", "tiles",
    )  # fmt: skip

    def __init__(self, spec: KernelSpec, binary: Binary, device: int):
        if binary.scratch:
            raise RuntimeError(
                f"tessera: {spec.kernel} wants {binary.scratch} bytes of scratch memory a block from its launcher; "
                "pass workspace as a pointer, and tensor descriptors as Tiles"
            )
        self.spec, self.binary, self.device = spec, binary, device
        self.tiles: tuple[TileEncoder, ...] = tuple(encoder(descriptor) for descriptor in binary.descriptors)
        handle = driver.load_function(device, binary.cubin, binary.entry, binary.shared)
        self._function = ctypes.c_void_p.from_param(handle)
        # A function object of our own, without argtypes: the prepared arguments need no conversion.
        self._enqueue: Any = driver.library()["cuLaunchKernelEx"]
        layout, parameters = parameter_layout(spec)
        self._pack = struct.Struct(_CONFIG_FORMAT + layout[1:]).pack_into
        end = struct.calcsize(layout)
        scratch = end + -end % 8  # both scratch pointers of the ABI read the same null
        self._size = scratch + 8
        self._offsets = (*(offset for offset, _ in parameters), scratch, scratch)
        self._shape = struct.pack("=4I4x", binary.threads, 1, 1, binary.shared)
        self._kept, count = _launch_attributes(spec)
        self._attributes = struct.pack("=QI4x", ctypes.addressof(self._kept), count)
        self._slots: list[_Slot] = [_Slot(self._size, self._offsets)]
        _loaded.add(self)

    def __call__(self, stream: int, grid_x: int, grid_y: int, grid_z: int, *arguments: int | float | bytes) -> None:
        """Enqueues the kernel on a stream of this device and returns at once.

        `stream` is a raw CUstream (see `current_stream`); the grid counts blocks, all three sizes positive and grid_x a
        multiple of the cluster's size. `arguments` are in the spec's order: addresses and integers as int, floating
        point as float, tensor maps as the bytes from `tiles`. Raises TypeError for arguments that do not fit the spec,
        CudaError for what the driver refuses, RuntimeError in a forked child.
        """
        slots = self._slots
        try:
            slot = slots.pop()  # atomic: threads never share one
        except IndexError:
            slot = _Slot(self._size, self._offsets)
        try:
            self._pack(slot.memory, slot.offset, grid_x, grid_y, grid_z, self._shape, stream, self._attributes, *arguments)
            status = self._enqueue(slot.config, self._function, slot.parameters, _NULL)
            if status:
                self._retry(slot, status, (grid_x, grid_y, grid_z))
        except struct.error as error:
            raise self._misfit(arguments, error) from None
        finally:
            slots.append(slot)

    def _retry(self, slot: _Slot, status: int, grid: tuple[int, int, int]) -> None:
        """A thread that never used CUDA, or uses another device, has the wrong context: launches again with the right one."""
        if status in driver.LOST_CONTEXT:
            with driver.current(self.device):
                status = self._enqueue(slot.config, self._function, slot.parameters, _NULL)
        driver.check(f"launching {self.binary.entry} on device {self.device} with a grid of {grid}", status)

    def _misfit(self, arguments: tuple[object, ...], error: struct.error) -> TypeError:
        wanted = ", ".join(f"{name}: {_described(argument)}" for name, argument in self.spec.arguments)
        given = ", ".join(type(argument).__name__ for argument in arguments)
        return TypeError(f"{self.spec.kernel} takes ({wanted}); got ({given}): {error}")

    def __repr__(self) -> str:
        size = f"{self.binary.registers} registers, {self.binary.shared} B shared"
        return f"Kernel({self.spec.kernel} on device {self.device}: {size})"


def load(spec: KernelSpec, device: int) -> Kernel:
    """The kernel on a device: loaded already, or from the disk cache, or compiled now. Raises as `obtain` and Kernel do."""
    found = _kernels.get((spec, device))
    if found is None:
        driver.refuse_after_fork()
        binary = obtain(spec)
        with _load_lock:
            found = _kernels.get((spec, device))
            if found is None:
                found = _kernels[spec, device] = Kernel(spec, binary, device)
    return found


def _no_stream(device: int) -> int:
    raise RuntimeError(f"tessera: this PyTorch ({torch.__version__}) has no CUDA, so device {device} has no streams")


current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _no_stream)
"""current_stream(device_index): PyTorch's current stream there, as the raw handle that launches take."""


def _described(argument: object) -> str:
    return f"bytes of tiles[...] for {argument}" if isinstance(argument, Tiles) else str(argument)


def _launch_attributes(spec: KernelSpec) -> tuple[ctypes.Array[ctypes.c_char], int]:
    """The launch attributes and their number: for a cluster of blocks along x, spread over the GPU; an early start."""
    attributes = []
    if spec.cluster > 1:
        attributes.append(struct.pack(_ATTRIBUTE_FORMAT, _CLUSTER_DIMENSION, spec.cluster, 1, 1))
        attributes.append(struct.pack(_ATTRIBUTE_FORMAT, _CLUSTER_SCHEDULING, _SPREAD, 0, 0))
    if spec.early:
        attributes.append(struct.pack(_ATTRIBUTE_FORMAT, _EARLY, _YES, 0, 0))
    packed = b"".join(attributes)
    return ctypes.create_string_buffer(packed, max(1, len(packed))), len(attributes)


def _disarm_in_child() -> None:
    """After a fork, launches of the child refuse in words: the handles are the parent's."""
    if driver.forked():
        for kernel in _loaded:
            kernel._enqueue = driver.refuse_after_fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disarm_in_child)
