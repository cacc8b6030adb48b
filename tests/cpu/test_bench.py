"""The benchmark library: right before fast, in turns, and a cell that fails costs itself alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera import reference
from tessera.bench import (
    GRIDS,
    Cell,
    Direction,
    Limits,
    Outcome,
    Schedule,
    Tessera,
    accuracy,
    cache_peers,
    flash_peers,
    host,
    interleaved,
    machine,
    measure,
    run,
)
from tessera.bench.ceilings import ceilings
from tessera.bench.cells import flops_by_length
from tessera.bench.grids import Metric, family_of, grid_named, square
from tessera.bench.memory import peak_of
from tessera.bench.peers import Eager, Plain, Sdpa, features
from tessera.bench.report import CellResult, Entry, Report, geomean
from tessera.bench.session import Order
from tessera.bench.timing import Ratio, speedup
from tessera.cases import CASES, Case
from tessera.device import Device
from tessera.mask import Mask
from tessera.operands import Request, bind
from tessera.problem import Problem

CPU, H200 = Device.named("cpu"), Device.named("h200")
BRIEF = Schedule(rounds=2, turn_s=0.0)
SMALL = Case("small, 64", batch=1, seqlen_q=64, seqlen_k=64, heads_q=2, heads_kv=2, head_dim=16)
BIASED = Case("biased", seqlen_q=40, seqlen_k=70, heads_kv=2, head_dim=16, bias=(1, 4, 40, 70))


@dataclass(frozen=True)
class Odd:
    """A peer that is out of order in one way: `fault` is what it does in its first run."""

    fault: str
    name: str = "odd"

    def why_not(self, problem: Problem, device: Device) -> str | None:
        return "out of order" if self.fault == "refuse" else None

    def forward(self, request: Request, problem: Problem):
        def call() -> Tensor:
            out = Eager().forward(request, problem)()
            if self.fault == "raise":
                raise RuntimeError("out of order")
            if self.fault == "wrong row":
                out[:, 3] *= 1.01
            if self.fault == "nan":
                out[0, 0, 0, 0] = float("nan")
            if problem.shape.seqlen_q == SMALL.seqlen_q:  # these two take the process with them
                if self.fault == "die":
                    os._exit(7)
                if self.fault == "hang":
                    time.sleep(600)
            return out

        return call

    def backward(self, request: Request, problem: Problem, dout: Tensor):
        raise AssertionError("not asked for here")


class CountingClock:
    """Says that each call takes as many seconds as it returns."""

    def seconds(self, call, repeats: int) -> float:
        return sum(call() for _ in range(repeats)) / repeats


def test_everybody_takes_a_turn_in_every_round():
    order = []

    def contender(name: str, seconds: float):
        return lambda: order.append(name) or seconds

    calls = {"a": contender("a", 2.0), "b": contender("b", 3.0), "c": contender("c", 1.0)}
    times = interleaved(calls, CountingClock(), Schedule(rounds=6, turn_s=0.0))
    assert times == {"a": (2.0,) * 6, "b": (3.0,) * 6, "c": (1.0,) * 6}
    rounds = [order[i : i + 3] for i in range(6, len(order), 3)]  # after two warm-up calls each
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({turn[0] for turn in rounds}) == 3  # nobody is always first
    neighbours = {name: {before for turn in rounds for before, after in pairwise(turn) if after == name} for name in calls}
    assert all(len(before) == 2 for before in neighbours.values())  # nor always after the same one


def test_a_turn_may_begin_with_calls_that_are_not_measured():
    seconds = iter([9.0, 9.0, *(5.0, 1.0) * 4])  # two to warm up
    times = interleaved({"a": lambda: next(seconds)}, CountingClock(), Schedule(rounds=4, turn_s=0.0, unmeasured=1))
    assert times["a"] == (1.0,) * 4


def test_no_round_begins_while_kernels_compile_beside_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr("tessera.bench.timing.settle", lambda: calls.append("settled"))
    contenders = {name: lambda name=name: calls.append(name) or 1.0 for name in "ab"}
    interleaved(contenders, CountingClock(), Schedule(rounds=2, turn_s=0.0))
    assert calls == [*"aabb", "settled", *"abba"]


def test_no_round_begins_after_the_limit():
    times = interleaved({"a": lambda: 1.0}, CountingClock(), Schedule(rounds=50, turn_s=0.0, limit_s=0.0))
    assert len(times["a"]) == 2


def test_the_ratio_pairs_rounds():
    """A machine that slows down fourfold in the middle changes no ratio; ratios of medians would be off."""
    ours, theirs = (1.0, 1.0, 4.0, 4.0, 4.0), (2.0, 2.0, 8.0, 8.0, 8.0)
    assert speedup(ours, theirs) == Ratio(2.0, 2.0, 2.0)
    assert speedup((1.0, 1.0, 1.0), (1.0, 2.0, 9.0)).median == 2.0


@pytest.mark.parametrize("name", ["varlen", "varlen, cross", "varlen, window", "causal", "window both ways"])
def test_flops_count_the_scores_of_the_mask(name: str):
    case = CASES[name]
    cell = Cell(case, torch.float32)
    problem, _ = bind(cell.request("cpu"))
    mask = Mask(problem.mask.left, problem.mask.right)
    if case.lengths_q is None or case.lengths_k is None:
        scores = mask.allowed(case.batch, case.seqlen_q, case.seqlen_k).sum().item()
    else:
        pairs = zip(case.lengths_q, case.lengths_k, strict=True)
        scores = sum(mask.allowed(1, rows, keys).sum().item() for rows, keys in pairs)
    assert cell.flops(problem) == 4 * case.head_dim * case.heads_q * scores
    assert replace(cell, direction=Direction.BACKWARD).flops(problem) == int(2.5 * cell.flops(problem))


def test_packed_flops_without_lengths_are_the_problems_own():
    problem, _ = bind(CASES["varlen"].request())
    assert flops_by_length(problem, None, None) == problem.flops()


def test_the_papers_grid_is_the_papers():
    cells = GRIDS["paper"].cells()
    assert len(cells) == 36
    for cell in cells:
        case = cell.case
        assert case.batch * case.seqlen_q == 16384
        assert case.heads_q * case.head_dim == 2048
        assert cell.dtype == torch.bfloat16


@pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
def test_names_say_family_and_size_and_tell_cells_apart(grid):
    names = [case.name for case in grid.cases]
    assert len(set(names)) == len(names)
    assert all(all(family_of(name)) for name in names)


def test_grids_joined_by_a_plus_are_one_report():
    both = grid_named("window+heads")
    assert both.name == "window+heads"
    assert both.cases == GRIDS["window"].cases + GRIDS["heads"].cases
    everything = [case.name for name in ("paper", "gqa", "varlen", "window", "dims", "heads") for case in GRIDS[name].cases]
    assert len(set(everything)) == len(everything)
    for wrong, words in (("paper+nothing", "nothing"), ("paper+cpu", "differ"), ("", "no such grid")):
        with pytest.raises(ValueError, match=words):
            grid_named(wrong)


def test_our_own_call_in_a_fixed_order_is_timed_and_is_no_peer(tmp_path: Path):
    order = Order("cpu-quick", Direction.BACKWARD, peers=("deterministic", "sdpa"), only="full, 256", rounds=2)
    session = order.session()
    assert [c.name for c in session.contenders] == ["tessera", "tessera-deterministic", "sdpa"]
    assert session.schedule is not None
    assert session.schedule.rounds == 2
    (report,) = session.reports()
    (cell,) = report.cells
    assert set(cell.entries) == {"tessera", "tessera-deterministic", "sdpa"}
    assert all(entry.outcome is Outcome.TIMED for entry in cell.entries.values())
    own = replace(cell.entries["sdpa"], speedup=Ratio(0.5, 0.5, 0.5))
    slower = replace(report, cells=(replace(cell, entries=cell.entries | {"tessera-deterministic": own}),))
    theirs = cell.entries["sdpa"].speedup
    assert theirs is not None
    assert slower.against_best() == pytest.approx(theirs.median)
    assert all(loss.peer == "sdpa" for loss in slower.lost())


@pytest.mark.parametrize("route", ["oracle", "SDPA", "last 50 rows"])
@pytest.mark.parametrize("direction", Direction, ids=lambda d: d.value)
def test_the_standard_passes_right_results_and_catches_one_wrong_row(route: str, direction: Direction, monkeypatch):
    case = square(16, 128, 2, 4, heads_kv=2, causal=True)
    if route == "last 50 rows":
        case = replace(case, causal=False, window=(40, 3))
    if route != "oracle":
        monkeypatch.setitem(accuracy.MOST_SCORES, "cpu", 2 * 4 * 128 * 50)
    request = Cell(case, torch.float32, direction).request("cpu")
    problem, _ = bind(request)
    standard = accuracy.standard_for(request, problem)
    assert route in standard.how
    ours = Tessera()
    if direction is Direction.FORWARD:
        results = [ours.forward(request, problem)().detach()]
    else:
        assert standard.dout is not None
        results = list(ours.backward(request, problem, standard.dout)())
    assert standard.error(results) < accuracy.allowed_error(problem)
    for index in range(len(results)):
        spoilt = [x.clone() for x in results]
        spoilt[index][1, -5, 0] *= 1.01
        assert standard.error(spoilt) > accuracy.allowed_error(problem)
        spoilt[index][1, -5, 0, 0] = float("nan")
        assert not standard.error(spoilt) <= accuracy.allowed_error(problem)


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [("raise", Outcome.FAILED), ("wrong row", Outcome.WRONG), ("nan", Outcome.WRONG), ("refuse", Outcome.REFUSED)],
)
def test_who_is_wrong_or_fails_is_not_timed(fault: str, outcome: Outcome):
    result = measure(Cell(SMALL, torch.float32), [Tessera(), Odd(fault), Sdpa()], "cpu", BRIEF)
    assert result.entries["odd"].outcome is outcome
    assert result.entries["odd"].note
    assert result.entries["odd"].seconds is None
    for name in ("tessera", "sdpa"):
        assert result.entries[name].outcome is Outcome.TIMED
    assert result.entries["tessera"].speedup is None
    assert result.entries["sdpa"].speedup is not None


def test_a_backward_cell_times_the_backward_of_each():
    cell = Cell(replace(SMALL, causal=True), torch.float32, Direction.BACKWARD)
    result = measure(cell, [Tessera("torch"), Sdpa(), Eager()], "cpu", BRIEF)
    assert {entry.outcome for entry in result.entries.values()} == {Outcome.TIMED}
    assert all(entry.error is not None and entry.error < 1e-5 for entry in result.entries.values())


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "words"), [("die", "died"), ("hang", "given up after")])
def test_a_cell_that_takes_its_process_costs_itself_alone(fault: str, words: str):
    cells = [Cell(SMALL, torch.float32), Cell(replace(SMALL, name="other, 48", seqlen_q=48), torch.float32)]
    lost, measured = run(cells, [Tessera(), Odd(fault)], "cpu", BRIEF, limits=Limits(cell_s=8.0))
    assert words in lost.note
    assert not lost.entries
    assert measured.entries["odd"].outcome is Outcome.TIMED


def test_no_cell_begins_after_the_deadline():
    results = list(run([Cell(SMALL, torch.float32)] * 3, [Tessera()], "cpu", BRIEF, limits=Limits(total_s=0.0)))
    assert len(results) == 3
    assert all("deadline" in result.note for result in results)


def test_peers_say_what_they_lack():
    softcap, _ = bind(CASES["softcap"].request())
    assert "softcap" in features(softcap)
    assert Sdpa().why_not(softcap, CPU) == "no softcap"
    assert Eager().why_not(softcap, CPU) is None
    everything, _ = bind(CASES["everything"].request())
    assert "no alibi, no bias, no dropout" in str(Eager().why_not(everything, CPU))
    full_bias, causal_bias = (bind(replace(BIASED, causal=causal).request(dtype=torch.bfloat16))[0] for causal in (False, True))
    assert Sdpa().why_not(full_bias, CPU) is None
    assert Sdpa("fa2", "FLASH_ATTENTION").why_not(full_bias, H200) == "no bias"
    assert str(Sdpa().why_not(causal_bias, CPU)).startswith("no causal,")
    trained, _ = bind(BIASED.request(requires_grad=True))
    assert Sdpa().why_not(trained, CPU) == "no gradient of a bias"


@pytest.mark.parametrize(
    "options", [{"softcap": 5.0, "causal": True}, {"alibi": "head", "window": (20, 3)}, {"alibi": "batch"}, {}], ids=str
)
def test_flex_and_sdpa_are_the_formula_with_a_bias(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flash_peers, "_compiled_flex", lambda _: flex_attention)  # the formula, uncompiled
    request = replace(BIASED, **options).request()
    problem, _ = bind(request)
    standard = accuracy.standard_for(request, problem)
    for peer in (flash_peers.Flex(), *(() if options else (Sdpa(),))):
        assert standard.error([peer.forward(request, problem)()]) < accuracy.allowed_error(problem)


def test_no_problem_is_the_ninth_that_flex_compiles_for(monkeypatch: pytest.MonkeyPatch):
    """One function is compiled eight times at most in a process; then torch runs it uncompiled (under fullgraph it raises)."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    flash_peers._compiled_flex.cache_clear()
    for seqlen in range(20, 30):
        request = replace(CASES["full"], seqlen_q=seqlen, seqlen_k=seqlen).request()
        problem, _ = bind(request)
        for _ in range(2):
            flash_peers.Flex().forward(request, problem)()
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["full", "gqa", "window", "softcap", "fewer queries, causal", "d192 v128"])
def test_eager_is_the_formula(name: str):
    request = CASES[name].request()
    problem, _ = bind(request)
    assert Eager().why_not(problem, CPU) is None
    standard = accuracy.standard_for(request, problem)
    assert standard.error([Eager().forward(request, problem)()]) < accuracy.allowed_error(problem)


