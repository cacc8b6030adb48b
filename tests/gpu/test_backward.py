"""The Hopper backward against the oracle: every gradient of every case it can run, and memory that must not be read."""

from __future__ import annotations

import pytest
import torch
from planned import planned
from poison import NAN, poison_free_memory
from torch import Tensor

from tessera.backends.hopper import BACKEND, HopperRunner
from tessera.cases import CASES, Case
from tessera.dispatch import InputGradients, Upstream
from tessera.operands import Operands, Request, bind
from tessera.problem import Problem
from tessera.verify import Oracle

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

LENGTHS = (100, 1, 700, 33, 512, 0, 257, 900, 64, 31, 5, 1000)
MANY = {"batch": 3, "seqlen_q": 1100, "seqlen_k": 1100, "heads_q": 12, "heads_kv": 4}
UNGROUPED = {"batch": 5, "seqlen_q": 1000, "seqlen_k": 1000, "heads_q": 9, "heads_kv": 9}
PACKED = {"lengths_q": LENGTHS, "lengths_k": LENGTHS, "heads_q": 8, "heads_kv": 2}
LONG = (
    *(Case(f"d{d}", head_dim=d, **MANY) for d in (64, 96, 128, 192, 256)),
    *(Case(f"d{d} causal", head_dim=d, causal=True, **MANY) for d in (64, 96, 128, 192, 256)),
    *(Case(f"d{d} window", head_dim=d, window=(200, 30), **MANY) for d in (64, 128, 256)),
    *(Case(f"d{d} packed", head_dim=d, causal=True, **PACKED) for d in (64, 128, 256)),
    *(Case(f"d{d} documents", head_dim=d, documents=(300, 500, 1, 299), causal=True, **MANY) for d in (64, 128, 256)),
    *(Case(f"d{d} softcap, sinks", head_dim=d, softcap=20.0, sinks=True, causal=True, **MANY) for d in (64, 128, 256)),
    *(
        Case(f"d{d} {tiles} tiles", head_dim=d, batch=batch, seqlen_q=900, seqlen_k=1100, heads_q=8, heads_kv=4)
        for d, batch, tiles in ((64, 8, 192), (128, 4, 144), (128, 5, 180), (256, 4, 288), (256, 5, 360))
    ),
    *(
        Case(f"d{d} divided", head_dim=d, batch=batch, seqlen_q=1400, seqlen_k=1100, heads_q=heads, heads_kv=4)
        for d, batch, heads in ((64, 6, 8), (128, 4, 16), (256, 4, 8))
    ),
    Case("d64 few rows", head_dim=64, **UNGROUPED),
    Case("d64 few rows, causal", head_dim=64, causal=True, **UNGROUPED),
    Case("d192 v128 causal", head_dim=192, head_dim_v=128, causal=True, **MANY),
    Case("d64 v256", head_dim=64, head_dim_v=256, **MANY),
    Case("more keys than rows", head_dim=128, seqlen_q=300, seqlen_k=1500, causal=True),
    Case("more rows than keys", head_dim=256, seqlen_q=1500, seqlen_k=300, causal=True),
    Case("negative scale", softmax_scale=-0.2, softcap=10.0, seqlen_q=300, seqlen_k=300),
)
"""Sequences of many blocks: rings go from lap to lap, tiles of keys begin and end inside the band."""


def trainable(case: Case, dtype: torch.dtype = torch.bfloat16) -> Request:
    return case.request("cuda", dtype, requires_grad=True)


def prepared(request: Request) -> tuple[Problem, Operands, HopperRunner]:
    """A request with gradients, and its runner."""
    problem, operands, plan = planned(request)
    runner = BACKEND.prepare(plan)
    assert isinstance(runner, HopperRunner)
    return problem, operands, runner


def run(request: Request, dout: Tensor, dlse: Tensor | None) -> tuple[InputGradients, Tensor]:
    """The gradients, and out."""
    with torch.no_grad():
        _, operands, runner = prepared(request)
        out, lse = runner.forward(operands)
        poison_free_memory()
        return runner.backward(operands, Upstream(out, lse, dout, dlse)), out


def upstream_of(request: Request) -> tuple[Tensor, Tensor]:
    problem, _ = bind(request)
    dout = torch.randn(problem.out_shape).to("cuda", request.q.dtype)
    return dout, torch.randn(problem.lse_shape).to("cuda")


