"""What the host promises of a whole call on Hopper: no compile for a new size, graphs, streams, threads, a quick start."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

import tessera
from tessera import dispatch, jit
from tessera.bench.host import first_call

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)


def inputs(batch: int = 2, seqlen: int = 300, heads: int = 4, heads_kv: int = 2, dim: int = 128) -> tuple[torch.Tensor, ...]:
    def one(count: int) -> torch.Tensor:
        return torch.randn(batch, seqlen, count, dim, device="cuda", dtype=torch.bfloat16)

    return one(heads), one(heads_kv), one(heads_kv)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return tessera.attention(q, k, v, causal=True, backend="hopper", **options)


def close(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    group = q.shape[2] // k.shape[2]
    wide = [x.transpose(1, 2).double().repeat_interleave(repeats, 1) for x, repeats in ((q, 1), (k, group), (v, group))]
    ref = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True).transpose(1, 2)
    return bool((out.double() - ref).abs().max() < 0.03)


def test_sizes_and_strides_never_compile():
    attend(*inputs())
    jit.settle()  # what other lengths need is compiled beside the program
    before = jit.compiles()
    for batch, seqlen, heads, heads_kv in [(1, 1, 1, 1), (3, 77, 4, 1), (1, 1025, 2, 2), (2, 16, 12, 4), (5, 128, 4, 2)]:
        q, k, v = inputs(batch, seqlen, heads, heads_kv)
        assert close(attend(q, k, v), q, k, v), (batch, seqlen, heads, heads_kv)
    qkv = torch.randn(2, 3, 2, 200, 128, device="cuda", dtype=torch.bfloat16).permute(1, 0, 3, 2, 4)
    assert close(attend(*qkv), *qkv)
    assert jit.compiles() == before


def test_a_graph_replays_with_new_contents():
    q, k, v = inputs()
    attend(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v)
        twice = attend(out, k, v)
    for _ in range(3):
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        out.fill_(float("nan"))
        graph.replay()
        assert close(out, q, k, v)
        assert close(twice, out, k, v)


def test_a_graph_may_hold_the_first_call_of_a_kernel():
    q, k, v = inputs(dim=72)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v)
    graph.replay()
    assert close(out, q, k, v)


def test_streams_and_threads():
    right: dict[int, bool] = {}

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            q, k, v = inputs(seqlen=200 + 64 * index)
            outs = [attend(q, k, v) for _ in range(50)]
            same = all(torch.equal(outs[0], out) for out in outs)
            right[index] = same and close(outs[0], q, k, v)

    attend(*inputs())
    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == dict.fromkeys(range(4), True)


def test_a_call_does_not_wait_for_the_gpu():
    q, k, v = inputs()
    attend(q, k, v)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # about a tenth of a second
    start = time.perf_counter()
    out = attend(q, k, v)
    assert time.perf_counter() - start < 0.05
    assert close(out, q, k, v)


def test_first_calls_cold_and_warm(tmp_path: Path):
    cold = first_call("cuda", tmp_path / "cache", tmp_path / "bytecode")
    shape = (1, 333, 2, 128)
    planned = tessera.plan(shape, shape, causal=True, device="cuda", backend="hopper")
    assert cold.compiled == len(dispatch.load("hopper").kernels(planned)), "all that the kind needs at any length"
    assert cold.seconds < 6.0, "3 s on an idle machine"
    warm = first_call("cuda", tmp_path / "cache", tmp_path / "bytecode")
    assert (warm.compiled, warm.imported_triton) == (0, False)
    assert warm.seconds < 0.3
