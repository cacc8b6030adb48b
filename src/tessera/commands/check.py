"""`tessera check`: the named cases against the oracle, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import typer
from rich.progress import track
from rich.table import Table

from tessera import dispatch, verify
from tessera.cases import CASES, Case
from tessera.commands import screen
from tessera.commands.options import DTYPES, SHORT, DeviceOption, DtypeOption
from tessera.device import Device
from tessera.errors import Unsupported
from tessera.operands import bind
from tessera.serving import dispatch as serving_dispatch
from tessera.serving import verify as serving_verify
from tessera.serving.cases import CACHE_CASES, CacheCase
from tessera.serving.operands import describe
from tessera.verify import Comparison

EVERY_CASE: dict[str, Case | CacheCase] = CASES | {f"cache: {name}": case for name, case in CACHE_CASES.items()}


@dataclass(frozen=True)
class Verdict:
    """One case in one dtype: what ran and how it compared, or why nothing ran. `failure` is an exception in words."""

    case: str
    dtype: str
    ran: str = ""
    comparisons: tuple[Comparison, ...] = ()
    refusal: str = ""
    failure: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.failure) or any(not comparison.ok for comparison in self.comparisons)


def check(
    dtype: Annotated[list[str] | None, DtypeOption(help="One or more of them; float32 by default.")] = None,
    backend: Annotated[str | None, typer.Option(help="One backend by name; by default the one that dispatch picks.")] = None,
    device: Annotated[str, DeviceOption] = "cpu",
    substring: Annotated[str, typer.Option("-k", help="Only cases whose name contains this.")] = "",
    gradients: Annotated[bool, typer.Option("--gradients", help="Check the gradients too.")] = False,
) -> None:
    """Run the named cases on this machine and compare each with the float64 oracle.

    A result passes when its error is within twice the error of the plain formula in the same dtype, and rounding. Cases
    that a backend refuses are listed with its reason; they are no failures. The exit code is 1 when anything fails.

    Cases whose name begins with "cache:" run attention_with_kvcache; what it leaves in the cache is compared too.

    Example:  tessera check -k causal --dtype float16 --dtype bfloat16 --gradients
    """
    chosen = [name for name in EVERY_CASE if substring in name]
    if not chosen:
        screen.fail(f"-k={substring!r}: no case has this in its name; use one of {', '.join(EVERY_CASE)}", screen.BAD_INPUT)
    if backend is not None and backend not in dispatch.BACKENDS:
        screen.fail(f"backend={backend!r}: there is no such backend; use one of {', '.join(dispatch.BACKENDS)}", screen.BAD_INPUT)
    console = screen.console()
    jobs = [(case, name) for name in dtype or ["float32"] for case in chosen]
    verdicts = [
        judge(case, name, device, backend, gradients)
        for case, name in track(jobs, "checking", console=screen.errors(), transient=True)
    ]
    console.print(_table(verdicts))
    refused = sum(bool(verdict.refusal) for verdict in verdicts)
    failed = sum(verdict.failed for verdict in verdicts)
    passed = len(verdicts) - refused - failed
    console.print("[dim]the largest error, and its share of what the rule allows; of gradients and caches, the worst one's[/]")
    console.print(f"[good]{passed} passed[/], {f'[bad]{failed} failed[/]' if failed else '0 failed'}, {refused} refused\n")
    raise typer.Exit(1 if failed else 0)


def judge(name: str, dtype: str, device: str, backend: str | None, gradients: bool) -> Verdict:
    """One case beside the oracle. Nothing is raised: a refusal and a failure are verdicts too."""
    case = EVERY_CASE[name]
    prepare = _cache_run if isinstance(case, CacheCase) else partial(_plain_run, gradients=gradients)
    try:
        ran, run = prepare(case, DTYPES[dtype], device, backend)  # type: ignore[arg-type]
    except Unsupported as refusal:
        reasons = [f"{name}: {reason}" for name, given in refusal.refusals.items() for reason in given]
        return Verdict(name, dtype, refusal="; ".join(reasons))
    except (ValueError, TypeError) as refusal:
        return Verdict(name, dtype, refusal=str(refusal))
    try:
        return Verdict(name, dtype, ran, tuple(run()))
    except Exception as failure:  # one broken case must not hide the others
        return Verdict(name, dtype, ran, failure=f"{type(failure).__name__}: {failure}".splitlines()[0])


Run = tuple[str, Callable[[], list[Comparison]]]
"""The backend and kernel, and what runs them beside the oracle."""


def _plain_run(case: Case, dtype: torch.dtype, device: str, backend: str | None, gradients: bool) -> Run:
    request = case.request(device, dtype, requires_grad=gradients)._replace(backend=backend)
    problem, _ = bind(request)
    plan = dispatch.select(problem, Device.of(torch.device(device)), backend)
    return f"{plan.backend} {plan.forward.kernel}", lambda: verify.run(request)


def _cache_run(case: CacheCase, dtype: torch.dtype, device: str, backend: str | None) -> Run:
    request = case.request(device, dtype)._replace(backend=backend)
    plan = serving_dispatch.select(describe(request), Device.of(torch.device(device)), backend)
    return f"{plan.backend} {plan.choice.kernel}", lambda: serving_verify.run(request)


def _table(verdicts: Sequence[Verdict]) -> Table:
    others = any(len(verdict.comparisons) > 2 for verdict in verdicts)
    columns = ["case", "dtype", "ran", ">out", ">lse"] + ([">gradients, caches"] if others else []) + ["verdict"]
    shown = screen.table(*columns)
    shown.columns[0].no_wrap = shown.columns[2].no_wrap = True
    for verdict in verdicts:
        row = [verdict.case, SHORT[verdict.dtype], verdict.ran]
        if verdict.refusal or verdict.failure:
            blank = [""] * (len(columns) - 4)
            words = f"[dim]refused: {screen.escape(verdict.refusal)}[/]"
            if verdict.failure:
                words = f"[bad]failed: {screen.escape(verdict.failure)}[/]"
            shown.add_row(*row, *blank, words)
            continue
        own, rest = verdict.comparisons[:2], verdict.comparisons[2:]
        row += [_cell(comparison) for comparison in own]
        if others:
            row.append(_cell(max(rest, key=lambda c: c.error / max(c.allowed, 1e-300))) if rest else "")
        shown.add_row(*row, "[bad]FAILED[/]" if verdict.failed else "[good]ok[/]")
    return shown


def _cell(comparison: Comparison) -> str:
    share = comparison.error / comparison.allowed if comparison.allowed else 0.0
    text = f"{comparison.error:.1e} [dim]{share:4.0%}[/]"
    return text if comparison.ok else f"[bad]{comparison.name} {text}[/]"
