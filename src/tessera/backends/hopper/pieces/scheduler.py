"""Which tile next. Persistent programs take tiles from a counter, in an order that serves L2 and the end of the grid.

Order: sections of heads whose K and V fit in L2 together; inside a section, with a causal mask, the row blocks vary slowest
and the longest come first, so that what is left at the end is short (longest processing time first); without, a
head's row blocks follow one another. Where all blocks are equally long, 15.5 rounds of tiles take 16: so what is short by nature
(a window near the sequence's begin) or may be made so (low tiles, which two of three consumers work on) comes after all the
rest, whatever the section. The next tile is drawn late, with the last V of this one: drawing it at the start of this
one hands out tiles before it is known who will be free (5 to 15% slower, H200, 2026-11-21).

Two programs of a cluster (pieces/cluster.py) work on neighbouring row blocks, or on two heads: `number` and `tiles` then count
pairs, and so do `blocks` or heads.

The counter is one int32 that is 0 between launches. Programs start with the tile of their own number; a draw gives the
number of programs plus the count before it. Each program's last draw fails, so there are as many draws as tiles, and the one
that sees tiles - 1 is the last of the launch: it puts 0 back. No two launches that can run at once may share a counter
(launch.py).
"""

from tessera.backends.hopper.pieces.cluster import (
    SIZE,
    is_pair,
    is_pair_of_heads,
    is_pair_of_rows,
    program_of_pair,
    size_of,
)
from tessera.backends.hopper.pieces.kv_source import Sequence, dense_sequence, packed_sequence
from tessera.backends.hopper.pieces.numbers import of_first_lane
from tessera.backends.hopper.pieces.tiles import has, has_low_blocks, keeps_masks
from tessera.jit.compat import aggregate, gl, gluon


@aggregate
class Schedule:
    """`tiles` in all; `blocks` row blocks a dense sequence, of which the first `tall` are of full height; `section`: heads
    (dense) or keys x heads (packed) that share L2."""

    counter: gl.tensor
    tiles: gl.tensor
    blocks: gl.tensor
    tall: gl.tensor
    section: gl.tensor


@aggregate
class Tile:
    """A block of query rows of one head: `rows` from row `first` of its sequence on (none, where `first` is past its end).
    `words`: what dropout has of the head (dropout.head_words), where the board told it. `whole`: a tuple of one where masks are
    kept from tile to tile, 1 if no row's window is cut by the keys' begin or end."""

    seq: Sequence
    head: gl.tensor
    first: gl.tensor
    rows: gl.tensor
    words: gl.tuple
    whole: gl.tuple


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
def taken(config: gl.constexpr, schedule, answer):
    """The tile that `take` drew (>= tiles: none is left); the last draw of the launch resets the counter."""
    number = of_first_lane(answer)
    if number == schedule.tiles - 1:
        gl.store(schedule.counter, 0)
    return number + gl.num_programs(0) // size_of(config)


@gluon.jit
def first_number(config: gl.constexpr):
    """The tile that a program, or a pair, begins with."""
    return gl.program_id(0) // size_of(config)


@gluon.jit
def ask(config: gl.constexpr, schedule):
    """`take`; in a pair program 0 does."""
    answer = 0
    if is_pair(config):
        if program_of_pair() == 0:
            answer = take(schedule.counter)
    else:
        answer = take(schedule.counter)
    return answer


@gluon.jit
def next_number(config: gl.constexpr, schedule, box, turn, answer):
    """`taken`; in a pair program 1 has it from program 0, for its `turn`-th tile."""
    if is_pair(config):
        number = turn
        if program_of_pair() == 0:
            number = taken(config, schedule, answer)
            box[0].send(turn, number)
        else:
            number = box[0].receive(turn)
        return number
    else:
        return taken(config, schedule, answer)


