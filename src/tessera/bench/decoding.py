"""Attention over a KV cache beside its peers: `python -m tessera.bench.decoding --grid GRID --fa3-dir DIR --json FILE`.

Grids: decode (one query, GB/s of K and V), chunk (chunks of a prompt, TFLOP/s), latent (MLA's absorbed form).

Every contender's first result is compared with the plain formula's (cache_accuracy.py). Then its calls are captured into a CUDA
graph that goes through enough buffers to leave nothing in L2, and the graphs are replayed in turns (timing.py says why). The
yardstick is a copy of 2 GB in the same turns: what the memory can move.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tessera.api import warmup
from tessera.bench import cache_accuracy
from tessera.bench.flash_peers import load_fa3
from tessera.bench.replay import replayable
from tessera.bench.report import write_json
from tessera.bench.timing import CudaClock
from tessera.jit.toolchain import triton_version
from tessera.serving.api import CacheOptions, attention_with_kvcache, plan_kvcache
from tessera.serving.plan import CachePlan

ROTATED_BYTES = 300 << 20
"""What a graph reads at least before it comes back to a buffer: several times L2."""
COPIED_BYTES = 2 << 30
Step = Callable[[int], Tensor]
"""A step reads buffer number i; out (batch, seqlen_q, heads_q, head_dim_v)."""


@dataclass(frozen=True)
class Cell:
    """One step of a server: `lengths` of the batch's sequences, in a cache of the longest one's capacity; `seqlen_q` queries
    each. `head_dim_v` where the values are the keys' first columns."""

    name: str
    lengths: tuple[int, ...]
    heads_q: int = 32
    heads_kv: int = 8
    head_dim: int = 128
    page_size: int | None = None
    seqlen_q: int = 1
    head_dim_v: int | None = None
    dtype: torch.dtype = torch.bfloat16
    """Of the cache; queries are bfloat16."""
    appended: int = 0
    """Rows that the step appends to each sequence, with rotary embedding."""

    @property
    def bytes(self) -> int:
        """Of K and V that have to be read."""
        return sum(self.lengths) * self.heads_kv * self.head_dim * self.dtype.itemsize * (2 if self.head_dim_v is None else 1)

    @property
    def flops(self) -> int:
        """Of both products, without a mask."""
        dims = self.head_dim + (self.head_dim_v or self.head_dim)
        return 2 * sum(self.lengths) * self.seqlen_q * self.heads_q * dims

    @property
    def capacity(self) -> int:
        return max(self.lengths)


def ragged_lengths(count: int = 64, shortest: int = 100, longest: int = 32768) -> tuple[int, ...]:
    """Lengths spread evenly on a logarithmic scale, in no order."""
    lengths = [round(shortest * (longest / shortest) ** (i / (count - 1))) for i in range(count)]
    return tuple(lengths[(i * 37) % count] for i in range(count))


def cells() -> Iterator[Cell]:
    """What the README's table shows."""
    for batch in (1, 4, 16, 64):
        for length in (8192, 32768, 131072):
            yield Cell(f"{batch} x {length // 1024}k", (length,) * batch)
    yield Cell("ragged 64 x 100..32k", ragged_lengths())
    for page in (256, 64, 16, 8):
        yield Cell(f"16 x 8k pages of {page}", (8192,) * 16, page_size=page)
    yield Cell("16 x 8k appending, rotary", (8192,) * 16, page_size=64, appended=1)
    for batch in (1, 16):
        yield Cell(f"{batch} x 32k e4m3", (32768,) * batch, dtype=torch.float8_e4m3fn)
    for batch in (1, 4):
        yield Cell(f"{batch} x 512", (512,) * batch)
    for exponent in range(9, 18):
        batch, length = 1 << (17 - exponent), 1 << exponent
        yield Cell(f"16/2 heads, {batch} x {length}", (length,) * batch, heads_q=16, heads_kv=2)


def chunk_cells() -> Iterator[Cell]:
    """Many rows: 64 queries a sequence and fewer and more, contiguous and in pages."""
    for batch in (1, 4, 16):
        yield Cell(f"64 queries, {batch} x 16k", (16384,) * batch, seqlen_q=64)
    for page in (256, 64, 16, 8, 1):
        yield Cell(f"64 queries, 1 x 16k pages of {page}", (16384,), seqlen_q=64, page_size=page)
    for queries in (16, 32, 128, 1024):
        yield Cell(f"{queries} queries, 1 x 16k", (16384,), seqlen_q=queries)
    for dim in (64, 256):
        yield Cell(f"64 queries, 1 x 16k, d{dim}", (16384,), seqlen_q=64, head_dim=dim)


