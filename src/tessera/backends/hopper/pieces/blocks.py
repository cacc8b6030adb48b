"""The main loop of a consumer warpgroup: one block of keys after the other, S, the online softmax, O += P V.

The forward's and the chunks' alike: `me` has config, index, score, and in `shared` the tiles and streams of K and V. The order
of products and softmax is told in forward.py; to read this, begin with `_overlapped_block`.
"""

from tessera.backends.hopper.pieces.channel import pass_turn, take_turn
from tessera.backends.hopper.pieces.scores import (
    beside_product,
    finish_scores,
    less_dropped,
    next_reference,
    probabilities,
    rounded,
    scale_left,
)
from tessera.backends.hopper.pieces.softmax import (
    add_to_sums,
    as_sums,
    exponentials_about,
    exponentials_at_once,
    finish_before,
    first_reference,
    no_reference,
    overtake,
    partial_sums,
    rescale,
    vote_on_maxima,
)
from tessera.backends.hopper.pieces.tiles import (
    M,
    accumulator_layout,
    beside,
    columns_of,
    compares_sums,
    empty_accumulator,
    halves_of,
    has_right_half,
    keeps_p_during_softmax,
    keys_of,
    matrix,
    operand_layout,
    overlaps,
    takes_p_at_once,
    takes_turns,
    votes_on_maxima,
)
from tessera.jit.compat import gl, gluon, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def _issue_scores(me, n, q, HALF: gl.constexpr = None):
    """Start S = Q K^T for the n-th block, (64, keys) float32, or for its left or right half (0, 1)."""
    keys: gl.constexpr = keys_of(me.config, HALF)
    slot = me.shared.k_stream.slot(n)
    s = gl.zeros([M, keys], gl.float32, accumulator_layout(keys))
    for part in gl.static_range(len(q)):
        rows = q[part]
        k = matrix(me.shared.k[part].index(slot))
        if HALF is not None:
            k = k.slice(HALF * keys, keys, 0)
            if part >= len(q) - me.config.held:
                rows = gl.convert_layout(rows, operand_layout(keys), assert_trivial=True)
        s = warpgroup_mma(rows, k.permute((1, 0)), s, use_acc=part > 0, is_async=True)
    return s


@gluon.jit
def issue_values(me, n, p, o, HALF: gl.constexpr = None):
    """Start O += P V for the n-th block, or a half of it, one product a part of head_dim_v."""
    keys: gl.constexpr = keys_of(me.config, HALF)
    slot = me.shared.v_stream.slot(n)
    products = ()
    for part in gl.static_range(len(o)):
        operand = gl.convert_layout(p, operand_layout(columns_of(me.shared.v[part].shape)))
        v = matrix(me.shared.v[part].index(slot))
        if HALF is not None:
            v = v.slice(HALF * keys, keys, 0)
        products = products + (warpgroup_mma(operand, v, o[part], is_async=True),)
    return products


@gluon.jit
def issue_last_values(me, n, p, o, right_alone):
    """`issue_values` of a tile's last block, of which rows may see the right half alone: the left half's product is waited for,
    where there is one, since ptxas serialises products that a branch leaves under way."""
    if has_right_half(me.config):
        left, right = halves_of(p)
        if not right_alone:
            o = wait_for_values(issue_values(me, n, left, o, 0))
        return issue_values(me, n, right, o, 1)
    else:
        return issue_values(me, n, p, o)


@gluon.jit
def wait_for_values(products):
    if len(products) == 1:
        return (warpgroup_mma_wait(0, deps=(products[0],)),)
    else:
        return warpgroup_mma_wait(0, deps=(products[0], products[1]))


@gluon.jit
def _empty_output(shared):
    o = ()
    for part in gl.static_range(len(shared.v)):
        o = o + (empty_accumulator(shared.v[part]),)
    return o


