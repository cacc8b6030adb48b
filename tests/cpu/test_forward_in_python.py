"""The Hopper forward's kernel, run by Python (tests/gluon_in_python.py) against the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from gluon_in_python import in_python
from references import far_below, rising
from torch import Tensor

from tessera import reference
from tessera.backends.hopper.config import ForwardConfig, Overlap, Pairing, Staging
from tessera.backends.hopper.launch import ForwardLaunch, counters
from tessera.backends.hopper.pieces.tiles import keeps_masks
from tessera.backends.hopper.plan import deepest, features_of, forward_config, forward_family
from tessera.cases import CASES, Case
from tessera.operands import Request, bind
from tessera.verify import compare

NAMES = (
    "full", "off the tile, causal", "more queries, causal", "gqa", "scale below 0, causal", "window", "padding", "padding left",
    "d72", "d192, full", "d192 v128", "documents", "varlen", "varlen, empty sequences",
)  # fmt: skip
LONG = {"batch": 2, "seqlen_q": 200, "seqlen_k": 330, "heads_q": 2, "heads_kv": 1}
MODIFIED = (
    *(case for case in CASES.values() if case.dropout_p or case.bias or case.alibi or case.sinks or case.softcap),
    *(Case(f"d{d}, everything", head_dim=d, causal=True, alibi="batch", bias=(1, 2, 200, 330), dropout_p=0.3, **LONG)
      for d in (64, 96, 128, 256)),
    *(Case(f"d{d}, dropout", head_dim=d, causal=causal, dropout_p=0.3, **LONG) for d in (192, 256) for causal in (False, True)),
    Case("d256, alibi", head_dim=256, alibi="head", causal=True, **LONG),
    Case("d256, bias of keys", head_dim=256, bias=(2, 1, 1, 330), **LONG),
    *(Case(f"bias {shape}", bias=shape, causal=True, **LONG)
      for shape in ((2, 2, 200, 330), (2, 1, 200, 330), (1, 1, 1, 330), (2, 1, 200, 1), (1, 2, 1, 1))),
    Case("padding left, everything", alibi="head", bias=(2, 2, 200, 330), dropout_p=0.3, key_start=(37, 130), **LONG),
    Case("padding left, bias", bias=(2, 2, 200, 330), key_start=(37, 130), **LONG),
    Case("scale of 0", softmax_scale=0.0, causal=True),
)  # fmt: skip


MANY = {"batch": 2, "seqlen_q": 500, "seqlen_k": 533, "heads_q": 4, "heads_kv": 2}
PACKED = {"lengths_q": (100, 1, 300, 33, 0, 257), "lengths_k": (100, 1, 300, 33, 0, 257), "heads_q": 4, "heads_kv": 2}
MANY_TILES = (
    Case("full", head_dim=128, **MANY), Case("causal", causal=True, **MANY), Case("narrow window", window=(100, 20), **MANY),
    Case("window", head_dim=128, window=(200, 0), **MANY), Case("packed, causal", causal=True, **PACKED),
    Case("packed, window", window=(70, 10), **PACKED),
    Case("documents", documents=(100, 250, 1, 149), **MANY | {"seqlen_k": 500}),
    Case("dropout, causal", dropout_p=0.1, causal=True, **MANY),
    Case("alibi, window", alibi="head", window=(200, 20), **MANY),
)  # fmt: skip
"""Problems of many more tiles than programs, so that every ring goes from lap to lap."""
SHALLOW = {"queries": 1, "stages": 2, "held": 0, "staging": Staging.OWN}
DIVISIONS = {
    "two": {"consumers": 2, "overlap": Overlap.WHOLE},
    "three in turn": {"consumers": 3, "overlap": Overlap.MAXIMA},
    "three": {"consumers": 3, "overlap": Overlap.NONE},
}


MULTIPROCESSORS = 3
PAIRED = 5
"""Enough for two pairs; the last one stays empty."""


@contextmanager
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Launches run here, on a stream whose counter is zero again when they are over."""
    counter = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(counters, "_of_stream", {(None, 0): counter.data_ptr()})
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    with torch.no_grad(), in_python():
        yield
    assert counter.item() == 0


def run(request: Request, monkeypatch: pytest.MonkeyPatch, config: ForwardConfig | None = None) -> tuple[Tensor, Tensor]:
    problem, operands = bind(request)
    with on_the_cpu(monkeypatch):
        config = config or forward_config(problem)
        return ForwardLaunch(problem, config, MULTIPROCESSORS if config.cluster == 1 else PAIRED)(operands)


