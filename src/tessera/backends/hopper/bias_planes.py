"""When the backward has room for a bias: in registers, and in memory, where its gradient is made of dS in 16 bits, of which every
sequence and head has a plane (bias_gradient.py)."""

from __future__ import annotations

from tessera.backends.hopper.config import Feature
from tessera.backends.hopper.plan import features_of
from tessera.problem import Gradients, Problem

KEPT_PLANES = 8
"""Up to so many planes of dS, in 16 bits, for each plane of a bias whose gradient is wanted."""
KEPT_BYTES = 1 << 30
"""Or as many as take so many bytes."""


def gradient_features(problem: Problem, keeps: bool) -> tuple[Feature, ...]:
    """What a bias's gradient asks of the backward, where dS is kept for it or not."""
    bias = problem.score.bias
    if bias is None or bias.gradients is Gradients.NONE:
        return ()
    return (Feature.KEPT_DS,) if keeps else (Feature.BIAS_GRADIENT,)


def _may_keep_ds(problem: Problem) -> bool:
    """Whether a bias's gradient may be made of dS in 16 bits, a plane for each sequence and head (bias_gradient.py). A softcap's
    slope is in dS, and not in that gradient; behind left padding tiles of keys begin anywhere."""
    features = set(features_of(problem))
    wanted = bool(gradient_features(problem, True)) and Feature.BIAS in features
    return wanted and not {Feature.SOFTCAP, Feature.KEY_START} & features


def _has_few_planes(problem: Problem) -> bool:
    """Whether few of them share one of the bias."""
    bias, shape = problem.score.bias, problem.shape
    return bias is not None and shape.batch * shape.heads_q <= KEPT_PLANES * bias.shape[0] * bias.shape[1]


def keeps_ds(problem: Problem) -> bool:
    """Whether it is, and does not go by additions in float32: where few planes share one, or all take little room."""
    shape = problem.shape
    room = 2 * shape.batch * shape.heads_q * shape.seqlen_q * shape.seqlen_k
    return _may_keep_ds(problem) and (_has_few_planes(problem) or room <= KEPT_BYTES)


def keeps_ds_at_lengths(problem: Problem) -> tuple[bool, ...]:
    """What `keeps_ds` says of problems like this one, whatever their lengths."""
    return (True, False) if _may_keep_ds(problem) and not _has_few_planes(problem) else (keeps_ds(problem),)


def has_room(features: tuple[Feature, ...], is_ordered: bool) -> bool:
    """Whether a bias of every score's own fits at head dim 128 beside dK and dV in a consumer's registers. It does where blocks
    of it come into shared memory; a float32 one is read by one pointer a key that walks along the rows (in any order: an order
    not tried). Its gradient's places or a softcap's slope do not fit beside it. Over division by products the backward's time,
    2.07 of none's, was 1.55 by that pointer, and is 1.17 by shared memory (H200, 4k, 2026-11-22)."""
    if {Feature.BIAS_GRADIENT, Feature.SOFTCAP} & set(features):
        return False
    return Feature.FLOAT32_BIAS not in features or not is_ordered
