"""Dropout's mask: a function of (seed, batch, head, row, column) alone, so every backend and tile size draws the same.

Every row and every column of a head has a key, and what a draw is made of is a mixture of the two. Keys come from a head's
words, which Philox4x32 with 7 rounds makes under the 64-bit seed (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011: the fewest rounds that pass BigCrush). Rows of one remainder by 8 share a key in a group of 64; in a group of 128
columns two neighbours and those 16, 32 and so on further do. The 8 x 16 scores where such lines meet are 64 words of two draws,
each a linear function of the mixture by a multiplier of its own. A word's halves are two neighbours in a row, which a thread of a
Hopper warpgroup holds in S's accumulator as P packs them. It so needs two mixtures a block, and then one instruction a word.

    h, g           = the first two words of philox((head, batch, 0, 0), key=seed)
    key of a row   = k(h + C n), n = i // 64 * 4 + i % 8 // 2, xor a constant if i is odd
    of a column    = k(g + C n), n = j // 128 * 4 + j % 8 // 2, xor another if j // 8 is odd
    k(n)           = (n ^ n >> 16) C'
    x              = (row key ^ column key) M
    word           = (x ^ x >> 16) A B + x, with an odd A for each i // 8 % 8, a product of three by its bits, and so B for
                     each j // 16 % 8
    draw           = bits 14 to 7 of its half j % 2, 16 bits
    kept           = draw >= threshold, threshold = round(256 p); above 128 it is draw < 256 - threshold

All products are of 32 bits: beside the tensor cores' work a product of 64 holds up a warp for 10 to 45 cycles (H200, 2026-11-21).

What that is worth: x is uniform if a head's word is, and so are draws of it, and any two of them are independent (to what can be
counted). Any draws whose keys close no cycle of rows and columns are independent as far as keys are random: this is tabulation
hashing, which is 3-independent (Patrascu and Thorup, "The power of simple tabulation hashing", STOC 2011). What is left to the
mixture are rectangles, and the 128 draws of one mixture: half of these are linear in 15 bits, so among three or four of them some
depend on one another. The multipliers are the best of some thousand for those at a rectangle's corners, which decide how far two
rows, or two columns, correlate: tests/cpu/test_dropout.py looks at these (with others, or without the shift, it fails).

A draw has 8 bits, as in FlashAttention-2: p is thereby rounded to a multiple of 1/256, and the kept probabilities are scaled by
the exact 256 / (256 - threshold), so that expectations are. A p that rounds to 0 or to 1 is refused in words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.errors import bad_type, bad_value

ROUNDS = 7
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
KEY_MULTIPLIERS = (0x85EBCA6B, 0xC2B2AE35)
MIXING_MULTIPLIER = 0xD256D193
WORD_MULTIPLIER = 0x610FCADF
ROW_FACTORS = (0xDF72B7EB, 0x77E90B5F, 0x6D24A0E5)
COLUMN_FACTORS = (0xB2BE0D71, 0x6025A7C3, 0x47BA8F27)
MIXING_SHIFT = 16
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
DRAWS = 1 << 8
"""How many values a draw has."""
ROWS, COLUMNS = 64, 128
"""Lines that have keys in common."""
ODD_COLUMN, ODD_ROW = 0x243F6A88, 0x85A308D3
"""By which the keys of odd rows, and of columns in every other eight, differ from those before them: the digits of pi."""


def threshold(dropout_p: float) -> int:
    """The draws below this are dropped."""
    return round(dropout_p * DRAWS)


def is_kept(draws: Tensor, dropout_p: float) -> Tensor:
    """Of draws: 256 - threshold of 256."""
    least = threshold(dropout_p)
    return draws >= least if least <= DRAWS // 2 else draws < DRAWS - least


def check_seed(seed: int) -> None:
    """A seed of 63 bits."""
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise bad_type("seed", type(seed).__name__, "it keys a counter-based generator", "give an int")
    if not 0 <= seed < 1 << 63:
        raise bad_value("seed", seed, "Philox is keyed by 63 bits here", "use 0 <= seed < 2**63")


def drawn_seed() -> int:
    """A seed by torch's default generator: for calls by the signatures of others, which have none."""
    return int(torch.randint(2**62, (), device="cpu"))