@gluon.jit
def _rescale_output(o, alpha):
    scaled = ()
    for part in gl.static_range(len(o)):
        scaled = scaled + (rescale(o[part], alpha),)
    return scaled


@gluon.jit
def _of_whole_block(p, HALF: gl.constexpr):
    """P of half a block as P of all of it, 0 elsewhere."""
    if HALF is None:
        return p
    else:
        columns: gl.constexpr = p.shape[1]
        none = gl.zeros([M, columns], p.dtype, accumulator_layout(columns))
        return beside(p, none) if HALF == 0 else beside(none, p)


@gluon.jit
def _first_block(me, n, q, bounds, first_key, HALF: gl.constexpr = None):
    """P, m and l of a tile's first block, or of its left or right half (0, 1), which begins with `first_key`: nothing to rescale,
    no P V to wait for. It is always masked."""
    me.shared.k_stream.wait(n)
    if takes_turns(me.config):
        take_turn(me.index)
    s = _issue_scores(me, n, q, HALF)
    if takes_turns(me.config):
        pass_turn(me.index, me.config.consumers)
    bias, kept = beside_product(me, n, first_key, "upper")
    s = warpgroup_mma_wait(0, deps=(s,))
    me.shared.k_stream.release(n)
    s = finish_scores(me.config, me.score, s, bias, bounds, first_key, "upper")
    if takes_p_at_once(me.config):
        scale = scale_left(me.config, me.score)
        m = first_reference(s, scale, me.shared.v[0].dtype)
        p, sums = exponentials_at_once(s, m, scale, me.shared.v[0].dtype)
        p = gl.convert_layout(gl.reshape(p, s.shape), s.type.layout, assert_trivial=True)
        p = less_dropped(me.config, me.score, _of_whole_block(p, HALF), kept)
        return p, as_sums(m, me.config.keys), as_sums(sums, me.config.keys)
    else:
        m = gl.max(s, axis=1) * scale_left(me.config, me.score)
        p = probabilities(me.config, me.score, s, m, first_key, "upper")
        return rounded(me.config, me.score, p, kept, me.shared.v[0].dtype), m, partial_sums(p)


@gluon.jit
def _softmax_at_once(me, s, m, HALF: gl.constexpr):
    """P of a block, its sums, the reference and alpha of finished scores, without waiting for their maxima."""
    keys: gl.constexpr = me.config.keys
    scale = scale_left(me.config, me.score)
    m = as_sums(m, s.shape[1])
    p, sums = exponentials_at_once(s, m, scale, me.shared.v[0].dtype)
    p, sums, m, alpha = overtake(p, sums, m, s, scale, compares_sums(me.config))
    return _of_whole_block(p, HALF), as_sums(sums, keys), as_sums(m, keys), as_sums(alpha, keys)


@gluon.jit
def _overlapped_block(me, n, q, bounds, first_key, state, CUT: gl.constexpr, HALF: gl.constexpr = None):
    """S of this block, issued with O += P V of the one before; then m, l and P. `HALF` and `first_key` as in `_first_block`."""
    o, p, m, l = state
    me.shared.k_stream.wait(n)
    if takes_turns(me.config):
        take_turn(me.index)
    s = _issue_scores(me, n, q, HALF)
    before = me.shared.v_stream.before(n)
    me.shared.v_stream.wait(before)
    products = issue_values(me, before, p, o)
    if takes_turns(me.config):
        pass_turn(me.index, me.config.consumers)
    bias, kept = beside_product(me, n, first_key, CUT)
    s = warpgroup_mma_wait(len(products), deps=(s,))
    me.shared.k_stream.release(n)
    s = finish_scores(me.config, me.score, s, bias, bounds, first_key, CUT)
    if takes_p_at_once(me.config):
        if not keeps_p_during_softmax(me.config):
            o = wait_for_values(products)
            me.shared.v_stream.release(before)
        p, sums, m, alpha = _softmax_at_once(me, s, m, HALF)
        if keeps_p_during_softmax(me.config):
            o = wait_for_values(products)
            me.shared.v_stream.release(before)
        return _rescale_output(o, alpha), less_dropped(me.config, me.score, p, kept), m, l * alpha + sums
    else:
        m, alpha = next_reference(me.config, me.score, s, m, first_key, CUT)
        if keeps_p_during_softmax(me.config):
            p = probabilities(me.config, me.score, s, m, first_key, CUT)
            sums = partial_sums(p)
            finish_before(sums, 4)
            o = wait_for_values(products)
            me.shared.v_stream.release(before)
        else:
            finish_before(m, 2)
            o = wait_for_values(products)
            me.shared.v_stream.release(before)
            p = probabilities(me.config, me.score, s, m, first_key, CUT)
            sums = partial_sums(p)
        p = rounded(me.config, me.score, p, kept, me.shared.v[0].dtype)
        return _rescale_output(o, alpha), p, m, add_to_sums(l, alpha, sums)


