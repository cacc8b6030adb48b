"""`tessera demo --generate`: a Llama serves requests of many lengths from a paged cache, then reads long contexts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from tessera.bench import machine
from tessera.bench.contexts import Context, contexts
from tessera.bench.llama import Cache, Llama, LlamaShape
from tessera.bench.report import write_json
from tessera.bench.server import Judged, Ragged, Served, Server, judge
from tessera.commands import screen


@dataclass(frozen=True)
class Scene:
    """What is shown: a model that serves `load` from `pages` pages, `seats` at once; one that reads `lengths` in chunks."""

    dtype: torch.dtype
    serving: LlamaShape
    load: Ragged
    seats: int
    pages: int
    page_size: int
    reading: LlamaShape
    lengths: tuple[int, ...]
    chunk: int


_SMALL = LlamaShape(layers=3, hidden=128, heads_q=8, heads_kv=2, head_dim=16, width=256, vocabulary=512, positions=1024)
_CPU_READER = LlamaShape(layers=2, hidden=256, heads_q=8, heads_kv=2, head_dim=32, width=512, vocabulary=512, positions=1 << 14)
_ONE_BILLION = LlamaShape(
    layers=16, hidden=2048, heads_q=16, heads_kv=4, head_dim=128, width=8192, vocabulary=32768, positions=4096
)  # fmt: skip
_TWO_LAYERS_OF_8B = LlamaShape(
    layers=2, hidden=4096, heads_q=32, heads_kv=8, head_dim=128, width=14336, vocabulary=128256, positions=(512 << 10) + 64
)  # fmt: skip

QUICK = Scene(torch.float32, _SMALL, Ragged(6, (3, 60), (2, 12)), 3, 30, 8, _CPU_READER, (256, 512), 256)
CPU = Scene(torch.float32, _SMALL, Ragged(24, (3, 300), (4, 60)), 6, 81, 16, _CPU_READER, (1024, 2048, 4096, 8192), 512)
GPU = Scene(
    torch.bfloat16, _ONE_BILLION, Ragged(64, (20, 2000), (32, 256)), 16, 513, 64, _TWO_LAYERS_OF_8B,
    tuple(k << 10 for k in (8, 32, 128, 256, 512)), 8192,
)  # fmt: skip


def scene_for(device: str, quick: Scene | None) -> Scene:
    """What to show on a device; `quick` stands in for it where a first look is wanted."""
    return quick or (GPU if torch.device(device).type == "cuda" else CPU)


def generate(console: Console, scene: Scene, device: str, json_file: Path | None) -> bool:
    """Serve and read; whether every token was eager attention's, and every step the plain formula's."""
    console.rule("[bold]Continuous batching[/] over a paged cache", align="left")
    served, judged = _serve(scene, device)
    _show_serving(console, scene, served, judged)
    console.rule("[bold]Long contexts[/]: one prompt, read in chunks, and a step behind it", align="left")
    read = _read(scene, device)
    _show_contexts(console, scene, read)
    ok = judged.ok and all(context.ok for context in read)
    if json_file is not None:
        shapes = {name: asdict(shape) for name, shape in (("serving", scene.serving), ("reading", scene.reading))}
        data = {
            "ok": ok, "kind": "generation", "device": device, "dtype": _short(scene), "machine": asdict(machine.describe()),
            "shapes": shapes, "served": asdict(served) | {"answers": len(served.answers)}, "judged": asdict(judged),
            "contexts": [asdict(context) for context in read],
        }  # fmt: skip
        write_json(json_file, data)
    return ok


def _serve(scene: Scene, device: str) -> tuple[Served, Judged]:
    model, exact = (Llama(scene.serving, dtype, device) for dtype in (scene.dtype, torch.float32))
    exact.load_state_dict(model.state_dict())
    requests = scene.load.requests(scene.serving.vocabulary)
    server = Server(model, Cache.empty(model, scene.pages, scene.page_size), scene.seats)
    server.run(requests[: scene.seats])  # compiles; and leaves pages that others have used
    served = server.run(requests)
    return served, judge(model, exact, requests, served)


def _read(scene: Scene, device: str) -> list[Context]:
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model, found = Llama(scene.reading, scene.dtype, device), list[Context]()
    with screen.progress() as progress:
        task = progress.add_task("reading", total=scene.lengths[-1])
        for context in contexts(model, scene.lengths, scene.chunk, scene.page_size):
            found.append(context)
            progress.update(task, completed=context.tokens)
    return found


def _show_serving(console: Console, scene: Scene, served: Served, judged: Judged) -> None:
    pages = f"pages of {scene.page_size} rows, filled {served.appending}"
    console.print(f"a Llama of random weights, {_sizes(scene, scene.serving)}; {pages}", soft_wrap=True)
    tokens = f"{served.prompt_tokens} tokens of prompts and {served.new_tokens} new ones in {served.steps} steps"
    taken = f"{served.most_seated} of {scene.seats} seats and {served.peak_pages} of {served.pages} pages"
    console.print(f"{len(served.answers)} requests, {tokens}; up to {taken} taken at once", soft_wrap=True)
    prefill, decode = served.prompt_tokens / served.prefill_s, (served.new_tokens - len(served.answers)) / served.decode_s
    console.print(f"prefill [ours]{prefill:,.0f}[/] tokens/s, decode [ours]{decode:,.0f}[/] tokens/s")
    verdict = "[good]eager's own[/]" if judged.ok else "[bad]DIFFERENT[/]"
    near = f", {judged.near} as good within {_short(scene)}'s rounding" if judged.near else ""
    equal = f"{judged.equal} of {judged.tokens} tokens equal{near}"
    console.print(f"the same model with eager attention, without a cache: {equal}: {verdict}", soft_wrap=True)
    if scene.dtype is not torch.float32:
        same = f"ours {judged.exact} times, eager in {_short(scene)} {judged.eager_exact}"
        console.print(f"[dim]what the same weights choose in float32: {same}[/]")
    console.print()


def _show_contexts(console: Console, scene: Scene, read: list[Context]) -> None:
    console.print(f"{_sizes(scene, scene.reading)}; chunks of {scene.chunk}")
    titles = (">prefill", ">tokens/s", ">a decode step", ">cache", ">peak memory", ">scores, eager", ">difference")
    shown = screen.table(">context", *titles)
    for c in read:
        difference = f"{c.difference:.1e}" if c.ok else f"[bad]{c.difference:.1e}[/]"
        peak = "-" if c.peak_bytes is None else screen.size(c.peak_bytes)
        shown.add_row(
            f"{c.tokens:,}", screen.seconds(c.prefill_s), f"{c.tokens / c.prefill_s:,.0f}", screen.seconds(c.decode_s),
            screen.size(c.cache_bytes), peak, f"[dim]{screen.size(c.scores_bytes)}[/]", difference,
        )  # fmt: skip
    console.print(shown)
    console.print("[dim]scores, eager: of one layer, in memory; difference: of a step's logits from the plain formula's[/]\n")


def _sizes(scene: Scene, shape: LlamaShape) -> str:
    heads = f"{shape.heads_q}/{shape.heads_kv} heads of {shape.head_dim}"
    return f"{shape.layers} layers, hidden {shape.hidden}, {heads}, {_short(scene)}"


def _short(scene: Scene) -> str:
    return str(scene.dtype).removeprefix("torch.")
