"""Dropout's draws on one warpgroup's tile, bit for bit as tessera/dropout.py defines them.

A row and a column have a key each of two words, by Philox4x32-7; two short rounds over their sum give eight draws. In S all
eight are one thread's, and a word's four are P's neighbours in two rows. In S^T a thread has two keys of one parity, and the
thread four lanes further the other parity of the same rows: each draws for half of the rows and hands on the other's bytes.

The keys of a tile's own rows (of S^T: of its keys) are made once. Those that change from block to block are made by a warp
together, one a lane, and shuffled.

What `draw` and `draw_transposed` leave is one bit that counts in each byte, its sign: set where the score is kept.
"""

from tessera.backends.hopper.pieces.softmax import finish_before
from tessera.backends.hopper.pieces.tiles import M, accumulator_layout, has
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
class Stem:
    """What the first two of Philox's rounds over (n, h0, h1, h2) have of the plane's words alone."""

    third: gl.tensor
    first: gl.tensor
    mixed: gl.tensor
    low: gl.tensor

    @gluon.constexpr_function
    def __init__(self, third, first, mixed, low):
        self.third = third
        self.first = first
        self.mixed = mixed
        self.low = low


@aggregate
class Plane:
    """The scores of one head of one sequence, seen from the tile: the two words of its own rows (of S^T: of its own keys), the
    first of these, and where its first key stands."""

    dropout: Dropout
    stem: Stem
    own: gl.tuple
    first: gl.tensor
    key: gl.tensor

    @gluon.constexpr_function
    def __init__(self, dropout, stem, own, first, key):
        self.dropout = dropout
        self.stem = stem
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
def _stem(dropout, number, head):
    """Of a head of a sequence: its words by Philox with the seed, and from these what all its keys have in common."""
    none = number ^ number
    h0, h1, h2, _ = philox(head, number, none, none, dropout.key_low, dropout.key_high)
    low, high = _product(h1, 0xCD9E8D57)
    low_2, high_2 = _product(high ^ h0, 0xD2511F53)
    return Stem(h2, low ^ 0x9E3779B9, high_2 ^ 0xBB67AE85, low_2)


@gluon.constexpr_function
def _round_key(i, step):
    return i * step & 0xFFFFFFFF


@gluon.jit
def _key_words(stem, n):
    """Philox over (n, h0, h1, h2): two words for the row that has the number n, two for the column."""
    low, high = _product(n, 0xD2511F53)
    low_2, high_2 = _product(high ^ stem.third, 0xCD9E8D57)
    c0, c1, c2, c3 = high_2 ^ stem.first, low_2, low ^ stem.mixed, stem.low
    for i in gl.static_range(2, ROUNDS):
        low, high = _product(c0, 0xD2511F53)
        low_2, high_2 = _product(c2, 0xCD9E8D57)
        c0, c1 = high_2 ^ c1 ^ _round_key(i, 0x9E3779B9), low_2
        c2, c3 = high ^ c3 ^ _round_key(i, 0xBB67AE85), low
    return (c0, c1), (c2, c3)


@gluon.constexpr_function
def _keys_asm(count, step, of_columns):
    """The same words for `count` numbers, for which a warp's lanes do the work together: each makes those of the number n + a
    and takes the others by shuffles, number i of the lane (own lane modulo `step`) + i `step`.

    Operands: the count first words, the second ones; the count numbers n, the addends a, the stem's four, count times each."""
    n, a, third, first, mixed, low = (f"${2 * count + i * count}" for i in range(6))
    of_first = "mul.wide.u32 w, c0, 0xD2511F53; mov.b64 {l, h}, w;"
    of_second = "mul.wide.u32 w, c2, 0xCD9E8D57; mov.b64 {k, m}, w;"
    lines = ["{ .reg .b64 w; .reg .b32 c0, c1, c2, c3, h, l, m, k;", f"add.u32 c0, {n}, {a};"]
    lines += [of_first, f"xor.b32 c2, h, {third};", of_second, f"xor.b32 c0, m, {first}; mov.b32 c1, k;"]
    lines += [f"xor.b32 c2, l, {mixed}; mov.b32 c3, {low};"]
    for i in range(2, ROUNDS.value):
        k0, k1 = _round_key(i, 0x9E3779B9), _round_key(i, 0xBB67AE85)
        if i < ROUNDS.value - 1 or of_columns:
            lines += [of_first, f"xor.b32 h, h, c3; xor.b32 h, h, {k1};"]
        if i < ROUNDS.value - 1 or not of_columns:
            lines += [of_second, f"xor.b32 m, m, c1; xor.b32 m, m, {k0};"]
        if i < ROUNDS.value - 1:
            lines += ["mov.b32 c0, m; mov.b32 c1, k; mov.b32 c2, h; mov.b32 c3, l;"]
    words = "hl" if of_columns else "mk"
    for i in range(count):
        for place, word in enumerate(words):
            lines += [f"shfl.sync.idx.b32 ${place * count + i}, {word}, {i * step}, {(step - 1) << 8 | 31}, 0xffffffff;"]
    return " ".join([*lines, "}"])


