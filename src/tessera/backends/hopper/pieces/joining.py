"""Two programs of a cluster that go through a half of a tile's keys each, and put their sums together.

Program i keeps the rows of its consumer i, and gives the other those of its other consumer: normalised, in float32, with their
log-sum-exps, through memory (L2), then a word to the other's mbarrier. So each writes and reads half a tile, and a launch of
combine.py, which would read two and begin after the last program's end, is not needed.

Where a tile has keys for one program alone, that keeps all rows. Each program waits for the one word that is sent to it, so none
ends while the other still reaches for it.
"""

from tessera.backends.hopper.pieces.channel import make_cluster_barriers
from tessera.backends.hopper.pieces.epilogue import LN_2, LOG2_E, log2
from tessera.backends.hopper.pieces.packed_rows import Outcome, is_joined, load_lse, load_out, store_lse, store_out
from tessera.backends.hopper.pieces.softmax import exp2
from tessera.backends.hopper.pieces.tiles import row_layout
from tessera.jit.compat import aggregate, arrive_after_writes, await_writes, gl, gluon, place_in

_WARPS = gl.constexpr(4)
"""Of a consumer: each says for itself that its rows are written."""


@aggregate
class Meeting:
    """`given`: where rows are left for the other program; `told`: this one's mbarrier, `place` the other's in the cluster."""

    given: Outcome
    told: gl.shared_memory_descriptor
    place: gl.tensor


@gluon.jit
def make_meeting(config: gl.constexpr, given):
    """A tuple of one; empty for a program by itself. Before the warps specialise, and before the cluster meets."""
    if is_joined(config):
        told, address = make_cluster_barriers(1, _WARPS)
        place = gl.where(gl.program_id(0) % 2 == 0, place_in(1, address), place_in(0, address))
        return (Meeting(given, told, place),)
    else:
        return ()


@gluon.jit
def _share(lse, top):
    """exp(lse - top), 0 where there are no keys."""
    return gl.where(lse == float("-inf"), 0.0, exp2((lse - top) * LOG2_E))


@gluon.jit
def store_rows(me, tile, unit, o, factor, outcome):
    """O times the factor of each row."""
    config: gl.constexpr = me.config
    for part in gl.static_range(len(o)):
        out = o[part] * gl.convert_layout(factor, row_layout(o[part].shape[1]))[:, None]
        store_out(config, me.call, tile, unit, outcome, out, config.parts_v.columns[part])


@gluon.jit
def _give(me, tile, unit, o, factor, lse, meeting):
    store_rows(me, tile, unit, o, factor, meeting.given)
    store_lse(me.config, me.call, tile, unit, meeting.given, lse)
    arrive_after_writes(meeting.place)


@gluon.jit
def _keep(me, tile, unit, o, factor, lse, meeting, outcome):
    config: gl.constexpr = me.config
    both = tile.parts > 1
    if both:
        await_writes(meeting.told.index(0))
    rows: gl.constexpr = lse.type.layout
    theirs = load_lse(config, me.call, tile, unit, meeting.given, both, rows)
    top = gl.maximum(lse, theirs)
    own, other = _share(lse, top), _share(theirs, top)
    total = own + other
    seen = total > 0.0
    store_lse(config, me.call, tile, unit, outcome, gl.where(seen, log2(total) * LN_2 + top, float("-inf")))
    factor = gl.where(seen, factor * own / total, 0.0)
    other = gl.where(seen, other / total, 0.0)
    for part in gl.static_range(len(o)):
        layout: gl.constexpr = row_layout(o[part].shape[1])
        column: gl.constexpr = config.parts_v.columns[part]
        given = load_out(config, me.call, tile, unit, meeting.given, both, column, o[part])
        out = o[part] * gl.convert_layout(factor, layout)[:, None] + given * gl.convert_layout(other, layout)[:, None]
        store_out(config, me.call, tile, unit, outcome, out, column)


@gluon.jit
def join(me, tile, unit, o, factor, lse, meeting, outcome):
    """A consumer's 64 rows, summed over this program's keys, of which there are some: O, its normaliser, the log-sum-exp."""
    if (tile.parts > 1) & (tile.split != me.index):
        _give(me, tile, unit, o, factor, lse, meeting)
    else:
        _keep(me, tile, unit, o, factor, lse, meeting, outcome)
