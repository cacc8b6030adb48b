"""Attention of many query rows over a KV cache, contiguous or in pages: chunks of a prompt, speculative decoding, large groups.

The loop is the forward's own (pieces/blocks.py): a producer warp, and consumer warpgroups of 64 rows with the online softmax of
one block under the products of another. What differs is what it runs over. Rows are packed, all query heads of a key/value head
times a few positions (pieces/packed_rows.py), so that a tile of keys is loaded once for the whole group; keys come from the
cache, box by box where it has pages (pieces/cache_rows.py); and a tile's keys may be split over several programs, whose float32
parts combine.py puts together (Flash-Decoding), or two programs by themselves (pieces/joining.py). Two tiles over the same keys
may load them once for both (pieces/cluster.py).

One program does one tile: the grid is fixed by shapes, lengths are read on the device.
"""

from tessera.backends.hopper.pieces.blocks import issue_values, run_blocks, start_blocks, wait_for_values
from tessera.backends.hopper.pieces.cache_rows import (
    Cache,
    Pages,
    Rows,
    allocate_parts,
    cache_source,
    find_pages,
    find_rows,
    key_box,
    load_keys,
    load_queries,
    producer_warps,
    query_box,
)
from tessera.backends.hopper.pieces.channel import (
    NAMED_BARRIER_K,
    NAMED_BARRIER_V,
    Ring,
    Stream,
    make_paired_stream,
    make_slots,
    pass_turn,
)
from tessera.backends.hopper.pieces.cluster import make_peers, size_of
from tessera.backends.hopper.pieces.epilogue import LOG2_E, normaliser
from tessera.backends.hopper.pieces.joining import join, make_meeting, store_rows
from tessera.backends.hopper.pieces.masking import has_lower_bound, row_bounds
from tessera.backends.hopper.pieces.modifiers import no_modifiers
from tessera.backends.hopper.pieces.packed_rows import (
    CacheCall,
    Outcome,
    Reach,
    ask_for_places,
    is_joined,
    is_part,
    kinds_of_blocks,
    locate_cache_tile,
    row_places,
    store_lse,
    unit_of,
)
from tessera.backends.hopper.pieces.scores import Score
from tessera.backends.hopper.pieces.softmax import reference_of_rows
from tessera.backends.hopper.pieces.tiles import M, has, overlaps, query_tiles, row_layout
from tessera.jit.compat import aggregate, fence_async_shared, gl, gluon, let_next_begin, meet_cluster, wait_for_previous


@aggregate
class Shared:
    """Shared memory: tiles as one buffer a part of the head dim, the same as boxes, and the rings that guard them."""

    q: gl.tuple
    k: gl.tuple
    v: gl.tuple
    boxes: gl.tuple
    q_ring: Ring
    k_stream: Stream
    v_stream: Stream


# ----------------------------------------------------------------------------------------------------------- producer


@gluon.jit
def _load_q(config: gl.constexpr, tiles, shared, call, tile):
    parts: gl.constexpr = config.parts
    consumers: gl.constexpr = config.consumers
    first = tile.head * call.group
    for consumer in gl.static_range(consumers):
        position, head = unit_of(config, tile, consumer)
        bar = shared.q_ring.expect(consumer, parts.row_bytes * M)
        where = (tile.seq.batch, position, first + head)
        if has(config, "varlen"):
            where = (tile.seq.batch * 0, tile.seq.q_begin + position, first + head)
        load_queries(tiles, shared.boxes[0], consumer, bar, where, parts)


