"""`python -m tessera.bench GRID`: the grid without typer, rich and matplotlib, which a GPU machine often lacks.

    python -m tessera.bench paper --peers cudnn,fa3 --fa3-dir /peers --deadline 400 --json h200.json
    python -m tessera.bench paper+gqa+window --backward --peers cudnn,fa3,deterministic --fa3-dir /peers --json backward.json
    python -m tessera.bench --train --peers cudnn,fa3 --fa3-dir /peers --json training.json
    python -m tessera.bench --learn --json learning.json
    python -m tessera.bench --host --fa3-dir /peers --json host.json

Prints a line a cell. `tessera bench --report h200.json --plot h200.png` shows and draws the file elsewhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tessera.bench import host
from tessera.bench.cells import Direction
from tessera.bench.grids import GRIDS
from tessera.bench.learning import LearningOrder
from tessera.bench.report import CellResult
from tessera.bench.runner import CELL_LIMIT_S, Limits
from tessera.bench.session import Order
from tessera.bench.training import StepResult, TrainingOrder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 0 where all of ours was right and has a time, 1 where not, 2 for bad input."""
    asked = _parser().parse_args(arguments)
    try:
        if asked.train:
            return _train(asked)
        if asked.host:
            return _host(asked)
        return _learn(asked) if asked.learn else _measure(asked)
    except ValueError as mistake:
        print(mistake, file=sys.stderr)
        return 2


def _measure(asked: argparse.Namespace) -> int:
    direction = Direction.BACKWARD if asked.backward else Direction.FORWARD
    limits = Limits(asked.cell_limit, asked.deadline)
    order = Order(
        asked.grid, direction, None, asked.device, asked.backend, asked.peers, asked.only, asked.fa3_dir, limits, asked.rounds
    )  # fmt: skip
    for report in order.session().reports():
        print(line(report.cells[-1]), flush=True)
        if asked.json is not None:
            report.write(asked.json)
    print(f"ceilings of the run: {report.ceilings}")
    for loss in report.lost():
        print(f"behind {loss.peer}: {loss.cell} {loss.speedup}")
    means = " ".join(f"{name} {value:.3f}" for name, value in report.geomeans().items())
    print(f"{report.ours} over each peer, geometric mean: {means}; over the best: {report.against_best() or 0:.3f}")
    return 0 if report.ok else 1


def _train(asked: argparse.Namespace) -> int:
    order = TrainingOrder(asked.device, asked.peers, asked.fa3_dir, asked.layers, asked.rounds)
    for report in order.course().reports():
        length = report.lengths[-1]
        for name, entry in length.entries.items():
            print(f"{length.batch}x{length.seqlen:<6} {name:<36} {training_line(entry)}", flush=True)
        if asked.json is not None:
            report.write(asked.json)
    return 0 if report.ok else 1


def training_line(entry: StepResult) -> str:
    """One contender's step in one line, or why it has none."""
    if entry.seconds is None:
        return f"{entry.outcome.value}, {entry.note}"
    share = f" {entry.utilisation:.1%}" if entry.utilisation else ""
    memory = f" {entry.peak_bytes / 1e9:.1f} GB" if entry.peak_bytes else ""
    return f"{1e3 * entry.seconds.median:.1f} ms{share}{memory} x{entry.speedup or 1}  gradients {entry.difference:.1e} apart"


def _learn(asked: argparse.Namespace) -> int:
    report = LearningOrder(asked.device, asked.backend, asked.steps).course().run()
    for curve in report.curves:
        print(f"{curve.name:<24} loss {curve.losses[0]:.4f} -> {curve.losses[-1]:.4f}, held out {curve.held_out:.4f}")
    print(f"{report.kernel}: {report.distance:.2e} from the float32 curve, {report.allowed:.2e} allowed")
    if asked.json is not None:
        report.write(asked.json)
    return 0 if report.ok else 1


def _host(asked: argparse.Namespace) -> int:
    report = host.measured(asked.device, asked.fa3_dir, asked.rounds or 9)
    print(report)
    if asked.json is not None:
        report.write(asked.json)
    return 0


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
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("grid", nargs="?", help=f"{', '.join(GRIDS)}; several with a plus between: paper+gqa")
    what.add_argument("--train", action="store_true", help="whole training steps of a GPT")
    what.add_argument("--learn", action="store_true", help="loss curves of a byte-level GPT")
    what.add_argument("--host", action="store_true", help="what calls cost the host, and the first call of a process")
    parser.add_argument("--layers", type=int, help="of the GPT that --train trains")
    parser.add_argument("--rounds", type=int, help="turns of each contender, timed steps of --train")
    parser.add_argument("--steps", type=int, help="of --learn")
    parser.add_argument("--peers", type=lambda names: tuple(names.split(",")), help="names with commas between them")
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
