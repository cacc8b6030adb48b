"""The backward's consumers for head dim 64 (see backward.py): dK and dV are small, so three warpgroups of 64 keys each, which
hide one another's latencies; 192 keys a tile, and rows of Q and dO are read a third less often than with 128.

The three do not march in step. Each puts its dS^T into a ring, and they take turns at dQ, when all three parts are there. A block
that sees none of a consumer's keys costs it a store of zeros.

A consumer's V stays in its registers, which spares shared memory a read of it a block: for that S ends before dP begins, and the
other two consumers' products run under its exponentials. lse and D are read before S and dP are waited for: after that a consumer
with 160 registers reads them two by two into the same ones, and waits for each (570 of 3217 cycles a block; H200, 2026-11-21).
Where there is no room for all of D beside dP, half of it is read so (`_lacks_room_for_d`).
"""

from tessera.backends.hopper.pieces.chain import chain_of
from tessera.backends.hopper.pieces.channel import Ring, make_barriers, named_barrier
from tessera.backends.hopper.pieces.counts import tell
from tessera.backends.hopper.pieces.gradients import (
    BARRIER_DS,
    BARRIER_K,
    await_keys,
    comes_by_ds,
    drawn,
    draws_by_words,
    free_keys,
    half_of_row_values,
    issue_transposed,
    kept_derivatives,
    meet,
    of_both_halves,
    place_of_k,
    place_of_v,
    probabilities,
    row_values,
    scaled_dv,
    score_of_keys,
    store_gradient,
)
from tessera.backends.hopper.pieces.key_tiles import first_place, locate_keys, next_place, place_of
from tessera.backends.hopper.pieces.lines import part_neighbours
from tessera.backends.hopper.pieces.masking import has_lower_bound
from tessera.backends.hopper.pieces.numbers import of_first_lane
from tessera.backends.hopper.pieces.remainder import divides, joined
from tessera.backends.hopper.pieces.row_ranges import cut_and_full, end_row, first_row, key_bounds, row_blocks
from tessera.backends.hopper.pieces.softmax import to_16_bit
from tessera.backends.hopper.pieces.sums import Sums, add_part, adds_in_order, make_sums, row_block
from tessera.backends.hopper.pieces.tiles import M, accumulator_layout, empty_accumulator, fresh_zero, has, matrix, operand_layout
from tessera.jit.compat import (
    aggregate,
    barrier,
    begin_shared_text,
    end_shared_text,
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
class Parts:
    """dS^T of up to three blocks, a tile (64 keys, 64 rows) from each consumer, where before a tile's first block there may lie
    the consumer's V; and dQ of up to three blocks, one from each."""

    ds: gl.shared_memory_descriptor
    ring: Ring
    sums: Sums


@gluon.jit
def _piece(config: gl.constexpr, consumer):
    """Which 64 of the tile's keys a consumer has."""
    if config.mirrors_keys:
        return config.consumers - 1 - consumer
    else:
        return consumer


@gluon.jit
def make_parts(config: gl.constexpr, shared, dq_map, out_map):
    dtype: gl.constexpr = out_map.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, config.rows], dtype)
    count: gl.constexpr = config.consumers
    shape: gl.constexpr = [count * count, M, config.rows]
    if comes_by_ds(config):
        ds = reinterpret(shared.v, dtype, shape, layout)
        empty = shared.v_free
    else:
        ds = gl.allocate_shared_memory(dtype, shape, layout)
        empty = make_barriers(count, 1)
    if adds_in_order(config):
        full = make_barriers(count, count)
    else:
        full = empty  # named barriers tell (_hand_over)
    return Parts(ds, Ring(full, empty, count), make_sums(config, dq_map, out_map, empty))


