"""Everything that is refused, in two tables: calls that no backend could serve, and features that one backend does not have.

Each refusal names the argument, its value, the reason and what works instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tessera
from tessera import (
    Mask,
    Unsupported,
    attention,
    attention_varlen,
    attention_with_kvcache,
    dispatch,
    plan,
    plan_kvcache,
    support,
    verify,
    warmup,
)
from tessera.backends.cpu import ATEN, TILED
from tessera.problem import Gradients

MATRIX = Path(__file__).parents[2] / "docs" / "support_matrix.md"


def dense(**changes: Any) -> Any:
    """attention on q, k, v of (2, 6, 4, 8) with these arguments changed."""
    arguments = {name: torch.randn(2, 6, 4, 8) for name in ("q", "k", "v")} | changes
    return attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def packed(**changes: Any) -> Any:
    """attention_varlen on two sequences of 2 and 4 tokens, 4 heads of 8, with these arguments changed."""
    arguments = {name: torch.randn(6, 4, 8) for name in ("q", "k", "v")}
    arguments |= {"cu_seqlens_q": int32(0, 2, 6), "cu_seqlens_k": int32(0, 2, 6)} | changes
    first = [arguments.pop(name) for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")]
    return attention_varlen(*first, **arguments)


@dataclass(frozen=True)
class Bad:
    """A call that must fail: the error's type, the argument it names, and what else the message must hold."""

    name: str
    call: Callable[[], Any]
    error: type[Exception]
    argument: str
    says: tuple[str, ...]


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def heads(q: int, kv: int) -> Callable[[], Any]:
    return lambda: dense(q=tensor(2, 6, q, 8), k=tensor(2, 6, kv, 8), v=tensor(2, 6, kv, 8))


def dims(qk: int, v: int) -> Callable[[], Any]:
    return lambda: dense(q=tensor(2, 6, 4, qk), k=tensor(2, 6, 4, qk), v=tensor(2, 6, 4, v))


def on_h200(dim: int, dim_v: int | None = None) -> Callable[[], Any]:
    return lambda: plan((2, 6, 4, dim), (2, 6, 4, dim), (2, 6, 4, dim_v or dim), device="h200")


