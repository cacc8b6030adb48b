"""The backward's consumers for head dims up to 256 (see backward.py): dK and dV of 64 keys take a warpgroup's registers each, so
the products are divided among three, and nothing is computed twice:

    dv    S^T, P^T, dV += P^T dO       P in 16 bits to dk through shared memory
    dk    dP^T, dS^T, dK += dS^T Q     dS to dq through shared memory
    dq    dQ = dS K                    in parts of 64 columns to the writer

S of the next block runs beside dV of this one, dP of the next beside dK of this one; lse, D and P, with which they are combined,
are read while they run. Products with 256 columns from registers do not compile in a block of 416 threads (C7602), so dK and dV
are done in two products of 128.

dV leaves through the buffer of the tile's last dO, dK through that of the last Q: so K and V are free as soon as no product reads
them, and a program that takes tile after tile has the next ones before these gradients are out. A tile that no row sees takes one
place of every ring all the same, for its zeros to leave by.
"""

from tessera.backends.hopper.pieces.bias import add_to_dbias
from tessera.backends.hopper.pieces.chain import chain_of
from tessera.backends.hopper.pieces.channel import Ring, make_ring
from tessera.backends.hopper.pieces.counts import adders_know, count_tile, place_of_count
from tessera.backends.hopper.pieces.dropout import marked
from tessera.backends.hopper.pieces.gradients import (
    BARRIER_K,
    BARRIER_V,
    allocate_ds,
    await_keys,
    derivatives,
    drawn,
    free_keys,
    issue_transposed,
    keep_ds,
    kept_p,
    masks_of,
    meet,
    needs_slope_apart,
    place_of_k,
    place_of_v,
    probabilities,
    put_ds,
    row_values,
    rows_of_ds,
    scaled_dv,
    score_of_keys,
    store_gradient,
)
from tessera.backends.hopper.pieces.key_tiles import first_place, locate_keys, nth_place
from tessera.backends.hopper.pieces.lines import part_neighbours
from tessera.backends.hopper.pieces.remainder import divides, joined, locate_work
from tessera.backends.hopper.pieces.row_ranges import cut_and_full, key_bounds, row_blocks
from tessera.backends.hopper.pieces.softmax import to_16_bit, to_32_bit
from tessera.backends.hopper.pieces.sums import (
    Sums,
    add_part,
    await_buffer,
    lies_in_rows,
    make_sums,
    put_in_registers_order,
    row_block,
    send_part,
)
from tessera.backends.hopper.pieces.tiles import M, accumulator_layout, fresh_zero, has, matrix
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


@aggregate
class Exchange:
    """What the consumers hand on: P (or, with a softcap, P times its slope) and dS, both (64 keys, 64 rows) in 16 bits; and
    parts of dQ. Where the slope is wanted apart there is one block of P at a time: with its slope, then without."""

    p: gl.shared_memory_descriptor
    ds: gl.shared_memory_descriptor
    p_ring: Ring
    ds_ring: Ring
    sums: Sums


@gluon.jit
def make_exchange(config: gl.constexpr, dq_map, out_map):
    dtype: gl.constexpr = out_map.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, config.rows], dtype)
    p = gl.allocate_shared_memory(dtype, [2, M, config.rows], layout)
    ds = allocate_ds(config, dtype, 2)
    p_ring = make_ring(1 if needs_slope_apart(config) else 2, 1)
    return Exchange(p, ds, p_ring, make_ring(2, 1), make_sums(config, dq_map, out_map, p_ring.full))


@gluon.constexpr_function
def _wide_layout(columns):
    """A (64, columns) accumulator made by products of at most 128 columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns if columns < 128 else 128, 16])


@gluon.jit
def _empty_sum(columns: gl.constexpr):
    """Zeros (64, columns) for dK or dV."""
    return gl.zeros([M, columns], gl.float32, _wide_layout(columns))


@gluon.jit
def _issue_sum(operand, rows, gradient):
    """Start gradient += operand (64 keys, rows) rows (rows, columns)."""
    layout: gl.constexpr = gl.DotOperandLayout(0, gradient.type.layout, 2)
    return warpgroup_mma(gl.convert_layout(operand, layout), rows, gradient, is_async=True)


@gluon.jit
def _each_tile(config: gl.constexpr, differentiate: gl.constexpr, map_, shared, exchange, draws, score, call):
    """A consumer's work on the program's tile, or on one after another: `differentiate` is told how many places of the rings were
    taken before a tile, and how many tiles any row saw, and returns both with that tile's."""
    if config.takes_tile_after_tile:
        number = draws.read_first(config, call.order.number)
        turn = 0
        done = 0
        seen = 0
        while number < draws.tiles:
            done, seen = differentiate(config, map_, shared, exchange, draws, score, call, number, done, seen)
            turn += 1
            number = draws.read(turn)
    else:
        differentiate(config, map_, shared, exchange, draws, score, call, call.order.number, 0, 0)


