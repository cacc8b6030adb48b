"""The tiled algorithm on any device torch knows: exact and complete, not fast. The last resort, and the Plan says so."""

from __future__ import annotations

from tessera.backends.cpu import TiledRunner, tiled_workspace, tiles_for
from tessera.backends.cpu.serving import GatheringRunner, gathered_bytes
from tessera.device import Device
from tessera.dispatch import Choices, Runner
from tessera.errors import Reason
from tessera.jit import KernelSpec
from tessera.plan import Choice, Plan
from tessera.problem import Problem
from tessera.serving.dispatch import CacheRunner
from tessera.serving.plan import CachePlan
from tessera.serving.problem import CacheProblem


class PortableBackend:
    """Attention in tiles of torch operations on any device. Masks by length are read on the host: the device is waited for."""

    name = "torch"

    def why_not(self, problem: Problem, device: Device) -> tuple[Reason, ...]:
        return ()

    def plan(self, problem: Problem, device: Device) -> Choices:
        choice = Choice("tiled", tiles_for(problem), "torch operations tile by tile: right on any device, not fast")
        return Choices(choice, choice, tiled_workspace(problem))

    def prepare(self, plan: Plan) -> Runner:
        return TiledRunner(plan.problem, tiles_for(plan.problem))

    def kernels(self, plan: Plan) -> tuple[KernelSpec, ...]:
        return ()


class PortableServing:
    """Attention over a KV cache in tiles of torch operations on any device. Lengths and pages are read on the host."""

    name = "torch"

    def why_not(self, problem: CacheProblem, device: Device) -> tuple[Reason, ...]:
        return ()

    def plan(self, problem: CacheProblem, device: Device) -> Choices:
        why = "torch operations, sequence by sequence: right on any device, not fast; waits for the device, no CUDA graphs"
        return Choices(Choice("tiled", None, why), None, gathered_bytes(problem))

    def prepare(self, plan: CachePlan) -> CacheRunner:
        return GatheringRunner(plan.problem)

    def kernels(self, plan: CachePlan) -> tuple[KernelSpec, ...]:
        return ()


BACKEND = PortableBackend()
SERVING_BACKEND = PortableServing()
