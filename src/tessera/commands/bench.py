"""`tessera bench`: a named grid, ours and the peers in turns. A thin skin over tessera.bench."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tessera.bench import plots
from tessera.bench.cells import Direction
from tessera.bench.grids import Metric, grid_named
from tessera.bench.report import Entry, Outcome, Report
from tessera.bench.runner import CELL_LIMIT_S, Limits
from tessera.bench.session import Order, quick_grid
from tessera.bench.training import TrainingOrder, TrainingReport
from tessera.commands import screen, train
from tessera.commands.options import DTYPES, DtypeOption

_DRAW = {Outcome.REFUSED: "[dim]-[/]", Outcome.WRONG: "[bad]wrong[/]", Outcome.FAILED: "[bad]failed[/]"}


def bench(
    grid: Annotated[str | None, typer.Option(help="One of the grids below; a quick one by default.")] = None,
    peers: Annotated[str | None, typer.Option(help="Of sdpa, eager, cudnn, fa2, fa3, fa4, flex, deterministic, plain.")] = None,
    backward: Annotated[bool, typer.Option("--backward", help="Time the backward.")] = False,
    dtype: Annotated[str | None, DtypeOption(help="Instead of the grid's own.")] = None,
    device: Annotated[str | None, typer.Option(help="A device of this machine; by default the grid's kind.")] = None,
    backend: Annotated[str | None, typer.Option(help="Our backend; by default the one that dispatch picks.")] = None,
    only: Annotated[str, typer.Option("-k", help="Only cells whose name contains this.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the rates here, as PNG.")] = None,
    fa3_dir: Annotated[Path | None, typer.Option(help="A folder with FlashAttention-3's fa3.so.")] = None,
    saved: Annotated[
        Path | None, typer.Option("--report", help="Measure nothing: show (and draw) what --json wrote, or a --grid of it.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=2, help="Turns that each contender takes; 5 on a GPU.")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds after which no cell is begun.")] = None,
    cell_limit: Annotated[float, typer.Option(help="Seconds after which a cell is given up.")] = CELL_LIMIT_S,
    training: Annotated[bool, typer.Option("--train", help="Time whole training steps of a GPT, no grid.")] = False,
    layers: Annotated[int | None, typer.Option(min=1, help="Of the GPT; by default 24 on a GPU, 2 on a CPU.")] = None,
) -> None:
    """Time Tessera beside its peers on a named grid.

    Every result is first compared with the float64 oracle (or float32 SDPA); who is wrong is not timed. Then all take
    turns, so that they meet the same clock and the same neighbours; a ratio is the median of the rounds' own ratios, with its
    quartiles. A cell that fails or hangs costs that cell. The exit code is 1 when a cell of ours has no time.

    Grids:  cpu-quick, cpu;  on a GPU: paper, paper-quick, gqa, window, varlen, dims, heads, modifiers, variants; decode, chunk.
    Several are one report with a plus between: paper+gqa

    With --backward the peer deterministic is our own call in a fixed order; plain is it without bias, ALiBi and dropout. decode
    and chunk run attention_with_kvcache; their peers are sdpa, cudnn, fa2, fa3, fa3-pages64 and -16, fa4, and ours again over
    pages (pages1, pages16, pages64, ...) or batch-invariant (invariant).

    With --train every contender's attention trains the same GPT, step by step in turns, and must find our gradients first.

    Example:  tessera bench --grid paper --backward --peers cudnn,fa3 --json out/h200.json --plot out/h200.png
    """
    console = screen.console()
    names = None if peers is None else tuple(peers.split(","))
    if training:
        lessons = TrainingOrder(device, names, fa3_dir, layers, rounds)
        trained = train.measured(lessons, json_file) if saved is None else screen.saved(TrainingReport.read, saved)
        train.show(console, trained)
        raise typer.Exit(0 if trained.ok else 1)
    if saved is None:
        order = Order(
            grid or quick_grid(), Direction.BACKWARD if backward else Direction.FORWARD, None if dtype is None else DTYPES[dtype],
            device, backend, names, only, fa3_dir, Limits(cell_limit, deadline), rounds,
        )  # fmt: skip
        report = _measure(console, order, json_file)
    else:
        report = _narrowed(screen.saved(Report.read, saved), grid, only)
        console.print(f"[bold]{report.grid}[/]: {report.direction.value}, measured {report.date} on {report.device}")
    _show(console, report)
    if plot is not None and report.contenders:
        console.print(f"plot    {plots.rates(report, plot)}", soft_wrap=True)
    if json_file is not None and saved is None:
        console.print(f"figures {json_file}", soft_wrap=True)
    raise typer.Exit(0 if report.ok else 1)


def _measure(console: Console, order: Order, json_file: Path | None) -> Report:
    """Run the cells under a progress bar. The JSON file is written after each, so that a killed run loses one cell."""
    try:
        session = order.session()
    except ValueError as mistake:
        screen.fail(str(mistake), screen.BAD_INPUT)
    about = f"{session.grid.about}; {order.direction.value}, cells: {len(session.cells)}, on {session.device}"
    console.print(f"[bold]{session.grid.name}[/]: {about}")
    names = [*(cell.name for cell in session.cells), ""]
    with screen.progress() as progress:
        task = progress.add_task(names[0], total=len(session.cells))
        for report in session.reports():
            progress.update(task, advance=1, description=names[len(report.cells)])
            if json_file is not None:
                report.write(json_file)
    return report


def _narrowed(report: Report, grid: str | None, only: str) -> Report:
    """The report's cells of that grid, with that in their names."""
    wanted = {cell.name for cell in (grid_named(grid).cells() if grid else report.cells) if only in cell.name}
    return replace(report, grid=grid or report.grid, cells=tuple(cell for cell in report.cells if cell.name in wanted))


