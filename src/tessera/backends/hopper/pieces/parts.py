"""Partial results of a split sequence, and their sum: the formula of tessera.partial, over any number of parts.

A part leaves out, normalised by its own softmax, float32 (rows, slots, columns), and its log-sum-exp in base 2, (rows, slots).
With w = 2^(lse - max lse), out = sum(w out) / sum(w). Parts are taken in their order, whoever adds them, so that the result
is the same bit for bit. More than 2 FAN parts are added in two steps, groups of FAN first.
"""

from tessera.backends.hopper.decode_config import PARTS_TOGETHER, ROWS
from tessera.backends.hopper.pieces.batched import part_offset, planes_of
from tessera.backends.hopper.pieces.epilogue import LOG2_E, log2, normaliser
from tessera.backends.hopper.pieces.shares import slot_of
from tessera.backends.hopper.pieces.softmax import exp2
from tessera.backends.hopper.pieces.tiles import has
from tessera.jit.compat import aggregate, barrier, gl, gluon

M = gl.constexpr(ROWS)
FAN = gl.constexpr(PARTS_TOGETHER)


@aggregate
class Results:
    """Where results go: out (tokens, heads_q, head_dim_v), lse (batch, heads_q, seqlen_q) or (heads_q, total_q), the slots of
    partial results, the items' tickets (0 between launches); and the sinks, (heads_q,)."""

    out: gl.tensor
    lse: gl.tensor
    partial_out: gl.tensor
    partial_lse: gl.tensor
    tickets: gl.tensor
    sinks: gl.tensor
    head_dim_v: gl.tensor
    lse_pitch: gl.tensor


@aggregate
class Span:
    """Parts begin, begin + STEP, ... before `end`."""

    begin: gl.tensor
    end: gl.tensor


