"""The geometry of a call on the CPU: which slices of the tensors belong together, and the mask on each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.mask import UNBOUNDED, Mask, RowLimits
from tessera.operands import Operands
from tessera.problem import Layout, Problem


@dataclass(frozen=True)
class Sequence:
    """Batch entries that share one geometry: the entries, their rows of q and of k/v, and the mask on them.

    In the varlen layout there is one entry, and `rows` and `keys` cut it out of the packed tensors. `first` is the number
    of the first batch entry, for ALiBi's slopes, the bias and the dropout draws.
    """

    first: int
    entries: slice
    rows: slice
    keys: slice
    limits: RowLimits

    def place_of(self, entry: int) -> int:
        """Where batch entry `entry` stands in the tensors: packed sequences all stand in their one entry."""
        return self.entries.start + entry - self.first


def sequences(problem: Problem, operands: Operands) -> Iterator[Sequence]:
    """The problem cut into sequences; a dense batch without bounds of its own is one piece."""
    if problem.layout is Layout.VARLEN:
        yield from _packed(problem, operands)
        return
    shape, mask = problem.shape, problem.mask
    whole_q, whole_k = slice(0, shape.seqlen_q), slice(0, shape.seqlen_k)
    if not mask.bounds:
        limits = RowLimits(shape.seqlen_q, shape.seqlen_k, mask.left, mask.right)
        yield Sequence(0, slice(0, shape.batch), whole_q, whole_k, limits)
        return
    for b in range(shape.batch):
        yield Sequence(b, slice(b, b + 1), whole_q, whole_k, _dense_limits(problem, operands.mask, b))


def _dense_limits(problem: Problem, mask: Mask, b: int) -> RowLimits:
    return RowLimits(
        problem.shape.seqlen_q,
        problem.shape.seqlen_k,
        mask.left,
        mask.right,
        key_start=0 if mask.key_start is None else int(mask.key_start[b]),
        key_end=UNBOUNDED if mask.key_end is None else int(mask.key_end[b]),
        query_end=UNBOUNDED if mask.query_end is None else int(mask.query_end[b]),
        begin=_document_bounds(mask.document_begin, b),
        end=_document_bounds(mask.document_end, b),
    )


def _document_bounds(bounds: Tensor | None, b: int) -> tuple[int, ...] | None:
    return None if bounds is None else tuple(bounds[b if bounds.shape[0] > 1 else 0].tolist())


def _packed(problem: Problem, operands: Operands) -> Iterator[Sequence]:
    lengths = operands.lengths
    if lengths.cu_seqlens_q is None or lengths.cu_seqlens_k is None:
        raise ValueError("a varlen problem carries cu_seqlens_q and cu_seqlens_k")
    starts_q, starts_k = lengths.cu_seqlens_q.tolist(), lengths.cu_seqlens_k.tolist()
    used_q = None if lengths.seqused_q is None else lengths.seqused_q.tolist()
    used_k = None if lengths.seqused_k is None else lengths.seqused_k.tolist()
    for b in range(problem.shape.batch):
        n_q = starts_q[b + 1] - starts_q[b] if used_q is None else used_q[b]
        n_k = starts_k[b + 1] - starts_k[b] if used_k is None else used_k[b]
        limits = RowLimits(n_q, n_k, problem.mask.left, problem.mask.right)
        rows, keys = slice(starts_q[b], starts_q[b] + n_q), slice(starts_k[b], starts_k[b] + n_k)
        yield Sequence(b, slice(0, 1), rows, keys, limits)


def rows_in_sequences(problem: Problem, operands: Operands) -> Tensor:
    """(total_q,) bool: the rows of a packed problem that some sequence holds."""
    held = torch.zeros(problem.shape.seqlen_q, dtype=torch.bool, device=operands.q.device)
    for sequence in sequences(problem, operands):
        held[sequence.rows] = True
    return held


def four_dims(tensor: Tensor) -> Tensor:
    """(total, heads, dim) -> (1, total, heads, dim); a dense tensor as it is."""
    return tensor if tensor.dim() == 4 else tensor[None]
