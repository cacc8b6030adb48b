"""The launcher on a GPU: arguments, tensor maps, streams, graphs, threads, contexts, forks."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tessera import Unsupported, jit
from tessera.jit import driver, tensormap
from tessera.jit.launcher import Kernel
from tessera.jit.spec import parameter_layout

sys.path.insert(0, str(Path(__file__).parents[1]))

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

M = N = K = 64


def matmul_spec(element: str = "bf16") -> jit.KernelSpec:
    tiles = jit.Tiles(element, (M, K))
    return jit.KernelSpec(
        kernel="jit_kernels.matmul:matmul",
        arguments=(
            ("a", tiles),
            ("b", tiles),
            ("c", tiles),
            ("marks_ptr", jit.Pointer("i64")),
            ("scale", jit.Scalar("fp32")),
            ("depth", jit.Scalar("i32")),
            ("mark", jit.Scalar("i64")),
        ),
        constants=(("M", M), ("N", N), ("K", K), ("DTYPE", jit.Dtype(element))),
    )


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSERA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def run(kernel: Kernel, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0, mark: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """C = scale * a b^T into poisoned memory, and the marks."""
    rows, columns = a.shape[0], b.shape[0]
    c = torch.full((rows, columns), float("nan"), dtype=a.dtype, device=a.device)
    grid = (-(-rows // M), -(-columns // N))
    marks = torch.zeros(grid[0] * grid[1], dtype=torch.int64, device=a.device)
    launch(kernel, a, b, c, marks, scale, mark)
    return c, marks


def launch(kernel: Kernel, a, b, c, marks, scale: float = 1.0, mark: int = 7) -> None:
    maps = [encode(x.data_ptr(), tuple(x.shape), x.stride()) for encode, x in zip(kernel.tiles, (a, b, c), strict=True)]
    grid = (-(-a.shape[0] // M), -(-b.shape[0] // N))
    kernel(jit.current_stream(a.device.index), *grid, 1, *maps, marks.data_ptr(), scale, a.shape[1], mark)


def expected(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return scale * (a.double() @ b.double().T)


def close(c: torch.Tensor, ref: torch.Tensor) -> bool:
    return bool((c.double() - ref).abs().max() <= 2.0**-7 * ref.abs().max())


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    return jit.load(matmul_spec(), 0)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def test_every_kind_of_argument_arrives_and_no_size_compiles(kernel):
    before = jit.compiles()
    for rows, columns, depth in [(64, 64, 64), (200, 72, 136), (1, 64, 64), (513, 8, 1000), (128, 256, 8)]:
        a, b = random(rows, depth), random(columns, depth)
        c, marks = run(kernel, a, b, scale=0.375, mark=2**40 + rows)
        assert close(c, expected(a, b, 0.375)), (rows, columns, depth)
        assert bool((marks == 2**40 + rows).all())
    assert jit.compiles() == before


def test_float16_is_another_binary():
    kernel = jit.load(matmul_spec("fp16"), 0)
    a, b = random(100, 128, dtype=torch.float16), random(64, 128, dtype=torch.float16)
    assert close(run(kernel, a, b)[0], expected(a, b))


def test_odd_strides(kernel):
    wide = random(96, 4, 128)
    a, b = wide[:, 1], random(64, 128)
    assert close(run(kernel, a, b)[0], expected(a, b)), "rows far apart"
    one = random(1000)[8:136].as_strided((1, 128), (13, 1))
    assert close(run(kernel, one, b)[0], expected(one, b)), "a single row with a stride TMA could not take"
    same = random(1, 128).expand(70, 128)
    assert close(run(kernel, same, b)[0], expected(same, b)), "stride 0"


def test_what_tma_cannot_take_is_said_before_and_refused_after(kernel):
    base = random(64 * 128 + 8)
    off = base[1 : 1 + 64 * 128].view(64, 128)
    assert [reason.argument for reason in jit.why_not_tma(off.data_ptr(), off.shape, off.stride(), 2)] == ["data_ptr"]
    with pytest.raises(Unsupported, match="16-byte"):
        kernel.tiles[0](off.data_ptr(), tuple(off.shape), off.stride())
    good = base[: 64 * 128].view(64, 128)
    kernel.tiles[0](good.data_ptr(), tuple(good.shape), good.stride())
    with pytest.raises(Unsupported, match="16-byte"):
        kernel.tiles[0](off.data_ptr(), tuple(off.shape), off.stride())


def test_map_of_a_moved_tensor_equals_one_encoded_afresh(kernel):
    first, second = random(64, 128), random(64, 128)
    encode = kernel.tiles[0]
    encode(first.data_ptr(), (64, 128), (128, 1))
    moved = encode(second.data_ptr(), (64, 128), (128, 1))
    assert moved == tensormap.TileEncoder(encode.descriptor)(second.data_ptr(), (64, 128), (128, 1))
    assert moved != encode(first.data_ptr(), (64, 128), (128, 1))


def test_graph_capture_loads_inside_and_replays():
    spec = matmul_spec()
    a, b = random(130, 64), random(64, 64)
    c, marks = torch.empty(130, 64, device="cuda", dtype=a.dtype), torch.zeros(3, dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fresh = Kernel(spec, jit.compile(spec), 0)  # its code is loaded while the stream is being captured
        launch(fresh, a, b, c, marks)
        launch(fresh, a, b, c, marks, scale=2.0)
    for _ in range(3):
        a.copy_(random(130, 64))
        c.fill_(float("nan"))
        graph.replay()
        assert close(c, expected(a, b, 2.0))


def test_streams_and_threads_that_never_used_cuda(kernel):
    results: dict[int, bool] = {}

    def work(
        index: int, stream: torch.cuda.Stream, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, marks: torch.Tensor
    ) -> None:
        maps = [encode(x.data_ptr(), tuple(x.shape), x.stride()) for encode, x in zip(kernel.tiles, (a, b, c), strict=True)]
        for step in range(300):  # the first launch is this thread's first use of CUDA
            kernel(stream.cuda_stream, 3, 1, 1, *maps, marks.data_ptr(), float(step + index), 64, step)
        stream.synchronize()
        results[index] = close(c, expected(a, b, 299.0 + index)) and bool((marks == 299).all())

    threads = []
    for index in range(4):
        a, b = random(130, 64), random(64, 64)
        c, marks = torch.empty(130, 64, device="cuda", dtype=a.dtype), torch.zeros(3, dtype=torch.int64, device="cuda")
        threads.append(threading.Thread(target=work, args=(index, torch.cuda.Stream(), a, b, c, marks)))
    torch.cuda.synchronize()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), True)


def test_another_context_is_current(kernel):
    """Stands in for another device: the kernel's own context must be found, and the other one be current again after."""
    a, b = random(70, 64), random(64, 64)
    c, marks = torch.empty(70, 64, device="cuda", dtype=a.dtype), torch.zeros(2, dtype=torch.int64, device="cuda")
    maps = [encode(x.data_ptr(), tuple(x.shape), x.stride()) for encode, x in zip(kernel.tiles, (a, b, c), strict=True)]
    torch.cuda.synchronize()
    cuda, other, now = driver.library(), ctypes.c_void_p(), ctypes.c_void_p()
    driver.check("cuCtxCreate", cuda.cuCtxCreate_v2(ctypes.byref(other), 0, 0))
    try:
        kernel(0, 2, 1, 1, *maps, marks.data_ptr(), 1.0, 64, 5)
        cuda.cuCtxGetCurrent(ctypes.byref(now))
    finally:
        driver.check("cuCtxDestroy", cuda.cuCtxDestroy_v2(other))
    assert now.value == other.value
    torch.cuda.synchronize()
    assert close(c, expected(a, b))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices_from_one_thread(kernel):
    """The current device stays 0 while kernels go to either, on the default stream and on another."""
    kernels = (kernel, jit.load(kernel.spec, 1))
    for stream in (None, torch.cuda.Stream(1)):
        for device in (1, 0, 1):
            a, b = (torch.randn(rows, 64, device=f"cuda:{device}", dtype=torch.bfloat16) for rows in (130, 64))
            torch.cuda.synchronize(device)
            with torch.cuda.stream(stream) if device == 1 else nullcontext():
                torch.cuda.set_device(0)
                c, _ = run(kernels[device], a, b)
            torch.cuda.synchronize(device)
            assert torch.cuda.current_device() == 0
            assert close(c, expected(a, b))


