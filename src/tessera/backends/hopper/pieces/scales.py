"""Scales of an FP8 cache: one a head or sequence is a factor of S, or of O; one a block of rows goes with each key."""

from tessera.backends.hopper.pieces.tiles import has
from tessera.jit.compat import aggregate, gl, gluon


@aggregate
class Scales:
    """float32 (..., heads_kv), and strides from sequence to sequence, from cache entry to entry, from block to block of `rows`
    rows; 0 where they do not differ."""

    pointer: gl.tensor
    sequence: gl.tensor
    entry: gl.tensor
    block: gl.tensor
    rows: gl.tensor


@aggregate
class CacheScales:
    """Those of K and of V, read where the config has them."""

    k: Scales
    v: Scales


@gluon.jit
def scale_of_item(config: gl.constexpr, scales, sequence, head, NAME: gl.constexpr):
    """The factor of all of an item's keys; 1 where there is none, or where each key has its own."""
    if has(config, NAME) and not has(config, "block_scales"):
        return gl.load(scales.pointer + sequence * scales.sequence + head)
    else:
        return 1.0


@gluon.jit
def scales_of_keys(config: gl.constexpr, scales, place, head, live, NAME: gl.constexpr):
    """One factor a key, for keys at `place` (entry or page, row in it)."""
    if has(config, NAME):
        entry, row = place
        return gl.load(scales.pointer + entry * scales.entry + row // scales.rows * scales.block + head, mask=live, other=1.0)
    else:
        return 1.0
