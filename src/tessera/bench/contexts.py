"""What a long context costs: one prompt that grows to each length in turn, read in chunks, and decoding behind it.

The prompt goes on from length to length, so that all lengths together cost one reading of the longest. Behind each, some tokens
are decoded (on a GPU by replaying a CUDA graph) and taken back; the last of them is computed once more by the plain formula over
the cache's rows, in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tessera.bench.llama import Appending, Cache, Cached, Llama
from tessera.bench.replay import replayable

_DECODED = 16
_PATIENCE_S = 40.0
"""No length is begun that would take the prompt longer than this, extrapolated by the square from the length before."""
_ALLOWED = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-4}
"""The largest relative distance of a step's logits from the plain formula's: 16 bits round at every layer."""


@dataclass(frozen=True)
class Context:
    """One length. `prefill_s`: for all of the prompt up to here; `decode_s`: one step behind it, the least of several.

    `peak_bytes`: the most that a GPU held so far, weights too; `scores_bytes`: the scores of one layer, had they been in memory.
    `difference`: relative, of a step's logits from those by the plain formula.
    """

    tokens: int
    prefill_s: float
    decode_s: float
    cache_bytes: int
    peak_bytes: int | None
    scores_bytes: int
    difference: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.difference <= self.allowed  # NaN fails


@torch.no_grad()
def contexts(
    model: Llama, lengths: tuple[int, ...], chunk: int, page_size: int, appending: Appending | None = None
) -> Iterator[Context]:
    """Each of the rising `lengths` (multiples of `chunk`) as it is measured, until one would take too long.

    The pages lie in a random order. `appending`: None for what suits the device.
    """
    shape, device = model.shape, model.device
    pages = -(-(lengths[-1] + _DECODED) // page_size)
    cache = Cache.empty(model, pages, page_size)
    generator = torch.Generator(device).manual_seed(0)
    table = torch.randperm(pages, generator=generator, device=device)[None].int()
    held = torch.zeros(1, dtype=torch.int32, device=device)
    cached = Cached(model, cache, appending or Appending.suited(model, page_size), held, table)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    results = torch.zeros(1, 1, shape.hidden, dtype=model.dtype, device=device)

    def decode() -> None:
        results.copy_(model(token, cached.attend))
        held.add_(1)

    step = replayable(decode, device)
    held.zero_()
    model(torch.zeros(1, chunk, dtype=torch.int64, device=device), cached.attend)  # compiles what reads a chunk
    seconds, done = 0.0, 0
    for length in lengths:
        if done and seconds * (length / done) ** 2 > _PATIENCE_S:
            return
        for start in range(done, length, chunk):
            text = torch.randint(shape.vocabulary, (1, min(chunk, length - start)), generator=generator, device=device)
            seconds += _timed(partial(model, text, cached.attend), device)
            held.add_(text.shape[1])
        done = length
        token.random_(shape.vocabulary, generator=generator)
        times = [_timed(step, device) for _ in range(_DECODED)]
        difference = _from_plain(model, cached, token, results)
        held.fill_(length)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        yield Context(
            length, seconds, min(times), shape.cache_bytes(length, model.dtype), peak,
            shape.heads_q * length**2 * model.dtype.itemsize, difference, _ALLOWED[model.dtype],
        )  # fmt: skip


def _timed(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _from_plain(model: Llama, cached: Cached, token: Tensor, results: Tensor) -> float:
    """How far the last step's logits lie from the same step's by the plain formula, which reads the rows that it appended."""
    rows = int(cached.lengths) - 1
    group, page_size = model.shape.heads_q // model.shape.heads_kv, cached.cache.keys.shape[2]
    taken = cached.table[0, : -(-(rows + 1) // page_size)].long()

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (pool[layer, taken].flatten(0, 1)[: rows + 1] for pool in cached.cache)  # (rows + 1, heads_kv, head_dim)
        query = model.rotated(q, cached.lengths[:, None] - 1)[0, 0].unflatten(0, (-1, group))  # (heads_kv, group, head_dim)
        scores = torch.einsum("hgd,nhd->hgn", query.float(), keys.float()) * q.shape[-1] ** -0.5
        return torch.einsum("hgn,nhd->hgd", scores.softmax(-1), values.float()).flatten(0, 1)[None, None].to(q.dtype)

    right, found = model.logits(model(token, attend)), model.logits(results)
    return ((found - right).norm() / right.norm()).item()
