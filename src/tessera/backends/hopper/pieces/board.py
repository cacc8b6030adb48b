"""The board: the producer writes there which tile is next, and where it lies.

To locate a tile takes divisions, and in a packed batch a search through cu_seqlens. The producer has time for that; between
two tiles of a consumer it stands in the way of the next tile's first product, as would the rounds that make dropout's words of a
head: with these here, and half a first block, d64 causal under dropout went from 1.36 to 1.29 of none (H200, 2026-11-22).
"""

from tessera.backends.hopper.pieces.channel import Ring, make_ring
from tessera.backends.hopper.pieces.dropout import WORD, head_words
from tessera.backends.hopper.pieces.kv_source import Sequence, dense_sequence
from tessera.backends.hopper.pieces.numbers import make_numbers, read_number, write_number
from tessera.backends.hopper.pieces.scheduler import Tile
from tessera.backends.hopper.pieces.tiles import has, keeps_masks
from tessera.jit.compat import aggregate, gl, gluon

FIELDS = gl.constexpr(13)
TURNS = gl.constexpr(2)


@aggregate
class Board:
    """Two entries of int32, so that the next tile can be posted before every consumer has read this one."""

    entries: gl.shared_memory_descriptor
    ring: Ring


@gluon.jit
def make_board(readers: gl.constexpr):
    fields: gl.constexpr = TURNS * FIELDS
    return Board(make_numbers(fields), make_ring(TURNS, readers))


@gluon.jit
def post(config: gl.constexpr, board, turn, number, tile, modifiers):
    """Producer: tile `number` is the consumers' `turn`-th."""
    words = (number, number)
    if has(config, "dropout"):
        words = head_words(modifiers.dropout[0], tile.seq.number.to(gl.uint32), tile.head.to(gl.uint32))
    board.ring.acquire(turn)
    place = board.ring.slot(turn) * FIELDS
    write_number(board.entries, place, number)
    write_number(board.entries, place + 1, tile.head)
    write_number(board.entries, place + 2, tile.first)
    write_number(board.entries, place + 3, tile.rows)
    seq = tile.seq
    if has(config, "varlen"):
        write_number(board.entries, place + 4, seq.q_begin)
        write_number(board.entries, place + 5, seq.q_rows)
        write_number(board.entries, place + 6, seq.q_live)
        write_number(board.entries, place + 7, seq.k_begin)
        write_number(board.entries, place + 8, seq.k_rows)
        write_number(board.entries, place + 9, seq.diagonal)
        write_number(board.entries, place + 10, seq.number)
    else:
        write_number(board.entries, place + 4, seq.batch)
    if keeps_masks(config):
        write_number(board.entries, place + 5, tile.whole[0])
    if has(config, "dropout"):
        for i in gl.static_range(2):
            write_number(board.entries, place + 11 + i, words[i].to(gl.int32))
    board.ring.publish(turn)


@gluon.jit
def _words(config: gl.constexpr, board, place):
    if has(config, "dropout"):
        first = read_number(board.entries, place + 11).to(gl.uint32) & WORD
        return first, read_number(board.entries, place + 12).to(gl.uint32) & WORD
    else:
        return ()


@gluon.jit
def read(config: gl.constexpr, board, call, turn):
    """Consumer: the number of its `turn`-th tile (>= tiles: none is left), and the tile."""
    board.ring.wait(turn)
    place = board.ring.slot(turn) * FIELDS
    number = read_number(board.entries, place)
    head = read_number(board.entries, place + 1)
    first = read_number(board.entries, place + 2)
    rows = read_number(board.entries, place + 3)
    if has(config, "varlen"):
        q_begin = read_number(board.entries, place + 4)
        q_rows = read_number(board.entries, place + 5)
        q_live = read_number(board.entries, place + 6)
        k_begin = read_number(board.entries, place + 7)
        k_rows = read_number(board.entries, place + 8)
        diagonal = read_number(board.entries, place + 9)
        index = read_number(board.entries, place + 10)
        seq = Sequence(index * 0, q_begin, q_rows, q_live, k_begin, k_rows, diagonal, index)
    else:
        seq = dense_sequence(config, call.lengths, read_number(board.entries, place + 4), call.seqlen_q, call.seqlen_k)
    words = _words(config, board, place)
    whole = ()
    if keeps_masks(config):
        whole = (read_number(board.entries, place + 5),)
    board.ring.release(turn)
    return number, Tile(seq, head, first, rows, words, whole)
