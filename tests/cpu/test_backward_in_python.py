"""The Hopper backward's kernels, run by Python (tests/gluon_in_python.py) against the oracle: every case and every division."""

from __future__ import annotations

import pytest
import torch
from gluon_in_python import in_python

from tessera.backends.cpu import tiled, tiles_for
from tessera.backends.hopper import BACKEND, backward_sizes, bias_planes
from tessera.backends.hopper.backward_config import Adding, Division
from tessera.backends.hopper.backward_launch import BackwardLaunch
from tessera.backends.hopper.backward_plan import backward_config
from tessera.backends.hopper.backward_sizes import Remainder
from tessera.cases import CASES, Case
from tessera.device import KNOWN_DEVICES
from tessera.dispatch import InputGradients, Upstream
from tessera.operands import Operands, Request, bind, describe
from tessera.problem import Problem
from tessera.verify import Oracle

NAN = float("nan")
H200 = KNOWN_DEVICES["h200"]
LONG = {"batch": 1, "seqlen_q": 420, "seqlen_k": 450, "heads_q": 4, "heads_kv": 2}
PACKED = {"lengths_q": (300, 1, 0, 133), "lengths_k": (200, 30, 55, 133), "heads_q": 4, "heads_kv": 2, "causal": True}
WIDE = {"batch": 2, "seqlen_q": 200, "seqlen_k": 330, "heads_q": 4, "heads_kv": 2}
DIMS = (64, 128, 256)
FEW = 2
"""Multiprocessors: persistent programs then take one tile after another."""
MORE = (
    *(Case(f"d{d} long", head_dim=d, causal=True, **LONG) for d in DIMS),
    *(Case(f"d{d} full long", head_dim=d, **LONG) for d in DIMS),
    *(Case(f"d{d} window long", head_dim=d, window=(90, 20), **LONG) for d in DIMS),
    *(Case(f"d{d} packed", head_dim=d, **PACKED) for d in DIMS),
    *(Case(f"d{d} short", head_dim=d, batch=4, seqlen_q=60, seqlen_k=120, heads_q=2, heads_kv=2) for d in DIMS),
    *(Case(f"d{d} softcap", head_dim=d, softcap=15.0, causal=True, seqlen_q=150, seqlen_k=150) for d in DIMS),
    *(Case(f"d{d} everything", head_dim=d, causal=True, alibi="batch", bias=(1, 4, 200, 330), dropout_p=0.3, softcap=15.0, **WIDE)
      for d in DIMS),
    *(Case(f"d{d} dropout", head_dim=d, dropout_p=0.3, **WIDE) for d in DIMS),
    *(Case(f"bias {shape}", bias=shape, causal=True, **WIDE)
      for shape in ((2, 4, 200, 330), (2, 1, 200, 330), (1, 1, 1, 330), (2, 1, 200, 1), (1, 4, 1, 1))),
    *(Case(f"d64 bias, {name}", bias=(1, 4, 200, 330), **WIDE, **more)
      for name, more in (("window", {"window": (90, 20)}), ("padding", {"key_end": (330, 71), "query_end": (200, 130)}))),
    Case("d128 bias, documents", head_dim=128, batch=2, seqlen_q=200, seqlen_k=200, bias=(2, 1, 200, 200), documents=(70, 130)),
    *(Case(f"d{d} bias, softcap", head_dim=d, bias=(2, 1, 200, 330), softcap=15.0, **WIDE) for d in DIMS),
    *(Case(f"d128 constant bias, {name}", head_dim=128, bias=(1, 4, 200, 330), constant_bias=True, **WIDE, **more)
      for name, more in (("full", {}), ("window", {"window": (90, 20)}), ("padding", {"key_start": (37, 130)}))),
    Case("bias of rows, softcap", bias=(1, 4, 200, 1), softcap=15.0, causal=True, **WIDE),
    *(Case(f"d{d} bias, alibi, dropout", head_dim=d, bias=(1, 4, 200, 330), alibi="head", dropout_p=0.3, causal=True, **WIDE)
      for d in DIMS),
    Case("d256 bias of keys", head_dim=256, bias=(2, 1, 1, 330), dropout_p=0.3, **WIDE),
    Case("padding left, everything", alibi="head", bias=(2, 4, 200, 330), dropout_p=0.3, key_start=(37, 130), **WIDE),
    *(Case(f"d{d} padding left, bias", head_dim=d, bias=(2, 4, 200, 330), key_start=(37, 130), causal=True, **WIDE)
      for d in (64, 128)),
)  # fmt: skip


