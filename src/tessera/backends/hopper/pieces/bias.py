"""An additive bias: where its values lie and how they are read, for S and for S^T; and where its gradient goes."""

from tessera.backends.hopper.pieces.tiles import M, accumulator_layout, has, has_bias
from tessera.jit.compat import aggregate, gl, gluon, tma_load


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
class RowBias:
    """A bias of a tile's 64 rows: where they begin, (64,) pointers, or one where it is the same for all; and how many keys there
    are."""

    rows: gl.tensor
    keys: gl.tensor


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
class KeysOfPlane:
    """The same of 64 keys of a head: their place there, without the rows'."""

    map: gl.tuple
    plane: gl.tensor
    key: gl.tensor


@gluon.constexpr_function
def stages_bias(config):
    """Whether blocks of the bias come into shared memory."""
    return getattr(config, "stages_bias", False)


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
def bias_of_rows(config: gl.constexpr, biases, seq, head, rows):
    """RowBias of a head's rows, in a tuple; an empty one where there is none, or blocks come into shared memory."""
    if has(config, "bias of keys"):
        return (RowBias(biases[0].of_head(seq, head), seq.k_rows),)
    elif (has(config, "bias") and not stages_bias(config)) or has(config, "bias of rows"):
        plane = biases[0]
        inside = gl.minimum(rows, seq.q_rows - 1)
        return (RowBias(plane.of_head(seq, head) + inside * plane.row, seq.k_rows),)
    else:
        return ()


@gluon.jit
def bias_of_keys(config: gl.constexpr, biases, seq, head, keys):
    """KeyBias of a head's keys, of which none is past the last, in a tuple; an empty one as for rows."""
    if has_bias(config) and not stages_bias(config):
        return (KeyBias(biases[0].of_head(seq, head), keys, biases[0].row, seq.q_rows),)
    else:
        return ()


@gluon.jit
def gradient_of_keys(config: gl.constexpr, gradients, seq, head, first, keys):
    """Where the bias's gradient goes from a tile of keys that begins at `first`: KeyBias or KeysOfPlane, in a tuple; an empty one
    where nobody asks for it."""
    if has(config, "bias gradient"):
        return (KeyBias(gradients[0].of_head(seq, head), keys, gradients[0].row, seq.q_rows),)
    elif keeps_ds(config):
        return (KeysOfPlane(gradients[0].map, seq.number * gradients[0].heads + head, first),)
    else:
        return ()


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
def bias_of_transposed_block(config: gl.constexpr, bias, first_row):
    """(64 keys, rows) of the bias in float32, or what broadcasts to it. `bias`: KeyBias, or the block's own values where those
    come by shared memory."""
    if stages_bias(config):
        return bias.to(gl.float32)
    elif _walks_along_bias(config):
        return _plane_of_bias(config, bias, first_row)
    else:
        return gl.load(_places_in_bias(config, bias, first_row)).to(gl.float32)


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
