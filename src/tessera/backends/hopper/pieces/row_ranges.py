"""Masks seen from the keys: a key is attended to by one interval of rows, as a row attends to one interval of keys.

lo(i) and hi(i) do not decrease (see masking.py), so the rows that see key j are those from the first with hi(i) > j up to the
first with lo(i) > j. A tile of keys then needs the rows from its first key's first to its last key's last, and all of
it is seen by the rows from its last key's first to its first key's last.
"""

from tessera.backends.hopper.pieces.lines import keys_of_lines
from tessera.backends.hopper.pieces.masking import has_lower_bound
from tessera.backends.hopper.pieces.tiles import M, accumulator_layout, has
from tessera.jit.compat import gl, gluon

FAR = gl.constexpr(1 << 29)
"""A row after every row."""


@gluon.jit
def _first_above(bounds, count, value):
    """The first of `count` non-decreasing bounds that exceeds `value` (a number or a tensor); `count` if none does."""
    row = value * 0
    size = count
    while size > 1:
        half = size // 2
        row = gl.where(gl.load(bounds + row + (half - 1)) <= value, row + half, row)
        size -= half
    return gl.where(gl.load(bounds + row) <= value, row + 1, row)


@gluon.jit
def first_row(config: gl.constexpr, band, seq, key):
    """The first row i with hi(i) > key, for one key or a tensor of keys; FAR for keys past the last."""
    row = key * 0
    if has(config, "right"):
        row = gl.maximum(row, key - (seq.diagonal + band.right))
    if has(config, "documents"):
        ends = band.document_end + seq.batch * band.document_stride
        row = gl.maximum(row, _first_above(ends, seq.q_rows, key + seq.k_begin))
    return gl.where(key < seq.k_rows, row, FAR)


@gluon.jit
def end_row(config: gl.constexpr, band, seq, key):
    """The first row i with lo(i) > key: one past the last that sees it, if any does; FAR where nothing hides a key."""
    row = key * 0 + FAR
    if has(config, "left"):
        row = gl.minimum(row, key - seq.diagonal + band.left + 1)
    if has(config, "documents"):
        begins = band.document_begin + seq.batch * band.document_stride
        row = gl.minimum(row, _first_above(begins, seq.q_rows, key + seq.k_begin))
    return row


@gluon.jit
def row_blocks(config: gl.constexpr, band, seq, first):
    """(begin, count) of the row blocks that see any of the keys first .. first + config.keys."""
    begin = first_row(config, band, seq, first) // config.rows
    last = gl.minimum(first + config.keys, seq.k_rows) - 1
    end = gl.minimum(gl.maximum(end_row(config, band, seq, last), 0), seq.q_live)
    return begin, gl.maximum((end + config.rows - 1) // config.rows - begin, 0)


@gluon.jit
def cut_and_full(config: gl.constexpr, band, seq, first, begin, count):
    """Of `count` row blocks from `begin` on: how many come before the first that sees all 64 keys from `first` on, and how
    many from there on see them all. Rows without keys do not count: their P is zero by their lse."""
    full_begin = (first_row(config, band, seq, first + (M - 1)) + config.rows - 1) // config.rows
    cut = gl.minimum(gl.maximum(full_begin - begin, 0), count)
    full = count - cut
    if has_lower_bound(config):
        full_end = gl.maximum(end_row(config, band, seq, first), 0) // config.rows
        full = gl.minimum(gl.maximum(full_end - begin - cut, 0), full)
    return cut, full


@gluon.jit
def key_bounds(config: gl.constexpr, band, seq, first):
    """The rows that see each of 64 keys as (begin,) or (begin, end), each (64, 8): the bound minus the row's place in its group
    of 8, so that a block compares constants with it (see masking.row_bounds)."""
    rows: gl.constexpr = config.rows
    s = gl.zeros([M, rows], gl.float32, accumulator_layout(rows))
    grouped: gl.constexpr = gl.reshape(s, [M, rows // 8, 8]).type.layout
    layout: gl.constexpr = gl.SliceLayout(1, grouped)
    place = gl.arange(0, 8, gl.SliceLayout(0, layout))[None, :]
    keys = first + keys_of_lines(config, gl.SliceLayout(1, layout))
    bounds = (first_row(config, band, seq, keys)[:, None] - place,)
    if has_lower_bound(config):
        bounds = bounds + (end_row(config, band, seq, keys)[:, None] - place,)
    return bounds


@gluon.jit
def mask_rows(x, bounds, first):
    """x (64 keys, rows) with -inf where the row does not see the key; `first` is the first row."""
    rows: gl.constexpr = x.shape[1]
    grouped = gl.reshape(x, [M, rows // 8, 8])
    layout: gl.constexpr = grouped.type.layout
    group = gl.arange(0, rows // 8, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None] * 8
    keep = group >= gl.expand_dims(bounds[0] - first, 1)
    if len(bounds) == 2:
        keep = keep & (group < gl.expand_dims(bounds[1] - first, 1))
    grouped = gl.where(keep, grouped, float("-inf"))
    return gl.convert_layout(gl.reshape(grouped, [M, rows]), x.type.layout, assert_trivial=True)
