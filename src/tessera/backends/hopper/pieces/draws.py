"""Which tile of keys next: a persistent program begins with the tile of its own number; the later ones its producer draws from a
counter in the workspace. It posts them all.

Where tiles add in a fixed order (backward_writer.py) the first is drawn too. A number is then drawn by a program that is running,
and that has nothing but lower ones before it: so the lowest that is not done is at work, and every wait for a lower one ends,
however many programs the device runs at a time.
"""

from tessera.backends.hopper.pieces.channel import Ring, make_barriers, make_ring
from tessera.backends.hopper.pieces.counts import tells_producer
from tessera.backends.hopper.pieces.key_tiles import tile_at
from tessera.backends.hopper.pieces.numbers import make_numbers, of_first_lane, read_number, write_number
from tessera.backends.hopper.pieces.remainder import Remainder
from tessera.backends.hopper.pieces.scheduler import take
from tessera.backends.hopper.pieces.sums import adds_in_order
from tessera.jit.compat import aggregate, gl, gluon

_SLOTS = gl.constexpr(2)
_WORDS = gl.constexpr(8)
"""A number and its tile: sequence, head, first key, whether it falls; its first row block, how many, and the place of the one
that comes first."""


@gluon.constexpr_function
def posts_tiles(config):
    """Whether the producer posts where a tile lies too. Each consumer would divide some six times, one after another, at every
    tile's end, and among packed sequences search: causal ones at head dim 64 won 3.5% by it (512) and 1.1% (4k), dense ones up
    to 1% (H200, 2026-11-22)."""
    return config.division.value in ("keys, dQ in turn", "keys, P ahead")


@aggregate
class Draws:
    """`tiles` numbers in all, of which `given` are begun without a draw, and the last of which may stand for less than a tile
    (`rest`: pieces/remainder.py); two of them, so that one can be posted before everybody has read the one before. `told`: an
    mbarrier for the consumers' words (pieces/counts.py)."""

    counter: gl.tensor
    tiles: gl.tensor
    given: gl.tensor
    numbers: gl.shared_memory_descriptor
    ring: Ring
    rest: Remainder
    told: gl.shared_memory_descriptor

    @gluon.jit
    def draw(self):
        """Producer: the next number (>= tiles: none is left)."""
        return of_first_lane(take(self.counter)) + self.given

    @gluon.jit
    def post(self, turn, number):
        """Producer: this is the program's `turn`-th tile, from 0 on."""
        self.ring.acquire(turn)
        write_number(self.numbers, self.ring.slot(turn), number)
        self.ring.publish(turn)

    @gluon.jit
    def post_tile(self, turn, number, tile, begin, count, start):
        """The same with where it lies: row blocks from `begin` on, of which that at place `start` comes first."""
        self.ring.acquire(turn)
        place = self.ring.slot(turn) * _WORDS
        words = (number, tile.seq.number, tile.head, tile.first, gl.where(tile.falls, 1, 0), begin, count, start)
        for word in gl.static_range(_WORDS):
            write_number(self.numbers, place + word, words[word])
        self.ring.publish(turn)

    @gluon.jit
    def read_posted(self, turn):
        """Consumer: all that is posted of the `turn`-th tile."""
        self.ring.wait(turn)
        return self._taken(turn)

    @gluon.jit
    def _taken(self, turn):
        place = self.ring.slot(turn) * _WORDS
        number = read_number(self.numbers, place)
        index = read_number(self.numbers, place + 1)
        head = read_number(self.numbers, place + 2)
        first = read_number(self.numbers, place + 3)
        falls = read_number(self.numbers, place + 4)
        begin = read_number(self.numbers, place + 5)
        count = read_number(self.numbers, place + 6)
        start = read_number(self.numbers, place + 7)
        self.ring.release(turn)
        return number, index, head, first, falls, begin, count, start

    @gluon.jit
    def read_tile(self, config: gl.constexpr, call, turn):
        """Consumer: (tile, first row block, how many, the place of the one that comes first) of the `turn`-th, whose number it
        has read."""
        _, index, head, first, falls, begin, count, start = self._taken(turn)
        return tile_at(config, call, index, head, first, falls > 0), begin, count, start

    @gluon.jit
    def read_first(self, config: gl.constexpr, own):
        """Consumer: the number of the first tile: where it is not drawn the program's `own`, which the compiler knows for a
        scalar."""
        number = self.read_next(config, 0)
        if adds_in_order(config):
            return number
        else:
            return own

    @gluon.jit
    def read_next(self, config: gl.constexpr, turn):
        """Consumer: the number of the `turn`-th tile, whose place it will read if that is posted."""
        if posts_tiles(config):
            self.ring.wait(turn)
            return read_number(self.numbers, self.ring.slot(turn) * _WORDS)
        else:
            return self.read(turn)

    @gluon.jit
    def read(self, turn):
        """Consumer: the number of the `turn`-th tile, in every thread."""
        self.ring.wait(turn)
        number = read_number(self.numbers, self.ring.slot(turn))
        self.ring.release(turn)
        return number


@gluon.jit
def make_draws(config: gl.constexpr, counter, tiles, whole, share, shares):
    """For programs that take tile after tile. Behind the counter lie marks."""
    given = tiles * 0 if adds_in_order(config) else gl.num_programs(0) + tiles * 0
    ring = make_ring(_SLOTS, config.consumers + config.writers)
    told = ring.full.index(0)  # stands for what nobody uses (see sums_in)
    if tells_producer(config):
        told = make_barriers(1, config.adders).index(0)
    rest = Remainder(whole, share, shares, counter + 1)
    return Draws(counter, tiles, given, make_numbers(_SLOTS * _WORDS if posts_tiles(config) else _SLOTS), ring, rest, told)
