"""Calls over a KV cache from torch's side: what is refused and how, `debug`, compiled graphs, the operators, plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.autograd import forward_ad

import tessera
from tessera import attention_cascade, attention_with_kvcache, checking, plan_kvcache
from tessera.errors import Unsupported
from tessera.serving import dispatch, operators, support, verify
from tessera.serving.cases import CACHE_CASES, CacheCase
from tessera.serving.operands import FP8

CASE = CacheCase("", cached=(20, 5), page_size=8, heads_q=4, heads_kv=2, head_dim=16)
APPEND = CacheCase("", cached=(20, 5), new=2, seqlen_q=2, rotary_dim=16, head_dim=16, capacity=32)


def call(case: CacheCase = CASE, function: Callable[..., Any] = attention_with_kvcache, **changes: Any) -> Any:
    """The case's call with these arguments changed; an argument may be a function of the case's own."""
    request = case.request()._asdict()
    request = {name: value for name, value in request.items() if name not in ("left", "right")} | {"causal": True}
    for name, value in changes.items():
        request[name] = value(request[name]) if callable(value) else value
    first = [request.pop(name) for name in ("q", "k_cache", "v_cache")]
    return function(*first, **request)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _outside(table: Tensor) -> Tensor:
    table[0, 1] = 99
    return table


def _fp8(rows: Tensor) -> Tensor:
    return rows.to(torch.float8_e4m3fn)


# name: (the call, the error, the argument that the message begins with, what else it holds)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str, tuple[str, ...]]] = {
    "q of 3 dims": (lambda: call(q=torch.zeros(2, 4, 16)), ValueError, "q=", ("(batch, seqlen_q, heads_q, head_dim)",)),
    "q float64": (lambda: call(q=torch.Tensor.double), TypeError, "q=", ("float64", "bfloat16")),
    "q a list": (lambda: call(q=[1.0]), TypeError, "q=", ("list",)),
    "packed q of 4 dims": (lambda: call(cu_seqlens_q=int32(0, 1, 2)), ValueError, "q=", ("(total_q, heads_q, head_dim)",)),
    "cache of 3 dims": (lambda: call(k_cache=torch.zeros(9, 8, 16)), ValueError, "k_cache=", ("page_size",)),
    "cache dtype": (lambda: call(k_cache=torch.Tensor.half), TypeError, "k_cache=", ("float16", "float8_e4m3fn")),
    "caches differ in dtype": (lambda: call(v_cache=lambda x: x.to(FP8)), TypeError, "v_cache=", ("k_cache",)),
    "cache head_dim": (lambda: call(k_cache=lambda x: x[..., :8]), ValueError, "k_cache=", ("head_dim 8", "16")),
    "caches differ in rows": (lambda: call(v_cache=lambda x: x[:, :4]), ValueError, "v_cache=", ("head_dim alone",)),
    "strided cache": (
        lambda: call(v_cache=lambda x: x.repeat(1, 1, 1, 2)[..., ::2]), ValueError, "v_cache.stride()=", ("contiguous",)),
    "no v_cache": (lambda: call(v_cache=None), ValueError, "head_dim_v=", ("first head_dim_v columns", "v_cache")),
    "head_dim_v too": (lambda: call(head_dim_v=8), ValueError, "head_dim_v=", ("16 columns",)),
    "heads": (lambda: call(q=torch.zeros(2, 1, 3, 16)), ValueError, "heads=", ("3 query, 2 key/value",)),
    "head_dim": (lambda: call(CacheCase("", cached=(2,), head_dim=264)), ValueError, "head_dim=", ("256",)),
    "lengths int64": (lambda: call(cache_seqlens=torch.tensor([1, 2])), TypeError, "cache_seqlens=", ("int32",)),
    "lengths of 3": (lambda: call(cache_seqlens=int32(1, 2, 3)), ValueError, "cache_seqlens=", ("2 sequences",)),
    "lengths an int": (lambda: call(cache_seqlens=5), TypeError, "cache_seqlens=", ("int", "Tensor")),
    "lengths too long": (lambda: call(cache_seqlens=int32(20, 25)), ValueError, "cache_seqlens=25", ("sequence 1", "24")),
    "length below 0": (lambda: call(cache_seqlens=int32(-1, 5)), ValueError, "cache_seqlens=-1", ("sequence 0",)),
    "table of 3 rows": (lambda: call(page_table=torch.zeros(3, 4).int()), ValueError, "page_table=", ("2 sequences",)),
    "table int64": (lambda: call(page_table=torch.Tensor.long), TypeError, "page_table=", ("int32",)),
    "page outside": (lambda: call(page_table=_outside), ValueError, "page_table=99", ("sequence 0", "page 1", "9 pages")),
    "table and entries": (lambda: call(cache_batch_idx=int32(0, 1)), ValueError, "cache_batch_idx=", ("page_table[",)),
    "too few entries": (
        lambda: call(APPEND, k_cache=lambda x: x[:1], v_cache=lambda x: x[:1]), ValueError, "k_cache=", ("1 entries",)),
    "entry outside": (lambda: call(APPEND, cache_batch_idx=int32(0, 2)), ValueError, "cache_batch_idx=2", ("sequence 1",)),
    "entry twice": (lambda: call(APPEND, cache_batch_idx=int32(1, 1)), ValueError, "cache_batch_idx=", ("two sequences",)),
    "padding too wide": (lambda: call(cache_leftpad=int32(3, 6)), ValueError, "cache_leftpad=6", ("sequence 1", "5")),
    "offsets fall": (lambda: call(q=torch.zeros(4, 4, 16), cu_seqlens_q=int32(0, 3, 2)), ValueError, "cu_seqlens_q=", ("rise",)),
    "no room": (lambda: call(APPEND, cache_seqlens=int32(31, 5)), ValueError, "cache_seqlens + new rows=33", ("32",)),
    "k without v": (lambda: call(APPEND, v=None), ValueError, "v=None", ("values",)),
    "v without k": (lambda: call(APPEND, k=None), ValueError, "v=", ("new keys",)),
    "k of another batch": (lambda: call(APPEND, k=torch.zeros(3, 2, 2, 16)), ValueError, "k=", ("(2, seqlen_new, 2, 16)",)),
    "k of another dtype": (lambda: call(APPEND, k=torch.Tensor.half), TypeError, "k=", ("float16",)),
    "k in FP8 for a wide cache": (lambda: call(APPEND, k=_fp8, v=_fp8), TypeError, "k=torch.float8_e4m3fn", ("the cache",)),
    "k in FP8, v not": (lambda: call(CacheCase("", new=2, scales="none"), k=_fp8), TypeError, "v=torch.float32", ("both",)),
    "k in FP8, rotated": (
        lambda: call(CacheCase("", new=2, scales="none", rotary_dim=16), k=_fp8, v=_fp8),
        TypeError, "k=torch.float8_e4m3fn", ("rotated",)),
    "append to an expanded cache": (
        lambda: call(APPEND, k_cache=lambda x: x[:1].expand(2, -1, -1, -1)), ValueError, "k_cache.stride()=", ("share memory",)),
    "rotary without k": (
        lambda: call(rotary_cos=torch.zeros(30, 8), rotary_sin=torch.zeros(30, 8)), ValueError, "rotary_cos=", ("k",)),
    "cosine alone": (lambda: call(APPEND, rotary_sin=None), ValueError, "rotary_sin=None", ("both",)),
    "rotary too wide": (
        lambda: call(APPEND, rotary_cos=torch.zeros(30, 9), rotary_sin=torch.zeros(30, 9)),
        ValueError, "rotary_cos=", ("head_dim 16",)),
    "rotary dtype": (lambda: call(APPEND, rotary_cos=torch.Tensor.half), TypeError, "rotary_cos=", ("float32",)),
    "rotary too short": (
        lambda: call(APPEND, rotary_cos=lambda x: x[:21], rotary_sin=lambda x: x[:21]),
        ValueError, "cache_seqlens + rows=22", ("21 positions",)),
    "rotary too short for queries": (  # one row of the tables would turn all of them
        lambda: call(replace(APPEND, seqlen_q=5, new=1), rotary_cos=lambda x: x[:21], rotary_sin=lambda x: x[:21]),
        ValueError, "cache_seqlens + rows=25", ("21 positions",)),
    "scales of a wide cache": (lambda: call(k_descale=torch.ones(2)), ValueError, "k_descale=", ("float8_e4m3fn",)),
    "scales of 3 heads": (
        lambda: call(CacheCase("", scales="none"), k_descale=torch.ones(3)), ValueError, "k_descale=", ("(2,)", "blocks")),
    "scales in half": (
        lambda: call(CacheCase("", scales="head"), k_descale=torch.Tensor.half), TypeError, "k_descale=", ("float()",)),
    "splits": (lambda: call(num_splits=257), ValueError, "num_splits=257", ("256",)),
    "splits a float": (lambda: call(num_splits=2.0), TypeError, "num_splits=", ("int",)),
    "schedule": (lambda: call(schedule="magic"), ValueError, "schedule=", ("split", "stream_k")),
    "softcap": (lambda: call(softcap=-1.0), ValueError, "softcap=", ("positive",)),
    "scale": (lambda: call(softmax_scale=float("nan")), ValueError, "softmax_scale=", ("finite",)),
    "scale a list": (lambda: call(softmax_scale=[1.0]), TypeError, "softmax_scale=", ("list",)),
    "causal": (lambda: call(causal=torch.ones(2, 4).bool()), TypeError, "causal=Tensor", ("True or False",)),
    "window": (lambda: call(window=(-2, 0)), ValueError, "window[0]=", (">= 0",)),
    "sinks": (lambda: call(sinks=torch.zeros(2)), ValueError, "sinks=", ("(4,)",)),
    "backend": (lambda: call(backend="magic"), ValueError, "backend=", ("cpu",)),
    "backend a list": (lambda: call(backend=["cpu"]), TypeError, "backend=['cpu']", ("backend_names",)),
    "schedule a list": (lambda: call(schedule=["split"]), ValueError, "schedule=['split']", ("stream_k",)),
    "head_dim_v a float": (lambda: call(v_cache=None, head_dim_v=4.0), TypeError, "head_dim_v=4.0", ("int",)),
    "invariant by a word": (lambda: call(batch_invariant="no"), TypeError, "batch_invariant='no'", ("True or False",)),
    "rotary by a tensor": (
        lambda: call(rotary_interleaved=torch.tensor(True)), TypeError, "rotary_interleaved=", ("True or False",)),
    "scale past float32": (lambda: call(softmax_scale=1e300), ValueError, "softmax_scale=", ("finite",)),
    "gradient": (lambda: call(q=lambda q: q.requires_grad_()), ValueError, "q.requires_grad=", ("no_grad",)),
    "cascade, window": (
        lambda: call(function=attention_cascade, shared_pages=1, window=(3, 0)),
        ValueError, "window=", ("attention_with_kvcache",)),
    "cascade, padding": (
        lambda: call(function=attention_cascade, shared_pages=1, cache_leftpad=int32(0, 0)),
        ValueError, "cache_leftpad=", ("padding",)),
    "cascade, pages": (lambda: call(function=attention_cascade, shared_pages=4), ValueError, "shared_pages=4", ("0 to 3",)),
    "cascade, no tensor": (lambda: call(function=attention_cascade, shared_pages=1, q=[7]), TypeError, "q=list", ("Tensor",)),
    "cascade, a flat cache": (
        lambda: call(function=attention_cascade, shared_pages=1, k_cache=torch.zeros(9)), ValueError, "k_cache=", ("pages",)),
    "v_cache, flat": (lambda: call(v_cache=lambda x: x.flatten()), ValueError, "v_cache=", ("1 dimensions",)),
    "cascade, a float": (lambda: call(function=attention_cascade, shared_pages=1.0), TypeError, "shared_pages=", ("int",)),
    "cascade, not shared": (
        lambda: call(function=attention_cascade, shared_pages=1), ValueError, "shared_pages=1", ("sequence 1",)),
    "cascade, listed scales": (
        lambda: call(function=attention_cascade, shared_pages=1, k_descale=[1.0]), TypeError, "k_descale=list", ("Tensor",)),
    "cascade, listed offsets": (
        lambda: call(function=attention_cascade, shared_pages=1, cu_seqlens_q=[0, 1, 2]), TypeError, "cu_seqlens_q=list",
        ("Tensor",)),
    "cascade, listed rows": (
        lambda: call(function=attention_cascade, shared_pages=1, k=[1.0]), TypeError, "k=list", ("Tensor",)),
    "cascade, another's option": (
        lambda: call(function=attention_cascade, shared_pages=1, window_size=(4, 0)),
        TypeError, "window_size=", ("it is window",)),
    "cascade, invariant": (
        lambda: call(function=attention_cascade, shared_pages=1, batch_invariant=True),
        ValueError, "batch_invariant=", ("batch's",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    bad, error, argument, says = BAD[name]
    with pytest.raises(error) as raised:
        bad()
    message = str(raised.value)
    assert message.startswith(argument), message
    assert all(part in message for part in says), message


def test_bad_calls_are_good_but_for_what_is_bad() -> None:
    call(), call(APPEND)


@pytest.mark.parametrize("case", [CASE, APPEND], ids=["read", "append"])
def test_a_repeated_call_is_recalled_and_does_the_same(case: CacheCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """By shapes and options, without a look at its arguments' types; what a call is refused for is refused again."""
    first = [call(case, **options) for options in ({}, {"softcap": 3.0})]
    with monkeypatch.context() as patched:
        patched.setattr(tessera.serving.api, "_checked", None)
        for options, expected in zip(({}, {"softcap": 3.0}), first, strict=True):
            assert torch.equal(call(case, **options), expected)
    assert not torch.equal(*first)
    with pytest.raises(ValueError, match="cache_seqlens=1000: sequence 1"):
        call(case, cache_seqlens=int32(20, 1000))
    with pytest.raises(ValueError, match="requires_grad=True"):
        call(case, q=torch.Tensor.requires_grad_)
    with torch.no_grad():
        assert torch.equal(call(case, q=torch.Tensor.requires_grad_), first[0])
    with pytest.raises(TypeError, match="cache_seqlens=list"):
        call(case, cache_seqlens=[20, 5])


