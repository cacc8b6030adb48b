"""The bench of decoding, but for its clock: a cell's tensors, everybody's step, and what is compared before anything is timed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tessera.bench import cache_accuracy
from tessera.bench.decoding import GRIDS, Caches, Cell, contenders, plan_of

MLA = {"heads_kv": 1, "head_dim": 96, "head_dim_v": 64}
CELLS = (
    Cell("one query", (70, 70, 70), 8, 2, 32),
    Cell("ragged", (70, 3, 41), 8, 2, 32),
    Cell("pages", (64, 64), 8, 2, 32, page_size=16),
    Cell("pages of 1, some queries", (40, 40), 8, 2, 32, page_size=1, seqlen_q=5),
    Cell("latent", (64, 64), 24, page_size=16, **MLA),
    Cell("latent, queries", (50, 50), 24, seqlen_q=3, **MLA),
    Cell("e4m3", (70, 70), 8, 2, 32, dtype=torch.float8_e4m3fn),
    Cell("appending", (64, 64), 8, 2, 32, page_size=16, appended=2),
)


def caches_of(cell: Cell) -> Caches:
    storage = torch.randn(1 << 17, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    return Caches(cell, storage)


@pytest.fixture(autouse=True)
def few_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.bench.decoding.ROTATED_BYTES", 1 << 16)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_step_is_right_and_what_is_wrong_is_seen(cell: Cell) -> None:
    caches = caches_of(cell)
    standard = cache_accuracy.parts(caches)
    steps = contenders(caches, None)
    out = steps["tessera"](0)
    assert [part.fault(out) for part in standard] == [None] * len(standard)
    assert {part.sequence for part in standard} == {0, len(cell.lengths) - 1}
    for spoil in (_one_value, _nan, lambda x: x[:, :, :-1]):
        assert any(part.fault(spoil(out)) for part in standard)


def _one_value(out: Tensor) -> Tensor:
    spoiled = out.clone()
    spoiled[0, 0, 0, 0] += 0.25
    return spoiled


def _nan(out: Tensor) -> Tensor:
    return torch.full_like(out, float("nan"))


def test_a_key_that_is_left_out_is_seen() -> None:
    """One key of 70: what a loop that ends too early would do."""
    caches = caches_of(CELLS[0])
    standard = cache_accuracy.parts(caches)
    caches.lengths -= 1
    out = contenders(caches, None)["tessera"](0)
    assert any(part.fault(out) for part in standard)


def test_torchs_kernels_answer_in_our_layout() -> None:
    caches = caches_of(CELLS[0])
    steps = contenders(caches, None)
    assert set(steps) == {"tessera", "cudnn", "fa2"}
    assert steps["fa2"](0).shape == steps["tessera"](0).shape


@pytest.mark.parametrize("name", GRIDS)
def test_every_cell_of_the_grids_has_a_plan(name: str) -> None:
    for cell in GRIDS[name]():
        assert plan_of(cell).backend == "hopper", cell.name