def latent_cells() -> Iterator[Cell]:
    """MLA's absorbed form: one latent row of 512 + 64 columns a key."""
    mla: dict[str, Any] = {"heads_kv": 1, "head_dim": 576, "head_dim_v": 512}
    for batch, length in ((128, 4096), (66, 8192), (16, 8192), (4, 16384), (1, 32768)):
        yield Cell(f"128 heads, {batch} x {length // 1024}k pages of 64", (length,) * batch, heads_q=128, page_size=64, **mla)
    yield Cell("128 heads, 66 x 8k", (8192,) * 66, heads_q=128, **mla)
    yield Cell("128 heads, 66 x 8k pages of 1", (8192,) * 66, heads_q=128, page_size=1, **mla)
    yield Cell("128 heads, 2 queries, 66 x 4k pages of 64", (4096,) * 66, heads_q=128, page_size=64, seqlen_q=2, **mla)
    yield Cell("16 heads, 128 x 8k pages of 64", (8192,) * 128, heads_q=16, page_size=64, **mla)


GRIDS = {"decode": cells, "chunk": chunk_cells, "latent": latent_cells}


@dataclass
class Caches:
    """A cell's tensors: `q`, and as many (k, v, page_table) as leave nothing in L2, cut from one large random tensor; v is None
    where the values are columns of k. `new`: the rows that a step appends, k and v, and the rotary tables, cosines and sines."""

    cell: Cell
    storage: Tensor
    q: Tensor = field(init=False)
    lengths: Tensor = field(init=False)
    buffers: list[tuple[Tensor, Tensor | None, Tensor | None]] = field(init=False)
    new: tuple[Tensor, Tensor, Tensor] | None = field(init=False)

    def __post_init__(self) -> None:
        cell, device = self.cell, self.storage.device
        batch = len(cell.lengths)
        self.q = torch.randn(batch, cell.seqlen_q, cell.heads_q, cell.head_dim, dtype=torch.bfloat16, device=device)
        self.lengths = torch.tensor(cell.lengths, dtype=torch.int32, device=device) - cell.appended
        shape: tuple[int, ...] = (batch, cell.capacity, cell.heads_kv, cell.head_dim)
        table = None
        if cell.page_size is not None:
            count = batch * cell.capacity // cell.page_size
            shape = (count, cell.page_size, cell.heads_kv, cell.head_dim)
            table = torch.randperm(count, device=device).int().view(batch, -1)
        storage = self.storage if cell.dtype == self.storage.dtype else self.storage[: 1 << 30].to(cell.dtype)
        size = math.prod(shape)
        wanted = max(1, math.ceil(ROTATED_BYTES / cell.bytes))
        each = 2 if cell.head_dim_v is None else 1
        count = min(wanted, storage.numel() // (each * size))
        parts = storage[: each * size * count].view(count, each, *shape)
        self.buffers = [(part[0], part[1] if each == 2 else None, table) for part in parts]
        rows, draw = (
            (batch, cell.appended, cell.heads_kv, cell.head_dim),
            partial(torch.randn, dtype=torch.bfloat16, device=device),
        )
        self.new = (draw(rows), draw(rows), draw(cell.capacity, cell.head_dim // 2)) if cell.appended else None


def contenders(caches: Caches, fa3: Any | None) -> dict[str, Step]:
    """Everyone that serves the cell, by name."""
    cell, q, lengths = caches.cell, caches.q, caches.lengths
    options: CacheOptions = {"causal": True, "head_dim_v": cell.head_dim_v}
    if caches.new is not None:
        new_k, new_v, angles = caches.new
        options |= {"k": new_k, "v": new_v, "rotary_cos": angles, "rotary_sin": angles, "rotary_interleaved": False}

    def ours(i: int) -> Tensor:
        k, v, table = caches.buffers[i]
        asked: CacheOptions = {**options, "page_table": table}
        return attention_with_kvcache(q, k, v, cache_seqlens=lengths, **asked)

    steps: dict[str, Step] = {"tessera": ours}
    if cell.dtype != q.dtype or cell.appended:
        return steps  # the peers' calls below have neither
    one_row = cell.seqlen_q == 1 and cell.head_dim_v is None
    if fa3 is not None and (not one_row or cell.page_size is None or cell.page_size >= 64):
        steps["fa3"] = _fa3_step(caches, fa3)
    if one_row and cell.page_size is None and len(set(cell.lengths)) == 1:
        for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("fa2", SDPBackend.FLASH_ATTENTION)):
            steps[name] = partial(_sdpa_step, caches, backend)
    return steps


def _fa3_step(caches: Caches, fa3: Any) -> Step:
    """FlashAttention-3 with scheduler metadata; MLA's queries in two parts, those for the 64 columns with positions first."""
    cell, q, lengths = caches.cell, caches.q, caches.lengths
    latent = cell.head_dim_v or 0
    dims = (cell.head_dim - latent, latent or cell.head_dim)
    causal = cell.seqlen_q > 1
    metadata = fa3.get_scheduler_metadata(
        len(cell.lengths), cell.seqlen_q, cell.capacity, cell.heads_q, cell.heads_kv, *dims, q.dtype, lengths,
        is_causal=causal, num_splits=0, **({} if cell.page_size is None else {"page_size": cell.page_size}),
    )  # fmt: skip
    options = {"seqused_k": lengths, "scheduler_metadata": metadata, "num_splits": 0, "is_causal": causal}
    options["softmax_scale"] = cell.head_dim**-0.5

    def step(i: int) -> Tensor:
        k, v, table = caches.buffers[i]
        paged = {} if table is None else {"page_table": table}
        if v is None:
            results = fa3.fwd(q[..., latent:], k[..., latent:], k[..., :latent], q_v=q[..., :latent], **options, **paged)
        else:
            results = fa3.fwd(q, k, v, **options, **paged)
        out: Tensor = results[0]
        return out

    return step


def _sdpa_step(caches: Caches, backend: SDPBackend, i: int) -> Tensor:
    k, v, _ = caches.buffers[i]
    values = k if v is None else v
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(
            caches.q.transpose(1, 2), k.transpose(1, 2), values.transpose(1, 2), enable_gqa=True
        ).transpose(1, 2)


@dataclass(frozen=True)
class Graph:
    """`steps` calls as one CUDA graph, and what it was captured from: the graph reads tensors that only `step` may hold."""

    replay: Callable[[], None]
    steps: int
    step: Step

    @staticmethod
    def of(step: Step, buffers: int, steps: int) -> Graph:
        def run() -> None:
            for i in range(steps):
                step(i % buffers)

        replay = replayable(run, torch.device("cuda", torch.cuda.current_device()))
        replay()
        torch.cuda.synchronize()
        return Graph(replay, steps, step)

    def seconds(self) -> float:
        """Of one call, over one replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(CudaClock.QUEUE_CYCLES)  # the host launches the graph meanwhile
        start.record()
        self.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / self.steps


@dataclass(frozen=True)
class Timed:
    """A cell's outcome by contender: microseconds a call, GB/s of K and V, TFLOP/s; why some could not run, or were wrong."""

    cell: str
    microseconds: dict[str, float]
    gigabytes_per_second: dict[str, float]
    teraflops_per_second: dict[str, float]
    absent: dict[str, str]

    def against(self) -> dict[str, float]:
        """How many times faster we are than each peer."""
        ours = self.microseconds.get("tessera", math.inf)
        return {name: time / ours for name, time in self.microseconds.items() if name not in ("tessera", "copy")}


def time_cell(cell: Cell, storage: Tensor, fa3: Any | None, rounds: int) -> Timed:
    """Time everyone that serves the cell, in turns."""
    caches = Caches(cell, storage)
    steps = max(len(caches.buffers), min(60, math.ceil(2e-3 * 4e12 / cell.bytes)))
    graphs: dict[str, Graph] = {}
    absent: dict[str, str] = {}
    standard = cache_accuracy.parts(caches)
    for name, step in contenders(caches, fa3).items():
        try:
            out = step(0)
            fault = next((fault for part in standard if (fault := part.fault(out)) is not None), None)
            if fault is not None:
                absent[name] = fault
                continue
            graphs[name] = Graph.of(step, len(caches.buffers), steps)
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    halves = storage[: COPIED_BYTES // 2].view(2, -1)
    graphs["copy"] = Graph.of(lambda _: torch.mul(halves[1], 1.0, out=halves[0]), 1, 2)  # copy_ would be a slower graph node
    medians = {name: statistics.median(values) for name, values in _in_turns(graphs, rounds).items()}
    moved = {name: COPIED_BYTES if name == "copy" else cell.bytes for name in medians}
    return Timed(
        cell.name,
        {name: seconds * 1e6 for name, seconds in medians.items()},
        {name: moved[name] / seconds / 1e9 for name, seconds in medians.items()},
        {name: cell.flops / seconds / 1e12 for name, seconds in medians.items() if name != "copy"},
        absent,
    )


def _in_turns(graphs: dict[str, Graph], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call by contender, round by round. The copy begins each round and leaves L2 full of what memory has yet to
    get; whoever comes next would pay for that, so it runs once before it is timed."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    names = [name for name in graphs if name != "copy"]
    for number in range(rounds):
        first = number % max(1, len(names))
        order = names[first:] + names[:first]
        times["copy"].append(graphs["copy"].seconds())
        for name in order[:1]:
            graphs[name].replay()
        for name in order:
            times[name].append(graphs[name].seconds())
    return times


def line(timed: Timed) -> str:
    """One cell in one line."""
    ratios = timed.against()
    work = timed.teraflops_per_second
    words = [f"{name} {timed.microseconds[name]:.1f}us {rate:.0f}" + (f"/{work[name]:.0f}" if name in work else "")
             + (f" x{ratios[name]:.3f}" if name in ratios else "")
             for name, rate in timed.gigabytes_per_second.items()]  # fmt: skip
    return f"{timed.cell:<34} " + "  ".join(words + [f"{name}: {why}" for name, why in timed.absent.items()])


def plan_of(cell: Cell) -> CachePlan:
    """What the cell's step will run on an H200."""
    batch, page = len(cell.lengths), cell.page_size
    shape = (batch, cell.capacity) if page is None else (batch * cell.capacity // page, page)
    k_cache = (*shape, cell.heads_kv, cell.head_dim)
    options: dict[str, Any] = {} if page is None else {"page_table": (batch, cell.capacity // page)}
    if cell.appended:
        options["k"] = options["v"] = (batch, cell.appended, cell.heads_kv, cell.head_dim)
        options["rotary_cos"] = options["rotary_sin"] = (cell.capacity, cell.head_dim // 2)
        options["rotary_interleaved"] = False
    q, v_cache = (batch, cell.seqlen_q, cell.heads_q, cell.head_dim), k_cache if cell.head_dim_v is None else None
    options |= {"head_dim_v": cell.head_dim_v, "causal": True}
    return plan_kvcache(q, k_cache, v_cache, cache_dtype=cell.dtype, device="h200", **options)


def _here() -> dict[str, str]:
    """Where and when a record was made."""
    today = datetime.now(UTC).date().isoformat()
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton_version(), "date": today}


def main(arguments: Sequence[str] | None = None) -> int:
    """Time the cells; prints a line each and writes the JSON after each."""
    parser = argparse.ArgumentParser(prog="python -m tessera.bench.decoding", description=__doc__)
    parser.add_argument("--grid", choices=tuple(GRIDS), default="decode", help="which cells")
    parser.add_argument("-k", dest="only", default="", help="only cells whose name contains this")
    parser.add_argument("--fa3-dir", type=Path, help="a folder with FlashAttention-3's fa3.so")
    parser.add_argument("--json", type=Path, help="write the results here, after every cell")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which no cell is begun")
    asked = parser.parse_args(arguments)
    fa3 = None if asked.fa3_dir is None else load_fa3(asked.fa3_dir)
    chosen = [cell for cell in GRIDS[asked.grid]() if asked.only in cell.name]
    largest = max(2 * len(cell.lengths) * cell.capacity * cell.heads_kv * cell.head_dim for cell in chosen)
    storage = torch.empty(max(largest, COPIED_BYTES // 2, ROTATED_BYTES), dtype=torch.bfloat16, device="cuda")
    for piece in storage.split(1 << 30):
        piece.normal_()
    warmup(map(plan_of, chosen))  # side by side: one after the other would take most of the time
    results: list[Timed] = []
    start = time.monotonic()
    for cell in chosen:
        if time.monotonic() - start > asked.deadline:
            break
        results.append(time_cell(cell, storage, fa3, asked.rounds))
        print(line(results[-1]), flush=True)
        if asked.json is not None:
            write_json(asked.json, {**_here(), "cells": [asdict(r) for r in results]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
