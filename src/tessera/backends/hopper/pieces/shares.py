"""Which keys of which sequence a program attends to: two schedules, both worked out on the device from the lengths there.

split      (Flash-Decoding) one program a (part, item, sequence), an item being a key/value head and a block of query rows.
           A sequence's tiles are cut into `splits` equal parts, or fewer, of at least `least` tiles: by its own length alone.
stream_k   (Lean Attention, arXiv 2405.10480) every program gets the same number of tiles, whatever the lengths: the tiles of all
           sequences stand in one line, and each program takes its stretch of it, over the ends of items. Programs of neighbouring
           heads take the same stretch side by side, a team: memory opens a row once for all of them. But where all items turn
           out to be equally long they are done in turns: in all but the last each program has an item alone, in the last one
           each of the items that are left is shared by a crew of programs.

However it is done, neighbours read neighbouring heads of the same rows at the same time, as far as they keep step: `depth`
bounds how far one can run ahead. A part of an item that is not all of it leaves a partial result in a slot; the last one to
finish adds them up (pieces/parts.py).
"""

from tessera.backends.hopper.decode_config import ROWS
from tessera.backends.hopper.pieces.cached import Cached, cached, first_row_block, key_tiles, row_blocks
from tessera.backends.hopper.pieces.tiles import has
from tessera.jit.compat import aggregate, gl, gluon

SCANNED = gl.constexpr(128)
"""Sequences that are looked at side by side."""
M = gl.constexpr(ROWS)


@aggregate
class Line:
    """stream_k: `length` tiles in one line, shared by `programs` programs, of which this one is number `place`: all tiles by one
    member of each team, or one item's by its crew. `slots`: the slots of these programs' partial results begin at 2 `slots`."""

    length: gl.tensor
    slots: gl.tensor
    programs: gl.tensor
    place: gl.tensor


@aggregate
class Share:
    """A program's tiles: numbers `position` .. `stop` of its line. stream_k: tile `position` is of row block `block` and head
    `head` of sequence `index`, an item whose first tile is number `first` of `line`; `turn` is -1 along the line of all tiles.
    `depth`: stages of the ring to use."""

    position: gl.tensor
    stop: gl.tensor
    index: gl.tensor
    block: gl.tensor
    head: gl.tensor
    first: gl.tensor
    line: Line
    turn: gl.tensor
    depth: gl.tensor


@aggregate
class Turn:
    """stream_k, turn `number`: the item at row block `block` and head `head` of sequence `index` is shared by `crew` programs
    from number `begin` on; `works` is 0 where there is none. split: the item alone."""

    number: gl.tensor
    index: gl.tensor
    block: gl.tensor
    head: gl.tensor
    begin: gl.tensor
    crew: gl.tensor
    works: gl.tensor


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


@gluon.jit
def slot_of(config: gl.constexpr, slots, part):
    """The slot of an item's part. stream_k: each program has two, the second one for an item that it begins."""
    if has(config, "stream_k"):
        return slots + 2 * part + gl.where(part == 0, 1, 0)
    else:
        return slots + part


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _items_and_tiles(config: gl.constexpr, call, index):
    """Items that a team goes through in sequence `index` (or in each of a vector of them), and tiles of an item; no items past
    the batch."""
    seq = cached(config, call.places, call.sizes, index)
    begin, end = key_tiles(config, call.sizes, seq)
    items = row_blocks(call.sizes, seq, M) * call.split.head_groups
    return gl.where(index < call.sizes.batch, items, 0), end - begin


@gluon.jit
def _tiles_of(config: gl.constexpr, call, index):
    items, tiles = _items_and_tiles(config, call, index)
    return items * tiles


@gluon.jit
def _all_tiles(config: gl.constexpr, call, lane):
    """Tiles of all items of all sequences, as a team counts them."""
    total = call.sizes.batch * 0
    for first in range(0, call.sizes.batch, SCANNED):
        total += gl.sum(_tiles_of(config, call, first + lane), axis=0)
    return total


