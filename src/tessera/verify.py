"""The one tolerance rule, and the run of a request against the oracle that `tessera check` and the tests share.

    max|x - ref| <= 2 max|eager - ref| + noise

ref is the oracle in float64; eager is the oracle's own arithmetic in the compute dtype on the same inputs; noise is the
one unit in the last place of the result's dtype at the size of ref, twice what rounding ref alone costs, and 64 units of the
compute dtype (FlashAttention's test rule, with its ref + 0.3 - 0.3 made explicit). A gradient may also lie as far from ref as
twice what the rounding of the stored out does to it through D = rowsum(dO * O), which in a few rows eager may by luck not
show; those of bias and sinks get it on top, with the rounding of long sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tessera import operators, reference
from tessera.operands import Request, bind, gather
from tessera.problem import Problem


@dataclass(frozen=True)
class Comparison:
    """One result beside the oracle's: the largest error, and what the rule allows."""

    name: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # NaN fails

    def __str__(self) -> str:
        return f"{self.name} {self.error:.2e} (allowed {self.allowed:.2e})"


def tolerance(ref: Tensor, eager: Tensor, dtype: torch.dtype) -> float:
    """The largest error the rule allows; `ref` float64, `eager` the low-precision run, `dtype` the result's."""
    if not ref.numel():
        return 0.0
    finite = ref.isfinite()
    shown = ref[finite]
    if not shown.numel():
        return 0.0
    largest = shown.abs().max().item()
    compute = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    noise = torch.finfo(dtype).eps * largest + 64 * compute * max(1.0, largest)
    return 2 * (eager.double()[finite] - shown).abs().max().item() + noise


def compare(name: str, result: Tensor, ref: Tensor, eager: Tensor) -> Comparison:
    """`result` against `ref` by the rule; infinities must stand at the same places."""
    if result.shape != ref.shape:
        return Comparison(f"{name} of shape {tuple(result.shape)}, not {tuple(ref.shape)}", float("nan"), 0.0)
    difference = torch.where(result.double() == ref, 0.0, (result.double() - ref).abs())
    error = difference.max().item() if difference.numel() else 0.0
    return Comparison(name, error, tolerance(ref, eager, result.dtype))


@dataclass(frozen=True, eq=False)
class Oracle:
    """(out, lse) of a request in float64, `refs`, and in the request's own dtype, `eagers`; what they say of results."""

    problem: Problem
    request: Request
    exact: Request
    refs: tuple[Tensor, Tensor]
    eagers: tuple[Tensor, Tensor]

    @staticmethod
    def of(request: Request) -> Oracle:
        """Differentiable where the request wants gradients."""
        exact = in_float64(request)
        with torch.set_grad_enabled(request.requires_grad):
            problem, operands = bind(request)
            refs = reference.attention(problem, gather(exact))
            return Oracle(problem, request, exact, refs, reference.attention(problem, operands, request.q.dtype))

    def outputs(self, results: tuple[Tensor, Tensor]) -> list[Comparison]:
        """(out, lse) by the rule."""
        return [compare(*row) for row in zip(("out", "lse"), results, self.refs, self.eagers, strict=True)]

    def gradients(self, out: Tensor, found: dict[str, Tensor], dout: Tensor, dlse: Tensor) -> list[Comparison]:
        """By the rule, the gradients of <out, dout> + <lse, dlse> that were `found`, by their inputs' names; `out` as stored."""
        names, inputs = differentiated(self.request)
        exact_inputs = differentiated(self.exact)[1]
        refs, eagers = _gradients(*self.refs, dout, dlse, exact_inputs), _gradients(*self.eagers, dout, dlse, inputs)
        stored = gradients_of_stored_out(out, *self.refs, dout, exact_inputs)
        rows, comparisons = self.refs[1].numel(), []
        terms = {"bias": rows * self.problem.shape.seqlen_k, "sinks": rows}
        for name, ref, eager, share in zip(names, refs, eagers, stored, strict=True):
            if name not in found:
                continue
            compared = compare(f"d{name}", found[name], ref, eager)
            of_out = 2 * share.abs().max().item() if share.numel() else 0.0
            allowed = max(compared.allowed, of_out)
            if name in terms:
                allowed = compared.allowed + of_out + _noise_of_sums(terms[name] / max(1, ref.numel()), self.problem.lse_dtype)
            comparisons.append(replace(compared, allowed=allowed))
        return comparisons


def run(request: Request, check_gradients: bool = True) -> list[Comparison]:
    """Run a request through the operators and compare out, lse and the gradients with the oracle's."""
    oracle = Oracle.of(request)
    with torch.set_grad_enabled(request.requires_grad):
        results = operators.forward(request)
    comparisons = oracle.outputs(results)
    if not request.requires_grad or not check_gradients:
        return comparisons
    generator = torch.Generator().manual_seed(1234)
    dout, dlse = (torch.randn(x.shape, generator=generator).to(x.dtype).to(x.device) for x in results)
    names, inputs = differentiated(request)
    found = dict(zip(names, _gradients(*results, dout, dlse, inputs), strict=True))
    return comparisons + oracle.gradients(results[0], found, dout, dlse)


def trainable(request: Request) -> tuple[list[str], list[Tensor]]:
    """The inputs that a request may differentiate by, and their names."""
    names = [name for name in ("q", "k", "v", "bias", "sinks") if getattr(request, name) is not None]
    return names, [getattr(request, name) for name in names]


def differentiated(request: Request) -> tuple[list[str], list[Tensor]]:
    """Those of them by which it is: a bias may be constant."""
    pairs = [(name, x) for name, x in zip(*trainable(request), strict=True) if x.requires_grad]
    return [name for name, _ in pairs], [x for _, x in pairs]


def in_float64(request: Request) -> Request:
    """The request with float64 copies of those inputs: autograd rounds a gradient to the dtype of what it is of, the oracle's
    too, and a sum over packed sequences once a sequence. A tensor given twice stays one."""
    names, inputs = trainable(request)
    copies = {id(x): x.detach().double().requires_grad_(x.requires_grad) for x in inputs}
    replaced: dict[str, Any] = {name: copies[id(x)] for name, x in zip(names, inputs, strict=True)}
    return request._replace(**replaced)


def _noise_of_sums(terms: float, compute: torch.dtype) -> float:
    """The rounding of a sum of that many terms of size 1 and either sign, where the sum itself may be 0."""
    return 8 * torch.finfo(compute).eps * math.sqrt(terms)


def gradients_of_stored_out(stored: Tensor, out: Tensor, lse: Tensor, dout: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """What the rounding of the stored out does to the gradients through D = rowsum(dO * O): the same as a gradient -dD of lse.

    Every backward that recomputes P pays it. In a sum of few terms, as a sink's gradient is, eager's own error may by luck be
    far smaller than what low precision costs.
    """
    d_error = (dout.double() * (stored.detach().double() - out.detach())).sum(dim=-1).transpose(-1, -2)
    return _gradients(out, lse, torch.zeros_like(dout), d_error, inputs)


def _gradients(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of <out, dout> + <lse, dlse> over the rows whose lse is finite."""
    rows = lse.isfinite()
    total = (out * dout.to(out.dtype)).sum() + torch.where(rows, lse, 0.0).mul(dlse.to(lse.dtype)).sum()
    if not total.requires_grad:  # no sequence at all: nothing depends on the inputs
        return tuple(torch.zeros_like(x) for x in inputs)
    return torch.autograd.grad(total, inputs, retain_graph=True)
