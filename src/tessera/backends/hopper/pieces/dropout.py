"""Dropout's draws on one warpgroup's tile: Philox4x32 with 7 rounds, bit for bit as tessera/dropout.py defines them.

A call of the generator gives four words of four draws. In S all sixteen are one thread's, and a word's four are P's neighbours
in two rows. In S^T a thread has two keys of a word, of one parity, and the thread four lanes further the other parity of the
same rows: each draws for half of the rows and hands on the other's bytes.

The draws do not depend on S: `draw` and `draw_transposed` run while S is under way, and what they leave is one bit that counts
in each byte, its sign: set where the score is kept.

A product of the first rounds whose factor belongs to a row or a column alone stays a row or a column here.
"""

from tessera.backends.hopper.pieces.softmax import finish_before
from tessera.backends.hopper.pieces.tiles import M, accumulator_layout, fresh_zero, has
from tessera.jit.compat import aggregate, gl, gluon

WORD = gl.constexpr(0xFFFFFFFF)
ROUNDS = gl.constexpr(7)
LOW_BITS = gl.constexpr(0x7F7F7F7F)


@aggregate
class Dropout:
    """The seed in two words; a byte x is kept if it is not below the threshold t. In the sign of each byte of a word that is the
    majority of x, of (x without its sign) + `addend`, and of `either`, which is all ones for t < 128 and zero from there on.
    What is kept is multiplied by `keep_scale`."""

    key_low: gl.tensor
    key_high: gl.tensor
    addend: gl.tensor
    either: gl.tensor
    keep_scale: gl.tensor

    @gluon.constexpr_function
    def __init__(self, key_low, key_high, addend, either, keep_scale):
        self.key_low = key_low
        self.key_high = key_high
        self.addend = addend
        self.either = either
        self.keep_scale = keep_scale


@aggregate
class Plane:
    """The scores of one head of one sequence, seen from the tile: its first row, and where its first key stands."""

    dropout: Dropout
    number: gl.tensor
    head: gl.tensor
    row: gl.tensor
    key: gl.tensor

    @gluon.constexpr_function
    def __init__(self, dropout, number, head, row, key):
        self.dropout = dropout
        self.number = number
        self.head = head
        self.row = row
        self.key = key


@gluon.jit
def _product(x, factor: gl.constexpr):
    """(low, high) words of x times a constant."""
    wide = x.to(gl.uint64) * factor
    return (wide & WORD).to(gl.uint32), ((wide >> 32) & WORD).to(gl.uint32)


@gluon.jit
def philox(c0, c1, c2, c3, key_low, key_high):
    """Four words from a counter of four, each a number or a tensor."""
    for i in gl.static_range(ROUNDS):
        low, high = _product(c0, 0xD2511F53)
        low_2, high_2 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_2 ^ c1 ^ key_low, low_2, high ^ c3 ^ key_high, low
        key_low = ((key_low.to(gl.uint64) + 0x9E3779B9) & WORD).to(gl.uint32)
        key_high = ((key_high.to(gl.uint64) + 0xBB67AE85) & WORD).to(gl.uint32)
    return c0, c1, c2, c3


@gluon.jit
def _words(plane, rows, columns):
    """The generator's answer for tensors of row and column counters."""
    key = plane.dropout
    zero = fresh_zero().to(gl.uint32)  # else each round's keys would stay in registers, 14 in all
    low, high = key.key_low + zero, key.key_high + zero
    return philox(columns.to(gl.uint32), rows.to(gl.uint32), plane.head, plane.number, low, high)


@gluon.jit
def _judged(plane, x):
    """A word of draws with the sign of each byte set where that draw is kept."""
    key = plane.dropout
    y = (x & LOW_BITS) + key.addend
    return (x & y) | ((x | y) & key.either)


@gluon.jit
def _choose(words, number):
    """One of four words; where the number is known to the compiler, so is the choice."""
    w0, w1, w2, w3 = words
    return gl.where(number < 2, gl.where(number == 0, w0, w1), gl.where(number == 2, w2, w3))


