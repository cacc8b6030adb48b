"""The host's time: microseconds until a call has given its kernels to the stream, and seconds that a process's first call takes.

It is what a caller waits for while the GPU is busy with earlier work. (On a CPU, which has no stream, it is the whole call.)
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from tessera import attention, attention_varlen, attention_with_kvcache, jit
from tessera.bench import flash_peers, machine
from tessera.bench.grids import square
from tessera.bench.machine import Machine
from tessera.bench.peers import Forward, Peer, Sdpa
from tessera.bench.report import plain, write_json
from tessera.bench.session import usable
from tessera.bench.timing import Call, Ratio, Schedule, interleaved, quartiles
from tessera.device import Device
from tessera.jit import stages
from tessera.operands import Request, bind

SCHEMA = 2
"""The version of the JSON form."""
OURS = "tessera"
_IN_FLIGHT = 200
"""Calls in a row: a stream takes about a thousand launches before its caller has to wait."""
_COLD_STARTS = 3
"""Odd, for a median: the first of them writes Python's bytecode, and may read libraries from a disk."""
_SMALL = square(64, 512, 1, 8, causal=True)
_PACKED = replace(_SMALL, lengths_q=(200, 312), lengths_k=(200, 312))
_BATCH, _HEADS, _HEADS_KV, _DIM, _PAGES, _PAGE_SIZE = 4, 32, 8, 128, 64, 64


class HostClock:
    """Time of calls in a row, over their number; then the device is waited for, which does not count."""

    def __init__(self, device: str):
        self.wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None

    def seconds(self, call: Call, repeats: int) -> float:
        self.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        taken = time.perf_counter() - start
        self.wait()
        return taken / repeats


@dataclass(frozen=True)
class FirstCall:
    """A first call in a process that has imported torch and tessera and used the device: what it took, and of that the stages of
    compiling and loading; and how many kernels were compiled, those beside the program (for other lengths) included."""

    seconds: float
    compiled: int
    imported_triton: bool
    stages: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        known = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in self.stages.items())
        triton = "with" if self.imported_triton else "without"
        return f"{self.seconds:.3f} s" + (f" ({known})" if known else "") + f", {self.compiled} kernels compiled, {triton} Triton"