TENSORS = (
    Bad("q is a list", lambda: dense(q=[1.0]), TypeError, "q=list", ("torch.Tensor",)),
    Bad("v is None", lambda: dense(v=None), TypeError, "v=NoneType", ("torch.Tensor",)),
    Bad("q of rank 3", lambda: dense(q=tensor(6, 4, 8)), ValueError, "q=shape (6, 4, 8)",
        ("3 dimensions", "(batch, seqlen, heads")),
    Bad("k of rank 5", lambda: dense(k=tensor(1, 2, 6, 4, 8)), ValueError, "k=shape (1, 2, 6, 4, 8)", ("5 dimensions",)),
    Bad("packed q of rank 4", lambda: packed(q=tensor(2, 6, 4, 8)), ValueError, "q=shape", ("(total, heads, head_dim)",)),
    Bad("q of integers", lambda: dense(q=tensor(2, 6, 4, 8, dtype=torch.int32)), TypeError, "q=torch.int32", ("torch.bfloat16",)),
    Bad("q complex", lambda: dense(q=tensor(2, 6, 4, 8, dtype=torch.complex64)), TypeError, "q=torch.complex64", ("float16",)),
    Bad("k of another dtype", lambda: dense(k=tensor(2, 6, 4, 8).half()), TypeError, "k=torch.float16",
        ("torch.float32", "k.to(q.dtype)")),
    Bad("v of another dtype", lambda: dense(v=tensor(2, 6, 4, 8).bfloat16()), TypeError, "v=torch.bfloat16", ("v.to(q.dtype)",)),
    Bad("k elsewhere", lambda: dense(k=tensor(2, 6, 4, 8).to("meta")), ValueError, "k.device=meta", ("cpu", "k.to(q.device)")),
    Bad("q elsewhere", lambda: dense(q=tensor(2, 6, 4, 8).to("meta")), ValueError, "k.device=cpu", ("meta",)),
    Bad("sparse q", lambda: dense(q=tensor(2, 6, 4, 8).to_sparse()), TypeError, "q=torch.sparse_coo", ("dense",)),
    Bad("nested q", lambda: dense(q=torch.nested.nested_tensor([tensor(6, 4, 8)], layout=torch.jagged)), TypeError, "q=nested",
        ("attention_varlen",)),
    Bad("last dimension strided", lambda: dense(q=tensor(2, 6, 8, 4).mT), ValueError, "q.stride()=", ("q.contiguous()",)),
    Bad("v's last dimension expanded", lambda: dense(v=tensor(2, 6, 4, 1).expand(2, 6, 4, 8)), ValueError, "v.stride()=",
        ("contiguous",)),
    Bad("batches differ", lambda: dense(k=tensor(3, 6, 4, 8), v=tensor(3, 6, 4, 8)), ValueError, "k=", ("3", "2")),
    Bad("k and v differ in length", lambda: dense(v=tensor(2, 7, 4, 8)), ValueError, "v=", ("7", "6")),
    Bad("k and v differ in heads", lambda: dense(v=tensor(2, 6, 2, 8)), ValueError, "v=", ("2", "4")),
    Bad("head_dim of k", lambda: dense(k=tensor(2, 6, 4, 16)), ValueError, "k=head_dim 16", ("8", "share one head_dim")),
    Bad("heads don't divide", heads(6, 4), ValueError, "heads=6 query, 4 key/value", ("equal number", "key/value heads")),
    Bad("more heads for k than q", heads(2, 4), ValueError, "heads=2 query, 4 key/value", ("use 2 key/value heads",)),
    Bad("heads before rows", lambda: attention(tensor(2, 8, 100, 4), tensor(2, 2, 120, 4), tensor(2, 2, 120, 4)), ValueError,
        "heads=100 query, 120 key/value", ("transpose(1, 2) what is (batch, heads, seqlen, head_dim)",)),
    Bad("no heads for k", heads(4, 0), ValueError, "heads=4 query, 0 key/value", ("use 1 key/value heads",)),
    Bad("head_dim 0", dims(0, 8), ValueError, "head_dim=0", ("1 to 256",)),
    Bad("head_dim 257", dims(257, 8), ValueError, "head_dim=257", ("256", "split the heads")),
    Bad("head_dim_v 0", dims(8, 0), ValueError, "head_dim_v=0", ("1 to 256",)),
    Bad("head_dim_v 300", dims(8, 300), ValueError, "head_dim_v=300", ("256",)),
    Bad("head_dim 20 on a GPU", on_h200(20), ValueError, "head_dim=20", ("16-byte", "pad it to 24")),
    Bad("head_dim_v 12 on a GPU", on_h200(16, 12), ValueError, "head_dim_v=12", ("pad it to 16",)),
)  # fmt: skip
MASKS = (
    Bad("mask is a tensor", lambda: dense(mask=torch.ones(6, 6, dtype=torch.bool)), TypeError, "mask=Tensor",
        ("tessera.Mask", "bias")),
    Bad("causal is a tensor", lambda: dense(causal=torch.ones(6, 6, dtype=torch.bool)), TypeError, "causal=Tensor",
        ("tessera.Mask", "True or False")),
    Bad("causal is a word", lambda: packed(causal="no"), TypeError, "causal=str", ("True or False",)),
    Bad("mask for another batch", lambda: dense(mask=Mask.padding(int32(1, 2, 3))), ValueError, "mask.key_end=shape (3,)",
        ("(batch=2,)",)),
    Bad("documents of another length", lambda: dense(mask=Mask.documents(int32(0, 0, 1))),
        ValueError, "mask.document_begin=shape (1, 3)",
        ("seqlen_q=6",)),
    Bad("mask elsewhere", lambda: dense(mask=Mask.padding(int32(1, 2).to("meta"))), ValueError, "key_end.device=meta", ("cpu",)),
    Bad("bounds made by hand", lambda: dense(mask=Mask(key_end=torch.tensor(5))), ValueError, "mask.key_end=", ("Mask.padding",)),
    Bad("float bounds", lambda: Mask.padding(torch.tensor([1.0, 2.0])), TypeError, "key_end=torch.float32", ("int32 or int64",)),
    Bad("list as bounds", lambda: Mask.padding([1, 2]), TypeError, "key_end=list", ("int32 or int64",)),
    Bad("bool bounds", lambda: Mask.padding(key_start=torch.ones(2, dtype=torch.bool)), TypeError, "key_start=torch.bool",
        ("integers",)),
    Bad("bounds of rank 2", lambda: Mask.padding(query_end=torch.ones(2, 2).int()), ValueError, "query_end=shape (2, 2)",
        ("(batch,)",)),
    Bad("ids of rank 3", lambda: Mask.documents(torch.ones(1, 2, 3).int()), ValueError, "ids=shape (1, 2, 3)",
        ("(batch, seqlen)",)),
    Bad("complex ids", lambda: Mask.documents(torch.ones(3, dtype=torch.complex128)), TypeError, "ids=torch.complex128",
        ("integers",)),
    Bad("unsorted ids with key_ids", lambda: Mask.documents(int32(1, 0), int32(0, 1)), ValueError, "ids=unsorted", ("renumber",)),
    Bad("unsorted key_ids", lambda: Mask.documents(int32(0, 1), int32(1, 0)), ValueError, "key_ids=unsorted", ("renumber",)),
    Bad("negative window", lambda: dense(window=(-2, 0)), ValueError, "window[0]=-2", ("None for no limit",)),
    Bad("window of floats", lambda: dense(window=(3, 1.5)), TypeError, "window[1]=1.5", ("int or None",)),
    Bad("window of bools", lambda: dense(window=(True, 0)), TypeError, "window[0]=True", ("int or None",)),
    Bad("window is an int", lambda: dense(window=128), ValueError, "window=128", ("(left, right)",)),
    Bad("window of three", lambda: dense(window=(1, 2, 3)), ValueError, "window=(1, 2, 3)", ("two sides",)),
    Bad("window a list", lambda: dense(window=[4, 0]), ValueError, "window=[4, 0]", ("a tuple",)),
    Bad("sides made by hand", lambda: dense(mask=Mask(left=-5)), ValueError, "mask.left=-5", ("None for no limit",)),
    Bad("a side of half a key", lambda: dense(mask=Mask(right=2.5)), TypeError, "mask.right=2.5", ("int or None",)),
    Bad("documents without an end", lambda: dense(mask=Mask(document_begin=torch.zeros(1, 6).int())), ValueError,
        "mask.document_end=None", ("two ends", "Mask.documents")),
    Bad("a list by hand", lambda: dense(mask=Mask(key_end=[3, 4])), TypeError, "mask.key_end=list", ("Mask.padding",)),
    Bad("masks of two batches", lambda: Mask.padding(int32(1, 2)) & Mask.padding(int32(1, 2, 3)), ValueError,
        "key_end=shape (3,)", ("(2,)", "same batch")),
    Bad("masks of one and of many", lambda: Mask.padding(int32(1)) & Mask.padding(int32(1, 2)), ValueError,
        "key_end=shape (2,)", ("(1,)", "same batch")),
    Bad("ids of two batches", lambda: Mask.documents(tensor(2, 3).int(), tensor(3, 4).int()), ValueError,
        "key_ids=shape (3, 4)", ("2 batch entries",)),
    Bad("Mask.window negative", lambda: Mask.window(0, -5), ValueError, "window[1]=-5", (">= 0",)),
)  # fmt: skip
SCORES = (
    Bad("NaN scale", lambda: dense(softmax_scale=math.nan), ValueError, "softmax_scale=nan", ("finite", "d**-0.5")),
    Bad("infinite scale", lambda: dense(softmax_scale=-math.inf), ValueError, "softmax_scale=-inf", ("finite",)),
    Bad("scale is a tensor", lambda: dense(softmax_scale=torch.tensor(0.1)), TypeError, "softmax_scale=Tensor", ("float",)),
    Bad("scale is a list", lambda: dense(softmax_scale=[0.1]), TypeError, "softmax_scale=list", ("float",)),
    Bad("scale is a bool", lambda: dense(softmax_scale=True), TypeError, "softmax_scale=bool", ("float",)),
    Bad("negative softcap", lambda: dense(softcap=-1.0), ValueError, "softcap=-1.0", ("softcap > 0", "0 for none")),
    Bad("NaN softcap", lambda: dense(softcap=math.nan), ValueError, "softcap=nan", ("softcap > 0",)),
    Bad("softcap None", lambda: dense(softcap="30"), TypeError, "softcap=str", ("float",)),
    Bad("a scale past float32", lambda: dense(softmax_scale=1e300), ValueError, "softmax_scale=1e+300", ("finite",)),
    Bad("a scale past floats", lambda: dense(softmax_scale=10**400), ValueError, "softmax_scale=an int of 1329 bits",
        ("finite",)),
    Bad("a cap past float32", lambda: dense(softcap=1e39), ValueError, "softcap=1e+39", ("0 for none",)),
    Bad("a cap of nothing", lambda: dense(softcap=1e-300), ValueError, "softcap=1e-300", ("finite", "larger")),
    Bad("deterministic is a word", lambda: dense(deterministic="no"), TypeError, "deterministic='no'", ("True or False",)),
    Bad("deterministic is a tensor", lambda: packed(deterministic=torch.tensor(False)), TypeError, "deterministic=tensor(False)",
        ("True or False",)),
    Bad("deterministic is a list", lambda: dense(deterministic=[]), TypeError, "deterministic=[]", ("True or False",)),
    Bad("dropout 1", lambda: dense(dropout_p=1.0, seed=0), ValueError, "dropout_p=1.0", ("0 <= dropout_p < 1",)),
    Bad("negative dropout", lambda: dense(dropout_p=-0.1, seed=0), ValueError, "dropout_p=-0.1", ("0 <= dropout_p < 1",)),
    Bad("NaN dropout", lambda: dense(dropout_p=math.nan, seed=0), ValueError, "dropout_p=nan", ("probability",)),
    Bad("dropout without a seed", lambda: dense(dropout_p=0.1), ValueError, "seed=None", ("explicit seed", "torch.randint")),
    Bad("negative seed", lambda: dense(dropout_p=0.1, seed=-1), ValueError, "seed=-1", ("2**63",)),
    Bad("seed past 63 bits", lambda: dense(dropout_p=0.1, seed=2**63), ValueError, f"seed={2**63}", ("2**63",)),
    Bad("seed is a float", lambda: dense(dropout_p=0.1, seed=1.0), TypeError, "seed=float", ("int",)),
    Bad("seed is a tensor", lambda: dense(dropout_p=0.1, seed=torch.tensor(1)), TypeError, "seed=Tensor", ("int",)),
    Bad("seed is a bool", lambda: dense(dropout_p=0.1, seed=True), TypeError, "seed=bool", ("int",)),
    Bad("bias is a list", lambda: dense(bias=[0.0]), TypeError, "bias=list", ("torch.Tensor",)),
    Bad("bias does not broadcast", lambda: dense(bias=tensor(2, 4, 6, 5)), ValueError, "bias=shape (2, 4, 6, 5)",
        ("(2, 4, 6, 6)",)),
    Bad("bias of two heads", lambda: dense(bias=tensor(2, 1, 1)), ValueError, "bias=shape (2, 1, 1)", ("its size or 1",)),
    Bad("bias of rank 5", lambda: dense(bias=tensor(1, 1, 1, 6, 6)), ValueError, "bias=shape",
        ("more than 4", "(batch, heads, q, k)")),
    Bad("bias of another dtype", lambda: dense(bias=tensor(6, 6).half()), TypeError, "bias=torch.float16", ("float32",)),
    Bad("bool bias", lambda: dense(bias=tensor(6, 6).bool()), TypeError, "bias=torch.bool", ("tessera.Mask", "masked_fill")),
    Bad("bias elsewhere", lambda: dense(bias=tensor(6, 6).to("meta")), ValueError, "bias.device=meta", ("cpu",)),
    Bad("sinks of another length", lambda: dense(sinks=tensor(3)), ValueError, "sinks=shape (3,)", ("give (4,)",)),
    Bad("sinks of another dtype", lambda: dense(sinks=tensor(4).double()), TypeError, "sinks=torch.float64", ("float32",)),
    Bad("sinks is a number", lambda: dense(sinks=1.0), TypeError, "sinks=float", ("torch.Tensor",)),
    Bad("sinks elsewhere", lambda: packed(sinks=tensor(4).to("meta")), ValueError, "sinks.device=meta", ("cpu",)),
    Bad("slopes of another shape", lambda: dense(alibi_slopes=tensor(2)), ValueError, "alibi_slopes=shape (2,)",
        ("(4,) or (2, 4)",)),
    Bad("slopes in half", lambda: dense(alibi_slopes=tensor(4).half()), TypeError, "alibi_slopes=torch.float16",
        ("alibi_slopes.float()",)),
    Bad("slopes want a gradient", lambda: dense(alibi_slopes=tensor(4).requires_grad_()),
        ValueError, "alibi_slopes=requires_grad=True",
        ("detach", "bias")),
    Bad("slopes as a list", lambda: dense(alibi_slopes=[0.1] * 4), TypeError, "alibi_slopes=list", ("torch.Tensor",)),
    Bad("slopes elsewhere", lambda: dense(alibi_slopes=tensor(4).to("meta")), ValueError, "alibi_slopes.device=meta", ("cpu",)),
    Bad("unknown backend", lambda: dense(backend="cuda"), ValueError, "backend='cuda'", ("no such backend", "cpu", "torch")),
    Bad("backend is a number", lambda: dense(backend=3), TypeError, "backend=3", ("tessera.backend_names()",)),
    Bad("backend that can't", lambda: plan((1, 8, 2, 16),
        (1, 8, 2, 16), device="h200", backend="cpu"), Unsupported, "backend='cpu'",
        ("device=NVIDIA H200", "problem: dense b1 s8 h2 d16 bfloat16")),
    Bad("backend for another device", lambda: dense(backend="hopper"), Unsupported, "backend='hopper'", ("device=CPU", "H100")),
    Bad("unknown device", lambda: plan((1, 8, 2, 16), (1, 8, 2, 16), device="h9000"), ValueError, "device='h9000'",
        ("h100", "h200")),
)  # fmt: skip
LENGTHS = (
    Bad("offsets fall", lambda: packed(cu_seqlens_q=int32(0, 4, 2)), ValueError, "cu_seqlens_q=[0, 4, 2]", ("rise", "cumsum")),
    Bad("offsets start late", lambda: packed(cu_seqlens_k=int32(1, 2, 6)), ValueError, "cu_seqlens_k=[1, 2, 6]", ("from 0",)),
    Bad("offsets past the end", lambda: packed(cu_seqlens_k=int32(0, 2, 7)), ValueError, "cu_seqlens_k=[0, 2, 7]",
        ("total of 6",)),
    Bad("offsets in int64", lambda: packed(cu_seqlens_q=torch.tensor([0, 2, 6])), TypeError, "cu_seqlens_q=torch.int64",
        ("torch.int32",)),
    Bad("float offsets", lambda: packed(cu_seqlens_k=torch.tensor([0.0, 6.0])), TypeError, "cu_seqlens_k=torch.float32",
        ("int32",)),
    Bad("offsets as a list", lambda: packed(cu_seqlens_q=[0, 2, 6]), TypeError, "cu_seqlens_q=list", ("int32 tensor",)),
    Bad("offsets None", lambda: packed(cu_seqlens_k=None), TypeError, "cu_seqlens_k=NoneType", ("int32 tensor",)),
    Bad("offsets elsewhere", lambda: packed(cu_seqlens_q=int32(0, 2, 6).to("meta")), ValueError, "cu_seqlens_q.device=meta",
        ("cpu",)),
    Bad("a sequence fewer", lambda: packed(cu_seqlens_k=int32(0, 6)), ValueError, "cu_seqlens_k=shape (2,)",
        ("2 sequences", "(batch + 1,)")),
    Bad("offsets of rank 2", lambda: packed(cu_seqlens_q=int32(0, 2, 6)[None]), ValueError, "cu_seqlens_q=shape (1, 3)",
        ("(batch + 1,)",)),
    Bad("offsets of rank 0", lambda: packed(cu_seqlens_q=torch.tensor(0).int()), ValueError, "cu_seqlens_q=shape ()",
        ("(batch + 1,)",)),
    Bad("no offsets", lambda: packed(cu_seqlens_q=int32(), cu_seqlens_k=int32()), ValueError, "cu_seqlens_q=shape (0,)",
        ("(batch + 1,)",)),
    Bad("used of another length", lambda: packed(seqused_k=int32(2, 4, 0)), ValueError, "seqused_k=shape (3,)",
        ("2 sequences", "(batch,)")),
    Bad("more used than there is", lambda: packed(seqused_k=int32(3, 4)), ValueError, "seqused_k=[3, 4]", ("[2, 4]", "length")),
    Bad("negative used", lambda: packed(seqused_q=int32(-1, 4)), ValueError, "seqused_q=[-1, 4]", ("length",)),
    Bad("used in int64", lambda: packed(seqused_q=torch.tensor([2, 4])), TypeError, "seqused_q=torch.int64", ("int32",)),
    Bad("used as a list", lambda: packed(seqused_q=[2, 4]), TypeError, "seqused_q=list", ("torch.Tensor",)),
    Bad("plan of half a packing", lambda: plan((6, 4, 8), (6, 4, 8), cu_seqlens_q=(3,)), ValueError, "cu_seqlens_k=None",
        ("both",)),
    Bad("plan of a packed bias", lambda: plan((6, 4, 8),
        (6, 4, 8), cu_seqlens_q=(3,), cu_seqlens_k=(3,), bias=(1, 4, 1, 6)), ValueError,
        "bias=shape (1, 4, 1, 6)", ("dense layout",)),
    Bad("plan of a packed mask", lambda: plan((6, 4, 8),
        (6, 4, 8), cu_seqlens_q=(3,), cu_seqlens_k=(3,), mask=Mask.padding(int32(1, 2))),
        ValueError, "mask.key_end=", ("cu_seqlens",)),
    Bad("plan of another library's option", lambda: plan((1, 4, 2, 8), (1, 4, 2, 8), window_size=(4, 0)), TypeError,
        "window_size=(4, 0)", ("no such option", "window")),
    Bad("plan of the inside", lambda: plan((1, 4, 2, 8), (1, 4, 2, 8), left=4), TypeError, "left=4", ("window",)),
    Bad("plan of a dtype by name", lambda: plan((1, 4, 2, 8), (1, 4, 2, 8), dtype="bf16"), TypeError, "dtype='bf16'",
        ("torch.bfloat16",)),
    Bad("plan of another library's cache", lambda: plan_kvcache((2, 1, 4, 8), (2, 9, 4, 8), block_table=(2, 4)), TypeError,
        "block_table=(2, 4)", ("page_table",)),
    Bad("a dense plan of packed lengths", lambda: plan((1, 4, 2, 8), (1, 4, 2, 8), seqused_q=(1,)), TypeError, "seqused_q=(1,)",
        ("no such option",)),
    Bad("plan of no shape", lambda: plan((1, 4, -2, 8), (1, 4, 2, 8)), ValueError, "q=(1, 4, -2, 8)", ("from 0 on",)),
    Bad("plan of a bias of no shape", lambda: plan((1, 4, 2, 8), (1, 4, 2, 8), bias=(-1,)), ValueError, "bias=(-1,)",
        ("tensor",)),
    Bad("plan of a cache without rows", lambda: plan_kvcache((), (2, 9, 4, 8), (2, 9, 4, 8)), ValueError, "q=shape ()",
        ("(batch, seqlen_q, heads_q, head_dim)",)),
    Bad("plan of a cache with listed offsets", lambda: plan_kvcache((2, 4, 8), (2, 9, 4, 8), (2, 9, 4, 8), cu_seqlens_q=[0, 2]),
        TypeError, "cu_seqlens_q=list", ("torch.Tensor",)),
    Bad("plan of lengths by name", lambda: plan_kvcache((2, 1, 4, 8), (2, 9, 4, 8), (2, 9, 4, 8), cache_seqlens="all"),
        TypeError, "cache_seqlens=str", ("torch.Tensor",)),
    Bad("plan of negative pages", lambda: plan_kvcache((2, 1, 4, 8), (2, 9, 4, 8), (2, 9, 4, 8), page_table=(2, -1)),
        ValueError, "page_table=(2, -1)", ("from 0 on",)),
    Bad("flash_attn's window", lambda: dense(window_size=(4, 0)), TypeError, "window_size=(4, 0)", ("it is window here",)),
    Bad("flash_attn's lse", lambda: packed(return_attn_probs=True), TypeError, "return_attn_probs=True",
        ("it is return_lse here",)),
    Bad("flash_attn's longest length", lambda: packed(max_seqlen_q=4), TypeError, "max_seqlen_q=4", ("leave it out",)),
    Bad("flash_attn's longest lengths by position",
        lambda: attention_varlen(*(tensor(6, 4, 8),) * 3, int32(0, 6), int32(0, 6), 6, 6), TypeError,
        "attention_varlen=7 arguments by position", ("no longest length", "options by name")),
    Bad("a merge of integers", lambda: tessera.merge(*(x.int() for x in (tensor(1, 2, 1, 8), tensor(1, 1, 2)) * 2)), TypeError,
        "out_a=torch.int32", ("return_lse=True",)),
    Bad("torch's mask of packed rows", lambda: packed(attn_mask=None), TypeError, "attn_mask=None", ("use some of",)),
    Bad("dropout's mask of no size", lambda: tessera.dropout_mask(1, 1, 1, -2, 2, 0.5), ValueError, "seqlen_q=-2",
        ("from 0 on",)),
    Bad("dropout's mask by a word", lambda: tessera.dropout_mask("x", 1, 1, 2, 2, 0.5), TypeError, "seed=str", ("int",)),
    Bad("dropout's mask of a seed no call takes", lambda: tessera.dropout_mask(-1, 1, 1, 2, 2, 0.5), ValueError, "seed=-1",
        ("2**63",)),
    Bad("compile a number ahead", lambda: warmup(3), TypeError, "problems=int", ("plan_kvcache",)),
    Bad("compile a shape ahead", lambda: warmup([(1, 4, 2, 8)]), TypeError, "problems=tuple", ("plan_kvcache",)),
)  # fmt: skip
BAD = {bad.name: bad for bad in (*TENSORS, *MASKS, *SCORES, *LENGTHS)}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    bad = BAD[name]
    with pytest.raises(bad.error) as caught:
        bad.call()
    message = str(caught.value)
    assert type(caught.value) is bad.error, message
    assert bad.argument in message
    for part in bad.says:
        assert part in message, message


