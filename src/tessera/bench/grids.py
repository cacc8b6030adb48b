"""Named grids: the cells that a benchmark runs, in the order in which a person reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch

from tessera.bench.cells import Cell, Direction
from tessera.cases import Case
from tessera.errors import bad_value


class Metric(Enum):
    """What a grid is bound by, hence how its cells are quoted."""

    TFLOPS = "TFLOP/s"
    GFLOPS = "GFLOP/s"
    BANDWIDTH = "GB/s"

    def rate(self, flops: int, moved_bytes: int, seconds: float) -> float:
        """Work over time in this metric's unit."""
        return {
            Metric.TFLOPS: flops / 1e12,
            Metric.GFLOPS: flops / 1e9,
            Metric.BANDWIDTH: moved_bytes / 1e9,
        }[self] / seconds


class Kind(Enum):
    """What is called, hence who can take part (session.py)."""

    PLAIN = "attention"
    CACHE = "attention over a KV cache"


@dataclass(frozen=True)
class Grid:
    """A named list of cases. `device` is the kind ("cpu", "cuda") and `dtype` the dtype that it is meant for."""

    name: str
    about: str
    cases: tuple[Case, ...]
    dtype: torch.dtype
    device: str
    metric: Metric = Metric.TFLOPS
    kind: Kind = Kind.PLAIN

    def cells(self, direction: Direction = Direction.FORWARD, dtype: torch.dtype | None = None) -> tuple[Cell, ...]:
        """The grid's cells in one direction, in its own dtype or another."""
        return tuple(Cell(case, dtype or self.dtype, direction) for case in self.cases)


