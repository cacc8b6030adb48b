"""The backward's consumers for head dim 128 without modifiers (see backward.py): each of two warpgroups has 64 keys of the
tile's 128 and half of dQ's columns. A program takes tile after tile.

A turn has the products of one block of rows and P of the next, so that little is computed while the tensor cores stand still:

    dP^T, the last block's dQ issued;  dV issued;  dQ out under dV;  dS^T from dP, handed over;  the next S^T, dK issued;  the
    next P^T under dK

dQ needs all of dS. A block's is left for the next turn, when the other half lies there: the consumers need not march in step.

Nothing is in flight at the end of a turn: a product carried over the loop's back edge is serialised by ptxas (C7514). P is
carried, in 16 bits: 192 accumulators and one operand are what fits in 240 registers, so S may not live beside dQ.

dK and dV leave through the buffers of dQ's parts, so that K, V and the rings are free for the next tile before they have.
"""

from tessera.backends.hopper.pieces.channel import make_barriers
from tessera.backends.hopper.pieces.counts import tell
from tessera.backends.hopper.pieces.gradients import (
    Score,
    Shared,
    derivatives,
    issue_dp,
    issue_s,
    probabilities,
    row_values,
    subtracts_by_products,
)
from tessera.backends.hopper.pieces.key_tiles import Call, nth_place
from tessera.backends.hopper.pieces.kv_source import store_rows
from tessera.backends.hopper.pieces.masking import has_lower_bound
from tessera.backends.hopper.pieces.numbers import of_first_lane
from tessera.backends.hopper.pieces.remainder import divides, joined
from tessera.backends.hopper.pieces.row_ranges import cut_and_full, first_row, key_bounds
from tessera.backends.hopper.pieces.softmax import to_16_bit, to_32_bit
from tessera.backends.hopper.pieces.sums import Sums, add_part, adds_in_order, row_block, sums_in
from tessera.backends.hopper.pieces.tiles import (
    M,
    accumulator_layout,
    allocate_tiles,
    empty_accumulator,
    fresh_zero,
    matrix,
    operand_layout,
)
from tessera.jit.compat import (
    aggregate,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@aggregate
class Pair:
    """What the consumers tell each other and the producer: dS^T of two blocks, each as two tiles (64 keys, rows), and mbarriers
    that both have written theirs; parts of dQ, half of the columns each, and the same bytes as tiles of dK and dV.

    Nobody asks whether a tile of dS^T may be written again: a consumer has waited for the other's next one by then, and that was
    written after the product that reads this one."""

    ds: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    sums: Sums
    tiles: gl.shared_memory_descriptor


@gluon.jit
def make_pair(config: gl.constexpr, dq_map, dk_map):
    dtype: gl.constexpr = dk_map.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, config.rows], dtype)
    ds = gl.allocate_shared_memory(dtype, [4, M, config.rows], layout)
    full = make_barriers(2, 2)
    count: gl.constexpr = config.part_buffers
    tiles = allocate_tiles(dk_map, count)  # made as what needs the wider alignment
    parts = reinterpret(tiles, gl.float32, [count] + dq_map.block_type.shape, dq_map.layout)
    return Pair(ds, full, sums_in(config, parts, parts, full), tiles)


@aggregate
class Consumer:
    """One of the two warpgroups: 64 keys of every tile."""

    config: gl.constexpr
    index: gl.constexpr
    shared: Shared
    pair: Pair
    score: Score
    call: Call


@gluon.jit
def hand_over(me, ds, n):
    """This consumer's dS^T of block n."""
    me.pair.ds.index((n & 1) * 2 + me.index).store(ds)
    fence_async_shared()
    mbarrier.arrive(me.pair.full.index(n & 1))


@gluon.jit
def _issue_dq(me, n, wanted):
    """Start this consumer's half of the columns of dQ = dS K of block n: (64 rows, columns). If it is not wanted, of whatever
    lies there: a product under a condition would be serialised."""
    columns: gl.constexpr = me.config.part_columns
    if wanted:
        mbarrier.wait(me.pair.full.index(n & 1), (n >> 1) & 1)
    zero = fresh_zero()
    dq = gl.zeros([M, columns], gl.float32, accumulator_layout(columns))
    for half in gl.static_range(2):
        ds = me.pair.ds.index((n & 1) * 2 + half).permute((1, 0))
        k = matrix(me.shared.k.index(half + zero)).slice(me.index * columns, columns, dim=1)
        dq = warpgroup_mma(ds, k, dq, use_acc=half > 0, is_async=True)
    return dq


@gluon.jit
def _issue_s(me, n):
    """Start S^T = K Q^T of block n, less lse."""
    me.shared.q_stream.wait(n)
    return issue_s(me.config, me.shared, matrix(me.shared.k.index(me.index + fresh_zero())), n)


