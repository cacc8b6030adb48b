"""The backward's consumers where dK and dV of 64 keys fit in registers beside S and dP (head dims up to 128; see backward.py).

Each of two warpgroups does everything for its own 64 keys of the tile's 128, and half of dQ. dQ needs all of dS, so both write
their dS to shared memory and meet once a block:

    S^T, dP^T issued;  P^T from S under dP;  dS^T from dP;  dV issued;  dS^T written, meet;  dQ, dK issued;  dQ out under dK

Nothing is in flight at the end of a turn: a product carried over the loop's back edge is serialised by ptxas (C7514).
"""

from tessera.backends.hopper.pieces.bias import add_to_dbias
from tessera.backends.hopper.pieces.gradients import (
    BARRIER_DS,
    BARRIER_K,
    allocate_ds,
    derivatives_of_kept,
    drawn,
    draws_by_words,
    issue_transposed,
    keep_ds,
    kept_derivatives,
    kept_p,
    masks_of,
    meet,
    needs_slope_apart,
    probabilities,
    put_ds,
    row_values,
    rows_of_ds,
    scaled_dv,
    score_of_block,
    score_of_keys,
    store_gradient,
)
from tessera.backends.hopper.pieces.key_tiles import locate_keys
from tessera.backends.hopper.pieces.lines import part_neighbours
from tessera.backends.hopper.pieces.masking import has_lower_bound
from tessera.backends.hopper.pieces.row_ranges import cut_and_full, key_bounds, row_blocks
from tessera.backends.hopper.pieces.softmax import to_16_bit
from tessera.backends.hopper.pieces.sums import Sums, add_part, make_sums, row_block
from tessera.backends.hopper.pieces.tiles import M, accumulator_layout, empty_accumulator, fresh_zero, matrix, operand_layout
from tessera.jit.compat import (
    aggregate,
    gl,
    gluon,
    mbarrier,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@aggregate
class Halves:
    """What the consumers tell each other: dS^T of a block as two tiles (64 keys, rows), twice, so that one meeting a block is
    enough; and their parts of dQ, half of the columns each."""

    ds: gl.shared_memory_descriptor
    sums: Sums


@gluon.jit
def make_halves(config: gl.constexpr, dq_map, out_map, bar):
    return Halves(allocate_ds(config, out_map.dtype, 4), make_sums(config, dq_map, out_map, bar))


@gluon.jit
def _issue_dq(config: gl.constexpr, consumer: gl.constexpr, shared, ds, place, zero):
    """Start this consumer's half of the columns of dQ = dS K: (64 rows, columns)."""
    columns: gl.constexpr = config.part_columns
    dq = gl.zeros([M, columns], gl.float32, accumulator_layout(columns))
    for half in gl.static_range(2):
        k = matrix(shared.k.index(half + zero)).slice(consumer * columns, columns, dim=1)
        dq = warpgroup_mma(rows_of_ds(config, ds.index(place + half)), k, dq, use_acc=half > 0, is_async=True)
    return dq


@gluon.jit
def _block(
    config: gl.constexpr, consumer: gl.constexpr, dq_map, shared, halves, score, bounds, n, row, block, state,
    MASKED: gl.constexpr,
):  # fmt: skip
    """One turn of the main loop: the rows from `row` on, which are row block `block` of the workspace."""
    dk, dv = state
    dtype: gl.constexpr = shared.q.dtype
    zero = fresh_zero()
    q_slot = shared.q_stream.slot(n)
    do_slot = shared.do_stream.slot(n)
    q = matrix(shared.q.index(q_slot))
    do = matrix(shared.do.index(do_slot))
    shared.q_stream.wait(n)
    s = issue_transposed(matrix(shared.k.index(consumer + zero)), q)
    kept = drawn(config, score, row)
    shared.do_stream.wait(n)
    dp = issue_transposed(matrix(shared.v.index(consumer + zero)), do)

    block_score = score_of_block(config, score, shared, q_slot, consumer)
    s = warpgroup_mma_wait(1, deps=(s,))
    lse = row_values(shared.lse, q_slot, config.rows)
    p, weight = probabilities(config, block_score, s, lse, bounds, row, MASKED)
    if not draws_by_words(config):
        p = to_16_bit(p, dtype)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    d = row_values(shared.d, do_slot, config.rows)  # only now: it would take registers from S
    if needs_slope_apart(config):
        kept = masks_of(config, kept, dtype)
        ds = derivatives_of_kept(config, weight, kept, dp, d)
        add_to_dbias(config, score.modifiers, derivatives_of_kept(config, p, kept, dp, d), row)
        p = kept_p(config, p, kept)
    else:
        ds, p = kept_derivatives(config, p, weight, kept, dp, d, dtype)
        add_to_dbias(config, score.modifiers, ds, row)
    ds = to_16_bit(ds, dtype)
    # dV covers the way of dS through shared memory and the meeting: 1.04 of issuing it before dS is computed (H200, 2026-11-21)
    dv = warpgroup_mma(gl.convert_layout(p, operand_layout(config.dim_v)), do, dv, is_async=True)
    place = (n & 1) * 2
    put_ds(config, halves.ds.index(place + consumer), ds)
    meet("sync", BARRIER_DS, 256)
    keep_ds(config, score.modifiers, halves.ds.index(place + consumer), row)

    dq = _issue_dq(config, consumer, shared, halves.ds, place, zero)
    dk = warpgroup_mma(gl.convert_layout(ds, operand_layout(config.dim)), q, dk, is_async=True)
    dq, dv = warpgroup_mma_wait(1, deps=(dq, dv))
    shared.do_stream.release(n)
    add_part(config, dq_map, halves.sums, 2 * n + consumer, dq, block, consumer)
    dk = warpgroup_mma_wait(0, deps=(dk,))
    shared.q_stream.release(n)
    return dk, dv


@gluon.jit
def _main_loop(config: gl.constexpr, consumer: gl.constexpr, dq_map, shared, halves, score, call, tile):
    """dK and dV of 64 keys: the sums over all blocks of rows of all query heads that share them."""
    first = tile.first + consumer * M
    begin, count = row_blocks(config, call.band, tile.seq, tile.first)
    cut, full = cut_and_full(config, call.band, tile.seq, first, begin, count)
    state = (empty_accumulator(shared.k), empty_accumulator(shared.v))
    if count > 0:
        bounds = key_bounds(config, call.band, tile.seq, first)
        mbarrier.wait(shared.k_full, 0)
        mbarrier.wait(shared.v_full, 0)
        part_neighbours(config, (shared.k.index(consumer), shared.v.index(consumer)))
        n = 0
        for member in range(call.group):
            row = begin * config.rows
            block = row_block(call, tile, member, begin)
            scored = score_of_keys(config, score, tile.seq, tile.head * call.group + member, first)
            for i in range(cut):
                state = _block(config, consumer, dq_map, shared, halves, scored, bounds, n, row, block, state, True)
                n += 1
                row += config.rows
                block += 1
            for i in range(full):
                state = _block(config, consumer, dq_map, shared, halves, scored, bounds, n, row, block, state, False)
                n += 1
                row += config.rows
                block += 1
            if has_lower_bound(config):
                for i in range(count - cut - full):
                    state = _block(config, consumer, dq_map, shared, halves, scored, bounds, n, row, block, state, True)
                    n += 1
                    row += config.rows
                    block += 1
    return state


@gluon.jit
def consumer_of_keys(config: gl.constexpr, consumer: gl.constexpr, dq_map, dk_map, dv_map, shared, halves, score, call):
    tile = locate_keys(config, call, call.order.number)
    dk, dv = _main_loop(config, consumer, dq_map, shared, halves, score, call, tile)
    row = tile.first + consumer * M
    # nobody else reads these rows of V
    store_gradient(config, dv_map, shared.v, consumer, scaled_dv(config, score, dv), tile, row)
    meet("sync", BARRIER_K, 256)
    store_gradient(config, dk_map, shared.k, consumer, dk * score.factor, tile, row)
    tma_store_wait(0)
