"""Parts of the keys put together: out = sum_i w_i out_i with w_i = exp(lse_i) / sum_j exp(lse_j), and lse = log sum_j exp(lse_j).

tessera.partial's rule for all splits at once. A sink is one more part, without an output. A part that saw no key (lse -inf) is
not read: nothing was written there.
"""

from tessera.backends.hopper.pieces.epilogue import LN_2, LOG2_E, log2
from tessera.backends.hopper.pieces.softmax import exp2
from tessera.jit.compat import gl, gluon, let_next_begin, wait_for_previous


@gluon.jit
def _weights(lses, top):
    """exp(lse - top), and 0 for parts without keys (a top of -inf is not subtracted)."""
    top = gl.where(top == float("-inf"), 0.0, top)
    return exp2((lses - top) * LOG2_E)


@gluon.jit
def combine(
    parts, lses, sinks, total_q, out, lse, lines, splits, heads, seqlen_q, width,
    ROWS: gl.constexpr, PARTS: gl.constexpr, AT_ONCE: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """parts (splits, lines, width), lses (splits, lines), float32, natural logarithms, splits <= PARTS; out (lines, width), lse
    (batch, heads, seqlen_q): a line is (batch, position, head). One program does ROWS lines and 128 columns, AT_ONCE parts at a
    time. SINKS: "none", "rows", or, where rows of no sequence may come after `total_q` packed ones and have no sink, "packed
    rows"."""
    wait_for_previous()
    let_next_begin()
    spread: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, 4, 1], [2, 1, 0])
    by_line: gl.constexpr = gl.SliceLayout(2, spread)
    flat: gl.constexpr = gl.SliceLayout(0, by_line)
    first = gl.program_id(0) * ROWS
    line = first + gl.arange(0, ROWS, flat)
    head = line % heads
    sink = gl.full([ROWS], float("-inf"), gl.float32, flat)
    if SINKS != "none":
        last = lines
        if SINKS == "packed rows":
            last = gl.load(total_q) * heads
        sink = gl.load(sinks + head, mask=line < last, other=float("-inf"))

    part = gl.arange(0, PARTS, gl.SliceLayout(1, by_line))[:, None]
    exists = (part < splits) & (line < lines)[None, :]
    every = gl.load(lses + part.to(gl.int64) * lines + line[None, :], mask=exists, other=float("-inf"))
    top = gl.maximum(sink, gl.max(every, axis=0))
    total = _weights(sink, top) + gl.sum(_weights(every, top[None, :]), axis=0)

    acc = gl.zeros([ROWS, 128], gl.float32, gl.SliceLayout(0, spread))
    column = gl.program_id(1) * 128 + gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(0, spread)))[None, :]
    some = gl.arange(0, AT_ONCE, gl.SliceLayout(1, by_line))[:, None]
    for begin in range(0, splits, AT_ONCE):
        place = (some + begin).to(gl.int64) * lines + line[None, :]
        own = gl.load(lses + place, mask=(some + begin < splits) & (line < lines)[None, :], other=float("-inf"))
        wanted = gl.expand_dims(own > float("-inf"), 2) & gl.expand_dims(column < width, 0)
        values = gl.load(parts + gl.expand_dims(place * width, 2) + gl.expand_dims(column, 0), mask=wanted, other=0.0)
        acc += gl.sum(values * gl.expand_dims(_weights(own, top[None, :]), 2), axis=0)

    factor = gl.where(total > 0.0, 1.0 / total, 0.0)
    rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    result = acc * gl.convert_layout(factor, rows)[:, None]
    written = first + gl.arange(0, ROWS, rows)
    places = (written.to(gl.int64) * width)[:, None] + column
    gl.store(out + places, result.to(out.dtype.element_ty), mask=(written < lines)[:, None] & (column < width))
    if gl.program_id(1) == 0:
        token = line // heads
        batch = token // seqlen_q
        place = (batch * heads + head).to(gl.int64) * seqlen_q + token - batch * seqlen_q
        gl.store(lse + place, gl.where(total > 0.0, log2(total) * LN_2 + top, float("-inf")), mask=line < lines)
