"""Dropout's mask: a function of (seed, batch, head, row, column) alone, so every backend and tile size draws the same.

The generator is Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: the
fewest rounds that pass BigCrush), keyed by the 64-bit seed. One call gives four 32-bit words, sixteen draws of a byte, for
sixteen scores: rows i and i + 8 of a group of 16, columns j, j + 1 and those 8, 16 and 24 further (j even, below 8) of a
group of 32. These are scores that one thread of a Hopper warpgroup holds in its accumulator anyway, and a word's are four
that follow one another there: so a kernel draws 16 scores with one call, no exchange and no unpacking.

    counter = (32-column group * 4 + j % 8 // 2, 16-row group * 8 + i % 8, head, batch)
    draw    = byte 2 (i // 8 % 2) + j % 2 of word j // 8 % 4
    kept    = draw >= threshold, threshold = round(256 p)

A draw has 8 bits, as in FlashAttention-2: p is thereby rounded to a multiple of 1/256, and the kept probabilities are scaled by
the exact 256 / (256 - threshold), so that expectations are. A p that rounds to 0 or to 1 is refused in words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.errors import bad_value

ROUNDS = 7
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
DRAWS = 1 << 8
"""How many values a draw has."""
ROWS, COLUMNS = 16, 32
"""The patch that eight by four calls draw."""


def threshold(dropout_p: float) -> int:
    """The draws below this are dropped."""
    return round(dropout_p * DRAWS)


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


def keep_tile(seed: int, batch: int, heads: Tensor, rows: range, columns: range, dropout_p: float) -> Tensor:
    """(heads, rows, columns) bool: which scores of a tile are kept. `heads` is an int64 tensor of head numbers."""
    device = heads.device
    row_groups = range(rows.start // ROWS, -(-rows.stop // ROWS))
    column_groups = range(columns.start // COLUMNS, -(-columns.stop // COLUMNS))
    row_counter = torch.arange(row_groups.start * 8, row_groups.stop * 8, device=device)
    column_counter = torch.arange(column_groups.start * 4, column_groups.stop * 4, device=device)
    counter = (
        column_counter[None, None, :],
        row_counter[None, :, None],
        heads[:, None, None],
        torch.full((1, 1, 1), batch, dtype=torch.int64, device=device),
    )
    words = torch.stack(philox(counter, seed), dim=-1)  # (heads, 8 * row groups, 4 * column groups, 4)
    draws = torch.stack([words >> shift & 0xFF for shift in (0, 8, 16, 24)], dim=-1).to(torch.uint8)
    n = heads.shape[0]
    draws = draws.view(n, len(row_groups), 8, len(column_groups), 4, 4, 2, 2)
    # row = group, the byte's upper bit, i % 8; column = group, the word's number, j % 8 // 2, the byte's lower bit
    draws = draws.permute(0, 1, 6, 2, 3, 5, 4, 7).reshape(n, len(row_groups) * ROWS, len(column_groups) * COLUMNS)
    first_row, first_column = row_groups.start * ROWS, column_groups.start * COLUMNS
    tile = draws[:, rows.start - first_row : rows.stop - first_row, columns.start - first_column : columns.stop - first_column]
    return tile >= threshold(dropout_p)


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