def check(request: Request, monkeypatch: pytest.MonkeyPatch, config: ForwardConfig | None = None) -> None:
    refs, eagers = (reference.attention(*bind(request), dtype) for dtype in (torch.float64, torch.bfloat16))
    results = run(request, monkeypatch, config)
    for name, result, ref, eager in zip(("out", "lse"), results, refs, eagers, strict=True):
        compared = compare(name, result, ref, eager)
        assert compared.ok, str(compared)


@pytest.mark.parametrize("name", ["off the tile, causal", "varlen", "d192 v128"])
def test_a_repeated_call_takes_the_short_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same bits: at other addresses, at one that TMA can't reach, with other offsets and with one tensor for both."""
    request = CASES[name].request("cpu", torch.bfloat16)
    problem, operands = bind(request)
    plain = ForwardLaunch(problem, forward_config(problem), MULTIPROCESSORS)
    with on_the_cpu(monkeypatch):
        wanted, _ = plain(operands)
        shortcut = plain.shortcut(operands[3:])
        assert shortcut is not None
        offsets = tuple(x for x in request[3:5] if x is not None)
        moved = [torch.cat((x.new_zeros(3), x.flatten()))[3:].view(x.shape) for x in request[:3]]
        for inputs in (request[:3], [x.clone() for x in request[:3]], moved):
            assert torch.equal(shortcut(*inputs, *offsets), wanted)
        if offsets:
            other = torch.zeros_like(offsets[0])
            other[1:] = 5
            apart = [other, other.clone()]
            lengths = operands.lengths._replace(cu_seqlens_q=other, cu_seqlens_k=other)
            wanted, _ = plain(operands._replace(lengths=lengths))
            assert all(torch.equal(shortcut(*request[:3], *both), wanted) for both in (apart, apart[:1]))


def test_what_a_short_way_does_not_pass_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("padding", "documents", "sinks"):
        problem, operands = bind(CASES[name].request("cpu", torch.bfloat16))
        plain = ForwardLaunch(problem, forward_config(problem), MULTIPROCESSORS)
        with on_the_cpu(monkeypatch):
            plain(operands)
            assert plain.shortcut(operands[3:]) is None


@pytest.mark.parametrize("case", [*(CASES[name] for name in NAMES), *MODIFIED], ids=lambda case: case.name)
def test_cases(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case.request("cpu", torch.bfloat16), monkeypatch)


PAIRS = (
    *(Case(f"d{d}", head_dim=d, **MANY) for d in (64, 128, 192)), Case("one block of rows", head_dim=128, heads_q=2, heads_kv=1),
    Case("softcap, sinks", head_dim=96, softcap=5.0, sinks=True, **MANY), Case("padding", key_end=(200, 533), **MANY),
    Case("more keys", head_dim_v=64, **MANY | {"seqlen_k": 1500}), Case("causal", head_dim=128, causal=True, **MANY),
    Case("causal, d192", head_dim=192, causal=True, **MANY), Case("causal, more rows", causal=True, **MANY | {"seqlen_k": 200}),
    Case("window", head_dim=128, window=(200, 0), **MANY),
)  # fmt: skip
OF_PAIRS = [(case, pairing) for pairing in Pairing for case in PAIRS if case.window is None or pairing is Pairing.HEADS]
"""A window's row blocks come in no order that pairs neighbours."""


