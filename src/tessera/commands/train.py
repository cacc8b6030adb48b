"""`tessera bench --train`: whole training steps, attention by ours and by the peers. A thin skin over tessera.bench.training."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from tessera.bench.report import Outcome
from tessera.bench.training import Length, StepResult, TrainingOrder, TrainingReport
from tessera.commands import screen

_DRAW = {Outcome.REFUSED: "[dim]refused[/]", Outcome.WRONG: "[bad]wrong[/]", Outcome.FAILED: "[bad]failed[/]"}


def measured(order: TrainingOrder, json_file: Path | None) -> TrainingReport:
    """Run the order's lengths under a progress bar; the JSON file is written after each."""
    try:
        course = order.course()
    except ValueError as mistake:
        screen.fail(str(mistake), screen.BAD_INPUT)
    with screen.progress() as progress:
        task = progress.add_task("training", total=len(course.lengths))
        for report in course.reports():
            progress.advance(task)
            if json_file is not None:
                report.write(json_file)
    return report


def show(console: Console, report: TrainingReport) -> None:
    """The report as a table for each length."""
    shape, device = report.shape, report.machine.gpus[0].name if report.device != "cpu" else report.machine.cpu.name
    sizes = f"{shape.layers} layers, hidden {shape.hidden}, {shape.heads} heads of {shape.head_dim}, {shape.vocabulary} tokens"
    console.print(f"[bold]training[/]: {sizes}; {report.dtype}, {report.tokens} tokens a step, on {device}", soft_wrap=True)
    shown = screen.table("sequences", "attention", ">step", ">model FLOPs", ">peak memory", ">ours is faster by")
    for length in report.lengths:
        for name, result in length.entries.items():
            shown.add_row(*_row(length, name, result, report.ours))
        shown.add_section()
    console.print(shown)
    if report.ceilings is not None:
        console.print(f"[dim]in the same run: {report.ceilings}[/]")
    console.print("[dim]FLOPs of a step by Megatron-LM's formula, which counts all of causal attention's square[/]")
    for length in report.lengths:
        for name, result in length.entries.items():
            if result.note:
                console.print(f"[dim]{length.batch} x {length.seqlen} {name}: {screen.escape(result.note)}[/]", soft_wrap=True)


def _row(length: Length, name: str, result: StepResult, ours: str) -> tuple[str, ...]:
    sequences = f"{length.batch} x {length.seqlen}"
    if result.seconds is None or result.tflops is None:
        return sequences, name, _DRAW[result.outcome], "", "", ""
    rate = f"{result.tflops:.0f}" if result.tflops >= 100 else f"{result.tflops:#.3g}"
    used = f"{rate} TFLOP/s" + ("" if result.utilisation is None else f" ({result.utilisation:.1%})")
    memory = "" if result.peak_bytes is None else screen.size(result.peak_bytes)
    ratio = "" if result.speedup is None else f"[{'bad' if result.speedup.median < 1 else 'good'}]{result.speedup}[/]"
    shown_name = f"[ours]{name}[/]" if name == ours else name
    return sequences, shown_name, screen.seconds(result.seconds.median), used, memory, ratio
