"""Attention over a KV cache on Hopper: which kernel serves a problem.

decode.py does 16 query rows a key/value head, as fast as memory delivers the keys; chunk.py and latent.py 128 and 64, as fast as
the tensor cores multiply, and they also take what decode.py does not: MLA's latent rows, and pages of any size. Where rows are
appended, or q and k turned, append.py does it first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from tessera import jit
from tessera.backends.hopper import chunk_plan, decode_plan, why_not_here, without_scores
from tessera.backends.hopper.append_launch import AppendLaunch, append_spec
from tessera.backends.hopper.chunk_launch import ChunkLaunch
from tessera.backends.hopper.chunk_plan import ChunkPlan
from tessera.backends.hopper.decode_config import ROWS
from tessera.backends.hopper.decode_launch import DecodeLaunch
from tessera.backends.hopper.decode_plan import DecodePlan
from tessera.device import Device
from tessera.dispatch import Choices
from tessera.errors import Reason
from tessera.plan import Choice
from tessera.problem import Layout, Reproducibility
from tessera.serving.dispatch import CacheRunner
from tessera.serving.operands import CacheOperands
from tessera.serving.plan import CachePlan
from tessera.serving.problem import CacheProblem, Schedule

DECODE = "hopper-decode"
CHUNK = "hopper-chunk"
LATENT = "hopper-latent"


class HopperServing:
    """16-bit queries over a KV cache on sm_90a."""

    name = "hopper"

    def why_not(self, problem: CacheProblem, device: Device) -> tuple[Reason, ...]:
        if elsewhere := why_not_here(device):
            return elsewhere
        reasons = chunk_plan.why_not(problem) if takes_many_rows(problem) else decode_plan.why_not(problem)
        return reasons or _without_a_grid(problem, self.plan(problem, device).forward.config)

    def plan(self, problem: CacheProblem, device: Device) -> Choices:
        if takes_many_rows(problem):
            many = chunk_plan.chunk_plan(problem, device.multiprocessors)
            name = LATENT if chunk_plan.is_latent(problem) else CHUNK
            why = f"{rows_a_head(problem):.0f} query rows a key/value head share each tile of keys"
            return Choices(Choice(name, many, why), None, many.workspace_bytes(problem))
        plan = decode_plan.decode_plan(problem, device)
        why = "memory bounds it: a tile of keys is read once for all query rows of its head"
        return Choices(Choice(DECODE, plan, why), None, plan.workspace_bytes())

    def kernels(self, plan: CachePlan) -> tuple[jit.KernelSpec, ...]:
        """The kernels that a plan launches, and those that it would with more or fewer sequences."""
        found = dict.fromkeys(kernels_of(plan))
        for problem in _alike(plan.problem):
            choice = self.plan(problem, plan.device).forward
            found |= dict.fromkeys(kernels_of(replace(plan, problem=problem, choice=choice)))
        return tuple(found)

    def prepare(self, plan: CachePlan) -> CacheRunner:
        append = None if plan.problem.append is None else AppendLaunch(plan.problem)
        return HopperServingRunner(plan.problem, append, launch_of(plan))


MOST_PROGRAMS = 65535
"""Along a grid's second and third side."""


def _without_a_grid(problem: CacheProblem, plan: object) -> tuple[Reason, ...]:
    """The reason against more sequences, or heads, than CUDA launches."""
    grid = (
        ChunkLaunch(problem, plan).grid if isinstance(plan, ChunkPlan) else plan.programs if isinstance(plan, DecodePlan) else ()
    )
    if max(grid[1:], default=1) <= MOST_PROGRAMS:
        return ()
    shape = problem.shape
    value, why = f"{shape.batch} sequences, {shape.heads_q} heads", f"a grid has at most {MOST_PROGRAMS} programs along a side"
    return (Reason("q", value, why, "divide the batch"),)


def rows_a_head(problem: CacheProblem) -> float:
    """Query rows of one key/value head of a sequence; of packed ones the mean."""
    rows = problem.shape.seqlen_q * problem.shape.group
    return rows / max(1, problem.shape.batch) if problem.layout is Layout.VARLEN else rows


def takes_many_rows(problem: CacheProblem) -> bool:
    """Whether chunk.py or latent.py does it: more rows than decode.py's tile has, or what decode.py does not take."""
    if chunk_plan.why_not(problem):
        return False
    if decode_plan.why_not(problem):
        return True
    # stream-K is decode.py's alone; and what the mean of a packed batch says of one sequence, another batch would not say
    stays = problem.schedule is Schedule.STREAM_K or (
        problem.layout is Layout.VARLEN and problem.reproducibility is Reproducibility.BATCH_INVARIANT
    )
    return rows_a_head(problem) > ROWS and not stays


def kernels_of(plan: CachePlan) -> tuple[jit.KernelSpec, ...]:
    """The kernels that a plan launches."""
    launch = launch_of(plan)
    specs = launch.specs if isinstance(launch, ChunkLaunch) else (launch.spec,)
    return specs if plan.problem.append is None else (append_spec(plan.problem), *specs)


_MOST_SEQUENCES = 1024
_PARTS = (1, 2, 4, 8, 16, 32)
"""Numbers of parts of the keys, one for each variant of chunk.py, latent.py and combine.py."""


def _alike(problem: CacheProblem) -> Iterator[CacheProblem]:
    """Problems with other numbers of sequences (packed ones as long in the mean), whose keys would be divided otherwise: what a
    server meets from step to step."""
    shape, batch = problem.shape, 1
    mean = shape.seqlen_q / max(1, shape.batch)
    while batch <= _MOST_SEQUENCES:
        rows = max(1, round(mean * batch)) if problem.layout is Layout.VARLEN else shape.seqlen_q
        yield replace(problem, shape=replace(shape, batch=batch, seqlen_q=rows))
        batch *= 2
    if problem.splits is None and problem.reproducibility is not Reproducibility.BATCH_INVARIANT and takes_many_rows(problem):
        yield from (replace(problem, splits=parts) for parts in _PARTS)


def launch_of(plan: CachePlan) -> DecodeLaunch | ChunkLaunch:
    """The launch that a plan describes."""
    config = plan.choice.config
    if isinstance(config, ChunkPlan):
        return ChunkLaunch(plan.problem, config)
    if isinstance(config, DecodePlan):
        return DecodeLaunch(plan.problem, config)
    raise TypeError(f"plan.choice.config={config}: a plan of this backend carries a DecodePlan or a ChunkPlan")


@dataclass(frozen=True)
class HopperServingRunner:
    """A planned problem on Hopper."""

    problem: CacheProblem
    append: AppendLaunch | None
    launch: DecodeLaunch | ChunkLaunch

    def run(self, operands: CacheOperands) -> tuple[Tensor, Tensor]:
        if self.append is not None and operands.k_cache.numel() > 0:
            operands = self.append.run(operands)
        if operands.q.numel() == 0 or operands.k_cache.numel() == 0 or self.problem.shape.seqlen_k == 0:
            return without_scores(self.problem, operands.q, operands.sinks, (operands.cu_seqlens_q, None))
        return self.launch.run(operands)


SERVING_BACKEND = HopperServing()
