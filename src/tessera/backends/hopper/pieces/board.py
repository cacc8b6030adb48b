"""The board: the producer writes there which tile is next, and where it lies.

To locate a tile takes divisions, and in a packed batch a search through cu_seqlens. The producer has time for that; between
two tiles of a consumer it stands in the way of the next tile's first product.
"""

from tessera.backends.hopper.pieces.channel import Ring, make_ring
from tessera.backends.hopper.pieces.kv_source import Sequence, dense_sequence
from tessera.backends.hopper.pieces.scheduler import Tile
from tessera.backends.hopper.pieces.tiles import has
from tessera.jit.compat import aggregate, gl, gluon

FIELDS = gl.constexpr(11)
TURNS = gl.constexpr(2)


@aggregate
class Board:
    """Two entries of int32, so that the next tile can be posted before every consumer has read this one."""

    entries: gl.shared_memory_descriptor
    ring: Ring

    @gluon.constexpr_function
    def __init__(self, entries, ring):
        self.entries = entries
        self.ring = ring


@gluon.jit
def make_board(readers: gl.constexpr):
    fields: gl.constexpr = TURNS * FIELDS
    entries = gl.allocate_shared_memory(gl.int32, [fields, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return Board(entries, make_ring(TURNS, readers))


@gluon.jit
def _write(board, place, value):
    zero = gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    board.entries.index(place).store(zero + value)


@gluon.jit
def post(config: gl.constexpr, board, turn, number, tile):
    """Producer: tile `number` is the consumers' `turn`-th."""
    board.ring.acquire(turn)
    place = board.ring.slot(turn) * FIELDS
    _write(board, place, number)
    _write(board, place + 1, tile.head)
    _write(board, place + 2, tile.first)
    _write(board, place + 3, tile.rows)
    seq = tile.seq
    if has(config, "varlen"):
        _write(board, place + 4, seq.q_begin)
        _write(board, place + 5, seq.q_rows)
        _write(board, place + 6, seq.q_live)
        _write(board, place + 7, seq.k_begin)
        _write(board, place + 8, seq.k_rows)
        _write(board, place + 9, seq.diagonal)
        _write(board, place + 10, seq.number)
    else:
        _write(board, place + 4, seq.batch)
    board.ring.publish(turn)


@gluon.jit
def _entry(board, place):
    """One number, the same in every thread (shuffled so that the compiler knows it for a scalar)."""
    posted = board.entries.index(place).load(gl.BlockedLayout([1], [32], [4], [0]))
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [gl.max(posted, axis=0)], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def read(config: gl.constexpr, board, call, turn):
    """Consumer: the number of its `turn`-th tile (>= tiles: none is left), and the tile."""
    board.ring.wait(turn)
    place = board.ring.slot(turn) * FIELDS
    number = _entry(board, place)
    head = _entry(board, place + 1)
    first = _entry(board, place + 2)
    rows = _entry(board, place + 3)
    if has(config, "varlen"):
        q_begin = _entry(board, place + 4)
        q_rows = _entry(board, place + 5)
        q_live = _entry(board, place + 6)
        k_begin = _entry(board, place + 7)
        k_rows = _entry(board, place + 8)
        diagonal = _entry(board, place + 9)
        index = _entry(board, place + 10)
        seq = Sequence(index * 0, q_begin, q_rows, q_live, k_begin, k_rows, diagonal, index)
    else:
        seq = dense_sequence(config, call.lengths, _entry(board, place + 4), call.seqlen_q, call.seqlen_k)
    board.ring.release(turn)
    return number, Tile(seq, head, first, rows)
