"""Does a model learn the same? A byte-level GPT on real text, by our attention and by exact attention, from the same weights on
the same batches.

Three learners go in step: ours; the same model in the same dtype with torch's math SDPA in float32; and all of it in float32.
The rule is the one for a single call (tessera.verify), carried over to curves: in the mean over the steps ours may lie twice as
far from the float32 curve as the dtype alone lies. (Training amplifies rounding: no two curves in 16 bits are equal.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tessera import attention, plan
from tessera.bench import machine
from tessera.bench.gpt import Attend, GptShape, Trainer
from tessera.bench.machine import Machine
from tessera.bench.report import machine_of, plain, write_json
from tessera.bench.session import usable
from tessera.bench.sources import Text, standard_library
from tessera.dispatch import BACKENDS
from tessera.errors import bad_value

SCHEMA = 1
"""The version of the JSON form."""
ROUNDING = 1e-3
"""What float32's own rounding may do to a curve, in nats: training amplifies it to 1e-4 in the CPU's 100 steps (2026-11-21)."""
_BYTES = 256
_EXAMINED = 16


@dataclass(frozen=True)
class Lesson:
    """What is learned: `steps` steps on `batch` pieces of shape.seqlen bytes. The rate rises for a tenth, then falls (cosine)."""

    shape: GptShape
    dtype: torch.dtype
    batch: int
    steps: int
    rate: float

    def rate_at(self, step: int) -> float:
        warm = max(1, self.steps // 10)
        if step < warm:
            return self.rate * (step + 1) / warm
        return self.rate * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm))))


@dataclass(frozen=True)
class Learner:
    """A name, the model's dtype and its attention."""

    name: str
    dtype: torch.dtype
    attend: Attend


@dataclass(frozen=True)
class Curve:
    """One learner's loss at each step, and at last on text that it has not seen, in nats a byte."""

    name: str
    losses: tuple[float, ...]
    held_out: float


@dataclass(frozen=True)
class LearningReport:
    """How each learned. `curves`: ours, then exact attention in a model of the same dtype, the last one all in float32.

    `kernel` is what ours ran.
    """

    lesson: dict[str, object]
    text: str
    device: str
    kernel: str
    curves: tuple[Curve, ...]
    machine: Machine
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def from_float32(self, curve: Curve) -> float:
        """How far a curve lies from the float32 one: the mean over the steps of |difference|, in nats."""
        pairs = zip(curve.losses, self.curves[-1].losses, strict=True)
        return sum(abs(a - b) for a, b in pairs) / len(curve.losses)

    @property
    def distance(self) -> float:
        """How far our curve lies from the float32 one."""
        return self.from_float32(self.curves[0])

    @property
    def allowed(self) -> float:
        """Twice the distance of exact attention in our dtype, and float32's rounding."""
        return 2 * self.from_float32(self.curves[1]) + ROUNDING

    @property
    def ok(self) -> bool:
        """Whether the curves lie on each other, and something was learned."""
        falling = all(curve.losses[-1] < curve.losses[0] for curve in self.curves)
        return falling and self.distance <= self.allowed  # NaN fails

    def write(self, path: Path) -> None:
        """Write the JSON form; the folder is made."""
        verdict = {"distance": self.distance, "allowed": self.allowed, "ok": self.ok}
        write_json(path, plain(asdict(self) | verdict) | {"schema": SCHEMA, "kind": "learning"})

    @staticmethod
    def read(path: Path) -> LearningReport:
        """The report that `write` wrote. Raises ValueError where the file holds none of this schema."""
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or data.get("kind") != "learning" or data.get("schema") != SCHEMA:
            raise ValueError(f"{path}: not a learning report of schema {SCHEMA}; write one with --learn --json")
        curves = tuple(Curve(curve["name"], tuple(curve["losses"]), curve["held_out"]) for curve in data["curves"])
        here = machine_of(data["machine"])
        return LearningReport(data["lesson"], data["text"], data["device"], data["kernel"], curves, here, data["date"])


