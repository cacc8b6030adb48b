"""From (O, m, l) to out and the log-sum-exp."""

from tessera.backends.hopper.pieces.softmax import exp2
from tessera.backends.hopper.pieces.tiles import M, has, has_bias, row_layout
from tessera.jit.compat import gl, gluon

LN_2 = gl.constexpr(0.6931471805599453)
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def log2(x):
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.constexpr_function
def has_dead_rows(config):
    """Whether rows may be written that attend to nothing whatever their Q holds (it may be NaN)."""
    return has(config, "query_end") or has(config, "seqused_q")


@gluon.jit
def exponential(config: gl.constexpr, x):
    """2^x or e^x, for a difference of scores."""
    if has_bias(config):
        return exp2(x * LOG2_E)
    else:
        return exp2(x)


@gluon.jit
def _log_sum(config: gl.constexpr, m, l):
    """The natural logarithm of l exponentials about m."""
    if has_bias(config):
        return m + log2(l) * LN_2
    else:
        return (m + log2(l)) * LN_2


@gluon.jit
def normaliser(config: gl.constexpr, m, l, sink, live):
    """(factor of O, natural log-sum-exp) of each row from m and l. A row without keys: 0 and -inf, or the sink.

    m and the sink are in the scores' units: log2, natural under a bias. A sink is a key without a value. It may exceed every
    score, so the sum is taken about the greater.
    """
    empty = m == float("-inf")
    if has_dead_rows(config):
        empty = empty | (live == 0)
    if has(config, "sinks"):
        top = gl.where(empty, sink, gl.maximum(m, sink))
        grown = gl.where(empty, 0.0, exponential(config, m - top))
        total = gl.where(empty, 0.0, l * grown) + exponential(config, sink - top)
        factor = grown / total
        lse = _log_sum(config, top, total)
    else:
        factor = gl.where(empty, 0.0, 1.0 / l)
        lse = gl.where(empty, float("-inf"), _log_sum(config, m, l))
    if has(config, "varlen"):
        lse = gl.where(live, lse, float("-inf"))  # rows of no sequence have no sink either
    return factor, lse


@gluon.jit
def normalise(config: gl.constexpr, o, factor, row, q_live):
    """out = O / l as (64, columns) float32; `row` is the first of the 64."""
    layout: gl.constexpr = row_layout(o.shape[1])
    out = o * gl.convert_layout(factor, layout)[:, None]
    if has_dead_rows(config):
        live = row + gl.arange(0, M, layout) < q_live
        out = gl.where(live[:, None], out, 0.0)
    return out
