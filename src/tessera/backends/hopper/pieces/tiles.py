"""Register layouts of one warpgroup's tiles, and what is asked of a configuration while compiling."""

from tessera.backends.hopper.config import ROWS, ForwardConfig, Overlap, Staging
from tessera.jit.compat import gl, gluon


@gluon.constexpr_function
def has(config, name):
    """Whether a feature is compiled in. By name: a kernel's source then shows the word."""
    return any(feature.value == name for feature in config.features)


@gluon.constexpr_function
def has_bias(config):
    """Of any form; scores are then in natural units (pieces/modifiers.py)."""
    return has(config, "bias") or has(config, "bias of keys") or has(config, "bias of rows")


@gluon.constexpr_function
def keeps_p_during_softmax(config):
    return config.overlap in (Overlap.WHOLE, Overlap.AT_ONCE)


@gluon.constexpr_function
def takes_p_at_once(config):
    return config.overlap in (Overlap.AT_ONCE, Overlap.SCORES, Overlap.DRIFTING)


@gluon.constexpr_function
def compares_sums(config):
    """Whether what P at once looks at is compared sum by sum, for a register less: chunks of pages of 16 rows would spill it."""
    return not isinstance(config, ForwardConfig)


@gluon.constexpr_function
def overlaps(config):
    """Whether P V of a block runs under the softmax of the next."""
    return config.overlap is not Overlap.NONE


@gluon.constexpr_function
def takes_turns(config):
    """Whether the consumers take turns with their products."""
    return config.overlap.takes_turns


@gluon.constexpr_function
def has_low_blocks(config):
    return config.has_low_blocks


@gluon.constexpr_function
def shares_text(config):
    """Whether all consumers run one text: not where a number that is no constant is the one register too many."""
    return not (has(config, "alibi") and config.keys == 128 and max(sum(config.dims), sum(config.dims_v)) > 64)


@gluon.constexpr_function
def may_stand_by(config):
    """Whether a tile without rows for a consumer is nothing to it. Of two consumers the second works on such rows, which read
    as zeros: the way round costs 0.8% at head_dim 256, 1k."""
    return config.consumers == 3


@gluon.constexpr_function
def stages_halves(config):
    return config.staging is Staging.HALVES


@gluon.constexpr_function
def stages_in_query(config):
    return isinstance(config, ForwardConfig) and config.staging is Staging.QUERY


@gluon.constexpr_function
def masks_by_words(config):
    """Which of masking.py's two ways a cut block goes: words in the forward, but not where registers are few, in a window's three
    consumers and under dropout. Chunks have few cut blocks. (Nor where Q has a second part of 16 or 32 columns: with half blocks
    ptxas 12.8 leaves the descriptor of its last 16 unset in one of two branches, at head dim 96; see jit/descriptors.py. The gate
    sees 192 = 128 + 64, which is right.)"""
    wide = isinstance(config, ForwardConfig) and takes_p_at_once(config) and config.keys == 128 and config.dims[1:] in ((), (64,))
    few = config.consumers == 3 and has(config, "left")
    return wide and not few


@gluon.constexpr_function
def keeps_masks(config):
    """Whether what a mask makes of a tile is kept for the tiles behind it that it does the same to: those that see whole windows.
    Windows of 256 to 1024 keys at head_dim 128 1.01, at 64 (up to 2048 keys) 1.02; elsewhere not measured (H200, 2026-11-22)."""
    if not isinstance(config, ForwardConfig):
        return False
    named = {feature.value for feature in config.features}
    plain = {"left", "right"} <= named <= {"left", "right", "softcap", "sinks", "scale first"}
    measured = sum(config.dims) in (64, 128) and config.dims_v == config.dims
    return takes_p_at_once(config) and plain and measured and config.rows % config.keys == 0


@gluon.constexpr_function
def votes_on_maxima(config):
    """Whether a softmax without overlap keeps its references where no thread's own maxima have outgrown them. Full attention at
    head_dim 96 1.006 to 1.010 of asking for the rows' maxima in each block, under a diagonal 0.98 (H200, 2026-11-22)."""
    ragged = has(config, "left") or has(config, "right") or has(config, "documents")
    modified = has_bias(config) or has(config, "alibi") or has(config, "dropout")
    return isinstance(config, ForwardConfig) and config.overlap is Overlap.NONE and not ragged and not modified


