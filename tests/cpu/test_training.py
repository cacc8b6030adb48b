"""Training end to end: the model counts what Megatron's formula counts, contenders are checked before they are timed, and a
byte-level GPT learns by our attention what it learns by exact attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tessera import attention, reference
from tessera.bench import flash_peers, learning
from tessera.bench.cells import Cell, Direction
from tessera.bench.flash_peers import Fa3Operators
from tessera.bench.gpt import Gpt, GptShape, Recompute, Trainer
from tessera.bench.grids import square
from tessera.bench.learning import LearningOrder, LearningReport, exact_attention
from tessera.bench.peers import Sdpa, Tessera
from tessera.bench.report import Outcome
from tessera.bench.sources import standard_library
from tessera.bench.training import Contender, Course, TrainingOrder, TrainingReport, attend_by
from tessera.device import Device
from tessera.operands import Operands, Request, bind
from tessera.problem import Problem

SHAPE = GptShape(layers=2, hidden=32, heads=2, vocabulary=50, seqlen=24)
OURS = partial(attention, causal=True)


def text(shape: GptShape = SHAPE, batch: int = 3) -> Tensor:
    return torch.randint(shape.vocabulary, (batch, shape.seqlen + 1))


def whole_square(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as the formula counts it: every score."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2)


def test_the_formula_counts_the_models_products() -> None:
    model, batch = Gpt(SHAPE, "cpu", 0), 3
    with FlopCounterMode(display=False) as counter:
        model.loss(text(batch=batch), whole_square).backward()
    tokens, s, h, l, V = batch * SHAPE.seqlen, SHAPE.seqlen, SHAPE.hidden, SHAPE.layers, SHAPE.vocabulary
    assert counter.get_total_flops() == SHAPE.flops(tokens, s)
    assert SHAPE.flops(tokens, s) == pytest.approx(72 * batch * s * l * h**2 * (1 + s / (6 * h) + V / (12 * l * h)))


def test_the_causal_count_leaves_half_of_attention() -> None:
    square_part = SHAPE.flops(24, 24) - SHAPE.flops(24, 0)
    assert SHAPE.causal_flops(24, 24) == SHAPE.flops(24, 24) - square_part // 2


@pytest.mark.parametrize("recompute", Recompute, ids=lambda r: r.name.lower())
def test_recomputing_changes_no_gradient(recompute: Recompute) -> None:
    trainer, batch = Trainer(SHAPE, torch.float32, "cpu"), text()
    expected = trainer.gradients(batch, exact_attention)
    for ours, right in zip(trainer.gradients(batch, OURS, recompute), expected, strict=True):
        torch.testing.assert_close(ours, right)


def test_a_step_moves_the_masters_and_the_weights_follow() -> None:
    """A rate so small that bfloat16 weights alone would never move: the masters add it up."""
    trainer, batch = Trainer(SHAPE, torch.bfloat16, "cpu"), text()
    before = [weight.clone() for weight in trainer.weights]
    masters = [master.clone() for master in trainer.masters]
    for _ in range(40):
        trainer.step(batch, OURS, 1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.weights, strict=True))
    for weight, master, old in zip(trainer.weights, trainer.masters, masters, strict=True):
        assert torch.equal(weight, master.bfloat16())
        assert not torch.equal(master, old)
        assert weight.grad is None


# Contenders


@dataclass(frozen=True)
class Odd:
    """A peer that is out of order in one way."""

    fault: str
    name: str = "odd"

    def why_not(self, problem: Problem, device: Device) -> str | None:
        return "out of order" if self.fault == "refuse" else None

    def forward(self, request: Request, problem: Problem) -> Any:
        if self.fault == "raise":
            raise RuntimeError("out of order")
        wrong = {"wrong scale": {"softmax_scale": 1.05 * request.q.shape[-1] ** -0.5}, "not causal": {"causal": False}}
        return lambda: attention(request.q, request.k, request.v, **({"causal": True} | wrong[self.fault]))

    def backward(self, request: Request, problem: Problem, dout: Tensor) -> Any:
        raise AssertionError("a step asks autograd")


FAULTS = {
    "wrong scale": Outcome.WRONG,
    "not causal": Outcome.WRONG,
    "raise": Outcome.FAILED,
    "refuse": Outcome.REFUSED,
}


@pytest.mark.parametrize(("fault", "outcome"), FAULTS.items(), ids=list(FAULTS))
def test_who_is_wrong_or_fails_is_not_timed(fault: str, outcome: Outcome, tmp_path: Path) -> None:
    contenders = (Contender(Tessera()), Contender(Odd(fault)), Contender(Sdpa()))
    course = Course(SHAPE, torch.float32, 48, (24, 12), contenders, "cpu", rounds=2)
    *_, report = course.reports()
    assert report.ok
    assert [(length.batch, length.seqlen) for length in report.lengths] == [(2, 24), (4, 12)]
    for length in report.lengths:
        odd, sdpa = length.entries["odd"], length.entries["sdpa"]
        assert odd.outcome is outcome
        assert odd.note
        assert odd.seconds is None
        assert sdpa.speedup is not None
        assert sdpa.tflops == pytest.approx(length.flops / sdpa.seconds.median / 1e12)
        assert length.entries["tessera"].speedup is None
    report.write(tmp_path / "new" / "t.json")
    assert TrainingReport.read(tmp_path / "new" / "t.json") == report
    assert not replace(report, lengths=()).ok


def test_an_order_names_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="peers='magic'"):
        TrainingOrder("cpu", ("magic",)).course()
    with pytest.raises(ValueError, match="device='cuda:99'"):
        TrainingOrder("cuda:99").course()
    with pytest.raises(ValueError, match="steps=1"):
        LearningOrder("cpu", steps=1).course()
    with pytest.raises(ValueError, match="backend='magic'"):
        LearningOrder("cpu", "magic").course()


class StandIn:
    """FlashAttention-3's two operators, computed by the oracle: (batch, seqlen, heads, dim), results as the package has them."""

    @staticmethod
    def _solve(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        request = Request(q, k, v, right=0 if options["is_causal"] else None, softmax_scale=options["softmax_scale"])
        problem, operands = bind(request)
        assert isinstance(operands, Operands)
        return reference.attention(problem, operands)

    def fwd(self, q: Tensor, k: Tensor, v: Tensor, num_splits: int, **options: Any) -> tuple[Tensor, ...]:
        assert num_splits == 1
        out, lse = self._solve(q, k, v, options)
        return out.to(q.dtype), lse.float(), q.new_empty(0), q.new_empty(0)

    def bwd(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *into: Tensor, **options: Any) -> None:
        assert not any(x.requires_grad for x in (q, k, v, out, lse))
        with torch.enable_grad():
            leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
            found, _ = self._solve(*leaves, options)
        for target, gradient in zip(into, torch.autograd.grad(found, leaves, dout.double()), strict=True):
            target.copy_(gradient)


def test_flash_attention_3s_operators_are_joined_into_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's forward is differentiable where gradients are wanted, and the bare operator where not."""
    monkeypatch.setattr(flash_peers, "load_fa3", lambda _: StandIn())
    case = square(16, 24, 2, 4, causal=True)
    request = Cell(case, torch.float32, Direction.BACKWARD).request("cpu")
    problem, _ = bind(request)
    peer, inputs = Fa3Operators(Path("nowhere")), (request.q, request.k, request.v)
    dout = torch.randn(problem.out_shape)
    out = attend_by(peer, problem)(*inputs)
    right = OURS(*inputs)
    torch.testing.assert_close(out, right)
    expected = torch.autograd.grad(right, inputs, dout)
    for gradient, other in zip(torch.autograd.grad(out, inputs, dout), expected, strict=True):
        torch.testing.assert_close(gradient, other)
    for gradient, other in zip(peer.backward(request, problem, dout)(), expected, strict=True):
        torch.testing.assert_close(gradient, other)
    with torch.no_grad():
        assert not peer.forward(request, problem)().requires_grad


# Learning


def learned(dtype: torch.dtype, steps: int = 10) -> LearningReport:
    return LearningOrder("cpu", steps=steps, dtype=dtype).course().run()


def test_float32_learns_what_exact_attention_learns(tmp_path: Path) -> None:
    """Ten steps on real text: every loss is exact attention's to 1e-5 nats (2e-7 was measured), and falls by over a nat."""
    report = learned(torch.float32)
    ours, exact = report.curves
    assert max(abs(a - b) for a, b in zip(ours.losses, exact.losses, strict=True)) < 1e-5
    assert ours.losses[-1] < ours.losses[0] - 1
    assert abs(ours.held_out - exact.held_out) < 1e-5
    assert ours.held_out < ours.losses[0] - 1
    assert report.ok
    report.write(tmp_path / "l.json")
    assert LearningReport.read(tmp_path / "l.json") == report


def test_bfloat16_lies_no_further_off_than_its_dtype() -> None:
    report = learned(torch.bfloat16)
    assert [curve.name for curve in report.curves] == ["Tessera, bfloat16", "math SDPA, bfloat16", "math SDPA, float32"]
    assert 0 < report.distance <= report.allowed < 0.01
    assert report.ok


@pytest.mark.parametrize(
    ("options", "steps"), [({"window": (16, 0)}, 10), ({"causal": False}, 10), ({"softmax_scale": 0.5}, 30)], ids=str
)
def test_attention_that_is_not_exact_is_noticed(options: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        return attention(q, k, v, **(given | options))

    monkeypatch.setattr(learning, "attention", wrong)
    report = learned(torch.float32, steps)
    assert report.distance > 2 * report.allowed
    assert not report.ok


def test_the_text_is_real_and_the_batches_are_the_same_every_time() -> None:
    library = standard_library()
    whole = bytes(library.learned.numpy())
    assert len(whole) > 1_000_000
    assert b"def abstractmethod(" in whole
    first, again = (library.batches(3, 4, 32, "cpu") for _ in range(2))
    for _ in range(3):
        batch = first.next()
        assert torch.equal(batch, again.next())
        assert batch.shape == (4, 33)
        assert bytes(batch[2].tolist()) in whole
    assert library.examination(5, 32, "cpu").shape == (5, 33)


def test_a_curve_of_nan_is_no_success() -> None:
    good = learning.Curve("a", (2.0, 1.0), 1.0)
    bad = learning.Curve("b", (2.0, float("nan")), 1.0)
    here: Any = SimpleNamespace()
    assert LearningReport({}, "", "cpu", "", (good, good, good), here).ok
    assert not LearningReport({}, "", "cpu", "", (bad, good, good), here).ok
    assert not LearningReport({}, "", "cpu", "", (good, good, learning.Curve("c", (2.0, 2.0), 1.0)), here).ok
