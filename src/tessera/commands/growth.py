"""The demo's second half: exact attention at growing lengths, the plain formula beside Tessera, each in a fresh process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tessera import dispatch
from tessera.bench.accuracy import by_oracle
from tessera.bench.cells import Cell
from tessera.bench.fresh import Footprint, footprint
from tessera.bench.grids import square
from tessera.bench.peers import Eager, Tessera
from tessera.cases import Case
from tessera.device import Device
from tessera.operands import bind

ALLOWED = 1e-5
HEADS, HEAD_DIM = 8, 64
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
_PATIENCE_S = 15.0
"""The plain formula is left out once its time, extrapolated from the length before, passes this."""
_CHECKED_ROWS = 64
"""Rows that the oracle computes where the plain formula does not run."""


@dataclass(frozen=True)
class Step:
    """One length: what each took, and how far the outputs lie apart. `naive` is None where `skipped` says why.

    `against` names what ours was compared with: the plain formula, or the float64 oracle on the last rows.
    """

    name: str
    tokens: int
    kernel: str
    ours: Footprint
    naive: Footprint | None
    skipped: str
    difference: float
    against: str

    @property
    def ok(self) -> bool:
        return self.difference <= ALLOWED  # NaN fails


def plain_cases(lengths: Sequence[int]) -> tuple[Case, ...]:
    """Full attention, batch 1, 8 heads of 64, at each length."""
    return tuple(square(HEAD_DIM, tokens, 1, HEADS) for tokens in lengths)


def special_cases(tokens: int) -> tuple[Case, ...]:
    """What torch's own kernel does not have: a sliding window, a softcap."""
    window = square(HEAD_DIM, tokens, 1, HEADS, window=(256, 0))
    return window, square(HEAD_DIM, tokens // 2, 1, HEADS, softcap=20.0, causal=True)


def steps(cases: Sequence[Case]) -> Iterator[Step]:
    """Each case as it is measured, in order of rising length."""
    last: tuple[int, float] | None = None  # tokens and seconds of the plain formula's last run
    for case in cases:
        cell = Cell(case, torch.float32)
        step = _step(cell, last)
        if step.naive is not None:
            last = (step.tokens, step.naive.seconds)
        yield step


def _step(cell: Cell, last: tuple[int, float] | None) -> Step:
    tokens = cell.case.seqlen_q
    request = cell.request("cpu")
    problem, _ = bind(request)
    here = Device.named("cpu")
    skipped = Eager().why_not(problem, here) or ""
    if last is not None and last[1] * (tokens / last[0]) ** 2 > _PATIENCE_S:
        skipped = skipped or f"it would take over {_PATIENCE_S:.0f} s"
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "ours.pt"), Path(folder, "naive.pt")
        naive = None if skipped else footprint(Eager(), cell, files[1])
        ours = footprint(Tessera(), cell, files[0])
        if ours is None:
            raise RuntimeError(f"the process that ran Tessera on {cell.name} died: too little memory here, or see above")
        if naive is None and not skipped:
            skipped = "its process died: too little memory"
        out = torch.load(files[0])
        if naive is not None:
            difference, against = (out - torch.load(files[1])).abs().max().item(), "naive"
        else:
            right = by_oracle(request, problem, _CHECKED_ROWS)
            difference = (out[:, -right.rows :].double() - right.results[0]).abs().max().item()
            against = right.how
    return Step(cell.name, tokens, dispatch.select(problem, here).forward.kernel, ours, naive, skipped, difference, against)
