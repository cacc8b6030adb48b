"""Right before fast: what a benchmark compares every result with before it times anything.

The oracle where its matrix of scores fits; torch's SDPA in float32 where that computes the same; else the oracle on the last
rows of queries (any mask here stays the same mask on them, since diagonals are aligned to the end), with gradients
coming in for those rows alone; or, where a dropped score or a bias goes by its row, on the first heads of the first entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tessera import reference
from tessera.bench.peers import Sdpa, features, missing, through_autograd
from tessera.mask import BOUNDS
from tessera.operands import Request, bind
from tessera.problem import Gradients, Layout, Problem
from tessera.verify import gradients_of_stored_out

MOST_QUERIES = 64
"""Up to so many queries beside a large cache its first and last entries are checked alone."""
MOST_SCORES = {"cpu": 1 << 24, "cuda": 1 << 28}
"""The most scores that the oracle is given: 128 MB a matrix on a CPU, 2 GB on a GPU, and it holds several."""

_FORWARD_ALLOWED = {torch.float16: 2 * 2**-10, torch.bfloat16: 2 * 2**-7, torch.float32: 2e-5, torch.float64: 1e-12}


def allowed_error(problem: Problem, standard: Standard | None = None) -> float:
    """The largest relative error of a row: two units of a 16-bit dtype, twice that for gradients (one more rounded factor), or
    twice what the plain formula in the problem's dtype is off: the first rows under a causal mask, where D cancels nearly all
    of dP, are many units off in every program."""
    units = _FORWARD_ALLOWED[problem.dtype] * (2 if problem.gradients is Gradients.INPUTS else 1)
    return units if standard is None else max(units, 2 * standard.eager)


@dataclass(frozen=True, eq=False)
class Standard:
    """The right results: (out,) of a forward problem or (dq, dk, dv), the first of them on the last `rows` rows of queries,
    of a batch's `entries` alone where they are given, and of so many `heads`, the first query and key/value ones.

    `dout` is what the backward is to start from, None for a forward problem; `how` says in words how this was computed.
    `eager`: the error of the same formula in the problem's dtype, for gradients; and where the oracle sees the first rows under a
    causal mask, what the rounding of the stored out does there, if it is more.
    """

    how: str
    results: tuple[Tensor, ...]
    dout: Tensor | None
    rows: int
    entries: tuple[int, ...] | None = None
    heads: tuple[int, int] | None = None
    eager: float = 0.0

    def error(self, results: Sequence[Tensor]) -> float:
        """The largest relative error of any row of any result; NaN where one holds NaN."""
        if self.entries is not None:
            results = [x[list(self.entries)] for x in results]
        if self.heads is not None:
            heads_q, heads_kv = self.heads
            results = [results[0][:, :, :heads_q], *(x[:, :, :heads_kv] for x in results[1:])]
        rows = (slice(None), slice(-self.rows, None)) if results[0].dim() == 4 else slice(-self.rows, None)
        shown = (results[0].detach()[rows], *results[1:])
        return max((worst_row(x.detach(), ref) for x, ref in zip(shown, self.results, strict=True)), key=_nan_first)


def worst_row(result: Tensor, ref: Tensor) -> float:
    """max over rows (all but the last dimension) of |x - ref| / |ref|; a row smaller than the mean counts as the mean."""
    if not ref.numel():
        return 0.0
    size = torch.linalg.vector_norm(ref.double(), dim=-1)
    difference = torch.linalg.vector_norm(result.double() - ref.double(), dim=-1)
    return (difference / size.clamp(min=size.mean().item())).max().item()


def standard_for(request: Request, problem: Problem) -> Standard:
    """The right results for these tensors, on their device."""
    limit = MOST_SCORES.get(request.q.device.type, MOST_SCORES["cpu"])
    shape = problem.shape
    fits = max(1, limit // max(1, shape.batch * shape.heads_q * shape.seqlen_k))
    if problem.layout is Layout.VARLEN:
        return by_oracle(request, problem, shape.seqlen_q)
    copies = shape.batch * shape.seqlen_k * shape.heads_q * (shape.head_dim + shape.head_dim_v)
    if copies > 16 * limit and shape.batch > 2 and problem.gradients is Gradients.NONE and shape.seqlen_q <= MOST_QUERIES:
        return _of_two_entries(request, problem)
    if fits >= shape.seqlen_q:
        return by_oracle(request, problem, shape.seqlen_q)
    if problem.score.dropout_p or (problem.score.bias is not None and problem.score.bias.shape[2] > 1):
        return _of_first_heads(request, problem, max(1, limit // (shape.seqlen_q * shape.seqlen_k) // shape.group))
    if missing(problem, Sdpa.SERVED) is None:
        with suppress(RuntimeError):  # no float32 kernel for this shape on this GPU: then as for a mask SDPA lacks
            return _by_sdpa(request, problem)
    return by_oracle(request, problem, fits)


def incoming(request: Request, problem: Problem) -> Tensor:
    """A random dout for the problem, in q's dtype: (batch, seqlen_q, heads_q, head_dim_v) or (total, heads_q, head_dim_v)."""
    generator = torch.Generator(request.q.device).manual_seed(4321)
    return torch.randn(problem.out_shape, generator=generator, device=request.q.device, dtype=problem.dtype)