@gluon.jit
def _hand_over(config: gl.constexpr, consumer, parts, ds, n):
    """This consumer's dS^T of block n into the ring. In any order who adds it up hears of it by a named barrier of the slot: each
    warp arrives there by itself, where an mbarrier would hold up the warpgroup first. Ours / FA3 at head dim 64 went from 1.001
    to 1.022 (causal 16k), 1.023 to 1.040 (causal 4k) and 1.021 to 1.033 (full 4k; H200, 2026-11-21)."""
    slot = parts.ring.slot(n)
    parts.ring.acquire(n)
    parts.ds.index(slot * config.consumers + _piece(config, consumer)).store(ds)
    fence_async_shared()
    if adds_in_order(config):
        parts.ring.publish(n)
    elif not _has_turn(config, consumer, n):
        named_barrier("arrive", BARRIER_DS + slot, 0, config.consumers)


@gluon.jit
def _await_all(config: gl.constexpr, parts, n):
    """Until all dS^T of block n lie in the ring, whose turn it is."""
    if adds_in_order(config):
        parts.ring.wait(n)
    else:
        named_barrier("sync", BARRIER_DS + parts.ring.slot(n), 0, config.consumers)


@gluon.jit
def _has_turn(config: gl.constexpr, consumer, n):
    """Whether this consumer adds up block n's dQ. Of three the first does every other block: its warps are served first, so it
    comes early and waited 800 of a block's 3650 cycles for the others' dS (H200, 2026-11-21)."""
    if adds_in_order(config) or config.consumers == 2:
        return n % config.consumers == consumer
    elif config.shares_text:
        return (n & 1) << (n >> 1 & 1) == consumer
    elif consumer == 0:
        return n % 2 == 0
    else:
        return n % 4 == 2 * consumer - 1


@gluon.jit
def _next_turn(config: gl.constexpr, consumer, n):
    """The first block from n on whose dQ this consumer adds up, where there is an order."""
    count: gl.constexpr = config.consumers
    return n + (count + consumer - n % count) % count


@gluon.jit
def _sum_in_turn(config: gl.constexpr, consumer, dq_map, shared, parts, own, n, row, block):
    """dQ = dS K of block n, if it is this consumer's turn."""
    count: gl.constexpr = config.consumers
    if _has_turn(config, consumer, n):
        columns: gl.constexpr = shared.k.shape[-1]
        _, _, k_place, chain = own
        _await_all(config, parts, n)
        k_first = k_place + fresh_zero()
        first = parts.ring.slot(n) * count
        dq = gl.zeros([M, columns], gl.float32, accumulator_layout(columns))
        for part in gl.static_range(count):
            ds = parts.ds.index(first + part).permute((1, 0))
            dq = warpgroup_mma(ds, matrix(shared.k.index(part + k_first)), dq, use_acc=part > 0, is_async=True)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        parts.ring.release(n)
        add_part(config, dq_map, parts.sums, _place_of_part(config, consumer, n), dq, block, 0, chain, row)


@gluon.jit
def _place_of_part(config: gl.constexpr, consumer, n):
    """Which buffer takes dQ of block n: the next in the order, or in any order the consumer's own."""
    if adds_in_order(config):
        return n
    elif config.shares_text:
        return consumer + fresh_zero()  # worked out here, not held in a register
    else:
        return consumer


@gluon.jit
def _own_v(config: gl.constexpr, consumer, shared, done, seen):
    """This consumer's V as dP's operand from registers; 0 where it is read from shared memory."""
    if not _waits_late(config) and not comes_by_ds(config):
        mbarrier.wait(shared.v_full, seen & 1)
    if config.keeps_v:
        v = matrix(shared.v.index(place_of_v(config, seen, done) + _piece(config, consumer))).load(operand_layout(config.rows))
        if comes_by_ds(config):
            barrier()  # every thread's before dS^T is put there; here, or Triton puts one into every turn
        elif config.takes_tile_after_tile:
            mbarrier.arrive(shared.v_free)
        return v
    else:
        return 0


@gluon.constexpr_function
def _waits_late(config):
    """Whether K and V are waited for behind what a tile's draws begin with, a chain of products that they come under."""
    return has(config, "dropout")


