"""What of attention over a KV cache runs where: the second half of docs/support_matrix.md (tessera.support prints it)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch

from tessera.device import KNOWN_DEVICES, Device
from tessera.serving import dispatch
from tessera.serving.cases import CacheCase
from tessera.serving.operands import CacheRequest, describe
from tessera.serving.problem import CacheProblem

_LATENT: dict[str, Any] = {"latent": True, "head_dim": 576, "head_dim_v": 512, "heads_q": 16, "heads_kv": 1}


@dataclass(frozen=True)
class CacheFeature:
    """One line of the matrix: a call that differs from the plain one in what `name` says."""

    group: str
    name: str
    case: CacheCase
    dtype: torch.dtype = torch.bfloat16

    def request(self, device: str = "meta") -> CacheRequest:
        """The feature as a call, its tensors on that torch device."""
        request = self.case.request("cpu", self.dtype)
        if device == "cpu":
            return request
        return CacheRequest._make(x.to(device) if isinstance(x, torch.Tensor) else x for x in request)

    def problem(self, device: Device) -> CacheProblem:
        """Its CacheProblem on a device that need not be here."""
        return describe(self.request(), device.kind)

    def refusal(self, backend: str) -> tuple[str, ...]:
        """Why the backend can't have it on its first known device, one string a reason; empty where it can."""
        device = home(backend)
        return tuple(str(reason) for reason in dispatch.load(backend).why_not(self.problem(device), device))


@cache
def home(backend: str) -> Device:
    """The first known device on which the backend runs the plain call."""
    plain = FEATURES[0]
    return next(d for d in KNOWN_DEVICES.values() if not dispatch.load(backend).why_not(plain.problem(d), d))


def _vary(group: str, name: str, dtype: torch.dtype = torch.bfloat16, **changes: object) -> CacheFeature:
    plain = {"cached": (30, 17), "heads_q": 4, "heads_kv": 2, "head_dim": 64, "page_size": 16}
    return CacheFeature(group, name, CacheCase("plain", **(plain | changes)), dtype)  # type: ignore[arg-type]


FEATURES: tuple[CacheFeature, ...] = (
    _vary("Dtypes", "bfloat16"),
    _vary("Dtypes", "float16", torch.float16),
    _vary("Dtypes", "float32", torch.float32),
    _vary("Dtypes", "FP8 cache", scales="none"),
    _vary("Dtypes", "FP8 cache, scales per head", scales="head"),
    _vary("Dtypes", "FP8 cache, scales per sequence and head", scales="sequence"),
    _vary("Dtypes", "FP8 cache, scales per block of rows", scales="block"),
    *(_vary("Head dims", str(d), head_dim=d) for d in (32, 72, 96, 128, 192, 256)),
    _vary("Head dims", "192, of v 128", head_dim=192, head_dim_v=128),
    _vary("Head dims", "576, v its first 512 columns (MLA)", **_LATENT),
    _vary("Cache", "contiguous", page_size=None),
    _vary("Cache", "contiguous, cache_batch_idx", page_size=None, indexed=True),
    *(_vary("Cache", f"pages of {n}", page_size=n) for n in (1, 8, 16, 64, 256)),
    _vary("Cache", "pages of 48", page_size=48),
    _vary("Cache", "K and V in one buffer, heads first (vLLM)", memory="vllm"),
    _vary("Cache", "one K/V head, odd strides", memory="vllm", heads_kv=1),
    _vary("Cache", "left padding", leftpad=(7, 0)),
    _vary("Queries", "4 a sequence", seqlen_q=4),
    _vary("Queries", "64 a sequence", seqlen_q=64),
    _vary("Queries", "packed (cu_seqlens_q)", lengths_q=(3, 1)),
    _vary("Queries", "MHA", heads_q=4, heads_kv=4),
    _vary("Queries", "32 heads over 1", heads_q=32, heads_kv=1),
    _vary("Appending", "new rows", new=1),
    _vary("Appending", "packed new rows", new=1, lengths_q=(3, 1)),
    _vary("Appending", "rotary, interleaved", new=1, rotary_dim=64),
    _vary("Appending", "rotary, halves, in part", new=1, rotary_dim=32, interleaved=False),
    _vary("Appending", "to an FP8 cache", new=1, scales="head"),
    _vary("Appending", "to an FP8 cache, in FP8", new=1, scales="head", rounded=True),
    _vary("Appending", "to MLA's cache", new=1, **_LATENT),
    _vary("Masks and scores", "not causal", causal=False, seqlen_q=4),
    _vary("Masks and scores", "window", window=(16, 0)),
    _vary("Masks and scores", "softcap", softcap=20.0),
    _vary("Masks and scores", "softmax_scale < 0", softmax_scale=-0.3),
    _vary("Masks and scores", "sinks", sinks=True),
    _vary("Schedules", "num_splits", num_splits=3),
    _vary("Schedules", "stream_k", schedule="stream_k"),
    _vary("Schedules", "batch_invariant", batch_invariant=True),
    _vary("Schedules", "batch_invariant, 64 queries", batch_invariant=True, seqlen_q=64),
)

_HEADER = """
# Attention over a KV cache

The same for `attention_with_kvcache`. Each line differs from a plain call (bfloat16, head_dim 64, 4 heads over 2, pages of 16,
one query a sequence, causal) in what it names."""


def matrix() -> Iterator[str]:
    """The matrix in Markdown, line by line."""
    yield _HEADER
    names = tuple(dispatch.BACKENDS)
    for group, features in groupby(FEATURES, key=lambda feature: feature.group):
        yield f"\n## {group}\n"
        yield "| | " + " | ".join(f"{name} ({home(name).name})" for name in names) + " |"
        yield "|---" * (len(names) + 1) + "|"
        for feature in features:
            cells = ("; ".join(feature.refusal(name)) or "yes" for name in names)
            yield f"| {feature.name} | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
