"""From S = Q K^T of a block to P: softcap, ALiBi, bias, mask, the running maximum, the exponentials, dropout.

Without modifiers the row maximum is taken of raw products, and the scale is part of the exponentials: one multiply-add a score.
"""

from tessera.backends.hopper.pieces.bias import bias_of_block, stages_bias
from tessera.backends.hopper.pieces.dropout import draw, draw_anywhere, dropped, key_of_block
from tessera.backends.hopper.pieces.masking import (
    has_one_loop,
    mask_scores,
    mask_scores_by_words,
    mask_scores_where_cut,
)
from tessera.backends.hopper.pieces.modifiers import (
    Modifiers,
    add_to_scores,
    evenly_shared,
    falls_evenly,
    move_natural_reference,
    natural_exponentials,
    of_rows,
    scales_first,
)
from tessera.backends.hopper.pieces.softmax import exponentials, move_reference, outgrown, tanh, to_16_bit
from tessera.backends.hopper.pieces.tiles import accumulator_layout, has, has_bias, masks_by_words, matrix
from tessera.jit.compat import aggregate, gl, gluon


@aggregate
class Score:
    """`scale` turns a score into log2 units (natural ones under a bias); with a softcap c it is c log2(e), and `inner` =
    softmax_scale / c."""

    scale: gl.tensor
    inner: gl.tensor
    sinks: gl.tensor
    modifiers: Modifiers


@gluon.jit
def score_of_rows(config: gl.constexpr, score, tile, row):
    """The same with the modifiers of 64 rows of a tile's head, from `row` on."""
    return Score(score.scale, score.inner, score.sinks, of_rows(config, score.modifiers, tile, row))


@gluon.jit
def finish_scores(config: gl.constexpr, score, s, bias, bounds, first_key, CUT: gl.constexpr):
    """Softcap, ALiBi, bias, and the mask where it cuts the block (`CUT`, see mask_scores; None where every row sees it whole)."""
    if has(config, "softcap"):
        s = tanh(s * score.inner)
    s = add_to_scores(config, score.modifiers, s, bias, score.scale, first_key, CUT)
    if CUT is not None:
        if has_one_loop(config):
            s = mask_scores_where_cut(s, bounds, first_key, CUT)
        elif masks_by_words(config):
            s = mask_scores_by_words(s, bounds, first_key, CUT)
        else:
            s = mask_scores(s, bounds, first_key, CUT)
    return s


@gluon.jit
def scale_left(config: gl.constexpr, score):
    """What finished scores are still to be multiplied by."""
    if scales_first(config):
        return 1.0
    else:
        return score.scale


@gluon.jit
def next_reference(config: gl.constexpr, score, s, m, first_key, CUT: gl.constexpr):
    """The reference after finished scores, and the factor for what was summed under the old one (softmax.move_reference)."""
    if has_bias(config):
        return move_natural_reference(s, m)
    elif falls_evenly(config, CUT):
        top = gl.max(s, axis=1) + evenly_shared(config, score.modifiers, m, first_key)
        return outgrown(top, m)
    else:
        return move_reference(s, m, scale_left(config, score))


@gluon.jit
def probabilities(config: gl.constexpr, score, s, m, first_key, CUT: gl.constexpr):
    """P about the reference m, from finished scores."""
    if has_bias(config):
        return natural_exponentials(s, m)
    else:
        if falls_evenly(config, CUT):
            m = m - evenly_shared(config, score.modifiers, m, first_key)
        return exponentials(s, m, scale_left(config, score), CUT is not None)


@gluon.jit
def beside_product(me, n, first_key, CUT: gl.constexpr):
    """What of block n does not depend on S, and can be had while that is under way: its biases, 0 without; and what dropout's
    draws begin with (see pieces/dropout.py)."""
    if stages_bias(me.config):
        bias = _staged_block(me.config, me.shared, n, me.index)
    else:
        bias = bias_of_block(me.config, me.score.modifiers, first_key, CUT)
    kept = 0
    if has(me.config, "dropout"):
        plane = me.score.modifiers.dropout[0]
        if has(me.config, "key_start"):
            kept = first_key
        else:
            kept = key_of_block(me.config, plane, first_key)
    return bias, kept


@gluon.jit
def _staged_block(config: gl.constexpr, shared, n, index):
    """The bias of block n for a consumer's rows, (64, keys)."""
    block = shared.bias[0].index(shared.k_stream.slot(n) * config.consumers + index)
    return matrix(block).load(accumulator_layout(config.keys))


@gluon.jit
def rounded(config: gl.constexpr, score, p, kept, dtype: gl.constexpr):
    """P in 16 bits, less what dropout drops: the sums are those of the whole P."""
    return less_dropped(config, score, to_16_bit(p, dtype), kept)


@gluon.jit
def less_dropped(config: gl.constexpr, score, p, kept):
    """P in 16 bits, 0 where it is dropped by what `beside_product` has of it."""
    if has(config, "dropout"):
        plane = score.modifiers.dropout[0]
        if has(config, "key_start"):
            kept = draw_anywhere(config, plane, kept)
        else:
            kept = draw(config, plane, kept)
        p = dropped(config, plane, p, kept)
    return p