def by_oracle(request: Request, problem: Problem, rows: int) -> Standard:
    """The oracle's results on the last `rows` rows of queries (all of them, where there are no more)."""
    whole = rows >= problem.shape.seqlen_q
    how = "oracle, float64" if whole else f"oracle, float64, last {rows} rows"
    leaves = _leaves(request, problem.dtype)
    q = leaves[0] if whole else leaves[0][:, -rows:]
    part, operands = bind(request._replace(q=q, k=leaves[1], v=leaves[2]))
    if problem.gradients is Gradients.NONE:
        return Standard(how, (reference.attention(part, operands)[0],), None, rows)
    dout = incoming(request, problem)
    if not whole:
        dout[:, :-rows] = 0
    last = dout if whole else dout[:, -rows:]
    exact, eager = (
        torch.autograd.grad(reference.attention(part, operands, dtype)[0], leaves, last.to(dtype))
        for dtype in (torch.float64, problem.dtype)
    )
    results = exact[0] if whole else exact[0][:, -rows:], *exact[1:]
    standard = Standard(how, results, dout, rows)
    return replace(standard, eager=standard.error(eager))


def _of_two_entries(request: Request, problem: Problem) -> Standard:
    """The oracle on the first and the last entry of a batch: its copies of a large cache's keys and values would not fit."""
    entries = (0, problem.shape.batch - 1)
    refs = []
    for b in entries:
        part, operands = bind(request._replace(q=request.q[b : b + 1], k=request.k[b : b + 1], v=request.v[b : b + 1]))
        refs.append(reference.attention(part, operands)[0])
    return Standard("oracle, float64, first and last entry", (torch.cat(refs),), None, problem.shape.seqlen_q, entries)


def _of_first_heads(request: Request, problem: Problem, groups: int) -> Standard:
    """The oracle on the first entry of a batch and its first `groups` key/value heads."""
    heads_kv = min(groups, problem.shape.heads_kv)
    heads_q = heads_kv * problem.shape.group
    q, k, v = _leaves(request, problem.dtype)
    first = {name: x[:1] for name in BOUNDS if (x := getattr(request, name)) is not None}
    if request.bias is not None:
        first["bias"] = request.bias[(None,) * (4 - request.bias.dim())][:1, :heads_q].detach()
    if request.alibi_slopes is not None:
        slopes = request.alibi_slopes
        first["alibi_slopes"] = slopes[:heads_q] if slopes.dim() == 1 else slopes[:1, :heads_q]
    if request.sinks is not None:
        first["sinks"] = request.sinks[:heads_q].detach()
    leaves = (q[:1, :, :heads_q], k[:1, :, :heads_kv], v[:1, :, :heads_kv])
    part, operands = bind(
        request._replace(q=leaves[0], k=leaves[1], v=leaves[2], bias_requires_grad=False, sinks_requires_grad=False, **first)
    )
    how, rows = f"oracle, float64, first entry, {heads_q} heads", problem.shape.seqlen_q
    standard = Standard(how, (), None, rows, (0,), (heads_q, heads_kv))
    if problem.gradients is Gradients.NONE:
        return replace(standard, results=(reference.attention(part, operands)[0],))
    dout = incoming(request, problem)
    seen = dout[:1, :, :heads_q]
    out, lse = reference.attention(part, operands)
    exact = torch.autograd.grad(out, leaves, seen.to(out.dtype), retain_graph=True)
    stored = gradients_of_stored_out(out.to(problem.dtype), out, lse, seen, list(leaves))
    eager = torch.autograd.grad(reference.attention(part, operands, problem.dtype)[0], leaves, seen)
    off = (*zip(eager, exact, strict=True), *((ref + share, ref) for ref, share in zip(exact, stored, strict=True)))
    return replace(standard, results=exact, dout=dout, eager=max(worst_row(x, ref) for x, ref in off))


def _by_sdpa(request: Request, problem: Problem) -> Standard:
    leaves = _leaves(request, torch.float32)
    q, k, v = (x.transpose(1, 2) for x in leaves)
    k, v = (x.repeat_interleave(problem.shape.group, dim=1) if problem.shape.group > 1 else x for x in (k, v))
    on_gpu = request.q.device.type == "cuda"
    # float32 on a GPU: the memory-efficient kernel; torch's default precision for products there is true float32
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if on_gpu else nullcontext():
        causal = "causal" in features(problem)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=problem.score.scale)
    out = out.transpose(1, 2)
    rows = problem.shape.seqlen_q
    if problem.gradients is Gradients.NONE:
        return Standard("SDPA, float32", (out,), None, rows)
    dout = incoming(request, problem)
    standard = Standard("SDPA, float32", torch.autograd.grad(out, leaves, dout.float()), dout, rows)
    return replace(standard, eager=standard.error(through_autograd(Sdpa(), request, problem, dout)()))


def _leaves(request: Request, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in `dtype`, wanting gradients where the request wants them."""
    q, k, v = (x.detach().to(dtype).requires_grad_(request.requires_grad) for x in (request.q, request.k, request.v))
    return q, k, v


def _nan_first(error: float) -> float:
    return float("inf") if error != error else error