def check_probability(dropout_p: float) -> None:
    """A probability that a byte can draw, or 0."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise bad_type("dropout_p", type(dropout_p).__name__, "it is one number for the whole call", "give a Python float")
    if not 0 <= dropout_p < 1:
        raise bad_value("dropout_p", dropout_p, "it is a probability below 1", "use 0 <= dropout_p < 1")
    if dropout_p and threshold(dropout_p) in (0, DRAWS):
        nearest = min(max(threshold(dropout_p), 1), DRAWS - 1) / DRAWS
        why = f"draws have 8 bits, and {DRAWS} times it rounds to {threshold(dropout_p)}"
        instead = f"use 0, or {1 / DRAWS:.6g} to {1 - 1 / DRAWS:.6g}; the nearest is {nearest:.6g}"
        raise bad_value("dropout_p", dropout_p, why, instead)


def keep_scale(dropout_p: float) -> float:
    """What a kept probability is multiplied by: 1 / (1 - p) for the p that the threshold stands for."""
    return DRAWS / (DRAWS - threshold(dropout_p))


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-7 on broadcastable int64 tensors that hold 32-bit words; returns four such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        # the products wrap in int64; the shift is arithmetic, the mask makes the high word right all the same
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def mixture(row: Tensor, column: Tensor, multiplier: Tensor) -> Tensor:
    """A word from a row's and a column's key (broadcastable, as in `philox`) and its place's multiplier."""
    x = (row ^ column) * MIXING_MULTIPLIER & _WORD
    return (x ^ x >> MIXING_SHIFT) * multiplier + x & _WORD


def _keys(head_word: Tensor, lines: Tensor, together: int, odd: Tensor) -> Tensor:
    """(heads, lines): the keys of these rows, or columns, `together` of which have eight in common, xor `odd` of each."""
    keys = (lines // together * 4 + lines % 8 // 2)[None, :] * KEY_MULTIPLIERS[0] + head_word[:, None] & _WORD
    return ((keys ^ keys >> 16) * KEY_MULTIPLIERS[1] & _WORD) ^ odd


def _factor(number: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """The product of the factors of its lowest three bits that are set."""
    product = torch.ones_like(number)
    for bit, factor in enumerate(factors):
        product = torch.where((number >> bit) % 2 == 1, product * factor & _WORD, product)
    return product


def keep_tile(seed: int, batch: int, heads: Tensor, rows: range, columns: range, dropout_p: float) -> Tensor:
    """(heads, rows, columns) bool: which scores of a tile are kept. `heads` is an int64 tensor of head numbers."""
    i, j = (torch.arange(x.start, x.stop, device=heads.device) for x in (rows, columns))
    none = torch.zeros_like(heads)
    of_rows, of_columns, _, _ = philox((heads, torch.full_like(heads, batch), none, none), seed)
    row_keys = _keys(of_rows, i, ROWS, i % 2 * ODD_ROW)
    column_keys = _keys(of_columns, j, COLUMNS, j // 8 % 2 * ODD_COLUMN)
    of_row, of_column = _factor(i // 8, ROW_FACTORS), _factor(j // 16, COLUMN_FACTORS) * WORD_MULTIPLIER & _WORD
    words = mixture(row_keys[:, :, None], column_keys[:, None, :], of_row[:, None] * of_column & _WORD)
    return is_kept(words >> (j % 2 * 16 + 7) & 0xFF, dropout_p)


def dropout_mask(
    seed: int, batch: int, heads: int, seqlen_q: int, seqlen_k: int, dropout_p: float, device: torch.device | str = "cpu"
) -> Tensor:
    """The dense mask that `attention(..., dropout_p, seed)` draws: (batch, heads, seqlen_q, seqlen_k) bool, True is kept.

    For tests and study; the backends draw it tile by tile. In `attention_varlen` the batch index counts sequences, and rows
    and columns count from each sequence's start.
    """
    check_probability(dropout_p)
    check_seed(seed)
    for name, size in (("batch", batch), ("heads", heads), ("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise bad_value(name, repr(size), "it is a size", "give an int from 0 on")
    numbers = torch.arange(heads, device=device)
    tiles = [keep_tile(seed, b, numbers, range(seqlen_q), range(seqlen_k), dropout_p) for b in range(batch)]
    return torch.stack(tiles) if tiles else torch.empty(0, heads, seqlen_q, seqlen_k, dtype=torch.bool, device=device)
