"""Keys and values where a server keeps them: rows of a cache, contiguous or in pages; and queries packed by head.

A tile of keys is loaded in boxes of (`config.box` rows, 64 columns), each a TMA copy of its own: with pages, a box lies in
one page. The caches are described to TMA as in kv_source.py, pages (or cache entries) in the place of batch entries, so rows
at or past a sequence's length are out of bounds and read as zeros, whatever the page holds there.

In shared memory a tile of (keys, columns) with the 128-byte swizzle is its blocks of 64 columns one after the other, each with
its rows one after the other: the boxes fill it in that order, which is all that `_allocate_part` says.

A block of 64 query rows is `heads` heads of one key/value head times 64 / heads positions (chunk_config.Packing): a TMA box of
(positions, heads, 64 columns). What it reads past the group or past the sequence are rows that nobody writes.
"""

import math

from tessera.backends.hopper.chunk_config import COLUMNS as BOX_COLUMNS
from tessera.backends.hopper.pieces.kv_source import WRAP
from tessera.backends.hopper.pieces.tiles import has
from tessera.jit.compat import aggregate, gl, gluon, tma_load

COLUMNS = gl.constexpr(BOX_COLUMNS)
PAGE_READS = gl.constexpr(4)
"""Entries of the page table that are read at once, before the copies that need them."""


@aggregate
class Cache:
    """The sequences of a cache: cache_seqlens, cache_leftpad, cache_batch_idx, int32 (batch,), the last two where the config has
    them; `capacity` rows at most in each; `appended` rows stand past cache_seqlens."""

    seqlens: gl.tensor
    leftpad: gl.tensor
    batch_index: gl.tensor
    capacity: gl.tensor
    appended: gl.tensor

    @gluon.constexpr_function
    def __init__(self, seqlens, leftpad, batch_index, capacity, appended):
        self.seqlens = seqlens
        self.leftpad = leftpad
        self.batch_index = batch_index
        self.capacity = capacity
        self.appended = appended


@aggregate
class CacheSequence:
    """One sequence. Rows q_begin .. + q_rows are its output, the first q_live of them attend; its visible keys are the cache's
    rows k_begin .. + k_rows, and position i's diagonal stands at key i + diagonal, counted from k_begin."""

    batch: gl.tensor
    q_begin: gl.tensor
    q_rows: gl.tensor
    q_live: gl.tensor
    k_begin: gl.tensor
    k_rows: gl.tensor
    diagonal: gl.tensor

    @gluon.constexpr_function
    def __init__(self, batch, q_begin, q_rows, q_live, k_begin, k_rows, diagonal):
        self.batch = batch
        self.q_begin = q_begin
        self.q_rows = q_rows
        self.q_live = q_live
        self.k_begin = k_begin
        self.k_rows = k_rows
        self.diagonal = diagonal


@aggregate
class Pages:
    """page_table int32 (batch, per_sequence) with rows `stride` apart, into `count` pages of `size` rows. A contiguous cache
    has `count` entries and no table."""

    table: gl.tensor
    stride: gl.tensor
    per_sequence: gl.tensor
    count: gl.tensor
    size: gl.tensor

    @gluon.constexpr_function
    def __init__(self, table, stride, per_sequence, count, size):
        self.table = table
        self.stride = stride
        self.per_sequence = per_sequence
        self.count = count
        self.size = size


@aggregate
class Source:
    """One sequence's rows of one cache tensor: `pitch` rows lie between the beginnings of two pages (or entries)."""

    pages: Pages
    pitch: gl.tensor
    entry: gl.tensor
    head: gl.tensor
    first: gl.tensor
    count: gl.tensor

    @gluon.constexpr_function
    def __init__(self, pages, pitch, entry, head, first, count):
        self.pages = pages
        self.pitch = pitch
        self.entry = entry
        self.head = head
        self.first = first
        self.count = count


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
    return CacheSequence(index, q_begin, q_rows, q_rows, start, gl.maximum(end - start, 0), end - start - q_rows)


