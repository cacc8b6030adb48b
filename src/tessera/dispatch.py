"""Dispatch: the backends in order; each says why it can't, and the first with no reason against it is taken."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from tessera.device import Device
from tessera.errors import Reason, Unsupported, bad_value
from tessera.operands import Operands
from tessera.plan import Choice, Plan
from tessera.problem import Gradients, Problem

if TYPE_CHECKING:
    from tessera.jit import KernelSpec


@dataclass(frozen=True)
class Choices:
    """What a backend answers when asked to plan: its kernels and the scratch memory they need, in bytes."""

    forward: Choice
    backward: Choice | None
    workspace_bytes: int


class Upstream(NamedTuple):
    """What the backward starts from: the forward's results and the gradients that arrive for them."""

    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor | None


class InputGradients(NamedTuple):
    """dq, dk, dv in the inputs' shapes and dtypes; dbias and dsinks where their gradients are wanted."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None
    dsinks: Tensor | None = None


Shortcut = Callable[..., Tensor]
"""out of q, k and v, and of packed sequences' two offsets."""


class Runner(Protocol):
    """A planned problem, ready to be run on tensors: what depends on the plan alone has been worked out.

    Between its calls nothing changes but the tensors' contents and addresses, and the seed: a runner is kept for one set of
    shapes, strides, dtypes and devices (calls.py), so it may keep what follows from them.
    """

    def forward(self, operands: Operands) -> tuple[Tensor, Tensor]:
        """(out, lse) as Problem.out_shape and Problem.lse_shape say, contiguous."""
        ...

    def shortcut(self, others: tuple[Any, ...]) -> Shortcut | None:
        """A short way to out alone, for calls of q, k and v alone, or of them and offsets, whose operands behind q, k and v are
        otherwise `others`; None while there is none."""
        ...

    def backward(self, operands: Operands, upstream: Upstream) -> InputGradients: ...


class Backend(Protocol):
    """One way to run attention. A backend looks at no tensor before its runner does, and decides nothing there."""

    name: str

    def why_not(self, problem: Problem, device: Device) -> tuple[Reason, ...]:
        """The reasons why this backend can't run the problem on the device; empty where it can."""
        ...

    def plan(self, problem: Problem, device: Device) -> Choices: ...

    def prepare(self, plan: Plan) -> Runner: ...

    def kernels(self, plan: Plan) -> tuple[KernelSpec, ...]:
        """What `prepare` and the runner's calls compile, for problems like this one of any length; empty where nothing is."""
        ...


# In order of preference. A module defines BACKEND; it is imported when first asked.
BACKENDS = {
    "hopper": "tessera.backends.hopper",
    "cpu": "tessera.backends.cpu",
    "torch": "tessera.backends.cpu.portable",
}
SLOW = "torch"
"""The one that serves any device."""


@cache
def load(name: str) -> Backend:
    """The backend of that name."""
    if name not in BACKENDS:
        raise bad_value("backend", repr(name), "there is no such backend", "use None or one of " + ", ".join(BACKENDS))
    return import_module(BACKENDS[name]).BACKEND


class Judge(Protocol):
    """What can say why it can't run a problem: a backend of any operation."""

    name: str

    def why_not(self, problem: Any, device: Device) -> tuple[Reason, ...]: ...


B = TypeVar("B", bound=Judge)


def first_able(candidates: Iterable[B], problem: object, device: Device) -> tuple[B, dict[str, tuple[Reason, ...]]]:
    """The first candidate with nothing against the problem, and the reasons of those before it.

    Raises Unsupported with everyone's reasons where there is none.
    """
    refusals: dict[str, tuple[Reason, ...]] = {}
    for candidate in candidates:
        reasons = candidate.why_not(problem, device)
        if not reasons:
            return candidate, refusals
        refusals[candidate.name] = reasons
    asked = f"backend={next(iter(refusals))!r} cannot" if len(refusals) == 1 else "no backend can"
    raise Unsupported(f"{asked} run this problem on {device}\n  problem: {problem}", refusals)


def warn_if_slow(backend: str, device: Device, refusals: tuple[tuple[str, tuple[Reason, ...]], ...]) -> None:
    """Nothing falls back in silence: a warning where a plan leaves a GPU to torch operations, though nobody asked for them."""
    if backend == SLOW and device.kind != "cpu":
        better, reasons = refusals[0]
        words = f"tessera: torch operations do this on {device}, exactly but slowly; not {better}: {reasons[0]}"
        warnings.warn(
            f"{words} (backend={SLOW!r} asks for them, without a warning)", RuntimeWarning, stacklevel=_level_of_caller()
        )


def _level_of_caller() -> int:
    """The stack level, as who calls this counts it, of the first line that is neither this package's nor torch's."""
    own = tuple(str(Path(module).parent) + os.sep for module in (__file__, torch.__file__))
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(own):
        level, frame = level + 1, frame.f_back
    return level + 1


@lru_cache(maxsize=4096)
def select(problem: Problem, device: Device, backend: str | None = None) -> Plan:
    """The plan of the first backend that can run the problem, or of the one named.

    Raises Unsupported with every backend's reasons where none can.
    """
    able, refusals = first_able(map(load, BACKENDS if backend is None else (backend,)), problem, device)
    choices = able.plan(problem, device)
    backward = choices.backward if problem.gradients is Gradients.INPUTS else None
    return Plan(problem, device, able.name, choices.forward, backward, choices.workspace_bytes, tuple(refusals.items()))


def why_not(problem: Problem, device: Device) -> dict[str, tuple[Reason, ...]]:
    """Every backend's reasons against the problem; an empty tuple where it can run it."""
    return {name: load(name).why_not(problem, device) for name in BACKENDS}
