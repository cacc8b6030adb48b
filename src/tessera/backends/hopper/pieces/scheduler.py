"""Which tile next. Persistent programs take tiles from a counter, in an order that serves L2 and the end of the grid.

Order: sections of heads whose K and V fit in L2 together; inside a section, with a causal mask, the row blocks vary slowest
and the longest come first, so that what is left at the end is short (longest processing time first); without, a
head's row blocks follow one another. The next tile is drawn late, with the last V of this one: drawing it at the start of this
one hands out tiles before it is known who will be free (5 to 15% slower, H200, 2026-11-21).

The counter is one int32 that is 0 between launches. Programs start with the tile of their own number; a draw gives the
number of programs plus the count before it. Each program's last draw fails, so there are as many draws as tiles, and the one
that sees tiles - 1 is the last of the launch: it puts 0 back. No two launches that can run at once may share a counter
(launch.py).
"""

from tessera.backends.hopper.pieces.kv_source import Sequence, dense_sequence, packed_sequence
from tessera.backends.hopper.pieces.tiles import has
from tessera.jit.compat import aggregate, gl, gluon


@aggregate
class Schedule:
    """`tiles` in all; `blocks` row blocks a dense sequence; `section`: heads (dense) or keys x heads (packed) that share L2."""

    counter: gl.tensor
    tiles: gl.tensor
    blocks: gl.tensor
    section: gl.tensor

    @gluon.constexpr_function
    def __init__(self, counter, tiles, blocks, section):
        self.counter = counter
        self.tiles = tiles
        self.blocks = blocks
        self.section = section


@aggregate
class Tile:
    """A block of query rows of one head: those from row `first` of its sequence on (none, where `first` is past its end)."""

    seq: Sequence
    head: gl.tensor
    first: gl.tensor

    @gluon.constexpr_function
    def __init__(self, seq, head, first):
        self.seq = seq
        self.head = head
        self.first = first


@gluon.jit
def take(counter):
    """Lane 0 of the one warp that calls adds one to the counter; the others get 0. The answer takes its time: see `taken`."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .u32 t; mov.u32 t, %laneid; setp.eq.u32 first, t, 0; mov.u32 $0, 0;"
        " @first atom.global.add.u32 $0, [$1], 1; }",
        "=&r,l",
        [counter],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def taken(schedule, answer):
    """The tile that `take` drew (>= tiles: none is left); the last draw of the launch resets the counter."""
    number = gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [answer], dtype=gl.int32, is_pure=False, pack=1
    )
    if number == schedule.tiles - 1:
        gl.store(schedule.counter, 0)
    return number + gl.num_programs(0)


@gluon.jit
def _ordered(config: gl.constexpr, number, blocks, heads, section):
    """The tile `number` of blocks x heads as (block, head)."""
    if has(config, "right"):
        whole = blocks * section
        last = gl.maximum(heads // section, 1) - 1  # it takes the remainder too: a short last section would leave long tiles
        group = gl.minimum(number // whole, last)
        rest = number - group * whole
        size = gl.where(group == last, heads - last * section, section)
        rank = rest // size
        return blocks - 1 - rank, group * section + rest - rank * size
    else:
        head = number // blocks
        return number - head * blocks, head


@gluon.jit
def _dense_tile(config: gl.constexpr, number, call):
    block, pair = _ordered(config, number, call.schedule.blocks, call.batch * call.heads, call.schedule.section)
    batch = pair // call.heads
    seq = dense_sequence(config, call.lengths, batch, call.seqlen_q, call.seqlen_k)
    return Tile(seq, pair - batch * call.heads, block * config.rows)


@gluon.jit
def _first_block(config: gl.constexpr, lengths, index):
    """Sequence `index`'s first row block. Rounded down plus one a sequence: never fewer blocks than it needs, at most one
    too many, and known from cu_seqlens alone, so no kernel has to prepare a table."""
    return gl.load(lengths.cu_q + index) // config.rows + index


@gluon.jit
def _packed_tile(config: gl.constexpr, number, call):
    wanted = number // call.heads
    low = wanted * 0
    high = low + call.batch
    while low < high:  # the last sequence whose first block is not past `wanted`
        middle = (low + high + 1) // 2
        if _first_block(config, call.lengths, middle) <= wanted:
            low = middle
        else:
            high = middle - 1
    seq = packed_sequence(config, call.lengths, low, call.batch, call.seqlen_q)
    begin = _first_block(config, call.lengths, low)
    blocks = (seq.q_begin + seq.q_rows) // config.rows + 1 - seq.q_begin // config.rows
    section = gl.minimum(gl.maximum(call.schedule.section // gl.maximum(seq.k_rows, 1), 1) * call.group, call.heads)
    block, head = _ordered(config, number - begin * call.heads, blocks, call.heads, section)
    return Tile(seq, head, block * config.rows)


@gluon.jit
def locate(config: gl.constexpr, number, call):
    """Tile `number`; numbers past the end give some tile, which nobody uses."""
    number = gl.minimum(number, call.schedule.tiles - 1)
    if has(config, "varlen"):
        return _packed_tile(config, number, call)
    else:
        return _dense_tile(config, number, call)