@gluon.jit
def cache_source(config: gl.constexpr, cache, pages, seq, head, pitch):
    entry = seq.batch
    if has(config, "batch_index"):
        entry = gl.minimum(gl.maximum(gl.load(cache.batch_index + seq.batch), 0), pages.count - 1)
    return Source(pages, pitch, entry, head, seq.k_begin, seq.k_rows)


@gluon.jit
def _first_rows(source, key, step: gl.constexpr, count: gl.constexpr):
    """Where `count` boxes `step` keys apart begin in the pool; page numbers out of range are brought into it."""
    table = source.pages.table + source.entry.to(gl.int64) * source.pages.stride
    rows = ()
    for i in gl.static_range(count):
        place = (key + i * step) // source.pages.size
        page = gl.load(table + gl.minimum(place, source.pages.per_sequence - 1))
        page = gl.minimum(gl.maximum(page, 0), source.pages.count - 1)
        rows = rows + (page * source.pitch + key + i * step - place * source.pages.size,)
    return rows


@gluon.constexpr_function
def _blocks(parts, part):
    """Blocks of 64 columns of a part."""
    return parts.dims[part] // BOX_COLUMNS


@gluon.jit
def _load_columns(tiles, boxes, place, bar, where, parts: gl.constexpr):
    """One box of rows, 64 columns at a time: box `place` = (slot, boxes a block of columns, box), rows `where` of the map."""
    slot, count, box = place
    head, end, row = where
    for part in gl.static_range(len(boxes)):
        for block in gl.static_range(_blocks(parts, part)):
            box_of_part = (slot * _blocks(parts, part) + block) * count + box
            column = parts.columns[part] + block * COLUMNS
            tma_load(tiles, [WRAP, end, head, row, column], bar, boxes[part].index(box_of_part))


@gluon.jit
def load_keys(config: gl.constexpr, tiles, source, boxes, place, parts: gl.constexpr):
    """Start the copies of one tile of keys (or values); `place` = (slot, barrier, the tile's first row in the sequence)."""
    slot, bar, row = place
    if has(config, "pages"):
        count: gl.constexpr = config.keys // config.box
        at_once: gl.constexpr = count if count < PAGE_READS else PAGE_READS
        for some in range(count // at_once):
            firsts = _first_rows(source, row + some * (at_once * config.box), config.box, at_once)
            for i in gl.static_range(at_once):
                box = some * at_once + i
                valid = gl.minimum(gl.maximum(source.count - row - box * config.box, 0), config.box)
                where = (source.head, firsts[i] + valid, WRAP - valid)
                _load_columns(tiles, boxes, (slot, count, box), bar, where, parts)
    else:
        first = source.entry * source.pitch + source.first
        where = (source.head, first + source.count, WRAP - source.count + row)
        _load_columns(tiles, boxes, (slot, 1, 0), bar, where, parts)


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
def _box_count(shape, box):
    return math.prod(shape) // math.prod(box)


@gluon.jit
def _allocate_part(tiles, slots: gl.constexpr, rows: gl.constexpr, columns: gl.constexpr):
    layout: gl.constexpr = _matrix_layout(tiles.dtype, rows, columns)
    box: gl.constexpr = tiles.block_type.shape
    count: gl.constexpr = _box_count([slots, rows, columns], box)
    matrix = gl.allocate_shared_memory(tiles.dtype, [slots, rows, columns], layout)
    return matrix, matrix._reinterpret(tiles.dtype, [count] + box, tiles.layout)


@gluon.jit
def allocate_parts(tiles, slots: gl.constexpr, rows: gl.constexpr, parts: gl.constexpr):
    """`slots` tiles of `rows` rows, one buffer a part of the head dim, as products see them and as the boxes that fill them."""
    matrices = ()
    boxes = ()
    for part in gl.static_range(len(parts.dims)):
        matrix, of_boxes = _allocate_part(tiles, slots, rows, parts.dims[part])
        matrices = matrices + (matrix,)
        boxes = boxes + (of_boxes,)
    return matrices, boxes
