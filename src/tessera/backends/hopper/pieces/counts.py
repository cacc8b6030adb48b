"""How many tiles of keys have added to the rows of a head: so these are rounded while tiles of other heads are still at work.

The last tiles are seldom as many as there are programs, and memory rests while the main kernel computes. So `finish_queries`
does not wait until all of it is done: its programs take the multiprocessors that the main kernel leaves, or was never given
(backward_sizes.spared_multiprocessors), and wait for a count of their rows' tiles. It lies in the workspace at the first mark
(pieces/sums.py) of the rows of a head, of a group's last head; marks have no other use where dQ is added in any order, and in an
order there is one more line of them. The main kernel's programs all run by then (they let the next kernel begin when they have),
so every wait ends.

To count takes a fence, some 1500 cycles. In an order the two writers have them to spare. Divided by products the consumer of dQ
has them at a tile's end; elsewhere consumers tell the producer, which is ahead of them (`tell`, `count_told`): ours / FA3 at head
dim 128, full 512, was 1.126 without counts, 1.071 with the consumers' own and 1.143 so (H200, 2026-11-22).
"""

from tessera.backends.hopper.pieces.sums import adds_in_order, row_block, row_blocks_of_sum
from tessera.jit.compat import gl, gluon, mbarrier

_COUNT = gl.constexpr(
    "cp.async.bulk.wait_group 0; bar.warp.sync 0xffffffff; { .reg .pred one; elect.sync _|one, 0xffffffff;"
    " @one red.release.gpu.global.add.u32 [$1], 1; } mov.u32 $0, 0;"
)
_LOOK_AGAIN = gl.constexpr("nanosleep.u32 500; ld.acquire.gpu.global.b32 $0, [$1];")


@gluon.constexpr_function
def adders_know(config):
    """Whether consumers know when the additions of a tile that is counted are complete; in an order the writers do."""
    return config.counts_tiles and not adds_in_order(config)


@gluon.constexpr_function
def tells_producer(config):
    """Whether consumers tell the producer, which counts."""
    return adders_know(config) and config.division.value != "products"


@gluon.jit
def place_of_count(config: gl.constexpr, call, tile):
    """Where the count of a tile's rows lies: among the marks, in an order behind them."""
    place = row_block(call, tile, call.group - 1, 0)
    if adds_in_order(config):
        place += call.order.strands * row_blocks_of_sum(call)
    return place


@gluon.jit
def count_tile(draws, place):
    """Each warp that calls adds one, when all that it has sent by TMA is complete (not only read)."""
    place = draws.rest.marks + place
    gl.inline_asm_elementwise(_COUNT, "=r,l", [place], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _complete_asm(in_flight):
    return f"cp.async.bulk.wait_group {in_flight}; mov.u32 $0, 0;"


@gluon.jit
def tell(config: gl.constexpr, draws, IN_FLIGHT: gl.constexpr = 2):
    """A consumer, when it knows what comes after a tile: all that it sent by TMA but the last IN_FLIGHT, its gradients', is
    complete. It tells of a tile once; the producer hears it before it posts what comes after the next."""
    if tells_producer(config):
        asm: gl.constexpr = _complete_asm(IN_FLIGHT)
        gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        mbarrier.arrive(draws.told)


@gluon.jit
def count_told(config: gl.constexpr, draws, telling, place):
    """The producer: waits for the consumers' word of the program's tile `telling`, and counts what is done then (-1: nothing)."""
    if tells_producer(config) and telling >= 0:
        mbarrier.wait(draws.told, telling & 1)
        if place >= 0:
            count_tile(draws, place)


@gluon.jit
def await_tiles(place, counted):
    """Until so many warps have counted. (Who waits long must not keep memory busy.)"""
    found = gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [place], dtype=gl.int32, is_pure=False, pack=1
    )
    while found != counted:
        found = gl.inline_asm_elementwise(_LOOK_AGAIN, "=r,l", [place], dtype=gl.int32, is_pure=False, pack=1)
