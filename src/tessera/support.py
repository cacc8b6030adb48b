"""What runs where: named variations of a problem, asked of every backend. The support matrix in docs/ is this module's print.

    python -m tessera.support > docs/support_matrix.md

No cell is written by hand: a backend's own `why_not` answers, from shapes alone and with no GPU. The tests take the same
answers: what is refused here must be refused by name with these reasons, and what is not refused on the CPU is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from tessera import dispatch
from tessera.backends.cpu import ATEN, TILED, aten
from tessera.cases import Case
from tessera.device import KNOWN_DEVICES, Device
from tessera.operands import Request, describe
from tessera.problem import Gradients, Problem, Reproducibility
from tessera.serving import support as serving_support

PLAIN = Case("plain", seqlen_q=40, seqlen_k=40, heads_q=4, heads_kv=4, head_dim=64)


@dataclass(frozen=True)
class Feature:
    """One line of the matrix: a problem that differs from the plain one in what `name` says."""

    group: str
    name: str
    case: Case = PLAIN
    dtype: torch.dtype = torch.bfloat16
    gradients: Gradients = Gradients.NONE
    reproducibility: Reproducibility = Reproducibility.ANY_ORDER

    def request(self, device: str = "meta") -> Request:
        """The feature as a call, its tensors on that torch device."""
        request = self.case.request(device, self.dtype, requires_grad=self.gradients is Gradients.INPUTS)
        return request._replace(deterministic=self.reproducibility is Reproducibility.BITWISE)

    def problem(self, device: Device) -> Problem:
        """Its Problem on a device that need not be here. Raises ValueError where no backend could have it."""
        return describe(self.request(), device.kind)


@dataclass(frozen=True)
class Column:
    """One column of the matrix: a backend on the first known device it runs the plain problem on, or one kernel of it."""

    backend: str
    device: Device
    kernel: str | None = None

    @property
    def title(self) -> str:
        return self.backend if self.kernel is None else f"{self.backend}: {self.kernel}"

    def refusal(self, feature: Feature) -> tuple[str, ...]:
        """Why this column can't have the feature, one string a reason; empty where it can."""
        try:
            problem = feature.problem(self.device)
        except (ValueError, TypeError) as error:
            return (str(error),)
        if self.kernel == ATEN:
            limit = aten.limits_of(problem, self.device)
            return () if limit is None else (limit,)
        return tuple(str(reason) for reason in dispatch.load(self.backend).why_not(problem, self.device))


def columns() -> tuple[Column, ...]:
    """The backends in the order in which they are asked; the cpu backend's two kernels stand apart."""
    plain = Feature("", "").request()
    found: list[Column] = []
    for name in dispatch.BACKENDS:
        homes = (d for d in KNOWN_DEVICES.values() if not dispatch.load(name).why_not(describe(plain, d.kind), d))
        home = next(homes)
        kernels = (ATEN, TILED) if name == "cpu" else (None,)
        found += [Column(name, home, kernel) for kernel in kernels]
    return tuple(found)


def _vary(**changes: object) -> Case:
    return Case(**({"name": "plain", "seqlen_q": 40, "seqlen_k": 40} | changes))  # type: ignore[arg-type]


