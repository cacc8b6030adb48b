"""Dropout's draws on one warpgroup's tile, bit for bit as tessera/dropout.py defines them.

A row and a column have a key each of two words; two short rounds over their sum give eight draws. In S all eight are one
thread's, and a word's halves are two of P's neighbours. In S^T a thread has two keys of one parity, and the thread four lanes
further the other parity of the same rows: each draws for half of the rows and hands on the other's halves.

The keys of a tile's own rows (of S^T: of its keys) are made once. Of those that change from block to block a thread makes one:
what it sees of a block's others differs from that by constants.

A draw is 8 bits behind the sign of a float16. Two at once are compared with the threshold, which gives their masks: magnitudes
of floats are ordered as their bits are, NaN counts as larger, and thresholds are 128 at most, which is no NaN.
"""

from tessera.backends.hopper.pieces.softmax import finish_before
from tessera.backends.hopper.pieces.tiles import M, accumulator_layout, has
from tessera.jit.compat import aggregate, gl, gluon

WORD = gl.constexpr(0xFFFFFFFF)
ROUNDS = gl.constexpr(7)
MIXING_ROUNDS = gl.constexpr(2)


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


@gluon.constexpr_function
def _round_key(i):
    return i * 0x9E3779B9 & 0xFFFFFFFF


@gluon.jit
def _philox_2(a, b, rounds: gl.constexpr):
    """Philox2x32 with key 0."""
    for i in gl.static_range(rounds):
        low, high = _product(a, 0xD256D193)
        a, b = high ^ b ^ _round_key(i), low
    return a, b


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


@gluon.constexpr_function
def _key_asm():
    """Philox2x32 over ($2 xor $3, $4): as `_philox_2`, but that nothing is taken out of a loop, or apart."""
    lines = ["{ .reg .b64 w; .reg .b32 a, b, h;", "xor.b32 a, $2, $3; mov.b32 b, $4;"]
    for i in range(ROUNDS.value):
        lines += [f"mul.wide.u32 w, a, 0xD256D193; xor.b32 h, b, {_round_key(i)}; mov.b64 {{b, a}}, w; xor.b32 a, a, h;"]
    return " ".join([*lines, "mov.b32 $0, a; mov.b32 $1, b; }"])


@gluon.jit
def _key(words, number):
    """The key of a group of rows, or of columns."""
    asm: gl.constexpr = _key_asm()
    operands = [number, words[0], words[1]]
    return gl.inline_asm_elementwise(asm, "=r,=r,r,r,r", operands, dtype=(gl.uint32, gl.uint32), is_pure=True, pack=1)


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
def _draws(key):
    """Two words of draws from the sum of a row's and a column's key."""
    return _philox_2(key[0], key[1], MIXING_ROUNDS)


@gluon.jit
def _anywhere(plane, words, rows, columns):
    """Each score's own: the sign of its lowest byte is set where it is kept. For tiles that do not begin where a patch does."""
    a, b = words
    half = gl.where(columns // 8 % 2 == 0, a, b) >> (columns % 2 * 16).to(gl.uint32) & 0xFFFF
    draws = gl.where(rows // 8 % 2 == 0, half >> 7, half << 1 | half >> 15) & 0xFF
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
def _words(w0, w1, keys: gl.constexpr):
    """Each score's word, uint32 (64, keys)."""
    s = gl.zeros([M, keys], gl.uint32, accumulator_layout(keys))
    patches: gl.constexpr = _patches(s, keys).type.layout
    number = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, patches))))[None, None, None, :] // 4
    return _whole(gl.where(number == 0, gl.expand_dims(w0, 3), gl.expand_dims(w1, 3)), keys)


