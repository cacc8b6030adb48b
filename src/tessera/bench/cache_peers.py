"""The programs that a benchmark of decoding times: ours and FlashAttention-3's over a cache, torch's kernels on plain tensors.

A cell is a plain problem of few queries beside many keys; its keys and values become a cache here, contiguous (as they are,
where all sequences are as long) or in pages scattered at random. The call that is timed is a server's: lengths on the device,
FlashAttention-3 with the scheduler metadata that a server makes once a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.bench.flash_peers import Fa3Operators, FlashPackage, load_fa3
from tessera.bench.peers import Backward, Forward, Peer, Sdpa, TorchFlash, features
from tessera.device import Device
from tessera.operands import Request
from tessera.problem import Layout, Problem
from tessera.serving import dispatch, operators
from tessera.serving.operands import CacheRequest, describe

MOST_COPIED = 8 << 30
"""Bytes of keys and values up to which pages are laid out: a copy of the cells above would leave no room for the others'."""


@dataclass(frozen=True)
class CachedKeys:
    """A plain problem's tensors as a server has them. q (batch, seqlen_q, heads_q, head_dim) or packed as in the request."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor
    page_table: Tensor | None
    cu_seqlens_q: Tensor | None
    longest: int

    @staticmethod
    def of(request: Request, problem: Problem, page_size: int | None) -> CachedKeys:
        q, k, v = request.q, request.k, request.v
        starts_q, starts_k = request.cu_seqlens_q, request.cu_seqlens_k
        if starts_q is None or starts_k is None:
            batch, longest = k.shape[:2]
            lengths = torch.full((batch,), longest, dtype=torch.int32, device=q.device)
        else:
            lengths = starts_k.diff()
            longest = int(lengths.max())
            k, v = (_padded(x, starts_k.tolist(), longest) for x in (k, v))
            if q.shape[0] == problem.shape.batch and bool((starts_q.diff() == 1).all()):
                q, starts_q = q[:, None], None  # a query each: no need to say where they start
        table = None
        if page_size is not None:
            count = -(-longest // page_size)
            order = torch.randperm(k.shape[0] * count, generator=torch.Generator().manual_seed(7)).to(q.device)
            table = order.view(-1, count).int()
            k, v = (_in_pages(x, order, page_size) for x in (k, v))
        return CachedKeys(q, k, v, lengths, table, starts_q, longest)


def _padded(x: Tensor, starts: list[int], longest: int) -> Tensor:
    """(total, heads, dim) -> (batch, longest, heads, dim), NaN behind each sequence."""
    padded = x.new_full((len(starts) - 1, longest, *x.shape[1:]), float("nan"))
    for b, (start, end) in enumerate(pairwise(starts)):
        padded[b, : end - start] = x[start:end]
    return padded


def _in_pages(x: Tensor, order: Tensor, page_size: int) -> Tensor:
    """(batch, seqlen, heads, dim) -> (pages, page_size, heads, dim), page i of all of them at order[i]."""
    behind = -x.shape[1] % page_size
    if behind:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, behind))
    pages = x.reshape(-1, page_size, *x.shape[2:])
    return torch.empty_like(pages).index_copy_(0, order, pages)


def _too_large(problem: Problem, page_size: int | None) -> str | None:
    moved = problem.io_bytes()
    return f"pages of {moved / 1e9:.0f} GB are not laid out here" if page_size is not None and moved > MOST_COPIED else None


@dataclass(frozen=True)
class TesseraCache:
    """Ours: attention_with_kvcache over a contiguous cache, or one in pages."""

    backend: str | None = None
    page_size: int | None = None
    num_splits: int | None = None
    batch_invariant: bool = False

    @property
    def name(self) -> str:
        parts = ["tessera" if self.backend is None else f"tessera:{self.backend}"]
        parts += [f"pages{self.page_size}"] if self.page_size else []
        parts += [f"splits{self.num_splits}"] if self.num_splits else []
        parts += ["invariant"] if self.batch_invariant else []
        return "-".join(parts)

    def why_not(self, problem: Problem, device: Device) -> str | None:
        shape = problem.shape
        packed = problem.layout is Layout.VARLEN
        rows = (shape.batch, 1) if packed else (shape.batch, shape.seqlen_q)
        pages = None if self.page_size is None else -(-shape.seqlen_k // self.page_size)
        cache = (shape.batch, shape.seqlen_k) if self.page_size is None else (shape.batch * (pages or 0), self.page_size)

        def empty(*sizes: int, dtype: torch.dtype = problem.dtype) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device="meta")

        request = CacheRequest(
            empty(*rows, shape.heads_q, shape.head_dim), empty(*cache, shape.heads_kv, shape.head_dim),
            empty(*cache, shape.heads_kv, shape.head_dim_v), empty(shape.batch, dtype=torch.int32),
            page_table=None if pages is None else empty(shape.batch, pages, dtype=torch.int32),
            left=problem.mask.left, right=problem.mask.right, num_splits=self.num_splits, batch_invariant=self.batch_invariant,
        )  # fmt: skip
        asked = describe(request, device.kind)
        names = dispatch.BACKENDS if self.backend is None else (self.backend,)
        refusals = {name: dispatch.load(name).why_not(asked, device) for name in names}
        if all(refusals.values()):
            return "; ".join(f"{name}: {reasons[0]}" for name, reasons in refusals.items())
        return _too_large(problem, self.page_size)

    def forward(self, request: Request, problem: Problem) -> Forward:
        cached = CachedKeys.of(request, problem, self.page_size)
        own = CacheRequest(
            cached.q, cached.k_cache, cached.v_cache, cached.cache_seqlens, page_table=cached.page_table,
            cu_seqlens_q=cached.cu_seqlens_q, left=problem.mask.left, right=problem.mask.right, softcap=problem.score.softcap,
            softmax_scale=problem.score.scale, num_splits=self.num_splits, batch_invariant=self.batch_invariant,
            backend=self.backend,
        )  # fmt: skip
        shape = problem.out_shape
        return lambda: operators.forward(own)[0].view(shape)

    def backward(self, request: Request, problem: Problem, dout: Tensor) -> Backward:
        raise NotImplementedError("attention over a cache has no backward")


@dataclass(frozen=True)
class Fa3Cache:
    """FlashAttention-3's operator as flash_attn_with_kvcache calls it: used lengths, its own splits, metadata made before."""

    folder: Path
    page_size: int | None = None

    @property
    def name(self) -> str:
        return "fa3" if self.page_size is None else f"fa3-pages{self.page_size}"

    def why_not(self, problem: Problem, device: Device) -> str | None:
        return Fa3Operators(self.folder).why_not(problem, device) or _too_large(problem, self.page_size)

    def forward(self, request: Request, problem: Problem) -> Forward:
        library, shape = load_fa3(self.folder), problem.shape
        cached = CachedKeys.of(request, problem, self.page_size)
        packed = cached.cu_seqlens_q
        rows = cached.q.shape[1] if packed is None else int(packed.diff().max())
        causal = "causal" in features(problem) and rows > 1
        about: dict[str, Any] = {"is_causal": causal, "num_splits": 0}
        options: dict[str, Any] = dict(about)
        if packed is not None:
            about["cu_seqlens_q"] = packed
            options |= {"cu_seqlens_q": packed, "max_seqlen_q": rows}
        if self.page_size is not None:
            about["page_size"] = self.page_size
            options["page_table"] = cached.page_table
        metadata = library.get_scheduler_metadata(
            shape.batch, rows, cached.longest, shape.heads_q, shape.heads_kv, shape.head_dim, shape.head_dim_v,
            cached.q.dtype, cached.cache_seqlens, **about,
        )  # fmt: skip
        options |= {"seqused_k": cached.cache_seqlens, "scheduler_metadata": metadata, "softmax_scale": problem.score.scale}
        q, k, v = cached.q, cached.k_cache, cached.v_cache
        return lambda: library.fwd(q, k, v, **options)[0].view(problem.out_shape)

    def backward(self, request: Request, problem: Problem, dout: Tensor) -> Backward:
        raise NotImplementedError("attention over a cache has no backward")


def peers(fa3_folder: Path | None = None, backend: str | None = None) -> dict[str, Peer]:
    """Every peer of a cell over a cache by name: others' kernels, and our own call over pages, as they compare with it."""
    folder = fa3_folder or Path("no folder given: --fa3-dir")
    everyone: tuple[Peer, ...] = (
        Sdpa(),
        Sdpa("cudnn", "CUDNN_ATTENTION"),
        TorchFlash(),
        *(Fa3Cache(folder, size) for size in (None, 64, 16)),
        FlashPackage("fa4", "flash_attn.cute", None),
    )
    named = {peer.name: peer for peer in everyone}
    named |= {f"pages{size}": TesseraCache(backend, size) for size in (1, 16, 64, 128, 256)}
    return named | {"invariant": TesseraCache(backend, batch_invariant=True), "splits1": TesseraCache(backend, num_splits=1)}


DEFAULT_PEERS = {"cpu": ("sdpa", "pages16"), "cuda": ("cudnn", "fa2", "fa3", "pages64")}
"""Who is timed in grids over a cache unless told otherwise, by the device's kind."""
