"""Peers beside torch's own: the FlashAttention packages, FlashAttention-3's bare operators from a folder, flex attention."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.bench.peers import (
    BANDS,
    Backward,
    Eager,
    Forward,
    Peer,
    Plain,
    Sdpa,
    Tessera,
    TorchFlash,
    longest,
    missing,
    through_autograd,
)
from tessera.device import Device
from tessera.operands import Request
from tessera.problem import Gradients, Layout, Problem, Reproducibility

_FLASH = BANDS | {"grouped queries", "packed sequences", "head_dim_v"}
_HALF = (torch.float16, torch.bfloat16)


def _needs_hopper(problem: Problem, device: Device) -> str | None:
    if device.kind != "cuda" or device.capability[0] < 9:
        return "it needs a GPU of compute capability 9.0"
    return None if problem.dtype in _HALF else f"no {str(problem.dtype).removeprefix('torch.')}"


def _window(problem: Problem, unlimited: int | None = -1) -> tuple[int | None, int | None]:
    """(left, right) in FlashAttention's convention, `unlimited` (FA3: -1) for no limit; causal is given apart."""
    mask = problem.mask
    if mask.is_causal:
        return unlimited, unlimited
    return (unlimited if mask.left is None else mask.left), (unlimited if mask.right is None else mask.right)


@dataclass(frozen=True)
class FlashPackage:
    """A package with flash_attn_func and flash_attn_varlen_func: flash_attn_interface (FA3), flash_attn.cute (FA4). `unlimited`
    is how it spells a window's open side."""

    name: str
    module: str
    unlimited: int | None = -1

    def why_not(self, problem: Problem, device: Device) -> str | None:
        if not _importable(self.module):
            return f"{self.module} is not installed"
        return _needs_hopper(problem, device) or missing(problem, _FLASH | {"softcap"})

    def forward(self, request: Request, problem: Problem) -> Forward:
        functions = import_module(self.module)
        options: dict[str, Any] = {
            "softmax_scale": problem.score.scale,
            "causal": problem.mask.is_causal,
            "window_size": _window(problem, self.unlimited),
            "softcap": problem.score.softcap,
        }
        q, k, v = request.q, request.k, request.v
        if problem.layout is Layout.DENSE:
            return lambda: _first(functions.flash_attn_func(q, k, v, **options))
        options |= {"cu_seqlens_q": request.cu_seqlens_q, "cu_seqlens_k": request.cu_seqlens_k}
        options |= {"max_seqlen_q": longest(request.cu_seqlens_q), "max_seqlen_k": longest(request.cu_seqlens_k)}
        return lambda: _first(functions.flash_attn_varlen_func(q, k, v, **options))

    def backward(self, request: Request, problem: Problem, dout: Tensor) -> Backward:
        return through_autograd(self, request, problem, dout)


@dataclass(frozen=True)
class Fa3Operators:
    """FlashAttention-3's torch operators, loaded from a folder that holds fa3.so and, beside it, libcudart.so.12."""

    folder: Path
    name: str = "fa3"

    def why_not(self, problem: Problem, device: Device) -> str | None:
        if not (self.folder / "fa3.so").is_file():
            return f"there is no fa3.so in {self.folder}"
        return _needs_hopper(problem, device) or missing(problem, _FLASH)

    def forward(self, request: Request, problem: Problem) -> Forward:
        if problem.gradients is Gradients.INPUTS and torch.is_grad_enabled():
            q, k, v = request.q, request.k, request.v
            return lambda: _Fa3Autograd.apply(q, k, v, self, request, problem)
        run = self._forward(request, problem)
        return lambda: run()[0]

    def _forward(self, request: Request, problem: Problem) -> Any:
        operators = load_fa3(self.folder)
        options = _operator_options(request, problem)
        q, k, v = request.q, request.k, request.v
        if problem.shape.seqlen_q > 1:
            return lambda: operators.fwd(q, k, v, num_splits=1, **options)
        # decode: the operator's own heuristic chooses the splits, from metadata that an inference server makes once a step
        shape = problem.shape
        used = torch.full((shape.batch,), shape.seqlen_k, dtype=torch.int32, device=q.device)
        metadata = operators.get_scheduler_metadata(
            shape.batch, 1, shape.seqlen_k, shape.heads_q, shape.heads_kv, shape.head_dim, shape.head_dim_v, q.dtype, used,
            is_causal=False, num_splits=0,
        )  # fmt: skip
        options |= {"seqused_k": used, "scheduler_metadata": metadata}
        return lambda: operators.fwd(q, k, v, num_splits=0, **options)

    def backward(self, request: Request, problem: Problem, dout: Tensor) -> Backward:
        with torch.no_grad():
            out, lse = self._forward(request, problem)()[:2]
        return self._backward(request, problem, (out, lse, dout))

    def _backward(self, request: Request, problem: Problem, saved: tuple[Tensor, Tensor, Tensor]) -> Backward:
        """The operator's call from out, lse and dout."""
        operators = load_fa3(self.folder)
        q, k, v = (x.detach() for x in (request.q, request.k, request.v))
        out, lse, dout = (x.detach() for x in saved)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        options = _operator_options(request, problem)

        def run() -> tuple[Tensor, ...]:
            operators.bwd(dout, q, k, v, out, lse, dq, dk, dv, **options)
            return dq, dk, dv

        return run


