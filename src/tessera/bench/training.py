"""Whole training steps: one GPT whose attention is ours or a peer's in turn, step by step, in one process.

All contenders take their steps with the same weights, on the same random tokens, so they differ in attention alone, and in time
by as much of it as a step holds. Before the clock starts each must find our gradients of the deepest block. A turn is two steps,
of which the second is timed: a step that follows a cooler one, of slower attention say, runs at a higher clock (see LOG.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from tessera.bench import flash_peers, machine
from tessera.bench.ceilings import Ceilings, ceilings
from tessera.bench.cells import Cell, Direction
from tessera.bench.gpt import Attend, GptShape, Recompute, Trainer
from tessera.bench.grids import square
from tessera.bench.machine import Machine
from tessera.bench.memory import peak_of_cuda
from tessera.bench.peers import Peer, Tessera
from tessera.bench.report import Outcome, machine_of, plain, result_of, write_json
from tessera.bench.runner import in_words
from tessera.bench.session import usable
from tessera.bench.timing import Call, Ratio, Schedule, clock_for, interleaved, quartiles, speedup
from tessera.device import Device
from tessera.errors import bad_value
from tessera.operands import Request, bind
from tessera.problem import Problem

SCHEMA = 1
"""The version of the JSON form."""
_ALLOWED = {torch.bfloat16: 0.05, torch.float32: 1e-4}
"""The largest relative distance between two contenders' gradients of a weight."""
_PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}
"""Dense 16-bit tensor FLOP/s of the SXM cards (NVIDIA's data sheets): what utilisation is a share of."""
_RATE = 0.0
"""The learning rate: a step does all of its work, and leaves the weights as every contender is to find them."""


@dataclass(frozen=True)
class Contender:
    """Whose attention a step runs, and what its backward computes again."""

    peer: Peer
    recompute: Recompute = Recompute.NOTHING

    @property
    def name(self) -> str:
        return self.peer.name + ("" if self.recompute is Recompute.NOTHING else f" {self.recompute.value}")


@dataclass(frozen=True)
class StepResult:
    """One contender at one length. `tflops` and `utilisation` go by Megatron's count; `speedup`: how many times faster ours is.

    `peak_bytes`: the most that a step held on a GPU, weights and optimizer included; `difference`: of its gradients from ours.
    """

    outcome: Outcome
    seconds: Ratio | None = None
    peak_bytes: int | None = None
    tflops: float | None = None
    utilisation: float | None = None
    speedup: Ratio | None = None
    difference: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Length:
    """One sequence length: the model's FLOPs of a step (by Megatron's count, and with attention's causal half alone), entries."""

    seqlen: int
    batch: int
    flops: int
    causal_flops: int
    entries: dict[str, StepResult]


@dataclass(frozen=True)
class TrainingReport:
    """What was measured so far; `ours` is the contender that the others are compared with."""

    shape: GptShape
    dtype: str
    tokens: int
    device: str
    ours: str
    machine: Machine
    lengths: tuple[Length, ...]
    ceilings: Ceilings | None = None
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def ok(self) -> bool:
        """Whether ours has a time at every length."""
        return bool(self.lengths) and all(length.entries[self.ours].outcome is Outcome.TIMED for length in self.lengths)

    def write(self, path: Path) -> None:
        """Write the JSON form; the folder is made."""
        data = plain(asdict(self)) | {"schema": SCHEMA, "kind": "training", "parameters": self.shape.parameters, "ok": self.ok}
        write_json(path, data)

    @staticmethod
    def read(path: Path) -> TrainingReport:
        """The report that `write` wrote. Raises ValueError where the file holds none of this schema."""
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or data.get("kind") != "training" or data.get("schema") != SCHEMA:
            raise ValueError(f"{path}: not a training report of schema {SCHEMA}; write one with --train --json")
        lengths = []
        for length in data["lengths"]:
            entries = {name: result_of(StepResult, entry) for name, entry in length["entries"].items()}
            lengths.append(Length(**(length | {"entries": entries})))
        return TrainingReport(
            GptShape(**data["shape"]), data["dtype"], data["tokens"], data["device"], data["ours"], machine_of(data["machine"]),
            tuple(lengths), Ceilings(**data["ceilings"]) if data["ceilings"] else None, data["date"],
        )  # fmt: skip


