"""`tessera explain-cache`: a step over a KV cache in flags, and the CachePlan that answers it. Runs nothing, needs no GPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer

from tessera.commands import screen
from tessera.commands.explain import numbers, show_backends, shown_choice
from tessera.commands.options import DTYPES, DtypeOption
from tessera.device import KNOWN_DEVICES
from tessera.errors import Reason, Unsupported
from tessera.problem import Layout
from tessera.serving import dispatch
from tessera.serving.api import plan_kvcache
from tessera.serving.plan import CachePlan

_Int = Annotated[int, typer.Option(min=0)]


def explain_cache(
    batch: _Int = 1,
    seqlen_q: Annotated[int, typer.Option(min=0, help="Queries a sequence.")] = 1,
    seqlen_k: Annotated[int, typer.Option(min=0, help="Rows that the cache holds of a sequence at most.")] = 8192,
    heads: Annotated[int, typer.Option(min=0, help="Query heads.")] = 32,
    heads_kv: Annotated[int, typer.Option(min=0, help="Key/value heads.")] = 8,
    head_dim: _Int = 128,
    head_dim_v: Annotated[int | None, typer.Option(min=0, help="head_dim by default.")] = None,
    page_size: Annotated[int | None, typer.Option(min=1, help="Rows of a page; contiguous by default.")] = None,
    latent: Annotated[bool, typer.Option("--latent", help="The values are the keys' first head_dim_v columns (MLA).")] = False,
    dtype: Annotated[str, DtypeOption(help="Of the queries.")] = "bfloat16",
    fp8: Annotated[bool, typer.Option("--fp8", help="The cache holds float8_e4m3fn.")] = False,
    append: Annotated[int, typer.Option(min=0, help="Rows that the step appends to each sequence.")] = 0,
    rotary: Annotated[int, typer.Option(min=0, help="Columns of rotary embedding; with --append.")] = 0,
    causal: Annotated[bool, typer.Option(help="Each query sees the cache up to itself.")] = True,
    window: Annotated[str | None, typer.Option(metavar="LEFT,RIGHT", help="Sliding window; -1 for no limit.")] = None,
    softcap: Annotated[float, typer.Option(help="c tanh(score / c).")] = 0.0,
    sinks: Annotated[bool, typer.Option("--sinks", help="A learnable sink for each head.")] = False,
    varlen: Annotated[bool, typer.Option("--varlen", help="The queries of all sequences are packed.")] = False,
    num_splits: Annotated[int | None, typer.Option(min=0, help="Parts in which keys are read; the plan's by default.")] = None,
    schedule: Annotated[str | None, typer.Option(help="split or stream_k; the plan's by default.")] = None,
    batch_invariant: Annotated[bool, typer.Option("--batch-invariant", help="The same bits in every batch.")] = False,
    backend: Annotated[str | None, typer.Option(help="One backend by name.")] = None,
    device: Annotated[
        str, typer.Option(help=f"{', '.join(KNOWN_DEVICES)}, present or not, or a device of this machine.")
    ] = "h200",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show what would run for a step of a server: kernel, tiles, splits, the bytes it reads, what each backend says.

    The lengths of the sequences are no part of a plan: it serves them from their first token to the last.
    Exit code 2 for a step that cannot be, 3 for one that no backend can run.

    Example:  tessera explain-cache --batch 16 --seqlen-k 32768 --page-size 64 --append 1 --rotary 128
    """
    step = _Step(batch, seqlen_q, seqlen_k, page_size, Layout.VARLEN if varlen else Layout.DENSE)
    dims = head_dim, head_dim if head_dim_v is None else head_dim_v
    options: dict[str, Any] = {
        "causal": causal, "window": None if window is None else numbers("--window", window), "softcap": softcap,
        "sinks": (heads,) if sinks else None, "num_splits": num_splits, "schedule": schedule, "backend": backend,
        "batch_invariant": batch_invariant, "head_dim_v": head_dim_v, **step.places(),
    }  # fmt: skip

    def keys_and_values(rows: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        return (*rows, heads_kv, dims[0]), None if latent else (*rows, heads_kv, dims[1])

    if append:
        options["k"], options["v"] = keys_and_values(step.new(append))
    if rotary:
        options |= {"rotary_cos": (seqlen_k, rotary // 2), "rotary_sin": (seqlen_k, rotary // 2)}
    options |= {"dtype": DTYPES[dtype], "cache_dtype": torch.float8_e4m3fn if fp8 else None, "device": device}
    plan = _plan(((*step.new(seqlen_q), heads, head_dim), *keys_and_values(step.cached())), options)
    reasons = dispatch.why_not(plan.problem, plan.device)
    if as_json:
        given = {name: [asdict(reason) for reason in why] for name, why in reasons.items()}
        screen.print_json(plan.to_json() | {"reasons": given})
    else:
        _show(plan, reasons)


def _plan(shapes: tuple[tuple[int, ...] | None, ...], options: dict[str, Any]) -> CachePlan:
    """The plan, or the end of the command."""
    try:
        return plan_kvcache(*shapes, **options)  # type: ignore[arg-type]
    except Unsupported as refusal:
        screen.fail(str(refusal), screen.UNSUPPORTED)
    except (ValueError, TypeError) as mistake:
        screen.fail(str(mistake), screen.BAD_INPUT)


@dataclass(frozen=True)
class _Step:
    """How the rows of a step's tensors are arranged."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    page_size: int | None
    layout: Layout

    @property
    def pages(self) -> int:
        """Of a sequence."""
        return -(-self.seqlen_k // self.page_size) if self.page_size else 0

    def new(self, each: int) -> tuple[int, ...]:
        """Of queries or new keys, so many a sequence."""
        return (self.batch * each,) if self.layout is Layout.VARLEN else (self.batch, each)

    def cached(self) -> tuple[int, int]:
        return (self.batch * self.pages, self.page_size) if self.page_size else (self.batch, self.seqlen_k)

    def places(self) -> dict[str, tuple[int, ...] | None]:
        """The shapes of what says where sequences lie."""
        table = (self.batch, self.pages) if self.page_size else None
        return {"page_table": table, "cu_seqlens_q": (self.batch + 1,) if self.layout is Layout.VARLEN else None}


def _show(plan: CachePlan, reasons: dict[str, tuple[Reason, ...]]) -> None:
    problem, console = plan.problem, screen.console()
    per_key = problem.bytes_per_key()
    most = per_key * problem.shape.seqlen_k * problem.shape.batch
    facts = screen.facts(
        {
            "problem": screen.escape(str(problem)),
            "device": screen.escape(str(plan.device)),
            "backend": f"[ours]{plan.backend}[/]",
            "kernel": shown_choice(plan.choice),
            "reads": f"{screen.size(per_key)} a cached position, at most {screen.size(most)} a step",
            "workspace": f"{screen.size(plan.workspace_bytes)} of scratch",
        }
    )
    console.print(facts)
    show_backends(console, plan.backend, reasons)
