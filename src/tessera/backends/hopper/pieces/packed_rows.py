"""Tiles over a KV cache: which query rows and which of their keys one program does, and where its results go.

The grid is fixed by shapes alone: (tiles of positions, key/value heads x tiles of heads x splits, batch); clusters of two lie
along x, whether they share a tile's keys and join, or are neighbouring tiles of positions or of heads over the same keys. Lengths
are read on the device, so a captured graph serves them as they grow; a program whose rows or keys are none ends at once.
"""

from tessera.backends.hopper.chunk_config import Result
from tessera.backends.hopper.pieces.cache_rows import Cache, cache_sequence
from tessera.backends.hopper.pieces.cluster import is_pair_of_heads, is_pair_of_rows, program_of_pair, size_of
from tessera.backends.hopper.pieces.kv_source import Sequence
from tessera.backends.hopper.pieces.masking import block_range, full_block_range, has_lower_bound
from tessera.backends.hopper.pieces.tiles import M, has
from tessera.jit.compat import aggregate, gl, gluon


@aggregate
class Reach:
    """How far from its diagonal a row sees."""

    left: gl.tensor
    right: gl.tensor


@aggregate
class CacheCall:
    """What one launch is asked. `seqlen_q`: of each sequence, or the total where they are packed by cu_q."""

    batch: gl.tensor
    heads: gl.tensor
    group: gl.tensor
    seqlen_q: gl.tensor
    cu_q: gl.tensor
    splits: gl.tensor
    reach: Reach
    cache: Cache


@aggregate
class CacheTile:
    """Positions from `position` on, heads from `first_head` of the group of key/value head `head`, blocks begin .. end, the
    `split`-th of as many shares as `parts` have any."""

    seq: Sequence
    position: gl.tensor
    head: gl.tensor
    first_head: gl.tensor
    split: gl.tensor
    parts: gl.tensor
    begin: gl.tensor
    end: gl.tensor


@aggregate
class Outcome:
    """Where results go. The `lines` of out are its rows, heads last; a part's (splits, lines, width_v) and lse (splits, lines)
    are float32. Whole: out in the queries' dtype, lse (batch, heads, seqlen_q) or (heads, total)."""

    out: gl.tensor
    lse: gl.tensor
    lines: gl.tensor


@gluon.constexpr_function
def is_part(config):
    return config.result is Result.PART


@gluon.constexpr_function
def is_joined(config):
    return config.result is Result.JOINED


@gluon.jit
def _program(config: gl.constexpr, call):
    """This program's (tile of positions, of how many; tile of heads over all heads of keys; split). Pairs count once."""
    size: gl.constexpr = size_of(config)
    number, numbers, place = gl.program_id(0) // size, gl.num_programs(0) // size, gl.program_id(1)
    if is_joined(config):
        return number, numbers, place, program_of_pair()
    else:
        return number, numbers, place // call.splits, place % call.splits


@gluon.jit
def _first_tile(config: gl.constexpr, call, index):
    """Packed sequence `index`'s first tile of positions (see scheduler._first_block)."""
    return gl.load(call.cu_q + index) // config.positions + index


@gluon.jit
def _packed(config: gl.constexpr, call, wanted):
    """The packed sequence that tile `wanted` of positions is in, and its first position there. After the last sequence come
    rows that attend to nothing."""
    low = wanted * 0
    high = low + call.batch
    while low < high:  # the last sequence whose first tile is not past `wanted`
        middle = (low + high + 1) // 2
        if _first_tile(config, call, middle) <= wanted:
            low = middle
        else:
            high = middle - 1
    index = gl.minimum(low, call.batch - 1)
    past = low == call.batch
    seq = cache_sequence(config, call.cache, call.cu_q, index, call.seqlen_q)
    begin = seq.q_begin + gl.where(past, seq.q_rows, 0)
    rows = gl.where(past, call.seqlen_q - begin, seq.q_rows)
    live = gl.where(past, 0, seq.q_live)
    keys = gl.where(past, 0, seq.k_rows)
    position = (wanted - _first_tile(config, call, low)) * config.positions
    return Sequence(index, begin, rows, live, seq.k_begin, keys, seq.diagonal, index), position


