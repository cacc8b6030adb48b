"""What the backward's kernels share: their tiles in shared memory, P from S, and the way out of dK and dV."""

from tessera.backends.hopper.pieces.bias import keeps_ds, stages_bias
from tessera.backends.hopper.pieces.channel import Stream
from tessera.backends.hopper.pieces.dropout import draw_transposed, drawn_derivatives, masked, masked_derivatives, masks
from tessera.backends.hopper.pieces.epilogue import LOG2_E
from tessera.backends.hopper.pieces.kv_source import store_rows
from tessera.backends.hopper.pieces.lines import exchanged
from tessera.backends.hopper.pieces.modifiers import Modifiers, add_to_transposed, of_keys, with_bias
from tessera.backends.hopper.pieces.row_ranges import mask_rows
from tessera.backends.hopper.pieces.softmax import exp2, tanh, to_16_bit, to_32_bit, to_32_bit_behind
from tessera.backends.hopper.pieces.sums import adds_in_order
from tessera.backends.hopper.pieces.tiles import (
    M,
    accumulator_layout,
    allocate_tiles,
    fresh_zero,
    has,
    has_bias,
    matrix,
    operand_layout,
)
from tessera.jit.compat import (
    aggregate,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
)

# Hardware's named barriers that channel.py leaves free.
BARRIER_DS = gl.constexpr(7)
"""Both consumers' dS lie in shared memory. 7 to 9 where they take turns at dQ: all dS in a slot of the ring."""
BARRIER_K = gl.constexpr(8)
"""No product reads K any more: its buffer may take dK."""
BARRIER_V = gl.constexpr(9)
"""No product reads V any more: its buffer may take dV."""


@aggregate
class Score:
    """`scale` turns a score into log2 units; with a softcap c it is c log2(e), and `inner` = softmax_scale / c. `factor` is
    the softmax scale: what the derivative by q . k has over that by the score. `modifiers`: of the launch, then of a tile's keys
    and one of their query heads."""

    scale: gl.tensor
    inner: gl.tensor
    factor: gl.tensor
    modifiers: Modifiers


@aggregate
class Shared:
    """K and V of the tile in pieces of 64 keys (of K two tiles, and V where dS^T is, if `comes_by_ds`); rings of Q with lse, of
    dO with D (or of Q with both: allocate_summands); `bias`: of its blocks, 64 keys each, with Q, or empty. `k_full`, `v_full`:
    the tile's are there; `k_free`, `v_free`: its readers are done with them. If V comes by dS's ring K has one of each a place,
    of which the first tells of V too, and `v_free` are the ring's."""

    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    q: gl.shared_memory_descriptor
    do: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor
    d: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    k_free: gl.shared_memory_descriptor
    v_free: gl.shared_memory_descriptor
    q_stream: Stream
    do_stream: Stream
    bias: gl.tuple


@gluon.constexpr_function
def comes_by_ds(config):
    """Whether V comes to its registers by way of dS's ring."""
    return config.brings_v_by_ds


