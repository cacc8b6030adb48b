"""The backward pass on Hopper: FlashAttention-2's Algorithm 2 (arXiv 2307.08691), its warps specialised as FlashAttention-3's
(arXiv 2407.08608, section 3.1). A program has a tile of keys, or one tile after another; in it are a `producer` warp, two or
three consumer warpgroups and one warp or two that write dQ where it has an order:

    producer    K, V, then for each block of rows that sees the tile: Q with lse, dO with D, by TMA into rings
    consumers   for each block of rows (of each query head that shares these keys):

                    S^T = K Q^T        dP^T = V dO^T
                    P^T  = exp(scale S^T - lse), masked where an edge or the diagonal cuts the block
                    dV  += P^T dO
                    dS^T = P^T (dP^T - D)
                    dK  += dS^T Q
                    dQ   = dS K        to the writer

                then dK and dV through shared memory and TMA to global memory
    writers     dQ of each block, added in float32 to the workspace by TMA

Scores stand transposed so that P^T and dS^T are operands from registers, as wgmma leaves its results. How consumers share this
work is backward_turns.py (head dim 64), backward_ahead.py and backward_onward.py (128), backward_keys.py (both, with modifiers)
and backward_products.py (256); the writer is backward_writer.py. lse and D come from backward_rows.py, in base 2 and with lse
+inf for rows that see nothing: their P is then 0 without a mask.
"""

from tessera.backends.hopper.backward_ahead import consumer_ahead, make_pair
from tessera.backends.hopper.backward_keys import consumer_of_keys, make_halves
from tessera.backends.hopper.backward_onward import consumer_onward
from tessera.backends.hopper.backward_products import consumer_of_dk, consumer_of_dq, consumer_of_dv, make_exchange, places
from tessera.backends.hopper.backward_turns import consumer_in_turn, consumers_in_turn, make_parts
from tessera.backends.hopper.backward_writer import writer_of_dq, writer_of_many
from tessera.backends.hopper.pieces.bias import load_bias, staged_bias, stages_bias
from tessera.backends.hopper.pieces.channel import NAMED_BARRIER_K, NAMED_BARRIER_V, make_barriers, make_stream
from tessera.backends.hopper.pieces.counts import count_tile, count_told, place_of_count, tells_producer
from tessera.backends.hopper.pieces.draws import make_draws, posts_tiles
from tessera.backends.hopper.pieces.gradients import (
    Score,
    Shared,
    allocate_summands,
    comes_by_ds,
    place_of_k,
    place_of_v,
    subtracts_by_products,
)
from tessera.backends.hopper.pieces.key_tiles import Call, Order, first_place, locate_keys, nth_place
from tessera.backends.hopper.pieces.kv_source import Lengths, Pitch, load_rows
from tessera.backends.hopper.pieces.masking import Band
from tessera.backends.hopper.pieces.modifiers import make_modifiers
from tessera.backends.hopper.pieces.remainder import locate_work, number_after
from tessera.backends.hopper.pieces.row_ranges import row_blocks
from tessera.backends.hopper.pieces.sums import adds_in_order
from tessera.backends.hopper.pieces.tiles import M, allocate_tiles
from tessera.jit.compat import fence_async_shared, gl, gluon, let_next_begin, mbarrier, share_text, tma_load, wait_for_previous


@gluon.constexpr_function
def divided_by(config, name):
    """How the consumers share the work. By name: a kernel's source then shows the word."""
    return config.division.value == name


# ----------------------------------------------------------------------------------------------------------- producer