@gluon.jit
def p_of(me, s, bounds, n, row, MASKED: gl.constexpr):
    """P^T of block n, whose first row is `row`, in 16 bits."""
    lse = 0
    if not subtracts_by_products(me.config):
        lse = row_values(me.shared.lse, me.shared.q_stream.slot(n), me.config.rows)
    p, _ = probabilities(me.config, me.score, s, lse, bounds, row, MASKED)
    return to_16_bit(p, me.shared.q.dtype)


@gluon.jit
def ds_of(me, p, dp, n):
    """dS^T = P^T (dP^T - D) of block n."""
    if subtracts_by_products(me.config):
        return to_32_bit(p) * dp
    else:
        return derivatives(p, dp, row_values(me.shared.d, me.shared.do_stream.slot(n), me.config.rows))


@gluon.jit
def _add_dq(me, dq_map, n, dq, block):
    """This consumer's part of dQ of block n, row block `block` of the workspace, out."""
    add_part(me.config, dq_map, me.pair.sums, 2 * n + me.index, dq, block, me.index)


@gluon.jit
def _from_p_to_ds(me, dq_map, n, before, dv, p):
    """(dV, still under way, and dS^T) of block n, and dQ of the one before it, row block `before` of the workspace; -1 says that
    there is none in this tile."""
    shared = me.shared
    dtype: gl.constexpr = shared.q.dtype
    dp = issue_dp(me.config, shared, matrix(shared.v.index(me.index + fresh_zero())), n)
    do = matrix(shared.do.index(shared.do_stream.slot(n)))
    dq = _issue_dq(me, n - 1, before >= 0)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    dv = warpgroup_mma(gl.convert_layout(p, operand_layout(me.config.dim_v)), do, dv, is_async=True)
    dq = warpgroup_mma_wait(1, deps=(dq,))
    if before >= 0:
        _add_dq(me, dq_map, n - 1, dq, before)
    ds = to_16_bit(ds_of(me, p, dp, n), dtype)
    hand_over(me, ds, n)
    return dv, ds


@gluon.jit
def _turn(me, dq_map, bounds, n, row, before, state, MASKED: gl.constexpr):
    """One turn of the main loop: the products of a block, and P of the next, whose first row is `row`."""
    shared = me.shared
    dk, dv, p = state
    q = matrix(shared.q.index(shared.q_stream.slot(n)))
    dv, ds = _from_p_to_ds(me, dq_map, n, before, dv, p)
    s = _issue_s(me, n + 1)
    dk = warpgroup_mma(gl.convert_layout(ds, operand_layout(me.config.dim)), q, dk, is_async=True)
    dv = warpgroup_mma_wait(2, deps=(dv,))
    shared.do_stream.release(n)
    s = warpgroup_mma_wait(1, deps=(s,))
    p = p_of(me, s, bounds, n + 1, row, MASKED)
    dk = warpgroup_mma_wait(0, deps=(dk,))
    shared.q_stream.release(n)
    return dk, dv, p