@gluon.jit
def _judged_anywhere(plane, rows, columns):
    """A call a score, for tiles that do not begin where a patch of the generator does: the draw is the lowest byte."""
    words = _words(plane, rows // 16 * 8 + rows % 8, columns // 32 * 4 + columns % 8 // 2)
    byte = rows // 8 % 2 * 2 + columns % 2
    return _judged(plane, _choose(words, columns // 8 % 4) >> (byte * 8).to(gl.uint32))


# ------------------------------------------------------------------------------------------------------------------ S


@gluon.jit
def draw(config: gl.constexpr, plane, first_key):
    """What of a block is kept, uint32 (64, keys): each score's word; with left padding its own byte, the lowest."""
    keys: gl.constexpr = config.keys
    layout: gl.constexpr = accumulator_layout(keys)
    if has(config, "key_start"):
        rows = plane.row + gl.arange(0, M, gl.SliceLayout(1, layout))
        columns = plane.key + first_key + gl.arange(0, keys, gl.SliceLayout(0, layout))
        return _judged_anywhere(plane, rows[:, None], columns[None, :])
    else:
        s = gl.zeros([M, keys], gl.float32, layout)
        grouped: gl.constexpr = gl.reshape(
            gl.permute(gl.reshape(s, [4, 2, 8, keys // 32, 4, 4, 2]), (0, 2, 3, 5, 4, 1, 6)), [32, keys // 8, 4, 4]
        ).type.layout
        numbers: gl.constexpr = gl.SliceLayout(3, grouped)
        calls: gl.constexpr = gl.SliceLayout(2, numbers)
        rows = plane.row // 2 + gl.arange(0, 32, gl.SliceLayout(1, calls))
        columns = first_key // 8 + gl.arange(0, keys // 8, gl.SliceLayout(0, calls))
        w0, w1, w2, w3 = _words(plane, rows[:, None], columns[None, :])
        w0, w1, w2, w3 = _judged(plane, w0), _judged(plane, w1), _judged(plane, w2), _judged(plane, w3)
        finish_before(w0 ^ w1 ^ w2 ^ w3, keys // 32)
        number = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, numbers)))[None, None, :]
        return _to_scores(_choose((w0[:, :, None], w1[:, :, None], w2[:, :, None], w3[:, :, None]), number), keys)


@gluon.jit
def _to_scores(words, keys: gl.constexpr):
    """Words (32, keys / 8, 4) to each of their scores, (64, keys)."""
    layout: gl.constexpr = accumulator_layout(keys)
    s = gl.zeros([M, keys], gl.uint32, layout)
    apart = gl.permute(gl.reshape(s, [4, 2, 8, keys // 32, 4, 4, 2]), (0, 2, 3, 5, 4, 1, 6))
    same = gl.reshape(apart, [32, keys // 8, 4, 4])
    words = gl.convert_layout(words, gl.SliceLayout(3, same.type.layout), assert_trivial=True)
    parts = gl.reshape(gl.expand_dims(words, 3) | same, [4, 8, keys // 32, 4, 4, 2, 2])
    return gl.convert_layout(gl.reshape(gl.permute(parts, (0, 5, 1, 2, 4, 3, 6)), [M, keys]), layout, assert_trivial=True)


@gluon.jit
def _bytes_of_pairs(config: gl.constexpr):
    """Which bytes' signs make the masks of two neighbours, (64, keys): a word's first two in a row, its last two 8 rows below;
    with left padding the lowest of a word each."""
    keys: gl.constexpr = config.keys
    layout: gl.constexpr = accumulator_layout(keys)
    s = gl.zeros([M, keys], gl.int32, layout)
    if has(config, "key_start"):
        return s + 0xCC88
    else:
        apart = gl.reshape(s, [4, 2, 8, keys])
        by_rows: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, apart.type.layout)))
        half = gl.arange(0, 2, by_rows)[None, :, None, None]
        return gl.convert_layout(gl.reshape(apart + (0x9988 + half * 0x2222), [M, keys]), layout, assert_trivial=True)


@gluon.jit
def dropped(config: gl.constexpr, p, kept):
    """P (64, keys) in 16 bits with zeros where it is dropped. What is kept is not scaled here: out is, once."""
    asm: gl.constexpr = "{ .reg .b32 mask; prmt.b32 mask, $2, $3, $4; and.b32 $0, $1, mask; }"
    operands = [p, kept, _bytes_of_pairs(config)]
    if p.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(asm, "=r,r,r,r,r,r", operands, dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        return gl.inline_asm_elementwise(asm, "=r,r,r,r,r,r", operands, dtype=gl.float16, is_pure=True, pack=2)


# ---------------------------------------------------------------------------------------------------------------- S^T


@gluon.jit
def draw_transposed(config: gl.constexpr, plane, first_row):
    """What of S^T (64 keys, rows) is kept: two words (32, rows / 4), of even rows and of odd ones, each with the draws of two
    keys, 8 apart, in two rows, 8 apart; with left padding (64, rows) as `draw` has it."""
    rows: gl.constexpr = config.rows
    layout: gl.constexpr = accumulator_layout(rows)
    if has(config, "key_start"):
        lines = first_row + gl.arange(0, rows, gl.SliceLayout(0, layout))
        columns = plane.key + gl.arange(0, M, gl.SliceLayout(1, layout))
        return (_judged_anywhere(plane, lines[None, :], columns[:, None]),)
    else:
        s = gl.zeros([M, rows], gl.float32, layout)
        grouped: gl.constexpr = gl.reshape(
            gl.permute(gl.reshape(s, [4, 2, 8, rows // 16, 2, 4, 2]), (0, 2, 3, 5, 4, 1, 6)), [32, rows // 4, 8]
        ).type.layout
        calls: gl.constexpr = gl.SliceLayout(2, grouped)
        place = gl.arange(0, 32, gl.SliceLayout(1, calls))  # a key modulo 8, of each 16
        odd = place % 2
        columns = plane.key // 8 + place // 16 * 4 + place % 8 // 2
        lines = first_row // 2 + gl.arange(0, rows // 4, gl.SliceLayout(0, calls)) * 2
        w0, w1, w2, w3 = _words(plane, lines[None, :] + odd[:, None], columns[:, None])
        further = (place // 8 % 2 == 1)[:, None]
        near = gl.where(further, w2, w0)
        far = gl.where(further, w3, w1)
        own = _permuted(near, far, gl.where(odd == 1, 0x7531, 0x6420)[:, None])
        given = _permuted(near, far, gl.where(odd == 1, 0x6420, 0x7531)[:, None])
        own = _judged(plane, own)
        received = _judged(plane, _of_other_parity(given))
        is_odd = (odd == 1)[:, None]
        return gl.where(is_odd, received, own), gl.where(is_odd, own, received)


@gluon.jit
def _permuted(a, b, selector):
    """Bytes of two words."""
    asm: gl.constexpr = "prmt.b32 $0, $1, $2, $3;"
    return gl.inline_asm_elementwise(asm, "=r,r,r,r", [a, b, selector], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def _of_other_parity(x):
    """(32, n), a row a key: that of the key's odd or even neighbour, four lanes away."""
    asm: gl.constexpr = "shfl.sync.bfly.b32 $0, $1, 4, 31, 0xffffffff;"
    return gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def _spread(x, rows: gl.constexpr):
    """(32, rows / 4) to each of its scores, (64 keys, rows)."""
    layout: gl.constexpr = accumulator_layout(rows)
    s = gl.zeros([M, rows], gl.uint32, layout)
    parts = gl.permute(gl.reshape(s, [4, 2, 8, rows // 16, 2, 4, 2]), (0, 2, 3, 5, 4, 1, 6))
    same = gl.reshape(parts, [32, rows // 4, 8])
    parts = gl.reshape(gl.expand_dims(x, 2) | same, [4, 8, rows // 16, 4, 2, 2, 2])
    return gl.convert_layout(gl.reshape(gl.permute(parts, (0, 5, 1, 2, 4, 3, 6)), [M, rows]), layout, assert_trivial=True)


@gluon.constexpr_function
def _masks_asm():
    """Eight scores of two keys, pairs of rows: the signs of their bytes in the even rows' word $4 and in the odd rows' $12."""
    selectors = ("0xCC88", "0xEEAA", "0xDD99", "0xFFBB")
    return " ".join(f"prmt.b32 ${i}, $4, $12, {selector};" for i, selector in enumerate(selectors))


_MASKS = gl.constexpr("=&r,=&r,=&r,=r" + ",r" * 16)


@gluon.jit
def masks(config: gl.constexpr, kept, dtype: gl.constexpr):
    """From what `draw_transposed` leaves: 16 bits for each score (64 keys, rows), all ones where it is kept, else zeros."""
    if has(config, "key_start"):
        each: gl.constexpr = "prmt.b32 $0, $1, $2, 0xCC88;"
        if dtype == gl.bfloat16:
            return gl.inline_asm_elementwise(each, "=r,r,r", [kept[0]], dtype=gl.bfloat16, is_pure=True, pack=2)
        else:
            return gl.inline_asm_elementwise(each, "=r,r,r", [kept[0]], dtype=gl.float16, is_pure=True, pack=2)
    else:
        asm: gl.constexpr = _masks_asm()
        words = [_spread(kept[0], config.rows), _spread(kept[1], config.rows)]
        if dtype == gl.bfloat16:
            return gl.inline_asm_elementwise(asm, _MASKS, words, dtype=gl.bfloat16, is_pure=True, pack=8)
        else:
            return gl.inline_asm_elementwise(asm, _MASKS, words, dtype=gl.float16, is_pure=True, pack=8)


@gluon.jit
def masked(p, masks):
    """P^T in 16 bits, 0 where it is dropped."""
    asm: gl.constexpr = "and.b32 $0, $1, $2;"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [p, masks], dtype=p.dtype, is_pure=True, pack=2)


@gluon.jit
def marked(p, masks):
    """P^T in 16 bits, negative where it is dropped: both P and the mask in the place of one."""
    asm: gl.constexpr = "lop3.b32 $0, $1, $2, 0x80008000, 0xF2;"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [p, masks], dtype=p.dtype, is_pure=True, pack=2)
