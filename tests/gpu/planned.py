"""A request as the Hopper backend takes it."""

from __future__ import annotations

from tessera.backends.hopper import BACKEND
from tessera.device import Device
from tessera.operands import Operands, Request, bind
from tessera.plan import Plan
from tessera.problem import Problem


def planned(request: Request) -> tuple[Problem, Operands, Plan]:
    """Planned by this backend, which must not refuse it: what it refuses is tested where the refusals are."""
    problem, operands = bind(request)
    device = Device.of(request.q.device)
    reasons = BACKEND.why_not(problem, device)
    assert not reasons, "; ".join(map(str, reasons))
    choices = BACKEND.plan(problem, device)
    return problem, operands, Plan(problem, device, BACKEND.name, choices.forward, choices.backward, choices.workspace_bytes)
