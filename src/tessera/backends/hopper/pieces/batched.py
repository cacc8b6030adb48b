"""Products of 16 query rows with a tile of keys by mma.sync, the warps along a batch dimension.

A tile of keys is (warps, keys a warp, columns): each warp has its own keys, its own maxima, sums and O, so nothing crosses warps
in a tile; they are merged once at the end (pieces/parts.py). A head dim comes in parts of at most 64 columns, and a part of an
FP8 cache in two planes: its 16-bit words hold an even and an odd column, so S = Q_even K_even^T + Q_odd K_odd^T, and P V gives
the even and the odd columns of O.
"""

from tessera.backends.hopper.decode_config import ROWS, Storage
from tessera.backends.hopper.pieces.tiles import has
from tessera.jit.compat import gl, gluon, mma_v2

M = gl.constexpr(ROWS)
MOST_COLUMNS = gl.constexpr(192)
"""Of a tile's keys (or values) that a thread's registers hold beside Q and O."""


@gluon.constexpr_function
def planes_of(config):
    """Columns in one 16-bit word of the cache."""
    return 2 if config.storage is Storage.E4M3 else 1


@gluon.constexpr_function
def sums_layout(warps):
    """An accumulator (warps, 16, columns)."""
    return gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def left_layout(warps):
    return gl.DotOperandLayout(0, sums_layout(warps), 2)


@gluon.constexpr_function
def right_layout(warps):
    return gl.DotOperandLayout(1, sums_layout(warps), 2)


@gluon.constexpr_function
def row_layout(warps):
    """One value a row and warp of an accumulator."""
    return gl.SliceLayout(2, sums_layout(warps))


@gluon.constexpr_function
def part_offset(dims, part):
    """The first word of a part."""
    return sum(dims[:part])