def check(
    clean: Request, dout: Tensor, dlse: Tensor | None, dirty: Request | None = None, dirty_dout: Tensor | None = None
) -> None:
    """The tolerance rule for each gradient; `dirty` holds NaN in what must not be read."""
    result, out = run(dirty or clean, dout if dirty_dout is None else dirty_dout, dlse)
    assert (result.dsinks is None) == (clean.sinks is None)
    assert (result.dbias is None) == (clean.bias is None)
    gradients = {"q": result.dq, "k": result.dk, "v": result.dv, "bias": result.dbias, "sinks": result.dsinks}
    found = {name: x for name, x in gradients.items() if x is not None}
    oracle = Oracle.of(clean)
    dlse = torch.zeros_like(oracle.refs[1]) if dlse is None else dlse
    failed = [str(compared) for compared in oracle.gradients(out, found, dout, dlse) if not compared.ok]
    assert not failed, "; ".join(failed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if not (c.dropout_p or c.bias or c.alibi)], ids=lambda case: case.name
)
def test_cases(case: Case, dtype: torch.dtype) -> None:
    request = trainable(case, dtype)
    if 0 in (request.q.numel(), request.k.numel()):
        result, _ = run(request, *upstream_of(request))
        assert not any(g.any() for g in (result.dq, result.dk, result.dv))
    else:
        check(request, *upstream_of(request))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *(pytest.param(case, torch.bfloat16, id=case.name) for case in LONG),
        *(pytest.param(case, torch.float16, id=f"{case.name} fp16") for case in LONG if case.head_dim == 64),
    ],
)
def test_long(case: Case, dtype: torch.dtype) -> None:
    request = trainable(case, dtype)
    check(request, *upstream_of(request))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_nan_in_padding_stays_there(dim: int, causal: bool) -> None:
    case = Case("padding", batch=3, seqlen_q=300, seqlen_k=400, head_dim=dim, causal=causal,
                key_start=(0, 70, 130), key_end=(400, 333, 131), query_end=(300, 100, 0))  # fmt: skip
    clean = trainable(case)
    dout, dlse = upstream_of(clean)
    q, k, v, dirty = (x.detach().clone() for x in (clean.q, clean.k, clean.v, dout))
    for b in range(3):
        for x in (q, dirty):
            x[b, case.query_end[b] :] = NAN
        for x in (k, v):
            x[b, : case.key_start[b]] = NAN
            x[b, case.key_end[b] :] = NAN
    check(clean, dout, dlse, clean._replace(q=q, k=k, v=v), dirty)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_nan_past_used_lengths_stays_there(dim: int) -> None:
    lengths, used = (90, 150, 300), (60, 0, 257)
    case = Case("used", lengths_q=lengths, lengths_k=lengths, used_k=used, head_dim=dim, causal=True)
    clean = trainable(case)
    k, v = clean.k.detach().clone(), clean.v.detach().clone()
    start = 0
    for length, count in zip(lengths, used, strict=True):
        for x in (k, v):
            x[start + count : start + length] = NAN
        start += length
    dout, dlse = upstream_of(clean)
    check(clean, dout, dlse, clean._replace(k=k, v=v))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_used_queries_and_tokens_of_no_sequence(dim: int) -> None:
    lengths = (90, 150, 300)
    case = Case("used q", lengths_q=lengths, lengths_k=lengths, head_dim=dim, causal=True, sinks=True)
    request = trainable(case)
    used = torch.tensor((60, 0, 257), dtype=torch.int32, device="cuda")
    offsets = torch.tensor((0, 90, 240, 520), dtype=torch.int32, device="cuda")
    request = request._replace(seqused_q=used, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    check(request, *upstream_of(request))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sinks_in_qs_dtype(dtype: torch.dtype) -> None:
    """As a model in that dtype has them; their gradient is in it too."""
    request = trainable(Case("sinks", head_dim=64, seqlen_q=300, seqlen_k=300, sinks=True, causal=True), dtype)
    sinks = request.sinks.detach().to(dtype).requires_grad_()
    request = request._replace(sinks=sinks)
    gradients, _ = run(request, *upstream_of(request))
    assert gradients.dsinks is not None
    assert gradients.dsinks.dtype == dtype
    check(request, *upstream_of(request))


def test_forms_of_the_upstream_gradients() -> None:
    """No gradient of lse; that of a sum, whose elements share an address; and one that lies head by head."""
    request = Case("forms", head_dim=128, seqlen_q=200, seqlen_k=200, causal=True).request(
        "cuda", torch.bfloat16, requires_grad=True
    )
    dout, dlse = upstream_of(request)
    check(request, dout, None)
    check(request, torch.ones((), dtype=dout.dtype, device="cuda").expand(dout.shape), dlse)
    check(request, dout.transpose(1, 2).contiguous().transpose(1, 2), dlse.transpose(1, 2).contiguous().transpose(1, 2))


def test_rows_that_tma_cannot_read_are_copied() -> None:
    request = trainable(Case("unaligned", seqlen_q=150, seqlen_k=150))

    def unaligned(x: Tensor) -> Tensor:
        wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 4, dtype=x.dtype, device=x.device)
        wide[..., 4:] = x.detach()
        return wide[..., 4:]

    check(
        request, *upstream_of(request), request._replace(q=unaligned(request.q), k=unaligned(request.k), v=unaligned(request.v))
    )


