"""Where the backward's work lies: its grid of key tiles, and the padded rows of its workspace.

The workspace (lse and D of each row, dQ in float32) has one line a query head. Each sequence's rows begin there at a multiple
of 128, so that whole tiles can be read, and added to, without touching a neighbour's. Packed sequence b begins at block
cu_q[b] / 128 + b: that is never fewer blocks than the sequences before it need, and is known from cu_q alone.
"""

from tessera.backends.hopper.backward_config import WORK_ROWS
from tessera.backends.hopper.pieces.kv_source import Lengths, Pitch, Sequence, Span, dense_sequence, packed_sequence
from tessera.backends.hopper.pieces.masking import Band, has_lower_bound
from tessera.backends.hopper.pieces.sums import adds_in_order, from_last_to_first
from tessera.backends.hopper.pieces.tiles import has
from tessera.jit.compat import aggregate, gl, gluon

WORK = gl.constexpr(WORK_ROWS)


@aggregate
class Order:
    """This program's tile is `number`. `blocks` key tiles a dense sequence; `section`: query rows, over all heads of a group,
    that share L2; `line`: rows of the workspace a head; `strands`: sums of dQ there (pieces/chain.py)."""

    number: gl.tensor
    blocks: gl.tensor
    section: gl.tensor
    line: gl.tensor
    strands: gl.tensor


@aggregate
class Call:
    """What one launch is asked. In packed calls seqlen_q and seqlen_k are totals. `pitch.o` is that of dO."""

    batch: gl.tensor
    heads_kv: gl.tensor
    group: gl.tensor
    seqlen_q: gl.tensor
    seqlen_k: gl.tensor
    band: Band
    lengths: Lengths
    pitch: Pitch
    order: Order


@aggregate
class KeyTile:
    """The keys of one head of one sequence from `first` on. `written`: the rows of dk and dv that the sequence's tiles write,
    which are more than the visible ones where lengths or padding hide some. `work`: its first row in the workspace. `falls`:
    whether tiles are added from the last to the first, where that is not the same for all."""

    seq: Sequence
    head: gl.tensor
    first: gl.tensor
    written: Span
    work: gl.tensor
    falls: gl.tensor

    @gluon.jit
    def queries(self, pitch):
        """The rows that attend to something: those after are read as zeros."""
        return Span(self.seq.batch * pitch + self.seq.q_begin, self.seq.q_live)


@gluon.jit
def _ordered(config: gl.constexpr, number, blocks, heads, section):
    """Tile `number` of blocks x heads as (block, head, falls). Where a diagonal makes the first blocks the longest they come
    first (longest processing time first), inside even sections of heads whose Q, dO and dQ share L2; or last, where dQ is
    summed in a fixed order (see chain.py). Where sections are narrow the last two are one: short tiles end the grid.

    The longest last end a grid badly. Where the other order does as well, sections take turns, and a second one's longest come
    first: who has had a short tile of the first begins early with a long one, so that tiles that follow each other in a head
    begin apart, and all programs end together. Rows then go from the last to the first (nth_place)."""
    if has(config, "right") or adds_in_order(config):
        sections = (heads + section - 1) // section
        section = (heads + sections - 1) // sections
        whole = blocks * section
        place = number // whole
        if config.sections_in_share > 1:
            last = gl.maximum(sections - 2, 0)
            place = gl.minimum(place, last)
            rest = number - place * whole
            size = gl.where(place < last, section, heads - place * section)
        else:
            rest = number - place * whole
            size = gl.maximum(gl.minimum(section, heads - place * section), 1)  # the last section may be short
        block = rest // size
        head = place * section + rest - block * size
        falls = sections > 0
        if config.sections_take_turns:
            falls = place % 2 == 0
            block = gl.where(falls, blocks - 1 - block, block)
        elif adds_in_order(config) and from_last_to_first(config):
            block = blocks - 1 - block
        return block, head, falls
    else:
        head = number // blocks
        return number - head * blocks, head, blocks > 0


@gluon.jit
def _first_block(offsets, index, rows: gl.constexpr):
    """Packed sequence `index`'s first block of `rows` rows."""
    return gl.load(offsets + index) // rows + index


@gluon.jit
def _find(offsets, batch, wanted, rows: gl.constexpr):
    """The packed sequence that block `wanted` belongs to; `batch` is what lies after the last."""
    low = wanted * 0
    high = low + batch
    while low < high:
        middle = (low + high + 1) // 2
        if _first_block(offsets, middle, rows) <= wanted:
            low = middle
        else:
            high = middle - 1
    return low


