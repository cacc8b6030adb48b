"""Before and after the backward's main kernel: what it needs of each row, and dQ from float32 (FlashAttention-2, section 3.1.2).

`prepare_rows` writes, for every row of the workspace, lse in base 2 (+inf for a row that sees no key, and for padding: its P is
then 0), D = rowsum(dO * O) - dlse, and zeros for dQ to be added to (or, where its first part is stored, for the marks).
`finish_queries`, where the main kernel does not do that, takes dQ from the order in which its parts lie there (pieces/sums.py),
adds its sums up where there are several, scales it and rounds it.

Both load all that they need and then take a branch that is always taken. Without it ptxas spares registers: it has a thread's
eight loads come one after another, each used before the next is asked for, which is five or six times memory's latency.
"""

from tessera.backends.hopper.pieces.counts import await_tiles
from tessera.backends.hopper.pieces.epilogue import LOG2_E
from tessera.backends.hopper.pieces.gradients import subtracts_by_products
from tessera.backends.hopper.pieces.key_tiles import locate_rows, tiles_of_packed
from tessera.backends.hopper.pieces.kv_source import Lengths
from tessera.backends.hopper.pieces.softmax import exp2
from tessera.backends.hopper.pieces.sums import LINE, PART_ROWS, adds_in_order, lies_in_rows
from tessera.backends.hopper.pieces.tiles import has
from tessera.jit.compat import gl, gluon, let_next_begin, wait_for_previous


@gluon.constexpr_function
def rows_of(columns):
    """Rows of one program: 4096 elements, 32 a thread (half as many and twice as many move no more bytes a second)."""
    return 4096 // columns