@gluon.jit
def _ordered(config: gl.constexpr, number, blocks, heads, section):
    """The tile `number` of blocks x heads as (block, head)."""
    if has(config, "right"):
        whole = blocks * section
        # the last section is two and the remainder: the more tiles are drawn longest first at the end, the evener it is
        last = gl.maximum(heads // section - 1, 1) - 1
        group = gl.minimum(number // whole, last)
        rest = number - group * whole
        size = gl.where(group == last, heads - last * section, section)
        rank = rest // size
        return blocks - 1 - rank, group * section + rest - rank * size
    else:
        head = number // blocks
        return number - head * blocks, head


@gluon.jit
def _ordered_window(config: gl.constexpr, number, call, heads, section):
    """(first row, head) for a window: rows near the sequence's begin, whose window is cut short, come after all heads' others."""
    blocks = call.schedule.blocks
    cut = call.band.left - (call.seqlen_k - call.seqlen_q)  # the first row with all of its window
    short = gl.minimum((gl.maximum(cut, 0) + config.rows - 1) // config.rows, blocks)
    whole = (blocks - short) * heads
    late = number >= whole
    block, pair = _ordered(
        config, gl.where(late, number - whole, number), gl.where(late, short, blocks - short), heads,
        gl.where(late, heads, section),
    )  # fmt: skip
    return gl.where(late, block, block + short) * config.rows, pair


@gluon.jit
def _is_whole(config: gl.constexpr, call, first):
    """Whether the tile from row `first` on has all its rows, and these all of their windows."""
    diagonal = call.seqlen_k - call.seqlen_q
    below = first + config.rows <= call.seqlen_q - call.band.right
    return gl.where(below & (first + diagonal >= call.band.left), 1, 0)


@gluon.jit
def _ordered_by_height(config: gl.constexpr, number, call, heads, section, member):
    """(first row, rows, head): all heads' tall blocks, then their low ones, which are quick and fill the end of the grid."""
    schedule = call.schedule
    whole = schedule.tall * heads
    late = number >= whole
    block, pair = _ordered(
        config, gl.where(late, number - whole, number), gl.where(late, schedule.blocks - schedule.tall, schedule.tall), heads,
        section,
    )  # fmt: skip
    tall = schedule.tall
    if is_pair_of_rows(config):
        block = block * SIZE + member
        tall = tall * SIZE
    first = gl.where(late, tall * config.rows + block * config.low_rows, block * config.rows)
    return first, gl.where(late, config.low_rows, config.rows), pair


@gluon.jit
def _dense_tile(config: gl.constexpr, number, call, member):
    rows = number * 0 + config.rows
    heads = call.batch * call.heads
    section = call.schedule.section
    if is_pair_of_heads(config):
        heads = heads // SIZE
        section = section // SIZE
    if has_low_blocks(config):
        first, rows, pair = _ordered_by_height(config, number, call, heads, section, member)
    elif has(config, "left") and has(config, "right"):
        first, pair = _ordered_window(config, number, call, heads, section)
    else:
        block, pair = _ordered(config, number, call.schedule.blocks, heads, section)
        if is_pair_of_rows(config):
            block = block * SIZE + member
        first = block * config.rows
    whole = ()
    if keeps_masks(config):
        whole = (_is_whole(config, call, first),)
    if is_pair_of_heads(config):
        pair = pair * SIZE + member
    if has(config, "bias") and not is_pair_of_heads(config):  # see key_tiles._dense_tile
        head = pair // call.batch
        batch = pair - head * call.batch
    else:
        batch = pair // call.heads
        head = pair - batch * call.heads
    seq = dense_sequence(config, call.lengths, batch, call.seqlen_q, call.seqlen_k)
    return Tile(seq, head, first, gl.minimum(rows, call.seqlen_q - first), (), whole)


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
    return Tile(seq, head, block * config.rows, gl.minimum(config.rows, seq.q_rows - block * config.rows), (), ())


@gluon.jit
def locate(config: gl.constexpr, number, call, member=0):
    """Tile `number`, of a pair's two the `member`-th; numbers past the end give some tile, which nobody uses."""
    number = gl.minimum(number, call.schedule.tiles - 1)
    if has(config, "varlen"):
        return _packed_tile(config, number, call)
    else:
        return _dense_tile(config, number, call, member)
