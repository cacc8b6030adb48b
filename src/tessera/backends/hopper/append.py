"""New rows of K and V into the cache, and the rotary embedding of Q and of the new K (RoFormer, arXiv 2104.09864).

One program does a few heads of some tokens, of q, of k or of v: a thread has 8 columns of the tables for one token, and the
same ones of every head. Row i of a sequence stands at the position cache_seqlens + i; a pair of columns (a, b) becomes
(a cos - b sin, b cos + a sin), in float32, rounded to q's type. A row goes nowhere that does not exist: past the cache's
capacity, or by a page number out of the pool, nothing is written.

Every row is moved as pairs of columns: those that turn together, and any two of the others.
"""

from tessera.backends.hopper.append_config import PAIRS_OF_THREAD, WARPS
from tessera.backends.hopper.pieces.scales import Scales
from tessera.backends.hopper.pieces.tiles import has
from tessera.jit.compat import aggregate, gl, gluon, let_next_begin, wait_for_previous


@aggregate
class Rows:
    """A tensor's address and strides: from one batch or cache entry to the next, from row to row, from head to head; a row's
    `columns`, and how many pairs of them turn, by Rotary's style."""

    pointer: gl.tensor
    entry: gl.tensor
    row: gl.tensor
    head: gl.tensor
    columns: gl.tensor
    turning: gl.tensor

    @gluon.jit
    def at(self, entry, row, head):
        """Offsets of rows' beginnings, (tokens, heads)."""
        first = entry.to(gl.int64) * self.entry + row.to(gl.int64) * self.row
        return first[:, None] + head.to(gl.int64)[None, :] * self.head


@aggregate
class Rotary:
    """The tables (positions, dim / 2), and their row strides."""

    cos: gl.tensor
    sin: gl.tensor
    cos_row: gl.tensor
    sin_row: gl.tensor
    positions: gl.tensor


@aggregate
class Tokens:
    """New tokens: each one's sequence, its row in q or k (`begin` + `number`; `begin` is 0 but for packed ones), its position."""

    sequence: gl.tensor
    begin: gl.tensor
    number: gl.tensor
    position: gl.tensor
    exists: gl.tensor


# ------------------------------------------------------------------------------------------------------------ layouts


