"""Parts of the keys put together: out = sum_i w_i out_i with w_i = exp(lse_i) / sum_j exp(lse_j), and lse = log sum_j exp(lse_j).

tessera.partial's rule for all splits at once. A sink is one more part, without an output. A part that saw no key (lse -inf)
counts nothing: nothing was written there.
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
def _add_parts(state, line, at, parts, lses, lines, splits, width):
    """Into the state (out, sum, top) about the greatest log-sum-exp so far: the rows `line` of parts and columns `at`.

    Rows that nobody wrote are read too, and then not counted, NaN neither: to wait for the log-sum-exps, which tell, would be a
    second way to L2 after the first.
    """
    acc, total, top = state
    part, column = at
    place = part.to(gl.int64) * lines + line[None, :]
    exists = (part < splits) & (line < lines)[None, :]
    own = gl.load(lses + place, mask=exists, other=float("-inf"))
    wanted = gl.expand_dims(exists, 2) & gl.expand_dims(column < width, 0)
    values = gl.load(parts + gl.expand_dims(place * width, 2) + gl.expand_dims(column, 0), mask=wanted, other=0.0)
    above = gl.maximum(top, gl.max(own, axis=0))
    weights = _weights(own, above[None, :])
    share = gl.sum(gl.where(gl.expand_dims(weights > 0.0, 2), values * gl.expand_dims(weights, 2), 0.0), axis=0)
    less = _weights(top, above)
    kept = gl.convert_layout(less, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc * kept + share, total * less + gl.sum(weights, axis=0), above


@gluon.jit
def combine(
    parts, lses, sinks, total_q, out, lse, lines, splits, heads, seqlen_q, width,
    ROWS: gl.constexpr, AT_ONCE: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """parts (splits, lines, width), lses (splits, lines), float32, natural logarithms; out (lines, width), lse
    (batch, heads, seqlen_q): a line is (batch, position, head). One program does ROWS lines and 128 columns, AT_ONCE parts at a
    time. SINKS: "none", "rows", or, where rows of no sequence may come after `total_q` packed ones and have no sink, "packed
    rows"."""
    spread: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, 4, 1], [2, 1, 0])
    by_line: gl.constexpr = gl.SliceLayout(2, spread)
    flat: gl.constexpr = gl.SliceLayout(0, by_line)
    first = gl.program_id(0) * ROWS
    line = first + gl.arange(0, ROWS, flat)
    head = line % heads
    part = gl.arange(0, AT_ONCE, gl.SliceLayout(1, by_line))[:, None]
    column = gl.program_id(1) * 128 + gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(0, spread)))[None, :]
    wait_for_previous()
    let_next_begin()
    top = gl.full([ROWS], float("-inf"), gl.float32, flat)
    if SINKS != "none":
        last = lines
        if SINKS == "packed rows":
            last = gl.load(total_q) * heads
        top = gl.load(sinks + head, mask=line < last, other=float("-inf"))
    total = gl.where(top > float("-inf"), 1.0, 0.0)
    state = (gl.zeros([ROWS, 128], gl.float32, gl.SliceLayout(0, spread)), total, top)
    for begin in range(0, splits, AT_ONCE):
        state = _add_parts(state, line, (part + begin, column), parts, lses, lines, splits, width)
    acc, total, top = state

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
