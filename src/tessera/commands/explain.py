"""`tessera explain`: a problem in flags, and the Plan that answers it. Nothing is run, and no GPU is needed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.console import Console

from tessera import api, dispatch
from tessera.bench.cells import flops_by_length
from tessera.commands import screen
from tessera.commands.options import DTYPES, DtypeOption
from tessera.device import KNOWN_DEVICES
from tessera.errors import Reason, Unsupported
from tessera.plan import Choice, Plan
from tessera.problem import BACKWARD_WORK, Gradients, Layout

_Int = Annotated[int, typer.Option(min=0)]


@dataclass(frozen=True)
class Explanation:
    """A Plan, its exact work (the lengths of packed sequences being known here), and every backend's reasons."""

    plan: Plan
    flops: int
    reasons: dict[str, tuple[Reason, ...]]

    @property
    def score_bytes(self) -> int:
        """The matrix of scores in the problem's dtype, which the plain formula would hold."""
        shape = self.plan.problem.shape
        entries = 1 if self.plan.problem.layout is Layout.VARLEN else shape.batch
        return entries * shape.heads_q * shape.seqlen_q * shape.seqlen_k * self.plan.problem.dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        wanted = self.plan.problem.gradients is Gradients.INPUTS
        moved = self.plan.problem.io_bytes()
        return self.plan.to_json() | {
            "flops": self.flops,
            "backward_flops": int(BACKWARD_WORK * self.flops) if wanted else 0,
            "flops_per_byte": self.flops / max(moved, 1),
            "score_bytes": self.score_bytes,
            "reasons": {name: [asdict(reason) for reason in given] for name, given in self.reasons.items()},
        }