REPEATED = (
    *(Case(f"d{d}", head_dim=d, batch=2, seqlen_q=1000, seqlen_k=1000, heads_q=4, heads_kv=4) for d in (64, 96, 128, 256)),
    *(Case(f"d{d} causal", head_dim=d, causal=True, **MANY) for d in (64, 128, 192, 256)),
    *(Case(f"d{d} window", head_dim=d, window=(200, 30), **MANY) for d in (64, 128, 256)),
    *(Case(f"d{d} packed", head_dim=d, causal=True, **PACKED) for d in (64, 128, 256)),
    Case("sinks, softcap", head_dim=128, softcap=20.0, sinks=True, causal=True, **MANY),
    *(
        Case(
            f"d256 sections, {heads} heads",
            head_dim=256,
            causal=True,
            batch=2,
            seqlen_q=2500,
            seqlen_k=3000,
            heads_q=heads,
            heads_kv=4,
        )
        for heads in (4, 8)
    ),
    Case("d256 two sums", head_dim=256, batch=1, seqlen_q=4200, seqlen_k=4300, heads_q=4, heads_kv=2),
)
"""More tiles of keys than multiprocessors, many to each row."""


def _tensors(gradients: InputGradients) -> list[Tensor]:
    return [x for x in (gradients.dq, gradients.dk, gradients.dv, gradients.dsinks) if x is not None]


def _differing(request: Request, runs: int) -> Tensor:
    """In how many of `runs` repetitions dq, dk, dv (and dsinks) have another bit than the first time: (gradients,)."""
    with torch.no_grad():
        _, operands, runner = prepared(request)
        upstream = Upstream(*runner.forward(operands), *upstream_of(request))
        first = _tensors(runner.backward(operands, upstream))
        count = torch.zeros(len(first), dtype=torch.int64, device="cuda")
        for _ in range(runs):
            again = _tensors(runner.backward(operands, upstream))
            count += torch.stack([(x != y).any() for x, y in zip(first, again, strict=True)])
        return count


@pytest.mark.parametrize("case", REPEATED, ids=lambda case: case.name)
def test_a_thousand_deterministic_runs_agree_in_every_bit(case: Case) -> None:
    request = trainable(case)._replace(deterministic=True)
    assert not _differing(request, 1000).any()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_long_deterministic_runs_agree_in_every_bit(dim: int, causal: bool) -> None:
    case = Case("16k", head_dim=dim, seqlen_q=16384, seqlen_k=16384, heads_q=8, heads_kv=4, batch=1, causal=causal)
    assert not _differing(trainable(case)._replace(deterministic=True), 5).any()


@pytest.mark.parametrize("case", REPEATED, ids=lambda case: case.name)
def test_deterministic_gradients(case: Case) -> None:
    request = trainable(case)._replace(deterministic=True)
    check(request, *upstream_of(request))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_dk_and_dv_repeat_bit_for_bit(dim: int) -> None:
    """Asked for or not: dQ alone is summed in the order in which tiles finish."""
    request = trainable(Case("repeat", head_dim=dim, seqlen_q=900, seqlen_k=900, causal=True))
    assert not _differing(request, 20)[1:].any()


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """The last head of the last batch entry, far past 2^31 elements."""
    shape = (9, 16384, 128, 128)
    q, k, v, dout = (torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(4))
    for x in (q, k, v, dout):
        x[-1, :, -1].normal_()
    result, _ = run(Request(q, k, v, left=512, right=0, requires_grad=True), dout, None)
    last = [x[-1:, :, -1:].contiguous() for x in (q, k, v, dout)]
    small, _ = run(Request(*last[:3], left=512, right=0, requires_grad=True), last[3], None)
    assert torch.equal(result.dk[-1:, :, -1:], small.dk)
    assert torch.equal(result.dv[-1:, :, -1:], small.dv)
    torch.testing.assert_close(result.dq[-1:, :, -1:], small.dq)
