"""Dropout's draws on one warpgroup's tile, bit for bit as tessera/dropout.py defines them.

A row and a column have a key each; a few 32-bit instructions mix both, and one more each makes words of two draws, of neighbours
in a row: in S they are judged together, as P is packed. In S^T a thread has both, because its keys lie in other lines (lines.py).

The keys of a tile's own rows (of S^T: of its keys) are made once. Of those that change from block to block a thread makes one:
its other's differs by a constant (that of odd rows, and of columns 8 further), and the rest of the thread has the same.

A draw is 8 bits behind the sign of a float16. Two at once are compared with the threshold, which gives their masks: magnitudes
of floats are ordered as their bits are, NaN counts as larger, and thresholds are 128 at most, which is no NaN.
"""

from tessera.backends.hopper.pieces.lines import key_of_line
from tessera.backends.hopper.pieces.tiles import M, accumulator_layout, has
from tessera.jit.compat import aggregate, gl, gluon

WORD = gl.constexpr(0xFFFFFFFF)
ROUNDS = gl.constexpr(7)
MIXING_MULTIPLIER = gl.constexpr(0xD256D193)
KEY_MULTIPLIERS = gl.constexpr((0x85EBCA6B, 0xC2B2AE35))
WORD_MULTIPLIER = gl.constexpr(0x610FCADF)
ROW_FACTORS = gl.constexpr((0xDF72B7EB, 0x77E90B5F, 0x6D24A0E5))
COLUMN_FACTORS = gl.constexpr((0xB2BE0D71, 0x6025A7C3, 0x47BA8F27))


@aggregate
class Dropout:
    """The seed in two words; the threshold, 8 bits, behind the signs of two float16: draws not below it are kept, or, where the
    signs are set, those below it. What is kept is multiplied by `keep_scale`."""

    key_low: gl.tensor
    key_high: gl.tensor
    threshold: gl.tensor
    keep_scale: gl.tensor


@aggregate
class Plane:
    """The scores of one head of one sequence, seen from the tile: the head's word for keys that change from block to block, with
    the thread's pair in it (`_word_of_pair`), the keys of the tile's own rows (of S^T: of its keys) and their factors, the first
    of these, and where its first key stands."""

    dropout: Dropout
    word: gl.tensor
    own: gl.tuple
    first: gl.tensor
    key: gl.tensor


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
def head_words(dropout, number, head):
    """A head's word for its rows' keys, and for its columns'."""
    none = number ^ number
    of_rows, of_columns, _, _ = philox(head, number, none, none, dropout.key_low, dropout.key_high)
    return of_rows, of_columns


@gluon.constexpr_function
def _odd_line(of_rows):
    return 0x85A308D3 if of_rows else 0x243F6A88


@gluon.jit
def _moved(key, is_odd, of_rows: gl.constexpr):
    """From the key of an even line that of an odd one, where that is 1. (A column counts as odd in every other eight.)"""
    return gl.where(is_odd == 0, key, key ^ _odd_line(of_rows))


@gluon.jit
def _begun(word, number):
    """What the key of a pair of rows, or of columns, is made of."""
    return number.to(gl.uint32) * KEY_MULTIPLIERS[0] + word & WORD


@gluon.jit
def _key(word, number):
    """The key of a pair of rows, or of columns."""
    key = _begun(word, number)
    return (key ^ key >> 16) * KEY_MULTIPLIERS[1] & WORD


@gluon.jit
def _word_of_pair(word, n: gl.constexpr):
    """The word for keys that change from block to block, with a thread's pair in it."""
    _, _, pair = _calls(n)
    return _begun(word, pair)


