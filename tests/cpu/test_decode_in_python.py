"""The Hopper decode kernel, run by Python (tests/gluon_in_python.py) against the oracle: every case that it serves."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from gluon_in_python import PlainWorkspace, in_python
from gluon_turns import Meeting
from torch import Tensor

from tessera.backends.hopper import append_launch, decode_launch, decode_plan
from tessera.backends.hopper.append_launch import AppendLaunch
from tessera.backends.hopper.decode_config import PARTS_TOGETHER
from tessera.backends.hopper.serving import HopperServingRunner
from tessera.device import Device
from tessera.serving import operators, verify
from tessera.serving.cases import CACHE_CASES, CacheCase
from tessera.serving.operands import CacheOperands, CacheRequest, describe, gather
from tessera.verify import compare

FEW = replace(Device.named("h200"), multiprocessors=3)
"""So few multiprocessors that a stream-K share goes over the ends of items and sequences."""


@pytest.fixture(autouse=True)
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    plain = PlainWorkspace()
    monkeypatch.setattr(decode_launch, "workspace", plain)
    yield
    assert not any(zeros.any() for zeros in plain.zeros)


def is_served(case: CacheCase) -> bool:
    return not decode_plan.why_not(describe(case.request("cpu", torch.bfloat16)))


def check(
    request: CacheRequest, device: Device = FEW, before: Callable[[CacheOperands], None] = lambda _: None
) -> decode_plan.DecodePlan:
    """`before`: what happens to the operands before the kernel runs."""
    problem = describe(request)
    assert not decode_plan.why_not(problem)
    launch = decode_launch.DecodeLaunch(problem, decode_plan.decode_plan(problem, device))
    append = None if problem.append is None else AppendLaunch(problem)

    def run(asked: CacheRequest) -> tuple[Tensor, Tensor]:
        operands = gather(asked)
        with in_python():
            before(operands)
            return HopperServingRunner(problem, append, launch).run(operands)

    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patched:
        patched.setattr(operators, "forward", run)
        failed = [str(compared) for compared in verify.run(request) if not compared.ok]
    assert not failed, "; ".join(failed)
    return launch.plan


@pytest.mark.parametrize("schedule", ["split", "stream_k"])
@pytest.mark.parametrize("name", [name for name, case in CACHE_CASES.items() if is_served(case)])
def test_cases(name: str, schedule: str) -> None:
    request = CACHE_CASES[name].request("cpu", torch.bfloat16)
    if request.num_splits is None:
        request = request._replace(schedule=schedule)
    check(request)


@pytest.mark.parametrize("multiprocessors", [7, 26, 51])
@pytest.mark.parametrize("cached", [(700, 700, 700), (700, 1, 250), (0, 0, 130)])
def test_shares(cached: tuple[int, ...], multiprocessors: int) -> None:
    """Equal lengths get crews of their own, others are cut anywhere."""
    case = CacheCase("shares", cached=cached, seqlen_q=2, schedule="stream_k", page_size=16)
    check(case.request("cpu", torch.bfloat16), replace(FEW, multiprocessors=multiprocessors))


@pytest.mark.parametrize(("multiprocessors", "turns"), [(33, (1, 2)), (24, (1, 0)), (20, (2, 2)), (19, (0, 0))])
def test_turns(multiprocessors: int, turns: tuple[int, int]) -> None:
    """More items than programs: equally long ones are done in turns, unless the last turn would leave many programs idle, or all
    turns are of whole items: then each is a program, of which the hardware begins one where another has ended."""
    case = CacheCase("turns", cached=(200,) * 12, heads_q=16, heads_kv=8, schedule="stream_k")
    plan = check(case.request("cpu", torch.bfloat16), replace(FEW, multiprocessors=multiprocessors))
    assert (plan.rounds, plan.crew) == turns
    ragged = replace(case, cached=(700, 1, 250, 3, 64, 64, 900, 128, 129, 0, 77, 500))
    check(ragged.request("cpu", torch.bfloat16), replace(FEW, multiprocessors=multiprocessors))


@pytest.mark.parametrize(
    ("heads", "multiprocessors", "teams"),
    [(8, 33, (8, 8)), (6, 20, (3, 13)), (6, 19, (2, 19)), (3, 40, (3, 13)), (5, 7, (1, 14))],
)
def test_teams(heads: int, multiprocessors: int, teams: tuple[int, int]) -> None:
    """Lengths that differ: programs go through the heads of the same rows side by side, as many as leave few without work."""
    case = CacheCase("teams", cached=(700, 1, 0, 390), heads_q=2 * heads, heads_kv=heads, seqlen_q=9, schedule="stream_k")
    plan = check(case.request("cpu", torch.bfloat16), replace(FEW, multiprocessors=multiprocessors))
    assert (plan.team, plan.teams) == teams


@pytest.mark.parametrize("heads_q", [2, 8, 16])
@pytest.mark.parametrize("splits", [2 * PARTS_TOGETHER - 3, 40])
def test_many_parts_are_added_in_two_steps(splits: int, heads_q: int) -> None:
    """Up to twice PARTS_TOGETHER in one; rows of an item one a warp, or two."""
    case = CacheCase("parts", cached=(2500,), heads_q=heads_q, heads_kv=1, num_splits=splits)
    plan = check(case.request("cpu", torch.bfloat16))
    assert plan.splits == splits


def test_a_few_parts_less_for_one_step() -> None:
    """33 programs an item would be two steps."""
    case = CacheCase("crews", cached=(2500,) * 4, heads_q=1, heads_kv=1, schedule="stream_k")
    assert check(case.request("cpu", torch.bfloat16), replace(FEW, multiprocessors=132)).crew == 32


@pytest.mark.parametrize("multiprocessors", [3, 4, 9])
@pytest.mark.parametrize("cached", [(700, 700, 700, 700), (700, 1, 250, 0)])
def test_slots_are_free_early(cached: tuple[int, ...], multiprocessors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of long sequences that programs have to themselves."""
    monkeypatch.setattr(decode_plan, "LONG", 512)
    case = CacheCase("early", cached=cached, heads_q=2, heads_kv=2, schedule="stream_k")
    plan = check(case.request("cpu", torch.bfloat16), replace(FEW, multiprocessors=multiprocessors))
    assert decode_plan.DecodeFeature.EARLY in plan.config.features


