"""What happens to scores beside scale, softcap and mask, on one warpgroup's tile; and the units that a bias asks for.

Scores are kept in log2 units, so that P = 2^(x - m). Under a bias they are natural: finfo.min, as masks in the field have it,
times log2(e) would be -inf, and a row of nothing else, whose softmax is uniform, would be taken for an empty one.

The row maximum is taken of finished scores here; without modifiers it is taken of raw products, and the scale is part of
the exponentials (softmax.py).
"""

from tessera.backends.hopper.config import ForwardConfig
from tessera.backends.hopper.pieces.bias import (
    Bias,
    Planes,
    bias_of_keys,
    bias_of_rows,
    bias_of_transposed_block,
    gradient_of_keys,
    keeps_ds,
)
from tessera.backends.hopper.pieces.dropout import Dropout, plane_of_keys, plane_of_rows
from tessera.backends.hopper.pieces.epilogue import LOG2_E
from tessera.backends.hopper.pieces.lines import keys_of_lines
from tessera.backends.hopper.pieces.softmax import GROWTH, exp2
from tessera.backends.hopper.pieces.tiles import M, accumulator_layout, has, has_bias, overlaps, row_layout
from tessera.jit.compat import SPILLS_SOONER, aggregate, gl, gluon

NEARLY_LOWEST = gl.constexpr(-2e38)
"""Natural scores below this times log2(e) are not finite in float32."""


@gluon.constexpr_function
def scales_first(config):
    """Whether scores are multiplied by the scale before their maximum is taken."""
    return has(config, "alibi") or has_bias(config) or has(config, "scale first")


@aggregate
class Slopes:
    """ALiBi's slopes (heads,), or (batch, heads) with `stride` = heads; in float32."""

    pointer: gl.tensor
    stride: gl.tensor


@aggregate
class RowSlopes:
    """ALiBi of a tile's 64 rows: the slope in the scores' units, and where each row's diagonal stands, (64,) float32; where
    `spares_registers`, that of the first of the two rows, 8 apart, that a thread has."""

    slope: gl.tensor
    diagonal: gl.tensor


@aggregate
class KeySlopes:
    """ALiBi of 64 keys: the slope in the scores' units, and the row whose diagonal each key stands on, (64,) float32."""

    slope: gl.tensor
    place: gl.tensor


@aggregate
class Modifiers:
    """What happens to scores beside scale, softcap and mask, and where the bias's gradient goes: each a tuple of one, or empty
    where it is absent. Of a launch: Slopes, Bias, Dropout, and Bias or Planes; of a tile's rows: RowSlopes, RowBias, Plane; of
    its keys: KeySlopes, KeyBias (or a block's values, where those are in shared memory), Plane, and KeyBias or KeysOfPlane."""

    alibi: gl.tuple
    bias: gl.tuple
    dropout: gl.tuple
    dbias: gl.tuple


@gluon.jit
def make_modifiers(config: gl.constexpr, arguments, gradient):
    """From a kernel's arguments, those of the bias's gradient by themselves (first TMA's map of kept dS, and how many heads
    there are); those that no feature needs are None."""
    slopes, slopes_stride, bias, bias_batch, bias_head, bias_row, key_low, key_high, threshold, keep_scale = arguments
    made_alibi = ()
    made_bias = ()
    made_dropout = ()
    if has(config, "alibi"):
        made_alibi = (Slopes(slopes, slopes_stride),)
    if has_bias(config):
        made_bias = (Bias(bias, bias_batch, bias_head, bias_row),)
    if has(config, "dropout"):
        made_dropout = (Dropout(key_low, key_high, threshold, keep_scale),)
    made_dbias = ()
    if has(config, "bias gradient"):
        _, _, dbias, dbias_batch, dbias_head, dbias_row = gradient
        made_dbias = (Bias(dbias, dbias_batch, dbias_head, dbias_row),)
    if keeps_ds(config):
        made_dbias = (Planes((gradient[0],), gradient[1]),)
    return Modifiers(made_alibi, made_bias, made_dropout, made_dbias)


@gluon.jit
def no_modifiers():
    return Modifiers((), (), (), ())


@gluon.jit
def slope_of(config: gl.constexpr, slopes, seq, head):
    """A head's slope in the scores' units."""
    slope = gl.load(slopes.pointer + seq.number * slopes.stride + head)
    if has_bias(config):
        return slope
    else:
        return slope * LOG2_E


@gluon.constexpr_function
def spares_registers(config):
    """Whether ALiBi's main loop is short of registers: at head dim 256 under P V it spilt three words with Triton 3.9. A thread
    then keeps the diagonal of one of its two rows, and slots are told by bits (channel.Stream): none spilt, 496 -> 489."""
    if not SPILLS_SOONER or not isinstance(config, ForwardConfig):
        return False
    return has(config, "alibi") and sum(config.dims) == 256 and overlaps(config)


@gluon.jit
def of_rows(config: gl.constexpr, modifiers, tile, row):
    """The modifiers of 64 rows of a tile's head from `row` on."""
    seq, head = tile.seq, tile.head
    layout: gl.constexpr = row_layout(config.keys)
    rows = row + gl.arange(0, M, layout)
    alibi = ()
    dropout = ()
    if has(config, "alibi"):
        slope = slope_of(config, modifiers.alibi[0], seq, head)
        kept = rows
        if spares_registers(config):
            kept = row + (gl.arange(0, M, layout) & ~8)
        alibi = (RowSlopes(slope, (kept + seq.diagonal).to(gl.float32)),)
    bias = bias_of_rows(config, modifiers.bias, seq, head, rows)
    if has(config, "dropout"):
        key = _first_key(config, seq)
        dropout = (plane_of_rows(config, modifiers.dropout[0], tile.words, row, key),)
    return Modifiers(alibi, bias, dropout, ())


