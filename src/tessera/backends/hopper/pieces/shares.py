"""Which keys of which sequence a program attends to: two schedules, both worked out on the device from the lengths there.

split      (Flash-Decoding) one program a (part, item, sequence), an item being a key/value head and a block of query rows.
           A sequence's tiles are cut into `splits` equal parts, or fewer, of at least `least` tiles: by its own length alone.
stream_k   (Lean Attention, arXiv 2405.10480) every program gets the same number of tiles, whatever the lengths: the tiles of all
           sequences and items stand in one line, and each program takes its stretch of it, over the ends of items; but where
           all items turn out to be equally long, and few, each is shared by a crew of its own.

A part of an item that is not all of it leaves a partial result in a slot; the last one to finish adds them up (pieces/parts.py).
"""

from tessera.backends.hopper.decode_config import ROWS
from tessera.backends.hopper.pieces.cached import Cached, cached, first_row_block, key_tiles, row_blocks
from tessera.backends.hopper.pieces.tiles import has
from tessera.jit.compat import aggregate, gl, gluon

SCANNED = gl.constexpr(128)
"""Sequences that are looked at side by side."""
M = gl.constexpr(ROWS)


@aggregate
class Share:
    """A program's tiles: numbers `position` .. `stop` of its line. stream_k: `index` is the sequence that tile `position` is of,
    `before` the number of its first tile. `crew` programs share `period` tiles at a time: all tiles, or those of one item."""

    position: gl.tensor
    stop: gl.tensor
    index: gl.tensor
    before: gl.tensor
    period: gl.tensor
    crew: gl.tensor

    @gluon.constexpr_function
    def __init__(self, position, stop, index, before, period, crew):
        self.position = position
        self.stop = stop
        self.index = index
        self.before = before
        self.period = period
        self.crew = crew


@aggregate
class Segment:
    """Tiles `begin` .. `end` of one item, part `part` of `parts`. `item` numbers its ticket, `slots` its first partial result."""

    seq: Cached
    head: gl.tensor
    block: gl.tensor
    begin: gl.tensor
    end: gl.tensor
    part: gl.tensor
    parts: gl.tensor
    item: gl.tensor
    slots: gl.tensor

    @gluon.constexpr_function
    def __init__(self, seq, head, block, begin, end, part, parts, item, slots):
        self.seq = seq
        self.head = head
        self.block = block
        self.begin = begin
        self.end = end
        self.part = part
        self.parts = parts
        self.item = item
        self.slots = slots


@gluon.jit
def slot_of(config: gl.constexpr, slots, part):
    """The slot of an item's part. stream_k: program p has the slots 2 p and 2 p + 1, the second for an item that it begins."""
    if has(config, "stream_k"):
        return slots + 2 * part + gl.where(part == 0, 1, 0)
    else:
        return slots + part


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _items_and_tiles(config: gl.constexpr, call, index):
    """Items of sequence `index` (or of each of a vector of them), and tiles of an item; no items past the batch."""
    seq = cached(config, call.places, call.sizes, index)
    begin, end = key_tiles(config, call.sizes, seq)
    items = row_blocks(call.sizes, seq, M) * call.sizes.heads_kv
    return gl.where(index < call.sizes.batch, items, 0), end - begin


@gluon.jit
def _tiles_of(config: gl.constexpr, call, index):
    items, tiles = _items_and_tiles(config, call, index)
    return items * tiles


@gluon.jit
def _measure(config: gl.constexpr, call, lane):
    """(all tiles, tiles of the longest item, of the shortest)."""
    total = call.sizes.batch * 0
    longest = total
    shortest = total + (1 << 30)
    for first in range(0, call.sizes.batch, SCANNED):
        items, tiles = _items_and_tiles(config, call, first + lane)
        total += gl.sum(items * tiles, axis=0)
        longest = gl.maximum(longest, gl.max(tiles, axis=0))  # past the batch the last sequence is seen again
        shortest = gl.minimum(shortest, -gl.max(-tiles, axis=0))
    return total, longest, shortest


@gluon.jit
def _find(config: gl.constexpr, call, lane, position):
    """The sequence that a tile is of, and its first tile."""
    index = position * 0
    before = position * 0
    seen = position * 0
    for first in range(0, call.sizes.batch, SCANNED):
        upto = seen + gl.associative_scan(_tiles_of(config, call, first + lane), 0, _add)
        passed = upto <= position
        index += gl.sum(passed.to(gl.int32), axis=0)
        before = gl.maximum(before, gl.max(gl.where(passed, upto, 0), axis=0))
        seen = gl.max(upto, axis=0)
    return index, before


