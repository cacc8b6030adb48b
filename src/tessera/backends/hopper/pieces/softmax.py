"""The online softmax of one warpgroup, in base 2.

State of a row: `m`, the reference that is subtracted (log2 units, scale folded in), and `l`, the sum of the
exponentials so far, kept as eight partial sums a row until the end so that no shuffle runs in the main loop.

The reference follows the row's maximum only where the maximum has outgrown it by more than 2^8 (the lazy rescaling of
FlashAttention-4, arXiv 2603.05451): P then stays below 2^8, which 16-bit floats hold as exactly as 1, the sums have room
in float32, and out = O / l is the same number. What it buys: O, which is as large as the tile allows, is multiplied once
or twice a tile instead of once a block. And nothing needs to wait for a block's maxima: P is taken at once, about the
reference as it stands, and the sums of P tell where that was outgrown (`exponentials_at_once`, `overtake`).
"""

from tessera.backends.hopper.pieces.tiles import M, accumulator_layout, row_layout
from tessera.jit.compat import gl, gluon

_GROWTH = 8.0
GROWTH = gl.constexpr(_GROWTH)
"""How far, in powers of two, a maximum may outgrow the reference before the reference moves."""
_LEAST_GROWTH = 4.0
"""The same where sums of 16 P have told that it may have: a maximum of 2^-4 of what they ask for is enough, and moves it, so that
they tell it once."""
LOWEST = gl.constexpr(-3.4028234663852886e38)
"""The reference of a row without keys so far, where P is taken at once: float32's lowest."""


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def tanh(x):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def to_16_bit(x, dtype: gl.constexpr):
    """Round pairs of neighbours; in inline asm a pair stays one register over the loop's back edge (else 64 PRMT a block)."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def to_32_bit(x):
    """Exact. Pairs of bfloat16 come apart by two instructions; by themselves they take four."""
    if x.dtype == gl.bfloat16:
        asm: gl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;"
        return gl.inline_asm_elementwise(asm, "=r,=r,r", [x], dtype=gl.float32, is_pure=True, pack=2)
    else:
        return x.to(gl.float32)


@gluon.jit
def to_32_bit_behind(x, other):
    """The same of values that are no less than 0, when `other` (float32, of the same shape) is there. Pairs of float16 come apart
    from a copy: the same bits, which ptxas takes for made of `other`. By itself it keeps the halves of a product's operand beside
    its pairs as soon as those are made: the consumers of head dim 64, 16 registers short, spilt, and ran serialised."""
    if x.dtype == gl.float16:
        asm: gl.constexpr = (
            "{ .reg .b32 pair; .reg .b16 low, high; lop3.b32 pair, $2, $3, 0x7fff7fff, 0xE0; "
            "mov.b32 {low, high}, pair; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
        )
        return gl.inline_asm_elementwise(asm, "=r,=r,r,r,r", [x, other], dtype=gl.float32, is_pure=True, pack=2)
    else:
        return to_32_bit(x)


@gluon.jit
def move_reference(s, m, scale):
    """The reference after block s (64, keys), and the factor for what was summed under the old one: 1 where it stays."""
    return outgrown(gl.max(s, axis=1) * scale, m)


@gluon.jit
def outgrown(top, m):
    """The same from the row maxima, (64,)."""
    grows = top - m > GROWTH  # -inf - -inf is NaN: a row without keys so far stays at -inf
    new = gl.where(grows, top, m)
    return new, gl.where(grows, exp2(m - new), 1.0)


@gluon.jit
def exponentials(s, m, scale, MASKED: gl.constexpr):
    """2^(scale s - m) as (64, keys). In a masked block a row may have no key yet: -inf - -inf must not be NaN."""
    shift = m
    if MASKED:
        shift = gl.where(m == float("-inf"), 0.0, m)
    return exp2(s * scale - shift[:, None])


@gluon.jit
def partial_sums(p):
    """(64, keys) -> (64, 8): sums within a thread."""
    return gl.sum(gl.reshape(p, [M, p.shape[1] // 8, 8]), axis=1)


@gluon.jit
def add_to_sums(l, alpha, sums):
    return l * gl.convert_layout(alpha, gl.SliceLayout(1, l.type.layout))[:, None] + sums


@gluon.constexpr_function
def _rescale_asm(n):
    """Multiply n accumulator registers by their rows' alpha, unless every row of the warp has alpha 1.

    Operands: n outputs, the n inputs tied to them, then alpha for each. wgmma holds two neighbours of one row, then two of
    the row 8 below, so alphas 0 and 2 are all there are.
    """
    first, second = f"${2 * n}", f"${2 * n + 2}"
    lines = [
        "{ .reg .pred same;",
        f"setp.eq.f32 same, {first}, 0f3F800000;",
        f"setp.eq.and.f32 same, {second}, 0f3F800000, same;",
        "vote.sync.all.pred same, same, 0xffffffff;",
        "@same bra DONE;",
    ]
    lines += [f"mul.f32 ${i}, ${i}, {second if i & 2 else first};" for i in range(n)]
    return "\n".join([*lines, "DONE: }"])


@gluon.constexpr_function
def _rescale_constraints(n):
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)


@gluon.jit
def rescale(o, alpha):
    """O (64, columns) times alpha a row, (64,), or as l is kept, (64, 8); a warp whose rows all keep their reference jumps over
    it."""
    columns: gl.constexpr = o.shape[1]
    registers: gl.constexpr = columns // 2
    asm: gl.constexpr = _rescale_asm(registers)
    constraints: gl.constexpr = _rescale_constraints(registers)
    if len(alpha.shape) == 1:
        factor = gl.convert_layout(alpha, row_layout(columns))[:, None]
        return gl.inline_asm_elementwise(asm, constraints, [o, factor], dtype=gl.float32, is_pure=False, pack=registers)
    else:
        groups = _in_groups(o)
        factor = gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, groups.type.layout)), 1)
        groups = gl.inline_asm_elementwise(asm, constraints, [groups, factor], dtype=gl.float32, is_pure=False, pack=registers)
        return gl.convert_layout(gl.reshape(groups, [M, columns]), o.type.layout, assert_trivial=True)


@gluon.constexpr_function
def _headroom(dtype):
    """How far, in powers of two, a tile's first P stay below 1. In bfloat16 "outgrown" is then "2 or more", one bit of each P;
    float16 has no exponents to spare for that."""
    return _GROWTH if dtype == gl.bfloat16 else 0.0


@gluon.constexpr_function
def _outgrown_asm(sums, word, compares):
    """Lines that set `kept` unless a thread's P may have outgrown their reference (or are infinite, or NaN): unless one of its
    four sums, of 16 P at most each, has reached 2 in bfloat16, 2^9 in float16. So all P that are kept are below that, and where
    they are not one is 2^-4 of it at least. In bfloat16 that is one bit of a sum; else the greatest is asked for, as numbers, in
    whose order NaN comes last. `compares`: each sum is compared by itself, which takes no register (NaN is below nothing)."""
    a, b, c, d = (f"${sums + i}" for i in range(4))
    if compares:
        most = 2.0 if word == "bf16x2" else 512.0
        return [f"setp.lt.f32 kept, {a}, {most};", *(f"setp.lt.and.f32 kept, {x}, {most}, kept;" for x in (b, c, d))]
    if word == "bf16x2":
        return [f"lop3.b32 t, {a}, {b}, {c}, 0xFE;", f"or.b32 t, t, {d};", "and.b32 t, t, 0x40000000;", "setp.eq.u32 kept, t, 0;"]
    return [f"max.u32 t, {a}, {b};", f"max.u32 t, t, {c};", f"max.u32 t, t, {d};", "setp.lt.u32 kept, t, 0x44000000;"]


@gluon.constexpr_function
def _row_maximum_asm(row):
    """The row's greatest score, from its four threads' own."""
    lines = [(f"shfl.sync.bfly.b32 x, {row}, {far}, 0x1f, 0xffffffff;", f"max.f32 {row}, {row}, x;") for far in (2, 1)]
    return [line for pair in lines for line in pair]


@gluon.constexpr_function
def _new_reference_asm(top, reference, alpha, growth):
    """The row's reference, and alpha (1 so far), where `top`, the greatest score in the reference's units, has outgrown it by
    `growth`."""
    return [
        f"sub.f32 x, {top}, {reference};",
        f"setp.gt.f32 grows, x, {growth};",
        "neg.f32 x, x;",
        f"@grows ex2.approx.ftz.f32 {alpha}, x;",
        f"@grows mov.f32 {reference}, {top};",
    ]


@gluon.constexpr_function
def _at_once_asm(n, word, headroom, compares):
    """Unless all P of the warp are kept: its rows' references, their alphas, P and the sums anew.

    Operands: n / 2 pairs of P, then n each of sums, reference and alpha out, but for the first four of each copies; the same in,
    without alpha, tied as far as they are read; n each of S and the scale. Rows lie as in `_rescale_asm`.
    """
    pairs = n // 2
    sums, m, alpha, s = pairs, pairs + n, pairs + 2 * n, 2 * pairs + 5 * n
    scale = s + n
    lines = [
        "{ .reg .pred kept, grows; .reg .b32 t; .reg .f32 a, b, x, row0, row1;",
        *_outgrown_asm(sums, word, compares),
        "vote.sync.all.pred kept, kept, 0xffffffff;",
        *(f"mov.f32 ${alpha + 2 * row}, 1.0;" for row in range(2)),
        "@kept bra DONE;",
    ]
    for row in range(2):
        top, old, factor = f"row{row}", f"${m + 2 * row}", f"${alpha + 2 * row}"
        own = [f"${s + i}" for i in range(n) if i // 2 % 2 == row]
        lines += [f"max.f32 {top}, {own[0]}, {own[1]};", *(f"max.f32 {top}, {top}, {score};" for score in own[2:])]
        lines += [*_row_maximum_asm(top), f"fma.rn.f32 {top}, {top}, ${scale}, {headroom};"]
        lines += [*_new_reference_asm(top, old, factor, _LEAST_GROWTH), f"neg.f32 {top}, {old};"]
    for i in range(pairs):
        for j, x in enumerate("ab"):
            total = f"${sums + 2 * (i % 2) + j}"
            lines += [
                f"fma.rn.f32 {x}, ${s + 2 * i + j}, ${scale}, row{i % 2};",
                f"ex2.approx.ftz.f32 {x}, {x};",
                f"mov.f32 {total}, {x};" if i < 2 else f"add.f32 {total}, {total}, {x};",
            ]
        lines.append(f"cvt.rn.{word}.f32 ${i}, b, a;")
    lines += ["DONE:", *(f"mov.f32 ${sums + i}, ${sums + i % 4};" for i in range(4, n))]
    lines += [f"mov.f32 ${x + i}, ${x + i % 4 // 2 * 2};" for x in (m, alpha) for i in range(n) if i not in (0, 2)]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _at_once_constraints(n):
    pairs = n // 2
    p = [str(i) for i in range(pairs)]
    sums = [str(pairs + i) if i < 4 else "f" for i in range(n)]
    m = [str(pairs + n + i) if i in (0, 2) else "f" for i in range(n)]
    return ",".join(["=r"] * pairs + ["=f"] * (3 * n) + p + sums + m + ["f"] * (2 * n))


@gluon.jit
def _any(a, b):
    return a


@gluon.jit
def _in_groups(s):
    return gl.reshape(s, [M, s.shape[1] // 8, 8])


@gluon.jit
def as_sums(x, keys: gl.constexpr):
    """(64, 8) as the sums of a block of so many keys lie; no register moves."""
    s = gl.zeros([M, keys], gl.float32, accumulator_layout(keys))
    layout: gl.constexpr = gl.SliceLayout(1, _in_groups(s).type.layout)
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def first_reference(s, scale, dtype: gl.constexpr):
    """The reference of a tile's first block, as l is kept: (64, 8), the same in all of a row's."""
    layout: gl.constexpr = gl.SliceLayout(1, _in_groups(s).type.layout)
    headroom: gl.constexpr = _headroom(dtype)
    top = gl.convert_layout(gl.max(s, axis=1) * scale + headroom, gl.SliceLayout(1, layout))
    return gl.maximum(top[:, None], gl.full([M, 8], LOWEST, gl.float32, layout))


@gluon.jit
def reference_of_rows(m, l):
    """(64,), -inf where a row had no key: from (64, 8) too, where P was taken at once."""
    if len(m.shape) == 2:
        m = gl.where(gl.sum(l, axis=1) == 0.0, float("-inf"), gl.max(m, axis=1))
    return m


@gluon.jit
def exponentials_at_once(s, m, scale, dtype: gl.constexpr):
    """P (64, keys) in 16 bits and its partial sums, about the reference (64, 8) as it stands. A row without keys so far has the
    lowest there is: its P are infinite, or 0 where the mask has S, so that -inf - -inf does not come up."""
    p = exp2(_in_groups(s) * scale - gl.expand_dims(m, 1))
    return to_16_bit(p, dtype), gl.sum(p, axis=1)


@gluon.jit
def overtake(p, sums, m, s, scale, COMPARES: gl.constexpr):
    """P (64, keys), its sums, the reference and alpha, from what `exponentials_at_once` gave: just that, and alpha 1, in warps
    where no row outgrew its reference, all of it anew in the others. What P held there does not matter. `COMPARES`: see
    `_outgrown_asm`."""
    keys: gl.constexpr = s.shape[1]
    registers: gl.constexpr = keys // 2
    headroom: gl.constexpr = _headroom(p.dtype)
    asm: gl.constexpr = _at_once_asm(registers, "bf16x2" if p.dtype == gl.bfloat16 else "f16x2", headroom, COMPARES)
    constraints: gl.constexpr = _at_once_constraints(registers)
    p, sums, m, alpha = gl.inline_asm_elementwise(
        asm, constraints, [p, gl.expand_dims(sums, 1), gl.expand_dims(m, 1), _in_groups(s), scale],
        dtype=(p.dtype, gl.float32, gl.float32, gl.float32), is_pure=False, pack=registers,
    )  # fmt: skip
    p = gl.convert_layout(gl.reshape(p, [M, keys]), s.type.layout, assert_trivial=True)
    return p, gl.reduce(sums, 1, _any), gl.reduce(m, 1, _any), gl.reduce(alpha, 1, _any)


@gluon.constexpr_function
def _boundary_asm(n):
    never = "0x7FC0DEAD"  # a NaN that no arithmetic makes
    lines = ["{ .reg .pred never;", f"WAIT: setp.eq.b32 never, ${n}, {never};"]
    lines += [f"setp.eq.or.b32 never, ${n + i}, {never}, never;" for i in range(1, n)]
    lines += ["vote.sync.any.pred never, never, 0xffffffff;", "@!never bra DONE;", "nanosleep.u32 64;", "bra WAIT;", "DONE:"]
    return "\n".join(lines + [f"mov.u32 ${i}, 0;" for i in range(n)] + ["}"])


@gluon.constexpr_function
def _boundary_constraints(n, dtype):
    return ",".join(["=r"] * n + ["f" if dtype == gl.float32 else "r"] * n)


@gluon.jit
def finish_before(x, n: gl.constexpr):
    """Everything that x, n registers a thread, depends on is computed before what follows.

    ptxas hoists `wgmma.wait_group` over the softmax, which then waits for P V first; the order of the instructions
    does not stop it, the end of a basic block does. So: a loop that is never taken, and that ptxas can't know is not.
    """
    asm: gl.constexpr = _boundary_asm(n)
    constraints: gl.constexpr = _boundary_constraints(n, x.dtype)
    gl.inline_asm_elementwise(asm, constraints, [x], dtype=gl.int32, is_pure=False, pack=n)


@gluon.constexpr_function
def _vote_asm():
    """Operands, each of 4 places, two in one row and two in the row 8 below: reference and alpha out; the greatest scores, the
    reference, tied, and the scale."""
    alpha, top, scale = 4, 8, "$16"
    lines = ["{ .reg .pred any, grows; .reg .f32 x, row0, row1;"]
    for row, also in ((0, ""), (1, ".or")):
        lines += [f"max.f32 row{row}, ${top + 2 * row}, ${top + 2 * row + 1};", f"neg.f32 x, ${2 * row};"]
        lines += [f"fma.rn.f32 x, row{row}, {scale}, x;", f"setp.gt{also}.f32 any, x, {_GROWTH}{', any' if also else ''};"]
        lines += [f"mov.f32 ${alpha + 2 * row}, 1.0;"]
    lines += ["vote.sync.any.pred any, any, 0xffffffff;", "@!any bra DONE;"]
    for row in range(2):
        lines += [*_row_maximum_asm(f"row{row}"), f"mul.f32 row{row}, row{row}, {scale};"]
        lines += _new_reference_asm(f"row{row}", f"${2 * row}", f"${alpha + 2 * row}", _GROWTH)
    lines += ["DONE:", *(f"mov.f32 ${x + 1}, ${x};" for x in (0, 2, alpha, alpha + 2))]
    return "\n".join([*lines, "}"])


_VOTE_CONSTRAINTS = gl.constexpr(",".join(["=&f"] * 8 + ["f"] * 4 + ["0", "f", "2", "f"] + ["f"] * 4))


@gluon.jit
def vote_on_maxima(s, m, scale):
    """`move_reference` for a reference as l is kept, (64, 8), LOWEST where a row has no key so far: a warp whose threads' own
    maxima have outgrown nothing keeps its references, and does not ask what the rows' maxima are."""
    asm: gl.constexpr = _vote_asm()
    tops = gl.max(_in_groups(s), axis=1)
    return gl.inline_asm_elementwise(
        asm, _VOTE_CONSTRAINTS, [tops, m, scale], dtype=(gl.float32, gl.float32), is_pure=False, pack=4
    )  # fmt: skip


@gluon.jit
def no_reference(keys: gl.constexpr):
    """The reference of rows without keys so far, as l is kept."""
    s = gl.zeros([M, keys], gl.float32, accumulator_layout(keys))
    return gl.full([M, 8], LOWEST, gl.float32, gl.SliceLayout(1, _in_groups(s).type.layout))


@gluon.jit
def exponentials_about(s, m, scale):
    """P (64, keys) and its partial sums about such a reference."""
    p = exp2(_in_groups(s) * scale - gl.expand_dims(m, 1))
    return gl.convert_layout(gl.reshape(p, s.shape), s.type.layout, assert_trivial=True), gl.sum(p, axis=1)
