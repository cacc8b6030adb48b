"""Hopper (sm_90a): FlashAttention-3 in Gluon."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.backends.hopper.config import ForwardConfig
from tessera.backends.hopper.launch import ELEMENTS, ForwardLaunch
from tessera.backends.hopper.plan import forward_config
from tessera.device import Device
from tessera.dispatch import Choices, InputGradients, Runner, Upstream
from tessera.errors import Reason
from tessera.operands import Operands
from tessera.plan import Choice, Plan
from tessera.problem import Gradients, Layout, Problem

FORWARD = "hopper-forward"


class HopperBackend:
    """16-bit attention on sm_90a."""

    name = "hopper"

    def why_not(self, problem: Problem, device: Device) -> tuple[Reason, ...]:
        if device.kind != "cuda" or device.capability != (9, 0):
            return (Reason("device", str(device), "the kernels are sm_90a machine code", "use an H100 or H200"),)
        score, reasons = problem.score, []
        if problem.dtype not in ELEMENTS:
            reasons.append(Reason("q.dtype", str(problem.dtype), "the tensor cores take 16-bit operands here", "use bfloat16"))
        if score.dropout_p:
            reasons.append(Reason("dropout_p", str(score.dropout_p), "this kernel does not drop", "use dropout_p=0"))
        if score.bias is not None:
            reasons.append(Reason("bias", str(score.bias.shape), "this kernel adds no bias", "use another backend"))
        if score.alibi is not None:
            reasons.append(Reason("alibi_slopes", score.alibi.value, "this kernel has no ALiBi", "use another backend"))
        if score.scale <= 0 and not score.softcap:
            why = "the row maximum is taken before the scale is applied"
            reasons.append(Reason("softmax_scale", str(score.scale), why, "scale q by it and pass 1.0"))
        if problem.layout is Layout.DENSE and problem.lengths:
            names = ", ".join(problem.lengths)
            reasons.append(Reason(names, "tensor", "lengths of dense tensors are a mask here", "use Mask.padding"))
        if problem.gradients is Gradients.INPUTS:
            reasons.append(Reason("requires_grad", "True", "there is no backward kernel yet", "use torch.no_grad()"))
        return tuple(reasons)

    def plan(self, problem: Problem, device: Device) -> Choices:
        config = forward_config(problem)
        why = "TMA reads what is 16-byte aligned, other inputs are copied first"
        return Choices(Choice(FORWARD, config, why), None, 0)

    def prepare(self, plan: Plan) -> Runner:
        if not isinstance(plan.forward.config, ForwardConfig):
            raise TypeError(f"plan.forward.config={plan.forward.config}: a plan of this backend carries a ForwardConfig")
        return HopperRunner(plan.problem, ForwardLaunch(plan.problem, plan.forward.config, plan.device.multiprocessors))


@dataclass(frozen=True)
class HopperRunner:
    """A planned problem on Hopper."""

    problem: Problem
    launch: ForwardLaunch

    def forward(self, operands: Operands) -> tuple[Tensor, Tensor]:
        if operands.q.numel() == 0 or operands.k.numel() == 0:
            return _without_scores(self.problem, operands)
        return self.launch(operands)

    def backward(self, operands: Operands, upstream: Upstream) -> InputGradients:
        raise NotImplementedError("no backward kernel yet: why_not refuses gradients")


def _without_scores(problem: Problem, operands: Operands) -> tuple[Tensor, Tensor]:
    """No queries, or no keys: zeros, and the sink's logit or -inf."""
    device = operands.q.device
    out = torch.zeros(problem.out_shape, dtype=problem.dtype, device=device)
    lse = torch.full(problem.lse_shape, float("-inf"), dtype=torch.float32, device=device)
    if operands.sinks is not None and problem.layout is Layout.DENSE:
        lse = operands.sinks.float()[:, None].expand(lse.shape).contiguous()
    return out, lse


BACKEND = HopperBackend()