def _length(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


MOST_QUERIES = 64
"""Up to so many queries a cell is named by its batch too."""


def _named(case: Case) -> Case:
    """The case under a name that says what it is: "family, size"."""
    heads = "" if case.heads_q == case.heads_kv else f" h{case.heads_q}/{case.heads_kv}"
    mask = "causal" if case.causal else "full"
    if case.window is not None:
        mask = f"window {case.window[0]}"
    score = f" softcap {case.softcap:g}" if case.softcap else ""
    score += f" dropout {case.dropout_p:g}" if case.dropout_p else ""
    score += " alibi" if case.alibi else ""
    if case.bias is not None:
        score += " bias of keys" if case.bias[2] == 1 else " bias"
    dim = f"{case.head_dim}" if case.head_dim_v is None else f"{case.head_dim}/{case.head_dim_v}"
    length = _length(case.seqlen_k) if case.seqlen_q == case.seqlen_k else f"{case.seqlen_q}x{_length(case.seqlen_k)}"
    batch = f"b{case.batch} " if case.seqlen_q <= MOST_QUERIES else ""
    if case.lengths_k is not None:
        length, batch = f"{len(case.lengths_k)}x{_length(max(case.lengths_k))}", "packed "
    return replace(case, name=f"d{dim}{heads} {mask}{score}, {batch}{length}")


def family_of(name: str) -> tuple[str, str]:
    """A cell's name as (family, size): what its neighbours in a figure share, and where it stands among them."""
    family, _, size = name.rpartition(", ")
    return family, size


def square(head_dim: int, seqlen: int, batch: int, heads: int, **options: object) -> Case:
    """A named case with seqlen_q = seqlen_k and, unless `options` say otherwise, as many key/value heads as query heads."""
    case = Case("", batch, seqlen, seqlen, heads, heads, head_dim)
    return _named(replace(case, **options))  # type: ignore[arg-type]


def _odd_heads(heads_q: int, heads_kv: int) -> Case:
    """Causal d128 with a number of heads that divides nothing, named by it."""
    case = square(128, 4096, 2, heads_q, heads_kv=heads_kv, causal=True)
    named = case.name if heads_q != heads_kv else case.name.replace(" causal", f" h{heads_q} causal")
    return replace(case, name=named)


TOKENS = 16384
"""Tokens in a batch of the papers' figures; their hidden size is 2048."""
_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def _paper(lengths: tuple[int, ...]) -> tuple[Case, ...]:
    """The figures of FlashAttention-3, section 4.1: 16384 tokens, hidden 2048, full and causal."""
    return tuple(
        square(dim, seqlen, TOKENS // seqlen, 2048 // dim, causal=causal)
        for dim in (64, 128, 256)
        for causal in (False, True)
        for seqlen in lengths
    )


def _decode(*sizes: tuple[int, int], rows: int = 1, causal: bool = False) -> tuple[Case, ...]:
    """`rows` queries beside a cache, 32 heads over 8: batch and cached tokens as an inference server meets them."""
    return tuple(_named(Case("", batch, rows, cached, 32, 8, 128, causal=causal)) for batch, cached in sizes)


_RAGGED = tuple(round(100 * (32768 / 100) ** (i / 63)) for i in range(64))
"""A batch of cached lengths from 100 to 32768, evenly spread by their logarithms."""


_MIXED = (64, 4096, 128, 512, 2048, 256, 1024, 3072, 192, 640, 1536, 2816)
"""Packed sequences of very different lengths, 16384 tokens in all."""

_GRIDS = (
    Grid(
        "cpu-quick",
        "seconds on any CPU: 4 heads, d 64, float32",
        tuple(square(64, seqlen, 1, 4, causal=causal) for causal in (False, True) for seqlen in (256, 512, 1024)),
        torch.float32,
        "cpu",
        Metric.GFLOPS,
    ),
    Grid(
        "cpu",
        "what a CPU meets: 8 heads, d 64 and 128, windows and softcap, float32",
        (
            *(square(64, seqlen, 1, 8, causal=causal) for causal in (False, True) for seqlen in (512, 1024, 2048, 4096, 8192)),
            *(square(128, seqlen, 1, 8, causal=True) for seqlen in (1024, 4096)),
            square(64, 2048, 1, 8, heads_kv=2, causal=True),
            square(64, 8192, 1, 8, window=(256, 0)),
            square(64, 4096, 1, 8, softcap=20.0, causal=True),
        ),
        torch.float32,
        "cpu",
        Metric.GFLOPS,
    ),
    Grid("paper", "the papers' figures: 16384 tokens, hidden 2048, bf16", _paper(_LENGTHS), torch.bfloat16, "cuda"),
    Grid("paper-quick", "three lengths of the papers' figures", _paper((1024, 4096, 16384)), torch.bfloat16, "cuda"),
    Grid(
        "gqa",
        "grouped queries: 32 query heads over 8, d 128, 16384 tokens, bf16",
        tuple(square(128, s, TOKENS // s, 32, heads_kv=8, causal=c) for c in (False, True) for s in _LENGTHS[1:]),
        torch.bfloat16,
        "cuda",
    ),
    Grid(
        "window",
        "sliding windows: d 64 and 128, hidden 2048, 16384 tokens, bf16",
        tuple(
            square(dim, s, TOKENS // s, 2048 // dim, window=(w, 0))
            for w in (1024, 256, 4096)
            for s in (16384, 4096)
            for dim in (64, 128)
            if s > w
        ),
        torch.bfloat16,
        "cuda",
    ),
    Grid(
        "modifiers",
        "what ALiBi, a bias and dropout cost beside none: 4k, 16384 tokens, hidden 2048, bf16",
        tuple(
            square(dim, 4096, 4, 2048 // dim, causal=causal, **options)
            for dim in (64, 128, 256)
            for causal in (False, True)
            for options in (
                {},
                {"dropout_p": 0.1},
                {"alibi": "head"},
                {"bias": (1, 2048 // dim, 4096, 4096)},
                {"bias": (4, 1, 1, 4096)},
            )
        ),
        torch.bfloat16,
        "cuda",
    ),
    Grid(
        "variants",
        "what FlexAttention is used for: a diagonal, windows, softcap, ALiBi, a bias, grouped queries; d 64 and 128, bf16",
        tuple(
            square(dim, seqlen, TOKENS // seqlen, 2048 // dim, **options)
            for dim in (128, 64)
            for seqlen, options in (
                (4096, {"causal": True}),
                (16384, {"window": (1024, 0)}),
                (4096, {"causal": True, "softcap": 20.0}),
                (4096, {"causal": True, "alibi": "head"}),
                (4096, {"bias": (1, 2048 // dim, 4096, 4096)}),
                (4096, {"causal": True, "heads_kv": 512 // dim}),
            )
        ),
        torch.bfloat16,
        "cuda",
    ),
    Grid(
        "varlen",
        "packed sequences of 64 to 4096 tokens, 16384 in all, d 128, 16 heads and 32 over 8, bf16",
        tuple(
            square(128, 1, 1, heads_q, heads_kv=heads_kv, lengths_q=_MIXED, lengths_k=_MIXED, causal=causal)
            for heads_q, heads_kv in ((16, 16), (32, 8))
            for causal in (False, True)
        ),
        torch.bfloat16,
        "cuda",
    ),
    Grid(
        "dims",
        "head dims between the papers', 96 and 192, and 192 with values of 128 (MLA); 16384 tokens, bf16",
        (
            *(
                square(dim, s, TOKENS // s, heads, causal=causal)
                for dim, heads in ((96, 16), (192, 8))
                for causal in (False, True)
                for s in _LENGTHS
            ),
            *(square(192, s, TOKENS // s, 16, head_dim_v=128, causal=True) for s in (4096, 16384)),
        ),
        torch.bfloat16,
        "cuda",
    ),
    Grid(
        "heads",
        "numbers of heads that fill no GPU evenly: 24, 25, 33, 25 over 5; causal, d 128, 2 x 4k, bf16",
        tuple(_odd_heads(q, kv) for q, kv in ((24, 24), (25, 25), (33, 33), (25, 5))),
        torch.bfloat16,
        "cuda",
    ),
    Grid(
        "decode",
        "one query token over a KV cache, 32 heads over 8, d 128, bf16; the last batch ragged (bench/decoding.py: with graphs)",
        (
            *_decode(*((batch, cached) for batch in (1, 16, 64) for cached in (8192, 32768))),
            _named(Case("", 64, 1, 1, 32, 8, 128, lengths_q=(1,) * 64, lengths_k=_RAGGED)),
        ),
        torch.bfloat16,
        "cuda",
        Metric.BANDWIDTH,
        Kind.CACHE,
    ),
    Grid(
        "chunk",
        "2 to 64 queries over a KV cache of 16k (drafts, chunks of a prompt), causal, 32 heads over 8, d 128, bf16",
        tuple(case for rows in (2, 4, 8, 16, 64) for case in _decode((1, 16384), (8, 16384), rows=rows, causal=True)),
        torch.bfloat16,
        "cuda",
        Metric.BANDWIDTH,
        Kind.CACHE,
    ),
)  # fmt: skip

GRIDS: dict[str, Grid] = {grid.name: grid for grid in _GRIDS}


def grid_named(name: str) -> Grid:
    """A grid, or several as one: "paper+gqa" has the cells of both. Raises ValueError where they cannot stand in one report."""
    parts = []
    for part in name.split("+"):
        if part not in GRIDS:
            raise bad_value("grid", repr(part), "there is no such grid", f"use some of {', '.join(GRIDS)}, with a plus between")
        parts.append(GRIDS[part])
    kinds = {(grid.dtype, grid.device, grid.metric, grid.kind) for grid in parts}
    if len(kinds) > 1:
        raise bad_value("grid", repr(name), "they differ in dtype, device or metric", "measure them one by one")
    if len(parts) == 1:
        return parts[0]
    return replace(parts[0], name=name, about="; ".join(g.about for g in parts), cases=tuple(c for g in parts for c in g.cases))