class _Fa3Autograd(torch.autograd.Function):
    """The two operators joined, as the package's own autograd function joins them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, peer: Fa3Operators, request: Request, problem: Problem) -> Tensor:
        out, lse = peer._forward(request, problem)()[:2]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.asked = peer, request[3:], problem
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        peer, options, problem = ctx.asked
        run = peer._backward(Request(q, k, v, *options), problem, (out, lse, dout.contiguous()))
        return *run(), None, None, None


@dataclass(frozen=True)
class Flex:
    """torch's flex_attention, compiled."""

    name: str = "flex"

    def why_not(self, problem: Problem, device: Device) -> str | None:
        if device.kind != "cuda":
            return "on a CPU it has no backward, and compiles with a C++ compiler"
        return missing(problem, BANDS | {"grouped queries", "softcap", "alibi", "bias"})

    def forward(self, request: Request, problem: Problem) -> Forward:
        from torch.nn.attention.flex_attention import create_block_mask

        shape, mask, score = problem.shape, problem.mask, problem.score
        offset = shape.seqlen_k - shape.seqlen_q
        left, right = (math.inf if side is None else side for side in (mask.left, mask.right))
        block_mask = None
        if not mask.is_full:

            def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return (j >= i + offset - left) & (j <= i + offset + right)

            block_mask = create_block_mask(keep, None, None, shape.seqlen_q, shape.seqlen_k, device=str(request.q.device))

        q, k, v = (x.transpose(1, 2) for x in (request.q, request.k, request.v))
        options: dict[str, Any] = {"score_mod": _score_mod(request, problem), "block_mask": block_mask}
        options |= {"scale": score.scale, "enable_gqa": shape.group > 1}
        compiled = _compiled_flex(problem)
        return lambda: compiled(q, k, v, **options).transpose(1, 2)

    def backward(self, request: Request, problem: Problem, dout: Tensor) -> Backward:
        return through_autograd(self, request, problem, dout)


def _score_mod(request: Request, problem: Problem) -> Callable[..., Tensor] | None:
    """What flex_attention does to a scaled score: softcap, bias, ALiBi, in that order; None where it stays as it is."""
    shape, score, slopes, bias = problem.shape, problem.score, request.alibi_slopes, request.bias
    offset = shape.seqlen_k - shape.seqlen_q
    if bias is not None:
        bias = bias[(None,) * (4 - bias.dim())]
        own = [int(size > 1) for size in bias.shape]  # a dimension that all share has one index

    def modify(x: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if score.softcap:
            x = score.softcap * torch.tanh(x / score.softcap)
        if bias is not None:
            x = x + bias[b * own[0], h * own[1], i * own[2], j * own[3]]
        if slopes is not None:
            x = x - (slopes[h] if slopes.dim() == 1 else slopes[b, h]) * (i + offset - j).abs()
        return x

    return modify if score.softcap or bias is not None or slopes is not None else None


@lru_cache(maxsize=1)
def _compiled_flex(problem: Problem) -> Any:
    """Each problem is compiled as a process's first: a function compiled for eight runs the ninth without a word as plain
    operations, a hundred times as slow. `fullgraph`: an error instead."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@cache
def load_fa3(folder: Path) -> Any:
    """The torch operators of the fa3.so in a folder."""
    runtime = folder / "libcudart.so.12"
    if runtime.is_file():
        ctypes.CDLL(str(runtime))
    torch.ops.load_library(str(folder / "fa3.so"))
    return torch.ops.flash_attn_3


def _operator_options(request: Request, problem: Problem) -> dict[str, Any]:
    """What both of FlashAttention-3's operators are told of a problem."""
    options: dict[str, Any] = {"is_causal": problem.mask.is_causal, "softmax_scale": problem.score.scale}
    left, right = _window(problem)
    if (left, right) != (-1, -1):
        options |= {"window_size_left": left, "window_size_right": right}
    return options | (_packed(request) if problem.layout is Layout.VARLEN else {})


def _packed(request: Request) -> dict[str, Any]:
    return {
        "cu_seqlens_q": request.cu_seqlens_q,
        "cu_seqlens_k": request.cu_seqlens_k,
        "max_seqlen_q": longest(request.cu_seqlens_q),
        "max_seqlen_k": longest(request.cu_seqlens_k),
    }


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def peers(fa3_folder: Path | None = None, backend: str | None = None) -> dict[str, Peer]:
    """Every peer by name, whether or not it can run here: each says so itself (`Peer.why_not`). Last our own call with
    deterministic=True, by our `backend`, whose ratio is what a fixed order costs, and without what modifies scores."""
    fa3: Peer = FlashPackage("fa3", "flash_attn_interface") if fa3_folder is None else Fa3Operators(fa3_folder)
    everyone: tuple[Peer, ...] = (
        Sdpa(),
        Eager(),
        Sdpa("cudnn", "CUDNN_ATTENTION"),
        TorchFlash(),
        fa3,
        FlashPackage("fa4", "flash_attn.cute", None),
        Flex(),
    )
    named = {peer.name: peer for peer in everyone}
    return named | {"deterministic": Tessera(backend, Reproducibility.BITWISE), "plain": Plain()}


DEFAULT_PEERS = {"cpu": ("sdpa", "eager"), "cuda": ("cudnn", "fa2", "fa3", "fa4")}
"""The peers that a benchmark times unless told otherwise, by the device's kind; those that can't run are left out."""
