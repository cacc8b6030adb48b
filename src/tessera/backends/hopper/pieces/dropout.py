"""Dropout's draws on one warpgroup's tile: Philox4x32 with 7 rounds, bit for bit as tessera/dropout.py defines them.

A call of the generator gives four words, eight draws, for rows i and i + 8 of 16 and columns j, j + 1, j + 8, j + 9 of 16: in S
all of them are one thread's, and the two halves of a word stand as P's two neighbours do when they are 16-bit. In S^T a thread
has half of a call's columns: there a call serves four scores.

A product of the first rounds whose factor belongs to a row or a column alone stays a row or a column here.
"""

from tessera.backends.hopper.pieces.tiles import accumulator_layout, has
from tessera.jit.compat import aggregate, gl, gluon

WORD = gl.constexpr(0xFFFFFFFF)
ROUNDS = gl.constexpr(7)


@aggregate
class Dropout:
    """The seed in two words; draws below `threshold` (twice in a word) are dropped; what is kept is multiplied by
    `keep_scale`."""

    key_low: gl.tensor
    key_high: gl.tensor
    threshold: gl.tensor
    keep_scale: gl.tensor

    @gluon.constexpr_function
    def __init__(self, key_low, key_high, threshold, keep_scale):
        self.key_low = key_low
        self.key_high = key_high
        self.threshold = threshold
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


@gluon.constexpr_function
def _drop_asm(pair):
    """Two neighbours to 16 bits, and zero where the draw is below the threshold. As bfloat16, 15 bits compare as integers do:
    those past the largest number are NaN, unordered, hence kept."""
    return (
        f"{{ .reg .b32 pair, draws, kept; cvt.rn.{pair}.f32 pair, $2, $1; abs.bf16x2 draws, $3;"
        " set.geu.u32.bf16x2 kept, draws, $5; and.b32 $0, pair, kept; }"
    )