def is_served(case: Case) -> bool:
    """Whether there is anything to compute."""
    shape = bind(case.request("cpu", torch.bfloat16))[0].shape
    return 0 not in (shape.batch, shape.seqlen_q, shape.seqlen_k)


def differentiated(problem: Problem, operands: Operands, upstream: Upstream) -> InputGradients:
    with torch.no_grad(), in_python():
        return BackwardLaunch(problem, backward_config(problem), FEW)(operands, upstream)


def check(clean: Request, dirty: Request | None = None) -> None:
    """The tolerance rule for every gradient; `dirty` holds NaN in what must not be read."""
    problem, operands = bind(clean)
    if BACKEND.why_not(problem, H200):  # in a fixed order it has not every bias's gradient
        clean = clean._replace(bias_requires_grad=False)
        problem, operands = bind(clean)
    assert not BACKEND.why_not(problem, H200)
    with torch.no_grad():
        out, lse = tiled.forward(problem, operands, tiles_for(problem))
    dout, dlse = torch.randn(out.shape).to(out.dtype), torch.randn(lse.shape)
    result = differentiated(problem, bind(dirty or clean)[1], Upstream(out, lse, dout, dlse))
    assert (result.dbias is not None) == clean.bias_requires_grad
    gradients = {"q": result.dq, "k": result.dk, "v": result.dv, "bias": result.dbias, "sinks": result.dsinks}
    found = {name: x for name, x in gradients.items() if x is not None}
    failed = [str(compared) for compared in Oracle.of(clean).gradients(out, found, dout, dlse) if not compared.ok]
    assert not failed, "; ".join(failed)


@pytest.mark.parametrize("case", [*filter(is_served, CASES.values()), *MORE], ids=lambda case: case.name)
def test_cases(case: Case) -> None:
    check(case.request("cpu", torch.bfloat16, requires_grad=True))


@pytest.mark.parametrize("case", MORE, ids=lambda case: case.name)
def test_in_a_fixed_order(case: Case) -> None:
    """Tiles wait for one another: here one by one, so a tile that waited for a later one would wait for ever."""
    check(case.request("cpu", torch.bfloat16, requires_grad=True)._replace(deterministic=True))


@pytest.mark.parametrize("shape", [(2, 4, 200, 330), (1, 4, 200, 330)], ids=["own", "shared"])
@pytest.mark.parametrize("dim", [64, 128])
def test_a_float32_bias_with_its_gradient(dim: int, shape: tuple[int, ...]) -> None:
    """It is read where it lies, and its gradient made of dS in 16 bits."""
    request = Case("float32", head_dim=dim, bias=shape, **WIDE).request("cpu", torch.bfloat16, requires_grad=True)
    check(request._replace(bias=request.bias.detach().float().requires_grad_()))


@pytest.mark.parametrize("shape", [(1, 4, 200, 330), (2, 1, 1, 330), (1, 1, 200, 1)])
def test_an_expanded_bias(shape: tuple[int, ...]) -> None:
    """Strides of 0, which TMA does not take."""
    request = Case("expanded", bias=(2, 4, 200, 330), **WIDE).request("cpu", torch.bfloat16, requires_grad=True)
    check(request._replace(bias=torch.randn(shape).to(torch.bfloat16).expand(2, 4, 200, 330).requires_grad_()))


