"""What a plan for Hopper promises, asked without a GPU: a length never compiles, and every plan fits the chip."""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tessera
from tessera import Unsupported, calls, dispatch, jit, reference, verify
from tessera.backends.hopper import HopperBackend, HopperRunner, choosable, without_scores
from tessera.backends.hopper.backward_config import Adding
from tessera.backends.hopper.backward_plan import backward_config, backward_family
from tessera.backends.hopper.backward_sizes import spared_multiprocessors, workspace_bytes
from tessera.backends.hopper.chunk_plan import chunk_plan
from tessera.backends.hopper.config import ForwardConfig, Overlap, Pairing, Staging
from tessera.backends.hopper.launch import kernel_spec
from tessera.backends.hopper.plan import LOW, SHARED_LIMIT, forward_config, forward_family, tall_blocks
from tessera.backends.hopper.serving import SERVING_BACKEND, kernels_of
from tessera.cases import CASES, Case
from tessera.device import KNOWN_DEVICES
from tessera.dispatch import Upstream
from tessera.jit import gate
from tessera.operands import bind, describe
from tessera.problem import Problem
from tessera.serving import calls as serving_calls
from tessera.serving.cases import CACHE_CASES
from tessera.serving.operands import describe as describe_cache

H200 = KNOWN_DEVICES["h200"]
SEQLENS = (1, 100, 500, 639, 640, 641, 1500, 1537, 2049, 4096, 50_000, 1 << 20)
OPTIONS: dict[str, dict[str, object]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (1024, 0)},
    "causal softcap": {"causal": True, "softcap": 30.0},
}


def problem(seqlen: int, head_dim: int, options: dict[str, object]) -> Problem:
    return tessera.plan((1, seqlen, 2, head_dim), (1, seqlen, 2, head_dim), device="h200", **options).problem


@pytest.mark.parametrize("head_dim", [8, 64, 72, 96, 128, 192, 256])
@pytest.mark.parametrize("name", OPTIONS)
def test_any_length_has_a_kernel_of_the_family(name: str, head_dim: int) -> None:
    problems = [problem(seqlen, head_dim, OPTIONS[name]) for seqlen in SEQLENS]
    families = {forward_family(p) for p in problems}
    assert len(families) == 1
    picked = {forward_config(p) for p in problems}
    family = set(families.pop())
    assert picked <= family
    assert picked == family or name == "window"  # a window of 1024 keys never has rows of many more


@pytest.mark.parametrize(
    ("batch", "seqlen", "shared", "form"),
    [(4, 4096, True, "dS kept"), (4, 4096, False, "dS kept"), (64, 512, True, "dS kept"), (64, 2048, True, "bias gradient")],
)
def test_a_bias_s_gradient_takes_bounded_room(batch: int, seqlen: int, shared: bool, form: str) -> None:
    """dS is kept where few planes share one of the bias, or all are small; whichever it is, other lengths compile nothing. What
    nothing shares is the gradient itself, and no scratch memory."""
    case = Case(
        "bias",
        batch=batch,
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        heads_q=8,
        heads_kv=8,
        bias=(1 if shared else batch, 8, seqlen, seqlen),
    )
    asked = describe(case.request("meta", torch.bfloat16, requires_grad=True), "cuda")
    config = backward_config(asked)
    assert form in {feature.value for feature in config.features}
    assert config in backward_family(asked)
    assert {len(backward_family(replace(asked, shape=replace(asked.shape, seqlen_q=n)))) for n in (64, 1 << 20)} == {
        2 if batch > 8 else 1
    }
    kept = 2 * batch * 8 * seqlen**2 if form == "dS kept" and shared else 0
    constant = describe(replace(case, constant_bias=True).request("meta", torch.bfloat16, requires_grad=True), "cuda")
    sums = 4 * 8 * seqlen**2 if form == "bias gradient" else 0
    assert abs(workspace_bytes(asked, 132) - kept - sums - workspace_bytes(constant, 132)) < 1 << 20


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("bitwise", [False, True])
def test_any_length_has_a_backward_of_the_family(name: str, head_dim: int, bitwise: bool) -> None:
    options = OPTIONS[name] | {"requires_grad": True, "deterministic": bitwise}
    shapes = [((batch, seqlen, 16, head_dim), (batch, seqlen + more, 16, head_dim))
              for seqlen in SEQLENS for batch in (1, 64) for more in (-1, 0, 77) if seqlen + more > 0]  # fmt: skip
    problems = [tessera.plan(q, kv, device="h200", **options).problem for q, kv in shapes]
    families = {backward_family(p) for p in problems}
    assert len(families) == 1
    family = families.pop()
    assert {backward_config(p) for p in problems} == set(family)
    rounded = ("full", "causal", "causal softcap") if bitwise else ("causal",)
    assert any(config.adding is Adding.ROUNDED for config in family) == (head_dim == 128 and name in rounded)


