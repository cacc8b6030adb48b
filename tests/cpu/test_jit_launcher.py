"""The launcher against a stand-in for the driver that reads, through real foreign calls, what a launch passes."""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from dataclasses import replace

import pytest

from tessera import jit
from tessera.jit import driver, launcher
from tessera.jit.binary import Binary, Descriptor
from tessera.jit.launcher import Kernel
from tessera.jit.spec import parameter_layout

SPEC = jit.KernelSpec(
    "package.module:function",
    (
        ("n", jit.Scalar("i32")),
        ("tiles", jit.Tiles("bf16", (64, 64))),
        ("x", jit.Pointer("fp32")),
        ("scale", jit.Scalar("fp32")),
        ("m", jit.Scalar("i64")),
    ),
)
SIZES = [size for _, size in parameter_layout(SPEC)[1]] + [8, 8]
BLOB = bytes(range(152))
ENTER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


def a_binary(scratch: int = 0) -> Binary:
    tiles = (Descriptor("bf16", (64, 64), 3),)
    return Binary("entry", b"cubin", 384, 200_000, scratch, tiles, "Used 168 registers", "none")


class Cuda:
    """Reads each launch's configuration and parameters from memory, as the driver would."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], int, list[bytes], bytes]] = []
        self.statuses: list[int] = []
        self.cuLaunchKernelEx = ENTER(self.launch)

    def __getitem__(self, name: str):
        return getattr(self, name)

    def launch(self, config: int, function: int, parameters: int, extra: int | None) -> int:
        if self.statuses:
            return self.statuses.pop(0)
        *shape, stream, attributes, count = struct.unpack("7I4xQQI4x", ctypes.string_at(config, 56))
        pointers = (ctypes.c_void_p * len(SIZES)).from_address(parameters)
        passed = [ctypes.string_at(pointer, size) for pointer, size in zip(pointers, SIZES, strict=True)]
        assert function == 0xABC0
        assert extra is None
        self.launches.append((tuple(shape), stream, passed, ctypes.string_at(attributes, 72 * count)))
        return 0

    def cuGetErrorName(self, status, name):
        return 0

    def cuGetErrorString(self, status, text):
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    monkeypatch.setattr(driver, "library", lambda: fake)
    monkeypatch.setattr(driver, "load_function", lambda *_: 0xABC0)
    return fake


def test_grid_stream_and_arguments_arrive(cuda):
    kernel = Kernel(SPEC, a_binary(), 0)
    kernel(0x77, 10, 20, 30, -5, BLOB, 2**63, 0.375, -(2**40))
    kernel(0, 1, 2, 3, 6, BLOB[::-1], 16, 1.0, 7)
    (shape, stream, passed, attributes), second = cuda.launches
    assert shape == (10, 20, 30, 384, 1, 1, 200_000)
    assert (stream, attributes) == (0x77, b"")
    n, tile_map, *sizes_strides, x, scale, m, global_scratch, profile_scratch = passed
    assert struct.unpack("i", n) == (-5,)
    assert tile_map == BLOB[:128]
    assert b"".join(sizes_strides) == BLOB[128:]
    assert struct.unpack("Qfxxxxq", x + scale + b"0000" + m) == (2**63, 0.375, -(2**40))
    assert global_scratch == profile_scratch == bytes(8)
    assert second[0][:3] == (1, 2, 3)
    assert second[2][1] == BLOB[::-1][:128]


@pytest.mark.parametrize("last", range(6))
def test_a_prepared_launch_passes_the_same(cuda, last: int):
    """However many of its arguments are given once; it keeps them beside others, from thread to thread too."""
    kernel, arguments = Kernel(SPEC, a_binary(), 0), (-5, BLOB, 2**63, 0.375, -(2**40))
    kernel(0x77, 10, 20, 30, *arguments)
    first, rest = arguments[: 5 - last], arguments[5 - last :]
    launch, other = (kernel.prepare(grid, rest) for grid in ((10, 20, 30), (1, 1, 1)))
    other(1, first)
    thread = threading.Thread(target=launch, args=(0x77, first))
    thread.start()
    thread.join()
    launch(0x77, first)
    wanted, another, *found = cuda.launches
    assert found == [wanted, wanted]
    assert another == ((1, 1, 1, *wanted[0][3:]), 1, *wanted[2:])


def test_what_does_not_fit_a_prepared_launch_is_named(cuda):
    kernel = Kernel(SPEC, a_binary(), 0)
    with pytest.raises(TypeError, match=r"takes \(n: Scalar.*got \(str\)"):
        kernel.prepare((1, 1, 1), ("1",))
    launch = kernel.prepare((1, 1, 1), (1.0, 0))
    with pytest.raises(TypeError, match=r"takes \(n: Scalar.*got \(int, bytes\)"):
        launch(0, (1, BLOB))
    assert cuda.launches == []


def test_tensor_maps_lie_on_64_bytes(cuda):
    places = []
    kernel = Kernel(SPEC, a_binary(), 0)
    kernel._launcher._enqueue = lambda *passed: places.append(passed[2]._obj[1]) or 0
    kernel(0, 1, 1, 1, 1, BLOB, 0, 1.0, 0)
    assert places[0] % 64 == 0


def test_a_cluster_is_an_attribute(cuda):
    Kernel(replace(SPEC, cluster=2), a_binary(), 0)(0, 4, 1, 1, 1, BLOB, 0, 1.0, 0)
    attributes = cuda.launches[0][3]
    assert struct.unpack("I4x3I", attributes[:20]) == (4, 2, 1, 1), "CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION"
    assert struct.unpack("I4xI", attributes[72:84]) == (5, 1), "cluster scheduling: spread"


def test_arguments_that_do_not_fit_are_named(cuda):
    kernel = Kernel(SPEC, a_binary(), 0)
    for arguments in [(1, BLOB, 0, 1.0), (1.5, BLOB, 0, 1.0, 0), (2**31, BLOB, 0, 1.0, 0), (1, 5, 0, 1.0, 0)]:
        with pytest.raises(TypeError, match=r"takes \(n: Scalar.*tiles: bytes of tiles.*got \("):
            kernel(0, 1, 1, 1, *arguments)
    assert cuda.launches == []
    kernel(0, 1, 1, 1, 1, BLOB, 0, 1.0, 0)
    assert len(cuda.launches) == 1


def test_errors_of_the_driver_say_where(cuda):
    kernel = Kernel(SPEC, a_binary(), 3)
    cuda.statuses = [driver.INVALID_VALUE]
    with pytest.raises(driver.CudaError, match=r"entry on device 3 with a grid of \(0, 1, 1\)") as error:
        kernel(0, 0, 1, 1, 1, BLOB, 0, 1.0, 0)
    assert error.value.status == driver.INVALID_VALUE


def test_a_lost_context_is_found_again_once(cuda, entered):
    kernel = Kernel(SPEC, a_binary(), 3)
    cuda.statuses = [driver.INVALID_CONTEXT]
    kernel(0, 1, 1, 1, 1, BLOB, 0, 1.0, 0)
    assert (entered, len(cuda.launches)) == ([3], 1)
    cuda.statuses = [driver.INVALID_HANDLE, driver.INVALID_HANDLE]
    with pytest.raises(driver.CudaError):
        kernel(0, 1, 1, 1, 1, BLOB, 0, 1.0, 0)


def test_threads_never_share_memory(cuda):
    kernel = Kernel(SPEC, a_binary(), 0)

    def work(mark: int) -> None:
        for step in range(300):
            kernel(mark, mark, 1, 1, mark, bytes([mark]) * 152, mark, float(mark), step)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cuda.launches) == 1200
    for shape, stream, passed, _ in cuda.launches:
        assert shape[0] == stream == passed[1][0] == passed[0][0]
        assert set(passed[1]) == {stream}
    assert len(kernel._launcher._slots) <= 4


def test_a_kernel_that_wants_scratch_is_refused(cuda):
    with pytest.raises(RuntimeError, match="wants 128 bytes of scratch"):
        Kernel(SPEC, a_binary(scratch=128), 0)


def test_load_asks_the_compiler_once_a_device(cuda, monkeypatch):
    asked = []
    monkeypatch.setattr(launcher, "obtain", lambda spec: asked.append(spec) or a_binary())
    monkeypatch.setattr(launcher, "_kernels", {})
    same = jit.KernelSpec(SPEC.kernel, SPEC.arguments)
    assert jit.load(SPEC, 0) is jit.load(same, 0)
    assert jit.load(SPEC, 1) is not jit.load(SPEC, 0)
    assert len(asked) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_refuses_in_words(cuda, monkeypatch):
    kernel = Kernel(SPEC, a_binary(), 0)
    launch = kernel.prepare((1, 1, 1), (1.0, 0))
    monkeypatch.setattr(driver, "_process_that_used_cuda", os.getpid())
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for attempt in (
            lambda: kernel(0, 1, 1, 1, 1, BLOB, 0, 1.0, 0), lambda: launch(0, (1, BLOB, 0)), lambda: jit.load(SPEC, 7),
        ):  # fmt: skip
            try:
                attempt()
            except RuntimeError as error:
                said.append(str(error))
        os.write(writer, "|".join(said).encode())
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(reader, 10_000).decode().split("|")
    assert len(said) == 3
    assert all("'spawn'" in words for words in said)
    kernel(0, 1, 1, 1, 1, BLOB, 0, 1.0, 0)
    assert len(cuda.launches) == 1, "the parent goes on"


def test_no_gpu_is_said_in_words():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(RuntimeError, match="no CUDA driver here"):
            driver.library()
