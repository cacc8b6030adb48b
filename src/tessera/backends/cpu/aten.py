"""An adapter to torch's own CPU flash kernel, for the problems that it computes exactly.

The operator (aten::_scaled_dot_product_flash_attention_for_cpu) has traps, each handled here and nowhere else: it kills
the process on empty inputs, aligns the causal mask to the top left, reports lse 0 for rows with no key, and gives no
gradient for lse. It sees only what it gets right: dense blocks without empty rows, full or square causal. A causal mask
aligned to the bottom right is such a square beside a full block; the two are merged by lse. Packed and padded
batches are cut into their sequences, except that short padded ones go through in one call with a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from tessera.backends.cpu.sequences import Sequence, four_dims, sequences
from tessera.backends.cpu.tiled import compute_dtype, sinks_gradient, with_sinks
from tessera.device import Device
from tessera.dispatch import InputGradients, Upstream
from tessera.operands import Operands
from tessera.partial import merge
from tessera.problem import Gradients, Problem

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Causality(Enum):
    """What the kernel is told of a block."""

    FULL = "full"
    SQUARE_CAUSAL = "square causal"


@dataclass(frozen=True)
class Block:
    """Rows and keys of one sequence that the kernel takes in one call."""

    rows: slice
    keys: slice
    causality: Causality


MASKED_UP_TO = 512
"""Up to so many keys a batch padded in its keys alone is one call with a mask; above, a call an entry, which skips the padding.
32 x 104 tokens, 12 heads of 32: one call 26 ms, 32 calls 34 ms on one thread; on two threads of a shared machine, where each call
waits for the slower thread, 58 and 373 ms (AMD EPYC, 2 cores, 2026-11-21)."""


def limits_of(problem: Problem, device: Device) -> str | None:
    """Why torch's kernel does not compute this problem exactly, or None where it does."""
    score, shape, mask = problem.score, problem.shape, problem.mask
    checks = (
        (device.kind == "cpu", "it runs on the CPU alone"),
        (shape.head_dim == shape.head_dim_v, "it wants head_dim_v == head_dim"),
        (not score.softcap, "it has no softcap"),
        (score.alibi is None and score.bias is None, "its bias has no gradient and is not added in float32"),
        (not score.dropout_p, "it has no dropout"),
        (mask.left is None and mask.right in (None, 0), "it has no window"),
        ("document_begin" not in mask.bounds, "it has no document mask"),
        (mask.is_full or mask.right is None or not mask.bounds, "it has no padding under a causal mask"),
        (score.scale > 0 or mask.right is None, "it scales what its causal mask has made -inf: NaN for a scale of 0 or less"),
    )
    return next((why for holds, why in checks if not holds), None)


def whole_block(problem: Problem) -> Block | None:
    """The problem as one block of the kernel's, or None where it takes several."""
    shape = problem.shape
    plain = not problem.lengths and not problem.mask.bounds
    square = problem.mask.is_full or shape.seqlen_q == shape.seqlen_k or shape.seqlen_q == 1
    if not plain or not square or min(shape.batch, shape.seqlen_q, shape.seqlen_k, shape.heads_q) == 0:
        return None
    causal = problem.mask.is_causal and shape.seqlen_q > 1
    causality = Causality.SQUARE_CAUSAL if causal else Causality.FULL
    return Block(slice(0, shape.seqlen_q), slice(0, shape.seqlen_k), causality)


