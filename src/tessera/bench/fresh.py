"""Time and peak memory of one contender on one cell, in a process that has done nothing else.

A fresh process has no memory kept from earlier calls, so the growth that `memory.peak_of` sees is the call's own.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tessera.bench.cells import Cell
from tessera.bench.memory import peak_of
from tessera.bench.peers import Forward, Peer
from tessera.operands import bind

_ENOUGH_S = 0.5
"""A call is repeated until this is over (three times at most); the least time counts."""
_MOST_REPEATS = 3
_WARM_TOKENS = 64


@dataclass(frozen=True)
class Footprint:
    """What one forward took: its least time, and the memory over the inputs that its first run needed, out included."""

    seconds: float
    peak_bytes: int


def footprint(contender: Peer, cell: Cell, out_file: Path | None = None) -> Footprint | None:
    """Measure the cell's forward on the CPU in a new process; out is saved to `out_file` with torch.save.

    None where the process died, which is what a machine without enough memory makes of it.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measure, contender, cell, out_file).result()
        except BrokenProcessPool:
            return None


def _measure(contender: Peer, cell: Cell, out_file: Path | None) -> Footprint:
    small = replace(cell.case, seqlen_q=_WARM_TOKENS, seqlen_k=_WARM_TOKENS)
    with torch.inference_mode():
        _call(contender, Cell(small, cell.dtype))()  # libraries loaded, threads started
        call = _call(contender, cell)
        start = time.perf_counter()
        measured = peak_of(call)
        times = [time.perf_counter() - start]
        while sum(times) < _ENOUGH_S and len(times) < _MOST_REPEATS:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        if out_file is not None:
            torch.save(measured.result.contiguous(), out_file)
    return Footprint(min(times), measured.peak_bytes)


def _call(contender: Peer, cell: Cell) -> Forward:
    request = cell.request("cpu")
    problem, _ = bind(request)
    return contender.forward(request, problem)
