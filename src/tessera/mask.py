"""The Mask algebra: which keys each query attends to.

Every mask here is one interval of keys for each query row,

    row i attends to key j   exactly when   lo(i) <= j < hi(i),

with lo and hi non-decreasing in i. Causal masks, windows, padding and packed documents all have this form, and so has
any intersection of them (the greater lo, the lesser hi). That is why tile ranges are exact and cheap everywhere, on the
CPU and in the kernels: the keys a tile of rows can see are [lo(first row), hi(last row)), and those that every row
of it sees are [lo(last row), hi(first row)).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum

import torch
from torch import Tensor

from tessera.errors import bad_type, bad_value

UNBOUNDED = 1 << 62
_INT32_MAX = (1 << 31) - 1


@dataclass(frozen=True)
class MaskSpec:
    """The part of a mask that holds no tensor: hashable, stands in the Problem.

    `left`, `right`: keys further than this from the diagonal are masked, None for no limit; the diagonal is aligned to
    the bottom right, row i stands at key i + seqlen_k - seqlen_q. `bounds`: the names of the per-batch or per-row
    bounds that come as tensors.
    """

    left: int | None = None
    right: int | None = None
    bounds: tuple[str, ...] = ()

    @property
    def is_full(self) -> bool:
        return self.left is None and self.right is None and not self.bounds

    @property
    def is_causal(self) -> bool:
        """Causal and nothing more along the diagonal (padding or documents may come on top)."""
        return self.left is None and self.right == 0

    def __str__(self) -> str:
        parts = []
        if self.is_causal:
            parts.append("causal")
        elif self.left is not None or self.right is not None:
            parts.append(f"window({_limit(self.left)}, {_limit(self.right)})")
        if any(name.startswith(("key_", "query_")) for name in self.bounds):
            parts.append("padding")
        if "document_begin" in self.bounds:
            parts.append("documents")
        return " & ".join(parts) or "full"


def _limit(value: int | None) -> str:
    return "inf" if value is None else str(value)


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys a query may attend to. Make one with `causal`, `window`, `padding` or `documents`; intersect with `&`.

    The tensors are int32 on the device of the queries: `key_start`, `key_end`, `query_end` of shape (batch,);
    `document_begin`, `document_end` of shape (batch, seqlen_q), or (1, seqlen_q) for all batch entries alike.
    """

    left: int | None = None
    right: int | None = None
    key_start: Tensor | None = None
    key_end: Tensor | None = None
    query_end: Tensor | None = None
    document_begin: Tensor | None = None
    document_end: Tensor | None = None

    @staticmethod
    def full() -> Mask:
        """Every query attends to every key."""
        return Mask()

    @staticmethod
    def causal() -> Mask:
        """No query attends past its own position, counted from the end: j <= i + seqlen_k - seqlen_q."""
        return Mask(right=0)

    @staticmethod
    def window(left: int | None, right: int | None) -> Mask:
        """Keys at most `left` before and `right` after the diagonal; None (or -1, as in flash-attn) for no limit."""
        return Mask(left=check_window_side("window[0]", left), right=check_window_side("window[1]", right))

    @staticmethod
    def padding(key_end: Tensor | None = None, *, key_start: Tensor | None = None, query_end: Tensor | None = None) -> Mask:
        """Batch entry b uses the keys key_start[b] <= j < key_end[b] and the queries i < query_end[b] alone.

        Each is an integer tensor of shape (batch,); left out, it does not limit. Padding does not move the causal
        diagonal: that is set by the shapes (or, in `attention_varlen`, by the sequences' own lengths).
        """
        return Mask(
            key_start=_bound("key_start", key_start),
            key_end=_bound("key_end", key_end),
            query_end=_bound("query_end", query_end),
        )

    @staticmethod
    def documents(ids: Tensor, key_ids: Tensor | None = None) -> Mask:
        """Packed documents: a query attends to the keys of its own document.

        `ids` is an integer tensor (seqlen,) or (batch, seqlen); a document is a run of equal ids. With `key_ids` (for
        seqlen_k != seqlen_q) a query attends to the keys that carry its id, and both must be non-decreasing along
        the sequence. Make the mask once and pass it to every layer: the bounds are computed here.
        """
        queries = _integers("ids", ids, 2)
        if key_ids is None:
            queries = keys = _run_numbers(queries)
        else:
            keys = _integers("key_ids", key_ids, 2)
            for name, values in (("ids", queries), ("key_ids", keys)):
                if values.device.type == "cpu" and (values.diff(dim=-1) < 0).any():
                    raise bad_value(name, "unsorted", "with key_ids, ids must not decrease", "renumber the documents")
        if queries.shape[0] != keys.shape[0] and 1 not in (queries.shape[0], keys.shape[0]):
            why = f"ids has {queries.shape[0]} batch entries"
            raise bad_value("key_ids", f"shape {tuple(keys.shape)}", why, "give as many, or one for all")
        rows = max(queries.shape[0], keys.shape[0])
        keys, queries = keys.expand(rows, -1).contiguous(), queries.expand(rows, -1).contiguous()
        return Mask(
            document_begin=torch.searchsorted(keys, queries, out_int32=True),
            document_end=torch.searchsorted(keys, queries, right=True, out_int32=True),
        )

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(
            left=_least(self.left, other.left),
            right=_least(self.right, other.right),
            key_start=_combine("key_start", torch.maximum, self, other),
            key_end=_combine("key_end", torch.minimum, self, other),
            query_end=_combine("query_end", torch.minimum, self, other),
            document_begin=_combine("document_begin", torch.maximum, self, other),
            document_end=_combine("document_end", torch.minimum, self, other),
        )

    @property
    def spec(self) -> MaskSpec:
        return MaskSpec(self.left, self.right, tuple(name for name in BOUNDS if getattr(self, name) is not None))

    def allowed(self, batch: int, seqlen_q: int, seqlen_k: int) -> Tensor:
        """The elementwise predicate, (batch, seqlen_q, seqlen_k) bool: the definition that everything is tested on."""
        device = next((t.device for t in self.tensors() if t is not None), None)
        i = torch.arange(seqlen_q, device=device)[:, None]
        j = torch.arange(seqlen_k, device=device)[None, :]
        diagonal = i + (seqlen_k - seqlen_q)
        keep = torch.ones(batch, seqlen_q, seqlen_k, dtype=torch.bool, device=device)
        if self.left is not None:
            keep &= j >= diagonal - self.left
        if self.right is not None:
            keep &= j <= diagonal + self.right
        if self.key_start is not None:
            keep &= j >= self.key_start[:, None, None]
        if self.key_end is not None:
            keep &= j < self.key_end[:, None, None]
        if self.query_end is not None:
            keep &= i < self.query_end[:, None, None]
        if self.document_begin is not None and self.document_end is not None:
            keep &= (j >= self.document_begin[:, :, None]) & (j < self.document_end[:, :, None])
        return keep

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The bounds that come as tensors, in the order of BOUNDS, None where there is none."""
        return tuple(getattr(self, name) for name in BOUNDS)


BOUNDS = tuple(field.name for field in fields(Mask) if field.name not in ("left", "right"))


def check_window_side(argument: str, value: int | None) -> int | None:
    """One side of a window: None and -1 mean no limit; other negative values and non-integers are refused."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise bad_type(argument, repr(value), "a window's side is a number of keys", "give an int or None")
    if value < -1:
        raise bad_value(argument, value, "a window cannot reach back past its own side", "use >= 0, or None for no limit")
    if isinstance(value, int) and value >= _INT32_MAX:
        return None  # longer than any sequence; kernels count positions in 32 bits
    return None if value == -1 else value


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _combine(name: str, pick: Callable[[Tensor, Tensor], Tensor], one: Mask, other: Mask) -> Tensor | None:
    """One bound of two masks; one row of documents' bounds serves all batch entries."""
    a, b = getattr(one, name), getattr(other, name)
    if a is None or b is None:
        return b if a is None else a
    serves_all = a.dim() == 2 == b.dim() and a.shape[1] == b.shape[1] and 1 in (a.shape[0], b.shape[0])
    if a.device != b.device or not (a.shape == b.shape or serves_all):
        forms = f"shape {tuple(b.shape)} on {b.device}"
        why = f"the other mask's has shape {tuple(a.shape)} on {a.device}"
        raise bad_value(name, forms, why, "make both masks for the same batch, on one device")
    return pick(a, b)


