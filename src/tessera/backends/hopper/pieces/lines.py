"""In which lines a tile's 64 keys lie while the backward works on them.

As they come, but under dropout. There two neighbours in a row of S are drawn by one word (dropout.py), as P is packed. Of S^T a
thread has lines 8 apart, so in every 16 lines neighbours are put 8 apart: the lowest bit of a line's number and its fourth change
places. K and V are exchanged so in shared memory once a tile. S^T, dK and dV then have their keys in that order; dQ, a sum over
keys, does not know of it.
"""

from tessera.backends.hopper.pieces.tiles import M, has, matrix
from tessera.jit.compat import barrier, fence_async_shared, gl, gluon


@gluon.constexpr_function
def parts_neighbours(config):
    """Whether neighbours lie 8 lines apart. (With left padding each score has a word of its own: tiles begin anywhere.)"""
    return has(config, "dropout") and not has(config, "key_start")


@gluon.jit
def key_of_line(config: gl.constexpr, line):
    """Which of the tile's keys lies in a line."""
    if parts_neighbours(config):
        return line ^ ((line ^ line >> 3) & 1) * 9
    else:
        return line


@gluon.jit
def keys_of_lines(config: gl.constexpr, layout: gl.constexpr):
    """The same of all 64."""
    return key_of_line(config, gl.arange(0, M, layout))


@gluon.jit
def exchanged(config: gl.constexpr, x):
    """(64 keys, columns) in lines, or back: the exchange undoes itself."""
    columns: gl.constexpr = x.shape[1]
    if parts_neighbours(config):
        apart = gl.permute(gl.reshape(x, [4, 2, 4, 2, columns]), (0, 3, 2, 1, 4))
        return gl.reshape(apart, [M, columns])
    else:
        return x


@gluon.constexpr_function
def _layout(columns):
    """Of 16-bit rows, 16 bytes a thread."""
    across = min(columns // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])


@gluon.jit
def _as_brought(tile):
    keys = matrix(tile)
    layout: gl.constexpr = _layout(keys.shape[1])
    return keys.load(layout)


@gluon.jit
def part_neighbours(config: gl.constexpr, tiles):
    """64 keys each of K, of V or of both, which this warpgroup has waited for, into their lines in shared memory."""
    if parts_neighbours(config):
        keys = ()
        for i in gl.static_range(len(tiles)):
            keys = keys + (_as_brought(tiles[i]),)
        for i in gl.static_range(len(tiles)):
            matrix(tiles[i]).store(exchanged(config, keys[i]))
        fence_async_shared()
        barrier()  # a product reads what other warps have written
