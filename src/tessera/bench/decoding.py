"""Decoding from a KV cache beside its peers, in GB/s of K and V: `python -m tessera.bench.decoding --fa3-dir DIR --json FILE`.

Every contender's calls are captured into a CUDA graph that goes through enough buffers to leave nothing in L2, and the graphs are
replayed in turns (timing.py says why). The yardstick is a copy of 2 GB in the same turns: what the memory can move.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tessera.bench.flash_peers import load_fa3
from tessera.serving.api import attention_with_kvcache

ROTATED_BYTES = 300 << 20
"""What a graph reads at least before it comes back to a buffer: several times L2."""
COPIED_BYTES = 2 << 30
Step = Callable[[int], object]
"""A step reads buffer number i."""


@dataclass(frozen=True)
class Cell:
    """One step of a server: `lengths` of the batch's sequences, in a cache of the longest one's capacity."""

    name: str
    lengths: tuple[int, ...]
    heads_q: int = 32
    heads_kv: int = 8
    head_dim: int = 128
    page_size: int | None = None

    @property
    def bytes(self) -> int:
        """Of K and V, bfloat16, that have to be read."""
        return sum(self.lengths) * self.heads_kv * self.head_dim * 4

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
    for batch in (1, 4):
        yield Cell(f"{batch} x 512", (512,) * batch)
    for exponent in range(9, 18):
        batch, length = 1 << (17 - exponent), 1 << exponent
        yield Cell(f"16/2 heads, {batch} x {length}", (length,) * batch, heads_q=16, heads_kv=2)


@dataclass
class Caches:
    """A cell's tensors: `q`, and as many (k, v, page_table) as leave nothing in L2, cut from one large random tensor."""

    cell: Cell
    storage: Tensor
    q: Tensor = field(init=False)
    lengths: Tensor = field(init=False)
    buffers: list[tuple[Tensor, Tensor, Tensor | None]] = field(init=False)

    def __post_init__(self) -> None:
        cell, device = self.cell, self.storage.device
        batch = len(cell.lengths)
        self.q = torch.randn(batch, 1, cell.heads_q, cell.head_dim, dtype=torch.bfloat16, device=device)
        self.lengths = torch.tensor(cell.lengths, dtype=torch.int32, device=device)
        shape: tuple[int, ...] = (batch, cell.capacity, cell.heads_kv, cell.head_dim)
        table = None
        if cell.page_size is not None:
            count = batch * cell.capacity // cell.page_size
            shape = (count, cell.page_size, cell.heads_kv, cell.head_dim)
            table = torch.randperm(count, device=device).int().view(batch, -1)
        size = math.prod(shape)
        wanted = max(1, math.ceil(ROTATED_BYTES / cell.bytes))
        count = min(wanted, self.storage.numel() // (2 * size))
        parts = self.storage[: 2 * size * count].view(count, 2, *shape)
        self.buffers = [(part[0], part[1], table) for part in parts]


def contenders(caches: Caches, fa3: Any | None) -> dict[str, Step]:
    """Everyone that serves the cell, by name."""
    cell, q, lengths = caches.cell, caches.q, caches.lengths

    def ours(schedule: str | None, i: int) -> object:
        k, v, table = caches.buffers[i]
        return attention_with_kvcache(q, k, v, cache_seqlens=lengths, page_table=table, schedule=schedule, causal=True)

    steps: dict[str, Step] = {"tessera": partial(ours, None)}
    steps |= {f"tessera {schedule}": partial(ours, schedule) for schedule in ("split", "stream_k")}
    if fa3 is not None and (cell.page_size is None or cell.page_size >= 64):
        steps["fa3"] = _fa3_step(caches, fa3)
    if cell.page_size is None and len(set(cell.lengths)) == 1:
        for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("fa2", SDPBackend.FLASH_ATTENTION)):
            steps[name] = partial(_sdpa_step, caches, backend)
    return steps


def _fa3_step(caches: Caches, fa3: Any) -> Step:
    cell, q, lengths = caches.cell, caches.q, caches.lengths
    metadata = fa3.get_scheduler_metadata(
        len(cell.lengths), 1, cell.capacity, cell.heads_q, cell.heads_kv, cell.head_dim, cell.head_dim, q.dtype, lengths,
        is_causal=False, num_splits=0, **({} if cell.page_size is None else {"page_size": cell.page_size}),
    )  # fmt: skip

    def step(i: int) -> object:
        k, v, table = caches.buffers[i]
        paged = {} if table is None else {"page_table": table}
        return fa3.fwd(q, k, v, seqused_k=lengths, scheduler_metadata=metadata, num_splits=0, is_causal=False, **paged)

    return step