@dataclass(frozen=True)
class LearningOrder:
    """Learning as a person asks for it. None: the GPU where there is one, dispatch's backend, the device's steps and bfloat16."""

    device: str | None = None
    backend: str | None = None
    steps: int | None = None
    dtype: torch.dtype | None = None

    def course(self) -> LearningCourse:
        """The course, or ValueError that names what cannot be."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        usable(device)
        if self.backend is not None and self.backend not in BACKENDS:
            raise bad_value("backend", repr(self.backend), "there is no such backend", f"use one of {', '.join(BACKENDS)}")
        if self.steps is not None and self.steps < 2:
            raise bad_value("steps", self.steps, "a curve has two points at least", "use 2 or more")
        if torch.device(device).type == "cuda":
            shape = GptShape(layers=6, hidden=512, heads=4, vocabulary=_BYTES, seqlen=1024)
            lesson = Lesson(shape, self.dtype or torch.bfloat16, 8, self.steps or 300, 1e-3)
        else:
            shape = GptShape(layers=2, hidden=64, heads=4, vocabulary=_BYTES, seqlen=128)
            lesson = Lesson(shape, self.dtype or torch.bfloat16, 8, self.steps or 100, 3e-3)
        return LearningCourse(lesson, standard_library(), device, self.backend)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch's math SDPA in float32, out rounded to q's dtype; shapes as in tessera.attention."""
    with sdpa_kernel(SDPBackend.MATH):
        q32, k32, v32 = (x.float().transpose(1, 2) for x in (q, k, v))
        out = functional.scaled_dot_product_attention(q32, k32, v32, is_causal=True)
    return out.transpose(1, 2).to(q.dtype)


@dataclass(frozen=True)
class LearningCourse:
    """A lesson, its text, and our backend (None: dispatch's choice)."""

    lesson: Lesson
    text: Text
    device: str
    backend: str | None = None

    @property
    def learners(self) -> tuple[Learner, ...]:
        """Ours, then those it is compared with, which in float32 are one."""
        dtype = self.lesson.dtype
        ours = Learner(f"Tessera, {_short(dtype)}", dtype, partial(attention, causal=True, backend=self.backend))
        exact = (Learner(f"math SDPA, {_short(d)}", d, exact_attention) for d in dict.fromkeys((dtype, torch.float32)))
        return ours, *exact

    def run(self, after_each_step: Callable[[], object] = lambda: None) -> LearningReport:
        """All steps: every learner takes one on a batch before the next batch is drawn."""
        lesson = self.lesson
        trainers = [Trainer(lesson.shape, learner.dtype, self.device) for learner in self.learners]
        batches = self.text.batches(1, lesson.batch, lesson.shape.seqlen, self.device)
        losses: list[list[Tensor]] = [[] for _ in trainers]
        for step in range(lesson.steps):
            text = batches.next()
            for learner, trainer, taken in zip(self.learners, trainers, losses, strict=True):
                taken.append(trainer.step(text, learner.attend, lesson.rate_at(step)))
            after_each_step()
        return self._report(trainers, losses)

    def _report(self, trainers: list[Trainer], losses: list[list[Tensor]]) -> LearningReport:
        lesson, shape = self.lesson, self.lesson.shape
        unseen = self.text.examination(_EXAMINED, shape.seqlen, self.device)
        curves = []
        for learner, trainer, taken in zip(self.learners, trainers, losses, strict=True):
            with torch.no_grad():
                held_out = trainer.model.loss(unseen, learner.attend).item()
            curves.append(Curve(learner.name, tuple(torch.stack(taken).tolist()), held_out))
        sizes = (lesson.batch, shape.seqlen, shape.heads, shape.head_dim)
        planned = plan(
            sizes, sizes, dtype=lesson.dtype, device=self.device, requires_grad=True, causal=True, backend=self.backend
        )  # fmt: skip
        kernel = f"{planned.backend} {planned.forward.kernel}"
        words = asdict(shape) | {"head_dim": shape.head_dim, "dtype": _short(lesson.dtype), "batch": lesson.batch}
        words |= {"steps": lesson.steps, "rate": lesson.rate}
        return LearningReport(words, self.text.about, self.device, kernel, tuple(curves), machine.describe())
