"""The backward's warps that add dQ up in a fixed order (see pieces/sums.py and chain.py): part after part from the consumers.

One warp where a program has one tile; two, which take blocks of rows in turn, where it takes tile after tile: to wait until
additions are complete, to tell the next tile and to hear from the one before take longer than a block has. An order's cost at
head dim 256, by one warp and by two: full 4k 1.26 and 1.09, 16k 1.29 and 1.10, causal 16k 1.31 and 1.21 (H200, 2026-11-21).
What it took most of was fences: two MEMBARs less a block, 4k causal 1.16 and 1.09, 8k 1.16 and 1.11 (2026-11-22; pieces/sums.py).

A tile only waits for tiles with lower numbers. Blocks are dispatched in the order of their numbers (CUB's single-pass scan counts
on that too), so those are running, and every wait ends. (Programs that take tile after tile: pieces/draws.py.)

Where the last tile rounds, the warp brings what has been added so far into the slot that the consumers' last part will take,
while they still compute it; they add, round, and hand back 16 bits.
"""

from tessera.backends.hopper.pieces.chain import Chain, chain_of
from tessera.backends.hopper.pieces.counts import count_tile, place_of_count
from tessera.backends.hopper.pieces.draws import posts_tiles
from tessera.backends.hopper.pieces.key_tiles import KeyTile, locate_keys, nth_place
from tessera.backends.hopper.pieces.kv_source import store_rows
from tessera.backends.hopper.pieces.row_ranges import row_blocks
from tessera.backends.hopper.pieces.sums import (
    PART_ROWS,
    adds_in_order,
    await_mark,
    rounds_last,
    row_block,
    row_blocks_of_sum,
    set_mark,
    shares_slots,
    where_part_lies,
)
from tessera.jit.compat import (
    aggregate,
    gl,
    gluon,
    mbarrier,
    tma_load,
    tma_reduce_add,
    tma_store,
    tma_store_wait,
    wait_for_previous,
)


