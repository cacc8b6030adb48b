"""A copy whose load has a wish that Triton can't say."""

from tessera.jit.compat import gl, gluon, mbarrier, tma_load_as, tma_store, tma_store_wait


@gluon.jit
def hinted_copy(source, target, HOW: gl.constexpr):
    """Tile `program_id` of the target is that of the source."""
    tile = gl.allocate_shared_memory(source.dtype, source.block_type.shape, source.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    row = gl.program_id(0) * source.block_type.shape[0]
    mbarrier.expect(ready, source.block_type.nbytes)
    tma_load_as(HOW, source, [row, 0], ready, tile)
    mbarrier.wait(ready, 0)
    tma_store(target, [row, 0], tile)
    tma_store_wait(0)
