"""Where a sequence's rows lie, and how TMA reads and writes them without touching a neighbour's.

A tensor is described to TMA as (wrap, end, head, row, column) with the strides (2^34 - row stride, row stride, head stride, row
stride, 1) and 2^30 rows. Row r of a span of `count` rows that begins at row `first` of the tensor is

    wrap = 2^30,   end = first + count,   row = 2^30 - count + r:

the products with the strides add up to (first + r) row strides, modulo 2^64, and rows r >= count are out of bounds. TMA reads
those as zeros (a masked key's V is then 0 and not whatever lies there: 0 NaN would be NaN) and does not write them. One
descriptor so serves every sequence of a packed batch, whatever the lengths. (The idea is that of Triton's
tools/ragged_tma.py. Moving the base address down instead of `wrap` faults: out of bounds, TMA touches the base.)
"""

from tessera.backends.hopper.pieces.tiles import columns_of, has
from tessera.jit.compat import aggregate, gl, gluon, tma_load, tma_load_as, tma_store


@aggregate
class Lengths:
    """The tensors that say where sequences lie: int32, read where the config has them. varlen: cu_q, cu_k (batch + 1,),
    used_q, used_k (batch,). dense: key_start, key_end, query_end (batch,)."""

    cu_q: gl.tensor
    cu_k: gl.tensor
    used_q: gl.tensor
    used_k: gl.tensor
    key_start: gl.tensor
    key_end: gl.tensor
    query_end: gl.tensor


WRAP = gl.constexpr(1 << 30)


@aggregate
class Pitch:
    """Rows from one batch entry to the next, in each tensor (launch.py makes sure that it is a whole number)."""

    q: gl.tensor
    k: gl.tensor
    v: gl.tensor
    o: gl.tensor


@aggregate
class Span:
    """`count` rows from `first` on."""

    first: gl.tensor
    count: gl.tensor


@aggregate
class Sequence:
    """One sequence, the `number`th of its batch. Rows q_begin .. + q_rows are its output, the first q_live of them attend; its
    visible keys are k_begin .. + k_rows, and row i's diagonal stands at key i + diagonal, counted from k_begin."""

    batch: gl.tensor
    q_begin: gl.tensor
    q_rows: gl.tensor
    q_live: gl.tensor
    k_begin: gl.tensor
    k_rows: gl.tensor
    diagonal: gl.tensor
    number: gl.tensor

    @gluon.jit
    def queries(self, pitch):
        return Span(self.batch * pitch + self.q_begin, self.q_rows)

    @gluon.jit
    def keys(self, pitch):
        return Span(self.batch * pitch + self.k_begin, self.k_rows)


@gluon.jit
def dense_sequence(config: gl.constexpr, lengths, batch, seqlen_q, seqlen_k):
    """Batch entry `batch` of dense tensors. Padding hides keys and rows; it does not move the diagonal."""
    zero = batch * 0
    start = zero
    end = zero + seqlen_k
    live = zero + seqlen_q
    if has(config, "key_start"):
        start = gl.minimum(gl.maximum(gl.load(lengths.key_start + batch), 0), seqlen_k)
    if has(config, "key_end"):
        end = gl.minimum(gl.load(lengths.key_end + batch), seqlen_k)
    if has(config, "query_end"):
        live = gl.minimum(gl.maximum(gl.load(lengths.query_end + batch), 0), seqlen_q)
    diagonal = seqlen_k - seqlen_q - start
    return Sequence(batch, zero, zero + seqlen_q, live, start, gl.maximum(end - start, 0), diagonal, batch)


@gluon.jit
def packed_sequence(config: gl.constexpr, lengths, index, count, total_q):
    """Sequence `index` of `count` packed ones; index == count is what lies after the last: rows that attend to nothing."""
    q_begin = gl.load(lengths.cu_q + index)
    last = gl.minimum(index, count - 1)
    k_begin = gl.load(lengths.cu_k + last)
    past = index == count
    q_end = gl.where(past, total_q, gl.load(lengths.cu_q + last + 1))
    q_live = gl.where(past, 0, q_end - q_begin)
    k_rows = gl.where(past, 0, gl.load(lengths.cu_k + last + 1) - k_begin)
    if has(config, "seqused_q"):
        q_live = gl.minimum(q_live, gl.load(lengths.used_q + last))
    if has(config, "seqused_k"):
        k_rows = gl.minimum(k_rows, gl.load(lengths.used_k + last))
    return Sequence(index * 0, q_begin, q_end - q_begin, q_live, k_begin, k_rows, k_rows - q_live, index)


@gluon.jit
def load_rows(maps, buffers, slot, bar, span, head, row, HOW: gl.constexpr = None):
    """Start the copy of one tile, from row `row` of the span on, part by part of the head dim; `HOW`: as tma_load_as has it."""
    column = 0
    for part in gl.static_range(len(maps)):
        where = [WRAP, span.first + span.count, head, WRAP - span.count + row, column]
        if HOW is None:
            tma_load(maps[part], where, bar, buffers[part].index(slot))
        else:
            tma_load_as(HOW, maps[part], where, bar, buffers[part].index(slot))
        column += columns_of(buffers[part].shape)


@gluon.jit
def store_rows(maps, buffers, slot, span, head, row, HALF: gl.constexpr = None):
    """Start the copy of one tile to global memory, or of its parts' left or right halves (0, 1)."""
    column = 0
    for part in gl.static_range(len(maps)):
        start = column
        if HALF is not None:
            start = column + HALF * columns_of(buffers[part].shape)
            column += columns_of(buffers[part].shape)
        where = [WRAP, span.first + span.count, head, WRAP - span.count + row, start]
        tma_store(maps[part], where, buffers[part].index(slot))
        column += columns_of(buffers[part].shape)
