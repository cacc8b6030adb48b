"""What the launches of all kernels pass alike: how far a mask reaches, what turns a score into a kernel's units, addresses."""

from __future__ import annotations

from torch import Tensor

from tessera.mask import MaskSpec
from tessera.problem import Score

LOG2_E = 1.4426950408889634
FAR = 1 << 30
"""More rows than any tensor has, in int32."""
WRAP_STRIDE = 1 << 34
"""Of the dimension that takes TMA round 2^64 elements, back into the tensor (pieces/kv_source.py)."""


def reach(mask: MaskSpec, far: int = FAR) -> tuple[int, int]:
    """Keys before and after the diagonal that a mask leaves; `far` for no limit."""
    left, right = (far if side is None else min(side, far) for side in (mask.left, mask.right))
    return left, right


def score_unit(score: Score) -> float:
    """A score of 1 in the kernels' units: log2's, natural ones under a bias (pieces/modifiers.py)."""
    return LOG2_E if score.bias is None else 1.0


def score_scales(score: Score) -> tuple[float, float]:
    """(outer, inner): q.k times `outer` is a score in the kernels' units; with a cap c it is `outer` tanh(inner q.k), inner =
    scale / c."""
    outer, inner = (score.softcap, score.scale / score.softcap) if score.softcap else (score.scale, 0.0)
    return outer * score_unit(score), inner


def address(tensor: Tensor | None) -> int:
    """Where a tensor lies; 0 for what there is not."""
    return 0 if tensor is None else tensor.data_ptr()