@gluon.jit
def _stretch(config: gl.constexpr, call, warps: gl.constexpr):
    """This program's stretch of the line of all tiles, and the sequence in which it begins. Where all items are equally long,
    each has a crew of `split.crew` programs of its own, if there are so many: nobody then works on two items."""
    layout: gl.constexpr = gl.BlockedLayout([SCANNED // 32], [32], [warps], [0])  # every warp has all of them: no barriers
    lane = gl.arange(0, SCANNED, layout)
    program = gl.program_id(0)
    own_crew = gl.maximum(call.split.crew, 1)
    team = program // own_crew
    member = program - team * own_crew
    sequence = team // gl.maximum(call.sizes.heads_kv * call.sizes.row_blocks, 1)
    total, longest, shortest = _measure(config, call, lane)
    even = (longest == shortest) & (call.split.crew > 0)
    period = gl.where(even, longest, gl.maximum(total, 1))
    crew = gl.where(even, own_crew, gl.num_programs(0))
    place = gl.where(even, member, program)
    quota = period // crew
    longer = period - quota * crew
    position = place * quota + gl.minimum(place, longer)
    stop = position + quota + gl.where(place < longer, 1, 0)
    index = sequence
    before = sequence * call.sizes.heads_kv * call.sizes.row_blocks * period
    if even:
        position += team * period
        stop += team * period
    else:
        index, before = _find(config, call, lane, position)
    return Share(position, gl.minimum(stop, total), index, before, period, crew)


@gluon.jit
def _part_length(split, tiles):
    """Tiles of one part of a sequence of `tiles` tiles."""
    return gl.maximum((tiles + split.splits - 1) // split.splits, split.least)


@gluon.jit
def first_share(config: gl.constexpr, call, warps: gl.constexpr):
    """What this program has to do, as seen by a partition of `warps` warps."""
    if has(config, "stream_k"):
        return _stretch(config, call, warps)
    else:
        index = gl.program_id(2)
        seq = cached(config, call.places, call.sizes, index)
        begin, end = key_tiles(config, call.sizes, seq)
        used = gl.program_id(0) * _part_length(call.split, end - begin) < end - begin
        used = used & (gl.program_id(1) // call.sizes.heads_kv < row_blocks(call.sizes, seq, M))
        zero = index * 0
        return Share(zero, gl.where(used, 1, zero), index, zero, zero, zero)


@gluon.jit
def last_of(share):
    """The end of a share that has been worked through: segment_of finds its last item."""
    return Share(share.stop - 1, share.stop, share.index, share.before, share.period, share.crew)


@gluon.jit
def segment_of(config: gl.constexpr, call, share):
    """The part of an item at a share's position."""
    seq = cached(config, call.places, call.sizes, share.index)
    begin, end = key_tiles(config, call.sizes, seq)
    tiles = end - begin
    if has(config, "stream_k"):
        number = (share.position - share.before) // tiles
        first = share.before + number * tiles
        parts_begin = _program_of(share, first)
        parts = _program_of(share, first + tiles - 1) - parts_begin + 1
        part = gl.program_id(0) - parts_begin
        start = begin + share.position - first
        stop = begin + gl.minimum(share.stop - first, tiles)
    else:
        number = gl.program_id(1)
        length = _part_length(call.split, tiles)
        parts = (tiles + length - 1) // length
        part = gl.program_id(0)
        start = begin + part * length
        stop = gl.minimum(start + length, end)
    block = number // call.sizes.heads_kv
    head = number - block * call.sizes.heads_kv
    item = (first_row_block(config, call.sizes, seq, M) + block) * call.sizes.heads_kv + head
    if has(config, "stream_k"):
        slots = 2 * parts_begin
    else:
        slots = item * call.split.splits
    return Segment(seq, head, block, start, stop, part, parts, item, slots)


@gluon.jit
def _program_of(share, tile):
    """The program in whose stretch a tile lies: of each crew the first `longer` have one tile more than the others."""
    round = tile // share.period
    tile -= round * share.period
    quota = share.period // share.crew
    longer = share.period - quota * share.crew
    head = longer * (quota + 1)
    place = gl.where(tile < head, tile // (quota + 1), longer + (tile - head) // gl.maximum(quota, 1))
    return round * share.crew + place


@gluon.jit
def after(config: gl.constexpr, call, share, segment):
    """The share once a segment is done."""
    position = share.position + 1
    index = share.index
    before = share.before
    if has(config, "stream_k"):
        position = share.position + segment.end - segment.begin
        following = before + _tiles_of(config, call, index)
        while (position < share.stop) & (following <= position):
            before = following
            index += 1
            following = before + _tiles_of(config, call, index)
    return Share(position, share.stop, index, before, share.period, share.crew)
