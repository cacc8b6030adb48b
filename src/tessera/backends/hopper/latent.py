"""MLA's absorbed form (DeepSeek-V2, arXiv 2405.04434): all query heads over one latent row a key, the values its first columns.

One program does 64 query rows (packed_rows.py). A tile of 64 keys x 576 columns is loaded once and read three times:

    producer   Q, then the tiles of keys, last to first, in two rings: the latent's right half in one of its own
    left       S = Q K^T over all columns; m, l and P from S; P and the rows' factors into shared memory;
               O_left += P V_left, with P from registers
    right      O_right += P V_right, with P from shared memory

An accumulator of 64 x 512 is too wide for one warpgroup: each holds half. While `left` takes the exponentials of one tile,
`right` still multiplies with the last one's. Where nothing but the tensor cores bounds it, `left` takes two tiles at a time, and
they never wait for a softmax (Turns.PAIRS). Or two programs, 64 heads each, load the rows once for both (pieces/cluster.py).
"""

from tessera.backends.hopper.chunk import finish_rows
from tessera.backends.hopper.chunk_config import Turns
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
from tessera.backends.hopper.pieces.channel import NAMED_BARRIER_K, NAMED_BARRIER_V, Ring, Stream, make_paired_stream, make_slots
from tessera.backends.hopper.pieces.cluster import make_peers, size_of
from tessera.backends.hopper.pieces.gradients import meet
from tessera.backends.hopper.pieces.masking import has_lower_bound, mask_scores, row_bounds
from tessera.backends.hopper.pieces.modifiers import no_modifiers
from tessera.backends.hopper.pieces.packed_rows import (
    CacheCall,
    Outcome,
    Reach,
    ask_for_places,
    is_part,
    kinds_of_blocks,
    locate_cache_tile,
    store_lse,
    store_out,
    unit_of,
)
from tessera.backends.hopper.pieces.scores import Score
from tessera.backends.hopper.pieces.softmax import (
    add_to_sums,
    exponentials,
    move_reference,
    partial_sums,
    rescale,
    tanh,
    to_16_bit,
)
from tessera.backends.hopper.pieces.tiles import M, accumulator_layout, fresh_zero, has, operand_layout, row_layout
from tessera.jit.compat import (
    aggregate,
    fence_async_shared,
    gl,
    gluon,
    let_next_begin,
    meet_cluster,
    wait_for_previous,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Hardware's named barriers that channel.py leaves free: no consumer here takes turns.
P_READY = gl.constexpr(7)
"""P and the rows' factors lie in shared memory."""
P_FREE = gl.constexpr(8)
"""`right` has multiplied with P: it may be written again."""
BOTH = gl.constexpr(256)
"""Threads of `left` and `right`."""


@aggregate
class Shared:
    """Shared memory: Q and the keys in three parts each, the same as boxes; P and one factor a row, `passed` from left to
    right; the rings.

    `outer` guards the keys' parts 0 and 2, `right` part 1: each is given back by the one warpgroup that reads it last.
    """

    q: gl.tuple
    k: gl.tuple
    boxes: gl.tuple
    passed: gl.tuple
    q_ring: Ring
    outer: Stream
    right: Stream


@aggregate
class Role:
    """What both consumers know."""

    config: gl.constexpr
    shared: Shared
    score: Score
    call: CacheCall


# ----------------------------------------------------------------------------------------------------------- producer


@gluon.jit
def _load_q(config: gl.constexpr, tiles, shared, call, tile):
    parts: gl.constexpr = config.parts
    position, head = unit_of(config, tile, 0)
    head += tile.head * call.group
    where = (tile.seq.batch, position, head)
    if has(config, "varlen"):
        where = (tile.seq.batch * 0, tile.seq.q_begin + position, head)
    load_queries(tiles, shared.boxes[0], 0, shared.q_ring.expect(0, parts.row_bytes * M), where, parts)


@gluon.jit
def producer(config: gl.constexpr, maps, shared, call, pages, rows):
    outer: gl.constexpr = config.outer
    right_half: gl.constexpr = config.right
    width: gl.constexpr = config.widths[0]
    _, k_boxes = shared.boxes
    ask_for_places(config, pages, call)
    wait_for_previous()
    let_next_begin()  # the next kernel's programs take their places as these leave theirs
    tile = locate_cache_tile(config, call)
    if tile.begin < tile.end:
        _load_q(config, maps[0], shared, call, tile)
        source = cache_source(config, rows, pages, call.cache, tile.seq, tile.head)
        row = (tile.end - 1) * config.keys
        found = find_pages(config, source, row)
        for n in range(tile.end - tile.begin):
            after = find_pages(config, source, row - config.keys)
            turn = (n, row, find_rows(config, source, found))
            load_keys(config, shared.outer, maps[1], source, (k_boxes[0], k_boxes[2]), turn, outer, width)
            load_keys(config, shared.right, maps[1], source, (k_boxes[1],), turn, right_half, width)
            row -= config.keys
            found = after


# --------------------------------------------------------------------------------------------------------------- left


@gluon.jit
def _issue_scores(me, n, slot):
    """Start S = Q K^T of the n-th tile, (64, keys) float32; the right half last, because it comes last."""
    keys: gl.constexpr = me.config.keys
    shared = me.shared
    shared.outer.wait(n)
    only = fresh_zero()
    s = gl.zeros([M, keys], gl.float32, accumulator_layout(keys))
    s = warpgroup_mma(shared.q[0].index(only), shared.k[0].index(slot).permute((1, 0)), s, use_acc=False, is_async=True)
    s = warpgroup_mma(shared.q[2].index(only), shared.k[2].index(slot).permute((1, 0)), s, is_async=True)
    shared.right.wait(n)
    return warpgroup_mma(shared.q[1].index(only), shared.k[1].index(slot).permute((1, 0)), s, is_async=True)


@gluon.jit
def _pass_on(shared, n, p, factor):
    """Give the right warpgroup P and what its sums are multiplied by first."""
    if n > 0:
        meet("sync", P_FREE, BOTH)
    if p is not None:
        shared.passed[0].index(0).store(p)
    shared.passed[1].index(0).store(factor)
    fence_async_shared()
    meet("arrive", P_READY, BOTH)


@gluon.jit
def _softmax(me, s, m, l, bounds, first_key, CUT: gl.constexpr):
    """P in 16 bits, then m, l and the factor of what was summed about the old m."""
    if has(me.config, "softcap"):
        s = tanh(s * me.score.inner)
    if CUT is not None:
        s = mask_scores(s, bounds, first_key, CUT)
    m, alpha = move_reference(s, m, me.score.scale)
    p = exponentials(s, m, me.score.scale, CUT is not None)
    l = add_to_sums(l, alpha, partial_sums(p))
    return to_16_bit(p, me.shared.passed[0].dtype), m, l, alpha


@gluon.jit
def _issue_values(me, slot, p, o):
    """Start O += P V, the left half."""
    return warpgroup_mma(gl.convert_layout(p, operand_layout(o.shape[1])), me.shared.k[0].index(slot), o, is_async=True)


@gluon.jit
def _singles(me, n, last, bounds, state, count, CUT: gl.constexpr):
    """`count` tiles, one after the other: S, then m, l and P, then O += P V. The n-th tile of the program is block last - n.
    (To start the next S under O += P V costs 2 to 5%: benchmarks/LOG.md.)"""
    o, m, l = state
    for _ in range(count):
        slot = me.shared.outer.slot(n)
        s = warpgroup_mma_wait(0, deps=(_issue_scores(me, n, slot),))
        p, m, l, alpha = _softmax(me, s, m, l, bounds, (last - n) * me.config.keys, CUT)
        _pass_on(me.shared, n, p, alpha)
        o = warpgroup_mma_wait(0, deps=(_issue_values(me, slot, p, rescale(o, alpha)),))
        me.shared.outer.release(n)
        n += 1
    return (o, m, l), n


@gluon.jit
def _pairs(me, n, bounds, state, count):
    """`count` pairs of tiles that every row sees whole, the first of each in slot 0. Both S; the softmax of the first under the
    second's S, and the second's under the first's O += P V."""
    o, m, l = state
    for _ in range(count):
        s = _issue_scores(me, n, fresh_zero())
        t = _issue_scores(me, n + 1, fresh_zero() + 1)
        s = warpgroup_mma_wait(1, deps=(s,))
        p, m, l, alpha = _softmax(me, s, m, l, bounds, 0, None)
        _pass_on(me.shared, n, p, alpha)
        products = _issue_values(me, fresh_zero(), p, rescale(o, alpha))
        t = warpgroup_mma_wait(1, deps=(t,))
        p, m, l, alpha = _softmax(me, t, m, l, bounds, 0, None)
        o = warpgroup_mma_wait(0, deps=(products,))
        me.shared.outer.release(n)
        _pass_on(me.shared, n + 1, p, alpha)
        o = warpgroup_mma_wait(0, deps=(_issue_values(me, fresh_zero() + 1, p, rescale(o, alpha)),))
        me.shared.outer.release(n + 1)
        n += 2
    return (o, m, l), n


@gluon.constexpr_function
def _in_pairs(config):
    return config.turns is Turns.PAIRS


@gluon.jit
def _left_loop(me, tile, first):
    """O, m and l over all tiles of the rows from position `first` on, and how many those are."""
    config: gl.constexpr = me.config
    keys: gl.constexpr = config.keys
    half: gl.constexpr = config.parts.dims[0]
    bounds = row_bounds(config, me.call.reach, tile.seq, first, config.packing.heads)
    empty = gl.zeros([M, keys], gl.float32, accumulator_layout(keys))
    o = gl.zeros([M, half], gl.float32, accumulator_layout(half))
    state = (o, gl.max(empty, axis=1) + float("-inf"), partial_sums(empty))
    n = tile.end * 0
    last = tile.end - 1
    upper, full, lower = kinds_of_blocks(config, me.call, tile, first, tile.begin, tile.end)
    if _in_pairs(config):
        alone = gl.minimum(upper % 2, full)  # so that the pairs begin in slot 0
        state, n = _singles(me, n, last, bounds, state, upper + alone, "upper")
        state, n = _pairs(me, n, bounds, state, (full - alone) // 2)
        state, n = _singles(me, n, last, bounds, state, (full - alone) % 2, "upper")
    else:
        state, n = _singles(me, n, last, bounds, state, upper, "upper")
        state, n = _singles(me, n, last, bounds, state, full, None)
    if has_lower_bound(config):
        state, n = _singles(me, n, last, bounds, state, lower, "lower")
    o, m, l = state
    return o, m, l, n


@gluon.jit
def left(me, outcome):
    config: gl.constexpr = me.config
    half: gl.constexpr = config.parts.dims[0]
    wait_for_previous()
    tile = locate_cache_tile(config, me.call)
    unit = unit_of(config, tile, 0)
    if tile.begin < tile.end:
        me.shared.q_ring.wait(0)
        o, m, l, n = _left_loop(me, tile, unit[0])
        factor = finish_rows(me, tile, unit, m, l, outcome)
        _pass_on(me.shared, n, None, factor)
        store_out(config, me.call, tile, unit, outcome, o * gl.convert_layout(factor, row_layout(half))[:, None], 0)
    elif is_part(config):
        store_lse(config, me.call, tile, unit, outcome, gl.full([M], float("-inf"), gl.float32, row_layout(64)))


# -------------------------------------------------------------------------------------------------------------- right


@gluon.jit
def right(me, outcome):
    config: gl.constexpr = me.config
    half: gl.constexpr = config.parts.dims[1]
    shared = me.shared
    wait_for_previous()
    tile = locate_cache_tile(config, me.call)
    blocks = tile.end - tile.begin
    if tile.begin < tile.end:
        o = gl.zeros([M, half], gl.float32, accumulator_layout(half))
        for n in range(blocks):
            meet("sync", P_READY, BOTH)
            o = rescale(o, shared.passed[1].index(0).load(row_layout(half)))
            shared.right.wait(n)
            o = warpgroup_mma(shared.passed[0].index(fresh_zero()), shared.k[1].index(shared.right.slot(n)), o, is_async=True)
            o = warpgroup_mma_wait(0, deps=(o,))
            meet("arrive", P_FREE, BOTH)
            shared.right.release(n)
        meet("sync", P_READY, BOTH)
        out = o * shared.passed[1].index(0).load(row_layout(half))[:, None]
        store_out(config, me.call, tile, unit_of(config, tile, 0), outcome, out, config.parts.columns[1])


# ------------------------------------------------------------------------------------------------------------- kernel


@gluon.constexpr_function
def _p_layout(dtype, keys):
    return gl.NVMMASharedLayout.get_default_for([M.value, keys], dtype)


@gluon.jit
def _allocate(config: gl.constexpr, maps):
    parts: gl.constexpr = config.parts
    dtype: gl.constexpr = maps[0].dtype
    q, q_boxes = allocate_parts(dtype, 1, M, parts, query_box(config))
    k, k_boxes = allocate_parts(dtype, config.stages, config.keys, parts, key_box(config))
    p = gl.allocate_shared_memory(dtype, [1, M, config.keys], _p_layout(dtype, config.keys))
    factors = gl.allocate_shared_memory(gl.float32, [1, M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_ring = make_slots(1)
    outer_peer, right_peer = make_peers(config)
    outer = make_paired_stream(config.stages, 1, NAMED_BARRIER_K, producer_warps(config), outer_peer)
    right = make_paired_stream(config.stages, 1, NAMED_BARRIER_V, producer_warps(config), right_peer)
    fence_async_shared()
    if size_of(config) > 1:
        meet_cluster()
    return Shared(q, k, (q_boxes, k_boxes), (p, factors), q_ring, outer, right)


@gluon.jit
def attention_latent(
    q_map, k_map,
    k_ptr, out_ptr, lse_ptr, sinks_ptr, cu_q, cache_seqlens, cache_leftpad, cache_batch_idx, page_table,
    batch, heads, group, seqlen_q, splits, lines, left_reach, right_reach, capacity, appended,
    table_stride, pages_per_sequence, page_count, page_size,
    k_page, k_row, k_head, k_pitch, scale, inner,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """As attention_chunk, without a tensor of values."""
    config: gl.constexpr = CONFIG
    cache = Cache(cache_seqlens, cache_leftpad, cache_batch_idx, capacity, appended)
    pages = Pages(page_table, table_stride, pages_per_sequence, page_count, page_size)
    call = CacheCall(batch, heads, group, seqlen_q, cu_q, splits, Reach(left_reach, right_reach), cache)
    score = Score(scale, inner, sinks_ptr, no_modifiers())
    outcome = Outcome(out_ptr, lse_ptr, lines)
    shared = _allocate(config, (q_map, k_map))
    role = Role(config, shared, score, call)
    gl.warp_specialize([
        (left, (role, outcome)),
        (right, (role, outcome)),
        (producer, (config, (q_map, k_map), shared, call, pages, Rows(k_ptr, k_page, k_row, k_head, k_pitch))),
    ], [4, producer_warps(config)], [config.consumer_registers, config.producer_registers])  # fmt: skip