@gluon.jit
def _lone_block(me, n, q, bounds, first_key, state, CUT: gl.constexpr):
    """S, then m, l and P, then O += P V of one block: what overlaps is the other consumers' work."""
    o, m, l = state
    me.shared.k_stream.wait(n)
    s = _issue_scores(me, n, q)
    bias, kept = beside_product(me, n, first_key, CUT)
    s = warpgroup_mma_wait(0, deps=(s,))
    me.shared.k_stream.release(n)
    s = finish_scores(me.config, me.score, s, bias, bounds, first_key, CUT)
    if votes_on_maxima(me.config):
        scale = scale_left(me.config, me.score)
        m, alpha = vote_on_maxima(s, m, scale)
        p, sums = exponentials_about(s, m, scale)
        l = l * alpha + sums
    else:
        m, alpha = next_reference(me.config, me.score, s, m, first_key, CUT)
        p = probabilities(me.config, me.score, s, m, first_key, CUT)
        l = add_to_sums(l, alpha, partial_sums(p))
    o = _rescale_output(o, alpha)
    me.shared.v_stream.wait(n)
    p = rounded(me.config, me.score, p, kept, me.shared.v[0].dtype)
    o = wait_for_values(issue_values(me, n, p, o))
    me.shared.v_stream.release(n)
    return o, m, l


@gluon.jit
def start_blocks(me, n, q, bounds, first_key, left_alone=None):
    """The loop's state before its first turn, and how many blocks that took. `left_alone`: whether the rows see the left half of
    the first block alone, where that may be."""
    if overlaps(me.config):
        if left_alone is None:
            p, m, l = _first_block(me, n, q, bounds, first_key)
        elif left_alone:
            p, m, l = _first_block(me, n, q, bounds, first_key, 0)
        else:
            p, m, l = _first_block(me, n, q, bounds, first_key)
        return (_empty_output(me.shared), p, m, l), 1
    else:
        keys: gl.constexpr = me.config.keys
        s = gl.zeros([M, keys], gl.float32, accumulator_layout(keys))
        if votes_on_maxima(me.config):
            m = no_reference(keys)
        else:
            m = gl.max(s, axis=1) + float("-inf")
        return (_empty_output(me.shared), m, partial_sums(s)), 0


@gluon.jit
def run_blocks(me, n, q, bounds, block, state, count, CUT: gl.constexpr, HALF: gl.constexpr = None):
    """`count` turns of the main loop, from block `block` down, or with a half of each block."""
    for i in range(count):
        first_key = (block - i) * me.config.keys
        if HALF is not None:
            first_key += HALF * keys_of(me.config, HALF)
        if overlaps(me.config):
            state = _overlapped_block(me, n, q, bounds, first_key, state, CUT, HALF)
        else:
            state = _lone_block(me, n, q, bounds, first_key, state, CUT)
        n = me.shared.k_stream.next(n)
    return state, n