@pytest.mark.parametrize(("head_dim", "left", "three"), [(128, 128, False), (128, 256, True), (128, 4096, True), (64, 128, True)])
def test_windows_by_three_consumers_without_turns(head_dim: int, left: int, three: bool) -> None:
    """Their kernels join halves of P, whatever the Triton: it dies before the next one is taken."""
    planned = problem(8192, head_dim, {"window": (left, 0)})
    config = forward_config(planned)
    assert (config.consumers, config.overlap is Overlap.DRIFTING) == ((3, True) if three else (2, False))
    assert (config.staging is Staging.QUERY) == (three and head_dim == 128)
    assert kernel_spec(config, planned.dtype).joins_halves is three


@pytest.mark.parametrize(("head_dim", "name"), [*((d, name) for d in (64, 96, 192, 256) for name in OPTIONS), (128, "window")])
def test_float16_has_the_forms_of_bfloat16(head_dim: int, name: str) -> None:
    """P is taken at once in both: what it looks at are four sums, whatever the type."""
    for seqlen in SEQLENS:
        planned = problem(seqlen, head_dim, OPTIONS[name])
        assert forward_config(replace(planned, dtype=torch.float16)) == forward_config(planned)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dropout_takes_p_at_once_and_joins_its_halves(head_dim: int) -> None:
    planned = problem(8192, head_dim, {"dropout_p": 0.1, "seed": 1})
    config = forward_config(planned)
    assert config.overlap is (Overlap.AT_ONCE if head_dim == 128 else Overlap.SCORES)
    assert config.queries == (2 if head_dim <= 128 else 1)
    assert kernel_spec(config, planned.dtype).joins_halves


@pytest.mark.parametrize("change", [{"queries": 1}, {"held": 1}, {"dims_v": (64,)}], ids=str)
def test_out_takes_its_querys_place_where_it_can(change: dict[str, Any]) -> None:
    config = forward_config(problem(8192, 128, {"window": (1024, 0)}))
    with pytest.raises(ValueError, match="out waits in its Q's place where"):
        replace(config, **change)


@pytest.mark.parametrize(("heads_kv", "options", "pairing"), [
    (8, {}, Pairing.ROWS), (8, {"causal": True}, Pairing.ROWS), (4, {"causal": True}, Pairing.HEADS), (4, {}, Pairing.ROWS),
    (8, {"window": (1024, 0)}, None),
])  # fmt: skip
def test_programs_pair_where_there_are_many_rows_and_keys(heads_kv, options, pairing) -> None:
    def planned(rows: int, keys: int) -> ForwardConfig:
        return forward_config(tessera.plan((1, rows, 8, 192), (1, keys, heads_kv, 192), device="h200", **options).problem)

    long = planned(8192, 8192)
    assert long.pairing is pairing
    assert (long.stages, long.staging) == ((2, Staging.OWN) if pairing is None else (3, Staging.HALVES))
    assert planned(128, 8192).pairing is None, "a pair's second program would have no rows"
    assert planned(8192, 512).pairing is None
    assert planned(4100, 8192).pairing is (None if pairing is Pairing.ROWS else pairing), "the last of 33 blocks has no neighbour"


def test_a_call_compiles_what_it_launches_and_the_rest_of_the_family_beside_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    now: list[jit.KernelSpec] = []
    later: list[jit.KernelSpec] = []
    monkeypatch.setattr(jit, "obtain", now.append)
    monkeypatch.setattr(jit, "compile_later", later.extend)
    shape = (1, 100, 2, 64)
    HopperBackend().prepare(tessera.plan(shape, shape, device="h200", causal=True))
    assert len(now) == 1
    assert len(set(now + later)) == 2
    now.clear(), later.clear()
    trained = tessera.plan(shape, shape, device="h200", causal=True, requires_grad=True)
    runner = HopperBackend().prepare(trained)
    assert isinstance(runner, HopperRunner)
    assert runner.gradients is not None
    assert now == [runner.launch.spec]
    assert tuple(later[: len(runner.gradients.specs)]) == runner.gradients.specs, "its own backward comes first"
    assert set(now + later) == set(HopperBackend().kernels(trained))