_DTYPES = tuple(
    Feature("Dtypes", str(dtype).removeprefix("torch."), dtype=dtype)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
)
_DIMS = (
    *(Feature("Head dims", str(d), _vary(head_dim=d)) for d in (8, 32, 64, 72, 96, 128, 192, 256)),
    Feature("Head dims", "20 (no multiple of 8)", _vary(head_dim=20)),
    Feature("Head dims", "257", _vary(head_dim=257)),
    Feature("Head dims", "192, of v 128", _vary(head_dim=192, head_dim_v=128)),
    Feature("Head dims", "64, of v 256", _vary(head_dim=64, head_dim_v=256)),
)
_LAYOUTS = (
    Feature("Layouts", "seqlen_q != seqlen_k", _vary(seqlen_k=70)),
    Feature("Layouts", "one query", _vary(seqlen_q=1, causal=True)),
    Feature("Layouts", "no keys", _vary(seqlen_k=0)),
    Feature("Layouts", "GQA", _vary(heads_q=8, heads_kv=2)),
    Feature("Layouts", "MQA", _vary(heads_q=6, heads_kv=1)),
    Feature("Layouts", "strides: heads before rows", _vary(strides="head_major")),
    Feature("Layouts", "strides: slices of one projection", _vary(strides="gapped")),
    Feature("Layouts", "packed (varlen)", _vary(lengths_q=(30, 0, 50), lengths_k=(30, 4, 50))),
    Feature("Layouts", "packed, causal", _vary(lengths_q=(30, 50), lengths_k=(30, 50), causal=True)),
    Feature("Layouts", "packed, seqused_k", _vary(lengths_q=(30, 50), lengths_k=(30, 50), used_k=(10, 50))),
)
_MASKS = (
    Feature("Masks", "causal", _vary(causal=True)),
    Feature("Masks", "causal, seqlen_q < seqlen_k", _vary(causal=True, seqlen_k=70)),
    Feature("Masks", "window", _vary(window=(16, 0))),
    Feature("Masks", "window both ways", _vary(window=(16, 8))),
    Feature("Masks", "padding", _vary(key_end=(17, 40))),
    Feature("Masks", "padding, causal", _vary(key_end=(17, 40), causal=True)),
    Feature("Masks", "padding of queries", _vary(key_end=(17, 40), query_end=(17, 40))),
    Feature("Masks", "left padding, causal", _vary(key_start=(23, 0), causal=True)),
    Feature("Masks", "documents", _vary(documents=(7, 33))),
    Feature("Masks", "documents, causal, padding", _vary(documents=(7, 33), causal=True, key_end=(17, 40))),
)
_SCORES = (
    Feature("Scores", "softmax_scale", _vary(softmax_scale=0.3)),
    Feature("Scores", "softmax_scale < 0", _vary(softmax_scale=-0.3)),
    Feature("Scores", "softmax_scale < 0, causal", _vary(softmax_scale=-0.3, causal=True)),
    Feature("Scores", "softcap", _vary(softcap=20.0)),
    Feature("Scores", "alibi_slopes", _vary(alibi="head")),
    Feature("Scores", "alibi_slopes by batch", _vary(alibi="batch")),
    Feature("Scores", "bias", _vary(bias=(2, 4, 40, 40))),
    Feature("Scores", "bias, broadcast", _vary(bias=(1, 4, 1, 40))),
    Feature("Scores", "sinks", _vary(sinks=True)),
    Feature("Scores", "dropout", _vary(dropout_p=0.1)),
)
_GRADIENTS = (
    Feature("Gradients", "q, k, v", gradients=Gradients.INPUTS),
    Feature("Gradients", "causal", _vary(causal=True), gradients=Gradients.INPUTS),
    Feature("Gradients", "GQA", _vary(heads_q=8, heads_kv=2), gradients=Gradients.INPUTS),
    Feature("Gradients", "head_dim_v != head_dim", _vary(head_dim_v=32), gradients=Gradients.INPUTS),
    Feature("Gradients", "packed", _vary(lengths_q=(30, 50), lengths_k=(30, 50)), gradients=Gradients.INPUTS),
    Feature("Gradients", "softcap", _vary(softcap=20.0), gradients=Gradients.INPUTS),
    Feature("Gradients", "bias", _vary(bias=(1, 4, 40, 40)), gradients=Gradients.INPUTS),
    Feature("Gradients", "bias of keys", _vary(bias=(1, 4, 1, 40)), gradients=Gradients.INPUTS),
    Feature("Gradients", "sinks", _vary(sinks=True), gradients=Gradients.INPUTS),
    Feature("Gradients", "dropout", _vary(dropout_p=0.1), gradients=Gradients.INPUTS),
)
_DETERMINISM = (
    Feature("Determinism", "forward", reproducibility=Reproducibility.BITWISE),
    Feature("Determinism", "with gradients", gradients=Gradients.INPUTS, reproducibility=Reproducibility.BITWISE),
    Feature(
        "Determinism",
        "bias of keys, with gradients",
        _vary(bias=(1, 4, 1, 40)),
        gradients=Gradients.INPUTS,
        reproducibility=Reproducibility.BITWISE,
    ),
)

FEATURES: tuple[Feature, ...] = (*_DTYPES, *_DIMS, *_LAYOUTS, *_MASKS, *_SCORES, *_GRADIENTS, *_DETERMINISM)

_HEADER = """\
# Support matrix

Printed by `python -m tessera.support`, checked by the tests; no cell is written by hand. Each line differs from a plain
problem (bfloat16, head_dim 64, dense, no mask, forward) in what it names; what is not named combines freely unless a backend's
reasons say otherwise. `tessera explain` answers for any problem, and `tessera.plan(...)` from a program.

Without `backend=...` the first backend with no reason against a problem takes it. Columns, in the order in which they are asked:
"""


def matrix() -> Iterator[str]:
    """The support matrix in Markdown, line by line."""
    yield _HEADER
    asked = columns()
    for column in asked:
        yield f"- **{column.title}** on {column.device.name}: {_summary(column)}"
    for group, features in groupby(FEATURES, key=lambda feature: feature.group):
        yield f"\n## {group}\n"
        yield "| | " + " | ".join(column.title for column in asked) + " |"
        yield "|---" * (len(asked) + 1) + "|"
        for feature in features:
            cells = ("; ".join(column.refusal(feature)) or "yes" for column in asked)
            yield f"| {feature.name} | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield from serving_support.matrix()


def _summary(column: Column) -> str:
    if column.kernel == ATEN:
        return "torch's own CPU flash kernel, where it computes exactly what was asked"
    if column.kernel == TILED:
        return "the paper's algorithm in tiles of torch operations, where torch's kernel does not serve"
    return (dispatch.load(column.backend).__doc__ or "").splitlines()[0]


if __name__ == "__main__":
    print("\n".join(matrix()))
