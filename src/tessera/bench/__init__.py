"""Benchmarks as a library: cells, grids, peers, clocks, reports and plots. `tessera bench` is a thin skin over it.

    from tessera.bench import GRIDS, Tessera, flash_peers, run
    ours, peers = Tessera("hopper"), flash_peers.peers()
    for result in run(GRIDS["paper"].cells(), [ours, peers["fa3"], peers["cudnn"]], "cuda"):
        print(result.name, {name: entry.rate for name, entry in result.entries.items()})

`python -m tessera.bench paper --json h200.json` is the same as a command, on a machine with torch alone; with --train it times
whole training steps (training.py), with --learn it compares loss curves (learning.py). server.py and contexts.py generate from a
paged cache (`tessera demo --generate`).

Your own kernel is a contender like any other: an object with the four members of `Peer` (`measure` takes any; `run`, which
works in another process, takes those that pickle).
"""

from tessera.bench.cells import Cell, Direction
from tessera.bench.grids import GRIDS, Grid, Metric
from tessera.bench.peers import Eager, Peer, Sdpa, Tessera
from tessera.bench.report import CellResult, Entry, Outcome, Report
from tessera.bench.runner import Limits, measure, run
from tessera.bench.session import Order, Session
from tessera.bench.timing import CpuClock, CudaClock, Ratio, Schedule, interleaved

__all__ = [
    "GRIDS", "Cell", "CellResult", "CpuClock", "CudaClock", "Direction", "Eager", "Entry", "Grid", "Limits", "Metric",
    "Outcome", "Order", "Peer", "Ratio", "Report", "Schedule", "Sdpa", "Session", "Tessera", "interleaved", "measure", "run",
]  # fmt: skip