@gluon.jit
def place_of_k(config: gl.constexpr, seen):
    """Where the pieces of K begin, when the program has had `seen` tiles that any row sees."""
    if comes_by_ds(config):
        return (seen & 1) * (config.keys // M)
    else:
        return 0


@gluon.jit
def place_of_v(config: gl.constexpr, seen, done):
    """The same of V, when it has had `done` blocks of rows: if it comes by dS's ring where the tile's first dS^T will lie."""
    if comes_by_ds(config):
        return done % config.consumers * config.consumers
    else:
        return 0


@gluon.jit
def await_keys(config: gl.constexpr, shared, seen):
    """Until K of the tile is there, and V if it comes by dS's ring."""
    if comes_by_ds(config):
        mbarrier.wait(shared.k_full.index(seen & 1), (seen >> 1) & 1)
    else:
        mbarrier.wait(shared.k_full, seen & 1)


@gluon.jit
def free_keys(config: gl.constexpr, shared, seen):
    """The tile's K has been read, as far as this consumer goes."""
    if comes_by_ds(config):
        mbarrier.arrive(shared.k_free.index(seen & 1))
    else:
        mbarrier.arrive(shared.k_free)


@gluon.constexpr_function
def _meet_asm(kind, barrier, threads):
    return f"bar.{kind} {barrier}, {threads}; mov.u32 $0, 0;"


@gluon.jit
def meet(kind: gl.constexpr, barrier: gl.constexpr, threads: gl.constexpr):
    """A named barrier: "sync" waits for `threads` threads, "arrive" is counted and goes on."""
    asm: gl.constexpr = _meet_asm(kind, barrier, threads)
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def issue_transposed(keys, rows):
    """Start (64 keys, rows) float32 = a tile of K or V, from shared memory or registers, times a tile of Q or dO transposed."""
    count: gl.constexpr = rows.shape[0]
    s = gl.zeros([M, count], gl.float32, accumulator_layout(count))
    return warpgroup_mma(keys, rows.permute((1, 0)), s, use_acc=False, is_async=True)


@gluon.constexpr_function
def subtracts_by_products(config):
    """Whether lse and D are subtracted by a further step of S's and dP's products."""
    return config.subtracts_by_products


@gluon.constexpr_function
def _pairs_of(stages):
    return (stages + 1) // 2


@gluon.jit
def summand_pairs(config: gl.constexpr, summands):
    """A ring of (8, rows) as pairs of slots, one's lines under the other's: (pairs, 16, rows)."""
    rows: gl.constexpr = config.rows
    pairs: gl.constexpr = _pairs_of(config.q_stages)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, rows], summands.dtype)
    return reinterpret(summands, summands.dtype, [pairs, 16, rows], layout)


@gluon.jit
def allocate_summands(config: gl.constexpr, stats_map):
    """A ring of as many slots as Q's, or one more: (8, rows), of which four add up to minus lse over the scale, and four to minus
    D. Of a pair one slot is multiplied by 0 while the other is read: so at first there is 0. (A row of the caller's whose lse or
    D is NaN so spoils the dQ of a row 64 before or after it too, and not dK and dV alone.)"""
    rows: gl.constexpr = config.rows
    pairs: gl.constexpr = _pairs_of(config.q_stages)
    ring = allocate_tiles(stats_map, 2 * pairs)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for pair in gl.static_range(pairs):
        summand_pairs(config, ring).index(pair).store(gl.zeros([16, rows], ring.dtype, layout))
    return ring


@gluon.constexpr_function
def _wanted_asm(which):
    """Ones of a slot's first lines, under a mask; or of its others, from the same register."""
    return "and.b32 $0, $1, $2;" if which == 0 else "{ .reg .b32 other; xor.b32 other, $1, 0x3f803f80; and.b32 $0, other, $2; }"