def _sdpa_step(caches: Caches, backend: SDPBackend, i: int) -> object:
    k, v, _ = caches.buffers[i]
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(
            caches.q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True
        )


@dataclass(frozen=True)
class Graph:
    """`steps` calls as one CUDA graph."""

    graph: torch.cuda.CUDAGraph
    steps: int

    @staticmethod
    def of(step: Step, buffers: int, steps: int) -> Graph:
        aside = torch.cuda.Stream()
        with torch.cuda.stream(aside):
            step(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(steps):
                step(i % buffers)
        graph.replay()
        torch.cuda.synchronize()
        return Graph(graph, steps)

    def seconds(self) -> float:
        """Of one call, over one replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / self.steps


@dataclass(frozen=True)
class Timed:
    """A cell's outcome: microseconds a call and GB/s of K and V by contender; why some could not run."""

    cell: str
    microseconds: dict[str, float]
    gigabytes_per_second: dict[str, float]
    absent: dict[str, str]

    def against(self) -> dict[str, float]:
        """How many times faster we are than each peer."""
        ours = self.microseconds.get("tessera", math.inf)
        return {name: time / ours for name, time in self.microseconds.items() if not name.startswith("tessera")}


def time_cell(cell: Cell, storage: Tensor, fa3: Any | None, rounds: int) -> Timed:
    """Time everyone that serves the cell, in turns."""
    caches = Caches(cell, storage)
    steps = max(len(caches.buffers), min(60, math.ceil(2e-3 * 4e12 / cell.bytes)))
    graphs: dict[str, Graph] = {}
    absent: dict[str, str] = {}
    for name, step in contenders(caches, fa3).items():
        try:
            graphs[name] = Graph.of(step, len(caches.buffers), steps)
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    halves = storage[: COPIED_BYTES // 2].view(2, -1)
    graphs["copy"] = Graph.of(lambda _: halves[0].copy_(halves[1]), 1, 2)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    names = list(graphs)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(graphs[name].seconds())
    medians = {name: statistics.median(values) for name, values in times.items()}
    moved = {name: COPIED_BYTES if name == "copy" else cell.bytes for name in medians}
    return Timed(
        cell.name,
        {name: seconds * 1e6 for name, seconds in medians.items()},
        {name: moved[name] / seconds / 1e9 for name, seconds in medians.items()},
        absent,
    )


def line(timed: Timed) -> str:
    """One cell in one line."""
    ratios = timed.against() | {"copy": math.nan}
    words = [f"{name} {timed.microseconds[name]:.1f}us {rate:.0f}" + (f" x{ratios[name]:.2f}" if name in ratios else "")
             for name, rate in timed.gigabytes_per_second.items()]  # fmt: skip
    return f"{timed.cell:<26} " + "  ".join(words + [f"{name}: {why}" for name, why in timed.absent.items()])


def main(arguments: Sequence[str] | None = None) -> int:
    """Time the cells; prints a line each and writes the JSON after each."""
    parser = argparse.ArgumentParser(prog="python -m tessera.bench.decoding", description=__doc__)
    parser.add_argument("-k", dest="only", default="", help="only cells whose name contains this")
    parser.add_argument("--fa3-dir", type=Path, help="a folder with FlashAttention-3's fa3.so")
    parser.add_argument("--json", type=Path, help="write the results here, after every cell")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which no cell is begun")
    asked = parser.parse_args(arguments)
    fa3 = None if asked.fa3_dir is None else load_fa3(asked.fa3_dir)
    chosen = [cell for cell in cells() if asked.only in cell.name]
    largest = max(2 * len(cell.lengths) * cell.capacity * cell.heads_kv * cell.head_dim for cell in chosen)
    storage = torch.empty(max(largest, COPIED_BYTES // 2, ROTATED_BYTES), dtype=torch.bfloat16, device="cuda")
    for piece in storage.split(1 << 30):
        piece.normal_()
    results: list[Timed] = []
    start = time.monotonic()
    for cell in chosen:
        if time.monotonic() - start > asked.deadline:
            break
        results.append(time_cell(cell, storage, fa3, asked.rounds))
        print(line(results[-1]), flush=True)
        if asked.json is not None:
            found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cells": [asdict(r) for r in results]}
            asked.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
