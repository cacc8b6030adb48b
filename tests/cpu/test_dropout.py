"""Dropout's draws: the generator against known answers, tiles against the whole, statistics, and the mask in use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tessera import attention, dropout, dropout_mask
from tessera.dropout import keep_scale, keep_tile, mixture, philox, threshold

ONES = 0xFFFFFFFF
# pi's digits, Random123's third test vector: the counter, then the key
PI_COUNTER, PI_KEY = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
# Random123's published known answers for philox4x32 with 10 rounds (kat_vectors)
KNOWN_ANSWERS_10_ROUNDS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI_COUNTER, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
# and those for 7 rounds
KNOWN_ANSWERS_7_ROUNDS = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((ONES,) * 4, (ONES,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (PI_COUNTER, PI_KEY, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
]

Words = tuple[int, int, int, int]


def philox_by_integers(counter: Words, key: tuple[int, int], rounds: int) -> Words:
    """Philox4x32 as the paper states it, in Python's own integers."""
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * counter[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 1 << 32)
        counter = (high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0)
        key = ((key[0] + 0x9E3779B9) % (1 << 32), (key[1] + 0xBB67AE85) % (1 << 32))
    return counter


def run_philox(counter: Words, key: tuple[int, int]) -> Words:
    words = philox(tuple(torch.tensor(c, dtype=torch.int64) for c in counter), key[0] | key[1] << 32)
    return tuple(int(w) for w in words)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS_10_ROUNDS)
def test_the_tests_own_generator_gives_the_published_answers(counter: Words, key: tuple[int, int], answer: Words) -> None:
    assert philox_by_integers(counter, key, 10) == answer


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS_10_ROUNDS)
def test_published_answers_of_ten_rounds(
    counter: Words, key: tuple[int, int], answer: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dropout, "ROUNDS", 10)
    assert run_philox(counter, key) == answer


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS_7_ROUNDS)
def test_published_answers_of_seven_rounds(counter: Words, key: tuple[int, int], answer: Words) -> None:
    assert philox_by_integers(counter, key, 7) == answer
    assert run_philox(counter, key) == answer


WORDS = st.integers(0, ONES)


@given(st.tuples(WORDS, WORDS, WORDS, WORDS), st.tuples(WORDS, WORDS))
def test_philox(counter: Words, key: tuple[int, int]) -> None:
    assert run_philox(counter, key) == philox_by_integers(counter, key, 7)


