"""Loaded kernels, and the shortest way from Python to `cuLaunchKernelEx`.

A launch writes the grid, the stream and all arguments into one prepared block of memory with one `struct` call, and
makes one foreign call, whose arguments (pointers into that block) were converted once. What is the same in every launch
of a caller's can be written once: see `Kernel.prepare`. A launch checks nothing that the driver checks, never
synchronises, and allocates nothing, so it can be captured into a CUDA graph. Arguments follow Triton's ABI, which
`compiler` compares with the PTX at every compile.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tessera.jit import driver
from tessera.jit.binary import Binary
from tessera.jit.compiler import obtain
from tessera.jit.spec import KernelSpec, Tiles, parameter_layout
from tessera.jit.tensormap import TileEncoder, encoder

_CONFIG_FORMAT = "=32sQ16s8x"
"""CUlaunchConfig: grid, block, shared bytes and padding (as 32 bytes); stream; attributes and their number (as 16 bytes);
and padding up to where the arguments begin."""
_GRID = struct.Struct("=3I")
_ARGUMENTS_OFFSET = 64
_ALIGN = 64
_ATTRIBUTE_FORMAT = "=I4x3I52x"  # CUlaunchAttribute: id, a value of 64 bytes
_CLUSTER_DIMENSION, _CLUSTER_SCHEDULING, _SPREAD = 4, 5, 1
_EARLY, _YES = 6, 1  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

Argument = int | float | bytes
Launch = Callable[[int, tuple[Argument, ...]], None]
"""Of a stream, and of the arguments that change: as one tuple, which nothing on the way has to make again."""
_NULL = ctypes.c_void_p.from_param(None)
_kernels: dict[tuple[KernelSpec, int], Kernel] = {}
_launchers: weakref.WeakSet[_Launcher] = weakref.WeakSet()
_load_lock = threading.Lock()


class _Slot:
    """Memory of one launch in flight on the host: launch configuration and arguments, and the driver's pointers to them."""

    __slots__ = ("_kept", "config", "content", "parameters")

    def __init__(self, size: int, offsets: tuple[int, ...]):
        memory = ctypes.create_string_buffer(_ARGUMENTS_OFFSET + size + _ALIGN)
        address = ctypes.addressof(memory)
        begin = -address % _ALIGN
        start = address + begin + _ARGUMENTS_OFFSET
        self._kept = (ctypes.c_void_p * len(offsets))(*(start + offset for offset in offsets))
        # A view takes what is written in half the time of ctypes' own buffer, which it keeps alive.
        self.content = memoryview(memory).cast("B")[begin:]
        # byref() objects are made once here: ctypes passes them on without converting anything.
        self.config = ctypes.byref(memory, begin)
        self.parameters = ctypes.byref(self._kept)


class _Launcher:
    """Launches of one kernel whose last arguments are always `last`. Safe for many threads."""

    __slots__ = ("__weakref__", "_attributes", "_enqueue", "_function", "_kernel", "_last", "_pack", "_slots")

    def __init__(self, kernel: Kernel, last: tuple[Argument, ...] = ()):
        spec, (whole, _) = kernel.spec, parameter_layout(kernel.spec)
        first, _ = parameter_layout(replace(spec, arguments=spec.arguments[: len(spec.arguments) - len(last)]))
        self._kernel = kernel
        self._pack = struct.Struct(_CONFIG_FORMAT + first[1:]).pack_into
        self._last = struct.calcsize(first), struct.pack("=" + whole[len(first) :], *last)
        self._attributes, self._function = kernel.attributes, kernel.function
        # A function object of our own, without argtypes: the prepared arguments need no conversion.
        self._enqueue: Any = driver.library()["cuLaunchKernelEx"]
        self._slots: list[_Slot] = [self._new_slot()]
        _launchers.add(self)

    def run(self, shape: bytes, stream: int, arguments: tuple[Argument, ...]) -> None:
        """Enqueues the kernel; `shape` as `Kernel` makes it of a grid."""
        slots = self._slots
        try:
            slot = slots.pop()  # atomic: threads never share one
        except IndexError:
            slot = self._new_slot()
        try:
            self._pack(slot.content, 0, shape, stream, self._attributes, *arguments)
            status = self._enqueue(slot.config, self._function, slot.parameters, _NULL)
            if status:
                self._retry(slot, status, shape)
        except struct.error as error:
            raise self._kernel.misfit(arguments, error) from None
        finally:
            slots.append(slot)

    def _new_slot(self) -> _Slot:
        slot, (begin, last) = _Slot(self._kernel.size, self._kernel.offsets), self._last
        begin += _ARGUMENTS_OFFSET
        slot.content[begin : begin + len(last)] = last
        return slot

    def _retry(self, slot: _Slot, status: int, shape: bytes) -> None:
        """A thread that never used CUDA, or uses another device, has the wrong context: launches again with the right one."""
        kernel = self._kernel
        if status in driver.LOST_CONTEXT:
            with driver.current(kernel.device):
                status = self._enqueue(slot.config, self._function, slot.parameters, _NULL)
        grid = _GRID.unpack_from(shape)
        driver.check(f"launching {kernel.binary.entry} on device {kernel.device} with a grid of {grid}", status)

    def disarm(self) -> None:
        """From now on a launch refuses, in words: this process is a fork."""
        self._enqueue = driver.refuse_after_fork


