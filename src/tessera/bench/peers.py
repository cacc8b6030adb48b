"""The programs that a benchmark times: ours, and the peers that come with torch. Each is an object with a name that says why
it cannot run a problem, and makes the call to time from a request.

The packages beside torch (FlashAttention-3 and -4, flex attention) stand in flash_peers.py; `available` finds all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tessera import dispatch, operators
from tessera.bench import machine
from tessera.device import Device
from tessera.mask import Mask
from tessera.operands import Request
from tessera.problem import Gradients, Layout, Problem, Reproducibility

Forward = Callable[[], Tensor]
"""Runs attention and returns out, in the layout of tessera.attention."""
Backward = Callable[[], tuple[Tensor, ...]]
"""Runs the backward alone and returns dq, dk, dv."""


class Peer(Protocol):
    """A program to time. `forward` and `backward` do all preparation; what they return is what the clock sees."""

    @property
    def name(self) -> str: ...

    def why_not(self, problem: Problem, device: Device) -> str | None:
        """Why it cannot run the problem on the device; None where it can."""
        ...

    def forward(self, request: Request, problem: Problem) -> Forward: ...

    def backward(self, request: Request, problem: Problem, dout: Tensor) -> Backward: ...


BANDS = frozenset({"causal", "causal with seqlen_q != seqlen_k", "window"})
"""Every mask that is a band along the diagonal."""


def features(problem: Problem) -> frozenset[str]:
    """What a problem asks for beyond plain square attention, in words."""
    shape, score, mask = problem.shape, problem.score, problem.mask
    asked = {
        "causal": mask.is_causal and shape.seqlen_q > 1,
        "causal with seqlen_q != seqlen_k": mask.is_causal and 1 < shape.seqlen_q != shape.seqlen_k,
        "window": mask.left is not None or mask.right not in (None, 0),
        "padding or documents": bool(mask.bounds),
        "packed sequences": problem.layout is Layout.VARLEN,
        "own lengths": any(name.startswith("seqused") for name in problem.lengths),
        "grouped queries": shape.group > 1,
        "head_dim_v": shape.head_dim != shape.head_dim_v,
        "softcap": score.softcap > 0,
        "alibi": score.alibi is not None,
        "bias": score.bias is not None,
        "gradient of a bias": score.bias is not None and score.bias.gradients is Gradients.INPUTS,
        "sinks": score.sinks is not None,
        "dropout": score.dropout_p > 0,
    }
    return frozenset(name for name, present in asked.items() if present)


def missing(problem: Problem, served: frozenset[str]) -> str | None:
    """The features of a problem that are not `served`, as a refusal."""
    lacking = sorted(features(problem) - served)
    return f"no {', no '.join(lacking)}" if lacking else None


def through_autograd(peer: Peer, request: Request, problem: Problem, dout: Tensor) -> Backward:
    """The backward of a peer whose forward autograd can differentiate; the graph is kept from call to call."""
    inputs = tuple(x.detach().requires_grad_() for x in (request.q, request.k, request.v))
    with torch.enable_grad():
        out = peer.forward(request._replace(q=inputs[0], k=inputs[1], v=inputs[2]), problem)()
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


@dataclass(frozen=True)
class Tessera:
    """Ours, through the operators that the public functions call. `backend`: one by name, or None for dispatch's choice;
    `reproducibility`: of the gradients, by deterministic=True."""

    backend: str | None = None
    reproducibility: Reproducibility = Reproducibility.ANY_ORDER

    @property
    def name(self) -> str:
        name = "tessera" if self.backend is None else f"tessera:{self.backend}"
        return name if self.reproducibility is Reproducibility.ANY_ORDER else f"{name}-deterministic"

    def why_not(self, problem: Problem, device: Device) -> str | None:
        problem = replace(problem, reproducibility=self.reproducibility)
        refusals = dispatch.why_not(problem, device)
        asked = refusals if self.backend is None else {self.backend: dispatch.load(self.backend).why_not(problem, device)}
        if any(not reasons for reasons in asked.values()):
            return None
        return "; ".join(f"{name}: {reasons[0]}" for name, reasons in asked.items())

    def forward(self, request: Request, problem: Problem) -> Forward:
        wanted = problem.gradients is Gradients.INPUTS
        ordered = self.reproducibility is Reproducibility.BITWISE
        own = request._replace(backend=self.backend, requires_grad=wanted, deterministic=ordered)
        return lambda: operators.forward(own)[0]

    def backward(self, request: Request, problem: Problem, dout: Tensor) -> Backward:
        return through_autograd(self, request, problem, dout)


@dataclass(frozen=True)
class Plain:
    """Ours without bias, ALiBi and dropout: its ratio is what these cost. It answers a question of its own, `asked`."""

    name: str = "tessera-plain"

    @staticmethod
    def asked(request: Request) -> Request:
        return request._replace(bias=None, bias_requires_grad=False, alibi_slopes=None, dropout_p=0.0, seed=None)

    def why_not(self, problem: Problem, device: Device) -> str | None:
        score = replace(problem.score, bias=None, alibi=None, dropout_p=0.0)
        return Tessera().why_not(replace(problem, score=score), device)

    def forward(self, request: Request, problem: Problem) -> Forward:
        return Tessera().forward(request, problem)

    def backward(self, request: Request, problem: Problem, dout: Tensor) -> Backward:
        return through_autograd(self, request, problem, dout)


@dataclass(frozen=True)
class Eager:
    """Attention as the formula has it, the matrix of scores in memory: what Tessera stands in for."""

    name: str = "eager"

    SERVED = BANDS | {"grouped queries", "head_dim_v", "softcap"}

    def why_not(self, problem: Problem, device: Device) -> str | None:
        needed = self.bytes_needed(problem)
        free = machine.available_bytes(device.kind)
        if needed > free / 2:
            return f"its scores need {needed / 1e9:.0f} GB, over half of the {free / 1e9:.0f} GB that are free"
        return missing(problem, self.SERVED)

    @staticmethod
    def bytes_needed(problem: Problem) -> int:
        """Three matrices of scores at once: before and after the scale or mask, and the softmax's."""
        shape = problem.shape
        return 3 * shape.batch * shape.heads_q * shape.seqlen_q * shape.seqlen_k * problem.dtype.itemsize

    def forward(self, request: Request, problem: Problem) -> Forward:
        shape, score = problem.shape, problem.score
        q, k, v = (x.transpose(1, 2) for x in (request.q, request.k, request.v))
        masked = None
        if not problem.mask.is_full:
            # The mask is made once, as a model makes it for all of its layers.
            masked = ~Mask(problem.mask.left, problem.mask.right).allowed(1, shape.seqlen_q, shape.seqlen_k).to(q.device)

        def run() -> Tensor:
            keys, values = (x.repeat_interleave(shape.group, dim=1) if shape.group > 1 else x for x in (k, v))
            x = q @ keys.transpose(-1, -2) * score.scale  # (batch, heads, seqlen_q, seqlen_k)
            if score.softcap:
                x = score.softcap * torch.tanh(x / score.softcap)
            if masked is not None:
                x = x.masked_fill(masked, float("-inf"))
            return (torch.softmax(x, dim=-1) @ values).transpose(1, 2)

        return run

    def backward(self, request: Request, problem: Problem, dout: Tensor) -> Backward:
        return through_autograd(self, request, problem, dout)


