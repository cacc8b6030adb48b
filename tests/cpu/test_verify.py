"""The judge itself: whatever else the tests say rests on `tessera.verify` and `tessera.serving.verify` finding what is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tessera import operators, verify
from tessera.cases import CASES
from tessera.serving import operators as serving_operators
from tessera.serving import verify as serving_verify
from tessera.serving.cases import CACHE_CASES
from tessera.serving.operands import CacheRequest
from tessera.verify import Oracle, compare

INF, NAN = float("inf"), float("nan")


def _one(value: float) -> Callable[[Tensor], Tensor]:
    """With that in one place."""

    def changed(x: Tensor) -> Tensor:
        x = x.detach().clone()
        x.view(-1)[x.numel() // 2] = value
        return x

    return changed


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "one value": lambda x: _one(x.view(-1)[x.numel() // 2].item() + 0.1)(x),
    "nan": _one(NAN),
    "inf": _one(INF),
    "a tenth too large": lambda x: x * 1.1,
    "zeros": torch.zeros_like,
    "of another shape": lambda x: x[:-1],
}


@pytest.mark.parametrize("how", WRONG)
def test_wrong_results_are_found(how: str) -> None:
    ref = torch.randn(7, 30, dtype=torch.float64)
    eager = ref.bfloat16().float().bfloat16()
    assert compare("out", eager, ref, eager).ok
    assert not compare("out", WRONG[how](eager), ref, eager).ok


def test_an_empty_row_must_be_one_and_another_must_not() -> None:
    ref = torch.tensor([0.5, -INF, 2.0], dtype=torch.float64)
    eager = ref.float()
    assert compare("lse", eager, ref, eager).ok
    for wrong in ([0.5, 0.0, 2.0], [0.5, INF, 2.0], [0.5, NAN, 2.0], [-INF, -INF, 2.0]):
        assert not compare("lse", torch.tensor(wrong), ref, eager).ok


@pytest.mark.parametrize("how", WRONG)
def test_each_gradient_is_looked_at(how: str) -> None:
    """One that is wrong fails alone: q's, k's, v's, a bias's, the sinks'."""
    request = CASES["everything"].request(requires_grad=True)
    oracle = Oracle.of(request)
    out, lse = operators.forward(request)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    names, inputs = verify.differentiated(request)
    assert set(names) >= {"q", "k", "v", "bias", "sinks"}
    found = dict(zip(names, verify._gradients(out, lse, dout, dlse, inputs), strict=True))
    assert all(compared.ok for compared in oracle.gradients(out, found, dout, dlse))
    for name in names:
        spoilt = found | {name: WRONG[how](found[name])}
        assert [compared.name.split()[0] for compared in oracle.gradients(out, spoilt, dout, dlse) if not compared.ok] == [
            f"d{name}"
        ]


@pytest.mark.parametrize("which", [0, 1], ids=["out", "lse"])
def test_a_backend_that_errs_is_noticed(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = operators.forward

    def wrong(request: object) -> tuple[Tensor, ...]:
        results = list(right(request))
        results[which] = results[which] + 0.01
        return tuple(results)

    request = CASES["causal"].request()
    assert [compared.ok for compared in verify.run(request)] == [True, True]
    monkeypatch.setattr(operators, "forward", wrong)
    assert [compared.ok for compared in verify.run(request)] == [which == 1, which == 0]


@pytest.mark.parametrize("what", ["out", "lse", "k", "v"])
def test_a_step_that_errs_or_writes_where_it_must_not_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = serving_operators.forward

    def wrong(request: CacheRequest) -> tuple[Tensor, Tensor]:
        out, lse = right(request)
        if what in ("k", "v"):
            cache = request.k_cache if what == "k" else request.v_cache
            cache[request.page_table[0, 0], 0] += 1.0
        return (out + 0.1, lse) if what == "out" else (out, lse + 0.1) if what == "lse" else (out, lse)

    request = CACHE_CASES["append to pages"].request("cpu", torch.float32)
    assert all(compared.ok for compared in serving_verify.run(request))
    monkeypatch.setattr(serving_operators, "forward", wrong)
    assert not all(compared.ok for compared in serving_verify.run(CACHE_CASES["append to pages"].request("cpu", torch.float32)))
