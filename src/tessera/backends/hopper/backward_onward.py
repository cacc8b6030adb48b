"""The backward's consumers for head dim 128 where a tile of keys sees few rows, and dQ is added in any order: the turns are those
of backward_ahead.py, and go on from tile to tile. Two warpgroups have 64 keys of the tile's 128 and half of dQ's columns each.

A tile's last turn has P of the next one's first block, and that one's first turn the dQ that was left. K has two places for that,
and each consumer's half of V is free for the next tile as soon as this consumer has read it. The second place for K is the memory
of a second buffer for parts of dQ, which long tiles miss (backward_plan.FEW_ROWS).

A consumer passes over a block at the diagonal, or at a window's end, that sees none of its keys; the other is at work on it
meanwhile. P of the block after that is made when it comes: Q's ring holds two.

dK and dV leave through the buffer of dQ's parts, so that K, V and the rings are free for the next tile before they have.
"""

from tessera.backends.hopper.backward_ahead import Pair, ds_of, hand_over, p_of
from tessera.backends.hopper.pieces.counts import tell
from tessera.backends.hopper.pieces.draws import Draws
from tessera.backends.hopper.pieces.gradients import Score, Shared, issue_dp, issue_s
from tessera.backends.hopper.pieces.key_tiles import Call, KeyTile, tile_at
from tessera.backends.hopper.pieces.kv_source import store_rows
from tessera.backends.hopper.pieces.masking import has_lower_bound
from tessera.backends.hopper.pieces.numbers import carried_number, of_first_lane
from tessera.backends.hopper.pieces.row_ranges import cut_and_full, end_row, first_row, key_bounds
from tessera.backends.hopper.pieces.softmax import to_16_bit
from tessera.backends.hopper.pieces.sums import add_part, row_block
from tessera.backends.hopper.pieces.tiles import (
    M,
    accumulator_layout,
    empty_accumulator,
    fresh_zero,
    has,
    matrix,
    operand_layout,
)
from tessera.jit.compat import (
    aggregate,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.constexpr_function
def _passes_first(config, index):
    """Whether the first block of a tile may see none of this consumer's keys. (Among documents nobody asks: registers.)"""
    return index == 1 and has(config, "right") and not has(config, "documents")


@gluon.constexpr_function
def _passes_last(config, index):
    """The same of the last."""
    return index == 0 and has(config, "left") and not has(config, "documents")


@gluon.constexpr_function
def _leads_over(config, index):
    """Whether this consumer's last turn of a tile has P of the next one's first block: where it passes over none."""
    passes = has_lower_bound(config) or (has(config, "right") and index == 1)
    return not passes


@aggregate
class Consumer:
    """One of the two warpgroups: 64 keys of every tile. `keys` are mbarriers that each one's half of V is there (0, 1), that it
    may be written again (2, 3), and that K is there, one a place (4, 5)."""

    config: gl.constexpr
    index: gl.constexpr
    shared: Shared
    pair: Pair
    keys: gl.shared_memory_descriptor
    draws: Draws
    score: Score
    call: Call


@aggregate
class At:
    """Where a consumer is: at block `n` of all its blocks, in tile `seen` of those that any row sees. The block before it is row
    block `before` of the workspace (-1: there is none), and was of tile `held`."""

    n: gl.tensor
    seen: gl.tensor
    before: gl.tensor
    held: gl.tensor


@aggregate
class View:
    """A tile's row blocks as one consumer sees them: `count` from `begin` on see any of the tile's keys; `unseen` (0 or 1) of
    them come before the first, and `spare` after the last, that sees any of this consumer's."""

    tile: KeyTile
    begin: gl.tensor
    count: gl.tensor
    unseen: gl.tensor
    spare: gl.tensor


@gluon.jit
def _view(me, words):
    """The tile of which the producer has posted these."""
    config: gl.constexpr = me.config
    rows: gl.constexpr = config.rows
    band = me.call.band
    _, index, head, key, falls, begin, count, _ = words
    tile = tile_at(config, me.call, index, head, key, falls > 0)
    first = tile.first + me.index * M
    unseen = count * 0
    spare = count * 0
    if _passes_first(config, me.index):
        before = first_row(config, band, tile.seq, first) // rows - begin
        unseen = gl.minimum(gl.maximum(before, 0), gl.minimum(count, 1))
    if _passes_last(config, me.index):
        last = gl.minimum(first + M, tile.seq.k_rows) - 1
        end = gl.minimum(gl.maximum(end_row(config, band, tile.seq, last), 0), tile.seq.q_live)
        spare = gl.minimum(gl.maximum(begin + count - (end + rows - 1) // rows, 0), gl.minimum(count, 1))
    return View(tile, begin, count, unseen, spare)


# ------------------------------------------------------------------------------------------------------- parts of a turn


@gluon.jit
def _k_place(seen):
    """The first of the two pieces in which tile `seen`'s K lies."""
    return (seen & 1) * 2


@gluon.jit
def _await_k(me, seen):
    mbarrier.wait(me.keys.index(4 + (seen & 1)), (seen >> 1) & 1)


@gluon.jit
def _issue_dq(me, at):
    """Start this consumer's half of the columns of dQ = dS K of the block before this one: (64 rows, columns). If there is none,
    of whatever lies there: a product under a condition would be serialised."""
    columns: gl.constexpr = me.config.part_columns
    n = at.n - 1
    if at.before >= 0:
        mbarrier.wait(me.pair.full.index(n & 1), (n >> 1) & 1)
    first = _k_place(at.held) + fresh_zero()
    dq = gl.zeros([M, columns], gl.float32, accumulator_layout(columns))
    for half in gl.static_range(2):
        ds = me.pair.ds.index((n & 1) * 2 + half).permute((1, 0))
        k = matrix(me.shared.k.index(first + half)).slice(me.index * columns, columns, dim=1)
        dq = warpgroup_mma(ds, k, dq, use_acc=half > 0, is_async=True)
    return dq


@gluon.jit
def _put_dq(me, dq_map, at, dq):
    """This dQ out. After the last of the tile before nobody reads that one's K any more."""
    if at.before >= 0:
        add_part(me.config, dq_map, me.pair.sums, me.index, dq, at.before, me.index)
    if at.held != at.seen:
        mbarrier.arrive(me.shared.k_free)


@gluon.jit
def _issue_s(me, n, seen, is_there):
    """Start S^T = K Q^T of block n, of tile `seen`. If it is not there, of whatever lies there."""
    if is_there:
        me.shared.q_stream.wait(n)
    return issue_s(me.config, me.shared, matrix(me.shared.k.index(_k_place(seen) + me.index + fresh_zero())), n)


@gluon.jit
def _first_p(me, n, seen, bounds, row):
    """The same under nothing."""
    return p_of(me, warpgroup_mma_wait(0, deps=(_issue_s(me, n, seen, True),)), bounds, n, row, True)


@gluon.jit
def _from_p_to_ds(me, dq_map, at, closes, dv, p):
    """(dV, still under way, and dS^T) of a block, and dQ of the one before it. `closes`: it is the last to read the tile's V."""
    shared = me.shared
    dtype: gl.constexpr = shared.q.dtype
    dp = issue_dp(me.config, shared, matrix(shared.v.index(me.index + fresh_zero())), at.n)
    do = matrix(shared.do.index(shared.do_stream.slot(at.n)))
    dq = _issue_dq(me, at)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    if closes:
        mbarrier.arrive(me.keys.index(2 + me.index))
    dv = warpgroup_mma(gl.convert_layout(p, operand_layout(me.config.dim_v)), do, dv, is_async=True)
    dq = warpgroup_mma_wait(1, deps=(dq,))
    _put_dq(me, dq_map, at, dq)
    ds = to_16_bit(ds_of(me, p, dp, at.n), dtype)
    hand_over(me, ds, at.n)
    return dv, ds


# ----------------------------------------------------------------------------------------------------------------- turns


@gluon.jit
def _turn(me, dq_map, at, closes, state, then, MASKED: gl.constexpr):
    """One turn: the products of a block, and P of the next: of tile then[0], whose keys' bounds are then[1] and whose first row
    is then[2]; or of whatever lies there, if it is not there (then[3])."""
    shared = me.shared
    dk, dv, p = state
    seen, bounds, row, is_there = then
    q = matrix(shared.q.index(shared.q_stream.slot(at.n)))
    dv, ds = _from_p_to_ds(me, dq_map, at, closes, dv, p)
    if closes and is_there:
        _await_k(me, seen)
    s = _issue_s(me, at.n + 1, seen, is_there)
    dk = warpgroup_mma(gl.convert_layout(ds, operand_layout(me.config.dim)), q, dk, is_async=True)
    dv = warpgroup_mma_wait(2, deps=(dv,))
    shared.do_stream.release(at.n)
    s = warpgroup_mma_wait(1, deps=(s,))
    p = p_of(me, s, bounds, at.n + 1, row, MASKED)
    dk = warpgroup_mma_wait(0, deps=(dk,))
    shared.q_stream.release(at.n)
    return dk, dv, p


@gluon.jit
def _last_turn(me, dq_map, at, closes, state):
    """The same for a block after which this consumer passes over one, or which is the last."""
    shared = me.shared
    dk, dv, p = state
    q = matrix(shared.q.index(shared.q_stream.slot(at.n)))
    dv, ds = _from_p_to_ds(me, dq_map, at, closes, dv, p)
    dk = warpgroup_mma(gl.convert_layout(ds, operand_layout(me.config.dim)), q, dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    shared.do_stream.release(at.n)
    shared.q_stream.release(at.n)
    return dk, dv


@gluon.jit
def _sum_dq(me, dq_map, at):
    """dQ of the block before this one by itself."""
    _put_dq(me, dq_map, at, warpgroup_mma_wait(0, deps=(_issue_dq(me, at),)))


@gluon.jit
def _pass_over(me, dq_map, at):
    """A block that sees none of this consumer's keys: its dS is 0."""
    rows: gl.constexpr = me.config.rows
    me.shared.q_stream.wait(at.n)
    me.shared.q_stream.release(at.n)
    me.shared.do_stream.wait(at.n)
    me.shared.do_stream.release(at.n)
    _sum_dq(me, dq_map, at)
    hand_over(me, gl.zeros([M, rows], me.shared.q.dtype, accumulator_layout(rows)), at.n)


# ----------------------------------------------------------------------------------------------------------------- tiles


@gluon.jit
def _bounds(me, tile):
    return key_bounds(me.config, me.call.band, tile.seq, tile.first + me.index * M)


@gluon.jit
def _next_start(me, words, seen):
    """What a tile's last turn has to know of the first block that comes after, of the tile of `words`, where it passes over
    none."""
    view = _view(me, words)
    return seen, _bounds(me, view.tile), view.begin * me.config.rows, (words[0] < me.draws.tiles) & (view.count > 0)


@gluon.jit
def _turns(me, dq_map, at, blocks, origin, state):
    """The turns of a member's blocks but the last: `blocks` are counted from the tile's first, whose first row is origin[1], and
    which is row block origin[2] of the workspace. Returns where the consumer is then, and dK, dV and P."""
    unseen, cut, full, stop = blocks
    bounds, row, block = origin
    rows: gl.constexpr = me.config.rows
    n = carried_number(at.n)
    seen = carried_number(at.seen)
    before = carried_number(at.before)
    held = carried_number(at.held)
    for i in range(unseen + 1, unseen + cut):
        then = (seen, bounds, row + i * rows, True)
        state = _turn(me, dq_map, At(n, seen, before, held), False, state, then, True)
        before = block + i - 1
        held = seen
        n += 1
    for i in range(unseen + gl.maximum(cut, 1), unseen + cut + full):
        then = (seen, bounds, row + i * rows, True)
        state = _turn(me, dq_map, At(n, seen, before, held), False, state, then, False)
        before = block + i - 1
        held = seen
        n += 1
    if has_lower_bound(me.config):
        for i in range(unseen + gl.maximum(cut + full, 1), stop):
            then = (seen, bounds, row + i * rows, True)
            state = _turn(me, dq_map, At(n, seen, before, held), False, state, then, True)
            before = block + i - 1
            held = seen
            n += 1
    return At(n, seen, before, held), state


@gluon.jit
def _main_loop(me, dq_map, view, posted, seen, carried):
    """dK and dV of 64 keys: the sums over all blocks of rows of all query heads that share them. `posted`: of this tile, and the
    turn in which the next one's comes. `carried`, from the tile before: the next block, the one before it and its tile; P of the
    next, if it is there."""
    config: gl.constexpr = me.config
    rows: gl.constexpr = config.rows
    n, before, held, p, is_there = carried
    following, turn = posted
    tile = view.tile
    first = view.begin + view.unseen
    end = view.count - view.spare
    first_cut, first_full = cut_and_full(config, me.call.band, tile.seq, tile.first + me.index * M, first, end - view.unseen)
    bounds = _bounds(me, tile)
    row = view.begin * rows
    dk = empty_accumulator(me.shared.k)
    dv = empty_accumulator(me.shared.v)
    for member in range(me.call.group):
        block = row_block(me.call, tile, member, view.begin)
        closes = member + 1 == me.call.group
        # Each member's anew: what LLVM takes out of this loop stays in uniform registers, of which the loops below have too few.
        unseen = of_first_lane(view.unseen)
        cut = of_first_lane(first_cut)
        full = of_first_lane(first_full)
        stop = of_first_lane(end)
        if _passes_first(config, me.index) and unseen > 0:
            _pass_over(me, dq_map, At(n, seen, before, held))
            before = block
            held = seen
            n += 1
        if stop > unseen:
            if _leads_over(config, me.index):
                if not is_there:
                    p = _first_p(me, n, seen, bounds, row)
            else:
                p = _first_p(me, n, seen, bounds, row + unseen * rows)
            mbarrier.wait(me.keys.index(me.index), seen & 1)
            at = At(n, seen, before, held)
            at, state = _turns(me, dq_map, at, (unseen, cut, full, stop), (bounds, row, block), (dk, dv, p))
            if _leads_over(config, me.index):
                if closes:
                    following = me.draws.read_posted(turn)
                then = _next_start(me, following, gl.where(closes, seen + 1, seen))
                is_there = then[3]
                dk, dv, p = _turn(me, dq_map, at, closes, state, then, True)
            else:
                dk, dv = _last_turn(me, dq_map, at, closes, state)
            before = block + stop - 1
            held = seen
            n = at.n + 1
        elif closes:
            mbarrier.wait(me.keys.index(me.index), seen & 1)
            mbarrier.arrive(me.keys.index(2 + me.index))
        if _passes_last(config, me.index) and view.spare > 0:
            _pass_over(me, dq_map, At(n, seen, before, held))
            before = block + stop
            held = seen
            n += 1
    return dk, dv, following, (n, before, held, p, is_there)


@gluon.jit
def _store(me, map_, gradient, tile):
    """dK or dV of 64 keys through the buffer of this consumer's parts of dQ."""
    tma_store_wait(0)
    matrix(me.pair.tiles.index(me.index)).store(to_16_bit(gradient, map_.dtype))
    fence_async_shared()
    store_rows((map_,), (me.pair.tiles,), me.index, tile.written, tile.head, tile.first + me.index * M)


@gluon.jit
def consumer_onward(config: gl.constexpr, index: gl.constexpr, dq_map, dk_map, dv_map, shared, pair, keys, draws, score, call):
    me = Consumer(config, index, shared, pair, keys, draws, score, call)
    rows: gl.constexpr = config.rows
    words = draws.read_posted(0)
    turn = 0
    seen = 0
    n = words[0] * 0
    before = n - 1
    held = n
    p = gl.zeros([M, rows], shared.q.dtype, accumulator_layout(rows))
    is_there = n > 0
    while words[0] < draws.tiles:
        view = _view(me, words)
        dk = empty_accumulator(shared.k)
        dv = empty_accumulator(shared.v)
        turn += 1
        following = words
        if view.count > 0:
            _await_k(me, seen)
            carried = (n, before, held, p, is_there)
            dk, dv, following, carried = _main_loop(me, dq_map, view, (words, turn), seen, carried)
            n, before, held, p, is_there = carried
            seen += 1
        elif _leads_over(config, index):
            following = draws.read_posted(turn)
        _store(me, dv_map, dv, view.tile)
        _store(me, dk_map, dk * score.factor, view.tile)
        if _leads_over(config, index):
            words = following
        else:
            words = draws.read_posted(turn)
        if words[0] < draws.tiles:
            tell(config, draws)
    _sum_dq(me, dq_map, At(n, held, before, held))
    tma_store_wait(0)
    tell(config, draws, 0)