@gluon.jit
def drop(config: gl.constexpr, plane, p, first_key, dtype: gl.constexpr):
    """P (64, keys) in 16 bits, with zeros where it is dropped. What is kept is not scaled here: out is, once."""
    if has(config, "key_start"):
        words = _words_anywhere(plane, p, first_key)
    else:
        words = _words_of_block(plane, p, first_key)
    operands = [p, words, plane.dropout.threshold]
    if dtype == gl.bfloat16:
        asm: gl.constexpr = _drop_asm("bf16x2")
        return gl.inline_asm_elementwise(asm, "=r,f,f,r,r,r,r", operands, dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        asm: gl.constexpr = _drop_asm("f16x2")
        return gl.inline_asm_elementwise(asm, "=r,f,f,r,r,r,r", operands, dtype=gl.float16, is_pure=True, pack=2)


@gluon.constexpr_function
def _mark_asm():
    """Signs where the draws of two neighbouring rows are below the threshold: $3 picks the halves for an even or odd key."""
    return (
        "{ .reg .b32 draws, kept; prmt.b32 draws, $1, $2, $3; abs.bf16x2 draws, draws;"
        " set.geu.u32.bf16x2 kept, draws, $5; lop3.b32 $0, kept, 0x80008000, 0, 0x0C; }"
    )


@gluon.jit
def draw_signs(config: gl.constexpr, plane, first_row, dtype: gl.constexpr):
    """(64 keys, rows) 16-bit zeros, negative where P^T is dropped."""
    rows: gl.constexpr = config.rows
    p = gl.zeros([64, rows], gl.float32, accumulator_layout(rows))
    asm: gl.constexpr = _mark_asm()
    if has(config, "key_start"):
        words, odd = _words_anywhere_transposed(plane, p, first_row)
    else:
        words, odd = _words_of_block_transposed(plane, p, first_row)
    operands = [words, gl.where(odd, 0x7632, 0x5410), plane.dropout.threshold]
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(asm, "=r,r,r,r,r,r,r", operands, dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        return gl.inline_asm_elementwise(asm, "=r,r,r,r,r,r,r", operands, dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def marked(p, signs):
    """P^T in 16 bits, negative where it is dropped: both P and the mask in the place of one."""
    if p.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise("or.b32 $0, $1, $2;", "=r,r,r", [p, signs], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        return gl.inline_asm_elementwise("or.b32 $0, $1, $2;", "=r,r,r", [p, signs], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def kept(marked):
    """What mark_dropped left: zeros where P is dropped."""
    if marked.dtype == gl.bfloat16:
        asm: gl.constexpr = "max.bf16x2 $0, $1, $2;"
        return gl.inline_asm_elementwise(asm, "=r,r,r,r", [marked, 0], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        asm: gl.constexpr = "max.f16x2 $0, $1, $2;"
        return gl.inline_asm_elementwise(asm, "=r,r,r,r", [marked, 0], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def _words_of_block_transposed(plane, s, first_row):
    """Each score's word (64 keys, rows), and which keys (64, 1) are odd."""
    rows: gl.constexpr = s.shape[1]
    grouped: gl.constexpr = gl.reshape(
        gl.permute(gl.reshape(s, [4, 2, 4, 2, rows // 16, 2, 8]), (0, 2, 4, 6, 5, 1, 3)), [16, rows // 2, 4, 2]
    ).type.layout
    pairs: gl.constexpr = gl.SliceLayout(3, grouped)
    calls: gl.constexpr = gl.SliceLayout(2, pairs)
    columns = plane.key // 4 + gl.arange(0, 16, gl.SliceLayout(1, calls))
    lines = first_row // 2 + gl.arange(0, rows // 2, gl.SliceLayout(0, calls))
    w0, w1, w2, w3 = _words(plane, lines[None, :], columns[:, None])
    number = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, pairs)))[None, None, :, None]
    words = (w0[:, :, None, None], w1[:, :, None, None], w2[:, :, None, None], w3[:, :, None, None])
    same = gl.zeros([16, rows // 2, 4, 2], gl.uint32, grouped)
    parts = gl.reshape(_choose(words, number) | same, [4, 4, rows // 16, 8, 2, 2, 2])
    words = gl.reshape(gl.permute(parts, (0, 5, 1, 6, 2, 4, 3)), [64, rows])
    odd = gl.arange(0, 64, gl.SliceLayout(1, s.type.layout)) % 2 == 1
    return gl.convert_layout(words, s.type.layout, assert_trivial=True), odd[:, None]


@gluon.jit
def _words_anywhere_transposed(plane, s, first_row):
    layout: gl.constexpr = s.type.layout
    rows = (first_row + gl.arange(0, s.shape[1], gl.SliceLayout(0, layout)))[None, :]
    columns = (plane.key + gl.arange(0, 64, gl.SliceLayout(1, layout)))[:, None]
    words = _words(plane, rows // 16 * 8 + rows % 8, columns // 16 * 4 + columns % 8 // 2)
    return _choose(words, rows // 8 % 2 * 2 + columns // 8 % 2), columns % 2 == 1


@gluon.jit
def _choose(words, number):
    """One of four words; where the number is known to the compiler, so is the choice."""
    w0, w1, w2, w3 = words
    return gl.where(number < 2, gl.where(number == 0, w0, w1), gl.where(number == 2, w2, w3))


@gluon.jit
def _words_of_block(plane, s, first_key):
    """Each score's word (64, keys), where keys count from the sequence's first: a block begins with a group of 16 columns."""
    keys: gl.constexpr = s.shape[1]
    grouped: gl.constexpr = gl.reshape(
        gl.permute(gl.reshape(s, [4, 2, 8, keys // 16, 2, 4, 2]), (0, 2, 3, 5, 1, 4, 6)), [32, keys // 4, 4, 2]
    ).type.layout
    pairs: gl.constexpr = gl.SliceLayout(3, grouped)
    calls: gl.constexpr = gl.SliceLayout(2, pairs)
    rows = plane.row // 2 + gl.arange(0, 32, gl.SliceLayout(1, calls))
    columns = first_key // 4 + gl.arange(0, keys // 4, gl.SliceLayout(0, calls))
    w0, w1, w2, w3 = _words(plane, rows[:, None], columns[None, :])
    number = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, pairs)))[None, None, :, None]
    words = (w0[:, :, None, None], w1[:, :, None, None], w2[:, :, None, None], w3[:, :, None, None])
    same = gl.zeros([32, keys // 4, 4, 2], gl.uint32, grouped)
    parts = gl.reshape(_choose(words, number) | same, [4, 8, keys // 16, 4, 2, 2, 2])
    return gl.convert_layout(gl.reshape(gl.permute(parts, (0, 4, 1, 2, 5, 3, 6)), [64, keys]), s.type.layout, assert_trivial=True)


@gluon.jit
def _words_anywhere(plane, s, first_key):
    """The same where keys count from the first that padding leaves: a call a score."""
    keys: gl.constexpr = s.shape[1]
    layout: gl.constexpr = s.type.layout
    rows = (plane.row + gl.arange(0, 64, gl.SliceLayout(1, layout)))[:, None]
    columns = (plane.key + first_key + gl.arange(0, keys, gl.SliceLayout(0, layout)))[None, :]
    words = _words(plane, rows // 16 * 8 + rows % 8, columns // 16 * 4 + columns % 8 // 2)
    word = _choose(words, rows // 8 % 2 * 2 + columns // 8 % 2)
    draw = gl.where(columns % 2 == 0, word & 0xFFFF, word >> 16)
    # an odd column may stand first in a pair here, and the two draws come from two words
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, 0x5410; mov.b32 $1, $0;", "=&r,=&r,r,r", [draw], dtype=gl.uint32, is_pure=True, pack=2
    )


@gluon.jit
def _words(plane, rows, columns):
    """The generator's answer for tensors of row and column counters."""
    key = plane.dropout
    return philox(columns.to(gl.uint32), rows.to(gl.uint32), plane.head, plane.number, key.key_low, key.key_high)