@gluon.jit
def _work(config: gl.constexpr, call, draws, number):
    """(tile, first row block, how many) of a number."""
    if config.takes_tile_after_tile:
        return locate_work(config, call, draws, number)
    else:
        tile = locate_keys(config, call, number)
        begin, count = row_blocks(config, call.band, tile.seq, tile.first)
        return tile, begin, count


@gluon.jit
def _store(config: gl.constexpr, map_, buffer, slot, call, draws, number, index: gl.constexpr, gradient):
    """dV (index 0) or dK (1) of tile `number` through a place of a ring, which may take something else then; of a part of a tile
    to where the tile's last part is added to it."""
    if divides(config):
        gradient, is_whole = joined(config, call, draws, index, number, gradient)
        if is_whole:
            tile, _, _ = locate_work(config, call, draws, number)
            store_gradient(config, map_, buffer, slot, gradient, tile, tile.first)
    else:
        tile = locate_keys(config, call, number)
        store_gradient(config, map_, buffer, slot, gradient, tile, tile.first)
    tma_store_wait(0)


@gluon.jit
def _let_go_of_k(config: gl.constexpr, shared, seen):
    """The tile's K may be overwritten, as far as this consumer goes; in a program of one tile nobody wants to."""
    if config.takes_tile_after_tile:
        free_keys(config, shared, seen)


@gluon.jit
def places(call, count):
    """How many places of the rings a tile takes, whose keys `count` blocks of rows see."""
    return gl.maximum(count * call.group, 1)


# ----------------------------------------------------------------------------------------------------------- dV


@gluon.jit
def _marked(config: gl.constexpr, p, kept):
    """P in 16 bits as it is handed on: with dropout negative where it is dropped."""
    if has(config, "dropout"):
        p = marked(p, kept)
    return p


@gluon.jit
def _unmarked(config: gl.constexpr, p, dp):
    """P as it was before it was marked, and dP, 0 where P is dropped."""
    if has(config, "dropout"):
        p = to_32_bit(p)
        dp = gl.where(p < 0.0, 0.0, dp)
        p = gl.abs(p)
    return p, dp


@gluon.jit
def _next_p(config: gl.constexpr, shared, exchange, score, bounds, s, lse, n, row, is_cut):
    """P^T of block n in 16 bits: handed to dk, and returned."""
    p, weight = probabilities(config, score, s, lse, bounds, row, is_cut)
    dtype: gl.constexpr = shared.q.dtype
    p, weight = to_16_bit(p, dtype), to_16_bit(weight, dtype)
    kept = masks_of(config, drawn(config, score, row), dtype)
    exchange.p_ring.acquire(n)
    exchange.p.index(exchange.p_ring.slot(n)).store(_marked(config, weight, kept))
    if needs_slope_apart(config):
        exchange.p.index(1).store(_marked(config, p, kept))
    exchange.p_ring.publish(n)
    shared.q_stream.release(n)
    return kept_p(config, p, kept)


@gluon.jit
def _next_block(config: gl.constexpr, block, member, count, start, n):
    """The block of rows after `block`, the tile's n-th, and whose it is: the same member's of the heads' group, or the next one's
    first, `start`. (To count along is a division less, and a number more in registers, where a bias leaves none.)"""
    if config.takes_tile_after_tile:
        after = gl.where(block + 1 == count, 0, block + 1)
        return after, gl.where(after == start, member + 1, member)
    else:
        return n % count, n // count


@gluon.jit
def _row_of(config: gl.constexpr, tile, rows, n):
    """The first row of the n-th of a tile's blocks, `rows` being (begin, count) of them."""
    begin, count = rows
    return (begin + nth_place(config, tile, count, n)) * config.rows


