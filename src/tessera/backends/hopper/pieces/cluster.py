"""Two programs of a cluster that go through the same blocks of keys: each block comes from L2 once, by TMA to both.

Program 0 loads K for both, program 1 V. A program's producer does for every block what it would do by itself, waits until its
own consumers have left the slot and says how many bytes will come; the one that loads waits for the other's word as well:

    loads              waits for `left`, then a multicast, whose bytes complete each program's own `full`
    is loaded for      arrives at the loader's `left`: its consumers have left the slot too

The consumers know nothing of it. (Were they to arrive at the loader's `left` themselves, a thread each, ptxas would no longer
see that a loop's counters are the same in all threads: 19% more instructions.) Program 0 also draws the tiles, and sends their
numbers to program 1's box. Every arrival and every number is waited for, and every load's bytes by the consumers of both: so no
program ends while the other still reaches for it.
"""

from tessera.backends.hopper.config import Pairing
from tessera.backends.hopper.pieces.channel import make_cluster_barriers
from tessera.jit.compat import (
    aggregate,
    arrive_in_cluster,
    gl,
    gluon,
    init_for_cluster,
    mbarrier,
    place_in,
    reinterpret,
    send_in_cluster,
)

SIZE = gl.constexpr(2)


@gluon.constexpr_function
def is_pair(config):
    return config.pairing is not None


@gluon.constexpr_function
def is_pair_of_rows(config):
    return config.pairing is Pairing.ROWS


@gluon.constexpr_function
def is_pair_of_heads(config):
    return config.pairing is Pairing.HEADS


@gluon.constexpr_function
def size_of(config):
    return config.cluster


@gluon.constexpr_function
def rows_together(config):
    """Rows that blocks of keys are loaded for: a tile's, or those of a pair of tiles."""
    return config.rows * config.tiles_together


@gluon.jit
def program_of_pair():
    """0 or 1."""
    return gl.program_id(0) % SIZE


@gluon.jit
def member_of_pair(turn):
    """Which of a pair's two tiles is this program's: they take turns, so that neither always has the one with more keys."""
    return (gl.program_id(0) + turn) % SIZE


@aggregate
class Peer:
    """Beside a stream's own barriers: which program this is, which one loads, and that one's `left`, where the other says that
    its consumers have left a slot; `place` is the first one's in the cluster."""

    left: gl.shared_memory_descriptor
    place: gl.tensor
    rank: gl.tensor
    loader: gl.constexpr

    @gluon.jit
    def may_load(self, slot, lap):
        """Producer, with its own slot free for lap `lap`: whether it loads for both, which it now can."""
        loads = self.rank == self.loader
        if lap > 0:
            if loads:
                mbarrier.wait(self.left.index(slot), (lap - 1) & 1)
            else:
                arrive_in_cluster(self.place + slot * 8)
        return loads


@gluon.jit
def _make_peer(slots: gl.constexpr, loader: gl.constexpr):
    left, first = make_cluster_barriers(slots, 1)
    return Peer(left, place_in(loader, first), program_of_pair(), loader)


@gluon.jit
def make_peers(config: gl.constexpr):
    """K's and V's, a tuple of one each; empty for a program by itself. Before the warps specialise."""
    if is_pair(config):
        return (_make_peer(config.stages, 0),), (_make_peer(config.stages, 1),)
    else:
        return (), ()


@aggregate
class Box:
    """Where program 1 gets its tiles' numbers, `turn` after `turn`: mbarriers, each with the number behind it; `place` is the
    first one's in the cluster. `room`: as many as slots, for program 0 can be that many blocks ahead, and so tiles."""

    places: gl.shared_memory_descriptor
    place: gl.tensor
    room: gl.constexpr

    @gluon.jit
    def send(self, turn, number):
        """Program 0, from turn 1 on: a first tile is known from the start."""
        send_in_cluster(self.place + (turn - 1) % self.room * 16, number)

    @gluon.jit
    def receive(self, turn):
        """Program 1: the number sent for its `turn`-th tile."""
        place = (turn - 1) % self.room * 2
        bar = self.places.index(place)
        mbarrier.expect(bar, 4)
        mbarrier.wait(bar, ((turn - 1) // self.room) & 1)
        words: gl.constexpr = 4 * self.room
        layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        numbers = reinterpret(self.places, gl.int32, [words, 1], layout)
        number = numbers.index(2 * place + 2).load(gl.BlockedLayout([1], [32], [1], [0]))
        return gl.max(number, axis=0)


@gluon.jit
def make_box(config: gl.constexpr):
    """A tuple of one; empty for a program by itself."""
    if is_pair(config):
        room: gl.constexpr = config.stages
        places = gl.allocate_shared_memory(gl.int64, [2 * room, 1], mbarrier.MBarrierLayout())
        first = init_for_cluster(places.index(0), 1)
        for place in gl.static_range(1, room):
            mbarrier.init(places.index(2 * place), count=1)
        return (Box(places, place_in(1, first), room),)
    else:
        return ()
