"""Hopper (sm_90a): FlashAttention-3 in Gluon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tessera import jit
from tessera.backends.hopper.arguments import FAR
from tessera.backends.hopper.backward_config import BackwardConfig
from tessera.backends.hopper.backward_launch import BackwardLaunch
from tessera.backends.hopper.backward_plan import backward_config, backward_family
from tessera.backends.hopper.backward_sizes import workspace_bytes
from tessera.backends.hopper.config import ForwardConfig
from tessera.backends.hopper.launch import ELEMENTS, ForwardLaunch, kernel_spec
from tessera.backends.hopper.plan import forward_config, forward_family
from tessera.device import Device
from tessera.dispatch import Choices, InputGradients, Runner, Shortcut, Upstream
from tessera.errors import Reason
from tessera.operands import Operands
from tessera.plan import Choice, Plan
from tessera.problem import Bias, Gradients, Layout, Problem, Reproducibility

if TYPE_CHECKING:
    from tessera.serving.problem import CacheProblem

FORWARD = "hopper-forward"
BACKWARD = "hopper-backward"


def why_not_here(device: Device) -> tuple[Reason, ...]:
    """The reason against a device that is not Hopper."""
    if device.kind == "cuda" and device.capability == (9, 0):
        return ()
    return (Reason("device", str(device), "the kernels are sm_90a machine code", "use an H100 or H200"),)


class HopperBackend:
    """16-bit attention on sm_90a."""

    name = "hopper"

    def why_not(self, problem: Problem, device: Device) -> tuple[Reason, ...]:
        if elsewhere := why_not_here(device):
            return elsewhere
        score, reasons = problem.score, []
        if problem.dtype not in ELEMENTS:
            reasons.append(Reason("q.dtype", str(problem.dtype), "the tensor cores take 16-bit operands here", "use bfloat16"))
        if problem.layout is Layout.DENSE and problem.lengths:
            names = ", ".join(problem.lengths)
            reasons.append(Reason(names, "tensor", "lengths of dense tensors are a mask here", "use Mask.padding"))
        rows = problem.shape.batch * max(problem.shape.seqlen_q, problem.shape.seqlen_k)
        if problem.layout is Layout.DENSE and rows > FAR:
            reasons.append(Reason("q", f"{rows} rows in {problem.shape.batch} sequences", "TMA counts 2^30", "divide the batch"))
        if score.bias is not None and score.bias.gradients is Gradients.INPUTS:
            reasons += _without_bias_gradient(problem, score.bias)
        return tuple(reasons)

    def plan(self, problem: Problem, device: Device) -> Choices:
        config = forward_config(problem)
        why = "TMA reads what is 16-byte aligned, other inputs are copied first"
        if problem.gradients is Gradients.NONE:
            return Choices(Choice(FORWARD, config, why), None, 0)
        backward = Choice(BACKWARD, backward_config(problem), "P from lse again; dQ summed in float32 by TMA, then rounded")
        return Choices(Choice(FORWARD, config, why), backward, workspace_bytes(problem, device.multiprocessors))

    def prepare(self, plan: Plan) -> Runner:
        if not isinstance(plan.forward.config, ForwardConfig):
            raise TypeError(f"plan.forward.config={plan.forward.config}: a plan of this backend carries a ForwardConfig")
        multiprocessors = plan.device.multiprocessors
        forward = ForwardLaunch(plan.problem, plan.forward.config, multiprocessors)
        backward = None
        if plan.backward is not None:
            if not isinstance(plan.backward.config, BackwardConfig):
                raise TypeError(f"plan.backward.config={plan.backward.config}: a plan of this backend carries a BackwardConfig")
            backward = BackwardLaunch(plan.problem, plan.backward.config, multiprocessors)
        jit.obtain(forward.spec)  # what this call waits for; beside the program then its backward's, and those of other lengths
        jit.compile_later(dict.fromkeys((*(() if backward is None else backward.specs), *self.kernels(plan))))
        return HopperRunner(plan.problem, forward, backward)

    def kernels(self, plan: Plan) -> tuple[jit.KernelSpec, ...]:
        forward = _forward_kernels(plan.problem)
        if plan.backward is None:
            return forward
        return forward + _backward_kernels(plan.problem, plan.device.multiprocessors)


def _forward_kernels(problem: Problem) -> tuple[jit.KernelSpec, ...]:
    return tuple(kernel_spec(config, problem.dtype) for config in forward_family(problem))


def _backward_kernels(problem: Problem, multiprocessors: int) -> tuple[jit.KernelSpec, ...]:
    launches = (BackwardLaunch(problem, config, multiprocessors) for config in backward_family(problem))
    return tuple(dict.fromkeys(spec for launch in launches for spec in launch.specs))


def _without_bias_gradient(problem: Problem, bias: Bias) -> list[Reason]:
    """Which biases' gradients the backward has not: of what all keys share, tiles of keys add up their sums as they come."""
    shape = problem.shape
    own = bias.shape == (shape.batch, shape.heads_q, shape.seqlen_q, shape.seqlen_k)
    if own or bias.shape[3] > 1 or problem.reproducibility is not Reproducibility.BITWISE:
        return []
    why = "what all keys share is summed in any order"
    return [Reason("bias.requires_grad", f"True of shape {bias.shape}", why, "expand its last dimension to the keys first")]


