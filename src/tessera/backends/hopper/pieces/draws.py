"""Which tile of keys next: a persistent program begins with the tile of its own number; the later ones it draws from a counter
in the workspace, and its producer posts them.

Nobody who adds in a fixed order draws (backward_writer.py): he may wait only for tiles that are certain to be at work.
"""

from tessera.backends.hopper.pieces.channel import Ring, make_ring
from tessera.backends.hopper.pieces.numbers import make_numbers, of_first_lane, read_number, write_number
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
        return of_first_lane(take(self.counter)) + gl.num_programs(0)

    @gluon.jit
    def post(self, turn, number):
        """Producer: this tile comes after the `turn`-th."""
        self.ring.acquire(turn)
        write_number(self.numbers, self.ring.slot(turn), number)
        self.ring.publish(turn)

    @gluon.jit
    def read(self, turn):
        """Consumer: the number of the tile after the `turn`-th, in every thread."""
        self.ring.wait(turn)
        number = read_number(self.numbers, self.ring.slot(turn))
        self.ring.release(turn)
        return number


@gluon.jit
def make_draws(counter, tiles, readers: gl.constexpr):
    return Draws(counter, tiles, make_numbers(_SLOTS), make_ring(_SLOTS, readers))