def test_a_good_call_first_does_not_let_a_bad_one_through() -> None:
    """Calls are remembered by their arguments: no bad one may pass for a good one that went before."""
    dense(softmax_scale=1.0, dropout_p=0.5, seed=1, causal=True)
    packed(seqused_k=int32(2, 4))
    for name in ("scale is a bool", "seed is a bool", "dropout without a seed", "negative seed", "offsets fall"):
        test_bad_input(name)
    dense(alibi_slopes=tensor(4))
    test_bad_input("slopes want a gradient")
    with pytest.raises(TypeError, match="softmax_scale=bool"):
        dense(softmax_scale=True, dropout_p=0.5, seed=1, causal=True)


def test_a_bad_call_first_does_not_stand_in_the_way_of_a_good_one() -> None:
    """What is remembered of a call is found by equal words: 4.0 is no number of keys or columns, and equals 4, which is."""
    with pytest.raises(TypeError, match=r"mask\.left=4\.0"):
        dense(mask=Mask(left=4.0, right=1), return_lse=True)
    out, _ = dense(mask=Mask(left=4, right=1), return_lse=True)
    assert out.shape == (2, 6, 4, 8)
    q, k_cache, lengths = tensor(2, 1, 4, 8), tensor(2, 9, 4, 8), int32(3, 4)
    with pytest.raises(TypeError, match=r"head_dim_v=4\.0"):
        attention_with_kvcache(q, k_cache, cache_seqlens=lengths, head_dim_v=4.0)
    assert attention_with_kvcache(q, k_cache, cache_seqlens=lengths, head_dim_v=4).shape == (2, 1, 4, 4)


