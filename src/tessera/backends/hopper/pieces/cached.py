"""Where a sequence stands in a KV cache, and how its rows come into shared memory.

Lengths are read from device memory by every program, so a launch captured into a CUDA graph follows them as they grow. They
are clamped to what the cache (or the row of page_table) holds. A cache is described to TMA as (entry or page, head, row, column):
a page number out of range, whatever page_table says, reads as zeros and touches nothing.
"""

from tessera.backends.hopper.pieces.tiles import columns_of, has
from tessera.jit.compat import aggregate, gl, gluon, tma_load_as


@aggregate
class Places:
    """int32 tensors, read where the config has them: cache_seqlens (batch,), cu_seqlens_q (batch + 1,), cache_leftpad (batch,),
    cache_batch_idx (batch,), page_table (batch, pages a sequence)."""

    seqlens: gl.tensor
    cu_q: gl.tensor
    leftpad: gl.tensor
    batch_index: gl.tensor
    page_table: gl.tensor


@aggregate
class Sizes:
    """Numbers that no tensor holds. `seqlen_q`: query rows of a sequence (packed: of all); `added`: keys that were appended
    (packed: as many as query rows, where it is not 0); `capacity`: rows that a sequence can have; `row_blocks`: blocks of query
    rows a head (packed: at most); `slot_rows`: rows of a partial result, of which there are `slots`; `left`, `right`: the window;
    `table_stride`, `page_shift`: page_table's rows, log2 of a page's; `tickets`: an item's;
    `entries`: how many the cache or the pool has."""

    batch: gl.tensor
    heads_kv: gl.tensor
    group: gl.tensor
    seqlen_q: gl.tensor
    added: gl.tensor
    capacity: gl.tensor
    row_blocks: gl.tensor
    slot_rows: gl.tensor
    slots: gl.tensor
    left: gl.tensor
    right: gl.tensor
    table_stride: gl.tensor
    page_shift: gl.tensor
    tickets: gl.tensor
    entries: gl.tensor


@aggregate
class Cached:
    """One sequence, or a vector of them: its query rows q_begin .. + q_rows, and its keys k_begin .. k_end, the appended ones
    among them. Row i's diagonal stands at key i + k_end - q_rows."""

    index: gl.tensor
    q_begin: gl.tensor
    q_rows: gl.tensor
    k_begin: gl.tensor
    k_end: gl.tensor


@gluon.jit
def cached(config: gl.constexpr, places, sizes, index):
    """Sequence `index` of the batch (a number, or a vector of numbers); the last one for numbers past the batch."""
    index = gl.minimum(index, sizes.batch - 1)
    zero = index * 0
    q_begin = zero
    q_rows = zero + sizes.seqlen_q
    added = zero + sizes.added
    k_begin = zero
    if has(config, "packed"):
        q_begin = gl.load(places.cu_q + index)
        q_rows = gl.load(places.cu_q + (index + 1)) - q_begin
        added = gl.where(added > 0, q_rows, 0)
    if has(config, "leftpad"):
        k_begin = gl.maximum(gl.load(places.leftpad + index), 0)
    k_end = gl.minimum(gl.maximum(gl.load(places.seqlens + index) + added, 0), sizes.capacity)
    return Cached(index, q_begin, q_rows, k_begin, k_end)


@gluon.jit
def lowest_key(config: gl.constexpr, sizes, seq, position):
    """lo(i) of the query row `position` (or rows): it sees the keys lo(i) <= j < hi(i)."""
    lo = position * 0 + seq.k_begin
    if has(config, "left"):
        lo = gl.maximum(lo, position + (seq.k_end - seq.q_rows - sizes.left))
    return lo


@gluon.jit
def highest_key(config: gl.constexpr, sizes, seq, position):
    """hi(i): one past the last key."""
    hi = position * 0 + seq.k_end
    if has(config, "right"):
        hi = gl.minimum(hi, position + (seq.k_end - seq.q_rows + sizes.right + 1))
    return hi


@gluon.jit
def key_tiles(config: gl.constexpr, sizes, seq):
    """Tiles [begin, end) of keys that the sequence's rows need; one, fully masked, where they see no key."""
    begin = lowest_key(config, sizes, seq, seq.q_rows * 0) // config.keys
    end = (highest_key(config, sizes, seq, seq.q_rows - 1) + config.keys - 1) // config.keys
    return begin, gl.maximum(end, begin + 1)


@gluon.jit
def row_blocks(sizes, seq, rows: gl.constexpr):
    """Blocks of query rows of one key/value head: the heads that share it count as rows."""
    return (seq.q_rows * sizes.group + rows - 1) // rows


@gluon.jit
def first_row_block(config: gl.constexpr, sizes, seq, rows: gl.constexpr):
    """A number for the sequence's first row block that leaves room for those of the sequences before it."""
    if has(config, "packed"):
        return seq.q_begin * sizes.group // rows + seq.index
    else:
        return seq.index * sizes.row_blocks


@gluon.jit
def cache_entry(config: gl.constexpr, places, index):
    """The entry of a contiguous cache that holds sequence `index`."""
    if has(config, "batch_index"):
        return gl.load(places.batch_index + index)
    else:
        return index


@gluon.jit
def locate_box(config: gl.constexpr, places, sizes, seq, entry, key):
    """(entry or page, row in it) of the box of keys that begins at `key`. Boxes past the end are nowhere: they read as zeros."""
    if has(config, "paged"):
        number = seq.index * sizes.table_stride + (key >> sizes.page_shift)
        page = gl.load(places.page_table + number, mask=key < seq.k_end, other=-1)
        return page, key & ((1 << sizes.page_shift) - 1)
    else:
        return entry, key


@gluon.jit
def locate_keys(config: gl.constexpr, places, sizes, item, key, live):
    """The same for each of a tensor of keys, those that are `live`."""
    if has(config, "paged"):
        page = gl.load(places.page_table + item.index * sizes.table_stride + (key >> sizes.page_shift), mask=live, other=0)
        return gl.minimum(gl.maximum(page, 0), sizes.entries - 1), key & ((1 << sizes.page_shift) - 1)
    else:
        return gl.minimum(gl.maximum(item.entry, 0), sizes.entries - 1), key


@gluon.jit
def load_box(maps, buffers, place, head, bar, slot):
    """Start the copy of one box of rows, part by part of the head dim. They are read once: L2 keeps what is read again."""
    column = 0
    for part in gl.static_range(len(maps)):
        tma_load_as("evict_first", maps[part], [place[0], head, place[1], column], bar, buffers[part].index(slot))
        column += columns_of(buffers[part].shape)


@gluon.jit
def foresee_box(maps, buffers, place, head, bar):
    """Bring one box of rows into L2; `buffers` and `bar` only complete the instruction that Triton knows."""
    column = 0
    for part in gl.static_range(len(maps)):
        tma_load_as("only L2", maps[part], [place[0], head, place[1], column], bar, buffers[part].index(0))
        column += columns_of(buffers[part].shape)