def test_cascade_within_the_prefix() -> None:
    case = CacheCase("", cached=(20, 16), page_size=8, head_dim=16)
    with pytest.raises(ValueError, match="cache_seqlens=16: sequence 1"):
        call(case, attention_cascade, shared_pages=2, page_table=lambda t: t[:1].expand(2, -1).contiguous())


def test_debug_reads_what_is_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the CPU, contents are read under `debug` alone: here the CPU plays the device."""

    class Elsewhere:
        device = torch.device("cuda", 0)

    assert not checking.reads_contents(Elsewhere())  # type: ignore[arg-type]
    with tessera.debug():
        assert checking.reads_contents(Elsewhere())  # type: ignore[arg-type]
        with tessera.debug():
            pass
        assert checking.reads_contents(Elsewhere())  # type: ignore[arg-type]
        assert not checking.reads_contents(torch.empty(1, device="meta"))
    assert not checking.reads_contents(Elsewhere())  # type: ignore[arg-type]


# torch.compile


def step(q: Tensor, caches: tuple[Tensor, Tensor], lengths: Tensor, new: tuple[Tensor, Tensor], table: Tensor | None) -> Tensor:
    """A decoding step of a model: projections before, the cache written and read, something after."""
    k, v = new
    out = attention_with_kvcache(
        2 * q, *caches, cache_seqlens=lengths, k=k + 1, v=v * 0.5, page_table=table, causal=True, window=(30, 0)
    )
    return out.tanh() + caches[0].nan_to_num().sum()


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_compile(paged: bool) -> None:
    """fullgraph: the results are eager's, and so is the cache, also through the graph that sums it after the call."""
    case = CacheCase("", cached=(20, 5), new=2, seqlen_q=2, head_dim=16, page_size=8 if paged else None, capacity=32)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    requests = [case.request() for _ in range(2)]
    outs = [
        function(r.q, (r.k_cache, r.v_cache), r.cache_seqlens, (r.k, r.v), r.page_table)
        for function, r in zip((step, compiled), requests, strict=True)
    ]
    torch.testing.assert_close(*outs)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(*(getattr(r, name) for r in requests), equal_nan=True, rtol=0, atol=0)


