"""Attention over a KV cache on the CPU, against the oracle."""

from __future__ import annotations

import torch

import tessera


def test_pages_append_and_splits_agree_with_plain_attention() -> None:
    pool = torch.randn(20, 2, 16, 2, 64)
    k_cache, v_cache = pool[:, 0], pool[:, 1]
    table = torch.randperm(20)[:12].view(3, 4).int()
    lengths = torch.tensor([5, 33, 0], dtype=torch.int32)
    k, v, q = torch.randn(3, 4, 2, 64), torch.randn(3, 4, 2, 64), torch.randn(3, 4, 8, 64)
    options = {"page_table": table, "causal": True, "return_lse": True}
    out, lse = tessera.attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, k=k, v=v, **options)
    for b in range(3):
        rows = int(lengths[b]) + 4
        keys, values = (cache[table[b].long()].flatten(0, 1)[:rows] for cache in (k_cache, v_cache))
        assert torch.equal(keys[-4:], k[b])
        assert torch.equal(values[-4:], v[b])
        ref, ref_lse = tessera.attention(q[b : b + 1], keys[None], values[None], causal=True, return_lse=True)
        torch.testing.assert_close(out[b : b + 1], ref)
        torch.testing.assert_close(lse[b : b + 1], ref_lse)
    split, split_lse = tessera.attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths + 4, num_splits=3, **options)
    torch.testing.assert_close(split, out)
    torch.testing.assert_close(split_lse, lse)
