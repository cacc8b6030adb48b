"""Masks as one interval of keys a row: lo(i) <= j < hi(i), both non-decreasing in i (see tessera.mask).

Keys count from the sequence's first visible key here (kv_source.Sequence). Rows lo..hi of a tile then see the keys
[lo(first), hi(last)), and all of them see [lo(last), hi(first)): only blocks that these ranges cut are masked, element
by element, and blocks outside are never loaded.
"""

from tessera.backends.hopper.pieces.cluster import is_pair_of_rows, rows_together
from tessera.backends.hopper.pieces.tiles import M, accumulator_layout, has, holds_query, keeps_masks, masks_by_words, takes_turns
from tessera.jit.compat import aggregate, gl, gluon


@aggregate
class Band:
    """What limits a row: distances to the diagonal, and rows of document bounds (begin, end; batch stride)."""

    left: gl.tensor
    right: gl.tensor
    document_begin: gl.tensor
    document_end: gl.tensor
    document_stride: gl.tensor


@gluon.constexpr_function
def has_lower_bound(config):
    return has(config, "left") or has(config, "documents")


@gluon.constexpr_function
def has_one_loop(config):
    """Whether all blocks of a tile go through one loop, which masks where it must (mask_scores_where_cut): those of windows and
    documents, of which a tile has few. (By three consumers at head_dim 64 0.96 to 0.99 of three loops, H200, 2026-11-22.)"""
    few = masks_by_words(config) and config.consumers == 2
    alike = keeps_masks(config) and not takes_turns(config) and not holds_query(config)
    return has_lower_bound(config) and (few or alike)


@gluon.jit
def lowest_key(config: gl.constexpr, band, seq, row):
    """lo(row), for one row or a tensor of rows (inside the sequence where there are documents)."""
    lo = row * 0
    if has(config, "left"):
        lo = gl.maximum(lo, row + (seq.diagonal - band.left))
    if has(config, "documents"):
        lo = gl.maximum(lo, gl.load(band.document_begin + seq.batch * band.document_stride + row) - seq.k_begin)
    return lo


@gluon.jit
def highest_key(config: gl.constexpr, band, seq, row):
    """hi(row): one past the last key."""
    hi = row * 0 + seq.k_rows
    if has(config, "right"):
        hi = gl.minimum(hi, row + (seq.diagonal + band.right + 1))
    if has(config, "documents"):
        hi = gl.minimum(hi, gl.load(band.document_end + seq.batch * band.document_stride + row) - seq.k_begin)
    return hi


@gluon.jit
def block_range(config: gl.constexpr, band, seq, first, last):
    """Blocks [begin, end) that the rows first..last (live ones) need; one, fully masked, where they see no key."""
    begin = lowest_key(config, band, seq, first) // config.keys
    end = (highest_key(config, band, seq, last) + config.keys - 1) // config.keys
    return begin, gl.maximum(end, begin + 1)


@gluon.jit
def tile_blocks(config: gl.constexpr, band, tile):
    """Blocks [begin, end) that a tile's live rows need, or those of a pair of tiles: what the producer loads and every consumer
    goes through."""
    rows: gl.constexpr = rows_together(config)
    first = tile.first
    if is_pair_of_rows(config):
        first = first - first % rows
    last = gl.maximum(gl.minimum(first + rows, tile.seq.q_live) - 1, first)
    return block_range(config, band, tile.seq, first, last)


@gluon.jit
def full_block_range(config: gl.constexpr, band, seq, first, last):
    """Blocks [begin, end) that every one of the rows first..last sees whole."""
    begin = (lowest_key(config, band, seq, last) + config.keys - 1) // config.keys
    end = gl.maximum(highest_key(config, band, seq, first), 0) // config.keys
    return begin, end


