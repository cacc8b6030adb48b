"""The CPU backend: torch's own flash kernel where it is exact, the tiled algorithm everywhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.backends.cpu import aten, tiled
from tessera.device import Device
from tessera.dispatch import Choices, InputGradients, Runner, Shortcut, Upstream
from tessera.errors import Reason
from tessera.jit import KernelSpec
from tessera.operands import Operands, with_offsets
from tessera.plan import Choice, Plan
from tessera.problem import Problem

ATEN, TILED = "aten-flash", "tiled"


class CpuBackend:
    """Attention on the CPU, every option of the API."""

    name = "cpu"

    def why_not(self, problem: Problem, device: Device) -> tuple[Reason, ...]:
        if device.kind == "cpu":
            return ()
        return (Reason("device", str(device), "this backend runs on the CPU", "use q.cpu() or another backend"),)

    def plan(self, problem: Problem, device: Device) -> Choices:
        limit = aten.limits_of(problem, device)
        tiled_choice = Choice(TILED, tiles_for(problem), f"torch's kernel: {limit}")
        workspace = tiled_workspace(problem)
        if limit is not None:
            return Choices(tiled_choice, tiled_choice, workspace)
        exact = Choice(ATEN, None, "torch's CPU flash kernel computes exactly this")
        with_lse = Choice(ATEN, None, f"exact here; {TILED} where lse has a gradient of its own")
        return Choices(exact, with_lse, workspace)

    def prepare(self, plan: Plan) -> Runner:
        problem = plan.problem
        runner = TiledRunner(problem, tiles_for(problem))
        return AtenRunner(problem, runner, aten.whole_block(problem)) if plan.forward.kernel == ATEN else runner

    def kernels(self, plan: Plan) -> tuple[KernelSpec, ...]:
        return ()


@dataclass(frozen=True)
class TiledRunner:
    """A problem in tiles."""

    problem: Problem
    tiles: tiled.Tiles

    def forward(self, operands: Operands) -> tuple[Tensor, Tensor]:
        with _own_dtypes(operands):
            return tiled.forward(self.problem, operands, self.tiles)

    def shortcut(self, others: tuple[Any, ...]) -> Shortcut:
        return lambda q, k, v, *offsets: self.forward(Operands(q, k, v, *with_offsets(others, offsets)))[0]

    def backward(self, operands: Operands, upstream: Upstream) -> InputGradients:
        with _own_dtypes(operands):
            return tiled.backward(self.problem, operands, upstream, self.tiles)


def _own_dtypes(operands: Operands) -> torch.autocast:
    """Autocast has had its say at the front; within, it would round the products of float32 scores."""
    return torch.autocast(operands.q.device.type, enabled=False)


@dataclass(frozen=True)
class AtenRunner:
    """A problem through torch's kernel; in tiles where lse has a gradient, which that kernel does not take."""

    problem: Problem
    tiled: TiledRunner
    whole: aten.Block | None

    def forward(self, operands: Operands) -> tuple[Tensor, Tensor]:
        return aten.forward(self.problem, operands, self.whole)

    def shortcut(self, others: tuple[Any, ...]) -> Shortcut:
        return lambda q, k, v, *offsets: self.forward(Operands(q, k, v, *with_offsets(others, offsets)))[0]

    def backward(self, operands: Operands, upstream: Upstream) -> InputGradients:
        if upstream.dlse is not None:
            return self.tiled.backward(operands, upstream)
        return aten.backward(self.problem, operands, upstream, self.whole)


def tiles_for(problem: Problem) -> tiled.Tiles:
    """Tiles whose scores stay in the cache of each core: see benchmarks/LOG.md for the sweep behind the sizes."""
    return tiled.Tiles(rows=256, keys=512, scores=(1 << 17) * torch.get_num_threads())


def tiled_workspace(problem: Problem) -> int:
    """Bytes of scratch the tiled kernels take: one chunk of heads in the compute dtype and six tiles of scores."""
    shape, size = problem.shape, tiled.compute_dtype(problem.dtype).itemsize
    tiles = tiles_for(problem)
    heads = min(shape.heads_kv, tiles.heads_at_once(shape.group, shape.seqlen_q, shape.seqlen_k))
    rows = heads * shape.group * shape.seqlen_q
    keys = heads * shape.seqlen_k
    dims = shape.head_dim + shape.head_dim_v
    return size * (2 * rows * dims + 2 * keys * dims + 6 * tiles.scores)


BACKEND = CpuBackend()
