"""A bias's gradient from dS, which the backward's main kernel keeps in 16 bits: (batch, heads, rows, keys), a plane for each
sequence and head.

`add_planes` adds up the planes that share one of the bias, in their order, and leaves zeros where no tile of keys has been at
work: behind a diagonal, outside of a window, in padding. Where every plane is one of the gradient already, it leaves these zeros
alone.
"""

from tessera.backends.hopper.pieces.kv_source import Lengths, dense_sequence
from tessera.backends.hopper.pieces.lines import parts_neighbours
from tessera.backends.hopper.pieces.masking import Band
from tessera.backends.hopper.pieces.row_ranges import row_blocks
from tessera.jit.compat import gl, gluon

ROWS = gl.constexpr(8)
KEYS = gl.constexpr(512)
"""Of a program: 32 elements a thread, in rows of 1 KB."""
TOGETHER = gl.constexpr(4)
"""Planes that are asked for at a time."""


@gluon.constexpr_function
def _layout():
    """(ROWS, KEYS) over four warps, eight keys a thread: 16 bytes of 16-bit elements."""
    return gl.BlockedLayout([1, 8], [1, 32], [2, 2], [1, 0])


@gluon.jit
def _reached(config: gl.constexpr, band, lengths, batch, sizes, row, keys):
    """Which of the keys' tiles the main kernel has brought together with row `row`, of an entry of the batch."""
    seqlen_q, seqlen_k = sizes
    seq = dense_sequence(config, lengths, batch, seqlen_q, seqlen_k)
    width: gl.constexpr = config.keys
    begin, count = row_blocks(config, band, seq, keys // width * width)
    block = row // config.rows
    return (block >= begin) & (block < begin + count)


@gluon.jit
def _in_order(config: gl.constexpr, x):
    """Keys from lines (pieces/lines.py) to their places."""
    if parts_neighbours(config):
        rows: gl.constexpr = x.shape[0]
        keys: gl.constexpr = x.shape[1]
        apart = gl.permute(gl.reshape(x, [rows, keys // 16, 2, 4, 2]), (0, 1, 4, 3, 2))
        return gl.convert_layout(gl.reshape(apart, [rows, keys]), _layout())
    else:
        return x


@gluon.jit
def _ask_before(n):
    """What has been asked for stands before what follows: ptxas asks for a plane when it has added another, but nothing moves
    past a loop, and this is one that is never taken."""
    asm: gl.constexpr = (
        "{ .reg .pred never; setp.lt.s32 never, $1, 0; AGAIN: @!never bra DONE; nanosleep.u32 64; bra AGAIN;"
        " DONE: mov.u32 $0, 0; }"
    )
    gl.inline_asm_elementwise(asm, "=r,r", [n], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def add_planes(
    ds_ptr, dbias_ptr, key_end, query_end, document_begin, document_end,
    heads, batch_sharing, heads_sharing, seqlen_q, seqlen_k, left, right, document_stride, line, factor,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """A program for ROWS rows and KEYS keys of a plane of the bias, which so many entries of the batch and so many heads share.
    `line`: elements from row to row, in dS and in its sum."""
    config: gl.constexpr = CONFIG
    layout: gl.constexpr = _layout()
    across = (seqlen_k + KEYS - 1) // KEYS
    blocks = (seqlen_q + ROWS - 1) // ROWS
    number = gl.program_id(0)
    first_row = number // across % blocks * ROWS
    plane = number // (across * blocks)
    columns = heads // heads_sharing
    batch = plane // columns * batch_sharing
    head = plane % columns * heads_sharing

    band = Band(left, right, document_begin, document_end, document_stride)
    lengths = Lengths(key_end, key_end, key_end, key_end, key_end, key_end, query_end)  # of these four dense ones have none
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    keys = number % across * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, layout))
    there = (rows < seqlen_q)[:, None] & (keys < line)[None, :]
    inside = rows.to(gl.int64)[:, None] * line + keys[None, :]
    size = line * seqlen_q
    sizes = (seqlen_q, seqlen_k)
    if config.adds:
        total = gl.zeros([ROWS, KEYS], gl.float32, layout)
        sharing = batch_sharing * heads_sharing
        for n in range(0, sharing, TOGETHER):
            found = ()
            for i in gl.static_range(TOGETHER):
                b = batch + gl.minimum(n + i, sharing - 1) // heads_sharing
                h = head + (n + i) % heads_sharing
                reached = _reached(config, band, lengths, b, sizes, first_row, keys) & (n + i < sharing)
                where = ds_ptr + (b * heads + h) * size + inside
                found = found + (gl.load(where, mask=there & reached[None, :], other=0.0),)
            _ask_before(n)
            for i in gl.static_range(TOGETHER):
                total += found[i].to(gl.float32)
        total = _in_order(config, total * factor)
        gl.store(dbias_ptr + plane * size + inside, total.to(dbias_ptr.dtype.element_ty), mask=there)
    else:
        zeros = gl.zeros([ROWS, KEYS], dbias_ptr.dtype.element_ty, layout)
        reached = _reached(config, band, lengths, batch, sizes, first_row, keys)
        gl.store(dbias_ptr + plane * size + inside, zeros, mask=there & (reached == 0)[None, :])
