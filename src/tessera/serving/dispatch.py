"""The backends of attention over a KV cache, in order: as tessera.dispatch, for CacheProblems."""

from __future__ import annotations

from functools import cache, lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from tessera.device import Device
from tessera.dispatch import Choices, first_able
from tessera.errors import Reason, bad_value
from tessera.serving.operands import CacheOperands
from tessera.serving.plan import CachePlan
from tessera.serving.problem import CacheProblem

if TYPE_CHECKING:
    from tessera.jit import KernelSpec


class CacheRunner(Protocol):
    """A planned problem, ready to be run: what depends on the plan alone has been worked out.

    Between its calls nothing changes but the tensors' contents and addresses: a runner is kept for one set of shapes, strides,
    dtypes and devices (calls.py), so it may keep what follows from them. It reads no device tensor on the host, launches
    grids that do not depend on contents, and so can be captured in a CUDA graph that is replayed while sequences grow.
    """

    def run(self, operands: CacheOperands) -> tuple[Tensor, Tensor]:
        """Append, if asked; then (out, lse) as CacheProblem.out_shape and lse_shape say, contiguous, lse float32."""
        ...


class CacheBackend(Protocol):
    """One way to run a CacheProblem."""

    name: str

    def why_not(self, problem: CacheProblem, device: Device) -> tuple[Reason, ...]:
        """The reasons why this backend can't run the problem on the device; empty where it can."""
        ...

    def plan(self, problem: CacheProblem, device: Device) -> Choices:
        """`forward` is the kernel chosen; `backward` is None."""
        ...

    def prepare(self, plan: CachePlan) -> CacheRunner: ...

    def kernels(self, plan: CachePlan) -> tuple[KernelSpec, ...]:
        """What `prepare` and the runner's calls compile, for problems like this one of any length; empty where nothing is."""
        ...


# In order of preference. A module defines SERVING_BACKEND; it is imported when first asked.
BACKENDS = {
    "hopper": "tessera.backends.hopper.serving",
    "cpu": "tessera.backends.cpu.serving",
    "torch": "tessera.backends.cpu.portable",
}


@cache
def load(name: str) -> CacheBackend:
    """The backend of that name."""
    if name not in BACKENDS:
        raise bad_value("backend", repr(name), "there is no such backend here", "use None or one of " + ", ".join(BACKENDS))
    return import_module(BACKENDS[name]).SERVING_BACKEND


@lru_cache(maxsize=4096)
def select(problem: CacheProblem, device: Device, backend: str | None = None) -> CachePlan:
    """The plan of the first backend that can run the problem, or of the one named.

    Raises Unsupported with every backend's reasons where none can.
    """
    able, refusals = first_able(map(load, BACKENDS if backend is None else (backend,)), problem, device)
    choices = able.plan(problem, device)
    return CachePlan(problem, device, able.name, choices.forward, choices.workspace_bytes, tuple(refusals.items()))


def why_not(problem: CacheProblem, device: Device) -> dict[str, tuple[Reason, ...]]:
    """Every backend's reasons against the problem; an empty tuple where it can run it."""
    return {name: load(name).why_not(problem, device) for name in BACKENDS}
