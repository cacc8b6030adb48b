"""The forward pass on Hopper: FlashAttention-3 (arXiv 2407.08608), Algorithms 1 and 2, for 16-bit inputs.

One persistent program a streaming multiprocessor, one producer warp and two or three consumer warpgroups:

    producer   finds the next tile of query rows and posts it; Q, then the blocks of K and V, last to first, by TMA into rings of
               shared memory
    consumer   64 of the tile's rows; for each block of keys

                   S = Q K^T                      issued with  O += P V  of the block before
                   S masked, where a row's bounds cut the block
                   m, l and P from S              while that P V runs, and the products of the other consumers
                   O rescaled, where m moved

               then out = O / l by way of shared memory and TMA, and m + log l

Two things hide the softmax. Products of one block run under the softmax of the next, because S is waited for and P V is not
(Algorithm 2); and products of one warpgroup run under the softmax of another, because they take turns (ping-pong). With
Overlap.NONE only the second is left, without turns: S and P are then never alive together, which leaves registers for a
third consumer, and that is worth more where tiles are long enough (plan.py).

To read it: `producer`, then `consumer`, then `_overlapped_block` in pieces/blocks.py; the rest are their parts.
"""

from tessera.backends.hopper.pieces.bias import load_bias, staged_bias, stages_bias
from tessera.backends.hopper.pieces.blocks import issue_last_values, run_blocks, start_blocks, wait_for_values
from tessera.backends.hopper.pieces.board import Board, make_board, post, read
from tessera.backends.hopper.pieces.channel import (
    Ring,
    Stream,
    barriers_of_slots,
    make_paired_stream,
    make_ring,
    pass_turn,
    take_turn,
)
from tessera.backends.hopper.pieces.cluster import is_pair, make_box, make_peers, member_of_pair
from tessera.backends.hopper.pieces.kv_source import Lengths, Pitch, load_rows
from tessera.backends.hopper.pieces.masking import (
    Band,
    has_lower_bound,
    has_one_loop,
    has_spare,
    has_unseen,
    row_bounds,
    share_of,
    tile_blocks,
)
from tessera.backends.hopper.pieces.modifiers import below_diagonal, falls_evenly, make_modifiers, spares_registers
from tessera.backends.hopper.pieces.output import finish_rows, free_place, q_slot, write_output
from tessera.backends.hopper.pieces.scheduler import Schedule, ask, first_number, locate, next_number, take, taken
from tessera.backends.hopper.pieces.scores import Score, score_of_rows
from tessera.backends.hopper.pieces.tiles import (
    M,
    allocate_tiles,
    has,
    has_left_half,
    has_right_half,
    head_bytes,
    holds_query,
    keeps_masks,
    may_stand_by,
    overlaps,
    query_tiles,
    shares_text,
    stages_in_query,
    takes_turns,
)
from tessera.jit.compat import (
    aggregate,
    begin_shared_text,
    end_shared_text,
    fence_async_shared,
    gl,
    gluon,
    meet_cluster,
    share_text,
    tma_store_wait,
)


@aggregate
class Call:
    """What one launch is asked: sizes, masks, where sequences lie, the order of tiles. Scalars may change from call to call."""

    batch: gl.tensor
    heads: gl.tensor
    group: gl.tensor
    seqlen_q: gl.tensor
    seqlen_k: gl.tensor
    band: Band
    lengths: Lengths
    pitch: Pitch
    schedule: Schedule


@aggregate
class Shared:
    """Shared memory: tiles as one buffer a part of the head dim, and the rings that guard them. `bias`: of a block's, 64 rows
    each, beside K's, or empty."""

    q: gl.tuple
    k: gl.tuple
    v: gl.tuple
    o: gl.tuple
    q_ring: Ring
    k_stream: Stream
    v_stream: Stream
    board: Board
    box: gl.tuple
    bias: gl.tuple


# ----------------------------------------------------------------------------------------------------------- producer


@gluon.jit
def _useful_tile(config: gl.constexpr, call, number, turn):
    """The first tile from `number` on that has rows to write (packed sequences may be given a block too many)."""
    tile = locate(config, number, call, member_of_pair(turn))
    if has(config, "varlen"):
        while (number < call.schedule.tiles) & (tile.first >= tile.seq.q_rows):
            number = taken(config, call.schedule, take(call.schedule.counter))
            tile = locate(config, number, call)
    return number, tile


