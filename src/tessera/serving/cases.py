"""Named problems of attention over a KV cache: tests, benchmarks and the support matrix draw from here.

A CacheCase says in numbers what a server's step is; `request` makes its tensors from a seed, on any device and in any dtype. What
no sequence has is poison: unused rows and pages hold NaN, unused entries of the page table lie outside of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tessera.mask import Mask
from tessera.serving.operands import FP8, CacheRequest

OUTSIDE = 1 << 30
"""A page that no pool has."""


@dataclass(frozen=True)
class CacheCase:
    """One step: `cached` rows stand in the cache of each sequence, `new` are appended, `seqlen_q` queries ask.

    `lengths_q` packs the queries, and with `new` the new rows with them. `page_size` None is a contiguous cache. `memory`: how
    K and V lie, "apart", "beside" (one buffer, row by row; singleton dimensions with odd strides), "head_major", or "vllm" (both:
    a page's heads, rows, K and V). `scales`: of an FP8 cache, "head", "sequence", "block" or "none"; "" is a cache in q's dtype.
    `rounded`: the new rows come as an FP8 cache keeps them.
    """

    name: str
    cached: tuple[int, ...] = (100, 37, 0)
    seqlen_q: int = 1
    new: int = 0
    lengths_q: tuple[int, ...] | None = None
    heads_q: int = 4
    heads_kv: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None
    latent: bool = False
    page_size: int | None = None
    capacity: int = 0
    memory: str = "apart"
    indexed: bool = False
    leftpad: tuple[int, ...] | None = None
    rotary_dim: int = 0
    interleaved: bool = True
    rotary_dtype: torch.dtype | None = None
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    sinks: bool = False
    scales: str = ""
    rounded: bool = False
    num_splits: int | None = None
    schedule: str | None = None
    batch_invariant: bool = False

    @property
    def batch(self) -> int:
        return len(self.cached)

    @property
    def new_rows(self) -> tuple[int, ...]:
        """How many rows each sequence appends."""
        if not self.new:
            return (0,) * self.batch
        return self.lengths_q or (self.new,) * self.batch

    @property
    def totals(self) -> tuple[int, ...]:
        """The sequences' lengths after the call's append."""
        return tuple(a + b for a, b in zip(self.cached, self.new_rows, strict=True))

    @property
    def _rows(self) -> int:
        """Rows of a contiguous cache, and what the page tables must reach."""
        return max(self.capacity, *self.totals, 1)

    def request(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> CacheRequest:
        """The case's tensors and options: N(0, 1), drawn on the CPU, the same on every device. Caches on meta are not drawn."""
        draw = _Draw(torch.Generator().manual_seed(seed), device, dtype)
        rows: tuple[int, ...] = (self.batch, self.seqlen_q) if self.lengths_q is None else (sum(self.lengths_q),)
        dim_v = self.head_dim if self.head_dim_v is None else self.head_dim_v
        tables = self._places(draw.generator)
        cache = self._cache(draw, tables, self.head_dim, dim_v)
        left, right = (Mask.causal() if self.causal else Mask()).left, 0 if self.causal else None
        if self.window is not None:
            both = Mask.window(*self.window) & Mask(right=right)
            left, right = both.left, both.right
        request = CacheRequest(
            draw.normal(*rows, self.heads_q, self.head_dim), *cache, draw.numbers(self.cached), left=left, right=right,
            softmax_scale=self.softmax_scale, softcap=self.softcap, rotary_interleaved=self.interleaved,
            head_dim_v=dim_v if self.latent else None, num_splits=self.num_splits, schedule=self.schedule,
            batch_invariant=self.batch_invariant,
            cache_leftpad=None if self.leftpad is None else draw.numbers(self.leftpad),
            sinks=draw.normal(self.heads_q, dtype=torch.float32) if self.sinks else None,
            cu_seqlens_q=None if self.lengths_q is None else draw.numbers((0, *accumulate(self.lengths_q))),
        )  # fmt: skip
        if self.page_size is not None:
            request = request._replace(page_table=tables.to(device))
        elif self.indexed:
            request = request._replace(cache_batch_idx=tables[:, 0].contiguous().to(device))
        request = self._scaled(request, draw)
        return self._appending(request, draw, dim_v) if self.new else request

    def _places(self, generator: torch.Generator) -> Tensor:
        """int32 (batch, pages): where each sequence's rows stand, scattered; past its end OUTSIDE."""
        size = self.page_size or self._rows
        columns = -(-self._rows // size)
        if self.page_size is None and not self.indexed:
            return torch.arange(self.batch, dtype=torch.int32)[:, None]
        pool = torch.randperm(self.batch * columns + 3, generator=generator, dtype=torch.int32)
        table = pool[: self.batch * columns].view(self.batch, columns)
        if self.page_size is None:
            return table
        used = torch.arange(columns) * size < torch.tensor(self.totals)[:, None]
        return table.masked_fill(~used, OUTSIDE)

    def _cache(self, draw: _Draw, tables: Tensor, dim_k: int, dim_v: int) -> tuple[Tensor, Tensor | None]:
        size = self.page_size or self._rows
        spare = 3 if self.page_size is not None or self.indexed else 0
        entries = self.batch * -(-self._rows // size) + spare
        on_meta = torch.device(draw.device).type == "meta"
        shapes = ((entries, size, self.heads_kv, dim) for dim in (dim_k, dim_v))
        keys, values = (torch.full(shape, float("nan"), device="meta" if on_meta else "cpu") for shape in shapes)
        for b, length in enumerate(() if on_meta else self.cached):
            first = 0 if self.leftpad is None else self.leftpad[b]
            for start in range(0, length, size):
                held = slice(max(first - start, 0), min(length - start, size))
                page = int(tables[b, start // size])
                for cache in (keys, values):
                    rows = cache[page, held]
                    rows.copy_(torch.randn(rows.shape, generator=draw.generator))
        stored = draw.dtype if not self.scales else FP8
        if self.latent:
            return keys.to(draw.device, stored), None
        return _lay_out(keys.to(draw.device, stored), values.to(draw.device, stored), self.memory)

    def _scaled(self, request: CacheRequest, draw: _Draw) -> CacheRequest:
        if self.scales in ("", "none"):
            return request
        entries, size = request.k_cache.shape[:2]
        blocks = max(1, size // 16)
        while size % blocks:
            blocks -= 1
        shape = {"head": (), "sequence": (self.batch,), "block": (entries, blocks)}[self.scales]
        k_descale, v_descale = (draw.uniform(*shape, self.heads_kv) + 0.5 for _ in range(2))
        return request._replace(k_descale=k_descale, v_descale=None if self.latent else v_descale)

    def _appending(self, request: CacheRequest, draw: _Draw, dim_v: int) -> CacheRequest:
        rows: tuple[int, ...] = (self.batch, self.new) if self.lengths_q is None else (sum(self.lengths_q),)
        dtype = FP8 if self.rounded else draw.dtype
        request = request._replace(
            k=draw.normal(*rows, self.heads_kv, self.head_dim, dtype=dtype),
            v=None if self.latent else draw.normal(*rows, self.heads_kv, dim_v, dtype=dtype),
        )
        if not self.rotary_dim:
            return request
        # as many positions as the longest sequence: a read past a table's end is a read past its memory
        positions = torch.arange(max(max(self.totals), max(self.cached) + self.seqlen_q))
        angles = positions[:, None] * 10000.0 ** -torch.linspace(0, 1, self.rotary_dim // 2)
        dtype = self.rotary_dtype or draw.dtype
        return request._replace(rotary_cos=angles.cos().to(draw.device, dtype), rotary_sin=angles.sin().to(draw.device, dtype))


@dataclass(frozen=True)
class _Draw:
    """Where random numbers come from, and what becomes of them."""

    generator: torch.Generator
    device: torch.device | str
    dtype: torch.dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.device)

    def numbers(self, values: tuple[int, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


def _lay_out(keys: Tensor, values: Tensor, memory: str) -> tuple[Tensor, Tensor]:
    """The same rows, laid in memory differently."""
    if memory == "apart":
        return keys, values
    if memory == "head_major":
        keys, values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values))
        return keys, values
    if memory in ("beside", "vllm"):
        both = torch.cat((keys, values), dim=-1).contiguous()
        if memory == "vllm":
            both = both.transpose(1, 2).contiguous().transpose(1, 2)
        keys, values = both.split((keys.shape[-1], values.shape[-1]), dim=-1)
        return _odd_strides(keys), _odd_strides(values)
    raise ValueError(f"memory={memory!r}: use apart, beside, head_major or vllm")


def _odd_strides(x: Tensor) -> Tensor:
    """Dimensions of size 1 get a stride that says nothing."""
    strides = tuple(1 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided(x.shape, strides, x.storage_offset())


_PLAIN = (
    CacheCase("one query"),
    CacheCase("one query, not causal", causal=False),
    CacheCase("mha", heads_q=3, heads_kv=3),
    CacheCase("mqa", heads_q=8, heads_kv=1),
    CacheCase("group of 5", heads_q=10, heads_kv=2),
    CacheCase("group of 16", heads_q=32, heads_kv=2, cached=(300, 17)),
    CacheCase("four queries", seqlen_q=4),
    CacheCase("four queries, not causal", seqlen_q=4, causal=False),
    CacheCase("64 queries", seqlen_q=64, cached=(100, 64, 200)),
    CacheCase("more queries than keys", seqlen_q=33, cached=(100, 7, 0)),
    CacheCase("long", cached=(1700, 3, 900), num_splits=None),
    CacheCase("room to spare", capacity=400),
    CacheCase("own scale", softmax_scale=0.3),
    CacheCase("indexed", indexed=True),
    CacheCase("left padding", leftpad=(30, 37, 0)),
    CacheCase("left padding, window", leftpad=(30, 5, 0), window=(50, 0), seqlen_q=3),
    CacheCase("window", window=(20, 0), seqlen_q=5),
    CacheCase("window both ways", window=(20, 3), seqlen_q=9, causal=False),
    CacheCase("softcap", softcap=15.0, seqlen_q=2),
    CacheCase("sinks", sinks=True, seqlen_q=3),
    CacheCase("sinks, window, softcap", sinks=True, window=(40, 0), softcap=20.0, seqlen_q=3, heads_q=8),
    CacheCase("packed", lengths_q=(1, 5, 0)),
    CacheCase("packed, sinks, long", lengths_q=(1, 17, 0, 40), cached=(600, 20, 33, 300), sinks=True),
    CacheCase("all beside", memory="beside"),
    CacheCase("one head beside", memory="beside", heads_q=6, heads_kv=1),
    CacheCase("head-major", memory="head_major"),
)
_DIMS = tuple(CacheCase(f"d{d}", head_dim=d, seqlen_q=2) for d in (8, 32, 80, 96, 128, 192, 256)) + (
    CacheCase("d192 v128", head_dim=192, head_dim_v=128),
    CacheCase("d64 v256", head_dim=64, head_dim_v=256),
    CacheCase("latent", latent=True, head_dim=576, head_dim_v=512, heads_q=16, heads_kv=1, cached=(130, 40)),
    CacheCase("latent, pages, 3 queries", latent=True, head_dim=576, head_dim_v=512, heads_q=8, heads_kv=1, cached=(90, 40),
              page_size=64, seqlen_q=3),
    CacheCase("latent, append", latent=True, head_dim=576, head_dim_v=512, heads_q=16, heads_kv=1, cached=(90, 40), new=1,
              page_size=16),
    CacheCase("latent, small", latent=True, head_dim=96, head_dim_v=64, heads_q=4, heads_kv=1, num_splits=3),
)  # fmt: skip
_PAGES = tuple(CacheCase(f"pages of {n}", page_size=n, cached=(300, 37, 0, n)) for n in (1, 2, 4, 16, 64, 128, 256)) + (
    CacheCase("pages, packed, window", page_size=16, lengths_q=(4, 1, 9), window=(30, 0)),
    CacheCase("pages, 64 queries", page_size=32, seqlen_q=64, cached=(100, 64, 300)),
    CacheCase("pages, vLLM's form", page_size=16, memory="vllm"),
    CacheCase("pages, vLLM's form, one head", page_size=16, memory="vllm", heads_q=8, heads_kv=1),
    CacheCase("pages, beside, d128", page_size=16, memory="beside", head_dim=128),
    CacheCase("pages, left padding", page_size=16, leftpad=(33, 16, 0)),
    CacheCase("pages, room to spare", page_size=16, capacity=1000),
    CacheCase("pages, long", page_size=64, cached=(1500, 1000, 1)),
)
_APPEND = (
    CacheCase("append", new=1),
    CacheCase("append four", new=4, seqlen_q=4),
    CacheCase("append more than asked", new=6, seqlen_q=2),
    CacheCase("append fewer than asked", new=2, seqlen_q=6, cached=(100, 37, 5)),
    CacheCase("append to pages", new=5, seqlen_q=5, page_size=4),
    CacheCase("append, pages of 1", new=3, seqlen_q=3, page_size=1),
    CacheCase("append, packed", new=1, lengths_q=(1, 9, 0)),
    CacheCase("append, packed, pages, beside", new=1, lengths_q=(3, 1, 20), page_size=16, memory="beside"),
    CacheCase("append, indexed", new=2, seqlen_q=2, indexed=True),
    CacheCase("append, left padding", new=2, seqlen_q=2, leftpad=(3, 37, 0)),
    CacheCase("append, prompt of 64", new=64, seqlen_q=64, cached=(0, 3, 100), page_size=16),
    CacheCase("rotary", new=1, rotary_dim=64),
    CacheCase("rotary, halves", new=3, seqlen_q=3, rotary_dim=64, interleaved=False),
    CacheCase("rotary, in part", new=3, seqlen_q=3, rotary_dim=32, page_size=16),
    CacheCase("rotary, halves, in part, packed", new=1, lengths_q=(3, 1, 8), rotary_dim=16, interleaved=False, page_size=8),
    CacheCase("rotary, not causal", new=3, seqlen_q=3, rotary_dim=64, causal=False),
    CacheCase("rotary, float32 tables", new=2, seqlen_q=2, rotary_dim=64, rotary_dtype=torch.float32),
    CacheCase("rotary, d128, window, sinks", new=4, seqlen_q=4, rotary_dim=128, head_dim=128, window=(30, 0), sinks=True),
)
_SPLITS = (
    CacheCase("one split", num_splits=1),
    CacheCase("three splits", num_splits=3, cached=(700, 37, 0)),
    CacheCase("more splits than keys", num_splits=64, cached=(40, 3, 0)),
    CacheCase("splits, pages, sinks", num_splits=5, page_size=16, sinks=True, cached=(600, 37, 0), seqlen_q=2),
    CacheCase("stream-k", schedule="stream_k", cached=(900, 37, 0, 410)),
    CacheCase("stream-k, pages, packed", schedule="stream_k", cached=(900, 37, 0, 410), page_size=16, lengths_q=(1, 4, 0, 7)),
    CacheCase("batch-invariant", batch_invariant=True, cached=(900, 37, 0)),
    CacheCase("batch-invariant, pages, append", batch_invariant=True, cached=(900, 37, 0), page_size=16, new=2, seqlen_q=2),
)
_FP8 = (
    CacheCase("fp8, no scales", scales="none"),
    CacheCase("fp8, scales of heads", scales="head", seqlen_q=2),
    CacheCase("fp8, scales of sequences", scales="sequence", page_size=16),
    CacheCase("fp8, scales of blocks", scales="block", page_size=64, cached=(300, 37, 0)),
    CacheCase("fp8, scales of blocks, contiguous", scales="block", capacity=128, cached=(100, 37)),
    CacheCase("fp8, append", scales="head", new=3, seqlen_q=3, page_size=16),
    CacheCase("fp8, append, blocks, packed", scales="block", new=1, lengths_q=(2, 1, 5), page_size=32),
    CacheCase("fp8, append in fp8", scales="head", new=3, seqlen_q=3, page_size=16, rounded=True),
    CacheCase("fp8, append in fp8, packed, beside", scales="block", new=1, lengths_q=(2, 1, 5), memory="beside", rounded=True),
    CacheCase("fp8, d128, window, sinks", scales="sequence", head_dim=128, window=(60, 0), sinks=True, seqlen_q=4, num_splits=3),
    CacheCase("fp8, rotary", scales="head", new=2, seqlen_q=2, rotary_dim=64, page_size=16),
    CacheCase("fp8, latent", scales="head", latent=True, head_dim=576, head_dim_v=512, heads_q=8, heads_kv=1, cached=(70, 33)),
)

CACHE_CASES: dict[str, CacheCase] = {case.name: case for case in (*_PLAIN, *_DIMS, *_PAGES, *_APPEND, *_SPLITS, *_FP8)}