@gluon.jit
def producer(config: gl.constexpr, maps, shared, call, pages, k_rows, v_rows):
    parts: gl.constexpr = config.parts
    parts_v: gl.constexpr = config.parts_v
    width: gl.constexpr = config.widths[0]
    width_v: gl.constexpr = config.widths[1]
    q_map, k_map, v_map = maps
    _, k_boxes, v_boxes = shared.boxes
    ask_for_places(config, pages, call)
    wait_for_previous()
    let_next_begin()  # the next kernel's programs take their places as these leave theirs
    tile = locate_cache_tile(config, call)
    if tile.begin < tile.end:
        keys = cache_source(config, k_rows, pages, call.cache, tile.seq, tile.head)
        values = cache_source(config, v_rows, pages, call.cache, tile.seq, tile.head)
        row = (tile.end - 1) * config.keys
        found = find_pages(config, keys, row)
        turn = (tile.end * 0, row, find_rows(config, keys, found))
        load_keys(config, shared.k_stream, k_map, keys, k_boxes, turn, parts, width)
        _load_q(config, q_map, shared, call, tile)
        below = find_pages(config, keys, row - config.keys)
        for n in range(tile.end - 1 - tile.begin):
            next_below = find_pages(config, keys, row - 2 * config.keys)
            turn = (n + 1, row - config.keys, find_rows(config, keys, below))
            load_keys(config, shared.k_stream, k_map, keys, k_boxes, turn, parts, width)
            turn = (n, row, find_rows(config, values, found))
            load_keys(config, shared.v_stream, v_map, values, v_boxes, turn, parts_v, width_v)
            row -= config.keys
            found = below
            below = next_below
        turn = (tile.end - 1 - tile.begin, row, find_rows(config, values, found))
        load_keys(config, shared.v_stream, v_map, values, v_boxes, turn, parts_v, width_v)


# ----------------------------------------------------------------------------------------------------------- consumer


@aggregate
class Consumer:
    """One consumer warpgroup: rows 64 `index` and on of the tile."""

    config: gl.constexpr
    index: gl.constexpr
    shared: Shared
    score: Score
    call: CacheCall


@gluon.jit
def _main_loop(me, tile, position):
    """All blocks of the tile's keys, last to first, but for the last P V where that overlaps; the state, and how many."""
    config: gl.constexpr = me.config
    bounds = row_bounds(config, me.call.reach, tile.seq, position, config.packing.heads)
    q = query_tiles(me.shared.q, me.index, config.keys, 0)
    state, n = start_blocks(me, tile.end * 0, q, bounds, (tile.end - 1) * config.keys)
    block = tile.end - 1 - n
    upper, full, lower = kinds_of_blocks(config, me.call, tile, position, tile.begin, block + 1)
    n += tile.end * 0
    state, n = run_blocks(me, n, q, bounds, block, state, upper, "upper")
    state, n = run_blocks(me, n, q, bounds, block - upper, state, full, None)
    if has_lower_bound(config):
        state, n = run_blocks(me, n, q, bounds, block - upper - full, state, lower, "lower")
    return state, n


@gluon.jit
def _normaliser(me, tile, unit, m, l):
    """The factor that makes O out, and the log-sum-exp. A part leaves the sinks to combine.py."""
    config: gl.constexpr = me.config
    layout: gl.constexpr = row_layout(64)
    position, head, exists = row_places(config, me.call, tile, unit, layout)
    m = gl.convert_layout(reference_of_rows(m, l), layout)
    l = gl.convert_layout(gl.sum(l, axis=1), layout)
    sink = m * 0.0
    if has(config, "sinks"):
        sink = gl.load(me.score.sinks + head, mask=exists, other=0.0) * LOG2_E
    return normaliser(config, m, l, sink, position < tile.seq.q_live)


@gluon.jit
def finish_rows(me, tile, unit, m, l, outcome):
    """Write the log-sum-exp; the factor that makes O out."""
    factor, lse = _normaliser(me, tile, unit, m, l)
    store_lse(me.config, me.call, tile, unit, outcome, lse)
    return factor