@gluon.constexpr_function
def _nth_to_begin(config, n):
    """A consumer in the order in which they begin a tile: in a window, without turns, the last one has its first block."""
    return config.consumers - 1 - n if has(config, "right") and has_spare(config) else n


@gluon.jit
def _load_q(config: gl.constexpr, maps, shared, call, tile, turn):
    consumers: gl.constexpr = config.consumers
    for i in gl.static_range(consumers):
        consumer = _nth_to_begin(config, i)
        n = turn * consumers + consumer
        shared.q_ring.acquire(n)
        bar = shared.q_ring.expect(n, head_bytes(config.dims) * M)
        span = tile.seq.queries(call.pitch.q)
        load_rows(maps, shared.q, shared.q_ring.slot(n), bar, span, tile.head, tile.first + consumer * M)


@gluon.jit
def _load_block(stream, maps, buffers, n, count: gl.constexpr, span, head, row):
    stream.acquire(n)
    bar = stream.expect(n, count)
    if len(stream.peer) == 0:
        load_rows(maps, buffers, stream.slot(n), bar, span, head, row)
    elif stream.peer[0].may_load(stream.slot(n), n // stream.slots):
        load_rows(maps, buffers, stream.slot(n), bar, span, head, row, "multicast 3")


@gluon.constexpr_function
def _key_bytes(config):
    """Of a block of K, and of the bias that comes with it."""
    beside = 2 * config.rows if config.stages_bias else 0
    return (head_bytes(config.dims) + beside) * config.keys


@gluon.jit
def _load_bias(config: gl.constexpr, bias, shared, tile, n, key):
    """The bias of a tile's rows and of block n of K, from key `key` on, beside which it lies."""
    if stages_bias(config):
        consumers: gl.constexpr = config.consumers
        slot = shared.k_stream.slot(n)
        place = slot * consumers
        load_bias(bias, shared.bias[0], place, consumers, tile.seq, tile.head, tile.first, key, shared.k_stream.full.index(slot))


@gluon.jit
def producer(config: gl.constexpr, q_maps, k_maps, v_maps, bias, shared, modifiers, call):
    k_bytes: gl.constexpr = _key_bytes(config)
    v_bytes: gl.constexpr = head_bytes(config.dims_v) * config.keys
    n = 0
    turn = 0
    number, tile = _useful_tile(config, call, first_number(config), turn)
    post(config, shared.board, turn, number, tile, modifiers)
    while number < call.schedule.tiles:
        seq = tile.seq
        head = tile.head // call.group
        keys = seq.keys(call.pitch.k)
        values = seq.keys(call.pitch.v)
        begin, end = tile_blocks(config, call.band, tile)
        _load_block(shared.k_stream, k_maps, shared.k, n, k_bytes, keys, head, (end - 1) * config.keys)
        _load_bias(config, bias, shared, tile, n, (end - 1) * config.keys)
        _load_q(config, q_maps, shared, call, tile, turn)
        for i in range(end - 1 - begin):
            n = shared.k_stream.next(n)
            block = end - 2 - i
            _load_block(shared.k_stream, k_maps, shared.k, n, k_bytes, keys, head, block * config.keys)
            _load_bias(config, bias, shared, tile, n, block * config.keys)
            before = shared.v_stream.before(n)
            _load_block(shared.v_stream, v_maps, shared.v, before, v_bytes, values, head, (block + 1) * config.keys)
        answer = ask(config, call.schedule)
        _load_block(shared.v_stream, v_maps, shared.v, n, v_bytes, values, head, begin * config.keys)
        n = shared.k_stream.next(n)
        turn += 1
        number = next_number(config, call.schedule, shared.box, turn, answer)
        number, tile = _useful_tile(config, call, number, turn)
        post(config, shared.board, turn, number, tile, modifiers)


# ----------------------------------------------------------------------------------------------------------- consumer


@aggregate
class Consumer:
    """One consumer warpgroup: rows 64 `index` and on of every tile. They run one text (jit/shared_text.py): what runs
    once a tile is fetched anew each time, and should be no longer than it must be."""

    config: gl.constexpr
    index: gl.tensor
    shared: Shared
    score: Score
    call: Call


@gluon.jit
def _pass_over(me, n, count):
    """Blocks that other consumers' rows see and this one's do not: release them, and keep the turns in step."""
    for i in range(count):
        use = me.shared.k_stream.further(n, i)
        me.shared.k_stream.wait(use)
        me.shared.k_stream.release(use)
        if takes_turns(me.config):
            take_turn(me.index)
            pass_turn(me.index, me.config.consumers)
        me.shared.v_stream.wait(use)
        me.shared.v_stream.release(use)
    return me.shared.k_stream.further(n, count)


@gluon.jit
def _at_rows(me, tile, row):
    """This consumer with the modifiers of its rows."""
    return Consumer(me.config, me.index, me.shared, score_of_rows(me.config, me.score, tile, row), me.call)


@gluon.jit
def _masked(me, tile):
    """What the mask makes of this consumer's rows of a tile: their share of the blocks, and their bounds."""
    share = share_of(me.config, me.call.band, tile, me.index)
    return share, row_bounds(me.config, me.call.band, tile.seq, tile.first + me.index * M)


@gluon.jit
def _main_loop(me, tile, share, bounds, n, turn):
    """All blocks of this consumer's rows, but for the last P V where that overlaps; the state, the streams' position, and whether
    the last block's right half is all that there was of it. Keys count as for the tile of `share` and `bounds`."""
    row = tile.first + me.index * M
    q_use = turn * me.config.consumers + me.index
    if has_unseen(me.config):
        n = _pass_over(me, n, share.unseen)
    q = query_tiles(me.shared.q, q_slot(me, q_use), me.config.keys, me.config.held)
    if holds_query(me.config):
        me.shared.q_ring.release(q_use)
    left_alone = None
    if has_left_half(me.config):
        left_alone = share.left_alone
    state, started = start_blocks(me, n, q, bounds, (share.end - 1) * me.config.keys, left_alone)
    free_place(me, turn)
    if started == 1:
        n = me.shared.k_stream.next(n)
    end = share.end - started
    full_end = share.full_end
    if falls_evenly(me.config, None):
        full_end = gl.minimum(full_end, below_diagonal(me.config, tile.seq, row))
    upper = gl.minimum(gl.maximum(full_end, share.begin), end)  # hi cuts the blocks from here on
    lower = share.begin  # and lo those below this one
    if has_lower_bound(me.config):
        lower = gl.minimum(gl.maximum(share.full_begin, share.begin), end)
    right_alone = share.right_alone & (share.begin < gl.minimum(lower, upper))
    if has_one_loop(me.config):
        halves = 0
        if has_right_half(me.config):
            halves = gl.where(right_alone, 1, 0)
        whole = (gl.minimum(lower, upper) * me.config.keys, upper * me.config.keys)
        state, n = run_blocks(me, n, q, bounds + whole, end - 1, state, end - share.begin - halves, "any")
        if has_right_half(me.config):
            state, n = run_blocks(me, n, q, bounds, share.begin, state, halves, "lower", 1)
    else:
        if has_lower_bound(me.config) and not takes_turns(me.config):
            high = gl.maximum(upper, lower)
            state, n = run_blocks(me, n, q, bounds, end - 1, state, end - high, "upper alone")
            state, n = run_blocks(me, n, q, bounds, high - 1, state, gl.maximum(lower - upper, 0), "upper")
        else:
            state, n = run_blocks(me, n, q, bounds, end - 1, state, end - upper, "upper")
        lower = gl.minimum(lower, upper)
        state, n = run_blocks(me, n, q, bounds, upper - 1, state, upper - lower, None)
        if has_lower_bound(me.config):
            state, n = run_blocks(me, n, q, bounds, lower - 1, state, lower - share.begin, "lower")
    return state, n, right_alone


@gluon.jit
def _attend_rows(me, tile, share, bounds, n, turn, o_maps, lse_ptr):
    """This consumer's rows of a tile, from Q to out; the streams' position, and the next tile."""
    shared = me.shared
    q_use = turn * me.config.consumers + me.index
    row = tile.first + me.index * M
    mine = _at_rows(me, tile, row)
    shared.q_ring.wait(q_use)
    state, n, right_alone = _main_loop(mine, tile, share, bounds, n, turn)
    if not holds_query(me.config) and not stages_in_query(me.config):
        shared.q_ring.release(q_use)  # every product with this Q is done
    last = n
    if overlaps(me.config):
        o, p, m, l = state
        last = shared.v_stream.before(n)
        shared.v_stream.wait(last)
        o = issue_last_values(me, last, p, o, right_alone)
    else:
        o, m, l = state

    # under the last P V: the log-sum-exp, and where the next tile lies, which is posted when no block is left
    number, following = tile.first, tile
    if not has_spare(me.config):
        number, following = read(me.config, shared.board, me.call, turn + 1)
    factor = finish_rows(me, tile, row, m, l, lse_ptr)
    if overlaps(me.config):
        o = wait_for_values(o)
        shared.v_stream.release(last)
    write_output(me, tile, row, o, factor, o_maps, q_use)
    if has_spare(me.config):
        n = _pass_over(me, n, share.spare)
        number, following = read(me.config, shared.board, me.call, turn + 1)
    return n, number, following


@gluon.jit
def _attend(me, tile, n, turn, o_maps, lse_ptr):
    """A tile, and those behind it that the mask does the same to; the streams' position, the next turn, and its tile."""
    share, bounds = _masked(me, tile)
    if keeps_masks(me.config):
        whole = tile.whole[0]
        number = tile.first
        alike = whole * 0 + 1
        while alike == 1:
            n, number, tile = _attend_rows(me, tile, share, bounds, n, turn, o_maps, lse_ptr)
            turn += 1
            alike = gl.where(number < me.call.schedule.tiles, whole & tile.whole[0], 0)
        return n, turn, number, tile
    else:
        n, number, following = _attend_rows(me, tile, share, bounds, n, turn, o_maps, lse_ptr)
        return n, turn + 1, number, following


@gluon.jit
def _stand_by(me, tile, n, turn):
    """The same where the tile has no rows for this consumer."""
    q_use = turn * me.config.consumers + me.index
    begin, end = tile_blocks(me.config, me.call.band, tile)
    me.shared.q_ring.wait(q_use)
    free_place(me, turn)
    if not stages_in_query(me.config):
        me.shared.q_ring.release(q_use)
    n = _pass_over(me, n, end - begin)
    number, following = read(me.config, me.shared.board, me.call, turn + 1)
    return n, number, following


@gluon.jit
def consumer(config: gl.constexpr, shared, score, call, o_maps, lse_ptr):
    """All of them: see share_text."""
    _consume(Consumer(config, begin_shared_text(), shared, score, call), o_maps, lse_ptr)
    end_shared_text()


@gluon.jit
def lone_consumer(config: gl.constexpr, index: gl.constexpr, shared, score, call, o_maps, lse_ptr):
    """One of them, in a text of its own; its number is a value there too, not a constant."""
    _consume(Consumer(config, call.batch * 0 + index, shared, score, call), o_maps, lse_ptr)


@gluon.jit
def _consume(me, o_maps, lse_ptr):
    config: gl.constexpr = me.config
    shared = me.shared
    call = me.call
    if takes_turns(config) and me.index == config.consumers - 1:
        pass_turn(me.index, config.consumers)  # the first turn is consumer 0's
    n = 0
    turn = 0
    number, tile = read(config, shared.board, call, turn)
    while number < call.schedule.tiles:
        if not may_stand_by(config) or me.index * M < tile.rows:
            n, turn, number, tile = _attend(me, tile, n, turn, o_maps, lse_ptr)
        else:
            n, number, tile = _stand_by(me, tile, n, turn)
            turn += 1
    tma_store_wait(0)


# ------------------------------------------------------------------------------------------------------------- kernel


@gluon.jit
def _allocate(maps, count: gl.constexpr):
    """`count` tiles, one buffer a part of the head dim."""
    buffers = ()
    for part in gl.static_range(len(maps)):
        buffers = buffers + (allocate_tiles(maps[part], count),)
    return buffers


@gluon.jit
def _allocate_all(config: gl.constexpr, q_maps, k_maps, v_maps, o_maps, bias_map):
    q = _allocate(q_maps, config.consumers * config.queries)
    k = _allocate(k_maps, config.stages)
    v = _allocate(v_maps, config.stages)
    o = q
    if not stages_in_query(config):
        o = _allocate(o_maps, config.consumers)
    q_ring = make_ring(config.consumers * config.queries, 1)
    k_peer, v_peer = make_peers(config)
    first: gl.constexpr = barriers_of_slots(config.stages)
    by_bits: gl.constexpr = config.stages != 3 and (keeps_masks(config) or spares_registers(config))
    k_stream = make_paired_stream(config.stages, config.consumers, first[0], 1, k_peer, by_bits)
    v_stream = make_paired_stream(config.stages, config.consumers, first[1], 1, v_peer, by_bits)
    board = make_board(config.consumers)
    box = make_box(config)
    fence_async_shared()
    if is_pair(config):
        meet_cluster()
    bias = ()
    if stages_bias(config):
        bias = (allocate_tiles(bias_map, config.stages * config.consumers),)
    return Shared(q, k, v, o, q_ring, k_stream, v_stream, board, box, bias)


@gluon.jit
def _parts(whole, tail):
    if tail is None:
        return (whole,)
    else:
        return (whole, tail)


@gluon.jit
def attention_forward(
    q_map, q_tail, k_map, k_tail, v_map, v_tail, o_map, o_tail,
    lse_ptr, counter, sinks_ptr, cu_q, cu_k, used_q, used_k, key_start, key_end, query_end, document_begin, document_end,
    batch, heads, group, seqlen_q, seqlen_k, left, right, document_stride, tiles, blocks, tall, section,
    q_pitch, k_pitch, v_pitch, o_pitch, scale, inner,
    slopes, slopes_stride, bias, bias_batch, bias_head, bias_row, key_low, key_high, threshold, keep_scale,
    bias_map,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """`*_tail`: the second part of a head dim that is no power of two, else None. Pointers that no feature needs are never
    read. In packed calls seqlen_q and seqlen_k are totals."""
    config: gl.constexpr = CONFIG
    q_maps = _parts(q_map, q_tail)
    k_maps = _parts(k_map, k_tail)
    v_maps = _parts(v_map, v_tail)
    o_maps = _parts(o_map, o_tail)
    call = Call(
        batch, heads, group, seqlen_q, seqlen_k,
        Band(left, right, document_begin, document_end, document_stride),
        Lengths(cu_q, cu_k, used_q, used_k, key_start, key_end, query_end),
        Pitch(q_pitch, k_pitch, v_pitch, o_pitch),
        Schedule(counter, tiles, blocks, tall, section),
    )  # fmt: skip
    modifiers = make_modifiers(
        config, (slopes, slopes_stride, bias, bias_batch, bias_head, bias_row, key_low, key_high, threshold, keep_scale), ()
    )
    score = Score(scale, inner, sinks_ptr, modifiers)
    shared = _allocate_all(config, q_maps, k_maps, v_maps, o_maps, bias_map)
    bias_blocks = 0
    if stages_bias(config):
        bias_blocks = staged_bias(bias_map, bias_batch, bias_head)
    if not shares_text(config):
        gl.warp_specialize([
            (lone_consumer, (config, 0, shared, score, call, o_maps, lse_ptr)),
            (lone_consumer, (config, 1, shared, score, call, o_maps, lse_ptr)),
            (producer, (config, q_maps, k_maps, v_maps, bias_blocks, shared, modifiers, call)),
        ], [4, 1], [config.consumer_registers, config.producer_registers])  # fmt: skip
    elif config.consumers == 2:
        gl.warp_specialize([
            (share_text, ()),
            (consumer, (config, shared, score, call, o_maps, lse_ptr)),
            (producer, (config, q_maps, k_maps, v_maps, bias_blocks, shared, modifiers, call)),
        ], [4, 1], [config.consumer_registers, config.producer_registers])  # fmt: skip
    else:
        gl.warp_specialize([
            (share_text, ()),
            (consumer, (config, shared, score, call, o_maps, lse_ptr)),
            (share_text, ()),
            (producer, (config, q_maps, k_maps, v_maps, bias_blocks, shared, modifiers, call)),
        ], [4, 4, 1], [config.consumer_registers, config.consumer_registers, config.producer_registers])  # fmt: skip