@dataclass(frozen=True)
class Sdpa:
    """torch's scaled_dot_product_attention: its own choice of kernel, or one kernel by its name in SDPBackend.

    (A name, for the enum itself does not pickle.)
    """

    name: str = "sdpa"
    kernel: str | None = None

    SERVED = frozenset({"causal", "grouped queries"})

    def why_not(self, problem: Problem, device: Device) -> str | None:
        if self.kernel is not None and device.kind != "cuda":
            return "it runs on CUDA alone"
        if self.kernel is not None and problem.dtype not in (torch.float16, torch.bfloat16):
            return f"no {str(problem.dtype).removeprefix('torch.')}"
        bias = problem.score.bias
        if bias is None or self.kernel == "FLASH_ATTENTION":
            return missing(problem, self.SERVED)
        if bias.dtype != problem.dtype:
            return "a bias in the dtype of q alone"
        return missing(problem, frozenset({"bias", "grouped queries"}))  # a mask or causal, not both

    def forward(self, request: Request, problem: Problem) -> Forward:
        q, k, v = (x.transpose(1, 2) for x in (request.q, request.k, request.v))
        options: dict[str, Any] = {"is_causal": "causal" in features(problem), "enable_gqa": problem.shape.group > 1}
        options |= {"scale": problem.score.scale, "attn_mask": request.bias}

        def run() -> Tensor:
            out = functional.scaled_dot_product_attention(q, k, v, **options)
            return out.transpose(1, 2)

        if self.kernel is None:
            return run
        kernel = getattr(SDPBackend, self.kernel)

        def run_on_kernel() -> Tensor:
            with sdpa_kernel(kernel):
                return run()

        return run_on_kernel

    def backward(self, request: Request, problem: Problem, dout: Tensor) -> Backward:
        return through_autograd(self, request, problem, dout)


@dataclass(frozen=True)
class TorchFlash:
    """FlashAttention-2 as torch carries it: SDPA's flash kernel, and varlen_attn for packed sequences."""

    name: str = "fa2"

    def why_not(self, problem: Problem, device: Device) -> str | None:
        if problem.layout is Layout.DENSE:
            return self._dense().why_not(problem, device)
        if device.kind != "cuda":
            return "it runs on CUDA alone"
        return missing(problem, frozenset({"causal", "causal with seqlen_q != seqlen_k", "packed sequences"}))

    @staticmethod
    def _dense() -> Sdpa:
        return Sdpa("fa2", "FLASH_ATTENTION")

    def forward(self, request: Request, problem: Problem) -> Forward:
        if problem.layout is Layout.DENSE:
            return self._dense().forward(request, problem)
        from torch.nn.attention.varlen import varlen_attn

        offsets = request.cu_seqlens_q, request.cu_seqlens_k
        arguments: Any = (request.q, request.k, request.v, *offsets, *map(longest, offsets))
        window = (-1, 0) if problem.mask.is_causal else (-1, -1)

        def run() -> Tensor:
            out = varlen_attn(*arguments, scale=problem.score.scale, window_size=window)
            return out[0] if isinstance(out, tuple) else out

        return run

    def backward(self, request: Request, problem: Problem, dout: Tensor) -> Backward:
        return through_autograd(self, request, problem, dout)


def longest(offsets: Tensor | None) -> int:
    """The longest of the packed sequences that these offsets cut; waits for the device."""
    return 0 if offsets is None else int(offsets.diff().max())