@gluon.jit
def consumer(me, outcome, meeting):
    config: gl.constexpr = me.config
    shared = me.shared
    wait_for_previous()
    tile = locate_cache_tile(config, me.call)
    unit = unit_of(config, tile, me.index)
    if tile.begin < tile.end:
        if overlaps(config) and me.index == config.consumers - 1:
            pass_turn(me.index, config.consumers)  # the first turn is consumer 0's
        shared.q_ring.wait(me.index)
        state, n = _main_loop(me, tile, unit[0])
        if overlaps(config):
            o, p, m, l = state
            shared.v_stream.wait(n - 1)
            o = issue_values(me, n - 1, p, o)
        else:
            o, m, l = state
        factor, lse = _normaliser(me, tile, unit, m, l)
        if not is_joined(config):
            store_lse(config, me.call, tile, unit, outcome, lse)
        if overlaps(config):
            o = wait_for_values(o)
        if is_joined(config):
            join(me, tile, unit, o, factor, lse, meeting[0], outcome)
        else:
            store_rows(me, tile, unit, o, factor, outcome)
    elif is_part(config):
        store_lse(config, me.call, tile, unit, outcome, gl.full([M], float("-inf"), gl.float32, row_layout(64)))


# ------------------------------------------------------------------------------------------------------------- kernel


@gluon.jit
def _allocate(config: gl.constexpr, maps, given):
    parts: gl.constexpr = config.parts
    parts_v: gl.constexpr = config.parts_v
    dtype: gl.constexpr = maps[0].dtype
    box: gl.constexpr = key_box(config)
    q, q_boxes = allocate_parts(dtype, config.consumers, M, parts, query_box(config))
    k, k_boxes = allocate_parts(dtype, config.stages, config.keys, parts, box)
    v, v_boxes = allocate_parts(dtype, config.stages, config.keys, parts_v, box)
    q_ring = make_slots(config.consumers)
    k_peer, v_peer = make_peers(config)
    k_stream = make_paired_stream(config.stages, config.consumers, NAMED_BARRIER_K, producer_warps(config), k_peer)
    v_stream = make_paired_stream(config.stages, config.consumers, NAMED_BARRIER_V, producer_warps(config), v_peer)
    meeting = make_meeting(config, given)
    fence_async_shared()
    if size_of(config) > 1:
        meet_cluster()
    return Shared(q, k, v, (q_boxes, k_boxes, v_boxes), q_ring, k_stream, v_stream), meeting


@gluon.jit
def attention_chunk(
    q_map, k_map, v_map,
    k_ptr, v_ptr, out_ptr, lse_ptr, given_out_ptr, given_lse_ptr, sinks_ptr,
    cu_q, cache_seqlens, cache_leftpad, cache_batch_idx, page_table,
    batch, heads, group, seqlen_q, splits, lines, left_reach, right_reach, capacity, appended,
    table_stride, pages_per_sequence, page_count, page_size,
    k_page, k_row, k_head, k_pitch, v_page, v_row, v_head, v_pitch, scale, inner,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """Pointers that no feature needs are never read; k_map and v_map are None under Reading.ROWS. In packed calls seqlen_q is the
    total."""
    config: gl.constexpr = CONFIG
    cache = Cache(cache_seqlens, cache_leftpad, cache_batch_idx, capacity, appended)
    pages = Pages(page_table, table_stride, pages_per_sequence, page_count, page_size)
    call = CacheCall(batch, heads, group, seqlen_q, cu_q, splits, Reach(left_reach, right_reach), cache)
    score = Score(scale, inner, sinks_ptr, no_modifiers())
    outcome = Outcome(out_ptr, lse_ptr, lines)
    k_rows = Rows(k_ptr, k_page, k_row, k_head, k_pitch)
    v_rows = Rows(v_ptr, v_page, v_row, v_head, v_pitch)
    shared, meeting = _allocate(config, (q_map, k_map, v_map), Outcome(given_out_ptr, given_lse_ptr, lines))
    gl.warp_specialize([
        (consumer, (Consumer(config, 0, shared, score, call), outcome, meeting)),
        (consumer, (Consumer(config, 1, shared, score, call), outcome, meeting)),
        (producer, (config, (q_map, k_map, v_map), shared, call, pages, k_rows, v_rows)),
    ], [4, producer_warps(config)], [config.consumer_registers, config.producer_registers])  # fmt: skip
