"""A piece of the matmul kernel in another file, as real kernels have."""

from tessera.jit.compat import gl, gluon


@gluon.jit
def as_output(acc, scale, DTYPE: gl.constexpr):
    """The accumulator, scaled, in the output's type."""
    return (acc * scale).to(DTYPE)
