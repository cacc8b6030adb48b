"""Parts of the keys put together: out = sum_i w_i out_i with w_i = exp(lse_i) / sum_j exp(lse_j), and lse = log sum_j exp(lse_j).

tessera.partial's rule for all splits at once. A sink is one more part, without an output. A part that saw no key (lse -inf) is
not read: nothing was written there.
"""

from tessera.backends.hopper.pieces.epilogue import LN_2, LOG2_E, log2
from tessera.backends.hopper.pieces.softmax import exp2
from tessera.jit.compat import gl, gluon


@gluon.jit
def _weights(lses, top):
    """exp(lse - top), and 0 for parts without keys (a top of -inf is not subtracted)."""
    top = gl.where(top == float("-inf"), 0.0, top)
    return exp2((lses - top) * LOG2_E)


@gluon.jit
def combine(
    parts, lses, sinks, total_q, out, lse, lines, splits, heads, seqlen_q,
    ROWS: gl.constexpr, AT_ONCE: gl.constexpr, WIDTH: gl.constexpr, COLUMNS: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """parts (splits, lines, WIDTH), lses (splits, lines), float32, natural logarithms; out (lines, WIDTH), lse (batch, heads,
    seqlen_q): a line is (batch, position, head). One program does ROWS lines, AT_ONCE parts at a time; WIDTH <= COLUMNS. SINKS:
    "none", "rows", or, where rows of no sequence may come after `total_q` packed ones and have no sink, "packed rows"."""
    spread: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, 4, 1], [2, 1, 0])
    by_line: gl.constexpr = gl.SliceLayout(2, spread)
    first = gl.program_id(0) * ROWS
    part = gl.arange(0, AT_ONCE, gl.SliceLayout(1, by_line))[:, None]
    line = first + gl.arange(0, ROWS, gl.SliceLayout(0, by_line))[None, :]
    flat: gl.constexpr = gl.SliceLayout(0, by_line)
    own = first + gl.arange(0, ROWS, flat)
    head = own % heads
    sink = gl.full([ROWS], float("-inf"), gl.float32, flat)
    if SINKS != "none":
        last = lines
        if SINKS == "packed rows":
            last = gl.load(total_q) * heads
        sink = gl.load(sinks + head, mask=own < last, other=float("-inf"))

    top = sink
    for begin in range(0, splits, AT_ONCE):
        exists = (part + begin < splits) & (line < lines)
        some = gl.load(lses + (part + begin).to(gl.int64) * lines + line, mask=exists, other=float("-inf"))
        top = gl.maximum(top, gl.max(some, axis=0))
    total = _weights(sink, top)
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, gl.SliceLayout(0, spread))
    column = gl.expand_dims(gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(0, spread)))[None, :], 0)
    for begin in range(0, splits, AT_ONCE):
        exists = (part + begin < splits) & (line < lines)
        place = (part + begin).to(gl.int64) * lines + line
        some = gl.load(lses + place, mask=exists, other=float("-inf"))
        weights = _weights(some, top[None, :])
        total += gl.sum(weights, axis=0)
        wanted = gl.expand_dims(some > float("-inf"), 2) & (column < WIDTH)
        values = gl.load(parts + gl.expand_dims(place * WIDTH, 2) + column, mask=wanted, other=0.0)
        acc += gl.sum(values * gl.expand_dims(weights, 2), axis=0)

    factor = gl.where(total > 0.0, 1.0 / total, 0.0)
    rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    result = acc * gl.convert_layout(factor, rows)[:, None]
    lines_of_rows = first + gl.arange(0, ROWS, rows)
    mask = (lines_of_rows < lines)[:, None] & (gl.arange(0, COLUMNS, gl.SliceLayout(0, acc.type.layout)) < WIDTH)[None, :]
    places = (lines_of_rows.to(gl.int64) * WIDTH)[:, None] + gl.arange(0, COLUMNS, gl.SliceLayout(0, acc.type.layout))[None, :]
    gl.store(out + places, result.to(out.dtype.element_ty), mask=mask)
    token = own // heads
    batch = token // seqlen_q
    place = (batch * heads + head).to(gl.int64) * seqlen_q + token - batch * seqlen_q
    gl.store(lse + place, gl.where(total > 0.0, log2(total) * LN_2 + top, float("-inf")), mask=own < lines)