@gluon.jit
def _await_late(config: gl.constexpr, consumer, shared, seen, member):
    """Until K and V are there (of a group of heads each finds them there), and put them into their lines."""
    if _waits_late(config):
        mbarrier.wait(shared.k_full, seen & 1)
        mbarrier.wait(shared.v_full, seen & 1)
        if member == 0:
            piece = _piece(config, consumer)
            part_neighbours(config, (shared.k.index(piece), shared.v.index(piece)))


@gluon.jit
def _issue_dp(config: gl.constexpr, consumer, shared, v, n):
    """Start dP^T = V dO^T of block n."""
    shared.do_stream.wait(n)
    do = matrix(shared.do.index(shared.do_stream.slot(n)))
    if config.keeps_v:
        return issue_transposed(v, do)
    else:
        return issue_transposed(matrix(shared.v.index(_piece(config, consumer) + fresh_zero())), do)


@gluon.constexpr_function
def _products_apart(config):
    """Whether dP begins when S has ended: both would not fit beside V, or beside what dropout draws."""
    return config.keeps_v or has(config, "dropout")


@gluon.constexpr_function
def _lacks_room_for_d(config):
    """Whether half of D alone is read before dP is waited for. With dropout 0.970 of the time with nothing read there, under a
    diagonal 0.973; all of D, and two or three words spilt, 0.997 and 0.994. In an order 0.973 and 0.975 (all of it, without a
    spill, 0.978 and 0.981), in an order with dropout 0.961 and 0.977. But of the time with all of it where that is read now 1.039
    and 1.005 (4k; H200, 2026-11-22)."""
    return has(config, "dropout") or adds_in_order(config)


@gluon.jit
def _finished_dp(config: gl.constexpr, shared, dp, slot):
    """(dP, its rows' D)."""
    rows: gl.constexpr = config.rows
    if _lacks_room_for_d(config):
        first = half_of_row_values(shared.d, slot, rows, 0)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        d = of_both_halves(first, half_of_row_values(shared.d, slot, rows, 1))
    else:
        d = row_values(shared.d, slot, rows)
        dp = warpgroup_mma_wait(0, deps=(dp,))
    return dp, d


@gluon.jit
def _block(
    config: gl.constexpr, consumer, dq_map, shared, parts, score, own, n, row, block, state,
    MASKED: gl.constexpr,
):  # fmt: skip
    """One turn of the main loop: the rows from `row` on, which are row block `block` of the workspace."""
    dk, dv = state
    bounds, v, k_place, _ = own
    dtype: gl.constexpr = shared.q.dtype
    q_slot = shared.q_stream.slot(n)
    do_slot = shared.do_stream.slot(n)
    q = matrix(shared.q.index(q_slot))
    do = matrix(shared.do.index(do_slot))
    shared.q_stream.wait(n)
    s = issue_transposed(matrix(shared.k.index(k_place + _piece(config, consumer) + fresh_zero())), q)
    lse = row_values(shared.lse, q_slot, config.rows)
    if _products_apart(config):
        s = warpgroup_mma_wait(0, deps=(s,))
    else:
        dp = _issue_dp(config, consumer, shared, v, n)
        s = warpgroup_mma_wait(1, deps=(s,))
    p, weight = probabilities(config, score, s, lse, bounds, row, MASKED)
    if not draws_by_words(config):  # in 32 bits it would spill beside dP
        p, weight = to_16_bit(p, dtype), to_16_bit(weight, dtype)
    if _products_apart(config):
        dp = _issue_dp(config, consumer, shared, v, n)
    kept = drawn(config, score, row)
    dp, d = _finished_dp(config, shared, dp, do_slot)
    ds, p = kept_derivatives(config, p, weight, kept, dp, d, dtype)
    ds = to_16_bit(ds, dtype)
    dv = warpgroup_mma(gl.convert_layout(p, operand_layout(config.dim_v)), do, dv, is_async=True)
    _hand_over(config, consumer, parts, ds, n)

    dk = warpgroup_mma(gl.convert_layout(ds, operand_layout(config.dim)), q, dk, is_async=True)
    dv = warpgroup_mma_wait(1, deps=(dv,))
    shared.do_stream.release(n)
    dk = warpgroup_mma_wait(0, deps=(dk,))
    shared.q_stream.release(n)
    _sum_in_turn(config, consumer, dq_map, shared, parts, own, n, row, block)
    return dk, dv


