"""CachePlan: how a CacheProblem will be done. Everything a person may want to see stands here, and prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tessera.device import Device
from tessera.errors import Reason
from tessera.plan import Choice
from tessera.serving.problem import CacheProblem


@dataclass(frozen=True)
class CachePlan:
    """The answer of dispatch: which backend, which kernels with what configuration, and why not the others.

    `workspace_bytes` is scratch memory: the splits' partial results and what the backend keeps for them.
    """

    problem: CacheProblem
    device: Device
    backend: str
    choice: Choice
    workspace_bytes: int
    refusals: tuple[tuple[str, tuple[Reason, ...]], ...] = ()

    def __str__(self) -> str:
        per_key = self.problem.bytes_per_key()
        full = per_key * self.problem.shape.seqlen_k * self.problem.shape.batch
        lines = [
            f"problem   {self.problem}",
            f"device    {self.device}",
            f"backend   {self.backend}",
            f"kernel    {self.choice}",
            f"reads     {per_key:,} B a cached position, at most {full / 1e6:,.2f} MB",
            f"workspace {self.workspace_bytes / 1e6:,.2f} MB",
        ]
        for backend, reasons in self.refusals:
            lines += [f"not {backend}: {reason}" for reason in reasons]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data for `json.dumps`."""
        return {
            "problem": str(self.problem),
            "device": asdict(self.device),
            "backend": self.backend,
            "choice": self.choice.to_json(),
            "bytes_per_key": self.problem.bytes_per_key(),
            "workspace_bytes": self.workspace_bytes,
            "refusals": {name: [asdict(reason) for reason in reasons] for name, reasons in self.refusals},
        }