def test_one_graph_serves_growing_batches() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for batch, capacity in ((5, 72), (7, 48), (13, 88)):  # no two sizes alike at first: those would count as one
        r = CacheCase("", cached=(20,) * batch, new=2, seqlen_q=2, head_dim=16, page_size=8, capacity=capacity).request()
        compiled(r.q, (r.k_cache, r.v_cache), r.cache_seqlens, (r.k, r.v), r.page_table)
    assert counter.frame_count == 1


OPCHECKED = ("pages of 16", "append, packed", "rotary", "latent, small", "packed, sinks, long")  # opcheck compares no FP8


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name: str) -> None:
    request = CACHE_CASES[name].request()
    for cache in (request.k_cache, request.v_cache):  # opcheck takes NaN for a mutation
        if cache is not None:
            cache.nan_to_num_()
    operator = torch.ops.tessera.attention_with_kvcache if request.k is None else torch.ops.tessera.attention_with_kvcache_
    torch.library.opcheck(operator.default, tuple(request))


def test_the_operators_say_what_they_write() -> None:
    written = [a.name for a in torch.ops.tessera.attention_with_kvcache_.default._schema.arguments if a.alias_info]
    assert written == ["k_cache", "v_cache"]
    assert not any(a.alias_info for a in torch.ops.tessera.attention_with_kvcache.default._schema.arguments)


