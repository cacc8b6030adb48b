"""A kernel that tells the size of its cluster."""

from tessera.jit.compat import gl, gluon


@gluon.jit
def cluster_size(out_ptr):
    """out[program] = how many are in its cluster."""
    size = gl.inline_asm_elementwise("mov.u32 $0, %cluster_nctaid.x;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)
    gl.store(out_ptr + gl.program_id(0), size)
