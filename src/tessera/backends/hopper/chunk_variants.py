"""Kernels for many rows over a KV cache: what the compile gate compiles of them."""

from __future__ import annotations

import torch

from tessera import jit
from tessera.backends.hopper.chunk_config import ChunkConfig, Result
from tessera.backends.hopper.chunk_launch import combine_spec, kernel_spec
from tessera.backends.hopper.chunk_plan import config_for, joins
from tessera.backends.hopper.launch import ELEMENTS
from tessera.mask import MaskSpec
from tessera.problem import Layout, Score, Shape, Sinks
from tessera.serving.problem import Append, Cache, CacheProblem, Pages, Values

CHUNK_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
PAGE_SIZES = (1, 8, 16, 64, 256)
_SCORE = Score(0.1)


def variants() -> tuple[jit.Variant, ...]:
    """The variants, each once, by names such as "chunk bf16 d128 128x128 boxes 16 part right pages"."""
    found: dict[str, jit.Variant] = {}
    for problem in _problems():
        for result in _results(problem):
            config = config_for(problem, result)
            spec = kernel_spec(config, problem.dtype)
            kind = "chunk" if isinstance(config, ChunkConfig) else "latent"
            dim = "+".join(map(str, config.parts.dims))
            words = (
                kind, ELEMENTS[problem.dtype], f"d{dim}", f"{config.rows}x{config.keys}", f"{config.reading.value} {config.box}",
                result.name.lower(), *(("pairs",) if config.pairing else ()), *(feature.value for feature in config.features),
            )  # fmt: skip
            found.setdefault(spec.text, jit.Variant(" ".join(words), spec))
    for splits in (2, 8, 64):
        spec = combine_spec(splits, torch.bfloat16, "packed rows" if splits == 8 else "none")
        found.setdefault(spec.text, jit.Variant(f"combine bf16 {splits} parts", spec, wgmma=False, setmaxnreg=False))
    return tuple(found.values())


def _results(problem: CacheProblem) -> tuple[Result, ...]:
    """Joined halves stand for the parts of some; they differ in how a program ends."""
    joined = joins(problem, 2) and problem.cache.pages is None and problem.mask.right is not None
    return (Result.WHOLE, Result.JOINED if joined else Result.PART)


def _problems() -> list[CacheProblem]:
    """Causal chunks of a group of four: each head dim contiguous, d128 in every kind of page and with every feature, MLA. 64
    queries are two tiles, which pair; 32 are one."""
    plain, causal = MaskSpec(), MaskSpec(right=0)
    problems = [_problem(dims, causal) for dims in CHUNK_DIMS]
    problems += [_problem((128, 128), causal, page_size=size) for size in PAGE_SIZES]
    problems += [
        _problem((128, 128), plain, seqlen_q=32),
        _problem((128, 128), causal, dtype=torch.float16, seqlen_q=32),
        _problem((128, 128), MaskSpec(1023, 0), page_size=64, seqlen_q=32),
        _problem((128, 128), causal, Score(0.1, softcap=30.0, sinks=Sinks()), lengths=("cache_leftpad", "cache_batch_idx")),
        _problem((128, 128), causal, layout=Layout.VARLEN, page_size=64),
    ]
    latent = (576, 512)
    problems += [_problem(latent, causal, seqlen_q=1), _problem(latent, causal, page_size=64)]
    return [*problems, _problem(latent, plain, page_size=1)]


def _problem(
    dims: tuple[int, int], mask: MaskSpec, score: Score = _SCORE, page_size: int = 0, dtype: torch.dtype = torch.bfloat16,
    layout: Layout = Layout.DENSE, lengths: tuple[str, ...] = (), seqlen_q: int = 64,
) -> CacheProblem:  # fmt: skip
    latent = dims[0] > 256
    heads = (128, 1) if latent else (32, 8)
    pages = Pages(page_size, 16384 // page_size, 4096) if page_size else None
    cache = Cache(dtype, 0 if pages else 2, pages, Values.IN_KEYS if latent else Values.OWN)
    packed = ("cu_seqlens_q",) if layout is Layout.VARLEN else ()
    append = Append(seqlen_q, dtype) if lengths else None
    return CacheProblem(Shape(2, seqlen_q, 16384, *heads, *dims), dtype, score, cache, layout, mask, (*packed, *lengths), append)
