"""A Cell: one thing to measure. A case, a dtype, a direction, and the work that it counts for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch

from tessera.cases import Case
from tessera.operands import Request
from tessera.problem import BACKWARD_WORK, Layout, Problem


class Direction(Enum):
    """Which half of training a cell times."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class Cell:
    """One case in one dtype, forward or backward."""

    case: Case
    dtype: torch.dtype
    direction: Direction = Direction.FORWARD

    @property
    def name(self) -> str:
        return self.case.name

    def request(self, device: torch.device | str, seed: int = 0) -> Request:
        """The cell's tensors, drawn on `device`; they want gradients in a backward cell."""
        wanted = self.direction is Direction.BACKWARD
        return self.case.request(device, self.dtype, seed, requires_grad=wanted, draw_on=device)

    def flops(self, problem: Problem) -> int:
        """Floating-point operations of the cell's direction: 4 D for each score that the mask leaves, forward."""
        forward = flops_by_length(problem, self.case.lengths_q, self.case.used_k or self.case.lengths_k)
        return int(forward * (BACKWARD_WORK if self.direction is Direction.BACKWARD else 1))


def flops_by_length(problem: Problem, lengths_q: Sequence[int] | None, lengths_k: Sequence[int] | None) -> int:
    """FLOPs of the forward. A packed problem does not know its lengths, so they are given; each sequence counts by itself."""
    if problem.layout is Layout.DENSE or lengths_q is None or lengths_k is None:
        return problem.flops()

    def alone(seqlen_q: int, seqlen_k: int) -> Problem:
        shape = replace(problem.shape, batch=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        return replace(problem, shape=shape, layout=Layout.DENSE)

    return sum(alone(q, k).flops() for q, k in zip(lengths_q, lengths_k, strict=True))