@aggregate
class Task:
    """One tile's part in dQ: its row blocks are `begin` and the `count - 1` after it, for each query head of its group. `done`:
    blocks of the program's earlier tiles."""

    tile: KeyTile
    begin: gl.tensor
    count: gl.tensor
    chain: Chain
    marks: gl.tensor
    done: gl.tensor

    @gluon.jit
    def row(self, config: gl.constexpr, n):
        """The first row of the n-th block, in the sequence."""
        return (self.begin + nth_place(config, self.tile, self.count, n % self.count)) * PART_ROWS

    @gluon.jit
    def place(self, config: gl.constexpr, call, n):
        """Which of the workspace's row blocks the n-th is."""
        block = row_block(call, self.tile, n // self.count, self.row(config, n) // PART_ROWS)
        return self.chain.strand * row_blocks_of_sum(call) + block


@gluon.jit
def _release(config: gl.constexpr, dq_map, sums, call, task, m):
    """Slot m to the consumers; if theirs is the last part to come to its rows, with what has been added before."""
    n = m // config.parts
    row = task.row(config, n)
    if rounds_last(config) and task.chain.closes(row) and not task.chain.opens(row):
        place = task.place(config, call, n)
        index = m - n * config.parts
        if index == 0:
            await_mark(task.marks + place, task.chain.before + 1)
        part = sums.parts.index(sums.ring.slot(m))
        tma_load(dq_map, where_part_lies(config, place, index), sums.ring.fill(m, PART_ROWS * 4 * config.part_columns), part)
    else:
        sums.ring.release(m)


@gluon.jit
def _send(config: gl.constexpr, dq_map, out, sums, call, task, n, j: gl.constexpr):
    """Part j of the n-th block on its way: stored, added, or, in 16 bits, to dQ itself."""
    slot = sums.ring.slot((task.done + n) * config.parts + j)
    part = sums.parts.index(slot)
    where = where_part_lies(config, task.place(config, call, n), j)
    row = task.row(config, n)
    if rounds_last(config) and task.chain.closes(row):
        out_map, pitch, factor = out
        head = task.tile.head * call.group + n // task.count
        rows = task.tile.seq.queries(pitch)
        store_rows((out_map,), (sums.rounded,), 2 * slot, rows, head, row, j * config.part_columns)
    elif task.chain.opens(row):
        tma_store(dq_map, where, part)  # nothing lies there yet
    else:
        tma_reduce_add(dq_map, where, part)


@gluon.jit
def _write_in_turn(config: gl.constexpr, writer: gl.constexpr, dq_map, out, sums, call, task):
    """Every other block. Where the two warps share slots, one looks for a block's parts when the other has found all of the block
    before: an mbarrier tells this lap from the last, not from the one before that."""
    parts: gl.constexpr = config.parts
    number = task.tile.first // config.keys + 1
    for n in range((task.done + writer) & 1, task.count * call.group, 2):
        use = task.done + n
        mark = task.marks + task.place(config, call, n)
        if not task.chain.opens(task.row(config, n)):
            await_mark(mark, task.chain.before + 1)
        if shares_slots(config) and use > 0:
            mbarrier.wait(sums.found.index(1 - writer), ((use - 1) // 2) & 1)
        for j in gl.static_range(parts):
            m = use * parts + j
            sums.ring.wait(m)
            if j == parts - 1 and shares_slots(config):
                mbarrier.arrive(sums.found.index(writer))
            _send(config, dq_map, out, sums, call, task, n, j)
            if j > 0:
                tma_store_wait(1)
                sums.ring.release(m - 1)
        tma_store_wait(0)
        sums.ring.release(use * parts + parts - 1)
        set_mark(mark, number, 0)


@gluon.jit
def _write_in_order(config: gl.constexpr, dq_map, out, sums, call, task):
    """A row block's mark is set when the next one's first part is under way, so that nobody waits for stores to be complete."""
    parts: gl.constexpr = config.parts
    slots: gl.constexpr = config.part_buffers
    number = task.tile.first // config.keys + 1
    total = task.count * call.group * parts
    if rounds_last(config):
        for m in range(gl.minimum(total, slots)):
            _release(config, dq_map, sums, call, task, m)
    for n in range(task.count * call.group):
        is_there = rounds_last(config) and task.chain.closes(task.row(config, n))  # then _release has waited
        if not (task.chain.opens(task.row(config, n)) or is_there):
            await_mark(task.marks + task.place(config, call, n), task.chain.before + 1)
        for j in gl.static_range(parts):
            m = n * parts + j
            sums.ring.wait(m)
            _send(config, dq_map, out, sums, call, task, n, j)
            if m > 0:  # by now the part before has been read
                tma_store_wait(1)
                if not rounds_last(config):
                    sums.ring.release(m - 1)
                elif m - 1 + slots < total:
                    _release(config, dq_map, sums, call, task, m - 1 + slots)
            if j == 0 and n > 0:
                set_mark(task.marks + task.place(config, call, n - 1), number, 1)
    if total > 0:
        set_mark(task.marks + task.place(config, call, task.count * call.group - 1), number, 0)


@gluon.jit
def writer_of_dq(config: gl.constexpr, dq_map, out, sums, marks, call):
    if adds_in_order(config):  # else the consumers add
        tile = locate_keys(config, call, call.order.number)
        begin, count = row_blocks(config, call.band, tile.seq, tile.first)
        wait_for_previous()  # for the marks
        if count > 0:
            task = Task(tile, begin, count, chain_of(config, call, tile, out[2]), marks, begin * 0)
            _write_in_order(config, dq_map, out, sums, call, task)
        tma_store_wait(0)


@gluon.jit
def writer_of_many(config: gl.constexpr, writer: gl.constexpr, dq_map, out, sums, draws, marks, call):
    """Writer 0 or 1 of a program that takes tile after tile."""
    wait_for_previous()
    number = draws.read_next(config, 0)
    turn = 0
    done = 0
    while number < draws.tiles:
        if posts_tiles(config):
            tile, begin, count, _ = draws.read_tile(config, call, turn)
        else:
            tile = locate_keys(config, call, number)
            begin, count = row_blocks(config, call.band, tile.seq, tile.first)
        task = Task(tile, begin, count, chain_of(config, call, tile, out[2]), marks, done)
        _write_in_turn(config, writer, dq_map, out, sums, call, task)
        if config.counts_tiles:
            count_tile(draws, place_of_count(config, call, tile))
        done += count * call.group
        turn += 1
        number = draws.read_next(config, turn)
    tma_store_wait(0)