@gluon.jit
def _load_pieces(config: gl.constexpr, map_, buffer, place, full, span, tile):
    """Start the copies of the tile's K or V to `place` on, all of which `full` awaits."""
    for part in gl.static_range(config.keys // M):
        load_rows((map_,), (buffer,), place + part, full, span, tile.head, tile.first + part * M)


@gluon.jit
def _load_keys(config: gl.constexpr, map_, buffer, place, full, span, tile):
    """The same for `full`, which awaits these alone."""
    mbarrier.expect(full, config.keys * 2 * buffer.shape[-1])
    _load_pieces(config, map_, buffer, place, full, span, tile)


@gluon.jit
def _load_k(config: gl.constexpr, maps, shared, call, tile, seen):
    """K of a tile, before which the program had `seen` that any row sees."""
    span = tile.seq.keys(call.pitch.k)
    if comes_by_ds(config):
        full = shared.k_full.index(seen & 1)
        mbarrier.expect(full, config.keys * 2 * (shared.k.shape[-1] + shared.v.shape[-1]))  # V's bytes too
        _load_pieces(config, maps[1], shared.k, place_of_k(config, seen), full, span, tile)
    else:
        _load_keys(config, maps[1], shared.k, place_of_k(config, seen), shared.k_full, span, tile)


@gluon.jit
def _load_v(config: gl.constexpr, maps, shared, call, tile, seen):
    _load_keys(config, maps[2], shared.v, place_of_v(config, seen, 0), shared.v_full, tile.seq.keys(call.pitch.v), tile)


@gluon.jit
def _load_v_by_ds(config: gl.constexpr, maps, shared, call, tile, seen, done):
    """V to where dS^T of the tile's first block will lie, of all the program's blocks the one after `done`, when dQ of the block
    before that in this slot is done. Each consumer puts its dS^T where its own V was."""
    slot = done % config.consumers
    mbarrier.wait(shared.v_free.index(slot), ((done // config.consumers) & 1) ^ 1)
    full = shared.k_full.index(seen & 1)
    _load_pieces(config, maps[2], shared.v, place_of_v(config, seen, done), full, tile.seq.keys(call.pitch.v), tile)


@gluon.jit
def _load_block(config: gl.constexpr, map_, buffer, stream, n, span, head, row, beside: gl.constexpr):
    """Start the copy of a block of Q or dO; the mbarrier that awaits it, and `beside` bytes more a row."""
    stream.acquire(n)
    bar = stream.expect(n, config.rows * (2 * buffer.shape[-1] + beside))
    load_rows((map_,), (buffer,), stream.slot(n), bar, span, head, row)
    return bar


@gluon.jit
def _load_q(config: gl.constexpr, maps, stats_map, shared, call, tile, n, member, row):
    """Use n of Q's ring: the rows from `row` on of a member of the tile's heads."""
    head = tile.head * call.group + member
    queries = tile.queries(call.pitch.q)
    values = shared.lse.index(shared.q_stream.slot(n))
    if subtracts_by_products(config):
        bar = _load_block(config, maps[0], shared.q, shared.q_stream, n, queries, head, row, 16)
        tma_load(stats_map, [8 * head, tile.work + row], bar, values)
    else:
        beside: gl.constexpr = 4 + (2 * config.keys if stages_bias(config) else 0)
        bar = _load_block(config, maps[0], shared.q, shared.q_stream, n, queries, head, row, beside)
        tma_load(stats_map, [head, tile.work + row], bar, values)
        if stages_bias(config):
            count: gl.constexpr = config.keys // M
            for part in gl.static_range(count):
                place = shared.q_stream.slot(n) * count + part
                load_bias(maps[4], shared.bias[0], place, 1, tile.seq, head, row, tile.first + part * M, bar)


@gluon.jit
def _load_do(config: gl.constexpr, maps, stats_map, shared, call, tile, n, member, row):
    """The same of dO's."""
    head = tile.head * call.group + member
    outputs = tile.queries(call.pitch.o)
    if subtracts_by_products(config):
        _load_block(config, maps[3], shared.do, shared.do_stream, n, outputs, head, row, 0)
    else:
        bar = _load_block(config, maps[3], shared.do, shared.do_stream, n, outputs, head, row, 4)
        line = [call.heads_kv * call.group + head, tile.work + row]
        tma_load(stats_map, line, bar, shared.d.index(shared.do_stream.slot(n)))


@gluon.jit
def _uses(config: gl.constexpr, call, count):
    """Blocks of Q and dO for a tile: where its gradients leave by their buffers, one even if no row sees it."""
    if divided_by(config, "products"):
        return places(call, count)
    else:
        return count * call.group


@gluon.jit
def _member_and_row(config: gl.constexpr, tile, begin, count, start, n):
    """Whose block the n-th of a tile is, and its first row; `start`: the place of each member's first."""
    member = n // gl.maximum(count, 1)
    place = n - member * count + start
    place = nth_place(config, tile, count, gl.where(place >= count, place - count, place))
    return member, gl.where(count > 0, (begin + place) * config.rows, 0)


@gluon.jit
def producer(config: gl.constexpr, maps, stats_map, shared, call):
    """For a program of one tile."""
    tile = locate_keys(config, call, call.order.number)
    begin, count = row_blocks(config, call.band, tile.seq, tile.first)
    let_next_begin()
    if count > 0:
        _load_k(config, maps, shared, call, tile, 0)
    wait_for_previous()  # for lse, D and dQ's zeros; keys were there before
    start = first_place(config, call, tile, count)
    for n in range(_uses(config, call, count)):
        member, row = _member_and_row(config, tile, begin, count, start, n)
        _load_q(config, maps, stats_map, shared, call, tile, n, member, row)
        if (n == 0) & (count > 0):
            _load_v(config, maps, shared, call, tile, 0)
        _load_do(config, maps, stats_map, shared, call, tile, n, member, row)


@gluon.jit
def _load_next_v(config: gl.constexpr, maps, shared, call, tile, seen, done):
    """V of a tile, when what lies in its place has been read."""
    if comes_by_ds(config):
        _load_v_by_ds(config, maps, shared, call, tile, seen, done)
    else:
        mbarrier.wait(shared.v_free, (seen & 1) ^ 1)
        _load_v(config, maps, shared, call, tile, seen)


@gluon.jit
def _load_next_k(config: gl.constexpr, maps, shared, call, tile, seen, is_wanted):
    """The same of K."""
    if is_wanted:
        if comes_by_ds(config):
            mbarrier.wait(shared.k_free.index(seen & 1), ((seen >> 1) & 1) ^ 1)
        else:
            mbarrier.wait(shared.k_free, (seen & 1) ^ 1)
        _load_k(config, maps, shared, call, tile, seen)


@gluon.jit
def _ask_for_do(maps, shared, call, tile, member, row):
    """A block of dO into L2."""
    head = tile.head * call.group + member
    load_rows((maps[3],), (shared.do,), 0, shared.v_full, tile.queries(call.pitch.o), head, row, "only L2")


@gluon.jit
def _ask_for_keys(config: gl.constexpr, maps, shared, call, tile, is_wanted):
    """Into L2 what of a tile's K and V is not loaded as soon as the tile is known."""
    if is_wanted:
        for part in gl.static_range(config.keys // M):
            first = tile.first + part * M
            if config.k_places == 1:
                load_rows((maps[1],), (shared.k,), 0, shared.v_full, tile.seq.keys(call.pitch.k), tile.head, first, "only L2")
            load_rows((maps[2],), (shared.v,), 0, shared.v_full, tile.seq.keys(call.pitch.v), tile.head, first, "only L2")


@gluon.jit
def _post(config: gl.constexpr, call, draws, turn, number):
    """Tell the consumers what comes `turn`-th; the tile, its first row block, how many, and the place of the one that comes
    first."""
    if not posts_tiles(config):
        draws.post(turn, number)
    tile, begin, count = locate_work(config, call, draws, number)
    start = first_place(config, call, tile, count)
    if posts_tiles(config):
        draws.post_tile(turn, number, tile, begin, count, start)
    return tile, begin, count, start


@gluon.jit
def producer_of_many(config: gl.constexpr, maps, stats_map, shared, draws, call):
    """Tile after tile: the next one's first rows come while the consumers still work on this one, its K and V when no product
    reads what lies in their places any more. Each is asked for when its place is free, K last where it has but one."""
    number = call.order.number
    if adds_in_order(config):
        wait_for_previous()  # for the counter
        number = draws.draw()
    tile, begin, count, start = _post(config, call, draws, 0, number)
    if (count > 0) & (number < draws.tiles):
        _load_k(config, maps, shared, call, tile, 0)
    wait_for_previous()
    let_next_begin()  # not before: it may read counts without waiting for this kernel
    done = 0  # blocks of rows
    seen = 0  # tiles that any row sees
    turn = 0
    owed = number * 0 - 1  # where the tile before is counted
    while number < draws.tiles:
        uses = _uses(config, call, count)
        for n in range(uses):
            member, row = _member_and_row(config, tile, begin, count, start, n)
            _load_q(config, maps, stats_map, shared, call, tile, done + n, member, row)
            if config.asks_early:
                _ask_for_do(maps, shared, call, tile, member, row)
            if (n == 0) & (count > 0):
                _load_next_v(config, maps, shared, call, tile, seen, done)
            _load_do(config, maps, stats_map, shared, call, tile, done + n, member, row)
            if config.k_places == 1:
                _load_next_k(config, maps, shared, call, tile, seen, (n == 0) & (count > 0) & (turn > 0))
            if n == config.q_stages:  # all consumers have left the tile before
                count_told(config, draws, turn - 1, owed)
        if uses <= config.q_stages:
            count_told(config, draws, turn - 1, owed)
        if tells_producer(config):
            owed = place_of_count(config, call, tile)
        done += uses
        seen += gl.where(count > 0, 1, 0)
        number = number_after(config, call, draws, number)
        turn += 1
        tile, begin, count, start = _post(config, call, draws, turn, number)
        is_wanted = (count > 0) & (number < draws.tiles)
        if config.k_places == 2:
            _load_next_k(config, maps, shared, call, tile, seen, is_wanted)
        if config.asks_early:
            _ask_for_keys(config, maps, shared, call, tile, is_wanted)
    count_told(config, draws, turn - 1, owed)


@gluon.jit
def _load_k_onward(config: gl.constexpr, maps, shared, keys, call, tile, seen):
    """The K of tile `seen`, of those that any row sees, to its place, when what lay there has been read."""
    place = seen & 1
    if seen > 1:
        mbarrier.wait(shared.k_free, seen & 1)
    _load_keys(config, maps[1], shared.k, 2 * place, keys.index(4 + place), tile.seq.keys(call.pitch.k), tile)


@gluon.jit
def _load_half_of_v(config: gl.constexpr, maps, shared, keys, call, tile, seen, half: gl.constexpr):
    """A consumer's half of V, when it has read the last tile's."""
    mbarrier.wait(keys.index(2 + half), (seen & 1) ^ 1)
    full = keys.index(half)
    mbarrier.expect(full, M * 2 * shared.v.shape[-1])
    load_rows((maps[2],), (shared.v,), half, full, tile.seq.keys(call.pitch.v), tile.head, tile.first + half * M)


@gluon.jit
def producer_onward(config: gl.constexpr, maps, stats_map, shared, keys, draws, call):
    """The same for backward_onward.py: K before a tile's first rows, each consumer's half of V when that consumer has read the
    last one."""
    number = call.order.number
    tile, begin, count, _ = _post(config, call, draws, 0, number)
    if (count > 0) & (number < draws.tiles):
        _load_k_onward(config, maps, shared, keys, call, tile, 0)
    wait_for_previous()
    let_next_begin()
    done = 0  # blocks of rows
    seen = 0  # tiles that any row sees
    turn = 0
    owed = number * 0 - 1  # where the tile is counted that is done when consumers leave the one before
    last = owed  # the same of the last tile that any row sees
    while number < draws.tiles:
        uses = count * call.group
        if count > 0:
            row = begin * config.rows
            if turn > 0:
                _load_k_onward(config, maps, shared, keys, call, tile, seen)
            _load_q(config, maps, stats_map, shared, call, tile, done, 0, row)
            _load_half_of_v(config, maps, shared, keys, call, tile, seen, 0)
            _load_do(config, maps, stats_map, shared, call, tile, done, 0, row)
            _load_half_of_v(config, maps, shared, keys, call, tile, seen, 1)
            seen += 1
        for n in range(1, uses):
            member, row = _member_and_row(config, tile, begin, count, 0, n)
            _load_q(config, maps, stats_map, shared, call, tile, done + n, member, row)
            _load_do(config, maps, stats_map, shared, call, tile, done + n, member, row)
            if n == config.q_stages:
                count_told(config, draws, turn - 1, owed)
        if uses <= config.q_stages:
            count_told(config, draws, turn - 1, owed)
        if tells_producer(config):
            place = place_of_count(config, call, tile)
            owed = gl.where(count > 0, last, -1)
            if count > 0:
                last = place
            else:
                count_tile(draws, place)
        done += uses
        number = draws.draw()
        turn += 1
        tile, begin, count, _ = _post(config, call, draws, turn, number)
    count_told(config, draws, turn - 1, owed)
    if tells_producer(config) and last >= 0:
        count_tile(draws, last)


@gluon.jit
def _producer(config: gl.constexpr, maps, stats_map, shared, draws, call):
    if config.takes_tile_after_tile:
        producer_of_many(config, maps, stats_map, shared, draws, call)
    else:
        producer(config, maps, stats_map, shared, call)


# ------------------------------------------------------------------------------------------------------------- kernel


@gluon.jit
def _allocate(config: gl.constexpr, maps, stats_map):
    q_map, k_map, v_map, do_map = maps[0], maps[1], maps[2], maps[3]
    k = allocate_tiles(k_map, config.k_places * (config.keys // M))
    v = allocate_tiles(v_map, config.consumers * config.consumers if comes_by_ds(config) else config.keys // M)
    q = allocate_tiles(q_map, config.q_stages)
    do = allocate_tiles(do_map, config.do_stages)
    bias = ()
    if stages_bias(config):
        bias = (allocate_tiles(maps[4].map[0], config.q_stages * (config.keys // M)),)
    if subtracts_by_products(config):
        lse = allocate_summands(config, stats_map)
        d = lse
    else:
        lse = allocate_tiles(stats_map, config.q_stages)
        d = allocate_tiles(stats_map, config.do_stages)
    goes_on: gl.constexpr = divided_by(config, "keys, P ahead") and config.k_places == 2
    full = make_barriers(2, config.k_readers if goes_on else 1)
    free = full  # stands for what a program of one tile does not use (see sums_in); where turns go on it is that K is free
    if config.takes_tile_after_tile and not goes_on:
        free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        mbarrier.init(free.index(0), count=config.k_readers)
        mbarrier.init(free.index(1), count=1 if divided_by(config, "products") else config.k_readers)
    q_stream = make_stream(config.q_stages, config.readers, NAMED_BARRIER_K)
    do_stream = make_stream(config.do_stages, config.readers, NAMED_BARRIER_V)
    if comes_by_ds(config):
        of_ds = make_barriers(config.consumers, 1)
        return Shared(k, v, q, do, lse, d, full, full.index(0), free, of_ds, q_stream, do_stream, bias)
    else:
        return Shared(
            k, v, q, do, lse, d, full.index(0), full.index(1), free.index(0), free.index(1), q_stream, do_stream, bias
        )  # fmt: skip


@gluon.jit
def _start_ahead(config: gl.constexpr, maps, others, out, marks, rings, score, call):
    """The warps of backward_ahead.py, or of backward_onward.py. In any order there are no writers: two idle warps cost 1.01 to
    1.10 under a diagonal (H200, 2026-11-21)."""
    stats_map, dq_map, dk_map, dv_map = others
    shared, draws = rings
    pair = make_pair(config, dq_map, dk_map)
    if config.k_places == 2:
        keys = make_barriers(6, 1)
    fence_async_shared()
    if config.k_places == 2:
        gl.warp_specialize([
            (consumer_onward, (config, 0, dq_map, dk_map, dv_map, shared, pair, keys, draws, score, call)),
            (consumer_onward, (config, 1, dq_map, dk_map, dv_map, shared, pair, keys, draws, score, call)),
            (producer_onward, (config, maps, stats_map, shared, keys, draws, call)),
        ], [4, 1], [240, 24])  # fmt: skip
    elif adds_in_order(config):
        gl.warp_specialize([
            (consumer_ahead, (config, 0, dq_map, dk_map, dv_map, shared, pair, draws, score, call)),
            (consumer_ahead, (config, 1, dq_map, dk_map, dv_map, shared, pair, draws, score, call)),
            (writer_of_many, (config, 0, dq_map, out, pair.sums, draws, marks, call)),
            (writer_of_many, (config, 1, dq_map, out, pair.sums, draws, marks, call)),
            (producer_of_many, (config, maps, stats_map, shared, draws, call)),
        ], [4, 1, 1, 1], [240, 24, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consumer_ahead, (config, 0, dq_map, dk_map, dv_map, shared, pair, draws, score, call)),
            (consumer_ahead, (config, 1, dq_map, dk_map, dv_map, shared, pair, draws, score, call)),
            (producer_of_many, (config, maps, stats_map, shared, draws, call)),
        ], [4, 1], [240, 24])  # fmt: skip


@gluon.jit
def _start_in_turn(config: gl.constexpr, maps, others, out, marks, rings, score, call):
    """The warps of backward_turns.py."""
    stats_map, dq_map, dk_map, dv_map = others
    shared, draws = rings
    parts = make_parts(config, shared, dq_map, out[0])
    fence_async_shared()
    if config.consumers == 2:
        gl.warp_specialize([
            (consumer_in_turn, (config, 0, dq_map, dk_map, dv_map, shared, parts, draws, score, call)),
            (consumer_in_turn, (config, 1, dq_map, dk_map, dv_map, shared, parts, draws, score, call)),
            (producer, (config, maps, stats_map, shared, call)),
            (writer_of_dq, (config, dq_map, out, parts.sums, marks, call)),
        ], [4, 1, 1], [240, 24, 24])  # fmt: skip
    elif config.writers == 2:
        gl.warp_specialize([
            (consumer_in_turn, (config, 0, dq_map, dk_map, dv_map, shared, parts, draws, score, call)),
            (consumer_in_turn, (config, 1, dq_map, dk_map, dv_map, shared, parts, draws, score, call)),
            (consumer_in_turn, (config, 2, dq_map, dk_map, dv_map, shared, parts, draws, score, call)),
            (writer_of_many, (config, 0, dq_map, out, parts.sums, draws, marks, call)),
            (writer_of_many, (config, 1, dq_map, out, parts.sums, draws, marks, call)),
            (producer_of_many, (config, maps, stats_map, shared, draws, call)),
        ], [4, 4, 1, 1, 1], [160, 160, 24, 24, 24])  # fmt: skip
    elif config.shares_text:
        gl.warp_specialize([
            (share_text, ()),
            (consumers_in_turn, (config, dq_map, dk_map, dv_map, shared, parts, draws, score, call)),
            (share_text, ()),
            (producer_of_many, (config, maps, stats_map, shared, draws, call)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consumer_in_turn, (config, 0, dq_map, dk_map, dv_map, shared, parts, draws, score, call)),
            (consumer_in_turn, (config, 1, dq_map, dk_map, dv_map, shared, parts, draws, score, call)),
            (consumer_in_turn, (config, 2, dq_map, dk_map, dv_map, shared, parts, draws, score, call)),
            (_producer, (config, maps, stats_map, shared, draws, call)),
            (writer_of_dq, (config, dq_map, out, parts.sums, marks, call)),
        ], [4, 4, 1, 1], [160, 160, 24, 24])  # fmt: skip


@gluon.jit
def _start_by_products(config: gl.constexpr, maps, others, out, marks, rings, score, call):
    """The warps of backward_products.py. Of the splits of the registers 208/208/72 is clean, 200/200/88 serialises the products
    (Triton 3.6, d256)."""
    stats_map, dq_map, dk_map, dv_map = others
    shared, draws = rings
    exchange = make_exchange(config, dq_map, out[0])
    fence_async_shared()
    if config.writers == 2:
        gl.warp_specialize([
            (consumer_of_dv, (config, dv_map, shared, exchange, draws, score, call)),
            (consumer_of_dk, (config, dk_map, shared, exchange, draws, score, call)),
            (consumer_of_dq, (config, dq_map, shared, exchange, draws, score, call)),
            (writer_of_many, (config, 0, dq_map, out, exchange.sums, draws, marks, call)),
            (writer_of_many, (config, 1, dq_map, out, exchange.sums, draws, marks, call)),
            (producer_of_many, (config, maps, stats_map, shared, draws, call)),
        ], [4, 4, 1, 1, 1], [208, 72, 24, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consumer_of_dv, (config, dv_map, shared, exchange, draws, score, call)),
            (consumer_of_dk, (config, dk_map, shared, exchange, draws, score, call)),
            (consumer_of_dq, (config, dq_map, shared, exchange, draws, score, call)),
            (_producer, (config, maps, stats_map, shared, draws, call)),
            (writer_of_dq, (config, dq_map, out, exchange.sums, marks, call)),
        ], [4, 4, 1, 1], [208, 72, 24, 24])  # fmt: skip


@gluon.jit
def attention_backward(
    q_map, k_map, v_map, do_map, stats_map, dk_map, dv_map, dq_map, out_map,
    marks_ptr, cu_q, cu_k, used_q, used_k, key_start, key_end, query_end, document_begin, document_end,
    shares_ptr, batch, heads_kv, group, seqlen_q, seqlen_k, left, right, document_stride, blocks, section, line,
    q_pitch, k_pitch, v_pitch, do_pitch, dq_pitch, tiles, whole, share, scale, inner, factor, strands,
    slopes, slopes_stride, bias, bias_batch, bias_head, bias_row, key_low, key_high, threshold, keep_scale,
    bias_map, ds_map, dbias, dbias_batch, dbias_head, dbias_row,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """`stats`: lse of every head, then D of each, a line a head. `dq`: float32, `out`: 16 bits. Unused pointers are not read."""
    config: gl.constexpr = CONFIG
    maps = (q_map, k_map, v_map, do_map)
    if stages_bias(config):
        maps = maps + (staged_bias(bias_map, bias_batch, bias_head),)
    call = Call(
        batch, heads_kv, group, seqlen_q, seqlen_k,
        Band(left, right, document_begin, document_end, document_stride),
        Lengths(cu_q, cu_k, used_q, used_k, key_start, key_end, query_end),
        Pitch(q_pitch, k_pitch, v_pitch, do_pitch),
        Order(gl.program_id(0), blocks, section, line, strands),
    )  # fmt: skip
    modifiers = make_modifiers(
        config, (slopes, slopes_stride, bias, bias_batch, bias_head, bias_row, key_low, key_high, threshold, keep_scale),
        (ds_map, heads_kv * group, dbias, dbias_batch, dbias_head, dbias_row),
    )  # fmt: skip
    score = Score(scale, inner, factor, modifiers)
    out = (out_map, dq_pitch, factor)
    shared = _allocate(config, maps, stats_map)
    draws = 0
    if config.takes_tile_after_tile:
        draws = make_draws(config, marks_ptr, tiles, whole, share, shares_ptr)
    if divided_by(config, "keys"):
        halves = make_halves(config, dq_map, out_map, shared.k_full)
        fence_async_shared()
        gl.warp_specialize([
            (consumer_of_keys, (config, 0, dq_map, dk_map, dv_map, shared, halves, score, call)),
            (consumer_of_keys, (config, 1, dq_map, dk_map, dv_map, shared, halves, score, call)),
            (producer, (config, maps, stats_map, shared, call)),
            (writer_of_dq, (config, dq_map, out, halves.sums, marks_ptr + 1, call)),
        ], [4, 1, 1], [240, 24, 24])  # fmt: skip
    elif divided_by(config, "keys, P ahead"):
        _start_ahead(config, maps, (stats_map, dq_map, dk_map, dv_map), out, marks_ptr + 1, (shared, draws), score, call)
    elif divided_by(config, "keys, dQ in turn"):
        _start_in_turn(config, maps, (stats_map, dq_map, dk_map, dv_map), out, marks_ptr + 1, (shared, draws), score, call)
    else:
        _start_by_products(config, maps, (stats_map, dq_map, dk_map, dv_map), out, marks_ptr + 1, (shared, draws), score, call)
