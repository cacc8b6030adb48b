"""Sums of dQ: parts of it go from the consumers through shared memory to the workspace, where TMA adds them up in float32.

**How a part lies.** Nobody cares where an element of dQ stands while it is summed, so a part (64 rows, columns) may be kept as
wgmma leaves it (PartLayout.REGISTERS): eight columns after eight, and in each the 128 threads one after another, with the four
values that each holds. A thread then writes 16 bytes beside its neighbour's; in rows of the matrix half of shared memory's banks
would wait for the other half. backward_rows.py undoes the order when it rounds dQ.

**In which order.** In any, by itself: the sums then differ in their last bits from run to run. Where runs must repeat, every 64
rows of a query head have a mark in the workspace, 0 at first, then the number (plus 1) of the last tile of keys that has added
its part; each tile waits for the one before it (see backward_writer.py).
"""

from tessera.backends.hopper.backward_plan import PART_LINE
from tessera.backends.hopper.config import ROWS
from tessera.backends.hopper.pieces.channel import Ring, make_ring
from tessera.jit.compat import aggregate, fence_async_shared, gl, gluon, tma_reduce_add, tma_store_wait

PART_ROWS = gl.constexpr(ROWS)
"""Rows of a part, and of a mark."""
LINE = gl.constexpr(PART_LINE)
"""TMA's widest box: eight columns of a part in registers' order are two of these lines."""


@gluon.constexpr_function
def adds_in_order(config):
    """Whether runs must repeat bit for bit."""
    return config.reproducibility.value == "bitwise"


@gluon.constexpr_function
def lies_in_rows(config):
    return config.part_layout.value == "rows"


@aggregate
class Sums:
    """Parts on their way, in float32: (slots, 64, columns) in rows, else (slots, 1, columns / 4, 256)."""

    parts: gl.shared_memory_descriptor
    ring: Ring

    @gluon.constexpr_function
    def __init__(self, parts, ring):
        self.parts = parts
        self.ring = ring


@gluon.jit
def make_sums(config: gl.constexpr, dq_map):
    count: gl.constexpr = config.part_buffers
    parts = gl.allocate_shared_memory(gl.float32, [count] + dq_map.block_type.shape, dq_map.layout)
    return Sums(parts, make_ring(count, 1))


@gluon.jit
def row_block(call, tile, member, block):
    """Which of all row blocks of the workspace a block of a sequence is, for a member of the heads' group."""
    return ((tile.head * call.group + member) * call.order.line + tile.work) // PART_ROWS + block


@gluon.jit
def _as_it_lies(part):
    """(64, columns) to (1, columns / 4, 256): row = 16 warp + 8 half + lane / 4, column = 8 group + 2 (lane % 4) + side become
    (group, warp, lane, half, side), which moves nothing between threads."""
    columns: gl.constexpr = part.shape[1]
    apart = gl.reshape(part, [4, 2, 8, columns // 8, 4, 2])
    return gl.reshape(gl.permute(apart, (3, 0, 2, 4, 1, 5)), [1, columns // 4, LINE])


@gluon.constexpr_function
def _in_flight(config):
    return config.part_buffers // config.adders - 1


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
def add_part(config: gl.constexpr, dq_map, sums, n, part, block, index):
    """Part n of dQ, counted over all adders: (64, columns) of an accumulator, part `index` of row block `block`. Added here, or,
    where there is an order to keep, handed to the warp that keeps it."""
    buffer = sums.parts.index(sums.ring.slot(n))
    if adds_in_order(config):
        sums.ring.acquire(n)
        _put(config, buffer, part)
        sums.ring.publish(n)
    else:
        tma_store_wait(_in_flight(config))
        _put(config, buffer, part)
        tma_reduce_add(dq_map, where_part_lies(config, block, index), buffer)


# -------------------------------------------------------------------------------------------------------------- marks


@gluon.jit
def _read_mark(mark):
    return gl.inline_asm_elementwise("ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [mark], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def await_mark(mark, value):
    """One warp: wait until the mark has this value; what was written before it was is then seen by TMA too."""
    found = _read_mark(mark)
    while found != value:
        found = _read_mark(mark)
    gl.inline_asm_elementwise("fence.proxy.async; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _set_asm(in_flight):
    return (
        f"cp.async.bulk.wait_group {in_flight}; fence.proxy.async; bar.warp.sync 0xffffffff;"
        " st.release.gpu.global.b32 [$1], $2; mov.u32 $0, 0;"
    )


@gluon.jit
def set_mark(mark, value, IN_FLIGHT: gl.constexpr):
    """One warp: once all its TMA stores but the last IN_FLIGHT are complete (not only read), the mark gets this value."""
    asm: gl.constexpr = _set_asm(IN_FLIGHT)
    gl.inline_asm_elementwise(asm, "=r,l,r", [mark, value], dtype=gl.int32, is_pure=False, pack=1)
