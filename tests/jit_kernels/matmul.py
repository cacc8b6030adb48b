"""C = scale * A B^T with TMA loads, wgmma and a TMA store: every kind of argument that the launcher knows, in one kernel."""

from jit_kernels.pieces import as_output
from tessera.jit.compat import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def matmul(
    a, b, c, marks_ptr, scale, depth, mark,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """One (M, N) tile of C a program; A (rows, depth), B (columns, depth), C (rows, columns). marks[program] = mark."""
    row, column = gl.program_id(0) * M, gl.program_id(1) * N
    a_smem = gl.allocate_shared_memory(DTYPE, a.block_type.shape, a.layout)
    b_smem = gl.allocate_shared_memory(DTYPE, b.block_type.shape, b.layout)
    c_smem = gl.allocate_shared_memory(DTYPE, c.block_type.shape, c.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    fence_async_shared()
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    acc = gl.zeros([M, N], gl.float32, layout)
    phase = 0
    for k in range(0, depth, K):
        mbarrier.expect(ready, a.block_type.nbytes + b.block_type.nbytes)
        tma_load(a, [row, k], ready, a_smem)
        tma_load(b, [column, k], ready, b_smem)
        mbarrier.wait(ready, phase)
        phase ^= 1
        acc = warpgroup_mma(a_smem, b_smem.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
    c_smem.store(as_output(acc, scale, DTYPE))
    fence_async_shared()
    tma_store(c, [row, column], c_smem)
    program = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
    gl.store(marks_ptr + program, mark)
    tma_store_wait(0)
