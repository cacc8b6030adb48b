"""The figures: a grid's rates as bars (in the style of the FlashAttention papers), the demo's growth curves, losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.bench.grids import family_of
from tessera.bench.learning import LearningReport
from tessera.bench.report import CellResult, Report

_OURS = "#0b6e4f"
_OTHERS = ("#9aa5b1", "#f2a65a", "#5b8fd6", "#b07aa1", "#d1495b", "#6c757d")
_FEWEST_PLACES = 3  # a panel with fewer groups keeps the width of its bars
_INK = "#22303c"
_SMOOTHED_SHARE = 30  # a smoothed loss is the mean over this part of the run


def _pyplot() -> Any:
    """matplotlib's pyplot, drawing to files alone. Raises ImportError, in words, where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots are drawn by matplotlib: pip install 'tessera-attn[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({
        "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _INK, "text.color": _INK,
        "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "legend.frameon": False, "axes.titleweight": "bold",
        "axes.titlesize": 10.5,
    })  # fmt: skip
    return pyplot


def _length(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def _colours(contenders: Sequence[str], ours: str) -> dict[str, str]:
    others = iter(_OTHERS * (1 + len(contenders) // len(_OTHERS)))
    return {name: _OURS if name == ours else next(others) for name in contenders}


def rates(report: Report, path: Path) -> Path:
    """Bars of each contender's rate by sequence length, one panel for each head dim and mask; written to `path` as PNG."""
    panels: dict[str, list[CellResult]] = {}
    for cell in report.cells:
        if any(entry.rate is not None for entry in cell.entries.values()):
            panels.setdefault(family_of(cell.name)[0], []).append(cell)
    if not panels:
        raise ValueError(f"report={report.grid!r}: no cell was timed; there is nothing to draw")
    pyplot = _pyplot()
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(max(6.4, 5.6 * columns), 2.9 * lines + 0.9), squeeze=False)
    colours = _colours(report.contenders, report.ours)
    for axis, (family, cells) in zip(axes.flat, panels.items(), strict=False):
        _bars(axis, cells, colours, report.ours)
        head_dim, _, rest = family.partition(" ")
        axis.set_title(f"head dim {head_dim.removeprefix('d')}, {rest}", loc="left")
    for axis in axes[:, 0]:
        axis.set_ylabel(report.metric.value)
    for unused in axes.flat[len(panels) :]:
        unused.set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=len(labels), bbox_to_anchor=(0.99, 0.995))
    device = report.machine.gpus[0].name if report.machine.gpus and report.device != "cpu" else report.machine.cpu.name
    title = f"Attention {report.direction.value}, {report.dtype}\n{device}, {report.date[:10]}"
    figure.text(0.012, 0.985, title, ha="left", va="top", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / figure.get_figheight()))
    return _save(pyplot, figure, path)


def _bars(axis: Any, cells: Sequence[CellResult], colours: dict[str, str], ours: str) -> None:
    width = 0.84 / max(1, len(colours))
    top = max(rate for cell in cells for name in colours if (rate := cell.rate(name)) is not None)
    for index, (name, colour) in enumerate(colours.items()):
        places = [i - 0.42 + width * (index + 0.5) for i in range(len(cells))]
        heights = [cell.rate(name) or 0.0 for cell in cells]
        axis.bar(places, heights, width * 0.94, color=colour, label=name, zorder=2)
        for x, height in zip(places, heights, strict=True):
            if height:
                label = f"{height:.0f}" if top >= 20 else f"{height:.2g}"
                weight = "bold" if name == ours else "normal"
                axis.annotate(label, (x, height), ha="center", va="bottom", fontsize=6.5, fontweight=weight, xytext=(0, 1),
                              textcoords="offset points")  # fmt: skip
    axis.set_xticks(range(len(cells)), [family_of(cell.name)[1] for cell in cells])
    axis.set_xlim(-0.6, max(len(cells), _FEWEST_PLACES) - 0.4)
    axis.set_ylim(0, top * 1.14)
    axis.grid(axis="y", color="#e3e8ed", zorder=0)
    axis.set_xlabel("sequence length")


@dataclass(frozen=True)
class Curve:
    """One line of a growth figure: points (tokens, seconds, bytes), in rising order of tokens."""

    label: str
    points: tuple[tuple[int, float, float], ...]


def growth(ours: Curve, naive: Curve, caption: str, path: Path) -> Path:
    """Time and memory by sequence length, ours beside the naive formula's, both axes logarithmic; written as PNG.

    Past the naive curve's last point its memory is drawn on as a dotted line, quadratic in the tokens.
    """
    pyplot = _pyplot()
    figure, (time_axis, memory_axis) = pyplot.subplots(1, 2, figsize=(10.4, 4.3))
    for curve, colour, marker in ((naive, _OTHERS[1], "s"), (ours, _OURS, "o")):
        if not curve.points:
            continue
        tokens, seconds, memory = zip(*curve.points, strict=True)
        time_axis.plot(tokens, seconds, color=colour, marker=marker, label=curve.label, lw=2)
        megabytes = [value / 1e6 for value in memory]
        memory_axis.plot(tokens, megabytes, color=colour, marker=marker, label=curve.label, lw=2)
    _name_gap(time_axis, naive, ours, "faster", 1)
    _name_gap(memory_axis, naive, ours, "less", 2)
    _extend(memory_axis, naive, [tokens for tokens, _, _ in ours.points])
    ticks = [tokens for tokens, _, _ in ours.points]
    for axis, title, unit in ((time_axis, "Time", "seconds"), (memory_axis, "Peak memory over the inputs", "MB")):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(ticks, [_length(tokens) for tokens in ticks])
        axis.minorticks_off()
        axis.set_title(f"{title} ({unit})", loc="left")
        axis.set_xlabel("sequence length, tokens")
        axis.grid(color="#e3e8ed", zorder=0)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    time_axis.legend(loc="upper left")
    figure.text(0.012, 0.985, caption, ha="left", va="top", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    return _save(pyplot, figure, path)


def _name_gap(axis: Any, naive: Curve, ours: Curve, word: str, column: int) -> None:
    """How many times lower ours lies at the longest length that both have; `column` of the points."""
    if not naive.points:
        return
    low = {point[0]: point[column] for point in ours.points}
    tokens, high = naive.points[-1][0], naive.points[-1][column]
    if not low.get(tokens):
        return
    scale = 1.0 if column == 1 else 1e-6
    axis.vlines(tokens, scale * low[tokens], scale * high, color=_INK, lw=0.8, ls=(0, (2, 2)), zorder=1)
    ratio = high / low[tokens]
    label = f"{ratio:,.0f}x {word}" if ratio >= 10 else f"{ratio:.1f}x {word}"
    axis.annotate(label, (tokens, scale * low[tokens]), ha="left", va="top", fontsize=9.5, fontweight="bold", xytext=(4, -7),
                  textcoords="offset points")  # fmt: skip


def _extend(axis: Any, naive: Curve, tokens: Sequence[int]) -> None:
    """The naive curve's memory past its last point, growing with the square of the tokens."""
    if not naive.points or naive.points[-1][0] >= tokens[-1]:
        return
    last, _, memory = naive.points[-1]
    beyond = [last, *(t for t in tokens if t > last)]
    needed = [memory * (t / last) ** 2 / 1e6 for t in beyond]
    axis.plot(beyond, needed, color=_OTHERS[1], ls=":", lw=2)
    axis.annotate(f"would need {needed[-1] / 1e3:,.1f} GB", (beyond[-1], needed[-1]), ha="right", va="bottom", fontsize=8.5,
                  xytext=(-4, 4), textcoords="offset points")  # fmt: skip


def losses(report: LearningReport, path: Path) -> Path:
    """Every learner's loss by step, the same smoothed, and below how far each lies from the last (float32) one; as PNG."""
    pyplot = _pyplot()
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8.2, 5.6), sharex=True, height_ratios=(3, 1.3))
    reference, width = report.curves[-1], max(1, len(report.curves[-1].losses) // _SMOOTHED_SHARE)
    styles = ((_OURS, 2.4, "-"), (_OTHERS[1], 1.4, "--"), (_INK, 1.2, ":"))
    for curve, (colour, line, dashes) in zip(report.curves, (*styles[: len(report.curves) - 1], styles[-1]), strict=True):
        steps, smooth = range(width, len(curve.losses) + 1), _smoothed(curve.losses, width)
        above.plot(range(1, len(curve.losses) + 1), curve.losses, color=colour, lw=0.6, alpha=0.25)
        above.plot(steps, smooth, color=colour, lw=line, ls=dashes, label=f"{curve.name} (held out: {curve.held_out:.3f})")
        if curve is not reference:
            apart = [a - b for a, b in zip(smooth, _smoothed(reference.losses, width), strict=True)]
            below.plot(steps, apart, color=colour, lw=line, ls=dashes)
    below.axhline(0, color=_INK, lw=1.2, ls=":")
    above.set_ylabel("loss, nats a byte")
    below.set_ylabel("less float32's")
    below.set_xlabel(f"step (lines: means over {width})")
    above.legend(loc="upper right")
    for axis in (above, below):
        axis.grid(color="#e3e8ed", zorder=0)
    device = report.machine.gpus[0].name if report.machine.gpus and report.device != "cpu" else report.machine.cpu.name
    above.set_title(f"A byte-level GPT learns Python's standard library\n{report.kernel}, {device}", loc="left")
    figure.tight_layout()
    return _save(pyplot, figure, path)


def _smoothed(values: Sequence[float], width: int) -> list[float]:
    """Running means over `width` values."""
    return [sum(values[i : i + width]) / width for i in range(len(values) - width + 1)]


def _save(pyplot: Any, figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
    pyplot.close(figure)
    return path