@gluon.jit
def row_bounds(config: gl.constexpr, band, seq, first, HEADS: gl.constexpr = 1):
    """The bounds of 64 rows as (hi,) or (hi, lo), each (64, 8): the bound minus the key's place in its group of 8, or, for one
    loop, how many groups have their key at that place below the bound. `HEADS` rows that follow one another are one position's,
    the first of them position `first`'s.

    A block then compares constants with it, two instructions a score; comparing two ramps takes four times as many.
    """
    keys: gl.constexpr = config.keys
    s = gl.zeros([M, keys], gl.float32, accumulator_layout(keys))
    grouped: gl.constexpr = gl.reshape(s, [M, keys // 8, 8]).type.layout
    layout: gl.constexpr = gl.SliceLayout(1, grouped)
    place = gl.arange(0, 8, gl.SliceLayout(0, layout))[None, :]
    rows = first + gl.arange(0, M, gl.SliceLayout(1, layout)) // HEADS
    inside = gl.minimum(rows, seq.q_rows - 1)
    bounds = (highest_key(config, band, seq, inside)[:, None] - place,)
    if has_lower_bound(config):
        bounds = bounds + (lowest_key(config, band, seq, inside)[:, None] - place,)
    if has_one_loop(config):
        bounds = ((bounds[0] + 7) >> 3, (bounds[1] + 7) >> 3)
    return bounds


@aggregate
class Share:
    """What one consumer's 64 rows need of their tile's blocks: [begin, end), of which all rows see [full_begin, full_end)
    whole. `unseen` and `spare` count the tile's blocks above and below, which are there for the other consumers. `left_alone`:
    of the first block, `end` - 1, they see nothing right of its middle; `right_alone`: of the last one nothing left of it."""

    begin: gl.tensor
    end: gl.tensor
    full_begin: gl.tensor
    full_end: gl.tensor
    unseen: gl.tensor
    spare: gl.tensor
    left_alone: gl.tensor
    right_alone: gl.tensor


@gluon.constexpr_function
def has_unseen(config):
    """Whether a tile may have blocks that only rows below a consumer's see."""
    return has(config, "right") or has(config, "documents")


@gluon.constexpr_function
def has_spare(config):
    """Whether a tile may have blocks that only rows above a consumer's see. Where consumers take turns they are not left
    out: one that stops early would wait for the next tile, which waits for the blocks that it has yet to release."""
    return has_lower_bound(config) and not takes_turns(config)


@gluon.jit
def share_of(config: gl.constexpr, band, tile, consumer):
    """What this consumer's rows need: one block at least."""
    seq = tile.seq
    row = tile.first + consumer * M
    tile_begin, tile_end = tile_blocks(config, band, tile)
    first = gl.minimum(row, seq.q_rows - 1)
    last = gl.minimum(row + (M - 1), seq.q_rows - 1)
    own_begin, own_end = block_range(config, band, seq, first, last)
    begin = tile_begin
    end = tile_end
    if has_unseen(config):
        end = gl.minimum(gl.maximum(own_end, tile_begin + 1), tile_end)
    if has_spare(config):
        begin = gl.maximum(gl.minimum(own_begin, end - 1), tile_begin)
    full_begin, full_end = full_block_range(config, band, seq, first, last)
    left_alone = highest_key(config, band, seq, last) <= end * config.keys - config.keys // 2
    right_alone = lowest_key(config, band, seq, first) >= begin * config.keys + config.keys // 2
    return Share(begin, end, full_begin, full_end, tile_end - end, begin - tile_begin, left_alone, right_alone)


@gluon.jit
def mask_scores(s, bounds, first_key, CUT: gl.constexpr):
    """S (64, keys) with -inf where a row does not see the key. `CUT`: "upper" where hi cuts the block and lo may, "upper alone"
    and "lower" where one of them does ("any": see mask_scores_where_cut)."""
    keys: gl.constexpr = s.shape[1]
    grouped = gl.reshape(s, [M, keys // 8, 8])
    layout: gl.constexpr = grouped.type.layout
    group = gl.arange(0, keys // 8, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None] * 8
    if CUT == "lower":
        keep = group >= gl.expand_dims(bounds[1] - first_key, 1)
    else:
        keep = group < gl.expand_dims(bounds[0] - first_key, 1)
        if len(bounds) == 2 and CUT != "upper alone":
            keep = keep & (group >= gl.expand_dims(bounds[1] - first_key, 1))
    grouped = gl.where(keep, grouped, float("-inf"))
    return gl.convert_layout(gl.reshape(grouped, [M, keys]), s.type.layout, assert_trivial=True)


@gluon.jit
def _groups_below(bound, first_key, grouped):
    """For each place in a group of 8 keys, (64, 8): a bit a group of the block, set where the key there lies below the bound."""
    groups: gl.constexpr = grouped.shape[1]
    layout: gl.constexpr = gl.SliceLayout(1, grouped.type.layout)
    bound = gl.convert_layout(bound, layout, assert_trivial=True)
    count = gl.minimum(gl.maximum((bound - first_key + 7) >> 3, 0), groups)
    return (1 << count) - 1


@gluon.constexpr_function
def _masked_asm(n):
    # of 4 registers that follow one another, 2 are neighbours in one row and 2 in the row 8 below; groups of 8 keys lie 4 apart
    lines = ["{ .reg .pred seen; .reg .b32 t;"]
    for i in range(n):
        lines += [f"and.b32 t, ${2 * n + i % 4}, {1 << i // 4};", "setp.ne.u32 seen, t, 0;"]
        lines += [f"selp.f32 ${i}, ${i}, 0fFF800000, seen;"]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _masked_constraints(n):
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["r"] * n)


@gluon.jit
def mask_scores_by_words(s, bounds, first_key, CUT: gl.constexpr):
    """The same; whether a score is seen is a bit of a word, which takes a few more registers, but two instructions a score though
    both bounds may cut the block. Over the other, the whole kernel: windows at head_dim 128 1.015, causal 1.007, and 0.98 in
    windows at head_dim 64 (three consumers; H200, 2026-11-21)."""
    keys: gl.constexpr = s.shape[1]
    grouped = gl.reshape(s, [M, keys // 8, 8])
    if CUT == "lower":
        seen = ~_groups_below(bounds[1], first_key, grouped)
    elif len(bounds) == 1 or CUT == "upper alone":
        seen = _groups_below(bounds[0], first_key, grouped)
    else:
        seen = _groups_below(bounds[0], first_key, grouped) & ~_groups_below(bounds[1], first_key, grouped)
    asm: gl.constexpr = _masked_asm(keys // 2)
    constraints: gl.constexpr = _masked_constraints(keys // 2)
    grouped = gl.inline_asm_elementwise(
        asm, constraints, [grouped, gl.expand_dims(seen, 1)], dtype=gl.float32, is_pure=True, pack=keys // 2
    )
    return gl.convert_layout(gl.reshape(grouped, [M, keys]), s.type.layout, assert_trivial=True)


@gluon.constexpr_function
def _masked_where_asm(n, upper, lower, jumps):
    # of 4 registers that follow one another, 2 are neighbours in one row and 2 in the row 8 below; groups of 8 keys lie 4 apart.
    # A word's bits are looked at one after the other: ptxas then makes predicates of seven at once
    bounds = 2 * n
    first = bounds + n * (upper + lower)
    lines = ["{ .reg .pred whole, seen; .reg .b32 t, word, first;"]
    if jumps:
        lines += [f"setp.eq.u32 whole, ${first + n}, 0;", "@whole bra DONE;"]
    lines += [f"shr.s32 first, ${first}, 3;"]
    for place in range(4):
        for x, bound in (("word", bounds + place), ("t", bounds + n * upper + place))[not upper : 1 + lower]:
            # bits of the groups from the bound on
            lines += [f"sub.s32 {x}, ${bound}, first;", f"max.s32 {x}, {x}, 0;", f"shl.b32 {x}, -1, {x};"]
        lines += ["not.b32 word, word;"] if upper else ["mov.b32 word, t;"]
        lines += ["and.b32 word, word, t;"] if upper and lower else []
        for i in range(place, n, 4):
            lines += [f"and.b32 t, word, {1 << i // 4};", "setp.ne.u32 seen, t, 0;"]
            lines += [f"selp.f32 ${i}, ${i}, 0fFF800000, seen;"]
    return "\n".join([*lines, "DONE: }" if jumps else "}"])


@gluon.constexpr_function
def _masked_where_constraints(n, operands):
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["r"] * (operands * n))


@gluon.jit
def mask_scores_where_cut(s, bounds, first_key, CUT: gl.constexpr):
    """The same where bounds are counts of groups (`row_bounds`): little more than an instruction a score. "any" is by both
    bounds, (hi, lo, begin, end): blocks that begin in [begin, end) are seen whole, and jump over it. So one loop takes all blocks
    of a window; of three in a row, each for a block or a few, the instructions are no longer there when the next tile comes. Over
    three loops, whole kernel, two consumers: windows of 512 at head_dim 128 1.037, 1024 1.017, 4096 0.996 (H200, 2026-11-22)."""
    keys: gl.constexpr = s.shape[1]
    n: gl.constexpr = keys // 2
    upper: gl.constexpr = CUT != "lower"
    lower: gl.constexpr = len(bounds) > 1 and CUT != "upper alone"
    jumps: gl.constexpr = CUT == "any"
    grouped = gl.reshape(s, [M, keys // 8, 8])
    layout: gl.constexpr = gl.SliceLayout(1, grouped.type.layout)
    asm: gl.constexpr = _masked_where_asm(n, upper, lower, jumps)
    constraints: gl.constexpr = _masked_where_constraints(n, 1 + upper + lower + jumps)
    near = gl.expand_dims(gl.convert_layout(bounds[0 if upper else 1], layout, assert_trivial=True), 1)
    if jumps:
        far = gl.expand_dims(gl.convert_layout(bounds[1], layout, assert_trivial=True), 1)
        masked = gl.where((first_key < bounds[2]) | (first_key >= bounds[3]), 1, 0)
        grouped = gl.inline_asm_elementwise(
            asm, constraints, [grouped, near, far, first_key, masked], dtype=gl.float32, is_pure=False, pack=n
        )
    elif upper and lower:
        far = gl.expand_dims(gl.convert_layout(bounds[1], layout, assert_trivial=True), 1)
        grouped = gl.inline_asm_elementwise(
            asm, constraints, [grouped, near, far, first_key], dtype=gl.float32, is_pure=True, pack=n
        )
    else:
        grouped = gl.inline_asm_elementwise(asm, constraints, [grouped, near, first_key], dtype=gl.float32, is_pure=True, pack=n)
    return gl.convert_layout(gl.reshape(grouped, [M, keys]), s.type.layout, assert_trivial=True)
