"""Channels between warps: rings of shared-memory slots behind mbarriers, and the turns that the consumers take.

The n-th use of a ring is slot n mod slots; the parity of n div slots tells this lap from the last. The producer waits
for `empty`, the TMA's bytes complete `full`.
"""

from tessera.jit.compat import (
    aggregate,
    arrive_after_copies,
    fence_async_shared,
    gl,
    gluon,
    init_for_cluster,
    mbarrier,
)

# Hardware's named barriers, 0 to 15. Triton takes 0, 1 and one for each partition (2 to 4 here).
NAMED_BARRIER_TURN = gl.constexpr(7)
"""7 to 9: the consumers' turns, one a consumer; who waits for one and who passes it on meet there."""
NAMED_BARRIER_K = gl.constexpr(10)
NAMED_BARRIER_V = gl.constexpr(13)
"""10 to 12, 13 to 15: slots of K and of V that are free again, one a slot."""
NAMED_BARRIER_DEEP_K = gl.constexpr(6)
NAMED_BARRIER_DEEP_V = gl.constexpr(11)
"""6 to 10, 11 to 15: the same of up to five slots, where nobody takes turns (the configurations refuse them beside turns)."""


@aggregate
class Ring:
    """`full` and `empty` mbarriers of a ring; the data lies in buffers indexed by `slot(n)`."""

    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    slots: gl.constexpr

    @gluon.jit
    def slot(self, n):
        return n % self.slots

    @gluon.jit
    def parity(self, n):
        return (n // self.slots) & 1

    @gluon.jit
    def acquire(self, n):
        """Producer: wait until every consumer has released use n - slots."""
        mbarrier.wait(self.empty.index(self.slot(n)), self.parity(n) ^ 1)

    @gluon.jit
    def expect(self, n, count):
        """Producer: `count` bytes will arrive by TMA; returns the barrier that they complete."""
        bar = self.full.index(self.slot(n))
        mbarrier.expect(bar, count)
        return bar

    @gluon.jit
    def publish(self, n):
        """Producer: the slot holds what ordinary stores wrote."""
        mbarrier.arrive(self.full.index(self.slot(n)))

    @gluon.jit
    def wait(self, n):
        mbarrier.wait(self.full.index(self.slot(n)), self.parity(n))

    @gluon.jit
    def release(self, n):
        mbarrier.arrive(self.empty.index(self.slot(n)))

    @gluon.jit
    def fill(self, n, count):
        """As `release`, when `count` bytes have arrived by TMA besides; returns the barrier that they complete."""
        bar = self.empty.index(self.slot(n))
        mbarrier.expect(bar, count)
        return bar

    @gluon.jit
    def await_release(self, n):
        """Producer: as `acquire`, of a ring whose slots are released for their first use too."""
        mbarrier.wait(self.empty.index(self.slot(n)), self.parity(n))


@gluon.jit
def make_ring(slots: gl.constexpr, readers: gl.constexpr):
    return Ring(make_barriers(slots, 1), make_barriers(slots, readers), slots)


@gluon.jit
def make_slots(slots: gl.constexpr):
    """A ring whose slots are filled once: its users never acquire or release. (No barrier may be made that nobody uses:
    tessera.jit.barriers.)"""
    full = make_barriers(slots, 1)
    return Ring(full, full, slots)


@gluon.jit
def make_barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """`count` mbarriers, whose phases end with `arrivals` each."""
    barriers = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(count):
        mbarrier.init(barriers.index(index), count=arrivals)
    return barriers


@gluon.jit
def make_cluster_barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """The same where another program of the cluster arrives, and the first one's address in shared memory, for
    compat.place_in. Before the cluster meets."""
    barriers = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    first = init_for_cluster(barriers.index(0), arrivals)
    for index in gl.static_range(1, count):
        mbarrier.init(barriers.index(index), count=arrivals)
    return barriers, first


@aggregate
class Stream:
    """A ring that is used every turn of the main loop: `full` is an mbarrier, "empty" a named barrier, `first` the first slot's.

    Gluon's mbarrier.arrive holds up the whole warpgroup before one thread arrives for it. On a named barrier each warp
    arrives by itself and goes on. The producer needs no lap's parity: a consumer can't come to release a slot again
    before the producer has filled it again. Every use is acquired and released, whether or not something is loaded.

    One warp produces by TMA, and `full` counts bytes. More `warps` copy by cp.async, and `full` counts threads, each of which
    arrives when its own copies have landed; those are ordinary writes to shared memory, so a consumer orders them before its
    products, which read it asynchronously.

    `peer` has one, where another program reads the same (pieces/cluster.py). `by_bits`: a use's last bits say which slot. A lap's
    uses then have `places` numbers, a power of two, of which those past the slots are left out (`next`, `further`, `before`). To
    divide what may have a sign, for all that the compiler knows, is four instructions more before a product.
    """

    full: gl.shared_memory_descriptor
    slots: gl.constexpr
    consumers: gl.constexpr
    first: gl.constexpr
    warps: gl.constexpr
    peer: gl.tuple
    by_bits: gl.constexpr
    places: gl.constexpr

    @gluon.jit
    def next(self, n):
        """The use behind use n."""
        if self.slots < self.places:
            return n + gl.where((n & (self.places - 1)) == self.slots - 1, 1 + self.places - self.slots, 1)
        else:
            return n + 1

    @gluon.jit
    def further(self, n, count):
        """The use so many behind use n."""
        if self.slots < self.places:
            return n + count + (self.places - self.slots) * (((n & (self.places - 1)) + count) // self.slots)
        else:
            return n + count

    @gluon.jit
    def before(self, n):
        """The use before use n."""
        if self.slots < self.places:
            return n - gl.where((n & (self.places - 1)) == 0, 1 + self.places - self.slots, 1)
        else:
            return n - 1

    @gluon.jit
    def slot(self, n):
        if self.by_bits:
            return n & (self.places - 1)
        else:
            return n % self.slots

    @gluon.jit
    def parity(self, n):
        if self.by_bits:
            return (n >> _bits(self.places)) & 1
        else:
            return (n // self.slots) & 1

    @gluon.jit
    def acquire(self, n):
        """Producer: wait until every consumer has released use n - slots."""
        if n >= self.places:
            named_barrier("sync", self.first + self.slot(n), self.warps, self.consumers)

    @gluon.jit
    def expect(self, n, count):
        """Producer: `count` bytes will arrive by TMA; returns the barrier that they complete."""
        bar = self.full.index(self.slot(n))
        mbarrier.expect(bar, count)
        return bar

    @gluon.jit
    def publish(self, n):
        """Producer: the slot is full when the copies under way have landed."""
        arrive_after_copies(self.full.index(self.slot(n)), increment_count=False)

    @gluon.jit
    def wait(self, n):
        mbarrier.wait(self.full.index(self.slot(n)), self.parity(n))
        if self.warps > 1:
            fence_async_shared()

    @gluon.jit
    def release(self, n):
        named_barrier("arrive", self.first + self.slot(n), self.warps, self.consumers)

    @gluon.jit
    def release_here(self, n):
        """As `release`, between what stands before it in the program and what stands behind it: ptxas moves a barrier down, past
        products and exponentials that wait for nothing of it. Nothing moves past a loop, and this is one, of a single turn."""
        asm: gl.constexpr = _release_asm(self.warps, self.consumers)
        number = self.first + self.slot(n)
        gl.inline_asm_elementwise(asm, "=r,r,r", [number, n], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _arrivals(warps):
    return 1 if warps == 1 else 32 * warps


@gluon.constexpr_function
def _bits(places):
    return places.bit_length() - 1


@gluon.constexpr_function
def _places(slots, by_bits):
    """Numbers of a lap's uses: as many as slots, or the next power of two."""
    return 1 << (slots - 1).bit_length() if by_bits else slots


@gluon.constexpr_function
def barriers_of_slots(slots):
    """The first named barrier of K's slots, and of V's."""
    return (NAMED_BARRIER_K, NAMED_BARRIER_V) if slots <= 3 else (NAMED_BARRIER_DEEP_K, NAMED_BARRIER_DEEP_V)


@gluon.jit
def make_stream(slots: gl.constexpr, consumers: gl.constexpr, first: gl.constexpr, warps: gl.constexpr = 1):
    return make_paired_stream(slots, consumers, first, warps, ())


@gluon.jit
def make_paired_stream(
    slots: gl.constexpr, consumers: gl.constexpr, first: gl.constexpr, warps: gl.constexpr, peer, by_bits: gl.constexpr = False
):
    places: gl.constexpr = _places(slots, by_bits)
    return Stream(make_barriers(slots, _arrivals(warps)), slots, consumers, first, warps, peer, by_bits, places)


@gluon.constexpr_function
def _slot_asm(kind, warps, consumers):
    return f"bar.{kind} $1, {32 * warps + 128 * consumers}; mov.u32 $0, 0;"


@gluon.constexpr_function
def _release_asm(warps, consumers):
    arrive = f"bar.arrive $1, {32 * warps + 128 * consumers};"
    return f"{{ .reg .pred p; setp.lt.s32 p, $2, 0; AGAIN: {arrive} @p bra.uni AGAIN; mov.u32 $0, 0; }}"  # no use is below 0


@gluon.jit
def named_barrier(kind: gl.constexpr, number, warps: gl.constexpr, consumers: gl.constexpr):
    """Barrier `number` of so many producing warps and consumers: "sync" waits for all, "arrive" is counted and goes on."""
    asm: gl.constexpr = _slot_asm(kind, warps, consumers)
    gl.inline_asm_elementwise(asm, "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def take_turn(consumer):
    """Ping-pong (FlashAttention-3, section 3.1): one warpgroup's products run under another's softmax."""
    named_barrier("sync", NAMED_BARRIER_TURN + consumer, 0, 2)


@gluon.jit
def pass_turn(consumer, consumers: gl.constexpr):
    named_barrier("arrive", NAMED_BARRIER_TURN + (consumer + 1) % consumers, 0, 2)
