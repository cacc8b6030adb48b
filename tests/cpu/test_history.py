"""What was called before changes no call: random calls in random order, each beside itself with all tables empty."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import tessera
from tessera import calls

STEPS = int(os.environ.get("TESSERA_EXAMPLES", "500"))
TABLES: tuple[dict[Any, Any], ...] = (calls._known, calls._plain, *calls.latest)
Context = Callable[[], AbstractContextManager[Any]]


@dataclass
class Call:
    """One call: what is attended, and the options in an order."""

    inputs: tuple[Tensor, ...]
    options: dict[str, Any]

    def results(self, context: Context) -> tuple[list[object], list[Tensor]]:
        """What can be seen of its results under what the thread is in; these, and the gradients."""
        attend = tessera.attention if len(self.inputs) == 3 else tessera.attention_varlen
        with context():
            found = attend(*self.inputs, **self.options)
        results = found if isinstance(found, tuple) else (found,)
        seen: list[object] = [(x.dtype, x.shape, x.stride(), x.requires_grad, x.is_inference()) for x in results]
        values = [x.detach() for x in results]
        if results[0].requires_grad:
            tensors = (*self.inputs[:3], self.options.get("sinks"))
            leaves = list({id(x): x for x in tensors if isinstance(x, Tensor) and x.requires_grad}.values())
            weights = torch.linspace(-1, 1, results[0].numel()).view(results[0].shape)
            values += torch.autograd.grad((results[0].float() * weights).sum(), leaves)
        return seen, values


CONTEXTS: tuple[Context, ...] = (
    nullcontext, nullcontext, torch.no_grad, torch.inference_mode, partial(torch.device, "meta"),
    partial(torch.autocast, "cpu", torch.bfloat16), partial(torch.autocast, "cpu", torch.float16),
)  # fmt: skip


def placed(x: Tensor, place: str) -> Tensor:
    """The same values in memory as they are, head by head, in a wider buffer, or from an odd address on."""
    if place == "heads":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if place == "wide":
        return torch.cat((x, x), dim=-1)[..., : x.shape[-1]]
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x) if place == "odd" else x


def a_call(chance: random.Random) -> Call:
    def happens(one_in: int) -> bool:
        return chance.randrange(one_in) == 0

    is_packed, dtype = happens(2), chance.choice((torch.float32, torch.bfloat16, torch.float16))
    (rows, keys), (heads, heads_kv) = chance.choice(((9, 9), (5, 9), (1, 9))), chance.choice(((2, 2), (4, 2)))
    leading = () if is_packed else (chance.choice((1, 2)),)
    dims = (heads, 8), (heads_kv, 8), (heads_kv, chance.choice((8, 16)))
    drawn = (torch.randn(*leading, n, *d, dtype=dtype) for n, d in zip((rows, keys, keys), dims, strict=True))
    inputs = [placed(x, chance.choice(("", "", "heads", "wide", "odd"))).requires_grad_(happens(3)) for x in drawn]
    if is_packed:
        ends = [torch.tensor((0, chance.randint(0, n), n), dtype=torch.int32) for n in (rows, keys)]
        inputs += [ends[0], ends[0]] if rows == keys and happens(2) else ends
    said: list[tuple[str, Any]] = [
        ("causal", chance.choice((True, False, 1))), ("window", chance.choice(((3, 0), (None, 2), None))),
        ("softcap", chance.choice((0.0, 2.0, 3))), ("softmax_scale", chance.choice((0.5, None, 1))), ("deterministic", True),
        ("return_lse", True), ("sinks", torch.randn(heads).requires_grad_(happens(2))),
        ("seqused_k", torch.zeros(2, dtype=torch.int32)) if is_packed else ("mask", tessera.Mask.padding(torch.tensor([4] * 2))),
    ]  # fmt: skip
    options = [one for one in said if happens(6 if isinstance(one[1], (Tensor, tessera.Mask)) else 3)]
    if leading == (1,):
        options = [one for one in options if one[0] != "mask"]
    chance.shuffle(options)
    return Call(tuple(inputs), dict(options))


def again(call: Call, chance: random.Random) -> Call:
    """The same, or with other tensors in the same places: which of them want gradients, and whether offsets are one tensor."""
    if chance.randrange(2) == 0:
        return call
    q, k, v = (x.detach().requires_grad_(chance.randrange(3) == 0) for x in call.inputs[:3])
    offsets = call.inputs[3:]
    if offsets and len(q) == len(k):
        offsets = (offsets[0], offsets[0] if chance.randrange(2) == 0 else offsets[0].clone())
    return Call((q, k, v, *offsets), call.options)


@contextmanager
def empty_tables() -> Iterator[None]:
    kept = [dict(table) for table in TABLES]
    for table in TABLES:
        table.clear()
    yield
    for table, content in zip(TABLES, kept, strict=True):
        table.clear()
        table.update(content)


@pytest.mark.parametrize("seed", range(2))
def test_history_changes_no_call(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    pool = [a_call(chance) for _ in range(40)]
    for _ in range(STEPS):
        place = chance.randrange(len(pool))
        if chance.randrange(6) == 0:
            pool[place] = a_call(chance)
        call, context = again(pool[place], chance), chance.choice(CONTEXTS)
        seen, values = call.results(context)
        with empty_tables():
            expected_seen, expected = call.results(context)
        assert seen == expected_seen, call
        assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True)), call
    assert min(map(len, calls.latest)) > 10
