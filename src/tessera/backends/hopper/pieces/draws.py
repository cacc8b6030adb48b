"""Which tile of keys next: a persistent program begins with the tile of its own number; the later ones it draws from a counter
in the workspace, and its producer posts them.

Nobody who adds in a fixed order draws (backward_writer.py): he may wait only for tiles that are certain to be at work.
"""

from tessera.backends.hopper.pieces.channel import Ring, make_ring
from tessera.backends.hopper.pieces.scheduler import take
from tessera.jit.compat import aggregate, gl, gluon

_SLOTS = gl.constexpr(2)


@aggregate
class Draws:
    """`tiles` in all; two numbers, so that one can be posted before everybody has read the one before."""

    counter: gl.tensor
    tiles: gl.tensor
    numbers: gl.shared_memory_descriptor
    ring: Ring

    @gluon.constexpr_function
    def __init__(self, counter, tiles, numbers, ring):
        self.counter = counter
        self.tiles = tiles
        self.numbers = numbers
        self.ring = ring

    @gluon.jit
    def draw(self):
        """Producer: the next number (>= tiles: none is left)."""
        drawn = gl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [take(self.counter)], dtype=gl.int32, is_pure=False, pack=1
        )
        return drawn + gl.num_programs(0)

    @gluon.jit
    def post(self, turn, number):
        """Producer: this tile comes after the `turn`-th."""
        self.ring.acquire(turn)
        zero = gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
        self.numbers.index(self.ring.slot(turn)).store(zero + number)
        self.ring.publish(turn)

    @gluon.jit
    def read(self, turn):
        """Consumer: the number of the tile after the `turn`-th, in every thread (shuffled: the compiler then knows it for a
        scalar)."""
        self.ring.wait(turn)
        posted = self.numbers.index(self.ring.slot(turn)).load(gl.BlockedLayout([1], [32], [4], [0]))
        number = gl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [gl.max(posted, axis=0)], dtype=gl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
        self.ring.release(turn)
        return number


@gluon.jit
def make_draws(counter, tiles, readers: gl.constexpr):
    numbers = gl.allocate_shared_memory(gl.int32, [_SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return Draws(counter, tiles, numbers, make_ring(_SLOTS, readers))