def forward(problem: Problem, operands: Operands, whole: Block | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of a problem that `limits_of` has nothing against; `whole` is its `whole_block`."""
    if whole is not None:
        # the common case straight through: no buffers, no copies
        out, lse = _call(problem, operands[:3], whole)
    elif _is_masked_in_one_call(problem):
        out, lse = _forward_masked(problem, operands)
    else:
        out = torch.zeros(problem.out_shape, dtype=problem.dtype, device="cpu")
        lse = torch.full(problem.lse_shape, float("-inf"), dtype=problem.lse_dtype, device="cpu")
        for part, block, (q, k, v) in _pieces(problem, operands):
            _add_part(out, lse, part, block, _call(problem, (q, k, v), block))
    return with_sinks(problem, operands, out, lse)


def _is_masked_in_one_call(problem: Problem) -> bool:
    """Whether keys alone are padded, and few enough; one entry without keys is no trap, a batch without any is one."""
    shape = problem.shape
    keys_alone = problem.mask.right is None and bool(problem.mask.bounds) and {"key_start", "key_end"} >= {*problem.mask.bounds}
    sizes = (shape.batch, shape.seqlen_q, shape.seqlen_k, shape.heads_q)
    return keys_alone and not problem.lengths and min(sizes) > 0 and shape.seqlen_k <= MASKED_UP_TO


def _padded_keys(problem: Problem, operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """(k, v, padding): padding (batch, seqlen_k) bool, and k and v with zeros there, for it may hold NaN."""
    j = torch.arange(problem.shape.seqlen_k, device="cpu")
    padding = torch.zeros(problem.shape.batch, problem.shape.seqlen_k, dtype=torch.bool, device="cpu")
    if operands.mask.key_start is not None:
        padding |= j < operands.mask.key_start[:, None]
    if operands.mask.key_end is not None:
        padding |= j >= operands.mask.key_end[:, None]
    k, v = (x.masked_fill(padding[:, :, None, None], 0.0) for x in (operands.k, operands.v))
    return k, v, padding


def _additive(padding: Tensor, problem: Problem) -> Tensor:
    """The padding as the kernel takes it: (batch, 1, 1, seqlen_k), -inf where masked."""
    return torch.zeros(padding.shape, dtype=problem.dtype, device="cpu").masked_fill_(padding, float("-inf"))[:, None, None]


def _forward_masked(problem: Problem, operands: Operands) -> tuple[Tensor, Tensor]:
    k, v, padding = _padded_keys(problem, operands)
    q, k, v = (x.transpose(1, 2) for x in (operands.q, k, v))
    out, lse = _forward(q, k, v, 0.0, False, attn_mask=_additive(padding, problem), scale=problem.score.scale)
    lse = lse.masked_fill(padding.all(dim=1)[:, None, None], float("-inf"))
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _backward_masked(problem: Problem, operands: Operands, upstream: Upstream) -> tuple[Tensor, Tensor, Tensor]:
    k, v, padding = _padded_keys(problem, operands)
    dout, q, k, v, out = (x.transpose(1, 2) for x in (upstream.dout, operands.q, k, v, upstream.out))
    lse = upstream.lse.masked_fill(upstream.lse == float("-inf"), 0.0)  # any number: all scores of such a row are -inf
    mask = _additive(padding, problem)
    gradients = _backward(dout, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=problem.score.scale)
    dq, dk, dv = (grad.transpose(1, 2).contiguous() for grad in gradients)
    return dq, dk, dv


def _blocks(sequence: Sequence) -> Iterator[Block]:
    """A sequence's mask as blocks that the kernel knows; nothing where there is nothing to attend to."""
    limits = sequence.limits
    first_key, last_key = max(0, limits.key_start), min(limits.seqlen_k, limits.key_end)
    if limits.rows == 0 or first_key >= last_key:
        return
    if limits.right is None:
        yield Block(slice(0, limits.rows), slice(first_key, last_key), Causality.FULL)
        return
    before = limits.seqlen_k - limits.seqlen_q  # keys that every row sees; below 0: rows that see none
    square = min(limits.seqlen_q, limits.seqlen_k)
    if before > 0:
        yield Block(slice(0, limits.seqlen_q), slice(0, before), Causality.FULL)
    rows, keys = slice(max(0, -before), limits.seqlen_q), slice(limits.seqlen_k - square, limits.seqlen_k)
    yield Block(rows, keys, Causality.SQUARE_CAUSAL)


def _pieces(problem: Problem, operands: Operands) -> Iterator[tuple[Sequence, Block, tuple[Tensor, Tensor, Tensor]]]:
    q, k, v = four_dims(operands.q), four_dims(operands.k), four_dims(operands.v)
    if min(problem.shape.batch, problem.shape.heads_q) == 0:
        return
    for part in sequences(problem, operands):
        for block in _blocks(part):
            rows, keys = _within(part.rows, block.rows), _within(part.keys, block.keys)
            yield part, block, (q[part.entries, rows], k[part.entries, keys], v[part.entries, keys])


def _within(outer: slice, inner: slice) -> slice:
    return slice(outer.start + inner.start, outer.start + inner.stop)


def _call(problem: Problem, qkv: tuple[Tensor, Tensor, Tensor], block: Block) -> tuple[Tensor, Tensor]:
    """The kernel on (batch, seqlen, heads, dim) tensors; out in that layout, lse (batch, heads, seqlen)."""
    q, k, v = (x.transpose(1, 2) for x in qkv)
    causal = block.causality is Causality.SQUARE_CAUSAL
    out, lse = _forward(q, k, v, 0.0, causal, scale=problem.score.scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _add_part(out: Tensor, lse: Tensor, part: Sequence, block: Block, result: tuple[Tensor, Tensor]) -> None:
    """Put a block's result into its place, which starts empty; a causal square is merged with the full block before it."""
    rows = _within(part.rows, block.rows)
    out_place = four_dims(out)[part.entries, rows]
    lse_place = (lse if lse.dim() == 3 else lse[None])[part.entries, :, rows]
    if block.causality is Causality.SQUARE_CAUSAL and part.limits.seqlen_k > part.limits.seqlen_q:
        result = merge(out_place, lse_place, *result)
    out_place.copy_(result[0])
    lse_place.copy_(result[1])


def backward(problem: Problem, operands: Operands, upstream: Upstream, whole: Block | None) -> InputGradients:
    """The gradients of a problem whose lse has no gradient of its own. The kernel takes the whole row's out and lse
    for each block, so a block's share of dq, dk and dv is exact."""
    q, k, v, out, dout = (four_dims(x) for x in (operands.q, operands.k, operands.v, upstream.out, upstream.dout))
    lse = upstream.lse if upstream.lse.dim() == 3 else upstream.lse[None]
    if whole is not None:
        dq, dk, dv = _call_backward(problem, (dout, q, k, v, out), lse, whole)
    elif _is_masked_in_one_call(problem):
        dq, dk, dv = _backward_masked(problem, operands, upstream)
    else:
        dq, dk, dv = (torch.zeros(x.shape, dtype=compute_dtype(problem.dtype), device="cpu") for x in (q, k, v))
        for part, block, (q_i, k_j, v_j) in _pieces(problem, operands):
            rows, keys = _within(part.rows, block.rows), _within(part.keys, block.keys)
            of_rows = (dout[part.entries, rows], q_i, k_j, v_j, out[part.entries, rows])
            shares = _call_backward(problem, of_rows, lse[part.entries, :, rows], block)
            for total, where, share in zip((dq, dk, dv), (rows, keys, keys), shares, strict=True):
                total[part.entries, where] += share
    dsinks = None
    if operands.sinks is not None and problem.score.sinks is not None and problem.score.sinks.gradients is Gradients.INPUTS:
        d = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1).transpose(1, 2)
        dsinks = sinks_gradient(operands.sinks, lse, d)
    like = zip((dq, dk, dv), (operands.q, operands.k, operands.v), strict=True)
    dq, dk, dv = (grad.view(x.shape).to(x.dtype) for grad, x in like)
    return InputGradients(dq, dk, dv, None, dsinks)


def _call_backward(
    problem: Problem, tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's backward on (batch, seqlen, heads, dim) tensors (dout, q, k, v, out); dq, dk, dv in that layout."""
    dout, q, k, v, out = (x.transpose(1, 2) for x in tensors)
    causal = block.causality is Causality.SQUARE_CAUSAL
    gradients = _backward(dout, q, k, v, out, lse, 0.0, causal, scale=problem.score.scale)
    dq, dk, dv = (grad.transpose(1, 2).contiguous() for grad in gradients)
    return dq, dk, dv
