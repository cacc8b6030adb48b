"""What is added to scores, ALiBi and a bias, on one warpgroup's tile; and the units that a bias asks for.

Scores are kept in log2 units, so that P = 2^(x - m). Under a bias they are natural: finfo.min, as masks in the field have it,
times log2(e) would be -inf, and a row of nothing else, whose softmax is uniform, would be taken for an empty one.

The row maximum is taken of finished scores here; without modifiers it is taken of raw products, and the scale is part of
the exponentials (softmax.py).
"""

from tessera.backends.hopper.pieces.dropout import Dropout, plane_of_keys, plane_of_rows
from tessera.backends.hopper.pieces.epilogue import LOG2_E
from tessera.backends.hopper.pieces.lines import keys_of_lines
from tessera.backends.hopper.pieces.softmax import GROWTH, exp2
from tessera.backends.hopper.pieces.tiles import M, accumulator_layout, has, has_bias, row_layout
from tessera.jit.compat import aggregate, gl, gluon, tma_load

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
class Bias:
    """An additive bias (batch, heads, rows, keys): strides in elements, 0 where it is broadcast; a key's is 1."""

    pointer: gl.tensor
    batch: gl.tensor
    head: gl.tensor
    row: gl.tensor

    @gluon.jit
    def of_head(self, seq, head):
        """Where the plane (rows, keys) of a head begins, at the first key that the sequence sees."""
        return self.pointer + (seq.number * self.batch + head * self.head + seq.k_begin)


@aggregate
class StagedBias:
    """A bias of every score's own that comes by TMA: the map of (batch, heads, rows, keys), and 1 where it has batch entries and
    heads of its own, else 0."""

    map: gl.tuple
    batch: gl.tensor
    head: gl.tensor


@aggregate
class RowSlopes:
    """ALiBi of a tile's 64 rows: the slope in the scores' units, and where each row's diagonal stands, (64,) float32."""

    slope: gl.tensor
    diagonal: gl.tensor


@aggregate
class RowBias:
    """A bias of a tile's 64 rows: where they begin, (64,) pointers, or one where it is the same for all; and how many keys there
    are."""

    rows: gl.tensor
    keys: gl.tensor


@aggregate
class KeySlopes:
    """ALiBi of 64 keys: the slope in the scores' units, and the row whose diagonal each key stands on, (64,) float32."""

    slope: gl.tensor
    place: gl.tensor


@aggregate
class KeyBias:
    """A bias of 64 keys: where its plane begins, the keys' places (64,), a row's stride; and how many rows there are."""

    plane: gl.tensor
    keys: gl.tensor
    row: gl.tensor
    rows: gl.tensor


@aggregate
class Planes:
    """Where dS is kept: TMA's map of (planes, rows, keys), a plane for each sequence and head; and how many heads there are."""

    map: gl.tuple
    heads: gl.tensor


@aggregate
class KeptScores:
    """The same of 64 keys of a head: their place there, without the rows'."""

    map: gl.tuple
    plane: gl.tensor
    key: gl.tensor


@aggregate
class Modifiers:
    """What happens to scores beside scale, softcap and mask, and where the bias's gradient goes: each a tuple of one, or empty
    where it is absent. Of a launch: Slopes, Bias, Dropout, and Bias or Planes; of a tile's rows: RowSlopes, RowBias, Plane; of
    its keys: KeySlopes, KeyBias, Plane, and KeyBias or KeptScores."""

    alibi: gl.tuple
    bias: gl.tuple
    dropout: gl.tuple
    dbias: gl.tuple


@gluon.constexpr_function
def keeps_ds(config):
    """Whether dS is kept for the bias's gradient."""
    return has(config, "dS kept")


@gluon.jit
def staged_bias(bias_map, batch, head):
    """From a kernel's arguments; `batch` and `head` are the bias's strides."""
    return StagedBias((bias_map,), gl.where(batch == 0, 0, 1), gl.where(head == 0, 0, 1))


@gluon.jit
def load_bias(bias, buffer, first, count: gl.constexpr, seq, head, row, key, bar):
    """Start the copies of `count` blocks of the bias to places from `first` on, of 64 rows each from `row` on, at key `key`."""
    for i in gl.static_range(count):
        where = [seq.number * bias.batch, head * bias.head, row + i * M, seq.k_begin + key]
        tma_load(bias.map[0], where, bar, buffer.index(first + i))


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