@pytest.mark.parametrize(("case", "pairing"), OF_PAIRS, ids=lambda of: getattr(of, "name", of))
def test_programs_in_pairs(case: Case, pairing: Pairing, monkeypatch: pytest.MonkeyPatch) -> None:
    """K comes from one program, V from the other; the last pair's second tile may have no rows."""
    request = case.request("cpu", torch.bfloat16)
    config = forward_config(bind(request)[0])
    check(request, monkeypatch, replace(config, pairing=pairing, stages=2 if pairing is Pairing.ROWS else 3))


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("case", MANY_TILES, ids=lambda case: case.name)
def test_many_tiles(case: Case, division: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the plan would take: two consumers and three, in turn or not, with little and with much in flight."""
    request = case.request("cpu", torch.bfloat16)
    planned = replace(forward_config(bind(request)[0]), **SHALLOW | DIVISIONS[division])
    for config in dict.fromkeys((planned, deepest(replace(planned, queries=2)))):
        check(request, monkeypatch, config)


@pytest.mark.parametrize(
    "case", [case for case in MANY_TILES if not case.dropout_p and not case.alibi], ids=lambda case: case.name
)
def test_many_tiles_adrift(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """P at once, without turns, as short windows have it at head_dim 64."""
    request = case.request("cpu", torch.bfloat16)
    adrift = {"consumers": 3, "overlap": Overlap.DRIFTING, "keys": 64, "stages": 5}
    check(request, monkeypatch, replace(forward_config(bind(request)[0]), **SHALLOW | adrift))


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize(
    "case", [case for case in MANY_TILES if not case.dropout_p and not case.alibi], ids=lambda case: case.name
)
def test_out_in_its_querys_place(case: Case, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Little in flight and much; some tiles leave consumers idle, who free their places all the same."""
    request = case.request("cpu", torch.bfloat16)
    form = {"consumers": 3, "overlap": Overlap.DRIFTING, "keys": 64, "queries": 2, "staging": Staging.QUERY}
    check(request, monkeypatch, replace(forward_config(bind(request)[0]), **SHALLOW | form | {"stages": stages}))


@pytest.mark.parametrize("keys", [400, 417, 464])
@pytest.mark.parametrize("window", [(None, 0), (130, 0), (256, 30)], ids=str)
def test_halves_of_blocks(window: tuple[int | None, int], keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a diagonal or a window's left edge leaves half a block, and where it doesn't; three consumers without a window."""
    case = Case("halves", head_dim=128, causal=window[0] is None, window=None if window[0] is None else window, batch=1,
                seqlen_q=400, seqlen_k=keys, heads_q=2, heads_kv=1)  # fmt: skip
    request = case.request("cpu", torch.bfloat16)
    two = replace(forward_config(bind(request)[0]), **SHALLOW, consumers=2, keys=128, overlap=Overlap.AT_ONCE)
    three = replace(two, consumers=3, overlap=Overlap.SCORES)
    for config in (two, three) if window[0] is None else (two,):
        check(request, monkeypatch, config)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("window", "rows", "keys"),
    [((200, 0), 1100, 1100), ((256, 0), 1500, 1500), ((300, 40), 1000, 1333), ((130, 0), 1300, 900), ((400, 0), 300, 300)],
    ids=str,
)
def test_whole_windows(window: tuple[int, int], rows: int, keys: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles whose masks are kept from one to the next, with cut ones among them, and rows without keys."""
    case = Case("whole windows", head_dim=dim, window=window, seqlen_q=rows, seqlen_k=keys, heads_q=2, heads_kv=1)
    request = case.request("cpu", torch.bfloat16)
    assert keeps_masks(forward_config(bind(request)[0]))
    check(request, monkeypatch)


@pytest.mark.parametrize(("rows", "keys"), [(2000, 2000), (1500, 2133), (1900, 1300)])
def test_wide_windows(rows: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At head_dim 128 by three consumers."""
    case = Case("wide windows", head_dim=128, window=(1024, 0), batch=1, seqlen_q=rows, seqlen_k=keys, heads_q=2, heads_kv=1)
    request = case.request("cpu", torch.bfloat16)
    config = replace(forward_family(bind(request)[0])[-1], features=features_of(bind(request)[0]))
    assert (config.consumers, config.keys) == (3, 64)
    check(request, monkeypatch, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [(None, None), (None, 0), (300, 0)], ids=str)
def test_outgrown_references(window: tuple[int | None, int | None], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    request = rising(128, window, "cpu", dtype)
    config = replace(forward_config(bind(rising(128, (None, 0), "cpu", dtype))[0]), features=features_of(bind(request)[0]))
    assert config.overlap is Overlap.AT_ONCE
    check(request, monkeypatch, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("window", "overlap"), [((None, None), Overlap.SCORES), ((300, 0), Overlap.DRIFTING)], ids=str)
def test_outgrown_references_of_three_consumers(
    window: tuple[int | None, int | None], overlap: Overlap, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = rising(64, window, "cpu", dtype)
    config = forward_config(bind(request)[0])
    assert (config.consumers, config.overlap) == (3, overlap)
    check(request, monkeypatch, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "overlap"), [(64, Overlap.SCORES), (128, Overlap.AT_ONCE), (256, Overlap.SCORES)])
@pytest.mark.parametrize("window", [(None, None), (None, 0)], ids=str)
def test_outgrown_references_under_dropout(
    window: tuple[int | None, int | None], dim: int, overlap: Overlap, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P that was taken anew is dropped too; its sums are those of all of it."""
    request = rising(dim, window, "cpu", dtype, dropout_p=0.4)
    config = forward_family(bind(request)[0])[-1]
    assert config.overlap is overlap
    check(request, monkeypatch, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_outgrown_maxima(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where warps vote on their threads' maxima: three consumers without overlap."""
    request = rising(96, (None, None), "cpu", dtype)
    config = forward_family(bind(request)[0])[-1]
    assert config.overlap is Overlap.NONE
    check(request, monkeypatch, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_keys_far_below_the_greatest(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check(far_below(128, "cpu", dtype), monkeypatch)