def _bound(argument: str, value: Tensor | None) -> Tensor | None:
    """One position a batch entry, as int32; what lies past 32 bits lies past any sequence too."""
    if value is None:
        return None
    return _integers(argument, value, 1).clamp(-_INT32_MAX, _INT32_MAX).to(torch.int32)


def _integers(argument: str, value: Tensor, rank: int) -> Tensor:
    """`value` as int64 of that rank; (seqlen,) becomes (1, seqlen)."""
    if not isinstance(value, Tensor) or value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise bad_type(argument, kind, "positions are integers", "give an int32 or int64 tensor")
    if rank == 2 and value.dim() == 1:
        value = value[None]
    if value.dim() != rank:
        shape = "(batch,)" if rank == 1 else "(seqlen,) or (batch, seqlen)"
        raise bad_value(argument, f"shape {tuple(value.shape)}", "the rank is wrong", f"give shape {shape}")
    return value.to(torch.int64)


def _run_numbers(ids: Tensor) -> Tensor:
    """(batch, seqlen) ids -> the number of the run of equal ids that each token stands in, from 0."""
    changes = torch.zeros_like(ids)
    changes[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return changes.cumsum(dim=-1).to(torch.int32)


class Coverage(Enum):
    """How a mask meets one tile of (rows, keys)."""

    EMPTY = "empty"
    PARTIAL = "partial"
    FULL = "full"


@dataclass(frozen=True)
class TileRange:
    """The keys a tile of rows can see, begin <= j < end; every row sees full_begin <= j < full_end."""

    begin: int
    full_begin: int
    full_end: int
    end: int


@dataclass(frozen=True)
class RowLimits:
    """A mask on one sequence, with Python integers: lo(i) and hi(i) and the tile ranges that follow from them; on the CPU.

    `begin` and `end`, where given, are the document bounds of each row. Rows from `query_end` on are empty.
    """

    seqlen_q: int
    seqlen_k: int
    left: int | None = None
    right: int | None = None
    key_start: int = 0
    key_end: int = UNBOUNDED
    query_end: int = UNBOUNDED
    begin: tuple[int, ...] | None = None
    end: tuple[int, ...] | None = None

    @property
    def rows(self) -> int:
        """The rows that can attend to anything are among the first `rows`."""
        return max(0, min(self.seqlen_q, self.query_end))

    def lo(self, i: int) -> int:
        low = max(0, self.key_start)
        if self.left is not None:
            low = max(low, i + self.seqlen_k - self.seqlen_q - self.left)
        return low if self.begin is None else max(low, self.begin[i])

    def hi(self, i: int) -> int:
        high = min(self.seqlen_k, self.key_end)
        if self.right is not None:
            high = min(high, i + self.seqlen_k - self.seqlen_q + self.right + 1)
        return high if self.end is None else min(high, self.end[i])

    def keys_of(self, first: int, last: int) -> TileRange:
        """The keys that the rows first <= i < last can see (`last` at most `rows`)."""
        begin, end = self.lo(first), self.hi(last - 1)
        full_begin = max(begin, self.lo(last - 1))
        return TileRange(begin, full_begin, min(end, self.hi(first)), max(begin, end))

    def rows_of(self, first: int, last: int) -> tuple[int, int]:
        """The rows (begin, end) that can see any key first <= j < last: lo and hi are monotone, so it is an interval."""
        begin = bisect_right(range(self.rows), first, key=self.hi)
        return begin, max(begin, bisect_left(range(self.rows), last, key=self.lo))

    def coverage(self, rows: range, keys: range) -> Coverage:
        """Whether the tile rows x keys is empty, cut by the mask, or attended to in full."""
        seen = self.keys_of(rows.start, rows.stop)
        if keys.stop <= seen.begin or keys.start >= seen.end:
            return Coverage.EMPTY
        full = seen.full_begin <= keys.start and keys.stop <= seen.full_end
        return Coverage.FULL if full else Coverage.PARTIAL

    def allowed(self, rows: range, keys: range) -> Tensor:
        """(rows, keys) bool: the predicate on one tile."""
        i = torch.arange(rows.start, rows.stop, device="cpu")[:, None]
        j = torch.arange(keys.start, keys.stop, device="cpu")[None, :]
        keep = (j >= self.key_start) & (j < min(self.seqlen_k, self.key_end)) & (i < self.query_end)
        diagonal = i + (self.seqlen_k - self.seqlen_q)
        if self.left is not None:
            keep = keep & (j >= diagonal - self.left)
        if self.right is not None:
            keep = keep & (j <= diagonal + self.right)
        if self.begin is not None and self.end is not None:
            begin = torch.tensor(self.begin[rows.start : rows.stop], device="cpu")[:, None]
            end = torch.tensor(self.end[rows.start : rows.stop], device="cpu")[:, None]
            keep = keep & (j >= begin) & (j < end)
        return keep
