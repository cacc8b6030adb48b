"""`tessera learn`: a byte-level GPT on real text, by our attention and by exact attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tessera.bench import plots
from tessera.bench.learning import LearningOrder, LearningReport
from tessera.commands import screen
from tessera.commands.options import DTYPES, DtypeOption


def learn(
    steps: Annotated[int | None, typer.Option(help="Training steps; by default 100 on a CPU, 300 on a GPU.")] = None,
    dtype: Annotated[str | None, DtypeOption(help="Of our model; bfloat16 by default.")] = None,
    device: Annotated[str | None, typer.Option(help="A device of this machine; by default the GPU where there is one.")] = None,
    backend: Annotated[str | None, typer.Option(help="Our backend; by default the one that dispatch picks.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the loss curves here, as PNG.")] = None,
    saved: Annotated[Path | None, typer.Option("--report", help="Train nothing: show (and draw) what --json wrote.")] = None,
) -> None:
    """Train a small GPT on this Python's own sources with Tessera, and see that it learns what exact attention learns.

    The same weights and batches go through the same model with torch's math attention in float32, once in our dtype and once
    all in float32. The exit code is 1 where our loss curve lies further from the float32 one than the dtype explains.

    Example:  tessera learn --plot out/losses.png
    """
    console = screen.console()
    order = LearningOrder(device, backend, steps, DTYPES[dtype] if dtype else None)
    report = _learned(order) if saved is None else screen.saved(LearningReport.read, saved)
    _show(console, report)
    if plot is not None:
        console.print(f"plot    {plots.losses(report, plot)}", soft_wrap=True)
    if json_file is not None and saved is None:
        report.write(json_file)
        console.print(f"figures {json_file}", soft_wrap=True)
    raise typer.Exit(0 if report.ok else 1)


def _learned(order: LearningOrder) -> LearningReport:
    """All of the order's steps under a progress bar."""
    try:
        course = order.course()
    except ValueError as mistake:
        screen.fail(str(mistake), screen.BAD_INPUT)
    with screen.progress() as progress:
        task = progress.add_task("learning", total=course.lesson.steps)
        return course.run(lambda: progress.advance(task))


def _show(console: Console, report: LearningReport) -> None:
    lesson = report.lesson
    sizes = f"{lesson['layers']} layers, {lesson['heads']} heads of {lesson['head_dim']}"
    work = f"{lesson['steps']} steps of {lesson['batch']} x {lesson['seqlen']} bytes"
    console.print(f"{report.text}\n[dim]{sizes}; {work}[/]", soft_wrap=True)
    shown = screen.table("learner", ">first loss", ">last loss", ">held out", ">from float32's curve")
    for curve in report.curves:
        apart = f"{report.from_float32(curve):.1e}" if curve is not report.curves[-1] else ""
        shown.add_row(curve.name, f"{curve.losses[0]:.4f}", f"{curve.losses[-1]:.4f}", f"{curve.held_out:.4f}", apart)
    console.print(shown)
    verdict = "[good]the curves lie on each other[/]" if report.ok else "[bad]the curves are DIFFERENT[/]"
    measured = f"ours ({report.kernel}) {report.distance:.1e} nats from float32's in the mean, {report.allowed:.1e} is allowed"
    console.print(f"{verdict}: {measured}", soft_wrap=True)
