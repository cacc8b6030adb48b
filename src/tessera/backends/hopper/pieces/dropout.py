"""Dropout's draws on one warpgroup's tile, bit for bit as tessera/dropout.py defines them.

A row and a column have a key each of two words; a few 32-bit instructions mix eight draws out of both. In S all eight are one
thread's, and a word's halves are two of P's neighbours. In S^T a thread has two keys of one parity, and the thread four lanes
further the other parity of the same rows: each draws for half of the rows and hands on the other's halves.

The keys of a tile's own rows (of S^T: of its keys) are made once. Of those that change from block to block a thread makes one:
what it sees of a block's others differs from that by constants.

A draw is 8 bits behind the sign of a float16. Two at once are compared with the threshold, which gives their masks: magnitudes
of floats are ordered as their bits are, NaN counts as larger, and thresholds are 128 at most, which is no NaN.
"""

from tessera.backends.hopper.pieces.tiles import M, accumulator_layout, has
from tessera.jit.compat import aggregate, gl, gluon

WORD = gl.constexpr(0xFFFFFFFF)
ROUNDS = gl.constexpr(7)
MIXING_MULTIPLIER = gl.constexpr(0xD256D193)
WORD_MULTIPLIERS = gl.constexpr((0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F))


@aggregate
class Dropout:
    """The seed in two words; the threshold, 8 bits, behind the signs of two float16: draws not below it are kept, or, where the
    signs are set, those below it. What is kept is multiplied by `keep_scale`."""

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
    """The scores of one head of one sequence, seen from the tile: the head's words for keys that change from block to block, the
    keys of the tile's own rows (of S^T: of its own keys), the first of these, and where its first key stands."""

    dropout: Dropout
    words: gl.tuple
    own: gl.tuple
    first: gl.tensor
    key: gl.tensor

    @gluon.constexpr_function
    def __init__(self, dropout, words, own, first, key):
        self.dropout = dropout
        self.words = words
        self.own = own
        self.first = first
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
def _final(x):
    """MurmurHash3's finalizer."""
    x = (x ^ x >> 16) * 0x85EBCA6B & WORD
    x = (x ^ x >> 13) * 0xC2B2AE35 & WORD
    return x ^ x >> 16


@gluon.jit
def _head_words(dropout, number, head):
    """A head's words for its rows' keys, and for its columns'."""
    none = number ^ number
    h0, h1, h2, h3 = philox(head, number, none, none, dropout.key_low, dropout.key_high)
    return (h0, h1), (h2, h3)


@gluon.constexpr_function
def _constant(of_rows, bit, word):
    of_columns = ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    return (((0x082EFA98, 0xEC4E6C89), (0x452821E6, 0x38D01377)) if of_rows else of_columns)[bit][word]


@gluon.jit
def _moved(key, patch, bits: gl.constexpr, of_rows: gl.constexpr):
    """From the key of a group's first patch that of its patch `patch`."""
    a, b = key
    for bit in gl.static_range(bits):
        is_set = (patch >> bit & 1).to(gl.uint32)
        a, b = a ^ is_set * _constant(of_rows, bit, 0), b ^ is_set * _constant(of_rows, bit, 1)
    return a, b


@gluon.jit
def _key(words, number):
    """The key of a group of rows, or of columns."""
    number = number.to(gl.uint32)
    return _final(number ^ words[0]), _final(number ^ words[1])


