"""Decoding from a KV cache on Hopper: a few query rows against many keys, at the speed of memory.

Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023) and Lean Attention's schedule (arXiv 2405.10480). A program has a producer warp,
which keeps a ring of K and V tiles full by TMA, and four consumer warps, each with its own quarter of a tile's keys:

    for each segment of the program's share (pieces/shares.py)
        Q of up to 16 rows: the query heads of one key/value head, times the query positions
        for each tile of keys
            S = Q K^T,  m, l and P from S,  O = alpha O + P V      within each warp
        the four warps' O, m, l into one
        all of the item: out and log-sum-exp.  A part of it: into a slot; who comes last adds the slots up

To read it: `producer` (decode_producer.py), then `consumer`, then `_tile`.
"""

from tessera.backends.hopper.decode_config import ROWS
from tessera.backends.hopper.decode_producer import next_use, producer, producer_registers
from tessera.backends.hopper.pieces.batched import (
    add_values,
    along_columns,
    along_rows,
    along_warps,
    as_halves,
    empty_sum,
    halved,
    left_layout,
    part_offset,
    planes_of,
    right_layout,
    row_layout,
    scores,
    sums_layout,
)
from tessera.backends.hopper.pieces.cached import (
    Places,
    Sizes,
    cache_entry,
    highest_key,
    locate_keys,
    lowest_key,
)
from tessera.backends.hopper.pieces.channel import Stream, make_stream
from tessera.backends.hopper.pieces.parts import (
    Results,
    accumulators,
    columns_of_sum,
    make_exchange,
    merge_warps,
    settle,
    write_part,
    write_rows,
)
from tessera.backends.hopper.pieces.scales import CacheScales, Scales, scale_of_item, scales_of_keys
from tessera.backends.hopper.pieces.shares import after, confirmed, expected, first_turn, segment_of
from tessera.backends.hopper.pieces.softmax import exp2, tanh
from tessera.backends.hopper.pieces.tiles import allocate_tiles, has
from tessera.jit.compat import aggregate, fence_async_shared, gl, gluon, reinterpret, wait_for_previous

M = gl.constexpr(ROWS)
RING_BARRIERS = gl.constexpr(3)
"""The first named barrier of the rings: Triton takes 0, 1 and one for the producer's partition."""


@gluon.constexpr_function
def part_columns(dims, part):
    return dims[part]


@aggregate
class Split:
    """How work is shared. split: parts of a sequence, and the fewest tiles of one. stream_k, where all items are equally long:
    `rounds` of items that programs have alone, and programs that share each of the others. `depth`: stages of the ring that are
    used where programs go through memory side by side. `ahead`: tiles to bring into L2 while the kernel before ends. `team`:
    programs that take the same stretch of the line of all tiles, each for its head; `teams` share the line, go through each
    sequence `head_groups` times, and have `line_depth` stages and `line_ahead` tiles in place of the two above."""

    splits: gl.tensor
    least: gl.tensor
    crew: gl.tensor
    rounds: gl.tensor
    depth: gl.tensor
    ahead: gl.tensor
    line_ahead: gl.tensor
    team: gl.tensor
    teams: gl.tensor
    head_groups: gl.tensor
    line_depth: gl.tensor


@aggregate
class Call:
    """What one launch is asked: where sequences stand, how large things are, how the work is shared, an FP8 cache's scales."""

    places: Places
    sizes: Sizes
    split: Split
    scales: CacheScales


@aggregate
class Queries:
    """Q, read by pointers: its strides; what turns a score into log2 units (with a softcap c, c log2(e) after tanh(inner .))."""

    pointer: gl.tensor
    batch_stride: gl.tensor
    row_stride: gl.tensor
    head_stride: gl.tensor
    head_dim: gl.tensor
    scale: gl.tensor
    inner: gl.tensor


@aggregate
class Shared:
    """The ring: K and V as one buffer a part of the head dim, each (stages x boxes, ...) as TMA fills it."""

    k: gl.tuple
    v: gl.tuple
    k_stream: Stream
    v_stream: Stream


# ----------------------------------------------------------------------------------------------------------- consumer