class Kernel:
    """A kernel loaded on one device. Calling it enqueues a launch.

    `tiles[i]` encodes the tensor map of the i-th `Tiles` argument (see `TileEncoder`). Safe for many threads.
    """

    __slots__ = ("_block", "_kept", "_launcher", "attributes", "binary", "device", "function", "offsets", "size", "spec", "tiles")

    def __init__(self, spec: KernelSpec, binary: Binary, device: int):
        if binary.scratch:
            raise RuntimeError(
                f"tessera: {spec.kernel} wants {binary.scratch} bytes of scratch memory a block from its launcher; "
                "pass workspace as a pointer, and tensor descriptors as Tiles"
            )
        self.spec, self.binary, self.device = spec, binary, device
        self.tiles: tuple[TileEncoder, ...] = tuple(encoder(descriptor) for descriptor in binary.descriptors)
        handle = driver.load_function(device, binary.cubin, binary.entry, binary.shared)
        self.function = ctypes.c_void_p.from_param(handle)
        layout, parameters = parameter_layout(spec)
        end = struct.calcsize(layout)
        scratch = end + -end % 8  # both scratch pointers of the ABI read the same null
        self.size = scratch + 8
        self.offsets = (*(offset for offset, _ in parameters), scratch, scratch)
        self._block = struct.pack("=4I4x", binary.threads, 1, 1, binary.shared)
        self._kept, count = _launch_attributes(spec)
        self.attributes = struct.pack("=QI4x", ctypes.addressof(self._kept), count)
        self._launcher = _Launcher(self)

    def __call__(self, stream: int, grid_x: int, grid_y: int, grid_z: int, *arguments: Argument) -> None:
        """Enqueues the kernel on a stream of this device and returns at once.

        `stream` is a raw CUstream (see `current_stream`); the grid counts blocks, all three sizes positive and grid_x a
        multiple of the cluster's size. `arguments` are in the spec's order: addresses and integers as int, floating
        point as float, tensor maps as the bytes from `tiles`. Raises TypeError for arguments that do not fit the spec,
        CudaError for what the driver refuses, RuntimeError in a forked child.
        """
        self._launcher.run(self._shape(grid_x, grid_y, grid_z), stream, arguments)

    def prepare(self, grid: tuple[int, int, int], last: tuple[Argument, ...] = ()) -> Launch:
        """Launches with this grid whose last arguments are these: what it returns is called with a stream and a tuple of the
        arguments before them, and raises as a call of the kernel does. Half of a launch's time in Python is saved."""
        try:
            launcher = _Launcher(self, last)
        except struct.error as error:
            raise self.misfit(last, error) from None
        return partial(launcher.run, self._shape(*grid))

    def _shape(self, grid_x: int, grid_y: int, grid_z: int) -> bytes:
        """What stands before the stream in CUlaunchConfig."""
        return _GRID.pack(grid_x, grid_y, grid_z) + self._block

    def misfit(self, arguments: tuple[object, ...], error: struct.error) -> TypeError:
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
        for launcher in _launchers:
            launcher.disarm()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disarm_in_child)