@gluon.jit
def _row_keys(words, rows):
    """Of any rows."""
    return _moved(_key(words, rows // 64 * 8 + rows % 8), rows // 16, 2, True)


@gluon.jit
def _column_keys(words, columns):
    """Of any columns."""
    return _moved(_key(words, columns // 128 * 4 + columns % 8 // 2), columns // 16, 3, False)


@gluon.jit
def _sum(row, column):
    """A row's key xor a column's, in asm: the compiler would keep one of them, moved to each of its patches, in registers."""
    asm: gl.constexpr = "xor.b32 $0, $2, $4; xor.b32 $1, $3, $5;"
    operands = [row[0], row[1], column[0], column[1]]
    return gl.inline_asm_elementwise(asm, "=&r,=&r,r,r,r,r", operands, dtype=(gl.uint32, gl.uint32), is_pure=True, pack=1)


@gluon.jit
def _mixed(key):
    """What a call's words are made of."""
    x = key[0] * MIXING_MULTIPLIER + key[1] & WORD
    return x, x ^ x >> 16


@gluon.jit
def _draws(key):
    """Four words of draws from the sum of a row's and a column's key."""
    x, y = _mixed(key)
    words = ()
    for i in gl.static_range(4):
        words = words + (y * WORD_MULTIPLIERS[i] + x & WORD,)
    return words


@gluon.jit
def _anywhere(plane, key, rows, columns):
    """Each score's own, from its own key: the sign of its lowest byte is set where it is kept. For tiles that do not begin where
    a patch does."""
    x, y = _mixed(key)
    above = gl.where(columns // 8 % 2 == 0, WORD_MULTIPLIERS[0], WORD_MULTIPLIERS[2])
    below = gl.where(columns // 8 % 2 == 0, WORD_MULTIPLIERS[1], WORD_MULTIPLIERS[3])
    word = y * gl.where(rows // 8 % 2 == 0, above, below).to(gl.uint32) + x & WORD
    draws = word >> (columns % 2 * 16 + 7).to(gl.uint32) & 0xFF
    threshold = plane.dropout.threshold
    return gl.where(draws >= (threshold >> 7 & 0xFF), 0x80, 0).to(gl.uint32) ^ (threshold >> 31 << 7)


@gluon.jit
def _patches(x, n: gl.constexpr):
    """(64, n) in an accumulator's layout as (32, n / 16, 4, 8): what a thread has of a patch of the generator, in order."""
    parts = gl.permute(gl.reshape(x, [4, 2, 8, n // 16, 2, 4, 2]), (0, 2, 3, 5, 4, 1, 6))
    return gl.reshape(parts, [32, n // 16, 4, 8])


@gluon.jit
def _whole(x, n: gl.constexpr):
    """From such patches back to (64, n)."""
    parts = gl.permute(gl.reshape(x, [4, 8, n // 16, 4, 2, 2, 2]), (0, 5, 1, 2, 4, 3, 6))
    return gl.convert_layout(gl.reshape(parts, [M, n]), accumulator_layout(n), assert_trivial=True)


@gluon.jit
def _calls(n: gl.constexpr):
    """Of a tile's calls of the generator, (32, n / 16, 4) of the layout that is returned last: line, patch and pair of columns,
    which broadcast to all."""
    s = gl.zeros([M, n], gl.uint32, accumulator_layout(n))
    layout: gl.constexpr = gl.SliceLayout(3, _patches(s, n).type.layout)
    line = gl.arange(0, 32, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    patch = gl.arange(0, n // 16, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    pair = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    return line, patch, pair


# ------------------------------------------------------------------------------------------------------------------ S


@gluon.jit
def plane_of_rows(config: gl.constexpr, dropout, number, head, row, key):
    """The plane of 64 rows from `row` on, whose first key stands at `key`."""
    keys: gl.constexpr = config.keys
    of_rows, of_columns = _head_words(dropout, number, head)
    if has(config, "key_start"):
        own = _row_keys(of_rows, row + gl.arange(0, M, gl.SliceLayout(1, accumulator_layout(keys))))
    else:
        line, _, _ = _calls(keys)
        own = _row_keys(of_rows, row + line // 8 * 16 + line % 8)
    return Plane(dropout, of_columns, own, row, key)


@gluon.jit
def key_of_block(config: gl.constexpr, plane, first_key):
    """What `draw` begins with: two registers."""
    _, _, pair = _calls(config.keys)
    key = _sum(plane.own, _key(plane.words, first_key // 128 * 4 + pair))
    if config.keys < 128:
        key = _moved(key, first_key // 16 % 8, 3, False)
    return key


@gluon.jit
def _words(words, keys: gl.constexpr):
    """Each score's word, uint32 (64, keys)."""
    s = gl.zeros([M, keys], gl.uint32, accumulator_layout(keys))
    patches: gl.constexpr = _patches(s, keys).type.layout
    number = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, patches))))[None, None, None, :] // 2
    near = gl.where(number == 0, gl.expand_dims(words[0], 3), gl.expand_dims(words[1], 3))
    far = gl.where(number == 2, gl.expand_dims(words[2], 3), gl.expand_dims(words[3], 3))
    return _whole(gl.where(number < 2, near, far), keys)


@gluon.jit
def draw(config: gl.constexpr, key):
    """The draws of a block, uint32 (64, keys): each score's word."""
    _, patch, _ = _calls(config.keys)
    return _words(_draws(_moved(key, patch, 3, False)), config.keys)


@gluon.jit
def draw_anywhere(config: gl.constexpr, plane, first_key):
    """The same with left padding, as `_anywhere` has them."""
    layout: gl.constexpr = accumulator_layout(config.keys)
    rows = plane.first + gl.arange(0, M, gl.SliceLayout(1, layout))
    columns = plane.key + first_key + gl.arange(0, config.keys, gl.SliceLayout(0, layout))
    r0, r1 = plane.own
    c0, c1 = _column_keys(plane.words, columns)
    key = _sum((r0[:, None], r1[:, None]), (c0[None, :], c1[None, :]))
    return _anywhere(plane, key, rows[:, None], columns[None, :])


@gluon.constexpr_function
def _compared_asm(results, kind, threshold):
    """(result, word) each: for a half of the word that is kept all ones of `kind` u32, 1.0 of `kind` f16x2, else 0. $`threshold`
    is as Dropout has it."""
    lines = [f"setp.lt.s32 inverse, {threshold}, 0; abs.f16x2 least, {threshold};"]
    lines += [f"abs.f16x2 x, {word}; set.geu.xor.{kind}.f16x2 {result}, x, least, inverse;" for result, word in results]
    return " ".join(lines)


@gluon.constexpr_function
def _dropped_asm(dtype):
    """Two neighbours in a row, $1, of one word. A product, for the pipe of logic has the comparisons to do, and because ptxas
    takes the halves of an `and` apart at a loop's end."""
    kind = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    compared = _compared_asm((("m", "$2"),), "f16x2", "$4")
    return f"{{ .reg .b32 x, m, least; .reg .pred inverse; {compared} mul.{kind} $0, $1, m; }}"


@gluon.jit
def dropped(config: gl.constexpr, plane, p, draws):
    """P (64, keys) in 16 bits with zeros where it is dropped. What is kept is not made up for that here, out is, once; in
    bfloat16 it comes multiplied by what the bits of a float16's 1.0 are there, 2^-7 (see `scale_of_kept`)."""
    if has(config, "key_start"):
        each: gl.constexpr = "{ .reg .b32 mask; prmt.b32 mask, $2, $3, 0xCC88; and.b32 $0, $1, mask; }"
        if p.dtype == gl.bfloat16:
            return gl.inline_asm_elementwise(each, "=r,r,r,r", [p, draws], dtype=gl.bfloat16, is_pure=True, pack=2)
        else:
            return gl.inline_asm_elementwise(each, "=r,r,r,r", [p, draws], dtype=gl.float16, is_pure=True, pack=2)
    else:
        asm: gl.constexpr = _dropped_asm(p.dtype)
        operands = [p, draws, plane.dropout.threshold]
        if p.dtype == gl.bfloat16:
            return gl.inline_asm_elementwise(asm, "=r,r,r,r,r,r", operands, dtype=gl.bfloat16, is_pure=True, pack=2)
        else:
            return gl.inline_asm_elementwise(asm, "=r,r,r,r,r,r", operands, dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def scale_of_kept(config: gl.constexpr, dropout, dtype: gl.constexpr):
    """What out is multiplied by for P as `dropped` has it."""
    if dtype == gl.bfloat16 and not has(config, "key_start"):
        return dropout.keep_scale * 128.0
    else:
        return dropout.keep_scale


# ---------------------------------------------------------------------------------------------------------------- S^T


@gluon.jit
def plane_of_keys(config: gl.constexpr, dropout, number, head, key):
    """The plane of 64 keys, the first of which stands at `key`."""
    rows: gl.constexpr = config.rows
    of_rows, of_columns = _head_words(dropout, number, head)
    if has(config, "key_start"):
        own = _column_keys(of_columns, key + gl.arange(0, M, gl.SliceLayout(1, accumulator_layout(rows))))
    else:
        line, _, _ = _calls(rows)
        own = _column_keys(of_columns, key + line // 8 * 16 + line % 8)
    return Plane(dropout, of_rows, own, key, key)


@gluon.jit
def draw_transposed(config: gl.constexpr, plane, first_row):
    """The draws of S^T (64 keys, rows): four words (32, rows / 16, 4) whose halves are two neighbouring rows', of a key, of it
    and the rows 8 further, and of the key 8 further; the threshold. With left padding (64, rows) as `_anywhere` has it."""
    rows: gl.constexpr = config.rows
    layout: gl.constexpr = accumulator_layout(rows)
    if has(config, "key_start"):
        lines = first_row + gl.arange(0, rows, gl.SliceLayout(0, layout))
        columns = plane.key + gl.arange(0, M, gl.SliceLayout(1, layout))
        c0, c1 = plane.own
        r0, r1 = _row_keys(plane.words, lines)
        key = _sum((r0[None, :], r1[None, :]), (c0[:, None], c1[:, None]))
        return (_anywhere(plane, key, lines[None, :], columns[:, None]),)
    else:
        line, patch, pair = _calls(rows)
        number = first_row // 8 + pair * 2 + line % 2  # of a row, as odd as the key
        words = _draws(_moved(_sum(_key(plane.words, number), plane.own), patch, 2, True))
        of_other, of_near, of_far = _selectors(number)
        drawn = ()
        for i in gl.static_range(2):
            near, far = words[2 * i], words[2 * i + 1]
            received = _of_other_parity(_permuted(near, far, of_other))
            drawn = drawn + (_permuted(near, received, of_near), _permuted(far, received, of_far))
        return drawn + (plane.dropout.threshold,)


_SELECTORS = gl.constexpr(
    "{ .reg .b32 odd, x; and.b32 odd, $3, 1; neg.s32 odd, odd; and.b32 x, odd, 0x2222; xor.b32 $0, x, 0x7632;"
    " and.b32 x, odd, 0x6644; xor.b32 $1, x, 0x5410; and.b32 x, odd, 0x4466; xor.b32 $2, x, 0x7610; }"
)


@gluon.jit
def _selectors(number):
    """For `_permuted`, one for even and one for odd numbers each: of a key's word and of that 8 further the halves of the other
    parity; its own half of the first and what it is given of the first, the even row's below; the same of the second. Made in
    the loop: three registers less."""
    asm: gl.constexpr = _SELECTORS
    kinds: gl.constexpr = (gl.int32, gl.int32, gl.int32)
    return gl.inline_asm_elementwise(asm, "=&r,=&r,=&r,r", [number], dtype=kinds, is_pure=True, pack=1)


@gluon.jit
def _permuted(a, b, selector):
    """Bytes of two words."""
    asm: gl.constexpr = "prmt.b32 $0, $1, $2, $3;"
    return gl.inline_asm_elementwise(asm, "=r,r,r,r", [a, b, selector], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def _of_other_parity(x):
    """Of each key that of its odd or even neighbour, four lanes away."""
    asm: gl.constexpr = "shfl.sync.bfly.b32 $0, $1, 4, 31, 0xffffffff;"
    return gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def _spread(x, rows: gl.constexpr):
    """(32, rows / 16, 4) to each of its scores, (64 keys, rows)."""
    s = gl.zeros([M, rows], gl.uint32, accumulator_layout(rows))
    return _whole(gl.expand_dims(x, 3) | _patches(s, rows), rows)


@gluon.constexpr_function
def _masks_of_keys_asm():
    """Eight scores of two keys, pairs of rows: two neighbours', then those 8 rows further; the words are $4 and $12 of the first
    key, $20 and $28 of the second."""
    masks = (("$0", "$4"), ("$1", "$20"), ("$2", "$12"), ("$3", "$28"))
    return f"{{ .reg .b32 x, least; .reg .pred inverse; {_compared_asm(masks, 'u32', '$36')} }}"


_MASKS = gl.constexpr("=&r,=&r,=&r,=&r" + ",r" * 40)


@gluon.jit
def masks(config: gl.constexpr, drawn, dtype: gl.constexpr):
    """From what `draw_transposed` leaves: 16 bits for each score (64 keys, rows), all ones where it is kept, else zeros."""
    if has(config, "key_start"):
        each: gl.constexpr = "prmt.b32 $0, $1, $2, 0xCC88;"
        if dtype == gl.bfloat16:
            return gl.inline_asm_elementwise(each, "=r,r,r", [drawn[0]], dtype=gl.bfloat16, is_pure=True, pack=2)
        else:
            return gl.inline_asm_elementwise(each, "=r,r,r", [drawn[0]], dtype=gl.float16, is_pure=True, pack=2)
    else:
        asm: gl.constexpr = _masks_of_keys_asm()
        operands = [
            _spread(drawn[0], config.rows), _spread(drawn[1], config.rows),
            _spread(drawn[2], config.rows), _spread(drawn[3], config.rows), drawn[4],
        ]  # fmt: skip
        if dtype == gl.bfloat16:
            return gl.inline_asm_elementwise(asm, _MASKS, operands, dtype=gl.bfloat16, is_pure=True, pack=8)
        else:
            return gl.inline_asm_elementwise(asm, _MASKS, operands, dtype=gl.float16, is_pure=True, pack=8)


@gluon.jit
def masked(p, masks):
    """P^T in 16 bits, 0 where it is dropped."""
    asm: gl.constexpr = "and.b32 $0, $1, $2;"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [p, masks], dtype=p.dtype, is_pure=True, pack=2)


_DERIVATIVES = gl.constexpr(
    "{ .reg .pred p, q; .reg .b32 zero; .reg .f32 c, e; mov.b32 zero, 0; setp.neu.f16x2 p|q, $4, zero;"
    " neg.f32 c, $7; neg.f32 e, $8; mul.f32 $0, $2, c; mul.f32 $1, $3, e;"
    " @p fma.rn.f32 $0, $2, $5, $0; @q fma.rn.f32 $1, $3, $6, $1; }"
)


@gluon.jit
def masked_derivatives(p, masks, dp, d):
    """P^T (dP^T - D), with dP^T 0 where P is dropped. (All ones are NaN, and differ from 0.)"""
    asm: gl.constexpr = _DERIVATIVES
    return gl.inline_asm_elementwise(asm, "=&f,=&f,f,f,r,f,f,f,f", [p, masks, dp, d], dtype=gl.float32, is_pure=True, pack=2)


@gluon.jit
def marked(p, masks):
    """P^T in 16 bits, negative where it is dropped: both P and the mask in the place of one."""
    asm: gl.constexpr = "lop3.b32 $0, $1, $2, 0x80008000, 0xF2;"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [p, masks], dtype=p.dtype, is_pure=True, pack=2)