@aggregate
class Bounds:
    """What a segment's rows see: `lo`, `hi` (1, 16, 1) a row; of all of them together `first` .. `last`."""

    lo: gl.tensor
    hi: gl.tensor
    first: gl.tensor
    last: gl.tensor


@aggregate
class Item:
    """What the tiles of one item need to know of it: sequence, cache entry, head; and the factors of its scores (Queries)."""

    call: Call
    index: gl.tensor
    entry: gl.tensor
    head: gl.tensor
    scale: gl.tensor
    inner: gl.tensor


@gluon.jit
def _item(config: gl.constexpr, call, queries, segment, q):
    index = segment.seq.index
    entry = index
    if has(config, "block_scales"):
        entry = cache_entry(config, call.places, index)
    factor = scale_of_item(config, call.scales.k, index, segment.head, "k_scales")
    if len(q) > len(config.dims) * planes_of(config):
        factor = factor * q[len(q) - 1]
    if has(config, "softcap"):
        return Item(call, index, entry, segment.head, queries.scale, queries.inner * factor)
    else:
        return Item(call, index, entry, segment.head, queries.scale * factor, queries.inner)


@gluon.constexpr_function
def has_lower_bound(config):
    return has(config, "left") or has(config, "leftpad")


@gluon.jit
def _load_queries(config: gl.constexpr, queries, call, segment):
    """Q of a segment as operands, one a part and plane, each (warps, 16, columns): every warp has all of it. Then, where they had
    to be scaled (batched.halved), the rows' factors."""
    layout: gl.constexpr = left_layout(config.warps)
    planes: gl.constexpr = planes_of(config)
    rows = segment.block * M + along_rows(M, layout)
    position = rows // call.sizes.group
    head = segment.head * call.sizes.group + rows - position * call.sizes.group
    live = position < segment.seq.q_rows
    start = segment.seq.index.to(gl.int64) * queries.batch_stride
    at = start + (segment.seq.q_begin + position) * queries.row_stride + head * queries.head_stride
    at = at + along_warps(config.warps, layout) * 0
    operands = ()
    for part in gl.static_range(len(config.dims)):
        for plane in gl.static_range(planes):
            operands = operands + (_load_operand(config, queries, at, live, part, plane),)
    if as_halves(config) and queries.pointer.dtype.element_ty == gl.bfloat16:
        rows, factors = halved(operands, config.warps)
        operands = rows + (factors,)
    return operands


@gluon.jit
def _load_operand(config: gl.constexpr, queries, at, live, part: gl.constexpr, plane: gl.constexpr):
    """The columns of one part and plane of the rows `at`."""
    columns: gl.constexpr = part_columns(config.dims, part)
    first: gl.constexpr = part_offset(config.dims, part) * planes_of(config) + plane
    column = first + planes_of(config) * along_columns(columns, left_layout(config.warps))
    keep = live & (column < queries.head_dim) & (at >= at)
    return gl.load(queries.pointer + at + column, mask=keep, other=0.0)


