"""Writes README's generated parts between their markers: the summary of what runs where, and the measured figures.

    python scripts/update_readme.py            writes
    python scripts/update_readme.py --check    exits 1 where README is stale

`make matrix` runs it.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from tessera.backends.cpu import ATEN
from tessera.bench.grids import GRIDS, family_of
from tessera.bench.report import CellResult, Report, geomean
from tessera.serving import dispatch as serving_dispatch
from tessera.serving.support import FEATURES as CACHE_FEATURES
from tessera.support import FEATURES, Column, Feature, columns

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
LOST = 12
"""How many losing cells a grid's last line names."""


def support() -> str:
    """One line a group of features, one column a backend: all, or all but what."""
    asked = [column for column in columns() if column.kernel != ATEN]  # what torch's kernel lacks, the tiles have
    lines = ["| | " + " | ".join(f"`{c.backend}` ({_device(c)})" for c in asked) + " |", "|---" * (len(asked) + 1) + "|"]
    for group, members in groupby(FEATURES, key=lambda feature: feature.group):
        features = list(members)
        lines.append(f"| {group} | " + " | ".join(_cell(column, features) for column in asked) + " |")
    lines.append("| KV cache | " + " | ".join(_cache_cell(column.backend) for column in asked) + " |")
    return "\n".join(lines)


def _cache_cell(backend: str) -> str:
    """Of attention_with_kvcache's features, by their numbers: the names fill docs/support_matrix.md."""
    if backend not in serving_dispatch.BACKENDS:
        return "none"
    refused = [feature for feature in CACHE_FEATURES if feature.refusal(backend)]
    if not refused:
        return "all"
    return "all but " + ", ".join(f.name if f.group == "Dtypes" else f"{f.group.lower()}: {f.name}" for f in refused)


def _device(column: Column) -> str:
    homes = {"hopper": "H100, H200", "torch": "any device, not fast"}
    return homes.get(column.backend, column.device.kind.upper())


def _cell(column: Column, features: list[Feature]) -> str:
    """Impossible anywhere (a head_dim of 257) is no backend's fault and not listed."""
    possible = [f for f in features if any(not other.refusal(f) for other in columns())]
    served = [f.name for f in possible if not column.refusal(f)]
    refused = [f.name for f in possible if column.refusal(f)]
    if not refused:
        return "all"
    return ", ".join(served) if len(served) < len(refused) else "all but " + ", ".join(refused)


def speed() -> str:
    """A line for each thing that is measured: how many times faster than whom, in the mean, and in the worst cell."""
    rows = []
    for direction in ("forward", "backward"):
        for path in sorted(RESULTS.glob(f"{direction}_*.json"))[-1:]:
            rows.append(_speed_of_grid(Report.read(path)))
    for path in sorted(RESULTS.glob("decode_*.json"))[-1:]:
        rows.append(_speed_of_decoding(json.loads(path.read_text())))
    for path in sorted(RESULTS.glob("training_*.json"))[-1:]:
        rows.append(_speed_of_training(json.loads(path.read_text())))
    head = ["| faster than, in the mean | FA3 | cuDNN | FA2 | the best of each cell | worst cell |", "|---|---|---|---|---|---|"]
    foot = "*Measured beside them in one run, in turns, on one H200; above 1: ours is faster. [Every cell](#benchmarks).*"
    return "\n".join([*head, *rows, "", foot])


def _speed_of_grid(report: Report) -> str:
    paper = {case.name for case in GRIDS["paper"].cases}
    part = replace(report, cells=tuple(cell for cell in report.cells if cell.name in paper))
    ratios = [ratio for cell in part.cells if (ratio := part.over_best(cell)) is not None]
    return _speed_line(f"{report.direction.value}, {len(ratios)} cells of the papers' grid", part.geomeans(), ratios)


def _speed_of_decoding(record: dict[str, Any]) -> str:
    cells = [cell["microseconds"] for cell in record["cells"] if "tessera" in cell["microseconds"]]
    means = {}
    for peer in ("fa3", "cudnn", "fa2"):
        ratios = [times[peer] / times["tessera"] for times in cells if peer in times]
        means |= {peer: geomean(ratios)} if ratios else {}
    best = [ratio for cell in record["cells"] if math.isfinite(ratio := _least_ratio(cell))]
    return _speed_line(f"decoding, {len(best)} caches", means, best)