@gluon.jit
def _issue_s(config: gl.constexpr, shared, n, seen):
    shared.q_stream.wait(n)
    k = matrix(shared.k.index(place_of_k(config, seen) + fresh_zero()))
    return issue_transposed(k, matrix(shared.q.index(shared.q_stream.slot(n))))


@gluon.constexpr_function
def _reads_rows_late(config):
    """Whether rows' values are read behind a product and not under it: there is no room beside the places of a bias, nor beside
    a bias of keys and what dropout draws."""
    return has(config, "bias") or (has(config, "bias of keys") and has(config, "dropout"))


@gluon.jit
def _finished_s(config: gl.constexpr, shared, s, n):
    """(S of block n, its rows' lse), which is read while S is under way."""
    values = shared.lse
    slot = shared.q_stream.slot(n)
    if _reads_rows_late(config):
        s = warpgroup_mma_wait(0, deps=(s,))
        lse = row_values(values, slot, config.rows)
    else:
        lse = row_values(values, slot, config.rows)
        s = warpgroup_mma_wait(0, deps=(s,))
    return s, lse


@gluon.jit
def _do_of(config: gl.constexpr, shared, n):
    """Block n's dO. (Of a ring of one place the place is known: over many tiles its descriptors would stay in registers.)"""
    if config.takes_tile_after_tile:
        return matrix(shared.do.index(shared.do_stream.slot(n) + fresh_zero()))
    else:
        return matrix(shared.do.index(shared.do_stream.slot(n)))


@gluon.jit
def _sum_dv(config: gl.constexpr, shared, exchange, score, call, tile, rows, done, seen):
    """dV of a tile that `rows`, (begin, count) of its blocks, see. Its last dO is still held."""
    begin, count = rows
    dv = _empty_sum(config.dim_v)
    last = done + places(call, count) - 1
    if count > 0:
        bounds = key_bounds(config, call.band, tile.seq, tile.first)
        cut, full = cut_and_full(config, call.band, tile.seq, tile.first, begin, count)
        await_keys(config, shared, seen)
        part_neighbours(config, (shared.k.index(place_of_k(config, seen)),))
        s, lse = _finished_s(config, shared, _issue_s(config, shared, done, seen), done)
        scored = score_of_keys(config, score, tile.seq, tile.head * call.group, tile.first)
        start = first_place(config, call, tile, count)
        row = _row_of(config, tile, rows, start)
        p = _next_p(config, shared, exchange, scored, bounds, s, lse, done, row, True)
        block = start
        member = 0
        for n in range(done, last):
            shared.do_stream.wait(n)
            dv = _issue_sum(p, _do_of(config, shared, n), dv)  # first: the next dO waits for its buffer
            s = _issue_s(config, shared, n + 1, seen)
            dv = warpgroup_mma_wait(1, deps=(dv,))
            shared.do_stream.release(n)
            s, lse = _finished_s(config, shared, s, n + 1)
            block, member = _next_block(config, block, member, count, start, n + 1 - done)
            scored = score_of_keys(config, score, tile.seq, tile.head * call.group + member, tile.first)
            place = nth_place(config, tile, count, block)
            is_cut = (place < cut) | (place >= cut + full)
            p = _next_p(config, shared, exchange, scored, bounds, s, lse, n + 1, (begin + place) * config.rows, is_cut)
        _let_go_of_k(config, shared, seen)
        shared.do_stream.wait(last)
        dv = warpgroup_mma_wait(0, deps=(_issue_sum(p, _do_of(config, shared, last), dv),))
    else:
        shared.q_stream.wait(done)
        shared.q_stream.release(done)
        exchange.p_ring.acquire(done)
        exchange.p_ring.publish(done)
        shared.do_stream.wait(done)
    return dv


@gluon.jit
def _differentiate_v(config: gl.constexpr, dv_map, shared, exchange, draws, score, call, number, done, seen):
    """dV of tile `number` (see _each_tile)."""
    tile, begin, count = _work(config, call, draws, number)
    dv = _sum_dv(config, shared, exchange, score, call, tile, (begin, count), done, seen)
    end = done + places(call, count)
    exchange.p_ring.acquire(end - 1 + exchange.p_ring.slots)  # dk has taken the last P: it reads the last dO no more
    meet("sync", BARRIER_V, 128)
    _store(config, dv_map, shared.do, shared.do_stream.slot(end - 1), call, draws, number, 0, scaled_dv(config, score, dv))
    shared.do_stream.release(end - 1)
    return end, seen + gl.where(count > 0, 1, 0)