@gluon.constexpr_function
def _keys_constraints(count):
    return ",".join(["=&r"] * (2 * count) + ["r"] * (6 * count))


@gluon.jit
def _keys(stem, numbers, anchors, step: gl.constexpr, of_columns: gl.constexpr):
    """The two words of the columns, or rows, with these numbers, (32, n): a thread's are `step` apart, and with `anchors` (32, 1)
    added to its first, a warp's lanes have them all."""
    count: gl.constexpr = numbers.shape[1] // 4
    asm: gl.constexpr = _keys_asm(count, step, of_columns)
    constraints: gl.constexpr = _keys_constraints(count)
    operands = [numbers, anchors, stem.third, stem.first, stem.mixed, stem.low]
    return gl.inline_asm_elementwise(asm, constraints, operands, dtype=(gl.uint32, gl.uint32), is_pure=True, pack=count)


@gluon.jit
def _draws(row, column):
    """Two words of draws from a row's and a column's key: two rounds of Philox2x32 over their sum."""
    a, b = row[0] ^ column[0], row[1] ^ column[1]
    for _ in gl.static_range(2):
        low, high = _product(a, 0xD256D193)
        a, b = high ^ b, low
    return a, b


@gluon.jit
def _judged(plane, x):
    """A word of draws with the sign of each byte set where that draw is kept."""
    key = plane.dropout
    y = (x & LOW_BITS) + key.addend
    asm: gl.constexpr = "lop3.b32 $0, $1, $2, $3, 0xE8;"
    return gl.inline_asm_elementwise(asm, "=r,r,r,r", [x, y, key.either], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def _anywhere(plane, words, rows, columns):
    """Each score's own byte, the lowest, for tiles that do not begin where a patch of the generator does."""
    a, b = words
    byte = rows // 8 % 2 * 2 + columns % 2
    return _judged(plane, gl.where(columns // 8 % 2 == 0, a, b) >> (byte * 8).to(gl.uint32))


@gluon.jit
def _row_number(rows):
    return (rows // 16 * 8 + rows % 8).to(gl.uint32)


@gluon.jit
def _column_number(columns):
    return (columns // 16 * 4 + columns % 8 // 2).to(gl.uint32)


@gluon.jit
def _patches(x, n: gl.constexpr):
    """(64, n) in an accumulator's layout as (32, n / 4, 8): what a thread has of a patch of the generator. No register moves."""
    parts = gl.permute(gl.reshape(x, [4, 2, 8, n // 16, 2, 4, 2]), (0, 2, 3, 5, 4, 1, 6))
    return gl.reshape(parts, [32, n // 4, 8])


@gluon.jit
def _whole(x, n: gl.constexpr):
    """From such patches, (32, n / 4, 8), back to (64, n)."""
    parts = gl.permute(gl.reshape(x, [4, 8, n // 16, 4, 2, 2, 2]), (0, 5, 1, 2, 4, 3, 6))
    return gl.convert_layout(gl.reshape(parts, [M, n]), accumulator_layout(n), assert_trivial=True)


# ------------------------------------------------------------------------------------------------------------------ S


@gluon.jit
def plane_of_rows(config: gl.constexpr, dropout, number, head, row, key):
    """The plane of 64 rows from `row` on, whose first key stands at `key`."""
    keys: gl.constexpr = config.keys
    stem = _stem(dropout, number, head)
    if has(config, "key_start"):
        rows = row + gl.arange(0, M, gl.SliceLayout(1, accumulator_layout(keys)))
        own, _ = _key_words(stem, _row_number(rows))
    else:
        s = gl.zeros([M, keys], gl.float32, accumulator_layout(keys))
        calls: gl.constexpr = gl.SliceLayout(2, _patches(s, keys).type.layout)
        numbers = row // 2 + gl.arange(0, 32, gl.SliceLayout(1, calls))
        own, _ = _key_words(stem, numbers.to(gl.uint32))
    return Plane(dropout, stem, own, row, key)


@gluon.jit
def draw(config: gl.constexpr, plane, first_key):
    """What of a block is kept, uint32 (64, keys): each score's word; with left padding its own byte, the lowest."""
    keys: gl.constexpr = config.keys
    layout: gl.constexpr = accumulator_layout(keys)
    r0, r1 = plane.own
    row = (r0[:, None], r1[:, None])
    if has(config, "key_start"):
        rows = plane.first + gl.arange(0, M, gl.SliceLayout(1, layout))
        columns = plane.key + first_key + gl.arange(0, keys, gl.SliceLayout(0, layout))
        _, column = _key_words(plane.stem, _column_number(columns))
        words = _draws(row, (column[0][None, :], column[1][None, :]))
        return _anywhere(plane, words, rows[:, None], columns[None, :])
    else:
        s = gl.zeros([M, keys], gl.uint32, layout)
        patches: gl.constexpr = _patches(s, keys).type.layout
        calls: gl.constexpr = gl.SliceLayout(2, patches)
        numbers = first_key // 4 + gl.arange(0, keys // 4, gl.SliceLayout(0, calls))
        anchors = gl.arange(0, 32, gl.SliceLayout(1, calls)) % 8 * 4
        w0, w1 = _draws(row, _keys(plane.stem, numbers[None, :], anchors[:, None], 4, True))
        w0, w1 = _judged(plane, w0), _judged(plane, w1)
        if config.consumers == 2:  # under S
            finish_before(w0 ^ w1, keys // 16)
        number = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, patches)))[None, None, :] // 4
        return _whole(gl.where(number == 0, w0[:, :, None], w1[:, :, None]), keys)


@gluon.jit
def _bytes_of_pairs(config: gl.constexpr):
    """Which bytes' signs make the masks of two neighbours, (64, keys): a word's first two in a row, its last two 8 rows below;
    with left padding the lowest of a word each."""
    keys: gl.constexpr = config.keys
    s = gl.zeros([M, keys], gl.int32, accumulator_layout(keys))
    if has(config, "key_start"):
        return s + 0xCC88
    else:
        patches = _patches(s, keys)
        place = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, patches.type.layout)))[None, None, :]
        return _whole(patches + (0x9988 + place // 2 % 2 * 0x2222), keys)


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
def plane_of_keys(config: gl.constexpr, dropout, number, head, key):
    """The plane of 64 keys, the first of which stands at `key`."""
    rows: gl.constexpr = config.rows
    stem = _stem(dropout, number, head)
    if has(config, "key_start"):
        columns = key + gl.arange(0, M, gl.SliceLayout(1, accumulator_layout(rows)))
        _, own = _key_words(stem, _column_number(columns))
    else:
        s = gl.zeros([M, rows], gl.float32, accumulator_layout(rows))
        place = gl.arange(0, 32, gl.SliceLayout(1, gl.SliceLayout(2, _patches(s, rows).type.layout)))
        _, own = _key_words(stem, (key // 4 + place // 8 * 4 + place % 8 // 2).to(gl.uint32))
    return Plane(dropout, stem, own, key, key)


@gluon.jit
def draw_transposed(config: gl.constexpr, plane, first_row):
    """What of S^T (64 keys, rows) is kept: two words (32, rows / 4), of even rows and of odd ones, each with the draws of two
    keys, 8 apart, in two rows, 8 apart; with left padding (64, rows) as `draw` has it."""
    rows: gl.constexpr = config.rows
    layout: gl.constexpr = accumulator_layout(rows)
    c0, c1 = plane.own
    column = (c0[:, None], c1[:, None])
    if has(config, "key_start"):
        lines = first_row + gl.arange(0, rows, gl.SliceLayout(0, layout))
        columns = plane.key + gl.arange(0, M, gl.SliceLayout(1, layout))
        row, _ = _key_words(plane.stem, _row_number(lines))
        words = _draws((row[0][None, :], row[1][None, :]), column)
        return (_anywhere(plane, words, lines[None, :], columns[:, None]),)
    else:
        s = gl.zeros([M, rows], gl.float32, layout)
        calls: gl.constexpr = gl.SliceLayout(2, _patches(s, rows).type.layout)
        place = gl.arange(0, 32, gl.SliceLayout(1, calls))  # a key modulo 8, of each 16
        odd = place % 2
        lines = first_row // 2 + gl.arange(0, rows // 4, gl.SliceLayout(0, calls)) * 2
        anchors = place % 8 // 2 * 8
        row = _keys(plane.stem, lines[None, :] + odd[:, None], anchors[:, None], 8, False)
        near, far = _draws(row, column)
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
    s = gl.zeros([M, rows], gl.uint32, accumulator_layout(rows))
    return _whole(gl.expand_dims(x, 2) | _patches(s, rows), rows)


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
