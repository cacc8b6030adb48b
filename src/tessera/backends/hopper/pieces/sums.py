"""Sums of dQ: parts of it go from the consumers through shared memory to the workspace, where TMA adds them up in float32.

**How a part lies.** Nobody cares where an element of dQ stands while it is summed, so a part (64 rows, columns) may be kept as
wgmma leaves it (PartLayout.REGISTERS): eight columns after eight, and in each the 128 threads one after another, with the four
values that each holds. A thread then writes 16 bytes beside its neighbour's; in rows of the matrix half of shared memory's banks
would wait for the other half. backward_rows.py undoes the order when it rounds dQ.

**In which order.** In any, by itself: the sums then differ in their last bits from run to run. Where runs must repeat, every 64
rows of a query head have a mark in the workspace, 0 at first, then the number (plus 1) of the last tile of keys that has added
its part; each tile waits for the one before it (see backward_writer.py). Where there are several sums of dQ (chain.py) they lie
one after another, and so do their marks, and behind these counts (counts.py).
"""

from tessera.backends.hopper.backward_config import PART_LINE
from tessera.backends.hopper.config import ROWS
from tessera.backends.hopper.pieces.channel import Ring, make_barriers, make_ring
from tessera.backends.hopper.pieces.masking import has_lower_bound
from tessera.backends.hopper.pieces.softmax import to_16_bit
from tessera.backends.hopper.pieces.tiles import has, matrix
from tessera.jit.compat import aggregate, fence_async_shared, gl, gluon, reinterpret, tma_reduce_add, tma_store_wait

PART_ROWS = gl.constexpr(ROWS)
"""Rows of a part, and of a mark."""
LINE = gl.constexpr(PART_LINE)
"""TMA's widest box: eight columns of a part in registers' order are two of these lines."""


@gluon.constexpr_function
def adds_in_order(config):
    """Whether tiles add one after another, so that runs repeat bit for bit."""
    return config.adding.value != "any order"


@gluon.constexpr_function
def rounds_last(config):
    """Whether the last tile to add rounds dQ."""
    return config.adding.value == "order, rounded"


@gluon.constexpr_function
def from_last_to_first(config):
    """Whether the order is from the last tile of keys to the first: where rows see an interval of keys."""
    return has(config, "right") or has_lower_bound(config)


@gluon.constexpr_function
def lies_in_rows(config):
    return config.part_layout.value == "rows"


@aggregate
class Sums:
    """Parts on their way, in float32: (slots, 64, columns) in rows, else (slots, 1, columns / 4, 256). `rounded` are the same
    bytes as rows of 16 bits, two of (64, columns) a slot, of which the first is used; or both, for dV and dK.

    Where the last tile rounds, the writer does not release a slot only: it may first have brought what has been added so far.
    `found`: where two writers share slots an mbarrier of each, that it has found its block's parts (backward_writer.py)."""

    parts: gl.shared_memory_descriptor
    rounded: gl.shared_memory_descriptor
    ring: Ring
    found: gl.shared_memory_descriptor


@gluon.constexpr_function
def shares_slots(config):
    """Whether two writers find their parts in the same slots, not every other block's always in the same."""
    return config.writers == 2 and config.part_buffers != 2 * config.parts


@gluon.jit
def sums_in(config: gl.constexpr, parts, rounded, bar):
    """Sums whose parts lie in these buffers. `bar`, any mbarriers, stands for those that nobody uses: if they were made, Triton
    would have their bytes hold data too, into which the hardware writes when programs give way to another process."""
    count: gl.constexpr = config.part_buffers
    if config.writers == 0:
        return Sums(parts, rounded, Ring(bar, bar, count), bar)
    elif shares_slots(config):
        found = make_barriers(2, 1)
        return Sums(parts, rounded, make_ring(count, 1), found)
    else:
        return Sums(parts, rounded, make_ring(count, 1), bar)


@gluon.jit
def make_sums(config: gl.constexpr, dq_map, out_map, bar):
    count: gl.constexpr = config.part_buffers
    shape: gl.constexpr = [count] + dq_map.block_type.shape
    if rounds_last(config) or (config.takes_tile_after_tile and not lies_in_rows(config)):
        # made as what needs the wider alignment
        rounded = gl.allocate_shared_memory(out_map.dtype, [2 * count] + out_map.block_type.shape, out_map.layout)
        return sums_in(config, reinterpret(rounded, gl.float32, shape, dq_map.layout), rounded, bar)
    else:
        parts = gl.allocate_shared_memory(gl.float32, shape, dq_map.layout)
        return sums_in(config, parts, parts, bar)


@gluon.jit
def row_block(call, tile, member, block):
    """Which of all row blocks of the workspace a block of a sequence is, for a member of the heads' group."""
    return ((tile.head * call.group + member) * call.order.line + tile.work) // PART_ROWS + block


@gluon.jit
def row_blocks_of_sum(call):
    """How many row blocks of the workspace one sum of dQ has."""
    return call.heads_kv * call.group * call.order.line // PART_ROWS