@gluon.jit
def consumer_of_dv(config: gl.constexpr, dv_map, shared, exchange, draws, score, call):
    _each_tile(config, _differentiate_v, dv_map, shared, exchange, draws, score, call)


# ----------------------------------------------------------------------------------------------------------- dK


@gluon.jit
def _d_and_p_of(config: gl.constexpr, shared, exchange, n):
    """D of block n's rows, and its P^T as dv hands it over."""
    d = row_values(shared.d, shared.do_stream.slot(n), config.rows)
    exchange.p_ring.wait(n)
    return d, exchange.p.index(exchange.p_ring.slot(n)).load(accumulator_layout(config.rows))


@gluon.jit
def _finished_dp(config: gl.constexpr, shared, exchange, dp, n):
    """(dP of block n, its rows' D and its P), as _finished_s. (Packed there is no room either.)"""
    if _reads_rows_late(config) or has(config, "varlen"):
        dp = warpgroup_mma_wait(0, deps=(dp,))
        d, p = _d_and_p_of(config, shared, exchange, n)
    else:
        d, p = _d_and_p_of(config, shared, exchange, n)
        dp = warpgroup_mma_wait(0, deps=(dp,))
    return dp, d, p


@gluon.jit
def _next_ds(config: gl.constexpr, shared, exchange, score, dp, d, p, n, row):
    """dS^T of block n in 16 bits: handed to dq, and returned."""
    p, dp = _unmarked(config, p, dp)
    ds = derivatives(p, dp, d)
    if needs_slope_apart(config):
        add_to_dbias(config, score.modifiers, derivatives(gl.abs(exchange.p.index(1).load(dp.type.layout)), dp, d), row)
    else:
        add_to_dbias(config, score.modifiers, ds, row)
    ds = to_16_bit(ds, shared.q.dtype)
    exchange.p_ring.release(n)
    exchange.ds_ring.acquire(n)
    buffer = exchange.ds.index(exchange.ds_ring.slot(n))
    put_ds(config, buffer, ds)
    exchange.ds_ring.publish(n)
    keep_ds(config, score.modifiers, buffer, row)
    shared.do_stream.release(n)
    return ds


@gluon.jit
def _issue_dp(config: gl.constexpr, shared, n, seen):
    shared.do_stream.wait(n)
    return issue_transposed(matrix(shared.v.index(place_of_v(config, seen, 0) + fresh_zero())), _do_of(config, shared, n))


@gluon.jit
def _sum_dk(config: gl.constexpr, shared, exchange, score, call, tile, rows, done, seen):
    """dK of a tile, as _sum_dv. Its last Q is still held."""
    begin, count = rows
    dk = _empty_sum(config.dim)
    last = done + places(call, count) - 1
    if count > 0:
        mbarrier.wait(shared.v_full, seen & 1)
        part_neighbours(config, (shared.v.index(place_of_v(config, seen, 0)),))
        dp, d, p = _finished_dp(config, shared, exchange, _issue_dp(config, shared, done, seen), done)
        scored = score_of_keys(config, score, tile.seq, tile.head * call.group, tile.first)
        start = first_place(config, call, tile, count)
        ds = _next_ds(config, shared, exchange, scored, dp, d, p, done, _row_of(config, tile, rows, start))
        block = start
        member = 0
        for n in range(done, last):
            shared.q_stream.wait(n)
            dk = _issue_sum(ds, matrix(shared.q.index(shared.q_stream.slot(n))), dk)
            dp = _issue_dp(config, shared, n + 1, seen)
            dk = warpgroup_mma_wait(1, deps=(dk,))
            shared.q_stream.release(n)
            dp, d, p = _finished_dp(config, shared, exchange, dp, n + 1)
            block, member = _next_block(config, block, member, count, start, n + 1 - done)
            scored = score_of_keys(config, score, tile.seq, tile.head * call.group + member, tile.first)
            ds = _next_ds(config, shared, exchange, scored, dp, d, p, n + 1, _row_of(config, tile, rows, block))
        if config.takes_tile_after_tile:
            mbarrier.arrive(shared.v_free)
        shared.q_stream.wait(last)
        dk = warpgroup_mma_wait(0, deps=(_issue_sum(ds, matrix(shared.q.index(shared.q_stream.slot(last))), dk),))
    else:
        shared.do_stream.wait(done)
        shared.do_stream.release(done)
        exchange.p_ring.wait(done)
        exchange.p_ring.release(done)
        exchange.ds_ring.acquire(done)
        exchange.ds_ring.publish(done)
        shared.q_stream.wait(done)
    return dk