@gluon.jit
def of_rows(config: gl.constexpr, modifiers, tile, row):
    """The modifiers of 64 rows of a tile's head from `row` on."""
    seq, head = tile.seq, tile.head
    layout: gl.constexpr = row_layout(config.keys)
    rows = row + gl.arange(0, M, layout)
    alibi = ()
    bias = ()
    dropout = ()
    if has(config, "alibi"):
        slope = slope_of(config, modifiers.alibi[0], seq, head)
        alibi = (RowSlopes(slope, (rows + seq.diagonal).to(gl.float32)),)
    if has(config, "bias of keys"):
        bias = (RowBias(modifiers.bias[0].of_head(seq, head), seq.k_rows),)
    elif (has(config, "bias") and not stages_bias(config)) or has(config, "bias of rows"):
        plane = modifiers.bias[0]
        inside = gl.minimum(rows, seq.q_rows - 1)
        bias = (RowBias(plane.of_head(seq, head) + inside * plane.row, seq.k_rows),)
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
    bias = ()
    dropout = ()
    if has(config, "alibi"):
        slope = slope_of(config, modifiers.alibi[0], seq, head)
        alibi = (KeySlopes(slope, (keys - seq.diagonal).to(gl.float32)),)
    dbias = ()
    inside = gl.minimum(keys, seq.k_rows - 1)
    if has_bias(config) and not stages_bias(config):
        bias = (KeyBias(modifiers.bias[0].of_head(seq, head), inside, modifiers.bias[0].row, seq.q_rows),)
    if has(config, "bias gradient"):
        dbias = (KeyBias(modifiers.dbias[0].of_head(seq, head), inside, modifiers.dbias[0].row, seq.q_rows),)
    if keeps_ds(config):
        kept = modifiers.dbias[0]
        dbias = (KeptScores(kept.map, seq.number * kept.heads + head, first),)
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
    if stages_bias(config):
        x = x + modifiers.bias[0].to(gl.float32)
    elif _walks_along_bias(config):
        x = x + _plane_of_bias(config, modifiers.bias[0], first_row)
    elif has_bias(config):
        x = x + gl.load(_places_in_bias(config, modifiers.bias[0], first_row)).to(gl.float32)
    return x


@gluon.constexpr_function
def stages_bias(config):
    """Whether blocks of the bias come into shared memory; Modifiers.bias is then the block's values."""
    return getattr(config, "stages_bias", False)


@gluon.jit
def with_bias(modifiers, values):
    """Modifiers of 64 keys with a block's bias, (64 keys, rows)."""
    return Modifiers(modifiers.alibi, (values,), modifiers.dropout, modifiers.dbias)


@gluon.constexpr_function
def _walks_along_bias(config):
    """Whether a bias of every score's own is read by a pointer that goes along the rows: where its places spill. Divided by
    products that is 1.1 times as slow (H200, 2026-11-22)."""
    return has(config, "bias") and config.division.value == "keys" and max(config.dim, config.dim_v) == 128


@gluon.constexpr_function
def _plane_asm(n, kind):
    """n values of two keys in float32 (as wgmma holds them: two neighbouring rows of a key, of the key 8 further, then the rows 8
    further) from, n times each, where the first row begins, the keys, a row's bytes, and how many rows are left."""
    block, keys, row, left = n, 2 * n, 3 * n, 4 * n
    size = 4 if kind == "f32" else 2
    lines = [
        f"{{ .reg .b64 near, far, step, apart; .reg .b32 lane, rows, h<{n}>; .reg .b16 half; .reg .pred inside;",
        "mov.u32 lane, %laneid; and.b32 lane, lane, 3; shl.b32 lane, lane, 1;",
        f"sub.s32 rows, ${left}, lane; mul.wide.u32 step, lane, ${row};",
        f"add.s64 step, ${block}, step; mul.wide.u32 near, ${keys}, {size}; mul.wide.u32 far, ${keys + 2}, {size};",
        "add.s64 near, near, step; add.s64 far, far, step;",
        f"cvt.u64.u32 step, ${row}; mul.wide.u32 apart, ${row}, 7;",
    ]
    finish = []
    for i in range(0, n, 4):
        for neighbour in range(2):
            lines.append(f"setp.gt.s32 inside, rows, {2 * i + neighbour};")
            for key, place in enumerate(("near", "far")):
                value = i + neighbour + 2 * key
                lines.append(f"mov.b32 h{value}, 0; @inside ld.global.{'u32' if kind == 'f32' else 'u16'} h{value}, [{place}];")
                finish.append(
                    {
                        "f32": f"mov.b32 ${value}, h{value};",
                        "bf16": f"shl.b32 ${value}, h{value}, 16;",
                        "f16": f"cvt.u16.u32 half, h{value}; cvt.f32.f16 ${value}, half;",
                    }[kind]
                )
            step = "step" if neighbour == 0 else "apart"
            lines.append(f"add.s64 near, near, {step}; add.s64 far, far, {step};")
    return "\n".join([*lines, *finish, "}"])


@gluon.constexpr_function
def _plane_constraints(n):
    return ",".join([*["=&f"] * n, *["l"] * n, *["r"] * (3 * n)])


@gluon.constexpr_function
def _kind_of(dtype):
    return {gl.bfloat16: "bf16", gl.float16: "f16", gl.float32: "f32"}[dtype]