@pytest.mark.parametrize("name", CASES)
def test_every_plan_fits_in_shared_memory(name: str) -> None:
    asked = describe(CASES[name].request("meta", torch.bfloat16), "cuda")
    assert not HopperBackend().why_not(asked, H200)
    assert all(config.shared_bytes() <= SHARED_LIMIT for config in forward_family(asked))
    assert str(dispatch.select(asked, H200, "hopper"))


def test_more_rows_than_tma_counts_are_refused_in_words() -> None:
    """A copy, which other tensors out of TMA's reach become, has as many."""
    shape = (1 << 20, 1 << 10, 1, 8)
    assert tessera.plan(shape, shape, device="h200").backend == "hopper"
    more = (shape[0] + 1, *shape[1:])
    assert tessera.plan(more, more, device="h200").backend == "torch"
    with pytest.raises(Unsupported, match=r"q=1073742848 rows in 1048577 sequences: TMA counts 2\^30; divide the batch"):
        tessera.plan(more, more, device="h200", backend="hopper")


@pytest.mark.parametrize("overlap", Overlap)
def test_rings_have_no_more_stages_than_named_barriers(overlap: Overlap) -> None:
    """With four places and turns, a barrier would be one of both: the configuration says so before anything is compiled."""
    shape = (1, 4096, 8, 64)
    config = replace(forward_config(tessera.plan(shape, shape, device="h200").problem), overlap=overlap)
    most = 5 if overlap in (Overlap.NONE, Overlap.DRIFTING) else 3
    assert replace(config, stages=most).stages == most
    for stages in (0, most + 1):
        with pytest.raises(ValueError, match=f"stages={stages}: there are named barriers for 1 to {most} of them"):
            replace(config, stages=stages)


@pytest.mark.parametrize("name", ["64 queries", "latent"])
def test_rings_over_a_cache_have_three_stages_at_most(name: str) -> None:
    config = chunk_plan(describe_cache(CACHE_CASES[name].request("meta", torch.bfloat16), "cuda"), 132).config
    with pytest.raises(ValueError, match="stages=4: there are named barriers for 1 to 3 of them, for 5 in a forward"):
        replace(config, stages=4)


def test_warmup_compiles_what_plans_will_need_and_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[jit.KernelSpec] = []

    def warmup(specs: Iterable[jit.KernelSpec]) -> int:
        asked.extend(specs)
        return len(asked)

    monkeypatch.setattr(jit, "warmup", warmup)
    shape = (1, 4096, 16, 128)
    forward = tessera.plan(shape, shape, device="h200", causal=True)
    training = tessera.plan(shape, shape, device="h200", causal=True, requires_grad=True)
    assert tessera.warmup([forward, forward.problem, training, tessera.plan(shape, shape)]) == len(asked)
    forward_kernels = set(HopperBackend().kernels(forward))
    # the backward's three, one where tiles see few rows, and two for few keys
    assert len(asked) == len(set(asked)) == len(forward_kernels) + 6
    assert forward_kernels < set(asked)
    asked.clear()
    assert tessera.warmup(forward) == len(forward_kernels)
    assert set(asked) == forward_kernels


