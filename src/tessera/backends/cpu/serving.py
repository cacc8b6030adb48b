"""Attention over a KV cache in torch operations: each sequence's keys are gathered, and the tiled algorithm runs on them.

First every new row is rotated, quantised and written; then sequence by sequence the keys that its rows can see are gathered in
float32 (pages resolved, FP8 scaled), cut into `num_splits` parts where that is asked, attended to part by part, and the parts
merged. A sequence is worked on alone, so its bits do not depend on the batch around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tessera.backends.cpu import TILED, tiled, tiles_for
from tessera.backends.cpu.cache_rows import CacheRows, Span, spans
from tessera.backends.cpu.rotary import rotate
from tessera.device import Device
from tessera.dispatch import Choices
from tessera.errors import Reason
from tessera.mask import Mask, RowLimits
from tessera.operands import NO_LENGTHS, Operands
from tessera.partial import merge, merge_weights
from tessera.plan import Choice
from tessera.problem import Problem, Shape
from tessera.serving.dispatch import CacheRunner
from tessera.serving.operands import CacheOperands
from tessera.serving.plan import CachePlan
from tessera.serving.problem import CacheProblem

if TYPE_CHECKING:
    from tessera.jit import KernelSpec


class CpuServing:
    """Attention over a KV cache on the CPU, every option of the API."""

    name = "cpu"

    def why_not(self, problem: CacheProblem, device: Device) -> tuple[Reason, ...]:
        if device.kind == "cpu":
            return ()
        return (Reason("device", str(device), "this backend runs on the CPU", "use q.cpu() or another backend"),)

    def plan(self, problem: CacheProblem, device: Device) -> Choices:
        return Choices(Choice(TILED, None, "each sequence gathered, then the tiled algorithm"), None, gathered_bytes(problem))

    def prepare(self, plan: CachePlan) -> CacheRunner:
        return GatheringRunner(plan.problem)

    def kernels(self, plan: CachePlan) -> tuple[KernelSpec, ...]:
        return ()


def gathered_bytes(problem: CacheProblem) -> int:
    """Bytes of scratch: the keys and values of one full sequence in float32."""
    shape = problem.shape
    return 4 * shape.seqlen_k * shape.heads_kv * (shape.head_dim + shape.head_dim_v)


@dataclass(frozen=True)
class GatheringRunner:
    """A CacheProblem, one sequence after the other."""

    problem: CacheProblem

    def run(self, operands: CacheOperands) -> tuple[Tensor, Tensor]:
        problem, q = self.problem, operands.q
        out = torch.zeros(problem.out_shape, dtype=problem.dtype, device=q.device)
        lse = torch.full(problem.lse_shape, float("-inf"), dtype=torch.float32, device=q.device)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            of_batch = spans(problem, operands)
            rows = CacheRows(problem, operands)
            if problem.append is not None:
                for span in of_batch:
                    rows.append(span)
            for span in of_batch:
                if span.rows.stop > span.rows.start:
                    own_out, own_lse = self._attend(operands, rows, span)
                    span.of(out).copy_(own_out)
                    span.of_lse(lse).copy_(own_lse)
        return out, lse

    def _attend(self, operands: CacheOperands, rows: CacheRows, span: Span) -> tuple[Tensor, Tensor]:
        """out (rows, heads_q, head_dim_v) and lse (heads_q, rows) of one sequence, float32."""
        problem = self.problem
        q = span.of(operands.q)
        if problem.append is not None and problem.append.rotary is not None:
            q = rotate(q, span.cached, operands, problem.append.rotary)
        # The mask is aligned to the bottom right, so keys that no row sees are cut off at the left.
        limits = RowLimits(len(q), span.seqlen, problem.mask.left, problem.mask.right, key_start=span.leftpad)
        begin = min(limits.lo(0), span.seqlen)
        k, v = rows.gather(span, begin)
        shape = problem.shape
        dense = Problem(
            Shape(1, len(q), len(k), shape.heads_q, shape.heads_kv, shape.head_dim, shape.head_dim_v),
            torch.float32,
            replace(problem.score, sinks=None),
            mask=problem.mask,
        )
        mask = Mask(problem.mask.left, problem.mask.right)
        tensors = Operands(q[None].float(), k[None], v[None], NO_LENGTHS, mask, None, None, None, 0)
        out, lse = _in_parts(dense, tensors, problem.splits or 1)
        if operands.sinks is not None:
            weight, _, lse = merge_weights(lse, operands.sinks.float()[:, None].expand_as(lse))
            out = out * weight.transpose(-1, -2).unsqueeze(-1)
        return out[0], lse[0]


def _in_parts(problem: Problem, operands: Operands, parts: int) -> tuple[Tensor, Tensor]:
    """(out, lse) from the keys in `parts` nearly equal parts, merged from left to right."""
    tiles = tiles_for(problem)
    if parts == 1:
        return tiled.forward(problem, operands, tiles)
    results = (_part(problem, operands, keys, tiles) for keys in _cut(problem.shape.seqlen_k, parts))
    out, lse = next(results)
    for part in results:
        out, lse = merge(out, lse, *part)
    return out, lse


def _cut(keys: int, parts: int) -> Iterator[range]:
    for part in range(parts):
        yield range(keys * part // parts, keys * (part + 1) // parts)


def _part(problem: Problem, operands: Operands, keys: range, tiles: tiled.Tiles) -> tuple[Tensor, Tensor]:
    start, end = (torch.tensor([edge], dtype=torch.int32, device="cpu") for edge in (keys.start, keys.stop))
    mask = operands.mask & Mask(key_start=start, key_end=end)
    return tiled.forward(replace(problem, mask=mask.spec), operands._replace(mask=mask), tiles)


SERVING_BACKEND = CpuServing()