@gluon.jit
def _bounds(config: gl.constexpr, call, segment):
    rows = segment.block * M + along_rows(M, sums_layout(config.warps))
    seq = segment.seq
    position = gl.minimum(rows // call.sizes.group, seq.q_rows - 1)
    first = gl.minimum(segment.block * M // call.sizes.group, seq.q_rows - 1)
    last = gl.minimum((segment.block * M + (M - 1)) // call.sizes.group, seq.q_rows - 1)
    lo = lowest_key(config, call.sizes, seq, position)
    hi = highest_key(config, call.sizes, seq, position)
    return Bounds(lo, hi, lowest_key(config, call.sizes, seq, first), highest_key(config, call.sizes, seq, last))


@gluon.jit
def _full_tiles(config: gl.constexpr, call, segment):
    """Tiles [begin, end) of a segment that every row sees whole."""
    seq = segment.seq
    first = gl.minimum(segment.block * M // call.sizes.group, seq.q_rows - 1)
    last = gl.minimum((segment.block * M + (M - 1)) // call.sizes.group, seq.q_rows - 1)
    begin = segment.begin
    if has_lower_bound(config):
        whole = (lowest_key(config, call.sizes, seq, last) + config.keys - 1) // config.keys
        begin = gl.minimum(gl.maximum(begin, whole), segment.end)
    end = gl.maximum(highest_key(config, call.sizes, seq, first), 0) // config.keys
    return begin, gl.maximum(gl.minimum(end, segment.end), begin)


@gluon.jit
def _masked(config: gl.constexpr, s, bounds, first_key):
    """S with -inf where a row does not see the key."""
    layout: gl.constexpr = s.type.layout
    width: gl.constexpr = config.keys // config.warps
    key = first_key + along_warps(config.warps, layout) * width + along_columns(width, layout)
    keep = key < bounds.hi
    if has_lower_bound(config):
        keep = keep & (key >= bounds.lo)
    return gl.where(keep, s, float("-inf"))


@gluon.jit
def _valid_values(config: gl.constexpr, bounds, first_key):
    """(warps, keys a warp, 1): rows of V that some query row sees."""
    layout: gl.constexpr = right_layout(config.warps)
    width: gl.constexpr = config.keys // config.warps
    key = first_key + along_warps(config.warps, layout) * width + along_rows(width, layout)
    return (key < bounds.last) & (key >= bounds.first)


@gluon.jit
def _own_scales(config: gl.constexpr, item, bounds, first_key):
    """The scales of a tile's keys in K and in V, each (warps, 1, keys a warp)."""
    call = item.call
    layout: gl.constexpr = sums_layout(config.warps)
    width: gl.constexpr = config.keys // config.warps
    key = first_key + along_warps(config.warps, layout) * width + along_columns(width, layout)
    live = (key < bounds.last) & (key >= bounds.first)
    place = locate_keys(config, call.places, call.sizes, item, key, live)
    k_scales = scales_of_keys(config, call.scales.k, place, item.head, live, "k_scales")
    return k_scales, scales_of_keys(config, call.scales.v, place, item.head, live, "v_scales")


@gluon.jit
def _tile(config: gl.constexpr, tiles, item, q, bounds, spot, state, MASKED: gl.constexpr):
    """One tile of keys. `tiles`: the rings and their buffers as (keys, columns); `spot`: use of the ring, first key."""
    k, v, k_stream, v_stream = tiles
    n, first_key = spot
    o, m, l = state
    if has(config, "block_scales"):  # asked for before K is waited for
        k_scales, v_scales = _own_scales(config, item, bounds, first_key)
    k_stream.wait(n)
    s = scores(config, q, k, k_stream, n)
    if has(config, "block_scales"):
        s = s * k_scales
    if has(config, "softcap"):
        s = tanh(s * item.inner)
    s = s * item.scale
    if MASKED:
        s = _masked(config, s, bounds, first_key)
    top = gl.maximum(m, gl.max(s, axis=2))
    shift = top
    if MASKED:
        shift = gl.where(top == float("-inf"), 0.0, top)
    alpha = gl.expand_dims(exp2(m - shift), 2)
    p = exp2(s - gl.expand_dims(shift, 2))
    l = l * alpha + p
    scaled = ()
    for i in gl.static_range(len(o)):
        scaled = scaled + (o[i] * alpha,)
    if has(config, "block_scales"):
        p = p * v_scales
    operand = gl.convert_layout(p.to(q[0].dtype), left_layout(config.warps))
    keep = None
    if MASKED:
        keep = _valid_values(config, bounds, first_key)
    v_stream.wait(n)
    o = add_values(config, operand, v, v_stream, n, scaled, keep)
    if not has(config, "early"):
        v_stream.release(n)
    return o, top, l


@gluon.jit
def _tiles(config: gl.constexpr, tiles, item, q, bounds, span, state, MASKED: gl.constexpr):
    """Tiles `span[1]` .. `span[2]`, the first of them the n-th use of the ring, n = `span[0]`; `span[3]` stages are used."""
    n, begin, end, depth = span
    for tile in range(begin, end):
        state = _tile(config, tiles, item, q, bounds, (n, tile * config.keys), state, MASKED)
        n = next_use(config, n, depth)
    return state, n


@gluon.jit
def _nothing(config: gl.constexpr):
    """(O, m, l) of no keys; l is a sum a thread until the end."""
    warps: gl.constexpr = config.warps
    width: gl.constexpr = config.keys // config.warps
    o = ()
    for i in gl.static_range(accumulators(config)):
        o = o + (empty_sum(config, columns_of_sum(config, i)),)
    m = gl.full([warps, M], float("-inf"), gl.float32, row_layout(warps))
    return o, m, empty_sum(config, width)


@gluon.jit
def _scaled_values(config: gl.constexpr, call, segment, sums):
    """O in V's own units."""
    if has(config, "v_scales") and not has(config, "block_scales"):
        o, m, l = sums
        factor = scale_of_item(config, call.scales.v, segment.seq.index, segment.head, "v_scales")
        scaled = ()
        for i in gl.static_range(len(o)):
            scaled = scaled + (o[i] * factor,)
        return scaled, m, l
    else:
        return sums


@gluon.jit
def _finish(config: gl.constexpr, results, exchange, call, segment, state):
    """Results of a segment: of the whole item, or its part of them."""
    o, m, l = state
    sums = _scaled_values(config, call, segment, merge_warps(config, exchange, o, m, gl.sum(l, axis=2)))
    layout: gl.constexpr = sums[1].type.layout
    rows = gl.arange(0, max(config.rows, M // 2), layout)
    if segment.parts == 1:
        write_rows(config, results, call.sizes, segment, segment.block * M + rows, sums)
    else:
        write_part(config, results, call.sizes, segment, rows, sums)


@gluon.jit
def _settle_parts(config: gl.constexpr, results, call, first, last):
    """A share's first and last item can have parts of other programs. Only now, at its end, is there time to wait for them."""
    if has(config, "stream_k"):
        for turn in range(2):
            segment = first
            if turn == 1:
                segment = last
            if (segment.parts > 1) & ((turn == 0) | (segment.item != first.item)):
                settle(config, results, call.sizes, segment)
    else:
        if first.parts > 1:
            settle(config, results, call.sizes, first)


@gluon.constexpr_function
def _reads_queries_early(config):
    """Whether Q is asked for together with the lengths: which rows it is does not depend on them, but where sequences are packed,
    or prove to differ. Wider head dims would spill in the main loop."""
    return not has(config, "packed") and len(config.dims) <= 2


@gluon.jit
def _begin(config: gl.constexpr, queries, call, turn, expectation):
    """The share, its first segment, and that one's Q."""
    if _reads_queries_early(config):
        q = _load_queries(config, queries, call, expectation[1])
        share, segment = confirmed(config, call, turn, expectation, config.warps)
        if has(config, "stream_k"):
            differ = share.turn < 0
            if differ:
                q = _load_queries(config, queries, call, segment)
    else:
        share, segment = confirmed(config, call, turn, expectation, config.warps)
        q = _load_queries(config, queries, call, segment)
    return share, segment, q


@gluon.jit
def consumer(config: gl.constexpr, shared, exchange, call, queries, results):
    turn = first_turn(config, call)
    expectation = expected(config, call, turn)
    wait_for_previous()
    n = 0
    tiles = (_as_tiles(config, shared.k), _as_tiles(config, shared.v), shared.k_stream, shared.v_stream)
    share, segment, q = _begin(config, queries, call, turn, expectation)
    works = share.position < share.stop
    first = segment
    while share.position < share.stop:
        bounds = _bounds(config, call, segment)
        item = _item(config, call, queries, segment, q)
        begin, end = _full_tiles(config, call, segment)
        state = _nothing(config)
        if has_lower_bound(config):
            state, n = _tiles(config, tiles, item, q, bounds, (n, segment.begin, begin, share.depth), state, True)
        state, n = _tiles(config, tiles, item, q, bounds, (n, begin, end, share.depth), state, False)
        state, n = _tiles(config, tiles, item, q, bounds, (n, end, segment.end, share.depth), state, True)
        done = segment
        share = after(config, call, share, segment)
        if has(config, "stream_k"):
            more = share.position < share.stop
            if more:  # the next item's Q comes while this one's results are written
                segment = segment_of(config, call, share)
                q = _load_queries(config, queries, call, segment)
        _finish(config, results, exchange, call, done, state)
    if works:  # the segment is still the last one
        _settle_parts(config, results, call, first, segment)


# ------------------------------------------------------------------------------------------------------------- kernel


@gluon.constexpr_function
def _tile_layout(columns):
    return gl.NVMMASharedLayout.get_default_for([8, columns], gl.bfloat16)


@gluon.jit
def _allocate(config: gl.constexpr, maps):
    """The ring's buffers as TMA fills them, box by box."""
    boxes: gl.constexpr = config.stages * (config.keys // config.box)
    buffers = ()
    for part in gl.static_range(len(maps)):
        buffers = buffers + (allocate_tiles(maps[part], boxes),)
    return buffers


@gluon.jit
def _whole_tiles(config: gl.constexpr, buffer):
    columns: gl.constexpr = buffer.shape[-1]
    return reinterpret(buffer, buffer.dtype, [config.stages, config.keys, columns], _tile_layout(columns))


@gluon.jit
def _as_tiles(config: gl.constexpr, buffers):
    """The same buffers as (stages, keys, columns): boxes of a tile follow one another, and each is whole swizzle patterns."""
    views = ()
    for part in gl.static_range(len(buffers)):
        views = views + (_whole_tiles(config, buffers[part]),)
    return views


@gluon.jit
def _maps(whole, tail, parts: gl.constexpr):
    """One tensor map a part of a head dim: only the last can be narrower."""
    maps = ()
    for part in gl.static_range(parts):
        if tail is not None and part == parts - 1:
            maps = maps + (tail,)
        else:
            maps = maps + (whole,)
    return maps


@gluon.jit
def decode(
    k_map, k_tail, v_map, v_tail, q_ptr, out_ptr, lse_ptr, partial_out, partial_lse, sinks, tickets,
    seqlens, cu_q, leftpad, batch_index, page_table,
    batch, heads_kv, group, seqlen_q, added, capacity, row_blocks, slot_rows, slots, left, right, table_stride, page_shift,
    tickets_per_item, entries, splits, least, crew, rounds, depth, ahead, line_ahead, team, teams, head_groups, line_depth,
    q_batch, q_row, q_head, head_dim, head_dim_v, scale, inner, k_scales, v_scales,
    k_scale_sequence, k_scale_entry, k_scale_block, k_scale_rows, v_scale_sequence, v_scale_entry, v_scale_block, v_scale_rows,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """`*_tail`: the map of a narrower last part of a head dim, else None. Pointers that no feature needs are never read."""
    config: gl.constexpr = CONFIG
    groups: gl.constexpr = config.warps // 4
    k_maps = _maps(k_map, k_tail, len(config.dims))
    v_maps = _maps(v_map, v_tail, len(config.dims_v))
    call = Call(
        Places(seqlens, cu_q, leftpad, batch_index, page_table),
        Sizes(
            batch, heads_kv, group, seqlen_q, added, capacity, row_blocks, slot_rows, slots, left, right, table_stride,
            page_shift, tickets_per_item, entries,
        ),
        Split(splits, least, crew, rounds, depth, ahead, line_ahead, team, teams, head_groups, line_depth),
        CacheScales(
            Scales(k_scales, k_scale_sequence, k_scale_entry, k_scale_block, k_scale_rows),
            Scales(v_scales, v_scale_sequence, v_scale_entry, v_scale_block, v_scale_rows),
        ),
    )  # fmt: skip
    queries = Queries(q_ptr, q_batch, q_row, q_head, head_dim, scale, inner)
    results = Results(out_ptr, lse_ptr, partial_out, partial_lse, tickets, sinks, head_dim_v, seqlen_q)
    shared = Shared(
        _allocate(config, k_maps), _allocate(config, v_maps),
        make_stream(config.stages, groups, RING_BARRIERS + config.stages), make_stream(config.stages, groups, RING_BARRIERS),
    )  # fmt: skip
    fence_async_shared()
    gl.warp_specialize([
        (consumer, (config, shared, make_exchange(config), call, queries, results)),
        (producer, (config, k_maps, v_maps, shared, call)),
    ], [1], [producer_registers(config)])  # fmt: skip
