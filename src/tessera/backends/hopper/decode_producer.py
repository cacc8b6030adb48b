"""The producer warp of decode.py: K and V of a program's share, tile by tile, into the ring.

A launch may begin while the kernel before it ends, whose last microseconds leave memory idle. So lengths and pages are read as
they stand then, and the first tiles by them are brought into L2. Lengths, pages and rows may all still change: once the kernel
before has ended everything is read again, and L2 has what memory has. Lengths that are what they were then need no more work
(pieces/shares.py, `confirmed`).
"""

from tessera.backends.hopper.decode_config import PARTING
from tessera.backends.hopper.pieces.cached import cache_entry, foresee_box, load_box, locate_box
from tessera.backends.hopper.pieces.shares import after, confirmed, expected, first_share, first_turn, segment_of
from tessera.backends.hopper.pieces.tiles import has, head_bytes
from tessera.jit.compat import gl, gluon, let_next_begin, wait_for_previous

PARTED = gl.constexpr(PARTING)
LOADS_TOGETHER = gl.constexpr(8)
"""Boxes whose page numbers are read side by side."""


@gluon.constexpr_function
def producer_registers(config):
    """Page numbers are held while their boxes are copied."""
    return 56 if config.box < config.keys else 40


@gluon.jit
def next_use(config: gl.constexpr, n, depth):
    """The use of the ring after the n-th, where only the first `depth` slots of each lap are used."""
    n += 1
    return n + gl.where(n % config.stages == depth, config.stages - depth, 0)


@gluon.jit
def _locate_boxes(config: gl.constexpr, call, segment, entry, tile, first: gl.constexpr):
    """Where a few boxes of a tile lie, from number `first` on."""
    places = ()
    for box in gl.static_range(min(config.keys // config.box, LOADS_TOGETHER)):
        key = tile * config.keys + (first + box) * config.box
        places = places + (locate_box(config, call.places, call.sizes, segment.seq, entry, key),)
    return places


@gluon.jit
def _load_tile(config: gl.constexpr, k_maps, v_maps, shared, call, segment, entry, spot):
    """Start the copies of tile `spot[1]` as the n-th use of the ring, n = `spot[0]`."""
    n, tile = spot
    boxes: gl.constexpr = config.keys // config.box
    group: gl.constexpr = min(boxes, LOADS_TOGETHER)
    slot = shared.v_stream.slot(n)
    places = _locate_boxes(config, call, segment, entry, tile, 0)  # page numbers come while the slot is waited for
    if has(config, "early"):
        shared.k_stream.acquire(n)
    else:
        shared.v_stream.acquire(n)
    k_bar = shared.k_stream.expect(n, head_bytes(config.dims) * config.keys)
    v_bar = shared.v_stream.full.index(slot)
    for first in gl.static_range(0, boxes, group):
        if first > 0:
            places = _locate_boxes(config, call, segment, entry, tile, first)
        for box in gl.static_range(group):
            load_box(k_maps, shared.k, places[box], segment.head, k_bar, slot * boxes + first + box)
        if first == 0:
            if has(config, "early"):
                shared.v_stream.acquire(n)
            shared.v_stream.expect(n, head_bytes(config.dims_v) * config.keys)
        for box in gl.static_range(group):
            load_box(v_maps, shared.v, places[box], segment.head, v_bar, slot * boxes + first + box)


@gluon.constexpr_function
def _expects(config):
    """Whether lengths are expected (pieces/shares). Not where a tile has many boxes: what is expected stays in registers, and
    the boxes' page numbers would leave the uniform ones, an instruction for each (16 x 8k in pages of 8 0.994 of the speed)."""
    return config.keys // config.box <= LOADS_TOGETHER.value


@gluon.jit
def _first_work(config: gl.constexpr, call, turn, expectation):
    """The share and its first segment, by lengths as they stand."""
    if _expects(config):
        share, segment = confirmed(config, call, turn, expectation, 1)
    else:
        share = first_share(config, call, turn, 1)
        segment = segment_of(config, call, share)
    return share, segment


@gluon.jit
def _foresee(config: gl.constexpr, k_maps, v_maps, shared, call, turn, expectation):
    """This program's first tiles, as far as can be told before the kernel before this one has ended, into L2."""
    share, segment = _first_work(config, call, turn, expectation)
    ahead = call.split.ahead
    if has(config, "stream_k"):
        ahead = gl.where(share.turn < 0, call.split.line_ahead, ahead)
    count = gl.where(share.position < share.stop, ahead, 0)
    begin = gl.maximum(segment.begin, 0)  # what lengths say before they are written can be anything
    entry = cache_entry(config, call.places, segment.seq.index)
    k_bar = shared.k_stream.full.index(0)
    v_bar = shared.v_stream.full.index(0)
    for tile in range(begin, gl.minimum(begin + count, segment.end)):
        for box in range(config.keys // config.box):
            place = locate_box(config, call.places, call.sizes, segment.seq, entry, tile * config.keys + box * config.box)
            foresee_box(k_maps, shared.k, place, segment.head, k_bar)
            foresee_box(v_maps, shared.v, place, segment.head, v_bar)


@gluon.jit
def producer(config: gl.constexpr, k_maps, v_maps, shared, call):
    turn = first_turn(config, call)
    expectation = ()
    if _expects(config):
        expectation = expected(config, call, turn)
    _foresee(config, k_maps, v_maps, shared, call, turn, expectation)
    wait_for_previous()
    n = 0
    share, segment = _first_work(config, call, turn, expectation)
    while share.position < share.stop:
        if not _expects(config):
            segment = segment_of(config, call, share)
        entry = cache_entry(config, call.places, segment.seq.index)
        for tile in range(segment.begin, segment.end):
            if has(config, "parting"):
                left = gl.where(share.turn < 0, 0, PARTED)  # along the line of all tiles this may be no last item
                if tile == segment.end - left:
                    let_next_begin()
            _load_tile(config, k_maps, v_maps, shared, call, segment, entry, (n, tile))
            n = next_use(config, n, share.depth)
        share = after(config, call, share, segment)
        if has(config, "stream_k") and _expects(config):
            more = share.position < share.stop
            if more:
                segment = segment_of(config, call, share)
    let_next_begin()
