"""The backward's warp that adds dQ up in a fixed order (see pieces/sums.py): part after part from the consumers.

Tiles of keys add to the same rows of dQ: the tile with key 0 first, or, under a diagonal, the tile that begins at it first.
A row block's parts then come one after another without anybody waiting long, because a tile that begins a step later
reaches every row block a step later. A tile only waits for tiles that were drawn before it (backward.py draws them from a
counter), and those are running: so every wait ends.
"""

from tessera.backends.hopper.pieces.key_tiles import locate_keys
from tessera.backends.hopper.pieces.row_ranges import row_blocks
from tessera.backends.hopper.pieces.sums import adds_in_order, await_mark, row_block, set_mark, where_part_lies
from tessera.backends.hopper.pieces.tiles import has
from tessera.jit.compat import gl, gluon, tma_reduce_add, tma_store, tma_store_wait


@gluon.jit
def _tile_before(config: gl.constexpr, call, tile):
    """The tile whose parts come before this one's: its number, and the row blocks it sees, from `begin` to before `end`."""
    if has(config, "right"):
        first = tile.first + config.keys
    else:
        first = tile.first - config.keys
    begin, count = row_blocks(config, call.band, tile.seq, gl.maximum(first, 0))
    return first // config.keys, begin, gl.where(first < 0, begin, begin + count)


@gluon.jit
def _write_in_order(config: gl.constexpr, dq_map, sums, marks, call):
    """A row block's mark is set when the next one's first part is under way, so that nobody waits for stores to be complete."""
    parts: gl.constexpr = config.parts
    tile = locate_keys(config, call, call.order.number)
    begin, count = row_blocks(config, call.band, tile.seq, tile.first)
    number = tile.first // config.keys + 1
    before, before_begin, before_end = _tile_before(config, call, tile)
    last = marks
    for n in range(count * call.group):
        block = begin + n % count
        place = row_block(call, tile, n // count, block)
        is_first = (block < before_begin) | (block >= before_end)
        if not is_first:
            await_mark(marks + place, before + 1)
        for j in gl.static_range(parts):
            m = n * parts + j
            sums.ring.wait(m)
            part = sums.parts.index(sums.ring.slot(m))
            if is_first:
                tma_store(dq_map, where_part_lies(config, place, j), part)  # nothing lies there yet
            else:
                tma_reduce_add(dq_map, where_part_lies(config, place, j), part)
            if m > 0:  # by now the part before has been read
                tma_store_wait(1)
                sums.ring.release(m - 1)
            if j == 0 and n > 0:
                set_mark(last, number, 1)
        last = marks + place
    if count > 0:
        set_mark(last, number, 0)


@gluon.jit
def writer_of_dq(config: gl.constexpr, dq_map, sums, marks, call):
    if adds_in_order(config):  # else the consumers add
        _write_in_order(config, dq_map, sums, marks, call)
        tma_store_wait(0)