@gluon.jit
def _any_lane(condition):
    """Whether a condition holds in any lane of the warp. One vote: a sum over lanes takes five shuffles."""
    asm: gl.constexpr = "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.any.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }"
    return gl.inline_asm_elementwise(asm, "=r,r", [condition], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _lane():
    return gl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _differences(a, b):
    """Not 0 where two sequences have other rows or keys."""
    return (a.q_begin ^ b.q_begin) | (a.q_rows ^ b.q_rows) | (a.k_begin ^ b.k_begin) | (a.k_end ^ b.k_end)


@gluon.jit
def _are_all_like(config: gl.constexpr, call, seq):
    """Whether every sequence has the rows and keys of `seq`: each lane looks at a few sequences, and they vote."""
    lane = _lane()
    differs = call.sizes.batch * 0
    for first in range(0, call.sizes.batch, SCANNED):
        for turn in gl.static_range(SCANNED // 32):
            others = cached(config, call.places, call.sizes, first + turn * 32 + lane)  # past the batch the last one again
            differs = differs | _differences(others, seq)
    return _any_lane(differs) == 0


@gluon.jit
def _are_equally_long(config: gl.constexpr, call, tiles):
    """The same of the tiles that items have: whether those of every sequence have so many."""
    lane = _lane()
    differs = call.sizes.batch * 0
    for first in range(0, call.sizes.batch, SCANNED):
        for turn in gl.static_range(SCANNED // 32):
            _, others = _items_and_tiles(config, call, first + turn * 32 + lane)  # past the batch the last one again
            differs += gl.where(others == tiles, 0, 1)
    return _any_lane(differs) == 0


@gluon.jit
def _find(config: gl.constexpr, call, lane, position):
    """The sequence that a tile of the line of all tiles is of, and its first tile."""
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
def _find_item(config: gl.constexpr, call, lane, position):
    """Sequence, row block and the team's first head that a tile of the line of all tiles is of, and the item's first tile."""
    index, before = _find(config, call, lane, position)
    _, tiles = _items_and_tiles(config, call, index)
    number = (position - before) // tiles
    block = number // call.split.head_groups
    return index, block, (number - block * call.split.head_groups) * call.split.team, before + number * tiles


@gluon.jit
def _stretch(config: gl.constexpr, call, turn, warps: gl.constexpr):
    """This program's stretch of the line of all tiles; or, where all items turn out to be equally long, its first turn."""
    layout: gl.constexpr = gl.BlockedLayout([SCANNED // 32], [32], [warps], [0])  # every warp has all of them: no barriers
    lane = gl.arange(0, SCANNED, layout)
    _, tiles = _items_and_tiles(config, call, turn.index)
    if (call.split.rounds + call.split.crew > 0) & _are_equally_long(config, call, tiles):
        share = _share_of(call, turn, tiles)
    else:
        total = _all_tiles(config, call, lane)
        zero = total * 0
        teams = call.split.teams
        place = gl.program_id(0) // call.split.team
        member = gl.program_id(0) - place * call.split.team
        position, stop = _part_of(total, teams, gl.minimum(place, teams - 1))
        stop = gl.where(place < teams, stop, position)
        index, block, head, first = _find_item(config, call, lane, position)
        line = Line(total, member * teams, teams, place)
        share = Share(position, stop, index, block, head + member, first, line, zero - 1, call.split.line_depth)
    return share


@gluon.jit
def _part_of(tiles, programs, place):
    """Tiles begin .. end of one of so many programs: the first ones have one tile more than the others."""
    quota = tiles // programs
    longer = tiles - quota * programs
    begin = place * quota + gl.minimum(place, longer)
    return begin, begin + quota + gl.where(place < longer, 1, 0)


@gluon.jit
def _turn(call, number):
    """What is done in a turn, where all items are equally long: in the first `split.rounds` turns each program has an item alone,
    in the next one a crew has one together, and then there is nothing left."""
    programs = gl.num_programs(0)
    crew = gl.maximum(call.split.crew, 1)
    team = gl.program_id(0) // crew
    alone = number < call.split.rounds
    item = gl.where(alone, number * programs + gl.program_id(0), call.split.rounds * programs + team)
    begin = gl.where(alone, gl.program_id(0), team * crew)
    items = call.sizes.heads_kv * call.sizes.row_blocks
    index = item // items
    block = (item - index * items) // call.sizes.heads_kv
    head = item - index * items - block * call.sizes.heads_kv
    works = alone | ((number == call.split.rounds) & (call.split.crew > 0) & (index < call.sizes.batch))
    return Turn(number, index, block, head, begin, gl.where(alone, 1, crew), gl.where(works, 1, 0))


@gluon.jit
def _share_of(call, turn, tiles):
    """What a program does in its turn, where all items have so many tiles."""
    place = gl.program_id(0) - turn.begin
    position, stop = _part_of(tiles, turn.crew, place)
    stop = gl.where(turn.works > 0, stop, position)
    line = Line(tiles, turn.begin, turn.crew, place)
    return Share(position, stop, turn.index, turn.block, turn.head, turn.index * 0, line, turn.number, call.split.depth)


@gluon.jit
def _now(number):
    """A number that is worked out here, not where it is first used."""
    return gl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def first_turn(config: gl.constexpr, call):
    """All that a program knows of its work before it has read a length: to be called before it waits for them."""
    zero = gl.program_id(0) * 0
    if has(config, "stream_k"):
        turn = _turn(call, zero)
        return Turn(zero, _now(turn.index), _now(turn.block), _now(turn.head), _now(turn.begin), turn.crew, _now(turn.works))
    else:
        block = gl.program_id(1) // call.sizes.heads_kv
        head = gl.program_id(1) - block * call.sizes.heads_kv
        return Turn(zero, gl.program_id(2), _now(block), _now(head), zero, zero, zero)


@gluon.jit
def _part_length(split, tiles):
    """Tiles of one part of a sequence of `tiles` tiles."""
    return gl.maximum((tiles + split.splits - 1) // split.splits, split.least)


@gluon.jit
def first_share(config: gl.constexpr, call, turn, warps: gl.constexpr):
    """What this program has to do, as seen by a partition of `warps` warps; `turn` is `first_turn`'s."""
    if has(config, "stream_k"):
        return _stretch(config, call, turn, warps)
    else:
        seq = cached(config, call.places, call.sizes, turn.index)
        begin, end = key_tiles(config, call.sizes, seq)
        used = gl.program_id(0) * _part_length(call.split, end - begin) < end - begin
        used = used & (turn.block < row_blocks(call.sizes, seq, M))
        zero = turn.number
        stop = gl.where(used, 1, zero)
        return Share(zero, stop, turn.index, turn.block, turn.head, zero, Line(zero, zero, zero, zero), zero, call.split.depth)


@gluon.jit
def expected(config: gl.constexpr, call, turn):
    """A program's share and its first segment as lengths say before they may be read: what `confirmed` then has to compare. Along
    the line of all tiles nothing is expected (the share's turn is -1): where that is cut depends on every length."""
    if has(config, "stream_k"):
        seq = cached(config, call.places, call.sizes, turn.index)
        begin, end = key_tiles(config, call.sizes, seq)
        share = _share_of(call, turn, end - begin)
        alike = (call.split.rounds + call.split.crew > 0) & _are_all_like(config, call, seq)
        number = gl.where(alike, share.turn, -1)
        line = share.line
        share = Share(share.position, share.stop, share.index, share.block, share.head, share.first, line, number, share.depth)
    else:
        share = first_share(config, call, turn, 1)
    return share, segment_of(config, call, share)


@gluon.jit
def confirmed(config: gl.constexpr, call, turn, expectation, warps: gl.constexpr):
    """The share and its first segment by lengths as they stand now, as seen by a partition of `warps` warps. Where they are those
    that were expected, all that is left to do is to compare them, and the first key is asked for sooner."""
    share, segment = expectation
    if has(config, "stream_k"):
        same = share.turn >= 0
        if same:
            same = _are_all_like(config, call, segment.seq)
    else:
        same = _differences(cached(config, call.places, call.sizes, turn.index), segment.seq) == 0
    if not same:
        share = first_share(config, call, turn, warps)
        segment = segment_of(config, call, share)
    return share, segment


@gluon.jit
def segment_of(config: gl.constexpr, call, share):
    """The part of an item at a share's position."""
    seq = cached(config, call.places, call.sizes, share.index)
    begin, end = key_tiles(config, call.sizes, seq)
    tiles = end - begin
    item = (first_row_block(config, call.sizes, seq, M) + share.block) * call.sizes.heads_kv + share.head
    if has(config, "stream_k"):
        line = share.line
        place = line.place * 0
        parts = gl.minimum(line.programs, tiles)
        if line.length != tiles:
            place = _place_of(line, share.first)
            parts = _place_of(line, share.first + tiles - 1) - place + 1
        part = line.place - place
        start = begin + share.position - share.first
        stop = begin + gl.minimum(share.stop - share.first, tiles)
        slots = 2 * (line.slots + place)
    else:
        length = _part_length(call.split, tiles)
        parts = (tiles + length - 1) // length
        part = gl.program_id(0)
        start = begin + part * length
        stop = gl.minimum(start + length, end)
        slots = item * call.split.splits
    return Segment(seq, share.head, share.block, start, stop, part, parts, item, slots)


@gluon.jit
def _place_of(line, tile):
    """Whose of a line's programs a tile is: the first `longer` of them have one tile more than the others."""
    quota = line.length // line.programs
    longer = line.length - quota * line.programs
    head = longer * (quota + 1)
    return gl.where(tile < head, tile // (quota + 1), longer + (tile - head) // gl.maximum(quota, 1))


@gluon.jit
def _blocks_of(config: gl.constexpr, call, index):
    return row_blocks(call.sizes, cached(config, call.places, call.sizes, index), M)


@gluon.jit
def after(config: gl.constexpr, call, share, segment):
    """The share once a segment is done: at the next item, if there is one."""
    if has(config, "stream_k"):
        if share.turn < 0:
            share = _next_item(config, call, share, segment)
        elif share.turn < call.split.rounds:
            share = _share_of(call, _turn(call, share.turn + 1), share.line.length)
        else:  # a crew's turn is the last: its results are waited for, and a turn takes four divisions
            share = _spent(share)
        return share
    else:
        return _spent(share)


@gluon.jit
def _spent(share):
    """The share with nothing left of it."""
    return Share(share.stop, share.stop, share.index, share.block, share.head, share.first, share.line, share.turn, share.depth)


@gluon.jit
def _next_item(config: gl.constexpr, call, share, segment):
    """Along the line of all tiles."""
    position = share.position + segment.end - segment.begin
    head = share.head + call.split.team
    block = share.block
    index = share.index
    if head >= call.sizes.heads_kv:
        head -= call.sizes.heads_kv
        block += 1
    if has(config, "packed"):
        while (position < share.stop) & (block >= _blocks_of(config, call, index)):
            block = block * 0
            index += 1
    elif block == call.sizes.row_blocks:
        block = block * 0
        index += 1
    return Share(position, share.stop, index, block, head, position, share.line, share.turn, share.depth)
