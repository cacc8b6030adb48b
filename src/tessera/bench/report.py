"""What a benchmark found, as plain records: cells, the contenders' entries in them, and what follows from all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from tessera.bench.ceilings import Ceilings
from tessera.bench.cells import Direction
from tessera.bench.grids import Metric
from tessera.bench.machine import Cpu, Gpu, Machine
from tessera.bench.timing import Ratio

R = TypeVar("R")
SCHEMA = 1
"""The version of the JSON form; it rises when a field changes its meaning."""


class Outcome(Enum):
    """What became of one contender in one cell."""

    TIMED = "timed"
    REFUSED = "refused"
    WRONG = "wrong"
    FAILED = "failed"


@dataclass(frozen=True)
class Entry:
    """One contender in one cell. `seconds`: median and quartiles over the rounds; `rate` in the report's metric.

    `speedup` is how many times faster ours is, paired by round (None for ours). `note` says why it was not timed.
    """

    outcome: Outcome
    seconds: Ratio | None = None
    rate: float | None = None
    speedup: Ratio | None = None
    error: float | None = None
    allowed: float | None = None
    note: str = ""


@dataclass(frozen=True)
class CellResult:
    """One cell. `standard` says what results were compared with; `note` what befell the whole cell, if anything did."""

    name: str
    head_dim: int
    seqlen_q: int
    seqlen_k: int
    mask: str
    problem: str = ""
    flops: int = 0
    io_bytes: int = 0
    standard: str = ""
    entries: dict[str, Entry] = field(default_factory=dict)
    note: str = ""

    def rate(self, contender: str) -> float | None:
        """The contender's rate in the report's metric, None where it was not timed."""
        entry = self.entries.get(contender)
        return None if entry is None else entry.rate


@dataclass(frozen=True)
class Lost:
    """A cell in which a peer was faster: `speedup` is below 1."""

    cell: str
    peer: str
    speedup: Ratio


@dataclass(frozen=True)
class Report:
    """A finished (or cut short) run of a grid. `ours` is the contender that the others are compared with, `ceilings` what the
    machine could do at most in the same run."""

    grid: str
    direction: Direction
    metric: Metric
    dtype: str
    device: str
    ours: str
    machine: Machine
    cells: tuple[CellResult, ...]
    ceilings: Ceilings | None = None
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def contenders(self) -> tuple[str, ...]:
        """Everybody who was timed at least once, ours first."""
        timed = {name: None for cell in self.cells for name, entry in cell.entries.items() if entry.outcome is Outcome.TIMED}
        return tuple(sorted(timed, key=lambda name: name != self.ours))

    def is_peer(self, contender: str) -> bool:
        """Whether this is somebody else's program: ours again, in another form, is named after ours ("tessera-pages16")."""
        return not contender.startswith(self.ours)

    @property
    def ok(self) -> bool:
        """Whether every cell was measured and nothing of ours was wrong, failed or refused."""
        own = [cell.entries.get(self.ours) for cell in self.cells]
        return bool(own) and all(entry is not None and entry.outcome is Outcome.TIMED for entry in own)

    def geomeans(self) -> dict[str, float]:
        """The geometric mean of our speedup over each peer, over the cells in which both were timed."""
        means = {}
        for peer in self.contenders:
            ratios = [s.median for cell in self.cells if (s := _speedup(cell, peer)) is not None]
            if ratios:
                means[peer] = geomean(ratios)
        return means

    def against_best(self) -> float | None:
        """The geometric mean of our speedup over the fastest peer of each cell."""
        worst = []
        for cell in self.cells:
            ratio = self.over_best(cell)
            worst += [] if ratio is None else [ratio]
        return geomean(worst) if worst else None

    def over_best(self, cell: CellResult) -> float | None:
        """Our speedup over the fastest peer of a cell; None where no peer or not ours was timed."""
        ratios = [s.median for peer in cell.entries if self.is_peer(peer) and (s := _speedup(cell, peer)) is not None]
        return min(ratios, default=None)

    def lost(self) -> tuple[Lost, ...]:
        """The cells in which a peer was faster, the worst first."""
        pairs = ((cell.name, peer, _speedup(cell, peer)) for cell in self.cells for peer in cell.entries)
        losses = [Lost(cell, peer, s) for cell, peer, s in pairs if s is not None and s.median < 1 and self.is_peer(peer)]
        return tuple(sorted(losses, key=lambda loss: loss.speedup.median))

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, with its summary."""
        data = asdict(self) | {"schema": SCHEMA}
        data["summary"] = {
            "geomean_speedup": self.geomeans(),
            "geomean_speedup_over_best": self.against_best(),
            "lost": [asdict(loss) for loss in self.lost()],
            "ok": self.ok,
        }
        return plain(data)

    @staticmethod
    def read(path: Path) -> Report:
        """The report that `write` wrote. Raises ValueError where the file holds none of this schema."""
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or data.get("schema") != SCHEMA or "cells" not in data:
            raise ValueError(f"{path}: not a benchmark's report of schema {SCHEMA}; write one with --json")
        cells = []
        for cell in data["cells"]:
            entries = {name: result_of(Entry, entry) for name, entry in cell["entries"].items()}
            cells.append(CellResult(**(cell | {"entries": entries})))
        limits = Ceilings(**data["ceilings"]) if data.get("ceilings") else None
        return Report(
            data["grid"], Direction(data["direction"]), Metric(data["metric"]), data["dtype"], data["device"], data["ours"],
            machine_of(data["machine"]), tuple(cells), limits, data["date"],
        )  # fmt: skip

    def write(self, path: Path) -> None:
        """Write the JSON form; the folder is made."""
        write_json(path, self.to_json())


def geomean(values: Iterable[float]) -> float:
    """The geometric mean of positive numbers."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def _speedup(cell: CellResult, peer: str) -> Ratio | None:
    entry = cell.entries.get(peer)
    return None if entry is None else entry.speedup


def result_of(kind: type[R], data: dict[str, Any]) -> R:
    """A contender's result, a record with an outcome, seconds and a speedup, from its JSON form."""
    ratios = {name: None if data[name] is None else Ratio(**data[name]) for name in ("seconds", "speedup")}
    return kind(**(data | ratios | {"outcome": Outcome(data["outcome"])}))


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Plain data as a file; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def machine_of(data: dict[str, Any]) -> Machine:
    """A machine from its JSON form."""
    return Machine(data["system"], Cpu(**data["cpu"]), tuple(Gpu(**gpu) for gpu in data["gpus"]), data["versions"])


def plain(value: Any) -> Any:
    """Enums by their values, numbers that are no numbers as None: what strict JSON holds."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value
