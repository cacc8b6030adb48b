"""`python -m tessera.bench GRID`: the grid without typer, rich and matplotlib, which a GPU machine often lacks.

    python -m tessera.bench paper --peers cudnn,fa3 --fa3-dir /peers --deadline 400 --json h200.json

Prints a line a cell. `tessera bench --report h200.json --plot h200.png` shows and draws the file elsewhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tessera.bench.cells import Direction
from tessera.bench.grids import GRIDS
from tessera.bench.report import CellResult
from tessera.bench.runner import CELL_LIMIT_S, Limits
from tessera.bench.session import Order


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a grid; 0 where every cell of ours has a time, 1 where one has none, 2 for bad input."""
    asked = _parser().parse_args(arguments)
    direction = Direction.BACKWARD if asked.backward else Direction.FORWARD
    peers = None if asked.peers is None else tuple(asked.peers.split(","))
    limits = Limits(asked.cell_limit, asked.deadline)
    order = Order(asked.grid, direction, None, asked.device, asked.backend, peers, asked.only, asked.fa3_dir, limits)
    try:
        session = order.session()
    except ValueError as mistake:
        print(mistake, file=sys.stderr)
        return 2
    for report in session.reports():
        print(line(report.cells[-1]), flush=True)
        if asked.json is not None:
            report.write(asked.json)
    print(f"ceilings of the run: {report.ceilings}")
    for loss in report.lost():
        print(f"behind {loss.peer}: {loss.cell} {loss.speedup}")
    means = " ".join(f"{name} {value:.3f}" for name, value in report.geomeans().items())
    print(f"{report.ours} over each peer, geometric mean: {means}; over the best: {report.against_best() or 0:.3f}")
    return 0 if report.ok else 1


def line(cell: CellResult) -> str:
    """One cell in one line: each contender's rate and, of peers, how many times faster ours is; or why there is none."""
    words = []
    for name, entry in cell.entries.items():
        if entry.rate is None:
            words.append(f"{name}: {entry.outcome.value}, {entry.note}")
        else:
            words.append(f"{name} {entry.rate:.4g}" + (f" x{entry.speedup}" if entry.speedup else ""))
    return f"{cell.name:<32} " + ("  ".join(words) or cell.note)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tessera.bench", description="Time Tessera beside its peers on a named grid.")
    parser.add_argument("grid", choices=list(GRIDS))
    parser.add_argument("--peers", help="names with commas between them")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--backend", help="our backend, by default the one that dispatch picks")
    parser.add_argument("--device", help="by default the grid's kind")
    parser.add_argument("-k", dest="only", default="", help="only cells whose name contains this")
    parser.add_argument("--fa3-dir", type=Path, help="a folder with FlashAttention-3's fa3.so")
    parser.add_argument("--json", type=Path, help="write the report here, after every cell")
    parser.add_argument("--deadline", type=float, help="seconds after which no cell is begun")
    parser.add_argument("--cell-limit", type=float, default=CELL_LIMIT_S, help="seconds after which a cell is given up")
    return parser


if __name__ == "__main__":
    sys.exit(main())