@pytest.mark.parametrize("case", [case for case in MORE if case.bias and not case.constant_bias], ids=lambda case: case.name)
def test_additions_to_a_biass_gradient(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, as where dS would take too much room."""
    monkeypatch.setattr(bias_planes, "KEPT_PLANES", 0)
    monkeypatch.setattr(bias_planes, "KEPT_BYTES", 0)
    check(case.request("cpu", torch.bfloat16, requires_grad=True))


@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("heads_kv", [3, 6], ids=["grouped", "one a group"])
def test_sections_take_turns(dim: int, heads_kv: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fixed order, below a diagonal: one pair of heads a section, so that both orders of tiles, and of rows, come."""
    monkeypatch.setattr(BackwardLaunch, "section", 1)
    sizes = {"seqlen_q": 700, "seqlen_k": 740} if dim == 128 else {"seqlen_q": 430, "seqlen_k": 470}
    case = Case("sections", head_dim=dim, batch=2, heads_q=6, heads_kv=heads_kv, causal=True, **sizes)
    request = case.request("cpu", torch.bfloat16, requires_grad=True)._replace(deterministic=True)
    assert backward_config(bind(request)[0]).sections_take_turns
    check(request)


@pytest.mark.parametrize("mask", [{}, {"causal": True}], ids=["full", "causal"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(530, 600), (600, 330), (130, 500)])
def test_two_sums_of_dq(seqlen_q: int, seqlen_k: int, mask: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fixed order at head dim 256: tiles add to one and to the other, whose last ones see no row."""
    monkeypatch.setattr(backward_sizes, "TURNS_ROWS", 64)
    monkeypatch.setattr(backward_sizes, "FULL_ROWS", 64)
    monkeypatch.setattr(BackwardLaunch, "section", 1)
    case = Case("two sums", head_dim=256, batch=2, seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=2, heads_kv=2 if mask else 1,
                key_start=(0, 70), key_end=(seqlen_k, 260), query_end=(seqlen_q, 100), **mask)  # fmt: skip
    request = case.request("cpu", torch.bfloat16, requires_grad=True)._replace(deterministic=True)
    problem = bind(request)[0]
    assert backward_sizes.strands(problem, backward_config(problem)) == 2
    check(request)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("programs", "seqlen_q", "tiles"), [(2, 1300, 3), (4, 1300, 5), (7, 1400, 9)])
def test_last_tiles_are_divided(dim: int, programs: int, seqlen_q: int, tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tiles than programs at the end: in two shares, in shares that reach into a second tile, in many."""
    monkeypatch.setitem(globals(), "FEW", programs)
    keys = {64: 192, 128: 128, 256: 64}[dim] * tiles - 28
    heads = 4 if dim == 128 else 2  # where fewer rows see a tile it is not divided
    case = Case("rest", head_dim=dim, batch=1, seqlen_q=seqlen_q, seqlen_k=keys, heads_q=heads, heads_kv=1)
    request = case.request("cpu", torch.bfloat16, requires_grad=True)
    problem = bind(request)[0]
    rest = Remainder.of(problem, backward_config(problem), programs)
    assert rest.whole < rest.numbers
    check(request)


@pytest.mark.parametrize(("dim", "tiles"), [(64, 3), (256, 5)])
def test_last_tiles_are_divided_under_dropout(dim: int, tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where keys lie in other lines until they leave."""
    monkeypatch.setitem(globals(), "FEW", 2)
    keys = {64: 192, 256: 64}[dim] * tiles - 28
    case = Case("rest", head_dim=dim, batch=1, seqlen_q=1400, seqlen_k=keys, heads_q=2, heads_kv=1, dropout_p=0.3)
    request = case.request("cpu", torch.bfloat16, requires_grad=True)
    problem = bind(request)[0]
    rest = Remainder.of(problem, backward_config(problem), 2)
    assert rest.whole < rest.numbers
    check(request)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("group", "heads"), [(1, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("in_order", [False, True], ids=["any order", "in order"])
def test_rows_are_rounded_as_their_tiles_are_done(
    dim: int, group: int, heads: int, in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head after head, two of three together, all: each row once, and never before its tiles have counted."""
    monkeypatch.setattr(BackwardLaunch, "section", 150 * heads)
    case = Case("counted", head_dim=dim, batch=2, seqlen_q=150, seqlen_k=230, heads_q=3 * group, heads_kv=3, window=(70, 0))
    request = case.request("cpu", torch.bfloat16, requires_grad=True)._replace(deterministic=in_order)
    problem = bind(request)[0]
    launch = BackwardLaunch(problem, backward_config(problem), FEW)
    assert launch.config.counts_tiles
    assert launch.counted[:2] == (group, group * heads)
    check(request)


@pytest.mark.parametrize("dim", DIMS)
def test_last_tiles_leave_room_to_round(dim: int) -> None:
    """Where more rows than few see a tile of full attention, the last tiles are not divided yet."""
    case = Case("room", head_dim=dim, batch=1, seqlen_q=700, seqlen_k=600, heads_q=4, heads_kv=2)
    request = case.request("cpu", torch.bfloat16, requires_grad=True)
    config = backward_config(bind(request)[0])
    assert config.counts_tiles
    assert config.division is Division.TURNS or config.k_places == 1
    check(request)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_long_in_a_fixed_order(dim: int, causal: bool) -> None:
    """Past the lengths at which the last tile rounds: two writers, tile after tile."""
    case = Case("long", head_dim=dim, batch=2, seqlen_q=530, seqlen_k=600, heads_q=2, heads_kv=1, causal=causal)
    request = case.request("cpu", torch.bfloat16, requires_grad=True)._replace(deterministic=True)
    assert backward_config(bind(request)[0]).writers == 2
    check(request)


@pytest.mark.parametrize("dim", DIMS)
def test_in_float16(dim: int) -> None:
    check(Case("long", head_dim=dim, causal=True, **LONG).request("cpu", torch.float16, requires_grad=True))


@pytest.mark.parametrize("dim", DIMS)
def test_nan_in_padding_stays_there(dim: int) -> None:
    case = Case("padding", batch=3, seqlen_q=150, seqlen_k=200, head_dim=dim, heads_q=2, heads_kv=2,
                key_start=(0, 70, 130), key_end=(200, 133, 131), query_end=(150, 100, 0))  # fmt: skip
    clean = case.request("cpu", torch.bfloat16, requires_grad=True)
    q, k, v = (x.detach().clone() for x in (clean.q, clean.k, clean.v))
    for b in range(3):
        q[b, case.query_end[b] :] = NAN
        for x in (k, v):
            x[b, : case.key_start[b]] = NAN
            x[b, case.key_end[b] :] = NAN
    check(clean, clean._replace(q=q, k=k, v=v))


@pytest.mark.parametrize("in_order", [True, False])
def test_few_keys_are_added_in_order(in_order: bool) -> None:
    """At head dim 128 that is faster, and the default: no zeros, no kernel after the main one."""
    case = Case("short", batch=128, heads_q=4, heads_kv=4, seqlen_q=100, seqlen_k=130, head_dim=128, causal=True)
    problem = bind(case.request("cpu", torch.bfloat16, requires_grad=True)._replace(deterministic=in_order))[0]
    assert backward_config(problem).adding is Adding.ROUNDED
    assert len(BackwardLaunch(problem, backward_config(problem), FEW).specs) == 2


def test_every_division_is_covered() -> None:
    problems = [bind(case.request("cpu", torch.bfloat16))[0] for case in (*filter(is_served, CASES.values()), *MORE)]
    configs = [backward_config(problem) for problem in problems]
    assert {config.division for config in configs} == set(Division)
    assert {config.shares_text for config in configs if config.division is Division.TURNS} == {True, False}


@pytest.mark.parametrize("seqlen", [1024, 2048, 4096, 8192])
def test_sections_of_grouped_heads_fill_the_device(seqlen: int) -> None:
    """A section with fewer tiles than multiprocessors ends with its longest tile, begun late. Whole heads: 128 of 132 will do."""
    q = torch.empty(16384 // seqlen, seqlen, 32, 128, dtype=torch.bfloat16, device="meta")
    k = q[:, :, :8]
    problem = describe(Request(q, k, k, right=0, requires_grad=True), "cuda")
    launch = BackwardLaunch(problem, backward_config(problem), H200.multiprocessors)
    heads = launch.section // seqlen
    assert heads * launch.blocks >= 0.95 * H200.multiprocessors
