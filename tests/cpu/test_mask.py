"""The laws of the mask algebra, and tile geometry against the elementwise predicate, which is the mask."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessera import Mask
from tessera.mask import BOUNDS, Coverage, MaskSpec, RowLimits

BATCH = 2
LENGTHS = st.integers(0, 24)
SIDES = st.none() | st.integers(0, 12)
POSITIONS = st.integers(-3, 30)


@st.composite
def padding(draw: st.DrawFn) -> Mask:
    def bound() -> Tensor | None:
        return draw(st.none() | st.lists(POSITIONS, min_size=BATCH, max_size=BATCH).map(torch.tensor))

    return Mask.padding(bound(), key_start=bound(), query_end=bound())


@st.composite
def documents(draw: st.DrawFn, seqlen_q: int, seqlen_k: int) -> Mask:
    def sorted_ids(length: int) -> Tensor:
        rows = draw(st.lists(st.lists(st.integers(0, 5), min_size=length, max_size=length), min_size=BATCH, max_size=BATCH))
        return torch.tensor([sorted(row) for row in rows], dtype=torch.int64).view(BATCH, length)

    return Mask.documents(sorted_ids(seqlen_q), sorted_ids(seqlen_k))


@st.composite
def masks(draw: st.DrawFn, seqlen_q: int, seqlen_k: int) -> Mask:
    kind = draw(st.sampled_from(["causal", "window", "padding", "documents", "full"]))
    if kind == "causal":
        return Mask.causal()
    if kind == "window":
        return Mask.window(draw(SIDES), draw(SIDES))
    if kind == "padding":
        return draw(padding())
    return draw(documents(seqlen_q, seqlen_k)) if kind == "documents" else Mask.full()


@st.composite
def several_masks(draw: st.DrawFn, count: int) -> tuple[int, int, list[Mask]]:
    seqlen_q, seqlen_k = draw(LENGTHS), draw(LENGTHS)
    return seqlen_q, seqlen_k, [draw(masks(seqlen_q, seqlen_k)) for _ in range(count)]


def same(a: Mask, b: Mask) -> bool:
    """Equal as data: spec and every bound."""
    if a.spec != b.spec:
        return False
    return all(x is None or torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@given(several_masks(3))
def test_intersection_laws(drawn: tuple[int, int, list[Mask]]) -> None:
    _, _, (a, b, c) = drawn
    assert same(a & b, b & a)
    assert same((a & b) & c, a & (b & c))
    assert same(a & a, a)
    assert same(a & Mask.full(), a)
    assert same(Mask.full() & a, a)


@given(several_masks(2))
def test_intersection_allows_what_both_allow(drawn: tuple[int, int, list[Mask]]) -> None:
    seqlen_q, seqlen_k, (a, b) = drawn
    shape = (BATCH, seqlen_q, seqlen_k)
    assert torch.equal((a & b).allowed(*shape), a.allowed(*shape) & b.allowed(*shape))


def test_causal_is_a_window() -> None:
    assert same(Mask.causal(), Mask.window(None, 0))
    assert same(Mask.causal(), Mask.window(-1, 0))
    assert Mask.causal().spec == MaskSpec(right=0)
    assert Mask.causal().spec.is_causal
    assert not Mask.causal().spec.is_full
    assert Mask.full().spec.is_full
    assert Mask.window(None, None).spec.is_full


def test_only_masks_intersect() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        Mask.causal() & True


def test_documents_of_different_masks_intersect() -> None:
    coarse, fine = Mask.documents(torch.tensor([0, 0, 0, 1, 1])), Mask.documents(torch.tensor([0, 0, 1, 2, 2]))
    assert same(coarse & fine, fine)


@given(LENGTHS, LENGTHS, SIDES, SIDES, padding())
def test_predicate(seqlen_q: int, seqlen_k: int, left: int | None, right: int | None, bounds: Mask) -> None:
    """`allowed` against the definition, one score at a time."""
    keep = (Mask.window(left, right) & bounds).allowed(BATCH, seqlen_q, seqlen_k)
    for b in range(BATCH):
        start, end, last = (None if x is None else int(x[b]) for x in (bounds.key_start, bounds.key_end, bounds.query_end))
        for i in range(seqlen_q):
            diagonal = i + seqlen_k - seqlen_q
            for j in range(seqlen_k):
                wanted = (
                    (left is None or diagonal - j <= left)
                    and (right is None or j - diagonal <= right)
                    and (start is None or j >= start)
                    and (end is None or j < end)
                    and (last is None or i < last)
                )
                assert bool(keep[b, i, j]) == wanted, (b, i, j)


@given(st.lists(st.integers(-2, 3), max_size=24))
def test_documents_are_runs_of_equal_ids(ids: list[int]) -> None:
    n = len(ids)
    keep = Mask.documents(torch.tensor(ids, dtype=torch.int64)).allowed(1, n, n)[0]
    for i in range(n):
        for j in range(n):
            one_run = len(set(ids[min(i, j) : max(i, j) + 1])) == 1
            assert bool(keep[i, j]) == one_run, (i, j)


@given(st.lists(st.integers(-2, 6), max_size=20), st.lists(st.integers(-2, 6), max_size=20))
def test_documents_with_key_ids_are_equal_ids(ids: list[int], key_ids: list[int]) -> None:
    queries, keys = torch.tensor(sorted(ids), dtype=torch.int64), torch.tensor(sorted(key_ids), dtype=torch.int64)
    keep = Mask.documents(queries, keys).allowed(1, len(ids), len(key_ids))[0]
    assert torch.equal(keep, queries[:, None] == keys[None, :])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_documents_take_any_integers(dtype: torch.dtype) -> None:
    keep = Mask.documents(torch.tensor([7, 7, 9], dtype=dtype)).allowed(1, 3, 3)[0]
    assert keep.tolist() == [[True, True, False], [True, True, False], [False, False, True]]


def test_document_ids_past_32_bits_stay_apart() -> None:
    ids = torch.tensor([0, 1 << 32, 1 << 33])
    assert torch.equal(Mask.documents(ids).allowed(1, 3, 3)[0], torch.eye(3, dtype=torch.bool))
    assert torch.equal(Mask.documents(ids, ids).allowed(1, 3, 3)[0], torch.eye(3, dtype=torch.bool))


def test_one_row_of_documents_serves_every_batch_entry() -> None:
    mask = Mask.documents(torch.tensor([0, 0, 1])) & Mask.padding(torch.tensor([1, 3]))
    keep = mask.allowed(2, 3, 3)
    assert keep[0].tolist() == [[True, False, False], [True, False, False], [False, False, False]]
    assert keep[1].tolist() == [[True, True, False], [True, True, False], [False, False, True]]


def test_bounds_are_int32_on_their_device() -> None:
    mask = Mask.padding(torch.tensor([3]), key_start=torch.tensor([1], dtype=torch.int16)) & Mask.documents(torch.zeros(4).long())
    for name in mask.spec.bounds:
        assert getattr(mask, name).dtype == torch.int32, name
    assert mask.spec.bounds == ("key_start", "key_end", "document_begin", "document_end")
    assert set(mask.spec.bounds) <= set(BOUNDS)


@pytest.mark.parametrize("side", [2**31 - 1, 2**31, 2**63 - 1, 2**70])
def test_a_window_longer_than_any_sequence_is_no_limit(side: int) -> None:
    assert Mask.window(side, side).spec.is_full


def test_padding_past_32_bits_does_not_wrap() -> None:
    mask = Mask.padding(torch.tensor([1 << 32]), key_start=torch.tensor([-(1 << 32)]))
    assert mask.allowed(1, 3, 5).all()


def test_spec_prints_and_hashes() -> None:
    mask = Mask.causal() & Mask.padding(torch.tensor([3])) & Mask.documents(torch.zeros(4).long())
    assert str(mask.spec) == "causal & padding & documents"
    assert str(Mask.window(3, None).spec) == "window(3, inf)"
    assert str(Mask.full().spec) == "full"
    assert hash(mask.spec) == hash((Mask.causal() & mask).spec)


# Tile geometry: RowLimits says with integers what `allowed` says elementwise.


@st.composite
def row_limits(draw: st.DrawFn) -> RowLimits:
    seqlen_q, seqlen_k = draw(LENGTHS), draw(LENGTHS)
    bounds: dict[str, int] = {}
    for name in ("key_start", "key_end", "query_end"):
        value = draw(st.none() | POSITIONS)
        if value is not None:
            bounds[name] = value
    begin = end = None
    if draw(st.booleans()):
        mask = draw(documents(seqlen_q, seqlen_k))
        assert mask.document_begin is not None
        assert mask.document_end is not None
        begin, end = tuple(mask.document_begin[0].tolist()), tuple(mask.document_end[0].tolist())
    return RowLimits(seqlen_q, seqlen_k, draw(SIDES), draw(SIDES), **bounds, begin=begin, end=end)


def whole(limits: RowLimits) -> Tensor:
    """(Sq, Sk) bool from the Mask's predicate: what the tile geometry must agree with."""

    def row(values: tuple[int, ...] | None) -> Tensor | None:
        return None if values is None else torch.tensor([values], dtype=torch.int32).view(1, -1)

    def entry(value: int) -> Tensor:
        return torch.tensor([value])

    mask = Mask.window(limits.left, limits.right) & Mask.padding(
        entry(limits.key_end), key_start=entry(limits.key_start), query_end=entry(limits.query_end)
    )
    mask = mask & Mask(document_begin=row(limits.begin), document_end=row(limits.end))
    return mask.allowed(1, limits.seqlen_q, limits.seqlen_k)[0]


