"""The parameter grid of FlashAttention-3's own tests of its KV cache function, thinned: every pair of values stands in some case.

The axes and their values follow `test_flash_attn_kvcache` in hopper/test_flash_attn.py of Dao-AILab/flash-attention; all products
of them are hundreds of thousands.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations
from typing import Any

from tessera.serving.cases import CacheCase

AXES: dict[str, tuple[Any, ...]] = {
    "sizes": ((1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048), (16, 3000), (37, 1)),
    "heads": ((6, 6), (6, 2), (6, 1)),
    "page_size": (None, 1, 4, 128),
    "append": (0, 1, "fewer"),
    "rotary": (None, (64, True), (64, False), (128, True), (128, False)),
    "leftpad": (False, True),
    "indexed": (False, True),
    "packed": (False, True),
    "splits": (None, 1, 3),
    "mask": ("causal", "window", "full"),
    "sinks": (False, True),
}
"""`append`: none, as many rows as queries, or fewer; `rotary`: columns of 128 and whether interleaved."""
_CANDIDATES = 12


@cache
def kvcache_grid(seed: int = 0) -> tuple[CacheCase, ...]:
    """The cases: as many as it takes until every two values that go together have met."""
    return tuple(_case(choice, number) for number, choice in enumerate(covering(AXES, seed)))


def covering(axes: Mapping[str, Sequence[Any]], seed: int) -> tuple[dict[str, Any], ...]:
    """Choices of a value for each axis such that any two values of any two axes stand together in one: greedy, not the fewest."""
    draw = random.Random(seed)
    missing = {((a, x), (b, y)) for a, b in combinations(axes, 2) for x in range(len(axes[a])) for y in range(len(axes[b]))}
    chosen = []
    while missing:
        candidates = [_holding(draw.choice(sorted(missing)), axes, draw) for _ in range(_CANDIDATES)]
        best = max(candidates, key=lambda candidate: len(missing.intersection(combinations(candidate.items(), 2))))
        missing.difference_update(combinations(best.items(), 2))
        chosen.append({name: axes[name][index] for name, index in best.items()})
    return tuple(chosen)


def _holding(
    pair: tuple[tuple[str, int], tuple[str, int]], axes: Mapping[str, Sequence[Any]], draw: random.Random
) -> dict[str, int]:
    """A value's number for each axis: these two, the others at random."""
    fixed = dict(pair)
    return {name: fixed.get(name, draw.randrange(len(values))) for name, values in axes.items()}


def _case(choice: Mapping[str, Any], number: int) -> CacheCase:
    """One choice as a case of three sequences. What needs something that the choice lacks is left out, as in the tests there."""
    draw = random.Random(number)
    rows, keys = choice["sizes"]
    packed = choice["packed"]
    lengths_q = (rows, draw.randint(0, rows), 1) if packed else None
    new = {0: 0, 1: rows, "fewer": max(1, rows // 2)}[choice["append"]]
    cached = (keys, draw.randint(0, keys), max(0, keys - 7))
    heads_q, heads_kv = choice["heads"]
    rotary_dim, interleaved = choice["rotary"] or (0, True)
    window = (draw.randint(0, keys), draw.randint(0, 5)) if choice["mask"] == "window" else None
    return CacheCase(
        f"grid {number}", cached, rows, new, lengths_q, heads_q, heads_kv, 128, page_size=choice["page_size"],
        indexed=choice["indexed"] and choice["page_size"] is None,
        leftpad=tuple(draw.randint(0, n) for n in cached) if choice["leftpad"] else None,
        rotary_dim=rotary_dim if new else 0, interleaved=interleaved, num_splits=choice["splits"], sinks=choice["sinks"],
        causal=choice["mask"] == "causal", window=window,
    )  # fmt: skip
