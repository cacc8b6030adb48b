"""Keys and values where a server keeps them: rows of a cache, contiguous or in pages; and queries packed by head.

A tile of keys is loaded in boxes of (`config.box` rows, 64 columns). Reading.BOXES: each is a TMA copy of its own, and with
pages lies in one page. The caches are described to TMA as in kv_source.py, pages (or cache entries) in the place of batch
entries, so rows at or past a sequence's length are out of bounds and read as zeros, whatever the page holds there.
Reading.ROWS: threads look up each row's page and copy it.

In shared memory a tile of (keys, columns) with the 128-byte swizzle is its blocks of 64 columns one after the other, each with
its rows one after the other: the boxes fill it in that order, which is all that `_allocate_part` says.

A block of 64 query rows is `heads` heads of one key/value head times 64 / heads positions (chunk_config.Packing): a TMA box of
(positions, heads, 64 columns). What it reads past the group or past the sequence are rows that nobody writes.
"""

import math

from tessera.backends.hopper.chunk_config import COLUMNS as BOX_COLUMNS
from tessera.backends.hopper.chunk_config import Reading
from tessera.backends.hopper.pieces.kv_source import WRAP, Sequence
from tessera.backends.hopper.pieces.tiles import has
from tessera.jit.compat import aggregate, copy_to_shared, gl, gluon, reinterpret, tma_load, tma_load_as

COLUMNS = gl.constexpr(BOX_COLUMNS)


@aggregate
class Cache:
    """The sequences of a cache: cache_seqlens, cache_leftpad, cache_batch_idx, int32 (batch,), the last two where the config has
    them; `capacity` rows at most in each; `appended` rows stand past cache_seqlens."""

    seqlens: gl.tensor
    leftpad: gl.tensor
    batch_index: gl.tensor
    capacity: gl.tensor
    appended: gl.tensor


@aggregate
class Pages:
    """page_table int32 (batch, per_sequence) with rows `stride` apart, into `count` pages of `size` rows. A contiguous cache
    has `count` entries and no table."""

    table: gl.tensor
    stride: gl.tensor
    per_sequence: gl.tensor
    count: gl.tensor
    size: gl.tensor


@aggregate
class Rows:
    """Where the rows of one cache tensor lie: in elements from one page (or entry), row and head to the next; `pitch`: rows from
    one page to the next."""

    pointer: gl.tensor
    page: gl.tensor
    row: gl.tensor
    head: gl.tensor
    pitch: gl.tensor


@aggregate
class Source:
    """Rows first .. + count of one sequence, of one head."""

    rows: Rows
    pages: Pages
    entry: gl.tensor
    head: gl.tensor
    first: gl.tensor
    count: gl.tensor


@gluon.jit
def cache_sequence(config: gl.constexpr, cache, cu_q, index, seqlen_q):
    """Sequence `index`; its keys count from the first valid one. Lengths past the cache's capacity are cut to it."""
    q_begin = index * 0
    q_rows = q_begin + seqlen_q
    if has(config, "varlen"):
        q_begin = gl.load(cu_q + index)
        q_rows = gl.load(cu_q + index + 1) - q_begin
    end = gl.load(cache.seqlens + index)
    if has(config, "append"):
        if has(config, "varlen"):
            end += q_rows
        else:
            end += cache.appended
    end = gl.minimum(end, cache.capacity)
    start = index * 0
    if has(config, "leftpad"):
        start = gl.maximum(gl.load(cache.leftpad + index), 0)
    return Sequence(index, q_begin, q_rows, q_rows, start, gl.maximum(end - start, 0), end - start - q_rows, index)


@gluon.jit
def cache_source(config: gl.constexpr, rows, pages, cache, seq, head):
    entry = seq.batch
    if has(config, "batch_index"):
        entry = gl.minimum(gl.maximum(gl.load(cache.batch_index + seq.batch), 0), pages.count - 1)
    return Source(rows, pages, entry, head, seq.k_begin, seq.k_rows)


COPYING_WARPS = 4
COPIED = gl.constexpr(16)
"""Rows that those warps copy at once: eight threads a row, 16 bytes each."""


@gluon.constexpr_function
def copies_rows(config):
    return config.reading is Reading.ROWS


@gluon.constexpr_function
def producer_warps(config):
    return COPYING_WARPS if copies_rows(config) else 1


@gluon.constexpr_function
def _blocks(parts, part):
    """Blocks of 64 columns of a part."""
    return parts.dims[part] // BOX_COLUMNS


# ------------------------------------------------------------------------------------------------ where a tile's rows lie


@gluon.constexpr_function
def _rows_layout():
    """A block of 64 columns over four warps: eight threads a row, 16 bytes each, COPIED rows at once."""
    return gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])


@gluon.constexpr_function
def _turns_layout():
    """The same, COPIED rows and COPIED rows: (turns, rows, columns)."""
    return gl.BlockedLayout([1, 1, 8], [1, 4, 8], [1, 4, 1], [2, 1, 0])