@dataclass(frozen=True)
class Course:
    """A model, the lengths to train it at with `tokens` tokens a step, and by whose attention: `contenders[0]` is ours."""

    shape: GptShape
    dtype: torch.dtype
    tokens: int
    lengths: tuple[int, ...]
    contenders: tuple[Contender, ...]
    device: str
    rounds: int = 5

    def reports(self) -> Iterator[TrainingReport]:
        """The report after each length."""
        limits, here, done = ceilings(self.device, self.dtype), machine.describe(), list[Length]()
        trainer = Trainer(self.shape, self.dtype, self.device)
        for seqlen in self.lengths:
            done.append(self._measure(trainer, seqlen))
            dtype = str(self.dtype).removeprefix("torch.")
            yield TrainingReport(self.shape, dtype, self.tokens, self.device, self.contenders[0].name, here, tuple(done), limits)

    def _measure(self, trainer: Trainer, seqlen: int) -> Length:
        shape, batch = self.shape, max(1, self.tokens // seqlen)
        text = torch.randint(shape.vocabulary, (batch, seqlen + 1), device=self.device)
        case = square(shape.head_dim, seqlen, batch, shape.heads, causal=True)
        problem, _ = bind(Cell(case, self.dtype, Direction.BACKWARD).request(self.device))
        results: dict[str, StepResult] = {}
        calls: dict[str, Call] = {}
        right: tuple[Tensor, ...] | None = None
        for contender in self.contenders:
            why = contender.peer.why_not(problem, Device.of(torch.device(self.device)))
            if why is not None:
                results[contender.name] = StepResult(Outcome.REFUSED, note=why)
                continue
            turn = _Turn(trainer, contender, attend_by(contender.peer, problem), text)
            results[contender.name], gradients = turn.first(right)
            right = gradients if right is None else right
            if results[contender.name].outcome is Outcome.TIMED:
                calls[contender.name] = turn.step
        schedule = Schedule(self.rounds, turn_s=0.0, limit_s=600.0, unmeasured=1)
        times = interleaved(calls, clock_for(self.device), schedule) if calls else {}
        flops = shape.flops(batch * seqlen, seqlen)
        results |= {name: self._timed(results[name], times, name, flops) for name in times}
        return Length(seqlen, batch, flops, shape.causal_flops(batch * seqlen, seqlen), results)

    def _timed(self, known: StepResult, times: dict[str, tuple[float, ...]], name: str, flops: int) -> StepResult:
        spread, ours = quartiles(list(times[name])), self.contenders[0].name
        ratio = speedup(times[ours], times[name]) if ours in times and name != ours else None
        rate, peak = flops / spread.median, _peak_flops(self.device)
        return replace(known, seconds=spread, tflops=rate / 1e12, utilisation=rate / peak if peak else None, speedup=ratio)


@dataclass(frozen=True)
class TrainingOrder:
    """Training as a person asks for it. None: the GPU where there is one, the device's usual peers and layers, 5 rounds.

    On a GPU: the GPT-3 paper's 1.3B model with 16 heads of 128, in bfloat16; on a CPU a model of seconds, in float32.
    """

    device: str | None = None
    peers: tuple[str, ...] | None = None
    fa3_folder: Path | None = None
    layers: int | None = None
    rounds: int | None = None

    def course(self) -> Course:
        """The course, or ValueError that names what cannot be."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        usable(device)
        everyone, ours = flash_peers.peers(self.fa3_folder), Tessera()
        on_gpu, rounds = torch.device(device).type == "cuda", self.rounds or 5
        names = self.peers if self.peers is not None else (("cudnn", "fa2", "fa3") if on_gpu else ("sdpa",))
        for name in names:
            if name not in everyone:
                raise bad_value("peers", repr(name), "there is no such peer", f"use some of {', '.join(everyone)}")
        again = (Contender(ours, Recompute.BLOCKS), Contender(ours, Recompute.ALL_BUT_ATTENTION))
        contenders = (Contender(ours), *(Contender(everyone[name]) for name in names), *again)
        if on_gpu:
            shape = GptShape(self.layers or 24, 2048, 16, 50304, 16384)
            return Course(shape, torch.bfloat16, 16384, (2048, 8192, 16384), contenders, device, rounds)
        shape = GptShape(self.layers or 2, 128, 4, 512, 1024)
        return Course(shape, torch.float32, 1024, (256, 1024), contenders, device, rounds)


@dataclass(frozen=True)
class _Turn:
    """One contender's step on a text, (batch, seqlen + 1)."""

    trainer: Trainer
    contender: Contender
    attend: Attend
    text: Tensor

    @property
    def _allowed(self) -> float:
        return _ALLOWED[self.trainer.dtype]

    def step(self) -> Tensor:
        return self.trainer.step(self.text, self.attend, _RATE, self.contender.recompute)

    def first(self, right: tuple[Tensor, ...] | None) -> tuple[StepResult, tuple[Tensor, ...] | None]:
        """What is known before the clock starts: gradients beside `right`, and the memory of one step."""
        try:
            gradients = self.trainer.gradients(self.text, self.attend, self.contender.recompute)
            far = max(_distance(a, b) for a, b in zip(gradients, gradients if right is None else right, strict=True))
            if not far <= self._allowed:
                note = f"its gradients lie {far:.1e} from the first contender's, {self._allowed:.0e} is allowed"
                return StepResult(Outcome.WRONG, difference=far, note=note), gradients
            peak = self._peak() if self.trainer.device.type == "cuda" else None
        except Exception as failure:  # a peer may raise anything, a lack of memory too
            return StepResult(Outcome.FAILED, note=in_words(failure)), None
        return StepResult(Outcome.TIMED, peak_bytes=peak, difference=far), gradients

    def _peak(self) -> int:
        self.step()
        before = torch.cuda.memory_allocated(self.trainer.device)
        return before + peak_of_cuda(self.step, self.trainer.device).peak_bytes


def attend_by(peer: Peer, problem: Problem) -> Attend:
    """A peer's forward as a function that autograd differentiates, for tensors of the problem's shapes."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return peer.forward(Request(q, k, v, right=0, requires_grad=True), problem)()

    return attend


def _distance(a: Tensor, b: Tensor) -> float:
    return (torch.linalg.vector_norm((a - b).float()) / torch.linalg.vector_norm(b.float())).item()


def _peak_flops(device: str) -> float | None:
    place = torch.device(device)
    return _PEAK_FLOPS.get(torch.cuda.get_device_name(place)) if place.type == "cuda" else None
