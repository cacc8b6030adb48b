"""Products of 16 query rows with a tile of keys by mma.sync, the warps along a batch dimension.

A tile of keys is (warps, keys a warp, columns): each warp has its own keys, its own maxima, sums and O, so nothing crosses warps
in a tile; they are merged once at the end (pieces/parts.py). A head dim comes in parts of at most 64 columns, and a part of an
FP8 cache in two planes: its 16-bit words hold an even and an odd column, so S = Q_even K_even^T + Q_odd K_odd^T, and P V gives
the even and the odd columns of O.
"""

from tessera.backends.hopper.decode_config import ROWS, Storage
from tessera.jit.compat import gl, gluon, mma_v2

M = gl.constexpr(ROWS)


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
    else:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 s, e, c; mov.b32 c, 0x5c005c00;"
            " and.b32 s, $2, 0x00800080; shl.b32 s, s, 8; and.b32 e, $2, 0x007f007f; shl.b32 e, e, 7;"
            " or.b32 e, e, s; mul.rn.f16x2 $0, e, c;"
            " and.b32 s, $2, 0x80008000; and.b32 e, $2, 0x7f007f00; shr.b32 e, e, 1; or.b32 e, e, s;"
            " mul.rn.f16x2 $1, e, c; }",
            "=&r,=&r,r", [words], dtype=(gl.float16, gl.float16), is_pure=True, pack=2,
        )  # fmt: skip


@gluon.jit
def _planes(config: gl.constexpr, operand, dtype: gl.constexpr):
    if planes_of(config) == 1:
        return (operand,)
    else:
        return _unpack(operand, dtype)


@gluon.jit
def scores(config: gl.constexpr, q, buffers, slot):
    """S = Q K^T of one tile, (warps, 16, keys a warp) float32. `q`: one operand a part and plane."""
    warps: gl.constexpr = config.warps
    planes: gl.constexpr = planes_of(config)
    s = empty_sum(config, config.keys // warps)
    for part in gl.static_range(len(buffers)):
        k = _by_warp(buffers[part].index(slot), warps).permute((0, 2, 1)).load(right_layout(warps))
        k = _planes(config, k, q[0].dtype)
        for plane in gl.static_range(planes):
            s = mma_v2(q[part * planes + plane], k[plane], s)
    return s


@gluon.jit
def add_values(config: gl.constexpr, p, buffers, slot, o, keep):
    """O + P V of one tile, as one accumulator a part and plane. `keep` (warps, keys a warp, 1): rows of V that count, None for
    all; the others may hold anything, NaN too, and 0 NaN would be NaN."""
    warps: gl.constexpr = config.warps
    planes: gl.constexpr = planes_of(config)
    added = ()
    for part in gl.static_range(len(buffers)):
        v = _by_warp(buffers[part].index(slot), warps).load(right_layout(warps))
        if keep is not None:
            v = gl.where(keep, v, 0)
        v = _planes(config, v, p.dtype)
        for plane in gl.static_range(planes):
            added = added + (mma_v2(p, v[plane], o[part * planes + plane]),)
    return added
