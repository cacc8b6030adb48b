"""Measuring cells: check everybody's results, then time everybody in turns. A cell that fails, hangs or dies costs itself.

    for result in run(grid.cells(), contenders, "cuda"): ...

`measure` does one cell in this process. `run` does many in a process of their own, which is killed and started anew
where a cell outlasts its limit or takes the process down (an illegal memory access leaves a CUDA context unusable).
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from tessera.bench.accuracy import Standard, allowed_error, incoming, standard_for
from tessera.bench.cells import Cell, Direction
from tessera.bench.grids import Metric
from tessera.bench.peers import Peer, Plain
from tessera.bench.report import CellResult, Entry, Outcome
from tessera.bench.timing import Call, Schedule, clock_for, interleaved, quartiles, speedup
from tessera.device import Device
from tessera.operands import Request, bind
from tessera.problem import Problem

CELL_LIMIT_S = 180.0
"""After so long a cell is given up: compiling flex attention's backward takes a minute on a slow machine."""
_START_LIMIT_S = 120.0
"""How long a new process may take to import torch and everybody's code."""


@dataclass(frozen=True)
class Limits:
    """When to stop: a cell after `cell_s`, everything after `total_s` (None: never)."""

    cell_s: float = CELL_LIMIT_S
    total_s: float | None = None


def measure(
    cell: Cell, contenders: Sequence[Peer], device: str, schedule: Schedule | None = None, metric: Metric = Metric.TFLOPS
) -> CellResult:
    """One cell, here and now. `contenders[0]` is ours: the others' speedups are relative to it."""
    request = cell.request(device)
    problem, _ = bind(request)
    standard = standard_for(request, problem)
    forward_only = cell.direction is Direction.FORWARD
    with torch.no_grad() if forward_only else nullcontext():
        entries, calls = _prepare(contenders, request, problem, standard)
        times = interleaved(calls, clock_for(device), schedule or Schedule.of(device)) if calls else {}
    work = cell.flops(problem), problem.io_bytes()
    ours = times.get(contenders[0].name)
    for name, seconds in times.items():
        ratio = None if ours is None or name == contenders[0].name else speedup(ours, seconds)
        spread = quartiles(list(seconds))
        checked = entries[name]
        entries[name] = Entry(Outcome.TIMED, spread, metric.rate(*work, spread.median), ratio, checked.error, checked.allowed)
    return _result(cell, problem, standard.how, entries)


def _prepare(
    contenders: Sequence[Peer], request: Request, problem: Problem, standard: Standard
) -> tuple[dict[str, Entry], dict[str, Call]]:
    """Everybody's entry as far as it is known before the clock starts, and the calls of those who were right."""
    entries: dict[str, Entry] = {}
    calls: dict[str, Call] = {}
    device = Device.of(request.q.device)
    for peer in contenders:
        why = peer.why_not(problem, device)
        if why is not None:
            entries[peer.name] = Entry(Outcome.REFUSED, note=why)
            continue
        try:
            asked = _question(peer, request, problem, standard)
            call, results = _first_run(peer, *asked)
            error, allowed = asked[2].error(results), allowed_error(*asked[1:])
        except Exception as failure:  # a peer may raise anything; it costs the peer this cell
            entries[peer.name] = Entry(Outcome.FAILED, note=in_words(failure))
            continue
        right = error <= allowed
        note = "" if right else f"wrong by {error:.1e}, {allowed:.1e} is allowed"
        entries[peer.name] = Entry(Outcome.TIMED if right else Outcome.WRONG, error=error, allowed=allowed, note=note)
        if right:
            calls[peer.name] = call
    return entries, calls


def _question(peer: Peer, request: Request, problem: Problem, standard: Standard) -> tuple[Request, Problem, Standard]:
    """What a contender is asked, and judged by: the cell's question, or its own."""
    if not isinstance(peer, Plain):
        return request, problem, standard
    asked = peer.asked(request)
    own, _ = bind(asked)
    return asked, own, standard_for(asked, own)


def _first_run(peer: Peer, request: Request, problem: Problem, standard: Standard) -> tuple[Call, Sequence[Tensor]]:
    if standard.dout is None:
        forward = peer.forward(request, problem)
        return forward, (forward(),)
    backward = peer.backward(request, problem, standard.dout)
    results = backward()
    if standard.rows < problem.shape.seqlen_q:  # checked with gradients for the last rows alone; timed with all of them
        backward = peer.backward(request, problem, incoming(request, problem))
    return backward, results


