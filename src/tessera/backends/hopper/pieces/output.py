"""The end of a consumer's tile in the forward: lse and the factor of O; and out by way of a buffer of its own, of half a one, or
of its Q's place."""

from tessera.backends.hopper.pieces.epilogue import LOG2_E, normalise, normaliser
from tessera.backends.hopper.pieces.kv_source import store_rows
from tessera.backends.hopper.pieces.softmax import reference_of_rows
from tessera.backends.hopper.pieces.tiles import (
    M,
    columns_of,
    halves_of_all,
    has,
    has_bias,
    matrix,
    row_layout,
    stages_halves,
    stages_in_query,
)
from tessera.jit.compat import fence_async_shared, gl, gluon, tma_store_wait


@gluon.jit
def finish_rows(me, tile, row, m, l, lse_ptr):
    """Write the log-sum-exp, (batch, heads, seqlen_q), or (heads, total_q) packed, where it has an address; the factor that
    makes O out."""
    layout: gl.constexpr = row_layout(columns_of(me.shared.v[0].shape))
    rows = row + gl.arange(0, M, layout)
    m = gl.convert_layout(reference_of_rows(m, l), layout)
    l = gl.convert_layout(gl.sum(l, axis=1), layout)
    sink = gl.zeros([M], gl.float32, layout)
    if has(me.config, "sinks"):
        sink = sink + gl.load(me.score.sinks + tile.head)
        if not has_bias(me.config):
            sink = sink * LOG2_E
    factor, lse = normaliser(me.config, m, l, sink, rows < tile.seq.q_live)
    line = (tile.seq.batch * me.call.heads + tile.head).to(gl.int64) * me.call.seqlen_q
    asked_for = lse_ptr.to(gl.int64) != 0
    gl.store(lse_ptr + line + tile.seq.q_begin + rows, lse, mask=(rows < tile.seq.q_rows) & asked_for)
    if has(me.config, "dropout"):
        factor = factor * me.score.modifiers.dropout[0].keep_scale
    return factor


@gluon.jit
def q_slot(me, use):
    if me.config.queries == 1:
        return me.index
    else:
        return me.shared.q_ring.slot(use)


@gluon.jit
def free_place(me, turn):
    """Where out waits in its Q's place: the one of the turn before is free when the store has read it, which it has by now."""
    if stages_in_query(me.config) and turn > 0:
        tma_store_wait(0)
        me.shared.q_ring.release((turn - 1) * me.config.consumers + me.index)


@gluon.jit
def _outputs(me, tile, row, o, factor):
    """out = O / l in 16 bits, a part of head_dim_v each."""
    parts = ()
    for part in gl.static_range(len(o)):
        out = normalise(me.config, o[part], factor, row, tile.seq.q_live)
        parts = parts + (out.to(me.shared.o[part].dtype),)
    return parts


@gluon.jit
def _send(me, tile, row, parts, o_maps, place, HALF: gl.constexpr = None):
    """Parts of out, or their left or right halves (0, 1), through shared memory, and TMA on its way with them."""
    if not stages_in_query(me.config):
        tma_store_wait(0)  # the last store has left the buffer
    for part in gl.static_range(len(parts)):
        matrix(me.shared.o[part].index(place)).store(parts[part])
    fence_async_shared()
    store_rows(o_maps, me.shared.o, place, tile.seq.queries(me.call.pitch.o), tile.head, row, HALF)


@gluon.jit
def write_output(me, tile, row, o, factor, o_maps, q_use):
    parts = _outputs(me, tile, row, o, factor)
    place = me.index
    if stages_in_query(me.config):
        place = q_slot(me, q_use)
    if stages_halves(me.config):
        left, right = halves_of_all(parts)
        _send(me, tile, row, left, o_maps, place, 0)
        _send(me, tile, row, right, o_maps, place, 1)
    else:
        _send(me, tile, row, parts, o_maps, place)
