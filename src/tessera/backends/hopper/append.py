"""New rows of K and V into the cache, and the rotary embedding of Q and of the new K (RoFormer, arXiv 2104.09864).

One program does up to four heads of one token, of q, of k or of v; a warp a head. Row i of a sequence stands at the position
cache_seqlens + i; a pair of columns (a, b) becomes (a cos - b sin, b cos + a sin), in float32, rounded to q's type. A row goes
nowhere that does not exist: past the cache's capacity, or by a page number out of the pool, nothing is written.
"""

from tessera.backends.hopper.append_config import HEADS
from tessera.backends.hopper.pieces.scales import Scales
from tessera.backends.hopper.pieces.tiles import has
from tessera.jit.compat import aggregate, gl, gluon, let_next_begin, wait_for_previous

LINES = gl.constexpr(HEADS)


@aggregate
class Rows:
    """A tensor's address and strides: from one batch or cache entry to the next, from row to row, from head to head."""

    pointer: gl.tensor
    entry: gl.tensor
    row: gl.tensor
    head: gl.tensor

    @gluon.constexpr_function
    def __init__(self, pointer, entry, row, head):
        self.pointer = pointer
        self.entry = entry
        self.row = row
        self.head = head

    @gluon.jit
    def at(self, entry, row, head):
        """Offsets of rows' beginnings; `head` is a vector."""
        return entry.to(gl.int64) * self.entry + row.to(gl.int64) * self.row + head.to(gl.int64) * self.head


@aggregate
class Rotary:
    """The tables (positions, dim / 2), their row strides, and how many columns turn."""

    cos: gl.tensor
    sin: gl.tensor
    cos_row: gl.tensor
    sin_row: gl.tensor
    dim: gl.tensor
    positions: gl.tensor

    @gluon.constexpr_function
    def __init__(self, cos, sin, cos_row, sin_row, dim, positions):
        self.cos = cos
        self.sin = sin
        self.cos_row = cos_row
        self.sin_row = sin_row
        self.dim = dim
        self.positions = positions


@aggregate
class Token:
    """A new token: its sequence, its row in q or k (`begin` + `number`; `begin` is 0 but for packed ones), and its position."""

    sequence: gl.tensor
    begin: gl.tensor
    number: gl.tensor
    position: gl.tensor
    exists: gl.tensor

    @gluon.constexpr_function
    def __init__(self, sequence, begin, number, position, exists):
        self.sequence = sequence
        self.begin = begin
        self.number = number
        self.position = position
        self.exists = exists


@gluon.jit
def _find_token(config: gl.constexpr, seqlens, cu_q, batch, rows):
    """The token of this program. Dense: number `rows` a sequence; packed: the sequence is looked for in cu_seqlens_q."""
    token = gl.program_id(0)
    if has(config, "packed"):
        low = token * 0
        high = low + batch - 1
        while low < high:  # the last sequence that begins at or before the token
            middle = (low + high + 1) // 2
            if gl.load(cu_q + middle) <= token:
                low = middle
            else:
                high = middle - 1
        begin = gl.load(cu_q + low)
        number = token - begin
        return Token(low, begin, number, gl.load(seqlens + low) + number, token < gl.load(cu_q + low + 1))
    else:
        sequence = token // rows
        number = token - sequence * rows
        return Token(sequence, token * 0, number, gl.load(seqlens + sequence) + number, sequence < batch)


@gluon.jit
def _turned(config: gl.constexpr, pointers, column, live, rotary, token):
    """The rows' values (heads, columns), the first `rotary.dim` columns turned."""
    x = gl.load(pointers + column, mask=live, other=0.0)
    if not has(config, "interleaved") and not has(config, "halves"):
        return x
    else:
        turns = live & (column < rotary.dim)
        half = rotary.dim // 2
        if has(config, "interleaved"):
            first = (column & 1) == 0
            partner = column ^ 1
            pair = column // 2
        else:
            first = column < half
            partner = gl.where(first, column + half, column - half)
            pair = gl.where(first, column, column - half)
        position = gl.minimum(gl.maximum(token.position, 0), rotary.positions - 1).to(gl.int64)
        y = gl.load(pointers + partner, mask=turns, other=0.0).to(gl.float32)
        cos = gl.load(rotary.cos + position * rotary.cos_row + pair, mask=turns, other=0.0).to(gl.float32)
        sin = gl.load(rotary.sin + position * rotary.sin_row + pair, mask=turns, other=0.0).to(gl.float32)
        turned = x.to(gl.float32) * cos + gl.where(first, -y, y) * sin
        return gl.where(turns, turned.to(x.dtype), x)


@gluon.jit
def _place(config: gl.constexpr, batch_index, page_table, table_stride, page_size, token):
    """(entry or page, row in it) of a token's position."""
    if has(config, "paged"):
        number = gl.maximum(token.position, 0) // page_size
        page = gl.load(page_table + token.sequence * table_stride + number, mask=token.exists, other=-1)
        return page, token.position - number * page_size
    elif has(config, "batch_index"):
        return gl.load(batch_index + token.sequence), token.position
    else:
        return token.sequence, token.position