def _result(cell: Cell, problem: Problem, how: str, entries: dict[str, Entry]) -> CellResult:
    shape = problem.shape
    return CellResult(
        cell.name, shape.head_dim, shape.seqlen_q, shape.seqlen_k, str(problem.mask), str(problem), cell.flops(problem),
        problem.io_bytes(), how, entries,
    )  # fmt: skip


def _without_result(cell: Cell, note: str) -> CellResult:
    case = cell.case
    return CellResult(cell.name, case.head_dim, case.seqlen_q, case.seqlen_k, "causal" if case.causal else "full", note=note)


def in_words(failure: BaseException) -> str:
    """The kind of a failure and the first line of its message."""
    text = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {text[0] if text else ''}"[:300]


def run(
    cells: Sequence[Cell],
    contenders: Sequence[Peer],
    device: str,
    schedule: Schedule | None = None,
    metric: Metric = Metric.TFLOPS,
    limits: Limits | None = None,
) -> Iterator[CellResult]:
    """Each cell's result as it comes, in order; every cell has one, if only a note why it was not measured.

    `contenders` travel to another process: they must pickle.
    """
    limits = limits or Limits()
    end = None if limits.total_s is None else time.monotonic() + limits.total_s
    job = _Job(tuple(contenders), device, schedule, metric)
    worker: _Worker | None = None
    try:
        for cell in cells:
            left = limits.cell_s if end is None else min(limits.cell_s, end - time.monotonic())
            if left <= 0:
                yield _without_result(cell, "not measured: the deadline was over")
                continue
            worker = worker or _Worker.start(job)
            result = worker.measure(cell, left)
            if worker.lost:
                worker.stop()
                worker = None
            yield result
    finally:
        if worker is not None:
            worker.stop()


@dataclass(frozen=True)
class _Job:
    """What every cell of a run shares."""

    contenders: tuple[Peer, ...]
    device: str
    schedule: Schedule | None
    metric: Metric


class _Worker:
    """A process that measures one cell after the other, and this side's end of its pipe."""

    def __init__(self, process: multiprocessing.process.BaseProcess, pipe: Connection):
        self._process, self._pipe = process, pipe
        self._ready = self.lost = False

    @staticmethod
    def start(job: _Job) -> _Worker:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, job))  # no daemon: compilers start processes of their own
        process.start()
        there.close()
        return _Worker(process, here)

    def measure(self, cell: Cell, limit_s: float) -> CellResult:
        """The cell's result, or a note: `lost` then says that this worker is of no more use."""
        try:
            self._await_start()
            self._pipe.send(cell)
            if self._pipe.poll(limit_s):
                answer = self._pipe.recv()
                if isinstance(answer, CellResult):
                    self.lost = any(_poisons_context(entry.note) for entry in answer.entries.values())
                    return answer
                self.lost = _poisons_context(answer)
                return _without_result(cell, f"failed: {answer}")
            note = f"given up after {limit_s:.0f} s"
        except (EOFError, OSError):
            self._process.join(5)
            note = f"its process died (exit code {self._process.exitcode})"
        self.lost = True
        return _without_result(cell, note)

    def _await_start(self) -> None:
        """The process says once that it is ready: starting is not counted against its first cell."""
        if self._ready:
            return
        if not self._pipe.poll(_START_LIMIT_S):
            raise EOFError
        self._pipe.recv()
        self._ready = True

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(0.0 if self.lost else 2.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(10)


def _poisons_context(failure: str) -> bool:
    """Whether CUDA is unusable after this failure: anything it reports but a lack of memory."""
    return "CUDA" in failure and "OutOfMemoryError" not in failure


def _serve(pipe: Connection, job: _Job) -> None:
    """The worker's side: cells in, results (or a failure in words) out, until the pipe closes."""
    pipe.send("ready")
    while True:
        try:
            cell = pipe.recv()
        except EOFError:
            return
        try:
            answer: CellResult | str = measure(cell, job.contenders, job.device, job.schedule, job.metric)
        except Exception as failure:
            answer = in_words(failure)
        pipe.send(answer)
