"""Plan: how a problem will be done. Everything a person may want to see stands here, and prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tessera.device import Device
from tessera.errors import Reason
from tessera.problem import BACKWARD_WORK, Gradients, Problem


@dataclass(frozen=True)
class Choice:
    """One kernel and its configuration: `config` is a frozen dataclass of the backend's own, or None."""

    kernel: str
    config: object | None
    why: str

    def __str__(self) -> str:
        return f"{self.kernel} [{self.config}]: {self.why}" if self.config else f"{self.kernel}: {self.why}"

    def to_json(self) -> dict[str, str | None]:
        """The choice as plain data."""
        return {"kernel": self.kernel, "config": None if self.config is None else str(self.config), "why": self.why}


@dataclass(frozen=True)
class Plan:
    """The answer of dispatch: which backend, which kernels, with what tiles, and why not the others.

    `workspace_bytes` is scratch memory over inputs and outputs for forward (and backward, where gradients are wanted).
    """

    problem: Problem
    device: Device
    backend: str
    forward: Choice
    backward: Choice | None
    workspace_bytes: int
    refusals: tuple[tuple[str, tuple[Reason, ...]], ...] = ()

    def __str__(self) -> str:
        flops, moved = self.problem.flops(), self.problem.io_bytes()
        lines = [
            f"problem   {self.problem}",
            f"device    {self.device}",
            f"backend   {self.backend}",
            f"forward   {self.forward}",
        ]
        if self.backward is not None:
            lines.append(f"backward  {self.backward}")
        lines.append(f"work      {flops / 1e9:,.2f} GFLOP, {moved / 1e6:,.2f} MB at least, {flops / max(moved, 1):,.0f} FLOP/B")
        lines.append(f"workspace {self.workspace_bytes / 1e6:,.2f} MB")
        for backend, reasons in self.refusals:
            lines += [f"not {backend}: {reason}" for reason in reasons]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data for `json.dumps`."""
        return {
            "problem": str(self.problem),
            "device": asdict(self.device),
            "backend": self.backend,
            "forward": self.forward.to_json(),
            "backward": None if self.backward is None else self.backward.to_json(),
            "flops": self.problem.flops(),
            "backward_flops": int(BACKWARD_WORK * self.problem.flops()) if self.problem.gradients is Gradients.INPUTS else 0,
            "io_bytes": self.problem.io_bytes(),
            "workspace_bytes": self.workspace_bytes,
            "refusals": {name: [asdict(reason) for reason in reasons] for name, reasons in self.refusals},
        }