@gluon.constexpr_function
def columns_of_sum(config, i):
    """Columns of the i-th accumulator: one a part and plane."""
    return config.dims_v[i // planes_of(config)]


@gluon.constexpr_function
def accumulators(config):
    return len(config.dims_v) * planes_of(config)


@gluon.constexpr_function
def merged_layout(warps, columns):
    """(warps, 16, columns) with all warps' values of a row and column in one thread."""
    lanes = min(32, columns)
    return gl.BlockedLayout([warps, 1, columns // lanes], [1, 32 // lanes, lanes], [1, warps, 1], [2, 1, 0])


@gluon.jit
def _live_rows(config: gl.constexpr, x):
    """(warps, 16, ..) without the upper half where no item of this kernel has its rows: a thread has one of each half."""
    half: gl.constexpr = M // 2
    if config.rows > half:
        return x
    elif len(x.shape) == 2:
        return gl.split(gl.permute(gl.reshape(x, [config.warps, 2, half]), (0, 2, 1)))[0]
    else:
        return gl.split(gl.permute(gl.reshape(x, [config.warps, 2, half, x.shape[2]]), (0, 2, 3, 1)))[0]


@gluon.constexpr_function
def _rows_kept(config):
    """Rows of a warp's results that are looked at: see `_live_rows`."""
    return ROWS // 2 if config.rows <= ROWS // 2 else ROWS


@gluon.constexpr_function
def _fits(config):
    """Whether all that the warps found fits into shared memory at once, beside the ring."""
    return accumulators(config) * _rows_kept(config) <= ROWS and len(set(config.dims_v)) == 1


@gluon.jit
def make_exchange(config: gl.constexpr):
    """Shared memory where the warps' m, l and O meet, a buffer each, so that one barrier is enough; none where they don't fit."""
    buffers = ()
    if _fits(config):
        shape: gl.constexpr = [1, config.warps, _rows_kept(config)]
        flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        columns: gl.constexpr = columns_of_sum(config, 0)
        wide: gl.constexpr = gl.SwizzledSharedLayout(8, 1, columns // 8, [2, 1, 0])  # eight rows' columns are in different banks
        buffers = (gl.allocate_shared_memory(gl.float32, shape, flat), gl.allocate_shared_memory(gl.float32, shape, flat))
        for i in gl.static_range(accumulators(config)):
            buffers = buffers + (gl.allocate_shared_memory(gl.float32, shape + [columns], wide),)
    return buffers


@gluon.jit
def merge_warps(config: gl.constexpr, exchange, o, m, l):
    """What the warps found, as one: (o (rows, columns) a part and plane, float32 and not normalised; m, l (rows,) in base 2)."""
    layout: gl.constexpr = merged_layout(config.warps, columns_of_sum(config, 0))
    found = (_live_rows(config, m), _live_rows(config, l))
    for i in gl.static_range(len(o)):
        found = found + (_live_rows(config, o[i]),)
    for i in gl.static_range(len(exchange)):
        exchange[i].index(0).store(found[i])
    tops = _from_warps(exchange, found, 0, gl.SliceLayout(2, layout))
    top = gl.max(tops, axis=0)
    weight = exp2(tops - gl.expand_dims(gl.where(top == float("-inf"), 0.0, top), 0))
    outs = ()
    for i in gl.static_range(len(o)):
        outs = outs + (_weighted_sum(exchange, found, 2 + i, merged_layout(config.warps, o[i].shape[2]), weight),)
    return outs, top, gl.sum(_from_warps(exchange, found, 1, gl.SliceLayout(2, layout)) * weight, axis=0)


@gluon.jit
def _weighted_sum(exchange, found, i: gl.constexpr, layout: gl.constexpr, weight):
    """The i-th of what the warps found, (warps, rows, columns), summed over the warps."""
    weight = gl.convert_layout(weight, gl.SliceLayout(2, layout))
    return gl.sum(_from_warps(exchange, found, i, layout) * gl.expand_dims(weight, 2), axis=0)


@gluon.jit
def _from_warps(exchange, found, i: gl.constexpr, layout: gl.constexpr):
    """The i-th of what the warps found, all warps' in one thread."""
    if len(exchange) > 0:
        return exchange[i].index(0).load(layout)
    else:
        return gl.convert_layout(found[i], layout)


@gluon.jit
def query_places(config: gl.constexpr, sizes, segment, rows):
    """Rows of an item as (token of q and out, query head, live): row r is head r mod group at position r / group."""
    position = rows // sizes.group
    head = segment.head * sizes.group + rows - position * sizes.group
    token = segment.seq.q_begin + position
    if not has(config, "packed"):
        token += segment.seq.index * sizes.seqlen_q
    return token, head, position < segment.seq.q_rows


@gluon.jit
def _lse_place(config: gl.constexpr, results, sizes, seq, token, head):
    heads = sizes.heads_kv * sizes.group
    if has(config, "packed"):
        return head * results.lse_pitch + token
    else:
        return (seq.index * heads + head) * sizes.seqlen_q + (token - seq.index * sizes.seqlen_q)


@gluon.jit
def write_rows(config: gl.constexpr, results, sizes, segment, rows, sums):
    """out and lse of a segment's rows (a vector) from (o, m, l), the sink counted in."""
    o, m, l = sums
    token, head, live = query_places(config, sizes, segment, rows)
    sink = m * 0.0
    if has(config, "sinks"):
        sink = gl.load(results.sinks + head, mask=live, other=0.0) * LOG2_E
    factor, lse = normaliser(config, m, l, sink, live)
    gl.store(results.lse + _lse_place(config, results, sizes, segment.seq, token, head), lse, mask=live)
    row = (token * (sizes.heads_kv * sizes.group) + head).to(gl.int64) * results.head_dim_v
    for i in gl.static_range(len(o)):
        columns, out, at, keep = _scaled(o[i], factor, row, live)
        columns = first_column(config, i) + planes_of(config) * columns
        gl.store(results.out + at + columns, out.to(results.out.dtype.element_ty), mask=keep & (columns < results.head_dim_v))


@gluon.jit
def _scaled(o, factor, row, live):
    """Column numbers, O times a row's factor, where its rows begin, and which rows count."""
    layout: gl.constexpr = o.type.layout
    columns = gl.arange(0, o.shape[1], gl.SliceLayout(0, layout))[None, :]
    out = o * gl.convert_layout(factor, gl.SliceLayout(1, layout))[:, None]
    keep = gl.convert_layout(live, gl.SliceLayout(1, layout))[:, None] & (columns >= 0)
    return columns, out, gl.convert_layout(row, gl.SliceLayout(1, layout))[:, None], keep


@gluon.constexpr_function
def first_column(config, i):
    """The first column of out that the i-th accumulator has; planes take turns."""
    planes = planes_of(config)
    return part_offset(config.dims_v, i // planes) * planes + i % planes


@gluon.constexpr_function
def place_in_slot(config, i):
    """Where the i-th accumulator begins in a row of a partial result."""
    return sum(columns_of_sum(config, before) for before in range(i))


@gluon.constexpr_function
def slot_columns(config):
    """Columns of a partial result."""
    return sum(config.dims_v) * planes_of(config)


@gluon.jit
def _write_slot(config: gl.constexpr, results, sizes, slot, rows, sums):
    """The partial result of rows `rows` of an item, in a slot."""
    o, m, l = sums
    live = rows < sizes.slot_rows
    empty = m == float("-inf")
    lse = gl.where(empty, float("-inf"), m + log2(l))
    factor = gl.where(empty, 0.0, 1.0 / l)
    line = rows * sizes.slots + slot
    gl.store(results.partial_lse + line, lse, mask=live)
    row = line.to(gl.int64) * slot_columns(config)
    for i in gl.static_range(len(o)):
        columns, out, at, keep = _scaled(o[i], factor, row, live)
        gl.store(results.partial_out + at + place_in_slot(config, i) + columns, out, mask=keep)


@gluon.jit
def _comes_last(ticket, count):
    """Whether all others of `count` have written what they had to: the one that draws the last ticket, and puts 0 back."""
    barrier()  # every warp's partial results before this program's ticket
    last = gl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        gl.store(ticket, 0)
    barrier()
    return last


@gluon.jit
def write_part(config: gl.constexpr, results, sizes, segment, rows, sums):
    """The partial result of a segment, into its slot."""
    _write_slot(config, results, sizes, slot_of(config, segment.slots, segment.part), rows, sums)


@gluon.jit
def settle(config: gl.constexpr, results, sizes, segment):
    """The segment's part of its item is in its slot. Who comes last of a group of parts adds them up into the slot of the first;
    who comes last of the groups adds those up into out and lse."""
    slot_rows = gl.minimum(segment.seq.q_rows * sizes.group - segment.block * M, sizes.slot_rows)
    few = segment.parts <= 2 * FAN
    group = gl.where(few, 0, segment.part // FAN)
    groups = gl.where(few, 1, (segment.parts + FAN - 1) // FAN)
    ticket = results.tickets + segment.item * sizes.tickets
    span = Span(group * FAN, gl.where(few, segment.parts, gl.minimum(segment.parts, (group + 1) * FAN)))
    last = _comes_last(ticket + 1 + group, span.end - span.begin)
    if last:
        for first in range(0, slot_rows, rows_at_once(config)):
            own, found = _sum_parts(config, results, sizes, segment, first, span, 1)
            if groups == 1:
                write_rows(config, results, sizes, segment, segment.block * M + own, found)
            else:
                _write_slot(config, results, sizes, slot_of(config, segment.slots, span.begin), own, found)
        if groups > 1:
            _settle_groups(config, results, sizes, segment, ticket, groups)


@gluon.jit
def _settle_groups(config: gl.constexpr, results, sizes, segment, ticket, groups):
    """The sum of a group's parts is in the slot of its first one."""
    slot_rows = gl.minimum(segment.seq.q_rows * sizes.group - segment.block * M, sizes.slot_rows)
    if _comes_last(ticket, groups):
        for first in range(0, slot_rows, rows_at_once(config)):
            own, found = _sum_parts(config, results, sizes, segment, first, Span(groups * 0, segment.parts), FAN)
            write_rows(config, results, sizes, segment, segment.block * M + own, found)


@gluon.constexpr_function
def _together(config):
    """Parts that are loaded side by side, so that their latencies overlap: a thread holds 64 of a row's values."""
    return max(8, min(64, 1 << (2048 // slot_columns(config)).bit_length() - 1))


@gluon.constexpr_function
def rows_at_once(config):
    """Rows that are added side by side: one a warp, or two where an item can have so many."""
    return config.warps if config.rows <= config.warps else 2 * config.warps


@gluon.constexpr_function
def _sum_layout(config, columns):
    """(rows, parts, columns): a warp a row or two, all parts of a column in one thread."""
    lanes, rows = min(32, columns), rows_at_once(config) // config.warps
    return gl.BlockedLayout([rows, _together(config), columns // lanes], [1, 32 // lanes, lanes], [config.warps, 1, 1], [2, 1, 0])


@gluon.jit
def _add_chunk(config: gl.constexpr, results, sizes, slots, rows, span, STEP: gl.constexpr, sums):
    """(o, m, l) of some rows of an item with `_together` more parts, the first ones of the span."""
    o, m, l = sums
    flat: gl.constexpr = gl.SliceLayout(2, _sum_layout(config, columns_of_sum(config, 0)))
    row = gl.convert_layout(rows, gl.SliceLayout(1, flat))[:, None]
    number = gl.arange(0, _together(config), gl.SliceLayout(0, flat))[None, :]
    there = (number * STEP < span.end - span.begin) & (row < sizes.slot_rows)
    line = row.to(gl.int64) * sizes.slots + slots + _slots_a_part(config) * span.begin
    at = results.partial_lse + line + _steps(config, span, number, STEP)
    lse = gl.load(at, mask=there, other=float("-inf"), cache_modifier=".cg")
    outs = ()  # asked for before the weights are known: one way to memory instead of two
    for i in gl.static_range(len(o)):
        outs = outs + (_load_parts(config, results, line, span, there, STEP, i),)
    top = gl.maximum(m, gl.max(lse, axis=1))
    shift = gl.where(top == float("-inf"), 0.0, top)
    weight = exp2(lse - shift[:, None])
    alpha = exp2(m - shift)
    added = ()
    for i in gl.static_range(len(o)):
        found = _weighted_parts(config, outs[i], weight, i)
        scale = gl.convert_layout(alpha, gl.SliceLayout(1, found.type.layout))
        added = added + (o[i] * scale[:, None] + found,)
    return added, top, l * alpha + gl.sum(weight, axis=1)


@gluon.constexpr_function
def _slots_a_part(config):
    return 2 if has(config, "stream_k") else 1


@gluon.jit
def _steps(config: gl.constexpr, span, number, STEP: gl.constexpr):
    """Slots from where a span begins to its part `number`, counted in `STEP`s (shares.slot_of). Numbers are constants of a
    thread, so it works out one address, and its instructions have the rest."""
    steps = _slots_a_part(config) * STEP * number
    if has(config, "stream_k"):
        steps = steps + gl.where((number == 0) & (span.begin == 0), 1, 0)
    return steps


@gluon.jit
def _load_parts(config: gl.constexpr, results, line, span, there, STEP: gl.constexpr, i: gl.constexpr):
    """The i-th accumulator of partial results (rows, parts): (rows, parts, columns)."""
    layout: gl.constexpr = _sum_layout(config, columns_of_sum(config, i))
    flat: gl.constexpr = gl.SliceLayout(2, layout)
    columns: gl.constexpr = columns_of_sum(config, i)
    column = place_in_slot(config, i) + gl.arange(0, columns, gl.SliceLayout(0, gl.SliceLayout(0, layout)))[None, :]
    number = gl.arange(0, _together(config), gl.SliceLayout(0, flat))[None, :]
    at = gl.expand_dims(gl.convert_layout(line, flat) * slot_columns(config), 2) + gl.expand_dims(column, 0)
    at = at + gl.expand_dims(_steps(config, span, number, STEP) * slot_columns(config), 2)
    keep = gl.expand_dims(gl.convert_layout(there, flat), 2) & (gl.expand_dims(column, 0) >= 0)
    return gl.load(results.partial_out + at, mask=keep, other=0.0, cache_modifier=".cg")


@gluon.jit
def _weighted_parts(config: gl.constexpr, out, weight, i: gl.constexpr):
    """Partial results (rows, parts, columns) times their weights and summed: (rows, columns)."""
    flat: gl.constexpr = gl.SliceLayout(2, _sum_layout(config, columns_of_sum(config, i)))
    return gl.sum(out * gl.expand_dims(gl.convert_layout(weight, flat), 2), axis=1)


@gluon.jit
def _no_sum(config: gl.constexpr, columns: gl.constexpr):
    rows: gl.constexpr = rows_at_once(config)
    return gl.zeros([rows, columns], gl.float32, gl.SliceLayout(1, _sum_layout(config, columns)))


@gluon.jit
def _sum_parts(config: gl.constexpr, results, sizes, segment, first, span, STEP: gl.constexpr):
    """Some rows of an item, from row `first` on, and their (o, m, l) over a span of parts."""
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, _sum_layout(config, columns_of_sum(config, 0))))
    count: gl.constexpr = rows_at_once(config)
    rows = first + gl.arange(0, count, layout)
    o = ()
    for i in gl.static_range(accumulators(config)):
        o = o + (_no_sum(config, columns_of_sum(config, i)),)
    sums = (o, gl.full([count], float("-inf"), gl.float32, layout), gl.zeros([count], gl.float32, layout))
    for begin in range(span.begin, span.end, STEP * _together(config)):
        sums = _add_chunk(config, results, sizes, segment.slots, rows, Span(begin, span.end), STEP, sums)
    return rows, sums