def test_compiled_calls_refuse_too() -> None:
    """A traced call is checked when it runs, with the message of the eager one."""
    torch._dynamo.reset()
    fast = torch.compile(dense, backend="eager")
    with pytest.raises(ValueError, match=r"softcap=-1\.0: a cap is positive"):
        fast(softcap=-1.0)
    with pytest.raises(ValueError, match="heads=4 query, 3 key/value"):
        fast(k=tensor(2, 6, 3, 8), v=tensor(2, 6, 3, 8))


# The support matrix

COLUMNS = {column.title: column for column in support.columns()}
FEATURES = {f"{feature.group}: {feature.name}": feature for feature in support.FEATURES}
PAIRS = [(title, name) for title in COLUMNS for name in FEATURES]
REFUSED = [(title, name) for title, name in PAIRS if COLUMNS[title].refusal(FEATURES[name])]


def can_be_stated(feature: support.Feature, column: support.Column) -> bool:
    """Whether there is such a problem on the column's device, for a backend to refuse."""
    try:
        feature.problem(column.device)
    except ValueError:
        return False
    return True


def test_committed_matrix_is_current() -> None:
    assert MATRIX.read_text() == "\n".join(support.matrix()) + "\n", "run: python -m tessera.support > docs/support_matrix.md"


def test_every_backend_has_its_column() -> None:
    assert {column.backend for column in COLUMNS.values()} == set(tessera.backend_names())
    assert len(FEATURES) == len(support.FEATURES), "two features share a name"