@pytest.mark.parametrize("splits", [None, 3])
@pytest.mark.parametrize("cached", [(700, 700, 700), (700, 1, 250)])
def test_the_next_kernel_may_begin_before_the_last_loads(
    cached: tuple[int, ...], splits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With so many tiles left, of parts that are as long; along the line of all tiles behind the last one."""
    monkeypatch.setattr(decode_plan, "PARTED", range(3, 30))
    left: list[int] = []  # tiles that each program, one after another, has loaded since it let the next kernel begin

    def let_next_begin() -> None:
        left.append(0)

    case = CacheCase("parting", cached=cached, heads_kv=1, num_splits=splits, schedule=None if splits else "stream_k")
    request = case.request("cpu", torch.bfloat16)
    with in_python():
        producer = importlib.import_module("tessera.backends.hopper.decode_producer")
    load_tile = producer._load_tile

    def load(*arguments: Any) -> None:
        load_tile(*arguments)
        if left:
            left[-1] += 1

    monkeypatch.setattr(producer, "PARTED", 3)
    monkeypatch.setattr(producer, "let_next_begin", let_next_begin)
    monkeypatch.setattr(producer, "_load_tile", load)
    plan = check(request)
    assert decode_plan.DecodeFeature.PARTING in plan.config.features
    if splits is None and len(set(cached)) > 1:
        assert 3 not in left
    else:
        assert 3 in left


@pytest.mark.parametrize("name", [name for name, case in CACHE_CASES.items() if case.new and is_served(case)])
def test_a_thread_does_more_heads_of_many_new_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append_launch, "FEW_TOKENS", 0)
    check(CACHE_CASES[name].request("cpu", torch.bfloat16))


@pytest.mark.parametrize("of", ["q", "k", "v_cache", "rotary_cos"])
@pytest.mark.parametrize("name", ["rotary, halves", "rotary, in part"])
def test_appended_rows_may_begin_anywhere(name: str, of: str) -> None:
    """The kernel moves 16 bytes at once where all rows begin at such places, and another one, with the same bits, where not."""
    whole = gather(CACHE_CASES[name].request("cpu", torch.bfloat16))
    tensors = {field: None if x is None else x.clone() for field, x in whole._asdict().items()}
    shifted = getattr(whole, of)
    place = torch.empty((*shifted.shape[:-1], shifted.shape[-1] + 3), dtype=shifted.dtype)[..., 1:-2]
    tensors[of] = place.copy_(shifted)
    odd = CacheOperands(**tensors)
    launch = AppendLaunch(describe(CACHE_CASES[name].request("cpu", torch.bfloat16)))
    with in_python():
        q, odd_q = launch.run(whole).q, replace(launch).run(odd).q
    assert torch.equal(q, odd_q)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(getattr(whole, name).view(torch.int16), getattr(odd, name).view(torch.int16))  # NaN where nothing is


READ_EARLY = ["one query", "pages of 16", "indexed", "packed", "left padding, window", "pages, packed, window", "long"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("schedule", ["split", "stream_k"])
@pytest.mark.parametrize("name", READ_EARLY)
def test_what_is_read_before_the_kernel_before_ends_can_be_anything(
    name: str, schedule: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program brings its first tiles on their way by lengths, pages and places that may still be written."""
    generator = torch.Generator().manual_seed(seed)

    def unfinished(operands: CacheOperands) -> None:
        numbers = [operands.cache_seqlens, operands.page_table, operands.cache_batch_idx, operands.cu_seqlens_q]
        numbers = [tensor for tensor in [*numbers, operands.cache_leftpad] if tensor is not None]
        right = [tensor.clone() for tensor in numbers]
        compat = sys.modules["tessera.jit.compat"]
        specialize = compat.gl.warp_specialize

        def begin(partitions: list[Any], *rest: Any) -> None:
            for tensor, value in zip(numbers, right, strict=True):
                noise = torch.randint(-9, 3000, tensor.shape, generator=generator, dtype=torch.int32)
                kept = torch.rand(tensor.shape, generator=generator) < 0.5
                tensor.copy_(torch.where(kept, value, noise))
            met = Meeting(len(partitions))

            def wait_for_previous() -> None:
                met.meet()
                for tensor, value in zip(numbers, right, strict=True):
                    tensor.copy_(value)

            for part in ("decode", "decode_producer"):
                module = sys.modules[f"tessera.backends.hopper.{part}"]
                monkeypatch.setattr(module, "wait_for_previous", wait_for_previous)
            specialize(partitions, *rest)

        monkeypatch.setattr(compat.gl, "warp_specialize", begin)

    request = CACHE_CASES[name].request("cpu", torch.bfloat16)
    check(request._replace(schedule=schedule), before=unfinished)


def test_more_sequences_than_are_scanned_at_once() -> None:
    case = CacheCase("many", cached=tuple((37 * i) % 90 for i in range(150)), heads_q=2, heads_kv=1, schedule="stream_k")
    check(case.request("cpu", torch.bfloat16))


def test_queries_are_read_wherever_they_lie() -> None:
    """One runner, the same strides: rows at multiples of 16 bytes, then not; and strides that no 16 bytes fit."""
    request = CACHE_CASES["four queries"].request("cpu", torch.bfloat16)
    problem, (batch, rows, heads, dim) = describe(request), request.q.shape
    refs, eagers = (verify.attention(request, dtype) for dtype in (torch.float64, torch.bfloat16))
    for width in (2 * dim, 2 * dim + 4):
        launch = decode_launch.DecodeLaunch(problem, decode_plan.decode_plan(problem, FEW))
        for first in (0, 4, 8):
            q = torch.zeros(batch, rows, heads, width + 8, dtype=torch.bfloat16)[..., first : first + dim].copy_(request.q)
            with in_python():
                results = launch.run(gather(request._replace(q=q)))
            for row in zip(("out", "lse"), results, refs, eagers, strict=True):
                assert compare(*row).ok, (width, first, str(compare(*row)))
