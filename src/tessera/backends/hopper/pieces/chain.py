"""The order in which tiles of keys add to the same rows of dQ, where there is one (see backward_writer.py).

There may be several sums of dQ in the workspace, `strands`: tile after tile adds to the next of them, so that a tile follows not
the one before it but that many before.

Without a mask the tile with key 0 is the first and the last tile the last; where rows see an interval of keys it is the other way
round: then a tile's row blocks are those of the tile before it, moved on, so that nobody waits long. (Below a diagonal alone both
do: key_tiles._ordered.)
"""

from tessera.backends.hopper.pieces.row_ranges import FAR, row_blocks
from tessera.backends.hopper.pieces.sums import adds_in_order, from_last_to_first
from tessera.jit.compat import aggregate, gl, gluon


@aggregate
class Chain:
    """A tile's place: it adds to sum `strand`, and `before` is the number of the tile before it there. Of its rows nobody came
    before it to those before `opened`, nobody comes after it to those from `closed` on. `factor` is dQ's, for the last to round
    it."""

    strand: gl.tensor
    before: gl.tensor
    opened: gl.tensor
    closed: gl.tensor
    factor: gl.tensor

    @gluon.jit
    def opens(self, row):
        """Whether nothing has been added to a block's rows, from `row` on, before this tile."""
        return row < self.opened

    @gluon.jit
    def closes(self, row):
        """Whether nothing will be added to them after it."""
        return row >= self.closed


@gluon.jit
def chain_of(config: gl.constexpr, call, tile, factor):
    """The tile's place in the order; 0 where there is none."""
    if adds_in_order(config):
        number = tile.first // config.keys
        strands = call.order.strands
        strand = number % strands
        if from_last_to_first(config):
            earlier, several = row_blocks(config, call.band, tile.seq, tile.first + strands * config.keys)
            opened = gl.where(several == 0, FAR, earlier * config.rows)
            later, some = row_blocks(config, call.band, tile.seq, gl.maximum(tile.first - config.keys, 0))
            closed = gl.where((number == 0) | (some == 0), 0, (later + some) * config.rows)
            before = number + strands
            if config.sections_take_turns:
                before = gl.where(tile.falls, before, number - strands)
                opened = gl.where(tile.falls, opened, gl.where(number < strands, FAR, 0))
            return Chain(strand, before, opened, closed, factor)
        else:
            opened = gl.where(number < strands, FAR, 0)
            closed = gl.where(tile.first + config.keys >= tile.seq.k_rows, 0, FAR)
            return Chain(strand, number - strands, opened, closed, factor)
    else:
        return 0