def _speed_of_training(record: dict[str, Any]) -> str:
    entries = [length["entries"] for length in record["lengths"]]
    timed = {
        peer: [length[peer]["speedup"]["median"] for length in entries if length.get(peer, {}).get("speedup")]
        for peer in ("fa3", "cudnn", "fa2")
    }
    best = [min(values) for values in zip(*(ratios for ratios in timed.values() if ratios), strict=False)]
    return _speed_line(f"a GPT's training step, {len(best)} lengths", {peer: geomean(r) for peer, r in timed.items() if r}, best)


def _speed_line(about: str, means: dict[str, float], best: list[float]) -> str:
    shown = [f"{means[peer]:.2f}" if peer in means else "" for peer in ("fa3", "cudnn", "fa2")]
    return f"| {about} | " + " | ".join(shown) + f" | {geomean(best):.2f} | {min(best):.2f} |"


def benchmarks() -> str:
    """The newest record of each direction: TFLOP/s of ours and the ratio to the best peer, cell by cell, losing cells first."""
    parts = []
    for direction in ("forward", "backward"):
        for path in sorted(RESULTS.glob(f"{direction}_*.json"))[-1:]:
            parts.append(_beside_peers(Report.read(path), path.name))
    for peer, about in ALONE.items():
        paths = sorted(RESULTS.glob(f"{peer}-*.json"), key=lambda path: ("backward" in path.name, path.name))
        parts += [_beside(peer, about, json.loads(path.read_text()), path.name) for path in paths]
    for path in sorted(RESULTS.glob("modifiers-forward_*.json"))[-1:]:
        parts.append(_modifiers(path, path.with_name(path.name.replace("forward", "backward"))))
    for path in sorted(RESULTS.glob("host_*.json"))[-1:]:
        parts.append(_host(json.loads(path.read_text()), path.name))
    return "\n\n".join(parts) or "Nothing measured yet."


ALONE = {"fa4": "FlashAttention-4 (CuTe DSL)", "flex": "FlexAttention (torch.compile)"}
"""Peers that bring a compiler of their own and are timed in runs of their own."""


def _beside(peer: str, about: str, record: dict[str, Any], name: str) -> str:
    """One sentence of a report of the bench on such a peer."""
    entries = {cell["name"]: cell["entries"].get(peer) for cell in record["cells"]}
    ratios = {cell: entry["speedup"]["median"] for cell, entry in entries.items() if entry and entry["speedup"]}
    cells = "; ".join(f"{cell}: {ratio:.2f}" for cell, ratio in ratios.items())
    mean = record["summary"]["geomean_speedup"][peer]
    said = f"Beside {about}, {record['direction']}, ours is {mean:.2f} times as fast in the mean of {len(ratios)} cells"
    return f"{said}. {cells} (`benchmarks/results/{name}`)."


def _modifiers(*paths: Path) -> str:
    """What each modifier of scores costs, forward and backward together, times of the same without; full and causal averaged, or
    the one that was timed both ways."""
    forward, backward = ({cell.name: cell for cell in Report.read(path).cells} for path in paths)
    costs: dict[tuple[str, str], dict[str, float]] = {}
    for name in forward.keys() & backward.keys():
        dim, mask, kind = family_of(name)[0].split(" ", 2) if family_of(name)[0].count(" ") > 1 else ("", "", "")
        times = [_medians(cell, ("tessera", "tessera-plain")) for cell in (forward[name], backward[name])]
        if kind and all(times):
            ours, plain = (sum(both) for both in zip(*times, strict=True))
            costs.setdefault((kind, dim), {})[mask] = ours / plain
    kinds, dims = sorted({kind for kind, _ in costs}), sorted({dim for _, dim in costs}, key=lambda dim: int(dim[1:]))
    files = " and ".join(f"`benchmarks/results/{path.name}`" for path in paths)
    head = (
        "What modifies scores costs at 4k, forward and backward together, in times of the same without "
        f"({files}; `tessera bench --grid modifiers --peers plain`):"
    )
    lines = [head, "", "| | " + " | ".join(dims) + " |", "|---" * (len(dims) + 1) + "|"]
    for kind in kinds:
        found = [costs.get((kind, dim), {}) for dim in dims]
        shown = (f"{geomean(x.values()):.2f}" + ("" if len(x) > 1 else f" ({next(iter(x))})") if x else "" for x in found)
        lines.append(f"| {kind} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _medians(cell: CellResult, contenders: tuple[str, ...]) -> list[float]:
    """Their times; empty where one has none."""
    seconds = [
        entry.seconds for name in contenders if (entry := cell.entries.get(name)) is not None and entry.seconds is not None
    ]
    return [taken.median for taken in seconds] if len(seconds) == len(contenders) else []


def _host(record: dict[str, Any], name: str) -> str:
    """What calls cost the host, and the first call of a process."""
    kinds = []
    for kind, times in record["seconds"].items():
        ours, *others = (f"{1e6 * taken['median']:.1f}" if who == "tessera" else f"{who} {1e6 * taken['median']:.1f}"
                         for who, taken in times.items())  # fmt: skip
        kinds.append(f"{kind} {ours}" + (f" ({', '.join(others)})" if others else ""))
    cold, warm = record["cold"], record["warm"]
    stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in cold.get("stages", {}).items())  # of schema 2
    of_it = f" ({stages}; the median of {len(record['colds'])})" if stages else ""
    return (
        f"Microseconds of the host for a call, whose kernels are then in the stream: {'; '.join(kinds)}. The first call of a "
        f"process: {warm['seconds']:.3f} s with the binary on disk, {cold['seconds']:.1f} s where it is compiled{of_it} "
        f"(`benchmarks/results/{name}`; `python -m tessera.bench --host`)."
    )