@gluon.jit
def _plane_of_bias(config: gl.constexpr, bias, first_row):
    """A bias of every score's own for S^T (64 keys, rows), in float32, 0 past the last row. One pointer a key goes along the
    rows: places of all would be 32 registers, for which the main loops have no room."""
    n: gl.constexpr = config.rows // 2
    kind: gl.constexpr = _kind_of(bias.plane.dtype.element_ty)
    asm: gl.constexpr = _plane_asm(n, kind)
    constraints: gl.constexpr = _plane_constraints(n)
    size: gl.constexpr = 4 if kind == "f32" else 2
    layout: gl.constexpr = accumulator_layout(config.rows)
    none = gl.arange(0, config.rows, gl.SliceLayout(0, layout)) * 0
    block = (bias.plane + first_row * bias.row + none).to(gl.int64)
    operands = [block[None, :], bias.keys[:, None] + none[None, :], (bias.row * size).to(gl.uint32), bias.rows - first_row]
    return gl.inline_asm_elementwise(asm, constraints, operands, dtype=gl.float32, is_pure=False, pack=n)


@gluon.jit
def add_to_dbias(config: gl.constexpr, modifiers, ds, first_row):
    """dS^T (64 keys, rows) added to the bias's gradient, in float32: the sum over all that share an element of it. Sums over rows
    or keys are added as tensors that have no other dimension: an atomic is done once for each of a thread's registers, and in
    a (64, 1) tensor all of its columns' registers hold the same sum."""
    if has(config, "bias gradient"):
        dbias = modifiers.dbias[0]
        if has(config, "dropout"):
            ds = ds * modifiers.dropout[0].dropout.keep_scale
        if has(config, "bias of keys"):
            gl.atomic_add(dbias.plane + dbias.keys, gl.sum(ds, axis=1), sem="relaxed")
        elif has(config, "bias of rows"):
            _add_to_rows(dbias, ds, first_row)
        else:
            gl.atomic_add(_places_in_bias(config, dbias, first_row), ds, sem="relaxed")


@gluon.jit
def _add_to_rows(dbias, ds, first_row):
    """Each warp adds the sums over its own 16 keys: nothing crosses warps."""
    rows: gl.constexpr = ds.shape[1]
    sums = gl.sum(gl.reshape(ds, [4, M // 4, rows]), axis=1)
    warps = gl.arange(0, 4, gl.SliceLayout(1, sums.type.layout))
    lines = gl.minimum(gl.arange(0, rows, gl.SliceLayout(0, sums.type.layout)), dbias.rows - 1 - first_row)
    block = dbias.plane + first_row * dbias.row
    gl.atomic_add(block + (warps[:, None] * 0 + (lines * dbias.row.to(gl.int32))[None, :]), sums, sem="relaxed")


@gluon.jit
def _places_in_bias(config: gl.constexpr, bias, first_row):
    """Where the bias of S^T lies: (64, rows) pointers, (64, 1) where all rows have the same, (1, rows) where all keys. Rows and
    keys past the last share its place: their P is 0. Inside a block 32 bits hold the distances, and half of the registers."""
    rows = gl.arange(0, config.rows, gl.SliceLayout(0, accumulator_layout(config.rows)))
    if has(config, "bias of keys"):
        return bias.plane + bias.keys[:, None]
    else:
        block = bias.plane + first_row * bias.row
        lines = gl.minimum(rows, bias.rows - 1 - first_row) * bias.row.to(gl.int32)
        if has(config, "bias of rows"):
            return block + lines[None, :]
        else:
            return block + (bias.keys[:, None] + lines[None, :])


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
    return alibi.slope * (first_key.to(gl.float32) - gl.convert_layout(alibi.diagonal, m.type.layout))


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
            s = s - alibi.slope * gl.abs(diagonal[:, None] - place[None, :])
    if has_bias(config):
        s = s + bias.to(gl.float32)
    return s


@gluon.jit
def bias_of_block(config: gl.constexpr, modifiers, first_key, CUT: gl.constexpr):
    """(64, keys) of the bias, or what broadcasts to it; 0 without. Past the last key, where only cut blocks reach, nothing is
    read."""
    keys: gl.constexpr = config.keys
    if has(config, "bias of rows"):
        return gl.load(modifiers.bias[0].rows)[:, None]
    elif has_bias(config):
        bias = modifiers.bias[0]
        place = first_key + gl.arange(0, keys, gl.SliceLayout(0, accumulator_layout(keys)))
        if has(config, "bias of keys"):
            where = (bias.rows + place)[None, :]
        else:
            where = bias.rows[:, None] + place[None, :]
        if CUT is None:
            return gl.load(where)
        else:
            return gl.load(where, mask=(place < bias.keys)[None, :], other=0.0)
    else:
        return 0


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
