"""The ring through which keys come from a cache: by TMA from one warp, or by cp.async from four.

As channel.Stream, "empty" is a named barrier a slot. By TMA `full` counts bytes. By cp.async it counts threads, each of which
arrives when its own copies have landed; those are ordinary writes to shared memory, so a consumer orders them before its
products, which read it asynchronously.
"""

from tessera.backends.hopper.chunk_config import Reading
from tessera.jit.compat import aggregate, arrive_after_copies, fence_async_shared, gl, gluon, mbarrier

COPYING_WARPS = 4


@gluon.constexpr_function
def copies_rows(config):
    return config.reading is Reading.ROWS


@aggregate
class CacheStream:
    """`warps` of the producer; `consumers` warpgroups that release every use; `first` slot's named barrier."""

    full: gl.shared_memory_descriptor
    slots: gl.constexpr
    warps: gl.constexpr
    consumers: gl.constexpr
    first: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, full, slots, warps, consumers, first):
        self.full = full
        self.slots = gl.constexpr(slots)
        self.warps = gl.constexpr(warps)
        self.consumers = gl.constexpr(consumers)
        self.first = gl.constexpr(first)

    @gluon.jit
    def slot(self, n):
        return n % self.slots

    @gluon.jit
    def acquire(self, n):
        """Producer: wait until every consumer has released use n - slots."""
        if n >= self.slots:
            _meet("sync", self.first + self.slot(n), self.warps, self.consumers)

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
        mbarrier.wait(self.full.index(self.slot(n)), (n // self.slots) & 1)
        if self.warps > 1:
            fence_async_shared()

    @gluon.jit
    def release(self, n):
        _meet("arrive", self.first + self.slot(n), self.warps, self.consumers)


@gluon.constexpr_function
def _arrivals(warps):
    return 1 if warps == 1 else 32 * warps


@gluon.jit
def make_cache_stream(config: gl.constexpr, consumers: gl.constexpr, first: gl.constexpr):
    slots: gl.constexpr = config.stages
    warps: gl.constexpr = producer_warps(config)
    full = gl.allocate_shared_memory(gl.int64, [slots, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(slots):
        mbarrier.init(full.index(slot), count=_arrivals(warps))
    return CacheStream(full, slots, warps, consumers, first)


@gluon.constexpr_function
def producer_warps(config):
    return COPYING_WARPS if config.reading is Reading.ROWS else 1


@gluon.constexpr_function
def _meet_asm(kind, warps, consumers):
    return f"bar.{kind} $1, {32 * warps + 128 * consumers}; mov.u32 $0, 0;"


@gluon.jit
def _meet(kind: gl.constexpr, number, warps: gl.constexpr, consumers: gl.constexpr):
    asm: gl.constexpr = _meet_asm(kind, warps, consumers)
    gl.inline_asm_elementwise(asm, "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)