@gluon.jit
def _store(config: gl.constexpr, x, cache, scales, place, head, column, live, sequence, SCALED: gl.constexpr):
    """Rows of K or V as the cache keeps them."""
    entry, row = place
    if has(config, "e4m3"):
        value = x.to(gl.float32)
        if SCALED:
            line = sequence * scales.sequence + entry * scales.entry + row // scales.rows * scales.block
            scale = gl.load(scales.pointer + line + head + column * 0, mask=live, other=1.0)
            value = gl.div_rn(value, scale)
        value = gl.minimum(gl.maximum(value, -448.0), 448.0)
        gl.store(cache.pointer + cache.at(entry, row, head) + column, value.to(gl.float8e4nv), mask=live)
    else:
        gl.store(cache.pointer + cache.at(entry, row, head) + column, x, mask=live)


@gluon.jit
def append(
    q_ptr, turned_ptr, k_ptr, v_ptr, k_cache, v_cache, cos, sin, k_scales, v_scales, seqlens, cu_q, batch_index, page_table,
    batch, rows, rows_q, rows_new, heads_q, heads_kv, head_dim, head_dim_v, capacity, entries, page_size, table_stride,
    rotary_dim, positions,
    q_entry, q_row, q_head, k_entry, k_row, k_head, v_entry, v_row, v_head,
    k_cache_entry, k_cache_row, k_cache_head, v_cache_entry, v_cache_row, v_cache_head, cos_row, sin_row,
    k_scale_sequence, k_scale_entry, k_scale_block, k_scale_rows, v_scale_sequence, v_scale_entry, v_scale_block, v_scale_rows,
    CONFIG: gl.constexpr,
):  # fmt: skip
    """`rows`: the greater of rows_q and rows_new, query rows and new rows of a sequence. Grid: tokens, blocks of heads of q (only
    where there is an embedding), of k, and of v (where values are not in the keys)."""
    config: gl.constexpr = CONFIG
    columns: gl.constexpr = config.columns
    wait_for_previous()
    let_next_begin()
    layout: gl.constexpr = gl.BlockedLayout([1, columns // 32], [1, 32], [LINES, 1], [1, 0])
    column = gl.arange(0, columns, gl.SliceLayout(0, layout))[None, :]
    token = _find_token(config, seqlens, cu_q, batch, rows)
    rotary = Rotary(cos, sin, cos_row, sin_row, rotary_dim, positions)
    block = gl.program_id(1)
    q_blocks = block * 0
    if has(config, "interleaved") or has(config, "halves"):
        q_blocks = (heads_q + LINES - 1) // LINES
    kv_blocks = (heads_kv + LINES - 1) // LINES
    lines = gl.arange(0, LINES, gl.SliceLayout(1, layout))[:, None]
    if block < q_blocks:
        if has(config, "interleaved") or has(config, "halves"):
            head = block * LINES + lines
            live = (head < heads_q) & (column < head_dim) & (token.number < rows_q) & token.exists
            q = Rows(q_ptr, q_entry, q_row, q_head)
            x = _turned(config, q_ptr + q.at(token.sequence, token.begin + token.number, head), column, live, rotary, token)
            line = token.begin + token.number
            if not has(config, "packed"):
                line += token.sequence * rows_q
            gl.store(turned_ptr + (line.to(gl.int64) * heads_q + head) * head_dim + column, x, mask=live)
    else:
        place = _place(config, batch_index, page_table, table_stride, page_size, token)
        fits = token.exists & (token.number < rows_new) & (token.position >= 0) & (token.position < capacity)
        fits = fits & (place[0] >= 0) & (place[0] < entries)
        if block < q_blocks + kv_blocks:
            head = (block - q_blocks) * LINES + lines
            live = (head < heads_kv) & (column < head_dim) & fits
            new = Rows(k_ptr, k_entry, k_row, k_head)
            x = _turned(config, k_ptr + new.at(token.sequence, token.begin + token.number, head), column, live, rotary, token)
            cache = Rows(k_cache, k_cache_entry, k_cache_row, k_cache_head)
            scales = Scales(k_scales, k_scale_sequence, k_scale_entry, k_scale_block, k_scale_rows)
            _store(config, x, cache, scales, place, head, column, live, token.sequence, has(config, "k_scales"))
        else:
            head = (block - q_blocks - kv_blocks) * LINES + lines
            live = (head < heads_kv) & (column < head_dim_v) & fits
            new = Rows(v_ptr, v_entry, v_row, v_head)
            x = gl.load(v_ptr + new.at(token.sequence, token.begin + token.number, head) + column, mask=live, other=0.0)
            cache = Rows(v_cache, v_cache_entry, v_cache_row, v_cache_head)
            scales = Scales(v_scales, v_scale_sequence, v_scale_entry, v_scale_block, v_scale_rows)
            _store(config, x, cache, scales, place, head, column, live, token.sequence, has(config, "v_scales"))
