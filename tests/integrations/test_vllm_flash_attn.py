"""vLLM's attention by its signature: prompts, chunks and single tokens over pages, packed keys, and what is refused."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from torch import Tensor

import tessera
from tessera.integrations.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

SIGNATURE = (
    "q", "k", "v", "max_seqlen_q", "cu_seqlens_q", "max_seqlen_k", "cu_seqlens_k", "seqused_k", "q_v", "dropout_p",
    "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic", "return_attn_probs", "block_table",
    "return_softmax_lse", "out", "scheduler_metadata", "q_descale", "k_descale", "v_descale", "num_splits", "output_scale",
    "fa_version", "s_aux", "cp_world_size", "cp_rank", "cp_tot_seqused_k",
)  # fmt: skip
ROWS, USED = (1, 12, 5, 1), (37, 12, 30, 1)
"""Of a batch's sequences: a single token, a prompt, a chunk of one, a first token."""


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


OFFSETS = int32(0, 1, 13, 18, 19)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, pools of K and V and the block table; a pool's pages lie beside each other as vLLM's do, (2, pages, ...)."""
    k, v = torch.randn(2, 20, 8, 2, 16).to(dtype)
    return torch.randn(sum(ROWS), 4, 16), k, v, torch.randperm(20, dtype=torch.int32).view(4, 5)


def served(q: Tensor, k: Tensor, v: Tensor, table: Tensor, **options: object) -> Tensor:
    return flash_attn_varlen_func(
        q=q, k=k, v=v, max_seqlen_q=12, cu_seqlens_q=OFFSETS, max_seqlen_k=37, seqused_k=int32(*USED), block_table=table,
        causal=True, fa_version=3, **options,
    )  # fmt: skip


def expected(q: Tensor, k: Tensor, v: Tensor, table: Tensor, **options: object) -> Tensor:
    """Sequence by sequence, its keys gathered."""
    found = []
    for rows, used, pages in zip(q.split(ROWS), USED, table, strict=True):
        own = (x[pages.long()].flatten(0, 1)[:used][None].float() for x in (k, v))
        found.append(tessera.attention(rows[None], *own, causal=True, **options)[0])
    return torch.cat(found)


def test_arguments_stand_in_upstreams_order():
    given = inspect.signature(flash_attn_varlen_func).parameters
    assert tuple(name for name, one in given.items() if one.kind is not one.VAR_KEYWORD) == SIGNATURE


@pytest.mark.parametrize("window", [None, [-1, -1], [9, 0]], ids=str)
def test_a_batch_over_pages(window: list[int] | None):
    pool = batch()
    limits = None if window in (None, [-1, -1]) else tuple(window)
    sinks = torch.randn(4)
    out = served(*pool, window_size=window, softcap=9.0, softmax_scale=0.3, s_aux=sinks, num_splits=2)
    wanted = expected(*pool, window=limits, softcap=9.0, softmax_scale=0.3, sinks=sinks)
    torch.testing.assert_close(out, wanted)


def test_the_result_goes_where_the_server_wants_it():
    q, *pool = batch()
    metadata = get_scheduler_metadata(4, 12, 37, 4, 2, 16, int32(*USED), causal=True)
    place = torch.full((32, 4, 16), torch.nan)
    out, lse = served(q, *pool, out=place[: len(q)], return_softmax_lse=True, scheduler_metadata=metadata)
    assert out.data_ptr() == place.data_ptr()
    assert torch.equal(place[: len(q)], served(q, *pool))
    assert place[len(q) :].isnan().all()
    assert lse.shape == (4, len(q))


def test_scales_are_those_of_an_fp8_cache():
    scales = {name: torch.full((), 3.0).expand(4, 2) for name in ("q_descale", "k_descale", "v_descale")}
    q, k, v, table = batch()
    assert torch.equal(served(q, k, v, table, **scales), served(q, k, v, table))
    rounded = [x.to(torch.float8_e4m3fn) for x in (k, v)]
    out = served(q, *rounded, table, **scales)
    torch.testing.assert_close(out, expected(q, *(3 * x.float() for x in rounded), table), atol=1e-4, rtol=1e-4)


def test_an_encoders_packed_keys():
    q, k, v = (torch.randn(19, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    slopes = torch.rand(4)
    out = flash_attn_varlen_func(q, k, v, 12, OFFSETS, 12, OFFSETS, alibi_slopes=slopes, fa_version=2)
    assert torch.equal(out, tessera.attention_varlen(q, k, v, OFFSETS, OFFSETS, alibi_slopes=slopes))
    out.sum().backward()
    assert k.grad is not None


def packed(**options: object) -> object:
    q, k, v = (torch.randn(19, heads, 16) for heads in (4, 2, 2))
    return flash_attn_varlen_func(q, k, v, 12, OFFSETS, 12, **({"cu_seqlens_k": OFFSETS} | options))


REFUSED = {
    "q_v": partial(packed, q_v=torch.zeros(1)),
    "dropout_p": partial(packed, dropout_p=0.1),
    "cu_seqlens_k": partial(packed, cu_seqlens_k=None),
    "alibi_slopes": lambda: served(*batch(), alibi_slopes=torch.rand(4)),
    "seqused_k": lambda: packed(cu_seqlens_k=None, block_table=int32(1)[None]),
    "cp_world_size": partial(packed, cp_world_size=2),
    "output_scale": partial(packed, output_scale=torch.ones(1)),
    "mask_mod": partial(packed, mask_mod=lambda *_: True),
}


@pytest.mark.parametrize("argument", REFUSED)
def test_what_is_not_served_is_refused_by_name(argument: str):
    with pytest.raises(ValueError, match=rf"^{argument}=.*: .*; \w+"):
        REFUSED[argument]()
