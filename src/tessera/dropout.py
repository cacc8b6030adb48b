"""Dropout's mask: a function of (seed, batch, head, row, column) alone, so every backend and tile size draws the same.

Every row and every column of a head has a key of 64 bits, and a draw is a mixture of the two. Keys come from a head's words,
which Philox4x32 with 7 rounds makes under the 64-bit seed (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011:
the fewest rounds that pass BigCrush), by the finalizer of MurmurHash3. Eight scores share a row's and a column's key: rows i and
i + 8 of a group of 16, columns j, j + 1, j + 8 and j + 9 (j even, below 8) of a group of 16. These are scores that one thread of
a Hopper warpgroup holds in its accumulator anyway. In 64 rows, and in 128 columns, the keys of what such a thread has differ by
constants alone: it makes one for all of them.

    h0, h1, h2, h3 = philox((head, batch, 0, 0), key=seed)
    key of a row   = final(n ^ h0), final(n ^ h1), n = i // 64 * 8 + i % 8, and V of i // 16 % 4
    of a column    = final(n ^ h2), final(n ^ h3), n = j // 128 * 4 + j % 8 // 2, and U of j // 16 % 8
    U, V of n      = the constants of n's bits that are set, xor
    a, b           = row key ^ column key
    x              = a M + b
    word           = (x ^ x >> 16) M' + x, with an M' each of four: of rows with i // 8 odd the second and the last, of columns
                     with j // 8 odd the last two
    draw           = bits 14 to 7 of its half j % 2, 16 bits
    kept           = draw >= threshold, threshold = round(256 p); above 128 it is draw < 256 - threshold

All products are of 32 bits: beside the tensor cores' work a product of 64 holds up a warp for 10 to 45 cycles (H200, 2026-11-21).

What that is worth: x is uniform whatever a is, and so are draws of it (to a thousandth, counted), so any two of different calls
are independent, and any set of them whose rows and columns close no cycle, as far as the keys are random. This is tabulation
hashing, which is 3-independent (Patrascu and Thorup, "The power of simple tabulation hashing", STOC 2011). The least that can
depend on one another are four draws at a rectangle's corners, those whose keys differ by a constant, and those of one call; that
they don't is the mixture's work, and tests/cpu/test_dropout.py looks at it (without the shift it fails).

A draw has 8 bits, as in FlashAttention-2: p is thereby rounded to a multiple of 1/256, and the kept probabilities are scaled by
the exact 256 / (256 - threshold), so that expectations are. A p that rounds to 0 or to 1 is refused in words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.errors import bad_value

ROUNDS = 7
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
FINAL_MULTIPLIERS = (0x85EBCA6B, 0xC2B2AE35)
"""MurmurHash3's."""
MIXING_MULTIPLIER = 0xD256D193
WORD_MULTIPLIERS = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F)
MIXING_SHIFT = 16
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
DRAWS = 1 << 8
"""How many values a draw has."""
PATCH = 16
"""Rows, and columns, that draw together: eight scores a call."""
OF_COLUMNS = ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
OF_ROWS = ((0x082EFA98, 0xEC4E6C89), (0x452821E6, 0x38D01377))
"""By which keys differ whose numbers of a patch differ in that bit: the digits of pi."""


def threshold(dropout_p: float) -> int:
    """The draws below this are dropped."""
    return round(dropout_p * DRAWS)


def is_kept(draws: Tensor, dropout_p: float) -> Tensor:
    """Of draws: 256 - threshold of 256."""
    least = threshold(dropout_p)
    return draws >= least if least <= DRAWS // 2 else draws < DRAWS - least


def check_probability(dropout_p: float) -> None:
    """A probability that a byte can draw, or 0."""
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