@gluon.jit
def _as_it_lies(part):
    """(64, columns) to (1, columns / 4, 256): row = 16 warp + 8 half + lane / 4, column = 8 group + 2 (lane % 4) + side become
    (group, warp, lane, half, side), which moves nothing between threads."""
    columns: gl.constexpr = part.shape[1]
    apart = gl.reshape(part, [4, 2, 8, columns // 8, 4, 2])
    return gl.reshape(gl.permute(apart, (3, 0, 2, 4, 1, 5)), [1, columns // 4, LINE])


@gluon.constexpr_function
def _in_flight(config):
    """Stores that may be under way when a part's buffer is to be written: of later parts, and of the block's dS."""
    return config.part_buffers // config.adders - 1 + (has(config, "dS kept") and config.division.value == "keys")


@gluon.jit
def where_part_lies(config: gl.constexpr, block, index):
    """TMA's coordinates of part `index` of a row block."""
    columns: gl.constexpr = config.part_columns
    if lies_in_rows(config):
        return [block * PART_ROWS, index * columns]
    else:
        return [block, index * (columns // 4), 0]


@gluon.jit
def _put(config: gl.constexpr, buffer, part):
    if lies_in_rows(config):
        buffer.store(part)
    else:
        buffer.store(_as_it_lies(part))
    fence_async_shared()


@gluon.jit
def _taken(config: gl.constexpr, buffer, part):
    """What lies in a buffer as a part does, in the layout of `part`."""
    layout: gl.constexpr = part.type.layout
    if lies_in_rows(config):
        return buffer.load(layout)
    else:
        columns: gl.constexpr = part.shape[1]
        lying: gl.constexpr = _as_it_lies(part).type.layout
        apart = gl.reshape(buffer.load(lying), [columns // 8, 4, 8, 4, 2, 2])
        rows = gl.reshape(gl.permute(apart, (1, 4, 2, 0, 3, 5)), [PART_ROWS, columns])
        return gl.convert_layout(rows, layout, assert_trivial=True)


@gluon.jit
def _round(config: gl.constexpr, sums, slot, part, is_first, factor):
    """The last part with what was added before, which lies in its slot, as 16 bits into that slot."""
    before = _taken(config, sums.parts.index(slot), part)
    total = part + gl.where(is_first, 0.0, before)
    rounded = sums.rounded.index(2 * slot)
    matrix(rounded).store(to_16_bit(total * factor, rounded.dtype))
    fence_async_shared()


@gluon.jit
def add_part(config: gl.constexpr, dq_map, sums, n, part, block, index, chain=0, row=0):
    """Part n of dQ, counted over all adders: (64, columns) of an accumulator, part `index` of row block `block`. Added here, or,
    where there is an order to keep, handed to the warp that keeps it. `row`: the block's first, in the sequence."""
    buffer = sums.parts.index(sums.ring.slot(n))
    if rounds_last(config):
        sums.ring.await_release(n)
        if chain.closes(row):
            _round(config, sums, sums.ring.slot(n), part, chain.opens(row), chain.factor)
        else:
            _put(config, buffer, part)
        sums.ring.publish(n)
    elif adds_in_order(config):
        sums.ring.acquire(n)
        if config.takes_tile_after_tile:
            tma_store_wait(0)  # the buffer may have taken dK or dV
        _put(config, buffer, part)
        sums.ring.publish(n)
    else:
        await_buffer(config)
        _put(config, buffer, part)
        send_part(config, dq_map, sums, n, block, index)


@gluon.jit
def await_buffer(config: gl.constexpr):
    """In any order: until the next part's buffer may be written."""
    tma_store_wait(_in_flight(config))


@gluon.jit
def put_in_registers_order(sums, n, part):
    """Part n into its buffer, PartLayout.REGISTERS; a fence must follow."""
    sums.parts.index(sums.ring.slot(n)).store(_as_it_lies(part))


@gluon.jit
def send_part(config: gl.constexpr, dq_map, sums, n, block, index):
    """In any order: part n from its buffer, added."""
    tma_reduce_add(dq_map, where_part_lies(config, block, index), sums.parts.index(sums.ring.slot(n)))


# -------------------------------------------------------------------------------------------------------------- marks


@gluon.jit
def _read_mark(mark):
    return gl.inline_asm_elementwise("ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [mark], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def await_mark(mark, value):
    """One warp: wait until the mark has this value; what was written before it was is then seen by TMA too. (The fence is of
    global memory alone: of all memory it is a MEMBAR besides, some 1500 cycles beside the main loop.)"""
    found = _read_mark(mark)
    while found != value:
        found = _read_mark(mark)
    gl.inline_asm_elementwise("fence.proxy.async.global; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _set_asm(in_flight):
    # no fence between TMA's writes and the store: that they are complete implies one, and it would be a second MEMBAR
    return f"cp.async.bulk.wait_group {in_flight}; bar.warp.sync 0xffffffff; st.release.gpu.global.b32 [$1], $2; mov.u32 $0, 0;"


@gluon.jit
def set_mark(mark, value, IN_FLIGHT: gl.constexpr):
    """One warp: once all its TMA stores but the last IN_FLIGHT are complete (not only read), the mark gets this value."""
    asm: gl.constexpr = _set_asm(IN_FLIGHT)
    gl.inline_asm_elementwise(asm, "=r,l,r", [mark, value], dtype=gl.int32, is_pure=False, pack=1)