@gluon.jit
def _issue_less(config: gl.constexpr, keys, rows, summands, slot, which: gl.constexpr):
    """As issue_transposed, less lse (`which` 0) or D (1) of each row."""
    count: gl.constexpr = config.rows
    layout: gl.constexpr = operand_layout(count)
    line = gl.arange(0, 16, gl.SliceLayout(0, layout))[None, :] + gl.zeros([M, 16], gl.int32, layout)
    ones = gl.where(line % 8 < 4, 1.0, 0.0).to(summands.dtype)
    mask = (line // 8 ^ slot % 2) - 1  # of a slot's lines; by a comparison `slot` would leave the uniform registers
    asm: gl.constexpr = _wanted_asm(which)
    ones = gl.inline_asm_elementwise(asm, "=r,r,r,r", [ones, mask], dtype=ones.dtype, is_pure=True, pack=2)
    s = gl.zeros([M, count], gl.float32, accumulator_layout(count))
    pair = summand_pairs(config, summands).index(slot // 2 + fresh_zero())
    s = warpgroup_mma(ones, pair, s, use_acc=False, is_async=True)
    return warpgroup_mma(keys, rows.permute((1, 0)), s, is_async=True)


@gluon.jit
def issue_s(config: gl.constexpr, shared, k, n):
    """Start S^T = K Q^T of block n, less lse over the scale where a product subtracts it. Shared memory, which is the limit at
    head dims 64 and 128, then gives lse once a warpgroup and not to all threads: 16 wavefronts for 64."""
    slot = shared.q_stream.slot(n)
    q = matrix(shared.q.index(slot))
    if subtracts_by_products(config):
        return _issue_less(config, k, q, shared.lse, slot, 0)
    else:
        return issue_transposed(k, q)


@gluon.jit
def issue_dp(config: gl.constexpr, shared, v, n):
    """Start dP^T = V dO^T of block n, less D where a product subtracts it: that lies beside lse, in Q's ring."""
    shared.do_stream.wait(n)
    do = matrix(shared.do.index(shared.do_stream.slot(n)))
    if subtracts_by_products(config):
        return _issue_less(config, v, do, shared.lse, shared.q_stream.slot(n), 1)
    else:
        return issue_transposed(v, do)


@gluon.jit
def row_values(values, slot, rows: gl.constexpr):
    """lse or D of a block's rows, one a column of S^T."""
    return values.index(slot).reshape([rows]).load(gl.SliceLayout(0, accumulator_layout(rows)))


@gluon.jit
def half_of_row_values(values, slot, rows: gl.constexpr, half: gl.constexpr):
    """The same of the first half of the rows (0), or of the second."""
    count: gl.constexpr = rows // 2
    some = values.index(slot).reshape([rows]).slice(half * count, count, dim=0)
    return some.load(gl.SliceLayout(0, accumulator_layout(count)))


@gluon.jit
def of_both_halves(first, second):
    """What `row_values` has, from the halves; no register moves."""
    rows: gl.constexpr = 2 * first.shape[0]
    values = gl.reshape(gl.permute(gl.join(first, second), (1, 0)), [rows])
    return gl.convert_layout(values, gl.SliceLayout(0, accumulator_layout(rows)), assert_trivial=True)


@gluon.jit
def score_of_keys(config: gl.constexpr, score, seq, head, first):
    """The same with the modifiers of 64 keys from `first` on and a query head."""
    return Score(score.scale, score.inner, score.factor, of_keys(config, score.modifiers, seq, head, first))


@gluon.jit
def score_of_block(config: gl.constexpr, score, shared, slot, part):
    """The same with a block's bias, of the tile's `part`-th 64 keys, where that has come with Q."""
    if stages_bias(config):
        block = matrix(shared.bias[0].index(slot * (config.keys // M) + part))
        values = block.permute((1, 0)).load(accumulator_layout(config.rows))
        return Score(score.scale, score.inner, score.factor, with_bias(score.modifiers, values))
    else:
        return score


@gluon.jit
def probabilities(config: gl.constexpr, score, s, lse, bounds, first_row, masked):
    """(P^T, what (dP^T - D) is multiplied with): the same but for a softcap, whose slope 1 - tanh^2 comes on top."""
    if has(config, "softcap"):
        capped = tanh(s * score.inner)
        x = capped * score.scale
    else:
        x = s * score.scale
    x = add_to_transposed(config, score.modifiers, x, first_row)
    if not subtracts_by_products(config):
        x -= lse[None, :]
    if has_bias(config):
        x = x * LOG2_E
    if masked:
        x = mask_rows(x, bounds, first_row)
    p = exp2(x)
    if has(config, "softcap"):
        return p, p * (1.0 - capped * capped)
    else:
        return p, p


@gluon.jit
def drawn(config: gl.constexpr, score, first_row):
    """What dropout keeps of a block, as pieces/dropout.py has it; 0 without."""
    if has(config, "dropout"):
        return draw_transposed(config, score.modifiers.dropout[0], first_row)
    else:
        return 0


@gluon.jit
def masks_of(config: gl.constexpr, kept, dtype: gl.constexpr):
    """The same as masks in 16 bits, (64 keys, rows)."""
    if has(config, "dropout"):
        return masks(config, kept, dtype)
    else:
        return 0


@gluon.jit
def kept_p(config: gl.constexpr, p, masks):
    """P^T in 16 bits as dV's operand: what is dropped is 0. (What is kept is not scaled here: dV is, once, and D is divided by
    it.)"""
    if has(config, "dropout"):
        p = masked(p, masks)
    return p


@gluon.jit
def derivatives(weight, dp, d):
    """dS^T = P^T (dP^T - D)."""
    return to_32_bit(weight) * (dp - d[None, :])


@gluon.jit
def derivatives_of_kept(config: gl.constexpr, weight, masks, dp, d):
    """The same, with dP^T 0 where P is dropped."""
    if has(config, "dropout"):
        return masked_derivatives(to_32_bit(weight), masks, dp, d[None, :])
    elif config.parts_late:
        return to_32_bit_behind(weight, dp) * (dp - d[None, :])
    else:
        return derivatives(weight, dp, d)


@gluon.constexpr_function
def draws_by_words(config):
    """Whether dS and P are made of the draws themselves, without masks."""
    return has(config, "dropout") and not has(config, "softcap") and not has(config, "key_start")


@gluon.jit
def kept_derivatives(config: gl.constexpr, p, weight, drawn, dp, d, dtype: gl.constexpr):
    """dS^T from P^T and the weight, and P^T in 16 bits as dV's operand, by what `drawn` has."""
    if draws_by_words(config):
        return drawn_derivatives(config, to_32_bit(p), drawn, dp, d[None, :], dtype)
    else:
        masks = masks_of(config, drawn, dtype)
        return derivatives_of_kept(config, weight, masks, dp, d), kept_p(config, p, masks)


@gluon.constexpr_function
def needs_slope_apart(config):
    """Whether dS is wanted without the softcap's slope too: the bias is added after the softcap."""
    return has(config, "softcap") and has(config, "bias gradient")


@gluon.jit
def allocate_ds(config: gl.constexpr, dtype: gl.constexpr, count: gl.constexpr):
    """`count` blocks of dS of 64 keys in shared memory: (64, rows) transposed, as it is computed; (rows, 64) where it is kept."""
    rows: gl.constexpr = config.rows
    shape: gl.constexpr = [1, rows, M] if keeps_ds(config) else [M, rows]
    return gl.allocate_shared_memory(dtype, [count] + shape, gl.NVMMASharedLayout.get_default_for(shape, dtype))


@gluon.jit
def put_ds(config: gl.constexpr, buffer, ds):
    """dS^T (64 keys, rows) in 16 bits into its buffer, for products and TMA to read."""
    if keeps_ds(config):
        matrix(buffer).permute((1, 0)).store(ds)
    else:
        buffer.store(ds)
    fence_async_shared()


@gluon.jit
def rows_of_ds(config: gl.constexpr, buffer):
    """dS (rows, 64 keys) where it lies."""
    if keeps_ds(config):
        return matrix(buffer)
    else:
        return buffer.permute((1, 0))


@gluon.constexpr_function
def _stores_ds_alone(config):
    """Whether who computes dS has no other stores under way in the main loop: parts of dQ are another warpgroup's, or a
    writer's."""
    return config.division.value == "products" or adds_in_order(config)


@gluon.jit
def keep_ds(config: gl.constexpr, modifiers, buffer, row):
    """Start the copy of dS of the rows from `row` on from its buffer to memory, once the whole warpgroup has put it. Of older
    ones the last alone goes beside it, so their buffers may be written (where this warpgroup adds dQ too, add_part waits)."""
    if keeps_ds(config):
        kept = modifiers.dbias[0]
        tma_store(kept.map[0], [kept.plane, row, kept.key], buffer)
        if _stores_ds_alone(config):
            tma_store_wait(1)


@gluon.jit
def scaled_dv(config: gl.constexpr, score, dv):
    if has(config, "dropout"):
        dv = dv * score.modifiers.dropout[0].keep_scale
    return dv


@gluon.jit
def store_gradient(config: gl.constexpr, map_, buffer, slot, gradient, tile, row):
    """dK or dV of 64 keys through a buffer that nobody reads any more."""
    matrix(buffer.index(slot)).store(exchanged(config, to_16_bit(gradient, map_.dtype)))
    fence_async_shared()
    store_rows((map_,), (buffer,), slot, tile.written, tile.head, row)