@pytest.mark.parametrize("rows", [1, 191, 512, 1024, 4096, 10_000])
@pytest.mark.parametrize("heads", [1, 16, 100, 512])
def test_low_tiles_end_the_grid_sooner(rows: int, heads: int) -> None:
    """The end that a division is chosen by is the one that a queue of tiles gives, and no division ends sooner."""
    config = replace(forward_config(problem(1 << 20, 128, {})), consumers=3, pairing=None)

    def end(tall: int) -> float:
        low = -(-(rows - tall * config.rows) // config.low_rows)
        free = [0.0] * 132
        for time in [1.0] * (tall * heads) + [LOW] * (low * heads):
            heapq.heappush(free, heapq.heappop(free) + time)
        return max(free)

    tall = tall_blocks(config, rows, heads, 132)
    most = rows // config.rows
    fewest = max(0, most - 2 * 132 // heads - 2)
    assert fewest <= tall <= most
    assert end(tall) == pytest.approx(min(map(end, range(fewest, most + 1))))


NO_SCORES = (
    CASES["no keys"],
    Case("no keys, sinks", seqlen_k=0, sinks=True, query_end=(3, 90)),
    Case("packed, no keys", lengths_q=(5, 0, 9), lengths_k=(0, 0, 0)),
    Case("packed, no keys, sinks", lengths_q=(5, 0, 9), lengths_k=(0, 0, 0), sinks=True),
)


@pytest.mark.parametrize("spare", [0, 4], ids=["whole", "rows of no sequence"])
@pytest.mark.parametrize("case", NO_SCORES, ids=lambda case: case.name)
def test_without_keys_nothing_is_launched(case: Case, spare: int) -> None:
    """out 0, lse the sink's logit, and the sink's gradient; packed rows of no sequence have none."""
    request = case.request("cpu", torch.float32, requires_grad=True)
    if spare and case.is_varlen:
        request = request._replace(q=torch.cat((request.q, torch.randn(spare, *request.q.shape[1:]))).detach().requires_grad_())
    problem, operands = bind(request)
    runner = HopperRunner(problem, None, None)  # type: ignore[arg-type]
    out, lse = runner.forward(operands)
    ref_out, ref_lse = reference.attention(problem, operands)
    assert torch.equal(out.double(), ref_out)
    torch.testing.assert_close(lse.double(), ref_lse)
    dlse = torch.randn_like(lse)
    found = runner.backward(operands, Upstream(out, lse, torch.randn_like(out), dlse))
    if request.sinks is not None:
        (wanted,) = verify._gradients(ref_out, ref_lse, torch.zeros_like(out), dlse, [request.sinks])
        torch.testing.assert_close(found.dsinks, wanted)
    assert not found.dq.any()


def test_a_sequence_whose_rows_are_not_used_has_no_lse() -> None:
    request = Case("", lengths_q=(5, 3), lengths_k=(0, 0), sinks=True).request("cpu", torch.float32)
    problem, operands = bind(request)
    used = torch.tensor([2, 3], dtype=torch.int32)
    _, lse = without_scores(problem, operands.q, operands.sinks, (request.cu_seqlens_q, used))
    assert lse.isfinite().all(dim=0).tolist() == [True, True, False, False, False, True, True, True]


STEPS: dict[str, dict[str, Any]] = {
    "one query": {"q": (8, 1, 32, 128)},
    "one query, short": {"q": (8, 1, 32, 128), "pages": 4},
    "a few queries": {"q": (8, 4, 32, 128)},
    "chunks": {"q": (8, 64, 32, 128)},
    "prompts": {"q": (1600, 32, 128), "cu_seqlens_q": (9,)},
    "prompts, appending": {"q": (1600, 32, 128), "cu_seqlens_q": (9,), "k": (1600, 8, 128)},
}


def step_kernels(name: str, batch: int, longer: float = 1.0) -> tuple[set[jit.KernelSpec], set[jit.KernelSpec]]:
    """What warmup compiles for a step of so many sequences, and what the step launches."""
    options = {"pages": 256} | STEPS[name]
    q, pages = options.pop("q"), options.pop("pages")
    rows = round(q[0] / 8 * batch * longer) if len(q) == 3 else batch
    if len(q) == 3:
        options["cu_seqlens_q"] = (batch + 1,)
    if "k" in options:
        options["k"] = options["v"] = (rows, 8, 128)
    pool = (pages * batch, 64, 8, 128)
    plan = tessera.plan_kvcache((rows, *q[1:]), pool, pool, page_table=(batch, pages), causal=True, device=H200, **options)
    return set(SERVING_BACKEND.kernels(plan)), set(kernels_of(plan))


@pytest.mark.parametrize("name", STEPS)
def test_a_servers_next_step_compiles_nothing(name: str) -> None:
    """Sequences come and go, and prompts of other lengths: what is warm for one step is warm for all."""
    warm, own = step_kernels(name, 8)
    assert own <= warm
    for batch in (1, 2, 3, 5, 7, 8, 13, 33, 64, 100, 256, 700):
        for longer in (0.5, 1.0, 3.0) if "prompts" in name else (1.0,):
            assert step_kernels(name, batch, longer)[1] <= warm, (batch, longer)


def test_a_gpu_that_is_left_to_torch_operations_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32, which no kernel takes, on tensors that pass for a GPU's: a warning with the reason, or none if asked for."""
    for module in (calls, serving_calls):
        monkeypatch.setattr(module, "_known", {})
        monkeypatch.setattr(module, "Device", SimpleNamespace(of=lambda _: H200))
    q, lengths = torch.randn(2, 4, 2, 16), torch.tensor([3, 4], dtype=torch.int32)
    for call in (
        partial(tessera.attention, q, q, q, softcap=1.0),
        partial(tessera.attention, q.clone().requires_grad_(), q, q, softcap=1.0),
        partial(tessera.attention_with_kvcache, q, q, q, cache_seqlens=lengths),
    ):
        with pytest.warns(
            RuntimeWarning, match=r"exactly but slowly; not hopper: q.dtype=torch.float32: .* use bfloat16"
        ) as told:
            call()
        assert told[0].filename == __file__, "whose line is shown"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call()  # the same again
            call(backend="torch")


@pytest.mark.parametrize("window", [(None, None), (None, 0), (100, 0), (200, 749), (4096, 0), (0, 3000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_plan_has_the_form_that_ptxas_gets_wrong(window: tuple[int | None, int | None], dtype: torch.dtype) -> None:
    """Three consumers without overlap, two tiles of Q by descriptors: an illegal address, met with windows at head_dim 64."""
    for dim in (32, 64, 96, 128, 192, 256):
        case = Case("", batch=1, seqlen_q=5000, seqlen_k=5000, head_dim=dim, window=window)
        for config in forward_family(describe(case.request("meta", dtype))):
            reads_q = config.held < len(config.dims)
            assert not (config.consumers == 3 and config.overlap is Overlap.NONE and config.queries == 2 and reads_q), config


def test_choosable_forms_are_those_of_plans_that_the_gate_does_not_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosable, "DIMS", ((64, 64), (96, 64)))
    monkeypatch.setattr(choosable, "KINDS", tuple(kind for kind in choosable.KINDS if kind.name in ("causal", "packed, window")))
    monkeypatch.setattr(choosable, "CACHE_DIMS", ((96, 96),))
    found = choosable.variants()
    assert len({one.name for one in found}) == len({one.spec for one in found}) == len(found)
    assert not {one.spec for one in found} & {one.spec for one in gate.collect()}
    assert tuple(dict.fromkeys(one.spec.function for one in found)) == choosable.MAIN
    shapes = [(1, 4096, 2, dim) for dim in (96, 96, 64)]
    assert set(HopperBackend().kernels(tessera.plan(*shapes, device="h200", causal=True))) & {one.spec for one in found}


@pytest.mark.parametrize(
    ("head_dim", "seqlen", "mask", "tiles", "spared"),
    [
        (64, 512, {"causal": True}, 3072, 12), (64, 1024, {"causal": True}, 3072, 7), (128, 4096, {"causal": True}, 2048, 2),
        (128, 8192, {"causal": True}, 2048, 0), (256, 512, {"causal": True}, 2048, 7), (256, 4096, {"causal": True}, 2048, 0),
        (64, 16384, {"window": (255, 0)}, 2752, 12), (64, 16384, {"window": (1023, 0)}, 2752, 4),
        (64, 16384, {"window": (4095, 0)}, 2752, 0), (128, 16384, {"window": (4095, 0)}, 2048, 4),
        (128, 512, {}, 2048, 11), (128, 1024, {}, 2048, 4), (128, 1024, {"deterministic": True}, 2048, 4),
        (64, 1024, {"deterministic": True}, 3072, 0), (128, 1024, {"causal": True, "deterministic": True}, 2048, 0),
    ],
)  # fmt: skip
def test_fewer_keys_a_row_spare_more_multiprocessors(
    head_dim: int, seqlen: int, mask: dict[str, Any], tiles: int, spared: int
) -> None:
    """Of 132, for 16384 tokens; of equal tiles as many as take no round more."""
    shape = (16384 // seqlen, seqlen, 2048 // head_dim, head_dim)
    problem = tessera.plan(shape, shape, device="h200", requires_grad=True, **mask).problem
    assert spared_multiprocessors(problem, tiles, 132) == spared
    assert spared_multiprocessors(replace(problem, shape=replace(problem.shape, seqlen_q=0)), tiles, 132) == 0
