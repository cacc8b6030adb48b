"""Before and after the backward's main kernel: what it needs of each row, and dQ from float32 (FlashAttention-2, section 3.1.2).

`prepare_rows` writes, for every row of the workspace, lse in base 2 (+inf for a row that sees no key, and for padding: its P is
then 0), D = rowsum(dO * O) - dlse, and zeros for dQ to be added to. `finish_queries` scales dQ and rounds it.
"""

from tessera.backends.hopper.pieces.epilogue import LOG2_E
from tessera.backends.hopper.pieces.key_tiles import locate_rows
from tessera.backends.hopper.pieces.kv_source import Lengths
from tessera.backends.hopper.pieces.softmax import exp2
from tessera.backends.hopper.pieces.tiles import has
from tessera.jit.compat import gl, gluon


@gluon.constexpr_function
def rows_of(columns):
    """Rows of one program: 4096 elements, 32 a thread (half as many and twice as many move no more bytes a second)."""
    return 4096 // columns


@gluon.constexpr_function
def _layout(columns):
    """(rows, columns) over four warps, eight columns a thread: 16 bytes of 16-bit elements."""
    return gl.BlockedLayout([1, 8], [32 * 8 // columns, columns // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def _wide_layout(columns):
    """The same for float32: four columns a thread."""
    across = columns // 4 if columns < 128 else 32
    return gl.BlockedLayout([1, 4], [32 // across, across], [4, 1], [1, 0])


@gluon.jit
def _sink_gradient(sink, lse, d):
    """A sink is a key whose value is 0, so dP = 0 and dS = P (0 - D), summed over rows. A row without even a sink: P = 0."""
    probability = exp2(sink * LOG2_E - gl.where(lse == float("-inf"), float("inf"), lse * LOG2_E))
    return -gl.sum(probability * d, axis=0)


@gluon.jit
def prepare_rows(
    out_ptr, do_ptr, lse_ptr, dlse_ptr, sinks_ptr, stats_ptr, dq_ptr, dsinks_ptr,
    cu_q, cu_k, used_q, used_k, key_start, key_end, query_end,
    batch, heads, seqlen_q, seqlen_k, line, dim, dim_v, do_pitch, with_dlse, do_row, do_head,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """Program (block of rows of the workspace, head). dsinks: one partial sum a program."""
    config: gl.constexpr = CONFIG
    count: gl.constexpr = rows_of(config.dim_v)
    layout: gl.constexpr = _layout(config.dim_v)
    lengths = Lengths(cu_q, cu_k, used_q, used_k, key_start, key_end, query_end)
    start = gl.program_id(0) * count
    head = gl.program_id(1)
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
    d = gl.sum(out.to(gl.float32) * do.to(gl.float32), axis=1)

    row_of_lse = (seq.batch * heads + head).to(gl.int64) * seqlen_q + seq.q_begin + rows
    lse = gl.load(lse_ptr + row_of_lse, mask=inside, other=float("-inf"))
    d -= gl.load(dlse_ptr + row_of_lse, mask=inside & (with_dlse != 0), other=0.0)
    d = gl.where(lse == float("-inf"), 0.0, d)
    if has(config, "sinks"):
        sink = gl.load(sinks_ptr + head)
        gl.store(dsinks_ptr + head * gl.num_programs(0) + gl.program_id(0), _sink_gradient(sink, lse, d))
    seen = live & (lse > float("-inf"))
    place = head.to(gl.int64) * line + start + gl.arange(0, count, gl.SliceLayout(1, layout))
    gl.store(stats_ptr + place, gl.where(seen, lse * LOG2_E, float("inf")))
    gl.store(stats_ptr + heads.to(gl.int64) * line + place, gl.where(seen, d, 0.0))
    _clear_dq(config, dq_ptr, head.to(gl.int64) * line + start, dim)


@gluon.jit
def _clear_dq(config: gl.constexpr, dq_ptr, first, dim):
    rows: gl.constexpr = rows_of(config.dim_v)
    width: gl.constexpr = config.dim
    layout: gl.constexpr = _wide_layout(width)
    place = first + gl.arange(0, rows, gl.SliceLayout(1, layout))
    columns = gl.arange(0, width, gl.SliceLayout(0, layout))
    zeros = gl.zeros([rows, width], gl.float32, layout)
    gl.store(dq_ptr + place[:, None] * dim + columns[None, :], zeros, mask=(columns < dim)[None, :])


@gluon.jit
def finish_queries(
    sum_ptr, dq_ptr, cu_q, cu_k, used_q, used_k, key_start, key_end, query_end,
    batch, heads, seqlen_q, seqlen_k, line, dim, factor,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """Program (block of rows of the workspace, head)."""
    config: gl.constexpr = CONFIG
    count: gl.constexpr = rows_of(config.dim)
    layout: gl.constexpr = _layout(config.dim)
    lengths = Lengths(cu_q, cu_k, used_q, used_k, key_start, key_end, query_end)
    start = gl.program_id(0) * count
    head = gl.program_id(1)
    seq, first = locate_rows(config, start, batch, seqlen_q, seqlen_k, lengths)
    rows = gl.arange(0, count, gl.SliceLayout(1, layout))
    columns = gl.arange(0, config.dim, gl.SliceLayout(0, layout))
    wanted = (first + rows < seq.q_rows)[:, None] & (columns < dim)[None, :]
    place = head.to(gl.int64) * line + start + rows
    dq = gl.load(sum_ptr + place[:, None] * dim + columns[None, :], mask=wanted, other=0.0)
    token = (seq.batch * seqlen_q + seq.q_begin + first + rows).to(gl.int64)
    dq = (dq * factor).to(dq_ptr.dtype.element_ty)
    gl.store(dq_ptr + (token * heads + head)[:, None] * dim + columns[None, :], dq, mask=wanted)