@gluon.jit
def draw(config: gl.constexpr, key):
    """The draws of a block, uint32 (64, keys): each score's word."""
    _, patch, _ = _calls(config.keys)
    w0, w1 = _draws(_moved(key, patch, 3, False))
    if config.consumers == 2:  # under S
        finish_before(w0 ^ w1, config.keys // 16)
    return _words(w0, w1, config.keys)


@gluon.jit
def draw_anywhere(config: gl.constexpr, plane, first_key):
    """The same with left padding, as `_anywhere` has them."""
    layout: gl.constexpr = accumulator_layout(config.keys)
    rows = plane.first + gl.arange(0, M, gl.SliceLayout(1, layout))
    columns = plane.key + first_key + gl.arange(0, config.keys, gl.SliceLayout(0, layout))
    r0, r1 = plane.own
    c0, c1 = _column_keys(plane.words, columns)
    words = _draws(_sum((r0[:, None], r1[:, None]), (c0[None, :], c1[None, :])))
    return _anywhere(plane, words, rows[:, None], columns[None, :])


@gluon.constexpr_function
def _masks_asm(masks, threshold):
    """(mask, word, whether of its halves' second draws) each: $`threshold` is as Dropout has it."""
    lines = [f"setp.lt.s32 inverse, {threshold}, 0; abs.f16x2 least, {threshold};"]
    for mask, word, is_second in masks:
        lines += [f"prmt.b32 x, {word}, {word}, 0x2301; abs.f16x2 x, x;" if is_second else f"abs.f16x2 x, {word};"]
        lines += [f"set.geu.xor.u32.f16x2 {mask}, x, least, inverse;"]
    return " ".join(lines)


@gluon.constexpr_function
def _dropped_asm():
    """Two neighbours in a row, $2, and the two 8 rows below, of one word."""
    masks = _masks_asm((("m", "$4", False), ("n", "$4", True)), "$8")
    return f"{{ .reg .b32 x, m, n, least; .reg .pred inverse; {masks} and.b32 $0, $2, m; and.b32 $1, $3, n; }}"


@gluon.jit
def dropped(config: gl.constexpr, plane, p, draws):
    """P (64, keys) in 16 bits with zeros where it is dropped. What is kept is not scaled here: out is, once."""
    if has(config, "key_start"):
        each: gl.constexpr = "{ .reg .b32 mask; prmt.b32 mask, $2, $3, 0xCC88; and.b32 $0, $1, mask; }"
        if p.dtype == gl.bfloat16:
            return gl.inline_asm_elementwise(each, "=r,r,r,r", [p, draws], dtype=gl.bfloat16, is_pure=True, pack=2)
        else:
            return gl.inline_asm_elementwise(each, "=r,r,r,r", [p, draws], dtype=gl.float16, is_pure=True, pack=2)
    else:
        asm: gl.constexpr = _dropped_asm()
        constraints: gl.constexpr = "=&r,=&r" + ",r" * 10
        operands = [p, draws, plane.dropout.threshold]
        if p.dtype == gl.bfloat16:
            return gl.inline_asm_elementwise(asm, constraints, operands, dtype=gl.bfloat16, is_pure=True, pack=4)
        else:
            return gl.inline_asm_elementwise(asm, constraints, operands, dtype=gl.float16, is_pure=True, pack=4)


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
    """The draws of S^T (64 keys, rows): two words (32, rows / 16, 4), of a key and of that 8 further, whose halves are two
    neighbouring rows'; and the threshold. With left padding (64, rows) as `_anywhere` has them."""
    rows: gl.constexpr = config.rows
    layout: gl.constexpr = accumulator_layout(rows)
    if has(config, "key_start"):
        lines = first_row + gl.arange(0, rows, gl.SliceLayout(0, layout))
        columns = plane.key + gl.arange(0, M, gl.SliceLayout(1, layout))
        c0, c1 = plane.own
        r0, r1 = _row_keys(plane.words, lines)
        words = _draws(_sum((r0[None, :], r1[None, :]), (c0[:, None], c1[:, None])))
        return (_anywhere(plane, words, lines[None, :], columns[:, None]),)
    else:
        line, patch, pair = _calls(rows)
        number = first_row // 8 + pair * 2 + line % 2  # of a row, as odd as the key
        near, far = _draws(_moved(_sum(_key(plane.words, number), plane.own), patch, 2, True))
        of_other, of_near, of_far = _selectors(number)
        received = _of_other_parity(_permuted(near, far, of_other))
        return _permuted(near, received, of_near), _permuted(far, received, of_far), plane.dropout.threshold


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
    """Eight scores of two keys, pairs of rows, of their words $4 and $12: two neighbours', then those 8 rows further."""
    masks = (("$0", "$4", False), ("$1", "$12", False), ("$2", "$4", True), ("$3", "$12", True))
    return f"{{ .reg .b32 x, least; .reg .pred inverse; {_masks_asm(masks, '$20')} }}"


_MASKS = gl.constexpr("=&r,=&r,=&r,=&r" + ",r" * 24)


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
        near, far, threshold = drawn
        operands = [_spread(near, config.rows), _spread(far, config.rows), threshold]
        if dtype == gl.bfloat16:
            return gl.inline_asm_elementwise(asm, _MASKS, operands, dtype=gl.bfloat16, is_pure=True, pack=8)
        else:
            return gl.inline_asm_elementwise(asm, _MASKS, operands, dtype=gl.float16, is_pure=True, pack=8)


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