@given(row_limits(), st.data())
def test_tile_of_the_predicate(limits: RowLimits, data: st.DataObject) -> None:
    rows, keys = data.draw(ranges(limits.seqlen_q)), data.draw(ranges(limits.seqlen_k))
    expected = whole(limits)[rows.start : rows.stop, keys.start : keys.stop]
    assert torch.equal(limits.allowed(rows, keys).expand_as(expected), expected)


def ranges(length: int) -> st.SearchStrategy[range]:
    return st.tuples(st.integers(0, length), st.integers(0, length)).map(lambda ends: range(min(ends), max(ends)))


@given(row_limits())
def test_lo_and_hi_are_the_row(limits: RowLimits) -> None:
    keep = whole(limits)
    assert not keep[limits.rows :].any()
    for i in range(limits.rows):
        seen = keep[i].nonzero().flatten().tolist()
        interval = range(limits.lo(i), limits.hi(i))
        assert seen == list(interval), i
    lows, highs = [limits.lo(i) for i in range(limits.rows)], [limits.hi(i) for i in range(limits.rows)]
    assert all(a <= b for a, b in pairwise(lows))
    assert all(a <= b for a, b in pairwise(highs))


@settings(max_examples=300)
@given(row_limits(), st.data())
def test_keys_of(limits: RowLimits, data: st.DataObject) -> None:
    """The tile range holds every key that a row of the tile sees; in the full range every row sees every key."""
    first = data.draw(st.integers(0, max(0, limits.rows - 1)))
    last = data.draw(st.integers(first + 1, max(first + 1, limits.rows)))
    if last > limits.rows:
        return  # no rows to ask about
    tile, seen = whole(limits)[first:last], limits.keys_of(first, last)
    assert 0 <= seen.begin <= seen.end
    if seen.begin < seen.end:
        assert seen.end <= limits.seqlen_k
    columns = tile.any(dim=0).nonzero().flatten().tolist()
    assert all(seen.begin <= j < seen.end for j in columns)
    if tile.any(dim=1).all() and columns:  # no empty row at an edge: then the range is as small as can be
        assert (seen.begin, seen.end) == (columns[0], columns[-1] + 1)
    full = tile.all(dim=0).nonzero().flatten().tolist()
    assert full == list(range(seen.full_begin, seen.full_end))


