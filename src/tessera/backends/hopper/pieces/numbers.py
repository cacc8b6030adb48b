"""Numbers of int32 in shared memory that a producer warp posts and consumer warpgroups read, and numbers that are the same in all
threads of a warp."""

from tessera.jit.compat import MERGES_BY_SELECTS, gl, gluon


@gluon.jit
def of_first_lane(value):
    """Lane 0's value in every thread of a warp (shuffled: the compiler then knows it for a scalar)."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def carried_number(value):
    """A number that goes from tile to tile, the same in all threads of a warp. Where a tile may leave it as it is, Triton 3.9's
    LLVM picks it by a select, and ptxas then takes it for each thread's own: 38 to 97 R2UR in a loop of products (3.6: none)."""
    if MERGES_BY_SELECTS:
        return of_first_lane(value)
    return value


@gluon.jit
def make_numbers(count: gl.constexpr):
    return gl.allocate_shared_memory(gl.int32, [count, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def write_number(numbers, place, value):
    """Producer, one warp."""
    zero = gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    numbers.index(place).store(zero + value)


@gluon.jit
def read_number(numbers, place):
    """Consumer, a warp or more: one number, the same in every thread."""
    posted = numbers.index(place).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    return of_first_lane(gl.max(posted, axis=0))
