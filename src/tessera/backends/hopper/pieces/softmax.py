"""The online softmax of one warpgroup, in base 2.

State of a row: `m`, the reference that is subtracted (log2 units, scale folded in), and `l`, the sum of the
exponentials so far, kept as eight partial sums a row until the end so that no shuffle runs in the main loop.

The reference follows the row's maximum only where the maximum has outgrown it by more than 2^8 (the lazy rescaling of
FlashAttention-4, arXiv 2603.05451): P then stays below 2^8, which 16-bit floats hold as exactly as 1, the sums have room
in float32, and out = O / l is the same number. What it buys: O, which is as large as the tile allows, is multiplied once
or twice a tile instead of once a block.
"""

from tessera.backends.hopper.pieces.tiles import M, row_layout
from tessera.jit.compat import gl, gluon

GROWTH = gl.constexpr(8.0)
"""How far, in powers of two, a maximum may outgrow the reference before the reference moves."""


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
    """O (64, columns) times alpha a row; a warp whose rows all keep their reference jumps over it."""
    columns: gl.constexpr = o.shape[1]
    registers: gl.constexpr = columns // 2
    factor = gl.convert_layout(alpha, row_layout(columns))[:, None]
    asm: gl.constexpr = _rescale_asm(registers)
    constraints: gl.constexpr = _rescale_constraints(registers)
    return gl.inline_asm_elementwise(asm, constraints, [o, factor], dtype=gl.float32, is_pure=False, pack=registers)


@gluon.constexpr_function
def _anew_asm(n, pair):
    """P and its sums of a warp's n scores a thread, unless every row of the warp has alpha 1.

    Operands: n / 2 pairs of P and n sums out, all but the first four of them copies; the pairs and sums as they are in, the
    first four tied; n each of S, the reference, alpha and the scale. Rows lie as in `_rescale_asm`.
    """
    sums, s = n // 2, 2 * (n // 2 + n)
    shift, alpha, scale = s + n, s + 2 * n, s + 3 * n
    lines = [
        "{ .reg .pred same; .reg .f32 a, b, low, high;",
        f"setp.eq.f32 same, ${alpha}, 0f3F800000;",
        f"setp.eq.and.f32 same, ${alpha + 2}, 0f3F800000, same;",
        "vote.sync.all.pred same, same, 0xffffffff;",
        "@same bra DONE;",
        f"neg.f32 low, ${shift};",
        f"neg.f32 high, ${shift + 2};",
    ]
    for i in range(n // 2):
        for j, x in enumerate("ab"):
            total = f"${sums + 2 * (i % 2) + j}"
            lines += [
                f"fma.rn.f32 {x}, ${s + 2 * i + j}, ${scale}, {'high' if i % 2 else 'low'};",
                f"ex2.approx.ftz.f32 {x}, {x};",
                f"mov.f32 {total}, {x};" if i < 2 else f"add.f32 {total}, {total}, {x};",
            ]
        lines.append(f"cvt.rn.{pair}.f32 ${i}, b, a;")
    return "\n".join([*lines, "DONE:", *(f"mov.f32 ${sums + i}, ${sums + i % 4};" for i in range(4, n)), "}"])


@gluon.constexpr_function
def _anew_constraints(n):
    return ",".join(["=r"] * (n // 2) + ["=f"] * n + [str(i) for i in range(n // 2 + 4)] + ["f"] * (5 * n - 4))


@gluon.jit
def _any(a, b):
    return a


@gluon.jit
def anew_where_moved(p, sums, s, m, alpha, scale):
    """P (64, keys) in 16 bits and its partial sums, taken of S about an earlier reference: about m instead in warps where alpha
    says that a row's has moved. What P held there does not matter; the others jump over it."""
    keys: gl.constexpr = s.shape[1]
    registers: gl.constexpr = keys // 2
    grouped = gl.reshape(s, [M, keys // 8, 8])
    layout: gl.constexpr = grouped.type.layout
    rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
    asm: gl.constexpr = _anew_asm(registers, "bf16x2" if p.dtype == gl.bfloat16 else "f16x2")
    constraints: gl.constexpr = _anew_constraints(registers)
    anew, copies = gl.inline_asm_elementwise(
        asm, constraints,
        [
            gl.reshape(p, [M, keys // 8, 8]), gl.expand_dims(sums, 1), grouped,
            gl.convert_layout(m, rows)[:, None, None], gl.convert_layout(alpha, rows)[:, None, None], scale,
        ],
        dtype=(p.dtype, gl.float32), is_pure=False, pack=registers,
    )  # fmt: skip
    return gl.convert_layout(gl.reshape(anew, [M, keys]), p.type.layout, assert_trivial=True), gl.reduce(copies, 1, _any)


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
