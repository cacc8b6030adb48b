"""The order in which tiles of keys add to the same rows of dQ, where there is one (see backward_writer.py).

Without a mask the tile with key 0 is the first and the last tile the last; where rows see an interval of keys it is the other way
round: then a tile's row blocks are those of the tile before it, moved on, so that nobody waits long. (Below a diagonal alone both
do: key_tiles._ordered.)
"""

from tessera.backends.hopper.pieces.row_ranges import FAR, row_blocks
from tessera.backends.hopper.pieces.sums import adds_in_order, from_last_to_first
from tessera.jit.compat import aggregate, gl, gluon


@aggregate
class Chain:
    """A tile's place: `before` is the number of the tile before it. Of its rows nobody came before it to those before `opened`,
    or, where `earlier` is not -1, that tile did, the last of the stretch before; and nobody comes after it to those from `closed`
    on. `factor` is dQ's, for the last to round it."""

    before: gl.tensor
    opened: gl.tensor
    closed: gl.tensor
    factor: gl.tensor
    earlier: gl.tensor

    @gluon.jit
    def opens(self, row):
        """Whether nothing has been added to a block's rows, from `row` on, before this tile."""
        return (row < self.opened) & (self.earlier < 0)

    @gluon.jit
    def mark(self, row):
        """What a block's mark is when its turn has come."""
        return gl.where(row < self.opened, self.earlier, self.before) + 1

    @gluon.jit
    def closes(self, row):
        """Whether nothing will be added to them after it."""
        return row >= self.closed


@gluon.jit
def chain_of(config: gl.constexpr, call, tile, factor):
    """The tile's place in the order; 0 where there is none."""
    if adds_in_order(config):
        number = tile.first // config.keys
        if from_last_to_first(config):
            earlier, several = row_blocks(config, call.band, tile.seq, tile.first + config.keys)
            opened = gl.where(several == 0, FAR, earlier * config.rows)
            later, some = row_blocks(config, call.band, tile.seq, gl.maximum(tile.first - config.keys, 0))
            closed = gl.where((number == 0) | (some == 0), 0, (later + some) * config.rows)
            before = number + 1
            if config.sections_take_turns:
                before = gl.where(tile.falls, before, number - 1)
                opened = gl.where(tile.falls, opened, gl.where(number == 0, FAR, 0))
            if config.stretch > 0:
                opened = gl.where(number + 1 == tile.stretch.end, FAR, opened)
            return Chain(before, opened, closed, factor, tile.stretch.before)
        else:
            opened = gl.where(number == 0, FAR, 0)
            closed = gl.where(tile.first + config.keys >= tile.seq.k_rows, 0, FAR)
            return Chain(number - 1, opened, closed, factor, number * 0 - 1)
    else:
        return 0