@gluon.jit
def _heads_together(call, rows):
    return gl.maximum(call.order.section // gl.maximum(rows, 1), 1)


@gluon.jit
def _dense_place(config: gl.constexpr, number, call):
    heads = call.batch * call.heads_kv
    section = gl.minimum(_heads_together(call, call.seqlen_q), heads)
    block, pair, falls = _ordered(config, number, call.order.blocks, heads, section)
    if has(config, "bias"):  # the sequences of a head, which may share its bias, come together: it then comes from memory once
        head = pair // call.batch
        batch = pair - head * call.batch
    else:
        batch = pair // call.heads_kv
        head = pair - batch * call.heads_kv
    return batch, head, block, falls


@gluon.jit
def _packed_keys(lengths, index, batch, seqlen_k):
    """Where packed sequence `index`'s keys begin and end; for index == batch what lies after the last."""
    end = gl.where(index == batch, seqlen_k, gl.load(lengths.cu_k + gl.minimum(index + 1, batch)))
    return gl.load(lengths.cu_k + index), end


@gluon.jit
def tiles_of_packed(config: gl.constexpr, lengths, index, batch, seqlen_k):
    """How many tiles of config.keys keys that is."""
    begin, end = _packed_keys(lengths, index, batch, seqlen_k)
    return end // config.keys + 1 - begin // config.keys


@gluon.jit
def _packed_place(config: gl.constexpr, number, call):
    offsets = call.lengths.cu_k
    index = _find(offsets, call.batch, number // call.heads_kv, config.keys)
    rows = packed_sequence(config, call.lengths, index, call.batch, call.seqlen_q).q_rows
    first = _first_block(offsets, index, config.keys)
    blocks = tiles_of_packed(config, call.lengths, index, call.batch, call.seqlen_k)
    section = gl.minimum(_heads_together(call, rows), call.heads_kv)
    block, head, falls = _ordered(config, number - first * call.heads_kv, blocks, call.heads_kv, section)
    return index, head, block, falls


@gluon.jit
def tile_at(config: gl.constexpr, call, index, head, first, falls):
    """The tile of sequence `index` and a head whose keys begin with `first`."""
    if has(config, "varlen"):
        seq = packed_sequence(config, call.lengths, index, call.batch, call.seqlen_q)
        begin, end = _packed_keys(call.lengths, index, call.batch, call.seqlen_k)
        written = Span(begin, end - begin)
        work = _first_block(call.lengths.cu_q, index, WORK) * WORK
    else:
        seq = dense_sequence(config, call.lengths, index, call.seqlen_q, call.seqlen_k)
        written = Span(index * call.seqlen_k + seq.k_begin, call.seqlen_k - seq.k_begin)
        work = index * _padded(call.seqlen_q)
    return KeyTile(seq, head, first, written, work, falls)


@gluon.jit
def locate_keys(config: gl.constexpr, call, number):
    """Tile `number`. Packed calls may have one more a sequence than it needs: it sees no row and writes none."""
    if has(config, "varlen"):
        index, head, block, falls = _packed_place(config, number, call)
    else:
        index, head, block, falls = _dense_place(config, number, call)
    return tile_at(config, call, index, head, block * config.keys, falls)


@gluon.constexpr_function
def _begins_apart(config):
    """Whether the tiles of a head begin with different rows: where all see the same ones, and add to dQ in any order."""
    cut = has(config, "right") or has_lower_bound(config) or has(config, "varlen")
    return config.begins_apart and not cut


@gluon.jit
def first_place(config: gl.constexpr, call, tile, count):
    """Which of the `count` blocks of rows that see a tile comes first. If it were the same for all, programs at work on a head
    would add to the same rows of dQ at a time. It is where four heads do not fit in L2's share: there they read together."""
    if _begins_apart(config):
        step = gl.maximum(count // call.order.blocks, 1)
        place = tile.first // config.keys * step % gl.maximum(count, 1)
        return gl.where(_heads_together(call, call.seqlen_q) < 4, 0, place)
    else:
        return 0


@gluon.jit
def nth_place(config: gl.constexpr, tile, count, n):
    """Which of the `count` blocks of rows that see a tile comes n-th. Where sections take turns, a tile that does not fall has
    its rows from the last to the first: the other way all tiles of a section, which end together, would end at the same rows and
    wait there for one another. (An order's cost, GQA 32/8 causal: 16k 1.06 and 1.19, 4k 1.06 and 1.14; H200, 2026-11-21.)"""
    if config.sections_take_turns:
        return gl.where(tile.falls, n, count - 1 - n)
    else:
        return n


@gluon.jit
def place_of(config: gl.constexpr, place, i):
    """Which comes i-th, where `place` is counted along by `next_place`."""
    if _begins_apart(config):
        return place
    else:
        return i


@gluon.jit
def next_place(config: gl.constexpr, place, count):
    """Which comes after `place`."""
    if _begins_apart(config):
        return gl.where(place + 1 == count, 0, place + 1)
    else:
        return place


@gluon.jit
def _padded(rows):
    return (rows + WORK - 1) // WORK * WORK


@gluon.jit
def locate_rows(config: gl.constexpr, start, batch, seqlen_q, seqlen_k, lengths):
    """The sequence whose rows lie at row `start` of the workspace, and which of its rows that is."""
    if has(config, "varlen"):
        index = _find(lengths.cu_q, batch, start // WORK, WORK)
        seq = packed_sequence(config, lengths, index, batch, seqlen_q)
        begin = _first_block(lengths.cu_q, index, WORK) * WORK
    else:
        index = start // _padded(seqlen_q)
        seq = dense_sequence(config, lengths, index, seqlen_q, seqlen_k)
        begin = index * _padded(seqlen_q)
    return seq, start - begin