def test_operator_and_short_way_agree() -> None:
    request = CACHE_CASES["pages, packed, window"].request()
    for ours, theirs in zip(operators.forward(request), torch.ops.tessera.attention_with_kvcache(*request), strict=True):
        assert torch.equal(ours, theirs)


def test_vmap_is_refused() -> None:
    request = CACHE_CASES["one query"].request()
    q = torch.stack([request.q, request.q])
    with pytest.raises(NotImplementedError, match="fold the mapped dimension"):
        torch.vmap(lambda q: torch.ops.tessera.attention_with_kvcache(q, *request[1:])[0])(q)


def test_forward_mode_is_refused() -> None:
    """Its tangents would be lost without a word where kernels run."""
    call()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"q carries a tangent.*attention_with_kvcache"):
        call(q=lambda q: forward_ad.make_dual(q, torch.ones_like(q)))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="k_cache carries a tangent"):
        call(APPEND, k_cache=lambda k: forward_ad.make_dual(k, torch.ones_like(k)))


# plans


def test_plan_from_shapes() -> None:
    plan = plan_kvcache((64, 1, 32, 128), (4096, 64, 8, 128), (4096, 64, 8, 128), page_table=(64, 512), causal=True)
    assert plan.backend == "cpu"
    assert plan.problem.shape.seqlen_k == 512 * 64
    assert plan.problem.bytes_per_key() == 2 * 8 * 128 * 2
    text = str(plan)
    assert "4096 pages of 64" in text
    assert "4,096 B a cached position" in text
    assert plan.to_json()["backend"] == "cpu"