@gluon.jit
def of_keys(config: gl.constexpr, modifiers, seq, head, first):
    """The modifiers of 64 keys of a (query) head from `first` on, for S^T: KeySlopes, KeyBias, Plane."""
    layout: gl.constexpr = row_layout(config.rows)
    keys = first + keys_of_lines(config, layout)
    alibi = ()
    dropout = ()
    if has(config, "alibi"):
        slope = slope_of(config, modifiers.alibi[0], seq, head)
        alibi = (KeySlopes(slope, (keys - seq.diagonal).to(gl.float32)),)
    inside = gl.minimum(keys, seq.k_rows - 1)
    bias = bias_of_keys(config, modifiers.bias, seq, head, inside)
    dbias = gradient_of_keys(config, modifiers.dbias, seq, head, first, inside)
    if has(config, "dropout"):
        key = _first_key(config, seq) + first
        dropout = (plane_of_keys(config, modifiers.dropout[0], seq.number.to(gl.uint32), head.to(gl.uint32), key),)
    return Modifiers(alibi, bias, dropout, dbias)


@gluon.jit
def add_to_transposed(config: gl.constexpr, modifiers, x, first_row):
    """Scaled scores S^T (64 keys, rows) with ALiBi and the bias added."""
    if has(config, "alibi"):
        alibi = modifiers.alibi[0]
        rows = first_row + gl.arange(0, config.rows, gl.SliceLayout(0, accumulator_layout(config.rows)))
        x = x - alibi.slope * gl.abs(rows.to(gl.float32)[None, :] - alibi.place[:, None])
    if has_bias(config):
        x = x + bias_of_transposed_block(config, modifiers.bias[0], first_row)
    return x


@gluon.jit
def with_bias(modifiers, values):
    """Modifiers of 64 keys with a block's bias, (64 keys, rows)."""
    return Modifiers(modifiers.alibi, (values,), modifiers.dropout, modifiers.dbias)


@gluon.jit
def _first_key(config: gl.constexpr, seq):
    """The place of the first visible key in its sequence."""
    if has(config, "varlen"):
        return seq.k_begin * 0
    else:
        return seq.k_begin


@gluon.constexpr_function
def falls_evenly(config, cut):
    """Whether ALiBi is -slope (i - j) in a block: below the diagonal, where all blocks are that upper bounds do not cut
    (forward.py sees to it). One multiply-add a score then; what a row shares, `evenly_shared`, is left to the reference."""
    return has(config, "alibi") and not has_bias(config) and cut in (None, "lower")


@gluon.jit
def evenly_shared(config: gl.constexpr, modifiers, m, first_key):
    """Of ALiBi in a block below the diagonal: what it adds to all scores of a row, in m's layout."""
    alibi = modifiers.alibi[0]
    distance = first_key.to(gl.float32) - gl.convert_layout(alibi.diagonal, m.type.layout)
    if spares_registers(config):
        distance = distance - (gl.arange(0, M, m.type.layout) & 8).to(gl.float32)
    return alibi.slope * distance


@gluon.jit
def below_diagonal(config: gl.constexpr, seq, row):
    """How many blocks of keys lie wholly below the diagonal of the rows from `row` on."""
    return gl.maximum(row + seq.diagonal + 1, 0) // config.keys


@gluon.jit
def add_to_scores(config: gl.constexpr, modifiers, s, bias, scale, first_key, CUT: gl.constexpr):
    """S (64, keys) as it enters the softmax, but for the mask: scaled, with ALiBi and `bias` (bias_of_block) added."""
    keys: gl.constexpr = s.shape[1]
    columns: gl.constexpr = gl.SliceLayout(0, accumulator_layout(keys))
    if scales_first(config):
        s = s * scale
    if has(config, "alibi"):
        alibi = modifiers.alibi[0]
        place = gl.arange(0, keys, columns).to(gl.float32)
        if falls_evenly(config, CUT):
            s = s + (alibi.slope * place)[None, :]
        else:
            diagonal = alibi.diagonal - first_key.to(gl.float32)
            if spares_registers(config):
                diagonal = diagonal + (gl.arange(0, M, row_layout(keys)) & 8).to(gl.float32)
            s = s - alibi.slope * gl.abs(diagonal[:, None] - place[None, :])
    if has_bias(config):
        s = s + bias.to(gl.float32)
    return s


@gluon.jit
def move_natural_reference(s, m):
    """`move_reference` in natural units: P stays below e^8."""
    top = gl.max(s, axis=1)
    grows = top - m > GROWTH
    new = gl.where(grows, top, m)
    return new, gl.where(grows, exp2((m - new) * LOG2_E), 1.0)


@gluon.jit
def natural_exponentials(s, m):
    """e^(s - m) as (64, keys). A row may have no key yet: -inf - -inf must not be NaN. Where m itself times log2(e) is not
    finite, differences are 0 or huge: any factor does."""
    factor = gl.where(m < NEARLY_LOWEST, 1.0, LOG2_E)
    shift = gl.where(m == float("-inf"), 0.0, m * factor)
    return exp2(s * factor[:, None] - shift[:, None])