@gluon.jit
def _last_turn(me, dq_map, n, before, state):
    """The same for a block whose next one this consumer does not see, or which is the last."""
    shared = me.shared
    dk, dv, p = state
    q = matrix(shared.q.index(shared.q_stream.slot(n)))
    dv, ds = _from_p_to_ds(me, dq_map, n, before, dv, p)
    dk = warpgroup_mma(gl.convert_layout(ds, operand_layout(me.config.dim)), q, dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    shared.do_stream.release(n)
    shared.q_stream.release(n)
    return dk, dv


@gluon.jit
def _sum_dq(me, dq_map, n, before):
    """dQ of the block before block n, row block `before` of the workspace, by itself."""
    dq = warpgroup_mma_wait(0, deps=(_issue_dq(me, n - 1, before >= 0),))
    if before >= 0:
        _add_dq(me, dq_map, n - 1, dq, before)


@gluon.jit
def _pass_over(me, dq_map, n, before):
    """A block that sees none of this consumer's keys: its dS is 0."""
    rows: gl.constexpr = me.config.rows
    me.shared.q_stream.wait(n)
    me.shared.q_stream.release(n)
    me.shared.do_stream.wait(n)
    me.shared.do_stream.release(n)
    _sum_dq(me, dq_map, n, before)
    hand_over(me, gl.zeros([M, rows], me.shared.q.dtype, accumulator_layout(rows)), n)


@gluon.jit
def _unseen(config: gl.constexpr, band, seq, first, begin, count):
    """How many of the tile's row blocks come before the first that sees any of this consumer's keys. None is passed over at a
    window's edges, for want of registers."""
    if has_lower_bound(config):
        return 0
    else:
        return gl.minimum(gl.maximum(first_row(config, band, seq, first) // config.rows - begin, 0), count)


@gluon.jit
def _in_turn(config: gl.constexpr, tile, unseen, cut, count):
    """Of `count` blocks `unseen` see none of this consumer's keys, and `cut` after them not all of them: how many of each come
    before the others in the order in which rows come, and which is the first, if any, that comes after the last seen one."""
    if config.sections_take_turns:
        return gl.where(tile.falls, unseen, 0), gl.where(tile.falls, cut, 0), gl.where(tile.falls, count, count - unseen)
    else:
        return unseen, cut, count


@gluon.jit
def _main_loop(me, dq_map, tile, begin, count, n):
    """dK and dV of 64 keys: the sums over all blocks of rows of all query heads that share them."""
    config: gl.constexpr = me.config
    rows: gl.constexpr = config.rows
    first = tile.first + me.index * M
    unseen = _unseen(config, me.call.band, tile.seq, first, begin, count)
    cut, in_full = cut_and_full(config, me.call.band, tile.seq, first, begin + unseen, count - unseen)
    in_turn = _in_turn(config, tile, unseen, cut, count)
    bounds = key_bounds(config, me.call.band, tile.seq, first)
    row = begin * rows
    dk = empty_accumulator(me.shared.k)
    dv = empty_accumulator(me.shared.v)
    before = -1
    for member in range(me.call.group):
        block = row_block(me.call, tile, member, begin)
        # Each member's anew: what LLVM takes out of this loop stays in uniform registers, of which the loops below have too few.
        unseen = of_first_lane(in_turn[0])
        cut = of_first_lane(in_turn[1])
        full = of_first_lane(in_full)
        end = of_first_lane(in_turn[2])
        for i in range(unseen):
            _pass_over(me, dq_map, n, before)
            before = block + nth_place(config, tile, count, i)
            n += 1
        if end > unseen:
            at = nth_place(config, tile, count, unseen)
            s = warpgroup_mma_wait(0, deps=(_issue_s(me, n),))
            state = (dk, dv, p_of(me, s, bounds, n, row + at * rows, True))
            for i in range(unseen + 1, unseen + cut):
                at = nth_place(config, tile, count, i)
                state = _turn(me, dq_map, bounds, n, row + at * rows, before, state, True)
                before = block + nth_place(config, tile, count, i - 1)
                n += 1
            for i in range(unseen + gl.maximum(cut, 1), unseen + cut + full):
                at = nth_place(config, tile, count, i)
                state = _turn(me, dq_map, bounds, n, row + at * rows, before, state, False)
                before = block + nth_place(config, tile, count, i - 1)
                n += 1
            if has_lower_bound(config) or config.sections_take_turns:
                for i in range(unseen + gl.maximum(cut + full, 1), end):
                    at = nth_place(config, tile, count, i)
                    state = _turn(me, dq_map, bounds, n, row + at * rows, before, state, True)
                    before = block + nth_place(config, tile, count, i - 1)
                    n += 1
            dk, dv = _last_turn(me, dq_map, n, before, state)
            before = block + nth_place(config, tile, count, end - 1)
            n += 1
        if config.sections_take_turns:
            for i in range(end, count):
                _pass_over(me, dq_map, n, before)
                before = block + nth_place(config, tile, count, i)
                n += 1
    mbarrier.arrive(me.shared.v_free)
    _sum_dq(me, dq_map, n, before)
    mbarrier.arrive(me.shared.k_free)
    return dk, dv, n


@gluon.jit
def _store(me, map_, gradient, tile, place):
    """dK or dV of 64 keys through the buffer of this consumer's part `place` of dQ. Each has two, in turn: dV has that after the
    tile's last part, dK the other, and the next tile's first part that of dV again."""
    tiles = me.pair.tiles
    ring = me.pair.sums.ring
    slot = ring.slot(2 * place + me.index)
    if adds_in_order(me.config):
        ring.acquire(2 * place + me.index)
    tma_store_wait(1)
    matrix(tiles.index(slot)).store(to_16_bit(gradient, map_.dtype))
    fence_async_shared()
    store_rows((map_,), (tiles,), slot, tile.written, tile.head, tile.first + me.index * M)


@gluon.jit
def consumer_ahead(config: gl.constexpr, index: gl.constexpr, dq_map, dk_map, dv_map, shared, pair, draws, score, call):
    me = Consumer(config, index, shared, pair, score, call)
    number = draws.read_next(config, 0)
    n = 0
    turn = 0
    uses = 0
    while number < draws.tiles:
        tile, begin, count, _ = draws.read_tile(config, call, turn)
        dk = empty_accumulator(shared.k)
        dv = empty_accumulator(shared.v)
        if count > 0:
            mbarrier.wait(shared.k_full, uses & 1)
            mbarrier.wait(shared.v_full, uses & 1)
            dk, dv, n = _main_loop(me, dq_map, tile, begin, count, n)
            uses += 1
        if divides(config):
            dv, is_whole = joined(config, call, draws, 2 * index, number, dv)
            dk, _ = joined(config, call, draws, 2 * index + 1, number, dk)
            if is_whole:
                _store(me, dv_map, dv, tile, n)
                _store(me, dk_map, dk * score.factor, tile, n + 1)
        else:
            _store(me, dv_map, dv, tile, n)
            _store(me, dk_map, dk * score.factor, tile, n + 1)
        turn += 1
        number = draws.read_next(config, turn)
        tell(config, draws)
    tma_store_wait(0)
