"""Attention over a KV cache on Hopper: which kernel serves a problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera import jit
from tessera.backends.hopper import decode_plan
from tessera.backends.hopper.decode_launch import DecodeLaunch, kernel_spec
from tessera.backends.hopper.decode_plan import DecodePlan
from tessera.device import Device
from tessera.dispatch import Choices
from tessera.errors import Reason
from tessera.plan import Choice
from tessera.problem import Layout
from tessera.serving.dispatch import CacheRunner
from tessera.serving.operands import CacheOperands
from tessera.serving.plan import CachePlan
from tessera.serving.problem import CacheProblem

DECODE = "hopper-decode"


class HopperServing:
    """16-bit queries over a KV cache on sm_90a: few rows a key/value head by decode.py."""

    name = "hopper"

    def why_not(self, problem: CacheProblem, device: Device) -> tuple[Reason, ...]:
        if device.kind != "cuda" or device.capability != (9, 0):
            return (Reason("device", str(device), "the kernels are sm_90a machine code", "use an H100 or H200"),)
        return decode_plan.why_not(problem)

    def plan(self, problem: CacheProblem, device: Device) -> Choices:
        plan = decode_plan.decode_plan(problem, device)
        why = "memory bounds it: 16 rows a tile of keys, every SM with an equal share"
        return Choices(Choice(DECODE, plan, why), None, plan.workspace_bytes())

    def kernels(self, plan: CachePlan) -> tuple[jit.KernelSpec, ...]:
        """The kernels that a plan launches."""
        return (kernel_spec(_decoding(plan).config, plan.problem.dtype),)

    def prepare(self, plan: CachePlan) -> CacheRunner:
        return HopperServingRunner(plan.problem, DecodeLaunch(plan.problem, _decoding(plan)))


def _decoding(plan: CachePlan) -> DecodePlan:
    if not isinstance(plan.choice.config, DecodePlan):
        raise TypeError(f"plan.choice.config={plan.choice.config}: a plan of this backend carries a DecodePlan")
    return plan.choice.config


@dataclass(frozen=True)
class HopperServingRunner:
    """A planned problem on Hopper."""

    problem: CacheProblem
    launch: DecodeLaunch

    def run(self, operands: CacheOperands) -> tuple[Tensor, Tensor]:
        if operands.q.numel() == 0 or operands.k_cache.numel() == 0 or self.problem.shape.seqlen_k == 0:
            return _without_scores(self.problem, operands)
        return self.launch.run(operands)


def _without_scores(problem: CacheProblem, operands: CacheOperands) -> tuple[Tensor, Tensor]:
    """No queries, or a cache without rows: zeros, and the sink's logit or -inf."""
    device = operands.q.device
    out = torch.zeros(problem.out_shape, dtype=problem.dtype, device=device)
    lse = torch.full(problem.lse_shape, float("-inf"), dtype=torch.float32, device=device)
    if operands.sinks is not None and problem.layout is Layout.DENSE:
        lse = operands.sinks.float()[:, None].expand(lse.shape).contiguous()
    return out, lse


SERVING_BACKEND = HopperServing()