@gluon.constexpr_function
def _layout(columns):
    """(rows, columns) over four warps, eight columns a thread: 16 bytes of 16-bit elements."""
    return gl.BlockedLayout([1, 8], [32 * 8 // columns, columns // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def _lines_layout():
    """Two lines of a part over four warps, four values a thread."""
    return gl.BlockedLayout([1, 4], [1, 32], [2, 2], [1, 0])


@gluon.jit
def _backwards(columns):
    """This program's (block, column), the last block first: what the main kernel begins with then lies in L2 when it begins, and
    what it ends with is taken from L2 before that is overwritten."""
    number = gl.num_programs(0) - 1 - gl.program_id(0)
    block = number // columns
    return block, number - block * columns


@gluon.jit
def _as_they_are_done(blocks, heads, chunks, together):
    """This program's (block, head, chunk): of a sequence's `blocks` those of `together` heads come before the next heads'."""
    number = gl.program_id(0)
    batch = number // (blocks * heads * chunks)
    number -= batch * (blocks * heads * chunks)
    section = number // (blocks * together * chunks)
    number -= section * (blocks * together * chunks)
    beside = gl.minimum(together, heads - section * together) * chunks
    block = number // beside
    number -= block * beside
    head = number // chunks
    return batch * blocks + block, section * together + head, number - head * chunks


@gluon.jit
def _sink_gradient(sink, lse, d):
    """A sink is a key whose value is 0, so dP = 0 and dS = P (0 - D), summed over rows. A row without even a sink: P = 0."""
    probability = exp2(sink * LOG2_E - gl.where(lse == float("-inf"), float("inf"), lse * LOG2_E))
    return -gl.sum(probability * d, axis=0)


@gluon.jit
def prepare_rows(
    out_ptr, do_ptr, lse_ptr, dlse_ptr, sinks_ptr, stats_ptr, sum_ptr, marks_ptr, dsinks_ptr,
    cu_q, cu_k, used_q, used_k, key_start, key_end, query_end,
    batch, heads, seqlen_q, seqlen_k, line, strands, dim, dim_v, do_pitch, with_dlse, do_row, do_head, unit, share,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """A program for each block of rows of the workspace and head. dsinks: one partial sum a program. `unit`: a score of 1 in the
    main kernel's units; `share`: of probabilities that dropout keeps."""
    config: gl.constexpr = CONFIG
    let_next_begin()
    count: gl.constexpr = rows_of(config.dim_v)
    layout: gl.constexpr = _layout(config.dim_v)
    lengths = Lengths(cu_q, cu_k, used_q, used_k, key_start, key_end, query_end)
    block, head = _backwards(heads)
    start = block * count
    seq, first = locate_rows(config, start, batch, seqlen_q, seqlen_k, lengths)
    rows = first + gl.arange(0, count, gl.SliceLayout(1, layout))
    columns = gl.arange(0, config.dim_v, gl.SliceLayout(0, layout))
    inside = rows < seq.q_rows
    live = rows < seq.q_live

    wanted = live[:, None] & (columns < dim_v)[None, :]
    token = (seq.batch * seqlen_q + seq.q_begin + rows).to(gl.int64)
    out = gl.load(out_ptr + (token * heads + head)[:, None] * dim_v + columns[None, :], mask=wanted, other=0.0)
    do_token = (seq.batch * do_pitch + seq.q_begin + rows).to(gl.int64) * do_row + head * do_head
    do = gl.load(do_ptr + do_token[:, None] + columns[None, :], mask=wanted, other=0.0)
    row_of_lse = (seq.batch * heads + head).to(gl.int64) * seqlen_q + seq.q_begin + rows
    lse = gl.load(lse_ptr + row_of_lse, mask=inside, other=float("-inf"))
    dlse = gl.load(dlse_ptr + row_of_lse, mask=inside & (with_dlse != 0), other=0.0)
    if not adds_in_order(config):
        _clear_sums(config, sum_ptr, head.to(gl.int64) * line + start, dim)
    if head + start == 0:
        gl.store(marks_ptr, 0)  # the counter of tiles, before all marks
    _clear_marks(config, marks_ptr, heads, head, line, strands, start)
    if dim > 0:  # always: see above
        d = gl.sum(out.to(gl.float32) * do.to(gl.float32), axis=1) - dlse
        d = gl.where(lse == float("-inf"), 0.0, d)
        if has(config, "sinks"):
            sink = gl.load(sinks_ptr + head)
            gl.store(dsinks_ptr + head * (gl.num_programs(0) // heads) + block, _sink_gradient(sink, lse, d))
        seen = live & (lse > float("-inf"))
        row = start + gl.arange(0, count, gl.SliceLayout(1, layout))
        least = gl.where(seen, lse * unit, float("inf"))
        d = gl.where(seen, d * share, 0.0)
        if subtracts_by_products(config):
            _store_summands(stats_ptr + 8 * head.to(gl.int64) * line + row, line, least, d)
        else:
            place = head.to(gl.int64) * line + row
            gl.store(stats_ptr + place, least)
            gl.store(stats_ptr + heads.to(gl.int64) * line + place, d)


@gluon.jit
def _summands(x):
    """x as a sum of four values of bfloat16, the last of them 0."""
    high = x.to(gl.bfloat16)
    rest = x - high.to(gl.float32)
    middle = rest.to(gl.bfloat16)
    low = (rest - middle.to(gl.float32)).to(gl.bfloat16)
    return high, middle, low, (x - x).to(gl.bfloat16)


@gluon.jit
def _store_summands(begin, line, lse, d):
    """Minus lse and minus D of each row as sums of four values of bfloat16 each, a line each (pieces/gradients.issue_less). An
    infinite lse is a great one: its multiples by 0 are to be 0."""
    of_lse = _summands(-gl.minimum(lse, 1e38))
    of_d = _summands(-d)
    for part in gl.static_range(4):
        gl.store(begin + part * line, of_lse[part])
        gl.store(begin + (4 + part) * line, of_d[part])


@gluon.jit
def _clear_marks(config: gl.constexpr, marks_ptr, heads, head, line, strands, start):
    """The marks of these rows, of each sum."""
    if start % PART_ROWS == 0:
        blocks = line // PART_ROWS
        first = marks_ptr + 1 + head * blocks + start // PART_ROWS
        if adds_in_order(config):
            for strand in range(strands + 1):  # and counts (pieces/counts.py)
                gl.store(first + strand * heads * blocks, 0)
        else:
            gl.store(first, 0)


@gluon.jit
def _clear_sums(config: gl.constexpr, sum_ptr, first, dim):
    """Zeros for `dim` columns of as many rows as a program has, from row `first` on: four columns of 64 rows are a line."""
    size: gl.constexpr = rows_of(config.dim_v) * config.dim
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    place = gl.arange(0, size, layout)
    gl.store(sum_ptr + first * dim + place, gl.zeros([size], gl.float32, layout), mask=place < rows_of(config.dim_v) * dim)


@gluon.jit
def _places(config: gl.constexpr, first_column, dim):
    """64 columns of a row block, from its first value on, and which of them there are."""
    if lies_in_rows(config):
        layout: gl.constexpr = _layout(64)
        rows = gl.arange(0, PART_ROWS, gl.SliceLayout(1, layout))
        columns = first_column + gl.arange(0, 64, gl.SliceLayout(0, layout))
        return rows[:, None] * dim + columns[None, :], (columns < dim)[None, :]
    else:
        lines = gl.arange(0, 16, gl.SliceLayout(1, _lines_layout())) + first_column // 4
        within = gl.arange(0, LINE, gl.SliceLayout(0, _lines_layout()))
        return lines[:, None] * LINE + within[None, :], (lines < dim // 4)[:, None]


@gluon.jit
def _in_rows(config: gl.constexpr, part):
    """The same as rows, where (group, warp, lane / 4, lane % 4, half, side) is the order: see pieces/sums.py."""
    if lies_in_rows(config):
        return part
    else:
        apart = gl.reshape(part, [8, 4, 8, 4, 2, 2])
        return gl.convert_layout(gl.reshape(gl.permute(apart, (1, 4, 2, 0, 3, 5)), [PART_ROWS, 64]), _layout(64))


@gluon.jit
def _summed(config: gl.constexpr, sum_ptr, marks_ptr, place, step, strands, first_column, dim):
    """64 columns of dQ's row block `place` in float32: of the sums that there are in an order, `step` row blocks apart, all that
    any tile has reached, for else nobody has written anything."""
    places, there = _places(config, first_column, dim)
    begin = sum_ptr + place.to(gl.int64) * PART_ROWS * dim
    if adds_in_order(config):
        dq = gl.load(begin + places, mask=there & (gl.load(marks_ptr + 1 + place) != 0), other=0.0)
        for strand in range(1, strands):
            is_written = gl.load(marks_ptr + 1 + place + strand * step) != 0
            begin += step.to(gl.int64) * PART_ROWS * dim
            dq += gl.load(begin + places, mask=there & is_written, other=0.0)
        return dq
    else:
        return gl.load(begin + places, mask=there, other=0.0)


@gluon.jit
def finish_queries(
    sum_ptr, marks_ptr, dq_ptr, cu_q, cu_k, used_q, used_k, key_start, key_end, query_end,
    batch, heads, seqlen_q, seqlen_k, line, strands, dim, factor, group, together, warps,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """A program for each 64 rows of the workspace, head and 64 columns. Where tiles are counted (pieces/counts.py), `together`
    heads are done at about the same time, in groups of `group`, and `warps` count for each."""
    config: gl.constexpr = CONFIG
    width: gl.constexpr = 64
    layout: gl.constexpr = _layout(width)
    lengths = Lengths(cu_q, cu_k, used_q, used_k, key_start, key_end, query_end)
    chunks = (dim + (width - 1)) // width
    if config.counts_tiles:
        sequences = batch
        if has(config, "varlen"):
            sequences = 1
        block, head, chunk = _as_they_are_done(line // PART_ROWS // sequences, heads, chunks, together)
    else:
        block, chunk = _backwards(heads * chunks)
        head = chunk // chunks
        chunk -= head * chunks
    start = block * PART_ROWS
    first_column = chunk * width
    blocks = line // PART_ROWS
    seq, first = locate_rows(config, start, batch, seqlen_q, seqlen_k, lengths)
    if config.counts_tiles:
        last = (head // group + 1) * group - 1
        if has(config, "varlen"):
            warps *= tiles_of_packed(config, lengths, seq.number, batch, seqlen_k)
        place = last * blocks + (start - first) // PART_ROWS
        if adds_in_order(config):
            place += strands * heads * blocks
        await_tiles(marks_ptr + 1 + place, warps)
    else:
        wait_for_previous()
    dq = _summed(config, sum_ptr, marks_ptr, head * blocks + block, heads * blocks, strands, first_column, dim)
    if dim > 0:  # always: see above
        part = _in_rows(config, (dq * factor).to(dq_ptr.dtype.element_ty))
        rows = gl.arange(0, PART_ROWS, gl.SliceLayout(1, layout))
        columns = first_column + gl.arange(0, width, gl.SliceLayout(0, layout))
        wanted = (first + rows < seq.q_rows)[:, None] & (columns < dim)[None, :]
        token = (seq.batch * seqlen_q + seq.q_begin + first + rows).to(gl.int64)
        gl.store(dq_ptr + (token * heads + head)[:, None] * dim + columns[None, :], part, mask=wanted)
    if config.counts_tiles and gl.program_id(0) == gl.num_programs(0) - 1:
        wait_for_previous()  # what comes after this kernel may count on the main one