@gluon.constexpr_function
def _pairs_layout(config):
    """(tokens, heads, pairs of columns): a thread has PAIRS_OF_THREAD of one token, in every head."""
    return gl.BlockedLayout([1, config.heads, PAIRS_OF_THREAD], [32 // config.lanes, 1, config.lanes], [WARPS, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def _columns_layout(config):
    """(tokens, heads, columns): the same, where the columns of a pair are neighbours."""
    return gl.BlockedLayout(
        [1, config.heads, 2 * PAIRS_OF_THREAD], [32 // config.lanes, 1, config.lanes], [WARPS, 1, 1], [2, 1, 0]
    )


@gluon.constexpr_function
def _rows_layout(config):
    return gl.SliceLayout(2, _pairs_layout(config))


@gluon.constexpr_function
def turns(config):
    return has(config, "interleaved") or has(config, "halves")


# ------------------------------------------------------------------------------------------------ where rows and pairs are


@gluon.jit
def _find_tokens(config: gl.constexpr, seqlens, cu_q, batch, rows, block):
    """The tokens of block `block`. Dense: `rows` a sequence; packed: the sequence is looked for in cu_seqlens_q."""
    token = block * config.tokens + gl.arange(0, config.tokens, gl.SliceLayout(1, _rows_layout(config)))
    if has(config, "packed"):
        sequence = token * 0
        left = batch
        while left > 1:  # the last sequence that begins at or before the token is one of `left` from `sequence` on
            half = left // 2
            sequence = gl.where(gl.load(cu_q + (sequence + half)) <= token, sequence + half, sequence)
            left -= half
        begin = gl.load(cu_q + sequence)
        number = token - begin
        exists = token < gl.load(cu_q + (sequence + 1))
    else:
        sequence = gl.minimum(token // rows, batch - 1)
        begin = token * 0
        number = token - sequence * rows
        exists = number < rows
    return Tokens(sequence, begin, number, gl.load(seqlens + sequence) + number, exists)


@gluon.jit
def _place(config: gl.constexpr, batch_index, page_table, table_stride, page_size, token):
    """(entry or page, row in it) of tokens' positions."""
    if has(config, "paged"):
        number = gl.maximum(token.position, 0) // page_size
        page = gl.load(page_table + (token.sequence * table_stride + number), mask=token.exists, other=-1)
        return page, token.position - number * page_size
    elif has(config, "batch_index"):
        return gl.load(batch_index + token.sequence), token.position
    else:
        return token.sequence, token.position


@gluon.jit
def _pair_numbers(config: gl.constexpr):
    return gl.arange(0, config.columns // 2, gl.SliceLayout(0, gl.SliceLayout(1, _pairs_layout(config))))


@gluon.jit
def _columns_of_pairs(config: gl.constexpr, rows):
    """The columns a and b of each pair that are not neighbours: (i, i + half) of those that turn; then the first of the rest
    with the first of its second half."""
    pair = _pair_numbers(config)
    turning = pair < rows.turning
    first = pair + gl.where(turning, 0, rows.turning)
    return first, first + gl.where(turning, rows.turning, rows.columns // 2 - rows.turning)


# --------------------------------------------------------------------------------------------------------------- rows


@gluon.jit
def _neighbours(config: gl.constexpr, at, live):
    """Where rows begin and which there are, (tokens, heads, 1), and their columns, as a thread has pairs of neighbours."""
    layout: gl.constexpr = _columns_layout(config)
    column = gl.arange(0, config.columns, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    at = gl.convert_layout(at, gl.SliceLayout(2, layout), assert_trivial=True)[:, :, None]
    live = gl.convert_layout(live, gl.SliceLayout(2, layout), assert_trivial=True)[:, :, None]
    return at, live, column


@gluon.jit
def _load_pairs(config: gl.constexpr, rows, at, live, NEIGHBOURS: gl.constexpr):
    """(a, b) of the rows that begin at `at`, each (tokens, heads, pairs)."""
    if NEIGHBOURS:
        at, live, column = _neighbours(config, at, live)
        x = gl.load(rows.pointer + (at + column), mask=live & (column < rows.columns), other=0.0)
        a, b = gl.split(gl.reshape(x, [config.tokens, config.heads, config.columns // 2, 2]))
        a = gl.convert_layout(a, _pairs_layout(config), assert_trivial=True)
        return a, gl.convert_layout(b, _pairs_layout(config), assert_trivial=True)
    else:
        first, second = _columns_of_pairs(config, rows)
        keep = live[:, :, None] & (_pair_numbers(config) < rows.columns // 2)[None, None, :]
        a = gl.load(rows.pointer + (at[:, :, None] + first[None, None, :]), mask=keep, other=0.0)
        return a, gl.load(rows.pointer + (at[:, :, None] + second[None, None, :]), mask=keep, other=0.0)


@gluon.jit
def _store_pairs(config: gl.constexpr, rows, at, live, pairs, NEIGHBOURS: gl.constexpr):
    """`pairs` = (a, b) into the rows that begin at `at`."""
    a, b = pairs
    if NEIGHBOURS:
        at, live, column = _neighbours(config, at, live)
        x = gl.reshape(gl.join(a, b), [config.tokens, config.heads, config.columns])
        x = gl.convert_layout(x, _columns_layout(config), assert_trivial=True)
        gl.store(rows.pointer + (at + column), x, mask=live & (column < rows.columns))
    else:
        first, second = _columns_of_pairs(config, rows)
        keep = live[:, :, None] & (_pair_numbers(config) < rows.columns // 2)[None, None, :]
        gl.store(rows.pointer + (at[:, :, None] + first[None, None, :]), a, mask=keep)
        gl.store(rows.pointer + (at[:, :, None] + second[None, None, :]), b, mask=keep)


@gluon.jit
def _turned(config: gl.constexpr, pairs, rows, rotary, token):
    """The pairs, the first `rows.turning` of them turned by their tokens' angles."""
    a, b = pairs
    layout: gl.constexpr = gl.SliceLayout(1, _pairs_layout(config))
    position = gl.minimum(gl.maximum(token.position, 0), rotary.positions - 1)
    position = gl.convert_layout(position, gl.SliceLayout(1, layout), assert_trivial=True).to(gl.int64)[:, None]
    pair = _pair_numbers(config)[None, :]
    turning = (pair < rows.turning) & (position >= 0)
    cos = gl.load(rotary.cos + (position * rotary.cos_row + pair), mask=turning, other=0.0).to(gl.float32)[:, None, :]
    sin = gl.load(rotary.sin + (position * rotary.sin_row + pair), mask=turning, other=0.0).to(gl.float32)[:, None, :]
    x = a.to(gl.float32)
    y = b.to(gl.float32)
    turning = turning[:, None, :]
    return gl.where(turning, (x * cos - y * sin).to(a.dtype), a), gl.where(turning, (y * cos + x * sin).to(b.dtype), b)


@gluon.jit
def _turn_rows(config: gl.constexpr, rows, turned, rotary, token, places, live):
    """Rows of q, turned. `places`: where they begin in q and in its turned copy."""
    NEIGHBOURS: gl.constexpr = has(config, "interleaved")
    pairs = _load_pairs(config, rows, places[0], live, NEIGHBOURS)
    _store_pairs(config, turned, places[1], live, _turned(config, pairs, rows, rotary, token), NEIGHBOURS)


@gluon.jit
def _rounded(pairs, scale):
    """Pairs as an FP8 cache keeps them; `scale` (tokens, heads) is None where it is 1."""
    x = pairs[0].to(gl.float32)
    y = pairs[1].to(gl.float32)
    if scale is not None:
        x = gl.div_rn(x, scale[:, :, None])
        y = gl.div_rn(y, scale[:, :, None])
    x = gl.minimum(gl.maximum(x, -448.0), 448.0).to(gl.float8e4nv)
    return x, gl.minimum(gl.maximum(y, -448.0), 448.0).to(gl.float8e4nv)


@gluon.jit
def _find_scales(scales, token, place, head, live):
    line = token.sequence * scales.sequence + place[0] * scales.entry + place[1] // scales.rows * scales.block
    return gl.load(scales.pointer + (line[:, None] + head[None, :]), mask=live, other=1.0)


@gluon.jit
def _append_rows(config: gl.constexpr, rows, scales, rotary, token, place, heads, SCALED: gl.constexpr):
    """`rows` = (new, cache): rows of k or v of some tokens to their places, (entry, row, whether there is such a row); `heads` =
    (some heads, of how many). `rotary` is None for v."""
    new, cache = rows
    head, count = heads
    NEIGHBOURS: gl.constexpr = rotary is not None and has(config, "interleaved")
    live = place[2][:, None] & (head < count)[None, :]
    pairs = _load_pairs(config, new, new.at(token.sequence, token.begin + token.number, head), live, NEIGHBOURS)
    if rotary is not None:
        pairs = _turned(config, pairs, new, rotary, token)
    at = cache.at(place[0], place[1], head)
    if has(config, "e4m3"):
        scale = None
        if SCALED:
            scale = _find_scales(scales, token, place, head, live)
        _store_pairs(config, cache, at, live, _rounded(pairs, scale), NEIGHBOURS)
    else:
        _store_pairs(config, cache, at, live, pairs, NEIGHBOURS)


# ------------------------------------------------------------------------------------------------------------- kernel


@gluon.jit
def append(
    q_ptr, turned_ptr, k_ptr, v_ptr, k_cache, v_cache, cos, sin, k_scales, v_scales, seqlens, cu_q, batch_index, page_table,
    batch, rows, rows_q, rows_new, heads_q, heads_kv, head_dim, head_dim_v, capacity, entries, page_size, table_stride,
    turning, positions, blocks,
    q_entry, q_row, q_head, k_entry, k_row, k_head, v_entry, v_row, v_head,
    k_cache_entry, k_cache_row, k_cache_head, v_cache_entry, v_cache_row, v_cache_head, cos_row, sin_row,
    k_scale_sequence, k_scale_entry, k_scale_block, k_scale_rows, v_scale_sequence, v_scale_entry, v_scale_block, v_scale_rows,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """`rows`: the greater of rows_q and rows_new, query rows and new rows of a sequence; `turning`: pairs of columns that turn.
    Grid: for each block of tokens `blocks` blocks of heads, of q (only where there is an embedding), of k, and of v (where values
    are not in the keys)."""
    config: gl.constexpr = CONFIG
    wait_for_previous()
    let_next_begin()
    number = gl.program_id(0) // blocks
    block = gl.program_id(0) - number * blocks
    token = _find_tokens(config, seqlens, cu_q, batch, rows, number)
    lines = gl.arange(0, config.heads, gl.SliceLayout(0, _rows_layout(config)))
    rotary = None
    q_blocks = block * 0
    if turns(config):
        rotary = Rotary(cos, sin, cos_row, sin_row, positions)
        q_blocks = (heads_q + config.heads - 1) // config.heads
    kv_blocks = (heads_kv + config.heads - 1) // config.heads
    if block < q_blocks:
        if turns(config):
            head = block * config.heads + lines
            live = (token.exists & (token.number < rows_q))[:, None] & (head < heads_q)[None, :]
            q = Rows(q_ptr, q_entry, q_row, q_head, head_dim, turning)
            line = token.begin + token.number
            at = q.at(token.sequence, line, head)
            if not has(config, "packed"):
                line += token.sequence * rows_q
            turned = Rows(turned_ptr, head_dim * 0, heads_q * head_dim, head_dim, head_dim, turning)
            _turn_rows(config, q, turned, rotary, token, (at, turned.at(token.sequence, line, head)), live)
    else:
        entry, row = _place(config, batch_index, page_table, table_stride, page_size, token)
        fits = token.exists & (token.number < rows_new) & (token.position >= 0) & (token.position < capacity)
        place = (entry, row, fits & (entry >= 0) & (entry < entries))
        block -= q_blocks
        if block < kv_blocks:
            new_k = Rows(k_ptr, k_entry, k_row, k_head, head_dim, turning)
            keys = Rows(k_cache, k_cache_entry, k_cache_row, k_cache_head, head_dim, turning)
            scales_of_k = Scales(k_scales, k_scale_sequence, k_scale_entry, k_scale_block, k_scale_rows)
            heads = (block * config.heads + lines, heads_kv)
            _append_rows(config, (new_k, keys), scales_of_k, rotary, token, place, heads, has(config, "k_scales"))
        else:
            new_v = Rows(v_ptr, v_entry, v_row, v_head, head_dim_v, turning * 0)
            values = Rows(v_cache, v_cache_entry, v_cache_row, v_cache_head, head_dim_v, turning * 0)
            scales_of_v = Scales(v_scales, v_scale_sequence, v_scale_entry, v_scale_block, v_scale_rows)
            others = ((block - kv_blocks) * config.heads + lines, heads_kv)
            _append_rows(config, (new_v, values), scales_of_v, None, token, place, others, has(config, "v_scales"))