def _report() -> Report:
    def entry(ratio: float | None) -> Entry:
        own = None if ratio is None else Ratio(ratio, ratio * 0.9, ratio * 1.1)
        return Entry(Outcome.TIMED, Ratio(1.0, 0.9, 1.1), 2.0, own, 1e-7, 1e-5)

    def cell(name: str, sdpa: float, eager: float) -> CellResult:
        entries = {"eager": entry(eager), "tessera": entry(None), "sdpa": entry(sdpa)}
        return CellResult(name, 64, 512, 512, "full", entries=entries)

    cells = (cell("d64 full, 512", 0.5, 4.0), cell("d64 full, 1k", 2.0, 0.25), cell("d64 causal, 1k", 1.0, 1.0))
    return Report("g", Direction.FORWARD, GRIDS["cpu"].metric, "float32", "cpu", "tessera", machine.describe(), cells)


@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
@pytest.mark.parametrize(
    "options", [{"dropout_p": 0.3}, {"bias": (1, 4, 40, 70), "alibi": "batch"}, {"sinks": True, "dropout_p": 0.1}], ids=str
)
def test_what_goes_by_its_row_is_judged_on_the_first_heads(options: dict[str, Any], direction: Direction, monkeypatch):
    monkeypatch.setitem(accuracy.MOST_SCORES, "cpu", 40 * 70)
    case = replace(BIASED, **{"bias": None, "causal": True, "key_end": (70, 55)} | options)
    result = measure(Cell(case, torch.float32, direction), [Tessera(), flash_peers.peers()["plain"]], "cpu", BRIEF)
    assert result.standard == "oracle, float64, first entry, 2 heads"
    assert {entry.outcome for entry in result.entries.values()} == {Outcome.TIMED}
    request = case.request()
    problem, _ = bind(request)
    ignored = Tessera().forward(Plain.asked(request), problem)()
    assert accuracy.standard_for(request, problem).error([ignored]) > accuracy.allowed_error(problem)


