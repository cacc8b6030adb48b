"""The last tiles of keys, which are fewer than the programs, by rows: each program has an even share of their row blocks.

The blocks of rows of all these tiles, one tile's after another's, are cut into shares of equal length. A share may reach into a
second tile, so it is posted as two numbers: first what it has of the later tile, whose first rows these are, then what it has of
its own. Who has a tile's last rows adds up what the others have, which lies in the workspace as float32, and stores the tile's
gradients. It waits for lower shares alone, and for parts before which nobody waits: so every wait ends.
"""

from tessera.backends.hopper.pieces.key_tiles import locate_keys
from tessera.backends.hopper.pieces.row_ranges import row_blocks
from tessera.backends.hopper.pieces.sums import await_mark, set_mark
from tessera.backends.hopper.pieces.tiles import M
from tessera.jit.compat import aggregate, barrier, gl, gluon


@gluon.constexpr_function
def divides(config):
    """Whether the last tiles are divided by rows."""
    return config.divides_remainder


@aggregate
class Remainder:
    """Tiles from `whole` on are divided into shares of `share` row blocks. `sums`: in float32, dV and then dK of each 64 keys, a
    place a share; `marks`, that they lie there."""

    whole: gl.tensor
    share: gl.tensor
    sums: gl.tensor
    marks: gl.tensor


@aggregate
class Part:
    """Of tile `tile` the row blocks `begin` to `end`, in share `share`."""

    tile: gl.tensor
    begin: gl.tensor
    end: gl.tensor
    share: gl.tensor


@gluon.jit
def _height(config: gl.constexpr, call):
    """Row blocks that see a tile."""
    return (call.seqlen_q + config.rows - 1) // config.rows


@gluon.jit
def _part(config: gl.constexpr, call, rest, number):
    """What number `number`, from rest.whole on, stands for."""
    height = _height(config, call)
    share = (number - rest.whole) // 2
    begin = share * rest.share
    end = gl.minimum(begin + rest.share, (call.batch * call.heads_kv * call.order.blocks - rest.whole) * height)
    tile = begin // height
    edge = gl.minimum((tile + 1) * height, end)
    is_own = (number - rest.whole) % 2 == 1
    first = gl.where(is_own, begin, edge)
    last = gl.where(is_own, edge, end)
    tile = gl.where(is_own, tile, tile + 1)
    return Part(rest.whole + tile, first - tile * height, last - tile * height, share)


@gluon.jit
def number_after(config: gl.constexpr, call, draws, number):
    """Producer: the next number to post."""
    if divides(config):
        rest = draws.rest
        following = number + 1
        if (number < rest.whole) | ((number - rest.whole) % 2 == 1):
            following = draws.draw()
            if following >= rest.whole:
                following = 2 * following - rest.whole
                part = _part(config, call, rest, following)
                following += gl.where(part.end > part.begin, 0, 1)
        return following
    else:
        return draws.draw()


@gluon.jit
def locate_work(config: gl.constexpr, call, draws, number):
    """(tile, first row block, how many) of a number."""
    number = gl.minimum(number, draws.tiles - 1)
    if divides(config):
        rest = draws.rest
        begin = number * 0
        end = begin + _height(config, call)
        if number >= rest.whole:
            part = _part(config, call, rest, number)
            number = part.tile
            begin = part.begin
            end = part.end
        return locate_keys(config, call, number), begin, end - begin
    else:
        tile = locate_keys(config, call, number)
        begin, count = row_blocks(config, call.band, tile.seq, tile.first)
        return tile, begin, count


@gluon.jit
def _begin_of(config: gl.constexpr, index):
    """Where gradient `index` lies in a share's place."""
    return (index // 2 * (config.dim + config.dim_v) + index % 2 * config.dim_v) * M


@gluon.jit
def _places(config: gl.constexpr, sums, share, index, gradient):
    """Where gradient `index` of a share lies."""
    columns: gl.constexpr = gradient.shape[1]
    layout: gl.constexpr = gradient.type.layout
    rows = gl.arange(0, M, gl.SliceLayout(1, layout))
    begin = sums + share * config.values_of_share + _begin_of(config, index)
    return begin + rows[:, None] * columns + gl.arange(0, columns, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def joined(config: gl.constexpr, call, draws, index, number, gradient):
    """(gradient `index` of the tile, whether this program stores it), when the number's rows are done: of the c-th 64 keys dV is
    2 c, dK 2 c + 1."""
    rest = draws.rest
    count: gl.constexpr = config.gradients_of_tile
    closes = number < rest.whole
    if number >= rest.whole:
        part = _part(config, call, rest, number)
        height = _height(config, call)
        closes = part.end == height
        if closes:
            for share in range((part.tile - rest.whole) * height // rest.share, part.share):
                await_mark(rest.marks + share * count + index, 1)
                gradient += gl.load(_places(config, rest.sums, share, index, gradient), cache_modifier=".cg")
        else:
            gl.store(_places(config, rest.sums, part.share, index, gradient), gradient)
            barrier()  # every thread's before the mark
            set_mark(rest.marks + part.share * count + index, 1, 0)
    return gradient, closes
