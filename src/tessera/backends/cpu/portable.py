"""The tiled algorithm on any device torch knows: exact and complete, not fast. The last resort, and the Plan says so."""

from __future__ import annotations

from tessera.backends.cpu import TiledRunner, tiled_workspace, tiles_for
from tessera.device import Device
from tessera.dispatch import Choices, Runner
from tessera.errors import Reason
from tessera.jit import KernelSpec
from tessera.plan import Choice, Plan
from tessera.problem import Problem


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


BACKEND = PortableBackend()
