"""Every named case against the oracle: each dtype, each kernel that can run it, with gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tessera import calls, dispatch, operators, verify
from tessera.backends.cpu import ATEN, TILED, aten, portable
from tessera.backends.cpu.tiled import Tiles
from tessera.cases import CASES, Case
from tessera.device import Device
from tessera.operands import DTYPES, bind

CPU = Device.of(torch.device("cpu"))


def _kernel(case: Case, dtype: torch.dtype, backend: str = "cpu") -> str:
    problem, _ = bind(case.request("meta", dtype, requires_grad=True))
    return dispatch.select(problem, CPU, backend).forward.kernel


SERVED_BY_ATEN = [name for name, case in CASES.items() if _kernel(case, torch.float32) == ATEN]


@pytest.fixture
def _no_aten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The cpu backend as it is where torch's kernel computes nothing exactly."""
    dispatch.select.cache_clear()
    monkeypatch.setattr(calls, "_known", {})
    monkeypatch.setattr(aten, "limits_of", lambda *_: "this test wants the tiled kernel")
    yield
    dispatch.select.cache_clear()


def _check(case: Case, dtype: torch.dtype, backend: str) -> None:
    comparisons = verify.run(case.request(dtype=dtype, requires_grad=True)._replace(backend=backend))
    failed = [str(c) for c in comparisons if not c.ok]
    assert not failed, "; ".join(failed)
    names = {c.name for c in comparisons}
    assert names >= {"out", "lse", "dq", "dk", "dv"}, names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cpu(name: str, dtype: torch.dtype) -> None:
    _check(CASES[name], dtype, "cpu")


@pytest.mark.usefixtures("_no_aten")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SERVED_BY_ATEN)
def test_cpu_tiled_where_aten_could(name: str, dtype: torch.dtype) -> None:
    assert _kernel(CASES[name], dtype) == TILED
    _check(CASES[name], dtype, "cpu")


@pytest.mark.parametrize("name", CASES)
def test_small_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of odd sizes and few heads at a time: every loop over tiles runs many times, the softmax's maximum moves."""
    monkeypatch.setattr(calls, "_known", {})
    monkeypatch.setattr(portable, "tiles_for", lambda _: Tiles(rows=53, keys=71, scores=2 * 53 * 71))
    _check(CASES[name], torch.float32, "torch")


@pytest.mark.parametrize("name", CASES)
def test_torch(name: str) -> None:
    _check(CASES[name], torch.float32, "torch")


def test_both_kernels_are_tested() -> None:
    """The cases reach both kernels, and each reason for which torch's kernel is passed over but the device's."""
    assert len(SERVED_BY_ATEN) >= 10
    assert len(CASES) - len(SERVED_BY_ATEN) >= 10
    limits = {aten.limits_of(bind(case.request("meta"))[0], CPU) for case in CASES.values()} - {None}
    assert len(limits) >= 6, limits


@pytest.mark.parametrize("name", ["causal", "everything", "varlen, softcap, alibi, dropout"])
def test_two_runs_agree_bit_for_bit(name: str) -> None:
    """The cpu backend promises it for every problem; with `deterministic` it is asked for."""
    runs = []
    for _ in range(2):
        request = CASES[name].request(requires_grad=True)._replace(deterministic=True)
        out, lse = operators.forward(request)
        runs.append((out, lse, *torch.autograd.grad((out.sum() + lse[lse.isfinite()].sum()), (request.q, request.k, request.v))))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["causal", "gqa", "everything", "varlen, cross"])
def test_two_threads(name: str) -> None:
    """The suite runs with one thread a process; the kernels split their work by the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _check(CASES[name], torch.float32, "cpu")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["aten", "tiled"])
def test_no_query_heads(softcap: float) -> None:
    request = Case("", heads_q=0, heads_kv=2, seqlen_q=5, seqlen_k=7, softcap=softcap).request()
    out, lse = operators.forward(request)
    assert (out.shape, lse.shape) == ((2, 5, 0, 64), (2, 0, 5))


@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["aten", "tiled"])
def test_tokens_of_no_sequence_have_no_sink(softcap: float) -> None:
    """They are not rows with nothing to attend to, they are no rows: lse -inf, and nothing of theirs in the sinks' gradient."""
    request = Case("", lengths_q=(4, 3), lengths_k=(4, 3), sinks=True, softcap=softcap, head_dim=8).request(requires_grad=True)
    request = request._replace(seqused_q=torch.tensor([2, 3], dtype=torch.int32))
    out, lse = operators.forward(request)
    outside, inside = slice(2, 4), [0, 1, 4, 5, 6]
    assert (out[outside] == 0).all()
    assert (lse[:, outside] == float("-inf")).all()
    assert lse[:, inside].isfinite().all()
    (whole,) = torch.autograd.grad(lse, request.sinks, torch.ones_like(lse), retain_graph=True)
    (held,) = torch.autograd.grad(lse[:, inside].sum(), request.sinks)
    torch.testing.assert_close(whole, held)