@gluon.constexpr_function
def has_left_half(config):
    """Whether a consumer works on the left half of its first block alone, where its rows see no more: those that end at a
    diagonal, of two consumers the first's. Half a block of 64 keys would be no less work."""
    return masks_by_words(config) and has(config, "right")


@gluon.constexpr_function
def has_right_half(config):
    """The same of the right half of its last block, at a window's left edge: of two consumers the second's rows."""
    return masks_by_words(config) and has(config, "left")


@gluon.constexpr_function
def keys_of(config, half):
    """Keys of a block, or of one of its halves (0, 1; None for all of it)."""
    return config.keys if half is None else config.keys // 2


@gluon.constexpr_function
def holds_query(config):
    """Whether all of Q is in registers over the main loop, so that its buffer is free for the next tile's."""
    return config.held == len(config.dims)


@gluon.constexpr_function
def head_bytes(dims):
    """Bytes of one row of a tile, 16-bit elements."""
    return 2 * sum(dims)


@gluon.constexpr_function
def columns_of(buffer_shape):
    """Columns of one part of a head dim, from the shape of its buffer or block."""
    return buffer_shape[-1]


@gluon.constexpr_function
def accumulator_layout(columns):
    """A (64, columns) float32 accumulator of wgmma over the four warps: thread t of warp w holds rows 16 w + t / 4 (+ 8)."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def operand_layout(columns):
    """P as wgmma's A operand in registers, for a product with `columns` columns: the accumulator's own arrangement."""
    return gl.DotOperandLayout(0, accumulator_layout(columns), 2)


@gluon.constexpr_function
def row_layout(columns):
    """One value a row of such an accumulator."""
    return gl.SliceLayout(1, accumulator_layout(columns))


M = gl.constexpr(ROWS)


@gluon.jit
def allocate_tiles(tiles, count: gl.constexpr):
    """Shared memory for `count` blocks of a tensor descriptor."""
    shape: gl.constexpr = [count] + tiles.block_type.shape
    return gl.allocate_shared_memory(tiles.dtype, shape, tiles.layout)


@gluon.jit
def matrix(tile):
    """A tile as (rows, columns): TMA's blocks have leading ones."""
    rows: gl.constexpr = tile.shape[-2]
    columns: gl.constexpr = tile.shape[-1]
    return tile.reshape([rows, columns])


@gluon.jit
def query_tiles(buffers, slot, keys: gl.constexpr, held: gl.constexpr):
    """Q (64, columns) for products with `keys` keys, a part of the head dim each: the last `held` parts in registers, the others
    where they lie in shared memory."""
    q = ()
    for part in gl.static_range(len(buffers)):
        tile = matrix(buffers[part].index(slot))
        if part < len(buffers) - held:
            q = q + (tile,)
        else:
            q = q + (tile.load(operand_layout(keys)),)
    return q


@gluon.jit
def halves_of(x):
    """(64, columns) in an accumulator's layout as its left and its right half; no register moves."""
    columns: gl.constexpr = x.shape[1]
    left, right = gl.split(gl.permute(gl.reshape(x, [M, 2, columns // 2]), (0, 2, 1)))
    layout: gl.constexpr = accumulator_layout(columns // 2)
    return (gl.convert_layout(left, layout, assert_trivial=True), gl.convert_layout(right, layout, assert_trivial=True))


@gluon.jit
def beside(left, right):
    """(64, columns) in an accumulator's layout from its halves; no register moves."""
    columns: gl.constexpr = 2 * left.shape[1]
    whole = gl.reshape(gl.permute(gl.join(left, right), (0, 2, 1)), [M, columns])
    return gl.convert_layout(whole, accumulator_layout(columns), assert_trivial=True)


@gluon.jit
def halves_of_all(parts):
    """The left halves of all, and the right ones."""
    lefts = ()
    rights = ()
    for part in gl.static_range(len(parts)):
        left, right = halves_of(parts[part])
        lefts = lefts + (left,)
        rights = rights + (right,)
    return lefts, rights


@gluon.jit
def empty_accumulator(tiles):
    """Zeros (64, columns) for a product with these tiles."""
    columns: gl.constexpr = columns_of(tiles.shape)
    return gl.zeros([M, columns], gl.float32, accumulator_layout(columns))


@gluon.jit
def fresh_zero():
    """A 0 that the compiler can't see through or hoist. Tiles that stay for the whole loop are indexed with it: else LLVM
    keeps the descriptor of every product's operand in two registers."""
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