def _show(console: Console, report: Report) -> None:
    peers = [name for name in report.contenders if name != report.ours]
    unit = report.metric.value
    shown = screen.table("cell", f">{report.ours}", *(f">{name}" for name in peers), *(f">over {name}" for name in peers))
    for cell in report.cells:
        lost = any(_is_lost(cell.entries.get(name)) for name in peers)
        name = f"[bad]{cell.name}[/]" if lost else cell.name
        if cell.note:
            shown.add_row(name, f"[bad]{screen.escape(cell.note)}[/]")
            continue
        rates = [_rate(cell.entries.get(contender), report) for contender in (report.ours, *peers)]
        shown.add_row(name, *rates, *(_ratio(cell.entries.get(peer)) for peer in peers))
    console.print(shown)
    console.print(f"[dim]{unit} (time); 'over': how many times faster {report.ours} is, median of paired rounds (quartiles)[/]")
    _show_notes(console, report)
    _show_summary(console, report)


def _is_lost(entry: Entry | None) -> bool:
    return entry is not None and entry.speedup is not None and entry.speedup.median < 1


def _rate(entry: Entry | None, report: Report) -> str:
    if entry is None:
        return ""
    if entry.rate is None or entry.seconds is None:
        return _DRAW[entry.outcome]
    rate = f"{entry.rate:,.0f}" if entry.rate >= 100 or report.metric is Metric.BANDWIDTH else f"{entry.rate:#.3g}"
    return f"{rate} [dim]({screen.seconds(entry.seconds.median)})[/]"


def _ratio(entry: Entry | None) -> str:
    if entry is None or entry.speedup is None:
        return ""
    return f"[{'bad' if _is_lost(entry) else 'good'}]{entry.speedup}[/]"


def _show_notes(console: Console, report: Report) -> None:
    """Why entries are missing, each reason once, with the number of cells it touched."""
    reasons: dict[tuple[str, str, Outcome], int] = {}
    for cell in report.cells:
        for name, entry in cell.entries.items():
            if entry.note:
                key = (name, entry.note, entry.outcome)
                reasons[key] = reasons.get(key, 0) + 1
    for (name, note, outcome), count in reasons.items():
        style = "dim" if outcome is Outcome.REFUSED else "bad"
        cells = f"{count} cell{'s' if count > 1 else ''}"
        console.print(f"[{style}]{name} {outcome.value} in {cells}: {screen.escape(note)}[/]", soft_wrap=True)


def _show_summary(console: Console, report: Report) -> None:
    lost = report.lost()
    console.print()
    for loss in lost:
        sure = "" if loss.speedup.high < 1 else "  [dim](within the spread)[/]"
        console.print(f"[bad]behind {loss.peer}[/]  {loss.cell}: {loss.speedup}{sure}")
    means = ", ".join(f"{name} [bold]{value:.3f}[/]" for name, value in report.geomeans().items())
    if means:
        console.print(f"{report.ours} over each peer, geometric mean: {means}")
    if report.ceilings is not None:
        console.print(f"[dim]ceilings of the run: {report.ceilings}[/]")
    best = report.against_best()
    if best is not None and len(report.geomeans()) > 1:
        console.print(f"{report.ours} over the best peer of each cell: [bold]{best:.3f}[/]")