@gluon.jit
def along_warps(count: gl.constexpr, layout: gl.constexpr):
    """0, 1, ... as (count, 1, 1)."""
    ramp = gl.arange(0, count, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    return gl.expand_dims(gl.expand_dims(ramp, 1), 2)


@gluon.jit
def along_rows(count: gl.constexpr, layout: gl.constexpr):
    """0, 1, ... as (1, count, 1)."""
    ramp = gl.arange(0, count, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    return gl.expand_dims(gl.expand_dims(ramp, 0), 2)


@gluon.jit
def along_columns(count: gl.constexpr, layout: gl.constexpr):
    """0, 1, ... as (1, 1, count)."""
    ramp = gl.arange(0, count, gl.SliceLayout(0, gl.SliceLayout(0, layout)))
    return gl.expand_dims(gl.expand_dims(ramp, 0), 0)


@gluon.jit
def empty_sum(config: gl.constexpr, columns: gl.constexpr):
    """Zeros (warps, 16, columns)."""
    warps: gl.constexpr = config.warps
    return gl.zeros([warps, M, columns], gl.float32, sums_layout(warps))


@gluon.jit
def _by_warp(tile, warps: gl.constexpr):
    """A tile (keys, columns) as (warps, keys a warp, columns)."""
    keys: gl.constexpr = tile.shape[0] // warps
    columns: gl.constexpr = tile.shape[1]
    return tile.reshape([warps, keys, columns])


@gluon.jit
def _unpack(words, dtype: gl.constexpr):
    """Pairs of e4m3 in 16-bit words as (even columns, odd columns), exactly. The e4m3 exponent is put where the wider type has
    its own, so that subnormals come out right too, and the difference of the biases is multiplied in."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 s, e, c; mov.b32 c, 0x7b807b80;"
            " and.b32 s, $2, 0x00800080; shl.b32 s, s, 8; and.b32 e, $2, 0x007f007f; shl.b32 e, e, 4;"
            " or.b32 e, e, s; mul.rn.bf16x2 $0, e, c;"
            " and.b32 s, $2, 0x80008000; and.b32 e, $2, 0x7f007f00; shr.b32 e, e, 4; or.b32 e, e, s;"
            " mul.rn.bf16x2 $1, e, c; }",
            "=&r,=&r,r", [words], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:  # the hardware's own way, a word at a time: half the instructions
        return gl.inline_asm_elementwise(
            "{ .reg .b16 low, high; .reg .b32 x, y; mov.b32 {low, high}, $2;"
            " cvt.rn.f16x2.e4m3x2 x, low; cvt.rn.f16x2.e4m3x2 y, high; prmt.b32 $0, x, y, 0x5410; prmt.b32 $1, x, y, 0x7632; }",
            "=&r,=&r,r", [words], dtype=(gl.float16, gl.float16), is_pure=True, pack=2,
        )  # fmt: skip


@gluon.constexpr_function
def as_halves(config):
    """Whether an FP8 cache is multiplied in float16, which is quicker to unpack to than bfloat16. Scales of blocks are multiplied
    into P, which then needs bfloat16's range."""
    return config.storage is Storage.E4M3 and not has(config, "block_scales")


@gluon.jit
def halved(operands, warps: gl.constexpr):
    """Rows in bfloat16 as rows in float16, each about 2^14 at most, and what their scores are multiplied by for it: a power of
    two, so only what is 2^-28 of a row's largest loses bits."""
    top = gl.max(gl.abs(operands[0].to(gl.float32)), axis=2)
    for i in gl.static_range(1, len(operands)):
        top = gl.maximum(top, gl.max(gl.abs(operands[i].to(gl.float32)), axis=2))
    factor, scale = gl.inline_asm_elementwise(
        "{ .reg .b32 e, x; and.b32 e, $2, 0x7f800000; max.u32 e, e, 0x0d800000;"  # 2^-100 at least
        " sub.u32 x, 0x86000000, e; mov.b32 $0, x; sub.u32 x, e, 0x07000000; mov.b32 $1, x; }",
        "=&f,=&f,f", [top], dtype=(gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip
    rows = ()
    for i in gl.static_range(len(operands)):
        rows = rows + ((operands[i].to(gl.float32) * gl.expand_dims(factor, 2)).to(gl.float16),)
    return rows, gl.expand_dims(gl.convert_layout(scale, row_layout(warps), assert_trivial=True), 2)


@gluon.jit
def _planes(config: gl.constexpr, operand, dtype: gl.constexpr):
    if planes_of(config) == 1:
        return (operand,)
    else:
        return _unpack(operand, dtype)


@gluon.constexpr_function
def _parts_until(dims, part):
    """How many parts are multiplied when so many after `part` have been read: all at the end, where registers hold them; in a
    wide head dim each at once."""
    is_last = part == len(dims) - 1
    return part + 1 if is_last or sum(dims) > MOST_COLUMNS else 0


@gluon.jit
def _read(config: gl.constexpr, buffers, stream, n, part: gl.constexpr, turned: gl.constexpr):
    """A part of a tile's keys (`turned`: columns before keys) or values as an operand. The tile is use n of the stream; where the
    config says `early` it is released as soon as it has been read."""
    tile = _by_warp(buffers[part].index(stream.slot(n)), config.warps)
    if turned:
        tile = tile.permute((0, 2, 1))
    operand = tile.load(right_layout(config.warps))
    if has(config, "early") and part == len(buffers) - 1:
        stream.release_here(n)
    return operand


@gluon.jit
def scores(config: gl.constexpr, q, buffers, stream, n):
    """S = Q K^T of one tile, (warps, 16, keys a warp) float32. `q`: one operand a part and plane."""
    planes: gl.constexpr = planes_of(config)
    s = empty_sum(config, config.keys // config.warps)
    operands = ()
    for part in gl.static_range(len(buffers)):
        operands = operands + (_read(config, buffers, stream, n, part, True),)
        for ready in gl.static_range(_parts_until(config.dims, part - 1), _parts_until(config.dims, part)):
            k = _planes(config, operands[ready], q[0].dtype)
            for plane in gl.static_range(planes):
                s = mma_v2(q[ready * planes + plane], k[plane], s)
    return s


@gluon.jit
def add_values(config: gl.constexpr, p, buffers, stream, n, o, keep):
    """O + P V of one tile, as one accumulator a part and plane. `keep` (warps, keys a warp, 1): rows of V that count, None for
    all; the others may hold anything, NaN too, and 0 NaN would be NaN."""
    planes: gl.constexpr = planes_of(config)
    added = ()
    operands = ()
    for part in gl.static_range(len(buffers)):
        operands = operands + (_read(config, buffers, stream, n, part, False),)
        for ready in gl.static_range(_parts_until(config.dims_v, part - 1), _parts_until(config.dims_v, part)):
            v = operands[ready]
            if keep is not None:
                v = gl.where(keep, v, 0)
            v = _planes(config, v, p.dtype)
            for plane in gl.static_range(planes):
                added = added + (mma_v2(p, v[plane], o[ready * planes + plane]),)
    return added