@settings(max_examples=300)
@given(row_limits(), st.data())
def test_rows_of(limits: RowLimits, data: st.DataObject) -> None:
    keys = data.draw(ranges(limits.seqlen_k))
    begin, end = limits.rows_of(keys.start, keys.stop)
    assert 0 <= begin <= end <= limits.rows or begin == end
    rows = whole(limits)[:, keys.start : keys.stop].any(dim=1).nonzero().flatten().tolist()
    assert all(begin <= i < end for i in rows)


@settings(max_examples=300)
@given(row_limits(), st.data())
def test_coverage(limits: RowLimits, data: st.DataObject) -> None:
    """FULL is exact; EMPTY is certain. PARTIAL may be said of a tile that is empty, where lo and hi cross inside it."""
    rows, keys = data.draw(ranges(limits.rows)), data.draw(ranges(limits.seqlen_k))
    if not rows or not keys:
        return
    tile = whole(limits)[rows.start : rows.stop, keys.start : keys.stop]
    said = limits.coverage(rows, keys)
    assert (said is Coverage.FULL) == bool(tile.all())
    if said is Coverage.EMPTY:
        assert not tile.any()
    elif limits.begin is None and not tile.any():
        # without documents only a row whose lo has passed its hi can deceive
        assert any(limits.lo(i) >= limits.hi(i) for i in rows)


@given(LENGTHS, LENGTHS, SIDES, SIDES)
def test_band_area_counts_the_predicate(seqlen_q: int, seqlen_k: int, left: int | None, right: int | None) -> None:
    """Problem.scores, from which FLOPs come, is exact for a dense mask without bounds."""
    from tessera.cases import Case
    from tessera.operands import bind

    case = Case("band", batch=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=1, heads_kv=1, head_dim=8, window=(left, right))
    problem, _ = bind(case.request("meta"))
    assert problem.scores() == int(Mask.window(left, right).allowed(1, seqlen_q, seqlen_k).sum())
