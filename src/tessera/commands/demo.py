"""`tessera demo`: a real transformer on real text through Tessera's attention, then the same formula at growing lengths."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.progress import Progress, TextColumn

from tessera.bench import machine, plots
from tessera.bench.report import write_json
from tessera.commands import corpus, screen
from tessera.commands.generate import QUICK, generate, scene_for
from tessera.commands.growth import HEAD_DIM, HEADS, LENGTHS, Step, plain_cases, special_cases, steps
from tessera.commands.options import DeviceOption
from tessera.commands.search import EAGER, QUESTIONS, Search, search

_SNIPPET_CHARACTERS = 230


def demo(
    passages: Annotated[int, typer.Option(min=8, help="Passages to search.")] = 400,
    quick: Annotated[bool, typer.Option("--quick", help="A few passages and short lengths: seconds, for a first look.")] = False,
    plot: Annotated[Path, typer.Option(help="Where the figure goes.")] = Path("out/demo.png"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured here.")] = None,
    generates: Annotated[bool, typer.Option("--generate", help="Instead: a Llama serves requests from a paged cache.")] = False,
    device: Annotated[str, DeviceOption] = "cpu",
) -> None:
    """Run a real encoder on real text through Tessera, prove it equal to eager attention, and see what tiles save.

    The text is what every Python carries: its licence, its reference and its library's docstrings. The exit code is 1 where a
    score differs from eager's, or an output from the plain formula's, by more than 1e-5.

    With --generate (and --device, for a GPU) a Llama-shaped model of random weights serves requests of many lengths, in
    continuous batches over a paged cache, then reads longer and longer contexts. The exit code is 1 where a token is not
    eager attention's.

    Example:  tessera demo --json out/demo.json
    """
    console, began = screen.console(), time.perf_counter()
    if generates:
        right = generate(console, scene_for(device, QUICK if quick else None), device, json_file)
        console.print(f"[dim]{time.perf_counter() - began:.0f} s in all[/]")
        raise typer.Exit(0 if right else 1)
    console.rule("[bold]Semantic search[/] with MiniLM, attention by Tessera", align="left")
    found = _search(min(passages, 48) if quick else passages)
    _show_search(console, found)
    console.rule(f"[bold]Exact attention[/] at growing lengths: {HEADS} heads of {HEAD_DIM}, float32", align="left")
    # Where other programs share the cores, threads that spin for each other cost all of them four times the time.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read by the processes that `growth` starts
    taken = _grow((256, 512) if quick else LENGTHS, () if quick else special_cases(4096))
    _show_growth(console, taken)
    figure = _draw(console, taken, plot)
    ok = found.ok and all(step.ok for step in taken)
    if json_file is not None:
        _write(json_file, found, taken, ok)
    for label, path in (("plot   ", figure), ("figures", json_file)):
        if path is not None:
            console.print(f"{label} {path}", soft_wrap=True)
    console.print(f"[dim]{time.perf_counter() - began:.0f} s in all[/]")
    raise typer.Exit(0 if ok else 1)


def _progress() -> Progress:
    return screen.progress(TextColumn("{task.percentage:>3.0f}%"))


def _search(most: int) -> Search:
    texts = corpus.passages(most)
    with _progress() as progress:
        task = progress.add_task("reading", total=2 * (len(texts) + len(QUESTIONS)))

        def advance(attention: str, count: int) -> None:
            progress.update(task, advance=count, description=f"embedding, {attention}")

        try:
            return search(texts, QUESTIONS, 3, advance)
        except ImportError as missing:
            screen.fail(f"{missing}\nor all that the demo needs: pip install 'tessera-attn[demo]'", 1)


def _show_search(console: Console, found: Search) -> None:
    console.print(f"{found.passages} passages from this Python's licence, reference and docstrings\n")
    for answer in found.answers:
        console.print(f"[key]?[/] [bold]{screen.escape(answer.question)}[/]")
        best, *others = answer.hits
        console.print(f"  [ours]{best.score:.3f}[/]  [bold]{screen.escape(best.source)}[/]")
        console.print(Padding(f"[dim]{screen.escape(_snippet(best.text))}[/]", (0, 2, 0, 9)))
        for hit in others:
            console.print(f"  {hit.score:.3f}  {screen.escape(hit.source)}")
        console.print()
    times = ", ".join(f"{name} {screen.seconds(value)}" for name, value in found.seconds.items())
    console.print(f"the same encoder with {EAGER} attention ({times}): {_verdict(found.ok)}")
    scores = f"{len(found.answers)} x {found.passages} scores differ by at most {found.score_difference:.1e}"
    console.print(f"{scores}, embeddings by {found.embedding_difference:.1e}; {found.allowed:.0e} is allowed\n")


def _snippet(text: str) -> str:
    return text if len(text) <= _SNIPPET_CHARACTERS else text[:_SNIPPET_CHARACTERS].rsplit(" ", 1)[0] + " ..."


def _verdict(ok: bool) -> str:
    return "[good]equal[/]" if ok else "[bad]DIFFERENT[/]"


def _grow(lengths: tuple[int, ...], special: tuple[Any, ...]) -> list[Step]:
    cases = (*plain_cases(lengths), *special)
    weight = {case.name: 1 + (case.seqlen_q / 2048) ** 2 for case in cases}
    taken: list[Step] = []
    with _progress() as progress:
        task = progress.add_task(cases[0].name, total=sum(weight.values()))
        for group in (cases[: len(lengths)], *((case,) for case in special)):
            progress.update(task, description=group[0].name)
            for step in steps(group):
                taken.append(step)
                following = cases[len(taken)].name if len(taken) < len(cases) else ""
                progress.update(task, advance=weight[step.name], description=following)
    return taken


def _show_growth(console: Console, taken: list[Step]) -> None:
    over = (">time\nnaive", ">\nTessera", ">\nfaster", ">peak memory\nnaive", ">\nTessera", ">\nless", ">largest\ndifference")
    shown = screen.table("\nattention", *over, "\nkernel")
    shown.columns[0].no_wrap = True
    notes = []
    for step in taken:
        name = step.name.removeprefix(f"d{HEAD_DIM} ")
        naive_time, faster, naive_memory, less = "-", "", "-", ""
        if step.naive is not None:
            naive_time, naive_memory = screen.seconds(step.naive.seconds), screen.size(step.naive.peak_bytes)
            faster = f"[good]{step.naive.seconds / step.ours.seconds:.1f}x[/]"
            less = f"[good]{step.naive.peak_bytes / max(step.ours.peak_bytes, 1):.0f}x[/]"
        else:
            notes.append(f"{name}: naive left out, {step.skipped}; compared with the {step.against}")
        difference = f"{step.difference:.1e}" if step.ok else f"[bad]{step.difference:.1e}[/]"
        ours = (f"[ours]{screen.seconds(step.ours.seconds)}[/]", f"[ours]{screen.size(step.ours.peak_bytes)}[/]")
        shown.add_row(name, naive_time, ours[0], faster, naive_memory, ours[1], less, difference, f"[dim]{step.kernel}[/]")
    console.print(shown)
    console.print("[dim]naive: softmax(scale q k^T) v, scores in memory; memory: over the inputs, a fresh process each[/]")
    for note in notes:
        console.print(f"[dim]{screen.escape(note)}[/]")
    console.print()


def _draw(console: Console, taken: list[Step], path: Path) -> Path | None:
    """The figure of the plain steps; None, and a word why, where matplotlib is missing."""
    plain = [step for step in taken if step.name.startswith(f"d{HEAD_DIM} full")]
    ours = plots.Curve("Tessera", tuple((s.tokens, s.ours.seconds, s.ours.peak_bytes) for s in plain))
    measured = ((s.tokens, s.naive) for s in plain)
    naive = plots.Curve("naive", tuple((n, found.seconds, found.peak_bytes) for n, found in measured if found is not None))
    caption = f"Exact attention on {machine.describe().cpu.name}: {HEADS} heads of {HEAD_DIM}, float32"
    try:
        return plots.growth(ours, naive, caption, path)
    except ImportError as missing:
        console.print(f"[dim]no plot: {screen.escape(str(missing))}[/]")
        return None


def _write(path: Path, found: Search, taken: list[Step], ok: bool) -> None:
    data = {"ok": ok, "machine": asdict(machine.describe()), "search": asdict(found), "growth": [asdict(step) for step in taken]}
    write_json(path, data)