@gluon.jit
def _pass_over(config: gl.constexpr, consumer, dq_map, shared, parts, own, n, row, block):
    """A block that sees none of this consumer's keys: dS is 0, and its turn at dQ may come all the same."""
    rows: gl.constexpr = config.rows
    nothing = gl.zeros([M, rows], shared.q.dtype, accumulator_layout(rows))
    shared.q_stream.wait(n)
    shared.q_stream.release(n)
    shared.do_stream.wait(n)
    shared.do_stream.release(n)
    _hand_over(config, consumer, parts, nothing, n)
    _sum_in_turn(config, consumer, dq_map, shared, parts, own, n, row, block)


@gluon.jit
def _seen_end(config: gl.constexpr, call, tile, first, begin, count):
    """How many of a tile's `count` blocks from `begin` on come before the last that sees any of the 64 keys from `first` on, it
    included."""
    if has_lower_bound(config):
        last = gl.minimum(first + M, tile.seq.k_rows) - 1
        end = gl.maximum(end_row(config, call.band, tile.seq, last), 0)
        return gl.minimum((end + config.rows - 1) // config.rows - begin, count)
    else:
        return count


@gluon.jit
def _with_bounds(config: gl.constexpr, call, tile, first, own):
    """What a consumer has of its own, with its keys' bounds made anew where all run one text: the number that tells them apart is
    one register more, so bounds are not to be held over the main loop."""
    if config.shares_text:
        _, v, k_place, chain = own
        own = (key_bounds(config, call.band, tile.seq, of_first_lane(first)), v, k_place, chain)
    return own


@gluon.jit
def _main_loop(config: gl.constexpr, consumer, dq_map, shared, parts, score, call, work, done, seen):
    """dK and dV of 64 keys: the sums over all blocks of rows of all query heads that share them. `work`: the tile, its first row
    block, how many, and which comes first. `done` blocks came before, and `seen` tiles that any row sees; both are returned with
    this tile's."""
    tile, begin, count, start = work
    first = tile.first + _piece(config, consumer) * M
    own_begin = first_row(config, call.band, tile.seq, first) // config.rows
    unseen = gl.minimum(gl.maximum(own_begin - begin, 0), count)
    seen_end = _seen_end(config, call, tile, first, begin, count)
    cut, full = cut_and_full(config, call.band, tile.seq, first, begin + unseen, gl.maximum(seen_end - unseen, 0))
    state = (empty_accumulator(shared.k), empty_accumulator(shared.v))
    if count > 0:
        if not _waits_late(config):
            await_keys(config, shared, seen)
        chain = chain_of(config, call, tile, score.factor)
        bounds = key_bounds(config, call.band, tile.seq, first)
        own = (bounds, _own_v(config, consumer, shared, done, seen), place_of_k(config, seen), chain)
        rows: gl.constexpr = config.rows
        row = begin * rows
        for member in range(call.group):
            n = done + member * count
            block = row_block(call, tile, member, begin)
            scored = score_of_keys(config, score, tile.seq, tile.head * call.group + member, first)
            _await_late(config, consumer, shared, seen, member)
            place = start
            own = _with_bounds(config, call, tile, first, own)
            for i in range(unseen):
                at = place_of(config, place, i)
                _pass_over(config, consumer, dq_map, shared, parts, own, n + i, row + at * rows, block + at)
                place = next_place(config, place, count)
            for i in range(unseen, unseen + cut):
                at = place_of(config, place, i)
                there = row + at * rows
                state = _block(config, consumer, dq_map, shared, parts, scored, own, n + i, there, block + at, state, True)
                place = next_place(config, place, count)
            for i in range(unseen + cut, unseen + cut + full):
                at = place_of(config, place, i)
                there = row + at * rows
                state = _block(config, consumer, dq_map, shared, parts, scored, own, n + i, there, block + at, state, False)
                place = next_place(config, place, count)
            if has_lower_bound(config):
                for i in range(unseen + cut + full, seen_end):
                    at = row + i * rows
                    state = _block(config, consumer, dq_map, shared, parts, scored, own, n + i, at, block + i, state, True)
                for i in range(gl.maximum(seen_end, unseen), count):
                    _pass_over(config, consumer, dq_map, shared, parts, own, n + i, row + i * rows, block + i)
        if config.takes_tile_after_tile:
            free_keys(config, shared, seen)
            if not config.keeps_v:
                mbarrier.arrive(shared.v_free)
    return state, done + count * call.group, seen + gl.where(count > 0, 1, 0)


@gluon.jit
def _one_tile(config: gl.constexpr, consumer, dq_map, dk_map, dv_map, shared, parts, score, call):
    """dK and dV leave through V's and K's buffers."""
    tile = locate_keys(config, call, call.order.number)
    begin, count = row_blocks(config, call.band, tile.seq, tile.first)
    work = (tile, begin, count, first_place(config, call, tile, count))
    state, _, _ = _main_loop(config, consumer, dq_map, shared, parts, score, call, work, 0, 0)
    dk, dv = state
    row = tile.first + consumer * M
    # nobody else reads these rows of V
    store_gradient(config, dv_map, shared.v, consumer, scaled_dv(config, score, dv), tile, row)
    meet("sync", BARRIER_K, 2 * config.keys)
    store_gradient(config, dk_map, shared.k, consumer, dk * score.factor, tile, row)


@gluon.jit
def _store(config: gl.constexpr, consumer, dk_map, dv_map, parts, score, tile, dk, dv):
    """dK and dV through the buffer of this consumer's part of dQ."""
    row = tile.first + _piece(config, consumer) * M
    tma_store_wait(0)
    store_gradient(config, dv_map, parts.sums.rounded, 2 * consumer, scaled_dv(config, score, dv), tile, row)
    store_gradient(config, dk_map, parts.sums.rounded, 2 * consumer + 1, dk * score.factor, tile, row)


@gluon.jit
def _tile_after_tile(config: gl.constexpr, consumer, dq_map, dk_map, dv_map, shared, parts, draws, score, call):
    """The gradients leave through the buffer of this consumer's part of dQ: nobody waits for anybody at a tile's end."""
    number = draws.read_first(config, call.order.number)
    turn = 0
    done = 0
    seen = 0
    while number < draws.tiles:
        work = draws.read_tile(config, call, turn)
        state, done, seen = _main_loop(config, consumer, dq_map, shared, parts, score, call, work, done, seen)
        dk, dv = state
        if adds_in_order(config):
            parts.sums.ring.acquire(_next_turn(config, consumer, done))
        if divides(config):
            piece = _piece(config, consumer)
            dv, is_whole = joined(config, call, draws, 2 * piece, number, dv)
            dk, _ = joined(config, call, draws, 2 * piece + 1, number, dk)
            if is_whole:
                _store(config, consumer, dk_map, dv_map, parts, score, work[0], dk, dv)
        else:
            _store(config, consumer, dk_map, dv_map, parts, score, work[0], dk, dv)
        turn += 1
        number = draws.read_next(config, turn)
        tell(config, draws)


@gluon.jit
def consumers_in_turn(config: gl.constexpr, dq_map, dk_map, dv_map, shared, parts, draws, score, call):
    """All of them by one text: see share_text."""
    consumer_in_turn(config, begin_shared_text(), dq_map, dk_map, dv_map, shared, parts, draws, score, call)
    end_shared_text()


@gluon.jit
def consumer_in_turn(config: gl.constexpr, consumer, dq_map, dk_map, dv_map, shared, parts, draws, score, call):
    if config.takes_tile_after_tile:
        _tile_after_tile(config, consumer, dq_map, dk_map, dv_map, shared, parts, draws, score, call)
    else:
        _one_tile(config, consumer, dq_map, dk_map, dv_map, shared, parts, score, call)
    tma_store_wait(0)
