"""FlashAttention-3's and -2's functions by their signatures: the calls mean what they mean there, and what differs is refused."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from torch import Tensor

import tessera
from tessera.integrations import flash_attn as flash2
from tessera.integrations import flash_attn_interface as flash

FP8 = ("q_descale", "k_descale", "v_descale")
TAIL = ("window_size", "attention_chunk", "softcap", "num_splits", "pack_gqa", "deterministic", "sm_margin", "return_attn_probs")
SIGNATURES = {
    "flash_attn_func": ("q", "k", "v", "softmax_scale", "causal", "qv", *FP8, *TAIL),
    "flash_attn_varlen_func": (
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_q", "seqused_k", "softmax_scale",
        "causal", "qv", *FP8, *TAIL,
    ),
    "flash_attn_qkvpacked_func": (
        "qkv", "softmax_scale", "causal", *FP8, "window_size", "attention_chunk", "softcap", "deterministic", "num_heads_q",
        "sm_margin", "return_attn_probs",
    ),
    "flash_attn_with_kvcache": (
        "q", "k_cache", "v_cache", "k", "v", "qv", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx",
        "cache_leftpad", "page_table", "cu_seqlens_q", "cu_seqlens_k_new", "max_seqlen_q", "rotary_seqlens", *FP8,
        "softmax_scale", "causal", "window_size", "attention_chunk", "softcap", "rotary_interleaved", "scheduler_metadata",
        "num_splits", "pack_gqa", "sm_margin", "return_softmax_lse",
    ),
}  # fmt: skip
TAIL_2 = ("softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic", "return_attn_probs")
SIGNATURES_2 = {
    "flash_attn_func": ("q", "k", "v", "dropout_p", *TAIL_2),
    "flash_attn_qkvpacked_func": ("qkv", "dropout_p", *TAIL_2),
    "flash_attn_kvpacked_func": ("q", "kv", "dropout_p", *TAIL_2),
    "flash_attn_varlen_qkvpacked_func": ("qkv", "cu_seqlens", "max_seqlen", "dropout_p", *TAIL_2),
    "flash_attn_varlen_kvpacked_func": (
        "q", "kv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p", *TAIL_2,
    ),
    "flash_attn_varlen_func": (
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p", *TAIL_2, "block_table",
    ),
    "flash_attn_with_kvcache": (
        "q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad",
        "block_table", "softmax_scale", "causal", "window_size", "softcap", "rotary_interleaved", "alibi_slopes", "num_splits",
        "return_softmax_lse",
    ),
}  # fmt: skip


def qkv(seqlen_q: int = 70, seqlen_k: int = 90) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, seqlen_q, 4, 16), *torch.randn(2, 2, seqlen_k, 2, 16).unbind(0)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_stand_in_upstreams_order(name: str):
    assert tuple(inspect.signature(getattr(flash, name)).parameters) == SIGNATURES[name]


@pytest.mark.parametrize("name", SIGNATURES_2)
def test_arguments_stand_in_the_second_ones_order(name: str):
    assert tuple(inspect.signature(getattr(flash2, name)).parameters) == SIGNATURES_2[name]


@pytest.mark.parametrize("window", [(-1, -1), (20, 0), (20, -1)])
@pytest.mark.parametrize("causal", [False, True])
def test_dense(causal: bool, window: tuple[int, int]):
    q, k, v = qkv()
    limits = tuple(None if side == -1 else side for side in window)
    ours = tessera.attention(q, k, v, causal=causal, window=limits, softmax_scale=0.3, softcap=9.0, return_lse=True)
    out, lse = flash.flash_attn_func(q, k, v, 0.3, causal, window_size=window, softcap=9.0, return_attn_probs=True)
    assert torch.equal(out, ours[0])
    assert torch.equal(lse, ours[1])
    assert lse.shape == (2, 4, 70)
    assert torch.equal(flash.flash_attn_func(q, k, v, 0.3, causal, window_size=window, softcap=9.0, deterministic=True), out)


def test_gradients_reach_a_packed_projection():
    packed = torch.randn(2, 50, 3, 4, 16, requires_grad=True)
    grouped = torch.randn(2, 50, 8, 16, requires_grad=True)
    out = flash.flash_attn_qkvpacked_func(packed, causal=True)
    assert torch.equal(out, tessera.attention(*packed.unbind(2), causal=True))
    of_groups = flash.flash_attn_qkvpacked_func(grouped, causal=True, num_heads_q=4)
    assert torch.equal(of_groups, tessera.attention(grouped[:, :, :4], grouped[:, :, 4:6], grouped[:, :, 6:], causal=True))
    (out.sum() + of_groups.sum()).backward()
    assert packed.grad.abs().sum() > 0
    assert grouped.grad.abs().sum() > 0


def test_the_second_one_has_alibi_and_dropout():
    q, k, v = qkv()
    slopes = torch.rand(4)
    out, lse, nothing = flash2.flash_attn_func(q, k, v, 0.0, 0.3, True, alibi_slopes=slopes, return_attn_probs=True)
    expected = tessera.attention(q, k, v, causal=True, softmax_scale=0.3, alibi_slopes=slopes, return_lse=True)
    assert nothing is None
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    torch.manual_seed(7)
    dropped = flash2.flash_attn_func(q, k, v, 0.25)
    torch.manual_seed(7)
    seed = int(torch.randint(2**62, ()))
    assert torch.equal(dropped, tessera.attention(q, k, v, dropout_p=0.25, seed=seed))
    assert not torch.equal(dropped, flash2.flash_attn_func(q, k, v, 0.25))


def test_the_second_ones_packed_forms():
    packed = torch.randn(2, 30, 3, 4, 16)
    q, kv = packed[:, :, 0], packed[:, :, 1:]
    options = {"softmax_scale": 0.3, "causal": True, "window_size": (9, 0), "softcap": 8.0, "alibi_slopes": torch.rand(4)}
    expected = flash2.flash_attn_func(*packed.unbind(2), **options)
    assert torch.equal(flash2.flash_attn_qkvpacked_func(packed, **options), expected)
    assert torch.equal(flash2.flash_attn_kvpacked_func(q, kv, **options), expected)
    offsets = int32(0, 25, 60)
    total, q, kv = (x.flatten(0, 1) for x in (packed, q, kv))
    expected = flash2.flash_attn_varlen_func(*total.unbind(1), offsets, offsets, **options)
    assert torch.equal(flash2.flash_attn_varlen_qkvpacked_func(total, offsets, 35, **options), expected)
    assert torch.equal(flash2.flash_attn_varlen_kvpacked_func(q, kv, offsets, offsets, 35, 35, **options), expected)


def test_the_second_one_over_packed_sequences_and_pages():
    q, k, v = (x.flatten(0, 1) for x in qkv(60, 60))
    offsets = int32(0, 50, 120)
    out = flash2.flash_attn_varlen_func(q, k, v, offsets, offsets, 70, 70, window_size=(9, 0))
    assert torch.equal(out, tessera.attention_varlen(q, k, v, offsets, offsets, window=(9, 0)))
    q, k_cache, v_cache = qkv(3, 64)
    pool = [x.reshape(8, 16, 2, 16) for x in (k_cache, v_cache)]
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    step = flash2.flash_attn_with_kvcache(q, *pool, cache_seqlens=37, block_table=table, causal=True)
    assert torch.equal(step, tessera.attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=int32(37, 37), causal=True))
    each = int32(0, 3, 6), int32(0, 37, 74)
    packed = flash2.flash_attn_varlen_func(q.flatten(0, 1), *pool, *each, causal=True, block_table=table, return_attn_probs=True)
    torch.testing.assert_close(packed[0].view_as(step), step)
    assert packed[1].shape == (4, 6)


def test_packed_sequences():
    q, k, v = (x.flatten(0, 1) for x in qkv(60, 60))
    offsets, used = int32(0, 50, 120), int32(50, 33)
    out = flash.flash_attn_varlen_func(q, k, v, offsets, offsets, 70, 70, causal=True, seqused_k=used)
    assert torch.equal(out, tessera.attention_varlen(q, k, v, offsets, offsets, causal=True, seqused_k=used))


@pytest.mark.parametrize("lengths", [None, 37, int32(37, 20)], ids=["whole", "one number", "a tensor"])
@pytest.mark.parametrize("paged", [False, True])
def test_a_cache(paged: bool, lengths: int | Tensor | None):
    q, k_cache, v_cache = qkv(3, 64)
    table = None
    if paged:
        k_cache, v_cache = (x.reshape(8, 16, 2, 16) for x in (k_cache, v_cache))
        table = torch.arange(8, dtype=torch.int32).view(2, 4)
    expected = lengths if isinstance(lengths, Tensor) else int32(*[64 if lengths is None else lengths] * 2)
    ours = tessera.attention_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=expected, page_table=table, causal=True, return_lse=True
    )
    out, lse = flash.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, page_table=table, causal=True, return_softmax_lse=True
    )
    assert torch.equal(out, ours[0])
    assert torch.equal(lse, ours[1])


def test_a_servers_loop_may_ask_for_metadata():
    metadata = flash.get_scheduler_metadata(2, 1, 64, 4, 2, 16, torch.tensor([37, 37]), causal=True)
    q, k_cache, v_cache = qkv(2, 64)
    step = partial(flash.flash_attn_with_kvcache, q, k_cache, v_cache, cache_seqlens=37, causal=True)
    torch.testing.assert_close(step(scheduler_metadata=metadata, num_splits=3), step())


def test_new_keys_are_appended_in_place():
    q, k_cache, v_cache = qkv(2, 64)
    k, v = torch.randn(2, 2, 2, 2, 16).unbind(0)
    angles = torch.rand(64, 8)
    caches, ours = ([k_cache.clone(), v_cache.clone()] for _ in range(2))
    rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    out = flash.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=int32(5, 9), causal=True, **rotary)
    expected = tessera.attention_with_kvcache(q, *ours, k=k, v=v, cache_seqlens=int32(5, 9), causal=True, **rotary)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(caches, ours, strict=True))
    assert torch.equal(caches[1][1, 9:11], v[1])


def cached(**options: object) -> object:
    q, k_cache, v_cache = qkv(2, 64)
    return flash.flash_attn_with_kvcache(q, k_cache, v_cache, **({"cache_seqlens": 9} | options))


NEW = torch.zeros(2, 2, 2, 16)
REFUSED = {
    "qv": lambda: flash.flash_attn_func(*qkv(), qv=torch.zeros(1)),
    "k_descale": lambda: flash.flash_attn_func(*qkv(), k_descale=torch.ones(2, 2)),
    "attention_chunk": lambda: flash.flash_attn_func(*qkv(), attention_chunk=64),
    "rotary_seqlens": lambda: cached(rotary_seqlens=int32(1, 2)),
    "cu_seqlens_k_new": lambda: cached(cu_seqlens_k_new=int32(0, 2, 4)),
    "cache_seqlens": lambda: cached(cache_seqlens=None, k=NEW, v=NEW),
    "alibi_slopes": lambda: flash2.flash_attn_with_kvcache(*qkv(2, 64), cache_seqlens=9, alibi_slopes=torch.rand(4)),
    "causal": lambda: cached(k=NEW, v=NEW, rotary_cos=torch.ones(64, 8), rotary_sin=torch.ones(64, 8)),
}


@pytest.mark.parametrize("argument", REFUSED)
def test_what_is_not_served_is_refused_by_name(argument: str):
    with pytest.raises(ValueError, match=rf"^{argument}=.*: .*; \w+"):
        REFUSED[argument]()
