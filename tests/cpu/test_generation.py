"""Generating from a paged cache: whoever joins, waits and leaves gets eager attention's tokens; long contexts come out right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera import attention_with_kvcache
from tessera.bench import llama
from tessera.bench.contexts import contexts
from tessera.bench.llama import Appending, Cache, Llama, LlamaShape, eager_logits
from tessera.bench.server import Judged, Ragged, Request, Served, Server, judge

SHAPE = LlamaShape(layers=2, hidden=64, heads_q=4, heads_kv=2, head_dim=16, width=96, vocabulary=97, positions=256)
LOAD = Ragged(10, prompt=(1, 60), new_tokens=(1, 20)).requests(SHAPE.vocabulary)


def model(dtype: torch.dtype = torch.float32) -> Llama:
    return Llama(SHAPE, dtype, "cpu")


def serve(dtype: torch.dtype = torch.float32, pages: int = 13, page_size: int = 8, **options: Any) -> tuple[Served, Judged]:
    """Few seats, and pages for about two sequences."""
    server = Server(model(dtype), Cache.empty(model(dtype), pages, page_size), **({"seats": 3} | options))
    served = server.run(LOAD)
    return served, judge(model(dtype), model(), LOAD, served)


@pytest.mark.parametrize("appending", Appending)
def test_answers_are_eager_attentions_own(appending: Appending) -> None:
    served, judged = serve(appending=appending)
    new = served.new_tokens
    assert judged == Judged(tokens=new, equal=new, near=0, exact=new, eager_exact=new)
    assert judged.ok
    assert [len(answer) for answer in served.answers] == [request.new_tokens for request in LOAD]
    assert served.prompt_tokens == sum(len(request.prompt) for request in LOAD)
    assert served.waited > 0  # somebody had to
    assert 1 < served.most_seated <= 3
    assert served.peak_pages <= served.pages == 12
    assert len({token for answer in served.answers for token in answer}) > 20


@pytest.mark.parametrize(("pages", "page_size", "seats"), [(200, 1, 10), (3, 256, 1), (100, 8, 10)])
def test_the_answers_do_not_depend_on_seats_and_pages(pages: int, page_size: int, seats: int) -> None:
    assert serve(pages=pages, page_size=page_size, seats=seats)[0].answers == serve()[0].answers


def test_a_server_can_be_used_again() -> None:
    """Every page came back, and what they hold from before is not read."""
    server = Server(model(), Cache.empty(model(), 13, 8), 3)
    first = server.run(LOAD)
    again = server.run(LOAD[::-1])
    assert sorted(server._free) == list(range(1, 13))
    assert server._promised == 0
    assert again.answers == first.answers[::-1]


def test_bfloat16_answers_are_as_good() -> None:
    served, judged = serve(torch.bfloat16)
    assert judged.ok
    assert judged.equal > 0.8 * served.new_tokens
    assert abs(judged.exact - judged.eager_exact) < 0.1 * served.new_tokens


def test_a_wrong_token_is_noticed() -> None:
    served, _ = serve()
    answers = list(served.answers)
    answers[4] = (*answers[4][:-1], (answers[4][-1] + 1) % SHAPE.vocabulary)
    judged = judge(model(), model(), LOAD, replace(served, answers=tuple(answers)))
    assert judged.equal == served.new_tokens - 1
    assert not judged.ok


WRONG: dict[str, dict[str, Any]] = {
    "window": {"window": (12, 0)},
    "other pairs": {"rotary_interleaved": True},
    "a later row": {"causal": False},
}


@pytest.mark.parametrize("name", WRONG)
def test_attention_that_is_not_eagers_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **options: Any) -> Any:
        return attention_with_kvcache(*arguments, **(options | WRONG[name]))

    monkeypatch.setattr(llama, "attention_with_kvcache", wrong)
    assert not serve()[1].ok


@pytest.mark.parametrize("request_", [Request((), 3), Request((1, 2), 0), Request((1,) * 90, 8)], ids=["nothing", "0 new", "97"])
def test_what_can_never_be_seated_is_refused(request_: Request) -> None:
    server = Server(model(), Cache.empty(model(), 13, 8), 3)
    with pytest.raises(ValueError, match="96 rows at most fit"):
        server.run([request_])


def test_eager_logits_know_nothing_of_later_tokens() -> None:
    tokens = torch.arange(20)
    torch.testing.assert_close(eager_logits(model(), tokens)[:12], eager_logits(model(), tokens[:12]))


@pytest.mark.parametrize("appending", Appending)
def test_long_contexts_are_the_plain_formulas(appending: Appending) -> None:
    found = list(contexts(model(), (64, 192), 32, 8, appending))
    assert [context.tokens for context in found] == [64, 192]
    assert all(context.ok for context in found)
    first, second = found
    assert second.prefill_s > first.prefill_s
    assert second.cache_bytes == 2 * 2 * 192 * 2 * 16 * 4
    assert second.scores_bytes == 4 * 192 * 192 * 4


def test_a_context_cut_short_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **options: Any) -> Any:
        return attention_with_kvcache(*arguments, **(options | {"window": (100, 0)}))

    monkeypatch.setattr(llama, "attention_with_kvcache", wrong)
    assert [context.ok for context in contexts(model(), (64, 192), 32, 8)] == [True, False]


def test_the_command_shows_both(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    from typer.testing import CliRunner

    from tessera.commands import app

    figures = tmp_path / "g.json"
    result = CliRunner().invoke(app, ["demo", "--generate", "--quick", "--json", str(figures)])
    assert result.exit_code == 0, result.output
    assert "eager's own" in result.output
    data = json.loads(figures.read_text())
    assert data["ok"] is True
    assert data["judged"]["tokens"] == data["judged"]["equal"] == data["served"]["new_tokens"]
    assert [context["tokens"] for context in data["contexts"]] == [256, 512]