def explain(
    batch: _Int = 1,
    seqlen_q: _Int = 4096,
    seqlen_k: Annotated[int | None, typer.Option(min=0, help="seqlen_q by default.")] = None,
    heads: Annotated[int, typer.Option(min=0, help="Query heads.")] = 16,
    heads_kv: Annotated[int | None, typer.Option(min=0, help="Key/value heads; as many as query heads by default.")] = None,
    head_dim: _Int = 128,
    head_dim_v: Annotated[int | None, typer.Option(min=0, help="head_dim by default.")] = None,
    dtype: Annotated[str, DtypeOption(help="Of q, k and v.")] = "bfloat16",
    causal: Annotated[bool, typer.Option("--causal", help="Causal, aligned to the bottom right.")] = False,
    window: Annotated[str | None, typer.Option(metavar="LEFT,RIGHT", help="Sliding window; -1 for no limit.")] = None,
    softmax_scale: Annotated[float | None, typer.Option(help="head_dim ** -0.5 by default.")] = None,
    softcap: Annotated[float, typer.Option(help="c tanh(score / c).")] = 0.0,
    alibi: Annotated[bool, typer.Option("--alibi", help="ALiBi slopes, one a head.")] = False,
    bias: Annotated[str | None, typer.Option(metavar="B,H,Q,K", help="The shape of an additive bias.")] = None,
    sinks: Annotated[bool, typer.Option("--sinks", help="A learnable sink for each head.")] = False,
    dropout: Annotated[float, typer.Option(help="Probability of dropout.")] = 0.0,
    varlen: Annotated[bool, typer.Option("--varlen", help="`batch` packed sequences of seqlen_q and seqlen_k tokens.")] = False,
    lengths: Annotated[str | None, typer.Option(metavar="N,N,...", help="Packed sequences of these lengths.")] = None,
    backward: Annotated[bool, typer.Option("--backward", help="Plan the backward too.")] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Two runs agree bit for bit.")] = False,
    backend: Annotated[str | None, typer.Option(help="One backend by name.")] = None,
    device: Annotated[
        str, typer.Option(help=f"{', '.join(KNOWN_DEVICES)}, present or not, or a device of this machine.")
    ] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show what would run for a problem, and why: the Plan, the work, and what each backend says. Runs nothing.

    Exit code 2 for a problem that cannot be, 3 for one that no backend can run.

    Example:  tessera explain --device h200 --seqlen-q 16384 --heads 32 --heads-kv 8 --causal --backward
    """
    options: dict[str, Any] = {
        "causal": causal, "window": None if window is None else numbers("--window", window), "softmax_scale": softmax_scale,
        "softcap": softcap, "dropout_p": dropout, "seed": 0 if dropout else None, "deterministic": deterministic,
        "backend": backend, "alibi_slopes": (heads,) if alibi else None, "sinks": (heads,) if sinks else None,
        "bias": None if bias is None else numbers("--bias", bias),
    }  # fmt: skip
    seqlen_k, heads_kv = (seqlen_q if seqlen_k is None else seqlen_k), (heads if heads_kv is None else heads_kv)
    packed = _packed(batch, seqlen_q, seqlen_k, varlen, lengths)
    q: tuple[int, ...] = (batch, seqlen_q)
    k: tuple[int, ...] = (batch, seqlen_k)
    if packed is not None:
        q, k = ((sum(side),) for side in packed)
        options |= {"cu_seqlens_q": (len(packed[0]) + 1,), "cu_seqlens_k": (len(packed[1]) + 1,)}
    shapes = ((*q, heads, head_dim), (*k, heads_kv, head_dim), (*k, heads_kv, head_dim if head_dim_v is None else head_dim_v))
    try:
        plan = api.plan(*shapes, dtype=DTYPES[dtype], device=device, requires_grad=backward, **options)
    except Unsupported as refusal:
        screen.fail(str(refusal), screen.UNSUPPORTED)
    except (ValueError, TypeError) as mistake:
        screen.fail(str(mistake), screen.BAD_INPUT)
    flops = flops_by_length(plan.problem, *(packed or (None, None)))
    explanation = Explanation(plan, flops, dispatch.why_not(plan.problem, plan.device))
    if as_json:
        screen.print_json(explanation.to_json())
    else:
        _show(explanation)


def numbers(option: str, text: str) -> tuple[int, ...]:
    """An option's whole numbers with commas between them, or the end of the command."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        screen.fail(f"{option}={text!r}: not whole numbers with commas between them; use for example 256,0", screen.BAD_INPUT)


def _packed(
    batch: int, seqlen_q: int, seqlen_k: int, varlen: bool, lengths: str | None
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The lengths of packed queries and keys, or None for the dense layout."""
    if lengths is not None:
        own = numbers("--lengths", lengths)
        return own, own
    return ((seqlen_q,) * batch, (seqlen_k,) * batch) if varlen else None


def _show(explanation: Explanation) -> None:
    plan, problem = explanation.plan, explanation.plan.problem
    console = screen.console()
    rows = {
        "problem": screen.escape(str(problem)),
        "device": screen.escape(str(plan.device)),
        "backend": f"[ours]{plan.backend}[/]",
        "forward": shown_choice(plan.forward),
    }
    if plan.backward is not None:
        rows["backward"] = shown_choice(plan.backward)
    moved = problem.io_bytes()
    work = f"{_flops(explanation.flops)} forward"
    if plan.backward is not None:
        work += f", {_flops(int(BACKWARD_WORK * explanation.flops))} backward"
    rows["work"] = work
    rows["traffic"] = f"{screen.size(moved)} at least, {explanation.flops / max(moved, 1):,.0f} FLOP a byte"
    scores = f"the matrix of scores, never made, would be {screen.size(explanation.score_bytes)}"
    rows["workspace"] = f"{screen.size(plan.workspace_bytes)} of scratch; {scores}"
    console.print(screen.facts(rows))
    show_backends(console, plan.backend, explanation.reasons)


def show_backends(console: Console, chosen: str, reasons: dict[str, tuple[Reason, ...]]) -> None:
    """Every backend, and why it can't run the problem."""
    backends = screen.table("backend", "")
    for name, against in reasons.items():
        words = "\n".join(f"[dim]{screen.escape(str(reason))}[/]" for reason in against)
        if not against:
            words = "[good]chosen[/]" if name == chosen else "can run it too"
        backends.add_row(f"[bold]{name}[/]", words)
    console.print(backends)


def shown_choice(choice: Choice) -> str:
    """A kernel, its configuration, and why."""
    config = f" [dim]({screen.escape(str(choice.config))})[/]" if choice.config is not None else ""
    return f"[bold]{screen.escape(choice.kernel)}[/]{config}  {screen.escape(choice.why)}"


def _flops(value: int) -> str:
    for unit, factor in (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if value >= factor:
            return f"{value / factor:,.3g} {unit}"
    return f"{value:,} FLOP"