@gluon.constexpr_function
def _own_key_asm(config):
    """By TMA lane i has box i, by cp.async the i-th of the eight threads of a row the row 16 i after it."""
    number, rows = (config.keys // COPIED.value, COPIED.value) if config.reading is Reading.ROWS else (32, config.box)
    return f"{{ .reg .u32 own; mov.u32 own, %laneid; and.b32 own, own, {number - 1}; mad.lo.u32 $0, own, {rows}, $1; }}"


@gluon.jit
def find_pages(config: gl.constexpr, source, row):
    """Where the tile from row `row` of the sequence on lies in the pool of pages: each thread looks up one row's page, and has
    its number and the row's place in it, for `find_rows` to share. Without pages zeros, which nobody asks for.

    Asked for a tile before the copies that need it, which would wait for it. Keys and values lie in the same pages.
    """
    pages = source.pages
    if has(config, "pages"):
        first = gl.maximum(row, 0)
        if copies_rows(config):
            first = source.first + first + gl.arange(0, COPIED, gl.SliceLayout(0, gl.SliceLayout(2, _turns_layout())))
        asm: gl.constexpr = _own_key_asm(config)
        key = gl.inline_asm_elementwise(asm, "=r,r", [first], dtype=gl.int32, is_pure=False, pack=1)
        number = key // pages.size
        entries = pages.table + source.entry.to(gl.int64) * pages.stride + gl.minimum(number, pages.per_sequence - 1)
        page = gl.inline_asm_elementwise("ld.global.nc.u32 $0, [$1];", "=r,l", [entries], dtype=gl.int32, is_pure=False, pack=1)
        return page, key - number * pages.size
    else:
        return row * 0, row * 0


@gluon.jit
def _of_rows(config: gl.constexpr, own):
    """What the eight threads of each row have looked up between them, of all the tile's rows. By shuffles: through shared memory,
    as convert_layout would do it, holds only while a warp's lanes stay together."""
    by_turn: gl.constexpr = gl.SliceLayout(2, _turns_layout())
    thread = gl.arange(0, config.keys // COPIED, gl.SliceLayout(1, by_turn))[:, None]
    asm: gl.constexpr = "shfl.sync.idx.b32 $0, $1, $2, 0x181f, 0xffffffff;"
    rows = gl.inline_asm_elementwise(asm, "=r,r,r", [own[None, :], thread], dtype=gl.int32, is_pure=False, pack=1)
    return gl.convert_layout(rows.reshape([config.keys]), gl.SliceLayout(1, _rows_layout()), assert_trivial=True)


@gluon.jit
def _widened(x, factor):
    """x * factor, 64 bits: one instruction. The compiler takes three more, once it has moved the factor out of a loop."""
    return gl.inline_asm_elementwise("mul.wide.s32 $0, $1, $2;", "=l,r,r", [x, factor], dtype=gl.int64, is_pure=True, pack=1)


@gluon.jit
def find_rows(config: gl.constexpr, source, found):
    """The rows of the pool that `find_pages` has found, page numbers out of range brought into it. By TMA, box i's first row in
    lane i; by cp.async, how many elements each row is away. Before the slot is waited for, not after."""
    page, place = found
    if has(config, "pages"):
        own = gl.minimum(gl.maximum(page, 0), source.pages.count - 1) * source.rows.pitch + place
        if copies_rows(config):
            return _widened(_of_rows(config, own), (source.rows.row // 8).to(gl.int32)) * 8
        else:
            return own
    else:
        return page


# ------------------------------------------------------------------------------------------------------ boxes, by TMA


@gluon.jit
def _from_lane(value, lane):
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r", [value, lane], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _load_box(tiles, boxes, place, bar, where, parts: gl.constexpr, HOW: gl.constexpr):
    """One box of rows, 64 columns at a time: box `place` = (slot, boxes a block of columns, box), rows `where` of the map. `HOW`:
    as tma_load_as has it, or None."""
    slot, count, box = place
    head, end, row = where
    for part in gl.static_range(len(boxes)):
        for block in gl.static_range(_blocks(parts, part)):
            box_of_part = (slot * _blocks(parts, part) + block) * count + box
            column = parts.columns[part] + block * COLUMNS
            if HOW is None:
                tma_load(tiles, [WRAP, end, head, row, column], bar, boxes[part].index(box_of_part))
            else:
                tma_load_as(HOW, tiles, [WRAP, end, head, row, column], bar, boxes[part].index(box_of_part))


@gluon.jit
def _load_boxes(config: gl.constexpr, tiles, source, boxes, place, parts: gl.constexpr, HOW: gl.constexpr):
    """`place` = (slot, barrier, the tile's first row in the sequence, its `find_rows`)."""
    slot, bar, row, own = place
    if has(config, "pages"):
        count: gl.constexpr = config.keys // config.box
        for box in gl.static_range(count):
            first = _from_lane(own, box)
            valid = gl.minimum(gl.maximum(source.count - row - box * config.box, 0), config.box)
            _load_box(tiles, boxes, (slot, count, box), bar, (source.head, first + valid, WRAP - valid), parts, HOW)
    else:
        first = source.entry * source.rows.pitch + source.first
        where = (source.head, first + source.count, WRAP - source.count + row)
        _load_box(tiles, boxes, (slot, 1, 0), bar, where, parts, HOW)


# --------------------------------------------------------------------------------------------------- rows, by cp.async


@gluon.jit
def _copy_rows(config: gl.constexpr, source, boxes, place, parts: gl.constexpr, WIDTH: gl.constexpr):
    """`place` = (slot, the tile's first row in the sequence, its `find_rows`). Rows past the sequence's end and columns from
    WIDTH on become zeros."""
    slot, row, offsets = place
    layout: gl.constexpr = _rows_layout()
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
    start = source.rows.pointer + source.head.to(gl.int64) * source.rows.head
    pointers = (start + columns) + offsets[:, None]
    left = source.count - row
    mask = (gl.arange(0, config.keys, gl.SliceLayout(1, layout)) < left)[:, None] & (columns < COLUMNS)
    for part in gl.static_range(len(boxes)):
        for block in gl.static_range(_blocks(parts, part)):
            column = parts.columns[part] + block * COLUMNS
            here = mask
            if parts.columns[part] + (block + 1) * COLUMNS > WIDTH:
                here = mask & (columns < WIDTH - column)
            buffer = boxes[part].index(slot * _blocks(parts, part) + block)
            copy_to_shared(buffer, pointers + column, mask=here)


@gluon.jit
def load_keys(config: gl.constexpr, stream, tiles, source, boxes, turn, parts: gl.constexpr, WIDTH: gl.constexpr):
    """Start the copies of one tile of keys (or values), `parts` of its columns of which there are WIDTH in all. `turn` = (use of
    the stream, the tile's first row in the sequence, its `find_rows`)."""
    n, row, where = turn
    stream.acquire(n)
    if copies_rows(config):
        _copy_rows(config, source, boxes, (stream.slot(n), row, where), parts, WIDTH)
        stream.publish(n)
    else:
        policy: gl.constexpr = config.policy
        bar = stream.expect(n, parts.row_bytes * config.keys)
        if len(stream.peer) == 0:
            _load_boxes(config, tiles, source, boxes, (stream.slot(n), bar, row, where), parts, policy)
        elif stream.peer[0].may_load(stream.slot(n), n // stream.slots):
            _load_boxes(config, tiles, source, boxes, (stream.slot(n), bar, row, where), parts, "multicast 3")


# ------------------------------------------------------------------------------------------------------------- queries


@gluon.jit
def load_queries(tiles, boxes, slot, bar, where, parts: gl.constexpr):
    """Start the copies of 64 packed query rows; `where` = (batch entry, first position, first head)."""
    batch, position, head = where
    for part in gl.static_range(len(boxes)):
        for block in gl.static_range(_blocks(parts, part)):
            box = slot * _blocks(parts, part) + block
            column = parts.columns[part] + block * COLUMNS
            tma_load(tiles, [batch, position, head, column], bar, boxes[part].index(box))


@gluon.constexpr_function
def _matrix_layout(dtype, rows, columns):
    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)


@gluon.constexpr_function
def key_box(config):
    """The shape of what is copied to shared memory at once: a TMA block, or rows of a cp.async."""
    return [config.box, BOX_COLUMNS] if config.reading is Reading.ROWS else [1, 1, 1, config.box, BOX_COLUMNS]


@gluon.constexpr_function
def query_box(config):
    return [1, config.packing.positions, config.packing.heads, BOX_COLUMNS]


@gluon.constexpr_function
def _box_count(shape, box):
    return math.prod(shape) // math.prod(box)


@gluon.jit
def _allocate_part(dtype: gl.constexpr, slots: gl.constexpr, rows: gl.constexpr, columns: gl.constexpr, box: gl.constexpr):
    layout: gl.constexpr = _matrix_layout(dtype, rows, columns)
    count: gl.constexpr = _box_count([slots, rows, columns], box)
    matrix = gl.allocate_shared_memory(dtype, [slots, rows, columns], layout)
    of_boxes: gl.constexpr = gl.NVMMASharedLayout.get_default_for(box, dtype)
    return matrix, reinterpret(matrix, dtype, [count] + box, of_boxes)


@gluon.jit
def allocate_parts(dtype: gl.constexpr, slots: gl.constexpr, rows: gl.constexpr, parts: gl.constexpr, BOX: gl.constexpr):
    """`slots` tiles of `rows` rows, one buffer a part of the head dim, as products see them and as the boxes that fill them."""
    matrices = ()
    boxes = ()
    for part in gl.static_range(len(parts.dims)):
        matrix, of_boxes = _allocate_part(dtype, slots, rows, parts.dims[part], BOX)
        matrices = matrices + (matrix,)
        boxes = boxes + (of_boxes,)
    return matrices, boxes
