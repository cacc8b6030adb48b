"""Generating on Hopper: a decoding step in a CUDA graph while sequences join, grow and leave; long contexts in pages."""

from __future__ import annotations

import pytest
import torch

from tessera.bench.contexts import contexts
from tessera.bench.llama import Cache, Llama, LlamaShape
from tessera.bench.server import Ragged, Server, judge

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

SHAPE = LlamaShape(layers=2, hidden=256, heads_q=8, heads_kv=2, head_dim=64, width=512, vocabulary=500, positions=4096)
LONG = LlamaShape(layers=1, hidden=512, heads_q=16, heads_kv=4, head_dim=128, width=512, vocabulary=500, positions=1 << 15)


@pytest.mark.parametrize("page_size", [16, 64])
def test_answers_are_as_good_as_eager_attentions(page_size: int) -> None:
    requests = Ragged(20, prompt=(1, 700), new_tokens=(1, 40)).requests(SHAPE.vocabulary)
    model, exact = Llama(SHAPE, torch.bfloat16, "cuda"), Llama(SHAPE, torch.float32, "cuda")
    exact.load_state_dict(model.state_dict())
    server = Server(model, Cache.empty(model, 1 + 2048 // page_size, page_size), 4)
    served = server.run(requests)
    judged = judge(model, exact, requests, served)
    assert judged.ok, judged
    assert judged.equal > 0.8 * judged.tokens
    assert judged.exact > 0.9 * judged.eager_exact
    assert served.waited > 0
    assert server.run(requests).answers == served.answers  # replayed on pages that hold what was there before


@pytest.mark.parametrize("page_size", [64, 256])
def test_long_contexts_are_the_plain_formulas(page_size: int) -> None:
    found = list(contexts(Llama(LONG, torch.bfloat16, "cuda"), (4096, 16384, 20480), 2048, page_size))
    assert all(context.ok for context in found), found