@dataclass(frozen=True)
class HopperRunner:
    """A planned problem on Hopper."""

    problem: Problem
    launch: ForwardLaunch
    gradients: BackwardLaunch | None

    def forward(self, operands: Operands) -> tuple[Tensor, Tensor]:
        if operands.q.numel() == 0 or operands.k.numel() == 0:
            return self._without_scores(operands)
        return self.launch(operands)

    def shortcut(self, others: tuple[Any, ...]) -> Shortcut | None:
        return self.launch.shortcut(others)

    def backward(self, operands: Operands, upstream: Upstream) -> InputGradients:
        if operands.q.numel() == 0 or operands.k.numel() == 0:
            return _without_derivatives(self.problem, operands, upstream)
        if self.gradients is None:
            raise ValueError("requires_grad=False: this plan has no backward; plan the problem with gradients")
        return self.gradients(operands, upstream)

    def _without_scores(self, operands: Operands) -> tuple[Tensor, Tensor]:
        lengths = operands.lengths
        return without_scores(self.problem, operands.q, operands.sinks, (lengths.cu_seqlens_q, lengths.seqused_q))


Sequences = tuple[Tensor | None, Tensor | None]
"""Where packed sequences begin, and how many of their rows count: cu_seqlens_q and seqused_q."""


def without_scores(
    problem: Problem | CacheProblem, q: Tensor, sinks: Tensor | None, sequences: Sequences
) -> tuple[Tensor, Tensor]:
    """(out, lse) of no queries, or no keys: zeros, and the sink's logit or -inf, which packed rows of no sequence have too."""
    out = torch.zeros(problem.out_shape, dtype=problem.dtype, device=q.device)
    lse = torch.full(problem.lse_shape, float("-inf"), dtype=torch.float32, device=q.device)
    if sinks is not None:
        lse = torch.where(_rows_held(problem, q, sequences), sinks.float()[:, None], lse)
    return out, lse


def _rows_held(problem: Problem | CacheProblem, q: Tensor, sequences: Sequences) -> Tensor:
    """bool, broadcastable to lse: the rows that some sequence holds. Looked up on the device."""
    starts, used = sequences
    if problem.layout is Layout.DENSE or starts is None:
        return torch.ones((), dtype=torch.bool, device=q.device)
    rows = torch.arange(q.shape[0], device=q.device)
    number = torch.searchsorted(starts[1:].contiguous(), rows, right=True)
    held = number < len(starts) - 1
    if used is None or not len(used):
        return held
    number = number.clamp(max=len(used) - 1)
    return held & (rows - starts[number] < used[number])


def _without_derivatives(problem: Problem, operands: Operands, upstream: Upstream) -> InputGradients:
    """No queries, or no keys: out is 0 whatever the inputs, and lse the sink, whose gradient is then the sum of dlse."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (operands.q, operands.k, operands.v))
    sinks, bias = operands.sinks, operands.bias
    dbias = None if bias is None else torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
    if sinks is None:
        return InputGradients(dq, dk, dv, dbias)
    if upstream.dlse is None:
        return InputGradients(dq, dk, dv, dbias, torch.zeros_like(sinks))
    lengths = operands.lengths
    held = _rows_held(problem, operands.q, (lengths.cu_seqlens_q, lengths.seqused_q))
    of_rows = torch.where(held, upstream.dlse, 0.0).movedim(-2, 0)  # heads first
    return InputGradients(dq, dk, dv, dbias, of_rows.flatten(1).sum(dim=1).to(sinks.dtype))


BACKEND = HopperBackend()