@dataclass(frozen=True)
class HostReport:
    """`seconds`: by kind of call and by contender, each its median and quartiles. `cold`: the median of first calls, each with an
    empty cache on disk; `colds`: all of them, in their order; `warm`: one after the last of them."""

    device: str
    seconds: dict[str, dict[str, Ratio]]
    cold: FirstCall
    colds: tuple[FirstCall, ...]
    warm: FirstCall
    machine: Machine
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __str__(self) -> str:
        lines = []
        for kind, times in self.seconds.items():
            shown = ", ".join(f"{who} {1e6 * t.median:.1f} ({1e6 * t.low:.1f}-{1e6 * t.high:.1f})" for who, t in times.items())
            lines.append(f"{kind}: {shown} microseconds")
        lines.append(f"first call with an empty cache, median of {len(self.colds)}: {self.cold}")
        lines.append(f"first call with the cache on disk: {self.warm}")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write the JSON form; the folder is made."""
        write_json(path, plain(asdict(self)) | {"schema": SCHEMA, "kind": "host"})


def measured(device: str | None = None, fa3_folder: Path | None = None, rounds: int = 9) -> HostReport:
    """All kinds of calls, contenders in turns, and first calls. Raises ValueError where there is no such device."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    usable(device)
    schedule = Schedule(rounds=rounds, turn_s=0.05, most_repeats=_IN_FLIGHT, limit_s=10.0)
    with tempfile.TemporaryDirectory() as folder:
        caches = [Path(folder, str(number)) for number in range(_COLD_STARTS)]
        bytecode = Path(folder, "bytecode")
        colds = tuple(first_call(device, cache, bytecode) for cache in caches)
        warm = first_call(device, caches[-1], bytecode)
    seconds = {}
    for kind, calls in _kinds(device, fa3_folder):
        calls[OURS]()
        jit.settle()  # what is compiled beside the program would be in the times
        times = interleaved(calls, HostClock(device), schedule)
        seconds[kind] = {who: quartiles(list(taken)) for who, taken in times.items()}
    cold = sorted(colds, key=lambda call: call.seconds)[len(colds) // 2]
    return HostReport(device, seconds, cold, colds, warm, machine.describe())


def first_call(device: str, cache: Path, bytecode: Path) -> FirstCall:
    """Causal attention at head dim 128 in a new process, with binaries kept in `cache` and Python's bytecode in `bytecode`: what
    is installed has it, and some machines never write it, which is not to be measured."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_first_call, device, cache, bytecode).result()


def _first_call(device: str, cache: Path, bytecode: Path) -> FirstCall:
    os.environ["TESSERA_CACHE_DIR"] = str(cache)
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(bytecode)
    q = torch.randn(1, 333, 2, 128, device=device, dtype=torch.bfloat16)
    wait = HostClock(device).wait
    wait()
    start = time.perf_counter()
    with torch.no_grad():
        attention(q, q, q, causal=True)
    wait()
    taken = time.perf_counter() - start
    jit.settle()
    return FirstCall(taken, jit.compiles(), "triton" in sys.modules, stages.taken())


def _kinds(device: str, fa3_folder: Path | None) -> Iterator[tuple[str, dict[str, Call]]]:
    """Each kind of call by each who has it, small enough that the GPU is done before the host."""
    peers: tuple[Peer, ...] = (flash_peers.peers(fa3_folder)["fa3"], Sdpa())
    request, packed = (case.request(device, torch.bfloat16) for case in (_SMALL, _PACKED))
    yield "attention", _contenders(partial(attention, *request[:3], causal=True), request, peers)
    yield "packed sequences", _contenders(partial(attention_varlen, *packed[:5], causal=True), packed, peers)
    with torch.no_grad():
        for kind, step in _steps(device):
            yield kind, {OURS: step}
    trained, packed = (case.request(device, torch.bfloat16, requires_grad=True) for case in (_SMALL, _PACKED))
    problem, _ = bind(trained)
    forwards: dict[str, Forward] = {OURS: partial(attention, *trained[:3], causal=True), "sdpa": Sdpa().forward(trained, problem)}
    dout = torch.randn_like(request.q)
    yield "attention, forward and backward", {who: _with_backward(call, trained[:3], dout) for who, call in forwards.items()}
    ours = _with_backward(partial(attention_varlen, *packed[:5], causal=True), packed[:3], dout[0])
    yield "packed sequences, forward and backward", {OURS: ours}


def _contenders(ours: Call, request: Request, peers: tuple[Peer, ...]) -> dict[str, Call]:
    """Our call, and those of the peers who take the request."""
    problem, _ = bind(request)
    able = (peer for peer in peers if peer.why_not(problem, Device.of(request.q.device)) is None)
    return {OURS: ours} | {peer.name: peer.forward(request, problem) for peer in able}


def _with_backward(forward: Forward, inputs: tuple[torch.Tensor, ...], dout: torch.Tensor) -> Call:
    return lambda: torch.autograd.grad(forward(), inputs, dout)


def _steps(device: str) -> Iterator[tuple[str, Call]]:
    """Steps of a server over a paged cache: one query a sequence, the same appending with rotary embedding, 64 queries."""
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    pool = make(_PAGES, _PAGE_SIZE, _HEADS_KV, _DIM)
    pages = torch.zeros(_BATCH, _PAGES // _BATCH, dtype=torch.int32, device=device)
    lengths = torch.full((_BATCH,), _PAGE_SIZE, dtype=torch.int32, device=device)
    step = partial(attention_with_kvcache, cache_seqlens=lengths, page_table=pages, causal=True)
    one, new = make(_BATCH, 1, _HEADS, _DIM), make(_BATCH, 1, _HEADS_KV, _DIM)
    table = make(2 * _PAGE_SIZE, _DIM // 2)
    yield "decoding", partial(step, one, pool, pool.clone())
    yield "decoding, appending, rotary", partial(step, one, pool, pool.clone(), k=new, v=new, rotary_cos=table, rotary_sin=table)
    yield "64 queries over a cache", partial(step, make(_BATCH, 64, _HEADS, _DIM), pool, pool.clone())
