"""A kernel with two barriers, of which it uses one."""

from tessera.jit.compat import gl, gluon, mbarrier


@gluon.jit
def forgetful(out_ptr):
    """out[program] = 1."""
    used = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    forgotten = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(used, count=1)
    mbarrier.init(forgotten.index(0), count=1)
    mbarrier.init(forgotten.index(1), count=1)
    mbarrier.arrive(used)
    mbarrier.wait(used, 0)
    gl.store(out_ptr + gl.program_id(0), 1)
