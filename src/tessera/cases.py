"""Named problems. Tests, benchmarks, tuning, `tessera check` and the docs all draw from here.

A Case says in flags what a user would say; `request` makes its tensors from a seed, on any device and in any dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.mask import Mask
from tessera.operands import Request


@dataclass(frozen=True)
class Case:
    """One named problem. Lengths, bounds and documents are given as numbers; tensors are made by `request`.

    `lengths_q` and `lengths_k` make it varlen (seqlens and batch are then ignored); `used_k` are the seqused_k. `key_end`,
    `key_start` and `query_end` are the padding of each batch entry, `documents` the lengths of packed documents. `bias` is the
    bias's shape, and a `constant_bias` wants no gradient; `alibi` and `sinks` make slopes and logits. `strides` is how q, k and
    v lie in memory.
    """

    name: str
    batch: int = 2
    seqlen_q: int = 128
    seqlen_k: int = 128
    heads_q: int = 4
    heads_kv: int = 4
    head_dim: int = 64
    head_dim_v: int | None = None
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi: str | None = None
    bias: tuple[int, ...] | None = None
    constant_bias: bool = False
    sinks: bool = False
    dropout_p: float = 0.0
    lengths_q: tuple[int, ...] | None = None
    lengths_k: tuple[int, ...] | None = None
    used_k: tuple[int, ...] | None = None
    key_start: tuple[int, ...] | None = None
    key_end: tuple[int, ...] | None = None
    query_end: tuple[int, ...] | None = None
    documents: tuple[int, ...] | None = None
    strides: str = "contiguous"

    @property
    def is_varlen(self) -> bool:
        return self.lengths_q is not None

    def request(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        requires_grad: bool = False,
        draw_on: torch.device | str = "cpu",
    ) -> Request:
        """The case's tensors and options. Inputs are N(0, 1), drawn on the CPU: the same on every device; benchmarks,
        which need many, draw them elsewhere. On the meta device nothing is drawn."""
        on_meta = torch.device(device).type == "meta"
        draw_on = device if on_meta else draw_on
        generator = None if on_meta else torch.Generator(draw_on).manual_seed(seed)

        def draw(shape: tuple[int, ...], like: torch.dtype = dtype) -> Tensor:
            if on_meta:
                return torch.empty(shape, device=device, dtype=like)
            drawn = torch.randn(shape, generator=generator, device=draw_on, dtype=torch.float32)
            return drawn.to(device=device, dtype=like)

        q, k, v = (_lay_out(x, self.strides) for x in self._qkv(draw))
        bias = None if self.bias is None else draw(self.bias)
        sinks = draw((self.heads_q,), torch.float32 if dtype != torch.float64 else dtype) if self.sinks else None
        slopes = None
        if self.alibi is not None:
            shape = (self.heads_q,) if self.alibi == "head" else (self.batch, self.heads_q)
            slopes = torch.rand(*shape, generator=generator, device=draw_on).to(device) * 0.3
        learnt_bias = None if self.constant_bias else bias
        trainable = [x for x in (q, k, v, learnt_bias, sinks) if x is not None]
        if requires_grad:
            for x in trainable:
                x.requires_grad_()
        request = self._masked(Request(q, k, v), device)
        return request._replace(
            bias=bias, sinks=sinks, alibi_slopes=slopes, softmax_scale=self.softmax_scale, softcap=self.softcap,
            dropout_p=self.dropout_p, seed=seed + 1 if self.dropout_p else None, requires_grad=requires_grad,
            bias_requires_grad=requires_grad and learnt_bias is not None, sinks_requires_grad=requires_grad and sinks is not None,
        )  # fmt: skip

    def _qkv(self, draw: Callable[[tuple[int, ...]], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        dim_v = self.head_dim if self.head_dim_v is None else self.head_dim_v
        rows: tuple[int, ...] = (self.batch, self.seqlen_q)
        keys: tuple[int, ...] = (self.batch, self.seqlen_k)
        if self.lengths_q is not None and self.lengths_k is not None:
            rows, keys = (sum(self.lengths_q),), (sum(self.lengths_k),)
        q, k = draw((*rows, self.heads_q, self.head_dim)), draw((*keys, self.heads_kv, self.head_dim))
        return q, k, draw((*keys, self.heads_kv, dim_v))

    def _masked(self, request: Request, device: torch.device | str) -> Request:
        def numbers(values: tuple[int, ...] | None) -> Tensor | None:
            return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)

        def offsets(lengths: tuple[int, ...] | None) -> Tensor | None:
            return None if lengths is None else numbers((0, *torch.tensor(lengths).cumsum(0).tolist()))

        mask = Mask.padding(numbers(self.key_end), key_start=numbers(self.key_start), query_end=numbers(self.query_end))
        if self.documents is not None:
            ids = torch.repeat_interleave(torch.arange(len(self.documents)), torch.tensor(self.documents)).to(device)
            mask = mask & Mask.documents(ids.expand(self.batch, -1))
        if self.causal:
            mask = mask & Mask.causal()
        if self.window is not None:
            mask = mask & Mask.window(*self.window)
        bounds = {name: getattr(mask, name) for name in mask.spec.bounds}
        return request._replace(
            left=mask.left, right=mask.right, **bounds, cu_seqlens_q=offsets(self.lengths_q),
            cu_seqlens_k=offsets(self.lengths_k), seqused_k=numbers(self.used_k),
        )  # fmt: skip


def _lay_out(x: Tensor, strides: str) -> Tensor:
    """The same values, laid in memory differently."""
    if strides == "contiguous":
        return x
    if strides == "head_major":  # (batch, heads, seqlen, dim) in memory, as Hugging Face has it
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if strides == "gapped":  # rows of a wider buffer, as a fused qkv projection gives them
        wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 16, dtype=x.dtype, device=x.device)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    raise ValueError(f"strides={strides!r}: use contiguous, head_major or gapped")


_PLAIN = (
    Case("full"),
    Case("causal", causal=True),
    Case("one row", seqlen_q=1, seqlen_k=257, causal=True),
    Case("one key", seqlen_q=129, seqlen_k=1),
    Case("off the tile", seqlen_q=203, seqlen_k=309),
    Case("off the tile, causal", seqlen_q=309, seqlen_k=309, causal=True),
    Case("fewer queries, causal", seqlen_q=113, seqlen_k=300, causal=True),
    Case("more queries, causal", seqlen_q=300, seqlen_k=113, causal=True),
    Case("gqa", heads_q=8, heads_kv=2, seqlen_q=200, seqlen_k=333, causal=True),
    Case("mqa", heads_q=6, heads_kv=1, seqlen_q=130, seqlen_k=259),
    Case("25 heads over 5", heads_q=25, heads_kv=5, batch=1, causal=True),
    Case("head-major strides", strides="head_major", causal=True, seqlen_q=150, seqlen_k=150),
    Case("gapped strides", strides="gapped", seqlen_q=150, seqlen_k=150),
    Case("own scale", softmax_scale=0.3),
    Case("scale below 0, causal", softmax_scale=-0.3, causal=True),
)
_HEAD_DIMS = (8, 16, 32, 40, 72, 80, 96, 128, 160, 192, 256)
_DIMS = tuple(Case(f"d{d}", head_dim=d, causal=d % 16 == 0, seqlen_q=160, seqlen_k=190) for d in _HEAD_DIMS) + (
    Case("d192, full", head_dim=192, seqlen_q=200, seqlen_k=330),
    Case("d192 v128", head_dim=192, head_dim_v=128, causal=True, seqlen_q=200, seqlen_k=200),
    Case("d64 v256", head_dim=64, head_dim_v=256, seqlen_q=200, seqlen_k=200),
    Case("d128 v40", head_dim=128, head_dim_v=40, seqlen_q=200, seqlen_k=200),
)
_MASKS = (
    Case("window", seqlen_q=400, seqlen_k=400, window=(64, 0)),
    Case("window both ways", seqlen_q=400, seqlen_k=500, window=(100, 30)),
    Case("window, left alone", seqlen_q=300, seqlen_k=300, window=(50, None)),
    Case("window of one", seqlen_q=200, seqlen_k=200, window=(0, 0)),
    Case("window past the keys", seqlen_q=400, seqlen_k=100, window=(10, 10)),
    Case("padding", seqlen_q=200, seqlen_k=200, key_end=(140, 200), query_end=(140, 200)),
    Case("padding of keys", batch=3, seqlen_k=200, heads_kv=2, key_start=(37, 0, 0), key_end=(140, 200, 0)),
    Case("padding of keys, sinks", seqlen_k=70, key_end=(70, 13), sinks=True),
    Case("padding left", seqlen_q=200, seqlen_k=200, key_start=(37, 0), causal=True),
    Case("padding to nothing", seqlen_q=150, seqlen_k=150, key_end=(0, 77), causal=True),
    Case("documents", seqlen_q=300, seqlen_k=300, documents=(100, 1, 77, 122), causal=True),
    Case("documents both ways", seqlen_q=300, seqlen_k=300, documents=(5, 195, 100)),
    Case("documents, window, padding", seqlen_q=300, seqlen_k=300, documents=(130, 170), window=(40, 10), key_end=(250, 300)),
)
_SCORES = (
    Case("softcap", softcap=15.0, seqlen_q=200, seqlen_k=200, causal=True),
    Case("alibi", alibi="head", seqlen_q=200, seqlen_k=230, causal=True),
    Case("alibi by batch", alibi="batch", seqlen_q=200, seqlen_k=200),
    Case("bias", bias=(2, 4, 128, 128)),
    Case("bias over heads", bias=(1, 4, 128, 1)),
    Case("bias over keys", bias=(2, 1, 1, 128), causal=True),
    Case("sinks", sinks=True, causal=True, seqlen_q=200, seqlen_k=200),
    Case("sinks, window", sinks=True, window=(30, 0), seqlen_q=200, seqlen_k=200, heads_q=8, heads_kv=2),
    Case("dropout", dropout_p=0.2, seqlen_q=200, seqlen_k=170),
    Case("dropout, causal, gqa", dropout_p=0.5, causal=True, heads_q=6, heads_kv=2, seqlen_q=170, seqlen_k=170),
    Case("everything", bias=(1, 4, 200, 220), alibi="head", softcap=20.0, sinks=True, dropout_p=0.1, seqlen_q=200, seqlen_k=220,
         heads_kv=2, head_dim_v=40, window=(90, 20), key_end=(220, 160)),
)  # fmt: skip
_VARLEN = (
    Case("varlen", lengths_q=(100, 1, 250, 33), lengths_k=(100, 1, 250, 33), causal=True),
    Case("varlen, full", lengths_q=(64, 200, 7), lengths_k=(64, 200, 7), heads_q=8, heads_kv=2),
    Case("varlen, empty sequences", lengths_q=(0, 50, 0, 90), lengths_k=(10, 0, 0, 90), causal=True),
    Case("varlen, cross", lengths_q=(30, 140), lengths_k=(200, 60), causal=True),
    Case("varlen, used", lengths_q=(90, 150), lengths_k=(90, 150), used_k=(60, 101), causal=True),
    Case("varlen, window", lengths_q=(300, 77), lengths_k=(300, 77), window=(50, 0)),
    Case("varlen, sinks", lengths_q=(120, 77), lengths_k=(120, 77), sinks=True, causal=True),
    Case("varlen, softcap, alibi, dropout", lengths_q=(70, 90), lengths_k=(80, 90), softcap=10.0, alibi="head", dropout_p=0.3),
)
_EMPTY = (
    Case("no queries", seqlen_q=0),
    Case("no keys", seqlen_k=0),
    Case("no batch", batch=0),
)

CASES: dict[str, Case] = {case.name: case for case in (*_PLAIN, *_DIMS, *_MASKS, *_SCORES, *_VARLEN, *_EMPTY)}