def test_plan_is_that_of_the_call() -> None:
    request = CACHE_CASES["rotary, halves"].request()
    options = {name: value for name, value in request._asdict().items() if name not in ("left", "right")}
    first = [options.pop(name) for name in ("q", "k_cache", "v_cache")]
    plan = plan_kvcache(*first, causal=True, **options)
    assert plan.problem.append is not None
    assert plan.problem.append.rotary is not None
    assert plan == dispatch.select(plan.problem, plan.device)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 64])
@pytest.mark.parametrize("page_size", [None, 1, 16, 64])
def test_batch_invariant_plans_do_not_know_the_batch(page_size: int | None, rows: int, packed: bool, latent: bool) -> None:
    """On Hopper: one kernel, its tiles and parts the same, whatever the batch, and however many rows the others have."""
    dim, heads = (576, (16, 1)) if latent else (128, (8, 2))
    known = set()
    for batch, total in ((1, rows), (2, 2 * rows), (41, 300 + rows), (500, 500 * rows)):
        pages = {} if page_size is None else {"page_table": (batch, 9008 // page_size)}
        cache = (batch, 9008) if page_size is None else (20000, page_size)
        q = (total,) if packed else (batch, rows)
        plan = plan_kvcache(
            (*q, heads[0], dim), (*cache, heads[1], dim), None if latent else (*cache, heads[1], dim), device="h200", causal=True,
            head_dim_v=512 if latent else None, batch_invariant=True, cu_seqlens_q=(batch + 1,) if packed else None, **pages,
        )  # fmt: skip
        assert plan.backend == "hopper"
        config: Any = plan.choice.config
        known.add((plan.choice.kernel, str(config.config), config.splits, getattr(config, "least", None)))
    assert len(known) == 1, known


@pytest.mark.parametrize("rows", [1, 64])
def test_more_sequences_than_a_grid_has_programs_are_refused_in_words(rows: int) -> None:
    """By the kernels; torch's operations take them, with a warning."""

    def made(batch: int, **options: Any) -> tessera.CachePlan:
        cache = (64, 16, 2, 64)
        return plan_kvcache((batch, rows, 4, 64), cache, cache, page_table=(batch, 4), device="h200", causal=True, **options)

    assert made(65535).backend == "hopper"
    assert made(65536).backend == "torch"
    with pytest.raises(Unsupported, match=r"q=65536 sequences, 4 heads: a grid has at most 65535 programs.*divide the batch"):
        made(65536, backend="hopper")


def test_plan_refuses_as_the_call_would() -> None:
    with pytest.raises(ValueError, match="head_dim_v=None"):
        plan_kvcache((2, 1, 16, 576), (9, 64, 1, 576))
    with pytest.raises(Unsupported, match="backend='cpu' cannot"):
        plan_kvcache((2, 1, 16, 64), (2, 64, 2, 64), (2, 64, 2, 64), device="h200", backend="cpu")
    assert tessera.warmup([plan_kvcache((2, 1, 16, 64), (2, 64, 2, 64), (2, 64, 2, 64))]) == 0


# The support matrix

FEATURES = {f"{feature.group}: {feature.name}": feature for feature in support.FEATURES}


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
@pytest.mark.parametrize("name", FEATURES)
def test_features_are_planned_or_refused_with_every_reason(name: str, backend: str) -> None:
    feature, device = FEATURES[name], support.home(backend)
    reasons = feature.refusal(backend)
    if not reasons:
        assert dispatch.select(feature.problem(device), device, backend).backend == backend
        return
    with pytest.raises(Unsupported) as caught:
        dispatch.select(feature.problem(device), device, backend)
    assert all(reason in str(caught.value) for reason in reasons)
    assert all(all(vars(reason).values()) for reason in caught.value.refusals[backend])


@pytest.mark.parametrize("name", FEATURES)
def test_features_of_the_cpu_run(name: str) -> None:
    assert not FEATURES[name].refusal("cpu")
    failed = [str(c) for c in verify.run(FEATURES[name].request("cpu")) if not c.ok]
    assert not failed, "; ".join(failed)
