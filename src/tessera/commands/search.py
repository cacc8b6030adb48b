"""The demo's first half: questions answered by a MiniLM encoder over real text, with Tessera's attention and with eager's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.commands.corpus import Passage
from tessera.integrations.embeddings import load_encoder

OURS, EAGER = "tessera", "eager"
ALLOWED = 1e-5
"""The largest difference of a cosine similarity between the two runs, in float32."""

QUESTIONS = (
    "How do I get the three largest values of a list?",
    "What happens when the body of a with statement raises an exception?",
    "May I distribute a modified version of Python?",
    "How can I start another program and read what it prints?",
    "When is an object destroyed by the garbage collector?",
)

_BATCH = 32


@dataclass(frozen=True)
class Hit:
    """A passage that answers a question; `score` is the cosine similarity of their embeddings."""

    source: str
    text: str
    score: float


@dataclass(frozen=True)
class Answer:
    """A question and its best passages, the best first."""

    question: str
    hits: tuple[Hit, ...]


@dataclass(frozen=True)
class Search:
    """What the search found, with Tessera's attention, and how far eager's scores lie from it."""

    passages: int
    seconds: dict[str, float]
    answers: tuple[Answer, ...]
    score_difference: float
    embedding_difference: float
    allowed: float = ALLOWED

    @property
    def ok(self) -> bool:
        return self.score_difference <= self.allowed  # NaN fails


def search(passages: Sequence[Passage], questions: Sequence[str], best: int, on_texts: Callable[[str, int], None]) -> Search:
    """Embed everything twice and rank the passages for each question.

    `on_texts(attention, n)` is called as texts get embedded. Raises ImportError, in words, where the encoder is not installed.
    """
    texts = [passage.text for passage in passages] + list(questions)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # batches of like lengths: little padding
    encoders = {attention: load_encoder(attention) for attention in (OURS, EAGER)}
    vectors = {attention: torch.empty(len(texts), encoder.dim) for attention, encoder in encoders.items()}
    seconds = dict.fromkeys(encoders, 0.0)
    for encoder in encoders.values():
        encoder.embed(texts[:1])  # libraries loaded, threads started
    for first in range(0, len(order), _BATCH):
        batch = order[first : first + _BATCH]
        for attention, encoder in encoders.items():  # in turns, so that both meet the same machine
            start = time.perf_counter()
            vectors[attention][batch] = encoder.embed([texts[i] for i in batch], _BATCH)
            seconds[attention] += time.perf_counter() - start
            on_texts(attention, len(batch))
    scores = {name: _scores(own, len(passages)) for name, own in vectors.items()}
    answers = tuple(_answer(question, row, passages, best) for question, row in zip(questions, scores[OURS], strict=True))
    return Search(
        passages=len(passages),
        seconds=seconds,
        answers=answers,
        score_difference=(scores[OURS] - scores[EAGER]).abs().max().item(),
        embedding_difference=(vectors[OURS] - vectors[EAGER]).abs().max().item(),
    )


def _scores(vectors: Tensor, passages: int) -> Tensor:
    """(questions, passages): cosine similarities, summed in float64 so that only the encoders differ."""
    own = vectors.double()
    return own[passages:] @ own[:passages].T


def _answer(question: str, row: Tensor, passages: Sequence[Passage], best: int) -> Answer:
    top = row.topk(min(best, len(passages)))
    ranked = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Answer(question, tuple(Hit(passages[i].source, passages[i].text, score) for i, score in ranked))