def test_a_launch_does_not_wait_for_the_gpu(kernel):
    a, b = random(64, 64), random(64, 64)
    run(kernel, a, b)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # about a tenth of a second
    start = time.perf_counter()
    c, _ = run(kernel, a, b)
    assert time.perf_counter() - start < 0.05
    assert close(c, expected(a, b))


def test_errors_are_words(kernel):
    with pytest.raises(TypeError, match=r"takes \(a: bytes of tiles.*got \(int\)"):
        kernel(0, 1, 1, 1, 5)
    a = random(64, 64)
    maps = [encode(a.data_ptr(), (64, 64), (64, 1)) for encode in kernel.tiles]
    with pytest.raises(driver.CudaError, match=r"grid of \(0, 1, 1\).*INVALID_VALUE"):
        kernel(0, 0, 1, 1, *maps, 0, 1.0, 64, 1)


def test_a_cluster_is_launched():
    spec = jit.KernelSpec("jit_kernels.cluster:cluster_size", (("out_ptr", jit.Pointer("i32")),), cluster=2)
    out = torch.zeros(8, dtype=torch.int32, device="cuda")
    jit.load(spec, 0)(jit.current_stream(0), 8, 1, 1, out.data_ptr())
    assert out.tolist() == [2] * 8


def test_partitions_share_a_text():
    """Each with its own number, its own barrier and its own place in shared memory; the default one goes on behind it."""
    arguments = (("out_ptr", jit.Pointer("i32")), ("after_ptr", jit.Pointer("i32")), ("factor", jit.Scalar("i32")))
    out, after = torch.zeros(384, dtype=torch.int32, device="cuda"), torch.zeros(129, dtype=torch.int32, device="cuda")
    kernel = jit.load(jit.KernelSpec("jit_kernels.sharing:three_writers", arguments), 0)
    kernel(jit.current_stream(0), 1, 1, 1, out.data_ptr(), after.data_ptr(), 1000)
    assert out.tolist() == [1000 * number + i for number in range(3) for i in range(128)]
    assert after.tolist() == [*range(128), 1]


def test_the_cubin_declares_the_parameters_that_a_launch_passes(kernel):
    """What the driver will copy from each of our pointers (cuFuncGetParamInfo) is what lies there."""
    cuda, found = driver.library(), []
    function = ctypes.c_void_p(driver.load_function(0, kernel.binary.cubin, kernel.binary.entry, kernel.binary.shared))
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    while cuda.cuFuncGetParamInfo(function, ctypes.c_size_t(len(found)), ctypes.byref(offset), ctypes.byref(size)) == 0:
        found.append(size.value)
    assert found == [size for _, size in parameter_layout(kernel.spec)[1]] + [8, 8]


def test_a_forked_child_refuses_in_words(kernel):
    a = random(64, 64)
    maps = [encode(a.data_ptr(), (64, 64), (64, 1)) for encode in kernel.tiles]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for attempt in (lambda: kernel(0, 1, 1, 1, *maps, 0, 1.0, 64, 1), lambda: jit.load(matmul_spec("fp32"), 0)):
            try:
                attempt()
                said.append("launched")
            except RuntimeError as error:
                said.append(str(error))
        os.write(writer, "|".join(said).encode())
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(reader, 10000).decode().split("|")
    assert len(said) == 2
    assert all("spawn" in words for words in said)