@gluon.jit
def _differentiate_k(config: gl.constexpr, dk_map, shared, exchange, draws, score, call, number, done, seen):
    """The same of dK."""
    tile, begin, count = _work(config, call, draws, number)
    dk = _sum_dk(config, shared, exchange, score, call, tile, (begin, count), done, seen)
    end = done + places(call, count)
    meet("sync", BARRIER_K, 128)  # dv has made the last P: it reads the last Q no more
    _store(config, dk_map, shared.q, shared.q_stream.slot(end - 1), call, draws, number, 1, dk * score.factor)
    shared.q_stream.release(end - 1)
    return end, seen + gl.where(count > 0, 1, 0)


@gluon.jit
def consumer_of_dk(config: gl.constexpr, dk_map, shared, exchange, draws, score, call):
    _each_tile(config, _differentiate_k, dk_map, shared, exchange, draws, score, call)


# ----------------------------------------------------------------------------------------------------------- dQ


@gluon.jit
def _issue_part(config: gl.constexpr, shared, ds, seen, index: gl.constexpr):
    """Start part `index` of dQ = dS K."""
    columns: gl.constexpr = config.part_columns
    k = matrix(shared.k.index(place_of_k(config, seen) + fresh_zero())).slice(index * columns, columns, dim=1)
    return warpgroup_mma(ds, k, gl.zeros([M, columns], gl.float32, accumulator_layout(columns)), use_acc=False, is_async=True)


@gluon.jit
def _add_under_products(config: gl.constexpr, dq_map, shared, exchange, ds, seen, n, block):
    """dQ of block n, part after part, where parts lie as in registers: the next one's product runs under the fence behind this
    one's stores, which took 40% of this consumer's time (H200, full 1k, 2026-11-22)."""
    parts: gl.constexpr = config.parts
    dq = _issue_part(config, shared, ds, seen, 0)
    for j in gl.static_range(parts):
        await_buffer(config)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        put_in_registers_order(exchange.sums, n * parts + j, dq)
        if j + 1 < parts:
            dq = _issue_part(config, shared, ds, seen, j + 1)
        fence_async_shared()
        send_part(config, dq_map, exchange.sums, n * parts + j, block, j)


@gluon.jit
def _differentiate_q(config: gl.constexpr, dq_map, shared, exchange, draws, score, call, number, done, seen):
    """What tile `number` adds to dQ, part after part."""
    parts: gl.constexpr = config.parts
    tile, begin, count = _work(config, call, draws, number)
    chain = chain_of(config, call, tile, score.factor)
    end = done + places(call, count)
    if count > 0:
        await_keys(config, shared, seen)
        start = first_place(config, call, tile, count)
        at = start
        member = 0
        for n in range(done, end):
            place = begin + nth_place(config, tile, count, at)
            block = row_block(call, tile, member, place)
            exchange.ds_ring.wait(n)
            ds = rows_of_ds(config, exchange.ds.index(exchange.ds_ring.slot(n)))
            if lies_in_rows(config):
                for j in gl.static_range(parts):
                    dq = warpgroup_mma_wait(0, deps=(_issue_part(config, shared, ds, seen, j),))
                    if j == parts - 1:
                        exchange.ds_ring.release(n)
                    add_part(config, dq_map, exchange.sums, n * parts + j, dq, block, j, chain, place * config.rows)
            else:
                _add_under_products(config, dq_map, shared, exchange, ds, seen, n, block)
                exchange.ds_ring.release(n)
            at, member = _next_block(config, at, member, count, start, n + 1 - done)
        _let_go_of_k(config, shared, seen)
    else:
        exchange.ds_ring.wait(done)
        exchange.ds_ring.release(done)
    if adders_know(config):
        count_tile(draws, place_of_count(config, call, tile))
    return end, seen + gl.where(count > 0, 1, 0)


@gluon.jit
def consumer_of_dq(config: gl.constexpr, dq_map, shared, exchange, draws, score, call):
    _each_tile(config, _differentiate_q, dq_map, shared, exchange, draws, score, call)
    tma_store_wait(0)