def _beside_peers(report: Report, name: str) -> str:
    """The paper's grid as a table, a line for every other grid of the report, and the losing cells, the worst first."""
    versions, peers = report.machine.versions, [peer for peer in report.contenders if report.is_peer(peer)]
    head = (
        f"{report.direction.value.capitalize()}, {report.dtype}, {report.machine.gpus[0].name}, torch {versions['torch']}, "
        f"Triton {versions['triton']}, {report.date[:10]}; interleaved with {', '.join(peers)} in one run "
        f"(`benchmarks/results/{name}`; ceilings of the run: {report.ceilings}). The papers' grid, 16384 tokens, hidden 2048: "
        "TFLOP/s, and in brackets the ratio to the fastest peer of the cell."
    )
    figure = f"![{report.direction.value.capitalize()}: the papers' grid](docs/images/{report.direction.value}.png)"
    cells = {cell.name: cell for cell in report.cells}
    paper = [case.name for case in GRIDS["paper"].cases]
    sizes = list(dict.fromkeys(family_of(cell)[1] for cell in paper))
    lines = [head, "", figure, "", "| | " + " | ".join(sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for family in dict.fromkeys(family_of(cell)[0] for cell in paper):
        row = [_rate(report, cells.get(f"{family}, {size}")) for size in sizes]
        lines.append(f"| {family} | " + " | ".join(row) + " |")
    lines += ["", *(_grid_line(report, part, cells) for part in report.grid.split("+"))]
    behind = sorted((ratio, cell.name) for cell in report.cells if (ratio := report.over_best(cell)) is not None and ratio < 1)
    if behind:
        named = ", ".join(f"{cell} {ratio:.3f}" for ratio, cell in behind[:LOST])
        rest = f" ... ({len(behind)} in all)" if len(behind) > LOST else ""
        lines += ["", f"Behind the fastest peer, the worst first: {named}{rest}."]
    return "\n".join(lines)


def _rate(report: Report, cell: CellResult | None) -> str:
    rate, ratio = (None, None) if cell is None else (cell.rate(report.ours), report.over_best(cell))
    return "" if rate is None else f"{rate:.0f}" + ("" if ratio is None else f" ({ratio:.2f})")


def _grid_line(report: Report, grid: str, cells: dict[str, CellResult]) -> str:
    """One grid in one line: the mean over the fastest peers, its worst cell, and what a fixed order costs, if that was timed."""
    mine = [cells[case.name] for case in GRIDS[grid].cases if case.name in cells]
    ratios = {cell.name: ratio for cell in mine if (ratio := report.over_best(cell)) is not None}
    if not ratios:
        return f"- {grid}: not timed."
    worst = min(ratios, key=lambda cell: ratios[cell])
    mean = f"mean {geomean(ratios.values()):.3f} in {len(ratios)} cells, worst {ratios[worst]:.3f} ({worst})"
    line = f"- {grid} ({GRIDS[grid].about}): {mean}"
    entries = (cell.entries.get(f"{report.ours}-deterministic") for cell in mine)
    ordered = [entry.speedup.median for entry in entries if entry is not None and entry.speedup is not None]
    if not ordered:
        return line + "."
    where = "" if len(ordered) == len(mine) else f" in {len(ordered)} of them"
    return line + f"; deterministic costs {geomean(ordered):.2f}, at most {max(ordered):.2f}{where}."


def training() -> str:
    """The newest training record: model FLOP utilisation, step and memory of each contender, and the newest loss curves."""
    parts = []
    for path in sorted(RESULTS.glob("training_*.json"))[-1:]:
        parts.append(_training_table(json.loads(path.read_text()), path.name))
    for path in sorted(RESULTS.glob("learning_*.json"))[-1:]:
        parts.append(_learning(json.loads(path.read_text()), path.name))
    return "\n\n".join(parts) or "Nothing measured yet."


def _training_table(record: dict[str, Any], name: str) -> str:
    shape, here = record["shape"], record["machine"]
    model = (
        f"{shape['layers']} layers, hidden {shape['hidden']}, {shape['heads']} heads of {shape['hidden'] // shape['heads']}, "
        f"{record['parameters'] / 1e9:.2f} billion parameters, {record['dtype']} with float32 masters, AdamW"
    )
    head = (
        f"Whole training steps of a GPT ({model}; {record['tokens']} tokens a step), {here['gpus'][0]['name']}, torch "
        f"{here['versions']['torch']}, {record['date'][:10]}; all contenders in turns, step by step "
        f"(`benchmarks/results/{name}`). Milliseconds a step (in brackets how many times faster ours is), model FLOP utilisation "
        "by Megatron-LM's formula (which counts causal attention as full; of 989.4 TFLOP/s), peak memory."
    )
    lengths = record["lengths"]
    titles = [f"{length['batch']} x {_thousands(length['seqlen'])}" for length in lengths]
    lines = [head, "", "| attention | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for contender in lengths[0]["entries"]:
        row = [_step(length["entries"][contender]) for length in lengths]
        lines.append(f"| {contender} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _step(result: dict[str, Any]) -> str:
    if result["seconds"] is None:
        return result["outcome"]
    used = f", {result['utilisation']:.1%}" if result["utilisation"] else ""
    memory = f", {result['peak_bytes'] / 1e9:.1f} GB" if result["peak_bytes"] else ""
    ratio = f" ({result['speedup']['median']:.2f})" if result["speedup"] else ""
    return f"{1e3 * result['seconds']['median']:.1f} ms{ratio}{used}{memory}"


def _learning(record: dict[str, Any], name: str) -> str:
    lesson, dtype = record["lesson"], record["lesson"]["dtype"]
    held_out = ", ".join(f"{curve['name']} {curve['held_out']:.3f}" for curve in record["curves"])
    model = f"{lesson['layers']} layers, hidden {lesson['hidden']}, {lesson['batch']} x {lesson['seqlen']} bytes a step"
    return (
        f"![Loss curves that lie on each other](docs/images/losses.png)\n\n*{lesson['steps']} steps of a byte-level GPT "
        f"({model}) on the sources of Python's standard library, the same weights and batches for each. Ours "
        f"({record['kernel']}) lies {record['distance']:.4f} nats from the float32 curve in the mean over the steps; twice what "
        f"{dtype} alone does is {record['allowed']:.4f}. Held-out text at the end, nats a byte: {held_out} "
        f"(`benchmarks/results/{name}`; `tessera learn` on your machine).*"
    )


def serving() -> str:
    """The newest record of `python -m tessera.bench.decoding`: GB/s of K and V, the ratio to each peer, losing cells first."""
    parts = []
    for path in sorted(RESULTS.glob("decode_*.json"))[-1:]:
        parts.append(_decoding(json.loads(path.read_text()), path.name))
    return "\n\n".join(parts) or "Nothing measured yet."


def _decoding(record: dict[str, Any], name: str) -> str:
    peers = ("cudnn", "fa3", "fa2")
    head = (
        f"Decoding over a KV cache, bf16, {record['device']}, torch {record['torch']}, Triton {record['triton']}, "
        f"{record['date']}; CUDA graphs, interleaved in one run, buffers rotated past L2 (`benchmarks/results/{name}`). 32 query "
        "and 8 key/value heads of 128 but where a row says otherwise; FA3 with its scheduler metadata made before. "
        "GB/s of K and V, in brackets of a copy's; then how many times faster than each peer."
    )
    lines = [head, "", "| sequences | microseconds | GB/s | " + " | ".join(peers) + " |", "|---" * (3 + len(peers)) + "|"]
    for cell in sorted(record["cells"], key=_least_ratio):
        times, rates = cell["microseconds"], cell["gigabytes_per_second"]
        if "tessera" not in times:
            lines.append(f"| {cell['cell']} | {cell['absent'].get('tessera', '')} |" + " |" * (1 + len(peers)))
            continue
        ratios = [f"{times[peer] / times['tessera']:.2f}" if peer in times else "" for peer in peers]
        rate = f"{rates['tessera']:.0f} ({rates['tessera'] / rates['copy']:.2f})"
        lines.append(f"| {cell['cell']} | {times['tessera']:.1f} | {rate} | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


def _least_ratio(cell: dict[str, Any]) -> float:
    times = cell["microseconds"]
    others = [time for who, time in times.items() if who not in ("tessera", "copy")]
    return min(others, default=math.inf) / times.get("tessera", math.inf)


def generation() -> str:
    """The newest record of `tessera demo --generate`: what was served, and what each context cost."""
    parts = []
    for path in sorted(RESULTS.glob("generation_*.json"))[-1:]:
        parts.append(_contexts(json.loads(path.read_text()), path.name))
    return "\n\n".join(parts) or "Nothing measured yet."


def _contexts(record: dict[str, Any], name: str) -> str:
    served, judged, here = record["served"], record["judged"], record["machine"]
    place = here["gpus"][0]["name"] if record["device"] != "cpu" else here["cpu"]["name"]
    decoded = served["new_tokens"] - served["answers"]  # the first token of each comes with its prompt
    prefill, decode = served["prompt_tokens"] / served["prefill_s"], decoded / served["decode_s"]
    exact = f"float32's choice: ours {judged['exact']} times, eager's in {record['dtype']} {judged['eager_exact']}"
    near = f", the other {judged['near']} as good within {record['dtype']}'s rounding ({exact})" if judged["near"] else ""
    head = (
        f"{place}, {record['dtype']}, random weights (`benchmarks/results/{name}`). A Llama of {_model(record, 'serving')} "
        f"serves {served['answers']} requests of many lengths, in continuous batches over a paged cache: "
        f"{served['prompt_tokens']} tokens of prompts at {prefill:,.0f} a second, {served['new_tokens']} new ones at "
        f"{decode:,.0f} a second; {judged['equal']} of {judged['tokens']} are eager attention's own{near}. Then one prompt "
        f"through {_model(record, 'reading')}, in pages and in chunks, and a step behind it:"
    )
    titles = ("context", "prefill", "tokens/s", "a decode step", "cache", "peak memory", "one layer's scores, eager")
    lines = [head, "", "| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for context in record["contexts"]:
        cells = (
            _thousands(context["tokens"]), f"{context['prefill_s']:.2f} s", f"{context['tokens'] / context['prefill_s']:,.0f}",
            f"{1e3 * context['decode_s']:.2f} ms", _gigabytes(context["cache_bytes"]), _gigabytes(context["peak_bytes"]),
            _gigabytes(context["scores_bytes"]),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gigabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:,.2f} GB" if size < 1e11 else f"{size / 1e9:,.0f} GB"


def _model(record: dict[str, Any], part: str) -> str:
    shape = record["shapes"][part]
    heads = f"{shape['heads_q']}/{shape['heads_kv']} heads of {shape['head_dim']}"
    return f"{shape['layers']} layers (hidden {shape['hidden']}, {heads})"


def _thousands(number: int) -> str:
    return f"{number // 1024}k" if number >= 1024 else str(number)


def updated(text: str) -> str:
    parts = {
        "speed": speed,
        "support": support,
        "benchmarks": benchmarks,
        "training": training,
        "serving": serving,
        "generation": generation,
    }
    for marker, body in ((name, part()) for name, part in parts.items()):
        pattern = rf"(<!-- {marker}:begin -->\n).*?(<!-- {marker}:end -->)"
        text = re.sub(pattern, lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text, flags=re.DOTALL)
    return text


def main() -> int:
    text = README.read_text()
    new = updated(text)
    if "--check" in sys.argv[1:]:
        if new != text:
            print("README.md is stale: run `make matrix`", file=sys.stderr)
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