_ASK_ASM = gl.constexpr(
    "{ .reg .s32 at; .reg .s64 place; mov.u32 at, %laneid; mad.lo.s32 at, at, -32, $2; max.s32 at, at, 0;"
    " mad.wide.s32 place, at, 4, $1; prefetch.global.L2 [place]; mov.u32 $0, 0; }"
)


@gluon.jit
def _ask_for_lines(pointer, last):
    """Bring the 32 lines that end with pointer[last], int32, to L2 (none before pointer[0])."""
    asm: gl.constexpr = _ASK_ASM
    gl.inline_asm_elementwise(asm, "=r,l,r", [pointer, last], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def ask_for_places(config: gl.constexpr, pages, call):
    """Ask for what the first keys wait for, one read after the other: the sequence's length, then its page numbers, those that
    the split is likely to begin with. What the kernel before this one may still write is written to L2 too."""
    if not has(config, "varlen"):
        batch = gl.program_id(2)
        _ask_for_lines(call.cache.seqlens + batch, 0)
        if has(config, "pages"):
            _, _, _, split = _program(config, call)
            table = pages.table + batch.to(gl.int64) * pages.stride
            _ask_for_lines(table, (split + 1) * pages.per_sequence // call.splits - 1)


@gluon.jit
def locate_cache_tile(config: gl.constexpr, call):
    """This program's tile; begin == end where it has no rows or, as a part, no keys."""
    number, numbers, place, split = _program(config, call)
    if has(config, "right"):
        number = numbers - 1 - number  # the longest first
    if has(config, "varlen"):
        seq, position = _packed(config, call, number)
    else:
        seq = cache_sequence(config, call.cache, call.cu_q, gl.program_id(2), call.seqlen_q)
        position = number * config.positions_together
    head = place // config.head_tiles_together
    first_head = (place - head * config.head_tiles_together) * config.rows
    if is_pair_of_heads(config):
        first_head = first_head * 2 + program_of_pair() * config.rows
    first = gl.minimum(position, gl.maximum(seq.q_rows - 1, 0))
    last = gl.maximum(gl.minimum(position + config.positions_together, seq.q_rows) - 1, first)
    begin, end = block_range(config, call.reach, seq, first, last)
    parts = split * 0 + 1
    if is_part(config) or is_joined(config):
        share = (end - begin + call.splits - 1) // call.splits
        parts = (end - begin + share - 1) // share
        end = gl.minimum(begin + (split + 1) * share, end)
        begin = gl.minimum(begin + split * share, end)
    end = gl.where(position < seq.q_rows, end, begin)
    if is_pair_of_rows(config):  # the keys are those that either tile needs
        position += program_of_pair() * config.positions
    return CacheTile(seq, position, head, first_head, split, parts, begin, end)


@gluon.jit
def kinds_of_blocks(config: gl.constexpr, call, tile, first, begin, end):
    """Of the blocks from end - 1 down to `begin`, as the 64 rows from position `first` on see them: how many upper bounds cut,
    how many every row sees whole, how many lower bounds alone cut."""
    first = gl.minimum(first, tile.seq.q_rows - 1)
    last = gl.minimum(first + (config.packing.positions - 1), tile.seq.q_rows - 1)
    full_begin, full_end = full_block_range(config, call.reach, tile.seq, first, last)
    upper = gl.maximum(end - gl.maximum(full_end, begin), 0)
    full = end - upper - begin
    if has_lower_bound(config):
        full = gl.maximum(end - upper - gl.maximum(full_begin, begin), 0)
    return upper, full, end - upper - full - begin


@gluon.jit
def unit_of(config: gl.constexpr, tile, index: gl.constexpr):
    """The first position and the first head (in the group) of the tile's 64 rows `index`."""
    if config.packing.blocks > 1:
        return tile.position, tile.first_head + index * config.packing.heads
    else:
        return tile.position + index * config.packing.positions, tile.first_head


@gluon.jit
def row_places(config: gl.constexpr, call, tile, unit, layout: gl.constexpr):
    """Each of 64 rows' (position, query head), and whether there is such a row."""
    rows = gl.arange(0, M, layout)
    position = unit[0] + rows // config.packing.heads
    head = unit[1] + rows % config.packing.heads
    return position, tile.head * call.group + head, (position < tile.seq.q_rows) & (head < call.group)


@gluon.jit
def _line(config: gl.constexpr, call, tile, position, head):
    """A row's place in out: position major, head minor."""
    row = tile.seq.q_begin + position
    if not has(config, "varlen"):
        row += tile.seq.batch * call.seqlen_q
    return row.to(gl.int64) * call.heads + head


@gluon.jit
def _lse_places(config: gl.constexpr, call, tile, unit, outcome, layout: gl.constexpr):
    position, head, exists = row_places(config, call, tile, unit, layout)
    if is_part(config):
        place = _line(config, call, tile, position, head) + tile.split.to(gl.int64) * outcome.lines
    elif has(config, "varlen"):
        place = head.to(gl.int64) * call.seqlen_q + tile.seq.q_begin + position
    else:
        place = (tile.seq.batch * call.heads + head).to(gl.int64) * call.seqlen_q + position
    return outcome.lse + place, exists


@gluon.jit
def _out_places(config: gl.constexpr, call, tile, unit, outcome, column: gl.constexpr, width: gl.constexpr, layout: gl.constexpr):
    """Of the `width` columns from `column` on."""
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    position, head, exists = row_places(config, call, tile, unit, by_row)
    line = _line(config, call, tile, position, head)
    if is_part(config):
        line += tile.split.to(gl.int64) * outcome.lines
    columns = column + gl.arange(0, width, gl.SliceLayout(0, layout))
    mask = exists[:, None]
    if column + width > config.width_v:
        mask = mask & (columns < config.width_v)[None, :]
    return outcome.out + (line * config.width_v)[:, None] + columns[None, :], mask


@gluon.jit
def store_lse(config: gl.constexpr, call, tile, unit, outcome, lse):
    layout: gl.constexpr = lse.type.layout
    places, exists = _lse_places(config, call, tile, unit, outcome, layout)
    gl.store(places, lse, mask=exists)


@gluon.jit
def load_lse(config: gl.constexpr, call, tile, unit, outcome, there, layout: gl.constexpr):
    """What `store_lse` of another program stored; -inf where it did not, or is not `there`."""
    places, exists = _lse_places(config, call, tile, unit, outcome, layout)
    return gl.load(places, mask=exists & there, other=float("-inf"), cache_modifier=".cg")


@gluon.jit
def store_out(config: gl.constexpr, call, tile, unit, outcome, out, column: gl.constexpr):
    """out (64, columns) float32, the columns from `column` on, straight from the accumulators: four threads write 32 bytes of a
    row side by side (16 where out is 16-bit)."""
    layout: gl.constexpr = out.type.layout
    places, mask = _out_places(config, call, tile, unit, outcome, column, out.shape[1], layout)
    gl.store(places, out.to(outcome.out.dtype.element_ty), mask=mask)


@gluon.jit
def load_out(config: gl.constexpr, call, tile, unit, outcome, there, column: gl.constexpr, like):
    """What `store_out` of another program stored, as `like` lies; zeros where it did not, or is not `there`."""
    layout: gl.constexpr = like.type.layout
    places, mask = _out_places(config, call, tile, unit, outcome, column, like.shape[1], layout)
    return gl.load(places, mask=mask & there, other=0.0, cache_modifier=".cg")
