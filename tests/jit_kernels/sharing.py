"""Three warpgroups that run one text."""

from tessera.jit.compat import begin_shared_text, end_shared_text, gl, gluon, share_text


@gluon.jit
def _write(out_ptr, tiles, factor):
    number = begin_shared_text()
    mine = tiles.index(number)
    mine.store(gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0])) + factor * number)
    every: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])  # a warp holds what all four have written
    gl.store(out_ptr + number * 128 + gl.arange(0, 128, every), mine.load(every))
    end_shared_text()


@gluon.jit
def _end(end_ptr):
    gl.store(end_ptr, 1)


@gluon.jit
def three_writers(out_ptr, after_ptr, factor):
    """out[128 number + i] = factor number + i; after[i] = i by the default partition, behind its part of the text; after[128] = 1
    by another."""
    tiles = gl.allocate_shared_memory(gl.int32, [3, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    gl.warp_specialize(
        [(share_text, ()), (_write, (out_ptr, tiles, factor)), (share_text, ()), (_end, (after_ptr + 128,))],
        [4, 4, 1], [120, 120, 24],
    )  # fmt: skip
    i = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(after_ptr + i, i)


@gluon.jit
def nobody_shares(out_ptr):
    """A text without anybody to share it."""
    gl.store(out_ptr + begin_shared_text(), 1)
    end_shared_text()
