"""A session: one grid, in one direction, by these contenders, on this machine. What the command line and scripts run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from tessera.bench import cache_peers, flash_peers, machine
from tessera.bench.ceilings import ceilings
from tessera.bench.cells import Cell, Direction
from tessera.bench.grids import Grid, Kind, grid_named
from tessera.bench.peers import Peer, Tessera
from tessera.bench.report import CellResult, Report
from tessera.bench.runner import Limits, run
from tessera.bench.timing import Schedule
from tessera.dispatch import BACKENDS
from tessera.errors import bad_value


@dataclass(frozen=True)
class Order:
    """A session as a person asks for it. None: the grid's own dtype and device kind, dispatch's backend, the usual peers.

    `grid`: a grid's name, or several with a plus between ("paper+gqa"); `only`: cells whose name contains this; `fa3_folder`:
    where FlashAttention-3's fa3.so lies, None for the installed package; `rounds`: turns that each contender takes.
    """

    grid: str
    direction: Direction = Direction.FORWARD
    dtype: torch.dtype | None = None
    device: str | None = None
    backend: str | None = None
    peers: tuple[str, ...] | None = None
    only: str = ""
    fa3_folder: Path | None = None
    limits: Limits = field(default_factory=Limits)
    rounds: int | None = None

    def session(self) -> Session:
        """The session, or ValueError that names what cannot be."""
        if self.backend is not None and self.backend not in BACKENDS:
            raise bad_value("backend", repr(self.backend), "there is no such backend", f"use one of {', '.join(BACKENDS)}")
        grid = grid_named(self.grid)
        device = self.device or grid.device
        usable(device)
        cells = tuple(cell for cell in grid.cells(self.direction, self.dtype) if self.only in cell.name)
        if not cells:
            raise bad_value("k", repr(self.only), f"no cell of {grid.name} has this in its name", "use for example causal")
        usual = Schedule.of(device)
        schedule = usual if self.rounds is None else replace(usual, rounds=self.rounds)
        return Session(grid, cells, tuple(self._contenders(grid.kind, device)), device, self.limits, schedule)

    def _contenders(self, kind: Kind, device: str) -> Iterator[Peer]:
        """Ours, then the peers asked for."""
        if kind is Kind.CACHE:
            yield cache_peers.TesseraCache(self.backend)
            everyone, usual = cache_peers.peers(self.fa3_folder, self.backend), cache_peers.DEFAULT_PEERS
        else:
            yield Tessera(self.backend)
            everyone, usual = flash_peers.peers(self.fa3_folder, self.backend), flash_peers.DEFAULT_PEERS
        for name in usual[torch.device(device).type] if self.peers is None else self.peers:
            if name not in everyone:
                raise bad_value("peers", repr(name), "there is no such peer", f"use some of {', '.join(everyone)}")
            yield everyone[name]


def usable(device: str) -> None:
    """Raises ValueError, in words, where there is no such device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise bad_value("device", repr(device), str(error).splitlines()[0], "use a device of this machine") from error


def quick_grid() -> str:
    """The grid for a first look at this machine."""
    return "paper-quick" if torch.cuda.is_available() else "cpu-quick"


@dataclass(frozen=True)
class Session:
    """`cells`: those of the grid that are to be measured, all in one direction; `contenders`: ours first."""

    grid: Grid
    cells: tuple[Cell, ...]
    contenders: tuple[Peer, ...]
    device: str
    limits: Limits = field(default_factory=Limits)
    schedule: Schedule | None = None

    def reports(self) -> Iterator[Report]:
        """The report after each cell, which grows by one cell: whoever writes each loses one cell to a crash."""
        here, done = machine.describe(), list[CellResult]()
        at_most = ceilings(self.device, self.cells[0].dtype)
        dtype = str(self.cells[0].dtype).removeprefix("torch.")
        for result in run(self.cells, self.contenders, self.device, self.schedule, self.grid.metric, self.limits):
            done.append(result)
            yield Report(
                self.grid.name, self.cells[0].direction, self.grid.metric, dtype, self.device, self.contenders[0].name, here,
                tuple(done), at_most,
            )  # fmt: skip