def final(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer on such a tensor."""
    for shift, multiplier in zip((16, 13), FINAL_MULTIPLIERS, strict=True):
        x = (x ^ x >> shift) * multiplier & _WORD
    return x ^ x >> 16


def mixture(row: tuple[Tensor, Tensor], column: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eight draws in four words from a row's and a column's key (broadcastable, as in `philox`)."""
    x = (row[0] ^ column[0]) * MIXING_MULTIPLIER + (row[1] ^ column[1]) & _WORD
    y = x ^ x >> MIXING_SHIFT
    w0, w1, w2, w3 = (y * multiplier + x & _WORD for multiplier in WORD_MULTIPLIERS)
    return w0, w1, w2, w3


def _keys(
    head_words: tuple[Tensor, Tensor], patches: range, places: int, constants: tuple[tuple[int, int], ...]
) -> tuple[Tensor, Tensor]:
    """(heads, patches * places) each: the keys of these patches' rows, or columns."""
    patch = torch.arange(patches.start, patches.stop, device=head_words[0].device)[:, None]
    place = torch.arange(places, device=patch.device)
    numbers = ((patch >> len(constants)) * places + place).flatten()
    h0, h1 = (word[:, None] for word in head_words)
    keys = final(numbers[None, :] ^ h0), final(numbers[None, :] ^ h1)
    for bit, words in enumerate(constants):
        is_set = (patch >> bit & 1).expand(-1, places).flatten()
        keys = keys[0] ^ is_set * words[0], keys[1] ^ is_set * words[1]
    return keys


def keep_tile(seed: int, batch: int, heads: Tensor, rows: range, columns: range, dropout_p: float) -> Tensor:
    """(heads, rows, columns) bool: which scores of a tile are kept. `heads` is an int64 tensor of head numbers."""
    row_patches = range(rows.start // PATCH, -(-rows.stop // PATCH))
    column_patches = range(columns.start // PATCH, -(-columns.stop // PATCH))
    none = torch.zeros_like(heads)
    h0, h1, h2, h3 = philox((heads, torch.full_like(heads, batch), none, none), seed)
    r0, r1 = _keys((h0, h1), row_patches, 8, OF_ROWS)
    c0, c1 = _keys((h2, h3), column_patches, 4, OF_COLUMNS)
    words = torch.stack(mixture((r0[:, :, None], r1[:, :, None]), (c0[:, None, :], c1[:, None, :])), dim=-1)
    draws = (torch.stack([words, words >> 16], dim=-1) >> 7 & 0xFF).to(torch.uint8)
    n = heads.shape[0]
    draws = draws.view(n, len(row_patches), 8, len(column_patches), 4, 2, 2, 2)
    # row = patch, i // 8 % 2, i % 8; column = patch, j // 8 % 2, j % 8 // 2, j % 2
    draws = draws.permute(0, 1, 6, 2, 3, 5, 4, 7).reshape(n, len(row_patches) * PATCH, len(column_patches) * PATCH)
    first_row, first_column = row_patches.start * PATCH, column_patches.start * PATCH
    tile = draws[:, rows.start - first_row : rows.stop - first_row, columns.start - first_column : columns.stop - first_column]
    return is_kept(tile, dropout_p)


def dropout_mask(
    seed: int, batch: int, heads: int, seqlen_q: int, seqlen_k: int, dropout_p: float, device: torch.device | str = "cpu"
) -> Tensor:
    """The dense mask that `attention(..., dropout_p, seed)` draws: (batch, heads, seqlen_q, seqlen_k) bool, True is kept.

    For tests and study; the backends draw it tile by tile. In `attention_varlen` the batch index counts sequences, and rows
    and columns count from each sequence's start.
    """
    check_probability(dropout_p)
    numbers = torch.arange(heads, device=device)
    tiles = [keep_tile(seed, b, numbers, range(seqlen_q), range(seqlen_k), dropout_p) for b in range(batch)]
    return torch.stack(tiles) if tiles else torch.empty(0, heads, seqlen_q, seqlen_k, dtype=torch.bool, device=device)