@gluon.jit
def _row_keys(word, rows):
    """Of any rows."""
    return _moved(_key(word, rows // 64 * 4 + rows % 8 // 2), rows % 2, True)


@gluon.jit
def _column_keys(word, columns):
    """Of any columns."""
    return _moved(_key(word, columns // 128 * 4 + columns % 8 // 2), columns // 8 % 2, False)


@gluon.jit
def _factor(number, factors: gl.constexpr):
    """The product of the factors of its lowest three bits that are set."""
    product = number.to(gl.uint32) * 0 + 1
    for bit in gl.static_range(3):
        is_set = (number >> bit & 1).to(gl.uint32)
        product = product * (is_set * (factors[bit] - 1) + 1) & WORD
    return product


@gluon.jit
def _factor_of_rows(rows):
    return _factor(rows // 8, ROW_FACTORS)


@gluon.jit
def _factor_of_columns(columns):
    return _factor(columns // 16, COLUMN_FACTORS) * WORD_MULTIPLIER & WORD


@gluon.jit
def _mixed(key, of_odd: gl.constexpr):
    """What the words of a row and a column are made of, from both keys' xor; or of the odd row, or column, beside it."""
    if of_odd is not None:
        key = key ^ _odd_line(of_odd)
    x = key * MIXING_MULTIPLIER & WORD
    return x, x ^ x >> 16


@gluon.jit
def _times(y, factor, zero):
    """The product, plus a 0 that the compiler does not know: else it makes the factor's products with all constants that y is
    multiplied by next before the loop, and has no registers for them."""
    return y * factor + zero & WORD


@gluon.jit
def _anywhere(plane, key, rows, columns):
    """Each score's own, from its own key: the sign of its lowest byte is set where it is kept. For tiles that do not begin where
    a patch does."""
    x, y = _mixed(key, None)
    word = y * (_factor_of_rows(rows) * _factor_of_columns(columns) & WORD) + x & WORD
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


@gluon.jit
def _spread(x, n: gl.constexpr):
    """(32, n / 16 or 1, 4) to each of its scores, (64, n)."""
    s = gl.zeros([M, n], gl.uint32, accumulator_layout(n))
    return _whole(gl.expand_dims(x, 3) | _patches(s, n), n)


# ------------------------------------------------------------------------------------------------------------------ S


@gluon.jit
def plane_of_rows(config: gl.constexpr, dropout, words, row, key):
    """The plane of 64 rows from `row` on, whose first key stands at `key`; `words` are the head's."""
    keys: gl.constexpr = config.keys
    of_rows, of_columns = words
    if has(config, "key_start"):
        own = (_row_keys(of_rows, row + gl.arange(0, M, gl.SliceLayout(1, accumulator_layout(keys)))),)
    else:
        line, _, _ = _calls(keys)
        rows = row + line // 8 * 16 + line % 8
        own = _row_keys(of_rows, rows), _factor_of_rows(rows)
        of_columns = _word_of_pair(of_columns, keys)
    return Plane(dropout, of_columns, own, row, key)


@gluon.jit
def key_of_block(config: gl.constexpr, plane, first_key):
    """What `draw` begins with: both keys' xor, and the factor of the thread's first patch."""
    own, factor = plane.own
    if config.keys < 128:
        factor = factor * _factor(first_key // 16, COLUMN_FACTORS) & WORD
    return own ^ _key(plane.word, first_key // 128 * 4), factor


@gluon.jit
def draw(config: gl.constexpr, plane, key):
    """What a block's words are made of, (64, keys): x of even columns and of odd ones, y of both times the row's factor, the
    patches' factors, and these times what takes a row's factor to that of the row 8 further."""
    _, patch, _ = _calls(config.keys)
    key, factor = key
    even, odd = _mixed(key, None), _mixed(key, False)
    zero = plane.dropout.threshold & 1
    y_even, y_odd = _times(even[1], factor, zero), _times(odd[1], factor, zero)
    of_columns = _factor_of_columns(patch * 16)
    return (
        _spread(even[0], config.keys), _spread(odd[0], config.keys), _spread(y_even, config.keys), _spread(y_odd, config.keys),
        _spread(of_columns, config.keys), _spread(of_columns * ROW_FACTORS[0] & WORD, config.keys),
    )  # fmt: skip


@gluon.jit
def draw_anywhere(config: gl.constexpr, plane, first_key):
    """The same with left padding, as `_anywhere` has them."""
    layout: gl.constexpr = accumulator_layout(config.keys)
    rows = plane.first + gl.arange(0, M, gl.SliceLayout(1, layout))
    columns = plane.key + first_key + gl.arange(0, config.keys, gl.SliceLayout(0, layout))
    key = plane.own[0][:, None] ^ _column_keys(plane.word, columns)[None, :]
    return _anywhere(plane, key, rows[:, None], columns[None, :])


@gluon.constexpr_function
def _compared_asm(results, threshold):
    """(result, word) each: all ones for a half of the word that is kept, else 0. `threshold` is as Dropout has it."""
    lines = [f"setp.lt.s32 inverse, {threshold}, 0; abs.f16x2 least, {threshold};"]
    lines += [f"abs.f16x2 x, {word}; set.geu.xor.u32.f16x2 {result}, x, least, inverse;" for result, word in results]
    return " ".join(lines)


@gluon.constexpr_function
def _dropped_asm():
    """Of a patch's eight scores: P $0 to $3 from P $4 to $7 and, each of eight registers alike, what `draw` leaves and the
    threshold."""
    lines = []
    for row, factor in enumerate(("$40", "$48")):
        lines.append(f"mad.lo.u32 w{row}, $24, {factor}, $8; mad.lo.u32 w{row + 2}, $32, {factor}, $16;")
    lines.append(_compared_asm(tuple((f"m{i}", f"w{i}") for i in range(4)), "$56"))
    lines += [f"and.b32 ${i}, ${4 + i}, m{i};" for i in range(4)]
    return f"{{ .reg .b32 w<4>, m<4>, x, least; .reg .pred inverse; {' '.join(lines)} }}"


_DROPPED = gl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r" + ",r" * 56)


@gluon.jit
def dropped(config: gl.constexpr, plane, p, draws):
    """P (64, keys) in 16 bits with zeros where it is dropped. What is kept is not made up for that here, out is, once."""
    if has(config, "key_start"):
        each: gl.constexpr = "{ .reg .b32 mask; prmt.b32 mask, $2, $3, 0xCC88; and.b32 $0, $1, mask; }"
        if p.dtype == gl.bfloat16:
            return gl.inline_asm_elementwise(each, "=r,r,r,r", [p, draws], dtype=gl.bfloat16, is_pure=True, pack=2)
        else:
            return gl.inline_asm_elementwise(each, "=r,r,r,r", [p, draws], dtype=gl.float16, is_pure=True, pack=2)
    else:
        asm: gl.constexpr = _dropped_asm()
        operands = [p, draws[0], draws[1], draws[2], draws[3], draws[4], draws[5], plane.dropout.threshold]
        if p.dtype == gl.bfloat16:
            return gl.inline_asm_elementwise(asm, _DROPPED, operands, dtype=gl.bfloat16, is_pure=True, pack=8)
        else:
            return gl.inline_asm_elementwise(asm, _DROPPED, operands, dtype=gl.float16, is_pure=True, pack=8)


# ---------------------------------------------------------------------------------------------------------------- S^T


@gluon.jit
def plane_of_keys(config: gl.constexpr, dropout, number, head, key):
    """The plane of 64 keys, the first of which stands at `key`."""
    rows: gl.constexpr = config.rows
    of_rows, of_columns = head_words(dropout, number, head)
    if has(config, "key_start"):
        own = (_column_keys(of_columns, key + gl.arange(0, M, gl.SliceLayout(1, accumulator_layout(rows)))),)
    else:
        line, _, _ = _calls(rows)
        keys = key + key_of_line(config, line // 8 * 16 + line % 8)
        own = _column_keys(of_columns, keys), _factor_of_columns(keys)
        of_rows = _word_of_pair(of_rows, rows)
    return Plane(dropout, of_rows, own, key, key)


@gluon.jit
def draw_transposed(config: gl.constexpr, plane, first_row):
    """What the words of S^T (64 keys, rows) are made of: x of even rows and of odd ones, y times the keys' factor of both,
    (32, 1, 4). With left padding the draws (64, rows) as `_anywhere` has them."""
    rows: gl.constexpr = config.rows
    layout: gl.constexpr = accumulator_layout(rows)
    if has(config, "key_start"):
        lines = first_row + gl.arange(0, rows, gl.SliceLayout(0, layout))
        columns = plane.key + gl.arange(0, M, gl.SliceLayout(1, layout))
        key = _row_keys(plane.word, lines)[None, :] ^ plane.own[0][:, None]
        return (_anywhere(plane, key, lines[None, :], columns[:, None]),)
    else:
        own, factor = plane.own
        key = _key(plane.word, first_row // 64 * 4) ^ own
        even, odd = _mixed(key, None), _mixed(key, True)
        zero = first_row.to(gl.uint32) >> 31  # in a uniform register: of the others there are too few
        return even[0], odd[0], _times(even[1], factor, zero), _times(odd[1], factor, zero), plane.dropout.threshold


@gluon.jit
def _spread_draws(config: gl.constexpr, drawn):
    """The same for each score; with the factors of a patch's rows, and of those 8 further, before the threshold."""
    rows: gl.constexpr = config.rows
    _, patch, _ = _calls(rows)
    return [
        _spread(drawn[0], rows), _spread(drawn[1], rows), _spread(drawn[2], rows), _spread(drawn[3], rows),
        _spread(_factor_of_rows(patch * 16), rows), _spread(_factor_of_rows(patch * 16 + 8), rows), drawn[4],
    ]  # fmt: skip


@gluon.constexpr_function
def _words_of_keys_asm(first):
    """w0 to w3, of a patch's even row, the odd one, and both 8 further, whose halves are two keys', from `_spread_draws` in eight
    registers each, $`first` and so on."""
    even, odd, y_even, y_odd, near, further = (f"${first + 8 * i}" for i in range(6))
    return " ".join(
        f"mad.lo.u32 w{2 * i + j}, {y}, {factor}, {x};"
        for i, factor in enumerate((near, further))
        for j, (x, y) in enumerate(((even, y_even), (odd, y_odd)))
    )


@gluon.constexpr_function
def _masks_of_keys_asm():
    """Eight scores of two keys, $0 to $3, pairs of rows: two neighbours', then those 8 rows further."""
    pairs = [f"prmt.b32 m{2 * i + half}, w{2 * i}, w{2 * i + 1}, {select};" for i in range(2)
             for half, select in enumerate(("0x5410", "0x7632"))]  # fmt: skip
    compared = _compared_asm(tuple((f"${i}", f"m{i}") for i in range(4)), "$52")
    names = "{ .reg .b32 x, least, w<4>, m<4>; .reg .pred inverse;"
    return f"{names} {_words_of_keys_asm(4)} {' '.join(pairs)} {compared} }}"


_MASKS = gl.constexpr("=&r,=&r,=&r,=&r" + ",r" * 56)


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
        operands = _spread_draws(config, drawn)
        if dtype == gl.bfloat16:
            return gl.inline_asm_elementwise(asm, _MASKS, operands, dtype=gl.bfloat16, is_pure=True, pack=8)
        else:
            return gl.inline_asm_elementwise(asm, _MASKS, operands, dtype=gl.float16, is_pure=True, pack=8)


@gluon.jit
def masked(p, masks):
    """P^T in 16 bits, 0 where it is dropped."""
    asm: gl.constexpr = "and.b32 $0, $1, $2;"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [p, masks], dtype=p.dtype, is_pure=True, pack=2)


@gluon.constexpr_function
def _kept_derivatives_asm(dtype):
    """Of a patch's eight scores: dS $0 to $7 and P as dV's operand $8 to $11 from P $12, dP $20, D $28, and what `_spread_draws`
    has $36 and so on. A word's halves are scores 2 apart; both predicates of a comparison are used at once."""
    lines = [_words_of_keys_asm(36), "setp.lt.s32 inverse, $84, 0; abs.f16x2 least, $84;"]
    for word, score in enumerate((0, 1, 4, 5)):
        lines.append(f"abs.f16x2 x, w{word}; setp.geu.xor.f16x2 kept|further, x, least, inverse;")
        for i, kept in ((score, "kept"), (score + 2, "further")):
            ds, p, dp = f"${i}", f"${12 + i}", f"${20 + i}"
            lines.append(f"neg.f32 d, ${28 + i}; mul.f32 {ds}, {p}, d; @{kept} fma.rn.f32 {ds}, {p}, {dp}, {ds};")
            lines.append(f"selp.f32 p{i}, {p}, 0f00000000, {kept};")
    kind = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    lines += [f"cvt.rn.{kind}.f32 ${8 + i}, p{2 * i + 1}, p{2 * i};" for i in range(4)]
    return f"{{ .reg .b32 x, least, w<4>; .reg .f32 d, p<8>; .reg .pred inverse, kept, further; {' '.join(lines)} }}"


_KEPT_DERIVATIVES = gl.constexpr(",".join(["=&f"] * 8 + ["=&r"] * 4 + ["f"] * 24 + ["r"] * 56))


@gluon.jit
def drawn_derivatives(config: gl.constexpr, p, drawn, dp, d, dtype: gl.constexpr):
    """P^T (dP^T - D), with dP^T 0 where P is dropped, and P^T in 16 bits, 0 where it is dropped, from what `draw_transposed`
    leaves. Two predicates of a comparison serve both: no masks."""
    asm: gl.constexpr = _kept_derivatives_asm(dtype)
    operands = [p, dp, d] + _spread_draws(config, drawn)
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(asm, _KEPT_DERIVATIVES, operands, dtype=(gl.float32, gl.bfloat16), is_pure=True, pack=8)
    else:
        return gl.inline_asm_elementwise(asm, _KEPT_DERIVATIVES, operands, dtype=(gl.float32, gl.float16), is_pure=True, pack=8)


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
