"""Dropout's mask: a function of (seed, batch, head, row, column) alone, so every backend and tile size draws the same.

The generator is Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: the
fewest rounds that pass BigCrush), keyed by the 64-bit seed. One call gives four 32-bit words, eight draws of 16 bits, for
eight scores: rows i and i + 8 of a group of 16, columns j, j + 8, j + 16, j + 24 of a group of 32. These are scores that one
thread of a Hopper warpgroup holds in its accumulator anyway, so a kernel draws 8 scores with one call and no exchange.

    counter = (32-column group * 8 + j % 8, 16-row group * 8 + i % 8, head, batch)
    draw    = 16 bits of word (j // 8) % 4: the low half for (i // 8) % 2 == 0, the high half for 1
    kept    = draw >= threshold, threshold = round(65536 p)

p is thereby rounded to a multiple of 1/65536, and the kept probabilities are scaled by the exact 65536 / (65536 - threshold).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
ROW_GROUP, COLUMN_GROUP = 16, 32


def threshold(dropout_p: float) -> int:
    """The 16-bit draws below this are dropped."""
    return min(round(dropout_p * 65536), 65535)


def keep_scale(dropout_p: float) -> float:
    """What a kept probability is multiplied by: 1 / (1 - p) for the p that the threshold stands for."""
    return 65536 / (65536 - threshold(dropout_p))


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
    row_groups = range(rows.start // ROW_GROUP, -(-rows.stop // ROW_GROUP))
    column_groups = range(columns.start // COLUMN_GROUP, -(-columns.stop // COLUMN_GROUP))
    row_counter = torch.arange(row_groups.start * 8, row_groups.stop * 8, device=device)
    column_counter = torch.arange(column_groups.start * 8, column_groups.stop * 8, device=device)
    counter = (
        column_counter[None, None, :],
        row_counter[None, :, None],
        heads[:, None, None],
        torch.full((1, 1, 1), batch, dtype=torch.int64, device=device),
    )
    words = torch.stack(philox(counter, seed), dim=-1)  # (heads, 8 * row groups, 8 * column groups, 4)
    draws = torch.stack((words & 0xFFFF, words >> 16), dim=-1)  # (..., 4, 2)
    n = heads.shape[0]
    draws = draws.view(n, len(row_groups), 8, len(column_groups), 8, 4, 2)
    # row = group, half, i % 8; column = group, word, j % 8
    draws = draws.permute(0, 1, 6, 2, 3, 5, 4).reshape(n, len(row_groups) * ROW_GROUP, len(column_groups) * COLUMN_GROUP)
    first_row, first_column = row_groups.start * ROW_GROUP, column_groups.start * COLUMN_GROUP
    tile = draws[:, rows.start - first_row : rows.stop - first_row, columns.start - first_column : columns.stop - first_column]
    return tile >= threshold(dropout_p)


def dropout_mask(
    seed: int, batch: int, heads: int, seqlen_q: int, seqlen_k: int, dropout_p: float, device: torch.device | str = "cpu"
) -> Tensor:
    """The dense mask that `attention(..., dropout_p, seed)` draws: (batch, heads, seqlen_q, seqlen_k) bool, True is kept.

    For tests and study; the backends draw it tile by tile. In `attention_varlen` the batch index counts sequences, and rows
    and columns count from each sequence's start.
    """
    numbers = torch.arange(heads, device=device)
    tiles = [keep_tile(seed, b, numbers, range(seqlen_q), range(seqlen_k), dropout_p) for b in range(batch)]
    return torch.stack(tiles) if tiles else torch.empty(0, heads, seqlen_q, seqlen_k, dtype=torch.bool, device=device)
