"""The random server, 12,000 steps in all: paged and contiguous, windows, splits; and that it notices a backend that errs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from serving_simulation import Server, Setting
from torch import Tensor

from tessera.backends.cpu.cache_rows import CacheRows, Span

SETTINGS = {
    "pages of 4": Setting(),
    "pages of 4, another seed": Setting(options={"num_splits": 3}),
    "pages of 1, window": Setting(page_size=1, pages=120, window=9),
    "pages of 8, one head": Setting(page_size=8, heads_kv=1, heads_q=3, pages=20),
    "pages of 16, bfloat16": Setting(page_size=16, capacity=48, pages=18, dtype=torch.bfloat16, head_dim=16),
    "contiguous": Setting(page_size=32, pages=9),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_server(name: str, record_property: Callable[[str, object], None]) -> None:
    counts = Server(SETTINGS[name], seed=len(name)).run(2000)
    record_property("random server", dict(counts))
    expected = {"joined", "left", "forked", "rolled back", "steps dense", "steps packed"}
    expected |= {"copied on write"} if SETTINGS[name].page_size > 1 else set()
    assert all(counts[what] > 50 for what in expected), counts
    assert counts["comparisons"] > 3000
    assert counts["pages taken"] > 10 * SETTINGS[name].pages


def _one_key_late(self: CacheRows, span: Span, begin: int) -> tuple[Tensor, Tensor]:
    return GATHER(self, span, min(begin + (span.seqlen > 30), span.seqlen))


def _next_page(self: CacheRows, span: Span, positions: range) -> tuple[Tensor, Tensor]:
    pages, rows = PLACES(self, span, positions)
    return torch.where(rows.new_tensor(positions) == 24, pages ^ 1, pages), rows


GATHER, PLACES = CacheRows.gather, CacheRows._places


@pytest.mark.parametrize(("method", "wrong"), [("gather", _one_key_late), ("_places", _next_page)])
def test_the_simulation_notices(method: str, wrong: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheRows, method, wrong)
    with pytest.raises((AssertionError, ValueError)):
        Server(Setting(), seed=0).run(2000)


def test_the_simulation_notices_a_write_into_a_shared_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its copy on write the server itself is wrong, and says so."""
    server = Server(Setting(), seed=0)
    monkeypatch.setattr(Server, "_fork", _fork_without_counting)
    with pytest.raises(AssertionError):
        server.run(2000)


def _fork_without_counting(self: Server, sequence: object) -> None:
    for page in sequence.pages:  # type: ignore[attr-defined]
        self.users[page] += 1
    FORK(self, sequence)  # type: ignore[arg-type]
    for page in sequence.pages:  # type: ignore[attr-defined]
        self.users[page] -= 2


FORK = Server._fork