@pytest.mark.parametrize(("title", "name"), REFUSED)
def test_refused_features_are_refused_by_name(title: str, name: str) -> None:
    """Naming the backend (or hoping for the kernel) does not get round a reason."""
    column, feature = COLUMNS[title], FEATURES[name]
    reasons = column.refusal(feature)
    if not can_be_stated(feature, column):  # refused before any backend is asked
        with pytest.raises(ValueError, match=re.escape(reasons[0])):
            feature.problem(column.device)
        return
    problem = feature.problem(column.device)
    if column.kernel is not None:
        choice = dispatch.select(problem, column.device, column.backend).forward
        assert choice.kernel != column.kernel
        assert reasons[0] in choice.why
        return
    with pytest.raises(Unsupported) as caught:
        dispatch.select(problem, column.device, column.backend)
    for reason in reasons:
        assert reason in str(caught.value)
    assert list(caught.value.refusals) == [column.backend]
    for reason_parts in caught.value.refusals[column.backend]:
        assert all(vars(reason_parts).values()), reason_parts  # argument, value, why and instead


@pytest.mark.parametrize(("title", "name"), [pair for pair in PAIRS if pair not in REFUSED])
def test_supported_features_are_planned(title: str, name: str) -> None:
    column, feature = COLUMNS[title], FEATURES[name]
    made = dispatch.select(feature.problem(column.device), column.device, column.backend)
    assert made.backend == column.backend
    if column.kernel == ATEN:
        assert made.forward.kernel == ATEN
    assert (made.backward is not None) == (feature.gradients is Gradients.INPUTS)
    assert made.to_json()["backend"] == column.backend
    assert str(made.problem) in str(made)


@pytest.mark.parametrize("name", [name for name in FEATURES if (f"cpu: {TILED}", name) not in REFUSED])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_supported_features_run(name: str, backend: str) -> None:
    """A "yes" of the CPU's columns is a result that the oracle agrees with."""
    request = FEATURES[name].request("cpu")._replace(backend=backend)
    failed = [str(comparison) for comparison in verify.run(request) if not comparison.ok]
    assert not failed, "; ".join(failed)


def test_what_no_backend_can_prints_every_reason() -> None:
    """Without a name, Unsupported holds each backend's reasons; here all backends but those for any device."""
    problem = FEATURES["Dtypes: bfloat16"].problem(COLUMNS[f"cpu: {TILED}"].device)
    with pytest.raises(Unsupported, match="backend='cpu' cannot run this problem on NVIDIA H200") as caught:
        dispatch.select(problem, support.KNOWN_DEVICES["h200"], "cpu")
    (reason,) = caught.value.refusals["cpu"]
    assert (reason.argument, reason.instead) == ("device", "use q.cpu() or another backend")