def test_the_report_counts_means_and_losses():
    report = _report()
    assert report.ok
    assert report.contenders == ("tessera", "eager", "sdpa")
    assert report.geomeans() == {"eager": pytest.approx(1.0), "sdpa": pytest.approx(1.0)}
    assert report.against_best() == pytest.approx(geomean([0.5, 0.25, 1.0]))
    assert [(loss.cell, loss.peer) for loss in report.lost()] == [("d64 full, 1k", "eager"), ("d64 full, 512", "sdpa")]
    lost_one = replace(report, cells=(*report.cells, CellResult("x, 1", 64, 1, 1, "full", note="given up after 9 s")))
    assert not lost_one.ok
    assert not replace(report, cells=()).ok


def test_the_json_is_strict_and_complete(tmp_path: Path):
    report = _report()
    spoilt = replace(report.cells[0], entries={"tessera": Entry(Outcome.WRONG, error=float("nan"), allowed=1e-5)})
    replace(report, cells=(spoilt, *report.cells[1:])).write(tmp_path / "new" / "r.json")
    data = json.loads((tmp_path / "new" / "r.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert data["schema"] == 1
    assert data["machine"]["versions"]["torch"] == torch.__version__
    assert data["cells"][0]["entries"]["tessera"] == data["cells"][0]["entries"]["tessera"] | {"outcome": "wrong", "error": None}
    assert data["summary"]["ok"] is False
    assert data["summary"]["lost"][0]["peer"] == "eager"


def test_ceilings_travel_with_the_report(tmp_path: Path):
    report = replace(_report(), ceilings=ceilings("cpu", torch.float32))
    assert report.ceilings is not None
    assert 1e9 < report.ceilings.copy < 1e13
    assert 1e9 < report.ceilings.matmul < 1e15
    report.write(tmp_path / "r.json")
    assert Report.read(tmp_path / "r.json") == report


def _momentary() -> int:
    return int(torch.ones(32 << 20, dtype=torch.int8)[-1])


def test_peak_memory_sees_what_a_call_held_for_a_moment():
    # in a process of its own: what earlier tests gave back to the allocator would hide the growth
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        measured = pool.submit(peak_of, _momentary).result()
    assert measured.result == 1
    assert 30 << 20 < measured.peak_bytes < 64 << 20


@pytest.mark.slow
def test_a_fresh_process_shows_what_tiles_save():
    from tessera.bench.fresh import footprint

    cell = Cell(square(64, 2048, 1, 2), torch.float32)
    scores = 2 * 2048 * 2048 * 4
    ours, naive = footprint(Tessera(), cell), footprint(Eager(), cell)
    assert ours is not None
    assert naive is not None
    assert naive.peak_bytes > 1.5 * scores
    assert ours.peak_bytes < scores / 2


def test_the_plot_is_a_picture(tmp_path: Path):
    plots = pytest.importorskip("tessera.bench.plots")
    pytest.importorskip("matplotlib")
    written = plots.rates(_report(), tmp_path / "r.png")
    assert written.read_bytes().startswith(b"\x89PNG")
    nothing = replace(_report(), cells=())
    with pytest.raises(ValueError, match="no cell was timed"):
        plots.rates(nothing, tmp_path / "n.png")


CACHE_CASES = (
    Case("small, b3 1x100", 3, 1, 100, 4, 2, 16),
    Case("small, b2 4x70", 2, 4, 70, 4, 2, 16, causal=True),
    Case("small, packed", 3, 1, 1, 4, 2, 16, lengths_q=(1, 1, 1), lengths_k=(5, 100, 33)),
    Case("small, packed rows", 3, 1, 1, 4, 2, 16, lengths_q=(3, 0, 2), lengths_k=(5, 100, 33), causal=True),
)


@pytest.mark.parametrize("case", CACHE_CASES, ids=lambda case: case.name)
def test_a_cache_holds_the_cells_keys(case: Case):
    """Ours over a cache, contiguous and in pages, is right, and so timed; SDPA's refusal of packed cells stands beside it."""
    contenders = (cache_peers.TesseraCache(), *(cache_peers.peers()[name] for name in ("pages16", "pages1", "splits1", "sdpa")))
    result = measure(Cell(case, torch.float32), contenders, "cpu", BRIEF, Metric.BANDWIDTH)
    for name, entry in result.entries.items():
        refused = name == "sdpa" and (case.is_varlen or case.causal)
        assert entry.outcome is (Outcome.REFUSED if refused else Outcome.TIMED), (name, entry)


def test_fa3_is_missed_by_name():
    problem, _ = bind(CACHE_CASES[0].request("meta", torch.bfloat16))
    assert "fa3.so" in cache_peers.peers()["fa3"].why_not(problem, Device.named("h200"))


def test_large_caches_are_checked_at_both_ends(monkeypatch):
    case = CACHE_CASES[0]
    monkeypatch.setitem(accuracy.MOST_SCORES, "cpu", 100)
    request = case.request()
    problem, operands = bind(request)
    standard = accuracy.standard_for(request, problem)
    assert "first and last" in standard.how
    out = reference.attention(problem, operands)[0]
    assert standard.error((out,)) < 1e-14  # sums of two batches, by other kernels of BLAS
    out[2, 0, 1] *= 1.01
    assert standard.error((out,)) > 1e-3


def test_grids_over_a_cache_have_their_own_contenders():
    session = Order("decode", device="cpu", peers=("sdpa", "pages64"), only="b64 1x32k").session()
    assert [c.name for c in session.contenders] == ["tessera", "sdpa", "tessera-pages64"]
    assert len(session.cells) == 1
    with pytest.raises(ValueError, match="flex"):
        Order("decode", device="cpu", peers=("flex",)).session()


def test_the_hosts_time_of_every_kind_of_call_and_of_first_ones(tmp_path: Path):
    report = host.measured("cpu", rounds=2)
    assert len(report.seconds) == 7
    assert all(who[host.OURS].median > 0 for who in report.seconds.values())
    assert (report.cold.compiled, report.warm.compiled) == (0, 0)
    assert not report.cold.imported_triton, "a CPU has no use for it"
    assert len(report.colds) == 3
    assert sorted(call.seconds for call in report.colds)[1] == report.cold.seconds
    report.write(tmp_path / "host.json")
    written = json.loads((tmp_path / "host.json").read_text())
    assert written["kind"] == "host"
    assert written["seconds"]["attention"]["sdpa"]["median"] > 0
    with pytest.raises(ValueError, match="device='cuda:77'"):
        host.measured("cuda:77")