def philox_by_numpy(c: list[np.ndarray], key: int) -> list[np.ndarray]:
    low, k0, k1 = np.uint64(ONES), key & ONES, key >> 32
    for _ in range(7):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high0, high1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c = [high1 ^ c[1] ^ np.uint64(k0), p1 & low, high0 ^ c[3] ^ np.uint64(k1), p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return c


PI_OF_COLUMNS, PI_OF_ROWS = 0x243F6A88, 0x85A308D3


def key_by_numpy(number: np.ndarray, word: np.ndarray, is_odd: np.ndarray, odd: int) -> np.ndarray:
    key = number * np.uint64(0x85EBCA6B) + word & np.uint64(ONES)
    return ((key ^ key >> np.uint64(16)) * np.uint64(0xC2B2AE35) & np.uint64(ONES)) ^ is_odd * np.uint64(odd)


def factor_by_numpy(number: np.ndarray, factors: tuple[int, int, int]) -> np.ndarray:
    product = np.ones_like(number)
    for bit, factor in enumerate(factors):
        product = np.where(number >> np.uint64(bit) & np.uint64(1) == 1, product * np.uint64(factor) & np.uint64(ONES), product)
    return product


def mask_by_numpy(seed: int, batch: int, heads: int, seqlen_q: int, seqlen_k: int, dropout_p: float) -> np.ndarray:
    """The whole mask by the module's documented layout, in numpy's uint64: nothing shared with the package."""
    b, h, i, j = np.meshgrid(*(np.arange(n, dtype=np.uint64) for n in (batch, heads, seqlen_q, seqlen_k)), indexing="ij")
    two, four, eight = (np.uint64(n) for n in (2, 4, 8))
    words = philox_by_numpy([h, b, 0 * h, 0 * h], seed)
    row = key_by_numpy(i // np.uint64(64) * four + i % eight // two, words[0], i % two, PI_OF_ROWS)
    column = key_by_numpy(j // np.uint64(128) * four + j % eight // two, words[1], j // eight % two, PI_OF_COLUMNS)
    x = (row ^ column) * np.uint64(0xD256D193) & np.uint64(ONES)
    of_row = factor_by_numpy(i // eight, (0xDF72B7EB, 0x77E90B5F, 0x6D24A0E5))
    of_column = factor_by_numpy(j // np.uint64(16), (0xB2BE0D71, 0x6025A7C3, 0x47BA8F27))
    multiplier = of_row * of_column % np.uint64(1 << 32) * np.uint64(0x610FCADF)
    word = (x ^ x >> np.uint64(16)) * multiplier + x & np.uint64(ONES)
    draws = word >> (np.uint64(16) * (j % two) + np.uint64(7)) & np.uint64(255)
    threshold = round(dropout_p * 256)
    return draws >= threshold if threshold <= 128 else draws < 256 - threshold


@pytest.mark.parametrize("seed", [0, 1, 1 << 32, (1 << 63) - 1, 0x0123456789ABCDEF])
def test_mask_is_the_documented_function(seed: int) -> None:
    for sizes in ((37, 170, 0.3), (170, 37, 0.9)):
        expected = mask_by_numpy(seed, 2, 3, *sizes)
        assert torch.equal(dropout_mask(seed, 2, 3, *sizes), torch.from_numpy(expected))


@given(st.data())
def test_tiles_are_cut_from_the_whole(data: st.DataObject) -> None:
    """A tile of any size at any offset, any subset of the heads."""

    def cut(length: int) -> range:
        a, b = data.draw(st.integers(0, length)), data.draw(st.integers(0, length))
        return range(min(a, b), max(a, b))

    whole = dropout_mask(5, 2, 4, 67, 101, 0.4)
    rows, keys, batch = cut(67), cut(101), data.draw(st.integers(0, 1))
    heads = data.draw(st.lists(st.integers(0, 3), max_size=4))
    tile = keep_tile(5, batch, torch.tensor(heads, dtype=torch.int64), rows, keys, 0.4)
    assert torch.equal(tile, whole[batch][heads][:, rows.start : rows.stop, keys.start : keys.stop])


def test_mask_does_not_depend_on_the_lengths() -> None:
    assert torch.equal(dropout_mask(9, 3, 5, 200, 300, 0.2)[:2, :3, :77, :123], dropout_mask(9, 2, 3, 77, 123, 0.2))


@pytest.mark.parametrize("dropout_p", [0.05, 0.1, 0.5, 0.9])
def test_mean_and_variance(dropout_p: float) -> None:
    keep = dropout_mask(123, 2, 4, 256, 256, dropout_p).double()
    n, p = keep.numel(), 1 - round(dropout_p * 256) / 256
    assert abs(keep.mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5
    assert keep.var().item() == pytest.approx(p * (1 - p), rel=0.02)
    # rows and columns alike: no line of the mask is out of the ordinary
    for dim in (-1, -2):
        lines = keep.mean(dim=dim)
        assert (lines - p).abs().max().item() < 6 * (p * (1 - p) / 256) ** 0.5


def test_expectation_is_kept() -> None:
    for dropout_p in (0.002, 0.1, 0.5, 1 / 3, 0.998):
        assert keep_scale(dropout_p) * (1 - threshold(dropout_p) / 256) == pytest.approx(1.0, abs=1e-12)
    assert threshold(0.0) == 0
    assert keep_scale(0.0) == 1.0


@pytest.mark.parametrize(("dropout_p", "nearest"), [(1e-4, "0.00390625"), (1 / 513, "0.00390625"), (0.9981, "0.996094")])
def test_what_a_byte_cannot_draw_is_refused(dropout_p: float, nearest: str) -> None:
    q = torch.zeros(1, 4, 1, 8)
    for call in (lambda: attention(q, q, q, dropout_p=dropout_p, seed=1), lambda: dropout_mask(1, 1, 1, 4, 4, dropout_p)):
        with pytest.raises(ValueError, match=rf"dropout_p={dropout_p}.*8 bits.*the nearest is {nearest}"):
            call()


def test_seeds_batches_and_heads_draw_independently() -> None:
    seeds = [dropout_mask(seed, 2, 2, 128, 128, 0.5) for seed in (0, 1, 2, 1 << 32, 1 << 62)]
    planes = [plane.flatten().double() for mask in seeds for plane in mask.flatten(0, 1)]
    correlations = torch.corrcoef(torch.stack(planes)) - torch.eye(len(planes))
    assert correlations.abs().max().item() < 6 / 128  # six standard deviations of independent planes


def test_neighbours_draw_independently() -> None:
    keep = dropout_mask(77, 1, 1, 512, 512, 0.5)[0, 0].double() - 0.5
    for rows, columns in [(0, 1), (0, 2), (0, 8), (0, 9), (0, 16), (0, 32), (1, 0), (8, 0), (16, 0), (8, 8)]:
        a, b = keep[rows:, columns:], keep[: 512 - rows, : 512 - columns]
        assert abs((4 * a * b).mean().item()) < 6 / 480, (rows, columns)


def scores_of_pairs(lines: torch.Tensor) -> torch.Tensor:
    """How far each two lines' correlation is from 0, in standard deviations of independent ones."""
    correlations = torch.corrcoef(lines.double())
    n = len(lines)
    return correlations[*torch.triu_indices(n, n, 1)] * lines.shape[1] ** 0.5


def worst_score(dropout_p: float) -> tuple[float, float]:
    """(variance, which would be 1; largest score) over all pairs of columns of a head, of rows, and of lines of two heads: four
    corners of a rectangle are what may depend on one another."""
    keep = dropout_mask(5, 1, 2, 4096, 256, dropout_p)[0]
    wide = dropout_mask(6, 1, 1, 256, 4096, dropout_p)[0, 0]
    of_two_heads = torch.cat([keep[0, :, :64].T, keep[1, :, :64].T])
    scores = [scores_of_pairs(lines) for lines in (keep[0].T, wide, of_two_heads)]
    return max(x.var().item() for x in scores), max(x.abs().max().item() for x in scores)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_lines_draw_independently(dropout_p: float) -> None:
    variance, largest = worst_score(dropout_p)
    assert variance < 1.05
    assert largest < 6


def test_mixing_without_its_shift_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "MIXING_SHIFT", 32)
    variance, largest = worst_score(0.5)
    assert variance > 1.05
    assert largest > 6


def worst_rectangle() -> float:
    """The largest correlation of four draws of one mixture at a rectangle's corners, at p = 0.1, over 2^16 mixtures."""
    numbers, n = torch.arange(8), 1 << 16
    of_rows = dropout._factor(numbers, dropout.ROW_FACTORS)
    of_columns = dropout._factor(numbers, dropout.COLUMN_FACTORS) * dropout.WORD_MULTIPLIER & ONES
    generator = torch.Generator().manual_seed(1)
    keys = torch.randint(0, 1 << 32, (n,), generator=generator)
    words = mixture(keys, torch.tensor(0), (of_rows[:, None] * of_columns & ONES)[..., None])
    draws = (words >> 7 & 0xFF) < 26
    lines = ((draws.float() - 26 / 256) / (26 / 256 * 230 / 256) ** 0.5).flatten(0, 1)
    pairs = torch.triu_indices(8, 8, 1)
    of_two_rows = lines.view(8, 8, n)[pairs[0]] * lines.view(8, 8, n)[pairs[1]]
    corners = of_two_rows @ of_two_rows.transpose(1, 2) / n
    return corners[:, pairs[0], pairs[1]].abs().max().item()


def test_corners_of_rectangles_in_one_mixture_draw_independently() -> None:
    assert worst_rectangle() < 6 / 256


def test_multipliers_that_were_not_chosen_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "ROW_FACTORS", (0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F))
    monkeypatch.setattr(dropout, "COLUMN_FACTORS", (0x165667B1, 0xD3A2646D, 0xFD7046C5))
    monkeypatch.setattr(dropout, "WORD_MULTIPLIER", 0x9E3779B1)
    assert worst_rectangle() > 6 / 256


@pytest.mark.parametrize("multiplier", [dropout.WORD_MULTIPLIER, dropout.ROW_FACTORS[0] * dropout.COLUMN_FACTORS[2] & ONES])
def test_every_byte_takes_every_value_alike(multiplier: int) -> None:
    keys = torch.randint(0, 1 << 32, (2, 1 << 18))
    word = mixture(keys[0], keys[1], torch.tensor(multiplier))
    for byte in range(4):
        counts = torch.bincount(word >> 8 * byte & 0xFF, minlength=256).double()
        expected = keys.shape[1] / 256
        chi_squared = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi_squared - 255) < 6 * (2 * 255) ** 0.5


def test_draws_are_independent_along_a_line_in_triples() -> None:
    """Of neighbours in a row, and of a row and the next ones: no parity of three prefers one side."""
    keep = dropout_mask(11, 1, 1, 1024, 1024, 0.5)[0, 0].double() * 2 - 1
    for other, third in [((0, 1), (0, 2)), ((0, 8), (8, 0)), ((0, 1), (1, 0)), ((0, 16), (16, 0)), ((8, 0), (16, 0))]:
        a = keep[:1000, :1000]
        b, c = (keep[rows : rows + 1000, columns : columns + 1000] for rows, columns in (other, third))
        assert abs((a * b * c).mean().item()) < 6 / 1000


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_attention_draws_this_mask(backend: str) -> None:
    """With q = 0 all probabilities are 1/Sk, and with V the identity out is P * Z: the mask can be read off."""
    seqlen_q, seqlen_k, heads = 300, 200, 3
    q, k = torch.zeros(2, seqlen_q, heads, 8), torch.randn(2, seqlen_k, heads, 8)
    v = torch.eye(seqlen_k)[None, :, None].expand(2, -1, heads, -1)
    out = attention(q, k, v, dropout_p=0.3, seed=42, backend=backend)
    z = dropout_mask(42, 2, heads, seqlen_q, seqlen_k, 0.3).transpose(1, 2)
    torch.testing.assert_close(out, z * keep_scale(0.3) / seqlen_k)


def test_varlen_draws_by_sequence() -> None:
    from tessera import attention_varlen

    lengths = (20, 35)
    offsets = torch.tensor([0, 20, 55], dtype=torch.int32)
    q, v = torch.zeros(55, 2, 64), torch.zeros(55, 2, 64)
    for start, n in ((0, 20), (20, 35)):
        v[start : start + n, :, :n] = torch.eye(n)[:, None]
    out = attention_varlen(q, q, v, offsets, offsets, dropout_p=0.5, seed=3)
    for b, (start, n) in enumerate(zip((0, 20), lengths, strict=True)):
        z = dropout_mask(3, 2, 2, n, n, 0.5)[b].transpose(0, 1)
        torch.testing.assert_close(out[start : start + n, :, :n], z * 2.0 / n)
